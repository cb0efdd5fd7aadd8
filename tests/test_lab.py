"""The lab's statistics, on records made up for it: against scipy's tests and worked examples."""

import numpy as np
import pytest
from scipy import stats

from results import lab
from results.record import FAILED
from results.record import history as kept_history


def record(knn=60.0, linear=62.0, random=30.0, std=0.9, rank=40.0, purity=0.5, curve=None):
    curve = curve or [random / 100, knn / 100]
    epochs = [*range(len(curve))]
    lay = {"std": std, "effective_rank": rank, "singular_values": [1.0]}
    history = {
        "epoch": epochs,
        "knn": curve,
        "neighbour_purity": [None, *[purity] * (len(curve) - 1)],
    }
    return {
        "value": linear,
        "scores": [{"value": knn}],
        "others": {"random encoder": [random]},
        "history": [history],
        "geometry": [[{"epoch": 1, "representation": lay, "embedding": lay}]],
    }


def runs(**arms):
    """Returns records by seed from 10 on for each arm, as `claims.recorded` gives them."""
    protocol = lab.PROTOCOLS["readout"]
    return {
        name: {protocol: {10 + n: (f"{name}{n}.json", one) for n, one in enumerate(records)}}
        for name, records in arms.items()
    }


def claim(**changes):
    base = {"name": "c", "primary": True, "measure": "knn", "smallest": 2.0, "healthy": "a"}
    base |= {"effect": {"a": 1, "b": -1}, "seeds": [10, 11, 12, 13, 14]}
    return base | changes


def verdict(found, one=None):
    one = one or claim()
    return lab.judge_all([one], found)[one["name"]]


def around(center, spread=0.5):
    return [record(knn=center + spread * d) for d in (-1.0, 0.4, 0.8, -0.6, 0.2)]


def test_the_interval_is_the_t_tests():
    found = [1.3, -0.2, 2.2, 0.7, 1.9]
    theirs = stats.ttest_1samp(found, 0.0)
    ours, (low, high) = lab.interval(found), theirs.confidence_interval(0.95)
    assert ours.p == pytest.approx(theirs.pvalue) and ours.n == 5
    assert (ours.low, ours.high) == (pytest.approx(low), pytest.approx(high))
    low, high = theirs.confidence_interval(0.9)
    wide = lab.interval(found, 0.1)
    assert (wide.low, wide.high) == (pytest.approx(low), pytest.approx(high))
    assert lab.interval([2.0, 2.0]).p == 0 and lab.interval([0.0, 0.0]).p == 1


def test_holm_on_a_worked_example():
    """Four p values give .01 x 4, then .015 x 3, .02 x 2 and .03 x 1, none below the one before."""
    ps = {"a": 0.02, "b": 0.01, "c": 0.03, "d": 0.015}
    assert lab.holm(ps) == pytest.approx({"b": 0.04, "d": 0.045, "a": 0.045, "c": 0.045})
    assert lab.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_holm_rejects_as_its_definition():
    ps = dict(enumerate(np.random.default_rng(0).uniform(size=12) ** 3))
    adjusted, rejected = lab.holm(ps), []
    for number, name in enumerate(sorted(ps, key=ps.get)):
        if ps[name] > 0.05 / (12 - number):
            break
        rejected.append(name)
    assert sorted(n for n, p in adjusted.items() if p <= 0.05) == sorted(rejected) != []


def test_effects_are_paired_by_seed_and_need_every_arm():
    found = runs(a=[record(knn=k) for k in (50, 60, 70)], b=[record(knn=k) for k in (49, 57)])
    assert lab.effects(claim(), found) == {10: 1.0, 11: 3.0}
    drops = claim(effect={"a": 1, "a2": -1, "b": -1, "b2": 1})
    arms = {n: [record(knn=k)] for n, k in {"a": 60, "a2": 33, "b": 62, "b2": 50}.items()}
    assert lab.effects(drops, runs(**arms)) == {10: 15.0}  # a drop of 27 against one of 12


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        (around(60), around(50)[::-1], lab.SEEN),
        (around(50), around(60)[::-1], lab.REVERSED),
        (around(60, 0.1), around(60, 0.1)[::-1], "smaller than 2 here"),
        (around(60, 6), around(58, 6)[::-1], lab.OPEN),
        (around(35), around(30)[::-1], lab.NOT_TESTABLE),
    ],
)
def test_verdicts(a, b, word):
    found = verdict(runs(a=a, b=b))
    assert found.word == word
    if word == lab.OPEN:
        settle = int(found.why.split()[0])
        assert settle > 5 and "settle" in found.why
    if word == lab.NOT_TESTABLE:
        assert "a is 5.0 [" in found.why


