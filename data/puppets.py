"""Puppets: drawn people that stand in for COCO, CrowdPose and PoseTrack18 where nothing can be downloaded.

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

Units    Keypoints are pixel indices as in COCO (x = 0 is the middle of the first pixel, so a mirror image
         has w - 1 - x), with one decimal because our images are small. Boxes are x, y, w, h from corners.
Labels   v = 2 seen, 1 inside the image but hidden (own body, others, objects), 0 outside or left out at random.
         `bbox` and `area` come from the pixels of the person that are seen. People have no `segmentation`.

    python -m data.puppets --part coco      makes data/puppets/coco (train 4,000, val 500 images)
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

from common import skeletons
from common.errors import UserError

VERSION = {"coco": 3, "crowd": 3, "video": 7, "ood": 3}      # raised when the same seed gives another picture or label
ROOT = Path(__file__).resolve().parent / "puppets"
SIZE = 160                                    # side of the square images in pixels
COUNTS = {"coco": {"train": 4000, "val": 500}, "crowd": {"val": 300}, "video": {"train": 400, "val": 20},
          "ood": {"val": 500}}                # images; for video, clips
FRAMES = {"train": 5, "val": 12}              # per clip: what trains sees many people briefly
PASSERS = 0.7                                 # per person and frame of a clip: how often something passes in front

COCO = list(skeletons.COCO.keypoints)
COCO_EDGES = [[a + 1, b + 1] for a, b in skeletons.COCO.edges]                  # 1-based, as in the files
CROWDPOSE = list(skeletons.CROWDPOSE.keypoints)
POSETRACK = [*skeletons.POSETRACK.keypoints[:3], *COCO[3:]]                     # its files have ears, never labelled
JOINTS = [*COCO, "neck", "head_top"]          # what a figure has; the sets pick from it
INDEX = {name: i for i, name in enumerate(JOINTS)}
INDEX |= {"head_bottom": INDEX["neck"], "head": INDEX["head_top"]}              # PoseTrack's and CrowdPose's words


# ----------------------------------------------------------------------------------------------- poses
# Joint limits in degrees, (low, high): flex swings forward, abduct sideways, turn rolls the arm outwards,
# elbow and knee bend.
LEGS = {  # weight, pitch of the trunk, (flex, abduct, knee) of one leg and of the other
    "stand": (.42, (-4, 8), ((-5, 9), (1, 9), (0, 8)), ((-5, 9), (1, 9), (0, 8))),
    "walk": (.22, (0, 10), ((15, 36), (0, 6), (4, 25)), ((-26, -8), (0, 6), (6, 40))),
    "run": (.07, (6, 20), ((40, 75), (0, 8), (55, 100)), ((-30, -10), (0, 8), (15, 70))),
    "sit": (.11, (-8, 15), ((76, 96), (4, 20), (70, 100)), ((76, 96), (4, 20), (70, 100))),
    "crouch": (.04, (12, 35), ((88, 120), (6, 28), (100, 135)), ((88, 120), (6, 28), (100, 135))),
    "lunge": (.05, (0, 18), ((55, 85), (2, 14), (60, 95)), ((-25, -6), (2, 14), (5, 35))),
    "star": (.06, (-6, 6), ((-5, 15), (18, 38), (0, 25)), ((-5, 15), (18, 38), (0, 25))),
    "bow": (.03, (28, 48), ((-2, 10), (1, 9), (0, 12)), ((-2, 10), (1, 9), (0, 12))),
}
ARMS = {  # weight, (flex, abduct, turn, elbow)
    "hang": (.44, ((-14, 18), (5, 18), (-10, 10), (4, 35))),
    "raise": (.13, ((140, 174), (-2, 28), (-15, 15), (0, 55))),
    "side": (.10, ((-8, 20), (60, 98), (-20, 30), (0, 50))),
    "wave": (.09, ((-8, 15), (62, 98), (65, 100), (55, 115))),
    "hip": (.07, ((-22, -6), (36, 50), (-85, -65), (75, 100))),
    "forward": (.10, ((55, 100), (-4, 18), (-15, 15), (0, 60))),
    "fold": (.07, ((18, 50), (2, 18), (-55, -25), (80, 130))),
}


def sample_pose(rng: np.random.Generator) -> np.ndarray:
    """(20,) angles in degrees: trunk pitch, roll, twist; head nod, tilt, look; then, left before right,
    flex, abduct, turn, elbow of the arms (6:10, 10:14) and flex, abduct, knee of the legs (14:17, 17:20)."""
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


# ---------------------------------------------------------------------------------------------- figure
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
    at.update(zip(FACE, on_head(body, np.stack(list(FACE.values())))))
    body.joints = np.stack([at[name] for name in JOINTS])
    return body


def unit(*direction: float) -> np.ndarray:
    return np.array(direction) / np.linalg.norm(direction)


# Directions from the head's centre, in the skull's axes (left, up, forward). Length 1 lies on the head.
FACE = {"nose": unit(0, -.16, 1) * 1.1, "left_eye": unit(.42, .12, .9), "right_eye": unit(-.42, .12, .9),
        "left_ear": unit(1, -.02, -.1), "right_ear": unit(-1, -.02, -.1), "head_top": np.array([0., 1.0, 0.])}
SHOWS = {"nose": -.15, "left_eye": .1, "right_eye": .1, "left_ear": -.25, "right_ear": -.25}   # seen from this z on
HEAD_WIDTH = .84                              # of its height


def head_axes(body: Body) -> tuple[np.ndarray, np.ndarray]:
    """The head is an ellipse in the image: unit vectors across it and up it, (2,) each."""
    up = body.skull[:2, 1]
    up = up / max(np.linalg.norm(up), 1e-6)
    return np.array([-up[1], up[0]]), up


def on_head(body: Body, directions: np.ndarray) -> np.ndarray:
    """Image positions (N, 3) of directions of FACE (N, 3), squeezed to the head's width as the drawing is."""
    across, up = head_axes(body)
    d = directions @ body.skull.T
    xy = HEAD_WIDTH * np.outer(d[:, :2] @ across, across) + np.outer(d[:, :2] @ up, up)
    return body.at["head"] + body.head_radius * np.column_stack([xy, d[:, 2]])


