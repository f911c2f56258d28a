"""Planner overhead without dynamics: one update of each rule on a free objective."""

from __future__ import annotations

from typing import Any

import torch
from _common import Say, median_time, row

from mbctrl.base.spec import import_name
from mbctrl.planning.knots import Knots
from mbctrl.planning.noise import Noise, Shape
from mbctrl.planning.objective import TorchSearch
from mbctrl.planning.planner import Planner
from mbctrl.planning.rules import RULES


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return the time of one update of each rule, 7 commands, 32 steps, as a share of drawing its noise alone."""
    torch.set_num_threads(1)
    out = []
    for samples in (1024,) if quick else (256, 1024, 4096):
        knots = Knots(6, 32, 0.02)
        noise = Noise("white", Shape(6, 7, samples))
        alone = median_time(lambda noise=noise: noise.draw(0), 30)
        out.append(row(f"noise alone, N={samples}", alone * 1e6, "µs"))
        for name in RULES:
            say(f"{name}, {samples} samples")
            bound = torch.ones(7)
            search = TorchSearch(lambda x, u, p: u[0, 0], knots, noise, -bound, bound)
            planner = Planner(search, import_name(name, RULES)(), knots, samples=samples, sigma=bound)
            state, x = planner.initial(torch.zeros(7)), torch.zeros(14)
            with torch.inference_mode():
                used = median_time(lambda planner=planner, state=state: planner.iterate(state, x, None), 30)
            out.append(row(f"{name}, N={samples}", used * 1e6, "µs"))
            out.append(row(f"{name} over noise alone, N={samples}", used / alone, "x"))
    return out
