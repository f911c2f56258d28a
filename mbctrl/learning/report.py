"""An evaluation's report: one page, whole in itself, on how far ahead models can be trusted, in and out of contact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import mbctrl.calibrate
from mbctrl.base.files import write_whole
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.residual import Residual
from mbctrl.learning import figures
from mbctrl.learning.evaluate import FEWEST, HORIZONS, KINDS, Coverage, Errors
from mbctrl.learning.expected import Expected
from mbctrl.learning.transitions import Transitions

_STYLE = Path(mbctrl.calibrate.__path__[0])  # pages look alike


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation's page is made of.

    Args:
        name: of the model's file; ``residual`` is what is in it.
        arm: whose it is.
        errors: one a model; the first is the file's.
        coverage: of the file's intervals, one step ahead.
        expected: of its own errors many steps ahead, in each way of propagation.
        transitions: what it was judged on.
        tool: (3, T) [m] where the tool was.
        gates: tool positions (3, N) [m] of random configurations and the gate (N,) there; None for a model without one.
        command: that made the page.
        date: of it.
    """

    name: str
    residual: Residual
    arm: Model
    errors: tuple[Errors, ...]
    coverage: tuple[Coverage, ...]
    expected: tuple[Expected, ...]
    transitions: Transitions
    tool: np.ndarray
    gates: tuple[np.ndarray, np.ndarray] | None
    command: str
    date: str


def write_report(path: Path, seen: Evaluation) -> None:
    """Write an evaluation's page; the file is there when it is complete, or not at all."""
    text = render(seen)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def render(seen: Evaluation) -> str:
    """Return an evaluation's page as HTML."""
    loader = FileSystemLoader([Path(__file__).parent, _STYLE])
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template("evaluation.html.j2").render(**_header(seen), **_tables(seen), **_figures(seen))


def verdict(seen: Evaluation) -> str:
    """Return the numbers that matter in one sentence: tool errors 25 steps ahead, beside the model it is compared with."""
    parts = []
    for k, kind in enumerate(KINDS):
        found = [(one.name, *one.summary(25, k)) for one in seen.errors]
        if found[0][2]:
            own, rest = 1e3 * found[0][1][-1, 0], [f"{name} {millimetres(values[-1, 0])}" for name, values, _ in found[1:]]
            parts.append(f"{kind} {number(own)} mm ({', '.join(rest)})" if rest else f"{kind} {number(own)} mm")
    if not parts:
        return "No stretch is 25 steps long: nothing here says how far ahead the model can be trusted."
    return f"Median error of the tool {25 * seen.residual.dt:g} s ahead: {'; '.join(parts)}."


def warnings(seen: Evaluation) -> list[str]:
    """Return what a reader should know before believing the figures."""
    found = []
    if not seen.transitions.contact.any():
        found.append("no transition is in contact: nothing here says how the model does there")
    for group in seen.coverage:
        joints = [
            f"{joint} {100 * share:.0f} %" for joint, share in zip(seen.arm.robot.joints, group.inside) if not 0.8 <= share <= 0.97
        ]
        if joints and group.count >= FEWEST:
            found.append(f"90 % intervals, {group.group}: outside 80 to 97 % for {', '.join(joints)}")
    for one in seen.errors:
        lost = int(np.isinf(one.tool[one.kind >= 0]).sum())
        if lost:
            found.append(f"{one.name}: {lost} predicted states are no numbers")
    return found


def millimetres(value: float) -> str:
    """Return metres as text in millimetres."""
    return f"{number(1e3 * value)} mm"


