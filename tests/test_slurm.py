"""Launching without a Slurm: what is refused, snapshots, submitit's local and debug executors."""

import dataclasses
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMALL, environment, interruptible, only_error
from slurm_repo import START, call, command, commit_all, git, last_step, make_repository, wait_until

from common import cards
from common.errors import UserError
from common.run.ranks import ranks_from_slurm
from recipes import snclr
from slurm import check, resources, snapshot, status, sweep, task
from slurm.ledger import Job, read_ledger
from slurm.submission import sbatch_script, submit_to_slurm

SNCLR = ["recipes/snclr.py", *SMALL, "--queue-size", "128"]
LONG = pytest.mark.long
LOCAL = ["--local", "--gpus-per-node", "0"]


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """Makes a repository that no test changes."""
    return make_repository(tmp_path_factory.mktemp("repository") / "code")


@pytest.fixture
def repository(tmp_path) -> Path:
    """Makes a repository of a test's own."""
    return make_repository(tmp_path / "code")


# -- what is checked before anything is submitted -------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        pytest.param(
            ["--", "recipes/snclr.py", "--epoch", "3"],
            "unknown flag --epoch; did you mean --epochs?",
            marks=LONG,
        ),
        (["--", "recipes/snlcr.py"], "no such script"),
        (["--", "/etc/hostname"], "no such script"),
        (["--"], "-- script.py and its own flags"),
        pytest.param(
            ["--local", "--nodes", "2", "--", *SNCLR],
            "--local has one machine",
            marks=pytest.mark.long,
        ),
        (["--nodse", "3", "--", *SNCLR], "unrecognized arguments: --nodse"),
        (["--nodes", "0", "--", *SNCLR], "--nodes 0: must be above 0"),
        pytest.param(
            ["--nodes", "5", "--gpus-per-node", "8", "--", *SNCLR],
            "does not divide over 40 ranks",
            marks=pytest.mark.long,
        ),
        (["--gpus-per-node", "2", "--tasks-per-node", "3", "--", *SNCLR], "each GPU gets one task"),
        (["--time", "soon", "--", *SNCLR], "--time soon"),
        (["--cluster", "nowhere.yaml", "--", *SNCLR], "nowhere.yaml"),
        pytest.param(
            ["--name", "a/b", "--", *SNCLR], "is no name for a folder", marks=pytest.mark.long
        ),
        pytest.param(
            ["--", "eval/parses/run.py", "--backbnoe", "x"],
            "not understood",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_mistake_is_one_line_before_submission(flags, expected, code, tmp_path):
    assert expected in only_error(call(code, tmp_path, "launch.py", *flags))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        ("recipes/nnclr.py", ["--projector-layers", "0"], "--projector-layers 0: must be above 0"),
        ("recipes/snclr.py", ["--batch-size", "many"], "--batch-size"),
        ("recipes/snclr.py", ["--resume", "never"], "name a new folder with --output"),
        ("recipes/snclr.py", ["--neighbours", "9", "--queue-size", "8"], "more than --queue-size"),
        ("eval/linear_probe/run.py", ["--protocl", "snclr"], "did you mean --protocol?"),
        ("eval/semi_supervised/run.py", ["--percent", "2"], "percent"),
        ("recipes/byol_gsg.py", ["--batch-size", "10"], "does not divide over 4 ranks"),
        ("recipes/byol_gsg.py", ["--batch-size", "4"], "each of 4 ranks needs at least 2 images"),
    ],
)
def test_the_check_is_the_recipes_own(script, flags, expected):
    with pytest.raises(UserError, match=expected):
        check.facts_of(script, ["--dataset", "photos", *flags], 4)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--datasets", "flowers102"], r"--datasets flowers102: none of .*did you mean flowers\?"),
        (["--dataset", "pets"], "unknown flag --dataset; did you mean --datasets"),
        (["--splits", "gsb"], "--splits"),
        (["--seed", "-1"], "--seed -1"),
    ],
)
def test_the_flags_and_data_sets_of_transfer_are_checked(flags, expected):
    flags = ["--backbone", "runs/x", "--root", "data", *flags]
    with pytest.raises(UserError, match=expected):
        check.facts_of("eval/transfer/run.py", flags, 1)


SCRIPTS = [p for folder in ("recipes", "eval") for p in (ROOT / folder).rglob("*.py")]
SCRIPTS = [p for p in SCRIPTS if '__name__ == "__main__"' in p.read_text()]


@pytest.mark.parametrize("script", sorted(str(p.relative_to(ROOT)) for p in SCRIPTS))
def test_every_script_is_known_to_the_check(script):
    assert "\ndef parse_arguments(" in (ROOT / script).read_text()


def test_the_check_says_what_a_run_will_note(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "photos", "--no-gsg", "--lr", "0.5", "--epochs", "3"]
    facts = check.facts_of("recipes/simsiam_gsg.py", flags, 1)
    noted = facts["config"]
    assert noted["method"] == "SimSiam" and noted["settings"] == {"lr": 0.5}
    assert (noted["recipe"], noted["plan"], noted["epochs"]) == ("simsiam_gsg", None, 3)
    assert facts["name"] == "simsiam_gsg-photos-tiny-0" and facts["flags"] == flags


def test_a_flag_of_the_plan_that_the_script_lacks_is_left_out():
    optional = {"gsg": ["--no-gsg"], "queue-size": ["--queue-size", "9"]}
    facts = check.facts_of("recipes/simsiam_gsg.py", ["--dataset", "photos"], None, optional)
    assert facts["flags"] == ["--dataset", "photos", "--no-gsg"]


