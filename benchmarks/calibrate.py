"""Calibration of a real UR10e from its logs, beside the model file, plain least squares and published figures.

The logs are not part of the project: name their folder in $MBCTRL_DATA (it holds ``ur10e/`` from the repository
shamilmamedov/dynamic_calibration, commit 11af40e; Mamedov and Mikhel 2020, doi 10.3389/frobt.2020.571574; and, where it is
there, ``tx40/`` from thanhndv212/figaroh-plus, commit c3b5172).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _common import Say, row
from _tx40 import tx40_rows

from mbctrl.base.errors import MbctrlError, SpecError
from mbctrl.calibrate.friction import Friction
from mbctrl.calibrate.gains import drive_gains
from mbctrl.calibrate.identify import Fit, Identification
from mbctrl.calibrate.inertia import pseudo_inertia
from mbctrl.calibrate.logs import read_recording
from mbctrl.calibrate.payload import identify_payload
from mbctrl.calibrate.reading import read
from mbctrl.calibrate.recipe import FitSpec, FrictionSpec, LogSpec, Recipe, load_recipe
from mbctrl.calibrate.signals import Signals
from mbctrl.calibrate.validate import Torques, validate_on
from mbctrl.dynamics.load import Model, load_model

TRAIN, ROWS = "ur-20_02_10-30sec_12harm.csv", (635, 3510)
MOVES, MOVES_ROWS = "ur-20_01_17-ptp_10_points.csv", (700, 4200)
OTHER = "ur-20_02_12-50sec_12harm.csv"
BROKEN = "ur-19_09_27-11_32_02.csv"
PAIR, LOAD = ("ur-20_02_19_14harm50sec.csv", "ur-20_02_19_14harm50secLoad.csv"), 2.805  # [kg]
PUBLISHED = np.array([10.0, 10.6956, 8.4566, 9.0029, 9.48, 10.1232])  # [N·m/A], beside the logs
LEAN = Friction(("coulomb", "viscous", "offset", "root", "stribeck"), "dahl")
SESSIONS = (
    "ur-20_01_17-ptp_10_points.csv",
    "ur-20_02_05-20sec_8harm.csv",
    TRAIN,
    "ur-20_02_12-40sec_12harm.csv",
    OTHER,
    "ur-20_02_19_14harm50sec.csv",
)


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return held-out errors, physical consistency, open-loop errors, interval coverage and refusals (quick: the same)."""
    data = Path(os.environ.get("MBCTRL_DATA", "")) / "ur10e"
    if not data.is_dir():
        raise SpecError("expected the folder that holds ur10e/, with the logs", file="$MBCTRL_DATA")
    recipe, _ = load_recipe("ur10e_rtde")
    model = load_model(recipe.robot)
    bench = _Bench(data, recipe, model)
    say("command line, from CSV to report")
    out = [*_command(data)]
    say("fit to the 30 s log")
    out += bench.held_out()
    say("sessions")
    out += bench.coverage()
    say("payload and drive gains")
    out += bench.payload(quick)
    say("broken logs")
    out += bench.refusals()
    other = data.parent / "tx40"
    if other.is_dir():
        say("another arm")
        out += tx40_rows(other)
    return out


def _command(data: Path) -> list[dict[str, Any]]:
    """Return what the command line takes from CSV to parameter file, model and report."""
    from mbctrl.cli.calibrate import calibrate

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        calibrate("ur10e_rtde", [f"{data / TRAIN}:{ROWS[0]}-{ROWS[1]}"], [str(data / OTHER)], Path(folder))
        seconds = time.perf_counter() - start
    return [row("30 s log: CSV to parameter file, MJCF and report", seconds, "s", "<=", 10.0)]


def _in_motion(seen: Torques, one: Signals) -> float:
    left, torque = ((x[one.moving]) for x in (seen.measured - seen.predicted, seen.measured))
    return 100 * float((np.linalg.norm(left, axis=0) / np.linalg.norm(torque, axis=0)).mean())


