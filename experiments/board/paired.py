"""Whether one rule is better than another: a paired test over seeds that both were trained with."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats


class Comparison(NamedTuple):
    """One rule against another.

    Attributes:
        difference: mean of the differences, in points.
        n: seeds that both have.
        p: of the two-sided paired t-test; None where there is none, and `note` says why.
        note: ``""``, ``"n too small"``, or ``"no spread"``: all differences are the same.
    """

    difference: float
    n: int
    p: float | None
    note: str


def compare(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison | None:
    """Compare accuracies by the seeds that both have.

    Args:
        ours: accuracy by seed.
        theirs: likewise.

    Returns:
        None where no seed has both.

    >>> compare({0: 71.0, 1: 72.0}, {0: 70.0, 1: 70.0, 2: 69.0}).difference
    1.5
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    a, b = (np.array([one[seed] for seed in seeds]) for one in (ours, theirs))
    difference = float(np.mean(a - b))
    if len(seeds) < 2:
        return Comparison(difference, len(seeds), None, "n too small")
    # Percentages are rounded; an image of a million is 1e-4 points.
    if np.ptp(a - b) < 1e-9:
        return Comparison(difference, len(seeds), None, "no spread")
    return Comparison(difference, len(seeds), float(stats.ttest_rel(a, b).pvalue), "")
