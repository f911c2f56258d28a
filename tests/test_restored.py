"""What a bundle's text restores is what was exported, to the bit: knots, traced programs; and the numbers both sides draw."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbctrl.base.config import load_run
from mbctrl.cli.build import load_run_model
from mbctrl.export.bundle import _traced
from mbctrl.kernels.trace import Traced
from mbctrl.planning.controller import MpcController
from mbctrl.planning.knots import INTERPOLATIONS, Knots
from mbctrl.planning.white import colouring, normals, uniforms

PROPERTY = settings(deadline=None, max_examples=80, derandomize=True)


@st.composite
def knots(draw: st.DrawFn) -> Knots:
    interpolation = draw(st.sampled_from(INTERPOLATIONS))
    count = draw(st.integers(1 + INTERPOLATIONS.index(interpolation), 9))
    return Knots(
        count, draw(st.integers(1, 40)), draw(st.floats(0.002, 0.2)), interpolation, draw(st.sampled_from([0.0, 0.5, 1.0]))
    )


def restored(one: Knots) -> Knots:
    return Knots.from_dict(json.loads(json.dumps(one.to_dict())))


@PROPERTY
@given(knots(), st.floats(0, 1.5), st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=6))
def test_restored_knots_are_the_knots(one: Knots, elapsed: float, shares: list[float]) -> None:
    again = restored(one)
    t, elapsed = np.array(shares) * one.duration, elapsed * one.duration
    assert np.array_equal(again.basis, one.basis) and np.array_equal(again.times, one.times)
    assert np.array_equal(again.weights(t), one.weights(t))
    assert np.array_equal(again.shift(elapsed), one.shift(elapsed))
    assert again.to_dict() == one.to_dict()
    assert vars(again).keys() == vars(one).keys()


def test_restoring_needs_no_scipy() -> None:
    text = json.dumps(Knots(5, 12, 0.04).to_dict())
    code = f"""
import json, sys
sys.modules["scipy"] = sys.modules["torch"] = None
from mbctrl.planning.knots import Knots
print(Knots.from_dict(json.loads({text!r})).basis.tobytes().hex())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert bytes.fromhex(done.stdout) == Knots(5, 12, 0.04).basis.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"interpolation": "linear"},  # of other pieces
        {"interpolation": "quintic"},
        {"count": 4},
        {"pieces": [[1.0]]},
    ],
)
def test_knots_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Knots.from_dict({**Knots(5, 12, 0.04).to_dict(), **change})


@pytest.fixture(scope="module")
def traced() -> dict:
    config, file = load_run("panda_avoid_sim")
    config = config.model_copy(update={"dynamics": config.dynamics.model_copy(update={"backend": "torch"})})
    return _traced(MpcController(config, load_run_model(config, file), file))


def programs(data: dict) -> list[dict]:
    return [data["step"], *(entry["traced"] for entry in data["goals"]), data["watch"]["traced"]]


def test_restored_programs_are_the_programs(traced: dict) -> None:
    again = json.loads(json.dumps(traced))
    for one, text in zip(programs(traced), programs(again)):
        first, second = Traced.from_dict(one), Traced.from_dict(text)
        assert first == second or (
            first.program.graph.nodes == second.program.graph.nodes and vars(first).keys() == vars(second).keys()
        )
        for key in ("states", "commands", "first", "following", "cost", "sizes", "networks"):
            assert getattr(first.program, key) == getattr(second.program, key), key
        assert (first.table, first.uniform, first.sample, first.terms) == (
            second.table,
            second.uniform,
            second.sample,
            second.terms,
        )
        assert second.to_dict() == json.loads(json.dumps(one)), "and out again as it came in"


def test_a_program_with_a_place_outside_is_refused(traced: dict) -> None:
    for kind in ("uniform", "table"):
        one = copy.deepcopy(json.loads(json.dumps(traced["goals"][0]["traced"])))
        name = next(iter(one[kind]))
        one[kind][name] = [0, one["program"]["sizes"][kind] + 1]
        with pytest.raises(ValueError, match=f"{kind}: expected places within"):
            Traced.from_dict(one)


# --- the numbers that are drawn ---------------------------------------------------------------------------------------


def test_white_noise_is_white() -> None:
    drawn = normals(7, 3, 21, 20_000)
    assert drawn.shape == (21, 20_000) and drawn.dtype == np.float32 and np.isfinite(drawn).all()
    assert np.abs(drawn.mean(1)).max() < 4.5 / np.sqrt(20_000) and np.abs(drawn.var(1) - 1).max() < 0.05
    covariance = np.corrcoef(drawn)
    assert np.abs(covariance - np.eye(21)).max() < 0.04
    assert 3.2 < np.abs(drawn).max() < 7
    even = uniforms(7, 3, 21, 20_000)
    assert 0 <= even.min() and even.max() < 1 and np.abs(even.mean(1) - 0.5).max() < 0.01


@PROPERTY
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(1, 23), st.integers(1, 40))
def test_a_number_does_not_depend_on_how_many_are_drawn(seed: int, draw: int, rows: int, samples: int) -> None:
    few, many = normals(seed, draw, rows, samples), normals(seed, draw, rows + 5, samples + 7)
    assert np.array_equal(few, many[:rows, :samples])
    assert np.isfinite(many).all()
    other = normals(seed, (draw + 1) % 2**32, rows, samples)
    assert not np.array_equal(few, other)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 12])
def test_colouring_keeps_every_knots_variance(count: int, beta: float) -> None:
    root = colouring(count, beta)
    assert np.allclose(np.linalg.norm(root, axis=1), 1, atol=1e-8)
    covariance = root @ root.T
    if beta == 0:
        assert np.allclose(covariance, np.eye(count), atol=1e-6), "white"
    else:
        near = [covariance[k, k + 1] for k in range(count - 1)]
        assert all(value > 0.05 for value in near), "neighbours go together"
        assert np.ptp(near) < 1e-9 if near else True, "everywhere alike"
