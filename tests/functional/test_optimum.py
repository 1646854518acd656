"""Every rung of the ladder, trained on a task so small that where it must end can be computed by other means.

Two prompts, answers of one to three tokens out of three, the first of which ends an answer: 15 answers per prompt. The
policy is a table of logits, one row per state (the prompt and the tokens so far). Rewards are fixed, one per answer,
and the best policy in ``E[r] - beta KL(pi || ref)`` is ``pi*(y) = ref(y) exp(r(y) / beta) / Z``. Batches are samples of
the policy, but systematic ones (evenly spaced quantiles): unbiased, and nearly without noise."""

import math
from functools import partial

import pytest
import torch
from scipy.optimize import brentq
from torch import tensor

from lit_rlhf.functional import (
    Pairs,
    baseline,
    clipped_policy_loss,
    clipped_value_loss,
    dpo_loss,
    full_kl,
    gae,
    group_std,
    importance_weighted_loss,
    kl_estimate,
    kl_penalty_loss,
    masked_mean,
    policy_gradient_loss,
    ranking_loss,
    reward_to_go,
    token_rewards,
    whiten,
    whole_answer,
)

BETA = 0.5  # reward units per nat
CLOSE = 0.02  # total variation distance
END, STATES, PROMPTS = 0, 9, 2
ANSWERS = [(END,), *((a, END) for a in (1, 2)), *((a, b, c) for a in (1, 2) for b in (1, 2) for c in (0, 1, 2))]


def state(tokens):  # a number for the tokens so far; 0 at the start
    return sum(3**i * token for i, token in enumerate(reversed(tokens)))


PADDED = [(*a, *[END] * (3 - len(a))) for a in ANSWERS]
TOKENS = tensor(PADDED)
SEEN_FROM = tensor([[state(a[:t]) if t < len(b) else 0 for t in range(3)] for a, b in zip(PADDED, ANSWERS)])
MASK = torch.arange(3) < tensor([[len(a)] for a in ANSWERS])

generator = torch.Generator().manual_seed(0)
REF = 0.7 * torch.randn(PROMPTS, STATES, 3, generator=generator, dtype=torch.float64)  # logits
REWARDS = torch.randn(PROMPTS, 15, generator=generator, dtype=torch.float64) * tensor([[1.0], [0.5]])


def answer_logprobs(table):
    return (table.log_softmax(-1)[:, SEEN_FROM, TOKENS] * MASK).sum(-1)  # (PROMPTS, 15)


def distance(p, q):
    return 0.5 * (p - q).abs().sum(-1).max().item()  # of the prompt where it is larger


# ------------------------------------------------------------------- where they must end, by plain Python

REF_ANSWERS = [  # ref(y), by multiplication
    [
        math.prod(
            math.exp(REF[p, state(y[:t]), y[t]]) / sum(map(math.exp, REF[p, state(y[:t])])) for t in range(len(y))
        )
        for y in ANSWERS
    ]
    for p in range(PROMPTS)
]


def tilted(ref, q, beta=BETA):
    """The maximizer of ``E[q] - beta KL(pi || ref)``."""
    weights = [r * math.exp((x - max(q)) / beta) for r, x in zip(ref, q)]
    return [w / sum(weights) for w in weights]


def mode_covering(ref, q, beta=BETA):
    """That of ``E[q] - beta KL(ref || pi)``: ``q + beta ref / pi`` is the same number for all, so
    ``pi = beta ref / (number - q)``, and the number is the one for which these add up to 1."""

    def policy(number):
        return [beta * r / (number - x) for r, x in zip(ref, q)]

    return policy(brentq(lambda number: sum(policy(number)) - 1, max(q) + beta * min(ref) / 2, max(q) + beta))


def greedy(ref, q, beta=BETA):
    return [float(x == max(q)) for x in q]


def by_answers(choose, rewards=REWARDS, beta=BETA):
    """The whole answer as one choice."""
    return tensor([choose(REF_ANSWERS[p], rewards[p].tolist(), beta) for p in range(PROMPTS)], dtype=torch.float64)


