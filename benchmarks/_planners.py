"""One planner in all its forms, exported and not: how long an iteration takes, and whether they answer alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import row

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.scene import Obstacle
from mbctrl.base.spec import validate
from mbctrl.cli.build import load_run_model
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.residual import Residual
from mbctrl.export.bundle import export_bundle, random_case
from mbctrl.export.planner import PlannerGraphs
from mbctrl.planning.controller import MpcController
from mbctrl.planning.planner import Parameters, Planner, PlannerState
from mbctrl.planning.rules.base import Distribution
from mbctrl.runtime.bundle import Bundle, load_bundle
from mbctrl.runtime.onnx_planner import OnnxPlanner, Session, usable
from mbctrl.runtime.planner import build_planner, candidate_costs, cost_error, golden_cases

ENOUGH = 1000
"""Iterations it takes to speak of p99.9."""
_COMPILING = 120.0  # [s] torch.compile may take
_MODELS: dict[str, Model] = {}


@dataclass(frozen=True)
class Exported:
    """A run and its bundle."""

    config: RunConfig
    file: Path
    model: Model
    bundle: Bundle


def resolved(name: str, changes: dict[str, Any]) -> tuple[RunConfig, Path]:
    """Return scenario ``name`` with ``changes`` laid over it; ``settings`` among them replace the rule's, one thread each.

    ``steps`` in ``changes`` is the horizon in time steps of the model.
    """
    config, file = load_run(name)
    changes = dict(changes)
    steps = changes.pop("steps", None)
    data = merged(config.model_dump(), {"dynamics": {"threads": 1}})
    data = merged(data | ({"settings": {}} if "settings" in changes else {}), changes)
    if steps is not None:
        data = merged(data, {"planner": {"horizon": steps * data["dynamics"]["dt"]}})
    return validate(RunConfig, data, file), file


def exported(name: str, changes: dict[str, Any], folder: Path) -> Exported:
    """Export scenario ``name`` with ``changes`` to ``folder``, where it is not there yet."""
    config, file = resolved(name, changes)
    model = _MODELS.setdefault(name, load_run_model(config, file))
    if not folder.exists():
        export_bundle(config, model, folder, file)
    return Exported(config, file, model, load_bundle(folder))


def write_ensemble(path: Path, name: str, networks: int, hidden: tuple[int, ...]) -> None:
    """Write a residual of that many networks for scenario ``name``'s arm, learnt from nothing: its figures are of time alone."""
    config, file = load_run(name)
    model = _MODELS.setdefault(name, load_run_model(config, file))
    rng, robot, turning = np.random.default_rng(0), model.robot, sum(model.tree.revolute)
    sizes = (2 * turning + (robot.nq - turning) + robot.nq + robot.nu, *hidden, robot.nq)
    layers = tuple((rng.normal(0, a**-0.5, (networks, b, a)), np.zeros((networks, b))) for a, b in zip(sizes, sizes[1:]))
    table = Obstacle(name="table", shape="plane", position=(0.0, 0.0, 0.2))
    one, small = np.ones(sizes[0]), np.full(robot.nq, 0.01)  # [rad/s]
    made = Residual(layers, "tanh", 0 * one, one, small, 0.05, 0.5, config.dynamics.dt, robot.name, robot.joints, (table,))
    made.save(path)


def torch_controller(of: Exported) -> MpcController:
    """Return the planner the bundle was made of, in eager torch on the processor."""
    dynamics = of.config.dynamics.model_copy(update={"backend": "torch", "device": "cpu"})
    return MpcController(of.config.model_copy(update={"dynamics": dynamics}), of.model, of.file)


# --- latency ----------------------------------------------------------------------------------------------------------


