"""Batch norm over ranks: PyTorch's on CUDA, ours on CPU, where SyncBatchNorm has no path.

PyTorch's CPU kernels sum (N,C) and channels-last inputs in float32 in one run of additions, which
rounds up to 20 times as much as these sums in float64.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.distributed import all_reduce_sum, world_size


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
    """Batch norm over all ranks on CPU.

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

    @torch.compiler.disable  # its Function moves buffers
    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:  # without running statistics too: those of this rank's batch
            return super().forward(x)
        if x.numel() // (self.views * x.shape[1]) < 2 and world_size() == 1:
            raise ValueError(f"batch norm over one value of each channel: (N,C,…) is {(*x.shape,)}")
        if x.dtype in (torch.bfloat16, torch.float16):  # autocast: statistics in full precision
            x = x.float()
        return _BatchNorm.apply(x, self.weight, self.bias, self)

    def track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Moves the running statistics by the views' mean and variance (views, C), over `count`
        values each, in the views' order, as one forward after another does.
        """
        if not self.track_running_stats or self.running_mean is None or not self.training:
            return
        unbiased = var * (count / max(1, count - 1))
        for values in zip(mean, unbiased, strict=True):
            self.num_batches_tracked.add_(1)
            share = self.momentum  # None: the mean of all batches
            share = 1 / int(self.num_batches_tracked) if share is None else share
            for average, value in zip((self.running_mean, self.running_var), values, strict=True):
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
        x = channels_last(x)
        parts = as_rows(x, norm.views)
        ctx.count = parts.shape[1] * world_size()  # ranks hold equally many images
        mean = sum_over_ranks(parts.sum(1, dtype=torch.float64)) / ctx.count
        centred = parts - mean.to(x.dtype)[:, None]
        var = sum_over_ranks(centred.square().sum(1, dtype=torch.float64)) / ctx.count
        norm.track(mean, var, ctx.count)
        inverse_std = (var + norm.eps).rsqrt()
        normed = centred.mul_(inverse_std.to(x.dtype)[:, None])
        y = torch.empty_like(x)
        if weight is None:
            as_rows(y, norm.views).copy_(normed)
        else:
            torch.addcmul(bias, normed, weight, out=as_rows(y, norm.views))
        ctx.save_for_backward(normed, inverse_std, weight)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        normed, inverse_std, weight = ctx.saved_tensors
        grad = channels_last(grad)
        kind, rows = grad.dtype, as_rows(grad, len(normed))
        grad_bias = rows.sum(1, dtype=torch.float64)
        grad_weight = (rows * normed).sum(1, dtype=torch.float64)
        means = sum_over_ranks(torch.stack([grad_bias, grad_weight])) / ctx.count
        offset, slope = means.to(kind)[:, :, None]
        scale = (inverse_std if weight is None else inverse_std * weight).to(kind)[:, None]
        grad_x = torch.empty_like(grad)
        out = as_rows(grad_x, len(normed))
        torch.addcmul(rows - offset, normed, slope, value=-1, out=out).mul_(scale)
        if weight is None:
            return grad_x, None, None, None
        return grad_x, grad_weight.sum(0).to(kind), grad_bias.sum(0).to(kind), None


def sum_over_ranks(values: Tensor) -> Tensor:
    return all_reduce_sum(values) if world_size() > 1 else values


def channels_last(x: Tensor) -> Tensor:
    """(N,C,…) with its channels last in memory, a copy only where they are not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def as_rows(x: Tensor, views: int) -> Tensor:
    """(N,C,…) with its channels last in memory -> (views, rows, C), the same memory."""
    return x.movedim(1, -1).view(views, -1, x.shape[1])
