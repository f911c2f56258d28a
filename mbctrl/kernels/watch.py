"""What a control process wants to know of the arm: momentum, bias, gravity, tool and clearance, as a program of one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mbctrl.base.scene import Obstacle
from mbctrl.dynamics.tree import Frame, RigidTree
from mbctrl.kernels.graph import Graph, minimum
from mbctrl.kernels.program import Program
from mbctrl.kernels.rigid_body import TracedArm, frame_in_world
from mbctrl.kernels.step import Drive, TracedStep
from mbctrl.kernels.trace import Inputs, Traced, clearances
from mbctrl.tasks.distance import capsule_capsule

FAR = 10.0
"""Distance [m] of what there is nothing of."""
OUTPUTS = ("momentum", "bias", "gravity", "position", "rotation", "scene", "self")
"""In this order: M(q) v (n), C(q, v) v (n), g(q) (n), the tool's (3) and (3, 3), least distance to obstacles and to itself."""


def trace_watch(
    tree: RigidTree, drive: Drive, tool: Frame, obstacles: Sequence[Obstacle] = (), pairs: Sequence[tuple[int, int]] = ()
) -> Traced:
    """Trace what is watched: start is [q, v] and padding, the state after one step the OUTPUTS in a row.

    The uniforms are ``obstacle.i`` (3), positions [m]; ``pairs`` are the capsules whose distance from each other counts.
    """
    graph, n = Graph(), tree.n
    uniform = Inputs(graph, "uniform")
    size = max(2 * n, 3 * n + 14)
    start = np.array([graph.input("start", i) for i in range(size)], dtype=object)
    carry = np.array([graph.input("carry", i) for i in range(size)], dtype=object)
    q, v = carry[:n], carry[n : 2 * n]
    step = TracedStep(TracedArm(tree), drive, 1.0)
    angles = step.angles(q)
    turns = step.arm.turns(*angles)
    motion = step.arm.motion(*turns, v, *angles[1:])
    momentum = [sum(motion.mass_matrix[max(i, j), min(i, j)] * v[j] for j in range(n)) for i in range(n)]
    links = {tool.link} | {capsule.link for capsule in tree.capsules}
    poses = step.arm.world(*turns, links)
    rotation, position = frame_in_world(poses, tool)
    scene: Any = FAR
    for k, obstacle in enumerate(obstacles):
        for distance in clearances(tree, poses, obstacle, uniform.array(f"obstacle.{k}", 3)):
            scene = minimum(scene, distance)
    near: Any = FAR
    for i, j in pairs:
        near = minimum(near, capsule_capsule(*_ends(tree, poses, i), *_ends(tree, poses, j)))
    values = [*momentum, *motion.bias, *motion.gravity, *position, *rotation.flat, scene, near]
    values += [0.0] * (size - len(values))
    program = Program(
        graph,
        size,
        1,
        tuple(value.index for value in start),
        tuple(graph.operand(value) for value in values),
        None,
        {"table": 0, "uniform": uniform.size, "sample": 0},
    )
    return Traced(program, {}, uniform.places, {})


def _ends(tree: RigidTree, poses: Any, k: int) -> tuple[Any, Any, float]:
    capsule = tree.capsules[k]
    r, p = poses[capsule.link]
    return p + r @ capsule.a.astype(object), p + r @ capsule.b.astype(object), float(capsule.radius)
