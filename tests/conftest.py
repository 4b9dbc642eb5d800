"""Fixtures for every test; functions that several tests need are in tests/helpers.py."""
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # tests run side by side, a process a core; read when torch is imported

import numpy as np
import pytest
import torch


@pytest.fixture
def file(request) -> Path:
    """A golden file, see `helpers.golden`; fails, or skips, if there is none."""
    if isinstance(request.param, str):
        why = request.param
        pytest.skip(why[6:]) if why.startswith("skip: ") else pytest.fail(why)
    return request.param


@pytest.fixture(scope="session")
def pose_data() -> Path:
    """Small real samples of COCO, CrowdPose and PoseTrack18; they are not ours to ship, so the test skips without them."""
    if not os.environ.get("POSE_DATA"):
        pytest.skip("set POSE_DATA to a folder with real samples (coco/, coco4/, crowdpose/)")
    return Path(os.environ["POSE_DATA"])


@pytest.fixture(scope="session")
def puppets_folder(tmp_path_factory) -> Path:
    """24 + 8 puppets in COCO layout; a test that changes files takes a copy."""
    from data import puppets
    counts = {"train": 24, "val": 8}
    return puppets.make(tmp_path_factory.mktemp("puppets"), "coco", size=64, workers=1, progress=False, counts=counts)


@pytest.fixture
def terminal() -> Iterator[None]:
    """Signals as a program in a terminal gets them; under nohup and in the background some are ignored."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


QUICK = ("boxes", "cli", "datasets", "heatmaps", "layers", "metrics", "oks", "posetrack", "ranks", "skeletons", "tables",
         "transforms", "weights")       # all tests of these files; in others those that are marked


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in QUICK and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)
