"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, eq. 3).

Idea      A query does not look at every pixel of the feature maps, but at T points that it chose itself: `locations`
          says where, `weights` how much each counts. What lies between four pixels is interpolated from them.

              out[q, m] = Σ_t  weights[q, m, t] · V_l(t)( location[q, m, t] )                          (eq. 3)

          V_l is feature map l seen through head m: d channels; outside of the map it is 0. The T points of a query
          and head run over the levels, and on each level over its points. The paper's two projections (of the value
          before, of the output after) are the caller's.

          level l, W = 4, H = 3                          one point, pixel coordinates x = 1.7, y = 0.6

           0.0    location x    1.0                      v00 ●───────────────● v01      row y = 0
          0.0┌────┬────┬────┬────┐                           │           │   │
             │ ●──│──● │    │    │   ● pixel centres         │       0.6 │   │          v00 counts  0.3 · 0.4
             ├─│──┼──│─┼────┼────┤     (0,0) … (3,2)         │    0.7    │   │          v01         0.7 · 0.4
             │ ●──│──● │    │    │                           ├───────────✕   │          v10         0.3 · 0.6
             ├────┼────┼────┼────┤   x = location_x·W − ½    │               │          v11         0.7 · 0.6
             │    │    │    │    │   y = location_y·H − ½    │               │
          1.0└────┴────┴────┴────┘                       v10 ●───────────────● v11      row y = 1
                                                           column x = 1    column x = 2
Read      deform_attn_plain (the formula) → deform_attn (what methods call) → the bags (fast on a CPU)
Letters   B images  Q queries  M heads  d channels per head  L levels  P points of a level  T points of all levels
          S = ΣH·W tokens: level by level, raster order
Units     locations are xy in [0, 1] of the (padded) level: 0 and 1 are the outer edges of the border pixels
Type      out has the type of `value`; arithmetic is float32 (float64 for float64 values); keep locations in float32:
          bfloat16 moves a point by up to 0.16 pixels on an 80-pixel level
