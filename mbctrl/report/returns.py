"""The figure of a learning loop: what each trial was worth, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mbctrl.report.plots import COLOURS, FAINT, sheet


def plot_returns(trials: Sequence[tuple[int, float, np.ndarray]], chance: float | None, path: Path, title: str) -> None:
    """Draw a loop's trials and save them as a PNG.

    Args:
        trials: number, return, and the return so far after each step (T,) of each.
        chance: return of random commands, None: not known.
        path: the file to write; it appears only when it is complete.
        title: the figure's title.

    Errors:
        ExtraError: without matplotlib.
    """
    with sheet(path, title, (10.5, 4.0)) as figure:
        from matplotlib.ticker import MaxNLocator  # an extra's; the sheet says so where it is missing

        left, right = figure.subplots(1, 2)
        left.plot([number for number, *_ in trials], [total for _, total, _ in trials], "o-", color=COLOURS[0], label="planned")
        if chance is not None:
            left.axhline(chance, color=FAINT, linestyle="--", label="random commands")
        left.set(title="return of a trial", xlabel="trial")
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend()
        for number, _, so_far in trials:
            late = (number - 1) / max(len(trials) - 1, 1)
            right.plot(np.arange(1, len(so_far) + 1), so_far, color=COLOURS[0], alpha=0.25 + 0.75 * late)
        right.set(title="return so far in a trial, the last one darkest", xlabel="step")
