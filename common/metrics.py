"""How good predicted poses are: average precision as the official tools compute it, errors per keypoint.

The numbers come from pycocotools, so that they can be compared with papers. It counts NaN in a prediction as a perfect
match, so such predictions are left out and counted; its other traps (annotation id 0, areas of 0, a num_keypoints that
lies) are not in what `PoseDataset.ground_truth` gives. CrowdPose's own tool is the same program with another area and
three more numbers, and COCO-WholeBody's runs it six times, so all of them go through `coco_eval`.

Units   pixels of the original image; areas px²; boxes x1, y1, x2, y2, except `bbox` in COCO dicts: x, y, w, h.
A value of -1 means that there was nothing to find, 0 that nothing was found.
"""
import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common import posetrack, weights
from common.datasets import PoseDataset, id_key
from common.errors import UserError
from common.oks import oks_matrix, oks_terms
from common.records import BOX_TO_AREA, Prediction
from common.skeletons import SKELETONS, WHOLEBODY_PARTS

KEYPOINT_NAMES = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
BOX_NAMES = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL")
CROWDPOSE_NAMES = ("AP", "AP50", "AP75", "AR", "AR50", "AR75")
CROWDING = {"AP_E": (-math.inf, 0.2), "AP_M": (0.2, 0.8), "AP_H": (0.8, math.inf)}       # range of crowdIndex


# ---------------------------------------------------------------- ground truth and results for pycocotools

def flat(record: dict, field: str) -> np.ndarray:
    """A field of an annotation or a result as a flat float array, however nested; empty if it is missing."""
    value = record.get(field)
    return np.asarray(() if value is None else value, dtype=float).reshape(-1)


def to_results(predictions: Sequence[Prediction], scored: bool = False) -> list[dict]:
    """List of `Prediction` -> COCO results: plain numbers, ready for json.dump; what is not finite is dropped.

    The third number of a keypoint is 1, or with `scored` its score, by which whole-body evaluation leaves out parts.
    """
    results = []
    for p in predictions:
        for i, xy in enumerate(p.keypoints):
            third = p.keypoint_scores[i] if scored else 1.0                      # some tools drop people of v = 0
            keypoints = np.insert(np.asarray(xy, dtype=float), 2, third, axis=1)
            result = {"image_id": p.image_id.item() if isinstance(p.image_id, np.generic) else p.image_id,
                      "category_id": 1, "score": float(p.scores[i]), "keypoints": keypoints.reshape(-1).tolist()}
            if p.boxes is not None:
                x1, y1, x2, y2 = map(float, p.boxes[i])
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            results.append(result)
    return finite(results)


def finite(results: list[dict]) -> list[dict]:
    """Drop results with NaN or infinity, which pycocotools would count as perfect, and say how many those are."""
    fields = ("keypoints", "score", "bbox")
    kept = [r for r in results if all(np.isfinite(flat(r, field)).all() for field in fields)]
    if len(kept) < len(results):
        print(f"dropped {len(results) - len(kept)} of {len(results)} predictions: NaN or infinite numbers in them")
    return kept


def with_numbered_images(ground_truth: dict, results: list[dict], length: int | None) -> tuple[dict, list[dict]]:
    """Copies of both as pycocotools wants them: integer image ids, keypoints as flat lists of `length` numbers.

    7 and "7" are the same image.
    """
    images = ground_truth["images"]
    integers = all(isinstance(image["id"], (int, np.integer)) for image in images)
    number = {id_key(image["id"]): int(image["id"]) if integers else k for k, image in enumerate(images, 1)}
    unknown = sorted({id_key(r["image_id"]) for r in results} - number.keys())
    if unknown:
        raise UserError(f"{len(unknown)} predicted image ids are not in the ground truth "
                        f"({', '.join(unknown[:3])}): evaluate on the data that was predicted")

    def numbered(record: dict, image: int, what: str) -> dict:
        keypoints = flat(record, "keypoints").tolist()
        if length is not None and len(keypoints) != length:
            raise UserError(f"{what} in image {record['image_id']} has {len(keypoints)} numbers as keypoints, "
                            f"expected {length} ({length // 3} keypoints x 3): use the skeleton of the data")
        return record | {"keypoints": keypoints, "image_id": image, "category_id": record.get("category_id") or 1}

    annotations = [numbered(a, number[id_key(a["image_id"])], "an annotation") for a in ground_truth["annotations"]]
    results = [numbered(r, number[id_key(r["image_id"])], "a prediction") for r in results]
    images = [dict(image, id=number[id_key(image["id"])]) for image in images]
    return dict(ground_truth, images=images, annotations=annotations), results


