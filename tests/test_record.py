"""Records: what the schema refuses, what a run gives, what may be stored, what is of the plan."""

import json
import subprocess
from pathlib import Path

import golden_set
import pytest
import yaml
from conftest import ROOT, SMALL, only_error, run_script
from golden_set import good, of_run

from common import cards
from common.errors import UserError
from results import record
from slurm import plan


def without(*path):
    broken = json.loads(json.dumps(good()))
    inner = broken
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return broken


BROKEN = {
    "no value": (without("value"), "'value' is a required property"),
    "no commit": (without("commit"), "'commit'"),
    "no epochs": (without("pretraining", "epochs"), "pretraining: 'epochs'"),
    "fraction": (good(value=0.73, values=[0.725]), "values: 1 for 2 seeds"),
    "above 100": (good(value=730), "value: 730 is greater"),
    "word for number": (good(hours="20"), "hours: '20'"),
    "unknown metric": (good(metric="accuracy"), "metric: 'accuracy'"),
    "unknown field": (good(top1=73), "'top1' was unexpected"),
    "wrong mean": (good(value=74.0), "is not the mean"),
    "wrong spread": (good(spread=0.1), "is not the standard deviation"),
    "no spread": (good(spread=None), "spread: a number for several"),
    "spread of one": (good(seeds=[0], values=[73.0], spread=0.0), "null for one"),
    "seeds repeat": (good(seeds=[1, 1]), "repeat"),
    "short sha": (good(backbone_sha256=["abc"]), "backbone_sha256"),
    "no date": (good(date="yesterday"), "date"),
    "a list": ([], "the record"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_record_is_refused_and_says_where(case, tmp_path):
    broken, expected = BROKEN[case]
    assert any(expected in text for text in record.problems(broken))
    with pytest.raises(UserError):
        record.add(broken, folder=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_good_record_is_stored_under_a_name_that_says_what_it_is(tmp_path):
    assert record.problems(good()) == []
    path = record.add(good(), folder=tmp_path)
    assert path.name.startswith("snclr-vit-small-imagenet-1k-300ep-imagenet-1k-linear-")
    assert record.load_all(tmp_path) == [(path.name, good())]
    assert record.add(good(), folder=tmp_path) == path  # the same record is not doubled
    other = record.add(good(seeds=[2, 3]), folder=tmp_path)
    assert other != path and len(record.load_all(tmp_path)) == 2


def test_two_records_of_the_same_runs_and_protocol_are_told(tmp_path, capsys):
    """As of k-NN, which a run measures itself and the linear probe measures again."""
    first = record.add(good(), folder=tmp_path)
    record.add(good(protocol="linear, other"), folder=tmp_path)
    record.add(good(backbone_sha256=["e" * 64] * len(good()["seeds"])), folder=tmp_path)
    record.say_stored(first)
    assert "warning" not in capsys.readouterr().out
    again = record.add(good(hyperparameters={"k": 20}), folder=tmp_path)
    record.say_stored(again)
    assert f"warning: {first.name} has the same runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dirty": True}, "uncommitted changes"),
        ({"dirty": None}, "uncommitted changes"),
        ({"command": []}, "no command"),
    ],
)
def test_what_cannot_be_traced_is_refused_unless_allowed(changes, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        record.add(good(**changes), folder=tmp_path)
    path = record.add(good(**changes), allow_dirty=True, folder=tmp_path)
    stored = record.read(path)
    assert stored["dirty"] is ("dirty" in changes)
    assert stored["command"] == (good()["command"] if "dirty" in changes else ["unknown"])


@pytest.mark.parametrize("commit", [None, "unknown"])
def test_a_record_without_a_commit_is_refused_even_so(commit, tmp_path):
    with pytest.raises(UserError, match="names no commit"):
        record.add(good(commit=commit), allow_dirty=True, folder=tmp_path)


def test_a_stored_record_that_was_edited_by_hand_is_found(tmp_path):
    path = record.add(good(), folder=tmp_path)
    path.write_text(path.read_text().replace('"value": 73.0', '"value": 76.0'))
    with pytest.raises(UserError, match="is not the mean"):
        record.load_all(tmp_path)


def test_the_commands_mistakes_are_one_line(tmp_path):
    assert "no such file" in only_error(run_script("results/record.py", "add", tmp_path / "x"))
    (tmp_path / "broken.json").write_text("{")
    error = only_error(run_script("results/record.py", "add", tmp_path / "broken.json"))
    assert "is not JSON" in error
    assert "no finished run" in only_error(run_script("results/record.py", "knn", tmp_path))


def test_every_stored_record_is_good():
    done = run_script("results/record.py", "check")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains two runs of three steps that differ in the seed, with another temperature by --config
    and another branch by flag, next to flags that say what holds without them.
    """
    folders = []
    file = tmp_path_factory.mktemp("config") / "my.yaml"
    file.write_text("temperature: 0.4\nprojector-layers: 3\n")
    for seed in (0, 1):
        folders.append(tmp_path_factory.mktemp("runs") / f"seed{seed}")
        flags = [
            *SMALL,
            "--queue-size",
            "128",
            "--knn-every",
            "1",
            "--max-steps",
            "3",
            "--seed",
            seed,
        ]
        flags += ["--config", file, "--momentum-encoder", "--lr", "0.02", "--no-multi-crop"]
        flags += ["--plan-name", "a-plan"]
        done = run_script("recipes/nnclr.py", *flags, "--output", folders[-1])
        assert done.returncode == 0, done.stderr
    return folders


def clean(folder):
    """Changes the run as if it had started from a tree without changes."""
    results = json.loads((folder / "results.json").read_text())
    results["dirty"] = False
    (folder / "results.json").write_text(json.dumps(results))


def test_the_k_nn_of_runs_becomes_a_record(runs, tmp_path):
    for run in runs:
        clean(run)
    made = record.knn_record(runs)
    assert record.problems(made) == []
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    assert made["values"] == [round(100 * r["knn"], 3) for r in results]
    assert made["method"] == "NNCLR (momentum encoder)" and made["seeds"] == [0, 1]
    asked = {"queue_size": 128, "momentum_encoder": True, "temperature": 0.4}
    assert made["settings"] == asked  # wherever it was said, and nothing that is the preset's
    assert made["plan"] == "a-plan"
    assert made["pretraining"]["dataset"] == "photos" and made["pretraining"]["batch"] == 36
    assert (
        made["commit"]
        == subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    )
    assert made["others"]["random encoder"][0] == round(100 * results[0]["knn_before"], 3)
    assert made["note"] == "stopped after 0.02 of 10 scheduled epochs"
    alone = record.knn_record(runs[:1])
    assert alone["spread"] is None and alone["value"] == made["values"][0]


def copied(run: Path, folder: Path, **changes) -> Path:
    """Copies the run with these values in its config.yaml; None takes one out."""
    folder.mkdir()
    for path in run.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    config = yaml.safe_load((folder / "config.yaml").read_text()) | changes
    config = {n: v for n, v in config.items() if v is not None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_runs_that_differ_in_more_than_the_seed_make_no_record(runs, tmp_path):
    other = copied(runs[1], tmp_path / "other", temperature=0.3, settings={"temperature": 0.3})
    with pytest.raises(UserError, match=r"differs from .* in temperature: one"):
        record.of_runs([runs[0], other])


def test_a_run_that_does_not_say_its_settings_is_to_be_started_again(runs, tmp_path):
    other = copied(runs[1], tmp_path / "other", settings=None, method=None)
    with pytest.raises(UserError, match="start the run's command again, which notes them"):
        record.of_runs([other])


def test_a_run_that_was_begun_again_for_more_steps_is_not_finished(runs, tmp_path):
    other = copied(runs[1], tmp_path / "other")
    starts = json.loads((other / "environment.json").read_text())
    starts["restarts"] = [{"steps": {"per_epoch": 150, "last": 9}}]
    (other / "environment.json").write_text(json.dumps(starts))
    with pytest.raises(UserError, match="goes on after its results"):
        record.of_runs([other])


def test_an_exchanged_backbone_is_noticed(runs, tmp_path):
    other = copied(runs[1], tmp_path / "other")
    (other / "backbone.safetensors").write_bytes((runs[0] / "backbone.safetensors").read_bytes())
    with pytest.raises(UserError, match="is not the one"):
        record.of_runs([other])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"recipe": "simsiam_gsg", "gsg": True, "follow": "paper"}, "SimSiam-GSG"),
        ({"recipe": "simsiam_gsg", "gsg": False, "follow": "paper"}, "SimSiam"),
        ({"recipe": "byol_gsg", "gsg": False, "follow": "paper"}, "BYOL (SimSiam heads)"),
        ({"recipe": "byol_gsg", "gsg": True, "follow": "official"}, "BYOL-GSG (official)"),
        ({"recipe": "nnclr", "momentum_encoder": False}, "NNCLR"),
    ],
)
def test_methods_are_named_as_in_the_published_numbers(config, expected):
    assert cards.method_of(config.pop("recipe"), config) == expected


def test_a_recipe_of_somebody_elses_is_recorded_by_its_name():
    assert cards.method_of("mine", {"momentum_encoder": True}) == "mine"


# -- which run of the plan a record is of ---------------------------------------------------------


def is_of(one, name, seed=0):
    return record.is_of(one, golden_set.planned()[name], seed)


def pretraining(one, **changes):
    return one | {"pretraining": one["pretraining"] | changes}


OTHER = {
    "plan": lambda one: one | {"plan": "photos-nnclr"},
    "no plan": lambda one: {n: v for n, v in one.items() if n != "plan"},
    "seed": lambda one: one | {"seeds": [1]},
    "two seeds": lambda one: one | {"seeds": [0, 1]},
    "epochs": lambda one: pretraining(one, epochs=50),
    "batch": lambda one: pretraining(one, batch=128),
    "data set": lambda one: pretraining(one, dataset="CIFAR-10"),
    "part of it": lambda one: pretraining(one, incomplete="500 images of it"),
    "arch": lambda one: one | {"arch": "resnet18"},
    "settings": lambda one: one | {"settings": {"neighbours": 6}},
    "no settings": lambda one: one | {"settings": {}},
    "one more setting": lambda one: one | {"settings": {"neighbours": 5, "temperature": 0.5}},
    "recipe": lambda one: one | {"recipe": "nnclr"},
    "method": lambda one: one | {"method": "SNCLR (official)"},
    "length": lambda one: one | {"note": "stopped after 5 of 10 scheduled epochs"},
}


@pytest.mark.parametrize("what", OTHER)
def test_a_record_counts_for_a_run_of_the_plan_if_all_agrees(what):
    _, one = of_run("photos-snclr", 0, 70.0)
    assert is_of(one, "photos-snclr") and is_of(one | {"note": "of a copy"}, "photos-snclr")
    assert not is_of(OTHER[what](one), "photos-snclr")


def test_runs_of_the_plan_that_differ_in_what_chooses_a_preset_are_told_apart():
    names = ("photos-simsiam", "photos-simsiam-gsg")
    for name in names:
        _, one = of_run(name, 0, 70.0)
        assert [is_of(one | {"plan": other}, other) for other in names] == [
            n == name for n in names
        ]


def test_a_copy_of_the_data_set_may_stand_for_it():
    _, one = of_run("simsiam", 1, 60.0)
    assert one["pretraining"]["copy"] == "JPEG copy" and is_of(one, "simsiam", 1)


def test_several_seeds_of_a_probe_are_of_the_one_encoder_that_they_probe():
    _, one = of_run("simsiam", 1, 60.0, "linear")
    one |= {"seeds": [0, 1, 2], "seeds_of": "evaluation"}
    one |= {"hyperparameters": {"evaluation": {"pretraining_seeds": [1]}}}
    assert is_of(one, "simsiam", 1) and not is_of(one, "simsiam", 0)


def test_every_stored_record_that_names_a_run_of_the_plan_is_of_it():
    planned = plan.load(ROOT / "results" / "plan.yaml")
    named = [(name, one) for name, one in record.load_all() if "plan" in one]
    assert len(named) >= 64
    for name, one in named:
        run = planned[one["plan"]]
        assert any(record.is_of(one, run, seed) for seed in run.seeds), name
