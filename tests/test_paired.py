"""Paired comparison and gates against others: scipy's bootstrap, lm-eval's standard error, plain counts."""
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import bootstrap

from llmquant.core.errors import UsageError
from llmquant.harness.gate import GRAMMAR, items_needed, judge, parse_gate
from llmquant.harness.paired import bootstrap_interval, compare_items, mcnemar


def answers(n=300, lost=0.06, gained=0.03, seed=0):
    "Right answers of a base and of an export that loses and gains some."
    generator = np.random.default_rng(seed)
    base = generator.random(n) < 0.66
    return base, np.where(base, generator.random(n) >= lost, generator.random(n) < gained)


def results_of(base, export, metric="acc"):
    "Results of one task, after a trip through JSON."
    found = {**compare_items(base, export).to_dict(), "higher_is_better": True}
    return json.loads(json.dumps({"tasks": {"piqa": {"n": len(base), "metrics": {metric: found}}}}))


def test_figures_are_those_of_lm_eval():
    metrics = pytest.importorskip("lm_eval.api.metrics")
    base, export = answers()
    found = compare_items(base, export)
    assert found.base == metrics.mean(list(base)) and found.export == metrics.mean(list(export))
    assert found.base_stderr == pytest.approx(metrics.mean_stderr([float(x) for x in base]), rel=1e-12)
    assert found.difference == pytest.approx(found.export - found.base, abs=1e-15)


def test_the_interval_is_scipys_for_log_likelihoods():
    generator = np.random.default_rng(3)
    base = generator.normal(-3, 2, 150)
    export = base + generator.exponential(0.3, 150) - 0.4  # skewed, so that a normal interval would differ
    found = compare_items(base, export, resamples=100_000)
    other = bootstrap((export - base,), np.mean, n_resamples=100_000, method="percentile", rng=1).confidence_interval
    assert found.interval == pytest.approx((other.low, other.high), abs=0.002)
    assert (found.mcnemar_p, found.right_to_wrong, found.wrong_to_right) == (None, None, None)


def test_flips_are_counted_one_by_one():
    base, export = answers(lost=0.1, gained=0.1, seed=4)
    lost = sum(1 for x, y in zip(base, export) if x and not y)
    gained = sum(1 for x, y in zip(base, export) if y and not x)
    found = compare_items(base, export)
    assert lost > gained > 0 and (found.right_to_wrong, found.wrong_to_right) == (lost, gained)
    tail = sum(Fraction(math.comb(lost + gained, k), 2 ** (lost + gained)) for k in range(min(lost, gained) + 1))
    assert found.mcnemar_p == pytest.approx(float(min(1, 2 * tail)), rel=1e-12) == mcnemar(gained, lost)


def test_a_bootstrap_of_one_value_is_a_point_and_a_difference_without_flips_is_not():
    assert bootstrap_interval(np.full(50, 0.25)) == (0.25, 0.25)
    same = np.arange(50) % 2
    low, high = compare_items(same, same).interval
    assert -0.1 < low < 0 < high < 0.1


def test_more_lost_answers_never_raise_the_lower_bound():
    base = np.ones(200)
    bounds = []
    for lost in range(0, 30):
        export = base.copy()
        export[:lost] = 0
        bounds.append(compare_items(base, export).interval[0])
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize(("base", "export", "message"), [
    ([1, 0, 1], [1, 0], "3 items of the base and 2 of the export cannot be paired"),
    ([1], [0], "compare at least 2"),
    ([0.5, -math.inf], [0.5, 1], "score of base on item 1 is -inf"),
    ([[1, 0]], [[1, 0]], "have 2 dimensions"),
])
def test_what_cannot_be_paired(base, export, message):
    with pytest.raises(UsageError, match=message): compare_items(base, export)


def test_a_gate_passes_fails_and_is_undecided():
    small = parse_gate("acc>=-0.01")
    base = np.arange(3000) % 3 > 0
    broken = base & (np.arange(3000) % 4 > 0)  # a quarter is lost
    one = lambda gate, *pair: judge(gate, results_of(*pair))[0]
    assert one(small, base, base)["passed"]
    assert not one(small, base, broken)["passed"] and not one(small, base, broken)["undecided"]
    few = one(small, base[:100], base[:100])
    assert not few["passed"] and few["undecided"] and few["needed"] > 100 and "too few to tell" in few["sentence"]
    assert one(parse_gate("acc>=-0.05"), base[:100], base[:100])["passed"]


def test_the_number_of_items_decides_when_they_are_there():
    "An export that loses one answer in a hundred, with the number of items that the undecided verdict asked for."
    base = np.arange(300) < 200
    export = base.copy()
    export[:12], export[-9:] = False, True
    verdict_on = lambda copies: judge(parse_gate("acc>=-0.02"), results_of(np.tile(base, copies),
                                                                           np.tile(export, copies)))[0]
    few = verdict_on(1)
    assert few["undecided"] and 2000 < few["needed"] < 4000
    assert verdict_on(math.ceil(few["needed"] * 1.1 / 300))["passed"]
    assert verdict_on(math.ceil(few["needed"] / 2 / 300))["undecided"]


def test_items_needed_is_a_whole_number_above_nothing():
    for value in np.linspace(-0.3, 0.3, 61):
        needed = items_needed(200, value, (value - 0.05, value + 0.05), -0.01)
        assert needed is None if value == -0.01 else needed is None or (isinstance(needed, int) and needed >= 1)


@pytest.mark.parametrize("text", ["", "acc", "acc>=", "acc>0.1", "piqa acc>=-0.1", "acc>=-0,01", "acc>=-1%", "kl<0.1",
                                  "acc>=-0.01,kl<=0.1", "acc>=inf", ":acc>=-0.01", "1acc>=-0.01"])
def test_a_gate_that_does_not_parse_shows_the_grammar(text):
    with pytest.raises(UsageError) as caught: parse_gate(text)
    assert str(caught.value) == f"gate {text!r} does not parse; {GRAMMAR}"
