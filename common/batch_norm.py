"""The passes over memory of a batch norm on CPU, compiled: arrays in, arrays out.

PyTorch's CPU kernels sum (N,C) and channels-last inputs in float32 in one run of additions, up to
20 times the error of these, which sum blocks of rows in float64. The layer is in
`common.distributed`. Blocks have a fixed size: results do not depend on the number of threads.

Arrays are (views, rows, C) with channels last, float32 or float64; statistics are float64, and each
view has its own.
"""

import concurrent.futures
import functools
import itertools
from collections.abc import Callable

import numpy as np
from numba import njit

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
