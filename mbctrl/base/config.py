"""Schemas of controllers and scenarios, and how the two become one resolved run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mbctrl.base.find import find
from mbctrl.base.robot import Positive, Vector
from mbctrl.base.scene import BackendGoal, Goal, Obstacle, Point, PoseGoal
from mbctrl.base.spec import Number, Spec, load_yaml, validate

Count = Annotated[int, Field(ge=1, strict=True)]
NonNegative = Annotated[Number, Field(ge=0)]


class RiskSpec(Spec):
    """How a planner takes it that the members of an ensemble differ.

    ``expectation``: members are averaged in every step, one rollout a candidate. With the others each member rolls every
    candidate out by itself to the end (TS-inf of Chua et al., "Deep reinforcement learning in a handful of trials using
    probabilistic dynamics models", 2018, without its noise), and a candidate's cost is made of its members': ``mean``;
    ``deviation``, the mean and ``weight`` standard deviations, below 0 to seek what members disagree about; ``worst``;
    ``cvar``, the mean of the worst ``share`` of members.
    """

    kind: Literal["expectation", "mean", "deviation", "worst", "cvar"] = "expectation"
    weight: Number | None = None
    share: Annotated[Number, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _settings(self) -> RiskSpec:
        for key, kind in (("weight", "deviation"), ("share", "cvar")):
            given = getattr(self, key) is not None
            if given != (self.kind == kind):
                raise ValueError(f"{key}: {'is of' if given else 'missing; is needed by'} kind {kind}, found kind {self.kind}")
        return self


class PlannerSpec(Spec):
    """The sampling planner.

    ``sigma`` is the initial spread of the command, one value or one an actuated joint: [rad] for impedance references,
    [N·m] for torques. ``ramp`` is the first knot's share of it, growing to all of it at the last: the near future is
    nearly decided. ``beta`` colours ``noise: coloured``. ``policy`` (of ``mbctrl distil``, an .npz, in the scenario's folder or
    the current one) proposes a plan, which is one of the candidates, and is followed where no candidate's cost is finite.
    """

    samples: Count = 512
    iterations: Count = 1
    horizon: Positive = 0.6  # [s]
    knots: Count = 6
    interpolation: Literal["zero", "linear", "cubic"] = "cubic"
    noise: Literal["white", "coloured", "halton", "sobol"] = "white"
    beta: NonNegative = 2.0
    sigma: Positive | tuple[Positive, ...] = 0.1
    ramp: Annotated[Number, Field(gt=0, le=1)] = 1.0
    growth: Annotated[Number, Field(ge=1)] | None = None  # of a learnt spread, a plan; null: back to sigma at once
    discount: Annotated[Number, Field(gt=0, le=1)] = 1.0
    risk: RiskSpec = RiskSpec()
    policy: str | None = None


class ContactSpec(Spec):
    """One sphere of the robot that may touch one flat surface of it: what the planner's physics knows of a contact.

    ``tip`` names the site or body whose origin is the sphere's centre, ``surface`` the one that lies on the surface with
    z along its outward normal; both are the robot's model's own. A zero stiffness with a zero damping lets the sphere through.
    """

    tip: str
    radius: Positive  # [m]
    surface: str
    half: tuple[Positive, Positive] | None = None  # [m] the surface's half lengths along its x and y; null: no end
    stiffness: NonNegative  # [N/m] of the pair, without what the surface itself rests on
    damping: NonNegative  # [N·s/m]
    friction: NonNegative
    slip: Positive = 0.01  # [m/s] slower sliding meets less friction


class DynamicsSpec(Spec):
    """The planner's model and its time step ``dt`` [s].

    ``backend``: ``kernel`` the analytic model with the task's cost, compiled for this processor; ``torch`` the same in
    torch; ``mujoco`` the simulator; ``auto`` the kernel where it can be, else torch with a warning. ``integrator`` is the
    analytic model's: ``euler`` for servo-controlled arms, ``leapfrog`` for free-swinging ones.
    """

    backend: Literal["auto", "kernel", "torch", "mujoco"] = "auto"
    dt: Positive = 0.04
    integrator: Literal["euler", "leapfrog"] = "euler"
    contact: ContactSpec | None = None  # the analytic model's; what terms of contacts look at with any backend
    residual: str | None = None  # a learned residual's .npz, from the folder of the file that names it
    device: str = "cpu"
    threads: Annotated[int, Field(ge=0, strict=True)] = 0  # of kernel and simulator; 0: all


class LoopSpec(Spec):
    """The control loop around the planner.

    ``rate`` is how often a plan is asked for [Hz]; ``predict`` plans from the state expected when the plan will be
    ready (without it a plan starts from the measured state and is followed from its start whenever it comes, as if
    planning took no time: for comparison); ``latency`` [s] is the planner's latency in lockstep; ``blend`` [s] smooths
    the change of plans; a plan whose state is older than ``stale`` [s] is no longer followed. ``feedback`` gains pull
    torque-mode arms to the planned state.
    """

    rate: Positive = 25.0
    predict: bool = True
    latency: NonNegative = 0.0
    blend: NonNegative = 0.03
    stale: Positive = 0.5
    feedback_stiffness: Vector | None = None  # [N·m/rad]
    feedback_damping: Vector | None = None  # [N·m·s/rad]


class Controller(Spec):
    """``controllers/NAME.yaml``: rule, planner, model and task, tuned together."""

    rule: str
    settings: Mapping[str, Any] = Field(default_factory=dict)
    planner: PlannerSpec = PlannerSpec()
    dynamics: DynamicsSpec = DynamicsSpec()
    task: Mapping[str, Any]
    loop: LoopSpec = LoopSpec()


class RobotSpec(Spec):
    """A robot by ``name`` or path, and the calibrated ``parameters`` it is believed to have, by name or path too.

    Null parameters: as the robot's model says. A plain text stands for the name alone.
    """

    name: str
    parameters: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        if not isinstance(data, (str, Mapping, RobotSpec)):
            raise ValueError(f"expected a robot's name, found {data!r}")
        return {"name": data} if isinstance(data, str) else data


class PayloadSpec(Spec):
    """A solid ball in the simulated tool's grip, of which neither the planner nor the arm's own gravity torque is told.

    ``com`` is its centre in the tool's frame; ``at`` are the times it is picked up, put down, picked up again and so on.
    """

    mass: Positive  # [kg]
    com: Point = (0.0, 0.0, 0.0)  # [m]
    radius: NonNegative = 0.0  # [m]; 0: a point
    at: tuple[Positive, ...] = Field(min_length=1)  # [s]

    @model_validator(mode="after")
    def _in_order(self) -> PayloadSpec:
        if any(later <= earlier for earlier, later in zip(self.at, self.at[1:])):
            raise ValueError(f"at: expected increasing times, found {list(self.at)}")
        return self

    def carried(self, t: float) -> bool:
        """Return whether the tool has it at time ``t`` [s]."""
        return sum(t >= change - 1e-9 for change in self.at) % 2 == 1


class BackendSpec(Spec):
    """What moves: ``mujoco`` simulates the robot's own model; ``dm_control`` runs the suite's ``task`` (DOMAIN-TASK).

    ``parameters`` are what the simulated arm truly has, by name or path; null: what the run believes, the robot's.
    """

    kind: Literal["mujoco", "dm_control"] = "mujoco"
    task: str | None = None
    parameters: str | None = None
    start_noise: NonNegative = 0.0  # [rad], uniform, around home
    payload: PayloadSpec | None = None


class AdaptSpec(Spec):
    """What the planner's model finds out while the arm moves.

    ``payload``: what the tool carries is estimated, and the model carries it, too; whatever else pushes the arm is weighed as if
    it were a payload, up to ``heaviest``. ``model``: the learned model (``dynamics.residual``) is kept up with the last ``memory``
    seconds near its surfaces. Of it and ``models``, files learnt by the same recipe elsewhere, the one that is likeliest by more
    than ``margin`` is planned with; with ``last_layer`` its last layer is refitted.
    """

    kind: Literal["payload", "model"] = "payload"
    memory: Positive = 1.5  # [s] in which what was seen is forgotten
    errors: Positive = 3.0  # standard errors the payload has moved by before the model changes
    heaviest: Positive = 10.0  # [kg]
    last_layer: bool = False
    models: tuple[str, ...] = ()  # .npz, from the folder of the file that names them
    margin: Positive = 10.0  # [nats]

    @model_validator(mode="after")
    def _settings(self) -> AdaptSpec:
        of = {"errors": "payload", "heaviest": "payload", "last_layer": "model", "models": "model", "margin": "model"}
        for key, kind in of.items():
            if kind != self.kind and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key}: is of kind {kind}, found kind {self.kind}")
        if self.kind == "model" and not (self.last_layer or self.models):
            raise ValueError("last_layer: kind model needs last_layer, models or both, found none")
        return self


class RecordSpec(Spec):
    """What a run leaves behind besides its log."""

    plots: bool = True
    video: bool = True


class RunConfig(Controller):
    """A resolved run: everything that decides what happens, saved beside the log."""

    robot: RobotSpec
    goal: Goal = BackendGoal(kind="backend")
    obstacles: tuple[Obstacle, ...] = ()
    backend: BackendSpec = BackendSpec()
    adapt: AdaptSpec | None = None
    record: RecordSpec = RecordSpec()
    duration: Positive  # [s]
    stop_when_done: bool = False  # end once every target was reached
    seed: Annotated[int, Field(ge=0, strict=True)] = 0

    @property
    def weighs(self) -> bool:
        """Whether what the tool carries is estimated."""
        return self.adapt is not None and self.adapt.kind == "payload"


def settled(config: RunConfig) -> RunConfig:
    """Return a run whose goal is drawn by its seed, where it is to be."""
    goal = config.goal
    if not isinstance(goal, PoseGoal) or goal.within is None:
        return config
    drawn = goal.model_copy(update={"targets": (goal.within.drawn(config.seed),), "within": None})
    return config.model_copy(update={"goal": drawn})


def load_controller(name: str, *, file: str | Path | None = None, key: str | None = None) -> Controller:
    """Load a controller by name or path; SpecError names file and key."""
    path = find("controllers", name, file=file, key=key)
    return validate(Controller, load_yaml(path), path)


def load_run(name: str) -> tuple[RunConfig, Path]:
    """Resolve a scenario by name or path: its controller's settings, overridden by the scenario's own.

    Returns the run and the scenario's file. Errors: SpecError naming file and key.
    """
    path = find("launch", name)
    scenario = load_yaml(path)
    scenario.pop("learn", None)  # how to learn the model is mbctrl.learning.loops' to read
    controller = scenario.pop("controller", None)
    base: dict[str, Any] = {}
    if controller is not None:
        base = load_controller(str(controller), file=path, key="controller").model_dump(exclude_unset=True)
    return validate(RunConfig, merged(base, scenario), path), path


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` laid on top, mappings merged key by key."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out
