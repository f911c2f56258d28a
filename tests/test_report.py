"""Figures and videos: not just files, but with the right things in them."""

from __future__ import annotations

from pathlib import Path

import mujoco
import numpy as np
import pytest

from mbctrl.base.errors import ExtraError
from mbctrl.base.logs import Log, LogError
from mbctrl.base.robot import Robot
from mbctrl.base.scene import Obstacle, PoseGoal, Target
from mbctrl.report import offscreen, replacing

JOINTS = ("shoulder", "elbow", "slide")
UNITS = {"q": ("rad", "rad", "m"), "v": ("rad/s", "rad/s", "m/s"), "tau": ("N·m", "N·m", "N")}
ARM = """
<mujoco>
  <worldbody>
    <light pos="0 -1 2" dir="0 0.4 -1"/>
    <geom type="plane" size="0.5 0.5 0.1" rgba="0.3 0.4 0.5 1"/>
    <body pos="0 0 0.2">
      <joint name="shoulder" axis="0 1 0"/>
      <geom type="capsule" fromto="0 0 0 0 0 0.3" size="0.05" rgba="0.9 0.6 0.1 1"/>
      <body pos="0 0 0.3">
        <joint name="elbow" axis="0 1 0"/>
        <geom type="capsule" fromto="0 0 0 0.3 0 0" size="0.04" rgba="0.9 0.9 0.2 1"/>
        <body pos="0.3 0 0">
          <joint name="slide" type="slide" axis="1 0 0"/>
          <geom type="box" size="0.05 0.02 0.02" rgba="0.2 0.2 0.2 1"/>
        </body>
      </body>
    </body>
  </worldbody>
</mujoco>
"""


def make_robot() -> Robot:
    limits = {"position_lower": (-2, -2, 0), "position_upper": (2, 2, 0.2), "velocity": (2, 2, 0.5), "effort": (50, 12, 12)}
    control = {"mode": "torque", "rate": 100, "stiffness": (1, 1, 1), "damping": (1, 1, 1)}
    names = {"name": "arm", "description": "an arm", "model": "arm.xml", "tool": "tool", "path": Path("robot.yaml")}
    return Robot(**names, joints=JOINTS, home=(0, 0, 0), limits=limits, control=control)


def make_log(samples: int = 101, extras: bool = True) -> Log:
    """A run of 100 samples a second that swings the arm; ``extras`` adds all optional columns."""
    t = np.arange(samples) / 100
    columns: dict[tuple[str, str], np.ndarray] = {("t", "s"): 5.0 + t}
    for group, units in UNITS.items():
        for index, (joint, unit) in enumerate(zip(JOINTS, units)):
            scale = (0.1 if unit[0] == "m" else 1.0) * (30 if group == "tau" else 1)
            columns[f"{group}.{joint}", unit] = scale * np.sin(3 * t + index)
    if extras:
        tool = np.stack([0.3 * np.cos(t), 0.1 * np.sin(t), 0.5 + 0.1 * t])
        target = np.stack([0 * t + 0.3, 0 * t, 0.4 + 0.2 * (t > 0.5)])
        columns |= {(f"tcp.{axis}", "m"): row for axis, row in zip("xyz", tool)}
        columns |= {(f"target.{axis}", "m"): row for axis, row in zip("xyz", target)}
        columns |= {(f"target_quaternion.{axis}", "1"): 0 * t + (axis == "w") for axis in "wxyz"}
        columns["error.position", "m"] = np.linalg.norm(tool - target, axis=0)
        columns["error.rotation", "rad"] = np.full(samples, np.nan) if samples < 3 else np.exp(-t)
        columns["clearance", "m"] = 0.1 - 0.12 * np.sin(3 * t)
        columns["reward", "1"] = np.full(samples, np.nan)
        columns["payload.carried", "kg"] = 2.0 * (t > 0.6)
        columns |= {(f"payload.{name}", "kg"): 0.1 + 1.9 * (t > 0.7) for name in ("estimate", "error", "planned")}
        columns["gate.clamped", "1"] = (t > 0.9).astype(float)
    return Log({}, dict(columns.keys()), np.stack(list(columns.values()), axis=1))


def make_plans(number: int) -> Log:
    latency = 0.020 + 0.001 * (np.arange(number) % 7)
    columns = np.arange(number) / 40, latency, latency > 0.0255
    return Log({}, {"stamp": "s", "latency": "s", "late": "1"}, np.stack(columns, axis=1))


def read_png(path: Path) -> np.ndarray:
    image = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    return image.imread(str(path))


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "extras", "plans"), [(101, True, 200), (101, False, 0), (0, True, 0), (1, True, 1), (2, True, 2)]
)
def test_plot_is_drawn_for_full_short_and_empty_logs(tmp_path: Path, samples: int, extras: bool, plans: int) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from mbctrl.report.plots import plot_run

    path = tmp_path / "new" / "run.png"
    plot_run(make_log(samples, extras), make_plans(plans), make_robot(), path, "arm · poses")
    pixels = read_png(path)
    assert pixels.shape[0] > 900 and pixels.shape[1] > 1000
    assert (pixels[..., :3].min(axis=2) < 0.9).mean() > 0.005, "the figure is blank"
    assert [file.name for file in path.parent.iterdir()] == ["run.png"], "a temporary file is left"


