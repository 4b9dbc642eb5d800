"""Puppets: pictures of articulated people, drawn here, that stand in for COCO, CrowdPose and PoseTrack18 without a download.

Idea     Sample a scene (numbers only), draw it once as a picture and once as a map of who is where, read the
         annotation off the map. The same scene can be drawn in another style, with the same annotation.
Read     POSES → Person → joints_of → shapes_of → Canvas → annotate → sample_scene → make
Figure   A kinematic chain; stature (sole to crown, standing) is 1. A joint's angles turn everything below it.

                 head_top                      body axes      x  the person's left
             ear ( o o ) ear                                  y  up
                  \\_^_/   eyes and nose ride                  z  forward
                   neck   on a sphere
      R shoulder ---+--- L shoulder            camera axes    x  right in the image
          |         |        |                                y  up  (rows grow downwards: row = -y)
      R elbow     spine   L elbow                             z  towards the viewer; larger is nearer
          |         |        |
      R wrist  --pelvis--  L wrist             yaw 0 faces the viewer, so the person's left is at the
            R hip     L hip                    image's right; yaw +90 faces right; 180 shows the back
              |         |                      (left is at the image's left). Colours are the same on
            R knee    L knee                   both sides: only the facing direction tells left.
              |         |
           R ankle   L ankle                   Projection: orthographic, camera a little above or below.

Units    Keypoints are pixel indices as in COCO (x = 0 is the middle of the first pixel, so a mirror image has
         w - 1 - x), with one decimal because our images are a quarter of COCO's. Boxes are x, y, w, h from corners.
Labels   v = 2 seen, 1 inside the image but hidden (own body, others, objects), 0 outside or left out at random.
         `bbox` and `area` come from the pixels of the person that are seen. People have no `segmentation`.

    python -m data.puppets --part coco                     makes data/puppets/coco (train 4,000, val 500 images)
    python -m data.puppets --part coco --preview sheet.png a contact sheet with the annotation drawn on it
"""
from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm import tqdm

from common.runtime import UserError

VERSION = 1                                   # raise it when the same seed gives another picture
ROOT = Path(__file__).resolve().parent / "puppets"
SIZE = 160                                    # side of the square images in pixels
COUNTS = {"coco": {"train": 4000, "val": 500}, "crowd": {"val": 300}, "video": {"train": 80, "val": 20},
          "ood": {"val": 500}}                # images; for video, clips
FRAMES = 12                                   # per clip

COCO = ("nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
        "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle").split()
COCO_EDGES = [[16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9], [8, 10],
              [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7]]          # 1-based, as in the files
JOINTS = [*COCO, "neck", "head_top"]          # what a figure has; the sets below pick from it
CROWDPOSE = [*COCO[5:], "head_top", "neck"]   # the file calls head_top "head"
POSETRACK = ["nose", "neck", "head_top", *COCO[3:]]   # the file calls neck "head_bottom"; its ears are never labelled
INDEX = {name: i for i, name in enumerate(JOINTS)}


# ---------------------------------------------------------------------------------------------------------------- poses
# Angles in degrees: (low, high). flex swings forward, abduct sideways, turn rolls the arm outwards, knee and elbow bend.
LEGS = {  # weight, trunk (pitch, twist), then one row of (flex, abduct, knee) per leg; the rows are dealt to left and right
    "stand": (.34, (-4, 8), ((-5, 9), (1, 9), (0, 8)), ((-5, 9), (1, 9), (0, 8))),
    "walk": (.20, (0, 10), ((15, 36), (0, 6), (4, 25)), ((-26, -8), (0, 6), (6, 40))),
    "run": (.08, (6, 20), ((40, 75), (0, 8), (55, 100)), ((-30, -10), (0, 8), (15, 70))),
    "sit": (.15, (-8, 15), ((76, 96), (4, 20), (70, 100)), ((76, 96), (4, 20), (70, 100))),
    "crouch": (.07, (12, 35), ((88, 120), (6, 28), (100, 135)), ((88, 120), (6, 28), (100, 135))),
    "lunge": (.06, (0, 18), ((55, 85), (2, 14), (60, 95)), ((-25, -6), (2, 14), (5, 35))),
    "star": (.06, (-6, 6), ((-5, 15), (18, 38), (0, 25)), ((-5, 15), (18, 38), (0, 25))),
    "bow": (.04, (28, 48), ((-2, 10), (1, 9), (0, 12)), ((-2, 10), (1, 9), (0, 12))),
}
ARMS = {  # weight, (flex, abduct, turn, elbow)
    "hang": (.36, ((-14, 18), (5, 18), (-10, 10), (4, 35))),
    "raise": (.14, ((140, 174), (-2, 28), (-15, 15), (0, 55))),
    "side": (.10, ((-8, 20), (60, 98), (-20, 30), (0, 50))),
    "wave": (.11, ((-8, 15), (62, 98), (65, 100), (55, 115))),
    "hip": (.08, ((-22, -6), (36, 50), (-85, -65), (75, 100))),
    "forward": (.12, ((55, 100), (-4, 18), (-15, 15), (0, 60))),
    "fold": (.09, ((18, 50), (2, 18), (-55, -25), (80, 130))),
}
TRUNK, ARM, LEG = ("pitch", "roll", "twist", "nod", "tilt", "look"), ("flex", "abduct", "turn", "elbow"), ("flex", "abduct", "knee")


def sample_pose(rng: np.random.Generator) -> np.ndarray:
    """(20,) angles in degrees: six of the TRUNK, four per ARM (left, right), three per LEG (left, right)."""
    def within(ranges):
        return [rng.uniform(low, high) for low, high in ranges]

    names = list(LEGS)
    legs = names[rng.choice(len(names), p=[LEGS[name][0] for name in names])]
    _, pitch, *rows = LEGS[legs]
    if rng.random() < .5:
        rows = rows[::-1]
    trunk = within([pitch, (-7, 7), (-14, 14), (-12, 18), (-10, 10), (-32, 32)])
    names = list(ARMS)
    left, right = rng.choice(len(names), size=2, p=[ARMS[name][0] for name in names])
    if rng.random() < .5:
        right = left
    return np.array(trunk + within(ARMS[names[left]][1]) + within(ARMS[names[right]][1])
                    + within(rows[0]) + within(rows[1]))


