"""Batch norm over ranks: PyTorch's on CUDA, ours on CPU, where SyncBatchNorm has no path.

PyTorch's CPU kernels sum (N,C) and channels-last inputs in float32 in one run of additions, which
rounds up to 20 times as much as these sums in float64.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from common.distributed import all_reduce_sum, world_size
from common.fast.compiled import kernel


def rank_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Gives a module batch norms over all ranks: PyTorch's on CUDA, ours on CPU.

    Ours serve one rank too: PyTorch's CPU kernel sums (N,C) inputs in float32, and gradients of the
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

    Sums are taken in float64, so that one rank and several round alike, and the variance loses
    nothing as the difference of two means: one pass, one small all-reduce. Within `views_apart` a
    batch is several views one after another, each with statistics of its own.
    """

    views = 1  # equal parts of the batch that are normalised apart
    counts = False  # whether ranks may hold different numbers of values, so that they are added up

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> "RankBatchNorm":
        """Returns the same layer, sharing the parameters and buffers of `norm`."""
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
        if not self.training:  # without running statistics it takes this rank's batch
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
        before = int(self.num_batches_tracked)
        self.num_batches_tracked += len(mean)
        for number, values in enumerate(zip(mean, unbiased, strict=True), start=before + 1):
            # without a momentum: the mean of all batches
            share = 1 / number if self.momentum is None else self.momentum
            for average, value in zip((self.running_mean, self.running_var), values, strict=True):
                kept = average.numpy()
                kept += share * (value - kept)


@contextlib.contextmanager
def views_apart(module: nn.Module, views: int) -> Iterator[None]:
    """Makes the batch norms of `module`, within the block, take a batch as so many views one after
    another and normalise each by itself: one forward then gives what one forward for each view
    gives. It may be used only if `can_keep_views_apart` holds.
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
    """Tells whether all batch norms of `module`, if there are any, are RankBatchNorm and expect
    images of the same size on every rank.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return all(isinstance(norm, RankBatchNorm) and not norm.counts for norm in norms)


def count_values(module: nn.Module) -> None:
    """Lets the batch norms of `module` take inputs whose size differs between ranks, as PyTorch's
    on CUDA do anyway; each then needs one more all-reduce. Views go through one at a time, since
    two views of the same size on one rank may differ in size on another.
    """
    for norm in module.modules():
        if isinstance(norm, RankBatchNorm):
            norm.counts = True


class _BatchNorm(torch.autograd.Function):
    """Batch norm in training: statistics over all ranks, separate ones for each view of `norm`."""

    @staticmethod
    @np.errstate(all="ignore")  # a run that diverges is stopped by its loss
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: RankBatchNorm):
        x = channels_last(x)
        y, views = torch.empty_like(x), norm.views
        rows, out = as_rows(x, views), as_rows(y, views)
        ctx.count = rows.shape[1] * world_size()  # ranks hold equally many images
        if norm.counts:
            ctx.count = int(all_reduce_sum(torch.tensor(rows.shape[1])))
        moments = sum_over_ranks(by_blocks(add_moments, [rows], [], 2)) / ctx.count
        mean = moments[:, 0]
        var = np.maximum(moments[:, 1] - mean**2, 0)
        norm.track(mean, var, ctx.count)
        inverse_std = 1 / np.sqrt(var + norm.eps)
        scale = inverse_std if weight is None else inverse_std * weight.detach().numpy()
        offset = np.zeros_like(mean)
        if bias is not None:
            offset += bias.detach().numpy()
        by_blocks(normalise, [rows, out], [mean, scale, offset])
        ctx.channels = mean, inverse_std, scale
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @np.errstate(all="ignore")
    def backward(ctx, grad: Tensor):
        (x,), (mean, inverse_std, scale) = ctx.saved_tensors, ctx.channels
        grad, views = channels_last(grad), len(mean)
        grad_x = torch.empty_like(grad)
        rows, of_rows, out = (as_rows(each, views) for each in (x, grad, grad_x))
        sums = by_blocks(add_gradients, [of_rows, rows], [mean, inverse_std], 2)
        own = torch.from_numpy(sums.sum(0)).to(grad.dtype)  # average_gradients adds up the ranks'
        means = sum_over_ranks(sums) / ctx.count
        by_blocks(
            give_back,
            [of_rows, rows, out],
            [mean, inverse_std, means[:, 0], means[:, 1], scale],
        )
        needed = ctx.needs_input_grad
        return grad_x, own[1] if needed[1] else None, own[0] if needed[2] else None, None


# -- the passes over memory: sums are taken in float64, all else in the input's own precision ------

# values that a thread takes at once; sums are those of blocks, added in their order
BLOCK = 1 << 18
WIDTH = 1024  # values of a row: narrow ones are joined, since short loops are slow


def by_blocks(
    function: Callable, rows: Sequence[np.ndarray], channels: Sequence[np.ndarray], sums: int = 0
) -> np.ndarray:
    """Calls function(*rows, *channels, totals) for blocks of each view's rows, on as many threads
    as PyTorch has. rows (views,n,C) are cut along n; channels (views,C) go to every block of their
    view, in the precision of rows; what the blocks add to their totals is returned, added up, as
    float64 (views,sums,C), if there is any.
    """
    views, n, width = rows[0].shape
    joined = math.gcd(n, max(1, WIDTH // width))
    rows = [each.reshape(views, n // joined, joined * width) for each in rows]
    channels = np.tile(np.array(channels, rows[0].dtype), joined)
    size = max(1, BLOCK // (joined * width))
    totals = np.zeros((views, -(-n // (joined * size)), sums, joined * width))

    def work(place: tuple[int, int]) -> None:
        view, number = place
        cut = slice(number * size, (number + 1) * size)
        function(*[r[view, cut] for r in rows], *[c[view] for c in channels], totals[place])

    places = [*itertools.product(range(views), range(totals.shape[1]))]
    threads = min(torch.get_num_threads(), len(places))
    for _ in pool(threads).map(work, places) if threads > 1 else map(work, places):
        pass
    if not sums:
        return totals
    return totals.sum(1).reshape(views, sums, joined, width).sum(2)


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@kernel
def add_moments(x, totals):
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            value = np.float64(x[r, c])  # the square of a float32 is exact in float64
            totals[0, c] += value
            totals[1, c] += value * value


@kernel
def normalise(x, y, mean, scale, offset, _):
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            y[r, c] = (x[r, c] - mean[c]) * scale[c] + offset[c]


@kernel
def add_gradients(grad, x, mean, inverse_std, totals):
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            totals[0, c] += grad[r, c]
            totals[1, c] += grad[r, c] * ((x[r, c] - mean[c]) * inverse_std[c])


@kernel
def give_back(grad, x, grad_x, mean, inverse_std, of_offset, of_slope, scale, _):
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            normed = (x[r, c] - mean[c]) * inverse_std[c]
            grad_x[r, c] = (grad[r, c] - of_offset[c] - normed * of_slope[c]) * scale[c]


def sum_over_ranks(values: np.ndarray) -> np.ndarray:
    return all_reduce_sum(torch.from_numpy(values)).numpy() if world_size() > 1 else values


def channels_last(x: Tensor) -> Tensor:
    """Returns (N,C,…) with its channels last in memory, a copy only if they are not."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def as_rows(x: Tensor, views: int) -> np.ndarray:
    """Turns (N,C,…) with its channels last in memory into (views, rows, C), the same memory."""
    return x.detach().movedim(1, -1).numpy().reshape(views, -1, x.shape[1])
