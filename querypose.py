"""QueryPose: sparse multi-person pose regression via spatial-aware part-level queries (NeurIPS 2022).

Idea     A fixed number of learned boxes and queries, one per person, refined in six stages, no anchors and no NMS.
         A pose is not read from one query: seven part queries per person each draw an attention map over the inside of
         the person's box, and each gives the few keypoints of its part, with a width of their distribution.
Flow     image (B,3,H,W) → ResNet-50, HRNet or Swin-L → neck → maps of stride 4 to 32 → 6 ×
         [BoxStage: boxes (B,Q,4), scores (B,Q) → KeypointStage on each box: poses (B,Q,K,2), deviations (B,Q,K,2)]
Read     roi_align → DynamicConv → BoxStage (eq. 1) → SPEGM (Sec. 3.2) → SIM (eq. 3) → KeypointStage (eq. 2)
         → QueryPose.forward → RealNVP → match → criterion (eq. 4) → train
Letters  B images  Q queries  R boxes of a batch that get a pose  K keypoints  M parts  C, D channels of an instance,
         of a part query  G a box's inside after convolutions  E part embeddings  P part queries  N cells  L levels
Units    boxes are x1, y1, x2, y2 in pixels of the network's input, never clipped; poses of the model are relative to
         the box of their stage, 0 its centre, ±0.5 its sides; `Targets` are pixels of the network's input
Departs  from the paper, as the release does, because the released weights need it:
         Sec. 3.1    a pose is regressed from six 3×3 convolutions on the box's inside, 512 wide (KeypointStage)
         Sec. 3.2    each part embedding gets a linear view of the instance query as well (KeypointStage.residual)
         eq. 2       attention among parts has norms and a feed-forward block; coordinates are W x / |x| + b (PartHead)
         Fig. 3b     the light form, which the released weights are, leaves the instance query as it is (`--no-full`)
Departs  from the release:
         versions    its later code loses the batch at inference, updates the queries of matched people alone, and
                     hands part queries on by position in the list of matches; ours is its first code: all queries
         training    `matched` is the saving of the later code, but part queries stay with their query; batch norm then
                     sees matched boxes alone, as there
         inference   `prune` gives poses only to the queries of the best class scores: the same numbers for these
         norms       HRNet's batch norms learn, as there; `--frozen_norm` keeps their statistics
         evaluation  plain COCO evaluation, without the extra call that lets failed boxes count as ignored (evaluate)
         images      those in which nobody has a keypoint are left out, as in the paper; batches mix wide and high ones
         σ           at least 1e-6 of the box in the loss, which a sigmoid that underflows would make infinite

    python querypose.py                                 what each preset is: parameters, GFLOPs
    python querypose.py --train                         learn the embedded puppets on this machine
    python querypose.py --train --data data/coco --preset hrnet_w32 --init pose_hrnet_w32_384x288.pth
    python eval.py querypose-hrnet_w32 --images photo.jpg       the authors' weights on your photo
    python eval.py runs/<run> --images photo.jpg --process      and where the parts look, how sure each joint is
"""
import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import draw, metrics, transforms, weights
from common.cli import check_choice, check_range, launch, parse, parse_numbers, resolve, run_main
from common.datasets import PoseDataset
from common.errors import UserError
from common.nets.hrnet import HRNet
from common.nets.resnet import ConvNorm, ResNet
from common.nets.swin import Swin
from common.predict import predict_all
from common.ranks import AMP, Ranks, autocast, distribute, init_ranks, mean_over_ranks, micro_batch, rank_zero_first, seed_all
from common.records import Prediction, Sample
from common.run import Ema, Loop, check_finite
from common.splits import open_crowd, open_splits
from common.weights import count_parameters
from common.skeletons import Skeleton, get_skeleton, words

# ---- Configuration: every number of the paper. Each field is a flag, its comment the flag's help. -----------

RESNETS = {"r50": (64, (3, 4, 6, 3)), "r26": (24, (2, 2, 2, 2))}        # width of res2, blocks in res2 to res5
HRNETS = {"hrnet_w32": 32, "hrnet_w48": 48}
INTERACTIONS = ("spegm", "mhsa", "channel", "spatial", "pool")
UPDATES = ("sim", "sum", "concat", "none")
SCHEMES = ("a", "b", "c", "d")


@dataclass(frozen=True)
class Config:
    # model (Sec. 3)
    backbone: str = "r50"          # r50, r26 (of less than half its width), hrnet_w32, hrnet_w48 or swin_l
    frozen_norm: bool = True       # batch norms of the backbone keep their statistics; off to train from nothing
    freeze: bool = True            # a ResNet's stem and first stage stay as they start
    dim: int = 256                 # C, channels of maps and instance queries
    heads: int = 8                 # attention heads; divides dim and part_dim
    ffn: int = 2048                # hidden width of the feed-forward blocks
    dynamic: int = 64              # inner width of dynamic convolutions
    stages: int = 6                # S, box and keypoint stages
    queries: int = 100             # Q, people at most
    spread: bool = False           # boxes start spread out at half the image's size; off: each as the whole image
    box_roi: int = 7               # cells along a side of a box's inside for the box stage
    pose_roi: int = 14             # and for the keypoint stage
    convs: int = 6                 # 3×3 convolutions of the keypoint stage
    conv_width: int = 512          # channels between them
    full: bool = True              # a keypoint stage updates the instance query; off: the light form
    # ablations (Tables 1 to 3)
    iterate: bool = True           # the updated instance query goes to the next box stage; off: Fig. 3a (Table 3)
    query: str = "part"            # what looks at the box's inside: part, or one instance query (Table 1)
    interaction: str = "spegm"     # spegm, mhsa, dynamic MLP over channel or spatial (Table 1), pool (Table 2b)
    update: str = "sim"            # part queries of the last stage come in by sim, sum, concat or none (Table 2a)
    part_dim: int = 128            # D, channels of a part query (Table 2c)
    scheme: str = "c"              # parts (Fig. 4, Table 2d): a keypoints, b head in one, c seven, d five
    # what gets poses
    prune: bool = True             # prediction computes poses of the best 25 queries alone
    matched: bool = False          # training computes poses of matched queries alone; not with --full --iterate
    init: str = "resnet50"         # start weights: file or name; QueryPose, or a ResNet, HRNet or Swin to start from
    # optimisation (Sec. 4.1)
    epochs: int = 35               # passes over the training images
    batch: int = 16                # images per optimiser step, over all GPUs and micro-batches
    accum: int = 1                 # micro-batches per optimiser step
    lr: float = 2.5e-5             # learning rate
    lr_backbone: float = 2.5e-5    # learning rate of the backbone
    lr_flow: float = 2.5e-4        # learning rate of the flow
    weight_decay: float = 1e-4     # AdamW, on every parameter
    schedule: str = "constant"     # constant or cosine
    warmup: int = 1000             # optimiser steps of linear warm-up
    drop_epochs: str = "27,32"     # learning rate ×0.1 from each of these epochs on
    clip: float = 1.0              # largest L2 norm of the gradient
    ema: float = 0.0               # decay of the weight average that is evaluated; 0: the weights themselves
    ema_warmup: int = 0            # optimiser steps over which the decay grows to that
    amp: str = "no"                # no, bf16 or fp16 (old GPUs); a CPU always runs float32
    # pictures
    short_side: int = 800          # pixels of an image's shorter side, unless the longer gets too long
    long_side: int = 1333          # pixels of the longer side at most
    multiscale: bool = True        # train at short sides of 0.6 to 1 of that, half of the time after a random crop
    # files and machine
    data: str = "puppets"          # puppets (made on first use) or a folder in COCO or CrowdPose layout
    sigmas: str = ""               # OKS sigmas of your own keypoints, e.g. 0.03,0.08,0.08
    processes: int = 1             # training processes when there is no GPU and no torchrun
    workers: int = 4               # image loading processes per GPU; 0: none
    eval_every: int = 1            # epochs between evaluations
    eval_batch: int = 1            # images per evaluation batch; padding moves the results a little
    seed: int = 0                  # all random numbers follow from it

    def __post_init__(self):
        """Raises UserError for values that no run could use."""
        check_choice(self, backbone=(*RESNETS, *HRNETS, "swin_l"), query=("part", "instance"),
                             interaction=INTERACTIONS, update=UPDATES, scheme=SCHEMES, schedule=("constant", "cosine"),
                             amp=AMP)
        check_range(self, 1, math.inf, "dim heads ffn dynamic stages queries box_roi pose_roi convs "
                            "conv_width part_dim epochs batch accum short_side long_side processes eval_every "
                            "eval_batch")
        check_range(self, 1e-6, math.inf, "lr lr_flow clip")
        check_range(self, 0, math.inf, "lr_backbone weight_decay warmup ema_warmup workers seed")
        check_range(self, 0, 1, "ema")
        parse_numbers(self.drop_epochs)
        for name in ("dim", "part_dim"):
            if getattr(self, name) % self.heads:
                raise UserError(f"--{name} {getattr(self, name)} does not split over {self.heads} heads: "
                                        f"choose a multiple of {self.heads}")
        if self.matched and self.full and self.iterate:
            raise UserError("--matched: with --full --iterate the boxes depend on the poses of all queries; "
                                    "add --no-full or --no-iterate")
        if self.batch % self.accum:
            raise UserError(f"--batch {self.batch} does not split into {self.accum} micro-batches (--accum)")



