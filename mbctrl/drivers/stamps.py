"""A robot's own clock on the host's: how old a measurement is, whatever the network did to it."""

from __future__ import annotations

_DRIFT = 2e-4  # two crystals of 100 ppm each


class StampMap:
    """Maps a robot's stamps to time.monotonic() minus ``epoch`` [s].

    The offset is the smallest seen between arrival and stamp, so a sample that was held up shows its age. It may rise by
    0.2 ms a second, as clocks drift apart; without that a robot whose clock is slow would seem to age within hours.
    """

    def __init__(self, epoch: float = 0.0) -> None:
        self._epoch = epoch
        self._offset, self._at, self._newest = float("inf"), 0.0, float("-inf")

    def __call__(self, stamp: float, arrival: float) -> float:
        """Return when a sample stamped ``stamp`` that arrived at ``arrival`` was taken [s]; never decreases."""
        self._offset = min(self._offset + _DRIFT * (arrival - self._at), arrival - stamp)
        self._at = arrival
        self._newest = max(self._newest, stamp + self._offset - self._epoch)
        return self._newest
