"""The passes over memory of a batch norm on CPU, compiled: arrays in, arrays out.

PyTorch's CPU kernels sum (N,C) and channels-last inputs in float32 in one run of additions, up to
20 times the error of these, which sum blocks of rows in float64. The layer is in
`common.distributed`. Blocks have a fixed size: results do not depend on the number of threads.

Arrays are (rows, C) with channels last, float32 or float64; statistics float64.
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
    """Mean and sum of squares about it of each column of x (rows, C) -> (C,), (C,)."""
    sizes, means, squares = block_arrays(x)
    in_threads(x, threads, block_moments, (x, block_rows(x), means, squares))
    mean = (means * sizes).sum(axis=0) / len(x)
    return mean, (squares + sizes * (means - mean) ** 2).sum(axis=0)


def normalise(
    x: np.ndarray, mean: np.ndarray, scale: np.ndarray, shift: np.ndarray, out: np.ndarray, n: int
) -> None:
    """out = (x - mean) * scale + shift, column by column, on up to n threads."""
    in_threads(x, n, block_normalise, (x, block_rows(x), mean, scale, shift, out))


def gradient_sums(
    grad: np.ndarray, x: np.ndarray, mean: np.ndarray, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of grad and of grad * (x - mean) over the rows -> (C,), (C,)."""
    _, sums, products = block_arrays(x)
    in_threads(x, threads, block_gradient_sums, (grad, x, block_rows(x), mean, sums, products))
    return sums.sum(axis=0), products.sum(axis=0)


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
    """out = (grad - offset - (x - mean) * slope) * scale, column by column."""
    arrays = (grad, x, block_rows(x), mean, offset, slope, scale, out)
    in_threads(x, threads, block_input_gradient, arrays)


def block_rows(x: np.ndarray) -> int:
    return max(1, BLOCK_VALUES // x.shape[1])


def block_arrays(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows of each block, (blocks, 1), and room for two statistics, (blocks, C) each."""
    starts = np.arange(0, len(x), block_rows(x))
    sizes = np.diff(starts, append=len(x)).astype(np.float64)[:, None]
    return sizes, np.empty((len(starts), x.shape[1])), np.empty((len(starts), x.shape[1]))


def in_threads(x: np.ndarray, threads: int, kernel: Callable, arrays: tuple) -> None:
    """kernel(*arrays, first, last) for all blocks of x, split over threads where it pays."""
    blocks = -(-len(x) // block_rows(x))
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
def block_moments(x, block, means, squares, first, last):
    columns = x.shape[1]
    for b in range(first, last):
        start, stop = b * block, min((b + 1) * block, x.shape[0])
        mean, square = means[b], squares[b]
        mean[:] = 0.0
        square[:] = 0.0
        for i in range(start, stop):
            for j in range(columns):
                mean[j] += x[i, j]
        for j in range(columns):
            mean[j] /= stop - start
        for i in range(start, stop):
            for j in range(columns):
                difference = x[i, j] - mean[j]
                square[j] += difference * difference


@compiled
def block_normalise(x, block, mean, scale, shift, out, first, last):
    for i in range(first * block, min(last * block, x.shape[0])):
        for j in range(x.shape[1]):
            out[i, j] = (x[i, j] - mean[j]) * scale[j] + shift[j]


@compiled
def block_gradient_sums(grad, x, block, mean, sums, products, first, last):
    for b in range(first, last):
        total, product = sums[b], products[b]
        total[:] = 0.0
        product[:] = 0.0
        for i in range(b * block, min((b + 1) * block, x.shape[0])):
            for j in range(x.shape[1]):
                total[j] += grad[i, j]
                product[j] += grad[i, j] * (x[i, j] - mean[j])


@compiled
def block_input_gradient(grad, x, block, mean, offset, slope, scale, out, first, last):
    for i in range(first * block, min(last * block, x.shape[0])):
        for j in range(x.shape[1]):
            out[i, j] = (grad[i, j] - offset[j] - (x[i, j] - mean[j]) * slope[j]) * scale[j]
