"""PPO-ptx: language modelling on pretraining text beside the policy's loss (InstructGPT, eq. 2)."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.errors import UserError
from lit_rlhf.stages import PretrainDataModule, WorldPretrainDataModule
from lit_rlhf.stages.ppo import MonteCarlo, Scoring

NOTHING = {  # no advantage, no penalty, no critic: all that is left is the text, a row per answer
    "ptx_ratio": 1.0,
    "advantage": MonteCarlo(), "whiten": False, "kl_coef": 0.0,
    "scoring": Scoring(functions=[lambda p, r, **_: [0.0] * len(r)], reward_model_weight=0.0, missing_eos_penalty=0.0),
}  # fmt: skip


@pytest.fixture
def text(world):
    return partial(WorldPretrainDataModule, world, documents=200, block_size=24, held_out=0.1)


@pytest.fixture
def kept_rows():
    """(module) -> list of the rows that its steps will have drawn."""

    def watch(module):
        rows, draw = [], module.ptx.rows
        module.ptx.rows = lambda *arguments: rows.append(draw(*arguments)) or rows[-1]
        return rows

    return watch


def language_model_gradients(policy, rows):
    """By transformers' own loss, the mean over all tokens."""
    loss = policy(input_ids=rows.tokens, labels=rows.tokens).loss
    return loss, torch.autograd.grad(loss, list(policy.parameters()))


def test_a_step_on_text_alone_is_a_language_model_step(family, reward_model_of, ppo, train, text, kept_rows):
    sgd, settings = partial(torch.optim.SGD, lr=0.1), {**NOTHING, "max_grad_norm": 1e9, "minibatch_size": 8}
    module = ppo(family, reward_model_of(family), ptx=text, ptx_coef=0.5, optimizer=sgd, **settings)
    rows = kept_rows(module)
    train(module)
    assert len(rows) == 1 and rows[0].tokens.shape == (8, 25)
    loss, gradients = language_model_gradients(family.eval(), rows[0])
    for after, before, gradient in zip(module.policy.parameters(), family.parameters(), gradients):
        assert_close(after, before - 0.1 * 0.5 * gradient, atol=1e-6, rtol=1e-4)
    norm = 0.5 * torch.cat([g.flatten() for g in gradients]).norm().item()
    assert module.logged["ppo/ptx_loss"] == [pytest.approx(loss.item(), rel=1e-5)]
    assert module.logged["ppo/ptx_grad_norm"] == [pytest.approx(norm, rel=1e-4)]
    assert module.logged["ppo/rl_grad_norm"] == [0]
    assert module.logged["ppo/grad_norm"] == [pytest.approx(norm, rel=1e-4)]


def test_the_norms_of_both_parts(ppo, train, text):
    settings = {"advantage": MonteCarlo(baseline="batch"), "minibatch_size": 8, "ppo_epochs": 2, "ptx_ratio": 1.0}
    without = train(ppo(**settings))
    both = train(ppo(**settings, ptx=text, ptx_coef=2.0))
    alone = train(ppo(**NOTHING, minibatch_size=8, ptx=text, ptx_coef=1.0))
    # Of the first step of a rollout, before which the policies are the same.
    assert both.logged["ppo/rl_grad_norm"][0] == pytest.approx(without.updates[0]["grad_norm"].item(), rel=1e-4)
    assert both.logged["ppo/ptx_grad_norm"][0] == pytest.approx(2 * alone.logged["ppo/grad_norm"][0], rel=1e-4)
    assert "rl_grad_norm" not in both.updates[1]
    assert "ppo/ptx_loss" not in without.logged


