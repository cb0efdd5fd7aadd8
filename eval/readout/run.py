"""Linear read-out and k-NN of a run that was trained on part of a data set, on all test images.

    python eval/readout/run.py --backbone runs/simsiam_gsg/cifar10-resnet_lab-10
    python eval/readout/run.py --backbone pixels --image-size 32 --dataset cifar10 \
        --data PATH --train-images 10000 --validation-share 0.04     # a control
    python eval/readout/run.py --backbone RUN --untrained     # what the run began from, and pixels

Both read what the run trained on: the linear classifier learns from these images, its penalty is
chosen on the images that the run held out, and each is scored on every test image. No paper's
protocol: the lab's, whose runs take minutes. Writes record.json, with how the run's features lay.
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import common.run.early  # noqa: F401  # isort: skip
import numpy as np
import torch
from torch import Tensor, nn

from common import distributed
from common.augment import View, two_views
from common.config import Count, PartialShare
from common.data.images import Images, subset
from common.data.splits import balanced, held_out_share
from common.errors import UserError, command
from common.files import write
from common.knn import gather_shares, knn_accuracy
from common.run import documents, geometry, metrics, results
from common.run.calibrate import calibrated
from common.run.flags import parse
from eval.encoders import FirstFeatures, Pixels, load_encoder
from eval.evaluation import RECORD, Evaluation, EvaluationConfig
from eval.transfer.classifier import Split, score
from eval.transfer.scores import top1
from eval.transfer.solver import Fit, fit_path
from results import record

PROTOCOL = "linear (L-BFGS), standardised"
KNN = "kNN (k200,t.1)"
KS = (200, 20)
TEMPERATURE = 0.1
# of the sum over images of the cross-entropy; 13 from 1e-2 to 1e4, best on the way in all of ours
DECAYS = tuple(np.logspace(-2, 4, 13))
UNTRAINED = f"{PROTOCOL}, untrained"
BEGINNING = "snapshots/epoch-0000.pt"  # of a run with --snapshot-epochs 0
PART = ("train_images", "subset_seed", "validation_share")  # flags that say which part is used


@dataclass(frozen=True)
class ReadoutConfig(EvaluationConfig):
    """Linear read-out and k-NN of a run that was trained on part of a data set."""

    train_images: Count | None = None  # read these many training images; default: the run's own
    subset_seed: Count | None = None  # which ones; default: the run's own
    # the share held out, for the penalty; default: the run's own
    validation_share: PartialShare | None = None
    # read the first so many features of the representation alone, as DirectCLR's App. F; 0: all
    first_features: Count = 0
    # read what a run with --snapshot-epochs 0 began from instead: its random encoder, calibrated
    # and as initialised, and pixels
    untrained: bool = False


class Readout(Evaluation):
    """The read-out of one encoder. The chosen penalty scores the test images once."""

    def with_defaults(self, config: ReadoutConfig) -> ReadoutConfig:
        config, ours = super().with_defaults(config), {}
        if self.facts["run"] is not None:
            ours = self.facts["config"]
        unset = [name for name in PART if getattr(config, name) is None]
        return dataclasses.replace(config, **{name: ours.get(name, 0) for name in unset})

    def load_images(self) -> tuple[Images, Images]:
        train, test = super().load_images()
        config = self.config
        if not config.validation_share:
            raise UserError(
                "nothing is held out to choose the penalty by: train with --validation-share, or "
                "give one here"
            )
        train, self.held = held_out_share(train, config.validation_share)
        if config.train_images:
            train = subset(train, balanced(train, config.train_images, config.subset_seed))
        return train, test

    def split(self, images: Images, what: str, encoder: nn.Module | None = None) -> Split:
        rows = gather_shares(self.features(images, what, encoder), len(images))
        return Split(rows, torch.from_numpy(images.labels))

    def read(self, encoder: nn.Module | None = None) -> tuple[float, dict[str, float], dict]:
        """Returns linear accuracy, k-NN by k, and hyperparameters, of this encoder or another."""
        train = self.split(self.train, "training", encoder)
        held = self.split(self.held, "held out", encoder)
        test = self.split(self.test, "test", encoder)
        votes = {f"k{k}": knn(train, test, k) for k in KS}
        scaled = [standardised(part, train.features) for part in (train, held, test)]
        fit, tried = choose(*scaled[:2], self.classes)
        if fit.decay in (DECAYS[0], DECAYS[-1]):
            self.warn(f"the penalty {fit.decay:g} is at the edge of those tried")
        hyperparameters = {
            "penalty": float(f"{fit.decay:.4g}"),
            "tried": tried,
            "chosen_on": f"{len(self.held)} held-out training images",
            "read": f"{len(self.train)} training images",
            "converged": fit.converged,
        }
        return score(fit, scaled[2], top1), votes, hyperparameters

    def measure(self) -> None:
        """Measures all numbers, and writes their record."""
        number, protocol = self.config.first_features, PROTOCOL
        if number:
            self.encoder = FirstFeatures(self.encoder, number)
            self.own_settings = {"first_features": number}
            protocol += f", first {number} features"
        value, votes, hyperparameters = self.read()
        others = {f"k-NN {name}": [found] for name, found in votes.items()}
        scores = [{"protocol": KNN, "metric": "top1", "values": [votes["k200"]]}]
        path = self.write_record(
            protocol, [value], hyperparameters, others | self.said(), False, scores=scores
        )
        if self.rank == 0 and self.facts["run"] is not None:
            found = record.read(path) | history_of(self.facts["run"])
            write(path, record.text_of(found))

    def measure_untrained(self) -> None:
        """Writes a record of the encoder that the run began from, calibrated; the record also has
        this encoder as initialised, and the pixels.
        """
        config = self.config
        fresh, _ = load_encoder(str(self.facts["run"] / BEGINNING), config.arch, config.image_size)
        fresh.to(self.device, self.dtype)
        how = self.facts["config"]["seed"], self.workers, self.autocast
        trained = calibrated(fresh, self.train, views_of(self.facts["config"]), *how)
        value, votes, hyperparameters = self.read(trained)
        others: dict[str, Any] = {"k-NN k20": [votes["k20"]]} | self.said()
        pixels = Pixels(config.image_size).to(self.device, self.dtype)
        for name, encoder in (("as initialised", fresh.eval()), ("pixels", pixels)):
            linear, near, _ = self.read(encoder)
            others |= {name: [near["k200"]], f"{name}, linear": [round(linear, 3)]}
        scores = [{"protocol": KNN, "metric": "top1", "values": [votes["k200"]]}]
        self.write_record(UNTRAINED, [value], hyperparameters, others, False, scores=scores)

    def said(self) -> dict[str, Any]:
        """Returns the k-NN of the run's random encoder, if the run scored it on the test images."""
        if self.facts["run"] is None:
            return {}
        before = results.read(self.facts["run"], ("knn_before",))["knn_before"]
        if before is None or self.facts["config"].get("scored_on") != "test":
            return {}
        return {"random encoder": [round(100 * before, 3)]}


