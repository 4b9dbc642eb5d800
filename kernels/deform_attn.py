"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 3).

Idea      A query does not look at every pixel of the feature maps, but at T points that it chose itself:
          `locations` says where, `weights` how much each counts. A point between four pixels reads all four.

              out[q, m] = Σ_t  weights[q, m, t] · V_l(t)( location[q, m, t] )                        (eq. 3)

          V_l is feature map l seen through head m: d channels, interpolated, 0 outside of the map. The T
          points run over the levels, and on each over its points. The paper's two projections, of the value
          before and of the output after, are the caller's.

          level l, W = 4, H = 3                        one point, at pixel coordinates x = 1.7, y = 0.6

           0.0    location x    1.0                    v00 ●───────────────● v01    row y = 0
          0.0┌────┬────┬────┬────┐                         │           │   │
             │ ●──│──● │    │    │   ● pixel centres       │       0.6 │   │        v00 counts 0.3 · 0.4
             ├─│──┼──│─┼────┼────┤     (0,0) … (3,2)       │    0.7    │   │        v01        0.7 · 0.4
             │ ●──│──● │    │    │                         ├───────────✕   │        v10        0.3 · 0.6
             ├────┼────┼────┼────┤   x = W·location_x − ½  │               │        v11        0.7 · 0.6
             │    │    │    │    │   y = H·location_y − ½  │               │
          1.0└────┴────┴────┴────┘                     v10 ●───────────────● v11    row y = 1
                                                         column x = 1    column x = 2
Read      deform_attn_plain, the formula → naive_kernel, the same in Triton → forward_kernel, the same fast →
          deform_attn, what methods call. The form that runs on a CPU is in deform_attn_cpu.py
Letters   B images  Q queries  M heads  d channels per head  L levels  P points of a level  T of all levels
          S = ΣH·W tokens: level by level, in raster order
Units     locations are xy in [0, 1] of the (padded) level: 0 and 1 are the outer edges of the border pixels
Type      out has the type of `value`. Arithmetic is float32 (float64 for float64 values). Keep locations in
          float32: bfloat16 moves a point by up to 0.16 pixels on a level of 80.
Outside   A point at x ≤ −1, y ≤ −1, x ≥ W or y ≥ H counts 0 and gets gradient 0, and so does one at a NaN or
          infinite location. An infinite *value* may spoil other points: weight 0 times infinity is NaN.