def test_rows_depend_on_iteration_and_step_alone_and_are_dealt_out_to_processes(ppo, alone, text):
    module, _ = alone(ppo(**NOTHING, ptx=text, ptx_coef=1.0, minibatch_size=6))

    def drawn(iteration, number, rank=0, processes=1):
        torch.rand(3)  # whatever else was drawn
        module.iteration.fill_(iteration)
        module.minibatch_size = 6 // processes
        module.trainer.global_rank, module.trainer.world_size = rank, processes
        parts, share = module.text_parts(number)
        assert share == 1
        return torch.cat([part.tokens for part in parts])

    first = drawn(3, 1)
    assert not any(torch.equal(first, drawn(*other)) for other in ((3, 0), (4, 1)))
    assert torch.equal(first, drawn(3, 1))
    assert len({tuple(row) for row in first.tolist()}) == 6
    for processes in (2, 3):
        for rank in range(processes):
            assert torch.equal(drawn(3, 1, rank, processes), first[rank::processes])


def test_processes_for_which_there_is_no_text_learn_nothing_from_it(ppo, alone, text):
    module, _ = alone(ppo(**{**NOTHING, "ptx_ratio": 0.5}, ptx=text, ptx_coef=1.0, minibatch_size=1), world_size=3)
    shares = []
    for rank in range(3):
        module.trainer.global_rank = rank
        parts, share = module.text_parts(0)
        assert sum(len(part.tokens) for part in parts) == 1
        shares.append(share)
    assert shares == [1.5, 1.5, 0.0]  # two rows, one each


@pytest.mark.parametrize(("ratio", "count"), [(1.0, 4), (2.0, 8), (0.5, 2), (0.01, 1)])
def test_rows_an_answer(ratio, count, ppo, alone, text, kept_rows):
    module, _ = alone(ppo(ptx=text, ptx_coef=1.0, ptx_ratio=ratio))
    rows = kept_rows(module)
    module.text_parts(0)
    assert len(rows[0].tokens) == count


def test_text_of_training_and_of_validation_are_apart(ppo, prompts, fit, text):
    module, data = ppo(ptx=text, ptx_coef=1.0, val_samples=1), prompts()
    trainer = fit(module, data, max_epochs=1, limit_train_batches=1)
    trainer.validate(module, datamodule=data, verbose=False)
    stream, size = module.ptx.val_stream, module.ptx.block_size
    rows = torch.stack([stream[i : i + size + 1] for i in range(0, len(stream) - size, size)]).long()
    with torch.no_grad():
        expected = module.policy(input_ids=rows, labels=rows).loss
    assert module.figures()["ptx_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_text_keeps_what_the_policy_knows_of_it(ppo, train, text):
    settings = {"minibatch_size": 8, "ppo_epochs": 2}
    module = train(ppo(**settings, ptx=text, ptx_coef=1.0), iterations=5, batch_size=8)
    losses = module.logged["ppo/ptx_loss"]
    assert losses[-1] < losses[0] - 0.5


def test_warmup_of_the_critic_holds_the_text_back_too(policy, ppo, train, text):
    module = train(ppo(ptx=text, ptx_coef=1.0, critic_warmup=1))
    assert all(torch.equal(a, b) for a, b in zip(module.policy.parameters(), policy.parameters()))


def test_text_from_a_file(tmp_path, ppo, train):
    (tmp_path / "book.txt").write_text("The cat sat on the mat and looked at the dog. " * 60)
    make = partial(PretrainDataModule, str(tmp_path / "book.txt"), block_size=16)
    assert len(train(ppo(ptx=make, ptx_coef=0.1)).logged["ppo/ptx_loss"]) == 1


@pytest.mark.parametrize("make", [None, partial(PretrainDataModule, None)])
def test_a_weight_without_text_is_refused(make, ppo):
    with pytest.raises(
        UserError, match=r"ptx_coef .ppo.module. is above 0 and there is no pretraining text.*ppo.ptx.path=\.\.\."
    ):
        ppo(ptx=make, ptx_coef=0.5)


def test_text_is_not_read_without_a_weight(ppo):
    module = ppo(ptx=lambda **_: pytest.fail("read"), ptx_coef=0.0)
    assert module.ptx is None
