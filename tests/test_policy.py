"""Policies: what they see, what they learn, that they never make a search worse, and that they stand in for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import scipy.linalg
import torch

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import BundleError, SpecError
from mbctrl.base.plan import PlanRequest
from mbctrl.base.spec import validate
from mbctrl.cli.distil import Teacher
from mbctrl.cli.main import main
from mbctrl.dynamics.load import Model, load_model
from mbctrl.export.bundle import export_bundle, random_case
from mbctrl.export.planner import PlannerGraphs
from mbctrl.learning import imitate as imitation
from mbctrl.learning.fit import LearningError
from mbctrl.learning.imitate import imitate
from mbctrl.planning.arrays import host
from mbctrl.planning.chain import Chain
from mbctrl.planning.controller import MpcController
from mbctrl.planning.mpc import on_host
from mbctrl.planning.planner import Parameters
from mbctrl.planning.policy import Policy, load_policy
from mbctrl.runtime.bundle import load_bundle
from mbctrl.runtime.planner import build_planner, golden_error

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, Model] = {}
BALL = {"name": "ball", "shape": "sphere", "position": [0.5, 0.1, 0.6], "size": [0.08]}


def model_of(name: str) -> Model:
    return MODELS.setdefault(name, load_model(name))


def run_of(scenario: str, **changes: Any) -> tuple[RunConfig, Path]:
    config, file = load_run(scenario)
    data = merged(config.model_dump(), merged({"dynamics": {"threads": 1}}, changes))
    if "settings" in changes:
        data["settings"] = changes["settings"]
    return validate(RunConfig, data, file), file


def controller_of(scenario: str, **changes: Any) -> MpcController:
    config, file = run_of(scenario, **changes)
    return MpcController(config, model_of(config.robot.name), file)


def some_policy(controller: MpcController, seed: int = 0, size: float = 0.3) -> Policy:
    """Return a policy of random weights for a controller's plans."""
    rng, place = np.random.default_rng(seed), controller.place
    inputs, outputs = place.sees.size, place.knots.count * len(place.low)
    layers = tuple((rng.normal(0, size, (b, a)), rng.normal(0, size, b)) for a, b in ((inputs, 16), (16, outputs)))
    scales = {"input_mean": rng.normal(0, 0.1, inputs), "input_scale": rng.uniform(0.5, 2, inputs)}
    reach = (place.high - place.low).clip(max=10) / 4
    scales |= {"output_mean": np.zeros(outputs), "output_scale": np.tile(reach, place.knots.count)}
    return place.policy(layers=layers, activation="silu", **scales)


def asked(controller: MpcController, rng: np.random.Generator) -> tuple[np.ndarray, PlanRequest]:
    robot = controller.robot
    x = np.concatenate([np.asarray(robot.home) + rng.uniform(-0.3, 0.3, robot.nq), rng.normal(0, 0.3, robot.nq)])
    obstacles = tuple((np.asarray(obstacle.position, float), np.full(3, 0.1)) for obstacle in controller.config.obstacles)
    return x, PlanRequest(0.0, x, obstacles=obstacles)


# --- what is seen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["panda", "cartpole_pets", "arm2"])
def test_the_tool_is_where_mujoco_has_it(name: str) -> None:
    model = model_of(name)
    frame, data = model.tree.frames[model.robot.tool], mujoco.MjData(model.mj)
    rng = np.random.default_rng(1)
    for _ in range(5):
        q = np.asarray(model.robot.home) + rng.uniform(-1, 1, model.robot.nq)
        data.qpos[:] = q
        mujoco.mj_kinematics(model.mj, data)
        site = data.site(model.robot.tool)
        turn, at = Chain.to(model.tree, frame).pose(q - model.tree.reference)
        np.testing.assert_allclose(at, site.xpos, atol=1e-12)
        np.testing.assert_allclose(turn, site.xmat.reshape(3, 3), atol=1e-12)


@pytest.mark.parametrize("scenario", ["pendulum_online_sim", "cartpole_pets_sim", "panda_reach_sim", "panda_avoid_sim"])
def test_a_turn_more_looks_the_same_and_every_input_is_counted(scenario: str) -> None:
    controller = controller_of(scenario)
    x, request = asked(controller, np.random.default_rng(2))
    sees, parameters = controller.place.sees, on_host(controller.parameters(request, np.zeros(controller.robot.nu)))
    seen = sees(x, parameters)
    assert seen.shape == (sees.size,)
    turned = x.copy()
    turned[: controller.robot.nq][np.asarray(sees.revolute)] += 2 * np.pi
    np.testing.assert_allclose(sees(turned, parameters), seen, atol=1e-12)
    moved = x.copy()
    moved[0] += 0.1
    assert np.abs(sees(moved, parameters) - seen).max() > 0.05


