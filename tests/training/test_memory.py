import torch

from lit_rlhf.training import peak_bytes, resident_bytes, start_peak


def test_the_peak_is_remembered_and_can_begin_anew():
    begun_anew = start_peak()
    before = resident_bytes()
    block = torch.ones(2**24)  # 64 MiB, each page written to
    assert resident_bytes() - before > 0.9 * block.nbytes
    del block
    assert peak_bytes() - before > 0.9 * 2**26
    if begun_anew:
        start_peak()
        assert peak_bytes() - before < 2**25
