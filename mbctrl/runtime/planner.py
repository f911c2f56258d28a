"""From a bundle to a planner that answers requests, on the engine asked for; its golden vectors answered first."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import numpy as np

from mbctrl.base.config import RunConfig
from mbctrl.base.errors import BundleError
from mbctrl.base.extras import need
from mbctrl.base.scene import PoseGoal
from mbctrl.kernels.trace import Goal, Traced
from mbctrl.planning.knots import Knots
from mbctrl.planning.mpc import Mpc, command_bounds
from mbctrl.planning.planner import Parameters, Planner, PlannerState
from mbctrl.planning.rules.base import Distribution
from mbctrl.planning.settings import build_rule, sigma_of
from mbctrl.planning.white import colouring
from mbctrl.runtime.bundle import GOLDEN, POLICY, ROLLOUT, WEIGHTS, Bundle

logger = logging.getLogger(__name__)
ENGINES = ("kernel", "onnx")
COST_TOLERANCE = 1e-4
"""Largest relative difference of a golden vector's costs from the exporting machine's."""


def build_planner(
    bundle: Bundle, engine: str = "kernel", provider: str = "cpu", threads: int = 0, config: RunConfig | None = None
) -> Mpc:
    """Return a planner of ``bundle`` that has answered its golden vectors.

    Args:
        bundle: checked.
        engine: ``kernel`` compiles the traced rollout for this processor; ``onnx`` runs the graph.
        provider: of onnxruntime: cpu, cuda or tensorrt.
        threads: 0: all cores but one for the kernel, one for onnx.
        config: the run, where goal, seed or rates are not those exported.

    Errors:
        BundleError: where the answers are others.
    """
    config = bundle.config if config is None else config
    rule, knots = build_rule(config), Knots.from_dict(bundle.manifest["knots"])
    sigma = sigma_of(config.planner, bundle.robot.nu).astype(np.float32)
    if engine == "kernel":
        mpc = _kernel(bundle, config, rule, knots, sigma, threads or max(1, (os.cpu_count() or 2) - 1))
    else:
        need("onnxruntime", "deploy", "the onnx engine")
        from mbctrl.runtime.onnx_planner import OnnxPlanner, OnnxRollout

        planner = OnnxPlanner(bundle, rule, knots, sigma, provider, threads or 1)
        mpc = Mpc(config, bundle.robot, planner, _float32, OnnxRollout(bundle), step=config.dynamics.dt / 2)
    mpc.policy = _policy(bundle, config)
    worst = golden_error(bundle, mpc.planner)
    if not worst <= COST_TOLERANCE:
        raise BundleError(
            f"the {engine} engine's costs differ by {worst:.1e} from the golden vectors', expected at most {COST_TOLERANCE:g}",
            file=bundle.folder / GOLDEN,
        )
    return mpc


def _policy(bundle: Bundle, config: RunConfig) -> Any:
    """Return the bundle's policy, None where it has none or the run's goal is of another kind.

    Errors:
        BundleError: where it proposes other plans than it did where it was exported.
    """
    if POLICY not in bundle.files:
        return None
    known, found = (_asks(one) for one in (bundle.config, config))
    if found != known:
        logger.warning("%s: the policy knows goals of %s, found %s; planning without it", bundle.folder, known, found)
        return None
    need("onnxruntime", "deploy", "a policy")
    from mbctrl.runtime.onnx_planner import OnnxPolicy

    policy, (low, high) = OnnxPolicy(bundle), command_bounds(bundle.robot)
    for _, x, parameters, _ in golden_cases(bundle):
        if parameters.proposal is None:
            raise BundleError("holds no plan of the policy's", file=bundle.folder / GOLDEN)
        off = float(np.abs((policy(x, parameters) - parameters.proposal[..., 0]) / (high - low)).max())
        if not off <= COST_TOLERANCE:
            raise BundleError(
                f"its plans are {off:.1e} of the range from the golden vectors', expected at most {COST_TOLERANCE:g}",
                file=bundle.folder / POLICY,
            )
    return policy


def _float32(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32)


def _kernel(bundle: Bundle, config: RunConfig, rule: Any, knots: Knots, sigma: np.ndarray, threads: int) -> Mpc:
    need("llvmlite", "deploy", "the kernel engine")
    from mbctrl.kernels.native import shared_pool
    from mbctrl.planning.engines import CpuEngine
    from mbctrl.planning.search import Drawing, KernelDynamics, KernelSearch

    try:
        data = bundle.rollout()
        step = Traced.from_dict(data["step"])
        goals = {Goal(**entry["goal"]): Traced.from_dict(entry["traced"]) for entry in data["goals"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"no traced rollout: {error}", file=bundle.folder / ROLLOUT) from None

    weights = bundle.weights()
    expected = sum(network.weights for network in step.program.networks)
    if (0 if weights is None else len(weights)) != expected or any(
        t.program.networks != step.program.networks for t in goals.values()
    ):
        raise BundleError(
            f"expected {expected} numbers, found {0 if weights is None else len(weights)}", file=bundle.folder / WEIGHTS
        )

    def traced(goal: Goal) -> Traced:
        if goal not in goals:
            raise BundleError(f"the planner was exported for {list(goals)}, found {goal}", file=bundle.folder, key="goal")
        return goals[goal]

    spec, engine = config.planner, CpuEngine(shared_pool(threads))
    colour = colouring(spec.knots, spec.beta).tolist() if spec.noise == "coloured" else None
    low, high = command_bounds(bundle.robot)
    search = KernelSearch(
        traced,
        np.asarray(bundle.manifest["factors"]),
        knots,
        Drawing(None if colour is None else tuple(map(tuple, colour))),
        samples=spec.samples,
        lower=low,
        upper=high,
        engine=engine,
        weights=weights,
    )
    planner = Planner(search, rule, knots, samples=spec.samples, sigma=sigma, iterations=spec.iterations, growth=spec.growth)
    dynamics = KernelDynamics(step, knots.dt, engine, weights)

    def rollout(x: np.ndarray, commands: np.ndarray, dt: float) -> np.ndarray:
        return dynamics.with_dt(dt).rollout(np.repeat(x[:, None], commands.shape[2], 1), commands)

    return Mpc(config, bundle.robot, planner, engine.array, rollout)


def _asks(config: RunConfig) -> str:
    """Return what a policy has to see of a run's goal."""
    goal = config.goal
    targets = goal.targets if isinstance(goal, PoseGoal) else (goal,)
    return goal.kind + " with rpy" * any(getattr(target, "rpy", None) is not None for target in targets)


