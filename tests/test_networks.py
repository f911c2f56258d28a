"""Networks in compiled rollouts: against torch, gates, what is no number, lanes and threads, and a program's data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_models import relative
from test_kernels import Guarded

from mbctrl.kernels.graph import Graph, Scalar
from mbctrl.kernels.llvm import SLOTS, Lowering, Sampling, words
from mbctrl.kernels.native import Native, lanes_of, shared_pool
from mbctrl.kernels.network import WIDEST, Network
from mbctrl.kernels.program import Program
from mbctrl.planning.engines import CpuEngine

SIZES = ((1, 1, 1), (2, 3), (3, 1, 2), (4, 8, 8), (6, 7, 9, 4), (10, 33, 17, 8, 3), (2, 3, 41), (21, 96, 96, 14))
ACTIVATIONS = {"tanh": torch.nn.Tanh, "silu": torch.nn.SiLU, "relu": torch.nn.ReLU}
N = 75  # two full blocks and part of one, or more of them
H = 6
FEW = (6, 7, 9, 4)


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBCTRL_CACHE", str(tmp_path_factory.mktemp("code")))
        yield


@cache
def torchs(sizes: tuple[int, ...], activation: str) -> tuple[torch.nn.Sequential, np.ndarray]:
    """Return a network of torch, float64, its numbers those of float32, and its run of weights."""
    rng, parts, arrays = np.random.default_rng(0), [], []
    for a, b in zip(sizes, sizes[1:]):
        arrays.append([x.astype(np.float32).astype(float) for x in (rng.normal(0, 1.5 / a**0.5, (b, a)), rng.normal(size=b))])
        layer = torch.nn.Linear(a, b).double()
        layer.weight.data, layer.bias.data = map(torch.tensor, arrays[-1])
        parts += [layer, ACTIVATIONS[activation]()]
    return torch.nn.Sequential(*parts[:-1]), Network(sizes, activation).flat(arrays)


@cache
def rollout(sizes: tuple[int, ...], activation: str) -> Program:
    """Return x' = uniform x + network(x, u), as much of them as it takes; gates are of each sample and step."""
    g, network = Graph(), Network(sizes, activation)
    n = network.outputs
    start, x = ([g.input(kind, i) for i in range(n)] for kind in ("start", "carry"))
    u = [g.input("command", j) for j in range(network.inputs - n)]
    y = g.network(0, network, [*x, *u][: network.inputs], g.input("sample", 0) * g.input("table", 0))
    following = [g.operand(g.input("uniform", 0) * a + b) for a, b in zip(x, y)]
    sizes_of = {"table": 1, "uniform": 1, "sample": 1}
    return Program(g, n, len(u), tuple(s.index for s in start), tuple(following), None, sizes_of, (network,))


def arrays_of(program: Program, steps: int = H, samples: int = N, keep: float = 0.0) -> dict[str, np.ndarray]:
    """Return a job's arrays, numbers of float32, gates 1; ``keep`` is the share of the state that stays."""
    rng = np.random.default_rng(1)
    out = {"start": rng.normal(size=(program.states, samples)), "commands": rng.normal(size=(steps, program.commands, samples))}
    out |= {"sample": np.ones((1, samples)), "table": np.ones((steps, 1)), "uniform": np.full(1, keep)}
    out["weights"] = torchs(program.networks[0].sizes, program.networks[0].activation)[1]
    return {name: array.astype(np.float32).astype(float) for name, array in out.items()}


def run(native: Native, arrays: dict[str, np.ndarray], threads: int = 1) -> np.ndarray:
    """Return the states (H + 1, nx, N), every buffer guarded."""
    samples, steps = arrays["start"].shape[1], len(arrays["table"])
    buffers = {name: Guarded(array.shape, native.dtype, array) for name, array in arrays.items()}
    given = {name: buffer.array.copy() for name, buffer in buffers.items()}
    buffers["states"] = Guarded((steps + 1, native.program.states, samples), native.dtype, -7.0)
    addresses = {name: buffer.array.ctypes.data for name, buffer in buffers.items()}
    shared_pool(threads).run(native, words(samples=samples, steps=steps, blocks=native.blocks(samples), **addresses))
    assert all(buffer.intact() for buffer in buffers.values()), "written outside a buffer"
    assert all(np.array_equal(buffers[name].array, array, equal_nan=True) for name, array in given.items())
    return buffers["states"].array


