"""A calibration's page: the fit's numbers, whole in itself, with whatever names and whatever is missing."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mbctrl.calibrate import figures, report
from mbctrl.calibrate import report_tables as tables
from mbctrl.calibrate.drawing import thin
from mbctrl.calibrate.identify import Fit, Identification
from mbctrl.calibrate.recipe import FilterSpec, FitSpec, FrictionSpec
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.report import Report, render, verdict, warnings, write_report
from mbctrl.calibrate.signals import prepare
from mbctrl.calibrate.validate import Validation, validate_on
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.reference import ReferenceDynamics
from mbctrl.dynamics.tree import RigidTree

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = '<script>alert("$x_{1$")</script>&amp;\'.csv'
ONE_JOINT = """
<mujoco>
  <worldbody>
    <body name="link">
      <joint name="_$turn$" axis="0 1 0" armature="0.05" damping="0.3" frictionloss="0.4"/>
      <geom type="capsule" fromto="0 0 0 0.4 0 0" size="0.04" mass="2"/>
    </body>
  </worldbody>
</mujoco>
"""


class Page(HTMLParser):
    """Checks that elements close in turn; keeps the visible text, element names and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def recorded(tree: RigidTree, seconds: float, seed: int, file: str) -> Recording:
    """Return a log of an arm that is heavier than ``tree`` and rubs in its own way."""
    rng = np.random.default_rng(seed)
    t = np.arange(0, seconds, 0.01)
    pulse = 2 * np.pi * np.arange(1, 6) * 0.1
    swing, shift = rng.uniform(0.2, 0.5, (5, tree.n)), rng.uniform(0, 2 * np.pi, (5, tree.n))
    phase = t[:, None, None] * pulse[:, None] + shift
    q = (swing * np.sin(phase)).sum(1)
    v, a = (swing * pulse[:, None] * np.cos(phase)).sum(1), -(swing * pulse[:, None] ** 2 * np.sin(phase)).sum(1)
    true = replace(tree, mass=1.2 * tree.mass, inertia=1.2 * tree.inertia, armature=tree.armature + 0.02)
    tau = ReferenceDynamics(true).inverse_dynamics(q, v, a) + 0.5 * np.sign(v) + 0.3 * v
    tau += 0.05 * rng.standard_normal(tau.shape)
    lines = np.arange(2, len(t) + 2)
    return Recording(tree.joints, t, q, tau, v, file=file, sha256=f"{seed:02x}" * 32, lines=lines, parts=((0, len(t)),))


def fitted(model: Model, spec: FitSpec, seconds: float = 12.0) -> tuple[Fit, Recording, Validation, Validation]:
    """Return a fit, what it was fitted to, and its validation there and on another log."""
    work = Identification(model, spec)
    logs = [recorded(model.tree, seconds, seed, file) for seed, file in ((1, "logs/first.csv"), (2, "logs/second.csv"))]
    motions = [work.motion(prepare(log, FilterSpec())) for log in logs]
    fit = work.fit(motions[:1])
    return fit, logs[0], *(validate_on(fit, motion, motions[:1]) for motion in motions)


@cache
def arm2() -> Report:
    fit, log, own, other = fitted(load_model("arm2"), FitSpec(draws=20))
    return Report(
        title="Calibration of arm2",
        recipe="arm2.yaml",
        robot="arm2",
        command="mbctrl calibrate arm2 first.csv --held-out second.csv",
        fit=fit,
        trained=(log,),
        validations=(("training log", own), ("held out: second.csv", other)),
        warnings=("first.csv: a note",),
        provenance={
            "date": "2026-01-02 03:04",
            "recipe": {"robot": "arm2", "log": {"position": {"columns": [1, 2]}}},
            "logs": [
                {"file": "first.csv", "sha256": "01" * 32, "lines": [2, 1201]},
                {"file": "second.csv", "sha256": "02" * 32, "lines": [2, 1201]},
            ],
        },
        seconds=7.654,
    )


