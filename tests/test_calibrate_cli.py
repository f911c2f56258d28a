"""``mbctrl calibrate`` and ``mbctrl payload`` as a user meets them: logs and recipes in, files and one-line errors out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulated_logs import arm, motion, torque

from mbctrl.base.parameters import load_parameters
from mbctrl.cli.main import main
from mbctrl.dynamics.body import compose, weld
from mbctrl.dynamics.load import load_model

RECIPE = """\
# Logs of a made-up arm.
robot: arm2
log:
  time: {column: t, unit: s}
  position: {columns: [q1, q2], unit: deg}
  velocity: {columns: [v1, v2], unit: rad/s}
  effort: {columns: [i1, i2], unit: A}
  gains: [2.0, 0.5]   # [N·m/A]
filter: {motion: 15.0}
fit:
  friction: {memory: sign}
  draws: 40
"""
HEADER = "t,q1,q2,v1,v2,i1,i2"
BODY = compose(0.5, np.array([0.02, 0.0, 0.01]), 1e-3 * np.eye(3))


def write_log(path: Path, seed: int = 0, carried: bool = False, seconds: float = 20.0) -> np.ndarray:
    """Write a log and return its rows."""
    tree = arm("arm2")
    heavier = replace(tree, mass=1.3 * tree.mass, inertia=1.3 * tree.inertia)
    t, q, v, a = motion("arm2", seconds, 100.0, seed)
    tau = torque(weld(heavier, 1, BODY) if carried else heavier, q, v, a)
    rng = np.random.default_rng(seed)
    tau = tau + 0.01 * tau.std(0) * rng.normal(size=tau.shape)
    rows = np.column_stack([t, np.degrees(q), v, tau / [2.0, 0.5]])
    np.savetxt(path, rows, delimiter=",", header=HEADER, comments="", fmt="%.9g")
    return rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a recipe and three logs, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    write_log(tmp_path / "monday.csv")
    write_log(tmp_path / "tuesday.csv", seed=3)
    write_log(tmp_path / "loaded.csv", seed=3, carried=True)
    return tmp_path


def test_a_log_becomes_parameters_a_model_and_a_report(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["calibrate", "recipe.yaml", "monday.csv:100-1900", "--validate", "tuesday.csv", "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert "held out: tuesday.csv" in said and "--robot.parameters out/arm2_fitted.yaml" in said and "open loop" in said
    assert sorted(path.name for path in (here / "out").iterdir()) == ["arm2_fitted.xml", "arm2_fitted.yaml", "arm2_report.html"]
    found = load_parameters("out/arm2_fitted.yaml")
    truth = arm("arm2")
    names = list(found.joints)
    assert [found.joints[name].friction for name in names] == pytest.approx(truth.friction, rel=0.05)
    assert [found.joints[name].damping for name in names] == pytest.approx(truth.damping, rel=0.05)
    log = found.provenance["logs"][0]
    assert log["file"] == "monday.csv" and len(log["sha256"]) == 64 and log["samples"] == 1801
    assert {estimate.status for estimate in found.estimates} >= {"free", "unidentified"}
    model = load_model("arm2", found)
    again = load_model("out/arm2_fitted.xml")
    np.testing.assert_allclose(again.tree.mass, model.tree.mass, rtol=1e-12)
    # What torques are made of is the truth's, whatever single masses are.
    q, v, a = (np.array([[0.3, -0.5]]), np.array([[0.0, 0.0]]), np.array([[1.0, -2.0]]))
    from mbctrl.dynamics.reference import ReferenceDynamics

    heavier = replace(truth, mass=1.3 * truth.mass, inertia=1.3 * truth.inertia)
    wanted, got = (ReferenceDynamics(tree).inverse_dynamics(q, v, a) for tree in (heavier, model.tree))
    np.testing.assert_allclose(got, wanted, rtol=0.02)
    report = (here / "out" / "arm2_report.html").read_text()
    assert "tuesday.csv" in report and "monday.csv:100-1900" in report
    assert main(["check", "out/arm2_fitted.yaml", "recipe.yaml"]) == 0


def test_a_payload_is_weighed_and_gains_are_found(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["payload", "recipe.yaml", "monday.csv", "loaded.csv", "--out", "out/arm2_load_fitted.yaml"]) == 0
    said = capsys.readouterr().out
    mass = float(said.split("mass ")[1].split(" ")[0])
    assert mass == pytest.approx(0.5, rel=0.01) and "not identified: com z, inertia xx" in said
    carried = load_parameters("out/arm2_load_fitted.yaml").provenance["payload"]
    assert carried["mass"] == pytest.approx(mass, rel=1e-3)
    assert main(["payload", "recipe.yaml", "monday.csv", "loaded.csv", "--mass", "0.5"]) == 0
    gains = capsys.readouterr().out.split("recipe: [")[1].split("]")[0]
    assert [float(value) for value in gains.split(",")] == pytest.approx([2.0, 0.5], rel=0.02)


def test_encoder_offsets_are_corrected(here: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("monday", "tuesday"):
        rows = np.genfromtxt(f"{name}.csv", delimiter=",", skip_header=1)
        rows[:, 1:3] += [1.0, -1.5]  # [deg]
        np.savetxt(f"{name}.csv", rows, delimiter=",", header=HEADER, comments="", fmt="%.9g")
    (here / "recipe.yaml").write_text(RECIPE.replace("fit:\n", "fit:\n  encoders: free\n"))
    assert main(["calibrate", "recipe.yaml", "monday.csv", "--validate", "tuesday.csv", "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert "encoder offsets [mrad]: shoulder +" in said
    offsets = {e.name: e.value for e in load_parameters("out/arm2_fitted.yaml").estimates if e.name.endswith(".encoder")}
    assert [np.degrees(offsets[f"{joint}.encoder"]) for joint in ("shoulder", "elbow")] == pytest.approx([1.0, -1.5], abs=0.25)


def test_the_simulation_route_finds_a_delay(here: Path, capsys: pytest.CaptureFixture) -> None:
    rows = np.genfromtxt("monday.csv", delimiter=",", skip_header=1)
    late = 0.004
    for column in (5, 6):
        rows[:, column] = np.interp(rows[:, 0] + late, rows[:, 0], rows[:, column])  # logged before it takes effect
    np.savetxt("early.csv", rows, delimiter=",", header=HEADER, comments="", fmt="%.9g")
    (here / "recipe.yaml").write_text(RECIPE + "simulate:\n  parameters: {delay: {}, elbow.armature: {}}\n")
    assert main(["calibrate", "recipe.yaml", "early.csv", "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert float(said.split("simulated: delay ")[1].split(" ")[0]) == pytest.approx(late, abs=1e-3)
    names = [estimate.name for estimate in load_parameters("out/arm2_fitted.yaml").estimates]
    assert "delay (simulated)" in names and "elbow.armature (simulated)" in names


def complaint(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Return the one line a command that must fail prints, and hold that it left nothing behind."""
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert sorted(Path().rglob("*")) == before
    lines = [line for line in said.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in said.err + said.out
    return lines[0]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("unit: deg", "unit: rad", "position"),
        ("columns: [v1, v2]", "columns: [v2, v1]", "velocity"),
        ("columns: [i1, i2]", "columns: [i1, i3]", "i3"),
        ("gains: [2.0, 0.5]", "gains: [2.0]", "log.gains: expected 2 values"),
        ("memory: sign", "memory: dall", "fit.friction"),
        ("  draws: 40", "  drawz: 40", "fit.drawz: unknown key; did you mean 'draws'?"),
        ("  draws: 40", "  parameters: {shoulder.Ixz: {free: true}}", "shoulder.Ixz: free, but without influence"),
        ("unit: A}", "unit: V}", "log.effort: unit"),
        ("  draws: 40", "  draws: 40\nsimulate: {parameters: {dely: {}}}", "unknown parameter 'dely'; did you mean 'delay'?"),
        ("  draws: 40", "  draws: 40\nsimulate: {mode: impedance, parameters: {delay: {}}}", "arm2 takes torques"),
    ],
)
def test_a_wrong_recipe_is_one_line(here: Path, old: str, new: str, expected: str, capsys: pytest.CaptureFixture) -> None:
    (here / "recipe.yaml").write_text(RECIPE.replace(old, new))
    assert expected in complaint(["calibrate", "recipe.yaml", "monday.csv", "--out", "out"], capsys)


