"""Fine-tuning on 1 % or 10 % of the labels, by the papers' protocols.

    python eval/semi_supervised/run.py --backbone runs/snclr/imagenet-resnet50-0 --percent 1
    python eval/semi_supervised/run.py --backbone RUN --percent 10 --list 10percent.txt
    python eval/semi_supervised/run.py --backbone RUN --percent 1 --seeds 3   # CIFAR-10: `small`

README.md, beside this file, says what each protocol is and where it comes from. Writes
record.json; started again, it continues.
"""

import copy
import dataclasses
import hashlib
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import common.run.early  # noqa: F401  # isort: skip
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import cards, distributed
from common.config import PositiveInt
from common.data.images import Images, subset
from common.data.loaders import RankBatches, view_loader
from common.errors import UserError, command
from common.fast.batch_norm import rank_batch_norm
from common.fast.pixels import to_input
from common.models import full_precision
from common.optim import ClassicLARS
from common.progress import duration
from common.run import checkpoint, documents
from common.run.flags import parse
from common.run.run import check_batch, report_problems
from eval.evaluation import (
    RECORD,
    Evaluation,
    EvaluationConfig,
    held_out,
    linear_weights,
    parse_numbers,
)
from eval.semi_supervised.lists import SHA256, balanced_subset, read_list, simclr_list
from eval.semi_supervised.protocols import PROTOCOLS, schedule


@dataclass(frozen=True)
class SemiConfig(EvaluationConfig):
    """Fine-tuning on 1 % or 10 % of the labels, by the papers' protocols."""

    percent: Literal[1, 10] = 1  # how many of the training images are labelled
    # whose fine-tuning; default: on ImageNet the one that the card of the run's recipe names,
    # elsewhere `small`
    protocol: Literal[(*PROTOCOLS,)] | None = None
    # file with the labelled images, one per line; default: SimCLR's list on ImageNet (downloaded
    # once), elsewhere a class-balanced draw from --seed
    list: str = ""
    head_lrs: str = ""  # base rates per 256 images to try, like 0.1,0.5; default: the protocol's
    encoder_lrs: str = ""  # the same for the encoder
    batch_size: PositiveInt | None = None  # default: the protocol's
    epochs: str = ""  # numbers of epochs to try, like 30,50; default: the protocol's


@dataclass(frozen=True)
class Candidate:
    """One setting of the sweep. Rates are per 256 images of the batch."""

    head_lr: float
    encoder_lr: float
    epochs: int


def parse_arguments(argv: list[str] | None = None) -> SemiConfig:
    return parse(SemiConfig, {}, argv)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    tuning = FineTuning(config)
    job = tuning.job
    job.begin(f"semi_supervised-{config.percent}percent-{tuning.config.protocol}")
    with job.working():
        if not job.is_written():
            tuning.run()
    tuning.say_result(job.folder / RECORD)
    distributed.stop()


