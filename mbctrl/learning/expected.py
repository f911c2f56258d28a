"""What a model expects of its own errors many steps ahead, beside what they are: do its intervals hold there, too?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.propagation import KINDS, interval, propagate
from mbctrl.learning.evaluate import Windows, tool_of

PARTICLES = 39
"""So many that the second and the last but one are the ends of a 90 % interval."""
_MOST, _WIDE = 400, 50  # windows in all, and at a time
_SAME = 1e-9  # [rad/s] within which particles do not differ


@dataclass(frozen=True)
class Expected:
    """What a model expects over windows, propagated in one ``way``; P particles.

    ``speeds`` (H, N) is the share of the joints' speeds within their 90 % intervals; ``inside`` (H, N) whether the tool is as near
    to where the model's mean takes it as 90 % of the particles are; ``tool`` (H, P, N) how far these are from there [m]; ``kind``
    (H, N) as in Windows; ``open`` (H, N) whether particles differ at all, which they do not while the gate is closed.
    """

    way: str
    speeds: np.ndarray
    inside: np.ndarray
    tool: np.ndarray
    kind: np.ndarray
    open: np.ndarray

    def covered(self, step: int, kind: int) -> tuple[float, float, int]:
        """Return the shares of speeds and of tools in 90 % intervals ``step`` steps ahead, and of how many windows."""
        chosen = (self.kind[step - 1] == kind) & self.open[step - 1]
        count = int(chosen.sum())
        if not count:
            return np.nan, np.nan, 0
        return float(self.speeds[step - 1][chosen].mean()), float(self.inside[step - 1][chosen].mean()), count

    def band(self, step: int, kind: int) -> np.ndarray:
        """Return the median and 95 % quantile (2,) [m] of the tool's error as expected, over all windows of a kind; NaN where
        there are none."""
        found = self.tool[step - 1][:, self.kind[step - 1] == kind]
        return np.quantile(found, (0.5, 0.95), method="higher") if found.size else np.full(2, np.nan)


@torch.no_grad()
def expected(model: HybridDynamics, windows: Windows, arm: Model, seed: int = 0) -> list[Expected]:
    """Return what a model expects in each way of propagation, over some of the windows; nothing of one that gives means only."""
    if model.residual.spread is None:
        return []
    chosen = np.unique(np.linspace(0, windows.x0.shape[1] - 1, _MOST).astype(int))
    kind, found = windows.kind[:, chosen], []
    for way in KINDS:
        noise = torch.Generator().manual_seed(seed)
        parts = [_looked(model, windows, arm, way, part, noise) for part in np.split(chosen, range(_WIDE, len(chosen), _WIDE))]
        speeds, inside, tool, differ = (np.concatenate(rows, -1) for rows in zip(*parts))
        found.append(Expected(way, speeds, inside, tool, kind, differ))
    return found


def _looked(
    model: HybridDynamics, windows: Windows, arm: Model, way: str, part: np.ndarray, noise: torch.Generator
) -> tuple[np.ndarray, ...]:
    """Return ``Expected``'s speeds, inside, tool and open of some windows."""
    n = model.nq
    x0, u = torch.from_numpy(windows.x0[:, part]), torch.from_numpy(windows.u[..., part])
    middle = model.rollout(x0, u)[1:, :n].numpy()
    x = torch.stack(list(propagate(model, x0, u, way, PARTICLES, noise)))  # (H, nx, P, N)
    low, high = interval(x[:, n:], (0.05, 0.95)).numpy()
    truth = windows.x[..., part]
    speeds = ((low <= truth[:, n:]) & (truth[:, n:] <= high) & np.isfinite(high)).mean(1)
    places = tool_of(arm, x[:, :n].numpy().reshape(len(x), n, -1)).reshape(len(x), 3, PARTICLES, -1)
    centre = tool_of(arm, middle)
    away = np.linalg.norm(places - centre[:, :, None], axis=1)  # (H, P, N)
    away = np.where(np.isfinite(away), away, np.inf)
    most = interval(torch.from_numpy(away), (0.9,))[0].numpy()
    off = np.linalg.norm(tool_of(arm, truth[:, :n]) - centre, axis=1)
    differ = (x[:, n:].amax(2) - x[:, n:].amin(2)).amax(1).numpy() > _SAME
    return speeds, (off <= most) & np.isfinite(most), away.astype(np.float32), differ
