"""What stands beside what: published numbers and records, like with like only.

A record stands in a row with a published number when method, encoder, pre-training data, epochs,
batch, evaluation data, protocol, metric and settings are equal (but for settings that the number's
source leaves open), and both data sets are whole and no copy. Everything else is shown apart, with
what sets it apart, and without a difference.
"""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from common import cards
from common.errors import UserError
from common.run import documents
from results.record import is_stopped, with_values

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE / "published.yaml"
BUDGET = ("epochs", "batch")  # a source may leave them out; our command still has them
LIBRARIES = ("lightly", "solo-learn")  # whose own benchmarks published.yaml has too
PROTOCOLS = ("linear", "semi-sup 1%", "semi-sup 10%", "kNN (k200,t.1)", "kNN (k200,t.2)")
PROTOCOLS += ("linear (L-BFGS)",)

Record = dict[str, Any]


@dataclass
class Row:
    """A published number with the records that it may be compared with, or without any."""

    published: dict[str, Any]
    records: list[tuple[str, Record]] = field(default_factory=list)  # file names, record


def load_published(path: Path = PUBLISHED) -> list[dict[str, Any]]:
    """Reads published.yaml's rows; raises UserError for one that lacks a field or has no known
    grade.
    """
    rows = documents.read_yaml(path, "published")
    for number, row in enumerate(rows, 1):
        if (row["value"] is None) != (row["grade"] == "not at hand"):
            raise UserError(f"{path}: row {number} ({row['method']}): grade and value do not fit")
        if wrong := [n for n in row.get("assumed", []) if row[n] is None]:
            raise UserError(f"{path}: row {number} assumes {', '.join(wrong)}, but gives no value")
        if wrong := {*row.get("unstated", [])} & {*(row.get("settings") or {})}:
            raise UserError(
                f"{path}: row {number} states {', '.join(wrong)} and lists it as unstated"
            )
    return rows


def is_like(record: Record, row: dict[str, Any]) -> bool:
    """Tells whether this record may stand next to this published number."""
    what, on = record["pretraining"], record["dataset"]
    if any((what["copy"], what["incomplete"], on["copy"], on["incomplete"])):
        return False
    if is_stopped(record):
        return False
    if record["epoch"] != "last" or row["epochs"] is None or row["batch"] is None:
        return False
    ours = (base_method(record), base_arch(record), what["dataset"], what["epochs"], what["batch"])
    ours += (on["name"], record["protocol"], record["metric"], stated(record, row))
    theirs = tuple(row[n] for n in ("method", "arch", "pretraining", "epochs", "batch"))
    theirs += (row["dataset"], row["protocol"], row["metric"], row.get("settings") or {})
    return ours == theirs


