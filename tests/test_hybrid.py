"""A learned residual on top of the physics: gated, integrated into position, the same in torch, kernels and ONNX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbctrl.base.config import ContactSpec, RunConfig, load_run, merged
from mbctrl.base.errors import SpecError
from mbctrl.base.spec import validate
from mbctrl.cli.build import load_run_model
from mbctrl.dynamics.contact import SEEN_OF_CONTACT, seen_of_contact
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.residual import Residual, Spread, Surface, load_residual
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
    turning, means = sum(model.tree.revolute), n
    inputs = 2 * turning + (n - turning) + n + model.robot.nu
    if changes.get("acts_on") == "contact":
        inputs, means, changes = SEEN_OF_CONTACT, 3, {"surfaces": (), **changes}
    sizes = (inputs, *hidden, means)
    layers = tuple((rng.normal(0, a**-0.5, (members, b, a)), rng.normal(0, 0.1, (members, b))) for a, b in zip(sizes, sizes[1:]))
    parts: dict[str, Any] = {
        "activation": "tanh",
        "input_mean": rng.normal(0, 0.1, inputs),
        "input_scale": rng.uniform(0.5, 2, inputs),
        "output_scale": rng.uniform(0.05, 0.2, means),
        "surfaces": TABLE,
        "near": 0.05,
        "far": 0.3,
        "dt": 0.02,
        "robot": model.robot.name,
        "joints": model.robot.joints,
    }
    return Residual(layers, **{**parts, **changes})


def opened(hybrid: HybridDynamics, q: torch.Tensor) -> torch.Tensor:
    """Return g (N,) at positions ``q`` (nq, N)."""
    return hybrid.gate.open(hybrid.gate.gap(q))


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
    gate = np.maximum(opened(hybrid, x[:n]).numpy(), opened(hybrid, physics[:n]).numpy())
    more = gate * residual.output_scale[:, None] * np.mean(outputs, 0)
    assert 0.1 < (gate > 0).mean() < 1 and (gate == 0).any()
    np.testing.assert_allclose((after - physics)[n:].numpy(), more, atol=1e-13)
    np.testing.assert_allclose((after - physics)[:n].numpy(), 0.02 * more, atol=1e-14)


def test_far_from_contact_the_physics_is_exact_whatever_the_networks_say(panda: Model) -> None:
    wild = residual_of(panda, output_scale=np.full(7, 1e30), near=0.001, far=0.002)
    hybrid, x = hybrid_of(panda, wild), states(panda, 60)
    u = torch.zeros(7, 60, dtype=F64)
    away = opened(hybrid, x[:7]) + opened(hybrid, hybrid.base.step(x, u)[:7]) == 0
    assert away.sum() > 20
    assert torch.equal(hybrid.step(x, u)[:, away], hybrid.base.step(x, u)[:, away])


def test_the_gate_is_one_at_contact_none_far_away_and_smooth_between(panda: Model) -> None:
    hybrid = hybrid_of(panda, residual_of(panda, surfaces=TABLE[:1]))
    q = torch.tensor(panda.robot.home, dtype=F64)[:, None].repeat(1, 400)
    q[3] = torch.linspace(-2.6, -0.8, 400)  # the elbow stretches, the tool goes down and out
    gates, heights = opened(hybrid, q), []
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


def touch_of(model: Model) -> ContactSpec:
    """Return a contact of the tool's link with one that is fixed, a slide or the world's, whichever the arm has."""
    surface = {"panda_wipe": "table_top", "panda_push": "box_face"}.get(model.robot.name)
    first = next(name for name, frame in model.tree.frames.items() if frame.link == 0)
    free = {"stiffness": 0.0, "damping": 0.0, "friction": 0.0}
    return ContactSpec(tip=model.robot.tool, radius=0.01, surface=surface or first, half=(0.2, 0.3), **free)


def moving(model: Model) -> tuple[Surface, ...]:
    """Return a box on the first link, tilted as that is."""
    frame = next(name for name, frame in model.tree.frames.items() if frame.link == 0)
    return (Surface(name="lid", shape="box", position=(0.1, 0.2, 0.3), size=(0.1, 0.2, 0.05), frame=frame),)


@pytest.mark.parametrize("name", ["panda", "panda_wipe", "panda_push"])
@pytest.mark.parametrize("integrator", ["euler", "leapfrog"])
@pytest.mark.parametrize("acts_on", ["contact", "joints"])
def test_kernels_see_the_same_contact_and_surfaces_that_move(name: str, integrator: str, acts_on: str) -> None:
    model = load_model(name)
    acts: dict[str, Any] = (
        {"acts_on": "contact", "contact": touch_of(model)} if acts_on == "contact" else {"surfaces": moving(model)}
    )
    residual = residual_of(model, near=0.2, far=1.5, integrator=integrator, **acts)
    base = RigidBodyDynamics(model.tree, 0.02, commanded=model.robot.command_index, integrator=integrator, dtype=F64)
    hybrid = HybridDynamics(base, residual, model.tree.frames[model.robot.tool], capsule_obstacle)
    kernel = kernel_dynamics(base, CpuEngine(shared_pool(0), np.float64), traced_residual(hybrid))
    x, nu = 0.5 * states(model, 33), model.robot.nu
    u = 0.1 * torch.randn(4, nu, 33, dtype=F64, generator=torch.Generator().manual_seed(1))
    for dt in (0.02, 0.01):
        expected = hybrid.with_dt(dt).rollout(x, u).numpy()
        np.testing.assert_allclose(kernel.with_dt(dt).rollout(x.numpy(), u.numpy()), expected, rtol=1e-6, atol=1e-8)
    still = tuple(surface.model_copy(update={"frame": None}) for surface in residual.surfaces)
    other = {"near": 0.1} if acts_on == "contact" else {"surfaces": still}
    blind = HybridDynamics(base, replace(residual, **other), model.tree.frames[model.robot.tool], capsule_obstacle)
    assert np.abs(blind.rollout(x, u).numpy() - hybrid.rollout(x, u).numpy()).max() > 1e-4


def test_what_is_seen_of_a_contact_is_linear_algebra() -> None:
    """Against numpy's solver, at random mobilities; and one that can only be moved along the normal is not divided by nothing."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        root = rng.normal(size=(3, 3))
        mobility = root @ root.T + 0.1 * np.eye(3)
        before, free, depth = rng.normal(size=3), rng.normal(size=3), rng.normal()
        seen = seen_of_contact(depth, before, free, mobility)
        stops = np.linalg.solve(mobility + 1e-3 * np.trace(mobility) * np.eye(3), free)
        np.testing.assert_allclose(seen, [depth, *before, *free, *stops, mobility[2, 2]], rtol=1e-9)
    slide = seen_of_contact(0.0, np.zeros(3), np.array([0.0, 0.0, -3.0]), np.diag([0.0, 0.0, 2.0]))
    np.testing.assert_allclose(slide[7:10], [0.0, 0.0, -1.5 / 1.001], rtol=1e-12)
    assert len(seen) == len(slide) == SEEN_OF_CONTACT


