"""Keypoint sets: names, edges, mirrored keypoints and OKS sigmas.

A `Skeleton` is what a model and a metric must know about the keypoints they handle. Five sets are built in;
any other comes from the `categories` of a dataset's own file, see `skeleton_from_category`. Left and right are
the person's own.

sigma    How loosely a keypoint is placed: one that is d pixels off counts exp(-d² / (2 (2σ)² area)), see OKS.
flip     flip[k] is where keypoint k goes when the image is mirrored: left wrist <-> right wrist, nose -> nose.
"""
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from common.errors import UserError


@dataclass(frozen=True)
class Skeleton:
    """One keypoint set: K names, 0-based edges, K mirrored indices (None: cannot be mirrored), K sigmas."""

    name: str
    keypoints: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    flip: tuple[int, ...] | None
    sigmas: tuple[float, ...]

    def __post_init__(self):
        count = len(self.keypoints)
        if len(self.sigmas) != count:
            raise UserError(f"{len(self.sigmas)} sigmas for the {count} keypoints of '{self.name}': give {count}")
        if not all(0 < sigma < math.inf for sigma in self.sigmas):
            raise UserError(f"the sigmas of '{self.name}' are {list(self.sigmas)}: OKS divides by them, give positive numbers")
        if any(not 0 <= k < count for edge in self.edges for k in edge):
            raise UserError(f"an edge of '{self.name}' is outside keypoints 1..{count}: mend its 'skeleton'")
        flip = self.flip
        if flip is not None and (len(flip) != count or sorted(flip) != list(range(count))
                                 or any(flip[m] != k for k, m in enumerate(flip))):
            raise UserError(f"the flip table of '{self.name}' is not its own inverse: {list(flip)}")

    @property
    def num_keypoints(self) -> int:
        return len(self.keypoints)

    def to_dict(self) -> dict:
        """Plain lists and strings, as they go into checkpoints and JSON."""
        plain = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    @staticmethod
    def from_dict(d: dict) -> "Skeleton":
        try:
            if not isinstance(d["name"], str):
                raise TypeError(f"its name is {d['name']!r}")
            flip = None if d["flip"] is None else tuple(d["flip"])
            edges = tuple((int(a), int(b)) for a, b in d["edges"])
            return Skeleton(d["name"], tuple(map(str, d["keypoints"])), edges, flip, tuple(float(s) for s in d["sigmas"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"this is no keypoint set: {type(error).__name__}: {error}") from None


# ---------------------------------------------------------------- left and right

SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}


def words(name: str) -> tuple[str, ...]:
    """'LeftEye', 'left-eye', 'lefteye' and 'Left Eye' all give ('left', 'eye')."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    name = re.sub(r"(?<![^\W_])(left|right)(?=[^\W_])", r"\1_", name)
    return tuple(word for word in re.split(r"[\W_]+", name) if word)


def same_names(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether two lists name the same keypoints in the same order."""
    return [words(name) for name in a] == [words(name) for name in b]


def flip_from_names(names: Sequence[str]) -> tuple[int, ...] | None:
    """Index of the mirrored keypoint of each name, by its side: left_x <-> right_x, x_l <-> x_r, lx <-> rx.

    Without any side in the names every keypoint mirrors to itself. None where a side has no clear partner: a
    wrong table silently trains a model that mixes left and right, so the caller must not mirror then.
    """
    parts = [words(name) for name in names]
    index = {part: k for k, part in enumerate(parts)}
    if len(index) < len(parts):
        return None                                          # two names that read the same
    flip = []
    for k, part in enumerate(parts):
        mirrored = tuple(SIDES.get(word, word) for word in part)
        if mirrored == part and part and part[0][0] in "lr":         # lwrist <-> rwrist, if both exist
            glued = (SIDES[part[0][0]] + part[0][1:], *part[1:])
            mirrored = glued if glued in index else part
        flip.append(index.get(mirrored))
    return None if None in flip else tuple(flip)


# Two sets call the same place otherwise: CrowdPose's head is the top of it, PoseTrack's head_bottom the neck.
ALIASES = {("head",): ("head", "top"), ("bottom", "head"): ("neck",)}


def rows_in(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """Of each keypoint of ours the index of the same one among theirs, -1 where they have none.

    Names agree when they have the same words: left_wrist, LeftWrist, wrist_l and l_wrist do.
    """
    def plain(name: str) -> tuple[str, ...]:
        read = tuple(sorted({"l": "left", "r": "right"}.get(word, word) for word in words(name)))
        return ALIASES.get(read, read)

    index = {plain(name): k for k, name in reversed([*enumerate(theirs)]) if plain(name)}
    return [index.get(plain(name), -1) for name in ours]


# ---------------------------------------------------------------- the built-in sets

def pairs(*parts: str) -> tuple[str, ...]:
    return tuple(f"{side}_{part}" for part in parts for side in ("left", "right"))


def twice(*sigmas: float) -> tuple[float, ...]:
    return tuple(sigma for sigma in sigmas for _ in range(2))


def edges(text: str) -> tuple[tuple[int, int], ...]:
    """'15-13 13-11' as ((15, 13), (13, 11))."""
    return tuple(tuple(map(int, edge.split("-"))) for edge in text.split())


def build(name: str, keypoints: tuple, edge_text: str, sigmas: tuple, flip: tuple | None = None) -> Skeleton:
    """flip: where the names do not say it."""
    return Skeleton(name, keypoints, edges(edge_text), flip or flip_from_names(keypoints), sigmas)


BODY = pairs("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
BODY_SIGMAS = twice(.079, .072, .062, .107, .087, .089)
COCO_EDGES = "15-13 13-11 16-14 14-12 11-12 5-11 6-12 5-6 5-7 6-8 7-9 8-10 1-2 0-1 0-2 1-3 2-4 3-5 4-6 "

COCO = build("coco", ("nose", *pairs("eye", "ear"), *BODY), COCO_EDGES, (.026, *twice(.025, .035), *BODY_SIGMAS))

# The edges in CrowdPose's own files are COCO's and wrong for its 14 keypoints.
CROWDPOSE = build(
    "crowdpose", (*BODY, "head", "neck"),
    "10-8 8-6 11-9 9-7 6-7 0-6 1-7 0-1 0-2 1-3 2-4 3-5 12-13 1-13 0-13", (*BODY_SIGMAS, .079, .079))

# The 15 keypoints that PoseTrack scores: its files carry 17, of which the two ears are never labelled.
# PoseTrack itself is scored by head size, not by OKS; the sigmas are mmpose's choice.
POSETRACK = build(
    "posetrack", ("nose", "head_bottom", "head_top", *BODY),
    "13-11 11-9 14-12 12-10 9-10 3-9 4-10 3-4 3-5 4-6 5-7 6-8 0-1 0-2 1-3 1-4",
    (.026, .025, .025, *BODY_SIGMAS))

HUMANART21 = build("humanart21", COCO.keypoints + pairs("finger", "toe"), COCO_EDGES + "15-19 16-20 9-17 10-18",
                   COCO.sigmas + (.089,) * 4)


def wholebody() -> Skeleton:
    """COCO-WholeBody: 17 body, 6 feet, 68 face (the iBUG order), 21 + 21 hand keypoints."""
    fingers = ("thumb", "forefinger", "middle_finger", "ring_finger", "pinky_finger")
    foot, hand = ("big_toe", "small_toe", "heel"), ("hand_root", *(f"{name}{k}" for name in fingers for k in range(1, 5)))
    feet, hands = (tuple(f"{side}_{part}" for side in ("left", "right") for part in parts) for parts in (foot, hand))
    names = (*COCO.keypoints, *feet, *(f"face-{k}" for k in range(68)), *hands)

    # Face keypoints carry no side in their names. Runs of the mirrored order: jaw, brows, nose ridge, nostrils,
    # upper and lower lid of either eye, outer lips above and below, inner lips above and below.
    runs = [range(16, -1, -1), range(26, 16, -1), range(27, 31), range(35, 30, -1),
            range(45, 41, -1), (47, 46), range(39, 35, -1), (41, 40),
            range(54, 47, -1), range(59, 54, -1), range(64, 59, -1), range(67, 64, -1)]
    by_name, face = flip_from_names(names), [23 + k for run in runs for k in run]

    face_sigmas = (.042, .043, .044, .043, .040, .035, .031, .025, .020, .023, .029, .032, .037, .038,
                   .043, .041, .045, .013, .012, .011, .011, .012, .012, .011, .011, .013, .015, .009,
                   .007, .007, .007, .012, .009, .008, .016, .010, .017, .011, .009, .011, .009, .007,
                   .013, .008, .011, .012, .010, .034, .008, .008, .009, .008, .008, .007, .010, .008,
                   .009, .009, .009, .007, .007, .008, .011, .008, .008, .008, .010, .008)
    hand_sigmas = (.029, .022, .035, .037, .047, .026, .025, .024, .035, .018, .024, .022, .026, .017,
                   .021, .021, .032, .020, .019, .022, .031)
    sigmas = (*COCO.sigmas, .068, .066, .066, .092, .094, .094, *face_sigmas, *hand_sigmas, *hand_sigmas)

    of_hands = " ".join(f"{root if k == 1 else root + finger + k - 1}-{root + finger + k}"
                        for root in (91, 112) for finger in range(0, 20, 4) for k in range(1, 5))
    return build("wholebody", names, COCO_EDGES + "15-17 15-18 15-19 16-20 16-21 16-22 " + of_hands, sigmas,
                 (*by_name[:23], *face, *by_name[91:]))


# Where COCO-WholeBody's evaluations begin and end among the 133 keypoints.
WHOLEBODY_PARTS = dict(body=(0, 17), foot=(17, 23), face=(23, 91), lefthand=(91, 112), righthand=(112, 133),
                       wholebody=(0, 133))

SKELETONS = {s.name: s for s in (COCO, CROWDPOSE, POSETRACK, wholebody(), HUMANART21)}


def get_skeleton(skeleton: str | dict | Skeleton) -> Skeleton:
    """A built-in set by name, one stored in a checkpoint (dict), or a Skeleton as it is."""
    if isinstance(skeleton, Skeleton):
        return skeleton
    if isinstance(skeleton, dict):
        return Skeleton.from_dict(skeleton)
    if skeleton not in SKELETONS:
        close = difflib.get_close_matches(skeleton, SKELETONS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(SKELETONS)}"
        raise UserError(f"unknown skeleton '{skeleton}': {hint}")
    return SKELETONS[skeleton]


# ---------------------------------------------------------------- a dataset's own keypoints

DEFAULT_SIGMA = 0.067                                       # the mean of COCO's 17


def keypoint_names(category: dict) -> list[str]:
    """The names of an entry of a COCO file's `categories` as text; none where they are no list."""
    names = category.get("keypoints")
    if isinstance(names, str):
        names = [name for name in re.split(r"[,;\s]+", names) if name]
    names = names if isinstance(names, (list, tuple)) else []
    return [str(name.get("name", name) if isinstance(name, dict) else name) for name in names]


def edges_of(category: dict, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """`skeleton`, pairs of numbers from 1 on or of names, as pairs from 0 on. What is no such pair is left out, said."""
    given = category.get("skeleton") or ()
    given = given if isinstance(given, (list, tuple)) else (given,)
    place = {words(name): k + 1 for k, name in enumerate(names)}

    def number(end) -> int:
        """From 1 on, or from 0 on; -1 of what is no keypoint."""
        end = place.get(words(end), end) if isinstance(end, str) else end
        try:
            return int(end) if int(end) == float(end) else -1
        except (TypeError, ValueError, OverflowError):
            return -1

    edges = [tuple(map(number, edge)) if isinstance(edge, (list, tuple)) and len(edge) == 2 else (-1, -1) for edge in given]
    first = 0 if any(0 in edge for edge in edges) else 1     # COCO counts from 1; some tools from 0
    edges = [(a - first, b - first) for a, b in edges]
    good = [edge for edge in edges if all(0 <= end < len(names) for end in edge)]
    if len(good) < len(edges):
        print(f"keypoint set '{category.get('name', 'custom')}': {len(edges) - len(good)} of {len(edges)} edges in "
              "'skeleton' join no two keypoints: left out, they are for drawing only")
    return tuple(good)


def skeleton_from_category(category: dict, sigmas: Sequence[float] | None = None) -> Skeleton:
    """The keypoint set of an entry of a COCO file's `categories`: `keypoints` (names), `skeleton` (1-based).

    A built-in set is recognised by its names and returned with our edges and sigmas. Otherwise left/right pairs
    are read from the names, and sigmas that you do not give are guessed by name, with a printed notice.
    """
    names = tuple(keypoint_names(category))
    if not names:
        raise UserError("the annotation file's category has no 'keypoints' names: add them, or name a skeleton")
    for known in SKELETONS.values():
        if same_names(names, known.keypoints):
            return known if sigmas is None else replace(known, sigmas=tuple(map(float, sigmas)))

    flip, label = flip_from_names(names), str(category.get("name", "custom"))
    print(f"keypoint set '{label}': {len(names)} keypoints, " + (
        "left and right are not clear from the names: images will not be mirrored" if flip is None
        else f"{sum(m != k for k, m in enumerate(flip)) // 2} left/right pairs found in the names"))
    if sigmas is None:
        known = {words(keypoint): sigma for s in reversed(SKELETONS.values())
                 for keypoint, sigma in zip(s.keypoints, s.sigmas)}
        sigmas = [known.get(words(name), DEFAULT_SIGMA) for name in names]
        print(f"keypoint set '{label}': no OKS sigmas given; taking {DEFAULT_SIGMA}, or COCO's where a name is "
              "known. AP depends on them: compare only with runs that use the same.")
    return Skeleton(label, names, edges_of(category, names), flip, tuple(map(float, sigmas)))
