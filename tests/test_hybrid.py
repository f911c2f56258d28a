"""A learned residual on top of the physics: gated, integrated into position, the same in torch, kernels and ONNX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import SpecError
from mbctrl.base.spec import validate
from mbctrl.cli.build import load_run_model
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.residual import Residual, Surface, load_residual
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.kernels.native import shared_pool
from mbctrl.planning.compiled import kernel_dynamics, traced_residual
from mbctrl.planning.controller import MpcController
from mbctrl.planning.engines import CpuEngine
from mbctrl.tasks.distance import capsule_obstacle

TABLE = (
    Surface(name="table", shape="plane", position=(0.0, 0.0, 0.35)),
    Surface(name="post", shape="sphere", position=(0.6, 0.3, 0.4), size=(0.05,)),
)
F64 = torch.float64


def residual_of(model: Model, members: int = 3, hidden: tuple[int, ...] = (9, 5), **changes: Any) -> Residual:
    rng, n = np.random.default_rng(1), model.robot.nq
    turning = sum(model.tree.revolute)
    inputs = 2 * turning + (n - turning) + n + model.robot.nu + (n + 2 if changes.get("sees_step") else 0)
    sizes = (inputs, *hidden, n)
    layers = tuple((rng.normal(0, a**-0.5, (members, b, a)), rng.normal(0, 0.1, (members, b))) for a, b in zip(sizes, sizes[1:]))
    parts: dict[str, Any] = {
        "activation": "tanh",
        "input_mean": rng.normal(0, 0.1, inputs),
        "input_scale": rng.uniform(0.5, 2, inputs),
        "output_scale": rng.uniform(0.05, 0.2, n),
        "surfaces": TABLE,
        "near": 0.05,
        "far": 0.3,
        "dt": 0.02,
        "robot": model.robot.name,
        "joints": model.robot.joints,
    }
    return Residual(layers, **{**parts, **changes})


@pytest.fixture(scope="module")
def panda() -> Model:
    return load_model("panda")


def hybrid_of(model: Model, residual: Residual, dt: float = 0.02) -> HybridDynamics:
    base = RigidBodyDynamics(model.tree, dt, dtype=F64)
    return HybridDynamics(base, residual, model.tree.frames[model.robot.tool], capsule_obstacle)


def states(model: Model, count: int, seed: int = 0) -> torch.Tensor:
    rng, n = np.random.default_rng(seed), model.robot.nq
    q = np.asarray(model.robot.home)[:, None] + rng.uniform(-0.6, 0.6, (n, count))
    return torch.tensor(np.concatenate([q, rng.normal(0, 0.5, (n, count))]))


def test_the_residual_is_the_formula(panda: Model) -> None:
    """By hand in numpy: encode, normalise, every member, mean, S, gate; position follows velocity."""
    residual = residual_of(panda)
    hybrid, x, n = hybrid_of(panda, residual), states(panda, 40), 7
    u = torch.randn(7, 40, dtype=F64, generator=torch.Generator().manual_seed(0))
    after, physics = hybrid.step(x, u), hybrid.base.step(x, u)
    q, v, command = x[:n].numpy(), x[n:].numpy(), u.numpy()
    y = np.concatenate([np.sin(q), np.cos(q), v, command])  # torques
    y = (y - residual.input_mean[:, None]) / residual.input_scale[:, None]
    outputs = []
    for e in range(residual.members):
        z = y
        for k, (w, b) in enumerate(residual.layers):
            z = w[e] @ z + b[e][:, None]
            z = np.tanh(z) if k < len(residual.layers) - 1 else z
        outputs.append(z)
    gate = np.maximum(hybrid.gate(x[:n]).numpy(), hybrid.gate(physics[:n]).numpy())
    more = gate * residual.output_scale[:, None] * np.mean(outputs, 0)
    assert 0.1 < (gate > 0).mean() < 1 and (gate == 0).any()
    np.testing.assert_allclose((after - physics)[n:].numpy(), more, atol=1e-13)
    np.testing.assert_allclose((after - physics)[:n].numpy(), 0.02 * more, atol=1e-14)


def test_far_from_contact_the_physics_is_exact_whatever_the_networks_say(panda: Model) -> None:
    wild = residual_of(panda, output_scale=np.full(7, 1e30), near=0.001, far=0.002)
    hybrid, x = hybrid_of(panda, wild), states(panda, 60)
    u = torch.zeros(7, 60, dtype=F64)
    away = hybrid.gate(x[:7]) + hybrid.gate(hybrid.base.step(x, u)[:7]) == 0
    assert away.sum() > 20
    assert torch.equal(hybrid.step(x, u)[:, away], hybrid.base.step(x, u)[:, away])


def test_the_gate_is_one_at_contact_none_far_away_and_smooth_between(panda: Model) -> None:
    hybrid = hybrid_of(panda, residual_of(panda, surfaces=TABLE[:1]))
    q = torch.tensor(panda.robot.home, dtype=F64)[:, None].repeat(1, 400)
    q[3] = torch.linspace(-2.6, -0.8, 400)  # the elbow stretches, the tool goes down and out
    gates, heights = hybrid.gate(q), []
    for a, b, radius, link in hybrid.gate.capsules:
        ends = hybrid.base.points(hybrid.base.poses(q), link, np.stack([a, b]))
        heights.append(torch.minimum(ends[0][2], ends[1][2]) - 0.35 - radius)
    height = torch.stack(heights).min(0).values
    assert (gates[height <= 0.05] == 1).all() and (gates[height >= 0.3] == 0).all()
    assert (gates.diff() * height.diff() <= 1e-12).all() and gates.diff().abs().max() < 0.05


@pytest.mark.parametrize("name", ["panda", "arm2", "cartpole"])
@pytest.mark.parametrize("activation", ["tanh", "silu", "relu"])
def test_kernels_have_the_same_residual(name: str, activation: str) -> None:
    model = load_model(name)
    residual = residual_of(model, activation=activation, near=0.2, far=1.5)
    integrator = "leapfrog" if name == "arm2" else "euler"
    base = RigidBodyDynamics(model.tree, 0.02, commanded=model.robot.command_index, integrator=integrator, dtype=F64)
    hybrid = HybridDynamics(base, residual, model.tree.frames[model.robot.tool], capsule_obstacle)
    kernel = kernel_dynamics(base, CpuEngine(shared_pool(0), np.float64), traced_residual(hybrid))
    x, nu = 0.5 * states(model, 33), model.robot.nu
    u = 0.1 * torch.randn(8, nu, 33, dtype=F64, generator=torch.Generator().manual_seed(1))
    expected, found = hybrid.rollout(x, u).numpy(), kernel.rollout(x.numpy(), u.numpy())
    physics = base.rollout(x, u).numpy()
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print("residual", name, activation, error)
    assert np.abs(expected - physics).max() > 1e-3 and error <= 2e-8  # friction is good to 7e-9 there
    half = kernel.with_dt(0.01).rollout(x.numpy(), u.numpy())
    np.testing.assert_allclose(half, hybrid.with_dt(0.01).rollout(x, u).numpy(), rtol=1e-6, atol=1e-8)


def moving(model: Model) -> tuple[Surface, ...]:
    """Return a box on the first link, tilted as that is."""
    frame = next(name for name, frame in model.tree.frames.items() if frame.link == 0)
    return (Surface(name="lid", shape="box", position=(0.1, 0.2, 0.3), size=(0.1, 0.2, 0.05), frame=frame),)


@pytest.mark.parametrize("name", ["panda", "panda_wipe", "arm2"])
def test_kernels_see_the_same_step_and_surfaces_that_move(name: str) -> None:
    model = load_model(name)
    residual = residual_of(model, sees_step=True, surfaces=moving(model), near=0.2, far=1.5)
    base = RigidBodyDynamics(model.tree, 0.02, commanded=model.robot.command_index, dtype=F64)
    hybrid = HybridDynamics(base, residual, model.tree.frames[model.robot.tool], capsule_obstacle)
    kernel = kernel_dynamics(base, CpuEngine(shared_pool(0), np.float64), traced_residual(hybrid))
    x, nu = 0.5 * states(model, 33), model.robot.nu
    u = 0.1 * torch.randn(4, nu, 33, dtype=F64, generator=torch.Generator().manual_seed(1))
    for dt in (0.02, 0.01):
        expected = hybrid.with_dt(dt).rollout(x, u).numpy()
        np.testing.assert_allclose(kernel.with_dt(dt).rollout(x.numpy(), u.numpy()), expected, rtol=1e-6, atol=1e-8)
    still = tuple(surface.model_copy(update={"frame": None}) for surface in residual.surfaces)
    blind = HybridDynamics(base, replace(residual, surfaces=still), model.tree.frames[model.robot.tool], capsule_obstacle)
    assert np.abs(blind.rollout(x, u).numpy() - hybrid.rollout(x, u).numpy()).max() > 1e-4


def test_a_surface_moves_with_its_frame(panda: Model) -> None:
    """A plane in a link's frame, at any pose: the gap is that of the same plane put into the world by hand."""
    frame, x = "link5", states(panda, 20)
    fixed = Surface(name="plate", shape="plane", position=(0.1, -0.2, 0.3), normal=(0.6, 0.0, 0.8), frame=frame)
    hybrid = hybrid_of(panda, residual_of(panda, surfaces=(fixed,)))
    gaps = hybrid.gate.gap(x[:7]).numpy()
    rotation, position = hybrid.base.frame(hybrid.base.poses(x[:7]), panda.tree.frames[frame])
    for k in range(20):
        r, p = rotation[:, :, k].numpy(), position[:, k].numpy()
        place = {"position": tuple(p + r @ fixed.position), "normal": tuple(r @ fixed.normal)}
        world = hybrid_of(panda, residual_of(panda, surfaces=(Surface(name="plate", shape="plane", **place),)))
        np.testing.assert_allclose(world.gate.gap(x[:7, k : k + 1]).numpy(), gaps[k], atol=1e-12)
    lost = residual_of(panda, surfaces=(fixed.model_copy(update={"frame": "link9"}),))
    with pytest.raises(SpecError, match="surfaces.plate.frame: the model has no site or body 'link9'.*link"):
        hybrid_of(panda, lost)


