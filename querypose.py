"""QueryPose: sparse multi-person pose regression via spatial-aware part-level queries (NeurIPS 2022).

Idea     A fixed number of learned boxes and queries, at most one person each, is refined in six stages: no
         anchors and no NMS. A pose is not read from one query but from seven part queries. For each part a
         convolution draws an attention map over the features in the person's box. What the map gathers
         updates the part's query, from which the few keypoints of the part and their uncertainty are read.
Flow     image (B,3,H,W) → ResNet-50, HRNet or Swin-L → neck → maps of stride 4, 8, 16, 32 → 6 ×
         [BoxStage: boxes (B,Q,4), logits (B,Q) → KeypointStage in each box: keypoints, sigmas (B,Q,K,2)]
Read     BoxStage (eq. 1) → SPEGM (Sec. 3.2) → SIM (eq. 3) → KeypointStage (eq. 2) → QueryPose.forward
         → likelihood_loss (eq. 4) → criterion → train
Letters  B images  Q person queries (the paper's N)  R = B·Q rows, a box each  K keypoints  M parts
         S stages  P people of an image, or of the batch  N matched pairs of a query and a person
         C (d), D (d_p) channels of an instance query, of a part query  h, w height and width of a map
         P_2 the map of stride 4  n cells along a side of a box's features (`pose_roi`)
         Q_I instance queries (B,Q,C)  Q_P part queries (R,M,D)  E_P part embeddings (R,M,D)
         A attention maps (R,M,4n²)  μ̂ keypoints and σ̂ deviations, relative to the box  C̄ class score
Units    boxes are x1, y1, x2, y2 in pixels of the network's input, never clipped; keypoints of the model are
         relative to the box of their stage: 0 its centre, ±0.5 its sides; `People` are pixels of the input
Forms    full (Fig. 3b), the paper's: the keypoint decoder updates the instance query, for the next box stage.
         Light (`--no-full`, Fig. 3a): it leaves the query as it is; the released weights, all of HRNets,
         are of this form
Tables   at the end of the main text: equation → function, the rows of the paper's tables, departures from
         paper and release

    python querypose.py                                 what each preset is: parameters, GFLOPs
    python querypose.py --train                         learn puppets, synthetic people drawn on first use
    python querypose.py --train --data data/coco --preset hrnet_w32-full --init pose_hrnet_w32_384x288.pth
    python eval.py querypose-hrnet_w32 --images photo.jpg       the authors' weights on your photo
    python eval.py runs/<run> --images photo.jpg --process      and where the parts look, how sure they are
"""
from __future__ import annotations

import copy
import math
import re
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
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from common import draw, metrics, records, transforms, weights
from common.cli import RunConfig, check_choice, check_range, parse_numbers, resolve, run_method
from common.datasets import PoseDataset
from common.errors import UserError
from common.export import RESIZED, Exported
from common.nets.hrnet import HRNet
from common.nets.resnet import ConvNorm, ResNet
from common.nets.swin import Swin
from common.predict import predict_all, watch
from common.ranks import Ranks, autocast, distribute, init_ranks, mean_over_ranks, rank_zero_first, seed_all
from common.records import Prediction, Sample, gather_people
from common.run import Ema, Run
from common.skeletons import SIDES, Skeleton, get_skeleton, words
from common.splits import open_crowd, open_splits
from common.tables import Row, Table, run_tables
from kernels.dispatch import plain

# ---- Configuration: every number of the paper. Each field is a flag, its comment the flag's help. ---------

RESNETS = {"r50": (64, (3, 4, 6, 3)), "r26": (24, (2, 2, 2, 2))}      # width of res2, blocks in res2 to res5
HRNETS = {"hrnet_w32": 32, "hrnet_w48": 48}
INTERACTIONS = ("spegm", "mhsa", "channel", "spatial", "pool")
UPDATES = ("sim", "sum", "concat", "none")
AT_INFERENCE = ("prune",)              # fields that `eval.py --set` may change


@dataclass(frozen=True)
class Config(RunConfig):       # which adds data, accum (micro-batches), amp, processes, workers, eval_*, seed
    # model (Sec. 3; numbers without a source are the release's)
    backbone: str = "r50"          # r50, hrnet_w32, hrnet_w48, swin_l (Table 4), or the narrow r26 of tiny
    frozen_norm: bool = True       # the backbone's batch norms are constants; off to train from scratch
    freeze: bool = True            # a ResNet's stem and first stage stay as they start
    dim: int = 256                 # C, channels of maps and instance queries
    heads: int = 8                 # attention heads; divides dim and part_dim
    ffn: int = 2048                # hidden width of the feed-forward blocks
    dynamic: int = 64              # inner width of dynamic MLPs
    stages: int = 6                # S, box and keypoint stages (Sec. 3.1)
    queries: int = 100             # Q, people at most (Sec. 4.1)
    box_roi: int = 7               # cells along a side of a box's features for the box stage (Sec. 3.1)
    pose_roi: int = 14             # the same for the keypoint stage (Sec. 3.1)
    convs: int = 6                 # stacked 3×3 convolutions of the keypoint stage (Sec. 3.2 has no number)
    conv_width: int = 512          # channels between those convolutions
    # the paper's ablations (Tables 1 to 3); the defaults are its model
    full: bool = True              # keypoint stages update the instance query (Fig. 3b); off: the light form
    iterate: bool = True           # box stages get the updated query; off: Fig. 3a read otherwise (Table 3)
    query: str = "part"            # what looks at the box's features: part, or one instance query (Table 1)
    interaction: str = "spegm"     # spegm, mhsa, dynamic MLP: channel or spatial (Table 1), pool (Table 2b)
    update: str = "sim"            # how part queries go from stage to stage: sim, sum, concat, none (Table 2a)
    part_dim: int = 128            # D, channels of a part query (Table 2c)
    scheme: str = "c"              # parts (Fig. 4, Table 2d): a keypoints, b head in one, c seven, d five
    init: str = "resnet50"         # start weights: run, file or name; QueryPose, or a ResNet, HRNet or Swin
    # optimisation (Sec. 4.1: AdamW, rates, batch, 280k steps over COCO's 56,599 images; last three: release)
    epochs: int = 79               # passes over the training images; 40 are the 1× schedule of the ablations
    drop_epochs: str = "62,74"     # learning rate ×0.1 from each of these epochs on (220k, 260k); 1×: 31,37
    batch: int = 16                # images per optimiser step, over all GPUs and micro-batches
    lr: float = 2.5e-5             # learning rate
    lr_backbone: float = 2.5e-5    # learning rate of the backbone
    lr_flow: float = 2.5e-4        # learning rate of the flow
    weight_decay: float = 1e-4     # AdamW, on every parameter
    warmup: int = 1000             # optimiser steps of linear warm-up
    clip: float = 1.0              # largest L2 norm of the gradient
    # pictures (Sec. 4.1)
    short_side: int = 800          # pixels of an image's shorter side, unless the longer gets too long
    long_side: int = 1333          # pixels of the longer side at most (release)
    multiscale: bool = True        # short sides of 0.6 to 1 of that, half of the time after a random crop
    # who gets a pose (where all queries do, the AP of boxes is computed, too)
    prune: bool = True             # AP from poses that can be among the 20 best; not with --full --iterate
    matched: bool = False          # train on poses of matched queries alone; not with --full --iterate
    # aids to learn from scratch: ours, not the paper's; the presets of the paper do without them
    spread: bool = False           # boxes start spread out, of half the image's size; off: as the whole image
    schedule: str = "constant"     # constant or cosine
    ema: float = 0.0               # decay of the weight average that is evaluated; 0: the weights themselves
    ema_warmup: int = 0            # optimiser steps over which the decay grows to that

    def __post_init__(self):
        """Raises UserError for values that no run could use."""
        super().__post_init__()
        check_choice(self, backbone=(*RESNETS, *HRNETS, "swin_l"), query=("part", "instance"),
                     interaction=INTERACTIONS, update=UPDATES, scheme="abcd", schedule=("constant", "cosine"))
        check_range(self, 1, math.inf, "dim heads ffn dynamic stages queries box_roi pose_roi convs "
                    "conv_width part_dim epochs batch short_side long_side")
        check_range(self, 1e-6, math.inf, "lr lr_flow clip")
        check_range(self, 0, math.inf, "lr_backbone weight_decay warmup ema_warmup")
        check_range(self, 0, 1, "ema")
        parse_numbers(self.drop_epochs)
        for name in ("dim", "part_dim"):
            if getattr(self, name) % self.heads:
                raise UserError(f"--{name} {getattr(self, name)} does not split over {self.heads} heads: "
                                f"choose a multiple of {self.heads}")
        if self.matched and self.full and self.iterate:
            raise UserError("--matched: with --full --iterate the boxes depend on the poses of all queries; "
                            "add --no-full or --no-iterate")


def _presets() -> dict[str, Config]:
    """Backbones of Table 4. Without a suffix, r50 and swin_l have the paper's full form, the HRNets the light
    one of their released weights; -full and -light are the others."""
    r50 = Config(eval_batch=1)                                  # padding would move the results a little
    w32 = replace(r50, backbone="hrnet_w32", frozen_norm=False, freeze=False, full=False,
                  init="pose_hrnet_w32_384x288.pth")            # heatmap pre-training (Sec. 4.3)
    w48 = replace(w32, backbone="hrnet_w48", init="pose_hrnet_w48_384x288.pth")
    swin = replace(w32, backbone="swin_l", full=True, init="swin_large_patch4_window7_224_22k.pth")
    # minutes on a laptop, from scratch: light form, all small, all the aids, poses of matched queries alone
    tiny = Config(backbone="r26", frozen_norm=False, freeze=False, dim=80, heads=4, ffn=192, dynamic=24,
                  stages=2, queries=10, spread=True, pose_roi=8, convs=2, conv_width=96, full=False,
                  part_dim=64, matched=True, init="", epochs=10, batch=16, lr=1e-3, lr_backbone=1e-3,
                  lr_flow=1e-3, schedule="cosine", warmup=60, drop_epochs="", ema=0.995, ema_warmup=100,
                  short_side=128, long_side=128, multiscale=False, processes=2, workers=0, eval_every=10,
                  eval_batch=50)
    return {"tiny": tiny, "r50": r50, "r50-light": replace(r50, full=False),
            "hrnet_w32": w32, "hrnet_w32-full": replace(w32, full=True),
            "hrnet_w48": w48, "hrnet_w48-full": replace(w48, full=True),
            "swin_l": swin, "swin_l-light": replace(swin, full=False)}