# ---------------------------------------------------------------------------------------------- shapes
TORSO, HIPS, HEAD, ARM_L, FORE_L, LEG_L, SHIN_L, ARM_R, FORE_R, LEG_R, SHIN_R = range(11)     # parts of the id map
OBJECT, GROUP, FIRST = 1, 2, 16               # values of the id map; person p has 16 * (p + 1) + part
SIDES = (("left", ARM_L, FORE_L, LEG_L, SHIN_L), ("right", ARM_R, FORE_R, LEG_R, SHIN_R))
CARRIES = np.zeros((len(JOINTS), FIRST), bool)                                # joint, part: shows the joint when on top
for _side, _arm, _fore, _leg, _shin in SIDES:
    for _name, _parts in {"shoulder": [_arm, TORSO], "elbow": [_arm, _fore], "wrist": [_fore],
                          "hip": [_leg, HIPS, TORSO], "knee": [_leg, _shin], "ankle": [_shin]}.items():
        CARRIES[INDEX[f"{_side}_{_name}"], _parts] = True
CARRIES[INDEX["neck"], [TORSO, HEAD]] = True
CARRIES[[*range(5), INDEX["head_top"]], HEAD] = True                          # nose, eyes, ears


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
    for side, upper, fore, leg, shin in SIDES:
        shoulder, elbow, wrist, hand, hip, knee, ankle, toe = (
            at[f"{side}_{name}"] for name in ("shoulder", "elbow", "wrist", "hand", "hip", "knee", "ankle", "toe"))
        z_upper, z_fore = (shoulder[2] + 2 * elbow[2]) / 3 + .02 * h, (elbow[2] + wrist[2]) / 2 + .03 * h
        z_leg, z_shin = (hip[2] + 2 * knee[2]) / 3 - .03 * h, (knee[2] + ankle[2]) / 2 - .035 * h
        bare = c["skin"] if person.sleeve < .6 else c["shirt"]
        shapes.append(limb(z_upper, upper, bare, shoulder, elbow, .041 * w, .033 * w, sun))
        if .3 < person.sleeve < .6:                                  # short: the upper arm is partly covered
            cut = shoulder + .62 * (elbow - shoulder)
            shapes.append(limb(z_upper + .001, upper, c["shirt"], shoulder, cut, .047 * w, .042 * w, sun))
        shapes.append(limb(z_fore, fore, bare, elbow, wrist, .034 * w, .026 * w, sun))
        shapes.append(limb(z_fore + .001, fore, c["skin"], wrist, hand, .025 * w, .028 * w, sun))
        thigh = c["skin"] if person.bottom == "skirt" else c["legs"]
        calf = c["legs"] if person.bottom == "trousers" else c["skin"]
        z_foot = z_shin + .001 + .02 * h * (toe[2] > ankle[2])
        shapes.append(limb(z_leg, leg, thigh, hip, knee, .06 * w, .044 * w, sun))
        shapes.append(limb(z_shin, shin, calf, knee, ankle, .043 * w, .029 * w, sun))
        shapes.append(limb(z_foot, shin, c["shoes"], ankle, toe, .031 * w, .024 * w, sun))
    hips, shirt = ([(t, a * w, b * w) for t, a, b in rings] for rings in (HIP_RINGS, SHIRT_RINGS))
    lit = trunk_outline(body, shirt, .55, (.025 * w * sun[0], 0))
    shapes.append(Shape(spine_z - .01 * h, HIPS, c["legs"], trunk_outline(body, hips)))
    shapes.append(Shape(spine_z, TORSO, c["shirt"], trunk_outline(body, shirt), lit))
    if person.bottom == "skirt":
        hem = []
        for side in ("left", "right"):
            knee, hip = at[f"{side}_knee"], at[f"{side}_hip"]
            hem += capsule(hip, hip + .72 * (knee - hip), .07 * w, .075 * w)
        z = max(shape.z for shape in shapes if shape.part in (LEG_L, LEG_R)) + .002 * h
        shapes.append(Shape(z, HIPS, c["legs"], hull(hem + trunk_outline(body, hips[1:]))))
    return sorted(shapes + head_shapes(person, body, spine_z, sun), key=lambda shape: shape.z)


# Ellipses along the spine: (height, pelvis 0 to collar 1; half width; half depth), in units of stature.
HIP_RINGS = [(-.22, .05, .05), (-.1, .09, .07), (.05, .098, .075), (.2, .088, .068)]
SHIRT_RINGS = [(.04, .1, .077), (.38, .086, .066), (.72, .108, .078), (.93, .122, .066), (1., .095, .05), (1.07, .04, .04)]


