"""A task: named terms, summed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbctrl.base.errors import SpecError
from mbctrl.base.spec import import_name, validate
from mbctrl.tasks.features import Features, RobotScales
from mbctrl.tasks.terms import TERMS, Term


@dataclass(frozen=True)
class Task:
    """A sum of named terms for one robot."""

    terms: Mapping[str, Term]
    robot: RobotScales

    def costs(self, f: Features) -> dict[str, Any]:
        """Return each term's weighted cost rate [1/s], a row of samples."""
        return {name: term.weight * term.cost(f, self.robot) for name, term in self.terms.items() if term.weight > 0}


def build_task(spec: Mapping[str, Mapping[str, Any]], robot: RobotScales, *, file: str | Path | None = None) -> Task:
    """Build a task from its YAML: term name to settings; ``kind`` names the term's class where the key does not.

    Errors:
        SpecError: naming the term and key.
    """
    terms = {}
    for name, settings in spec.items():
        key = f"task.{name}"
        if not isinstance(settings, Mapping):
            raise SpecError(f"expected settings such as {{weight: 1.0}}, found {settings!r}", file=file, key=key)
        kind = import_name(str(settings.get("kind", name)), TERMS, file=file, key=key)
        if not (isinstance(kind, type) and issubclass(kind, Term)):
            raise SpecError("expected a subclass of mbctrl.tasks.terms.Term", file=file, key=key)
        term = validate(kind, {k: v for k, v in settings.items() if k != "kind"}, file, key)
        for field in ("reference", "joint_weights"):
            value = getattr(term, field, None)
            if value is not None and len(value) != len(robot.home):
                raise SpecError(
                    f"expected {len(robot.home)} values, one for each joint, found {len(value)}", file=file, key=f"{key}.{field}"
                )
        terms[name] = term
    if not any(term.weight > 0 for term in terms.values()):
        raise SpecError("expected at least one term with a positive weight", file=file, key="task")
    return Task(terms, robot)