@pytest.mark.long
def test_images_that_are_not_here_are_a_warning_and_no_mistake(code, tmp_path):
    flags = ["--dry-run", "--", "recipes/snclr.py", "--dataset", "cifar10", "--data"]
    done = call(code, tmp_path, "launch.py", *flags, "no/such")
    assert done.returncode == 0, done.stderr
    assert "warning: --data no/such does not exist on this machine" in done.stdout
    flags = ["--dataset", "cifar10", "--data"]
    for more in ([str(tmp_path)], ["no/such", "--download"]):
        assert check.facts_of("recipes/snclr.py", [*flags, *more], 1)["absent"] == []


def test_a_folder_of_another_run_is_refused_before_submission(tmp_path):
    flags = ["--dataset", "photos", "--output", str(tmp_path)]
    saved = {"recipe": "snclr", **vars(snclr.parse_arguments(flags))}
    path = tmp_path / "config.yaml"
    # the machine that runs it decides on bf16, not the one that submits it
    path.write_text(yaml.safe_dump(saved | {"precision": "bf16", "neighbour_free_epochs": 0.5}))
    assert check.facts_of("recipes/snclr.py", flags, 1)["folder"] == str(tmp_path)
    for change, expected in (
        ({"temperature": 0.5}, "temperature was 0.5, is 0.2"),
        ({"recipe": "nnclr"}, "recipe was nnclr, is snclr"),
    ):
        path.write_text(yaml.safe_dump(saved | {"neighbour_free_epochs": 0.5} | change))
        with pytest.raises(UserError, match=expected):
            check.facts_of("recipes/snclr.py", flags, 1)


@pytest.mark.long
def test_scripts_without_a_parser_of_their_own_are_said_to_be_unchecked(code, tmp_path):
    flags = ["--dry-run", "--", "eval/waits/run.py", "--any", "1"]
    done = call(code, tmp_path, "launch.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "the flags of eval/waits/run.py cannot be checked" in done.stdout
    done = call(
        code, tmp_path, "launch.py", "--dry-run", "--", "eval/parses/run.py", "--backbone=a"
    )
    assert done.returncode == 0 and "cannot be checked" not in done.stdout, done.stderr


def test_submitting_imports_no_recipe_and_nothing_heavy():
    code = "import sys, slurm.launch, slurm.sweep, slurm.status; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "submitit", "recipes", "wandb", "matplotlib"} & {*done.stdout.split()}


# -- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72h", 4320),
        ("90m", 90),
        ("2d", 2880),
        ("1d12h", 2160),
        ("90s", 2),
        ("45", 45),
        ("12:30:00", 750),
        ("10:30", 11),
        ("1-6", 1800),
        ("2-01:30:00", 2970),
    ],
)
def test_time_limits(text, expected):
    assert resources.minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0h", "h", "5x", "-3h", "1:2:3:4"])
def test_time_limits_that_are_none(text):
    with pytest.raises(UserError, match="--time"):
        resources.minutes(text)


def test_a_time_limit_too_short_for_the_signal_is_refused_with_the_sum():
    with pytest.raises(UserError) as error:
        resources.check_time(resources.Resources(time="6m", signal_delay=300))
    assert "360 s - 300 s of --signal-delay - 60 s that Slurm may signal early = 0 s" in str(
        error.value
    )
    assert "--time 7m or more, or --signal-delay 270 or less" in str(error.value)
    resources.check_time(resources.Resources(time="7m", signal_delay=300))
    resources.check_time(resources.Resources(time="6m", signal_delay=270))
    with pytest.raises(UserError):
        resources.check_time(resources.Resources(time="6m", signal_delay=271))


# -- the cluster file and the script --------------------------------------------------------------


