"""Runs a recipe as it is and writes down what one rank saw: look-ups, gradients, SNCLR's terms.

    python tests/rank_driver.py FOLDER RECIPE [flags …]

FOLDER/rank<r>.pt holds `positions` (each look-up, or GSG's choices), `gradients` (of the first
step, after the mean over ranks), `terms` (the tensors of each snclr_loss or gsg_loss call) and
`enqueued`.
"""

import importlib
import sys
from pathlib import Path

import torch

from common import distributed
from common.run.run import Run
from common.support_set import SupportSet

folder, recipe_name, flags = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
recipe = importlib.import_module(f"recipes.{recipe_name}")
seen = {"positions": [], "gradients": None, "terms": [], "enqueued": []}
rank = 0

nearest, enqueue, average = SupportSet.nearest, SupportSet.enqueue, recipe.average_gradients


def noting_nearest(self, z, k=1, exclude_ids=None):
    neighbours, positions = nearest(self, z, k, exclude_ids)
    seen["positions"].append(distributed.gather(positions))
    return neighbours, positions


def noting_enqueue(self, z, ids=None):
    seen["enqueued"].append((z.detach().clone(), ids.clone()))
    enqueue(self, z, ids)


def noting_average(module):
    global rank
    rank = distributed.rank()
    average(module)
    if seen["gradients"] is None:
        parameters = module.named_parameters()
        seen["gradients"] = {n: p.grad.clone() for n, p in parameters if p.grad is not None}


SupportSet.nearest, SupportSet.enqueue = noting_nearest, noting_enqueue
recipe.average_gradients = noting_average
if recipe_name == "snclr":
    snclr_loss = recipe.snclr_loss

    def noting_loss(*arguments):
        loss = snclr_loss(*arguments)
        tensors = [a.detach().clone() for a in arguments[:4]]
        seen["terms"].append((tensors, arguments[4:], loss.item()))
        return loss

    recipe.snclr_loss = noting_loss

if recipe_name.endswith("gsg"):
    gsg_loss = recipe.gsg_loss

    def noting_gsg_loss(*arguments):
        loss = gsg_loss(*arguments)
        *tensors, pairs, distances = arguments
        seen["terms"].append(([t.detach().clone() for t in tensors], pairs, loss.item()))
        seen["positions"].append(distributed.gather(distances.argmin(dim=1)))
        return loss

    recipe.gsg_loss = noting_gsg_loss

# the pictures of the end look neighbours up too, on rank 0 alone
Run.draw_neighbours = lambda *arguments: None
recipe.main(flags)
torch.save(seen, folder / f"rank{rank}.pt")
