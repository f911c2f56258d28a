"""``mbctrl check BUNDLE`` and what the verbs around a bundle say to wrong input: one line, exit code 2, nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.find import find
from mbctrl.base.spec import validate
from mbctrl.cli.build import load_run_model
from mbctrl.cli.deploy import _here
from mbctrl.cli.main import main
from mbctrl.export.bundle import export_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, file = load_run("arm2_swingup_sim")
    small = {"planner": {"samples": 64, "horizon": 0.2}, "dynamics": {"threads": 1}}
    config = validate(RunConfig, {**merged(config.model_dump(), small), "settings": config.settings}, file)
    folder = tmp_path_factory.mktemp("bundle") / "arm2"
    export_bundle(config, load_run_model(config, file), folder, file)
    return folder


def one_screen(text: str) -> str:
    assert text.count("\n") <= 24, text
    return " ".join(text.replace("│", " ").split())


def test_a_whole_bundle(bundle: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", str(bundle)]) == 0
    said = one_screen(capsys.readouterr().out)
    for part in ("64 samples", "all as their SHA-256 says", "arm2, 2 joints; matches robots/arm2", "kernel golden vectors to"):
        assert part in said, said
    assert "onnx, cpu golden vectors to" in said and "one iteration" in said
    assert main(["check", str(bundle / "manifest.json")]) == 0


def test_another_robot_of_the_same_name(bundle: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    theirs = tmp_path / "robots" / "arm2"
    shutil.copytree(find("robots", "arm2").parent, theirs)
    data = yaml.safe_load((theirs / "robot.yaml").read_text())
    data["limits"]["velocity"] = [1.5, 1.5]
    (theirs / "robot.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.setenv("MBCTRL_PATH", str(tmp_path))
    assert main(["check", str(bundle)]) == 0
    said = one_screen(capsys.readouterr().out)
    assert "differs from robots/arm2" in said and "limits.velocity" in said and "1.5" in said


@pytest.mark.parametrize("name", ["iter.onnx", "golden.npz", "manifest.json", "robot.yaml"])
def test_a_damaged_bundle(name: str, bundle: Path, tmp_path: Path, capsys) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 4
    (copy / name).write_bytes(data)
    assert main(["check", str(copy)]) == 2
    said = capsys.readouterr().out
    assert said.startswith("error") and said.count("\n") == 1 and name in said


def checked_without(bundle: Path, *modules: str) -> subprocess.CompletedProcess:
    """Check in a process that cannot import ``modules``; not by None in sys.modules, which tyro takes for a torch that is there."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocked())
from mbctrl.cli.main import main
sys.exit(main(["check", {str(bundle)!r}]))
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_it_needs_no_torch_and_no_mujoco(bundle: Path) -> None:
    names = ("torch", "mujoco", "scipy", "pinocchio", "onnx", "onnxscript", "dm_control", "matplotlib", "pandas", "cvxpy")
    done = checked_without(bundle, *names)
    assert done.returncode == 0 and done.stdout.count("golden vectors to") == 2, done.stdout + done.stderr
    assert not done.stderr, done.stderr


def test_without_onnxruntime_and_llvmlite_it_says_so(bundle: Path) -> None:
    done = checked_without(bundle, "onnxruntime", "llvmlite")
    assert done.returncode == 0 and done.stdout.count('"mbctrl[deploy]"') == 2, done.stdout + done.stderr


WRONG = {
    "no bundle": (["deploy", "nowhere"], ["nowhere", "mbctrl export"]),
    "a file": (["deploy", "BUNDLE/robot.yaml"], ["robot.yaml", "no such folder"]),
    "a driver nobody knows": (["deploy", "BUNDLE", "--driver", "lynk"], ["--driver", "link"]),
    "a driver that is not there": (["deploy", "BUNDLE", "--driver", "nomodule.x:Y"], ["--driver", "nomodule"]),
    "an option without a value": (["deploy", "BUNDLE", "--option", "speed"], ["--option", "KEY=VALUE"]),
    "an option the driver lacks": (
        ["deploy", "BUNDLE", "--driver", "link", "--option", "timout=3"],
        ["--option", "timout", "did you mean 'timeout'"],
    ),
    "a folder that exists": (["deploy", "BUNDLE", "--out", "BUNDLE"], ["exists already"]),
    "a negative duration": (["deploy", "BUNDLE", "--duration", "-2"], ["duration", "-2"]),
    "negative threads": (["deploy", "BUNDLE", "--threads", "-2"], ["--threads", "-2"]),
    "a provider of the kernel": (["deploy", "BUNDLE", "--provider", "cuda"], ["--provider", "--engine onnx"]),
    "another robot": (["deploy", "BUNDLE", "--robot", "panda"], ["robot.name", "arm2", "panda"]),
    "no such goal": (["deploy", "BUNDLE", "--goal", "goal.yaml"], ["goal.yaml", "No such file"]),
    "a robot far away": (["deploy", "BUNDLE", "--driver", "link", "--host", "192.0.2.1"], ["--yes"]),
    "nobody to be asked": (["deploy", "BUNDLE", "--driver", "mbctrl.drivers.link:LinkDriver"], ["--yes"]),
    "nobody listens": (["deploy", "BUNDLE", "--driver", "link", "--host", "127.0.3.77", "--option", "timeout=0.3"], ["127.0.3.77"]),
    "no such log": (["replay", "nowhere.mcap"], ["nowhere.mcap", "No such file"]),
    "a folder for a log": (["replay", "BUNDLE"], ["arm2", "directory"]),
    "no log": (["replay", "BUNDLE/robot.yaml"], ["not an MCAP file"]),
    "a fault nobody knows": (["sim", "arm2", "--fault", "frozzle@3"], ["frozzle", "freeze"]),
    "a fault without a time": (["sim", "arm2", "--fault", "freeze"], ["KIND[=VALUE]@START"]),
    "a fault that ends first": (["sim", "arm2", "--fault", "freeze@5:2"], ["5:2"]),
    "a simulation of less than no time": (["sim", "arm2", "--duration", "-1"], ["--duration", "-1"]),
    "noise below nothing": (["sim", "arm2", "--start-noise", "-1"], ["--start-noise"]),
    "an open port": (["sim", "arm2", "--host", "0.0.0.0"], ["loopback", "--key-file"]),
    "a key for another protocol": (["sim", "arm2", "--protocol", "ur", "--key-file", "k"], ["key_file", "ur"]),
    "an export of nothing": (["export", "nobody"], ["nobody", "panda_reach_sim"]),
    "an export onto something": (["export", "panda_reach_sim", "-o", "BUNDLE"], ["exists already"]),
    "an export to where nothing can be": (
        ["export", "arm2_swingup_sim", "-o", "/proc/nothing/new"],
        ["/proc/nothing/new", "cannot be written"],
    ),
    "a planner without a graph": (["export", "arm2_swingup_sim", "--planner.noise", "sobol", "-o", "new"], ["planner.noise"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(case: str, bundle: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    arguments, words = WRONG[case]
    monkeypatch.chdir(tmp_path)
    assert main([part.replace("BUNDLE", str(bundle)) for part in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    left = [path for path in tmp_path.rglob("*") if path.name not in ("runs", "bundles")]
    assert not left, left


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys) -> None:
    assert main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "without manifest.json" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.0.3.9:47470", True),
        ("localhost", True),
        ("localhost:5", True),
        ("::1", True),
        ("192.168.1.20", False),
        ("robot.local", False),
        ("0.0.0.0", False),
    ],
)
def test_what_is_this_machine(host: str, here: bool) -> None:
    assert _here(host) is here
