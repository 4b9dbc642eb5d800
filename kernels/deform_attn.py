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
Read      deform_attn_plain (the formula) → the bags (fast on a CPU) → the Triton kernels → deform_attn
Letters   B images  Q queries  M heads  d channels per head  L levels  P points of a level  T of all levels
          S = ΣH·W tokens: level by level, in raster order
Units     locations are xy in [0, 1] of the (padded) level: 0 and 1 are the outer edges of the border pixels
Type      out has the type of `value`. Arithmetic is float32 (float64 for float64 values). Keep locations in
          float32: bfloat16 moves a point by up to 0.16 pixels on a level of 80.
Outside   A point at x ≤ −1, y ≤ −1, x ≥ W or y ≥ H counts 0 and gets gradient 0, and so does one at a NaN or
          infinite location. An infinite *value* may spoil other points: weight 0 times infinity is NaN.
"""
import math
import warnings
from functools import lru_cache
from typing import Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.dispatch import choose, gave_up, mode, tl, triton, use_triton

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")       # see `products`

# ----------------------------------------------------------------------------- the formula


def deform_attn_plain(value: Tensor, shapes: Sequence, locations: Tensor, weights: Tensor,
                      points: Sequence | None = None) -> Tensor:
    """Eq. 3 in plain PyTorch, level by level: the form to read, which the others are tested against.

    Takes and returns what `deform_attn` does. `F.grid_sample` interpolates; its coordinates run from −1 to 1.
    """
    locations, weights, points = by_point(locations, weights, points, len(shapes))
    batch, _, heads, dim = value.shape
    real = working_type(value)
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


def working_type(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------- the bags: fast on a CPU
#
# out[q, m] is a weighted sum of 4T rows of the table `value.view(B*S*M, d)`. PyTorch has one operator for
# weighted sums of table rows, made for word embeddings and much faster than grid_sample: embedding_bag.
# What remains is to write down which rows and which weights. That costs more than the sums, unless it is
# done with care:
#   * queries go in blocks whose lists stay in the L2 cache, in buffers that the next block uses again;
#   * x and y, and the four corners, are separate planes: each operation runs over contiguous numbers;
#   * no masks: a corner counts the product of two tents, max(0, 1 − |x − column|) and max(0, 1 − |y − row|),
#     which is 0 by itself for a pixel too far away. So the cell, the square between four pixels around the
#     point, may be moved to the nearest one inside of the level.

BLOCK = 2 ** 15         # points whose lists are held at once, 20 numbers for each
CHUNK = 2 ** 13         # rows of ∂value that the backward pass completes at once
ONE = torch.tensor(1.0)


class Grid(NamedTuple):
    """What the levels mean for each point, repeated for M heads: operations then run over M*T numbers."""
    size: Tensor        # (2, 1, M, T)     W and H
    top: Tensor         # (2, 1, M, T)     the last cell: W − 2 and H − 2, but at least 0
    second: Tensor      # (2, 2, 1, M, T)  where corners 0 and 1 of a cell are, in x and y: 0 and 1
    down: Tensor        # (1, M, T)        rows of the table from a pixel to the one below: W*M
    corners: Tensor     # (4, 1, M, T)     rows of v00, v01, v10, v11 of the level's first cell


@lru_cache(maxsize=64)
def make_grid(shapes: tuple, points: tuple, heads: int, real: torch.dtype, index: torch.dtype,
              device: torch.device) -> Grid:
    """The constants of a call. On a level one pixel wide (high), corner 1 is put at −3, where no point is."""
    level = torch.repeat_interleave(torch.tensor(points))
    height, width = torch.tensor(shapes).unbind(1)
    start = (height * width).cumsum(0) - height * width
    height, width, start = height[level], width[level], start[level]                    # (T,) each
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
    """The lists of a block of k queries, for M heads and T points each.

    offset (2, k, M, T): xy from the cell's first pixel; tents (2, 2, k, M, T): of corners 0 and 1, of x and
    y; rows (4, k, M, T): where in the table the corners are.
    """

    def __init__(self, queries: int, grid: Grid):
        self.grid = grid
        plane = (queries, *grid.size.shape[2:])
        self.offset, self.corner = grid.size.new_empty(2, *plane), grid.size.new_empty(2, *plane)
        self.tents = grid.size.new_empty(2, 2, *plane)
        self.pixel, self.rows = grid.down.new_empty(2, *plane), grid.down.new_empty(4, *plane)

    def locate(self, locations: Tensor, image: Tensor):
        """Fill the lists, from locations (k, M, T, 2) and the first row of each query's image (k, 1, 1)."""
        grid, heads = self.grid, locations.shape[1]
        xy = torch.mul(locations.movedim(-1, 0), grid.size, out=self.offset).sub_(0.5).nan_to_num_(nan=-9.0)
        F.threshold_(xy, -1, -9)                                # at −1 and below: outside, slopes included
        torch.minimum(xy, grid.top, out=self.corner).clamp_(min=0).trunc_()
        torch.sub(xy.sub_(self.corner), grid.second, out=self.tents)
        tent_(self.tents)
        self.pixel.copy_(self.corner)
        cell = self.pixel[1].mul_(grid.down).add_(self.pixel[0], alpha=heads).add_(image)
        torch.add(cell, grid.corners, out=self.rows)


