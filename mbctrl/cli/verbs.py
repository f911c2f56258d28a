"""The verbs of ``mbctrl`` and their options: what --help says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand

from mbctrl.cli.verbs_learn import Distil, Evaluate, Learn, Train


@dataclass(frozen=True)
class Run:
    """Run a scenario and write a run folder (config, log, plots, video).

    Any setting of the scenario can be given after its name; list them with: mbctrl run SCENARIO --help

    For example:

        mbctrl run launch/panda_reach_sim.yaml
        mbctrl run panda_track_sim --planner.samples 1024 --loop.rate 50
        mbctrl run panda_avoid_sim --viewer
        mbctrl run arm2_swingup_sim --lockstep --seed 3
        mbctrl run ur10e_reach_sim --robot.parameters my_fitted.yaml
    """

    scenario: Positional[str]
    """A scenario by name (mbctrl list) or path."""
    lockstep: bool = False
    """Deterministic: simulated time waits for the planner, whose latency is loop.latency."""
    viewer: bool = False
    """Show the run live in a browser on 127.0.0.1."""
    viewer_port: int = 8080
    """Port of the viewer."""
    out: Path | None = None
    """Run folder; by default runs/SCENARIO-DATE-TIME."""


@dataclass(frozen=True)
class Excite:
    """Find a motion that tells as much as it can about a robot's inertial and friction parameters.

    A Fourier series within the robot's limits, clear of itself and the floor, with smooth ramps from home and back; leaves
    trajectory.csv, excitation.yaml and plots.png, and says how well each parameter will be known, before the arm moves.

    For example:

        mbctrl excite panda
        mbctrl excite ur10e --duration 30 --margin 0.6 --clearance 0.05
        mbctrl excite arm2 --torque-noise 0.05 0.02 --no-armature
        mbctrl excite my_arm.urdf --no-floor --rate 250 --repeats 5 --out runs/mine
    """

    robot: Positional[str]
    """A robot by name (mbctrl list), or a path to a robot.yaml, MJCF or URDF file."""
    duration: float = 20.0
    """Period [s]."""
    harmonics: int = 5
    """Harmonics of the base frequency 1 / duration; at least 2."""
    repeats: int = 1
    """Periods in trajectory.csv; noise averages out over them."""
    rate: float | None = None
    """Samples a second [Hz]; by default the robot's control rate."""
    margin: float = 0.8
    """Share of each limit (position, velocity, acceleration, jerk, torque) that may be used."""
    clearance: float = 0.02
    """Least distance of the arm's links from each other, the base and the floor [m]."""
    floor: bool = True
    """Keep clear of the plane z = 0."""
    armature: bool = True
    """Count rotor inertias among the parameters."""
    torque_noise: tuple[float, ...] = ()
    """Standard deviation of a torque sample [N·m], one for all or one a joint; by default 2 % of the effort limits."""
    iterations: int = 150
    """Of the optimiser; more take longer and find a little more."""
    seed: int = 0
    """Of the random motions the search starts from."""
    out: Path | None = None
    """Folder to make; by default runs/excite-ROBOT-DATE-TIME."""


@dataclass(frozen=True)
class List:
    """List the robots, controllers, scenarios and parameter files that are found.

    For example:

        mbctrl list
    """


@dataclass(frozen=True)
class Show:
    """Show a robot, controller or scenario, resolved, or a parameter file.

    For example:

        mbctrl show panda
        mbctrl show panda_reach_sim
    """

    name: Positional[str]
    """A name (mbctrl list), or a path to a YAML, MJCF or URDF file."""


@dataclass(frozen=True)
class Check:
    """Load files, compare MuJoCo and Pinocchio, and plan one step; without names: every file that is found.

    For example:

        mbctrl check
        mbctrl check panda my_arm.urdf my_scenario.yaml
        mbctrl check panda_reach                # a bundle: every byte, golden vectors, latency; needs no torch
    """

    names: Positional[tuple[str, ...]] = ()
    """Robots, controllers, scenarios, parameter files, or paths."""


