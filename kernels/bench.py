"""Benchmark of the kernels: correctness first, then speed at the real sizes of the five methods.

    python -m kernels.bench                        on this machine's GPU, else on its CPU
    python -m kernels.bench --check                only the largest error of each case
    python -m kernels.bench --compile              registers, spills, instructions for sm_90; needs no GPU
    python -m kernels.bench --threads 1            CPU threads (ratios that we quote are for one)

On a CPU a row compares our form with the published PyTorch formulation of the same thing, run in turns; a
ratio above 1 means that ours is faster. On a GPU it compares the Triton kernel with the formula, the naive
kernel and every peer that can be imported, and says which share of the floor is reached: the least time that
moving each tensor once, the arithmetic, the exponentials, or the reads from the L1 caches would take.

A kernel has a section with two functions, for what to time and what to compile.
"""
import argparse
import datetime
import importlib
import re
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import deform_attn as msda
from kernels import selective_scan as scan
from kernels.dispatch import HAS_TRITON, triton

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}     # relative, against float64
GPU_TYPES = (torch.float32, torch.bfloat16)                                         # a CPU runs float32
SECONDS = 3.0                                                                     # of a CPU row, or 5 rounds
ROUNDS = 30                                                                       # of a GPU row


@dataclass
class Case:
    """One call of a kernel at a real size."""
    kernel: str
    size: str                       # for the table
    make: Callable                  # (device, dtype) -> arguments; leaves need gradients
    ours: Callable                  # the public function, Triton on a GPU
    plain: Callable                 # the formula, also in float64
    published: Callable             # the published PyTorch formulation
    naive: Callable                 # the naive kernel, forward only
    work: Callable                  # (bytes per number) -> work of the forward, and of the backward pass
    peers: dict[str, Callable]      # operators of others, same arguments


@dataclass
class Build:
    """A Triton kernel to compile. Pointers, to multiples of 16 bytes, are written "*bf16", integers "i32"."""
    kernel: str
    name: str                                   # for the table
    function: Callable
    signature: dict[str, str]                   # of the arguments that are no constants
    constants: dict
    warps: int
    samples: float                              # points (or steps · channels) per turn of its main loop

# ----------------------------------------------------------------------------- deformable attention


def published_deform_attn(value: Tensor, shapes: list, locations: Tensor, weights: Tensor,
                          points: list) -> Tensor:
    """The formulation that everybody uses on a CPU: grid_sample per level, stack, times the weights, sum."""
    batch, _, heads, dim = value.shape
    queries, samples = locations.shape[1], []
    grids = (2 * locations - 1).split(points, 3)
    for level, (height, width), grid in zip(value.split([h * w for h, w in shapes], 1), shapes, grids):
        level = level.flatten(2).transpose(1, 2).reshape(batch * heads, dim, height, width)
        grid = grid.transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(level, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    stacked = torch.stack(samples, -2).flatten(-2) if len(set(points)) == 1 else torch.cat(samples, -1)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, sum(points))
    return (stacked * weights).sum(-1).view(batch, heads * dim, queries).transpose(1, 2).contiguous()


def deform_attn_arguments(batch: int, queries: int | None, heads: int, dim: int, shapes: list, points: list,
                          device: torch.device, dtype: torch.dtype) -> tuple:
    """Random arguments. queries None: every token is a query, looking about itself, as in an encoder."""
    random = torch.Generator().manual_seed(0)
    tokens, count = sum(h * w for h, w in shapes), sum(points)
    size = torch.tensor([(w, h) for (h, w), n in zip(shapes, points) for _ in range(n)])
    if queries is None:
        axes = [((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h) for h, w in shapes]
        grids = [torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2) for x, y in axes]
        centre = torch.cat(grids).expand(batch, -1, 2)
    else:
        centre = torch.rand(batch, queries, 2, generator=random)
    near = 2 * torch.randn(*centre.shape[:2], heads, count, 2, generator=random)            # pixels
    pixel = centre[:, :, None, None] * size - 0.5 + near
    fraction = (pixel - pixel.floor()).clamp(2e-3, 1 - 2e-3)        # no rounding changes a point's cell
    locations = (pixel.floor() + fraction + 0.5) / size
    weights = torch.randn(locations.shape[:-1], generator=random).softmax(-1)
    value = torch.randn(batch, tokens, heads, dim, generator=random)
    tensors = value.to(device, dtype), locations.to(device), weights.to(device, dtype)
    value, locations, weights = (x.requires_grad_() for x in tensors)
    return value, shapes, locations, weights, points


