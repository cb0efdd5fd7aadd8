"""Trains by the rule of Barlow Twins' released code on the ranks of a process group.

    python tests/released_barlow.py FOLDER

Written from main.py's description: each rank divides its part of the correlation matrix by the
global batch, sums it over ranks unseen by autograd, and DistributedDataParallel averages gradients.
FOLDER/start.pt holds the flags, the model's first state, and views and rates of each step; the last
state goes to FOLDER/end.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from common import distributed
from common.fast.batch_norm import rank_batch_norm
from common.run import ranks
from recipes import barlow_twins


def main(folder: Path) -> None:
    start = torch.load(folder / "start.pt", weights_only=True)
    device = ranks.start()
    config = barlow_twins.parse_arguments(start["flags"])
    model = barlow_twins.BarlowTwins(config).double()
    model.load_state_dict(start["model"])
    norm = nn.Sequential(nn.BatchNorm1d(config.output_dim, affine=False)).double()
    model, norm = rank_batch_norm(model, device), rank_batch_norm(norm, device)
    velocities = [torch.zeros_like(w) for w in model.parameters()]
    for views, rates in zip(start["views"], start["rates"], strict=True):
        x1, x2 = (x.chunk(distributed.world_size())[distributed.rank()] for x in views)
        z1, z2 = (model.projector(model.encoder(x)) for x in (x1, x2))
        c = norm(z1).T @ norm(z2)
        c.div_(config.batch_size)
        if distributed.world_size() > 1:
            dist.all_reduce(c)  # in place: its gradient is that of this rank's part alone
        off = ~torch.eye(len(c), dtype=torch.bool)
        loss = (c.diagonal() - 1).pow(2).sum() + config.lambd * c[off].pow(2).sum()
        loss.backward()
        distributed.average_gradients(model)
        with torch.no_grad():
            for weight, velocity in zip(model.parameters(), velocities, strict=True):
                update = weight.grad
                if weight.ndim > 1:
                    update = update + config.weight_decay * weight
                    update = update * 0.001 * weight.norm() / update.norm()
                velocity.mul_(0.9).add_(update)
                weight.sub_(rates[0 if weight.ndim > 1 else 1] * velocity)
                weight.grad = None
    if distributed.rank() == 0:
        torch.save(model.state_dict(), folder / "end.pt")
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
