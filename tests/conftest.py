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


TINY = ("--size 64 --levels 1 --dim 32 --layers 1 --decoder_ffn 32 --encoder_ffn 32 --queries 5 --dn_queries 2 "
        "--processes 1 --workers 0 --eval_every 1").split()      # a step takes a few hundredths of a second


@pytest.fixture(scope="session")
def puppets_folder(tmp_path_factory) -> Path:
    """24 + 8 puppets in COCO layout; a test that changes files takes a copy."""
    from data import puppets
    counts = {"train": 24, "val": 8}
    return puppets.make(tmp_path_factory.mktemp("puppets"), "coco", size=64, workers=1, progress=False, counts=counts)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
