"""Models without physics in compiled rollouts, and members of an ensemble that roll out one by one: against torch, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_hybrid import residual_of, states

from mbctrl.base.config import RiskSpec, RunConfig, load_run, merged
from mbctrl.base.errors import SpecError
from mbctrl.base.spec import validate
from mbctrl.cli.build import load_run_model
from mbctrl.dynamics.actuation import drive_settings
from mbctrl.dynamics.contact import declared
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.residual import Residual
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.export.bundle import export_bundle
from mbctrl.kernels.native import shared_pool
from mbctrl.planning.compiled import kernel_dynamics, kernel_search, traced_residual
from mbctrl.planning.controller import MpcController, scales_of, with_force
from mbctrl.planning.engines import CpuEngine
from mbctrl.planning.knots import Knots
from mbctrl.planning.noise import Noise, Shape
from mbctrl.planning.objective import FeatureMap, MemberwiseObjective, RolloutObjective
from mbctrl.planning.planner import Parameters, Planner
from mbctrl.planning.risk import Risk
from mbctrl.planning.rules.base import Distribution
from mbctrl.planning.rules.cem import Cem
from mbctrl.tasks.distance import capsule_obstacle
from mbctrl.tasks.task import build_task

F64 = torch.float64
N = 21


def identity(model: Model, **changes: Any) -> Residual:
    """Return a model without physics, small enough to stay near home for a while."""
    return replace(residual_of(model, **changes), base="identity", surfaces=())


def raw(residual: Residual, model: Model) -> Residual:
    """Return the same with angles as they are."""
    n = 2 * model.tree.n + model.robot.nu
    first = residual.layers[0][0][:, :, :n], residual.layers[0][1]
    shorter = {name: getattr(residual, name)[:n] for name in ("input_mean", "input_scale")}
    return replace(residual, layers=(first, *residual.layers[1:]), encode_angles=False, **shorter)


def learned(model: Model, residual: Residual, integrator: str = "euler", **more: Any) -> HybridDynamics:
    base = RigidBodyDynamics(model.tree, 0.02, **drive_settings(model.robot), integrator=integrator, dtype=F64, **more)
    return HybridDynamics(base, residual, model.tree.frames[model.robot.tool], capsule_obstacle)


@pytest.mark.parametrize("angles", [True, False])
@pytest.mark.parametrize("integrator", ["euler", "leapfrog"])
@pytest.mark.parametrize("name", ["panda", "arm2", "cartpole"])
def test_kernels_have_the_same_model_without_physics(name: str, integrator: str, angles: bool) -> None:
    model = load_model(name)
    residual = identity(model) if angles else raw(identity(model), model)
    hybrid = learned(model, residual, integrator)
    kernel = kernel_dynamics(hybrid.base, CpuEngine(shared_pool(1), np.float64), traced_residual(hybrid))
    x, u = states(model, 33), torch.randn(8, model.robot.nu, 33, dtype=F64, generator=torch.Generator().manual_seed(1))
    expected, found = hybrid.rollout(x, u).numpy(), kernel.rollout(x.numpy(), u.numpy())
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print("identity", name, integrator, error)
    assert error <= 1e-13, error
    n = model.tree.n
    np.testing.assert_allclose(found[1:, :n] - found[:-1, :n], 0.01 * (found[:-1, n:] + found[1:, n:]), atol=1e-13)
    half = kernel.with_dt(0.01).rollout(x.numpy(), u.numpy())
    np.testing.assert_allclose(half, hybrid.with_dt(0.01).rollout(x, u).numpy(), rtol=1e-12, atol=1e-13)
    physics = hybrid.base.rollout(x, u).numpy()
    assert np.abs(expected - physics).max() > 1e-3


def both(name: str, residual: Any, spec: RiskSpec | None) -> tuple[np.ndarray, np.ndarray, Any]:
    """Return the costs of the same candidates of a scenario, compiled and in torch, in double precision; and the search."""
    config, file = load_run(name)
    model = load_run_model(config, file)
    made = residual(model)
    hybrid = learned(model, made, contact=declared(config.dynamics.contact, model.tree))
    features = FeatureMap(model.robot, hybrid.base)
    task = with_force(build_task(config.task, scales_of(model.robot)), config, None)
    knots, nu = Knots(4, 6, 0.02, "linear"), model.robot.nu
    noise = Noise("halton", Shape(4, nu, N), dtype=F64)
    risk = None if spec is None else Risk(spec, made.members)
    bounds = {"lower": np.full(nu, -3.0), "upper": np.full(nu, 3.0)}
    search = kernel_search(
        hybrid.base,
        features.tool,
        task,
        knots,
        noise,
        samples=N,
        **bounds,
        engine=CpuEngine(shared_pool(1), np.float64),
        residual=traced_residual(hybrid),
        risk=risk,
    )
    home = np.asarray(model.robot.home)
    mean = np.tile(home[model.robot.command_index] if model.robot.control.mode == "impedance" else np.zeros(nu), (4, 1))
    belief = Distribution(mean, np.full((4, nu), 0.3), mean, mean[..., None][..., :0])
    given: dict[str, Any] = {"u_before": mean[0]}
    if config.goal.kind == "joints":
        given["q_target"] = np.asarray(config.goal.position, float)
    else:
        given["p_target"] = np.tile(np.array([0.5, 0.1, 0.4])[:, None, None], (1, 6, 1))
    x = np.concatenate([home, 0.1 * np.ones(model.tree.n)])
    candidates, costs = search(belief, mean[..., None], 3, 5, x, Parameters(**given))
    tensors = Parameters(**{key: torch.tensor(value) for key, value in given.items()})
    commands = torch.tensor(knots.commands(candidates))
    if risk is None:
        return costs, RolloutObjective(hybrid, features, task)(torch.tensor(x), commands, tensors).numpy(), search
    members = [RolloutObjective(member, features, task) for member in hybrid.each()]
    return costs, MemberwiseObjective(members, risk)(torch.tensor(x), commands, tensors).numpy(), search


RISKS = {
    "mean": RiskSpec(kind="mean"),
    "cautious": RiskSpec(kind="deviation", weight=1.5),
    "curious": RiskSpec(kind="deviation", weight=-0.7),
    "worst": RiskSpec(kind="worst"),
    "cvar": RiskSpec(kind="cvar", share=0.5),
}


@pytest.mark.parametrize("risk", [None, *RISKS])
@pytest.mark.parametrize("name", ["arm2_swingup_sim", "panda_wipe_sim"])
@pytest.mark.parametrize("make", [residual_of, identity], ids=["gated", "identity"])
def test_costs_are_the_same_compiled_and_in_torch(make: Any, name: str, risk: str | None) -> None:
    """panda_wipe_sim has terms of a contact's gap, speed and force, which a model without physics has, too."""
    config, _ = load_run(name)
    assert name != "panda_wipe_sim" or {"contact_force", "contact_gap"} <= set(config.task)
    found, expected, _ = both(name, lambda model: make(model, near=0.2, far=1.5), risk and RISKS[risk])
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print("costs", name, risk, error)
    assert np.isfinite(found).all() and np.ptp(found) > 1e-6 * np.abs(found).max() and error <= 1e-7, error


