"""Planner and viewer in processes of their own: they answer, and what they raise reaches the control side."""

from __future__ import annotations

import time
import urllib.request

import numpy as np
import pytest

from mbctrl.base.config import RunConfig, load_run
from mbctrl.base.errors import DriverError, SpecError
from mbctrl.base.plan import PlanRequest
from mbctrl.cli.live import ViewerPort
from mbctrl.cli.process import ProcessPort
from mbctrl.cli.session import Live
from mbctrl.runtime.progress import Progress


def small(**changes):
    config, file = load_run("arm2_swingup_sim")
    planner = {**config.planner.model_dump(), "samples": 16}
    return RunConfig.model_validate({**config.model_dump(), "planner": planner, **changes}), file


@pytest.fixture
def port():
    port = ProcessPort(*small())
    yield port
    port.close()


def test_a_planner_process_answers_and_its_death_is_noticed(port):
    port.wait_ready()
    assert not port.busy and port.poll(0.0) is None
    port.submit(PlanRequest(0.0, np.zeros(4)))
    assert port.busy
    deadline = time.monotonic() + 30
    while (plan := port.poll(0.0)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert np.isfinite(plan.u).all() and not port.busy
    port._process.kill()
    port._process.join(10)
    with pytest.raises(DriverError, match="died"):
        port.submit(PlanRequest(0.1, np.zeros(4)))
        while True:
            port.poll(0.1)


def test_what_a_planner_process_refuses_is_raised_here():
    port = ProcessPort(*small(rule="mpppi"))
    try:
        with pytest.raises(SpecError, match="mpppi"):
            port.wait_ready()
    finally:
        port.close()


def test_a_viewer_process_serves_on_loopback():
    config, file = small()
    viewer = ViewerPort(config, file, 8237)
    try:
        assert "127.0.0.1" in viewer.url or "localhost" in viewer.url
        live = Live(0.0, np.zeros(2), Progress(config.goal), None, 0.0, None, 0.0)
        assert viewer.exchange(live) is None
        with urllib.request.urlopen("http://127.0.0.1:8237", timeout=20) as page:
            assert page.status == 200
    finally:
        viewer.close()
