"""The plain Vision Transformer of ViTPose, and its weights in the four spellings in which they are published.

Attention, mlp and TransformerBlock are the textbook's; methods build their own parts of them, too.
Names    of modules are those of ViTPose's own release, so that its files load as they are
"""
from __future__ import annotations

import math
import re
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common import weights
from common.errors import UserError

PATCH = 16                                             # pixels per patch
LayerNorm = partial(nn.LayerNorm, eps=1e-6)

# ---- The network --------------------------------------------------------------------------------------------


def mlp(dim: int, inner: int, act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    return nn.Sequential(OrderedDict(fc1=nn.Linear(dim, inner), act=act(), fc2=nn.Linear(inner, dim)))


class Attention(nn.Module):
    """Tokens look at each other, (B, L, D) → (B, L, D). The rows of qkv are q, k, v."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (three m d) -> three b m l d", three=3, m=self.heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """x ← x + MHSA(LN(x));  x ← x + MLP(LN(x))."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn = LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = LayerNorm(dim), mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images (B, 3, H, W) → patch tokens (B, N, D), row by row.

    The picture is padded by two pixels, so that patches lie as MAE's do. The table of positions keeps MAE's slot for a
    class token, which is added to every token; there is none. No drop path.

    stem: another module from images to (B, D, H/16, W/16), in place of the one matrix for a patch's pixels.
    """

    def __init__(self, dim: int, depth: int, heads: int, patches: int, stem: nn.Module | None = None):
        super().__init__()
        if stem is None:
            stem = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, PATCH, PATCH, padding=2)))
        self.patch_embed = stem
        self.pos_embed = nn.Parameter(torch.empty(1, patches + 1, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(depth)))
        self.last_norm = LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = x + (self.pos_embed[:, 1:] + self.pos_embed[:, :1])
        return self.last_norm(self.blocks(x))


# ---- Its weights: ViTPose's own names, MAE's, mmpose's and transformers' ------------------------------------

SPELLINGS = [                                          # outside of the layers, and the layers' own prefix
    (r"^backbone\.(ln1|layernorm)\.", "backbone.last_norm."),
    (r"^backbone\.(embeddings\.patch_embeddings|patch_embed)\.projection\.", "backbone.patch_embed.proj."),
    (r"^backbone\.embeddings\.position_embeddings$", "backbone.pos_embed"),
    (r"^backbone\.(layers|encoder\.layer)\.(\d+)\.", r"backbone.blocks.\2.")]
INSIDE_BLOCK = [
    (r"\.(ln1|layernorm_before)\.", ".norm1."), (r"\.(ln2|layernorm_after)\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."), (r"\.ffn\.layers\.1\.", ".mlp.fc2.")]
UNUSED = (r"^(keypoint_)?head\.",                      # the classic head, in whose place is a method's own
          r"^backbone\.(cls_token$|norm\.)")           # MAE's class token; ViTPose's last norm starts anew
HEADS = {384: 12, 768: 12, 1024: 16, 1280: 16}         # of ViTPose by width: another number fits, and finds nothing


def convert(state: dict[str, Tensor], dim: int, heads: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """A ViT of any spelling as `backbone.*` under the names above, its table of positions for a grid (rows, columns).

    Raises UserError for experts of ViTPose+, a number of heads that it was not trained with, a table without a grid.
    """
    if any(".experts." in name for name in state):
        raise UserError("these are weights of ViTPose+, whose layers end in experts that a plain ViT has not: take "
                        "ViTPose's, for example --init vitpose-base")
    if heads != HEADS.get(dim, heads):
        raise UserError(f"a ViT of ViTPose with {dim} channels has {HEADS[dim]} heads: --vit_heads {heads} would read "
                        "the weights, and find nothing with them")
    if not any(name.startswith("backbone.") for name in state):                         # MAE
        state = {f"backbone.{name}": value for name, value in state.items()} | {
            "backbone.last_norm.weight": torch.ones(dim), "backbone.last_norm.bias": torch.zeros(dim)}
    unused = [name for name in state if any(re.search(pattern, name) for pattern in UNUSED)]
    if unused:
        print(f"start weights: no use for {', '.join(unused)}")
        state = {name: value for name, value in state.items() if name not in unused}
    state = weights.rename(weights.rename(state, SPELLINGS), INSIDE_BLOCK)
    for name in [name for name in state if ".attention.attention.query." in name]:      # transformers has three
        rows = [state.pop(name.replace("query", part), torch.empty(0)) for part in ("query", "key", "value")]
        state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(rows)
    table = state.get("backbone.pos_embed", torch.empty(1, 0, 1))
    known = {math.prod(grid): grid}                     # whatever its shape, it fits as it is
    old = known.get(table.shape[1] - 1) or grid_of(table.shape[1] - 1)
    if not old:                                                                         # mmpose: no class slot
        old, table = known.get(table.shape[1]) or grid_of(table.shape[1]), F.pad(table, (0, 0, 1, 0))
    if not old:
        raise UserError(f"the weights have no table of positions of a known shape: {table.shape[1] - 1} rows")
    if old != grid:
        print(f"start weights: table of positions {old[0]}x{old[1]} → {grid[0]}x{grid[1]}")
    return state | {"backbone.pos_embed": resize_positions(table, old, grid)}


def grid_of(cells: int) -> tuple[int, int] | None:
    """Rows and columns of that many patches: of a person's crop, 4 : 3, or else of MAE's square images."""
    units = [(high, wide, math.isqrt(max(cells, 0) // (high * wide))) for high, wide in ((4, 3), (1, 1))]
    return next(((high * n, wide * n) for high, wide, n in units if n and high * wide * n ** 2 == cells), None)


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table (1, 1 + old cells, D) for another grid, bicubic; the first slot stays as it is."""
    if old == new:
        return table
    grid = rearrange(table[:, 1:], "one (h w) d -> one d h w", h=old[0])
    grid = F.interpolate(grid, new, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)
