"""Strict YAML: what is refused, with which file, line and key, in one line; and where files are found."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import yaml

from mbctrl.base.config import RunConfig, load_controller, load_run, merged
from mbctrl.base.errors import MbctrlError, SpecError, suggest
from mbctrl.base.find import find, names
from mbctrl.base.robot import load_robot
from mbctrl.base.spec import Number, Spec, dump_yaml, import_name, load_yaml, parse_yaml, validate

ROOT = Path(__file__).parents[1]
BALL = {"name": "a", "shape": "sphere", "position": [0, 0, 0], "size": [0.1]}
RUN = {"rule": "m:Rule", "task": {}, "robot": "panda", "duration": 1.0}


class One(Spec):
    x: Number


@pytest.fixture
def robot_file(tmp_path: Path) -> Path:
    """A copy of arm2 whose robot.yaml a test may spoil."""
    shutil.copytree(ROOT / "robots" / "arm2", tmp_path / "arm2")
    path = tmp_path / "arm2" / "robot.yaml"
    text = re.sub(r"effort: \[.*?\]", "effort: [7.2, 1.9]", path.read_text())  # known numbers, whatever the arm is tuned to
    path.write_text(re.sub(r"position_lower: \[.*?\]", "position_lower: [-12.5, -12.5]", text))
    return path


def spoilt(path: Path, old: str, new: str) -> SpecError:
    text = path.read_text()
    assert text.count(old) == 1, f"'{old}' occurs {text.count(old)} times"
    path.write_text(text.replace(old, new))
    with pytest.raises(SpecError) as caught:
        load_robot(str(path))
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        ("-1e+3", -1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("+2.5e2", 250.0),
        ("010", 10),
        ("08", 8),
        ("0x1F", 31),
        ("0o17", 15),
        ("-7", -7),
        ("1:30", "1:30"),  # not a number of minutes
        ("1_000", "1_000"),
        ("'1e-3'", "1e-3"),
        ("e3", "e3"),
        ("true", True),
        ("~", None),
    ],
)
def test_scalars_read_as_yaml_1_2_says(text: str, value: object) -> None:
    found = parse_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


NUMBERS = (1e-3, 1e-10, -2.5e300, 7, 0.1 + 0.2)
TEXTS = ("1e-3", "12e4567", "010", "1:30", "yes", "~", "", "ü", "a: b")


@pytest.mark.parametrize("value", [*NUMBERS, *TEXTS, True, None])
def test_dumped_values_read_back_the_same(value: object) -> None:
    found = parse_yaml(dump_yaml({"a": [value]}))["a"][0]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("value", ["1e-3", "12e4567", "1:30", "010"])
def test_dumped_text_stays_text_for_other_readers(value: str) -> None:
    assert yaml.safe_load(dump_yaml({"a": value})) == {"a": value}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "duplicate key 'a' (line 3)"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", "duplicate key 'b' (line 4)"),
        ("a: {b: 1, b: 2}", "duplicate key 'b' (line 1)"),
        ("a: [1, 2", "(line 1)"),
        ("a: 1\n\tb: 2", "(line 2)"),
        ("a: 1\n---\nb: 2", "another document (line 2)"),
        ("a: !!python/object/apply:os.getcwd []", "tag:yaml.org,2002:python/object/apply:os.getcwd"),
        ("a: !!python/name:os.system", "tag:yaml.org,2002:python/name:os.system"),
        ("a: !unknown 1", "!unknown"),
        ("a: &a [1, *a]", "recursive"),
        ("&a {x: *a}", "recursive"),
        ("a: *nobody", "undefined alias"),
        ("b: &b {x: 1}\na: {<<: *b}", "merge keys (<<) are not supported (line 2)"),
        ("? [1, 2]\n: 3", "a key must be a plain word (line 1)"),
        ("? !!set {a}\n: 3", "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!float x", "not valid YAML"),
        ("a: 2024-13-45", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("a: " + "[" * 5000, "recursion"),
        ("{a: " * 5000, "recursion"),
    ],
)
def test_bad_yaml_is_one_line_with_the_file(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_yaml(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and says in message and "\n" not in message, message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "expected a mapping of keys to values, found NoneType"),
        (b"- 1\n- 2\n", "found list"),
        (b"just text", "found str"),
        (b"a: \xff\xfe", "cannot be read"),
    ],
)
def test_what_is_no_mapping_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=says):
        load_yaml(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="directory"):
        load_yaml(tmp_path)


NOT_NUMBERS = ("'1e-3'", "true", "no", "abc", "1:30", ".nan", ".inf", "-.inf", "1e999", "null", "[1]", "{a: 1}", "9" * 400)


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_is_no_finite_number_is_refused(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        validate(One, parse_yaml(f"x: {text}"), "f.yaml")
    assert str(caught.value).startswith("f.yaml: x: "), str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"durtion": 1}, "durtion: unknown key; did you mean 'duration'? known: "),
        ({"planner": {"smaples": 3}}, "planner.smaples: unknown key; did you mean 'samples'? known: "),
        ({"planner": {"samples": True}}, "planner.samples: "),
        ({"planner": {"samples": 3.5}}, "planner.samples: "),
        ({"planner": {"samples": 0}}, "planner.samples: "),
        ({"planner": {"samples": "512"}}, "planner.samples: "),
        ({"planner": {"sigma": "a"}}, "planner.sigma: expected a number, found 'a'"),
        ({"planner": {"sigma": [0.1, -1]}}, "planner.sigma[1]: Input should be greater than 0, found -1"),
        ({"planner": {"ramp": 1.5}}, "planner.ramp: "),
        ({"planner": {"growth": True}}, "planner.growth: expected a number, found True"),
        ({"planner": {"noise": "wite"}}, "planner.noise: "),
        ({"dynamics": {"threads": True}}, "dynamics.threads: "),
        ({"dynamics": {"dt": 0}}, "dynamics.dt: "),
        ({"loop": {"rate": math.nan}}, "loop.rate: expected a finite number, found nan"),
        ({"loop": {"rate": math.inf}}, "loop.rate: expected a finite number, found inf"),
        ({"loop": {"feedback_stiffness": [1, "2"]}}, "loop.feedback_stiffness[1]: expected a number, found '2'"),
        ({"goal": {"kind": "pose"}}, "goal: "),
        ({"goal": {"targets": []}}, "goal: "),
        ({"goal": {"kind": "poses", "targets": []}}, "goal.targets: "),
        ({"goal": {"kind": "poses", "targets": [{"position": [1, 2]}]}}, "goal.targets[0].position[2]: missing"),
        ({"goal": {"kind": "poses", "targets": [{"position": [1, 2, 3], "rpi": 1}]}}, "rpi: unknown key; did you mean 'rpy'?"),
        ({"obstacles": [{**BALL, "size": []}]}, "obstacles[0]: size: expected 1 values for a sphere, found 0"),
        ({"obstacles": [{**BALL, "shape": "box"}]}, "obstacles[0]: size: expected 3 values for a box, found 1"),
        ({"obstacles": [{**BALL, "normal": [0, 0, 2]}]}, "obstacles[0]: normal: expected a unit vector"),
        ({"backend": {"kind": "gazebo"}}, "backend.kind: "),
        ({"duration": -1}, "duration: "),
        ({"duration": [[[1]]]}, "duration: "),
        ({"seed": -1}, "seed: "),
        ({"seed": True}, "seed: "),
        ({"robot": None}, "robot: "),
    ],
)
def test_a_bad_scenario_names_file_and_key(change: dict, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        validate(RunConfig, {**RUN, **change}, "f.yaml")
    message = str(caught.value)
    assert message.startswith("f.yaml: ") and says in message and "\n" not in message, message


@pytest.mark.parametrize("key", sorted(RUN))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(SpecError, match=f"^f.yaml: {key}: missing; this key is required$"):
        validate(RunConfig, {name: value for name, value in RUN.items() if name != key}, "f.yaml")


def test_endless_aliases_give_a_short_message() -> None:
    text = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    bomb = parse_yaml(text)["a39"]
    with pytest.raises(SpecError) as caught:
        validate(One, {"x": bomb}, "f.yaml")
    assert len(str(caught.value)) < 300, len(str(caught.value))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("home: [0.0, 0.0]", "home: [0.0]", "home: expected 2 values, one for each joint, found 1"),
        ("velocity: [15.0, 20.0]", "velocity: [15.0, 20.0, 1]", "limits.velocity: expected 2 values, one for each joint, found 3"),
        ("effort: [7.2, 1.9]", "effort: [7.2]", "limits.effort: expected 2 values, one for each actuated joint, found 1"),
        ("stiffness: [0.0, 0.0]", "stiffness: []", "control.stiffness: expected 2 values"),
        ("velocity: [15.0, 20.0]", "velocity: [15.0, 0.0]", "limits.velocity[1]: Input should be greater than 0"),
        ("velocity: [15.0, 20.0]", "velocity: 15.0", "limits.velocity: "),
        ("effort: [7.2, 1.9]", "effort: [7.2, '1.9']", "limits.effort[1]: expected a number, found '1.9'"),
        ("effort: [7.2, 1.9]", "effort: [7.2, yes]", "limits.effort[1]: expected a number, found True"),
        ("position_lower: [-12.5,", "position_lower: [13,", "position_lower[0] = 13.0 is not below position_upper"),
        ("position_lower: [-12.5,", "position_lower: [12.566370614359172,", "is not below position_upper[0]"),
        ("joints: [shoulder, elbow]", "joints: [elbow, elbow]", "joints: a name appears twice"),
        ("joints: [shoulder, elbow]", "joints: []", "joints: "),
        ("joints: [shoulder, elbow]", "joints: [shoulder, elbow]\nactuated: [wrist]", "actuated: 'wrist' is not among joints"),
        ("tool: tcp", "tol: tcp", "tool: missing"),
        ("tool: tcp", "tool: tcp\njoint: [a]", "joint: unknown key; did you mean 'joints'?"),
        ("mode: torque", "mode: torqe", "control.mode: "),
        ("tool: tcp", "tool: tcp\npath: /elsewhere", "path: unknown key"),
        ("tool: tcp", "tool: tcp\ntool: tip", "duplicate key 'tool' (line "),
    ],
)
def test_a_bad_robot_names_file_and_key(robot_file: Path, old: str, new: str, says: str) -> None:
    message = str(spoilt(robot_file, old, new))
    assert message.startswith(f"{robot_file}: ") and says in message and "\n" not in message, message


def test_commands_follow_the_actuated_joints(robot_file: Path) -> None:
    data = load_yaml(robot_file) | {"actuated": ["elbow"]}
    data["limits"] |= {"effort": [1.9], "effort_rate": [60.0]}
    data["control"] |= {"stiffness": [0.0], "damping": [0.0]}
    robot_file.write_text(dump_yaml(data))
    robot = load_robot(str(robot_file))
    assert (robot.nq, robot.nu, robot.command_index) == (2, 1, [1])


def test_a_bare_model_is_no_robot_file() -> None:
    with pytest.raises(SpecError, match=r"arm2\.xml: expected a robot\.yaml"):
        load_robot(str(ROOT / "robots" / "arm2" / "arm2.xml"))


@pytest.mark.parametrize(
    ("folder", "name", "says"),
    [
        ("robots", "pandaa", "unknown robot 'pandaa'; did you mean 'panda'? known: acrobot, arm2, "),
        ("launch", "zzz", "unknown scenario 'zzz'; known: "),
        ("robots", "no/such.yaml", "no/such.yaml: no such file"),
    ],
)
def test_an_unknown_name_lists_what_exists(folder: str, name: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        find(folder, name)
    assert str(caught.value).startswith(says), str(caught.value)


def test_an_unknown_name_says_where_it_was_written() -> None:
    with pytest.raises(SpecError, match=r"^f\.yaml: controller: unknown controller 'nobody'"):
        load_controller("nobody", file="f.yaml", key="controller")


def test_the_search_path_goes_first_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "launch").mkdir(parents=True)
        (tmp_path / folder / "launch" / "mine.yaml").write_text("{}")
    (tmp_path / "two" / "robots" / "panda").mkdir(parents=True)
    (tmp_path / "two" / "robots" / "panda" / "robot.yaml").write_text("{}")
    builtin = find("robots", "panda")
    monkeypatch.setenv("MBCTRL_PATH", f"{tmp_path / 'one'}:{tmp_path / 'missing'}:{tmp_path / 'two'}")
    assert find("launch", "mine") == tmp_path / "one" / "launch" / "mine.yaml"
    assert find("launch", "launch/mine.yaml") == tmp_path / "one" / "launch" / "mine.yaml"
    assert find("robots", "panda") == tmp_path / "two" / "robots" / "panda" / "robot.yaml" != builtin
    assert "arm2" in names("robots")


def test_a_path_is_taken_as_given(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("{}")
    assert find("launch", str(path)) == path


def test_a_scenario_overrides_its_controller_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("controllers", "launch"):
        (tmp_path / folder).mkdir()
    (tmp_path / "controllers" / "c.yaml").write_text(
        "rule: m:Rule\nplanner: {samples: 64, knots: 3}\ntask: {reach: {weight: 1.0, scale: 2.0}}\n"
    )
    scenario = tmp_path / "launch" / "s.yaml"
    scenario.write_text("robot: panda\ncontroller: c\nduration: 2\nplanner: {knots: 4}\ntask: {reach: {weight: 5.0}}\n")
    monkeypatch.setenv("MBCTRL_PATH", str(tmp_path))
    run, path = load_run("s")
    assert path == scenario
    assert (run.planner.samples, run.planner.knots, dict(run.task)) == (64, 4, {"reach": {"weight": 5.0, "scale": 2.0}})


def test_a_fault_in_the_controller_names_the_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("controllers", "launch"):
        (tmp_path / folder).mkdir()
    (tmp_path / "controllers" / "c.yaml").write_text("rule: m:Rule\nplanner: {knot: 3}\ntask: {}\n")
    (tmp_path / "launch" / "s.yaml").write_text("robot: panda\ncontroller: c\nduration: 2\n")
    monkeypatch.setenv("MBCTRL_PATH", str(tmp_path))
    with pytest.raises(SpecError, match=r"controllers/c\.yaml: planner\.knot: unknown key; did you mean 'knots'"):
        load_run("s")


def test_merging_leaves_both_inputs_alone() -> None:
    base, over = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "d": {"e": 1}}
    assert merged(base, over) == {"a": {"b": 5, "c": 2}, "d": {"e": 1}}
    assert (base, over) == ({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5}, "d": {"e": 1}})


def test_schemas_are_frozen() -> None:
    spec = One(x=1.0)
    with pytest.raises(Exception, match="frozen"):
        spec.x = 2.0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mppy", "f.yaml: rule: unknown name 'mppy'; did you mean 'mppi'? known: cem, mppi (or 'package.module:Name')"),
        ("nobody.at.home:Name", "f.yaml: rule: cannot import 'nobody.at.home:Name': No module named 'nobody'"),
        ("math:nothing", "f.yaml: rule: cannot import 'math:nothing': module 'math' has no attribute 'nothing'"),
    ],
)
def test_an_unknown_import_lists_what_is_known(name: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        import_name(name, {"mppi": "a:B", "cem": "a:C"}, file="f.yaml", key="rule")
    assert str(caught.value) == says


@pytest.mark.parametrize("name", ["root", "math:sqrt"])
def test_short_and_full_names_import(name: str) -> None:
    assert import_name(name, {"root": "math:sqrt"}) is math.sqrt


def test_errors_survive_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(SpecError("a\n  b", file="f", key="k")))
    assert isinstance(error, MbctrlError) and (str(error), error.file, error.key) == ("f: k: a b", "f", "k")


def test_suggestions_only_come_close() -> None:
    assert suggest("sampels", ["samples", "knots"]) == "; did you mean 'samples'? known: knots, samples"
    assert suggest("xyz", ["samples", "knots"]) == "; known: knots, samples"
