import random

import pytest
import torch

from lit_rlhf.text import left_pad, pack, stream

PAD = 99


def sequences(count, longest, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(90) for _ in range(generator.randint(1, longest))] for _ in range(count)]


def test_rows_by_hand():
    packed = pack([[1, 2], [3, 4, 5, 6], [7], [8, 9, 10]], PAD, row_length=6)
    assert packed.tokens.tolist() == [[3, 4, 5, 6, 1, 2], [8, 9, 10, 7, PAD, PAD]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 1]]
    assert packed.starts.tolist() == [4, 0, 9, 6]
    assert packed.lengths.tolist() == [2, 4, 1, 3]
    assert packed.ends.tolist() == [5, 3, 9, 8]
    assert packed.tokens.dtype == packed.positions.dtype == packed.starts.dtype == torch.int64


def test_a_row_each():
    packed = pack([[1], [2, 3, 4], [5, 6]], PAD, row_length=None)
    assert packed.tokens[packed.starts // 3].tolist() == [[1, PAD, PAD], [2, 3, 4], [5, 6, PAD]]
    assert packed.positions[packed.starts // 3].tolist() == [[0, 0, 1], [0, 1, 2], [0, 1, 0]]
    assert (packed.starts % 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("row_length", [1, 20, 64, 10_000, None])
def test_every_sequence_comes_back(row_length):
    given = sequences(50, 20)
    packed = pack(given, PAD, row_length)
    tokens, positions = packed.tokens.flatten().tolist(), packed.positions.flatten().tolist()
    covered = []
    for sequence, start, length, end in zip(given, packed.starts, packed.lengths, packed.ends):
        place = range(int(start), int(start + length))
        assert [tokens[i] for i in place] == sequence and int(end) == place[-1]
        assert [positions[i] for i in place] == list(range(len(sequence)))
        assert place[0] // packed.tokens.shape[1] == place[-1] // packed.tokens.shape[1]  # within one row
        covered += place
    assert len(covered) == len(set(covered))
    rest = set(range(len(tokens))) - set(covered)
    assert all(tokens[i] == PAD for i in rest)
    # padding starts a sequence of its own: it continues none
    assert all(positions[i] == 0 or i - 1 in rest for i in rest)


def test_a_row_is_as_long_as_it_must_be():
    assert pack([[1] * 9, [2]], PAD, row_length=4).tokens.shape == (2, 9)  # the longest sequence
    assert pack([[1] * 3, [2]], PAD, row_length=100).tokens.shape == (1, 4)  # no wider than what there is
    assert pack([[1]], PAD).tokens.tolist() == [[1]]


def test_packing_saves_room():
    packed = pack(sequences(200, 30), PAD, row_length=128)
    assert packed.lengths.sum() / packed.tokens.numel() > 0.97


def test_stream_ends_each_document():
    tokens = stream([[1, 2], [], [3]], end_of_text=0)
    assert tokens.tolist() == [1, 2, 0, 0, 3, 0] and tokens.dtype == torch.int32


def test_left_pad():
    tokens, mask = left_pad([[1, 2], [3, PAD, 5], [6]], PAD)
    assert tokens.tolist() == [[PAD, 1, 2], [3, PAD, 5], [PAD, PAD, 6]]
    assert mask.tolist() == [[False, True, True], [True, True, True], [False, False, True]]  # by place, not by token
