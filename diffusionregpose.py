"""DiffusionRegPose: multi-person pose estimation by regression, started from noisy poses (CVPR 2024).

Idea     ED-Pose, a detector of people whose boxes grow keypoint queries, plus a diffusion model: in training the
         true poses are noised, at inference noise takes their place; two small attentions let the noisy points
         move the first keypoints of each person, and the decoder regresses the clean poses from there.
Flow     image (B,3,H,W) → ResNet-50 → maps of stride 8, 16, 32, 64 → Encoder ×6, told the time t → memory (B,N,C)
         → QuerySelection: the Q best cells → boxes (B,Q,4) → 2 decoder layers → the G best boxes
         → expand: noisy poses (B,G,K,2) enter by K-SA and K-CA → 4 decoder layers → poses (B,G,K,2)
Read     PointAttention (K-SA, K-CA) → Decoder.expand → Decoder → DiffusionRegPose.decode → noise_poses → sample
         → KeypointCompletion (eq. 9-12) → match → criterion → train
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
         cells       padding competes for the Q queries; ours never wins (QuerySelection)
         denoising   images without people learn random boxes; ours learn no boxes from them
         NMS         it keeps the first pose too often, and gives kept poses the scores of others (nms)
         ensemble    it throws away the last of several DDIM steps; ours returns it, `--ensemble` joins all of them
Tiny     has no weights to start from, so four things are ours: keypoints start unlike one another (`near_identity`),
         K-CA as the identity, with a share that is learned (`learned_share`: Decoder.expand), scores learn the OKS of
         their poses (`oks_score_weight`: oks_score_loss), the encoder heatmaps on the side (`heatmap_weight`)

    python diffusionregpose.py                          what each preset is: parameters, GFLOPs
    python diffusionregpose.py --train                  learn the embedded puppets on this machine
    python diffusionregpose.py --train --data data/crowdpose --preset r50-crowdpose --init edpose.pth
    python eval.py diffusionregpose-r50 --images photo.jpg --process      and noise turning into poses
"""
import copy
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
from common.nets.resnet import ConvNorm, ResNet
from common.predict import predict_all
from common.ranks import AMP, Ranks, autocast, distribute, init_ranks, mean_over_ranks, micro_batch, rank_zero_first, seed_all
from common.records import Prediction, Sample
from common.run import Ema, Loop, RunFolder, check_finite, goes_on
from common.splits import open_crowd, open_splits
from common.weights import count_parameters
from common.heatmaps import CellHeatmaps, people_heatmap_loss
from common.skeletons import Skeleton, get_skeleton, words
from kernels.deform_attn import deform_attn_offsets

# ---- Configuration: every number of the paper. Each field is a flag, its comment the flag's help. -----------

BACKBONES = {"r50": (64, (3, 4, 6, 3)), "r26": (24, (2, 2, 2, 2))}      # width of layer 1, blocks in layers 1 to 4
PADDINGS = ("empty", "repeat", "noise", "mean")
NMS = ("official", "plain", "none")
AT_INFERENCE = ("steps", "ensemble", "nms", "seed")       # fields that `eval.py --set` may change


@dataclass(frozen=True)
class Config:
    # model
    backbone: str = "r50"          # ResNet: r50, or r26 of less than half its width
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
    near_identity: bool = False    # K-SA starts at 0, K-CA near the identity, keypoints unlike one another; ours
    learned_share: bool = False    # keypoints go a learned share of the way that K-CA moves them, at first none; ours
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
    # losses of ours, to train from nothing
    oks_score_weight: float = 0.0  # of DETRPose's eq. 5: scores learn the OKS of their poses; 0: focal loss instead
    oks_score_from: int = 0        # first epoch with it; focal loss before
    heatmap_weight: float = 0.0    # of a loss that asks the memory's finest map for heatmaps of all people
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
    eval_batch: int = 1            # images per evaluation batch; padding moves the results a little
    seed: int = 0                  # all random numbers follow from it

    def __post_init__(self):
        """Raises UserError for values that no run could use. `as_released` sets the three fields it stands for."""
        if self.as_released:
            for name, value in dict(uniform_t=False, padding="noise", keypoint_completion=False).items():
                object.__setattr__(self, name, value)
        check_choice(self, backbone=BACKBONES, padding=PADDINGS, nms=NMS, schedule=("constant", "cosine"),
                             amp=AMP)
        check_range(self, 1, 4, "levels")
        check_range(self, 1, 1000, "steps")
        check_range(self, 1, math.inf, "dim heads ffn points encoder_layers box_layers layers box_queries "
                            "queries epochs batch accum short_side long_side processes eval_every eval_batch")
        check_range(self, 1e-6, math.inf, "scale lr clip")
        check_range(self, 0, math.inf, "dn_queries oks_score_weight oks_score_from heatmap_weight "
                            "lr_backbone weight_decay warmup ema_warmup workers seed")
        check_range(self, 0, 1, "label_noise box_noise ema")
        parse_numbers(self.drop_epochs)
        if self.dim % (4 * self.heads) or self.dim % 32:
            raise UserError(f"--dim {self.dim} does not split over {self.heads} heads: choose a multiple of "
                                    f"{math.lcm(32, 4 * self.heads)}")
        if self.layers <= self.box_layers:
            raise UserError(f"--layers {self.layers}: choose more than the {self.box_layers} --box_layers")
        if self.queries > self.box_queries:
            raise UserError(f"--queries {self.queries}: no more than the {self.box_queries} --box_queries")
        if self.batch % self.accum:
            raise UserError(f"--batch {self.batch} does not split into {self.accum} micro-batches (--accum)")


