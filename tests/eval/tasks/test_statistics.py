"""Standard errors and intervals: formulas, coverage, the exact sign test."""

import itertools
import math

import numpy as np
import pytest

from puna.eval.tasks import statistics


def test_a_mean_and_its_error():
    found = statistics.summary([1.0, 0.0, 1.0, 1.0])
    assert found["value"] == 0.75 and found["documents"] == 4
    assert found["stderr"] == pytest.approx(0.5 / 2)  # sd of the sample over sqrt(n)
    assert found["low"] == 0.25 and found["high"] == 1.0
    assert statistics.summary([0.5])["stderr"] is None
    low, high = (statistics.summary([1.0] * 12)[name] for name in ("low", "high"))
    assert 0.7 < low < 0.8 and high == pytest.approx(1.0)
    assert statistics.summary([])["value"] is None
    weighted = statistics.summary([1.0, 4.0], [3.0, 1.0])
    assert weighted["value"] == 1.75 and weighted["low"] == 1.0 and weighted["high"] == 4.0


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, truth = np.random.default_rng(1), 0.7
    inside = 0
    for _ in range(100):
        found = statistics.summary((rng.random(80) < truth).astype(float).tolist())
        inside += found["low"] <= truth <= found["high"]
    assert 86 <= inside <= 100  # 95 expected


def test_paired_differences_are_surer_than_two_means():
    rng = np.random.default_rng(0)
    hard = rng.random(300)
    a, b = (hard < 0.5).astype(float), (hard < 0.56).astype(float)
    found = statistics.paired(a.tolist(), b.tolist())
    assert found["value"] == pytest.approx(b.mean() - a.mean()) and found["worse"] == 0
    apart = math.hypot(*(statistics.summary(x.tolist())["stderr"] for x in (a, b)))
    assert found["stderr"] < apart / 2 and found["low"] > 0
    assert found["p"] == pytest.approx(2 * 0.5 ** found["better"])
    assert statistics.paired([1, 0, 1], [0, 1, 1])["p"] == 1.0


def test_proportions_near_the_ends():
    low, high = statistics.proportion(0, 50)
    assert low == 0.0 and 0.05 < high < 0.08  # the rule of three says 0.06
    low, high = statistics.proportion(50, 50)
    assert 0.92 < low < 0.95 and high == pytest.approx(1.0)
    assert statistics.proportion(0, 0) == (0.0, 1.0)


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    for trials, right in [(1, 0), (1, 1), (5, 0), (5, 2), (6, 5), (7, 7)]:
        results = [i < right for i in range(trials)]
        for k in range(1, trials + 1):
            drawn = [any(some) for some in itertools.combinations(results, k)]
            wanted = sum(drawn) / len(drawn)
            assert statistics.pass_at(k, trials, right) == pytest.approx(wanted)