@dataclass(frozen=True)
class Calibrate:
    """Fit a robot's parameters to its logs; write a parameter file, a model file and a report.

    A log may be an excerpt, LOG:FIRST-LAST in rows of data counted from 1. The recipe says what the log's columns are and
    what is fitted; see calibration/ur10e_rtde.yaml.

    For example:

        mbctrl calibrate ur10e_rtde monday.csv --validate tuesday.csv
        mbctrl calibrate ur10e_rtde monday.csv:635-3510 morning.csv --validate tuesday.csv --out results
        mbctrl run ur10e_reach_sim --robot.parameters calibration/ur10e_fitted.yaml
    """

    recipe: Positional[str]
    """A recipe by name (mbctrl list) or path."""
    logs: Positional[tuple[str, ...]]
    """Logs to fit: CSV, NPZ, Parquet, MCAP, or logs of mbctrl run."""
    validate: tuple[str, ...] = ()
    """Logs to judge the fit on, which it does not see."""
    out: Path = Path("calibration")
    """Folder for ROBOT_fitted.yaml, ROBOT_fitted.xml and ROBOT_report.html."""


@dataclass(frozen=True)
class Payload:
    """Weigh what an arm carries, from a log with it and a log without; or, given its mass, find the drive gains.

    Logs are read as a recipe says; LOG:FIRST-LAST is an excerpt. The motions may be the same or different.

    For example:

        mbctrl payload ur10e_rtde bare.csv loaded.csv --frame tcp
        mbctrl payload ur10e_rtde bare.csv loaded.csv --mass 2.805
    """

    recipe: Positional[str]
    """A recipe by name (mbctrl list) or path."""
    bare: Positional[str]
    """A log of the bare arm."""
    loaded: Positional[str]
    """A log of the arm with its payload."""
    mass: float | None = None
    """[kg] of the payload, where it is known: prints the drive gains that make it weigh that."""
    frame: str | None = None
    """The frame the payload is described in; by default the last link's own."""
    out: Path | None = None
    """A parameter file of the arm with the payload, NAME_fitted.yaml."""


@dataclass(frozen=True)
class Export:
    """Export a planner to a bundle: ONNX graphs and compiled rollouts that a robot's computer runs without torch.

    A controller is exported for the robot and goal of the scenario that uses it. Any setting of the scenario can be given.

    For example:

        mbctrl export controllers/panda_reach.yaml -o panda_reach
        mbctrl export launch/ur10e_reach_sim.yaml -o ur10e_reach --planner.samples 512
        mbctrl check panda_reach
        mbctrl deploy panda_reach --driver sim
    """

    source: Positional[str]
    """A scenario or controller by name (mbctrl list) or path."""
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Folder to make; by default bundles/NAME."""


@dataclass(frozen=True)
class Deploy:
    """Run an exported planner on a robot, real or behind mbctrl sim; needs no torch and no MuJoCo.

    Every byte of the bundle and the robot are checked before anything moves; Ctrl-C brings the arm to rest. Leaves log.mcap
    (Foxglove, PlotJuggler, mbctrl replay) and, after a fault, blackbox.mcap. Exit code 3 says that a fault ended the run.

    For example:

        mbctrl deploy panda_reach --driver sim
        mbctrl deploy ur10e_reach --driver ur --host 127.0.0.1      # with mbctrl sim ur10e --protocol ur beside it
        mbctrl deploy ur10e_reach --driver ur --host 192.168.1.20 --robot my_ur10e
        mbctrl deploy panda_reach --driver my_package.arm:MyDriver --option speed=0.5
        mbctrl deploy panda_reach --driver link --engine onnx
    """

    bundle: Positional[Path]
    """A bundle's folder, of mbctrl export."""
    driver: str = "sim"
    """sim, link, ur, franka, servo, or module:Class."""
    host: str = "127.0.0.1"
    """The robot's address."""
    option: Annotated[tuple[str, ...], UseAppendAction] = ()
    """KEY=VALUE of the driver; again for more."""
    engine: Literal["kernel", "onnx"] = "kernel"
    """kernel: compiled here, the quick one. onnx: onnxruntime, the portable one."""
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """Of onnxruntime; one that is not there is refused."""
    threads: int = 0
    """Of the planner; 0: all cores but one (kernel), one (onnx)."""
    goal: Path | None = None
    """A YAML file with a goal, in place of the exported scenario's."""
    robot: str | None = None
    """Your own description of the robot, to be compared with the bundle's."""
    duration: float | None = None
    """[s]; by default the scenario's."""
    realtime: bool = True
    """Ask for real-time scheduling."""
    yes: bool = False
    """Do not ask before a robot moves."""
    out: Path | None = None
    """Folder to make; by default runs/deploy-BUNDLE-DATE-TIME."""