def deform_attn_work(batch: int, queries: int | None, heads: int, dim: int, shapes: list, points: list,
                     size: int) -> tuple[dict, dict]:
    """Value, locations (float32), weights and out once; backward a gradient of each, too."""
    tokens = sum(h * w for h, w in shapes)
    queries = queries or tokens
    value, out = batch * tokens * heads * dim, batch * queries * heads * dim
    samples = batch * queries * heads * sum(points)
    moved, read = size * (value + out + samples) + 8 * samples, 4 * samples * dim
    return (dict(memory=moved, arithmetic=10 * samples * dim, L1=read * size),
            dict(memory=2 * moved + 4 * value, arithmetic=20 * samples * dim, L1=read * (size + 4)))


class OfficialDeformAttn(torch.autograd.Function):
    """The CUDA extension of Deformable DETR, `module`."""

    @staticmethod
    def forward(ctx, module, *tensors):
        ctx.module = module
        ctx.save_for_backward(*tensors)
        return module.ms_deform_attn_forward(*tensors, 64)

    @staticmethod
    def backward(ctx, grad):
        grads = ctx.module.ms_deform_attn_backward(*ctx.saved_tensors, grad.contiguous(), 64)
        return None, grads[0], None, None, grads[1], grads[2]


def peer_deform_attn(module, value: Tensor, shapes: list, locations: Tensor, weights: Tensor,
                     points: list) -> Tensor:
    """The CUDA extension, or the package msda-triton: float32 only, equal points on all levels."""
    sides = torch.tensor(shapes, device=value.device)
    locations, weights = (x.float().unflatten(3, (len(points), points[0])) for x in (locations, weights))
    if hasattr(module, "ms_deform_attn_forward"):
        starts = sides.prod(1).cumsum(0) - sides.prod(1)
        return OfficialDeformAttn.apply(module, value.float(), sides, starts, locations, weights)
    return module.multiscale_deformable_attention(value.float(), sides, locations, weights, padding_mode="zeros",
                                                  align_corners=False).flatten(2)


def deform_attn_cases() -> list[Case]:
    """The sizes of DETRPose (640 x 640) and DiffusionRegPose (800 x 1200), and of the embedded data."""
    detr, clip = [(80, 80), (40, 40), (20, 20)], [(100, 150), (50, 75), (25, 38), (13, 19)]
    small = [(20, 20), (10, 10), (5, 5)]
    sizes = {"DETRPose-n decoder": (1, 1080, 8, 16, detr[1:], [6, 6]),
             "DETRPose-L decoder": (1, 1080, 8, 32, detr, [4] * 3),
             "DETRPose-X decoder": (1, 1080, 8, 48, detr, [4] * 3),
             "DETRPose-L training, B 4": (4, 1800, 8, 32, detr, [4] * 3),
             "DiffusionRegPose decoder": (1, 1800, 8, 32, clip, [4] * 4),
             "DiffusionRegPose encoder": (1, None, 8, 32, clip, [4] * 4),
             "tiny, Q 50, d 8": (1, 50, 4, 8, small[:2], [4] * 2),
             "tiny, Q 100, d 16, B 4": (4, 100, 4, 16, small[:2], [4] * 2),
             "tiny, Q 300, d 16": (1, 300, 8, 16, small, [4] * 3)}
    if torch.cuda.is_available():
        sizes["DETRPose-L decoder, B 16"] = (16, 1080, 8, 32, detr, [4] * 3)
        sizes["DiffusionRegPose encoder, B 16"] = (16, None, 8, 32, clip, [4] * 4)
    peers = found({"official CUDA": ("MultiScaleDeformableAttention", peer_deform_attn),
                   "msda_triton": ("msda_triton", peer_deform_attn)})
    return [Case("deform_attn", name, partial(deform_attn_arguments, *size), msda.deform_attn,
                 msda.deform_attn_plain, published_deform_attn, msda.deform_attn_naive,
                 partial(deform_attn_work, *size), peers) for name, size in sizes.items()]


