"""Why is my AP low? The errors of predictions by kind, and the AP that there would be without each kind.

After Ronchi and Perona 2017, "Benchmarking and Error Diagnosis in Multi-Instance Pose Estimation". How near a
keypoint is to a place is its term of OKS, ks = exp(-d² / (2 s² κ²)) with κ = 2σ and s² the area of the person
whose place it is.

People      Predictions take people by score, each the free one with the highest OKS, from 0.1 on, the paper's
            loose threshold. What remains:
  missed      a person whom no prediction takes
  duplicate   a prediction like a person, OKS 0.1 or more, whom one of a higher score has taken
  false       a prediction like nobody
Keypoints   each labelled one of the people found (Sec. 3.1 there):
  good        ks of 0.85 or more
  jitter      less, but 0.5 or more
  inversion   less, but 0.5 or more to the same person's keypoint of the other side
  swap        less, but 0.5 or more to this keypoint, or the mirrored one, of another person of the picture;
              of inversion and swap the one with the higher ks
  miss        none of these
  hidden      any of the last four, at a keypoint that cannot be seen (v = 1): these are counted twice

Within the tolerance of its own place, ks 0.5, a keypoint is good or jitter here; in the authors' program it is
an inversion or a swap if another place is nearer still. Their scoring errors (Sec. 3.2) are part of the
duplicates. A pose on a neighbour whom another has taken, if it takes somebody beside him, is one with swaps.

AP is COCO's, by OKS, of the whole set, with the best 20 predictions of a picture, for PoseTrack's frames too.
Left out is what it never counts: predictions on crowd regions and on people without labels. Without all kinds
AP is 1 at thresholds of OKS up to 0.85; at the higher ones good keypoints may still be too far off.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import draw, metrics
from common.datasets import MOST, PoseDataset, id_key
from common.errors import UserError
from common.oks import oks, oks_terms
from common.records import Prediction
from common.skeletons import Skeleton
from common.video import save_pictures

GOOD, NEAR = 0.85, 0.5              # ks from which a keypoint is good; from which it is at a place
FOUND = 0.1                         # OKS from which a prediction may take a person
IGNORED = 0.95                      # COCO's highest threshold
KINDS = ("good", "jitter", "inversion", "swap", "miss")
WRONG = KINDS[1:]
EVERY = (*WRONG, "missed", "duplicate", "false")
SHOWN = 12                          # people of worst.png
CIRCLES = (0.5, 0.75, 0.95)         # OKS of the circles of oks.png


@dataclass
class Person:
    """An annotated person who counts, and the predictions that are hers: COCO results with an `id`."""
    image_id: int | str
    truth: np.ndarray                       # (K, 3) x, y, v px
    area: float                             # px²
    box: np.ndarray                         # (2, 2) upper left and lower right corner px
    pose: dict | None = None                # None: missed
    oks: float = 0.0
    kinds: np.ndarray | None = None         # (K,) of KINDS; "" without a label
    duplicates: list[dict] = field(default_factory=list)

    def wrong(self, gone: Sequence[str]) -> np.ndarray:
        """Which keypoints (K,) of the pose have an error of these kinds."""
        hidden = np.isin(self.kinds, WRONG) & (self.truth[:, 2] == 1) & ("hidden" in gone)
        return np.isin(self.kinds, gone) | hidden


@dataclass
class Errors:
    """What `find_errors` finds; every prediction is a person's pose, a duplicate, false, or ignored."""
    ap: float
    people: list[Person] = field(default_factory=list)
    false: list[dict] = field(default_factory=list)
    ignored: list[dict] = field(default_factory=list)

    @property
    def found(self) -> list[Person]:
        return [p for p in self.people if p.pose]

    @property
    def duplicates(self) -> list[dict]:
        return [one for p in self.found for one in p.duplicates]


def xy(result: dict) -> np.ndarray:
    """(K, 2) of a COCO result."""
    return np.reshape(result["keypoints"], (-1, 3))[:, :2]