def test_flags_win_over_the_sweep_over_the_cluster_file_over_defaults():
    layers = [{"nodes": 2, "time": "1h", "gpus-per-node": 8}, {"time": "2h", "nodes": 3}]
    got = resources.resources_of(*(("here", layer) for layer in layers), ("flags", {"nodes": 4}))
    assert (got.nodes, got.time, got.gpus_per_node, got.max_timeouts) == (4, "2h", 8, 100)
    assert got.ranks == 32


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"partitoin": "gpu"}, "did you mean partition?"),
        ({"nodes": "two"}, "nodes 'two' is not a whole number"),
        ({"nodes": True}, "nodes True is not a whole number"),
        ({"time": 45000}, "write it as text with its unit"),  # YAML's reading of 12:30:00
        ({"environment": "module load cuda"}, "is not a list of shell lines"),
        ({"environment": [1]}, "is not a list of shell lines"),
        ({"options": ["exclusive"]}, "is not a block"),
        ({"mem_gb": "much"}, "mem_gb 'much' is not a number"),
        *(
            ({"gpus_per_node": bad}, f"gpus_per_node {bad!r} is not a count, as 8, or TYPE:COUNT")
            for bad in ("a100", "a100:", "gpu:a100:4", "4:a100", "-1", "", "a100:x")
        ),
        ({"gpus_per_node": -1}, "--gpus-per-node: must not be negative"),
        ({"gpus_per_node": "a100:4", "tasks_per_node": 8}, "each GPU gets one task"),
        ({"options": {"gres": "gpu:a100:4"}}, "say it as gpus_per_node: TYPE:COUNT"),
        ({"options": {"gpus": 8}}, "options: {gpus-per-node: null, gpus: 8}"),
        ({"options": {"gpus-per-node": "a100:4"}}, "say it as gpus_per_node: TYPE:COUNT"),
        ({"options": {"gpus_per_task": 1}}, "say it as gpus_per_node: TYPE:COUNT"),
        ({"options": {"nodes": 2}}, "give nodes beside `options`"),
        ({"options": {"ntasks-per-node": 2}}, "give tasks_per_node beside `options`"),
        ({"options": {"time": "1h"}}, "give time beside `options`"),
        ({"options": {"cpus_per_task": 6}}, "give cpus_per_task beside `options`"),
        ({"options": {"exclude": ["a", "b"]}}, "write it as sbatch takes it, in one text"),
        ({"options": {"comment": "a\nscancel 1"}}, "comment 'a\\nscancel 1' has a line break"),
        ({"options": {"comment\nx": 1}}, "has a line break"),
        ({"options": {"a b": 1}}, "'a b' is no name of an sbatch option"),
        *(
            ({name: "x\ny"}, f"{name} 'x\\ny' has a line break")
            for name in ("partition", "account", "qos", "constraint", "scratch", "time")
        ),
    ],
)
def test_a_cluster_file_with_a_mistake(values, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        resources.resources_of(("cluster.yaml", values))


def test_a_later_layer_can_set_what_an_earlier_one_says_to_nothing(tmp_path):
    cluster = {"partition": "gpu", "qos": "high", "time": "1h", "cpus_per_task": 4}
    cluster["options"] = {"exclude": "node7", "mail-type": "FAIL"}
    sweep_ = {"qos": None, "time": None, "options": {"exclude": None}}
    got = resources.resources_of(("a", cluster), ("b", sweep_), ("flags", {"partition": ""}))
    assert (got.partition, got.qos, got.time, got.cpus_per_task) == (None, None, None, 4)
    script = sbatch_script("name", tmp_path, 1, got, None)
    assert "--mail-type=FAIL" in script and "--exclude" not in script
    assert "--partition" not in script and "--qos" not in script


def test_an_option_of_submitits_own_stands_there_once(tmp_path):
    for spelt in ("job-name", "job_name"):
        lines = script_lines(tmp_path, options={spelt: "mine"})
        assert [text for text in lines if "#SBATCH --job" in text] == ["#SBATCH --job-name=mine"]


def script_lines(tmp_path: Path, count: int = 1, **values) -> list[str]:
    """Returns the sbatch script of `count` runs with these resources."""
    asked = resources.resources_of(("cluster.yaml", values))
    return sbatch_script("name", tmp_path, count, asked, None).splitlines()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"gpus_per_node": "a100:4"}, "#SBATCH --gpus-per-node=a100:4"),
        ({"gpus_per_node": "4"}, "#SBATCH --gpus-per-node=4"),
        (
            {"gpus_per_node": 4, "options": {"gpus-per-node": None, "gres": "gpu:a100:4"}},
            "#SBATCH --gres=gpu:a100:4",
        ),
    ],
)
def test_gpus_with_a_type_are_a_task_each(values, line, tmp_path):
    lines = script_lines(tmp_path, **values)
    assert [text for text in lines if "--gpus" in text or "--gres" in text] == [line]
    assert "#SBATCH --ntasks-per-node=4" in lines


@pytest.mark.parametrize("count", [1, 3])
def test_any_option_can_be_set_to_nothing(count, tmp_path):
    names = [
        text.split("--")[1].split("=")[0]
        for text in script_lines(tmp_path, count)[3:]
        if text.startswith("#SBATCH")
    ]
    assert {"wckey", "requeue", "signal", "open-mode", "gpus-per-node", "time"} <= {*names}
    for name in names:
        for nothing in (None, False):
            for spelt in {name, name.replace("-", "_")}:
                lines = script_lines(tmp_path, count, options={spelt: nothing})
                assert not [text for text in lines if text.startswith(f"#SBATCH --{name}")], name
                assert "None" not in "".join(lines)


