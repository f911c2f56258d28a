"""Kernels: the scalar graph, the arm's step against both engines, machine code lane by lane, vector maths, noise, cache."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from operator import neg
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from sample_models import ROBOTS, TREES, model_of, random_states, relative

from mbctrl.base.scene import Obstacle
from mbctrl.dynamics.actuation import Impedance, Torque
from mbctrl.dynamics.reference import ReferenceDynamics
from mbctrl.dynamics.rigid_body import FRICTION_SPEED, RigidBodyDynamics
from mbctrl.dynamics.tree import RigidTree
from mbctrl.kernels import native as native_module
from mbctrl.kernels.cache import cache_folder
from mbctrl.kernels.graph import Graph, Scalar, evaluate, maximum, minimum, tidy, where
from mbctrl.kernels.llvm import SLOTS, Sampling, words
from mbctrl.kernels.native import Native, Pool, lanes_of
from mbctrl.kernels.program import Program
from mbctrl.kernels.step import Drive
from mbctrl.kernels.trace import GAINS, PARAMETERS, Goal, Traced, trace_dynamics, trace_objective
from mbctrl.planning.white import normals, philox
from mbctrl.tasks.features import RobotScales
from mbctrl.tasks.task import build_task

F64 = torch.float64
H = 0.01  # [s]
GENERATED = tuple(f"tree{seed}" for seed in range(50))


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled code is kept for this module only, so that nothing stale is tested."""
    path = tmp_path_factory.mktemp("code")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBCTRL_CACHE", str(path))
        yield path


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(2)


# --- the graph: what it removes ---------------------------------------------------------------------------------------


def inputs(count: int) -> tuple[Graph, list[Scalar]]:
    graph = Graph()
    return graph, [graph.input("start", i) for i in range(count)]


def value(graph: Graph, expression: Any, *numbers: Any) -> Any:
    """Return an expression's value where its inputs are ``numbers``."""
    return evaluate(graph, [graph.operand(expression)], lambda kind, i: numbers[i])[0]


def key(x: Scalar) -> tuple[Any, ...]:
    return x.graph.nodes[x.index]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda x: x * 0, 0.0),
        (lambda x: 0.0 * x, 0.0),
        (lambda x: x - x, 0.0),
        (lambda x: 0 / x, 0.0),
        (lambda x: (x * 2.0) * 0.0, 0.0),
        (lambda x: -x - -x, 0.0),
        (lambda x: x * np.float64(0), 0.0),
        (lambda x: where(x < 0, 3.0, 3.0), 3.0),
        (lambda x: maximum(2, 3.0), 3.0),
        (lambda x: minimum(2, 3.0), 2.0),
        (lambda x: where(True, 1.0, x), 1.0),
    ],
)
def test_a_known_result_is_a_plain_number(build: Callable[[Scalar], Any], expected: float) -> None:
    graph, (x,) = inputs(1)
    found = build(x)
    assert not isinstance(found, Scalar) and found == expected


@pytest.mark.parametrize(
    "build",
    [
        lambda x: x + 0,
        lambda x: 0.0 + x,
        lambda x: x - 0,
        lambda x: x * 1,
        lambda x: 1.0 * x,
        lambda x: x / 1.0,
        lambda x: neg(neg(x)),
        lambda x: -1 * -x,
        lambda x: -1.0 * (x * -1.0),
        lambda x: 0 - (0 - x),
        lambda x: x / -1 / -1,
        lambda x: x**1,
        lambda x: x**1.0,
        lambda x: (x * 2.0) * 0.5,
        lambda x: where(x < 1, x, x),
        lambda x: x.clip(),
    ],
)
def test_what_changes_nothing_makes_nothing(build: Callable[[Scalar], Any]) -> None:
    graph, (x,) = inputs(1)
    found = build(x)
    assert isinstance(found, Scalar) and found.index == x.index


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x, y: x + y, lambda x, y: y + x),
        (lambda x, y: x * y, lambda x, y: y * x),
        (lambda x, y: x + 2, lambda x, y: 2 + x),
        (lambda x, y: x * 3, lambda x, y: 3 * x),
        (lambda x, y: x * 2 * 3, lambda x, y: x * 6),
        (lambda x, y: x - y, lambda x, y: x + -y),
        (lambda x, y: -(x - y), lambda x, y: y - x),
        (lambda x, y: -x + y, lambda x, y: y - x),
        (lambda x, y: 3 - -x, lambda x, y: x + 3),
        (lambda x, y: (-x) * (-y), lambda x, y: x * y),
        (lambda x, y: -(x * y), lambda x, y: (-x) * y),
        (lambda x, y: (-x) * 2, lambda x, y: x * -2),
        (lambda x, y: (-x) / (-y), lambda x, y: x / y),
        (lambda x, y: x / (-y), lambda x, y: -(x / y)),
        (lambda x, y: x / 4, lambda x, y: x * 0.25),
        (lambda x, y: abs(-x), lambda x, y: abs(x)),
        (lambda x, y: (-x).cos(), lambda x, y: x.cos()),
        (lambda x, y: (-x).sin(), lambda x, y: -(x.sin())),
        (lambda x, y: x > y, lambda x, y: y < x),
        (lambda x, y: x**3, lambda x, y: x * x * x),
    ],
)
def test_equal_expressions_are_one_node(one: Callable[..., Scalar], other: Callable[..., Scalar]) -> None:
    graph, (x, y) = inputs(2)
    assert one(x, y).index == other(x, y).index


def test_signs_are_free_and_moved_outwards() -> None:
    graph, (x, y) = inputs(2)
    product = (-x) * y
    assert key(product)[0] == "neg" and key(x * -2.5)[0] == "neg"
    assert graph.count([product.index]) == {"mul": 1}
    assert key(x + product)[0] == "sub" and key(x - product)[0] == "add"
    assert value(graph, x - product, 2.0, 5.0) == 12.0


def test_a_count_is_of_what_is_needed_once() -> None:
    graph, (x, y) = inputs(2)
    shared = x * y
    unused = x.exp()
    outputs = [(shared + shared).index, (shared.sin() - y).index]
    assert graph.count(outputs) == {"mul": 1, "add": 1, "sin": 1, "sub": 1}
    assert unused.index not in graph.needed(outputs) and graph.needed(outputs) == sorted(graph.needed(outputs))


@pytest.mark.parametrize(
    "branch",
    [
        lambda x: 1 if x else 2,
        lambda x: 1 if x < 0 else 2,
        lambda x: 1 if x > 0 else 2,
        lambda x: 1 if x <= 0 else 2,
        lambda x: 1 if x >= 0 else 2,
        lambda x: 1 if x == 0 else 2,
        lambda x: 1 if x != 0 else 2,
        lambda x: max(x, 1.0),
        lambda x: np.maximum(np.array([x]), 0.0),
        lambda x: float(x),
        lambda x: np.tanh(np.array([x])),
        lambda x: x**0.5,
        lambda x: x**17,
        lambda x: 2**x,
    ],
)
def test_what_cannot_be_traced_is_a_type_error(branch: Callable[[Scalar], Any]) -> None:
    graph, (x,) = inputs(1)
    with pytest.raises(TypeError):
        branch(x)


def test_the_refusal_of_a_branch_says_what_to_write() -> None:
    graph, (x,) = inputs(1)
    with pytest.raises(TypeError, match=r"where\(condition, a, b\)"):
        bool(x < 0)


@pytest.mark.parametrize(("number", "scale"), [(1e-14, 1.0), (1 - 1e-14, 1.0), (-1 + 1e-14, 1.0), (5 + 1e-13, 5.0)])
def test_tidy_removes_residue_and_nothing_else(number: float, scale: float) -> None:
    assert tidy(number, scale) in (0.0, scale, -scale) and tidy(0.3 * scale, scale) == 0.3 * scale
    assert tidy(1e-9 * scale, scale) == 1e-9 * scale


# --- the graph: what it computes --------------------------------------------------------------------------------------


