"""t-SNE of a test set's features, a panel for each run (GSG Fig. 1).

    python eval/figures/tsne.py RUN [RUN …] --output tsne.png

Each panel embeds the same images with the same seed. The title has the run's own k-NN accuracy
(results.json: k=200, the whole test set) and the silhouette of the l2-normalised features by label
(cosine distance, of the shown images): how well classes part before t-SNE bends anything.
"""

import argparse
import math
import sys
from pathlib import Path

import common.run.early  # noqa: F401  # isort: skip
import numpy as np
from torch.nn import functional as F

from common import cards
from common.config import MAX_PIXELS
from common.data.images import Images
from common.data.sets import load_dataset
from common.errors import UserError, command
from common.knn import extract_features
from common.run import documents, pictures, results
from common.run.backbone import load_backbone
from common.run.help import in_80_columns


def shown_images(images: Images, count: int, seed: int) -> np.ndarray:
    """Draws the same number of images of each class from the seed; takes all if `count` is 0."""
    if count == 0 or count >= len(images):
        return np.arange(len(images))
    rng = np.random.default_rng(seed)
    classes = np.unique(images.labels)
    each = max(1, count // len(classes))
    chosen = [
        rng.choice(of, min(each, len(of)), replace=False)
        for of in (np.flatnonzero(images.labels == c) for c in classes)
    ]
    return np.sort(np.concatenate(chosen))


def features_of(run: Path, images: Images, samples: np.ndarray) -> np.ndarray:
    """Returns (N,D) l2-normalised features of a run's backbone."""
    encoder, metadata = load_backbone(run)
    features = extract_features(encoder, images, samples, int(metadata["image_size"]))
    return F.normalize(features.double(), dim=1).numpy()


def embed(features: np.ndarray, seed: int, perplexity: float) -> np.ndarray:
    """Maps (N,D) to (N,2) by scikit-learn's t-SNE, from the first two principal components on."""
    from sklearn.manifold import TSNE

    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(features)


def silhouette(features: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean silhouette by label, with the cosine distance, in [-1, 1]."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(features, labels, metric="cosine"))


def draw(path: Path, panels: list[tuple[str, np.ndarray]], labels: np.ndarray, names, title: str):
    """Draws panels side by side, with a colour for each class."""
    plt = pictures.headless_pyplot()
    figure, axes = pictures.grid(plt, pictures.even_rows(len(panels), 4), (3.6, 3.9))
    width, height = figure.get_size_inches()
    legend_columns = max(3, int(width / 1.2))
    legend = 0.1 + 0.2 * math.ceil(len(names) / legend_columns)  # inches
    figure.set_size_inches(width, height + 0.4 + legend)
    colours = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
    for axis, (text, points) in zip(axes, panels, strict=True):
        for number, name in enumerate(names):
            of = labels == number
            colour = colours(number % colours.N)
            axis.scatter(*points[of].T, s=3, color=colour, label=str(name), linewidths=0)
        axis.set_title(text, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        texts,
        loc="lower center",
        ncols=legend_columns,
        fontsize=7,
        markerscale=3,
    )
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, legend / figure.get_figheight(), 1, 1))
    pictures.save(figure, path, plt)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run folders")
    parser.add_argument("--output", type=Path, required=True, help="picture: .png, .pdf or .svg")
    parser.add_argument("--data", default=None, help="the images, where the runs' --data has moved")
    parser.add_argument("--images", type=int, default=0, help="how many, balanced (default: all)")
    parser.add_argument("--perplexity", type=float, default=30.0, help="of t-SNE (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of t-SNE and of the choice of images")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    pictures.check_target(arguments.output)
    configs = []
    for run in arguments.runs:
        if not (run / "results.json").exists():
            raise UserError(f"{run} is no finished run: it has no results.json")
        needs = ("recipe", "dataset", "data")
        configs.append(documents.read_yaml(run / "config.yaml", "config", needs))
    if len({config["dataset"] for config in configs}) > 1:
        raise UserError("the runs are of several data sets: panels of one data set only")
    data = configs[0]["data"] if arguments.data is None else arguments.data
    limit = max(config.get("max_pixels", MAX_PIXELS) for config in configs)
    _, images = load_dataset(configs[0]["dataset"], data, max_pixels=limit)
    if images is None or images.labels is None:
        raise UserError(f"{configs[0]['dataset']} has no labelled test images")
    samples = shown_images(images, arguments.images, arguments.seed)
    labels = images.labels[samples]
    if not 0 < arguments.perplexity < len(samples):
        raise UserError(f"--perplexity must lie between 0 and {len(samples)}, the number of images")
    panels = []
    for run, config in zip(arguments.runs, configs, strict=True):
        found = results.read(run, ("knn", "epoch"))
        features = features_of(run, images, samples)
        where = " on held-out training images" if config.get("validation_share", 0.0) else ""
        knn = "" if found["knn"] is None else f"k-NN {found['knn']:.1%}{where}, "
        text = f"{cards.method_of(config['recipe'], config)}, {found['epoch']:g} epochs\n"
        text += f"{knn}silhouette {silhouette(features, labels):+.3f}"
        print(text.replace("\n", ": "), flush=True)
        panels.append((text, embed(features, arguments.seed, arguments.perplexity)))
    names = getattr(images, "classes", None) or [*range(int(labels.max()) + 1)]
    title = f"t-SNE of {len(samples):,} test images of {images.name}"
    draw(arguments.output, panels, labels, names, title)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    sys.exit(command(main))
