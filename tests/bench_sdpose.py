"""How much faster SDPose's prediction is here than in its obvious form, on the same weights and threads.

    python -m tests.bench_sdpose [--preset tiny wholebody] [--side 128] [--pairs 7] [--threads 1]

The obvious form is what the released eager code computes: attention that stores its scores, the whole U-Net whatever
the heatmap head reads of it, the text repeated for every crop, and a pass of its own for the mirrored crop. Both forms
run in turn; the table has the median processor time of each and the median ratio of the pairs. For the presets of full
width it is one crop of `side` pixels' height: at 1024 a pair takes many minutes on a CPU.
"""
import time
from unittest import mock

import torch
from torch import Tensor

import sdpose
from tests.helpers import against, bench_flags, in_turns, watch


def stored_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as its formula is written."""
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def obvious(model: sdpose.SDPose, crops: Tensor) -> Tensor:
    """Heatmaps of crops (N, 3, H, W) in [-1, 1], averaged with those of the mirrored crops."""
    def one_pass(view: Tensor) -> Tensor:
        z, tap = model.encode(view), model.unet.up_blocks[model.cfg.tap]
        task, text = model.task(sdpose.POSE).expand(len(z), -1), model.text.expand(len(z), -1, -1)
        with watch(tap=tap) as seen:
            model.unet.output(model.unet(z, task, text))
        return model.decoder(seen["tap"][0][1])

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", stored_scores):
        return (one_pass(crops) + one_pass(crops.flip(3))[:, list(model.skeleton.flip)].flip(3)) / 2


@torch.no_grad()
def compare(preset: str, side: int, pairs: int) -> str:
    """One row: preset, crop, milliseconds of both forms, ratio; the heatmaps of both agree first."""
    size = dict() if preset == "tiny" else dict(height=side, width=side * 3 // 4)
    model = sdpose.build(preset, "wholebody" if preset == "wholebody" else "coco", **size).eval()
    cfg = model.cfg
    crops = torch.rand(16 if preset == "tiny" else 1, 3, cfg.height, cfg.width) * 2 - 1

    def ours() -> Tensor:
        return sdpose.average_heatmaps(model, crops)

    torch.testing.assert_close(ours(), obvious(model, crops), rtol=1e-3, atol=1e-4)
    times = in_turns(pairs, lambda: obvious(model, crops), ours, clock=time.process_time)
    return f"{preset:<10}{f'{cfg.width}x{cfg.height}':>9}{against(times)}"


if __name__ == "__main__":
    args = bench_flags(__doc__, preset=["tiny", "wholebody"], side=128)
    print(f"torch {torch.__version__}, {args.threads} threads, with the flip test\n"
          f"preset         crop  obvious form       ours    ratio")
    for preset in args.preset:
        print(compare(preset, args.side, args.pairs), flush=True)
