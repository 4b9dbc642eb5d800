"""How much faster DETRPose's forward pass is here than in its obvious form, on the same weights and threads.

    python -m tests.bench_detrpose [--preset s l] [--pairs 7] [--threads 1]

The obvious form is what the released eager code computes: convolutions and norms as separate steps, two branches in
the re-parameterised blocks, and a deformable attention that samples level by level with `grid_sample`, stacks the
levels and sums. Both forms run in turn; the table has the median time of each and the median ratio of the pairs.
"""
from unittest import mock

import torch

import detrpose
from kernels.bench import published_deform_attn
from tests.helpers import against, bench_flags, in_turns


@torch.no_grad()
def compare(preset: str, pairs: int) -> str:
    """One row: preset, milliseconds of both forms, ratio; the forms' encoder maps agree first."""
    model = detrpose.build(preset).eval()
    ours, image = detrpose.fuse(model), torch.rand(1, 3, model.cfg.size, model.cfg.size)

    def obvious() -> dict:
        with mock.patch.object(detrpose, "deform_attn", published_deform_attn):
            return model(image)

    # start weights score all cells alike, so rounding decides which are chosen: compare what they are chosen from
    torch.testing.assert_close(ours(image)["maps"], obvious()["maps"], rtol=1e-3, atol=1e-4)
    return f"{preset:>6}{against(in_turns(pairs, obvious, lambda: ours(image)))}"


if __name__ == "__main__":
    args = bench_flags(__doc__, preset=["s", "l"])
    print(f"torch {torch.__version__}, {args.threads} threads, 640x640, batch 1\n"
          f"preset   obvious form       ours    ratio")
    for preset in args.preset:
        print(compare(preset, args.pairs), flush=True)