def head_shapes(person: Person, body: Body, spine_z: float, sun) -> list[Shape]:
    """Neck, head, long hair, ears and nose; what faces away is drawn under the head."""
    at, c, w, shapes = body.at, person.colours, person.height * person.build * (1 - .12 * person.child), []
    head, r = at["head"], body.head_radius
    up = r * np.array([*body.skull[:2, 1], 0])
    z_head = head[2] + .035 * person.height
    neck_z = min(z_head, spine_z) - .002
    shapes.append(limb(neck_z, HEAD, c["skin"], at["neck"], head - .5 * up, .04 * w, .04 * w, sun))
    shapes.append(Shape(z_head, HEAD, c["skin"], [], head=(body, person)))
    z_ear = z_head + .002
    if person.long_hair:                                             # seen from behind, it covers the back
        back = head - .35 * r * np.array([*body.skull[:2, 2], 0])
        z = min(z_head - .002, spine_z - .003) if body.skull[2, 2] > 0 else max(z_head, spine_z) + .001
        z_ear = max(z_ear, z + .001)
        shapes.append(Shape(z, HEAD, c["hair"], capsule(back, back - 1.35 * up, .86 * r, .7 * r)))
    for ear in ("left_ear", "right_ear"):
        z = z_ear if body.skull[2] @ FACE[ear] > SHOWS[ear] else z_head - .001
        dark = tuple(int(.86 * value) for value in c["skin"])
        shapes.append(Shape(z, HEAD, dark, capsule(at[ear] - .11 * up, at[ear] + .11 * up, .17 * r, .2 * r)))
    z = z_head + (.003 if body.skull[2] @ FACE["nose"] > 0 else -.001)
    warm = tuple(int(scale * value) for scale, value in zip((.97, .8, .76), c["skin"]))
    shapes.append(Shape(z, HEAD, warm, capsule(at["nose"] + .22 * up, at["nose"], .09 * r, .15 * r)))
    return shapes


