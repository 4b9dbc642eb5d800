"""PoseTrack 2017, 2018 and 21: their files, and the mean average precision that their papers report.

Layouts  2017     annotations/{split}/<video>.json with 'annolist'; person boxes are made from the joints
         2018     annotations/{split}/<video>.json in a form like COCO's; v is 0 or 1
         21       posetrack_data/{split}/<video>.json as 2018; a hidden joint has coordinates and v = 0
         all      images/... as the files name them; neighbours of a frame have the numbers before and after its own
Joints   15: the ears of 2018 and 21 have a place in the files, but no labels. v becomes 1 where the file says that a
         joint is hidden (21, 2017, puppets), 2 for all other labels.
Metric   AP of each joint, matched by half the head's size, as the official evaluator computes it: `mean_ap`.
Units    pixels; values of the metric are percent
"""
from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from common.datasets import PoseDataset, id_key, load_json, numbers, size_of
from common.errors import UserError
from common.records import BOX_TO_AREA, BadImage, Prediction, Sample
from common.skeletons import POSETRACK, Skeleton, rows_in

HEAD_SHARE, MATCH_DISTANCE = 0.6, 0.5       # head size over its box's diagonal; a match is half of that away
NO_SCORE = -9999.0                          # of a predicted joint without a score
ORDER_2017 = ("right_ankle right_knee right_hip left_hip left_knee left_ankle right_wrist right_elbow right_shoulder "
              "left_shoulder left_elbow left_wrist head_bottom nose head_top").split()      # by `id`
ORDER_2018 = (*POSETRACK.keypoints[:3], "left_ear", "right_ear", *POSETRACK.keypoints[3:])
COLUMNS = {"Head": ("head_top", "head_bottom", "nose"), **{
    part.capitalize(): (f"left_{part}", f"right_{part}") for part in "shoulder elbow wrist hip knee ankle".split()}}
KEPT_PIXELS = 2**26                         # decoded frames that stay in memory, see `PoseTrackDataset.picture`


@dataclass
class Person:
    """One annotated or predicted person."""
    joints: np.ndarray                      # (15, 3): x, y, v (0 none, 1 hidden, 2 any other)
    scores: np.ndarray                      # (15,) of predicted joints
    head: float = 0.0                       # px; 0: no head box, so nothing matches
    box: list[float] | None = None          # x, y, w, h
    track: int = -1
    pointed: bool = True                    # the file has a list of joints for her, if an empty one

    def __post_init__(self):
        """A head without end would match every joint."""
        self.head = self.head if np.isfinite(self.head) else 0.0
        self.track = self.track if abs(self.track) < 2 ** 63 else -1


@dataclass
class Frame:
    """One frame of an annotation or prediction file."""
    image_id: int | str
    name: str                               # relative to the data set's folder
    people: list[Person]
    regions: list[np.ndarray]               # polygons (n, 2) in which nobody was annotated
    labelled: bool = True
    size: tuple | None = None               # (w, h) if the file has it


# ---------------------------------------------------------------- files

def frames_of(content: dict, path: Path | str) -> tuple[str, list[Frame]]:
    """The year, '17', '18' or '21', and the frames of a file's content. Raises `UserError` for any other format."""
    fields = content if isinstance(content, dict) else {}
    try:
        if isinstance(fields.get("annolist"), list):
            return "17", [_frame_2017(entry) for entry in fields["annolist"]]
        if isinstance(fields.get("images"), list):
            return _frames_2018(fields, path)
    except UserError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not in PoseTrack's format: {type(error).__name__}: {error}") from None
    raise UserError(f"{path} is not in PoseTrack's format: it has neither 'annolist' (2017) nor 'images' (2018, 21)")


def _scalar(value, default: float = 0.0) -> float:
    """2017 puts every number into a list of one; absent ones are an empty list or missing."""
    value = value[0] if isinstance(value, list) and value else value
    return default if value is None or value == [] else float(value)


