"""``mbctrl bench``: runs a file of the checkout's ``benchmarks/`` and prints its rows."""

from __future__ import annotations

import importlib.util
import json
import math
import operator
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import mbctrl
from mbctrl.base.errors import SpecError, suggest

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}


def bench(name: str, quick: bool, as_json: bool) -> int:
    """Run benchmark ``name``; its module offers ``rows(quick, say) -> list[dict]``. Return 0 whatever it finds.

    A row is {"name", "value", "unit", "bar", "op"}; ``bar`` and ``op`` are None where a figure has no bar.
    """
    folder = Path(mbctrl.__file__).resolve().parents[1] / "benchmarks"
    known = {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}
    if not known:
        raise SpecError("benchmarks come with the checkout, not with the installed package", file=folder)
    if name not in known:
        raise SpecError(f"unknown benchmark '{name}'{suggest(name, known)}")
    progress = Console(stderr=True)
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(name, known[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with progress.status(f"{name} …") as status:

        def say(text: str) -> None:
            status.update(f"{name}: {text} …")
            if not progress.is_terminal:  # a log file keeps what was seen, should the bench be cut short
                progress.print(f"{name}: {text}", highlight=False, soft_wrap=True)

        rows = module.rows(quick, say)
    if as_json:
        finite = [{**row, "value": row["value"] if math.isfinite(row["value"]) else None} for row in rows]
        print(json.dumps(finite, allow_nan=False))
        return 0
    _table(name, rows, quick)
    return 0


def _table(name: str, rows: list[dict[str, Any]], quick: bool) -> None:
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    title = f"{name}{' (quick)' if quick else ''}: {os.cpu_count()} cores{load}"
    table = Table(title=title, title_justify="left")
    for column, side in (("figure", "left"), ("value", "right"), ("unit", "left"), ("bar", "right"), ("", "left")):
        table.add_column(column, justify=side)
    for row in rows:
        bar = "" if row["bar"] is None else f"{row['op']} {row['bar']:g}"
        passed = row["bar"] is None or _COMPARE[row["op"]](row["value"], row["bar"])
        mark = "" if row["bar"] is None else "[green]met[/]" if passed else "[red]missed[/]"
        table.add_row(row["name"], f"{row['value']:.4g}", row["unit"], bar, mark)
    Console().print(table)
