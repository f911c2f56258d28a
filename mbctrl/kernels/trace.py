"""From a robot and its task to programs: the step alone, and the rollout with the task's cost inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mbctrl.base.scene import Obstacle
from mbctrl.dynamics.contact import PARAMETERS as CONTACT_PARAMETERS
from mbctrl.dynamics.contact import Contact, mount_of
from mbctrl.dynamics.tree import Frame, RigidTree
from mbctrl.kernels.graph import Graph
from mbctrl.kernels.program import Program
from mbctrl.kernels.residual import TracedResidual
from mbctrl.kernels.rigid_body import Array, TracedArm, frame_in_world
from mbctrl.kernels.step import Drive, Stepped, TracedStep
from mbctrl.tasks.distance import capsule_obstacle
from mbctrl.tasks.features import Features
from mbctrl.tasks.task import Task

PARAMETERS = ("mass", "com", "inertia", "armature", "damping", "friction")
"""Fields of the tree that may be inputs of a program, in the order of their values."""
GAINS = {"servo_stiffness": "stiffness", "servo_damping": "damping"}
"""Gains of an impedance drive that may be inputs as well, one value a command, and the Drive's fields they stand for."""

CONTACT = {f"contact_{name}": name for name in CONTACT_PARAMETERS}
"""Parameters of a contact that may be inputs, too, one value each, and the Contact's fields they stand for."""


@dataclass(frozen=True)
class Goal:
    """Which targets a task is given; their values are inputs."""

    position: bool = False
    rotation: bool = False
    joints: bool = False


_PLACED = ("table", "uniform", "sample")


class Inputs:
    """Hands out the inputs of a kind in order and remembers where each name's values lie."""

    def __init__(self, graph: Graph, kind: str) -> None:
        self.graph, self.kind, self.size = graph, kind, 0
        self.places: dict[str, slice] = {}

    def array(self, name: str, *shape: int) -> Array:
        """Return new inputs as an object array; their values are the array's, row by row."""
        count = int(np.prod(shape))
        self.places[name] = slice(self.size, self.size + count)
        out = _inputs(self.graph, self.kind, range(self.size, self.size + count)).reshape(shape)
        self.size += count
        return out


