"""The loops of model-based reinforcement learning: random commands, trials, refits, rewards, and trainings that fail."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbctrl.base.config import RunConfig, load_run, merged, settled
from mbctrl.base.errors import SpecError
from mbctrl.base.logs import read_log
from mbctrl.base.plan import PlanRequest
from mbctrl.base.spec import dump_yaml, load_yaml, validate
from mbctrl.cli.episodes import rewards
from mbctrl.cli.loops import Loop, Trial
from mbctrl.cli.main import main
from mbctrl.cli.session import Session
from mbctrl.dynamics.load import load_model
from mbctrl.dynamics.residual import load_residual
from mbctrl.learning.explore import RandomCommands
from mbctrl.learning.fit import LearningError
from mbctrl.learning.loops import load_loop
from mbctrl.learning.transitions import read_transitions

pytestmark = pytest.mark.usefixtures("one_thread")


SMALL: dict[str, Any] = {"network": {"members": 2, "hidden": [16]}, "training": {"epochs": 15, "batch": 32, "validation": 0.4}}


def scenario(folder: Path, name: str = "pendulum_online_sim", duration: float = 2.05, **learn: Any) -> Path:
    """Write a scenario of the checkout with another loop, small, into ``folder``; return its file."""
    data = load_yaml(load_run(name)[1])
    data["duration"] = duration
    data["dynamics"] = {"threads": 1}
    data["learn"] = merged(data["learn"], {"random": 30, "model": {**SMALL, "episode": 0.3}, **learn})
    data["learn"] = {key: value for key, value in data["learn"].items() if value is not None}
    path = folder / "small.yaml"
    path.write_text(dump_yaml(data))
    return path


def loop_of(file: Path, folder: Path, seed: int = 0) -> Loop:
    config, path = load_run(str(file))
    config = config.model_copy(update={"seed": seed})
    return Loop(config, path, *load_loop(path, config), folder)


# --- the parts --------------------------------------------------------------------------------------------------------


def test_random_commands_fill_their_share_of_the_bounds_and_are_held() -> None:
    robot = load_model("cartpole_pets").robot
    made = RandomCommands(robot, 0.5, 0.08, 0.04, np.random.default_rng(3))
    again = RandomCommands(robot, 0.5, 0.08, 0.04, np.random.default_rng(3))
    plans = [made.plan(PlanRequest(0.04 * k, np.zeros(4))) for k in range(400)]
    rows = np.array([plan.command(plan.t0) for plan in plans])
    assert np.array_equal(rows, [again.plan(PlanRequest(0.04 * k, np.zeros(4))).u[0] for k in range(400)])
    assert np.array_equal(rows[::2], rows[1::2]) and (np.abs(np.diff(rows[::2], axis=0)) > 0).all()
    assert all(plan.seq == 0 and plan.end >= plan.t0 + 0.08 - 1e-9 for plan in plans)
    assert np.abs(rows).max() <= 150 and rows.min() < -135 and rows.max() > 135


def test_rewards_are_those_of_pets(tmp_path: Path) -> None:
    """By hand: exp(-(tip to goal)² / L²) - 0.01 a² at each state that a command leads to."""
    config, file = load_run("cartpole_pets_sim")
    config = config.model_copy(update={"duration": 1.64, "seed": 4})
    model = load_model("cartpole_pets")
    play = RandomCommands(model.robot, 1.0, 0.04, 0.04, np.random.default_rng(0))
    Session(config, file, lockstep=True, model=model, plan=play.plan).run(tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.csv")
    q, u = log["q"], log["u"][:-1, 0]
    assert len(q) == 41
    tip = np.stack([q[1:, 0] - 0.6 * np.sin(q[1:, 1]), -0.6 * np.cos(q[1:, 1])])
    expected = np.exp(-((tip - [[0.0], [0.6]]) ** 2).sum(0) / 0.36) - 0.01 * (u / 100) ** 2
    found = rewards(config, model, log, 1.0)
    print("reward", np.abs(found - expected).max())
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.ptp(expected) > 0.01


def test_rewards_take_joint_goals_and_mean_commands(tmp_path: Path) -> None:
    """arm2 is controlled 50 times a model step: what counts is the mean command, and the state at the step's end."""
    config, file = load_run("arm2_swingup_sim")
    config = validate(RunConfig, merged(config.model_dump(), {"duration": 0.401, "task": {"effort": {"weight": 0.5}}}), file)
    model = load_model("arm2")
    play = RandomCommands(model.robot, 0.3, 0.03, 0.05, np.random.default_rng(0))
    Session(config, file, lockstep=True, model=model, plan=play.plan).run(tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.csv")
    q, v, u = log["q"][50::50], log["v"][50::50], log["u"][:400].reshape(8, 50, 2).mean(1)
    error = q - [3.14159265, 0.0]
    over = [np.maximum(np.abs(q) - 4.2, 0).sum(1) / 0.3]
    cost = (2 * (1 - np.cos(error)) * [1.0, 0.3]).sum(1) + 0.02 * (v**2).sum(1) + 5 * over[0] ** 2
    cost = cost + 0.5 * ((u / [7.2, 1.9]) ** 2).sum(1)
    np.testing.assert_allclose(rewards(config, model, log, 2.0), 2.0 - cost, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loop": "twice"}, "learn.loop"),
        ({"every": None}, "learn: every: missing; is needed by loop online"),
        ({"loop": "once"}, "learn: every: is of loop online, found loop once"),
        ({"at": [30, 70]}, "learn: at: is of loop aggregate, found loop online"),
        ({"loop": "aggregate", "every": None, "at": [70, 30]}, r"at: expected increasing numbers of steps, found \[70, 30\]"),
        ({"trails": 3}, "learn.trails: unknown key; did you mean 'trials'"),
        ({"model": {"dt": 0.1}}, "learn.model.dt: the scenario says it already"),
        ({"model": {"network": {"members": 0}}}, "learn.model.network.members"),
        ({"model": {"base": "analytic"}}, "learn.model: surfaces: expected at least one"),
        ({"risk": {"kind": "cvar"}}, "learn.risk: share: missing"),
    ],
)
def test_a_loop_that_makes_no_sense_is_refused_by_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = scenario(tmp_path, **change)
    config, path = load_run(str(file))
    with pytest.raises(SpecError, match=message) as caught:
        load_loop(path, config)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_a_scenario_that_does_not_learn_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["learn", "arm2_swingup_sim", "--out", str(tmp_path / "x")]) == 2
    assert "arm2_swingup_sim.yaml: learn: missing; this scenario does not say how it learns" in capsys.readouterr().err
    config, path = load_run("cartpole_pets_sim")
    slow = config.model_copy(update={"loop": config.loop.model_copy(update={"rate": 10.0})})
    with pytest.raises(SpecError, match=r"loop.rate: expected a plan each step of 0.04 s, found 10 Hz"):
        load_loop(path, slow)


