"""A controller's planning step as ONNX models: one iteration and the whole plan, each scanned and unrolled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch

from mbctrl.base.errors import MbctrlError, SpecError
from mbctrl.base.scene import JointGoal, ObjectPoseGoal
from mbctrl.export.graph import Assembly, Part, exported, info, node_count
from mbctrl.export.modules import Draw, Propose, Score, Shapes, Step
from mbctrl.export.rules import refuse_unexportable
from mbctrl.planning.controller import MpcController
from mbctrl.planning.rules.icem import ICem
from mbctrl.planning.white import colouring
from mbctrl.runtime.bundle import POLICY

OUTPUTS = ("costs", "next_mean", "next_spread", "best", "plan", "path", "states", "figures", "share")
"""Of an iteration, in order; iCEM adds ``next_kept``."""
FIGURES = ("cheapest cost", "mean cost of the finite", "effective sample size", "share of finite rollouts")


@dataclass(frozen=True)
class Graphs:
    """The models of a planner by file name, and what a person wants to know of them."""

    models: dict[str, onnx.ModelProto]
    nodes: dict[str, int]
    inputs: dict[str, tuple[int, ...]]


def refuse(controller: MpcController) -> None:
    """Refuse what has no graph.

    Errors:
        SpecError: naming rule, noise or term.
    """
    refuse_unexportable(controller.planner.rule)
    if controller.config.planner.noise not in ("white", "coloured"):
        raise SpecError(
            f"{controller.config.planner.noise} points are not exported; expected white or coloured", key="planner.noise"
        )
    risk = controller.config.planner.risk.kind
    if risk != "expectation":
        raise SpecError(f"'{risk}' over rollouts of members is not exported; expected expectation", key="planner.risk.kind")
    if controller.config.dynamics.contact is not None:
        raise SpecError("a contact in the physics is not exported; expected null", key="dynamics.contact")
    if controller.config.adapt is not None:
        raise SpecError("a model that adapts is not exported; expected null", key="adapt")
    if isinstance(controller.config.goal, ObjectPoseGoal):
        raise SpecError("a goal for an object is not exported; expected one for the tool or the joints", key="goal.kind")
    if controller.config.dynamics.backend == "mujoco":
        raise SpecError("MuJoCo as the model is not exported; expected kernel, torch or auto", key="dynamics.backend")


class PlannerGraphs:
    """Exports the parts of one planner once and puts models together from them.

    Args:
        controller: built with ``dynamics.backend: torch`` on the processor.
        say: told what is being done.

    Errors:
        SpecError: naming the rule, noise or term that has no graph.
    """

    def __init__(self, controller: MpcController, say: Callable[[str], None] = lambda text: None) -> None:
        refuse(controller)
        self.controller, planner = controller, controller.planner
        config, rule = controller.config, planner.rule
        self.shapes = self.shapes_of(controller)
        colour = colouring(planner.knots.count, config.planner.beta) if config.planner.noise == "coloured" else None
        self.terms = [name for name, term in controller.task.terms.items() if term.weight > 0]
        self.dynamics = controller.hybrid or controller.analytic
        say("exporting the draw")
        self.draw = self._draw(Draw(planner, rule, self.shapes, colour, controller._bounds))
        say("exporting a step of the arm")
        self.step = self._step(self.shapes.samples)
        say("exporting cost and update")
        bounds = controller._bounds
        self.score = self._score(Score(controller.features, controller.task, rule, planner, bounds, config.obstacles))
        self._say = say

    @staticmethod
    def shapes_of(controller: MpcController) -> Shapes:
        """Return the sizes of a controller's graphs."""
        planner, robot = controller.planner, controller.robot
        kept = min(planner.rule.keep, planner.samples // 2) if isinstance(planner.rule, ICem) else 0
        proposed = int(controller.policy is not None)
        return Shapes(planner.knots.count, robot.nu, planner.samples, planner.knots.steps, 2 * robot.nq, kept, proposed)

    def given(self) -> dict[str, tuple[int, ...]]:
        """Return the task's inputs and their shapes."""
        s, config = self.shapes, self.controller.config
        out: dict[str, tuple[int, ...]] = {"u_before": (s.commands,), "weights": (s.steps, len(self.terms))}
        if isinstance(config.goal, JointGoal):
            out["q_target"] = (self.controller.robot.nq,)
        else:
            out |= {"p_target": (3, s.steps), "r_target": (3, 3, s.steps), "rotation": (1,)}
        if config.obstacles:
            out["obstacles"] = (len(config.obstacles), 3, s.steps)
        return out

    def models(self) -> Graphs:
        """Return every model of the bundle."""
        iterations, s = self.controller.planner.iterations, self.shapes
        self._say("putting graphs together")
        models = {"iter.onnx": self._model(1, scan=True), "iter_unrolled.onnx": self._model(1, scan=False)}
        if iterations > 1:  # else the iteration is the plan
            models |= {"plan.onnx": self._model(iterations, scan=True), "plan_unrolled.onnx": self._model(iterations, scan=False)}
        models["rollout.onnx"] = self._rollout()
        if s.proposed:
            models[POLICY] = self._policy()
        return Graphs(models, {name: node_count(model) for name, model in models.items()}, self.inputs(1))

    def inputs(self, iterations: int = 1) -> dict[str, tuple[int, ...]]:
        """Return every input of the graph that takes so many iterations, and its shape."""
        s = self.shapes
        sizes = (s.knots, s.commands)
        out: dict[str, tuple[int, ...]] = {"x": (s.states,), "mean": sizes, "spread": sizes}
        out["noise"] = (*([iterations] if iterations > 1 else []), *sizes, s.samples)
        if s.kept:
            out["kept"] = (*sizes, s.kept)
        if s.proposed:
            out["proposal"] = (*sizes, s.proposed)
        return out | self.given()

    def _draw(self, module: Draw) -> Part:
        s = self.shapes
        sizes = (s.knots, s.commands)
        example = [torch.randn(s.states), torch.randn(*sizes), torch.rand(*sizes), torch.randn(*sizes, s.samples)]
        names = ["x", "mean", "spread", "noise"]
        if s.kept + s.proposed:
            example.append(torch.randn(*sizes, s.kept + s.proposed))
            names.append("kept")
        return exported(module, tuple(example), names, ["candidates", "commands", "start"])

    def _step(self, samples: int) -> Part:
        s = self.shapes
        return exported(
            Step(self.dynamics), (0.3 * torch.randn(s.states, samples), torch.randn(s.commands, samples)), ["x", "u"], ["after"]
        )

    def _score(self, module: Score) -> Part:
        s = self.shapes
        sizes = (s.knots, s.commands)
        given = {name: torch.rand(*shape) for name, shape in self.given().items()}
        example = (
            given,  # first: torch.export takes a dict at the end for keywords
            0.3 * torch.randn(s.steps + 1, s.states, s.samples),
            torch.randn(s.steps, s.commands, s.samples),
            torch.randn(*sizes, s.samples),
            torch.randn(*sizes),
            torch.rand(*sizes),
        )
        names = [*given, "states", "commands", "candidates", "mean", "spread"]
        try:
            return exported(module, example, names, [*OUTPUTS, *(["next_kept"] if s.kept else [])])
        except MbctrlError:
            raise
        except Exception as error:  # noqa: BLE001 -- the exporter raises what it likes; the term at fault is found one by one
            raise self._blame(error) from error

    def _blame(self, error: Exception) -> SpecError:
        """Return which term has no graph, as an error."""
        reason = str(error).strip().split("\n", 1)[0]
        own = [name for name in self.terms if not type(self.controller.task.terms[name]).__module__.startswith("mbctrl.")]
        key = f"task.{own[0]}" if own else "task"
        return SpecError(f"has no ONNX graph: {reason}", key=key)

    def _model(self, iterations: int, scan: bool) -> onnx.ModelProto:
        a, s = Assembly(), self.shapes
        belief = {"mean": "mean", "spread": "spread", "kept": "kept"}
        made: dict[str, str] = {}
        for i in range(iterations):
            noise = "noise" if iterations == 1 else self._slice(a, i)
            values = {"x": "x", "noise": noise, **belief}
            if s.proposed:
                values["kept"] = a.node("Concat", [belief["kept"], "proposal"], f"fixed{i}", axis=2) if s.kept else "proposal"
            candidates, commands, start = a.add(self.draw, f"draw{i}", "draw", self._bound(self.draw, values))
            roll = f"step{i}"
            after = a.scan(self.step, start, commands, roll) if scan else a.unrolled(self.step, start, commands, s.steps, roll)
            axis = a.constant("first", np.zeros(1, np.int64))
            first = a.node("Unsqueeze", [start, axis], f"{roll}.first")
            states = a.node("Concat", [first, after], f"{roll}.states", axis=0)
            values = {"states": states, "commands": commands, "candidates": candidates, **belief}
            values |= {name: name for name in self.given()}
            outputs = a.add(self.score, f"score{i}", "score", self._bound(self.score, values))
            made = dict(zip([*OUTPUTS, "next_kept"], outputs))
            belief = {name: made.get(f"next_{name}", name) for name in belief}
        shapes = self._outputs()
        outputs = {made[name]: info(name, shapes[name]) for name in made}
        inputs = [info(name, shape) for name, shape in self.inputs(iterations).items()]
        used = {"steps": str(s.steps), "iterations": str(iterations)}
        return a.model(inputs, outputs, {"mbctrl": "planner", **used})

    def _outputs(self) -> dict[str, tuple[int, ...]]:
        s = self.shapes
        sizes, horizon = (s.knots, s.commands), s.steps + 1
        shapes: list[tuple[int, ...]] = [(s.samples,), sizes, sizes, sizes, (horizon, s.commands), (horizon, 3)]
        shapes += [(horizon, s.states), (len(FIGURES),), (s.samples,), (*sizes, s.kept)]
        return dict(zip([*OUTPUTS, "next_kept"], shapes))

    @staticmethod
    def _bound(part: Part, values: dict[str, str]) -> dict[str, str]:
        return {value.name: values[value.name] for value in part.inputs}

    @staticmethod
    def _slice(a: Assembly, i: int) -> str:
        index = a.constant(f"iteration{i}", np.array(i, np.int64))
        return a.node("Gather", ["noise", index], f"noise{i}", axis=0)

    def _policy(self) -> onnx.ModelProto:
        """Return the policy: knots (K, nu) for a state (nx,) and what is asked, encoded and bounded inside."""
        s, asked = self.shapes, self.controller.policy.sees.asked
        wanted = {"p_target": asked.position, "r_target": asked.rotation, "rotation": asked.rotation}
        wanted |= {"q_target": asked.joints, "obstacles": asked.obstacles > 0}
        given = {name: shape for name, shape in self.given().items() if wanted.get(name)}
        example = {name: torch.rand(*shape) for name, shape in given.items()}, torch.rand(s.states)
        given["x"] = (s.states,)
        part = exported(Propose(self.controller.policy), example, list(given), ["proposed"])
        a = Assembly()
        knots = a.add(part, "policy", "policy", {name: name for name in given})[0]
        inputs = [info(value.name, given[value.name]) for value in part.inputs]
        return a.model(inputs, {knots: info("knots", (s.knots, s.commands))}, {"mbctrl": "policy"})

    def _rollout(self) -> onnx.ModelProto:
        """Return the arm alone: states (T+1, nx) from ``x`` (nx,) under commands (T, nu), ``dt`` (1,) seconds apart, any T."""
        s = self.shapes
        example: Any = (0.3 * torch.randn(s.states, 1), torch.randn(s.commands, 1), torch.tensor([0.01]))
        body = exported(Step(self.dynamics), example, ["x", "u", "dt"], ["after"])
        a = Assembly()
        last = a.constant("last", np.array([-1], np.int64))
        first = a.constant("first", np.zeros(1, np.int64))
        start, rows = a.node("Unsqueeze", ["x", last], "start"), a.node("Unsqueeze", ["commands", last], "rows")
        after = a.scan(body, start, rows, "step", {"dt": "dt"})
        states = a.node("Concat", [a.node("Unsqueeze", [start, first], "start.one"), after], "all", axis=0)
        flat = a.node("Squeeze", [states, last], "flat")
        inputs = [info("x", (s.states,)), info("commands", ("T", s.commands)), info("dt", (1,))]
        return a.model(inputs, {flat: info("states", ("S", s.states))}, {"mbctrl": "rollout"})