"""
import math
from functools import lru_cache
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.deform_attn_cpu import backward_cpu, forward_cpu
from kernels.dispatch import choose, gave_up, mode, plain, tl, triton, use_triton, working_type

# ----------------------------------------------------------------------------- the formula


def deform_attn_plain(value: Tensor, shapes: Sequence, locations: Tensor, weights: Tensor,
                      points: Sequence | None = None) -> Tensor:
    """Eq. 3 in plain PyTorch, level by level: the form to read, which the others are tested against.

    Takes and returns what `deform_attn` does. `F.grid_sample` interpolates; its coordinates run from −1 to 1.
    """
    locations, weights, points = by_point(locations, weights, points, len(shapes))
    batch, _, heads, dim = value.shape
    real = working_type(value.dtype)
    grid = (2 * locations.to(real)).sub_(1)
    grid.detach().nan_to_num_(nan=-9.0, posinf=9.0, neginf=-9.0)        # far outside, where gradients are 0
    tokens = [height * width for height, width in shapes]
    levels = value.to(real).permute(0, 2, 3, 1).split_with_sizes(tokens, 3)             # (B, M, d, H*W) each
    samples = []
    for level, (height, width), xy in zip(levels, shapes, grid.transpose(1, 2).split_with_sizes(points, 3)):
        level = level.reshape(batch * heads, dim, height, width)
        samples.append(F.grid_sample(level, xy.flatten(0, 1), align_corners=False))     # (B*M, d, Q, P)
    weights = weights.to(real).transpose(1, 2).flatten(0, 1)[:, None]                   # (B*M, 1, Q, T)
    out = (torch.cat(samples, 3) * weights).sum(3)                                      # eq. 3: (B*M, d, Q)
    return out.view(batch, heads * dim, locations.shape[1]).transpose(1, 2).to(value.dtype)


def by_point(locations: Tensor, weights: Tensor, points: Sequence | None, levels: int) -> tuple:
    """Locations (B, Q, M, T, 2), weights (B, Q, M, T), also from axes L and P; and the points per level."""
    if locations.ndim == 6 and weights.ndim == 5:
        split = [locations.shape[4]] * locations.shape[3]
        if points is not None and list(points) != split:
            raise ValueError(f"points {list(points)}, but locations with two axes for them have {split}")
        return locations.flatten(3, 4), weights.flatten(3, 4), split
    if points is None and locations.ndim == 5:
        points = [locations.shape[3] // levels] * levels
    return locations, weights, list(points or [])


# ----------------------------------------------------------------------------- the naive kernel
#
# A Triton kernel is written for a block of numbers at once: `tl.arange(0, 32)` is 32 numbers,
# `tl.load(pointer + them)` 32 loads, and the compiler hands the block out to the threads, of which 32, a
# warp, go in step. Many copies of the kernel, "programs", run side by side and differ in `tl.program_id`
# only. Here a program is one query of one head of one image, its block are the d channels. No method calls
# it: it is where to begin.


@triton.jit
def naive_kernel(value, sides, tokens_at, locations, weights, out, queries, tokens,
                 HEADS: tl.constexpr, DIM: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr):
    """Eq. 3 as it is written, forward, for float32 tensors of less than 2³¹ numbers and finite locations.

    sides (T, 2) float32: W, H of each point's level; tokens_at (T, 2) int32: W and the level's first token.
    """
    program = tl.program_id(0)                                      # one of all (image, query, head)
    image, head = program // (queries * HEADS), program % HEADS
    channel = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for t in range(POINTS):
        width, height = tl.load(sides + 2 * t), tl.load(sides + 2 * t + 1)
        row, start = tl.load(tokens_at + 2 * t), tl.load(tokens_at + 2 * t + 1)
        x = tl.load(locations + 2 * (program * POINTS + t)) * width - 0.5
        y = tl.load(locations + 2 * (program * POINTS + t) + 1) * height - 0.5
        weight = tl.load(weights + program * POINTS + t)
        for corner in tl.static_range(4):                           # v00, v01, v10, v11
            column, line = tl.floor(x) + corner % 2, tl.floor(y) + corner // 2
            inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
            share = (1 - tl.abs(x - column)) * (1 - tl.abs(y - line))
            token = image * tokens + start + line.to(tl.int32) * row + column.to(tl.int32)
            at = value + (token * HEADS + head) * DIM + channel
            total += weight * share * tl.load(at, mask=channel < tl.where(inside, DIM, 0), other=0.0)
    tl.store(out + program * DIM + channel, total, mask=channel < DIM)


def deform_attn_naive(value: Tensor, shapes: Sequence, locations: Tensor, weights: Tensor,
                      points: Sequence) -> Tensor:
    """Eq. 3 by `naive_kernel`, forward only; arguments as of `deform_attn`."""
    value, locations, weights = (x.float().contiguous() for x in (value, locations, weights))
    batch, tokens, heads, dim = value.shape
    out = value.new_empty(batch, locations.shape[1], heads * dim)
    tables = make_tables(tuple(side for shape in shapes for side in shape), tuple(points), value.device)
    with torch.cuda.device_of(value):
        naive_kernel[(out.numel() // dim,)](
            value, *tables, locations, weights, out, locations.shape[1], tokens, HEADS=heads, DIM=dim,
            POINTS=sum(points), BLOCK=triton.next_power_of_2(dim), num_warps=1)
    return out


# ----------------------------------------------------------------------------- the Triton kernels
#
#     one program = QUERIES queries of one image and one head              64 threads = 2 warps
#
#                    channels 0 … 15     16 … 31   …           a thread holds 16 bytes of a row: 4 channels in
#         query 0    [ th 0 | 1 | 2 | 3 ][ the same threads ]  float32, 8 in 16 bits. So 4 (2) threads share a
#         query 1    [ th 4 | 5 | 6 | 7 ][                  ]  query, and they do all its CHUNKS of channels
#         …
#
# Why like this. There is little arithmetic in eq. 3, and the feature maps of an image fit into the L2 cache
# (4 MB at DETRPose-L in 16 bits). What costs is the number of instructions, and most of them find out where a
# point lies and what its corners count. In the naive kernel, as in the paper's CUDA extension, each thread does
# that for one channel. Here the threads of a query do it once for all of its channels. Per query, head and
# point, with d = 32 in float32, a warp executes (`python -m kernels.bench --compile`, Triton 3.9, sm_90)
#
#     naive_kernel                       94.0    a thread per channel
#     no masks on the four loads         72.0    below, with QUERIES 1, CHUNK 32, CHUNKS 1
#     four channels per thread           21.5    QUERIES 4: 8 threads share a query, a load has 128 bits
#     chunks                             13.5    QUERIES 8, CHUNK 16, CHUNKS 2: 4 threads share a query
#     two warps: the kernel as launched  13.2    in bfloat16 15.1
#
# Chunks of 8 would need 9, but in 16 bits a load should bring a whole sector of 32 bytes. Chunks also fit any
# head dimension: 48 is three of them, while a block in one piece has to be 64 wide.
#   No masks: a corner counts the product of two tents, max(0, 1 − |x − column|) and max(0, 1 − |y − row|),
# which is 0 by itself for a pixel too far away. So the cell, the square between four pixels around the point,
# may be moved to the nearest one inside of the level, where all four can be read.
#   A location and a weight are read once, four pixels per point from L1 or L2; only out is written, once.
#   The loop over points is one at run time: unrolled it needs 250 registers per thread, which leaves the chip
# room for few threads; so 40 to 70 do. Its table of levels lets points be spread over them in any way.


@triton.jit
def tent(x, top):
    """max(0, top − |x|); top is 1, or 0 for no pixel. A NaN gives 0: tl.maximum takes the number."""
    return tl.maximum(top - tl.abs(x), 0.0)


@triton.jit
def cell_start(coordinate, side):
    """First pixel, on one axis, of the cell around a coordinate, moved into 0 … side − 2 (0 if side is 1)."""
    return tl.floor(tl.maximum(tl.minimum(coordinate, side - 2), 0.0))


@triton.jit
def read_point(sides, tokens_at, locations, weights, at, t, valid, STRIDE: tl.constexpr, THIN: tl.constexpr):
    """Point t of each query: xy from its cell's first pixel, its weight, and of its level what is needed.

    That is where v00 is, how many numbers further its right and lower neighbours are, the tops of their
    tents, and W, H. THIN: some level has a side of one pixel, so there may be no neighbour, its top being 0.
    """
    width, height = tl.load(sides + 2 * t), tl.load(sides + 2 * t + 1)
    row, start = tl.load(tokens_at + 2 * t), tl.load(tokens_at + 2 * t + 1)
    x = tl.load(locations + 2 * (at + t), mask=valid, other=-9.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * (at + t) + 1, mask=valid, other=-9.0).to(tl.float32) * height - 0.5
    weight = tl.load(weights + at + t, mask=valid, other=0.0).to(tl.float32)
    right, down, top_x, top_y = STRIDE, row * STRIDE, 1.0, 1.0
    if THIN:
        right, down = tl.where(width > 1, right, 0), tl.where(height > 1, down, 0)
        top_x, top_y = tl.minimum(width - 1, 1.0), tl.minimum(height - 1, 1.0)
    column, line = cell_start(x, width), cell_start(y, height)
    corner = (start + line.to(tl.int32) * row + column.to(tl.int32)) * STRIDE
    return x - column, y - line, weight, corner, right, down, top_x, top_y, width, height


@triton.jit
def forward_kernel(value, sides, tokens_at, locations, weights, out, queries, tokens,
                   HEADS: tl.constexpr, DIM: tl.constexpr, POINTS: tl.constexpr, CHUNK: tl.constexpr,
                   CHUNKS: tl.constexpr, QUERIES: tl.constexpr, THIN: tl.constexpr):
    """Eq. 3 for QUERIES queries of one image and head; arguments as in `naive_kernel`."""
    blocks = tl.cdiv(queries, QUERIES)
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, head = (pair // HEADS).to(tl.int64), pair % HEADS        # 64 bits: a batch may pass 2³¹ numbers
    query = tl.arange(0, QUERIES)
    valid = block * QUERIES + query < queries
    first = (image * queries + block * QUERIES) * HEADS + head      # of all (image, query, head)
    value += (image * tokens * HEADS + head) * DIM
    locations += first * POINTS * 2
    weights += first * POINTS
    out += first * DIM
    list_at = query * (HEADS * POINTS)                              # where a query's T points start
    channel = tl.arange(0, CHUNK)
    sums = ()
    for chunk in tl.static_range(CHUNKS):
        sums += (tl.zeros((QUERIES, CHUNK), tl.float32),)

    for t in range(POINTS):
        x, y, weight, corner, right, down, top_x, top_y, _, _ = read_point(
            sides, tokens_at, locations, weights, list_at, t, valid, HEADS * DIM, THIN)
        x0, x1 = tent(x, 1.0), tent(x - 1, top_x)
        y0, y1 = tent(y, 1.0) * weight, tent(y - 1, top_y) * weight
        added = ()
        for chunk in tl.static_range(CHUNKS):
            at = value + corner[:, None] + (chunk * CHUNK + channel)[None, :]
            there = None                                        # a mask only if the last chunk is not full
            if CHUNKS * CHUNK != DIM:
                there = (chunk * CHUNK + channel < DIM)[None, :]
            total = sums[chunk]
            total += (y0 * x0)[:, None] * tl.load(at, mask=there).to(tl.float32)
            total += (y0 * x1)[:, None] * tl.load(at + right, mask=there).to(tl.float32)
            total += (y1 * x0)[:, None] * tl.load(at + down, mask=there).to(tl.float32)
            total += (y1 * x1)[:, None] * tl.load(at + (down + right), mask=there).to(tl.float32)
            added += (total,)
        sums = added

    for chunk in tl.static_range(CHUNKS):
        at = (query * (HEADS * DIM))[:, None] + (chunk * CHUNK + channel)[None, :]
        tl.store(out + at, sums[chunk], mask=valid[:, None] & (chunk * CHUNK + channel < DIM)[None, :])


# The backward kernel has the same loop. Of a point it needs the four products <g, v_corner>, which give the
# gradients of weight and location as in `backward_cpu`; a product is a sum over the threads of a query. The
# forward pass saves its inputs and nothing else: to find cells and tents again is cheaper than to read them.
#   The gradient of a pixel is added up in memory by all programs that touch it, with atomic additions of four
# channels each on a Hopper GPU: 23 instructions per point. Their order is chance, and with it the last bits
# of the result. After torch.use_deterministic_algorithms(True) FIXED adds whole numbers instead, for which
# the order does not matter: gradients times `unit`, a power of two just so large that no sum leaves 64 bits.
# These are added one by one: 69 instructions.


@triton.jit
def add(pointer, share, g, unit, there, FIXED: tl.constexpr):
    """Add share · g to the gradients at the pointer, except where share is 0."""
    amount = share[:, None] * g
    wanted = there & (share != 0)[:, None]
    if FIXED:
        tl.atomic_add(pointer, (amount * unit).to(tl.int64), mask=wanted, sem="relaxed")
    else:
        tl.atomic_add(pointer, amount, mask=wanted, sem="relaxed")


@triton.jit
def backward_kernel(grad, value, sides, tokens_at, locations, weights, unit_at, d_value, d_locations,
                    d_weights, queries, tokens, HEADS: tl.constexpr, DIM: tl.constexpr,
                    POINTS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, QUERIES: tl.constexpr,
                    THIN: tl.constexpr, FIXED: tl.constexpr):
    """Gradients for QUERIES queries of one image and head; arguments as in `forward_kernel`.

    d_value is float32 (int64 in units of 1/unit if FIXED) and starts as zeros.
    """
    blocks = tl.cdiv(queries, QUERIES)
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, head = (pair // HEADS).to(tl.int64), pair % HEADS
    query = tl.arange(0, QUERIES)
    valid = block * QUERIES + query < queries
    first = (image * queries + block * QUERIES) * HEADS + head
    value += (image * tokens * HEADS + head) * DIM
    d_value += (image * tokens * HEADS + head) * DIM
    locations += first * POINTS * 2
    d_locations += first * POINTS * 2
    weights += first * POINTS
    d_weights += first * POINTS
    grad += first * DIM
    list_at = query * (HEADS * POINTS)
    channel = tl.arange(0, CHUNK)
    unit = 1.0
    if FIXED:
        unit = tl.load(unit_at)
    g = ()
    for chunk in tl.static_range(CHUNKS):
        mask = valid[:, None] & (chunk * CHUNK + channel < DIM)[None, :]
        rows = grad + (query * (HEADS * DIM))[:, None]
        g += (tl.load(rows + (chunk * CHUNK + channel)[None, :], mask=mask, other=0.0).to(tl.float32),)

    for t in range(POINTS):
        x, y, weight, corner, right, down, top_x, top_y, width, height = read_point(
            sides, tokens_at, locations, weights, list_at, t, valid, HEADS * DIM, THIN)
        x, y = tl.where(x > -1, x, -9.0), tl.where(y > -1, y, -9.0)     # outside, where slopes are 0, too
        x0, x1, y0, y1 = tent(x, 1.0), tent(x - 1, top_x), tent(y, 1.0), tent(y - 1, top_y)
        x, y = tl.floor(x), tl.floor(y)                             # a slope is a difference of two pixels
        slope_x0, slope_x1 = tent(x + 1, 1.0) - tent(x, 1.0), tent(x, top_x) - tent(x - 1, top_x)
        slope_y0, slope_y1 = tent(y + 1, 1.0) - tent(y, 1.0), tent(y, top_y) - tent(y - 1, top_y)
        g00 = tl.zeros((QUERIES, CHUNK), tl.float32)                # g · v00 and so on, channel by channel
        g01, g10, g11 = g00, g00, g00
        for chunk in tl.static_range(CHUNKS):
            at = corner[:, None] + (chunk * CHUNK + channel)[None, :]
            there = (chunk * CHUNK + channel < DIM)[None, :]
            g00 += g[chunk] * tl.load(value + at, mask=there, other=0.0).to(tl.float32)
            g01 += g[chunk] * tl.load(value + at + right, mask=there, other=0.0).to(tl.float32)
            g10 += g[chunk] * tl.load(value + at + down, mask=there, other=0.0).to(tl.float32)
            g11 += g[chunk] * tl.load(value + at + (down + right), mask=there, other=0.0).to(tl.float32)
            add(d_value + at, weight * y0 * x0, g[chunk], unit, there, FIXED)
            add(d_value + at + right, weight * y0 * x1, g[chunk], unit, there, FIXED)
            add(d_value + at + down, weight * y1 * x0, g[chunk], unit, there, FIXED)
            add(d_value + at + (down + right), weight * y1 * x1, g[chunk], unit, there, FIXED)
        v00, v01, v10, v11 = tl.sum(g00, 1), tl.sum(g01, 1), tl.sum(g10, 1), tl.sum(g11, 1)
        upper, lower = x0 * v00 + x1 * v01, x0 * v10 + x1 * v11
        slope_x = y0 * (slope_x0 * v00 + slope_x1 * v01) + y1 * (slope_x0 * v10 + slope_x1 * v11)
        slope_y = slope_y0 * upper + slope_y1 * lower
        tl.store(d_weights + list_at + t, y0 * upper + y1 * lower, mask=valid)
        tl.store(d_locations + 2 * (list_at + t), weight * width * slope_x, mask=valid)
        tl.store(d_locations + 2 * (list_at + t) + 1, weight * height * slope_y, mask=valid)


def launch_shape(dim: int, bits: int = 32, backward: bool = False) -> dict:
    """Launch of a kernel for rows of d numbers of some bits. Forward, a thread holds 128 bits of a row.

    Backward, where a point costs more, chunks have 8 channels; a thread has four, what an atomic addition takes,
    in one warp, so that no sum has to pass from warp to warp on its way to memory. Chunks are narrower for small
    heads, and wider where 8 of them do not suffice (registers).
    """
    width, channels, warps = (8, 4, 1) if backward else (16, 128 // bits, 2)
    chunk = min(width, triton.next_power_of_2(dim))
    while dim > 8 * chunk:
        chunk *= 2
    queries = 32 * warps * min(channels, chunk) // chunk
    return dict(CHUNK=chunk, CHUNKS=triton.cdiv(dim, chunk), QUERIES=queries, num_warps=warps)


@lru_cache(maxsize=64)
def make_tables(sizes: tuple, points: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each point's level: W, H (T, 2) float32, and W, first token (T, 2) int32."""
    level = torch.repeat_interleave(torch.tensor(points))
    shapes = torch.tensor(sizes).view(-1, 2)
    tokens = shapes.prod(1)
    sides = shapes.flip(1)[level]
    tokens_at = torch.stack([sides[:, 0], (tokens.cumsum(0) - tokens)[level]], 1)
    return sides.to(device, torch.float32), tokens_at.to(device, torch.int32)