def test_a_trial_has_a_target_of_its_own(tmp_path: Path) -> None:
    """Drawn by its seed from a box; the planner pursues the one that the trial is judged by."""
    config, file = load_run("panda_reach_pets_sim")
    low, high = config.goal.within.low, config.goal.within.high
    drawn = [settled(config.model_copy(update={"seed": seed})).goal for seed in range(40)]
    points = np.array([goal.targets[0].position for goal in drawn])
    assert ((points >= low) & (points <= high)).all() and (np.ptp(points, 0) > 0.8 * np.subtract(high, low)).all()
    assert all(goal.within is None for goal in drawn) and drawn[3] == settled(config.model_copy(update={"seed": 3})).goal
    one = {"dynamics": {"threads": 1}, "planner": {"samples": 32}, "record": {"plots": False, "video": False}, "duration": 0.5}
    few = {"random": 30, "trials": 2, "model": {**SMALL, "base": "identity", "episode": 0.2}}
    data = {**load_yaml(file), "learn": {**load_yaml(file)["learn"], **few}}
    path = tmp_path / "reach.yaml"
    path.write_text(dump_yaml(merged(data, one)))
    loop, pursued = loop_of(path, tmp_path / "out", seed=5), []

    def watched(request: PlanRequest) -> Any:
        if loop.controller is not None:
            pursued.append(loop.controller.parameters(request, np.zeros(7)).p_target[:, 0, 0])
        return Loop._plan(loop, request)

    loop._plan = watched
    trials = loop.run()
    for trial in trials[1:]:
        target = read_log(tmp_path / "out" / f"trial-{trial.number:02d}" / "log.csv")["target"]
        assert np.allclose(target, drawn[5 + trial.number].targets[0].position, atol=1e-6)
        assert np.allclose(pursued[0], target[0], atol=1e-6)
        pursued = pursued[len(pursued) // 2 :]
    assert len(trials) == 3


# --- the loops --------------------------------------------------------------------------------------------------------


def test_trials_aggregate_and_are_reproducible(tmp_path: Path) -> None:
    file = scenario(tmp_path, loop="aggregate", every=None, trials=2, risk={"kind": "mean"})
    first = loop_of(file, tmp_path / "one").run()
    assert [trial.number for trial in first] == [0, 1, 2]
    assert [trial.known for trial in first] == [0, 30, 70] and [len(trial.rewards) for trial in first] == [30, 40, 40]
    assert all(trial.reward == pytest.approx(trial.rewards.sum()) and np.isfinite(trial.rewards).all() for trial in first)
    kept = read_transitions(tmp_path / "one" / "transitions.parquet")
    assert len(kept) == 110 and len(np.unique(kept.episode)) == 3 and kept.source.dt == 0.05
    arm = load_model("pendulum")
    assert load_residual(tmp_path / "one" / "model.npz", arm.robot, arm.tree, 0.05).members == 2
    again = loop_of(file, tmp_path / "two").run()
    other = loop_of(file, tmp_path / "three", seed=1).run()
    assert [trial.reward for trial in again] == [trial.reward for trial in first] != [trial.reward for trial in other]


def test_once_learns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    trials = loop_of(scenario(tmp_path, loop="once", every=None, trials=2), tmp_path / "out").run()
    assert len(trials) == 3 and calls == [30] and [trial.training > 0 for trial in trials] == [False, True, False]


def test_aggregate_learns_before_the_trials_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    file = scenario(tmp_path, loop="aggregate", every=None, trials=4, at=[30, 100, 105, 150])
    trials = loop_of(file, tmp_path / "out").run()
    assert [trial.known for trial in trials] == [0, 30, 70, 110, 150] and calls == [30, 110, 150]
    assert [trial.training > 0 for trial in trials] == [False, True, False, True, True]


def test_a_task_of_dm_control_is_planned_with_what_was_learned_and_not_through_the_simulator(tmp_path: Path) -> None:
    """Its random steps outlast the task's own time limit of 20 s; a step over its reset would be one the robot cannot make."""
    file = scenario(tmp_path, "pendulum_swingup_sim", 0.42, at=None, trials=1, random=600)
    assert load_run(str(file))[0].dynamics.backend == "mujoco"
    loop = loop_of(file, tmp_path / "out")
    trials = loop.run()
    assert [trial.known for trial in trials] == [0, 600] and loop.controller.backend.name == "kernel"
    known = read_transitions(tmp_path / "out" / "transitions.parquet")
    moved = known.x_next[:, 0] - known.x[:, 0]
    np.testing.assert_allclose(moved, 0.02 * (known.x_next[:, 1] + known.x[:, 1]), atol=0.02)


def test_online_learns_while_the_trial_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 10 steps after the first 30: the loop never stops, and each model's planner goes on from the one before."""
    calls = counted(monkeypatch)
    loop, seen = loop_of(scenario(tmp_path, every=10, trials=1, duration=3.05), tmp_path / "out"), []
    plan = loop._plan

    def watched(request: PlanRequest) -> Any:
        made = plan(request)
        seen.append((made.seq, loop.controller))
        return made

    monkeypatch.setattr(loop, "_plan", watched)
    (trial,) = loop.run()
    assert calls == [29, 39, 49, 59] and trial.failures == 0 and len(trial.rewards) == 60
    assert [seq for seq, _ in seen] == [0] * 30 + list(range(1, 32))
    assert len({id(controller) for _, controller in seen[30:]}) == 4 and all(controller is None for _, controller in seen[:30])
    log = read_log(tmp_path / "out" / "trial-01" / "log.csv")
    assert len(log.data) == 61 and np.allclose(np.diff(log["t"]), 0.05) and not log["holding"].any()


def wipe(folder: Path, **changes: Any) -> Path:
    """Write the wiping scenario, small, into ``folder``; return its file."""
    data = load_yaml(load_run("panda_wipe_sim")[1])
    small = {
        "duration": 4.0,
        "planner": {"samples": 64},
        "dynamics": {"threads": 1},
        "goal": {"delay": 1.0},
        "learn": {"trials": 3},
    }
    path = folder / "wipe.yaml"
    path.write_text(dump_yaml(merged(merged(data, small), changes)))
    return path


def test_a_contact_is_learned_by_touching_it(tmp_path: Path) -> None:
    """Nobody says what the table does: physics alone comes down and barely touches; what that taught presses harder, and so on."""
    loop = loop_of(wipe(tmp_path), tmp_path / "out")
    first = loop.controller
    assert first.config.dynamics.residual is None and first.config.dynamics.contact.stiffness == 0
    trials = loop.run()
    assert [trial.number for trial in trials] == [1, 2, 3] and [trial.known for trial in trials] == [0, 198, 396]
    assert loop.controller is not first and not any(trial.failures for trial in trials)
    logs = [read_log(tmp_path / "out" / f"trial-{number:02d}" / "log.csv") for number in (1, 2, 3)]
    off = [float(np.abs(log["contact.force"][log["t"] > 3] - 15).mean()) for log in logs]
    print("off the force wanted [N]", off, [trial.reward for trial in trials])
    assert off[0] > 8 and off[2] < 0.5 * off[0]


@pytest.mark.parametrize(
    ("learn", "message"),
    [
        ({"loop": "once"}, "learn.random: expected some steps, where there is nothing else to learn from, found 0"),
        ({"model": {"base": "identity"}}, "learn.random: expected some steps"),
        ({"model": "panda_push_learn"}, "learn.model: panda_push_learn: expected robot .*panda_wipe.*found .*panda_push"),
        ({"model": "nowhere_learn"}, "nowhere_learn"),
        ({"random": -1}, "learn.random"),
    ],
)
def test_loops_with_nothing_to_begin_with_are_refused(tmp_path: Path, learn: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        loop_of(wipe(tmp_path, learn=learn), tmp_path / "out")
    assert "\n" not in str(caught.value)


def counted(monkeypatch: pytest.MonkeyPatch, fail: tuple[int, ...] = ()) -> list[int]:
    """Note how many transitions each training had; let those numbered in ``fail`` fail half way."""
    from mbctrl.learning.fit import _Search

    calls: list[int] = []
    usual, train = Loop._fit, _Search._train

    def noted(self: Loop, every: Any) -> None:
        calls.append(len(every))
        usual(self, every)

    def stumble(self: Any, *rest: Any) -> Any:
        if len(calls) in fail:
            raise LearningError("the loss is no number any more after epoch 3; a smaller learning_rate may help")
        return train(self, *rest)

    monkeypatch.setattr(Loop, "_fit", noted)
    monkeypatch.setattr(_Search, "_train", stumble)
    return calls


def test_a_training_that_fails_leaves_the_last_good_model_in_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, fail=(2, 3))
    loop = loop_of(scenario(tmp_path, every=10, trials=1, duration=3.05), tmp_path / "out")
    models, learn = [], loop.learn

    def watched(more: Any = None) -> None:
        learn(more)
        models.append((loop.path.read_bytes(), loop.controller))

    monkeypatch.setattr(loop, "learn", watched)
    (trial,) = loop.run()
    assert len(calls) == 4 and trial.failures == 2 and len(trial.rewards) == 60
    assert models[0] == models[1] == models[2] and models[3][0] != models[0][0] and models[3][1] is not models[0][1]


def test_a_first_training_that_fails_ends_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch, fail=(1,))
    loop = loop_of(scenario(tmp_path, loop="aggregate", every=None), tmp_path / "out")
    with pytest.raises(LearningError, match="no number any more"):
        loop.run()
    assert len(read_transitions(tmp_path / "out" / "transitions.parquet")) == 30 and not loop.path.exists()


