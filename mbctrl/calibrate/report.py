"""A calibration's report: one page, whole in itself, that says how far to trust the fit and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mbctrl.base.files import write_whole
from mbctrl.calibrate import figures
from mbctrl.calibrate import report_tables as tables
from mbctrl.calibrate.base_parameters import INERTIAL
from mbctrl.calibrate.identify import Fit
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.validate import OpenLoop, Validation

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Report:
    """What a calibration's page is made of.

    Args:
        title: of the page.
        recipe: its name.
        robot: its name.
        command: that made the fit.
        fit: the calibrated arm.
        trained: the recordings it was fitted to.
        validations: (label, validation) of each recording looked at; labels that begin with ``training`` are of ``trained``.
        warnings: one line each.
        provenance: versions, hashes, the recipe's text; nested as it likes. ``date`` heads the page, ``logs`` (a list of
            ``file``, ``sha256``, ``samples``, ``lines``) adds to the table of logs.
        seconds: the whole took.
    """

    title: str
    recipe: str
    robot: str
    command: str
    fit: Fit
    trained: tuple[Recording, ...]
    validations: tuple[tuple[str, Validation], ...]
    warnings: tuple[str, ...]
    provenance: dict[str, Any]
    seconds: float

    @property
    def held_out(self) -> list[Validation]:
        """The validations on recordings that were not fitted."""
        return [seen for label, seen in self.validations if not _trained(label)]

    @property
    def shown(self) -> Validation | None:
        """The recording the figures are of: the first held out, else the first there is."""
        return next(iter([*self.held_out, *(seen for _, seen in self.validations)]), None)


def write_report(path: Path, report: Report) -> None:
    """Write a report's page; the file is there when it is complete, or not at all."""
    text = render(report)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def render(report: Report) -> str:
    """Return a report's page as HTML."""
    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(_TEMPLATE).render(**_header(report), **_validation(report), **_fit(report), **_figures(report))


def verdict(report: Report) -> str:
    """Return the numbers that matter in one sentence."""
    seen = report.shown
    if seen is None:
        return "No recording was looked at after the fit: nothing here says how good it is."
    logs = report.held_out or [seen]
    whose = f"{len(logs)} logs" if len(logs) > 1 else "a log"
    of = f"{whose} it has not seen" if report.held_out else "the log it was fitted to"
    explained = tables.span([tables.percent(1 - one.fit.relative.mean()) for one in logs])
    floor = tables.span([tables.percent(one.fit.floor.mean()) for one in logs])
    text = f"Explains {explained} % of the torque on {of} (filtering noise alone leaves {floor} %)"
    loops = [(one.before, one.after) for one in logs if one.after is not None]
    if loops:
        k = main_horizon(loops[0][1])
        error = tables.span([tables.number(1e3 * after.total[k]) for _, after in loops])
        text += (
            f"; predicts joint positions {loops[0][1].horizons[k]:g} s ahead to {error} {tables.heads(report.fit.tree)['error']}"
        )
        old = [tables.number(1e3 * before.total[k]) for before, _ in loops if before is not None]
        text += f" (model file: {tables.span(old)})" if old else ""
    return f"{text}." if report.held_out else f"{text}. No log was held out: how it does on another is not known."


def main_horizon(loop: OpenLoop) -> int:
    """Return the horizon nearest to the half second over which planners look ahead."""
    return int(np.argmin(np.abs(np.asarray(loop.horizons) - 0.53)))


def warnings(report: Report) -> list[str]:
    """Return all there is to warn of, each once."""
    found = [*report.warnings, *report.fit.warnings]
    found += [f"{_name(one.file)}: {note}" for one in report.trained for note in one.warnings if not _said(found, note)]
    for label, seen in report.validations:
        file = _name(seen.fit.file) or label
        if seen.extrapolation >= tables.FAR and not any(file in text and "leverage" in text for text in found):
            found.append(
                f"{file} moves in directions the training logs hardly did (leverage {seen.extrapolation:.1f} times theirs): its "
                "errors say little of the model"
            )
        if not _trained(label) and seen.fit.relative.mean() > seen.prior.relative.mean():
            found.append(f"{file}: the fit explains less of the torque than the model file")
        if seen.after is not None and seen.before is not None:
            k = main_horizon(seen.after)
            if seen.after.total[k] > seen.before.total[k]:
                found.append(f"{file}: in open loop the fit predicts worse than the model file")
    return list(dict.fromkeys(found))


def by_file(notes: list[str], files: list[str]) -> list[tuple[str, list[str]]]:
    """Return notes of the fit, then of each file without the file's name in front of every one."""
    groups: dict[str, list[str]] = {"": []}
    for note in notes:
        file = next((file for file in files if file and note.startswith(f"{file}: ")), "")
        groups.setdefault(file, []).append(note.removeprefix(f"{file}: ") if file else note)
    return [(file, group) for file, group in groups.items() if group]


def _said(found: list[str], note: str) -> bool:
    return any(note in text for text in found)


