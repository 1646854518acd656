import random

import pytest
import torch

from lit_rlhf.text import left_pad, pack, stream

PAD = 99


def sequences(count, longest, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(90) for _ in range(generator.randint(1, longest))] for _ in range(count)]


def test_rows_by_hand():
    packed = pack([[1, 2], [3, 4, 5, 6], [7], [8, 9]], PAD, row_length=5)
    assert packed.tokens.tolist() == [[3, 4, 5, 6, 7], [1, 2, 8, 9, PAD]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 1, 0]]
    assert packed.starts.tolist() == [5, 0, 4, 7]
    assert packed.lengths.tolist() == [2, 4, 1, 2]
    assert packed.ends.tolist() == [6, 3, 4, 8]
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


ANSWERED = [[1, 2, 3, 7], [1, 2, 3, 8, 9], [4, 5], [1, 2, 3, 6, 6]]  # three answers to one prompt, one to another
ANSWERS = [1, 2, 1, 2]


def test_a_shared_prompt_by_hand():
    packed = pack(ANSWERED, PAD, 10, ANSWERS, share_prompts=True)
    assert packed.tokens.tolist() == [[1, 2, 3, 7, 8, 9, 6, 6, 4, 5]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 3, 4, 3, 4, 0, 1]]
    assert packed.starts.tolist() == [0, 0, 8, 0] and packed.response_starts.tolist() == [3, 4, 9, 6]
    assert packed.ends.tolist() == [3, 5, 9, 7]
    seen = [[j for j in range(10) if packed.visible[0, 0, i, j]] for i in range(10)]
    prompt = [0, 1, 2]
    assert seen[:6] == [[0], [0, 1], prompt, [*prompt, 3], [*prompt, 4], [*prompt, 4, 5]]
    assert seen[6:8] == [[*prompt, 6], [*prompt, 6, 7]]
    assert seen[8:] == [[8], [8, 9]]
    back = torch.arange(5).expand(4, 5)
    assert packed.from_end(back)[[0, 1, 3]].tolist() == [[3, 2, 1, 0, -1], [5, 4, 2, 1, 0], [7, 6, 2, 1, 0]]


def test_prompts_that_nobody_shares_are_laid_as_ever():
    given = [[1, 2, 7], [3, 8], [1, 9]]
    plain, asked = pack(given, PAD, 10, [1, 1, 1]), pack(given, PAD, 10, [1, 1, 1], share_prompts=True)
    assert asked.parts is None and asked.visible is None
    assert all(torch.equal(a, b) for a, b in zip(plain[:5], asked[:5]))


@pytest.mark.parametrize("row_length", [1, 12, 40, 1000])
def test_every_sequence_comes_back_from_shared_rows(row_length):
    generator = random.Random(1)
    prompts = sequences(9, 8)
    given = [[*prompt, *answer] for prompt in prompts for answer in sequences(4, 9, generator.random())]
    given.append([5, 6, 7])  # no prompt
    lengths = [len(s) - len(p) for s, p in zip(given, [p for p in prompts for _ in range(4)])] + [3]
    order = generator.sample(range(len(given)), len(given))
    given, lengths = [given[i] for i in order], [lengths[i] for i in order]
    packed = pack(given, PAD, row_length, lengths, share_prompts=True)
    back = torch.arange(max(map(len, given))).expand(len(given), -1)
    places, tokens, positions = packed.from_end(back).tolist(), packed.tokens.flatten(), packed.positions.flatten()
    for i, (sequence, place) in enumerate(zip(given, places)):
        place = place[: len(sequence)][::-1]
        assert tokens[place].tolist() == sequence
        assert positions[place].tolist() == list(range(len(sequence)))
        row, width = place[0] // packed.tokens.shape[1], packed.tokens.shape[1]
        columns = [p - row * width for p in place]
        if packed.visible is not None:  # the last token sees its sequence, and nothing else
            assert packed.visible[row, 0, columns[-1]].nonzero().flatten().tolist() == sorted(columns), i
    if row_length == 1000:
        assert packed.tokens.numel() == sum(map(len, prompts)) + sum(lengths)  # the prompts once, no padding


def test_rows_are_narrower_where_that_is_cheaper():
    assert pack([[1] * 70, [2] * 72, [3] * 65], PAD, row_length=128).tokens.shape == (3, 72)
    assert pack([[1] * 100, [2] * 28], PAD, row_length=128).tokens.shape == (1, 128)
