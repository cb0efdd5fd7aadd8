"""Records: what the schema refuses, what a run gives, what may be stored."""

import json
import subprocess

import pytest
import yaml
from conftest import QUEUE, ROOT, SMALL, only_error, run_script

from common import record as common_record
from common.errors import UserError
from results import record, reproduce


def good(**changes):
    """A whole record of a run on ImageNet that stands beside SNCLR's 73.38."""
    whole = {
        "method": "SNCLR",
        "recipe": "snclr",
        "arch": "vit_small",
        "pretraining": {
            "dataset": "ImageNet-1k",
            "copy": None,
            "incomplete": None,
            "epochs": 300,
            "batch": 4096,
        },
        "dataset": {"name": "ImageNet-1k", "copy": None, "incomplete": None},
        "protocol": "linear",
        "metric": "top1",
        "value": 73.0,
        "values": [72.5, 73.5],
        "seeds": [0, 1],
        "seeds_of": "pretraining",
        "spread": 0.707,
        "epoch": "last",
        "settings": {},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "config_hash": "0123456789ab",
        "command": ["snclr.py --arch vit_small --epochs 300", "run.py --backbone RUN"],
        "versions": {"python": "3.11.7", "torch": "2.11.0"},
        "hardware": "NVIDIA A100 x 32",
        "hours": 20.0,
        "images_per_second": 6000.0,
        "backbone_sha256": ["a" * 64, "b" * 64],
        "date": "2026-01-31",
    }
    return whole | changes


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
    assert any(expected in text for text in common_record.problems(broken))
    with pytest.raises(UserError):
        record.add(broken, folder=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_good_record_is_stored_under_a_name_that_says_what_it_is(tmp_path):
    assert common_record.problems(good()) == []
    path = record.add(good(), folder=tmp_path)
    assert path.name.startswith("snclr-vit-small-imagenet-1k-300ep-imagenet-1k-linear-")
    assert record.load_all(tmp_path) == [(path, good())]
    assert record.add(good(), folder=tmp_path) == path  # the same record is not doubled
    other = record.add(good(seeds=[2, 3]), folder=tmp_path)
    assert other != path and len(record.load_all(tmp_path)) == 2


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
    """Two finished runs of three steps that differ in the seed, with another temperature by
    --config and another branch by flag, beside flags that say what holds without them.
    """
    folders = []
    file = tmp_path_factory.mktemp("config") / "my.yaml"
    file.write_text("temperature: 0.4\nprojector-layers: 3\n")
    for seed in (0, 1):
        folders.append(tmp_path_factory.mktemp("runs") / f"seed{seed}")
        flags = [*SMALL, *QUEUE, "--knn-every", "1", "--max-steps", "3", "--seed", seed]
        flags += ["--config", file, "--momentum-encoder", "--lr", "0.02", "--no-multi-crop"]
        done = run_script("recipes/nnclr.py", *flags, "--output", folders[-1])
        assert done.returncode == 0, done.stderr
    return folders


def clean(folder):
    """The run as if it had started from a tree without changes."""
    results = json.loads((folder / "results.json").read_text())
    results["dirty"] = False
    (folder / "results.json").write_text(json.dumps(results))


def test_the_k_nn_of_runs_becomes_a_record(runs, tmp_path):
    for run in runs:
        clean(run)
    made = record.knn_record(runs)
    assert common_record.problems(made) == []
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    assert made["values"] == [round(100 * r["knn"], 3) for r in results]
    assert made["method"] == "NNCLR (momentum encoder)" and made["seeds"] == [0, 1]
    asked = {"queue_size": 128, "momentum_encoder": True, "temperature": 0.4}
    assert made["settings"] == asked  # wherever it was said, and nothing that is the preset's
    assert made["pretraining"]["dataset"] == "photos" and made["pretraining"]["batch"] == 36
    assert (
        made["commit"]
        == subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True).strip()
    )
    assert made["others"]["random encoder"][0] == round(100 * results[0]["knn_before"], 3)
    assert made["note"] == "stopped after 0.02 of 10 scheduled epochs"
    alone = record.knn_record(runs[:1])
    assert alone["spread"] is None and alone["value"] == made["values"][0]