PRESETS: dict[str, Config] = {
    "tiny": Config("r26", frozen_norm=False, freeze=False, levels=3, dim=96, heads=4, ffn=192, points=2,
                   encoder_layers=2, layers=4, box_layers=1, box_queries=40, queries=8, near_identity=True,
                   learned_share=True, init="", dn_queries=10, oks_score_weight=8.0, oks_score_from=2,
                   heatmap_weight=2.0,
                   epochs=7, batch=16, lr=1e-3, lr_backbone=1e-3, schedule="cosine", warmup=60, drop_epochs="",
                   clip=1.0, ema=0.995, ema_warmup=100, short_side=128, long_side=128, multiscale=False, processes=2,
                   workers=0, eval_every=7, eval_batch=50),
    "r50": Config(),
    "r50-crowdpose": Config(data="data/crowdpose"),                      # the release's numbers are the same
    "r50-edpose": Config(ksa_kca=False, nms="none"),                     # for the weights that the release starts from
}

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

    @torch.no_grad()
    def start_near_identity(self, points: int) -> None:
        """Departs: ours, for training from nothing. With the start of the release all people's keypoints fall on about
        one point. Of points with variance s² per axis, a softmax over q·p has the mean  mean(p) + s²·q  (exactly if
        they are Gaussian), so √n Q(z)·K(p) = (z − ½)·p / s² and V = 1 give about z, if people are all over the image.
        """
        for parameter in (*self.query.parameters(), *self.key.parameters()):
            parameter.mul_(0.1)                            # not 0: the other channels could not learn
        one = torch.eye(2) * (16 / points ** 0.5) ** 0.5   # s² = 1/16
        for layer, half in ((self.query, 0.5), (self.key, 0.0)):
            layer.weight[:2], layer.bias[:2] = one, -half * one.diagonal()
        nn.init.eye_(self.value.weight)
        nn.init.zeros_(self.value.bias)


class Decoder(nn.Module):
    """Layers that refine boxes, then boxes and keypoints, with their heads.

    box_l = σ( head_l(h) + σ⁻¹(reference_l) ), keypoints alike, with h the normed output of layer l. The reference of
    the next layer comes from the same head on the output before the norm; gradients pass through it into heads, but
    not into layers. Keypoints have a width and height, too: how far around them a layer reads the image.
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
        self.kca_share = nn.Parameter(torch.zeros(())) if cfg.ksa_kca and cfg.learned_share else None

    def expand(self, x: Tensor, reference: Tensor, poses: Tensor | None, dn: int) -> tuple[Tensor, Tensor]:
        """Human-to-keypoint expansion: of the boxes, the G best get K keypoints each. Tokens and references.

        Noisy pose n meets the n-th best box; noise has no other link to a person.
        Departs: keypoints alone go through K-CA; the paper has it yield their boxes (cBox), too. With `learned_share`,
        ours, they go `kca_share` of the way: K-CA returns weighted means of all people's points, and a decoder that has
        learned nothing yet learns much slower from points that it did not place itself.
        """
        index = self.score_heads[self.box_layers - 1](x[:, dn:]).max(-1).values.topk(self.groups).indices
        content, boxes = pick(x[:, dn:], index), pick(reference[:, dn:], index)         # (B, G, C), (B, G, 4)
        keypoints = content[:, :, None] + self.keypoint_content.weight                  # (B, G, K, C)
        move = (self.coarse_head or self.pose_heads[0])(keypoints).float()
        xy = (move + inverse_sigmoid(boxes[:, :, None, :2])).sigmoid().flatten(1, 2)    # (B, G·K, 2)
        wh = (self.keypoint_size.weight.sigmoid() * boxes[:, :, None, 2:]).flatten(1, 2)
        if self.ksa:
            noisy = poses.flatten(1, 2)
            moved = self.kca(self.ksa(noisy, noisy) + xy, xy)                           # may leave [0, 1]
            xy = moved if self.kca_share is None else xy + self.kca_share * (moved - xy)
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
            start = reference.detach()
            inside = start[:, :, None] * grid.valid.repeat(1, 1, 2)[:, None]            # (B, tokens, L, 4)
            yxwh = inside[:, :, 0, [1, 0, 2, 3]]                    # as released, in fractions of the padded image
            position = self.position_head(sine_embedding(yxwh, x.shape[-1] // 2, temperature=10000))
            x = layer(x, position, inside, memory, grid, attend)
            if self.training or l == last:
                predictions.append(self.predict(l, self.norm(x), reference, boxes))
            if l < last:
                reference = self.refine(l, x, start, boxes)
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
        channels = self.backbone.channels[1:][-cfg.levels:]           # stride 4 is not used
        kinds = [(c, 1, 1, 0) for c in channels] + [(channels[-1], 3, 2, 1)] * (cfg.levels - len(channels))
        self.input_proj = nn.ModuleList(nn.Sequential(nn.Conv2d(c, dim, *kernel), nn.GroupNorm(32, dim))
                                        for c, *kernel in kinds)
        self.level_embed = nn.Parameter(torch.randn(cfg.levels, dim))
        self.time_embedding = TimeEmbedding(dim) if cfg.ksa_kca else None
        self.encoder = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.encoder_layers))
        self.selection = QuerySelection(dim, cfg.box_queries)
        self.decoder = Decoder(cfg, skeleton.num_keypoints)
        self.noisy_label = nn.Embedding(LABELS + 1, dim)
        self.heatmaps = CellHeatmaps(dim, skeleton.num_keypoints, across=2) if cfg.heatmap_weight else None
        self.register_buffer("sigmas", torch.tensor(skeleton.sigmas), persistent=False)
        self.reset_parameters()
        if cfg.freeze:
            for part in (self.backbone.stem, self.backbone.res2):
                part.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Start values of the release: Xavier in the transformer, sampling points on rays, outputs at zero.

        Departs: with `near_identity`, ours, K-SA and K-CA change little, and keypoints' embeddings are as large as the
        content of the person that they are added to, of which Xavier makes them a tenth.
        """
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
        if self.cfg.near_identity:
            nn.init.normal_(decoder.keypoint_content.weight)
            if self.cfg.ksa_kca:
                decoder.kca.start_near_identity(self.cfg.queries * self.skeleton.num_keypoints)
                for parameter in decoder.ksa.value.parameters():
                    nn.init.zeros_(parameter)
        for head in [self.selection.box, *decoder.box_heads, *decoder.pose_heads, decoder.coarse_head]:
            if head:
                nn.init.zeros_(head.layers[-1].weight)
                nn.init.zeros_(head.layers[-1].bias)

    def encode_image(self, images: Tensor, padded: Tensor | None = None) -> Encoded:
        """images (B, 3, H, W) with ImageNet's mean and deviation taken out, 0 where padded (B, H, W) is True."""
        if padded is None:
            padded = torch.zeros(images[:, 0].shape, dtype=torch.bool, device=images.device)
        maps = self.backbone(images)[1:][-self.cfg.levels:]
        maps = [project(x) for project, x in zip(self.input_proj, [*maps, maps[-1]])]
        masks = [F.interpolate(padded[None].float(), x.shape[-2:])[0].bool() for x in maps]
        grid = make_grid(masks)
        if grid.padded.shape[1] < self.cfg.queries:
            raise UserError(f"an image of {images.shape[3]}x{images.shape[2]} pixels has no "
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
        boxes = torch.stack([t.boxes[person] if len(t) else torch.full_like(shift, 0.5)
                             for t, person, shift in zip(targets, noise.person, noise.shift)])
        half = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], -1)
        noisy = (boxes + noise.shift * half * self.cfg.box_noise).clamp(0, 1)
        turn = torch.arange(self.cfg.dn_queries, device=device) // people.clamp(min=1)                  # (B, D)
        blocked = (turn[:, :, None] != turn[:, None]) & (people[..., None] > 0)
        label = torch.where(noise.relabel, noise.labels, 1)
        return Denoising(self.noisy_label(label), inverse_sigmoid(noisy).sigmoid(), blocked, boxes,
                         (people > 0).expand(-1, self.cfg.dn_queries))

    def decode(self, image: Encoded, poses: Tensor | None, t: Tensor | None,
               denoising: Denoising | None = None) -> dict:
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
            if self.heatmaps:
                (h, w), valid = grid.shapes[0], grid.valid[:, 0]
                result |= dict(heatmaps=self.heatmaps(memory[:, :h * w], h), valid=valid)
        return result

    def forward(self, images: Tensor, padded: Tensor | None, poses: Tensor | None, t: Tensor | None,
                denoising: Denoising | None = None) -> dict:
        """Images (B, 3, H, W) and noisy poses (B, G, K, 2) of time t (B,) → people.

        Returns  logits (B, G, 2) of which [1] is the person's, boxes (B, G, 4), keypoints (B, G, K, 2); in training
                 also `layers`, all of these for each decoder layer (keypoints None for the first), `proposals`,
                 logits and boxes of the selected cells, and `dn_layers`, logits and boxes of denoising queries; with
                 `heatmap_weight` `heatmaps` (B, K, 2h, 2w) of the finest map (h, w) and `valid` (B, 2), the share of
                 its width and height that is image
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

    empty: zeros, the paper's choice; repeat: the true poses again; noise: Gaussian, as released; mean: the batch's
    mean pose at Gaussian places, with the image as ±3 deviations. Without people it is all padding.
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


# ---- Keypoint completion (eq. 9-12): joints that nobody labelled, guessed from the labelled ones ------------

# The length that makes people comparable is that between two joints: of the pairs below the first that a skeleton has,
# the head where there is one, as in the paper; on COCO the right side of the trunk, as in the release. Else the
# diagonal of the box.
REFERENCE_JOINTS = (("head", "neck"), ("head_top", "head_bottom"), ("head_top", "neck"),
                    ("right_shoulder", "right_hip"))


def reference_joints(skeleton: Skeleton) -> tuple[int, int] | None:
    """The two joints whose distance is a person's reference length; None: the diagonal of the box is."""
    names = [words(name) for name in skeleton.keypoints]
    pairs = [(words(a), words(b)) for a, b in REFERENCE_JOINTS]
    return next(((names.index(a), names.index(b)) for a, b in pairs if a in names and b in names), None)


