"""DETRPose: real-time multi-person pose estimation with a transformer (arXiv 2506.13027, 2025).

Idea     One query per person. A query is K+1 tokens: one for the person, one for each keypoint. A decoder
         refines distributions over offsets from a first pose, layer by layer, and judges its own result by
         the encoder's features under the predicted keypoints. No boxes, no NMS.
Flow     image (B,3,H,W) → HGNetv2 → maps of stride 8, 16, 32 → HybridEncoder → memory (B,N,C)
         → QuerySelection: the Q best cells → poses (B,Q,K,2) → Decoder, D layers → poses, scores (B,Q,2)
Read     noisy_pose (Sec. 3.1, eq. 1-4) → QuerySelection (Sec. 3.2) → DecoderLayer, Decoder (Sec. 3.3)
         → PoseLQE (Sec. 3.3.1) → DETRPose.forward → ksvf_loss (Sec. 3.4, eq. 5) → criterion → train
Letters  B images  Q person queries  K keypoints  T = K+1 tokens of a person, the instance token first
         N memory cells  C channels  M heads  L levels  P sampling points per level  D decoder layers
         G denoising groups  R = 2G × the people of the batch: rows of noisy poses
         κ = 2σ fall-off of a keypoint (OKS)  s² area of the person  KS similarity of one keypoint
         2 labels per query: 1 is a person; 0 is never anything, kept because the released heads have it
Units    xy in [0,1] of the network's input image, x first; names ending in _px are pixels; boxes cxcywh
Tables   at the end of the main text: equation → function, the rows of the paper's Table 4, departures from
         paper and release

    python detrpose.py                                  what each preset is: parameters, GFLOPs
    python detrpose.py --train                          learn puppets, synthetic people drawn on first use
    python detrpose.py --train --data data/coco --preset l --init dfine-l-obj365
    python eval.py detrpose-l --images photo.jpg        the authors' weights on your photo
"""
from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import common                               # first: Ctrl-C while torch loads then ends without a traceback
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from common import draw, metrics, transforms, weights
from common.cli import RunConfig, check_choice, check_range, resolve, run_method
from common.datasets import PoseDataset
from common.errors import UserError
from common.export import Exported
from common.heatmaps import CellHeatmaps, people_heatmap_loss
from common.nets.resnet import FrozenBatchNorm
from common.oks import similarity_of
from common.predict import predict_all, watch
from common.ranks import Ranks, autocast, distribute, init_ranks, mean_over_ranks, rank_zero_first, say, seed_all
from common.records import People, Prediction, Sample, gather_people
from common.run import Ema, Run
from common.skeletons import Skeleton, get_skeleton
from common.splits import open_splits
from common.tables import Row, Table, run_tables
from kernels.deform_attn import deform_attn

# ---- Configuration: every number of the paper. Each field is a flag, its comment the flag's help. --------


@dataclass(frozen=True)
class Config(RunConfig):       # which adds data, accum (micro-batches), amp, processes, workers, eval_*, seed
    # model (Sec. 3; numbers without a source are the release's)
    backbone: str = "B4"           # HGNetv2 size (Table 1): B0, B2, B4, B5
    lab: bool = False              # learnable affine block after each activation of the backbone
    levels: int = 3                # L, feature maps used: the backbone's coarsest ones
    dim: int = 256                 # C, channels of encoder and decoder (Table 1)
    heads: int = 8                 # M, attention heads; divides dim
    encoder_ffn: int = 1024        # hidden width of the encoder's transformer layer
    expansion: float = 1.0         # width of the encoder's fusion blocks, relative to dim
    depth: int = 3                 # re-parameterised convolutions per fusion block
    layers: int = 6                # D, decoder layers (Table 1)
    decoder_ffn: int = 1024        # hidden width of a decoder layer
    points: int = 4                # P, sampling points per head and level
    reg_scale: float = 4.0         # 1/c of D-FINE's offset distribution; larger means finer steps
    queries: int = 60              # Q, people at most (Sec. 4.3; Table 4: its first row has 100)
    size: int = 640                # side of the square network input, pixels (Sec. 4.1)
    # the paper's ablations (Table 4); all are on in its model
    pose_denoising: bool = True    # noisy copies of the true poses as extra queries (Sec. 3.1; row 3 adds)
    fdr: bool = True               # distribution heads, pre-pose, gate (Sec. 3.3; row 4 adds); off: GroupPose's
    ksvf: bool = True              # keypoint similarity varifocal loss (eq. 5; row 5 adds); off: focal loss
    pose_lqe: bool = True          # scores look at the features under the pose (Sec. 3.3.1; row 6 adds)
    init: str = "dfine-l-obj365"   # start weights: run, file or name, DETRPose, D-FINE (row 7 adds it) or HGNetv2
    # pose denoising (release)
    dn_queries: int = 20           # G is this over the people of the fullest image of a batch, at least 1
    as_released: bool = False      # the released code's noise: its direction, its point of the person
    # prediction, ours
    keypoint_scores: bool = False  # estimate one per keypoint, by a second pass; off: each has 1 (App. B)
    # optimisation (Sec. 4.1: AdamW, lr, batch; the rest is the release's, also the epochs: see Departures)
    epochs: int = 52               # passes over the training images
    batch: int = 16                # images per optimiser step, over all GPUs and micro-batches
    lr: float = 1e-4               # learning rate
    lr_backbone: float = 1e-5      # learning rate of the backbone
    weight_decay: float = 1e-4     # AdamW, on every parameter
    drop_epoch: int = 0            # learning rate ×0.1 from this epoch on; 0: never
    clip: float = 0.1              # largest L2 norm of the gradient
    ema: float = 0.9999            # decay of the weight average that is evaluated
    ema_warmup: int = 2000         # optimiser steps over which the decay grows to that
    # augmentation (Sec. 4.1: flip, colour, mosaic, multi-scale; zoom-out and all numbers are the release's)
    multiscale: int = 4            # how often size itself is among the sides 0.75 to 1.25 size; 0: off
    jitter: float = 0.5            # probability of a change of colours
    zoom_out: float = 0.5          # probability of black borders around the image
    mosaic: float = 0.5            # probability of four images in one
    aug_from: int = 5              # first epoch with zoom-out and mosaic
    mosaic_until: int = 28         # first epoch without mosaic
    aug_until: int = 48            # first epoch without zoom-out and multi-scale
    # aids to learn from nothing: ours, not the paper's; the presets of the paper do without them
    frozen_norm: bool = True       # the backbone's norms are constants; off without weights that gave them
    ksvf_from: int = 0             # first epoch with eq. 5; focal loss before, as all OKS are near 0 at first
    score_weight: float = 2.0      # weight of the score's loss (release: 2)
    mean_pose: bool = False        # first poses start as the training set's mean pose, not as a point
    heatmap_weight: float = 0.0    # of an auxiliary loss that asks the encoder's finest map for heatmaps
    schedule: str = "constant"     # constant or cosine
    warmup: int = 0                # optimiser steps of linear warm-up

    def __post_init__(self):
        """Raises UserError for values that no run could use."""
        super().__post_init__()
        check_choice(self, backbone=("B0", "B2", "B4", "B5"), schedule=("constant", "cosine"))
        check_range(self, 1, 4, "levels")
        check_range(self, 1, math.inf, "dim heads encoder_ffn depth layers decoder_ffn points queries dn_queries "
                    "size epochs batch")
        check_range(self, 1e-6, math.inf, "expansion reg_scale lr clip")
        check_range(self, 0, math.inf, "lr_backbone weight_decay warmup drop_epoch ema_warmup multiscale "
                    "aug_from mosaic_until aug_until ksvf_from score_weight heatmap_weight")
        check_range(self, 0, 1, "ema jitter zoom_out mosaic")
        if self.dim % self.heads or self.dim % 4:
            raise UserError(f"--dim {self.dim} does not split over {self.heads} heads, and sines and cosines of x "
                            f"and y: choose a multiple of {math.lcm(4, self.heads)}")
        if self.size % 32:
            raise UserError(f"--size {self.size}: expected a multiple of 32")
        if self.expansion * self.dim < 2:
            raise UserError(f"--expansion {self.expansion} leaves nothing of --dim {self.dim}")


def _presets() -> dict[str, Config]:
    """Sizes of Table 1 (n: Table 5 alone has it), the rest of the release's configurations."""
    s = Config(backbone="B0", lab=True, expansion=0.5, depth=1, layers=3, epochs=100, lr_backbone=1e-4,
               multiscale=20, mosaic_until=52, aug_until=96, init="dfine-s-obj365")
    n = replace(s, levels=2, dim=128, encoder_ffn=512, expansion=0.34, depth=2, decoder_ffn=512, points=6,
                epochs=160, multiscale=0, mosaic_until=82, aug_until=156, init="dfine-n-coco")
    m = replace(s, backbone="B2", expansion=1.0, depth=2, layers=4, epochs=64, lr_backbone=1e-5,
                drop_epoch=15, multiscale=6, mosaic_until=34, aug_until=60, init="dfine-m-obj365")
    l = Config(accum=2)
    x = Config(backbone="B5", dim=384, encoder_ffn=2048, reg_scale=8.0, lr_backbone=5e-5,
               init="dfine-x-obj365")
    # minutes on a laptop, from nothing: small everything, all the aids; no denoising, whose noise is finer
    # than what is learned in that time
    tiny = replace(s, init="", lab=False, frozen_norm=False, dim=96, heads=4, encoder_ffn=192,
                   decoder_ffn=192, points=2, queries=10, size=128, ksvf_from=2, score_weight=8.0,
                   heatmap_weight=2.0, mean_pose=True, pose_denoising=False, dn_queries=4, epochs=8,
                   batch=16, lr=1e-3, lr_backbone=1e-3, schedule="cosine", warmup=60, clip=1.0, ema=0.995,
                   ema_warmup=100, multiscale=0, jitter=0.0, mosaic=0.0, zoom_out=0.0, processes=2,
                   workers=0, eval_every=4, eval_batch=50)
    crowd = dict(lr_backbone=1e-5, accum=2)
    return {"tiny": tiny, "n": n, "s": s, "m": m, "l": l, "x": x,
            "n-crowdpose": replace(n, **crowd, epochs=284, mosaic_until=136, aug_until=264),
            "s-crowdpose": replace(s, **crowd, epochs=176, mosaic_until=82, aug_until=156),
            "m-crowdpose": replace(m, **crowd, epochs=76, mosaic_until=40, aug_until=72, drop_epoch=0),
            "l-crowdpose": replace(l, **crowd, epochs=64, aug_until=60),
            "x-crowdpose": replace(x, **crowd, aug_until=60)}        # as released: after the last epoch


PRESETS: dict[str, Config] = _presets()
AT_INFERENCE = ("keypoint_scores",)    # fields that `eval.py --set` may change

# ---- Pose denoising (Sec. 3.1): true poses, disturbed, as extra queries with a known answer --------------
#
# The decoder has to move a disturbed pose back to where it came from, with no doubt about which person is
# meant, and to tell a slightly disturbed pose (positive) from a badly disturbed one (negative). At
# inference there are none.

