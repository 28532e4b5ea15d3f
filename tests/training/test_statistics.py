"""Intervals, paired tests and summaries: each is checked by hand, by enumeration, or against scipy and the standard library."""
import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archrepair.core.errors import ArchrepairError
from archrepair.training.statistics import Summary, mcnemar, spearman, wilcoxon, wilson

# --- one rate


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (1, 1), (85, 100), (850, 1000), (3, 7), (9999, 10000)])
def test_wilson_equals_scipy(right, n):
    from scipy.stats import binomtest

    theirs = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-4)


def test_wilson_stays_inside_0_and_1():
    assert wilson(0, 0) == (0, 1)
    assert all(0 <= low <= high <= 1 for n in range(1, 2000, 7) for right in (0, n) for low, high in [wilson(right, n)])


# --- over runs


def test_summary_by_hand():
    got = Summary.of([2.0, 4.0, 9.0])
    assert (got.mean, got.n) == (5.0, 3) and got.sd == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert str(got) == "5.00 ± 3.61 (n 3)" and f"{got:+.1f}" == "+5.0 ± 3.6 (n 3)"
    one = Summary.of([7.5])
    assert (one.mean, one.n) == (7.5, 1) and math.isnan(one.sd) and str(one) == "7.50 (n 1)"
    assert str(Summary.of([])) == str(Summary.of([None, math.nan, math.inf])) == "–" and Summary.of([math.nan, 3, None]) == Summary.of([3])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30))
def test_summary_equals_the_standard_library(values):
    got = Summary.of(values)
    assert got.mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-6) and got.n == len(values)
    assert got.sd == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-6)


# --- pairs


def test_wilcoxon_by_hand():
    """Seven differences 1, 2, 3, 4, 5, -6, 7: the negative ranks sum to 6. Of the 128 ways to choose signs, those whose negative ranks
    sum to at most 6 are: sum 0:1, 1:1, 2:1, 3:2, 4:2, 5:3, 6:4 = 14; both tails 28/128."""
    got = wilcoxon([1, 2, 3, 4, 5, -6, 7], [0] * 7)
    assert (got.test, got.statistic, got.p, got.n, got.of, got.note) == ("wilcoxon, exact", 6.0, 28 / 128, 7, 7, "")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_wilcoxon_counts_every_choice_of_signs(differences):
    "Ties and zeros included; by enumeration."
    from scipy.stats import rankdata

    signed = [d for d in differences if d]
    got = wilcoxon(differences, [0] * len(differences))
    assert (got.n, got.of) == (len(signed), len(differences))
    if not signed:
        return
    ranks = rankdata(np.abs(signed))
    lower = lambda signs: min(sum(r for r, s in zip(ranks, signs) if s > 0), sum(r for r, s in zip(ranks, signs) if s < 0))
    every = [lower(signs) for signs in itertools.product((-1, 1), repeat=len(signed))]
    assert got.statistic == lower(np.sign(signed)) and got.p == pytest.approx(np.mean([v <= got.statistic + 1e-9 for v in every]))
    other = wilcoxon([0] * len(differences), differences)
    assert (other.p, other.statistic) == (got.p, got.statistic)  # two-sided: the order of the methods does not matter


def test_wilcoxon_equals_scipy_and_finds_what_is_there():
    from scipy.stats import wilcoxon as theirs

    generator = np.random.default_rng(0)
    for n in (6, 20, 50, 51, 120):
        a, b = generator.normal(0.3, 1, n), generator.normal(0, 1, n)
        got = wilcoxon(a.tolist(), b.tolist())
        assert got.p == pytest.approx(theirs(np.round(a - b, 9), correction=n > 50).pvalue, rel=1e-9)
        assert got.test == ("wilcoxon, exact" if n <= 50 else "wilcoxon, normal approximation")
    assert wilcoxon(list(range(1, 9)), [0] * 8).p == 2 / 2**8


