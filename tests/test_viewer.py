"""The browser viewer: where it listens, what it shows and what comes back from dragging the target."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mujoco
import numpy as np
import pytest

from mbctrl.base.errors import ExtraError, ModelError
from mbctrl.base.scene import Obstacle

viser = pytest.importorskip("viser", reason="viser is not installed")

from mbctrl.viewer import Viewer, capsule_mesh, fan_segments, model_mesh  # noqa: E402

ARM = """
<mujoco>
  <asset>
    <material name="paint" rgba="0.9 0.5 0.1 1"/>
    <mesh name="wedge" vertex="0 0 0  0.1 0 0  0 0.1 0  0 0 0.1"/>
  </asset>
  <worldbody>
    <geom type="plane" size="2 2 0.1" pos="0 0 -0.1"/>
    <body name="upper">
      <joint name="shoulder" axis="0 1 0"/>
      <geom name="capsule" type="capsule" fromto="0 0 0 0 0 0.3" size="0.05" material="paint"/>
      <geom name="hull" type="sphere" size="0.2" group="3"/>
      <body name="fore" pos="0 0 0.3">
        <joint name="elbow" axis="0 1 0"/>
        <geom name="rod" type="cylinder" fromto="0 0 0 0.3 0 0" size="0.04" rgba="0.2 0.4 0.9 0.5"/>
        <geom name="wedge" type="mesh" mesh="wedge" pos="0.3 0 0"/>
        <geom name="box" type="box" size="0.02 0.03 0.04" pos="0.2 0 0"/>
        <geom name="egg" type="ellipsoid" size="0.02 0.03 0.04" pos="0.1 0 0"/>
      </body>
    </body>
  </worldbody>
