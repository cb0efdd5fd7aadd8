"""Ranks: start-up from torchrun, Slurm or nothing; gathers; batch-norm statistics over ranks.

Everything here works without a process group, as one rank. gloo serves CPU tensors, nccl CUDA
tensors. A rank's loss is the mean over its own rows; the mean of the ranks' losses and gradients
is the loss and gradient of the global batch.
"""

import contextlib
import os
import subprocess
import zlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common import batch_norm


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


def rank_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Batch norms that take their statistics over all ranks: PyTorch's on CUDA, ours on CPU.

    Ours also on one rank: PyTorch's CPU kernel sums (N,C) inputs in float32, and gradients of the
    first step were once 2 % off the float64 ones on one rank, 2e-6 on two.
    """
    if device.type == "cuda":
        several = world_size() > 1
        return nn.SyncBatchNorm.convert_sync_batchnorm(module) if several else module
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, RankBatchNorm.of(child))
        else:
            rank_batch_norm(child, device)
    return module


class RankBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all ranks on CPU, where PyTorch's SyncBatchNorm has no path.

    Mean first, then the variance about it: two small all-reduces, and no cancellation. Sums are
    taken in float64, so that one rank and several round alike. Within `views_apart` a batch is
    several views one after another, each with statistics of its own.
    """

    views = 1  # equal parts of the batch that are normalised apart

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> "RankBatchNorm":
        """The same layer, sharing the parameters and buffers of `norm`."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        new.weight, new.bias = norm.weight, norm.bias
        new.running_mean, new.running_var = norm.running_mean, norm.running_var
        new.num_batches_tracked, new.training = norm.num_batches_tracked, norm.training
        return new

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"batch norm takes (N,C,…), got {(*x.shape,)}")

    @torch.compiler.disable  # numpy arrays are no part of a graph
    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:  # without running statistics too: those of this rank's batch
            return super().forward(x)
        if x.numel() // (self.views * x.shape[1]) < 2 and world_size() == 1:
            raise ValueError(f"batch norm over one value of each channel: (N,C,…) is {(*x.shape,)}")
        if x.dtype in (torch.bfloat16, torch.float16):  # autocast: statistics in full precision
            x = x.float()
        return _BatchNorm.apply(x, self.weight, self.bias, self)

    def track(self, mean: np.ndarray, var: np.ndarray, count: int) -> None:
        """Moves the running statistics by the views' mean and variance (views, C), over `count`
        values each, in the views' order, as one forward after another does.
        """
        if not self.track_running_stats or self.running_mean is None or not self.training:
            return
        unbiased = var * (count / max(1, count - 1))
        running = [buffer.detach().numpy() for buffer in (self.running_mean, self.running_var)]
        for values in zip(mean, unbiased, strict=True):
            self.num_batches_tracked.add_(1)
            share = self.momentum  # None: the mean of all batches
            share = 1 / int(self.num_batches_tracked) if share is None else share
            for average, value in zip(running, values, strict=True):
                average += share * (value - average)


@contextlib.contextmanager
def views_apart(module: nn.Module, views: int) -> Iterator[None]:
    """Within it, the batch norms of `module` take a batch as so many views one after another and
    normalise each by itself: one forward then gives what one forward for each view gives. Only
    where `can_keep_views_apart` holds.
    """
    norms = [m for m in module.modules() if isinstance(m, RankBatchNorm)]
    for norm in norms:
        norm.views = views
    try:
        yield
    finally:
        for norm in norms:
            del norm.views


def can_keep_views_apart(module: nn.Module) -> bool:
    """Whether all of its batch norms, if any, are ours."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return all(isinstance(norm, RankBatchNorm) for norm in norms)


class _BatchNorm(torch.autograd.Function):
    """Batch norm in training with the statistics of all ranks, of each view of `norm` apart."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: RankBatchNorm):
        x, threads = channels_last(x), torch.get_num_threads()
        parts = as_rows(x, norm.views)
        own, squares = batch_norm.moments(parts, threads)
        rows = parts.shape[1]
        ctx.count = rows * world_size()  # ranks hold equally many images
        mean = sum_over_ranks(own) / world_size()
        var = sum_over_ranks(squares + rows * (own - mean) ** 2) / ctx.count
        norm.track(mean, var, ctx.count)
        ctx.mean, ctx.inverse_std = mean.astype(parts.dtype), 1 / np.sqrt(var + norm.eps)
        ctx.scale = ctx.inverse_std if weight is None else ctx.inverse_std * weight.numpy()
        ctx.scale = ctx.scale.astype(parts.dtype)
        shift = np.zeros_like(ctx.mean[0]) if bias is None else bias.numpy()
        y = torch.empty_like(x)
        out = as_rows(y, norm.views)
        batch_norm.normalise(parts, ctx.mean, ctx.scale, shift, out, threads)
        ctx.save_for_backward(x)
        ctx.affine = weight is not None
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), mean, threads = ctx.saved_tensors, ctx.mean, torch.get_num_threads()
        parts, grads = as_rows(x, len(mean)), as_rows(channels_last(grad), len(mean))
        grad_bias, products = batch_norm.gradient_sums(grads, parts, mean, threads)
        grad_weight = products * ctx.inverse_std
        offset, slope = sum_over_ranks(np.stack([grad_bias, grad_weight])) / ctx.count
        columns = [c.astype(parts.dtype) for c in (offset, slope * ctx.inverse_std)]
        grad_x = torch.empty_like(x)
        out = as_rows(grad_x, len(mean))
        batch_norm.input_gradient(grads, parts, mean, *columns, ctx.scale, out, threads)
        if not ctx.affine:
            return grad_x, None, None, None
        totals = (torch.from_numpy(g.sum(axis=0)).to(x.dtype) for g in (grad_weight, grad_bias))
        return grad_x, *totals, None


def sum_over_ranks(values: np.ndarray) -> np.ndarray:
    return all_reduce_sum(torch.from_numpy(values.copy())).numpy() if world_size() > 1 else values


def channels_last(x: Tensor) -> Tensor:
    """(N,C,…) with its channels last in memory, a copy only where they are not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def as_rows(x: Tensor, views: int) -> np.ndarray:
    """(N,C,…) with its channels last in memory -> (views, rows, C), the same memory."""
    return x.movedim(1, -1).view(views, -1, x.shape[1]).numpy()


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
