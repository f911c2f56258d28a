"""The safety ladder: the fault table row by row, and no way up but the allowed ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbctrl.base.robot import load_robot
from mbctrl.runtime.driver import RobotState, Status
from mbctrl.runtime.ladder import RULES, Conditions, Ladder, LadderSettings, Mode, reaction

ROBOT = load_robot("panda")
WELL = Conditions()
REST = RobotState(0.0, 1, np.array(ROBOT.home), np.zeros(7), np.zeros(7), np.zeros(7))

# what is found: mode, number in the fault table, a word of the reason
TABLE: list[tuple[dict[str, object], Mode, int, str]] = [
    ({}, Mode.RUN, 0, ""),
    ({"bad_plans": 2}, Mode.RUN, 0, ""),
    ({"bad_plans": 3}, Mode.STOP, 1, "not finite"),
    ({"bad_planning": 2}, Mode.RUN, 0, ""),
    ({"bad_planning": 3}, Mode.HOLD, 3, "diverged"),
    ({"sensor": "q is not finite", "sensor_fault": 2}, Mode.STOP, 2, "q is not finite"),
    ({"sensor": "q is not finite", "sensor_fault": 2, "sensor_lasting": 0.19}, Mode.STOP, 2, "q is not finite"),
    ({"sensor": "q is not finite", "sensor_fault": 2, "sensor_lasting": 0.2}, Mode.SAFE, 2, "0.20 s"),
    ({"sensor": "12 ms old", "sensor_fault": 4}, Mode.STOP, 4, "old"),
    ({"sensor": "no measurement", "sensor_fault": 5, "sensor_lasting": 1.0}, Mode.SAFE, 5, "no measurement"),
    ({"sensor": "the clock went on", "sensor_fault": 18}, Mode.STOP, 18, "clock"),
    ({"sensor": "x", "sensor_fault": 4, "sensor_lasting": np.nan}, Mode.SAFE, 4, "x"),
    ({"plan": False}, Mode.HOLD, 6, "plan"),
    ({"planner": False}, Mode.HOLD, 7, "planner"),
    ({"planner": False, "plan": False}, Mode.HOLD, 7, "planner"),
    ({"robot": False}, Mode.SAFE, 9, "driver"),
    ({"clamped": 0.5}, Mode.RUN, 0, ""),
    ({"clamped": 0.51}, Mode.STOP, 13, "limited"),
    ({"clamped": np.nan}, Mode.STOP, 13, "limited"),
    ({"clearance": 0.01}, Mode.RUN, 0, ""),
    ({"clearance": 0.0}, Mode.STOP, 15, "collision"),
    ({"clearance": np.nan}, Mode.STOP, 15, "collision"),
    ({"contact": "joint4"}, Mode.STOP, 16, "joint4"),
    ({"status": Status.EMERGENCY_STOP}, Mode.SAFE, 17, "emergency"),
    ({"status": Status.PROTECTIVE_STOP}, Mode.SAFE, 17, "protective"),
    ({"status": Status.FAULT}, Mode.SAFE, 17, "fault"),
    ({"braking": 0.4}, Mode.RUN, 0, ""),
    ({"braking": 0.6}, Mode.SAFE, 13, "still moving"),
    ({"planner": False, "bad_plans": 3, "contact": "joint1"}, Mode.STOP, 16, "joint1"),  # the worst, then the first
    ({"status": Status.FAULT, "sensor": "x", "sensor_fault": 2, "planner": False}, Mode.SAFE, 17, "fault"),
]


@pytest.mark.parametrize(("found", "mode", "fault", "word"), TABLE)
def test_the_fault_table(found: dict[str, object], mode: Mode, fault: int, word: str) -> None:
    answer = reaction(replace(WELL, **found))
    assert (answer.mode, answer.fault) == (mode, fault) and word in answer.reason
    assert answer.compliant == ("contact" in found)


def test_every_rule_is_in_the_table() -> None:
    for rule in RULES:
        alone = [found for found, *_ in TABLE if rule.holds(replace(WELL, **found), LadderSettings())]
        assert alone, rule


def armed(mode: Mode = Mode.RUN) -> Ladder:
    """A ladder in ``mode``."""
    ladder = Ladder(ROBOT)
    assert ladder.rearm(0.0, REST) == []
    ladder.update(0.0, WELL)
    ladder.escalate(0.1, mode, "planted")
    assert ladder.mode is mode
    return ladder


def test_a_robot_begins_unarmed() -> None:
    ladder = Ladder(ROBOT)
    assert ladder.mode is Mode.SAFE and ladder.reason == "not armed" and ladder.update(0.0, WELL) is Mode.SAFE


def test_arming_leads_to_hold_and_a_plan_to_run() -> None:
    ladder = Ladder(ROBOT)
    assert ladder.rearm(1.0, REST) == [] and ladder.mode is Mode.HOLD
    assert ladder.update(1.1, replace(WELL, plan=False)) is Mode.HOLD
    assert ladder.update(1.2, WELL) is Mode.RUN
    assert [(c.t, c.before, c.after) for c in ladder.changes] == [(1.0, Mode.SAFE, Mode.HOLD), (1.2, Mode.HOLD, Mode.RUN)]


def test_hold_comes_and_goes_with_the_plan() -> None:
    ladder = armed()
    for _ in range(3):
        assert ladder.update(1.0, replace(WELL, plan=False)) is Mode.HOLD
        assert ladder.update(2.0, WELL) is Mode.RUN


@pytest.mark.parametrize("mode", [Mode.STOP, Mode.SAFE])
def test_stop_and_safe_are_latched(mode: Mode) -> None:
    ladder = armed(mode)
    for t in range(100):
        assert ladder.update(float(t), WELL) is mode
    assert ladder.reason == "planted"


def test_a_stop_becomes_safe_when_the_sensor_stays_away() -> None:
    ladder = armed()
    stale = replace(WELL, sensor="old", sensor_fault=4)
    assert ladder.update(1.0, stale) is Mode.STOP
    assert ladder.update(1.1, replace(stale, sensor_lasting=0.1)) is Mode.STOP
    assert ladder.update(1.2, replace(stale, sensor_lasting=0.2)) is Mode.SAFE
    assert [change.fault for change in ladder.changes[-2:]] == [4, 4]


def test_a_milder_mode_never_replaces_a_worse() -> None:
    ladder = armed(Mode.STOP)
    assert ladder.escalate(1.0, Mode.HOLD, "milder") is Mode.STOP and ladder.changes[-1].reason == "planted"


def test_a_contact_makes_the_stop_compliant_until_re_armed() -> None:
    ladder = armed()
    ladder.update(1.0, replace(WELL, contact="joint2"))
    assert ladder.mode is Mode.STOP and ladder.compliant
    assert ladder.update(2.0, replace(WELL, bad_plans=3)) is Mode.STOP and ladder.compliant
    assert ladder.rearm(3.0, REST) == [] and not ladder.compliant


@pytest.mark.parametrize("mode", [Mode.STOP, Mode.SAFE])
@pytest.mark.parametrize(
    ("state", "words"),
    [
        (replace(REST, v=np.array([0, 0, 0.1, 0, 0, 0, 0])), ("joint3", "0.1", "0.02")),
        (replace(REST, v=np.array([0, 0, 0, np.nan, 0, 0, 0])), ("joint4", "nan")),
        (replace(REST, status=Status.PROTECTIVE_STOP), ("status", "protective stop", "ok")),
        (None, ("no good measurement",)),
    ],
)
def test_re_arming_is_refused_with_the_reason(mode: Mode, state: RobotState | None, words: tuple[str, ...]) -> None:
    ladder = armed(mode)
    refused = ladder.rearm(5.0, state)
    assert ladder.mode is mode and len(refused) == 1 and all(word in refused[0] for word in words)


def test_what_the_pre_arm_checks_found_refuses_too() -> None:
    ladder = armed(Mode.STOP)
    assert ladder.rearm(5.0, REST, ["joint1: too near"]) == ["joint1: too near"] and ladder.mode is Mode.STOP


def test_re_arming_what_runs_changes_nothing() -> None:
    ladder = armed()
    assert ladder.rearm(5.0, None) == [] and ladder.mode is Mode.RUN


CONDITIONS = st.builds(
    Conditions,
    plan=st.booleans(),
    planner=st.booleans(),
    bad_plans=st.integers(0, 4),
    sensor=st.sampled_from(["", "", "stale"]),
    sensor_lasting=st.floats(0, 0.4),
    status=st.sampled_from([Status.OK, Status.OK, Status.OK, Status.EMERGENCY_STOP]),
    clamped=st.floats(0, 0.7),
    contact=st.sampled_from(["", "", "joint1"]),
)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(CONDITIONS, max_size=30))
def test_without_a_person_the_way_goes_down_but_for_hold_to_run(history: list[Conditions]) -> None:
    ladder = armed()
    for t, conditions in enumerate(history):
        before = ladder.mode
        after = ladder.update(float(t), conditions)
        assert after >= before or (before, after) == (Mode.HOLD, Mode.RUN)
        assert after >= reaction(conditions).mode
    for change, following in zip(ladder.changes, ladder.changes[1:]):
        assert change.after is following.before and change.t <= following.t and following.reason
