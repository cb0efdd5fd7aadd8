"""The supervised control: the encoder of a self-supervised run trained with labels instead, on the
same images, views and steps.

    python eval/supervised.py --dataset photos                       # from scratch
    python eval/supervised.py --dataset cifar10 --data PATH --train-images 1000   # on few labels
    python eval/supervised.py --dataset cifar10 --data PATH --train-images 1000 --init RUN

Both views of each image pass through the encoder in one forward; a linear head gives logits, the
loss is the cross-entropy with the image's label, its mean over both views. --init starts the
encoder, not the head, from the backbone of a finished run: fine-tuning. No paper's: where a value
has no source it is ours. Otherwise a run as the recipes' are: resume, ranks, metrics, k-NN; and its
record.json says how many test images the classifier itself gets right.
"""

import sys
from dataclasses import dataclass
from typing import Any, Literal

import common.run.early  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import View, ViewName, two_views
from common.config import CIFAR10, PHOTOS, Count, NotNegative, PositiveInt, RunConfig, Share
from common.data.images import Images
from common.distributed import average_gradients
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.files import write
from common.knn import extract_features, gather_shares, rank_share
from common.models import build_encoder, in_full_precision
from common.optim import build_optimizer, scaled_lr, set_lr, warmup_cosine
from common.run import backbone, documents, results
from common.run.flags import parse
from common.run.folder import CONFIG, finished_record
from common.run.run import Run
from eval.evaluation import RECORD
from eval.readout.run import history_of
from results import record

PROTOCOL = "classifier"


@dataclass(frozen=True)
class Config(RunConfig):
    """The supervised control: an encoder and a linear head, trained with labels.

    "Goyal": values of Goyal et al. 2017 (Sec. 5.1) for ResNet-50 on ImageNet; the rest is ours.
    """

    epochs: PositiveInt = 90  # Goyal; his rate falls in steps, ours by a cosine
    batch_size: PositiveInt = 256  # global batch; Goyal's baseline
    lr: NotNegative = 0.1  # base rate, times batch/lr-batch; Goyal
    lr_batch: Count = 256  # the batch that --lr is given for, 0: not scaled; Goyal
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"  # Goyal
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; Goyal
    weight_decay: NotNegative = 1e-4  # Goyal; here of biases and norms too, but for LARS
    warmup_epochs: NotNegative = 5  # Goyal; from 0
    zero_init_residual: bool = True  # start the last batch norm of each block at 0; Goyal
    views: ViewName = "crop-flip"  # ours: one of the names that the recipes' views have
    jitter_strength: NotNegative = 1.0  # scales --views' colour jitter; ours
    # smallest area of a crop, as a share of the image's; ours, torchvision's default
    crop_min: Share = 0.08
    crop_interpolation: Literal["bicubic", "bilinear"] = "bilinear"  # ours, torchvision's default
    init: str = ""  # start the encoder from the backbone of this finished run, of the same --arch


# ours, not searched for
PRESETS = {
    "cifar10": CIFAR10 | {"lr": 0.1, "zero_init_residual": False},
    "photos": PHOTOS | {"lr": 0.1, "warmup_epochs": 1, "zero_init_residual": False},
}


class Supervised(nn.Module):
    """Logits of a linear head on h = f(x)."""

    def __init__(self, config: Config, classes: int):
        super().__init__()
        self.encoder = build_encoder(config.arch, config.image_size, config.zero_init_residual)
        self.head = nn.Linear(self.encoder.embed_dim, classes)

    @property
    def projector(self) -> nn.Module:
        """Returns the head, whose logits common/run/geometry.py takes as the embedding."""
        return self.head

    def start_from(self, run: str, arch: str) -> None:
        """Loads the encoder of a finished run; `started_from` keeps its checksum for the record,
        also over restarts. Raises UserError if there is none or it is another arch.
        """
        folder = documents.expanded(run)
        if not results.is_finished(folder):
            raise UserError(f"--init {run}: no finished run is there, train it first")
        encoder, metadata = backbone.load_backbone(folder)
        if metadata["arch"] != arch:
            raise UserError(f"--init {run}: its encoder is a {metadata['arch']}, --arch is {arch}")
        backbone.load_exactly(self.encoder, encoder.state_dict(), f"--init {run}")
        checksum = bytes.fromhex(results.checksum(folder / backbone.NAME))
        self.register_buffer("started_from", torch.tensor([*checksum], dtype=torch.uint8))