class _Bench:
    def __init__(self, data: Path, recipe: Recipe, model: Model) -> None:
        self.data, self.recipe, self.model = data, recipe, model

    def signals(self, name: str, rows: tuple[int, int] | None = None) -> Signals:
        part = "" if rows is None else f":{rows[0]}-{rows[1]}"
        return read(f"{self.data / name}{part}", self.recipe, Path("recipe"), self.model).signals

    def fit(self, *logs: Signals, spec: FitSpec | None = None) -> tuple[Fit, Identification, list[Any]]:
        one = Identification(self.model, spec or self.recipe.fit)
        motions = [one.motion(log) for log in logs]
        return one.fit(motions), one, motions

    def held_out(self) -> list[dict[str, Any]]:
        """Return one model's errors, trained on the 30 s log alone, its family chosen inside that log."""
        fit, one, trained = self.fit(self.signals(TRAIN, ROWS))
        plain, _, _ = self.fit(self.signals(TRAIN, ROWS), spec=FitSpec(friction=FrictionSpec(), draws=20))
        self.family = fit.friction
        other, moves = one.motion(self.signals(OTHER)), one.motion(self.signals(MOVES, MOVES_ROWS))
        # The repository's split counts every row of its excerpt, standstill between moves too.
        seen, moved = validate_on(fit, other, trained), validate_on(fit, moves, trained, still=True)
        base, base_moved = validate_on(plain, other, trained), validate_on(plain, moves, trained, still=True)
        links = np.linalg.eigvalsh(pseudo_inertia(fit.links))[:, 0]
        percent = {name: 100 * part.relative for name, part in (("seen", seen.fit), ("moved", moved.fit))}
        return [
            row("50 s log, mean of six joints: model file", 100 * seen.prior.relative.mean(), "%"),
            row(
                "50 s log, mean of six joints: weighted least squares, sign friction", 100 * base.unconstrained.relative.mean(), "%"
            ),
            row("50 s log, mean of six joints: fit", percent["seen"].mean(), "%"),
            # As the bar was measured: a joint that stands still counts while another one moves.
            row("50 s log, mean of six joints: fit, every row in motion", _in_motion(seen.fit, other.one), "%", "<=", 7.7),
            row("50 s log, mean of six joints: filtering alone", 100 * seen.fit.floor.mean(), "%"),
            row("point to point, joints 1 to 5: model file", 100 * moved.prior.relative[:5].mean(), "%"),
            row("point to point, joints 1 to 5: published parameters (as published)", 10.55, "%"),
            row(
                "point to point, joints 1 to 5: least squares, sign friction",
                100 * base_moved.unconstrained.relative[:5].mean(),
                "%",
            ),
            row("point to point, joints 1 to 5: fit", percent["moved"][:5].mean(), "%", "<=", 9.7),
            row("point to point, joint 6: fit", percent["moved"][5], "%"),
            row("point to point, joints 1 to 5: filtering alone", 100 * moved.fit.floor[:5].mean(), "%"),
            row("least eigenvalue of a link's pseudo-inertia", links.min(), "SI", ">", 0.0),
            row("least rotor inertia", fit.tree.armature.min(), "kg·m²", ">=", 0.0),
            row("least Coulomb friction", fit.tree.friction.min(), "N·m", ">=", 0.0),
            row("largest mass of a link over the model file's", (fit.tree.mass / fit.prior.mass).max(), "x"),
            row("50 s log, 0.53 s open loop: model file", 1e3 * seen.before.total[1], "mrad"),
            row("50 s log, 0.53 s open loop: constant velocity", 1e3 * seen.after.still[1], "mrad"),
            row("50 s log, 0.53 s open loop: fit", 1e3 * seen.after.total[1], "mrad", "<=", 22.0),
            *(row(f"fit: seconds for {step}", seconds, "s") for step, seconds in fit.seconds.items()),
        ]

    def coverage(self) -> list[dict[str, Any]]:
        """Return how many of the differences between sessions lie within their 95 % intervals."""
        family = FrictionSpec(
            memory=self.family.memory, length=self.family.length, speed=self.family.speed, terms=self.family.terms
        )
        estimates = [self.fit(self.signals(name), spec=FitSpec(friction=family))[0].estimates for name in SESSIONS]
        inside = []
        for a, b in itertools.combinations(estimates, 2):
            inside.append(np.abs(a.value - b.value) <= 1.96 * np.hypot(a.se, b.se))
        share = 100 * float(np.mean(inside))
        return [
            row("differences between 6 sessions within their 95 % intervals", share, "%", ">=", 85.0),
            row("the same, not too wide either", share, "%", "<=", 99.0),
        ]

    def payload(self, quick: bool) -> list[dict[str, Any]]:
        """Return the known load's mass, and the gains that the known load gives."""
        bare, loaded = ([self.signals(name)] for name in PAIR)
        tree, gains, draws = self.model.tree, np.array(self.recipe.log.gains), 20 if quick else 100
        found = identify_payload(bare, loaded, tree, draws=draws)
        scale = PUBLISHED / gains
        smaller = [
            [replace(one, effort=one.effort * scale, measured=one.measured * scale) for one in logs] for logs in (bare, loaded)
        ]
        light = identify_payload(*smaller, tree, draws=draws)
        drives = drive_gains(bare, loaded, tree, LOAD, start_gains=gains, friction=LEAN, draws=draws)
        return [
            row("load of 2.805 kg: mass", found.mass, "kg"),
            row("load of 2.805 kg: standard error", found.mass_error, "kg"),
            row("load of 2.805 kg: error of its mass", 100 * abs(found.mass / LOAD - 1), "%", "<=", 3.0),
            row("the same with the gains published beside the logs", 100 * abs(light.mass / LOAD - 1), "%"),
            *(row(f"gain of joint {j + 1}", gain, "N·m/A") for j, gain in enumerate(drives.gains)),
            row(
                "gains, largest difference from the controller's own", 100 * np.abs(drives.gains / gains - 1).max(), "%", "<=", 5.0
            ),
            row("gains, largest difference from those published", 100 * np.abs(drives.gains / PUBLISHED - 1).max(), "%", "<=", 5.0),
        ]

    def refusals(self) -> list[dict[str, Any]]:
        """Return 1 for each broken log that is refused by line and column."""
        narrow = self.recipe.log.model_dump(exclude_unset=True)
        # The columns this log does have: its garbage rows are what is left to find.
        narrow |= {"width": None, "velocity": None, "effort": {"columns": tuple(range(8, 14)), "unit": "A"}}
        out = []
        for name, spec in (("too few columns", self.recipe.log), ("garbage rows", LogSpec.model_validate(narrow))):
            try:
                read_recording(self.data / BROKEN, spec, self.model.robot)
                said = ""
            except MbctrlError as error:
                said = str(error)
            out.append(
                row(
                    f"broken log refused ({name}): {said.partition(': ')[2][:60]}",
                    float("line" in said and "column" in said),
                    "1",
                    ">=",
                    1,
                )
            )
        return out
