"""Deformable attention: both PyTorch forms against golden numbers and an oracle, the kernels against them.

Tests named test_kernel_… run the Triton kernels: on the GPU where there is one, else on the CPU in Triton's
interpreter, in a process of its own (`test_the_kernels_pass_in_tritons_interpreter`), because the interpreter
has to be chosen before Triton is imported.
"""
import ast
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import bench, deform_attn as msda, deform_attn_cpu, dispatch
from kernels.deform_attn import deform_attn, deform_attn_offsets, deform_attn_plain
from tests.helpers import REFERENCE

ROOT = Path(__file__).parents[1]
GOLDEN = sorted((REFERENCE / "kernels").glob("golden_msda_*.npz"))
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HERE = CUDA or dispatch.interpreting()
kernel = pytest.mark.skipif(not HERE, reason="needs a GPU, or Triton's interpreter")
SLOW = [] if CUDA else [pytest.mark.slow]            # marks of cases that are seconds in the interpreter

# shapes, points, B, Q, M, d: levels of one pixel, row or column; one to four levels; unequal points; odd d
SIZES = [([(1, 1)], [1], 1, 1, 1, 1), ([(1, 7), (5, 1)], [2, 2], 2, 3, 3, 5),
         ([(6, 5), (3, 4), (2, 1)], [3, 6, 3], 1, 17, 3, 16), ([(4, 6)], [4], 2, 35, 1, 24),
         ([(8, 8), (4, 4)], [6, 6], 1, 9, 2, 48), ([(5, 4), (3, 3), (2, 2), (1, 1)], [1] * 4, 1, 33, 2, 32),
         ([(4, 3)], [2], 1, 5, 1, 64), ([(4, 3)], [2], 1, 3, 2, 130)]


def inputs(shapes, points, batch, queries, heads, dim, dtype=torch.float32, device="cpu"):
    """value, shapes, locations, weights, points; no pixel coordinate is closer than 0.02 to an integer."""
    size = torch.tensor([(w, h) for (h, w), n in zip(shapes, points) for _ in range(n)])
    pixel = torch.rand(batch, queries, heads, len(size), 2) * (size + 2) - 1.5
    pixel = pixel.floor() + (pixel - pixel.floor()).clamp(0.02, 0.98)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, dim)
    weights = torch.randn(pixel.shape[:-1]).softmax(-1)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = value.to(device, dtype), ((pixel + 0.5) / size).to(device, kind), weights.to(device, dtype)
    value, locations, weights = (x.requires_grad_() for x in tensors)
    return value, shapes, locations, weights, points


def oracle(value, shapes, locations, weights, points):
    """Eq. 3 over all pixels of a level: every pixel counts with the product of its two tents."""
    out, start = 0, 0
    for (height, width), xy, weight in zip(shapes, locations.split(points, 3), weights.split(points, 3)):
        level = value[:, start:start + height * width].unflatten(1, (height, width))
        tent_x = (1 - (xy[..., :1] * width - 0.5 - torch.arange(width)).abs()).clamp(min=0)
        tent_y = (1 - (xy[..., 1:] * height - 0.5 - torch.arange(height)).abs()).clamp(min=0)
        out = out + torch.einsum("bqmp,bqmpy,bqmpx,byxmd->bqmd", weight, tent_y, tent_x, level)
        start += height * width
    return out.flatten(2)


def results(form, arguments):
    """out and the gradients of the tensors among the arguments, for a fixed upstream gradient."""
    return bench.gradients(form, arguments)


def exact(arguments):
    """The same numbers in float64 on the CPU."""
    tensors = lambda x: isinstance(x, torch.Tensor)
    return [x.detach().cpu().double().requires_grad_() if tensors(x) else x for x in arguments]


