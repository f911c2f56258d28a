"""Poses, scenes, the plan follower and log files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.spatial.transform import Rotation

from mbctrl.base.errors import ExtraError
from mbctrl.base.extras import need
from mbctrl.base.logs import LogError, LogWriter, read_log
from mbctrl.base.plan import Plan, PlanFollower
from mbctrl.base.poses import angle_between, quaternion_from_rotation, rotation_from_quaternion, rotation_from_rpy
from mbctrl.base.scene import FigureEightGoal, Obstacle, PoseGoal, Target

RNG = np.random.default_rng(0)
AXES = [np.array(axis) / np.linalg.norm(axis) for axis in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -2, 3), (-1, 1e-9, 0))]


# --- poses ------------------------------------------------------------------------------------------------------------


CORNERS = ((0, np.pi / 2, 0), (0.3, -np.pi / 2, 1.2), (np.pi, 0, 0), (0, 0, 0))


@pytest.mark.parametrize("rpy", [*RNG.uniform(-np.pi, np.pi, (20, 3)), *CORNERS])
def test_rpy_is_the_urdf_convention(rpy: np.ndarray) -> None:
    error = np.abs(rotation_from_rpy(np.array(rpy)) - Rotation.from_euler("xyz", rpy).as_matrix()).max()
    assert error <= 1e-15, error


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 1.0, 3.0, np.pi - 1e-4, np.pi - 1e-9, np.pi])
def test_quaternions_round_trip(axis: np.ndarray, angle: float) -> None:
    rotation = Rotation.from_rotvec(angle * axis).as_matrix()
    quaternion = quaternion_from_rotation(rotation)
    error = np.abs(rotation_from_quaternion(quaternion) - rotation).max()
    assert error <= 4e-15, error
    assert quaternion[0] >= 0 and abs(np.linalg.norm(quaternion) - 1) <= 1e-15 * 4, quaternion


def test_quaternions_agree_with_scipy() -> None:
    rotations = Rotation.random(50, random_state=1)
    found = np.array([quaternion_from_rotation(matrix) for matrix in rotations.as_matrix()])
    expected = rotations.as_quat(canonical=True)[:, [3, 0, 1, 2]]
    error = np.abs(found - expected).max()
    assert error <= 4e-15, error


@pytest.mark.parametrize("axis", AXES, ids=str)
@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 1e-4, 0.5, 2.0, np.pi - 1e-4, np.pi - 1e-8, np.pi - 1e-12, np.pi])
def test_angle_between_is_accurate_everywhere(axis: np.ndarray, angle: float) -> None:
    base = Rotation.from_euler("xyz", (0.3, -1.0, 2.0)).as_matrix()
    error = abs(angle_between(base, base @ Rotation.from_rotvec(angle * axis).as_matrix()) - angle)
    assert error <= 1e-15 * 4, error


# --- scene ------------------------------------------------------------------------------------------------------------


def eight(**change: object) -> FigureEightGoal:
    shape = {"kind": "figure_eight", "center": (0.4, 0.1, 0.5), "width": 0.4, "height": 0.15, "speed": 0.2}
    return FigureEightGoal(**{**shape, **change})


def test_a_figure_eight_has_constant_speed() -> None:
    goal = eight()
    t = np.linspace(0, 1.5 * goal.lap, 30001)
    speed = np.linalg.norm(np.diff(goal.sample(0, t)[0], axis=0), axis=1) / np.diff(t)
    error = np.abs(speed / goal.speed - 1).max()
    assert error <= 1e-3, error


def test_a_lap_takes_the_length_of_the_curve() -> None:
    goal = eight()
    slope = lambda s: np.hypot(goal.width / 2 * np.cos(s), goal.height * np.cos(2 * s))  # noqa: E731
    length = quad(slope, 0, 2 * np.pi, epsabs=1e-12, limit=200)[0]
    error = abs(goal.lap * goal.speed / length - 1)
    assert error <= 1e-6, error


def test_a_figure_eight_repeats_and_passes_its_centre() -> None:
    goal = eight()
    t = np.array([0.0, 0.3, 1.7])
    assert np.allclose(goal.sample(0, t)[0], goal.sample(0, t + goal.lap)[0], atol=1e-12)
    assert np.allclose(goal.sample(0, np.array([-1.0, 0.0, goal.lap / 2]))[0], goal.center, atol=1e-12)


def test_a_figure_eight_spans_its_width_and_height_along_its_axes() -> None:
    position = eight(axes=((1, 0, 0), (0, 1, 0))).sample(0, np.linspace(0, eight().lap, 20001))[0]
    extent = np.ptp(position, axis=0)
    assert np.abs(extent - (0.4, 0.15, 0)).max() <= 1e-6, extent


@pytest.mark.parametrize("axes", [((1, 0, 0), (1, 0, 0)), ((2, 0, 0), (0, 1, 0)), ((1, 0, 0), (0.1, 1, 0))])
def test_skewed_axes_are_refused(axes: object) -> None:
    with pytest.raises(ValueError, match="orthonormal"):
        eight(axes=axes)


def test_a_goal_with_orientation_gives_it_at_every_time() -> None:
    for goal in (eight(rpy=(0.1, 0.2, 0.3)), PoseGoal(targets=(Target(position=(1, 2, 3), rpy=(0.1, 0.2, 0.3)),))):
        rotation = goal.sample(0, np.zeros(4))[1]
        assert rotation.shape == (4, 3, 3) and np.array_equal(rotation[3], rotation_from_rpy(np.array([0.1, 0.2, 0.3])))


def test_targets_come_in_order_and_the_last_stays() -> None:
    goal = PoseGoal(targets=(Target(position=(1, 0, 0)), Target(position=(2, 0, 0))))
    assert [goal.sample(i, np.zeros(1))[0][0, 0] for i in range(4)] == [1, 2, 2, 2]
    assert goal.sample(0, np.zeros(1))[1] is None


@pytest.mark.parametrize("t", [0.5, 1.3, 2.0, 3.9, 7.77])
def test_an_obstacles_velocity_is_the_derivative_of_its_position(t: float) -> None:
    obstacle = Obstacle(name="a", shape="sphere", size=(0.1,), position=(0.1, 0.2, 0.3), to=(0.5, -0.2, 0.3), period=3.0, delay=0.4)
    slope = (obstacle.at(t + 1e-6)[0] - obstacle.at(t - 1e-6)[0]) / 2e-6
    error = np.abs(slope - obstacle.at(t)[1]).max()
    assert error <= 1e-8, error


def test_an_obstacle_waits_swings_and_returns() -> None:
    obstacle = Obstacle(name="a", shape="sphere", size=(0.1,), position=(0.1, 0.2, 0.3), to=(0.5, -0.2, 0.3), period=3.0, delay=0.4)
    for t, where in ((-1.0, obstacle.position), (0.4, obstacle.position), (1.9, obstacle.to), (3.4, obstacle.position)):
        position, velocity = obstacle.at(t)
        assert np.allclose(position, where, atol=1e-12) and np.allclose(velocity, 0, atol=1e-12), (t, position, velocity)


def test_an_obstacle_without_to_stands_still() -> None:
    position, velocity = Obstacle(name="a", shape="plane", position=(0, 0, 0.1)).at(5.0)
    assert np.array_equal(position, (0, 0, 0.1)) and np.array_equal(velocity, np.zeros(3))


@pytest.mark.parametrize(
    ("shape", "size", "normal"),
    [
        ("sphere", (), (0, 0, 1)),
        ("sphere", (1.0, 1.0), (0, 0, 1)),
        ("box", (1.0,), (0, 0, 1)),
        ("plane", (1.0,), (0, 0, 1)),
        ("plane", (), (0, 0, 0)),
    ],
)
def test_an_obstacle_of_the_wrong_size_is_refused(shape: str, size: tuple, normal: tuple) -> None:
    with pytest.raises(ValueError, match="expected"):
        Obstacle(name="a", shape=shape, position=(0, 0, 0), size=size, normal=normal)


# --- plans ------------------------------------------------------------------------------------------------------------


def plan(seq: int, t0: float, seed: int, nu: int = 3) -> Plan:
    rng = np.random.default_rng(seed)
    return Plan(seq=seq, stamp=t0, t0=t0, dt=0.1, u=rng.normal(size=(6, nu)), x=rng.normal(size=(6, 2 * nu)))


@pytest.mark.parametrize("t", [-5.0, 1.0, 1.04, 1.05, 1.1, 1.3, 1.49, 1.5, 99.0])
def test_a_plan_is_linear_between_samples_and_held_at_both_ends(t: float) -> None:
    p = plan(1, 1.0, 0)
    times = p.t0 + p.dt * np.arange(6)
    for found, rows in ((p.command(t), p.u), (p.state(t), p.x)):
        error = np.abs(found - [np.interp(t, times, column) for column in rows.T]).max()
        assert error <= 1e-14, error
    assert p.end == pytest.approx(1.5)


def test_a_plan_of_one_sample_and_without_states() -> None:
    p = Plan(seq=1, stamp=0, t0=0, dt=0.1, u=np.ones((1, 2)))
    assert np.array_equal(p.command(3.0), [1, 1]) and p.state(0.0) is None


def test_following_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no plan in force"):
        PlanFollower(0.1).command(0.0)


def test_the_first_plan_is_followed_exactly() -> None:
    follower, p = PlanFollower(0.2), plan(1, 0.0, 0)
    follower.switch(p, 0.05)
    assert np.array_equal(follower.command(0.07), p.command(0.07))


@pytest.mark.parametrize("times", [(0.1, 0.3), (0.1, 0.15), (0.1, 0.1)])
def test_commands_are_continuous_across_switches(times: tuple[float, float]) -> None:
    follower = PlanFollower(0.1)
    follower.switch(plan(1, 0.0, 0), 0.0)
    for seq, t in enumerate(times, 2):  # also in the middle of the last blend
        before = follower.command(t)
        follower.switch(plan(seq, t - 0.03, seq), t)
        jump = np.abs(follower.command(t) - before).max()
        assert jump <= 1e-14, jump
        slope = np.abs(follower.command(t + 1e-7) - before).max()
        assert slope <= 1e-4, slope


def test_the_jump_decays_linearly_over_the_blend() -> None:
    follower, a, b = PlanFollower(0.1), plan(1, 0.0, 0), plan(2, 0.0, 1)
    follower.switch(a, 0.0)
    follower.switch(b, 0.2)
    jump = a.command(0.2) - b.command(0.2)
    for t, left in ((0.2, 1.0), (0.225, 0.75), (0.25, 0.5), (0.29, 0.1), (0.3, 0.0), (0.35, 0.0)):
        error = np.abs(follower.command(t) - b.command(t) - left * jump).max()
        assert error <= 1e-14, (t, error)


def test_without_blend_the_new_plan_holds_at_once() -> None:
    follower, b = PlanFollower(0.0), plan(2, 0.0, 1)
    follower.switch(plan(1, 0.0, 0), 0.0)
    follower.switch(b, 0.2)
    assert np.array_equal(follower.command(0.2), b.command(0.2))


def test_a_resumed_follower_gives_the_same_commands() -> None:
    first, second, b = PlanFollower(0.1), PlanFollower(0.1), plan(2, 0.0, 1)
    assert first.following is None
    first.switch(plan(1, 0.0, 0), 0.0)
    first.switch(b, 0.2)
    assert first.following.seq == 2
    second.resume(b, first.following)
    for t in np.linspace(0.2, 0.6, 9):
        assert np.array_equal(first.command(t), second.command(t)), t
    first.switch(plan(3, 0.2, 2), 0.25)
    second.switch(plan(3, 0.2, 2), 0.25)
    assert np.array_equal(first.command(0.3), second.command(0.3))


# --- logs -------------------------------------------------------------------------------------------------------------

COLUMNS = [("t", "s"), ("q.a", "rad"), ("q.b", "m"), ("qq", "N·m")]
HEADER = {"commit": "12e4567", "numbers": [1, 2.5e-10, None], "nested": {"note": "a: b # c"}, "when": "2024-01-01"}


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    writer = LogWriter(path, COLUMNS, HEADER)
    for row in range(4):
        writer.add([row / 1000, row + 0.123456789, -row, 1e-12 * row])
    writer.close()
    writer.close()
    return path


def test_a_log_reads_back(log_file: Path) -> None:
    log = read_log(log_file)
    assert log.header == HEADER
    assert log.units == dict(COLUMNS)
    error = np.abs(log.data - [[r / 1000, r + 0.123456789, -r, 1e-12 * r] for r in range(4)]).max()
    assert error <= 5e-9, error


def test_columns_come_alone_or_in_groups(log_file: Path) -> None:
    log = read_log(log_file)
    assert log["q"].shape == (4, 2) and log["q.b"].shape == (4,) and log["qq"].shape == (4,)
    assert "q" in log and "qq" in log and "q.c" not in log and "" not in log


def test_an_unknown_column_lists_the_columns(log_file: Path) -> None:
    with pytest.raises(LogError, match=r"^tau: no such column; the log has t, q\.a, q\.b, qq$"):
        read_log(log_file)["tau"]


def test_nothing_is_on_disk_before_a_flush(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log.csv", [("t", "s")], {})
    writer.add([1.0])
    before = (tmp_path / "log.csv").read_text()
    writer.flush()
    after = read_log(tmp_path / "log.csv").data
    writer.close()
    assert "1" not in before and after.tolist() == [[1.0]]


def test_a_row_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log.csv", COLUMNS, {})
    with pytest.raises(ValueError, match="expected 4 values, found 2"):
        writer.add([1.0, 2.0])
    writer.close()


def test_no_numbers_survive_a_log(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log.csv", [("a", "m"), ("b", "m")], {})
    writer.add([np.nan, np.inf])
    writer.close()
    data = read_log(tmp_path / "log.csv").data
    assert np.isnan(data[0, 0]) and np.isposinf(data[0, 1])


def test_an_empty_log_has_columns_and_no_rows(tmp_path: Path) -> None:
    LogWriter(tmp_path / "log.csv", COLUMNS, {}).close()
    assert read_log(tmp_path / "log.csv").data.shape == (0, 4)


def test_a_log_cut_anywhere_in_its_last_line_reads_without_it(log_file: Path) -> None:
    text = log_file.read_text()
    start = text.rstrip("\n").rindex("\n") + 1
    for end in range(start, len(text)):  # the cut may leave a number that is not the one written
        log_file.write_text(text[:end])
        assert read_log(log_file).data.shape == (3, 4), text[start:end]


@pytest.mark.parametrize("bad", ["0.001,1,2", "0.001,1,2,3,4", "0.001,x,2,3", "", "0.001,,2,3"])
@pytest.mark.parametrize("row", [1, 3])
def test_a_corrupted_line_is_refused_by_number(log_file: Path, bad: str, row: int) -> None:
    lines = log_file.read_text().splitlines()
    number = len(lines) - 4 + row  # counted from 0
    lines[number] = bad
    log_file.write_text("\n".join(lines) + "\n")
    with pytest.raises(LogError, match=rf"log\.csv: line {number + 1}: expected 4 numbers, found '{bad}'"):
        read_log(log_file)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"# a: 1\n", "no header line"),
        (b"", "no header line"),
        (b"t,q\n1,2\n", "column 't': expected 'name [unit]'"),
        (b"# a: 1\n# a: 2\nt [s]\n1\n", "duplicate key 'a' (line 2)"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(content)
    with pytest.raises(Exception) as caught:
        read_log(path)
    assert str(caught.value).startswith(str(path)) and says in str(caught.value), str(caught.value)


def test_a_missing_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="cannot be read"):
        read_log(tmp_path / "none.csv")


# --- extras -----------------------------------------------------------------------------------------------------------


def test_a_missing_extra_names_its_pip_install() -> None:
    with pytest.raises(ExtraError, match=r'^the viewer needs no_such_module: pip install "mbctrl\[view\]"$'):
        need("no_such_module", "view", "the viewer")
