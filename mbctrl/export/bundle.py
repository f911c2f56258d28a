"""Writes a bundle: graphs, traced rollouts, golden vectors, the robot's description, and the manifest that vouches for them."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbctrl import __version__
from mbctrl.base.config import RobotSpec, RunConfig
from mbctrl.base.errors import SpecError
from mbctrl.base.scene import JointGoal
from mbctrl.base.spec import dump_yaml
from mbctrl.dynamics.load import Model
from mbctrl.export.graph import OPSET
from mbctrl.export.planner import FIGURES, PlannerGraphs, refuse
from mbctrl.kernels.trace import Goal, trace_dynamics, trace_objective
from mbctrl.kernels.watch import trace_watch
from mbctrl.planning.compiled import drive_of, term_factors, traced_residual
from mbctrl.planning.controller import MpcController
from mbctrl.planning.mpc import on_host
from mbctrl.planning.planner import Parameters, PlannerState
from mbctrl.planning.rules.base import Distribution
from mbctrl.runtime.bundle import FORMAT, GOLDEN, MANIFEST, ROBOT, ROLLOUT, SEAL, WEIGHTS, digest, fingerprint
from mbctrl.tasks.distance import capsule_capsule

CASES = 4
"""Golden vectors: each costs one plan at every start of the runtime."""
UNITS = {
    "x": "[rad], [rad/s]",
    "mean, spread, best, plan": "[rad] impedance references, [N·m] torques",
    "noise": "[1] white, standard normal",
    "p_target, obstacles, path": "[m]",
    "r_target": "[1] rotation matrix",
    "rotation": "[1] 0: any orientation",
    "q_target": "[rad]",
    "weights": "[s] what each term's cost rate counts in each step",
    "dt": "[s]",
    "proposal, knots": "[rad] impedance references, [N·m] torques",
    "costs": "[1]",
    "figures": ", ".join(FIGURES),
}


@dataclass(frozen=True)
class Written:
    """What an export made: sizes [bytes] and operators run in one evaluation, by file; seconds it took are the caller's."""

    folder: Path
    sizes: dict[str, int]
    nodes: dict[str, int]


def export_bundle(
    config: RunConfig, model: Model, folder: Path, file: Path, say: Callable[[str], None] = lambda text: None
) -> Written:
    """Export the run's planner into ``folder``, which must not exist.

    Args:
        config: the resolved run.
        model: its robot, with the parameters it is believed to have.
        folder: to make; nothing is left of it if the export fails.
        file: the run's file, for errors.
        say: told what is being done.

    Errors:
        SpecError: naming the rule, noise or term that cannot be exported, or the folder.
    """
    if folder.exists():
        raise SpecError("exists already", file=folder)
    plain = config.dynamics.model_copy(update={"backend": "torch", "device": "cpu"})
    if config.dynamics.backend == "mujoco":
        plain = config.dynamics
    controller = MpcController(config.model_copy(update={"dynamics": plain}), model, file)
    refuse(controller)
    _write(folder, None)
    graphs = PlannerGraphs(controller, say)
    say("tracing rollouts")
    made = graphs.models()
    contents = {name: onnx_model.SerializeToString() for name, onnx_model in made.models.items()}
    traced = _traced(controller)
    contents[ROLLOUT] = json.dumps(traced, separators=(",", ":")).encode()
    say("answering golden vectors")
    contents[GOLDEN] = _golden(controller, graphs)
    if controller.hybrid is not None:
        contents[WEIGHTS] = traced_residual(controller.hybrid).weights.astype("<f4").tobytes()
    contents[ROBOT] = _robot(controller).encode()
    manifest = _manifest(controller, made.nodes, graphs, traced)
    manifest["files"] = {name: digest(data) for name, data in contents.items()}
    contents[MANIFEST] = json.dumps(manifest, indent=1).encode()
    contents[SEAL] = digest(contents[MANIFEST]).encode() + b"\n"
    _write(folder, contents)
    return Written(folder, {name: len(data) for name, data in contents.items()}, made.nodes)