def by_states(choose, rewards=REWARDS, beta=BETA, price=lambda pi, ref: 0.0):
    """One choice a state, from the last one backwards; ``price`` is what earlier choices see of the divergence here."""
    policy = []
    for p in range(PROMPTS):
        probability = {}

        def value(so_far, p=p, probability=probability):
            ref = tilted(REF[p, state(so_far)].exp().tolist(), [0.0] * 3)
            q = [
                rewards[p, ANSWERS.index((*so_far, a))].item() if (*so_far, a) in ANSWERS else value((*so_far, a))
                for a in range(3)
            ]
            pi = choose(ref, q, beta)
            probability.update({(*so_far, a): x for a, x in enumerate(pi)})
            return sum(x * y for x, y in zip(pi, q)) - price(pi, ref)

        value(())
        policy.append([math.prod(probability[y[: t + 1]] for t in range(len(y))) for y in ANSWERS])
    return tensor(policy, dtype=torch.float64)


def nats(pi, ref):
    return sum(x * math.log(x / y) for x, y in zip(pi, ref) if x)


OPTIMUM = by_answers(tilted)


def test_backward_induction_finds_the_same_optimum():
    soft = by_states(tilted, price=lambda pi, ref: BETA * nats(pi, ref))
    assert distance(soft, OPTIMUM) < 1e-9


def test_the_policy_starts_far_from_the_optimum():
    assert distance(tensor(REF_ANSWERS, dtype=torch.float64), OPTIMUM) > 0.4


# ------------------------------------------------------------------------------------------- training


def monte_carlo(kind="none", k=1, divide_by_std=False):
    def estimate(rewards, values, mask):
        returns = reward_to_go(rewards, mask)
        advantages = returns - baseline(returns[:, 0], kind, k)[:, None]
        return (advantages / group_std(returns[:, 0], k)[:, None] if divide_by_std else advantages), None

    return estimate


def critic(lam, whitened=False):
    def estimate(rewards, values, mask):
        advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=lam)
        return (whiten(advantages, mask) if whitened else advantages), returns

    return estimate


