"""Where the golden numbers and the small real samples are, for every test."""
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

REFERENCE = Path(os.environ.get("POSE_REFERENCE") or Path(__file__).parent / "golden")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder with one sub-folder of golden files per method, metric and kernel."""
    return REFERENCE


@pytest.fixture(scope="session")
def pose_data() -> Path:
    """Small real samples of COCO, CrowdPose and PoseTrack18; they are not ours to ship, so the test skips without them."""
    if not os.environ.get("POSE_DATA"):
        pytest.skip("set POSE_DATA to a folder with real samples (coco/, coco4/, crowdpose/)")
    return Path(os.environ["POSE_DATA"])


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
