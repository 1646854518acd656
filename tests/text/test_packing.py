import itertools
import random

import pytest
import torch

from lit_rlhf.text import pack, packing
from lit_rlhf.text.packing import Block, divided, left_pad, stream

PAD = 99


def sequences(count, longest, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(90) for _ in range(generator.randint(1, longest))] for _ in range(count)]


def test_blocks_by_hand(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 1.5)
    packed = pack([[1, 2], [3, 4, 5, 6], [7], [8, 9]], PAD)
    assert packed.blocks == (Block(1, 4), Block(3, 2))  # one token of padding is cheaper than a third block
    assert packed.tokens.tolist() == [3, 4, 5, 6, 1, 2, 8, 9, 7, PAD]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 0, 0]
    assert packed.starts.tolist() == [4, 0, 8, 6]
    assert packed.lengths.tolist() == [2, 4, 1, 2]
    assert packed.ends.tolist() == [5, 3, 8, 7]
    assert packed.tokens.dtype == packed.positions.dtype == packed.starts.dtype == torch.int64
    assert [rows.tolist() for rows in packed.by_block(packed.tokens)] == [[[3, 4, 5, 6]], [[1, 2], [8, 9], [7, PAD]]]
    assert packed.visible is None


def test_padded():
    packed = pack([[1], [2, 3, 4], [5, 6]], PAD, padded=True)
    assert packed.blocks == (Block(3, 3),)
    assert packed.tokens.tolist() == [2, 3, 4, 5, 6, PAD, 1, PAD, PAD]
    assert packed.starts.tolist() == [6, 0, 3]


def cost(sizes, cuts, block):
    """Tokens of blocks that are cut before ``cuts``, and what so many blocks cost."""
    edges = [0, *cuts, len(sizes)]
    return sum(block + sizes[a] * (b - a) for a, b in itertools.pairwise(edges))


@pytest.mark.parametrize("block", [0.5, 4, 40])
def test_blocks_are_cut_where_it_is_cheapest(monkeypatch, block):
    monkeypatch.setattr(packing, "BLOCK", block)
    for seed in range(5):
        given = sequences(9, 30, seed)
        packed = pack(given, PAD)
        sizes = sorted(map(len, given), reverse=True)
        every = (cuts for n in range(9) for cuts in itertools.combinations(range(1, 9), n))
        found = len(packed.tokens) + block * len(packed.blocks)
        assert found == min(cost(sizes, cuts, block) for cuts in every)


@pytest.mark.parametrize("settings", [{}, {"padded": True}, {"response_lengths": [1] * 50}])
def test_every_sequence_comes_back(settings):
    given = sequences(50, 20)
    packed = pack(given, PAD, **settings)
    tokens, positions = packed.tokens.tolist(), packed.positions.tolist()
    row_of = [row for row, (rows, width) in enumerate(rows_of(packed.blocks)) for _ in range(width)]
    covered = []
    for sequence, start, length, end in zip(given, packed.starts, packed.lengths, packed.ends):
        place = range(int(start), int(start + length))
        assert [tokens[i] for i in place] == sequence and int(end) == place[-1]
        assert [positions[i] for i in place] == list(range(len(sequence)))
        assert row_of[place[0]] == row_of[place[-1]] and (place[0] == 0 or row_of[place[0] - 1] != row_of[place[0]])
        covered += place
    assert len(covered) == len(set(covered))
    assert all(tokens[i] == PAD and positions[i] == 0 for i in set(range(len(tokens))) - set(covered))


def rows_of(blocks):
    return [(1, width) for rows, width in blocks for _ in range(rows)]


def test_packing_saves_room():
    packed = pack(sequences(200, 30), PAD)
    assert packed.lengths.sum() / packed.tokens.numel() > 0.99
    assert pack([[1]], PAD).tokens.tolist() == [1]


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
    packed = pack(ANSWERED, PAD, ANSWERS, share_prompts=True)
    assert packed.blocks == (Block(1, 8), Block(1, 2))
    assert packed.tokens.tolist() == [1, 2, 3, 7, 8, 9, 6, 6, 4, 5]
    assert packed.positions.tolist() == [0, 1, 2, 3, 3, 4, 3, 4, 0, 1]
    assert packed.starts.tolist() == [0, 0, 8, 0] and packed.response_starts.tolist() == [3, 4, 9, 6]
    assert packed.ends.tolist() == [3, 5, 9, 7]
    first, second = packed.visible
    seen = [[j for j in range(8) if first[0, 0, i, j]] for i in range(8)]
    prompt = [0, 1, 2]
    assert seen[:6] == [[0], [0, 1], prompt, [*prompt, 3], [*prompt, 4], [*prompt, 4, 5]]
    assert seen[6:8] == [[*prompt, 6], [*prompt, 6, 7]]
    assert second.tolist() == [[[[True, False], [True, True]]]]
    back = torch.arange(5).expand(4, 5)
    assert packed.from_end(back)[[0, 1, 3]].tolist() == [[3, 2, 1, 0, -1], [5, 4, 2, 1, 0], [7, 6, 2, 1, 0]]


