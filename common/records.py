"""What a dataset gives and what a method finds, the people of a batch as tensors, and reading a picture.

Units    pixels, origin at the top left corner; boxes are x1, y1, x2, y2. `People` says nothing of units: its method does.
"""
from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import UserError

BOX_TO_AREA = 0.53          # a person's outline fills about half of the box: the area where a file has none


@dataclass
class Sample:
    """One image with its people: P people, K keypoints, all in pixels of `image`, origin at the top left."""
    image: Path | Image.Image
    image_id: int | str
    size: tuple[int, int]                   # (w, h)
    keypoints: np.ndarray                   # (P, K, 3) float32: x, y, v (0 not labelled, 1 hidden, 2 visible)
    boxes: np.ndarray                       # (P, 4) float32: x1, y1, x2, y2
    areas: np.ndarray                       # (P,) float32, px²
    iscrowd: np.ndarray                     # (P,) bool: the box is a group, nobody in it has keypoints
    frames: tuple = ()                      # clips: the neighbouring frames, paths or pictures like `image`
    track_ids: np.ndarray | None = None     # clips: (P,) int64


@dataclass
class Prediction:
    """The people found in one image, in pixels of the original image; scores are in [0, 1], best first or not."""
    image_id: int | str
    keypoints: np.ndarray                   # (P, K, 2): x, y
    keypoint_scores: np.ndarray             # (P, K)
    scores: np.ndarray                      # (P,)
    boxes: np.ndarray | None = None         # (P, 4): x1, y1, x2, y2


# ---------------------------------------------------------------- pictures

class BadImage(UserError):
    """An image that cannot be read; says which and why."""

    def __init__(self, path: Path | str, reason: str):
        super().__init__(path, reason)      # both in `args`, so that it survives the way back from a loader worker

    def __str__(self) -> str:
        return f"cannot read image {self.args[0]}: {self.args[1]}"


def load_image(image: Path | str | Image.Image, size: tuple[int, int] | None = None,
               rotate: bool = False) -> Image.Image:
    """A fully decoded 8-bit RGB picture, from whatever the file holds. Raises `BadImage`.

    Gray, palette, CMYK and 16-bit pictures are converted, transparency is dropped, of an animation the first frame
    counts. Cameras store a rotation beside the pixels (EXIF), which some annotation tools see and others do not:
    with `size`, the (w, h) of the annotation file, it is applied only if that leads to this size. A photo without
    annotation wants `rotate=True`.
    """
    name = getattr(image, "filename", "") or "picture" if isinstance(image, Image.Image) else image
    try:
        picture = image if isinstance(image, Image.Image) else Image.open(image)
        picture.load()
        if rotate or (size is not None and picture.size != tuple(size)):
            upright = ImageOps.exif_transpose(picture)
            picture = upright if rotate or upright.size == tuple(size) else picture
        return to_rgb(picture)
    except FileNotFoundError:
        raise BadImage(name, "there is no such file") from None
    except Image.UnidentifiedImageError:
        raise BadImage(name, "this is not an image, or of a kind that Pillow does not know") from None
    except Exception as error:              # decoders raise all kinds of errors on damaged files
        raise BadImage(name, str(error) or type(error).__name__) from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any PIL mode to 8-bit RGB. PIL would cut 16-bit gray off at 255; we scale it."""
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        gray = np.asarray(picture).astype(np.float64)
        scale = 257 if gray.max(initial=0) > 255 else 1
        picture = Image.fromarray((gray / scale).round().clip(0, 255).astype(np.uint8))
    if picture.mode == "P":
        picture = picture.convert("RGBA")   # a palette may hold transparency, which RGB warns about
    return picture.convert("RGB")


# ---------------------------------------------------------------- the people of a batch

@dataclass
class People:
    """The people of one image as tensors, P of them or none; a method says in which units, and may add columns."""
    keypoints: Tensor                       # (P, K, 2) xy; 0 where not labelled
    visible: Tensor                         # (P, K) 1 = labelled
    boxes: Tensor                           # (P, 4)
    areas: Tensor                           # (P,)
    image_id: int | str = field(default=0, kw_only=True)

    def each(self, change) -> People:
        """The same people with change(tensor) for every column."""
        columns = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: change(x) for name, x in columns.items() if isinstance(x, Tensor)})

    def to(self, device: torch.device) -> People:
        return self.each(lambda x: x.to(device, non_blocking=True))

    def take(self, index: Tensor) -> People:
        """Some of the people, in this order, also repeatedly."""
        return self.each(lambda x: x[index])

    def __len__(self) -> int:
        return len(self.boxes)


def gather_people(people: list[People]) -> People:
    """All people of the batch behind one another."""
    columns = [one.name for one in fields(people[0]) if one.name != "image_id"]
    return replace(people[0], **{name: torch.cat([getattr(one, name) for one in people]) for name in columns})
