"""What a dataset gives and what a method finds, the people of a batch as tensors, and reading a picture.

Units    pixels, origin at the top left corner; boxes are x1, y1, x2, y2. `People` says nothing of units: its method does.
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from common.errors import UserError

Picture = str | Path | np.ndarray | Image.Image
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

    def at_least(self, threshold: float) -> Prediction:
        """Those people whose score is at least `threshold`."""
        good = np.asarray(self.scores) >= threshold
        return Prediction(self.image_id, self.keypoints[good], self.keypoint_scores[good], self.scores[good],
                          None if self.boxes is None else self.boxes[good])


# ---------------------------------------------------------------- pictures

class BadImage(UserError):
    """An image that cannot be read; says which and why."""

    def __init__(self, path: Path | str, reason: str):
        super().__init__(path, reason)      # both in `args`, so that it survives the way back from a loader worker

    def __str__(self) -> str:
        return f"cannot read image {self.args[0]}: {self.args[1]}"


UNDER = (127, 127, 127)     # what shows through where a picture is transparent
WHITES = (255, 1023, 4095, 16383, 65535)            # of pictures with 8 to 16 bits a pixel


def open_picture(path: Path | str) -> Image.Image:
    """Pillow's, of files only: it would wait for ever at a pipe. Raises what Pillow does, and BadImage."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadImage(path, "this is a folder or a pipe, not a file")
    return Image.open(path)


def load_image(image: Path | str | Image.Image, size: tuple[int, int] | None = None,
               white: float | None = None) -> Image.Image:
    """A fully decoded 8-bit RGB picture, from whatever the file holds; of an animation the first frame. Raises `BadImage`.

    size   (w, h) of the annotation file. Cameras store a rotation beside the pixels (EXIF), which viewers and most
           annotation tools apply: so is it here, unless the size says that the tool did not. Where it was applied and
           the size cannot tell, `info["orientation"]` of the result has EXIF's number.
    white  what is white in a picture of more than 8 bits, see `white_of`; by default as its largest value suggests
    """
    name = getattr(image, "filename", "") or "picture" if isinstance(image, Image.Image) else image
    try:
        picture = image if isinstance(image, Image.Image) else open_picture(image)
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1)    # before Pillow turns a TIFF by itself
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        if size is not None and picture.size == tuple(size) != upright.size:
            return to_rgb(picture, white)
        result = to_rgb(upright, white)
        if size is not None and turned in range(2, 9) and picture.size == upright.size:
            result.info["orientation"] = turned
        return result
    except BadImage:
        raise
    except FileNotFoundError:
        raise BadImage(name, "there is no such file") from None
    except Image.UnidentifiedImageError:
        raise BadImage(name, "this is not an image, or of a kind that Pillow does not know") from None
    except Exception as error:              # decoders raise all kinds of errors on damaged files
        raise BadImage(name, str(error) or type(error).__name__) from None


def as_picture(picture: Picture) -> Image.Image:
    """Raises BadImage, and UserError for an array that is no picture."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.ndim == 3 and picture.shape[2] != 3:
            raise UserError(f"expected a picture (h, w, 3) of uint8 in RGB order, got {picture.shape} of {picture.dtype}")
        return Image.fromarray(picture).convert("RGB")
    if not isinstance(picture, (str, Path, Image.Image)):
        raise UserError(f"expected a path, an array or a picture of PIL, got {type(picture).__name__}")
    return load_image(picture)


def to_rgb(picture: Image.Image, white: float | None = None) -> Image.Image:
    """Any PIL mode to 8-bit RGB: deep gray is scaled, for PIL would cut it off at 255, and under transparency lies gray."""
    if is_deep(picture):
        gray, own = deep_gray(picture)
        return Image.fromarray((gray / (white or own) * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, UNDER), picture).convert("RGB")
    return picture.convert("RGB")


def is_deep(picture: Image.Image) -> bool:
    """Whether its gray values have more than 8 bits."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")


def deep_gray(picture: Image.Image) -> tuple[np.ndarray, float]:
    """The values (h, w) of a deep picture, and what the largest one suggests for white: the end of the scale of 8, 10,
    12, 14 or 16 bits; of floats 1.0, or the largest one, for lights may be brighter than white."""
    gray = np.nan_to_num(np.asarray(picture).astype(np.float64), posinf=0, neginf=0)
    largest = float(gray.max(initial=0))
    scale = [max(1.0, largest)] if picture.mode == "F" and largest <= 16 else WHITES
    return gray, next((white for white in scale if largest <= white), largest)


def white_of(paths: Sequence[Path], most: int = 16) -> float | None:
    """One white for all deep pictures of a set, by `most` of them, so that no frame is brighter than its neighbours.

    Of a file with pages it is by `most` of these. None where the first picture that can be read is an ordinary one.
    """
    found = []
    for path in paths[::max(1, len(paths) // most)]:
        try:
            with open_picture(path) as picture:
                pages = getattr(picture, "n_frames", 1)
                for page in range(0, pages, max(1, pages // most)) if is_deep(picture) else ():
                    picture.seek(page)
                    found.append(deep_gray(picture)[1])
                if not found:
                    break
        except Exception:                   # `load_image` will say what is wrong with it
            continue
    return max(found, default=None)


# ---------------------------------------------------------------- writing a file

@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write a file to, which is called `path` as soon as it is whole; a link of that name gives way."""
    part = path.with_name(f".{path.name[-60:]}.part")        # a name may have 255 bytes
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- the people of a batch

@dataclass
class People:
    """The people of one image as tensors, P of them or none; a method says in which units, and may add columns."""
    keypoints: Tensor                       # (P, K, 2) xy; 0 where not labelled
    visible: Tensor                         # (P, K) 1 = labelled
    boxes: Tensor                           # (P, 4)
    areas: Tensor                           # (P,)
    image_id: int | str = field(default=0, kw_only=True)

    def __getstate__(self) -> dict:
        """By value on the way from a loader process: each tensor would take an open file."""
        return {name: x.numpy() if isinstance(x, Tensor) else x for name, x in vars(self).items()}

    def __setstate__(self, state: dict) -> None:
        vars(self).update({name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in state.items()})

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
