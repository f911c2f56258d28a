"""``mbctrl list``, ``show`` and ``check``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from mbctrl.base.config import load_controller, load_run
from mbctrl.base.errors import MbctrlError, SpecError, suggest
from mbctrl.base.extras import need
from mbctrl.base.find import names
from mbctrl.base.parameters import load_parameters
from mbctrl.base.robot import Robot, load_robot
from mbctrl.base.spec import dump_yaml, load_yaml
from mbctrl.calibrate.recipe import load_recipe
from mbctrl.cli.bundle import check_bundle, is_bundle
from mbctrl.learning.loops import load_loop
from mbctrl.learning.recipe import load_learning_recipe

console = Console()
_MODELS = (".xml", ".mjcf", ".urdf")
_FOLDERS = ("robots", "controllers", "launch", "calibration", "learning", "parameters")


def list_all() -> int:
    """Print every robot, controller, scenario, recipe and parameter file that is found, with its first comment or description."""
    for folder in [folder for folder in _FOLDERS if names(folder)]:
        table = Table(title=folder, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, path in names(folder).items():
            table.add_row(f"[bold]{name}[/]", _about(path, folder))
        console.print(table)
    return 0


def _about(path: Path, folder: str) -> str:
    if folder == "robots":
        return str(load_yaml(path).get("description", ""))
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")


def kind_of(name: str) -> str:
    """Return the folder ``name`` belongs to, or ``models`` for a bare MJCF, URDF or dm_control model.

    Errors:
        SpecError: listing what exists.
    """
    if name.startswith("dm_control:") or Path(name).suffix in _MODELS:
        return "models"
    folders = [folder for folder in _FOLDERS if name in names(folder)]
    if folders:
        return folders[0]
    if Path(name).is_dir():
        raise SpecError("a folder without manifest.json: no bundle of mbctrl export", file=name)
    if Path(name).suffix not in (".yaml", ".yml"):
        known = [entry for folder in _FOLDERS for entry in names(folder)]
        raise SpecError(f"unknown name '{name}'{suggest(name, known)}")
    keys = load_yaml(_existing(name)).keys()
    if "joints" in keys:
        return "parameters" if "robot" in keys else "robots"
    if "log" in keys:
        return "calibration"
    if {"robot", "dt"} <= set(keys):
        return "learning"
    return "launch" if "robot" in keys else "controllers"


def _existing(name: str) -> Path:
    from mbctrl.base.find import find

    return find("launch", name)


def show(name: str) -> int:
    """Print a robot's joints and limits, a controller or scenario as it resolves, or a parameter file."""
    kind = kind_of(name)
    if kind == "robots":
        _show_robot(load_robot(name))
    elif kind == "models":
        need("mujoco", "sim", "reading a model")
        from mbctrl.dynamics.load import load_model

        _show_robot(load_model(name).robot)
    else:
        load = {
            "controllers": load_controller,
            "launch": lambda name: load_run(name)[0],
            "calibration": lambda name: load_recipe(name)[0],
            "learning": lambda name: load_learning_recipe(name)[0],
            "parameters": load_parameters,
        }[kind]
        data = load(name).model_dump(mode="json")
        console.print(Syntax(dump_yaml(data, flow=kind == "parameters"), "yaml", background_color="default", word_wrap=True))
    return 0


def _show_robot(robot: Robot) -> None:
    limits, control = robot.limits, robot.control
    console.print(f"[bold]{robot.name}[/]: {robot.description}")
    console.print(f"model {robot.model}, tool {robot.tool}, {control.mode} mode at {control.rate:g} Hz", highlight=False)
    table = Table()
    for column in ("joint", "position [rad]", "velocity [rad/s]", "effort [N·m]", "stiffness", "damping", "home [rad]"):
        table.add_column(column, justify="left" if column == "joint" else "right")
    for i, joint in enumerate(robot.joints):
        a = robot.driven.index(joint) if joint in robot.driven else None
        driven = ["–"] * 3 if a is None else [f"{limits.effort[a]:g}", f"{control.stiffness[a]:g}", f"{control.damping[a]:g}"]
        span = f"{limits.position_lower[i]:.3f} … {limits.position_upper[i]:.3f}"
        table.add_row(joint, span, f"{limits.velocity[i]:g}", *driven, f"{robot.home[i]:.3f}")
    console.print(table)


