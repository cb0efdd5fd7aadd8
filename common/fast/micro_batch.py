"""Exact large batches on few devices: the encoder in pieces, heads and loss on the whole batch.

Gradient caching (Gao et al. 2021, arXiv 2101.06983), cut at the encoder's output:

    encode, projector = Pieces(model.f[0], config), model.f[1]
    z1, z2 = map(projector, encode(x1, x2))   # the encoder without graph, piece by piece
    loss.backward()                           # ends at the features, which are leaves
    encode.replay()                           # again with graph, one piece at a time

so that no more than one piece's activations are held, while every image meets all negatives of the
batch. The price is one forward of the encoder more.

Without batch norms (ViTs) the gradient is that of the whole batch; with them (ResNets) statistics
are those of a piece. Pieces are strided: piece j of P has the images j, j + P, … of each rank's
part, which are those of the same numbers of the global batch, so that they do not depend on the
number of ranks.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from common.fast.batch_norm import can_keep_views_apart, views_apart
from common.models import has_batch_norm

# in one forward of an encoder with batch norms: gradients of weights sum over all of them in
# float32, with more rounding the more there are (two keep the bound of 1e-5 over ranks, four not)
VIEWS_AT_ONCE = 2
RANDOM = nn.modules.dropout._DropoutNd, StochasticDepth  # with a probability p


class Encoded(NamedTuple):
    """One forward that is to be replayed: images (N,3,H,W), their features (N,D), the autocast."""

    images: Tensor
    features: Tensor
    autocast: dict


class Pieces:
    """An encoder that takes each view of a batch in pieces of `config.micro_batch` images, of
    `config.batch_size` (both over all ranks), or whole if that is 0 or there is no config.

    Raises ValueError for an encoder that draws at random: its replay would draw anew.
    """

    def __init__(self, encoder: nn.Module, config: Any = None):
        self.encoder = encoder
        if config is not None and config.compile:
            encoder.compile()  # in place: names and checkpoints stay as they are
        in_pieces = config is not None and config.micro_batch > 0
        self.pieces = config.batch_size // config.micro_batch if in_pieces else 0
        self.views_together = can_keep_views_apart(encoder)
        self.encoded: list[Encoded] = []
        if self.pieces and (name := random_layer(encoder)):
            raise ValueError(f"{name} draws at random: pieces would be replayed with other draws")

    def __call__(self, *views: Tensor) -> list[Tensor]:
        """Encodes (N,3,H,W) each to features (N,D) each; N is this rank's part of the batch or a
        multiple of it. Whole views of one size go through in one forward if that changes nothing:
        there are no batch norms, or they are ours (on CPU), which keep the views' statistics apart.
        """
        if self.pieces:
            return [self.in_pieces(x) for x in views]
        if self.views_together and len({x.shape for x in views}) == 1:
            size = VIEWS_AT_ONCE if has_batch_norm(self.encoder) else len(views)
            groups = [views[n : n + size] for n in range(0, len(views), size)]
            return [features for group in groups for features in self.together(group)]
        return [self.encoder(x) for x in views]

    def together(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        with views_apart(self.encoder, len(views)):
            return self.encoder(torch.cat(views)).chunk(len(views))

    def in_pieces(self, images: Tensor) -> Tensor:
        """Encodes without an autograd graph. If gradients are enabled, the features collect theirs,
        and `replay` carries these on to the encoder.
        """
        with torch.no_grad():
            parts = [self.encoder(part) for part in self.parts(images)]
            features = torch.stack(parts, dim=1).flatten(0, 1)
        if torch.is_grad_enabled():
            features.requires_grad_()
            self.encoded.append(Encoded(images, features, autocast_of(images.device.type)))
        return features

    def parts(self, x: Tensor) -> list[Tensor]:
        return [x[j :: self.pieces] for j in range(self.pieces)]

    def replay(self) -> None:
        """Adds the gradients of the encoder's parameters, after the loss's backward pass. Running
        statistics stay: the first forward has moved them, as a plain one would, piece by piece.
        """
        with statistics_kept(self.encoder):
            for images, features, autocast in self.encoded:
                if features.grad is None:  # a view that the loss does not use
                    continue
                grads = self.parts(features.grad)
                for part, grad in zip(self.parts(images), grads, strict=True):
                    with torch.autocast(**autocast):
                        output = self.encoder(part)
                    output.backward(grad)
        self.encoded.clear()


def random_layer(module: nn.Module) -> str:
    """Returns the name of the first layer that drops values or paths at random, or ""."""
    for name, child in module.named_modules():
        dropout = isinstance(child, RANDOM) and child.p > 0
        dropout |= isinstance(child, nn.MultiheadAttention | nn.RNNBase) and child.dropout > 0
        # drop_prob: timm's DropPath and DropBlock; prob: its PatchDropout
        if dropout or getattr(child, "drop_prob", 0) or getattr(child, "prob", 0):
            return f"{name} ({type(child).__name__})"
    return ""


def autocast_of(device_type: str) -> dict:
    """Returns the arguments of torch.autocast that hold here."""
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
    }


@contextlib.contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keeps running statistics as they are, while batch norms normalise by their batch."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, tracked in zip(norms, tracking, strict=True):
            norm.track_running_stats = tracked
