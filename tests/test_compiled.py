"""Compiled planning: the kernels' rollouts, candidates, costs and plans are torch's, at every size, for every term."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_models import model_of, random_states
from torch import Tensor

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import ModelError, SpecError
from mbctrl.base.plan import PlanRequest
from mbctrl.base.spec import validate
from mbctrl.dynamics.actuation import Impedance
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.kernels import native
from mbctrl.kernels.llvm import words
from mbctrl.kernels.native import Pool
from mbctrl.kernels.trace import Goal
from mbctrl.planning.compiled import kernel_dynamics, kernel_search
from mbctrl.planning.controller import MpcController
from mbctrl.planning.engines import CpuEngine
from mbctrl.planning.knots import Knots
from mbctrl.planning.noise import NOISES, Noise, Shape
from mbctrl.planning.objective import TorchSearch
from mbctrl.planning.planner import Parameters
from mbctrl.planning.rules.base import Distribution
from mbctrl.planning.search import KernelDynamics, KernelSearch
from mbctrl.tasks.features import Features, RobotScales
from mbctrl.tasks.terms import TERMS, Term

EDGES = (1, 7, 16, 17, 33, 250)
ROOT = Path(__file__).parents[1]
SHIPPED = [path.stem for path in sorted((ROOT / "launch").glob("*.yaml")) if load_run(path.stem)[0].dynamics.backend != "mujoco"]
DOWN = [3.14159265, 0.0, 0.0]


@pytest.fixture(autouse=True, scope="module")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One torch thread, and code that is compiled here and kept for this module only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBCTRL_CACHE", str(tmp_path_factory.mktemp("code")))
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(2)


# --- runs -------------------------------------------------------------------------------------------------------------


MODELS: dict[str, Model] = {}
JOINTS = {"kind": "joints", "position": [2.5, -0.4], "wrap": True}
ARM2 = {
    "robot": "arm2",
    "rule": "cem",
    "settings": {"elites": 8},
    "planner": {"samples": 50, "horizon": 0.4, "knots": 4, "sigma": [3.0, 1.0]},
    "dynamics": {"dt": 0.04, "threads": 2},
    "task": {"posture": {"weight": 1.0, "wrap": True}, "velocity": {"weight": 0.1}, "effort": {"weight": 0.01}},
    "goal": JOINTS,
    "duration": 1.0,
}
POSE = {"kind": "poses", "targets": [{"position": [0.5, 0.25, 0.4], "rpy": DOWN}]}
POINT = {"kind": "poses", "targets": [{"position": [0.5, 0.25, 0.4]}]}
EIGHT = {"kind": "figure_eight", "center": [0.48, 0.0, 0.42], "width": 0.36, "height": 0.16, "speed": 0.25}
PANDA = {
    "robot": "panda",
    "rule": "mppi",
    "settings": {"ess": 0.1},
    "planner": {"samples": 50, "horizon": 0.4, "knots": 4, "sigma": 0.2},
    "dynamics": {"dt": 0.04, "threads": 2},
    "task": {"reach": {"weight": 10.0}, "velocity": {"weight": 0.5}, "smoothness": {"weight": 0.2, "scale": 0.05}},
    "goal": POSE,
    "duration": 1.0,
}
TOUCH = {"tip": "panda_fingertip", "radius": 0.0065, "surface": "table_top", "stiffness": 2e4, "damping": 150.0, "friction": 0.5}
WIPE = {**PANDA, "robot": "panda_wipe", "dynamics": {"dt": 0.02, "threads": 2, "contact": TOUCH}}
PUSH = {
    **PANDA,
    "robot": "panda_push",
    "dynamics": {"dt": 0.02, "threads": 2, "contact": {**TOUCH, "surface": "box_face"}},
    "goal": {"kind": "object_pose", "frame": "box", "position": [0.46, 0.08, 0.03], "yaw": 0.5},
}
NEAR = {
    "sphere": {"name": "ball", "shape": "sphere", "position": [0.5, 0.1, 0.6], "size": [0.08], "to": [0.3, 0.2, 0.5]},
    "box": {"name": "box", "shape": "box", "position": [0.5, -0.1, 0.4], "size": [0.1, 0.2, 0.05]},
    "plane": {"name": "table", "shape": "plane", "position": [0.0, 0.0, 0.2], "normal": [0.6, 0.0, 0.8]},
}


def run_of(base: dict[str, Any], **changes: Any) -> RunConfig:
    """Return a run; ``planner`` and ``dynamics`` are laid over the base, the rest replaces it."""
    data = {**base, **changes}
    for part in ("planner", "dynamics"):
        data[part] = {**base[part], **changes.get(part, {})}
    return validate(RunConfig, data)


def controller(run: RunConfig, backend: str, file: Any = None) -> MpcController:
    if run.robot.name not in MODELS:
        MODELS[run.robot.name] = load_model(run.robot.name)
    run = RunConfig.model_validate(merged(run.model_dump(), {"dynamics": {"backend": backend}}))
    found = MpcController(run, MODELS[run.robot.name], file)
    assert backend == "auto" or found.backend.name == backend
    return found


def request_of(run: RunConfig, seed: int = 0, stamp: float = 0.3, latency: float = 0.02) -> PlanRequest:
    """Return a request from a moving state near home, obstacles on the move."""
    rng, robot = np.random.default_rng(seed), MODELS[run.robot.name].robot
    x = np.concatenate([robot.home + rng.uniform(-0.3, 0.3, robot.nq), rng.uniform(-1, 1, robot.nq)])
    return PlanRequest(stamp, x, obstacles=tuple(o.at(stamp + 0.7) for o in run.obstacles), latency=latency)


def searched(
    planner: MpcController, request: PlanRequest, seed: int = 5, draw: int = 2, given: int = 3, x: Any = None
) -> tuple[Tensor, Tensor]:
    """Return candidates and costs of one draw, ``given`` of them kept ones, some beyond the bounds."""
    robot, rng = planner.model.robot, np.random.default_rng(seed % 1000)
    array = planner.backend.array
    held = np.zeros(robot.nu) if robot.control.mode == "torque" else np.asarray(robot.home)[robot.command_index]
    count = planner.knots.count
    mean = held + 0.1 * rng.normal(size=(count, robot.nu))
    spread = np.asarray(planner.planner.sigma) * rng.uniform(0.5, 1, (count, robot.nu))
    fixed = mean[..., None] + rng.normal(size=(count, robot.nu, given)) * 3 * spread[..., None]
    parameters = planner.parameters(request, held + 0.05)
    belief, fixed, state = (
        Distribution(*map(array, (mean, spread, mean, fixed))),
        array(fixed),
        array(request.x if x is None else x),
    )
    with torch.inference_mode():
        found = planner.planner.search(belief, fixed, seed, draw, state, parameters)
    return torch.as_tensor(found[0]), torch.as_tensor(found[1])


def numpys(value: Any) -> Any:
    """Return a value with its tensors made numpy arrays."""
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, tuple):
        return tuple(map(numpys, value))
    if isinstance(value, (Distribution, Parameters)):
        return type(value)(**{field.name: numpys(getattr(value, field.name)) for field in fields(value)})
    return value


def cost_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error of a cost over itself, or over a thousandth of the largest where it is next to nothing."""
    a, b = found.double(), expected.double()
    return float(((a - b).abs() / (b.abs() + 1e-3 * b.abs().max())).max())


