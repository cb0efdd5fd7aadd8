"""A small plan, claims and published numbers (tests/golden/), and records of its runs."""

import shutil
from pathlib import Path

from results import claims, joined, record, tables
from slurm import check, plan

# the same answers without a process that imports PyTorch again
plan.ask = lambda questions: [check.facts_of(*question) for question in questions]
GOLDEN = Path(__file__).parent / "golden"
KNN = "kNN (k200,t.1)"


def published() -> list[dict]:
    return tables.load_published(GOLDEN / "published.yaml")


def planned() -> dict[str, plan.Planned]:
    return plan.load(GOLDEN / "plan.yaml")


def what() -> dict:
    return claims.load(GOLDEN / "claims.yaml", planned())


def join(records, figures=()) -> joined.Joined:
    return joined.join(published(), records, planned(), what(), figures)


def copy_to(folder: Path) -> Path:
    """Makes a results folder with the golden files, and no record or figure."""
    for file in GOLDEN.iterdir():
        shutil.copy(file, folder)
    (folder / "figures").mkdir()
    return folder


def good(**changes):
    """Returns a whole record of a run on ImageNet that stands next to SNCLR's 73.38."""
    whole = {
        "method": "SNCLR",
        "recipe": "snclr",
        "arch": "vit_small",
        "pretraining": {
            "dataset": "ImageNet-1k",
            "copy": None,
            "incomplete": None,
            "epochs": 300,
            "batch": 4096,
        },
        "dataset": {"name": "ImageNet-1k", "copy": None, "incomplete": None},
        "protocol": "linear",
        "metric": "top1",
        "value": 73.0,
        "values": [72.5, 73.5],
        "seeds": [0, 1],
        "seeds_of": "pretraining",
        "spread": 0.707,
        "epoch": "last",
        "settings": {},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "config_hash": "0123456789ab",
        "command": ["snclr.py --arch vit_small --epochs 300", "run.py --backbone RUN"],
        "versions": {"python": "3.11.7", "torch": "2.11.0"},
        "hardware": "NVIDIA A100 x 32",
        "hours": 20.0,
        "images_per_second": 6000.0,
        "backbone_sha256": ["a" * 64, "b" * 64],
        "date": "2026-01-31",
    }
    return whole | changes


def of_run(name, seed, value, protocol=KNN, **changes):
    """Returns a record of one seed of a run of the golden plan, with its file's name."""
    run = planned()[name]
    one = good(
        **record.what_ran(run.config | {"plan": name}),
        protocol=protocol,
        value=value,
        values=[value],
        seeds=[seed],
        spread=None,
        backbone_sha256=["c" * 64],
        hours=0.02,
        hardware="CPU x 1",
        others={"random encoder": [11.0]},
    )
    if one["pretraining"]["dataset"] == "CIFAR-10":
        one["pretraining"]["copy"] = "JPEG copy"
    return f"{name}-{seed}-{protocol[:3]}.json", one | changes
