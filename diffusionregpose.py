"""DiffusionRegPose: multi-person pose estimation by regression, started from noisy poses (CVPR 2024).

Idea     ED-Pose finds people in two stages: decoder layers detect boxes, then further layers refine the best
         boxes together with K keypoints in each. Here diffusion comes between the stages: in training the
         ground-truth poses, noised; at inference, to begin with, noise. Two small attentions, K-SA and K-CA, let the
         noisy points move the first keypoints of each person; the second stage makes clean poses of them.
Flow     image (B,3,H,W) → ResNet-50 → maps of stride 8, 16, 32, 64 → Encoder ×6, told the time t →
         memory (B,N,C) → QuerySelection: the Q best cells → boxes (B,Q,4) → 2 decoder layers → the G best
         boxes, K keypoints each → noisy poses (B,G,K,2) enter by K-SA and K-CA → 4 decoder layers →
         poses (B,G,K,2), boxes (B,G,4), scores (B,G,2)
Read     noise_poses (eq. 1-4) → PointAttention (K-SA, K-CA) → attention_mask → Decoder (eq. 5-8, and what
         learns from what) → criterion → sample (Algorithm 1) → KeypointCompletion (eq. 9-12) → train
Letters  B images  Q box queries  G people kept per image (the paper's N_i), and as many noisy poses
         K keypoints  n = G·K  N memory cells  C channels  M heads  d = C/M  L levels  D denoising queries
         P people of an image, or sampling points per level  t time, 0 … T−1, T = 1000
         ᾱ_t (the paper's γ_t) signal's part of the variance  ζ signal scale  y_0 poses  y_t noisy poses
         F memory  F_H content of the G boxes  F_H2K their K keypoint tokens  Q_CK what K-SA returns
         cKpts, cBox keypoints and boxes that the second stage starts from
Release  the authors' code, github.com/tjiiv-cprg/DiffusionRegPose, and weights; "as released": as it does
Units    xy in [0,1] of each image without its padding, x first; names ending in _px are pixels; boxes cxcywh
Tables   at the end of the main text: equation → function, rows of the paper's tables, departures

    python diffusionregpose.py                          what each preset is: parameters, GFLOPs
    python diffusionregpose.py --train                  learn puppets, synthetic people drawn on first use
    python diffusionregpose.py --train --data data/crowdpose --preset r50-crowdpose --init edpose.pth
    python eval.py diffusionregpose-r50 --images photo.jpg --process      and noise turning into poses
"""
from __future__ import annotations

import copy
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import common                               # first: Ctrl-C while torch loads then ends without a traceback
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.special import expit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from common import draw, metrics, records, transforms, weights
from common.cli import RunConfig, check_choice, check_range, parse_numbers, resolve, run_method
from common.datasets import PoseDataset
from common.errors import UserError
from common.export import RESIZED, Exported
from common.heatmaps import CellHeatmaps, people_heatmap_loss
from common.nets.resnet import ConvNorm, ResNet
from common.oks import similarity_of
from common.predict import predict_all
from common.ranks import Ranks, autocast, distribute, init_ranks, mean_over_ranks, rank_zero_first, say, seed_all
from common.records import Prediction, Sample, gather_people
from common.run import Ema, Run
from common.skeletons import Skeleton, get_skeleton, words
from common.splits import open_crowd, open_splits
from common.tables import Row, Table, run_tables
from kernels.deform_attn import deform_attn_offsets
from kernels.dispatch import plain

# ---- Configuration: the paper's numbers and the release's. Each field is a flag, its comment the help. ---

BACKBONES = {"r50": (64, (3, 4, 6, 3)), "r26": (24, (2, 2, 2, 2))}    # width of layer 1, blocks per layer
PADDINGS = ("empty", "repeat", "noise", "mean")
AT_INFERENCE = ("steps", "ensemble", "nms", "seed")       # fields that `eval.py --set` may change


@dataclass(frozen=True)
class Config(RunConfig):       # which adds data, accum (micro-batches), amp, processes, workers, eval_*, seed
    # model (numbers without a source are the release's, nearly all ED-Pose's)
    backbone: str = "r50"          # ResNet (Sec. 4.2): r50, or r26 of less than half its width
    freeze: bool = True            # stem and layer 1 of the backbone stay as they start
    frozen_norm: bool = True       # backbone norms keep ImageNet's statistics (release); off to learn from nothing
    levels: int = 4                # L, feature maps: the backbone's coarsest; a fourth is made from the last
    dim: int = 256                 # C, channels of encoder and decoder
    heads: int = 8                 # M, attention heads; divides dim
    ffn: int = 2048                # hidden width of the layers' feed-forward blocks
    points: int = 4                # P, sampling points per head and level
    encoder_layers: int = 6        # layers of the encoder
    layers: int = 6                # layers of the decoder
    box_layers: int = 2            # of these, layers that see boxes alone; the others see keypoints, too
    box_queries: int = 900         # Q, cells of the memory that become box queries
    queries: int = 100             # G, the paper's N_i (Table 5): people and noisy poses; K-SA, K-CA depend on it
    coarse_head: str = "released"  # first keypoints' head: own, shared (pose_heads[0]), released (K = 14: shared)
    # diffusion (Sec. 3.2)
    ksa_kca: bool = True           # noise enters the decoder, t the encoder; off: ED-Pose (Tables 1 and 2)
    scale: float = 6.0             # ζ of eq. 4, signal against noise (Table 3; the paper takes 5)
    padding: str = "empty"         # noised beside the true poses (Table 4): empty, repeat, noise, mean
    uniform_t: bool = True         # train at t uniform in 0 … 999; off: at t = 0
    keypoint_completion: bool = True   # noise poses completed from their labelled keypoints (Sec. 3.2.4)
    steps: int = 1                 # DDIM steps at inference (Algorithm 1; the release takes 1)
    ensemble: bool = False         # keep the people of all DDIM steps, not of the last alone
    nms: str = "official"          # against duplicates (release): official (mixes up x and y), plain, none
    as_released: bool = False      # train as the release: sets t = 0, Gaussian padding, no completion
    init: str = "resnet50"         # start weights: resnet50, or a run or file of DiffusionRegPose or ED-Pose
    # denoising queries (DN-DETR, as ED-Pose has them)
    dn_queries: int = 100          # D, noisy ground-truth boxes per image; 0: none
    label_noise: float = 0.5       # fraction of them with a random label
    box_noise: float = 0.4         # largest shift of a centre, in half sides, and change of a side, in sides
    # optimisation (Sec. 4.2: AdamW, epochs, batch, lr, decay; the rest is the release's)
    epochs: int = 80               # passes over the training images
    batch: int = 8                 # images per optimiser step, over all GPUs and micro-batches
    lr: float = 2e-4               # learning rate
    lr_backbone: float = 1e-4      # learning rate of the backbone
    weight_decay: float = 1e-4     # AdamW, on every parameter
    drop_epochs: str = "31,61"     # ×0.1 from these epochs on, counted from 0 (release; Sec. 4.2: 30 or 65)
    clip: float = 0.1              # largest L2 norm of the gradient
    # pictures (Sec. 4.2: crop, flip, resize; the lengths are the release's)
    short_side: int = 800          # pixels of an image's shorter side, unless the longer gets too long
    long_side: int = 1333          # pixels of the longer side at most
    multiscale: bool = True        # train at short sides of 0.6 to 1 of that, half of the time after a crop
    # aids to learn from nothing: ours, not the paper's; the presets of the paper do without them
    near_identity: bool = False    # K-SA starts at 0, K-CA near the identity, keypoints unlike one another
    learned_share: bool = False    # keypoints go a learned share of the way that K-CA moves them, 0 at first
    oks_score_weight: float = 0.0  # of DETRPose's eq. 5: scores learn their poses' OKS; 0: focal loss
    oks_score_from: int = 0        # first epoch with it, counted from 0; focal loss before
    heatmap_weight: float = 0.0    # of an auxiliary loss that asks the memory's finest map for heatmaps
    schedule: str = "constant"     # constant or cosine
    warmup: int = 0                # optimiser steps of linear warm-up
    ema: float = 0.0               # decay of the weight average that is evaluated; 0: the weights themselves
    ema_warmup: int = 0            # optimiser steps over which the decay grows to that

    def __post_init__(self):
        """Raises UserError for values that no run could use. `as_released` sets the fields it stands for."""
        super().__post_init__()
        if self.as_released:
            if self.padding not in ("empty", "noise"):
                raise UserError("--as_released stands for --padding noise: leave out --padding")
            for name, value in dict(uniform_t=False, padding="noise", keypoint_completion=False).items():
                object.__setattr__(self, name, value)
        check_choice(self, backbone=BACKBONES, padding=PADDINGS, nms=("official", "plain", "none"),
                     schedule=("constant", "cosine"), coarse_head=("own", "shared", "released"))
        check_range(self, 1, 4, "levels")
        check_range(self, 1, 1000, "points steps")
        check_range(self, 1, math.inf, "dim heads ffn encoder_layers box_layers layers box_queries queries "
                    "epochs batch short_side long_side")
        check_range(self, 1e-6, 1e6, "scale")
        check_range(self, 1e-6, math.inf, "lr clip")
        check_range(self, 0, math.inf, "dn_queries oks_score_weight oks_score_from heatmap_weight "
                    "lr_backbone weight_decay warmup ema_warmup")
        check_range(self, 0, 1, "label_noise box_noise ema")
        parse_numbers(self.drop_epochs)
        if self.dim % (4 * self.heads) or self.dim % 32:
            raise UserError(f"--dim {self.dim} does not split over {self.heads} heads: choose a multiple of "
                            f"{math.lcm(32, 4 * self.heads)}")
        if self.layers <= self.box_layers:
            raise UserError(f"--layers {self.layers}: choose more than the {self.box_layers} --box_layers")
        if self.queries > self.box_queries:
            raise UserError(f"--queries {self.queries}: no more than the {self.box_queries} --box_queries")


PRESETS: dict[str, Config] = {
    # minutes on a laptop, from nothing: everything small, all aids on
    "tiny": Config(
        backbone="r26", freeze=False, levels=3, dim=96, heads=4, ffn=192, points=2, encoder_layers=2,
        layers=4, box_layers=1, box_queries=40, queries=8, coarse_head="own", init="", dn_queries=10,
        epochs=7, batch=16, lr=1e-3, lr_backbone=1e-3, drop_epochs="", clip=1.0, short_side=128,
        long_side=128, multiscale=False, frozen_norm=False, near_identity=True, learned_share=True,
        oks_score_weight=8.0, oks_score_from=2, heatmap_weight=2.0, schedule="cosine", warmup=60, ema=0.995,
        ema_warmup=100, processes=2, workers=0, eval_every=7, eval_batch=50),
    # one image per evaluation batch: padding moves the results a little
    "r50": Config(coarse_head="own", eval_batch=1),
    "r50-crowdpose": Config(coarse_head="shared", data="data/crowdpose", eval_batch=1),
    "r50-edpose": Config(ksa_kca=False, nms="none", eval_batch=1),     # weights that the release starts from
}

# ---- Forward diffusion (Sec. 3.1, 3.2.1): poses, padded to G per image, noised up to a time t ------------

STEPS = 1000               # T (release; the paper names no number)


