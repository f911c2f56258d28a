"""The CUDA lowering: its source as plain C against the reference and the processor's kernel, compiled, and launched."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sample_models import model_of, random_states, relative
from test_kernels import Guarded
from test_networks import arrays_of, rollout

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import ModelError
from mbctrl.base.plan import PlanRequest
from mbctrl.base.scene import Obstacle
from mbctrl.dynamics.load import load_model
from mbctrl.kernels import gpu
from mbctrl.kernels.cuda import COUNTS, SLOTS, required, source
from mbctrl.kernels.graph import Graph, evaluate, maximum, minimum, where
from mbctrl.kernels.llvm import Lowering, Sampling, words
from mbctrl.kernels.native import Native, Pool, lanes_of
from mbctrl.kernels.network import Network, offsets
from mbctrl.kernels.program import Program
from mbctrl.kernels.step import Drive
from mbctrl.kernels.trace import Goal, trace_dynamics, trace_objective
from mbctrl.planning import backends
from mbctrl.planning.controller import MpcController, scales_of
from mbctrl.planning.engines import GpuEngine
from mbctrl.planning.knots import Knots
from mbctrl.planning.noise import Noise, Shape
from mbctrl.planning.white import normals
from mbctrl.tasks.task import build_task

COMPILER = shutil.which("cc") or shutil.which("gcc")
N, H, K = 37, 12, 4
SEED, DRAW = 0x1234567890ABCDEF, 7


def has_gpu() -> bool:
    try:
        gpu._device(0)
    except ModelError:
        return False
    return torch.cuda.is_available()


@pytest.fixture
def nvrtc() -> Any:
    try:
        return gpu._nvrtc()
    except ModelError as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Job:
    """A program, how its commands come, and the arrays of a rollout."""

    program: Program
    sampling: Sampling | None
    arrays: dict[str, np.ndarray]
    fixed: int = 0

    def copy(self, dtype: type) -> dict[str, np.ndarray]:
        """Return new contiguous arrays, outputs not a number yet."""
        out = {name: np.array(a, dtype, order="C") for name, a in self.arrays.items() if name != "key"}
        out |= {"cost": np.full(N, np.nan, dtype), "states": np.full((H + 1, self.program.states, N), np.nan, dtype)}
        return out | {"key": np.array([SEED, DRAW], np.int64)}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Compile a source as C; one call of what is returned does one sample."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("host")

    @cache
    def compiled(text: str) -> Any:
        number = len(list(folder.glob("*.c")))
        path, library = folder / f"rollout{number}.c", folder / f"rollout{number}.so"
        path.write_text(text)
        command = [COMPILER, "-O1", "-Wall", "-Werror", "-Wno-unused-variable", "-shared", "-fPIC", "-o", library, path, "-lm"]
        subprocess.run(command, check=True, timeout=60)
        run = ctypes.CDLL(str(library)).rollout
        run.argtypes, run.restype = [ctypes.c_int64] * (len(SLOTS) + 1), None
        return run

    return compiled


def on_host(job: Job, dtype: type, host: Any, without: tuple[str, ...] = (), extra: int = 0) -> dict[str, np.ndarray]:
    """Roll a job out as C; ``extra`` threads more than samples, whose costs begin at -1."""
    run = host(source(job.program, dtype, job.sampling))
    arrays = {name: array for name, array in job.copy(dtype).items() if name not in without}
    arrays["cost"] = np.concatenate([arrays["cost"], np.full(extra, -1, dtype)])
    values = {"samples": N, "steps": H, "fixed": job.fixed, **{name: array.ctypes.data for name, array in arrays.items()}}
    for thread in range(N + extra):
        run(*(values.get(name, 0) for name in SLOTS), thread)
    return arrays


def on_processor(job: Job, dtype: type, folder: Path) -> dict[str, np.ndarray]:
    """Roll a job out with the processor's kernel."""
    try:
        native = Native(job.program, dtype, job.sampling, folder)
    except ModelError as error:
        pytest.skip(str(error))
    arrays = job.copy(dtype)
    slots = {name: array.ctypes.data for name, array in arrays.items() if name != "key"}
    Pool(1).run(native, words(blocks=native.blocks(N), samples=N, steps=H, fixed=job.fixed, seed=SEED, draw=DRAW, **slots))
    return arrays


