"""The demo: SNCLR from random weights to neighbours that make sense, on photographs, on a CPU.

    make demo                      # or: python eval/demo.py --seed 1

Trains recipes/snclr.py on the embedded dataset `photos`, then compares raw pixels, the random
encoder and the trained one by k-NN and by a linear read-out. Nothing is downloaded.
"""

import argparse
import sys
from pathlib import Path

import common.run.early  # noqa: F401  # isort: skip
import numpy as np
import torch

from common.augment import two_views
from common.data import photos
from common.data.sets import photo_patches
from common.errors import UserError, command
from common.knn import extract_features, knn_accuracy
from common.models import build_encoder
from common.run import documents
from common.run.backbone import load_backbone
from common.run.calibrate import calibrated
from common.run.signals import run_child

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="of the run (default 0)")
    parser.add_argument("--output", default="", help="run folder (default runs/demo-<seed>)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    folder = Path(arguments.output or ROOT / "runs" / f"demo-{arguments.seed}").absolute()

    print(f"SNCLR on {len(photos.PHOTOS)} photographs: which one is a 32x32 patch from?\n")
    flags = ["--dataset", "photos", "--seed", str(arguments.seed), "--output", str(folder)]
    code = run_child([sys.executable, str(ROOT / "recipes" / "snclr.py"), *flags])
    if code:
        raise UserError(
            f"the training above ended with exit code {code}; the same command continues"
        )

    encoder, metadata = load_backbone(folder)
    torch.manual_seed(arguments.seed)  # the run's own random weights: its encoder is drawn first
    random_encoder = build_encoder(metadata["arch"], int(metadata["image_size"]))
    train, test = photo_patches("train"), photo_patches("test")
    names = ("views", "image_size", "crop_min", "crop_interpolation")
    config = documents.read_yaml(folder / "config.yaml", "config", names)
    views = two_views(*(config[name] for name in names))
    random_encoder = calibrated(random_encoder, train, views, arguments.seed)
    rows = [
        ("raw pixels", pixels(train), pixels(test)),
        ("random encoder", features(random_encoder, train), features(random_encoder, test)),
        ("SNCLR", features(encoder, train), features(encoder, test)),
    ]
    found = []
    print(f"\n{'test accuracy of':16} {'k-NN':>7} {'linear':>7}")
    for name, train_x, test_x in rows:
        labels = torch.from_numpy(train.labels), torch.from_numpy(test.labels)
        knn = knn_accuracy(train_x, labels[0], test_x, labels[1])
        linear = linear_readout(train_x, train.labels, test_x, test.labels)
        found.append((knn, linear))
        print(f"{name:16} {knn:7.1%} {linear:7.1%}")
    gains = [100 * (after - before) for before, after in zip(*found[1:], strict=True)]
    print("\nTraining gained {:.1f} points of k-NN, {:.1f} of linear, over random.".format(*gains))
    print("Test patches come from a part of each photograph that training never saw.")
    print(f"Look at {folder / 'neighbours.png'}: each query and what the queue retrieves for it,")
    print(f"and at {folder / 'curves.png'}: the loss, k-NN and the collapse monitors.")


def pixels(images) -> torch.Tensor:
    return torch.from_numpy(images.pixels.reshape(len(images), -1) / np.float32(255))


def features(encoder: torch.nn.Module, images) -> torch.Tensor:
    return extract_features(encoder, images, np.arange(len(images)), photos.SIDE)


def linear_readout(train_x, train_y, test_x, test_y) -> float:
    """Returns the test accuracy of logistic regression on standardised features. It is a quick
    look: the papers' protocols are in eval/linear_probe/.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = [StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)]
    if train_x.shape[1] > 512:  # 3072 pixels would take a minute
        steps.insert(0, PCA(256, random_state=0))
    return make_pipeline(*steps).fit(train_x.numpy(), train_y).score(test_x.numpy(), test_y)


if __name__ == "__main__":
    sys.exit(command(main))
