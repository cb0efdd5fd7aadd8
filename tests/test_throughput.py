"""benchmarks/throughput.py on a CPU, and with a made-up nvidia-smi."""

import json
import os
import time

import pytest
import torch
from conftest import run_script

from benchmarks import throughput


@pytest.mark.long
def test_a_row_is_a_run_with_its_own_metrics(tmp_path):
    flags = ["--only", "tiny", "--steps", "3", "--batch-size", "16", "--queue-size", "64"]
    done = run_script("benchmarks/throughput.py", *flags, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    (row,) = figures["rows"]
    assert figures["flags"] == ["--queue-size", "64"] and row["batch"] == 16
    assert row["views_per_second"] == pytest.approx(2 * row["images_per_second"])
    assert row["images_per_second"] > 0 and 0 <= row["data_wait"] < 1
    assert 0 < row["share_of_matrix_rate"] < 1
    assert f"{row['images_per_second']:.0f} images/s" in done.stdout
    if not torch.cuda.is_available():
        assert row["gpu_busy"] is None and "GPU busy" not in done.stdout


def test_gpu_use_is_the_mean_of_the_samples_of_the_counted_steps(tmp_path, monkeypatch):
    """One sample comes at once, then one every tenth of a second: 40 and 80 in turn."""
    script = tmp_path / "nvidia-smi"
    loop = "while true; do sleep 0.1; echo 40; sleep 0.1; echo 80; done"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho 0\necho "[N/A]"\n{loop}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with throughput.gpu_use(2) as samples:
        time.sleep(1.5)
    assert "-i 0,1" in (tmp_path / "asked").read_text()
    assert samples[0][1] == 0 and {percent for _, percent in samples[1:]} == {40, 80}
    second, fifth = samples[1][0], samples[4][0]
    assert throughput.mean_use(samples, second, fifth) == pytest.approx(0.6)
    assert throughput.mean_use(samples, 0, 1) is None


def test_the_matrix_rate_is_that_of_a_product():
    assert throughput.matrix_rate("fp32", side=256, repeats=2) > 1e8
