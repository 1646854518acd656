"""Agreement of annotators, beyond chance.

A unit is what was judged (a pair of answers), a category what was said of it (the first is better, a tie, the second is
better). Ratings are (R, U): R annotators, U units, an integer per category; NaN where an annotator did not judge."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def percent_agreement(ratings: Tensor) -> Tensor:
    """Fraction of (unit, two annotators) on which both say the same; NaN where no unit has two judgements.

    >>> percent_agreement(torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, torch.nan]]))  # 2 of the 3 judged by both
    tensor(0.6667, dtype=torch.float64)
    """
    counts, _ = _category_counts(ratings)
    judged = counts.sum(-1)
    return (counts * (counts - 1)).sum() / (judged * (judged - 1)).sum()


def cohen_kappa(ratings: Tensor) -> Tensor:
    """``(p_o - p_e) / (1 - p_e)`` of two annotators (Cohen 1960), over the units that both judged.

    1: they always agree, 0: as often as by chance given how often each uses each category. NaN where chance alone
    agrees always (both use one and the same category), or where nothing was judged by both.

    >>> cohen_kappa(torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))  # observed 3/4, by chance 1/2
    tensor(0.5000, dtype=torch.float64)
    """
    if len(ratings) != 2:
        raise ValueError(f"Cohen's kappa compares two annotators; {len(ratings)} were given")
    both = ratings[:, ~ratings.isnan().any(0)].double()
    same = (both[0] == both[1]).double().mean()
    categories = torch.unique(both)
    shares = (both[:, :, None] == categories).double().mean(1)  # (2, C), how often each uses each category
    chance = shares.prod(0).sum()
    return torch.where(chance < 1, (same - chance) / (1 - chance), torch.nan)


def krippendorff_alpha(ratings: Tensor, level: Literal["nominal", "ordinal"] = "nominal") -> Tensor:
    """``1 - D_o / D_e`` (Krippendorff 2011, "Computing Krippendorff's alpha-reliability"); a scalar.

    Any number of annotators, each of any of the units. "ordinal": two annotators who take opposite sides differ by
    more than one who ties what the other does not. NaN where nothing varies, or no unit has two judgements.

    >>> ratings = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    >>> krippendorff_alpha(ratings)  # 1 - (2 / 8) / (30 / 56)
    tensor(0.5333, dtype=torch.float64)
    """
    counts, categories = _category_counts(ratings)
    counts = counts[counts.sum(-1) >= 2]  # a unit judged once has nothing to agree with
    judged = counts.sum(-1, keepdim=True)
    # Coincidences (C, C): ordered pairs of judgements inside each unit, each unit weighing as many as it has.
    coincidences = (counts.T @ (counts / (judged - 1))) - torch.diag((counts / (judged - 1)).sum(0))
    totals = coincidences.sum(0)
    expected = (torch.outer(totals, totals) - torch.diag(totals)) / (totals.sum() - 1)
    distance = _distance(totals, len(categories), level)
    return 1 - (coincidences * distance).sum() / (expected * distance).sum()


def _category_counts(ratings: Tensor) -> tuple[Tensor, Tensor]:
    """(U, C) how many annotators put each unit into each category, and the categories (C,) in order."""
    categories = torch.unique(ratings[~ratings.isnan()])
    return (ratings[:, :, None] == categories).double().sum(0), categories


def _distance(totals: Tensor, categories: int, level: str) -> Tensor:
    """Squared distances (C, C) of categories; ordinal: how many judgements lie between two of them."""
    if level == "nominal":
        return 1 - torch.eye(categories, dtype=totals.dtype)
    middle = totals.cumsum(0) - totals / 2
    return (middle[:, None] - middle[None, :]) ** 2