def reference(job: Job) -> dict[str, np.ndarray]:
    """Roll a job out with numpy in float64."""
    program, a = job.program, job.copy(np.float64)
    starts = offsets(program.networks)

    def network(k: int, gate: Any, inputs: list[Any]) -> np.ndarray:
        return program.networks[k].values(a["weights"][starts[k] : starts[k + 1]], gate, inputs)

    commands = a.get("commands")
    if job.sampling is not None:
        if job.sampling.draws:
            noise = Noise("white", Shape(K, program.commands, N), dtype=torch.float64).draw(SEED, DRAW).numpy()
            if job.sampling.colour is not None:
                noise = np.einsum("kl,ljn->kjn", np.array(job.sampling.colour), noise)
            drawn = a["mean"][..., None] + a["spread"][..., None] * noise
            drawn[..., : job.fixed] = a["knots"][..., : job.fixed]
            a["knots"] = np.clip(drawn, a["lower"][:, None], a["upper"][:, None])
        commands = np.clip(np.einsum("hk,kjn->hjn", a["basis"], a["knots"]), a["lower"][:, None], a["upper"][:, None])
    read = {"uniform": lambda i: a["uniform"][i], "sample": lambda i: a["sample"][i], "start": lambda i: a["start"][i]}
    carried = evaluate(program.graph, list(program.first), lambda kind, i: read[kind](i), network)
    states = [np.array([np.broadcast_to(x, N) for x in carried[: program.states]])]
    for step in range(H):
        at = {"carry": lambda i: carried[i], "command": lambda j: commands[step, j], "table": lambda i: a["table"][step, i], **read}
        carried = evaluate(program.graph, list(program.following), lambda kind, i: at[kind](i), network)
        states.append(np.array([np.broadcast_to(x, N) for x in carried[: program.states]]))
    cost = carried[program.cost] if program.cost is not None else a["cost"]
    return a | {"states": np.array(states), "cost": cost}


@cache
def arm_job(name: str, each: bool = False) -> Job:
    """A compensated impedance arm with friction, every sample with its own start and commands."""
    tree = model_of(name, True)[1]
    n = tree.n
    stiffness, damping, limit = (tuple(np.linspace(*ends, n)) for ends in ((300, 50), (20, 5), (40, 10)))
    drive = Drive(range(n), stiffness, damping, limit, True, "euler", 0.02)
    parameters = ("mass", "damping") if each else ()
    traced = trace_dynamics(tree, drive, parameters, each)
    q, v, tau = random_states(tree, N)
    arrays = {
        "start": np.concatenate([q, v], 1).T,
        "commands": np.repeat((q + 0.2 * tau).T[None], H, 0),
        "uniform": np.array([0.01]),
        "sample": np.concatenate([np.repeat(np.ravel(getattr(tree, p))[:, None], N, 1) for p in parameters] or [np.zeros((1, N))]),
    }
    arrays["sample"] *= np.random.default_rng(3).uniform(0.8, 1.2, arrays["sample"].shape)
    return Job(traced.program, None, arrays)


@cache
def task_job(draws: bool = True, coloured: bool = True) -> Job:
    """A Panda that reaches with an obstacle in its way; the first three samples are given."""
    model, rng = load_model("panda"), np.random.default_rng(5)
    robot, tree = model.robot, model.tree
    n = tree.n
    spec = {
        name: {"weight": weight} for name, weight in (("reach", 10.0), ("velocity", 0.5), ("joint_limits", 100.0), ("avoid", 9.0))
    }
    task = build_task({**spec, "smoothness": {"weight": 0.02, "scale": 0.05}}, scales_of(robot))
    drive = Drive(range(n), (200.0,) * n, (20.0,) * n, tuple(robot.limits.effort), True, "euler", 0.02)
    ball = Obstacle(name="ball", shape="sphere", position=(0.4, 0.0, 0.5), size=(0.1,))
    traced = trace_objective(tree, drive, 0.03, tree.frames[robot.tool], task, Goal(position=True, rotation=True), [ball])
    table = rng.uniform(0.1, 1, (H, traced.program.sizes["table"]))
    table[:, traced.table["r_target"]] = np.eye(3).ravel()
    home = np.array(robot.home)
    colour = Noise("coloured", Shape(K, n, N), dtype=torch.float64).colour if coloured else None
    arrays = {
        "start": np.concatenate([home + 0.05, np.full(n, 0.1)]),
        "table": table,
        "uniform": home,
        "basis": Knots(K, H, 0.03).basis,
        "knots": home[:, None] + rng.normal(0, 0.3, (K, n, N)),
        "mean": home + rng.normal(0, 0.05, (K, n)),
        "spread": rng.uniform(0.05, 0.2, (K, n)),
        "lower": home - 0.3,
        "upper": home + 0.25,
    }
    sampling = Sampling(K, None if colour is None else tuple(map(tuple, colour.tolist())), draws)
    return Job(traced.program, sampling, arrays, fixed=3 if draws else 0)


