"""Changes of an image together with its boxes and keypoints.

Every function takes a `Sample` whose image is a PIL RGB picture (`load_image`) and returns a new one; the old one
stays as it was; the colour steps take and return the picture alone. Clips keep together: geometry that happens to
the image happens to its neighbouring frames. Nothing here draws from a global random state: a number comes in as
an argument, or from the `np.random.Generator` called `rng`.

Units    pixels. Keypoints sit on pixel centres (the last column is x = w - 1), boxes on pixel edges (the last edge
         is x = w), which is why mirroring moves them differently.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional

from common.errors import UserError
from common.records import Sample
from common.skeletons import Skeleton, words

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


# ---------------------------------------------------------------- geometry: image, boxes and keypoints

def hflip(sample: Sample, flip: Sequence[int] | None) -> Sample:
    """Mirror left and right; `flip[k]` is the keypoint that keypoint k becomes, as in `Skeleton.flip`.

    Labelled keypoints move to w - 1 - x, boxes to w - x. Without a table the picture would teach left as right,
    so `flip=None` is refused.
    """
    if flip is None:
        raise UserError("these keypoints have no left/right pairs, so images cannot be mirrored: switch the flip "
                        "off, or name the keypoints left_... and right_... in the dataset's categories")
    w = sample.size[0]
    keypoints = sample.keypoints[:, list(flip)]                                     # a copy, (P, K, 3)
    keypoints[..., 0] = np.where(keypoints[..., 2] > 0, w - 1 - keypoints[..., 0], keypoints[..., 0])
    boxes = sample.boxes.copy()
    boxes[:, [0, 2]] = w - sample.boxes[:, [2, 0]]                                  # the right edge is now left
    return replace(_each_image(sample, ImageOps.mirror), keypoints=keypoints, boxes=boxes)


def pad(sample: Sample, left: int, top: int, right: int, bottom: int) -> Sample:
    """Add black borders; a zoom-out once the result is resized. Areas and unlabelled keypoints stay."""
    return replace(_each_image(sample, lambda image: ImageOps.expand(image, (left, top, right, bottom))),
                   keypoints=_move(sample.keypoints, (1, 1), (left, top)),
                   boxes=sample.boxes + np.float32([left, top, left, top]))


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Bilinear to `size` = (w, h), with antialiasing (PIL widens the filter when shrinking); the aspect may change."""
    scale = np.array(size, np.float32) / np.array(sample.size, np.float32)         # (2,): x, y
    return replace(_each_image(sample, lambda image: image.resize(size, Image.Resampling.BILINEAR)),
                   keypoints=_move(sample.keypoints, scale, (0, 0)),
                   boxes=sample.boxes * np.tile(scale, 2),
                   areas=sample.areas * scale.prod())


def short_side_size(size: tuple[int, int], short_side: int, longest: float = float("inf")) -> tuple[int, int]:
    """(w, h) with the shorter side `short_side`; the longer one keeps the aspect and is rounded down.

    Where the longer side would then exceed `longest`, the shorter one becomes as small as that takes.
    """
    w, h = size
    short, long = min(w, h), max(w, h)
    if long / short * short_side > longest:
        short_side = max(1, round(longest * short / long))
    return short_side * w // short, short_side * h // short


def resize_short_side(sample: Sample, short_side: int, longest: float = float("inf")) -> Sample:
    """Resize to `short_side_size`."""
    return resize(sample, short_side_size(sample.size, short_side, longest))


def shrink(sample: Sample, longest: int) -> Sample:
    """The sample with no side longer than `longest` px, so that what follows costs no more than with a small photo."""
    w, h = sample.size
    scale = longest / max(w, h)
    return sample if scale >= 1 else resize(sample, (max(1, round(scale * w)), max(1, round(scale * h))))


def crop(sample: Sample, x: int, y: int, w: int, h: int) -> Sample:
    """The window of w x h pixels whose top left corner is (x, y), as the DETR family cuts it.

    Boxes end at the border, areas become those of the boxes, people without a box in the window go. Labelled
    keypoints beyond the border move onto it and keep their v: half a person still has a whole pose.
    """
    limit = np.float32([w, h])
    inside = _move(sample.keypoints, (1, 1), (-x, -y))
    inside[..., :2] = np.where(inside[..., 2:] > 0, inside[..., :2].clip(0, limit), inside[..., :2])
    boxes = (sample.boxes - np.float32([x, y, x, y])).clip(0, np.tile(limit, 2))
    window = replace(_each_image(sample, lambda image: image.crop((x, y, x + w, y + h))), keypoints=inside, boxes=boxes,
                     areas=(boxes[:, 2:] - boxes[:, :2]).prod(1))
    return _take_people(window, (boxes[:, 2:] > boxes[:, :2]).all(1))