def latency_rows(label: str, of: Exported, quick: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return one iteration's p50, p99 and, of 1000 iterations, p99.9 on every engine, and how onnxruntime's p50 compares.

    ``quick`` leaves out torch.compile, which takes minutes to compile.
    """
    times: dict[str, np.ndarray] = {}
    for name, call in engines(of).items():
        say(f"{label}: {name}")
        times[name] = measured(call(), quick)
    if not quick:
        say(f"{label}: torch.compile")
        compiled = _compiled(of)
        if isinstance(compiled, str):
            say(f"{label}: torch.compile {compiled}: no figures of it")
        else:
            times["torch.compile, 1 thread"] = compiled
    base, out = np.median(times["onnxruntime cpu, 1 thread"]), []
    for name, used in times.items():
        shares = (50, 99, 99.9) if len(used) >= ENOUGH else (50, 99)
        out += [row(f"{label}: {name}: p{share:g}", np.percentile(used, share) * 1e3, "ms") for share in shares]
        if name != "onnxruntime cpu, 1 thread":
            out.append(row(f"{label}: {name}: onnxruntime cpu over it", base / np.median(used), "x"))
    return out


def engines(of: Exported) -> dict[str, Callable[[], Callable[[int], Any]]]:
    """Return what makes each engine usable here, by name; an engine is a function that does the k-th iteration."""
    bundle = of.bundle
    found: dict[str, Callable[[], Callable[[int], Any]]] = {
        f"kernel, {threads} thread{'s' * (threads > 1)}": lambda threads=threads: on_engine(bundle, "kernel", threads=threads)
        for threads in (1, 2)
    }
    found["onnxruntime cpu, 1 thread"] = lambda: on_engine(bundle, "onnx")
    found["onnxruntime cpu, unrolled, 1 thread"] = lambda: _unrolled(bundle)
    found["torch eager, 1 thread"] = lambda: _eager(of)
    for provider in usable():
        if provider != "cpu":
            found[f"onnxruntime {provider}"] = lambda provider=provider: on_engine(bundle, "onnx", provider)
    return found


def on_engine(bundle: Bundle, engine: str, provider: str = "cpu", threads: int = 1) -> Callable[[int], Any]:
    """Return the exported planner's iterations on an engine of the runtime."""
    return _iterations(build_planner(bundle, engine, provider, threads).planner, _cases(bundle))


def _unrolled(bundle: Bundle) -> Callable[[int], Any]:
    planner = build_planner(bundle, "onnx", threads=1).planner
    assert isinstance(planner, OnnxPlanner)
    planner._session = Session("iter_unrolled.onnx", bundle.files["iter_unrolled.onnx"])
    return _iterations(planner, _cases(bundle))


def _eager(of: Exported, compile: bool = False) -> Callable[[int], Any]:
    torch.set_num_threads(1)
    planner = torch_controller(of).planner
    if compile:
        planner.search.objective = torch.compile(planner.search.objective, dynamic=False)
    iterate = _iterations(planner, [tuple(in_torch(part) for part in case) for case in _cases(of.bundle)])

    def run(k: int) -> Any:
        with torch.no_grad():
            return iterate(k)

    return run


def _iterations(planner: Planner, cases: list[Any]) -> Callable[[int], Any]:
    return lambda k: planner.iterate(*cases[k % len(cases)])


def _cases(bundle: Bundle) -> list[Any]:
    """Return the golden vectors that look at all there is: with a tool's rotation, where some have one."""
    cases = [(state, x, parameters) for state, x, parameters, _ in golden_cases(bundle)]
    return [case for case in cases if case[2].r_target is not None] or cases


def measured(call: Callable[[int], Any], quick: bool) -> np.ndarray:
    """Return the times of iterations [s] after three to warm up: 1000 (quick: 100), fewer if that takes over a minute (6 s)."""
    for k in range(3):
        call(k)
    count, limit = (100, 6.0) if quick else (ENOUGH, 60.0)
    times, begun = [], time.perf_counter()
    while len(times) < count and (time.perf_counter() - begun < limit or len(times) < 20):
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return np.asarray(times)


def _compiled(of: Exported) -> np.ndarray | str:
    """Return the times of the objective compiled by torch in a process of its own, or why there are none."""
    context = get_context("spawn")
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_compile, args=(theirs, of.config, of.file, of.bundle.folder), daemon=True)
    process.start()
    theirs.close()
    try:
        if not pipe.poll(_COMPILING + 30.0):  # its imports too
            return f"did not come to an end within {_COMPILING:g} s"
        if (said := pipe.recv()) is not None:
            return said
        times = pipe.recv()
        process.join(10)
        return times
    except EOFError:
        return "died"
    finally:
        process.kill()
        process.join()