def blocks(locations: Tensor, grid: Grid, image_rows: int) -> Iterator[tuple[int, int, Block]]:
    """Over all B*Q queries: (first, last, their located Block), whose lists hold until the next block."""
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
    """The table (B*S*M, d), and the constants."""
    batch, tokens, heads, dim = value.shape
    index = torch.int32 if max(batch * tokens * heads, locations.numel()) < 2 ** 31 else torch.int64
    shapes, real = tuple(zip(sizes[::2], sizes[1::2])), working_type(value)
    table = value.to(real).reshape(-1, dim)
    return table, make_grid(shapes, tuple(points), heads, real, index, value.device)


def bag_forward(value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor,
                weights: Tensor) -> Tensor:
    """Eq. 3 as four bags of T rows for each query and head, one for each corner."""
    batch, tokens, heads, dim = value.shape
    queries, count = locations.shape[1], locations.shape[3]
    table, grid = bag_setup(value, sizes, points, locations)
    out = table.new_empty(batch * queries, heads, dim)
    weights = weights.to(table.dtype).flatten(0, 1)
    share = None                                                    # (2, 2, k, M, T): what each corner counts
    for first, last, block in blocks(locations.to(table.dtype), grid, tokens * heads):
        if share is None or share.shape[2] != last - first:
            share = torch.empty_like(block.tents)
            begin = torch.arange(0, share[0, 0].numel(), count, dtype=grid.down.dtype, device=value.device)
        along_x, along_y = block.tents.unbind(1)
        torch.mul(along_y.mul_(weights[first:last])[:, None], along_x, out=share)
        sums = [bag(table, rows, begin, amounts) for rows, amounts in zip(block.rows, share.flatten(0, 1))]
        out[first:last] = sums[0].add_(sums[1]).add_(sums[2]).add_(sums[3]).view(-1, heads, dim)
    return out.view(batch, queries, heads * dim).to(value.dtype)


def bag(table: Tensor, rows: Tensor, begin: Tensor, weights: Tensor) -> Tensor:
    """(bags, d): for bag i the sum of weights · table[rows] over its entries, begin[i] … begin[i + 1] − 1."""
    mode_sum = 0
    return torch.embedding_bag(table, rows.view(-1), begin, False, mode_sum, False, weights.view(-1))[0]


# The backward pass of one point, with g = ∂loss/∂out[q, m] and s the vector read there:
#
#     ∂weight = <g, s>     ∂location = weight · (W, H) · <g, ∂s/∂(x, y)>     ∂v_corner += weight · tents · g
#
# The first two come from four numbers per point, the products <g, v_corner>. `sampled_addmm` makes exactly
# them: a few entries of the matrix g · tableᵀ. The third is a weighted sum again, now over the points that
# touch a pixel: sort the points by cell, and it is a bag whose table is g. This is about three times as
# fast as index_add_.