def test_runs_that_differ_in_more_than_the_seed_make_no_record(runs, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in runs[1].iterdir():
        if path.is_file():
            (other / path.name).write_bytes(path.read_bytes())
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["temperature"] = 0.3
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"differs from .* in temperature: one"):
        common_record.of_runs([runs[0], other])


def test_an_exchanged_backbone_is_noticed(runs, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in runs[1].iterdir():
        if path.is_file():
            (other / path.name).write_bytes(path.read_bytes())
    (other / "backbone.safetensors").write_bytes((runs[0] / "backbone.safetensors").read_bytes())
    with pytest.raises(UserError, match="is not the one"):
        common_record.of_runs([other])


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
    assert common_record.method_of(config) == expected


def test_a_recipe_of_somebody_elses_is_recorded_by_its_name():
    assert common_record.method_of({"recipe": "mine"}) == "mine"
    assert common_record.method_of({"recipe": "nnclr", "momentum_encoder": True}) == (
        "NNCLR (momentum encoder)"
    )


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ("snclr", {"temperature": 0.2, "neighbours": 30}, {}),
        ("snclr", {"temperature": 0.4, "neighbours": 5}, {"temperature": 0.4, "neighbours": 5}),
        ("snclr", {"dataset": "photos", "epochs": 5, "neighbour-free-epochs": 0.25}, {}),
        ("snclr", {"dataset": "photos", "queue-size": 2048, "lr": 0.02}, {}),
        ("snclr", {"dataset": "cifar10", "queue-size": 2048}, {"queue_size": 2048}),
        ("snclr", {"arch": "vit_small", "follow": "official"}, {}),
        ("snclr", {"arch": "vit_small", "loss": "official"}, {"loss": "official"}),
        ("simsiam_gsg", {"gsg": False, "seed": 3, "max-steps": 5, "data": "x"}, {}),
        ("simsiam_gsg", {"precision": "fp32", "compile": True, "augment-device": "cuda"}, {}),
        ("nnclr", {"input": "reference", "workers": 3, "knn-every": 1}, {}),
        ("nnclr", {"micro-batch": 512}, {"micro_batch": 512}),
        ("snclr", {"arch": "vit_base", "micro-batch": 512}, {}),
    ],
)
def test_settings_are_what_differs_from_the_recipes_own_values(recipe, flags, expected):
    config = reproduce.config_of({"recipe": recipe, "flags": flags})
    assert common_record.settings_of(config) == expected


def test_a_run_that_is_older_than_a_flag_has_no_setting_of_it():
    config = reproduce.config_of({"recipe": "nnclr", "flags": {"input": "reference"}})
    del config["input"], config["augment_device"]
    assert common_record.settings_of(config) == {}


def test_tables_leave_out_settings_that_an_older_record_has_of_its_recipe():
    """As records had them that took their settings from the command line."""
    old = {"temperature": 0.2, "neighbours": 5}
    assert common_record.as_shown(good(settings=old))["settings"] == {"neighbours": 5}
    what = {"dataset": "photos", "copy": None, "incomplete": None, "epochs": 0.02, "batch": 64}
    photos = {"arch": "tiny", "pretraining": what}
    photos |= {"note": "stopped after 0.02 of 5 scheduled epochs"}
    old = {"queue_size": 2048, "neighbour_free_epochs": 0.25, "lr": 0.3}  # 5 % of the 5 epochs
    assert common_record.as_shown(good(settings=old, **photos))["settings"] == {"lr": 0.3}
    old = {"exclude_self": False, "neighbour_free_epochs": 0}
    official = good(method="SNCLR (official)", settings=old)
    assert common_record.as_shown(official)["settings"] == {}
    assert common_record.as_shown(good(settings=old))["settings"] == old
    foreign = good(recipe=None, settings={"temperature": 0.2})
    assert common_record.as_shown(foreign) == foreign


def test_the_stored_records_own_values_are_no_reason_to_stand_apart():
    shown = dict(record.load_shown())
    scans = [
        name
        for name, one in ((path.name, one) for path, one in record.load_all())
        if one["recipe"] == "snclr" and one.get("settings") == {"temperature": 0.2}
    ]
    assert scans and all(shown[name]["settings"] == {} for name in scans)