def every_operation() -> Job:
    """A small rollout with each operation and input, a swap of carried values, invariants and a value nothing needs."""
    g = Graph()
    x, y, cost, _ = (g.input("carry", i) for i in range(4))
    u, w, s, p = g.input("command", 0), g.input("table", 1), g.input("sample", 0), g.input("uniform", 0)
    held = (p * p + s).sqrt()
    turned = (x.sin() * held.cos() - x.cos() * (-s).exp()) / (y * y + 1.5)
    chosen = where(x < u, maximum(-0.25, turned), minimum(turned, y - 2.5) + abs(u) * w)
    following = (y, chosen, cost + chosen * chosen, cost * 3.0)
    first = (g.input("start", 0), g.input("start", 1) * s, g.input("uniform", 1), g.input("uniform", 0))
    program = Program(
        g, 2, 1, tuple(map(g.operand, first)), tuple(map(g.operand, following)), 2, {"table": 2, "uniform": 2, "sample": 1}
    )
    rng = np.random.default_rng(0)
    shapes = {"start": (2, N), "commands": (H, 1, N), "table": (H, 2), "sample": (1, N), "uniform": (2,)}
    return Job(program, None, {name: rng.uniform(0.5, 1.5, shape) for name, shape in shapes.items()})


@cache
def two_networks() -> Job:
    """A rollout that calls two networks: one from two places, the other once for all steps and once in vain."""
    g, shapes = Graph(), (Network((2, 5, 2), "tanh"), Network((1, 4, 3), "relu"))
    x, y, s = g.input("carry", 0), g.input("carry", 1), g.input("sample", 0)
    held = g.network(1, shapes[1], [s], 2.0)
    a = g.network(0, shapes[0], [x, y * 2], where(x < y, 1.0, 0.25))
    b = g.network(0, shapes[0], [a[0], held[2]], s)
    g.network(1, shapes[1], [x], y)
    first, following = (g.input("start", 0), held[0] * 0.1), (a[1] + b[0], b[1] * held[1])
    sizes = {"table": 0, "uniform": 0, "sample": 1}
    program = Program(g, 2, 0, tuple(map(g.operand, first)), tuple(map(g.operand, following)), None, sizes, shapes)
    rng = np.random.default_rng(6)
    arrays = {"start": rng.normal(size=(2, N)), "commands": np.zeros((H, 0, N)), "sample": rng.normal(size=(1, N))}
    arrays["sample"][0, ::5] = 0.0
    return Job(
        Program.from_dict(json.loads(json.dumps(program.to_dict()))),
        None,
        arrays | {"weights": rng.normal(size=offsets(shapes)[-1])},
    )


def learned_job(activation: str) -> Job:
    """A network of two hidden layers that feeds the state; gates of each sample and step, some 0 and some below."""
    program = rollout((21, 96, 96, 14), activation)
    arrays = arrays_of(program, H, N, keep=0.5)
    arrays["sample"][0] = np.arange(N) % 4 / 4.0
    arrays["table"][:, 0] = np.arange(H) % 3 - 0.5
    return Job(program, None, arrays)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("which", ["two", "tanh", "silu", "relu"])