def _frame_2017(entry: dict) -> Frame:
    people = []
    for rect in entry.get("annorect") or []:
        joints, scores = np.zeros((15, 3)), np.full(15, NO_SCORE)
        points = rect.get("annopoints") or []
        points = points if isinstance(points, list) else [points]
        for point in (p for group in points for p in group.get("point") or []):
            j = POSETRACK.keypoints.index(ORDER_2017[int(_scalar(point["id"]))])
            hidden = _scalar(point.get("is_visible"), 1) == 0
            joints[j] = _scalar(point["x"]), _scalar(point["y"]), 1 if hidden else 2
            scores[j] = _scalar(point.get("score"), NO_SCORE)
        x1, y1, x2, y2 = (_scalar(rect.get(name)) for name in ("x1", "y1", "x2", "y2"))
        people.append(Person(joints, scores, HEAD_SHARE * float(np.hypot(x2 - x1, y2 - y1)), None,
                             int(_scalar(rect.get("track_id"), -1)), any("point" in group for group in points)))
    name = entry["image"][0]["name"] if isinstance(entry["image"], list) else entry["image"]["name"]
    name = name[0] if isinstance(name, list) else name
    regions = [np.array([[_scalar(p["x"]), _scalar(p["y"])] for p in region["point"]])
               for region in entry.get("ignore_regions") or [] if region.get("point")]
    return Frame(name, name, people, regions, bool(_scalar(entry.get("is_labeled"), 1)))


def _box_around(joints: np.ndarray) -> list[float] | None:
    """x, y, w, h of the labelled joints, 15 % wider on every side: 2017 has no person boxes."""
    xy = joints[joints[:, 2] > 0, :2]
    if not len(xy):
        return None
    extent = np.maximum(np.ptp(xy, axis=0), 2)
    return [*(xy.min(0) - 0.15 * extent).tolist(), *(1.3 * extent).tolist()]


def _frames_2018(content: dict, path: Path | str) -> tuple[str, list[Frame]]:
    people = defaultdict(list)
    annotations = content.get("annotations") or []          # the test sets have none
    count, places = _places_2018(content, path)
    for a in annotations:
        values = numbers(a.get("keypoints") or [0] * 3 * count, 3 * count)
        if values is None:
            raise UserError(f"{path}, annotation {a.get('id')}: expected {count} keypoints of x, y and v, as PoseTrack "
                            f"2018 and 21 have them, got {len(a['keypoints'])} numbers")
        raw = np.nan_to_num(values).reshape(-1, 3)[places]
        hidden = np.array(a["hidden"], bool)[places] if "hidden" in a else raw[:, 2] == 0       # the puppets say so
        joints = np.concatenate([raw[:, :2], np.where(hidden, 1, 2)[:, None]], 1) * (raw != 0).any(1, keepdims=True)
        scores = numbers(a.get("scores") or [NO_SCORE] * count, count)
        head = numbers(a.get("bbox_head") or [0] * 4, 4)
        people[id_key(a["image_id"])].append(Person(
            joints, np.full(15, NO_SCORE) if scores is None else scores[places],
            0.0 if head is None else HEAD_SHARE * float(np.hypot(*head[2:])), a.get("bbox"),
            int(a.get("track_id") or 0), "keypoints" in a))
    frames = []
    for image in content["images"]:
        regions = [np.stack([x, y], 1).astype(float) for x, y in zip(image.get("ignore_regions_x") or [],
                                                                     image.get("ignore_regions_y") or []) if len(x)]
        size = (image["width"], image["height"]) if image.get("width") and image.get("height") else None
        frames.append(Frame(image["id"], image["file_name"], people[id_key(image["id"])], regions,
                            bool(image.get("is_labeled", True)), size))
    newer = any("person_id" in a for a in annotations) or any("has_labeled_person" in i for i in content["images"])
    return "21" if newer else "18", frames


def _places_2018(content: dict, path: Path | str) -> tuple[int, list[int]]:
    """How many keypoints a file has, and where the 15 are among them. Raises `UserError` where one is missing."""
    names = next((c["keypoints"] for c in content.get("categories") or [] if c.get("keypoints")), ORDER_2018)
    places = rows_in(names, POSETRACK.keypoints)
    if missing := [name for name, place in zip(POSETRACK.keypoints, places) if place < 0]:
        raise UserError(f"{path} is not in PoseTrack's format: its keypoints lack {', '.join(missing)}")
    return len(names), places


