"""A dataclass + presets + command line -> one frozen, saved configuration, and what differs.

Values are taken, each layer over the one before, from the field's default, `--follow`, the presets
for `--arch` and `--dataset`, `--config file.yaml`, and the flags.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from common.config import LARGEST_IMAGE, Bound, RunConfig
from common.errors import UserError, brief, nearest_name
from common.run import documents

C = TypeVar("C", bound=RunConfig)

# fields that a record has too, or that change only the device and the order in which sums are taken
NO_SETTING = {"dataset", "arch", "epochs", "batch_size", "follow", "seed", "train_images"}
NO_SETTING |= {"subset_seed", "validation_share", "scored_on", "precision", "augment_device"}
NO_SETTING |= {"compile"}
SIZE = ("epochs", "batch_size")  # what nobody can guess for a folder of images
NOT_FLAGS = ("recipe", "method", "plan", "settings")  # what a run's config.yaml has beside flags


def parse(
    config_class: type[C],
    presets: dict[str, dict[str, Any]],
    argv: Sequence[str] | None = None,
    resolve: Callable[[C], C] = lambda config: config,
) -> C:
    """Returns the configuration that the command line asks for.

    `presets` maps a condition to values. A condition is one or more words, all of which must be
    among: the value of `--follow`, the dataset, the arch and its family (`vit`, `resnet`). Later
    entries win over earlier ones. `resolve` fills in what depends on other fields. Raises UserError
    with one line for flags that are not valid.
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
    words |= {arch, arch.split("_")[0].rstrip("0123456789")}
    preset = matching(presets, words) | {"arch": arch}
    values = preset | file_values
    if {"--help", "-h"} & {*argv}:
        sources = sources_of(presets, words) | dict.fromkeys(file_values, "--config")
        given = {name: value for name, value in chosen.items() if value is not None}
        show_help(config_class, values | given, sources | dict.fromkeys(given, "given"))
    require_size(config_class, chosen["dataset"], presets, file_values, argv)
    config = parse_flags(config_class, dataclasses.replace(config_class(), **values), argv)
    check_values(config)
    given = {name: getattr(config, name) for name in NO_SETTING if hasattr(config, name)}
    config = choose_by_device(resolve(config))
    check_values(config)
    if presets:  # what the presets alone give for the values in `given`
        plain = resolve(dataclasses.replace(config_class(), **preset | given))
        object.__setattr__(config, "settings", settings_of(config, plain))
    return config


def settings_of(config: Any, plain: Any) -> dict[str, Any]:
    """Returns the values that enter the numbers of a run and differ from those of `plain`, the same
    run without further flags. It leaves out what changes the speed alone: the pieces of a batch if
    the encoder has no batch norm, and --input, since both ways give the same views bit for bit.
    """
    encoders = {config.arch, getattr(config, "second_arch", "shared")} - {"shared", "same"}
    exact = all(arch.startswith("vit") for arch in encoders)
    speed = {"input"} | ({"micro_batch"} if exact else set())
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


def require_size(
    config_class: type,
    dataset: str | None,
    presets: dict[str, dict[str, Any]],
    file_values: dict[str, Any],
    argv: Sequence[str],
) -> None:
    """Raises UserError if a training on a folder of unknown size lacks --epochs or --batch-size."""
    if dataset != "imagefolder" or not issubclass(config_class, RunConfig):
        return
    given = {*matching(presets, {dataset}), *file_values}
    lacking = [n for n in SIZE if n not in given and last_value(argv, n) is None]
    if lacking:
        flags = " and ".join("--" + name.replace("_", "-") for name in lacking)
        values = " and ".join(str(getattr(config_class, name)) for name in lacking)
        verb = f"defaults, {values}, are" if len(lacking) > 1 else f"default, {values}, is"
        raise UserError(
            f"--dataset imagefolder needs {flags}: the {verb} for the 1.28 million images of "
            "ImageNet"
        )


def show_help(config_class: type, values: dict[str, Any], sources: dict[str, str]) -> None:
    """Prints --help and ends."""
    from common.run import help as help_page

    config = dataclasses.replace(config_class(), **values)
    default = config_class()
    sources = {n: s for n, s in sources.items() if getattr(config, n) != getattr(default, n)}
    names = ("dataset", "arch", "follow") if isinstance(config, RunConfig) else ()
    chosen = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        first = "the paper's" if isinstance(config, RunConfig) else "the evaluation's"
        hints = hints_of(config_class)
        text = help_page.page(config_class, config, sources, chosen, hints, first)
        print(text, flush=True)
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def sources_of(presets: dict[str, dict[str, Any]], words: set) -> dict[str, str]:
    """Returns for each value of `matching` the condition of the preset that sets it."""
    return {
        name: condition
        for condition, preset in presets.items()
        if set(condition.split()) <= words
        for name in preset
    }