@dataclass(frozen=True)
class Traced:
    """A program, and where its inputs lie: name to slice, of a table's columns and of the uniforms."""

    program: Program
    table: dict[str, slice]
    uniform: dict[str, slice]
    sample: dict[str, slice]
    terms: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        places = {kind: {name: [at.start, at.stop] for name, at in getattr(self, kind).items()} for kind in _PLACED}
        return {"program": self.program.to_dict(), **places, "terms": list(self.terms)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Traced:
        """Return what ``to_dict`` described.

        Errors:
            ValueError: where it is no program, or a name's place is outside it.
        """
        program, places = Program.from_dict(data["program"]), {}
        for kind in _PLACED:
            places[kind] = {name: slice(*at) for name, at in data[kind].items()}
            if any(not 0 <= at.start <= at.stop <= program.sizes[kind] for at in places[kind].values()):
                raise ValueError(f"{kind}: expected places within {program.sizes[kind]} values, found {data[kind]}")
        return Traced(program, **places, terms=tuple(data["terms"]))


def trace_dynamics(
    tree: RigidTree,
    drive: Drive,
    parameters: Sequence[str] = (),
    each: bool = False,
    residual: TracedResidual | None = None,
    contact: Contact | None = None,
    payload: int | None = None,
) -> Traced:
    """Trace an arm's step; the time step [s] is the uniform ``dt``.

    Args:
        tree, drive: the arm.
        parameters: names of PARAMETERS, GAINS and CONTACT to take as inputs, shapes as the tree's, the drive's and the
            contact's.
        each: every sample has its own parameters (domain randomisation); else one set for the rollout.
        residual: what is learnt on top.
        contact: what may touch.
        payload: the link that carries one, its ten parameters the uniforms ``payload``; None: no link does.
    """
    graph = Graph()
    kinds = {kind: Inputs(graph, kind) for kind in ("table", "uniform", "sample")}
    h = kinds["uniform"].array("dt", 1)[0]
    source = kinds["sample" if each else "uniform"]
    given: dict[str, Array] = {}
    for name in parameters:
        owner, field = _owner(name, tree, drive, contact)
        given[name] = source.array(name, *np.shape(getattr(owner, field)))
    gains = {GAINS[name]: tuple(values) for name, values in given.items() if name in GAINS}
    touching = {CONTACT[name]: value.item() for name, value in given.items() if name in CONTACT}
    tree = replace(tree, **{name: values for name, values in given.items() if name not in GAINS and name not in CONTACT})
    drive, contact = replace(drive, **gains), contact and replace(contact, **touching)
    step = TracedStep(_carrying(tree, payload, kinds["uniform"]), drive, h, contact)
    carry = _Carry(graph, step, len(drive.commanded), residual)
    return _finished(carry, *carry.advance(), kinds)


def _carrying(tree: RigidTree, payload: int | None, uniform: Inputs) -> TracedArm:
    """Return the arm, what link ``payload`` carries an input."""
    return TracedArm(tree, None if payload is None else (payload, uniform.array("payload", 10)))


def _owner(name: str, tree: RigidTree, drive: Drive, contact: Contact | None) -> tuple[Any, str]:
    """Return what has the parameter of that name, and its field there."""
    if name in CONTACT:
        return contact, CONTACT[name]
    return (drive, GAINS[name]) if name in GAINS else (tree, name)


def trace_objective(
    tree: RigidTree,
    drive: Drive,
    dt: float,
    tool: Frame,
    task: Task,
    goal: Goal,
    obstacles: Sequence[Obstacle] = (),
    residual: TracedResidual | None = None,
    contact: Contact | None = None,
    payload: int | None = None,
    thing: Frame | None = None,
) -> Traced:
    """Trace an arm's step, its contact and what is learnt on top, with its task's cost; ``thing`` is the goal's object.

    The table has a column a term, what its cost rate counts in that step (weight, discount and dt multiplied), then
    ``p_target`` (3), ``r_target`` (3, 3) and for each obstacle ``obstacle.i`` (3); the uniforms are ``payload`` (10) where
    a link carries one, ``u_before`` (nu) and ``q_target`` (nq).

    Errors:
        TypeError: where a term does something a traced value has no meaning for.
    """
    graph = Graph()
    kinds = {kind: Inputs(graph, kind) for kind in ("table", "uniform", "sample")}
    table, uniform = kinds["table"], kinds["uniform"]
    terms = tuple(name for name, term in task.terms.items() if term.weight > 0)
    factors = table.array("terms", len(terms))
    step = TracedStep(_carrying(tree, payload, uniform), drive, dt, contact)
    carry = _Carry(graph, step, len(drive.commanded), residual)
    before = uniform.array("u_before", len(drive.commanded))
    last = carry.add(before)
    q, v, where_q = carry.advance()
    u = carry.u
    position = rotation = place = turn = None
    distances: tuple[Array, ...] = ()
    gap = gap_rate = force = None
    if goal.position or obstacles or contact:
        links = {tool.link} | ({c.link for c in tree.capsules} if obstacles else set())
        links |= {contact.tip.link, contact.surface.link} if contact else set()
        links |= {thing.link} if thing else set()
        turns = step.arm.turns(*(where_q if where_q is not None else step.angles(q)))
        poses = step.arm.world(*turns, links)
        rotation, position = frame_in_world(poses, tool)
        if thing is not None:
            turn, place = frame_in_world(poses, thing)
        if contact is not None:
            gap = _gap(contact, poses)
            if any(task.terms[name].needs == "contact_rate" for name in terms):
                first = step.arm.turns(*step.angles(np.array(carry.first[: tree.n], dtype=object)))
                before_gap = carry.add([_gap(contact, step.arm.world(*first, links))])[0]
                gap_rate = (gap - before_gap) * (1.0 / dt)
            mount = mount_of(contact, tree)
            force = None if mount is None else mount.force(q, v)
        distances = tuple(clearances(tree, poses, o, table.array(f"obstacle.{k}", 3)) for k, o in enumerate(obstacles))
    pick = list(drive.commanded)
    effort = u
    if drive.stiffness is not None and drive.damping is not None:
        effort = np.asarray(drive.stiffness, float) * (u - q[pick]) - np.asarray(drive.damping, float) * v[pick]
    features = Features(
        q=q,
        v=v,
        a=carry.acceleration,
        u=u,
        u_before=last,
        effort=effort,
        p_world_tcp=position,
        R_world_tcp=rotation,
        p_world_target=table.array("p_target", 3) if goal.position else None,
        R_world_target=table.array("r_target", 3, 3) if goal.rotation else None,
        q_target=uniform.array("q_target", tree.n) if goal.joints else None,
        clearances=distances,
        p_world_object=place,
        R_world_object=turn,
        contact_gap=gap,
        contact_rate=gap_rate,
        contact_force=force,
    )
    rate: Any = 0.0
    for factor, name in zip(factors, terms):
        rate = rate + factor * task.terms[name].cost(features, task.robot)
    total = carry.add(np.array([0.0], dtype=object))
    carry.cost = len(carry.first) - 1
    more = [*u] if gap_rate is None else [*u, gap]
    return _finished(carry, q, v, where_q, kinds, more, cost=total[0] + rate, terms=terms)


class _Carry:
    """What goes from step to step: q, v, then the angles' sine and cosine where the next step can use them."""

    def __init__(self, graph: Graph, step: TracedStep, commands: int, residual: TracedResidual | None = None) -> None:
        self.graph, self.step, self.n, self.residual = graph, step, step.arm.n, residual
        self.u = _inputs(graph, "command", range(commands))
        self.first: list[Any] = list(_inputs(graph, "start", range(2 * self.n)))
        self.cost: int | None = None
        values = _inputs(graph, "carry", range(2 * self.n))
        self.q, self.v = values[: self.n], values[self.n :]
        self.turning = [i for i in range(self.n) if step.arm.tree.revolute[i]]
        self.kept = step.drive.integrator == "euler"
        if self.kept:
            _, sine, cosine = step.angles(np.array(self.first[: self.n], dtype=object))
            self._sine, self._cosine = self.add(sine[self.turning]), self.add(cosine[self.turning])

    def add(self, first: Iterable[Any]) -> Array:
        """Carry more values, ``first`` before the first step; return them as inputs of a step."""
        start = len(self.first)
        self.first.extend(first)
        return _inputs(self.graph, "carry", range(start, len(self.first)))

    def advance(self) -> tuple[Array, Array, Any]:
        """Return q, v and the angles (None: not known) after the step."""
        if self.residual is not None and self.residual.alone:
            return self._alone(self.residual)
        if not self.kept:
            stepped = self.step(self.q, self.v, self.u, self.step.angles(self.step.middle(self.q, self.v)))
            return self._learnt(stepped, self.step.angles(self.q), None)
        before = self._carried()
        stepped = self.step(self.q, self.v, self.u, before)
        return self._learnt(stepped, before, self.step.angles(stepped.q))

    def _carried(self) -> tuple[Array, Array, Array]:
        """Return the angles before the step, their sines and cosines as the last step left them."""
        sine, cosine = np.full(self.n, 0.0, dtype=object), np.full(self.n, 1.0, dtype=object)
        sine[self.turning], cosine[self.turning] = self._sine, self._cosine
        angle = np.array([value - r for value, r in zip(self.q, self.step.reference)], dtype=object)
        return angle, sine, cosine

    def _alone(self, residual: TracedResidual) -> tuple[Array, Array, Any]:
        """Return q, v and the angles after a step of a model without physics."""
        before = self._carried() if self.kept else self.step.angles(self.q)
        more = residual(self.graph, self.step, self.q, self.v, self.u, before, None, None)
        self.acceleration = more * (1.0 / self.step.h)
        v = self.v + more
        q = self.q + (0.5 * self.step.h) * (self.v + v)
        return q, v, self.step.angles(q) if self.kept else None

    def _learnt(self, stepped: Stepped, before: Any, after: Any) -> tuple[Array, Array, Any]:
        """Return q, v and the angles after the step with the residual on top, where there is one."""
        q, v, self.acceleration = stepped.q, stepped.v, stepped.acceleration
        if self.residual is None:
            return q, v, after
        after = self.step.angles(q) if after is None else after
        more = self.residual(self.graph, self.step, self.q, self.v, self.u, before, after, stepped)
        self.acceleration = self.acceleration + more * (1.0 / self.step.h)
        q, v = q + self.step.lead * more, v + more
        return q, v, self.step.angles(q) if self.kept else None


def _finished(
    carry: _Carry,
    q: Array,
    v: Array,
    where_q: Any,
    kinds: dict[str, Inputs],
    more: Iterable[Any] = (),
    cost: Any = None,
    terms: tuple[str, ...] = (),
) -> Traced:
    following: list[Any] = [*q, *v]
    if carry.kept:
        following += [*where_q[1][carry.turning], *where_q[2][carry.turning]]
    following += more
    if cost is not None:
        following.append(cost)
    graph = carry.graph
    program = Program(
        graph,
        2 * carry.n,
        len(carry.u),
        tuple(graph.operand(value) for value in carry.first),
        tuple(graph.operand(value) for value in following),
        carry.cost,
        {kind: inputs.size for kind, inputs in kinds.items()},
        () if carry.residual is None else carry.residual.networks,
    )
    return Traced(program, kinds["table"].places, kinds["uniform"].places, kinds["sample"].places, terms)


def _gap(contact: Contact, poses: dict[int, tuple[Array, Array]]) -> Any:
    """Return the contact's gap [m] with the links of tip and surface at ``poses``."""
    return -contact.depth(frame_in_world(poses, contact.tip)[1], *frame_in_world(poses, contact.surface))


def clearances(tree: RigidTree, poses: dict[int, tuple[Array, Array]], obstacle: Obstacle, center: Array | None = None) -> Array:
    """Return the distances (C,) of the arm's capsules from an obstacle at ``center`` (3,); None: where it stands."""
    distances = np.empty(len(tree.capsules), dtype=object)
    for k, capsule in enumerate(tree.capsules):
        r, p = poses[capsule.link]
        a, b = p + r @ capsule.a.astype(object), p + r @ capsule.b.astype(object)
        distances[k] = capsule_obstacle(a, b, float(capsule.radius), obstacle, center)
    return distances


def _inputs(graph: Graph, kind: str, indices: Iterable[int]) -> Array:
    values = [graph.input(kind, index) for index in indices]
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out
