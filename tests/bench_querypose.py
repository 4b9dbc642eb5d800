"""How much faster QueryPose is where some queries alone get a pose, on the same weights and threads.

    python -m tests.bench_querypose [--preset r50-light] [--pairs 3] [--threads 1]

    plain    the paper's loop: poses of all 100 queries in all stages
    chosen   all box stages first, then the keypoint stages on every fourth query (`QueryPose.forward` with `choose`)
    best     poses of those who can be among the 20 people of the highest scores (`best_poses`); how many these are is a
             matter of the weights. Random ones here, with deviations of about a tenth of the box, as after a training

The forms run in turn. They must agree on the queries that have a pose in both, and best on the 20. The table has the
median times, and the median ratios to plain of the runs.
"""
import numpy as np
import torch

import querypose
from tests.helpers import bench_flags, in_turns

WIDTH, HEIGHT = 640, 480


@torch.no_grad()
def compare(preset: str, pairs: int) -> str:
    """One row: preset, seconds of the three forms, ratios, poses of `best`; first they agree."""
    model = querypose.fuse(querypose.build(preset).eval())
    for head in model.keypoint_stages[-1].heads:
        head.sigmas.weight.mul_(0.1)
        head.sigmas.bias.fill_(-2.2)                                    # sigmoid: 0.1
    image, size = torch.randn(1, 3, HEIGHT, WIDTH), torch.tensor([[WIDTH, HEIGHT]])
    chosen = (torch.arange(model.cfg.queries) % 4 == 0)[None]
    forms = dict(plain=lambda: model(image, size)[-1], chosen=lambda: model(image, size, lambda found: chosen)[-1],
                 best=lambda: querypose.best_poses(model, image, size))

    plain, *others = (form() for form in forms.values())
    for other in others:
        posed = (other.sigmas < 1).all((-2, -1))
        assert torch.equal(plain.boxes, other.boxes)
        torch.testing.assert_close(plain.keypoints[posed], other.keypoints[posed], rtol=1e-4, atol=1e-4)
    inside = ((plain.boxes[..., 2:] > 0) & (plain.boxes[..., :2] < torch.tensor([WIDTH, HEIGHT]))).all(-1)
    best = [(querypose.pose_scores(one)[0] * inside).topk(20).values for one in (plain, others[1])]
    torch.testing.assert_close(*best)

    times = in_turns(pairs, *forms.values())
    columns = [f"{seconds:>8.2f} s" for seconds in np.median(times, 0)]
    ratios = [f"{ratio:>8.2f}" for ratio in np.median(times[:, :1] / times[:, 1:], 0)]
    return f"{preset:>10}{''.join(columns)}{''.join(ratios)}{int(posed.sum()):>7}"


if __name__ == "__main__":
    args = bench_flags(__doc__, pairs=3, preset=["r50-light"])
    print(f"torch {torch.__version__}, {args.threads} threads, {WIDTH}x{HEIGHT}, batch 1\n"
          f"    preset     plain    chosen      best  chosen    best  posed")
    for preset in args.preset:
        print(compare(preset, args.pairs), flush=True)