def test_wilcoxon_says_when_there_is_too_little():
    assert wilcoxon([1, 2, 3], [1, 2, 3]) == wilcoxon([1, 2, 3], [1, 2, 3]) and wilcoxon([1, 2], [1, 2]).note == "no pair differs"
    assert (wilcoxon([1, 2], [1, 2]).p, wilcoxon([1, 2], [1, 2]).n) == (1.0, 0)
    five = wilcoxon([2, 3, 4, 5, 6], [1, 1, 1, 1, 1])
    assert five.p == 0.0625 and five.note == "5 pairs cannot give p below 0.0625"
    assert wilcoxon([2.0], [1.0]).note == "1 pair cannot give p below 1" and wilcoxon([2, 3, 4, 5, 6, 7], [1] * 6).note == ""
    assert wilcoxon([0.3, 0.4], [0.2, 0.3]).statistic == 0 and wilcoxon([0.3, 0.2], [0.2, 0.3]).p == 1.0  # 0.3 - 0.2 ties with 0.2 - 0.1
    for wrong in (([1, 2], [1]), ([math.nan], [1.0]), ([1.0], [math.inf])):
        with pytest.raises(ArchrepairError, match="cannot be paired"):
            wilcoxon(*wrong)


def test_mcnemar_by_hand():
    "9 fixed, 3 broken: 2 · (1 + 12 + 66 + 220) / 2¹². 60 and 35: (25 - 1)² / 95."
    few = mcnemar(9, 3)
    assert few.p == pytest.approx(2 * (1 + 12 + 66 + 220) / 2**12)
    assert (few.test, few.statistic, few.n) == ("mcnemar, exact binomial", 3.0, 12)
    many = mcnemar(60, 35)
    assert many.statistic == pytest.approx(24**2 / 95) and many.test == "mcnemar, chi2 with continuity correction"
    assert many.p == pytest.approx(math.erfc(math.sqrt(many.statistic / 2)))
    assert mcnemar(60, 35, "exact").p == pytest.approx(many.p, rel=0.05)
    assert (mcnemar(13, 12).test, mcnemar(12, 12).test) == ("mcnemar, chi2 with continuity correction", "mcnemar, exact binomial")
    assert mcnemar(30, 30).p == mcnemar(31, 30).p == 1.0 and mcnemar(35, 60) == mcnemar(60, 35)
    assert mcnemar(0, 0).p == 1.0 and "agree" in mcnemar(0, 0).note and mcnemar(1, 0).p == 1.0 and mcnemar(6, 0).p == 2 / 2**6
    with pytest.raises(ArchrepairError, match="unknown method of McNemar's test"):
        mcnemar(1, 2, "exakt")


def test_spearman_by_hand():
    "Ranks 4 2 1 3 against 1 4 2 3: Σd² = 9 + 4 + 1 + 0 = 14, so ρ = 1 − 6·14/(4·15) = −0.4."
    got = spearman([25, 9, 5, 11], [0.1, 2.0, 0.4, 1.5])
    assert got.statistic == pytest.approx(-0.4) and (got.test, got.n, got.of) == ("spearman, exact", 4, 4)
    rhos = [1 - 6 * sum((a - b) ** 2 for a, b in zip((4, 2, 1, 3), order)) / 60 for order in itertools.permutations((1, 2, 3, 4))]
    assert got.p == pytest.approx(np.mean([abs(rho) >= 0.4 - 1e-9 for rho in rhos]))
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]).p == pytest.approx(2 / 24)


def test_spearman_equals_scipy_and_says_when_there_is_no_order():
    from scipy.stats import spearmanr

    generator = np.random.default_rng(0)
    for n in (5, 8, 9, 40):
        a, b = generator.integers(0, 9, n).tolist(), generator.normal(0, 1, n).tolist()
        got, theirs = spearman(a, b), spearmanr(a, b)
        assert got.statistic == pytest.approx(theirs.statistic) and got.test == ("spearman, exact" if n <= 8 else "spearman, Student's t")
        assert n <= 8 or got.p == pytest.approx(theirs.pvalue)
    for first, second in (([1.0], [2.0]), ([1, 1, 1], [1, 2, 3])):
        nothing = spearman(first, second)
        assert math.isnan(nothing.statistic) and nothing.p == 1.0 and "no order" in nothing.note
    with pytest.raises(ArchrepairError, match="cannot be paired"):
        spearman([1, 2], [1])