def test_the_verb_leaves_a_model_data_a_figure_and_one_screen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = scenario(tmp_path, loop="aggregate", every=None, trials=2)
    out = tmp_path / "out"
    assert main(["learn", str(file), "--out", str(out), "--seed", "2", "--planner.samples", "24"]) == 0
    said = capsys.readouterr().out
    assert "small, seed 2" in said and "random commands: return" in said
    assert re.search(r"2 +70 +-?\d+\.\d", said) and f"wrote {out}" in said.replace("\n", "")
    assert {path.name for path in out.iterdir()} == {
        "model.npz",
        "transitions.parquet",
        "learning.png",
        "trial-00",
        "trial-01",
        "trial-02",
    }
    assert (out / "learning.png").read_bytes()[:4] == b"\x89PNG"
    assert "samples: 24" in (out / "trial-02" / "config.yaml").read_text()
    assert main(["learn", str(file), "--out", str(out)]) == 2 and "exists already" in capsys.readouterr().err
    run = ["run", str(file), "--lockstep", "--dynamics.residual", str(out / "model.npz"), "--out", str(tmp_path / "run")]
    assert main([*run, "--record.no-video", "--record.no-plots", "--planner.risk.kind", "worst"]) == 0


def test_trials_say_what_failed() -> None:
    from mbctrl.cli.loops import _line

    assert (
        _line(Trial(3, 10, 5.25, np.zeros(2), 0.1, 1.0, 2)) == "trial 3: return 5.2, 2 trainings failed: the last good model stayed"
    )
    assert _line(Trial(0, 0, -1.0, np.zeros(2), 0.0, 0.0, 0)) == "random commands: return -1.0"


