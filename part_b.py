"""Second half of diffusionregpose.py, to be appended to the first."""
import copy
import math
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import draw, metrics, runtime, transforms
from common.datasets import PoseDataset, Prediction, Sample, default_splits, open_dataset
from common.loading import collate, predict_all
from common.skeletons import Skeleton, words
from diffusionregpose import (PRESETS, TENSORS, Config, DiffusionRegPose, Targets, build, draw_pose_noise, fuse,
                              load_init, noise_poses, pad_poses, sample)

# ---- Keypoint completion (eq. 9-12): joints that nobody labelled, guessed from the labelled ones ------------

# The length that makes people comparable is that between two joints: of the pairs below the first that a skeleton has,
# the head where there is one, as in the paper; on COCO the right side of the trunk, as in the release. Else the
# diagonal of the box.
REFERENCE_JOINTS = (("head", "neck"), ("head_top", "head_bottom"), ("head_top", "neck"),
                    ("right_shoulder", "right_hip"))


def reference_joints(skeleton: Skeleton) -> tuple[int, int] | None:
    """The two joints whose distance is a person's reference length; None: the diagonal of the box is."""
    names = [words(name) for name in skeleton.keypoints]
    pairs = [(words(a), words(b)) for a, b in REFERENCE_JOINTS]
    return next(((names.index(a), names.index(b)) for a, b in pairs if a in names and b in names), None)


def reference_lengths(keypoints: np.ndarray, boxes: np.ndarray, joints: tuple[int, int] | None) -> np.ndarray:
    """L of people with keypoints (N, K, 3) and boxes xyxy (N, 4), in pixels; 0 where a reference joint has no label."""
    if joints is None:
        return np.linalg.norm(boxes[:, 2:] - boxes[:, :2], axis=1)
    a, b = keypoints[:, joints[0]], keypoints[:, joints[1]]
    return np.linalg.norm(a[:, :2] - b[:, :2], axis=1) * ((a[:, 2] > 0) & (b[:, 2] > 0))