def _presets() -> dict[str, Config]:
    r50 = Config()
    w32 = Config("hrnet_w32", frozen_norm=False, freeze=False, full=False, epochs=70, drop_epochs="54,63",
                 init="pose_hrnet_w32_384x288.pth")
    w48 = replace(w32, backbone="hrnet_w48", init="pose_hrnet_w48_384x288.pth")
    swin = replace(w32, backbone="swin_l", full=True, init="swin_large_patch4_window7_224_22k.pth")
    tiny = Config("r26", frozen_norm=False, freeze=False, dim=80, heads=4, ffn=192, dynamic=24, stages=2, queries=10,
                  spread=True, pose_roi=8, convs=2, conv_width=96, full=False, part_dim=64, matched=True, init="",
                  epochs=10, batch=16, lr=1e-3, lr_backbone=1e-3, lr_flow=1e-3, schedule="cosine", warmup=60,
                  drop_epochs="", ema=0.995, ema_warmup=100, short_side=128, long_side=128, multiscale=False,
                  processes=2, workers=0, eval_every=10, eval_batch=50)
    return {"tiny": tiny, "r50": r50, "r50-light": replace(r50, full=False), "hrnet_w32": w32,
            "hrnet_w32-full": replace(w32, full=True), "hrnet_w48": w48, "hrnet_w48-full": replace(w48, full=True),
            "swin_l": swin, "swin_l-light": replace(swin, full=False)}


PRESETS: dict[str, Config] = _presets()

# ---- Necks over a backbone of common/backbones.py (ResNet, HRNet, Swin-L): maps of stride 4, 8, 16, 32 ------


class FPN(nn.Module):
    """Feature pyramid of ResNets and Swin: every map gets the coarser ones, nearest cell, and a 3×3 convolution."""

    def __init__(self, channels: list[int], dim: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        for i in range(len(maps) - 2, -1, -1):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], maps[i].shape[-2:], mode="nearest")
        return [output(x) for output, x in zip(self.output, maps)]


class HRFPN(nn.Module):
    """All branches of an HRNet at the finest resolution, mixed, then average-pooled for the coarser maps.

    laterals: the form of W48. Each coarser map also gets its own branch, and the convolutions have no bias.
    """

    def __init__(self, channels: list[int], dim: int, laterals: bool):
        super().__init__()
        self.reduce = nn.Conv2d(sum(channels), dim, 1)
        self.lateral = nn.ModuleList(nn.Conv2d(c, dim, 1, bias=False) for c in channels[1:]) if laterals else []
        self.output = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, bias=not laterals) for _ in channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        fine, *coarse = maps
        fine = torch.cat([fine, *(F.interpolate(x, scale_factor=2 ** i, mode="bilinear", align_corners=False)
                                  for i, x in enumerate(coarse, 1))], 1)
        mixed = [self.reduce(fine)]
        for i, x in enumerate(coarse):
            pooled = F.avg_pool2d(mixed[-1], 2)
            mixed.append(pooled + self.lateral[i](x) if self.lateral else pooled)
        return [output(x) for output, x in zip(self.output, mixed)]


def backbone_and_neck(cfg: Config) -> tuple[nn.Module, nn.Module]:
    if cfg.backbone in HRNETS:
        backbone = HRNet(HRNETS[cfg.backbone], cfg.frozen_norm)
        return backbone, HRFPN(backbone.channels, cfg.dim, laterals=cfg.backbone == "hrnet_w48")
    backbone = Swin() if cfg.backbone == "swin_l" else ResNet(*RESNETS[cfg.backbone], cfg.frozen_norm)
    return backbone, FPN(backbone.channels, cfg.dim)


# ---- RoIAlign: the inside of a box as a square of cells ------------------------------------------------------


class Pyramid(NamedTuple):
    """The neck's maps as one table: a row per cell, level by level, in each image by image, in each row by row."""
    cells: Tensor          # (N, C)
    sides: Tensor          # (L, 2) width and height of each level
    start: Tensor          # (L,) its first row


def make_pyramid(maps: list[Tensor]) -> Pyramid:
    cells = [rearrange(x, "b c h w -> (b h w) c") for x in maps]
    start = list(accumulate((len(x) for x in cells), initial=0))[:-1]
    device = maps[0].device
    return Pyramid(torch.cat(cells), torch.tensor([x.shape[:1:-1] for x in maps], device=device),
                   torch.tensor(start, device=device))


def box_level(boxes: Tensor) -> Tensor:
    """The level that a box is pooled from: 0 (stride 4) below 112 pixels, 1 below 224, ... ; boxes (R, 4) → (R,)."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=0)
    return (4 + torch.log2(area.sqrt() / 224 + 1e-8)).floor().clamp(2, 5).long() - 2


def samples(low: Tensor, extent: Tensor, size: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Along one axis, the cells that a bin averages and their weights: two samples per bin, between two cells each.

    low, extent, size (R,): where the box starts, how long it is, and how long the map is, in cells.
    Returns  cells and weights (R, bins, 4); a sample more than a cell outside of the map weighs nothing
    """
    place = torch.arange(0.5, 2 * bins, dtype=low.dtype, device=low.device) / (2 * bins)    # 1/4 and 3/4 of each bin
    # a box that diverged must reach the check of the losses, not end as an impossible cell
    c = (low[:, None] + extent[:, None] * place).nan_to_num()                      # (R, 2·bins)
    size = size[:, None]
    inside = ((c >= -1) & (c <= size)).to(c.dtype) / 2
    c = torch.minimum(c.clamp(min=0), size.to(c.dtype))
    left = torch.minimum(c.long(), size - 1)
    right = torch.minimum(left + 1, size - 1)
    weight = torch.stack([(1 - (c - left)) * inside, (c - left) * inside], -1)
    return torch.stack([left, right], -1).unflatten(1, (bins, 2)).flatten(2), weight.unflatten(1, (bins, 2)).flatten(2)


def roi_align(pyramid: Pyramid, image: Tensor, boxes: Tensor, level: Tensor, bins: int) -> Tensor:
    """The inside of each box as bins × bins cells, each the mean of 2×2 bilinear samples (aligned RoIAlign).

    image, level (R,) say whose map a box (R, 4) lies on. No sample is ever stored: a cell is a weighted sum of 16 rows
    of the pyramid. Gradients go to the pyramid, not to the boxes.
    Returns  (R, bins², C), cells row by row
    """
    (width, height), corners = pyramid.sides[level].unbind(1), boxes.detach() / (4 * 2 ** level)[:, None] - 0.5
    (x1, y1), (w, h) = corners[:, :2].unbind(1), (corners[:, 2:] - corners[:, :2]).unbind(1)
    x, weight_x = samples(x1, w, width, bins)
    y, weight_y = samples(y1, h, height, bins)
    first = pyramid.start[level] + image * height * width
    row = (first[:, None, None] + y * width[:, None, None])[:, :, None, :, None] + x[:, None, :, None, :]
    weight = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]         # (R, bins, bins, 4, 4)
    out = F.embedding_bag(row.flatten(3).flatten(0, 2), pyramid.cells.to(weight.dtype), mode="sum",
                          per_sample_weights=weight.flatten(3).flatten(0, 2))
    return out.view(len(boxes), bins * bins, -1)


# ---- Box decoder ---------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Attention of N tokens to each other: (B, N, C) → (B, N, C)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.in_proj(x), "b n (three m d) -> three b m n d", three=3, m=self.heads)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """norm(x + W₂ ReLU(W₁ x))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class DynamicConv(nn.Module):
    """DyMLP_channel (eq. 1): a query writes the weights of two linear layers that its box's inside goes through.

    Takes    query (..., Cq);  x (..., cells, dim), where ... may be broadcast
    Returns  (..., out)
    """

    def __init__(self, query_dim: int, dim: int, cells: int, inner: int, out: int):
        super().__init__()
        self.shape = dim, inner
        self.generate = nn.Linear(query_dim, 2 * dim * inner)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(inner), nn.LayerNorm(dim), nn.LayerNorm(out)
        self.out = nn.Linear(cells * dim, out)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        first, second = self.generate(query).chunk(2, -1)
        x = F.relu(self.norm1(x @ first.unflatten(-1, self.shape)))
        x = F.relu(self.norm2(x @ second.unflatten(-1, self.shape[::-1])))
        return F.relu(self.norm3(self.out(x.flatten(-2))))


LONGEST = math.log(100000 / 16)          # of a logarithm of growth