def assert_alike(run: RunConfig, what: str, seeds: tuple[int, ...] = (5, 2**32 + 77)) -> tuple[MpcController, MpcController]:
    """Hold a kernel's candidates and costs against torch's; return both controllers."""
    ours, theirs = controller(run, "kernel"), controller(run, "torch")
    for seed in seeds:
        request = request_of(run, seed)
        (candidates, costs), (same, expected) = (searched(c, request, seed) for c in (ours, theirs))
        assert candidates.shape == same.shape == (run.planner.knots, ours.model.robot.nu, run.planner.samples)
        least = max(1.0, 0.2 * same.abs().max().item())  # a small command of a wide draw carries the rounding of the large ones
        apart = ((candidates - same).abs() / same.abs().clamp(min=least)).max().item()
        error = cost_error(costs, expected)
        print("compare", what, seed, apart, error)
        assert torch.isfinite(expected).all() and expected.shape == costs.shape == (run.planner.samples,)
        assert expected.max() > 1e-6 and (len(expected) < 3 or expected.std() > 1e-5 * expected.max()), "the costs say nothing"
        assert apart <= 1e-6, apart
        assert error <= 1e-4, error
    return ours, theirs


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_scenario_costs_what_torch_says(name: str) -> None:
    run, _ = load_run(name)
    run = RunConfig.model_validate(merged(run.model_dump(), {"planner": {"samples": 100}, "dynamics": {"threads": 2}}))
    ours, _ = assert_alike(run, name)
    goals = len(ours.planner.search._kernels)
    for target in range(4):  # nothing is left to compile while it runs
        request = request_of(run)
        ours.plan(PlanRequest(request.stamp, request.x, obstacles=request.obstacles, goal=target, goal_time=0.5))
    assert goals >= 1 and len(ours.planner.search._kernels) == goals


ALONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reach": (PANDA, {"task": {"reach": {"weight": 2.0, "rotation_weight": 0.7}}}),
    "reach a point": (PANDA, {"task": {"reach": {"weight": 2.0}}, "goal": POINT}),
    "reach, any way": (PANDA, {"task": {"reach": {"weight": 2.0, "rotation_weight": 0.0}}}),
    "proximity": (PANDA, {"task": {"proximity": {"weight": 2.0, "scale": 0.3}}, "goal": POINT}),
    "track": (PANDA, {"task": {"track": {"weight": 2.0}}, "goal": {**EIGHT, "rpy": DOWN}}),
    "track a point": (PANDA, {"task": {"track": {"weight": 2.0, "terminal": 0.2}}, "goal": EIGHT}),
    "posture": (ARM2, {"task": {"posture": {"weight": 1.0}}}),
    "posture wrapped": (ARM2, {"task": {"posture": {"weight": 1.0, "wrap": True, "joint_weights": [2.0, 1.0]}}}),
    "posture given": (
        ARM2,
        {"task": {"posture": {"weight": 1.0, "reference": [0.3, -0.2], "joint_weights": [0.0, 1.0]}}, "goal": POINT},
    ),
    "posture at home": (ARM2, {"task": {"posture": {"weight": 1.0}}, "goal": POINT}),
    "velocity": (ARM2, {"task": {"velocity": {"weight": 1.0}}}),
    "velocity scaled": (ARM2, {"task": {"velocity": {"weight": 1.0, "scale": 0.4, "joint_weights": [0.5, 3.0]}}}),
    "effort": (ARM2, {"task": {"effort": {"weight": 1.0}}}),
    "effort of a servo": (PANDA, {"task": {"effort": {"weight": 1.0}}}),
    "smoothness": (ARM2, {"task": {"smoothness": {"weight": 1.0, "scale": 0.2}}}),
    "joint_limits": (PANDA, {"task": {"joint_limits": {"weight": 1.0, "margin": 0.3}}, "planner": {"sigma": 1.0}}),
    "velocity_limits": (ARM2, {"task": {"velocity_limits": {"weight": 1.0, "margin": 0.95}}}),
    "acceleration_limits": (PANDA, {"task": {"acceleration_limits": {"weight": 1.0, "margin": 0.9}}}),
    **{
        f"avoid a {shape}": (PANDA, {"task": {"avoid": {"weight": 2.0, "margin": 0.2, "buffer": 0.3}}, "obstacles": [NEAR[shape]]})
        for shape in NEAR
    },
    "contact_force": (
        WIPE,
        {"task": {"contact_force": {"weight": 1.0, "target": 15.0}}, "dynamics": {"contact": {**TOUCH, "radius": 0.4}}},
    ),
    "contact_gap": (WIPE, {"task": {"contact_gap": {"weight": 1.0}}}),
    "contact_approach": (WIPE, {"task": {"contact_approach": {"weight": 1.0, "terminal": 0.1, "speed": 0.02, "reach": 0.5}}}),
    "object_pose": (PUSH, {"task": {"object_pose": {"weight": 1.0, "rotation_weight": 0.7}}}),
    "height": (WIPE, {"task": {"height": {"weight": 1.0, "target": 0.3, "scale": 0.1}}}),
    "leapfrog": (ARM2, {"dynamics": {"integrator": "leapfrog"}}),
}


def test_every_term_and_shape_is_here() -> None:
    kinds = {kind for _, changes in ALONE.values() for kind in changes.get("task", {})}
    assert kinds == set(TERMS)


@pytest.mark.parametrize("what", ALONE)
def test_every_term_costs_what_torch_says(what: str) -> None:
    base, changes = ALONE[what]
    assert_alike(run_of(base, **changes), what)


EVERYTHING = {
    "reach": {"weight": 2.0, "terminal": 0.3},
    "track": {"weight": 0.001},
    "posture": {"weight": 0.5},
    "velocity": {"weight": 1.0, "terminal": 1.0},
    "effort": {"weight": 0.2},
    "smoothness": {"weight": 0.1, "scale": 0.1},
    "joint_limits": {"weight": 20.0, "margin": 0.5},
    "velocity_limits": {"weight": 20.0},
    "acceleration_limits": {"weight": 0.5},
    "avoid": {"weight": 3.0, "margin": 0.05, "buffer": 0.1},
    "off": {"kind": "posture", "weight": 0.0},
}


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_everything_at_once(discount: float) -> None:
    run = run_of(PANDA, task=EVERYTHING, obstacles=list(NEAR.values()), planner={"discount": discount})
    ours, _ = assert_alike(run, f"everything {discount}")
    assert list(ours.planner.search._kernels.values())[0].traced.terms == tuple(name for name in EVERYTHING if name != "off")