# --------------------------------------------------------------------------------------------------------------- figure
@dataclass
class Person:
    """Everything that decides how one person is drawn; x, y and height in pixels, angles in degrees."""
    x: float                  # where the pelvis stands, pixels
    ground: float             # row of the lowest foot
    height: float             # stature in pixels
    yaw: float
    lean: float               # of the whole figure, sideways
    camera: float             # pitch of the camera; positive looks down
    pose: np.ndarray
    build: float              # thickness, 1 is average
    child: float              # 0 adult, 1 small child: bigger head, shorter legs
    colours: dict             # skin, hair, shirt, legs, shoes: RGB
    sleeve: float             # share of the arm that is covered
    bottom: str               # trousers, shorts or skirt
    long_hair: bool
    bald: bool


def turn(axis: str, degrees: float) -> np.ndarray:
    """Right-handed rotation about one axis, (3, 3)."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows = {"x": ((1, 0, 0), (0, c, -s), (0, s, c)), "y": ((c, 0, s), (0, 1, 0), (-s, 0, c)),
            "z": ((c, -s, 0), (s, c, 0), (0, 0, 1))}
    return np.array(rows[axis])


MIRROR = np.array([-1., 1., 1.])              # left to right, in body axes
DOWN = np.array([0., -1., 0.])


@dataclass
class Body:
    """A posed figure in pixels: columns, rows, and z towards the viewer in the same unit."""
    at: dict                  # joint, toe, hand and centre names -> (3,)
    chest: np.ndarray         # (3, 3), columns: the chest's left, up, forward in image axes
    pelvis: np.ndarray
    skull: np.ndarray
    head_radius: float        # pixels
    joints: np.ndarray        # (19, 3), rows of JOINTS


def joints_of(person: Person) -> Body:
    """Forward kinematics: angles and proportions -> where every joint is, in image pixels."""
    pitch, roll, twist, nod, tilt, look = person.pose[:6]
    k = person.child
    head, trunk, thigh, shin = .088 + .028 * k, .275 - .01 * k, .24 - .035 * k, .23 - .035 * k    # head: radius
    upper, fore, shoulder, hip = .165 - .02 * k, .145 - .02 * k, .118 * (.6 + .4 * person.build), .066
    world = turn("x", person.camera) @ turn("z", person.lean) @ turn("y", person.yaw)
    chest = turn("y", twist) @ turn("z", -roll) @ turn("x", pitch)
    skull = chest @ turn("y", look) @ turn("z", tilt) @ turn("x", nod - .6 * pitch)        # people look ahead

    at = {"pelvis": np.zeros(3)}
    at["collar"] = chest @ [0, trunk, 0]
    at["neck"] = chest @ [0, trunk + .02, 0]
    at["head"] = chest @ [0, trunk + .045, .012] + skull @ [0, head * 1.0, .01]
    for side, name, angles in ((np.ones(3), "left", person.pose[6:10]), (MIRROR, "right", person.pose[10:14])):
        flex, abduct, roll_arm, elbow = angles
        swing = turn("z", abduct) @ turn("x", -flex) @ turn("y", roll_arm)
        at[f"{name}_shoulder"] = chest @ (side * [shoulder, trunk - .012, 0])
        at[f"{name}_elbow"] = at[f"{name}_shoulder"] + chest @ (side * (swing @ DOWN)) * upper
        hand = chest @ (side * (swing @ turn("x", -elbow) @ DOWN))
        at[f"{name}_wrist"] = at[f"{name}_elbow"] + hand * fore
        at[f"{name}_hand"] = at[f"{name}_wrist"] + hand * .045
    for side, name, angles in ((np.ones(3), "left", person.pose[14:17]), (MIRROR, "right", person.pose[17:20])):
        flex, abduct, knee = angles
        swing = turn("z", abduct) @ turn("x", -flex)
        at[f"{name}_hip"] = side * [hip, -.005, 0]
        at[f"{name}_knee"] = at[f"{name}_hip"] + side * (swing @ DOWN) * thigh
        swing = swing @ turn("x", knee)
        at[f"{name}_ankle"] = at[f"{name}_knee"] + side * (swing @ DOWN) * shin
        at[f"{name}_toe"] = at[f"{name}_ankle"] + side * (swing @ [0, -.035, .095])

    flip_rows = np.array([[1.], [-1.], [1.]])                       # y up -> rows down
    points = np.stack(list(at.values())) @ world.T * flip_rows.T * person.height
    soles = max(point[1] for name, point in zip(at, points) if name[-3:] in ("kle", "toe")) + .03 * person.height
    points += [person.x, person.ground - soles, 0]
    at = dict(zip(at, points))
    axes = [flip_rows * (world @ frame) for frame in (chest, np.eye(3), skull)]
    body = Body(at, *axes, head * person.height, None)
    for name, direction in FACE.items():
        at[name] = on_head(body, direction)
    body.joints = np.stack([at[name] for name in JOINTS])
    return body


def unit(*direction: float) -> np.ndarray:
    return np.array(direction) / np.linalg.norm(direction)


# Directions from the head's centre, in the skull's axes (left, up, forward). Length 1 lies on the head.
FACE = {"nose": unit(0, -.16, 1) * 1.1, "left_eye": unit(.42, .12, .9), "right_eye": unit(-.42, .12, .9),
        "left_ear": unit(1, -.02, -.1), "right_ear": unit(-1, -.02, -.1), "head_top": np.array([0., 1.0, 0.])}
HEAD_WIDTH = .84                              # of its height


def head_axes(body: Body) -> tuple[np.ndarray, np.ndarray]:
    """The head is an ellipse in the image: unit vectors across it and up it, (2,) each."""
    up = body.skull[:2, 1]
    up = up / max(np.linalg.norm(up), 1e-6)
    return np.array([-up[1], up[0]]), up


def on_head(body: Body, direction: np.ndarray) -> np.ndarray:
    """Image position (3,) of a direction of FACE, squeezed to the head's width as the drawing is."""
    across, up = head_axes(body)
    d = body.skull @ direction
    xy = across * (d[:2] @ across) * HEAD_WIDTH + up * (d[:2] @ up)
    return body.at["head"] + body.head_radius * np.array([*xy, d[2]])


