"""ResNet, HRNet and Swin-L: backbones that no method file is about.

All turn images (B, 3, H, W), H and W divisible by 32, into four maps of stride 4, 8, 16, 32; `channels` says how wide.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Blocks of ResNets and HRNet ----------------------------------------------------------------------------


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and scale are constants:  y = w (x − mean) / √(var + ε) + b."""

    def __init__(self, channels: int):
        super().__init__()
        self.eps = 1e-5
        for name, value in dict(weight=1.0, bias=0.0, running_mean=0.0, running_var=1.0).items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class ConvNorm(nn.Module):
    """Convolution without bias, then a norm. `fold` makes them one convolution: equal results for inference."""

    def __init__(self, channels_in: int, channels: int, kernel: int, stride: int, frozen: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=False)
        self.norm = FrozenBatchNorm(channels) if frozen else nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    @torch.no_grad()
    def fold(self) -> None:
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        self.conv.weight.mul_(scale[:, None, None, None])
        shift = self.norm.bias - self.norm.running_mean * scale
        # a frozen norm's constants are no parameters, so neither is what they become
        self.conv.bias = nn.Parameter(shift, requires_grad=not isinstance(self.norm, FrozenBatchNorm))
        self.norm = nn.Identity()


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution around a shortcut; the 3×3 one has the stride (ResNet "v1.5")."""

    def __init__(self, channels_in: int, width: int, stride: int, frozen: bool):
        super().__init__()
        self.conv1 = ConvNorm(channels_in, width, 1, 1, frozen)
        self.conv2 = ConvNorm(width, width, 3, stride, frozen)
        self.conv3 = ConvNorm(width, 4 * width, 1, 1, frozen)
        same = stride == 1 and channels_in == 4 * width
        self.shortcut = nn.Identity() if same else ConvNorm(channels_in, 4 * width, 1, stride, frozen)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x), inplace=True)
        y = F.relu(self.conv2(y), inplace=True)
        return F.relu(self.conv3(y).add_(self.shortcut(x)), inplace=True)


class ResNet(nn.Module):
    """Image (B, 3, H, W) → maps of stride 4, 8, 16, 32 with 4, 8, 16, 32 times `width` channels."""

    def __init__(self, width: int, blocks: tuple[int, ...], frozen: bool):
        super().__init__()
        self.stem = ConvNorm(3, width, 7, 2, frozen)
        self.channels, channels_in = [], width
        for i, count in enumerate(blocks):
            wide = width * 2 ** i
            stage = [Bottleneck(4 * wide if b else channels_in, wide, 1 if b or i == 0 else 2, frozen)
                     for b in range(count)]
            self.add_module(f"res{i + 2}", nn.Sequential(*stage))
            channels_in = 4 * wide
            self.channels.append(channels_in)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = F.max_pool2d(F.relu(self.stem(x), inplace=True), 3, 2, 1), []
        for i in range(len(self.channels)):
            x = self.get_submodule(f"res{i + 2}")(x)
            maps.append(x)
        return maps


# ---- HRNet (Sun et al., CVPR 2019): branches of several resolutions side by side -----------------------------


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut."""

    def __init__(self, channels: int, frozen: bool):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, 1, frozen)
        self.conv2 = ConvNorm(channels, channels, 3, 1, frozen)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x), inplace=True)
        return F.relu(self.conv2(y).add_(x), inplace=True)


class Down(nn.ModuleList):
    """`steps` 3×3 convolutions of stride 2; the last one changes the width and has no ReLU after it."""

    def __init__(self, channels_in: int, channels: int, steps: int, frozen: bool):
        widths = [channels_in] * steps + [channels]
        super().__init__(ConvNorm(a, b, 3, 2, frozen) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for i, step in enumerate(self):
            x = step(F.relu(x, inplace=True) if i else x)
        return x


class HRModule(nn.Module):
    """Four blocks on each branch, then  y_i = ReLU(Σ_j f_ij(x_j)): every branch gets all the others, resized."""

    def __init__(self, channels: list[int], frozen: bool):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(c, frozen) for _ in range(4))) for c in channels)

        def resize(i: int, j: int) -> nn.Module:
            if j > i:
                return ConvNorm(channels[j], channels[i], 1, 1, frozen)
            return Down(channels[j], channels[i], i - j, frozen) if j < i else nn.Identity()

        branches = range(len(channels))
        self.fuse = nn.ModuleList(nn.ModuleList(resize(i, j) for j in branches) for i in branches)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps, fused = [branch(x) for branch, x in zip(self.branches, maps)], []
        for i, row in enumerate(self.fuse):
            y = 0
            for j, (f, x) in enumerate(zip(row, maps)):
                x = f(x)
                y = y + (F.interpolate(x, scale_factor=2 ** (j - i), mode="nearest") if j > i else x)
            fused.append(F.relu(y))
        return fused


class HRNet(nn.Module):
    """Maps of `width`, 2, 4 and 8 times that many channels; every module of the last stage keeps all branches."""

    def __init__(self, width: int, frozen: bool):
        super().__init__()
        self.channels = c = [width, 2 * width, 4 * width, 8 * width]
        self.conv1, self.conv2 = ConvNorm(3, 64, 3, 2, frozen), ConvNorm(64, 64, 3, 2, frozen)
        self.layer1 = nn.Sequential(*(Bottleneck(256 if b else 64, 64, 1, frozen) for b in range(4)))
        self.transition1 = nn.ModuleList([ConvNorm(256, c[0], 3, 1, frozen), ConvNorm(256, c[1], 3, 2, frozen)])
        self.stage2 = nn.Sequential(HRModule(c[:2], frozen))
        self.transition2 = ConvNorm(c[1], c[2], 3, 2, frozen)
        self.stage3 = nn.Sequential(*(HRModule(c[:3], frozen) for _ in range(4)))
        self.transition3 = ConvNorm(c[2], c[3], 3, 2, frozen)
        self.stage4 = nn.Sequential(*(HRModule(c, frozen) for _ in range(3)))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.conv2(F.relu(self.conv1(x), inplace=True)), inplace=True)
        x = self.layer1(x)
        maps = self.stage2([F.relu(start(x)) for start in self.transition1])
        maps = self.stage3([*maps, F.relu(self.transition2(maps[-1]))])
        return self.stage4([*maps, F.relu(self.transition3(maps[-1]))])


# ---- Swin transformer (Liu et al., ICCV 2021): attention inside of windows that shift ------------------------

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
