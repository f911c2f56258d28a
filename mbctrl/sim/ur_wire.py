"""The network interface of a Universal Robots controller, as far as ur-rtde needs it, over a simulated plant.

Dashboard (29999), script (30003) and RTDE (30004). Sources: Universal Robots, "Dashboard Server", "Remote Control Via
TCP/IP" and "Real-Time Data Exchange (RTDE) Guide"; what ur-rtde 1.6.5 was seen to send. The script port takes one program,
ur-rtde's, and sends no state of its own.
"""

from __future__ import annotations

import logging
import re
import struct
import time
from collections.abc import Callable

from mbctrl.base.errors import DriverError
from mbctrl.drivers.ur import DASHBOARD_PORT, RTDE_PORT, SCRIPT_PORT, TORQUE_PER_AMPERE
from mbctrl.runtime.driver import RobotState, Status
from mbctrl.sim.plant import Plant
from mbctrl.sim.rtde import INPUTS, OUTPUTS, PROTOCOL, TYPES, Kind, Recipe, message, split
from mbctrl.sim.tcp import Connection, Port
from mbctrl.sim.ur_script import ControlScript
from mbctrl.sim.wire import Wire

_log = logging.getLogger(__name__)
VERSION = (5, 26, 0, 0)  # the first whose direct torque ur-rtde 1.6.5 uses
_PROGRAM = re.compile(rb"^def (\w+)\(.*?^end[ \t]*\r?$", re.MULTILINE | re.DOTALL)
_POWER_OFF, _RUNNING = 3, 7  # robot_mode
_STOPPED, _PLAYING = 1, 2  # runtime_state
_MOST_NAMES = 500
# For each status safety_mode, its name and safety_status_bits: 0 normal, 2 protective stop, 6 the robot's emergency stop,
# 7 any emergency stop, 9 fault, 10 stopped for safety.
_SAFETY = {
    Status.OK: (1, "NORMAL", 1),
    Status.PROTECTIVE_STOP: (3, "PROTECTIVE_STOP", 1 << 2 | 1 << 10),
    Status.EMERGENCY_STOP: (7, "ROBOT_EMERGENCY_STOP", 1 << 6 | 1 << 7 | 1 << 10),
    Status.FAULT: (9, "FAULT", 1 << 9 | 1 << 10),
}


class _Session:
    """One RTDE client: what it reads, what it may set."""

    def __init__(self, link: Connection) -> None:
        self.link, self.started = link, False
        self.output: Recipe | None = None
        self.every, self.count = 1, 0  # sends each ``every``-th sample
        self.inputs: dict[int, Recipe] = {}

    def owns(self) -> set[str]:
        """Return the input variables this client has claimed."""
        return {name for recipe in self.inputs.values() for name in recipe.names}


