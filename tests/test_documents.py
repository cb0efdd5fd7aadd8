"""Files that are not what they should be: one line each, with the file and the place in it."""

import copy
import errno
import functools
import itertools
import json
import os

import golden_set
import numpy as np
import pytest
import yaml

from common import cards
from common.data import shards
from common.data.images import FolderImages
from common.errors import UserError, command
from common.run import backbone, checkpoint, documents, environment, folder, metrics, results
from common.run.flags import parse
from common.run.run import check_memory
from eval.semi_supervised.lists import read_list
from recipes import snclr
from results import claims, curves, joined, record, reproduce, tables
from slurm import ledger, plan, resources, status, submission, sweep, task

NOTE = {"time": 1.5, "event": "end", "attempt": 0, "code": 1, "rank": 0, "host": "n"}
STEP = {"kind": "step", "epoch": 1, "step": 1, "loss": 0.5, "lr": 0.1}
EPOCH = {"kind": "epoch", "epoch": 1, "step": 1, "loss": 0.5, "knn": 0.25}
LIES = {"std": 0.5, "effective_rank": 3.0, "singular_values": [1.0, 0.5]}
LIES = {"kind": "geometry", "epoch": 1, "step": 3, "representation": LIES, "embedding": LIES}
START = {"command": "snclr.py --seed 0", "versions": {"python": "3.11.7"}}
START |= {"devices": {"name": "CPU", "ranks": 1}, "steps": {"per_epoch": 3, "last": 9}}
RESULTS = dict.fromkeys(results.NUMBERS, 1) | {"recipe": "snclr", "dataset": "photos"}
RESULTS |= {"commit": "ab", "dirty": False, "config_hash": "ab", "backbone_sha256": "ab"}
CONFIG = {"recipe": "snclr", "method": "SNCLR", "plan": None, "settings": {}, "dataset": "photos"}
CONFIG |= {"arch": "tiny", "epochs": 3, "batch_size": 36, "image_size": 32, "seed": 0, "data": ""}
SPLIT = {"images": 2, "classes": ["a"], "shards": {"train-00000.tar": 10240}}
PACKED = {"version": 1, "source": "x", "resized": 0, "splits": {"train": SPLIT}}
JOB = {"name": "a", "script": "recipes/snclr.py", "flags": [], "folder": None}
SUBMISSION = {"number": 1, "cluster": "slurm", "jobs": {"a": "7"}, "host": "n"}
LEDGER = {"name": "s", "runs": [JOB], "submissions": [SUBMISSION]}
SWEEP = {"script": "recipes/snclr.py", "flags": {"dataset": "photos"}, "grid": {"seed": [0, 1]}}
SWEEP |= {"runs": [{"name": "long", "epochs": 3}]}
CLUSTER = {"partition": "gpu", "mem_gb": 480, "environment": ["module load cuda"]}
CARD = {"methods": {"Mine": {}, "Mine, pulled": {"pull": 1}}, "family": "contrastive"}
CARD |= {"paper": "x", "chooses": [], "linear": None, "finetune": "gsg", "metrics": {}}
CARD |= {"smallest": ["--dim", 3]}
FIGURES = [{"file": "a.png", "caption": "A.", "command": "draw", "page": "claims.md"}]


def read_image_list(path):
    return read_list(path, FolderImages("", np.array([b"a"]), None, [], "x"))


def golden(name):
    return yaml.safe_load((golden_set.GOLDEN / name).read_text())


def read_config(path):
    return parse(snclr.Config, snclr.PRESETS, ["--config", str(path)], snclr.resolve)


def read_cluster(path):
    return resources.resources_of(resources.cluster_layer(str(path)))


# file -> (what is in a good one, what reads it)
READERS = {
    "my.yaml": ({"lr": 0.5, "batch-size": 64}, read_config),
    "sweep.yaml": (SWEEP, sweep.read_spec),
    "cluster.yaml": (CLUSTER, read_cluster),
    "recipes.yaml": ({"mine": CARD}, cards.load.__wrapped__),
    "plan.yaml": (golden("plan.yaml"), plan.load),
    "claims.yaml": (
        golden("claims.yaml"),
        lambda path: claims.load(path, golden_set.planned()),
    ),
    "published.yaml": (golden("published.yaml"), tables.load_published),
    "figures.yaml": (FIGURES, lambda path: joined.load_figures(path.parent)),
    "config.yaml": (CONFIG, lambda path: folder.read_config(path.parent)),
    "environment.json": (START, lambda path: environment.last_start(path.parent)),
    "results.json": (RESULTS, lambda path: results.read(path.parent)),
    "packed.json": (PACKED, lambda path: shards.describe(path.parent)),
    "runs.json": (LEDGER, lambda path: ledger.read_ledger(path.parent)),
    "record.json": (golden_set.good(), lambda path: record.load_all(path.parent)),
    "metrics.jsonl": ([STEP, EPOCH], metrics.read),
    "geometry.jsonl": ([LIES], lambda path: metrics.read(path, "geometry")),
    "a.0.jsonl": ([NOTE], lambda path: task.read_notes(path.parent, "a")),
}
WHOLE = [name for name in READERS if not name.endswith(".jsonl")]
EMPTY_IS_NOTHING = ("figures.yaml", "recipes.yaml")


