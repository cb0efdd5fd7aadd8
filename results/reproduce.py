"""The plan of runs: what is recorded, running, missing; and the next piece of it.

    python results/reproduce.py --list                               # the plan as a table
    python results/reproduce.py --next --budget 9m --cifar10 PATH    # goes on with it
    python results/reproduce.py --next --only photos-nnclr           # this run and no other
    python results/reproduce.py --next --only photos-nnclr --again   # though it is recorded
    python results/reproduce.py --all --only photos                  # a tier, one after the other
    python results/reproduce.py --all --only CLAIM --cifar10 PATH    # the runs of a lab's claim

--next continues an unfinished run first, else starts the first missing one whose data is given and
which is planned for such a machine (with a GPU, or on a CPU; --only runs any); it trains, evaluates
and stores the records; --all goes on with the next, first seeds of all runs first. When the budget
is spent it stops the run, which saves, and exits with 75; the same command continues. Nothing left
to do: exit code 0. --again leaves the stored records as they are: its own are under --runs, and it
says both numbers.
"""

import argparse
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import EXIT_STOPPED, Stopped, UserError, command
from common.run import documents, lock
from common.run.flags import gpu_is_there
from common.run.help import in_80_columns
from common.run.results import FAILED, is_finished
from results import claims, lab_rates, record, tables
from results.joined import Joined
from slurm import plan
from slurm.plan import PROTOCOLS, Piece, Planned

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PLAN = HERE / "plan.yaml"
STATES = ("recorded", "trained", "running", "unfinished", "missing")
PATIENCE = 120.0  # seconds: a stopped run saves before it is killed; another process chooses
LOCK = "reproduce.lock"
LAB = "lab-"  # how the names of the claims' runs begin
# the run itself measures these; below, the other evaluations' scripts and flags
OWN = {
    "knn": lambda folder: record.knn_record([folder]),
    "classifier": lambda folder: record.read(folder / "record.json"),
}
EVALUATIONS = {
    "linear": ["eval/linear_probe/run.py", "--measure", "linear"],
    "semi 1%": ["eval/semi_supervised/run.py", "--percent", "1"],
    "semi 10%": ["eval/semi_supervised/run.py", "--percent", "10"],
    "readout": ["eval/readout/run.py"],
    "readout first 22": ["eval/readout/run.py", "--first-features", "22"],
    "untrained": ["eval/readout/run.py", "--untrained"],
}


class Work:
    """The folders of the plan's runs and the records that exist."""

    def __init__(self, runs: Path, records: Path | None = None):
        self.runs, self.records = runs, records or record.RECORDS
        self.read: tuple[Any, list[tuple[str, dict[str, Any]]]] = None, []

    def stored(self) -> list[tuple[str, dict[str, Any]]]:
        """Returns every record; reads them again only if a file has changed."""
        files = sorted((p, p.stat().st_mtime_ns) for p in self.records.rglob("*.json"))
        if self.read[0] != files:
            both = record.load_all(self.records) + record.load_failures(self.records)
            self.read = files, both
        return self.read[1]

    def folder(self, piece: Piece) -> Path:
        return self.runs / piece.name

    def found(self, piece: Piece) -> dict[str, tuple[str, dict[str, Any]]]:
        """Returns the records of this piece by protocol."""
        mine = [(n, one) for n, one in self.stored() if record.is_of(one, piece.run, piece.seed)]
        return {one["protocol"]: (name, one) for name, one in mine}

    def recorded(self, piece: Piece) -> list[str]:
        """Lists the evaluations of this piece that have a record."""
        done = self.found(piece)
        return [e for e in piece.run.evaluations if PROTOCOLS[e] in done]

    def state(self, piece: Piece) -> str:
        found = self.found(piece)
        if record.FAILED in found or {PROTOCOLS[e] for e in piece.run.evaluations} <= {*found}:
            return "recorded"
        folder = self.folder(piece)
        if is_locked(folder):
            return "running"
        if is_finished(folder):
            return "trained"
        return "unfinished" if (folder / "config.yaml").exists() else "missing"


def is_locked(folder: Path) -> bool:
    """Tells whether another process is at work on this run: its lock names a living process."""
    try:
        pid = int(documents.read_text(folder / LOCK))
        os.kill(pid, 0)
        return pid > 0 and pid != os.getpid()
    except (OSError, ValueError, OverflowError, UserError):
        return False


# -- doing it -------------------------------------------------------------------------------------