# --- what is learnt ---------------------------------------------------------------------------------------------------


def test_a_policy_finds_a_linear_quadratic_regulators_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cart is told by its states and a Riccati equation's answers, with noise; what the policy does to a state is the gain."""
    monkeypatch.setattr(imitation, "EPOCHS", 60)
    controller = controller_of("cartpole_pets_sim", planner={"knots": 1, "horizon": 0.04})
    rng, place = np.random.default_rng(0), controller.place
    a, b = np.array([[0.0, 1.0], [0.0, -0.2]]), np.array([[0.0], [0.5]])
    riccati = scipy.linalg.solve_continuous_are(a, b, np.diag([10.0, 1.0]), np.eye(1) * 0.1)
    gain = (b.T @ riccati / 0.1)[0]
    given = np.zeros((3000, 4))
    given[:, [0, 2]] = rng.uniform(-1, 1, (3000, 2))
    still = Parameters(u_before=np.zeros(1), p_target=np.zeros((3, 1, 1)))
    rows = np.stack([place.sees(x, still) for x in given])
    labels = -given[:, [0, 2]] @ gain[:, None] + rng.normal(0, 0.5, (3000, 1))
    trained = imitate(rows, labels, 0)
    policy = place.policy(**trained.network)

    def slope(k: int) -> float:
        step = np.eye(4)[k] * 0.4
        return float((policy(step, still) - policy(-step, still))[0, 0] / 0.8)

    np.testing.assert_allclose([slope(0), slope(2)], -gain, rtol=0.05)
    variance = np.var(given[:, [0, 2]] @ gain) + 0.25
    assert trained.missed == pytest.approx(0.25 / variance, rel=0.15)  # the noise, and no more


def test_too_little_and_what_is_no_number_is_refused() -> None:
    with pytest.raises(LearningError, match="at least 60 plans to imitate, found 59"):
        imitate(np.zeros((59, 2)), np.zeros((59, 1)), 0)
    with pytest.raises(LearningError, match="not finite"):
        imitate(np.full((60, 2), np.nan), np.zeros((60, 1)), 0)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_holds_the_policy(tmp_path: Path) -> None:
    controller = controller_of("panda_avoid_sim", obstacles=[BALL])
    policy, path = some_policy(controller), tmp_path / "policy.npz"
    policy.save(path)
    again = load_policy(path, controller.place)
    x, request = asked(controller, np.random.default_rng(3))
    parameters = on_host(controller.parameters(request, np.zeros(7)))
    assert np.array_equal(again(x, parameters), policy(x, parameters))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"robot": "ur10e"}, "robot: expected panda, found ur10e"),
        ({"joints": [f"joint{k}" for k in (2, 1, 3, 4, 5, 6, 7)]}, "joints: expected .*joint1.*found .*joint2"),
        ({"format": 0}, "format: expected 1, found 0"),
        ({"references": False}, "references: expected True, found False"),
        ({"activation": "cube"}, "activation: expected one of tanh, silu, relu, found 'cube'"),
        ({"knots": {"count": 4}}, "knots: expected .*found {'count': 4}"),
        ({"goal": {"kind": "joints"}}, "goal: expected .*poses.*found {'kind': 'joints'}"),
        ({"w0": np.zeros((16, 3))}, "w0: expected"),
        ({"low": np.zeros(7)}, "low: expected"),
        ({"input_scale": np.zeros(33)}, "input_scale: expected 33 numbers, scales above 0"),
        ({"b1": np.full(21, np.nan)}, "b1: holds numbers that are not finite"),
        ({"w7": np.zeros((2, 2))}, "expected arrays"),
    ],
)
def test_another_policy_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    controller = controller_of("panda_reach_sim")
    path = tmp_path / "policy.npz"
    some_policy(controller).save(path)
    with np.load(path) as data:
        arrays = dict(data)
    about = json.loads(str(arrays.pop("about")))
    for key, value in changes.items():
        (arrays if isinstance(value, np.ndarray) else about)[key] = value
    np.savez(path, about=np.array(json.dumps(about)), **arrays)
    with pytest.raises(SpecError, match=re.escape(str(path)) + ": " + says):
        load_policy(path, controller.place)


def test_no_policy_and_a_missing_one_are_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"planner.policy: nowhere.npz: no such file"):
        controller_of("panda_reach_sim", planner={"policy": "nowhere.npz"})
    wrong = tmp_path / "wrong.npz"
    wrong.write_bytes(b"PK")
    with pytest.raises(SpecError, match="is no policy"):
        controller_of("panda_reach_sim", planner={"policy": str(wrong)})


# --- with a planner ---------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {"mppi": {"ess": 0.1}, "cem": {"elites": 6}, "icem": {"elites": 6, "keep": 3}}
RULES = ("mppi", "cem", "icem", "predictive_sampling", "random_shooting")