class Classifier(nn.Module):
    """An encoder and a linear head on it; all of it is trained."""

    def __init__(self, encoder: nn.Module, weight: Tensor):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N,3,S,S) to scores (N,C)."""
        return self.head(self.encoder(x))


def with_projector(encoder: nn.Module, source: str, layers: int) -> nn.Module:
    """Returns the encoder, and behind it the first layers of the projector (linear, batch norm,
    ReLU each) that its run trained with it. Raises UserError if `source` is no run's folder or file
    of it that has a checkpoint with such a projector.
    """
    path = documents.expanded(source)
    folder = path if path.is_dir() else path.parent
    saved = path if path.suffix == ".pt" and path.is_file() else checkpoint.find(folder)
    tensors = checkpoint.load(saved)["state"]["model"] if saved and path.exists() else {}
    parts, prefix = [encoder], "projector."
    tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    for layer in range(layers):
        place, norm = str(3 * layer), str(3 * layer + 1)
        if f"{place}.weight" not in tensors or f"{norm}.running_mean" not in tensors:
            raise UserError(
                f"{source}: the protocol keeps {layers} of the projector's layers, of which there "
                f"are {layer}: give a run's folder or its checkpoint"
            )
        out, inputs = tensors[f"{place}.weight"].shape
        linear = nn.Linear(inputs, out, bias=f"{place}.bias" in tensors)
        for name, part in ((place, linear), (norm, nn.BatchNorm1d(out))):
            own = {
                n.removeprefix(f"{name}."): t
                for n, t in tensors.items()
                if n.startswith(f"{name}.")
            }
            part.load_state_dict(own)
            parts.append(part)
        parts.append(nn.ReLU())
    whole = nn.Sequential(*parts).eval()
    whole.embed_dim = out
    return whole


class FineTuning:
    """Fine-tunes with every setting on the first seed, and with the chosen one on the others."""

    def __init__(self, config: SemiConfig):
        self.job = Evaluation(config)
        config = self.job.config
        name = config.protocol
        if name is None and config.dataset == "imagenet":
            name = cards.protocol(self.job.facts["recipe"], "finetune", PROTOCOLS)
            if name is None:
                raise UserError(
                    f"no paper's protocol here: give --protocol ({', '.join(PROTOCOLS)})"
                )
        name = name or "small"
        percent = config.percent
        self.protocol = PROTOCOLS[name].others.get(percent, PROTOCOLS[name])
        if percent not in self.protocol.head_lrs:
            raise UserError(f"--protocol {name} has no source for {percent} %: take another")
        self.config = dataclasses.replace(
            config,
            protocol=name,
            batch_size=config.batch_size or self.protocol.batch[percent],
        )
        self.job.config = self.config
        if layers := self.protocol.projector_layers:
            encoder = with_projector(self.job.encoder, config.backbone, layers)
            self.job.encoder = encoder.to(self.job.device, self.job.dtype)
        check_batch(self.config.batch_size, self.job.ranks)
        self.candidates = self.settings()

    def settings(self) -> list[Candidate]:
        """Returns all settings to try, in one fixed order."""
        config, protocol, percent = self.config, self.protocol, self.config.percent
        epochs = protocol.epochs[percent]
        if config.epochs:
            numbers = parse_numbers(config.epochs, "--epochs")
            if not all(n == int(n) > 0 for n in numbers):
                raise UserError(f"--epochs {config.epochs}: give whole numbers above 0")
            epochs = tuple(map(int, numbers))
        heads, encoders = protocol.head_lrs[percent], protocol.encoder_lrs[percent]
        tied = protocol.tied and not (config.head_lrs or config.encoder_lrs)
        if config.head_lrs:
            heads = tuple(parse_numbers(config.head_lrs, "--head-lrs"))
        if config.encoder_lrs:
            encoders = tuple(parse_numbers(config.encoder_lrs, "--encoder-lrs"))
        pairs = zip(heads, encoders, strict=True) if tied else itertools.product(heads, encoders)
        return [Candidate(h, e, n) for (h, e), n in itertools.product(pairs, epochs)]

    # -- images ---------------------------------------------------------------------------------

    def labelled(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns (numbers of the labelled training images, what the record says about them)."""
        job, config = self.job, self.config
        if not config.list and config.dataset != "imagenet":
            samples = balanced_subset(job.train.labels, config.percent, seed)
            return samples, {"images": len(samples), "list": "class-balanced, drawn from the seed"}
        path = documents.expanded(config.list) if config.list else self.downloaded()
        samples = read_list(path, job.train, job.unreadable_names)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        known = {value: f"simclr {name}" for name, value in SHA256.items()}
        return samples, {
            "images": len(samples),
            "list": known.get(digest, path.name),
            "list_sha256": digest,
        }

    def downloaded(self) -> Path:
        """Returns SimCLR's list; rank 0 of the group fetches it, and all ranks raise its errors."""
        path, error = None, None
        if self.job.rank == 0:
            try:
                path = simclr_list(self.config.percent)
            except UserError as problem:
                error = str(problem)
        if (error := distributed.from_rank_zero(error)) is not None:
            raise UserError(error)
        return distributed.from_rank_zero(path)

    # -- training -------------------------------------------------------------------------------

    def run(self) -> None:
        """Tries the settings, repeats the chosen one, writes the record."""
        job, config = self.job, self.config
        state = job.restore() or {"tried": [], "results": [], "best": None, "steps": 0}
        samples, about = self.labelled(config.seed)
        held, words = None, None
        if len(self.candidates) > 1:
            rest = np.setdiff1d(np.arange(len(job.train)), samples)
            _, held, words = held_out(
                job.train.labels[rest], config.dataset == "imagenet", config.seed
            )
            held = subset(job.train, rest[held])
            words = words.replace("training images", "unlabelled training images")
            job.say(f"{len(samples)} labelled images, {len(self.candidates)} settings to try")
        while len(state["tried"]) < len(self.candidates):
            number = len(state["tried"])
            model = self.train(samples, self.candidates[number], config.seed, state)
            accuracy = None  # diverged
            if math.isfinite(state["loss"]):
                accuracy = 0.0 if held is None else self.accuracy(model, held, "held out")[0]
            if held is not None:
                c = self.candidates[number]
                shown = "diverged" if accuracy is None else f"{accuracy:.2f} % of those held out"
                job.say(
                    f"setting {number + 1} of {len(self.candidates)}: head {c.head_lr:g}, encoder "
                    f"{c.encoder_lr:g}, {c.epochs} epochs: {shown}"
                )
            if accuracy is not None and accuracy > best_of(state["tried"])[1]:
                state["best"] = {n: t.clone() for n, t in model.state_dict().items()}
            state = self.after_training(state, tried=accuracy)
        if state["best"] is None:
            raise UserError("every setting diverged: try smaller --head-lrs, --encoder-lrs")
        chosen = self.candidates[best_of(state["tried"])[0]]
        while len(state["results"]) < config.seeds:
            number = len(state["results"])
            if number == 0:
                model = self.model(config.seed)
                model.load_state_dict(state["best"])
            else:
                seed = config.seed + number
                model = self.train(self.labelled(seed)[0], chosen, seed, state)
            state = self.after_training(state, results=self.accuracy(model, job.test, "test"))
        self.write(state, chosen, about, words)

    def after_training(self, state: dict[str, Any], **new: Any) -> dict[str, Any]:
        """Adds a result to the state, drops the training that gave it, and saves it if due."""
        ((name, value),) = new.items()
        done = {n: state[n] for n in ("tried", "results", "best")}
        steps = state["steps"] + state.get("step", 0)
        done |= {name: [*state[name], value], "steps": steps}
        self.job.after_step(lambda: done)
        return done

    def model(self, seed: int) -> Classifier:
        job = self.job
        weight = linear_weights(job.classes, job.encoder.embed_dim, self.protocol.init, seed)
        model = Classifier(copy.deepcopy(job.encoder), weight).to(job.device, job.dtype)
        return rank_batch_norm(model, job.device)

    def train(
        self, samples: np.ndarray, candidate: Candidate, seed: int, state: dict[str, Any]
    ) -> Classifier:
        """Returns the model after the last epoch. `state` gets the steps done, and may hold the
        middle of this very training.
        """
        job, config, protocol = self.job, self.config, self.protocol
        images, batch = subset(job.train, samples), config.batch_size
        steps_per_epoch = len(images) // batch
        if steps_per_epoch == 0:
            raise UserError(
                f"{len(images)} labelled images are fewer than one batch: use a --batch-size "
                f"of at most {len(images)}",
            )
        total = steps_per_epoch * candidate.epochs
        model = self.model(seed)
        rates = {"head": candidate.head_lr, "encoder": candidate.encoder_lr}
        parts = {
            name: [p for p in getattr(model, name).parameters() if p.requires_grad]
            for name in rates
        }
        groups = [{"params": parts[n], "base": r * batch / 256} for n, r in rates.items()]
        if protocol.lars:
            groups[0]["adapted"] = False  # the head; lars_optimizer.py leaves it out
            optimizer = ClassicLARS(groups, lr=0.0, momentum=0.9)
        else:
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=protocol.nesterov)
        first = state.get("step", 0)
        if first:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        sums = torch.as_tensor(state.get("sums", 0.0), dtype=torch.float64, device=job.device)
        job.cut_log(state["steps"] + first)
        labels = torch.from_numpy(images.labels).to(job.device)
        job.bar = job.progress_bar(total, f"fine-tuning, seed {seed}", initial=first)
        begun = time.monotonic(), first / steps_per_epoch
        for step, (x, ids) in enumerate(self.batches(images, seed, first, total), first):
            factor = schedule(protocol.schedule, step, steps_per_epoch, candidate.epochs)
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * factor
            model.train()
            with job.autocast():
                scores = model(x)
            loss = F.cross_entropy(full_precision(scores)[0], labels[ids])
            optimizer.zero_grad()
            loss.backward()
            distributed.average_gradients(model)
            optimizer.step()
            sums = sums + loss.detach()
            state["step"] = step + 1
            if (step + 1) % steps_per_epoch == 0:
                epoch = (step + 1) // steps_per_epoch
                loss = distributed.mean_over_ranks(sums).item() / steps_per_epoch
                state["loss"] = loss
                self.log_epoch(seed, candidate, epoch, state["steps"] + step + 1, loss, *begun)
                sums = torch.zeros_like(sums)
            job.after_step(
                lambda sums=sums: {
                    **state,
                    "sums": sums.item(),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                last=step + 1 == total,
            )
        job.bar.close()
        return model.eval()

    def batches(self, images: Images, seed: int, first: int, total: int):
        """Yields (N,3,S,S) inputs and (N,) numbers of this rank's part of each batch."""
        job, config, protocol = self.job, self.config, self.protocol
        loader = view_loader(
            images,
            [protocol.view(config.image_size)],
            RankBatches(len(images), config.batch_size, seed, first, total, job.rank, job.ranks),
            job.workers,
            skip_bad_images=config.on_bad_image == "skip",
            pin_memory=job.device.type == "cuda",
        )
        for pixels, ids, problems, must_stop in loader:
            report_problems(problems, must_stop)
            yield to_input(pixels[0], job.device, job.dtype), ids.to(job.device, non_blocking=True)

    def log_epoch(
        self,
        seed: int,
        candidate: Candidate,
        epoch: int,
        step: int,
        loss: float,
        started: float,
        first: float,
    ) -> None:
        """Writes one line of metrics.jsonl. If there is only one candidate, it also prints one
        after each tenth of the epochs. `first` epochs were done when this start began at the time
        `started`.
        """
        values = {"kind": "epoch", "seed": seed, "epoch": epoch, "step": step}
        values |= {"loss": loss if math.isfinite(loss) else None}
        rates = {"head_lr": candidate.head_lr, "encoder_lr": candidate.encoder_lr}
        self.job.log(values | rates)
        if len(self.candidates) == 1 and epoch % max(1, candidate.epochs // 10) == 0:
            left = (time.monotonic() - started) * (candidate.epochs - epoch) / (epoch - first)
            self.job.say(
                f"seed {seed}, epoch {epoch} of {candidate.epochs}: loss {loss:.4f}, "
                f"{duration(left)} left"
            )

    def accuracy(self, model: Classifier, images: Images, what: str) -> list[float]:
        """Returns top-1 and top-5 in percent on the evaluation views."""
        view = {"interpolation": self.protocol.interpolation}
        features = self.job.features(images, what, model.encoder, **view)
        right = self.job.correct(model.head, features, images)
        return [round(100 * r, 3) for r in right.tolist()]

    # -- results --------------------------------------------------------------------------------

    def write(
        self, state: dict[str, Any], chosen: Candidate, about: dict[str, Any], words: str | None
    ) -> None:
        config, protocol = self.config, self.protocol
        tried = [dataclasses.asdict(c) for c in self.candidates]
        if words is not None:
            tried = [t | {"held_out_top1": a} for t, a in zip(tried, state["tried"], strict=True)]
        hyperparameters = {
            "protocol": config.protocol,
            "optimizer": "lars" if protocol.lars else "nesterov" if protocol.nesterov else "sgd",
            "projector_layers": protocol.projector_layers,
            "batch": config.batch_size,
            "weight_decay": 0.0,
            "schedule": protocol.schedule,
            "interpolation": protocol.interpolation,
            "crop_min": protocol.crop_min,
            "labelled": about,
            "chosen": dataclasses.asdict(chosen),
            "tried": tried,
            "chosen_on": words,
        }
        self.job.write_record(
            f"semi-sup {config.percent}%",
            [top1 for top1, _ in state["results"]],
            hyperparameters,
            {"top5": [top5 for _, top5 in state["results"]]},
            protocol.assumed,
        )

    def say_result(self, path: Path) -> None:
        if self.job.rank:
            return
        found = documents.read_json(path, "record")
        spread = "" if found["spread"] is None else f" ± {found['spread']:.2f}"
        top5 = sum(found["others"]["top5"]) / len(found["others"]["top5"])
        chosen = found["hyperparameters"]["chosen"]
        self.job.finish(
            f"{self.config.percent} % of the labels: top-1 {found['value']:.2f}{spread} %, top-5 "
            f"{top5:.2f} % (head lr {chosen['head_lr']:g}, encoder lr {chosen['encoder_lr']:g}, "
            f"{chosen['epochs']} epochs)",
            [path],
        )


def best_of(accuracies: list[float | None]) -> tuple[int, float]:
    """Returns (place, value) of the largest, the first of equals; None never wins: (0, -1)."""
    values = [-1.0 if a is None else a for a in accuracies]
    place = max(range(len(values)), key=lambda i: (values[i], -i), default=0)
    return place, max(values, default=-1.0)


if __name__ == "__main__":
    sys.exit(command(main))