def keypoint_kinds(pose: np.ndarray, person: Person, others: list[Person], skeleton: Skeleton) -> np.ndarray:
    """The kind of each keypoint of a pose (K, 2) that is this person's; "" where there is no label."""
    same = np.arange(len(pose))
    flip = same if skeleton.flip is None else np.array(skeleton.flip)

    def near(one: Person, rows: np.ndarray) -> np.ndarray:
        places = one.truth[rows]
        return oks_terms(pose, places, np.array(one.area), skeleton.sigmas) * (places[:, 2] > 0)

    own, mirrored = near(person, same), near(person, flip) * (flip != same)
    beside = np.max([0 * own, *(near(one, rows) for one in others for rows in (same, flip))], axis=0)
    inverted = (mirrored >= NEAR) & (mirrored >= beside)
    unlabelled = person.truth[:, 2] == 0
    return np.select([unlabelled, own >= GOOD, own >= NEAR, inverted, beside >= NEAR], ["", *KINDS[:4]], KINDS[4])


def find_errors(ground_truth: dict, results: list[dict], skeleton: Skeleton) -> Errors:
    """Whose prediction each one is, and every keypoint's kind; of COCO-style ground truth and results.

    Ignored is a prediction that takes nobody, and that COCO matches with a crowd region or with a person
    without labels at each of its thresholds.
    """
    run = metrics.coco_eval(ground_truth, results, "keypoints", skeleton.sigmas)
    errors = Errors(float(run.stats[0]))
    for theirs, image in zip(run.cocoGt.dataset["images"], ground_truth["images"]):     # it has ids of its own
        truth, similarity = run.cocoGt.imgToAnns[theirs["id"]], run.ious[theirs["id"], 1]
        found = [d | dict(image_id=image["id"]) for d in run.cocoDt.imgToAnns[theirs["id"]]]
        found = sorted(found, key=lambda d: -d["score"])[:MOST]
        counts = np.array([bool(a["num_keypoints"]) and not a["iscrowd"] for a in truth], bool)
        similarity = np.reshape(similarity, (len(found), len(truth)))
        ignored = similarity[:, ~counts].max(1, initial=0) >= IGNORED
        similarity = similarity[:, counts]
        people = [Person(image["id"], np.reshape(a["keypoints"], (-1, 3)), a["area"],
                         np.reshape(a["bbox"], (2, 2)).cumsum(0))           # x, y, then x + w, y + h
                  for a, counted in zip(truth, counts) if counted]
        owner = metrics.match(similarity, FOUND)
        for d, result in enumerate(found):
            if d in owner:
                person = people[owner[d]]
                person.pose, person.oks = result, float(similarity[d, owner[d]])
                others = [one for one in people if one is not person]
                person.kinds = keypoint_kinds(xy(result), person, others, skeleton)
            elif ignored[d]:
                errors.ignored.append(result)
            elif similarity[d].max(initial=0) >= FOUND:
                people[int(similarity[d].argmax())].duplicates.append(result)
            else:
                errors.false.append(result)
        errors.people += people
    return errors


def corrected(errors: Errors, gone: Sequence[str], sigmas: Sequence[float]) -> list[dict]:
    """The results without errors of some kinds, of EVERY or 'hidden'.

    A keypoint moves to its label. A person who was missed is added before all others; a false prediction
    goes. Of a person's pose and its duplicates the best by OKS remains, with the highest of their scores.
    """
    results = errors.ignored + ([] if "false" in gone else errors.false)
    highest = max((one["score"] for one in [*results, *(p.pose for p in errors.found)]), default=1.0)
    for p in errors.people:
        if p.pose is None:
            if "missed" in gone:
                labels = p.truth.ravel().tolist()
                results.append(dict(image_id=p.image_id, score=highest, keypoints=labels, id=0))
            continue
        points = np.where(p.wrong(gone)[:, None], p.truth[:, :2], xy(p.pose))
        poses = [dict(p.pose, keypoints=np.insert(points, 2, 1, axis=1).ravel().tolist()), *p.duplicates]
        if "duplicate" in gone:
            similarity = [oks(xy(one), p.truth, np.array(p.area), sigmas) for one in poses]
            poses = [dict(p.pose, keypoints=poses[int(np.argmax(similarity))]["keypoints"])]
        results += poses
    results.sort(key=lambda one: one["id"])             # equal scores are ranked by their order
    return [{name: one[name] for name in ("image_id", "score", "keypoints")} for one in results]


