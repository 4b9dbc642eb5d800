"""How much faster DETRPose's forward pass is here than in its obvious form, on the same weights and threads.

    python -m tests.bench_detrpose [--preset s l] [--pairs 7] [--threads 1]

The obvious form is what the released eager code computes: convolutions and norms as separate steps, two branches in
the re-parameterised blocks, and a deformable attention that samples level by level with `grid_sample`, stacks the
levels and sums. Both forms run in turn; the table has the median time of each and the median ratio of the pairs.
"""
import argparse
import statistics
import time
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import detrpose


def sampled_level_by_level(value: Tensor, shapes: list, locations: Tensor, weights: Tensor, points: list) -> Tensor:
    """The published PyTorch form of deformable attention; arguments as kernels.deform_attn."""
    batch, _, heads, dim = value.shape
    levels = value.split([h * w for h, w in shapes], 1)
    parts = (2 * locations - 1).split(points, 3)
    sampled = []
    for level, (h, w), grid in zip(levels, shapes, parts):
        level = level.flatten(2).transpose(1, 2).reshape(batch * heads, dim, h, w)
        sampled.append(F.grid_sample(level, grid.transpose(1, 2).flatten(0, 1), align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, -1, sum(points))
    return (torch.cat(sampled, -1) * weights).sum(-1).view(batch, heads * dim, -1).transpose(1, 2).contiguous()


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def compare(preset: str, pairs: int) -> str:
    """One row: preset, milliseconds of both forms, ratio; the forms' encoder maps agree first."""
    model = detrpose.build(preset).eval()
    ours, image = detrpose.fuse(model), torch.rand(1, 3, model.cfg.size, model.cfg.size)

    def obvious() -> dict:
        with mock.patch.object(detrpose, "deform_attn", sampled_level_by_level):
            return model(image)

    # start weights score all cells alike, so rounding decides which are chosen: compare what they are chosen from
    torch.testing.assert_close(ours(image)["maps"], obvious()["maps"], rtol=1e-3, atol=1e-4)
    times = [(seconds(obvious), seconds(lambda: ours(image))) for _ in range(pairs)]
    slow, fast = (statistics.median(column) * 1e3 for column in zip(*times))
    ratio = statistics.median(a / b for a, b in times)
    return f"{preset:>6}{slow:>14.0f} ms{fast:>10.0f} ms{ratio:>9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["s", "l"])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, 640x640, batch 1\n"
          f"preset   obvious form       ours    ratio")
    for preset in args.preset:
        print(compare(preset, args.pairs), flush=True)


if __name__ == "__main__":
    main()
