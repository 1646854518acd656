import math

import krippendorff
import pytest
import torch

from lit_rlhf.functional import cohen_kappa, krippendorff_alpha, percent_agreement

NAN = math.nan
# The worked example of Krippendorff (2011), four observers and twelve units: alpha is .743 nominal, .815 ordinal.
OBSERVERS = torch.tensor(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


def test_alpha_of_the_published_example():
    assert krippendorff_alpha(OBSERVERS, "nominal").item() == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(OBSERVERS, "ordinal").item() == pytest.approx(0.815, abs=5e-4)


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_that_of_the_package(level, seed):
    generator = torch.Generator().manual_seed(seed)
    ratings = torch.randint(-1, 2, (4, 30), generator=generator).double()
    ratings[torch.rand(4, 30, generator=generator) < 0.3] = NAN
    expected = krippendorff.alpha(reliability_data=ratings.numpy(), level_of_measurement=level)
    assert krippendorff_alpha(ratings, level).item() == pytest.approx(expected)


def test_kappa_by_hand():
    """Of 50 units both say yes to 20 and no to 15; the first says yes to 25, the second to 30.

    They agree on .7; by chance on .5 * .6 + .5 * .4 = .5; kappa is .2 / .5 = .4."""
    said = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    ratings = torch.tensor(said, dtype=torch.float64).T
    assert cohen_kappa(ratings).item() == pytest.approx(0.4)
    assert percent_agreement(ratings).item() == pytest.approx(0.7)


def test_kappa_leaves_out_what_one_did_not_judge():
    ratings = torch.tensor([[1.0, 0, 1, NAN, 0], [1, 0, 0, 1, NAN]])
    from sklearn.metrics import cohen_kappa_score

    assert cohen_kappa(ratings).item() == pytest.approx(cohen_kappa_score([1, 0, 1], [1, 0, 0]))
    with pytest.raises(ValueError, match="3 were given"):
        cohen_kappa(torch.zeros(3, 4))


def test_percent_agreement_counts_pairs_of_annotators():
    ratings = torch.tensor([[1.0, 0], [1, 0], [0, NAN]])  # of three pairs of annotators one agrees; then one of one
    assert percent_agreement(ratings).item() == pytest.approx(2 / 4)


def test_ends_of_the_scale():
    same = torch.tensor([[1.0, 0, -1], [1, 0, -1]])
    assert krippendorff_alpha(same).item() == cohen_kappa(same).item() == percent_agreement(same).item() == 1
    assert cohen_kappa(torch.ones(2, 3)).isnan()  # chance alone agrees always
    assert krippendorff_alpha(torch.ones(2, 3)).isnan()
    assert percent_agreement(torch.tensor([[1.0, NAN], [NAN, 0]])).isnan()


def test_opposite_sides_differ_more_than_a_tie():
    tie = torch.tensor([[1.0, -1, 1, -1], [1, -1, 1, 0]])
    opposite = torch.tensor([[1.0, -1, 1, -1], [1, -1, 1, 1]])
    assert krippendorff_alpha(tie, "ordinal") > krippendorff_alpha(opposite, "ordinal")
