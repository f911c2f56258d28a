"""From a run's settings to the rule and the spread a planner starts with."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mbctrl.base.config import PlannerSpec, RunConfig
from mbctrl.base.errors import SpecError, suggest
from mbctrl.base.spec import import_name
from mbctrl.planning.rules import RULES
from mbctrl.planning.rules.base import Rule


def build_rule(config: RunConfig, file: str | Path | None = None) -> Rule:
    """Return the update rule with its settings checked against its fields."""
    kind = import_name(config.rule, RULES, file=file, key="rule")
    if not (isinstance(kind, type) and issubclass(kind, Rule) and is_dataclass(kind)):
        raise SpecError("expected a frozen dataclass derived from mbctrl.planning.rules.base.Rule", file=file, key="rule")
    known = {field.name for field in fields(kind)}
    for name in config.settings:
        if name not in known:
            raise SpecError(f"unknown key{suggest(name, known)}", file=file, key=f"settings.{name}")
        if isinstance(config.settings[name], float) and not np.isfinite(config.settings[name]):
            raise SpecError(f"expected a finite number, found {config.settings[name]}", file=file, key=f"settings.{name}")
    try:
        return TypeAdapter(kind).validate_python(dict(config.settings))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in ("settings", *fault["loc"]))
        raise SpecError(f"{fault['msg']}, found {fault['input']!r}", file=file, key=key) from None


def sigma_of(spec: PlannerSpec, nu: int, file: str | Path | None = None) -> np.ndarray:
    """Return the initial spread of each knot, (K, nu)."""
    values = np.atleast_1d(np.asarray(spec.sigma, float))
    if len(values) not in (1, nu):
        raise SpecError(f"expected 1 or {nu} values, found {len(values)}", file=file, key="planner.sigma")
    return np.linspace(spec.ramp, 1.0, spec.knots)[:, None] * np.broadcast_to(values, (nu,))
