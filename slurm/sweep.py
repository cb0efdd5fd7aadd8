"""Submits many runs as one Slurm array: a grid or a list of flags, read from a YAML file.

    python slurm/sweep.py slurm/examples/seeds.yaml --max-parallel 4
    python slurm/sweep.py results/plan.yaml --only photos        # a tier of the plan, or its runs

Of the plan (its keys: slurm/plan.py) every seed is a run, in runs/plan/NAME-SEED. Another file:

    name: seeds                        # default: the file's name
    output: runs/seeds                 # each run gets a folder in it (default runs/<name>)
    slurm: {gpus_per_node: 8, time: 24h}   # resources, as launch.py's flags
    max_parallel: 4                    # how many jobs may run at a time
    script: recipes/snclr.py
    flags: {dataset: cifar10, data: /data/cifar10}   # of every run
    grid:                              # every combination of these
      seed: [0, 1, 2]
      neighbours: [1, 30]
    runs:                              # and, with each combination, each of these
      - {}
      - {name: long, queue_size: 65536}

`script` may be in `grid` or in a run too. A value `{finished: 'runs/*/*'}` in the grid stands for
all finished run folders that fit; `{name}` inside a text stands for the run's name. True is
--flag, false --no-flag, null leaves the flag out. Submitted again, a sweep leaves out what is
finished and what is still in the queue.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

try:
    from common.errors import UserError, brief, command
    from common.run import documents
    from common.run.results import is_finished
    from slurm import plan
    from slurm.ledger import Job, check_name, read_ledger
    from slurm.resources import (
        OneLineParser,
        add_common_flags,
        add_resource_flags,
        check_time,
        cluster_layer,
        flags_layer,
        resources_of,
        scratch_folder,
    )
    from slurm.status import Queue, state_of
    from slurm.submission import check_flags, flags_of, script_path, submit
except ModuleNotFoundError as error:  # the system's python, say
    sys.exit(
        f"error: no module {error.name}: activate the environment first, `. .venv/bin/activate` in "
        "the checkout (make demo or make test makes it)"
    )

KEYS = ("name", "output", "slurm", "max_parallel", "script", "flags", "grid", "runs")
MOST = 1001  # Slurm's MaxArraySize unless a site sets another
LONGEST = 64  # characters of a name that is made from values


def main(argv: list[str] | None = None) -> int:
    """Returns exit code 0: submitted, or under --local finished; 75: stopped under --local."""
    parser = OneLineParser(
        description=__doc__.split("\n")[0],
        epilog="The file's keys are explained at the top of slurm/sweep.py; see slurm/examples/.",
        allow_abbrev=False,
    )
    parser.add_argument("file", help="the sweep, a YAML file")
    parser.add_argument(
        "--max-parallel",
        type=int,
        metavar="N",
        help="how many jobs may run at a time (default: the file's max_parallel, else all; "
        "under --local 1)",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="tiers or runs, if FILE is a plan"
    )
    plan.add_data_flags(parser)
    add_common_flags(parser)
    add_resource_flags(parser)
    arguments = parser.parse_args(argv)
    path = Path(arguments.file)
    planned = "tiers" in documents.read_yaml(path)
    spec = {"name": path.stem, "slurm": {}, "max_parallel": None} if planned else read_spec(path)
    resources = resources_of(
        cluster_layer(arguments.cluster),
        (f"{arguments.file}: slurm", spec["slurm"]),
        flags_layer(arguments),
    )
    if resources.time or not arguments.local:
        check_time(resources)
    parallel = arguments.max_parallel or spec["max_parallel"]
    if parallel is not None and (not isinstance(parallel, int) or parallel < 1):
        raise UserError(f"--max-parallel {parallel}: must be 1 or more")
    jobs = planned_jobs(path, arguments) if planned else jobs_of(spec)
    check_flags(jobs, resources.ranks)
    left = not_done(spec["name"], jobs, resources)
    if not left:
        print(f"all {len(jobs)} runs are finished or in the queue")
        return 0
    return submit(spec["name"], left, resources, arguments, parallel)


def read_spec(path: Path) -> dict[str, Any]:
    """Returns the file's values with defaults; raises UserError for values that are not valid."""
    spec = documents.read_yaml(path, "sweep")
    spec = {key: spec.get(key) for key in KEYS}
    spec["name"] = check_name(str(spec["name"] or path.stem))
    spec["output"] = str(spec["output"] or f"runs/{spec['name']}")
    for key in ("slurm", "flags", "grid"):
        spec[key] = spec[key] or {}
    spec["runs"] = spec["runs"] or [{}]
    varied = {str(key).replace("-", "_") for key in spec["grid"]}
    own = [str(key) for run in spec["runs"] for key in run]
    if twice := [key for key in own if key.replace("-", "_") in varied]:
        raise UserError(f"{path}: {twice[0]} is in grid and in a run: several runs would be one")
    for key, values in spec["grid"].items():
        if isinstance(values, dict):
            spec["grid"][key] = finished(path, key, values)
        elif not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid: {key} must be a list of values")
    count = math.prod(map(len, spec["grid"].values())) * len(spec["runs"])
    if count > MOST:
        raise UserError(
            f"{path}: {count:,} runs, more than the {MOST:,} that a Slurm array holds by default: "
            "shorten its grid, or make several files of it"
        )
    return spec


