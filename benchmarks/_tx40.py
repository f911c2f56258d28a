"""A Stäubli TX40's log: a wrist whose joints are coupled, currents and positions on the motors' side, in two files."""

from __future__ import annotations

import gzip
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _common import row

from mbctrl.calibrate.identify import Identification
from mbctrl.calibrate.logs import read_recording
from mbctrl.calibrate.recipe import FilterSpec, FitSpec, LogSpec, Signal
from mbctrl.calibrate.signals import Signals, prepare
from mbctrl.calibrate.validate import validate_on
from mbctrl.dynamics.load import Model, load_model

RATIOS = np.diag([32.0, 32.0, 45.0, -48.0, 45.0, 32.0])
RATIOS[5, 4] = 32.0  # the last motor turns with the fifth joint


def tx40_rows(folder: Path) -> list[dict[str, Any]]:
    """Return held-out errors of blocks between the training blocks, and of the log's end, which moves as the start did not."""
    with tempfile.TemporaryDirectory() as scratch:
        model = _model(folder, Path(scratch))
        signals = _signals(folder, Path(scratch), model)
    one = Identification(model, FitSpec(block=0.25, draws=20))
    t = signals.t - signals.t[0]
    interleaved, start = (t / 0.25).astype(int) % 2 == 0, t < 0.7 * t[-1]
    out = []
    for label, train in (("every other quarter of a second", interleaved), ("first 70 %", start)):
        trained, held = (one.motion(_part(signals, part)) for part in (train, ~train))
        fit = one.fit([trained])
        seen = validate_on(fit, held, [trained])
        out += [
            row(f"TX40, trained on {label}: held out, mean of six joints", 100 * seen.fit.relative.mean(), "%"),
        ]
    return out


def _part(signals: Signals, part: np.ndarray) -> Signals:
    return replace(signals, moving=signals.moving & part, sliding=signals.sliding & part[:, None])


def _model(folder: Path, scratch: Path) -> Model:
    text = (folder / "tx40_mdh_modified.urdf").read_text()
    # Its last link has no inertia, with which no simulator compiles it.
    path = scratch / "tx40.urdf"
    for axis in "xyz":
        text = text.replace(f'i{axis}{axis}="0.000"', f'i{axis}{axis}="1e-4"')
    path.write_text(text)
    return load_model(str(path))


def _signals(folder: Path, scratch: Path, model: Model) -> Signals:
    files = {"pos": "pos_read_data.csv.gz", "cur": "curr_data.csv.gz"}
    read = {name: np.genfromtxt(gzip.open(folder / file), delimiter=",", skip_header=1) for name, file in files.items()}
    np.savez(scratch / "log.npz", **read)
    columns = {name: tuple(f"{name}[{k}]" for k in range(6)) for name in files}
    offset = (0.0, -np.pi / 2, np.pi / 2, 0.0, 0.0, 0.0)
    position = Signal(columns=columns["pos"], unit="rad", matrix=np.linalg.inv(RATIOS).tolist(), offset=offset)
    effort = Signal(columns=columns["cur"], unit="N·m", matrix=RATIOS.T.tolist())
    log = read_recording(scratch / "log.npz", LogSpec(rate=5000.0, position=position, effort=effort), model.robot)
    return prepare(log, FilterSpec(motion=25.0))
