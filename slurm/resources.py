"""What a job asks the cluster for: flags, a sweep's `slurm:`, the cluster file, defaults."""

import argparse
import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, brief, nearest_name
from common.run import documents

CLUSTER_FILE = Path(__file__).resolve().parent / "cluster.yaml"
EARLY = 60  # seconds by which Slurm may send its signal too early (man sbatch, --signal)
DEFAULT_TIME = "24h"
MOST = 10**6  # of anything
LEAST = 30  # seconds that a job should at least have for its work


@dataclass(frozen=True)
class Resources:
    """What a job asks the cluster for. Flags win over a sweep's `slurm:`, which wins over the
    cluster file, which wins over these defaults.
    """

    nodes: int = 1
    gpus_per_node: int | str = 1
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    time: str | None = None
    signal_delay: int = 300
    max_timeouts: int = 100
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    scratch: str = "runs/slurm"
    environment: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        """Returns GPUs per node: 4 of `a100:4`."""
        return int(str(self.gpus_per_node).split(":")[-1])

    @property
    def tasks(self) -> int:
        """Returns tasks per node: one for each GPU."""
        return self.tasks_per_node or self.gpus or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks

    @property
    def minutes(self) -> int:
        return minutes(self.time or DEFAULT_TIME)


HELP = {
    "nodes": "machines (default 1)",
    "gpus_per_node": "GPUs of each machine, one task for each, as 8 or, with their type, a100:8 "
    "(default 1; 0: CPU only)",
    "tasks_per_node": "tasks of each machine without GPUs (default 1)",
    "cpus_per_task": "CPU cores of each task, loader processes included (default: the cluster's)",
    "mem_gb": "memory of each machine in GB (default: the cluster's)",
    "time": "time limit of one job, then it saves, is requeued and continues: 72h, 90m, 2d, 1d12h "
    "or [D-]HH:MM:SS (default 24h; without one under --local)",
    "signal_delay": "seconds before the time limit at which the run is asked to stop: longer than "
    "its slowest step or k-NN evaluation (default 300)",
    "max_timeouts": "how often the time limit may requeue a job (default 100)",
    "partition": "partition (default: the cluster's)",
    "account": "account to charge (default: yours)",
    "qos": "quality of service (default: the cluster's)",
    "constraint": "features that the nodes must have",
    "scratch": "folder that all nodes see, for code snapshots, job files and logs (default "
    "runs/slurm)",
}
WHOLE = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task")
WHOLE += ("signal_delay", "max_timeouts")
KINDS: dict[str, Any] = dict.fromkeys(HELP, str) | dict.fromkeys(WHOLE, int)
KINDS |= {"gpus_per_node": int | str, "mem_gb": int | float, "environment": list, "options": dict}


def add_resource_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("resources")
    for name, text in HELP.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type={"mem_gb": float, "gpus_per_node": str}.get(name, KINDS[name]),
            default=argparse.SUPPRESS,
            metavar="TEXT" if KINDS[name] is str else "N",
            help=text,
        )


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster",
        default="",
        metavar="FILE",
        help="YAML file as slurm/cluster.example.yaml (default: slurm/cluster.yaml, if it exists)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print the sbatch script, submit nothing"
    )
    parser.add_argument(
        "--local",
        action="store_true",
        help="run the same thing on this machine, without Slurm, in the foreground (the cluster "
        "file's environment lines are left out)",
    )
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="run the tree with its uncommitted changes and untracked files; the run says so",
    )


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that prints its usage and error as one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists all flags)")


def resources_of(*layers: tuple[str, dict[str, Any]]) -> Resources:
    """Returns the resources that layers of (where, values) ask for. Later layers win, in `options`
    one by one; null, or an empty text, takes away what an earlier one says.
    """
    known = {f.name: f for f in dataclasses.fields(Resources)}
    values: dict[str, Any] = {}
    for where, layer in layers:
        for key, value in layer.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise UserError(f"{where}: {key} is unknown{nearest_name(name, known)}")
            check_kind(where, name, value)
            if value is None or (value == "" and KINDS[name] is str):
                values.pop(name, None)
            elif name == "options":
                spelt = {str(option).replace("_", "-"): own for option, own in value.items()}
                values[name] = values.get(name, {}) | spelt
            else:
                values[name] = value
    resources = Resources(**values)
    check_options(resources)
    for name in ("nodes", "tasks_per_node", "cpus_per_task", "mem_gb", "signal_delay"):
        value = getattr(resources, name)
        if value is not None and not 0 < value < MOST:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0 and below {MOST}")
    counts = {"gpus-per-node": resources.gpus, "max-timeouts": resources.max_timeouts}
    for name, value in counts.items():
        if not 0 <= value < MOST:
            raise UserError(f"--{name}: must not be negative, and below {MOST}")
    if resources.gpus and resources.tasks != resources.gpus:
        raise UserError(
            f"--tasks-per-node {resources.tasks} with --gpus-per-node {resources.gpus_per_node}: "
            "each GPU gets one task; leave --tasks-per-node out, or give --gpus-per-node 0"
        )
    return resources


