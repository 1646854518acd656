import pytest
import torch
from hypothesis import given, strategies as st
from scipy.stats import chisquare
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.sampling import filter_logits, sample_index

INF = float("inf")


def sample_token(logits, generator=None, uniform=None):
    return sample_index(logits.double().softmax(-1), generator, uniform)


def kept(logits):
    return [[i for i, x in enumerate(row) if x > -INF] for row in logits.tolist()]


def test_no_filter_by_default():
    logits = torch.randn(3, 7)
    assert torch.equal(filter_logits(logits), logits)


def test_top_k_keeps_the_largest_and_leaves_their_logits():
    logits = tensor([[1.0, 4.0, 2.0, 3.0], [9.0, -1.0, 0.0, 5.0]])
    assert_close(filter_logits(logits, top_k=2), tensor([[-INF, 4.0, -INF, 3.0], [9.0, -INF, -INF, 5.0]]))
    assert kept(filter_logits(logits, top_k=1)) == [[1], [0]]
    assert torch.equal(filter_logits(logits, top_k=4), logits)
    assert torch.equal(filter_logits(logits, top_k=99), logits)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.0, [2]),  # the first token stays, whatever top_p
        (0.3, [2]),
        (0.49, [2]),
        (0.51, [0, 2]),  # the token that crosses top_p belongs to the set
        (0.79, [0, 2]),
        (0.81, [0, 2, 3]),
        (0.96, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_smallest_set_of_that_mass(top_p, expected):
    logits = tensor([[0.3, 0.05, 0.5, 0.15]]).log()
    filtered = filter_logits(logits, top_p=top_p)
    assert kept(filtered) == [expected]
    assert torch.equal(filtered[0, expected], logits[0, expected])


def test_top_p_against_loops():
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    expected = []
    for row in logits.exp().tolist():
        mass, chosen = 0.0, []
        for i in sorted(range(30), key=lambda i: -row[i]):
            if mass < 0.7 * sum(row):
                chosen.append(i)
            mass += row[i]
        expected.append(sorted(chosen))
    assert kept(filter_logits(logits, top_p=0.7)) == expected
    assert kept(filter_logits(logits.float(), top_p=0.7)) == expected


def test_top_p_is_the_mass_of_what_top_k_left():
    logits = tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(filter_logits(logits, top_k=2, top_p=0.55)) == [[0]]  # 0.4 / 0.7 = 0.571 already reaches it
    assert kept(filter_logits(logits, top_k=3, top_p=0.55)) == [[0, 1]]  # 0.4 / 0.9 = 0.444 does not


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sample_token_draws_from_softmax(dtype):
    weights = tensor([[0.0, 5.0, 1.0, 0.0, 3.0, 1.0, 0.0], [2.0, 0.0, 0.0, 1.0, 1.0, 0.0, 4.0]], dtype=dtype)
    draws = 20_000
    logits = weights.log().repeat_interleave(draws, dim=0)  # -inf first, in the middle and last
    tokens = sample_token(logits, torch.Generator().manual_seed(0)).view(2, draws)
    for row, weight in zip(tokens, weights, strict=True):
        counts = torch.bincount(row, minlength=7)
        assert counts[weight == 0].sum() == 0
        possible = weight > 0
        expected = (weight[possible] / weight.sum()).double() * draws
        assert chisquare(counts[possible].numpy(), expected.numpy(), sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (0.5, 3), (1 - 2**-53, 3)])
def test_sample_token_at_the_ends_of_the_uniform(monkeypatch, uniform, expected):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.full(shape[:2], uniform, dtype=torch.float64))
    assert sample_token(tensor([[-INF, 0.0, -INF, 0.0, -INF]])).tolist() == [expected]


def test_a_rounded_total_does_not_let_an_impossible_last_token_through(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape[:2], 1 - 2**-53, dtype=torch.float64))
    logits = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))  # some rows add up to less than 1
    logits[:, -1] = -INF
    assert (sample_token(logits) == 98).all()