# --------------------------------------------------------------------------------------------- drawing
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
            for px, py, r, drop in rng.uniform((-10, -10, 5, -1), (522, 522, 22, 1), (350, 4)):
                leaf = capsule((px, py), (px + r, py + drop * r), r * .5, 1)
                pen.polygon(leaf, fill=int(rng.integers(0, 256)))
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
        self.bodies = []                                             # of the people, in order of the layers
        for layer in scene.layers:
            if isinstance(layer, Thing):
                self.polygon(thing_outline(layer, 1.), thing_outline(layer, .6), layer.colour, OBJECT)
            elif isinstance(layer, Group):
                self.group(layer)
            else:
                self.bodies.append(joints_of(layer))
                self.person(layer, self.bodies[-1], FIRST * len(self.bodies))

    def backdrop(self):
        """Wall and floor: a crop of a texture from dark to bright colour; half size will do, for it ends at that."""
        size, small = self.scene.size, Image.new("RGB", (self.scene.size,) * 2)
        for (texture, x, y, dark, bright), top in zip(self.scene.walls, (0, int(self.scene.horizon))):
            x, y = (min(max(start, 0), 512 - 180) for start in (x, y))           # a shaking camera looks past the edge
            crop = textures()[texture].resize((size, size), Image.BILINEAR, (x, y, x + 180, y + 180))
            channels = [crop.point([int(a + (b - a) * t / 255) for t in range(256)]) for a, b in zip(dark, bright)]
            small.paste(Image.merge("RGB", channels), (0, top))
        self.picture.paste(small.resize((self.side, self.side), Image.NEAREST))

    def polygon(self, points: list, light: list, colour: tuple, ident: int):
        points, light = ([(2 * x + .5, 2 * y + .5) for x, y in part] for part in (points, light))
        self.pen.polygon(points, fill=colour, outline=tuple(value * 5 // 9 for value in colour))
        self.id_pen.polygon(points, fill=ident)
        if light:
            self.pen.polygon(light, fill=tuple(min(255, value * 9 // 8 + 14) for value in colour))

    def person(self, person: Person, body: Body, base: int):
        for shape in shapes_of(person, body, self.scene.sun):
            ident = base + shape.part if base != GROUP else GROUP
            if shape.head:
                self.head(*shape.head, ident)
            else:
                self.polygon(shape.points, shape.light, shape.colour, ident)

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
        colour[.80 * high - .6 * front > (2 if person.bald else .04)] = person.colours["hair"]
        for eye in ("left_eye", "right_eye"):
            near = left * FACE[eye][0] + high * FACE[eye][1] + front * FACE[eye][2]
            colour[near > math.cos(.28)] = (245, 245, 245)
            colour[near > math.cos(.19)] = (25, 20, 30)
        colour[(abs(high + .52) < .075) & (abs(left) < .30) & (front > 0)] = (140, 45, 45)
        sun = self.scene.sun
        shade = .84 + .18 * (x * sun[0] + y * sun[1]) + .12 * z
        colour = np.clip(colour * np.where(rim > .86, .72, shade)[..., None], 0, 255)
        mask = Image.fromarray(np.uint8(255 * (rim < 1)))
        self.picture.paste(Image.fromarray(np.uint8(colour)), (x0, y0), mask)
        self.ids.paste(ident, (x0, y0), mask)

    def group(self, group: Group):
        for person in group.people:
            self.person(person, joints_of(person), GROUP)
        box = self.ids.point([255 * (i == GROUP) for i in range(256)]).getbbox()
        if box:
            self.picture.paste(self.picture.crop(box).filter(ImageFilter.GaussianBlur(2.5)), box)

    def id_map(self) -> np.ndarray:
        """(size, size) uint8: 0 background, OBJECT, GROUP, or 16 * (person + 1) + part."""
        return np.asarray(self.ids)[::2, ::2]


def develop(picture: Image.Image, scene: Scene) -> Image.Image:
    """A canvas's picture at half size, with blur, brightness and grain."""
    grain, blur, brightness = scene.finish
    picture = picture.reduce(2)
    if blur > .3:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    noise = np.random.default_rng(scene.seed).standard_normal((scene.size, scene.size, 1), np.float32) * grain
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


# ------------------------------------------------------------------------------------------ annotation
AROUND = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)])                              # nine pixels


def turned_away(body: Body) -> np.ndarray:
    """(19,) bool: joints on the far side of their own head, chest or hips, which the id map cannot tell."""
    away = np.zeros(len(JOINTS), bool)
    for name, least in SHOWS.items():
        away[INDEX[name]] = body.skull[2] @ FACE[name] < least
    for side, sign in (("left", 1), ("right", -1)):
        away[INDEX[f"{side}_shoulder"]] = sign * body.chest[2, 0] < -.65
        away[INDEX[f"{side}_hip"]] = sign * body.pelvis[2, 0] < -.6
    return away


def annotate(canvas: Canvas) -> list[dict]:
    """One dict per person, in order of the layers: joints (19, 3) pixels with v, bbox xywh, area in pixels, body.

    A joint is seen when a third of the nine points around it show a part of its own person that carries it.
    """
    size, ids, found = canvas.scene.size, canvas.id_map(), []
    people = [layer for layer in canvas.scene.layers if isinstance(layer, Person)]
    for number, (person, body) in enumerate(zip(people, canvas.bodies), 1):
        joints = body.joints.round(1)
        spots = np.round(joints[:, None, :2] + AROUND * max(1., .012 * person.height)).astype(int).clip(0, size - 1)
        there = ids[spots[..., 1], spots[..., 0]]                                                # (19, 9)
        carried = (there // FIRST == number) & CARRIES[np.arange(len(JOINTS))[:, None], there % FIRST]
        joints[:, 2] = np.where((carried.mean(1) > .33) & ~turned_away(body), 2, 1)
        outside = ((joints[:, :2] < -.5) | (joints[:, :2] >= size - .5)).any(1)
        joints[:, :2] = joints[:, :2].clip(0, size - 1)
        joints[outside] = 0
        mask = ids // FIRST == number
        found.append(dict(joints=joints, bbox=box_of(mask), area=int(mask.sum()), body=body))
    return found


def box_of(mask: np.ndarray) -> list[int]:
    """x, y, w, h of the True pixels; zeros if there are none."""
    left, top, right, bottom = Image.fromarray(mask).getbbox() or (0, 0, 0, 0)
    return [left, top, right - left, bottom - top]


# ---------------------------------------------------------------------------------------------- scenes
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
    yaw = rng.choice([0, 180, 90, -90, 45, -45, 135, -135], p=[.54, .06, .06, .06, .12, .12, .02, .02])
    return Person(0, 0, 1, yaw=yaw + rng.normal(0, 14), lean=rng.normal(0, 4), camera=camera, pose=sample_pose(rng),
                  build=float(np.clip(rng.normal(1.05, .14), .8, 1.4)), child=child,
                  colours=dict(skin=skin, hair=hair, shirt=any_colour(rng), legs=any_colour(rng, (.1, .8), (.15, .8)),
                               shoes=any_colour(rng, (0, .6), (.1, .95))),
                  sleeve=rng.choice([.1, .5, 1.], p=[.15, .45, .4]),
                  bottom=str(rng.choice(["trousers", "shorts", "skirt"], p=[.55, .28, .17])),
                  long_hair=bool(rng.random() < .3), bald=bool(rng.random() < .06))


def place(rng, person: Person, size: int, share: float, span: tuple, horizon: float, cut: bool = False) -> Person:
    """Scale the figure to `share` of the image's height and stand it on the floor, pelvis within `span` columns.

    The bigger, the nearer, the lower its feet; `cut` pushes it over the lower border or to the left or right one.
    """
    rows = [row for name, (_, row, _) in joints_of(person).at.items() if name.endswith(("ankle", "toe", "top", "hip"))]
    extent = max(rows) - min(rows) + .03
    height = min(share * size / extent, 1.25 * size)
    near = min(1, height * extent / (.9 * size)) ** .8
    x, ground = rng.uniform(*span), min(horizon + (.97 * size - horizon) * near + rng.normal(0, .02 * size), .99 * size)
    if cut and rng.random() < .6:
        ground += rng.uniform(.15, .5) * height * extent
    elif cut:
        x = rng.choice([0, size]) + rng.normal(0, .06 * size)
    return replace(person, x=x, ground=ground, height=height)


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
                    for _ in range(rng.integers(0, 4))]
    if group:
        x, share, number = rng.uniform(.2, .8) * size, rng.uniform(.09, .15), rng.integers(5, 9)
        span = (x - .12 * size, x + .12 * size)
        layers.append(Group([place(rng, sample_person(rng, camera), size, share, span, horizon) for _ in range(number)]))
    standing, slots = [], rng.permutation(people)
    packed = crowd and rng.random() < .5                             # some crowds are loose, for AP_E of CrowdPose
    for slot in slots:
        span = (size * (slot + .15) / people, size * (slot + .85) / people)
        if packed:
            span, share = (.15 * size, .85 * size), rng.uniform(.3, .75)
        elif crowd:
            share = rng.uniform(.22, .45)
        else:
            share = .2 + .75 * (rng.beta(5, 1.5) if people == 1 else rng.beta(4, 1.6))
        standing.append(place(rng, sample_person(rng, camera), size, share, span, horizon, rng.random() < .12))
    for person in sorted(standing, key=lambda person: person.ground):
        if min(person.pose[14], person.pose[17]) > 60:               # both thighs level: something to sit on
            layers.append(seat(rng, person))
        layers.append(person)
        if rng.random() < .1:
            x, y = person.x + rng.normal(0, .12) * person.height, person.ground - rng.uniform(0, .6) * person.height
            layers.append(sample_thing(rng, size, x, y, person.height * rng.uniform(.2, .42)))
    angle, seed = rng.uniform(-2.6, -.5), int(rng.integers(2 ** 31))
    finish = (rng.uniform(0, 3.5), max(0., rng.uniform(-.9, .5)), rng.uniform(.85, 1.12))
    return Scene(size, seed, (math.cos(angle), math.sin(angle)), horizon, walls, layers, finish)


def seat(rng, person: Person) -> Thing:
    """A box from under the hips to the floor, drawn behind the person."""
    x, y, _ = joints_of(person).at["pelvis"]
    h = person.ground - y - .05 * person.height
    return Thing("box", x, person.ground - h / 2, person.height * rng.uniform(.26, .4), h, 0., any_colour(rng, (.1, .6)))


def split_scene(size: int, seed: int, split: str, index: int) -> tuple[Canvas, list[dict]]:
    """Scene `index` of a split, drawn, and its people. Depends on nothing else, so any worker may make it."""
    rng = np.random.default_rng([seed, ["train", "val", "crowd"].index(split), index])
    if split == "crowd":
        while True:
            canvas, found = without_lost(sample_scene(rng, size, int(rng.integers(4, 11)), crowd=True), least=3)
            if len(found) >= 4:
                break
    else:
        people, group = int(rng.choice(5, p=[.04, .56, .28, .08, .04])), rng.random() < .05
        canvas, found = without_lost(sample_scene(rng, size, people, group=group), least=4)
    for person in found:                                             # annotators forget some
        person["joints"][rng.random(len(JOINTS)) < .03] = 0
    return canvas, found


def without_lost(scene: Scene, least: int) -> tuple[Canvas, list[dict]]:
    """The scene drawn, after people of whom fewer than `least` COCO joints are seen have been taken out."""
    while True:
        canvas = Canvas(scene)
        found = annotate(canvas)
        seen = iter([(person["joints"][:17, 2] == 2).sum() for person in found])
        layers = [layer for layer in scene.layers if not isinstance(layer, Person) or next(seen) >= least]
        if len(layers) == len(scene.layers):
            return canvas, found
        scene = replace(scene, layers=layers)


# ---------------------------------------------------------------------------------------------- motion
def sample_motion(rng: np.random.Generator, person: Person) -> dict:
    """How one person moves: a second pose it swings to and back, steps and turns per frame."""
    a, b = person.pose, person.pose.copy()
    sits, walks = min(a[14], a[17]) > 60, abs(a[14] - a[17]) > 20
    if walks:
        b[6:] = np.concatenate([a[10:14], a[6:10], a[17:20], a[14:17]])             # the other foot forward
    else:
        b[:14] += rng.normal(0, [4, 4, 5, 7, 5, 14] + [16, 12, 8, 18] * 2)
        b[[9, 13]] = b[[9, 13]].clip(0, 140)                                        # elbows bend one way only
        b[14:] += 0 if sits else rng.normal(0, [3, 3, 0] * 2)
    speed = 0. if sits else rng.uniform(.015, .04) if walks else rng.normal(0, .004)
    sideways = math.sin(math.radians(person.yaw)) if walks else 1.
    return dict(pose=b, period=rng.uniform(10, 20), phase=rng.uniform(0, 2 * math.pi),
                turn=0. if sits else rng.normal(0, 1.5), step=speed * person.height * sideways)


def sample_passers(rng: np.random.Generator, person: Person, size: int, t: int) -> list[tuple]:
    """Things, one or none, that cross the picture and hide a joint of a person in frame t: (thing as it is then, t, its
    steps to the right and down per frame). It is elsewhere one frame before and after, where the joint is seen."""
    joints = joints_of(person).joints[:, :2]
    joints = joints[((joints > 0) & (joints < size)).all(1)]
    if rng.random() >= PASSERS or not len(joints):
        return []
    thing = sample_thing(rng, size, *joints[rng.integers(len(joints))], person.height * rng.uniform(.25, .45))
    direction, step = rng.uniform(0, 2 * math.pi), rng.uniform(1.2, 1.8) * max(thing.w, thing.h)
    return [(thing, t, step * math.cos(direction), step * math.sin(direction))]


def sample_clip(rng: np.random.Generator, size: int, frames: int):
    """A scene and how its people and the camera move -> function of the frame t (may be fractional) -> Scene."""
    still = sample_scene(rng, size, int(rng.integers(1, 4)), group=rng.random() < .4)
    people = [layer for layer in still.layers if isinstance(layer, Person)]
    motions = {id(person): sample_motion(rng, person) for person in people}
    shake = rng.uniform(0, .022) * size * rng.uniform(.4, 1, (2, 2))
    beat, phase = rng.uniform(.3, .9, (2, 2)), rng.uniform(0, 2 * math.pi, (2, 2))

    def moved(layer, t, dx, dy):
        if isinstance(layer, Thing):
            return replace(layer, x=layer.x + dx, y=layer.y + dy)
        if isinstance(layer, Group):
            return Group([replace(person, x=person.x + dx, ground=person.ground + dy) for person in layer.people])
        m = motions[id(layer)]
        swing = (1 - math.cos(2 * math.pi * t / m["period"] + m["phase"])) / 2
        return replace(layer, x=layer.x + dx + m["step"] * (t - frames / 2), ground=layer.ground + dy,
                       yaw=layer.yaw + m["turn"] * t, pose=layer.pose + swing * (m["pose"] - layer.pose))

    passers = [passer for person in people for t in range(frames)
               for passer in sample_passers(rng, moved(person, t, 0, 0), size, t)]

    def at(t: float) -> Scene:
        dx, dy = (shake * np.sin(beat * t + phase)).sum(1)
        zoom = 180 / size                                            # pixels of the backdrop's crop per image pixel
        walls = [(texture, x - dx * zoom, y - dy * zoom, dark, bright) for texture, x, y, dark, bright in still.walls]
        # what passes stands still while a frame is exposed: blurred, it would hide nothing
        passing = [replace(thing, x=thing.x + (round(t) - when) * right, y=thing.y + (round(t) - when) * down)
                   for thing, when, right, down in passers]
        layers = [moved(layer, t, dx, dy) for layer in [*still.layers, *passing]]
        return replace(still, seed=still.seed + round(t), horizon=still.horizon + dy, walls=walls, layers=layers)
    return at


# ---------------------------------------------------------------------------------------------- styles
def gray(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"), np.float32)


def contours(canvas: Canvas, width: int) -> np.ndarray:
    """True along the borders of everything that was drawn as one piece."""
    smallest, largest = (canvas.ids.filter(kind(width)) for kind in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
    return np.asarray(smallest) != np.asarray(largest)


def pencil(canvas: Canvas) -> Image.Image:
    """Lines where brightness changes, hatching where it is dark."""
    light = gray(canvas.picture)
    soft = gray(canvas.picture.filter(ImageFilter.GaussianBlur(4)))
    y, x = np.mgrid[:canvas.side, :canvas.side]
    hatching = ((x + y) % 7 < 2) & (soft < 110), ((x - y) % 7 < 2) & (soft < 65)
    paper = 240 - 2.2 * (soft - light).clip(0, 80) - 45. * hatching[0] - 45. * hatching[1]
    return Image.fromarray(np.uint8(np.where(contours(canvas, 3), 60, paper).clip(20, 255))).convert("RGB")


def flat(canvas: Canvas) -> Image.Image:
    """Few colours, thick contours."""
    picture = canvas.picture.filter(ImageFilter.MedianFilter(5)).quantize(14).convert("RGB")
    return Image.composite(Image.new("RGB", picture.size, (20, 20, 40)), picture, Image.fromarray(contours(canvas, 5)))


def halftone(canvas: Canvas) -> Image.Image:
    """Ink dots on a tilted grid, bigger where it is darker."""
    y, x = np.mgrid[:canvas.side, :canvas.side]
    screen = 128 + 62 * (np.cos((x + y) * .9) + np.cos((x - y) * .9))
    ink = gray(canvas.picture) < screen
    return Image.fromarray(np.where(ink[..., None], np.uint8([40, 30, 90]), np.uint8([250, 240, 215])))


def inverted(canvas: Canvas) -> Image.Image:
    return ImageChops.invert(canvas.picture)


def oil(canvas: Canvas) -> Image.Image:
    """Dabs: each place takes the commonest colour of a neighbourhood, and brush strokes push it about."""
    y, x = np.mgrid[:canvas.side, :canvas.side]
    dx, dy = np.rint(2 * np.sin(y / 5 + x / 17)).astype(int), np.rint(2 * np.sin(x / 7 - y / 13)).astype(int)
    pushed = np.asarray(canvas.picture)[(y + dy).clip(0, canvas.side - 1), (x + dx).clip(0, canvas.side - 1)]
    return Image.fromarray(pushed).filter(ImageFilter.ModeFilter(7))


def woodcut(canvas: Canvas) -> Image.Image:
    """Two tones: darker or lighter than the surroundings."""
    here, around = (gray(canvas.picture.filter(ImageFilter.GaussianBlur(radius))) for radius in (1, 14))
    dark = (here < around) | contours(canvas, 3)
    return Image.fromarray(np.where(dark[..., None], np.uint8([45, 25, 20]), np.uint8([235, 205, 160])))


def heat(canvas: Canvas) -> Image.Image:
    """Brightness as the colours of a thermal camera."""
    stops = np.array([(10, 0, 60), (120, 0, 140), (230, 60, 60), (255, 180, 30), (255, 255, 210)], float)
    table = np.stack([np.interp(np.arange(256), np.linspace(0, 255, 5), stops[:, c]) for c in range(3)], 1)
    return Image.fromarray(np.uint8(table[np.uint8(gray(canvas.picture))]))


STYLES = (pencil, flat, halftone, inverted, oil, woodcut, heat)


def restyle(index: int) -> list[Image.Image]:
    """Picture `index` of val in the first four of the styles: the same people in the same places."""
    canvas, _ = split_scene(SIZE, 0, "val", index)
    return [style(canvas).reduce(2) for style in STYLES[:4]]


# --------------------------------------------------------------------------------------------- writing
# Each maker draws one image or clip, saves it under `folder`, and returns what the annotation files need of it.

def save(picture: Image.Image, path: Path):
    picture.save(path, quality=92)


def flat_list(joints: np.ndarray, names: list, most: int = 2) -> list:
    """Rows of `joints` in the order of `names` as a list x, y, v, x, y, v ...; v at most `most`."""
    rows = joints[[INDEX[name] for name in names]]
    return [value for x, y, v in rows.tolist() for value in (round(x, 1), round(y, 1), min(int(v), most))]


def coco_annotations(image_id: int, canvas: Canvas, found: list[dict], names: list = COCO) -> list[dict]:
    """People, then the far group as one `iscrowd` region: its box, also as a run-length mask."""
    result = [dict(image_id=image_id, category_id=1, iscrowd=0, bbox=person["bbox"], area=person["area"],
                   keypoints=(keypoints := flat_list(person["joints"], names)),
                   num_keypoints=sum(v > 0 for v in keypoints[2::3])) for person in found]
    x, y, w, h = box_of(canvas.id_map() == GROUP)
    if w:
        mask = np.zeros((canvas.scene.size,) * 2, bool)
        mask[y:y + h, x:x + w] = True
        edges = np.flatnonzero(np.diff(mask.T.reshape(-1), prepend=False))
        runs = np.diff(edges, prepend=0, append=mask.size).tolist()  # outside, inside, ..., column by column
        result.append(dict(image_id=image_id, category_id=1, iscrowd=1, bbox=[x, y, w, h], area=w * h,
                           keypoints=[0] * (3 * len(names)), num_keypoints=0,
                           segmentation=dict(counts=runs, size=[canvas.scene.size] * 2)))
    return result


def coco_file(rows: list[tuple[dict, list]], names: list = COCO) -> dict:
    """The content of a COCO keypoint file, from (image, its annotations) rows."""
    annotations = [annotation for _, people in rows for annotation in people]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    category = dict(supercategory="person", id=1, name="person", keypoints=names, skeleton=COCO_EDGES)
    return dict(info=dict(description="Puppets", version=str(VERSION)), licenses=[],
                images=[image for image, _ in rows], annotations=annotations, categories=[category])


def make_coco(folder: Path, size: int, seed: int, job: tuple[str, int], style=None) -> tuple[dict, list]:
    split, index = job
    canvas, found = split_scene(size, seed, split, index)
    number = index + 1 + 100_000 * (split == "val")
    image = dict(id=number, file_name=f"{number:012d}.jpg", width=size, height=size)
    if style:
        save(style(canvas).reduce(2), folder / "val2017oil" / image["file_name"])
    else:
        save(develop(canvas.picture, canvas.scene), folder / f"{split}2017" / image["file_name"])
    return image, coco_annotations(number, canvas, found)


def make_ood(folder: Path, size: int, seed: int, job: tuple[str, int]) -> tuple[dict, list]:
    return make_coco(folder, size, seed, job, STYLES[job[1] % len(STYLES)])


def finish_coco(folder: Path, results: dict):
    for split, rows in results.items():
        (folder / f"annotations/person_keypoints_{split}2017.json").write_text(json.dumps(coco_file(rows)))


def crowd_index(people: list[dict]) -> float:
    """CrowdPose: mean over people of (joints of others inside their box) / (their own joints)."""
    ratios = []
    joints = [np.reshape(person["keypoints"], (-1, 3)) for person in people]
    for i, person in enumerate(people):
        x, y, w, h = person["bbox"]
        others = np.concatenate([j for k, j in enumerate(joints) if k != i] or [np.zeros((0, 3))])
        inside = (others[:, 2] > 0) & (abs(others[:, :2] - (x + w / 2, y + h / 2)) <= (w / 2, h / 2)).all(1)
        if (own := (joints[i][:, 2] > 0).sum()):
            ratios.append(inside.sum() / own)
    return round(float(np.mean(ratios)), 2) if ratios else 0.


def make_crowd(folder: Path, size: int, seed: int, job: tuple[str, int]) -> tuple[tuple, tuple]:
    """The same image for both files: COCO-17, and CrowdPose-14 whose head and neck have v 0 or 1 and do not count."""
    canvas, found = split_scene(size, seed, "crowd", job[1])
    image = dict(id=job[1] + 1, file_name=f"{job[1] + 1}.jpg", width=size, height=size)
    save(develop(canvas.picture, canvas.scene), folder / "images" / image["file_name"])
    people = []
    for person in found:
        limbs, head = flat_list(person["joints"], CROWDPOSE[:12]), flat_list(person["joints"], CROWDPOSE[12:], 1)
        people.append(dict(image_id=image["id"], category_id=1, iscrowd=0, bbox=person["bbox"], keypoints=limbs + head,
                           num_keypoints=sum(v > 0 for v in limbs[2::3])))
    crowded = {**image, "crowdIndex": crowd_index(people)}
    return (image, coco_annotations(image["id"], canvas, found)), (crowded, people)


def finish_crowd(folder: Path, results: dict):
    coco, crowdpose = zip(*results["val"])
    (folder / "annotations/person_keypoints_val2017.json").write_text(json.dumps(coco_file(coco)))
    content = coco_file(crowdpose, CROWDPOSE)
    del content["info"], content["licenses"]                         # the real file has neither
    (folder / "json/crowdpose_test.json").write_text(json.dumps(content))


def make_clip(folder: Path, size: int, seed: int, job: tuple[str, int]) -> int:
    """One PoseTrack18 video; the first and last frame are not labelled, the far group is an ignore region."""
    split, index = job
    rng = np.random.default_rng([seed, 10 + (split == "val"), index])
    clip, exposure = sample_clip(rng, size, FRAMES[split]), max(0., rng.uniform(-.2, .6))
    video = f"{index + 1 + 9000 * (split == 'val'):06d}"
    shots = f"images/{split}/{video}_puppets"
    (folder / shots).mkdir()
    images, annotations = [], []
    for t in range(FRAMES[split]):
        canvas = Canvas(clip(t))
        picture = canvas.picture
        if exposure:
            before, after = (Canvas(clip(t + shift * exposure)).picture for shift in (-.5, .5))
            picture = Image.blend(picture, Image.blend(before, after, .5), .6)
        image = posetrack_image(f"{shots}/{t:06d}.jpg", video, t, FRAMES[split], size, box_of(canvas.id_map() == GROUP))
        save(develop(picture, canvas.scene), folder / image["file_name"])
        images.append(image)
        for track, person in enumerate(annotate(canvas) if image["is_labeled"] else ()):
            if (person["joints"][:, 2] == 2).sum() >= 3:
                annotations.append(posetrack_person(image["id"], track, person))
    category = dict(supercategory="person", id=1, name="person", skeleton=COCO_EDGES, keypoints=POSETRACK)
    content = dict(images=images, annotations=annotations, categories=[category])
    (folder / f"annotations/{split}/{video}_puppets.json").write_text(json.dumps(content))
    return len(annotations)


def posetrack_image(file_name: str, video: str, t: int, frames: int, size: int, group: list[int]) -> dict:
    """The far group's box, if there is one, is a polygon to ignore."""
    number, (x, y, w, h) = int(f"1{video}{t:04d}"), group
    return dict(id=number, frame_id=number, vid_id=video, nframes=frames, is_labeled=0 < t < frames - 1,
                file_name=file_name, width=size, height=size, has_no_densepose=True,
                ignore_regions_x=[[x, x + w, x + w, x]] if w else [],
                ignore_regions_y=[[y, y, y + h, y + h]] if w else [])


def posetrack_person(image_id: int, track: int, person: dict) -> dict:
    """As PoseTrack18's, where v is 0 or 1, and `hidden`, which it does not have: what is labelled, but not seen."""
    joints, body = person["joints"].copy(), person["body"]
    joints[[INDEX["left_ear"], INDEX["right_ear"]]] = 0
    (x, y), r = body.at["head"][:2] + .5, body.head_radius
    head = [round(float(value), 1) for value in (x - .9 * r, y - r, 1.8 * r, 2 * r)]
    return dict(id=image_id * 100 + track, image_id=image_id, track_id=track, category_id=1, iscrowd=False,
                scores=[], bbox=person["bbox"], bbox_head=head, keypoints=flat_list(joints, POSETRACK, 1),
                hidden=[v == 1 for v in flat_list(joints, POSETRACK)[2::3]])


PARTS = {  # part: folders, what makes one image or clip, what writes the files that hold all of them
    "coco": (("annotations", "train2017", "val2017"), make_coco, finish_coco),
    "crowd": (("annotations", "json", "images"), make_crowd, finish_crowd),
    "video": (("annotations/train", "annotations/val", "images/train", "images/val"), make_clip, None),
    "ood": (("annotations", "val2017oil"), make_ood, finish_coco),
}


def make(root: Path | str = ROOT, part: str = "coco", size: int = SIZE, seed: int = 0, workers: int | None = None,
         progress: bool = True, counts: dict | None = None) -> Path:
    """The folder root/part, made if it is not there yet. `counts` (images, or clips, per split) defaults to COUNTS.

    Everything is written into a temporary folder beside it, renamed at the end: a folder of that name is complete.
    Raises UserError for an unknown part, a bad size, and a folder made with other numbers than these.
    """
    if part not in PARTS:
        raise UserError(f"puppets have no part {part!r}: choose from {', '.join(PARTS)}")
    if not 32 <= size <= 2048 or seed < 0:
        raise UserError(f"puppets cannot be drawn with size {size} and seed {seed}: size 32 to 2048, seed 0 or more")
    root, counts = Path(root), {**COUNTS[part], **(counts or {})}
    meta = dict(version=VERSION[part], part=part, size=size, seed=seed, counts=counts)
    target = root / part
    if is_made(target, meta):
        return target
    root.mkdir(parents=True, exist_ok=True)
    remove_stale(root, part)
    folder = root / f".{part}-{uuid.uuid4().hex[:8]}.tmp"
    folders, make_one, finish = PARTS[part]
    try:
        for name in folders:
            (folder / name).mkdir(parents=True)
        results = run_jobs(partial(make_one, folder, size, seed), counts, workers, progress and f"puppets/{part}")
        if finish:
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
    different = [f"{name} {found.get(name)} instead of {value}" for name, value in meta.items()
                 if found.get(name) != value]
    if different:
        raise UserError(f"{target} was made with {', '.join(different)}: delete that folder, or choose another root")
    return True


def remove_stale(root: Path, part: str):
    """Delete what killed runs left: temporary folders of a part in which nothing has been written for an hour."""
    for folder in root.glob(f".{part}-{8 * '[0-9a-f]'}.tmp"):
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")) if path.is_dir())
        except (OSError, ValueError):                                # it vanished meanwhile
            continue
        if time.time() - newest > 3600:
            shutil.rmtree(folder, ignore_errors=True)


def run_jobs(make_one, counts: dict, workers: int | None, title) -> dict[str, list]:
    """make_one((split, index)) for all of `counts`, in processes if that is allowed -> {split: results in order}."""
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    workers = min(workers or os.cpu_count() or 1, len(jobs) // 8)
    bar = partial(tqdm, total=len(jobs), desc=title or "", disable=not title, unit="im", dynamic_ncols=True)
    if workers <= 1 or multiprocessing.current_process().daemon:     # such a process may not have children
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
