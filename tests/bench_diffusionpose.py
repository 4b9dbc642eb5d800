"""How much DiffusionPose's forward pass costs beyond its ViT and its selective scans, on a CPU.

    python -m tests.bench_diffusionpose [--preset b] [--pairs 7] [--threads 1]

One clip of noise through the whole network (one DDIM step), and through two parts alone: the ViT on the three frames,
and the scans of the spatio-temporal blocks on the very sequences that they had. All run in turn; the table has the
median processor time of each and the median ratio of the rounds. The blocks' own products of matrices set a floor: for
preset b they are 59 GFLOP beside 102 of the ViT, which makes 1.6 if nothing else took any time.
"""
import time
from unittest import mock

import numpy as np
import torch

import diffusionpose as dp
from tests.helpers import bench_flags, in_turns


@torch.inference_mode()
def main() -> None:
    args = bench_flags(__doc__, preset="b", threads=1)
    model = dp.build(args.preset).eval()
    cfg = model.cfg
    frames, noise = torch.randn(1, 3, 3, cfg.height, cfg.width), torch.randn(1, *model.noise_shape)

    scans: list[tuple[tuple, dict]] = []

    def record(*arguments, **options) -> torch.Tensor:
        scans.append((arguments, options))
        return scan(*arguments, **options)

    scan = dp.selective_scan
    with mock.patch.object(dp, "selective_scan", record):
        model.sample(frames, noise)

    def scan_all() -> None:
        for arguments, options in scans:
            scan(*arguments, **options)

    parts = [lambda: model.sample(frames, noise), lambda: model.backbone(frames[0]), scan_all]
    in_turns(1, *parts)                                             # to warm up
    times = in_turns(args.pairs, *parts, clock=time.process_time)
    print(f"torch {torch.__version__}, {args.threads} threads, preset {args.preset} "
          f"({cfg.height}x{cfg.width}), batch 1")
    for name, seconds in zip(("network", "vit", f"{len(scans)} scans"), np.median(times, 0)):
        print(f"{name:<12}{seconds * 1e3:>8.0f} ms")
    print(f"network / (vit + scans) = {np.median(times[:, 0] / times[:, 1:].sum(1)):.2f}")


if __name__ == "__main__":
    main()
