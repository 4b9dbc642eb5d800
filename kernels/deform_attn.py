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
import warnings
from functools import lru_cache
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")      # `products` needs no more than there is

# ----------------------------------------------------------------------------- the formula


def deform_attn_plain(value: Tensor, shapes: Sequence, locations: Tensor, weights: Tensor, points: Sequence | None = None) -> Tensor:
    """Eq. 3, level by level, in plain PyTorch: the form to read, and the one that the others are tested against.

    Takes and returns what `deform_attn` does. `F.grid_sample` interpolates; its coordinates run from −1 to 1.
    """
    locations, weights, points = by_point(locations, weights, points, len(shapes))
    batch, _, heads, dim = value.shape
    real = torch.float64 if value.dtype == torch.float64 else torch.float32
    grid = (2 * locations.to(real) - 1).nan_to_num(nan=-9.0, posinf=9.0, neginf=-9.0)     # far outside: counts 0
    weights = weights.to(real).transpose(1, 2).flatten(0, 1)                              # (B*M, Q, T)
    levels = value.to(real).split([height * width for height, width in shapes], 1)
    out = 0
    for level, (height, width), xy, weight in zip(levels, shapes, grid.split(points, 3), weights.split(points, 2)):
        level = level.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        xy = xy.transpose(1, 2).flatten(0, 1)                                             # (B*M, Q, P, 2)
        samples = F.grid_sample(level, xy, align_corners=False)                           # (B*M, d, Q, P)
        out = out + (samples * weight[:, None]).sum(-1)                                   # eq. 3
    return out.view(batch, heads * dim, -1).transpose(1, 2).to(value.dtype)               # (B, Q, M*d)


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
HALF, ZERO, ONE = torch.tensor(-0.5), torch.tensor(0.0), torch.tensor(1.0)


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
        xy = torch.addcmul(HALF, locations.movedim(-1, 0), grid.size, out=self.offset).nan_to_num_(nan=-9.0)
        F.threshold_(xy, -1, -9)                                            # at −1 and below: outside, slope included
        torch.clamp(xy, ZERO, grid.top, out=self.corner).trunc_()
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
    """<g[i], table[rows[:, i, t]]>: for rows (4, k, M, T) and g (k*M, d) the products of each point's corners, (4, k*M*T)."""
    count = rows.shape[-1]
    begin = torch.arange(0, rows[0].numel() + 1, count, dtype=rows.dtype, device=rows.device)
    zeros = table.new_zeros(rows[0].numel())
    size = (len(g), len(table))
    wanted = [torch.sparse_csr_tensor(begin, r.view(-1), zeros, size, check_invariants=False) for r in rows]
    return torch.stack([torch.sparse.sampled_addmm(entries, g, table.T, beta=0).values() for entries in wanted])


def spread(g: Tensor, cell: Tensor, share: Tensor, sizes: Sequence, rows: int, batch: int, heads: int, count: int) -> Tensor:
    """∂value (rows, d): g[i] goes to the four corners of the cells of the points i*T … i*T + T − 1, with weights `share`."""
    order = cell.sort(stable=True).indices
    share, source = share[:, order], (order // count).to(cell.dtype)
    begin = torch.zeros(rows + 1, dtype=cell.dtype, device=cell.device)                 # first point of each cell
    begin[1:] = torch.bincount(cell, minlength=rows).cumsum(0)
    out, start = g.new_zeros(rows, g.shape[1]), 0
    for height, width in list(zip(sizes[::2], sizes[1::2])) * batch:
        end, right, down = start + height * width * heads, (width > 1) * heads, (height > 1) * width * heads
        for first in range(start, end, CHUNK):
            last = min(first + CHUNK, end)
            low, high = int(begin[first]), int(begin[last])
            for corner, shift in enumerate((0, right, down, right + down)):
                sums = bag(g, source[low:high], begin[first:last] - low, share[corner, low:high])
                stop = min(last + shift, end)                                           # the last cells have no points
                out[first + shift:stop] += sums[:stop - first - shift]
        start = end
    return out

# ----------------------------------------------------------------------------- the operator


@torch.library.custom_op("pose::deform_attn", mutates_args=())
def operator(value: Tensor, sizes: Sequence[int], points: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """deform_attn with checked arguments; sizes is H, W of level 0, H, W of level 1, …"""
    return bag_forward(value, sizes, points, locations, weights)


@operator.register_fake
def _(value, sizes, points, locations, weights):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("pose::deform_attn_backward", mutates_args=())
def backward_operator(grad: Tensor, value: Tensor, sizes: Sequence[int], points: Sequence[int], locations: Tensor,
                      weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights."""
    return bag_backward(grad, value, sizes, points, locations, weights)


@backward_operator.register_fake
def _(grad, value, sizes, points, locations, weights):
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def save(ctx, inputs, output):
    value, ctx.sizes, ctx.points, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def backward(ctx, grad):
    value, locations, weights = ctx.saved_tensors
    d_value, d_locations, d_weights = backward_operator(grad, value, ctx.sizes, ctx.points, locations, weights)
    return d_value, None, None, d_locations, d_weights


operator.register_autograd(backward, setup_context=save)


def deform_attn(value: Tensor, shapes: Sequence, locations: Tensor, weights: Tensor, points: Sequence | None = None) -> Tensor:
    """Eq. 3: what methods call."""
    locations, weights, points = by_point(locations, weights, points, len(shapes))
    return operator(value, [side for shape in shapes for side in shape], points, locations, weights)
