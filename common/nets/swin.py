"""Swin transformer (Liu et al., ICCV 2021): attention inside of windows that shift."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW, SHIFT = 7, 3


def window_regions(height: int, width: int, device: torch.device) -> Tensor:
    """After a roll by (−SHIFT, −SHIFT) windows at the border join cells that are no neighbours: −100 between these.

    Returns  (windows, 49, 49) for maps of height × width, both multiples of 7, else 0
    """
    def stripe(size: int) -> Tensor:                       # three slices of an axis: 0, 1, 2
        place = torch.arange(size, device=device)
        return (place >= size - WINDOW).long() + (place >= size - SHIFT)

    region = to_windows((3 * stripe(height)[:, None] + stripe(width))[None, :, :, None])[..., 0]
    return -100.0 * (region[:, :, None] != region[:, None])


def to_windows(x: Tensor) -> Tensor:
    """(B, H, W, C) → (B·windows, 49, C)."""
    b, h, w, c = x.shape
    x = x.view(b, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c)
    return x.transpose(2, 3).reshape(-1, WINDOW ** 2, c)


def from_windows(x: Tensor, height: int, width: int) -> Tensor:
    x = x.view(-1, height // WINDOW, width // WINDOW, WINDOW, WINDOW, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


class WindowAttention(nn.Module):
    """softmax(q·k / √d + bias by relative position + regions) v within each window; x (B·windows, 49, C)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        place = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))               # (49, 2) row, column
        dy, dx = (place[:, None] - place + WINDOW - 1).unbind(-1)
        self.register_buffer("index", dy * (2 * WINDOW - 1) + dx, persistent=False)

    def forward(self, x: Tensor, regions: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)        # (B·windows, M, 49, d)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        logits = logits + self.relative_position_bias_table[self.index].permute(2, 0, 1)
        if regions is not None:
            logits = (logits.unflatten(0, (-1, len(regions))) + regions[:, None]).flatten(0, 1)
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Window attention and MLP, each after a norm and around a shortcut. x (B, H, W, C).

    drop: probability with which an image skips a branch in training (stochastic depth).
    """

    def __init__(self, dim: int, heads: int, shifted: bool, drop: float):
        super().__init__()
        self.shifted, self.drop = shifted, drop
        self.norm1, self.attn = nn.LayerNorm(dim), WindowAttention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), MLP(dim)

    def skip(self, x: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return x
        kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop
        return x * kept / (1 - self.drop)

    def attend(self, x: Tensor, regions: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -w % WINDOW, 0, -h % WINDOW))               # zeros, and not masked
        height, width = x.shape[1:3]
        if self.shifted:
            x = x.roll((-SHIFT, -SHIFT), (1, 2))
        x = from_windows(self.attn(to_windows(x), regions if self.shifted else None), height, width)
        if self.shifted:
            x = x.roll((SHIFT, SHIFT), (1, 2))
        return x[:, :h, :w]

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        x = x + self.skip(self.attend(self.norm1(x), regions))
        return x + self.skip(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Four neighbours side by side, then half of their channels: (B, H, W, C) → (B, H/2, W/2, 2C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    def __init__(self, dim: int, heads: int, drops: list[float], last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(dim, heads, b % 2 == 1, drop) for b, drop in enumerate(drops))
        self.downsample = nn.Identity() if last else PatchMerging(dim)

    def forward(self, x: Tensor) -> Tensor:
        h, w = (side + -side % WINDOW for side in x.shape[1:3])
        regions = window_regions(h, w, x.device)
        for block in self.blocks:
            x = block(x, regions)
        return x


class PatchEmbed(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, dim, 4, 4), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Swin(nn.Module):
    """By default Swin-L: maps of 192, 384, 768 and 1536 channels, each after a norm of its own."""

    def __init__(self, dim: int = 192, depths: tuple[int, ...] = (2, 2, 18, 2), heads: int = 6, drop: float = 0.2):
        super().__init__()
        self.channels = [dim * 2 ** s for s in range(len(depths))]
        last = sum(depths) - 1
        self.patch_embed = PatchEmbed(dim)
        drops = [[drop * (sum(depths[:s]) + b) / last for b in range(depth)] for s, depth in enumerate(depths)]
        self.layers = nn.ModuleList(SwinStage(c, heads * 2 ** s, drops[s], s + 1 == len(depths))
                                    for s, c in enumerate(self.channels))
        for s, c in enumerate(self.channels):
            self.add_module(f"norm{s}", nn.LayerNorm(c))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.patch_embed(x), []
        for s, layer in enumerate(self.layers):
            x = layer(x)
            maps.append(getattr(self, f"norm{s}")(x).permute(0, 3, 1, 2))
            x = layer.downsample(x)
        return maps
