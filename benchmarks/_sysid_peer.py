"""Fits by mujoco.sysid, in an interpreter of its own; reads a problem (.npz) and prints one JSON line. Knows nothing of mbctrl."""

from __future__ import annotations

import json
import sys
import time

import numpy as np


def main(path: str) -> None:
    """Fit the problem of ``path`` and print values, half widths of 95 % intervals and seconds; or why there is none."""
    try:
        import mujoco
        from mujoco import sysid

        sysid.Parameter  # noqa: B018  an install without its extra has an empty module
    except (ImportError, AttributeError) as error:
        print(json.dumps({"missing": f"{type(error).__name__}: {error}"}))
        return
    problem = np.load(path)
    names = [str(name) for name in problem["names"]]

    def setter(joint: str, kind: str):
        def change(spec, parameter) -> None:
            value = parameter.value[0]
            setattr(spec.joint(joint), kind, value if kind == "armature" else np.array([value, 0.0, 0.0])[: _width(spec, joint)])

        return change

    def _width(spec, joint: str) -> int | tuple:
        return np.size(spec.joint(joint).damping)

    parameters = sysid.ParameterDict()
    for name, start, low, high in zip(names, problem["start"], problem["low"], problem["high"]):
        parameters.add(sysid.Parameter(name, float(start), float(low), float(high), modifier=setter(*name.split("."))))
    spec = mujoco.MjSpec.from_string(str(problem["xml"]))
    model = spec.compile()
    data = mujoco.MjData(model)
    n, period = model.nv, model.opt.timestep
    states, controls, sensors, labels = [], [], [], []
    for k, (first, state) in enumerate(zip(problem["first"], problem["states"])):
        last = first + int(problem["samples"])
        t = np.arange(last - first) * period
        states.append(sysid.create_initial_state(model, state[:n], state[n:], data.act))
        controls.append(sysid.TimeSeries(t, problem["u"][first:last]))
        # Its rollouts stamp what sensors saw before a step with the time after it.
        seen = np.concatenate([problem["q"], problem["v"]], 1)[first : last - 1]
        sensors.append(sysid.TimeSeries.from_names(t[1:], seen, model))
        labels.append(f"window{k}")
    sequences = [sysid.ModelSequences("arm", spec, labels, states, controls, sensors)]
    residual = sysid.build_residual_fn(models_sequences=sequences)
    began = time.perf_counter()
    found, result = sysid.optimize(initial_params=parameters, residual_fn=residual, optimizer="mujoco", verbose=False)
    seconds = time.perf_counter() - began
    left = residual(result.x, found)[0]
    _, half = sysid.calculate_intervals([np.ravel(part) for part in left], result.jac)
    line = {"version": mujoco.__version__, "seconds": seconds, "values": result.x.tolist(), "half": np.ravel(half).tolist()}
    print(json.dumps(line))


if __name__ == "__main__":
    main(sys.argv[1])
