"""How sure a measured number is: intervals of one, and of the difference of two on the same rows. Functions of arrays.

What a metric is computed from is summed over rows, so a metric is given as a function of how often each row counts:

    measure(weights [resamples, rows]) -> {name: values [resamples]}

A row that counts once is the metric itself; rows drawn with replacement are a bootstrap resample (Efron and Tibshirani,
An Introduction to the Bootstrap, 1993, chapter 13). "Rows" are whatever is drawn: where rows belong together, as blocks
of a document or parts of a conversation do, their sums are one row here (see `sums_of`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000  # of the bootstrap
Z_95, Z_POWER = 1.959964, 0.841621  # normal quantiles: of 97.5 %, and of 80 %
Measure = Callable[[np.ndarray], dict[str, np.ndarray]]


def point(measure: Measure, rows: int) -> dict[str, float]:
    """The values with every row once."""
    return {name: float(values[0]) for name, values in measure(np.ones((1, rows))).items()}


def resampled(measure: Measure, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """The values of RESAMPLES bootstrap resamples of the rows, [RESAMPLES] each; the same draws for the same seed."""
    rng = np.random.default_rng(seed)
    shares, at_once = np.full(rows, 1 / rows), max(1, 10**7 // rows)  # 80 MB for any number of rows
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    parts = [measure(rng.multinomial(rows, shares, size=size).astype(float)) for size in sizes]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def difference(first: Measure, second: Measure) -> Measure:
    """How much more the second measures than the first, on the same rows."""

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        before, after = first(weights), second(weights)
        return {name: after[name] - before[name] for name in before if name in after}

    return measure


def merged(*measures: Measure) -> Measure:
    """All that several measure of the same rows."""
    return lambda weights: {name: values for measure in measures for name, values in measure(weights).items()}


def mean_measure(name: str, rows: np.ndarray) -> Measure:
    """The mean of a number of each row, [rows]."""
    return lambda weights: {name: weights @ rows / weights.sum(1)}


def mean_of(measures: Sequence[Measure]) -> Measure:
    """The mean over several runs of one recipe (its seeds), measured on the same rows."""

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        values = [each(weights) for each in measures]
        return {name: np.mean([each[name] for each in values], 0) for name in values[0]}

    return measure


def mean_of_drawn(measures: Sequence[Measure], seed: int) -> Measure:
    """`mean_of` with the runs drawn again for each resample of the rows, for what is said about a recipe.

    Which seed a run had moves its result as the choice of rows does (Bouthillier et al., 2021, arXiv 2103.03098). One
    run fewer than there are is drawn: so the variance of the mean of few is right (Rao and Wu, 1988). A single run
    cannot tell how much seeds matter, and counts as it is.
    """
    rng, count = np.random.default_rng(seed), len(measures)

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        values = [each(weights) for each in measures]
        shares = rng.multinomial(count - 1, np.full(count, 1 / count), size=len(weights)) / (count - 1)
        return {name: (shares.T * [each[name] for each in values]).sum(0) for name in values[0]}

    return measure if count > 1 else measures[0]


def percentiles(values: np.ndarray) -> list[float]:
    """The bounds that 95 % of the values are between."""
    return np.percentile(values, [2.5, 97.5]).tolist()


def bootstrap(measure: Measure, rows: int, seed: int = 0) -> dict[str, list[float]]:
    """The 95 % interval of each value; none of a single row, which says nothing about others."""
    return {name: percentiles(v) for name, v in resampled(measure, rows, seed).items()} if rows > 1 else {}


def sums_of(rows: Sequence[Any] | np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """rows [rows, ...] -> [groups, ...]: those of each group added up. groups: of each row, numbered from 0."""
    values = np.asarray(rows, dtype=float)
    total = np.zeros((max(groups) + 1, *values.shape[1:]))
    np.add.at(total, np.asarray(groups), values)
    return total


def wilson(hits: int, rows: int) -> list[float]:
    """The 95 % interval of a share, which is never a single point (Wilson, 1927)."""
    share, z = hits / rows, Z_95**2 / rows
    middle, half = share + z / 2, Z_95 * math.sqrt(share * (1 - share) / rows + z / rows / 4)
    return [max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))]


def most_errors(errors: int, rows: int, confidence: float) -> float:
    """The largest share of errors that goes with this many in so many rows (Clopper and Pearson, 1934, one-sided)."""
    from scipy.stats import beta  # comes with scikit-learn; the scripts' options need this module, but not scipy

    return 1.0 if errors >= rows else float(beta.ppf(confidence, errors + 1, rows - errors))


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The p-value of two classifiers being equally often right, exact (McNemar, 1947).

    first, second: [rows], whether each was right.
    """
    from scipy.stats import binomtest

    gained, lost = int((~first & second).sum()), int((first & ~second).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_test(differences: Sequence[float]) -> float:
    """The exact p-value of differences being above and below 0 equally often; those of 0 do not count."""
    from scipy.stats import binomtest

    up, down = (sum(sign * x > 0 for x in differences) for sign in (1, -1))
    return float(binomtest(up, up + down).pvalue) if up + down else 1.0


def rows_to_see(change: float, differences: np.ndarray, rows: int) -> int:
    """How many rows a true difference of `change` needs to be found in 80 of 100 cases, at 95 % confidence.

    differences: bootstrap resamples of the difference on `rows` rows; its standard error shrinks with their root.
    """
    return math.ceil(rows * ((Z_95 + Z_POWER) * float(differences.std(ddof=1)) / change) ** 2)