def views_of(config: dict[str, Any]) -> list[View]:
    """Returns the two views of a run, by its config.yaml."""
    how = (config[n] for n in ("crop_min", "crop_interpolation", "jitter_strength"))
    return [*two_views(config["views"], config["image_size"], *how)]


def knn(train: Split, test: Split, k: int) -> float:
    """Returns the k-NN accuracy in percent."""
    labels = train.targets, test.targets
    found = knn_accuracy(train.features, labels[0], test.features, labels[1], k, TEMPERATURE)
    return round(100 * found, 3)


def standardised(part: Split, by: Tensor) -> Split:
    """Scales each feature by its mean and standard deviation over `by` (1 if that is 0)."""
    mean, std = by.double().mean(0), by.double().std(0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    return Split((part.features.double() - mean) / std, part.targets)


def choose(train: Split, held: Split, classes: int) -> tuple[Fit, list[dict[str, float]]]:
    """Returns the fit of the best penalty on `held`, the largest of equals, and all tried ones."""
    best, tried = (-1.0, None), []
    for fit in fit_path(train.features, train.targets, classes, DECAYS):
        value = score(fit, held, top1)
        tried.append({"penalty": float(f"{fit.decay:.4g}"), "held_out_top1": round(value, 3)})
        if value > best[0]:
            best = value, fit
    return best[1], tried


def history_of(run) -> dict[str, Any]:
    """Returns, for a record, what the run's monitors said, and how its features lay."""
    logged, lay = metrics.read(run / metrics.NAME), metrics.read(run / geometry.NAME, "geometry")
    points = [{name: line[name] for name in line if name not in ("kind", "step")} for line in lay]
    found = {"history": [record.history(logged)]}
    return found | ({"geometry": [points]} if points else {})


def parse_arguments(argv: list[str] | None = None) -> ReadoutConfig:
    return parse(ReadoutConfig, {}, argv)


def main(argv: list[str] | None = None) -> None:
    job = Readout(parse_arguments(argv))
    untrained = job.config.untrained
    if untrained and not ((run := job.facts["run"]) and (run / BEGINNING).is_file()):
        raise UserError(
            f"--untrained: {job.config.backbone} is no run that keeps what it began from: train "
            "with --snapshot-epochs 0"
        )
    first = f"-first{job.config.first_features}" if job.config.first_features else ""
    if untrained and first:
        raise UserError("--untrained reads whole encoders: leave --first-features out")
    job.begin("readout-untrained" if untrained else f"readout{first}")
    with job.working():
        if not job.is_written():
            job.measure_untrained() if untrained else job.measure()
    if job.rank == 0:
        found = documents.read_json(job.folder / RECORD, "record", ("scores",))
        near = found["scores"][0]["value"]
        job.finish(f"linear {found['value']:.2f} %, k-NN {near:.2f} %", [job.folder / RECORD])
    distributed.stop()


if __name__ == "__main__":
    sys.exit(command(main))
