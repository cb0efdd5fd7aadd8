"""results.csv: the numbers of the pages in one table, the published ones and ours."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from results import tables
from results.joined import Joined

NAME = "results.csv"
COLUMNS = ("kind", "method", "encoder", "trained_on", "training_images", "epochs", "batch")
COLUMNS += ("settings", "evaluated_on", "protocol", "metric", "value", "std", "seeds", "values")
COLUMNS += ("source", "grade", "hours", "hardware", "commit", "records")


def text(joined: Joined) -> str:
    """Returns a line for each number, in percent; `kind` is published or ours. Ours come in the
    order of the pages, seeds of one setting as one number, as there.
    """
    written = io.StringIO()
    writer = csv.DictWriter(written, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(published(row.published) for row in joined.rows)
    writer.writerows(ours(names, record) for names, record in records_of(joined))
    return written.getvalue()


def records_of(joined: Joined) -> Iterator[tuple[str, tables.Record]]:
    """Yields our numbers, each once, though one may stand next to several published ones."""
    seen = set()
    beside = [found for row in joined.rows for found in row.records]
    for names, record in [*beside, *joined.apart]:
        key = names, record["protocol"], record["metric"]
        if key not in seen:
            seen.add(key)
            yield names, record


def published(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "published",
        "method": row["method"],
        "encoder": row["arch"],
        "trained_on": row["pretraining"],
        "epochs": row["epochs"],
        "batch": row["batch"],
        "settings": "; ".join(tables.settings_words(row)),
        "evaluated_on": row["dataset"],
        "protocol": row["protocol"],
        "metric": row["metric"],
        "value": row["value"],
        "source": row["source"],
        "grade": row["grade"],
    }


def ours(names: str, record: tables.Record) -> dict[str, Any]:
    what, on = record["pretraining"], record["dataset"]
    return {
        "kind": "ours",
        "method": record["method"],
        "encoder": record["arch"],
        "trained_on": tables.data_cell(what | {"incomplete": None}, "dataset"),
        "training_images": what["incomplete"] or "all",
        "epochs": what["epochs"],
        "batch": what["batch"],
        "settings": "; ".join(tables.settings_words(record)),
        "evaluated_on": tables.data_cell(on),
        "protocol": tables.protocol_cell(record),
        "metric": record["metric"],
        "value": record["value"],
        "std": record.get("spread") if len(record["values"]) > 1 else None,
        "seeds": " ".join(map(str, record["seeds"])),
        "values": " ".join(f"{value:g}" for value in record["values"]),
        "hours": record["hours"],
        "hardware": record["hardware"],
        "commit": record["commit"] + (" dirty" if record["dirty"] else ""),
        "records": names,
    }