def move_boxes(boxes: Tensor, delta: Tensor) -> Tensor:
    """Boxes (..., 4) moved by half of delta's (dx, dy) in units of their size and made exp(dw, dh) times as large."""
    size, centre = boxes[..., 2:] - boxes[..., :2], (boxes[..., :2] + boxes[..., 2:]) / 2
    centre, half = centre + delta[..., :2] / 2 * size, delta[..., 2:].clamp(max=LONGEST).exp() * size / 2
    return torch.cat([centre - half, centre + half], -1)


class BoxStage(nn.Module):
    """One stage of the box decoder (Sec. 3.1, Fig. 2b):

        Q_I ← FFN(DyMLP_channel(MHSA(Q_I), RoIAlign(b)));  b ← b + Δ(Q_I);  score = head(Q_I)            (eq. 1)

    Takes    queries (B, Q, C), boxes (B, Q, 4)
    Returns  queries, logits (B, Q), boxes
    """

    def __init__(self, cfg: Config):
        super().__init__()
        dim = cfg.dim
        self.bins = cfg.box_roi
        self.attention, self.norm1 = SelfAttention(dim, cfg.heads), nn.LayerNorm(dim)
        self.dynamic, self.norm2 = DynamicConv(dim, dim, cfg.box_roi ** 2, cfg.dynamic, dim), nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, cfg.ffn)

        def layer() -> list[nn.Module]:
            return [nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU()]

        self.score_tower, self.score = nn.Sequential(*layer()), nn.Linear(dim, 1)
        self.delta_tower, self.delta = nn.Sequential(*layer(), *layer(), *layer()), nn.Linear(dim, 4)

    def forward(self, queries: Tensor, boxes: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor, Tensor]:
        image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
        flat = boxes.flatten(0, 1)
        inside = roi_align(pyramid, image, flat, box_level(flat.detach()), self.bins)
        queries = self.norm1(queries + self.attention(queries))
        queries = self.norm2(queries + self.dynamic(queries.flatten(0, 1), inside).view_as(queries))
        queries = self.ffn(queries)
        logits = self.score(self.score_tower(queries)).squeeze(-1)
        delta = self.delta(self.delta_tower(queries)).to(boxes.dtype)
        return queries, logits, move_boxes(boxes, delta)


# ---- Keypoint decoder: how a part looks at the inside of its person's box (Table 1) --------------------------


