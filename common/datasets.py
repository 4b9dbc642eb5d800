"""Readers that turn every dataset's files into one record, `Sample`."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass
class Sample:
    """One image with its people. P people, K keypoints; everything in pixels of `image`, origin at the top left."""
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
