"""The verbs that learn, and their options: what --help says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg


@dataclass(frozen=True)
class Train:
    """Learn from logs what the analytic model misses near contact, or a whole model; write a model file.

    The recipe says of which robot, on top of what, near which surfaces and by which networks; see
    calibration/panda_full_learn.yaml. Whole episodes are held out: networks stop by some, and are judged by others.

    For example:

        mbctrl run panda_track_sim --lockstep --out runs/one
        mbctrl train panda_full_learn runs/one/log.csv -o full.npz
        mbctrl train my_wipe_learn.yaml monday.parquet tuesday.parquet -o wipe.npz
        mbctrl run panda_track_sim --dynamics.residual wipe.npz
    """

    recipe: Positional[str]
    """A recipe by name (mbctrl list) or path."""
    logs: Positional[tuple[str, ...]]
    """Logs of mbctrl run (log.csv), or transitions (.parquet)."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("model.npz")
    """The model file; one that is there stays until the new one is whole."""


@dataclass(frozen=True)
class Learn:
    """Learn a scenario's model while planning with it: random commands, then trials, each with what was learnt before.

    The scenario's own ``learn:`` says how: once, from everything before each trial, or every so many steps of a trial. Any other
    setting of the scenario can be given after its name. Leaves model.npz, transitions.parquet, learning.png and the trials' logs.

    For example:

        mbctrl learn cartpole_pets_sim
        mbctrl learn cartpole_pets_sim --seed 3 --planner.samples 200 --out runs/mine
        mbctrl run cartpole_pets_sim --lockstep --dynamics.residual runs/mine/model.npz
    """

    scenario: Positional[str]
    """A scenario by name (mbctrl list) or path."""
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Folder to make; by default runs/learn-SCENARIO-DATE-TIME."""


@dataclass(frozen=True)
class Distil:
    """Distil a scenario's planner into a policy: a small network that proposes plans to it, and stands in for it.

    The planner acts in the first trial, then the policy more and more of the time, while the planner says what it would have done;
    after each trial the policy is learnt anew from all of that (DAgger). Then planner and policy are judged, alone and together,
    in other episodes.
    Any setting of the scenario can be given after its name.

    For example:

        mbctrl distil panda_reach_sim -o reach.npz
        mbctrl run panda_reach_sim --planner.policy reach.npz --planner.samples 256
        mbctrl distil pendulum_nagabandi_sim --dynamics.residual runs/learnt/model.npz -o pendulum.npz
    """

    scenario: Positional[str]
    """A scenario by name (mbctrl list) or path."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("policy.npz")
    """The policy file; one that is there stays until the new one is whole."""
    trials: int = 8
    """Episodes to learn from."""
    fewer: int = 4
    """By what the planner's samples are divided where it is judged with fewer."""
    episodes: int = 3
    """To judge by."""


@dataclass(frozen=True)
class Evaluate:
    """Judge a learned model on logs it has not seen, beside the analytic one: errors many steps ahead, intervals, the gate.

    For example:

        mbctrl evaluate full.npz runs/two/log.csv -o judged
        mbctrl evaluate wipe.npz friday.parquet --beside full.npz
        mbctrl evaluate wipe.npz friday.parquet --parameters panda_fitted
    """

    model: Positional[Path]
    """A model file, of mbctrl train."""
    logs: Positional[tuple[str, ...]]
    """Logs of mbctrl run (log.csv), or transitions (.parquet)."""
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Folder for report.html; by default runs/evaluate-MODEL-DATE-TIME."""
    beside: Annotated[tuple[Path, ...], UseAppendAction] = ()
    """Another model file to compare with; again for more."""
    robot: str | None = None
    """The robot by path, where it is not found by the name in the model file."""
    parameters: str | None = None
    """Calibrated parameters the model was learnt on top of, by name or path."""
