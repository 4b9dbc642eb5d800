"""Deformable attention in PyTorch, fast on a CPU: the forward and, written by hand, the backward pass.

out[q, m] is a weighted sum of 4T rows of the table `value.view(B*S*M, d)`. PyTorch has one operator for
weighted sums of table rows, made for word embeddings and much faster than grid_sample: embedding_bag. What
remains is to write down which rows and which weights. That costs more than the sums, unless done with care:

  * queries go in blocks whose lists stay in the L2 cache, in buffers that the next block uses again;
  * x and y, and the four corners, are separate planes: each operation runs over contiguous numbers;
  * no masks: a corner counts the product of two tents, max(0, 1 − |x − column|) and max(0, 1 − |y − row|),
    which is 0 by itself for a pixel too far away. So the cell, the square between four pixels around the
    point, may be moved to the nearest one inside of the level.

Read      Block.locate → forward_cpu → backward_cpu; letters as in deform_attn.py
"""
import warnings
from functools import lru_cache
from typing import Iterator, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import working_type

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")       # see `products`

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


def setup(value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor) -> tuple[Tensor, Grid]:
    """The table (B*S*M, d), and the constants."""
    batch, tokens, heads, dim = value.shape
    index = torch.int32 if max(batch * tokens * heads, locations.numel()) < 2 ** 31 else torch.int64
    shapes, real = tuple(zip(sizes[::2], sizes[1::2])), working_type(value.dtype)
    table = value.to(real).reshape(-1, dim)
    return table, make_grid(shapes, tuple(points), heads, real, index, value.device)


def forward_cpu(value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor,
                weights: Tensor) -> Tensor:
    """Eq. 3 as four bags of T rows for each query and head, one for each corner."""
    batch, tokens, heads, dim = value.shape
    queries, count = locations.shape[1], locations.shape[3]
    table, grid = setup(value, sizes, points, locations)
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


def backward_cpu(grad: Tensor, value: Tensor, sizes: Sequence, points: Sequence, locations: Tensor,
                 weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, for grad (B, Q, M*d)."""
    batch, tokens, heads, dim = value.shape
    table, grid = setup(value, sizes, points, locations)
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