def assert_close(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        mine, other = mine.cpu().double(), other.cpu().double()
        assert (mine - other).norm() <= tolerance * other.norm() + 1e-12


@pytest.fixture(params=["plain", "torch"])
def form(request, monkeypatch):
    """`deform_attn` made to take one of its two PyTorch forms, the formula or the CPU form, whatever the sizes."""
    monkeypatch.setenv("POSE_KERNELS", request.param)
    monkeypatch.setattr(msda, "plain_is_faster", lambda value, locations: False)
    return request.param


# ----------------------------------------------------------------------------- golden numbers and the oracle


def golden(path: Path, dtype, device="cpu"):
    """(function, its tensors, {result: golden}) of a stored case, see golden.md beside the files."""
    z = np.load(path)
    meta = json.loads(str(z["meta"]))
    batch, heads, dim, shapes, points = (meta[key] for key in ("batch", "heads", "head_dim", "shapes", "points"))

    def normal(key, *shape):
        random = np.random.RandomState(zlib.crc32(f"{meta['seed']}:{key}".encode()))
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32)).to(device, dtype)

    value = normal("value", batch, sum(h * w for h, w in shapes), heads, dim)
    grad = normal("grad_output", batch, meta["queries"], heads, dim).flatten(2)
    names = ["locations", "weights"] if meta["form"] == "location" else ["reference", "offsets", "logits"]
    tensors = [value, *(torch.from_numpy(z[f"in_{name}"]).to(device, dtype) for name in names)]
    tensors = [x.requires_grad_() for x in tensors]
    padded = torch.from_numpy(z["padding_mask"]).to(device)[..., None, None] if meta["padding"] else None

    def function(value, *rest):
        value = value if padded is None else value.masked_fill(padded, 0)
        return (deform_attn if len(rest) == 2 else deform_attn_offsets)(value, shapes, *rest, points)

    return function, tensors, grad, ["out", "d_value", *(f"d_{name}" for name in names)], z, meta


def assert_golden(path, dtype, tolerance, device="cpu"):
    function, tensors, grad, names, z, meta = golden(path, dtype, device)
    for name, result in zip(names, bench.gradients(function, tuple(tensors), grad), strict=True):
        result, expected = result.cpu(), torch.from_numpy(z[name])
        if name == "d_locations" and "kink" in z:                       # the slope at exactly -1 is a convention
            keep = torch.from_numpy(~z["kink"])[..., None].expand(result.shape)
            result, expected = result[keep], expected[keep]
        result, expected = result.reshape(-1)[::meta.get("stride", {}).get(name, 1)], expected.reshape(-1)
        assert result.isfinite().all(), name
        assert (result.double() - expected).abs().max() <= tolerance * expected.abs().max(), name


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem.removeprefix("golden_msda_"))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
def test_every_golden_case_is_met_by_both_pytorch_forms(path, dtype, tolerance, form):
    assert_golden(path, dtype, tolerance)


def test_there_are_golden_cases():
    assert len(GOLDEN) >= 13


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_pytorch_forms_equal_the_sum_over_all_pixels(size, form):
    arguments = inputs(*size, dtype=torch.float64)
    assert_close(results(deform_attn, arguments), results(oracle, arguments), 1e-12)


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_gradients_of_both_pytorch_forms_are_those_of_finite_differences(size, form):
    value, shapes, locations, weights, points = inputs(*size[:3], 3, 2, 3, dtype=torch.float64)
    function = lambda v, x, w: deform_attn(v, shapes, x, w, points)
    assert torch.autograd.gradcheck(function, (value, locations, weights))


def test_a_block_of_queries_and_a_chunk_of_rows_may_end_anywhere(monkeypatch, form):
    arguments = inputs([(6, 5), (3, 4)], [3, 3], 2, 13, 2, 4, dtype=torch.float64)
    monkeypatch.setattr(deform_attn_cpu, "BLOCK", 60)                              # 5 queries: blocks cross the images
    monkeypatch.setattr(deform_attn_cpu, "CHUNK", 7)
    assert_close(results(deform_attn, arguments), results(oracle, arguments), 1e-12)


def test_levels_and_points_may_be_two_axes(form):
    value, shapes, locations, weights, points = inputs([(6, 5), (3, 4)], [3, 3], 2, 5, 2, 4)
    two = deform_attn(value, shapes, locations.unflatten(3, (2, 3)), weights.unflatten(3, (2, 3)))
    assert torch.equal(two, deform_attn(value, shapes, locations, weights, points))