def listing(runs: Sequence[Planned], work: Work) -> str:
    """Returns the plan as a table: what is recorded, what the rest takes, and what it is for."""
    published = tables.load_published()
    head = ("name", "for", "seeds", "hours left", "", "published number")
    rows, total = [head], {}
    done = of = 0
    for run in runs:
        states = [work.state(Piece(run, seed)) for seed in run.seeds]
        hours = run.hours * sum(state not in ("recorded", "trained") for state in states)
        seeds = f"{states.count('recorded')}/{len(states)}"
        between = [f"{states.count(s)} {s}" for s in STATES[1:-1] if s in states]
        seeds += f" ({', '.join(between)})" if between else ""
        basis = run.basis if hours else ""
        rows.append((run.name, run.device, seeds, f"{hours:.3g}", basis, aims(run, published)))
        total[run.device] = total.get(run.device, 0.0) + hours
        done, of = done + states.count("recorded"), of + len(states)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    hours = ", ".join(f"{h:.4g} h on {device}" for device, h in total.items() if h)
    left = f"left to train: {hours}" if hours else "nothing is left to train"
    return "\n".join([*lines, f"{done} of {of} seeds are recorded; {left}"])


def aims(run: Planned, published: list[dict[str, Any]]) -> str:
    """Lists the published numbers that a run's own would be compared with if its data set were the
    original, like "linear 75.6".
    """
    like, said = record.what_ran(run.config), []
    like |= {"dataset": {"name": like["pretraining"]["dataset"], "copy": None, "incomplete": None}}
    like |= {"metric": "top1", "epoch": "last"}
    for evaluation in run.evaluations:
        one = like | {"protocol": PROTOCOLS[evaluation]}
        rows = [row for row in published if tables.is_like(one, row)]
        numbers = [tables.exact(row) for row in rows if row["value"] is not None]
        numbers = numbers or ["not at hand"] * bool(rows)
        said += [f"{evaluation} {number}" for number in dict.fromkeys(numbers)]
    return ", ".join(said)


def choose(runs: Sequence[Planned], work: Work, has_data: Callable[[str], bool]) -> Piece | None:
    """Chooses the next piece: an unfinished run, else one that waits for evaluation, else the first
    missing run whose data is at hand.
    """
    candidates = [piece for piece in plan.pieces(runs) if has_data(piece.dataset)]
    states = {piece.name: work.state(piece) for piece in candidates}
    for wanted in ("unfinished", "trained", "missing"):
        for piece in candidates:
            if states[piece.name] == wanted:
                return piece
    return None


def take(
    runs: Sequence[Planned], work: Work, has_data: Callable[[str], bool]
) -> tuple[Piece, str] | None:
    """Chooses the next piece, with its state, and marks it as this process's. Processes take one
    after the other, so that those that work on one plan side by side never take the same piece.
    """
    work.runs.mkdir(parents=True, exist_ok=True)
    with lock.take(work.runs, PATIENCE) or contextlib.nullcontext():
        if (piece := choose(runs, work, has_data)) is None:
            return None
        state, folder = work.state(piece), work.folder(piece)
        folder.mkdir(exist_ok=True)
        (folder / LOCK).write_text(str(os.getpid()))
    return piece, state


def waiting(runs: Sequence[Planned], everything: dict[str, Planned], work: Work) -> list[Planned]:
    """Returns the lab's runs whose rate is not the one that its recorded rates have chosen."""
    recorded = claims.recorded(work.stored(), everything)
    chosen = lab_rates.chosen(Joined([], [], [], everything, {}, recorded, []))
    found = []
    for run in runs:
        arm = run.name.removeprefix(LAB)
        base = everything.get(f"{lab_rates.GRID}{arm}-x1") if run.name.startswith(LAB) else None
        if base is None:  # no run of the lab, or one that has the rate of another
            continue
        rate = base.config["lr"] * chosen.get(arm, 0)
        if not math.isclose(run.config["lr"], rate, rel_tol=1e-4):
            found.append(run)
    return found


def is_for_here(run: Planned) -> bool:
    """Tells whether the plan has this run on such a machine: with a GPU, or on a CPU."""
    return ("CPU" in run.device) != gpu_is_there()


def left_of(here: Sequence[Planned], work: Work) -> str:
    """Says how many seeds are left of these runs, and their hours of training by the plan."""
    missing = [p for p in plan.pieces(here) if work.state(p) not in ("recorded", "running")]
    hours = sum(piece.run.hours for piece in missing)
    return f"{len(missing)} left, {hours:.3g} h of training by the plan"


