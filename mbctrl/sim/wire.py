"""What a wire protocol has to do to be an arm's network interface; the server does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod

from mbctrl.runtime.driver import RobotState
from mbctrl.sim.plant import Plant


class Wire(ABC):
    """The robot's side of a protocol, over a ``plant``; called by one thread, once a control period, and never waits.

    The order of calls is ``open``, then in every period ``receive``, ``plant.tick`` (the server's), ``publish`` for each
    sample the period has to send (none, one or several: that is where faults are put in), at last ``close``.
    """

    def __init__(self, plant: Plant, host: str = "127.0.0.1") -> None:
        self.plant, self.host = plant, host

    @abstractmethod
    def open(self) -> None:
        """Listen; DriverError naming the port that is taken."""

    @abstractmethod
    def receive(self) -> bool:
        """Take what clients have sent since the last period: commands to ``plant.command``, and the robot's own watchdog
        to ``plant.halt``. Return whether a motion command came."""

    @abstractmethod
    def publish(self, sample: RobotState) -> None:
        """Send a sample; where a client's buffer is full it is dropped."""

    @abstractmethod
    def close(self) -> None:
        """Close every socket."""
