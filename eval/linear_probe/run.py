"""Linear probe and k-NN of a frozen encoder, by the papers' protocols.

    python eval/linear_probe/run.py --backbone runs/snclr/imagenet-vit_small-0
    python eval/linear_probe/run.py --backbone RUN --lrs grid --cache-features   # a quick look
    python eval/linear_probe/run.py --backbone resnet50.pth --arch resnet50 --protocol byol \
        --data /path/to/imagenet --method "Barlow Twins" --pretrained-on ImageNet-1k
    python eval/linear_probe/run.py --backbone RUN --measure knn --knn-transform gsg

README.md, beside this file, says what each protocol is and where it comes from. Writes record.json
and record-knn.json; started again, it continues.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import common.run.early  # noqa: F401  # isort: skip
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common import cards, distributed
from common.config import Count, Positive, PositiveInt, free, later
from common.data.images import ArrayImages, subset
from common.data.loaders import RankBatches, epoch_order, view_loader
from common.errors import UserError, command
from common.fast.pixels import to_input
from common.files import replacing
from common.knn import gather_shares, knn_over_ranks, rank_share
from common.models import full_precision
from common.progress import duration
from common.run import documents
from common.run.flags import parse
from common.run.run import check_batch, report_problems
from eval.encoders import FirstFeatures
from eval.evaluation import (
    RECORD,
    Evaluation,
    EvaluationConfig,
    held_out,
    linear_weights,
    parse_numbers,
)
from eval.linear_probe.heads import Heads, HeadsSGD, losses
from eval.linear_probe.protocols import GRID, PHOTOS_BATCH, PROTOCOLS, schedule

RECORD_KNN = "record-knn.json"
KS = (10, 20, 100, 200)
# k-NN: (square resize, temperature); lightly's CIFAR benchmark, and GSG's main_knn.py
KNN = {"center": (False, 0.1), "gsg": (True, 0.2)}
REPORTED_K = 200  # GSG's and lightly's


@dataclass(frozen=True)
class ProbeConfig(EvaluationConfig):
    """Linear probe and k-NN of a frozen encoder, by the papers' protocols."""

    # whose linear evaluation; default: the one that the card of the run's recipe names
    protocol: Literal[(*PROTOCOLS,)] | None = None
    # base rates per 256 images, like 0.1,0.3; `grid`: ten around the protocol's; default: the
    # protocol's. All train at once; of several one is chosen on held-out training images
    lrs: str = ""
    batch_size: PositiveInt | None = None  # default: the protocol's (photos: 256)
    epochs: PositiveInt | None = None  # default: the protocol's
    # train on stored features of center crops instead of random crops: quick, and no paper's way
    cache_features: bool = False
    # read the first so many features of the representation alone, as DirectCLR's App. F; 0: all
    first_features: Count = later(0)
    measure: Literal["both", "linear", "knn"] = free("both")  # what to measure
    knn_transform: Literal["center", "gsg"] = "center"  # gsg: its code's resize, aspect lost
    knn_temperature: Positive | None = (
        None  # default: 0.1, with --knn-transform gsg 0.2 as its code
    )


def parse_arguments(argv: list[str] | None = None) -> ProbeConfig:
    return parse(ProbeConfig, {}, argv)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    probe = Probe(config)
    job = probe.job
    cached = "-cached" if probe.config.cache_features else ""
    first = f"-first{config.first_features}" if config.first_features else ""
    job.begin(f"linear_probe-{probe.config.protocol}{cached}{first}")
    wanted = {"both": (RECORD, RECORD_KNN), "linear": (RECORD,), "knn": (RECORD_KNN,)}
    with job.working():
        for file in wanted[config.measure]:
            if not job.is_written(file):
                (probe.linear if file == RECORD else probe.knn)()
    for file in wanted[config.measure]:
        probe.say_result(job.folder / file)
    distributed.stop()