def bag_backward(grad: Tensor, value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor,
                 weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, for grad (B, Q, M*d)."""
    batch, tokens, heads, dim = value.shape
    table, grid = bag_setup(value, sizes, points, locations)
    g = grad.to(table.dtype).reshape(-1, dim)                                           # (B*Q*M, d)
    flat_weights = weights.to(table.dtype).flatten(0, 1)                                # (B*Q, M, T)
    d_locations, d_weights = table.new_empty(*flat_weights.shape, 2), torch.empty_like(flat_weights)
    cell = torch.empty(flat_weights.shape, dtype=grid.down.dtype, device=value.device)
    share = table.new_empty(2, 2, *flat_weights.shape)                                  # by corner: y, x
    for first, last, block in blocks(locations.to(table.dtype), grid, tokens * heads):
        weight, (along_x, along_y) = flat_weights[first:last], block.tents.unbind(1)
        torch.mul((along_y * weight)[:, None], along_x, out=share[:, :, first:last])
        cell[first:last] = block.rows[0]
        dots = products(g[first * heads:last * heads], table, block.rows).view_as(block.tents)
        over_x, over_y = (dots * along_x).sum(1), (dots * along_y[:, None]).sum(0)
        slope_x, slope_y = slopes(block.offset, grid).unbind(1)
        d_weights[first:last] = (over_x * along_y).sum(0)
        d_xy = torch.stack([(over_y * slope_x).sum(0), (over_x * slope_y).sum(0)])
        d_locations[first:last] = d_xy.mul_(weight).mul_(grid.size).movedim(0, -1)
    d_value = spread(g, cell, share.flatten(0, 1), list(zip(sizes[::2], sizes[1::2])) * batch, batch * tokens)
    return (d_value.view_as(value).to(value.dtype), d_locations.view_as(locations).to(locations.dtype),
            d_weights.view_as(weights).to(weights.dtype))


def slopes(offset: Tensor, grid: Grid) -> Tensor:
    """Derivatives of the tents (2, 2, k, M, T): between two pixels a tent is straight, so a difference."""
    left = torch.sub(offset.floor(), grid.second)
    return tent_(left + 1).sub_(tent_(left))


def products(g: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """<g[i], table[r]> for the rows r of bag i: g (k*M, d) and rows (4, k, M, T) give (4, k*M*T)."""
    begin = torch.arange(0, rows[0].numel() + 1, rows.shape[-1], dtype=rows.dtype, device=rows.device)
    dots = table.new_zeros(4, rows[0].numel())
    for row, dot in zip(rows.flatten(1), dots):
        entries = torch.sparse_csr_tensor(begin, row, dot, (len(g), len(table)), check_invariants=False)
        torch.sparse.sampled_addmm(entries, g, table.T, beta=0, out=entries)            # writes into `dot`
    return dots


def spread(g: Tensor, cell: Tensor, share: Tensor, levels: list, pixels: int) -> Tensor:
    """∂value (pixels*M, d): each g[i] goes to the corners of the cells of its T points.

    cell (B*Q, M, T) is the row of each point's v00, share (4, B*Q, M, T) what its corners count; levels is
    (H, W) of every level of every image.
    """
    heads, count = cell.shape[1:]
    cell, rows = cell.view(-1), pixels * heads
    order = cell.sort(stable=True).indices
    share = share.view(4, -1).index_select(1, order)
    source = torch.arange(len(g), dtype=cell.dtype, device=cell.device)[:, None].expand(-1, count).reshape(-1)
    source = source.index_select(0, order)
    begin = torch.zeros(rows + 1, dtype=cell.dtype, device=cell.device)             # each cell's first point
    begin[1:] = torch.bincount(cell, minlength=rows).cumsum(0)
    out, start = g.new_zeros(rows, g.shape[1]), 0
    for height, width in levels:
        end, right, down = start + height * width * heads, (width > 1) * heads, (height > 1) * width * heads
        for first in range(start, end, CHUNK):
            last = min(first + CHUNK, end)
            low, high = int(begin[first]), int(begin[last])
            for corner, shift in enumerate((0, right, down, right + down)):
                cells = min(last, end - shift) - first                              # the last have no points
                if low < high and cells > 0:
                    sums = bag(g, source[low:high], begin[first:last] - low, share[corner, low:high])
                    out[first + shift:first + shift + cells] += sums[:cells]
        start = end
    return out


# ----------------------------------------------------------------------------- the Triton kernels
#
# A Triton kernel is written for a block of numbers at once: `tl.arange(0, 16)` is 16 numbers,
# `tl.load(pointer + them)` 16 loads, and the compiler hands the block out to the threads. Many copies of
# the kernel, "programs", run side by side and differ in `tl.program_id` only.
#
#     one program = QUERIES queries of one image and one head              64 threads = 2 warps
#
#                    channels 0 … 15     16 … 31   …             a thread holds 16 bytes of a row: 4 channels in
#         query 0    [ th 0 | 1 | 2 | 3 ][ the same threads ]    float32, 8 in 16 bits. So 4 (2) threads share a
#         query 1    [ th 4 | 5 | 6 | 7 ][                  ]    query, and they do all its CHUNKS of channels
#         …
#
# Why like this. There is little arithmetic in eq. 3, and the feature maps of an image fit into the L2 cache
# (4 MB at DETRPose-L in 16 bits). What costs is the number of instructions, and most of them would find out
# where a point lies and what its corners count. The paper's CUDA extension gives every channel a thread of
# its own, and each of them does that. Here the threads of a query do it once for all of its channels. Per
# query, head and point, with d = 32, a warp executes 13 instructions in float32 and 15 in bfloat16 (`python
# -m kernels.bench --compile`), where the extension has 82. Narrower chunks would save more, but a load
# should bring whole sectors of 32 bytes. Chunks also fit any head dimension: 48 is three of them, while a
# block in one piece has to be 64 wide.
#   What is read how often: a location and a weight once; four pixels per point, from L1 or L2. out is
# written once. Nothing else is: no memory of size queries · points · channels, no shared memory, no barrier
# between threads.
#   The loop over points is a loop at run time. Unrolled it needs 250 registers per thread, which leaves the
# chip room for few threads; as it is, 40 to 70 do. It reads a table with W, H and the first token of each
# point's level, so points may be spread over the levels in any way.
#   No masks on the four loads: the cell lies inside of the level, as in the bags above. Masks would cost 16
# instructions per point, since what a masked load does not fetch has to be set to 0.


@triton.jit
def tent(x, top):
    """max(0, top − |x|); top is 1, or 0 for no pixel. A NaN gives 0: tl.maximum takes the number."""
    return tl.maximum(top - tl.abs(x), 0.0)


@triton.jit
def cell_start(coordinate, side):
    """First pixel, on one axis, of the cell around a coordinate, moved into 0 … side − 2 (0 if side is 1)."""
    return tl.floor(tl.maximum(tl.minimum(coordinate, side - 2), 0.0))


@triton.jit
def read_point(sides, locations, weights, at, t, valid):
    """Pixel coordinates and weight of point t of each query, and W, H of its level. No query: far outside."""
    width, height = tl.load(sides + 2 * t), tl.load(sides + 2 * t + 1)
    x = tl.load(locations + 2 * (at + t), mask=valid, other=-9.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * (at + t) + 1, mask=valid, other=-9.0).to(tl.float32) * height - 0.5
    return x, y, tl.load(weights + at + t, mask=valid, other=0.0).to(tl.float32), width, height


@triton.jit
def neighbours(width, height, row, STRIDE: tl.constexpr, THIN: tl.constexpr):
    """Numbers from a pixel to its right and lower neighbour, and the tops of their tents: 0 without one.

    THIN: some level of the call has a side of one pixel, so that they may not.
    """
    right, down, top_x, top_y = STRIDE, row * STRIDE, 1.0, 1.0
    if THIN:
        right, down = tl.where(width > 1, right, 0), tl.where(height > 1, down, 0)
        top_x, top_y = tl.minimum(width - 1, 1.0), tl.minimum(height - 1, 1.0)
    return right, down, top_x, top_y


@triton.jit
def forward_kernel(value, sides, tokens_at, locations, weights, out, queries, tokens,
                   HEADS: tl.constexpr, DIM: tl.constexpr, POINTS: tl.constexpr, CHUNK: tl.constexpr,
                   CHUNKS: tl.constexpr, QUERIES: tl.constexpr, THIN: tl.constexpr):
    """Eq. 3 for QUERIES queries of one image and head.

    sides (T, 2) float32: W, H of each point's level; tokens_at (T, 2) int32: W and the level's first token.
    """
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
        x, y, weight, width, height = read_point(sides, locations, weights, list_at, t, valid)
        row, start = tl.load(tokens_at + 2 * t), tl.load(tokens_at + 2 * t + 1)
        right, down, top_x, top_y = neighbours(width, height, row, HEADS * DIM, THIN)
        column, line = cell_start(x, width), cell_start(y, height)
        x0, x1 = tent(x - column, 1.0), tent(x - column - 1, top_x)
        y0, y1 = tent(y - line, 1.0) * weight, tent(y - line - 1, top_y) * weight
        token = start + line.to(tl.int32) * row + column.to(tl.int32)
        corner = value + token * (HEADS * DIM)                      # channel 0 of v00, for each query
        added = ()
        for chunk in tl.static_range(CHUNKS):
            at = corner[:, None] + (chunk * CHUNK + channel)[None, :]
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
# gradients of weight and location as in `bag_backward`; a product is a sum over the threads of a query. The
# forward pass saves its inputs and nothing else: to find cells and tents again is cheaper than to read
# them.
#   The gradient of a pixel is added up in memory by all programs that touch it, with atomic additions of
# four channels each on a Hopper GPU. Their order is chance, and with it the last bits of the result. After
# torch.use_deterministic_algorithms(True) FIXED adds whole numbers instead, for which the order does not
# matter: gradients times `unit`, a power of two just so large that no sum leaves 64 bits.


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
        x, y, weight, width, height = read_point(sides, locations, weights, list_at, t, valid)
        row, start = tl.load(tokens_at + 2 * t), tl.load(tokens_at + 2 * t + 1)
        right, down, top_x, top_y = neighbours(width, height, row, HEADS * DIM, THIN)
        column, line = cell_start(x, width), cell_start(y, height)
        x = tl.where(x > -1, x - column, -9.0)                      # from the cell's first pixel; −9: outside
        y = tl.where(y > -1, y - line, -9.0)
        x0, x1, y0, y1 = tent(x, 1.0), tent(x - 1, top_x), tent(y, 1.0), tent(y - 1, top_y)
        x, y = tl.floor(x), tl.floor(y)                             # a slope is a difference of two pixels
        slope_x0, slope_x1 = tent(x + 1, 1.0) - tent(x, 1.0), tent(x, top_x) - tent(x - 1, top_x)
        slope_y0, slope_y1 = tent(y + 1, 1.0) - tent(y, 1.0), tent(y, top_y) - tent(y - 1, top_y)
        token = start + line.to(tl.int32) * row + column.to(tl.int32)
        corner = token * (HEADS * DIM)                              # of channel 0 of v00, for each query
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


def forward_shape(dim: int, bits: int) -> dict:
    """Launch of `forward_kernel`: a thread holds 128 bits of a row."""
    return launch_shape(dim, width=16, channels=128 // bits, warps=2)


def backward_shape(dim: int) -> dict:
    """Launch of `backward_kernel`: chunks of 8, as a point costs more here; four channels per thread, what one
    atomic addition takes; one warp, so that no sum has to pass from warp to warp on its way to memory."""
    return launch_shape(dim, width=8, channels=4, warps=1)


def launch_shape(dim: int, width: int, channels: int, warps: int) -> dict:
    """CHUNK is `width`, less for small heads, more where 8 chunks do not suffice (registers)."""
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


def triton_forward(value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor,
                   weights: Tensor) -> Tensor:
    """Eq. 3 by `forward_kernel`. Kernels know nothing of strides: everything is made contiguous."""
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    batch, tokens, heads, dim = value.shape
    queries, count = locations.shape[1], locations.shape[3]
    out = value.new_empty(batch, queries, heads * dim)
    shape = forward_shape(dim, 8 * value.element_size())
    with torch.cuda.device_of(value):
        forward_kernel[(triton.cdiv(queries, shape["QUERIES"]) * batch * heads,)](
            value, *make_tables(tuple(sizes), tuple(points), value.device), locations, weights, out,
            queries, tokens, HEADS=heads, DIM=dim, POINTS=count, THIN=min(sizes) == 1, **shape)
    return out


def triton_backward(grad: Tensor, value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor,
                    weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights by `backward_kernel`."""
    grad, value, locations, weights = (x.contiguous() for x in (grad, value, locations, weights))
    batch, tokens, heads, dim = value.shape
    queries, count = locations.shape[1], locations.shape[3]
    fixed = torch.are_deterministic_algorithms_enabled()
    unit = largest_unit(grad, weights, queries * count) if fixed else grad             # not read unless fixed
    d_value = torch.zeros_like(value, dtype=torch.int64 if fixed else torch.float32)
    d_locations, d_weights = torch.empty_like(locations), torch.empty_like(weights)
    shape = backward_shape(dim)
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
    if not torch.compiler.is_compiling() and plain_is_faster(value, locations):
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
                         f"(B, Q, M, T), not {tuple(value.shape)}, {tuple(locations.shape)} and {tuple(weights.shape)}")
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
    real, device = working_type(value), value.device
    level = torch.repeat_interleave(torch.tensor(points)).to(device)                    # (T,)
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
