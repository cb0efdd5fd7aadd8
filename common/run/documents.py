"""The one door for files of YAML and JSON, whether a script wrote them or a user.

A file is opened only if it is one (a named pipe would wait for ever), read up to a bound, parsed,
and checked against a schema in `schemas/`. Whatever is wrong is one UserError that names the file
and the place in it. Nothing here needs torch.
"""

import functools
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from common.errors import UserError, brief, nearest_name

SCHEMAS = Path(__file__).resolve().parent / "schemas"
MOST_YAML, MOST_JSON, MOST_LINE = 1 << 22, 1 << 26, 1 << 20  # bytes; of YAML a second each
DEEPEST = 20  # blocks within blocks
MOST_PARTS = 10**6  # values: an alias of YAML stands for all of what it names, again and again
LARGEST = 2**63  # below it a whole number is one for NumPy and PyTorch too
LONGEST, LONGEST_NAME = 4095, 255  # bytes of a path, and of one of its names
TYPES = {"string": "text", "integer": "a whole number", "number": "a number", "null": "nothing"}
TYPES |= {"boolean": "true or false", "array": "a list", "object": "a block of 'key: value' lines"}
KEY = "a key"
KINDS = {"a folder": stat.S_ISDIR, "a named pipe": stat.S_ISFIFO}


# -- from the disk --------------------------------------------------------------------------------


def expanded(path: str | Path) -> Path:
    """Resolves ~ and ~user in a path that a user gives; raises UserError for one that cannot be."""
    try:
        found = Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{brief(path)}: there is no user of this name") from None
    text = os.fsencode(found)
    if len(text) > LONGEST or max(map(len, text.split(b"/"))) > LONGEST_NAME:
        raise UserError(f"{brief(found)} is longer than a path can be")
    if b"\0" in text:
        raise UserError(f"{brief(repr(str(found)))} has a null character")
    return found


def opened(path: str | Path) -> BinaryIO:
    """Opens a file to be read; raises UserError for nothing, a folder, a pipe or a device."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UserError(f"{brief(path)}: no such file") from None
    except OSError as error:
        raise UserError(f"{brief(path)}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{brief(repr(str(path)))} has a null character") from None
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        found = next((kind for kind, is_so in KINDS.items() if is_so(mode)), "a device")
        raise UserError(f"{brief(path)} is {found}, not a file")
    return os.fdopen(number, "rb")


def read_text(path: str | Path, most: int = MOST_JSON) -> str:
    """Returns the text of a file; raises UserError if it has more than `most` bytes."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{brief(path)} has more than {most >> 20} MiB: too large for such a file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{brief(path)} is not UTF-8 text (byte {error.start + 1})") from None


def read_yaml(path: str | Path, schema: str = "block", needs: Sequence[str] = ()) -> Any:
    """Reads a YAML file and checks that it fits schemas/<schema>.yaml and has the keys `needs`."""
    try:
        value = parsed_yaml(read_text(path, MOST_YAML))
    except ValueError as error:
        raise UserError(f"{brief(path)} is not YAML: {error}") from None
    check(value, schema, brief(path), needs)
    return value


def read_json(path: str | Path, schema: str, needs: Sequence[str] = ()) -> Any:
    """Reads a JSON file and checks it as `read_yaml` does."""
    try:
        value = parsed_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{brief(path)} is not JSON: {error}") from None
    check(value, schema, brief(path), needs)
    return value


def read_lines(path: str | Path, schema: str) -> Iterator[Any]:
    """Yields what each line of a JSON-lines file says, without what a crash cut off or filled with
    zeros at the end. Raises UserError for a damaged line before a whole one, or one that lacks a
    key.
    """
    damaged = None
    seen: set[Any] = set()  # what check_shape has checked
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE), b""), 1):
            try:
                value = parsed_json(line.decode(), strict=False)
            except ValueError as error:
                damaged = damaged or f"{brief(path)}: line {number} is not JSON: {error}"
                continue
            if damaged:
                raise UserError(damaged)
            check_shape(value, schema, f"{brief(path)}: line {number}", seen)
            yield value


def check_shape(line: Any, schema: str, where: str, seen: set[Any]) -> None:
    """Checks a line as `check` does, unless a line with the same keys, types and texts was checked
    before. So the schema may restrict nothing but these. `seen` holds what was checked. A line with
    lists or blocks in it is checked always.
    """
    flat = isinstance(line, dict) and not any(isinstance(v, dict | list) for v in line.values())
    shape = flat and tuple((n, v if isinstance(v, str) else type(v)) for n, v in line.items())
    if not shape or shape not in seen:
        check(line, schema, where)
        seen.add(shape)


