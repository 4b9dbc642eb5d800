"""ResNet (He et al., CVPR 2016) with its 3×3 convolutions strided ("v1.5"), and the norms that backbones here share."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
