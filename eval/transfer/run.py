"""Transfer: logistic regression on frozen features of 12 datasets, one record for each.

    python eval/transfer/run.py --backbone RUN --root DIR
    python eval/transfer/run.py --backbone RUN --root DIR --datasets pets,dtd --splits byol
    python eval/transfer/run.py --backbone RUN --root DIR --datasets cifar10 --image-size 32
    python eval/transfer/run.py --backbone checkpoint.pth.tar --arch resnet50 --root DIR

Features are extracted once and cached; a weight decay is chosen on the validation set among 45,
refitted on training and validation set, tested once. Started again it continues with the next
dataset. `python results/record.py add FILE` stores a record. Protocol and sources: README.md here.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import common.run.early  # noqa: F401  # isort: skip
import torch
from torch import nn

from common.augment import two_views
from common.config import PositiveInt, Seed, free
from common.data.images import SKIP_HINT, subset
from common.data.loaders import default_workers
from common.errors import Stopped, UserError, command, make_folder
from common.files import write
from common.progress import Progress
from common.run import documents, environment
from common.run.calibrate import calibrated
from common.run.flags import parse
from common.run.folder import finished_record
from common.run.output import outlast_readers
from common.run.signals import StopRequests
from eval.encoders import in_words, is_random, load_encoder, record_fields
from eval.evaluation import EncoderConfig
from eval.transfer import classifier, few_shot, manifest, readers, scores, splits
from eval.transfer.features import IMAGE_SIZE, cached
from eval.transfer.manifest import DATASETS, Manifest
from eval.transfer.solver import DECAYS
from results import record

PROTOCOL = "linear (L-BFGS)"  # as in results/published.yaml
SOLVERS = {
    "torch": "L-BFGS in float64 until the gradient's norm is 1e-5 of that at W = 0",
    "sklearn": "scikit-learn, warm start, at most 100 iterations, tol 1e-4, float32 (ssl-transfer)",
}
VOC_DECAYS = {
    "softmax": "of ssl-transfer's softmax over two classes: half of it in the binary regression",
    "binary": "of the binary logistic regression",
}
# a terminal is redrawn often, a log file gets a line now and then
REPORTED_DIFFICULT = "difficult objects count as not there, as in ssl-transfer"


@dataclass(frozen=True)
class TransferConfig(EncoderConfig):
    """Transfer: logistic regression on frozen features of 12 datasets, one record for each."""

    root: str = free("")  # folder of the datasets, as eval/transfer/prepare.py leaves it
    # with commas, of food101, cifar10, cifar100, birdsnap, sun397, cars, aircraft, voc2007, dtd,
    # pets, caltech101, flowers; default: all
    datasets: str = free("")
    splits: Literal["gsg", "byol", "ssl-transfer"] = "gsg"  # whose: see README.md here
    # torch: L-BFGS to convergence; sklearn: ssl-transfer's, at most 100 iterations
    solver: Literal["torch", "sklearn"] = "torch"
    # what VOC2007's decay is of: ssl-transfer's softmax over two classes, or a binary regression
    voc_decay: Literal["softmax", "binary"] = "softmax"
    caltech_lists: str = ""  # folder of ssl-transfer's train.txt and test.txt for Caltech-101
    allow_incomplete: bool = False  # datasets of other sizes too; the record has the counts
    # pixels; default: 224 (GSG App. D.1). A ViT's positions are interpolated
    image_size: PositiveInt | None = None
    few_shot: bool = False  # also evaluate 5-way 5-shot and 20-shot episodes
    seed: Seed = 0  # decides random splits and episodes
    device: Literal["cuda", "cpu"] | None = free(None)  # default: cuda if there is a GPU
    # folder of the records; default: transfer in the run folder, else below runs/transfer
    output: str = free("")
    cache: str = free("")  # folder of the features; default: features in that of the records
    resume: Literal["auto", "never"] = free("auto")  # never: evaluate again what is finished


class Transfer:
    """One backbone on the chosen datasets."""

    def __init__(self, config: TransferConfig):
        self.config = config
        outlast_readers()
        self.root = documents.expanded(config.root)
        if not self.root.is_dir():
            raise UserError(f"--root {self.root}: no such folder; prepare.py makes and fills it")
        self.keys = manifest.chosen(config.datasets)
        self.size = config.image_size or IMAGE_SIZE
        self.device = chosen_device(config.device)
        self.encoder, self.facts = self.load()
        where = self.facts["run"]
        name = f"{Path(config.backbone).stem}-{self.facts['sha256'][:8]}"
        default = where / "transfer" if where else Path("runs") / "transfer" / name
        self.output = documents.expanded(config.output) if config.output else default
        self.cache = documents.expanded(config.cache) if config.cache else self.output / "features"
        make_folder(self.output)
        make_folder(self.cache, "--cache")
        self.workers = config.workers if config.workers >= 0 else default_workers(1)
        self.requests = StopRequests()
        self.environment = environment.describe(self.device, 1)
        told = self.environment["commit"], self.environment["dirty"]
        if why := environment.untraceable(*told):
            print(f"warning: {why}", flush=True)

    def load(self) -> tuple[nn.Module, dict[str, Any]]:
        """Returns the encoder on its device; raises UserError for a size that it cannot take."""
        config = self.config
        encoder, facts = load_encoder(config.backbone, config.arch or None, config.image_size)
        if "vit" in facts["arch"] and facts["image_size"] != self.size:
            own = facts["image_size"]
            raise UserError(
                f"{config.backbone} has positions for images of {own} pixels, not {self.size}: "
                f"give --image-size {own}, or --image-size {self.size} to interpolate them"
            )
        if words := in_words(facts):
            print(f"backbone: {words}")
        if facts["layout"] == "ours" and (config.method or config.pretrained_on != "other"):
            raise UserError("--method and --pretrained-on are for other projects' checkpoints")
        torch.backends.cudnn.allow_tf32 = False  # features are float32 on a GPU too
        return encoder.to(self.device).eval(), facts

    def stop_if_asked(self, *_: Any) -> None:
        if self.requests.received:
            name = self.requests.received.name
            print(f"\n{name}: stopped; start the same command again, finished datasets stay")
            raise Stopped

    def run(self) -> None:
        """Evaluates all datasets, prints the table; UserError at the end for those left out."""
        done: dict[str, dict[str, Any]] = {}
        failed: dict[str, str] = {}
        written: list[Path] = []
        with self.requests:
            for number, key in enumerate(self.keys, 1):
                self.stop_if_asked()
                print(f"[{number}/{len(self.keys)}] {key}", flush=True)
                try:
                    done[key], paths = self.dataset(manifest.load(key))
                    written += paths
                except UserError as error:
                    failed[key] = str(error).removesuffix(SKIP_HINT)  # no flag of this script
                    print(f"  not evaluated: {failed[key]}", flush=True)
        written += self.write_averages(done)
        table = self.table(done, failed)
        name = f"table-{self.variant()}.md"
        (self.output / name).write_text(table)
        print(f"\n{table}\ntable: {self.output / name}")
        for path in written:
            print(f"record: {path}")
        if written:
            print("python results/record.py add FILE stores a record")
        if failed:
            key, text = next(iter(failed.items()))
            more = f" ({len(failed)} of {len(self.keys)} datasets; see above)"
            raise UserError(f"{key} not evaluated: {text}{more if len(failed) > 1 else ''}")

    # -- one dataset ------------------------------------------------------------------------------

    def dataset(self, about: Manifest) -> tuple[dict[str, Any], list[Path]]:
        """Returns (the record, the files written); takes a finished record from before."""
        config = self.config
        path = self.output / f"{about.key}-{self.variant()}.json"
        before = self.finished(path, about)
        shots_there = not config.few_shot or all(
            self.finished(self.shots_path(about, s), about) for s in few_shot.SHOTS
        )
        if before and shots_there and before["dataset"]["incomplete"] is None:
            print(f"  finished before: {before['value']:.2f}")
            return before, [path]
        pool = readers.read(about, self.root)
        if hasattr(pool.images, "max_pixels"):  # files
            pool.images.max_pixels = config.max_pixels
        lists = documents.expanded(config.caltech_lists) if config.caltech_lists else None
        parts = splits.make(about, pool, config.splits, config.seed, lists, config.allow_incomplete)
        if before and before["dataset"]["incomplete"] == parts.incomplete and shots_there:
            print(f"  finished before: {before['value']:.2f} ({parts.incomplete})")
            return before, [path]
        started = time.monotonic()
        features = self.features(about, pool, self.encoder_for(pool, parts))
        found = self.classify(about, pool, parts, features)
        found["evaluation_hours"] = round((time.monotonic() - started) / 3600, 4)
        self.write(path, found)
        paths = [path]
        if config.few_shot:
            paths += self.few_shots(about, pool, parts, features)
        print(f"  {about.metric} {found['value']:.2f}", flush=True)
        return found, paths

    def encoder_for(self, pool: readers.Pool, parts: splits.Splits) -> nn.Module:
        """Returns the encoder; a random one is calibrated on the dataset's training images."""
        if not is_random(self.facts):
            return self.encoder
        views = two_views("crop-flip", self.size)
        return calibrated(self.encoder, subset(pool.images, parts.train), views, 0, self.workers)

    def features(self, about: Manifest, pool: readers.Pool, encoder: nn.Module) -> torch.Tensor:
        with Progress(len(pool.images), "  features", "image") as bar:

            def between(images: int) -> None:
                self.stop_if_asked()
                bar.update(images)

            features, seconds = cached(
                self.cache,
                encoder,
                self.facts,
                about.key,
                pool.images,
                self.size,
                self.workers,
                between,
            )
        how = "cached" if seconds is None else f"{len(features) / max(seconds, 1e-9):.0f} images/s"
        print(f"  features {tuple(features.shape)}, {how}", flush=True)
        return features

    def classify(
        self, about: Manifest, pool: readers.Pool, parts: splits.Splits, features: torch.Tensor
    ) -> dict[str, Any]:
        """Returns the record of the linear evaluation."""
        config = self.config
        labels = torch.from_numpy(pool.labels)
        train, val, test = (
            classifier.Split(features[torch.from_numpy(i)], labels[torch.from_numpy(i)])
            for i in (parts.train, parts.val, parts.test)
        )
        halved = about.metric == "11pt mAP" and config.voc_decay == "softmax"
        with Progress(len(DECAYS), "  decays", "decay") as bar:
            chosen = classifier.choose(
                train,
                val,
                test,
                about.classes,
                scores.METRICS[about.metric],
                config.solver,
                halved=halved,
                device=self.device,
                between=self.stop_if_asked,
                progress=bar.update,
            )
        loose = sum(not row["converged"] for row in chosen.tried)
        if loose:
            print(f"  {loose} of {len(chosen.tried)} decays not converged (see the record)")
        found = self.encoder_fields() | self.dataset_fields(about, pool, parts)
        choice = {
            "weight_decay": chosen.decay,
            "tried": f"{len(DECAYS)} from {DECAYS[0]:g} to {DECAYS[-1]:g}, even in log",
            "chosen_on": "validation",
            "validation": round(chosen.validation, 3),
            "gradient_norm": float(f"{chosen.fit.gradient_norm:.2e}"),
            "iterations": chosen.fit.iterations,
            "converged": chosen.fit.gradient_norm < classifier.TOLERANCE,
        }
        if about.metric == "11pt mAP":
            choice["weight_decay_is"] = VOC_DECAYS[config.voc_decay]
            found = record.noted(found, REPORTED_DIFFICULT)
        found |= {
            "protocol": self.protocol(),
            "metric": about.metric,
            "hyperparameters": self.identity(about) | self.sizes(parts) | choice,
            "others": {"path": chosen.tried, "unconverged": loose},
        }
        return record.with_values(found, [chosen.value])

    def few_shots(
        self, about: Manifest, pool: readers.Pool, parts: splits.Splits, features: torch.Tensor
    ) -> list[Path]:
        """Writes records of few-shot episodes on all images, if possible; returns their paths."""
        if pool.labels.ndim == 2:
            print("  few-shot: an image of VOC2007 has several classes, there are no episodes")
            return []
        paths = []
        for shots in few_shot.SHOTS:
            seed = self.config.seed
            every = features.numpy(), pool.labels
            out = few_shot.episodes(*every, shots, seed, between=self.stop_if_asked)
            need = shots + few_shot.QUERIES
            if out is None:
                print(f"  few-shot: fewer than {few_shot.WAYS} classes have {need} images")
                continue
            accuracies, classes = out
            half = few_shot.interval(accuracies)
            found = self.encoder_fields() | self.dataset_fields(about, pool, parts)
            found |= {
                "protocol": f"few-shot {few_shot.WAYS}-way {shots}-shot" + self.size_words(),
                "metric": "top1",
                "hyperparameters": self.identity(about)
                | {"episodes": len(accuracies), "queries": few_shot.QUERIES, "classes": classes},
                "others": {"95% interval": round(half, 3)},
            }
            found = record.with_values(found, [float(accuracies.mean())])
            path = self.shots_path(about, shots)
            self.write(path, found)
            paths.append(path)
            every = len(set(pool.labels.tolist()))
            left_out = f", {every - classes} have fewer than {need} images" * (classes < every)
            print(f"  {shots}-shot {found['value']:.2f} ± {half:.2f} ({classes} classes{left_out})")
        return paths

    # -- records ----------------------------------------------------------------------------------

    def variant(self) -> str:
        """Names what sets this run's files apart from those of other flags."""
        config = self.config
        name = f"{config.splits}-{config.solver}-{self.size}-{self.facts['sha256'][:8]}"
        return name + (f"-seed{config.seed}" if config.seed else "")

    def shots_path(self, about: Manifest, shots: int) -> Path:
        return self.output / f"{about.key}-{shots}shot-{self.variant()}.json"

    def size_words(self) -> str:
        return "" if self.size == IMAGE_SIZE else f", {self.size} pixels"

    def protocol(self) -> str:
        """Returns the protocol's published name, and what differs from it."""
        config = self.config
        solver = "" if config.solver == "torch" else f", {config.solver}"
        return (
            PROTOCOL
            + solver
            + ("" if config.splits == "gsg" else f", {config.splits} splits")
            + (self.size_words())
        )

    def identity(self, about: Manifest) -> dict[str, Any]:
        """Returns the flags that the numbers follow from."""
        config = self.config
        found = {"splits": config.splits, "solver": SOLVERS[config.solver], "seed": config.seed}
        found["image_size"] = self.size
        if about.metric == "11pt mAP":
            found["voc_decay"] = config.voc_decay
        return found

    def sizes(self, parts: splits.Splits) -> dict[str, Any]:
        sizes = {name: len(getattr(parts, name)) for name in ("train", "val", "test")}
        return {"images": sizes}

    def finished(self, path: Path, about: Manifest) -> dict[str, Any] | None:
        """Returns the record of this very evaluation, if it is on disk and whole."""
        if self.config.resume == "never":
            return None
        found = finished_record(path, self.facts["sha256"])
        if found is None:
            return None
        same = self.identity(about).items() <= (found.get("hyperparameters") or {}).items()
        return found if same else None

    def write(self, path: Path, found: dict[str, Any]) -> None:
        write(path, record.text_of(found))
        for problem in record.problems(record.nulled(found)):
            print(f"  {path.name} cannot be stored as it is: {problem}")

    def encoder_fields(self) -> dict[str, Any]:
        """Returns the record's fields about the encoder, and how it was evaluated."""
        found = record_fields(self.facts, self.config, self.environment)
        found["dirty"] = found["dirty"] or self.environment["dirty"] is not False
        line = "eval/transfer/" + self.environment["command"]
        return found | {"command": [*found["command"], line]}

    def dataset_fields(
        self, about: Manifest, pool: readers.Pool, parts: splits.Splits
    ) -> dict[str, Any]:
        on = {"name": about.name, "copy": pool.copy, "incomplete": parts.incomplete}
        return {"dataset": on}

    def write_averages(self, done: dict[str, dict[str, Any]]) -> list[Path]:
        """Writes records of the averages over those groups that are whole."""
        paths = []
        values = {key: found["value"] for key, found in done.items()}
        for name, value in scores.averages(values, DATASETS).items():
            members = [found for key, found in done.items() if in_group(name, key)]
            lacking = [m["dataset"]["name"] for m in members if m["dataset"]["incomplete"]]
            copies = {m["dataset"]["copy"] for m in members if m["dataset"]["copy"]}
            found = self.encoder_fields() | {
                "dataset": {
                    "name": name,
                    "copy": ", ".join(sorted(copies)) or None,
                    "incomplete": f"incomplete: {', '.join(lacking)}" if lacking else None,
                },
                "protocol": self.protocol(),
                "metric": "top1",
                "hyperparameters": {"splits": self.config.splits},
                "others": {m["dataset"]["name"]: m["value"] for m in members},
            }
            path = self.output / f"{name.replace(' ', '-')}-{self.variant()}.json"
            found = record.noted(found, "mean of each dataset's own metric")
            self.write(path, record.with_values(found, [value]))
            paths.append(path)
        return paths

    def table(self, done: dict[str, dict[str, Any]], failed: dict[str, str]) -> str:
        """Returns a Markdown table: a row per dataset, then the averages."""
        lines = [
            f"{self.facts['arch']}, {self.protocol()}, splits {self.config.splits}\n",
            "| dataset | metric | % | validation | weight decay | gradient norm | images |",
            "|---|---|---|---|---|---|---|",
        ]
        for found in done.values():
            how, on = found["hyperparameters"], found["dataset"]
            notes = "; ".join(text for text in (on["copy"], on["incomplete"]) if text)
            sizes = "/".join(str(n) for n in how["images"].values())
            lines.append(
                f"| {on['name']}{f' ({notes})' if notes else ''} | {found['metric']} "
                f"| {found['value']:.2f} | {how['validation']:.2f} | {how['weight_decay']:.3g} "
                f"| {how['gradient_norm']:.1e} | {sizes} |"
            )
        lines += [f"| {key} | not evaluated | | | | | |" for key in failed]
        values = {key: found["value"] for key, found in done.items()}
        lines += [
            f"| {name} | | {value:.2f} | | | | |"
            for name, value in scores.averages(values, DATASETS).items()
        ]
        return "\n".join(lines) + "\n"


def in_group(name: str, key: str) -> bool:
    """Tells whether a dataset counts in an average."""
    if name == "average of 11":
        return key != "birdsnap"
    return name == "average of 12" or key in scores.GSG_TEN


def chosen_device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible here; use cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def checked(config: TransferConfig) -> TransferConfig:
    """Returns the configuration itself; raises UserError for a mistake that shows before encoder
    and images are read.
    """
    if not config.backbone:
        raise UserError("--backbone RUN_OR_FILE is missing")
    if not config.root:
        raise UserError(
            "--root DIR is missing: the folder of the datasets, as prepare.py leaves it"
        )
    manifest.chosen(config.datasets)
    return config


def parse_arguments(argv: list[str] | None = None) -> TransferConfig:
    return parse(TransferConfig, {}, argv, checked)


def main(argv: list[str] | None = None) -> None:
    Transfer(parse_arguments(argv)).run()


if __name__ == "__main__":
    sys.exit(command(main))
