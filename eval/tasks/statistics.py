"""How sure a score is: standard errors, bootstrap intervals, two models on the same documents.

The interval is the percentile bootstrap over documents (Efron 1979); the comparison is paired
(Miller 2024, arXiv 2411.00640), its p-value that of the exact sign test.
"""

import math
from collections.abc import Sequence

import numpy as np

_RESAMPLES, _AT_ONCE = 2000, 1 << 22


def summary(values: Sequence[float], weights: Sequence[float] | None = None) -> dict:
    """Weighted mean of a score over documents: value, stderr, low and high (95%), documents.

    The standard error is that of a ratio of sums; both it and the interval take documents as drawn
    independently. stderr is None for one document. Where all documents have 0, or all 1, the
    interval is that of `proportion`.
    """
    found = _summary(values, weights)
    if found["low"] == found["high"] and found["value"] in (0.0, 1.0):
        # Drawing the same again shows no doubt.
        found["low"], found["high"] = proportion(round(found["value"] * len(values)), len(values))
    return found


def _summary(values: Sequence[float], weights: Sequence[float] | None) -> dict:
    x, w = np.asarray(values, np.float64), np.ones(len(values))
    if weights is not None:
        w = np.asarray(weights, np.float64)
    if not len(x) or not w.sum():
        return {"value": None, "stderr": None, "low": None, "high": None, "documents": len(x)}
    mean, n = float((w * x).sum() / w.sum()), len(x)
    stderr = None
    if n > 1:
        spread = math.sqrt(float(((w * (x - mean)) ** 2).sum()) * n / (n - 1))
        stderr = spread / float(w.sum())
    low, high = _interval(x, w)
    return {"value": mean, "stderr": stderr, "low": low, "high": high, "documents": n}


def _interval(x: np.ndarray, w: np.ndarray) -> tuple[float, float]:
    rng, n = np.random.default_rng(0), len(x)
    rows = max(1, _AT_ONCE // n)
    means = []
    for first in range(0, _RESAMPLES, rows):
        drawn = rng.integers(0, n, (min(rows, _RESAMPLES - first), n))
        means.append((w[drawn] * x[drawn]).sum(1) / w[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def paired(a: Sequence[float], b: Sequence[float]) -> dict:
    """How much better b is than a on the same documents.

    Returns:
      `summary` of b - a, and better, worse: documents on which b is; p: two-sided, of the exact
      sign test over these.
    """
    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    n, k = better + worse, min(better, worse)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    p = 1.0 if 2 * tail >= 2**n else 2 * tail / 2**n
    return _summary(difference.tolist(), None) | {"better": better, "worse": worse, "p": p}


def pass_at(k: int, trials: int, right: int) -> float:
    """The chance that one of k answers is right, unbiased: 1 - C(n - c, k) / C(n, k) of c right
    ones among n (Chen et al. 2021, arXiv 2107.03374)."""
    assert k <= trials, (k, trials)
    return 1.0 - math.comb(trials - right, k) / math.comb(trials, k)


def proportion(hits: int, trials: int) -> tuple[float, float]:
    """The 95% interval of a proportion after Wilson (1927), which holds near 0 and 1 too."""
    if not trials:
        return 0.0, 1.0
    z = 1.959964
    p, scale = hits / trials, 1 + z * z / trials
    middle = (p + z * z / (2 * trials)) / scale
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)
