"""Dialogues: several turns of the policy in one sequence, and tokens from elsewhere between them."""

import copy

import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.models.responses import response_logprobs
from lit_rlhf.stages.ppo import KLPenalty, MonteCarlo
from lit_rlhf.stages.ppo.rollout import Rollout
from lit_rlhf.text import pack

PROMPT, FIRST, USER, SECOND = [5, 6, 7], [8, 9, 10], [11, 12], [13, 14]
DIALOGUE = [*PROMPT, *FIRST, *USER, *SECOND]
SEQUENCES = [DIALOGUE, [*PROMPT, 15, 16, 17, 18], [20, 21, 22]]
MASKS = [[False] * 3 + [True] * 3 + [False] * 2 + [True] * 2, [False] * 3 + [True] * 4, [False] * 2 + [True]]
# The same turns, a sequence each.
TURNS = [[*PROMPT, *FIRST], DIALOGUE, *SEQUENCES[1:]]
TURN_MASKS = [[False] * 3 + [True] * 3, [False] * 8 + [True] * 2, *MASKS[1:]]
NAMES = ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")


def rollouts():
    """(with the dialogue, with its turns)."""
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.tensor([[5], [4], [1]])
    figures = {name: torch.where(mask, torch.randn(3, 5, dtype=torch.float64), 0.0) for name in NAMES}
    figures["old_logprobs"] = figures["old_logprobs"] - 5.5

    def split(x):
        turns = x.new_zeros(4, 4)
        turns[0, :3], turns[1, :2], turns[2:] = x[0, :3], x[0, 3:], x[1:, :4]
        return turns

    whole = Rollout(SEQUENCES, MASKS, mask, **figures)
    return whole, Rollout(TURNS, TURN_MASKS, split(mask), **{name: split(x) for name, x in figures.items()})


@pytest.mark.parametrize("settings", [{}, {"share_prompts": True}, {"padded": True}], ids=str)
def test_log_probs_of_all_turns_are_those_of_plain_transformers(policy, logprobs_of, settings):
    packed = pack(SEQUENCES, 0, response_masks=MASKS, **settings)
    assert packed.tokens[packed.response_mask].sort().values.tolist() == [8, 9, 10, 13, 14, 15, 16, 17, 18, 22]
    found = response_logprobs(policy, packed)
    expected = torch.zeros(3, 5)
    expected[0, :3], expected[0, 3:] = logprobs_of(policy, TURNS[0], 3), logprobs_of(policy, DIALOGUE, 2)
    expected[1, :4], expected[2, :1] = logprobs_of(policy, SEQUENCES[1], 4), logprobs_of(policy, SEQUENCES[2], 1)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "kind", [{}, {"kl": KLPenalty(estimator="full", in_loss=True)}, {"advantage": MonteCarlo()}], ids=str
)
def test_training_on_a_dialogue_is_training_on_its_turns(kind, share, policy, reward_model, ppo, alone):
    trained = []
    for rollout in rollouts():
        module, _ = alone(ppo(policy.double(), reward_model.double(), **copy.deepcopy(kind)))
        module.share_prompts = share
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(3):
            losses.append(module.objective.losses(rollout)[:2])
            optimizer.zero_grad()
            (losses[-1][0] + module.value_coef * losses[-1][1]).backward()
            optimizer.step()
        trained.append((losses, dict(module.named_parameters())))
    (losses, weights), (expected_losses, expected) = trained
    assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    assert losses[0][0] != losses[2][0]
    for name, weight in weights.items():
        assert_close(weight, expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_minibatches_keep_the_turns(ppo, alone):
    whole, _ = rollouts()
    assert whole.lengths.tolist() == [5, 4, 1]
    part = whole.select(torch.tensor([2, 1]))
    assert part.sequences == [SEQUENCES[2], SEQUENCES[1]] and part.response_mask == [MASKS[2], MASKS[1]]
    assert part.mask.shape == (2, 4) and torch.equal(part.values, whole.values[[2, 1], :4])
