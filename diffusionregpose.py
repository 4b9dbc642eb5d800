"""DiffusionRegPose: multi-person pose estimation by regression, started from noisy poses (CVPR 2024).

Idea     ED-Pose, a detector of people whose boxes grow keypoint queries, plus a diffusion model: in training the
         true poses are noised, at inference noise takes their place; two small attentions let the noisy points
         move the first keypoints of each person, and the decoder regresses the clean poses from there.
Flow     image (B,3,H,W) → ResNet-50 → maps of stride 8, 16, 32, 64 → Encoder ×6, told the time t → memory (B,N,C)
         → QuerySelection: the Q best cells → boxes (B,Q,4) → 2 decoder layers → the G best boxes
         → expand: noisy poses (B,G,K,2) enter by K-SA and K-CA → 4 decoder layers → poses (B,G,K,2)
Read     PointAttention (K-SA, K-CA) → Decoder.expand → Decoder → DiffusionRegPose.decode → noise_poses → sample
         → complete_poses (eq. 9-12) → match → criterion → train
Letters  B images  Q box queries  G groups, one per person  K keypoints  N memory cells  C channels  M heads
         d = C/M  L levels  P points or people  D denoising queries  t diffusion time 0 … 999  ζ signal scale
Units    xy in [0,1] of each image without its padding, x first; names ending in _px are pixels; boxes cxcywh
Departs  from the paper, as the release does, because the released weights need it:
         K-SA, K-CA  one linear layer each, not MLPs; logits times √n, not divided by √C; cBox stays (PointAttention)
         time        scale and shift are one vector (TimeEmbedding); it modulates the positions of the encoder, so
                     each DDIM step runs the encoder again, not only the decoder (Algorithm 1)
         losses      also GIoU, OKS, denoising queries, all layers and the selected cells (criterion)
         ζ           6, not 5; learning rate drops at 31 and 61, not 30 or 65
         completion  coordinates are divided by the head length, not by the image's size as well (eq. 9)
Departs  from the release, as the paper does, or where it slipped; `--as_released` goes back for the first three:
         t           it draws t and overwrites it with 0, but inference starts at 999; ours is uniform
         padding     it fills up with Gaussian poses; ours are empty poses, others by `--padding` (pad_poses)
         completion  it is off, because it crashes; ours is on
         cells       padding competes for the Q queries; ours never wins, so results do not depend on the batch
         denoising   images without people learn random boxes; ours learn nothing from them
         ensemble    it throws away the last of several DDIM steps; ours returns it, `--ensemble` joins all of them

    python diffusionregpose.py                          what each preset is: parameters, GFLOPs
    python diffusionregpose.py --train                  learn the embedded puppets on this machine
    python diffusionregpose.py --train --data data/crowdpose --preset r50-crowdpose --init edpose.pth
    python eval.py diffusionregpose-r50 --images photo.jpg
"""
import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common import runtime, weights
from common.skeletons import Skeleton, get_skeleton
from kernels.deform_attn import deform_attn_offsets

# ---- Configuration: every number of the paper. Each field is a flag, its comment the flag's help. -----------

BACKBONES = {"r50": (64, (3, 4, 6, 3)), "r14": (16, (1, 1, 1, 1))}      # width of layer 1, blocks in layers 1 to 4
PADDINGS = ("empty", "repeat", "noise", "mean")
NMS = ("official", "plain", "none")


@dataclass(frozen=True)
class Config:
    # model
    backbone: str = "r50"          # ResNet: r50 or r14 (narrow, four blocks)
    frozen_norm: bool = True       # backbone norms keep their ImageNet statistics; off to train from nothing
    freeze: bool = True            # stem and layer 1 of the backbone stay as they start
    levels: int = 4                # L, feature maps: the backbone's coarsest ones, the fourth made from the last
    dim: int = 256                 # C, channels of encoder and decoder
    heads: int = 8                 # M, attention heads; divides dim
    ffn: int = 2048                # hidden width of the layers' feed-forward blocks
    points: int = 4                # P, sampling points per head and level
    encoder_layers: int = 6        # layers of the encoder
    layers: int = 6                # layers of the decoder
    box_layers: int = 2            # of these, layers that see boxes alone; the others see keypoints, too
    box_queries: int = 900         # Q, cells of the memory that become box queries
    queries: int = 100             # G, boxes that become people, and noisy poses; K-SA's temperature depends on it
    # diffusion
    ksa_kca: bool = True           # noisy poses enter the decoder and t the encoder; off: the file is ED-Pose
    scale: float = 6.0             # ζ, size of the signal against the noise; the paper tries 5 and 10
    padding: str = "empty"         # noised beside the true poses: empty, repeat (of the true ones), noise, mean
    uniform_t: bool = True         # train at t uniform in 0 … 999; off: at t = 0
    keypoint_completion: bool = True   # noise completed poses: unlabelled keypoints from the labelled (eq. 9-12)
    steps: int = 1                 # DDIM steps at inference
    ensemble: bool = False         # keep the people of all DDIM steps, not of the last alone
    nms: str = "official"          # which poses are doubles: official (thresholds on mixed axes), plain, none
    as_released: bool = False      # train as the released code: t = 0, Gaussian padding, no completion
    init: str = "resnet50"         # start weights: resnet50, or a file of DiffusionRegPose or ED-Pose (the release's)
    # denoising queries
    dn_queries: int = 100          # D, noisy true boxes per image; 0: none
    label_noise: float = 0.5       # share of them with a random label
    box_noise: float = 0.4         # largest shift of their sides, in half widths and heights
    # optimisation
    epochs: int = 80               # passes over the training images
    batch: int = 8                 # images per optimiser step, over all GPUs and micro-batches
    accum: int = 1                 # micro-batches per optimiser step
    lr: float = 2e-4               # learning rate
    lr_backbone: float = 1e-4      # learning rate of the backbone
    weight_decay: float = 1e-4     # AdamW, on every parameter
    schedule: str = "constant"     # constant or cosine
    warmup: int = 0                # optimiser steps of linear warm-up
    drop_epochs: str = "31,61"     # learning rate ×0.1 from each of these epochs on
    clip: float = 0.1              # largest L2 norm of the gradient
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
    eval_batch: int = 1            # images per evaluation batch
    seed: int = 0                  # all random numbers follow from it

    def __post_init__(self):
        """Raises UserError for values that no run could use. `as_released` sets the three fields it stands for."""
        if self.as_released:
            for name, value in dict(uniform_t=False, padding="noise", keypoint_completion=False).items():
                object.__setattr__(self, name, value)
        runtime.check_choice(self, backbone=BACKBONES, padding=PADDINGS, nms=NMS, schedule=("constant", "cosine"),
                             amp=runtime.AMP)
        runtime.check_range(self, 1, 4, "levels")
        runtime.check_range(self, 1, 1000, "steps")
        runtime.check_range(self, 1, math.inf, "dim heads ffn points encoder_layers box_layers layers box_queries "
                            "queries epochs batch accum short_side long_side processes eval_every eval_batch")
        runtime.check_range(self, 1e-6, math.inf, "scale lr clip")
        runtime.check_range(self, 0, math.inf, "dn_queries lr_backbone weight_decay warmup ema_warmup workers seed")
        runtime.check_range(self, 0, 1, "label_noise box_noise ema")
        runtime.numbers(self.drop_epochs)
        if self.dim % (4 * self.heads) or self.dim % 32:
            raise runtime.UserError(f"--dim {self.dim} does not split over {self.heads} heads: choose a multiple of "
                                    f"{math.lcm(32, 4 * self.heads)}")
        if self.layers <= self.box_layers:
            raise runtime.UserError(f"--layers {self.layers}: choose more than the {self.box_layers} --box_layers")
        if self.queries > self.box_queries:
            raise runtime.UserError(f"--queries {self.queries}: no more than the {self.box_queries} --box_queries")
        if self.batch % self.accum:
            raise runtime.UserError(f"--batch {self.batch} does not split into {self.accum} micro-batches (--accum)")


