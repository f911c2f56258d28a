"""From a fit to the parameter file that robots load."""

from __future__ import annotations

import numpy as np

from mbctrl.base.parameters import Estimate, FittedParameters
from mbctrl.calibrate.encoders import EncoderOffsets
from mbctrl.calibrate.identify import Fit
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.parameters import parameters_of

_UNKNOWN = 0.5  # share of a prior's variance the data have to remove for a link's parameter to count as identified


def fitted_parameters(model: Model, fit: Fit, provenance: dict[str, object]) -> FittedParameters:
    """Return the fit as a parameter file: links, rotors and friction of every joint, estimates with their intervals."""
    own = parameters_of(model.mj, fit.tree, model.robot.name)
    family = fit.friction
    law = {
        "memory": family.memory,
        "terms": list(family.terms),
        "coefficients": {
            joint: dict(zip(family.terms, map(float, fit.x[fit.columns.friction_of(j)]))) for j, joint in enumerate(fit.tree.joints)
        },
        "offset": [float(value) for value in fit.offset],
    }
    law |= {"length": family.length} if family.memory == "dahl" else {}
    law |= {"speed": family.speed} if "stribeck" in family.terms else {}
    return own.model_copy(update={"friction_model": law, "estimates": (*_estimated(fit), *_kept(fit)), "provenance": provenance})


def encoder_estimates(offsets: EncoderOffsets) -> list[Estimate]:
    """Return encoder offsets as a parameter file has them."""
    rows = zip(offsets.joints, offsets.value, offsets.se)
    return [
        Estimate(name=f"{joint}.encoder", unit="rad", value=float(value), standard_error=float(se), status="free")
        if np.isfinite(value)
        else Estimate(name=f"{joint}.encoder", unit="rad", value=0.0, status="unidentified")
        for joint, value, se in rows
    ]


def _estimated(fit: Fit) -> list[Estimate]:
    e = fit.estimates
    return [
        Estimate(
            name=meaning,
            unit=unit,
            value=float(value),
            standard_error=float(se),
            low=float(low),
            high=float(high),
            prior=float(prior),
            status="free",
        )
        for meaning, unit, value, se, low, high, prior in zip(e.meanings, e.units, e.value, e.se, e.low, e.high, e.prior)
    ]


def _kept(fit: Fit) -> list[Estimate]:
    """Return the links' parameters that the log says next to nothing of, by name."""
    links = range(10 * fit.columns.n)
    own = np.array([fit.names[k] in fit.estimates.names for k in range(len(fit.names))])
    return [
        Estimate(name=fit.names[k], unit=_unit(fit.names[k]), value=float(fit.x[k]), status="unidentified")
        for k in links
        if fit.known[k] < _UNKNOWN and not own[k]
    ]


def _unit(name: str) -> str:
    kind = name.rpartition(".")[2]
    return "kg" if kind == "m" else "kg·m" if kind.startswith("m") else "kg·m²"