def test_a_file_holds_all_of_it_and_nothing_else_passes(panda: Model, tmp_path: Path) -> None:
    residual, path = residual_of(panda), tmp_path / "residual.npz"
    residual.save(path)
    loaded = load_residual(path, panda.robot, panda.tree.revolute)
    for (a, b), (c, d) in zip(residual.layers, loaded.layers):
        assert np.array_equal(a, c) and np.array_equal(b, d)
    assert loaded.surfaces == residual.surfaces and (loaded.near, loaded.far, loaded.dt) == (0.05, 0.3, 0.02)
    with pytest.raises(SpecError, match=r"residual.npz: layers: expected 27 inputs and 7 outputs, found 28 and 7"):
        load_residual(path, panda.robot, (False, *panda.tree.revolute[1:]))
    (tmp_path / "text.npz").write_text("no numbers")
    with pytest.raises(SpecError, match="is no learned model"):
        load_residual(tmp_path / "text.npz", panda.robot, panda.tree.revolute)
    replace(residual, layers=((np.full((1, 7, 28), np.nan), np.zeros((1, 7))),)).save(path)
    with pytest.raises(SpecError, match="residual.npz: w0: .* not finite"):
        load_residual(path, panda.robot, panda.tree.revolute)


def test_a_run_plans_with_its_residual(panda: Model, tmp_path: Path) -> None:
    config, file = load_run("panda_reach_sim")
    residual_of(panda, members=2, near=0.2, far=0.8, dt=0.04).save(tmp_path / "r.npz")
    changes: dict[str, Any] = {"planner": {"samples": 40}, "dynamics": {"residual": str(tmp_path / "r.npz"), "threads": 1}}
    model, costs = load_run_model(config, file), {}
    for backend in ("kernel", "torch"):
        run = validate(RunConfig, merged(config.model_dump(), merged(changes, {"dynamics": {"backend": backend}})), file)
        controller = MpcController(run, model, file)
        from mbctrl.base.plan import PlanRequest

        plan = controller.plan(PlanRequest(0.0, np.concatenate([model.robot.home, np.zeros(7)])))
        costs[backend] = plan.info["best"], plan.x
    plain = MpcController(validate(RunConfig, merged(config.model_dump(), {"planner": {"samples": 40}}), file), model, file)
    other = plain.plan(PlanRequest(0.0, np.concatenate([model.robot.home, np.zeros(7)])))
    assert costs["kernel"][0] == pytest.approx(costs["torch"][0], rel=1e-4) != pytest.approx(other.info["best"], rel=1e-3)
    np.testing.assert_allclose(costs["kernel"][1], costs["torch"][1], atol=2e-4)
    missing = validate(RunConfig, merged(config.model_dump(), {"dynamics": {"residual": "nowhere.npz"}}), file)
    with pytest.raises(SpecError, match="dynamics.residual: nowhere.npz: no such file"):
        MpcController(missing, model, file)