def test_a_wrong_log_is_one_line(here: Path, capsys: pytest.CaptureFixture) -> None:
    lines = (here / "monday.csv").read_text().splitlines()
    cells = lines[700].split(",")
    for cell, expected in (("nan", "line 701"), ("1e300", "line 701"), ("oops", "line 701")):
        (here / "bad.csv").write_text("\n".join([*lines[:700], ",".join([*cells[:2], cell, *cells[3:]]), *lines[701:]]) + "\n")
        said = complaint(["calibrate", "recipe.yaml", "bad.csv", "--out", "out"], capsys)
        assert "bad.csv" in said and expected in said and ("column 'q2'" in said or "column 3" in said), said
    assert "nowhere.csv: no such file" in complaint(["calibrate", "recipe.yaml", "nowhere.csv", "--out", "out"], capsys)
    assert "unknown recipe 'nothing'" in complaint(["calibrate", "nothing", "monday.csv", "--out", "out"], capsys)
    assert "--mass" in complaint(["payload", "recipe.yaml", "monday.csv", "loaded.csv", "--mass", "-1"], capsys)


def test_several_logs_are_fitted_as_one(here: Path) -> None:
    assert main(["calibrate", "recipe.yaml", "monday.csv", "tuesday.csv", "--out", "out"]) == 0
    logs = load_parameters("out/arm2_fitted.yaml").provenance["logs"]
    assert [log["file"] for log in logs] == ["monday.csv", "tuesday.csv"]
