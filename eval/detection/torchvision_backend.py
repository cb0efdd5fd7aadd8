"""torchvision's Mask R-CNN and Faster R-CNN R50-FPN on a task of configs/: for whoever has no
detectron2. Schedule, sizes, flips and norms are the task's; README.md says what still differs.
"""

import functools
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from common import distributed
from common.data.loaders import RankBatches, ignore_stop_signals
from common.errors import UserError
from eval.dense import gathered, or_error, per_rank, raise_errors
from eval.detection import data, scores
from eval.detection.settings import Job, Settings

NORMS = {"": None, "FrozenBN": FrozenBatchNorm2d, "SyncBN": nn.BatchNorm2d, "BN": nn.BatchNorm2d}
# torchvision follows these names of a task's file; --override of any other is refused
TAKEN = ("SOLVER.", "INPUT.M", "TEST.PRECISE_BN.", "MODEL.RESNETS.NORM", "MODEL.FPN.NORM")
TAKEN += ("MODEL.RPN.BATCH", "MODEL.RPN.P", "MODEL.ROI_HEADS.BATCH")


def check(settings: Settings) -> None:
    """Raises UserError for a task, or an override, that torchvision's models cannot follow."""
    if settings["MODEL.BACKBONE.NAME"] != "build_resnet_fpn_backbone":
        raise UserError(
            f"--task {settings.task}: torchvision has no C4 detector, so this task needs "
            "detectron2; eval/detection/README.md says how to install it",
        )
    for name in settings.overrides:
        if not name.startswith(TAKEN):
            raise UserError(f"--override {name}: torchvision's detector has no such setting")
    for name in ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM"):
        if settings[name] not in NORMS:
            raise UserError(f"{name} {settings[name]}: none of {', '.join(NORMS)}")


def run(job: Job) -> dict[str, dict[str, float]]:
    """Trains and scores. Returns {"box": {"AP": …, "AP50": …, "AP75": …}, "mask": …} in percent."""
    settings = job.settings
    model = build_model(settings, job.config.arch, job.config.seed)
    body = model.backbone.body
    state = {n: t for n, t in job.encoder.state_dict().items() if n in body.state_dict()}
    body.load_state_dict(state)
    model.to(job.device)
    check_arrival(job, model)
    model = job.over_ranks(model)
    optimizer = build_optimizer(model, settings)
    batches = functools.partial(loader, job)
    loss_of = losses(job, model)
    job.train_steps(model, optimizer, settings.iterations, batches, loss_of, settings.learning_rate)
    if settings.get("TEST.PRECISE_BN.ENABLED", False):
        refine_norms(job, model)
    return scores.of(job.test, detections(job, model), settings.mask, voc=is_voc(settings))


def is_voc(settings: Settings) -> bool:
    return settings["DATASETS.TEST"][0].startswith("voc")


