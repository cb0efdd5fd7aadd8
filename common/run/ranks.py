"""The start of the ranks: from torchrun's variables, those of a Slurm step, or as one process.

For settings that are not valid, the rank that has them says one line that names the variable. If
not all ranks come, they end after WAIT; if two have one GPU, they end before NCCL starts.
"""

import datetime
import os
import re
import socket
import threading
import zlib

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from common.distributed import gather_objects, variable
from common.errors import UserError
from common.run.output import outlast_readers

WAIT = datetime.timedelta(minutes=10)  # for the last rank to come; imports may be slow on one node
PATIENCE = 10.0  # seconds after which a rank says that it waits
OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADVICE = "start ranks with torchrun or srun, or unset it for one process"


def start() -> torch.device:
    """Joins the process group that torchrun or Slurm describes, if any; returns the device.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Under srun they are
    taken from the step's SLURM_* variables if RANK is missing.
    """
    outlast_readers()
    ranks_from_slurm()
    ranks, local_rank = ranks_and_local_rank()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > 1 and ranks > 1 and local_rank is None:
        raise wrong(f"LOCAL_RANK is not set: which of the {gpus} GPUs is this rank's?")
    device = torch.device("cpu")
    if gpus:  # modulo: a scheduler may show each task its own GPU only
        device = torch.device("cuda", (local_rank or 0) % gpus)
        torch.cuda.set_device(device)
    if ranks > 1 and not dist.is_initialized():
        meet("cpu:gloo,cuda:nccl" if gpus else "gloo")
        if gpus:
            refuse_shared_gpus(device)
    return device


def wrong(text: str) -> UserError:
    return UserError(text, this_rank=True)


def ranks_and_local_rank() -> tuple[int, int | None]:
    """Returns the number of ranks, and this one's number on its machine if it is said. Raises
    UserError for variables that are half-set, malformed or contradict each other.
    """
    given = [name for name in OWN if name in os.environ]
    if not given:
        return 1, None
    for name in ("RANK", "WORLD_SIZE"):
        if name not in os.environ:
            raise wrong(f"{given[0]} is set in the environment, but {name} is not: {ADVICE}")
    rank, local_rank = variable("RANK"), variable("LOCAL_RANK")
    ranks, here = variable("WORLD_SIZE", least=1), variable("LOCAL_WORLD_SIZE", least=1)
    pairs = [("RANK", rank, "WORLD_SIZE", ranks), ("LOCAL_RANK", local_rank, "WORLD_SIZE", ranks)]
    pairs += [("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", here)]
    for name, number, of, count in pairs:
        if number is not None and count is not None and number >= count:
            raise wrong(f"{name}={number} must be below {of}={count}: {ADVICE}")
    if here is not None and here > ranks:
        raise wrong(f"LOCAL_WORLD_SIZE={here} must not be above WORLD_SIZE={ranks}: {ADVICE}")
    if ranks > 1:
        if not os.environ.get("MASTER_ADDR", "").strip():
            raise wrong(f"MASTER_ADDR, the host of rank 0, is not set, but WORLD_SIZE={ranks} is")
        port = variable("MASTER_PORT", least=1)
        if port is None or port > 65535:
            said = "is not set" if port is None else f"is {port}"
            raise wrong(f"MASTER_PORT {said}: it must be a free port of rank 0, 1 to 65535")
    return ranks, local_rank


def ranks_from_slurm() -> None:
    """Sets torchrun's variables from those of an srun step of several tasks.

    SLURM_STEP_NUM_TASKS is set by srun only, so a shell inside an allocation stays one process.
    """
    if "RANK" in os.environ:
        return
    rank, tasks = variable("SLURM_PROCID"), variable("SLURM_STEP_NUM_TASKS", least=1)
    if tasks is None and rank:
        raise wrong(
            f"SLURM_PROCID={rank}, but SLURM_STEP_NUM_TASKS is not set: pass all SLURM_ variables "
            "on to the container, or unset SLURM_PROCID for one process"
        )
    if tasks is None or tasks == 1:
        return
    found = {"RANK": rank, "LOCAL_RANK": variable("SLURM_LOCALID")}
    for name, source in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID")):
        if (number := found[name]) is None or number >= tasks:
            said = "is not set" if number is None else f"is {number}"
            raise wrong(
                f"{source} {said} in a Slurm step of SLURM_STEP_NUM_TASKS={tasks}: pass all SLURM_ "
                "variables on to the container, or start it with srun"
            )
    if variable("WORLD_SIZE") not in (None, tasks):
        raise wrong(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but the Slurm step has {tasks} tasks "
            "(SLURM_STEP_NUM_TASKS): unset WORLD_SIZE"
        )
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = first_host()
    os.environ |= {name: str(number) for name, number in (found | {"WORLD_SIZE": tasks}).items()}
    # one port per job, step and attempt, so that two jobs on one node do not meet, and a requeued
    # job does not meet its last attempt; it lies below the ports that systems give out themselves
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    attempt = " ".join(os.environ.get(name, "0") for name in names)
    os.environ.setdefault("MASTER_PORT", str(20000 + zlib.crc32(attempt.encode()) % 12000))


def first_host() -> str:
    """Finds the first host of the step's node list, `gpu[01-04,07],big1`, without scontrol, which
    containers lack; raises UserError if it cannot be told.
    """
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    source = next((name for name in names if os.environ.get(name)), None)
    if source is None:
        raise wrong(f"{names[0]} is not set: set MASTER_ADDR to the name of the step's first node")
    first = re.match(r"((?:[\w.-]|\[\w+[\w,-]*\])+)(?:,|$)", os.environ[source])
    if first is None:
        raise wrong(
            f"{source}={os.environ[source]} is no list of nodes: set MASTER_ADDR to the name of "
            "the step's first node"
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[1])  # of [01-04,07] the 01


def meet(backend: str) -> None:
    """Joins the other ranks; raises UserError if they have not all come within WAIT."""
    rank, ranks = os.environ["RANK"], os.environ["WORLD_SIZE"]
    where = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    limit = f"{WAIT.total_seconds() / 60:g} min"
    text = f"rank {rank} of {ranks} waits for the others at {where}, at most {limit}"
    timer = threading.Timer(PATIENCE, print, (text,), {"flush": True})
    timer.daemon = True
    timer.start()
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=WAIT))
        store = dist.PrefixStore("default_pg", store)
        dist.init_process_group(backend, store=store, rank=int(rank), world_size=int(ranks))
        store.set_timeout(default_pg_timeout)
    except (RuntimeError, ValueError) as error:
        said = str(error).split("\n")[0]
        raise wrong(
            f"rank {rank} of {ranks} has not met the others at {where}, waiting at most {limit} "
            f"({said}): start all ranks with the same two, which every machine can reach"
        ) from None
    finally:
        timer.cancel()


def refuse_shared_gpus(device: torch.device) -> None:
    """Raises UserError, on all ranks, if two have the same GPU: NCCL would say less as it fails."""
    own = str(torch.cuda.get_device_properties(device).uuid), socket.gethostname()
    all_ = gather_objects(own)
    for rank, (gpu, host) in enumerate(all_):
        if (first := [g for g, _ in all_].index(gpu)) < rank:
            here = [g for g, h in all_ if h == host]
            raise UserError(
                f"ranks {first} and {rank} have the same GPU: {len(here)} ranks on {host} and "
                f"{len({*here})} GPUs that they see; start one rank for each GPU "
                f"(torchrun --nproc_per_node {len({*here})})"
            )
