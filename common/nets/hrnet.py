"""HRNet (Sun et al., CVPR 2019): branches of several resolutions side by side."""
import torch.nn.functional as F
from torch import Tensor, nn

from common.nets.resnet import Bottleneck, ConvNorm


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