def check(chosen: tuple[str, ...]) -> int:
    """Load every file, or those chosen; robots pass the self-check, scenarios plan a step, bundles answer their golden vectors.

    Return 2 if any fails. Bundles alone need no torch and no MuJoCo.
    """
    if not chosen or not all(map(is_bundle, chosen)):
        need("torch", "sim", "checking")
    entries = chosen or tuple(f"{folder}/{name}" for folder in _FOLDERS for name in names(folder))
    failed = 0
    for entry in entries:
        folder, _, name = entry.partition("/")
        try:
            if chosen and is_bundle(entry):
                check_bundle(entry)
                continue
            kind = folder if not chosen else kind_of(entry)
            console.print(
                f"[green]ok[/]    {entry}: {_check(kind, name if not chosen else entry)}", highlight=False, soft_wrap=True
            )
        except MbctrlError as error:
            failed += 1
            console.print(f"[red]error[/] {entry}: {str(error).replace('[', chr(92) + '[')}", highlight=False, soft_wrap=True)
    return 2 if failed else 0


def _check(kind: str, name: str) -> str:
    from mbctrl.dynamics.load import load_model

    if kind in ("robots", "models"):
        model = load_model(name)
        return f"{model.tree.n} joints, {model.tree.mass.sum():.2f} kg moving, MuJoCo and Pinocchio agree to {model.error:.1e}"
    if kind == "parameters":
        fitted = load_parameters(name)
        if fitted.robot not in names("robots"):
            return f"{len(fitted.joints)} joints; no robot '{fitted.robot}' is found to try them on"
        model = load_model(fitted.robot, fitted)
        return f"{fitted.robot}, {model.tree.mass.sum():.2f} kg moving, MuJoCo and Pinocchio agree to {model.error:.1e}"
    if kind == "calibration":
        return _check_recipe(name)
    if kind == "learning":
        return _check_learning(name)
    if kind == "controllers":
        controller = load_controller(name)
        return f"{controller.rule.rpartition(':')[2]}, {controller.planner.samples} samples, terms {', '.join(controller.task)}"
    from mbctrl.base.plan import PlanRequest
    from mbctrl.cli.build import build_controller, check_goal, load_run_model, load_truth

    config, file = load_run(name)
    model = load_run_model(config, file)
    check_goal(config, model, file)
    load_truth(config, file, model)
    still = tuple((np.asarray(obstacle.position, float), np.zeros(3)) for obstacle in config.obstacles)
    target = (np.zeros(3), None) if config.goal.kind == "backend" else None
    x = np.concatenate([model.robot.home, np.zeros(model.robot.nq)])
    plan = build_controller(config, file, model).plan(PlanRequest(0.0, x, target=target, obstacles=still))
    if "learn" in load_yaml(file):
        load_loop(file, config)
    return f"{config.robot.name}, plans {len(plan.u) - 1} steps of {plan.dt * 1e3:g} ms, cost {plan.info['best']:.3g}"


def _check_learning(name: str) -> str:
    from mbctrl.cli.build import load_arm

    recipe, file = load_learning_recipe(name)
    load_arm(recipe.robot, file)
    what = "all of it" if recipe.base == "identity" else f"what physics misses near {len(recipe.surfaces)} surfaces"
    sizes = " × ".join(map(str, recipe.network.hidden))
    return f"{recipe.robot.name}, learns {what} in steps of {recipe.dt * 1e3:g} ms, {recipe.network.members} networks of {sizes}"


def _check_recipe(name: str) -> str:
    from mbctrl.calibrate.logs import columns_wanted
    from mbctrl.dynamics.load import load_model

    recipe, file = load_recipe(name)
    robot = load_model(recipe.robot, file=file, key="robot").robot
    try:
        wanted = columns_wanted(recipe.log, robot)
    except SpecError as error:
        raise SpecError(error.message, file=file, key=f"log.{error.key}") from None
    friction = recipe.fit.friction if isinstance(recipe.fit.friction, str) else recipe.fit.friction.memory
    return f"{recipe.robot}, reads {len(wanted)} columns, friction {friction}"
