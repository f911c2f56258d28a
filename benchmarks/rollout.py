"""Compiled rollouts: steps a second against MuJoCo and torch, the share of the processor's peak, and whole replans."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Say, median_time, row

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.plan import PlanRequest
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.simulator import SimulatorDynamics
from mbctrl.kernels.graph import Graph
from mbctrl.kernels.llvm import Sampling, words
from mbctrl.kernels.native import Native, Pool, host
from mbctrl.kernels.program import Program
from mbctrl.planning.compiled import KernelSearch
from mbctrl.planning.controller import MpcController

ROBOTS = {"arm2_swingup_sim": 2, "ur10e_reach_sim": 6, "panda_reach_sim": 7, "chain": 12}
SIZE = (1024, 32)
CORES = os.cpu_count() or 1


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return throughput, scaling, compilation and replan rows (quick: one size a robot, fewer repetitions)."""
    torch.set_num_threads(CORES)
    say("the processor's peak")
    peak = _peak(Pool(1)) * 1e9
    out = [row(f"multiply-adds of one core, {host()[2]} bits, measured peak", peak / 1e9, "Gflop/s")]
    for name, joints in ROBOTS.items():
        say(f"{joints} joints")
        out += _throughput_rows(name, joints, peak, quick)
    say("compilation")
    out += _compile_rows()
    for label, rule, settings, iterations, bar in (
        ("MPPI, 1 iteration", "Mppi", {"ess": 0.03}, 1, 1.0),
        ("CEM, 3 iterations", "Cem", {"elites": 64}, 3, 2.5),
    ):
        say(f"replans, {label}")
        out += _replan_rows(label, rule, settings, iterations, bar, 200 if quick else 1000)
    if torch.cuda.is_available():
        say("the GPU")
        from _gpu import gpu_rows

        device = {"dynamics": {"device": "cuda"}}
        out += gpu_rows(lambda samples: _controller("panda_reach_sim", samples, SIZE[1], CORES, **device), _call, SIZE[1])
    return out


def _controller(name: str, samples: int, horizon: int, threads: int, **changes: Any) -> MpcController:
    """Return a scenario's controller with other sizes, its time step 20 ms."""
    if name == "chain":
        config, file = load_run("ur10e_reach_sim")
        model, chain = _chain(12), {"sigma": 0.1}
    else:
        config, file = load_run(name)
        model, chain = load_model(config.robot.name), {}
    sizes = {
        "planner": {"samples": samples, "horizon": 0.02 * horizon, **chain},
        "dynamics": {"dt": 0.02, "threads": threads, "backend": "kernel"},
    }
    settings = {"settings": {}} if "settings" in changes else {}  # another rule's
    config = RunConfig.model_validate(merged(merged({**config.model_dump(), **settings}, sizes), changes))
    return MpcController(config, model, file)


def _chain(joints: int) -> Model:
    """Return a serial arm of hinges, axes by turns, no two links alike."""
    rng, inner = np.random.default_rng(0), ""
    for i in reversed(range(joints)):
        axis = ("0 0 1", "0 1 0", "1 0 0")[i % 3]
        com, mass = " ".join(f"{x:.3f}" for x in rng.uniform(-0.05, 0.05, 3)), rng.uniform(0.3, 2)
        inertia = " ".join(f"{mass * x:.5f}" for x in (0.004, 0.005, 0.006))
        site = '<site name="tool" pos="0 0 0.1"/>' if i == joints - 1 else ""
        inner = (
            f'<body pos="0 0 {0.1 if i else 0.2}"><joint name="j{i}" axis="{axis}" range="-2.9 2.9" damping="0.5" armature="0.05"/>'
            f'<inertial pos="{com}" mass="{mass:.3f}" diaginertia="{inertia}"/>{site}{inner}</body>'
        )
    motors = "".join(f'<position joint="j{i}" kp="100" kv="10" forcerange="-60 60"/>' for i in range(joints))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.xml"
        path.write_text(f"<mujoco><worldbody>{inner}</worldbody><actuator>{motors}</actuator></mujoco>", encoding="utf-8")
        return load_model(str(path))


