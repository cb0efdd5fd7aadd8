"""benchmarks/lab.py: whose runs it times, and what it makes of the times."""

import argparse
import importlib.util

import pytest
from conftest import only_error, run_script

from benchmarks import lab
from recipes import simclr


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"epochs": 2, "precision": "fp32", "cifar10": ""} | changes)


def test_our_run_is_the_labs_but_for_its_length_and_images():
    config = simclr.parse_arguments(lab.flags_of(arguments(cifar10="DATA")))
    assert (config.arch, config.batch_size, config.train_images) == ("resnet_lab", 128, 10_000)
    assert (config.data, config.epochs, config.optimizer) == ("DATA", 2, "sgd")
    on_photos = simclr.parse_arguments(lab.flags_of(arguments(precision="bf16")))
    assert (on_photos.dataset, on_photos.precision, on_photos.train_images) == ("photos", "bf16", 0)
    same = {"arch", "batch_size", "temperature", "lr", "weight_decay", "output_dim"}
    assert all(getattr(config, name) == getattr(on_photos, name) for name in same)


def test_the_best_of_lightlys_workers_counts_and_medians_do():
    rates = {"whole, ours": [100.0, 900.0, 300.0], "alone, ours": [400.0]}
    rates |= {f"whole, lightly, {n} workers": [rate] for n, rate in ((0, 50.0), (1, 150.0))}
    rates |= {"input, ours": [80.0], "input, lightly, 2 workers": [20.0]}
    rates |= {"step, ours": [60.0], "step, lightly": [40.0]}
    assert lab.table(rates).splitlines()[2:] == [
        "| whole run | 300 | 150 (1 workers) | 2.00 |",
        "| whole run, without k-NN and geometry | 400 | 150 (1 workers) | 2.67 |",
        "| input | 80 | 20 (2 workers) | 4.00 |",
        "| step | 60 | 40 | 1.50 |",
    ]


@pytest.mark.long
def test_lightly_is_asked_for_in_a_line():
    if importlib.util.find_spec("lightly"):
        pytest.skip("lightly is installed here")
    assert "pip install lightly" in only_error(run_script("benchmarks/lab.py"))


@pytest.mark.long
def test_where_a_runs_time_goes_adds_up():
    done = run_script("benchmarks/lab.py", "--where", "nnclr", "--epochs", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    seconds = {row[0]: float(row[1]) for row in rows}
    whole = seconds.pop("whole")
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.1 * len(seconds))
    assert {"backward", "encoder, forward", "look-ups and queue"} <= {*seconds}
    assert seconds["backward"] > 0.5