def written(path, value):
    """Writes a file with this value in it, in its format."""
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(value, sort_keys=False))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in value))
    else:
        path.write_text(json.dumps(value))
    if path.name == "figures.yaml":
        (path.parent / "a.png").touch()
    return path


def refused(path) -> str:
    """Returns what is said of a file, which names it."""
    with pytest.raises(UserError) as error:
        READERS[path.name][1](path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000 and path.name in text
    return text


def changed(value, place: str, new):
    """Returns a copy with another value at a place, a.b.0; without it if the new one is DROP."""
    value = copy.deepcopy(value)
    *inner, last = [int(word) if word.isdigit() else word for word in place.split(".")]
    part = functools.reduce(lambda part, word: part[word], inner, value)
    if new is DROP:
        del part[last]
    else:
        part[last] = new
    return value


DROP = object()


@pytest.mark.parametrize("name", READERS)
def test_a_good_file_is_read(name, tmp_path):
    value, read = READERS[name]
    assert read(written(tmp_path / name, value))


# -- no file, or nothing that can be read ----------------------------------------------------------

CONTENTS = {
    "empty": b"",
    "zeros": bytes(100),
    "cut": b'{"a": [1, 2',
    "not UTF-8": b"\xff\xfe\x80",
    "a number": b"7",
    "text": b'"text"',
    "lists, a thousand deep": b'{"a": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "blocks, a thousand deep": b'{"a": ' * 1000 + b"1" + b"}" * 1000,
    "21 deep": b'{"a": ' * 21 + b"1" + b"}" * 21,
    "an integer of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "an integer of 65 bits": b'{"a": 36893488147419103232}',
    "half of a surrogate pair": b'{"a": "\\ud800"}',
    "half of a surrogate pair in a key": b'{"\\ud800": 1}',
    "a key twice": b'{"a": 1, "a": 1}',
}


ONE_OF_EACH = {"config.yaml", "results.json", "packed.json"}  # run in `make test`; others are alike


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    "name", [n if n in ONE_OF_EACH else pytest.param(n, marks=pytest.mark.long) for n in WHOLE]
)
def test_content_that_is_none_is_one_line(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(CONTENTS[content])
    if content == "empty" and name in EMPTY_IS_NOTHING:
        return
    refused(path)


@pytest.mark.timeout(60)  # a pipe was waited for
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", READERS)
def test_a_folder_or_a_pipe_in_its_place_is_one_line(name, make, tmp_path):
    make(tmp_path / name)
    assert f"is a {'folder' if make is os.mkdir else 'named pipe'}" in refused(tmp_path / name)


@pytest.mark.timeout(60)  # a pipe was waited for
@pytest.mark.parametrize(
    "read", [checkpoint.load, backbone.load_backbone, results.checksum, read_image_list]
)
def test_a_pipe_in_the_place_of_weights_or_a_list_is_one_line(read, tmp_path):
    os.mkfifo(tmp_path / "a.file")
    with pytest.raises(UserError, match=r"a\.file(:| is a named pipe)"):
        read(tmp_path / "a.file")


@pytest.mark.timeout(60)
def test_a_pipe_is_no_lock_and_has_no_progress(tmp_path):
    for name in (reproduce.LOCK, metrics.NAME, environment.NAME, results.NAME):
        os.mkfifo(tmp_path / name)
    assert not reproduce.is_locked(tmp_path)
    assert status.progress(str(tmp_path)) == {} and not results.is_finished(tmp_path)


def test_a_device_is_no_file():
    with pytest.raises(UserError, match="/dev/zero is a device, not a file"):
        documents.read_json("/dev/zero", "block")


def test_a_file_beyond_its_bound_is_not_read(tmp_path):
    with open(tmp_path / "a.yaml", "wb") as file:
        file.truncate(documents.MOST_YAML + 1)
    with pytest.raises(UserError, match="more than 4 MiB"):
        documents.read_yaml(tmp_path / "a.yaml")


YAML_ONLY = {
    "batch-size: 4\nbatch_size: 8\n": "line 2, column 1: batch_size is batch-size again",
    "a:\n  b: 1\n  b: 2\n": "line 3, column 3: b is there twice",
    "a: !!python/object:os.system {}": "could not determine a constructor",
    "a: !!set {b}": "a: set is of no use",
    "a: .nan": "a: nan is no number",
    "a: [1, -.inf]": "a.entry 2: -inf is no number",
    "a: *a": "undefined alias",
    "a: &a [*a]": "nested too deep",
    "? [a]\n: 1": "unhashable",
    "a: !!int x": "cannot be read",
}
BOMB = "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefgh")
)