@pytest.mark.parametrize(("discount", "terminal"), [(1.0, 0.0), (0.8, 0.0), (1.0, 0.7), (0.8, 0.7)])
def test_discount_and_terminal_weights_count_as_in_torch(discount: float, terminal: float) -> None:
    task = {"posture": {"weight": 1.0, "terminal": terminal}, "velocity": {"weight": 0.3}}
    run = run_of(ARM2, task=task, planner={"discount": discount})
    ours, _ = assert_alike(run, "discount")
    plain = controller(run_of(ARM2, task={"posture": {"weight": 1.0}, "velocity": {"weight": 0.3}}), "kernel")
    request = request_of(run)
    changed = (searched(ours, request)[1] - searched(plain, request)[1]).abs().max()
    assert (changed > 1e-3) == ((discount, terminal) != (1.0, 0.0))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("interpolation", ["zero", "linear", "cubic"])
def test_every_noise_and_curve_is_torchs(noise: str, interpolation: str) -> None:
    assert_alike(
        run_of(ARM2, planner={"noise": noise, "interpolation": interpolation, "knots": 5, "beta": 2.5}), f"{noise} {interpolation}"
    )


@pytest.mark.parametrize("seed", [0, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 + 3])
def test_any_seed_draws_alike(seed: int) -> None:
    run = run_of(ARM2, seed=seed)
    request = request_of(run)
    (a, x), (b, y) = (searched(controller(run, backend), request, seed) for backend in ("kernel", "torch"))
    assert (a - b).abs().max() <= 1e-5 and cost_error(x, y) <= 1e-4


@pytest.mark.parametrize("given", [0, 1, 2, 15, 16, 17, 49, 50])
def test_candidates_that_are_given_take_the_first_places(given: int) -> None:
    run = run_of(ARM2)
    request = request_of(run)
    (a, x), (b, y) = (searched(controller(run, backend), request, given=given) for backend in ("kernel", "torch"))
    assert torch.equal(a[..., :given], b[..., :given]) and (a - b).abs().max() <= 1e-5 and cost_error(x, y) <= 1e-4


def test_an_arm_not_all_actuated_costs_what_torch_says() -> None:
    task = {"posture": {"weight": 1.0, "wrap": True}, "velocity": {"weight": 0.1, "scale": 1.0}, "effort": {"weight": 0.2}}
    goal = {"kind": "joints", "position": [0.3, 0.0]}
    run = run_of({**ARM2, "robot": "cartpole"}, task=task, goal=goal, planner={"sigma": 4.0})
    assert_alike(run, "cartpole")


def test_a_tree_with_sliding_joints_costs_what_torch_says(pool: Pool) -> None:
    """A tool on one branch, capsules on others, two of six joints commanded: pieces put together by hand."""
    from types import SimpleNamespace

    from mbctrl.base.scene import Obstacle
    from mbctrl.planning.objective import FeatureMap, RolloutObjective
    from mbctrl.tasks.task import build_task

    _, tree = model_of("crowded", friction=True)
    commanded = [5, 1]
    dynamics = RigidBodyDynamics(tree, 0.02, commanded=commanded, effort_limit=(3.0, 4.0))
    scales = RobotScales((0.0,) * 6, (-1.0,) * 6, (1.0,) * 6, (2.0,) * 6, (3.0, 4.0))
    terms = {
        "reach": {"weight": 1},
        "avoid": {"weight": 1, "margin": 0.3, "buffer": 0.3},
        "effort": {"weight": 1},
        "joint_limits": {"weight": 1},
    }
    task = build_task({**terms, "velocity": {"weight": 0.1}, "smoothness": {"weight": 0.1, "scale": 1.0}}, scales)
    obstacles = tuple(Obstacle.model_validate(NEAR[shape]) for shape in NEAR)
    features = FeatureMap(SimpleNamespace(tool="tip"), dynamics, obstacles)
    knots, noise = Knots(3, 12, 0.02, "linear", 0.5), Noise("white", Shape(3, 2, 40))
    bound = torch.tensor([3.0, 4.0])
    theirs = TorchSearch(RolloutObjective(dynamics, features, task, 0.95), knots, noise, -bound, bound)
    ours = kernel_search(
        dynamics,
        features.tool,
        task,
        knots,
        noise,
        samples=40,
        lower=-bound.numpy(),
        upper=bound.numpy(),
        engine=CpuEngine(pool),
        discount=0.95,
        obstacles=obstacles,
    )
    q, v, _ = random_states(tree, 1)
    x = torch.as_tensor(np.concatenate([q[0] / 3, v[0] / 3]), dtype=torch.float32)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    parameters = Parameters(
        u_before=torch.tensor([0.3, -0.2]),
        p_target=torch.linspace(0, 1, 36).view(3, 12, 1),
        r_target=turn[:, :, None, None].expand(3, 3, 12, 1),
        obstacles=tuple(torch.linspace(-0.5, 0.5 + k, 36).view(3, 12, 1) for k in range(3)),
    )
    mean = torch.zeros(3, 2)
    belief = Distribution(mean, mean + 1.5, mean, mean[..., None][..., :0])
    with torch.inference_mode():
        b, expected = theirs(belief, belief.kept, 7, 1, x, parameters)
    a, costs = map(torch.as_tensor, ours(*(numpys(part) for part in (belief, belief.kept, 7, 1, x, parameters))))
    error = cost_error(costs, expected)
    print("compare crowded", 7, (a - b).abs().max().item(), error)
    assert (a - b).abs().max() <= 1e-5 and error <= 1e-4