def _trained(label: str) -> bool:
    return label.lower().startswith("training")


def _name(file: str) -> str:
    return Path(file).name


def _header(report: Report) -> dict[str, Any]:
    fit, held, logs = report.fit, report.held_out, _logs(report)
    better = bool(held) and all(
        one.fit.relative.mean() < one.prior.relative.mean() and one.extrapolation < tables.FAR for one in held
    )
    return {
        "title": report.title,
        "robot": report.robot,
        "recipe": report.recipe if "\n" not in report.recipe else "",
        "recipe_text": report.recipe if "\n" in report.recipe else "",
        "command": report.command,
        "date": str(report.provenance.get("date") or f"{datetime.now():%Y-%m-%d %H:%M}"),
        "seconds": tables.number(report.seconds),
        "steps": ", ".join(f"{name} {tables.number(took, 2)} s" for name, took in fit.seconds.items()),
        "verdict": verdict(report),
        "good": better,
        "notes": by_file(warnings(report), [log["file"] for log in logs]),
        "logs": logs,
        "provenance": [(key, text, "\n" in text) for key, text in tables.flat(report.provenance)],
    }


def _logs(report: Report) -> list[dict[str, str]]:
    """Return the table of logs: those fitted, then those held out, of which only provenance knows more than the name."""
    rows = []
    for one in report.trained:
        lines = f"{one.lines[0]}-{one.lines[-1]}" if len(one.lines) else "all"
        rows.append(_log("training", one.file, one.sha256, lines, one.t))
    known = report.provenance.get("logs")
    known = [entry for entry in known if isinstance(entry, Mapping)] if isinstance(known, (list, tuple)) else []
    for k, seen in enumerate(report.held_out):
        file = seen.fit.file
        entry = known[len(report.trained) + k] if len(known) == len(report.trained) + len(report.held_out) else {}
        if entry.get("file") not in (file, _name(file)):
            entry = {}
        lines = "-".join(str(line) for line in entry.get("lines", ()))
        rows.append(_log("held out", file, str(entry.get("sha256", "")), lines, seen.fit.t))
    return rows


def _log(role: str, file: str, sha256: str, lines: str, t: np.ndarray) -> dict[str, str]:
    rate = 1 / float(np.median(np.diff(t)))
    return {
        "role": role,
        "file": _name(file),
        "path": file,
        "sha256": sha256,
        "lines": lines,
        "duration": f"{t[-1] - t[0]:.1f}",
        "rate": tables.number(rate, 3),
    }


def _validation(report: Report) -> dict[str, Any]:
    joints, blocks = report.fit.tree.joints, []
    for label, seen in report.validations:
        loop = seen.after
        blocks.append(
            {
                "label": label,
                "held_out": not _trained(label),
                "extrapolation": tables.number(seen.extrapolation, 2),
                "far": seen.extrapolation >= tables.FAR,
                "moving": f"{100 * seen.fit.moving.mean():.0f} %",
                "rows": tables.validation_rows(seen, joints),
                "horizons": [] if loop is None else [f"{horizon:g} s" for horizon in loop.horizons],
                "windows": 0 if loop is None else loop.windows,
                "loop": [] if loop is None else tables.open_loop_rows(seen.before, loop, joints),
                "coasting": [] if loop is None else [tables.number(1e3 * error) for error in loop.still],
            }
        )
    # What was not fitted comes first: it is what counts.
    blocks.sort(key=lambda block: not block["held_out"])
    return {"validations": blocks, "units": tables.heads(report.fit.tree)}


def _fit(report: Report) -> dict[str, Any]:
    fit = report.fit
    links, friction = tables.estimate_rows(fit.estimates)
    pairs, count = tables.correlated(fit.estimates)
    return {
        "family": fit.friction.name,
        "families": tables.family_rows(fit),
        "candidates": len(fit.scores),
        "confidence": tables.confidence(fit.estimates),
        "estimates": [("Links and rotors", links), ("Friction", friction)],
        "links": tables.link_rows(fit),
        "delay": f"{abs(1e3 * fit.delay):.1f} ms {'after' if fit.delay >= 0 else 'before'}",
        "kinds": (*INERTIAL, "rotor"),
        "known": tables.known_rows(fit),
        "unknown": tables.unknown(fit),
        "pairs": pairs,
        "pair_count": count,
    }


def _figures(report: Report) -> dict[str, Any]:
    fit, seen = report.fit, report.shown
    joints, units = fit.tree.joints, tables.joint_units(fit.tree)
    return {
        "friction_figure": figures.draw_friction(fit, report.trained),
        "matrix": figures.draw_correlation(fit.estimates),
        "torques": "" if seen is None else figures.draw_torques(seen.fit, joints, units),
        "worst": "" if seen is None else figures.draw_worst(seen.fit, joints, units),
        "residuals": "" if seen is None else figures.draw_residuals(seen.fit, joints),
        "seen_file": "" if seen is None else _name(seen.fit.file),
        "seen_held_out": bool(report.held_out),
    }