@pytest.mark.parametrize("backend", ["kernel", "torch"])
@pytest.mark.parametrize("rule", RULES)
def test_a_proposal_is_one_candidate_and_takes_one_draws_place(rule: str, backend: str) -> None:
    """So the cheapest candidate is never worse than the proposal, and never worse than without it but for that one draw."""
    changes = {"rule": rule, "settings": SETTINGS.get(rule, {}), "planner": {"samples": 32}, "dynamics": {"backend": backend}}
    controller = controller_of("pendulum_online_sim", **changes)
    planner, rng = controller.planner, np.random.default_rng(4)
    for seed in range(5):
        x, request = asked(controller, rng)
        with torch.inference_mode():
            state = planner.initial(controller._array(np.zeros(1)), seed=seed)
            parameters = controller.parameters(request, np.zeros(1))
            proposed = controller._array(rng.uniform(-2, 2, (15, 1, 1)))
            given = replace(parameters, proposal=proposed)
            x = controller._array(x)
            plain, costs = planner.search(state.belief, planner.fixed(state.belief, parameters), seed, 0, x, parameters)
            others, with_it = planner.search(state.belief, planner.fixed(state.belief, given), seed, 0, x, given)
            _, result = planner.iterate(state, x, given)
        plain, costs, others, with_it = (host(values) for values in (plain, costs, others, with_it))
        place = 0  # a mean comes after it
        np.testing.assert_allclose(others[:, :, place], host(proposed)[..., 0], rtol=1e-6)
        drawn = slice(1 + planner.rule.includes_mean, None)
        np.testing.assert_array_equal(plain[:, :, drawn], others[:, :, drawn])
        np.testing.assert_allclose(with_it[drawn], costs[drawn], rtol=1e-6)
        assert result.figures.best == pytest.approx(with_it.min()) and result.figures.best <= with_it[place]


def nothing_finite(search: Callable[..., Any]) -> Callable[..., Any]:
    def spoilt(*given: Any) -> Any:
        candidates, costs = search(*given)
        return candidates, costs * np.nan

    return spoilt


@pytest.mark.parametrize("scenario", ["panda_reach_sim", "pendulum_online_sim"])
def test_the_policy_is_followed_where_no_cost_is_finite_and_only_there(scenario: str) -> None:
    controller = controller_of(scenario, planner={"samples": 32})
    controller.policy = some_policy(controller)
    x, request = asked(controller, np.random.default_rng(5))
    good = controller.plan(request)
    assert good.info["fallback"] == 0 and good.x is not None
    controller.reset()
    controller.planner.search = nothing_finite(controller.planner.search)  # type: ignore[method-assign, assignment]  # a planted fault
    plan = controller.plan(request)
    parameters = on_host(controller.parameters(request, np.zeros(controller.robot.nu)))
    wanted = controller._spread @ controller.policy(x, parameters)
    np.testing.assert_allclose(plan.u, wanted.clip(*controller._bounds), atol=1e-12)
    assert plan.x is None and plan.info["fallback"] == 1 and plan.info["nonfinite"] == 32 and np.isinf(plan.info["best"])
    assert np.abs(plan.u - good.u).max() > 1e-3
    controller.policy = None
    assert controller.plan(request).info["fallback"] == 0


# --- exported ---------------------------------------------------------------------------------------------------------


def graphs_of(controller: MpcController) -> PlannerGraphs:
    """Return what exports a controller's policy, without exporting the rest."""
    graphs = object.__new__(PlannerGraphs)
    graphs.controller, graphs.shapes = controller, PlannerGraphs.shapes_of(controller)
    graphs.terms = [key for key, term in controller.task.terms.items() if term.weight > 0]
    return graphs


