"""Fully learned models in the planner: PETS' cart-pole from nothing, what a plan costs, and what encoding angles is worth."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from _common import Say, row
from _pets import LAST, driven, learned

CARTPOLE, PENDULUM = "cartpole_pets_sim", "pendulum_online_sim"
SEVEN = {"panda_reach_pets_sim": "7 joints reach", "panda_push_pets_sim": "7 joints push"}
SEEDS = (3, 4, 5)  # not those the 7-joint scenarios were tuned on
PEER_CPU = 0.56  # [s] a plan of mbrl-lib's PETS at 60 samples, 5 networks, 3 iterations, 25 steps: 22,500 network evaluations
PEER_BUDGET = {"samples": 60, "iterations": 3, "horizon": 1.0, "knots": 25}
PEER_RETURNS = {200: -3.9, 400: 2.8, 600: 35.9, 800: 75.3}  # its returns after so many steps, at this budget
WANTED = 180.0  # of 200, within 10 trials
PLANS = 30
HIDDEN = {"as PETS', 3 x 200": (200, 200, 200), "as shipped, 2 x 64": (64, 64)}
UPRIGHT = 0.3  # [rad] off upright, in each of the last steps


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return the figures of both tasks over three seeds (quick: one), and of a plan at 22,500 network evaluations."""
    seeds = 1 if quick else 3
    out = plan_rows(say)
    jobs: list[tuple[str, int, bool]] = [(CARTPOLE, seed, True) for seed in range(seeds)]
    jobs += [(PENDULUM, seed, encode) for encode in (True, False) for seed in range(seeds)]
    results = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for job, result in zip(jobs, pool.map(learned, jobs)):
            results.append(result)
            say(f"{len(results)} of {len(jobs)} loops, last: {job[0]} seed {job[1]}, return {result[0][-1]:.1f}")
    out += cartpole_rows(results[:seeds])
    for name, part in (("sin, cos", results[seeds : 2 * seeds]), ("raw angles", results[2 * seeds :])):
        held = sum(errors.max() <= UPRIGHT for _, errors in part)
        bar = ("==", seeds) if name == "sin, cos" else ("<", seeds)
        out.append(row(f"pendulum online, {name}: seeds upright through the last {LAST} of 500 steps", held, f"of {seeds}", *bar))
        far = [float(np.median(errors)) for _, errors in part]
        out.append(row(f"pendulum online, {name}: median angle off upright in them, worst seed", max(far), "rad"))
    return out if quick else out + seven_rows(say)


def seven_rows(say: Say) -> list[dict[str, Any]]:
    """Return what trials of the 7-joint tasks came to, learned from nothing, beside the same plans with the true physics."""
    out = []
    jobs = [(name, seed, learns) for name in SEVEN for learns in (True, False) for seed in SEEDS]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        results = []
        for job, result in zip(jobs, pool.map(driven, jobs)):
            results.append(result)
            say(f"{len(results)} of {len(jobs)} runs of 7 joints, last: {job[0]} seed {job[1]}")
    for number, label in enumerate(SEVEN.values()):
        learnt, true = (results[3 * k : 3 * k + 3] for k in (2 * number, 2 * number + 1))
        returns, off = (np.array([part[k] for part in learnt]) for k in (0, 1))  # (seeds, 1 + trials), random first
        named = [(f"trial {trial}" if trial else "random commands", trial) for trial in range(returns.shape[1])]
        for what, trial in named:
            out.append(row(f"{label} (3 seeds): return, {what}, median", float(np.median(returns[:, trial])), "1"))
            out.append(
                row(f"{label} (3 seeds): off the target in the end, {what}, median", 1e3 * float(np.median(off[:, trial])), "mm")
            )
        for what, group in (("last three trials", learnt), ("the same, true physics", true)):
            totals, ends = (np.array([part[k][-3:] for part in group]) for k in (0, 1))
            out.append(row(f"{label} (3 seeds): return, {what}, median", float(np.median(totals)), "1"))
            out.append(row(f"{label} (3 seeds): off the target in the end, {what}, median", 1e3 * float(np.median(ends)), "mm"))
            out.append(row(f"{label} (3 seeds): off the target in the end, {what}, worst", 1e3 * float(ends.max()), "mm"))
    return out


