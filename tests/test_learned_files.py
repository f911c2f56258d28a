"""A model's file: what it holds, and what it refuses in one line that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_hybrid import residual_of, touch_of

from mbctrl.base.config import ContactSpec, RunConfig, load_run, merged
from mbctrl.base.errors import SpecError
from mbctrl.base.plan import PlanRequest
from mbctrl.base.spec import validate
from mbctrl.cli.build import load_run_model
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.residual import Residual, Spread, load_residual, peek, physics_of
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.kernels.native import shared_pool
from mbctrl.planning.compiled import kernel_dynamics, traced_residual
from mbctrl.planning.controller import MpcController
from mbctrl.planning.engines import CpuEngine
from mbctrl.tasks.distance import capsule_obstacle


@pytest.fixture(scope="module")
def arm2() -> Model:
    return load_model("arm2")


def with_variance(model: Model, **changes: Any) -> Residual:
    """Return a residual with as many outputs again, which say how sure it is."""
    plain, rng = residual_of(model, **changes), np.random.default_rng(7)
    (w, b), n, means = plain.layers[-1], model.tree.n, len(plain.output_scale)
    last = np.concatenate([w, rng.normal(size=w.shape)], 1), np.concatenate([b, rng.normal(size=b.shape)], 1)
    rest = np.zeros((2, n)) if plain.acts_on == "joints" else rng.uniform(0.001, 0.01, (2, n))
    spread = Spread(np.full(means, -6.0), np.full(means, 2.0), np.linspace(0.5, 2, n), rest)
    return replace(plain, layers=(*plain.layers[:-1], last), spread=spread)


def identity(model: Model) -> Residual:
    return replace(residual_of(model), base="identity", surfaces=())


def at_contact(model: Model) -> Residual:
    return with_variance(model, acts_on="contact", contact=touch_of(model))


MADE = {"means": residual_of, "variances": with_variance, "identity": identity, "contact": at_contact}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_file_holds_all_of_it(arm2: Model, tmp_path: Path, make: Callable[[Model], Residual]) -> None:
    path = tmp_path / "model.npz"
    physics = physics_of(arm2.tree)
    written = replace(make(arm2), seed=5, physics=physics, versions={"mbctrl": "0.1.0"}, encode_angles=True, integrator="leapfrog")
    written.save(path)
    read = load_residual(path, arm2.robot, arm2.tree, 0.02, "leapfrog")
    for name, value in vars(written).items():
        if name == "layers":
            assert all(np.array_equal(a, b) for one, other in zip(value, read.layers) for a, b in zip(one, other))
        elif name == "physics":
            assert value and all(np.array_equal(read.physics[key], x) for key, x in value.items())
        elif name == "spread":
            assert (value is None) == (read.spread is None)
            assert value is None or all(np.array_equal(x, vars(read.spread)[key]) for key, x in vars(value).items())
        else:
            np.testing.assert_array_equal(getattr(read, name), value, err_msg=name)
    assert peek(path) == ("arm2", 0.02)


def edited(path: Path, arrays: dict[str, Any] | None = None, drop: str | None = None, **about: Any) -> None:
    """Change a file's numbers or what it says of itself."""
    with np.load(path) as data:
        parts = {name: data[name] for name in data.files if name != drop}
    parts["about"] = np.array(json.dumps({**json.loads(str(parts["about"])), **about}))
    np.savez(path, **{**parts, **(arrays or {})})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "format: expected format 3, found 1"),
        ({"format": None}, "format: expected format 3, found None"),
        ({"acts_on": "feet"}, "acts_on: expected one of joints, contact, found 'feet'"),
        ({"acts_on": "contact"}, "layers: expected 11 inputs and 3 outputs, found 8 and 2"),
        ({"robot": "panda"}, "robot: expected a model of 'arm2', found one of 'panda'"),
        ({"joints": ["elbow", "shoulder"]}, "joints: expected .'shoulder', 'elbow'., found .'elbow', 'shoulder'."),
        ({"activation": "gelu"}, "activation: expected one of tanh, silu, relu, found 'gelu'"),
        ({"base": "magic"}, "base: expected one of analytic, identity, found 'magic'"),
        ({"surfaces": []}, "surfaces"),
        ({"surfaces": [{"name": "x"}]}, "surfaces.0.*missing"),
        ({"drop": "w1"}, "is no learned model|layers"),
        ({"drop": "input_mean"}, "is no learned model"),
        ({"arrays": {"w0": np.full((3, 9, 8), np.nan)}}, "w0: holds numbers that are not finite"),
        ({"arrays": {"spread": np.array([1.0])}}, "is no learned model|spread"),
        ({"arrays": {"input_scale": np.zeros(8)}}, "input_scale: expected 8 numbers, scales above 0"),
        ({"arrays": {"output_scale": np.ones(3)}}, "output_scale: expected 2 numbers"),
        ({"arrays": {"near": np.array(0.5)}}, "near below far"),
        ({"arrays": {"dt": np.array(0.0)}}, "time step above 0"),
        ({"arrays": {"w0": np.zeros((3, 9, 7))}}, "layers: expected 8 inputs and 2 outputs, found 7 and 2"),
        ({"arrays": {"b1": np.zeros((3, 4))}}, "layers"),
        ({"arrays": {"w0": np.array(["a"])}}, "w0: expected numbers"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arm2: Model, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "model.npz"
    residual_of(arm2).save(path)
    edited(path, **change)
    with pytest.raises(SpecError, match=message) as caught:
        load_residual(path, arm2.robot, arm2.tree)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken"])
def test_no_model_at_all_is_one_line(arm2: Model, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.npz"
    path.write_bytes(content)
    with pytest.raises(SpecError, match="model.npz: is no learned model"):
        load_residual(path, arm2.robot, arm2.tree)
    with pytest.raises(SpecError, match="is no learned model"):
        peek(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contact": None}, "contact: expected a contact of the analytic model to act on, found none"),
        ({"base": "identity"}, "contact: expected a contact of the analytic model to act on, found none"),
        ({"contact": {"tip": "tcp"}}, "contact.*missing"),
        ({"acts_on": "joints"}, "surfaces: .* at least 1"),
        ({"arrays": {"spread": np.ones((2, 2))}}, "spread"),
        ({"arrays": {"bounds": np.ones((2, 2))}}, "spread: expected bounds of 3 numbers and spreads of 2"),
    ],
)
def test_what_acts_on_a_contact_needs_one(arm2: Model, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "model.npz"
    at_contact(arm2).save(path)
    edited(path, **change)
    with pytest.raises(SpecError, match=message) as caught:
        load_residual(path, arm2.robot, arm2.tree)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_pickle_is_never_opened(arm2: Model, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "sprung").touch, ())

    path = tmp_path / "model.npz"
    residual_of(arm2).save(path)
    with np.load(path) as data:
        parts = dict(data)
    np.savez(path, **{**parts, "w0": np.array([Trap()], dtype=object)})
    with pytest.raises(SpecError, match="is no learned model"):
        load_residual(path, arm2.robot, arm2.tree)
    assert not (tmp_path / "sprung").exists()


def test_another_time_step_is_refused_where_there_is_no_physics_to_scale(arm2: Model, tmp_path: Path) -> None:
    identity(arm2).save(tmp_path / "full.npz")
    residual_of(arm2).save(tmp_path / "gated.npz")
    with pytest.raises(SpecError, match=r"full.npz: dt: a model without physics has one time step, 0.02 s; expected 0.01 s"):
        load_residual(tmp_path / "full.npz", arm2.robot, arm2.tree, 0.01)
    assert load_residual(tmp_path / "gated.npz", arm2.robot, arm2.tree, 0.01).dt == 0.02
    with pytest.raises(SpecError, match=r"gated.npz: integrator: was learnt on top of 'euler', found 'leapfrog'"):
        load_residual(tmp_path / "gated.npz", arm2.robot, arm2.tree, 0.02, "leapfrog")


def test_other_physics_beneath_is_refused(arm2: Model, tmp_path: Path) -> None:
    contact = ContactSpec(tip="tool", radius=0.01, surface="floor", stiffness=1e4, damping=100.0, friction=0.5)
    free = contact.model_copy(update={"stiffness": 0.0, "damping": 0.0})
    residual_of(arm2).save(tmp_path / "free.npz")
    replace(residual_of(arm2), contact=contact).save(tmp_path / "touching.npz")
    known = (arm2.robot, arm2.tree, 0.02, "euler")
    assert load_residual(tmp_path / "touching.npz", *known, contact).contact == contact
    for declared in (None, free):
        assert load_residual(tmp_path / "free.npz", *known, declared).contact is None
        with pytest.raises(SpecError, match=r"touching.npz: contact: was learnt on top of tip='tool'.*, found .* no contact"):
            load_residual(tmp_path / "touching.npz", *known, declared)
    with pytest.raises(SpecError, match=r"free.npz: contact: was learnt on top of no contact, found dynamics.contact: tip='tool'"):
        load_residual(tmp_path / "free.npz", *known, contact)


def test_other_parameters_of_the_arm_beneath_are_refused(arm2: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    replace(residual_of(arm2), physics=physics_of(arm2.tree)).save(path)
    rounded = replace(arm2.tree, inertia=arm2.tree.inertia * (1 + 1e-9))
    assert load_residual(path, arm2.robot, rounded).robot == "arm2"
    heavier = replace(arm2.tree, mass=arm2.tree.mass * [1.0, 1.1])
    joint, was = arm2.tree.joints[1], arm2.tree.mass[1]
    message = f"model.npz: physics: was learnt on top of other parameters.*: mass of {joint} {was:.6g}, found {1.1 * was:.6g}"
    with pytest.raises(SpecError, match=message):
        load_residual(path, arm2.robot, heavier)
    edited(path, arrays={"physics_com": np.zeros(3)})
    with pytest.raises(SpecError, match=r"physics: expected com of shape \(2, 3\), found \(3,\)"):
        load_residual(path, arm2.robot, arm2.tree)


def test_an_earlier_file_stays_until_the_new_one_is_whole(arm2: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.npz"
    residual_of(arm2).save(path)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SpecError, match="cannot be written: No space left on device"):
        replace(residual_of(arm2), seed=9).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_is_predicted_does_not_depend_on_variances(arm2: Model) -> None:
    """In torch and compiled; and deviations are the formula, by hand."""
    plain, sure = residual_of(arm2, near=0.2, far=0.8), with_variance(arm2, near=0.2, far=0.8)
    base = RigidBodyDynamics(arm2.tree, 0.02, dtype=torch.float64)
    one, other = (HybridDynamics(base, each, arm2.tree.frames["tcp"], capsule_obstacle) for each in (plain, sure))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, dtype=torch.float64, generator=generator)
    u = torch.randn(6, 2, 50, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(one.rollout(x, u), other.rollout(x, u), rtol=1e-12, atol=1e-12)
    kernel = kernel_dynamics(base, CpuEngine(shared_pool(1), np.float64), traced_residual(other))
    np.testing.assert_allclose(kernel.rollout(x.numpy(), u.numpy()), one.rollout(x, u).numpy(), rtol=1e-6, atol=1e-7)
    q, v = x[:2].numpy(), x[2:].numpy()
    y = np.concatenate([np.sin(q), np.cos(q), v, u[0].numpy()])
    y = (y - sure.input_mean[:, None]) / sure.input_scale[:, None]
    for k, (w, b) in enumerate(sure.layers):
        y = w @ y + b[:, :, None]
        y = np.tanh(y) if k < len(sure.layers) - 1 else y
    log = -6 + np.logaddexp(0, (2 - np.logaddexp(0, 2 - y[:, 2:])) + 6)
    assert log.min() > -6 and log.max() < 2 + 1e-3
    total = np.sqrt(np.exp(log).mean(0) + y[:, :2].var(0)) * (sure.output_scale * sure.spread.scale)[:, None]
    expected = other.step_gate(x, u[0]).numpy() * total
    np.testing.assert_allclose(other.deviation(x, u[0]).numpy(), expected, rtol=1e-10)
    assert (expected == 0).any() and (expected > 0).any()


def test_raw_angles_are_a_field_of_the_file_and_the_same_compiled(arm2: Model, tmp_path: Path) -> None:
    encoded = residual_of(arm2, near=0.2, far=1.5)
    first = encoded.layers[0][0][:, :, :6], encoded.layers[0][1]
    shorter = {name: getattr(encoded, name)[:6] for name in ("input_mean", "input_scale")}
    raw = replace(encoded, layers=(first, *encoded.layers[1:]), encode_angles=False, **shorter)
    raw.save(tmp_path / "raw.npz")
    assert load_residual(tmp_path / "raw.npz", arm2.robot, arm2.tree).encode_angles is False
    base = RigidBodyDynamics(arm2.tree, 0.02, dtype=torch.float64)
    hybrid = HybridDynamics(base, raw, arm2.tree.frames["tcp"], capsule_obstacle)
    x = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u = torch.zeros(3, 2, 20, dtype=torch.float64)
    kernel = kernel_dynamics(base, CpuEngine(shared_pool(1), np.float64), traced_residual(hybrid))
    np.testing.assert_allclose(kernel.rollout(x.numpy(), u.numpy()), hybrid.rollout(x, u).numpy(), rtol=1e-6, atol=1e-7)
    turned = x.clone()
    turned[0] += 2 * np.pi
    assert not torch.allclose(hybrid.missed(turned, u[0]), hybrid.missed(x, u[0]), rtol=1e-3)


def test_a_fully_learned_model_plans_compiled_and_in_torch(arm2: Model, tmp_path: Path) -> None:
    config, file = load_run("arm2_swingup_sim")
    model = load_run_model(config, file)
    learned = replace(identity(model), dt=config.dynamics.dt)
    learned.save(tmp_path / "full.npz")
    plans = {}
    for backend in ("kernel", "torch"):
        dynamics = {"residual": str(tmp_path / "full.npz"), "backend": backend, "threads": 1}
        run = validate(RunConfig, merged(config.model_dump(), {"planner": {"samples": 32}, "dynamics": dynamics}), file)
        controller = MpcController(run, model, file)
        assert controller.hybrid is not None and controller.hybrid.residual.base == "identity"
        plans[backend] = controller.plan(PlanRequest(0.0, np.array([0.5, 0.2, 0.0, 0.0])))
    assert plans["kernel"].info["best"] == pytest.approx(plans["torch"].info["best"], rel=1e-4)
    np.testing.assert_allclose(plans["kernel"].x, plans["torch"].x, atol=1e-4)