Pairs = tuple[Tensor, Tensor, Tensor]  # image, query, person: equally long; `person` counts through the batch


class Noise(NamedTuple):
    """All random numbers of R noisy poses: the positives of group 1, its negatives, the positives of group
    2, ..., in each of these half-groups everybody in image order.
    """
    relabel: Tensor        # (R,) bool: whose label is replaced
    labels: Tensor         # (R,) the labels then used
    direction: Tensor      # (R, K, 2) n⃗ of eq. 2
    ks: Tensor             # (R, K) similarity to the true keypoint: (0.5, 1) positives, (0.1, 0.5) negatives


LABELS = 80                # D-FINE's label embedding has these and one more for "none"; the release keeps it
PERSON = 1                 # the label of a person


def draw_noise(half_groups: int, people: int, keypoints: int, device: torch.device, as_released: bool) -> Noise:
    """Draws for `half_groups` (positive, negative, positive, ...) copies of `people` poses.

    Departs from the paper: −ln KS is uniform, as in the release; there KS is, U(0.5, 1) and U(0.1, 0.5).
    """
    rows = half_groups * people
    negative = torch.arange(half_groups, device=device).repeat_interleave(people) % 2 == 1
    u = torch.rand(rows, keypoints, device=device)
    ks = torch.where(negative[:, None], 0.5 * 0.2 ** u, 0.5 ** u)
    angle = 2 * math.pi * torch.rand(rows, keypoints, device=device)
    direction = torch.stack([angle.cos(), angle.sin()], -1)                        # n⃗, a unit vector (eq. 2)
    if as_released:
        direction = released_direction(torch.rand(rows, keypoints + 1, 2, device=device))
    relabel, labels = torch.rand(rows, device=device) < 0.25, torch.randint(0, LABELS, (rows,), device=device)
    return Noise(relabel, labels, direction, ks)


def released_direction(draws: Tensor) -> Tensor:
    """What the release takes for n⃗: draws (R, T, 2) over their norm of order −1 along the tokens, (R, K, 2).

    No unit vector: it points right and down and is dozens long, so that most noisy poses leave the image.
    """
    draws = draws.clamp(min=2 ** -24)
    return (draws * draws.reciprocal().sum(1, keepdim=True))[:, 1:]


def noisy_pose(p: Tensor, ks: Tensor, direction: Tensor, kappa: Tensor, area_px: Tensor, side_px: int) -> Tensor:
    """Keypoints p (R, K, 2) moved so far that their similarity to where they were is ks (R, K).

        KS = exp(−d² / (2 s² κ²))       similarity at a distance d                        (eq. 1)
        p̂  = p + α̂ n⃗                    so d(p, p̂) = α̂                                   (eq. 2)
        α̂² = −2 ln(KS) s² κ²            eq. 1 solved for d                                (eq. 3)
        α̂  = s κ √(−2 ln(KS) w h)       the same in pixels: s² w h = area_px              (eq. 4)

    kappa (K,) = 2σ. In eq. 4 the input has w × h pixels and s² is the person's share of it; area_px (R,).
    side_px = max(w, h), by which Sec. 3.1 and the release divide both axes.
    """
    alpha_px = kappa * (-2 * ks.log() * area_px[:, None]).sqrt()                        # (R, K), eq. 3 and 4
    return p + (alpha_px / side_px).unsqueeze(-1) * direction                           # eq. 2


class Denoising(NamedTuple):
    content: Tensor        # (B, pad, T, C) tokens of the noisy queries, pad = 2·n_max·G
    reference: Tensor      # (B, pad, T, 2)
    blocked: Tensor        # (pad + Q, pad + Q) True where attention across people is forbidden
    pairs: Pairs           # image, slot, person (of all people of the batch) of the positives
    groups: int            # G


def denoising_mask(n_max: int, groups: int, queries: int, device: torch.device) -> Tensor:
    """(pad+Q, pad+Q), True = may not look. A group attends to itself and to the matching queries; matching
    queries attend to one another alone. Otherwise a query could copy the answer from the noisy poses of the
    same people in another group.

        query ↓  key →      pos neg   pos neg   matching
        group 1: pos, neg    ·   ·     ✗   ✗       ·
        group 2: pos, neg    ✗   ✗     ·   ·       ·
        matching             ✗   ✗     ✗   ✗       ·

    A pos and a neg have n_max slots each, one for every person of the fullest image of the batch.
    Departs from the paper: Sec. 3.3 keeps positives, negatives and predictions apart; the release does this.
    """
    pad = 2 * n_max * groups
    group = torch.arange(pad + queries, device=device) // (2 * n_max)
    group[pad:] = -1                                                       # the matching queries
    return (group[:, None] != group[None, :]) & (group[None, :] >= 0)


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Logit of x clamped to [0, 1], finite at both ends: |logit| ≤ ln(1/eps)."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def denoising_queries(people: list[People], image_hw: tuple[int, int], queries: int, label: nn.Embedding,
                      keypoint: nn.Embedding, sigmas: Tensor, cfg: Config, noise: Noise | None = None
                      ) -> Denoising | None:
    """The noisy queries of a batch: G groups, in each a positive and a negative copy of every person.

    With n people in the fullest image, G = max(1, dn_queries // n), and an image has pad = 2·n·G slots.
    Takes    the people of each image; the network input's (height, width); how many matching queries follow;
             embeddings of labels (81, C) and of keypoints (K, C), from which the tokens start
    Returns  a Denoising, whose pairs are the positives. Empty slots, of images with fewer people, have content 0
             and reference 0.5; they count as negatives, as in the release. None for a batch without people
             (Departs from the release: it crashes)
    Departs from the paper: labels are replaced at times (DN-DETR's label noise). The person's reference
    point is the centre of the true box, also of a negative; Sec. 3.2 has the mean of the keypoints. With
    --as_released it is not even that centre: the release takes (cx, cy, w, h) for corners.
    """
    counts, device = [len(one) for one in people], sigmas.device
    n_max, total = max(counts), sum(counts)
    if total == 0:
        return None
    groups = max(1, cfg.dn_queries // n_max)
    half_groups = 2 * groups
    noise = noise or draw_noise(half_groups, total, len(sigmas), device, cfg.as_released)

    true = gather_people(people).take(torch.arange(total, device=device).repeat(half_groups))         # R rows
    area_px = true.areas * image_hw[0] * image_hw[1] + torch.finfo(torch.float32).eps
    moved = noisy_pose(true.keypoints, noise.ks, noise.direction, 2 * sigmas, area_px, max(image_hw))
    noisy = torch.where(true.visible[..., None] > 0, moved, true.keypoints)   # unlabelled ones stay at (0, 0)
    centre = (true.boxes[:, :2] + true.boxes[:, 2:]) / 2 if cfg.as_released else true.boxes[:, :2]
    # noise may have left the image: this keeps to [0.001, 0.999]
    reference = inverse_sigmoid(torch.cat([centre[:, None], noisy], 1)).sigmoid()                  # (R, T, 2)
    replaced = torch.where(noise.relabel, noise.labels, PERSON)
    own = repeat(keypoint.weight, "k c -> r k c", r=len(replaced))
    content = torch.cat([label(replaced)[:, None], own], 1)                                        # (R, T, C)

    # row of person j in half-group h → slot h·n_max + j of its image; empty slots are zeros in the middle
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)
    slot = torch.cat([torch.arange(n) for n in counts]).to(device)
    half = torch.arange(half_groups, device=device)[:, None]
    where = (image.repeat(half_groups), (half * n_max + slot).flatten())
    shape = (len(counts), half_groups * n_max, reference.shape[1])
    content = content.new_zeros(*shape, content.shape[-1]).index_put(where, content)
    reference = reference.new_full((*shape, 2), 0.5).index_put(where, reference)
    positive = (half[::2] * n_max + slot).flatten()
    pairs = (image.repeat(groups), positive, torch.arange(total, device=device).repeat(groups))
    return Denoising(content, reference, denoising_mask(n_max, groups, queries, device), pairs, groups)


# ---- Query selection (Sec. 3.2) --------------------------------------------------------------------------


class MLP(nn.Module):
    """Linear layers with ReLU between them; `widths` from input to output."""

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=True)
        return self.layers[-1](x)


