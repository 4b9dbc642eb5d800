"""How much faster and smaller DiffusionRegPose's forward pass is here than as released, on equal weights and threads.

    python -m tests.bench_diffusionregpose [--pairs 7] [--threads 1]

The released form: a deformable attention that samples level by level with `grid_sample`, self-attention of the last
four layers under one mask over all G(K+1) tokens, MLPs over all tokens at once, and the backbone's norms apart from
its convolutions. It has torch's fused attention wherever that fits, so its figures are on the low side. Both forms do
one DDIM step, t = 999, on a picture of noise with the weights of the golden tests, and must agree. They run in turn;
the table has the median time of each and the median ratio of the pairs, and how far a process that runs one of them
alone grows above its loaded weights.
"""
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import diffusionregpose as drp
from kernels.bench import published_deform_attn
from tests.helpers import against, bench_flags, in_turns, normal
from tests.test_diffusionregpose import official_model

HEIGHT, WIDTH = 480, 640
SEED = 4                   # of a picture whose 900 cells and 100 boxes are chosen by a margin of 1e-3, not by rounding


def deform_attn_as_released(value: Tensor, shapes: list, reference: Tensor, offsets: Tensor, logits: Tensor,
                            points: list) -> Tensor:
    """Weights and locations of all points, then `grid_sample`; arguments as kernels.deform_attn_offsets."""
    level = torch.arange(len(shapes)).repeat_interleave(torch.tensor(points))
    reference = reference[:, :, None, level]                                            # (B, Q, 1, L·P, 2 or 4)
    if reference.shape[-1] == 2:
        locations = reference + offsets / torch.tensor(shapes).flip(1)[level]
    else:
        locations = reference[..., :2] + offsets / points[0] * reference[..., 2:] * 0.5
    return published_deform_attn(value, shapes, locations, logits.softmax(-1), points)


def form(released: bool, folder: Path) -> Callable[[], dict]:
    """One of the two, ready to run; `save_weights` has filled the folder."""
    model = torch.load(folder / f"{released}.pt", weights_only=False)
    image, noise = normal("input", (1, 3, HEIGHT, WIDTH), SEED), normal("noise", (1, 100, 17, 2), SEED)

    def ours() -> dict:
        return drp.sample(model, image, noise=noise)[-1]

    def as_released() -> dict:
        with (mock.patch.object(drp, "deform_attn_offsets", deform_attn_as_released),
              mock.patch.dict(os.environ, POSE_KERNELS="plain")):
            return ours()

    return as_released if released else ours


def save_weights(folder: Path) -> None:
    model = official_model()
    torch.save(model, folder / "True.pt")
    torch.save(drp.fuse(model), folder / "False.pt")


def peak_memory(released: bool, folder: Path, threads: int) -> float:
    """Megabytes that one forward adds to the largest size that this process had before."""
    import resource                                             # Windows has none
    torch.set_num_threads(threads)
    run_form, sizes = form(released, folder), []
    for run in (lambda: None, run_form):
        run()
        sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return (sizes[1] - sizes[0]) / (1e6 if sys.platform == "darwin" else 1e6 / 1024)    # bytes; elsewhere KiB


def alone(function, *args):
    """The function's result, from a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *args).result()


def compare_times(folder: Path, pairs: int) -> str:
    """Milliseconds of the released form and of ours, and their ratio; the outputs agree first."""
    released, ours = form(True, folder), form(False, folder)
    expected, result = released(), ours()
    for name in ("logits", "boxes", "keypoints"):
        torch.testing.assert_close(result[name], expected[name], rtol=0, atol=1e-4)
    return against(in_turns(pairs, released, ours))


def main() -> None:
    args = bench_flags(__doc__)
    print(f"torch {torch.__version__}, {args.threads} threads, r50, {WIDTH}x{HEIGHT}, batch 1, t = 999\n"
          f"            as released         ours    ratio")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        alone(save_weights, folder)
        # memory first: a process counts the size of its parent as its own, and this one is still small
        if sys.platform != "win32":
            slow, fast = (alone(peak_memory, released, folder, args.threads) for released in (True, False))
            print(f"memory{slow:>14.0f} MB{fast:>10.0f} MB{slow / fast:>9.2f}", flush=True)
        print(f"time  {compare_times(folder, args.pairs)}")


if __name__ == "__main__":
    main()
