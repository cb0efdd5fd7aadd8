"""The 45-decay sweep of the transfer evaluation: --solver torch beside scikit-learn.

    python benchmarks/transfer_solver.py                           # 10 000 x 512, 100 classes
    python benchmarks/transfer_solver.py --images 2000 --classes 20 --limit 60

Three sweeps over the same features, each in a process of its own, so that its peak memory is its
own: ours, converged; ssl-transfer's setting (scikit-learn, warm start upwards, at most 100
iterations, float32), which stops early; and scikit-learn run to our gradient norm (float64, warm
start downwards, which is its better direction, tolerance lowered until the norm is reached). The
last is stopped at --limit times our seconds: the ratio is then at least that.

The features are made up: 64 latent directions with a decaying spectrum, mixed through a ReLU, class
means at --separation. 1.0 is separable, as most of the 12 datasets are for 2048 features; 0.4 has
test accuracy near one third.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from common.run.environment import describe
from common.run.help import in_80_columns
from eval.transfer.classifier import Sklearn, Split
from eval.transfer.solver import DECAYS, TOLERANCE, fit_path, gradient_norm

RESULT = Path(__file__).resolve().parent / "results" / "transfer_solver.json"
LATENT = 64  # few directions of a ResNet's 512 pooled features hold most of the variance
NAMES = {
    "torch": "--solver torch, converged",
    "ssl-transfer": "--solver sklearn (100 iterations)",
    "sklearn": "scikit-learn to the same norm",
}


def make(images: int, dimensions: int, classes: int, separation: float) -> Split:
    """Makes features (N,D) float32, not negative, and labels."""
    rng = np.random.default_rng(0)
    means = separation * rng.normal(size=(classes, LATENT))
    labels = rng.integers(classes, size=images)
    spectrum = 3 / np.sqrt(1 + np.arange(LATENT))
    latent = (means[labels] + 1.3 * rng.normal(size=(images, LATENT))) * spectrum
    mixed = latent @ rng.normal(size=(LATENT, dimensions)) * 2 / np.sqrt(LATENT)
    features = np.maximum(mixed + 0.5 * rng.normal(size=mixed.shape), 0).astype(np.float32)
    return Split(torch.from_numpy(features), torch.from_numpy(labels))


def ours(data: Split, classes: int, limit: float) -> dict:
    fits = list(fit_path(data.features, data.targets, classes, DECAYS))
    return {"iterations": sum(f.iterations for f in fits), "done": len(fits)} | norms_of(fits)


def ssl_transfer(data: Split, classes: int, limit: float) -> dict:
    sklearn = Sklearn(classes)
    fits = [sklearn.fit(data, decay) for decay in DECAYS]
    return {"iterations": sum(f.iterations for f in fits), "done": len(fits)} | norms_of(fits)


def norms_of(fits: list) -> dict:
    norms = [f.gradient_norm for f in fits]
    return {"worst norm": max(norms), "converged": sum(norm < TOLERANCE for norm in norms)}


def sklearn_converged(data: Split, classes: int, limit: float) -> dict:
    """Fits downwards, at every decay until the norm is ours; ends early if `limit` is over."""
    from sklearn.linear_model import LogisticRegression

    warnings.simplefilter("ignore")
    x, y = data.features.double().numpy(), data.targets.numpy()
    regression = LogisticRegression(warm_start=True)
    started, iterations, worst, done = time.monotonic(), 0, 0.0, 0
    for decay in DECAYS[::-1]:
        tolerance = 1e-4
        while True:
            regression.set_params(C=1 / decay, tol=tolerance, max_iter=200)
            regression.fit(x, y)
            iterations += int(regression.n_iter_.max())
            weight = torch.from_numpy(regression.coef_.T.copy())
            bias = torch.from_numpy(regression.intercept_.copy())
            norm = gradient_norm(data.features, data.targets, decay, weight, bias)
            if norm < TOLERANCE or time.monotonic() - started > limit:
                break
            if regression.n_iter_.max() < 200:  # scikit-learn takes this for converged
                tolerance /= 4
        if norm >= TOLERANCE:
            break
        worst, done = max(worst, norm), done + 1
    return {"iterations": iterations, "worst norm": worst, "converged": done, "done": done}


SWEEPS = {"torch": ours, "ssl-transfer": ssl_transfer, "sklearn": sklearn_converged}


def child(arguments: argparse.Namespace) -> None:
    """Runs one sweep; prints what it took as JSON."""
    torch.set_num_threads(arguments.threads)
    sizes = arguments.images, arguments.dimensions, arguments.classes
    data = make(*sizes, arguments.separation)
    warm = make(64, 8, 4, 1.0)  # imports and thread pools are not timed
    SWEEPS[arguments.sweep](warm, 4, 1.0)
    used, started = time.process_time(), time.monotonic()
    found = SWEEPS[arguments.sweep](data, arguments.classes, arguments.limit)
    found["seconds"] = time.monotonic() - started
    found["cpu"] = time.process_time() - used
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def run(sweep: str, arguments: argparse.Namespace, limit: float) -> dict:
    """Runs a sweep in a process of its own."""
    command = [sys.executable, __file__, "--sweep", sweep, "--limit", str(limit)]
    for name in ("images", "dimensions", "classes", "separation", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(arguments.threads))
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip())
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--separation", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--limit", type=float, default=6.0, help="scikit-learn's, times our seconds"
    )
    parser.add_argument("--json", type=Path, default=RESULT, help="for the figures (%(default)s)")
    parser.add_argument("--sweep", choices=SWEEPS, help="one sweep only, for the processes above")
    arguments = parser.parse_args()
    if arguments.sweep:
        child(arguments)
        return
    print(
        f"{arguments.images} x {arguments.dimensions}, {arguments.classes} classes, separation "
        f"{arguments.separation:g}, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"{'':34} {'seconds':>8} {'CPU s':>7} {'iterations':>10} {'converged':>9} {'norm':>8} "
        f"{'peak MB':>8}"
    )
    seconds, load, rows = {}, os.getloadavg()[0], []
    for sweep, name in NAMES.items():
        limit = arguments.limit * seconds.get("torch", 0)
        found = run(sweep, arguments, limit)
        seconds[sweep] = found["seconds"]
        rows.append({"sweep": name, **found})
        part = "" if found["done"] == len(DECAYS) else f" (stopped after {found['done']} decays)"
        print(
            f"{name:34} {found['seconds']:8.1f} {found['cpu']:7.1f} {found['iterations']:10} "
            f"{found['converged']:6}/45 {found['worst norm']:8.1e} {found['peak_mb']:8.0f}{part}",
            flush=True,
        )
        if sweep != "torch":
            least = "at least " if part else ""
            print(f"{'':34} {least}{found['seconds'] / seconds['torch']:.2f} times ours")
    settings = {name: str(value) for name, value in vars(arguments).items()}
    about = {"settings": settings, "load": load, **describe(torch.device("cpu"), 1)}
    arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