def train(
    estimate,
    view="token",
    reward=None,
    penalty=None,
    beta=BETA,
    loss=policy_gradient_loss,
    epochs=1,
    updates=150,
    n=512,
):
    """The policy (PROMPTS, 15) after ``updates``, ``epochs`` of them on each batch of ``n`` answers per prompt.

    ``view``: whether a token or the whole answer is an action; ``reward``: the divergence taken from the rewards;
    ``penalty``: that added to the loss."""
    generator = torch.Generator().manual_seed(0)
    table = REF.clone().requires_grad_()
    values = torch.zeros(PROMPTS, STATES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([table, values], lr=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    prompt = torch.arange(PROMPTS).repeat_interleave(n)[:, None]
    for _ in range(updates // epochs):
        quantiles = torch.arange(n) + torch.rand(PROMPTS, 1, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(answer_logprobs(table.detach()).exp().cumsum(1), quantiles / n).clamp(max=14)
        drawn = torch.cat([row[torch.randperm(n, generator=generator)] for row in drawn])
        states, tokens, mask = SEEN_FROM[drawn], TOKENS[drawn], MASK[drawn]

        def action(x, mask=mask):
            return whole_answer(x, mask) if view == "answer" else x

        def logprobs(logits, at=(prompt, states, tokens)):
            return action(logits.log_softmax(-1)[at])

        counts, seen = (mask, states) if view == "token" else (mask[:, :1], states[:, :1])
        old, ref, old_values = logprobs(table).detach(), logprobs(REF), values[prompt, seen].detach()
        penalties = torch.zeros_like(old)
        if reward == "full":
            penalties = beta * full_kl(table[prompt, states], REF[prompt, states]).detach()
        elif reward is not None:
            penalties = beta * kl_estimate(old, ref, reward)
        rewards = token_rewards(REWARDS[prompt[:, 0], drawn], penalties, counts)
        advantages, returns = estimate(rewards, old_values, counts)
        for _ in range(epochs):
            total = loss(logprobs(table), old, advantages, counts)
            if penalty == "full" and view == "answer":  # over all 15 answers
                total = total + beta * full_kl(answer_logprobs(table), answer_logprobs(REF)).mean()
            elif penalty == "full":
                total = total + beta * masked_mean(full_kl(table[prompt, states], REF[prompt, states]), counts)
            elif penalty is not None:
                total = total + beta * masked_mean(kl_estimate(logprobs(table), ref, penalty), counts)
            if returns is not None:
                total = total + clipped_value_loss(values[prompt, seen], old_values, returns, counts, 0.2)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
    return answer_logprobs(table.detach()).exp()


ESTIMATES = {
    "REINFORCE": monte_carlo(),
    "batch": monte_carlo("batch"),
    "prompt": monte_carlo("prompt", 4),
    "RLOO": monte_carlo("others", 4),
    "critic": critic(1.0),
    "TD": critic(0.0),
    "GAE": critic(0.95),
}
LOSSES = {  # the first is right for the policy that sampled alone, the others for several updates a batch
    "policy_gradient": {"loss": policy_gradient_loss},
    "importance_weighted": {"loss": importance_weighted_loss, "epochs": 3},
    "clipped": {"loss": partial(clipped_policy_loss, clip_range=0.2), "epochs": 3},
    "kl_penalty": {"loss": partial(kl_penalty_loss, beta=0.5), "epochs": 3},
}
RUNGS = [("token", name) for name in ESTIMATES]
RUNGS += [("answer", name) for name in ESTIMATES if name not in ("TD", "GAE")]  # one action: all targets are the return


@pytest.mark.parametrize(("view", "estimate"), RUNGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_rung_ends_at_the_optimum(loss, estimate, view):
    """The advantages differ by what has no gradient in expectation, the losses only away from the policy that sampled,
    and ``log pi/ref`` in the reward is the divergence."""
    policy = train(ESTIMATES[estimate], view, reward="k1", **LOSSES[loss], updates=120, n=256)
    assert distance(policy, OPTIMUM) <= CLOSE


@pytest.mark.parametrize("penalty", ["k2", "full"])
def test_in_the_loss_the_divergence_of_whole_answers_leads_to_the_optimum(penalty):
    """Either has the gradient of KL(pi || ref) over answers."""
    policy = train(ESTIMATES["RLOO"], view="answer", penalty=penalty)
    assert distance(policy, OPTIMUM) <= CLOSE


def test_full_divergence_in_reward_and_loss_leads_to_the_optimum():
    """Of KL(pi || ref) over answers the loss sees the divergence of each state as the policy changes there; that
    earlier tokens choose the state is seen by the rewards. It takes both."""
    assert distance(train(ESTIMATES["RLOO"], reward="full", penalty="full"), OPTIMUM) <= CLOSE


# ----------------------------------------------------------- those that end elsewhere, and where


@pytest.mark.parametrize("penalty", ["k2", "full"])
def test_in_the_loss_the_divergence_of_tokens_is_short_sighted(penalty):
    """No token pays for the divergence of the tokens after it, so a state is worth its expected reward instead of that
    less ``beta`` times the divergence to come."""
    end = by_states(tilted)
    assert distance(end, OPTIMUM) > 0.1
    assert distance(train(ESTIMATES["RLOO"], penalty=penalty), end) <= CLOSE


def test_full_divergence_in_the_reward_alone_restrains_no_choice():
    """It does not depend on the token that is drawn, so only earlier tokens see it: each state takes its best token,
    and is worth ``-beta log ref`` of it less to those before."""
    end = by_states(greedy, price=lambda pi, ref: BETA * nats(pi, ref))
    assert distance(end, OPTIMUM) > 0.5
    assert distance(end, by_states(greedy)) == 1  # the price is felt: another answer than the best
    assert distance(train(ESTIMATES["RLOO"], reward="full", updates=200), end) <= CLOSE


@pytest.mark.parametrize("view", ["token", "answer"])
def test_k1_in_the_loss_restrains_nothing(view):
    """Its gradient is that of ``log pi``, 0 in expectation: nothing but the reward is maximized."""
    end = by_answers(greedy)
    assert distance(end, OPTIMUM) > 0.5
    assert distance(train(ESTIMATES["RLOO"], view=view, penalty="k1", updates=200), end) <= CLOSE


@pytest.mark.parametrize(("view", "end"), [("token", by_states(mode_covering)), ("answer", by_answers(mode_covering))])
def test_k3_in_the_loss_minimizes_the_other_divergence(view, end):
    """The gradient of ``exp(-d) - 1 + d`` is that of KL(ref || pi)."""
    assert distance(end, OPTIMUM) > 0.1
    assert distance(train(ESTIMATES["RLOO"], view=view, penalty="k3"), end) <= CLOSE


STD_BETA = 1.5  # at 0.5 they collapse: the smaller the deviation, the weaker the penalty beside the advantages
DIVIDED = monte_carlo("prompt", 512, divide_by_std=True)


def with_own_std(points):
    """``points(rewards / std)`` with the deviations that the rewards have under that very policy."""

    def std(policy):
        mean = (policy * REWARDS).sum(1, keepdim=True)
        return (policy * (REWARDS - mean) ** 2).sum(1).sqrt()

    columns = []
    for p in range(PROMPTS):
        found = brentq(lambda s, p=p: (std(points(REWARDS / s))[p] - s).item(), 0.3, 1.0)
        columns.append(points(REWARDS / found)[p])
    return torch.stack(columns)


@pytest.mark.parametrize(
    ("view", "penalty", "points"),
    [
        ("answer", "k2", partial(by_answers, tilted)),
        ("token", "k2", partial(by_states, tilted)),
        ("token", "k3", partial(by_states, mode_covering)),  # GRPO as published
    ],
)
def test_dividing_by_the_standard_deviation_beside_a_penalty_changes_the_price(view, penalty, points):
    """Rewards count in standard deviations and the divergence in reward units, so that the price of a nat is
    ``beta std(r)``, with the deviation under the policy itself: low where the answers to a prompt hardly differ."""
    end = with_own_std(partial(points, beta=STD_BETA))
    assert distance(end, points(beta=STD_BETA)) > 0.05 and distance(end, by_answers(tilted, beta=STD_BETA)) > 0.1
    policy = train(DIVIDED, view=view, penalty=penalty, beta=STD_BETA)
    assert distance(policy, end) <= CLOSE


@pytest.mark.parametrize("estimate", [DIVIDED, critic(0.95, whitened=True)])
def test_dividing_the_whole_return_by_its_deviation_moves_no_optimum(estimate):
    """With the divergence in the reward, reward and price shrink alike."""
    assert distance(train(estimate, reward="k1"), OPTIMUM) <= CLOSE


# ------------------------------------------------------------------------------- from comparisons


def every_comparison():
    """All pairs of answers to a prompt, each weighed by how often Bradley and Terry's judge prefers it."""
    index = torch.arange(15 * PROMPTS).view(PROMPTS, 15)
    better, worse = (torch.cat([torch.cartesian_prod(row, row)[:, i] for row in index]) for i in (0, 1))
    r = REWARDS.flatten()
    return Pairs(better, worse, torch.sigmoid(r[better] - r[worse]) / 225, PROMPTS, torch.ones_like(better))


def minimized(loss, start):
    table = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([table], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(table)
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach()


def test_dpo_ends_at_the_optimum():
    """Without a reward and without a sample: arXiv:2305.18290, theorem 1."""
    pairs, ref = every_comparison(), answer_logprobs(REF).flatten()
    table = minimized(lambda table: dpo_loss(answer_logprobs(table).flatten(), ref, pairs, BETA), REF)
    assert distance(answer_logprobs(table).exp(), OPTIMUM) < 1e-3


def test_the_ranking_loss_ends_at_the_reward_up_to_a_constant_of_the_prompt():
    scores = minimized(lambda s: ranking_loss(s.flatten(), every_comparison()), torch.zeros_like(REWARDS))
    torch.testing.assert_close(
        scores - scores.mean(1, keepdim=True), REWARDS - REWARDS.mean(1, keepdim=True), rtol=0, atol=1e-3
    )