def check_options(resources: Resources) -> None:
    """Raises UserError for options that sbatch would not read as they are meant, or that contradict
    what is asked for elsewhere. An option that is null or false is left out of the script.
    """
    given = {name: v for name, v in resources.options.items() if v is not None and v is not False}
    for name in resources.options:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
            raise UserError(f"options: {name!r} is no name of an sbatch option")
    own = {"nodes": "nodes", "time": "time", "ntasks-per-node": "tasks_per_node"}
    own |= {"ntasks": "nodes and tasks_per_node", "cpus-per-task": "cpus_per_task"}
    for name in given.keys() & own.keys():
        raise UserError(
            f"options: {name}: give {own[name]} beside `options`, not in it: the launcher reads it "
            "there"
        )
    gpus = [n for n in given if re.fullmatch("gpus?|gpus-.*", n)]
    gpus += [n for n in given if n == "gres" and "gpu" in str(given[n])]
    instead = "gpus-per-node" in resources.options and "gpus-per-node" not in given
    if gpus and resources.gpus and not instead:
        asked = f"{gpus[0]}: {given[gpus[0]]}"
        raise UserError(
            f"options: {asked} beside gpus_per_node {resources.gpus_per_node}: say it as "
            "gpus_per_node: TYPE:COUNT, for example a100:4; or, if your cluster takes no other "
            f"way, gpus_per_node: COUNT and options: {{gpus-per-node: null, {asked}}}"
        )


def check_text(where: str, name: str, value: Any) -> None:
    """Raises UserError for a line break or another control character: each line of an sbatch script
    is an option or a command of its own.
    """
    for text in (name, value):
        if isinstance(text, str) and not text.isprintable():
            said = f"{where}: {name} {value!r} has a line break or control character"
            raise UserError(f"{said}: write it in one line")


def check_kind(where: str, name: str, value: Any) -> None:
    """Raises UserError unless a YAML value has the type of the field."""
    wanted = KINDS[name]
    check_text(where, name, value)
    for option, own in value.items() if isinstance(value, dict) else ():
        check_text(f"{where}: {name}", str(option), own)
        if isinstance(own, list | dict):
            said = f"{where}: {name}: {option} {brief(own)}"
            raise UserError(f"{said}: write it as sbatch takes it, in one text")
    if name == "gpus_per_node" and isinstance(value, str):
        if not re.fullmatch(r"(?:[A-Za-z][\w.-]*:)?\d{1,4}", value):
            raise UserError(
                f"{where}: gpus_per_node {value!r} is not a count, as 8, or TYPE:COUNT, as a100:8"
            )
        return
    fits = isinstance(value, wanted) and not isinstance(value, bool)
    if name == "environment" and fits:
        fits = all(isinstance(line, str) for line in value)
    if value is None or fits:
        return
    if name == "time":
        raise UserError(
            f"{where}: time {value}: write it as text with its unit, '90m', '72h' or, in quotes, "
            "'12:30:00'"
        )
    said = {int: "a whole number", str: "text", list: "a list of shell lines"}
    said |= {dict: "a block of 'option: value' lines"}
    raise UserError(f"{where}: {name} {brief(repr(value))} is not {said.get(wanted, 'a number')}")


def cluster_layer(path: str) -> tuple[str, dict[str, Any]]:
    """Returns the cluster file as a layer of resources: the one named, else slurm/cluster.yaml."""
    if path:
        return path, documents.read_yaml(documents.expanded(path))
    if CLUSTER_FILE.exists():
        return str(CLUSTER_FILE), documents.read_yaml(CLUSTER_FILE)
    return "defaults", {}


def flags_layer(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    return "the command line", {n: v for n, v in vars(arguments).items() if n in HELP}


def minutes(text: str) -> int:
    """Converts 72h, 90m, 2d, 1d12h, 90 or Slurm's [D-]HH[:MM[:SS]] to whole minutes, rounded up."""
    n = r"(\d{1,9})"
    units = re.fullmatch(rf"(?:{n}d)?(?:{n}h)?(?:{n}m)?(?:{n}s)?", text.strip())
    clock = re.fullmatch(rf"(?:{n}-)?{n}(?::{n})?(?::{n})?", text.strip())
    if text.strip() and units:
        days, hours, mins, seconds = (int(part or 0) for part in units.groups())
    elif clock and (clock[1] or clock[3]):
        days, first, second, third = (int(part or 0) for part in clock.groups())
        if clock[1] or clock[4]:  # D-HH[:MM[:SS]] or HH:MM:SS
            hours, mins, seconds = first, second, third
        else:  # sbatch reads 10:30 as MM:SS
            hours, mins, seconds = 0, first, second
    elif clock:
        days, hours, mins, seconds = 0, 0, int(clock[2]), 0
    else:
        raise UserError(f"--time {text}: write it as 72h, 90m, 2d, 1d12h or [D-]HH:MM:SS")
    total = ((days * 24 + hours) * 60 + mins) * 60 + seconds
    if total == 0:
        raise UserError(f"--time {text}: must be above 0")
    return -(-total // 60)


def check_time(resources: Resources) -> None:
    """Raises UserError, with the sum, for a time limit that leaves no work before the signal."""
    limit, delay = 60 * resources.minutes, resources.signal_delay
    left = limit - delay - EARLY
    if left < LEAST:
        enough = -(-(delay + EARLY + LEAST) // 60)
        shorter = limit - EARLY - LEAST
        other = f", or --signal-delay {shorter} or less" if shorter > 0 else ""
        raise UserError(
            f"--time {resources.time or DEFAULT_TIME} is too short: {limit} s - {delay} s of "
            f"--signal-delay - {EARLY} s that Slurm may signal early = {left} s of work between "
            f"two requeues, where at least {LEAST} s are wanted; take --time {enough}m or "
            f"more{other}"
        )


def scratch_folder(resources: Resources) -> Path:
    return documents.expanded(resources.scratch).absolute()
