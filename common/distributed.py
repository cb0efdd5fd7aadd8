"""Ranks: gathers, and what ranks agree on (common/run/ranks.py starts them).

Everything here works without a process group, as one rank. gloo serves CPU tensors, nccl CUDA
tensors. A rank's loss is the mean over its own rows; the mean of the ranks' losses and gradients
is the loss and gradient of the global batch.
"""

import os
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError


def rank() -> int:
    """Returns this process's number among all ranks, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def ranks_on_this_machine() -> int:
    """Returns how many ranks share this machine's cores: torchrun's number, else one per GPU."""
    if (said := variable("LOCAL_WORLD_SIZE", least=1)) is not None:
        return said
    return min(world_size(), torch.cuda.device_count()) or world_size()


def world_size() -> int:
    """Returns the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def variable(name: str, least: int = 0) -> int | None:
    """Reads a whole number from the environment, None if it holds none of this name. Raises
    UserError, said by the rank that has it, for anything else.
    """
    text = os.environ.get(name)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        said = f"{name}={text}" if text else f"{name} is empty"
        raise UserError(
            f"{said} in the environment: it must be a whole number, {least} or more", this_rank=True
        )
    return int(text)


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def gather(x: Tensor) -> Tensor:
    """Gathers (N,…) of each rank to (world*N,…) in rank order, without gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x)
    return out


def gather_with_grad(x: Tensor) -> Tensor:
    """Gathers (N,…) of each rank to (world*N,…) in rank order; every rank's gradient flows back."""
    return _Gather.apply(x) if world_size() > 1 else x


def all_reduce_sum(x: Tensor) -> Tensor:
    """Returns the sum of x over ranks, without gradient; overwrites x."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Returns the mean of x over ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    return all_reduce_sum(x.detach().clone()) / world_size()


def any_rank(flags: list[bool]) -> list[bool]:
    """Tells for each flag whether any rank has raised it; so ranks agree on a step."""
    if world_size() == 1:
        return flags
    raised = torch.tensor([int(f) for f in flags])
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return [bool(f) for f in raised]


def from_rank_zero(value):
    """Returns rank 0's value (any picklable object) on all ranks."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Returns every rank's value, in rank order."""
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

    The order of the sum is fixed: DistributedDataParallel rebuilds its buckets after the first
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
