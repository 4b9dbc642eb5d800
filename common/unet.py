"""The U-Net of the first diffusion models (DDPM) without its attention: what methods compare their denoisers with."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + conv(SiLU(GN(conv(SiLU(GN(x))) + W time)))."""

    def __init__(self, channels_in: int, channels: int, time_dim: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, channels_in), nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time = nn.Linear(time_dim, channels)
        self.norm2, self.conv2 = nn.GroupNorm(32, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[..., None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class UNet(nn.Module):
    """Maps (B, channels_in, H, W), H and W divisible by 4, and a time (B, D) → (B, channels_out, H, W).

    Two residual blocks at each of three resolutions, down by strided convolutions and up by repeating pixels; what
    went down stands beside what comes up.
    """

    def __init__(self, channels_in: int, channels_out: int, time_dim: int, widths: tuple[int, ...] = (64, 128, 256)):
        super().__init__()
        self.stem = nn.Conv2d(channels_in, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.ModuleList(ResidualBlock(w, w, time_dim) for _ in range(2)) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(nn.ModuleList((ResidualBlock(a + b, a, time_dim), ResidualBlock(a, a, time_dim)))
                                for a, b in zip(widths, widths[1:]))
        self.norm, self.head = nn.GroupNorm(32, widths[0]), nn.Conv2d(widths[0], channels_out, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for i, blocks in enumerate(self.down):
            x = self.shrink[i - 1](x) if i else x
            for block in blocks:
                x = block(x, time)
            skips.append(x)
        for skip, blocks in zip(skips[-2::-1], reversed(self.up)):
            x = torch.cat([skip, F.interpolate(x, scale_factor=2, mode="nearest")], 1)
            for block in blocks:
                x = block(x, time)
        return self.head(F.silu(self.norm(x)))