# ---------------------------------------------------------------- average precision

def coco_eval(ground_truth: dict, results: list[dict], kind: str, sigmas: Sequence[float] = ()) -> COCOeval:
    """pycocotools on COCO-style dicts, kind 'keypoints' or 'bbox': a finished COCOeval, its numbers in `.stats`.

    The ground truth is taken at its word. Neither argument is changed.
    """
    length = 3 * len(sigmas) if kind == "keypoints" else None
    ground_truth, results = with_numbered_images(ground_truth, finite(results), length)
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        if results:                                              # loadRes cannot take none
            found = truth.loadRes(results)
        run = COCOeval(truth, found, kind)
        run.params.kpt_oks_sigmas = np.asarray(sigmas, dtype=float)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def with_crowdpose_areas(ground_truth: dict) -> dict:
    annotations = [dict(a, area=BOX_TO_AREA * a["bbox"][2] * a["bbox"][3]) for a in ground_truth["annotations"]]
    return dict(ground_truth, annotations=annotations)


def keypoint_ap(ground_truth: dict, results: list[dict], sigmas: Sequence[float],
                crowdpose: bool = False) -> dict[str, float]:
    """AP, AP50, AP75, APM, APL, AR, AR50, AR75, ARM, ARL of COCO, or CrowdPose's AP ... AR75, AP_E, AP_M, AP_H.

    At most 20 people per image count. If the first result carries a `bbox`, unmatched predictions are medium or
    large by their boxes, else by the extent of their keypoints: APM and APL of the same poses differ. QueryPose's
    release is scored with boxes, those of the other methods without.
    """
    run = coco_eval(with_crowdpose_areas(ground_truth) if crowdpose else ground_truth, results, "keypoints", sigmas)
    stats = dict(zip(KEYPOINT_NAMES, run.stats.tolist()))
    if not crowdpose:
        return stats
    metrics = {name: stats[name] for name in CROWDPOSE_NAMES}
    per_image, crowding = run.evalImgs, {n: i.get("crowdIndex", math.nan) for n, i in run.cocoGt.imgs.items()}
    for name, (low, high) in CROWDING.items():
        run.evalImgs = [e if e and low <= crowding[e["image_id"]] < high else None for e in per_image]
        with contextlib.redirect_stdout(io.StringIO()):
            run.accumulate()
        precision = run.eval["precision"][..., 0, 0]             # area "all"; the official tool rounds
        metrics[name] = round(float(precision[precision > -1].mean()), 4) if (precision > -1).any() else -1.0
    return metrics


def box_ap(ground_truth: dict, results: list[dict], crowdpose: bool = False) -> dict[str, float]:
    """Person box AP, twelve numbers, from the results' `bbox`. People without keypoints count like all others."""
    if any("bbox" not in result for result in results):
        raise UserError("box AP needs a box for every prediction, and some have none")
    ground_truth = with_crowdpose_areas(ground_truth) if crowdpose else ground_truth
    return dict(zip(BOX_NAMES, coco_eval(ground_truth, results, "bbox").stats.tolist()))


