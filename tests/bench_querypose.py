"""How much faster QueryPose predicts when only the queries that are kept get poses, on the same weights and threads.

    python -m tests.bench_querypose [--preset r50-light] [--pairs 3] [--threads 1]

The plain order computes poses of all 100 queries in all stages, as the released code does. In the light form boxes
never see poses: `prune` runs all box stages first, then the keypoint stages on the queries of the best scores alone.
Both orders run in turn; they must agree on every query that has a pose in both. The table has the median time of each,
and the median ratio of the pairs.
"""
import argparse
import statistics
import time

import torch

import querypose
from common.cli import resolve

WIDTH, HEIGHT = 640, 480


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def compare(preset: str, pairs: int) -> str:
    """One row: preset, seconds of both orders, ratio; first both orders agree."""
    model = querypose.fuse(querypose.build(preset).eval())
    image, size = torch.randn(1, 3, HEIGHT, WIDTH), torch.tensor([[WIDTH, HEIGHT]])

    def run(prune: bool):
        model.cfg = resolve(model.cfg, prune=prune)
        return model(image, size)["stages"][-1]

    plain, pruned = run(False), run(True)
    kept = (pruned.sigmas < 1).all((-2, -1))
    assert kept.sum() == querypose.KEPT and torch.equal(plain.boxes, pruned.boxes)
    torch.testing.assert_close(plain.keypoints[kept], pruned.keypoints[kept], rtol=1e-4, atol=1e-4)
    times = [(seconds(lambda: run(False)), seconds(lambda: run(True))) for _ in range(pairs)]
    slow, fast = (statistics.median(column) for column in zip(*times))
    ratio = statistics.median(a / b for a, b in times)
    return f"{preset:>10}{slow:>12.2f} s{fast:>10.2f} s{ratio:>9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["r50-light"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {WIDTH}x{HEIGHT}, batch 1\n"
          f"    preset   all queries  best {querypose.KEPT}    ratio")
    for preset in args.preset:
        print(compare(preset, args.pairs), flush=True)


if __name__ == "__main__":
    main()
