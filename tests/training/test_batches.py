from itertools import islice

import pytest
import torch
from lightning import Trainer

from lit_rlhf.text.packing import runs
from lit_rlhf.training import seeded
from lit_rlhf.training.batches import BatchLoader, in_order, sharding, shuffled
from lit_rlhf.training.parts import Part


def loader(count, batch_size, order=in_order, **settings):
    return BatchLoader(order(count), batch_size, lambda mine, everyones: (mine, everyones), **settings)


def mine(batches):
    return [batch[0] for batch in batches]


def test_batches_by_hand():
    assert list(loader(7, 3)) == [([0, 1, 2], [0, 1, 2]), ([3, 4, 5], [3, 4, 5])]
    assert mine(loader(7, 3, keep_rest=True)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert mine(loader(6, 3, keep_rest=True)) == [[0, 1, 2], [3, 4, 5]]
    assert mine(loader(2, 3)) == [] and mine(loader(2, 3, keep_rest=True)) == [[0, 1]]


@pytest.mark.parametrize("keep_rest", [False, True])
@pytest.mark.parametrize("count", [5, 6, 7, 24, 25])
def test_it_is_as_long_as_it_says(count, keep_rest):
    for accumulate in (1, 2, 3):
        batches = loader(count, 2, keep_rest=keep_rest, accumulate=accumulate)
        assert len(batches) == len(list(batches)) and len(batches) % accumulate == 0


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_shards_together_are_the_batch_of_one_process(world_size, accumulate):
    shards = world_size * accumulate
    one = list(loader(50, 2 * shards, lambda n: shuffled(n, seed=4)))
    ranks = [
        list(loader(50, 2, lambda n: shuffled(n, seed=4), world_size=world_size, rank=rank, accumulate=accumulate))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {len(one) * accumulate} and len(one) == 50 // (2 * shards)
    for step, (whole, everyones) in enumerate(one):
        parts = [batches[step * accumulate + micro] for batches in ranks for micro in range(accumulate)]
        assert all(len(part) == 2 and seen == everyones == whole for part, seen in parts)
        assert sorted(i for part, _ in parts for i in part) == sorted(whole)


def test_a_rest_is_dealt_out_too():
    ranks = [mine(loader(7, 2, world_size=2, rank=rank, keep_rest=True)) for rank in range(2)]
    assert ranks == [[[0, 2], [4, 6]], [[1, 3], [5]]]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12, 13])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_in_evaluation_each_item_counts_once_and_all_take_equal_numbers_of_steps(count, batch_size, world_size):
    ranks = [loader(count, batch_size, world_size=world_size, rank=r, keep_rest=True) for r in range(world_size)]
    read = [mine(batches) for batches in ranks]
    assert len({len(batches) for batches in read}) == 1 and all(all(batches) for batches in read)
    counted = [
        (step, item)
        for batches, steps in zip(ranks, read)
        for step, items in enumerate(steps)
        if not batches.fills_up(step)
        for item in items
    ]
    assert sorted(item for _, item in counted) == [*range(count)]
    assert [item // (batch_size * world_size) for _, item in sorted(counted)] == [s for s, _ in sorted(counted)]


@pytest.mark.parametrize("before", [(1, 1, 6), (2, 1, 3), (1, 3, 2), (3, 2, 1)])
@pytest.mark.parametrize("after", [(1, 1, 6), (2, 1, 3), (3, 1, 2), (6, 1, 1)])
def test_another_number_of_processes_goes_on_with_the_same_items(before, after):
    def ranks(world_size, accumulate, batch_size):
        settings = {"world_size": world_size, "accumulate": accumulate}
        return [loader(20, batch_size, lambda n: shuffled(n, seed=1), rank=r, **settings) for r in range(world_size)]

    whole, steps = loader(20, 6, lambda n: shuffled(n, seed=1)), 5  # three steps an epoch
    expected = [seen for _ in range(4) for _, seen in whole][steps : steps + 3]
    first = ranks(*before)[0]
    taken = (seen for _ in range(9) for seen in first)
    for _ in range(steps * before[1]):
        next(taken)
    state = first.state_dict()
    for rank, batches in enumerate(ranks(*after)):
        batches.load_state_dict(state)
        found = [*islice((batch for _ in range(9) for batch in batches), 3)]
        assert [seen for _, seen in found] == expected
        assert all(own == seen[rank :: after[0]] for own, seen in found)


def test_another_size_of_a_step_goes_on_where_the_last_one_ended():
    first = loader(20, 6)
    next(iter(first))
    larger = loader(20, 9)
    larger.load_state_dict(first.state_dict())
    assert [seen for _ in range(2) for _, seen in larger][:3] == [[*range(6, 15)], [*range(9)], [*range(9, 18)]]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_restored_loader_goes_on_with_the_next_batch(accumulate):
    def fresh():
        return loader(11, 2, lambda n: shuffled(n, seed=1), accumulate=accumulate)

    uninterrupted = fresh()
    expected, states = [], [uninterrupted.state_dict()]
    for _ in range(4):
        for batch in uninterrupted:
            expected.append(batch)
            states.append(uninterrupted.state_dict())
    length = len(uninterrupted)
    assert expected[:length] != expected[length : 2 * length]  # epochs differ
    for taken in range(2 * length + 1):  # within an epoch and at its end
        restored = fresh()
        restored.load_state_dict(states[taken])
        assert [*restored, *restored] == expected[taken:][: 2 * length]


def test_epochs_of_a_trainer_that_takes_fewer_batches_are_all_whole():
    batches = loader(8, 2, lambda n: shuffled(n, seed=1))  # 4 an epoch; the trainer takes 3
    taken = [batch for _ in range(4) for batch in islice(batches, 3)]
    again = loader(8, 2, lambda n: shuffled(n, seed=1))
    assert taken == [batch for _ in range(3) for batch in again]


def test_the_place_is_behind_the_batch_in_hand():
    batches = loader(8, 2)
    iterator = iter(batches)
    next(iterator), next(iterator)
    # A checkpoint is taken after the batch's step.
    assert batches.state_dict() == {"epoch": 0, "items": 4, "micro_batches": 0}


def test_evaluation_begins_anew_each_time():
    batches = loader(7, 2, keep_rest=True)
    next(iter(batches))  # the trainer stopped early: limit_val_batches=1
    for _ in range(2):
        assert mine(batches) == [[0, 1], [2, 3], [4, 5], [6]]


def test_an_epoch_is_a_permutation_of_its_own():
    order = shuffled(100, seed=0)
    assert sorted(order(0)) == sorted(order(1)) == list(range(100))
    assert order(0) == shuffled(100, seed=0)(0)
    assert len({tuple(order(epoch)) for epoch in range(5)} | {tuple(shuffled(100, seed=1)(0))}) == 6


def test_an_epoch_of_another_length():
    assert sorted(shuffled(10, 0, length=30)(0)) == sorted([*range(10)] * 3)
    assert sorted(shuffled(10, 0, length=25)(0)[:20]) == sorted([*range(10)] * 2)
    assert len(shuffled(10, 0, length=25)(0)) == 25 and len(set(shuffled(10, 0, length=4)(0))) == 4


def test_a_generator_depends_on_its_numbers_alone():
    def draw(*numbers):
        return torch.rand(3, generator=seeded(*numbers)).tolist()

    torch.manual_seed(0)
    first = draw(1, 2)
    torch.rand(5)
    assert draw(1, 2) == first
    assert len({tuple(draw(*n)) for n in [(1, 2), (2, 1), (1,), (1, 2, 0), (1, 3), (0, 2)]}) == 6


def test_no_two_places_have_the_same_generator():  # Python's hash takes -1 for -2, and 2**61 - 1 for 0
    near = [(a, b) for a in range(30) for b in range(30)]
    places = [(5, -1), (5, -2), (51,), (), (0,), (2**61 - 1,), (5, 2**63), *near]
    # Of a seed, a generator on the CPU takes 32 bits.
    assert len({seeded(*place).initial_seed() % 2**32 for place in places}) == len(set(places))
    assert seeded(1, 2).initial_seed() == 6288156900839449082  # the same on every machine


def test_sharding_comes_from_the_trainer():
    assert sharding(None) == {}
    trainer = Trainer(accelerator="cpu", accumulate_grad_batches=3, logger=False, enable_checkpointing=False)
    assert sharding(trainer) == {"world_size": 1, "rank": 0, "accumulate": 3}


def test_processes_take_equally_many_parts_of_a_batch():
    def cut(mine):  # runs of at most 10 tokens; an example has as many as its number says
        return [mine[run] for run in runs(mine, 10)]

    loaders = [BatchLoader(in_order(16), 4, lambda m, _: m, world_size=2, rank=rank, cut=cut) for rank in range(2)]
    for one, two in zip(*loaders):
        counts = {len(batch) if isinstance(batch[0], Part) else 1 for batch in (one, two)}
        assert len(counts) == 1
    last = [[part.batch for part in batch] for batch in (one, two)]
    assert last == [[[8], [10], [12], [14]], [[9], [11], [13], [15]]]