def deform_attn_builds() -> list[Build]:
    """The steps from the naive kernel to ours; then both kernels for every type and head dimension."""
    builds = []

    def add(name: str, function: Callable, kind: str, dim: int, shape: dict, **constants):
        types = {x: "*" + kind for x in ("value", "out", "grad", "weights", "d_weights")}
        types |= {x: "*fp32" for x in ("locations", "sides", "unit_at", "d_locations")}
        types |= {"tokens_at": "*i32", "queries": "i32", "tokens": "i32"}
        types["d_value"] = "*i64" if constants.get("FIXED") else "*fp32"
        warps = shape.pop("num_warps")
        constants |= dict(HEADS=8, DIM=dim, POINTS=12, **shape)
        builds.append(Build("deform_attn", f"{name} d {dim} {kind}", function, types, constants, warps,
                            shape.get("QUERIES", 1)))

    add("naive", msda.naive_kernel, "fp32", 32, dict(BLOCK=32, num_warps=1))
    for queries, chunk in ((1, 32), (4, 32), (8, 16), (16, 8)):
        shape = dict(QUERIES=queries, CHUNK=chunk, CHUNKS=32 // chunk, num_warps=1)
        add(f"queries {queries}, chunk {chunk},", msda.forward_kernel, "fp32", 32, shape, THIN=False)
    for kind, bits in (("fp32", 32), ("bf16", 16), ("fp16", 16)):
        for dim in (16, 32, 48, 64):
            add("forward", msda.forward_kernel, kind, dim, msda.launch_shape(dim, bits), THIN=False)
            shape = msda.launch_shape(dim, backward=True)
            add("backward", msda.backward_kernel, kind, dim, shape, THIN=False, FIXED=False)
    shape = msda.launch_shape(32, backward=True)
    add("deterministic backward", msda.backward_kernel, "fp32", 32, shape, THIN=False, FIXED=True)
    return builds


# ----------------------------------------------------------------------------- selective scan


def published_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor,
                   delta_bias: Tensor, delta_softplus: bool) -> Tensor:
    """The one that everybody uses on a CPU: factors of all steps by einsum, then a loop, an einsum per step."""
    d = delta + delta_bias[:, None]
    d = F.softplus(d) if delta_softplus else d
    decay = torch.exp(torch.einsum("bel,en->beln", d, A))
    gain = torch.einsum("bel,bnl,bel->beln", d, B, u)
    state, outs = torch.zeros_like(decay[:, :, 0]), []
    for step in range(u.shape[2]):
        state = decay[:, :, step] * state + gain[:, :, step]
        outs.append(torch.einsum("ben,bn->be", state, C[:, :, step]))
    return (torch.stack(outs, 2) + u * D[:, None]) * F.silu(z)