@in_full_precision
def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns a scalar, the mean of the cross-entropy over all views, of logits (2N,C), all first
    views before all second ones, and labels (N,).
    """
    return F.cross_entropy(logits, labels.repeat(2))


@torch.no_grad()
def accuracy_of(run: Run, model: Supervised, images: Images) -> float:
    """Returns the share of these images, by centre view, whose largest logit is their label's."""
    own = rank_share(len(images), padded=True)
    how = run.config.image_size, run.workers, run.autocast
    rows = gather_shares(extract_features(model.encoder, images, own, *how), len(images))
    with run.autocast():
        found = model.head(rows).argmax(dim=1)
    return (found.cpu() == torch.from_numpy(images.labels)).double().mean().item()


def record_of(run: Run, model: Supervised, images: Images, accuracy: float) -> dict[str, Any]:
    """Returns the record of what the classifier of a finished run gets right."""
    config = documents.read_yaml(run.folder / CONFIG, "config")
    found = record.of_runs([run.folder])
    what, left_out = found["pretraining"], len(run.test) - len(images)
    missing = record.scored_on(config, {"test": left_out} if left_out else {}, votes=False)
    found |= {
        "dataset": {"name": what["dataset"], "copy": what["copy"], "incomplete": missing},
        "protocol": PROTOCOL,
        "metric": "top1",
        **history_of(run.folder),
    }
    if hasattr(model, "started_from"):
        checksum = bytes(model.started_from.tolist()).hex()
        found["hyperparameters"] = {"started_from_sha256": checksum}
    return record.with_values(found, [100 * accuracy])


def is_recorded(run: Run) -> bool:
    """Tells whether a finished run has its record."""
    found = results.read(run.folder)["backbone_sha256"] if run.is_finished() else ""
    return finished_record(run.folder / RECORD, found) is not None


def score(run: Run, model: Supervised) -> tuple[Images, float] | None:
    """Returns the test images and the share that is right; None if there is nothing to record."""
    if run.test is None or run.test.labels is None:
        run.say("no labelled test images: no record of the classifier")
        return None
    if is_recorded(run):
        return None
    if run.last_saved_step != run.step:
        raise UserError(
            f"{run.folder} is finished and has neither its record nor the checkpoint that the "
            "classifier is read from: train anew with another --output"
        )
    images = run.knn_images[1]
    accuracy = accuracy_of(run, model, images)
    run.say(f"classifier: {accuracy:.1%} of {len(images):,} test images")
    return images, accuracy


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    return [*two_views(config.views, size, crop_min, mode, config.jitter_strength)]


def parse_arguments(argv: list[str] | None = None) -> Config:
    return parse(Config, PRESETS, argv)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("supervised", config)
    if run.train.labels is None or len(run.train.classes) < 2:
        raise UserError(f"{run.train.name} has no labels of two or more classes to learn from")
    model = Supervised(config, len(run.train.classes))
    if config.init:
        model.start_from(config.init, config.arch)
    model = run.place(model)
    encode = Pieces(model.encoder, config)
    labels = torch.from_numpy(run.train.labels).to(run.device, torch.long)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    run.begin(model.encoder, model=model, optimizer=optimizer)

    for step, (x1, x2), ids in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr)
        set_lr(optimizer, rate)

        with run.autocast():  # both views in one forward: their batch statistics are joint
            (h,) = encode(torch.cat([x1, x2]))  # representations, 2n-by-d
            logits = model.head(h)  # 2n-by-classes

        loss = supervised_loss(logits, labels[ids])

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        right = (logits.detach().argmax(dim=1) == labels[ids].repeat(2)).double().mean()
        run.log(loss=loss, lr=rate, z=logits.chunk(2)[0], train_accuracy=right)

    scored = score(run, model)
    run.finish(model.head.out_features)
    if scored and run.rank == 0:
        found = record_of(run, model, *scored)
        write(run.folder / RECORD, record.text_of(found))
        for problem in record.problems(found):
            run.warn(f"{run.folder / RECORD} cannot be stored as it is: {problem}")


if __name__ == "__main__":
    sys.exit(command(main))
