"""A model as one file that runs without this repository, ONNX or torch.export; and its milliseconds.

A method says with `exported(model)` what is written. The file holds the formulas (POSE_KERNELS=plain) in
float32, and how to use it. It is compared with the model, as that runs here, before it is kept.

    onnxruntime.InferenceSession("x.onnx").get_modelmeta().custom_metadata_map
    about = {"about.json": ""};  torch.export.load("x.pt2", extra_files=about).module()(images)
"""
from __future__ import annotations

import importlib.util
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.boxes import whole_image
from common.errors import UserError
from common.records import whole
from data import puppets

NEEDS = {".onnx": ("onnx", "onnxscript"), ".pt2": ()}
TOLERANCE = 1e-3           # of the difference from the model, relative to an output's largest number or 1
SHAKE = 1e-6               # noise on the inputs, to see how many numbers rounding alone moves by more than that:
                           # where scores are nearly equal it swaps the queries that are chosen
ONNX_BYTES = 2e9           # a protobuf file holds no more
TRACED = 7                 # images when it is traced: a number that is the size of nothing else
WARM_UP, ROUNDS, SECONDS = 2, 30, 60.0     # of --bench: rounds that do not count, most that do, and how long
# what is done before where a method keeps the aspect ratio: RESIZED.format(short side, long side)
RESIZED = ("images: RGB, resized (Pillow's bilinear filter) so that the shorter side is {0}, or less where the "
           "longer would exceed {1}; divided by 255, less (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225); "
           "zeros added at the right and bottom. ")


class Exported(NamedTuple):
    """What of a model goes into a file, and what its user has to do."""
    run: Callable[..., dict[str, Tensor]]      # inputs → raw outputs, by the names that `forward` gives them
    inputs: Callable[[dict], dict]             # what `to_batch` gives → what `run` takes, by name
    before: str = ""                           # from a picture to the inputs
    after: str = ""                            # from the outputs to pixels and scores
    refused: str = ""                          # why there can be no file


class Program(nn.Module):
    """`run` as the module that torch.export wants."""

    def __init__(self, model: nn.Module, run: Callable):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self.run(*inputs)


def check_target(path: Path) -> None:
    """Raises UserError for a file that cannot, or must not, be written."""
    if path.suffix not in NEEDS:
        raise UserError(f"--export {path}: expected a file that ends in {' or '.join(NEEDS)}")
    if path.exists():
        raise UserError(f"--export {path} exists: choose another name, or remove it first")
    if not path.parent.is_dir():
        raise UserError(f"--export {path}: there is no folder {path.parent}")
    if absent := [name for name in NEEDS[path.suffix] if not installed(name)]:
        raise UserError(f"--export {path} needs more: pip install {' '.join(absent)}, or choose .pt2")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def batch_of(module: ModuleType, model: nn.Module, pictures: list[Image.Image]) -> dict:
    """What a method's `predict` takes; for top-down ones each picture is a person."""
    boxes = [[whole_image(one.size) for one in pictures]] if getattr(module, "TOP_DOWN", False) else []
    return module.to_batch(pictures, list(range(len(pictures))), model.cfg, *boxes)