def finished(path: Path, key: str, values: dict[str, Any]) -> list[str]:
    """Returns the run folders that {finished: pattern} stands for, sorted by name."""
    patterns = values.get("finished")
    if set(values) != {"finished"} or not patterns:
        raise UserError(f"{path}: grid: {key} must be a list, or {{finished: 'runs/*/*'}}")
    patterns = patterns if isinstance(patterns, list) else [patterns]
    folders = sorted(
        {
            str(folder.absolute())
            for pattern in patterns
            for folder in glob(str(pattern))
            if is_finished(folder)
        }
    )
    if not folders:
        raise UserError(f"{path}: grid: {key}: no finished run in {', '.join(map(str, patterns))}")
    return folders


def glob(pattern: str) -> list[Path]:
    path = documents.expanded(pattern).absolute()
    try:
        return [*Path(path.anchor).glob(str(path.relative_to(path.anchor)))]
    except ValueError as error:
        raise UserError(f"{brief(repr(pattern))} is no pattern of folders: {error}") from None


def jobs_of(spec: dict[str, Any]) -> list[Job]:
    """Returns one job for each combination of the grid with each entry of `runs`."""
    jobs = []
    axes = [[(key, value) for value in values] for key, values in spec["grid"].items()]
    for combination in itertools.product(*axes):
        for entry in spec["runs"]:
            own = {k: v for k, v in entry.items() if k not in ("name", "script")}
            chosen = dict(combination)
            script = entry.get("script") or chosen.pop("script", None) or spec["script"]
            if not script:
                raise UserError(f"{spec['name']}: no script: name one for all runs or in each")
            parts = [entry.get("name") or "", *map(word, combination)]
            if not entry.get("name"):
                parts += [word(item) for item in entry.items()]
            name = "-".join(part for part in parts if part) or Path(script).stem
            name = check_name(name)
            values = {**spec["flags"], **chosen, **own}
            path = script_path(str(script))
            if plan.is_run(path) and "output" not in values:
                values["output"] = str(documents.expanded(spec["output"]).absolute() / name)
            jobs.append(Job(name, path, flags_of(values, name), values.get("output")))
    names = [job.name for job in jobs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{spec['name']}: several runs are called {twice[0]}: give each a name")
    return jobs


def planned_jobs(path: Path, arguments: argparse.Namespace) -> list[Job]:
    """Returns one job for each seed of the plan's runs that --only names."""
    if not arguments.only:
        raise UserError(f"{path} is a plan: say which of its tiers or runs with --only NAME …")
    jobs, folder = [], Path("runs/plan").absolute()
    for piece in plan.pieces(plan.chosen(plan.load(path), arguments.only)):
        data = getattr(arguments, piece.dataset, None)
        if data == "":
            raise UserError(f"{piece.run.name} needs --{piece.dataset} PATH, its images' folder")
        output = str(folder / piece.name)
        script = script_path(piece.run.script)
        jobs.append(Job(piece.name, script, piece.flags(output, data), output))
    return jobs


def word(item: tuple[str, Any]) -> str:
    """Names a flag and its value in a part of a run's name: seed0, queue_size65536, snclr."""
    key, value = item
    if key in ("script", "backbone", "datasets"):  # files and folders speak for themselves
        path = Path(str(value))
        own = path.parent.name if path.name == "run.py" else path.name.removesuffix(".py")
        return own[:LONGEST]
    if isinstance(value, bool):
        return key if value else f"no-{key}"
    text = "".join(c if c.isalnum() or c in "._+-" else "-" for c in str(value))
    return f"{key}{text}"[:LONGEST]


def done_in(folder: str | None) -> bool:
    return folder is not None and is_finished(Path(folder))


def not_done(name: str, jobs: list[Job], resources: Any) -> list[Job]:
    """Returns the runs that are neither finished nor in the queue; says which ones are."""
    folder = scratch_folder(resources)
    ledger = read_ledger(folder / name)
    known = {run["name"]: run for run in ledger["runs"]}
    queue, left = Queue(), []
    for job in jobs:
        run, state = known.get(job.name), None
        if run is not None:
            state = state_of(folder / name, ledger, run, queue)
        same = run is None or run["flags"] == job.flags  # else it goes on: more --max-steps
        ended = state is not None and state.state == "FINISHED"
        if state is not None and state.live:
            print(f"{job.name}: {state.state}, job {state.job}")
        elif same and (done_in(job.folder) if plan.is_run(job.script) else ended):
            print(f"{job.name}: finished")
        else:
            left.append(job)
    return left


if __name__ == "__main__":
    codes: list[int] = []
    sys.exit(command(lambda: codes.append(main())) or codes[0])