def test_networks_match_the_reference_and_the_processor(host: Any, which: str, dtype: type, bound: float, tmp_path: Path) -> None:
    job = two_networks() if which == "two" else learned_job(which)
    found, other, expected = on_host(job, dtype, host), on_processor(job, dtype, tmp_path), reference(job)
    errors = [relative(one["states"], expected["states"]) for one in (found, other)]
    print(np.dtype(dtype), which, errors, relative(found["states"], other["states"]))
    assert max(errors) < bound and relative(found["states"], other["states"]) < bound
    assert "weights" in required(job.program, None)


def test_a_network_is_computed_where_its_gate_is_not_zero_and_only_there(host: Any) -> None:
    job = learned_job("silu")
    job.arrays["sample"][0, 3] = np.nan
    job.arrays["weights"][:] = np.nan
    states, spoilt = on_host(job, np.float32, host)["states"], np.arange(N) == 3
    gates = job.arrays["table"][:2] * job.arrays["sample"]  # the first step's: none above zero
    assert (gates[0, ~spoilt] <= 0).all() and (gates[1] > 0).any() and (gates[1] == 0).any()
    for k, gate in enumerate(gates):
        on = (gate > 0) | spoilt
        assert np.isnan(states[k + 1][:, on]).all() and np.array_equal(states[k + 1][:, ~on], 0.5 * states[k][:, ~on])


@pytest.mark.parametrize("activation", ["tanh", "silu", "relu"])
def test_an_input_that_is_no_number_is_seen_in_its_sample_only(host: Any, activation: str) -> None:
    job = learned_job(activation)
    job.arrays["sample"][:] = np.where(np.arange(N) % 2, 1.0, -1.0)
    job.arrays["table"][:] = 1.0
    good = on_host(job, np.float32, host)["states"][1]
    job.arrays["commands"][0, 2, [4, 5]] = np.nan  # only in the second the network is on
    found = on_host(job, np.float32, host)["states"][1]
    assert np.isnan(found[:, 5]).all() and np.array_equal(np.delete(found, 5, 1), np.delete(good, 5, 1))


@pytest.mark.parametrize("rows", range(1, 10))
def test_a_layer_keeps_to_its_rows(host: Any, rows: int) -> None:
    text = source(learned_job("silu").program, np.float64).replace("KERNEL rollout(", "KERNEL unused(")
    layer = host(
        f"{text}KERNEL rollout(word w, word columns, word rows, word x, word y) {{\n"
        "  layer((const real*)w, (int)columns, (int)rows, (const real*)x, (real*)y);\n}\n"
    )
    rng = np.random.default_rng(rows)
    matrix, bias, x, y = rng.normal(size=(rows, 5)), rng.normal(size=rows), rng.normal(size=5), Guarded((rows,), np.dtype(float), 0)
    weights = np.concatenate([matrix.ravel(), bias])
    given = [weights.ctypes.data, 5, rows, x.ctypes.data, y.array.ctypes.data]
    layer(*given, *[0] * (len(SLOTS) + 1 - len(given)))
    assert y.intact() and np.abs(y.array - (matrix @ x + bias)).max() < 1e-14


def test_calls_are_counted_held_where_nothing_varies_and_left_out_where_unused() -> None:
    program = two_networks().program
    assert program.operations == {"less": 1, "select": 1, "mul": 2, "add": 1, "network": 3}
    assert program.operation_count == 5 + 2 * (2 * 20 + 7) + (2 * 16 + 7)
    before, loop = Lowering(program, lanes_of(np.float64), None).text().split("\nloop:\n")
    assert before.count(".done:") == 1 and loop.count(".done:") == 2
    before, loop = source(program)[source(program).index("rollout(") :].split("for (word step")
    assert before.count("real here[") == 1 and loop.count("real here[") == 2


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_networks_compile(nvrtc: Any, dtype: type, arch: str) -> None:
    for job in (learned_job("silu"), two_networks()):
        found = gpu.usage(source(job.program, dtype), arch)
        print(arch, np.dtype(dtype), found)
        assert found.registers <= 255 and found.spill_stores + found.spill_loads <= 64


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-13), (np.float32, 2e-6)])
def test_every_operation_matches_the_reference(host: Any, dtype: type, bound: float) -> None:
    job = every_operation()
    found, expected = on_host(job, dtype, host), reference(job)
    assert relative(found["states"], expected["states"]) < bound
    assert relative(found["cost"], expected["cost"]) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-11), (np.float32, 1e-4)])
