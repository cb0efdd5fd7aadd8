"""What `--input fast` does to a representation: k-NN of NNCLR beside `--input exact`.

    python benchmarks/input_knn.py                    # 6 runs of a minute or two on 2 CPU cores
    python benchmarks/input_knn.py --epochs 10 --seeds 0,1,2,3

Trains on JPEG files made for it: patches of 96 to 160 pixels of scikit-image's photographs, stored
with 160, so that at views of 32 pixels `fast` decodes nearly all of them at half scale, which it
never does with the arrays of `--dataset photos`. Labels are the photographs; training patches are
of their left three fifths, test patches of the rest. Everything else is NNCLR's preset for photos.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from common import pixels
from common.data import ViewDataset, load_dataset
from common.environment import describe
from common.photos import PATCHES, PHOTOS, read_photo
from recipes import nnclr

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).resolve().parent / "results" / "input_knn.json"
SMALLEST, LARGEST, STORED, VIEW = 96, 160, 160, 32  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--patches", type=int, default=PATCHES["train"], help="of each photograph")
    parser.add_argument("--json", type=Path, default=RESULT, help="for the figures (%(default)s)")
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "patches"
        write_patches(data, {"train": arguments.patches, "val": max(1, arguments.patches // 5)})
        half = share_at_half_scale(data)
        print(f"{half:.0%} of the images are decoded at half scale by fast\n")
        print("| seed | exact | fast | difference |\n|---|---|---|---|")
        rows = []
        for seed in map(int, arguments.seeds.split(",")):
            row = {"seed": seed}
            for input_ in ("exact", "fast"):
                run = Path(folder) / f"{input_}-{seed}"
                row[input_] = knn(data, run, arguments.epochs, seed, input_, flags)
            rows.append(row)
            cells = [f"{100 * row[name]:.1f}" for name in ("exact", "fast")]
            cells.append(f"{100 * (row['fast'] - row['exact']):+.1f}")
            print(f"| {seed} | {' | '.join(cells)} |", flush=True)
    off = [100 * (row["fast"] - row["exact"]) for row in rows]
    spread = f" ± {statistics.stdev(off):.1f}" if len(off) > 1 else ""
    print(f"\nfast - exact: {statistics.fmean(off):+.1f}{spread} points over {len(off)} seeds")
    about = {"epochs": arguments.epochs, "flags": flags, "half_scale": half}
    about |= describe(torch.device("cpu"), 1)
    arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def write_patches(root: Path, counts: dict[str, int]) -> None:
    """root/train and root/val with a folder for each photograph, the same at each call."""
    for split, count in counts.items():
        for label, name in enumerate(PHOTOS):
            photo = read_photo(name)
            border = photo.width * 3 // 5
            left, right = (0, border) if split == "train" else (border, photo.width)
            rng = np.random.default_rng([label, list(counts).index(split)])
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                side = int(rng.integers(SMALLEST, min(LARGEST, right - left, photo.height) + 1))
                x = int(rng.integers(left, right - side + 1))
                y = int(rng.integers(0, photo.height - side + 1))
                patch = photo.crop((x, y, x + side, y + side))
                patch = patch.resize((STORED, STORED), Image.Resampling.BICUBIC)
                patch.save(folder / f"{number:03}.jpg", quality=95)


def share_at_half_scale(data: Path, images: int = 300) -> float:
    """Of the first images of an epoch."""
    train, _ = load_dataset("imagefolder", str(data))
    config = nnclr.Config(image_size=VIEW, views="cifar", crop_interpolation="bilinear")
    dataset = ViewDataset(train, nnclr.views_of(config), 0, False, "fast")
    widths, decode = [], pixels.decode_jpeg

    def noting(*arguments):
        array = decode(*arguments)
        widths.append(array.shape[1])
        return array

    pixels.decode_jpeg = noting
    try:
        for sample in range(min(images, len(train))):
            dataset[0, sample]
    finally:
        pixels.decode_jpeg = decode
    return float(np.mean([width < STORED for width in widths]))


def knn(data: Path, run: Path, epochs: int, seed: int, input_: str, flags: list[str]) -> float:
    """The k-NN accuracy after one run of the recipe."""
    preset = nnclr.PRESETS["photos"] | {"epochs": epochs, "knn_every": epochs, "seed": seed}
    preset |= {"dataset": "imagefolder", "data": str(data), "input": input_, "output": str(run)}
    config = run.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(preset))
    command = [sys.executable, str(ROOT / "recipes/nnclr.py"), "--config", str(config), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr.strip() or done.stdout)
    return json.loads((run / "results.json").read_text())["knn"]


if __name__ == "__main__":
    main()