def cosine_schedule() -> Tensor:
    """ᾱ_t for t = 0 … T−1, float64 (T,): what part of the variance of y_t is signal.

        q(y_t | y_{t−1}) = N( √α_t y_{t−1}, (1 − α_t) I )             one step                       (eq. 1)
        q(y_t | y_0)     = N( √ᾱ_t y_0, (1 − ᾱ_t) I ),  ᾱ_t = Π α_s   all up to t at once            (eq. 2)

    The paper names no values; as released ᾱ_t follows a cosine and α_t is at least 0.001: ᾱ_t falls from
    0.99996, nearly all signal, to 2·10⁻⁹, nearly all noise.
    """
    u = torch.arange(STEPS + 1, dtype=torch.float64) / STEPS
    curve = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha = (curve[1:] / curve[:-1]).clamp(min=0.001)                                   # α_t of eq. 1
    return alpha.cumprod(0)                                                             # ᾱ_t of eq. 2


ALPHA_BAR = cosine_schedule()


def to_signal(poses: Tensor, scale: float) -> Tensor:
    """Poses in [0, 1] of the image → signal in [−ζ, ζ], to which noise of deviation 1 is added.

        pose     0 ────────────── ½ ────────────── 1       the image, along x or y
        signal  −ζ ────────────── 0 ────────────── ζ       2ζ = 12 deviations of the noise wide
        t = T−1              ·  : █ :  ·                   noise alone: a blob around the centre

    Centred, because √ᾱ_t shrinks the signal towards 0, which should be the middle of the image, no corner.
    With ζ = 6 noise alone has a deviation of 1/2ζ = 0.083 of the image, so all noisy points of t = T−1 lie
    near the centre; a larger ζ disturbs poses less at every other t, too.
    """
    return (2 * poses - 1) * scale


def to_poses(signal: Tensor, scale: float) -> Tensor:
    """[−ζ, ζ] → [0, 1], clamped."""
    return (signal.clamp(-scale, scale) / scale + 1) / 2


def noise_poses(poses: Tensor, t: Tensor, eps: Tensor, scale: float) -> Tensor:
    """Poses (B, G, K, 2) as they are at time t (B,); eps is standard normal.

        y_t = √ᾱ_t y_0 + √(1 − ᾱ_t) ε              eq. 2 as a sample                                 (eq. 3)
        y_t = √ᾱ_t (ζ y_0) + √(1 − ᾱ_t) ε          with the scale of the signal                      (eq. 4)

    Departs from the paper: as released ζ y_0 is ζ (2 y_0 − 1), and y_t is clamped and mapped to the image.
    """
    alpha_bar = ALPHA_BAR.to(t.device)[t][:, None, None, None]
    signal, noise = alpha_bar.sqrt().to(poses), (1 - alpha_bar).sqrt().to(poses)
    return to_poses(signal * to_signal(poses, scale) + noise * eps, scale)                      # eq. 3 and 4


@dataclass
class People(records.People):
    """keypoints, visible, boxes (cxcywh), areas in fractions of the image: what losses see; and poses to noise."""
    poses: Tensor          # (P, K, 2) y_0: the keypoints; unlabelled ones are completed, or at (0, 0)


class PoseNoise(NamedTuple):
    """All random numbers of a batch of noisy poses."""
    t: Tensor              # (B,) diffusion times
    eps: Tensor            # (B, G, K, 2) standard normal
    order: list[Tensor]    # (G,) of each image with people: repeated(P, G)
    pad: Tensor            # (B, G, K, 2) standard normal