# -- from text ------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """YAML's safe loader, which takes no key twice in one block: a flag may be spelled with - or _,
    and the later one would win without a word. Dates stay text.
    """

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, str] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            name = key.value.replace("-", "_")
            if name in seen:
                text = f"{brief(key.value)} is there twice"
                if seen[name] != key.value:
                    text = f"{brief(key.value)} is {brief(seen[name])} again"
                raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
            seen[name] = key.value
        return node


Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


def parsed_yaml(text: str) -> Any:
    """Parses a YAML text; raises a short ValueError if it is not YAML or fails `check_bounds`."""
    try:
        value = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{brief(error.problem)}") from None
    except yaml.YAMLError as error:
        raise ValueError(brief(" ".join(str(error).split()))) from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(f"a value cannot be read ({brief(error)})") from None
    check_bounds(value)
    return value


def parsed_json(text: str, strict: bool = True) -> Any:
    """Parses a JSON text; raises ValueError if it is none or, if `strict`, fails `check_bounds`."""
    try:
        value = json.loads(text, object_pairs_hook=once, parse_int=whole)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if strict:
        check_bounds(value)
    return value


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{brief(twice)} is there twice")
    return found


def whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= LARGEST:
        raise ValueError(f"{brief(digits)} is too large a number")
    return int(digits)


def check_bounds(value: Any) -> None:
    """Raises ValueError for a value that none of our files holds: it is nested too deep or too
    long, or has a number that is too large or not finite, half of a surrogate pair in a text, or a
    type that JSON lacks (YAML's sets and bytes).
    """
    parts, left = 0, [((), value)]
    while left:
        place, part = left.pop()
        parts += 1
        if len(place) > DEEPEST or parts > MOST_PARTS:
            raise ValueError("it is nested too deep" if parts <= MOST_PARTS else "it is too long")
        if isinstance(part, dict):
            left += [((*place, name), inner) for name, inner in part.items()]
            left += [((*place, KEY), name) for name in part]
        elif isinstance(part, str):
            if not part.isascii() and any("\ud800" <= letter <= "\udfff" for letter in part):
                raise ValueError(f"{named(place, value)}: half of a surrogate pair is no text")
        elif isinstance(part, list):
            left += [((*place, number), inner) for number, inner in enumerate(part)]
        elif isinstance(part, int) and abs(part) >= LARGEST:
            raise ValueError(f"{named(place, value)}: too large a number")
        elif isinstance(part, float) and not math.isfinite(part):
            raise ValueError(f"{named(place, value)}: {part} is no number")
        elif not isinstance(part, int | float | None):
            raise ValueError(f"{named(place, value)}: {type(part).__name__} is of no use here")


def named(place: Sequence[Any], value: Any) -> str:
    """Says where in a value something is: tiers.entry 2.prefix; entries of a list count from 1."""
    words = []
    for part in place:
        words.append(f"entry {part + 1}" if isinstance(value, list) else brief(part))
        value = value[part] if isinstance(value, list | dict) and part != KEY else None
    return ".".join(words)


# -- schemas --------------------------------------------------------------------------------------


@functools.cache
def validator(schema: str) -> Any:
    """Returns jsonschema's validator of schemas/<schema>.yaml, to which 1.0 is no whole number."""
    import jsonschema  # a fifth of a second that --help need not wait for

    types = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    )
    strict = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=types)
    return strict(yaml.safe_load((SCHEMAS / f"{schema}.yaml").read_text()))


def check(value: Any, schema: str, where: str, needs: Sequence[str] = ()) -> None:
    """Raises UserError, after the words `where`, for the first thing that the schema forbids."""
    errors = [*validator(schema).iter_errors(value)]
    if errors:
        error = min(errors, key=lambda error: [*map(str, error.absolute_path)])
        while error.context:  # of several choices, what keeps the nearest from fitting
            error = max(error.context, key=lambda inner: len(inner.absolute_path))
        place = named(error.absolute_path, value)
        raise UserError(f"{where}: {f'{place}: ' if place else ''}{said(error)}")
    if missing := [name for name in needs if name not in value]:
        raise UserError(f"{where}: {', '.join(missing)} missing")


def said(error: Any) -> str:
    """Says a validation error in our words."""
    kind, wanted, found = error.validator, error.validator_value, error.instance
    if kind == "required":
        return f"{', '.join(name for name in wanted if name not in found)} missing"
    if kind == "additionalProperties" and wanted is False:
        known = error.schema.get("properties", {})
        odd = next(name for name in found if name not in known)
        return f"{brief(odd)} is unknown{nearest_name(str(odd), known)}"
    if kind == "type":
        if not error.absolute_path and wanted == "object":
            return "must hold 'key: value' lines"
        words = [TYPES[word] for word in ([wanted] if isinstance(wanted, str) else wanted)]
        return f"{brief(repr(found))} is not {' or '.join(words)}"
    if kind == "enum":
        hint = nearest_name(str(found), map(str, wanted))
        return f"{brief(repr(found))} is none of {', '.join(map(str, wanted))}{hint}"
    return brief(error.message, 200)