def wholebody_ap(ground_truth: dict, results: list[dict]) -> dict[str, dict[str, float]]:
    """COCO-WholeBody's six evaluations: body, foot, face, lefthand, righthand, wholebody (the headline).

    A person counts in an evaluation if one of its keypoints is labelled. One score and the body's extent serve all six.
    """
    sigmas = SKELETONS["wholebody"].sigmas
    people, found = ([(one, flat(one, "keypoints").reshape(-1, 3)) for one in records]
                     for records in (ground_truth["annotations"], finite(results)))
    metrics = {}
    for part, (start, end) in WHOLEBODY_PARTS.items():
        annotations = [dict(a, keypoints=k[start:end], num_keypoints=int((k[start:end, 2] > 0).sum()))
                       for a, k in people]
        detections = [dict(r, keypoints=k[start:end], bbox=r.get("bbox", body_extent(k))) for r, k in found
                      if (k[start:end, 2] > 0).any()]            # xtcocotools drops the others
        metrics[part] = keypoint_ap(dict(ground_truth, annotations=annotations), detections, sigmas[start:end])
    return metrics


def body_extent(keypoints: np.ndarray) -> list[float]:
    low, high = keypoints[:17, :2].min(0), keypoints[:17, :2].max(0)
    return [*low.tolist(), *(high - low).tolist()]


# ---------------------------------------------------------------- predictions of a model on a dataset