@pytest.mark.parametrize("text", [*YAML_ONLY, "a: &a [x, x, x]\n" + BOMB])
@pytest.mark.parametrize("name", ["my.yaml", "sweep.yaml", "cluster.yaml", "plan.yaml"])
def test_what_yaml_can_say_and_no_file_of_ours_does(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert YAML_ONLY.get(text, "it is too long") in refused(tmp_path / name)


def test_a_merge_and_a_date_are_as_they_were(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {b: 1, c: 2}\nd: {<<: *a, b: 3}\ne: 2026-01-31\n")
    assert documents.read_yaml(tmp_path / "a.yaml") == {
        "a": {"b": 1, "c": 2},
        "d": {"b": 3, "c": 2},
        "e": "2026-01-31",
    }


# -- another value than the reader can use ---------------------------------------------------------

WRONG = [
    ("my.yaml", "lr", [], "lr: [] is not text or a number"),
    ("my.yaml", "batch-size", True, "batch_size: True is not int"),
    ("my.yaml", "lr", "1e999", "lr: '1e999' is not float"),
    ("sweep.yaml", "flags", [1], "flags: [1] is not a block"),
    ("sweep.yaml", "grid", 3, "grid: 3 is not a block"),
    ("sweep.yaml", "runs", 3, "runs: 3 is not a list"),
    ("sweep.yaml", "runs.0", 3, "runs.entry 1: 3 is not a block"),
    ("sweep.yaml", "runs.0.name", 3, "runs.entry 1.name: 3 is not text"),
    ("sweep.yaml", "flags.lr", {"a": 1}, "flags.lr"),
    ("sweep.yaml", "max_parallel", 0, "max_parallel: 0 is less"),
    ("sweep.yaml", "grid.seed", [*range(10_001)], "10,001 runs, more than the 1,001"),
    ("cluster.yaml", "options", {"a": [1]}, "options: a [1]: write it"),
    ("cluster.yaml", "mem_gb", "much", "mem_gb 'much' is not a number"),
    ("recipes.yaml", "mine.methods", {}, "mine.methods: "),
    ("recipes.yaml", "mine.methods.Mine", None, "mine.methods.Mine: None is not a block"),
    ("recipes.yaml", "mine.smallest", "--x", "mine.smallest: '--x' is not a list"),
    ("recipes.yaml", "mine.linear", DROP, "mine: linear missing"),
    ("plan.yaml", "tiers", [], "tiers: [] is not a block"),
    ("plan.yaml", "tiers.cifar10.runs.simsiam", None, "simsiam: None is not a block"),
    ("plan.yaml", "tiers.cifar10.runs.simsiam.hours", DROP, "simsiam: hours missing"),
    ("plan.yaml", "tiers.cifar10.runs.simsiam.hours", "1", "hours: '1' is not a number"),
    ("plan.yaml", "tiers.cifar10.runs.simsiam.recipe", 3, "recipe: 3 is not text"),
    ("plan.yaml", "tiers.cifar10.seeds", [0, "1"], "seeds.entry 2: '1' is not a whole"),
    ("plan.yaml", "tiers.cifar10.seeds", [0, 0], "seeds: "),
    ("plan.yaml", "tiers.cifar10.evaluation", [], "evaluation is unknown; did you mean"),
    ("plan.yaml", "tiers.cifar5k.families.contrastive", 3, "contrastive: 3 is not a block"),
    ("claims.yaml", "tiers.0.short", DROP, "tiers.entry 1: short missing"),
    ("claims.yaml", "tiers.0.prefix", 7, "tiers.entry 1.prefix: 7 is not text"),
    ("claims.yaml", "tiers.1.prefix", "", "two tiers have the same prefix"),
    ("claims.yaml", "runs", ["a"], "runs: ['a'] is not a block"),
    ("claims.yaml", "claims.0.tried", None, "claims.entry 1.tried: None is not text"),
    ("claims.yaml", "claims.0.claim", "", "claims.entry 1.claim: "),
    ("claims.yaml", "scans.0.ours", "2048", "scans.entry 1.ours: '2048' is not a number"),
    ("published.yaml", "1.value", 173, "entry 2.value: 173 is greater"),
    ("published.yaml", "1.epochs", "many", "entry 2.epochs: 'many' is not a number or nothing"),
    ("published.yaml", "1.settings", [], "entry 2.settings: [] is not a block"),
    ("published.yaml", "1.gradee", "x", "entry 2: gradee is unknown; did you mean grade?"),
    ("figures.yaml", "0.file", "../a.png", "entry 1.file: "),
    ("figures.yaml", "0.caption", 3, "entry 1.caption: 3 is not text"),
    ("figures.yaml", "0.page", "index.html", "entry 1.page: 'index.html' is none of"),
    ("config.yaml", "epochs", "3", "epochs: '3' is not a number"),
    ("config.yaml", "batch_size", 0, "batch_size: 0 is less"),
    ("config.yaml", "settings", [], "settings: [] is not a block"),
    ("config.yaml", "recipe", "../x", "recipe: "),
    ("environment.json", "versions.torch", 2, "versions.torch: 2 is not text"),
    ("environment.json", "restarts", {}, "restarts: {} is not a list"),
    ("environment.json", "steps", DROP, "does not say the steps"),
    ("environment.json", "devices.ranks", 0, "devices.ranks: 0 is less"),
    ("results.json", "knn", "0.5", "knn: '0.5' is not a number or nothing"),
    ("results.json", "knn", 50, "knn: 50 is greater"),
    ("results.json", "hours", DROP, "hours missing"),
    ("packed.json", "splits.train.classes", "a", "classes: 'a' is not a list"),
    ("packed.json", "splits.train.shards", {"../x": 1}, "shards: "),
    ("packed.json", "splits.train.images", 0, "images: 0 is less"),
    ("packed.json", "splits", DROP, "splits missing"),
    ("runs.json", "runs.0.flags", "x", "runs.entry 1.flags: 'x' is not a list"),
    ("runs.json", "submissions.0.jobs.a", 7, "jobs.a: 7 is not text"),
    ("runs.json", "submissions.0.cluster", "aws", "cluster: 'aws' is none of slurm, local"),
    ("record.json", "settings", {"a": {"b": 1}}, "settings.a: "),
    ("record.json", "history", [{"epoch": [0, 1], "knn": [0.5]}], "history.0: its lists"),
    ("record.json", "history", [{"epoch": [None]}], "history.0.epoch.0: None"),
    ("record.json", "others", {"random encoder": 3}, "others.random encoder: 3"),
    ("record.json", "versions.torch", 2, "versions.torch: 2"),
    ("metrics.jsonl", "0.loss", DROP, "line 1: loss missing"),
    ("metrics.jsonl", "1.epoch", DROP, "line 2: epoch missing"),
    ("metrics.jsonl", "1.step", DROP, "line 2: step missing"),
    ("metrics.jsonl", "1.kind", "batch", "line 2: kind: 'batch' is none of step, epoch"),
    ("metrics.jsonl", "1.knn", None, "line 2: knn: None is not a number"),
    ("metrics.jsonl", "1.lr", [0.1], "line 2: lr: [0.1] is not a number"),
    ("metrics.jsonl", "0", [], "line 1: must hold"),
    ("a.0.jsonl", "0.event", DROP, "line 1: event missing"),
    ("a.0.jsonl", "0.code", DROP, "line 1: code missing"),
    ("a.0.jsonl", "0.attempt", "1", "line 1: attempt: '1' is not a whole number"),
]


@pytest.mark.parametrize(("name", "place", "new", "said"), WRONG)
def test_a_wrong_value_is_named_with_its_place(name, place, new, said, tmp_path):
    value = changed(READERS[name][0], place, new)
    assert said in refused(written(tmp_path / name, value))


def test_the_same_wrong_value_is_found_after_a_thousand_good_lines(tmp_path):
    lines = [STEP | {"step": step} for step in range(1000)]
    path = written(tmp_path / "metrics.jsonl", [*lines, STEP | {"lr": "0.1"}])
    assert "line 1001: lr: '0.1' is not a number" in refused(path)


@pytest.mark.parametrize("tail", [b'{"kind": "st', b"\xff\x00", bytes(50)])
def test_what_a_crash_leaves_at_the_end_of_the_metrics_is_cut(tail, tmp_path):
    path = written(tmp_path / "metrics.jsonl", [STEP, EPOCH])
    with open(path, "ab") as file:
        file.write(tail)
    assert metrics.cut(path, 1) == [STEP, EPOCH]
    assert metrics.read(path) == [STEP, EPOCH] and path.read_bytes().endswith(b"}\n")


def test_a_line_damaged_in_the_middle_costs_no_line_after_it(tmp_path):
    path = written(tmp_path / "metrics.jsonl", [STEP, STEP | {"step": 2}, STEP | {"step": 3}])
    path.write_text(path.read_text().replace('"step": 2,', '"step" 2,'))
    before = path.read_bytes()
    with pytest.raises(UserError, match="line 2 is not JSON"):
        metrics.cut(path, 2)
    assert path.read_bytes() == before


def test_notes_that_are_being_written_or_damaged_do_not_end_a_job(tmp_path):
    path = written(tmp_path / "a.0.jsonl", [NOTE])
    with open(path, "a") as file:
        file.write('{"time": 2')
    assert task.read_notes(tmp_path, "a") == [NOTE]
    written(tmp_path / "a.1.jsonl", [{"event": "end"}])
    one = task.Task("a", "x.py", [], "code", str(tmp_path))
    one.rank = 0
    assert one.failure_elsewhere() is None
    assert task.first_failure([NOTE], 0) == "rank 0 on n: exit code 1 without a word"


def test_a_metrics_line_of_another_version_does_not_stop_the_mean():
    lines = [{"images_per_second": 10.0, "data_wait": 0.5}, {"images_per_second": 0.0}]
    assert metrics.means(lines)["images_per_second"] == 10.0


def test_damaged_starts_are_kept_aside(tmp_path):
    for content in ('{"restarts": 3}', '{"a": 1, "a": 1}'):
        (tmp_path / environment.NAME).write_text(content)
        environment.note_start(tmp_path, {"started": "now"})
        assert (tmp_path / "environment.damaged.json").read_text() == content


def test_a_figure_of_no_tier_is_one_line(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for name in ("mars", ""):
        figure = {"file": "a.png", "caption": "x", "command": f"python results/curves.py {name}"}
        with pytest.raises(UserError, match="is no tier of"):
            curves.stale(golden_set.join([], [figure]), tmp_path)
    figure["command"] = "python results/curves.py photos 'it"
    assert curves.stale(golden_set.join([], [figure]), tmp_path)  # no picture: drawn again


# -- flags -----------------------------------------------------------------------------------------

LONG = "a" * 5000


@pytest.mark.parametrize("path", ["~no-such-user/x", LONG, f"{LONG[:300]}/x", "a\0b"])
def test_a_path_that_cannot_be_is_one_line(path):
    choose = functools.partial(folder.choose, resume="auto")
    for read in (documents.expanded, choose, submission.script_path):
        with pytest.raises(UserError) as error:
            read(path)
        assert len(str(error.value)) < 300
    with pytest.raises(UserError):
        documents.opened(path)


def test_a_path_is_what_it_was(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(documents.expanded("~/x")) == "/home/me/x"
    assert str(documents.expanded("a/ b")) == "a/ b"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--image-size", "1000000"], "--image-size 1000000: must be at most 4096"),
        (["--queue-size", str(10**12)], "--queue-size 1000000000000 --output-dim .* GB at least"),
        (["--queue-size", "1" + "0" * 25], "--queue-size 10*: must be below"),
        (["--batch-size", str(10**12)], "--image-size 32: .* GB at least"),
        (["--seed", "9" * 5000], "."),
        (["--epochs", "9" * 5000], "."),
        (["--workers", "1000000"], "--workers 1000000: must be -1 to 1024"),
    ],
)
def test_sizes_beyond_any_machine_are_one_line(flags, said):
    with pytest.raises(UserError, match=said):
        config = parse(snclr.Config, snclr.PRESETS, ["--dataset", "photos", *flags], snclr.resolve)
        check_memory(config, 1)


@pytest.mark.parametrize("text", ["9" * 5000 + "m", "9" * 5000, f"{'9' * 5000}-1:0:0"])
def test_a_time_of_5000_digits_is_one_line(text):
    with pytest.raises(UserError, match="--time"):
        resources.minutes(text)


@pytest.mark.parametrize(("name", "value"), [("mem_gb", 1e308), ("nodes", 10**30), ("nodes", 0)])
def test_resources_beyond_any_cluster_are_one_line(name, value):
    with pytest.raises(UserError, match="must be above 0 and below"):
        resources.resources_of(("the command line", {name: value}))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENAMETOOLONG, "File name too long", LONG),
        OSError(errno.EISDIR, "Is a directory", "/tmp"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        UserError(LONG),
    ],
)
def test_what_only_the_system_finds_is_one_short_line(error, capsys):
    def main():
        raise error

    assert command(main) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 2100
