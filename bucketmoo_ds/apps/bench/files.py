"""Writes a kernel benchmark: `kernels-cpu.json`, `.csv` with the machine in every line, and `.png`; or `-cuda`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bucketmoo_ds.apps.bench.plot import plot


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the files into a folder, which is made, and returns them.

    Args:
        result: what `bucketmoo bench kernels --json` prints.
        folder: files of an earlier run in it are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"kernels-{result['device']}"
    contents = {f"{stem}.json": to_json(result).encode(), f"{stem}.csv": to_csv(result).encode()}
    picture = plot(result)
    if picture is not None:
        contents[f"{stem}.png"] = picture
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def to_json(result: Mapping[str, Any]) -> str:
    """Returns a result as JSON, one line of the benchmark in each line of the file."""
    head = {name: value for name, value in result.items() if name != "lines"}
    lines = ",\n".join("  " + json.dumps(line) for line in result["lines"])
    return json.dumps(head, indent=1).removesuffix("\n}") + ',\n "lines": [\n' + lines + "\n ]\n}\n"


def to_csv(result: Mapping[str, Any]) -> str:
    """Returns the lines with columns that say where they were measured; what does not apply is empty."""
    machine, versions = result["machine"], result["versions"]
    where = {
        "device": result["device"],
        "device_name": machine.get("gpu", machine["cpu"]) if result["device"] == "cuda" else machine["cpu"],
        "cores": machine["cores"],
        "threads": result["threads"],
        "system": machine["system"],
        **versions,
        "commit": result["commit"],
        "dirty": result["dirty"],
        "date": result["date"],
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, [*result["lines"][0], *where], lineterminator="\n")
    writer.writeheader()
    writer.writerows(line | where for line in result["lines"])
    return text.getvalue()