def apply(x: Any, name: str) -> Any:
    return getattr(x, name)() if isinstance(x, Scalar) else getattr(np, name)(x)


def calm(x: Any) -> Any:
    """Return something of a value that is within [-1, 1]."""
    return apply(x, "sin")


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: calm(a) * b,
    "div": lambda a, b: a / (abs(b) + 1.5),
    "constant": lambda a, b: a * 1 - 0 + b * 0 - -1 * a * 0.5 + (2 - b) / -1,
    "rdiv": lambda a, b: -2 / (1.5 + b * b),
    "neg": lambda a, b: -a + -b,
    "sqrt": lambda a, b: apply(abs(a) + 0.1, "sqrt"),
    "sin": lambda a, b: apply(-a, "sin"),
    "cos": lambda a, b: apply(b - a, "cos"),
    "exp": lambda a, b: apply(-abs(a), "exp"),
    "abs": lambda a, b: abs(a - b),
    "max": lambda a, b: maximum(a, b) if isinstance(a, Scalar) or isinstance(b, Scalar) else np.maximum(a, b),
    "min": lambda a, b: minimum(a, -0.5) if isinstance(a, Scalar) else np.minimum(a, -0.5),
    "where": lambda a, b: where(a < b, a * a, b) if isinstance(a, Scalar) or isinstance(b, Scalar) else np.where(a < b, a * a, b),
    "pow": lambda a, b: calm(a) ** 3 + calm(b) ** 2.0,
    "clip": lambda a, b: a.clip(-0.5, 0.75) if isinstance(a, Scalar) else np.clip(a, -0.5, 0.75),
}


def random_expressions(seed: int, values: list[Any], count: int) -> list[Any]:
    """Return ``values`` and ``count`` more, each an operation on two before it: the same for Scalars and for numpy."""
    rng, out, names = np.random.default_rng(seed), list(values), list(OPERATIONS)
    while len(out) < len(values) + count:
        a, b = (out[k] for k in rng.integers(len(out), size=2))
        name = names[rng.integers(len(names))]
        found = OPERATIONS[name](a, b)
        out.append(calm(found) if rng.random() < 0.3 else found)
    return out


@pytest.mark.parametrize("seed", range(40))
def test_random_expressions_are_numpys(seed: int) -> None:
    numbers = np.random.default_rng(1000 + seed).normal(size=(4, 50))
    graph, variables = inputs(4)
    # Plain numbers are numpy's here, so that both sides have every method.
    traced = random_expressions(seed, [*variables, np.float64(2.5)], 60)
    expected = random_expressions(seed, [*numbers, np.float64(2.5)], 60)
    found = evaluate(graph, [graph.operand(x) for x in traced], lambda kind, i: numbers[i])
    for k, (a, b) in enumerate(zip(found, expected)):
        np.testing.assert_allclose(np.broadcast_to(a, 50), np.broadcast_to(b, 50), rtol=1e-11, atol=1e-11, err_msg=str(k))


def test_numpy_takes_scalars_as_numbers() -> None:
    graph, variables = inputs(12)
    rng = np.random.default_rng(0)
    numbers, plain = rng.normal(size=12), rng.normal(size=(3, 3))
    matrix, vector = np.array(variables[:9], dtype=object).reshape(3, 3), np.array(variables[9:], dtype=object)
    a, b, x = numbers[:9].reshape(3, 3), numbers[9:], variables[0]
    pairs = [
        (matrix @ vector, a @ b),
        (plain @ vector, plain @ b),
        (vector @ plain, b @ plain),
        (matrix @ plain @ matrix, a @ plain @ a),
        (np.cross(vector, plain[0]), np.cross(b, plain[0])),
        (np.cross(vector, matrix[0]), np.cross(b, a[0])),
        (np.outer(vector, plain[1]), np.outer(b, plain[1])),
        (x + plain, numbers[0] + plain),
        (plain + x, plain + numbers[0]),
        (x - plain, numbers[0] - plain),
        (plain - x, plain - numbers[0]),
        (x * plain, numbers[0] * plain),
        (plain * x, plain * numbers[0]),
        (x / plain, numbers[0] / plain),
        (plain / x, plain / numbers[0]),
        (matrix.T - plain, a.T - plain),
        (matrix.sum(0), a.sum(0)),
        (np.abs(matrix), np.abs(a)),
        (np.sqrt(matrix * matrix), np.abs(a)),
        (np.sin(vector) ** 2, np.sin(b) ** 2),
        (np.float64(3) - vector, 3 - b),
        (np.float32(3) / vector, 3 / b),
        (-vector, -b),
    ]
    for k, (traced, expected) in enumerate(pairs):
        assert traced.shape == expected.shape and traced.dtype == object, k
        found = evaluate(graph, [graph.operand(e) for e in traced.flat], lambda kind, i: numbers[i])
        np.testing.assert_allclose(found, expected.ravel(), rtol=1e-13, atol=1e-14, err_msg=str(k))


@pytest.mark.parametrize("operation", [maximum, minimum])
def test_an_ordered_pair_keeps_what_is_not_a_number(operation: Callable[..., Any]) -> None:
    graph, (x, y) = inputs(2)
    assert np.isnan(value(graph, operation(2.0, x), np.nan)) and np.isnan(value(graph, operation(x, 2.0), np.nan))
    assert np.isnan(value(graph, operation(x, y), 0.0, np.nan))
    assert np.isnan(value(graph, x.clip(-1, 1), np.nan))


# --- programs ---------------------------------------------------------------------------------------------------------


def panda_task(**terms: dict[str, Any]) -> Any:
    robot = RobotScales(
        home=(0.0, -0.8, 0.0, -2.3, 0.0, 1.6, 0.8),
        position_lower=(-2.0,) * 7,
        position_upper=(2.0,) * 7,
        velocity=(2.0,) * 7,
        effort=(80.0,) * 7,
    )
    return build_task(terms or {"velocity": {"weight": 1.0}, "smoothness": {"weight": 0.5, "scale": 0.1}}, robot)


@cache
def costed(limit: float | None = None) -> Traced:
    """Return panda's rollout with a task of every kind of feature, commands as they are."""
    _, tree = model_of("panda")
    task = panda_task(
        reach={"weight": 2.0},
        velocity={"weight": 1.0},
        smoothness={"weight": 0.5, "scale": 0.1},
        avoid={"weight": 3.0},
        effort={"weight": 1},
    )
    ball = Obstacle(name="ball", shape="sphere", position=(0.5, 0, 0.4), size=(0.1,))
    limits = None if limit is None else (limit,) * 7
    drive = Drive(range(7), (300.0,) * 7, (30.0,) * 7, limits, True, "euler", FRICTION_SPEED)
    return trace_objective(tree, drive, H, tree.frames["tcp"], task, Goal(True, True, False), (ball,))


@pytest.mark.parametrize("which", ["step", "cost"])
def test_a_program_is_its_own_json(which: str) -> None:
    program = costed().program if which == "cost" else trace_dynamics(model_of("panda")[1], torques(7)).program
    data = json.loads(json.dumps(program.to_dict()))
    again = Program.from_dict(data)
    assert again.to_dict() == data == program.to_dict() and again.digest == program.digest
    assert (again.cost, again.sizes, again.states, again.commands) == (
        program.cost,
        program.sizes,
        program.states,
        program.commands,
    )
    assert again.operations == program.operations and len(again.live) == len(program.live)


def test_a_digest_is_of_the_content() -> None:
    program = trace_dynamics(model_of("arm2")[1], torques(2)).program
    heavier = trace_dynamics(replace(model_of("arm2")[1], mass=model_of("arm2")[1].mass * 1.000001), torques(2)).program
    assert program.digest == trace_dynamics(model_of("arm2")[1], torques(2)).program.digest != heavier.digest


