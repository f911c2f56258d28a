"""``mbctrl train`` and ``mbctrl evaluate`` as a user meets them: recipes and logs in, files and one-line errors out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peg import DT, peg, plays
from test_transitions import write_run

from mbctrl.base.errors import SpecError
from mbctrl.cli.main import main
from mbctrl.dynamics.residual import load_residual
from mbctrl.learning.recipe import load_learning_recipe
from mbctrl.learning.transitions import write_transitions

RECIPE = """\
# A peg on a spring.
robot: peg.xml
dt: 0.02               # [s]
integrator: leapfrog
surfaces: [{name: floor, shape: plane, position: [0, 0, 0]}]
near: 0.005
far: 0.02
network: {members: 2, hidden: [24, 24]}
training: {epochs: 15, batch: 128}
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a robot, a recipe and logs, which is the current one."""
    monkeypatch.chdir(tmp_path)
    model = peg(tmp_path)
    (tmp_path / "peg_learn.yaml").write_text(RECIPE)
    write_transitions(tmp_path / "monday.parquet", plays(model, 8, 3.0))
    write_transitions(tmp_path / "tuesday.parquet", plays(model, 3, 3.0, seed=50))
    return tmp_path


def test_logs_become_a_model_and_a_report(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "peg_learn.yaml", "monday.parquet", "-o", "out/gated.npz"]) == 0
    said = capsys.readouterr().out
    assert "1200 transitions" in said and "wrote out/gated.npz" in said and "tool error in open loop [mm]" in said
    (here / "full_learn.yaml").write_text(re.sub(r"surfaces.*\n", "base: identity\n", RECIPE))
    assert main(["train", "full_learn.yaml", "monday.parquet", "--out", "full.npz"]) == 0
    words = ["out/gated.npz", "tuesday.parquet", "--beside", "full.npz", "--robot", "peg.xml", "-o", "judged"]
    capsys.readouterr()
    assert main(["evaluate", *words]) == 0
    said = capsys.readouterr().out
    assert (
        "90 % intervals hold" in said
        and "90 % intervals 25 steps ahead (tsinf) hold [%] of speeds and tool: free " in said
        and "wrote judged/report.html" in said
    )
    page = (here / "judged" / "report.html").read_text()
    for text in (
        "Evaluation of gated.npz",
        "full.npz",
        "analytic",
        "in contact",
        "tuesday.parquet",
        "Many steps ahead",
        "as gated.npz expects (tsinf)",
        "Gate",
        "floor",
        "mbctrl evaluate",
    ):
        assert text in page
    assert page.count("<svg") == 3 and "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S).lower()
    assert "$\\mathdefault" not in page


def test_the_same_logs_and_recipe_give_the_same_numbers(here: Path) -> None:
    for name in ("one.npz", "two.npz"):
        assert main(["train", "peg_learn.yaml", "monday.parquet", "-o", name]) == 0
    with np.load("one.npz") as one, np.load("two.npz") as two:
        assert all(np.array_equal(one[key], two[key]) for key in one.files)


def test_a_crash_in_training_keeps_the_last_good_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbctrl.learning.fit import _Search

    assert main(["train", "peg_learn.yaml", "monday.parquet", "-o", "model.npz"]) == 0
    good, usual, calls = (here / "model.npz").read_bytes(), _Search._train, []

    def stumble(self: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("out of memory")
        return usual(self, *rest)

    monkeypatch.setattr(_Search, "_train", stumble)
    with pytest.raises(MemoryError):
        main(["train", "peg_learn.yaml", "tuesday.parquet", "-o", "model.npz"])
    assert len(calls) == 4 and (here / "model.npz").read_bytes() == good
    arm = peg(here)
    assert load_residual("model.npz", arm.robot, arm.tree).members == 2
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "peg_learn.yaml", "-o", "x.npz"], "command line: LOG: expected at least one log"),
        (["train", "peg_learn.yaml", "nowhere.parquet", "-o", "x.npz"], "nowhere.parquet: is no file of transitions"),
        (["train", "peg_learn.yaml", "monday.parquet", "-o", "x.pt"], "--out: expected a name that ends in .npz"),
        (["train", "nowhere_learn", "monday.parquet"], "unknown recipe 'nowhere_learn'.*panda_full_learn"),
        (["train", "peg_learn.yaml", "arm2.csv"], "arm2.csv: robot: expected peg, found arm2"),
        (["train", "peg_learn.yaml", "bad.parquet"], "bad.parquet: row 13: next_v_z is nan"),
        (["train", "peg_learn.yaml", "other.parquet"], "other.parquet: joints: expected .'z',., found .'y',."),
        (["train", "slow_learn.yaml", "monday.parquet"], "monday.parquet: dt: expected 0.04, found 0.02"),
        (["train", "typo_learn.yaml", "monday.parquet"], "typo_learn.yaml: surface: unknown key; did you mean 'surfaces'"),
        (["train", "high_learn.yaml", "monday.parquet"], "training: expected at least 10 transitions where the gate is above 0"),
        (["train", "tip_learn.yaml", "monday.parquet"], "tip_learn.yaml: contact.tip: the model has no site or body 'tipp'.*'tip'"),
        (["train", "lost_learn.yaml", "monday.parquet"], "lost_learn.yaml: surfaces.floor.frame: .* no site or body 'flor'"),
        (["train", "peg_learn.yaml", "short.parquet"], "short.parquet: expected at least 3 episodes"),
        (["evaluate", "monday.parquet", "tuesday.parquet"], "monday.parquet: is no learned model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(here: Path, capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    some = plays(peg(here), 2, 1.0)
    bad = some.x_next.copy()
    bad[12, 1] = np.nan
    write_transitions("bad.parquet", replace(some, x_next=bad))
    write_transitions("short.parquet", some)
    write_transitions("other.parquet", replace(some, source=replace(some.source, joints=("y",), driven=("y",))))
    write_run(here / "arm2.csv")
    (here / "slow_learn.yaml").write_text(RECIPE.replace("dt: 0.02", "dt: 0.04"))
    (here / "typo_learn.yaml").write_text(RECIPE.replace("surfaces:", "surface:"))
    (here / "high_learn.yaml").write_text(RECIPE.replace("[0, 0, 0]", "[0, 0, -5]"))
    contact = "contact: {tip: tipp, radius: 0.01, surface: floor, stiffness: 0.0, damping: 0.0, friction: 0.0}\n"
    (here / "tip_learn.yaml").write_text(RECIPE + contact)
    (here / "lost_learn.yaml").write_text(RECIPE.replace("name: floor,", "name: floor, frame: flor,"))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.strip().splitlines()) == 1
    assert not list(here.glob("x.*"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("surfaces: [{name: floor, shape: plane, position: [0, 0, 0]}]", "", "surfaces: expected at least one"),
        ("integrator: leapfrog", "base: identity", "surfaces: a model without physics has no gate"),
        ("near: 0.005", "near: 0.02", "near: 0.02 is not below far"),
        ("members: 2", "members: 0", "network.members"),
        ("epochs: 15", "epochs: 15, validation: 0.6", "training.validation"),
        ("hidden: [24, 24]", "hidden: [2000]", "network.hidden"),
        ("dt: 0.02", "dt: -1", "dt"),
    ],
)
def test_recipes_that_make_no_sense_are_refused_by_key(here: Path, old: str, new: str, message: str) -> None:
    (here / "wrong_learn.yaml").write_text(RECIPE.replace(old, new))
    with pytest.raises(SpecError, match=message) as caught:
        load_learning_recipe("wrong_learn.yaml")
    assert "wrong_learn.yaml" in str(caught.value)


def test_recipes_are_listed_shown_and_checked(capsys: pytest.CaptureFixture) -> None:
    assert main(["list"]) == 0 and "panda_full_learn" in capsys.readouterr().out
    assert main(["show", "panda_full_learn"]) == 0 and "base: identity" in capsys.readouterr().out
    assert main(["check", "panda_full_learn"]) == 0
    assert "learns all of it in steps of 40 ms, 3 networks of 96 × 96" in capsys.readouterr().out
    assert load_learning_recipe("panda_full_learn")[0].dt == 2 * DT


def test_help_teaches_by_example(capsys: pytest.CaptureFixture) -> None:
    for verb, example in (("train", "mbctrl train panda_full_learn runs/one/log.csv"), ("evaluate", "mbctrl evaluate full.npz")):
        with pytest.raises(SystemExit) as done:
            main([verb, "--help"])
        assert done.value.code == 0 and example in " ".join(capsys.readouterr().out.split())