# --------------------------------------------------------------------------------------------------------------- shapes
TORSO, HIPS, HEAD, ARM_L, FORE_L, LEG_L, SHIN_L, ARM_R, FORE_R, LEG_R, SHIN_R = range(11)     # parts of the id map
OBJECT, GROUP, FIRST = 1, 2, 16               # values of the id map; person p has 16 * (p + 1) + part
SEEN_ON = {"neck": (TORSO, HEAD), "head_top": (HEAD,), "nose": (HEAD,)}       # parts that show a joint when on top
for _side, _arm, _fore, _leg, _shin in (("left", ARM_L, FORE_L, LEG_L, SHIN_L), ("right", ARM_R, FORE_R, LEG_R, SHIN_R)):
    SEEN_ON |= {f"{_side}_eye": (HEAD,), f"{_side}_ear": (HEAD,), f"{_side}_shoulder": (_arm, TORSO),
                f"{_side}_elbow": (_arm, _fore), f"{_side}_wrist": (_fore,), f"{_side}_hip": (_leg, HIPS, TORSO),
                f"{_side}_knee": (_leg, _shin), f"{_side}_ankle": (_shin,)}


@dataclass
class Shape:
    """One flat polygon, or the head; drawn in order of z."""
    z: float
    part: int
    colour: tuple
    points: list              # [(column, row), ...]
    light: list = field(default_factory=list)        # a smaller polygon inside, on the lit side
    head: tuple | None = None                        # (Body, Person) for the head


ARC = [(math.cos(a), math.sin(a)) for a in np.linspace(-math.pi / 2, math.pi / 2, 6)]


def capsule(p, q, r: float, s: float) -> list:
    """Outline of a limb: circle of radius r at p, of radius s at q, joined."""
    dx, dy = q[0] - p[0], q[1] - p[1]
    length = math.hypot(dx, dy) or 1.
    c, d = dx / length, dy / length
    return ([(q[0] + s * (u * c - v * d), q[1] + s * (u * d + v * c)) for u, v in ARC]
            + [(p[0] - r * (u * c - v * d), p[1] - r * (u * d + v * c)) for u, v in ARC])


def limb(z, part, colour, p, q, r, s, sun) -> Shape:
    """A capsule with a lit side; `sun` is the image direction of the light, (2,)."""
    dx, dy = q[0] - p[0], q[1] - p[1]
    length = math.hypot(dx, dy) or 1.
    side = (sun[0] * -dy + sun[1] * dx) / length                    # how much the light comes across the limb
    ox, oy = -dy / length * side * .42, dx / length * side * .42
    light = capsule((p[0] + ox * r, p[1] + oy * r), (q[0] + ox * s, q[1] + oy * s), r * .55, s * .55)
    return Shape(z, part, colour, capsule(p, q, r, s), light)


def trunk_outline(body: Body, rings: list, shrink: float = 1., shift=(0., 0.)) -> list:
    """Silhouette of a stack of ellipses along the spine: (height from pelvis 0 to collar 1, half width, half depth).

    An ellipse with semi-axes a·L and b·F seen from the side reaches √((a L·n)² + (b F·n)²) along n.
    """
    low, high = body.at["pelvis"], body.at["collar"]
    spine = high[:2] - low[:2]
    n = np.array([-spine[1], spine[0]]) / max(np.linalg.norm(spine), 1e-6)
    left, right = [], []
    for t, a, b in rings:
        frame = body.pelvis + min(max(t, 0.), 1.) * (body.chest - body.pelvis)
        reach = shrink * math.hypot(a * (frame[:2, 0] @ n), b * (frame[:2, 2] @ n))
        centre = low[:2] + t * spine + shift
        left.append(tuple(centre + n * reach))
        right.append(tuple(centre - n * reach))
    return left + right[::-1]


def hull(points: list) -> list:
    """Convex hull, counter-clockwise (monotone chain)."""
    def half(ordered):
        chain = []
        for x, y in ordered:
            while len(chain) > 1 and ((chain[-1][0] - chain[-2][0]) * (y - chain[-2][1])
                                      <= (chain[-1][1] - chain[-2][1]) * (x - chain[-2][0])):
                chain.pop()
            chain.append((x, y))
        return chain[:-1]
    ordered = sorted(set(points))
    return half(ordered) + half(ordered[::-1])


