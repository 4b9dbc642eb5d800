"""Training pictures that one core gets ready in a second, and what their time goes into.

    python -m tests.bench_loading [--data data/coco] [--preset l] [--size 640] [--pictures 400] [--threads 1]

DETRPose's augmented pictures (`TrainImages`), in epochs with mosaic and zoom-out, with zoom-out alone, and without both.
A share is what the named function takes, with all that it calls, of processor time, so that other work beside does not
count: "decode" is reading the file, "mosaic" the resizing and pasting of four pictures, whose decoding counts as that.
"""
import time
from collections import Counter
from dataclasses import replace
from unittest import mock

import detrpose
from common import transforms
from common.datasets import PoseDataset
from common.splits import open_dataset
from tests.helpers import bench_flags

STEPS = dict(decode=(PoseDataset, "load"), mosaic=(transforms, "mosaic"), pad=(transforms, "pad"), flip=(transforms, "hflip"),
             colour=(transforms, "color_jitter"), resize=(transforms, "resize"), tensor=(transforms, "to_tensor"))


def timed(name: str, work, spent: Counter):
    """The function, which adds its seconds to `spent`; a step within a step is part of that one."""
    def run(*arguments, **options):
        if spent["running"]:
            return work(*arguments, **options)
        spent["running"], start = 1, time.process_time()
        try:
            return work(*arguments, **options)
        finally:
            spent["running"] = 0
            spent[name] += time.process_time() - start
    return run


def measure(data: PoseDataset, cfg: detrpose.Config, pictures: int) -> str:
    """The end of a row: pictures a second, and the share of each step in percent."""
    images, spent = detrpose.TrainImages(data, cfg, cfg.aug_from), Counter()
    start = time.process_time()
    for i in range(pictures):
        images[i % len(images)]
    whole, patches = time.process_time() - start, [
        mock.patch.object(owner, step, timed(name, getattr(owner, step), spent)) for name, (owner, step) in STEPS.items()]
    for patch in patches:
        patch.start()
    start = time.process_time()
    for i in range(pictures):
        images[i % len(images)]
    total = time.process_time() - start
    mock.patch.stopall()
    shares = [spent[name] / total for name in STEPS]
    return f"{pictures / whole:>10.0f}" + "".join(f"{share:>8.0%}" for share in [*shares, 1 - sum(shares)])


if __name__ == "__main__":
    args = bench_flags(__doc__, data="data/coco", preset="l", size=640, pictures=400, threads=1)
    data = open_dataset(args.data, "train").training()
    cfg = replace(detrpose.PRESETS[args.preset], size=args.size)
    epochs = dict(mosaic=cfg, zoom_out=replace(cfg, mosaic=0.0), neither=replace(cfg, mosaic=0.0, zoom_out=0.0))
    print(f"{len(data)} pictures of {args.data}, {args.size}x{args.size}, one core")
    print(f"{'':>10}{'a second':>10}" + "".join(f"{name:>8}" for name in [*STEPS, "rest"]))
    for name, kind in epochs.items():
        print(f"{name:>10}{measure(data, kind, args.pictures)}", flush=True)