PRESETS: dict[str, Config] = {
    "tiny": Config("r14", frozen_norm=False, freeze=False, levels=3, dim=96, heads=4, ffn=192, points=2,
                   encoder_layers=1, layers=3, box_layers=1, box_queries=40, queries=10, init="", dn_queries=10,
                   epochs=5, batch=16, lr=1e-3, lr_backbone=1e-3, schedule="cosine", warmup=200, drop_epochs="",
                   clip=1.0, ema=0.995, ema_warmup=100, short_side=128, long_side=128, multiscale=False, processes=2,
                   workers=0, eval_every=3, eval_batch=50),
    "r50": Config(),
    "r50-crowdpose": Config(data="data/crowdpose"),                      # the release's numbers are the same
    "r50-edpose": Config(ksa_kca=False, nms="none"),                     # for the weights that the release started from
}

# ---- Backbone: ResNet ---------------------------------------------------------------------------------------


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
        self.downsample = nn.Identity() if same else ConvNorm(channels_in, 4 * width, 1, stride, frozen)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x), inplace=True)
        y = F.relu(self.conv2(y), inplace=True)
        return F.relu(self.conv3(y) + self.downsample(x), inplace=True)


class ResNet(nn.Module):
    """Image (B, 3, H, W) → maps of stride 8, 16, 32 with 8, 16, 32 times `width` channels."""

    def __init__(self, width: int, blocks: tuple[int, ...], frozen: bool):
        super().__init__()
        self.conv1 = ConvNorm(3, width, 7, 2, frozen)
        self.channels, channels_in = [], width
        for i, count in enumerate(blocks):
            wide = width * 2 ** i
            layer = [Bottleneck(4 * wide if b else channels_in, wide, 1 if b or i == 0 else 2, frozen)
                     for b in range(count)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*layer))
            channels_in = 4 * wide
            self.channels += [channels_in] if i else []

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.layer1(F.max_pool2d(F.relu(self.conv1(x), inplace=True), 3, 2, 1))
        maps = [self.layer2(x)]
        maps.append(self.layer3(maps[-1]))
        return [*maps, self.layer4(maps[-1])]


# ---- Encoder: deformable attention over all levels, told the diffusion time ---------------------------------


class MLP(nn.Module):
    """Linear layers with ReLU between them; `widths` from input to output. x (B, N, ..., C)."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or torch.is_grad_enabled():
            return self.run(x)
        return torch.cat([self.run(part) for part in x.split(1024, 1)], 1)   # hidden values stay in a CPU's cache

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=True)
        return self.layers[-1](x)


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Logit of x clamped to [0, 1], finite at both ends: |logit| ≤ ln(1/eps)."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def sine_embedding(x: Tensor, dim: int, temperature: float) -> Tensor:
    """Sine embedding of each coordinate of x (..., n), in units of a full turn → (..., n·dim).

    Feature i of a coordinate is sin (even i) or cos (odd i) of 2π·x / temperature^(2⌊i/2⌋ / dim).
    """
    i = torch.arange(0, dim, 2, device=x.device)
    angle = 2 * math.pi * x.unsqueeze(-1) / temperature ** (i / dim)                    # (..., n, dim/2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-3)


class Grid(NamedTuple):
    """Where the N cells of all levels are, level after level in raster order."""
    shapes: list[tuple[int, int]]      # H, W of each level
    padded: Tensor                     # (B, N) True outside of the image
    valid: Tensor                      # (B, L, 2) share of a level's width and height that is image
    centres: Tensor                    # (B, N, 2) xy of the cells in the image without padding


def make_grid(masks: list[Tensor]) -> Grid:
    """From the padding masks (B, H, W) of the levels."""
    valid, centres = [], []
    for mask in masks:
        inside = torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], -1)       # (B, 2) columns, rows
        side = inside.new_tensor([mask.shape[2], mask.shape[1]])
        y, x = torch.meshgrid(*(torch.arange(n, device=mask.device) + 0.5 for n in mask.shape[1:]), indexing="ij")
        valid.append(inside / side)
        centres.append(torch.stack([x, y], -1).flatten(0, 1) / inside[:, None])
    return Grid([tuple(mask.shape[1:]) for mask in masks], torch.cat([mask.flatten(1) for mask in masks], 1),
                torch.stack(valid, 1), torch.cat(centres, 1))


def cell_positions(masks: list[Tensor], dim: int) -> Tensor:
    """Sine embedding of all cells (B, N, C), y first. Rows and columns are counted without padding, and end in 1."""
    embedded = []
    for mask in masks:
        y, x = ((~mask).cumsum(axis, dtype=torch.float32) for axis in (1, 2))
        yx = torch.stack([y / (y[:, -1:] + 1e-6), x / (x[:, :, -1:] + 1e-6)], -1)
        embedded.append(sine_embedding(yx, dim // 2, temperature=20).flatten(1, 2))
    return torch.cat(embedded, 1)


class DeformableAttention(nn.Module):
    """Each query reads P points per level around its reference (Deformable DETR eq. 2 and 3).

        out = W' Σ_t w_t · W memory(xy + offset_t / (W, H))         for references xy
        out = W' Σ_t w_t · W memory(xy + offset_t · wh / 2P)        for boxes xy, wh

    w = softmax over the L·P points of a head. Takes x (B, Q, C), reference (B, Q, L, 2 or 4) in fractions of the
    padded image, memory (B, N, C); returns (B, Q, C).
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Point i of head m starts i+1 cells along the m-th of M rays; all weights start equal."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.heads) * 2 * math.pi / self.heads
        ray = F.normalize(torch.stack([angle.cos(), angle.sin()], -1), p=math.inf, dim=-1)
        steps = torch.arange(1, self.points + 1)
        bias = ray[:, None, None] * steps[:, None]                                      # (M, 1, P, 2)
        self.sampling_offsets.bias.data.copy_(bias.expand(-1, self.levels, -1, -1).flatten())

    def forward(self, x: Tensor, reference: Tensor, memory: Tensor, grid: Grid) -> Tensor:
        value = self.value_proj(memory).masked_fill(grid.padded.unsqueeze(-1), 0)
        offsets = self.sampling_offsets(x).unflatten(-1, (self.heads, -1, 2))           # (B, Q, M, L·P, 2)
        logits = self.attention_weights(x).unflatten(-1, (self.heads, -1))
        read = deform_attn_offsets(value.unflatten(-1, (self.heads, -1)), grid.shapes, reference, offsets, logits,
                                   [self.points] * self.levels)
        return self.output_proj(read)


