"""The command line: good runs leave a whole folder; bad input gets one line naming file and key, exit code 2, no folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from mbctrl.base.config import load_run
from mbctrl.base.logs import read_log
from mbctrl.cli.main import main

QUICK = ["--planner.samples", "16", "--record.no-video", "--record.no-plots"]


def mbctrl(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mbctrl.cli.main", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def scenario(folder: Path, **changes: object) -> str:
    """Write panda_reach_sim, changed (None removes a key), and return its path."""
    data = yaml.safe_load(load_run("panda_reach_sim")[1].read_text())
    data |= changes
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
    return str(path)


BAD = {
    "missing file": (lambda f: "nowhere.yaml", ["nowhere.yaml", "no such file"]),
    "unknown scenario": (lambda f: "panda_reech_sim", ["panda_reech_sim", "panda_reach_sim"]),
    "unknown key": (lambda f: scenario(f, duratoin=3.0), ["mine.yaml", "duratoin", "duration"]),
    "unknown nested key": (lambda f: scenario(f, planner={"sample": 3}), ["mine.yaml", "planner.sample", "samples"]),
    "missing key": (lambda f: scenario(f, duration=None), ["mine.yaml", "duration"]),
    "nan": (lambda f: scenario(f, duration=float("nan")), ["mine.yaml", "duration", "nan"]),
    "text for a number": (lambda f: scenario(f, duration="soon"), ["mine.yaml", "duration", "soon"]),
    "negative": (lambda f: scenario(f, duration=-1.0), ["mine.yaml", "duration", "-1"]),
    "unknown robot": (lambda f: scenario(f, robot="pander"), ["mine.yaml", "robot", "pander", "panda"]),
    "unknown controller": (lambda f: scenario(f, controller="pander"), ["mine.yaml", "controller", "pander"]),
    "unknown term": (lambda f: scenario(f, task={"reech": {"weight": 1.0}}), ["mine.yaml", "task.reech", "reach"]),
    "unknown rule": (lambda f: scenario(f, rule="mpppi"), ["mine.yaml", "rule", "mpppi", "mppi"]),
    "unknown rule setting": (lambda f: scenario(f, settings={"lambda": 1.0}), ["mine.yaml", "settings.lambda"]),
    "out of reach": (
        lambda f: scenario(f, goal={"kind": "poses", "targets": [{"position": [2.0, 0.0, 0.5]}]}),
        ["mine.yaml", "goal.targets[0].position", "out of reach"],
    ),
    "wrong vector length": (
        lambda f: scenario(f, goal={"kind": "poses", "targets": [{"position": [0.5, 0.0]}]}),
        ["mine.yaml", "goal", "targets[0].position"],
    ),
    "wrong sigma length": (lambda f: scenario(f, planner={"sigma": [0.1, 0.1]}), ["mine.yaml", "planner.sigma", "7"]),
    "wrong joint goal": (lambda f: scenario(f, goal={"kind": "joints", "position": [0.0]}), ["mine.yaml", "goal.position", "7"]),
    "too few knots": (lambda f: scenario(f, planner={"knots": 2, "interpolation": "cubic"}), ["mine.yaml", "planner.knots"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path, capsys, monkeypatch):
    make, words = BAD[case]
    name = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["run", name, "--lockstep"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("scenario", "words", "said"),
    [
        (
            "panda_reach_payload_sim",
            ["--backend.payload.at", "7", "4"],
            "--backend.payload: at: expected increasing times, found [7.0, 4.0]",
        ),
        ("panda_reach_sim", ["--planner.risk.weight", "2"], "--planner.risk: weight: is of kind deviation, found kind expectation"),
        ("panda_reach_sim", ["--planner.samples", "0"], "--planner.samples: Input should be greater than or equal to 1, found 0"),
    ],
)
def test_settings_that_do_not_fit_together_are_named(scenario, words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", scenario, *words]) == 2
    assert capsys.readouterr().err == f"error: command line: {said}\n"


def test_duplicate_key_names_file_and_line(tmp_path, capsys):
    path = tmp_path / "twice.yaml"
    path.write_text("robot: panda\nrobot: ur10e\n")
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert "twice.yaml" in error and "duplicate key 'robot'" in error and "line 2" in error


def test_exponent_without_a_dot_is_a_number(tmp_path):
    path = Path(scenario(tmp_path))
    path.write_text(path.read_text().replace("duration: 12.0", "duration: 1e-3"))
    assert load_run(str(path))[0].duration == 1e-3


def test_model_that_does_not_compile(tmp_path, capsys):
    (tmp_path / "broken.xml").write_text("<mujoco><worldbody><body><joint name='a'/></body></worldbody></mujoco>")
    assert main(["run", scenario(tmp_path, robot=str(tmp_path / "broken.xml"))]) == 2
    error = capsys.readouterr().err
    assert "broken.xml" in error and "does not compile" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "value"), [("--planner.samples", "-3"), ("--planner.sigma", "nan"), ("--duration", "-1"), ("--loop.rate", "0")]
)
def test_bad_setting_on_the_command_line(setting, value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "panda_reach_sim", setting, value]) == 2
    assert setting in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_lockstep_run_leaves_a_whole_folder_and_repeats_itself(tmp_path):
    for name in ("a", "b"):
        assert main(["run", "panda_reach_sim", "--lockstep", "--out", str(tmp_path / name), "--duration", "0.4", *QUICK]) == 0
    a, b = (read_log(tmp_path / name / "log.csv") for name in ("a", "b"))
    assert len(a["t"]) == 400 and a.units["tau.joint1"] == "N·m" and a.header["robot"] == "panda"
    assert (a["q"] == b["q"]).all() and (a["tau"] == b["tau"]).all()
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert config["config"]["planner"]["samples"] == 16 and "torch" in config["packages"]


def test_pictures_are_made(tmp_path):
    folder = tmp_path / "run"
    assert (
        main(["run", "arm2_swingup_sim", "--lockstep", "--out", str(folder), "--duration", "0.3", "--planner.samples", "16"]) == 0
    )
    assert (folder / "plots.png").stat().st_size > 20_000


def test_an_existing_folder_is_not_touched(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert main(["run", "panda_reach_sim", "--out", str(tmp_path / "run")]) == 2
    assert "exists already" in capsys.readouterr().err and not any((tmp_path / "run").iterdir())


def test_real_time_run_and_ctrl_c_keep_the_log(tmp_path):
    command = [sys.executable, "-m", "mbctrl.cli.main", "run", "panda_reach_sim", "--out", "run", "--duration", "60", *QUICK]

    def heed() -> None:  # where the tests run in the background, children would inherit that Ctrl-C is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=subprocess.STDOUT, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 90
    while not (tmp_path / "run" / "plans.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output and "interrupted" in output
    log, plans = read_log(tmp_path / "run" / "log.csv"), read_log(tmp_path / "run" / "plans.csv")
    assert log["t"][-1] > 1.0 and len(plans["t0"]) >= 2
    assert (plans["latency"] >= 0).all() and np.max(plans["latency"]) > 0  # 0: the plan came while control was held up


def test_help_is_light_and_teaches_by_example(tmp_path):
    code = "import sys; from mbctrl.cli.main import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'mujoco', 'scipy', 'pinocchio', 'matplotlib'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.rstrip().endswith("[]")
    assert "mbctrl run launch/panda_reach_sim.yaml" in result.stdout


def test_scenario_help_lists_its_settings(capsys):
    assert main(["run", "panda_reach_sim", "--help"]) == 0
    assert "--planner.samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["list"], "panda_reach_sim"),
        (["show", "panda"], "joint7"),
        (["show", "panda_reach_sim"], "tolerance_position"),
        (["show", "panda_reach"], "samples"),
        (["doctor"], "off-screen rendering"),
    ],
)
def test_looking_verbs(arguments, word, capsys):
    assert main(arguments) == 0
    assert word in capsys.readouterr().out


URDF = """<robot name="two"><link name="base"/>
<link name="a"><inertial><origin xyz="0 0 0.2"/><mass value="2"/><inertia ixx="0.1" iyy="0.1" izz="0.02"
ixy="0" ixz="0" iyz="0"/></inertial>
<visual><geometry><mesh filename="package://nowhere/a.stl"/></geometry></visual></link>
<link name="b"><inertial><origin xyz="0 0 0.1"/><mass value="1"/><inertia ixx="0.05" iyy="0.05" izz="0.01"
ixy="0" ixz="0" iyz="0"/></inertial>
<collision><geometry><mesh filename="package://nowhere/b.stl"/></geometry></collision></link>
<joint name="j1" type="revolute"><parent link="base"/><child link="a"/><axis xyz="0 1 0"/>
<limit lower="-2" upper="2" effort="30" velocity="2"/></joint>
<joint name="j2" type="revolute"><origin xyz="0 0 0.4"/><parent link="a"/><child link="b"/><axis xyz="0 1 0"/>
<limit lower="-2" upper="2" effort="10" velocity="2"/></joint></robot>"""


def test_a_users_urdf_without_its_meshes_is_checked_and_run(tmp_path, capsys):
    (tmp_path / "two.urdf").write_text(URDF)
    assert main(["check", str(tmp_path / "two.urdf")]) == 0
    assert "2 joints, 3.00 kg" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(
        f"robot: {tmp_path / 'two.urdf'}\nrule: mppi\ntask: {{posture: {{weight: 1.0}}}}\n"
        "goal: {kind: joints, position: [0.3, -0.3]}\nplanner: {samples: 32, sigma: 3.0}\nduration: 0.2\n"
    )
    command = ["run", str(tmp_path / "mine.yaml"), "--lockstep", "--out", str(tmp_path / "run"), "--record.no-video"]
    assert main(command) == 0


def test_check_says_what_fails(tmp_path, capsys):
    assert main(["check", "panda", scenario(tmp_path, robot="pander")]) == 2
    output = capsys.readouterr().out
    assert "ok    panda" in output and "pander" in output


def test_bench_prints_json_and_nothing_else(tmp_path):
    result = mbctrl("bench", "planner", "--quick", "--json", cwd=tmp_path)
    rows = json.loads(result.stdout)
    assert result.returncode == 0 and all(set(row) == {"name", "value", "unit", "bar", "op"} for row in rows)


def test_every_bench_loads(tmp_path):
    code = """
import importlib.util, pathlib, sys, mbctrl
folder = pathlib.Path(mbctrl.__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(folder))
for path in sorted(folder.glob("*.py")):
    if not path.stem.startswith("_"):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert callable(module.rows), path
        print(path.stem)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "dmc" in result.stdout.split(), result.stderr


def test_unknown_bench(capsys):
    assert main(["bench", "mainjo"]) == 2
    assert "mainjob" in capsys.readouterr().err