class SPEGM(nn.Module):
    """Spatial part embedding generation:  A = softmax(conv(U)),  E = Linear(A Uᵀ)   (Sec. 3.2, Fig. 2c)

    U is G at twice its resolution; A is one map of attention for each part over U's cells.
    Takes    maps G (R, C, n, n); looks at no query
    Returns  (R, M, D)
    """

    def __init__(self, cfg: Config, parts: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(cfg.dim, cfg.dim, 4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(cfg.dim)
        self.attention = nn.Conv2d(cfg.dim, parts, 3, padding=1)
        self.out = nn.Linear(cfg.dim, cfg.part_dim)

    def forward(self, maps: Tensor, queries: Tensor) -> Tensor:
        maps = F.relu(self.norm(self.upsample(maps)), inplace=True)
        attention = self.attention(maps).flatten(2).softmax(-1)                    # (R, M, cells)
        return self.out(attention @ rearrange(maps, "r c h w -> r (h w) c"))


class CrossAttention(nn.Module):
    """The queries attend to the cells (Table 1, MHSA). maps (R, C, n, n), queries (R, M, D) → (R, M, D)."""

    def __init__(self, cfg: Config, parts: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(cfg.part_dim, cfg.heads, kdim=cfg.dim, vdim=cfg.dim, batch_first=True)

    def forward(self, maps: Tensor, queries: Tensor) -> Tensor:
        cells = maps.flatten(2).transpose(1, 2)
        return self.attention(queries, cells, cells, need_weights=False)[0]


class DynamicMLP(nn.Module):
    """The queries write the weights of layers over channels or over places (Table 1, DyMLP). As CrossAttention."""

    def __init__(self, cfg: Config, parts: int):
        super().__init__()
        sides = (cfg.dim, cfg.pose_roi ** 2)
        self.channel = cfg.interaction == "channel"
        self.dynamic = DynamicConv(cfg.part_dim, *(sides if self.channel else sides[::-1]), cfg.dynamic, cfg.part_dim)

    def forward(self, maps: Tensor, queries: Tensor) -> Tensor:
        x = maps.flatten(2)
        return self.dynamic(queries, (x.transpose(1, 2) if self.channel else x)[:, None])


class Pool(nn.Module):
    """The mean over all cells, the same for every part (Table 2b, baseline). As CrossAttention."""

    def __init__(self, cfg: Config, parts: int):
        super().__init__()
        self.out = nn.Linear(cfg.dim, cfg.part_dim)

    def forward(self, maps: Tensor, queries: Tensor) -> Tensor:
        return self.out(maps.mean((2, 3)))[:, None].expand_as(queries)


LOOK = dict(spegm=SPEGM, mhsa=CrossAttention, channel=DynamicMLP, spatial=DynamicMLP, pool=Pool)

# ---- Keypoint decoder: how part queries go from stage to stage (Table 2a) ------------------------------------


class SIM(nn.Module):
    """Selective iteration:  g_E, g_P = sigmoid(MLP(E + P)),  P ← g_E E + g_P P   (eq. 3, Fig. 2d)

    E (R, M, D) of this stage; P of the stage before, at the first one learned and (1, M, D).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.linear1, self.norm = nn.Linear(dim, dim // 4, bias=False), nn.LayerNorm(dim // 4)
        self.linear2 = nn.Linear(dim // 4, 2 * dim)

    def forward(self, embedding: Tensor, parts: Tensor) -> Tensor:
        gates = self.linear2(F.relu(self.norm(self.linear1(embedding + parts)))).sigmoid()
        new, old = gates.chunk(2, -1)
        return embedding * new + parts * old


class Sum(nn.Module):
    """P ← E + P."""

    def forward(self, embedding: Tensor, parts: Tensor) -> Tensor:
        return embedding + parts


class Concat(nn.Module):
    """P ← W [E, P]."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, embedding: Tensor, parts: Tensor) -> Tensor:
        return self.linear(torch.cat([embedding, parts.expand_as(embedding)], -1))


class Renew(nn.Module):
    """P ← E: nothing is kept of the stage before."""

    def forward(self, embedding: Tensor, parts: Tensor) -> Tensor:
        return embedding


def make_update(kind: str, dim: int) -> nn.Module:
    return dict(sim=lambda: SIM(dim), sum=Sum, concat=lambda: Concat(dim), none=Renew)[kind]()


# ---- Keypoint decoder ----------------------------------------------------------------------------------------

LIMBS = {"shoulders": ("shoulder",), "arm": ("elbow", "wrist", "hand", "finger"), "hips": ("hip",),
         "leg": ("knee", "ankle", "foot", "toe")}


def keypoint_parts(skeleton: Skeleton, scheme: str) -> list[list[int]]:
    """Indices of the keypoints of each part, by their names (Fig. 4): what is no limb is the head.

    a every keypoint alone;  b the head together, the rest alone;  c head, shoulders, hips, arms and legs;
    d head, and arms and legs with their shoulder or hip.
    """
    parts: dict[object, list[int]] = {}
    for k, name in enumerate(skeleton.keypoints):
        read = words(name)
        limb = next((limb for limb, joints in LIMBS.items() if set(joints) & set(read)), "head")
        side = next((word[0] for word in read if word in ("left", "right", "l", "r")), "")
        if scheme == "d":
            limb = dict(shoulders="arm", hips="leg").get(limb, limb)
        alone = scheme == "a" or scheme == "b" and limb != "head"
        parts.setdefault(k if alone else (limb, side if limb in ("arm", "leg") else ""), []).append(k)
    return list(parts.values())


class PartHead(nn.Module):
    """Coordinates  W x / |x| + b  and deviations  sigmoid(V x + c)  of a part's joints. (R, D) → twice (R, k, 2)."""

    def __init__(self, dim: int, keypoints: int):
        super().__init__()
        self.coordinates, self.sigmas = nn.Linear(dim, 2 * keypoints), nn.Linear(dim, 2 * keypoints)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        coordinates = F.linear(x, self.coordinates.weight) / x.norm(dim=-1, keepdim=True) + self.coordinates.bias
        return coordinates.unflatten(-1, (-1, 2)), self.sigmas(x).sigmoid().unflatten(-1, (-1, 2))


class KeypointStage(nn.Module):
    """One stage of the keypoint decoder (Sec. 3.1 to 3.3, Fig. 2c-e):

        G = convs(RoIAlign(b));  E = SPEGM(G);  Q_P ← MHSA(SIM(E, Q_P));  μ, σ = Linear(Q_P)              (eq. 2)

    in the full form also Q_I ← FFN(DyMLP_channel(Q_I, G)), before E (Fig. 3b).
    Takes    image (R,) of each box (R, 4);  queries Q_I (R, C);  parts Q_P (R, M, D) or (1, M, D)
    Returns  keypoints and sigmas (R, K, 2), relative to the box; the new queries and parts
    """

    def __init__(self, cfg: Config, parts: list[list[int]]):
        super().__init__()
        dim, part_dim = cfg.dim, cfg.part_dim
        self.bins, self.query = cfg.pose_roi, cfg.query
        widths = [dim] + [cfg.conv_width] * (cfg.convs - 1) + [dim]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.full = cfg.full
        if cfg.full:
            self.dynamic = DynamicConv(dim, dim, cfg.pose_roi ** 2, cfg.dynamic, dim)
            self.query_norm, self.query_ffn = nn.LayerNorm(dim), FeedForward(dim, cfg.ffn)
        self.residual = nn.ModuleList(nn.Linear(dim, part_dim) for _ in parts)
        self.look = LOOK[cfg.interaction](cfg, len(parts))
        self.update = make_update(cfg.update, part_dim)
        self.attention, self.norm = SelfAttention(part_dim, cfg.heads), nn.LayerNorm(part_dim)
        self.ffn = FeedForward(part_dim, cfg.ffn)
        self.heads = nn.ModuleList(PartHead(part_dim, len(part)) for part in parts)
        order = torch.tensor(sum(parts, [])).argsort()                             # where each keypoint stands
        self.register_buffer("order", order, persistent=False)

    def inside(self, pyramid: Pyramid, image: Tensor, boxes: Tensor) -> Tensor:
        """G (R, C, n, n): the inside of each box on the finest map, after the convolutions."""
        cells = roi_align(pyramid, image, boxes, torch.zeros_like(image), self.bins)
        maps = cells.view(len(boxes), self.bins, self.bins, -1).permute(0, 3, 1, 2)
        for conv in self.convs:
            maps = F.relu(conv(maps), inplace=True)
        return maps

    def forward(self, pyramid: Pyramid, image: Tensor, boxes: Tensor, queries: Tensor,
                parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        maps = self.inside(pyramid, image, boxes)
        if self.full:
            cells = rearrange(maps, "r c h w -> r (h w) c")
            queries = self.query_ffn(self.query_norm(queries + self.dynamic(queries, cells)))
        residual = torch.stack([part(queries) for part in self.residual], 1)       # (R, M, D)
        looking = residual if self.query == "instance" else parts.expand_as(residual)
        parts = self.update(self.look(maps, looking) + residual, parts)
        parts = self.ffn(self.norm(parts + self.attention(parts)))
        keypoints, sigmas = zip(*(head(x) for head, x in zip(self.heads, parts.unbind(1))))
        return torch.cat(keypoints, 1)[:, self.order], torch.cat(sigmas, 1)[:, self.order], queries, parts


# ---- The flow: which errors a pose makes (RLE, Li et al., ICCV 2021) -----------------------------------------


class RealNVP(nn.Module):
    """Six affine coupling layers between the normal distribution z and errors x of a keypoint, both (..., 2).

    Layer i leaves one coordinate as it is, y for even i, and scales and shifts the other one:

        x_other = z_other exp(s_i(z_kept)) + t_i(z_kept)
    """

    def __init__(self, layers: int = 6, hidden: int = 64):
        super().__init__()

        def net(*last: nn.Module) -> nn.Module:
            return nn.Sequential(nn.Linear(2, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden), nn.LeakyReLU(),
                                 nn.Linear(hidden, 2), *last)

        self.s = nn.ModuleList(net(nn.Tanh()) for _ in range(layers))
        self.t = nn.ModuleList(net() for _ in range(layers))
        kept = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(layers // 2, 1)
        self.register_buffer("kept", kept, persistent=False)

    def coupling(self, i: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale, and the shift; 0 for the coordinate that is kept."""
        other = 1 - self.kept[i]
        return self.s[i](kept) * other, self.t[i](kept) * other

    def forward(self, z: Tensor) -> Tensor:
        """Draws z of the normal distribution → errors."""
        for i in range(len(self.s)):
            scale, shift = self.coupling(i, z * self.kept[i])
            z = z * scale.exp() + shift
        return z

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Errors → z, and log |det ∂z/∂x| (...)."""
        log_det = x.new_zeros(x.shape[:-1])
        for i in reversed(range(len(self.s))):
            scale, shift = self.coupling(i, x * self.kept[i])
            x, log_det = (x - shift) * (-scale).exp(), log_det - scale.sum(-1)
        return x, log_det

    def log_prob(self, x: Tensor) -> Tensor:
        """log P_φ(x), (..., 2) → (...)."""
        z, log_det = self.inverse(x)
        return log_det - z.square().sum(-1) / 2 - math.log(2 * math.pi)


# ---- The model -----------------------------------------------------------------------------------------------

TENSORS = ("keypoints", "visible", "boxes", "sizes")
KEPT = 25          # queries with poses under `prune`: COCO's evaluation counts the best 20 people of an image


@dataclass
class Targets:
    """The people of one image, in pixels of the network's input. P people, possibly none."""
    keypoints: Tensor      # (P, K, 2) xy; 0 where not labelled
    visible: Tensor        # (P, K) 1 = labelled
    boxes: Tensor          # (P, 4) x1, y1, x2, y2
    sizes: Tensor          # (P, 2) w, h of the image that each is in
    image_id: int | str = 0

    def to(self, device: torch.device) -> "Targets":
        moved = (getattr(self, name).to(device, non_blocking=True) for name in TENSORS)
        return Targets(*moved, self.image_id)

    def take(self, index: Tensor) -> "Targets":
        """Some of the people, in this order, also repeatedly."""
        return Targets(*(getattr(self, name)[index] for name in TENSORS))

    def __len__(self) -> int:
        return len(self.boxes)


class Output(NamedTuple):
    """What a stage says of every query."""
    logits: Tensor         # (B, Q) of being a person
    boxes: Tensor          # (B, Q, 4) pixels
    keypoints: Tensor      # (B, Q, K, 2) μ, relative to the box; 0 for queries that get no pose
    sigmas: Tensor         # (B, Q, K, 2) σ in (0, 1), relative to the box; 1 for queries that get no pose


def place_keypoints(keypoints: Tensor, boxes: Tensor) -> Tensor:
    """Keypoints (..., K, 2) relative to boxes (..., 4) → pixels."""
    corner, size = boxes[..., None, :2], (boxes[..., 2:] - boxes[..., :2])[..., None, :]
    return (keypoints + 0.5) * size + corner


def spread_boxes(count: int) -> Tensor:
    """Boxes (count, 4) as cx, cy, w, h in fractions: half of the image, centres spread evenly by the golden ratio."""
    i = torch.arange(count) + 0.5
    centre = torch.stack([i / count, i * (math.sqrt(5) - 1) / 2 % 1], 1)
    return torch.cat([0.25 + centre / 2, torch.full((count, 2), 0.5)], 1)


class QueryPose(nn.Module):
    """The whole network; see `forward`."""

    def __init__(self, cfg: Config, skeleton: Skeleton):
        super().__init__()
        self.cfg, self.skeleton = cfg, skeleton
        self.backbone, self.neck = backbone_and_neck(cfg)
        whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(cfg.queries, 1)
        self.boxes = nn.Parameter(spread_boxes(cfg.queries) if cfg.spread else whole)   # cx, cy, w, h in fractions
        self.queries = nn.Parameter(torch.randn(cfg.queries, cfg.dim))
        parts = (keypoint_parts(skeleton, cfg.scheme) if cfg.query == "part" else
                 [list(range(skeleton.num_keypoints))])
        self.parts = nn.Parameter(torch.randn(len(parts), cfg.part_dim))
        box_stage, keypoint_stage = BoxStage(cfg), KeypointStage(cfg, parts)
        self.box_stages = nn.ModuleList(copy.deepcopy(box_stage) for _ in range(cfg.stages))
        self.keypoint_stages = nn.ModuleList(copy.deepcopy(keypoint_stage) for _ in range(cfg.stages))
        self.flow = RealNVP()
        self.reset_parameters()
        if cfg.freeze and isinstance(self.backbone, ResNet):
            for part in (self.backbone.stem, self.backbone.res2):
                part.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Start values of the release: Xavier in both decoders; zero where it sets a bias at all."""
        for parameter in [*self.box_stages.parameters(), *self.keypoint_stages.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for conv in (m for m in self.neck.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        for module in self.modules():
            zero = [module.in_proj, module.out_proj] if isinstance(module, SelfAttention) else []
            zero += [module.attention, module.out] if isinstance(module, SPEGM) else []
            zero += [*module.convs] if isinstance(module, KeypointStage) else []
            for layer in zero:
                nn.init.zeros_(layer.bias)
        for stage in self.box_stages:
            nn.init.constant_(stage.score.bias, -math.log(99))                     # a prior of 0.01

    def first_boxes(self, sizes: Tensor) -> Tensor:
        """The learned boxes (B, Q, 4) in images of sizes (B, 2)."""
        centre, half = self.boxes[:, :2], self.boxes[:, 2:] / 2
        return torch.cat([centre - half, centre + half], 1) * sizes.repeat(1, 2)[:, None]

    def best_queries(self, logits: Tensor) -> Tensor:
        """Rows, image by image, of the queries (B, Q) that get poses in prediction."""
        if self.training or not self.cfg.prune or logits.shape[1] <= KEPT:
            return torch.arange(logits.numel(), device=logits.device)
        best = logits.topk(KEPT).indices.sort().values
        return (best + torch.arange(0, logits.numel(), logits.shape[1], device=logits.device)[:, None]).flatten()

    def pose(self, stage: int, pyramid: Pyramid, found: tuple[Tensor, Tensor, Tensor], rows: Tensor,
             parts: Tensor) -> tuple[Output, Tensor, Tensor]:
        """A keypoint stage on rows (R,) of the B·Q queries of a box stage → output, new queries (R, C), new parts."""
        queries, logits, boxes = found
        keypoints, sigmas, queries, new = self.keypoint_stages[stage](
            pyramid, rows // logits.shape[1], boxes.detach().flatten(0, 1)[rows], queries.flatten(0, 1)[rows], parts)

        def place(x: Tensor, empty: float) -> Tensor:
            full = x.new_full((logits.numel(), *x.shape[1:]), empty).index_copy(0, rows, x)
            return full.view(*logits.shape, *x.shape[1:])

        return Output(logits, boxes, place(keypoints, 0.0), place(sigmas, 1.0)), queries, \
            parts if self.cfg.update == "none" else new

    def forward(self, images: Tensor, sizes: Tensor,
                choose: Callable[[list[tuple[Tensor, Tensor]]], Tensor] | None = None) -> dict:
        """Images (B, 3, H, W), normalised, of sizes (B, 2) (w, h) in pixels before padding → people.

        choose   takes (logits, boxes) of all stages, gives a mask (B, Q) of the queries that need a pose: those
                 matched in any stage (`matched`). A query keeps its part queries from stage to stage.
        Returns  stages: an `Output` per stage. With `prune`, outside of training, only the queries of the best scores
                 have poses in the last one
        """
        pyramid = make_pyramid(self.neck(self.backbone(images)))
        boxes, queries = self.first_boxes(sizes), self.queries.expand(len(images), -1, -1)
        parts, outputs, last = self.parts[None], [], self.cfg.stages - 1
        if self.cfg.full and self.cfg.iterate:                                     # Fig. 3b: the stages take turns
            for s, box_stage in enumerate(self.box_stages):
                found = box_stage(queries, boxes, pyramid)
                every = torch.arange(found[1].numel(), device=images.device)
                rows = self.best_queries(found[1]) if s == last else every
                if s == last and s > 0 and self.cfg.update != "none":
                    parts = parts[rows]
                output, queries, parts = self.pose(s, pyramid, found, rows, parts)
                outputs.append(output)
                queries, boxes = queries.view_as(found[0]) if s < last else queries, found[2].detach()
            return dict(stages=outputs)
        found = []                                                       # boxes need no pose: all of them first
        for box_stage in self.box_stages:
            found.append(box_stage(queries, boxes, pyramid))
            queries, boxes = found[-1][0], found[-1][2].detach()
        rows = self.best_queries(found[-1][1])
        if choose:
            rows = choose([(logits, boxes) for _, logits, boxes in found]).flatten().nonzero().squeeze(1)
            rows = rows if len(rows) else rows.new_zeros(1)                        # batch norm needs something to see
        for s in range(self.cfg.stages):
            output, _, parts = self.pose(s, pyramid, found[s], rows, parts)
            outputs.append(output)
        return dict(stages=outputs)


@torch.no_grad()
def fuse(model: QueryPose) -> QueryPose:
    """A copy for inference: the backbone's norms are folded into its convolutions."""
    model = copy.deepcopy(model).eval()
    for module in [m for m in model.modules() if isinstance(m, ConvNorm)]:
        module.fold()
    return model.to(memory_format=torch.channels_last)


# ---- Building a model, and the released weights --------------------------------------------------------------

TRUNK, BOX_STAGE, KEYPOINT_STAGE = (rf"^{part}\." for part in (
    r"backbone\.bottom_up", r"head\.head_series\.(\d+)", r"head\.pose_head_series\.(\d+)"))
RENAME = [            # released name → ours, first match wins; what matches nothing keeps its name
    (TRUNK + r"stem\.conv1\.norm\.", "backbone.stem.norm."), (TRUNK + r"stem\.conv1\.", "backbone.stem.conv."),
    (TRUNK + r"(res\d\.\d+\.\w+)\.norm\.", r"backbone.\1.norm."),
    (TRUNK + r"(res\d\.\d+\.\w+)\.weight", r"backbone.\1.conv.weight"),
    (TRUNK + r"(.*)bn(\d)\.", r"backbone.\1conv\2.norm."), (TRUNK + r"(.*)conv(\d)\.", r"backbone.\1conv\2.conv."),
    *((TRUNK + theirs + rf"\.{i}\.", rf"backbone.{ours}.{name}.")
      for theirs, ours in {r"(layer1\.\d+)\.downsample": r"\1.shortcut", r"transition1\.0": "transition1.0",
                           r"transition1\.1\.0": "transition1.1", r"transition2\.2\.0": "transition2",
                           r"transition3\.3\.0": "transition3",
                           r"(stage.*)fuse_layers\.(\d\.\d\.\d)": r"\1fuse.\2",
                           r"(stage.*)fuse_layers\.(\d\.\d)": r"\1fuse.\2"}.items()
      for i, name in enumerate(("conv", "norm"))),
    (TRUNK, "backbone."),
    *((rf"^backbone\.fpn_lateral{i + 2}\.", f"neck.lateral.{i}.") for i in range(4)),
    *((rf"^backbone\.fpn_output{i + 2}\.", f"neck.output.{i}.") for i in range(4)),
    *((rf"^backbone\.lateral_conv\.{i + 1}\.", f"neck.lateral.{i}.") for i in range(3)),
    (r"^backbone\.fpn_conv\.", "neck.output."), (r"^backbone\.reduction_conv\.0\.", "neck.reduce."),
    (r"^init_proposal_boxes\.weight", "boxes"), (r"^init_proposal_features\.weight", "queries"),
    (r"^part_query\.weight", "parts"), (r"^criterion\.flow\.flow\.", "flow."),
    *((BOX_STAGE + theirs, rf"box_stages.\1.{ours}") for theirs, ours in {
        r"self_attn\.in_proj_": "attention.in_proj.", r"self_attn\.": "attention.",
        r"inst_interact\.dynamic_layer\.": "dynamic.generate.", r"inst_interact\.out_layer\.": "dynamic.out.",
        r"inst_interact\.": "dynamic.", r"norm3\.": "ffn.norm.", r"linear": "ffn.linear",
        r"cls_module\.": "score_tower.", r"class_logits\.": "score.", r"reg_module\.": "delta_tower.",
        r"bboxes_delta\.": "delta.", "": ""}.items()),
    (KEYPOINT_STAGE + r"fc_coord\.(\d+)\.linear\.", r"keypoint_stages.\1.heads.\2.coordinates."),
    (KEYPOINT_STAGE + r"fc_sigma\.(\d+)\.linear\.", r"keypoint_stages.\1.heads.\2.sigmas."),
    *((KEYPOINT_STAGE + rf"inst_convs\.{2 * i}\.", rf"keypoint_stages.\1.convs.{i}.") for i in range(6)),
    *((KEYPOINT_STAGE + theirs, rf"keypoint_stages.\1.{ours}") for theirs, ours in {
        r"pose_decoder_inst_interact\.dynamic_layer\.": "dynamic.generate.",
        r"pose_decoder_inst_interact\.out_layer\.": "dynamic.out.", r"pose_decoder_inst_interact\.": "dynamic.",
        r"inst_norm\.": "query_norm.", r"norm2\.": "query_ffn.norm.", r"linear([12])\.": r"query_ffn.linear\2.",
        r"part_embed_generator\.upsample\.0\.": "look.upsample.", r"part_embed_generator\.upsample\.1\.": "look.norm.",
        r"part_embed_generator\.LSA_conv\.": "look.attention.", r"part_embed_generator\.fc\.": "look.out.",
        r"updater\.fc([12])\.": r"update.linear\2.", r"updater\.norm_fc1\.": "update.norm.",
        r"kps_self_attn\.in_proj_": "attention.in_proj.", r"kps_self_attn\.": "attention.",
        r"self_attn_norm\.": "norm.", r"norm2_l\.": "ffn.norm.", r"linear([12])_l\.": r"ffn.linear\2.",
        r"residual_filter\.": "residual."}.items()),
]
IGNORED = {r"\.updater\.(fc3|norm_fc3)\.": "never used", r"^backbone\.(fpn_conv\.4|lateral_conv\.0)\.": "never used",
           r"\.relative_position_index$": "computed here", r"^criterion\.flow\.flow\.mask$": "a constant"}
TORCHVISION = [(r"^layer1\.", "res2."), (r"^layer2\.", "res3."), (r"^layer3\.", "res4."), (r"^layer4\.", "res5."),
               (r"^conv1\.", "stem.conv1."), (r"^bn1\.", "stem.conv1.norm.")]
INSIDE_BLOCK = [(r"bn(\d)\.", r"conv\1.norm."), (r"downsample\.0\.", "shortcut."),
                (r"downsample\.1\.", "shortcut.norm.")]
# of weights to start from: what is not for us, and what of ours they lack
FOREIGN = r"^(fc|head|norm|final_layer|stem\.fc)\.|\.attn_mask$"
LACKING = r"^(?!backbone\.)|^backbone\.norm\d\.|^backbone\.stage4\.2\.fuse\.[123]\."


def convert_official(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Tensors of a released checkpoint under this file's names."""
    return weights.rename({name: value for name, value in state.items()
                           if not any(re.search(pattern, name) for pattern in IGNORED)}, RENAME)


def recognise(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(preset, number of keypoints) of a released QueryPose checkpoint, by its tensors; None for something else."""
    if not {"part_query.weight", "init_proposal_boxes.weight"} <= state.keys():
        return None
    full = "head.pose_head_series.0.inst_norm.weight" in state
    heads = [value for name, value in state.items()
             if re.match(r"head\.pose_head_series\.0\.fc_coord\.\d+\.linear\.bias", name)]
    signs = {"stem.conv1.weight": "r50", "patch_embed.proj.weight": "swin_l", "transition1.0.0.weight": "hrnet_w"}
    net = next((net for sign, net in signs.items() if f"backbone.bottom_up.{sign}" in state), None)
    if net == "hrnet_w":
        net += str(len(state["backbone.bottom_up.transition1.0.0.weight"]))
    for preset in (net, f"{net}-light", f"{net}-full"):
        if preset in PRESETS and PRESETS[preset].full == full:
            return preset, sum(map(len, heads)) // 2
    return None


def build(preset: str, skeleton: str | Skeleton = "coco", **overrides) -> QueryPose:
    """A model with start weights; overrides are Config fields."""
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(PRESETS)}")
    return QueryPose(resolve(PRESETS[preset], **overrides), get_skeleton(skeleton))


def backbone_names(state: dict[str, Tensor], resnet: bool) -> dict[str, Tensor]:
    """Names of a backbone's own file → those of a QueryPose release."""
    state = {name: value for name, value in state.items() if not re.search(FOREIGN, name)}
    if resnet:                                                     # of torchvision, or of detectron2 as they are
        state = weights.rename(weights.rename(state, TORCHVISION), INSIDE_BLOCK)
    prefix = "backbone.bottom_up."
    return {prefix + name.removeprefix(prefix): value for name, value in state.items()}


def load_init(model: QueryPose, source: str) -> None:
    """Start weights by file or name: QueryPose (all), a ResNet of torchvision or detectron2, an HRNet, a Swin."""
    path = Path(source) if Path(source).exists() else weights.fetch(source)
    state, lacking = weights.load_tensors(path), {r"num_batches_tracked$": "counts batches of another training"}
    if "part_query.weight" not in state:
        state = backbone_names(state, isinstance(model.backbone, ResNet))
    state = convert_official(state, model.cfg)
    if not any(name.startswith("box_stages.") for name in state):
        lacking |= {f"^{re.escape(name)}$": "not in a backbone's file" for name in model.state_dict()
                    if name not in state and re.search(LACKING, name)}
    weights.load_strict(model, state, lacking)
    print(f"start weights from {path}: {len(state)} of {len(model.state_dict())} tensors")


# ---- Matching and losses (Sec. 3.4). A set of pairs is (image, query, person): three index tensors of one ----
# length; `person` counts through all people of the batch in image order.

Pairs = tuple[Tensor, Tensor, Tensor]
WEIGHTS = dict(ce=2.0, bbox=5.0, giou=2.0, kps=1.0)
SMALLEST_SIGMA = 1e-6      # of the box; a sigmoid reaches 0


def gather_people(targets: list[Targets]) -> Targets:
    """All people of the batch behind one another."""
    return Targets(*(torch.cat([getattr(t, name) for t in targets]) for name in TENSORS))


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU = ∩ / ∪ − (hull − ∪) / hull of boxes xyxy (..., 4); leading dimensions broadcast. In [−1, 1]."""
    common = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    inter, hull = common.prod(-1), around.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def box_distance(boxes: Tensor, people: Targets) -> Tensor:
    """‖b − b*‖₁ over the four sides, as fractions of the image's w and h; boxes (..., P, 4) → (..., P)."""
    return ((boxes - people.boxes).abs() / people.sizes.repeat(1, 2)).sum(-1)


def match_cost(logits: Tensor, boxes: Tensor, people: Targets) -> Tensor:
    """Cost of giving a query to a person, (B, Q, P): 2·class + 5·L1 − 2·GIoU. The pose has no say."""
    p, boxes = logits.float().sigmoid().unsqueeze(-1), boxes.float().unsqueeze(-2)
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    return 2 * focal + 5 * box_distance(boxes, people) - 2 * generalized_iou(boxes, people.boxes)


@torch.no_grad()
def match(stages: list[tuple[Tensor, Tensor]], targets: list[Targets]) -> list[Pairs]:
    """The cheapest one-to-one assignment of people to queries, for each stage on its own (Hungarian method).

    stages: logits (B, Q) and boxes (B, Q, 4) of each. Raises FloatingPointError when a cost is not finite.
    """
    people = gather_people(targets)
    costs = torch.stack([match_cost(*stage, people) for stage in stages]).cpu()       # one wait for the GPU
    if not costs.isfinite().all():
        raise FloatingPointError("the matching cost")
    ends = np.cumsum([0] + [len(t) for t in targets])
    matchings = []
    for cost in costs.numpy():
        found = []
        for image, (first, last) in enumerate(zip(ends, ends[1:])):
            query, person = linear_sum_assignment(cost[image, :, first:last])
            found.append(np.stack([np.full_like(query, image), query, person + first]))
        matchings.append(tuple(torch.from_numpy(np.concatenate(found, 1)).to(people.boxes.device)))
    return matchings


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """−α (1 − p)² log p where positive, −(1 − α) p² log(1 − p) elsewhere, α = 0.25, summed."""
    p = logits.sigmoid()
    weight = torch.where(positive > 0, 0.25 * (1 - p) ** 2, 0.75 * p ** 2)
    return (weight * F.binary_cross_entropy_with_logits(logits, positive, reduction="none")).sum()


def pose_in_box(boxes: Tensor, people: Targets) -> tuple[Tensor, Tensor]:
    """Where the people's keypoints are in boxes (P, 4), one for each: (P, K, 2) in sizes of the box, seen from its
    centre, and (P, K), 1 for what is labelled and inside. A box without width has it at 1/1000 pixel."""
    corner, size = boxes[:, None, :2], (boxes[:, None, 2:] - boxes[:, None, :2]).clamp(min=1e-3)
    place = (people.keypoints - corner) / size
    return place - 0.5, people.visible * ((place >= 0) & (place <= 1)).all(-1)


def likelihood_loss(mu: Tensor, sigma: Tensor, true: Tensor, visible: Tensor, log_prob: Callable) -> Tensor:
    """Residual log-likelihood (eq. 4): −log P(true | ROI) of each coordinate, (P, K, 2), 0 where not visible.

        x̄ = (μ − x*) / σ,    −log P = [log σ − log φ(x̄)] + [log(σ √(2π)) + |x* − μ| / (√2 σ)]

    with φ the flow's density of x̄ and, in the second bracket, the simple density that it corrects. Keypoints are
    (P, K, 2), visible (P, K), log_prob maps (..., 2) → (...).
    Departs  φ is one density of x and y together, and counts once for each; σ counts in both brackets
    """
    sigma = sigma.clamp(min=SMALLEST_SIGMA)
    # what is not visible sits at μ: 0 times a number that is not finite would not be 0
    true = torch.where(visible[..., None] > 0, true, mu.detach())
    flow = sigma.log() - log_prob((mu - true) / sigma)[..., None]
    simple = (sigma * math.sqrt(2 * math.pi)).log() + (true - mu).abs() / (math.sqrt(2) * sigma + 1e-9)
    return visible[..., None] * (flow + simple)


def stage_losses(output: Output, pairs: Pairs, people: Targets, log_prob: Callable) -> dict[str, Tensor]:
    """The loss terms of one stage for the pairs that were matched, summed over the batch."""
    logits, boxes, mu, sigma = (x.float() for x in output)
    image, query, person = pairs
    positive, true = torch.zeros_like(logits), people.take(person)
    positive[image, query] = 1
    boxes = boxes[image, query]
    place, inside = pose_in_box(boxes.detach(), true)
    likelihood = likelihood_loss(mu[image, query], sigma[image, query], place, inside, log_prob)
    return dict(ce=focal_loss(logits, positive), bbox=box_distance(boxes, true).sum(),
                giou=(1 - generalized_iou(boxes, true.boxes)).sum(), kps=likelihood.sum() / mu.shape[-2])


def criterion(stages: list[Output], matchings: list[Pairs], targets: list[Targets],
              log_prob: Callable) -> dict[str, Tensor]:
    """All weighted loss terms by their names in the release, for the pairs of each stage; their sum is minimised.

    For every stage (_0, _1, ..., the last without suffix), per person: 2·focal + 5·L1 + 2·(1 − GIoU), which is L_QI,
    and the mean over the K keypoints, visible or not, of eq. 4, which is L_QP. Computed in float32. L_QP may be
    negative. No people give 0 with a zero gradient, but for the focal loss.
    """
    people = gather_people(targets)
    count = mean_over_ranks(torch.tensor(float(len(people)), device=people.boxes.device)).clamp(min=1)
    losses = {}
    for s, (output, pairs) in enumerate(zip(stages, matchings), 1):
        name = "" if s == len(stages) else f"_{s - 1}"
        for term, value in stage_losses(output, pairs, people, log_prob).items():
            losses[f"loss_{term}{name}"] = WEIGHTS[term] * value / count
    return losses


# ---- Prediction ---------------------------------------------------------------------------------------------

STRIDE = 32                # of the coarsest map: images are padded to multiples of it


def pad_images(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures (3, h, w) → zero-padded (B, 3, H, W) at the right and bottom, and the sizes w, h (B, 2) before."""
    sizes = torch.tensor([[p.shape[2], p.shape[1]] for p in pictures])
    width, height = ((sizes.amax(0) + STRIDE - 1) // STRIDE * STRIDE).tolist()
    images = torch.zeros(len(pictures), 3, height, width)
    for picture, image in zip(pictures, images):
        image[:, :picture.shape[1], :picture.shape[2]] = picture
    return images, sizes


def detect(model: QueryPose, pictures: list[Tensor]) -> Output:
    """What the last stage says of normalised pictures; on the CPU, in float32."""
    device = next(model.parameters()).device
    images, sizes = pad_images(pictures)
    with autocast(device, model.cfg.amp):
        output = model(images.to(device), sizes.to(device))["stages"][-1]
    return Output(*(x.float().cpu() for x in output))


def pose_scores(output: Output) -> tuple[Tensor, Tensor]:
    """Score of each person, C Σ_k (1 − σ_k) / K with C = sigmoid(logit), and 1 − σ_k of each keypoint, where σ_k is
    the mean of its deviations in x and y (Sec. 3.4): (..., Q), (..., Q, K)."""
    certain = 1 - output.sigmas.mean(-1)
    return output.logits.sigmoid() * certain.mean(-1), certain


def to_prediction(output: Output, image_id: int | str, input_px: tuple, size_px: tuple) -> Prediction:
    """The queries of one image, without the dimension B, as people in its pixels; sizes are (w, h).

    There is no NMS. Queries without a pose go, and those with nothing of their box in the image. Half a pixel less:
    the targets had it more (`people_to_learn`).
    """
    scale = np.divide(size_px, input_px)
    places = place_keypoints(output.keypoints, output.boxes).numpy() * scale - 0.5
    boxes = (output.boxes.numpy() * np.tile(scale, 2)).clip(0, np.tile(size_px, 2))
    scores, certain = (x.numpy() for x in pose_scores(output))
    seen = (boxes[:, 2:] > boxes[:, :2]).all(1) & (scores > 0)
    return Prediction(image_id, places[seen], certain[seen], scores[seen], boxes[seen])


@torch.no_grad()
def predict(model: QueryPose, batch: dict) -> list[Prediction]:
    """People of a batch {images: list of (3, h, w) from `input_image`, image_ids, sizes_px}: one Prediction per image.

    Every query with a pose is somebody, most with a score near 0.
    """
    people, output = [], detect(model, batch["images"])
    for i, picture in enumerate(batch["images"]):
        one = Output(*(x[i] for x in output))
        people.append(to_prediction(one, batch["image_ids"][i], picture.shape[:0:-1], batch["sizes_px"][i]))
    return people


# ---- Data: aspect ratio kept, short side 480 to 800, random crops, ImageNet normalisation --------------------

MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None] / 255
STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None] / 255


def normalise(image: Image.Image) -> Tensor:
    """An RGB picture as (3, h, w), each channel less ImageNet's mean and divided by its deviation."""
    return (transforms.to_tensor(image) - MEAN) / STD


def input_size(size: tuple[int, int], short_side: int, longest: float = math.inf) -> tuple[int, int]:
    """(w, h) with the shorter side `short_side`, or less where the longer one would exceed `longest`."""
    scale = short_side / min(size)
    w, h = (side * scale for side in size)
    scale = min(1.0, longest / max(w, h))
    return max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))


def input_image(image: Image.Image, cfg: Config) -> Tensor:
    """A picture of any size as the network sees it: see `short_side` and `long_side`."""
    return normalise(image.resize(input_size(image.size, cfg.short_side, cfg.long_side), Image.Resampling.BILINEAR))


def people_to_learn(sample: Sample) -> Sample:
    """Without crowd regions and boxes outside of the image; people without keypoints stay. Keypoints get half a pixel
    more: from now on the first column's centre is 0.5."""
    boxes = sample.boxes.clip(0, np.tile(np.float32(sample.size), 2))
    keep = ~sample.iscrowd & (boxes[:, 2:] > boxes[:, :2]).all(1)
    shifted = sample.keypoints + np.float32([0.5, 0.5, 0])
    return replace(sample, keypoints=shifted[keep], boxes=boxes[keep], areas=sample.areas[keep],
                   iscrowd=sample.iscrowd[keep])


def hide_outside(people: Sample, x: int, y: int, w: int, h: int) -> Sample:
    """Keypoints outside of a window of the image are no longer labelled."""
    inside = ((people.keypoints[..., :2] >= (x, y)) & (people.keypoints[..., :2] <= (x + w, y + h))).all(-1)
    return replace(people, keypoints=people.keypoints * inside[..., None])


def augment(people: Sample, cfg: Config, rng: np.random.Generator) -> Sample:
    """Crop half of the images, resize. For `short_side` 800 with the lengths of the release: short sides 480, 512,
    ..., 800; before a crop 400, 500 or 600; sides of crops 384 to 600."""
    full = cfg.short_side
    if not cfg.multiscale:
        return transforms.resize(people, input_size(people.size, full, cfg.long_side))
    if rng.random() < 0.5:
        before = int(rng.choice([full // 2, full * 5 // 8, full * 3 // 4]))
        people = transforms.resize(people, input_size(people.size, before))
        window = [int(rng.integers(full * 12 // 25, min(side, full * 3 // 4) + 1)) for side in people.size]
        corner = [int(rng.integers(0, side - length + 1)) for side, length in zip(people.size, window)]
        people = transforms.crop(hide_outside(people, *corner, *window), *corner, *window)
    short_side = int(rng.choice(range(full * 3 // 5, full + 1, 32)))
    return transforms.resize(people, input_size(people.size, short_side, cfg.long_side))


def to_targets(people: Sample) -> Targets:
    """A sample's people as tensors; keypoints without label, or outside of the image, at 0."""
    people = hide_outside(people, 0, 0, *people.size)
    labelled = torch.from_numpy(people.keypoints[..., 2:] > 0).float()
    size = torch.tensor(people.size, dtype=torch.float32)
    return Targets(keypoints=torch.from_numpy(people.keypoints[..., :2]) * labelled, visible=labelled.squeeze(-1),
                   boxes=torch.from_numpy(people.boxes), sizes=size.expand(len(labelled), 2),
                   image_id=people.image_id)


class TrainImages(torch.utils.data.Dataset):
    """One epoch of augmented training images; item i is (tensor (3, h, w), Targets, why files were skipped).

    What happens to image i depends on (seed, epoch, i) alone. A file that cannot be read gives way to the next.
    """

    def __init__(self, data: PoseDataset, cfg: Config, epoch: int):
        self.data, self.cfg, self.epoch = data, cfg, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Targets, list[str]]:
        rng = np.random.default_rng([self.cfg.seed, self.epoch, i])
        people, skipped = self.data.load_readable(i)
        if self.data.skeleton.flip is not None and rng.random() < 0.5:
            people = transforms.hflip(people, self.data.skeleton.flip)
        people = augment(people_to_learn(people), self.cfg, rng)
        return normalise(people.image), to_targets(people), skipped


def to_batch(pictures: list[Image.Image], image_ids: list, cfg: Config) -> dict:
    """RGB pictures of any size → what `predict` takes."""
    return dict(images=[input_image(picture, cfg) for picture in pictures], image_ids=image_ids,
                sizes_px=[picture.size for picture in pictures])


def evaluate(model: QueryPose, data: PoseDataset, cfg: Config, ranks: Ranks) -> tuple[dict, list[Prediction]]:
    """Metrics and predictions of a dataset; the images are shared among the processes, all get the result.

    Departs  the release passes results through a soft-NMS that takes the boxes' lower sides for scores. Many boxes end
             with a negative height, and COCO's evaluation ignores such poses instead of counting them as wrong. The
             published AP with a star (W32 72.3, W48 73.4), and with it the paper's, seems made that way; from a plain
             evaluation as here expect the one without (69.8, 71.0)
    """
    found = predict_all(partial(predict, fuse(model)), data, partial(input_image, cfg=cfg), cfg.eval_batch,
                        cfg.workers, ranks, join=list)
    return metrics.evaluate(found, data), found


# ---- Pictures: where the parts of a person look (Fig. 5 and 6), and how sure its joints are --------------------


def draw_attention(image: Image.Image, box: list[float], attention: np.ndarray) -> list[Image.Image]:
    """The inside of a box, and once more under each part's map (M, n, n): the brightest cell is the largest."""
    side = (192, 192)                                  # whatever the size of the box, and black outside of the image
    crop = image.transform(side, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    shades = (255 * attention / attention.max((1, 2), keepdims=True)).astype(np.uint8)
    heat, shown = Image.new("RGB", side, draw.RIGHT[0]), [crop]
    for shade in shades:
        mask = Image.fromarray(shade).resize(side, Image.Resampling.BILINEAR)
        shown.append(Image.composite(heat, crop.point(lambda value: value // 2), mask))
    return shown


@torch.no_grad()
def show_process(model: QueryPose, image: Image.Image, threshold: float) -> dict[str, list[Image.Image]]:
    """For eval.py --process, of people above the threshold: `sigma`, the image with an ellipse of two deviations σ at
    each keypoint, and with SPEGM `attention`, the last stage's maps A, a row per person: her box, then a map per part.
    """
    maps, skeleton, size, picture = [], model.skeleton, image.size, input_image(image, model.cfg)
    shows = model.cfg.interaction == "spegm"
    if shows:
        hook = model.keypoint_stages[-1].look.attention.register_forward_hook(lambda *call: maps.append(call[-1]))
    output = Output(*(x[0] for x in detect(model, [picture])))
    scale = torch.tensor(size) / torch.tensor(picture.shape[:0:-1])
    boxes = output.boxes * scale.repeat(2)
    rows = (pose_scores(output)[0] >= max(threshold, 1e-6)).nonzero().squeeze(1)
    people, spread = place_keypoints(output.keypoints, boxes)[rows] - 0.5, output.sigmas[rows]
    spread = spread * (boxes[rows, 2:] - boxes[rows, :2])[:, None]
    # four guesses of each joint whose standard deviations are σ
    guesses = torch.stack([people + sign * 2 ** 0.5 * spread * torch.tensor(axis) for sign in (-1, 1)
                           for axis in ([1.0, 0.0], [0.0, 1.0])])
    shown = dict(sigma=[draw.draw_ellipses(image, guesses.clamp(-1e4, 1e4).numpy(), skeleton)])
    if shows:
        hook.remove()
        posed = model.best_queries(output.logits[None]).tolist()                   # whose maps these are
        attention = maps[-1].float().flatten(2).softmax(-1).view(maps[-1].shape).cpu().numpy()
        tiles = []
        for row in rows.tolist():
            tiles += draw_attention(image, boxes[row].tolist(), attention[posed.index(row)])
        shown["attention"] = [draw.contact_sheet(tiles, 1 + attention.shape[1], 192)]
    return shown


# ---- Training -----------------------------------------------------------------------------------------------


def build_optimizer(model: QueryPose, cfg: Config) -> torch.optim.AdamW:
    """AdamW in three groups: backbone and flow learn at rates of their own."""
    rates = dict(backbone=cfg.lr_backbone, flow=cfg.lr_flow)
    groups = [dict(params=[p for p in getattr(model, name).parameters() if p.requires_grad], initial_lr=rate)
              for name, rate in rates.items()]
    rest = [p for name, p in model.named_parameters() if name.split(".")[0] not in rates]
    groups.append(dict(params=rest, initial_lr=cfg.lr))
    return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def lr_scale(step: int, steps: int, epoch: int, cfg: Config) -> float:
    """Factor on the learning rates at an optimiser step out of `steps`; the warm-up starts at 1/100."""
    scale = min(1.0, 0.01 + 0.99 * step / cfg.warmup) if cfg.warmup else 1.0
    if cfg.schedule == "cosine":
        scale *= 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return scale * 0.1 ** sum(epoch >= drop for drop in parse_numbers(cfg.drop_epochs) or ())


def batch_losses(net: nn.Module, model: QueryPose, images: Tensor, sizes: Tensor, targets: list[Targets],
                 ranks: Ranks) -> dict[str, Tensor]:
    """Forward pass of `net`, which is the model or distributes it, and loss terms of one batch.

    With `matched`, boxes of all stages are matched before any pose is computed.
    Raises FloatingPointError if one of them is not finite.
    """
    images = images.to(ranks.device, non_blocking=True, memory_format=torch.channels_last)
    targets, matchings = [t.to(ranks.device) for t in targets], []

    def choose(found: list[tuple[Tensor, Tensor]]) -> Tensor:
        matchings.extend(match(found, targets))
        needed = torch.zeros_like(found[0][0], dtype=torch.bool)
        for image, query, _ in matchings:
            needed[image, query] = True
        return needed

    with autocast(ranks.device, model.cfg.amp):
        stages = net(images, sizes.to(ranks.device), choose if model.cfg.matched else None)["stages"]
    matchings = matchings or match([output[:2] for output in stages], targets)
    losses = criterion(stages, matchings, targets, model.flow.log_prob)
    losses["unused"] = 0 * model.parts.sum()         # a gradient for DistributedDataParallel, where nothing reads them
    check_finite(losses)
    return losses


def train(cfg: Config, args) -> None:
    """Train, evaluate, keep everything in the run folder. Runs alone or under torchrun; Ctrl-C saves and leaves."""
    ranks = init_ranks(args.device)
    micro = micro_batch(cfg, ranks)
    if cfg.frozen_norm and not (cfg.init or args.saved):
        raise UserError("frozen norms need start weights: add --init resnet50 (or another), or "
                                "--no-frozen_norm")
    with rank_zero_first(ranks):                         # it makes the puppets and fetches start weights
        data, held_out = open_splits(cfg, ranks)
        seed_all(cfg.seed)                               # equal start weights on every process
        model = QueryPose(cfg, data.skeleton)
        if cfg.init and not args.saved:
            load_init(model, cfg.init)
    model.to(ranks.device, memory_format=torch.channels_last)
    ema = Ema(model, cfg.ema, cfg.ema_warmup)
    loop = Loop("querypose", cfg, args, ranks, data, held_out, model, build_optimizer(model, cfg), ema)
    net = distribute(model, ranks)

    data = data.training()
    steps = loop.plan(len(data), micro)
    for epoch in loop.epochs():
        net.train()
        for (images, sizes), targets, skipped in loop.batches(TrainImages(data, cfg, epoch), pad_images):
            loop.set_lr(lr_scale(loop.step, steps, epoch, cfg))
            with loop.naming([t.image_id for t in targets], skipped):
                losses = batch_losses(net, model, images, sizes, targets, ranks)
            loop.scaler.scale(sum(losses.values()) / cfg.accum).backward()
            if not loop.update():                                # the step has further micro-batches
                continue
            loop.log(losses, ("loss_ce", "loss_bbox", "loss_giou", "loss_kps"))
            if loop.stops():
                return
        if loop.evaluates():
            table, predictions = evaluate(ema.module, held_out, cfg, ranks)
            loop.record(table, predictions)
            if loop.last and cfg.data == "puppets":
                table, _ = evaluate(ema.module, open_crowd(data.skeleton, ranks), cfg, ranks)
                loop.folder.say(f"puppets in crowds, E/M/H: easy, medium and hard\n{metrics.format_table(table)}")


def flops(model: QueryPose, width: int, height: int) -> float:
    """FLOPs of one image: 2 per multiply-add of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        model.requires_grad_(False)(torch.zeros(1, 3, height, width), torch.tensor([[width, height]]))
    return counter.get_total_flops()


def summary() -> str:
    """Of each preset: parameters, and GFLOPs of one image."""
    rows = [f"{'preset':16}{'input':>9}{'parameters':>13}{'learned':>11}{'GFLOPs':>9}"]
    for preset in PRESETS:
        with torch.device("meta"):                                       # shapes without numbers
            model = build(preset).eval()
        height = min(model.cfg.short_side, 480)
        width = min(height * 4 // 3, model.cfg.long_side)
        every, learned = sum(p.numel() for p in model.parameters()) / 1e6, count_parameters(model) / 1e6
        rows.append(f"{preset:16}{f'{width}x{height}':>9}{every:>11.2f} M{learned:>9.2f} M"
                    f"{flops(model, width, height) / 1e9:>9.1f}")
    return "\n".join(rows)


def main() -> None:
    cfg, args = parse(Config, PRESETS, __doc__)
    if args.train:
        launch(train, cfg, args)
    else:
        print(f"{__doc__}\n{summary()}")


if __name__ == "__main__":
    run_main(main)