@pytest.mark.parametrize("noise", ["white", "sobol"])
def test_a_search_in_double_precision_is_torchs_or_refused(noise: str, pool: Pool) -> None:
    run = run_of(ARM2)
    theirs = controller(run, "torch")
    task, tool = theirs.planner.search.objective.task, theirs.features.tool
    analytic = theirs.analytic
    dynamics = RigidBodyDynamics(analytic.tree, analytic.dt, effort_limit=analytic.effort_limit, dtype=torch.float64)
    knots, drawn = Knots(4, 10, 0.04), Noise(noise, Shape(4, 2, 20), dtype=torch.float64)
    bound = torch.tensor([7.0, 2.0], dtype=torch.float64)
    try:
        ours = kernel_search(
            dynamics,
            tool,
            task,
            knots,
            drawn,
            samples=20,
            lower=-bound.numpy(),
            upper=bound.numpy(),
            engine=CpuEngine(pool, np.float64),
        )
        ours.kernel(Goal(joints=True))
    except (ValueError, TypeError, ModelError):
        return
    mean = torch.zeros(4, 2, dtype=torch.float64)
    belief = Distribution(mean, mean + 1, mean, mean[..., None][..., :0])
    parameters = Parameters(u_before=mean[0], q_target=mean[0] + 1)
    given = (belief, belief.kept, 5, 0, torch.zeros(4, dtype=torch.float64), parameters)
    candidates, costs = map(torch.as_tensor, ours(*map(numpys, given)))
    assert (candidates - drawn.draw(5, 0).clamp(-bound[None, :, None], bound[None, :, None])).abs().max() <= 1e-5
    assert torch.isfinite(costs).all()


# --- plans ------------------------------------------------------------------------------------------------------------


RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mppi": (PANDA, {}),
    "cem": (ARM2, {"planner": {"iterations": 3, "growth": 1.5}}),
    "icem": (ARM2, {"rule": "icem", "settings": {"elites": 10, "keep": 6}, "planner": {"noise": "coloured", "iterations": 2}}),
    "predictive_sampling": (ARM2, {"rule": "predictive_sampling", "settings": {}}),
    "halton": (ARM2, {"planner": {"noise": "halton"}}),
    "avoid": (PANDA, {"task": {**PANDA["task"], "avoid": {"weight": 100.0}}, "obstacles": [NEAR["sphere"]]}),
}


@pytest.mark.parametrize("name", RULES)
def test_plans_stay_together_over_replans(name: str) -> None:
    base, changes = RULES[name]
    run = run_of(base, **changes)
    both = [controller(run, backend) for backend in ("kernel", "torch")]
    for k in range(6):
        request = request_of(run, stamp=0.1 * k)
        ours, theirs = (c.plan(request) for c in both)
        scale = np.ptp(theirs.u, axis=0).max()
        error = np.abs(ours.u - theirs.u).max() / scale, np.abs(ours.x - theirs.x).max() / np.abs(theirs.x).max()
        print("plan", name, k, *error)
        assert scale > 1e-3 and max(error) <= 1e-3, error
        assert ours.info["best"] == pytest.approx(theirs.info["best"], rel=1e-3) and ours.info["nonfinite"] == 0
    if name == "icem":
        assert both[0]._state.belief.kept.shape[-1] == 6


def test_a_fan_and_a_prediction_are_torchs() -> None:
    run = run_of(PANDA)
    request = request_of(run)
    plans = []
    for backend in ("kernel", "torch"):
        planner = controller(run, backend)
        planner.plan(request)
        plans.append(planner.plan(PlanRequest(0.35, request.x, latency=0.033, fan=4)))
    assert plans[0].fan.shape == (4, 11, 3) and np.abs(plans[0].fan - plans[1].fan).max() <= 1e-4
    assert np.abs(plans[0].x - plans[1].x).max() <= 1e-3