def test_nothing_is_judged_before_all_seeds_are_there():
    found = verdict(runs(a=around(60)[:3], b=around(40)))
    assert found.word == lab.OPEN and found.why == "2 of 5 seeds lack"
    assert verdict(runs(a=around(60), b=[])).word == lab.NOT_RUN


def test_primary_claims_pay_for_each_other_also_for_those_not_run():
    """With a p of about .006 the effect is seen alone, but not among twelve claims."""
    a, b = [record(knn=k) for k in (60, 62, 61, 60.5, 63)], around(59, 0.3)
    alone = verdict(runs(a=a, b=b))
    assert alone.word == lab.SEEN
    others = [claim(name=f"c{n}", effect={"x": 1, "y": -1}) for n in range(11)]
    among = lab.judge_all([claim(), *others], runs(a=a, b=b))
    assert (
        among["c"].adjusted == pytest.approx(12 * alone.interval.p) and among["c"].word == lab.OPEN
    )
    secondary = lab.judge_all([claim(primary=False)], runs(a=a, b=b))["c"]
    assert secondary.word == "" and secondary.adjusted is None and secondary.interval.n == 5


def test_a_family_that_came_later_pays_by_itself():
    a, b = [record(knn=k) for k in (60, 62, 61, 60.5, 63)], around(59, 0.3)
    others = [claim(name=f"c{n}", effect={"x": 1, "y": -1}) for n in range(11)]
    later = claim(name="later", family="projector")
    found = lab.judge_all([claim(), *others, later], runs(a=a, b=b))
    assert found["c"].word == lab.OPEN and found["later"].word == lab.SEEN
    assert found["later"].adjusted == pytest.approx(found["later"].interval.p)


def test_what_the_read_out_loses_by_the_first_features_alone():
    found = runs(a=[record(knn=40, linear=v) for v in (50, 51, 52, 53, 54)])
    first = {10 + n: ("f.json", {"value": v}) for n, v in enumerate((45, 44, 46, 45))}
    found["a"][lab.PROTOCOLS["readout first 22"]] = first
    one = claim(measure="beyond_first", effect={"a": 1})
    assert lab.effects(one, found) == {10: 5, 11: 7, 12: 6, 13: 8}


def test_collapse_is_a_flat_embedding_that_has_learned_nothing():
    assert lab.measured(record(knn=31, std=0.05)).collapsed
    assert lab.measured(record(knn=31, rank=1.5)).collapsed
    assert not lab.measured(record(knn=40, std=0.05)).collapsed  # its encoder has learned
    assert not lab.measured(record(knn=31)).collapsed  # learned nothing, but is not flat


def test_a_collapse_is_claimed_only_at_every_rate_and_beside_an_intact_arm():
    broken = [record(knn=31 + n / 10, std=0.01) for n in range(5)]
    one = claim(collapse=["b", "b-high"], intact=["a"])
    arms = {"a": around(60), "b": broken}
    assert "b-high is not run" in verdict(runs(**arms), one).why
    assert verdict(runs(**arms, **{"b-high": broken[:1]}), one).word == lab.SEEN
    found = verdict(runs(**arms, **{"b-high": [record(knn=45)]}), one)
    assert found.word == lab.OPEN and "b-high has not collapsed with seed 10" in found.why
    sick = [*around(60)[:4], record(knn=60, random=59, rank=1.2)]
    found = verdict(runs(a=sick, b=broken, **{"b-high": broken[:1]}), one)
    assert "a has collapsed with seed 14" in found.why


