"""Ranks: start-up from torchrun, Slurm or nothing; gathers; batch-norm statistics over ranks.

Everything here works without a process group, as one rank. gloo serves CPU tensors, nccl CUDA
tensors. A rank's loss is the mean over its own rows; the mean of the ranks' losses and gradients
is the loss and gradient of the global batch.
"""

import os
import subprocess

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def rank() -> int:
    """This process's number among all ranks, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


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
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
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
    # one port per job and step, so that two jobs on one node do not meet
    job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
    os.environ.setdefault("MASTER_PORT", str(20000 + (job * 7 + step) % 20000))


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


def sync_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Batch norms that take their statistics over all ranks: PyTorch's on CUDA, ours on CPU.

    Without a process group the module comes back as it is.
    """
    if world_size() == 1:
        return module
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, CpuSyncBatchNorm.of(child))
        else:
            sync_batch_norm(child, device)
    return module


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all ranks on CPU, where PyTorch's SyncBatchNorm has no path.

    Mean first, then the variance about it: two small all-reduces, and no cancellation.
    """

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> "CpuSyncBatchNorm":
        """The same layer, sharing the parameters and buffers of `norm`."""
        new = cls(norm.num_features, norm.eps, norm.momentum, norm.affine)
        new.weight, new.bias = norm.weight, norm.bias
        new.running_mean, new.running_var = norm.running_mean, norm.running_var
        new.num_batches_tracked, new.training = norm.num_batches_tracked, norm.training
        return new

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"batch norm takes (N,C,…), got {(*x.shape,)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var, count = _BatchNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            unbiased = var * (count / max(1, count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return y


class _BatchNorm(torch.autograd.Function):
    """Batch norm in training with the statistics of all ranks, summed in float64."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        axes, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1] * world_size()  # ranks hold equally many images
        wide = x.double()
        mean = all_reduce_sum(wide.sum(axes)) / count
        var = all_reduce_sum((wide - mean.view(shape)).square().sum(axes)) / count
        # PyTorch's own kernel applies them, so that one rank and several round alike
        y = F.batch_norm(x, mean.to(x.dtype), var.to(x.dtype), weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.axes, ctx.shape, ctx.count = axes, shape, count
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, count

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor):
        x, weight, mean, inverse_std = ctx.saved_tensors
        axes, shape, count = ctx.axes, ctx.shape, ctx.count
        wide = grad.double()
        normalised = (x.double() - mean.view(shape)) * inverse_std.view(shape)
        grad_bias, grad_weight = wide.sum(axes), (wide * normalised).sum(axes)
        sums = all_reduce_sum(torch.stack([grad_bias, grad_weight])) / count
        scale = inverse_std if weight is None else inverse_std * weight.double()
        grad_x = wide - sums[0].view(shape) - normalised * sums[1].view(shape)
        grad_x = (grad_x * scale.view(shape)).to(x.dtype)
        if weight is None:
            return grad_x, None, None, None
        return grad_x, grad_weight.to(x.dtype), grad_bias.to(x.dtype), None


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