def build_model(settings: Settings, arch: str, seed: int) -> nn.Module:
    """Returns the detector on CPU, its new layers drawn from `seed`; images are RGB from 0 to 1."""
    norm = NORMS[settings["MODEL.RESNETS.NORM"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        resnet = getattr(torchvision.models, arch)(norm_layer=norm)
        last = resnet.fc.in_features
        pyramid = BackboneWithFPN(
            resnet,
            {f"layer{i}": str(i - 1) for i in range(1, 5)},
            [last // 8, last // 4, last // 2, last],
            256,
            LastLevelMaxPool(),
            NORMS[settings["MODEL.FPN.NORM"]],
        )
        kind = MaskRCNN if settings.mask else FasterRCNN
        return kind(
            pyramid,
            num_classes=settings["MODEL.ROI_HEADS.NUM_CLASSES"] + 1,  # and background
            max_size=settings["INPUT.MAX_SIZE_TRAIN"],
            image_mean=[v / 255 for v in settings["MODEL.PIXEL_MEAN"]],
            image_std=[v / 255 for v in settings["MODEL.PIXEL_STD"]],
            rpn_pre_nms_top_n_train=settings["MODEL.RPN.PRE_NMS_TOPK_TRAIN"],
            rpn_pre_nms_top_n_test=settings["MODEL.RPN.PRE_NMS_TOPK_TEST"],
            rpn_post_nms_top_n_train=settings["MODEL.RPN.POST_NMS_TOPK_TRAIN"],
            rpn_post_nms_top_n_test=settings["MODEL.RPN.POST_NMS_TOPK_TEST"],
            rpn_batch_size_per_image=settings["MODEL.RPN.BATCH_SIZE_PER_IMAGE"],
            box_batch_size_per_image=settings["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"],
        )


def check_arrival(job: Job, model: nn.Module) -> None:
    """Raises unless the backbone in the detector has the encoder's tensors and features."""
    body = model.backbone.body.eval()
    job.check_body(body, lambda x: body(x)["3"].mean((2, 3)))


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.SGD:
    """Returns SGD with a decay of its own for norms, as detectron2; biases decay as weights."""
    norms, others = [], []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        (norms if isinstance(module, nn.modules.batchnorm._BatchNorm) else others).extend(own)
    groups = [
        {"params": others, "weight_decay": settings["SOLVER.WEIGHT_DECAY"]},
        {"params": norms, "weight_decay": settings["SOLVER.WEIGHT_DECAY_NORM"]},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=0.0, momentum=settings["SOLVER.MOMENTUM"])


def loader(job: Job, first: int, last: int) -> torch.utils.data.DataLoader:
    """Loads this rank's part of the batches of the iterations `first` to `last`."""
    settings = job.settings
    examples = data.Examples(job.train, job.config.seed, settings.mask)
    batch = settings["SOLVER.IMS_PER_BATCH"]
    if batch % job.ranks or len(examples) < batch:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {batch} for {len(examples)} images with objects and {job.ranks} "
            "ranks: --override it with a multiple of the ranks, at most as many as the images",
        )
    return torch.utils.data.DataLoader(
        examples,
        batch_sampler=RankBatches(
            len(examples), batch, job.config.seed, first, last, job.rank, job.ranks
        ),
        num_workers=job.workers,
        collate_fn=list,
        pin_memory=job.device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
    )


def losses(job: Job, model: nn.Module):
    """Returns a function, batch -> losses; each image takes one of the task's sizes at random."""
    settings = job.settings

    def of(batch: list[Any]) -> dict[str, Tensor]:
        model.transform.min_size = tuple(settings["INPUT.MIN_SIZE_TRAIN"])
        model.transform.max_size = settings["INPUT.MAX_SIZE_TRAIN"]
        pixels, targets = zip(*raise_errors(batch), strict=True)
        images = [x.to(job.device, non_blocking=True).float() / 255 for x in pixels]
        truth = [{n: t.to(job.device, non_blocking=True) for n, t in y.items()} for y in targets]
        return model(images, truth)

    return of


@torch.no_grad()
def refine_norms(job: Job, model: nn.Module) -> None:
    """Sets the statistics of all batch norms to their plain mean over NUM_ITER training batches, in
    place of the running one (detectron2's TEST.PRECISE_BN).
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    number, of = job.settings["TEST.PRECISE_BN.NUM_ITER"], losses(job, model)
    model.train()
    bar = job.progress_bar(number, "batch-norm statistics")
    for done, batch in enumerate(loader(job, 0, number)):
        for norm in norms:
            norm.momentum = 1 / (done + 1)
        torch.manual_seed(done)
        with job.autocast():
            of(batch)
        bar.update()
        stop_if_asked(job)
    bar.close()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def stop_if_asked(job: Job) -> None:
    if distributed.any_rank([job.requests.received is not None])[0]:
        job.stop("after training, which is saved; scoring starts again")


class TestImages(torch.utils.data.Dataset):
    def __init__(self, images: list[dict[str, Any]], max_pixels: int):
        self.images, self.max_pixels = images, max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor | str:
        path = self.images[number]["file_name"]
        image = or_error(lambda: data.load_image(path, max_pixels=self.max_pixels))
        return image if isinstance(image, str) else data.to_tensor(image)


@torch.no_grad()
def detections(job: Job, model: nn.Module) -> list[dict[str, Any]]:
    """Returns every detection of all ranks on the test images, as COCO's results. Each rank does as
    many images as the others, so that all answer a stop request together.
    """
    settings, images = job.settings, job.test.images
    model.eval()
    model.transform.min_size = (settings["INPUT.MIN_SIZE_TEST"],)
    model.transform.max_size = settings["INPUT.MAX_SIZE_TEST"]
    own = per_rank(len(images))
    rounds = -(-len(images) // job.ranks)
    numbers = [*own, *([0] if len(own) < rounds else [])]
    pixels = torch.utils.data.DataLoader(
        TestImages([images[i] for i in numbers], job.test.max_pixels),
        batch_size=None,
        num_workers=job.workers,
        worker_init_fn=ignore_stop_signals,
    )
    found, bar = [], job.progress_bar(rounds, "scoring", "image")
    for place, x in enumerate(pixels):
        (x,) = raise_errors([x])
        with job.autocast():
            (out,) = model([x.to(job.device).float() / 255])
        if place < len(own):
            found += scores.as_results(images[numbers[place]]["id"], out, job.test.categories)
        bar.update()
        stop_if_asked(job)
    bar.close()
    return gathered(found)