def plain() -> dict[str, Any]:
    """Return a small program's data: x' = sin(x + u), one table column."""
    return {
        "nodes": [
            ["input", "start", 0],
            ["input", "carry", 0],
            ["input", "command", 0],
            ["add", 1, 2],
            ["sin", 3],
            ["const", 0.0],
            ["input", "carry", 1],
            ["input", "table", 0],
            ["add", 6, 7],
        ],
        "states": 1,
        "commands": 1,
        "first": [0, 5],
        "following": [4, 8],
        "cost": 1,
        "sizes": {"table": 1, "uniform": 0, "sample": 0},
    }


def test_plain_data_is_a_program() -> None:
    assert Program.from_dict(plain()).operations == {"add": 2, "sin": 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["nodes"].append(["tanh", 1]), "unknown operation 'tanh'"),
        (lambda d: d["nodes"].append(["__init__", 1, 2]), "unknown operation '__init__'"),
        (lambda d: d["nodes"].append(["select", 1, 2]), "unknown operation 'select' of 2 operands"),
        (lambda d: d["nodes"].append(["sqrt", 1, 2]), "unknown operation 'sqrt' of 2"),
        (lambda d: d["nodes"].append(["add", 1, 9]), "not earlier nodes"),
        (lambda d: d["nodes"].append(["add", 1, 40]), "not earlier nodes"),
        (lambda d: d["nodes"].append(["add", -1, 1]), "not earlier nodes"),
        (lambda d: d["nodes"].append(["add", 0.0, 1]), "not earlier nodes"),
        (lambda d: d["nodes"].append(["input", "memory", 0]), "unknown input"),
        (lambda d: d["nodes"].append(["input", "start", "0"]), "unknown input"),
        (lambda d: d["nodes"].append(["add", 1, 2]), "repeats node 3"),
        (lambda d: d["first"].append(0), "carried values"),
        (lambda d: d.update(following=[4, 9]), "carried values"),
        (lambda d: d.update(first=[0, -1]), "carried values"),
        # What would have the machine code read or write where nothing is.
        (lambda d: d["nodes"].append(["input", "start", -1]), None),
        (lambda d: d["nodes"].append(["input", "start", 1]), None),
        (lambda d: d["nodes"].append(["input", "command", 1]), None),
        (lambda d: d["nodes"].append(["input", "carry", 2]), None),
        (lambda d: d["nodes"].append(["input", "table", 1]), None),
        (lambda d: d["nodes"].append(["input", "sample", 0]), None),
        (lambda d: d.update(states=3), None),
        (lambda d: d.update(cost=7), None),
        (lambda d: d.update(first=[0, 1]), None),  # the first value of a carried one from a carried one
        (lambda d: d["nodes"].append(["const"]), None),
    ],
)
def test_malformed_data_is_refused(change: Callable[[dict[str, Any]], Any], says: str | None) -> None:
    data = plain()
    change(data)
    with pytest.raises(ValueError, match=says):
        Program.from_dict(data)


# --- the arm's step ---------------------------------------------------------------------------------------------------


def torques(
    n: int, commanded: list[int] | None = None, limit: Any = None, compensated: bool = False, integrator: str = "euler"
) -> Drive:
    return Drive(range(n) if commanded is None else commanded, None, None, limit, compensated, integrator, FRICTION_SPEED)


def rolled(
    native: Native, pool: Pool, start: Any, commands: Any, dt: float = H, numbers: Any = (), sample: Any = None
) -> np.ndarray:
    """Return the states (H+1, nx, N) of a program without a cost; ``numbers`` are its uniforms after the time step."""
    dtype = native.dtype
    start, commands = np.ascontiguousarray(start, dtype), np.ascontiguousarray(commands, dtype)
    uniform = np.concatenate([[dt], np.ravel(numbers)]).astype(dtype)
    own = np.zeros(0, dtype) if sample is None else np.ascontiguousarray(sample, dtype)
    states = np.full((len(commands) + 1, *start.shape), np.nan, dtype)
    job = words(
        samples=start.shape[1],
        steps=len(commands),
        blocks=native.blocks(start.shape[1]),
        start=start.ctypes.data,
        commands=commands.ctypes.data,
        uniform=uniform.ctypes.data,
        sample=own.ctypes.data,
        states=states.ctypes.data,
    )
    pool.run(native, job)
    return states


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def quarter_turns(rng: np.random.Generator) -> np.ndarray:
    """Return a rotation by right angles, with the residue a compiler leaves."""
    out = np.eye(3)
    for axis in rng.integers(3, size=2):
        c, s = np.cos(np.pi / 2), np.sin(np.pi / 2)
        turn = np.roll(np.array([[1.0, 0, 0], [0, c, -s], [0, s, c]]), (axis, axis), (0, 1))
        out = out @ turn
    return out


def random_tree(seed: int) -> RigidTree:
    """Return a tree of 2 to 12 joints; every second one has an arm's right angles and zeros."""
    rng = np.random.default_rng(seed)
    n, square, chain = 2 + seed % 11, seed % 2 == 0, seed % 3 == 0
    there = (lambda *shape: rng.random(shape) < 0.4) if square else (lambda *shape: np.ones(shape))
    sides = rng.uniform(0.1, 0.8, (n, 3)) ** 2
    turn = quarter_turns if square else random_rotation
    axes = [np.eye(3) if square else random_rotation(rng) for _ in range(n)]
    mass = rng.uniform(0.3, 2, n)
    moments = (sides.sum(1, keepdims=True) - sides) / 12 * mass[:, None]
    return RigidTree(
        joints=tuple(f"j{i}" for i in range(n)),
        parent=tuple(i - 1 if chain else int(rng.integers(-1, i)) if i else -1 for i in range(n)),
        revolute=tuple(bool(rng.random() < 0.7) for _ in range(n)),
        fixed_rotation=np.array([turn(rng) for _ in range(n)]),
        fixed_position=rng.normal(size=(n, 3)) / 3 * there(n, 3),
        reference=rng.uniform(-1, 1, n) * there(n),
        mass=mass,
        com=rng.normal(size=(n, 3)) / 6 * there(n, 3),
        inertia=np.array([a @ np.diag(m) @ a.T for a, m in zip(axes, moments)]),
        armature=rng.uniform(0, 0.3, n) * there(n),
        damping=rng.uniform(0, 0.5, n) * there(n),
        friction=np.zeros(n),
        stiffness=rng.uniform(0, 3, n) * there(n),
        spring_reference=rng.uniform(-1, 1, n),
        gravity=np.array([0, 0, -9.81]) if square else rng.normal(size=3) * 5,
        frames={},
        capsules=(),
    )


def xml_of(tree: RigidTree) -> str:
    """Return a tree as MJCF, a body a joint."""

    def words(values: Any) -> str:
        return " ".join(f"{float(x):.17g}" for x in np.ravel(values))

    def body(i: int) -> str:
        quaternion = np.zeros(4)
        mujoco.mju_mat2Quat(quaternion, tree.fixed_rotation[i].ravel())
        inertia = tree.inertia[i]
        full = [*np.diag(inertia), inertia[0, 1], inertia[0, 2], inertia[1, 2]]
        numbers = {"stiffness": tree.stiffness, "springref": tree.spring_reference, "ref": tree.reference}
        numbers |= {"damping": tree.damping, "armature": tree.armature}
        rest = " ".join(f'{name}="{words(of[i])}"' for name, of in numbers.items())
        return (
            f'<body pos="{words(tree.fixed_position[i])}" quat="{words(quaternion)}">'
            f'<joint axis="0 0 1" type="{"hinge" if tree.revolute[i] else "slide"}" {rest}/>'
            f'<inertial pos="{words(tree.com[i])}" mass="{words(tree.mass[i])}" fullinertia="{words(full)}"/>'
            f"{''.join(body(k) for k in range(tree.n) if tree.parent[k] == i)}</body>"
        )

    roots = "".join(body(i) for i in range(tree.n) if tree.parent[i] < 0)
    option = f'<compiler angle="radian"/><option gravity="{words(tree.gravity)}" timestep="{H}"/>'
    return f"<mujoco>{option}<worldbody>{roots}</worldbody></mujoco>"


