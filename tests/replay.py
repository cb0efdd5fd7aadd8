"""What the replays of recipes share: a short run in float64 whose steps are watched, and torch's
own batch norms in place of ours.
"""

import copy

import torch
from test_resume import images
from torch import nn

from common.run.run import Run

IMAGES, EPOCHS, BATCH, STEPS = 160, 4, 32, 7  # the run ends two steps into the second epoch
STEPS_PER_EPOCH = IMAGES // BATCH
RUN = ["--dataset", "imagefolder", "--arch", "tiny", "--image-size", "16", "--workers", "0"]
RUN += ["--batch-size", str(BATCH), "--epochs", str(EPOCHS), "--knn-every", "0"]
RUN += ["--precision", "fp64", "--seed", "3", "--max-steps", str(STEPS)]


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x):
        pass


def with_torchs_batch_norms(module):
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            plain = BatchNorm(child.num_features, child.eps, child.momentum, child.affine).double()
            plain.load_state_dict(child.state_dict())
            setattr(module, name, plain)
        else:
            with_torchs_batch_norms(child)
    return module


def watched_run(recipe, flags, folder, monkeypatch):
    """Runs the recipe with RUN and these flags; returns the views of each step, its losses and
    rates, and its modules before and after.
    """
    seen = {"views": [], "logged": []}
    begin, batches, log = Run.begin, Run.batches, Run.log

    def noting_begin(self, encoder, **state):
        modules = {n: m for n, m in state.items() if isinstance(m, nn.Module)}
        seen["before"], seen["after"] = copy.deepcopy(modules), modules
        return begin(self, encoder, **state)

    def noting_batches(self, views):
        assert self.steps_per_epoch == IMAGES // self.config.batch_size
        for step, pixels, ids in batches(self, views):
            seen["views"].append([x.clone() for x in pixels])
            yield step, pixels, ids

    def noting_log(self, **values):
        values_now = {
            n: v.detach().item() if isinstance(v, torch.Tensor) else v
            for n, v in values.items()
            if n != "z"
        }
        seen["logged"].append(values_now)
        return log(self, **values)

    monkeypatch.setattr(Run, "begin", noting_begin)
    monkeypatch.setattr(Run, "batches", noting_batches)
    monkeypatch.setattr(Run, "log", noting_log)
    recipe.main([*RUN, *flags, "--data", str(images()), "--output", str(folder)])
    return seen


def assert_states_are_close(pairs):
    """Compares weights and statistics of each pair of modules, ours and the replay's."""
    for ours, theirs in pairs:
        state = ours.state_dict()
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-9, msg=name)
