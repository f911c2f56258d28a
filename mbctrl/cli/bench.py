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
    progress, before = Console(stderr=True), _jiffies()
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
    _table(name, rows, quick, _stolen(before))
    return 0


def _jiffies() -> list[int]:
    """Return Linux's counts of processor time: user, nice, system, idle, iowait, irq, softirq, steal, …; else nothing."""
    try:
        return [int(count) for count in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
    except OSError:
        return []


def _stolen(before: list[int]) -> str:
    """Say what share of the wanted processor time other virtual machines took since ``before``: wall times suffer by it."""
    spent = [b - a for a, b in zip(before, _jiffies())]
    busy = sum(spent[:3]) + sum(spent[5:8])
    share = spent[7] / busy if len(spent) > 7 and busy else 0.0
    return f", {share:.0%} of its processor time taken by other machines" if share >= 0.01 else ""


def _table(name: str, rows: list[dict[str, Any]], quick: bool, stolen: str) -> None:
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    title = f"{name}{' (quick)' if quick else ''}: {os.cpu_count()} cores{load}{stolen}"
    table = Table(title=title, title_justify="left")
    for column, side in (("figure", "left"), ("value", "right"), ("unit", "left"), ("bar", "right"), ("", "left")):
        table.add_column(column, justify=side)
    for row in rows:
        bar = "" if row["bar"] is None else f"{row['op']} {row['bar']:g}"
        passed = row["bar"] is None or _COMPARE[row["op"]](row["value"], row["bar"])
        mark = "" if row["bar"] is None else "[green]met[/]" if passed else "[red]missed[/]"
        table.add_row(row["name"], f"{row['value']:.4g}", row["unit"], bar, mark)
    Console().print(table)