PRESETS: dict[str, Config] = _presets()

# ---- Box decoder (Sec. 3.1, eq. 1; Sparse R-CNN's) --------------------------------------------------------


class SelfAttention(nn.Module):
    """Attention of N tokens to each other: (B, N, C) → (B, N, C)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.in_proj(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """norm(x + W₂ ReLU(W₁ x))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class DynamicMLP(nn.Module):
    """DyMLP (eq. 1): two linear layers for the features of a box, whose weights its query writes.

        x ← ReLU(norm(x W₁(q)));   x ← ReLU(norm(x W₂(q)));   out = ReLU(norm(W x))   of x as one long vector

    A layer mixes the last dimension of x, so x (..., cells, C) makes it DyMLP_channel, x (..., C, cells)
    DyMLP_spatial.
    Takes    query (..., Cq);  x (..., rows, dim), where ... may be broadcast
    Returns  (..., out)
    """

    def __init__(self, query_dim: int, dim: int, rows: int, inner: int, out: int):
        super().__init__()
        self.shape = dim, inner
        self.generate = nn.Linear(query_dim, 2 * dim * inner)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(inner), nn.LayerNorm(dim), nn.LayerNorm(out)
        self.out = nn.Linear(rows * dim, out)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        first, second = self.generate(query).chunk(2, -1)
        x = F.relu(self.norm1(x @ first.unflatten(-1, self.shape)))
        x = F.relu(self.norm2(x @ second.unflatten(-1, self.shape[::-1])))
        return F.relu(self.norm3(self.out(x.flatten(-2))))


def box_level(boxes: Tensor) -> Tensor:
    """The map that a box is pooled from: boxes (R, 4) → (R,), 0 for stride 4, ...

    FPN's rule (Lin et al., CVPR 2017): 0 where the root of a box's area is below 112 px, 1 below 224, 2 below
    448, else 3. A box that is not finite gets some map: the losses' check ends the run, not a wrong index.
    """
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=0).nan_to_num()
    return (4 + torch.log2(area.sqrt() / 224 + 1e-8)).floor().clamp(2, 5).long() - 2


MAX_LOG_SCALE = math.log(100000 / 16)          # a stage makes a box at most 6250 times as wide or high


def move_boxes(boxes: Tensor, delta: Tensor) -> Tensor:
    """Δ of eq. 1: boxes (..., 4) move by half of delta's (dx, dy) in units of their size, and become exp(dw, dh)
    times as large."""
    size, centre = boxes[..., 2:] - boxes[..., :2], (boxes[..., :2] + boxes[..., 2:]) / 2
    centre = centre + delta[..., :2] / 2 * size
    half = delta[..., 2:].clamp(max=MAX_LOG_SCALE).exp() * size / 2
    return torch.cat([centre - half, centre + half], -1)


def image_of_rows(boxes: Tensor) -> Tensor:
    """Which image each of the R = B·Q boxes (B, Q, 4) is in: (R,)."""
    return torch.arange(boxes.shape[0], device=boxes.device).repeat_interleave(boxes.shape[1])