def number(value: float) -> str:
    """Return an error to three digits; nothing where there is none."""
    if not np.isfinite(value):
        return "" if np.isnan(value) else "∞"
    return "0" if value == 0 else "< 1e-6" if value < 1e-6 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _header(seen: Evaluation) -> dict[str, Any]:
    residual = seen.residual
    sizes = [residual.layers[0][0].shape[2], *(w.shape[1] for w, _ in residual.layers)]
    base = "the analytic model" if residual.base == "analytic" else "nothing: fully learned"
    contact = residual.contact if residual.acts_on == "contact" else None
    acts = f"{contact.tip} on {contact.surface}, by impulses" if contact else "joints, by speeds"
    return {
        "title": f"Evaluation of {seen.name}",
        "robot": residual.robot,
        "date": seen.date,
        "command": seen.command,
        "verdict": verdict(seen),
        "notes": warnings(seen),
        "facts": [
            ("on top of", base),
            ("time step", f"{residual.dt:g} s"),
            ("networks", f"{residual.members} of {' × '.join(map(str, sizes))}, {residual.activation}"),
            ("act on", acts),
            ("gate", f"1 up to {residual.near:g} m, 0 from {residual.far:g} m" if residual.base == "analytic" else "none"),
            ("surfaces", ", ".join(surface.name for surface in residual.surfaces) or "none"),
            ("seed", str(residual.seed)),
            ("made with", ", ".join(f"{name} {text}" for name, text in residual.versions.items())),
        ],
        "logs": _logs(seen.transitions),
    }


def _logs(transitions: Transitions) -> list[dict[str, Any]]:
    rows = []
    for k, file in enumerate(transitions.files):
        own = transitions.take(transitions.file == k)
        counts = {"count": len(own), "contact": int(own.contact.sum()), "impacts": int(own.impacts().sum())}
        rows.append({"file": Path(file).name, "episodes": len(np.unique(own.episode)), **counts})
    return rows


def _tables(seen: Evaluation) -> dict[str, Any]:
    names = [one.name for one in seen.errors]
    blocks = []
    for k, kind in enumerate(KINDS):
        rows = []
        for step in HORIZONS:
            found = [one.summary(step, k) for one in seen.errors]
            if found[0][1]:
                rows.append({"steps": step, "time": number(step * seen.residual.dt), "count": found[0][1], "cells": _cells(found)})
        blocks.append({"kind": kind, "rows": rows, "joints": _joints(seen, k)})
    coverage = [(group.group, group.count, [f"{100 * share:.1f}" for share in group.inside]) for group in seen.coverage]
    ahead = {"ways": [one.way for one in seen.expected], "ahead": _ahead(seen)}
    return {"models": names, "blocks": blocks, "coverage": coverage, "joints": seen.arm.robot.joints, **ahead}


def _ahead(seen: Evaluation) -> list[dict[str, Any]]:
    """Return what intervals hold [%], a row a kind of stretch and number of steps: of speeds and of the tool, each way."""
    rows = []
    for k, kind in enumerate(KINDS):
        for step in HORIZONS:
            found = [one.covered(step, k) for one in seen.expected]
            if found and found[0][2] >= FEWEST:
                cells = [(f"{100 * speeds:.0f}", f"{100 * tool:.0f}") for speeds, tool, _ in found]
                rows.append({"kind": kind, "steps": step, "count": found[0][2], "cells": cells})
    return rows


def _cells(found: Sequence[tuple[np.ndarray, int]]) -> list[dict[str, Any]]:
    """Return each model's tool error [mm], median and 95 %, and whether its median is the smallest."""
    least = min(values[-1, 0] for values, _ in found)
    return [
        {"middle": number(1e3 * values[-1, 0]), "high": number(1e3 * values[-1, 1]), "best": values[-1, 0] == least}
        for values, _ in found
    ]


def _joints(seen: Evaluation, kind: int) -> list[dict[str, Any]]:
    rows = []
    for one in seen.errors:
        for step in HORIZONS:
            values, count = one.summary(step, kind)
            if count:
                cells = [f"{number(1e3 * middle)} / {number(1e3 * high)}" for middle, high in values[:-1]]
                rows.append({"model": one.name, "steps": step, "cells": cells})
    return rows


def _figures(seen: Evaluation) -> dict[str, Any]:
    groups = [(group.group, group.inside) for group in seen.coverage if group.count >= FEWEST]
    return {
        "compounding": figures.draw_compounding(seen.errors, seen.residual.dt, next(iter(seen.expected), None)),
        "gate": "" if seen.gates is None else figures.draw_gate(*seen.gates, seen.tool),
        "covered": figures.draw_coverage(groups, seen.arm.robot.joints),
    }