def test_plot_names_units_limits_and_statistics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    from mbctrl.report.plots import plot_run

    texts: list[str] = []
    draw = FigureCanvasAgg.print_png

    def spy(canvas: FigureCanvasAgg, file: object) -> None:
        draw(canvas, file)
        texts.extend(text.get_text() for text in canvas.figure.findobj(Text))

    monkeypatch.setattr(FigureCanvasAgg, "print_png", spy)
    plot_run(make_log(), make_plans(200), make_robot(), tmp_path / "run.png", "arm · poses")
    for expected in ("arm · poses", "position [rad, m]", "velocity [rad/s, m/s]", "torque [N·m, N]", "limit of elbow, slide"):
        assert expected in texts
    assert "safety gate clamped 10 of 101 samples" in texts
    assert "position error [mm]" in texts and "rotation error [deg]" in texts and "clearance, lowest -20.0 mm" in texts
    assert any(text.startswith("p99  26.0 ms") for text in texts)
    assert "shoulder  60%" in texts, "the peak torque is 30 of 50 N·m"
    assert not any("reward" in text for text in texts), "the reward is nan throughout"


def test_replacing_leaves_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- videos -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend() -> str:
    pytest.importorskip("av", reason="PyAV is not installed")
    try:
        return offscreen.choose_backend()
    except ExtraError as error:
        pytest.skip(f"no OpenGL: {error}")


def decode(path: Path) -> tuple[np.ndarray, float]:
    """Return all frames (F, height, width, 3) and the duration [s]."""
    import av

    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
        return frames, float(stream.duration * stream.time_base)


def test_video_shows_the_arm_moving_in_real_time(backend: str, tmp_path: Path) -> None:
    from mbctrl.report.video import render_video

    model = mujoco.MjModel.from_xml_string(ARM)
    obstacle = Obstacle(name="ball", shape="sphere", position=(0.3, 0.2, 0.6), size=(0.08,), to=(0.3, -0.2, 0.6), period=2)
    goal = PoseGoal(targets=(Target(position=(0.3, 0, 0.4)), Target(position=(0.3, 0, 0.6))))
    calls, path = [], tmp_path / "run.mp4"
    settings = {"fps": 10, "width": 321, "height": 180, "progress": lambda done, total: calls.append((done, total))}
    render_video(model, make_log(), path, joints=list(JOINTS), obstacles=(obstacle,), goal=goal, **settings)
    frames, duration = decode(path)
    assert frames.shape == (11, 180, 320, 3) and duration == pytest.approx(1.1, abs=0.01)
    assert calls == [(index + 1, 11) for index in range(11)]
    colour = frames.astype(int)
    arm = (colour[..., 0] > 110) & (colour[..., 1] > 70) & (colour[..., 2] < 90)
    assert (arm.mean(axis=(1, 2)) > 0.01).all(), "the arm is yellow and always in the picture"
    red = (colour[..., 0] > colour[..., 1] + 40) & (colour[..., 0] > colour[..., 2] + 40) & ~arm
    assert red.mean() > 0.002, "the obstacle is red"
    assert np.abs(colour[0] - colour[-1]).mean() > 2, "nothing moves"
    assert colour[:, 5, 5].min() > 100, "a model without a sky gets a pale one, not black"
    assert list(tmp_path.iterdir()) == [path], "a temporary file is left"
    assert model.vis.global_.offwidth != 320, "the caller's model is changed"


def test_video_uses_the_camera_main_and_does_without_targets(backend: str, tmp_path: Path) -> None:
    from mbctrl.report.video import render_video

    camera = '<camera name="main" pos="0 0 9" fovy="0.4"/>'  # sees a bit of the upper arm, and nothing but that
    model = mujoco.MjModel.from_xml_string(ARM.replace("<light", camera + "<light"))
    log = make_log(1, extras=False)
    log.data[:, 1:] = 0
    render_video(model, log, tmp_path / "run.mp4", joints=list(JOINTS), width=64, height=48)
    frames, _ = decode(tmp_path / "run.mp4")
    assert len(frames) == 1 and (frames[0, 4:24, :, 2] < 90).mean() > 0.5


def test_video_names_what_is_wrong_with_the_log(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    from mbctrl.report.video import render_video

    model = mujoco.MjModel.from_xml_string(ARM)
    with pytest.raises(LogError, match="no samples"):
        render_video(model, make_log(0), tmp_path / "run.mp4", joints=list(JOINTS))
    with pytest.raises(LogError, match="wrist: the model has no such joint"):
        render_video(model, make_log(), tmp_path / "run.mp4", joints=["wrist"])


def test_backend_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(offscreen, "_works", lambda backend: tried.append(backend) or backend == "osmesa")
    monkeypatch.setattr(offscreen.sys, "platform", "linux")
    choose = offscreen.choose_backend.__wrapped__
    monkeypatch.setenv("MUJOCO_GL", "off")
    with pytest.raises(ExtraError, match="switched off"):
        choose()
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(ExtraError, match="MUJOCO_GL=egl does not work here.*apt install libosmesa6"):
        choose()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert choose() == "osmesa"
    tried.clear()
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delenv("DISPLAY", raising=False)
    assert choose() == "osmesa" and tried == ["egl", "osmesa"]
    monkeypatch.setattr(offscreen, "_works", lambda backend: False)
    with pytest.raises(ExtraError, match="no OpenGL"):
        choose()