def matching(presets: dict[str, dict[str, Any]], words: set) -> dict[str, Any]:
    """Merges the presets whose condition holds, that is, has all its words among `words`. If two of
    them set the same field, the one that is written later wins.
    """
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
    """Returns the value that a flag gets in argv, before the real parse; None if it gets none."""
    value = None
    flags = {f"--{name}", f"--{name.replace('_', '-')}"}
    for token, following in zip(argv, [*argv, None][1:], strict=True):
        if token in flags:
            value = following
        elif token.split("=")[0] in flags:
            value = token.split("=", 1)[1]
    return value


def parse_flags(config_class: type[C], default: C, argv: Sequence[str]) -> C:
    """Parses with tyro, and turns its boxed message into one line. Plain flags are read without it:
    it takes 40 ms to build its parser, and a plan has hundreds of command lines to check.
    """
    if (values := plain_values(config_class, argv)) is not None:
        return dataclasses.replace(default, **values)
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


def plain_values(config_class: type, argv: Sequence[str]) -> dict[str, Any] | None:
    """Returns the values of flags that are all `--name value`, `--name` or `--no-name` of plain
    types; None for anything else, and for every value that tyro might refuse or read otherwise.
    """
    hints, values, words = hints_of(config_class), {}, iter(argv)
    for word in words:
        if not word.startswith("--") or "=" in word:
            return None
        name = word[2:].replace("-", "_")
        negated = name.removeprefix("no_")
        if hints.get(name) is bool:
            values[name] = True
        elif name not in hints and hints.get(negated) is bool:
            values[negated] = False
        elif (value := plain_value(hints.get(name), next(words, "-"))) is not None:
            values[name] = value
        else:
            return None
    return values


def plain_value(hint: Any, text: str) -> int | float | str | None:
    """Returns text as a whole number, a finite number, one of some words, or itself; else None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = {*typing.get_args(hint)} - {types.NoneType}
        hint = options.pop() if len(options) == 1 and text != "None" else None
    if text.startswith("-"):
        return None
    if typing.get_origin(hint) is Literal:
        return text if text in typing.get_args(hint) else None
    if hint is int:
        return int(text) if re.fullmatch("[0-9]{1,18}", text) else None
    if hint is float:
        return float(text) if re.fullmatch(r"[0-9]+(\.[0-9]+)?(e-?[0-9]+)?", text) else None
    return text if hint is str else None


@functools.cache
def hints_of(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def read_config_file(config_class: type, path: str) -> dict[str, Any]:
    """Reads the values of a YAML file, each checked against its field."""
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
    """Turns `value` into field `name`'s type; raises UserError with the choices if it cannot."""
    hints = hints_of(config_class)
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
    """Raises UserError for a value beyond its type's bounds, or one that is not finite."""
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
    if getattr(config, "jitter_strength", 1) != 1:  # 1 is each view's own: nothing to refuse
        from common.augment import check_jitter_strength  # which imports torch

        check_jitter_strength(config.views, config.jitter_strength)
    if hasattr(config, "snapshot_epochs"):  # a run's; evaluations have none
        snapshot_epochs(config)


def bounds_of(hint: Any) -> list[Bound]:
    """Returns the bounds at a field's type, also inside `... | None`."""
    own = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bound)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        own += [bound for option in typing.get_args(hint) for bound in bounds_of(option)]
    return own


def snapshot_epochs(config: Any) -> set[int]:
    """Returns the epochs of --snapshot-epochs."""
    try:
        return {int(word) for word in config.snapshot_epochs.split(",") if word.strip()}
    except ValueError:
        raise UserError(
            f"--snapshot-epochs {config.snapshot_epochs}: give whole numbers with commas, like "
            "0,1,10",
        ) from None


def is_free(config_class: type, name: str) -> bool:
    """Tells whether a field may change when a run is continued."""
    field = config_class.__dataclass_fields__.get(name)
    return field is not None and bool(field.metadata.get("free"))


def values_before(config: Any) -> dict[str, Any]:
    """Returns for each field that was added later what the runs before it did."""
    fields = dataclasses.fields(config)
    return {f.name: f.metadata["before"] for f in fields if "before" in f.metadata}


def numbers_of(config: Any) -> dict[str, Any]:
    """Returns the fields that enter the numbers of a run."""
    return {n: v for n, v in dataclasses.asdict(config).items() if not is_free(type(config), n)}


def is_float(hint: Any) -> bool:
    return hint is float or float in typing.get_args(hint)


def config_hash(config: Any) -> str:
    """Returns 12 hexadecimal digits over the fields that enter the numbers."""
    hints = hints_of(type(config))
    added = values_before(config)
    values = {n: v for n, v in numbers_of(config).items() if n not in added or v != added[n]}
    # 10 and 10.0 are the same number of epochs
    values = {n: float(v) if is_float(hints[n]) and v is not None else v for n, v in values.items()}
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def changed_fields(config: Any, saved: dict[str, Any]) -> list[str]:
    """Lists `field was A, is B` for each field that enters the numbers and differs from `saved`."""
    changes = []
    added = values_before(config)
    for name, value in numbers_of(config).items():
        was = saved.get(name, added.get(name, "nothing"))
        if was != value:
            changes.append(f"{name} was {was}, is {value}")
    return changes