def cell_anchors(shapes: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres of all cells of all levels as logits (1, N, 2), and which lie within 1 % of the image's edge
    (1, N, 1): at 640 pixels the outer ring of the finest map. shapes: (height, width) of each level."""
    centres = []
    for height, width in shapes:
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres.append(torch.stack([(x + 0.5) / width, (y + 0.5) / height], -1).flatten(0, 1))
    xy = torch.cat(centres)[None]
    border = ((xy <= 0.01) | (xy >= 0.99)).any(-1, keepdim=True)
    return (xy / (1 - xy)).log(), border


class QuerySelection(nn.Module):
    """Scores every cell of the memory and turns the Q best into first poses: σ(offset + logit of its centre).

    Takes    memory (B, N, C) and the levels' shapes
    Returns  logits (B, Q, 2), keypoints (B, Q, K, 2), index (B, Q) of the chosen cells, best first; N if N < Q
    Cells at the edge are blanked but still compete, as in the release: all have the features that zeros give.
    """

    def __init__(self, dim: int, keypoints: int, queries: int):
        super().__init__()
        self.queries = queries
        self.project, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.score = nn.Linear(dim, 2)
        self.pose = MLP(dim, 2 * dim, 2 * dim, 2 * dim, 2 * keypoints)

    def forward(self, memory: Tensor, shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        anchors, border = cell_anchors(shapes, memory.device)
        cells = self.norm(self.project(memory.masked_fill(border, 0)))
        logits = self.score(cells)                                                        # (B, N, 2)
        count = min(self.queries, logits.shape[1])
        index = logits.max(-1).values.topk(count, dim=1).indices                          # (B, Q)
        pick = index.unsqueeze(-1)
        cells = cells.gather(1, pick.expand(-1, -1, cells.shape[-1]))
        anchors = anchors.expand(memory.shape[0], -1, -1).gather(1, pick.expand(-1, -1, 2))
        offsets = rearrange(self.pose(cells), "b q (k xy) -> b q k xy", xy=2)
        keypoints = (offsets.float() + anchors[:, :, None]).sigmoid()
        return logits.gather(1, pick.expand(-1, -1, 2)), keypoints, index


def with_centre(keypoints: Tensor) -> Tensor:
    """The T reference points of a person (B, Q, T, 2): the mean of the keypoints (B, Q, K, 2), then these."""
    return torch.cat([keypoints.mean(2, keepdim=True), keypoints], 2)


# ---- Decoder layer (Sec. 3.3) ----------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Multi-head self-attention; x (batch, tokens, C) → the same shape.

    `position` (the encoder's) is added to queries and keys only; `blocked` (tokens, tokens): True = may not look.
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

    def forward(self, x: Tensor, position: Tensor | None = None, blocked: Tensor | None = None) -> Tensor:
        if position is None:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            dim = x.shape[-1]
            q, k = F.linear(x + position, self.in_proj_weight[:2 * dim],
                            self.in_proj_bias[:2 * dim]).chunk(2, -1)
            v = F.linear(x, self.in_proj_weight[2 * dim:], self.in_proj_bias[2 * dim:])
        q, k, v = (rearrange(t, "b n (m d) -> b m n d", m=self.heads) for t in (q, k, v))
        allowed = None if blocked is None else ~blocked
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out_proj(rearrange(x, "b m n d -> b n (m d)"))


class DeformableAttention(nn.Module):
    """Each token reads P points per level around its reference point (Deformable DETR eq. 3).

        out = Σ_i w_i · memory(reference + offset_i / (W, H))        w = softmax over all L·P points of a head

    No value and no output projection: head m reads channels [m·d, (m+1)·d) of the encoder maps as they are.
    Takes x (B, Q·T, C), reference (B, Q·T, 2), memory (B, N, C); returns (B, Q·T, C).
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)

    def reset_parameters(self) -> None:
        """Point i of head m starts i+1 cells along the m-th of M rays; all weights start equal.

        Departs from the release: where P is no multiple of four (n) its points of a head start in one place
        and then stay together, for their gradients are equal.
        """
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        angle = torch.arange(self.heads) * 2 * math.pi / self.heads
        ray = F.normalize(torch.stack([angle.cos(), angle.sin()], -1), p=math.inf, dim=-1)
        steps = torch.arange(self.points) + 1
        bias = repeat(ray[:, None] * steps[:, None], "m p xy -> (m l p xy)", l=self.levels)
        self.sampling_offsets.bias.data.copy_(bias)

    def forward(self, x: Tensor, reference: Tensor, memory: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        logits = rearrange(self.attention_weights(x), "b q (m t) -> b q m t", m=self.heads)
        cells = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32, device=x.device)
        cells = repeat(cells, "l xy -> (m l p xy)", m=self.heads, p=self.points)       # flat, which exports well
        # float32: bfloat16 would move a point by a tenth of a cell
        locations = self.sampling_offsets(x).float() / cells + reference.float().repeat(1, 1, len(cells) // 2)
        locations = rearrange(locations, "b q (m t xy) -> b q m t xy", m=self.heads, xy=2)
        value = rearrange(memory, "b n (m d) -> b n m d", m=self.heads)
        return deform_attn(value, shapes, locations, logits.softmax(-1), [self.points] * self.levels)


class Gateway(nn.Module):
    """A learned gate between a token x and what it read y:  LayerNorm(g₁·x + g₂·y),  (g₁, g₂) = σ(W [x, y]).

    D-FINE's, as are the FDR heads. The paper does not mention it, but Table 4's parameters and GFLOPs have
    it from "+ FDR heads" on, and GroupPose's norm of the sum before.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gate, self.norm = nn.Linear(2 * dim, 2 * dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        g1, g2 = self.gate(torch.cat([x, y], -1)).sigmoid().chunk(2, -1)
        return self.norm(g1 * x + g2 * y)


class AddNorm(nn.Module):
    """LayerNorm(x + y): GroupPose's, in place of the gate (Table 4 rows 1 to 3)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(x + y)


def sine_embedding(xy: Tensor, dim: int, temperature: float) -> Tensor:
    """Sine position embedding of xy (..., 2), in units of a full turn → (..., dim), y half first.

    Feature i of an axis is sin (even i) or cos (odd i) of 2π·coordinate / temperature^(2⌊i/2⌋ / (dim/2)).
    """
    i = torch.arange(dim // 2, device=xy.device) // 2
    angle = 2 * math.pi * xy.flip(-1).unsqueeze(-1) / temperature ** (4 * i / dim)      # (..., 2, dim/2)
    angle = torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1)           # sin, cos in turn
    return angle.flatten(-3)


def add_position(x: Tensor, position: Tensor) -> Tensor:
    """x (B, Q, T, C) with position (B, Q, K, C) added to the keypoint tokens; the person's token has none."""
    return torch.cat([x[:, :, :1], x[:, :, 1:] + position], 2)


class DecoderLayer(nn.Module):
    """Attention within a person, across people, into the image, then a feed-forward block.

        x (B, Q, T, C)     ┌────────┬───────┬─ … ─┬───────┐
        tokens of a query  │ person │ kpt 1 │     │ kpt K │  ×Q      + position(kpt 1 … K)   before the layer
                           └────────┴───────┴─ … ─┴───────┘
        within     ↔ among the T tokens of one person                  norm(x + ·)
        across     ↕ token t of all Q people, where not `blocked`      norm(x + ·), + position a second time
        cross      → P points per level around each token's reference  gate(x, ·)
        feed-forward                                                   norm(x + ·)

    Takes    x that already carries `position` (B, Q, K, C); reference (B, Q, T, 2); memory (B, N, C);
             blocked (Q, Q) or None: which queries may not see which
    Returns  (B, Q, T, C)
    As released: the position is part of x from here on (values and residuals contain it), and is added again
    before the cross-attention, because the release adds in place, and the weights were trained so.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.within_attn, self.within_norm = SelfAttention(cfg.dim, cfg.heads), nn.LayerNorm(cfg.dim)
        self.across_attn, self.across_norm = SelfAttention(cfg.dim, cfg.heads), nn.LayerNorm(cfg.dim)
        self.cross_attn = DeformableAttention(cfg.dim, cfg.heads, cfg.levels, cfg.points)
        self.gateway = Gateway(cfg.dim) if cfg.fdr else AddNorm(cfg.dim)
        self.linear1, self.linear2 = nn.Linear(cfg.dim, cfg.decoder_ffn), nn.Linear(cfg.decoder_ffn, cfg.dim)
        self.norm2 = nn.LayerNorm(cfg.dim)

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, memory: Tensor,
                shapes: list[tuple[int, int]], blocked: Tensor | None = None) -> Tensor:
        b, q, t, _ = x.shape
        people = rearrange(x, "b q t c -> (b q) t c")                      # tokens of one person together
        x = rearrange(self.within_norm(people + self.within_attn(people)), "(b q) t c -> (b t) q c", b=b)
        x = self.across_norm(x + self.across_attn(x, blocked=blocked))     # token t of all people together
        x = add_position(rearrange(x, "(b t) q c -> b q t c", b=b), position)
        read = self.cross_attn(x.flatten(1, 2), reference.flatten(1, 2), memory, shapes)
        x = self.gateway(x, read.view_as(x))
        x = x + self.linear2(F.relu(self.linear1(x), inplace=True))
        return self.norm2(x.clamp(-65504, 65504))                          # float16's range


# ---- Decoder (Sec. 3.3) and Pose-LQE (Sec. 3.3.1) --------------------------------------------------------


REG_MAX = 32           # the offset of a coordinate is a distribution over REG_MAX + 1 = 33 values


def offset_values(reg_scale: float, up: float = 0.5) -> Tensor:
    """W(n), n = 0 … 32: the 33 offsets that an FDR head chooses among (D-FINE Sec. 4.1), dense around 0.

    W = [−2u, 1 − s¹⁵, …, 1 − s¹, 0, s¹ − 1, …, s¹⁵ − 1, 2u],  u = up · reg_scale,  s = (u + 1)^(2/30).
    Divided by reg_scale they end in ±0.5, ±1 of the image. up is D-FINE's a, 1/reg_scale its c.
    """
    u = up * reg_scale
    inner = (u + 1) ** (2 / (REG_MAX - 2) * torch.arange(1, REG_MAX // 2)) - 1
    ends = torch.tensor([2 * u])
    return torch.cat([-ends, -inner.flip(0), torch.zeros(1), inner, ends])


class Decoder(nn.Module):
    """D layers that refine the poses, with their heads.

    FDR, fine-grained distribution refinement (Sec. 3.3; D-FINE): the pre-pose p₀ of the first layer is the base
    of all, and layer l (h_l its keypoint tokens, from 0 on) adds to the logits of a distribution over offsets:

        z_l = z_{l−1} + head_l(h_l + h_{l−1})        p_l = p₀ + Σ_n softmax(z_l)_n W(n) / reg_scale

    where no gradient goes through p₀ and h_{l−1}.
    Without FDR (Table 4 rows 1 to 3), as in GroupPose: no pre-pose, and p_l = σ(head(h) + σ⁻¹(reference)).
    """

    def __init__(self, cfg: Config, keypoints: int):
        super().__init__()
        self.fdr, self.reg_scale, dim = cfg.fdr, cfg.reg_scale, cfg.dim
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.layers))
        self.position_head = MLP(dim, dim, dim)
        self.score_heads = nn.ModuleList(nn.Linear(dim, 2) for _ in range(cfg.layers))
        self.pre_pose_head = MLP(dim, dim, dim, 2) if cfg.fdr else None
        outputs = 2 * (REG_MAX + 1) if cfg.fdr else 2
        self.pose_heads = nn.ModuleList(MLP(dim, dim, dim, outputs) for _ in range(cfg.layers))
        self.lqe_heads = nn.ModuleList(PoseLQE(keypoints) for _ in range(cfg.layers if cfg.pose_lqe else 0))
        self.register_buffer("offset_values", offset_values(cfg.reg_scale), persistent=False)

    def refine(self, layer: int, h: Tensor, previous: Tensor | float, z: Tensor | float, reference: Tensor,
               pre_pose: Tensor | None) -> tuple[Tensor, Tensor | float]:
        """h_l and h_{l−1} (`previous`) (B, Q, K, C) → p_l (B, Q, K, 2), and z_l (B, Q, K, 66) from z_{l−1}.

        reference: where layer l looked, the base of a step without FDR.
        """
        if not self.fdr:
            return (self.pose_heads[layer](h).float() + inverse_sigmoid(reference)).sigmoid(), z
        z = self.pose_heads[layer](h + previous).float() + z
        # no matrix product, which autocast would run in half precision
        offset = (rearrange(z, "b q k (xy n) -> b q k xy n", xy=2).softmax(-1) * self.offset_values).sum(-1)
        return pre_pose + offset / self.reg_scale, z

    def forward(self, x: Tensor, reference: Tensor, maps: list[Tensor], memory: Tensor,
                shapes: list[tuple[int, int]], blocked: Tensor | None) -> dict[str, Tensor | list[Tensor]]:
        """x (B, Q, T, C), reference (B, Q, T, 2) → lists over layers of logits (B, Q, 2) and keypoints
        (B, Q, K, 2), with FDR also pre_logits and pre_keypoints; the rest is for inspection, no loss. In
        training Q means pad + Q here.
        """
        out = dict(logits=[], keypoints=[], tokens=[], references=[])
        z, pre_pose = 0.0, None
        for l, layer in enumerate(self.layers):
            points = reference[:, :, 1:]
            position = self.position_head(sine_embedding(points, x.shape[-1], temperature=10000).to(x.dtype))
            x = add_position(x, position)
            # h of the layer before; as released with this layer's position, which is added in place there
            previous = x[:, :, 1:].detach() if l > 0 else 0.0
            x = layer(x, position, reference, memory, shapes, blocked)
            score, h = self.score_heads[l](x[:, :, 0]), x[:, :, 1:]
            if l == 0 and self.fdr:
                out["pre_keypoints"] = (self.pre_pose_head(h).float() + inverse_sigmoid(points)).sigmoid()
                out["pre_logits"] = score
                pre_pose = out["pre_keypoints"].detach()                    # p₀ of every layer
            keypoints, z = self.refine(l, h, previous, z, points, pre_pose)
            if self.training or l == len(self.layers) - 1:           # at inference only the last score counts
                if self.lqe_heads:                                  # from the end: `fuse` keeps the last head
                    score = score + self.lqe_heads[l if self.training else -1](maps[0], keypoints)
                out["logits"].append(score)
            reference = with_centre(keypoints).detach()
            out["keypoints"].append(keypoints)
            out["tokens"].append(x)
            out["references"].append(reference)
        return {**out, "offset_logits": z}


class PoseLQE(nn.Module):
    """Pose location quality estimation: a correction of the score from the features under the pose.

    At each predicted keypoint the finest encoder map is sampled; the four largest channel values and their
    mean, for all K keypoints, go through a small MLP whose single output is added to both logits.
    Takes finest (B, C, H, W), keypoints (B, Q, K, 2); returns (B, Q, 1).
    Departs from the paper: it has top-k values and one layer; as released the mean, too, and two layers.
    """

    def __init__(self, keypoints: int):
        super().__init__()
        self.mlp = MLP(5 * keypoints, 256, 1)

    def forward(self, finest: Tensor, keypoints: Tensor) -> Tensor:
        sampled = F.grid_sample(finest.float(), 2 * keypoints - 1, align_corners=False)    # (B, C, Q, K)
        top = sampled.topk(4, dim=1).values                                                # (B, 4, Q, K)
        quality = torch.cat([top, top.mean(1, keepdim=True)], 1)
        return self.mlp(rearrange(quality, "b five q k -> b q (k five)"))


# ---- The model (Fig. 1) ----------------------------------------------------------------------------------


class Output(NamedTuple):
    """Something that has a loss: a layer's answer for every query."""
    name: str             # suffix of its loss terms: "" last layer, "0" … before it, "pre", "enc_0", "dn_0" …
    logits: Tensor         # (B, Q, 2)
    keypoints: Tensor      # (B, Q, K, 2)


class DETRPose(nn.Module):
    """The whole network: `forward` gives the last layer's answer, and in training all that has a loss."""

    def __init__(self, cfg: Config, skeleton: Skeleton):
        super().__init__()
        self.cfg, self.skeleton = cfg, skeleton
        keypoints, dim = skeleton.num_keypoints, cfg.dim
        self.register_buffer("sigmas", torch.tensor(skeleton.sigmas), persistent=False)
        self.backbone = HGNetv2(cfg.backbone, cfg.levels, cfg.frozen_norm, cfg.lab)
        self.encoder = HybridEncoder(self.backbone.channels, cfg)
        self.selection = QuerySelection(dim, keypoints, cfg.queries)
        self.decoder = Decoder(cfg, keypoints)
        self.rank_content = nn.Embedding(cfg.queries, dim)              # the r-th best cell starts from row r
        self.keypoint_content = nn.Embedding(keypoints, dim)
        self.instance_content = nn.Embedding(1, dim)
        self.noisy_label = nn.Embedding(LABELS + 1, dim)
        self.noisy_keypoint = nn.Embedding(keypoints, dim)
        self.heatmaps = CellHeatmaps(dim, keypoints, across=2) if cfg.heatmap_weight else None      # an aid
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values of the release: Xavier for decoder layers, embeddings and the encoder's input,
        sampling points on rays, the last layers of pose and quality heads at zero.
        """
        embeddings = [self.rank_content, self.keypoint_content, self.instance_content, self.noisy_label,
                      self.noisy_keypoint]
        for parameter in [p for part in [self.decoder.layers, self.decoder.position_head, *embeddings]
                          for p in part.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for layer in self.decoder.layers:
            if self.cfg.fdr:
                nn.init.zeros_(layer.gateway.gate.bias)
            layer.cross_attn.reset_parameters()
        for project in self.encoder.input_proj:
            nn.init.xavier_uniform_(project.conv.weight)
        for head in [self.selection.score, *self.decoder.score_heads]:
            nn.init.constant_(head.bias, -math.log(99))                    # a prior of 0.01
        outputs = [self.selection.pose, self.decoder.pre_pose_head, *self.decoder.pose_heads,
                   *(lqe.mlp for lqe in self.decoder.lqe_heads)]
        for head in filter(None, outputs):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        for heads in [self.decoder.score_heads, self.decoder.pose_heads, self.decoder.lqe_heads]:
            for head in heads[1:]:                                       # heads of all layers start as copies
                head.load_state_dict(heads[0].state_dict())

    def content(self, batch: int, queries: int) -> Tensor:
        """The tokens (B, Q, T, C) that matching queries start from.

        Departs from the paper: it has one learned content query per person. In the release, and here, the
        keypoint tokens are told the cell's rank among the selected, and all people share one person's token.
        """
        keypoints = self.rank_content.weight[:queries, None] + self.keypoint_content.weight        # (Q, K, C)
        person = repeat(self.instance_content.weight, "one c -> q one c", q=queries)
        return repeat(torch.cat([person, keypoints], 1), "q t c -> b q t c", b=batch)

    def forward(self, images: Tensor, people: list[People] | None = None, noise: Noise | None = None) -> dict:
        """images (B, 3, H, W) RGB in [0, 1], H and W divisible by 32.

        Always      logits (B, Q, 2), keypoints (B, Q, K, 2) of the last layer
        Evaluation  for inspection: `decoded`, all of the decoder, `selected` cells (B, Q), encoder's `maps`
        Training    (people given, and the model in train()): `outputs` and `dn_outputs`, lists of Output;
                    `denoising`; `heatmaps` (B, K, 2h, 2w) of the finest map (h, w), None without
                    `heatmap_weight`; `unused`, a 0 that belongs to the losses
        """
        maps = self.encoder(self.backbone(images))
        shapes = [tuple(x.shape[-2:]) for x in maps]
        memory = torch.cat([rearrange(x, "b c h w -> b (h w) c") for x in maps], 1)          # (B, N, C)
        first_logits, first_keypoints, index = self.selection(memory, shapes)
        queries = index.shape[1]
        x, reference = self.content(images.shape[0], queries), with_centre(first_keypoints.detach())

        noisy = None
        if people is not None and self.cfg.pose_denoising:
            noisy = denoising_queries(people, images.shape[-2:], queries, self.noisy_label,
                                      self.noisy_keypoint, self.sigmas, self.cfg, noise)
        if noisy:
            x = torch.cat([noisy.content, x], 1)
            reference = torch.cat([noisy.reference, reference], 1)
        blocked = noisy.blocked if noisy else None
        decoded = self.decoder(x.to(memory.dtype), reference, maps, memory, shapes, blocked)
        pad = noisy.content.shape[1] if noisy else 0
        result = dict(logits=decoded["logits"][-1][:, pad:], keypoints=decoded["keypoints"][-1][:, pad:])
        if people is None:
            return result | dict(decoded=decoded, selected=index, maps=maps)

        every = [Output(str(l), *pair)
                 for l, pair in enumerate(zip(decoded["logits"], decoded["keypoints"], strict=True))]
        if self.cfg.fdr:
            every.append(Output("pre", decoded["pre_logits"], decoded["pre_keypoints"]))
        dn_outputs = [Output(f"dn_{n}", a[:, :pad], b[:, :pad]) for n, a, b in every if noisy]
        every[self.cfg.layers - 1] = every[self.cfg.layers - 1]._replace(name="")
        outputs = [Output(n, a[:, pad:], b[:, pad:]) for n, a, b in every]
        outputs.append(Output("enc_0", first_logits, first_keypoints))
        finest = memory[:, :math.prod(shapes[0])]
        # several processes wait for a gradient of every parameter, also of a batch without people
        unused = 0 * (self.noisy_label.weight.sum() + self.noisy_keypoint.weight.sum())
        return result | dict(outputs=outputs, dn_outputs=dn_outputs, denoising=noisy, unused=unused,
                             heatmaps=self.heatmaps(finest, shapes[0][0]) if self.heatmaps else None)


# ---- Matching and losses (Sec. 3.4) ----------------------------------------------------------------------


def match_cost(logits: Tensor, keypoints: Tensor, people: People, sigmas: Tensor) -> Tensor:
    """Cost of giving a query to a person, (B, Q, people): 2·class + 10·Σ v|Δ| + 4·(1 − OKS), as in the
    release; v = 1 where a keypoint is labelled, Δ its difference in x and y.
    """
    p = logits[..., PERSON].sigmoid().unsqueeze(-1)
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    difference = keypoints[:, :, None] - people.keypoints                               # (B, Q, people, K, 2)
    distance = (difference.abs().sum(-1) * people.visible).sum(-1)
    similarity = similarity_of(difference.square().sum(-1), people.visible, people.areas, sigmas)
    return 2 * focal + 10 * distance + 4 * (1 - similarity)


@torch.no_grad()
def match(outputs: list[Output], people: list[People], sigmas: Tensor) -> list[Pairs]:
    """The cheapest one-to-one assignment of people to queries, for each output alone (Hungarian method)."""
    everybody = gather_people(people)
    costs = torch.stack([match_cost(output.logits.float(), output.keypoints.float(), everybody, sigmas)
                         for output in outputs])                              # (outputs, B, Q, people)
    costs = costs.nan_to_num(1e6, 1e6, -1e6).cpu().numpy()       # NaN is the loss's to show, not a crash here
    ends = np.cumsum([0] + [len(one) for one in people])
    matchings = []
    for cost in costs:
        found = []
        for image, (first, last) in enumerate(zip(ends, ends[1:])):
            query, person = linear_sum_assignment(cost[image, :, first:last])
            found.append(np.stack([np.full_like(query, image), query, person + first]))
        matchings.append(tuple(torch.from_numpy(np.concatenate(found, 1)).to(sigmas.device)))
    return matchings


def union_of_matches(matchings: list[Pairs]) -> Pairs:
    """Global-optimal set (D-FINE Sec. 4.2): all pairs that any output found, but each query keeps only the
    person it was paired with most often (the first of equals). A person may keep several queries.

    With FDR the logits of a layer are the sum of its own and of all before, so the layers must pull a query
    towards the same person. Their scores are still taught by their own matching.
    """
    pairs, counts = torch.cat([torch.stack(m) for m in matchings], 1).cpu().unique(dim=1, return_counts=True)
    best: dict[tuple[int, int], tuple[int, int]] = {}
    for (image, query, person), count in zip(pairs.T.tolist(), counts.tolist()):
        if count > best.get((image, query), (0, 0))[0]:
            best[image, query] = (count, person)
    union = torch.tensor([[i, q, person] for (i, q), (_, person) in best.items()], dtype=torch.long)
    return tuple(union.reshape(-1, 3).T.to(matchings[0][0].device))


def ksvf_loss(logits: Tensor, pairs: Pairs, quality: Tensor) -> Tensor:
    """Keypoint similarity varifocal loss, summed; p = σ(logit).

        −q (q log p + (1 − q) log(1 − p))    for the person logit of a matched query              (eq. 5)
        −α p^γ log(1 − p)                    for all others, label 0 too; α = 0.25, γ = 2 of the release

    The score learns to be the similarity q of its own pose; as released, q and p^γ are constants for the
    gradient. logits (B, Q, 2); quality (pairs,) = q.
    Departs from the paper: q is the OKS of the person, as in the release; there it is KS, of a keypoint.
    """
    image, query, _ = pairs
    matched, target = torch.zeros_like(logits), torch.zeros_like(logits)
    matched[image, query, PERSON] = 1
    target[image, query, PERSON] = quality.detach()
    p = logits.detach().sigmoid()
    weight = 0.25 * p ** 2 * (1 - matched) + target                                           # eq. 5
    return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")


def focal_loss(logits: Tensor, pairs: Pairs) -> Tensor:
    """The score's loss in Table 4's rows without KSVF, summed; logits (B, Q, 2). The paper does not name
    it: this is the focal loss that the release has switched off, α = 0.25, γ = 2.
    """
    image, query, _ = pairs
    matched = torch.zeros_like(logits)
    matched[image, query, PERSON] = 1
    p = logits.sigmoid()
    weight = torch.where(matched > 0, 0.25 * (1 - p) ** 2, 0.75 * p ** 2)
    return (weight * F.binary_cross_entropy_with_logits(logits, matched, reduction="none")).sum()


def pair_errors(keypoints: Tensor, pairs: Pairs, people: People, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """For each pair, Σ v|Δ| over the keypoints and the OKS, (pairs,) each; keypoints (B, Q, K, 2).

    OKS is the mean of KS (eq. 1) over the labelled keypoints: the q of eq. 5.
    """
    image, query, person = pairs
    matched = people.take(person)
    difference = keypoints[image, query] - matched.keypoints
    distance = (difference.abs().sum(-1) * matched.visible).sum(-1)
    return distance, similarity_of(difference.square().sum(-1), matched.visible, matched.areas, sigmas)


def count_per_rank(count: int, device: torch.device) -> Tensor:
    """The mean of a count over all processes, at least 1: divided by it, losses have the gradient of one GPU."""
    return mean_over_ranks(torch.tensor(float(count), device=device)).clamp(min=1)


def criterion(result: dict, people: list[People], sigmas: Tensor, cfg: Config, epoch: int) -> dict[str, Tensor]:
    """All weighted loss terms of a training forward, by name, to be summed; computed in float32.

    Per person:  score_weight·score + 10·Σ v|Δ| + 4·(1 − OKS), for the final poses (no suffix), the layers before
    (_0, _1, ...), the pre-poses (_pre), the selected cells (_enc_0) and the denoising queries (_dn_...). With FDR
    the poses of all but the last kind are paired by the union of all matchings. The score's loss, which the
    release calls vfl, is eq. 5 or a focal loss. No pairs give 0 with a zero gradient.
    Departs from the paper: it states only eq. 5; L1, OKS, their weights, matching and union are the release's.
    """
    everybody = gather_people(people)
    matchings = match(result["outputs"], people, sigmas)
    count = count_per_rank(len(everybody), sigmas.device)
    union = union_of_matches(matchings) if cfg.fdr else None
    union_count = count_per_rank(len(union[0]), sigmas.device) if cfg.fdr else count

    ksvf, losses = cfg.ksvf and epoch >= cfg.ksvf_from, {}

    def add(output: Output, score_pairs: Pairs, pose_pairs: Pairs, score_count: Tensor,
            pose_count: Tensor) -> None:
        logits, keypoints = output.logits.float(), output.keypoints.float()
        suffix = f"_{output.name}" if output.name else ""
        distance, similarity = pair_errors(keypoints, pose_pairs, everybody, sigmas)
        own = score_pairs is pose_pairs
        quality = similarity if own else pair_errors(keypoints, score_pairs, everybody, sigmas)[1]
        score = ksvf_loss(logits, score_pairs, quality) if ksvf else focal_loss(logits, score_pairs)
        losses[f"loss_vfl{suffix}"] = cfg.score_weight * score / score_count
        losses[f"loss_keypoints{suffix}"] = 10 * distance.sum() / pose_count
        losses[f"loss_oks{suffix}"] = 4 * (1 - similarity).sum() / pose_count

    for output, pairs in zip(result["outputs"], matchings, strict=True):
        add(output, pairs, union if cfg.fdr else pairs, count, union_count)
    if result["denoising"]:
        known, dn_count = result["denoising"].pairs, count * result["denoising"].groups
        for output in result["dn_outputs"]:
            add(output, known, known, dn_count, dn_count)
    return losses


# ---- Prediction ------------------------------------------------------------------------------------------


def postprocess(logits: Tensor, keypoints: Tensor, sizes_px: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Q best of all 2·Q (query, label) scores → scores, labels (B, Q), keypoints (B, Q, K, 2) in pixels.

    sizes_px (B, 2) width and height of the original images. No NMS, no threshold. Label 0 has low scores.
    """
    scores, index = logits.sigmoid().flatten(1).topk(logits.shape[1], dim=1)
    query = (index // 2)[..., None, None].expand(-1, -1, *keypoints.shape[2:])
    return scores, index % 2, keypoints.gather(1, query) * sizes_px[:, None, None]


@torch.no_grad()
def predict(model: DETRPose, batch: dict) -> list[Prediction]:
    """People of a batch {images (B, 3, H, W) in [0, 1], image_ids, sizes_px}: one Prediction per image.

    Keypoints have no score (App. B): each gets 1, with `keypoint_scores` an estimate. In float32 for any --amp.
    """
    device = next(model.parameters()).device
    images = batch["images"].to(device)
    result = model(images)
    sizes = torch.tensor(batch["sizes_px"], dtype=torch.float32, device=device)
    found, predictions = postprocess(result["logits"].float(), result["keypoints"].float(), sizes), []
    estimated = model.cfg.keypoint_scores
    sure = mirrored_scores(model, images, found, sizes) if estimated else torch.ones_like(found[2][..., 0])
    for image_id, *columns in zip(batch["image_ids"], *(t.cpu().numpy() for t in (*found, sure))):
        scores, _, keypoints, sure = (column[columns[1] == PERSON] for column in columns)
        predictions.append(Prediction(image_id, keypoints, sure, scores))
    return predictions


# ---- Data (Sec. 4.1): straight to a square, no padding, RGB in [0, 1], no further normalisation ----------


def to_people(sample: Sample) -> People:
    """A sample's people as fractions of its (w, h), boxes cxcywh; keypoints without label sit at 0."""
    width, height = sample.size
    scale = torch.tensor([width, height], dtype=torch.float32)
    keypoints, boxes = torch.from_numpy(sample.keypoints), torch.from_numpy(sample.boxes)
    visible = (keypoints[..., 2] > 0).float()
    corners = boxes / scale.repeat(2)
    return People(keypoints[..., :2] / scale * visible.unsqueeze(-1), visible,
                  torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1),
                  torch.from_numpy(sample.areas) / (width * height), image_id=sample.image_id)


class TrainImages(torch.utils.data.Dataset):
    """One epoch of augmented images; item i is (image (3, size, size), People, its id, why files were skipped).

    What happens to image i depends on (seed, epoch, i) alone. An unreadable file gives way to the next.
    """

    def __init__(self, data: PoseDataset, cfg: Config, epoch: int):
        self.data, self.cfg, self.epoch = data, cfg, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, People, int | str, list[str]]:
        cfg, epoch, flip = self.cfg, self.epoch, self.data.skeleton.flip
        rng = np.random.default_rng([cfg.seed, epoch, i])
        sample, skipped = self.data.load_readable(i)
        sample = transforms.shrink(sample, max(1280, 2 * cfg.size))         # zoom-out makes 16 pixels of one
        if cfg.aug_from <= epoch < cfg.mosaic_until and rng.random() < cfg.mosaic:
            others = [self.data.load_readable(j) for j in rng.integers(len(self.data), size=3).tolist()]
            sample = transforms.mosaic([sample, *(other for other, _ in others)], cfg.size // 2)
            skipped = sum((reasons for _, reasons in others), skipped)
        elif cfg.aug_from <= epoch < cfg.aug_until and rng.random() < cfg.zoom_out:
            ratio, (width, height) = rng.uniform(1, 2.5), sample.size
            x, y = int((ratio - 1) * width), int((ratio - 1) * height)
            sample = transforms.pad(sample, x, y, x, y)
        if flip is not None and rng.random() < 0.5:
            sample = transforms.hflip(sample, flip)
        if rng.random() < cfg.jitter:
            sample = replace(sample, image=transforms.color_jitter(sample.image, rng))
        sample = transforms.resize(transforms.filter_people(sample), (cfg.size, cfg.size))
        return transforms.to_tensor(sample.image), to_people(sample), sample.image_id, skipped


def input_side(cfg: Config, epoch: int, step: int) -> int:
    """The input size of a batch: a random multiple of 32, 0.75 to 1.25 of `size`, itself more often."""
    if not cfg.multiscale or epoch >= cfg.aug_until:
        return cfg.size
    multiples = range(max(32, cfg.size * 3 // 4 // 32 * 32), cfg.size * 5 // 4 + 1, 32)
    sides = [side for side in multiples if side != cfg.size] + [cfg.size] * cfg.multiscale
    return int(np.random.default_rng([cfg.seed, step]).choice(sides))


def input_image(image: Image.Image, size: int) -> Tensor:
    """A picture of any size as the network sees it: (3, size, size), aspect ratio not kept."""
    return transforms.to_tensor(image.resize((size, size), Image.Resampling.BILINEAR))


def evaluate(model: DETRPose, data: PoseDataset, cfg: Config, ranks: Ranks) -> tuple[dict, list[Prediction]]:
    """Metrics and predictions of a dataset; the images are shared among the processes, all get the result."""
    found = predict_all(partial(predict, fuse(model)), data, partial(input_image, size=cfg.size),
                        cfg.eval_batch, cfg.workers, ranks)
    return metrics.evaluate(found, data), found


# ---- Training (Sec. 4.1) ---------------------------------------------------------------------------------


def build_optimizer(model: DETRPose, cfg: Config) -> torch.optim.AdamW:
    """AdamW in two groups: the backbone learns at a rate of its own."""
    backbone = list(model.backbone.parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    groups = [dict(params=backbone, initial_lr=cfg.lr_backbone), dict(params=rest, initial_lr=cfg.lr)]
    return torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def lr_scale(step: int, steps: int, epoch: int, cfg: Config) -> float:
    """Factor on the learning rates at an optimiser step out of `steps`."""
    scale = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    if cfg.schedule == "cosine":
        scale *= 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return scale * (0.1 if cfg.drop_epoch and epoch >= cfg.drop_epoch else 1.0)


def train(cfg: Config, args) -> None:
    """Train, evaluate, keep all in the run folder. Runs alone or under torchrun; Ctrl-C saves and leaves."""
    ranks = init_ranks(args.device, cfg)
    if cfg.frozen_norm and not (cfg.init or args.saved):
        raise UserError(f"frozen norms need start weights: add --init hgnetv2-{cfg.backbone.lower()} (or another), "
                        "or --no-frozen_norm")
    data, held_out = open_splits(cfg, ranks)
    seed_all(cfg.seed)                                              # equal start weights on every process
    model = DETRPose(cfg, data.skeleton)
    if not args.saved:
        with rank_zero_first(ranks):                                # it fetches start weights
            start_weights(model, data)
    model.to(ranks.device, memory_format=torch.channels_last)
    average = Ema(model, cfg.ema, cfg.ema_warmup)
    optimizer = build_optimizer(model, cfg)
    fp16 = cfg.amp == "fp16" and ranks.device.type == "cuda"        # else the scaler is idle
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
    parts = dict(model=model, ema=average, optimizer=optimizer, scaler=scaler)
    run = Run("detrpose", cfg, args, ranks, data, held_out, parts)
    net, train_set = distribute(model, ranks), data.training()
    shown = ["loss_vfl", "loss_keypoints", "loss_oks"] + ["loss_heatmaps"] * bool(cfg.heatmap_weight)

    for epoch in run.epochs():
        net.train()
        if cfg.ksvf and 0 < epoch == cfg.ksvf_from:
            say("from now on scores learn OKS (eq. 5): loss_vfl jumps, because it is another loss")
        # micro-batches; a resumed run goes on in mid-epoch, unreadable files are reported
        for images, people in run.batches(TrainImages(train_set, cfg, epoch)):
            factor = lr_scale(run.step, run.steps, epoch, run.cfg)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            side = input_side(cfg, epoch, run.step)
            images = images.to(ranks.device, non_blocking=True, memory_format=torch.channels_last)
            if side != cfg.size:
                images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
            people = [one.to(ranks.device) for one in people]
            run.show_batch(images, people, side)                    # train_batch.png

            with autocast(ranks.device, cfg.amp):
                result = net(images, people)
            losses = criterion(result, people, model.sigmas, cfg, epoch)
            losses["unused"] = result["unused"]
            if cfg.heatmap_weight:                                  # an aid, see Config
                losses["loss_heatmaps"] = cfg.heatmap_weight * people_heatmap_loss(result["heatmaps"], people)
            scaler.scale(sum(losses.values()) / cfg.accum).backward()
            if run.more_micro_batches(losses):
                continue

            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(model.parameters(), cfg.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            average.update(model)
            if run.stepped(norm, shown):                   # logs, saves when due; True: asked to stop
                return

        if run.evaluates():
            run.record(*evaluate(average.module, held_out, cfg, ranks))


# ---- Tables ----------------------------------------------------------------------------------------------

EQUATIONS = {           # equation or section of the paper → where it stands here
    "eq. 1, inverted": noisy_pose, "eq. 1, evaluated": pair_errors, "eq. 2": noisy_pose, "eq. 3": noisy_pose,
    "eq. 4": noisy_pose, "eq. 5": ksvf_loss,
    "Sec. 3.1, KS ~ U": draw_noise, "Sec. 3.1, denoising queries": denoising_queries,
    "Sec. 3.2, positional queries": QuerySelection, "Sec. 3.2, content queries": DETRPose.content,
    "Sec. 3.2, instance query": with_centre, "Sec. 3.3, decoder layer": DecoderLayer,
    "Sec. 3.3, mask": denoising_mask, "Sec. 3.3, pre-pose and FDR": Decoder, "Sec. 3.3.1": PoseLQE,
    "Sec. 3.4": criterion, "Sec. 4.1": train,
}

# Rows of the paper's ablations: what, AP in the paper, flags of the paper's preset, flags of the tiny
# preset. Each adds to the one it is compared with (versus); the fifth loses AP there, too, until Pose-LQE
# joins it. Open in the paper, and assumed here: ImageNet start weights before the last row, the focal loss
# before KSVF, augmentation to the last of the 12 epochs.
NO_PARTS = "--no-pose_denoising --no-fdr --no-ksvf --no-pose_lqe"
TABLES = {"4": Table(
    "Ablation on COCO val, 12 epochs", preset="l", flags="--epochs 12", puppets="--epochs 2 --ksvf_from 1",
    metric="AP", rows=[
        Row("baseline: GroupPose with D-FINE's backbone and encoder, 100 queries", 61.2,
            f"--queries 100 {NO_PARTS} --init hgnetv2-b4", f"--queries 16 {NO_PARTS}"),
        Row("60 instance queries", 60.7, f"{NO_PARTS} --init hgnetv2-b4", NO_PARTS, versus=1),
        Row("+ pose denoising (Sec. 3.1)", 62.8, "--no-fdr --no-ksvf --no-pose_lqe --init hgnetv2-b4",
            "--pose_denoising --no-fdr --no-ksvf --no-pose_lqe", versus=2),
        Row("+ FDR heads", 64.4, "--no-ksvf --no-pose_lqe --init hgnetv2-b4",
            "--pose_denoising --no-ksvf --no-pose_lqe", versus=3),
        Row("+ KSVF loss (eq. 5)", 63.5, "--no-pose_lqe --init hgnetv2-b4",
            "--pose_denoising --no-pose_lqe", versus=4),
        Row("+ Pose-LQE head (Sec. 3.3.1)", 65.7, "--init hgnetv2-b4", "--pose_denoising", versus=5),
        Row("+ transfer learning: D-FINE's start weights", 67.5, "", None, versus=6, default=True,
            missing="needs D-FINE's weights, which do not fit the tiny preset")])}

# Departures. Each: what: paper | release | here | why ("weights": the released ones need it; "recipe":
# training alone, as the release does)
#
# eq. 2, n⃗: random unit vector | norm over the wrong axis: right and down, dozens long | paper, or
#     --as_released | after two epochs of puppets AP 0.230 with the paper's, 0.059 with the release's
# Sec. 3.1, KS: uniform | −ln KS is uniform | release | recipe
# Sec. 3.1, labels of noisy queries: – | a quarter replaced at random (DN-DETR) | release | recipe
# Sec. 3.2, a noisy person's point: mean of the keypoints | (cx, cy, w, h) read as corners | centre of the
#     true box, or --as_released | the release's is no point of the person; unlabelled keypoints sit at (0,
#     0) and would pull the mean
# Sec. 3.2, content: one learned query a person | rank on keypoint tokens, one instance token | release |
#     weights
# Sec. 3.2, positional queries: N (k + 1) | the instance token has a reference point and no position |
#     release | weights
# Sec. 3.2, cells at the edge: – | blanked, but still compete | release | weights
# Sec. 3.3, mask: positives, negatives, predictions apart | a group sees itself and all matching queries |
#     release | recipe
# Sec. 3.3, position: – | added in place: values, residuals and h_{l−1} have it, too | release | weights
# Sec. 3.3, after the cross-attention: – | D-FINE's gate | release; --no-fdr: a norm | weights
# Sec. 3.3.1: top-k values, one layer | four values and their mean, two layers | release | weights
# Fig. 3, keypoints visible or missing: yes; App. B: no | not predicted | not predicted | –
# eq. 5, q: KS of a keypoint | OKS of the person | release | recipe; a query has one score
# Sec. 3.4, other losses: – | L1 10, OKS 4, score 2, Hungarian matching, union of matches | release | recipe
# Sec. 3.4, ties in the union: – | any | the first of equals | runs repeat
# OKS in the losses: – | of fractions, also of a stretched picture | release | recipe
# Table 4, loss of the scores without KSVF: – | a focal loss, switched off | that focal loss | –
# batch without people: – | crashes | no denoising queries | –
# micro-batches: – | gradients added | averaged, each divided by its own people and pairs | the size of the
#     union is known only after a forward pass, so --accum 2 is not exactly the gradient of the batch;
#     clipping hides the release's factor
# Sec. 4.1, augmentation: flip, colour, mosaic, multi-scale | and zoom-out | release | recipe
# Table 1, epochs of S, M, L, X: 96, 60, 48, 48 | 100, 64, 52, 52, the last 4 without mosaic, zoom-out and
#     multi-scale | release | recipe. CrowdPose (Sec. 4.2.2): S 150, X 80 | 176, 52
# Tables 2 and 5, parameters of S to X: 11.9, 23.5, 36.8, 82.3 M | 11.5, 20.8, 32.8, 73.3 M | release | it
#     counts what is deployed
# Sec. 4.1, start weights: D-FINE on Objects365 | n: on COCO, there is no other | release | recipe
# --init with D-FINE: – | takes `model` | takes the average where there is one | it is what D-FINE evaluates
# sampling points of n: – | all points of a head start in one place | along rays | equal points stay equal

# ---- Appendix: borrowed parts, released names, start weights, summary. Not needed on a first reading. ----

# HGNetv2, as in D-FINE: channels (in the stem, out of it), then per stage (in, middle, out, blocks, layers)
BACKBONES = {
    "B0": ((16, 16), [(16, 16, 64, 1, 3), (64, 32, 256, 1, 3), (256, 64, 512, 2, 3), (512, 128, 1024, 1, 3)]),
    "B2": ((24, 32), [(32, 32, 96, 1, 4), (96, 64, 384, 1, 4), (384, 128, 768, 3, 4), (768, 256, 1536, 1, 4)]),
    "B4": ((32, 48), [(48, 48, 128, 1, 6), (128, 96, 512, 1, 6), (512, 192, 1024, 3, 6), (1024, 384, 2048, 1, 6)]),
    "B5": ((32, 64), [(64, 64, 128, 1, 6), (128, 128, 512, 2, 6), (512, 256, 1024, 5, 6), (1024, 512, 2048, 2, 6)]),
}


class LearnableAffine(nn.Module):
    """y = scale·x + bias with two learned numbers for the whole map (LAB of PP-HGNetv2)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


class ConvNorm(nn.Module):
    """Convolution without bias, norm, activation. (B, in, H, W) → (B, out, H/stride, W/stride).

    `fold` turns convolution and norm into one convolution with a bias: equal results for inference.
    """

    def __init__(self, channels_in: int, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1,
                 act: type[nn.Module] | None = None, frozen: bool = False, lab: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        self.norm = FrozenBatchNorm(channels) if frozen else nn.BatchNorm2d(channels)
        self.act = act() if act else nn.Identity()
        self.lab = LearnableAffine() if lab and act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.lab(self.act(self.norm(self.conv(x))))

    def fold(self) -> None:
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        self.conv.weight.mul_(scale[:, None, None, None])
        shift = self.norm.bias - self.norm.running_mean * scale
        # a frozen norm's constants are no parameters, so neither is what they become
        self.conv.bias = nn.Parameter(shift, requires_grad=not isinstance(self.norm, FrozenBatchNorm))
        self.norm = nn.Identity()


class LightConv(nn.Module):
    """1×1 convolution without activation, then a depth-wise k×k one: the cheap unit of the late stages."""

    def __init__(self, channels_in: int, channels: int, kernel: int, **kind):
        super().__init__()
        self.conv1 = ConvNorm(channels_in, channels, frozen=kind["frozen"])
        self.conv2 = ConvNorm(channels, channels, kernel, groups=channels, act=nn.ReLU, **kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class Stem(nn.Module):
    """(B, 3, H, W) → (B, out, H/4, W/4): a convolution path beside a max-pool, concatenated."""

    def __init__(self, middle: int, out: int, **kind):
        super().__init__()
        kind = dict(act=nn.ReLU, **kind)
        self.stem1 = ConvNorm(3, middle, 3, 2, **kind)
        self.stem2a = ConvNorm(middle, middle // 2, 2, **kind)
        self.stem2b = ConvNorm(middle // 2, middle, 2, **kind)
        self.stem3 = ConvNorm(2 * middle, middle, 3, 2, **kind)
        self.stem4 = ConvNorm(middle, out, 1, **kind)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.stem1(x), (0, 1, 0, 1))             # 2×2 kernels shrink the map: pad right and bottom
        path = self.stem2b(F.pad(self.stem2a(x), (0, 1, 0, 1)))
        pool = F.max_pool2d(x, 2, stride=1)
        return self.stem4(self.stem3(torch.cat([pool, path], 1)))


class HGBlock(nn.Module):
    """A chain of units whose outputs are all kept, concatenated with the input, and squeezed twice."""

    def __init__(self, channels_in: int, middle: int, out: int, layers: int, light: bool, residual: bool, **kind):
        super().__init__()
        widths = [channels_in] + [middle] * (layers - 1)
        self.layers = nn.ModuleList(
            LightConv(w, middle, 5, **kind) if light else ConvNorm(w, middle, 3, act=nn.ReLU, **kind) for w in widths)
        self.aggregation = nn.Sequential(
            ConvNorm(channels_in + layers * middle, out // 2, act=nn.ReLU, **kind),
            ConvNorm(out // 2, out, act=nn.ReLU, **kind))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        y = self.aggregation(torch.cat(maps, 1))
        return x + y if self.residual else y


class Stage(nn.Module):
    def __init__(self, index: int, channels_in: int, middle: int, out: int, blocks: int, layers: int, **kind):
        super().__init__()
        self.downsample = (ConvNorm(channels_in, channels_in, 3, 2, groups=channels_in, frozen=kind["frozen"])
                           if index > 0 else nn.Identity())
        self.blocks = nn.Sequential(*(
            HGBlock(out if b else channels_in, middle, out, layers, light=index >= 2, residual=b > 0, **kind)
            for b in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class HGNetv2(nn.Module):
    """Image (B, 3, H, W) → the last `levels` maps of stride 4, 8, 16, 32. H and W divisible by 32."""

    def __init__(self, name: str, levels: int, frozen: bool, lab: bool):
        super().__init__()
        (middle, out), stages = BACKBONES[name]
        self.stem = Stem(middle, out, frozen=frozen, lab=lab)
        self.stages = nn.ModuleList(Stage(i, *widths, frozen=frozen, lab=lab) for i, widths in enumerate(stages))
        self.channels = [widths[2] for widths in stages][-levels:]

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-len(self.channels):]


# Hybrid encoder (D-FINE): attention on the coarsest map, then convolutions top-down and bottom-up.


class AIFI(nn.Module):
    """One post-norm transformer layer over the cells of the coarsest map, (B, C, H, W) → (B, C, H, W)."""

    def __init__(self, dim: int, heads: int, ffn: int):
        super().__init__()
        self.self_attn = SelfAttention(dim, heads)
        self.linear1, self.linear2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        row, column = torch.meshgrid(torch.arange(1, height + 1, device=x.device) / (height + 1e-6),
                                     torch.arange(1, width + 1, device=x.device) / (width + 1e-6), indexing="ij")
        position = sine_embedding(torch.stack([column, row], -1).flatten(0, 1), x.shape[1], temperature=20)
        x = rearrange(x, "b c h w -> b (h w) c")
        x = self.norm1(x + self.self_attn(x, position.to(x.dtype)))
        x = self.norm2(x + self.linear2(F.gelu(self.linear1(x))))
        return rearrange(x, "b (h w) c -> b c h w", h=height)


class RepBottleneck(nn.Module):
    """SiLU of a 3×3 plus a 1×1 convolution, each with its norm: two branches to train, one to run (`merge`)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(dim, dim, 3), ConvNorm(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv1(x) if self.conv2 is None else self.conv1(x) + self.conv2(x))

    def merge(self) -> None:
        """After `ConvNorm.fold` of both: the 1×1 kernel is the middle of a 3×3 one."""
        self.conv1.conv.weight.add_(F.pad(self.conv2.conv.weight, (1, 1, 1, 1)))
        self.conv1.conv.bias.add_(self.conv2.conv.bias)
        self.conv2 = None


class CSPLayer(nn.Module):
    def __init__(self, channels_in: int, out: int, depth: int):
        super().__init__()
        self.conv1, self.conv2 = ConvNorm(channels_in, out, act=nn.SiLU), ConvNorm(channels_in, out, act=nn.SiLU)
        self.bottlenecks = nn.Sequential(*(RepBottleneck(out) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.bottlenecks(self.conv1(x)) + self.conv2(x)


class FusionBlock(nn.Module):
    """Two maps concatenated (B, 2C, H, W) → (B, C, H, W); D-FINE's RepNCSPELAN4."""

    def __init__(self, dim: int, expansion: float, depth: int):
        super().__init__()
        narrow = round(expansion * dim // 2)
        self.cv1 = ConvNorm(2 * dim, 2 * dim, act=nn.SiLU)
        self.cv2 = nn.Sequential(CSPLayer(dim, narrow, depth), ConvNorm(narrow, narrow, 3, act=nn.SiLU))
        self.cv3 = nn.Sequential(CSPLayer(narrow, narrow, depth), ConvNorm(narrow, narrow, 3, act=nn.SiLU))
        self.cv4 = ConvNorm(2 * dim + 2 * narrow, dim, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.cv1(x).chunk(2, 1))
        maps.append(self.cv2(maps[-1]))
        maps.append(self.cv3(maps[-1]))
        return self.cv4(torch.cat(maps, 1))


class HybridEncoder(nn.Module):
    """Backbone maps, fine to coarse → as many maps of C channels: the decoder's memory."""

    def __init__(self, channels: list[int], cfg: Config):
        super().__init__()
        dim, steps = cfg.dim, range(len(channels) - 1)
        self.input_proj = nn.ModuleList(ConvNorm(c, dim) for c in channels)
        self.aifi = AIFI(dim, cfg.heads, cfg.encoder_ffn)
        self.lateral_convs = nn.ModuleList(ConvNorm(dim, dim, act=nn.SiLU) for _ in steps)
        self.fpn_blocks = nn.ModuleList(FusionBlock(dim, cfg.expansion, cfg.depth) for _ in steps)
        self.downsample_convs = nn.ModuleList(
            nn.Sequential(ConvNorm(dim, dim), ConvNorm(dim, dim, 3, 2, groups=dim)) for _ in steps)
        self.pan_blocks = nn.ModuleList(FusionBlock(dim, cfg.expansion, cfg.depth) for _ in steps)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [project(x) for project, x in zip(self.input_proj, maps)]
        maps[-1] = self.aifi(maps[-1])

        top_down = [maps.pop()]                                            # coarse to fine
        for lateral, fuse_block in zip(self.lateral_convs, self.fpn_blocks):
            top_down[-1] = lateral(top_down[-1])                           # also what the way back up gets
            coarse = F.interpolate(top_down[-1], scale_factor=2.0, mode="nearest")
            top_down.append(fuse_block(torch.cat([coarse, maps.pop()], 1)))

        out = [top_down.pop()]                                             # fine to coarse
        for down, fuse_block in zip(self.downsample_convs, self.pan_blocks):
            out.append(fuse_block(torch.cat([down(out[-1]), top_down.pop()], 1)))
        return out


# Inference, building, the released weights.


@torch.no_grad()
def fuse(model: DETRPose) -> DETRPose:
    """A copy for inference: norms folded into convolutions, two-branch blocks merged, quality heads of
    earlier layers and heatmaps dropped; embeddings of noisy queries stay, because the release counts them.
    """
    model = copy.deepcopy(model).eval()
    model.heatmaps = None
    for module in [m for m in model.modules() if isinstance(m, ConvNorm)]:
        module.fold()
    for module in [m for m in model.modules() if isinstance(m, RepBottleneck)]:
        module.merge()
    model.decoder.lqe_heads = model.decoder.lqe_heads[-1:]
    return model.to(memory_format=torch.channels_last)


def mirrored_scores(model: DETRPose, images: Tensor, found: tuple[Tensor, Tensor, Tensor], sizes_px: Tensor) -> Tensor:
    """An estimate, ours, of how sure a keypoint of `postprocess` is: (B, Q, K) from 0 to 1, of a second pass.

    The person's score times KS (eq. 1; s² is the pose's box) of the keypoint and that of the most similar pose in the
    mirrored images. FDR's distributions stay nearly uniform, and their spread ranks no errors. UserError without sides.
    """
    if model.skeleton.flip is None:
        raise UserError("keypoint_scores compares with the mirrored picture: left and right are not clear from the names")
    result, (scores, _, keypoints) = model(images.flip(-1)), found
    other = result["keypoints"].float()[:, :, list(model.skeleton.flip)]
    other = torch.stack([1 - other[..., 0], other[..., 1]], -1) * sizes_px[:, None, None]
    area = (keypoints.amax(2) - keypoints.amin(2)).prod(-1)[..., None, None] + 1
    squared = (keypoints[:, :, None] - other[:, None]).square().sum(-1)                   # (B, Q, Q, K)
    similarity = (-squared / (2 * area * (2 * model.sigmas) ** 2)).exp()
    best = similarity.mean(-1).argmax(2)[..., None, None].expand(-1, -1, 1, similarity.shape[-1])
    return scores[..., None] * similarity.gather(2, best).squeeze(2)


def to_batch(pictures: list[Image.Image], image_ids: list, cfg: Config) -> dict:
    """RGB pictures of any size → what `predict` takes."""
    return dict(images=torch.stack([input_image(picture, cfg.size) for picture in pictures]), image_ids=image_ids,
                sizes_px=[picture.size for picture in pictures])


def exported(model: DETRPose) -> Exported:
    """What goes into the file of eval.py --export."""
    def run(images: Tensor) -> dict[str, Tensor]:
        result = model(images)
        return dict(logits=result["logits"], keypoints=result["keypoints"])

    return Exported(
        run, lambda batch: dict(images=batch["images"]),
        before=f"images: RGB, resized to {model.cfg.size} x {model.cfg.size} whatever their shape (Pillow's bilinear "
               "filter, which antialiases), divided by 255",
        after="score of a person = sigmoid(logits[..., 1]); keypoints (x, y) times the picture's width and height")


RENAME = [            # released name → ours, first match wins; what matches nothing keeps its name
    (r"^(?:backbone\.)?(stem|stages)\.(.*)\.bn\.", r"backbone.\1.\2.norm."),
    (r"^(stem|stages)\.", r"backbone.\1."),
    (r"^encoder\.encoder\.0\.layers\.0\.", "encoder.aifi."),
    (r"^encoder\.downsample_convs\.(\d)\.0\.cv1\.", r"encoder.downsample_convs.\1.0."),
    (r"^encoder\.downsample_convs\.(\d)\.0\.cv2\.", r"encoder.downsample_convs.\1.1."),
    (r"^transformer\.lqe_embed\.(\d+)\.reg_conf\.", r"decoder.lqe_heads.\1.mlp."),
    (r"^transformer\.decoder\.half_pose_ref_point_head\.", "decoder.position_head."),
    *((rf"^transformer\.{theirs}\.", f"{ours}.") for theirs, ours in dict(
        enc_output_norm="selection.norm", enc_output="selection.project", enc_out_class_embed="selection.score",
        enc_pose_embed="selection.pose", class_embed="decoder.score_heads", pose_embed="decoder.pose_heads",
        pre_pose_embed="decoder.pre_pose_head", tgt_embed="rank_content", keypoint_embedding="keypoint_content",
        instance_embedding="instance_content", label_enc="noisy_label", pose_enc="noisy_keypoint").items()),
    (r"^transformer\.", ""),
]
IGNORED = {r"^transformer\.(anchors|valid_mask)$": "computed from the image size",
           r"^transformer\.decoder\.dim_t$": "a constant of the sine embedding"}


def convert_official(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Tensors of a released checkpoint under this file's names. Raises UserError if they are of another size."""
    state = {name: value for name, value in state.items()
             if not any(re.match(pattern, name) for pattern in IGNORED)}
    for name, expected in dict(up=0.5, reg_scale=config.reg_scale).items():
        value = state.pop(f"transformer.{name}", None)
        if value is not None and float(value) != expected:
            raise UserError(f"the weights have {name} {float(value):g}, this preset {expected:g}: "
                                    "choose another --preset")
    return weights.rename(state, RENAME)


def build(preset: str, skeleton: str | Skeleton = "coco", **overrides) -> DETRPose:
    """A model with start weights; overrides are Config fields."""
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(PRESETS)}")
    return DETRPose(resolve(PRESETS[preset], **overrides), get_skeleton(skeleton))


def recognise(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(preset, number of keypoints) of a released DETRPose checkpoint, by its tensors; None of something else."""
    if "transformer.pre_pose_embed.layers.0.weight" not in state:
        return None
    keypoints, dim = state["transformer.keypoint_embedding.weight"].shape
    stem = len(state["backbone.stem.stem4.conv.weight"])
    sizes = {(BACKBONES[cfg.backbone][0][1], cfg.dim): preset for preset, cfg in PRESETS.items() if "-" not in preset}
    return (sizes[stem, dim], keypoints) if (stem, dim) in sizes else None


def start_weights(model: DETRPose, data: PoseDataset) -> None:
    """What a fresh run starts from, beside its random weights."""
    if model.cfg.mean_pose:
        start_from_mean_pose(model.selection, data)
    if model.cfg.init:
        load_init(model, model.cfg.init)


KEYPOINT_ROWS = {r"^selection\.pose\.layers\.3\.": 0, r"^(keypoint_content|noisy_keypoint)\.": 0,      # see carry_rows
                 r"^decoder\.lqe_heads\.\d\.mlp\.layers\.0\.weight": 1, r"^heatmaps\.head\.": 0}
OPTIONAL = {r"^heatmaps\.": "of an auxiliary loss", r"num_batches_tracked$": "frozen norms have none"}


def load_init(model: DETRPose, source: str) -> None:
    """Start weights by file or name: DETRPose (all, of any keypoints), D-FINE (backbone and encoder) or HGNetv2
    (backbone).

    Departs from the release: of a D-FINE checkpoint it is the average that is taken.
    Raises UserError for tensors that do not fit.
    """
    start = weights.read_start(source, "detrpose")
    state = start.state if start.run else convert_official(start.state, model.cfg)
    if "selection.pose.layers.0.weight" in state:
        return weights.load_start(model, start, state, KEYPOINT_ROWS, OPTIONAL)
    own = model.state_dict()
    chosen = {name: value for name, value in state.items() if name.startswith(("backbone.", "encoder.")) and name in own}
    bad = [f"{name} {tuple(v.shape)} against {tuple(own[name].shape)}" for name, v in chosen.items()
           if v.shape != own[name].shape]
    if bad or not chosen:
        raise UserError(f"{start.path} does not fit this model: " + ("; ".join(bad[:5]) or "no tensor of its names"))
    model.load_state_dict(chosen, strict=False)
    say(f"start weights from {start.path}: {len(chosen)} of {len(own)} tensors")


@torch.no_grad()
def start_from_mean_pose(selection: QuerySelection, data: PoseDataset, people: int = 1000) -> None:
    """Let the first poses be the mean pose around a cell, instead of all keypoints in its centre.

    Ours, for training from nothing. A point has OKS 0, and eq. 5 rewards a cell by the OKS of its pose: without
    pre-training, the cell on the person would first have to grow a pose that nobody asks it for.
    """
    poses = []
    for i in range(len(data)):
        sample = data[i]
        for keypoints in sample.keypoints[(sample.keypoints[..., 2] > 0).all(1)]:
            poses.append((keypoints[:, :2] - keypoints[:, :2].mean(0)) / sample.size)
        if len(poses) >= people:
            break
    if not poses:
        say("--mean_pose: nobody has all keypoints labelled, so first poses start as points")
        return
    # σ has slope 1/4 in the middle of the image
    selection.pose.layers[-1].bias.copy_(4 * torch.from_numpy(np.mean(poses, 0)).flatten())


@torch.no_grad()
def show_process(model: DETRPose, image: Image.Image, threshold: float) -> dict[str, list[Image.Image]]:
    """For eval.py --process, of people above the threshold, nothing if there are none: `selected`, the cells that
    queries start from; `layers`, poses layer by layer; and of the surest person's keypoint that moves most in the
    layers `sampling`, where it looks, and with FDR `distributions`, its offset along the axis on which it moves.
    """
    decoder, cfg, names, size = model.decoder, model.cfg, model.skeleton.keypoints, np.array(image.size)
    looking = [layer.cross_attn for layer in decoder.layers]
    layers, offsets = len(looking), [one.sampling_offsets for one in looking]
    with watch(first=[model.selection], z=decoder.pose_heads, offsets=offsets,
               shares=[one.attention_weights for one in looking]) as seen:
        result = model(input_image(image, cfg.size)[None].to(model.sigmas.device))
    scores = result["logits"][0, :, PERSON].sigmoid().cpu().numpy()
    rows = np.flatnonzero(scores >= threshold)
    if not len(rows):
        return {}
    decoded, (_, first, index) = result["decoded"], seen["first"][0]
    shapes = [tuple(x.shape[-2:]) for x in result["maps"]]
    poses = [first, *([decoded["pre_keypoints"]] if "pre_keypoints" in decoded else []), *decoded["keypoints"]]
    poses = [pose[0].cpu().numpy() * size for pose in poses]                                        # (Q, K, 2) px
    said = ["of the selected cells", "before refinement (pre-pose)"][:len(poses) - layers]
    said += [f"of decoder layer {layer} of {layers}" for layer in range(1, layers + 1)]
    frames = [draw.captioned(draw.draw_people(image, pose[rows], None, model.skeleton, person_scores=scores[rows]),
                             f"poses {what}") for pose, what in zip(poses, said)]
    centres = cell_anchors(shapes, index.device)[0][0, index[0]].sigmoid().cpu().numpy() * size
    dots = draw.draw_points(image, centres, np.isin(np.arange(len(centres)), rows).astype(float))
    selected = f"the cells that the {len(centres)} queries start from; large: those that become people"

    best = rows[scores[rows].argmax()]
    moved = np.abs(poses[-1][best] - poses[-1 - layers][best])                                      # (K, 2)
    k, axis = (int(place) for place in np.unravel_index(moved.argmax(), moved.shape))
    looks, references = [], [with_centre(first), *decoded["references"]]
    cells = torch.tensor([(w, h) for h, w in shapes], device=index.device)
    for l, (offsets, shares) in enumerate(zip(seen["offsets"], seen["shares"])):
        token = best * (1 + len(names)) + 1 + k
        offsets = rearrange(offsets[0, token], "(m l p xy) -> m p l xy", m=cfg.heads, l=cfg.levels, xy=2) / cells
        places = (references[l][0, best, 1 + k] + offsets).cpu().numpy() * size
        shares = rearrange(shares[0, token], "(m t) -> m t", m=cfg.heads).softmax(-1)
        shares = rearrange(shares, "m (l p) -> (m p l)", l=cfg.levels).cpu().numpy()
        dotted = draw.draw_points(image, places.reshape(-1, 2), shares / shares.max())
        looks.append(draw.captioned(dotted, f"where {names[k]} of the surest person looks in layer {l + 1}"))
    shown = dict(selected=[draw.captioned(dots, selected)], layers=frames, sampling=[draw.contact_sheet(looks, 3)])
    if cfg.fdr:
        z = torch.stack(seen["z"])[:, 0, best, k].unflatten(-1, (2, -1))[:, axis].cumsum(0)         # (D, 33)
        chance = z.float().softmax(-1).cpu().numpy()
        offset = decoder.offset_values.cpu().numpy() / cfg.reg_scale * size[axis]                   # pixels
        near = np.flatnonzero((chance > 0.002).any(0))
        lines = {str(l): list(zip(offset[near], row[near])) for l, row in enumerate(chance, 1)}
        panel = draw.draw_panel("", lines, offset[near[0]], offset[near[-1]] + 1e-6, "pixels")
        shown["distributions"] = [draw.captioned(panel, f"{names[k]}'s {'xy'[axis]}: distribution of its offset from the "
                                                 "pre-pose, layer by layer")]
    return shown


def summary(skeleton: str = "coco") -> str:
    """Parameters and GFLOPs (2 per multiply-add, one image, as deployed) of each preset."""
    rows = [f"{'preset':8}{'input':>7}{'parameters':>13}{'deployed':>11}{'GFLOPs':>9}"]
    for preset in ("tiny", "n", "s", "m", "l", "x"):
        model = build(preset, skeleton).eval()
        fast, side = fuse(model), model.cfg.size
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            fast(torch.zeros(1, 3, side, side))
        full, deployed = (weights.count_parameters(m) / 1e6 for m in (model, fast))
        rows.append(f"{preset:8}{side:>7}{full:>11.2f} M{deployed:>9.2f} M{counter.get_total_flops() / 1e9:>9.1f}")
    return "\n".join(rows)


def main() -> None:
    run_method(Config, PRESETS, __doc__, train, summary, partial(run_tables, TABLES))


if __name__ == "__main__":
    main()
