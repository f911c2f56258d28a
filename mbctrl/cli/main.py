"""``mbctrl``: one verb a job. Heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import logging
import os
import sys

import tyro
from rich.console import Console

from mbctrl.base.errors import MbctrlError, SpecError
from mbctrl.cli.verbs import (
    Bench,
    Calibrate,
    Deploy,
    Doctor,
    Excite,
    Export,
    List,
    Payload,
    Replay,
    Run,
    Show,
    Sim,
    Verb,
)
from mbctrl.cli.verbs_learn import Distil, Evaluate, Learn, Train

_console = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if arguments in (["--version"], ["-V"]):
            from mbctrl import __version__

            print(f"mbctrl {__version__}")
            return 0
        return _dispatch(arguments)
    except MbctrlError as error:
        _console.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True, highlight=False)
        return error.exit_code
    except KeyboardInterrupt:
        _console.print("interrupted")
        return 130
    except BrokenPipeError:  # whoever was reading has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["run"] and {"-h", "--help"} & set(arguments) and len(arguments) > 2 and not arguments[1].startswith("-"):
        from mbctrl.cli.run import show_options

        return show_options(arguments[1])
    about = "Model-based control of robot arms: run a sampling MPC, calibrate it, deploy it."
    verb, rest = tyro.cli(Verb, prog="mbctrl", description=about, args=arguments or ["--help"], return_unknown_args=True)
    if rest and not isinstance(verb, (Run, Export, Learn, Distil)):
        raise SpecError(f"unknown arguments: {' '.join(rest)}", file="command line")
    if isinstance(verb, Run):
        from mbctrl.cli.run import run

        return run(verb.scenario, rest, verb.lockstep, verb.viewer_port if verb.viewer else None, verb.out)
    if isinstance(verb, Calibrate):
        from mbctrl.cli.calibrate import calibrate

        return calibrate(verb.recipe, verb.logs, verb.validate, verb.out, ["mbctrl", *arguments])
    if isinstance(verb, Train):
        from mbctrl.cli.learn import train

        return train(verb.recipe, verb.logs, verb.out)
    if isinstance(verb, Learn):
        from mbctrl.cli.loops import learn

        return learn(verb.scenario, rest, verb.out)
    if isinstance(verb, Distil):
        from mbctrl.cli.distil import distil

        return distil(verb.scenario, rest, verb.trials, verb.fewer, verb.episodes, verb.out)
    if isinstance(verb, Evaluate):
        from mbctrl.cli.learn import evaluate

        return evaluate(verb.model, verb.logs, verb.out, verb.beside, verb.robot, verb.parameters, ["mbctrl", *arguments])
    if isinstance(verb, Payload):
        from mbctrl.cli.payload import payload

        return payload(verb.recipe, verb.bare, verb.loaded, verb.mass, verb.frame, verb.out)
    if isinstance(verb, Excite):
        from mbctrl.cli.excite import excite

        settings = {key: value for key, value in vars(verb).items() if key not in ("robot", "out")}
        return excite(verb.robot, settings, verb.out)
    if isinstance(verb, Export):
        from mbctrl.cli.export import export

        return export(verb.source, rest, verb.out)
    if isinstance(verb, Deploy):
        from mbctrl.cli.deploy import deploy

        settings = {key: value for key, value in vars(verb).items() if key not in ("bundle", "driver", "host", "option")}
        return deploy(verb.bundle, verb.driver, verb.host, verb.option, **settings)
    if isinstance(verb, Sim):
        from mbctrl.cli.sim import sim

        return sim(
            verb.robot, verb.protocol, verb.host, verb.fault, verb.log, verb.duration, verb.start_noise, verb.seed, verb.key_file
        )
    if isinstance(verb, Replay):
        from mbctrl.cli.replay import replay

        return replay(verb.log)
    if isinstance(verb, Bench):
        from mbctrl.cli.bench import bench

        return bench(verb.name, verb.quick, verb.json)
    if isinstance(verb, Doctor):
        from mbctrl.cli.doctor import doctor

        return doctor()
    from mbctrl.cli import inspect

    if isinstance(verb, List):
        return inspect.list_all()
    return inspect.show(verb.name) if isinstance(verb, Show) else inspect.check(verb.names)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    sys.exit(main())