@pytest.mark.parametrize("scenario", ["panda_avoid_sim", "pendulum_online_sim"])
def test_the_policys_graph_is_the_policy(scenario: str) -> None:
    import onnxruntime

    changes: dict[str, Any] = {"dynamics": {"backend": "torch"}}
    if scenario == "panda_avoid_sim":
        changes["obstacles"] = [BALL]
    controller = controller_of(scenario, **changes)
    controller.policy = some_policy(controller)
    graphs = graphs_of(controller)
    session = onnxruntime.InferenceSession(graphs._policy().SerializeToString(), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    rng, worst, low, high = np.random.default_rng(6), 0.0, *controller._bounds
    for k in range(20):
        _, _, parameters, given = random_case(controller, graphs, rng, k)
        found = session.run(
            None, {name: value.reshape(-1) if value.ndim == 0 else value for name, value in given.items() if name in names}
        )[0]
        with torch.inference_mode():
            in_torch = controller.policy(torch.from_numpy(given["x"].copy()), parameters).numpy()
        in_numpy = controller.policy(given["x"].astype(float), on_host(parameters))
        for wanted in (in_torch, in_numpy):
            worst = max(worst, float((np.abs(found - wanted) / (high - low)).max()))
    assert worst <= 1e-5, worst


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an iCEM with a policy: kept and proposed candidates, joint goal, torques."""
    folder = tmp_path_factory.mktemp("policy")
    changes = {
        "rule": "icem",
        "settings": {"elites": 10, "keep": 6},
        "planner": {"samples": 96, "horizon": 0.15, "knots": 3, "iterations": 2},
    }
    controller = controller_of("pendulum_online_sim", **changes)
    some_policy(controller).save(folder / "policy.npz")
    config, file = run_of("pendulum_online_sim", **merged(changes, {"planner": {"policy": str(folder / "policy.npz")}}))
    export_bundle(config, model_of("pendulum"), folder / "bundle", file)
    return folder / "bundle"


@pytest.mark.parametrize("engine", ["kernel", "onnx"])
def test_a_bundle_brings_its_policy(engine: str, bundle: Path) -> None:
    loaded = load_bundle(bundle)
    assert loaded.config.planner.policy is None and "policy.onnx" in loaded.files  # no path of this machine
    mpc = build_planner(loaded, engine, threads=1)
    assert golden_error(loaded, mpc.planner) <= 1e-4
    x = np.array([0.2, -0.3])
    request = PlanRequest(0.0, x)
    plan = mpc.plan(request)
    assert plan.info["fallback"] == 0 and np.isfinite(plan.u).all()
    iterate = mpc.planner.iterate

    def diverged(*given: Any) -> Any:
        state, result = iterate(*given)
        return state, replace(result, figures=result.figures._replace(best=np.inf))

    mpc.planner.iterate = diverged  # type: ignore[method-assign]  # a planted fault
    plan = mpc.plan(request)
    proposed = mpc.policy(x, mpc.parameters(request, np.zeros(1)))
    np.testing.assert_allclose(plan.u, (mpc._spread @ proposed).clip(*mpc._bounds), atol=1e-6)
    assert plan.info["fallback"] == 1 and plan.x is None


def test_another_policy_in_a_bundle_is_refused(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    changes = {"planner": {"horizon": 0.15, "knots": 3}, "dynamics": {"backend": "torch"}}
    controller = controller_of("pendulum_online_sim", **changes)
    controller.policy = some_policy(controller, seed=1)
    loaded.files["policy.onnx"] = graphs_of(controller)._policy().SerializeToString()
    with pytest.raises(BundleError, match="policy.onnx: its plans are"):
        build_planner(loaded, "kernel", threads=1)


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_the_policy_acts_and_the_planner_says_what_it_would_have_done() -> None:
    controller, apart = (controller_of("panda_reach_sim", planner={"samples": 32}) for _ in range(2))
    teacher = controller.planner = Teacher(controller.planner, controller.place)
    x, request = asked(controller, np.random.default_rng(7))
    wanted = apart.plan(request)
    np.testing.assert_allclose(controller.plan(request).u, wanted.u)  # nobody else acts yet
    controller.reset()
    teacher.policy = some_policy(controller)
    acted = controller.plan(request)
    parameters = on_host(controller.parameters(request, np.zeros(7)))
    low, high = controller._bounds
    np.testing.assert_allclose(acted.u, (controller._spread @ teacher.policy(x, parameters)).clip(low, high), atol=1e-6)
    assert len(teacher.labels) == 2
    for label in teacher.labels:  # told from where the joints are
        np.testing.assert_allclose((controller._spread @ (label.reshape(3, 7) + x[:7])).clip(low, high), wanted.u, atol=1e-6)


def test_distil_makes_a_policy_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(imitation, "EPOCHS", 10)
    few = ["--duration", "3.55", "--dynamics.threads", "1"]
    more = ["--trials", "2", "--episodes", "1", "-o", "policy.npz"]
    assert main(["distil", "pendulum_online_sim", *more, *few]) == 0
    said = capsys.readouterr().out
    assert "142 plans of 2 episodes" in said and re.search(r"planner 25, policy +-\d", said) and "policy  " in said
    out = ["--lockstep", "--record.no-video", "--record.no-plots", "--out", "run"]
    assert main(["run", "pendulum_online_sim", *few, *out, "--planner.policy", "policy.npz"]) == 0
    assert main(["run", "arm2_swingup_sim", *few, "--out", "other", "--planner.policy", "policy.npz"]) == 2
    assert "robot: expected arm2, found pendulum" in " ".join(capsys.readouterr().err.split())


def test_distil_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distil", "pendulum_online_sim", "-o", "policy.txt"]) == 2
    assert main(["distil", "pendulum_online_sim", "--trials", "0"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--out: expected a name that ends in .npz" in said and "--trials: expected at least 1, found 0" in said
