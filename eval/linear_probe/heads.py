"""Several linear classifiers on the same features, one for each learning rate, trained at once.

One forward of the encoder serves all of them; what each learns is what it would learn alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARC_EPS = 1e-8  # apex/parallel/LARC.py


class Heads(nn.Module):
    """H linear classifiers in two tensors: weight (H,C,D), bias (H,C). All start alike, from
    `weight` (C,D) and zero biases.
    """

    def __init__(self, heads: int, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.expand(heads, *weight.shape).clone())
        self.bias = nn.Parameter(weight.new_zeros(heads, weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Maps features (N,D) to scores (N,H,C)."""
        scores = torch.addmm(self.bias.view(-1, 1), self.weight.flatten(0, 1), x.T)
        return scores.view(*self.bias.shape, -1).permute(2, 0, 1)


def losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns (H,), the mean cross-entropy of each head; scores (N,H,C), labels (N,).

    In memory the images are innermost, here and in `forward`: sums over few classes are then long
    rows of additions, and ten heads take two thirds of the time (benchmarks/probe_heads.py).
    """
    rows = scores.permute(1, 2, 0)
    each = F.cross_entropy(rows, labels.expand(len(rows), -1), reduction="none")
    return each.mean(dim=1)


class HeadsSGD:
    """SGD with momentum for several heads, each with its own rate, computed as torch.optim.SGD
    does: v = momentum * v + g, then w -= lr * v, or with `nesterov` w -= lr * (g + momentum * v).

    Before that, `larc` scales each gradient by trust * |w| / (|g| + weight_decay * |w| + eps), for
    each head's weight and each head's bias (apex's LARC without clipping: simsiam and gsg
    main_lincls.py). If either norm is 0 the gradient stays as it is, without weight decay.
    """

    def __init__(
        self,
        heads: Heads,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        larc: bool = False,
        trust: float = 0.001,
    ):
        self.tensors = [heads.weight, heads.bias]
        self.velocity = [torch.zeros_like(t) for t in self.tensors]
        self.momentum, self.weight_decay = momentum, weight_decay
        self.nesterov, self.larc, self.trust = nesterov, larc, trust

    @torch.no_grad()
    def step(self, lrs: Tensor) -> None:
        """Makes one update from the tensors' gradients; `lrs` (H,) are this step's rates."""
        for tensor, velocity in zip(self.tensors, self.velocity, strict=True):
            g = self.adapted(tensor) if self.larc else tensor.grad
            if self.weight_decay and not self.larc:
                g = g.add(tensor, alpha=self.weight_decay)
            velocity.mul_(self.momentum).add_(g)
            update = g.add(velocity, alpha=self.momentum) if self.nesterov else velocity
            tensor.addcmul_(lrs.view(-1, *[1] * (tensor.ndim - 1)), update, value=-1)

    def adapted(self, tensor: Tensor) -> Tensor:
        """Returns LARC's gradient of every head of a tensor (H,…)."""
        axes = tuple(range(1, tensor.ndim))
        g = tensor.grad
        size = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
        slope = torch.linalg.vector_norm(g, dim=axes, keepdim=True)
        rate = self.trust * size / (slope + self.weight_decay * size + LARC_EPS)
        scaled = g.add(tensor, alpha=self.weight_decay) * rate
        return torch.where((size > 0) & (slope > 0), scaled, g)

    def zero_grad(self) -> None:
        for tensor in self.tensors:
            tensor.grad = None
