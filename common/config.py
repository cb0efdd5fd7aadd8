"""A dataclass + presets + command line -> one frozen, saved configuration.

A recipe's `Config` extends `RunConfig` and says in a comment beside each field where its value
comes from; `--help` shows those comments. Values are taken, each layer over the one before, from
the field's default, `--follow`, the presets for `--arch` and `--dataset`, `--config file.yaml`,
and the flags.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import io
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from common.errors import UserError, brief, nearest_name
from common.run import documents


@dataclass(frozen=True)
class Bound:
    """What a field's value must do, in words and as a test; stands at the field's type."""

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
    "resnet18",
    "resnet18_cifar",
    "vit_small",
    "vit_small_mocov3",
    "vit_base",
    "tiny",
]
DATASETS = Literal["imagenet", "imagefolder", "cifar10", "photos"]

C = TypeVar("C", bound="RunConfig")

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

# what a record has fields of its own for, and what changes only where and in which order of sums
NO_SETTING = {"dataset", "arch", "epochs", "batch_size", "follow", "seed", "train_images"}
NO_SETTING |= {"validation_share", "precision", "augment_device", "compile"}
NOT_FLAGS = ("recipe", "method", "plan", "settings")  # what a run's config.yaml has beside flags


def free(default: Any) -> Any:
    """A field that does not enter the numbers: it may change when a run is continued."""
    return field(default=default, metadata={"free": True})


def later(default: Any, before: Any = None) -> Any:
    """A field that enters the numbers, added when runs existed already: they did what `before`
    says, else `default`, so that they can be continued and keep their hash.
    """
    return field(default=default, metadata={"before": default if before is None else before})


def values_before(config: Any) -> dict[str, Any]:
    """What runs did that are older than a field, for each such field."""
    fields = dataclasses.fields(config)
    return {f.name: f.metadata["before"] for f in fields if "before" in f.metadata}


@dataclass(frozen=True)
class RunConfig:
    """The flags that every recipe has and no paper decides."""

    # what enters the numbers and is not the preset's; `parse` fills it in
    settings: ClassVar[dict[str, Any]] = {}

    dataset: DATASETS = "imagenet"  # images to train on; cifar10 and photos bring presets
    data: str = free("")  # folder of the images: train/ and val/; photos needs none
    download: bool = free(False)  # cifar10: download torchvision's python batches into --data
    arch: ARCHS = "resnet50"  # encoder, one exact network per name
    image_size: PositiveInt = 224  # side of a view in pixels
    # how views are computed. exact: compiled, Pillow's values bit for bit; reference: Pillow
    input: Literal["exact", "reference"] = later("exact")
    # train on this many images, equally many of each class, the same for every seed; 0: all
    train_images: Count = later(0)
    # hold this share of each class's training images out and score k-NN on them instead of the
    # test images: for choosing values
    validation_share: PartialShare = later(0.0)
    seed: Seed = 0  # keys initialisation, data order, views, queue start, GSG's pairs
    output: str = free("")  # run folder; default runs/<recipe>/<dataset>-<arch>-<seed>
    workers: Workers = free(-1)  # loader processes per rank; -1: one per CPU core, at most 16
    # images of the global batch that go through the encoder at once, heads and loss see all of
    # --batch-size; must divide it; 0: all at once. ResNets: batch-norm statistics per piece
    micro_batch: Count = later(0)
    # default: bf16 autocast on a GPU, fp32 on CPU
    precision: Literal["bf16", "fp32", "fp64"] | None = None
    compile: bool = later(False)  # torch.compile the encoder; needs a C++ compiler
    # where colours, blur and flips are done; default: on the GPU where there is one
    augment_device: Literal["cpu", "cuda"] | None = later(None, before="cpu")
    max_steps: Count = free(0)  # stop and export after this many steps, schedules as if it went on
    resume: Literal["auto", "never"] = free("auto")  # never: a new folder with -2, -3, …
    knn_every: Count = free(10)  # epochs between k-NN evaluations (and one before); 0: none
    checkpoint_minutes: NotNegative = free(15.0)  # minutes between checkpoints within an epoch
    # keep a copy of the checkpoint after these epochs, as 0,1,10 (0: before the first step)
    snapshot_epochs: str = free("")
    wandb: bool = free(False)  # send metrics to Weights & Biases too (WANDB_MODE=offline works)
    # skip: name an unreadable image and train on the next; k-NN leaves it out
    on_bad_image: Literal["stop", "skip"] = free("stop")
    plan_name: str = free("")  # name of the run in results/plan.yaml, for its record
    config: str = free("")  # YAML file with values for these flags; flags win over it


def parse(
    config_class: type[C],
    presets: dict[str, dict[str, Any]],
    argv: Sequence[str] | None = None,
    resolve: Callable[[C], C] = lambda config: config,
) -> C:
    """The configuration that the command line asks for.

    `presets` maps a condition to values. A condition is one or more words, all of which must be
    among: the value of `--follow`, the dataset, the arch and its family (`vit`, `resnet`). Later
    entries win over earlier ones. `resolve` fills in what depends on other fields. Raises
    UserError with one line for anything that cannot be meant.
    """
    argv = [*(sys.argv[1:] if argv is None else argv)]
    check_flag_names(config_class, argv)
    file_values = read_config_file(config_class, last_value(argv, "config") or "")
    chosen = {name: last_value(argv, name) for name in ("follow", "dataset", "arch")}
    chosen = {n: v if v is not None else file_values.get(n) for n, v in chosen.items()}
    for name, value in chosen.items():
        if value is not None:
            coerce(config_class, name, value, f"--{name}")
    defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
    words = {chosen[n] or defaults.get(n) for n in ("follow", "dataset")}
    arch = chosen["arch"] or matching(presets, words).get("arch") or defaults["arch"]
    words |= {arch, arch.split("_")[0] if arch.startswith("vit") else arch.rstrip("0123456789")}
    if arch == "resnet18_cifar":
        words.add("resnet")
    preset = matching(presets, words) | {"arch": arch}
    values = preset | file_values
    config = parse_flags(config_class, dataclasses.replace(config_class(), **values), argv)
    check_values(config)
    given = {name: getattr(config, name) for name in NO_SETTING if hasattr(config, name)}
    config = choose_by_device(resolve(config))
    check_values(config)
    if presets:  # what they alone make of the same data, encoder, length and reading of the paper
        plain = resolve(dataclasses.replace(config_class(), **preset | given))
        object.__setattr__(config, "settings", settings_of(config, plain))
    return config


def settings_of(config: Any, plain: Any) -> dict[str, Any]:
    """The values that enter the numbers of a run and are not those of `plain`, which has no flags;
    but for those that make nothing but speed: pieces of a batch where no batch norm is in the
    encoder, and the other way to the same views, bit for bit.
    """
    speed = {"input"} | ({"micro_batch"} if config.arch.startswith("vit") else set())
    without = numbers_of(plain)
    return {
        name: value
        for name, value in numbers_of(config).items()
        if name not in NO_SETTING | speed and value != without[name]
    }


def choose_by_device(config: C) -> C:
    """Fills in the fields whose default depends on whether this machine has a GPU."""
    gpu = gpu_is_there()
    automatic = {"precision": "bf16" if gpu else "fp32", "augment_device": "cuda" if gpu else "cpu"}
    unset = [name for name in automatic if getattr(config, name, "") is None]
    return dataclasses.replace(config, **{name: automatic[name] for name in unset})


def gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def matching(presets: dict[str, dict[str, Any]], words: set) -> dict[str, Any]:
    """The values of all presets whose words all hold, in the order they are written."""
    values: dict[str, Any] = {}
    for condition, preset in presets.items():
        if set(condition.split()) <= words:
            values |= preset
    return values


def check_flag_names(config_class: type, argv: Sequence[str]) -> None:
    names = {f.name.replace("_", "-") for f in dataclasses.fields(config_class)}
    for token in argv:
        if not token.startswith("--"):
            continue
        name = token[2:].split("=")[0].replace("_", "-")
        if name in names or name == "help" or (name.startswith("no-") and name[3:] in names):
            continue
        hint = nearest_name(name, names).replace("mean ", "mean --")
        raise UserError(f"unknown flag --{name}{hint} (--help lists all)")


def last_value(argv: Sequence[str], name: str) -> str | None:
    """The value that a flag gets in argv, before the real parse; None where it is not given."""
    value = None
    flags = {f"--{name}", f"--{name.replace('_', '-')}"}
    for token, following in zip(argv, [*argv, None][1:], strict=True):
        if token in flags:
            value = following
        elif token.split("=")[0] in flags:
            value = token.split("=", 1)[1]
    return value


def parse_flags(config_class: type[C], default: C, argv: Sequence[str]) -> C:
    """tyro's parse, with its boxed message turned into one line."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config_class,
                default=default,
                args=list(argv),
                description=inspect.cleandoc(config_class.__doc__),
            )
    except SystemExit as exit_:
        if not exit_.code:
            raise
        lines = [re.sub(r"^[\s│|]+|[\s│|]+$", "", line) for line in said.getvalue().splitlines()]
        text = []
        for line in lines[1:]:
            if not line or set(line) <= set("─-"):
                break
            text.append(line)
        raise UserError(" ".join(text) or "the flags cannot be read") from None