def mosaic(samples: Sequence[Sample], short_side: int) -> Sample:
    """Four images in a 2×2 grid: top left, top right, bottom left, bottom right (YOLOv4's mosaic without its crop).

    Each is resized to `short_side` and lies in the top left corner of its cell; all cells are as wide as the widest
    and as high as the highest of the four, the rest is black. The result carries the id of the first. The longer side
    of very thin images is 8 times `short_side`.
    """
    samples = [resize_short_side(sample, short_side, 8 * short_side) for sample in samples]
    cell_w, cell_h = np.max([sample.size for sample in samples], axis=0).tolist()
    canvas = Image.new("RGB", (2 * cell_w, 2 * cell_h))
    corners = [(0, 0), (cell_w, 0), (0, cell_h), (cell_w, cell_h)]
    for sample, corner in zip(samples, corners, strict=True):
        canvas.paste(sample.image, corner)
    return Sample(
        image=canvas, image_id=samples[0].image_id, size=canvas.size,
        keypoints=np.concatenate([_move(s.keypoints, (1, 1), corner) for s, corner in zip(samples, corners)]),
        boxes=np.concatenate([s.boxes + np.tile(np.float32(corner), 2) for s, corner in zip(samples, corners)]),
        areas=np.concatenate([s.areas for s in samples]),
        iscrowd=np.concatenate([s.iscrowd for s in samples]))


def _each_image(sample: Sample, change: Callable[[Image.Image], Image.Image]) -> Sample:
    """The sample with its image and its neighbouring frames changed, and the size read from the result."""
    image = change(sample.image)
    return replace(sample, image=image, size=image.size, frames=tuple(change(frame) for frame in sample.frames))


def _move(keypoints: np.ndarray, scale: Sequence[float], shift: Sequence[float]) -> np.ndarray:
    """Labelled keypoints (P, K, 3) at xy · scale + shift; unlabelled ones stay, mostly at (0, 0)."""
    moved = keypoints.copy()
    xy = keypoints[..., :2] * np.float32(scale) + np.float32(shift)
    moved[..., :2] = np.where(keypoints[..., 2:] > 0, xy, keypoints[..., :2])
    return moved