def test_offsets_are_pixels_of_the_level_or_half_boxes(form):
    value, shapes, _, weights, _ = inputs([(4, 8)], [1], 1, 1, 1, 2, dtype=torch.float64)
    offset = torch.tensor([2.0, -1.0]).view(1, 1, 1, 1, 2)
    point, box = torch.tensor([[[[0.4, 0.6]]]]), torch.tensor([[[[0.4, 0.6, 0.1, 0.2]]]])
    for reference, x, y in ((point, 0.4 + 2 / 8, 0.6 - 1 / 4), (box, 0.4 + 2 * 0.1 / 2, 0.6 - 0.2 / 2)):
        there = torch.tensor([x, y], dtype=torch.float64).view(1, 1, 1, 1, 2)
        expected = deform_attn(value, shapes, there, torch.ones_like(weights))
        ours = deform_attn_offsets(value, shapes, reference, offset, weights)
        assert torch.allclose(ours, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"reference must be \(B, Q, 1 or 1, 2 or 4\)"):
        deform_attn_offsets(value, shapes, point[..., :1], offset, weights)


# ----------------------------------------------------------------------------- kernels on a GPU or interpreted


@kernel
@pytest.mark.parametrize("size", [pytest.param(size, marks=SLOW if size[5] > 30 else []) for size in SIZES], ids=str)
def test_kernel_equals_the_plain_form(size):
    arguments = inputs(*size, device=DEVICE)
    assert_close(results(deform_attn, arguments), results(deform_attn_plain, exact(arguments)), 1e-5)


@kernel
@pytest.mark.parametrize("size", [*SIZES[:2], pytest.param(SIZES[2], marks=SLOW)], ids=str)
def test_kernel_written_naively_equals_the_plain_form(size):
    arguments = inputs(*size, device=DEVICE)
    assert_close([msda.deform_attn_naive(*arguments)], [deform_attn_plain(*exact(arguments))], 1e-5)


@kernel
@pytest.mark.parametrize("size, dtype, tolerance", [
    pytest.param(SIZES[4], torch.bfloat16, 1e-2, marks=SLOW), (SIZES[3], torch.bfloat16, 1e-2),
    pytest.param(SIZES[2], torch.float16, 2e-3, marks=SLOW)], ids=str)
def test_kernel_in_16_bits_is_as_exact_as_its_inputs(size, dtype, tolerance):
    arguments = inputs(*size, dtype=dtype, device=DEVICE)
    ours = results(deform_attn, arguments)
    assert [x.dtype for x in ours] == [dtype, dtype, torch.float32, dtype]
    assert_close(ours, results(deform_attn_plain, exact(arguments)), tolerance)


def for_kernels(path: Path) -> bool:
    """All golden cases on a GPU; the interpreter is slow, so there the small ones with locations."""
    return CUDA or path.stat().st_size < 50_000 and "in_locations" in np.load(path).files


@kernel
@pytest.mark.parametrize("path", list(filter(for_kernels, GOLDEN)), ids=lambda path: path.stem)
def test_kernel_meets_golden_cases(path):
    assert_golden(path, torch.float32, 1e-5, DEVICE)