class BoxStage(nn.Module):
    """One stage of the box decoder (Sec. 3.1, Fig. 2b):

        ROI_box = RoIAlign(maps, b)                   7 × 7 cells, from the map that suits the box's size
                                                      (drawn in `roi_align_formula`)
        Q_I ← MHSA(Q_I)                               the Q queries of an image see each other
        Q_I ← DyMLP_channel(Q_I, ROI_box)             a query meets the features in its box
        b ← Δ(Head_box(Q_I), b)                       the box moves and changes its size               (eq. 1)
        C̄ = sigmoid(Head_cls(Q_I))                    the class score                              (Sec. 3.4)

    with norms around the sums and a feed-forward block, as in Sparse R-CNN.
    Takes    maps (B, C, h, w) of stride 4, 8, 16, 32;  queries (B, Q, C);  boxes (B, Q, 4)
    Returns  queries, logits (B, Q) of C̄, boxes
    """

    def __init__(self, cfg: Config):
        super().__init__()
        dim = cfg.dim
        self.bins = cfg.box_roi
        self.attention, self.norm1 = SelfAttention(dim, cfg.heads), nn.LayerNorm(dim)
        self.dynamic, self.norm2 = DynamicMLP(dim, dim, cfg.box_roi ** 2, cfg.dynamic, dim), nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, cfg.ffn)

        def layer() -> list[nn.Module]:
            return [nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU()]

        self.score_tower, self.score = nn.Sequential(*layer()), nn.Linear(dim, 1)
        self.delta_tower, self.delta = nn.Sequential(*layer(), *layer(), *layer()), nn.Linear(dim, 4)

    def forward(self, maps: list[Tensor], queries: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        box_rows = boxes.detach().flatten(0, 1)                                     # (R, 4)
        roi = roi_align(maps, image_of_rows(boxes), box_rows, box_level(box_rows), self.bins)  # (R, bins², C)
        queries = self.norm1(queries + self.attention(queries))
        queries = self.norm2(queries + self.dynamic(queries.flatten(0, 1), roi).view_as(queries))
        queries = self.ffn(queries)
        logits = self.score(self.score_tower(queries)).squeeze(-1)
        delta = self.delta(self.delta_tower(queries)).to(boxes.dtype)
        return queries, logits, move_boxes(boxes, delta)                            # eq. 1


# ---- Keypoint decoder: how the parts look at the features in a box (Sec. 3.2, Table 1) --------------------
#
# All of them: ROI (R, C, n, n), part queries (R, M, D) → part embeddings E_P (R, M, D). With --query instance
# they get a linear view of the instance query as the only part query.


class SPEGM(nn.Module):
    """Spatial part embedding generation module (Sec. 3.2, Fig. 2c). No query has a say in it:

        U = ReLU(norm(deconv(ROI)))                   (R, C, 2n, 2n)
        A = softmax(conv(U))                          (R, M, 4n²): a map for each part, of sum 1
        E_P = Linear(A Uᵀ), U as (C, 4n²)             (R, M, D): the features where the part looks

    The norm is a batch norm over all boxes of the batch; with `--matched` over the matched ones.
    """

    def __init__(self, cfg: Config, num_parts: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(cfg.dim, cfg.dim, 4, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(cfg.dim)
        self.attention = nn.Conv2d(cfg.dim, num_parts, 3, padding=1)
        self.out = nn.Linear(cfg.dim, cfg.part_dim)

    def forward(self, roi: Tensor, part_queries: Tensor) -> Tensor:
        up = F.relu(self.norm(self.upsample(roi)), inplace=True)
        attention = self.attention(up).flatten(2).softmax(-1)                       # A (R, M, 4n²)
        return self.out(attention @ rearrange(up, "r c h w -> r (h w) c"))          # E_P without Q_I


class CrossAttention(nn.Module):
    """The part queries attend to the cells (Table 1, MHSA)."""

    def __init__(self, cfg: Config, num_parts: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(cfg.part_dim, cfg.heads, kdim=cfg.dim, vdim=cfg.dim,
                                               batch_first=True)

    def forward(self, roi: Tensor, part_queries: Tensor) -> Tensor:
        cells = rearrange(roi, "r c h w -> r (h w) c")
        return self.attention(part_queries, cells, cells, need_weights=False)[0]


class DynamicInteraction(nn.Module):
    """The part queries write the weights of layers over channels or over cells (Table 1, DyMLP)."""

    def __init__(self, cfg: Config, num_parts: int):
        super().__init__()
        self.channel = cfg.interaction == "channel"
        dim, rows = (cfg.dim, cfg.pose_roi ** 2) if self.channel else (cfg.pose_roi ** 2, cfg.dim)
        self.dynamic = DynamicMLP(cfg.part_dim, dim, rows, cfg.dynamic, cfg.part_dim)

    def forward(self, roi: Tensor, part_queries: Tensor) -> Tensor:
        x = rearrange(roi, "r c h w -> r (h w) c" if self.channel else "r c h w -> r c (h w)")
        return self.dynamic(part_queries, x[:, None])


class Pool(nn.Module):
    """The mean over all cells, the same for every part (Table 2b, baseline, there with one query)."""

    def __init__(self, cfg: Config, num_parts: int):
        super().__init__()
        self.out = nn.Linear(cfg.dim, cfg.part_dim)

    def forward(self, roi: Tensor, part_queries: Tensor) -> Tensor:
        return self.out(roi.mean((2, 3)))[:, None].expand_as(part_queries)


def make_interaction(cfg: Config, num_parts: int) -> nn.Module:
    kinds = dict(spegm=SPEGM, mhsa=CrossAttention, channel=DynamicInteraction, spatial=DynamicInteraction,
                 pool=Pool)
    return kinds[cfg.interaction](cfg, num_parts)


# ---- Keypoint decoder: how part queries go from stage to stage (Sec. 3.3, Table 2a) -----------------------


class SIM(nn.Module):
    """Selective iteration module (Sec. 3.3, Fig. 2d): early boxes are poor, so the gates say what to keep.

        W_E, W_Q = Sigmoid(MLP(E_P + Q_P));   Q_P ← W_E * E_P + W_Q * Q_P                              (eq. 3)

    E_P (R, M, D) of this stage; Q_P (R, M, D) of the stage before. The first stage takes the learned ones,
    (1, M, D).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.linear1, self.norm = nn.Linear(dim, dim // 4, bias=False), nn.LayerNorm(dim // 4)
        self.linear2 = nn.Linear(dim // 4, 2 * dim)

    def forward(self, embedding: Tensor, part_queries: Tensor) -> Tensor:
        gates = self.linear2(F.relu(self.norm(self.linear1(embedding + part_queries)))).sigmoid()
        new, old = gates.chunk(2, -1)                                               # W_E, W_Q
        return new * embedding + old * part_queries                                 # eq. 3


class Ungated(nn.Module):
    """In SIM's place (Table 2a): the sum E_P + Q_P, a linear layer of both (concat), or E_P alone (none)."""

    def __init__(self, kind: str, dim: int):
        super().__init__()
        self.kind = kind
        if kind == "concat":
            self.linear = nn.Linear(2 * dim, dim)

    def forward(self, embedding: Tensor, part_queries: Tensor) -> Tensor:
        if self.kind == "concat":
            return self.linear(torch.cat([embedding, part_queries.expand_as(embedding)], -1))
        return embedding + part_queries if self.kind == "sum" else embedding


# ---- Keypoint decoder (Sec. 3.1, eq. 2) -------------------------------------------------------------------

LIMBS = {"shoulders": ("shoulder",), "arm": ("elbow", "wrist", "hand", "finger", "thumb"), "hips": ("hip",),
         "leg": ("knee", "ankle", "foot", "toe", "heel")}


def keypoint_parts(skeleton: Skeleton, scheme: str) -> list[list[int]]:
    """Indices of the keypoints of each part, by their names (Fig. 4): what is no limb is the head.

    a every keypoint alone;  b the head together, the rest alone;  c head, shoulders, hips, arms and legs;
    d head, and arms and legs with their shoulder or hip. Words may be longer than these: left_forefinger1, or
    lelbow, whose side counts where the skeleton pairs it with another.
    """
    parts: dict[object, list[int]] = {}
    for k, name in enumerate(skeleton.keypoints):
        read = words(name)
        limb = next((limb for limb, joints in LIMBS.items()
                     if any(joint in word for joint in joints for word in read)), "head")
        glued = read[0][0] if skeleton.flip and skeleton.flip[k] != k else ""
        side = next((word[0] for word in read if word in SIDES), glued)
        if scheme == "d":
            limb = dict(shoulders="arm", hips="leg").get(limb, limb)
        alone = scheme == "a" or scheme == "b" and limb != "head"
        parts.setdefault(k if alone else (limb, side if limb in ("arm", "leg") else ""), []).append(k)
    return list(parts.values())


class PartHead(nn.Module):
    """Coordinates μ̂ = W x / |x| + b and deviations σ̂ = sigmoid(V x + c) of the k joints of a part.

    x (R, D) → twice (R, k, 2)
    """

    def __init__(self, dim: int, keypoints: int):
        super().__init__()
        self.coordinates, self.sigmas = nn.Linear(dim, 2 * keypoints), nn.Linear(dim, 2 * keypoints)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        coordinates = F.linear(x, self.coordinates.weight) / x.norm(dim=-1, keepdim=True)
        coordinates = coordinates + self.coordinates.bias
        return coordinates.unflatten(-1, (-1, 2)), self.sigmas(x).sigmoid().unflatten(-1, (-1, 2))


class KeypointStage(nn.Module):
    """One stage of the keypoint decoder (Sec. 3.1 to 3.3, Fig. 2c-e):

        ROI_pose = RoIAlign(P_2, b)                   14 × 14 cells of the finest map, then 3×3 convolutions
        Q_I ← FFN(DyMLP_channel(Q_I, ROI_pose))       in the full form (Fig. 3b)
        E_P = SPEGM(ROI_pose) + Linear_m(Q_I)         each part looks where it wants; the sum is the release's
        Q_P ← SIM(Q_P, E_P)                           what earlier stages knew comes in (eq. 3)
        Q_P ← MHSA(Q_P)                               the M parts of one person see each other
        μ̂, σ̂ = Linear(Q_P)                            one layer per part                             (eq. 2)

    Takes    finest map P_2 (B, C, h, w);  image (R,) of each box (R, 4);  queries Q_I (R, C);
             part queries Q_P (R, M, D) or (1, M, D)
    Returns  keypoints and sigmas (R, K, 2), relative to the box; the new queries and part queries
    """

    def __init__(self, cfg: Config, parts: list[list[int]]):
        super().__init__()
        dim, part_dim = cfg.dim, cfg.part_dim
        self.bins, self.query = cfg.pose_roi, cfg.query
        widths = [dim] + [cfg.conv_width] * (cfg.convs - 1) + [dim]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.full = cfg.full
        if cfg.full:
            self.dynamic = DynamicMLP(dim, dim, cfg.pose_roi ** 2, cfg.dynamic, dim)
            self.query_norm, self.query_ffn = nn.LayerNorm(dim), FeedForward(dim, cfg.ffn)
        self.residual = nn.ModuleList(nn.Linear(dim, part_dim) for _ in parts)      # Linear_m
        self.look = make_interaction(cfg, len(parts))
        self.update = SIM(part_dim) if cfg.update == "sim" else Ungated(cfg.update, part_dim)
        self.attention, self.norm = SelfAttention(part_dim, cfg.heads), nn.LayerNorm(part_dim)
        self.ffn = FeedForward(part_dim, cfg.ffn)
        self.heads = nn.ModuleList(PartHead(part_dim, len(part)) for part in parts)
        order = torch.tensor(sum(parts, [])).argsort()                  # part by part → the skeleton's order
        self.register_buffer("order", order, persistent=False)

    def roi(self, finest: Tensor, image: Tensor, boxes: Tensor) -> Tensor:
        """ROI_pose (R, C, n, n): the features in each box of the finest map, after the convolutions."""
        cells = roi_align([finest], image, boxes, torch.zeros_like(image), self.bins)
        x = rearrange(cells, "r (h w) c -> r c h w", h=self.bins)
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True)
        return x

    def forward(self, finest: Tensor, image: Tensor, boxes: Tensor, queries: Tensor,
                part_queries: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        roi = self.roi(finest, image, boxes)
        if self.full:
            cells = rearrange(roi, "r c h w -> r (h w) c")
            queries = self.query_ffn(self.query_norm(queries + self.dynamic(queries, cells)))
        view = torch.stack([layer(queries) for layer in self.residual], 1)      # of Q_I, per part (R, M, D)
        asking = view if self.query == "instance" else part_queries.expand_as(view)
        embedding = self.look(roi, asking) + view                               # E_P
        part_queries = self.update(embedding, part_queries)                     # SIM
        part_queries = self.ffn(self.norm(part_queries + self.attention(part_queries)))     # MHSA
        pose = (head(x) for head, x in zip(self.heads, part_queries.unbind(1)))             # Linear
        keypoints, sigmas = (torch.cat(x, 1)[:, self.order] for x in zip(*pose))
        return keypoints, sigmas, queries, part_queries                         # eq. 2


# ---- The model (Fig. 2, Fig. 3) ---------------------------------------------------------------------------


class Output(NamedTuple):
    """What a stage says of every query."""
    logits: Tensor         # (B, Q) of being a person
    boxes: Tensor          # (B, Q, 4) pixels
    keypoints: Tensor      # (B, Q, K, 2) μ̂, relative to the box; 0 for queries that get no pose
    sigmas: Tensor         # (B, Q, K, 2) σ̂ in (0, 1), relative to the box; 1 for queries that get no pose


Choose = Callable[[list[Output]], Tensor]      # what the box stages found → (B, Q) True: needs a pose


class QueryPose(nn.Module):
    """The whole network; see `forward`."""

    def __init__(self, cfg: Config, skeleton: Skeleton):
        super().__init__()
        self.cfg, self.skeleton = cfg, skeleton
        self.backbone, self.neck = backbone_and_neck(cfg)
        whole = torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(cfg.queries, 1)
        # what the first stage starts from: boxes (cx, cy, w, h in fractions of the image), Q_I and Q_P
        self.boxes = nn.Parameter(spread_boxes(cfg.queries) if cfg.spread else whole)
        self.queries = nn.Parameter(torch.randn(cfg.queries, cfg.dim))
        parts = parts_of(skeleton, cfg)
        self.parts = nn.Parameter(torch.randn(len(parts), cfg.part_dim))
        box_stage, keypoint_stage = BoxStage(cfg), KeypointStage(cfg, parts)
        self.box_stages = nn.ModuleList(copy.deepcopy(box_stage) for _ in range(cfg.stages))
        self.keypoint_stages = nn.ModuleList(copy.deepcopy(keypoint_stage) for _ in range(cfg.stages))
        self.flow = RealNVP()                                                       # of the loss alone
        reset_parameters(self)

    def first_boxes(self, sizes: Tensor) -> Tensor:
        """The learned boxes (B, Q, 4) in images of sizes (B, 2)."""
        centre, half = self.boxes[:, :2], self.boxes[:, 2:] / 2
        return torch.cat([centre - half, centre + half], 1) * sizes.repeat(1, 2)[:, None]

    def forward(self, images: Tensor, sizes: Tensor, choose: Choose | None = None) -> list[Output]:
        """Images (B, 3, H, W), normalised, of sizes (B, 2) (w, h) before padding → what each stage says.

        Q_I runs through box and keypoint stages in turn, Q_P through keypoint stages (Fig. 3b). No gradient
        goes from the boxes of a stage into those of the stage before, nor from poses into boxes; through Q_I
        the loss of poses does reach the box stages.
        choose: which queries need a pose, for `--matched`; not for --full --iterate. None: all of them
        """
        maps = self.neck(self.backbone(images))
        boxes, queries = self.first_boxes(sizes), self.queries.expand(images.shape[0], -1, -1)
        if choose:                  # no fast form of what follows: in training SPEGM's norm sees other boxes
            return pose_chosen(self, maps, boxes, queries, choose)

        outputs, part_queries, image = [], self.parts[None], image_of_rows(boxes)
        for box_stage, keypoint_stage in zip(self.box_stages, self.keypoint_stages):
            queries, logits, boxes = box_stage(maps, queries, boxes)                                # eq. 1
            box_rows, query_rows = boxes.detach().flatten(0, 1), queries.flatten(0, 1)
            keypoints, sigmas, updated, new_part_queries = keypoint_stage(                          # eq. 2
                maps[0], image, box_rows, query_rows, part_queries)
            pose = (x.unflatten(0, logits.shape) for x in (keypoints, sigmas))
            outputs.append(Output(logits, boxes, *pose))
            boxes = boxes.detach()
            if self.cfg.iterate:                                    # Fig. 3b
                queries = updated.view_as(queries)
            if self.cfg.update != "none":                           # Table 2a
                part_queries = new_part_queries
        return outputs


# ---- Matching and losses (Sec. 3.4) -----------------------------------------------------------------------
#
# A set of pairs is (image, query, person): three index tensors of one length; `person` counts through all
# people of the batch in image order.

Pairs = tuple[Tensor, Tensor, Tensor]
WEIGHTS = dict(ce=2.0, bbox=5.0, giou=2.0, kps=1.0)             # λ_cls, λ_L1, λ_giou, and that of L_QP
SMALLEST_SIGMA = 1e-6      # of the box; a sigmoid reaches 0


@dataclass
class People(records.People):
    """The people of one image, in pixels of the network's input; boxes x1, y1, x2, y2."""
    sizes: Tensor          # (P, 2) w, h of the image that each is in, without padding


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU = ∩ / ∪ − (hull − ∪) / hull of boxes xyxy (..., 4); leading dimensions broadcast. In [−1, 1]."""
    common = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    inter, hull = common.prod(-1), around.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def box_distance(boxes: Tensor, people: People) -> Tensor:
    """‖b − b*‖₁ over the four sides, as fractions of the image's w and h; boxes (..., P, 4) → (..., P)."""
    return ((boxes - people.boxes).abs() / people.sizes.repeat(1, 2)).sum(-1)


def match_cost(logits: Tensor, boxes: Tensor, people: People) -> Tensor:
    """Cost of giving a query to a person, (B, Q, P), as released: 2·class + 5·L1 − 2·GIoU,
    where class is the change of L_cls. The pose has no say."""
    p, boxes = logits.float().sigmoid().unsqueeze(-1), boxes.float().unsqueeze(-2)
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p ** 2 * -(1 - p + 1e-8).log()
    return 2 * focal + 5 * box_distance(boxes, people) - 2 * generalized_iou(boxes, people.boxes)


@torch.no_grad()
def match(outputs: list[Output], people: list[People]) -> list[Pairs]:
    """The cheapest one-to-one assignment of people to queries, for each stage alone (Hungarian method)."""
    everybody = gather_people(people)
    costs = torch.stack([match_cost(output.logits, output.boxes, everybody) for output in outputs])
    costs = costs.nan_to_num(1e6, 1e6, -1e6).cpu().numpy()       # NaN is the loss's to show, not a crash here
    ends = np.cumsum([0] + [len(one) for one in people])
    matchings = []
    for cost in costs:
        found = []
        for image, (first, last) in enumerate(zip(ends, ends[1:])):
            query, person = linear_sum_assignment(cost[image, :, first:last])
            found.append(np.stack([np.full_like(query, image), query, person + first]))
        matchings.append(tuple(torch.from_numpy(np.concatenate(found, 1)).to(everybody.boxes.device)))
    return matchings


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """L_cls: −α (1 − p)² log p where positive, −(1 − α) p² log(1 − p) elsewhere, α = 0.25, summed."""
    p = logits.sigmoid()
    weight = torch.where(positive > 0, 0.25 * (1 - p) ** 2, 0.75 * p ** 2)
    return (weight * F.binary_cross_entropy_with_logits(logits, positive, reduction="none")).sum()


def pose_in_box(boxes: Tensor, people: People) -> tuple[Tensor, Tensor]:
    """The targets μ_g of eq. 4: keypoints of N people in boxes (N, 4), one for each, in sizes of the box and
    seen from its centre, (N, K, 2); and (N, K), 1 where labelled and in the box: the others have no loss.

    Sides below 1/1000 pixel count as that.
    """
    corner, size = boxes[:, None, :2], (boxes[:, None, 2:] - boxes[:, None, :2]).clamp(min=1e-3)
    fraction = (people.keypoints - corner) / size
    return fraction - 0.5, people.visible * ((fraction >= 0) & (fraction <= 1)).all(-1)


def likelihood_loss(mu: Tensor, sigma: Tensor, target: Tensor, visible: Tensor, log_prob: Callable) -> Tensor:
    """Residual log-likelihood estimation: −log P(x | ROI_pose) of each coordinate at x = μ_g          (eq. 4)

        x = x̄ σ̂ + μ̂  with x̄ ~ P_φ, the flow's density                                         (Sec. 3.4)
        so, for one coordinate, P(x) = P_φ(x̄) / σ̂
        −log P = [log σ̂ − log P_φ(x̄)] + [log(σ̂ √(2π)) + |x − μ̂| / (√2 σ̂)]

    Why two brackets: a flow that has not learned yet would pull the poses anywhere. So RLE (Li et al., ICCV
    2021) multiplies it by a fixed density, the second bracket, from which poses and deviations learn at once,
    while the flow learns what is left to explain. The fixed one is a Laplace density of scale √2 σ̂ but for a
    constant, which no gradient sees: with a Gaussian's √(2π) in place of 2√2 it sums to 2/√π = 1.13.

    Takes    mu, sigma, target (N, K, 2) relative to the box;  visible (N, K);  log_prob (..., 2) → (...)
    Returns  (N, K, 2), 0 where not visible; may be negative, as a density may exceed 1
    As released: x̄ has the other sign, (μ̂ − x) / σ̂, so the flow learns the density of −x̄. P_φ is that of
    both coordinates together, and counts whole for each of them. log σ̂ counts in both brackets. The 1e-9 is
    the release's, against a division by 0.
    """
    sigma = sigma.clamp(min=SMALLEST_SIGMA)
    # what is not visible sits at μ̂: 0 times a number that is not finite would not be 0
    target = torch.where(visible[..., None] > 0, target, mu.detach())
    flow = sigma.log() - log_prob((mu - target) / sigma)[..., None]
    laplace = (sigma * math.sqrt(2 * math.pi)).log() + (target - mu).abs() / (math.sqrt(2) * sigma + 1e-9)
    return visible[..., None] * (flow + laplace)                                                    # eq. 4


def stage_losses(output: Output, pairs: Pairs, people: People, log_prob: Callable) -> dict[str, Tensor]:
    """The loss terms of one stage for the pairs that were matched, summed over the batch."""
    logits, boxes, mu, sigma = (x.float() for x in output)
    image, query, person = pairs
    positive, true = torch.zeros_like(logits), people.take(person)
    positive[image, query] = 1
    boxes = boxes[image, query]
    target, visible = pose_in_box(boxes.detach(), true)
    likelihood = likelihood_loss(mu[image, query], sigma[image, query], target, visible, log_prob)  # eq. 4
    return dict(ce=focal_loss(logits, positive), bbox=box_distance(boxes, true).sum(),
                giou=(1 - generalized_iou(boxes, true.boxes)).sum(), kps=likelihood.sum() / mu.shape[-2])


def criterion(outputs: list[Output], people: list[People], log_prob: Callable,
              pairs: list[Pairs] | None = None) -> dict[str, Tensor]:
    """All weighted loss terms by their names in the release, to be summed: L_total = L_QI + L_QP (Sec. 3.4).

    For every stage (_0, _1, ..., the last without suffix), matched on its own, per person of the batch:
    L_QI = 2·L_cls + 5·L_L1 + 2·L_giou, and L_QP, the sum of eq. 4 over both coordinates of the keypoints that
    are labelled and in the box, divided by K. Computed in float32. No people give 0 with a zero gradient, but
    for L_cls. pairs: those of `match`, where it has been called already
    """
    everybody, losses = gather_people(people), {}
    count = mean_over_ranks(torch.tensor(float(len(everybody)), device=everybody.boxes.device)).clamp(min=1)
    for s, (output, matched) in enumerate(zip(outputs, pairs or match(outputs, people)), 1):
        suffix = "" if s == len(outputs) else f"_{s - 1}"
        for term, value in stage_losses(output, matched, everybody, log_prob).items():
            losses[f"loss_{term}{suffix}"] = WEIGHTS[term] * value / count
    return losses


# ---- Prediction (Sec. 3.4, Testing) -----------------------------------------------------------------------


def pose_scores(output: Output) -> tuple[Tensor, Tensor]:
    """Score of each person (..., Q), C̄ Σ_k (1 − σ̂_k) / K with C̄ = sigmoid(logit); and 1 − σ̂_k of each
    keypoint (..., Q, K), where σ̂_k is the mean of its deviations in x and y."""
    certain = 1 - output.sigmas.mean(-1)
    return output.logits.sigmoid() * certain.mean(-1), certain


def keypoints_px(keypoints: Tensor, boxes: Tensor) -> Tensor:
    """Keypoints (..., K, 2) relative to boxes (..., 4) → pixels."""
    corner, size = boxes[..., None, :2], (boxes[..., 2:] - boxes[..., :2])[..., None, :]
    return (keypoints + 0.5) * size + corner


def to_prediction(output: Output, image_id: int | str, input_px: tuple, size_px: tuple) -> Prediction:
    """The queries of one image, without the dimension B, as people in its pixels; sizes are (w, h).

    There is no NMS and no threshold: most have a score near 0. Left out are queries without a pose, and those
    with nothing of their box in the image. The half pixel that `people_to_learn` adds is subtracted.
    """
    scale = np.divide(size_px, input_px)
    keypoints = keypoints_px(output.keypoints, output.boxes).numpy() * scale - 0.5
    boxes = (output.boxes.numpy() * np.tile(scale, 2)).clip(0, np.tile(size_px, 2))
    scores, certain = (x.numpy() for x in pose_scores(output))
    shown = (boxes[:, 2:] > boxes[:, :2]).all(1) & (scores > 0)
    return Prediction(image_id, keypoints[shown], certain[shown], scores[shown], boxes[shown])


STRIDE = 32                # of the coarsest map: images are padded to multiples of it


def pad_images(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures (3, h, w) → padded by 0 at the right and bottom (B, 3, H, W), and sizes w, h (B, 2) before."""
    sizes = torch.tensor([[p.shape[2], p.shape[1]] for p in pictures])
    width, height = ((sizes.amax(0) + STRIDE - 1) // STRIDE * STRIDE).tolist()
    images = torch.zeros(len(pictures), 3, height, width)
    for picture, image in zip(pictures, images):
        image[:, :picture.shape[1], :picture.shape[2]] = picture
    return images, sizes


@torch.no_grad()
def detect(model: QueryPose, pictures: list[Tensor], best: bool = False) -> Output:
    """What the last stage says of normalised pictures; on the CPU, in float32. best: see `best_poses`."""
    device = next(model.parameters()).device
    images, sizes = (x.to(device) for x in pad_images(pictures))
    with autocast(device, model.cfg.amp):
        output = best_poses(model, images, sizes) if best else model(images, sizes)[-1]
    return Output(*(x.float().cpu() for x in output))


def predict(model: QueryPose, batch: dict, best: bool = False) -> list[Prediction]:
    """People of a batch {images: list of (3, h, w) from `input_image`, image_ids, sizes_px}, one each.

    All queries are people; with `best` the 20 of the highest scores, and some more.
    """
    people, output = [], detect(model, batch["images"], best)
    for i, picture in enumerate(batch["images"]):
        one, size = Output(*(x[i] for x in output)), picture.shape[:0:-1]               # (w, h)
        people.append(to_prediction(one, batch["image_ids"][i], size, batch["sizes_px"][i]))
    return people


def evaluate(model: QueryPose, data: PoseDataset, cfg: Config, ranks: Ranks) -> tuple[dict, list[Prediction]]:
    """Metrics and predictions of a dataset; the images are shared among the processes, all get the result.

    APM and APL judge people by their boxes, as the release is scored. Where every query has a pose, in the
    full form or with `--no-prune`, there is the AP of boxes (Table 3), too.
    Departs from the release, which passes results through a soft-NMS that takes the y2 of boxes for scores.
    Many boxes then have a negative height, and COCO's evaluation ignores those of them that match nobody
    instead of counting them as wrong. Its README has two columns: AP with a star, 72.3 (W32) and 73.4 (W48),
    which like the paper's seems made that way, and without, 69.8 and 71.0, as is to be expected here.
    """
    # fast form: COCO counts 20 people of an image. Poses of those alone who can be among them give the same
    # AP, 3.6 times as fast where 25 of 100 can (docs/results.md)
    best = cfg.prune and not (cfg.full and cfg.iterate) and data.metric != "posetrack" and not plain()
    found = predict_all(partial(predict, fuse(model), best=best), data, partial(input_image, cfg=cfg),
                        cfg.eval_batch, cfg.workers, ranks, join=list)
    return metrics.evaluate(found, data, boxes=not best, areas_of_boxes=True), found


# ---- Data (Sec. 4.1): mirrored or not, random crops, short side 480 to 800, ImageNet normalisation --------


def input_size(size: tuple[int, int], short_side: int, longest: float = math.inf) -> tuple[int, int]:
    """(w, h) with the shorter side `short_side`, or less where the longer one would exceed `longest`."""
    scale = short_side / min(size)
    w, h = (side * scale for side in size)
    scale = min(1.0, longest / max(w, h))
    return max(1, int(w * scale + 0.5)), max(1, int(h * scale + 0.5))


def input_image(image: Image.Image, cfg: Config) -> Tensor:
    """A picture of any size as the network sees it, (3, h, w): see `short_side` and `long_side`."""
    size = input_size(image.size, cfg.short_side, cfg.long_side)
    return transforms.normalise(transforms.to_tensor(image.resize(size, Image.Resampling.BILINEAR)))


def people_to_learn(sample: Sample) -> Sample:
    """Without crowd regions and boxes outside of the image; people without keypoints stay. Keypoints get half
    a pixel more: from now on the first column's centre is 0.5. A clip's neighbouring frames are not used."""
    boxes = sample.boxes.clip(0, np.tile(np.float32(sample.size), 2))
    keep = ~sample.iscrowd & (boxes[:, 2:] > boxes[:, :2]).all(1)
    shifted = sample.keypoints + np.float32([0.5, 0.5, 0])
    return replace(sample, keypoints=shifted[keep], boxes=boxes[keep], areas=sample.areas[keep],
                   iscrowd=sample.iscrowd[keep], frames=(), track_ids=None)


def hide_outside(sample: Sample, x: int, y: int, w: int, h: int) -> Sample:
    """Keypoints outside of a window of the image are no longer labelled."""
    shown = ((sample.keypoints[..., :2] >= (x, y)) & (sample.keypoints[..., :2] <= (x + w, y + h))).all(-1)
    return replace(sample, keypoints=sample.keypoints * shown[..., None])


def augment(sample: Sample, cfg: Config, rng: np.random.Generator) -> Sample:
    """Crop half of the images, resize. For `short_side` 800 with the lengths of the release: short sides 480,
    512, ..., 800; before a crop 400, 500 or 600; sides of crops 384 to 600. Others are in proportion."""
    full = cfg.short_side
    if not cfg.multiscale:
        return transforms.resize(sample, input_size(sample.size, full, cfg.long_side))
    if rng.random() < 0.5:
        before = int(rng.choice([full // 2, full * 5 // 8, full * 3 // 4]))
        sample = transforms.resize(sample, input_size(sample.size, before))
        window = [int(rng.integers(full * 12 // 25, min(side, full * 3 // 4) + 1)) for side in sample.size]
        corner = [int(rng.integers(0, side - length + 1)) for side, length in zip(sample.size, window)]
        sample = transforms.crop(hide_outside(sample, *corner, *window), *corner, *window)
    short_side = full * int(rng.choice(range(15, 26))) // 25
    return transforms.resize(sample, input_size(sample.size, short_side, cfg.long_side))


def to_people(sample: Sample) -> People:
    """A sample's people as tensors; keypoints without label, or outside of the image, at 0."""
    sample = hide_outside(sample, 0, 0, *sample.size)
    labelled = torch.from_numpy(sample.keypoints[..., 2:] > 0).float()
    size = torch.tensor(sample.size, dtype=torch.float32).expand(len(labelled), 2)
    keypoints = torch.from_numpy(sample.keypoints[..., :2]) * labelled
    return People(keypoints, labelled.squeeze(-1), torch.from_numpy(sample.boxes),
                  torch.from_numpy(sample.areas), size, image_id=sample.image_id)


class TrainImages(torch.utils.data.Dataset):
    """One epoch of augmented images; item i is (image (3, h, w), People, its id, why files were skipped).

    What happens to image i depends on (seed, epoch, i) alone. An unreadable file gives way to the next.
    """

    def __init__(self, data: PoseDataset, cfg: Config, epoch: int):
        self.data, self.cfg, self.epoch = data, cfg, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, People, int | str, list[str]]:
        rng = np.random.default_rng([self.cfg.seed, self.epoch, i])
        sample, skipped = self.data.load_readable(i)
        if self.data.skeleton.flip is not None and rng.random() < 0.5:
            sample = transforms.hflip(sample, self.data.skeleton.flip)
        sample = augment(people_to_learn(sample), self.cfg, rng)
        image = transforms.normalise(transforms.to_tensor(sample.image))
        return image, to_people(sample), sample.image_id, skipped


# ---- Training (Sec. 4.1) ----------------------------------------------------------------------------------


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


def train(cfg: Config, args) -> None:
    """Train, evaluate, keep all in the run folder. Runs alone or under torchrun; Ctrl-C saves and leaves."""
    ranks = init_ranks(args.device, cfg)
    if cfg.frozen_norm and not (cfg.init or args.saved):
        raise UserError("frozen norms need start weights: add --init resnet50 (or another), or "
                        "--no-frozen_norm")
    data, held_out = open_splits(cfg, ranks)
    seed_all(cfg.seed)                                              # equal start weights on every process
    model = QueryPose(cfg, data.skeleton)
    if cfg.init and not args.saved:
        with rank_zero_first(ranks):                                # it fetches start weights
            load_init(model, cfg.init)
    model.to(ranks.device, memory_format=torch.channels_last)
    average = Ema(model, cfg.ema, cfg.ema_warmup) if cfg.ema else None
    optimizer = build_optimizer(model, cfg)
    fp16 = cfg.amp == "fp16" and ranks.device.type == "cuda"        # else the scaler is idle
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
    contents = dict(model=model, optimizer=optimizer, scaler=scaler) | (dict(ema=average) if average else {})
    run = Run("querypose", cfg, args, ranks, data, held_out, contents)      # contents of its checkpoints
    net, train_set = distribute(model, ranks), data.training()

    for epoch in run.epochs():
        net.train()
        # micro-batches; a resumed run goes on in mid-epoch, unreadable files are reported
        for (images, sizes), people in run.batches(TrainImages(train_set, cfg, epoch), pad_images):
            factor = lr_scale(run.step, run.steps, epoch, run.cfg)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            images = images.to(ranks.device, non_blocking=True, memory_format=torch.channels_last)
            people = [one.to(ranks.device) for one in people]
            run.show_batch(images, people, normalised=True)         # train_batch.png
            pairs = []                                              # filled by `matched_queries`
            choose = partial(matched_queries, people=people, pairs=pairs) if cfg.matched else None

            with autocast(ranks.device, cfg.amp):
                outputs = net(images, sizes.to(ranks.device), choose)
            losses = criterion(outputs, people, model.flow.log_prob, pairs)
            # DDP waits for a gradient of every parameter, and with --update none SPEGM has none for Q_P
            losses["unused"] = 0 * model.parts.sum()
            scaler.scale(sum(losses.values()) / cfg.accum).backward()
            if run.more_micro_batches(losses):
                continue

            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(model.parameters(), cfg.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if average:
                average.update(model)
            if run.stepped(norm, ["loss_ce", "loss_bbox", "loss_giou", "loss_kps"]):    # True: asked to stop
                return

        if run.evaluates():
            best = average.module if average else model
            run.record(*evaluate(best, held_out, cfg, ranks))
            if run.last and cfg.data == "puppets":
                table, _ = evaluate(best, open_crowd(data.skeleton, ranks), cfg, ranks)
                run.record_split("crowd", "puppets in crowds, E/M/H: easy, medium and hard", table)


# ---- Tables -----------------------------------------------------------------------------------------------

EQUATIONS = {           # equation, section or figure of the paper → where it stands here
    "eq. 1": BoxStage, "eq. 1, DyMLP": DynamicMLP, "eq. 1, Δ": move_boxes, "eq. 2": KeypointStage,
    "eq. 3": SIM, "eq. 4": likelihood_loss, "eq. 4, μ_g": pose_in_box, "Sec. 3.1, Fig. 3": QueryPose.forward,
    "Sec. 3.2, A and E_P": SPEGM, "Sec. 3.4, x = x̄ σ̂ + μ̂": likelihood_loss, "Sec. 3.4, matching": match,
    "Sec. 3.4, L_cls": focal_loss, "Sec. 3.4, L_L1": box_distance, "Sec. 3.4, L_giou": generalized_iou,
    "Sec. 3.4, L_QI and L_total": criterion, "Sec. 3.4, pose score": pose_scores, "Fig. 4": keypoint_parts,
    "Sec. 4.1": train,
}

# Rows of the paper's tables: what, AP in the paper, flags of the paper's preset, flags of the tiny preset,
# which is in the light form unless they say --full. versus: the row, from 1, that it is compared with; default:
# the paper's choice in this table; more: further columns. The command of a row:
#
#     python querypose.py --train --data data/coco --preset <table's preset> <table's flags> <row's flags>
#
# Open in the paper, and assumed here. An instance query is one part with all keypoints; what asks is a linear
# view of Q_I. Table 1 is without iteration of part queries: its last row has the figures of Table 2a's None.
# The baseline of Table 2b regresses all keypoints from one vector: the mean of ROI_pose after the convolutions
# plus the view of Q_I. So + SPEGM goes from one vector for all parts to a map for each part. All rows of both
# tables keep the convolutions, the view of Q_I, and what follows E_P.
# Not here: Table 5, measured by COCO's server on annotations that are not public.
ONE_TIME = "--epochs 40 --drop_epochs 31,37"                    # the 1× schedule (Sec. 4.2)
R50 = dict(preset="r50", flags=ONE_TIME, puppets="--epochs 3", metric="AP")
POOLED = "--query instance --interaction pool --update none"
NO_PUPPETS = "its backbone is too large for puppets"


def same(flags: str) -> dict[str, str]:
    """Flags of a row for the paper's preset and for tiny."""
    return dict(flags=flags, puppets=flags)


TABLES = {
    "1": Table(
        "Who looks at the features in the box, an instance query (IQ) or part queries (PQ), and how",
        preset="r50", flags=f"{ONE_TIME} --update none", puppets="--epochs 3 --update none", metric="AP", rows=[
            Row("IQ, MHSA", 60.7, **same("--query instance --interaction mhsa")),
            Row("PQ, MHSA", 62.6, **same("--interaction mhsa"), versus=1),
            Row("IQ, DyMLP_channel", 60.4, **same("--query instance --interaction channel")),
            Row("PQ, DyMLP_channel", 63.0, **same("--interaction channel"), versus=3),
            Row("IQ, DyMLP_spatial", 60.5, **same("--query instance --interaction spatial")),
            Row("PQ, DyMLP_spatial", 62.8, **same("--interaction spatial"), versus=5),
            Row("IQ, Spatial Attn. (one map)", 60.2, **same("--query instance")),
            Row("PQ, SPEGM (Sec. 3.2)", 63.8, versus=7, default=True)]),
    "2a": Table(
        "How part queries go from stage to stage", **R50, rows=[
            Row("None", 63.8, **same("--update none")),
            Row("Summation", 64.2, **same("--update sum"), versus=1),
            Row("Concatenation", 64.1, **same("--update concat"), versus=1),
            Row("Selective Iter. (eq. 3)", 64.9, versus=1, default=True)]),
    "2b": Table(
        "The modules", **R50, rows=[
            Row("Baseline: convolutions, global average pooling, coordinates", 59.2, **same(POOLED)),
            Row("+ SPEGM (Sec. 3.2)", 63.8, **same("--update none"), versus=1),
            Row("+ SIM (eq. 3)", 64.9, versus=2, default=True)]),
    "2c": Table(
        "Width of a part query; on puppets half of it", **R50, rows=[
            Row("d_p 32", 64.1, "--part_dim 32", "--part_dim 16"),
            Row("d_p 64", 64.4, "--part_dim 64", "--part_dim 32", versus=1),
            Row("d_p 128", 64.9, versus=2, default=True),
            Row("d_p 256", 64.7, "--part_dim 256", "--part_dim 128", versus=3)]),
    "2d": Table(
        "Division into parts (Fig. 4)", **R50, rows=[
            Row("(a) 17 parts: every keypoint", 64.7, **same("--scheme a")),
            Row("(b) 13 parts: the head together", 64.6, **same("--scheme b"), versus=1),
            Row("(c) 7 parts: what is rigid together", 64.9, versus=1, default=True),
            Row("(d) 5 parts: head and four limbs", 64.5, **same("--scheme d"), versus=3)]),
    "3": Table(
        "Way of the instance query (Fig. 3)", preset="r50", flags=f"{ONE_TIME} --no-prune",
        puppets="--epochs 2 --no-matched --no-prune", metric="AP", rows=[
            Row("(a) through the box decoders alone, as its caption says", 64.1, "--no-full", "",
                more=dict(box_AP=55.3)),
            Row("(a) read otherwise: the keypoint decoder updates it for itself", 64.1, "--no-iterate",
                "--full --no-iterate", more=dict(box_AP=55.3)),
            Row("(b) through both in turn", 64.9, "", "--full", versus=1, default=True,
                more=dict(box_AP=56.9))]),
    "4": Table(
        "COCO mini-val; the paper's evaluation seems to be the release's, see `evaluate`", preset="r50",
        metric="AP", rows=[
            Row("ResNet-50", 68.7, "--preset r50", None, missing=NO_PUPPETS),
            Row("HRNet-W32", 72.4, "--preset hrnet_w32-full", None, missing=NO_PUPPETS),
            Row("HRNet-W48", 73.6, "--preset hrnet_w48-full", None, missing=NO_PUPPETS),
            Row("Swin-L", 73.3, "--preset swin_l", None, missing=NO_PUPPETS)]),
    "6": Table(
        "CrowdPose test, trained on train and val; its schedule is not stated", preset="hrnet_w48-full",
        flags="--data data/crowdpose", metric="AP", rows=[
            Row("HRNet-W48", 72.1, "--preset hrnet_w48-full", None, missing=NO_PUPPETS),
            Row("Swin-L", 72.7, "--preset swin_l", None, missing=NO_PUPPETS)]),
}

# Departures. Each: what: paper | release | here | why ("weights": the released ones need it; "recipe": it is
# training alone, as the release does). "–": nothing is said, or done
#
# eq. 1 and 2, after MHSA and DyMLP: – | norms and feed-forward blocks | release | weights
# eq. 2, Linear: linear | coordinates are W x / |x| + b | release | weights
# eq. 3, MLP: no sizes | D → D/4, LayerNorm, ReLU → 2D | release | weights
# eq. 4, sign of x̄: (x − μ̂) / σ̂ | (μ̂ − x) / σ̂ | release | weights: the flow is not symmetric
# eq. 4, shares: – | P_φ counts for each coordinate, log σ̂ in both brackets | release | recipe
# eq. 4, divisor: – | K, labelled or not, times the people of the batch | release | recipe
# eq. 4, σ̂: – | down to 0, where the loss is infinite | at least 1e-6 of the box | a sigmoid can underflow
# Sec. 3.2, stacked 3×3 convolutions: no number | six, 512 wide | release | weights
# Sec. 3.2, E_P: of ROI_pose alone | plus a linear view of Q_I for each part | release | weights
# Fig. 3b, how Q_I is updated: – | FFN(DyMLP_channel(Q_I, ROI_pose)) | release | its later code updates
#     matched queries in training, and none in prediction; here all of them always, as in its first code
# Fig. 3, the form: full | light in its weights, full by default in its later code | a field, --full | weights
# Table 1, MHSA: – | no code | part queries attend to the cells (cross-attention) | the words allow it
# Table 1, IQ: instance query | no code | a linear view of it, as wide as a part query | so are the heads
# Table 1, DyMLP: – | no code | inner width and layers of the box stage's | the same module
# Table 2a, concatenation: – | no code | a linear layer of both | the words allow it
# Sec. 3.4, first boxes: – | learned, whole images at the start | release | recipe
# Sec. 3.4, matching: costs – | 2·focal + 5·L1 − 2·GIoU | release | recipe
# Sec. 3.4, L_cls: focal | α 0.25, γ 2; summed over all queries, divided by people | release | recipe
# Sec. 3.4, pose score: σ̂_k ∈ R² | the mean of its x and y | release | a score is one number
# Sec. 4.1, Swin-L: – | stochastic depth 0.2 | release | recipe
# Sec. 4.1, who has a pose in training: all | later code: matched queries, whose part queries go on by their
#     position in the list | all, or with --matched matched ones; part queries stay with their query | memory
#     and time; SPEGM's norm then sees matched boxes alone
# Sec. 4.1, batch norm: – | of each GPU's 2 images | of all GPUs' images (SyncBatchNorm) | 2 images say
#     little; one GPU, or a process on a CPU, has that of its micro-batch
# Sec. 4.1, batch norm of HRNet: – | learns, normalises by each batch | release; --frozen_norm: it is constant | recipe
# Sec. 4.1, schedule: 280k steps (2×), ablations 1× | R50 140k, others 280k | paper, in epochs | paper's own
# Sec. 4.1, images: 57k | 64k, also those in which nobody has a keypoint | paper | no pose to learn from
# Sec. 4.1, batches: – | wide and high images apart | mixed | one order of images for all methods
# Sec. 4.1, clip, decay, warm-up: – | 1.0, 1e-4, 1000 steps from 1/100 | release | recipe
# micro-batches: – | none | each divided by its own people: --accum 2 is not exactly the batch's gradient |
#     how many people the next ones have is not known yet
# Sec. 4.1, evaluation: – | results pass a misused soft-NMS | plain | see `evaluate`
# Table 6, parts of 14 keypoints: – | no code | seven, by their names: head and neck are one | the paper's number

# ---- Appendix: necks, RoIAlign, flow, fast forms, released names, pictures, summary. Not needed at first.

# Necks over the backbones of common/nets (ResNet, HRNet, Swin-L): maps of stride 4, 8, 16, 32.


class FPN(nn.Module):
    """Feature pyramid of ResNets and Swin: maps get the coarser ones, nearest cell, and a 3×3 convolution."""

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
        own = channels[1:] if laterals else []
        self.lateral = nn.ModuleList(nn.Conv2d(c, dim, 1, bias=False) for c in own)
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


# RoIAlign (Mask R-CNN), and its fast form.


def roi_align(maps: list[Tensor], image: Tensor, boxes: Tensor, level: Tensor, bins: int) -> Tensor:
    """The features in each box as bins × bins cells, on the map that suits it.

    Takes    maps (B, C, h, w) of stride 4, 8, ...;  image, level (R,) say whose map a box (R, 4) lies on
    Returns  (R, bins², C), row by row. Gradients go to the maps, not to the boxes
    """
    # the fast form keeps no samples for the backward pass; `flops` has no numbers, which the formula needs
    form = roi_align_formula if plain() and not boxes.is_meta else roi_align_bag
    return form(maps, image, boxes.detach(), level, bins)


def bilinear(x: Tensor, image: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Maps x (B, C, h, w) read between cells, at columns u and rows v (R, n) of an image (R,): (R, n, n, C).

        x(u, v) = Σ_ij (1 − |u − i|) (1 − |v − j|) x_ij   over the two columns i and rows j next to it

    Up to a cell outside of the map the rim is repeated; beyond, all is 0.
    """
    height, width = x.shape[-2:]
    known = ((v >= -1) & (v <= height))[:, :, None] & ((u >= -1) & (u <= width))[:, None]     # (R, n, n)
    u, v = u.clamp(0, width - 1), v.clamp(0, height - 1)
    total = 0
    for j, weight_v in ((v.long(), 1 - v % 1), ((v.long() + 1).clamp(max=height - 1), v % 1)):
        for i, weight_u in ((u.long(), 1 - u % 1), ((u.long() + 1).clamp(max=width - 1), u % 1)):
            cells = x.to(u.dtype)[image[:, None, None], :, j[:, :, None], i[:, None]]          # (R, n, n, C)
            total = total + (weight_v[:, :, None] * weight_u[:, None])[..., None] * cells
    return total * known[..., None]


def roi_align_formula(maps: list[Tensor], image: Tensor, boxes: Tensor, level: Tensor, bins: int) -> Tensor:
    """A bin is the mean of four samples, at 1/4 and 3/4 of its sides, each read between four cells of the map:

        ·   ·   ·   ·   ·       ·  centres of the map's cells
          ┌───────────┐         the frame is one bin, of bins × bins in the box
          │  +     +  │         +  its four samples
        · │ ·   ·   · │ ·
          │  +     +  │
          └───────────┘
        ·   ·   ·   ·   ·
    """
    fraction = torch.arange(0.5, 2 * bins, device=boxes.device, dtype=boxes.dtype) / (2 * bins)
    out = boxes.new_zeros(boxes.shape[0], 2 * bins, 2 * bins, maps[0].shape[1])
    for l, x in enumerate(maps):
        rows = (level == l).nonzero().squeeze(1)
        low, high = (boxes[rows] / (4 * 2 ** l) - 0.5).unflatten(1, (2, 2)).unbind(1)     # corners in cells
        samples = low[..., None] + (high - low)[..., None] * fraction                       # (r, xy, 2·bins)
        u, v = samples.nan_to_num().unbind(1)
        out[rows] = bilinear(x, image[rows], u, v)
    return rearrange(out, "r (i two) (j also) c -> r (i j) (two also) c", two=2, also=2).mean(2)


def samples_of_bins(low: Tensor, extent: Tensor, size: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Along one axis, the cells that a bin averages and their weights: two samples, between two cells each.

    low, extent, size (R,): where the box starts, how long it is, and how long the map is, in cells.
    Returns  cells and weights (R, bins, 4); a sample more than a cell outside of the map weighs nothing
    """
    fraction = torch.arange(0.5, 2 * bins, dtype=low.dtype, device=low.device) / (2 * bins)
    # a box that diverged must reach the check of the losses, not end as an impossible cell
    c = (low[:, None] + extent[:, None] * fraction).nan_to_num()                   # (R, 2·bins)
    size = size[:, None]
    known = ((c >= -1) & (c <= size)).to(c.dtype) / 2
    c = torch.minimum(c.clamp(min=0), size.to(c.dtype))
    left = torch.minimum(c.long(), size - 1)
    right = torch.minimum(left + 1, size - 1)
    weight = torch.stack([(1 - (c - left)) * known, (c - left) * known], -1)
    cells = torch.stack([left, right], -1)
    return tuple(rearrange(one, "r (n s) side -> r n (s side)", s=2) for one in (cells, weight))


def roi_align_bag(maps: list[Tensor], image: Tensor, boxes: Tensor, level: Tensor, bins: int) -> Tensor:
    """The same without a sample in memory: a bin is a weighted sum of 16 rows of a table of all cells."""
    table = torch.cat([rearrange(x, "b c h w -> (b h w) c") for x in maps])
    sides = torch.tensor([x.shape[:1:-1] for x in maps], device=boxes.device)
    start = torch.tensor([0, *(x[:, 0].numel() for x in maps)], device=boxes.device).cumsum(0)  # row of a map
    (width, height), corners = sides[level].unbind(1), boxes / (4 * 2 ** level)[:, None] - 0.5
    (x1, y1), (w, h) = corners[:, :2].unbind(1), (corners[:, 2:] - corners[:, :2]).unbind(1)
    x, weight_x = samples_of_bins(x1, w, width, bins)
    y, weight_y = samples_of_bins(y1, h, height, bins)
    first = start[level] + image * height * width
    row = (first[:, None, None] + y * width[:, None, None])[:, :, None, :, None] + x[:, None, :, None, :]
    weight = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]         # (R, bins, bins, 4, 4)
    out = F.embedding_bag(row.flatten(3).flatten(0, 2), table.to(weight.dtype), mode="sum",
                          per_sample_weights=weight.flatten(3).flatten(0, 2))
    return out.view(len(boxes), bins * bins, -1)


# The flow of eq. 4 (RealNVP): which errors a pose makes (RLE, Li et al., ICCV 2021).


class RealNVP(nn.Module):
    """Six affine coupling layers between the normal distribution z and errors x of a keypoint, both (..., 2).

    Layer i leaves one coordinate as it is, y for even i, and scales and shifts the other one:

        x_other = z_other exp(s_i(z_kept)) + t_i(z_kept)
    """

    def __init__(self, layers: int = 6, hidden: int = 64):
        super().__init__()

        def net(*last: nn.Module) -> nn.Module:
            return nn.Sequential(nn.Linear(2, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden),
                                 nn.LeakyReLU(), nn.Linear(hidden, 2), *last)

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


# Poses of some queries alone: `--matched` in training, `--prune` where AP is computed.


def box_stages_first(model: QueryPose, maps: list[Tensor], boxes: Tensor,
                     queries: Tensor) -> tuple[list[Tensor], list[Output]]:
    """All box stages, where none needs a pose → of each Q_I (B, Q, C), and an Output without poses."""
    every, found = [], []
    for box_stage in model.box_stages:
        queries, logits, boxes = box_stage(maps, queries, boxes)
        nothing = boxes.new_zeros(*logits.shape, model.skeleton.num_keypoints, 2)
        every.append(queries)
        found.append(Output(logits, boxes, nothing, nothing + 1))
        boxes = boxes.detach()
    return every, found


def pose_rows(model: QueryPose, finest: Tensor, queries: list[Tensor], found: list[Output],
              rows: Tensor) -> list[Output]:
    """`found` with poses of rows (R,) of the B·Q queries. A query keeps its part queries all the way."""
    part_queries, outputs, image = model.parts[None], [], image_of_rows(found[0].boxes)[rows]
    for keypoint_stage, q_i, one in zip(model.keypoint_stages, queries, found):
        chosen = one.boxes.detach().flatten(0, 1)[rows], q_i.flatten(0, 1)[rows]
        keypoints, sigmas, _, new_part_queries = keypoint_stage(finest, image, *chosen, part_queries)
        pose = (empty.to(x.dtype).flatten(0, 1).index_copy(0, rows, x).view_as(empty)
                for empty, x in zip(one[2:], (keypoints, sigmas)))
        outputs.append(Output(one.logits, one.boxes, *pose))
        if model.cfg.update != "none":
            part_queries = new_part_queries
    return outputs


def pose_chosen(model: QueryPose, maps: list[Tensor], boxes: Tensor, queries: Tensor,
                choose: Choose) -> list[Output]:
    """QueryPose.forward where boxes need no poses, with poses of the chosen queries alone.

    For these the numbers are the same, but in training, where SPEGM's batch norm then sees these alone.
    """
    every, found = box_stages_first(model, maps, boxes, queries)
    rows = choose(found).flatten().nonzero().squeeze(1)
    rows = rows if len(rows) else rows.new_zeros(1)                     # batch norm needs something to see
    return pose_rows(model, maps[0], every, found, rows)


def matched_queries(outputs: list[Output], people: list[People], pairs: list[Pairs]) -> Tensor:
    """(B, Q) True where a query is matched in any stage: poses are learned from these alone.

    The pairs of each stage are appended to `pairs`, for the losses of the same step.
    """
    needed = torch.zeros_like(outputs[0].logits, dtype=torch.bool)
    pairs += match(outputs, people)
    for image, query, _ in pairs:
        needed[image, query] = True
    return needed


def best_poses(model: QueryPose, images: Tensor, sizes: Tensor, counted: int = 20, first: int = 25) -> Output:
    """The last stage, with poses of those alone who can be among the `counted` people of the highest scores.

    A pose's score is at most the class score C̄ of its query. So the `first` queries of the highest C̄ are
    posed, then those whose C̄ reaches the score of the last who counts so far. No other can be better.
    """
    maps = model.neck(model.backbone(images))
    boxes, queries = model.first_boxes(sizes), model.queries.expand(len(images), -1, -1)
    every, found = box_stages_first(model, maps, boxes, queries)
    last, size = found[-1], sizes.repeat(1, 2)[:, None].to(boxes.dtype)
    clipped = last.boxes.clamp(min=0).minimum(size)
    shown = (clipped[..., 2:] > clipped[..., :2]).all(-1)               # `to_prediction` leaves out the others
    score = last.logits.float().sigmoid() * shown

    def pose(wanted: Tensor) -> Output:
        rows = wanted.flatten().nonzero().squeeze(1)
        output = pose_rows(model, maps[0], every, found, rows)[-1] if len(rows) else last
        return Output(*(x.float() for x in output))                     # half precision would round the scores

    counted, first = (min(n, score.shape[1]) for n in (counted, first))
    early = torch.zeros_like(shown).scatter(1, score.topk(first).indices, True)
    output = pose(early)
    least = (pose_scores(output)[0] * shown).topk(counted).values[:, -1:]
    late = ~early & shown & (score >= least)
    both = (torch.where(late[..., None, None], more, some) for some, more in zip(output[2:], pose(late)[2:]))
    return Output(output.logits, output.boxes, *both)


# Start values, inference, building, the released weights.


def spread_boxes(count: int) -> Tensor:
    """Boxes (count, 4), cx, cy, w, h in fractions: half of the image, spread evenly by the golden ratio."""
    i = torch.arange(count) + 0.5
    centre = torch.stack([i / count, i * (math.sqrt(5) - 1) / 2 % 1], 1)
    return torch.cat([0.25 + centre / 2, torch.full((count, 2), 0.5)], 1)


@torch.no_grad()
def reset_parameters(model: QueryPose) -> None:
    """Start values of the release: Xavier in both decoders, zero where it sets a bias. Freezes what it freezes."""
    for parameter in [*model.box_stages.parameters(), *model.keypoint_stages.parameters()]:
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for conv in (m for m in model.neck.modules() if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_uniform_(conv.weight, a=1)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    for module in model.modules():
        zero = [module.in_proj, module.out_proj] if isinstance(module, SelfAttention) else []
        zero += [module.attention, module.out] if isinstance(module, SPEGM) else []
        zero += [*module.convs] if isinstance(module, KeypointStage) else []
        for layer in zero:
            nn.init.zeros_(layer.bias)
    for stage in model.box_stages:
        nn.init.constant_(stage.score.bias, -math.log(99))                     # a prior of 0.01
    if model.cfg.freeze and isinstance(model.backbone, ResNet):
        for part in (model.backbone.stem, model.backbone.res2):
            part.requires_grad_(False)


@torch.no_grad()
def fuse(model: QueryPose) -> QueryPose:
    """A copy for inference: the backbone's norms are folded into its convolutions."""
    model = copy.deepcopy(model).eval()
    for module in [m for m in model.modules() if isinstance(m, ConvNorm)]:
        module.fold()
    return model.to(memory_format=torch.channels_last)


def to_batch(pictures: list[Image.Image], image_ids: list, cfg: Config) -> dict:
    """RGB pictures of any size → what `predict` takes."""
    return dict(images=[input_image(picture, cfg) for picture in pictures], image_ids=image_ids,
                sizes_px=[picture.size for picture in pictures])


def exported(model: QueryPose) -> Exported:
    return Exported(
        lambda images, sizes: model(images, sizes)[-1]._asdict(),
        lambda batch: dict(zip(("images", "sizes"), pad_images(batch["images"]))),
        RESIZED.format(model.cfg.short_side, model.cfg.long_side) + "sizes: w, h before the zeros",
        "score of a person = sigmoid(logits) * mean(1 - sigmas); in resized pixels a keypoint is "
        "(keypoints + 0.5) * (x2 - x1, y2 - y1) + (x1, y1) of its box; then undo the resizing and take 0.5 off")


TRUNK, BOX_STAGE, KEYPOINT_STAGE = (rf"^{part}\." for part in (
    r"backbone\.bottom_up", r"head\.head_series\.(\d+)", r"head\.pose_head_series\.(\d+)"))
RENAME = [            # released name → ours, first match wins; what matches nothing keeps its name
    (TRUNK + r"stem\.conv1\.norm\.", "backbone.stem.norm."),
    (TRUNK + r"stem\.conv1\.", "backbone.stem.conv."),
    (TRUNK + r"(res\d\.\d+\.\w+)\.norm\.", r"backbone.\1.norm."),
    (TRUNK + r"(res\d\.\d+\.\w+)\.weight", r"backbone.\1.conv.weight"),
    (TRUNK + r"(.*)bn(\d)\.", r"backbone.\1conv\2.norm."),
    (TRUNK + r"(.*)conv(\d)\.", r"backbone.\1conv\2.conv."),
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
        r"pose_decoder_inst_interact\.out_layer\.": "dynamic.out.",
        r"pose_decoder_inst_interact\.": "dynamic.", r"inst_norm\.": "query_norm.",
        r"norm2\.": "query_ffn.norm.", r"linear([12])\.": r"query_ffn.linear\2.",
        r"part_embed_generator\.upsample\.0\.": "look.upsample.",
        r"part_embed_generator\.upsample\.1\.": "look.norm.",
        r"part_embed_generator\.LSA_conv\.": "look.attention.", r"part_embed_generator\.fc\.": "look.out.",
        r"updater\.fc([12])\.": r"update.linear\2.", r"updater\.norm_fc1\.": "update.norm.",
        r"kps_self_attn\.in_proj_": "attention.in_proj.", r"kps_self_attn\.": "attention.",
        r"self_attn_norm\.": "norm.", r"norm2_l\.": "ffn.norm.", r"linear([12])_l\.": r"ffn.linear\2.",
        r"residual_filter\.": "residual."}.items()),
]
IGNORED = {r"\.updater\.(fc3|norm_fc3)\.": "never used",
           r"^backbone\.(fpn_conv\.4|lateral_conv\.0)\.": "never used",
           r"\.relative_position_index$": "computed here", r"^criterion\.flow\.flow\.mask$": "a constant"}
TORCHVISION = [*((rf"^layer{i}\.", f"res{i + 1}.") for i in range(1, 5)),
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
    """(preset, number of keypoints) of a released QueryPose checkpoint, by its tensors; None for others."""
    if not {"part_query.weight", "init_proposal_boxes.weight"} <= state.keys():
        return None
    full = "head.pose_head_series.0.inst_norm.weight" in state
    heads = [value for name, value in state.items()
             if re.match(r"head\.pose_head_series\.0\.fc_coord\.\d+\.linear\.bias", name)]
    signs = {"stem.conv1.weight": "r50", "patch_embed.proj.weight": "swin_l",
             "transition1.0.0.weight": "hrnet_w"}
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
    if resnet:                                                 # of torchvision, or of detectron2 as they are
        state = weights.rename(weights.rename(state, TORCHVISION), INSIDE_BLOCK)
    prefix = "backbone.bottom_up."
    return {prefix + name.removeprefix(prefix): value for name, value in state.items()}


def parts_of(skeleton: Skeleton, cfg: Config) -> list[list[int]]:
    return keypoint_parts(skeleton, cfg.scheme) if cfg.query == "part" else [list(range(skeleton.num_keypoints))]


PART_ROWS = {r"^parts$|^keypoint_stages\.\d\.look\.attention\.(weight|bias)$": 0}           # see carry_rows
PART_LAYERS = {rf"^(keypoint_stages\.\d\.{kind}\.)(\d+)(\..*)": n for kind, n in (("heads", 2), ("residual", 0))}


def load_init(model: QueryPose, source: str) -> None:
    """Start weights by run, file or name: QueryPose (of any keypoints), ResNet (of two spellings), HRNet, Swin."""
    start, own, cfg = weights.read_start(source, "querypose"), model.state_dict(), model.cfg
    state, lacking = start.state, {r"num_batches_tracked$": "frozen norms have none"}
    if not start.run and "part_query.weight" not in state:
        state = backbone_names(state, isinstance(model.backbone, ResNet))
    state = state if start.run else convert_official(state, cfg)
    if "parts" not in state:
        lacking[LACKING] = "not in a backbone's file"
        return weights.load_start(model, start, state, {}, lacking)
    count = sum(len(value) for name, value in state.items() if re.search(r"stages\.0\.heads.*sigmas\.bias", name)) // 2
    skeleton, rows = weights.start_rows(start, count, model)
    theirs = parts_of(skeleton, resolve(Config(), **start.run["config"]) if start.run else cfg)
    state = weights.carry_groups(state, own, PART_ROWS, PART_LAYERS, theirs, parts_of(model.skeleton, cfg), rows)
    weights.fill_and_say(model, start, state, PART_ROWS | PART_LAYERS, lacking, rows)


# Pictures: where the parts of a person look (Fig. 5 and 6), and how sure its joints are.


def draw_attention(image: Image.Image, box: list[float], attention: np.ndarray) -> list[Image.Image]:
    """The image in a box, and again under each part's map (M, n, n): the brightest cell is the largest."""
    side = (192, 192)                              # whatever the size of the box; black outside of the image
    crop = image.transform(side, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    shades = (255 * attention / attention.max((1, 2), keepdims=True)).astype(np.uint8)
    heat, shown = Image.new("RGB", side, draw.RIGHT[0]), [crop]
    for shade in shades:
        mask = Image.fromarray(shade).resize(side, Image.Resampling.BILINEAR)
        shown.append(Image.composite(heat, crop.point(lambda value: value // 2), mask))
    return shown


@torch.no_grad()
def show_process(model: QueryPose, image: Image.Image, threshold: float) -> dict[str, list[Image.Image]]:
    """For eval.py --process, of people above the threshold: `sigma`, the image with an ellipse of two
    deviations σ̂ at each keypoint, and, with SPEGM, `attention`, the last stage's maps A: a row per person, her box,
    then a map per part. Nothing if there is nobody.
    """
    size, picture, shows = torch.tensor(image.size), input_image(image, model.cfg), model.cfg.interaction == "spegm"
    with watch(maps=[model.keypoint_stages[-1].look.attention] if shows else []) as seen:
        output = Output(*(x[0] for x in detect(model, [picture])))
    boxes = output.boxes * (size / torch.tensor(picture.shape[:0:-1])).repeat(2)
    rows = (pose_scores(output)[0] >= max(threshold, 1e-6)).nonzero().squeeze(1)
    if not len(rows):
        return {}
    people = keypoints_px(output.keypoints, boxes)[rows] - 0.5
    spread = output.sigmas[rows] * (boxes[rows, 2:] - boxes[rows, :2])[:, None]
    # four guesses of each joint whose standard deviations are σ̂
    guesses = torch.stack([people + sign * 2 ** 0.5 * spread * torch.tensor(axis) for sign in (-1, 1)
                           for axis in ([1.0, 0.0], [0.0, 1.0])])
    ellipses = draw.draw_ellipses(image, guesses.clamp(-1e4, 1e4).numpy(), model.skeleton)
    shown = dict(sigma=[draw.captioned(ellipses, "two predicted deviations σ̂ of each keypoint")])
    if shows:
        maps = seen["maps"][-1].float()
        attention = maps.flatten(2).softmax(-1).view(maps.shape).cpu().numpy()
        tiles = [tile for row in rows.tolist()
                 for tile in draw_attention(image, boxes[row].tolist(), attention[row])]
        sheet = draw.contact_sheet(tiles, 1 + attention.shape[1], 192)
        shown["attention"] = [draw.captioned(sheet, "a row per person: her box, then where each part of her looks in it "
                                             "(spatial attention of the last stage)")]
    return shown


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
        every, learned = sum(p.numel() for p in model.parameters()) / 1e6, weights.count_parameters(model) / 1e6
        rows.append(f"{preset:16}{f'{width}x{height}':>9}{every:>11.2f} M{learned:>9.2f} M"
                    f"{flops(model, width, height) / 1e9:>9.1f}")
    return "\n".join(rows)


def main() -> None:
    run_method(Config, PRESETS, __doc__, train, summary, partial(run_tables, TABLES))


if __name__ == "__main__":
    main()