@cache
def pair(name: str) -> tuple[mujoco.MjModel, RigidTree, np.ndarray]:
    """Return a model without friction, its tree, and for each of the tree's joints its place in the model's state."""
    if name in (*ROBOTS, *TREES):
        mj, tree = model_of(name)
        return mj, tree, np.arange(tree.n)
    tree = random_tree(int(name.removeprefix("tree")))
    order: list[int] = []  # MuJoCo counts bodies depth first

    def visit(i: int) -> None:
        order.append(i)
        for k in range(tree.n):
            if tree.parent[k] == i:
                visit(k)

    for i in range(tree.n):
        if tree.parent[i] < 0:
            visit(i)
    return mujoco.MjModel.from_xml_string(xml_of(tree)), tree, np.argsort(order)


def engines_accelerations(name: str, q: np.ndarray, v: np.ndarray, tau: np.ndarray) -> dict[str, np.ndarray]:
    """Return the accelerations (N, n) [rad/s²] of a step with implicit damping by both engines."""
    mj, tree, place = pair(name)
    mj.opt.timestep = H
    # a = (M + h D)^-1 (...), Pinocchio's with more armature
    reference = ReferenceDynamics(replace(tree, armature=tree.armature + H * tree.damping, friction=np.zeros(tree.n)))
    data, moved = mujoco.MjData(mj), []
    for state in zip(q, v, tau):
        mujoco.mj_resetData(mj, data)
        data.qpos[place], data.qvel[place], data.qfrc_applied[place] = state
        mujoco.mj_step(mj, data)
        moved.append((data.qvel[place] - state[1]) / H)
    return {"mujoco": np.array(moved), "pinocchio": np.array([reference.forward_dynamics(*state) for state in zip(q, v, tau)])}


def single_error(found: np.ndarray, exact: np.ndarray, n: int) -> float:
    """Return the largest error of states (nx, N) over the sample's largest position, and largest speed, respectively."""
    halves = []
    for part in (slice(0, n), slice(n, None)):
        halves.append(np.abs(found[part] - exact[part]).max(0) / np.maximum(np.abs(exact[part]).max(0), 1e-9))
    return float(np.max(halves))


@pytest.mark.parametrize("name", [*ROBOTS, *TREES, *GENERATED])
def test_a_step_is_both_engines(name: str, pool: Pool) -> None:
    _, tree, _ = pair(name)
    tree = replace(tree, friction=np.zeros(tree.n))
    n, samples = tree.n, 40
    q, v, tau = random_states(tree, samples)
    x, u = np.concatenate([q.T, v.T]), tau.T[None]
    program = trace_dynamics(tree, torques(n)).program
    found = rolled(Native(program, np.float64), pool, x, u)[1]
    for engine, expected in engines_accelerations(name, q, v, tau).items():
        error = relative((found[n:].T - v) / H, expected)
        print(f"f64 {engine}", error)
        assert error <= 1e-9, (engine, error)
    np.testing.assert_allclose(found[:n], q.T + H * found[n:], rtol=1e-14, atol=1e-14)
    rounded, given = x.astype(np.float32), u.astype(np.float32)
    exact = rolled(Native(program, np.float64), pool, rounded, given)[1]
    error = single_error(rolled(Native(program), pool, rounded, given)[1].astype(float), exact, n)
    # Rounding the state alone changes the accelerations by cond(M) eps: 6e-5 at 1000, and no algorithm can do better.
    condition = max(np.linalg.cond(ReferenceDynamics(tree).mass_matrix(a)) for a in q)
    print("f32", error, condition)
    assert error <= 1e-5 * max(1.0, condition / 1000), (error, condition)


def test_the_pandas_step_is_small() -> None:
    traced = trace_dynamics(model_of("panda", friction=True)[1], torques(7, limit=(80.0,) * 7))
    print("operations", traced.program.operation_count, traced.program.operations)
    assert traced.program.operation_count <= 1800
    # Turning about the vertical changes nothing, so that angle has no sine and cosine.
    assert [traced.program.operations[name] for name in ("sin", "cos")] == [6, 6]


def servo(tree: RigidTree, limit: Any = None, commanded: Any = None, compensated: bool = False, integrator: str = "euler") -> Drive:
    """Return impedance control in proportion to each joint's inertia."""
    joints = list(range(tree.n)) if commanded is None else commanded
    stiffness, damping = gains(tree, joints)
    return Drive(joints, stiffness, damping, limit, compensated, integrator, FRICTION_SPEED)