def error_table(errors: Errors, ground_truth: dict, skeleton: Skeleton,
                threshold: float) -> dict[str, dict[str, float]]:
    """{kind: {column: value}}, the kinds of KINDS, then hidden, missed, duplicate, false and all of them.

    count      how many; share: of labelled keypoints of the people found, of people, of predictions
    hidden     how many of them at hidden keypoints
    score ...  how many if only the predictions of a score of at least `threshold` were there
    AP without, gained    if this kind alone were gone
    """
    found = errors.found
    shape = (len(found), skeleton.num_keypoints)
    kinds = np.reshape(np.array([p.kinds for p in found], str), shape)
    unseen = np.reshape([p.truth[:, 2] for p in found], shape) == 1
    sure, labels = np.array([p.pose["score"] >= threshold for p in found], bool), int((kinds != "").sum())
    people, predictions = len(errors.people), len(found) + len(errors.false + errors.ignored + errors.duplicates)

    rows = {}                                               # count, of how many, of how many sure ones, hidden
    for name in (*KINDS, "hidden"):
        these = np.isin(kinds, WRONG) & unseen if name == "hidden" else kinds == name
        rows[name] = these.sum(), labels, these[sure].sum(), int((these & unseen).sum())
    rows["missed"] = people - len(found), people, people - sure.sum(), math.nan
    for name, these in ("duplicate", errors.duplicates), ("false", errors.false):
        rows[name] = len(these), predictions, sum(one["score"] >= threshold for one in these), math.nan
    rows["all"] = sum(rows[name][0] for name in EVERY), 0, sum(rows[name][2] for name in EVERY), math.nan

    table, bar = {}, tqdm(rows.items(), "diagnose", leave=False, dynamic_ncols=True, disable=None)
    for name, (count, total, surely, hidden) in bar:
        after = math.nan if name == "good" else errors.ap
        if count and name != "good":
            results = corrected(errors, EVERY if name == "all" else (name,), skeleton.sigmas)
            after = metrics.keypoint_ap(ground_truth, results, skeleton.sigmas)["AP"]
        table[name] = {"count": int(count), "share": count / total if total else math.nan, "hidden": hidden,
                       f"score {threshold:.2g}": int(surely), "AP without": after, "gained": after - errors.ap}
    return table


def keypoint_table(errors: Errors, skeleton: Skeleton) -> dict[str, dict[str, float]]:
    """{keypoint: {labels of the people found, share of each kind among them}}."""
    rows = {}
    for k, name in enumerate(skeleton.keypoints):
        kinds = [p.kinds[k] for p in errors.found if p.kinds[k]]
        rows[name] = dict(labels=len(kinds), **{
            kind: kinds.count(kind) / len(kinds) if kinds else math.nan for kind in KINDS})
    return rows


# ---------------------------------------------------------------- a dataset

def truth_to_diagnose(data: PoseDataset) -> dict:
    """A set's ground truth as AP has it, of videos the labelled frames. Raises UserError without labels."""
    truth = data.ground_truth()
    if data.metric == "crowdpose":
        truth = metrics.with_crowdpose_areas(truth)
    if data.metric == "posetrack":
        images = [image for image in truth["images"] if data.frame_of[id_key(image["id"])].labelled]
        known = {image["id"] for image in images}
        people = [a for a in truth["annotations"] if a["image_id"] in known]
        truth |= dict(images=images, annotations=people)
    if not any(a["num_keypoints"] and not a["iscrowd"] for a in truth["annotations"]):
        raise UserError(f"--diagnose compares with labels, and in {data.files[0]} nobody has a labelled keypoint")
    return truth


def diagnose(predictions: Sequence[Prediction], data: PoseDataset, threshold: float, out: Path) -> list[str]:
    """The tables as text; draws worst.png and oks.png into `out`. Raises UserError without labels."""
    truth, skeleton = truth_to_diagnose(data), data.skeleton
    known = {id_key(image["id"]) for image in truth["images"]}
    results = [one for one in metrics.to_results(predictions) if id_key(one["image_id"]) in known]
    errors = find_errors(truth, results, skeleton)
    place = {data.id_of(n): i for i, n in enumerate(data.rows)}
    save_pictures([draw_worst(errors, data, place, threshold)], out / "worst")
    save_pictures([draw_oks(errors, data, place)], out / "oks")
    return [metrics.format_table(keypoint_table(errors, skeleton)),
            "(shares of the labels of the people found)\n",
            metrics.format_table(error_table(errors, truth, skeleton, threshold)),
            f"(AP by OKS {errors.ap:.3f}; {len(errors.found)} of {len(errors.people)} people found; hidden: at "
            "keypoints of v = 1, counted in the rows above, too;\nAP without: if this kind alone were gone; "
            f"common/diagnose.py defines the kinds; {out / 'worst.png'} and {out / 'oks.png'} show them)\n"]