def _compile(pipe: Any, config: RunConfig, file: Path, folder: Path) -> None:
    of = Exported(config, file, load_run_model(config, file), load_bundle(folder))
    try:
        call = _eager(of, compile=True)
        call(0)
    except Exception as error:  # noqa: BLE001 -- its errors have no common type
        pipe.send(f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        return
    pipe.send(None)  # compiled in time
    pipe.send(measured(call, quick=False))


# --- parity -----------------------------------------------------------------------------------------------------------


def parity_rows(label: str, of: Exported, count: int) -> list[dict[str, Any]]:
    """Return how far apart torch and each engine are at worst over ``count`` random states, goals and noises.

    Where an elite flips (two candidates whose costs differ by rounding), that case is counted and its costs are all that is
    compared; rules that weigh every candidate have no elites.
    """
    controller, out = torch_controller(of), []
    graphs = object.__new__(PlannerGraphs)  # what draws cases, without exporting again
    graphs.controller, graphs.shapes = controller, PlannerGraphs.shapes_of(controller)
    graphs.terms = [key for key, term in controller.task.terms.items() if term.weight > 0]
    for engine in ("onnx", "kernel"):
        ours, rng = build_planner(of.bundle, engine, threads=1).planner, np.random.default_rng(5)
        found = [_differences(controller, ours, random_case(controller, graphs, rng, k)) for k in range(count)]
        costs, updates, flips = zip(*found)
        name = f"{label}: torch and {engine}, {count} cases"
        out.append(row(f"{name}: costs, relative", max(costs), "1", "<=", 1e-4))
        out.append(row(f"{name}: command and mean over the command's range", max(updates), "1", "<=", 1e-4))
        if hasattr(controller.planner.rule, "elites"):
            out.append(row(f"{name}: cases in which an elite flips", sum(flips), "1"))
    return out


def _differences(controller: MpcController, ours: Planner, case: tuple[Any, ...]) -> tuple[float, float, bool]:
    """Return the costs' relative difference, the command's and mean's share of the range, and whether an elite flips."""
    state, x, parameters, _ = case
    theirs = controller.planner
    with torch.inference_mode():
        _, costs = theirs.search(state.belief, theirs.fixed(state.belief, parameters), state.seed, state.draws, x, parameters)
        after, result = theirs.iterate(state, x, parameters)
    given = in_numpy(state), x.numpy(), in_numpy(parameters)
    want, got = costs.numpy(), candidate_costs(ours, *given)
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got) & (got < 1e38)):
        return np.inf, np.inf, False
    off = cost_error(got[finite], want[finite])
    mine, mine_result = ours.iterate(*given)
    if hasattr(theirs.rule, "elites"):
        elites = [set(np.flatnonzero(np.asarray(each.weights) > 0)) for each in (result, mine_result)]
        if elites[0] != elites[1]:
            return off, 0.0, True
    low, high = controller._bounds
    pairs = ((mine.belief.mean, after.belief.mean), (mine_result.knots, result.knots))
    return off, max(float((np.abs(a - b.numpy()) / (high - low)).max()) for a, b in pairs), False


def in_torch(value: Any) -> Any:
    """Return a planner's state, parameters or array with tensors for arrays."""
    return _mapped(value, np.ndarray, lambda array: torch.from_numpy(np.array(array, np.float32)))


def in_numpy(value: Any) -> Any:
    """Return a planner's state, parameters or tensor with arrays for tensors."""
    return _mapped(value, torch.Tensor, lambda tensor: tensor.numpy())


def _mapped(value: Any, kind: type, turn: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return turn(value)
    if isinstance(value, (Parameters, PlannerState, Distribution)):
        parts = value._asdict() if hasattr(value, "_asdict") else vars(value)
        return type(value)(**{key: _mapped(part, kind, turn) for key, part in parts.items()})
    if isinstance(value, tuple):
        return tuple(_mapped(part, kind, turn) for part in value)
    return value
