"""Packaging: one importable package, the declarative folders beside it copied into the wheel as ``mbctrl/share``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
FOLDERS = ("robots", "controllers", "calibration", "launch")

DEPLOY = ["llvmlite>=0.46,<1", "mcap>=1.2,<2", "ruckig>=0.14,<1"]
EXTRAS = {
    # Upper bounds are the next major version. The tests ran on Python 3.11 with the newest below them: torch 2.13, mujoco
    # 3.17, dm_control 1.0.50, pin 4.1, scipy 1.17, numpy 2.4, matplotlib 3.11, av 18.1, viser 1.1, cvxpy 1.9,
    # clarabel 0.11, pandas 3.1, pyarrow 26, mcap 1.6, mcap-ros2-support 0.6, jinja2 3.1, onnx 1.23, onnxscript 0.7,
    # onnxruntime 1.31, ruckig 0.19, ur_rtde 1.6.5, franky-control 2.0, dynamixel-sdk 4.1; lower bounds leave
    # room for Python 3.10. dm_control 1.0.50 breaks on mujoco 4.0 (flex_vertedge).
    "sim": [
        "av>=14,<19",
        "dm-control>=1.0.30,<2",
        "llvmlite>=0.46,<1",
        "matplotlib>=3.9,<4",
        "mujoco>=3.17,<4",
        "pin>=3.4,<5",
        "scipy>=1.13,<2",
        "torch>=2.6,<3",
    ],
    "calibrate": [
        "clarabel>=0.9,<1",
        "cvxpy>=1.6,<2",
        "jinja2>=3.1,<4",
        "llvmlite>=0.46,<1",
        "matplotlib>=3.9,<4",
        "mcap>=1.2,<2",
        "mcap-ros2-support>=0.5,<1",
        "mujoco>=3.17,<4",
        "pandas>=2.2,<4",
        "pin>=3.4,<5",
        "pyarrow>=17,<27",
        "scipy>=1.13,<2",
        "torch>=2.6,<3",
    ],
    "learn": [
        "jinja2>=3.1,<4",
        "matplotlib>=3.9,<4",
        "mujoco>=3.17,<4",
        "pin>=3.4,<5",
        "pyarrow>=17,<27",
        "scipy>=1.13,<2",
        "torch>=2.6,<3",
    ],
    "export": [
        "llvmlite>=0.46,<1",
        "mujoco>=3.17,<4",
        "onnx>=1.17,<2",
        "onnxruntime>=1.20,<2",
        "onnxscript>=0.5,<1",
        "pin>=3.4,<5",
        "scipy>=1.13,<2",
        "torch>=2.8,<3",
    ],
    # What a robot's own computer runs, with a driver; no torch, no MuJoCo. onnxruntime and onnxruntime-gpu exclude each other.
    "deploy": DEPLOY + ["onnxruntime>=1.18,<2"],
    "deploy-gpu": DEPLOY + ["onnxruntime-gpu>=1.18,<2"],
    "ur": ["ur_rtde>=1.6.5,<2"],
    "franka": ["franky-control>=2.0,<3; sys_platform == 'linux'"],
    "servo": ["dynamixel-sdk>=4.0,<5"],
    # There is no CUDA for macOS.
    "cuda": [
        f"{need}; sys_platform != 'darwin'" for need in ("cuda-bindings>=13,<14", "cuda-core>=1,<2", "nvidia-cuda-nvrtc>=13,<14")
    ],
    "viewer": ["trimesh>=4,<6", "viser>=1.1,<2"],
    "dev": [
        "hypothesis>=6.100,<7",
        "pylibfranka==0.21.3; sys_platform == 'linux'",
        "pytest>=8,<10",
        "ruff>=0.8,<1",
        "websockets>=13,<17",
    ],
}

ALL = ("sim", "calibrate", "learn", "viewer", "export", "deploy")


class BuildWithShare(build_py):
    """Copies the declarative folders into the built package; cleared first, so that nothing removed lives on."""

    def run(self) -> None:
        super().run()
        share = Path(self.build_lib) / "mbctrl" / "share"
        shutil.rmtree(share, ignore_errors=True)
        for folder in FOLDERS:
            for path in (ROOT / folder).rglob("*"):
                if path.suffix in (".yaml", ".xml", ".urdf"):
                    target = share / path.relative_to(ROOT)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, target)


setup(
    name="mbctrl",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "mbctrl" / "__init__.py").read_text()).group(1),
    description="Model-based control of robot arms: run, calibrate and deploy sampling MPC",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "."},
    packages=find_packages(include=["mbctrl", "mbctrl.*"]),
    package_data={"mbctrl.calibrate": ["*.j2"], "mbctrl.learning": ["*.j2"]},
    install_requires=["numpy>=1.26,<3", "pydantic>=2.9,<3", "pyyaml>=6,<7", "rich>=13,<16", "tyro>=0.9,<2"],
    extras_require={**EXTRAS, "all": [need for extra in ALL for need in EXTRAS[extra]]},
    entry_points={"console_scripts": ["mbctrl = mbctrl.cli.main:main"]},
    cmdclass={"build_py": BuildWithShare},
)
