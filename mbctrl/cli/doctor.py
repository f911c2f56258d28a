"""``mbctrl doctor``: what this machine has and what is missing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.table import Table

from mbctrl import __version__
from mbctrl.base.errors import MbctrlError
from mbctrl.base.find import names, roots
from mbctrl.cli.machine import machine

console = Console()
_PACKAGES = {
    "numpy": "core",
    "pydantic": "core",
    "torch": "sim",
    "mujoco": "sim",
    "dm-control": "sim",
    "pin": "sim",
    "scipy": "sim",
    "matplotlib": "sim",
    "av": "sim",
    "llvmlite": "deploy",
    "cvxpy": "calibrate",
    "pandas": "calibrate",
    "pyarrow": "learn",
    "mcap": "deploy",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "deploy",
    "ruckig": "deploy",
    "ur_rtde": "ur",
    "franky-control": "franka",
    "dynamixel-sdk": "servo",
    "viser": "viewer",
    "cuda-core": "cuda",
}
_ALIKE = {"onnxruntime": ("onnxruntime-gpu",), "franky-control": ("pylibfranka",)}  # either serves


def doctor() -> int:
    """Print versions, cores, rendering and search path; return 0 whatever it finds."""
    table = Table(
        title=f"mbctrl {__version__}, Python {platform.python_version()}, {platform.machine()}",
        show_header=False,
        title_justify="left",
    )
    for package, extra in _PACKAGES.items():
        table.add_row(package, _version(package, extra))
    table.add_section()
    table.add_row("cores", str(os.cpu_count()))
    table.add_row("compiled rollouts", _compiler())
    table.add_row("accelerator", _accelerator())
    table.add_row("off-screen rendering", _rendering())
    table.add_row("onnxruntime's providers", _providers())
    table.add_section()
    for label, value in machine():
        table.add_row(label, value)
    table.add_section()
    table.add_row("search path", "\n".join(str(root) for root in roots()))
    counts = {folder: len(names(folder)) for folder in ("robots", "controllers", "launch", "calibration")}
    table.add_row("found", ", ".join(f"{count} {folder}" for folder, count in counts.items()))
    console.print(table)
    return 0


def _version(package: str, extra: str) -> str:
    for name in (package, *_ALIKE.get(package, ())):
        try:
            return version(name) + (f" ({name})" if name != package else "")
        except PackageNotFoundError:
            pass
    return "[red]missing[/]" if extra == "core" else f'[yellow]missing:[/] pip install "mbctrl\\[{extra}]"'


def _compiler() -> str:
    try:
        from mbctrl.kernels.native import host

        name, _, bits = host()
        return f"for {name}, vectors of {bits} bits"
    except ImportError:
        return '[yellow]none:[/] pip install "mbctrl\\[sim]"'
    except MbctrlError as error:
        return f"[yellow]none:[/] {error}"


def _accelerator() -> str:
    try:
        import torch
    except ImportError:
        return "unknown without torch"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees: planning runs on the CPU"


def _rendering() -> str:
    try:
        from mbctrl.report.offscreen import choose_backend

        return choose_backend()
    except ImportError:
        return "unknown without mujoco"
    except MbctrlError as error:
        return f"[yellow]none:[/] {error}"


def _providers() -> str:
    try:
        from mbctrl.runtime.onnx_planner import PROVIDERS, usable
    except ImportError:
        return "unknown without onnxruntime"
    found = usable()
    absent = [provider for provider in PROVIDERS if provider not in found]
    return ", ".join(found) + (f"; not usable here: {', '.join(absent)}" if absent else "")
