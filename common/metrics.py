"""How good predicted poses are: OKS, average precision as the official tools compute it, errors per keypoint.

The numbers come from pycocotools, so that they can be compared with papers. What stands around it here keeps bad
input from giving a wrong number in silence: a NaN scores as a perfect match there, annotation id 0 as an unmatched
one, areas of 0 as AP 0. CrowdPose's own tool is the same program with another area and three more numbers, and
COCO-WholeBody's runs it six times, so all of them go through `coco_eval`.

    evaluate(predictions, dataset)          the table of the dataset's papers
    keypoint_errors(predictions, dataset)   which keypoints are off, and by how much
    keypoint_ap, box_ap, wholebody_ap       the same numbers from COCO-style ground truth and results
    oks_nms, soft_oks_nms, rescore          what top-down methods do with their detections before scoring

Units   pixels of the original image; areas px²; boxes x1, y1, x2, y2, except `bbox` in COCO dicts: x, y, w, h.
A value of -1 means that there was nothing to find, 0 that nothing was found.
"""
import contextlib
import io
import math
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common import posetrack
from common.datasets import BOX_TO_AREA
from common.runtime import UserError
from common.skeletons import SKELETONS, WHOLEBODY_PARTS

KEYPOINT_NAMES = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
BOX_NAMES = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL")
CROWDPOSE_NAMES = ("AP", "AP50", "AP75", "AR", "AR50", "AR75")
CROWDING = {"AP_E": (-math.inf, 0.2), "AP_M": (0.2, 0.8), "AP_H": (0.8, math.inf)}       # range of crowdIndex


# ---------------------------------------------------------------- object keypoint similarity