def with_pictures(people: list[Person], data: PoseDataset,
                  place: dict[int | str, int]) -> Iterator[tuple[Person, Image.Image]]:
    """Those people whose picture can be read; place: of each image in the data, by its id."""
    for p in people:
        sample, _ = data.load(place[p.image_id])
        if sample is not None:
            yield p, sample.image


def draw_worst(errors: Errors, data: PoseDataset, place: dict[int | str, int], threshold: float) -> Image.Image:
    """Labels and predictions of the worst people: by OKS those found with a score of at least `threshold`,
    then those who were missed, then the others."""
    pairs, worst = [], sorted(errors.people, key=lambda p: (not p.pose or p.pose["score"] < threshold, p.oks))
    for p, picture in islice(with_pictures(worst, data, place), SHOWN):
        guess = np.zeros((0, len(p.truth), 2)) if p.pose is None else xy(p.pose)[None]
        labelled = p.truth[p.truth[:, 2] > 0, :2]
        crop, corner = crop_around(picture, np.concatenate([p.box, labelled, *guess]))
        both = [draw.draw_people(crop, points, None, data.skeleton, min_side=300)
                for points in (p.truth[None] - [*corner, 0], guess - corner)]
        text = "missed"
        if p.pose:
            counts = [f"{number} {kind}" for kind in KINDS if (number := (p.kinds == kind).sum())]
            text = f"OKS {p.oks:.2f}, score {p.pose['score']:.2f}: {', '.join(counts)}"
        text += f" (image {p.image_id})"
        pairs.append(draw.captioned(draw.contact_sheet(both, 2, cell=300, gap=2), text))
    return draw.captioned(draw.contact_sheet(pairs, columns=3, cell=620), "Labels left, predictions right")


def draw_oks(errors: Errors, data: PoseDataset, place: dict[int | str, int]) -> Image.Image:
    """Somebody with most visible keypoints, and around each the circles on which its ks is CIRCLES."""
    def fitness(p: Person) -> tuple:
        whole = (p.box > 0).all() and (p.box < data[place[p.image_id]].size).all()
        return whole, (p.truth[:, 2] == 2).sum(), (p.truth[:, 2] > 0).sum(), p.area

    for p, picture in with_pictures(sorted(errors.people, key=fitness, reverse=True), data, place):
        seen = np.flatnonzero(p.truth[:, 2] > 0)
        points, radii = p.truth[seen, :2], oks_radii(p.area, data.skeleton.sigmas)[:, seen]
        reach = [points + side * radii[0, :, None] for side in (-1, 1)]
        crop, corner = crop_around(picture, np.concatenate([*reach, p.box]))
        sides = [draw.side_of(data.skeleton, k) for k in seen]
        drawn = draw.draw_circles(crop, points - corner, radii, sides, [str(value) for value in CIRCLES])
        text = ("With every keypoint on its outer, middle or inner circle, this person's OKS is "
                f"{', '.join(map(str, CIRCLES))} (area {p.area:.0f} square pixels)")
        return draw.captioned(drawn, text)
    return Image.new("RGB", (300, 300), draw.PAPER)


def oks_radii(area: float, sigmas: Sequence[float]) -> np.ndarray:
    """Distances (3, K) in px at which a keypoint's term of OKS is CIRCLES: d = 2σ √(-2 s² ln OKS)."""
    return np.sqrt(-2 * area * np.log(CIRCLES))[:, None] * 2 * np.asarray(sigmas)


def crop_around(picture: Image.Image, points: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """The part of a picture around points (N, 2), about square, and its upper left corner (2,)."""
    low, high = points.min(0), points.max(0)
    longest = (high - low).max()
    wider = np.maximum(0.1 * longest, 4) + np.maximum(0.8 * longest - (high - low), 0) / 2
    low = np.clip(low - wider, 0, np.array(picture.size) - 1).round().astype(int)
    high = np.clip(high + wider, low + 1, picture.size).round().astype(int)
    return picture.crop((*low.tolist(), *high.tolist())), low