def test_prompts_that_nobody_shares_are_laid_as_ever():
    given = [[1, 2, 7], [3, 8], [1, 9]]
    plain, asked = pack(given, PAD, [1, 1, 1]), pack(given, PAD, [1, 1, 1], share_prompts=True)
    assert asked.parts is None and asked.visible is None and asked.blocks == plain.blocks
    assert all(torch.equal(a, b) for a, b in zip(plain, asked) if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("attention", [0.1, 10, 1000])
def test_every_sequence_comes_back_from_shared_rows(monkeypatch, attention):
    monkeypatch.setattr(packing, "ATTENTION", attention)
    monkeypatch.setattr(packing, "BLOCK", 0.5)
    generator = random.Random(1)
    prompts = sequences(9, 8)
    given = [[*prompt, *answer] for prompt in prompts for answer in sequences(4, 9, generator.random())]
    given.append([5, 6, 7])  # no prompt
    lengths = [len(s) - len(p) for s, p in zip(given, [p for p in prompts for _ in range(4)])] + [3]
    order = generator.sample(range(len(given)), len(given))
    given, lengths = [given[i] for i in order], [lengths[i] for i in order]
    packed = pack(given, PAD, lengths, share_prompts=True)
    back = torch.arange(max(map(len, given))).expand(len(given), -1)
    places, tokens, positions = packed.from_end(back).tolist(), packed.tokens, packed.positions
    row_of, column_of = [], []
    for row, (_, width) in enumerate(rows_of(packed.blocks)):
        row_of += [row] * width
        column_of += range(width)
    visible = packed.visible and [mask[0] for masks in packed.visible for mask in masks]
    for i, (sequence, place) in enumerate(zip(given, places)):
        place = place[: len(sequence)][::-1]
        assert tokens[place].tolist() == sequence
        assert positions[place].tolist() == list(range(len(sequence)))
        assert len({row_of[p] for p in place}) == 1
        columns = [column_of[p] for p in place]
        if visible is not None:  # the last token sees its sequence, and nothing else
            assert visible[row_of[place[0]]][columns[-1]].nonzero().flatten().tolist() == sorted(columns), i
    if attention == 1000:
        assert packed.tokens.numel() == sum(map(len, prompts)) + sum(lengths)  # the prompts once, no padding


def test_answers_share_a_prompt_while_each_is_cheaper_so():
    """k answers of 30 tokens behind a prompt of 20: (20 + 30k)(1 + (20 + 30k) / 1000) / k is least at 4.8."""
    each = {k: (20 + 30 * k) * (1 + (20 + 30 * k) / packing.ATTENTION) / k for k in range(1, 9)}
    assert min(each, key=each.get) == 5
    given = [[*range(20), *range(i, i + 30)] for i in range(40)]
    packed = pack(given, PAD, [30] * 40, share_prompts=True)
    assert packed.blocks == (Block(10, 20 + 4 * 30),)  # 5 are beyond what is best, 4 short of it
    assert pack([given[0]] * 2, PAD, [30] * 2, share_prompts=True).blocks == (Block(1, 80),)


def test_runs_by_hand():
    assert packing.runs([3, 4, 5, 1, 1, 9, 2], 8) == [slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 7)]
    assert packing.runs([3, 4, 5, 1, 1, 9, 2], 100, most=3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    # Two prompts of 4 tokens: 4 + 3 * 1, then 4 + 2 * 1; a run that begins within a prompt's lays it down again.
    assert packing.runs([5] * 5, 7, shared=[0, 4, 4, 0, 4]) == [slice(0, 3), slice(3, 5)]
    assert packing.runs([5] * 5, 6, shared=[0, 4, 4, 4, 4]) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert packing.runs([5], 1) == [slice(0, 1)]


def test_parts_are_halved_until_there_are_enough():
    assert divided([[1, 2, 3], [4]], 2) == [[1, 2, 3], [4]]
    assert divided([[1, 2, 3], [4]], 4) == [[1], [2], [3], [4]]
    assert divided([range(3), range(3, 8)], 3) == [range(3), range(3, 5), range(5, 8)]