def in_torch(program: Program, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return the states by torch in float64."""
    network = program.networks[0]
    model, states = torchs(network.sizes, network.activation)[0], [arrays["start"]]
    for u, factor in zip(arrays["commands"], arrays["table"]):
        inputs = torch.tensor(np.concatenate([states[-1], u])[: network.inputs].T)
        gate = arrays["sample"][0] * factor[0]
        states.append(arrays["uniform"][0] * states[-1] + np.where(gate > 0, gate * model(inputs).detach().numpy().T, 0.0))
    return np.array(states)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_it_is_torchs_network(sizes: tuple[int, ...], activation: str) -> None:
    program = rollout(sizes, activation)
    arrays = arrays_of(program, steps=1)
    expected = in_torch(program, arrays)[1].T
    for dtype, bound in ((np.float64, 1e-13), (np.float32, 1e-5)):
        error = relative(run(Native(program, dtype), arrays)[1].T, expected)
        print(np.dtype(dtype), "network", error)
        assert error <= bound, (dtype, error)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [FEW, (2, 3, 41), (21, 96, 96, 14)])
def test_outputs_feed_the_state_and_gates_are_of_lanes_and_steps(sizes: tuple[int, ...], activation: str) -> None:
    program = rollout(sizes, activation)
    arrays, rng = arrays_of(program, keep=0.5), np.random.default_rng(2)
    arrays["sample"] = rng.integers(-1, 3, (1, N)) / 4.0
    arrays["table"][:, 0] = [1.0, 0.0, 0.5, -1.0, 1.0, 0.25]  # 0: all skipped; below: the others' turn
    expected = in_torch(program, arrays)
    for dtype, bound in ((np.float64, 1e-12), (np.float32, 1e-5)):
        found = run(Native(program, dtype), arrays)
        error = relative(found.transpose(2, 0, 1), expected.transpose(2, 0, 1))
        print(np.dtype(dtype), "rollout", error)
        assert error <= bound, (dtype, error)
    assert np.array_equal(found[2], (0.5 * found[1]).astype(np.float32)) and not np.array_equal(found[1], 0.5 * found[0])


@pytest.mark.parametrize(("dtype", "tanh", "silu"), [(np.float32, 2e-7, 3e-7), (np.float64, 5e-16, 1e-15)])
def test_activations_are_as_good_as_stated(dtype: type, tanh: float, silu: float) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.uniform(-120, 120, 100_000), rng.normal(size=100_000), 10.0 ** rng.uniform(-30, 37, 2000) * [[-1], [1]]], None
    )
    x = x.astype(dtype).astype(float)
    exact = {"tanh": np.tanh(x), "silu": x * np.exp(-np.logaddexp(0, -x)), "relu": np.maximum(x, 0)}
    for name, expected in exact.items():
        scale = np.maximum(np.abs(x), 1) if name == "silu" else 1.0
        error = np.abs(activated(name, dtype, x) - expected) / scale
        print(np.dtype(dtype), name, error.max())
        assert error.max() <= {"tanh": tanh, "silu": silu, "relu": 0.0}[name], (name, error.max(), x[error.argmax()])
    ends = np.array([np.inf, -np.inf, np.nan, 0.0] * 16)
    assert np.array_equal(activated("tanh", dtype, ends)[:4], [1, -1, np.nan, 0], equal_nan=True)
    assert np.array_equal(activated("relu", dtype, ends)[:4], [np.inf, 0, np.nan, 0], equal_nan=True)
    assert np.array_equal(activated("silu", dtype, ends)[:4], [np.inf, np.nan, np.nan, 0], equal_nan=True)


def activated(name: str, dtype: type, x: np.ndarray) -> np.ndarray:
    """Return an activation of ``x`` (N,) by a network that does nothing else."""
    g, network = Graph(), Network((1, 1, 1), name)
    following = g.network(0, network, [g.input("carry", 0)])[0].index
    program = Program(g, 1, 0, (g.input("start", 0).index,), (following,), None, {}, (network,))
    arrays = {"start": x[None], "table": np.zeros((1, 1)), "weights": np.array([1.0, 0.0, 1.0, 0.0])}
    return run(Native(program, dtype), arrays)[1, 0].astype(float)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gate_of_zero_is_zero_whatever_the_rest_is(dtype: type) -> None:
    native, arrays = Native(rollout(FEW, "silu"), dtype), arrays_of(rollout(FEW, "silu"), 1)
    arrays["sample"][0, ::3], arrays["sample"][0, 1::3] = 0.0, -2.0
    clean = run(native, arrays)[1]
    assert (clean[:, ::3] == 0).all() and (clean[:, 1::3] == 0).all() and (clean[:, 2::3] != 0).all()
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = arrays | {"commands": arrays["commands"].copy()}  # in a lane without the network, and in one with it
        spoilt["commands"][0, 1, [3, 5]] = bad
        found = run(native, spoilt)[1]
        assert np.array_equal(np.delete(found, 5, 1), np.delete(clean, 5, 1)) and not np.isfinite(found[:, 5]).all()
    everything = run(native, arrays | {"weights": np.full_like(arrays["weights"], np.nan)})[1]
    assert np.array_equal(everything, np.where(arrays["sample"] > 0, np.nan, 0.0).repeat(4, 0), equal_nan=True)


@pytest.mark.parametrize("others", [0.0, 1.0])
def test_a_gate_that_is_no_number_is_seen_and_stays_in_its_lane(others: float) -> None:
    native, arrays = Native(rollout(FEW, "tanh")), arrays_of(rollout(FEW, "tanh"), 1)
    arrays["sample"][:] = others
    clean = run(native, arrays)[1]
    arrays["sample"][0, 40] = np.nan
    found = run(native, arrays)[1]
    assert np.isnan(found[:, 40]).all() and np.array_equal(np.delete(found, 40, 1), np.delete(clean, 40, 1))
    assert np.isfinite(clean).all() and (clean == 0).all() == (others == 0)


def without_weights(gate: float) -> None:
    """Roll out with nothing where weights should be, one of the samples' gates ``gate``, the others 0 or below."""
    arrays = arrays_of(rollout(FEW, "silu"), 2)
    arrays["sample"][:] = np.where(np.arange(N) % 2, 0.0, -1.0)
    arrays["sample"][0, 33] = gate
    arrays["commands"][0, 0, 7] = np.nan
    del arrays["weights"]
    assert (run(Native(rollout(FEW, "silu")), arrays)[1:] == 0).all()


@pytest.mark.parametrize("gate", [0.0, -1.0, 1.0])
def test_weights_are_not_read_where_no_gate_is_above_zero(gate: float) -> None:
    code = f"import resource, test_networks as t; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); t.without_weights({gate})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    # Above zero they are read, at address 0: this end shows that the other two could have failed.
    assert done.returncode < 0 if gate > 0 else done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_samples_depend_on_neither_threads_nor_lanes(dtype: type) -> None:
    program = rollout((21, 96, 96, 14), "silu")
    native, arrays = Native(program, dtype), arrays_of(program, keep=0.5)
    arrays["sample"] = np.random.default_rng(3).integers(0, 2, (1, N)) * 1.5
    alone = run(native, arrays)
    assert all(np.array_equal(run(native, arrays, threads), alone) for threads in (2, 2, 2, 3))
    order = np.random.default_rng(4).permutation(N)
    moved = arrays | {name: arrays[name][..., order] for name in ("start", "commands", "sample")}
    assert np.array_equal(run(native, moved), alone[..., order])


def test_commands_may_be_knots_and_the_engine_passes_weights() -> None:
    program = rollout(FEW, "tanh")
    arrays = arrays_of(program, keep=0.5)
    arrays["start"] = arrays["start"][:, :1].repeat(N, 1)
    expected = run(Native(program, np.float64), arrays)
    engine = CpuEngine(shared_pool(2), np.float64)
    knotted = arrays | {"start": arrays["start"][:, 0], "knots": arrays["commands"], "basis": np.eye(H)}
    knotted |= {"lower": np.full(2, -99.0), "upper": np.full(2, 99.0), "states": np.full((H + 1, 4, N), np.nan)}
    knotted = {name: engine.array(array) for name, array in knotted.items() if name != "commands"}
    engine.run(engine.compile(program, Sampling(H, draws=False)), knotted, N, H, 0, 0, 0)
    assert relative(knotted["states"], expected) <= 1e-14


def test_equal_calls_are_one_and_known_gates_none() -> None:
    g, network = Graph(), Network((2, 3, 2), "tanh")
    x = g.input("carry", 0)
    assert [a.index for a in g.network(0, network, [x, 1])] == [b.index for b in g.network(0, network, [x, 1.0], 1)]
    count = len(g.nodes)
    for gate in (0, -1.5):
        found = g.network(0, network, [x, x], gate)
        assert found.shape == (2,) and not any(isinstance(y, Scalar) for y in found) and not found.any()
    assert len(g.nodes) == count
    with pytest.raises(ValueError, match="expected 2 inputs, found 3"):
        g.network(0, network, [x, x, x])


def test_a_program_is_its_own_json() -> None:
    program, arrays = rollout(FEW, "relu"), arrays_of(rollout(FEW, "relu"))
    data = json.loads(json.dumps(program.to_dict()))
    again = Program.from_dict(data)
    assert again.to_dict() == data == program.to_dict() and again.digest == program.digest
    assert again.networks == program.networks and again.operations == program.operations
    assert np.array_equal(run(Native(again), arrays), run(Native(program), arrays))
    assert Program.from_dict(json.loads(json.dumps(data).replace('"relu"', '"silu"'))).digest != program.digest


def test_code_is_free_without_networks_and_does_not_grow_with_layers() -> None:
    g, lanes = Graph(), lanes_of(np.float32)
    program = Program(g, 1, 0, (g.input("start", 0).index,), (g.input("carry", 0).sin().index,))
    text = Lowering(program, lanes, None).text()
    assert "networks" not in program.to_dict() and "%layers" not in text
    assert f"i64 {SLOTS.index('weights')}\n" not in text and f"i64 {SLOTS.index('draw')}\n" in text
    small, large = (Lowering(rollout((21, n, n, 14), "silu"), lanes, None).text().count("\n") for n in (16, 256))
    assert small == large < 1500


PLAIN = """{"nodes": [["input", "start", 0], ["input", "carry", 0], ["const", 0.5], ["network", 0, 2, 1, 2], ["output", 3, 1],
["less", 1, 2]], "states": 1, "commands": 0, "first": [0], "following": [4], "cost": null, "sizes": {},
"networks": [{"sizes": [2, 3, 2], "activation": "silu"}]}"""
NODES: dict[str, list[tuple[Any, ...]]] = {
    "no network|not a call": [("network", k, 2, 1, 2) for k in (1, -1, 0.0, True, "0", None)]
    + [("network", 0, *rest) for rest in ((), (2,), (2, 1), (2, 1, 2, 1), (2, 1, 6), (2, 1, 9), (2, 1, -1), (2, 1, 1.0))]
    + [("network",)],
    "gates and inputs are numbers": [("network", 0, 5, 1, 2), ("network", 0, 2, 5, 2)],
    "not an output|no call": [("output", 3, o) for o in (2, -1, 0.0, None, True, "0")]
    + [("output", *rest) for rest in ((2, 0), (4, 0), (6, 0), (-3, 0), (3,), (3, 1, 1))],
    "no value of its own": [("sin", 3), ("add", 1, 3), ("network", 0, 3, 1, 2), ("network", 0, 2, 3, 2)],
}
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("no value of its own", {"following": [3]}),
    ("no value of its own", {"first": [3]}),
    ("what only a step has", {"first": [4]}),
    *(("no network|network|object", {"networks": networks}) for networks in ([], 3, None, ["silu"], [[2, 3, 2]], [{}])),
    *(("no network|no call", {"sizes": sizes}) for sizes in ([3, 3, 2], [2, 3, 1])),
    *(("sizes", {"sizes": sizes}) for sizes in ([], [2], [2, 0, 2], [2, -3, 2], [2, 3.0, 2], [2, True, 2], "232", 2)),
    ("sizes", {"sizes": [2, WIDEST + 1, 2]}),
    *(("activation", {"activation": name}) for name in ("gelu", "exp", None, 1, ["silu"])),
    ("expected a network's", {"more": 1}),
]


@pytest.mark.parametrize(("says", "change"), [*((says, key) for says, keys in NODES.items() for key in keys), *CHANGES])
def test_malformed_networks_are_refused(says: str, change: Any) -> None:
    data = json.loads(PLAIN)
    assert Program.from_dict(data).operations == {"network": 1}
    if isinstance(change, tuple):
        data["nodes"].append([*change])
    else:
        (data if change.keys() & {"first", "following", "networks"} else data["networks"][0]).update(change)
    with pytest.raises(ValueError, match=says):
        Program.from_dict(data)


def test_weights_of_other_shapes_are_refused() -> None:
    network = Network((2, 3, 1), "relu")
    good = [(np.ones((3, 2)), np.ones(3)), (np.full((1, 3), 2.0), [3.0])]
    assert network.flat(good).tolist() == [1.0] * 9 + [2.0] * 3 + [3.0] and network.weights == 13
    for bad in ([], good[:1], good[::-1], [(np.ones((2, 3)), np.ones(3)), good[1]], [good[0], (good[1][0], 3.0)]):
        with pytest.raises(ValueError, match="expected weights and biases of shapes"):
            network.flat(bad)
