"""What several tests and benchmarks need: the golden files, the reference's weights and inputs, comparisons, small runs."""
import argparse
import importlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = Path(os.environ.get("POSE_REFERENCE") or GOLDEN)
TOO_LARGE = ("metrics/*",                       # real annotations, not ours to ship
             "sdpose/golden_full*", "sdpose/golden_head_wholebody*", "sdpose/golden_sample.safetensors")
NEEDS_REFERENCE = "set POSE_REFERENCE to a folder with "


def golden(*patterns: str, quick: str = "*"):
    """Run a test, whose argument is `file`, once for every golden file of these kinds, e.g. "detrpose/golden_heads_*.npz".

    Without any the test fails; only what is too large for this repository is skipped. A file whose name does not match
    `quick` is for  pytest -m slow.
    """
    files = [pytest.param(file, marks=[] if fnmatch(file.name, quick) else pytest.mark.slow, id=file.stem)
             for pattern in patterns for file in sorted(REFERENCE.glob(pattern))]
    return pytest.mark.parametrize("file", files or [pytest.param(missing(patterns[0]), id="none")], indirect=True)


def missing(pattern: str) -> str:
    """Why there is no file of a kind, for the fixture `file`."""
    left_out = REFERENCE == GOLDEN and any(fnmatch(pattern, one) for one in TOO_LARGE)
    return f"skip: {NEEDS_REFERENCE}{pattern}" if left_out else f"no {pattern} in {REFERENCE}"


def reference(path: str) -> Path:
    """One file of the reference; the test fails where it should be and is not, and is skipped where it is too large."""
    if not (REFERENCE / path).exists():
        why = missing(path)
        pytest.skip(why[6:]) if why.startswith("skip: ") else pytest.fail(why)
    return REFERENCE / path


def required(package: str):
    """A package of requirements-dev.txt. Where it is missing the module's tests are skipped, in CI they fail."""
    if os.environ.get("CI"):
        return importlib.import_module(package)
    return pytest.importorskip(package, reason=f"{package} is missing: pip install -r requirements-dev.txt")


# ---------------------------------------------------------------- the reference's weights and inputs

def normal(key: str, shape, seed: int = 0) -> torch.Tensor:
    """The reference's standard-normal array, fixed by (seed, key)."""
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()))
    return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))


def fill(key: str, shape, seed: int) -> torch.Tensor:
    """The reference's weights for a tensor of this name."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(tuple(shape), dtype=torch.int64)
    n = normal(key, shape, seed)
    if key.endswith("running_var"):
        return 1 + 0.2 * n.tanh()
    if key.endswith(("running_mean", "bias")):
        return 0.05 * n
    if len(shape) <= 1:
        return 1 + 0.1 * n
    return n / math.sqrt(math.prod(shape[1:]))


def read_case(file: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the meta of a golden file."""
    arrays = dict(np.load(file))
    return arrays, json.loads(str(arrays.pop("meta", "{}")))


# ---------------------------------------------------------------- comparisons

def close(ours, theirs, tolerance: float, what: str = ""):
    """Largest difference, relative to the largest number or 1: rounding grows with the numbers that are added up."""
    ours, theirs = (torch.as_tensor(x).detach().cpu().double() for x in (ours, theirs))
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    finite = theirs.isfinite()
    assert (ours[~finite] == theirs[~finite]).all(), f"{what}: other numbers are not finite"
    if finite.any():
        error = ((ours - theirs)[finite].abs().max() / theirs[finite].abs().max().clamp(min=1)).item()
        assert error <= tolerance, f"{what}: error {error:.2e}"


LOOSE = {"seconds", "images_a_second", "memory"}               # fields of a log row that no two runs share


def assert_equal(a, b, where=""):
    """The same structure with the same bits, but for what a run cost."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        [assert_equal(a[key], b[key], f"{where}.{key}") for key in a.keys() - LOOSE]
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        [assert_equal(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b))]
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@contextmanager
def watch(**modules: nn.Module):
    """Lists of (arguments, result) of each call of the named modules."""
    seen, hooks = {name: [] for name in modules}, []
    for name, module in modules.items():
        hooks.append(module.register_forward_hook(lambda m, args, out, name=name: seen[name].append((args, out))))
    yield seen
    for hook in hooks:
        hook.remove()


# ---------------------------------------------------------------- small runs

TINY = ("--size 64 --levels 1 --dim 32 --layers 1 --decoder_ffn 32 --encoder_ffn 32 --queries 5 --dn_queries 2 "
        "--processes 1 --workers 0 --eval_every 1").split()      # DETRPose: a step takes a few hundredths of a second


# ---------------------------------------------------------------- benchmarks

def bench_flags(what: str, **defaults) -> argparse.Namespace:
    """The flags of a benchmark, `what` its docstring: --pairs, --threads and these. Sets the threads and the seed."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (dict(pairs=7, threads=torch.get_num_threads()) | defaults).items():
        several = isinstance(default, list)
        kind = type(default[0] if several else default)
        parser.add_argument(f"--{name}", type=kind, default=default, nargs="+" if several else None, help=f"default: {default}")
    args = parser.parse_args()
    if isinstance(args.threads, int):
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return args


def in_turns(pairs: int, *forms: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> np.ndarray:
    """Seconds of each form, run in turn so that a busy machine slows all: (pairs, forms)."""
    times = np.empty((pairs, len(forms)))
    for row in times:
        for i, form in enumerate(forms):
            start = clock()
            form()
            row[i] = clock() - start
    return times


def against(times: np.ndarray) -> str:
    """Of the seconds of two forms the medians and the median ratio of the pairs, as the end of a row."""
    slow, fast = np.median(times, 0) * 1e3
    return f"{slow:>14.0f} ms{fast:>10.0f} ms{np.median(times[:, 0] / times[:, 1]):>9.2f}"


# ---------------------------------------------------------------- a small video

TIMES = [0.0, 0.04, 0.08, 0.2, 0.24, 0.5]                # a variable rate; the last frame is shown for 0.1 s
SIZE = (64, 48)


def frame(i: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """Gray by its number, with a white corner at the top left."""
    picture = Image.new("RGB", size, (40 * i,) * 3)
    picture.paste((255, 255, 255), (0, 0, size[0] // 4, size[1] // 4))
    return picture


def encode(path: Path, sound: bool = False, times: list[float] = TIMES) -> Path:
    import av
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx" if path.suffix == ".webm" else "libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        tone = file.add_stream("aac", rate=8000) if sound else None
        if tone:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            samples.sample_rate = 8000
            file.mux(tone.encode(samples))
            file.mux(tone.encode(None))
        for i, shown in enumerate(times):
            one = av.VideoFrame.from_image(frame(i % 6))
            one.pts, one.time_base = round(1000 * shown), Fraction(1, 1000)
            file.mux(stream.encode(one))
        file.mux(stream.encode(None))
    return path