# --- sizes, lanes and threads -----------------------------------------------------------------------------------------


class Guard:
    """An engine's ``empty`` whose arrays lie inside larger ones filled with a pattern."""

    def __init__(self) -> None:
        self.edges: list[np.ndarray] = []

    def empty(self, engine: CpuEngine, *shape: int) -> np.ndarray:
        """Return an array between two margins, full of NaN."""
        margin, dtype = 256, np.dtype(engine.dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        whole = np.full(size + 2 * margin, 0x5A, np.uint8)
        self.edges += [whole[:margin], whole[size + margin :]]
        inner = whole[margin : size + margin].view(dtype).reshape(shape)
        inner[:] = np.nan
        return inner

    def check(self) -> None:
        """Assert that nothing was written into the margins."""
        assert self.edges and all((edge == 0x5A).all() for edge in self.edges)


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    found = Guard()
    monkeypatch.setattr(CpuEngine, "empty", lambda engine, *shape: found.empty(engine, *shape))
    return found


@pytest.mark.parametrize("samples", EDGES)
@pytest.mark.parametrize("noise", ["coloured", "sobol"])
def test_any_number_of_samples_is_as_in_torch_and_stays_in_its_arrays(samples: int, noise: str, guard: Guard) -> None:
    assert_alike(run_of(ARM2, planner={"samples": samples, "noise": noise}), f"N={samples}", (5,)) if samples >= 3 else None
    run = run_of(ARM2, planner={"samples": samples, "noise": noise})
    request = request_of(run)
    (a, x), (b, y) = (searched(controller(run, backend), request, given=1) for backend in ("kernel", "torch"))
    assert a.shape[-1] == len(x) == samples and (a - b).abs().max() <= 1e-5 and cost_error(x, y) <= 1e-4
    guard.check()
    for _ in range(3):
        plan = controller(run, "kernel").plan(request)
    assert np.isfinite(plan.u).all() and np.isfinite(plan.x).all()
    guard.check()


@pytest.mark.parametrize("samples", EDGES)
def test_a_horizon_of_one_step(samples: int, guard: Guard) -> None:
    run = run_of(ARM2, planner={"samples": samples, "horizon": 0.04, "knots": 1, "interpolation": "zero"})
    request = request_of(run)
    (a, x), (b, y) = (searched(controller(run, backend), request, given=1) for backend in ("kernel", "torch"))
    assert (a - b).abs().max() <= 1e-5 and cost_error(x, y) <= 1e-4
    plans = [controller(run, backend).plan(request) for backend in ("kernel", "torch")]
    np.testing.assert_allclose(plans[0].u, plans[1].u, atol=1e-4)
    guard.check()


@pytest.mark.parametrize("samples", EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("horizon", [0, 1, 5])
def test_rollouts_of_any_size_are_torchs(samples: int, dtype: torch.dtype, horizon: int, pool: Pool, guard: Guard) -> None:
    _, tree = model_of("arm2", friction=True)
    torchs = RigidBodyDynamics(
        tree, 0.01, Impedance((50.0, 20.0), (5.0, 2.0)), effort_limit=(7.0, 2.0), gravity_compensation=True, dtype=dtype
    )
    ours = kernel_dynamics(torchs, CpuEngine(pool, np.float32 if dtype == torch.float32 else np.float64))
    q, v, _ = random_states(tree, samples)
    x = torch.as_tensor(np.concatenate([q, v], 1).T, dtype=dtype)  # not contiguous
    u = torch.as_tensor(np.broadcast_to((q + 0.3).T, (horizon, 2, samples)).copy(), dtype=dtype)
    found, before = ours.rollout(x, u), x.clone()
    assert found.shape == (horizon + 1, 4, samples) and found.dtype == dtype and torch.equal(found[0], x) and torch.equal(x, before)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-7
    for model, other in ((ours, torchs), (ours.with_dt(0.003), torchs.with_dt(0.003))):
        # tanh is a fit in the kernel, good to 7e-9
        assert (model.rollout(x, u) - (other.rollout(x, u) if horizon else x[None])).abs().max() <= tolerance
    if horizon:
        assert torch.equal(ours.step(x, u[0]), found[1])
    guard.check()
    assert (ours.dt, ours.nq, ours.nx, ours.nu) == (torchs.dt, torchs.nq, torchs.nx, torchs.nu)


def test_memory_outlives_an_interrupted_caller() -> None:
    """A thread may still be writing when Ctrl-C ends the caller: what it writes to must not be freed."""
    interrupted, seen = threading.Event(), []

    class Code:
        def run(self, address: int, wait: int) -> None:
            if threading.current_thread().name != "mbctrl-kernel":
                raise KeyboardInterrupt
            interrupted.wait(10)
            gc.collect()
            seen.append(owner() is not None)

    memory = {"cost": torch.zeros(3)}
    owner, pool = weakref.ref(memory["cost"]), Pool(2)
    with pytest.raises(KeyboardInterrupt):
        pool.run(Code(), words(blocks=2), memory)
    del memory
    interrupted.set()
    for _ in range(200):
        if seen:
            break
        time.sleep(0.01)
    assert seen == [True]


def test_planners_share_their_threads() -> None:
    run = run_of(ARM2, planner={"samples": 40}, dynamics={"threads": 3})
    controller(run, "kernel")
    before = threading.active_count()
    for _ in range(3):
        controller(run, "kernel")
    assert threading.active_count() == before


def test_one_state_may_be_expanded_to_many(pool: Pool) -> None:
    _, tree = model_of("arm2")
    ours = kernel_dynamics(RigidBodyDynamics(tree, 0.01), CpuEngine(pool))
    x = torch.tensor([0.3, -0.2, 0.5, 0.1])
    u = torch.randn(3, 2, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.rollout(x[:, None].expand(-1, 20), u), ours.rollout(x[:, None].repeat(1, 20), u))


@pytest.mark.parametrize("noise", ["coloured", "sobol"])
def test_threads_change_nothing(noise: str) -> None:
    found = []
    for threads in (1, 2, 3):
        run = run_of(ARM2, planner={"samples": 250, "noise": noise}, dynamics={"threads": threads})
        request = request_of(run)
        planner = controller(run, "kernel")
        found += [searched(planner, request) for _ in range(5)]
    for candidates, costs in found[1:]:
        assert torch.equal(candidates, found[0][0]) and torch.equal(costs, found[0][1])


@pytest.mark.parametrize("base", [ARM2, PANDA], ids=["arm2", "panda"])
@pytest.mark.parametrize("lane", [0, 5, 17])
def test_a_candidate_that_is_not_a_number_spoils_itself_only(
    base: dict[str, Any], lane: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(base)
    planner, request = controller(run, "kernel"), request_of(run)
    candidates, costs = searched(planner, request, given=20)
    search = planner.planner.search
    call = type(search).__call__

    def spoilt(self: Any, belief: Any, fixed: np.ndarray, *rest: Any) -> Any:
        fixed = fixed.copy()
        fixed[1, 0, lane] = np.nan
        return call(self, belief, fixed, *rest)

    monkeypatch.setattr(type(search), "__call__", spoilt)
    found, seen = searched(planner, request, given=20)
    others = torch.arange(len(costs)) != lane
    assert torch.equal(found[..., others], candidates[..., others]) and torch.equal(seen[others], costs[others])
    assert not torch.isfinite(seen[lane]) and torch.isfinite(costs).all()


@pytest.mark.parametrize("base", [ARM2, PANDA], ids=["arm2", "panda"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_costs_nothing_finite(base: dict[str, Any], bad: float) -> None:
    run = run_of(base)
    planner, request = controller(run, "kernel"), request_of(run)
    for row in range(len(request.x)):
        x = request.x.copy()
        x[row] = bad
        assert not torch.isfinite(searched(planner, request, x=x)[1]).any(), row
    before = planner.plan(request)
    x = request.x.copy()
    x[0] = bad
    plan = planner.plan(PlanRequest(0.3, x))
    assert plan.info["nonfinite"] == run.planner.samples and np.isfinite(plan.u).all() and np.isfinite(before.x).all()
    after = planner.plan(request)
    assert after.info["nonfinite"] == 0 and np.isfinite(after.x).all()


@pytest.mark.parametrize("size", [1e6, 1e8, 3e8, 1e9, 1e10, 1e15, 1e30])
def test_a_rollout_that_ran_away_never_wins(size: float) -> None:
    """No term is ever negative, so no cost may be: however far an angle went."""
    run = run_of(ARM2, task={"posture": {"weight": 1.0, "wrap": True}})
    planner, request = controller(run, "kernel"), request_of(run)
    for row in range(4):
        x = request.x.copy()
        x[row] = size
        costs = searched(planner, request, x=x)[1]
        finite = costs[torch.isfinite(costs)]
        assert (finite >= 0).all(), f"a cost of {finite.min().item():.3g} with x[{row}] = {size:g}"


# --- the choice of a backend ------------------------------------------------------------------------------------------


class Squashed(Term):
    """A user's term that asks torch."""

    def cost(self, f: Features, robot: RobotScales) -> Any:
        return torch.tanh(f.v[0]) ** 2


class Branching(Term):
    """A user's term that looks at a value."""

    def cost(self, f: Features, robot: RobotScales) -> Any:
        return f.v[0] * f.v[0] if (f.v[0] * f.v[0] < 1e9).all() else 0.0


class Choosing(Term):
    """A user's term that asks whether two values are equal."""

    def cost(self, f: Features, robot: RobotScales) -> Any:
        return torch.where(f.v[0] == 0, 0.0, 1.0) if isinstance(f.v, Tensor) else float(f.v[0] == 0.0)


class Along(Term):
    """A user's term that looks along the horizon, which a traced step has none of."""

    def cost(self, f: Features, robot: RobotScales) -> Any:
        return ((f.v[:, 1:] - f.v[:, :-1]) ** 2).sum((0, 1)) if isinstance(f.v, Tensor) else f.v[:, 1:].sum(0)


class Method(Term):
    """A user's term with a tensor's own method."""

    def cost(self, f: Features, robot: RobotScales) -> Any:
        return f.v.square().sum(0)


class Plain(Term):
    """A user's term of arithmetic alone."""

    scale: float = 2.0

    def cost(self, f: Features, robot: RobotScales) -> Any:
        return (f.v[0] * f.v[1]) ** 2 / self.scale + (f.q * f.q).sum(0)


def with_term(term: type[Term]) -> RunConfig:
    return run_of(ARM2, task={"own": {"kind": f"{__name__}:{term.__name__}", "weight": 1.0}, "velocity": {"weight": 1.0}})


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_auto_is_the_kernel_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    planner = controller(run_of(ARM2), "auto")
    assert planner.backend.name == "kernel" and isinstance(planner.planner.search, KernelSearch) and not warnings_of(caplog)
    assert isinstance(planner.backend.dynamics, KernelDynamics)


def test_a_users_own_arithmetic_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    assert_alike(with_term(Plain), "own")
    assert not warnings_of(caplog)


@pytest.mark.parametrize("term", [Squashed, Branching, Choosing, Along, Method])
def test_a_term_that_cannot_be_traced_falls_back_to_torch_and_says_so(term: type[Term], caplog: pytest.LogCaptureFixture) -> None:
    run = with_term(term)
    planner = controller(run, "auto")
    said = warnings_of(caplog)
    assert planner.backend.name == "torch" and isinstance(planner.planner.search, TorchSearch)
    assert len(said) == 1 and "no compiled rollouts" in said[0] and "planning with torch" in said[0]
    with pytest.raises(SpecError, match=r"^run\.yaml: dynamics\.backend: no compiled rollouts: ") as caught:
        controller(run, "kernel", "run.yaml")
    assert caught.value.key == "dynamics.backend"


def test_the_fallback_plans(caplog: pytest.LogCaptureFixture) -> None:
    run = with_term(Squashed)
    auto, plain = controller(run, "auto"), controller(run, "torch")
    request = request_of(run)
    np.testing.assert_array_equal(auto.plan(request).u, plain.plan(request).u)


def test_an_unknown_processor_falls_back_to_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def host() -> Any:
        raise ModelError("no compiled rollouts for this processor (riscv)", key="dynamics.backend")

    monkeypatch.setattr(native, "host", host)
    assert controller(run_of(ARM2), "auto").backend.name == "torch"
    assert len(warnings_of(caplog)) == 1 and "riscv" in warnings_of(caplog)[0]
    with pytest.raises(SpecError, match=r"dynamics\.backend: .*riscv"):
        controller(run_of(ARM2), "kernel")


@pytest.mark.parametrize(
    ("machine", "features"),
    [("x86_64", {"avx": True, "avx2": False}), ("x86_64", {"avx2": True, "fma": False}), ("riscv64", {}), ("ppc64le", {})],
)
def test_processors_without_fused_vectors_are_unknown(
    machine: str, features: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native.platform, "machine", lambda: machine)
    monkeypatch.setattr(native.llvm, "get_host_cpu_features", lambda: features)
    with pytest.raises(ModelError, match=f"processor \\({machine}\\): expected AVX-512, AVX2 with FMA, or NEON") as caught:
        native.host.__wrapped__()
    assert caught.value.key == "dynamics.backend"


def test_without_llvmlite_torch_plans(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "mbctrl.kernels.native", None)
    assert controller(run_of(ARM2), "auto").backend.name == "torch" and len(warnings_of(caplog)) == 1
    with pytest.raises(SpecError, match=r"dynamics\.backend"):
        controller(run_of(ARM2), "kernel")


def test_torch_may_be_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    planner = controller(run_of(ARM2), "torch")
    assert (
        isinstance(planner.planner.search, TorchSearch)
        and isinstance(planner.backend.dynamics, RigidBodyDynamics)
        and not warnings_of(caplog)
    )