class PoseTrackDataset(PoseDataset):
    """A split of PoseTrack: every frame of its videos as a `Sample` with `frames` (t-1, t+1) and track ids.

    Frames without labels stay, for the metric; `training()` leaves them out.
    """
    sizes_from = "other frames of the video"

    def __init__(self, split: str, files: Sequence[Path], root: Path,
                 skeleton: str | dict | Skeleton | None = None, sigmas: Sequence[float] | None = None):
        self.root, self.kept = root, {}
        super().__init__("posetrack", split, files, [root], skeleton, sigmas)
        self.metric = "posetrack"
        self.name = f"posetrack{self.year}"
        self.listed = set(self.paths)

    def _read_files(self) -> list[dict]:
        """One COCO-like dict of all videos, with 15 keypoints, for the checks of `PoseDataset`."""
        self.videos: list[list[Frame]] = []
        years = {}
        for path in self.files:
            year, frames = frames_of(load_json(path), path)
            years.setdefault(year, path)
            self.videos.append(frames)
        if "17" in years and len(years) > 1:
            other = next(year for year in years if year != "17")
            raise UserError(f"{years['17']} is in PoseTrack 2017's format, {years[other]} in 20{other}'s: one folder "
                            "holds one of them, see data/README.md")
        self.year = max(years)
        self.frame_of = {id_key(frame.image_id): frame for frames in self.videos for frame in frames}
        images, annotations = [], []
        for frames in self.videos:
            # the original files do not have it; all frames of a video have that of the first one which can be read
            known = chain((frame.size for frame in frames), (size_of(f"{self.root}/{frame.name}") for frame in frames))
            size = next(filter(None, known), (1, 1))
            for frame in frames:
                w, h = frame.size or size
                images.append(dict(id=frame.image_id, file_name=frame.name, width=w, height=h))
                annotations += [self._annotation(frame, n, person) for n, person in enumerate(frame.people)]
        categories = [dict(id=1, name="person", keypoints=list(POSETRACK.keypoints))]
        return [dict(images=images, annotations=annotations, categories=categories)]

    @staticmethod
    def _annotation(frame: Frame, n: int, person: Person) -> dict:
        """A person as a COCO annotation; joints without a label are zeros."""
        box = person.box if person.box is not None else _box_around(person.joints)
        sides = numbers(box, 4)
        area = BOX_TO_AREA * float(sides[2] * sides[3]) if sides is not None else 0.0
        return dict(id=f"{frame.image_id}/{n}", image_id=frame.image_id, category_id=1, bbox=box, area=area, iscrowd=0,
                    keypoints=person.joints.ravel().tolist(), num_keypoints=int((person.joints[:, 2] > 0).sum()),
                    track_id=person.track, labelled=frame.labelled)

    def _read_fields(self, people: list[dict]):
        super()._read_fields(people)
        self.track_ids = np.array([person["track_id"] for person in people], np.int64)
        self.in_labelled = np.array([person["labelled"] for person in people], bool)

    def __getitem__(self, i: int) -> Sample:
        n = self.rows[i]
        people = slice(self.offsets[n], self.offsets[n + 1])
        return replace(super().__getitem__(i), frames=self._neighbours(self.paths[n]),
                       track_ids=self.track_ids[people].copy())

    def _neighbours(self, path: str) -> tuple[Path, Path]:
        """The frames before and after, annotated or not; at the ends of a clip the frame itself."""
        number = re.search(r"\d+(?=\.\w+$)", path)

        def beside(step: int) -> Path:
            if number and int(number[0]) + step >= 0:
                other = f"{path[:number.start()]}{int(number[0]) + step:0{len(number[0])}d}{path[number.end():]}"
                if other in self.listed or os.path.isfile(other):
                    return Path(other)
            return Path(path)
        return beside(-1), beside(1)

    def load(self, i: int) -> tuple[Sample | None, str]:
        """As `PoseDataset.load`, with the neighbouring frames. The key frame takes the place of a neighbour that
        cannot be read, or has another size; the message says so."""
        sample, message = super().load(i)
        if sample is None:
            return None, message
        messages, frames = [message] * bool(message), []
        for path in sample.frames:
            try:
                frame = self.picture(path, sample.size)
                if frame.size != sample.size:
                    raise BadImage(path, f"it has {frame.size[0]}x{frame.size[1]} pixels, the frame beside it "
                                   f"{sample.size[0]}x{sample.size[1]}")
            except BadImage as error:
                messages.append(f"{error}; as a neighbour, the frame beside it takes its place")
                frame = sample.image
            frames.append(frame)
        return replace(sample, frames=tuple(frames)), "; ".join(messages)

    def picture(self, path: Path, size: tuple[int, int]) -> Image.Image:
        """The first ones stay in memory: each is needed three times per person; those of the puppets all fit."""
        if path not in self.kept:
            picture = super().picture(path, size)
            if (len(self.kept) + 1) * picture.width * picture.height > KEPT_PIXELS:
                return picture
            self.kept[path] = picture
        return self.kept[path]

    def training(self) -> PoseDataset:
        """The labelled frames in which somebody has a labelled joint."""
        view = super().training()
        view.rows = view.rows[self.count(self.in_labelled)[view.rows] > 0]
        if not len(view):
            raise UserError(f"nothing to train on in {self.files[0].parent}: no labelled frame has a labelled joint")
        return view

    def report(self) -> str:
        """Sequences and frames, then what `PoseDataset` says."""
        frames = [frame for video in self.videos for frame in video]
        tracks = {(n, p.track) for n, video in enumerate(self.videos) for frame in video for p in frame.people}
        headless = sum(not person.head for frame in frames for person in frame.people)
        text = (f"{len(self.videos)} videos, {len(frames)} frames, {sum(frame.labelled for frame in frames)} of them "
                f"labelled, {len(tracks)} tracks of people\n{super().report()}")
        return text + f"\n  {headless} people without a head box: the metric will not find them" * (headless > 0)


