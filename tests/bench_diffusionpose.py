"""How much DiffusionPose's forward pass costs beyond its ViT and its selective scans, on a CPU.

    python -m tests.bench_diffusionpose [--preset b] [--pairs 7] [--threads 1]

One clip of noise through the whole network (one DDIM step), and through two parts alone: the ViT on the three frames,
and the scans of the spatio-temporal blocks on the very sequences that they had. All run in turn; the table has the
median processor time of each and the median ratio of the rounds. The blocks' own products of matrices set a floor: for
preset b they are 59 GFLOP beside 102 of the ViT, which makes 1.6 if nothing else took any time.
"""
import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

import diffusionpose as dp


def seconds(run: Callable[[], object]) -> float:
    """Processor time of all threads."""
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="b", help=f"one of {', '.join(dp.PRESETS)} (default b)")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
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

    parts = dict(network=lambda: model.sample(frames, noise), vit=lambda: model.backbone(frames[0]), scans=scan_all)
    for run in parts.values():
        run()
    rows = [[seconds(run) for run in parts.values()] for _ in range(args.pairs)]
    print(f"torch {torch.__version__}, {args.threads} threads, preset {args.preset} "
          f"({cfg.height}x{cfg.width}), batch 1")
    for name, column in zip(parts, zip(*rows)):
        print(f"{name if name != 'scans' else f'{len(scans)} scans':<12}{statistics.median(column) * 1e3:>8.0f} ms")
    ratio = statistics.median(network / (vit + scans) for network, vit, scans in rows)
    print(f"network / (vit + scans) = {ratio:.2f}")


if __name__ == "__main__":
    main()