def _call(controller: MpcController) -> Any:
    """Return a function that draws and costs once from the home pose."""
    robot, search = controller.model.robot, controller.planner.search
    x = np.concatenate([robot.home, np.full(robot.nq, 0.1)])
    command = np.zeros(robot.nu) if robot.control.mode == "torque" else np.asarray(robot.home)[robot.command_index]
    parameters = controller.parameters(PlanRequest(0.0, x), command)
    state = controller.planner.initial(parameters.u_before)
    start, fixed = controller.backend.array(x), state.belief.mean[..., None]
    return lambda: search(state.belief, fixed, 0, 0, start, parameters)


def _throughput_rows(name: str, joints: int, peak: float, quick: bool) -> list[dict[str, Any]]:
    """Return steps a second of one robot with costs in the kernel, beside MuJoCo and torch at one size."""
    samples, horizon = SIZE
    label, count = f"{joints} joints", samples * horizon
    one, both = (_controller(name, samples, horizon, threads) for threads in (1, CORES))
    search = one.planner.search
    assert isinstance(search, KernelSearch)
    operations = search.programs()[0].operation_count
    alone, shared = median_time(_call(one), 60), median_time(_call(both), 60)
    model = one.model
    theirs = SimulatorDynamics(model.mj, model.mj.opt.timestep, batched=False)
    x = torch.tensor(np.concatenate([model.robot.home, np.zeros(joints)]))[:, None].repeat(1, samples)
    u = torch.zeros(horizon, joints, samples, dtype=torch.float64)
    mujoco = median_time(lambda: theirs.rollout(x, u), 3 if quick else 7)
    bar = (">=", 100.0) if joints == 7 else (None, None)
    out = [
        row(f"{label}: operations a step, cost included", operations, "1"),
        row(f"{label}: kernel, 1 thread, {samples} x {horizon}", count / alone / 1e6, "M steps/s"),
        row(
            f"{label}: kernel, {CORES} threads", count / shared / 1e6, "M steps/s", *((">=", 50.0) if joints == 7 else (None, None))
        ),
        row(f"{label}: share of the peak, 1 thread", operations * count / alone / peak, "1"),
        row(f"{label}: mujoco.rollout, {CORES} threads", count / mujoco / 1e6, "M steps/s"),
        row(f"{label}: kernel over mujoco.rollout, per core", mujoco * CORES / alone, "x", *bar),
    ]
    if joints == 7:
        out += _torch_rows(one, alone, quick)
        big = 4096
        pair = [median_time(_call(_controller(name, big, horizon, threads)), 40) for threads in (1, CORES)]
        out.append(row(f"{label}: {CORES} threads over 1, {big} x {horizon}", pair[0] / pair[1], "x", ">=", 1.8))
    if not quick:
        for n in (64, 256, 4096, 16384):
            for h in (8, 32, 128):
                used = median_time(_call(_controller(name, n, h, CORES)), 9)
                out.append(row(f"{label}: kernel, {CORES} threads, {n} x {h}", n * h / used / 1e6, "M steps/s"))
    return out