def gains(tree: RigidTree, joints: list[int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    size = np.diag(ReferenceDynamics(tree).mass_matrix(np.zeros(tree.n)))[joints]
    return tuple(100 * size), tuple(20 * size)


def in_torch(tree: RigidTree, drive: Drive, dt: float = H, dtype: torch.dtype = F64) -> RigidBodyDynamics:
    """Return the torch dynamics with the same drive."""
    actuation = Torque() if drive.stiffness is None else Impedance(drive.stiffness, drive.damping)
    limit = None if drive.effort_limit is None else tuple(drive.effort_limit)
    return RigidBodyDynamics(
        tree,
        dt,
        actuation,
        commanded=list(drive.commanded),
        effort_limit=limit,
        gravity_compensation=drive.gravity_compensation,
        integrator=drive.integrator,
        dtype=dtype,
    )


DRIVES: dict[str, Callable[[RigidTree], Drive]] = {
    "torque": lambda t: torques(t.n),
    "torque limited": lambda t: torques(t.n, limit=tuple(np.linspace(0.5, 2, t.n))),
    "torque compensated": lambda t: torques(t.n, limit=(30.0,) * t.n, compensated=True),
    "torque leapfrog": lambda t: torques(t.n, integrator="leapfrog"),
    "impedance": servo,
    "impedance compensated": lambda t: servo(t, compensated=True),
    "impedance saturated": lambda t: servo(t, limit=(1e-3,) * t.n),
    "impedance limited": lambda t: servo(t, limit=tuple(5 * np.array(gains(t, list(range(t.n)))[1])), compensated=True),
    "impedance leapfrog": lambda t: servo(t, integrator="leapfrog", limit=tuple(20 * np.array(gains(t, list(range(t.n)))[1]))),
    "impedance of some": lambda t: servo(t, commanded=[t.n - 1, 0], limit=(40.0, 30.0)),
    "torque of some": lambda t: torques(t.n, commanded=[t.n - 1], limit=(1.0,), compensated=True),
}


@pytest.mark.parametrize("mode", DRIVES)
@pytest.mark.parametrize("name", ["panda", "arm2", "dm_control:cartpole-swingup", "crowded", "random1"])
@pytest.mark.parametrize("friction", [False, True])
def test_every_drive_is_torchs(name: str, mode: str, friction: bool) -> None:
    _, tree = model_of(name, friction)
    drive = DRIVES[mode](tree)
    q, v, tau = random_states(tree, 200)
    v[100:] *= 1e-3  # where friction sticks
    x, u = np.concatenate([q.T, v.T]), (tau if drive.stiffness is None else q + 0.2 * tau).T[list(drive.commanded)]
    expected = in_torch(tree, drive).step(torch.tensor(x), torch.tensor(u)).numpy()
    program, found = trace_dynamics(tree, drive).program, []
    # Held against numpy's evaluation: what lowering does to a program is tested by the other tests.
    given = {"start": lambda i: x[i], "uniform": lambda i: H}
    first = evaluate(program.graph, list(program.first), lambda kind, i: given[kind](i))
    given |= {"carry": lambda i: first[i], "command": lambda i: u[i]}
    found = np.stack(evaluate(program.graph, list(program.following[: 2 * tree.n]), lambda kind, i: given[kind](i)))
    error = relative((found - x).T, (expected - x).T)
    print("drive friction" if friction else "drive smooth", error)
    # tanh is a fit to 7e-9 in the traced step; in torch it is taken by its series where it is below 1e-2
    assert error <= (2e-7 if friction else 1e-10), error
    if mode == "impedance saturated":
        bound = in_torch(tree, replace(drive, effort_limit=None)).step(torch.tensor(x), torch.tensor(u)).numpy()
        assert np.abs(bound - expected).max() > 1e-3, "nothing saturates"


@pytest.mark.parametrize("name", [*ROBOTS, "crowded", "tree7", "tree18"])
@pytest.mark.parametrize("friction", [False, True])
def test_rollouts_in_single_precision_stay_near(name: str, friction: bool, pool: Pool) -> None:
    tree = pair(name)[1] if name.startswith("tree") else model_of(name, friction)[1]
    if friction and not tree.friction.any():
        pytest.skip("has no friction")
    drive = servo(tree, compensated=True)
    q, v, tau = random_states(tree, 40)
    x = np.concatenate([q.T / 3, v.T / 3]).astype(np.float32)
    u = (x[: tree.n] + np.linspace(0, 0.3, 64)[:, None, None] * np.sign(tau.T)).astype(np.float32)
    expected = in_torch(tree, drive).rollout(torch.tensor(x).double(), torch.tensor(u).double()).numpy()
    native = Native(trace_dynamics(tree, drive).program)
    found = rolled(native, pool, x, u).astype(float)
    assert found.shape == (65, 2 * tree.n, 40) and np.isfinite(found).all()
    n = tree.n
    error = max(
        float((np.abs(found[:, part] - expected[:, part]).max((0, 1)) / np.abs(expected[:, part]).max((0, 1))).max())
        for part in (slice(0, n), slice(n, None))
    )
    print("rollout", error)
    assert error <= 1e-4, error
    single = in_torch(tree, drive, dtype=torch.float32).rollout(torch.tensor(x), torch.tensor(u)).double().numpy()
    print("torch rollout", np.abs(single - expected).max() / np.abs(expected).max())


def test_the_time_step_is_an_input(pool: Pool) -> None:
    _, tree = model_of("arm2")
    native = Native(trace_dynamics(tree, torques(2)).program, np.float64)
    q, v, tau = random_states(tree, 40)
    x, u = np.concatenate([q.T, v.T]), tau.T[None].repeat(3, 0)
    for dt in (1e-3, 0.02):
        expected = in_torch(tree, torques(2), dt).rollout(torch.tensor(x), torch.tensor(u)).numpy()
        np.testing.assert_allclose(rolled(native, pool, x, u, dt), expected, rtol=1e-11, atol=1e-11)


# --- parameters as inputs ---------------------------------------------------------------------------------------------


CHANGES = {"mass": 1.3, "com": 1.2, "inertia": 1.4, "armature": 1.5, "damping": 3.0, "friction": 2.0}


def numbers_of(tree: RigidTree, names: tuple[str, ...] = PARAMETERS) -> np.ndarray:
    return np.concatenate([np.ravel(getattr(tree, name)) for name in names])


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("name", ["panda", "crowded"])
def test_parameters_may_be_inputs(name: str, each: bool, pool: Pool) -> None:
    _, tree = model_of(name, friction=True)
    n, samples = tree.n, 40
    drive = servo(tree, limit=(30.0,) * n, compensated=True)
    traced = trace_dynamics(tree, drive, PARAMETERS, each)
    places = traced.sample if each else traced.uniform
    assert [key for key in places if key != "dt"] == list(PARAMETERS)
    native, constant = Native(traced.program, np.float64), Native(trace_dynamics(tree, drive).program, np.float64)
    q, v, tau = random_states(tree, samples)
    x, u = np.concatenate([q.T, v.T]), (q + 0.2 * tau).T[None].repeat(4, 0)

    def run(values: np.ndarray) -> np.ndarray:
        if not each:
            return rolled(native, pool, x, u, numbers=values)
        return rolled(native, pool, x, u, sample=values if values.ndim == 2 else np.repeat(values[:, None], samples, 1))

    def error(found: np.ndarray, expected: np.ndarray) -> float:
        return relative((found - x)[1:].transpose(2, 0, 1), (expected - x)[1:].transpose(2, 0, 1))

    before = rolled(constant, pool, x, u)
    same = error(run(numbers_of(tree)), before)
    print("parameters", same)
    assert same <= 1e-9, same
    trees = {field: replace(tree, **{field: getattr(tree, field) * factor}) for field, factor in CHANGES.items()}
    for field, changed in trees.items():
        expected = in_torch(changed, drive).rollout(torch.tensor(x), torch.tensor(u)).numpy()
        found = error(run(numbers_of(changed)), expected)
        assert found <= 1e-7 and error(before, expected) > 1e-5, (field, found, error(before, expected))
    if each:  # every sample its own
        mixed = np.stack([numbers_of(list(trees.values())[k % len(trees)]) for k in range(samples)], 1)
        alone = [run(numbers_of(t)) for t in trees.values()]
        together = run(mixed)
        for k in range(samples):
            assert np.array_equal(together[:, :, k], alone[k % len(trees)][:, :, k]), k


@pytest.mark.parametrize("name", ["arm2", "panda"])
def test_a_servos_gains_may_be_inputs(name: str, pool: Pool) -> None:
    _, tree = model_of(name)
    drive, samples = servo(tree), 40
    traced = trace_dynamics(tree, drive, tuple(GAINS), each=True)
    assert [key for key in traced.sample] == list(GAINS)
    native = Native(traced.program, np.float64)
    q, v, tau = random_states(tree, samples)
    x, u = np.concatenate([q.T, v.T]), (q + 0.2 * tau).T[None].repeat(4, 0)
    factor = np.repeat([[0.5], [2.0]], len(drive.commanded), 0)
    gains = np.concatenate([drive.stiffness, drive.damping])[:, None] * np.linspace(1, factor[:, 0], samples, axis=1)
    found = rolled(native, pool, x, u, sample=gains)
    for k in (0, 20, samples - 1):
        stiffness, damping = np.split(gains[:, k], 2)
        other = replace(drive, stiffness=tuple(stiffness), damping=tuple(damping))
        expected = rolled(Native(trace_dynamics(tree, other).program, np.float64), pool, x, u)
        assert relative((found - x)[1:, :, k], (expected - x)[1:, :, k]) < 1e-9, k


# --- lanes, blocks and threads ----------------------------------------------------------------------------------------


PATTERN = 0x5A


class Guarded:
    """An array inside a larger one filled with a pattern."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, fill: Any = None, margin: int = 256) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        self._whole = np.full(size + 2 * margin, PATTERN, np.uint8)
        self._margin = margin
        self.array = self._whole[margin : margin + size].view(dtype).reshape(shape)
        if fill is not None:
            self.array[...] = fill

    def intact(self) -> bool:
        """Return whether nothing was written around the array."""
        edge = self._margin
        return bool((self._whole[:edge] == PATTERN).all() and (self._whole[-edge:] == PATTERN).all())


class Objective:
    """A job of a program with a cost, every buffer guarded."""

    def __init__(self, traced: Traced, native: Native, samples: int, steps: int, seed: int = 0, states: bool = False) -> None:
        rng, dtype, program = np.random.default_rng(seed), native.dtype, traced.program
        home = np.array([0.0, -0.8, 0.0, -2.3, 0.0, 1.6, 0.8])[:, None]
        self.native, self.steps, self.samples = native, steps, samples
        self.start = np.concatenate([home + 0.1 * rng.normal(size=(7, samples)), 0.3 * rng.normal(size=(7, samples))])
        self.commands = home + 0.2 * rng.normal(size=(steps, 7, samples))
        table = rng.uniform(0.1, 0.5, (steps, program.sizes["table"]))
        for name, columns in traced.table.items():
            if name == "r_target":
                table[:, columns] = np.diag([1.0, -1.0, -1.0]).ravel()
        self.table, self.uniform = table, np.ravel(home)
        self.given = {"start": self.start, "commands": self.commands, "table": self.table, "uniform": self.uniform}
        self.buffers: dict[str, Guarded] = {}
        self._states = states
        self._dtype = dtype
        self._nx = program.states

    def run(self, pool: Pool) -> tuple[np.ndarray, np.ndarray | None]:
        """Return costs (N,) and states (H+1, nx, N) if they are asked for."""
        self.buffers = {name: Guarded(np.shape(array), self._dtype, array) for name, array in self.given.items()}
        self.buffers["cost"] = Guarded((self.samples,), self._dtype, np.nan)
        if self._states:
            self.buffers["states"] = Guarded((self.steps + 1, self._nx, self.samples), self._dtype, np.nan)
        before = {name: self.buffers[name].array.copy() for name in self.given}
        addresses = {name: buffer.array.ctypes.data for name, buffer in self.buffers.items()}
        job = words(samples=self.samples, steps=self.steps, blocks=self.native.blocks(self.samples), **addresses)
        pool.run(self.native, job)
        assert all(buffer.intact() for buffer in self.buffers.values()), "written outside a buffer"
        for name, array in before.items():
            assert np.array_equal(self.buffers[name].array, array, equal_nan=True), f"{name} was written"
        assert job[SLOTS.index("done")] == job[SLOTS.index("blocks")]
        return self.buffers["cost"].array, self.buffers["states"].array if self._states else None


@pytest.fixture(scope="module")
def cost_native() -> Native:
    return Native(costed().program)


@pytest.fixture(scope="module")
def cost_double() -> Native:
    return Native(costed().program, np.float64)


@pytest.mark.parametrize("samples", [32, 33, 63, 64, 65, 250])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("states", [False, True])
def test_nothing_is_written_around_the_buffers(samples: int, steps: int, states: bool, cost_native: Native, pool: Pool) -> None:
    objective = Objective(costed(), cost_native, samples, steps, states=states)
    costs, found = objective.run(pool)
    assert np.isfinite(costs).all() and costs.min() > 0
    if states:
        assert np.isfinite(found).all() and np.array_equal(found[0], objective.start.astype(np.float32))


def test_asking_for_the_states_changes_no_cost(cost_native: Native, pool: Pool) -> None:
    a, b = (Objective(costed(), cost_native, 50, 5, states=states).run(pool)[0] for states in (False, True))
    assert np.array_equal(a, b)


@pytest.mark.parametrize("samples", [1, 7])
def test_fewer_samples_than_lanes_are_refused(samples: int, cost_native: Native) -> None:
    width = cost_native.lanes.width
    with pytest.raises(ValueError, match=f"expected at least {width} samples, found {min(samples, width - 1)}"):
        cost_native.blocks(min(samples, width - 1))


def test_a_sample_does_not_depend_on_its_lane(cost_native: Native, pool: Pool) -> None:
    objective = Objective(costed(), cost_native, 250, 4)
    costs, _ = objective.run(pool)
    order = np.random.default_rng(3).permutation(250)
    objective.given["start"], objective.given["commands"] = objective.start[:, order], objective.commands[:, :, order]
    assert np.array_equal(objective.run(pool)[0], costs[order])
    part = Objective(costed(), cost_native, 33, 4)
    part.given = {**objective.given, "start": objective.start[:, :33], "commands": objective.commands[:, :, :33]}
    assert np.array_equal(part.run(pool)[0], costs[:33])


@pytest.mark.parametrize("precision", ["cost_native", "cost_double"])
def test_costs_do_not_depend_on_the_threads(precision: str, request: pytest.FixtureRequest) -> None:
    objective = Objective(costed(), request.getfixturevalue(precision), 250, 6, states=True)
    alone = objective.run(Pool(1))
    for threads in (2, 3):
        team = Pool(threads)
        for _ in range(10):
            found = objective.run(team)
            assert np.array_equal(found[0], alone[0]) and np.array_equal(found[1], alone[1])


def test_many_callers_share_a_pool(cost_native: Native) -> None:
    team, failures = Pool(3), []
    expected = {seed: Objective(costed(), cost_native, 40 + seed, 3, seed).run(Pool(1))[0].copy() for seed in range(4)}

    def call(seed: int) -> None:
        for _ in range(60):
            found = Objective(costed(), cost_native, 40 + seed, 3, seed).run(team)[0]
            if not np.array_equal(found, expected[seed]):
                failures.append(seed)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not failures and not any(caller.is_alive() for caller in callers)


FAULTS = [
    *(("start", row, bad) for row in (0, 3, 6, 7, 13) for bad in (np.nan, np.inf, -np.inf)),
    *(("commands", row, bad) for row in (0, 6) for bad in (np.nan, np.inf, -np.inf)),
]


@pytest.mark.parametrize(("what", "row", "bad"), FAULTS)
@pytest.mark.parametrize("lane", [0, 15, 16, 32])
def test_what_is_not_finite_stays_in_its_lane_and_is_seen(
    what: str, row: int, bad: float, lane: int, cost_native: Native, pool: Pool
) -> None:
    objective = Objective(costed(), cost_native, 33, 4, states=True)
    costs, states = (part.copy() for part in objective.run(pool))
    array = objective.given[what].copy()
    array[(2, row, lane) if what == "commands" else (row, lane)] = bad
    objective.given[what] = array
    found, reached = objective.run(pool)
    others = np.arange(33) != lane
    assert np.array_equal(found[others], costs[others]) and np.array_equal(reached[:, :, others], states[:, :, others])
    assert not np.isfinite(found[lane])


@pytest.mark.parametrize("what", ["start", "commands"])
def test_what_is_not_a_number_is_seen_through_limits_too(what: str, pool: Pool) -> None:
    native = Native(costed(20.0).program)
    objective = Objective(costed(20.0), native, 33, 4)
    costs = objective.run(pool)[0].copy()
    array = objective.given[what].copy()
    array[..., 5, 20] = np.nan
    objective.given[what] = array
    found = objective.run(pool)[0]
    others = np.arange(33) != 20
    assert np.array_equal(found[others], costs[others]) and not np.isfinite(found[20])


def test_a_state_that_no_cost_looks_at_is_checked_all_the_same(pool: Pool) -> None:
    _, tree = model_of("panda")
    # Only the last joint's speed costs anything; the first joint's angle enters nothing else.
    task = panda_task(velocity={"weight": 1.0, "joint_weights": (0, 0, 0, 0, 0, 0, 1.0)})
    traced = trace_objective(tree, torques(7), H, tree.frames["tcp"], task, Goal())
    objective = Objective(traced, Native(traced.program), 32, 3)
    costs = objective.run(pool)[0].copy()
    start = objective.start.copy()
    start[0, 9] = np.nan
    objective.given["start"] = start
    found = objective.run(pool)[0]
    assert np.isfinite(costs).all() and not np.isfinite(found[9]) and np.isfinite(np.delete(found, 9)).all()


def test_doubles_and_singles_cost_alike(cost_native: Native, cost_double: Native, pool: Pool) -> None:
    single, double = (Objective(costed(), native, 100, 8).run(pool)[0] for native in (cost_native, cost_double))
    error = np.abs(single / double - 1).max()
    print("cost f32", error)
    assert error <= 1e-5, error


# --- vector maths -----------------------------------------------------------------------------------------------------


@cache
def functions() -> Program:
    """Return a program whose state becomes sin, cos, exp, square root and quotient of the state, and 1 over it."""
    graph = Graph()
    start = [graph.input("start", i) for i in range(6)]
    x = [graph.input("carry", i) for i in range(6)]
    following = [x[0].sin(), x[0].cos(), x[1].exp(), x[2].sqrt(), x[3] / x[4], 1.0 / x[5]]
    return Program(graph, 6, 0, tuple(s.index for s in start), tuple(f.index for f in following))


def computed(dtype: type, pool: Pool, **columns: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the arguments as they were rounded and the results, float64, by name."""
    names = ("angle", "power", "square", "over", "under", "inverse")
    size = max(32, *(len(c) for c in columns.values()))
    x = np.ones((6, size), dtype)
    for name, column in columns.items():
        x[names.index(name), : len(column)] = column
    out = rolled(Native(functions(), dtype), pool, x, np.zeros((1, 0, size)))[1].astype(float)
    results = dict(zip(("sin", "cos", "exp", "sqrt", "quotient", "inverse"), out))
    return dict(zip(names, x.astype(float))), results


@pytest.mark.parametrize(("dtype", "angles", "rest"), [(np.float32, 1.5e-7, 3e-7), (np.float64, 1e-14, 1e-15)])
def test_functions_are_accurate(dtype: type, angles: float, rest: float, pool: Pool) -> None:
    rng, count = np.random.default_rng(0), 1_000_000
    angle = rng.uniform(-1e4, 1e4, count)
    angle[: count // 4] = rng.uniform(-np.pi, np.pi, count // 4)
    angle[:4000] = np.arange(-2000, 2000) * (np.pi / 4)  # where the quadrant changes
    share = rng.normal(size=(2, count)) * 10 ** rng.uniform(-12, 12, (2, count))
    square = 10 ** rng.uniform(-30, 30, count)
    x, found = computed(
        dtype, pool, angle=angle, power=rng.uniform(-87, 88, count), square=square, over=share[0], under=share[1], inverse=share[1]
    )
    errors = {
        "sin": np.abs(found["sin"] - np.sin(x["angle"])),
        "cos": np.abs(found["cos"] - np.cos(x["angle"])),
        "exp": np.abs(found["exp"] / np.exp(x["power"]) - 1),
        "sqrt": np.abs(found["sqrt"] / np.sqrt(x["square"]) - 1),
        "quotient": np.abs(found["quotient"] / (x["over"] / x["under"]) - 1),
        "inverse": np.abs(found["inverse"] * x["inverse"] - 1),
    }
    print(np.dtype(dtype), {name: float(error.max()) for name, error in errors.items()})
    for name, error in errors.items():
        bound = angles if name in ("sin", "cos") else 5e-7 if name == "exp" and dtype is np.float32 else rest
        assert error.max() <= bound, (name, error.max(), x["angle"][error.argmax()])


@pytest.mark.parametrize(("dtype", "high", "low"), [(np.float32, 89.0, -87.5), (np.float64, 710.0, -708.5)])
def test_exp_beyond_its_range_is_inf_and_zero(dtype: type, high: float, low: float, pool: Pool) -> None:
    power = np.array([high, 1e4, 1e30, np.inf, low, -1e4, -1e30, -np.inf, np.nan, 0.0, -0.0] + [0.0] * 10)
    found = computed(dtype, pool, power=power)[1]["exp"]
    assert (found[:4] == np.inf).all() and (found[4:8] == 0).all() and np.isnan(found[8]) and (found[9:21] == 1).all(), found


def test_quotients_and_roots_of_the_special(pool: Pool) -> None:
    under, square = np.array([0.0, -0.0, np.nan, 1e-30, 1e30] + [1.0] * 11), np.array([0.0, -1.0, np.nan, np.inf] + [4.0] * 12)
    _, found = computed(np.float32, pool, under=under, square=square, inverse=under)
    for name in ("quotient", "inverse"):
        assert not np.isfinite(found[name][:3]).any() and np.isfinite(found[name][3:]).all(), found[name]
    assert found["sqrt"][0] == 0 and np.isnan(found["sqrt"][1:3]).all() and not np.isfinite(found["sqrt"][3])
    assert (found["sqrt"][4:16] == 2).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_angles_that_are_no_angles_do_not_crash_and_stay_bounded(dtype: type, pool: Pool) -> None:
    top = 38 if dtype is np.float32 else 300
    size = 10 ** np.random.default_rng(0).uniform(4, top, 20_000)
    _, found = computed(dtype, pool, angle=np.concatenate([size, -size, [np.inf, -np.inf, np.nan]]))
    for name in ("sin", "cos"):
        assert not np.isfinite(found[name][-3:]).any()
        finite = np.isfinite(found[name])
        wild = finite & ~(np.abs(np.where(finite, found[name], 0)) <= 1 + 1e-6)
        first = np.concatenate([size, size, [0, 0, 0]])[wild].min(initial=np.inf)
        assert not wild.any(), f"{name} of an angle of {first:.3g} is finite and up to {np.abs(found[name][wild]).max():.3g}"


def test_random_expressions_compile_to_what_numpy_computes(pool: Pool) -> None:
    graph = Graph()
    start, carry = ([graph.input(kind, i) for i in range(4)] for kind in ("start", "carry"))
    made = [x for seed in range(6) for x in random_expressions(seed, [*carry, np.float64(2.5)], 40)[5:] if isinstance(x, Scalar)]
    count = len(made)
    following = (*(x.index for x in made), *(x.index for x in carry))
    # The states are the expressions; the variables are carried behind them.
    shifted = Graph()
    moved: dict[int, int] = {}
    for index, (name, *rest) in enumerate(graph.nodes):
        if name == "input":
            moved[index] = shifted.node(name, rest[0], rest[1] if rest[0] == "start" else count + rest[1])
        else:
            moved[index] = shifted.node(name, *(rest if name == "const" else [moved[i] for i in rest]))
    first = (*(shifted.node("const", 0.0) for _ in range(count)), *(moved[x.index] for x in start))
    program = Program(shifted, count, 0, first, tuple(moved[k] for k in following))
    assert {"select", "max", "min", "exp", "sqrt", "abs", "div", "sin", "cos"} <= set(program.operations)
    numbers = np.random.default_rng(5).normal(size=(4, 70))
    native = Native(program, np.float64)
    x = np.zeros((count, 70))
    x[:4] = numbers
    found = rolled(native, pool, x, np.zeros((1, 0, 70)))[1]
    expected = evaluate(graph, [e.index for e in made], lambda kind, i: numbers[i])
    for k in range(count):
        np.testing.assert_allclose(found[k], np.broadcast_to(expected[k], 70), rtol=1e-9, atol=1e-10)


# --- noise ------------------------------------------------------------------------------------------------------------


def plain_philox(counter: tuple[int, ...], seed: tuple[int, ...]) -> tuple[int, ...]:
    """Return Philox 4x32-10 in whole numbers."""
    mask, c, k = 0xFFFFFFFF, list(counter), list(seed)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & mask, a >> 32 ^ c[3] ^ k[1], a & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    return tuple(c)


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_has_its_known_answers(counter: tuple[int, ...], seed: tuple[int, ...], expected: str) -> None:
    """The answers of Random123 1.14, kat_vectors."""
    assert " ".join(f"{word:08x}" for word in plain_philox(counter, seed)) == expected


def test_numpys_philox_is_philox() -> None:
    assert [int(word.item()) for word in philox(0, 0, 1, 1)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for seed, draw in ((1, 2), (2**31 + 5, 7), (2**32 + 1, 2**31), (2**63 - 1, 2**32 - 1), (0xFFFFFFFF, 0)):
        found = np.stack(philox(seed, draw, 3, 5))
        for group in range(3):
            for sample in range(5):
                expected = plain_philox((sample, group, draw, 0), (seed & 0xFFFFFFFF, seed >> 32))
                assert tuple(found[:, group, sample].tolist()) == expected, (seed, draw, group, sample)


@cache
def drawing(knots: int, nu: int, colour: tuple[tuple[float, ...], ...] | None = None) -> Native:
    """Return a rollout that does nothing but draw."""
    graph = Graph()
    start, carry, command = graph.input("start", 0), graph.input("carry", 0), graph.input("command", nu - 1)
    return Native(Program(graph, 1, nu, (start.index,), ((carry + command).index,)), np.float32, Sampling(knots, colour))


def drawn(native: Native, pool: Pool, samples: int, seed: int, draw: int, knots: int, nu: int, **options: Any) -> np.ndarray:
    """Return the kernel's knots (K * nu, N), standard normal unless ``mean``, ``spread``, ``given`` or ``bound`` say otherwise."""
    rows_, dtype = knots * nu, native.dtype
    fixed = options.get("given", np.zeros((rows_, 0)))
    buffers = {
        "knots": Guarded((rows_, samples), dtype, np.nan),
        "start": Guarded((1,), dtype, 0),
        "mean": Guarded((rows_,), dtype, options.get("mean", 0.0)),
        "spread": Guarded((rows_,), dtype, options.get("spread", 1.0)),
        "lower": Guarded((nu,), dtype, -options.get("bound", 1e9)),
        "upper": Guarded((nu,), dtype, options.get("bound", 1e9)),
        "basis": Guarded((2, knots), dtype, 0.5),
        "states": Guarded((3, 1, samples), dtype, np.nan),
    }
    buffers["knots"].array[:, : fixed.shape[1]] = fixed
    addresses = {name: buffer.array.ctypes.data for name, buffer in buffers.items()}
    counts = {"samples": samples, "steps": 2, "blocks": native.blocks(samples), "fixed": fixed.shape[1]}
    pool.run(native, words(seed=seed, draw=draw, **counts, **addresses))
    assert all(buffer.intact() for buffer in buffers.values())
    made = buffers["knots"].array
    bound = options.get("bound", 1e9)
    commands = (made.reshape(knots, nu, samples)[:, nu - 1].astype(float) * 0.5).sum(0).clip(-bound, bound)
    np.testing.assert_allclose(buffers["states"].array[2, 0], 2 * commands, rtol=1e-5, atol=1e-5)
    return made


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**32 + 5, 2**53 + 12345, 2**63 - 1])
@pytest.mark.parametrize("draw", [0, 1, 1000, 2**32 - 1])
def test_kernels_draw_what_torch_draws(seed: int, draw: int, pool: Pool) -> None:
    found = drawn(drawing(3, 3), pool, 33, seed, draw, 3, 3)
    expected = normals(seed, draw, 9, 33, np.float64)
    error = np.abs(found - normals(seed, draw, 9, 33)).max()
    print("normals", error)
    assert error <= 2e-6, error
    # Next to one a float32 share is good to 2^-25 only, and the radius to its square root.
    assert np.abs(found - expected).max() <= 5e-4 and np.median(np.abs(found - expected)) <= 2e-7


@pytest.mark.parametrize("samples", [32, 33, 65, 250])
def test_draws_are_spread_bounded_and_given_ones_kept(samples: int, pool: Pool) -> None:
    rng = np.random.default_rng(0)
    mean, spread, given = rng.normal(size=6), rng.uniform(0.1, 1, 6), rng.normal(size=(6, 5)).astype(np.float32)
    found = drawn(drawing(2, 3), pool, samples, 3, 4, 2, 3, mean=mean, spread=spread, given=given, bound=0.7)
    white = normals(3, 4, 6, samples, np.float64)
    expected = (mean[:, None] + spread[:, None] * white).clip(-0.7, 0.7)
    expected[:, :5] = given.clip(-0.7, 0.7)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.array_equal(found[:, :5], given.clip(-0.7, 0.7).astype(np.float32))


def test_colour_mixes_along_the_knots(pool: Pool) -> None:
    colour = np.linalg.cholesky(0.5 ** np.abs(np.subtract.outer(np.arange(4), np.arange(4))))
    found = drawn(drawing(4, 2, tuple(map(tuple, colour.tolist()))), pool, 40, 9, 0, 4, 2)
    white = normals(9, 0, 8, 40, np.float64)
    np.testing.assert_allclose(found, (colour @ white.reshape(4, -1)).reshape(8, 40), atol=3e-6)


def test_drawn_numbers_are_standard_normal_and_independent(pool: Pool) -> None:
    count = 50_000
    native = drawing(3, 3)
    parts = {key: drawn(native, pool, count, *key, 3, 3).astype(float) for key in ((1, 0), (1, 1), (2, 0), (2**32 + 1, 0))}
    error = 5 / np.sqrt(count)
    for part in parts.values():
        assert np.abs(part.mean(1)).max() <= error and np.abs((part**2).mean(1) - 1).max() <= error * np.sqrt(2)
        assert np.abs((part**3).mean(1)).max() <= error * np.sqrt(15) and np.abs((part**4).mean(1) - 3).max() <= error * np.sqrt(96)
        assert 3.5 < np.abs(part).max() < 6.8
    everything = np.concatenate(list(parts.values()))
    off = np.corrcoef(everything) - np.eye(len(everything))
    squares = np.corrcoef(everything**2) - np.eye(len(everything))
    beside = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in everything]
    print("correlations", np.abs(off).max(), np.abs(squares).max(), np.abs(beside).max())
    assert max(np.abs(off).max(), np.abs(squares).max(), np.abs(beside).max()) <= error


# --- the cache --------------------------------------------------------------------------------------------------------


def right(native: Native, pool: Pool) -> bool:
    """Return whether code computes."""
    x = np.zeros((6, 32))
    x[1:] = 2.0
    out = rolled(native, pool, x, np.zeros((1, 0, 32)))[1]
    return np.allclose(out[:, 3], [0, 1, np.exp(2), np.sqrt(2), 1, 0.5], rtol=1e-6)


def test_code_is_kept_and_found(tmp_path: Path, pool: Pool) -> None:
    first, second = (Native(functions(), folder=tmp_path) for _ in range(2))
    assert not first.cached and second.cached and first.key == second.key
    assert [path.name for path in tmp_path.iterdir()] == [f"{first.key}.o"]
    assert right(first, pool) and right(second, pool)
    print("cached", first.seconds, second.seconds)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: b"garbage",
        lambda data: b"garbage\n" * 3,
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: data + b"x",
    ],
)
def test_spoilt_code_is_compiled_anew(spoil: Callable[[bytes], bytes], tmp_path: Path, pool: Pool) -> None:
    path = tmp_path / f"{Native(functions(), folder=tmp_path).key}.o"
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    again = Native(functions(), folder=tmp_path)
    assert not again.cached and right(again, pool) and path.read_bytes() == whole
    assert Native(functions(), folder=tmp_path).cached


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_folder_that_cannot_be_written_costs_time_only(
    below: str, tmp_path: Path, pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.INFO):
        natives = [Native(functions(), folder=tmp_path / "file" / below) for _ in range(2)]
    assert all(right(native, pool) and not native.cached for native in natives) and "not kept" in caplog.text