@cache
def arm2_page() -> str:
    return render(arm2())


def test_the_page_holds_the_fits_numbers_and_nothing_from_outside(tmp_path: Path) -> None:
    write_report(tmp_path / "out" / "report.html", arm2())
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page, one, fit = Page(text), arm2(), arm2().fit
    seen = one.validations[1][1]
    words = page.text.split()
    for value in (*seen.fit.rms, *fit.tree.armature, *fit.tree.friction, *fit.tree.damping, *fit.tree.mass):
        assert tables.number(value) in words
    for value, se in zip(fit.estimates.value, fit.estimates.se):
        assert tables.fixed(value, tables.decimals(se)) in words
    for value in (*seen.prior.relative, *seen.fit.relative, *seen.fit.floor):
        assert tables.percent(value) in words
    for value in (*seen.after.total, *seen.after.still, *seen.before.error.ravel()):
        assert tables.number(1e3 * value) in words
    assert f"Explains {100 * (1 - seen.fit.relative.mean()):.1f} % of the torque on a log it has not seen" in page.text
    assert {"020202020202", "2-1201", "2026-01-02", *fit.tree.joints} <= set(words)
    assert fit.friction.name in page.text and all(score.friction.name in page.text for score in fit.scores[:10])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert f"{abs(1e3 * fit.delay):.1f} ms" in page.text and page.count("svg") == 5 and len(text) < 4e6


def test_nothing_is_loaded_from_elsewhere_and_ids_are_unique() -> None:
    text = arm2_page()
    page = Page(text)
    assert "http" not in text and "//" not in re.sub(r"base64,[\w+/=\s]+", "", text)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    links = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "xlink:href") if name in attrs]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    used, known = (set(re.findall(pattern, text)) for pattern in (r"var\((--[\w-]+)", r"(--[\w-]+):"))
    assert used <= known


def test_names_are_text_whatever_is_in_them() -> None:
    one = arm2()
    label, seen = one.validations[1]
    torques = replace(seen.fit, file=f"logs/{HOSTILE}")
    fit = replace(one.fit, tree=replace(one.fit.tree, joints=("_<b>$a_{$", "x" * 90)))
    log = replace(one.trained[0], file=HOSTILE)
    text = render(
        replace(
            one,
            title=HOSTILE,
            robot=HOSTILE,
            recipe=HOSTILE,
            command=HOSTILE,
            fit=fit,
            trained=(log,),
            validations=((HOSTILE, replace(seen, fit=torques)),),
            warnings=(HOSTILE,),
            provenance={HOSTILE: HOSTILE, "recipe": f"a: b\n{HOSTILE}"},
        )
    )
    page = Page(text)
    assert not page.count("script")
    assert HOSTILE in page.text and "_<b>$a_{$" in page.text
    assert page.count("pre") == 2


def test_a_page_without_a_held_out_log_says_so() -> None:
    one = replace(arm2(), validations=arm2().validations[:1])
    page = Page(render(one))
    assert "No log was held out" in page.text and "first.csv, the log fitted" in page.text
    assert page.count("svg") == 5
    none = Page(render(replace(one, validations=(), trained=())))
    assert "No recording was looked at" in none.text and none.count("svg") == 2 and "Torques" not in none.text


def test_a_page_without_open_loop_windows() -> None:
    one = arm2()
    seen = replace(one.validations[1][1], before=None, after=None)
    page = Page(render(replace(one, validations=(("held out: second.csv", seen),))))
    assert "No stretch of motion is long enough" in page.text and "predicts joint positions" not in page.text
    only = replace(one.validations[1][1], before=None)
    assert "model file:" not in verdict(replace(one, validations=(("held out", only),)))


