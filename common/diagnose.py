"""Why is my AP low? The errors of a set's predictions by kind, and the AP that there would be without each kind.

After Ronchi and Perona 2017, "Benchmarking and Error Diagnosis in Multi-Instance Pose Estimation". A keypoint's
similarity to a place of its kind is the term of OKS, ks = exp(-d² / (2 s² κ²)), κ = 2σ, s² = the area of the person
whose place it is.

People      Predictions take people by score, each the free one with the highest OKS, from 0.1 on (their loose
            threshold). Of the others
  missed      a person whom no prediction takes
  duplicate   a prediction like a person, OKS 0.1 or more, whom one of a higher score has taken
  false       a prediction like nobody
Keypoints   each labelled one of the people found (their Sec. 3.1):
  good        ks of 0.85 or more
  jitter      0.5 or more
  inversion   less, but 0.5 or more to the same person's keypoint of the other side
  swap        less, but 0.5 or more to that keypoint, or its mirrored one, of another person of the picture; of
              inversion and swap the one with the higher ks
  miss        none of these
  hidden      any of the last four, where the label says that the keypoint cannot be seen (v = 1): counted twice

Here a keypoint within the tolerance of its own place, ks 0.5, is jitter; their program says inversion or swap if another
place is nearer still. What their Sec. 3.2 calls scoring errors is part of the duplicates. A pose that lies on a neighbour
whom another has taken, and takes somebody beside him, is there with swaps.

AP is COCO's, of the whole set, with the best 20 predictions of a picture; so it is for PoseTrack's frames. What it never
counts, predictions on crowd regions and on people without labels, is left out. Without all kinds AP is 1 at OKS up to
0.85; above, good keypoints may still be too far off.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
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
FOUND, IGNORED = 0.1, 0.95          # OKS from which a prediction may take a person; COCO's highest, see `find_errors`
KINDS = ("good", "jitter", "inversion", "swap", "miss")
PEOPLE = ("missed", "duplicate", "false")
CIRCLES = (0.5, 0.75, 0.95)         # OKS of the circles of oks.png


@dataclass
class Person:
    """An annotated person who counts, and the predictions that are hers, as COCO results with an `id`."""
    image_id: int                           # pycocotools' own
    truth: np.ndarray                       # (K, 3) x, y, v px
    area: float                             # px²
    box: np.ndarray                         # (4,) x1, y1, x2, y2
    pose: dict | None = None                # None: missed
    oks: float = 0.0
    kinds: np.ndarray | None = None         # (K,) index of KINDS; -1 without a label
    duplicates: list[dict] = field(default_factory=list)

    def wrong(self, gone: Sequence[str]) -> np.ndarray:
        """Which keypoints (K,) of the pose have an error of these kinds."""
        names = np.array([*KINDS, ""])[self.kinds]
        return np.isin(names, gone) | ((self.kinds > 0) & (self.truth[:, 2] == 1) & ("hidden" in gone))


@dataclass
class Errors:
    """What `find_errors` finds; every prediction is a person's pose, a duplicate, false, or ignored."""
    ap: float
    people: list[Person]
    false: list[dict]
    ignored: list[dict]
    names: dict[int, int | str]             # pycocotools' image ids → those of the dataset


def xy(result: dict) -> np.ndarray:
    """(K, 2) of a COCO result."""
    return np.reshape(result["keypoints"], (-1, 3))[:, :2]


def keypoint_kinds(pose: np.ndarray, person: Person, others: list[Person], skeleton: Skeleton) -> np.ndarray:
    """Index of KINDS for each keypoint of a pose (K, 2) that is this person's; -1 where there is no label."""
    flip = np.arange(len(pose)) if skeleton.flip is None else np.array(skeleton.flip)

    def near(one: Person, rows: np.ndarray) -> np.ndarray:
        places = one.truth[rows]
        return oks_terms(pose, places, np.array(one.area), skeleton.sigmas) * (places[:, 2] > 0)

    same = np.arange(len(pose))
    own, mirrored = near(person, same), near(person, flip) * (flip != same)
    others = np.max([np.zeros(len(pose)), *(near(one, rows) for one in others for rows in (same, flip))], axis=0)
    kinds = np.select([own >= GOOD, own >= NEAR, (mirrored >= NEAR) & (mirrored >= others), others >= NEAR], range(4), 4)
    return np.where(person.truth[:, 2] > 0, kinds, -1)


