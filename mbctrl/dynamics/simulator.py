"""MuJoCo itself as the planning model: the oracle, and the model for anything the analytic one does not cover."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping

import mujoco
import numpy as np
import torch
from torch import Tensor

from mbctrl.base.errors import ModelError
from mbctrl.dynamics.actuation import Impedance, Torque

try:
    from mujoco.batch import Batch
except ImportError:  # some builds of MuJoCo lack it; mujoco.rollout does the same without per-sample model fields
    Batch = None


class SimulatorDynamics:
    """Batched rollouts of a compiled MuJoCo model behind the contract of ``RigidBodyDynamics`` (without gradients).

    States are [qpos, qvel] of a model without free or ball joints, batch-last; commands are held for ``dt``, in which
    the simulator takes ``round(dt / timestep)`` steps. Joint torques enter through ``qfrc_applied``; the model's own
    actuators are off. An impedance becomes joint stiffness and damping at the simulator's own step, without a torque
    limit.

    Args:
        mj: the compiled model.
        dt: time step of the plan [s], a multiple of the model's own.
        actuation, commanded, effort_limit, gravity_compensation: as ``RigidBodyDynamics``; the limit bounds the command
            in torque mode.
        threads: 0: all.
        fields: values of model fields a sample (MuJoCo's names, arrays (N, ...)): domain randomisation.
        batched: use ``mujoco.batch``; False: ``mujoco.rollout``.

    Errors:
        ModelError: for steps that do not divide, fields without ``mujoco.batch``, or gravity compensation of an arm
            with unactuated joints whose load by gravity is not constant.
    """

    def __init__(
        self,
        mj: mujoco.MjModel,
        dt: float,
        actuation: Torque | Impedance = Torque(),
        *,
        commanded: list[int] | None = None,
        effort_limit: tuple[float, ...] | None = None,
        gravity_compensation: bool = False,
        threads: int = 0,
        fields: Mapping[str, np.ndarray] | None = None,
        batched: bool = Batch is not None,
    ) -> None:
        self.substeps = round(dt / mj.opt.timestep)
        if self.substeps < 1 or abs(self.substeps * mj.opt.timestep - dt) > 1e-9:
            raise ModelError(
                f"expected a multiple of the simulator's step {mj.opt.timestep:g} s, found {dt:g} s", key="dynamics.dt"
            )
        if mj.nq != mj.nv:
            raise ModelError("free and ball joints have no [q, v] state", key="dynamics.backend")
        if fields and not batched:
            raise ModelError("fields for each sample need mujoco.batch", key="dynamics.fields")
        self.dt, self.batched, self.threads = dt, batched, threads
        self.commanded = list(range(mj.nv)) if commanded is None else list(commanded)
        self.nq, self.nx, self.nu = mj.nq, mj.nq + mj.nv, len(self.commanded)
        self.dtype, self.device = torch.float64, torch.device("cpu")
        self._weight = np.zeros(mj.nv)
        self._fields, self._limit = dict(fields or {}), effort_limit
        self._servo = isinstance(actuation, Impedance)
        self._model = copy.copy(mj)
        self._model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION
        if gravity_compensation:
            self._weight = _constant_weight(mj, self.commanded)
            self._model.opt.gravity[:] = 0  # the arm's own gravity torque cancels it exactly
        self._gain = np.ones(self.nu)
        if isinstance(actuation, Impedance):
            self._gain = np.asarray(actuation.stiffness, float)
            self._add_servo(actuation)
        self._batches: dict[int, Batch] = {}

    def _add_servo(self, impedance: Impedance) -> None:
        """Put the servo into the model's passive joints; its reference then enters as the torque K u."""
        model = self._model
        for k, d, joint in zip(impedance.stiffness, impedance.damping, self.commanded):
            spring = model.jnt_stiffness[joint]
            model.jnt_stiffness[joint] += k
            model.dof_damping[model.jnt_dofadr[joint]] += d
            model.qpos_spring[model.jnt_qposadr[joint]] *= spring / (spring + k) if spring > 0 else 0.0

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the state (nx, N) one step after ``x`` under commands ``u`` (nu, N)."""
        return self.rollout(x, u[None])[1]

    def rollout(self, x0: Tensor, u: Tensor) -> Tensor:
        """Return states (H+1, nx, N) from ``x0`` (nx, N) under ``u`` (H, nu, N)."""
        horizon, _, samples = u.shape
        start = x0.detach().to(self.dtype).cpu().numpy().T
        torque = np.zeros((samples, horizon, self._model.nv)) + self._weight
        command = u.detach().to(self.dtype).cpu().numpy().transpose(2, 0, 1) * self._gain
        if self._limit is not None and not self._servo:
            command = np.clip(command, -np.asarray(self._limit), self._limit)
        torque[:, :, self._model.jnt_dofadr[self.commanded]] = command
        torque = np.repeat(torque, self.substeps, axis=1)
        run = self._run_batch if self.batched else self._run_rollout
        states = run(start, torque)[:, self.substeps - 1 :: self.substeps]  # (N, H, nx)
        out = np.concatenate([start[None], states.transpose(1, 0, 2)]).transpose(0, 2, 1)
        return torch.from_numpy(np.ascontiguousarray(out)).to(u.dtype)

    def _run_batch(self, start: np.ndarray, torque: np.ndarray) -> np.ndarray:
        """Return the states after every simulator step, (N, T, nx)."""
        samples, steps = torque.shape[:2]
        batch = self._batches.get(samples)
        if batch is None:
            batch = self._batches[samples] = Batch(self._model, samples, self.threads)
            for name, values in self._fields.items():
                batch.expand(name)[:] = values
            if self._fields:
                batch.set_const()  # what the compiler derives from them, such as the softness of friction and limits
        batch.reset(stage=mujoco.mjtStage.mjSTAGE_NONE)
        batch.bind("qpos")[:], batch.bind("qvel")[:] = start[:, : self.nq], start[:, self.nq :]
        spec = mujoco.mjtState.mjSTATE_QFRC_APPLIED
        out = batch.rollout(steps, torque, spec, record=("qpos", "qvel"))
        return np.concatenate([out["qpos"], out["qvel"]], axis=2)

    def _run_rollout(self, start: np.ndarray, torque: np.ndarray) -> np.ndarray:
        """The same through ``mujoco.rollout``, whose states lead with the time."""
        from mujoco import rollout

        threads = self.threads or os.cpu_count() or 1
        data = [mujoco.MjData(self._model) for _ in range(threads)]
        spec = mujoco.mjtState.mjSTATE_FULLPHYSICS
        full = np.zeros((len(start), mujoco.mj_stateSize(self._model, spec)))
        full[:, 1 : 1 + self.nx] = start
        states, _ = rollout.rollout(self._model, data, full, torque, control_spec=int(mujoco.mjtState.mjSTATE_QFRC_APPLIED))
        return states[:, :, 1 : 1 + self.nx]


def _constant_weight(mj: mujoco.MjModel, commanded: list[int]) -> np.ndarray:
    """Return what gravity does to the unactuated joints, (nv,) [N]: constant, where slides carry them or upright hinges.

    Errors:
        ModelError: naming a joint that gravity loads otherwise.
    """
    data, bias, weight = mujoco.MjData(mj), np.zeros(mj.nv), np.zeros(mj.nv)
    mujoco.mj_fwdPosition(mj, data)
    mujoco.mj_rne(mj, data, 0, bias)
    for joint in sorted(set(range(mj.nv)) - set(commanded)):
        above = joint
        while above >= 0:
            upright = np.linalg.norm(np.cross(data.xaxis[above], mj.opt.gravity)) <= 1e-9 * np.linalg.norm(mj.opt.gravity)
            if mj.jnt_type[above] != mujoco.mjtJoint.mjJNT_SLIDE and not upright:
                raise ModelError(
                    "gravity compensation needs every joint actuated but slides and upright hinges that such carry, "
                    f"found {mj.joint(joint).name}",
                    key="dynamics.backend",
                )
            above = int(mj.dof_parentid[above])
        weight[joint] = -bias[joint]
    return weight
