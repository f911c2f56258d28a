"""Model files with calibrated parameters in them, for other programs: MJCF out of any model, URDF out of a URDF."""

from __future__ import annotations

import logging
import xml.etree.ElementTree as ET
from pathlib import Path

import mujoco
import numpy as np

from mbctrl.base.errors import ModelError
from mbctrl.base.files import write_whole
from mbctrl.base.parameters import FittedParameters, JointParameters
from mbctrl.dynamics.load import calibrated, described, tree_from_mujoco
from mbctrl.dynamics.parameters import check_applied

_log = logging.getLogger(__name__)
_UNNAMED = "unnamed:"  # bodies and frames without a name have one while they are looked up


def export_mjcf(robot: str, parameters: FittedParameters, path: str | Path) -> None:
    """Write a robot's model with calibrated parameters as one MJCF file, its numbers in full; meshes are named where they lie.

    Args:
        robot: as ``load_model``.

    Errors:
        SpecError, ModelError: as ``load_model``; and for dm_control's models with meshes, which have no files.
    """
    _, source = described(robot, parameters)
    spec, _, values = calibrated(source, parameters)
    if source.startswith("dm_control:") and spec.meshes:
        raise ModelError("its meshes are inside dm_control: no MJCF file could name them", file=source)
    folder = Path(source).resolve().parent
    if spec.meshes or spec.hfields or any(texture.file for texture in spec.textures):
        spec.meshdir, spec.texturedir = str(folder / spec.meshdir), str(folder / spec.texturedir)
    for i, element in enumerate([*spec.bodies[1:], *spec.frames]):
        element.name = element.name or f"{_UNNAMED}{i}"
    mj = spec.compile()
    spec.compiler.saveinertial = True
    root = ET.fromstring(spec.to_xml())
    _in_full(root, spec, mj)
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode") + "\n"
    again = mujoco.MjModel.from_xml_string(text)
    check_applied(again, tree_from_mujoco(again, source), values, source)
    write_whole(path, text)


def _in_full(root: ET.Element, spec: mujoco.MjSpec, mj: mujoco.MjModel) -> None:
    """Put the numbers that dynamics depend on into MuJoCo's XML, which has six digits of them."""
    option = root.find("option")
    option = ET.SubElement(root, "option") if option is None else option
    _write(option, gravity=mj.opt.gravity, timestep=mj.opt.timestep)
    for number, key in enumerate(root.iter("key")):
        if "qpos" in key.attrib:
            _write(key, qpos=mj.key_qpos[number])
    world = root.find("worldbody")
    for element in [element for element in world.iter() if element.get("name")]:
        tag, name = element.tag, element.get("name")
        if tag in ("frame", "body"):
            _place(element, getattr(spec, tag)(name))
        elif tag == "site" and np.isnan(spec.site(name).fromto[0]):
            _place(element, spec.site(name))
        elif tag == "joint":
            _write_joint(element, mj, spec.joint(name))
        inertial = element.find("inertial")
        if inertial is not None:
            body = mj.body(name)
            _write(inertial, pos=body.ipos, quat=body.iquat, mass=body.mass, diaginertia=body.inertia)
        if name.startswith(_UNNAMED):
            del element.attrib["name"]


def _place(element: ET.Element, own: mujoco.MjsBody | mujoco.MjsFrame | mujoco.MjsSite) -> None:
    """Write a pose as the model gives it, in the frame it is given in."""
    quaternion = own.quat
    if own.alt.type != mujoco.mjtOrientation.mjORIENTATION_QUAT:
        quaternion = mujoco.MjSpec.resolve_orientation(own.compiler.degree, own.compiler.eulerseq, own.alt)
    _write(element, pos=own.pos, quat=quaternion)


def _write_joint(element: ET.Element, mj: mujoco.MjModel, own: mujoco.MjsJoint) -> None:
    # All of them: the writer leaves out what a default class has, and that has six digits too.
    j = mj.joint(own.name).id
    dof, q = mj.jnt_dofadr[j], mj.jnt_qposadr[j]
    _write(element, pos=own.pos, axis=own.axis, armature=mj.dof_armature[dof], damping=mj.dof_damping[dof])
    _write(element, frictionloss=mj.dof_frictionloss[dof], stiffness=mj.jnt_stiffness[j], springref=mj.qpos_spring[q])
    _write(element, ref=mj.qpos0[q])
    if mj.jnt_limited[j]:
        _write(element, range=mj.jnt_range[j])


def export_urdf(robot: str, parameters: FittedParameters, path: str | Path) -> None:
    """Write a robot's own URDF with calibrated parameters in it: inertials, damping and Coulomb friction.

    The links of fixed joints lose their inertials to the link they are fixed to. A URDF has no place for armature: where
    there is some, a warning says so.

    Args:
        robot: a URDF, or a robot whose model is one.

    Errors:
        SpecError, ModelError: as ``load_model``; and for robots that are no URDF.
    """
    _, source = described(robot, parameters)
    if Path(source).suffix != ".urdf":
        raise ModelError("is no URDF, and a URDF is only made out of a URDF: export it as MJCF", file=source)
    values = calibrated(source, parameters)[2]
    root = ET.parse(source, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))).getroot()
    links = {link.get("name"): link for link in root.iter("link")}
    for joint in root.findall("joint"):
        if joint.get("name") in values:
            own = values[joint.get("name")]
            _write(_child(joint, "dynamics"), damping=own.damping, friction=own.friction)
            link = joint.find("child").get("link")
            _write_inertial(links[link], own)
            _clear_fixed(root, links, link)
    rotors = [name for name, own in values.items() if own.armature]
    if rotors:
        _log.warning("%s: a URDF cannot hold the armature of %s", path, ", ".join(rotors))
    folder = Path(source).resolve().parent
    for element in [*root.iter("mesh"), *root.iter("texture")]:
        if (folder / element.get("filename", "")).is_file():
            element.set("filename", str(folder / element.get("filename")))
    write_whole(path, '<?xml version="1.0"?>\n' + ET.tostring(root, encoding="unicode") + "\n")


def _write_inertial(link: ET.Element, own: JointParameters) -> None:
    for old in link.findall("inertial"):
        link.remove(old)
    inertial = ET.Element("inertial")
    link.insert(0, inertial)
    _write(ET.SubElement(inertial, "origin"), xyz=own.com, rpy=(0, 0, 0))
    _write(ET.SubElement(inertial, "mass"), value=own.mass)
    _write(ET.SubElement(inertial, "inertia"), **dict(zip(("ixx", "iyy", "izz", "ixy", "ixz", "iyz"), own.inertia)))
    ET.indent(inertial, level=2)
    inertial.tail = "\n    "


def _clear_fixed(root: ET.Element, links: dict[str | None, ET.Element], link: str | None) -> None:
    """Take the inertials of every link fixed to ``link`` away."""
    for joint in root.findall("joint"):
        if joint.get("type") == "fixed" and joint.find("parent").get("link") == link:
            child = joint.find("child").get("link")
            for old in links[child].findall("inertial"):
                links[child].remove(old)
            _clear_fixed(root, links, child)


def _child(element: ET.Element, tag: str) -> ET.Element:
    found = element.find(tag)
    return ET.SubElement(element, tag) if found is None else found


def _write(element: ET.Element, **values: object) -> None:
    """Set attributes to numbers or rows of them, to the last digit."""
    for key, value in values.items():
        element.set(key, " ".join(repr(float(number)) for number in np.ravel(value)))