def read_config_file(config_class: type, path: str) -> dict[str, Any]:
    """The values of a YAML file, each checked against its field."""
    if not path:
        return {}
    try:
        values = documents.read_yaml(path, "flags")
    except UserError as error:
        raise UserError(f"--config {error}") from None
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    values = {name: value for name, value in values.items() if name not in NOT_FLAGS}
    return {n: coerce(config_class, n, v, f"{brief(path)}: {n}") for n, v in values.items()}


def coerce(config_class: type, name: str, value: Any, where: str) -> Any:
    """`value` as the type of field `name`; UserError with the choices where it cannot be."""
    hints = typing.get_type_hints(config_class)
    if name not in hints:
        hint = nearest_name(name, hints)
        raise UserError(f"{where}: no such flag{hint}")
    options = [hints[name]]
    if typing.get_origin(options[0]) in (typing.Union, types.UnionType):
        options = [*typing.get_args(options[0])]  # a union
    choices = [c for o in options if typing.get_origin(o) is Literal for c in typing.get_args(o)]
    if value in choices and not isinstance(value, bool):
        return value
    if isinstance(value, bool | str | int | None) and type(value) in options:
        return value
    if float in options and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if math.isfinite(number := float(value)):  # YAML reads 1e-6 as text
                return number
    if choices:
        hint = nearest_name(str(value), choices)
        said = f"{brief(repr(value))} is none of {', '.join(map(str, choices))}{hint}"
        raise UserError(f"{where}: {said}")
    wanted = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise UserError(f"{where}: {brief(repr(value))} is not {wanted}")