@pytest.mark.parametrize(("name", "each"), [("panda", False), ("ur10e", True), ("random0", False), ("crowded", False)])
def test_arms_match_the_reference(host: Any, name: str, each: bool, dtype: type, bound: float) -> None:
    job = arm_job(name, each)
    found, expected = on_host(job, dtype, host), reference(job)
    assert relative(found["states"], expected["states"]) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-11), (np.float32, 2e-5)])
@pytest.mark.parametrize(("draws", "coloured"), [(True, True), (True, False), (False, False)])
def test_candidates_and_costs_match_the_reference(host: Any, draws: bool, coloured: bool, dtype: type, bound: float) -> None:
    job = task_job(draws, coloured)
    found, expected = on_host(job, dtype, host), reference(job)
    for name in ("knots", "states", "cost"):
        assert relative(found[name], expected[name]) < bound, name
    alone = on_host(job, dtype, host, without=("states",))
    assert np.array_equal(alone["cost"], found["cost"])


def test_it_is_the_processors_kernel(host: Any, tmp_path: Path) -> None:
    job = task_job()
    found, other = on_host(job, np.float32, host), on_processor(job, np.float32, tmp_path)
    for name in ("knots", "states", "cost"):
        assert relative(found[name], other[name]) < 2e-5, name


def test_the_noise_is_the_planners(host: Any) -> None:
    job = task_job(coloured=False)
    n = job.program.commands
    wide = {"mean": np.zeros((K, n)), "spread": np.ones((K, n)), "lower": np.full(n, -99.0), "upper": np.full(n, 99.0)}
    found = on_host(Job(job.program, job.sampling, job.arrays | wide), np.float32, host)["knots"]
    expected = normals(SEED, DRAW, K * n, N).reshape(K, n, N)
    assert np.abs(found - expected).max() < 2e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_sample_only(host: Any, bad: float) -> None:
    clean = task_job(draws=False)
    start = np.repeat(clean.arrays["start"][:, None], N, 1)
    commands = np.einsum("hk,kjn->hjn", clean.arrays["basis"], clean.arrays["knots"])
    job = Job(clean.program, None, clean.arrays | {"start": start, "commands": commands})
    good = on_host(job, np.float32, host)["cost"]
    start[3, 5] = bad
    found = on_host(job, np.float32, host)["cost"]
    assert np.isfinite(good).all() and np.isnan(found[5])
    assert np.array_equal(np.delete(found, 5), np.delete(good, 5))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extremes_of_what_is_no_number_are_the_references(host: Any, dtype: type) -> None:
    g = Graph()
    x, y, cost = (g.input("carry", i) for i in range(3))
    p = g.input("sample", 0)
    following = (maximum(p, x), minimum(p, y), cost + 1.0)  # a cost that looks at no state
    first = (g.input("start", 0), g.input("start", 1), g.input("sample", 1))
    program = Program(g, 2, 1, tuple(map(g.operand, first)), tuple(map(g.operand, following)), 2, {"sample": 2})
    values = (np.nan, np.inf, -np.inf, 1.0, 2.0)
    grid = np.resize(np.array([(a, b) for a in values for b in values]).T, (2, N))
    job = Job(program, None, {"start": grid[[0, 0]], "sample": np.stack([grid[1], np.zeros(N)]), "commands": np.zeros((H, 1, N))})
    found, expected = on_host(job, dtype, host), reference(job)
    assert np.array_equal(found["states"], expected["states"], equal_nan=True)
    assert np.array_equal(found["cost"], np.where(np.isfinite(expected["states"][-1]).all(0), H, np.nan), equal_nan=True)


def test_a_given_knot_that_is_no_number_is_not_clipped_into_one(host: Any) -> None:
    job = task_job()
    knots = job.arrays["knots"].copy()
    knots[1, 2, 0] = np.nan
    found = on_host(Job(job.program, job.sampling, job.arrays | {"knots": knots}, job.fixed), np.float32, host)
    assert np.isnan(found["knots"][1, 2, 0]) and np.isnan(found["cost"][0]) and np.isfinite(found["cost"][1:]).all()