def repeated(people: int, count: int) -> Tensor:
    """0 … people−1, all of them as often as fits into `count`, then some at random: (count,)."""
    whole = torch.arange(people).repeat(count // people)
    return torch.cat([whole, torch.randperm(people)[:count - len(whole)]])


def draw_pose_noise(counts: list[int], keypoints: int, cfg: Config, device: torch.device) -> PoseNoise:
    """counts: people of each image. The paper does not say how t is drawn."""
    t = torch.randint(0, STEPS if cfg.uniform_t else 1, (len(counts),), device=device)
    eps, pad = torch.randn(2, len(counts), cfg.queries, keypoints, 2, device=device)
    return PoseNoise(t, eps, [repeated(n, cfg.queries).to(device) if n else t[:0] for n in counts], pad)


def pad_poses(people: list[People], noise: PoseNoise, padding: str) -> Tensor:
    """y_0 (B, G, K, 2): each image's poses (a random G of them if there are more), then padding (Sec. 3.2.1).

    Padding (Table 4): empty, zeros, the paper's choice; repeat, the poses again; noise, Gaussian, as
    released; mean, the mean pose around Gaussian centres. An image without people is all padding.
    Zeros, missing joints' too, are the image's corner: as released their signal is −ζ, where eq. 4 has 0.
    Which mean is ours: of those in the batch whose keypoints are all known, the image 6 deviations wide.
    """
    filler = noise.pad if padding == "noise" else torch.zeros_like(noise.pad)
    everybody = torch.cat([one.poses for one in people])
    whole = everybody[(everybody != 0).any(-1).all(1)]              # at (0, 0) is what is not known
    if padding == "mean" and len(whole):
        filler = (whole - whole.mean(1, keepdim=True)).mean(0) + 0.5 + noise.pad[:, :, :1] / 6
    rows = []
    for one, row, order in zip(people, filler, noise.order):
        own = one.poses[order if padding == "repeat" or len(one) > len(row) else slice(None)]
        rows.append(torch.cat([own, row[len(own):]]))
    return torch.stack(rows)


# ---- K-SA and K-CA (Sec. 3.2.1, 3.2.2) -------------------------------------------------------------------


class PointAttention(nn.Module):
    """Attention from n points z of an image to n points p of it, with one head: K-SA and K-CA.

        Q, K, V = MLP_Q(z), MLP_K(p), MLP_V(p)         K-SA: z = p = noisy points                    (eq. 5)
        SA, CA = softmax(√n Q Kᵀ) V                    K-CA: z = Q_CK + p, p = coarse keypoints      (eq. 7)

    It sees coordinates alone, of the points of all people, and returns coordinates: weighted means of V.
    Departs from the paper: as released the MLPs are one linear layer each, Q, K: 2 → C and V: 2 → 2, and the
    logits are multiplied by √n, so that another G is another temperature; the paper prints no softmax.
    Takes z, p (B, n, 2), returns (B, n, 2).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(2, dim), nn.Linear(2, dim), nn.Linear(2, 2)

    def forward(self, z: Tensor, p: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):          # √n makes the softmax sharp: float32
            q, k, v = self.query(z), self.key(p), self.value(p)                         # eq. 5 and 7
            return (p.shape[1] ** 0.5 * q @ k.mT).softmax(-1) @ v


# ---- Decoder: boxes, then boxes and keypoints (Sec. 3.2.2, Fig. 2) ---------------------------------------
#
# Tokens are in this order:  D denoising queries (in training) | boxes | G·K keypoints, person after person
# (from layer box_layers on). An attention rule says which see which; it takes q, k, v (B, M, tokens, d).

AttentionRule = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_mask(group: Tensor | None, num_boxes: int, keypoints: int, device: torch.device) -> Tensor:
    """(B or 1, tokens, tokens), True (·) where the token of a row may look at that of a column, else False (✗).

        row ↓  column →      D = 4   │ boxes │ keypoints     two people a and b of two keypoints each
                            1 1 2 2  │  a b  │ a a b b
        denoising group 1   · · ✗ ✗  │  · ·  │ · · · ·       A denoising group has a box for every person
        denoising group 2   ✗ ✗ · ·  │  · ·  │ · · · ·       of the image: the true one, disturbed. They see
        box of a            ✗ ✗ ✗ ✗  │  · ·  │ · · ✗ ✗       all tokens but other groups; no other token
        box of b            ✗ ✗ ✗ ✗  │  · ·  │ ✗ ✗ · ·       sees them: it could copy the answer.
        keypoint of a       ✗ ✗ ✗ ✗  │  · ✗  │ · · ✗ ✗       The tokens of a person see one another, and
        keypoint of b       ✗ ✗ ✗ ✗  │  ✗ ·  │ ✗ ✗ · ·       boxes see all boxes.

    group (B, D): of each denoising query, or None; num_boxes, keypoints: Q, 0 in the box layers, then G, K.
    """
    person = torch.arange(num_boxes, device=device)
    person = torch.cat([person, person[:, None].expand(-1, keypoints).flatten()])
    box = torch.arange(len(person), device=device) < num_boxes
    mask = ((person[:, None] == person) | (box[:, None] & box))[None]
    if group is not None:
        denoising = F.pad(group[:, :, None] == group[:, None], (0, len(person)), value=True)
        mask = torch.cat([denoising, F.pad(mask, (group.shape[1], 0)).expand(len(group), -1, -1)], 1)
    return mask


def attention_rule(group: Tensor | None, num_boxes: int, keypoints: int, device: torch.device) -> AttentionRule:
    """Attention under the mask; where no query is a denoising one, as at inference, its fast form."""
    if group is None and not plain():      # plain: POSE_KERNELS asks for formulas. 99 % of the mask is ✗
        return partial(attend_in_blocks, num_boxes=num_boxes)
    mask = attention_mask(group, num_boxes, keypoints, device)
    return partial(F.scaled_dot_product_attention, attn_mask=mask[:, None])


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
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, attend: AttentionRule) -> Tensor:
        dim = x.shape[-1]
        qk = F.linear(x + position, self.in_proj_weight[:2 * dim], self.in_proj_bias[:2 * dim])
        v = F.linear(x, self.in_proj_weight[2 * dim:], self.in_proj_bias[2 * dim:])
        q, k, v = (rearrange(part, "b n (m d) -> b m n d", m=self.heads) for part in (*qk.chunk(2, -1), v))
        return self.out_proj(rearrange(attend(q, k, v), "b m n d -> b n (m d)"))


class DecoderLayer(nn.Module):
    """Attention among the tokens, into the image, then a feed-forward block; x, position (B, tokens, C).
    reference (B, tokens, L, 4) are boxes in fractions of the padded image. ED-Pose's.
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


class Output(NamedTuple):
    """Predictions that get a loss: of a decoder layer, or of the selection of cells, one per box token."""
    logits: Tensor               # (B, boxes, 2), of which [1] is the person's
    boxes: Tensor                # (B, boxes, 4)
    keypoints: Tensor | None     # (B, G, K, 2), where there are any


class Decoder(nn.Module):
    """Human detection D_H, its expansion to keypoints D_H2K, and human-to-keypoint detection D.

        F_H = D_H(F)                      layers 0 … box_layers−1 refine Q boxes, the G best stay    (eq. 6)
        F_H2K = D_H2K(F, F_H)             each of these people gets K coarse keypoints               (eq. 6)
        Q_CK = SA(y_t)                    K-SA                                                       (eq. 5)
        cKpts, cBox = CA(Q_CK, F_H2K)     K-CA                                                       (eq. 7)
        y'_t, b_t, c_t = D(cKpts, cBox)   all other layers: keypoints, boxes, scores                 (eq. 8)

    Heads    prediction_l = σ( head_l(norm(x_l)) + σ⁻¹(reference_l) ), where x_l leaves layer l; the same head
             on x_l without the norm gives reference_{l+1}. Keypoints have a width and height, too: how far
             around them a layer reads the image.
    Learns   Every layer reads the image around a detached reference, and the reference that it hands on starts
             from a detached one. Its prediction starts from the reference with its gradient, so that the loss
             of layer l also trains head l−1 (DINO's "look forward twice"): through tokens a loss goes back to
             layer 0, through coordinates one layer. So K-SA and K-CA learn from two terms alone: L1 and OKS of
             the first keypoint layer, an auxiliary loss; later layers see cKpts detached. Widths and heights of
             keypoints are in no prediction: `size_head` and `keypoint_size` only decay, as in the release.
    """

    def __init__(self, cfg: Config, keypoints: int):
        super().__init__()
        self.box_layers, self.people, self.keypoints, dim = cfg.box_layers, cfg.queries, keypoints, cfg.dim
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.layers))
        self.norm, self.position_head = nn.LayerNorm(dim), MLP(2 * dim, dim, dim)
        self.score_heads = nn.ModuleList(nn.Linear(dim, 2) for _ in range(cfg.layers))
        self.box_heads = nn.ModuleList(MLP(dim, dim, dim, 4) for _ in range(cfg.layers))
        self.pose_heads = nn.ModuleList(MLP(dim, dim, dim, 2) for _ in range(cfg.layers - cfg.box_layers))
        self.size_head = MLP(dim, dim, dim, 2)
        # released models of CrowdPose's 14 keypoints use the first pose head here, too
        shared = cfg.coarse_head == "shared" or cfg.coarse_head == "released" and keypoints == 14
        self.coarse_head = None if shared else MLP(dim, dim, dim, 2)
        self.keypoint_content, self.keypoint_size = nn.Embedding(keypoints, dim), nn.Embedding(keypoints, 2)
        self.ksa, self.kca = (PointAttention(dim) if cfg.ksa_kca else None for _ in range(2))
        self.kca_share = nn.Parameter(torch.zeros(())) if cfg.ksa_kca and cfg.learned_share else None

    def pick_people(self, x: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Of Q boxes the G of the highest score, best first: content (B, G, C) and boxes (B, G, 4)."""
        best = self.score_heads[self.box_layers - 1](x).max(-1).values.topk(self.people).indices[..., None]
        return x.gather(1, best.expand(-1, -1, x.shape[2])), boxes.gather(1, best.expand(-1, -1, 4))

    def coarse_keypoints(self, content: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K keypoints for each of G people: tokens (B, G·K, C), xy and wh (B, G·K, 2)."""
        tokens = content[:, :, None] + self.keypoint_content.weight                     # (B, G, K, C)
        move = (self.coarse_head or self.pose_heads[0])(tokens).float()
        xy = (move + inverse_sigmoid(boxes[:, :, None, :2])).sigmoid()                  # (B, G, K, 2)
        wh = self.keypoint_size.weight.sigmoid() * boxes[:, :, None, 2:]
        return tokens.flatten(1, 2), xy.flatten(1, 2), wh.flatten(1, 2)

    def mix_with_noise(self, poses: Tensor, coarse: Tensor) -> Tensor:
        """cKpts (B, G·K, 2) from noisy poses y_t (B, G, K, 2) and coarse keypoints (B, G·K, 2).

            y_t     n₁¹ … n₁ᴷ │ n₂¹ … n₂ᴷ │ … │ n_G¹ … n_Gᴷ     row g of the noise goes to the g-th best
                         ╲ ╱ ╲ ╱ all to all ╲ ╱ ╲ ╱             box: it has no other link to a person
            K-SA    each a weighted mean of V(all noisy points)
            +       each plus the coarse keypoint in its place
                         ╲ ╱ ╲ ╱ all to all ╲ ╱ ╲ ╱
            K-CA    each a weighted mean of V(all coarse keypoints), whoever's; may leave [0, 1]

        Departs from the paper: as released the query of eq. 7 is Q_CK plus the coarse keypoint, its keys and
        values come from coarse keypoints and not from tokens, and boxes stay as they are (cBox).
        """
        y_t = poses.flatten(1, 2)
        q_ck = self.ksa(y_t, y_t)                                                       # eq. 5
        c_kpts = self.kca(q_ck + coarse, coarse)                                        # eq. 7
        if self.kca_share is not None:           # an aid: a new decoder needs the coarse points themselves
            c_kpts = coarse + self.kca_share * (c_kpts - coarse)
        return c_kpts

    def apply_heads(self, l: int, x: Tensor, reference: Tensor, num_boxes: int) -> tuple[Tensor, Tensor]:
        """Layer l's boxes (B, num_boxes, 4) of the first tokens, keypoints (B, G·K, 2) of the others."""
        new = (self.box_heads[l](x[:, :num_boxes]).float() + inverse_sigmoid(reference[:, :num_boxes])).sigmoid()
        x, reference = x[:, num_boxes:], reference[:, num_boxes:, :2]
        if l < self.box_layers:
            return new, reference                               # no keypoints yet: empty
        return new, (self.pose_heads[l - self.box_layers](x).float() + inverse_sigmoid(reference)).sigmoid()

    def refine(self, l: int, x: Tensor, reference: Tensor, num_boxes: int) -> Tensor:
        """The references (B, tokens, 4) of layer l + 1."""
        new, xy = self.apply_heads(l, x, reference, num_boxes)
        if l < self.box_layers:
            return new
        wh = (self.size_head(x[:, num_boxes:]).float() + inverse_sigmoid(reference[:, num_boxes:, 2:])).sigmoid()
        return torch.cat([new, torch.cat([xy, wh], -1)], 1)

    def predict(self, l: int, x: Tensor, reference: Tensor, num_boxes: int) -> Output:
        """What layer l answers; reference with its gradient, see above."""
        h = self.norm(x)
        new, xy = self.apply_heads(l, h, reference, num_boxes)
        keypoints = None if l < self.box_layers else xy.unflatten(1, (self.people, -1))
        return Output(self.score_heads[l](h[:, :num_boxes]), new, keypoints)

    def forward(self, x: Tensor, reference: Tensor, memory: Tensor, grid: Grid, poses: Tensor | None,
                group: Tensor | None) -> list[Output]:
        """x (B, D + Q, C), reference (B, D + Q, 4), group (B, D) or None if D = 0 → an Output of each layer,
        denoising queries in front; at inference of the last layer alone."""
        dn = 0 if group is None else group.shape[1]
        num_boxes, last, outputs = x.shape[1], len(self.layers) - 1, []         # D + Q, later D + G
        attend = attention_rule(group, num_boxes - dn, 0, x.device)
        for l, layer in enumerate(self.layers):
            if l == self.box_layers:                            # x[:, dn:] is F_H of eq. 6 for all Q boxes
                content, best = self.pick_people(x[:, dn:], reference[:, dn:])
                tokens, xy, wh = self.coarse_keypoints(content, best)                   # F_H2K of eq. 6
                xy = self.mix_with_noise(poses, xy) if self.ksa else xy                 # eq. 5 and 7
                x = torch.cat([x[:, :dn], content, tokens], 1)
                reference = torch.cat([reference[:, :dn], best, torch.cat([xy, wh], -1)], 1)
                num_boxes = dn + self.people
                attend = attention_rule(group, self.people, self.keypoints, x.device)
            start = reference.detach()
            inside = start[:, :, None] * grid.valid.repeat(1, 1, 2)[:, None]            # (B, tokens, L, 4)
            yxwh = inside[:, :, 0, [1, 0, 2, 3]]               # as released, in fractions of the padded image
            position = self.position_head(sine_embedding(yxwh, x.shape[-1] // 2, temperature=10000))
            x = layer(x, position, inside, memory, grid, attend)               # D_H (eq. 6), D (eq. 8)
            if self.training or l == last:
                outputs.append(self.predict(l, x, reference, num_boxes))       # y'_t, b_t, c_t (eq. 8)
            if l < last:
                reference = self.refine(l, x, start, num_boxes)
        return outputs


# ---- The model (Fig. 2) ----------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """What of an image does not depend on t: made once for any number of DDIM steps."""
    tokens: Tensor         # (B, N, C)
    position: Tensor       # (B, N, C) before t changes it
    grid: Grid             # (appendix) where the N cells are, `valid`: what part of each level is image


class DiffusionRegPose(nn.Module):
    """The whole network: `forward` to train, `encode_image` once and `decode` per DDIM step at inference."""

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
        reset_parameters(self)

    def encode_image(self, images: Tensor, padded: Tensor | None = None) -> Encoded:
        """images (B, 3, H, W), normalised (ImageNet's mean, deviation), 0 where padded (B, H, W) is True."""
        padded = torch.zeros_like(images[:, 0], dtype=torch.bool) if padded is None else padded
        maps = self.backbone(images)[1:][-self.cfg.levels:]                             # Algorithm 1, line 2
        maps = [project(x) for project, x in zip(self.input_proj, [*maps, maps[-1]])]   # up to 3 levels: no extra
        masks = [F.interpolate(padded[None].float(), x.shape[-2:])[0].bool() for x in maps]
        grid = make_grid(masks)
        if grid.padded.shape[1] < self.cfg.queries:
            raise UserError(f"an image of {images.shape[3]}x{images.shape[2]} pixels has no "
                            f"{self.cfg.queries} places for people: choose a larger --short_side")
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        return Encoded(tokens, cell_positions(masks, self.cfg.dim), grid)

    def decode(self, image: Encoded, poses: Tensor | None, t: Tensor | None,
               denoising: Denoising | None = None) -> dict:
        """Everything that depends on the noisy poses or on the time (Algorithm 1, lines 3-12); see `forward`.

        Departs from the paper: as released t changes the cells' positions, so every step runs the encoder.
        """
        position, memory, grid = image.position, image.tokens, image.grid
        if self.time_embedding:
            s = self.time_embedding(t)[:, None]
            position = position * (s + 1) + s
        levels = [level.expand(h * w, -1) for level, (h, w) in zip(self.level_embed, grid.shapes)]
        position = position + torch.cat(levels)
        for layer in self.encoder:
            memory = layer(memory, position, grid)                                      # F of eq. 6
        content, proposals = self.selection(memory, grid)       # the chosen cells: features detached; an Output
        reference, group, dn = proposals.boxes.detach(), None, 0
        if denoising:
            content = torch.cat([denoising.content, content], 1)
            reference = torch.cat([denoising.reference, reference], 1)
            group, dn = denoising.group, denoising.group.shape[1]
        layers = self.decoder(content, reference, memory, grid, poses, group)

        matching = [Output(logits[:, dn:], boxes[:, dn:], keypoints) for logits, boxes, keypoints in layers]
        result = matching[-1]._asdict()
        if self.training:
            names = [*(f"_{l}" for l in range(len(layers) - 1)), "", "_interm"]
            noisy = [Output(logits[:, :dn], boxes[:, :dn], None) for logits, boxes, _ in layers if dn]
            # several processes wait for a gradient of every parameter, also of those that never get one
            idle = [*self.decoder.size_head.parameters(), self.decoder.keypoint_size.weight,
                    self.noisy_label.weight]
            rows, columns = grid.shapes[0]
            heatmaps = self.heatmaps(memory[:, :rows * columns], rows) if self.heatmaps else None
            result |= dict(outputs=dict(zip(names, [*matching, proposals])), denoising=denoising,
                           dn_outputs=dict(zip(names, noisy)), unused=0 * sum(p.sum() for p in idle),
                           heatmaps=heatmaps, valid=grid.valid[:, 0])
        return result

    def forward(self, images: Tensor, padded: Tensor | None, poses: Tensor | None, t: Tensor | None,
                people: list[People] | None = None, dn_noise: Noise | None = None) -> dict:
        """images (B, 3, H, W), noisy poses (B, G, K, 2) of time t (B,) → people. Without K-SA it reads neither.

        Always    logits (B, G, 2) of which [1] is the person's, boxes (B, G, 4), keypoints (B, G, K, 2)
        Training  (in train(), with the people of each image) `outputs`, an Output by the suffix of its
                  losses: _0, _1, … and "" for the decoder's layers, _interm for the selected cells;
                  `dn_outputs`, those of the `denoising` queries; `unused`, a 0 that belongs to the losses;
                  `heatmaps` (B, K, 2h, 2w) of the finest map (h, w), None without `heatmap_weight`, and
                  `valid` (B, 2), the fraction of its width and height that is image
        """
        denoising = None
        if people is not None and self.cfg.dn_queries:
            denoising = denoising_queries(people, self.noisy_label, self.cfg, dn_noise)
        return self.decode(self.encode_image(images, padded), poses, t, denoising)


# ---- Matching and losses (Sec. 3.2.2) --------------------------------------------------------------------

Pairs = tuple[Tensor, Tensor, Tensor]  # image, query, person: equally long; `person` counts through the batch
PERSON = 1                             # the class of a person; class 0, COCO's category 0, does not exist
WEIGHTS = dict(ce=2.0, bbox=5.0, giou=2.0, keypoints=10.0, oks=4.0)
DENOISING_WEIGHTS = dict(ce=0.3, bbox=2.5, giou=1.0)


def match_cost(output: Output, people: People, sigmas: Tensor) -> Tensor:
    """Cost of giving a query to one of the batch's P people, (B, Q or G, P): 2·class + 5·L1 − 2·GIoU, or where there
    are poses 2·class + 10·Σ v|Δ| + 4·(1 − OKS), no box. ED-Pose's; the paper says nothing of it."""
    logits, boxes, keypoints = output
    p = logits[..., PERSON].float().sigmoid().unsqueeze(-1)
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    if keypoints is None:
        distance = (boxes[:, :, None] - people.boxes).abs().sum(-1)
        return 2 * focal + 5 * distance - 2 * generalized_iou(boxes[:, :, None], people.boxes)
    difference = keypoints[:, :, None] - people.keypoints                               # (B, G, P, K, 2)
    distance = (difference.abs().sum(-1) * people.visible).sum(-1)
    similarity = similarity_of(difference.square().sum(-1), people.visible, people.areas, sigmas)
    return 2 * focal + 10 * distance + 4 * (1 - similarity)


@torch.no_grad()
def match(outputs: list[Output], people: list[People], sigmas: Tensor) -> list[Pairs]:
    """The cheapest one-to-one assignment of people to queries, for each output alone (Hungarian method)."""
    everybody = gather_people(people)
    costs = [match_cost(output, everybody, sigmas) for output in outputs]
    ends, matchings = np.cumsum([0] + [len(one) for one in people]), []
    for cost in costs:
        cost, found = cost.nan_to_num(1e6, 1e6, -1e6).cpu().numpy(), []          # a NaN is reported with the losses
        for image, (first, last) in enumerate(zip(ends, ends[1:])):
            query, person = linear_sum_assignment(cost[image, :, first:last])
            found.append(np.stack([np.full_like(query, image), query, person + first]))
        matchings.append(tuple(torch.from_numpy(np.concatenate(found, 1)).to(sigmas.device)))
    return matchings


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """L_c, summed: −α (1 − p)² log p where positive, −(1 − α) p² log(1 − p) elsewhere, α = 0.25."""
    p = logits.sigmoid()
    weight = torch.where(positive > 0, 0.25 * (1 - p) ** 2, 0.75 * p ** 2)
    return (weight * F.binary_cross_entropy_with_logits(logits, positive, reduction="none")).sum()


def box_losses(boxes: Tensor, true: Tensor) -> dict[str, Tensor]:
    """L_h: Σ ‖b − b*‖₁ of boxes cxcywh (pairs, 4), and as released Σ (1 − GIoU)."""
    return dict(bbox=(boxes - true).abs().sum(), giou=(1 - generalized_iou(boxes, true)).sum())


def pose_losses(keypoints: Tensor, true: People, sigmas: Tensor) -> dict[str, Tensor]:
    """L_k: Σ v|Δ| of each pose (pairs, K, 2), v = 1 where labelled, and as released 1 − OKS; (pairs,)."""
    difference = keypoints - true.keypoints
    similarity = similarity_of(difference.square().sum(-1), true.visible, true.areas, sigmas)
    return dict(keypoints=(difference.abs().sum(-1) * true.visible).sum(-1), oks=1 - similarity)


def output_losses(output: Output, pairs: Pairs, people: People, sigmas: Tensor, score_weight: float) -> dict:
    """The weighted loss terms of one output for its pairs, summed over the batch."""
    logits, boxes, keypoints = (x if x is None else x.float() for x in output)
    image, query, person = pairs
    true, matched = people.take(person), torch.zeros_like(logits)
    matched[image, query, PERSON] = 1
    terms = dict(ce=focal_loss(logits, matched)) | box_losses(boxes[image, query], true.boxes)
    if keypoints is not None:
        errors = pose_losses(keypoints[image, query], true, sigmas)
        terms |= {term: value.sum() for term, value in errors.items()}
    terms = {term: WEIGHTS[term] * value for term, value in terms.items()}
    if keypoints is not None and score_weight:                                          # an aid, see Config
        terms["ce"] = score_weight * oks_score_loss(logits, pairs, 1 - errors["oks"])
    return terms


def criterion(result: dict, people: list[People], sigmas: Tensor, score_weight: float = 0.0,
              pieces: int = 1) -> dict[str, Tensor]:
    """All weighted loss terms of a training forward, by their names in the release; their sum is minimised.

    Per person, for every layer (_0, _1, ..., the last without suffix) and the selected cells (_interm):
    2·focal + 5·L1 + 2·(1 − GIoU) and, where there are poses, 10·Σ v|Δ| + 4·(1 − OKS). Denoising queries, dn_:
    0.3·focal + 2.5·L1 + (1 − GIoU), divided by D and, as released, summed over images; hence × `pieces`, the
    micro-batches × processes over which `train` averages. Without pairs all but `ce` are 0, with a zero gradient.
    Departs from the paper: it has focal, L1 of boxes, L1 of keypoints; weights and the rest are the release's.
    """
    everybody, outputs = gather_people(people), result["outputs"]
    # over all processes, so that N GPUs have the gradient of one; of this micro-batch (see Departures)
    count = mean_over_ranks(torch.tensor(float(len(everybody)), device=sigmas.device)).clamp(min=1)
    losses = {}
    for (name, output), pairs in zip(outputs.items(), match(list(outputs.values()), people, sigmas)):
        for term, value in output_losses(output, pairs, everybody, sigmas, score_weight).items():
            losses[f"loss_{term}{name}"] = value / count
    for name, (logits, boxes, _) in result["dn_outputs"].items():
        true, positive = result["denoising"], torch.zeros_like(logits, dtype=torch.float32)
        positive[..., PERSON] = true.known.float()
        terms = dict(ce=focal_loss(logits.float(), positive))
        terms |= box_losses(boxes.float()[true.known], true.boxes[true.known])
        for term, value in terms.items():
            losses[f"dn_loss_{term}{name}"] = DENOISING_WEIGHTS[term] * value * pieces / boxes.shape[1]
    return losses


# ---- Reverse diffusion (Sec. 3.2.3): from noise to people ------------------------------------------------


def ddim_step(x: Tensor, poses: Tensor, t: int, next_t: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """From x_t and the poses predicted from it (B, G, K, 2): x at next_t; also x₀ and ε, for the tests.

        ε = (x_t/√ᾱ_t − x₀) / √(1/ᾱ_t − 1)           eq. 4 solved for ε
        x_next = √ᾱ_next x₀ + √(1−ᾱ_next) ε           DDIM's, η = 0: no fresh noise. x are signals
    """
    alpha, alpha_next = ALPHA_BAR[t].item(), ALPHA_BAR[next_t].item()
    x0 = to_signal(poses, scale).clamp(-scale, scale)
    eps = (x / alpha ** 0.5 - x0) / (1 / alpha - 1) ** 0.5
    return alpha_next ** 0.5 * x0 + (1 - alpha_next) ** 0.5 * eps, x0, eps


@torch.no_grad()
def sample(model: DiffusionRegPose, images: Tensor, padded: Tensor | None = None, steps: int = 1,
           noise: Tensor | None = None) -> list[dict]:
    """Algorithm 1: results of all steps, the last is the answer; each has its t, x (x_t) and `noisy` poses.

    noise, standard normal (B or 1, G, K, 2), is x at t = T−1, by default drawn. One step, the default, sees
    t = T−1 alone, where ᾱ_t = 2·10⁻⁹ leaves no pose in the noise: regression from the image and random starts.
    """
    cfg, image, results = model.cfg, model.encode_image(images, padded), []
    shape = (len(images), cfg.queries, model.skeleton.num_keypoints, 2)
    x = torch.randn(shape, device=images.device) if noise is None else noise.to(images).expand(shape)
    steps = steps if cfg.ksa_kca else 1
    times = torch.linspace(-1, STEPS - 1, steps + 1, dtype=torch.float64).int().tolist()[::-1]   # -1: end
    for t, next_t in zip(times, times[1:]):
        noisy = to_poses(x, cfg.scale)
        result = model.decode(image, noisy, torch.full(shape[:1], t, device=images.device))
        results.append(result | dict(t=t, x=x, noisy=noisy))
        if next_t >= 0:
            x = ddim_step(x, result["keypoints"], t, next_t, cfg.scale)[0]
    return results


def start_noise(image_id: int | str, cfg: Config, keypoints: int, draw_number: int = 0) -> Tensor:
    """x at t = T−1 (G, K, 2) of an image: the same whichever pictures share its batch."""
    seed = zlib.crc32(f"{cfg.seed}:{draw_number}:{image_id}".encode())
    return torch.randn(cfg.queries, keypoints, 2, generator=torch.Generator().manual_seed(seed))


def to_prediction(entries: dict[str, np.ndarray], image_id: int | str, input_wh_px: tuple, wh_px: tuple,
                  kind: str) -> Prediction:
    """logits (E, 2), boxes (E, 4), keypoints (E, K, 2) of one image → people in its pixels, after the NMS."""
    scores = expit(entries["logits"][:, PERSON].astype(np.float64))
    keep = nms(entries["keypoints"], scores, input_wh_px, kind)
    boxes, keypoints = entries["boxes"][keep] * np.tile(wh_px, 2), entries["keypoints"][keep] * wh_px
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    return Prediction(image_id, keypoints, np.ones(keypoints.shape[:2], np.float32), scores[keep], corners)


@torch.no_grad()
def predict(model: DiffusionRegPose, batch: dict) -> list[Prediction]:
    """People of {images: list of (3, h, w) from `input_image`, image_ids, sizes_px}: a Prediction per image.

    All G people, or those that the NMS leaves, of the last DDIM step, with `ensemble` of all steps.
    The model has no score per keypoint: every keypoint gets 1. In float32 for any --amp.
    """
    cfg, pictures = model.cfg, batch["images"]
    noise = [start_noise(image_id, cfg, model.skeleton.num_keypoints) for image_id in batch["image_ids"]]
    images, padded = (x.to(model.sigmas.device) for x in pad_images(pictures))
    results = sample(model, images, padded, cfg.steps, torch.stack(noise))[0 if cfg.ensemble else -1:]
    predictions = []
    for i, (image_id, picture, size) in enumerate(zip(batch["image_ids"], pictures, batch["sizes_px"])):
        entries = {name: torch.cat([one[name][i] for one in results]).cpu().numpy() for name in Output._fields}
        predictions.append(to_prediction(entries, image_id, picture.shape[:0:-1], size, cfg.nms))
    return predictions


# ---- Keypoint completion (Sec. 3.2.4): joints that nobody labelled, guessed from the labelled ones -------

# L_head, the length that makes people comparable: between the joints of the first of these pairs that a skeleton
# has, the head, as in the paper, or the right side of COCO's trunk, as in the release. Else: the box's diagonal.
REFERENCE_JOINTS = (("head", "neck"), ("head_top", "head_bottom"), ("head_top", "neck"),
                    ("right_shoulder", "right_hip"))


def reference_joints(skeleton: Skeleton) -> tuple[int, int] | None:
    """The two joints whose distance is a person's reference length; None: the diagonal of the box is."""
    names = [words(name) for name in skeleton.keypoints]
    pairs = [(words(a), words(b)) for a, b in REFERENCE_JOINTS]
    return next(((names.index(a), names.index(b)) for a, b in pairs if a in names and b in names), None)


def reference_lengths(keypoints: np.ndarray, boxes: np.ndarray, joints: tuple[int, int] | None) -> np.ndarray:
    """L_head in px of keypoints (P, K, 3), boxes xyxy (P, 4); 0 where a reference joint has no label."""
    if joints is None:
        return np.linalg.norm(boxes[:, 2:] - boxes[:, :2], axis=1)
    a, b = keypoints[:, joints[0]], keypoints[:, joints[1]]
    return np.linalg.norm(a[:, :2] - b[:, :2], axis=1) * ((a[:, 2] > 0) & (b[:, 2] > 0))


class KeypointCompletion:
    """Fills a pose with the most likely places of its unlabelled joints, for y_0 alone: losses see labels.

    A person is 2K numbers Y: ((u − l_u) / L_head, (v − l_v) / L_head) of each joint, l: upper left of the box.
    All people, the columns of the paper's M, make one Gaussian over poses, with mean μ and covariance Σ.

        Y_MLE = argmax N(Y | μ, Σ)                    over the invisible Y_I, Y_V being known        (eq. 9)
              = argmin ‖Lᵀ (Y − μ)‖²                  Σ⁻¹ = L Lᵀ                                     (eq. 10)
              = argmin ‖A_I Y_I + A_V Y_V − Lᵀ μ‖²    Lᵀ = [A_I, A_V], columns of either             (eq. 11)
        Y'_I  = (A_Iᵀ A_I)⁻¹ A_Iᵀ (Lᵀ μ − A_V Y_V)    least squares                                  (eq. 12)

    This is the mean of the invisible given the visible: μ_I + Σ_IV Σ_VV⁻¹ (Y_V − μ_V).
    Takes    y (P, 2K) of P ≥ 2 people, the reference joints or None for the diagonal of the box
    Departs from the paper: as released only people with all joints labelled count, and y is not divided by
    the image's size. Any L with L Lᵀ = Σ⁻¹ will do: here Lᵀ is the inverse of Σ's Cholesky factor.
    """

    def __init__(self, y: np.ndarray, joints: tuple[int, int] | None):
        self.joints, self.mean, self.covariance = joints, y.mean(0), np.cov(y, rowvar=False)    # μ, Σ of eq. 9
        few = len(y) <= y.shape[1]                                     # then Σ has no inverse
        ridge = (1e-2 if few else 1e-12) * self.covariance.diagonal().mean() + 1e-12
        self.covariance += ridge * np.eye(y.shape[1])
        self.l_t = np.linalg.inv(np.linalg.cholesky(self.covariance))                       # Lᵀ (eq. 10)

    def __call__(self, keypoints: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Keypoints (P, K, 3) and boxes xyxy (P, 4) in pixels → (P, K, 3) with the missing joints at v = 1.

        Somebody without any joint, or without L_head, stays as annotated.
        """
        completed = keypoints.copy()
        lengths = reference_lengths(keypoints, boxes, self.joints)
        for person, corner, length in zip(completed, boxes[:, :2], lengths):
            visible = person[:, 2] > 0
            if visible.all() or not visible.any() or not length > 0:
                continue
            y_v = (person[visible, :2] - corner).flatten() / length
            a_i, a_v = self.l_t[:, ~visible.repeat(2)], self.l_t[:, visible.repeat(2)]      # eq. 11
            y_i = np.linalg.lstsq(a_i, self.l_t @ self.mean - a_v @ y_v, rcond=None)[0]     # eq. 12
            person[~visible, :2] = y_i.reshape(-1, 2) * length + corner
            person[~visible, 2] = 1
        return completed


def learn_completion(data: PoseDataset) -> KeypointCompletion | None:
    """The statistics of a training set's people with all joints; None, and a message, without two of them."""
    single, joints = ~data.iscrowd, reference_joints(data.skeleton)
    keypoints, boxes = data.keypoints[single].astype(np.float64), data.boxes[single]
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    length = reference_lengths(keypoints, boxes, joints)
    whole = (keypoints[..., 2] > 0).all(1) & (length > 0)
    y = (keypoints[whole, :, :2] - boxes[whole, None, :2]) / length[whole, None, None]
    if len(y) > 1:
        return KeypointCompletion(y.reshape(len(y), -1), joints)
    say("no keypoint completion: there are not two people with all their keypoints")


# ---- Data (Sec. 4.2): aspect ratio kept, short side 480 to 800, random crops, ImageNet normalisation -----


def input_image(image: Image.Image, cfg: Config) -> Tensor:
    """A picture of any size as the network sees it: see `short_side` and `long_side`."""
    size = transforms.short_side_size(image.size, cfg.short_side, cfg.long_side)
    return transforms.normalise(transforms.to_tensor(image.resize(size, Image.Resampling.BILINEAR)))


def augment(sample: Sample, flip: tuple[int, ...] | None, cfg: Config, rng: np.random.Generator) -> Sample:
    """Mirror and crop, each with probability ½, then resize. With `short_side` 800 the release's lengths:
    short sides 480, 512, ..., 800; before a crop 400, 500 or 600; sides of crops 384 to 600."""
    if flip is not None and rng.random() < 0.5:
        sample = transforms.hflip(sample, flip)
    if not cfg.multiscale:
        return transforms.resize_short_side(sample, cfg.short_side, cfg.long_side)
    full = cfg.short_side
    if rng.random() < 0.5:
        before = rng.choice([full // 2, full * 5 // 8, full * 3 // 4])
        sample = transforms.resize_short_side(sample, int(before))
        window = [int(rng.integers(full * 12 // 25, min(side, full * 3 // 4) + 1)) for side in sample.size]
        corner = [int(rng.integers(0, side - length + 1)) for side, length in zip(sample.size, window)]
        sample = transforms.crop(sample, *corner, *window)
    short_side = int(rng.choice(range(full * 3 // 5, full + 1, 32)))
    return transforms.resize_short_side(sample, short_side, cfg.long_side)


def to_people(sample: Sample) -> People:
    """A sample's people; of its 2K keypoints K are annotated, K to be noised. Unlabelled ones sit at 0."""
    size = torch.tensor(sample.size, dtype=torch.float32)
    labelled = torch.from_numpy(sample.keypoints[..., 2:] > 0)
    keypoints, poses = (torch.from_numpy(sample.keypoints[..., :2]) / size * labelled).chunk(2, 1)
    corners = torch.from_numpy(sample.boxes) / size.repeat(2)
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    visible, areas = labelled.chunk(2, 1)[0].squeeze(-1).float(), torch.from_numpy(sample.areas) / size.prod()
    return People(keypoints, visible, boxes, areas, poses, image_id=sample.image_id)


class TrainImages(torch.utils.data.Dataset):
    """One epoch of augmented images; item i is (image (3, h, w), People, its id, why files were skipped).

    What happens to image i depends on (seed, epoch, i) alone. An unreadable file gives way to the next.
    """

    def __init__(self, data: PoseDataset, cfg: Config, epoch: int, completion: KeypointCompletion | None):
        self.data, self.cfg, self.epoch, self.completion = data, cfg, epoch, completion
        joints, flip = data.skeleton.num_keypoints, data.skeleton.flip
        self.flip = None if flip is None else (*flip, *(joints + k for k in flip))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, People, int | str, list[str]]:
        rng = np.random.default_rng([self.cfg.seed, self.epoch, i])
        sample, skipped = self.data.load_readable(i)
        # the poses that will be noised travel through the geometry as K further keypoints
        poses = self.completion(sample.keypoints, sample.boxes) if self.completion else sample.keypoints
        sample = replace(sample, keypoints=np.concatenate([sample.keypoints, poses], 1))
        sample = transforms.filter_people(sample)
        if self.data.name == "crowdpose":           # it has no areas: the release's losses take the whole box
            sample = replace(sample, areas=(sample.boxes[:, 2:] - sample.boxes[:, :2]).prod(1))
        sample = augment(sample, self.flip, self.cfg, rng)
        image = transforms.normalise(transforms.to_tensor(sample.image))
        return image, to_people(sample), sample.image_id, skipped


def evaluate(model: DiffusionRegPose, data: PoseDataset, cfg: Config, ranks: Ranks) -> tuple[dict, list]:
    """Metrics and predictions of a dataset; the images are shared among the processes, all get the result."""
    found = predict_all(partial(predict, fuse(model)), data, partial(input_image, cfg=cfg), cfg.eval_batch,
                        cfg.workers, ranks, join=list)
    return metrics.evaluate(found, data, boxes=True), found


# ---- Training (Sec. 4.2) ---------------------------------------------------------------------------------


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


def train(cfg: Config, args) -> None:
    """Train, evaluate, keep all in the run folder. Runs alone or under torchrun; Ctrl-C saves and leaves."""
    ranks = init_ranks(args.device, cfg)
    if cfg.frozen_norm and not (cfg.init or args.saved):
        raise UserError("frozen norms need start weights: add --init resnet50, or take --no-frozen_norm")
    data, held_out = open_splits(cfg, ranks)
    seed_all(cfg.seed)                                              # equal start weights on every process
    model = DiffusionRegPose(cfg, data.skeleton)
    if cfg.init and not args.saved:
        with rank_zero_first(ranks):                                # it fetches start weights
            load_init(model, cfg.init)
    model.to(ranks.device, memory_format=torch.channels_last)
    average = Ema(model, cfg.ema, cfg.ema_warmup) if cfg.ema else None
    optimizer = build_optimizer(model, cfg)
    fp16 = cfg.amp == "fp16" and ranks.device.type == "cuda"        # else the scaler is idle
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
    parts = dict(model=model, optimizer=optimizer, scaler=scaler) | (dict(ema=average) if average else {})
    run = Run("diffusionregpose", cfg, args, ranks, data, held_out, parts)
    completion = learn_completion(data) if cfg.keypoint_completion and cfg.ksa_kca else None
    net, training = distribute(model, ranks), data.training()
    joints, evaluated = data.skeleton.num_keypoints, average.module if average else model
    shown = ["loss_ce", "loss_bbox", "loss_keypoints", "loss_oks"] + ["loss_heatmaps"] * bool(model.heatmaps)

    for epoch in run.epochs():
        net.train()
        # one micro-batch a turn, `accum` of them per optimiser step; a resumed run goes on in mid-epoch
        for (images, padded), people in run.batches(TrainImages(training, cfg, epoch, completion), pad_images):
            factor = lr_scale(run.step, run.steps, epoch, run.cfg)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            images = images.to(ranks.device, non_blocking=True, memory_format=torch.channels_last)
            padded = padded.to(ranks.device, non_blocking=True)
            people = [one.to(ranks.device) for one in people]
            run.show_batch(images, people, torch.stack([(~padded).any(d).sum(1) for d in (1, 2)], 1), True)

            noise = draw_pose_noise([len(one) for one in people], joints, cfg, ranks.device)
            y_t = noise_poses(pad_poses(people, noise, cfg.padding), noise.t, noise.eps, cfg.scale)
            with autocast(ranks.device, cfg.amp):
                result = net(images, padded, y_t, noise.t, people)
            score_weight = cfg.oks_score_weight if epoch >= cfg.oks_score_from else 0.0   # an aid, see Config
            losses = criterion(result, people, model.sigmas, score_weight, pieces=cfg.accum * ranks.world)
            losses["unused"] = result["unused"]
            if cfg.heatmap_weight:                                                        # an aid, too
                losses["loss_heatmaps"] = cfg.heatmap_weight * heatmap_loss(result, people)
            scaler.scale(sum(losses.values()) / cfg.accum).backward()
            if run.more_micro_batches(losses):             # notes the terms; True: gradients go on adding up
                continue

            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(model.parameters(), cfg.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if average:
                average.update(model)
            if run.stepped(norm, shown):                   # logs, saves when due; True: asked to stop
                return

        if run.evaluates():
            run.record(*evaluate(evaluated, held_out, cfg, ranks))
            if run.last and cfg.data == "puppets":                 # the paper's claim is about crowds (Table 2)
                table, _ = evaluate(evaluated, open_crowd(data.skeleton, ranks), cfg, ranks)
                run.record_split("crowd", "puppets in crowds (easy, medium, hard)", table)


# ---- Tables ----------------------------------------------------------------------------------------------

EQUATIONS = {           # equation, algorithm or section of the paper → where it stands here
    "eq. 1": cosine_schedule, "eq. 2": cosine_schedule, "eq. 3": noise_poses, "eq. 4": noise_poses,
    "eq. 5": PointAttention, "eq. 6": Decoder, "eq. 7": Decoder.mix_with_noise, "eq. 8": Decoder,
    **{f"eq. {n}": KeypointCompletion for n in (9, 10, 11, 12)},
    "Sec. 3.2.1, padding": pad_poses, "Sec. 3.2.2, losses": criterion, "Sec. 3.2.3, Algorithm 1": sample,
    "Sec. 3.2.4, the matrix M": learn_completion, "Sec. 4.2": train,
}

# A row is run by --train --preset PRESET, the table's flags and its own; the second ones are for puppets (tiny).
# versus: the row, from 1, that it is compared with; default: the paper's choice; more: AP by crowding, and box_AP,
# the paper's AP_b. Of other methods only ED-Pose is here. The paper names no start weights, t, DDIM steps, NMS: here
# ImageNet's (on puppets none), uniform, one, none. The learned share of K-CA, an aid, is off, for it mutes noise.
PAPER, PUPPETS = "--scale 5 --nms none", "--scale 5 --nms none --no-learned_share"
CROWDPOSE = dict(preset="r50-crowdpose", flags=f"{PAPER} --drop_epochs 65", puppets=PUPPETS, metric="AP",
                 split="crowd")
TABLES = {
    "1": Table("COCO val2017", preset="r50", flags=f"{PAPER} --drop_epochs 30", puppets=PUPPETS,
               metric="AP", rows=[
        Row("ED-Pose: no K-SA, K-CA, noise, t", 71.6, "--no-ksa_kca", "--no-ksa_kca", more=dict(box_AP=46.6)),
        Row("DiffusionRegPose", 72.5, versus=1, default=True, more=dict(box_AP=46.5))]),
    "2": Table("CrowdPose test; the denser the crowd (E, M, H), the larger the gain", **CROWDPOSE, rows=[
        Row("ED-Pose: no K-SA, K-CA, noise, t", 69.9, "--no-ksa_kca", "--no-ksa_kca",
            more=dict(AP_E=77.7, AP_M=70.6, AP_H=60.9, box_AP=60.2)),
        Row("DiffusionRegPose", 72.7, versus=1, default=True,
            more=dict(AP_E=79.3, AP_M=73.3, AP_H=64.9, box_AP=63.1))]),
    "3": Table("Signal scale ζ, CrowdPose", **CROWDPOSE, rows=[
        Row("ζ = 0.1", 72.3, "--scale 0.1", "--scale 0.1", versus=4, more=dict(box_AP=62.6)),
        Row("ζ = 1", 72.4, "--scale 1", "--scale 1", versus=4, more=dict(box_AP=62.6)),
        Row("ζ = 2", 72.4, "--scale 2", "--scale 2", versus=4, more=dict(box_AP=62.8)),
        Row("ζ = 5", 72.7, default=True, more=dict(box_AP=63.1)),
        Row("ζ = 10", 72.7, "--scale 10", "--scale 10", versus=4, more=dict(box_AP=63.1))]),
    "4": Table("Padding to N_i poses (--padding), CrowdPose", **CROWDPOSE, rows=[
        Row("repeat", 72.7, "--padding repeat", "--padding repeat", versus=2, more=dict(AP_H=64.9, box_AP=63.1)),
        Row("empty", 72.7, default=True, more=dict(AP_H=64.9, box_AP=63.1)),
        Row("noise", 72.6, "--padding noise", "--padding noise", versus=2, more=dict(AP_H=64.6, box_AP=63.0)),
        Row("mean", 72.5, "--padding mean", "--padding mean", versus=2, more=dict(AP_H=64.6, box_AP=62.8))]),
    "5": Table("Number of queries N_i, CrowdPose; on puppets 10, 20, 40", **CROWDPOSE, rows=[
        Row("ED-Pose, 100", 69.9, "--no-ksa_kca", "--no-ksa_kca --queries 20", more=dict(AP_H=60.9, box_AP=60.2)),
        Row("50", 71.4, "--queries 50", "--queries 10", versus=3, more=dict(AP_H=63.2, box_AP=62.5)),
        Row("100", 72.7, "", "--queries 20", versus=1, default=True, more=dict(AP_H=64.9, box_AP=63.1)),
        Row("200", 72.1, "--queries 200", "--queries 40", versus=3, more=dict(AP_H=63.5, box_AP=62.7))]),
    "fig3": Table("Keypoint completion; the paper shows curves, no figures", **CROWDPOSE, rows=[
        Row("unlabelled keypoints at zero", None, "--no-keypoint_completion", "--no-keypoint_completion"),
        Row("completed (eq. 9-12)", None, versus=1, default=True)]),
}

# Departures, but for the aids. what: paper | release | here | why ("weights": the released ones need it;
# "recipe": training alone, as the release does)
#
# Sec. 3.1, T and ᾱ: – | 1000, a cosine | release | weights
# eq. 4, ζ: 5 | 6 | release, or --scale | weights; Table 3 has 5 and 10 equal
# eq. 4, signal: ζ y_0 | ζ (2 y_0 − 1), y_t clamped and mapped to the image | release | weights
# Sec. 3.2.1, t in training: – | drawn, then overwritten with 0 | uniform, or --as_released | inference starts
#     at t = 999, which t = 0 never shows
# Sec. 3.2.1, padding: empty poses, signal 0 | Gaussian poses | empty, signal −ζ; --padding, --as_released | eq. 4's departure
# Table 4, mean pose: whose, and how wide, is not said | – | the batch's, the image 6 deviations wide | –
# eq. 5, eq. 7, MLPs: yes | one linear layer each, logits times √n | release | weights
# coarse keypoints' head: – | its own; 14 keypoints: the first pose head | the preset's coarse_head | weights
# eq. 7: Q_CK to tokens, boxes as well | Q_CK + coarse keypoints to these, boxes stay | release | weights
# t in the network: nowhere | changes the encoder's positions, one vector as scale, shift | release | weights
# Algorithm 1, lines 3-5: once per image | at each step, because of t | release | weights
# Algorithm 1, steps: how many is not said | 1; of several it throws the last away | 1, or --steps; the last
#     is the answer, --ensemble joins all | the steps before it are there for the last
# Sec. 3.2.2, losses: focal, L1 of boxes, L1 of keypoints | also GIoU, OKS, denoising queries; for all layers
#     and the selected cells; Hungarian matching | release | recipe
# OKS in the losses: – | of fractions: of a stretched picture, where it is not square | release | recipe
# denoising queries without people: – | learn random boxes | learn no boxes | nothing is there
# Sec. 3.2.4: y divided by image size and L_head | by L_head | release | recipe
# Sec. 3.2.4, L_head: head | COCO has none: right shoulder to right hip | release; else the box | recipe
# Sec. 3.2.4, μ, Σ: visible keypoints of all people | people with all joints labelled | release | recipe
# Sec. 3.2.4, in training: yes | off, because it crashes | paper, or --as_released | –
# Sec. 3.2.4, numbers: – | whole pixels; not if a reference joint has x or y = 0; pseudo-inverse of Σ | fractions;
#     not if it has no label; a ridge on Σ, of 1 % for few people | accuracy
# y_0 after mirroring: – | unlabelled joints at x = w − 1 | at (0, 0), also with --as_released | nobody is there
# y_0 after crops: – | people outside stay (CrowdPose) | they leave | a fault
# results: – | the best G of 2·G class scores; 0.731 per keypoint | all G by class 1; 1 | class 0 is never trained
# selected cells: – | padding competes for the Q queries | chosen last | boxes depended on the batch
# NMS: – | by poses; keeps the first too often, gives kept poses the scores of others | by poses, all keep
#     their own score, x and y mixed up in `official`, see nms; --nms none | the release's thresholds fit it
# Sec. 4.2, ×0.1: epoch 30 on COCO, 65 on CrowdPose | 31 and 61 on both | release, or --drop_epochs | recipe
# Sec. 4.2, start weights: – | ED-Pose | ImageNet's ResNet-50; --init takes ED-Pose | a common start
# micro-batches: – | none | averaged, each divided by its own people: --accum 2 is not exactly the gradient of
#     the batch | how many people the others have, after crops, is not known before they are loaded

# ---- Appendix: borrowed parts, fast forms, released names, pictures. Not needed on a first reading. ------


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Logit of x clamped to [0, 1], finite at both ends: |logit| ≤ ln(1/eps)."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def sine_embedding(x: Tensor, dim: int, temperature: float) -> Tensor:
    """Each coordinate of x (..., n) in full turns → sin, cos, sin, … of 2π·x / temperature^(2j/dim), (..., n·dim)."""
    i = torch.arange(0, dim, 2, device=x.device)
    angle = 2 * math.pi * x.unsqueeze(-1) / temperature ** (i / dim)                    # (..., n, dim/2)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-3)


class MLP(nn.Module):
    """Linear layers with ReLU between them; `widths` from input to output. x (B, N, ..., C)."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        if not (plain() or x.is_cuda or torch.is_grad_enabled()) and x.shape[1] > 1024:
            return torch.cat([self(part) for part in x.split(1024, 1)], 1)     # whose values fit a CPU's cache
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=True)
        return self.layers[-1](x)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, num_boxes: int) -> Tensor:
    """The fast form of attention under `attention_mask` without denoising queries; (B, M, tokens, d)."""
    if q.shape[2] == num_boxes:                                                          # boxes alone
        return F.scaled_dot_product_attention(q, k, v)
    (q_box, k_box, v_box), (q_key, k_key, v_key) = zip(*(
        (x[:, :, :num_boxes], x[:, :, num_boxes:].unflatten(2, (num_boxes, -1))) for x in (q, k, v)))
    own_k, own_v = (torch.cat([box.unsqueeze(3), key], 3) for box, key in ((k_box, k_key), (v_box, v_key)))
    keypoints = F.scaled_dot_product_attention(q_key, own_k, own_v).flatten(2, 3)       # (B, M, G·K, d)

    logits = torch.cat([q_box @ k_box.mT, (k_key @ q_box.unsqueeze(-1)).squeeze(-1)], -1)
    weight = (logits / q.shape[-1] ** 0.5).softmax(-1)                                  # (B, M, G, G + K)
    boxes = weight[..., :num_boxes] @ v_box + (weight[..., None, num_boxes:] @ v_key).squeeze(3)
    return torch.cat([boxes, keypoints], 2)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU = ∩ / ∪ − (hull − ∪) / hull of boxes cxcywh (..., 4); leading dimensions broadcast. In [−1, 1]."""
    (centre_a, half_a), (centre_b, half_b) = ((box[..., :2], box[..., 2:] / 2) for box in (a, b))
    low_a, high_a, low_b, high_b = centre_a - half_a, centre_a + half_a, centre_b - half_b, centre_b + half_b
    common = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0)
    around = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).clamp(min=0)
    inter, hull = common[..., 0] * common[..., 1], around[..., 0] * around[..., 1]
    union = a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - inter
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


class Grid(NamedTuple):
    """Where the N cells of all levels are, level after level in raster order."""
    shapes: list[tuple[int, int]]      # H, W of each level
    padded: Tensor                     # (B, N) True outside of the image
    valid: Tensor                      # (B, L, 2) fraction of a level's width and height that is image
    centres: Tensor                    # (B, N, 2) xy of the cells in the image without padding


def make_grid(masks: list[Tensor]) -> Grid:
    """From the padding masks (B, H, W) of the levels."""
    valid, centres = [], []
    for mask in masks:
        inside = torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], -1)       # (B, 2) columns, rows
        side = inside.new_tensor([mask.shape[2], mask.shape[1]])
        rows, columns = (torch.arange(n, device=mask.device) + 0.5 for n in mask.shape[1:])
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        valid.append(inside / side)
        centres.append(torch.stack([x, y], -1).flatten(0, 1) / inside[:, None])
    return Grid([tuple(mask.shape[1:]) for mask in masks], torch.cat([mask.flatten(1) for mask in masks], 1),
                torch.stack(valid, 1), torch.cat(centres, 1))


def cell_positions(masks: list[Tensor], dim: int) -> Tensor:
    """Sine embedding of all cells (B, N, C), y first. Rows and columns count without padding and end in 1."""
    embedded = []
    for mask in masks:
        y, x = ((~mask).cumsum(axis, dtype=torch.float32) for axis in (1, 2))
        yx = torch.stack([y / (y[:, -1:] + 1e-6), x / (x[:, :, -1:] + 1e-6)], -1)
        embedded.append(sine_embedding(yx, dim // 2, temperature=20).flatten(1, 2))
    return torch.cat(embedded, 1)


class DeformableAttention(nn.Module):
    """Each query reads P points per level around its reference (Deformable DETR eq. 2 and 3).

        out = W' Σ_p w_p · W memory(xy + offset_p / (W, H))         for references xy
        out = W' Σ_p w_p · W memory(xy + offset_p · wh / 2P)        for boxes xy, wh

    w = softmax over the L·P points of a head. Takes x (B, Q, C), reference (B, Q, L, 2 or 4) in fractions of
    the padded image, memory (B, N, C); returns (B, Q, C).
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Point i of head m starts i+1 cells along the m-th of M rays; all weights start equal."""
        for parameter in (self.sampling_offsets.weight, *self.attention_weights.parameters(),
                          self.value_proj.bias, self.output_proj.bias):
            nn.init.zeros_(parameter)
        angle = torch.arange(self.heads) * 2 * math.pi / self.heads
        ray = F.normalize(torch.stack([angle.cos(), angle.sin()], -1), p=math.inf, dim=-1)
        steps = torch.arange(1, self.points + 1)
        bias = ray[:, None, None] * steps[:, None]                                      # (M, 1, P, 2)
        self.sampling_offsets.bias.data.copy_(bias.expand(-1, self.levels, -1, -1).flatten())

    def forward(self, x: Tensor, reference: Tensor, memory: Tensor, grid: Grid) -> Tensor:
        value = self.value_proj(memory).masked_fill(grid.padded[..., None], 0).unflatten(-1, (self.heads, -1))
        offsets = self.sampling_offsets(x).unflatten(-1, (self.heads, -1, 2))           # (B, Q, M, L·P, 2)
        logits = self.attention_weights(x).unflatten(-1, (self.heads, -1))
        points = [self.points] * self.levels
        return self.output_proj(deform_attn_offsets(value, grid.shapes, reference, offsets, logits, points))


class EncoderLayer(nn.Module):
    """Deformable DETR's: cells read cells of all levels, then a feed-forward block; x, position (B, N, C)."""

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
    """s (B, C) of t (B,), a vector that changes the position of every cell:  position ← position · (s + 1) + s.
    The release's, not the paper's. One vector is scale and shift, where its code shows that two were meant.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim), nn.SiLU(),
                                 nn.Linear(4 * dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        angle = t[:, None] * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))


def box_proposals(grid: Grid) -> tuple[Tensor, Tensor]:
    """A square around each cell, as logits (B, N, 4), and which cells can be used (B, N).

    The side is 0.05 of the image on level 0 and doubles from level to level. Not used, with infinite logits,
    are cells in the padding and boxes of which a number is outside of (0.01, 0.99).
    """
    sides = torch.cat([torch.full((h * w, 2), 0.05 * 2 ** l) for l, (h, w) in enumerate(grid.shapes)])
    boxes = torch.cat([grid.centres, sides.to(grid.centres).expand_as(grid.centres)], -1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~grid.padded
    return (boxes / (1 - boxes)).log().masked_fill(~usable.unsqueeze(-1), math.inf), usable


class QuerySelection(nn.Module):
    """Scores every cell of the memory and turns the Q best into boxes (DINO's, as in ED-Pose).

    Takes    memory (B, N, C)
    Returns  content (B, Q, C) without gradient; an Output of logits (B, Q, 2), boxes (B, Q, 4), best first
    Border cells are blanked but still compete, all with the features norm(project.bias), as in the release.
    """

    def __init__(self, dim: int, queries: int):
        super().__init__()
        self.queries = queries
        self.project, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.score, self.box = nn.Linear(dim, 2), MLP(dim, dim, dim, 4)

    def forward(self, memory: Tensor, grid: Grid) -> tuple[Tensor, Output]:
        proposals, usable = box_proposals(grid)
        cells = self.norm(self.project(memory.masked_fill(~usable.unsqueeze(-1), 0)))
        logits = self.score(cells)                                                      # (B, N, 2)
        best = logits.max(-1).values.masked_fill(grid.padded, -math.inf)    # Departs from the release: padding last
        index = best.topk(min(self.queries, best.shape[1]), dim=1).indices[..., None]   # (B, Q, 1)
        content, start, logits = (x.gather(1, index.expand(-1, -1, x.shape[2])) for x in (cells, proposals, logits))
        boxes = (self.box(content).float() + start).sigmoid()
        return content.detach(), Output(logits, boxes, None)


LABELS = 100               # labels of denoising queries in the release; its embedding has one row more


class Noise(NamedTuple):
    """All random numbers of a batch of denoising queries (DN-DETR)."""
    person: Tensor         # (B, D) whose box: repeated(P, D)
    labels: Tensor         # (B, D) PERSON, or at random another
    shift: Tensor          # (B, D, 4) uniform in (−1, 1)


class Denoising(NamedTuple):
    content: Tensor        # (B, D, C) tokens of the noisy queries
    reference: Tensor      # (B, D, 4) their boxes
    group: Tensor          # (B, D) which copy of the image's people it belongs to
    boxes: Tensor          # (B, D, 4) the ground-truth boxes
    known: Tensor          # (B, D) True where there is one: images without people have none


def draw_noise(counts: list[int], cfg: Config, device: torch.device) -> Noise:
    """counts: people of each image."""
    shape = (len(counts), cfg.dn_queries)
    person = [repeated(n, shape[1]) if n else torch.zeros(shape[1], dtype=torch.long) for n in counts]
    relabel = torch.rand(shape, device=device) < cfg.label_noise
    labels = torch.where(relabel, torch.randint(0, LABELS, shape, device=device), PERSON)
    return Noise(torch.stack(person).to(device), labels, 2 * torch.rand(*shape, 4, device=device) - 1)


def denoising_queries(people: list[People], label: nn.Embedding, cfg: Config,
                      noise: Noise | None = None) -> Denoising:
    """D disturbed ground-truth boxes per image, queries with a known answer; label: embeds their tokens."""
    device, counts = label.weight.device, [len(one) for one in people]
    noise = noise or draw_noise(counts, cfg, device)
    boxes = torch.stack([one.boxes[person] if len(one) else torch.full_like(shift, 0.5)
                         for one, person, shift in zip(people, noise.person, noise.shift)])
    half = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], -1)
    noisy = (boxes + noise.shift * half * cfg.box_noise).clamp(0, 1)
    count = torch.tensor(counts, device=device)[:, None].expand(-1, cfg.dn_queries)         # (B, D)
    group = torch.arange(cfg.dn_queries, device=device) // count.clamp(min=1) * (count > 0)
    return Denoising(label(noise.labels), inverse_sigmoid(noisy).sigmoid(), group, boxes, count > 0)


def oks_score_loss(logits: Tensor, pairs: Pairs, quality: Tensor) -> Tensor:
    """An aid, DETRPose's eq. 5, summed: −q (q log p + (1 − q) log(1 − p)) where matched, else −α p² log(1 − p).
    logits (B, Q, 2); quality q (pairs,), the OKS of a matched pose; α = 0.25
    """
    image, query, _ = pairs
    matched, target = torch.zeros_like(logits), torch.zeros_like(logits)
    matched[image, query, PERSON] = 1
    target[image, query, PERSON] = quality.detach()
    weight = torch.where(matched > 0, target, 0.25 * logits.detach().sigmoid() ** 2)
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")


def heatmap_loss(result: dict, people: list[People]) -> Tensor:
    """An aid: heatmaps of all people, on the finest map and its padding; cells that are partly image are image."""
    inside = [replace(one, keypoints=one.keypoints * part) for one, part in zip(people, result["valid"])]
    return people_heatmap_loss(result["heatmaps"], inside)


def build(preset: str, skeleton: str | Skeleton = "coco", **overrides) -> DiffusionRegPose:
    """A model with start weights; overrides are Config fields."""
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(PRESETS)}")
    return DiffusionRegPose(resolve(PRESETS[preset], **overrides), get_skeleton(skeleton))


def reset_parameters(model: DiffusionRegPose) -> None:
    """Start values of the release: Xavier in the transformer, sampling points on rays, outputs at zero."""
    decoder, cfg = model.decoder, model.cfg
    transformer = [model.input_proj, model.encoder, decoder.layers, decoder.position_head, decoder.ksa,
                   decoder.kca, decoder.keypoint_content, decoder.keypoint_size, model.selection.project]
    for parameter in [p for part in transformer if part for p in part.parameters() if p.dim() > 1]:
        nn.init.xavier_uniform_(parameter)
    for project in model.input_proj:
        nn.init.zeros_(project[0].bias)
    for module in model.modules():
        if isinstance(module, DeformableAttention):
            module.reset_parameters()
    for head in [model.selection.score, *decoder.score_heads]:
        nn.init.constant_(head.bias, -math.log(99))                        # a prior of 0.01
    if cfg.near_identity:
        start_near_identity(decoder)
    outputs = [model.selection.box, *decoder.box_heads, *decoder.pose_heads, decoder.coarse_head]
    for parameter in [p for head in outputs if head for p in head.layers[-1].parameters()]:
        nn.init.zeros_(parameter)
    for part in (model.backbone.stem, model.backbone.res2) if cfg.freeze else ():
        part.requires_grad_(False)


@torch.no_grad()
def start_near_identity(decoder: Decoder) -> None:
    """An aid. Keypoints' embeddings start as large as the content of the person that they are added to (Xavier's
    a tenth), K-SA at 0, K-CA about as the identity (the release's moves all to about one point): of points with
    variance s² per axis a softmax over q·p has the mean  mean(p) + s²·q  (exactly if they are Gaussian), so that
    √n Q(z)·K(p) = (z − ½)·p / s² and V = 1 give about z, where keypoints are spread over the whole image."""
    nn.init.normal_(decoder.keypoint_content.weight)
    if decoder.kca:
        query, key, value = decoder.kca.query, decoder.kca.key, decoder.kca.value
        for parameter in (*query.parameters(), *key.parameters()):
            parameter.mul_(0.1)                                # not 0: the other channels could not learn
        one = torch.eye(2) * (16 / (decoder.people * decoder.keypoints) ** 0.5) ** 0.5      # s² = 1/16
        for layer, half in ((query, 0.5), (key, 0.0)):
            layer.weight[:2], layer.bias[:2] = one, -half * one.diagonal()
        nn.init.eye_(value.weight)
        for parameter in (value.bias, *decoder.ksa.value.parameters()):
            nn.init.zeros_(parameter)


RENAME = [            # released name → ours, first match wins; what matches nothing keeps its name
    *((rf"^backbone\.0\.body\.layer{i}\.(.*){theirs}\.", rf"backbone.res{i + 1}.\1{ours}.") for i in range(1, 5)
      for theirs, ours in {r"downsample\.0": "shortcut.conv", r"downsample\.1": "shortcut.norm",
                           r"conv(\d)": r"conv\2.conv", r"bn(\d)": r"conv\2.norm"}.items()),
    *((rf"^(?:transformer\.)?{theirs}\.", rf"{ours}.") for theirs, ours in {
        r"backbone\.0\.body\.conv1": "backbone.stem.conv", r"backbone\.0\.body\.bn1": "backbone.stem.norm",
        r"encoder\.layers\.(\d+)\.linear1": r"encoder.\1.ffn.layers.0",
        r"encoder\.layers\.(\d+)\.linear2": r"encoder.\1.ffn.layers.1", r"encoder\.layers": "encoder",
        r"decoder\.layers\.(\d+)\.linear1": r"decoder.layers.\1.ffn.layers.0",
        r"decoder\.layers\.(\d+)\.linear2": r"decoder.layers.\1.ffn.layers.1",
        r"time_mlp\.1": "time_embedding.mlp.0", r"time_mlp\.3": "time_embedding.mlp.2",
        r"block_time_mlp\.1": "time_embedding.mlp.4", "enc_output": "selection.project",
        "enc_output_norm": "selection.norm", "enc_out_class_embed": "selection.score",
        "enc_out_bbox_embed": "selection.box", r"decoder\.keypoint_embed": "decoder.keypoint_content",
        r"decoder\.hw": "decoder.keypoint_size", r"decoder\.ref_point_head": "decoder.position_head",
        r"decoder\.emb_SQ": "decoder.ksa.query", r"decoder\.emb_Q": "decoder.kca.query",
        r"decoder\.emb_SK": "decoder.ksa.key", r"decoder\.emb_K": "decoder.kca.key",
        r"decoder\.emb_SV": "decoder.ksa.value", r"decoder\.emb_V": "decoder.kca.value",
        "class_embed": "decoder.score_heads", "bbox_embed": "decoder.box_heads", "label_enc": "noisy_label",
        r"pose_embed\.4": "decoder.coarse_head", "pose_embed": "decoder.pose_heads",
        r"pose_hw_embed\.0": "decoder.size_head"}.items()),
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
    """(preset, keypoints) of a released DiffusionRegPose or ED-Pose checkpoint, by its tensors; else None."""
    if not {"transformer.decoder.keypoint_embed.weight", "backbone.0.body.conv1.weight"} <= state.keys():
        return None
    keypoints = len(state["transformer.decoder.keypoint_embed.weight"])
    if "transformer.decoder.emb_SQ.weight" not in state:
        return "r50-edpose", keypoints
    return "r50-crowdpose" if keypoints == 14 else "r50", keypoints


KEYPOINT_ROWS = {r"^decoder\.keypoint_(content|size)\.": 0, r"^heatmaps\.head\.": 0}         # see carry_rows


def load_init(model: DiffusionRegPose, source: str) -> None:
    """Start weights by file or name: DiffusionRegPose (all, of any keypoints), ED-Pose (all but 18 tensors), a
    ResNet-50. A K-CA that was trained without `learned_share` moves keypoints all the way: its share is 1."""
    start, own = weights.read_start(source, "diffusionregpose"), model.state_dict()
    state = start.state
    if "layer1.0.conv1.weight" in state:
        state = {f"backbone.0.body.{name}": x for name, x in state.items() if not name.startswith("fc.")}
    state = state if start.run else convert_official(state, model.cfg)
    # of coarse_head: models of 14 keypoints have none, see Decoder
    optional = {r"num_batches_tracked$|^heatmaps\.|^decoder\.coarse_head\.": "not in every model"}
    if all(name.startswith("backbone.") for name in state):
        optional[r"^(?!backbone\.)"] = "not in a ResNet"
    state |= {name: state[shared] for name in own if name not in state and
              (shared := name.replace("coarse_head", "pose_heads.0")) in state}
    if not any(re.match(NEW, name) for name in state):
        optional[NEW] = "not in ED-Pose"
    if "decoder.kca_share" in own.keys() - state.keys():
        state["decoder.kca_share"] = torch.tensor(float("decoder.kca.value.weight" in state))
    weights.load_start(model, start, state, KEYPOINT_ROWS, optional)


def nms(keypoints: np.ndarray, scores: np.ndarray, size_px: tuple[int, int], kind: str) -> np.ndarray:
    """Indices of the poses to keep, best first. keypoints (E, K, 2), fractions of an image of size_px (w, h).

    Pose j is a neighbour of pose i when more than 10 joints lie closer than 4 % of the diagonal of pose i. Of
    a pose and its neighbours the best stays; poses of a score up to 0.05 never do. kind: "plain" takes joints
    for what they are; "official" takes the K first of the 2K numbers x1, y1, x2, ... for x and the others for
    y, as the release does and tuned its thresholds with; "none" keeps everybody.
    """
    best_first = np.argsort(-scores, kind="stable")
    if kind == "none":
        return best_first
    count, joints = keypoints.shape[:2]
    official = np.moveaxis(keypoints.reshape(count, 2, joints), 1, 2)
    points = (official if kind == "official" else keypoints) * size_px
    limit = 0.04 * np.linalg.norm(np.ptp(points, 1), axis=-1)
    near = np.linalg.norm(points[:, None] - points, axis=-1) < limit[:, None, None]          # (E, E, K)
    needed = max(min(10, 3 * joints // 4), 10 * joints // 17)          # 10 of COCO's 17 and of CrowdPose's 14
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
    """Pictures (3, h, w) → (B, 3, H, W), zeros at the right and bottom, and padded (B, H, W), True there."""
    height, width = (max(p.shape[side] for p in pictures) for side in (1, 2))
    margins = [(0, width - p.shape[2], 0, height - p.shape[1]) for p in pictures]
    padded = [F.pad(torch.zeros_like(p[0]), m, value=1) > 0 for p, m in zip(pictures, margins)]
    return torch.stack([F.pad(p, m) for p, m in zip(pictures, margins)]), torch.stack(padded)


@torch.no_grad()
def fuse(model: DiffusionRegPose) -> DiffusionRegPose:
    """A copy for inference: the backbone's norms folded into its convolutions, the heatmaps' head dropped."""
    model = copy.deepcopy(model).eval()
    model.heatmaps = None
    for module in [m for m in model.modules() if isinstance(m, ConvNorm)]:
        module.fold()
    return model.to(memory_format=torch.channels_last)


def to_batch(pictures: list[Image.Image], image_ids: list, cfg: Config) -> dict:
    """RGB pictures of any size → what `predict` takes."""
    return dict(images=[input_image(picture, cfg) for picture in pictures], image_ids=image_ids,
                sizes_px=[picture.size for picture in pictures])


def exported(model: DiffusionRegPose) -> Exported:
    """For eval.py --export: one DDIM step."""
    cfg = model.cfg

    def run(images: Tensor, padded: Tensor, noise: Tensor) -> dict[str, Tensor]:
        t = torch.full(noise.shape[:1], STEPS - 1, device=noise.device)
        return model(images, padded, to_poses(noise, cfg.scale), t)

    def inputs(batch: dict) -> dict[str, Tensor]:
        noise = [start_noise(image_id, cfg, model.skeleton.num_keypoints) for image_id in batch["image_ids"]]
        return dict(zip(("images", "padded", "noise"), (*pad_images(batch["images"]), torch.stack(noise))))

    return Exported(
        run, inputs, RESIZED.format(cfg.short_side, cfg.long_side) + "padded: True there. noise: standard normal",
        "score of a person = sigmoid(logits[..., 1]); keypoints (x, y) and boxes (centre, w, h) times the picture's "
        "w and h; of similar poses keep the best (NMS)")


@torch.no_grad()
def show_process(model: DiffusionRegPose, image: Image.Image, threshold: float) -> dict[str, list]:
    """For eval.py --process: `process`, noise that becomes poses in ten DDIM steps, and `uncertainty`, how far
    the poses from 16 draws of noise lie apart: ellipses of two deviations. Of people above the threshold, if any."""
    cfg, skeleton, device = model.cfg, model.skeleton, model.sigmas.device
    if not cfg.ksa_kca:
        raise UserError("--process shows noise that becomes poses, and without K-SA there is none")
    picture, size = input_image(image, cfg), np.array(image.size)
    images, t = picture[None].to(device), torch.tensor([STEPS - 1], device=device)
    noise = torch.stack([start_noise("", cfg, skeleton.num_keypoints, number) for number in range(16)])
    chain = [{name: result[name][0].cpu().numpy() for name in ("logits", "keypoints", "noisy")}
             for result in sample(model, images, None, 10, noise[:1])]
    scores = expit(chain[-1]["logits"][:, PERSON].astype(np.float64))
    rows = nms(chain[-1]["keypoints"], scores, picture.shape[:0:-1], cfg.nms)
    rows = rows[scores[rows] >= threshold]
    if not len(rows):
        return {}
    frames = [draw.draw_people(image, step["noisy"][rows] * size, None, skeleton) for step in chain]
    people, draws = chain[-1]["keypoints"][rows], []
    frames.append(draw.draw_people(image, people * size, None, skeleton, person_scores=scores[rows]))
    said = [f"into DDIM step {n} of 10" for n in range(1, 11)] + ["the poses found"]
    encoded = model.encode_image(images)
    for noisy in to_poses(noise, cfg.scale).to(device).split(1):
        poses = model.decode(encoded, noisy, t)["keypoints"][0].cpu().numpy()
        distances = np.linalg.norm(people[:, None] - poses, axis=-1).mean(-1)                # (P, G)
        draws.append(poses[distances.argmin(1)] * size)
    ellipses = draw.captioned(draw.draw_ellipses(image, np.stack(draws), skeleton), "two deviations of 16 draws")
    return dict(process=list(map(draw.captioned, frames, said)), uncertainty=[ellipses])


def summary() -> str:
    """Of each preset: parameters, and GFLOPs of one DDIM step on one image: convolutions and matrix products, 2 per
    multiply-add (the counter misses a CPU's fused attention). The release needs 213 for r50, with masked scores."""
    rows = [f"{'preset':14}{'input':>9}{'parameters':>13}{'learned':>11}{'GFLOPs':>9}"]
    for preset in PRESETS:
        model = build(preset, "crowdpose" if preset.endswith("crowdpose") else "coco").eval()
        height = min(model.cfg.short_side, 480)
        width = min(height * 4 // 3, model.cfg.long_side)
        noise = torch.zeros(1, model.cfg.queries, model.skeleton.num_keypoints, 2)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, height, width), None, noise, torch.tensor([999]))
        every, learned = sum(p.numel() for p in model.parameters()), weights.count_parameters(model)
        rows.append(f"{preset:14}{f'{width}x{height}':>9}{every / 1e6:>11.2f} M{learned / 1e6:>9.2f} M"
                    f"{counter.get_total_flops() / 1e9:>9.1f}")
    return "\n".join(rows)


def main() -> None:
    run_method(Config, PRESETS, __doc__, train, summary, partial(run_tables, TABLES))


if __name__ == "__main__":
    main()