def test_risks_are_what_they_are_called() -> None:
    costs = np.random.default_rng(0).normal(size=(4, 50))
    for array in (costs, torch.tensor(costs)):
        found = {name: np.asarray(Risk(spec, 4)(array)) for name, spec in RISKS.items()}
        np.testing.assert_allclose(found["mean"], costs.mean(0), atol=1e-14)
        np.testing.assert_allclose(found["cautious"], costs.mean(0) + 1.5 * costs.std(0), atol=1e-14)
        np.testing.assert_allclose(found["curious"], costs.mean(0) - 0.7 * costs.std(0), atol=1e-14)
        np.testing.assert_allclose(found["worst"], costs.max(0), atol=1e-14)
        np.testing.assert_allclose(found["cvar"], np.sort(costs, 0)[2:].mean(0), atol=1e-14)
    part = Risk(RiskSpec(kind="cvar", share=0.4), 4)(costs)  # 1.6 members: the worst, and 0.6 of the next
    ordered = np.sort(costs, 0)[::-1]
    np.testing.assert_allclose(part, (ordered[0] + 0.6 * ordered[1]) / 1.6, atol=1e-14)
    assert Risk(RISKS["worst"], 4)(costs.astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize("risk", RISKS)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_member_that_is_not_finite_makes_no_candidate_preferred(risk: str, number: float) -> None:
    costs = np.random.default_rng(0).normal(size=(3, 9))
    costs[:, 4] = -100.0  # by far the cheapest, were it not for one member
    costs[1, 4] = number
    found = Risk(RISKS[risk], 3)(costs)
    assert found[4] == np.inf and np.isfinite(np.delete(found, 4)).all() and found.argmin() != 4
    others = Risk(RISKS[risk], 3)(np.delete(costs, 4, 1))
    assert np.array_equal(np.delete(found, 4), others)


def exploding(model: Model) -> Residual:
    """Return two networks: one says nothing; the other one something infinite where the first command is positive."""
    quiet = identity(model, members=2, hidden=(4,), activation="relu")
    (w0, b0), (w1, b1) = ((np.zeros_like(w), np.zeros_like(b)) for w, b in quiet.layers)
    w0[1, 0, -model.robot.nu], w1[1, 0, 0] = 1e200, 1e200
    ones = {"input_mean": np.zeros(w0.shape[2]), "input_scale": np.ones(w0.shape[2]), "output_scale": np.ones(model.tree.n)}
    return replace(quiet, layers=((w0, b0), (w1, b1)), **ones)


@pytest.mark.parametrize("risk", RISKS)
def test_candidates_that_diverge_for_one_member_cost_infinitely_much(risk: str) -> None:
    found, expected, search = both("arm2_swingup_sim", exploding, RISKS[risk])
    zero = np.zeros(2)
    belief = Distribution(*np.zeros((3, 4, 2)), np.zeros((4, 2, 0)))
    candidates, _ = search(replace(belief, spread=belief.spread + 0.3), belief.mean[..., None], 3, 5, np.zeros(4), _still(zero))
    pushed = (search._knots.commands(candidates)[:, 0] > 0).any(0)
    assert np.array_equal(np.isinf(found), pushed) and 0 < pushed.sum() < N and np.array_equal(np.isinf(expected), pushed)
    knots = search._knots
    planner = Planner(search, Cem(elites=4, smoothing=0.0), knots, samples=N, sigma=np.full((4, 2), 0.3))
    _, result = planner.plan(planner.initial(zero, 0.0, 3), np.zeros(4), _still(zero), 0.0)
    assert result.figures.nonfinite > 0 and result.weights[np.isinf(search_costs(search, planner, zero))].sum() == 0


def _still(zero: np.ndarray) -> Parameters:
    return Parameters(u_before=zero, q_target=zero)


def search_costs(search: Any, planner: Planner, zero: np.ndarray) -> np.ndarray:
    state = planner.initial(zero, 0.0, 3)
    return search(state.belief, planner.fixed(state.belief), 3, 0, np.zeros(4), _still(zero))[1]


def test_members_see_the_same_candidates(tmp_path: Path) -> None:
    """With draws inside the kernel, too: a mean over members is the mean of what each of them alone costs."""
    config, file = load_run("arm2_swingup_sim")
    model = load_run_model(config, file)
    residual = identity(model, dt=config.dynamics.dt)
    files = {"all": residual} | {f"{e}": residual.member(e) for e in range(3)}
    costs, seen = {}, {}
    for name, one in files.items():
        one.save(tmp_path / f"{name}.npz")
        over = {"samples": 40, "risk": {"kind": "mean"} if name == "all" else {}}
        controller = controller_with(config, file, model, tmp_path / f"{name}.npz", over)
        planner = controller.planner
        state = planner.initial(np.zeros(2, np.float32), 0.0, 7)
        parameters = Parameters(u_before=np.zeros(2, np.float32), q_target=np.zeros(2, np.float32))
        seen[name], costs[name] = planner.search(state.belief, planner.fixed(state.belief), 7, 1, np.ones(4), parameters)
    assert all(np.array_equal(seen["all"], other) for other in seen.values())
    np.testing.assert_allclose(costs["all"], np.mean([costs[str(e)] for e in range(3)], 0), rtol=1e-6)
    assert np.ptp([costs[str(e)] for e in range(3)], 0).min() > 0  # members differ


def controller_with(config: RunConfig, file: Path, model: Model, residual: Path, planner: dict[str, Any]) -> MpcController:
    changes = {"planner": planner, "dynamics": {"residual": str(residual), "threads": 1, "backend": "kernel"}}
    return MpcController(validate(RunConfig, merged(config.model_dump(), changes), file), model, file)


def test_a_risk_that_means_nothing_is_refused_by_name(tmp_path: Path) -> None:
    config, file = load_run("arm2_swingup_sim")
    model = load_run_model(config, file)
    risky = validate(RunConfig, merged(config.model_dump(), {"planner": {"risk": {"kind": "worst"}}}), file)
    message = (
        r"arm2_swingup_sim.yaml: planner.risk.kind: 'worst' needs an ensemble of at least 2 networks, found no dynamics.residual"
    )
    with pytest.raises(SpecError, match=message):
        MpcController(risky, model, file)
    identity(model, members=1, dt=config.dynamics.dt).save(tmp_path / "one.npz")
    with pytest.raises(SpecError, match="planner.risk.kind: 'worst' needs .*, found 1 networks"):
        controller_with(config, file, model, tmp_path / "one.npz", {"risk": {"kind": "worst"}})
    for wrong, says in (
        ({"kind": "mean", "weight": 1.0}, "weight: is of kind deviation, found kind mean"),
        ({"kind": "deviation"}, "weight: missing; is needed by kind deviation"),
        ({"kind": "cvar", "share": 0.0}, "planner.risk.share"),
        ({"kind": "cvar"}, "share: missing; is needed by kind cvar"),
        ({"kind": "best"}, "planner.risk.kind"),
    ):
        with pytest.raises(SpecError, match=says) as caught:
            validate(RunConfig, merged(config.model_dump(), {"planner": {"risk": wrong}}), file)
        assert "\n" not in str(caught.value)


def test_a_risk_over_members_is_not_exported(tmp_path: Path) -> None:
    config, file = load_run("arm2_swingup_sim")
    model = load_run_model(config, file)
    identity(model, dt=config.dynamics.dt).save(tmp_path / "full.npz")
    changes = {"planner": {"risk": {"kind": "mean"}, "samples": 16}, "dynamics": {"residual": str(tmp_path / "full.npz")}}
    run = validate(RunConfig, merged(config.model_dump(), changes), file)
    with pytest.raises(SpecError, match="planner.risk.kind: 'mean' over rollouts of members is not exported; expected expectation"):
        export_bundle(run, model, tmp_path / "bundle", file)
    assert not (tmp_path / "bundle").exists()