def forward_triton(value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor,
                   weights: Tensor) -> Tensor:
    """Eq. 3 by `forward_kernel`. Kernels know nothing of strides: everything is made contiguous."""
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    batch, tokens, heads, dim = value.shape
    queries, count = locations.shape[1], locations.shape[3]
    out = value.new_empty(batch, queries, heads * dim)
    shape = launch_shape(dim, 8 * value.element_size())
    with torch.cuda.device_of(value):
        forward_kernel[(triton.cdiv(queries, shape["QUERIES"]) * batch * heads,)](
            value, *make_tables(tuple(sizes), tuple(points), value.device), locations, weights, out,
            queries, tokens, HEADS=heads, DIM=dim, POINTS=count, THIN=min(sizes) == 1, **shape)
    return out


def backward_triton(grad: Tensor, value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor,
                    weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights by `backward_kernel`."""
    grad, value, locations, weights = (x.contiguous() for x in (grad, value, locations, weights))
    batch, tokens, heads, dim = value.shape
    queries, count = locations.shape[1], locations.shape[3]
    fixed = torch.are_deterministic_algorithms_enabled()
    unit = largest_unit(grad, weights, queries * count) if fixed else grad             # not read unless fixed
    d_value = torch.zeros_like(value, dtype=torch.int64 if fixed else torch.float32)
    d_locations, d_weights = torch.empty_like(locations), torch.empty_like(weights)
    shape = launch_shape(dim, backward=True)
    with torch.cuda.device_of(value):
        backward_kernel[(triton.cdiv(queries, shape["QUERIES"]) * batch * heads,)](
            grad, value, *make_tables(tuple(sizes), tuple(points), value.device), locations, weights, unit,
            d_value, d_locations, d_weights, queries, tokens,
            HEADS=heads, DIM=dim, POINTS=count, THIN=min(sizes) == 1, FIXED=fixed, **shape)
    return (d_value / unit if fixed else d_value).to(value.dtype), d_locations, d_weights


def largest_unit(grad: Tensor, weights: Tensor, count: int) -> Tensor:
    """(1,) float32: a power of two; times it, the sum of `count` weighted gradients stays below 2⁶²."""
    bound = grad.abs().max().float() * weights.abs().max().float() * count
    return torch.exp2((62 - bound.clamp(min=2.0 ** -60).log2()).floor()).view(1)


# ----------------------------------------------------------------------------- the operator
#
# PyTorch knows deform_attn as an operator: torch.compile and torch.export keep it as one step, and the FLOP
# counter counts it. Which form runs is decided inside, see dispatch.py.


@torch.library.custom_op("pose::deform_attn", mutates_args=())
def forward_op(value: Tensor, sizes: Sequence[int], points: Sequence[int], locations: Tensor,
               weights: Tensor) -> Tensor:
    """Eq. 3 for checked arguments; sizes is H, W of level 0, H, W of level 1, …"""
    if locations.numel() == 0:
        return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    form = forward_cpu if value.dtype == torch.float64 else forward_triton
    return choose("deform_attn", form, forward_cpu, value, sizes, points, locations, weights)


@torch.library.custom_op("pose::deform_attn_backward", mutates_args=())
def backward_op(grad: Tensor, value: Tensor, sizes: Sequence[int], points: Sequence[int], locations: Tensor,
                weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights."""
    if locations.numel() == 0:
        return torch.zeros_like(value), torch.zeros_like(locations), torch.zeros_like(weights)
    form = backward_cpu if value.dtype == torch.float64 else backward_triton
    return choose("deform_attn_backward", form, backward_cpu, grad, value, sizes, points, locations, weights)


@forward_op.register_fake
def _(value, sizes, points, locations, weights):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@backward_op.register_fake
def _(grad, value, sizes, points, locations, weights):
    return tuple(x.new_empty(x.shape) for x in (value, locations, weights))


def keep_inputs(ctx, inputs, output):
    value, ctx.sizes, ctx.points, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def backward(ctx, grad):
    value, locations, weights = ctx.saved_tensors
    d_value, d_locations, d_weights = backward_op(grad, value, ctx.sizes, ctx.points, locations, weights)
    return d_value, None, None, d_locations, d_weights


def no_second_derivative(ctx, *grads):
    raise NotImplementedError("deform_attn has no second derivative: use deform_attn_plain for one")


forward_op.register_autograd(backward, setup_context=keep_inputs)
backward_op.register_autograd(no_second_derivative)


@register_flop_formula(torch.ops.pose.deform_attn)
def forward_flops(value, sizes, points, locations, weights, **kwargs) -> int:
    """5 multiply-adds per point and channel, four corners and the weight: the paper's 5·N_q·K·C."""
    return 2 * 5 * math.prod(weights) * value[3]


@register_flop_formula(torch.ops.pose.deform_attn_backward)
def backward_flops(grad, value, sizes, points, locations, weights, **kwargs) -> int:
    """A product and an addition for each corner: twice the forward pass."""
    return 2 * forward_flops(value, sizes, points, locations, weights)


# ----------------------------------------------------------------------------- what methods call


def deform_attn(value: Tensor, shapes: Sequence, locations: Tensor, weights: Tensor,
                points: Sequence | None = None) -> Tensor:
    """Multi-scale deformable attention (eq. 3), differentiable once in value, locations and weights.

    Takes    value (B, S, M, d), level after level; shapes [(H, W), …] of the levels, Python integers;
             locations (B, Q, M, T, 2) or (B, Q, M, L, P, 2), xy in [0, 1]; weights the same without the last
             axis; points per level, such as [3, 6, 3], by default the same on all
    Returns  (B, Q, M*d) in value's type, head after head; empty if Q or B is 0
    Raises   ValueError, with the numbers, for tensors that do not fit together
    """
    locations, weights, points = by_point(locations, weights, points, len(shapes))
    check(value, shapes, locations, weights, points)
    if plain() or not torch.compiler.is_compiling() and plain_is_faster(value, locations):
        return deform_attn_plain(value, shapes, locations, weights, points)
    return forward_op(value, [side for shape in shapes for side in shape], points, locations, weights)


def plain_is_faster(value: Tensor, locations: Tensor) -> bool:
    """On a GPU: if Triton is not to run. On a CPU: for small inputs, where the number of calls decides."""
    if mode() == "triton":
        return False
    if value.is_cuda:
        return value.dtype == torch.float64 or "deform_attn" in gave_up or not use_triton(value)
    return locations.numel() // 2 * value.shape[3] < (2 ** 18 if torch.is_grad_enabled() else 2 ** 16)


def check(value: Tensor, shapes: Sequence, locations: Tensor, weights: Tensor, points: list):
    """Raise ValueError if the arguments do not fit together."""
    if (value.ndim != 4 or locations.ndim != 5 or locations.shape[4] != 2
            or weights.shape != locations.shape[:4]):
        raise ValueError("deform_attn wants value (B, S, M, d), locations (B, Q, M, T, 2) and weights "
                         f"(B, Q, M, T), not {tuple(value.shape)}, {tuple(locations.shape)} and "
                         f"{tuple(weights.shape)}")
    batch, tokens, heads, dim = value.shape
    if locations.shape[0] != batch or locations.shape[2] != heads:
        raise ValueError(f"value has {batch} images and {heads} heads, "
                         f"locations {locations.shape[0]} and {locations.shape[2]}")
    shapes = [tuple(shape) for shape in shapes]
    if sum([height * width for height, width in shapes]) != tokens or min(map(min, shapes)) < 1:
        raise ValueError(f"shapes {shapes} do not hold the {tokens} tokens of value")
    if len(points) != len(shapes) or min(points) < 1 or sum(points) != locations.shape[3]:
        raise ValueError(f"points {points} on {len(shapes)} levels do not make the "
                         f"{locations.shape[3]} points of locations")
    if not value.device == locations.device == weights.device:
        raise ValueError(f"value is on {value.device}, locations on {locations.device}, "
                         f"weights on {weights.device}")
    if not (value.is_floating_point() and locations.is_floating_point() and weights.is_floating_point()):
        raise ValueError(f"value, locations and weights are {value.dtype}, {locations.dtype} and "
                         f"{weights.dtype}: all three must be floating-point")
    if tokens * heads * dim >= 2 ** 31:
        raise ValueError(f"an image of {tokens} tokens with {heads} heads of {dim} channels is too large: "
                         "it has 2³¹ numbers or more")


def deform_attn_offsets(value: Tensor, shapes: Sequence, reference: Tensor, offsets: Tensor, logits: Tensor,
                        points: Sequence | None = None) -> Tensor:
    """`deform_attn` from what a layer predicts. Weights are the softmax of the logits over all T points, and

        location = xy + offset / (W, H)       reference (B, Q, 1 or L, 2) is xy, offsets are in pixels
        location = xy + offset · wh / 2P      reference (B, Q, 1 or L, 4) is xy, wh, offsets in boxes

    with one reference for all levels or one for each; offsets (B, Q, M, T, 2), logits (B, Q, M, T). Locations
    and weights are float32 also where autocast made the offsets 16 bits (float64 for float64 values).
    """
    offsets, logits, points = by_point(offsets, logits, points, len(shapes))
    if reference.ndim != 4 or reference.shape[2] not in (1, len(shapes)) or reference.shape[3] not in (2, 4):
        raise ValueError(f"reference must be (B, Q, 1 or {len(shapes)}, 2 or 4), "
                         f"not {tuple(reference.shape)}")
    real, device = working_type(value.dtype), value.device
    level = torch.tensor([l for l, count in enumerate(points) for _ in range(count)], device=device)    # (T,)
    reference = reference.to(real)
    if reference.shape[2] > 1:
        reference = reference[:, :, level]
    reference = reference[:, :, None]                                           # (B, Q, 1, 1 or T, 2 or 4)
    if reference.shape[-1] == 2:
        scale = 1 / torch.tensor(shapes, dtype=real, device=device).flip(1)[level]
    else:
        scale = reference[..., 2:] / (2 * torch.tensor(points, device=device)[level, None])
    locations = reference[..., :2] + offsets.to(real) * scale
    return deform_attn(value, shapes, locations, logits.to(real).softmax(-1), points)
