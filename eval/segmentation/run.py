"""ADE20K segmentation from a backbone: UPerNet, and its mIoU.

    python eval/segmentation/run.py --backbone runs/byol_gsg/imagenet-resnet50-0 --data DIR
    python eval/segmentation/run.py --backbone resnet50.pth --arch resnet50 --method Supervised \
        --pretrained-on ImageNet-1k --data DIR

README.md, beside this file, says where the settings come from. Writes record.json and
predictions.png; started again, it continues.
"""

import sys
from dataclasses import dataclass
from typing import Any

import common.run.early  # noqa: F401  # isort: skip
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed
from common.config import NotNegative, PositiveInt, Share
from common.data.loaders import ignore_stop_signals
from common.errors import UserError, command
from common.run import documents
from common.run.flags import parse
from eval.dense import DenseConfig, DenseEvaluation, per_rank, raise_errors
from eval.evaluation import RECORD, parse_numbers
from eval.segmentation import ade20k, model, picture

PROTOCOL = "UPerNet 150k"
PICTURE = "predictions.png"


@dataclass(frozen=True)
class SegmentationConfig(DenseConfig):
    """Semantic segmentation from a backbone: trains UPerNet on ADE20K, and scores it."""

    iterations: PositiveInt = 150_000  # GSG App. D.3
    batch_size: PositiveInt = 2  # GSG App. D.3: in all, over ranks; ssl-transfer's command gives 4
    lr: NotNegative = 0.02  # GSG App. D.3
    momentum: Share = 0.9  # GSG App. D.3
    # GSG App. D.3; norms and biases have none (ssl-transfer train.py)
    weight_decay: NotNegative = 1e-4
    # exponent of the polynomial schedule (1 - t/T)**power: GSG App. D.3's "decay rate of 0.9"
    power: float = 0.9
    # iterations between changes of the rate: GSG App. D.3; ssl-transfer's code has 1
    decay_every: PositiveInt = 500
    # weight of the loss of a head on layer3: ssl-transfer's deep_sup_scale. Its code ignores that
    # for UPerNet, so 0 is what it runs
    deep_supervision: NotNegative = 0.4
    sizes: str = "300,375,450,525,600"  # shorter sides, one drawn for each batch: ssl-transfer
    # shorter sides whose probabilities are averaged in the test: ssl-transfer, all of them
    test_sizes: str = "300,375,450,525,600"
    longest: PositiveInt = 1000  # the longer side has at most so many pixels: ssl-transfer


def parse_arguments(argv: list[str] | None = None) -> SegmentationConfig:
    return parse(SegmentationConfig, {}, argv)


def main(argv: list[str] | None = None) -> None:
    Segmentation(parse_arguments(argv)).evaluate("segmentation-ade20k")