def golden_cases(bundle: Bundle) -> list[tuple[PlannerState, np.ndarray, Parameters, dict[str, np.ndarray]]]:
    """Return each golden vector's planner state, arm state (nx,), task parameters and expected outputs by name."""
    data = bundle.golden()
    cases = []
    for k in range(len(data["x"])):
        row = {key: values[k] for key, values in data.items()}
        mean = row["mean"]
        kept = row["kept"] if "kept" in row else mean[..., None][..., :0]
        belief = Distribution(mean, row["spread"], mean, kept)
        rotation = "r_target" in row and bool(row["rotation"])
        parameters = Parameters(
            u_before=row["u_before"],
            p_target=row["p_target"][..., None] if "p_target" in row else None,
            r_target=row["r_target"][..., None] if rotation else None,
            q_target=row.get("q_target"),
            obstacles=tuple(at[..., None] for at in row["obstacles"]) if "obstacles" in row else (),
            proposal=row.get("proposal"),
        )
        expected = {key.removeprefix("out_"): value for key, value in row.items() if key.startswith("out_")}
        cases.append((PlannerState(belief, 0.0, int(row["seed"]), int(row["draw"])), row["x"], parameters, expected))
    return cases


def golden_error(bundle: Bundle, planner: Planner) -> float:
    """Return the largest difference of candidates' costs from the golden vectors', relative to the cases' cost scale.

    Not a number where a cost is none, or is finite where it should not be.
    """
    worst = 0.0
    for state, x, parameters, expected in golden_cases(bundle):
        found, want = candidate_costs(planner, state, x, parameters), expected["costs"]
        finite = np.isfinite(want)
        if not np.array_equal(np.isfinite(found) & (found < 1e38), finite):
            return float("nan")
        worst = max(worst, cost_error(found[finite], want[finite]))
    return worst


def cost_error(found: np.ndarray, want: np.ndarray) -> float:
    """Return the largest relative difference of costs (N,)."""
    return float((np.abs(found - want) / np.maximum(np.abs(want), 1e-3 * np.abs(want).max())).max())


def candidate_costs(planner: Planner, state: PlannerState, x: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Return the costs (N,) of the candidates drawn around a state's belief."""
    if planner.search is None:
        planner.iterate(state, x, parameters)
        return planner.costs.copy()
    return planner.search(state.belief, planner.fixed(state.belief, parameters), state.seed, state.draws, x, parameters)[1]


def iteration_times(bundle: Bundle, mpc: Mpc, count: int) -> list[float]:
    """Return how long each of ``count`` iterations took [s], on the golden vectors in turn."""
    cases, times = golden_cases(bundle), []
    for k in range(count):
        state, x, parameters, _ = cases[k % len(cases)]
        start = time.perf_counter()
        mpc.planner.iterate(state, x, parameters)
        times.append(time.perf_counter() - start)
    return times