def test_threads_beyond_the_samples_do_nothing(host: Any) -> None:
    cost = on_host(task_job(), np.float32, host, extra=91)["cost"]
    assert (cost[N:] == -1).all() and np.isfinite(cost[:N]).all()


def test_what_does_not_vary_is_computed_once_and_what_nobody_needs_not_at_all() -> None:
    text = source(every_operation().program)
    before, loop = text[text.index("rollout(") :].split("for (word step")
    assert "SQRT(" in before and "EXP(" in before and "SQRT(" not in loop and "EXP(" not in loop
    assert "real c2 =" in before and "c3" not in before + loop


def test_numbers_keep_their_value_in_the_kernels_precision() -> None:
    g = Graph()
    values = (np.pi, -1e-30, 1e300, -1e300, np.nan)
    carried = tuple(g.operand(g.input("carry", k) * 1.0 + v) for k, v in enumerate(values))
    program = Program(g, len(values), 1, tuple(g.operand(g.input("start", k)) for k in range(len(values))), carried)
    single, double = source(program), source(program, np.float64)
    assert "3.1415927f" in single and "(-1e-30f)" in single and "+ INFINITE" in single and "(-INFINITE)" in single
    assert "3.141592653589793;" in double and "NOT_A_NUMBER" in double and "1e+300" in double