Outside   A point at x ≤ −1, y ≤ −1, x ≥ W or y ≥ H counts 0 and gets gradient 0. So does a NaN or infinite location.
"""
import math
import warnings
from functools import lru_cache
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import choose, mode, tl, triton, use_triton

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")      # `products` needs no more than there is

# ----------------------------------------------------------------------------- the formula


def deform_attn_plain(value: Tensor, shapes: Sequence, locations: Tensor, weights: Tensor, points: Sequence | None = None) -> Tensor:
    """Eq. 3, level by level, in plain PyTorch: the form to read, and the one that the others are tested against.

    Takes and returns what `deform_attn` does. `F.grid_sample` interpolates; its coordinates run from −1 to 1.
    """
    locations, weights, points = by_point(locations, weights, points, len(shapes))
    batch, _, heads, dim = value.shape
    real = torch.float64 if value.dtype == torch.float64 else torch.float32
    grid = (2 * locations.to(real)).sub_(1)
    grid.detach().nan_to_num_(nan=-9.0, posinf=9.0, neginf=-9.0)            # far outside, where all gradients are 0
    levels = value.to(real).permute(0, 2, 3, 1).split([height * width for height, width in shapes], 3)
    samples = []
    for level, (height, width), xy in zip(levels, shapes, grid.transpose(1, 2).split(points, 3)):
        level = level.reshape(batch * heads, dim, height, width)
        samples.append(F.grid_sample(level, xy.flatten(0, 1), align_corners=False))        # (B*M, d, Q, P)
    weights = weights.to(real).transpose(1, 2).flatten(0, 1)[:, None]                      # (B*M, 1, Q, T)
    out = (torch.cat(samples, 3) * weights).sum(3)                                         # eq. 3
    return out.view(batch, heads * dim, locations.shape[1]).transpose(1, 2).to(value.dtype)     # (B, Q, M*d)


def by_point(locations: Tensor, weights: Tensor, points: Sequence | None, levels: int) -> tuple[Tensor, Tensor, list]:
    """(B, Q, M, L, P, 2) and (B, Q, M, L, P) with one axis for all points: (…, T, 2) and (…, T), and the points per level."""
    if locations.ndim == 6:
        locations, weights = locations.flatten(3, 4), weights.flatten(3, 4)
    if points is None:
        points = [locations.shape[3] // levels] * levels
    return locations, weights, list(points)

# ----------------------------------------------------------------------------- the bags: the same numbers, fast on a CPU
#
# out[q, m] is a weighted sum of 4T rows of the table `value.view(B*S*M, d)`. PyTorch has one operator for weighted sums
# of table rows, made for word embeddings and much faster than grid_sample: embedding_bag. What remains is to write down
# which rows and which weights, and that costs more than the sums unless it is done with care:
#   * queries go in blocks whose lists stay in the L2 cache, in buffers that are used again for the next block;
#   * x and y, and the four corners, are separate planes: every operation runs over contiguous numbers;
#   * no masks. A corner's weight is the product of two tents, max(0, 1 − |x − column|) · max(0, 1 − |y − row|), which
#     is 0 by itself for a pixel too far away. So the cell, clamped to lie inside of the level, may be any near one.

BLOCK = 2 ** 15         # points whose lists are held at once: 20 numbers of 4 bytes each per point
CHUNK = 2 ** 13         # rows of d_value that the backward pass completes at once
ONE = torch.tensor(1.0)


class Grid(NamedTuple):
    """What the levels mean for each of the T points, repeated for the M heads so that operations run over M*T numbers."""
    size: Tensor        # (2, 1, M, T)     W and H
    top: Tensor         # (2, 1, M, T)     the last cell: W − 2 and H − 2, but at least 0
    second: Tensor      # (2, 2, 1, M, T)  for corners 0 and 1, x and y: distance from the cell's first pixel: 0 and 1
    down: Tensor        # (1, M, T)        rows of the table from a pixel to the one below: W*M
    corners: Tensor     # (4, 1, M, T)     rows of pixels v00, v01, v10, v11 of the level's first cell


@lru_cache(maxsize=64)
def make_grid(shapes: tuple, points: tuple, heads: int, real: torch.dtype, index: torch.dtype, device: torch.device) -> Grid:
    """The constants of a call. A level with one column (row) has no second corner there: it is put at −3, where no point is."""
    level = torch.repeat_interleave(torch.tensor(points))
    height, width = torch.tensor(shapes).unbind(1)
    start = (height * width).cumsum(0) - height * width
    height, width, start = height[level], width[level], start[level]                     # (T,) each
    right, down = (width > 1).long(), (height > 1) * width
    size = torch.stack([width, height])
    second = torch.stack([torch.zeros_like(size), torch.where(size > 1, 1, -3)])
    corners = start + torch.stack([0 * start, right, down, right + down])

    def over_heads(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x[..., None, None, :].expand(*x.shape[:-1], 1, heads, -1).to(device, dtype).contiguous()

    return Grid(over_heads(size, real), over_heads((size - 2).clamp(min=0), real), over_heads(second, real),
                over_heads(width * heads, index),
                over_heads(corners * heads, index) + torch.arange(heads, dtype=index, device=device)[:, None])


def tent_(x: Tensor) -> Tensor:
    """max(0, 1 − |x|), in place."""
    return torch.sub(ONE, x.abs_(), out=x).clamp_(min=0)


class Block:
    """The lists of one block of queries: k of them, for M heads and T points each.

    offset (2, k, M, T): xy relative to the cell's first pixel; tents (2, 2, k, M, T): of corners 0 and 1, of x and y;
    rows (4, k, M, T): where in the table the corners are.
    """

    def __init__(self, queries: int, grid: Grid):
        self.grid = grid
        heads, points = grid.size.shape[2:]
        plane = (queries, heads, points)
        self.offset, self.corner = grid.size.new_empty(2, *plane), grid.size.new_empty(2, *plane)
        self.tents = grid.size.new_empty(2, 2, *plane)
        self.pixel = grid.down.new_empty(2, *plane)
        self.rows = grid.down.new_empty(4, *plane)

    def locate(self, locations: Tensor, image: Tensor):
        """Fill the lists from locations (k, M, T, 2); image (k, 1, 1) is the first row of each query's image."""
        grid, heads = self.grid, locations.shape[1]
        xy = torch.mul(locations.movedim(-1, 0), grid.size, out=self.offset).sub_(0.5).nan_to_num_(nan=-9.0)
        F.threshold_(xy, -1, -9)                                            # at −1 and below: outside, slope included
        torch.minimum(xy, grid.top, out=self.corner).clamp_(min=0).trunc_()
        torch.sub(xy.sub_(self.corner), grid.second, out=self.tents)
        tent_(self.tents)
        self.pixel.copy_(self.corner)
        cell = self.pixel[1].mul_(grid.down).add_(self.pixel[0], alpha=heads).add_(image)
        torch.add(cell, grid.corners, out=self.rows)