def find_errors(ground_truth: dict, results: list[dict], skeleton: Skeleton) -> Errors:
    """Whose prediction each one is, and every keypoint's kind; of COCO-style ground truth and results.

    Ignored is a prediction that takes nobody and is so like a crowd region, or a person without labels, that it is
    wrong at none of COCO's thresholds.
    """
    run = metrics.coco_eval(ground_truth, results, "keypoints", skeleton.sigmas)
    ids = [image["id"] for image in ground_truth["images"]]
    errors = Errors(run.stats[0], [], [], [], dict(zip([image["id"] for image in run.cocoGt.dataset["images"]], ids)))
    for (image, _), similarity in run.ious.items():
        truth = run.cocoGt.imgToAnns[image]
        found = sorted(run.cocoDt.imgToAnns[image], key=lambda d: -d["score"])[:MOST]
        counts = np.array([bool(a["num_keypoints"]) and not a["iscrowd"] for a in truth], bool)
        similarity = np.reshape(similarity, (len(found), len(truth)))
        ignored, similarity = similarity[:, ~counts].max(1, initial=0) >= IGNORED, similarity[:, counts]
        people = [Person(image, np.reshape(a["keypoints"], (-1, 3)), a["area"], box_of(a)) for a, c in zip(truth, counts) if c]
        owner = dict(metrics.match(similarity, FOUND)) if people else {}
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


def box_of(annotation: dict) -> np.ndarray:
    x, y, w, h = annotation["bbox"]
    return np.array([x, y, x + w, y + h])


def corrected(errors: Errors, gone: Sequence[str], sigmas: Sequence[float]) -> list[dict]:
    """The results without errors of some kinds: of KINDS, of PEOPLE, and 'hidden'.

    A keypoint moves to its label. A person who was missed is added before all others; a false prediction goes. Of a
    person's pose and its duplicates the best remains, with the highest of their scores.
    """
    results = errors.ignored + ([] if "false" in gone else errors.false)
    highest = max((one["score"] for one in [*results, *(p.pose for p in errors.people if p.pose)]), default=1.0)
    for p in errors.people:
        if p.pose is None:
            if "missed" in gone:
                results.append(dict(image_id=p.image_id, score=highest, keypoints=p.truth.ravel().tolist(), id=0))
            continue
        points = np.where(p.wrong(gone)[:, None], p.truth[:, :2], xy(p.pose))
        poses = [dict(p.pose, keypoints=np.insert(points, 2, 1, axis=1).ravel().tolist()), *p.duplicates]
        if "duplicate" in gone:
            similarity = [oks(xy(one), p.truth, np.array(p.area), sigmas) for one in poses]
            poses = [dict(p.pose, keypoints=poses[int(np.argmax(similarity))]["keypoints"])]
        results += poses
    results.sort(key=lambda one: one["id"])             # equal scores are ranked by their order
    return [dict(image_id=errors.names[one["image_id"]], category_id=1, score=one["score"], keypoints=one["keypoints"])
            for one in results]


