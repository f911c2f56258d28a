"""Where a simulation-based fit begins: a linear regression's answer for what enters torques linearly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import lsq_linear

from mbctrl.calibrate.friction import Friction
from mbctrl.calibrate.recipe import FilterSpec
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.regression import Columns, Motion
from mbctrl.calibrate.signals import CalibrationError, prepare
from mbctrl.calibrate.unknowns import Unknown
from mbctrl.dynamics.actuation import Impedance
from mbctrl.dynamics.reference import ReferenceDynamics, link_parameters
from mbctrl.dynamics.rigid_body import RigidBodyDynamics

_FRICTION = Friction(("coulomb", "viscous", "offset"), "tanh")


def regressed(
    unknowns: Sequence[Unknown],
    dynamics: RigidBodyDynamics,
    recordings: Sequence[Recording],
    spec: FilterSpec = FilterSpec(),
) -> list[Unknown]:
    """Return the unknowns with rotors' inertias, friction and offsets started from a regression, the links as in the model.

    A model without rotors or friction flies off in a few tenths of a second, and a descent that begins there may end anywhere.
    Fixed unknowns and those of other kinds stay as they are.

    Args:
        unknowns: of ``dynamics``.
        recordings: with the efforts that drove the arm.
        spec: their filter.

    Errors:
        CalibrationError: for an arm under joint impedance: what its efforts contain is not known, and its servo keeps the
            simulation near the log anyway.
    """
    if isinstance(dynamics.actuation, Impedance):
        raise CalibrationError("only an arm that takes torques starts from a regression", key="start")
    tree, reference, columns = dynamics.tree, ReferenceDynamics(dynamics.tree), Columns(dynamics.tree.n, _FRICTION)
    known = np.zeros(columns.count)
    known[columns.inertial], known[columns.armature] = link_parameters(tree).ravel(), tree.armature
    places = {f"{joint}.armature": columns.armature.start + j for j, joint in enumerate(tree.joints)}
    for j, joint in enumerate(tree.joints):
        places |= {f"{joint}.{term}": columns.friction_of(j).start + k for k, term in enumerate(_FRICTION.terms)}
        known[columns.friction_of(j)] = tree.friction[j], tree.damping[j], 0.0
    known[[places[one.name] for one in unknowns if one.name in places]] = [one.start for one in unknowns if one.name in places]
    own = [k for k, one in enumerate(unknowns) if one.free and one.name in places]
    if not own:
        return list(unknowns)
    wanted = [places[unknowns[k].name] for k in own]
    known[wanted] = 0.0
    inputs, targets = [], []
    for recording in recordings:
        one = prepare(recording, spec)
        motion = Motion(one, reference)
        W = motion.equations(motion.terms(_FRICTION, None))
        left = one.effort - W @ known
        if dynamics.compensated:
            left += one.smooth(np.stack([reference.gravity(q) for q in one.q]))
        inputs.append(W[one.moving][:, :, wanted])
        targets.append(left[one.moving])
    A, y = np.concatenate(inputs), np.concatenate(targets)
    sd = np.sqrt((y**2).mean(0)) + 1e-12
    bounds = [unknowns[k].low for k in own], [unknowns[k].high for k in own]
    found = lsq_linear((A / sd[:, None]).reshape(-1, len(own)), (y / sd).ravel(), bounds).x
    starts = dict(zip(own, found.tolist()))
    return [replace(one, start=starts.get(k, one.start)) for k, one in enumerate(unknowns)]
