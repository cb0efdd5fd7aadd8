"""Runs a fine-tuning as it is and writes down its batches and the model after the last step.

python tests/semi_driver.py FOLDER [flags …]
"""

import sys
from pathlib import Path

import torch

from eval.semi_supervised import run as script

folder, flags = Path(sys.argv[1]), sys.argv[2:]
seen = {"inputs": [], "labels": [], "ids": []}


class Noting(script.FineTuning):
    def batches(self, images, seed, first, total):
        for x, ids in super().batches(images, seed, first, total):
            seen["inputs"].append(x.clone())
            seen["ids"].append(ids)
            seen["labels"].append(torch.from_numpy(images.labels)[ids])
            yield x, ids

    def train(self, *arguments):
        model = super().train(*arguments)
        seen["model"] = {n: t.clone() for n, t in model.state_dict().items()}
        return model


script.FineTuning = Noting
script.main(flags)
torch.save(seen, folder / "seen.pt")
