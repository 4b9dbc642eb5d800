"""Where the people are, for methods that look at one person at a time.

    boxes = true_boxes(data)                     the annotated people
    boxes = read_boxes("detections.json", data)  of a detector, as COCO results
    boxes = detect(find, data, ranks, name)      of another model of ours

Units    boxes are x1, y1, x2, y2 in pixels of the image, except `bbox` in COCO results: x, y, w, h.
"""
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.datasets import PoseDataset, id_key, load_json, numbers
from common.errors import UserError
from common.ranks import Ranks, gather_lists
from common.records import Prediction

Found = tuple[np.ndarray, np.ndarray]               # the people of one image: boxes (P, 4), scores (P,)
NOBODY = (np.zeros((0, 4)), np.zeros(0))
DETECTED = 0.3                                      # score from which a detector's people are looked at


class Boxes(NamedTuple):
    """The people to look at, by image id as text, and where that is from, to be said with every result."""
    source: str
    people: dict[str, Found]

    def of(self, image_id: int | str) -> Found:
        return self.people.get(id_key(image_id), NOBODY)

    def total(self) -> int:
        return sum(len(scores) for _, scores in self.people.values())

    def at_least(self, least: float) -> "Boxes":
        """Those with a score of at least `least`."""
        people = {key: (boxes[scores >= least], scores[scores >= least]) for key, (boxes, scores) in self.people.items()}
        return self._replace(people=people)

    def __str__(self) -> str:
        return f"person boxes: {self.source}, {self.total()} people"


# ---------------------------------------------------------------- where the people are

def whole_image(size: tuple[int, int]) -> Found:
    """The image of size (w, h) as the box of one person."""
    return np.array([[0.0, 0.0, *size]]), np.ones(1)


def in_image(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which boxes (P, 4) have a part of their area in an image of size (w, h): (P,)."""
    shown = boxes.clip(0, np.tile(size, 2))                         # NaN stays, and compares False
    return np.isfinite(boxes).all(1) & (shown[:, 2:] > shown[:, :2]).all(1)


def true_boxes(data: PoseDataset) -> Boxes:
    """The annotated boxes of people with a labelled keypoint, up to the centre of the last pixel, scores 1."""
    people = {}
    for sample in (data[i] for i in range(len(data))):
        seen = ~sample.iscrowd & (sample.keypoints[..., 2] > 0).any(1)
        boxes = sample.boxes[seen].astype(float).clip(0, np.tile(sample.size, 2) - 1)
        people[id_key(sample.image_id)] = boxes, np.ones(len(boxes))
    return Boxes("annotated (ground truth)", people)


def people_to_learn(data: PoseDataset, most: int = 0, seed: int = 0) -> np.ndarray:
    """(N, 2): image and person in it of everybody with a labelled keypoint, or of `most` of them, drawn once."""
    learn = (data.keypoints[..., 2] > 0).any(1) & ~data.iscrowd
    people = np.array([(i, p) for i, n in enumerate(data.rows)
                       for p in np.flatnonzero(learn[data.offsets[n]:data.offsets[n + 1]])])
    if most and most < len(people):
        people = people[np.sort(np.random.default_rng(seed).choice(len(people), most, replace=False))]
    return people


def read_results(path: str) -> tuple[dict[str | tuple[str, int], Found], int]:
    """COCO results → people by image id as text, and how many rows were left out. Without `score` it is 1.

    Rows about a frame of a video, with its number as `frame`, are under (image id, number).
    Of several categories the people are number 1; a file with one category is taken whatever its number.
    Raises UserError for a file that is no such list, or that holds no boxes.
    """
    results = load_json(Path(path))
    results = [r for r in results if isinstance(r, dict)] if isinstance(results, list) else []
    categories = {id_key(r.get("category_id", 1)) for r in results}
    rows: dict[str | tuple[str, int], list] = {}
    for r in results:
        person = "image_id" in r and (len(categories) == 1 or id_key(r.get("category_id", 1)) == "1")
        box, score = numbers(r.get("bbox"), 4), numbers(r.get("score", 1.0), 1)
        if person and box is not None and score is not None:
            key, frame = id_key(r["image_id"]), r.get("frame")
            rows.setdefault((key, frame) if isinstance(frame, int) else key, []).append([*box, *score])
    if not rows:
        raise UserError(f"{path} holds no person boxes: expected COCO results, [{{image_id, bbox: [x, y, w, h], "
                        "score}, ...] of one category or of category 1")
    people = {key: np.array(of_image) for key, of_image in rows.items()}
    found = {key: (np.c_[p[:, :2], p[:, :2] + p[:, 2:4]], p[:, 4]) for key, p in people.items()}
    return found, len(results) - sum(map(len, rows.values()))


def read_boxes(path: str, data: PoseDataset) -> Boxes:
    """Boxes of a dataset from COCO results, not clipped; those outside of their image are counted and left out.

    Raises UserError for a file that is none, and for one about other images.
    """
    (people, dropped), sizes = read_results(path), {id_key(data[i].image_id): data[i].size for i in range(len(data))}
    known = people.keys() & sizes.keys()
    if not known:
        raise UserError(f"{path} has boxes for {len(people)} images ({', '.join(map(str, list(people)[:3]))}, ...), and none of "
                        f"them is in {data.files[0]}: choose the boxes that were detected in these images")
    chosen, outside = {}, 0
    for key in known:
        boxes, scores = people[key]
        good = in_image(boxes, sizes[key]) & np.isfinite(scores)
        chosen[key], outside = (boxes[good], scores[good]), outside + int((~good).sum())
    notes = {"of other images": sum(len(scores) for key, (_, scores) in people.items() if key not in known),
             "outside of their image, or without area": outside, "of other categories, or without a box": dropped}
    left_out = "".join(f", {count} {what} left out" for what, count in notes.items() if count)
    return Boxes(f"{path} ({len(known)} of {len(sizes)} images{left_out})", chosen)


def boxes_of(prediction: Prediction, threshold: float, size: tuple[int, int]) -> Found:
    """The people of a score of at least `threshold`; without boxes: around the keypoints, 15 % wider on each side."""
    good = np.asarray(prediction.scores) >= threshold
    boxes = None if prediction.boxes is None else np.asarray(prediction.boxes, float)[good]
    if boxes is None:
        low, high = prediction.keypoints[good].min(1), prediction.keypoints[good].max(1)
        boxes = np.concatenate([low - 0.15 * (high - low), high + 0.15 * (high - low)], 1)
    seen = in_image(boxes, size)
    return boxes[seen], np.asarray(prediction.scores, float)[good][seen]


def detect(find: Callable[[Image.Image, int | str], Prediction], data: PoseDataset, ranks: Ranks,
           name: str) -> Boxes:
    """The people that a multi-person method finds in each image; the images are shared among the processes."""
    found = []
    mine = range(ranks.rank, len(data), ranks.world)
    for i in tqdm(mine, "find people", disable=ranks.rank > 0, dynamic_ncols=True):
        sample, _ = data.load(i)                                    # the loop over the crops names what is unreadable
        if sample is not None:
            people = boxes_of(find(sample.image, sample.image_id), DETECTED, sample.size)
            found.append((id_key(sample.image_id), people))
    return Boxes(f"found by {name}, score {DETECTED:g} or more", dict(gather_lists(found)))