def test_a_run_that_is_to_learn_nothing_must_have_learned_nothing():
    one = claim(unlearned=["b"])
    a, b = around(60), around(31)
    assert verdict(runs(a=a, b=b), one).word == lab.SEEN
    found = verdict(runs(a=a, b=[*b[:4], record(knn=33.5)]), one)  # random encoders have 30
    assert found.word == lab.OPEN and found.why == "b has learned something with seed 14"


def test_a_failed_run_is_named_where_its_seed_lacks():
    found = runs(a=around(60), b=around(50)[:4])
    found["b"][FAILED] = {14: ("failed/b-14.json", {"error": "the loss is nan"})}
    word = lab.judge_all([claim()], found)["c"]
    assert word.word == lab.OPEN and word.why == "1 of 5 seeds lack: b failed with seed 14"


def test_top1_is_that_of_a_classifiers_own_record():
    found = runs(a=[record()], b=[record()])
    one = claim(measure="top1")
    assert lab.effects(one, found) == {}
    for arm, value in (("a", 80.0), ("b", 71.5)):
        found[arm][lab.PROTOCOLS["classifier"]] = {10: ("x.json", {"value": value})}
    assert lab.effects(one, found) == {10: 8.5}


def test_a_claim_is_open_without_its_healthy_arm():
    found = verdict(runs(a=around(60), b=around(40)), claim(healthy="h"))
    assert found.word == lab.OPEN and found.why == "h is not run with every seed"


def test_look_ups_that_find_little_make_a_claim_untestable():
    one = claim(purity={"a": 0.3})
    a = [record(knn=60 + n, purity=0.2) for n in range(5)]
    found = verdict(runs(a=a, b=around(40)), one)
    assert found.word == lab.NOT_TESTABLE and "label in 20 % of cases" in found.why


def test_views_until_five_points_above_random():
    """From 20 at random it goes to 22, 28, 40: 25 lies halfway through the second epoch."""
    slow = record(random=20.0, knn=40.0, curve=[0.2, 0.22, 0.28, 0.4])
    assert lab.epochs_until(lab.measured(slow), 5) == pytest.approx(1.5)
    never = record(random=20.0, knn=21.0, curve=[0.2, None, 0.21])
    assert lab.epochs_until(lab.measured(never), 5) == 2
    one = claim(measure="views", views={"a": 4, "b": 2})
    assert lab.effects(one, runs(a=[slow], b=[never])) == {10: pytest.approx(4 * 1.5 - 2 * 2)}


def test_seeds_to_settle_is_the_first_number_that_would_do():
    found = [0.5, -1.5, 2.0, 1.0, -0.2]
    n = lab.seeds_to_settle(found, 0.1)
    mean, spread = np.mean(found), np.std(found, ddof=1)
    half = [stats.t.ppf(0.975, k - 1) * spread / k**0.5 for k in (n - 1, n)]
    assert half[0] >= mean > half[1]
    assert lab.seeds_to_settle([1.0, -1.0, 1.0, -1.0], 1e-9) is None


def test_what_fnc_finds_is_measured_over_chance_in_the_last_quarter():
    """By the monitors that a record keeps, so that none of them is missing there."""
    logged = [
        {"kind": "epoch", "epoch": e, "found_precision": 0.1 * e, "found_chance": 0.1}
        for e in range(1, 9)
    ]
    one = record() | {"history": [kept_history(logged)]}
    found = lab.value(claim(measure="found_over_chance"), "a", lab.measured(one))
    assert found == pytest.approx(100 * (0.75 - 0.1))


def test_look_ups_grow_from_their_first_epoch_to_the_last_quarter():
    """The first epoch that has any: SNCLR's first ones may be free of neighbours."""
    purity = [None, None, 0.12, 0.2, 0.2, 0.2, 0.2, 0.3, 0.4]
    logged = [
        {"kind": "epoch", "epoch": e, "neighbour_purity": value, "positiveness_auc": 0.05 * e}
        for e, value in enumerate(purity)
        if value is not None
    ]
    one = lab.measured(record() | {"history": [kept_history(logged)]})
    assert lab.value(claim(measure="purity_growth"), "a", one) == pytest.approx(35 - 12)
    assert lab.value(claim(measure="auc_over_chance"), "a", one) == pytest.approx(37.5 - 50)