def shapes_of(person: Person, body: Body, sun) -> list[Shape]:
    """All shapes of one person, far to near, in image pixels."""
    at, h, c = body.at, person.height, person.colours
    w = h * person.build * (1 - .12 * person.child)                  # unit of thickness
    spine_z = (at["pelvis"][2] + at["collar"][2]) / 2
    shapes = []
    for side, upper, fore, leg, shin in (("left", ARM_L, FORE_L, LEG_L, SHIN_L), ("right", ARM_R, FORE_R, LEG_R, SHIN_R)):
        shoulder, elbow, wrist, hand, hip, knee, ankle, toe = (
            at[f"{side}_{name}"] for name in ("shoulder", "elbow", "wrist", "hand", "hip", "knee", "ankle", "toe"))
        z_upper, z_fore = (shoulder[2] + 2 * elbow[2]) / 3 + .02 * h, (elbow[2] + wrist[2]) / 2 + .03 * h
        z_leg, z_shin = (hip[2] + 2 * knee[2]) / 3 - .03 * h, (knee[2] + ankle[2]) / 2 - .035 * h
        sleeve = person.sleeve
        shapes.append(limb(z_upper, upper, c["shirt"] if sleeve > .3 else c["skin"], shoulder, elbow, .044 * w, .034 * w, sun))
        if .3 < sleeve < .6:                                         # short sleeve: the lower part of the arm is bare
            cut = shoulder + .62 * (elbow - shoulder)
            shapes[-1] = limb(z_upper, upper, c["skin"], shoulder, elbow, .038 * w, .032 * w, sun)
            shapes.append(limb(z_upper + .001, upper, c["shirt"], shoulder, cut, .047 * w, .042 * w, sun))
        shapes.append(limb(z_fore, fore, c["shirt"] if sleeve > .6 else c["skin"], elbow, wrist, .034 * w, .026 * w, sun))
        shapes.append(limb(z_fore + .001, fore, c["skin"], wrist, hand, .025 * w, .028 * w, sun))
        covered = c["legs"] if person.bottom == "trousers" else c["skin"]
        shapes.append(limb(z_leg, leg, c["skin"] if person.bottom == "skirt" else c["legs"], hip, knee, .06 * w, .044 * w, sun))
        shapes.append(limb(z_shin, shin, covered, knee, ankle, .043 * w, .029 * w, sun))
        shapes.append(limb(z_shin + .001 + .02 * h * (toe[2] > ankle[2]), shin, c["shoes"], ankle, toe, .031 * w, .024 * w, sun))
    shift = (.025 * w * sun[0], 0)
    waist = [(-.22, .05, .05), (-.1, .09, .07), (.05, .098, .075), (.2, .088, .068)]
    shirt = [(.04, .1, .077), (.38, .086, .066), (.72, .108, .078), (.93, .122, .066), (1.0, .095, .05), (1.07, .04, .04)]
    def rings(table):
        return [(t, a * w, b * w) for t, a, b in table]
    shapes.append(Shape(spine_z - .01 * h, HIPS, c["legs"], trunk_outline(body, rings(waist))))
    shapes.append(Shape(spine_z, TORSO, c["shirt"], trunk_outline(body, rings(shirt)),
                        trunk_outline(body, rings(shirt), .55, shift)))
    if person.bottom == "skirt":
        hem = []
        for side in ("left", "right"):
            knee, hip = at[f"{side}_knee"], at[f"{side}_hip"]
            hem += capsule(hip, hip + .72 * (knee - hip), .07 * w, .075 * w)
        z = max(shape.z for shape in shapes if shape.part in (LEG_L, LEG_R)) + .002 * h
        shapes.append(Shape(z, HIPS, c["legs"], hull(hem + trunk_outline(body, rings(waist[1:])))))
    head, r = at["head"], body.head_radius
    z_head = head[2] + .035 * h
    chin = head - .5 * r * np.array([*body.skull[:2, 1], 0])
    shapes.append(limb(min(z_head, spine_z) - .002, HEAD, c["skin"], at["neck"], chin, .04 * w, .04 * w, sun))
    shapes.append(Shape(z_head, HEAD, c["skin"], [], head=(body, person)))
    for ear in ("left_ear", "right_ear"):
        facing = body.skull[2] @ FACE[ear]
        up = .22 * r * np.array([*body.skull[:2, 1], 0])
        z = z_head + (.002 if facing > -.2 else -.002)
        dark = tuple(int(.86 * value) for value in c["skin"])
        shapes.append(Shape(z, HEAD, dark, capsule(at[ear] - .5 * up, at[ear] + .5 * up, .17 * r, .2 * r)))
    if body.skull[2] @ FACE["nose"] > -.3:
        tip = at["nose"]
        bridge = tip + .22 * r * np.array([*body.skull[:2, 1], 0])
        warm = tuple(int(scale * value) for scale, value in zip((.97, .8, .76), c["skin"]))
        behind = body.skull[2] @ FACE["nose"] < 0
        shapes.append(Shape(z_head + (-.001 if behind else .003), HEAD, warm, capsule(bridge, tip, .09 * r, .15 * r)))
    if person.long_hair:
        back = head - r * .35 * np.array([*body.skull[:2, 2], 0])
        end = back - 1.35 * r * np.array([*body.skull[:2, 1], 0])
        z = z_head - .0015 if body.skull[2, 2] > 0 else max(z_head + .004, spine_z + .001 * h)
        shapes.append(Shape(z if body.skull[2, 2] <= 0 else min(z, spine_z - .003), HEAD, c["hair"], capsule(back, end, .86 * r, .7 * r)))
    return sorted(shapes, key=lambda shape: shape.z)


# -------------------------------------------------------------------------------------------------------------- drawing
@dataclass
class Thing:
    """An object without joints: clutter behind the people, or something that hides a part of them."""
    kind: str                 # bar, box, ellipse, leaf
    x: float
    y: float
    w: float
    h: float
    angle: float
    colour: tuple


@dataclass
class Group:
    """Far people that nobody would annotate one by one: one `iscrowd` region."""
    people: list


@dataclass
class Scene:
    """What there is to see; nothing random is left to the drawing except `seed` for grain."""
    size: int
    seed: int
    sun: tuple                # image direction the light comes from
    horizon: float            # row where the floor begins
    walls: list               # (texture, column, row of its crop, dark colour, bright colour) of wall and floor
    layers: list              # Thing, Group and Person, far to near
    finish: tuple             # (grain, blur radius, brightness)