class EncoderLayer(nn.Module):
    """Each cell reads cells of all levels, then a feed-forward block; x, position (B, N, C) → (B, N, C)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.self_attn = DeformableAttention(cfg.dim, cfg.heads, cfg.levels, cfg.points)
        self.ffn = MLP(cfg.dim, cfg.ffn, cfg.dim)
        self.norm1, self.norm2 = nn.LayerNorm(cfg.dim), nn.LayerNorm(cfg.dim)

    def forward(self, x: Tensor, position: Tensor, grid: Grid) -> Tensor:
        reference = grid.centres[:, :, None] * grid.valid[:, None]                      # (B, N, L, 2)
        x = self.norm1(x + self.self_attn(x + position, reference, x, grid))
        return self.norm2(x + self.ffn(x))


class TimeEmbedding(nn.Module):
    """s(t), a vector that changes the position of every cell:  position ← position · (s + 1) + s.

    Departs: one vector is both scale and shift, where two were meant; the released weights were trained so.
    Takes t (B,), returns (B, C).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim), nn.SiLU(),
                                 nn.Linear(4 * dim, dim))

    def sinusoid(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        angle = t[:, None] * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
        return torch.cat([angle.sin(), angle.cos()], -1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.sinusoid(t))


# ---- Query selection ----------------------------------------------------------------------------------------


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows index (B, Q) of x (B, N, C) → (B, Q, C)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def box_proposals(grid: Grid) -> tuple[Tensor, Tensor]:
    """A square around each cell, as logits (B, N, 4), and which cells can be used (B, N).

    The side is 0.05 of the image on level 0 and doubles from level to level. Not used, with infinite logits, are
    cells in the padding and boxes of which a number is outside of (0.01, 0.99).
    """
    sides = torch.cat([torch.full((h * w,), 0.05 * 2 ** l) for l, (h, w) in enumerate(grid.shapes)])
    sides = sides.to(grid.centres)[:, None].expand(*grid.centres.shape)
    boxes = torch.cat([grid.centres, sides], -1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~grid.padded
    return (boxes / (1 - boxes)).log().masked_fill(~usable.unsqueeze(-1), math.inf), usable


class QuerySelection(nn.Module):
    """Scores every cell of the memory and turns the Q best into boxes (DINO's two stages).

    Takes    memory (B, N, C)
    Returns  content (B, Q, C) without gradient, logits (B, Q, 2), boxes (B, Q, 4), best first
    Border cells are blanked but still compete: their features become LayerNorm's bias, as in the release.
    """

    def __init__(self, dim: int, queries: int):
        super().__init__()
        self.queries = queries
        self.project, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.score, self.box = nn.Linear(dim, 2), MLP(dim, dim, dim, 4)

    def forward(self, memory: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        proposals, usable = box_proposals(grid)
        cells = self.norm(self.project(memory.masked_fill(~usable.unsqueeze(-1), 0)))
        logits = self.score(cells)                                                      # (B, N, 2)
        # Departs: in the release the padding competes, so that an image's boxes depend on the batch it is in
        best = logits.max(-1).values.masked_fill(grid.padded, -math.inf)
        index = best.topk(min(self.queries, best.shape[1]), dim=1).indices              # (B, Q)
        content = pick(cells, index)
        boxes = (self.box(content).float() + pick(proposals, index)).sigmoid()
        return content.detach(), pick(logits, index), boxes


# ---- Decoder ------------------------------------------------------------------------------------------------
#
# Tokens are in this order:  D denoising queries (training) | boxes | G·K keypoints, person after person (from
# layer `box_layers` on). An attention rule says which tokens see which; it takes q, k, v (B, M, tokens, d).

AttentionRule = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_denoising(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    """The D denoising queries see all other tokens, and of each other those that `blocked` (B, D, D) leaves."""
    dn = blocked.shape[1]
    allowed = F.pad(~blocked, (0, k.shape[2] - dn), value=True)[:, None]                # (B, 1, D, tokens)
    return F.scaled_dot_product_attention(q[:, :, :dn], k, v, attn_mask=allowed)


def attend_boxes(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None) -> Tensor:
    """Human detection: boxes see all boxes, but no denoising query."""
    if blocked is None:
        return F.scaled_dot_product_attention(q, k, v)
    boxes = F.scaled_dot_product_attention(*(x[:, :, blocked.shape[1]:] for x in (q, k, v)))
    return torch.cat([attend_denoising(q, k, v, blocked), boxes], 2)


def attend_groups(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None, groups: int) -> Tensor:
    """Human to keypoint: a token sees its own person's box and keypoints; a box also sees all boxes.

    The rule as a mask over all tokens would forbid 19 of 20 pairs; here the forbidden ones are not computed.
    """
    dn = 0 if blocked is None else blocked.shape[1]
    (q_box, k_box, v_box), (q_key, k_key, v_key) = zip(*(
        (x[:, :, dn:dn + groups], x[:, :, dn + groups:].unflatten(2, (groups, -1))) for x in (q, k, v)))
    own_k, own_v = (torch.cat([box.unsqueeze(3), key], 3) for box, key in ((k_box, k_key), (v_box, v_key)))
    keypoints = F.scaled_dot_product_attention(q_key, own_k, own_v).flatten(2, 3)       # (B, M, G·K, d)

    logits = torch.cat([q_box @ k_box.mT, (k_key @ q_box.unsqueeze(-1)).squeeze(-1)], -1)
    share = (logits / q.shape[-1] ** 0.5).softmax(-1)                                   # (B, M, G, G + K)
    boxes = share[..., :groups] @ v_box + (share[..., None, groups:] @ v_key).squeeze(3)
    noisy = [] if blocked is None else [attend_denoising(q, k, v, blocked)]
    return torch.cat([*noisy, boxes, keypoints], 2)


class SelfAttention(nn.Module):
    """Multi-head attention among x (B, tokens, C); `position` is added to queries and keys, not to values.

    Parameter names as in nn.MultiheadAttention: in_proj_weight stacks q, k, v.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, attend: AttentionRule) -> Tensor:
        dim = x.shape[-1]
        qk = F.linear(x + position, self.in_proj_weight[:2 * dim], self.in_proj_bias[:2 * dim])
        v = F.linear(x, self.in_proj_weight[2 * dim:], self.in_proj_bias[2 * dim:])
        q, k, v = (rearrange(t, "b n (m d) -> b m n d", m=self.heads) for t in (*qk.chunk(2, -1), v))
        return self.out_proj(rearrange(attend(q, k, v), "b m n d -> b n (m d)"))


class DecoderLayer(nn.Module):
    """Attention among tokens, into the image, then a feed-forward block; x, position (B, tokens, C) → (B, tokens, C).

    reference (B, tokens, L, 4) are boxes in fractions of the padded image.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.self_attn, self.norm2 = SelfAttention(cfg.dim, cfg.heads), nn.LayerNorm(cfg.dim)
        self.cross_attn = DeformableAttention(cfg.dim, cfg.heads, cfg.levels, cfg.points)
        self.norm1 = nn.LayerNorm(cfg.dim)
        self.ffn, self.norm3 = MLP(cfg.dim, cfg.ffn, cfg.dim), nn.LayerNorm(cfg.dim)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, memory: Tensor, grid: Grid,
                attend: AttentionRule) -> Tensor:
        x = self.norm2(x + self.self_attn(x, position, attend))
        x = self.norm1(x + self.cross_attn(x + position, reference, memory, grid))
        return self.norm3(x + self.ffn(x))


class PointAttention(nn.Module):
    """Attention between points of the image, one head: K-SA (among noisy points) and K-CA (from them to coarse ones).

        A = softmax( √n · Q(z) K(p)ᵀ ),   out = A V(p)                  z, p (B, n, 2),  Q, K: 2 → C,  V: 2 → 2

    Departs: linear layers, and logits are multiplied by √n, n = G·K points; the paper has MLPs and divides by √C.
    The width C is needed for Q and K to learn, not to compute: with p̃ = (x, y, 1) and K(p) = [W b] p̃ the logits are
    (Q(z) [W b])·p̃, products of three numbers; and as rows of A sum to 1, A V(p) = V(A p).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(2, dim), nn.Linear(2, dim), nn.Linear(2, 2)

    def forward(self, z: Tensor, p: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):         # √n makes the softmax sharp: float32
            q = self.query(z) @ torch.cat([self.key.weight, self.key.bias[:, None]], 1)            # (B, n, 3)
            q, p = F.pad(q, (0, 5)), F.pad(F.pad(p, (0, 1), value=1.0), (0, 5))        # fused attention wants 8
            mean = F.scaled_dot_product_attention(q[:, None], p[:, None], p[:, None], scale=p.shape[1] ** 0.5)
            return self.value(mean[:, 0, :, :2])


class Decoder(nn.Module):
    """Layers that refine boxes, then boxes and keypoints, with their heads.

    box_l = σ( head_l(h) + σ⁻¹(reference_l) ), keypoints alike, with h the normed output of layer l. The reference of
    the next layer comes from the same head on the output before the norm. A layer's input has no gradient for
    attention, but has one for the heads. Keypoints have a width and height, too: where they read the image.
    """

    def __init__(self, cfg: Config, keypoints: int):
        super().__init__()
        self.box_layers, self.groups, dim = cfg.box_layers, cfg.queries, cfg.dim
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.layers))
        self.norm, self.position_head = nn.LayerNorm(dim), MLP(2 * dim, dim, dim)
        self.score_heads = nn.ModuleList(nn.Linear(dim, 2) for _ in range(cfg.layers))
        self.box_heads = nn.ModuleList(MLP(dim, dim, dim, 4) for _ in range(cfg.layers))
        self.pose_heads = nn.ModuleList(MLP(dim, dim, dim, 2) for _ in range(cfg.layers - cfg.box_layers))
        self.size_head = MLP(dim, dim, dim, 2)
        # as released: models with CrowdPose's 14 keypoints use the first pose head here, too
        self.coarse_head = None if keypoints == 14 else MLP(dim, dim, dim, 2)
        self.keypoint_content, self.keypoint_size = nn.Embedding(keypoints, dim), nn.Embedding(keypoints, 2)
        self.ksa, self.kca = (PointAttention(dim) if cfg.ksa_kca else None for _ in range(2))

    def expand(self, x: Tensor, reference: Tensor, poses: Tensor | None, dn: int) -> tuple[Tensor, Tensor]:
        """Human-to-keypoint expansion: of the boxes, the G best get K keypoints each. Tokens and references.

        Noisy pose n meets the n-th best box; noise has no other link to a person.
        Departs: keypoints alone go through K-CA; the paper has it yield their boxes (cBox), too.
        """
        index = self.score_heads[self.box_layers - 1](x[:, dn:]).max(-1).values.topk(self.groups).indices
        content, boxes = pick(x[:, dn:], index), pick(reference[:, dn:], index)         # (B, G, C), (B, G, 4)
        keypoints = content[:, :, None] + self.keypoint_content.weight                  # (B, G, K, C)
        move = (self.coarse_head or self.pose_heads[0])(keypoints).float()
        xy = (move + inverse_sigmoid(boxes[:, :, None, :2])).sigmoid().flatten(1, 2)    # (B, G·K, 2)
        wh = (self.keypoint_size.weight.sigmoid() * boxes[:, :, None, 2:]).flatten(1, 2)
        if self.ksa:
            noisy = poses.flatten(1, 2)
            xy = self.kca(self.ksa(noisy, noisy) + xy, xy)                              # may leave [0, 1]
        return (torch.cat([x[:, :dn], content, keypoints.flatten(1, 2)], 1),
                torch.cat([reference[:, :dn], boxes, torch.cat([xy, wh], -1)], 1))

    def heads(self, l: int, x: Tensor, reference: Tensor, boxes: int) -> tuple[Tensor, Tensor]:
        """Layer l's new boxes (B, boxes, 4) of the first tokens, keypoints (B, G·K, 2) of the others, if any."""
        new = (self.box_heads[l](x[:, :boxes]).float() + inverse_sigmoid(reference[:, :boxes])).sigmoid()
        x, reference = x[:, boxes:], reference[:, boxes:, :2]
        if l < self.box_layers:
            return new, reference
        return new, (self.pose_heads[l - self.box_layers](x).float() + inverse_sigmoid(reference)).sigmoid()

    def refine(self, l: int, x: Tensor, reference: Tensor, boxes: int) -> Tensor:
        """References of layer l + 1."""
        new, xy = self.heads(l, x, reference, boxes)
        if l < self.box_layers:
            return new
        wh = (self.size_head(x[:, boxes:]).float() + inverse_sigmoid(reference[:, boxes:, 2:])).sigmoid()
        return torch.cat([new, torch.cat([xy, wh], -1)], 1)

    def predict(self, l: int, h: Tensor, reference: Tensor, boxes: int) -> tuple[Tensor, Tensor, Tensor | None]:
        new, xy = self.heads(l, h, reference, boxes)
        keypoints = None if l < self.box_layers else xy.unflatten(1, (self.groups, -1))
        return self.score_heads[l](h[:, :boxes]), new, keypoints

    def forward(self, x: Tensor, reference: Tensor, memory: Tensor, grid: Grid, poses: Tensor | None,
                dn: int, blocked: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """x (B, D + Q, C), reference (B, D + Q, 4) → of each layer logits (B, D + Q or G, 2), boxes (B, D + Q or G, 4)
        and keypoints (B, G, K, 2), None where there are none yet; outside of training of the last layer alone."""
        attend, boxes, last = partial(attend_boxes, blocked=blocked), x.shape[1], len(self.layers) - 1
        predictions = []
        for l, layer in enumerate(self.layers):
            known = reference.detach()
            inside = known[:, :, None] * grid.valid.repeat(1, 1, 2)[:, None]            # (B, tokens, L, 4)
            yxwh = inside[:, :, 0, [1, 0, 2, 3]]
            position = self.position_head(sine_embedding(yxwh, x.shape[-1] // 2, temperature=10000))
            x = layer(x, position, inside, memory, grid, attend)
            if self.training or l == last:
                predictions.append(self.predict(l, self.norm(x), reference, boxes))
            if l < last:
                reference = self.refine(l, x, known, boxes)
            if l == self.box_layers - 1:
                x, reference = self.expand(x, reference, poses, dn)
                attend, boxes = partial(attend_groups, blocked=blocked, groups=self.groups), dn + self.groups
        return predictions


# ---- Denoising queries (DN-DETR): true boxes, disturbed, as extra queries with a known answer ---------------

TENSORS = ("keypoints", "visible", "boxes", "areas", "poses")


@dataclass
class Targets:
    """The people of one image, as fractions of the image. P people, possibly none."""
    keypoints: Tensor      # (P, K, 2) xy; 0 where not labelled
    visible: Tensor        # (P, K) 1 = labelled
    boxes: Tensor          # (P, 4) cx, cy, w, h
    areas: Tensor          # (P,) of the image's area
    poses: Tensor          # (P, K, 2) what the diffusion noises: the keypoints, completed or not
    image_id: int | str = 0

    def to(self, device: torch.device) -> "Targets":
        moved = (getattr(self, name).to(device, non_blocking=True) for name in TENSORS)
        return Targets(*moved, self.image_id)

    def take(self, index: Tensor) -> "Targets":
        """Some of the people, in this order, also repeatedly."""
        return Targets(*(getattr(self, name)[index] for name in TENSORS))

    def __len__(self) -> int:
        return len(self.boxes)


class Noise(NamedTuple):
    """All random numbers of a batch of denoising queries."""
    person: Tensor         # (B, D) whose box: all people in turn as often as they fit in, then some at random
    relabel: Tensor        # (B, D) bool: whose label is replaced
    labels: Tensor         # (B, D) the labels then used
    shift: Tensor          # (B, D, 4) uniform in (−1, 1)


LABELS = 100               # random labels of the release; its embedding has one row more


def in_turn(people: int, count: int) -> Tensor:
    """0 … people−1, over and over as often as it fits into `count`, then some of them at random."""
    turns = torch.arange(people).repeat(count // people)
    return torch.cat([turns, torch.randperm(people)[:count - len(turns)]])


def draw_noise(counts: list[int], cfg: Config, device: torch.device) -> Noise:
    """For images with so many people."""
    shape = (len(counts), cfg.dn_queries)
    person = torch.stack([in_turn(n, shape[1]) if n else torch.zeros(shape[1], dtype=torch.long) for n in counts])
    return Noise(person.to(device), torch.rand(shape, device=device) < cfg.label_noise,
                 torch.randint(0, LABELS, shape, device=device), 2 * torch.rand(*shape, 4, device=device) - 1)


class Denoising(NamedTuple):
    content: Tensor        # (B, D, C) tokens of the noisy queries
    reference: Tensor      # (B, D, 4) their boxes
    blocked: Tensor        # (B, D, D) True where one may not look at the other: it is of another turn
    boxes: Tensor          # (B, D, 4) the true boxes, cx, cy, w, h
    known: Tensor          # (B, D) True where there is one: images without people have none


# ---- The model ----------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What of an image does not depend on t: made once for any number of DDIM steps."""
    tokens: Tensor         # (B, N, C)
    position: Tensor       # (B, N, C) before t changes it
    grid: Grid


class DiffusionRegPose(nn.Module):
    """The whole network; see `forward`."""

    def __init__(self, cfg: Config, skeleton: Skeleton):
        super().__init__()
        self.cfg, self.skeleton = cfg, skeleton
        dim, (width, blocks) = cfg.dim, BACKBONES[cfg.backbone]
        self.backbone = ResNet(width, blocks, cfg.frozen_norm)
        channels = self.backbone.channels[-cfg.levels:]
        kinds = [(c, 1, 1, 0) for c in channels] + [(channels[-1], 3, 2, 1)] * (cfg.levels - len(channels))
        self.input_proj = nn.ModuleList(nn.Sequential(nn.Conv2d(c, dim, *kernel), nn.GroupNorm(32, dim))
                                        for c, *kernel in kinds)
        self.level_embed = nn.Parameter(torch.randn(cfg.levels, dim))
        self.time_embedding = TimeEmbedding(dim) if cfg.ksa_kca else None
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        self.selection = QuerySelection(dim, cfg.box_queries)
        self.decoder = Decoder(cfg, skeleton.num_keypoints)
        self.noisy_label = nn.Embedding(LABELS + 1, dim)
        self.register_buffer("sigmas", torch.tensor(skeleton.sigmas), persistent=False)
        self.reset_parameters()
        if cfg.freeze:
            for part in (self.backbone.conv1, self.backbone.layer1):
                part.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Start values of the release: Xavier in the transformer, sampling points on rays, outputs at zero."""
        decoder = self.decoder
        attention = [decoder.ksa, decoder.kca] if self.cfg.ksa_kca else []
        for part in [self.input_proj, self.encoder, decoder.layers, decoder.position_head, *attention,
                     decoder.keypoint_content, decoder.keypoint_size, self.selection.project]:
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for project in self.input_proj:
            nn.init.zeros_(project[0].bias)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        for head in [self.selection.score, *decoder.score_heads]:
            nn.init.constant_(head.bias, -math.log(99))                    # a prior of 0.01
        for head in [self.selection.box, *decoder.box_heads, *decoder.pose_heads, decoder.coarse_head]:
            if head:
                nn.init.zeros_(head.layers[-1].weight)
                nn.init.zeros_(head.layers[-1].bias)

    def encode_image(self, images: Tensor, padded: Tensor | None = None) -> Encoded:
        """images (B, 3, H, W) with ImageNet's mean and deviation taken out, 0 where padded (B, H, W) is True."""
        if padded is None:
            padded = torch.zeros(images[:, 0].shape, dtype=torch.bool, device=images.device)
        maps = self.backbone(images)[-self.cfg.levels:]
        maps = [project(x) for project, x in zip(self.input_proj, [*maps, maps[-1]])]
        masks = [F.interpolate(padded[None].float(), x.shape[-2:])[0].bool() for x in maps]
        grid = make_grid(masks)
        if grid.padded.shape[1] < self.cfg.queries:
            raise runtime.UserError(f"an image of {images.shape[3]}x{images.shape[2]} pixels has no "
                                    f"{self.cfg.queries} places for people: choose a larger --short_side")
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        return Encoded(tokens, cell_positions(masks, self.cfg.dim), grid)

    def denoising_queries(self, targets: list[Targets], noise: Noise | None = None) -> Denoising | None:
        """D noisy copies of the people of each image; None if the config has D = 0."""
        if not self.cfg.dn_queries:
            return None
        device, counts = self.level_embed.device, [len(t) for t in targets]
        noise = noise or draw_noise(counts, self.cfg, device)
        people = torch.tensor(counts, device=device)[:, None]
        boxes = torch.stack([t.boxes[person] if len(t) else person.new_full((len(person), 4), 0.5, dtype=torch.float32)
                             for t, person in zip(targets, noise.person)])
        half = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], -1)
        noisy = (boxes + noise.shift * half * self.cfg.box_noise).clamp(0, 1)
        turn = torch.arange(self.cfg.dn_queries, device=device) // people.clamp(min=1)                  # (B, D)
        blocked = (turn[:, :, None] != turn[:, None]) & (people[..., None] > 0)
        label = torch.where(noise.relabel, noise.labels, 1)
        return Denoising(self.noisy_label(label), inverse_sigmoid(noisy).sigmoid(), blocked, boxes,
                         (people > 0).expand(-1, self.cfg.dn_queries))

    def decode(self, image: Encoded, poses: Tensor | None, t: Tensor | None, denoising: Denoising | None = None) -> dict:
        """Everything that depends on the noisy poses or on the time; see `forward`."""
        position, memory, grid = image.position, image.tokens, image.grid
        if self.time_embedding:
            s = self.time_embedding(t)[:, None]
            position = position * (s + 1) + s
        cells = torch.tensor([h * w for h, w in grid.shapes], device=position.device)
        position = position + self.level_embed.repeat_interleave(cells, 0, output_size=memory.shape[1])
        for layer in self.encoder:
            memory = layer(memory, position, grid)
        content, *proposals = self.selection(memory, grid)
        reference, blocked, dn = proposals[1].detach(), None, 0
        if denoising:
            content = torch.cat([denoising.content, content], 1)
            reference = torch.cat([denoising.reference, reference], 1)
            blocked, dn = denoising.blocked, denoising.blocked.shape[1]
        layers = self.decoder(content, reference, memory, grid, poses, dn, blocked)
        result = dict(zip(("logits", "boxes"), (x[:, dn:] for x in layers[-1])), keypoints=layers[-1][2])
        if self.training:
            result |= dict(layers=[(logits[:, dn:], boxes[:, dn:], keypoints) for logits, boxes, keypoints in layers],
                           dn_layers=[(logits[:, :dn], boxes[:, :dn]) for logits, boxes, _ in layers] if dn else [],
                           proposals=tuple(proposals))
        return result

    def forward(self, images: Tensor, padded: Tensor | None, poses: Tensor | None, t: Tensor | None,
                denoising: Denoising | None = None) -> dict:
        """Images (B, 3, H, W) and noisy poses (B, G, K, 2) of time t (B,) → people.

        Returns  logits (B, G, 2) of which [1] is the person's, boxes (B, G, 4), keypoints (B, G, K, 2); in training
                 also `layers`, all of these for each decoder layer (keypoints None for the first), `proposals`,
                 logits and boxes of the selected cells, and `dn_layers`, logits and boxes of denoising queries
        Without K-SA and K-CA poses and t are not used.
        """
        return self.decode(self.encode_image(images, padded), poses, t, denoising)


# ---- Diffusion: noising the true poses, and DDIM back from noise --------------------------------------------

STEPS = 1000               # T, diffusion times


def cosine_schedule() -> Tensor:
    """ᾱ_t for t = 0 … T−1, float64 (T,): the share of the signal's variance that is left at time t.

    ᾱ(u) = cos²(((u/T) + 0.008) / 1.008 · π/2), taken in steps of which each leaves at least 0.001.
    """
    u = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    curve = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (curve[1:] / curve[:-1]).clamp(min=0.001).cumprod(0)


ALPHA_BAR = cosine_schedule()


def to_signal(poses: Tensor, scale: float) -> Tensor:
    """[0, 1] → [−ζ, ζ]"""
    return (2 * poses - 1) * scale


def to_poses(signal: Tensor, scale: float) -> Tensor:
    """[−ζ, ζ] → [0, 1], clamped."""
    return (signal.clamp(-scale, scale) / scale + 1) / 2


def noise_poses(poses: Tensor, t: Tensor, eps: Tensor, scale: float) -> Tensor:
    """Poses as they are at time t:  x_t = √ᾱ_t x₀ + √(1−ᾱ_t) ε  in [−ζ, ζ].  poses, eps (B, G, K, 2), t (B,)."""
    alpha_bar = ALPHA_BAR.to(t.device)[t][:, None, None, None]
    x = alpha_bar.sqrt().to(poses) * to_signal(poses, scale) + (1 - alpha_bar).sqrt().to(poses) * eps
    return to_poses(x, scale)


class PoseNoise(NamedTuple):
    """All random numbers of a batch of noisy poses."""
    t: Tensor              # (B,) diffusion times
    eps: Tensor            # (B, G, K, 2) standard normal
    order: list[Tensor]    # (G,) of each image with people: in_turn(people, G)
    pad: Tensor            # (B, G, K, 2) standard normal


def draw_pose_noise(counts: list[int], keypoints: int, cfg: Config, device: torch.device) -> PoseNoise:
    """For images with so many people."""
    t = torch.randint(0, STEPS, (len(counts),), device=device) if cfg.uniform_t else torch.zeros(
        len(counts), dtype=torch.long, device=device)
    eps, pad = torch.randn(2, len(counts), cfg.queries, keypoints, 2, device=device)
    return PoseNoise(t, eps, [in_turn(n, cfg.queries).to(device) if n else t.new_zeros(0) for n in counts], pad)


def pad_poses(targets: list[Targets], noise: PoseNoise, padding: str) -> Tensor:
    """Each image's true poses, then padding up to G: (B, G, K, 2). Of more than G people, G at random.

    empty: zeros, the paper's choice; repeat: the true poses again; noise: Gaussian, as released; mean: the batch's mean
    pose at Gaussian places, with the image as ±3 deviations. Without people it is all padding.
    """
    poses = noise.pad if padding == "noise" else torch.zeros_like(noise.pad)
    everyone = torch.cat([t.poses for t in targets])
    if padding == "mean" and len(everyone):
        mean = (everyone - everyone.mean(1, keepdim=True)).mean(0)
        poses = mean + 0.5 + noise.pad[:, :, :1] / 6
    rows = []
    for people, row, order in zip(targets, poses, noise.order):
        true = people.poses[order if padding == "repeat" or len(people) > len(row) else slice(None)]
        rows.append(torch.cat([true, row[len(true):]]))
    return torch.stack(rows)


def ddim_times(steps: int) -> list[int]:
    """Times from T−1 down, and −1 for the end: [999, 665, 332, −1] for three steps."""
    return torch.linspace(-1, STEPS - 1, steps + 1, dtype=torch.float64).int().tolist()[::-1]


def ddim_step(x: Tensor, poses: Tensor, t: int, next_t: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """From x_t and the poses predicted from it (B, G, K, 2): x at next_t, the predicted x₀ and noise (DDIM, η = 0).

        ε = (x_t/√ᾱ_t − x₀) / √(1/ᾱ_t − 1),    x_next = √ᾱ_next x₀ + √(1−ᾱ_next) ε
    """
    alpha, alpha_next = ALPHA_BAR[t].item(), ALPHA_BAR[next_t].item()
    x0 = to_signal(poses, scale).clamp(-scale, scale)
    eps = (x / alpha ** 0.5 - x0) / (1 / alpha - 1) ** 0.5
    return alpha_next ** 0.5 * x0 + (1 - alpha_next) ** 0.5 * eps, x0, eps


@torch.no_grad()
def sample(model: DiffusionRegPose, images: Tensor, padded: Tensor | None = None, steps: int = 1,
           noise: Tensor | None = None) -> list[dict]:
    """The results of all DDIM steps, the last is the answer; each also has its t, x_t and `noisy` poses (B, G, K, 2).

    noise, standard normal (B or 1, G, K, 2), is x at t = T−1; by default it is drawn.
    """
    cfg, image, results = model.cfg, model.encode_image(images, padded), []
    shape = (len(images), cfg.queries, model.skeleton.num_keypoints, 2)
    x = torch.randn(shape, device=images.device) if noise is None else noise.to(images).expand(shape)
    times = ddim_times(steps if cfg.ksa_kca else 1)
    for t, next_t in zip(times, times[1:]):
        noisy = to_poses(x, cfg.scale)
        result = model.decode(image, noisy, torch.full(shape[:1], t, device=images.device))
        results.append(result | dict(t=t, x=x, noisy=noisy))
        if next_t >= 0:
            x = ddim_step(x, result["keypoints"].float(), t, next_t, cfg.scale)[0]
    return results


@torch.no_grad()
def fuse(model: DiffusionRegPose) -> DiffusionRegPose:
    """A copy for inference: the backbone's norms are folded into its convolutions."""
    model = copy.deepcopy(model).eval()
    for module in [m for m in model.modules() if isinstance(m, ConvNorm)]:
        module.fold()
    return model.to(memory_format=torch.channels_last)


# ---- Building a model, and the released weights -------------------------------------------------------------

RENAME = [            # released name → ours, first match wins; what matches nothing keeps its name
    (r"^backbone\.0\.body\.(.*)downsample\.0\.", r"backbone.\1downsample.conv."),
    (r"^backbone\.0\.body\.(.*)downsample\.1\.", r"backbone.\1downsample.norm."),
    (r"^backbone\.0\.body\.(.*)conv(\d)\.", r"backbone.\1conv\2.conv."),
    (r"^backbone\.0\.body\.(.*)bn(\d)\.", r"backbone.\1conv\2.norm."),
    (r"^transformer\.encoder\.layers\.(\d+)\.linear1\.", r"encoder.\1.ffn.layers.0."),
    (r"^transformer\.encoder\.layers\.(\d+)\.linear2\.", r"encoder.\1.ffn.layers.1."),
    (r"^transformer\.encoder\.layers\.", "encoder."),
    (r"^transformer\.decoder\.layers\.(\d+)\.linear1\.", r"decoder.layers.\1.ffn.layers.0."),
    (r"^transformer\.decoder\.layers\.(\d+)\.linear2\.", r"decoder.layers.\1.ffn.layers.1."),
    *((rf"^{theirs}\.", f"{ours}.") for theirs, ours in {
        r"transformer\.time_mlp\.1": "time_embedding.mlp.0", r"transformer\.time_mlp\.3": "time_embedding.mlp.2",
        r"transformer\.block_time_mlp\.1": "time_embedding.mlp.4",
        r"transformer\.enc_output": "selection.project", r"transformer\.enc_output_norm": "selection.norm",
        r"transformer\.enc_out_class_embed": "selection.score", r"transformer\.enc_out_bbox_embed": "selection.box",
        r"transformer\.decoder\.emb_SQ": "decoder.ksa.query", r"transformer\.decoder\.emb_Q": "decoder.kca.query",
        r"transformer\.decoder\.emb_SK": "decoder.ksa.key", r"transformer\.decoder\.emb_K": "decoder.kca.key",
        r"transformer\.decoder\.emb_SV": "decoder.ksa.value", r"transformer\.decoder\.emb_V": "decoder.kca.value",
        r"transformer\.decoder\.hw": "decoder.keypoint_size",
        r"transformer\.decoder\.keypoint_embed": "decoder.keypoint_content",
        r"transformer\.decoder\.ref_point_head": "decoder.position_head",
        "class_embed": "decoder.score_heads", "bbox_embed": "decoder.box_heads", r"pose_embed\.4": "decoder.coarse_head",
        "pose_embed": "decoder.pose_heads", r"pose_hw_embed\.0": "decoder.size_head",
        "label_enc": "noisy_label"}.items()),
    (r"^transformer\.", ""),
]
IGNORED = {r"^transformer\.decoder\.(class|bbox|pose|pose_hw)_embed\.": "stored twice",
           r"^pose_hw_embed\.[1-9]": "one module, stored four times",
           r"^(betas|(log_one_minus|sqrt|sqrt_one_minus|sqrt_recip|sqrt_recipm1|)_?alphas_cumprod(_prev)?"
           r"|posterior_(variance|log_variance_clipped|mean_coef[12]))$": "constants of the diffusion"}
NEW = r"^(time_embedding|decoder\.(ksa|kca))\."          # the 18 tensors that ED-Pose does not have


def convert_official(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Tensors of a released checkpoint under this file's names."""
    return weights.rename({name: value for name, value in state.items()
                           if not any(re.match(pattern, name) for pattern in IGNORED)}, RENAME)


def recognise(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(preset, number of keypoints) of a released DiffusionRegPose or ED-Pose checkpoint with ResNet-50, by its tensors."""
    if not {"transformer.decoder.keypoint_embed.weight", "backbone.0.body.conv1.weight"} <= state.keys():
        return None
    keypoints = len(state["transformer.decoder.keypoint_embed.weight"])
    if "transformer.decoder.emb_SQ.weight" not in state:
        return "r50-edpose", keypoints
    return "r50-crowdpose" if keypoints == 14 else "r50", keypoints


def build(preset: str, skeleton: str | Skeleton = "coco", **overrides) -> DiffusionRegPose:
    """A model with start weights; overrides are Config fields."""
    if preset not in PRESETS:
        raise runtime.UserError(f"there is no preset {preset}: choose from {', '.join(PRESETS)}")
    return DiffusionRegPose(runtime.resolve(PRESETS[preset], **overrides), get_skeleton(skeleton))


def load_init(model: DiffusionRegPose, source: str) -> None:
    """Start weights by file or name: DiffusionRegPose (all), ED-Pose (all but 18 tensors) or torchvision's ResNet-50."""
    path = Path(source) if Path(source).exists() else weights.fetch(source)
    state = weights.load_tensors(path)
    if "layer1.0.conv1.weight" in state:
        state = {f"backbone.0.body.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    state = convert_official(state, model.cfg)
    groups = {r"^(?!backbone\.)": "not in a ResNet"} if all(name.startswith("backbone.") for name in state) else {}
    if not any(re.match(NEW, name) for name in state):
        groups[NEW] = "not in ED-Pose"
    weights.load_strict(model, state, groups | {r"num_batches_tracked$": "counts batches of another training"})
    print(f"start weights from {path}: {len(state)} of {len(model.state_dict())} tensors")