def drawn_and_random(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    kinds = puppets.restyle(0)[0].convert("RGB"), Image.fromarray(noise)
    return [kinds[i % 2] for i in range(count)]


def file_inputs(module: ModuleType, model: nn.Module, form: Exported, count: int) -> dict[str, Tensor]:
    """Inputs of one size for all pictures: as wide as the widest and as high as the highest makes them."""
    widest, highest = (Image.new("RGB", size) for size in ((1000, 10), (10, 1000)))
    batch = batch_of(module, model, [*drawn_and_random(count), widest, highest])
    return {name: x[:count] for name, x in form.inputs(batch).items()}


@torch.no_grad()
def export(module: ModuleType, model: nn.Module, path: Path, source: str) -> None:
    """Write a model, after `fuse`, to path (.onnx or .pt2), and print how far the file is from the model.

    Raises UserError when the method cannot be exported, or when the file computes something else.
    """
    check_target(path)
    model, method = model.cpu(), module.__name__
    form = module.exported(model)
    if form.refused:
        raise UserError(f"{method} cannot be exported: {form.refused}")
    size = sum(value.nbytes for value in model.state_dict().values())
    if path.suffix == ".onnx" and size > ONNX_BYTES:
        raise UserError(f"{source} has {size / 1e9:.1f} GB of weights, an ONNX file holds 2: choose .pt2")
    program = Program(model, form.run).eval()
    cases = [file_inputs(module, model, form, count) for count in (1, 3)]
    outputs = list(program(*cases[0].values()))
    shapes = [f"{name} (batch, {', '.join(map(str, x.shape[1:]))}) {str(x.dtype).removeprefix('torch.')}"
              for name, x in cases[0].items()]
    about = dict(method=method, checkpoint=source, keypoints=", ".join(model.skeleton.keypoints),
                 before=form.before, inputs="; ".join(shapes), outputs=", ".join(outputs), after=form.after)
    with whole(path) as part:
        with quiet():
            save = save_onnx if path.suffix == ".onnx" else save_pt2
            runs = save(graph_of(program, *cases[0].values()), part, list(cases[0]), outputs, about)
        compared = compare(program, runs, cases, method) if runs else (
            "not compared, because onnxruntime is not installed")
    print(f"{path}: {about['inputs']} -> {about['outputs']}; {path.stat().st_size / 1e6:.1f} MB; {compared}")


def compare(program: Program, runs: Callable, cases: list[dict[str, Tensor]], method: str) -> str:
    """How far a file, as `runs` runs it, is from the model. Raises UserError where that is more than rounding."""
    expected = [program(*case.values()) for case in cases]
    shaken = [program(*(x + SHAKE * torch.randn_like(x) if x.is_floating_point() else x for x in case.values()))
              for case in cases]
    largest, share = difference([runs(case) for case in cases], expected)
    _, own = difference([list(one.values()) for one in shaken], expected)
    if not share <= 2 * own:
        raise UserError(f"the exported {method} differs from the model by {largest:.1e}, and {share:.1%} of the "
                        f"numbers by more than {TOLERANCE:g}, where noise of {SHAKE:g} on the inputs moves "
                        f"{own:.1%}: nothing is kept")
    return f"largest difference from {method} on drawn and random pictures {largest:.1e}" + bool(share) * (
        f" ({share:.1%} of the numbers above {TOLERANCE:g}: of queries with nearly equal scores "
        f"rounding chooses others; noise of {SHAKE:g} on the inputs moves {own:.1%})")


def graph_of(program: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    """What a module computes, in formulas, at any batch."""
    inputs = tuple(x[:1].repeat_interleave(TRACED, 0) for x in inputs)
    dynamic = tuple({0: torch.export.Dim("batch")} for _ in inputs)
    with patch.dict(os.environ, POSE_KERNELS="plain"):
        return torch.export.export(program, inputs, dynamic_shapes=(dynamic,))


def difference(ours: list[list[Tensor]], expected: list[dict[str, Tensor]]) -> tuple[float, float]:
    """The largest difference, relative to an output's largest number or 1; the share above TOLERANCE, NaN among them."""
    each = torch.cat([((a - b).abs() / b.abs().max().clamp(min=1)).flatten() for ones, wanted in zip(ours, expected)
                      for a, b in zip(ones, wanted.values(), strict=True)])
    return each.max().item(), (~(each <= TOLERANCE)).double().mean().item()


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
    return open_onnx(path) if installed("onnxruntime") else None


def open_onnx(path: Path, device: str = "CPU") -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """ONNX Runtime as a function from a file's inputs to its outputs.

    Raises UserError, then or when it is called, for what is no ONNX file or no file of these inputs.
    """
    import onnxruntime
    options, here = onnxruntime.SessionOptions(), onnxruntime.get_available_providers()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = [f"{kind}ExecutionProvider" for kind in dict.fromkeys((device.upper(), "CPU"))]

    def checked(work: Callable, *arguments):
        try:
            return work(*arguments)
        except Exception as error:                      # its own errors have no common class
            raise UserError(f"cannot run {path}: {error}") from None

    session = checked(onnxruntime.InferenceSession, path, options, [one for one in providers if one in here])
    return lambda case: [torch.from_numpy(x) for x in checked(
        session.run, None, {name: value.numpy() for name, value in case.items()})]


def quiet() -> ExitStack:
    """Without what PyTorch's exporters tell their own developers."""
    stack = ExitStack()
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    stack.callback(logging.disable, logging.NOTSET)
    return stack


def timed(device: torch.device, work: Callable, *inputs) -> tuple[Any, float]:
    """What `work` gives, and its milliseconds."""
    start = time.perf_counter()
    result = work(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, 1000 * (time.perf_counter() - start)


@torch.no_grad()
def bench(module: ModuleType, model: nn.Module, device: torch.device, many: int, file: str) -> str:
    """Median milliseconds of a batch of pictures of 640x480: to inputs, forward, and the rest of `predict`.

    With the model's .onnx file also ONNX Runtime's, in turns with the model's on the same inputs.
    Raises UserError when the file, or ONNX Runtime, is missing.
    """
    if file and not Path(file).is_file():
        raise UserError(f"--bench {file}: there is no such file; --export {file} makes one")
    if file and not installed("onnxruntime"):
        raise UserError(f"--bench {file} needs onnxruntime: pip install onnxruntime")
    session, form = open_onnx(Path(file), device.type) if file else None, module.exported(model)
    pictures = [picture.resize((640, 480)) for picture in drawn_and_random(many)]
    same = file_inputs(module, model, form, many) if file else {}
    rounds, end = [], time.perf_counter() + SECONDS

    def forward(inputs: dict) -> float:
        on_device = [x.to(device) if isinstance(x, Tensor) else x for x in inputs.values()]
        return timed(device, form.run, *on_device)[1]

    while len(rounds) < WARM_UP + 3 or len(rounds) < WARM_UP + ROUNDS and time.perf_counter() < end:
        batch, loading = timed(device, batch_of, module, model, pictures)
        row = dict(loading=loading, forward=forward(form.inputs(batch)),
                   predict=timed(device, module.predict, model, batch)[1])
        if session:
            row |= dict(eager=forward(same), onnx=timed(device, session, same)[1])
        rounds.append(row)
    ms = {name: statistics.median(row[name] for row in rounds[WARM_UP:]) for name in rounds[0]}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    line = (f"{module.__name__}, batch {many}, {where}, medians of {len(rounds) - WARM_UP} rounds: "
            f"loading {ms['loading']:.1f} ms, forward {ms['forward']:.1f} ms, "
            f"postprocessing {max(0.0, ms['predict'] - ms['forward']):.1f} ms")
    if session:
        line += f"\n{file}: ONNX Runtime {ms['onnx']:.1f} ms, in turns with forward {ms['eager']:.1f} ms"
    return line
