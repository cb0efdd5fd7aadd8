"""The lab's rates and its pilot: which of three is chosen, and that the plan has just that."""

import pytest

from results import joined, lab_rates
from results.record import FAILED
from slurm.plan import PROTOCOLS


@pytest.mark.parametrize(
    ("by_factor", "expected"),
    [
        ({0.25: 1.0, 1.0: 3.0, 4.0: 2.0}, 1.0),
        ({0.25: 5.0, 1.0: 3.0, 4.0: 5.1}, 4.0),
        ({0.25: 5.0, 1.0: 5.0, 4.0: 5.0}, 1.0),  # of equals the family's own wins
        ({0.25: -2.0, 1.0: None, 4.0: None}, 0.25),  # the others failed
    ],
)
def test_the_best_of_three_rates_is_chosen(by_factor, expected):
    assert lab_rates.best(by_factor) == expected


def near(value, random):
    return {"value": value, "others": {"random encoder": [random]}, "hours": 0.1}


def test_a_grid_counts_when_whole_and_failed_runs_are_said():
    names = [f"rate-{arm}-x{f}" for arm in ("a", "b", "scratch") for f in ("0.25", "1", "4")]
    runs = {name: {PROTOCOLS["knn"]: {0: ("n", near(30.0, 21.5))}} for name in names[:5]}
    runs["rate-a-x4"] = {FAILED: {0: ("n", {"error": "the loss is nan"})}}
    runs |= {n: {PROTOCOLS["classifier"]: {0: ("n", {"value": 20.0})}} for n in names[6:]}
    found = joined.Joined([], [], [], dict.fromkeys([*names, "pilot-a"]), {}, runs, [])
    grid = lab_rates.rates_of(found)
    assert grid == {"a": {0.25: 8.5, 1: 8.5, 4: None}, "scratch": {0.25: 20.0, 1: 20.0, 4: 20.0}}
    line = lab_rates.grid_table(grid, lab_rates.chosen(found)).splitlines()[2]
    assert line == "| `a` | +8.5 | **+8.5** | failed |"
    assert "Nothing" not in lab_rates.markdown(found)
    assert "The pilot:" not in lab_rates.markdown(found)
    pilot = {s: ("n", near(30.0 + s, 20.0) | {"seeds": [s]}) for s in (0, 1, 2)}
    runs["pilot-a"] = {PROTOCOLS["knn"]: pilot}
    last = lab_rates.markdown(found).splitlines()[-1]
    assert last == "| `a` | 3 | 31.0 | +11.0 | 1.0 | 6.0 |"


def test_chosen_rates_at_the_grids_edge_are_counted_and_named():
    three = {0.25: 3.0, 1: 2.0, 4: None}
    grid, own = dict.fromkeys("abcd", three), dict.fromkeys("abcd", 1)
    said = lab_rates.edges(grid, {"a": 4, "b": 0.25, "c": 1, "d": 0.25})
    assert said.endswith("that was tried (1 of 4: `a`) or the least (2 of 4: `b`, `d`).")
    assert lab_rates.edges(grid, own).endswith("tried (0 of 4) or the least (0 of 4).")


def test_the_pilot_at_full_length_may_choose_another_rate():
    def knn(by_seed):
        return {
            PROTOCOLS["knn"]: {s: ("n", near(v, 20.0) | {"seeds": [s]}) for s, v in by_seed.items()}
        }

    names = [f"rate-a-x{f}" for f in ("0.25", "1", "4")]
    runs = {name: knn({0: v}) for name, v in zip(names, (25.0, 26.0, 27.0), strict=True)}
    runs["pilot-a"] = knn({0: 28.0, 1: 40.0})
    found = joined.Joined(
        [], [], [], dict.fromkeys([*names, "pilot-a", "pilot-a-x1"]), {}, runs, []
    )
    assert lab_rates.chosen(found) == {"a": 4}
    runs["pilot-a-x1"] = knn({0: 28.1})  # seed 1 has no twin
    assert lab_rates.chosen(found) == {"a": 1}
    runs["pilot-a-x1"] = knn({0: 28.0, 2: 50.0})
    assert lab_rates.chosen(found) == {"a": 4}


def test_the_plans_rates_are_those_that_the_grid_and_the_pilot_have_chosen():
    found = joined.load()
    rates = {name: run.config["lr"] for name, run in found.plan.items()}
    for arm, factor in lab_rates.chosen(found).items():
        assert rates[f"lab-{arm}"] == pytest.approx(rates[f"rate-{arm}-x1"] * factor), arm
    for arm, by_factor in lab_rates.rates_of(found).items():
        if (name := f"pilot-{arm}") in rates:
            own = rates[f"rate-{arm}-x1"] * lab_rates.best(by_factor)
            assert rates[name] == pytest.approx(own), name
