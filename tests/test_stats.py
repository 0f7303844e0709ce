"Intervals against scipy and scikit-learn, which share no code with ours, and the message of every bad input."
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings, strategies as st
from sklearn.metrics import balanced_accuracy_score

from clip_lab.evals.stats import (METHODS, Estimate, adjust, binomial, bootstrap, chi_squared, difference, fisher, interval, mantel_haenszel,
                                  mcnemar, mean_per_class, odds_ratio, proportion, risk_ratio)

SCIPY = {"wilson": "wilson", "beta": "exact"}   # our names (statsmodels') and scipy's


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 50_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
       st.sampled_from([0.5, 0.9, 0.95, 0.995]), st.sampled_from(sorted(METHODS)))
def test_proportion_equals_scipy(counts, level, method):
    k, n = counts
    ours = proportion(k, n, level, method)
    theirs = scipy.stats.binomtest(k, n).proportion_ci(level, SCIPY[method])
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-8)
    assert 0 <= ours.low <= ours.value == k / n <= ours.high <= 1


def test_published_interval_of_the_paper():
    "Section 7.1: a rate of 14.4 % among about 1,400 people and the interval [12.6, 16.4] printed with it."
    e = proportion(202, 1400, method="beta")
    assert f"{e.value:.3f} {e.low:.3f} {e.high:.3f}" == "0.144 0.126 0.164"


def test_a_column_at_once_equals_one_by_one():
    k, n = np.array([0, 3, 9, 40]), np.array([4, 4, 10, 40])
    low, high = interval(k, n, 0.9)
    one_by_one = [proportion(*counts, level=0.9) for counts in zip(k, n)]
    assert low.tolist() == [e.low for e in one_by_one] and high.tolist() == [e.high for e in one_by_one]
    assert low[0] == 0 and high[-1] == 1