def test_an_array_too_is_sent_without_the_options_that_are_nothing(code, tmp_path, monkeypatch):
    """The sbatch here keeps what it is given, and none of these options is in it."""
    fake(tmp_path / "bin", "srun", [])
    fake(tmp_path / "bin", "sbatch", ["Submitted batch job 77"])
    keep = f'cp "$1" {tmp_path}/sent\n'
    path = tmp_path / "bin" / "sbatch"
    path.write_text(path.read_text().replace("cat <<", f"{keep}cat <<"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    asked = resources.resources_of(("here", {"options": {"wckey": None, "requeue": None}}))
    tasks = [task.Task(name, "x.py", [], str(code), str(tmp_path / "notes")) for name in "ab"]
    assert submit_to_slurm("name", tmp_path / "own", tasks, asked, None) == ["77_0", "77_1"]
    sent = (tmp_path / "sent").read_text()
    assert "--array=0-1" in sent and "wckey" not in sent and "requeue" not in sent


def test_the_number_of_a_grids_runs_is_said_before_they_are_made(tmp_path):
    axis = [*range(100)]
    grid = {name: axis for name in ("seed", "epochs", "batch_size")}
    text = yaml.safe_dump({"script": "recipes/snclr.py", "grid": grid})
    with pytest.raises(UserError, match="1,000,000 runs, more than the 1,001"):
        sweep.jobs_of(spec_of(tmp_path, text))


@pytest.mark.long
def test_the_example_cluster_file_and_the_script_it_gives(code, tmp_path):
    example = code / "slurm" / "cluster.example.yaml"
    wide = ["--nodes", "4", "--time", "72h", "--partition", "X", "--scratch", tmp_path / "scratch"]
    flags = ["--cluster", example, *wide, "--dry-run", "--"]
    script = ["recipes/snclr.py", "--arch", "vit_small", "--epochs", "300", "--data", "/data"]
    done = call(code, tmp_path, "launch.py", *flags, *script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --mem=491520MB",
        "#SBATCH --time=4320",
        "#SBATCH --partition=X",
        "#SBATCH --account=my-project",
        "#SBATCH --constraint=a100",
        "#SBATCH --signal=USR2@300",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --exclude=node013",
        "#SBATCH --mail-type=FAIL",
        "module load cuda/12.8",
    ):
        assert line in lines, done.stdout
    run = lines[-2] if not lines[-1] else lines[-1]
    assert run.startswith("srun ") and "--kill-on-bad-exit=1 --wait=0 --cpus-per-task=12" in run
    folder = tmp_path / "scratch" / "snclr-imagenet-vit_small-0" / "1"
    assert any(line.startswith(f"export PYTHONPATH={folder / 'code'}") for line in lines)
    assert lines.index("module load cuda/12.8") < lines.index(
        next(line for line in lines if "PYTHONSAFEPATH" in line)
    )
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)
    assert not [*tmp_path.iterdir()]  # a dry run leaves nothing


@pytest.mark.long
def test_no_slurm_on_this_machine_is_one_line(code, tmp_path):
    bare = environment(PYTHONPATH=str(code), PATH=only_git(tmp_path))
    words = command(code, "launch.py", "--time", "1h", "--", *SNCLR)
    done = subprocess.run(words, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert "no srun on this machine" in only_error(done)
    assert not (tmp_path / "runs" / "slurm" / "snclr-photos-tiny-0").exists()


def only_git(folder: Path) -> str:
    """Returns a PATH with git and nothing else."""
    own = folder / "bin"
    own.mkdir()
    (own / "git").symlink_to(subprocess.check_output(["which", "git"], text=True).strip())
    return str(own)


# -- sweeps ---------------------------------------------------------------------------------------


def spec_of(folder: Path, text: str) -> dict:
    (folder / "sweep.yaml").write_text(text)
    return sweep.read_spec(folder / "sweep.yaml")


def test_a_grid_times_a_list_with_names_folders_and_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = sweep.jobs_of(
        spec_of(
            tmp_path,
            "name: abl\noutput: out\nflags: {epochs: 5, data: '/d/{name}', knn-every: 2}\n"
            "grid:\n  script: [recipes/nnclr.py, recipes/snclr.py]\n  seed: [0, 1]\n"
            "runs: [{}, {name: big, queue_size: 9, exclude_self: false, knn_every: null}]\n",
        )
    )
    names = ["nnclr-seed0", "big-nnclr-seed0", "nnclr-seed1", "big-nnclr-seed1"]
    assert [job.name for job in jobs] == [*names, *(n.replace("nnclr", "snclr") for n in names)]
    assert jobs[0].script == "recipes/nnclr.py"
    assert jobs[0].flags == [
        *("--epochs", "5", "--data", "/d/nnclr-seed0", "--knn-every", "2", "--seed", "0"),
        *("--output", str(tmp_path / "out" / "nnclr-seed0")),
    ]
    assert jobs[5].flags == [
        *("--epochs", "5", "--data", "/d/big-snclr-seed0", "--seed", "0", "--queue-size", "9"),
        *("--no-exclude-self", "--output", str(tmp_path / "out" / "big-snclr-seed0")),
    ]
    assert len({job.folder for job in jobs}) == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("grids: {}", "grids is unknown; did you mean grid?"),
        ("grid: {seed: 3}", "seed must be a list"),
        ("grid: {seed: []}", "seed must be a list"),
        ("script: recipes/snclr.py\nruns: [{seed: 0}, {seed: 0}]", "several runs are called seed0"),
        ("grid: {seed: [0]}", "no script"),
        ("grid: {lr-batch: [0]}\nruns: [{lr_batch: 9}]", "lr_batch is in grid and in a run"),
        ("script: recipes/snclr.py\nrun: 3", "run is unknown"),
        ("script: recipes/snclr.py\nruns: 3", "runs: 3 is not a list"),
        ("name: a b\nscript: recipes/snclr.py", "is no name for a folder"),
        ("script: recipes/snlcr.py", "no such script"),
        ("script: eval/linear_probe/none.py", "no such script"),
        ("grid: {backbone: {finished: 'nowhere/*'}}", "no finished run in nowhere/*"),
        ("grid: {backbone: {unfinished: 'nowhere/*'}}", "must be a list, or {finished"),
        ("- 1", "must hold 'key: value' lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_sweep_with_a_mistake(text, expected, tmp_path):
    with pytest.raises(UserError, match=re.escape(expected)):
        sweep.jobs_of(spec_of(tmp_path, text))


@pytest.mark.long
def test_a_wrong_flag_in_a_sweep_is_found_before_submission(code, tmp_path):
    (tmp_path / "s.yaml").write_text(
        "script: recipes/snclr.py\nflags: {dataset: photos}\nruns: [{}, {name: b, neighbors: 3}]\n"
    )
    error = only_error(call(code, tmp_path, "sweep.py", "s.yaml"))
    assert "unknown flag --neighbors; did you mean --neighbours?" in error
    assert [p.name for p in tmp_path.iterdir()] == ["s.yaml"]


def finished_run(folder: Path, step: int = 30, last: int = 30) -> Path:
    folder.mkdir(parents=True)
    results = {"step": step, "backbone_sha256": hashlib.sha256(b"").hexdigest()}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "environment.json").write_text(
        json.dumps({"steps": {"last": 1}, "restarts": [{"steps": {"last": last}}]})
    )
    (folder / "backbone.safetensors").write_text("")
    return folder


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "slurm/examples").glob("*")))
def test_the_examples(example, tmp_path, monkeypatch):
    """Each is read, and all its flags and values are checked by the scripts' own parsers."""
    monkeypatch.chdir(tmp_path)
    for name in ("snclr-seed0", "nnclr-seed0"):
        finished_run(tmp_path / "runs" / "seeds" / name)
    finished_run(tmp_path / "runs" / "seeds" / "unfinished", step=10)
    jobs = sweep.jobs_of(sweep.read_spec(ROOT / "slurm" / "examples" / example))
    seeds = 3 * len(cards.load())
    counts = {"seeds": seeds, "snclr_neighbours": 21, "snclr_queue": 15, "snclr_positiveness": 21}
    assert len(jobs) == {**counts, "evaluate": 2 * 15, "photos": 4}[Path(example).stem]
    if example == "evaluate.yaml":
        scripts = {"linear_probe", "semi_supervised", "transfer"}
        assert {job.script for job in jobs} == {f"eval/{name}/run.py" for name in scripts}
        assert sum(job.script == "eval/transfer/run.py" for job in jobs) == 2 * 12
        assert all("unfinished" not in " ".join(job.flags) for job in jobs)
    for job in jobs:
        facts = check.facts_of(job.script, job.flags, 1)
        assert facts["checked"] and facts["folder"] == job.folder, facts
        if "transfer" in job.script:
            assert facts["absent"] == ["--root data/transfer"]