@pytest.mark.parametrize("sampling", [None, Sampling(K), Sampling(K, draws=False)])
def test_required_arguments_are_those_the_kernel_reads(sampling: Sampling | None) -> None:
    program = task_job().program
    text = source(program, np.float32, sampling)
    body = text[text.index("const word n = THREAD") :]
    read = {name for name in SLOTS if f" {name}[" in body or f"){name}[" in body or f"({name}[" in body or name in COUNTS[:2]}
    assert set(required(program, sampling)) == read - {"states"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_an_arm_compiles_to_registers(nvrtc: Any, arch: str) -> None:
    job = task_job()
    found = gpu.usage(source(job.program, np.float32, job.sampling), arch)
    assert 32 < found.registers <= 255 and found.spill_stores + found.spill_loads <= 64


def test_compiled_code_is_kept(nvrtc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = source(every_operation().program)
    codes = {arch: gpu.compile_program(text, arch, tmp_path) for arch in ("sm_80", "sm_90", "compute_80")}
    assert codes["sm_80"][:4] == codes["sm_90"][:4] == b"\x7fELF" and b".visible .entry rollout" in codes["compute_80"]
    monkeypatch.setattr(gpu, "_compile", None)
    assert {arch: gpu.compile_program(text, arch, tmp_path) for arch in codes} == codes
    assert len(list(tmp_path.iterdir())) == 3


def test_a_source_that_does_not_compile_is_one_line(nvrtc: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dynamics.device: the CUDA compiler refuses the source for sm_90: .*nonsense") as caught:
        gpu.compile_program("nonsense;", "sm_90", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", ["cuda.core", "cuda.bindings"])
def test_without_the_binding_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    gpu._nvrtc.cache_clear()
    with pytest.raises(ModelError, match=r'^dynamics\.device: .*pip install "mbctrl\[cuda\]"'):
        gpu._device(0) if module == "cuda.core" else gpu._nvrtc()


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    pytest.importorskip("cuda.core")
    with pytest.raises(ModelError, match=r"^dynamics\.device: no CUDA device 0 here"):
        gpu.GpuKernel(every_operation().program)


class StandIn:
    """A ``cuda.core`` whose launches run the source on the host."""

    LEGACY_DEFAULT_STREAM = "default"
    Stream = SimpleNamespace(from_handle=lambda handle: handle)
    LaunchConfig = SimpleNamespace

    def __init__(self, run: Any) -> None:
        self.run, self.launches = run, []
        self.ObjectCode = SimpleNamespace(from_cubin=lambda code: SimpleNamespace(get_kernel=lambda name: (code, name)))

    def launch(self, stream: Any, config: Any, kernel: Any, *values: int) -> None:
        self.launches.append((stream, config.grid, config.block, kernel))
        for thread in range(config.grid * config.block):
            self.run(*values, thread)


def test_a_launch_covers_all_samples_and_passes_its_arguments(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = task_job()
    core = StandIn(host(source(job.program, np.float32, job.sampling)))
    device = SimpleNamespace(compute_capability=(9, 0), sync=lambda: None)
    monkeypatch.setattr(gpu, "_device", lambda index: (core, device))
    monkeypatch.setattr(gpu, "compile_program", lambda text, arch, folder: arch)
    kernel = gpu.GpuKernel(job.program, np.float32, job.sampling, block=16)
    arrays = job.copy(np.float32)
    slots = {name: array.ctypes.data for name, array in arrays.items() if name in SLOTS}
    kernel.launch(77, samples=N, steps=H, fixed=job.fixed, **slots)
    assert core.launches == [("default", 1, 16, ("sm_90", "rollout")), (77, 3, 16, ("sm_90", "rollout"))]
    assert np.array_equal(arrays["cost"], on_host(job, np.float32, host)["cost"])
    with pytest.raises(ValueError, match=r"missing: \['cost'\], unknown: \['costs'\]"):
        kernel.launch(0, samples=N, steps=H, costs=1, **{name: a for name, a in slots.items() if name != "cost"})
    with pytest.raises(ValueError, match="fixed <= samples"):
        kernel.launch(0, samples=N, steps=H, fixed=N + 1, **slots)


@pytest.mark.skipif(not has_gpu(), reason="no GPU")
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("job", [task_job, two_networks, lambda: learned_job("silu")])
def test_on_a_gpu_it_matches_the_reference(tmp_path: Path, captured: bool, job: Callable[[], Job]) -> None:
    job = job()
    kernel = gpu.GpuKernel(job.program, np.float32, job.sampling, folder=tmp_path)
    tensors = {name: torch.from_numpy(array).cuda() for name, array in job.copy(np.float32).items()}

    def launch() -> None:
        slots = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        kernel.launch(torch.cuda.current_stream().cuda_stream, samples=N, steps=H, fixed=job.fixed, **slots)

    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        graph.replay()
    else:
        launch()
    torch.cuda.synchronize()
    expected = reference(job)
    for name in ("knots", "states", "cost") if job.sampling else ("states",):
        assert relative(tensors[name].cpu().numpy(), expected[name]) < 5e-5, name


def test_the_gpu_engine_plans_what_the_processor_plans(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's side of a GPU: tensors, key, stream and counts, the kernel itself run on the host."""

    class OnHost:
        def __init__(self, program: Program, dtype: type, sampling: Sampling | None, *, device: int) -> None:
            self.run = host(source(program, dtype, sampling))

        def launch(self, stream: int, **values: int) -> None:
            assert stream == 7
            for thread in range(values["samples"]):
                self.run(*(values.get(name, 0) for name in SLOTS), thread)

    monkeypatch.setattr(gpu, "GpuKernel", OnHost)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    config, file = load_run("panda_reach_sim")
    small = merged(config.model_dump(), {"planner": {"samples": 40}, "dynamics": {"backend": "kernel"}})
    here = MpcController(RunConfig.model_validate(small), load_model("panda"), file)
    monkeypatch.setattr(backends, "_engine_of", lambda device, pool: GpuEngine(torch.device("cpu")))
    there = MpcController(RunConfig.model_validate(small), load_model("panda"), file)
    x = np.array([*here.model.robot.home, *[0.1] * 7])
    request, before, found = PlanRequest(0.0, x), np.asarray(here.model.robot.home), []
    for one in (here, there):
        state, start, parameters = (
            one.planner.initial(one._array(before), seed=2**63 + 5),
            one._array(x),
            one.parameters(request, before),
        )
        fixed = state.belief.mean[..., None]
        found.append([*one.planner.search(state.belief, fixed, state.seed, 3, start, parameters)])
    assert isinstance(found[0][0], np.ndarray) and isinstance(found[1][0], torch.Tensor)
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-4, atol=0)
    for stamp in (0.0, 0.02, 0.04):
        plans = [one.plan(PlanRequest(stamp, x, latency=0.01, fan=3)) for one in (here, there)]
        np.testing.assert_allclose(plans[1].u, plans[0].u, rtol=0, atol=1e-5)
        np.testing.assert_allclose(plans[1].x, plans[0].x, rtol=0, atol=1e-4)
        np.testing.assert_allclose(plans[1].fan, plans[0].fan, rtol=0, atol=1e-4)
