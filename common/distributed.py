"""Ranks: start-up from torchrun, Slurm or nothing; gathers; what ranks agree on.

Everything here works without a process group, as one rank. gloo serves CPU tensors, nccl CUDA
tensors. A rank's loss is the mean over its own rows; the mean of the ranks' losses and gradients
is the loss and gradient of the global batch.
"""

import os
import subprocess
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """This process's number among all ranks, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks_on_this_machine() -> int:
    """How many ranks share this machine's cores: torchrun says it, else one per GPU in use."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return min(world_size(), torch.cuda.device_count()) or world_size()


def world_size() -> int:
    """The number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def start() -> torch.device:
    """Joins the process group that torchrun or Slurm describes, if any; returns the device.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Under srun they are
    taken from the step's SLURM_* variables where RANK is missing.
    """
    ranks_from_slurm()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    use_cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if use_cuda:  # modulo: a scheduler may show each task its own GPU only
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    if use_cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group(backend="cpu:gloo,cuda:nccl" if use_cuda else "gloo")
    return device


def ranks_from_slurm() -> None:
    """Sets torchrun's variables from those of an srun step of several tasks.

    SLURM_STEP_NUM_TASKS is set by srun only, so a shell inside an allocation stays one process.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS")
    if "RANK" in os.environ or tasks is None or int(tasks) < 2:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = tasks
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ["SLURM_JOB_NODELIST"])
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]
    # one port per job, step and attempt, so that neither two jobs on one node meet, nor a requeued
    # job what its last attempt left behind; below the ports that systems give out by themselves
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    attempt = " ".join(os.environ.get(name, "0") for name in names)
    os.environ.setdefault("MASTER_PORT", str(20000 + zlib.crc32(attempt.encode()) % 12000))


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def gather(x: Tensor) -> Tensor:
    """(N,…) of each rank -> (world*N,…) in rank order, without gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x)
    return out


def gather_with_grad(x: Tensor) -> Tensor:
    """(N,…) of each rank -> (world*N,…) in rank order; the gradient of every rank flows back."""
    return _Gather.apply(x) if world_size() > 1 else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over ranks, without gradient; overwrites x."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of x over ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    return all_reduce_sum(x.detach().clone()) / world_size()


def any_rank(flags: list[bool]) -> list[bool]:
    """For each flag whether any rank has raised it: how ranks agree on a step."""
    if world_size() == 1:
        return flags
    raised = torch.tensor([int(f) for f in flags])
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return [bool(f) for f in raised]


def from_rank_zero(value):
    """Rank 0's value (any picklable object) on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    found = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    if world_size() > 1:
        any_rank([False])


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Replaces every gradient by its mean over ranks, in one all-reduce of one flat tensor.

    Plain and in one fixed order: DistributedDataParallel rebuilds its buckets after the first
    step, so that with more than two ranks a resumed run would add in another order and lose
    bit-identity. The price is that communication does not overlap the backward pass.
    """
    if world_size() == 1:
        return
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view(grad.shape))


def same_on_all_ranks(module: nn.Module) -> None:
    """Overwrites parameters and buffers with rank 0's, as at the start of a run."""
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        first = rank() * ctx.rows
        return grad[first : first + ctx.rows]
