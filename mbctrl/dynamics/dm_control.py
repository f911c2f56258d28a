"""The models dm_control ships: suite tasks and its Jaco arm."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

import mujoco
import numpy as np

from mbctrl.base.errors import ExtraError, ModelError, SpecError, suggest


def dm_control_model(name: str) -> mujoco.MjModel:
    """Return the compiled model of ``DOMAIN-TASK`` or ``jaco_arm``.

    Errors:
        SpecError: for another name, listing what exists.
    """
    suite = import_dm_control("suite", name)
    if name == "jaco_arm":
        kinova = import_dm_control("entities.manipulators.kinova", name)
        return import_dm_control("mjcf", name).Physics.from_mjcf_model(kinova.JacoArm().mjcf_model).model.ptr
    domain, _, task = name.partition("-")
    known = {f"{a}-{b}" for a, b in suite.ALL_TASKS} | {"jaco_arm"}
    if name not in known:
        raise SpecError(f"unknown dm_control model{suggest(name, known)}", key=f"dm_control:{name}")
    return suite.load(domain, task).physics.model.ptr


def dm_control_spec(name: str) -> mujoco.MjSpec:
    """Return the editable model of ``DOMAIN-TASK`` or ``jaco_arm``.

    Errors:
        ModelError: for tasks that make their model as they go: it cannot be had again.
    """
    if name == "jaco_arm":
        model = import_dm_control("entities.manipulators.kinova", name).JacoArm().mjcf_model
        return mujoco.MjSpec.from_string(model.to_xml_string(), assets=model.get_assets())
    try:
        xml, parts = import_dm_control(f"suite.{name.partition('-')[0]}", name).get_model_and_assets()
        spec = mujoco.MjSpec.from_string(xml if isinstance(xml, str) else xml.decode(), include=parts)
        again, known = spec.copy().compile(), dm_control_model(name)
        same = again.nv == known.nv and again.nbody == known.nbody and np.allclose(again.body_mass, known.body_mass)
    except (AttributeError, TypeError):
        same = False
    if not same:
        raise ModelError("this task makes its model itself: no parameters can be put in it", file=f"dm_control:{name}")
    return spec


def import_dm_control(module: str, name: str) -> ModuleType:
    """Import ``dm_control.MODULE`` without its renderer, which complains where there is no screen.

    Errors:
        ExtraError: where dm_control is not installed, naming ``name``.
    """
    before = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        return import_module(f"dm_control.{module}")
    except ImportError:
        raise ExtraError('dm_control models need: pip install "mbctrl[sim]"', key=f"dm_control:{name}") from None
    finally:
        os.environ.pop("MUJOCO_GL") if before is None else os.environ.update(MUJOCO_GL=before)
