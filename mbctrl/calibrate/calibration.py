"""A whole calibration: logs read and checked, fitted, corrected by what the fit tells, judged on logs it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mbctrl.base.errors import SpecError
from mbctrl.calibrate.encoders import EncoderOffsets
from mbctrl.calibrate.identify import Fit, Identification
from mbctrl.calibrate.reading import read
from mbctrl.calibrate.recipe import Recipe
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.refine import Refined, refine
from mbctrl.calibrate.regression import Motion
from mbctrl.calibrate.signals import CalibrationError, prepare
from mbctrl.calibrate.validate import Validation, validate_on
from mbctrl.dynamics.load import Model

_FAR = 5.0  # extrapolation beyond which a held-out log says little


@dataclass(frozen=True)
class Outcome:
    """What a calibration found.

    Args:
        recipe: what it was told.
        model: the arm as its file has it.
        fit: the arm as fitted.
        trained, held_out: the recordings, as read.
        validations: by label, the training log's first.
        encoders: offsets, where the recipe asks for them.
        refined: what was fitted by simulation, where the recipe asks for it.
        warnings: what was noticed, one line each.
    """

    recipe: Recipe
    model: Model
    fit: Fit
    trained: tuple[Recording, ...]
    held_out: tuple[Recording, ...]
    validations: tuple[tuple[str, Validation], ...]
    encoders: EncoderOffsets | None
    refined: Refined | None
    warnings: tuple[str, ...]


class Calibration:
    """Does what a recipe says.

    Args:
        recipe: how logs are read and what is fitted.
        file: where the recipe was read, for errors.
        model: the recipe's robot; its inertias are the prior.
        advance: told what is being done.
    """

    def __init__(self, recipe: Recipe, file: Path, model: Model, advance: Callable[[str], None] = lambda text: None) -> None:
        self.recipe, self.file, self.model, self.advance = recipe, file, model, advance
        self.identification = Identification(model, recipe.fit, advance)

    def run(self, logs: Sequence[str], held_out: Sequence[str] = ()) -> Outcome:
        """Fit ``LOG`` or ``LOG:FIRST-LAST`` and judge the fit on others.

        Errors:
            SpecError, LogError, CalibrationError: naming recipe and key, or log, line and column.
        """
        readings = []
        for log in (*logs, *held_out):
            self.advance(f"reading {log}")
            readings.append(read(log, self.recipe, self.file, self.model))
        recordings = tuple(one.recording for one in readings)
        motions = [self.identification.motion(one.signals) for one in readings]
        trained, others = recordings[: len(logs)], recordings[len(logs) :]
        try:
            fit, encoders, motions = self._fitted(trained, motions)
            refined = self._refined(fit, trained)
        except CalibrationError as error:
            raise CalibrationError(error.message, file=error.file or self.file, key=error.key) from None
        fit = fit if refined is None else replace(fit, tree=refined.tree)
        validations, notes = self._judged(fit, motions, others)
        warnings = (*(note for one in readings for note in one.notes), *fit.warnings, *notes)
        return Outcome(self.recipe, self.model, fit, trained, others, validations, encoders, refined, warnings)

    def _fitted(self, trained: Sequence[Recording], motions: list[Motion]) -> tuple[Fit, EncoderOffsets | None, list[Motion]]:
        """Fit, correct all recordings by what that tells of delay and encoders, fit anew; return the recordings too."""
        spec, count, encoders = self.recipe.fit, len(trained), None
        commands = self._commands(trained) if spec.estimator == "instrumental" else ()
        fit = self.identification.fit(motions[:count], commands)
        late = fit.delay
        if spec.delay == "remove" or (self.recipe.simulate and "delay" in self.recipe.simulate.parameters):
            self.advance("fitting without the delay")
            motions = self.identification.undelayed(motions, fit)
            fit = replace(self.identification.fit(motions[:count], commands), delay=late)
        if spec.encoders == "free":
            self.advance("encoder offsets")
            encoders = self.identification.encoders(motions[:count], fit)
            motions = self.identification.rezeroed(motions, encoders)
            fit = replace(self.identification.fit(motions[:count], commands), delay=late)
        return fit, encoders, motions

    def _refined(self, fit: Fit, trained: Sequence[Recording]) -> Refined | None:
        spec = self.recipe.simulate
        return None if spec is None else refine(self.model, fit, spec, trained, self.recipe.filter, self.advance)

    def _judged(
        self, fit: Fit, motions: Sequence[Motion], others: Sequence[Recording]
    ) -> tuple[tuple[tuple[str, Validation], ...], list[str]]:
        """Return what the first training log and every held-out one say, and what to beware of."""
        self.advance("validating")
        trained = motions[: len(motions) - len(others)]
        found, notes = [("training log", validate_on(fit, trained[0], trained))], []
        for recording, motion in zip(others, motions[len(trained) :]):
            seen, name = validate_on(fit, motion, trained), Path(recording.file).name
            found.append((f"held out: {name}", seen))
            if seen.extrapolation > _FAR:
                notes.append(
                    f"{name} moves in directions the training logs hardly did (leverage {seen.extrapolation:.1f} times "
                    "theirs): its errors say little of the model"
                )
        return tuple(found), notes

    def _commands(self, trained: Sequence[Recording]) -> list[Motion]:
        """Return the recordings along the commanded motion, whose columns are the instruments."""
        found = []
        for recording in trained:
            if recording.command is None:
                raise SpecError("needs log.command", file=self.file, key="fit.estimator: instrumental")
            along = replace(recording, q=recording.command, v=None)
            found.append(self.identification.motion(prepare(along, self.recipe.filter)))
        return found
