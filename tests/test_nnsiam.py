"""NNSiam beside SimSiam: the neighbours are all that differs between the two recipes."""

import json

import pytest
from conftest import SMALL
from safetensors.torch import load_file

from common.support_set import SupportSet
from recipes import nnsiam, simsiam_gsg

FLAGS = [*SMALL, "--workers", "0", "--precision", "fp64", "--max-steps", "4", "--lr-batch", "0"]
FLAGS += ["--projector-hidden", "64", "--predictor-hidden", "32", "--output-dim", "48"]


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.fixture(scope="module")
def simsiam(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simsiam") / "run"
    simsiam_gsg.main([*FLAGS, "--no-gsg", "--cosine-per", "step", "--output", str(folder)])
    return folder


@pytest.mark.parametrize("itself", [True, False])
def test_nnsiam_whose_look_ups_find_the_query_itself_is_simsiam(
    itself, simsiam, tmp_path, monkeypatch
):
    look_up = SupportSet.nearest

    def nearest(self, z, k=1, exclude_ids=None):
        neighbours, positions = look_up(self, z, k, exclude_ids)
        return (z.detach()[:, None] if itself and k == 1 else neighbours), positions

    monkeypatch.setattr(SupportSet, "nearest", nearest)
    folder = tmp_path / "run"
    nnsiam.main([*FLAGS, "--queue-size", "128", "--output", str(folder)])
    same = losses(folder) == pytest.approx(losses(simsiam), rel=1e-10)
    assert len(losses(folder)) == 4 and same == itself
    if itself:
        ours, theirs = (load_file(f / "backbone.safetensors") for f in (folder, simsiam))
        assert all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in theirs)