def evaluate(predictions: Sequence[Prediction], dataset: PoseDataset, boxes: bool = False,
             areas_of_boxes: bool = False) -> dict[str, float]:
    """The metrics of the dataset's papers, from all its predictions at once: never average over batches.

    Takes    predictions: one per image
             boxes: add person box AP as box_AP, box_AP50, ...
             areas_of_boxes: let APM and APL judge predictions by their boxes, see `keypoint_ap`
    Returns  name -> value; 0 without predictions. WholeBody: the headline's numbers, and AP_body, AP_foot, ...
             PoseTrack: its own columns in percent, see common/posetrack.py
    """
    if dataset.metric == "posetrack":
        return posetrack.evaluate(predictions, dataset)
    crowdpose = dataset.metric == "crowdpose"
    ground_truth = dataset.ground_truth()
    results = to_results(predictions, scored=dataset.metric == "wholebody")
    poses = results if areas_of_boxes else [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    if dataset.metric == "wholebody":
        parts = wholebody_ap(ground_truth, poses)
        metrics = parts.pop("wholebody") | {f"AP_{part}": m["AP"] for part, m in parts.items()}
    else:
        metrics = keypoint_ap(ground_truth, poses, dataset.skeleton.sigmas, crowdpose)
    if boxes:
        metrics |= {f"box_{name}": value for name, value in box_ap(ground_truth, results, crowdpose).items()}
    return metrics


def pair_people(predictions: Sequence[Prediction], dataset: PoseDataset) -> tuple[list[tuple], int]:
    """Who of the labelled people each prediction is, see `match`, and how many labelled people there are.

    Returns  a list of (score, pose (K, 2), the annotation of the person or None), one entry per predicted person
    """
    people, rows, shape = defaultdict(list), [], (-1, dataset.skeleton.num_keypoints, 3)
    for a in dataset.ground_truth()["annotations"]:
        if a["num_keypoints"] and not a["iscrowd"]:
            people[id_key(a["image_id"])].append(a)
    for p in predictions:
        there = people[id_key(p.image_id)]
        truth, areas = np.reshape([a["keypoints"] for a in there], shape), np.array([a["area"] for a in there])
        good = np.flatnonzero(np.isfinite(p.scores) & np.isfinite(p.keypoints).all((1, 2)))
        order = good[np.argsort(-p.scores[good], kind="stable")]
        owner = match(oks_matrix(p.keypoints[order], truth, areas, dataset.skeleton.sigmas))
        rows += [(p.scores[n], p.keypoints[n], there[owner[d]] if d in owner else None) for d, n in enumerate(order)]
    return rows, sum(map(len, people.values()))


def match(similarity: np.ndarray, threshold: float = 0.5) -> dict[int, int]:
    """Of (D, G) predictions, best first, and people: each takes the free person with the highest OKS, if it reaches
    the threshold."""
    similarity, owner = similarity.copy(), {}
    for d in range(len(similarity) if similarity.size else 0):
        g = int(similarity[d].argmax())
        if similarity[d, g] >= threshold:
            owner[d] = g
            similarity[:, g] = -1
    return owner


def best_threshold(predictions: Sequence[Prediction], dataset: PoseDataset) -> float | None:
    """The score from which people are worth showing: that of the best F1 of people; None if nobody is found.

    A prediction is right if it is a labelled person, see `pair_people`. Halfway to the next lower score.
    """
    rows, count = pair_people(predictions, dataset)
    rows.sort(key=lambda row: -row[0])
    right = np.array([person is not None for _, _, person in rows], bool)
    if not right.any():
        return None
    f1 = 2 * right.cumsum() / (np.arange(1, len(right) + 1) + count)
    best = int(f1.argmax())
    return float(np.mean([score for score, _, _ in rows[best:best + 2]]))


def keypoint_errors(predictions: Sequence[Prediction], dataset: PoseDataset) -> dict[str, dict[str, float]]:
    """Where the found people are off, keypoint by keypoint, visible (v = 2) and hidden (v = 1) labels apart.

    Per keypoint, over the people that `pair_people` finds: how many labels; the median distance as a fraction of √area
    (`error`); the share of labels whose OKS term exp(-e) is 0.5 or more (`close`). A last row `all`. NaN where there is
    no label.
    """
    names, errors = dataset.skeleton.keypoints, []               # errors: per person (K, 3) of v, distance, term
    for _, pose, person in pair_people(predictions, dataset)[0]:
        if person:
            truth, area = np.reshape(person["keypoints"], (-1, 3)), np.array(person["area"])
            distance = np.linalg.norm(pose - truth[:, :2], axis=-1) / np.sqrt(area)
            errors.append(np.stack([truth[:, 2], distance, oks_terms(pose, truth, area, dataset.skeleton.sigmas)], -1))
    table = np.reshape(errors, (-1, len(names), 3))              # (people, K, 3)
    rows = {name: error_row(table[:, k]) for k, name in enumerate(names)}
    return rows | {"all": error_row(table.reshape(-1, 3))}


def error_row(errors: np.ndarray) -> dict[str, float]:
    row = {}
    for name, v in (("visible", 2), ("hidden", 1)):
        chosen = errors[errors[:, 0] == v]
        row[name] = len(chosen)
        row[f"{name} error"] = float(np.median(chosen[:, 1])) if len(chosen) else math.nan
        row[f"{name} close"] = float((chosen[:, 2] >= 0.5).mean()) if len(chosen) else math.nan
    return row


def published(source: str, data: PoseDataset, table: dict[str, float]) -> list[str]:
    """A line with the authors' AP beside ours, of weights by name on the data of their table."""
    known = weights.RELEASES.get(source)
    figure = known and known.published.get(f"{data.name}_{data.split}")
    boxes = " with a detector's boxes" if figure and known.method == "sdpose" and data.name != "humanart" else ""
    return [f"AP {100 * table['AP']:.1f}, published for {source}{boxes}: {figure:.1f}"] if figure else []


def format_table(metrics: dict) -> str:
    """Values under their names, three decimals, n/a for -1 and NaN; {row: {column: value}} gives more rows."""
    def cell(value) -> str:
        if isinstance(value, int):
            return str(value)
        return "n/a" if value == -1 or math.isnan(value) else f"{value:.3f}"

    rows = metrics if isinstance(next(iter(metrics.values()), None), dict) else {"": metrics}
    columns = list(next(iter(rows.values())))
    lines = [["", *columns]] + [[name, *(cell(row[c]) for c in columns)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:], widths[1:])] for line in lines]
    text = ["  ".join(line) for line in aligned]
    return "\n".join(text if any(rows) else [line[2:] for line in text])