@pytest.mark.parametrize("call, message", [
    (lambda: proportion(0, 0), r"no observations \(n = 0\)"),
    (lambda: interval([1, 0], [2, 0]), r"n = 0 at entry 1"),
    (lambda: proportion(11, 10), "k = 11 of n = 10 cannot be"),
    (lambda: interval([1, -2], [3, 3]), "k = -2 of n = 3 at entry 1"),
    (lambda: proportion(0.8, 10), "k counts things and must be whole"),
    (lambda: proportion(float("nan"), 10), "must be whole"),
    (lambda: interval([1, 2], [3]), r"k has shape \(2,\) and n has shape \(1,\)"),
    (lambda: proportion(8, 10, level=95), "share between 0 and 1"),
    (lambda: proportion(8, 10, method="wald"), "unknown method 'wald'"),
    (lambda: mean_per_class([], []), "no class has a picture"),
    (lambda: mean_per_class([1], [2], level=1), "share between 0 and 1"),
    (lambda: mean_per_class([3], [2]), "k = 3 of n = 2"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_mean_per_class_value_is_balanced_accuracy():
    rng = np.random.default_rng(0)
    truth, answer = rng.integers(0, 12, 500), rng.integers(0, 12, 500)
    k, n = np.bincount(truth[truth == answer], minlength=13), np.bincount(truth, minlength=13)   # class 12 has no picture
    e = mean_per_class(k, n)
    assert e.value == pytest.approx(balanced_accuracy_score(truth, answer)) and e.n == 500
    assert e.low < e.value < e.high


def test_mean_per_class_interval_is_scipys_bootstrap():
    k, n = np.array([45, 20, 33]), np.array([50, 40, 35])
    answers = [np.repeat([1, 0], [right, total - right]) for right, total in zip(k, n)]
    theirs = scipy.stats.bootstrap(answers, lambda *c, axis: sum(x.mean(axis) for x in c) / len(c), confidence_level=0.9,
                                   method="percentile", n_resamples=20_000, rng=0).confidence_interval
    ours = mean_per_class(k, n, level=0.9, n_resamples=20_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)


def test_single_pictures_are_not_certain():
    right = np.arange(400) % 4 > 0
    e, wilson = mean_per_class(right, np.ones(400)), proportion(300, 400)
    assert (e.low, e.high) == pytest.approx((wilson.low, wilson.high), abs=0.01)
    mixed = mean_per_class([1, 0, 1, 1, 0, 90], [1, 1, 1, 1, 1, 100])
    assert mixed.low < mixed.value - 0.1 and mixed.high > mixed.value + 0.1


def test_classes_all_right_or_all_wrong_are_not_certain():
    "Redrawn, they never change; together they bring Wilson's interval instead."
    for k, n, pooled in (([3, 3], [3, 3], (6, 6)), ([0, 0], [3, 3], (0, 6)), ([6], [6], (6, 6)), ([1] * 6, [1] * 6, (6, 6)), ([100, 1], [100, 1], (2, 2))):      # a class with a single picture says next to nothing
        e, wilson = mean_per_class(k, n), proportion(*pooled)
        assert (e.low, e.high) == (pytest.approx(wilson.low), pytest.approx(wilson.high)) and "Wilson" in e.method and e.n == sum(n)
    certain, mixed = mean_per_class([40, 10], [50, 10]), mean_per_class([40, 9], [50, 10])
    alone = (1 - proportion(10, 10).low) / 2
    assert certain.low < certain.value - alone and certain.high >= certain.value
    assert mixed.method == "stratified bootstrap"
    both = mean_per_class([10, 0, 25], [10, 10, 50])
    assert both.low < both.value - alone / 2 and both.high > both.value + alone / 2


@pytest.mark.parametrize("classes, pictures, beta", [(2, 3, (19, 1)), (3, 2, (4, 1)), (10, 2, (4, 0.5)), (5, 4, (1, 9))])
def test_few_pictures_in_each_class_still_hold_the_truth(classes, pictures, beta):
    "The plain bootstrap holds it in a quarter to three quarters of these cases."
    rng, held = np.random.default_rng(7), 0
    for _ in range(400):
        truth = rng.beta(*beta, classes)
        e = mean_per_class(rng.binomial(pictures, truth), np.full(classes, pictures), n_resamples=400)
        held += e.low - 1e-9 <= truth.mean() <= e.high + 1e-9
    assert held >= scipy.stats.binom.ppf(1e-4, 400, 0.91)


def test_the_seed_decides():
    k, n = [3, 9, 1], [4, 20, 7]
    assert mean_per_class(k, n, seed=1) == mean_per_class(k, n, seed=1) != mean_per_class(k, n, seed=2)
    state = np.random.get_state()[1].copy()
    mean_per_class(k, n)
    assert (np.random.get_state()[1] == state).all()   # nothing global is drawn from


def test_an_estimate_reads_well():
    assert str(Estimate(0.824, 0.806, 0.840, 1907)) == "82.4% [80.6, 84.0], n=1,907"
    assert Estimate(0.5, 0.4, 0.6, 9, 0.995, "beta").to_dict() == {
        "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "level": 0.995, "method": "beta"}


counts = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(max_examples=60, deadline=None)
@given(counts, counts)
def test_newcombe_joins_two_wilson_intervals(first, second):
    "The closed form of Newcombe (1998), method 10, from scipy's Wilson intervals."
    e = difference(*first, *second)
    p, q = first[0] / first[1], second[0] / second[1]
    one, two = (scipy.stats.binomtest(*c).proportion_ci(0.95, "wilson") for c in (first, second))
    low = p - q - np.hypot(p - one.low, two.high - q)
    high = p - q + np.hypot(one.high - p, q - two.low)
    assert (e.value, e.low, e.high) == pytest.approx((p - q, low, high), abs=1e-7) and e.n == first[1] + second[1]
    swapped = difference(*second, *first)
    assert (swapped.low, swapped.high) == pytest.approx((-e.high, -e.low), abs=1e-9)


def test_ratios_against_statsmodels_and_the_noncentral_hypergeometric():
    from statsmodels.stats.proportion import confint_proportions_2indep
    e = risk_ratio(30, 200, 10, 150, level=0.9)
    assert (e.low, e.high) == pytest.approx(confint_proportions_2indep(30, 200, 10, 150, compare="ratio", method="log", alpha=0.1))
    assert e.value == pytest.approx(2.25) and e.n == 350
    o = odds_ratio(7, 12, 3, 15)
    tail = lambda odds: scipy.stats.nchypergeom_fisher(27, 10, 12, odds)
    assert tail(o.low).sf(6) == pytest.approx(0.025, abs=1e-6) and tail(o.high).cdf(7) == pytest.approx(0.025, abs=1e-6)
    assert tail(o.value).mean() == pytest.approx(7)                       # the conditional maximum-likelihood estimate
    assert odds_ratio(5, 10, 0, 10).high == np.inf


@settings(max_examples=40, deadline=None)
@given(counts, counts)
def test_fisher_adds_up_the_tables(first, second):
    (k1, n1), (k2, n2) = first, second
    k = np.arange(max(0, k1 + k2 - n2), min(n1, k1 + k2) + 1)
    mass = scipy.stats.hypergeom(n1 + n2, k1 + k2, n1).pmf(k)
    own = mass[k == k1][0]
    assert fisher(k1, n1, k2, n2).p == pytest.approx(mass[mass <= own * (1 + 1e-7)].sum(), abs=1e-9)
    assert fisher(k1, n1, k2, n2, "greater").p == pytest.approx(mass[k >= k1].sum(), abs=1e-9)
    assert fisher(k1, n1, k2, n2, "less").p == pytest.approx(mass[k <= k1].sum(), abs=1e-9)


def test_binomial_matches_the_exact_interval():
    "A one-tailed p-value at the lower end of the 95 % exact interval is 2.5 %."
    low, high = interval(18, 40, method="beta")
    assert binomial(18, 40, float(low)).p == pytest.approx(0.025) and binomial(18, 40, float(high), "less").p == pytest.approx(0.025)
    assert binomial(18, 40, 0.3).alternative == "greater"


def test_chi_squared_of_two_sets_is_the_square_of_the_z_test():
    from statsmodels.stats.proportion import proportions_ztest
    z, p = proportions_ztest([30, 10], [200, 150])
    c = chi_squared([[30, 170], [10, 140]])
    assert (c.statistic, c.p) == pytest.approx((z ** 2, p)) and c.n == 350
    assert c.detail["cramers_v"] == pytest.approx(abs(z) / np.sqrt(350)) and c.detail["df"] == 1
    assert c.detail["least_expected"] == pytest.approx(150 * 40 / 350)
    assert chi_squared([[9, 0], [0, 9]]).detail["cramers_v"] == pytest.approx(1)


def test_mcnemar_is_a_coin_toss_over_disagreements():
    rng = np.random.default_rng(0)
    a, b = rng.random(200) < 0.7, rng.random(200) < 0.55
    only = int((a & ~b).sum()), int((b & ~a).sum())
    m = mcnemar(a, b)
    assert m.p == pytest.approx(scipy.stats.binomtest(only[0], sum(only)).pvalue)
    assert (m.n, m.statistic, m.detail) == (200, min(only), {"only_first": only[0], "only_second": only[1]})
    assert mcnemar(a, a).p == 1


def test_mantel_haenszel_closed_form_and_useless_strata():
    k1, n1, k2, n2 = np.array([8, 5, 9]), np.array([10, 20, 30]), np.array([5, 4, 6]), np.array([10, 25, 30])
    effect, test = mantel_haenszel(k1, n1, k2, n2)
    total = n1 + n2
    assert effect.value == pytest.approx((k1 * (n2 - k2) / total).sum() / ((n1 - k1) * k2 / total).sum())
    margin = k1 + k2
    variance = (n1 * n2 * margin * (total - margin) / (total ** 2 * (total - 1))).sum()
    assert test.statistic == pytest.approx((k1 - n1 * margin / total).sum() ** 2 / variance)
    assert test.p == pytest.approx(scipy.stats.chi2.sf(test.statistic, 1)) and test.n == total.sum()
    more = mantel_haenszel([*k1, 0, 3], [*n1, 0, 3], [*k2, 4, 5], [*n2, 9, 5])     # one stratum without a partner, one without a mistake
    assert more[0] == effect and more[1].detail | {"left_out": 0} == test.detail and more[1].detail["left_out"] == 2
    alone = mantel_haenszel([8], [10], [5], [10])
    assert alone[0].value == pytest.approx(8 * 5 / (2 * 5)) and alone[1].detail["homogeneity_p"] is None


def test_bootstrap_percentiles_of_a_share_are_binomial():
    "Redrawing 0/1 answers is a binomial draw, whose quantiles scipy knows."
    right = np.repeat([1, 0], [60, 40])
    e = bootstrap([right], np.mean, method="percentile", n_resamples=20_000)
    assert (e.low, e.high) == pytest.approx(np.array(scipy.stats.binom(100, 0.6).interval(0.95)) / 100, abs=0.0101)


def test_bca_and_pairs():
    rng = np.random.default_rng(1)
    x = rng.exponential(size=80)
    bca, plain = (bootstrap([x], np.mean, method=m) for m in ("BCa", "percentile"))
    assert bca.low > plain.low and bca.high > plain.high                    # the correction follows the long tail
    y = x + 0.01 * rng.standard_normal(80)
    gap = lambda a, b, axis=-1: a.mean(axis) - b.mean(axis)
    together, apart = bootstrap([x, y], gap, paired=True), bootstrap([x, y], gap)
    differences = bootstrap([x - y], np.mean)
    assert (together.low, together.high) == pytest.approx((differences.low, differences.high), abs=1e-12)
    assert together.n == 80 and apart.n == 160 and apart.high - apart.low > 10 * (together.high - together.low)
    slow = bootstrap([x, y], lambda a, b: float(np.corrcoef(a, b)[0, 1]), paired=True, n_resamples=200, measure="r")   # no axis
    assert slow.low < slow.value < slow.high and str(slow).startswith("r 1 [")
    assert bootstrap([x], np.mean, seed=3) == bootstrap([x], np.mean, seed=3) != bootstrap([x], np.mean, seed=4)


@pytest.mark.parametrize("p", [[0.3], [0.0, 1.0], [0.02, 0.02, 0.02], *np.random.default_rng(0).random((3, 9)).round(1) ** 3])   # with ties
def test_adjusted_p_values_by_definition(p):
    p = np.array(p)
    n, order = len(p), p.argsort(kind="stable")
    holm = np.empty(n)
    holm[order] = [min(1, max((n - j) * p[order[j]] for j in range(i + 1))) for i in range(n)]
    assert adjust(p) == pytest.approx(holm) and adjust(p, "bonferroni") == pytest.approx(np.minimum(1, n * p))
    assert adjust(p, "fdr_bh") == pytest.approx(scipy.stats.false_discovery_control(p))


@pytest.mark.parametrize("call, message", [
    (lambda: difference(1, 2, 0, 0), "set 2 has no observations"),
    (lambda: difference(3, 2, 0, 4), "k = 3 of n = 2 at entry 0"),
    (lambda: difference(1, 2, 1, 2, level=2), "share between 0 and 1"),
    (lambda: risk_ratio(0, 5, 2, 5), "no interval for a risk ratio"),
    (lambda: risk_ratio(5, 5, 5, 5), "no interval for a risk ratio"),
    (lambda: odds_ratio(0, 5, 0, 5), "all answers are alike"),
    (lambda: binomial(1, 0, 0.5), "k = 1 of n = 0"),
    (lambda: binomial(0, 0, 0.5), "no observations"),
    (lambda: binomial(1, 2, 50), "rate is 50"),
    (lambda: binomial(1, 2, 0.5, "bigger"), "alternative is 'bigger'"),
    (lambda: fisher(1, 2, -1, 2), "k = -1 of n = 2 at entry 1"),
    (lambda: chi_squared([1, 2]), "at least 2 x 2"),
    (lambda: chi_squared([[1, 2], [0, 0]]), "row 1 of the table is empty"),
    (lambda: chi_squared([[1, 2], [-1, 5]]), "k = -1 of n = 7"),
    (lambda: chi_squared([[0.5, 2], [1, 5]]), "must be whole"),
    (lambda: mcnemar([], []), r"got shape \(0,\)"),
    (lambda: mcnemar([1, 2], [0, 1]), r"right \(1\) or wrong \(0\); got"),
    (lambda: mcnemar([1], [0, 1]), "1 answers against 2"),
    (lambda: mantel_haenszel([1], [2], [1, 1], [2, 2]), "1 strata against 2"),
    (lambda: mantel_haenszel([], [], [], []), "no pooled odds ratio"),
    (lambda: bootstrap([[1.0]], np.mean), "at least two observations"),
    (lambda: bootstrap([[1, 2], [1, 2, 3]], lambda a, b: 0, paired=True), r"lengths \[2, 3\]"),
    (lambda: bootstrap([[1, 2]], np.mean, method="basic"), "unknown method 'basic'"),
    (lambda: bootstrap([[1, 1, 1]], np.mean), "BCa interval is not defined"),
    (lambda: adjust([]), "one for each test"),
    (lambda: adjust([0.5, float("nan")]), "p = nan at entry 1"),
    (lambda: adjust([0.5], "sidak"), "unknown method 'sidak'"),
])
def test_bad_input_of_comparisons(call, message):
    with pytest.raises(ValueError, match=message): call()