def _write(folder: Path, contents: dict[str, bytes] | None) -> None:
    """Write a bundle's files and put them in place in one move; None: only find out whether that can be done."""
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        if contents is None:
            return
        for name, data in contents.items():
            (temporary / name).write_bytes(data)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except OSError as error:
        raise SpecError(f"cannot be written: {error.strerror or error}", file=folder) from None
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary)


def _robot(controller: MpcController) -> str:
    data = controller.robot.model_dump(mode="json", exclude={"path"}, exclude_none=True)
    return dump_yaml({**data, "model": "exported"})


def _traced(controller: MpcController) -> dict[str, Any]:
    """Return the traced programs' data: the step, and the rollout with its cost for each kind of goal."""
    arm, config = controller.analytic, controller.config
    kinds = [Goal(joints=True)] if isinstance(config.goal, JointGoal) else [Goal(position=True), Goal(position=True, rotation=True)]
    tool, drive = controller.features.tool, drive_of(arm)
    residual = None if controller.hybrid is None else traced_residual(controller.hybrid)
    goals = []
    for kind in kinds:
        traced = trace_objective(arm.tree, drive, arm.dt, tool, controller.task, kind, config.obstacles, residual)
        goals.append({"goal": vars(kind), "traced": traced.to_dict()})
    watch = trace_watch(arm.tree, drive, tool, config.obstacles, capsule_pairs(controller))
    seen = {"traced": watch.to_dict(), "damping": arm.tree.damping.tolist(), "friction": arm.tree.friction.tolist()}
    return {"step": trace_dynamics(arm.tree, drive, residual=residual).to_dict(), "goals": goals, "watch": seen}


def capsule_pairs(controller: MpcController, draws: int = 400) -> list[tuple[int, int]]:
    """Return the pairs of the arm's capsules that can come near each other and need not: not those of one link or of neighbours,
    nor those that overlap at home or in half of random postures (capsules are wider than the bodies they stand for)."""
    tree, robot = controller.analytic.tree, controller.robot
    limits = robot.limits
    q = np.random.default_rng(0).uniform(limits.position_lower, limits.position_upper, (draws, robot.nq))
    q = torch.as_tensor(np.vstack([robot.home, q]).T, dtype=controller.analytic.dtype)
    poses = controller.analytic.poses(q)
    ends = [controller.analytic.points(poses, c.link, np.stack([c.a, c.b])) for c in tree.capsules]
    kept = []
    for i, a in enumerate(tree.capsules):
        for j in range(i + 1, len(tree.capsules)):
            b = tree.capsules[j]
            if a.link == b.link or tree.parent[a.link] == b.link or tree.parent[b.link] == a.link:
                continue
            gap = capsule_capsule(*ends[i], a.radius, *ends[j], b.radius)
            if gap[0] > 0 and (gap > 0).float().mean() > 0.5:
                kept.append((i, j))
    return kept


def _manifest(controller: MpcController, nodes: dict[str, int], graphs: PlannerGraphs, traced: dict[str, Any]) -> dict[str, Any]:
    config, planner = controller.config, controller.planner
    model_hash = digest(json.dumps(traced["step"], sort_keys=True).encode())
    # The folder's own description of the robot counts, wherever the exporting machine had it.
    plain = config.model_copy(update={"robot": RobotSpec(name=controller.robot.name)})
    backend = plain.backend.model_copy(update={"parameters": None})
    dynamics = plain.dynamics.model_copy(update={"backend": "auto", "residual": None})
    rules = plain.planner.model_copy(update={"policy": None})
    spec = plain.model_copy(update={"backend": backend, "planner": rules, "dynamics": dynamics})
    return {
        "format": FORMAT,
        "versions": {
            "mbctrl": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "onnx", "onnxscript", "numpy")},
        },
        "opset": OPSET,
        "robot": fingerprint(controller.robot, model_hash),
        "rates": {"control_hz": controller.robot.control.rate, "plan_hz": config.loop.rate},
        "dt": config.dynamics.dt,
        "config": spec.model_dump(mode="json"),
        "knots": planner.knots.to_dict(),
        "factors": term_factors(controller.task, planner.knots.steps, config.dynamics.dt, config.planner.discount).tolist(),
        "terms": graphs.terms,
        "inputs": {name: list(shape) for name, shape in graphs.inputs().items()},
        "units": UNITS,
        "operators": nodes,
    }


