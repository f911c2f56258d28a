"""Compiled rollouts on a GPU, against the floor its arithmetic sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _common import median_time, row

from mbctrl.base.plan import PlanRequest
from mbctrl.planning.controller import MpcController

LANES = 128
"""Multiply-adds a clock of one multiprocessor, single precision (CUDA programming guide, compute capability 8.0 to 9.0)."""


def gpu_rows(build: Callable[[int], MpcController], call: Callable[[MpcController], Any], horizon: int) -> list[dict[str, Any]]:
    """Return steps a second, the share of the floor, and a whole replan; ``build`` makes controllers of N samples."""
    properties = torch.cuda.get_device_properties(0)
    peak = 2 * properties.multi_processor_count * LANES * torch.cuda.clock_rate() * 1e6
    out = []
    for samples in (1024, 4096, 65536, 262144):
        controller = build(samples)
        operations = controller.planner.search.programs()[0].operation_count
        work = call(controller)

        def run(work: Any = work) -> None:
            work()
            torch.cuda.synchronize()

        used = median_time(run, 30)
        bar = (">=", 2000.0) if samples == 262144 else (None, None)
        out += [
            row(f"{properties.name}: {samples} x {horizon}", samples * horizon / used / 1e6, "M steps/s", *bar),
            row(f"{properties.name}: {samples} x {horizon}, share of the floor", operations * samples * horizon / peak / used, "1"),
        ]
    controller = build(4096)
    x, step = np.concatenate([controller.model.robot.home, np.full(7, 0.1)]), iter(range(10_000))
    used = median_time(lambda: controller.plan(PlanRequest(0.002 * next(step), x, latency=0.002)), 200)
    return [*out, row(f"{properties.name}: replan 4096 x {horizon}, MPPI, median", used * 1e6, "µs", "<=", 200.0)]