@pytest.mark.skipif(not os.environ.get("MBCTRL_SLOW"), reason="minutes; MBCTRL_SLOW asks for it, mbctrl bench pets shows it")
@pytest.mark.parametrize("encode", [True, False])
def test_a_pendulum_learned_online_stays_up_where_angles_are_encoded(tmp_path: Path, encode: bool) -> None:
    """100 random steps, refit every 50, 100 samples over 15 steps; the last 100 of 500 steps count."""
    config, file = load_run("pendulum_online_sim")
    assert config.planner.samples == 100 and round(config.planner.horizon / config.dynamics.dt) == 15
    held = 0
    for seed in range(3):
        run = config.model_copy(update={"seed": seed})
        spec, recipe = load_loop(file, run)
        assert (spec.random, spec.every, spec.trials) == (100, 50, 1)
        network = recipe.network.model_copy(update={"encode_angles": encode})
        recipe = recipe.model_copy(update={"network": network})
        out = tmp_path / f"{seed}"
        Loop(run, file, spec, recipe, out).run()
        log = read_log(out / "trial-01" / "log.csv")
        assert len(log.data) == 501
        held += bool((np.abs(log["q"][-100:, 0] % (2 * np.pi) - np.pi) < 0.3).all())
    assert held == 3 if encode else held < 3


@pytest.mark.skipif(not os.environ.get("MBCTRL_SLOW"), reason="minutes; MBCTRL_SLOW asks for it, mbctrl bench pets shows it")
@pytest.mark.parametrize(("name", "within"), [("panda_reach_pets_sim", 0.02), ("panda_push_pets_sim", 0.04)])
def test_seven_joints_are_learned_from_nothing(tmp_path: Path, name: str, within: float) -> None:
    """The tool, and the box, end near their targets in the last three trials."""
    loop_of(Path(load_run(name)[1]), tmp_path / "out", seed=7).run()
    for number in (6, 7, 8):
        error = read_log(tmp_path / "out" / f"trial-{number:02d}" / "log.csv")["error.position"]
        assert np.median(error[-1000:]) < within < error[0]