# -- the snapshot ---------------------------------------------------------------------------------


def test_a_dirty_tree_is_refused_and_a_clean_one_is_its_commit(repository, tmp_path):
    head = git(repository, "rev-parse", "HEAD")
    (repository / "runs").mkdir()
    (repository / "runs" / "log").write_text("no change of the code\n")
    assert snapshot.take(repository, tmp_path / "clean") == head
    assert (tmp_path / "clean" / ".commit").read_text() == head + "\n"
    assert (tmp_path / "clean" / "recipes" / "snclr.py").exists()
    assert not (tmp_path / "clean" / "runs").exists()

    (repository / "recipes" / "new.py").write_text("NEW = 1\n")
    (repository / "common" / "knn.py").write_text("CHANGED = 1\n")
    (repository / "recipes" / "nnclr.py").unlink()
    (repository / "__pycache__").mkdir()
    (repository / "__pycache__" / "ignored").write_text("")
    with pytest.raises(UserError, match=r"uncommitted changes .*--allow-dirty"):
        snapshot.take(repository, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    assert snapshot.take(repository, tmp_path / "dirty", allow_dirty=True) == f"{head} dirty"
    assert (tmp_path / "dirty" / "recipes" / "new.py").read_text() == "NEW = 1\n"
    assert (tmp_path / "dirty" / "common" / "knn.py").read_text() == "CHANGED = 1\n"
    assert not (tmp_path / "dirty" / "recipes" / "nnclr.py").exists()
    assert not (tmp_path / "dirty" / "__pycache__").exists()


def test_a_folder_without_git_and_a_tree_full_of_data(repository, tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="no usable git checkout"):
        snapshot.take(tmp_path / "plain", tmp_path / "a")
    (repository / "weights").write_bytes(b"0" * 2_000_000)
    monkeypatch.setattr(snapshot, "LARGEST", 1_000_000)
    with pytest.raises(UserError, match=r"largest: weights.*\.gitignore"):
        snapshot.take(repository, tmp_path / "b", allow_dirty=True)


@pytest.mark.long
def test_a_snapshot_within_a_checkout_knows_its_own_commit(repository):
    """It lies in runs/slurm/ of the checkout, whose HEAD moves on."""
    line = snapshot.take(repository, repository / "runs" / "code")
    (repository / "NEW").write_text("")
    assert commit_all(repository) != line
    code = "from common.run import environment; print(*environment.commit(), environment.__file__)"
    for where, expected in (
        ("runs/code", f"{line} False"),
        (".", git(repository, "rev-parse", "HEAD")),
    ):
        env = environment(PYTHONPATH=str(repository / where), PYTHONSAFEPATH="1")
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(expected), done.stdout
        assert str((repository / where).resolve()) in done.stdout


# -- the local executor ---------------------------------------------------------------------------


@pytest.mark.long
def test_a_local_run_takes_the_snapshots_packages(code):
    flags = [*LOCAL, "--name", "where", "--", "eval/where/run.py", "--a", "b c"]
    done = call(code, code, "launch.py", *flags)
    assert done.returncode == 0, done.stderr
    folder = code / "runs" / "slurm" / "where" / "1"
    assert f"common is {folder / 'code' / 'common' / '__init__.py'}" in done.stdout
    assert "flags are ['--a', 'b c']" in done.stdout
    line = call(code, code, "status.py", "where").stdout.splitlines()[1]
    assert re.search(r"^where +\d+ +FINISHED .*flags are", line), line


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_local_run_of_two_tasks_is_stopped_and_continued(number, code, tmp_path):
    """Ctrl-C, or the end of its terminal, saves and ends with 75; the same command continues, as
    status.py shows.
    """
    flags = [*LOCAL, "--tasks-per-node", "2", "--", *SNCLR, "--max-steps", "120"]
    process = subprocess.Popen(
        command(code, "launch.py", *flags),
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(code)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )
    folder, scratch = tmp_path / "runs" / "snclr" / "photos-tiny-0", tmp_path / "runs" / "slurm"
    wait_until(lambda: [*scratch.glob("*/runs.json")], 60, scratch)
    error = only_error(call(code, tmp_path, "launch.py", *flags))
    assert "is being written by job" in error and "RUNNING" in error
    wait_until(lambda: last_step(folder) >= 1, START, scratch)
    os.killpg(process.pid, number)  # as a terminal does
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    stopped = re.search(r"stopped by SIG(?:INT|TERM) at step (\d+) of 120, saved", output)
    assert stopped, output
    line = call(code, tmp_path, "status.py").stdout.splitlines()[1]
    assert "STOPPED" in line, line
    again = call(code, tmp_path, "launch.py", *flags)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"continues from step {stopped[1]} of 120" in again.stdout
    assert json.loads((folder / "results.json").read_text())["step"] == 120
    start = json.loads((folder / "environment.json").read_text())
    assert start["devices"]["ranks"] == 2 and len(start["restarts"]) == 1


@pytest.mark.long
def test_a_rank_that_fails_ends_a_local_job_with_its_own_error(code, tmp_path):
    began = time.monotonic()
    flags = [*LOCAL, "--tasks-per-node", "2", "--name", "waits", "--", "eval/waits/run.py"]
    done = call(code, tmp_path, "launch.py", *flags)
    assert time.monotonic() - began < 60
    assert done.returncode == 3, done.stderr
    expected = r"error: rank 0 of 2 .*another rank ended: rank 1 on \S+: rank 1 cannot go on"
    assert re.search(expected, done.stdout), done.stdout
    line = call(code, tmp_path, "status.py").stdout.splitlines()[1]
    assert re.search(r"FAILED .* rank 1 on \S+: rank 1 cannot go on$", line), line


@pytest.mark.long
def test_a_local_sweep_runs_some_at_a_time(code, tmp_path):
    (tmp_path / "s.yaml").write_text(
        "script: eval/parses/run.py\nslurm: {gpus_per_node: 0}\ngrid: {backbone: [a, b, c]}\n"
    )
    done = call(code, tmp_path, "sweep.py", "s.yaml", "--local", "--max-parallel", "2")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if "backbone is" in line]
    assert sorted(said) == [f"{name}: backbone is {name}" for name in "abc"]
    again = call(code, tmp_path, "sweep.py", "s.yaml", "--local")
    assert "all 3 runs are finished" in again.stdout, again.stderr


