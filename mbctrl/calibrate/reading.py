"""From the name of a log to checked recordings and signals."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mbctrl.base.errors import SpecError
from mbctrl.calibrate.checks import check_recording, outliers
from mbctrl.calibrate.logs import read_recording
from mbctrl.calibrate.recipe import Recipe
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.signals import Signals, prepare
from mbctrl.dynamics.load import Model

_EXCERPT = re.compile(r"(?P<path>.+):(?P<first>\d+)-(?P<last>\d+)")


@dataclass(frozen=True)
class Reading:
    """A log as read, its signals, and what the checks noticed, one line each."""

    recording: Recording
    signals: Signals
    notes: tuple[str, ...]


def excerpt(log: str) -> tuple[Path, tuple[int, int] | None]:
    """Return path and rows (None: all) of ``LOG`` or ``LOG:FIRST-LAST``."""
    found = _EXCERPT.fullmatch(log)
    if found is None or Path(log).is_file():
        return Path(log), None
    return Path(found["path"]), (int(found["first"]), int(found["last"]))


def read(log: str, recipe: Recipe, file: Path, model: Model) -> Reading:
    """Read ``LOG`` or ``LOG:FIRST-LAST`` as a recipe (in ``file``) says, check it and filter it.

    Errors:
        SpecError: where the recipe does not fit the robot, naming its key.
        LogError: naming file, line and column.
    """
    path, rows = excerpt(log)
    try:
        recording = read_recording(path, recipe.log, model.robot, rows)
    except SpecError as error:
        raise SpecError(error.message, file=error.file or file, key=f"log.{error.key}") from None
    notes = [*recording.warnings, *check_recording(recording, model.robot, model.tree)]
    named = tuple(note if path.name in note else f"{path.name}: {note}" for note in notes)
    return Reading(recording, prepare(recording, recipe.filter, outliers(recording)), named)