def _torch_rows(controller: MpcController, alone: float, quick: bool) -> list[dict[str, Any]]:
    """Return torch's rollouts, eager and compiled, without costs, on all threads."""
    samples, horizon = SIZE
    x, u = torch.zeros(14, samples), torch.zeros(horizon, 7, samples)
    x[:7] = u[:] = torch.tensor(controller.model.robot.home, dtype=torch.float32)[:, None]
    model, count = controller.analytic, samples * horizon
    with torch.inference_mode():
        eager = median_time(lambda: model.rollout(x, u), 3)
    out = [
        row(f"7 joints: torch eager, {CORES} threads, no cost", count / eager / 1e6, "M steps/s"),
        row("7 joints: kernel, 1 thread, over torch eager", eager / alone, "x"),
    ]
    if not quick:
        step = torch.compile(model.step, dynamic=False)

        def rollout() -> None:
            state = x
            for command in u:
                state = step(state, command)

        with torch.no_grad():
            start = time.perf_counter()
            rollout()
            first, used = time.perf_counter() - start, median_time(rollout, 5)
        out += [
            row(f"7 joints: torch.compile, {CORES} threads, no cost", count / used / 1e6, "M steps/s"),
            row("7 joints: torch.compile, time to the first rollout", first, "s"),
        ]
    return out


def _compile_rows() -> list[dict[str, Any]]:
    """Return what it takes to compile panda_reach's kernel, without and with the cache."""
    program = _controller("panda_reach_sim", *SIZE, 1).planner.search.programs()[0]
    sampling = Sampling(3, ((1.0, 0.0, 0.0), (0.5, 0.8, 0.0), (0.2, 0.4, 0.9)))
    with tempfile.TemporaryDirectory() as folder:
        cold = Native(program, np.float32, sampling, Path(folder))
        warm = statistics.median(Native(program, np.float32, sampling, Path(folder)).seconds for _ in range(9))
    return [
        row("panda_reach: compile, cold", cold.seconds, "s", "<=", 1.0),
        row("panda_reach: compile, cached", warm * 1e3, "ms", "<=", 20.0),
    ]


def _replan_rows(label: str, rule: str, settings: dict[str, Any], iterations: int, bar: float, count: int) -> list[dict[str, Any]]:
    """Return p50 and p99 of whole replans of panda_reach_sim, and what they are made of."""
    changes = {"rule": f"mbctrl.planning.rules.{rule.lower()}:{rule}", "settings": settings, "planner": {"iterations": iterations}}
    controller = _controller("panda_reach_sim", *SIZE, CORES, **changes)
    kernel = median_time(_call(controller), 60) * iterations
    used: list[float] = []
    times, x = [], np.concatenate([controller.model.robot.home, np.full(7, 0.1)])
    for i in range(count + 20):
        start, cpu = time.perf_counter(), time.process_time()
        controller.plan(PlanRequest(0.002 * i, x, latency=0.002))
        times.append(time.perf_counter() - start)
        used.append(time.process_time() - cpu)
    p50, p99 = np.percentile(times[20:], [50, 99])
    name = f"replan {SIZE[0]} x {SIZE[1]}, {label}"
    return [
        row(f"{name}: p50", p50 * 1e3, "ms", "<=", bar),
        row(f"{name}: p99", p99 * 1e3, "ms"),
        row(f"{name}: p50 of CPU time, all threads", statistics.median(used[20:]) * 1e3, "ms"),
        row(f"{name}: of p50, draws, rollouts and costs", kernel * 1e3, "ms"),
        row(f"{name}: of p50, update, prediction, packing", (p50 - kernel) * 1e3, "ms"),
    ]


def _peak(pool: Pool) -> float:
    """Return one core's multiply-adds in Gflop/s: independent chains that stay in registers, nothing else."""
    graph, chains, length = Graph(), 12, 80
    values = [graph.input("carry", i) for i in range(chains)]
    for _ in range(length):
        values = [value * 0.5 + 0.25 for value in values]
    first = tuple(graph.input("start", i).index for i in range(chains))
    program = Program(graph, chains, 0, first, tuple(v.index for v in values), None, {"table": 0, "uniform": 0, "sample": 0})
    native = Native(program)
    samples, steps = 64 * native.lanes.width, 200
    start = np.ones((chains, samples), np.float32)

    def run() -> None:
        pool.run(native, words(blocks=native.blocks(samples), samples=samples, steps=steps, start=start.ctypes.data))

    return 2 * chains * length * samples * steps / median_time(run, 15) / 1e9