def blocks(locations: Tensor, grid: Grid, image_rows: int):
    """Yield (first query, last query, located Block) over all B*Q queries; their lists are valid until the next block."""
    batch, queries, heads, points = locations.shape[:4]
    flat = locations.flatten(0, 1)                                                      # (B*Q, M, T, 2)
    image = torch.arange(batch, dtype=grid.down.dtype, device=flat.device) * image_rows
    image = image.repeat_interleave(queries)[:, None, None]
    step, block = max(1, BLOCK // (heads * points)), None
    for first in range(0, len(flat), step):
        last = min(first + step, len(flat))
        if block is None or last - first < step:
            block = Block(last - first, grid)
        block.locate(flat[first:last], image[first:last])
        yield first, last, block


def bag_setup(value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor) -> tuple[Tensor, Grid]:
    """The table (B*S*M, d) in float32 or float64, and the constants."""
    batch, tokens, heads, dim = value.shape
    real = torch.float64 if value.dtype == torch.float64 else torch.float32
    index = torch.int32 if max(batch * tokens * heads, locations.numel()) < 2 ** 31 else torch.int64
    shapes = tuple(zip(sizes[::2], sizes[1::2]))
    return value.to(real).reshape(-1, dim), make_grid(shapes, tuple(points), heads, real, index, value.device)


def bag_forward(value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor, weights: Tensor) -> Tensor:
    """Eq. 3 as four bags of T rows for each query and head, one for each corner."""
    batch, tokens, heads, dim = value.shape
    queries, count = locations.shape[1], locations.shape[3]
    table, grid = bag_setup(value, sizes, points, locations)
    out = table.new_empty(batch * queries, heads, dim)
    weights = weights.to(table.dtype).flatten(0, 1)
    share = None                                                            # (2, 2, k, M, T): weight of each corner
    for first, last, block in blocks(locations.to(table.dtype), grid, tokens * heads):
        if share is None or share.shape[2] != last - first:
            share = torch.empty_like(block.tents)
            begin = torch.arange(0, share[0, 0].numel(), count, dtype=grid.down.dtype, device=value.device)
        along_x, along_y = block.tents.unbind(1)
        torch.mul(along_y.mul_(weights[first:last])[:, None], along_x, out=share)
        sums = [bag(table, rows, begin, w) for rows, w in zip(block.rows, share.flatten(0, 1))]
        out[first:last] = sums[0].add_(sums[1]).add_(sums[2]).add_(sums[3]).view(-1, heads, dim)
    return out.view(batch, queries, heads * dim).to(value.dtype)


def bag(table: Tensor, rows: Tensor, begin: Tensor, weights: Tensor) -> Tensor:
    """(bags, d): for each bag i, the sum of weights · table[rows] over entries begin[i] to begin[i + 1]."""
    return torch.embedding_bag(table, rows.view(-1), begin, False, 0, False, weights.view(-1))[0]      # 0: sum


# The backward pass of one point, with g = ∂loss/∂out[q, m] and s the sampled vector:
#
#     ∂weight = <g, s>      ∂location = weight · (W, H) · <g, ∂s/∂(x, y)>      ∂v_corner += weight · tents · g
#
# All of the first two come from four numbers per point, the products <g, v_corner>: `sampled_addmm` computes exactly
# them, a few entries of the matrix g · tableᵀ. The third is a weighted sum again, now over the points that touch a
# pixel: sort the points by cell, and it is a bag whose table is g. Both beat index_add_ and index_select by far.


def bag_backward(grad: Tensor, value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor,
                 weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, for grad (B, Q, M*d)."""
    batch, tokens, heads, dim = value.shape
    queries, count = locations.shape[1], locations.shape[3]
    table, grid = bag_setup(value, sizes, points, locations)
    g = grad.to(table.dtype).reshape(-1, dim)                                           # (B*Q*M, d)
    flat_weights = weights.to(table.dtype).flatten(0, 1)                                # (B*Q, M, T)
    d_locations, d_weights = table.new_empty(*flat_weights.shape, 2), torch.empty_like(flat_weights)
    cell = torch.empty(flat_weights.shape, dtype=grid.down.dtype, device=value.device)
    share = table.new_empty(2, 2, *flat_weights.shape)                                  # y, x corner: weight · tents
    for first, last, block in blocks(locations.to(table.dtype), grid, tokens * heads):
        weight, (along_x, along_y) = flat_weights[first:last], block.tents.unbind(1)
        torch.mul((along_y * weight)[:, None], along_x, out=share[:, :, first:last])
        cell[first:last] = block.rows[0]
        dots = products(g[first * heads:last * heads], table, block.rows).view_as(block.tents)      # y, x corner
        over_x, over_y = (dots * along_x).sum(1), (dots * along_y[:, None]).sum(0)
        slope_x, slope_y = slopes(block.offset, grid).unbind(1)
        d_weights[first:last] = (over_x * along_y).sum(0)
        d_xy = torch.stack([(over_y * slope_x).sum(0), (over_x * slope_y).sum(0)])
        d_locations[first:last] = d_xy.mul_(weight).mul_(grid.size).movedim(0, -1)
    d_value = spread(g, cell.view(-1), share.view(4, -1), sizes, table.shape[0], batch, heads, count)
    return (d_value.view_as(value).to(value.dtype), d_locations.view_as(locations).to(locations.dtype),
            d_weights.view_as(weights).to(weights.dtype))


def slopes(offset: Tensor, grid: Grid) -> Tensor:
    """Derivatives of the tents (2, 2, k, M, T). A tent is straight between two pixels: its slope there is its difference."""
    left = torch.sub(offset.floor(), grid.second)
    return tent_(left + 1).sub_(tent_(left))


def products(g: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """<g[i], table[r]> for the rows r of bag i: for rows (4, k, M, T) and g (k*M, d) the result is (4, k*M*T)."""
    begin = torch.arange(0, rows[0].numel() + 1, rows.shape[-1], dtype=rows.dtype, device=rows.device)
    dots = table.new_zeros(4, rows[0].numel())
    for row, dot in zip(rows.flatten(1), dots):
        entries = torch.sparse_csr_tensor(begin, row, dot, (len(g), len(table)), check_invariants=False)
        torch.sparse.sampled_addmm(entries, g, table.T, beta=0, out=entries)               # writes into `dot`
    return dots


def spread(g: Tensor, cell: Tensor, share: Tensor, sizes: Sequence, rows: int, batch: int, heads: int, count: int) -> Tensor:
    """∂value (rows, d): g[i] goes to the corners of the cells of points i*T … i*T + T − 1, with the weights `share` (4, N)."""
    order = cell.sort(stable=True).indices
    share = share.index_select(1, order)
    source = torch.arange(len(g), dtype=cell.dtype, device=cell.device)[:, None].expand(-1, count).reshape(-1)
    source = source.index_select(0, order)
    begin = torch.zeros(rows + 1, dtype=cell.dtype, device=cell.device)                   # first point of each cell
    begin[1:] = torch.bincount(cell, minlength=rows).cumsum(0)
    out, start = g.new_zeros(rows, g.shape[1]), 0
    for height, width in list(zip(sizes[::2], sizes[1::2])) * batch:
        end, right, down = start + height * width * heads, (width > 1) * heads, (height > 1) * width * heads
        for first in range(start, end, CHUNK):
            last = min(first + CHUNK, end)
            low, high = int(begin[first]), int(begin[last])
            for corner, shift in enumerate((0, right, down, right + down)):
                cells = min(last, end - shift) - first                                    # the last ones have no points
                if low < high and cells > 0:
                    sums = bag(g, source[low:high], begin[first:last] - low, share[corner, low:high])
                    out[first + shift:first + shift + cells] += sums[:cells]
        start = end
    return out


# ----------------------------------------------------------------------------- the Triton kernels
#
# A Triton kernel is written for a block of numbers at once: `tl.arange(0, 16)` is 16 numbers, `tl.load(pointer + them)`
# 16 loads, and the compiler hands the block out to the threads. Many copies of the kernel ("programs") run side by
# side and differ in `tl.program_id` only.
#
#     one program = QUERIES queries of one image and one head                 64 threads, CHUNK = 16 channels
#
#                     channels 0 … 15   16 … 31  …                a thread holds 16 bytes of a row: 4 channels in
#         query 0     [ th 0 |1 |2 |3 ] [ the same threads ]      float32, 8 in 16 bits; so a row of the block is
#         query 1     [ th 4 |5 |6 |7 ] [                  ]      shared by 4 (2) threads, and the next chunk of
#         …                                                       channels by the same ones
#
# Why like this. The arithmetic of eq. 3 is small, and the feature maps of an image fit into the L2 cache (4 MB at
# DETRPose-L in 16 bits): what costs is the number of instructions, and most of them would find out where a point lies
# and what its four weights are. The CUDA extension of the paper gives every channel a thread of its own, so it does
# that 32 times per point and head. Here 4 (2) threads do it, in registers, and keep it for all chunks of channels.
# Narrower chunks would mean fewer instructions still, but each load should bring whole 32-byte sectors. The chunks
# also make any head dimension free of waste: 48 is three chunks, where a block must be a power of two wide.
#   Loaded how often: each location and weight once; four pixels per point, out of L1 or L2; nothing else. out is
# written once. Nothing of size queries · points · channels exists, there is no shared memory, and no barrier.
#   The loop over points is a loop at run time: unrolled it needs over 250 registers a thread, which leaves room for
# few threads at a time; as it is, 32 to 60 do. A table per point (W, H, first token of its level) instead of a
# loop over levels makes unequal numbers of points free.
#   No masks on the four loads, for the same reason as above: the cell is clamped to lie inside of the level and the
# tents of far pixels are 0. A masked load also needs its registers set to 0 first, 16 instructions per point.


@triton.jit
def tent(x, top):
    """max(0, top − |x|), top = 1 (or 0: no such pixel). A NaN gives 0: tl.maximum takes the operand that is a number."""
    return tl.maximum(top - tl.abs(x), 0.0)


@triton.jit
def cell_start(coordinate, side):
    """The first pixel, on one axis, of the cell around a coordinate, clamped to 0 … side − 2 (to 0 if side is 1)."""
    return tl.floor(tl.maximum(tl.minimum(coordinate, side - 2), 0.0))


@triton.jit
def forward_kernel(value, sides, tokens_at, locations, weights, out, queries, tokens, points,
                   HEADS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
                   QUERIES: tl.constexpr, THIN: tl.constexpr):
    """Eq. 3 for QUERIES queries of one image and head.

    sides (T, 2) float32: W, H of each point's level; tokens_at (T, 2) int32: W and the level's first token.
    THIN: some level has a side of one pixel, so a neighbour may not exist.
    """
    blocks = tl.cdiv(queries, QUERIES)
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, head = (pair // HEADS).to(tl.int64), pair % HEADS                # 64 bits: batches may pass 2³¹ numbers
    query = tl.arange(0, QUERIES)
    valid = block * QUERIES + query < queries
    first = (image * queries + block * QUERIES) * HEADS + head              # of all (image, query, head)
    value += image * tokens * HEADS * DIM + head * DIM
    locations += first * points * 2
    weights += first * points
    out += first * DIM
    list_at = query * (HEADS * points)                                      # where a query's T points start
    channel = tl.arange(0, CHUNK)
    sums = ()
    for chunk in tl.static_range(CHUNKS):
        sums += (tl.zeros((QUERIES, CHUNK), tl.float32),)

    for t in range(points):
        width, height = tl.load(sides + 2 * t), tl.load(sides + 2 * t + 1)
        row, start = tl.load(tokens_at + 2 * t), tl.load(tokens_at + 2 * t + 1)
        x = tl.load(locations + 2 * (list_at + t), mask=valid, other=-9.0).to(tl.float32) * width - 0.5
        y = tl.load(locations + 2 * (list_at + t) + 1, mask=valid, other=-9.0).to(tl.float32) * height - 0.5
        weight = tl.load(weights + list_at + t, mask=valid, other=0.0).to(tl.float32)
        column, line = cell_start(x, width), cell_start(y, height)
        top_x, top_y, right, down = 1.0, 1.0, HEADS * DIM, row * (HEADS * DIM)
        if THIN:
            top_x, top_y = tl.minimum(width - 1, 1.0), tl.minimum(height - 1, 1.0)
            right, down = tl.where(width > 1, right, 0), tl.where(height > 1, down, 0)
        x0, x1 = tent(x - column, 1.0), tent(x - column - 1, top_x)
        y0, y1 = tent(y - line, 1.0) * weight, tent(y - line - 1, top_y) * weight
        token = start + line.to(tl.int32) * row + column.to(tl.int32)
        corner = value + token * (HEADS * DIM)                              # channel 0 of v00, for each query
        added = ()
        for chunk in tl.static_range(CHUNKS):
            at = corner[:, None] + (chunk * CHUNK + channel)[None, :]
            there = None
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


# The backward kernel has the same programs and the same loop. Of a point it needs the four products <g, v_corner>: they
# give the gradients of weight and location (see `bag_backward`), and cost a sum over the threads of a row each.
# Nothing is saved in the forward pass but its inputs: the cell and the tents are computed again, which is cheaper than
# reading them. The gradient of a pixel is added up in memory by all programs that touch it ("atomically"), four
# channels per instruction on a Hopper GPU. In which order they come is chance, and with it the last bits. When
# torch.use_deterministic_algorithms(True) is set, FIXED adds whole numbers instead, where the order is no matter:
# gradients are multiplied by `unit`, a power of two so large that the sum of all just fits into 64 bits.


@triton.jit
def add(pointer, share, g, unit, there, FIXED: tl.constexpr):
    """Add share · g to the gradients at the pointer, where share is not 0."""
    amount = share[:, None] * g
    if FIXED:
        tl.atomic_add(pointer, (amount * unit).to(tl.int64), mask=there & (share != 0)[:, None], sem="relaxed")
    else:
        tl.atomic_add(pointer, amount, mask=there & (share != 0)[:, None], sem="relaxed")


@triton.jit
def backward_kernel(grad, value, sides, tokens_at, locations, weights, unit_at, d_value, d_locations, d_weights,
                    queries, tokens, points, HEADS: tl.constexpr, DIM: tl.constexpr, CHUNK: tl.constexpr,
                    CHUNKS: tl.constexpr, QUERIES: tl.constexpr, THIN: tl.constexpr, FIXED: tl.constexpr):
    """Gradients for QUERIES queries of one image and head; arguments as in `forward_kernel`.

    d_value is float32 (int64 in units of 1/unit if FIXED) and starts as zeros.
    """
    blocks = tl.cdiv(queries, QUERIES)
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    image, head = (pair // HEADS).to(tl.int64), pair % HEADS
    query = tl.arange(0, QUERIES)
    valid = block * QUERIES + query < queries
    first = (image * queries + block * QUERIES) * HEADS + head
    value += image * tokens * HEADS * DIM + head * DIM
    d_value += image * tokens * HEADS * DIM + head * DIM
    grad += first * DIM
    locations += first * points * 2
    weights += first * points
    d_locations += first * points * 2
    d_weights += first * points
    list_at = query * (HEADS * points)
    channel = tl.arange(0, CHUNK)
    unit = 1.0
    if FIXED:
        unit = tl.load(unit_at)
    g = ()
    for chunk in tl.static_range(CHUNKS):
        mask = valid[:, None] & (chunk * CHUNK + channel < DIM)[None, :]
        rows = grad + (query * (HEADS * DIM))[:, None]
        g += (tl.load(rows + (chunk * CHUNK + channel)[None, :], mask=mask, other=0.0).to(tl.float32),)

    for t in range(points):
        width, height = tl.load(sides + 2 * t), tl.load(sides + 2 * t + 1)
        row, start = tl.load(tokens_at + 2 * t), tl.load(tokens_at + 2 * t + 1)
        x = tl.load(locations + 2 * (list_at + t), mask=valid, other=-9.0).to(tl.float32) * width - 0.5
        y = tl.load(locations + 2 * (list_at + t) + 1, mask=valid, other=-9.0).to(tl.float32) * height - 0.5
        weight = tl.load(weights + list_at + t, mask=valid, other=0.0).to(tl.float32)
        column, line = cell_start(x, width), cell_start(y, height)
        top_x, top_y, right, down = 1.0, 1.0, HEADS * DIM, row * (HEADS * DIM)
        if THIN:
            top_x, top_y = tl.minimum(width - 1, 1.0), tl.minimum(height - 1, 1.0)
            right, down = tl.where(width > 1, right, 0), tl.where(height > 1, down, 0)
        x = tl.where(x > -1, x - column, -9.0)                              # from the cell's first pixel; −9: outside
        y = tl.where(y > -1, y - line, -9.0)
        x0, x1, y0, y1 = tent(x, 1.0), tent(x - 1, top_x), tent(y, 1.0), tent(y - 1, top_y)
        x, y = tl.floor(x), tl.floor(y)                                     # a slope is a difference between two pixels
        slope_x0, slope_x1 = tent(x + 1, 1.0) - tent(x, 1.0), tent(x, top_x) - tent(x - 1, top_x)
        slope_y0, slope_y1 = tent(y + 1, 1.0) - tent(y, 1.0), tent(y, top_y) - tent(y - 1, top_y)
        token = start + line.to(tl.int32) * row + column.to(tl.int32)
        corner_at = token * (HEADS * DIM)                                   # channel 0 of v00, for each query
        g00 = tl.zeros((QUERIES, CHUNK), tl.float32)                        # g · v00 and so on, channel by channel
        g01, g10, g11 = g00, g00, g00
        for chunk in tl.static_range(CHUNKS):
            at = corner_at[:, None] + (chunk * CHUNK + channel)[None, :]
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
        d_weight = y0 * upper + y1 * lower
        d_y = weight * height * (slope_y0 * upper + slope_y1 * lower)
        d_x = weight * width * (y0 * (slope_x0 * v00 + slope_x1 * v01) + y1 * (slope_x0 * v10 + slope_x1 * v11))
        tl.store(d_weights + list_at + t, d_weight, mask=valid)
        tl.store(d_locations + 2 * (list_at + t), d_x, mask=valid)
        tl.store(d_locations + 2 * (list_at + t) + 1, d_y, mask=valid)


def forward_shape(dim: int, bits: int) -> dict:
    """Launch of `forward_kernel`: two warps, a thread holds 128 bits of a row."""
    return launch_shape(dim, width=16, channels=128 // bits, warps=2)


def backward_shape(dim: int) -> dict:
    """Launch of `backward_kernel`: narrower chunks, since a point costs more; four channels, the most that one atomic
    instruction adds; and one warp, so that gradients on their way to memory need not pass from warp to warp."""
    return launch_shape(dim, width=8, channels=4, warps=1)


def launch_shape(dim: int, width: int, channels: int, warps: int) -> dict:
    """CHUNK is `width`, less for small heads, more if there were over 8 chunks (registers); QUERIES follows."""
    chunk = min(width, triton.next_power_of_2(dim))
    while dim > 8 * chunk:
        chunk *= 2
    queries = 32 * warps * min(channels, chunk) // chunk
    return dict(CHUNK=chunk, CHUNKS=triton.cdiv(dim, chunk), QUERIES=queries, num_warps=warps)


@lru_cache(maxsize=64)
def make_tables(sizes: tuple, points: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of the T points W and H (T, 2) float32, and W and the first token of its level (T, 2) int32."""
    level = torch.repeat_interleave(torch.tensor(points))
    shapes = torch.tensor(sizes).view(-1, 2)
    tokens = shapes.prod(1)
    sides = shapes.flip(1)[level]
    tokens_at = torch.stack([sides[:, 0], (tokens.cumsum(0) - tokens)[level]], 1)
    return sides.to(device, torch.float32), tokens_at.to(device, torch.int32)


def triton_forward(value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor, weights: Tensor) -> Tensor:
    """Eq. 3 by `forward_kernel`. Kernels know no strides: everything is made contiguous."""
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    batch, tokens, heads, dim = value.shape
    queries, count = locations.shape[1], locations.shape[3]
    out = value.new_empty(batch, queries, heads * dim)
    shape = forward_shape(dim, 8 * value.element_size())
    with torch.cuda.device_of(value):
        forward_kernel[(triton.cdiv(queries, shape["QUERIES"]) * batch * heads,)](
            value, *make_tables(tuple(sizes), tuple(points), value.device), locations, weights, out,
            queries, tokens, count, HEADS=heads, DIM=dim, THIN=min(sizes) == 1, **shape)
    return out


def triton_backward(grad: Tensor, value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor,
                    weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by `backward_kernel`."""
    grad, value, locations, weights = grad.contiguous(), value.contiguous(), locations.contiguous(), weights.contiguous()
    batch, tokens, heads, dim = value.shape
    queries, count = locations.shape[1], locations.shape[3]
    fixed = torch.are_deterministic_algorithms_enabled()
    unit = largest_unit(grad, weights, queries * count) if fixed else grad          # not read unless fixed
    d_value = torch.zeros_like(value, dtype=torch.int64 if fixed else torch.float32)
    d_locations, d_weights = torch.empty_like(locations), torch.empty_like(weights)
    shape = backward_shape(dim)
    with torch.cuda.device_of(value):
        backward_kernel[(triton.cdiv(queries, shape["QUERIES"]) * batch * heads,)](
            grad, value, *make_tables(tuple(sizes), tuple(points), value.device), locations, weights, unit,
            d_value, d_locations, d_weights, queries, tokens, count,
            HEADS=heads, DIM=dim, THIN=min(sizes) == 1, FIXED=fixed, **shape)
    return (d_value / unit if fixed else d_value).to(value.dtype), d_locations, d_weights


def largest_unit(grad: Tensor, weights: Tensor, count: int) -> Tensor:
    """(1,) float32: the power of two by which `count` gradients of one pixel may be multiplied and stay below 2⁶²."""
    bound = grad.abs().max().float() * weights.abs().max().float() * count
    return torch.exp2((62 - bound.clamp(min=2.0 ** -60).log2()).floor()).view(1)


# ----------------------------------------------------------------------------- the operator
#
# PyTorch knows deform_attn as an operator, so that torch.compile and torch.export keep it as one step and the FLOP
# counter counts it. Which form runs is decided inside, see dispatch.py.


@torch.library.custom_op("pose::deform_attn", mutates_args=())
def forward_op(value: Tensor, sizes: Sequence[int], points: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Eq. 3 for checked arguments; sizes is H, W of level 0, H, W of level 1, …"""
    if locations.numel() == 0:
        return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    form = bag_forward if value.dtype == torch.float64 else triton_forward
    return choose("deform_attn", form, bag_forward, value, sizes, points, locations, weights)


@torch.library.custom_op("pose::deform_attn_backward", mutates_args=())
def backward_op(grad: Tensor, value: Tensor, sizes: Sequence[int], points: Sequence[int], locations: Tensor,
                weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights."""
    if locations.numel() == 0:
        return torch.zeros_like(value), torch.zeros_like(locations), torch.zeros_like(weights)
    form = bag_backward if value.dtype == torch.float64 else triton_backward
    return choose("deform_attn_backward", form, bag_backward, grad, value, sizes, points, locations, weights)


@forward_op.register_fake
def _(value, sizes, points, locations, weights):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@backward_op.register_fake
def _(grad, value, sizes, points, locations, weights):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (value, locations, weights))


def keep_inputs(ctx, inputs, output):
    value, ctx.sizes, ctx.points, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def backward(ctx, grad):
    value, locations, weights = ctx.saved_tensors
    d_value, d_locations, d_weights = backward_op(grad, value, ctx.sizes, ctx.points, locations, weights)
    return d_value, None, None, d_locations, d_weights


def no_second_derivative(ctx, *grads):
    raise NotImplementedError("deform_attn has no second derivative: use deform_attn_plain where one is needed")


forward_op.register_autograd(backward, setup_context=keep_inputs)
backward_op.register_autograd(no_second_derivative)


@register_flop_formula(torch.ops.pose.deform_attn)
def forward_flops(value, sizes, points, locations, weights, **kwargs) -> int:
    """5 multiply-adds per point and channel, four corners and the weight: the paper's 5·N_q·K·C."""
    return 2 * 5 * math.prod(weights) * value[3]


@register_flop_formula(torch.ops.pose.deform_attn_backward)
def backward_flops(grad, value, sizes, points, locations, weights, **kwargs) -> int:
    """A product and an addition for each corner instead of one: twice the forward pass."""
    return 2 * forward_flops(value, sizes, points, locations, weights)


# ----------------------------------------------------------------------------- what methods call


def deform_attn(value: Tensor, shapes: Sequence, locations: Tensor, weights: Tensor, points: Sequence | None = None) -> Tensor:
    """Multi-scale deformable attention (eq. 3), differentiable once in value, locations and weights.

    Takes    value (B, S, M, d), the levels one after the other; shapes [(H, W), …] of the levels, Python integers;
             locations (B, Q, M, T, 2) or (B, Q, M, L, P, 2), xy in [0, 1]; weights (B, Q, M, T) or (B, Q, M, L, P);
             points per level, e.g. [3, 6, 3], by default the same on all
    Returns  (B, Q, M*d) in value's type, heads one after the other; empty if Q is 0
    Raises   ValueError, with the numbers, for tensors that do not fit together
    """
    locations, weights, points = by_point(locations, weights, points, len(shapes))
    check(value, shapes, locations, weights, points)
    if not torch.compiler.is_compiling() and plain_is_faster(value, locations):
        return deform_attn_plain(value, shapes, locations, weights, points)
    return forward_op(value, [side for shape in shapes for side in shape], points, locations, weights)


def plain_is_faster(value: Tensor, locations: Tensor) -> bool:
    """On a GPU without Triton always; on a CPU for small inputs, where the number of calls decides, not the work in them."""
    if mode() == "triton":
        return False
    if value.is_cuda:
        return value.dtype == torch.float64 or not use_triton(value)
    return locations.numel() // 2 * value.shape[3] < (2 ** 18 if torch.is_grad_enabled() else 2 ** 16)


def check(value: Tensor, shapes: Sequence, locations: Tensor, weights: Tensor, points: list):
    """Raise ValueError if the arguments do not fit together."""
    if value.ndim != 4 or locations.ndim != 5 or locations.shape[4] != 2 or weights.shape != locations.shape[:4]:
        raise ValueError("deform_attn wants value (B, S, M, d), locations (B, Q, M, T, 2) and weights (B, Q, M, T), not "
                         f"{tuple(value.shape)}, {tuple(locations.shape)} and {tuple(weights.shape)}")
    batch, tokens, heads, dim = value.shape
    if locations.shape[0] != batch or locations.shape[2] != heads:
        raise ValueError(f"value has {batch} images and {heads} heads, locations {locations.shape[0]} and {locations.shape[2]}")
    if sum(height * width for height, width in shapes) != tokens or min(min(shape) for shape in shapes) < 1:
        raise ValueError(f"shapes {[tuple(shape) for shape in shapes]} do not hold the {tokens} tokens of value")
    if len(points) != len(shapes) or min(points) < 1 or sum(points) != locations.shape[3]:
        raise ValueError(f"points {points} on {len(shapes)} levels do not make the {locations.shape[3]} points of locations")
    if not value.device == locations.device == weights.device:
        raise ValueError(f"value is on {value.device}, locations on {locations.device}, weights on {weights.device}")
    if not (value.is_floating_point() and locations.is_floating_point() and weights.is_floating_point()):
        raise ValueError(f"value, locations and weights are {value.dtype}, {locations.dtype} and {weights.dtype}, not floating")
    if tokens * heads * dim >= 2 ** 31:
        raise ValueError(f"an image of {tokens} tokens with {heads} heads of {dim} has 2³¹ numbers or more: too large")


def deform_attn_offsets(value: Tensor, shapes: Sequence, reference: Tensor, offsets: Tensor, logits: Tensor,
                        points: Sequence | None = None) -> Tensor:
    """`deform_attn` from what a layer predicts: weights are the softmax of the logits over all T points, and

        location = xy + offset / (W, H)          reference (B, Q, 1 or L, 2): xy, offsets in pixels of the level
        location = xy + offset · wh / 2P         reference (B, Q, 1 or L, 4): xy, wh, offsets in parts of the box

    with one reference for all levels or one for each; offsets (B, Q, M, T, 2), logits (B, Q, M, T). Locations and
    weights are float32 also where autocast made the offsets 16 bits (float64 for float64 values).
    """
    offsets, logits, points = by_point(offsets, logits, points, len(shapes))
    real = torch.float64 if value.dtype == torch.float64 else torch.float32
    reference, offsets = reference.to(real), offsets.to(real)
    level = torch.repeat_interleave(torch.tensor(points)).to(value.device)
    reference = reference[:, :, None] if reference.shape[2] == 1 else reference[:, :, level][:, :, None]    # (B, Q, 1, 1|T, 2|4)
    if reference.shape[-1] == 2:
        scale = 1 / torch.tensor(shapes, dtype=real, device=value.device).flip(1)[level]
    else:
        scale = reference[..., 2:] / (2 * torch.tensor(points, device=value.device)[level, None])
    locations = reference[..., :2] + offsets * scale
    return deform_attn(value, shapes, locations, logits.to(real).softmax(-1), points)