@pytest.mark.parametrize("rotors", [True, False])
def test_a_page_of_a_single_joint(tmp_path: Path, rotors: bool) -> None:
    path = tmp_path / "one.xml"
    path.write_text(ONE_JOINT)
    spec = FitSpec(draws=20, friction=FrictionSpec(terms=("coulomb", "viscous")), rotors=rotors)
    fit, log, own, other = fitted(load_model(str(path)), spec, seconds=6.0)
    page = Page(render(replace(arm2(), fit=fit, trained=(log,), validations=(("training log", own), ("held out", other)))))
    assert "as the recipe names it" in page.text and "_$turn$" in page.text
    assert page.count("svg") == 4  # too short a log for a closer look at a part of it
    assert tables.number(fit.tree.friction[0]) in page.text.split()


def test_nothing_is_written_when_a_figure_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("the one before")

    def fail(*arguments: object) -> str:
        raise RuntimeError("no ink")

    with monkeypatch.context() as patch:
        patch.setattr(figures, "draw_friction", fail)
        with pytest.raises(RuntimeError, match="no ink"):
            write_report(path, arm2())
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        patch.setattr("mbctrl.calibrate.report.render", lambda one: "half a page")
        with pytest.raises(RuntimeError, match="no ink"):
            write_report(path, arm2())
    assert path.read_text() == "the one before" and list(tmp_path.iterdir()) == [path]


def test_warnings_come_once_and_name_what_is_wrong() -> None:
    one = arm2()
    seen = one.validations[1][1]
    far = replace(seen, extrapolation=7.0)
    worse = replace(
        seen, fit=replace(seen.fit, relative=2 * seen.prior.relative), after=replace(seen.after, total=9 + seen.before.total)
    )
    told = warnings(replace(one, warnings=("first.csv: x", "first.csv: x"), trained=(replace(one.trained[0], warnings=("x",)),)))
    assert told == ["first.csv: x", *one.fit.warnings]
    assert any(
        "second.csv moves in directions" in text and "7.0" in text for text in warnings(replace(one, validations=(("o", far),)))
    )
    assert report.by_file(["a: x", "y", "a: z", "b: w"], ["a", "c"]) == [("", ["y", "b: w"]), ("a", ["x", "z"])]
    found = warnings(replace(one, validations=(("held out", worse),)))
    assert any("explains less" in text for text in found) and any("in open loop" in text for text in found)
    assert 'class="verdict good"' in arm2_page() and 'class="verdict"' in render(replace(one, validations=(("held out", far),)))


def test_slow_structure_under_noise_is_told_from_noise() -> None:
    seen, rng = arm2().validations[1][1].fit, np.random.default_rng(0)
    noise = rng.standard_normal(seen.measured.shape)
    assert all(words.startswith("noise alone") for words in tables.memory(replace(seen, filtered=seen.predicted + noise)))
    slow = 0.7 * np.sin(0.5 * seen.t)[:, None] + 0.6 * noise
    assert all(words.startswith("slow structure") for words in tables.memory(replace(seen, filtered=seen.predicted + slow)))


@pytest.mark.parametrize(
    ("x", "text"),
    [(0, "0"), (1234.5, "1234"), (0.012345, "0.0123"), (-9.999, "-10.0"), (1e-7, "1.00e-07"), (2.5e7, "2.50e+07"), (np.nan, "-")],
)
def test_numbers(x: float, text: str) -> None:
    assert tables.number(x) == text


@pytest.mark.parametrize(
    ("x", "se", "text"), [(1.23456, 0.0123, "1.235"), (1.23456, 0.0995, "1.23"), (-0.0001, 0.31, "0.00"), (123.4, 25, "123")]
)
def test_values_have_the_digits_of_their_errors(x: float, se: float, text: str) -> None:
    assert tables.fixed(x, tables.decimals(se)) == text


def test_thin_lines_keep_peaks_and_gaps() -> None:
    t = np.arange(10000) / 100
    y = np.sin(t)
    y[4321], t[7000:] = 9.0, t[7000:] + 5
    few, values = thin(t, y, 400)
    assert len(few) < 420 and np.nanmax(values) == 9.0 and few[np.nanargmax(values)] == t[4321]
    assert np.isnan(values).sum() == 1 and np.isnan(few[(few < t[7000]).sum()])