@lru_cache(maxsize=1)
def textures() -> list[Image.Image]:
    """Gray 512x512 patterns, the same in every process: clouds, blotches, stripes, tiles, leaves."""
    rng = np.random.default_rng(2017)
    bank = []
    for i in range(20):
        clouds = np.zeros((512, 512))
        for cells in (4, 9, 20, 48, 128):
            grid = Image.fromarray(rng.random((cells, cells), np.float32)).resize((512, 512), Image.BICUBIC)
            clouds += np.asarray(grid) / cells ** .6
        clouds = (clouds - clouds.min()) / np.ptp(clouds)
        y, x = np.mgrid[:512, :512]
        period = rng.integers(14, 48)
        kind = i % 5
        if kind == 1:
            clouds = (clouds > .5) * .5 + clouds * .5
        elif kind == 2:
            clouds = ((x * math.cos(i) + y * math.sin(i)) // period % 2) * .4 + clouds * .6
        elif kind == 3:
            row = y // period
            seam = (y % period < 2) | ((x + row % 2 * period) % (2 * period) < 2)
            clouds = np.where(seam, 0., .35 + .65 * clouds)
        picture = Image.fromarray(np.uint8(255 * clouds))
        if kind == 4:
            pen = ImageDraw.Draw(picture)
            for px, py, r, shade in zip(*rng.uniform(-10, 522, (2, 350)), rng.uniform(5, 22, 350), rng.integers(0, 256, 350)):
                pen.polygon(capsule((px, py), (px + r, py + rng.uniform(-r, r)), r * .5, 1), fill=int(shade))
        bank.append(picture)
    return bank


class Canvas:
    """A picture and its id map, both drawn at twice the size: pixel x of the scene is column 2x + 0.5 here."""

    def __init__(self, scene: Scene):
        self.scene, self.side = scene, 2 * scene.size
        self.picture = Image.new("RGB", (self.side, self.side))
        self.ids = Image.new("L", (self.side, self.side))
        self.backdrop()
        self.pen, self.id_pen = ImageDraw.Draw(self.picture), ImageDraw.Draw(self.ids)
        people = 0
        for layer in scene.layers:
            if isinstance(layer, Thing):
                self.thing(layer)
            elif isinstance(layer, Group):
                self.group(layer)
            else:
                self.person(layer, FIRST * (people + 1))
                people += 1

    def backdrop(self):
        horizon = int(2 * self.scene.horizon)
        for (texture, x, y, dark, bright), top in zip(self.scene.walls, (0, horizon)):
            crop = textures()[texture].resize((self.side, self.side), Image.BILINEAR, (x, y, x + 180, y + 180))
            channels = [crop.point([int(a + (b - a) * t / 255) for t in range(256)]) for a, b in zip(dark, bright)]
            self.picture.paste(Image.merge("RGB", channels), (0, top))

    def polygon(self, points: list, colour: tuple, ident: int):
        points = [(2 * x + .5, 2 * y + .5) for x, y in points]
        self.pen.polygon(points, fill=colour, outline=tuple(value * 5 // 9 for value in colour))
        self.id_pen.polygon(points, fill=ident)

    def light(self, points: list, colour: tuple):
        lit = tuple(min(255, value * 9 // 8 + 14) for value in colour)
        self.pen.polygon([(2 * x + .5, 2 * y + .5) for x, y in points], fill=lit)

    def thing(self, t: Thing):
        points, inner = thing_outline(t, 1.), thing_outline(t, .6)
        self.polygon(points, t.colour, OBJECT)
        self.light(inner, t.colour)

    def person(self, person: Person, base: int, body: Body | None = None):
        body = body or joints_of(person)
        for shape in shapes_of(person, body, self.scene.sun):
            ident = base + shape.part if base >= FIRST else base
            if shape.head:
                self.head(*shape.head, ident)
                continue
            self.polygon(shape.points, shape.colour, ident)
            if shape.light:
                self.light(shape.light, shape.colour)

    def head(self, body: Body, person: Person, ident: int):
        """A lit sphere with hair, eyes and mouth, pixel by pixel: n is the surface direction in the skull's axes."""
        r = 2 * body.head_radius
        cx, cy = 2 * body.at["head"][0] + .5, 2 * body.at["head"][1] + .5
        x0, y0, n = int(cx - r) - 1, int(cy - r) - 1, int(2 * r) + 4
        across, up = head_axes(body)
        dx, dy = np.arange(n) + x0 - cx, (np.arange(n) + y0 - cy)[:, None]
        u, v = (dx * across[0] + dy * across[1]) / (r * HEAD_WIDTH), (dx * up[0] + dy * up[1]) / r
        rim = u * u + v * v
        z = np.sqrt(np.clip(1 - rim, 0, 1))
        x, y = across[0] * u + up[0] * v, across[1] * u + up[1] * v
        left, high, front = (x * axis[0] + y * axis[1] + z * axis[2] for axis in body.skull.T)

        colour = np.empty((n, n, 3), np.float32)
        colour[:] = person.colours["skin"]
        colour[.80 * high - .6 * front > (.9 if person.bald else .04)] = person.colours["hair"]
        for eye in ("left_eye", "right_eye"):
            near = left * FACE[eye][0] + high * FACE[eye][1] + front * FACE[eye][2]
            colour[near > math.cos(.30)] = (245, 245, 245)
            colour[near > math.cos(.20)] = (25, 20, 30)
        colour[(abs(high + .52) < .075) & (abs(left) < .30) & (front > 0)] = (140, 45, 45)
        sun = self.scene.sun
        shade = .84 + .18 * (x * sun[0] + y * sun[1]) + .12 * z
        colour = np.clip(colour * np.where(rim > .86, .72, shade)[..., None], 0, 255)
        mask = Image.fromarray(np.uint8(255 * (rim < 1)))
        self.picture.paste(Image.fromarray(np.uint8(colour)), (x0, y0), mask)
        self.ids.paste(ident, (x0, y0), mask)

    def group(self, group: Group):
        for person in group.people:
            self.person(person, GROUP)
        box = self.ids.point([255 * (i == GROUP) for i in range(256)]).getbbox()
        if box:
            self.picture.paste(self.picture.crop(box).filter(ImageFilter.GaussianBlur(2.5)), box)

    def id_map(self) -> np.ndarray:
        """(size, size) uint8: 0 background, OBJECT, GROUP, or 16 * (person + 1) + part."""
        return np.asarray(self.ids)[::2, ::2]

    def photo(self) -> Image.Image:
        """Half size, with grain, blur and brightness."""
        grain, blur, brightness = self.scene.finish
        picture = self.picture.reduce(2)
        if blur > .3:
            picture = picture.filter(ImageFilter.GaussianBlur(blur))
        rng = np.random.default_rng(self.scene.seed)
        size = self.scene.size
        noise = rng.standard_normal((size, size, 1), np.float32) * grain
        return Image.fromarray(np.uint8(np.clip(np.asarray(picture, np.float32) * brightness + noise, 0, 255)))


def thing_outline(t: Thing, scale: float) -> list:
    """Polygon of a Thing, shrunk towards its centre by `scale`."""
    if t.kind == "ellipse":
        points = [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 20)]
    elif t.kind == "leaf":
        points = [(s * (1 - v * v) * .8, v) for s in (-1, 1) for v in np.linspace(-s, s, 9)]
    else:
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    c, s = math.cos(t.angle), math.sin(t.angle)
    points = [(x * t.w / 2 * scale, y * t.h / 2 * scale) for x, y in points]
    return [(t.x + c * x - s * y, t.y + s * x + c * y) for x, y in points]


# ----------------------------------------------------------------------------------------------------------- annotation
SHOWS = {"nose": -.15, "left_eye": .1, "right_eye": .1, "left_ear": -.25, "right_ear": -.25}     # least z of FACE


def joint_is_turned_away(body: Body, name: str) -> bool:
    """True where the joint is on the far side of its own head, chest or hips, which the id map cannot tell."""
    if name in SHOWS:
        return body.skull[2] @ FACE[name] < SHOWS[name]
    side = 1 if name.startswith("left") else -1
    if name.endswith("shoulder"):
        return side * body.chest[2, 0] < -.65
    if name.endswith("hip"):
        return side * body.pelvis[2, 0] < -.6
    return False


def annotate(scene: Scene, ids: np.ndarray) -> list[dict]:
    """One dict per person, in order of the layers: joints (19, 3) pixels with v, bbox xywh, area in pixels.

    A joint is seen when a third of the pixels around it belong to a part of its own person that carries it.
    """
    size, found = scene.size, []
    people = [layer for layer in scene.layers if isinstance(layer, Person)]
    for p, person in enumerate(people):
        body = joints_of(person)
        base = FIRST * (p + 1)
        joints = body.joints.copy()
        r = max(1., .012 * person.height)
        around = np.array([(0, 0), (r, 0), (-r, 0), (0, r), (0, -r), (r, r), (-r, r), (r, -r), (-r, -r)])
        for j, name in enumerate(JOINTS):
            xy = np.round(joints[j, :2] + around).astype(int)
            if not (-.5 <= joints[j, 0] < size - .5 and -.5 <= joints[j, 1] < size - .5):
                joints[j] = 0
                continue
            x, y = xy.clip(0, size - 1).T
            carried = np.isin(ids[y, x], [base + part for part in SEEN_ON[name]])
            joints[j, 2] = 2 if carried.mean() > .33 and not joint_is_turned_away(body, name) else 1
        rows, columns = np.nonzero(ids // FIRST == p + 1)
        box = [0, 0, 0, 0]
        if len(rows):
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        joints[:, :2] = joints[:, :2].clip(0, size - 1)
        found.append(dict(joints=joints.round(1), bbox=[int(value) for value in box], area=len(rows), body=body))
    return found


# --------------------------------------------------------------------------------------------------------------- scenes
SKIN = [(245, 214, 190), (232, 190, 160), (205, 155, 120), (165, 115, 82), (125, 82, 56), (88, 58, 42)]
HAIR = [(28, 22, 20), (62, 40, 26), (104, 66, 36), (196, 156, 84), (150, 70, 36), (150, 150, 150)]


def any_colour(rng, saturation=(.15, .9), value=(.25, .95)) -> tuple:
    """Random hue as RGB 0..255."""
    h, s, v = rng.random() * 6, rng.uniform(*saturation), rng.uniform(*value)
    return tuple(int(255 * (v - v * s * max(0, min(k, 4 - k, 1)))) for k in ((5 + h) % 6, (3 + h) % 6, (1 + h) % 6))


def sample_person(rng: np.random.Generator, camera: float) -> Person:
    """A person of stature 1 at the origin; the scene places and scales it."""
    child = rng.uniform(.5, 1) if rng.random() < .2 else 0.
    skin, hair = (table[rng.integers(len(table))] for table in (SKIN, HAIR))
    if sum(map(abs, np.subtract(skin, hair))) < 110:                # hair must stand out from skin
        hair = HAIR[3] if sum(skin) < 320 else HAIR[0]
    yaw = rng.choice([0, 180, 90, -90, 45, -45, 135, -135], p=[.3, .14, .1, .1, .12, .12, .06, .06]) + rng.normal(0, 14)
    return Person(0, 0, 1, yaw=yaw, lean=rng.normal(0, 4), camera=camera, pose=sample_pose(rng),
                  build=float(np.clip(rng.normal(1.05, .14), .8, 1.4)), child=child,
                  colours=dict(skin=skin, hair=hair, shirt=any_colour(rng), legs=any_colour(rng, (.1, .8), (.15, .8)),
                               shoes=any_colour(rng, (0, .6), (.1, .95))),
                  sleeve=rng.choice([.1, .5, 1.], p=[.15, .45, .4]),
                  bottom=str(rng.choice(["trousers", "shorts", "skirt"], p=[.55, .28, .17])),
                  long_hair=bool(rng.random() < .3), bald=bool(rng.random() < .06))


def place(rng, person: Person, size: int, share: float, slot: tuple[float, float], horizon: float, cut: bool) -> Person:
    """Scale so that the figure covers `share` of the image's height and stand it on the floor inside slot."""
    body = joints_of(person)
    rows = [point[1] for name, point in body.at.items() if name[-3:] in ("kle", "toe", "top", "ips", "lar")]
    extent = max(rows) - min(rows) + .03
    height = min(share * size / extent, 1.25 * size)
    drawn = height * extent
    ground = horizon + (size * .97 - horizon) * min(1, drawn / (.9 * size)) ** .8 + rng.normal(0, .02 * size)
    x = rng.uniform(*slot)
    if cut:
        if rng.random() < .6:
            ground += rng.uniform(.15, .5) * drawn
        else:
            x = rng.choice([0, size]) + rng.normal(0, .06 * size)
    return replace(person, x=x, ground=min(ground, size * .99) if not cut else ground, height=height)


def sample_thing(rng, size: int, x: float, y: float, scale: float) -> Thing:
    kind = str(rng.choice(["bar", "box", "ellipse", "leaf"]))
    w, h = {"bar": (.22, 1.9), "box": (.8, .7), "ellipse": (.7, .8), "leaf": (.35, 1.)}[kind]
    w, h = scale * w * rng.uniform(.6, 1.3), scale * h * rng.uniform(.7, 1.3)
    angle = rng.normal(0, .15) if kind in ("bar", "box") else rng.uniform(0, math.pi)
    return Thing(kind, x, y, w, h, angle, any_colour(rng, (.1, .8)))


def sample_scene(rng: np.random.Generator, size: int, people: int, crowd: bool = False, group: bool = False) -> Scene:
    """Backdrop, clutter, `people` on a floor, and things in front of them."""
    horizon = size * rng.uniform(.3, .55)
    camera = rng.uniform(-4, 14)
    walls = []
    for _ in range(2):
        low, high = any_colour(rng, (.05, .5), (.2, .6)), any_colour(rng, (.05, .45), (.5, .98))
        walls.append((int(rng.integers(20)), *rng.uniform(0, 330, 2), low, high))
    layers: list = [sample_thing(rng, size, *rng.uniform(0, size, 2), size * rng.uniform(.08, .32))
                    for _ in range(rng.integers(0, 5))]
    if group:
        x, scale = rng.uniform(.2, .8) * size, rng.uniform(.09, .15)
        layers.append(Group([place(rng, sample_person(rng, camera), size, scale, (x - .12 * size, x + .12 * size), horizon, False)
                             for _ in range(rng.integers(5, 9))]))
    standing = []
    slots = rng.permutation(people)
    for k in range(people):
        width = size / people
        slot = (width * (slots[k] + .15), width * (slots[k] + .85)) if not crowd else (.15 * size, .85 * size)
        share = (.2 + .75 * rng.beta(*((2.4, 1.6) if people == 1 else (2., 2.)))) if not crowd else rng.uniform(.3, .75)
        standing.append(place(rng, sample_person(rng, camera), size, share, slot, horizon, rng.random() < .2))
    for person in sorted(standing, key=lambda person: person.ground):
        if 60 < person.pose[14] and 60 < person.pose[17]:           # both thighs level: give it something to sit on
            layers.append(seat(rng, person))
        layers.append(person)
        if rng.random() < (.1 if crowd else .2):
            x, y = person.x + rng.normal(0, .12) * person.height, person.ground - rng.uniform(.0, .6) * person.height
            layers.append(sample_thing(rng, size, x, y, person.height * rng.uniform(.2, .42)))
    angle = rng.uniform(-2.6, -.5)
    finish = (rng.uniform(1, 7), max(0., rng.uniform(-.9, .8)), rng.uniform(.8, 1.12))
    return Scene(size, int(rng.integers(2 ** 31)), (math.cos(angle), math.sin(angle)), horizon, walls, layers, finish)


def seat(rng, person: Person) -> Thing:
    """A box from under the hips to the floor, drawn behind the person."""
    hips = joints_of(person).at["pelvis"]
    h = person.ground - hips[1] - .05 * person.height
    return Thing("box", hips[0], person.ground - h / 2, person.height * rng.uniform(.26, .4), h, 0., any_colour(rng, (.1, .6)))


def split_scene(size: int, seed: int, split: str, index: int) -> tuple[Scene, np.ndarray, list[dict]]:
    """Scene `index` of a split, its id map and its people. Depends on nothing else, so any worker may make it.

    People of whom too little is left to be told are taken out of the scene, and it is looked at again.
    """
    rng = np.random.default_rng([seed, ["train", "val", "crowd"].index(split), index])
    if split == "crowd":
        scene = sample_scene(rng, size, int(rng.integers(4, 11)), crowd=True)
    else:
        people = int(rng.choice(5, p=[.04, .40, .30, .17, .09]))
        scene = sample_scene(rng, size, people, group=rng.random() < .05)
    while True:
        canvas = Canvas(scene)
        found = annotate(scene, canvas.id_map())
        lost = [p for p, person in enumerate(found) if (person["joints"][:17, 2] == 2).sum() < (2 if split == "crowd" else 4)]
        if not lost:
            break
        people = [layer for layer in scene.layers if isinstance(layer, Person)]
        gone = [id(people[p]) for p in lost]
        scene = replace(scene, layers=[layer for layer in scene.layers if id(layer) not in gone])
    for person in found:                                             # annotators forget some
        person["joints"][rng.random(len(JOINTS)) < .03] = 0
    return scene, canvas, found


# -------------------------------------------------------------------------------------------------------------- writing
def coco_file(images: list, annotations: list, names=COCO) -> dict:
    """The top level of a COCO keypoint file; ids of annotations count from 1."""
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    category = dict(supercategory="person", id=1, name="person", keypoints=list(names), skeleton=COCO_EDGES)
    return dict(info=dict(description="Puppets", version=str(VERSION)), licenses=[], images=images,
                annotations=annotations, categories=[category])


def coco_image(index: int, split: str, size: int) -> dict:
    number = index + 1 + 100_000 * (split == "val")
    return dict(id=number, file_name=f"{number:012d}.jpg", width=size, height=size)


def pick(joints: np.ndarray, names: list) -> list:
    """Rows of `joints` in the order of `names` as COCO's flat list x, y, v."""
    return [int(value) if value == int(value) else float(round(value, 1))
            for value in joints[[INDEX[name] for name in names]].reshape(-1)]


def coco_annotations(image_id: int, canvas: Canvas, found: list[dict]) -> list[dict]:
    """People, then the far group as one `iscrowd` region with its box as a run-length mask."""
    result = [dict(image_id=image_id, category_id=1, iscrowd=0, bbox=person["bbox"], area=person["area"],
                   keypoints=pick(person["joints"], COCO), num_keypoints=int((person["joints"][:17, 2] > 0).sum()))
              for person in found]
    rows, columns = np.nonzero(canvas.id_map() == GROUP)
    if len(rows):
        x, y, w, h = int(columns.min()), int(rows.min()), int(np.ptp(columns) + 1), int(np.ptp(rows) + 1)
        mask = np.zeros((canvas.scene.size, canvas.scene.size), bool)
        mask[y:y + h, x:x + w] = True
        edges = np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=False, append=False))
        runs = np.diff(edges, prepend=0, append=mask.size)           # alternately outside and inside, column by column
        result.append(dict(image_id=image_id, category_id=1, iscrowd=1, bbox=[x, y, w, h], area=w * h, num_keypoints=0,
                           keypoints=[0] * 51, segmentation=dict(counts=runs.tolist(), size=[canvas.scene.size] * 2)))
    return result


def save(picture: Image.Image, path: Path):
    picture.save(path, quality=92)


def make_coco(folder: Path, size: int, seed: int, job: tuple[str, int]) -> tuple:
    split, index = job
    scene, canvas, found = split_scene(size, seed, split, index)
    image = coco_image(index, split, size)
    save(canvas.photo(), folder / f"{split}2017" / image["file_name"])
    return image, coco_annotations(image["id"], canvas, found)


def finish_coco(folder: Path, results: dict):
    for split, rows in results.items():
        content = coco_file([row[0] for row in rows], [annotation for row in rows for annotation in row[1]])
        (folder / f"annotations/person_keypoints_{split}2017.json").write_text(json.dumps(content))


PARTS = {  # part: folders, what makes one image or clip, what writes the files that hold all of them
    "coco": (("annotations", "train2017", "val2017"), make_coco, finish_coco),
}


def make(root: Path | str = ROOT, part: str = "coco", size: int = SIZE, seed: int = 0, workers: int | None = None,
         progress: bool = True, counts: dict | None = None) -> Path:
    """The folder root/part, made if it is not there yet. `counts` (images, or clips, per split) defaults to COUNTS.

    Everything is written into a temporary folder beside it, renamed at the end: a folder of that name is complete.
    Raises UserError for an unknown part, a bad size, and a folder made with other numbers than these.
    """
    if part not in PARTS:
        raise UserError(f"puppets have no part {part!r}: choose from {', '.join(PARTS)}")
    if not 32 <= size <= 4096:
        raise UserError(f"puppets of {size} pixels cannot be drawn: choose a size from 32 to 4096")
    root, counts = Path(root), {**COUNTS[part], **(counts or {})}
    meta = dict(version=VERSION, part=part, size=size, seed=seed, counts=counts)
    target = root / part
    if is_made(target, meta):
        return target
    root.mkdir(parents=True, exist_ok=True)
    remove_stale(root)
    folder = root / f".{part}-{uuid.uuid4().hex[:8]}.tmp"
    folders, make_one, finish = PARTS[part]
    try:
        for name in folders:
            (folder / name).mkdir(parents=True)
        results = run_jobs(partial(make_one, folder, size, seed), counts, workers, progress and f"puppets/{part}")
        finish(folder, results)
        (folder / "dataset.json").write_text(json.dumps(meta, indent=1))
        try:
            folder.rename(target)
        except OSError:                                              # another process was faster: its folder is as good
            if not is_made(target, meta):
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def is_made(target: Path, meta: dict) -> bool:
    """True for a complete folder with these numbers, False if there is none, UserError for any other folder."""
    if not target.exists():
        return False
    try:
        found = json.loads((target / "dataset.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{target} is not a puppets dataset: move it away, or choose another folder") from None
    different = [f"{name} {found.get(name)} instead of {value}" for name, value in meta.items() if found.get(name) != value]
    if different:
        raise UserError(f"{target} was made with {', '.join(different)}: delete that folder, or choose another root")
    return True


def remove_stale(root: Path, hours: float = 1.):
    """Delete what killed runs left: temporary folders in which nothing has been written for an hour."""
    for folder in root.glob(".*.tmp"):
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")) if path.is_dir())
        except (OSError, ValueError):                                # it vanished meanwhile
            continue
        if time.time() - newest > 3600 * hours:
            shutil.rmtree(folder, ignore_errors=True)


def run_jobs(make_one, counts: dict, workers: int | None, title) -> dict[str, list]:
    """make_one((split, index)) for all of `counts`, in processes if that is allowed -> {split: results in order}."""
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    workers = min(workers or os.cpu_count() or 1, len(jobs) // 8)
    bar = partial(tqdm, total=len(jobs), desc=title or "", disable=not title, unit="im", dynamic_ncols=True)
    if workers <= 1 or multiprocessing.parent_process():             # a worker process may not have children
        results = list(bar(map(make_one, jobs)))
    else:
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with ProcessPoolExecutor(workers, context) as pool:
            try:
                results = list(bar(pool.map(make_one, jobs, chunksize=8)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return {split: [result for job, result in zip(jobs, results) if job[0] == split] for split in counts}


def main():
    parser = argparse.ArgumentParser(prog="python -m data.puppets", description="Draws the embedded dataset.")
    parser.add_argument("--part", default="coco", help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds the parts")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the images in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes, default one per core")
    args = parser.parse_args()
    try:
        print(make(args.root, args.part, args.size, args.seed, args.workers))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
