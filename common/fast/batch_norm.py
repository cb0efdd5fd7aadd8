"""Batch norm over ranks: PyTorch's on CUDA, ours on CPU, whose passes over memory are compiled.

PyTorch's CPU kernels sum (N,C) and channels-last inputs in float32 in one run of additions, up to
20 times the error of these, which sum blocks of rows in float64. Blocks have a fixed size: results
do not depend on the number of threads.

Arrays in, arrays out: (views, rows, C) with channels last, float32 or float64; statistics are
float64, and each view has its own.
"""

import concurrent.futures
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from common.distributed import all_reduce_sum, world_size

BLOCK_VALUES = (
    16384  # values of a block: 64 KB in float32 stay in a core's cache between two passes
)
THREAD_VALUES = 2**17  # fewer values than this for each thread are not worth waking it

compiled = njit(cache=True, nogil=True, fastmath={"contract"})


def moments(x: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sum of squares about it of each column of each view -> (views, C) each."""
    means, squares = block_statistics(x)
    in_threads(x, threads, block_moments, (x, block_rows(x), means, squares))
    return combined_moments(means, squares, *x.shape[:2], block_rows(x))


def normalise(
    x: np.ndarray, mean: np.ndarray, scale: np.ndarray, shift: np.ndarray, out: np.ndarray, n: int
) -> None:
    """out = (x - mean) * scale + shift, column by column, on up to n threads; mean and scale are
    (views, C), shift is (C,).
    """
    in_threads(x, n, block_normalise, (x, block_rows(x), mean, scale, shift, out))


def gradient_sums(
    grad: np.ndarray, x: np.ndarray, mean: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of grad and of grad * (x - mean) over each view's rows -> (views, C) each."""
    sums, products = block_statistics(x)
    in_threads(x, threads, block_gradient_sums, (grad, x, block_rows(x), mean, sums, products))
    return combined_sums(sums, len(x)), combined_sums(products, len(x))


def input_gradient(
    grad: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    offset: np.ndarray,
    slope: np.ndarray,
    scale: np.ndarray,
    out: np.ndarray,
    threads: int,
) -> None:
    """out = (grad - offset - (x - mean) * slope) * scale, column by column; (views, C) each."""
    arrays = (grad, x, block_rows(x), mean, offset, slope, scale, out)
    in_threads(x, threads, block_input_gradient, arrays)


def block_rows(x: np.ndarray) -> int:
    return max(1, BLOCK_VALUES // x.shape[2])


def blocks_of(x: np.ndarray) -> int:
    """How many blocks all views have; no block has rows of two."""
    return len(x) * -(-x.shape[1] // block_rows(x))


def block_statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Room for two statistics of all blocks, (blocks, C) each."""
    shape = blocks_of(x), x.shape[2]
    return np.empty(shape), np.empty(shape)


def in_threads(x: np.ndarray, threads: int, kernel: Callable, arrays: tuple) -> None:
    """kernel(*arrays, first, last) for all blocks of x, split over threads where it pays."""
    blocks = blocks_of(x)
    parts = max(1, min(threads, blocks, x.size // THREAD_VALUES))
    if parts == 1:
        kernel(*arrays, 0, blocks)
        return
    bounds = np.linspace(0, blocks, parts + 1).astype(int)
    rest = itertools.pairwise(bounds[1:])
    others = [pool(parts).submit(kernel, *arrays, *span) for span in rest]
    kernel(*arrays, 0, bounds[1])
    for other in others:
        other.result()


@functools.cache
def pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads - 1, "batch-norm")


@compiled
def span(x, block, b):
    """View, first row and last of block b."""
    in_view = -(-x.shape[1] // block)
    start = b % in_view * block
    return b // in_view, start, min(start + block, x.shape[1])


@compiled
def block_moments(x, block, means, squares, first, last):
    columns = x.shape[2]
    for b in range(first, last):
        v, start, stop = span(x, block, b)
        mean, square = means[b], squares[b]
        mean[:] = 0.0
        square[:] = 0.0
        for i in range(start, stop):
            for j in range(columns):
                mean[j] += x[v, i, j]
        for j in range(columns):
            mean[j] /= stop - start
        for i in range(start, stop):
            for j in range(columns):
                difference = x[v, i, j] - mean[j]
                square[j] += difference * difference


@compiled
def block_normalise(x, block, mean, scale, shift, out, first, last):
    for b in range(first, last):
        v, start, stop = span(x, block, b)
        for i in range(start, stop):
            for j in range(x.shape[2]):
                out[v, i, j] = (x[v, i, j] - mean[v, j]) * scale[v, j] + shift[j]


@compiled
def block_gradient_sums(grad, x, block, mean, sums, products, first, last):
    for b in range(first, last):
        v, start, stop = span(x, block, b)
        total, product = sums[b], products[b]
        total[:] = 0.0
        product[:] = 0.0
        for i in range(start, stop):
            for j in range(x.shape[2]):
                total[j] += grad[v, i, j]
                product[j] += grad[v, i, j] * (x[v, i, j] - mean[v, j])


@compiled
def block_input_gradient(grad, x, block, mean, offset, slope, scale, out, first, last):
    for b in range(first, last):
        v, start, stop = span(x, block, b)
        for i in range(start, stop):
            for j in range(x.shape[2]):
                difference = (x[v, i, j] - mean[v, j]) * slope[v, j]
                out[v, i, j] = (grad[v, i, j] - offset[v, j] - difference) * scale[v, j]


# in the order of the blocks, and without fused multiplications


@njit(cache=True)
def combined_moments(means, squares, views, rows, block):
    """A view's moments from those of its blocks, (blocks, C) each -> (views, C) each."""
    in_view, columns = len(means) // views, means.shape[1]
    mean, square = np.zeros((views, columns)), np.zeros((views, columns))
    for v in range(views):
        for b in range(in_view):
            size = float(min(block, rows - b * block))
            for j in range(columns):
                mean[v, j] += means[v * in_view + b, j] * size
        for j in range(columns):
            mean[v, j] /= rows
        for b in range(in_view):
            size = float(min(block, rows - b * block))
            for j in range(columns):
                difference = means[v * in_view + b, j] - mean[v, j]
                square[v, j] += squares[v * in_view + b, j] + size * (difference * difference)
    return mean, square


@njit(cache=True)
def combined_sums(sums, views):
    """(blocks, C) -> (views, C)."""
    in_view, columns = len(sums) // views, sums.shape[1]
    total = np.zeros((views, columns))
    for b in range(len(sums)):
        for j in range(columns):
            total[b // in_view, j] += sums[b, j]
    return total


# -- the layer ------------------------------------------------------------------------------------


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
        own, squares = moments(parts, threads)
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
        normalise(parts, ctx.mean, ctx.scale, shift, out, threads)
        ctx.save_for_backward(x)
        ctx.affine = weight is not None
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), mean, threads = ctx.saved_tensors, ctx.mean, torch.get_num_threads()
        parts, grads = as_rows(x, len(mean)), as_rows(channels_last(grad), len(mean))
        grad_bias, products = gradient_sums(grads, parts, mean, threads)
        grad_weight = products * ctx.inverse_std
        offset, slope = sum_over_ranks(np.stack([grad_bias, grad_weight])) / ctx.count
        columns = [c.astype(parts.dtype) for c in (offset, slope * ctx.inverse_std)]
        grad_x = torch.empty_like(x)
        out = as_rows(grad_x, len(mean))
        input_gradient(grads, parts, mean, *columns, ctx.scale, out, threads)
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