def test_a_folder_is_made_and_leaves_no_litter(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    native = Native(functions(), folder=folder)
    assert [path.name for path in folder.iterdir()] == [f"{native.key}.o"] and folder.stat().st_mode & 0o077 == 0


def test_keys_differ_with_all_that_changes_code(monkeypatch: pytest.MonkeyPatch) -> None:
    single = Native(functions())
    # Made of commands, so that sampling means something.
    base = drawing(3, 3)
    others = [
        Native(base.program, np.float32, s) for s in (Sampling(4), Sampling(3, None, False), Sampling(3, ((1.0, 0, 0),) * 3), None)
    ]
    keys = [single.key, Native(functions(), np.float64).key, base.key, *(native.key for native in others)]
    keys.append(Native(base.program, np.float64, None).key)
    assert len(set(keys)) == len(keys)
    monkeypatch.setattr(native_module, "_lowering", lambda: "another lowering")
    assert Native(functions()).key not in keys


def test_the_cache_folder_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MBCTRL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    Native(functions())
    assert len(list((tmp_path / "own").iterdir())) == 1
    monkeypatch.delenv("MBCTRL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mbctrl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "mbctrl"


def test_vectors_fill_the_processors_registers() -> None:
    single, double = lanes_of(np.float32), lanes_of(np.float64)
    assert single.width == 2 * double.width and single.width * single.bits == double.width * double.bits in (128, 256, 1024)