def reference_lengths(keypoints: np.ndarray, boxes: np.ndarray, joints: tuple[int, int] | None) -> np.ndarray:
    """L of people with keypoints (N, K, 3) and boxes xyxy (N, 4), in pixels; 0 where a reference joint has no label."""
    if joints is None:
        return np.linalg.norm(boxes[:, 2:] - boxes[:, :2], axis=1)
    a, b = keypoints[:, joints[0]], keypoints[:, joints[1]]
    return np.linalg.norm(a[:, :2] - b[:, :2], axis=1) * ((a[:, 2] > 0) & (b[:, 2] > 0))


class KeypointCompletion:
    """Fills a pose with the most likely places of its unlabelled joints.

    The 2K coordinates u of people, seen from the corner l of their box in units of their reference length L, are
    taken as one Gaussian; its μ and Σ are those of the training people with all K joints labelled. With UᵀU = Σ⁻¹
    and the columns of U split into those of invisible and visible coordinates, U = [A_I, A_V],

        y = (u − l) / L                                                                               (eq. 9)
        ŷ_I = argmin ‖A_I y_I + A_V y_V − U μ‖ = (A_IᵀA_I)⁻¹ A_Iᵀ (U μ − A_V y_V)                  (eq. 10-12)
            = μ_I + Σ_IV Σ_VV⁻¹ (y_V − μ_V),

    the mean of the invisible coordinates given the visible ones, which is how it is computed here.
    Takes    y (N, 2K) of N ≥ 2 whole people, the reference joints or None for the diagonal of the box
    Departs  the paper also divides y by the image's width and height; the release does not
    """

    def __init__(self, y: np.ndarray, joints: tuple[int, int] | None):
        self.joints, self.mean, self.covariance = joints, y.mean(0), np.cov(y, rowvar=False)
        few = len(y) <= y.shape[1]                                     # then Σ has no inverse
        ridge = (1e-2 if few else 1e-12) * self.covariance.diagonal().mean() + 1e-12
        self.covariance += ridge * np.eye(y.shape[1])

    def __call__(self, keypoints: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Keypoints (P, K, 3) and boxes xyxy (P, 4) in pixels → (P, K, 3) with the missing joints filled in, at v = 1.

        Somebody without any joint, or without L, stays as annotated.
        """
        completed = keypoints.copy()
        lengths = reference_lengths(keypoints, boxes, self.joints)
        for person, corner, length in zip(completed, boxes[:, :2], lengths):
            visible = person[:, 2] > 0
            if visible.all() or not visible.any() or not length > 0:
                continue
            known = visible.repeat(2)
            y = (person[visible, :2] - corner).flatten() / length                                     # eq. 9
            cross, among = self.covariance[np.ix_(~known, known)], self.covariance[np.ix_(known, known)]
            guess = self.mean[~known] + cross @ np.linalg.solve(among, y - self.mean[known])          # eq. 10-12
            person[~visible, :2] = guess.reshape(-1, 2) * length + corner
            person[~visible, 2] = 1
        return completed


def learn_completion(data: PoseDataset) -> KeypointCompletion | None:
    """The statistics of a training set; None if there are not two people with all their joints."""
    single, joints = ~data.iscrowd, reference_joints(data.skeleton)
    keypoints, boxes = data.keypoints[single].astype(np.float64), data.boxes[single]
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    length = reference_lengths(keypoints, boxes, joints)
    whole = (keypoints[..., 2] > 0).all(1) & (length > 0)
    y = (keypoints[whole, :, :2] - boxes[whole, None, :2]) / length[whole, None, None]                # eq. 9
    return KeypointCompletion(y.reshape(len(y), -1), joints) if len(y) > 1 else None


# ---- Matching and losses. A set of pairs is (image, query, person): three index tensors of one length; ------
# `person` counts through all people of the batch in image order. An output is (logits, boxes, keypoints or None).

Pairs = tuple[Tensor, Tensor, Tensor]
Output = tuple[Tensor, Tensor, Tensor | None]
PERSON = 1                             # the class of a person; class 0 is COCO's category 0, which does not exist
WEIGHTS = dict(ce=2.0, bbox=5.0, giou=2.0, keypoints=10.0, oks=4.0)
DENOISING_WEIGHTS = dict(ce=0.3, bbox=2.5, giou=1.0)


def gather_people(targets: list[Targets]) -> Targets:
    """All people of the batch behind one another."""
    return Targets(*(torch.cat([getattr(t, name) for t in targets]) for name in TENSORS))


def corners_of(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """cx, cy, w, h (..., 4) → top left and bottom right corners (..., 2)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return centre - half, centre + half


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU = ∩ / ∪ − (hull − ∪) / hull of boxes cxcywh (..., 4); leading dimensions broadcast. In [−1, 1]."""
    (low_a, high_a), (low_b, high_b) = corners_of(a), corners_of(b)
    common = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0)
    around = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).clamp(min=0)
    inter, hull = common[..., 0] * common[..., 1], around[..., 0] * around[..., 1]
    union = a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - inter
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def object_keypoint_similarity(squared: Tensor, people: Targets, sigmas: Tensor) -> Tensor:
    """OKS = Σ v exp(−d² / (2 s² κ²)) / Σ v,  κ = 2σ, s² = area. squared d² (..., P, K) → (..., P), at least 1e-6."""
    exponent = squared / (2 * people.areas[:, None] * (2 * sigmas) ** 2)
    similarity = (people.visible * (-exponent).exp()).sum(-1) / (people.visible.sum(-1) + 1e-6)
    return similarity.clamp(min=1e-6)


def match_cost(output: Output, people: Targets, sigmas: Tensor) -> Tensor:
    """Cost of giving a query to a person, (B, Q, P): 2·class + 5·L1 − 2·GIoU, or where there are poses
    2·class + 10·Σ v|Δ| + 4·(1 − OKS), without a look at the box."""
    logits, boxes, keypoints = output
    p = logits[..., PERSON].float().sigmoid().unsqueeze(-1)
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    if keypoints is None:
        distance = (boxes[:, :, None] - people.boxes).abs().sum(-1)
        return 2 * focal + 5 * distance - 2 * generalized_iou(boxes[:, :, None], people.boxes)
    difference = keypoints[:, :, None] - people.keypoints                                     # (B, Q, P, K, 2)
    distance = (difference.abs().sum(-1) * people.visible).sum(-1)
    similarity = object_keypoint_similarity(difference.square().sum(-1), people, sigmas)
    return 2 * focal + 10 * distance + 4 * (1 - similarity)


@torch.no_grad()
def match(outputs: list[Output], targets: list[Targets], sigmas: Tensor) -> list[Pairs]:
    """The cheapest one-to-one assignment of people to queries, for each output on its own (Hungarian method).

    Raises FloatingPointError when a cost is not finite.
    """
    people = gather_people(targets)
    costs = [match_cost(output, people, sigmas) for output in outputs]
    flat = torch.cat([cost.flatten() for cost in costs]).cpu()             # one wait for the GPU
    if not flat.isfinite().all():
        raise FloatingPointError("the matching cost")
    ends = np.cumsum([0] + [len(t) for t in targets])
    matchings = []
    for cost, part in zip(costs, flat.split([cost.numel() for cost in costs])):
        cost, found = part.view(cost.shape).numpy(), []
        for image, (first, last) in enumerate(zip(ends, ends[1:])):
            query, person = linear_sum_assignment(cost[image, :, first:last])
            found.append(np.stack([np.full_like(query, image), query, person + first]))
        matchings.append(tuple(torch.from_numpy(np.concatenate(found, 1)).to(sigmas.device)))
    return matchings


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """−α (1 − p)² log p where positive, −(1 − α) p² log(1 − p) elsewhere, α = 0.25, summed. Both (..., 2)."""
    p = logits.sigmoid()
    weight = torch.where(positive > 0, 0.25 * (1 - p) ** 2, 0.75 * p ** 2)
    return (weight * F.binary_cross_entropy_with_logits(logits, positive, reduction="none")).sum()


def oks_score_loss(logits: Tensor, matched: Tensor, quality: Tensor) -> Tensor:
    """DETRPose's eq. 5, summed: −q (q log p + (1 − q) log(1 − p)) where matched, −α p² log(1 − p) elsewhere, α = 0.25.

    logits (B, Q, 2); matched, 0 or 1, and quality q, the OKS where matched and 0 elsewhere, of the same shape
    """
    weight = torch.where(matched > 0, quality, 0.25 * logits.detach().sigmoid() ** 2)
    return F.binary_cross_entropy_with_logits(logits, quality, weight, reduction="sum")


def box_losses(boxes: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Σ ‖b − b*‖₁ and Σ (1 − GIoU) of boxes cxcywh (pairs, 4)."""
    return dict(bbox=(boxes - true).abs().sum(), giou=(1 - generalized_iou(boxes, true)).sum())


def pose_losses(keypoints: Tensor, true: Targets, sigmas: Tensor) -> dict[str, Tensor]:
    """Σ v|Δ| and 1 − OKS of each pose, (pairs,); keypoints (pairs, K, 2)."""
    difference = keypoints - true.keypoints
    similarity = object_keypoint_similarity(difference.square().sum(-1), true, sigmas)
    return dict(keypoints=(difference.abs().sum(-1) * true.visible).sum(-1), oks=1 - similarity)


def set_losses(output: Output, pairs: Pairs, people: Targets, sigmas: Tensor,
               oks_score_weight: float) -> dict[str, Tensor]:
    """The weighted loss terms of one output for the pairs that were matched, summed over the batch."""
    logits, boxes, keypoints = (x if x is None else x.float() for x in output)
    image, query, person = pairs
    true, matched = people.take(person), torch.zeros_like(logits)
    matched[image, query, PERSON] = 1
    terms = box_losses(boxes[image, query], true.boxes)
    if keypoints is not None:
        errors = pose_losses(keypoints[image, query], true, sigmas)
        terms |= {term: value.sum() for term, value in errors.items()}
    if keypoints is not None and oks_score_weight:
        quality = torch.zeros_like(logits)
        quality[image, query, PERSON] = 1 - errors["oks"].detach()
        score = oks_score_weight * oks_score_loss(logits, matched, quality)
    else:
        score = WEIGHTS["ce"] * focal_loss(logits, matched)
    return dict(ce=score) | {term: WEIGHTS[term] * value for term, value in terms.items()}


def criterion(result: dict, targets: list[Targets], sigmas: Tensor, shares: int = 1,
              oks_score_weight: float = 0.0) -> dict[str, Tensor]:
    """All weighted loss terms of a training forward, by their names in the release; their sum is minimised.

    For every layer (_0, _1, ..., the last without suffix) and the selected cells (_interm), per person:
    2·focal + 5·L1 + 2·(1 − GIoU) and, from the expansion on, 10·Σ v|Δ| + 4·(1 − OKS). For the denoising queries (dn_):
    0.3·focal + 2.5·L1 + (1 − GIoU), per query of an image but, as released, summed over the images; over all of a
    batch, if `shares` says into how many micro-batches and processes it is divided.
    Departs: `oks_score_weight`·oks_score_loss, ours, takes the place of 2·focal where there are poses; 0: it does not.
    Computed in float32. No pairs give 0 with a zero gradient.
    """
    people = gather_people(targets)
    outputs = [*result["layers"], (*result["proposals"], None)]
    names = [*(f"_{l}" for l in range(len(result["layers"]) - 1)), "", "_interm"]
    count = mean_over_ranks(torch.tensor(float(len(people)), device=sigmas.device)).clamp(min=1)
    losses = {}
    for name, output, pairs in zip(names, outputs, match(outputs, targets, sigmas)):
        for term, value in set_losses(output, pairs, people, sigmas, oks_score_weight).items():
            losses[f"loss_{term}{name}"] = value / count
    for name, (logits, boxes) in zip(names, result["dn_layers"]):
        true = result["denoising"]
        positive = torch.zeros_like(logits, dtype=torch.float32)
        positive[..., PERSON] = true.known.float()
        terms = dict(ce=focal_loss(logits.float(), positive))
        terms |= box_losses(boxes.float()[true.known], true.boxes[true.known])
        for term, value in terms.items():
            losses[f"dn_loss_{term}{name}"] = DENOISING_WEIGHTS[term] * value * shares / boxes.shape[1]
    return losses


# ---- Prediction ---------------------------------------------------------------------------------------------


def nms(keypoints: np.ndarray, scores: np.ndarray, size_px: tuple[int, int], reading: str) -> np.ndarray:
    """Indices of the poses to keep, best first. keypoints (E, K, 2) as fractions of the image of size_px (w, h).

    Pose j is a neighbour of pose i when more than 10 joints lie closer than 4 % of the diagonal of pose i. Of a pose
    and its neighbours the best stays; poses of a score up to 0.05 never do. reading: "plain" takes joints for what
    they are; "official" takes the K first of the 2K numbers x1, y1, x2, ... for x and the others for y, as the
    release does and tuned its thresholds with; "none" keeps everybody.
    Departs  the release also keeps entry 0 once for every pose without neighbours, and gives kept poses the scores of
             others; here all keep their own
    """
    best_first = np.argsort(-scores, kind="stable")
    if reading == "none":
        return best_first
    count, joints = keypoints.shape[:2]
    points = keypoints * size_px
    if reading == "official":
        points = np.moveaxis(keypoints.reshape(count, 2, joints), 1, 2) * size_px
    limit = 0.04 * np.linalg.norm(np.ptp(points, 1), axis=-1)
    near = np.linalg.norm(points[:, None] - points, axis=-1) < limit[:, None, None]          # (E, E, K)
    needed = max(min(10, 3 * joints // 4), 10 * joints // 17)             # 10 of COCO's 17 and of CrowdPose's 14
    neighbour = ((near.sum(-1) > needed) | np.eye(count, dtype=bool)) & (scores > 0.05)
    keep, ignored = np.zeros(count, bool), np.zeros(count, bool)
    for i in range(count):
        around = np.flatnonzero(neighbour[i])
        if not ignored[i] and len(around):
            best = around[scores[around].argmax()]
            if not ignored[best]:
                keep[best] = True
                ignored[around] = True
    return best_first[keep[best_first]]


def pad_images(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures (3, h, w) → zero-padded (B, 3, H, W) at the right and bottom, and padded (B, H, W), True there."""
    height, width = (max(p.shape[side] for p in pictures) for side in (1, 2))
    images = torch.zeros(len(pictures), 3, height, width)
    padded = torch.ones(len(pictures), height, width, dtype=torch.bool)
    for picture, image, mask in zip(pictures, images, padded):
        h, w = picture.shape[1:]
        image[:, :h, :w], mask[:h, :w] = picture, False
    return images, padded


def start_noise(image_id: int | str, cfg: Config, keypoints: int, draw_number: int = 0) -> Tensor:
    """x_T (G, K, 2) of an image: the same whichever pictures share its batch."""
    seed = zlib.crc32(f"{cfg.seed}:{draw_number}:{image_id}".encode())
    return torch.randn(cfg.queries, keypoints, 2, generator=torch.Generator().manual_seed(seed))


def detect(model: DiffusionRegPose, pictures: list[Tensor], noise: Tensor, steps: int) -> list[dict[str, Tensor]]:
    """The outputs of each DDIM step for normalised pictures and their noise (B, G, K, 2)."""
    device = next(model.parameters()).device
    images, padded = pad_images(pictures)
    with autocast(device, model.cfg.amp):
        return sample(model, images.to(device), padded.to(device), steps, noise.to(device))


def best_people(entries: dict[str, np.ndarray], input_px: tuple, reading: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of an image's logits (E, 2) and keypoints (E, K, 2) that the NMS keeps, best first, and their scores."""
    scores = 1 / (1 + np.exp(-entries["logits"][:, PERSON].astype(np.float64)))
    keep = nms(entries["keypoints"], scores, input_px, reading)
    return keep, scores[keep]


def to_prediction(entries: dict[str, np.ndarray], image_id: int | str, input_px: tuple, size_px: tuple,
                  reading: str) -> Prediction:
    """logits (E, 2), boxes (E, 4), keypoints (E, K, 2) of one image as people in its pixels, after the NMS."""
    keep, scores = best_people(entries, input_px, reading)
    boxes, keypoints = entries["boxes"][keep] * np.tile(size_px, 2), entries["keypoints"][keep] * size_px
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    return Prediction(image_id, keypoints, np.ones(keypoints.shape[:2], np.float32), scores, corners)


@torch.no_grad()
def predict(model: DiffusionRegPose, batch: dict) -> list[Prediction]:
    """People of a batch {images: list of (3, h, w) from `input_image`, image_ids, sizes_px}: one Prediction per image.

    All G people, or those that the NMS leaves; with `ensemble` those of all DDIM steps together, else of the last.
    The model has no score per keypoint: every keypoint gets 1.
    """
    cfg, joints, pictures = model.cfg, model.skeleton.num_keypoints, batch["images"]
    noise = torch.stack([start_noise(image_id, cfg, joints) for image_id in batch["image_ids"]])
    outputs = detect(model, pictures, noise, cfg.steps)
    outputs = outputs if cfg.ensemble else outputs[-1:]
    entries = {name: torch.cat([output[name].float() for output in outputs], 1).cpu().numpy()
               for name in ("logits", "boxes", "keypoints")}
    return [to_prediction({name: column[i] for name, column in entries.items()}, image_id, picture.shape[:0:-1], size,
                          cfg.nms)
            for i, (image_id, picture, size) in enumerate(zip(batch["image_ids"], pictures, batch["sizes_px"]))]


@torch.no_grad()
def fuse(model: DiffusionRegPose) -> DiffusionRegPose:
    """A copy for inference: the backbone's norms are folded into its convolutions, the heatmaps' head dropped."""
    model = copy.deepcopy(model).eval()
    model.heatmaps = None
    for module in [m for m in model.modules() if isinstance(m, ConvNorm)]:
        module.fold()
    return model.to(memory_format=torch.channels_last)


# ---- Building a model, and the released weights -------------------------------------------------------------

RENAME = [            # released name → ours, first match wins; what matches nothing keeps its name
    *((rf"^backbone\.0\.body\.layer{i}\.(.*){theirs}\.", rf"backbone.res{i + 1}.\1{ours}.") for i in range(1, 5)
      for theirs, ours in {r"downsample\.0": "shortcut.conv", r"downsample\.1": "shortcut.norm",
                           r"conv(\d)": r"conv\2.conv", r"bn(\d)": r"conv\2.norm"}.items()),
    (r"^backbone\.0\.body\.conv1\.", "backbone.stem.conv."), (r"^backbone\.0\.body\.bn1\.", "backbone.stem.norm."),
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
        "class_embed": "decoder.score_heads", "bbox_embed": "decoder.box_heads",
        r"pose_embed\.4": "decoder.coarse_head", "pose_embed": "decoder.pose_heads",
        r"pose_hw_embed\.0": "decoder.size_head", "label_enc": "noisy_label"}.items()),
    (r"^transformer\.", ""),
]
IGNORED = {r"^transformer\.decoder\.(class|bbox|pose|pose_hw)_embed\.": "stored twice",
           r"^pose_hw_embed\.[1-9]": "one module, stored four times",
           r"^(betas|\w*alphas_cumprod\w*|posterior_\w+)$": "constants of the diffusion"}
NEW = r"^(time_embedding|decoder\.(ksa|kca))\."          # the 18 tensors that ED-Pose does not have


def convert_official(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Tensors of a released checkpoint under this file's names."""
    return weights.rename({name: value for name, value in state.items()
                           if not any(re.match(pattern, name) for pattern in IGNORED)}, RENAME)


def recognise(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(preset, number of keypoints) of a released DiffusionRegPose or ED-Pose checkpoint, by its tensors; else None."""
    if not {"transformer.decoder.keypoint_embed.weight", "backbone.0.body.conv1.weight"} <= state.keys():
        return None
    keypoints = len(state["transformer.decoder.keypoint_embed.weight"])
    if "transformer.decoder.emb_SQ.weight" not in state:
        return "r50-edpose", keypoints
    return "r50-crowdpose" if keypoints == 14 else "r50", keypoints


def build(preset: str, skeleton: str | Skeleton = "coco", **overrides) -> DiffusionRegPose:
    """A model with start weights; overrides are Config fields."""
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(PRESETS)}")
    return DiffusionRegPose(resolve(PRESETS[preset], **overrides), get_skeleton(skeleton))


def load_init(model: DiffusionRegPose, source: str) -> None:
    """Start weights by file or name: DiffusionRegPose (all), ED-Pose (all but 18 tensors) or torchvision's ResNet.

    A K-CA that was trained without `learned_share` moves keypoints all the way: its share is 1.
    """
    path = Path(source) if Path(source).exists() else weights.fetch(source)
    state = weights.load_tensors(path)
    if "layer1.0.conv1.weight" in state:
        state = {f"backbone.0.body.{name}": value for name, value in state.items() if not name.startswith("fc.")}
    state = convert_official(state, model.cfg)
    groups = {r"^(?!backbone\.)": "not in a ResNet"} if all(name.startswith("backbone.") for name in state) else {}
    if not any(re.match(NEW, name) for name in state):
        groups[NEW] = "not in ED-Pose"
    share = "decoder.kca_share"
    if share in model.state_dict() and share not in state:
        state[share] = torch.tensor(float("decoder.kca.value.weight" in state))
    groups |= {r"num_batches_tracked$": "counts batches of another training",
               r"^heatmaps\.": "a lesson on the side, which starts anew"}
    weights.load_strict(model, state, groups)
    print(f"start weights from {path}: {len(state)} of {len(model.state_dict())} tensors")


# ---- Data: aspect ratio kept, short side 480 to 800, random crops, ImageNet normalisation --------------------

def input_image(image: Image.Image, cfg: Config) -> Tensor:
    """A picture of any size as the network sees it: see `short_side` and `long_side`."""
    size = transforms.short_side_size(image.size, cfg.short_side, cfg.long_side)
    return transforms.normalise(transforms.to_tensor(image.resize(size, Image.Resampling.BILINEAR)))


def augment(people: Sample, flip: tuple[int, ...] | None, cfg: Config, rng: np.random.Generator) -> Sample:
    """Mirror half of the images, crop half of them, resize. For `short_side` 800 with the lengths of the release:
    short sides 480, 512, ..., 800; before a crop 400, 500 or 600; sides of crops 384 to 600."""
    if flip is not None and rng.random() < 0.5:
        people = transforms.hflip(people, flip)
    if not cfg.multiscale:
        return transforms.resize_short_side(people, cfg.short_side, cfg.long_side)
    full = cfg.short_side
    if rng.random() < 0.5:
        before = rng.choice([full // 2, full * 5 // 8, full * 3 // 4])
        people = transforms.resize_short_side(people, int(before))
        window = [int(rng.integers(full * 12 // 25, min(side, full * 3 // 4) + 1)) for side in people.size]
        corner = [int(rng.integers(0, side - length + 1)) for side, length in zip(people.size, window)]
        people = transforms.crop(people, *corner, *window)
    short_side = int(rng.choice(range(full * 3 // 5, full + 1, 32)))
    return transforms.resize_short_side(people, short_side, cfg.long_side)


def to_targets(people: Sample) -> Targets:
    """A sample's people as fractions of its (w, h). Its 2K keypoints are K annotated ones, then the K that the
    diffusion noises; those without label sit at 0."""
    scale = torch.tensor(people.size, dtype=torch.float32)
    labelled = torch.from_numpy(people.keypoints[..., 2:] > 0)
    places = torch.from_numpy(people.keypoints[..., :2]) / scale * labelled
    keypoints, poses = places.chunk(2, 1)
    corners = torch.from_numpy(people.boxes) / scale.repeat(2)
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    return Targets(keypoints=keypoints, visible=labelled.chunk(2, 1)[0].squeeze(-1).float(), boxes=boxes,
                   areas=torch.from_numpy(people.areas) / scale.prod(), poses=poses, image_id=people.image_id)


class TrainImages(torch.utils.data.Dataset):
    """One epoch of augmented training images; item i is (tensor (3, h, w), Targets, why files were skipped).

    What happens to image i depends on (seed, epoch, i) alone. A file that cannot be read gives way to the next.
    """

    def __init__(self, data: PoseDataset, cfg: Config, epoch: int, completion: KeypointCompletion | None):
        self.data, self.cfg, self.epoch, self.completion = data, cfg, epoch, completion
        joints, flip = data.skeleton.num_keypoints, data.skeleton.flip
        self.flip = None if flip is None else (*flip, *(joints + k for k in flip))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, Targets, list[str]]:
        rng = np.random.default_rng([self.cfg.seed, self.epoch, i])
        people, skipped = self.data.load_readable(i)
        # the poses that will be noised travel through the geometry as K further keypoints
        poses = self.completion(people.keypoints, people.boxes) if self.completion else people.keypoints
        people = replace(people, keypoints=np.concatenate([people.keypoints, poses], 1))
        people = transforms.filter_people(people)
        if self.data.name == "crowdpose":                  # it has no areas: the release's losses take the whole box
            people = replace(people, areas=(people.boxes[:, 2:] - people.boxes[:, :2]).prod(1))
        people = augment(people, self.flip, self.cfg, rng)
        return transforms.normalise(transforms.to_tensor(people.image)), to_targets(people), skipped


def to_batch(pictures: list[Image.Image], image_ids: list, cfg: Config) -> dict:
    """RGB pictures of any size → what `predict` takes."""
    return dict(images=[input_image(picture, cfg) for picture in pictures], image_ids=image_ids,
                sizes_px=[picture.size for picture in pictures])


def evaluate(model: DiffusionRegPose, data: PoseDataset, cfg: Config,
             ranks: Ranks) -> tuple[dict, list[Prediction]]:
    """Metrics and predictions of a dataset; the images are shared among the processes, all get the result."""
    found = predict_all(partial(predict, fuse(model)), data, partial(input_image, cfg=cfg), cfg.eval_batch,
                        cfg.workers, ranks, join=list)
    return metrics.evaluate(found, data), found


@torch.no_grad()
def show_process(model: DiffusionRegPose, image: Image.Image, threshold: float) -> dict[str, list[Image.Image]]:
    """For eval.py --process: `process`, the noise that becomes poses in ten DDIM steps, and `uncertainty`, how far the
    poses from 16 draws of noise lie apart: ellipses of two standard deviations. Of people above the threshold."""
    cfg, skeleton, picture, size = model.cfg, model.skeleton, input_image(image, model.cfg), np.array(image.size)

    def results(draw_number: int, steps: int) -> list[dict[str, np.ndarray]]:
        noise = start_noise("", cfg, skeleton.num_keypoints, draw_number)[None]
        return [{name: output[name][0].float().cpu().numpy() for name in ("logits", "keypoints", "noisy")}
                for output in detect(model, [picture], noise, steps)]

    chain = results(0, 10)
    rows, scores = best_people(chain[-1], picture.shape[:0:-1], cfg.nms)
    rows, scores = rows[scores >= threshold], scores[scores >= threshold]
    people, draws = chain[-1]["keypoints"][rows], []
    frames = [draw.draw_people(image, step["noisy"][rows] * size, None, skeleton) for step in chain]
    frames.append(draw.draw_people(image, people * size, None, skeleton, person_scores=scores))
    for number in range(16):
        poses = results(number, 1)[-1]["keypoints"]
        distances = np.linalg.norm(people[:, None] - poses, axis=-1).mean(-1)                # (P, G)
        draws.append(poses[distances.argmin(1)] * size)
    return dict(process=frames, uncertainty=[draw.draw_ellipses(image, np.stack(draws), skeleton)])


# ---- Training -----------------------------------------------------------------------------------------------


def build_optimizer(model: DiffusionRegPose, cfg: Config) -> torch.optim.AdamW:
    """AdamW in two groups: the backbone learns at a rate of its own."""
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    rest = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    groups = [dict(params=backbone, initial_lr=cfg.lr_backbone), dict(params=rest, initial_lr=cfg.lr)]
    return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def lr_scale(step: int, steps: int, epoch: int, cfg: Config) -> float:
    """Factor on the learning rates at an optimiser step out of `steps`."""
    scale = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    if cfg.schedule == "cosine":
        scale *= 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return scale * 0.1 ** sum(epoch >= drop for drop in parse_numbers(cfg.drop_epochs) or ())


def batch_losses(net: nn.Module, model: DiffusionRegPose, images: Tensor, padded: Tensor, targets: list[Targets],
                 ranks: Ranks, epoch: int) -> dict[str, Tensor]:
    """Forward pass of `net`, which is the model or distributes it, and loss terms of one batch.

    Raises FloatingPointError if one of them is not finite.
    """
    cfg = model.cfg
    images = images.to(ranks.device, non_blocking=True, memory_format=torch.channels_last)
    padded = padded.to(ranks.device, non_blocking=True)
    targets = [t.to(ranks.device) for t in targets]
    noise = draw_pose_noise([len(t) for t in targets], model.skeleton.num_keypoints, cfg, ranks.device)
    poses = noise_poses(pad_poses(targets, noise, cfg.padding), noise.t, noise.eps, cfg.scale)
    denoising = model.denoising_queries(targets)
    with autocast(ranks.device, cfg.amp):
        result = net(images, padded, poses, noise.t, denoising)
    losses = criterion(result | dict(denoising=denoising), targets, model.sigmas, cfg.accum * ranks.world,
                       cfg.oks_score_weight if epoch >= cfg.oks_score_from else 0.0)
    # what may have no gradient at all gets one of 0, which DistributedDataParallel waits for
    idle = [*model.decoder.size_head.parameters(), model.decoder.keypoint_size.weight, model.noisy_label.weight]
    losses["unused"] = 0 * sum(p.sum() for p in idle)
    if cfg.heatmap_weight:
        # fractions of the padded map; as everywhere in the grid, a cell that is partly image counts as image
        inside = [replace(t, keypoints=t.keypoints * valid) for t, valid in zip(targets, result["valid"])]
        losses["loss_heatmaps"] = cfg.heatmap_weight * people_heatmap_loss(result["heatmaps"], inside)
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
        model = DiffusionRegPose(cfg, data.skeleton)
        if cfg.init and not args.saved:
            load_init(model, cfg.init)
    model.to(ranks.device, memory_format=torch.channels_last)
    ema = Ema(model, cfg.ema, cfg.ema_warmup)
    loop = Loop("diffusionregpose", cfg, args, ranks, data, held_out, model, build_optimizer(model, cfg), ema)
    completion = start_completion(data, cfg, loop.folder)
    net = distribute(model, ranks)

    data = data.training()
    steps = loop.plan(len(data), micro)
    for epoch in loop.epochs():
        net.train()
        for (images, padded), targets, skipped in loop.batches(TrainImages(data, cfg, epoch, completion), pad_images):
            loop.set_lr(lr_scale(loop.step, steps, epoch, cfg))
            with loop.naming([t.image_id for t in targets], skipped):
                losses = batch_losses(net, model, images, padded, targets, ranks, epoch)
            loop.scaler.scale(sum(losses.values()) / cfg.accum).backward()
            if not loop.update():                                # the step has further micro-batches
                continue
            side = ("loss_heatmaps",) if cfg.heatmap_weight else ()
            loop.log(losses, ("loss_ce", "loss_bbox", "loss_keypoints", "loss_oks", *side))
            if loop.stops():
                return
        if loop.evaluates():
            table, predictions = evaluate(ema.module, held_out, cfg, ranks)
            loop.record(table, predictions)
            if loop.last and cfg.data == "puppets":
                table, _ = evaluate(ema.module, open_crowd(data.skeleton, ranks), cfg, ranks)
                loop.folder.say(f"puppets in crowds, E/M/H: easy, medium and hard\n{metrics.format_table(table)}")


def start_completion(data: PoseDataset, cfg: Config, run: RunFolder) -> KeypointCompletion | None:
    """The completion of a training set, shown in completion.png; None if it is off or has nothing to learn from."""
    completion = learn_completion(data) if cfg.keypoint_completion else None
    if cfg.keypoint_completion and not completion:
        run.say("no keypoint completion: there are not two people with all their keypoints")
    elif completion and run.writes:
        with goes_on(run.path / "completion.png"):
            draw.draw_completion(data, completion).save(run.path / "completion.png")
    return completion


def summary() -> str:
    """Of each preset: parameters, and GFLOPs of one DDIM step on one image (2 per multiply-add of convolutions and
    matrix products)."""
    rows = [f"{'preset':14}{'input':>9}{'parameters':>13}{'learned':>11}{'GFLOPs':>9}"]
    for preset in PRESETS:
        model = build(preset, "crowdpose" if preset.endswith("crowdpose") else "coco").eval()
        height = min(model.cfg.short_side, 480)
        width = min(height * 4 // 3, model.cfg.long_side)
        noise = torch.zeros(1, model.cfg.queries, model.skeleton.num_keypoints, 2)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, height, width), None, noise, torch.tensor([999]))
        every, learned = sum(p.numel() for p in model.parameters()) / 1e6, count_parameters(model) / 1e6
        rows.append(f"{preset:14}{f'{width}x{height}':>9}{every:>11.2f} M{learned:>9.2f} M"
                    f"{counter.get_total_flops() / 1e9:>9.1f}")
    return "\n".join(rows)


def main() -> None:
    cfg, args = parse(Config, PRESETS, __doc__)
    if args.train:
        launch(train, cfg, args)
    else:
        print(f"{__doc__}\n{summary()}")


if __name__ == "__main__":
    run_main(main)
