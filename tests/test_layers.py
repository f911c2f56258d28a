"""Imports point down only: an inventory of every import statement, lazy ones and imports by name included."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "mbctrl"
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if "share" not in path.relative_to(ROOT).parts
}
EVERYTHING = None
# For each layer the layers it may import besides itself, and the third parties (None: any).
LAYERS: dict[str, tuple[set[str], set[str] | None]] = {
    "base": (set(), {"numpy", "yaml", "pydantic"}),
    "runtime": ({"base", "kernels", "planning"}, {"numpy", "onnxruntime", "llvmlite", "ruckig", "mcap"}),
    "drivers": (
        {"base", "runtime"},
        {"numpy", "rtde_control", "rtde_receive", "franky", "pylibfranka", "dynamixel_sdk", "serial"},
    ),
    "tasks": ({"base"}, {"numpy", "pydantic"}),
    "dynamics": ({"base"}, {"numpy", "pydantic", "torch", "mujoco", "pinocchio", "dm_control"}),
    "kernels": ({"base", "tasks", "dynamics"}, {"numpy", "llvmlite", "cuda"}),
    "planning": ({"base", "tasks", "dynamics", "kernels"}, {"numpy", "torch", "scipy", "pydantic"}),
    "calibrate": (
        {"base", "dynamics", "kernels", "planning"},
        {
            "numpy",
            "pydantic",
            "scipy",
            "pandas",
            "pyarrow",
            "mcap",
            "mcap_ros2",
            "cvxpy",
            "clarabel",
            "mujoco",
            "matplotlib",
            "jinja2",
            "torch",
        },
    ),
    # calibrate: for how reports look
    "learning": (
        {"base", "tasks", "dynamics", "calibrate"},
        {"numpy", "pydantic", "torch", "pyarrow", "matplotlib", "jinja2"},
    ),
    "export": (
        {"base", "tasks", "dynamics", "kernels", "planning", "runtime"},
        {"numpy", "torch", "onnx", "onnxscript", "onnxruntime"},
    ),
    "sim": ({"base", "runtime", "drivers", "dynamics"}, {"numpy", "mujoco"}),
    "report": ({"base", "runtime"}, {"numpy", "mujoco", "matplotlib", "av", "OpenGL"}),
    "viewer": ({"base"}, {"numpy", "mujoco", "viser"}),
    "cli": (EVERYTHING, None),
}
NAME = re.compile(r"mbctrl(\.\w+)+(:\w+)?")


def imports(path: Path) -> list[tuple[int, str]]:
    """Return (line, module) of every import in a file, and of every text that spells a module of the package."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            found += [(node.lineno, resolve(node.module, alias.name)) for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            found.append((node.lineno, node.value.partition(":")[0]))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("import_module", "need"):
            found += [(node.lineno, text) for text in literals(node.args[:1])]
    return found


def resolve(module: str, name: str) -> str:
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def literals(nodes: list[ast.expr]) -> list[str]:
    """Return the texts a call's argument is known to begin with."""
    texts = []
    for node in nodes:
        first = node.values[0] if isinstance(node, ast.JoinedStr) else node
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            texts.append(first.value.rstrip("."))
    return texts


def layer(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def complaints(module: str, found: list[tuple[int, str]]) -> list[str]:
    """Return what ``module`` may not import."""
    if layer(module) not in LAYERS:
        return [f"{module}: no such layer; add it to LAYERS"]
    layers, third = LAYERS[layer(module)]
    wrong = []
    for line, target in found:
        top = target.split(".")[0]
        if top == "mbctrl":
            fine = layers is EVERYTHING or layer(target) in {"", layer(module), *layers}
        else:
            fine = third is None or top in third or top in sys.stdlib_module_names
        if not fine:
            wrong.append(f"{module}:{line} imports {target}")
    return wrong


@pytest.mark.parametrize("module", [name for name in MODULES if name != "mbctrl"])
def test_imports_point_down(module: str) -> None:
    wrong = complaints(module, imports(MODULES[module]))
    assert not wrong, "; ".join(wrong)


def test_the_package_itself_imports_nothing() -> None:
    assert all(name == "__future__" for _, name in imports(MODULES["mbctrl"]))


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("mbctrl.base.x", "def f():\n    from mbctrl.dynamics import load"),
        ("mbctrl.base.x", "import torch"),
        ("mbctrl.runtime.x", "if True:\n    import mujoco.viewer"),
        ("mbctrl.runtime.x", "from importlib import import_module\nimport_module('torch')"),
        ("mbctrl.tasks.x", "from mbctrl.planning.knots import Knots"),
        ("mbctrl.planning.x", "NAMES = {'sim': 'mbctrl.sim.driver:SimDriver'}"),
        ("mbctrl.dynamics.x", "from mbctrl.runtime.loop import ControlLoop"),
        ("mbctrl.planning.x", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import mbctrl.report.plots"),
        ("mbctrl.report.x", "from mbctrl import dynamics"),
        ("mbctrl.attic.x", "import math"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, module: str, code: str) -> None:
    path = tmp_path / "x.py"
    path.write_text(code)
    assert complaints(module, imports(path)), code


@pytest.mark.parametrize("module", MODULES)
def test_only_the_reference_touches_pinocchio(module: str) -> None:
    found = {name.split(".")[0] for _, name in imports(MODULES[module])}
    assert module == "mbctrl.dynamics.reference" or "pinocchio" not in found


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_over_400_lines(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{module} has {lines} lines"


def test_no_import_cycles() -> None:
    graph = {module: {name for _, name in imports(path) if name in MODULES and name != module} for module, path in MODULES.items()}
    cycle = find_cycle(graph)
    assert not cycle, " -> ".join(cycle)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        for target in sorted(graph.get(node, ())) if node not in done else ():
            if cycle := visit(target, [*trail, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in graph if (cycle := visit(node, []))), [])


def test_a_planted_cycle_is_found() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c", "a"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_runtime_starts_without_torch_mujoco_pinocchio_and_scipy() -> None:
    modules = [name for name in MODULES if name.startswith("mbctrl.runtime")]
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in ("torch", "mujoco", "pinocchio", "scipy", "dm_control"))
    code = f"import sys; {blocked}import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(modules) > 3


def test_importing_the_base_loads_no_engine() -> None:
    modules = [name for name in MODULES if name.startswith("mbctrl.base")]
    code = f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'mujoco', 'pinocchio', 'scipy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]