class Segmentation(DenseEvaluation):
    """UPerNet on one backbone."""

    def __init__(self, config: SegmentationConfig):
        self.sides = whole_numbers(config.sizes, "--sizes")
        self.test_sides = whole_numbers(config.test_sizes, "--test-sizes")
        super().__init__(config)
        batch = config.batch_size
        if batch % self.ranks or batch > len(self.train):
            raise UserError(
                f"--batch-size {batch} is the batch over all {self.ranks} ranks, which must divide "
                f"it, of {len(self.train)} training images",
            )

    def load_images(self) -> tuple[ade20k.Scenes, ade20k.Scenes]:
        config = self.config
        train, test = (ade20k.load(config.data, part, config.max_pixels) for part in ade20k.IMAGES)
        train.check()
        test.check()
        return train, test

    def dataset_fields(self) -> dict[str, Any]:
        found = {"training": len(self.train), "validation": len(self.test)}
        missing = [
            f"{n} of {ade20k.IMAGES[part]} {part} images"
            for part, n in found.items()
            if n != ade20k.IMAGES[part]
        ]
        return {"name": "ADE20K", "copy": None, "incomplete": ", ".join(missing) or None}

    def learning_rate(self, step: int) -> float:
        """Returns the rate of the iteration after `step` done ones."""
        config = self.config
        step -= step % config.decay_every
        return config.lr * (1 - step / config.iterations) ** config.power

    # -- training -------------------------------------------------------------------------------

    def trained(self) -> model.Segmenter:
        """Returns the model after the last iteration."""
        config = self.config
        net = model.build(config.arch, ade20k.CLASSES, config.deep_supervision > 0, config.seed)
        body = net.net.encoder
        body.load_state_dict(self.encoder.state_dict())
        net.to(self.device)
        body.eval()
        self.check_body(body, lambda x: model.features_of(net, x))
        net = self.over_ranks(net)
        groups = model.parameter_groups(net, config.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
        self.train_steps(
            net,
            optimizer,
            config.iterations,
            self.batches,
            lambda batch: self.losses(net, *raise_errors([batch])[0]),
            self.learning_rate,
        )
        return net

    def batches(self, first: int, last: int) -> torch.utils.data.DataLoader:
        config, local = self.config, self.config.batch_size // self.ranks
        own = slice(self.rank * local, (self.rank + 1) * local)
        examples = ade20k.TrainingBatches(
            self.train, config.batch_size, self.sides, config.longest, config.seed, own
        )
        return torch.utils.data.DataLoader(
            examples,
            batch_size=None,
            sampler=range(first, last),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=ignore_stop_signals,
        )

    def losses(self, net: model.Segmenter, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Returns the cross-entropy over labelled pixels, and the weighted one of layer3's head."""
        scores, side = net(x.to(self.device, non_blocking=True))
        y = y.to(self.device, non_blocking=True)
        found = {"loss_pixels": cross_entropy(scores, y)}
        if side is not None:
            found["loss_layer3"] = self.config.deep_supervision * cross_entropy(side, y)
        return found

    # -- scoring --------------------------------------------------------------------------------

    @torch.no_grad()
    def conclude(self, net: model.Segmenter) -> None:
        """Scores the validation images; writes picture and, last, the record."""
        net.eval()
        own = per_rank(len(self.test))
        rounds = -(-len(self.test) // self.ranks)
        numbers = [*own, *([0] if len(own) < rounds else [])]  # all ranks do as many
        scenes = torch.utils.data.DataLoader(
            ade20k.TestScenes(self.test, numbers, self.test_sides, self.config.longest),
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=ignore_stop_signals,
        )
        confusion = ade20k.Confusion(ade20k.CLASSES, self.device)
        bar = self.progress_bar(rounds, "scoring", "image")
        for place, scene in enumerate(scenes):
            views, truth = raise_errors([scene])[0]
            if place < len(own):
                prediction = self.predict(net, views, tuple(truth.shape))
                confusion.add(truth.to(self.device), prediction)
            bar.update()
            if distributed.any_rank([self.requests.received is not None])[0]:
                self.stop("after training, which is saved; scoring starts again")
        bar.close()
        distributed.all_reduce_sum(confusion.counts)
        self.draw(net)
        self.write(confusion.scores())

    def predict(self, net: model.Segmenter, views: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Returns (H,W), the classes of the largest probability, averaged over all test sizes."""
        total = 0
        for x in views:
            with self.autocast():
                scores, _ = net(x.to(self.device))
            total = total + ade20k.upsampled(scores.float(), size) / len(views)
        return total[0].argmax(0)

    @torch.no_grad()
    def draw(self, net: model.Segmenter) -> None:
        """Draws predictions.png, by rank 0."""
        if self.rank:
            return
        numbers = range(min(picture.SHOWN, len(self.test)))
        scenes = ade20k.TestScenes(self.test, [*numbers], self.test_sides, self.config.longest)
        rows = []
        for number in numbers:
            views, truth = raise_errors([scenes[number]])[0]
            prediction = self.predict(net, views, tuple(truth.shape)).cpu().numpy()
            rows.append((self.test.load(number)[0], truth.numpy(), prediction))
        title = f"{self.encoder_fields()['method']}: first validation images of ADE20K"
        picture.draw(self.folder / PICTURE, rows, ade20k.CLASSES, title)

    def write(self, found: dict[str, float]) -> None:
        config = self.config
        changed = [n for n in FIXED if getattr(config, n) not in kept(n)]
        hyperparameters = {n: getattr(config, n) for n in FIXED}
        self.write_record(
            PROTOCOL + (", changed" if changed else ""),
            [found["mIoU"]],
            hyperparameters | {"decoder": f"UPerNet, {model.DECODER_CHANNELS} channels"},
            {n: round(v, 3) for n, v in found.items()},
            assumed=True,  # sizes, test scales and decoder are unstated, see README
            metric="mIoU",
        )

    def say_result(self) -> None:
        if self.rank:
            return
        path = self.folder / RECORD
        found = documents.read_json(path, "record")["others"]
        text = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        self.say(f"picture: {self.folder / PICTURE}")
        self.finish(text, [path])


# with these settings unchanged, a number can be compared with the paper's
FIXED = ("iterations", "batch_size", "lr", "momentum", "weight_decay", "power", "decay_every")
FIXED += ("deep_supervision", "sizes", "test_sizes", "longest")


def kept(name: str) -> tuple[Any, ...]:
    """Returns a setting's values in the paper and its code: these are not called "changed"."""
    default = getattr(SegmentationConfig, name)
    return (default, 1) if name == "decay_every" else (default,)


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean over labelled pixels; 0 if a batch has none."""
    total = F.cross_entropy(scores.float(), labels, ignore_index=ade20k.IGNORED, reduction="sum")
    return total / (labels != ade20k.IGNORED).sum().clamp(min=1)


def whole_numbers(text: str, flag: str) -> list[int]:
    numbers = parse_numbers(text, flag)
    if not all(n == int(n) > 0 for n in numbers):
        raise UserError(f"{flag} {text}: give whole numbers above 0")
    return list(map(int, np.asarray(numbers, dtype=int)))


if __name__ == "__main__":
    sys.exit(command(main))
