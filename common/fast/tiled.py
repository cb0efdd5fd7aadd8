"""Log-sum-exp of the cosines with very many columns, in tiles.

SNCLR contrasts every prediction with the keys and neighbours of all images of the batch, at batch
4096 and K = 30 with 126 976 columns: each copy of those logits is 2 GB in float32. The columns get
no gradient, so that the gradient of the log-sum-exp is one softmax-weighted mean of them, which
runs along with the sum: nothing of the size of the logits is ever held, and nothing is computed a
second time in the backward pass. (Inf-CL, arXiv 2410.17243, tiles too; its columns get gradient, so
it recomputes.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.distributed import gather, world_size

# logits held at once: 8 MB in float32 (fastest of 1 to 128 MB on one CPU core); on a GPU 64 MB, so
# that few kernels are launched (not measured)
TILE = {"cpu": 2**21, "cuda": 2**24}


def cosines(x: Tensor, columns: Tensor) -> Tensor:
    """Returns the cosine of each row with each of its own columns: (N,D) of length 1, (N,C,D) of
    any scale -> (N,C), without a normalised copy of the columns.
    """
    products = torch.einsum("nd,ncd->nc", x, columns)
    return products / torch.linalg.vector_norm(columns, dim=2).clamp_min(1e-12)


def logsumexp_of_cosines(
    x: Tensor, first: Tensor, others: Tensor, temperature: float, tile: int | None = None
) -> Tensor:
    """Returns log sum_c exp(cos(x_i, c) / temperature) over the columns c of all ranks' images.

    x (N,D) has length 1. The columns of this rank's images have any scale: one each is in `first`
    (N,D), K each in `others` (N,K,D), K may be 0. The result (N,) is, with columns normalised,

        columns = gather(torch.cat([first[:, None], others], dim=1)).flatten(0, 1)
        (x @ columns.T / temperature).logsumexp(dim=1)

    Gradient flows through x, never through the columns, and once only (no second derivative).
    `tile` is how many logits may be held at once, None for TILE's of the device; those with the
    columns of one image of each rank always are. All ranks must call it, with equal shapes.
    """
    tile = TILE[x.device.type] if tile is None else tile
    return _LogSumExp.apply(x, first.detach(), others.detach(), temperature, tile)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, first: Tensor, others: Tensor, temperature: float, tile: int):
        n, k = others.shape[:2]
        images = max(1, tile // (n * (1 + k) * world_size()))  # of each rank, in one tile
        buffer = x.new_empty(n * min(images, n) * (1 + k) * world_size())
        highest = x.new_full((n,), -torch.inf)
        total = x.new_zeros(n)  # sum of exp(logit - highest)
        weighted = torch.zeros_like(x) if ctx.needs_input_grad[0] else None  # … times the column
        scaled = x / temperature
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, n, images):
                own = torch.cat([first[i : i + images, None], others[i : i + images]], dim=1)
                columns = gather(F.normalize(own, dim=2)).flatten(0, 1)
                logits = buffer[: n * len(columns)].view(n, -1)
                torch.mm(scaled, columns.T, out=logits)
                before, highest = highest, torch.maximum(highest, logits.amax(dim=1))
                shrink = (before - highest).exp_()
                terms = logits.sub_(highest[:, None]).exp_()
                total.mul_(shrink).add_(terms.sum(dim=1))
                if weighted is not None:
                    weighted.mul_(shrink[:, None]).addmm_(terms, columns)
        if weighted is not None:
            ctx.save_for_backward(weighted.div_(total[:, None] * temperature))
        return highest.add_(total.log_())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (mean_column,) = ctx.saved_tensors  # softmax-weighted, over the temperature
        return grad[:, None] * mean_column, None, None, None, None