def error_table(errors: Errors, ground_truth: dict, skeleton: Skeleton, threshold: float) -> dict[str, dict[str, float]]:
    """{kind: {column: value}}: how many, their share, how many of them hidden, how many if only predictions of a score
    of at least `threshold` were there; AP if this kind alone were gone, and what that gains.

    Shares are of the labelled keypoints of the people found, of the people, of the predictions.
    """
    found = [p for p in errors.people if p.pose]
    sure = np.array([p.pose["score"] >= threshold for p in found], bool)
    kinds, v = (np.reshape([one for one in column], (-1, skeleton.num_keypoints)) for column in
                ([p.kinds for p in found], [p.truth[:, 2] for p in found]))
    duplicates = [one for p in found for one in p.duplicates]
    predictions = len(found) + len(duplicates) + len(errors.false) + len(errors.ignored)
    rows = []                                           # name, how many, of how many, of a sure prediction, hidden, gone
    for name in (*KINDS, "hidden"):
        these = (kinds > 0) & (v == 1) if name == "hidden" else kinds == KINDS.index(name)
        rows.append((name, these.sum(), (kinds >= 0).sum(), these[sure].sum(), int((these & (v == 1)).sum()), (name,)))
    people = len(errors.people)
    rows.append(("missed", people - len(found), people, people - sure.sum(), math.nan, ("missed",)))
    for name, these in ("duplicate", duplicates), ("false", errors.false):
        rows.append((name, len(these), predictions, sum(one["score"] >= threshold for one in these), math.nan, (name,)))
    wrong = [row for row in rows if row[0] not in ("good", "hidden")]
    rows.append(("all", sum(row[1] for row in wrong), 0, sum(row[3] for row in wrong), math.nan, (*KINDS[1:], *PEOPLE)))
    table = {}
    for name, count, total, surely, hidden, gone in tqdm(rows, "diagnose", leave=False, dynamic_ncols=True, disable=None):
        ap = errors.ap
        if count and name != "good":
            results = corrected(errors, gone, skeleton.sigmas)
            ap = metrics.coco_eval(ground_truth, results, "keypoints", skeleton.sigmas).stats[0]
        table[name] = {"count": int(count), "share": count / total if total else math.nan, f"score {threshold:g}": int(surely),
                       "hidden": hidden, "AP without": math.nan if name == "good" else float(ap),
                       "gained": math.nan if name == "good" else float(ap - errors.ap)}
    return table


def keypoint_table(errors: Errors, skeleton: Skeleton) -> dict[str, dict[str, float]]:
    """{keypoint: {labels of the people found, share of each kind among them}}."""
    kinds = np.reshape([p.kinds for p in errors.people if p.pose], (-1, skeleton.num_keypoints))
    rows = {}
    for name, one in zip(skeleton.keypoints, kinds.T):
        labels = int((one >= 0).sum())
        rows[name] = dict(labels=labels) | {
            kind: float((one == i).sum() / labels) if labels else math.nan for i, kind in enumerate(KINDS)}
    return rows


# ---------------------------------------------------------------- a dataset

def truth_to_diagnose(data: PoseDataset) -> dict:
    """The set's ground truth as AP has it, of videos the labelled frames. Raises UserError where nobody is labelled."""
    truth = data.ground_truth()
    if data.metric == "crowdpose":
        truth = metrics.with_crowdpose_areas(truth)
    if data.metric == "posetrack":
        labelled = [image for image in truth["images"] if data.frame_of[id_key(image["id"])].labelled]
        known = {image["id"] for image in labelled}
        truth |= dict(images=labelled, annotations=[a for a in truth["annotations"] if a["image_id"] in known])
    if not any(a["num_keypoints"] and not a["iscrowd"] for a in truth["annotations"]):
        raise UserError(f"--diagnose compares with labels, and nobody in {data.files[0]} has a labelled keypoint")
    return truth


def diagnose(predictions: Sequence[Prediction], data: PoseDataset, threshold: float, out: Path) -> list[str]:
    """The tables as text; draws worst.png and oks.png into the folder `out`. `data` has labels."""
    truth, skeleton = truth_to_diagnose(data), data.skeleton
    known = {id_key(image["id"]) for image in truth["images"]}
    results = [one for one in metrics.to_results(predictions) if id_key(one["image_id"]) in known]
    errors = find_errors(truth, results, skeleton)
    places = {id_key(data.id_of(n)): i for i, n in enumerate(data.rows)}
    save_pictures([draw_worst(errors, data, places, threshold)], out / "worst")
    save_pictures([draw_oks(errors, data, places)], out / "oks")
    found = sum(p.pose is not None for p in errors.people)
    counted = found + sum(len(p.duplicates) for p in errors.people) + len(errors.false)
    return [metrics.format_table(keypoint_table(errors, skeleton)), "(shares of the labels of the people found)\n",
            metrics.format_table(error_table(errors, truth, skeleton, threshold)),
            f"(AP {errors.ap:.3f}: {found} of {len(errors.people)} people found, {counted} predictions and "
            f"{len(errors.ignored)} that AP ignores; hidden: those of the four errors above at keypoints of v = 1; AP "
            "without: if this kind alone were gone; kinds: common/diagnose.py)\n"]