class UrWire(Wire):
    """Universal Robots' side of ur-rtde's protocols.

    Any number of clients may read; an input variable belongs to the client that claimed it first, until it goes: a second
    controlling client finds it in use, as on the arm. Status maps to safety bits and to the program: an emergency stop
    powers off, each stop ends the program, FAULT (the watchdog's) leaves the safety state normal. ``unlock protective
    stop`` on the dashboard takes a protective stop away; an emergency stop is the plant's to reset.

    ``timestamp`` is the sample's stamp, ``actual_current`` its torque over TORQUE_PER_AMPERE, ``target_moment`` the torque
    the arm adds by itself; output variables without a counterpart in the plant are 0.

    Args:
        plant: a robot of six joints.
        host: where to listen.
        ports: dashboard, script, RTDE; the client's are hard-coded.
        now: a monotonic clock [s].
    """

    def __init__(
        self,
        plant: Plant,
        host: str = "127.0.0.1",
        ports: tuple[int, int, int] = (DASHBOARD_PORT, SCRIPT_PORT, RTDE_PORT),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(plant, host)
        if (plant.robot.nq, plant.robot.nu) != (6, 6):
            raise DriverError(f"expected six joints, '{plant.robot.name}' has {plant.robot.nq}", key="ur")
        self._numbers = ports
        self._ports: list[Port] = []
        self._sessions: list[_Session] = []
        self.script = ControlScript(plant, now)

    def open(self) -> None:
        """Listen on the three ports."""
        try:
            for number in self._numbers:
                self._ports.append(Port(self.host, number))
        except DriverError:
            self.close()
            raise

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports in use: dashboard, script, RTDE."""
        return tuple(port.number for port in self._ports)

    def receive(self) -> bool:
        """Serve the three ports and run the control program for a period."""
        dashboard, script, rtde = self._ports
        for new in dashboard.accept():
            new.send(b"Connected: Universal Robots Dashboard Server\n")
        for connection in dashboard.connections:
            if connection.receive():
                self._dashboard(connection)
        script.accept()
        for connection in script.connections:
            if connection.receive():
                self._upload(connection)
        self._sessions += [_Session(new) for new in rtde.accept()]
        for session in self._sessions:
            if session.link.receive():
                self._rtde(session)
        self._sessions = [session for session in self._sessions if session.link.open]
        return self.script.cycle()

    def publish(self, sample: RobotState) -> None:
        """Send the sample to every client that has started."""
        ready = [session for session in self._sessions if session.started]
        values = self._values(sample) if ready else {}
        for session in ready:
            session.count += 1
            if session.count % session.every == 0:
                numbers: list[float] = []
                for name, width in zip(session.output.names, session.output.widths):
                    numbers += values.get(name) or (0,) * width
                session.link.send(session.output.pack(numbers))

    def close(self) -> None:
        """Close every socket."""
        for port in self._ports:
            port.close()
        self._ports, self._sessions = [], []

    # --- what is sent -----------------------------------------------------------------------------------------------

    def _values(self, sample: RobotState) -> dict[str, list[float] | tuple[float, ...]]:
        """Return the numbers of the variables that are not always 0."""
        script, status = self.script, sample.status
        mode, _, bits = self._safety(status)
        values = {
            "timestamp": (sample.stamp,),
            "actual_q": sample.q.tolist(),
            "actual_qd": sample.v.tolist(),
            "target_q": script.target.tolist(),
            "target_qd": script.speed.tolist(),
            "actual_current": (sample.tau / TORQUE_PER_AMPERE).tolist(),
            "actual_current_as_torque": sample.tau.tolist(),
            "target_moment": sample.gravity.tolist(),
            "speed_scaling": (1.0,),
            "target_speed_fraction": (1.0,),
            "robot_mode": (_POWER_OFF if status is Status.EMERGENCY_STOP else _RUNNING,),
            "safety_mode": (mode,),
            "safety_status_bits": (bits,),
            "runtime_state": (_PLAYING if script.running else _STOPPED,),
            "robot_status_bits": ((status is not Status.EMERGENCY_STOP) | script.running << 1,),
        }
        values |= {f"output_int_register_{index}": (script.states[index],) for index in range(3)}
        return values

    def _safety(self, status: Status) -> tuple[int, str, int]:
        """Return mode, name and bits; a program that the watchdog ended is no matter of safety."""
        return _SAFETY[Status.OK if status is Status.FAULT and self.script.tripped else status]

    # --- what is received -------------------------------------------------------------------------------------------

    def _dashboard(self, connection: Connection) -> None:
        *lines, connection.stream = connection.stream.split(b"\n")
        for line in lines:
            text = line.decode("ascii", "replace").strip()
            connection.send(self._answer(text.lower(), text).encode("ascii", "replace") + b"\n")

    def _answer(self, command: str, text: str) -> str:
        playing, (_, safety, _) = self.script.running, self._safety(self.plant.status)
        if command == "stop":
            self.script.end()
            return "Stopped"
        if command == "unlock protective stop":
            if self.plant.status is Status.PROTECTIVE_STOP:
                self.plant.reset()
            return "Protective stop releasing"
        answers = {
            "polyscopeversion": f"URSoftware {'.'.join(map(str, VERSION))} (simulated)",
            "get serial number": "20260000000",
            "get robot model": self.plant.robot.name.upper(),
            "is in remote control": "true",
            "running": f"Program running: {str(playing).lower()}",
            "programstate": f"{'PLAYING' if playing else 'STOPPED'} rtde_control",
            "robotmode": f"Robotmode: {'POWER_OFF' if self.plant.status is Status.EMERGENCY_STOP else 'RUNNING'}",
            "safetymode": f"Safetymode: {safety}",
            "safetystatus": f"Safetystatus: {safety}",
            "quit": "Disconnected",
        }
        return answers.get(command, f"could not understand: '{text}'")

    def _upload(self, connection: Connection) -> None:
        """Run a program whose last line has come."""
        while found := _PROGRAM.search(connection.stream):
            connection.stream = connection.stream[found.end() :]
            if found.group(1) == b"rtde_control":
                self.script.end()
                self.script.start()
            else:
                _log.warning("the script port: program '%s' is not simulated", found.group(1).decode("ascii", "replace"))

    def _rtde(self, session: _Session) -> None:
        try:
            messages, session.link.stream = split(session.link.stream)
            for kind, payload in messages:
                reply = self._reply(session, kind, payload)
                if reply is not None:
                    session.link.send(reply)
        except DriverError as error:
            _log.warning("a client is dropped: %s", error)
            session.link.close()

    def _reply(self, session: _Session, kind: int, payload: bytes) -> bytes | None:
        if kind == Kind.DATA:
            self._take(session, payload)
            return None
        if kind == Kind.VERSION:
            return message(Kind.VERSION, bytes([payload == struct.pack(">H", PROTOCOL)]))
        if kind == Kind.CONTROLLER:
            return message(Kind.CONTROLLER, struct.pack(">4I", *VERSION))
        if kind == Kind.OUTPUTS:
            return message(Kind.OUTPUTS, self._setup_outputs(session, payload))
        if kind == Kind.INPUTS:
            return message(Kind.INPUTS, self._setup_inputs(session, payload))
        if kind in (Kind.START, Kind.PAUSE):
            session.started = kind == Kind.START and session.output is not None
            return message(Kind(kind), bytes([kind == Kind.PAUSE or session.started]))
        if kind == Kind.TEXT:
            return None
        raise DriverError(f"a message of kind {kind}, which the protocol does not have", key="RTDE")

    def _setup_outputs(self, session: _Session, payload: bytes) -> bytes:
        """Return the recipe's number and the variables' types; the frequency is rounded to a divisor of the plant's."""
        if len(payload) < 8:
            raise DriverError(f"an output recipe of {len(payload)} bytes, expected a frequency and names", key="RTDE")
        (frequency,) = struct.unpack_from(">d", payload)
        names = _names(payload[8:])
        types = [OUTPUTS.get(name, "NOT_FOUND") for name in names]
        session.output, session.started = None, False
        if all(kind in TYPES for kind in types) and frequency >= 1:
            session.output = Recipe(1, names, tuple(types))
            session.every = max(round(1 / (self.plant.period * frequency)), 1)
        return bytes([session.output is not None]) + ",".join(types).encode()

    def _setup_inputs(self, session: _Session, payload: bytes) -> bytes:
        names = _names(payload)
        taken = {name for other in self._sessions if other is not session and other.link.open for name in other.owns()}
        types = ["IN_USE" if name in taken else INPUTS.get(name, "NOT_FOUND") for name in names]
        number = 0
        if all(kind in TYPES for kind in types) and len(session.inputs) < 255:
            number = len(session.inputs) + 1
            session.inputs[number] = Recipe(number, names, tuple(types))
        return bytes([number]) + ",".join(types).encode()

    def _take(self, session: _Session, payload: bytes) -> None:
        """Set the registers of a data package."""
        recipe = session.inputs.get(payload[0] if payload else 0)
        if recipe is None:
            raise DriverError("a data package of a recipe that was not set up", key="RTDE")
        for name, numbers in recipe.unpack(payload).items():
            kind, _, index = name.rpartition("_register_")
            if kind == "input_int":
                self.script.integers[int(index)] = numbers[0]
            elif kind == "input_double":
                self.script.doubles[int(index)] = numbers[0]
            if name == "input_int_register_0":
                self.script.feed()


def _names(payload: bytes) -> tuple[str, ...]:
    """Return the names of a list with commas; DriverError where no real recipe is as long."""
    names = tuple(name for name in payload.decode("ascii", "replace").split(",") if name)
    if len(names) > _MOST_NAMES:
        raise DriverError(f"a recipe of {len(names)} variables, expected at most {_MOST_NAMES}", key="RTDE")
    return names