def find_posetrack(folder: Path, split: str) -> list[Path]:
    """The annotation files of a split, one per video. Raises `UserError` for the MATLAB files of 2017."""
    for name in (f"annotations/{split}", f"posetrack_data/{split}"):
        files = sorted((folder / name).glob("*.json"))
        if files:
            return files
        if any((folder / name).glob("*.mat")):
            raise UserError(f"{folder / name} holds PoseTrack 2017's MATLAB files: put its JSON files there instead")
    return []


# ---------------------------------------------------------------- the metric

def inside(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Which points (n, 2) lie strictly inside a polygon (m, 2): an odd number of its edges is right of them."""
    a, b = polygon[None], np.roll(polygon, -1, 0)[None]
    x, y = points[:, None, 0], points[:, None, 1]
    turn = (b[..., 0] - a[..., 0]) * (y - a[..., 1]) - (b[..., 1] - a[..., 1]) * (x - a[..., 0])
    low, high = np.minimum(a, b), np.maximum(a, b)
    on_edge = ((turn == 0) & (low[..., 0] <= x) & (x <= high[..., 0]) & (low[..., 1] <= y) & (y <= high[..., 1])).any(1)
    crosses = (a[..., 1] > y) != (b[..., 1] > y)
    rising = b[..., 1] > a[..., 1]
    return ((crosses & np.where(rising, turn > 0, turn < 0)).sum(1) % 2 == 1) & ~on_edge


def without_ignored(people: list[Person], regions: list[np.ndarray]) -> list[Person]:
    """People without the joints in regions to ignore; those left without joints go (step 3)."""
    if not regions:
        return people
    kept = []
    for person in people:
        ignored = np.any([inside(person.joints[:, :2], region) for region in regions], axis=0)
        joints = person.joints * ~ignored[:, None]
        if (joints[:, 2] > 0).any():
            kept.append(replace(person, joints=joints))
    return kept


def match_people(truth: list[Person], found: list[Person]) -> tuple[np.ndarray, dict[int, int]]:
    """Whether joints match (D, G, 15), and which annotated person each matched prediction belongs to (steps 4 and 5).

    A prediction keeps the person of whose joints it matches most, a person the best such prediction; by pose alone.
    """
    theirs, ours = (np.array([person.joints for person in people]).reshape(-1, 15, 3) for people in (truth, found))
    head = np.array([person.head for person in truth])[:, None]
    distance = np.linalg.norm(ours[:, None, :, :2] - theirs[..., :2], axis=-1)      # (D, G, 15)
    close = (ours[:, None, :, 2] > 0) & (theirs[..., 2] > 0) & (head > 0) & (distance <= MATCH_DISTANCE * head)
    annotated = (theirs[..., 2] > 0).sum(1)
    correct = close.sum(-1) / np.maximum(annotated, 1)                              # (D, G)
    owner = {}
    if correct.size:
        correct = correct * (np.arange(len(truth)) == correct.argmax(1)[:, None])   # the first of equal ones
        owner = {int(d): g for g, d in enumerate(correct.argmax(0)) if correct[d, g] > 0}
    return close, owner


def mean_ap(pairs: Sequence[tuple[Frame, list[Person]]], hidden: bool = False) -> dict:
    """PoseTrack's AP from annotated frames and who was found in each: the official evaluator's steps.

    Returns  lists over the 15 joints of POSETRACK: ap, precision and recall at the end of the ranking (percent),
             gt_joints, detections, true_positives; and frames. AP is NaN for a joint that is found but never
             annotated, 0 for one that is never found.
    With `hidden` (ours, not PoseTrack's) only hidden joints are sought: a person's other joints do not count.
    """
    pairs = [pair for pair in pairs if pair[0].people]                              # step 1
    scores, labels, positives = [[] for _ in range(15)], [[] for _ in range(15)], np.zeros(15, int)
    for frame, found in pairs:
        truth, found = ([p for p in people if p.pointed] for people in (frame.people, found))       # step 2
        truth, found = without_ignored(truth, frame.regions), without_ignored(found, frame.regions)
        sought = [(person.joints[:, 2] == 1) if hidden else (person.joints[:, 2] > 0) for person in truth]
        positives += np.sum(sought, 0, dtype=int) if sought else 0
        close, owner = match_people(truth, found)
        for d, person in enumerate(found):                                          # step 6
            g = owner.get(d)
            for j in np.flatnonzero(person.joints[:, 2] > 0):
                if not hidden or g is None or sought[g][j]:
                    scores[j].append(person.scores[j])
                    labels[j].append(g is not None and bool(close[d, g, j]))
    rows = [average_precision(np.array(s), np.array(t, bool), n) for s, t, n in zip(scores, labels, positives)]
    ap, precision, recall = (list(column) for column in zip(*rows))
    return dict(ap=ap, precision=precision, recall=recall, gt_joints=positives.tolist(), frames=len(pairs),
                detections=[len(s) for s in scores], true_positives=[sum(t) for t in labels])


def average_precision(scores: np.ndarray, true: np.ndarray, positives: int) -> tuple[float, float, float]:
    """AP, and precision and recall at the end, in percent (steps 7 and 8): the area under the precision envelope."""
    if not len(scores):
        return 0.0, 0.0, 0.0
    hits = np.cumsum(true[np.argsort(-scores, kind="stable")])
    precision = hits / np.arange(1, len(hits) + 1)
    if not positives:
        return np.nan, 100 * float(precision[-1]), np.nan
    recall = hits / positives
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    area = (np.diff(recall, prepend=0) * envelope).sum()
    return 100 * float(area), 100 * float(precision[-1]), 100 * float(recall[-1])


def columns(ap: Sequence[float]) -> dict[str, float]:
    """The columns of the papers (step 9). Mean is that of the joints, so Head counts three of fifteen."""
    by_name = dict(zip(POSETRACK.keypoints, ap))
    table = {name: float(np.mean([by_name[joint] for joint in joints])) for name, joints in COLUMNS.items()}
    return table | {"Mean": float(np.nanmean(ap)) if np.isfinite(ap).any() else np.nan}


def people_of(prediction: Prediction) -> list[Person]:
    """A prediction's people for the metric; joints that are no numbers were not predicted."""
    people = []
    for xy, scores in zip(prediction.keypoints, prediction.keypoint_scores):
        good = np.isfinite(xy).all(-1) & np.isfinite(scores)
        people.append(Person(np.concatenate([np.where(good[:, None], xy, 0), 2 * good[:, None]], 1), scores))
    return people


def evaluate(predictions: Sequence[Prediction], dataset: PoseDataset) -> dict[str, float]:
    """The columns of PoseTrack's papers, and `Hidden`, the mean over hidden joints alone; NaN if none is known.

    Raises UserError for predictions of images that are not in the dataset.
    """
    found = defaultdict(list)
    for p in predictions:
        found[id_key(p.image_id)] += people_of(p)
    if lost := sum((person.joints[:, 2] == 0).sum() for people in found.values() for person in people):
        print(f"dropped {lost} predicted joints: NaN or infinite numbers in them")
    keys = [id_key(dataset.id_of(n)) for n in dataset.rows]
    if unknown := sorted(found.keys() - set(keys)):
        raise UserError(f"{len(unknown)} predicted image ids are not in the ground truth ({', '.join(unknown[:3])}): "
                        "evaluate on the data that was predicted")
    pairs = [(dataset.frame_of[key], found[key]) for key in keys]
    ap, hidden = mean_ap(pairs)["ap"], mean_ap(pairs, hidden=True)
    hidden_ap = [value for value, count in zip(hidden["ap"], hidden["gt_joints"]) if count]
    return columns(ap) | {"Hidden": float(np.mean(hidden_ap)) if hidden_ap else np.nan}