def draw_worst(errors: Errors, data: PoseDataset, places: dict[str, int], threshold: float, count: int = 12) -> Image.Image:
    """People, label left and prediction right: first those of a sure prediction (its score at least `threshold`), by
    OKS; then those who were missed; then the others."""
    pairs = []
    for p in sorted(errors.people, key=lambda p: (not p.pose or p.pose["score"] < threshold, p.oks)):
        name = errors.names[p.image_id]
        sample = data.load(places[id_key(name)])[0]
        if len(pairs) == count:
            break
        if sample is None:
            continue
        guess = np.zeros((0, len(p.truth), 2)) if p.pose is None else xy(p.pose)[None]
        labelled = p.truth[p.truth[:, 2] > 0, :2]
        crop, corner = crop_around(sample.image, np.concatenate([p.box.reshape(2, 2), labelled, *guess]))
        both = [draw.draw_people(crop, points, None, data.skeleton, min_side=300)
                for points in (p.truth[None] - [*corner, 0], guess - corner)]
        text = "missed by all"
        if p.pose:
            counts = {kind: int((p.kinds == i).sum()) for i, kind in enumerate(KINDS)}
            text = f"OKS {p.oks:.2f}, score {p.pose['score']:.2f}: " + ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
        pairs.append(draw.captioned(draw.contact_sheet(both, 2, cell=300, gap=2), f"{text} (image {name})"))
    return draw.captioned(draw.contact_sheet(pairs, columns=3, cell=620), "Labels left, predictions right; ks in common/diagnose.py")


def draw_oks(errors: Errors, data: PoseDataset, places: dict[str, int]) -> Image.Image:
    """Somebody with most visible keypoints, and around each the circles on which its term of OKS is CIRCLES."""
    def fitness(p: Person) -> tuple:
        inside = (p.box[:2] > 0).all() and (p.box[2:] < data[places[id_key(errors.names[p.image_id])]].size).all()
        return inside, (p.truth[:, 2] == 2).sum(), (p.truth[:, 2] > 0).sum(), p.area

    for p in sorted(errors.people, key=fitness, reverse=True):
        sample = data.load(places[id_key(errors.names[p.image_id])])[0]
        if sample is None:
            continue
        seen = np.flatnonzero(p.truth[:, 2] > 0)
        points, radii = p.truth[seen, :2], oks_radii(p.area, data.skeleton.sigmas)[:, seen]
        reach = [points + side * radii[0, :, None] for side in (-1, 1)]
        crop, corner = crop_around(sample.image, np.concatenate([*reach, p.box.reshape(2, 2)]))
        drawn = draw.draw_circles(crop, points - corner, radii, [draw.side_of(data.skeleton, k) for k in seen],
                                  [str(value) for value in CIRCLES])
        return draw.captioned(drawn, "What OKS allows: with every keypoint on its outer, middle or inner circle, this person's "
                              f"OKS is {', '.join(map(str, CIRCLES))} (area {p.area:.0f} square pixels)")
    return Image.new("RGB", (300, 300), draw.PAPER)


def oks_radii(area: float, sigmas: Sequence[float]) -> np.ndarray:
    """Distances (3, K) in px at which a keypoint's term of OKS is CIRCLES: d = 2σ √(-2 s² ln OKS)."""
    return np.sqrt(-2 * area * np.log(CIRCLES))[:, None] * 2 * np.asarray(sigmas)


def crop_around(picture: Image.Image, points: np.ndarray, margin: float = 0.1) -> tuple[Image.Image, np.ndarray]:
    """The part of a picture around points (N, 2), as far as it has them, about square, and its upper left corner (2,)."""
    low, high = points.min(0), points.max(0)
    longest = (high - low).max()
    wider = np.maximum(margin * longest, 4) + np.maximum(0.8 * longest - (high - low), 0) / 2
    low, high = (np.clip(corner, 0, picture.size).round().astype(int) for corner in (low - wider, high + wider))
    low = np.minimum(low, np.array(picture.size) - 1)
    return picture.crop((*low.tolist(), *np.maximum(high, low + 1).tolist())), low
