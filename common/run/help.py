"""What --help prints: every flag with where its value comes from, in groups; 80 columns wide."""

import ast
import inspect
import io
import re
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal

WIDTH = 80
LEFT = 28  # column of the explanations
# groups of the flags that all recipes, or all evaluations, share; one not named here is in `run`
DATA = ("dataset", "data", "download", "root", "datasets", "image_size", "train_images")
DATA += ("subset_seed", "validation_share", "scored_on", "on_bad_image", "max_pixels")
SPEED = ("workers", "input", "augment_device", "precision", "micro_batch", "compile", "device")
GROUPS = ("run", "data", "speed")
GIVEN = "given"  # the source of a value that stands beside --help
PLACEHOLDERS = {int: "N", float: "X", str: "TEXT"}


def page(
    config_class: type,
    values: Any,
    sources: dict[str, str],
    chosen: dict[str, str],
    hints: dict[str, Any],
    first: str,
) -> str:
    """Returns the text of --help, each line within 80 columns. `values` is a configuration with the
    values to show. `sources` says which preset or file set a value, `chosen` what the presets were
    chosen by; `hints` has the type of each field, `first` is the heading of the script's own flags.
    """
    description = inspect.cleandoc(config_class.__doc__ or "")
    lines = [*wrapped(f"usage: python {sys.argv[0]} [flags]", "  "), ""]
    for paragraph in description.split("\n\n"):
        lines += [*wrapped(" ".join(paragraph.split())), ""]
    lines += [*wrapped(said_of_values(sources, chosen)), ""]
    comments = comments_of(config_class)
    for title, names in grouped(config_class, first).items():
        lines.append(f"{title}:")
        for name in names:
            value = default_of(getattr(values, name), sources.get(name))
            explained = " ".join([comments.get(name, ""), value]).strip()
            lines += entry(invocation(name, hints[name]), explained)
        lines.append("")
    return "\n".join(lines).rstrip()


def said_of_values(sources: dict[str, str], chosen: dict[str, str]) -> str:
    """Says which values the page shows."""
    if not chosen:
        return "Flags are --name value; if a flag is given twice, the later one wins."
    words = ", ".join(f"--{name} {value}" for name, value in chosen.items())
    text = f"Values shown are those of {words}"
    names = [name for name in dict.fromkeys(sources.values()) if name != GIVEN]
    if names:
        text += f"; those that differ from the defaults name what set them: {', '.join(names)}"
    return f"{text}. Another --dataset, --arch or --follow beside --help shows its own."


def grouped(config_class: type, first: str) -> dict[str, list[str]]:
    """Groups the flags: first what this script's own Config says, then what others share."""
    own = [c for c in config_class.__mro__[:-1] if c.__module__ == config_class.__module__]
    mine, shared = (
        {name for c in config_class.__mro__[:-1] if (c in own) == of_own for name in fields_of(c)}
        for of_own in (True, False)
    )
    groups: dict[str, list[str]] = {title: [] for title in (first, *GROUPS)}
    for field in fields(config_class):
        name = field.name
        if name in DATA:
            group = "data"
        elif name in SPEED:
            group = "speed"
        elif name in mine and name not in shared:
            group = first
        else:
            group = "run"
        groups[group].append(name)
    return {title: names for title, names in groups.items() if names}


def fields_of(one: type) -> Iterable[str]:
    """Returns the names that a class itself annotates, without those of the classes it extends."""
    return inspect.get_annotations(one)


def invocation(name: str, hint: Any) -> str:
    """Returns `--lr X`, `--loss {paper,official}` or `--gsg, --no-gsg`."""
    flag = name.replace("_", "-")
    options = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [o for o in typing.get_args(hint) if o is not types.NoneType]
    choices = [c for o in options if typing.get_origin(o) is Literal for c in typing.get_args(o)]
    if bool in options:
        return f"--{flag}, --no-{flag}"
    if choices:
        return f"--{flag} {{{','.join(map(str, choices))}}}"
    return f"--{flag} {next((PLACEHOLDERS[o] for o in options if o in PLACEHOLDERS), 'VALUE')}"


def default_of(value: Any, source: str | None) -> str:
    """Returns `(default: 512; cifar10)`, or nothing for what is decided later."""
    if value is None or value == "":
        return ""
    text = {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value}"
    if source == GIVEN:
        return f"(given: {text})"
    return f"(default: {text}; {source})" if source else f"(default: {text})"


def entry(left: str, right: str) -> Iterable[str]:
    """Yields the lines of a flag, its explanation beside it, or below it if the flag is long."""
    texts = textwrap.wrap(right, WIDTH - LEFT, break_on_hyphens=False) or [""]
    if len(left) + 4 <= LEFT:
        yield f"  {left:{LEFT - 2}}{texts.pop(0)}".rstrip()
    elif len(left) + 2 <= WIDTH:
        yield f"  {left}"
    else:  # many choices
        yield from wrapped("  " + left.replace(",", ", "), " " * 6)
    yield from (f"{'':{LEFT}}{text}" for text in texts if text)


def wrapped(text: str, more: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=more, break_on_hyphens=False)


def in_80_columns(docstring: str) -> str:
    """Turns a script's docstring into the description of its --help: paragraphs are filled anew,
    indented lines stay as they are unless they are too long.
    """
    lines: list[str] = []
    for paragraph in docstring.strip("\n").split("\n\n"):
        own = paragraph.split("\n")
        if any(line.startswith(" ") for line in own):
            lines += [part for line in own for part in shortened(line)]
        else:
            lines += wrapped(" ".join(own))
        lines.append("")
    return "\n".join(lines).rstrip()


def shortened(line: str) -> list[str]:
    """Cuts a command to 80 columns: its comment goes above it, its rest onto further lines."""
    if len(line) <= WIDTH:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()))
    command, *comment = re.split(r"(?<=\S)\s+# *", line.strip(), maxsplit=1)
    above = shortened(f"{indent}# {comment[0]}") if comment else []
    parts = textwrap.wrap(
        command.strip(),
        WIDTH - 2,
        initial_indent=indent,
        subsequent_indent=f"{indent}    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    goes_on = "" if command.startswith("#") else " \\"
    return [*above, *(part + goes_on for part in parts[:-1]), *parts[-1:]]


# -- comments -------------------------------------------------------------------------------------


def comments_of(config_class: type) -> dict[str, str]:
    """Returns the comments above or beside each field, of a class and of those it extends."""
    found: dict[str, str] = {}
    for one in reversed(config_class.__mro__[:-1]):
        path = getattr(sys.modules[one.__module__], "__file__", None)
        if path is not None:
            found |= comments_in(open_text(path), one.__name__)
    return found


def open_text(path: str) -> str:
    with open(path) as file:
        return file.read()


def comments_in(text: str, class_name: str) -> dict[str, str]:
    """Returns the comments of one class's fields: lines just above a field, and those within it."""
    tree = ast.parse(text)
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    alone = {n for n, t in comments.items() if not t.line[: t.start[1]].strip()}
    found = {}
    for node in (n for c in classes for n in c.body if isinstance(n, ast.AnnAssign)):
        first = node.lineno
        while first - 1 in alone:
            first -= 1
        lines = [comments[n].string for n in range(first, node.end_lineno + 1) if n in comments]
        said = " ".join(line.lstrip("# ") for line in lines)
        found[node.target.id] = said.split("noqa")[0].strip()
    return found
