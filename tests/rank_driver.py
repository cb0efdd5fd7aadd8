"""Runs a recipe as it is and writes down what one rank saw: look-ups, gradients, losses.

    python tests/rank_driver.py FOLDER RECIPE [flags …]

FOLDER/rank<r>.pt holds `positions` (of each look-up in a queue), `enqueued`, `gradients` (of the
first step, after the mean over ranks), and `losses`: for each call of a function of the recipe
whose name ends in _loss its name, arguments and value.
"""

import functools
import importlib
import sys
from pathlib import Path

import torch

from common import distributed
from common.support_set import SupportSet

folder, recipe_name, flags = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
recipe = importlib.import_module(f"recipes.{recipe_name}")
seen = {"positions": [], "enqueued": [], "gradients": None, "losses": []}
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


def noting(name, function):
    @functools.wraps(function)
    def loss(*arguments, **more):
        value = function(*arguments, **more)
        kept = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        seen["losses"].append((name, kept, value.item()))
        return value

    return loss


SupportSet.nearest, SupportSet.enqueue = noting_nearest, noting_enqueue
recipe.average_gradients = noting_average
for name, function in [*vars(recipe).items()]:
    if name.endswith("_loss"):
        setattr(recipe, name, noting(name, function))
recipe.main(flags)
torch.save(seen, folder / f"rank{rank}.pt")
