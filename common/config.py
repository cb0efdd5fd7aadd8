"""What a recipe's `Config` is made of: bounds, the presets of small images, the shared flags.

A recipe's `Config` extends `RunConfig` and says in a comment beside each field where its value
comes from; `--help` shows those comments. `parse` of run/flags.py makes one of the command line.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal


@dataclass(frozen=True)
class Bound:
    """A condition on a field's value, in words and as a test; it stands at the field's type."""

    words: str
    holds: Callable[[float], bool]


ABOVE_0 = Bound("be above 0", lambda value: value > 0)
NOT_NEGATIVE = Bound("not be negative", lambda value: value >= 0)
Positive = Annotated[float, ABOVE_0]
PositiveInt = Annotated[int, ABOVE_0]
NotNegative = Annotated[float, NOT_NEGATIVE]
Count = Annotated[int, NOT_NEGATIVE]  # 0 or more
Share = Annotated[float, Bound("lie between 0 and 1", lambda value: 0 <= value <= 1)]
PartialShare = Annotated[float, Bound("be 0 or more and below 1", lambda value: 0 <= value < 1)]
Seed = Annotated[int, NOT_NEGATIVE, Bound("be below 2**63", lambda value: value < 2**63)]
Workers = Annotated[int, Bound("be -1 to 1024", lambda value: -1 <= value <= 1024)]
LARGEST_IMAGE = 4096  # pixels, a side: a batch of larger views fits no machine

ARCHS = Literal[
    "resnet50",
    "resnet101",
    "resnet18",
    "resnet18_cifar",
    "vit_small",
    "vit_small_mocov3",
    "vit_base",
    "vit_base_mocov3",
    "tiny",
    "resnet_lab",
]
DATASETS = Literal["imagenet", "imagefolder", "cifar10", "photos"]
MAX_PIXELS = 200_000_000  # of an image that is decoded: 0.8 GB in memory, ours

# Small images, for every recipe; each adds its own fields. GSG App. B.2 and C.2, "the default setup
# of lightly": epochs (secondary: the paper too), rate and decay are its CIFAR-10 benchmark's, the
# batch is unstated (secondary; lightly: 128, its table has 512 too), the views App. B.2's
CIFAR10: dict[str, Any] = {
    "arch": "resnet18_cifar",
    "image_size": 32,
    "epochs": 200,
    "batch_size": 512,
    "lr": 0.06,
    "weight_decay": 5e-4,
    "views": "cifar",
}
# ours, for patches of 18 photographs on a CPU
PHOTOS = CIFAR10 | {"arch": "tiny", "epochs": 10, "batch_size": 64, "lr": 0.02, "knn_every": 5}


def free(default: Any) -> Any:
    """Returns a field that does not enter the numbers: it may change when a run is continued."""
    return field(default=default, metadata={"free": True})


def later(default: Any, before: Any = None) -> Any:
    """Returns a field that enters the numbers but was added after the first runs. Those did what
    `before` says, or else `default`, so that they can be continued and keep their hash.
    """
    return field(default=default, metadata={"before": default if before is None else before})


@dataclass(frozen=True)
class RunConfig:
    """The flags that every recipe has and no paper decides."""

    # what enters the numbers and is not the preset's; `parse` fills it in
    settings: ClassVar[dict[str, Any]] = {}

    dataset: DATASETS = "imagenet"  # images to train on; cifar10 and photos set other defaults
    data: str = free("")  # folder of the images: train/ and val/; photos needs none
    download: bool = free(False)  # cifar10: download torchvision's python batches into --data
    arch: ARCHS = "resnet50"  # encoder, one exact network per name
    image_size: PositiveInt = 224  # side of a view in pixels
    # how views are computed. exact: compiled, Pillow's values bit for bit; reference: Pillow
    input: Literal["exact", "reference"] = later("exact")
    # train on this many images, equally many of each class, the same for every seed; 0: all
    train_images: Count = later(0)
    # which images --train-images draws: two draws (0, 1, 2 …) have no image in common
    subset_seed: Count = later(0)
    # hold this share of each class's training images out, for choosing values
    validation_share: PartialShare = later(0.0)
    # with --validation-share: k-NN is scored on what is held out, or on the test images
    scored_on: Literal["held-out", "test"] = later("held-out")
    seed: Seed = 0  # decides initialisation, data order, views, queue start, GSG's pairs
    output: str = free("")  # run folder; default runs/<recipe>/<dataset>-<arch>-<seed>
    workers: Workers = free(-1)  # loader processes per rank; -1: one per CPU core, at most 16
    # images of the global batch that go through the encoder at once, heads and loss see all of
    # --batch-size; must divide it; 0: all at once. ResNets: batch-norm statistics per piece
    micro_batch: Count = later(0)
    # default: bf16 autocast on a GPU, fp32 on CPU
    precision: Literal["bf16", "fp32", "fp64"] | None = None
    compile: bool = later(False)  # torch.compile the encoder; needs a C++ compiler
    # where colours, blur and flips are done; default: on the GPU if there is one
    augment_device: Literal["cpu", "cuda"] | None = later(None, before="cpu")
    # stop and export after this many steps; schedules stay those of the whole run; 0: to the end
    max_steps: Count = free(0)
    # auto: continue what the folder holds; never: take a new folder with -2, -3, …
    resume: Literal["auto", "never"] = free("auto")
    # steps between lines of progress; 0: none; default: a line a minute if there is no terminal
    log_every: Count | None = free(None)
    knn_every: Count = free(10)  # epochs between k-NN evaluations (and one before); 0: none
    checkpoint_minutes: NotNegative = free(15.0)  # minutes between checkpoints within an epoch
    # keep a copy of the checkpoint after these epochs, such as 0,1,10 (0: before the first step)
    snapshot_epochs: str = free("")
    # number of times, spread over the run, that the features of 2 000 test images are measured:
    # std, effective rank and singular values of representation and embedding (geometry.jsonl)
    geometry_points: Count = free(0)
    tensorboard: bool = free(False)  # write the metrics for TensorBoard too, into the run folder
    wandb: bool = free(False)  # send metrics to Weights & Biases too (WANDB_MODE=offline works)
    wandb_project: str = free("selfsup-recipes")  # project of --wandb
    wandb_entity: str = free("")  # user or team of --wandb; default: your own
    wandb_group: str = free("")  # group of --wandb
    wandb_tags: str = free("")  # tags of --wandb, with commas between them
    # skip: name an unreadable image and train on the next; k-NN leaves it out
    on_bad_image: Literal["stop", "skip"] = free("stop")
    max_pixels: PositiveInt = free(MAX_PIXELS)  # a larger image counts as unreadable
    plan_name: str = free("")  # name of the run in results/plan.yaml, for its record
    config: str = free("")  # YAML file with values for these flags; flags win over it