@pytest.mark.parametrize("integrator", ["euler", "leapfrog"])
def test_networks_of_a_contact_are_gated_by_its_tip(integrator: str) -> None:
    """By the smaller gap of where a step takes its forces and of its untouched end; beyond it, not a bit is added."""
    model = load_model("panda_wipe")
    contact = touch_of(model).model_copy(update={"half": None})
    wild = residual_of(
        model, acts_on="contact", contact=contact, integrator=integrator, near=0.0, far=0.1, output_scale=np.full(3, 1e30)
    )
    base = RigidBodyDynamics(model.tree, 0.02, integrator=integrator, dtype=F64)
    tip, plate = model.tree.frames[model.robot.tool], model.tree.frames["table_top"]
    hybrid = HybridDynamics(base, wild, tip, capsule_obstacle)
    x, u = 0.3 * states(model, 300), torch.zeros(8, 300, dtype=F64)

    def gap(q: torch.Tensor) -> torch.Tensor:
        poses = base.poses(q)
        rotation, position = base.frame(poses, plate)
        return ((base.point(poses, tip.link, tip.position) - position) * rotation[:, 2]).sum(0) - contact.radius

    x[7] += gap(x[:8]) - torch.linspace(-0.05, 0.25, 300)  # the plate comes near, from under the tip to above it
    after, physics = hybrid.step(x, u), base.step(x, u)
    nearest = torch.minimum(gap(x[:8] + (0.01 * x[8:] if integrator == "leapfrog" else 0.0)), gap(physics[:8]))
    away = nearest > 0.1 + 0.01  # a step's end is found along a tangent
    assert away.sum() > 20 and torch.equal(after[:, away], physics[:, away])
    gates, part = hybrid.step_gate(x, u), ((0.1 - nearest) / 0.1).clamp(0, 1)
    torch.testing.assert_close(gates, part**2 * (3 - 2 * part), rtol=0, atol=0.05)
    assert (gates[nearest < -0.01] == 1).all() and ((gates > 0) & (gates < 1)).sum() > 20
    torch.testing.assert_close(hybrid.gate.gap(x[:8]), gap(x[:8]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("integrator", ["euler", "leapfrog"])
def test_impulses_act_at_the_contact(integrator: str) -> None:
    """Rows by finite differences of the tip in the plate's axes; the step's matrix by pushing on single joints for a step."""
    model = load_model("panda_wipe")
    acts: dict[str, Any] = {"acts_on": "contact", "contact": touch_of(model), "integrator": integrator}
    residual = residual_of(model, near=5.0, far=6.0, **acts)
    tree = replace(model.tree, friction=np.zeros(8))  # friction is not linear in what is pushed
    base = RigidBodyDynamics(tree, 0.02, integrator=integrator, dtype=F64)
    tip, plate = model.tree.frames[model.robot.tool], model.tree.frames["table_top"]
    hybrid = HybridDynamics(base, residual, tip, capsule_obstacle)
    x, u = states(model, 5), torch.zeros(8, 5, dtype=F64)
    seen = hybrid._sight(base, x, u)
    middle = x[:8] + (0.01 * x[8:] if integrator == "leapfrog" else 0.0)

    def place(q: torch.Tensor) -> torch.Tensor:
        """Return the tip's lowest point in the plate's axes, (3, 5)."""
        poses = base.poses(q)
        rotation, position = base.frame(poses, plate)
        return (rotation * (base.point(poses, tip.link, tip.position) - position)[:, None]).sum(0)

    rows, response, step = torch.zeros(3, 8, 5, dtype=F64), torch.zeros(8, 8, 5, dtype=F64), 1e-6
    for j in range(8):
        more = torch.zeros(8, 5, dtype=F64)
        more[j] = step
        rows[:, j] = (place(middle + more) - place(middle - more)) / (2 * step)
        response[:, j] = (base.step(x, 100 * more / step) - base.step(x, -100 * more / step))[8:] / (200 * 0.02)
    # The rows are of the tip's lowest point, a radius under its centre, which moves with its link.
    poses = base.poses(middle)
    rotation, _ = base.frame(poses, plate)
    angular = base.screws(torch.stack(poses.rotation), torch.stack(poses.position))[:, :, 0].permute(1, 0, 2)  # (3, 8, 5)
    lever = -residual.contact.radius * rotation[:, 2]
    moved = torch.linalg.cross(angular, lever[:, None].expand_as(angular), dim=0)
    rows += (rotation[:, :, None] * moved[:, None]).sum(0)
    torch.testing.assert_close(seen.answers, (response[:, :, None] * rows.transpose(0, 1)[None]).sum(1), rtol=1e-5, atol=1e-7)
    after, physics = hybrid.step(x, u), base.step(x, u)
    impulse = hybrid._summed(seen.inputs)
    torch.testing.assert_close((after - physics)[8:], (seen.answers * impulse).sum(1), rtol=1e-9, atol=1e-12)
    assert (after - physics)[8:].abs().min() > 0 and impulse.abs().min() > 0


def test_deviations_of_impulses_are_those_of_joint_speeds() -> None:
    """Variances through the answers, and what no impulse explains, with and without contact."""
    model = load_model("panda_wipe")
    contact = touch_of(model)
    plain = residual_of(model, acts_on="contact", contact=contact, near=5.0, far=6.0)
    rest = np.stack([np.linspace(0.01, 0.08, 8), np.linspace(0.1, 0.8, 8)])
    spread = Spread(np.full(3, -6.0), np.full(3, 2.0), np.linspace(0.5, 2, 8), rest)
    (w, b), rng = plain.layers[-1], np.random.default_rng(0)
    last = np.concatenate([w, rng.normal(size=w.shape)], 1), np.concatenate([b, rng.normal(size=b.shape)], 1)
    base = RigidBodyDynamics(model.tree, 0.02, dtype=F64)
    tip = model.tree.frames[model.robot.tool]
    hybrid = HybridDynamics(base, replace(plain, layers=(*plain.layers[:-1], last), spread=spread), tip, capsule_obstacle)
    x, u = states(model, 60), torch.zeros(8, 60, dtype=F64)
    x[7] = torch.linspace(-0.3, 0.6, 60)  # the plate, from below the tip to above it
    mean, variance = hybrid.members(x, u)
    seen = hybrid._sight(base, x, u)
    assert seen.touching.any() and not seen.touching.all()
    scale = torch.tensor(spread.scale)[:, None]
    whole = variance.mean(0) + scale**2 * mean.var(0, correction=0) + torch.tensor(rest)[seen.touching.long()].T ** 2
    torch.testing.assert_close(hybrid.deviation(x, u), seen.gate * whole.sqrt(), rtol=1e-9, atol=1e-12)
    spread_out = (seen.answers**2 * torch.tensor(plain.output_scale)[:, None] ** 2).sum(1) * scale**2 * np.exp(2.0)
    assert (variance <= spread_out * (1 + 1e-9)).all() and (variance >= spread_out * np.exp(-8.0) * 0.99).all()


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
    loaded = load_residual(path, panda.robot, panda.tree)
    for (a, b), (c, d) in zip(residual.layers, loaded.layers):
        assert np.array_equal(a, c) and np.array_equal(b, d)
    assert loaded.surfaces == residual.surfaces and (loaded.near, loaded.far, loaded.dt) == (0.05, 0.3, 0.02)
    with pytest.raises(SpecError, match=r"residual.npz: layers: expected 27 inputs and 7 outputs, found 28 and 7"):
        load_residual(path, panda.robot, replace(panda.tree, revolute=(False, *panda.tree.revolute[1:])))
    (tmp_path / "text.npz").write_text("no numbers")
    with pytest.raises(SpecError, match="is no learned model"):
        load_residual(tmp_path / "text.npz", panda.robot, panda.tree)
    replace(residual, layers=((np.full((1, 7, 28), np.nan), np.zeros((1, 7))),)).save(path)
    with pytest.raises(SpecError, match="residual.npz: w0: .* not finite"):
        load_residual(path, panda.robot, panda.tree)


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
    unheard = validate(RunConfig, merged(config.model_dump(), merged(changes, {"dynamics": {"backend": "mujoco"}})), file)
    with pytest.raises(SpecError, match="dynamics.backend: MuJoCo as the model has no place for what was learned"):
        MpcController(unheard, model, file)
