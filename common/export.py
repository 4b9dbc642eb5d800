"""A model as one file that runs without this repository, ONNX or torch.export; and how many milliseconds it takes.

Of a method it takes `exported(model)`, an `Exported`. The formulas are what is exported (POSE_KERNELS=plain), in
float32 and from the CPU; the file is compared with the model, as it is used here, before it is kept.

    session = onnxruntime.InferenceSession("x.onnx");  session.get_modelmeta().custom_metadata_map    how to use it
    program = torch.export.load("x.pt2", extra_files=(about := {"about.json": ""}));  program.module()(images)
"""
from __future__ import annotations

import importlib.util
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.boxes import whole_image
from common.errors import UserError
from common.video import whole
from data import puppets

NEEDS = {".onnx": ("onnx", "onnxscript"), ".pt2": ()}
TOLERANCE = 1e-3           # difference from the model, relative to an output's largest number or 1; rounding makes 1e-6
ONNX_BYTES = 2_000_000_000                                                              # of one protobuf file
IMAGENET = "divided by 255, less (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225)"         # transforms.normalise
WARM_UP, ROUNDS, SECONDS = 2, 30, 60.0             # of --bench: rounds that do not count, that do at most, for how long
TRACED = 7                 # images when it is traced: a number that is the size of nothing else


class Exported(NamedTuple):
    """What of a model goes into a file, and what its user has to do."""
    run: Callable[..., dict[str, Tensor]]          # inputs → raw outputs, by the names that `forward` gives them
    inputs: Callable[[dict, bool], dict]           # (batch of `to_batch`, whether for a file) → what `run` takes, by name
    before: str = ""                               # from a picture to the inputs
    after: str = ""                                # from the outputs to pixels and scores
    refused: str = ""                              # why there can be no file


class Program(nn.Module):
    """`run` as the module that torch.export wants."""

    def __init__(self, model: nn.Module, run: Callable):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self.run(*inputs)


def check_target(path: Path) -> None:
    """Raises UserError for a file that could not, or must not, be written."""
    if path.suffix not in NEEDS:
        raise UserError(f"--export {path}: expected a file that ends in {' or '.join(NEEDS)}")
    if path.exists():
        raise UserError(f"--export {path} exists: choose another name, or remove it first")
    if not path.parent.is_dir():
        raise UserError(f"--export {path}: there is no folder {path.parent}")
    absent = [name for name in NEEDS[path.suffix] if not installed(name)]
    if absent:
        raise UserError(f"--export {path} needs {' and '.join(absent)}: pip install {' '.join(absent)}, or choose .pt2")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def batch_of(module: ModuleType, model: nn.Module, pictures: list[Image.Image]) -> dict:
    """What a method's `predict` takes; for top-down ones each picture is a person."""
    boxes = [[whole_image(picture.size) for picture in pictures]] if getattr(module, "TOP_DOWN", False) else []
    return module.to_batch(pictures, list(range(len(pictures))), model.cfg, *boxes)


def test_pictures(count: int) -> list[Image.Image]:
    """Drawn people, random pixels, drawn people, ..."""
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    kinds = puppets.restyle(0)[0].convert("RGB"), Image.fromarray(noise)
    return [kinds[i % 2] for i in range(count)]


@torch.no_grad()
def export(module: ModuleType, model: nn.Module, path: Path, source: str) -> None:
    """Write a model, after `fuse`, to path, which ends in .onnx or .pt2, and print how far the file is from it.

    Raises UserError when the method cannot be exported, or when the file does not compute what the model does.
    """
    check_target(path)
    model, method = model.cpu(), module.__name__
    form = module.exported(model)
    if form.refused:
        raise UserError(f"{method} cannot be exported: {form.refused}")
    size = sum(value.nbytes for value in model.state_dict().values())
    if path.suffix == ".onnx" and size > ONNX_BYTES:
        raise UserError(f"{source} has {size / 1e9:.1f} GB of weights, and ONNX at most 2 in one file: choose .pt2")
    program = Program(model, form.run).eval()
    cases = [form.inputs(batch_of(module, model, test_pictures(n)), True) for n in (1, 3)]
    expected = [program(*case.values()) for case in cases]
    traced = {name: x[:1].repeat_interleave(TRACED, 0) for name, x in cases[0].items()}
    shapes = [f"{name} (batch, {', '.join(map(str, x.shape[1:]))}) {str(x.dtype)[6:]}" for name, x in traced.items()]
    about = dict(method=method, checkpoint=source, keypoints=", ".join(model.skeleton.keypoints),
                 inputs="; ".join(shapes), outputs=", ".join(expected[0]), before=form.before, after=form.after)
    with whole(path) as part:
        with quiet(), plain_kernels():
            dynamic = tuple({0: torch.export.Dim("batch")} for _ in traced)
            graph = torch.export.export(program, tuple(traced.values()), dynamic_shapes=(dynamic,))
            runs = (save_onnx if path.suffix == ".onnx" else save_pt2)(graph, part, list(traced), list(expected[0]), about)
        compared = f"onnxruntime is not installed, so it was not compared with {method}"
        if runs:
            difference = max(relative(a, b) for case, wanted in zip(cases, expected)
                             for a, b in zip(runs(case), wanted.values(), strict=True))
            if not difference <= TOLERANCE:
                raise UserError(f"the exported {method} differs from the model by {difference:.1e}, more than "
                                f"{TOLERANCE:g}: nothing is kept")
            compared = f"largest difference from {method} on drawn and random pictures {difference:.1e}"
    print(f"{path}: {about['inputs']} -> {about['outputs']}; {path.stat().st_size / 1e6:.1f} MB; {compared}")


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def save_pt2(graph, path: Path, inputs: list[str], outputs: list[str], about: dict[str, str]) -> Callable:
    """Returns how to run the file."""
    with open(path, "wb") as file:
        torch.export.save(graph, file, extra_files={"about.json": json.dumps(about, indent=1)})
    with open(path, "rb") as file:
        program = torch.export.load(file).module()
    return lambda case: list(program(*case.values()).values())


