"""A checkpoint of before recipes named their parts alike is continued, by the key table."""

import json
import lzma
from pathlib import Path

import pytest
import torch

from common.run import checkpoint
from recipes import snclr

# SNCLR after two steps, written by the code before (dccee50), its weights rounded to 8 bits of
# mantissa so that it is small; and sum and norm of each tensor of the state after the two steps
# that the same code made of it
DATA = Path(__file__).resolve().parent / "data"
FLAGS = "--dataset photos --batch-size 36 --workers 0 --knn-every 0 --projector-hidden 16 "
FLAGS += "--predictor-hidden 16 --output-dim 8 --queue-size 64 --neighbours 2 "
FLAGS += "--neighbour-free-epochs 0 --max-steps 4"


def tensors_of(value, name=""):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_of(part, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from tensors_of(part, f"{name}/{number}")


def test_a_checkpoint_of_format_1_goes_on_as_its_own_code_did(tmp_path):
    stored = lzma.decompress((DATA / "checkpoint-format-1.pt.xz").read_bytes())
    (tmp_path / checkpoint.NAME).write_bytes(stored)
    snclr.main([*FLAGS.split(), "--output", str(tmp_path)])
    state = torch.load(tmp_path / checkpoint.NAME, weights_only=True)
    assert state["format"] == checkpoint.FORMAT != checkpoint.FORMAT_1 and state["step"] == 4
    expected = json.loads((DATA / "checkpoint-format-1.json").read_text())
    found = dict(tensors_of(state["state"]))
    assert found.keys() == expected.keys()
    for name, (total, norm) in expected.items():
        # processors differ in their sums' rounding, and so do batch norms from those of that code
        value = found[name].double()
        assert value.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name
        assert value.sum().item() == pytest.approx(total, rel=3e-3, abs=1e-3 * norm + 1e-6), name