def selective_scan_arguments(batch: int, length: int, channels: int, device: torch.device,
                             dtype: torch.dtype) -> tuple:
    """Random arguments as in a Mamba block: memory order, N = 16, A and step sizes as it initialises them."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    u, delta, z = (normal(batch, length, channels).to(dtype).transpose(1, 2) for _ in range(3))
    B, C = (normal(batch, length, 16).to(dtype).transpose(1, 2) for _ in range(2))
    A = -torch.arange(1.0, 17, device=device).repeat(channels, 1)
    D, bias = normal(channels), normal(channels) - 4
    return *(x.requires_grad_() for x in (u, delta, A, B, C, D, z, bias)), True


def selective_scan_work(batch: int, length: int, channels: int, size: int) -> tuple[dict, dict]:
    """u, delta, z, out once; backward reads four and writes three of the kind; N = 16."""
    numbers = batch * length * channels
    return (dict(memory=4 * size * numbers, arithmetic=80 * numbers, exp=16 * numbers),
            dict(memory=7 * size * numbers, arithmetic=20 * 16 * numbers, exp=32 * numbers))


def selective_scan_cases() -> list[Case]:
    """DiffusionPose: spatial Mamba sees three frames of 209 tokens as three sequences, the other as one."""
    sizes = {"DiffusionPose-S spatial": (3, 209, 768), "DiffusionPose-S sequence": (1, 627, 768),
             "DiffusionPose-B spatial": (3, 209, 1536), "DiffusionPose-B sequence": (1, 627, 1536),
             "one frame, E 768": (1, 209, 768)}
    if torch.cuda.is_available():
        sizes["DiffusionPose-B spatial, B 64"] = (192, 209, 1536)
        sizes["DiffusionPose-B sequence, B 64"] = (64, 627, 1536)
    peers = found({"mamba_ssm": ("mamba_ssm.ops.selective_scan_interface",
                                 lambda module, *arguments: module.selective_scan_fn(*arguments))})
    return [Case("selective_scan", name, partial(selective_scan_arguments, *size), scan.selective_scan,
                 scan.selective_scan_plain, published_scan,
                 lambda *arguments: scan.selective_scan_naive(*arguments[:8]),
                 partial(selective_scan_work, *size), peers) for name, size in sizes.items()]


def selective_scan_builds() -> list[Build]:
    """The steps from the naive kernel to ours; then both kernels for each type, and in their other shapes.

    A sample is a step of a channel. The backward kernel's loop holds the detour, which every other turn takes.
    Strides are those of DiffusionPose-B, where B and C are views of rows of 80 numbers.
    """
    series = ("u_ptr", "delta_ptr", "z_ptr", "g_ptr", "out_ptr", "du_ptr", "ddelta_ptr", "dz_ptr")
    builds = []

    def add(name: str, function: Callable, kind: str, wide: int = 32, steps: int = scan.CHUNK, states: int = 16):
        types = {x: "*" + kind if x in series else "*fp32" if x.endswith("_ptr") else "i32"
                 for x in function.arg_names}
        constants = dict(E=1536, N=states, BLOCK_N=states, BLOCK_E=wide, ROUNDS=wide.bit_length() - 1, groups=1,
                         CHUNK=steps, HALF=scan.HALF, SOFTPLUS=True, B_b=209 * 80, C_b=209 * 80, B_g=0, C_g=0,
                         B_l=80, C_l=80, u_l=1536, delta_l=1536, z_l=1536, g_l=1536)
        constants = {x: value for x, value in constants.items() if x in function.arg_names}
        turn = {scan.naive_kernel: 1, scan.forward_kernel: steps * wide, scan.backward_kernel: scan.HALF * wide}
        builds.append(Build("selective_scan", f"{name} {kind}", function, types, constants, max(1, states // 16),
                            turn[function]))

    add("naive", scan.naive_kernel, "fp32")
    add("channels 8, step by step,", scan.forward_kernel, "fp32", wide=8, steps=1)
    add("channels 32, step by step,", scan.forward_kernel, "fp32", steps=1)
    for kind in ("fp32", "bf16"):
        add("forward", scan.forward_kernel, kind)
        add("backward", scan.backward_kernel, kind)
    for name, function in (("forward", scan.forward_kernel), ("backward", scan.backward_kernel)):
        add(f"{name}, channels 8,", function, "fp32", wide=8)
    add("backward, N 64,", scan.backward_kernel, "fp32", wide=16, states=64)
    return builds


# ----------------------------------------------------------------------------- correctness


def gradients(form: Callable, arguments: tuple, grad: Tensor | None = None) -> list[Tensor]:
    """[out, gradient of each leaf], for the upstream gradient `grad` (fixed random numbers if None)."""
    out = form(*arguments)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves(arguments), grad.to(out.dtype))]


def leaves(arguments: tuple) -> list[Tensor]:
    return [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]


def check(cases: list[Case], device: torch.device) -> list[dict]:
    """Print how far ours is from the formula in float64 on the same rounded numbers, the largest relative norm
    of out and gradients, for each case and type; SystemExit if it is too far."""
    rows = []
    for case in cases:
        for dtype in GPU_TYPES if device.type == "cuda" else (torch.float32,):
            arguments = case.make(device, dtype)
            exact = tuple(x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
                          for x in arguments)
            pairs = zip(gradients(case.ours, arguments), gradients(case.plain, exact))
            error = max(((ours - plain).norm() / plain.norm().clamp(min=1e-30)).item() for ours, plain in pairs)
            rows.append(dict(kernel=case.kernel, size=case.size, dtype=str(dtype), error=error))
            print(f"{case.kernel:15} {case.size:32} {str(dtype):14} largest error {error:.1e}", flush=True)
            if not error < TOLERANCE[dtype]:
                raise SystemExit(f"wrong result: the error may be {TOLERANCE[dtype]:.0e} at most")
    return rows


# ----------------------------------------------------------------------------- speed


def runner(form: Callable, arguments: tuple, direction: str) -> Callable:
    """A function that does one call: "inference" without gradients, or "training" with the backward pass."""
    if direction == "training":
        grad = torch.ones_like(form(*arguments))
        return lambda: torch.autograd.grad(form(*arguments), leaves(arguments), grad)

    return torch.no_grad()(lambda: form(*arguments))


def cpu_times(first: Callable, second: Callable) -> tuple[float, float, int]:
    """Median milliseconds of two functions called in turns, so that a busy machine slows both; the rounds."""
    first(), second()
    times, start = ([], []), time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - start < SECONDS:
        for call, list_ in zip((first, second), times):
            begin = time.perf_counter()
            call()
            list_.append(1e3 * (time.perf_counter() - begin))
    return *(sorted(t)[len(t) // 2] for t in times), len(times[0])


def cpu_rows(case: Case) -> list[dict]:
    """Our form against the published formulation, without and with gradients."""
    arguments, rows = case.make(torch.device("cpu"), torch.float32), []
    for direction in ("inference", "training"):
        calls = (runner(form, arguments, direction) for form in (case.ours, case.published))
        ours, theirs, rounds = cpu_times(*calls)
        rows.append(dict(kernel=case.kernel, size=case.size, dtype="torch.float32", direction=direction, ms=ours,
                         against="published", against_ms=theirs, ratio=theirs / ours, rounds=rounds))
        print(f"{case.kernel:15} {case.size:32} {direction:9} {ours:9.2f} ms  published {theirs:9.2f} ms  "
              f"ratio {theirs / ours:5.2f}  ({rounds} rounds)", flush=True)
    return rows


def gpu_times(calls: dict[str, Callable]) -> dict[str, tuple[float, float]]:
    """For each call, in turns: median milliseconds on the GPU (L2 cache warm) and peak memory in MB."""
    peak = {}
    for name, call in calls.items():
        call(), torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak[name] = (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    events = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()                                                      # what lies in the L2 cache is its own
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(), call(), end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    times = {name: sorted(begin.elapsed_time(end) for begin, end in pairs) for name, pairs in events.items()}
    return {name: (times[name][ROUNDS // 2], peak[name]) for name in calls}


def measure_chip() -> dict[str, float]:
    """Of the GPU, per second: bytes to and from memory (a copy, measured); and as its clock allows, float32 flop
    (128 multiply-adds per cycle and multiprocessor), bytes from L1 (128), exponentials (16)."""
    properties = torch.cuda.get_device_properties(0)
    cycles = properties.multi_processor_count * 1e3 * getattr(properties, "clock_rate", 1.98e6)
    source = torch.empty(2 ** 28, device="cuda")
    target = torch.empty_like(source)
    ms, _ = gpu_times({"copy": lambda: target.copy_(source)})["copy"]
    return {"memory": 2 * source.numel() * 4 / ms * 1e3, "arithmetic": 256 * cycles, "L1": 128 * cycles,
            "exp": 16 * cycles}


def floor(work: dict[str, float], chip: dict[str, float]) -> tuple[float, str]:
    """The least milliseconds, and what binds."""
    times = {name: 1e3 * amount / chip[name] for name, amount in work.items()}
    name = max(times, key=times.get)
    return times[name], name


def print_gpu_rows(case: Case, chip: dict[str, float]):
    """The Triton form against the formula, the naive kernel and the peers, by type and direction."""
    for dtype in GPU_TYPES:
        arguments = case.make(torch.device("cuda"), dtype)
        for direction in ("inference", "training"):
            forms = {"ours": case.ours, "plain": case.plain, **case.peers}
            if direction == "inference":
                forms["naive"] = case.naive
            times = gpu_times({name: runner(form, arguments, direction) for name, form in forms.items()})
            parts = case.work(arguments[0].element_size())[:2 if direction == "training" else 1]
            ms, peak = times.pop("ours")
            least, binds = sum(floor(part, chip)[0] for part in parts), floor(parts[-1], chip)[1]
            moved = sum(part["memory"] for part in parts)
            print(f"{case.kernel:15} {case.size:32} {str(dtype):14} {direction:9} {ms:8.3f} ms "
                  f"{moved / ms / 1e6:7.0f} GB/s {100 * least / ms:4.0f}% of the {binds} floor {peak:6.0f} MB;  "
                  + "  ".join(f"{name} {t / ms:.2f}x" for name, (t, _) in times.items()), flush=True)


# ----------------------------------------------------------------------------- compiled code


def compile_build(build: Build, capability: int = 90) -> dict:
    """Registers, spilled and shared bytes, and instructions of the main loop per sample, for sm_80, sm_90, …

    Needs Triton, whose wheel brings NVIDIA's assembler and disassembler, but no GPU, no TRITON_INTERPRET=1. The
    instructions are a warp's, in the loop that has the most of them, times the program's warps, divided by its
    samples. `widest` is the bits of the widest load there.
    """
    names = build.function.arg_names
    signature = {name: "constexpr" if name in build.constants else build.signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    constants = {(names.index(name),): value for name, value in build.constants.items()}
    source = triton.compiler.ASTSource(build.function, signature, constants, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    cubin = triton.compile(source, target=target, options=dict(num_warps=build.warps)).asm["cubin"]
    usage, code = disassemble(cubin, "--dump-resource-usage"), disassemble(cubin, "--dump-sass")
    registers, stack, shared = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "SHARED"))
    loop = max(loops(code), key=len, default=[])
    loads = [int(bits) for bits in re.findall(r"LDG\S*?\.(64|128)\b", " ".join(loop))]
    return dict(kernel=build.kernel, build=build.name, sm=capability, registers=registers, spilled=stack,
                shared=shared, per_sample=len(loop) * build.warps / build.samples, widest=max(loads, default=32),
                loop=dict(Counter(name.split(".")[0] for name in loop)))


def disassemble(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([tool, what, file], capture_output=True, text=True, check=True).stdout


def loops(code: str) -> list[list[str]]:
    """The names of the instructions from the target of each backward branch to the branch."""
    lines = [(int(a, 16), text.strip()) for a, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", code)]
    found = []
    for address, text in lines:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            body = [t for a, t in lines if int(jump[1], 16) <= a <= address]
            found.append([re.sub(r"^@!?U?P\w+\s+", "", t).split()[0] for t in body])
    return found


# ----------------------------------------------------------------------------- the rest


def found(peers: dict[str, tuple]) -> dict[str, Callable]:
    """From {name: (module, form that takes it first)} the forms of the modules that can be imported."""
    forms = {}
    for name, (module, form) in peers.items():
        try:
            forms[name] = partial(form, importlib.import_module(module))
        except ImportError:
            print(f"absent: {name} ({module} cannot be imported)")
    return forms


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only the largest error of each case")
    parser.add_argument("--compile", action="store_true", help="registers, spills, instructions for sm_90; no GPU")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    version = triton.__version__ if HAS_TRITON else "absent"
    print(f"{name}; torch {torch.__version__}, Triton {version}; {datetime.date.today()}")
    if args.compile:
        if not HAS_TRITON:
            parser.error("--compile needs Triton: pip install triton")
        for row in map(compile_build, deform_attn_builds() + selective_scan_builds()):
            print(f"{row['kernel']:15} {row['build']:32} sm_{row['sm']} {row['registers']:4} registers "
                  f"{row['spilled']:4} bytes spilled {row['shared']:6} shared {row['per_sample']:6.1f} warp "
                  "instructions per sample (counted, not timed)", flush=True)
        return

    cases = deform_attn_cases() + selective_scan_cases()
    check(cases, device)
    if args.check:
        return
    if device.type == "cuda":
        chip = measure_chip()
        for case in cases:
            print_gpu_rows(case, chip)
    else:
        for case in cases:
            cpu_rows(case)


if __name__ == "__main__":
    main()