def nothing_left(runs: Sequence[Planned], here: Sequence[Planned], work: Work) -> str:
    """Says that there is nothing to do, and what is missing of the plan, here and elsewhere."""
    missing = [p for p in plan.pieces(runs) if work.state(p) != "recorded"]
    sets = {p.dataset for p in missing if p.run in here} - {"photos"}
    devices = {p.run.device for p in missing if p.run not in here}
    text = ["nothing left to do here"]
    if sets:
        text.append(f"what is missing needs {' and '.join(f'--{n} PATH' for n in sorted(sets))}")
    if devices:
        text.append(
            f"the rest is planned for {' and '.join(sorted(devices))} (--only NAME runs it)"
        )
    return "; ".join(text)


def nothing_of(run: Planned, work: Work, again: bool) -> str:
    """Says why there is nothing to do of this one run; raises UserError if its data is missing."""
    states = {seed: work.state(Piece(run, seed)) for seed in run.seeds}

    def having(*wanted: str) -> str:
        seeds = [str(seed) for seed, state in states.items() if state in wanted]
        return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else ""

    if left := having("unfinished", "trained", "missing"):
        flag = f"--{Piece(run, 0).dataset} PATH"
        raise UserError(f"{run.name} needs {flag}, the folder of its images, for {left}")
    if running := having("running"):
        return f"{run.name} is running in another process ({running})"
    if again:
        return f"{run.name} was run again already ({having('recorded')}): {work.runs}"
    return f"{run.name} is recorded already ({having('recorded')}); --again runs it nevertheless"


def of_name(everything: dict[str, Planned], name: str) -> list[Planned]:
    """Returns the runs of this name, tier or claim of the lab."""
    lab = claims.load(PLAN.with_name("claims.yaml"), everything).get("lab", {"claims": []})
    arms = {claim["name"]: claims.arms_of(claim) for claim in lab["claims"]}
    return plan.chosen(everything, arms.get(name, [name]))


def recorded_part(run: Planned, work: Work) -> Planned:
    """Returns the run with those of its seeds that are recorded; raises UserError if none is."""
    seeds = [seed for seed in run.seeds if work.state(Piece(run, seed)) == "recorded"]
    if not seeds:
        raise UserError(f"{run.name} is not recorded yet: run it without --again")
    return replace(run, seeds=seeds)


def both_numbers(piece: Piece, again: Work, work: Work) -> str:
    """Says the repeated run's number and the stored one, for each evaluation."""
    lines, stored = [], work.found(piece)
    for protocol, (name, one) in again.found(piece).items():
        old_name, old = stored[protocol]
        now, then = value_of(one, piece.seed), value_of(old, piece.seed)
        lines.append(
            f"{piece.name}, {protocol}: {now:.2f} ({shown(again.records / name)}); "
            f"recorded: {then:.2f} ({shown(work.records / old_name)})"
        )
    return "\n".join(lines)


def value_of(one: dict[str, Any], seed: int) -> float:
    """Returns a record's number for one seed of the training."""
    if one.get("seeds_of", "pretraining") == "pretraining" and seed in one["seeds"]:
        return one["values"][one["seeds"].index(seed)]
    return one["value"]


def training_command(piece: Piece, folder: Path, data: str | None) -> list[str]:
    return [
        sys.executable,
        str(ROOT / piece.run.script),
        *piece.flags(shown(folder), data and shown(data)),
    ]


def shown(path: Path | str) -> str:
    """Shows a path as a record does: from the repository's root if it is below it."""
    path = documents.expanded(path).absolute()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def work_on(
    piece: Piece,
    work: Work,
    data: str | None,
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
    allow_dirty: bool = False,
) -> None:
    """Trains, evaluates and records one piece. Raises Stopped at the deadline, with all saved."""
    folder = work.folder(piece)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).write_text(str(os.getpid()))
    try:
        try:
            until(training_command(piece, folder, data), deadline, clock)  # a finished one says so
        except UserError:
            if not (folder / FAILED).exists():
                raise  # this is no result of training, but something to fix
            failed = record.add_failure(record.of_failure(folder), allow_dirty, work.records)
            print(f"stored {failed}: training failed, which is a result too")
            return
        for evaluation in piece.run.evaluations:
            if evaluation in work.recorded(piece):
                continue
            if evaluation in OWN:
                print(f"stored {record.add(OWN[evaluation](folder), allow_dirty, work.records)}")
                continue
            evaluate(evaluation, folder, data, deadline, clock, work, allow_dirty)
    finally:
        (folder / LOCK).unlink(missing_ok=True)