def local_executor(folder: Path, tasks: int, minutes: float, timeouts: int = 3):
    import submitit

    executor = submitit.LocalExecutor(folder / "jobs", max_num_timeout=timeouts)
    executor.update_parameters(timeout_min=minutes, signal_delay_s=8, tasks_per_node=tasks)
    return executor


def stopping_task(code: Path, folder: Path, seconds: str = "600") -> task.Task:
    file = folder / "attempts"
    file.write_text("")
    flags = [str(file), seconds]
    return task.Task("stops", "eval/stops/run.py", flags, str(code), str(folder / "notes"))


@pytest.mark.long
def test_at_the_time_limit_a_job_stops_is_requeued_and_continues(code, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(code))
    executor = local_executor(tmp_path, tasks=1, minutes=12 / 60)
    job = executor.submit(stopping_task(code, tmp_path))
    assert job.results() == [0]
    lines = (tmp_path / "attempts").read_text().splitlines()
    assert lines == ["started", "stopped by SIGUSR2", "started"]
    notes = task.read_notes(tmp_path / "notes", "stops")
    assert [(n["event"], n["attempt"]) for n in notes] == [
        *(("start", 0), ("signal", 0), ("requeue", 0), ("start", 1), ("end", 1))
    ]


@pytest.mark.long
def test_a_job_that_may_not_be_requeued_again_ends_with_the_reason(code, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(code))
    job = local_executor(tmp_path, 1, 12 / 60, timeouts=0).submit(stopping_task(code, tmp_path))
    assert "timed-out too many times" in str(job.exception())
    last = task.read_notes(tmp_path / "notes", "stops")[-1]
    assert last["event"] == "end" and "timed-out too many times" in last["error"]


def test_the_debug_executor_runs_a_task_in_this_process(code, tmp_path):
    import submitit

    before = signal.getsignal(signal.SIGTERM)
    executor = submitit.DebugExecutor(tmp_path / "jobs")
    done = task.Task("stops", "eval/stops/run.py", [], str(code), str(tmp_path / "notes"))
    good = stopping_task(code, tmp_path, seconds="0")
    assert executor.submit(good).results() == [0]
    with pytest.raises(SystemExit) as ended:  # there is no file: the script has a traceback
        executor.submit(done).results()
    assert ended.value.code == 1
    assert "IndexError" in task.read_notes(tmp_path / "notes", "stops")[-1]["error"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_checkpoint_has_both_names_and_pickles_while_the_script_runs(code, tmp_path):
    """submitit 1.5.4 asks whether there is `checkpoint`, and calls the dunder if there is one."""
    import cloudpickle
    from submitit.core.utils import DelayedSubmission

    one = stopping_task(code, tmp_path)
    assert task.Task.checkpoint is task.Task.__submitit_checkpoint__
    again = DelayedSubmission(one)._checkpoint_function()
    assert again.function == dataclasses.replace(one, attempt=1) != one
    assert cloudpickle.loads(cloudpickle.dumps(again.function)) == again.function


@pytest.mark.parametrize(
    ("code_", "signalled", "error", "expected"),
    [
        (75, False, "", True),
        (-signal.SIGUSR2, True, "", True),  # while it was starting
        (-signal.SIGUSR2, False, "", False),
        (-signal.SIGKILL, True, "", False),
        (2, True, "error: cannot save: no space left", False),
        (2, True, "error: another rank ended, see its error", True),
        (2, False, "error: another rank ended, see its error", False),
        (0, True, "", False),
    ],
)
def test_what_counts_as_stopped(code_, signalled, error, expected, tmp_path):
    one = task.Task("a", "b", [], "c", str(tmp_path))
    one.rank, one.signalled, one.last_error = 0, signalled, error
    one.reader = threading.Thread(target=lambda: None)
    one.reader.start()
    assert one.has_stopped(code_) is expected


# -- ranks ----------------------------------------------------------------------------------------


def test_each_job_step_and_attempt_has_its_own_port(monkeypatch):
    ports = set()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "0")
    attempts = [(job, step, count) for job in ("7", "8") for step in "01" for count in "0123"]
    for job, step, count in attempts:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_STEP_ID", step)
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        ranks_from_slurm()
        ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == len(attempts) and all(20000 <= port < 32000 for port in ports)


def test_loader_workers_are_those_that_slurm_gave_the_task(monkeypatch):
    from common.data.loaders import default_workers

    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    assert default_workers(8) == 12
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "40")
    assert default_workers(8) == 16


# -- status ---------------------------------------------------------------------------------------


def fake(folder: Path, name: str, lines: list[str], code: int = 0) -> None:
    """Writes a command of Slurm's that prints these lines."""
    folder.mkdir(exist_ok=True)
    text = "\n".join(lines)
    (folder / name).write_text(f"#!/bin/sh\ncat <<'EOF'\n{text}\nEOF\nexit {code}\n")
    (folder / name).chmod(0o755)