class Probe:
    """The linear probe and the k-NN of one encoder, on features that both may share."""

    def __init__(self, config: ProbeConfig):
        self.job = Evaluation(config)
        self.config = config = self.resolved()
        self.job.config = config
        self.protocol = PROTOCOLS[config.protocol]
        self.lrs = self.rates()
        if config.first_features:
            self.job.encoder = FirstFeatures(self.job.encoder, config.first_features)
            self.job.own_settings = {"first_features": config.first_features}
        check_batch(config.batch_size, self.job.ranks)
        self.job.encoder.requires_grad_(False)
        self.stored: dict[tuple, Tensor] = {}

    def resolved(self) -> ProbeConfig:
        """Returns the configuration, completed from the protocol, the recipe and the data set."""
        config = self.job.config
        name = config.protocol or cards.protocol(self.job.facts["recipe"], "linear", PROTOCOLS)
        if name is None:
            raise UserError(
                f"no recipe's card names a protocol for {config.backbone}: give --protocol "
                f'({", ".join(PROTOCOLS)}); to make evaluate, as FLAGS="--protocol …"'
            )
        protocol = PROTOCOLS[name]
        batch = PHOTOS_BATCH if config.dataset == "photos" else protocol.batch
        return dataclasses.replace(
            config,
            protocol=name,
            batch_size=config.batch_size or batch,
            epochs=config.epochs or protocol.epochs,
            knn_temperature=config.knn_temperature or KNN[config.knn_transform][1],
        )

    def rates(self) -> list[float]:
        """Returns the base rates to train with, ascending."""
        own = self.protocol.rates(self.config.arch)
        if self.config.lrs == "grid":
            return sorted({float(f"{own[0] * factor:.6g}") for factor in GRID})
        return sorted(parse_numbers(self.config.lrs, "--lrs") if self.config.lrs else own)

    # -- features -------------------------------------------------------------------------------

    def share(self, split: str, samples: np.ndarray, **view: Any) -> Tensor:
        """Returns (m,D) features of this rank's padded share of samples of `train` or `test`."""
        images = getattr(self.job, split)
        if isinstance(images, ArrayImages) and images.pixels.shape[1:3] == (
            self.config.image_size,
            self.config.image_size,
        ):
            view = {}  # images of this size are taken as they are, whatever the transform
        everything = len(samples) == len(images)
        if split == "train" and self.config.cache_features and not view.get("square"):
            return self.whole_train(**view)[samples[rank_share(len(samples), padded=True)]]
        key = (split, everything, *sorted(view.items()))
        if key not in self.stored:
            part = images if everything else subset(images, samples)
            self.stored[key] = self.job.features(part, split if everything else "held out", **view)
        return self.stored[key]

    def whole_train(self, **view: Any) -> Tensor:
        """Returns (M,D) features of all training images, on every rank, and saves them to disk."""
        if ("train",) not in self.stored:
            path = self.job.folder / "features.safetensors"
            if distributed.from_rank_zero(path.exists()):
                stored = load_file(path)["train"].to(self.job.device)
            else:
                images = self.job.train
                stored = gather_shares(self.job.features(images, "train", **view), len(images))
                if self.job.rank == 0:
                    with replacing(path) as beside:
                        save_file({"train": stored.cpu().contiguous()}, beside)
            self.stored[("train",)] = stored
        return self.stored[("train",)]

    # -- linear ---------------------------------------------------------------------------------

    def linear(self) -> None:
        """Trains the heads, seed by seed, and writes the record."""
        job, config = self.job, self.config
        before = {n: t.detach().cpu().clone() for n, t in job.encoder.state_dict().items()}
        state = job.restore() or {"seeds": [], "chosen": None}
        labels, view = job.train.labels, {"interpolation": self.protocol.interpolation}
        kept, held, words = np.arange(len(labels)), np.arange(0), None
        if len(self.lrs) > 1:
            kept, held, words = held_out(labels, config.dataset == "imagenet", config.seed)
        while len(state["seeds"]) < config.seeds:
            first = state["chosen"] is None  # the other seeds take what the first one chose
            lrs = self.lrs if first else [state["chosen"]]
            heads, last_losses = self.train_heads(kept, lrs, state)
            assert_unchanged(job.encoder, before)
            result = {"lrs": lrs, "train_loss": last_losses}
            place = 0
            if len(lrs) > 1:
                part = subset(job.train, held)
                right = job.correct(heads, self.share("train", held, **view), part)
                result["held_out_top1"] = percent(right[:, 0])
                place = best(result["held_out_top1"], last_losses)
            elif not math.isfinite(last_losses[0]):
                raise UserError(f"the head of lr {lrs[0]:g} diverged: try another --lrs")
            test = self.share("test", np.arange(len(job.test)), **view)
            right = job.correct(heads, test, job.test)[place]
            result["top1"], result["top5"] = percent(right)
            state = {"seeds": [*state["seeds"], result], "chosen": lrs[place]}
            job.after_step(lambda state=state: state)
        self.write_linear(state, words)

    def train_heads(
        self, samples: np.ndarray, lrs: list[float], state: dict[str, Any]
    ) -> tuple[Heads, list[float]]:
        """Trains one seed: the heads after its last epoch, and their mean loss in that epoch."""
        job, config, protocol = self.job, self.config, self.protocol
        batch, number = config.batch_size, len(state["seeds"])
        seed = config.seed + number
        steps_per_epoch = len(samples) // batch
        if steps_per_epoch == 0:
            raise UserError(
                f"{len(samples)} training images are fewer than one batch: use a --batch-size "
                f"below {batch}",
            )
        total = steps_per_epoch * config.epochs
        weight = linear_weights(job.classes, job.encoder.embed_dim, protocol.init, seed)
        heads = Heads(len(lrs), weight.to(job.device, job.dtype))
        optimizer = HeadsSGD(
            heads,
            weight_decay=protocol.weight_decay,
            nesterov=protocol.optimizer == "nesterov",
            larc=protocol.optimizer == "larc",
        )
        trainable = [p for m in (job.encoder, heads) for p in m.parameters() if p.requires_grad]
        assert [id(p) for p in trainable] == [id(heads.weight), id(heads.bias)]
        scaled = torch.tensor(lrs, device=job.device, dtype=job.dtype) * (batch / 256)
        start, sums = 0, torch.zeros(len(lrs), device=job.device, dtype=job.dtype)
        if "step" in state:
            start, sums = state["step"], state["sums"].to(sums)
            heads.load_state_dict(state["heads"])
            for velocity, saved in zip(optimizer.velocity, state["velocity"], strict=True):
                velocity.copy_(saved)
        job.cut_log(number * total + start)
        mean = state.get("mean", sums)
        begun = (time.monotonic(), start // steps_per_epoch)
        job.bar = job.progress_bar(total, f"linear, seed {seed}", initial=start)
        for step, (x, y) in enumerate(self.batches(samples, seed, start, total), start):
            each = losses(heads(x), y)
            optimizer.zero_grad()
            each.sum().backward()
            distributed.average_gradients(heads)
            optimizer.step(
                scaled
                * schedule(
                    protocol.schedule, step, steps_per_epoch, config.epochs, protocol.warmup_epochs
                )
            )
            sums += each.detach()
            if (step + 1) % steps_per_epoch == 0:
                mean = distributed.mean_over_ranks(sums) / steps_per_epoch
                epoch = (step + 1) // steps_per_epoch
                self.log_epoch(seed, epoch, number * total + step + 1, mean, *begun)
                sums = torch.zeros_like(sums)
            job.after_step(
                lambda step=step, sums=sums, mean=mean: {
                    **{n: state[n] for n in ("seeds", "chosen")},
                    "step": step + 1,
                    "sums": sums,
                    "mean": mean,
                    "heads": heads.state_dict(),
                    "velocity": optimizer.velocity,
                },
                last=step + 1 == total,
            )
        job.bar.close()
        return heads, mean.tolist()

    def batches(
        self, samples: np.ndarray, seed: int, start: int, total: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields features (n,D) and labels (n,) of this rank's part of each batch."""
        job, config, protocol = self.job, self.config, self.protocol
        if config.cache_features:
            features = self.whole_train(interpolation=protocol.interpolation)
            labels = torch.from_numpy(job.train.labels).to(job.device)
            yield from stored_batches(
                features, labels, samples, seed, start, total, config.batch_size
            )
            return
        images = subset(job.train, samples)
        labels = torch.from_numpy(images.labels).to(job.device)
        loader = view_loader(
            images,
            [protocol.view(config.image_size)],
            RankBatches(len(images), config.batch_size, seed, start, total, job.rank, job.ranks),
            job.workers,
            skip_bad_images=config.on_bad_image == "skip",
            pin_memory=job.device.type == "cuda",
        )
        for pixels, ids, problems, must_stop in loader:
            report_problems(problems, must_stop)
            with torch.no_grad(), job.autocast():
                x = job.encoder(to_input(pixels[0], job.device, job.dtype))
            yield full_precision(x)[0], labels[ids.to(job.device, non_blocking=True)]

    def log_epoch(
        self, seed: int, epoch: int, step: int, loss: Tensor, started: float, first: int
    ) -> None:
        """Writes one line of metrics.jsonl, and prints one after each tenth of the epochs. `first`
        epochs were done when this start began at the time `started`.
        """
        job, epochs = self.job, self.config.epochs
        values = [v if math.isfinite(v) else None for v in loss.tolist()]
        job.log({"kind": "epoch", "seed": seed, "epoch": epoch, "step": step, "loss": values})
        if epoch % max(1, epochs // 10) == 0 or epoch == epochs:
            shown = min((v for v in values if v is not None), default=math.nan)
            left = (time.monotonic() - started) * (epochs - epoch) / max(1, epoch - first)
            job.say(
                f"seed {seed}, epoch {epoch} of {epochs}: loss {shown:.4f}, {duration(left)} left"
            )

    def write_linear(self, state: dict[str, Any], words: str | None) -> None:
        config, protocol, results = self.config, self.protocol, state["seeds"]
        first = results[0]
        hyperparameters = {
            "protocol": config.protocol,
            "optimizer": protocol.optimizer,
            "batch": config.batch_size,
            "epochs": config.epochs,
            "weight_decay": protocol.weight_decay,
            "schedule": f"cosine per {protocol.schedule}",
            "interpolation": protocol.interpolation,
            "crop_min": protocol.crop_min,
            "training_views": "stored center crops" if config.cache_features else "crop, flip",
            "lr": state["chosen"],
            "tried": {"lr": first["lrs"]},
            "chosen_on": words,
        }
        if protocol.warmup_epochs:
            hyperparameters["warmup_epochs"] = protocol.warmup_epochs
        others = {"top5": [r["top5"] for r in results]}
        if len(first["lrs"]) > 1:
            others["held-out top1 of each lr"] = first["held_out_top1"]
            edge = state["chosen"] in (first["lrs"][0], first["lrs"][-1])
            if edge:
                self.job.warn(f"lr {state['chosen']:g} is at the edge of those tried: widen --lrs")
        values = [r["top1"] for r in results]
        note = "stored features, no augmentation: a quick look" if config.cache_features else ""
        name = "linear (stored features)" if config.cache_features else "linear"
        # the papers state their protocols for ImageNet alone
        assumed = protocol.assumed or config.dataset != "imagenet"
        self.job.write_record(name, values, hyperparameters, others, assumed, note)

    # -- k-NN -----------------------------------------------------------------------------------

    def knn(self) -> None:
        """Scores weighted k-NN for every k, on all training images, and writes its record."""
        job, config = self.job, self.config
        view = {"square": True} if KNN[config.knn_transform][0] else {}
        train, test = job.train, job.test
        own = rank_share(len(train))
        train_x = self.share("train", np.arange(len(train)), **view)[: len(own)]
        test_x = gather_shares(self.share("test", np.arange(len(test)), **view), len(test))
        accuracies = knn_over_ranks(
            train_x,
            torch.from_numpy(train.labels[own]),
            test_x,
            torch.from_numpy(test.labels),
            len(train),
            job.classes,
            KS,
            config.knn_temperature,
        )
        temperature = config.knn_temperature
        found = {f"k{k}": round(100 * a, 3) for k, a in zip(KS, accuracies, strict=True)}
        job.write_record(
            f"kNN (k{REPORTED_K},t{f'{temperature:g}'.removeprefix('0')})",
            [found[f"k{REPORTED_K}"]],
            {"k": REPORTED_K, "temperature": temperature, "transform": config.knn_transform},
            found,
            assumed=False,
            file=RECORD_KNN,
        )

    # -- results --------------------------------------------------------------------------------

    def say_result(self, path: Path) -> None:
        if self.job.rank:
            return
        found = documents.read_json(path, "record")
        if path.name == RECORD_KNN:
            text = ", ".join(f"{k} {v:.2f} %" for k, v in found["others"].items())
            text = f"k-NN top-1: {text}"
        else:
            spread = "" if found["spread"] is None else f" ± {found['spread']:.2f}"
            top5 = sum(found["others"]["top5"]) / len(found["others"]["top5"])
            text = f"linear top-1 {found['value']:.2f}{spread} %, top-5 {top5:.2f} %, "
            text += (
                f"lr {found['hyperparameters']['lr']:g} ({found['hyperparameters']['protocol']})"
            )
        self.job.finish(text, [path])


def stored_batches(
    features: Tensor,
    labels: Tensor,
    samples: np.ndarray,
    seed: int,
    start: int,
    total: int,
    batch: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of stored features, in the order in which RankBatches reads the images."""
    steps_per_epoch = len(samples) // batch
    local = batch // distributed.world_size()
    rows, of = torch.empty(0), -1
    for step in range(start, total):
        epoch, place = divmod(step, steps_per_epoch)
        if epoch != of:
            order = epoch_order(len(samples), seed, epoch)
            rows, of = torch.from_numpy(samples[order]).to(features.device), epoch
        first = place * batch + distributed.rank() * local
        own = rows[first : first + local]
        yield features[own], labels[own]


def percent(fractions: Tensor) -> list[float]:
    return [round(100 * f, 3) for f in fractions.tolist()]


def best(accuracies: list[float], last_losses: list[float]) -> int:
    """Returns the place of the best head that did not diverge; of equals the smallest rate's."""
    finite = [i for i, loss in enumerate(last_losses) if math.isfinite(loss)]
    if not finite:
        raise UserError("every head diverged: try smaller --lrs")
    return max(finite, key=lambda i: (accuracies[i], -i))


def assert_unchanged(encoder: torch.nn.Module, before: dict[str, Tensor]) -> None:
    """Raises AssertionError if any tensor of the frozen encoder has changed, by a single bit."""
    for name, tensor in encoder.state_dict().items():
        if not torch.equal(tensor.cpu(), before[name]):
            raise AssertionError(f"{name} of the frozen encoder changed during the linear probe")


if __name__ == "__main__":
    sys.exit(command(main))