def oks_terms(pred: np.ndarray, target: np.ndarray, area: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """exp(-e) of each keypoint, e = d² / (2 (2σ)² area): (..., K, 2), (..., K, 2), (...) -> (..., K)."""
    squared = ((pred[..., :2] - target[..., :2]) ** 2).sum(-1)
    variances = (2 * np.asarray(sigmas)) ** 2
    return np.exp(-squared / (2 * variances * (np.asarray(area)[..., None] + np.spacing(1))))


def oks(pred: np.ndarray, target: np.ndarray, area: np.ndarray, sigmas: Sequence[float],
        boxes: np.ndarray | None = None) -> np.ndarray:
    """Mean over the labelled keypoints (v > 0) of exp(-e), in [0, 1]; the leading dimensions broadcast.

    Takes    pred (..., K, 2);  target (..., K, 3);  area (...) of the target;  sigmas (K,);  boxes (..., 4)
    Returns  (...). A target without labels gives 0; if its box is given, COCO's rule holds: the distance is that
             to the box grown by its own size on every side, averaged over all keypoints.
    """
    labelled = target[..., 2] > 0
    if boxes is not None:
        low, high = boxes[..., None, :2], boxes[..., None, 2:]
        unlabelled = ~labelled.any(-1, keepdims=True)
        nearest = np.clip(pred[..., :2], 2 * low - high, 2 * high - low)
        target = np.where(unlabelled[..., None], nearest, target[..., :2])
        labelled = labelled | unlabelled
    terms = oks_terms(pred, target, area, sigmas)
    return (terms * labelled).sum(-1) / np.maximum(labelled.sum(-1), 1)


def oks_matrix(pred: np.ndarray, target: np.ndarray, areas: np.ndarray, sigmas: Sequence[float],
               boxes: np.ndarray | None = None) -> np.ndarray:
    """OKS of every prediction with every annotated person: (D, K, 2), (G, K, 3), (G,) -> (D, G)."""
    return oks(pred[:, None], target[None], areas[None], sigmas, None if boxes is None else boxes[None])


# ---------------------------------------------------------------- top-down scoring: rescoring and OKS-NMS

def rescore(box_scores: np.ndarray, keypoint_scores: np.ndarray, threshold: float = 0.2) -> np.ndarray:
    """Box score times the mean of the keypoint scores above the threshold: (P,), (P, K) -> (P,)."""
    kept = keypoint_scores > threshold
    return box_scores * (keypoint_scores * kept).sum(-1) / np.maximum(kept.sum(-1), 1)


def pose_similarity(keypoints: np.ndarray, areas: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """OKS between predictions, over all keypoints, with the mean of the two areas. (P, K, 2), (P,) -> (P, P)"""
    mean_areas = (areas[:, None] + areas[None]) / 2
    return oks_terms(keypoints[:, None], keypoints[None], mean_areas, sigmas).mean(-1)


def oks_nms(keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray, sigmas: Sequence[float],
            threshold: float = 0.9) -> list[int]:
    """Indices to keep, best first: whoever resembles a better one by more than the threshold goes."""
    similar = pose_similarity(keypoints, areas, sigmas) > threshold
    keep = []
    for i in np.argsort(-scores, kind="stable"):
        if not similar[i, keep].any():
            keep.append(int(i))
    return keep


def soft_oks_nms(keypoints: np.ndarray, scores: np.ndarray, areas: np.ndarray, sigmas: Sequence[float],
                 threshold: float = 0.9, limit: int = 20) -> list[int]:
    """Indices to keep, in order: after each pick the others' scores shrink by exp(-OKS² / threshold)."""
    similarity = pose_similarity(keypoints, areas, sigmas)
    scores, left, keep = scores.astype(float), list(range(len(scores))), []
    while left and len(keep) < limit:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        keep.append(best)
        scores = scores * np.exp(-similarity[best] ** 2 / threshold)
    return keep


# ---------------------------------------------------------------- ground truth and results for pycocotools

def numbers(record: dict, field: str) -> np.ndarray:
    """A field of an annotation or a result as a flat float array, however nested; empty if it is missing."""
    value = record.get(field)
    return np.asarray(() if value is None else value, dtype=float).reshape(-1)


def extent(keypoints: np.ndarray) -> list[float]:
    """The bbox (x, y, w, h) round the labelled keypoints of (K, 3), at least 1 px wide; zeros without any."""
    xy = keypoints[keypoints[:, 2] > 0, :2]
    if not len(xy):
        return [0.0] * 4
    return [*xy.min(0).tolist(), *np.maximum(xy.max(0) - xy.min(0), 1.0).tolist()]


def sanitize_ground_truth(ground_truth: dict, crowdpose: bool = False) -> dict:
    """A COCO-style dict with what the evaluation needs, mended where the file is incomplete; says what it mended.

    Images are unique; annotations are numbered from 1, all of category 1; a missing or zero `area` becomes
    0.53 w h (CrowdPose: always), a missing or empty `bbox` the extent of the keypoints; `num_keypoints` is the
    count of v > 0. CrowdPose keeps its own count, without head and neck: people with these alone are ignored.
    """
    images = {str(image["id"]): image for image in reversed(ground_truth["images"])}
    sizes = [numbers(a, "keypoints").size for a in ground_truth["annotations"]]
    annotations, no_image, no_area = [], 0, 0
    for ann in ground_truth["annotations"]:
        if str(ann["image_id"]) not in images:
            no_image += 1
            continue
        keypoints = (numbers(ann, "keypoints") if "keypoints" in ann else np.zeros(max(sizes))).reshape(-1, 3)
        keypoints = np.where(np.isfinite(keypoints).all(1, keepdims=True), keypoints, 0.0)
        bbox = numbers(ann, "bbox").tolist()
        if len(bbox) != 4 or not all(map(math.isfinite, bbox)) or min(bbox[2:]) <= 0:
            bbox = extent(keypoints)
        area = float(ann.get("area") or 0)
        if crowdpose or not 0 < area < math.inf:
            no_area += not crowdpose
            area = BOX_TO_AREA * bbox[2] * bbox[3]
        labelled = int((keypoints[:12 if crowdpose else None, 2] > 0).sum())
        annotations.append(ann | {
            "id": len(annotations) + 1, "category_id": 1, "bbox": bbox, "area": area,
            "iscrowd": int(bool(ann.get("iscrowd"))), "keypoints": keypoints.reshape(-1).tolist(),
            "num_keypoints": int(ann.get("num_keypoints", labelled)) if crowdpose else labelled})
    notes = {"images listed twice": len(ground_truth["images"]) - len(images),
             "annotations without an image": no_image, "annotations without an area (0.53 w h taken)": no_area}
    if any(notes.values()):
        print("ground truth: " + ", ".join(f"{count} {what}" for what, count in notes.items() if count))
    category = dict((ground_truth.get("categories") or [{"name": "person"}])[0], id=1)
    images = list(images.values())[::-1]
    return dict(ground_truth, images=images, annotations=annotations, categories=[category])


def to_results(predictions: Sequence, scored: bool = False) -> list[dict]:
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
    kept = [r for r in results if all(np.isfinite(numbers(r, field)).all() for field in fields)]
    if len(kept) < len(results):
        print(f"dropped {len(results) - len(kept)} of {len(results)} predictions: NaN or infinite numbers in them")
    return kept


def with_numbered_images(ground_truth: dict, results: list[dict], length: int | None) -> tuple[dict, list[dict]]:
    """Copies of both as pycocotools wants them: integer image ids, keypoints as flat lists of `length` numbers.

    Results know an image by its `image_key` if it has one, else by its `id`; 7 and "7" are the same.
    """
    images = ground_truth["images"]
    integers = all(isinstance(image["id"], (int, np.integer)) for image in images)
    number = {str(image["id"]): int(image["id"]) if integers else k for k, image in enumerate(images, 1)}
    number_of_key = {str(image.get("image_key", image["id"])): number[str(image["id"])] for image in images}
    unknown = sorted({str(r["image_id"]) for r in results} - number_of_key.keys())
    if unknown:
        raise UserError(f"{len(unknown)} predicted image ids are not in the ground truth "
                        f"({', '.join(unknown[:3])}): evaluate on the data that was predicted")

    def flat(record: dict, image: int, what: str) -> dict:
        keypoints = numbers(record, "keypoints").tolist()
        if length is not None and len(keypoints) != length:
            raise UserError(f"{what} in image {record['image_id']} has {len(keypoints)} numbers as keypoints, "
                            f"expected {length} ({length // 3} keypoints x 3): use the skeleton of the data")
        return record | {"keypoints": keypoints, "image_id": image, "category_id": record.get("category_id") or 1}

    annotations = [flat(a, number[str(a["image_id"])], "an annotation") for a in ground_truth["annotations"]]
    results = [flat(r, number_of_key[str(r["image_id"])], "a prediction") for r in results]
    images = [dict(image, id=number[str(image["id"])]) for image in images]
    return dict(ground_truth, images=images, annotations=annotations), results


# ---------------------------------------------------------------- average precision

def coco_eval(ground_truth: dict, results: list[dict], kind: str, sigmas: Sequence[float] = ()) -> COCOeval:
    """pycocotools on COCO-style dicts, kind 'keypoints' or 'bbox': a finished COCOeval, its numbers in `.stats`.

    The ground truth is taken at its word; `sanitize_ground_truth` mends it. Neither argument is changed.
    """
    length = 3 * len(sigmas) if kind == "keypoints" else None
    ground_truth, results = with_numbered_images(ground_truth, finite(results), length)
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        if results:
            found = truth.loadRes(results)
        else:                                                    # which loadRes cannot take
            found.dataset = dict(ground_truth, annotations=[])
            found.createIndex()
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
    large by their boxes, else by the extent of their keypoints: APM and APL of the same poses differ (DETR-type
    methods publish results without, QueryPose and SDPose with).
    """
    if not crowdpose:
        run = coco_eval(ground_truth, results, "keypoints", sigmas)
        return dict(zip(KEYPOINT_NAMES, run.stats.tolist()))
    run = coco_eval(with_crowdpose_areas(ground_truth), results, "keypoints", sigmas)
    stats = dict(zip(KEYPOINT_NAMES, run.stats.tolist()))
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

    Keypoints come as 133 x 3 numbers, or apart as in the official files (`keypoints`, `foot_kpts`, ...). A person
    counts in an evaluation if one of its keypoints is labelled. One score and the body's extent serve all six.
    """
    sigmas = SKELETONS["wholebody"].sigmas
    people = [(a, wholebody_keypoints(a)) for a in ground_truth["annotations"]]
    found = [(r, wholebody_keypoints(r)) for r in finite(results)]
    metrics = {}
    for part, (start, end) in WHOLEBODY_PARTS.items():
        annotations = [dict(a, keypoints=k[start:end], num_keypoints=int((k[start:end, 2] > 0).sum()))
                       for a, k in people]
        detections = [dict(r, keypoints=k[start:end], bbox=r.get("bbox", body_extent(k))) for r, k in found
                      if (k[start:end, 2] > 0).any()]            # xtcocotools drops the others
        metrics[part] = keypoint_ap(dict(ground_truth, annotations=annotations), detections, sigmas[start:end])
    return metrics


def wholebody_keypoints(record: dict) -> np.ndarray:
    """(133, 3) from an annotation or a result."""
    fields = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
    values = np.concatenate([numbers(record, field) for field in fields])
    if values.size != 3 * 133:
        raise UserError(f"image {record['image_id']}: {values.size} whole-body numbers, expected 399 (133 x 3)")
    return values.reshape(133, 3)


def body_extent(keypoints: np.ndarray) -> list[float]:
    low, high = keypoints[:17, :2].min(0), keypoints[:17, :2].max(0)
    return [*low.tolist(), *(high - low).tolist()]


# ---------------------------------------------------------------- predictions of a model on a dataset

def evaluate(predictions: Sequence, dataset, boxes: bool = False,
             area_from_boxes: bool = False) -> dict[str, float]:
    """The metrics of the dataset's papers, from all its predictions at once: never average over batches.

    Takes    predictions: one `Prediction` per image;  dataset with .ground_truth(), .skeleton and .metric
             boxes: add person box AP as box_AP, box_AP50, ...
             area_from_boxes: let APM and APL judge predictions by their boxes, see `keypoint_ap`
    Returns  name -> value; 0 without predictions. WholeBody: the headline's numbers, and AP_body, AP_foot, ...
             PoseTrack: its own columns in percent, see common/posetrack.py
    """
    if dataset.metric == "posetrack":
        return posetrack.evaluate(predictions, dataset)
    crowdpose = dataset.metric == "crowdpose"
    ground_truth = sanitize_ground_truth(dataset.ground_truth(), crowdpose)
    results = to_results(predictions, scored=dataset.metric == "wholebody")
    poses = results if area_from_boxes else [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    if dataset.metric == "wholebody":
        parts = wholebody_ap(ground_truth, poses)
        metrics = parts.pop("wholebody") | {f"AP_{part}": m["AP"] for part, m in parts.items()}
    else:
        metrics = keypoint_ap(ground_truth, poses, dataset.skeleton.sigmas, crowdpose)
    if boxes:
        metrics |= {f"box_{name}": value for name, value in box_ap(ground_truth, results, crowdpose).items()}
    return metrics


def keypoint_errors(predictions: Sequence, dataset) -> dict[str, dict[str, float]]:
    """Where the found people are off, keypoint by keypoint, visible (v = 2) and hidden (v = 1) labels apart.

    Predictions take people by score, each the free one with the highest OKS if that is 0.5 or more. Per keypoint,
    over the people found: how many labels; the median distance as a fraction of √area (`error`); the share of
    labels whose OKS term exp(-e) is 0.5 or more (`close`). A last row `all`. NaN where there is no label.
    """
    people = people_by_image(sanitize_ground_truth(dataset.ground_truth(), dataset.metric == "crowdpose"))
    errors, sigmas = [], np.asarray(dataset.skeleton.sigmas)     # errors: per person (K, 3) of v, distance, term
    for p in predictions:
        target, areas = people.get(str(p.image_id), ((), ()))
        good = np.isfinite(p.scores) & np.isfinite(p.keypoints).all((1, 2))
        if not len(areas) or not good.any():
            continue
        found = p.keypoints[good][np.argsort(-p.scores[good], kind="stable")]
        for d, g in match(oks_matrix(found, target, areas, sigmas)):
            distance = np.linalg.norm(found[d] - target[g, :, :2], axis=-1) / np.sqrt(areas[g])
            terms = oks_terms(found[d], target[g], areas[g], sigmas)
            errors.append(np.stack([target[g, :, 2], distance, terms], -1))
    table = np.stack(errors) if errors else np.zeros((0, len(sigmas), 3))        # (people, K, 3)
    rows = {name: error_row(table[:, k]) for k, name in enumerate(dataset.skeleton.keypoints)}
    return rows | {"all": error_row(table.reshape(-1, 3))}


def people_by_image(ground_truth: dict) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Image id as text -> keypoints (G, K, 3) and areas (G,) of the labelled people."""
    keys = {str(image["id"]): str(image.get("image_key", image["id"])) for image in ground_truth["images"]}
    lists: dict[str, list] = {}
    for a in ground_truth["annotations"]:
        if a["num_keypoints"] and not a["iscrowd"] and a["area"] > 0:
            people = lists.setdefault(keys[str(a["image_id"])], [])
            people.append((np.reshape(a["keypoints"], (-1, 3)), a["area"]))
    return {key: tuple(map(np.array, zip(*people))) for key, people in lists.items()}


def match(similarity: np.ndarray, threshold: float = 0.5) -> list[tuple[int, int]]:
    """Pairs (row, column): row by row, the free column with the highest value, if it reaches the threshold."""
    similarity, matched = similarity.copy(), []
    for d in range(len(similarity)):
        g = int(similarity[d].argmax())
        if similarity[d, g] >= threshold:
            matched.append((d, g))
            similarity[:, g] = -1
    return matched


def error_row(errors: np.ndarray) -> dict[str, float]:
    row = {}
    for name, v in (("visible", 2), ("hidden", 1)):
        chosen = errors[errors[:, 0] == v]
        row[name] = len(chosen)
        row[f"{name} error"] = float(np.median(chosen[:, 1])) if len(chosen) else math.nan
        row[f"{name} close"] = float((chosen[:, 2] >= 0.5).mean()) if len(chosen) else math.nan
    return row


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