def test_rows_are_drawn_independently():
    tokens = sample_token(torch.zeros(20_000, 4), torch.Generator().manual_seed(0)).view(2, -1)
    pairs = torch.bincount(tokens[0] * 4 + tokens[1], minlength=16)
    assert chisquare(pairs.numpy()).pvalue > 1e-3  # all 16 pairs equally likely


def test_sample_token_takes_its_randomness_from_the_generator():
    logits = torch.zeros(50, 10)
    state = torch.get_rng_state()
    first, again, other = (sample_token(logits, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (50,) and first.dtype == torch.int64


def test_a_filtered_token_is_never_drawn():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    filtered = filter_logits(logits, top_k=3)
    tokens = sample_token(filtered.expand(5000, -1), torch.Generator().manual_seed(0))
    assert tokens.unique().tolist() == sorted(logits[0].argsort(descending=True)[:3].tolist())


@given(
    st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=2, max_size=6, unique_by=lambda x: round(x, 3)),
    st.integers(0, 7),
    st.floats(0, 1),
    st.randoms(use_true_random=False),
)
def test_filters_follow_the_order_of_tokens_and_leave_the_others(row, top_k, top_p, random):
    logits = tensor([row], dtype=torch.float64)
    filtered = filter_logits(logits, top_k, top_p)
    order = random.sample(range(len(row)), len(row))
    assert torch.equal(filter_logits(logits[:, order], top_k, top_p), filtered[:, order])
    left = kept(filtered)[0]
    assert torch.equal(filtered[:, left], logits[:, left]) and row.index(max(row)) in left
    assert len(left) <= (top_k or len(row)) and min(row[i] for i in left) >= max(
        [x for i, x in enumerate(row) if i not in left], default=-INF
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), st.floats(0, 1, exclude_max=True))
def test_sample_token_inverts_the_cumulative_distribution(weights, u):
    edges = [sum(weights[:i]) / sum(weights) for i in range(len(weights) + 1)]
    token = sample_token(tensor([weights], dtype=torch.float64).log(), uniform=tensor([u], dtype=torch.float64)).item()
    assert weights[token] > 0
    assert edges[token] - 1e-9 <= u <= edges[token + 1] + 1e-9


def test_each_row_takes_its_own_number():
    logits = torch.zeros(4, 4)
    uniform = tensor([0.9, 0.1, 0.3, 0.6], dtype=torch.float64)
    assert sample_token(logits, uniform=uniform).tolist() == [3, 0, 1, 2]
    assert sample_token(logits[:1], uniform=tensor([0.25], dtype=torch.float64)).tolist() == [
        1
    ]  # [0, 1/4) is the first


@pytest.mark.parametrize("row", [[float("nan"), 0.0], [-INF, -INF], [INF, 0.0]])
def test_a_row_that_is_no_distribution_is_refused(row):
    with pytest.raises(FloatingPointError, match="diverged"):
        sample_token(tensor([[0.0, 0.0], row]))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100, 2048, 5000])
def test_an_index_is_where_the_running_sum_passes_the_number(size):
    """Against one running sum in float64, at random numbers and at both sides of each border; zeros are never drawn."""
    torch.manual_seed(size)
    probs = torch.rand(3, size, dtype=torch.float64) * (torch.rand(3, size) > 0.3)
    probs[:, size // 2] = 1.0
    probs = probs / probs.sum(-1, keepdim=True)
    cumulative = probs.cumsum(-1)
    borders = [0.0, 0.5, 1 - 2**-53, *torch.rand(50).tolist()]
    borders += [float(c) + e for c in cumulative[0, :: max(1, size // 20)] for e in (-1e-9, 1e-9) if 0 <= c + e < 1]
    for border in borders:
        uniform = torch.full((3,), border, dtype=torch.float64)
        drawn = sample_index(probs, uniform=uniform)
        for row, index in enumerate(drawn.tolist()):
            low = float(cumulative[row, index - 1]) if index else 0.0
            assert probs[row, index] > 0
            assert low - 1e-12 <= border * float(cumulative[row, -1]) <= float(cumulative[row, index]) + 1e-12