def filter_people(sample: Sample) -> Sample:
    """The people one can learn from: no crowd regions, at least one labelled keypoint, a box with area in the image.

    Boxes are clipped to the image. Keypoints are not: a joint outside the picture is still where it is.
    """
    boxes = sample.boxes.clip(0, np.tile(np.float32(sample.size), 2))
    keep = ~sample.iscrowd & (sample.keypoints[..., 2] > 0).any(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return _take_people(replace(sample, boxes=boxes), keep)


def _take_people(sample: Sample, keep: np.ndarray) -> Sample:
    return replace(sample, keypoints=sample.keypoints[keep], boxes=sample.boxes[keep], areas=sample.areas[keep],
                   iscrowd=sample.iscrowd[keep],
                   track_ids=None if sample.track_ids is None else sample.track_ids[keep])


# ---------------------------------------------------------------- person crops

def fit_box(box: np.ndarray, aspect: float, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Centre and (w, h) of the window for a box x1, y1, x2, y2: the side that is too short for w / h = `aspect` grows,
    then both sides by the factor `margin`. The window may reach beyond the image."""
    w, h = np.maximum(box[2:] - box[:2], 1)
    return (box[:2] + box[2:]) / 2, margin * np.array([max(w, aspect * h), max(h, w / aspect)])


def half_body(joints: np.ndarray, skeleton: Skeleton, rng: np.random.Generator) -> np.ndarray | None:
    """A box for one half of a body, above or below the waist, as HRNet and DCPose choose it: 69 of 100 times
    the upper half, the other one where that has fewer than three labelled joints, None where both have. It is
    as wide and as high as the half's joints spread, around their mean. joints (J, 3)
    """
    lower = np.array([bool({"hip", "knee", "ankle"} & set(words(name))) for name in skeleton.keypoints])
    labelled = joints[:, 2] > 0
    halves = [joints[half & labelled, :2] for half in (~lower, lower)]
    chosen = next((xy for xy in halves[::1 if rng.random() < 0.69 else -1] if len(xy) > 2), None)
    if chosen is None:
        return None
    reach = np.ptp(chosen, axis=0) / 2
    return np.concatenate([chosen.mean(0) - reach, chosen.mean(0) + reach])


def crop_matrix(centre: np.ndarray, width: float, size: tuple[int, int], rotation: float = 0.0) -> np.ndarray:
    """2×3 from image to a crop of size (W, H): k R (p − centre) + (W/2, H/2), k = W / width, rotation in degrees."""
    cos, sin = (size[0] / width * f(math.radians(rotation)) for f in (math.cos, math.sin))
    linear = np.array([[cos, sin], [-sin, cos]])
    return np.c_[linear, np.array(size) / 2 - linear @ centre]


def move_points(xy: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Points (..., 2) through a 2×3 matrix."""
    return xy @ matrix[:, :2].T + matrix[:, 2]


def invert(matrix: np.ndarray) -> np.ndarray:
    """The 2×3 matrix of the way back."""
    return np.linalg.inv(np.vstack([np.asarray(matrix, np.float64), [0, 0, 1]]))[:2]


def warp_affine(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The crop (h, w, 3) uint8 of `size` = (w, h) that the 2×3 `matrix`, from image to crop, maps an image onto.

    image (H, W, 3) uint8, or with the channels of several frames behind one another. Pixel (x, y) of the crop reads the
    image at matrix⁻¹(x, y): bilinear, integer coordinates are pixel centres, black outside. Pillow's own transform
    truncates instead of rounding and darkens the rim.
    """
    w, h = size
    inverse = invert(matrix)
    y, x = np.mgrid[:h, :w]
    source = np.stack([x, y, np.ones_like(x)], -1) @ inverse.T                      # (h, w, 2) xy in the image
    corners = source[[0, 0, -1, -1], [0, -1, 0, -1]]                                # nothing reads beyond them
    low = np.clip(np.floor(corners.min(0)), 0, np.array(image.shape[1::-1]) - 1).astype(int)
    high = np.clip(np.ceil(corners.max(0)), 0, np.array(image.shape[1::-1]) - 1).astype(int)
    part = image[low[1]:high[1] + 1, low[0]:high[0] + 1]                            # only this much is read
    part = np.pad(part, [(1, 1), (1, 1), (0, 0)])           # grid_sample cannot place a side of a single pixel
    grid = (source - low + 1) * 2 / (np.array(part.shape[1::-1]) - 1) - 1           # -1 and 1: the outer pixel centres
    pixels = torch.from_numpy(part).permute(2, 0, 1)[None].float()
    warped = functional.grid_sample(pixels, torch.from_numpy(grid)[None].float(), padding_mode="zeros",
                                    align_corners=True)
    return warped[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


# ---------------------------------------------------------------- colour: image only

def blend(kind: type) -> Callable[[Image.Image, float], Image.Image]:
    """A function of a picture and a factor: 1 gives the picture itself, 0 something dull."""
    return lambda image, factor: kind(image).enhance(factor)


brightness = blend(ImageEnhance.Brightness)         # 0: black
contrast = blend(ImageEnhance.Contrast)             # 0: its mean gray
saturation = blend(ImageEnhance.Color)              # 0: itself in gray


def hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn the colour circle by `turn` in [-0.5, 0.5] of a full round; PIL's hue has 256 steps and wraps."""
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray((np.array(h, np.int32) + int(turn * 255)).astype(np.uint8))     # uint8: modulo 256
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def color_jitter(image: Image.Image, rng: np.random.Generator, strength: float = 0.4,
                 turn: float = 0.4) -> Image.Image:
    """Brightness, contrast and saturation by factors from U(1 - strength, 1 + strength), hue by U(-turn, turn),
    in random order. Generators with the same seed give the frames of a clip the same change."""
    steps = [(step, rng.uniform(1 - strength, 1 + strength)) for step in (brightness, contrast, saturation)]
    steps.append((hue, rng.uniform(-turn, turn)))
    for i in rng.permutation(len(steps)):
        step, amount = steps[i]
        image = step(image, amount)
    return image


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def normalise(pixels: Tensor) -> Tensor:
    """RGB (..., 3, H, W) in [0, 1], each channel less ImageNet's mean and divided by its deviation."""
    return (pixels - MEAN.to(pixels.device)) / STD.to(pixels.device)


def denormalise(pixels: Tensor) -> Tensor:
    """What `normalise` was given."""
    return pixels * STD.to(pixels.device) + MEAN.to(pixels.device)