</mujoco>
"""
JOINTS = ["shoulder", "elbow"]
BALL = Obstacle(name="ball", shape="sphere", position=(0.4, 0.2, 0.3), size=(0.08,))
CRATE = Obstacle(name="crate", shape="box", position=(-0.3, 0.2, 0.1), size=(0.1, 0.1, 0.1))
TARGET = np.array([0.35, 0.0, 0.45]), np.array([1.0, 0, 0, 0])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_fan(number: int = 6, samples: int = 9) -> np.ndarray:
    along = np.linspace(0, 0.3, samples)
    return np.stack([np.stack([0.3 + 0 * along, along * (k - number / 2) / number, 0.3 + along], axis=1) for k in range(number)])


def eventually(check: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not (done := check()) and time.monotonic() < end:
        time.sleep(0.02)
    return done


@pytest.fixture
def viewer() -> Iterator[Viewer]:
    view = Viewer(mujoco.MjModel.from_xml_string(ARM), JOINTS, port=free_port())
    yield view
    view.close()


def node(view: Viewer, name: str):
    return view._server.scene.get_handle_by_name(name)


def test_listens_on_this_machine_only(viewer: Viewer, capsys: pytest.CaptureFixture[str]) -> None:
    port = int(viewer.url.rsplit(":", 1)[1])
    assert viewer.url == f"http://127.0.0.1:{port}"
    with socket.create_connection(("127.0.0.1", port), timeout=2):
        pass
    with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=2):
        pass  # loopback as well, but another address: a server on all addresses would answer
    assert viewer._server.request_share_url() is None
    viewer.close()
    viewer.close()
    assert capsys.readouterr().out == ""


def test_update_moves_arm_target_obstacles_and_fan(viewer: Viewer) -> None:
    model = mujoco.MjModel.from_xml_string(ARM)
    fore = model.body("fore").id
    assert node(viewer, "/target").visible is False
    obstacles = [(item, np.array(item.position)) for item in (BALL, CRATE)]
    viewer.update(0.0, np.zeros(2), TARGET, obstacles, make_fan(), "ready")
    np.testing.assert_allclose(node(viewer, f"/robot/{fore}").position, (0, 0, 0.3), atol=1e-9)
    assert node(viewer, "/target").visible is True
    np.testing.assert_allclose(node(viewer, "/target").position, TARGET[0])
    assert node(viewer, "/fan").points.shape == (6 * 8, 2, 3)
    assert "ready" in viewer._text.content and "t = 0.0 s" in viewer._text.content
    viewer.update(1.0, np.array([np.pi / 2, 0]), None, [(BALL, np.array([0, 0, 1.0]))], make_fan(3), "moving")
    np.testing.assert_allclose(node(viewer, f"/robot/{fore}").position, (0.3, 0, 0), atol=1e-9)
    np.testing.assert_allclose(node(viewer, "/obstacles/ball").position, (0, 0, 1))
    assert node(viewer, "/obstacles/crate") is None
    assert node(viewer, "/target").visible is False
    assert node(viewer, "/fan").points.shape == (3 * 8, 2, 3)
    viewer.update(2.0, np.zeros(2), None, [], None, "")
    assert node(viewer, "/fan").visible is False


def test_shows_every_kind_of_geom_but_collision_hulls(viewer: Viewer) -> None:
    model = mujoco.MjModel.from_xml_string(ARM)

    def shown(name: str):
        geom = model.geom(name)
        return node(viewer, f"/robot/{geom.bodyid[0]}/{geom.id}")

    for name in ("capsule", "rod", "wedge", "box", "egg"):
        assert shown(name) is not None, name
    assert shown("hull") is None
    assert tuple(shown("capsule").color) == (230, 128, 26), "the material's colour"
    assert tuple(shown("rod").color) == (51, 102, 230) and shown("rod").opacity == pytest.approx(0.5)


def test_drag_from_a_browser_is_reported_once_and_wins_over_updates(viewer: Viewer) -> None:
    msgspec = pytest.importorskip("msgspec")
    client = pytest.importorskip("websockets.sync.client")
    viewer.update(0.0, np.zeros(2), TARGET, [], None, "")
    assert viewer.dragged() is None

    def send(kind: str, **fields: object) -> None:
        socket_.send(msgspec.msgpack.encode({"type": kind, "name": "/target", "owner": owner, **fields}))

    owner = ""
    address, protocol = viewer.url.replace("http", "ws"), f"viser-v{viser.__version__}"
    with client.connect(address, subprotocols=[protocol], compression=None, max_size=None) as socket_:
        send("TransformControlsDragStartMessage")
        send("TransformControlsUpdateMessage", position=[0.1, 0.2, 0.3], wxyz=[0.0, 1.0, 0.0, 0.0])
        assert eventually(lambda: viewer._dragged is not None)
        viewer.update(0.1, np.zeros(2), TARGET, [], None, "")
        np.testing.assert_allclose(node(viewer, "/target").position, (0.1, 0.2, 0.3), err_msg="snapped back under the user's hand")
        send("TransformControlsDragEndMessage")
        assert eventually(lambda: not viewer._held)
    position, wxyz = viewer.dragged()
    np.testing.assert_allclose(position, (0.1, 0.2, 0.3))
    np.testing.assert_allclose(wxyz, (0, 1, 0, 0))
    assert viewer.dragged() is None
    viewer._touched -= 10  # as if the drag were long over
    viewer.update(0.2, np.zeros(2), TARGET, [], None, "")
    np.testing.assert_allclose(node(viewer, "/target").position, TARGET[0])


def test_meshes_and_fan_have_the_right_shape() -> None:
    vertices, faces = capsule_mesh(0.1, 0.3)
    assert np.ptp(vertices, axis=0) == pytest.approx((0.2, 0.2, 0.8), abs=1e-6)
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    volume = np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6
    assert volume == pytest.approx(np.pi * 0.1**2 * (0.6 + 0.4 / 3), rel=0.03), "faces point outwards"
    vertices, faces = model_mesh(mujoco.MjModel.from_xml_string(ARM), 0)
    assert faces.shape == (4, 3) and faces.max() == len(vertices) - 1
    points, colours = fan_segments(make_fan(2, 4))
    assert points.shape == colours.shape == (6, 2, 3)
    np.testing.assert_allclose(points[0, 1], points[1, 0])


def test_errors_name_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mujoco.MjModel.from_xml_string(ARM)
    with pytest.raises(ModelError, match="wrist"):
        Viewer(model, ["wrist"])
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(ExtraError, match=r'pip install "mbctrl\[viewer\]"'):
        Viewer(model, JOINTS)


def test_looks_right_in_a_browser(viewer: Viewer, tmp_path: Path) -> None:
    browser = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium to look with")
    viewer.update(0.0, np.array([0.3, 0.2]), TARGET, [(BALL, np.array(BALL.position))], make_fan(), "ready")
    switches = "headless no-sandbox disable-gpu enable-unsafe-swiftshader use-angle=swiftshader disable-quic no-first-run"
    switches += " disable-background-networking disable-component-update disable-sync remote-debugging-port=0 window-size=400,300"
    command = [browser, *(f"--{switch}" for switch in switches.split()), f"--user-data-dir={tmp_path / 'profile'}", viewer.url]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert eventually(lambda: len(viewer._server.get_clients()) > 0, seconds=30), "the page does not load"
        window, wanted = next(iter(viewer._server.get_clients().values())), viewer._server.initial_camera.position
        assert eventually(lambda: np.allclose(window.camera.position, wanted, atol=0.02), seconds=20), "not the first camera"
        time.sleep(1.0)  # the scene is sent in pieces
        picture = window.get_render(240, 320, transport_format="png", timeout=30)
    finally:
        process.terminate()
        process.wait(timeout=20)
    red, green, blue = picture[..., :3].astype(float).transpose(2, 0, 1)
    solid = picture[..., 3] > 200 if picture.shape[2] == 4 else np.ones(picture.shape[:2], bool)
    assert np.std(red[solid]) > 5, "blank"
    assert (solid & (red > 1.3 * green) & (green > 1.3 * blue) & (red > 60)).mean() > 0.01, "no orange arm"
    assert (solid & (red > 1.5 * green) & (red > 1.5 * blue) & (red > 60)).mean() > 0.002, "no red obstacle"