def cartpole_rows(results: list[tuple[list[float], np.ndarray]]) -> list[dict[str, Any]]:
    """Return the returns of the trials, beside the peer's after as many steps."""
    returns = np.array([totals for totals, _ in results])  # (seeds, 1 + trials), random first
    label = f"cartpole ({len(results)} seed{'s' * (len(results) > 1)})"
    out = [row(f"{label}: return of random commands, median", float(np.median(returns[:, 0])), "of 200")]
    for trial in range(1, returns.shape[1]):
        peer = PEER_RETURNS.get(200 * trial)
        beside = "" if peer is None else f" (mbrl-lib: {peer:g})"
        out.append(row(f"{label}: return after {200 * trial} steps, median{beside}", float(np.median(returns[:, trial])), "of 200"))
    out.append(
        row(
            f"{label}: best return within 10 trials, least of the seeds",
            float(returns[:, 1:11].max(1).min()),
            "of 200",
            ">=",
            WANTED,
        )
    )
    reached = [next((k for k in range(1, len(one)) if one[k] >= WANTED), len(one)) for one in returns]
    out.append(row(f"{label}: trials until {WANTED:g}, most of the seeds", max(reached), "trials", "<=", 10))
    return out


def plan_rows(say: Say) -> list[dict[str, Any]]:
    """Return processor seconds of a plan at the peer's budget, each network rolling out by itself, on one thread."""
    import torch

    torch.set_num_threads(1)
    out = []
    for name, hidden in HIDDEN.items():
        for backend in ("kernel", "torch"):
            say(f"timing plans, {name}, {backend}")
            spent, evaluations = _plan_time(hidden, backend)
            bar = ("<=", PEER_CPU / 5) if backend == "kernel" else (None, None)
            label = f"CPU a plan, {evaluations} evaluations, networks {name}, {backend} (mbrl-lib: {1e3 * PEER_CPU:g} ms)"
            out.append(row(label, 1e3 * spent, "ms", bar[0], None if bar[1] is None else 1e3 * bar[1]))
    return out


def _plan_time(hidden: tuple[int, ...], backend: str) -> tuple[float, int]:
    """Return the median processor time of a plan [s], and how many network evaluations it takes."""
    from mbctrl.base.config import RiskSpec, load_run
    from mbctrl.base.plan import PlanRequest
    from mbctrl.cli.build import load_run_model
    from mbctrl.planning.controller import MpcController

    config, file = load_run(CARTPOLE)
    model = load_run_model(config, file)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.npz"
        _random_model(model, hidden, config.dynamics.dt).save(path)
        dynamics = config.dynamics.model_copy(update={"residual": str(path), "backend": backend, "threads": 1})
        planner = config.planner.model_copy(update={"risk": RiskSpec(kind="mean"), **PEER_BUDGET})
        controller = MpcController(config.model_copy(update={"dynamics": dynamics, "planner": planner}), model, file)
    x, spent = np.array([0.1, 0.2, 0.0, 0.0]), []
    for k in range(PLANS):
        before = time.process_time()
        controller.plan(PlanRequest(0.04 * k, x))
        spent.append(time.process_time() - before)
    networks = controller.hybrid.residual.members
    return statistics.median(spent[2:]), planner.samples * planner.iterations * controller.knots.steps * networks


def _random_model(model: Any, hidden: tuple[int, ...], dt: float) -> Any:
    """Return five networks that nobody trained, of those sizes: what a plan costs does not depend on what they say."""
    from mbctrl.dynamics.residual import Residual

    rng, sizes = np.random.default_rng(0), (6, *hidden, 2)
    layers = tuple((rng.normal(0, a**-0.5, (5, b, a)), np.zeros((5, b))) for a, b in zip(sizes, sizes[1:]))
    return Residual(
        layers,
        "silu",
        input_mean=np.zeros(6),
        input_scale=np.array([1.0, 1.0, 1.0, 3.0, 5.0, 150.0]),
        output_scale=np.full(2, 0.1),
        near=0.01,
        far=0.03,
        dt=dt,
        robot=model.robot.name,
        joints=model.robot.joints,
        base="identity",
    )