def recorded(scratch: Path, runs: list[str], cluster: str = "slurm") -> tuple[Path, dict]:
    jobs = {name: f"50_{number}" for number, name in enumerate(runs)}
    record = {"name": "s", "runs": [vars(Job(n, "recipes/snclr.py", [])) for n in runs]}
    one = {"number": 1, "cluster": cluster, "jobs": jobs, "host": "elsewhere"}
    record["submissions"] = [one]
    (scratch / "s").mkdir(parents=True)
    (scratch / "s" / "runs.json").write_text(json.dumps(record))
    return scratch / "s", record


def test_status_says_where_logs_lie_and_how_a_job_is_ended(tmp_path, monkeypatch, capsys):
    fake(tmp_path / "bin", "squeue", ["50_0|RUNNING|None"])
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    folder, _ = recorded(tmp_path / "a", ["a", "b"])
    status.show(tmp_path / "a", "", 200)
    lines = capsys.readouterr().out.splitlines()
    assert f"logs of s: JOB_RANK_log.out in {folder}/1/jobs" in lines
    assert lines[-1].startswith("to end one: scancel JOB; it saves first")
    recorded(tmp_path / "b", ["a"], cluster="local")
    status.show(tmp_path / "b", "s", 200)
    assert "to end one: kill JOB;" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["status.py", "launch.py", "sweep.py"])
def test_without_the_environment_a_script_says_how_to_activate_it(script):
    """-S makes a python without any installed package, as the system's."""
    words = [sys.executable, "-S", "-E", str(ROOT / "slurm" / script)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: no module common: activate the environment first")
    assert ". .venv/bin/activate" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 0, "bash tests/slurm_node.sh start FOLDER"),
        (["help"], 0, "tests/test_slurm_real.py"),
        (["strat", "x"], 2, "no such command: strat x"),
        (["start"], 2, "start which? start FOLDER"),
    ],
)
def test_the_script_of_the_tests_slurm_explains_itself(words, code, said):
    line = ["bash", str(ROOT / "tests" / "slurm_node.sh"), *words]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert "set -euo" not in done.stdout + done.stderr  # its comment, and no more


def test_the_small_example_leaves_a_slow_machine_its_time():
    """Its 40 steps are a minute's work; 25 minutes are left before the signal."""
    spec = yaml.safe_load((ROOT / "slurm" / "examples" / "photos.yaml").read_text())
    assert spec["flags"]["max_steps"] == 40
    left = 60 * int(spec["slurm"]["time"].rstrip("m")) - resources.Resources().signal_delay
    assert left >= 25 * 60


def test_states_come_from_squeue_then_sacct_then_the_notes(tmp_path, monkeypatch):
    runs = ["live", "waits", "cancelled", "accounted", "forgotten", "failed", "lost", "stopped"]
    folder, record = recorded(tmp_path, [*runs, "never"])
    lines = ["50_0|RUNNING|None", "50_1|PENDING|BeginTime", "50_2|CANCELLED|None", "9|RUNNING|None"]
    fake(tmp_path / "bin", "squeue", lines)
    fake(tmp_path / "bin", "sacct", ["50_3|CANCELLED by 1000"])
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def note(run, event, rank=0, attempt=0, **facts):
        line = {"time": time.time(), "event": event, "attempt": attempt, "rank": rank, "host": "n"}
        path = folder / "1" / "notes" / f"{run}.{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps(line | facts) + "\n")

    for run in ("live", "forgotten", "failed", "lost", "stopped"):
        note(run, "start")
    note("live", "requeue")
    note("live", "start", attempt=1)
    note("forgotten", "end", code=0)
    note("failed", "end", code=1, error="another rank ended: connection closed")
    note("failed", "end", rank=1, code=2, error="the image x.png cannot be read")
    note("stopped", "end", code=75)
    queue = status.Queue()
    got = {r["name"]: status.state_of(folder, record, r, queue) for r in record["runs"]}
    assert {name: state.state for name, state in got.items()} == {
        "live": "RUNNING",
        "waits": "PENDING",
        "cancelled": "CANCELLED",
        "accounted": "CANCELLED",
        "forgotten": "FINISHED",
        "failed": "FAILED",
        "lost": "LOST",
        "stopped": "STOPPED",
        "never": "CANCELLED",  # it left the queue without a word
    }
    assert [name for name, state in got.items() if state.live] == ["live", "waits"]
    assert got["live"].restarts == 1 and got["waits"].restarts == 0
    rows = {row[0]: row for row in status.rows_of(folder, record, queue)}
    assert rows["failed"][-1] == "rank 1 on n: the image x.png cannot be read"
    assert rows["waits"][-1] == "waits: BeginTime"


def test_an_error_of_all_ranks_has_its_reason(tmp_path):
    """Only rank 0 says it; the others end before it without a word."""
    ends = [
        {"event": "end", "attempt": 0, "code": 2, "host": "n", "rank": rank, "time": 9 - rank}
        for rank in range(3)
    ]
    ends[0]["error"], ends[1]["error"] = "--data /x is no folder", ""
    said = "rank 0 on n: --data /x is no folder"
    assert task.first_failure(ends, 0) == said
    assert task.first_failure(ends[1:], 0) == "rank 2 on n: exit code 2 without a word"


def test_a_rank_without_a_word_waits_for_the_reason_of_another(tmp_path, capsys):
    """The rank waits whichever of the two ends first."""
    ranks = [task.Task("a", "b", [], "c", str(tmp_path)) for _ in range(2)]
    for number, one in enumerate(ranks):
        one.rank, one.ranks, one.last_error = number, 2, "" if number else "error: no such data"
    later = threading.Timer(0.5, lambda: ranks[0].note("end", code=2, error="no such data"))
    later.start()
    with pytest.raises(SystemExit):
        ranks[1].failed(2)
    said = task.read_notes(tmp_path, "a")[-1]["error"]
    assert "another rank ended: rank 0 on" in said and said.endswith("no such data")
    assert said in capsys.readouterr().err