def evaluate(
    evaluation: str, folder: Path, data: str | None, deadline: float, clock, work: Work, dirty: bool
) -> None:
    script, *flags = EVALUATIONS[evaluation]
    out = folder / "eval" / re.sub("[^a-z0-9]+", "-", PROTOCOLS[evaluation]).strip("-")
    line = [sys.executable, str(ROOT / script), *flags]
    line += ["--backbone", shown(folder), "--output", shown(out)]
    until(line + (["--data", shown(data)] if data else []), deadline, clock)
    print(f"stored {record.add(record.read(out / 'record.json'), dirty, work.records)}")


def until(line: list[str], deadline: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Runs a command. At the deadline asks it to stop, which it answers with 75, and raises
    Stopped; any other end but 0 is a UserError.
    """
    process = subprocess.Popen(line, cwd=ROOT)
    asked = None
    try:
        while process.poll() is None:
            now = clock()
            if asked is None and now >= deadline:
                process.send_signal(signal.SIGTERM)
                asked = now
            elif asked is not None and now >= asked + PATIENCE:
                process.kill()
            time.sleep(0.1)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        raise Stopped from None
    except BaseException:
        process.kill()
        raise
    if process.returncode == EXIT_STOPPED or (asked is not None and process.returncode):
        raise Stopped
    if process.returncode:
        shown = " ".join([Path(line[1]).name, *line[2:]])
        raise UserError(f"{shown} ended with exit code {process.returncode}, see above")


def interrupt_on_sigterm() -> None:
    """Makes SIGTERM act as Ctrl-C, so that the run below is asked to save and does not go on alone.
    Python's default ends this process only.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def seconds(text: str) -> float:
    """Parses a time: '9m' gives 540; s, m and h, or plain seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is no time: 540, 9m or 1.5h")
    return float(found.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600}[found.group(2)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="print the plan with its states")
    what.add_argument("--next", action="store_true", help="do the next piece of it")
    what.add_argument("--all", action="store_true", help="do the pieces until none is left")
    parser.add_argument(
        "--budget",
        type=seconds,
        default=float("inf"),
        metavar="TIME",
        help="stop and save after so long: 9m, 1.5h, 540 (default: none)",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="NAME",
        help="a run or tier of the plan, or a claim of the lab",
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="with --only: run what is recorded once more, into RUNS/again, records and all",
    )
    plan.add_data_flags(parser)
    parser.add_argument(
        "--runs",
        type=Path,
        default=ROOT / "runs" / "plan",
        metavar="FOLDER",
        help="where the run folders are (default runs/plan)",
    )
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="record runs of a tree with changes too; shows in the tables",
    )
    arguments = parser.parse_args(argv)
    interrupt_on_sigterm()
    everything = plan.load(PLAN)
    runs = of_name(everything, arguments.only) if arguments.only else [*everything.values()]
    work = stored = Work(arguments.runs.absolute())
    if arguments.list:
        print(listing(runs, work))
        return
    if arguments.again:
        if not arguments.only:
            raise UserError("--again needs --only NAME: which run")
        runs = [recorded_part(run, work) for run in runs]
        work = Work(stored.runs / "again", stored.runs / "again" / "records")
    deadline = time.monotonic() + arguments.budget
    here = [run for run in runs if arguments.only or is_for_here(run)]
    unset = waiting(here, everything, stored)
    if unset and arguments.only:
        raise UserError(
            f"{unset[0].name} waits for its rate: run {lab_rates.GRID}"
            f"{unset[0].name.removeprefix(LAB)}-x0.25, -x1 and -x4, and set the best as its factor "
            "in plan.yaml (results/claims.md, Rates)"
        )
    here = [run for run in here if run not in unset]
    data = {name: getattr(arguments, name) for name in plan.DATA}
    done = None
    while taken := take(here, work, lambda name: bool(data.get(name, True))):
        piece, state = taken
        print(
            f"{piece.name}: {state}, {piece.run.hours:g} h {piece.run.basis} "
            f"for its training on {piece.run.device}",
            flush=True,
        )
        images = data.get(piece.dataset)
        work_on(piece, work, images or None, deadline, allow_dirty=arguments.allow_dirty)
        if arguments.again:
            print(both_numbers(piece, work, stored))
            return
        done = piece
        print(f"{piece.name} is recorded; {left_of(here, work)}", flush=True)
        if not arguments.all:
            break
    if done:
        print("python results/report.py makes the pages anew")
        return
    if not arguments.only:
        print(nothing_left(runs, here, work))
    for run in runs if arguments.only else ():
        print(nothing_of(run, work, arguments.again))


if __name__ == "__main__":
    sys.exit(command(main))