def check_values(config: Any) -> None:
    """UserError for a value beyond its type's bounds, or one that is not finite."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for name, value in dataclasses.asdict(config).items():
        if value is None or isinstance(value, str | bool):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} {value}: must be a finite number")
        if isinstance(value, int) and abs(value) >= documents.LARGEST:
            raise UserError(f"{flag} {brief(value)}: must be below 2**63")
        for bound in bounds_of(hints[name]):
            if not bound.holds(value):
                raise UserError(f"{flag} {value}: must {bound.words}")
    side = getattr(config, "image_size", None) or 16
    if side > LARGEST_IMAGE:
        raise UserError(f"--image-size {side}: must be at most {LARGEST_IMAGE}")
    if (getattr(config, "arch", None) or "").startswith("vit") and side % 16:
        text = f"--image-size {side}: a ViT takes multiples of its 16-pixel patches"
        raise UserError(f"{text}, {max(16, side // 16 * 16)} for example")
    if hasattr(config, "snapshot_epochs"):  # a run's; evaluations have none
        snapshot_epochs(config)


def bounds_of(hint: Any) -> list[Bound]:
    """The bounds at a field's type, also inside `... | None`."""
    own = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bound)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        own += [bound for option in typing.get_args(hint) for bound in bounds_of(option)]
    return own


def snapshot_epochs(config: Any) -> set[int]:
    """The epochs of --snapshot-epochs."""
    try:
        return {int(word) for word in config.snapshot_epochs.split(",") if word.strip()}
    except ValueError:
        raise UserError(
            f"--snapshot-epochs {config.snapshot_epochs}: whole numbers with commas, as 0,1,10",
        ) from None


def is_free(config_class: type, name: str) -> bool:
    """Whether a field may change when a run is continued."""
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    return name in fields and bool(fields[name].metadata.get("free"))


def numbers_of(config: Any) -> dict[str, Any]:
    """The fields that enter the numbers of a run."""
    return {n: v for n, v in dataclasses.asdict(config).items() if not is_free(type(config), n)}


def is_float(hint: Any) -> bool:
    return hint is float or float in typing.get_args(hint)


def config_hash(config: Any) -> str:
    """12 hexadecimal digits over the fields that enter the numbers."""
    hints = typing.get_type_hints(type(config))
    added = values_before(config)
    values = {n: v for n, v in numbers_of(config).items() if n not in added or v != added[n]}
    # 10 and 10.0 are the same number of epochs
    values = {n: float(v) if is_float(hints[n]) and v is not None else v for n, v in values.items()}
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def changed_fields(config: Any, saved: dict[str, Any]) -> list[str]:
    """`field: was A, is B` for each field that enters the numbers and differs from `saved`."""
    changes = []
    added = values_before(config)
    for name, value in numbers_of(config).items():
        was = saved.get(name, added.get(name, "nothing"))
        if was != value:
            changes.append(f"{name} was {was}, is {value}")
    return changes