def _golden(controller: MpcController, graphs: PlannerGraphs) -> bytes:
    """Return golden vectors: random states, goals and noise, and torch's answers, as an .npz."""
    rng = np.random.default_rng(20)
    rows: dict[str, list[np.ndarray]] = {}
    for k in range(CASES):
        state, x, parameters, given = random_case(controller, graphs, rng, k)
        planner = controller.planner
        with torch.inference_mode():
            _, costs = planner.search(state.belief, planner.fixed(state.belief, parameters), state.seed, state.draws, x, parameters)
            after, _ = planner.iterate(state, x, parameters)
        row = given | {"out_costs": costs, "out_mean": after.belief.mean, "out_spread": after.belief.spread}
        for name, value in row.items():
            rows.setdefault(name, []).append(np.asarray(value))
    out = io.BytesIO()
    np.savez_compressed(out, **{name: np.stack(values) for name, values in rows.items()})
    return out.getvalue()


def random_case(
    controller: MpcController, graphs: PlannerGraphs, rng: np.random.Generator, k: int
) -> tuple[PlannerState, torch.Tensor, Parameters, dict[str, np.ndarray]]:
    """Return a random planner state, arm state, task, and the same as numpy's arrays by input name."""
    robot, shapes = controller.robot, graphs.shapes
    low, high = controller._bounds
    q = (np.asarray(robot.home) + rng.uniform(-0.4, 0.4, robot.nq)).clip(robot.limits.position_lower, robot.limits.position_upper)
    x = np.concatenate([q, rng.normal(0, 0.2, robot.nq) * np.asarray(robot.limits.velocity) / 2])
    sigma = np.asarray(controller.planner.sigma)
    held = q[robot.command_index] if robot.control.mode == "impedance" else np.zeros(robot.nu)
    mean = (held + rng.normal(0, 1, sigma.shape) * sigma).clip(low, high)
    given: dict[str, Any] = {"x": x, "mean": mean, "spread": sigma * rng.uniform(0.3, 1.0, sigma.shape), "seed": k, "draw": 7 * k}
    if shapes.kept:
        given["kept"] = mean[..., None] + rng.normal(0, 1, (*mean.shape, shapes.kept)) * sigma[..., None]
    for name, shape in graphs.given().items():
        given[name] = rng.normal(0.3, 0.3, shape)
    given["u_before"] = mean[0]
    if "r_target" in given:
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        given["r_target"] = np.repeat((turn * np.sign(np.linalg.det(turn)))[:, :, None], shapes.steps, 2)
        given["rotation"] = np.array(float(k % 2))
    given.pop("weights")
    given = {name: np.asarray(value, np.int64 if name in ("seed", "draw") else np.float32) for name, value in given.items()}
    tensors = {name: torch.from_numpy(value.copy()) for name, value in given.items()}
    belief = Distribution(
        tensors["mean"], tensors["spread"], tensors["mean"], tensors.get("kept", tensors["mean"][..., None][..., :0])
    )
    parameters = Parameters(
        u_before=tensors["u_before"],
        p_target=tensors["p_target"][..., None] if "p_target" in given else None,
        r_target=tensors["r_target"][..., None] if "r_target" in given and given["rotation"] else None,
        q_target=tensors.get("q_target"),
        obstacles=tuple(at[..., None] for at in tensors.get("obstacles", ())),
    )
    if controller.policy is not None:
        given["proposal"] = controller.policy(given["x"], on_host(parameters)).astype(np.float32)[..., None]
        parameters = replace(parameters, proposal=torch.from_numpy(given["proposal"].copy()))
    return PlannerState(belief, 0.0, k, 7 * k), tensors["x"], parameters, given