class KeypointCompletion:
    """Fills a pose with the most likely places of its unlabelled joints.

    The 2K coordinates u of people, seen from the corner l of their box in units of their reference length L, are
    taken as one Gaussian; its μ and Σ are those of the training people with all K joints labelled. With UᵀU = Σ⁻¹
    and the columns of U split into those of invisible and visible coordinates, U = [A_I, A_V],

        y = (u − l) / L                                                                               (eq. 9)
        ŷ_I = argmin ‖A_I y_I + A_V y_V − U μ‖ = (A_IᵀA_I)⁻¹ A_Iᵀ (U μ − A_V y_V)                  (eq. 10-12)
            = μ_I + Σ_IV Σ_VV⁻¹ (y_V − μ_V),

    the mean of the invisible coordinates given the visible ones, which is how it is computed here.
    Takes    y (N, 2K) of N ≥ 2 whole people, the reference joints or None for the diagonal of the box
    Departs  the paper also divides y by the image's width and height; the release does not
    """

    def __init__(self, y: np.ndarray, joints: tuple[int, int] | None):
        self.joints, self.mean, self.covariance = joints, y.mean(0), np.cov(y, rowvar=False)
        few = len(y) <= y.shape[1]                                     # then Σ has no inverse
        ridge = (1e-2 if few else 1e-12) * self.covariance.diagonal().mean()
        self.covariance += ridge * np.eye(y.shape[1])

    def __call__(self, keypoints: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Keypoints (P, K, 3) and boxes xyxy (P, 4) in pixels → (P, K, 3) with the missing joints filled in, at v = 1.

        Somebody without any joint, or without L, stays as annotated.
        """
        completed = keypoints.copy()
        lengths = reference_lengths(keypoints, boxes, self.joints)
        for person, corner, length in zip(completed, boxes[:, :2], lengths):
            visible = person[:, 2] > 0
            if visible.all() or not visible.any() or not length > 0:
                continue
            known = visible.repeat(2)
            y = (person[visible, :2] - corner).flatten() / length                                     # eq. 9
            cross, among = self.covariance[np.ix_(~known, known)], self.covariance[np.ix_(known, known)]
            guess = self.mean[~known] + cross @ np.linalg.solve(among, y - self.mean[known])          # eq. 10-12
            person[~visible, :2] = guess.reshape(-1, 2) * length + corner
            person[~visible, 2] = 1
        return completed


def learn_completion(data: PoseDataset) -> KeypointCompletion | None:
    """The statistics of a training set; None if there are not two people with all their joints."""
    single, joints = ~data.iscrowd, reference_joints(data.skeleton)
    keypoints, boxes = data.keypoints[single].astype(np.float64), data.boxes[single]
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    length = reference_lengths(keypoints, boxes, joints)
    whole = (keypoints[..., 2] > 0).all(1) & (length > 0)
    y = (keypoints[whole, :, :2] - boxes[whole, None, :2]) / length[whole, None, None]                # eq. 9
    return KeypointCompletion(y.reshape(len(y), -1), joints) if len(y) > 1 else None


# ---- Matching and losses. A set of pairs is (image, query, person): three index tensors of one length; ------
# `person` counts through all people of the batch in image order. An output is (logits, boxes, keypoints or None).

Pairs = tuple[Tensor, Tensor, Tensor]
Output = tuple[Tensor, Tensor, Tensor | None]
PERSON = 1                             # the class of a person; class 0 is COCO's category 0, which does not exist
WEIGHTS = dict(ce=2.0, bbox=5.0, giou=2.0, keypoints=10.0, oks=4.0)
DENOISING_WEIGHTS = dict(ce=0.3, bbox=2.5, giou=1.0)


def gather_people(targets: list[Targets]) -> Targets:
    """All people of the batch behind one another."""
    return Targets(*(torch.cat([getattr(t, name) for t in targets]) for name in TENSORS))


def corners_of(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """cx, cy, w, h (..., 4) → top left and bottom right corners (..., 2)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return centre - half, centre + half


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU = ∩ / ∪ − (hull − ∪) / hull of boxes cxcywh (..., 4); leading dimensions broadcast. In [−1, 1]."""
    (low_a, high_a), (low_b, high_b) = corners_of(a), corners_of(b)
    common = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0)
    around = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).clamp(min=0)
    inter, hull = common[..., 0] * common[..., 1], around[..., 0] * around[..., 1]
    union = a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - inter
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def object_keypoint_similarity(squared: Tensor, people: Targets, sigmas: Tensor) -> Tensor:
    """OKS = Σ v exp(−d² / (2 s² κ²)) / Σ v,  κ = 2σ, s² = area. squared d² (..., P, K) → (..., P), at least 1e-6."""
    exponent = squared / (2 * people.areas[:, None] * (2 * sigmas) ** 2)
    similarity = (people.visible * (-exponent).exp()).sum(-1) / (people.visible.sum(-1) + 1e-6)
    return similarity.clamp(min=1e-6)


def match_cost(output: Output, people: Targets, sigmas: Tensor) -> Tensor:
    """Cost of giving a query to a person, (B, Q, P): 2·class + 5·L1 − 2·GIoU, or where there are poses
    2·class + 10·Σ v|Δ| + 4·(1 − OKS), without a look at the box."""
    logits, boxes, keypoints = output
    p = logits[..., PERSON].float().sigmoid().unsqueeze(-1)
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    if keypoints is None:
        distance = (boxes[:, :, None] - people.boxes).abs().sum(-1)
        return 2 * focal + 5 * distance - 2 * generalized_iou(boxes[:, :, None], people.boxes)
    difference = keypoints[:, :, None] - people.keypoints                                     # (B, Q, P, K, 2)
    distance = (difference.abs().sum(-1) * people.visible).sum(-1)
    similarity = object_keypoint_similarity(difference.square().sum(-1), people, sigmas)
    return 2 * focal + 10 * distance + 4 * (1 - similarity)


@torch.no_grad()
def match(outputs: list[Output], targets: list[Targets], sigmas: Tensor) -> list[Pairs]:
    """The cheapest one-to-one assignment of people to queries, for each output on its own (Hungarian method).

    Raises FloatingPointError when a cost is not finite.
    """
    people = gather_people(targets)
    costs = [match_cost(output, people, sigmas) for output in outputs]
    flat = torch.cat([cost.flatten() for cost in costs]).cpu()             # one wait for the GPU
    if not flat.isfinite().all():
        raise FloatingPointError("the matching cost")
    ends = np.cumsum([0] + [len(t) for t in targets])
    matchings = []
    for cost, part in zip(costs, flat.split([cost.numel() for cost in costs])):
        cost, found = part.view(cost.shape).numpy(), []
        for image, (first, last) in enumerate(zip(ends, ends[1:])):
            query, person = linear_sum_assignment(cost[image, :, first:last])
            found.append(np.stack([np.full_like(query, image), query, person + first]))
        matchings.append(tuple(torch.from_numpy(np.concatenate(found, 1)).to(sigmas.device)))
    return matchings


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """−α (1 − p)² log p where positive, −(1 − α) p² log(1 − p) elsewhere, α = 0.25, summed. Both (..., 2)."""
    p = logits.sigmoid()
    weight = torch.where(positive > 0, 0.25 * (1 - p) ** 2, 0.75 * p ** 2)
    return (weight * F.binary_cross_entropy_with_logits(logits, positive, reduction="none")).sum()


def box_losses(boxes: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Σ ‖b − b*‖₁ and Σ (1 − GIoU) of boxes cxcywh (pairs, 4)."""
    return dict(bbox=(boxes - true).abs().sum(), giou=(1 - generalized_iou(boxes, true)).sum())


def pose_losses(keypoints: Tensor, true: Targets, sigmas: Tensor) -> dict[str, Tensor]:
    """Σ v|Δ| and Σ (1 − OKS) of poses (pairs, K, 2)."""
    difference = keypoints - true.keypoints
    similarity = object_keypoint_similarity(difference.square().sum(-1), true, sigmas)
    return dict(keypoints=(difference.abs().sum(-1) * true.visible).sum(), oks=(1 - similarity).sum())


def set_losses(output: Output, pairs: Pairs, people: Targets, sigmas: Tensor) -> dict[str, Tensor]:
    """The loss terms of one output for the pairs that were matched, summed over the batch."""
    logits, boxes, keypoints = (x if x is None else x.float() for x in output)
    image, query, person = pairs
    positive, true = torch.zeros_like(logits), people.take(person)
    positive[image, query, PERSON] = 1
    poses = {} if keypoints is None else pose_losses(keypoints[image, query], true, sigmas)
    return dict(ce=focal_loss(logits, positive)) | box_losses(boxes[image, query], true.boxes) | poses


def criterion(result: dict, targets: list[Targets], sigmas: Tensor, shares: int = 1) -> dict[str, Tensor]:
    """All weighted loss terms of a training forward, by their names in the release; their sum is minimised.

    For every layer (_0, _1, ..., the last without suffix) and the selected cells (_interm), per person:
    2·focal + 5·L1 + 2·(1 − GIoU) and, from the expansion on, 10·Σ v|Δ| + 4·(1 − OKS). For the denoising queries (dn_):
    0.3·focal + 2.5·L1 + (1 − GIoU), per query of an image but, as released, summed over the images; over all of a
    batch, if `shares` says into how many micro-batches and processes it is divided.
    Computed in float32. No pairs give 0 with a zero gradient.
    """
    people = gather_people(targets)
    outputs = [*result["layers"], (*result["proposals"], None)]
    names = [*(f"_{l}" for l in range(len(result["layers"]) - 1)), "", "_interm"]
    count = runtime.mean_over_ranks(torch.tensor(float(len(people)), device=sigmas.device)).clamp(min=1)
    losses = {}
    for name, output, pairs in zip(names, outputs, match(outputs, targets, sigmas)):
        for term, value in set_losses(output, pairs, people, sigmas).items():
            losses[f"loss_{term}{name}"] = WEIGHTS[term] * value / count
    for name, (logits, boxes) in zip(names, result["dn_layers"]):
        true = result["denoising"]
        positive = torch.zeros_like(logits, dtype=torch.float32)
        positive[..., PERSON] = true.known.float()
        terms = dict(ce=focal_loss(logits.float(), positive))
        terms |= box_losses(boxes.float()[true.known], true.boxes[true.known])
        for term, value in terms.items():
            losses[f"dn_loss_{term}{name}"] = DENOISING_WEIGHTS[term] * value * shares / boxes.shape[1]
    return losses


# ---- Prediction ---------------------------------------------------------------------------------------------


def nms(keypoints: np.ndarray, scores: np.ndarray, size_px: tuple[int, int], reading: str) -> np.ndarray:
    """Indices of the poses to keep, best first. keypoints (E, K, 2) as fractions of the image of size_px (w, h).

    Pose j is a neighbour of pose i when more than 10 joints lie closer than 4 % of the diagonal of pose i. Of a pose
    and its neighbours the best stays; poses of a score up to 0.05 never do. reading: "plain" takes joints for what
    they are; "official" takes the K first of the 2K numbers x1, y1, x2, ... for x and the others for y, as the
    release does and tuned its thresholds with; "none" keeps everybody.
    Departs  the release also keeps entry 0 once for every pose without neighbours, and gives kept poses the scores of
             others; here all keep their own
    """
    best_first = np.argsort(-scores, kind="stable")
    if reading == "none":
        return best_first
    count, joints = keypoints.shape[:2]
    points = keypoints * size_px
    if reading == "official":
        points = np.moveaxis(keypoints.reshape(count, 2, joints), 1, 2) * size_px
    limit = 0.04 * np.linalg.norm(np.ptp(points, 1), axis=-1)
    near = np.linalg.norm(points[:, None] - points, axis=-1) < limit[:, None, None]          # (E, E, K)
    needed = max(min(10, 3 * joints // 4), 10 * joints // 17)             # 10 of COCO's 17 and of CrowdPose's 14
    neighbour = ((near.sum(-1) > needed) | np.eye(count, dtype=bool)) & (scores > 0.05)
    keep, ignored = np.zeros(count, bool), np.zeros(count, bool)
    for i in range(count):
        around = np.flatnonzero(neighbour[i])
        if not ignored[i] and len(around):
            best = around[scores[around].argmax()]
            if not ignored[best]:
                keep[best] = True
                ignored[around] = True
    return best_first[keep[best_first]]


def pad_images(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures (3, h, w) → zero-padded (B, 3, H, W) at the right and bottom, and padded (B, H, W), True there."""
    height, width = (max(p.shape[side] for p in pictures) for side in (1, 2))
    images = torch.zeros(len(pictures), 3, height, width)
    padded = torch.ones(len(pictures), height, width, dtype=torch.bool)
    for picture, image, mask in zip(pictures, images, padded):
        h, w = picture.shape[1:]
        image[:, :h, :w], mask[:h, :w] = picture, False
    return images, padded


def start_noise(image_id: int | str, cfg: Config, keypoints: int, draw_number: int = 0) -> Tensor:
    """x_T (Ng, K, 2) of an image: the same whichever pictures share its batch."""
    seed = zlib.crc32(f"{cfg.seed}:{draw_number}:{image_id}".encode())
    return torch.randn(cfg.queries, keypoints, 2, generator=torch.Generator().manual_seed(seed))


def detect(model: DiffusionRegPose, pictures: list[Tensor], noise: Tensor, steps: int) -> list[dict[str, Tensor]]:
    """The outputs of each DDIM step for normalised pictures and their noise (B, Ng, K, 2)."""
    device = next(model.parameters()).device
    images, padded = pad_images(pictures)
    with runtime.autocast(device, model.cfg.amp):
        return sample(model, images.to(device), padded.to(device), steps, noise.to(device))


def best_people(entries: dict[str, np.ndarray], input_px: tuple, reading: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of an image's logits (E, 2) and keypoints (E, K, 2) that the NMS keeps, best first, and their scores."""
    scores = 1 / (1 + np.exp(-entries["logits"][:, PERSON].astype(np.float64)))
    keep = nms(entries["keypoints"], scores, input_px, reading)
    return keep, scores[keep]


def to_prediction(entries: dict[str, np.ndarray], image_id: int | str, input_px: tuple, size_px: tuple,
                  reading: str) -> Prediction:
    """logits (E, 2), boxes (E, 4), keypoints (E, K, 2) of one image as people in its pixels, after the NMS."""
    keep, scores = best_people(entries, input_px, reading)
    boxes, keypoints = entries["boxes"][keep] * np.tile(size_px, 2), entries["keypoints"][keep] * size_px
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    return Prediction(image_id, keypoints, np.ones(keypoints.shape[:2], np.float32), scores, corners)


@torch.no_grad()
def predict(model: DiffusionRegPose, batch: dict) -> list[Prediction]:
    """People of a batch {images: list of (3, h, w) from `input_image`, image_ids, sizes_px}: one Prediction per image.

    All Ng people, or those that the NMS leaves; with `ensemble` those of all DDIM steps together, else of the last.
    The model has no score per keypoint: every keypoint gets 1.
    """
    cfg, joints, pictures = model.cfg, model.skeleton.num_keypoints, batch["images"]
    noise = torch.stack([start_noise(image_id, cfg, joints) for image_id in batch["image_ids"]])
    outputs = detect(model, pictures, noise, cfg.steps)
    outputs = outputs if cfg.ensemble else outputs[-1:]
    entries = {name: torch.cat([output[name].float() for output in outputs], 1).cpu().numpy()
               for name in ("logits", "boxes", "keypoints")}
    return [to_prediction({name: column[i] for name, column in entries.items()}, image_id, picture.shape[:0:-1], size,
                          cfg.nms)
            for i, (image_id, picture, size) in enumerate(zip(batch["image_ids"], pictures, batch["sizes_px"]))]


# ---- Data: aspect ratio kept, short side 480 to 800, random crops, ImageNet normalisation --------------------

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def normalise(image: Image.Image) -> Tensor:
    """An RGB picture as (3, h, w), each channel less ImageNet's mean and divided by its deviation."""
    return (transforms.to_tensor(image) - MEAN) / STD


def input_image(image: Image.Image, cfg: Config) -> Tensor:
    """A picture of any size as the network sees it: see `short_side` and `long_side`."""
    size = transforms.short_side_size(image.size, cfg.short_side, cfg.long_side)
    return normalise(image.resize(size, Image.Resampling.BILINEAR))


def augment(people: Sample, flip: tuple[int, ...] | None, cfg: Config, rng: np.random.Generator) -> Sample:
    """Mirror half of the images, crop half of them, resize. For `short_side` 800 with the lengths of the release:
    short sides 480, 512, ..., 800; before a crop 400, 500 or 600; sides of crops 384 to 600."""
    if flip is not None and rng.random() < 0.5:
        people = transforms.hflip(people, flip)
    if not cfg.multiscale:
        return transforms.resize_short_side(people, cfg.short_side, cfg.long_side)
    longest = cfg.short_side
    if rng.random() < 0.5:
        before = rng.choice([longest // 2, longest * 5 // 8, longest * 3 // 4])
        people = transforms.resize_short_side(people, int(before))
        window = [int(rng.integers(longest * 12 // 25, min(side, longest * 3 // 4) + 1)) for side in people.size]
        corner = [int(rng.integers(0, side - length + 1)) for side, length in zip(people.size, window)]
        people = transforms.crop(people, *corner, *window)
    short_side = int(rng.choice(range(longest * 3 // 5, longest + 1, 32)))
    return transforms.resize_short_side(people, short_side, cfg.long_side)


def to_targets(people: Sample) -> Targets:
    """A sample's people as fractions of its (w, h). Its 2K keypoints are K annotated ones, then the K that the
    diffusion noises; those without label sit at 0."""
    scale = torch.tensor(people.size, dtype=torch.float32)
    labelled = torch.from_numpy(people.keypoints[..., 2:] > 0)
    places = torch.from_numpy(people.keypoints[..., :2]) / scale * labelled
    keypoints, poses = places.chunk(2, 1)
    corners = torch.from_numpy(people.boxes) / scale.repeat(2)
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    return Targets(keypoints=keypoints, visible=labelled.chunk(2, 1)[0].squeeze(-1).float(), boxes=boxes,
                   areas=torch.from_numpy(people.areas) / scale.prod(), poses=poses, image_id=people.image_id)


class TrainImages(torch.utils.data.Dataset):
    """One epoch of augmented training images; item i is (tensor (3, h, w), Targets, why files were skipped).

    What happens to image i depends on (seed, epoch, i) alone. A file that cannot be read gives way to the next.
    """

    def __init__(self, data: PoseDataset, cfg: Config, epoch: int, completion: KeypointCompletion | None):
        self.data, self.cfg, self.epoch, self.completion = data, cfg, epoch, completion
        joints, flip = data.skeleton.num_keypoints, data.skeleton.flip
        self.flip = None if flip is None else (*flip, *(joints + k for k in flip))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Targets, list[str]]:
        rng = np.random.default_rng([self.cfg.seed, self.epoch, i])
        people, skipped = self.data.load_readable(i)
        # the poses that will be noised travel through the geometry as K further keypoints
        poses = self.completion(people.keypoints, people.boxes) if self.completion else people.keypoints
        people = replace(people, keypoints=np.concatenate([people.keypoints, poses], 1))
        people = transforms.filter_people(people)
        if self.data.name == "crowdpose":                  # it has no areas: the release's losses take the whole box
            people = replace(people, areas=(people.boxes[:, 2:] - people.boxes[:, :2]).prod(1))
        people = augment(people, self.flip, self.cfg, rng)
        return normalise(people.image), to_targets(people), skipped


def to_batch(pictures: list[Image.Image], image_ids: list, cfg: Config) -> dict:
    """RGB pictures of any size → what `predict` takes."""
    return dict(images=[input_image(picture, cfg) for picture in pictures], image_ids=image_ids,
                sizes_px=[picture.size for picture in pictures])


def evaluate(model: DiffusionRegPose, data: PoseDataset, cfg: Config,
             ranks: runtime.Ranks) -> tuple[dict, list[Prediction]]:
    """Metrics and predictions of a dataset; the images are shared among the processes, all get the result."""
    found = predict_all(partial(predict, fuse(model)), data, partial(input_image, cfg=cfg), cfg.eval_batch,
                        cfg.workers, ranks, join=list)
    return metrics.evaluate(found, data), found


def open_crowd(skeleton: Skeleton, ranks: runtime.Ranks) -> PoseDataset:
    """The puppets' crowd split with CrowdPose's index of crowding, which only its file of 14 keypoints has."""
    with runtime.rank_zero_first(ranks):                         # it draws them
        crowd, index = (open_dataset("puppets", "crowd", kind) for kind in (skeleton, "crowdpose"))
    crowd.crowd_index, crowd.metric = index.crowd_index, "crowdpose"
    return crowd


@torch.no_grad()
def show_process(model: DiffusionRegPose, image: Image.Image, threshold: float) -> dict[str, list[Image.Image]]:
    """For eval.py --process: `process`, the noise that becomes poses in ten DDIM steps, and `uncertainty`, how far the
    poses from 16 draws of noise lie apart: ellipses of two standard deviations. Of people above the threshold."""
    cfg, skeleton, picture, size = model.cfg, model.skeleton, input_image(image, model.cfg), np.array(image.size)

    def results(draw_number: int, steps: int) -> list[dict[str, np.ndarray]]:
        noise = start_noise("", cfg, skeleton.num_keypoints, draw_number)[None]
        return [{name: output[name][0].float().cpu().numpy() for name in ("logits", "keypoints", "noisy")}
                for output in detect(model, [picture], noise, steps)]

    chain = results(0, 10)
    rows, scores = best_people(chain[-1], picture.shape[:0:-1], cfg.nms)
    rows, scores = rows[scores >= threshold], scores[scores >= threshold]
    people, draws = chain[-1]["keypoints"][rows], []
    frames = [draw.draw_people(image, step["noisy"][rows] * size, None, skeleton) for step in chain]
    frames.append(draw.draw_people(image, people * size, None, skeleton, person_scores=scores))
    for number in range(16):
        poses = results(number, 1)[-1]["keypoints"]
        distances = np.linalg.norm(people[:, None] - poses, axis=-1).mean(-1)                # (P, G)
        draws.append(poses[distances.argmin(1)] * size)
    return dict(process=frames, uncertainty=[draw.draw_ellipses(image, np.stack(draws), skeleton)])


# ---- Training -----------------------------------------------------------------------------------------------


def build_optimizer(model: DiffusionRegPose, cfg: Config) -> torch.optim.AdamW:
    """AdamW in two groups: the backbone learns at a rate of its own."""
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    rest = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    groups = [dict(params=backbone, initial_lr=cfg.lr_backbone), dict(params=rest, initial_lr=cfg.lr)]
    return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def lr_scale(step: int, steps: int, epoch: int, cfg: Config) -> float:
    """Factor on the learning rates at an optimiser step out of `steps`."""
    scale = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    if cfg.schedule == "cosine":
        scale *= 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return scale * 0.1 ** sum(epoch >= drop for drop in runtime.numbers(cfg.drop_epochs) or ())


def batch_losses(net: nn.Module, model: DiffusionRegPose, images: Tensor, padded: Tensor, targets: list[Targets],
                 ranks: runtime.Ranks) -> dict[str, Tensor]:
    """Forward pass of `net`, which is the model or distributes it, and loss terms of one batch.

    Raises FloatingPointError if one of them is not finite.
    """
    cfg = model.cfg
    images = images.to(ranks.device, non_blocking=True, memory_format=torch.channels_last)
    padded = padded.to(ranks.device, non_blocking=True)
    targets = [t.to(ranks.device) for t in targets]
    noise = draw_pose_noise([len(t) for t in targets], model.skeleton.num_keypoints, cfg, ranks.device)
    poses = noise_poses(pad_poses(targets, noise, cfg.padding), noise.t, noise.eps, cfg.scale)
    denoising = model.denoising_queries(targets)
    with runtime.autocast(ranks.device, cfg.amp):
        result = net(images, padded, poses, noise.t, denoising)
    losses = criterion(result | dict(denoising=denoising), targets, model.sigmas, cfg.accum * ranks.world)
    # what never has a gradient, as in the release, gets one of 0, which DistributedDataParallel waits for
    idle = [*model.decoder.size_head.parameters(), model.decoder.keypoint_size.weight, model.noisy_label.weight]
    losses["unused"] = 0 * sum(p.sum() for p in idle)
    finite = torch.stack([*losses.values()]).isfinite().tolist()        # one wait for the GPU, not one per term
    if not all(finite):
        raise FloatingPointError(", ".join([name for name, good in zip(losses, finite) if not good][:5]))
    return losses


def train(cfg: Config, args) -> None:
    """Train, evaluate, keep everything in the run folder. Runs alone or under torchrun; Ctrl-C saves and leaves."""
    ranks = runtime.init_distributed(args.device)
    if cfg.batch % (cfg.accum * ranks.world):
        raise runtime.UserError(f"--batch {cfg.batch} does not split over {ranks.world} processes x {cfg.accum} "
                                "micro-batches: choose a multiple")
    if cfg.frozen_norm and not (cfg.init or args.saved):
        raise runtime.UserError("frozen norms need start weights: add --init resnet50 (or another), or "
                                "--no-frozen_norm")
    with runtime.rank_zero_first(ranks):                         # it makes the puppets and fetches start weights
        train_split, val_split = default_splits(cfg.data)
        data = open_dataset(cfg.data, train_split, sigmas=runtime.numbers(cfg.sigmas))
        held_out = open_dataset(cfg.data, val_split, skeleton=data.skeleton)
        runtime.seed_all(cfg.seed)                               # equal start weights on every process
        model = DiffusionRegPose(cfg, data.skeleton)
        if cfg.init and not args.saved:
            load_init(model, cfg.init)
    model.to(ranks.device, memory_format=torch.channels_last)
    ema = runtime.Ema(model, cfg.ema, cfg.ema_warmup)
    optimizer = build_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=cfg.amp == "fp16" and ranks.device.type == "cuda")
    at = dict(epoch=0, done=0, step=0, best=-math.inf)           # done: optimiser steps of this epoch
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    if args.saved:
        runtime.restore(parts, args.saved)
        at = {name: args.saved[name] for name in at}
    run = runtime.Run("diffusionregpose", cfg, args, ranks)
    args.saved = None                                            # its memory is ours again
    run.say(f"{data.report()}\n{held_out.report()}\nwriting to {run.folder}")
    completion = start_completion(data, cfg, run)
    net = runtime.distribute(model, ranks)

    data, micro = data.training(), cfg.batch // (cfg.accum * ranks.world)
    per_epoch = len(runtime.epoch_batches(len(data), micro, cfg.accum, cfg.seed, 0, ranks))
    steps = cfg.epochs * per_epoch // cfg.accum

    def save_last(save) -> None:
        save("last.pt", **at, skeleton=data.skeleton.to_dict(), **runtime.states(parts))

    stop = runtime.Stopper()
    if at["epoch"] >= cfg.epochs:
        run.say(f"all {cfg.epochs} epochs are done; --epochs {2 * cfg.epochs} would go on")
    for epoch in range(at["epoch"], cfg.epochs):
        todo = runtime.epoch_batches(len(data), micro, cfg.accum, cfg.seed, epoch, ranks)[at["done"] * cfg.accum:]
        loader = DataLoader(TrainImages(data, cfg, epoch, completion), batch_sampler=todo, num_workers=cfg.workers,
                            collate_fn=partial(collate, join=pad_images), worker_init_fn=runtime.ignore_signals,
                            pin_memory=ranks.device.type == "cuda")
        bar = tqdm(loader, f"epoch {epoch + 1}/{cfg.epochs}", per_epoch, initial=per_epoch - len(todo),
                   disable=ranks.rank > 0, dynamic_ncols=True)
        net.train()
        seen = []                                                # ids of the images of this optimiser step
        for i, ((images, padded), targets, skipped) in enumerate(bar, per_epoch - len(todo)):
            run.bad_files(sum(skipped, []))
            seen += [t.image_id for t in targets]
            runtime.seed_all(cfg.seed, epoch, i, ranks.rank)
            factor = lr_scale(at["step"], steps, epoch, cfg)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            try:
                losses = batch_losses(net, model, images, padded, targets, ranks)
            except FloatingPointError as error:
                raise run.not_finite(str(error), at["step"], seen) from None
            scaler.scale(sum(losses.values()) / cfg.accum).backward()
            if (i + 1) % cfg.accum:
                continue
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            if not (norm.isfinite() or scaler.is_enabled()):     # a scaler leaves such steps out by itself
                raise run.not_finite("the gradient", at["step"], seen)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            ema.update(model)
            at.update(step=at["step"] + 1, done=at["done"] + 1)
            seen = []

            if at["step"] % 20 == 0:                             # reading numbers makes a GPU wait
                final = {name: losses[name].item() for name in ("loss_ce", "loss_bbox", "loss_keypoints", "loss_oks")}
                total = sum(losses.values()).item()
                run.log(step=at["step"], epoch=epoch, loss=total, **final, grad_norm=float(norm), lr=group["lr"])
                bar.set_postfix(loss=f"{total:.1f}", keypoints=f"{final['loss_keypoints']:.2f}")
            if stop(ranks):
                save_last(run.save)
                run.say(f"stopped and saved; go on with --resume {run.folder}")
                return
            if run.save_is_due():
                save_last(run.try_save)

        last = epoch + 1 == cfg.epochs
        if last or (epoch + 1) % cfg.eval_every == 0:
            save_last(run.try_save)                              # a kill while evaluating costs nothing
            runtime.share_buffers(ema)
            table, predictions = evaluate(ema.module, held_out, cfg, ranks)
            run.log(step=at["step"], epoch=epoch, **table)
            run.say(f"epoch {epoch + 1}\n{metrics.format_table(table)}")
            if table["AP"] > at["best"]:
                at["best"] = table["AP"]
                run.try_save("best.pt", **at, skeleton=data.skeleton.to_dict(), model=ema.module.state_dict(),
                             metrics=table)
            run.draw(held_out, predictions)
            if last and cfg.data == "puppets":
                table, _ = evaluate(ema.module, open_crowd(data.skeleton, ranks), cfg, ranks)
                run.say(f"puppets in crowds, E/M/H: easy, medium and hard\n{metrics.format_table(table)}")
        run.bad_files(runtime.gather_lists([*run.bad, *held_out.bad]))
        at.update(epoch=epoch + 1, done=0)
        save_last(run.save if last else run.try_save)            # at the very end a full disk is an error


def start_completion(data: PoseDataset, cfg: Config, run: runtime.Run) -> KeypointCompletion | None:
    """The completion of a training set, shown in completion.png; None if it is off or has nothing to learn from."""
    completion = learn_completion(data) if cfg.keypoint_completion else None
    if cfg.keypoint_completion and not completion:
        run.say("no keypoint completion: there are not two people with all their keypoints")
    elif completion and run.writes:
        with runtime.goes_on(run.folder / "completion.png"):
            draw.draw_completion(data, completion).save(run.folder / "completion.png")
    return completion


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def summary() -> str:
    """Of each preset: parameters, and GFLOPs of one DDIM step on one image (2 per multiply-add of convolutions and
    matrix products)."""
    rows = [f"{'preset':14}{'input':>9}{'parameters':>13}{'learned':>11}{'GFLOPs':>9}"]
    for preset in PRESETS:
        model = build(preset, "crowdpose" if preset.endswith("crowdpose") else "coco").eval()
        height = min(model.cfg.short_side, 480)
        width = min(height * 4 // 3, model.cfg.long_side)
        noise = torch.zeros(1, model.cfg.queries, model.skeleton.num_keypoints, 2)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, height, width), None, noise, torch.tensor([999]))
        every, learned = sum(p.numel() for p in model.parameters()) / 1e6, count_parameters(model) / 1e6
        rows.append(f"{preset:14}{f'{width}x{height}':>9}{every:>11.2f} M{learned:>9.2f} M"
                    f"{counter.get_total_flops() / 1e9:>9.1f}")
    return "\n".join(rows)


def main() -> None:
    cfg, args = runtime.parse(Config, PRESETS, __doc__)
    if args.train:
        runtime.launch(train, cfg, args, cfg.processes)
    else:
        print(f"{__doc__}\n{summary()}")


if __name__ == "__main__":
    runtime.run_main(main)