def save_onnx(graph, path: Path, inputs: list[str], outputs: list[str], about: dict[str, str]) -> Callable | None:
    """Returns how to run the file, None where there is no ONNX Runtime."""
    program = torch.onnx.export(graph, dynamo=True, input_names=inputs, output_names=outputs, verbose=False)
    program.model.metadata_props.update(about)
    program.save(path, external_data=False)
    return onnx_session(path) if installed("onnxruntime") else None


def onnx_session(path: Path, cuda: bool = False) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """A file's outputs as a function of its inputs, run by ONNX Runtime. Raises UserError for what is no such file."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    names = [name for name in ("CUDAExecutionProvider",) * cuda if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[*names, "CPUExecutionProvider"])
    except Exception as error:                  # its own errors, without a common ancestor
        raise UserError(f"cannot run {path}: {error}") from None
    return lambda case: list(map(torch.from_numpy, session.run(None, {name: x.numpy() for name, x in case.items()})))


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Formulas instead of operators and fast forms that nobody else has."""
    before = os.environ.get("POSE_KERNELS")
    os.environ["POSE_KERNELS"] = "plain"
    try:
        yield
    finally:
        del os.environ["POSE_KERNELS"]
        os.environ.update({} if before is None else {"POSE_KERNELS": before})


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PyTorch's exporters tell their own developers."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


@torch.no_grad()
def bench(module: ModuleType, model: nn.Module, device: torch.device, many: int, file: str) -> str:
    """Median milliseconds of a batch of pictures of 640x480: from pictures to inputs, forward, and the rest of predict.

    With an .onnx file of the model also ONNX Runtime's, in turns with the model's on the same inputs.
    Raises UserError when the file, or ONNX Runtime, is missing.
    """
    if file and not Path(file).is_file():
        raise UserError(f"--bench {file}: there is no such file; --export {file} makes one")
    if file and not installed("onnxruntime"):
        raise UserError(f"--bench {file} needs onnxruntime: pip install onnxruntime")
    session = onnx_session(Path(file), device.type == "cuda") if file else None
    form = module.exported(model)
    pictures = [picture.resize((640, 480)) for picture in test_pictures(many)]
    times, end = [], time.perf_counter() + SECONDS

    def timed(name: str, work: Callable, *inputs) -> object:
        before = time.perf_counter()
        result = work(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times[-1][name] = 1000 * (time.perf_counter() - before)
        return result

    def to_device(inputs: dict) -> list:
        return [x.to(device) if isinstance(x, Tensor) else x for x in inputs.values()]

    while len(times) < WARM_UP + 3 or len(times) < WARM_UP + ROUNDS and time.perf_counter() < end:
        times.append({})
        batch = timed("loading", batch_of, module, model, pictures)
        inputs = to_device(form.inputs(batch, False))
        timed("forward", form.run, *inputs)
        timed("predict", module.predict, model, batch)
        if session:
            inputs = form.inputs(batch, True)
            timed("eager", form.run, *to_device(inputs))
            timed("onnx", session, inputs)
    loading, forward, predict, *pair = (statistics.median(row[name] for row in times[WARM_UP:]) for name in times[0])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    text = (f"{module.__name__}, batch {many}, {where}, medians of {len(times) - WARM_UP} rounds: loading {loading:.1f} ms, "
            f"forward {forward:.1f} ms, postprocessing {max(0.0, predict - forward):.1f} ms; "
            f"{1000 * many / (loading + predict):.1f} pictures a second")
    return text + (f"\n{file} in ONNX Runtime {pair[1]:.1f} ms, forward here in turns {pair[0]:.1f} ms" if session else "")