def test_the_last_line_is_the_scripts_own(tmp_path):
    """Slurm writes its lines after it at a requeue or a cancel, each version in its own form."""
    theirs = [
        "submitit INFO (2026-11-26) - Job has timed out",
        "srun: Job step aborted: Waiting up to 7 seconds for job step to finish.",
        "slurmstepd-vm: error: *** JOB 7 ON vm CANCELLED AT 2026-11-26T15:29:04 DUE TO JOB REQUEUE",
        "slurmstepd: error: *** STEP 7.0 ON gpu-3.site CANCELLED AT 2026-11-26T15:29:04 ***",
        "slurmd[vm]: error: *** JOB 7 CANCELLED ***",
        "srun: error: vm: task 0: Terminated",
    ]
    log = tmp_path / "log"
    log.write_text("\n".join(["epoch 3", "saved", *theirs, ""]))
    assert status.log_lines(log)[-1] == "saved"
    log.write_text("epoch 3 of " + "\n".join(theirs[2:]))
    assert status.log_lines(log) == ["epoch 3 of"]
    log.write_text("\n".join(theirs))
    assert status.log_lines(log) == [] == status.log_lines(tmp_path / "none")


def test_the_row_of_an_evaluation_shows_its_scores(tmp_path):
    folder, ledger = recorded(tmp_path / "scratch", ["linear"], cluster="local")
    written = tmp_path / "record.json", tmp_path / "record-knn.json"
    for path, (protocol, value) in zip(written, [("linear", 68.2), ("kNN", 61.049)], strict=True):
        found = {"protocol": protocol, "value": value, "spread": None}
        path.write_text(json.dumps(found | {"others": {}, "hyperparameters": {}}))
    log = folder / "1" / "jobs" / "50_0_0_log.out"
    log.parent.mkdir(parents=True)
    lines = [f"record: {written[0]} (python results/record.py add stores it)"]
    lines += [f"record: {written[1]}", f"record: {tmp_path / 'gone.json'}"]
    log.write_text("\n".join([*lines, ""]))
    assert status.rows_of(folder, ledger, status.Queue())[0][4] == "linear 68.20, kNN 61.05"


def test_a_slurm_that_does_not_answer_is_no_reason_to_call_jobs_lost(tmp_path, monkeypatch):
    folder, record = recorded(tmp_path, ["a"])
    fake(tmp_path / "bin", "squeue", ["nothing"], code=1)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="Slurm does not tell the state of jobs"):
        status.state_of(folder, record, record["runs"][0], status.Queue())


def test_progress_of_a_long_run_is_read_from_its_end(tmp_path, monkeypatch):
    """Its file is longer than one read takes, the last k-NN lies far back, the last line is cut."""
    monkeypatch.setattr(status, "TAIL", 1000)
    run = tmp_path / "run"
    run.mkdir()
    (run / "environment.json").write_text(json.dumps({"steps": {"per_epoch": 10, "last": 500}}))
    (run / "config.yaml").write_text("batch_size: 64\n")
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 401):
            line = {"kind": "step", "step": step, "loss": 1.0, "data_wait": 0.1}
            line["images_per_second"] = 32.0 if step > 300 else 1.0
            print(json.dumps(line), file=file)
            if step in (100, 300):
                line = {"kind": "epoch", "epoch": step // 10, "step": step, "knn": step / 1000}
                print(json.dumps(line), file=file)
        file.write('{"kind": "step", "st')
    facts = status.progress(str(run))
    assert facts["step"] == 400 and facts["knn"] == 0.3
    assert facts["seconds_left"] == pytest.approx(100 * 64 / 32)
    folder, record = recorded(tmp_path / "scratch", ["run"], cluster="local")
    record["runs"][0]["folder"] = str(run)
    row = status.rows_of(folder, record, status.Queue())[0]
    assert row[3:6] == ["40 of 50", "k-NN 30.0%", "3 min"]
    (run / "results.json").write_text(json.dumps({"step": 400, "knn": 0.456}))
    assert status.progress(str(run))["knn"] == 0.456  # the last step's, at no epoch's end
    (run / "results.json").write_text(json.dumps({"step": 200, "knn": 0.456}))
    assert status.progress(str(run))["knn"] == 0.3  # the run has been continued since
    lines = status.table([row], 30).splitlines()
    assert lines[0].startswith("run  job") and all(len(line) <= 30 for line in lines)
    assert status.progress(str(tmp_path / "none")) == {} and status.progress(None) == {}


def test_status_of_what_is_not_there(code, tmp_path):
    assert "nothing was submitted" in only_error(call(code, tmp_path, "status.py"))
    recorded(tmp_path / "runs" / "slurm", ["a"])
    error = only_error(call(code, tmp_path, "status.py", "t"))
    assert "no launch or sweep t" in error and "there are s" in error
    assert "at least 1 second" in only_error(call(code, tmp_path, "status.py", "--every", "0"))
    (tmp_path / "runs" / "slurm" / "s" / "runs.json").write_text("{")
    assert "runs.json is not JSON" in only_error(call(code, tmp_path, "status.py"))


@pytest.mark.long
def test_watch_shows_it_again(code, tmp_path):
    recorded(tmp_path / "runs" / "slurm", ["a"], cluster="local")
    process = subprocess.Popen(
        command(code, "status.py", "--watch", "--every", "1"),
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(code)),
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    lines = [process.stdout.readline() for _ in range(10)]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert sum(line.startswith("a  ") for line in lines) == 2, lines


def test_a_record_that_is_not_there_is_empty(tmp_path):
    assert read_ledger(tmp_path / "x") == {"name": "x", "runs": [], "submissions": []}