def stated(record: Record, row: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of a record without those that the published row's source omits."""
    settings = record.get("settings") or {}
    return {name: v for name, v in settings.items() if name not in row.get("unstated", [])}


def base_method(record: Record) -> str:
    """Returns the paper's method; the released code's reading is compared with its number."""
    return record["method"].removesuffix(" (official)")


def base_arch(record: Record) -> str:
    """Returns the paper's encoder. The released code calls another encoder ViT-S, which here stands
    for the paper's, as the code's loss stands for the paper's loss.
    """
    official = record["method"].endswith(" (official)")
    return record["arch"].removesuffix("_mocov3") if official else record["arch"]


MOST_SETTINGS = 4  # in a row of a table
SAME = ("method", "recipe", "arch", "pretraining", "dataset", "protocol", "metric", "settings")
SAME += ("epoch", "assumed", "dirty")


def merge_seeds(records: list[tuple[str, Record]]) -> list[tuple[str, Record]]:
    """Merges records of one seed each that differ in the seed, and in what follows from it, to one
    row with mean and spread; its name is those of its records, a space between. Others stay as they
    are.
    """
    groups: dict[str, list[tuple[str, Record]]] = {}
    for name, record in records:
        alone = len(record["seeds"]) == 1 and record.get("seeds_of", "pretraining") == "pretraining"
        key = [record.get(n) for n in SAME] + [
            (record.get("hyperparameters") or {}).get("protocol")
        ]
        key += [] if alone else [name]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append((name, record))
    merged = []
    for group in groups.values():
        by_seed = {r["seeds"][0]: (n, r) for n, r in group}  # the newest name of a seed run twice
        if len(by_seed) < 2 or len(by_seed) < len(group):
            merged += group
            continue
        names, parts = zip(*(by_seed[seed] for seed in sorted(by_seed)), strict=True)
        whole = with_values(parts[0], [r["value"] for r in parts])
        whole |= {"seeds": [r["seeds"][0] for r in parts]}
        for mean in ("hours", "images_per_second"):
            known = [r[mean] for r in parts if r[mean] is not None]
            whole[mean] = statistics.fmean(known) if known else None
        whole["commit"] = " ".join(dict.fromkeys(r["commit"] for r in parts))
        merged.append((" ".join(names), whole))
    return merged


def views(record: Record) -> list[Record]:
    """Returns the record, and one for each of `scores`, with its protocol, metric and value."""
    scores = record.get("scores", [])
    whole = {name: value for name, value in record.items() if name != "scores"}
    return [whole, *(whole | score for score in scores)]


def join(published: list[dict[str, Any]], records: list[tuple[str, Record]]):
    """Returns (a Row for each published number, the records that stand next to none)."""
    rows = [Row(row) for row in published]
    apart = []
    for name, record in merge_seeds([(n, view) for n, r in records for view in views(r)]):
        fitting = [row for row in rows if is_like(record, row.published)]
        for row in fitting:
            row.records.append((name, record))
        if not fitting:
            apart.append((name, record))
    return rows, apart


def difference(record: Record, row: dict[str, Any]) -> float | None:
    """Returns ours minus the published number, in points; None if that is not at hand."""
    return None if row["value"] is None else record["value"] - row["value"]


def why_apart(record: Record, published: list[dict[str, Any]], settings: bool = True) -> str:
    """Says in a few words why a record cannot stand next to a published number. `settings` is False
    for a table whose other columns show the settings, and which part of the images was used: they
    are then left out here.
    """
    what, on = record["pretraining"], record["dataset"]
    reasons = [text for data in (what, on) for text in (data["copy"], data["incomplete"]) if text]
    if not settings:
        parts = (what["incomplete"], on["incomplete"])
        reasons = ["part of the images" if text in parts else text for text in reasons]
    if record["epoch"] != "last":
        reasons.append(record["epoch"])
    same = [
        row
        for row in published
        if (row["method"], row["dataset"], row["protocol"], row["pretraining"])
        == (base_method(record), on["name"], record["protocol"], what["dataset"])
    ]
    if same:
        ours = (base_arch(record), what["epochs"], what["batch"], record["metric"])
        words = (
            record["arch"],
            f"{number_cell(what['epochs'])} epochs",
            f"batch {what['batch']}",
            ours[3],
        )
        differing = [
            [w for w, mine, its in zip(words, ours, fields_of(row), strict=True) if mine != its]
            for row in same
        ]
        reasons += min(differing, key=len)
    else:
        reasons.append("nothing published")
    reasons += settings_words(record) if settings else []
    reasons += [record["note"]] if "note" in record else []
    return ", ".join(dict.fromkeys(reasons))


def fields_of(row: dict[str, Any]) -> tuple:
    return row["arch"], row["epochs"], row["batch"], row["metric"]


def protocol_order(protocol: str) -> tuple[int, str]:
    known = PROTOCOLS.index(protocol) if protocol in PROTOCOLS else len(PROTOCOLS)
    return known, protocol


def method_order(method: str) -> tuple[int, str]:
    """Returns a sort key: methods that have a recipe here, each followed by its variants."""
    ours = cards.methods()
    for number, name in enumerate(ours):
        if method == name or (method.startswith(name + " ") and "(as" not in method):
            return number, method
    return len(ours), method


def group_order(pair: tuple[str, str]) -> tuple:
    """Returns a sort key of (protocol, data set): ImageNet first, then by place in PROTOCOLS."""
    return pair[1] != "ImageNet-1k", *protocol_order(pair[0]), pair[1]


def published_order(p: dict[str, Any]) -> tuple:
    return (*method_order(p["method"]), p["arch"], p["epochs"] or 0, p["batch"] or 0)


def whole_order(p: dict[str, Any]) -> tuple:
    """Returns a sort key: by protocol and data set, then by method."""
    return (*group_order((p["protocol"], p["dataset"])), *published_order(p))


def is_recipe(method: str) -> bool:
    """Tells whether this repository has a recipe for a published number's method."""
    return method_order(method)[0] < len(cards.methods())


def is_aim(row: dict[str, Any]) -> bool:
    """Tells whether this repository aims at a published number; it does not at other libraries'."""
    return is_recipe(row["method"]) and not any(name in row["method"] for name in LIBRARIES)


class Markup(str):
    """Markdown that this project has written itself: `table` escapes every other cell."""


def plain(text: str) -> str:
    """Returns the text of a record or of a YAML file as Markdown that shows it as it stands."""
    text = escape(re.sub(r"\s+", " ", text), quote=False)
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def prose(text: str) -> str:
    """Does the same for whole sentences, which may have **bold** words and `code`."""
    kept = re.split(r"(`[^`]+`|\*\*)", " ".join(text.split()))
    text = "".join(piece if n % 2 else plain(piece) for n, piece in enumerate(kept))
    return re.sub(r"^(\d*)([-+#=.)]+(\s|$))", r"\1\\\2", text)  # no list, no heading


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Writes a table in Markdown."""
    lines = [[cell if isinstance(cell, Markup) else plain(cell) for cell in row] for row in rows]
    texts = [f"| {' | '.join(line)} |" for line in ([*map(plain, head)], *lines)]
    return "\n".join([texts[0], f"|{'---|' * len(head)}", *texts[1:]])


def pictures(figures: Iterable[dict[str, str]], folder: str = "figures") -> str:
    """Shows each picture of a folder with its caption and command, in Markdown."""
    text = []
    for figure in figures:
        text += [f"![{plain(figure['caption'].replace('`', ''))}]({folder}/{figure['file']})"]
        command = " ".join(figure["command"].replace("`", "'").split())
        text += [f"{prose(figure['caption'])} `{command}`"]
    return "\n\n".join(text) or "None so far."


# -- words for cells ------------------------------------------------------------------------------


UNAVAILABLE = "not available to us"
GRADE_WORDS = {"ocr": "OCR", "secondary": "quoted by another work"}


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def published_cell(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return UNAVAILABLE
    return exact(row) + (f" ({GRADE_WORDS[row['grade']]})" if row["grade"] in GRADE_WORDS else "")


def exact(row: dict[str, Any]) -> str:
    """Returns the number with the decimals that it was published with, at least one."""
    value = row["value"]
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def settings_words(of: dict[str, Any]) -> list[str]:
    """Lists settings of a record or published number: queue size 2048, no fixed predictor lr."""
    words = []
    for name, value in (of.get("settings") or {}).items():
        name = name.replace("_", " ")
        if isinstance(value, bool):
            words.append(name if value else f"no {name}")
        else:
            words.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
    return words


def settings_cell(of: dict[str, Any]) -> str:
    """Says the settings in a row; if they are many, it names the plan's run, which has them."""
    words = settings_words(of)
    if len(words) <= MOST_SETTINGS or not of.get("plan"):
        return ", ".join(words)
    return f"plan: {of['plan']}"


def method_cell(of: dict[str, Any]) -> str:
    """Says method and settings, like SNCLR, neighbours 0."""
    return ", ".join([of["method"], *filter(None, [settings_cell(of)])])


def notes_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Returns the notes of published numbers, each once, in the order of the rows."""
    return list(dict.fromkeys(row["note"] for row in rows if row.get("note")))


def spread_cell(record: Record) -> str:
    """Says ± over n seeds, and over what; a single seed says so."""
    seeds = len(record["seeds"])
    if seeds == 1:
        return "1 seed"
    what = " of the probe" if record.get("seeds_of") == "evaluation" else ""
    return f"± {record['spread']:.2f}, {seeds} seeds{what}"


def commit_cell(record: Record) -> str:
    commits = ", ".join(commit[:7] for commit in record["commit"].split())
    return commits + (" + uncommitted changes" if record["dirty"] else "")


def number_cell(value: float | None) -> str:
    return "unstated" if value is None else f"{value:g}"


def budget_cells(row: dict[str, Any]) -> list[str]:
    """Returns a published number's epochs and batch, marked if its source does not state them."""
    assumed = row.get("assumed", [])
    return [number_cell(row[n]) + (" (assumed)" if n in assumed else "") for n in BUDGET]


def hours_cell(record: Record) -> str:
    hours = record["hours"]
    if hours is None:
        return ""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def data_cell(dataset: dict[str, Any], name: str = "name") -> str:
    """Names a data set, like CIFAR-10 (JPEG copy, 5000 images)."""
    part = (dataset["incomplete"] or "").replace(" images of it", " images")
    marks = [text for text in (dataset["copy"], part) if text]
    return dataset[name] + (f" ({', '.join(marks)})" if marks else "")


def protocol_cell(record: Record) -> str:
    return record["protocol"] + (" (assumed)" if record.get("assumed") else "")