@dataclass(frozen=True)
class Sim:
    """Put a simulated robot behind a real wire protocol, in a process of its own, with faults on request.

    Faults are KIND[=VALUE]@START[:END], times [s] from the first motion command: freeze, drop=share, delay=s, reorder,
    duplicate, nan, jump=rad, estop, pstop, push=N (on the tool, along x), kill.

    For example:

        mbctrl sim panda
        mbctrl sim ur10e --protocol ur
        mbctrl sim panda --protocol franka --fault freeze@5:6 --fault estop@10 --log server.log
    """

    robot: Positional[str]
    """A robot by name (mbctrl list) or path."""
    protocol: Literal["link", "ur", "franka"] = "link"
    """link: mbctrl's own, UDP. ur: RTDE, script and dashboard of Universal Robots. franka: FCI of Franka Robotics."""
    host: str = "127.0.0.1"
    """Where to listen; link takes HOST:PORT, and a key file elsewhere than on loopback."""
    fault: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A fault; again for more."""
    log: Path | None = None
    """What the arm did, every control period."""
    duration: float | None = None
    """[s]; by default until Ctrl-C."""
    start_noise: float = 0.0
    """[rad] around home, uniform."""
    seed: int = 0
    """Of start_noise and random faults."""
    key_file: Path | None = None
    """The secret both sides of link authenticate frames with."""


@dataclass(frozen=True)
class Replay:
    """Show what a deployed robot's log says: one screen, and plots.png beside it.

    For example:

        mbctrl replay runs/deploy-panda_reach-20261121-090000/log.mcap
    """

    log: Positional[Path]
    """log.mcap or blackbox.mcap; one that was cut off is read as far as it goes."""


@dataclass(frozen=True)
class Bench:
    """Run a benchmark of the checkout's benchmarks/ folder and print its table.

    For example:

        mbctrl bench mainjob --quick
        mbctrl bench dynamics --json
    """

    name: Positional[str]
    """The benchmark's name."""
    quick: bool = False
    """Fewer repetitions and seeds; says so."""
    json: bool = False
    """Print one JSON list of rows and nothing else on standard output."""


@dataclass(frozen=True)
class Doctor:
    """Say what this machine has and what is missing: packages, rendering, codecs, cores.

    For example:

        mbctrl doctor
    """


Verb = (
    Annotated[Run, subcommand("run", prefix_name=False)]
    | Annotated[Excite, subcommand("excite", prefix_name=False)]
    | Annotated[List, subcommand("list", prefix_name=False)]
    | Annotated[Show, subcommand("show", prefix_name=False)]
    | Annotated[Check, subcommand("check", prefix_name=False)]
    | Annotated[Calibrate, subcommand("calibrate", prefix_name=False)]
    | Annotated[Train, subcommand("train", prefix_name=False)]
    | Annotated[Learn, subcommand("learn", prefix_name=False)]
    | Annotated[Distil, subcommand("distil", prefix_name=False)]
    | Annotated[Evaluate, subcommand("evaluate", prefix_name=False)]
    | Annotated[Payload, subcommand("payload", prefix_name=False)]
    | Annotated[Export, subcommand("export", prefix_name=False)]
    | Annotated[Deploy, subcommand("deploy", prefix_name=False)]
    | Annotated[Sim, subcommand("sim", prefix_name=False)]
    | Annotated[Replay, subcommand("replay", prefix_name=False)]
    | Annotated[Bench, subcommand("bench", prefix_name=False)]
    | Annotated[Doctor, subcommand("doctor", prefix_name=False)]
)