@kernel
def test_kernel_adds_up_all_gradients_of_one_pixel():
    value, shapes, locations, weights, points = inputs([(3, 3)], [4], 1, 40, 1, 16, device=DEVICE)
    with torch.no_grad():
        locations.fill_(0.5).add_(1e-3)
    arguments = value, shapes, locations, weights, points
    assert_close(results(deform_attn, arguments), results(deform_attn_plain, exact(arguments)), 1e-5)


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_is_deterministic_when_torch_is_asked_to_be(dtype):
    arguments = inputs([(3, 3), (2, 1)], [2, 1], 1, 19, 1, 16, dtype=dtype, device=DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = results(deform_attn, arguments), results(deform_attn, arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close(first, results(deform_attn_plain, exact(arguments)), tolerance)


@kernel
def test_kernel_takes_tensors_that_are_not_contiguous():
    value, shapes, locations, weights, points = inputs([(4, 5)], [3], 2, 7, 1, 8, device=DEVICE)
    strange = [torch.stack([x, x], -1).detach()[..., 0].requires_grad_() for x in (value, locations, weights)]
    assert not any(x.is_contiguous() for x in strange)
    strange = strange[0], shapes, *strange[1:], points
    grad = torch.randn(2, 8, 7, device=DEVICE).transpose(1, 2)
    plain = bench.gradients(deform_attn, (value, shapes, locations, weights, points), grad.contiguous())
    assert_close(bench.gradients(deform_attn, strange, grad), plain, 1e-6)


@kernel
def test_kernel_of_no_queries_gives_nothing_and_zero_gradients():
    value, shapes, locations, weights, points = inputs([(4, 5)], [3], 2, 0, 2, 8, device=DEVICE)
    out, d_value, *_ = results(deform_attn, (value, shapes, locations, weights, points))
    assert out.shape == (2, 0, 16) and torch.equal(d_value, torch.zeros_like(value))


@pytest.mark.skipif(not CUDA, reason="needs a GPU with 24 GB")
def test_kernel_indexes_more_than_two_to_the_31_numbers():
    if torch.cuda.mem_get_info()[0] < 24 * 2 ** 30:
        pytest.skip("needs 24 GB of free GPU memory")
    value = torch.zeros(5, 2 ** 20, 8, 64, dtype=torch.bfloat16, device=DEVICE)             # 2.7e9 numbers
    value[-1].normal_()
    locations, weights = torch.rand(5, 64, 8, 4, 2, device=DEVICE), torch.rand(5, 64, 8, 4, device=DEVICE)
    shapes = [(1024, 1024)]
    out = deform_attn(value, shapes, locations, weights)
    assert (out[:-1] == 0).all()
    assert_close([out[-1:]], [deform_attn_plain(value[-1:], shapes, locations[-1:], weights[-1:])], 1e-2)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_kernel_needs_no_memory_but_its_results():
    arguments = inputs([(80, 80), (40, 40)], [4, 4], 2, 1000, 8, 32, device=DEVICE)
    expected = 4 * (2 * 1000 * 256 + 2 * sum(x.numel() for x in bench.leaves(arguments)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(deform_attn, arguments)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * expected


def passed(report: str) -> int:
    """How many tests passed, from the last line of pytest."""
    return int(re.search(r"(\d+) passed", report)[1])


@pytest.mark.skipif(HERE or not dispatch.HAS_TRITON, reason="the kernels are tested right here, or not at all")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_pass_in_tritons_interpreter(which):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "POSE_KERNELS": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_kernel_", "-m", which, "-n0"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-4000:]
    assert passed(run.stdout) >= {"not slow": 12, "slow": 6}[which], run.stdout[-4000:]


COMPILE = """
import json, sys
from kernels import bench
builds = [build for build in bench.deform_attn_builds() if sys.argv[1] in build.name]
rows = [bench.compile_build(build, 90) for build in builds]
rows += [bench.compile_build(build, 80) for build in builds if " 64 bf16" in build.name]
print(json.dumps(rows))
"""


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("kind, many", [("bf16", 8 + 2), pytest.param("", 24 + 2, marks=pytest.mark.slow)])
def test_the_kernels_compile_for_two_gpus_without_spilling_a_register(kind, many):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, kind]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = json.loads(run.stdout)
    instructions = {row["build"]: row["per_sample"] for row in rows if row["sm"] == 90}
    rows = [row for row in rows if row["build"].startswith(("forward", "backward"))]
    assert len(rows) == many
    for row in rows:
        assert row["spilled"] == 0 and row["shared"] == 0 and row["registers"] <= 255, row
        assert row["widest"] >= (128 if "forward" in row["build"] else 64), row           # loads are vectors
        assert ("RED" in str(row["loop"])) == row["build"].startswith("backward"), row
    assert instructions["forward d 32 bf16"] < 20 and instructions["backward d 32 bf16"] < 40
    assert kind or instructions["naive d 32 fp32"] > 5 * instructions["forward d 32 fp32"]


# ----------------------------------------------------------------------------- types, memory, system


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_both_pytorch_forms_take_16_bits_and_give_them_back(dtype, tolerance, form):
    arguments = inputs(*SIZES[2], dtype=dtype)
    ours = results(deform_attn, arguments)
    assert [x.dtype for x in ours] == [dtype, dtype, torch.float32, dtype]
    assert_close(ours, results(deform_attn_plain, exact(arguments)), tolerance)


def test_under_autocast_the_projections_are_16_bits_and_locations_are_not(form):
    project, where, amount = nn.Linear(16, 16), nn.Linear(16, 2 * 4 * 2), nn.Linear(16, 2 * 4)
    tokens, query, reference = torch.randn(1, 12, 16), torch.randn(1, 5, 16), torch.rand(1, 5, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        value, offsets, logits = project(tokens).unflatten(-1, (2, 8)), where(query), amount(query)
        offsets, logits = offsets.view(1, 5, 2, 4, 2), logits.view(1, 5, 2, 4)
        out = deform_attn_offsets(value, [(3, 4)], reference, offsets, logits)
    assert value.dtype == offsets.dtype == out.dtype == torch.bfloat16
    locations = reference[:, :, None] + offsets.float() / torch.tensor([4, 3])
    weights = logits.float().softmax(-1)
    assert_close([out], [oracle(value.float(), [(3, 4)], locations, weights, [4])], 1e-2)


def test_gradients_come_for_any_subset_of_the_tensors(form):
    value, shapes, locations, weights, points = inputs([(4, 5)], [3], 2, 7, 2, 8)
    full = results(deform_attn, (value, shapes, locations, weights, points))[1:]
    for wanted in range(1, 8):
        marks = [bool(wanted >> i & 1) for i in range(3)]
        tensors = [x.detach().requires_grad_(mark) for x, mark in zip((value, locations, weights), marks)]
        some = results(deform_attn, (tensors[0], shapes, *tensors[1:], points))[1:]
        assert_close(some, [g for g, mark in zip(full, marks) if mark], 1e-6)


@pytest.mark.parametrize("batch, queries", [(2, 0), (0, 3)])
def test_no_queries_or_images_give_an_empty_result_and_zero_gradients(batch, queries, form):
    arguments = inputs([(4, 5)], [3], batch, queries, 2, 8)
    out, *grads = results(deform_attn, arguments)
    assert out.shape == (batch, queries, 16)
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(grads, bench.leaves(arguments), strict=True))


class Largest(TorchDispatchMode):
    """Notes the most numbers that any one result of an operator has."""
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.layout == torch.strided:
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_the_cpu_form_holds_nothing_of_size_queries_times_points_times_channels():
    value, shapes, locations, weights, points = inputs([(20, 20), (10, 10)], [4, 4], 1, 2000, 4, 32)
    arguments = value.detach(), [20, 20, 10, 10], points, locations.detach(), weights.detach()
    with Largest() as forward:
        out = msda.forward_cpu(*arguments)
    with Largest() as backward:
        msda.backward_cpu(torch.ones_like(out), *arguments)
    samples = weights.numel()
    assert forward.numbers <= 4 * min(samples, deform_attn_cpu.BLOCK) + out.numel()     # lists of one block, the result
    assert backward.numbers <= 4 * samples                               # a weight per point and corner, not 32


def test_indices_are_64_bits_where_32_do_not_suffice():
    def index_type(images):
        value = torch.empty(images, 2 ** 20, 8, 32, device="meta")
        locations = torch.empty(images, 10, 8, 4, 2, device="meta")
        return deform_attn_cpu.setup(value, [1024, 1024], [4], locations)[1].down.dtype

    assert index_type(2) == torch.int32 and index_type(257) == torch.int64


def test_what_does_not_fit_is_refused_with_the_numbers(form):
    value, shapes, locations, weights, points = inputs([(4, 5), (2, 3)], [3, 3], 2, 7, 2, 8)
    for message, arguments in {
            r"\[\(4, 5\), \(2, 4\)\] do not hold the 26": (value, [(4, 5), (2, 4)], locations, weights, points),
            r"points \[3, 4\] on 2 levels": (value, shapes, locations, weights, [3, 4]),
            r"points \[6\] on 2 levels": (value, shapes, locations, weights, [6]),
            r"points \[7, -1\]": (value, shapes, locations, weights, [7, -1]),
            r"2 images and 2 heads, locations 1 and 2": (value, shapes, locations[:1], weights[:1], points),
            r"weights \(B, Q, M, T\), not": (value, shapes, locations, weights[..., :5], points),
            r"float32, torch.int64": (value, shapes, locations.long(), weights, points),
            r"on cpu, locations on meta": (value, shapes, locations.to("meta"), weights, points)}.items():
        with pytest.raises(ValueError, match=message):
            deform_attn(*arguments)
    with pytest.raises(ValueError, match="2³¹ numbers or more"):
        huge, some = torch.empty(1, 2 ** 23, 8, 32, device="meta"), torch.empty(1, 1, 8, 4, 2, device="meta")
        deform_attn(huge, [(2 ** 12, 2 ** 11)], some, some[..., 0])
    with pytest.raises(ValueError, match=r"points \[3, 2\], but locations with two axes for them have \[3, 3\]"):
        deform_attn(value, shapes, locations.unflatten(3, (2, 3)), weights.unflatten(3, (2, 3)), [3, 2])


def test_a_second_derivative_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(msda, "plain_is_faster", lambda value, locations: False)
    value, shapes, locations, weights, points = inputs([(4, 5)], [3], 1, 7, 2, 8)
    loss = deform_attn(value, shapes, locations, weights, points).square().sum()
    first, = torch.autograd.grad(loss, locations, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use deform_attn_plain"):
        first.sum().backward()


def test_pytorch_accepts_the_operators():
    value, shapes, locations, weights, points = inputs([(4, 5)], [3], 1, 7, 2, 8, dtype=torch.float64)
    torch.library.opcheck(msda.forward_op, (value, [4, 5], points, locations, weights))
    grad = torch.randn(1, 7, 16, dtype=torch.float64)
    arguments = [x.detach() for x in (value, locations, weights)]
    torch.library.opcheck(msda.backward_op, (grad, arguments[0], [4, 5], points, *arguments[1:]))


def test_compiled_and_exported_models_hold_one_operator():
    value, shapes, locations, weights, points = inputs([(4, 5)], [3], 1, 7, 2, 8)

    class Model(nn.Module):
        def forward(self, value, locations, weights):
            return deform_attn(value, shapes, locations, weights, points) * 2

    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    arguments = value, shapes, locations, weights, points
    ours = results(lambda v, s, x, w, p: compiled(v, x, w), arguments)
    assert_close(ours, results(lambda *args: deform_attn_plain(*args) * 2, arguments), 1e-5)
    program = torch.export.export(Model(), (value, locations, weights))
    assert "pose.deform_attn.default" in str(program.graph)


def test_the_flop_counter_counts_five_multiply_adds_per_point_and_channel(monkeypatch):
    monkeypatch.setattr(msda, "plain_is_faster", lambda value, locations: False)
    arguments = inputs([(4, 5)], [3], 1, 7, 2, 8)
    with FlopCounterMode(display=False) as counter:
        results(deform_attn, arguments)
    assert counter.get_total_flops() == 3 * 10 * 7 * 2 * 3 * 8               # the backward pass counts twice


# ----------------------------------------------------------------------------- dispatch


def test_a_word_that_is_no_choice_is_refused(monkeypatch):
    monkeypatch.setenv("POSE_KERNELS", "cuda")
    with pytest.raises(dispatch.KernelError, match="use one of auto, triton, torch, plain"):
        deform_attn(*inputs(*SIZES[0]))


@pytest.mark.skipif(CUDA or dispatch.interpreting(), reason="without a GPU and the interpreter")
def test_triton_on_cpu_tensors_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("POSE_KERNELS", "triton")
    with pytest.raises(dispatch.KernelError, match="TRITON_INTERPRET=1|pip install triton"):
        deform_attn(*inputs(*SIZES[0]))


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler."),
                                   subprocess.CalledProcessError(1, ["gcc"])], ids=["no compiler", "it fails"])
def test_a_kernel_that_does_not_compile_is_replaced_with_one_line(error, monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "use_triton", lambda *tensors: True)
    monkeypatch.setattr(dispatch, "COMPILE_ERRORS", (subprocess.CalledProcessError,))
    monkeypatch.setattr(dispatch, "gave_up", set())

    def fails(x):
        raise error

    for _ in range(2):
        assert dispatch.choose("a kernel", fails, lambda x: x + 1, torch.zeros(1)) == 1
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "PyTorch instead of Triton for a kernel" in out and str(error) in out


def test_other_errors_of_a_kernel_are_not_hidden(monkeypatch):
    monkeypatch.setattr(dispatch, "use_triton", lambda *tensors: True)

    def fails(x):
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        dispatch.choose("a kernel", fails, lambda x: x, torch.zeros(1))


def test_an_old_gpu_is_named_once(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    dispatch.new_enough.cache_clear()
    assert [dispatch.new_enough(torch.device("cuda:0")) for _ in range(2)] == [False, False]
    dispatch.new_enough.cache_clear()
    assert capsys.readouterr().out.count("Old GPU has compute capability 7.5") == 1


def test_a_wrong_word_ends_a_command_in_one_line():
    run = subprocess.run([sys.executable, "diffusionpose.py"], env={**os.environ, "POSE_KERNELS": "cuda"},
                         capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2
    assert run.stderr == "error: POSE_KERNELS=cuda is unknown: use one of auto, triton, torch, plain\n"


@pytest.mark.parametrize("size", SIZES[:5], ids=str)
def test_the_plain_word_gives_the_values_and_gradients_of_the_default_form(size, monkeypatch):
    monkeypatch.setattr(msda, "plain_is_faster", lambda value, locations: False)
    calls = []
    monkeypatch.setattr(msda, "deform_attn_plain", lambda *args: calls.append(args) or deform_attn_plain(*args))
    arguments = inputs(*size, dtype=torch.float64)
    default = results(deform_attn, arguments)
    assert not calls
    monkeypatch.setenv("POSE_KERNELS", "plain")
    assert_close(results(deform_attn, arguments), default, 1e-12)
    assert len(calls) == 1


def test_the_plain_word_leaves_no_operator_in_a_compiled_or_exported_model(monkeypatch):
    monkeypatch.setenv("POSE_KERNELS", "plain")
    value, shapes, locations, weights, points = inputs([(4, 5)], [3], 1, 7, 2, 8)

    class Model(nn.Module):
        def forward(self, value, locations, weights):
            return deform_attn(value, shapes, locations, weights, points)

    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)(value, locations, weights)
    assert_close([compiled], [deform_attn_plain(value, shapes, locations, weights, points)], 1e-6)
    program = torch.export.export(Model(), (value, locations, weights))
    assert "pose.deform_attn" not in str(program.graph) and "grid_sampler" in str(program.graph)


def test_the_kernels_import_nothing_of_this_project_but_themselves():
    files = sorted((ROOT / "kernels").glob("*.py"))
    ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert len(files) >= 6 and {"common", "data", "detrpose"} <= ours
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                names = [node.module]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & (ours - {"kernels"}), (path, names)


# ----------------------------------------------------------------------------- the benchmark


def test_the_published_formulation_of_the_benchmark_is_the_same_function():
    arguments = inputs(*SIZES[2], dtype=torch.float64)
    assert_close(results(bench.published_deform_attn, arguments), results(oracle, arguments), 1e-12)


def test_the_benchmark_stops_at_a_wrong_result(capsys):
    case = next(case for case in bench.deform_attn_cases() if case.size == "tiny, Q 50, d 8")
    assert bench.check([case], torch.device("cpu"))[0]["error"] < 1e-5
    case.ours = lambda *arguments: 1.01 * deform_attn_plain(*arguments)
    with pytest.raises(SystemExit, match="wrong result"):
        bench.check([case], torch.device("cpu"))


def test_the_benchmark_compares_in_turns(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0)
    case = next(case for case in bench.deform_attn_cases() if case.size == "tiny, Q 50, d 8")
    rows = bench.cpu_rows(case)
    assert [row["direction"] for row in rows] == ["inference", "training"]
    assert all(row["ratio"] == row["against_ms"] / row["ms"] and row["rounds"] >= 5 for row in rows)
