"""An auxiliary heatmap loss, for networks that start from nothing.

Where queries answer, a loss reaches the features only through the few places that queries looked at, and they look at
the right places only when the features are good. Asked for heatmaps, every cell learns at once what is near it.
"""
import torch
from einops import rearrange
from torch import Tensor, nn

from common.ranks import mean_over_ranks

SIGMA = 1.5                # of the Gaussians of `people_heatmaps`, in cells of the heatmaps


class CellHeatmaps(nn.Module):
    """What each cell of a feature map sees, by one matrix: cells (B, h·w, C), row by row → heatmaps (B, K, r·h, r·w).

    across: r, cells of a heatmap across a cell of the features. Starts as no heatmap at all.
    """

    def __init__(self, dim: int, keypoints: int, across: int):
        super().__init__()
        self.across, self.head = across, nn.Linear(dim, keypoints * across ** 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, cells: Tensor, rows: int) -> Tensor:
        return rearrange(self.head(cells), "b (h w) (k p q) -> b k (h p) (w q)", h=rows, p=self.across, q=self.across)


def people_heatmaps(keypoints: Tensor, visible: Tensor, size: tuple[int, int]) -> Tensor:
    """Gaussians around the keypoints of all people of an image, (K, h, w); where they overlap, the larger value.

    keypoints (P, K, 2) xy in fractions of the image;  visible (P, K) 0 or 1;  size h, w
    """
    across, down = (torch.arange(n, device=keypoints.device) + 0.5 for n in (size[1], size[0]))
    x = torch.exp(-(across - size[1] * keypoints[..., :1]) ** 2 / (2 * SIGMA ** 2))             # (P, K, w)
    y = torch.exp(-(down - size[0] * keypoints[..., 1:]) ** 2 / (2 * SIGMA ** 2))               # (P, K, h)
    maps = y[..., None] * x[..., None, :] * visible[..., None, None]
    return maps.amax(0) if len(maps) else maps.new_zeros(maps.shape[1:])


def people_heatmap_loss(maps: Tensor, targets: list) -> Tensor:
    """Σ (H − G)² of heatmaps (B, K, h, w), per labelled keypoint of the batch on all processes.

    targets: for each image `keypoints` (P, K, 2) in fractions of it and `visible` (P, K).
    """
    true = torch.stack([people_heatmaps(t.keypoints, t.visible, maps.shape[2:]) for t in targets])
    labelled = sum(t.visible.sum() for t in targets).float()
    return (maps.float() - true).square().sum() / mean_over_ranks(labelled).clamp(min=1)
