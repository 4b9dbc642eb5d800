"""DiffusionPose: video pose by denoising heatmaps, with Mamba and a Markov random field (AAAI 2026).

Idea     A person's pose in the middle of three frames is a stack of heatmaps, one per joint, that starts as
         noise. A decoder turns it into the answer, in one step by default. An encoder, which reads the
         frames as one sequence with state-space models, tells it what the clip looks like and where the
         joints probably are; and the joints tell each other, by messages along the limbs of the skeleton.
Flow     crops (B,3,3,H,W) → ViT, each frame → (B,3,N,D), + keypoint tokens → X (B,3,M,D)
         → SpatioTemporalBlock ×3 → C_f (B,N,D), what the clip looks like, C_p (B,J,D), where joints may be.
         Then noise x_T (B,J,Hh,Wh), t, C_f, C_p → DenoisingBlock ×3 → heatmaps (B,J,Hh,Wh); ddim may repeat
Read     MambaBlock → SpatioTemporalBlock → SpatioTemporalEncoder → message_tables
         → MarkovOptimizationLayer (eqs. 1-3) → DenoisingBlock → PoseDenoisingDecoder → q_sample, ddim
         → DiffusionPose → markov_loss (eq. 4) → criterion (eq. 5) → train; the ViT: common/nets/vit.py
Letters  B clips  P people of a prediction  J joints  N patches of a frame  M = N+J tokens of a frame
         D channels, E = 2D inside Mamba, whose own A, B, C, D are in MambaBlock  L tokens of a sequence
         H × W pixels of a crop  Hh × Wh cells of a heatmap: H/4 × W/4  G target and H predicted heatmaps
         T = 1000 diffusion times t  ᾱ_t the signal's share in x_t  s signal scale  K rounds of messages
         N_i, the state of joint i, in eqs. 1-3; M limbs, N pairs of limbs, L lengths in eq. 4; σ deviation of
         a target's Gaussian, and of a DDIM step's fresh noise
Units    G and H are in [0, 1]; what is denoised is x = (2G − 1)·s; frames are normalised RGB; boxes are
         x1, y1, x2, y2 in pixels of the image; "cells" are those of a heatmap
Marks    No code was ever released and the paper leaves much open. [P] the paper says it; [A] taken from
         public code of an ancestor (ViTPose, DCPose, DiffusionDet, Mamba); [C] our choice where the paper
         has no words. The paper's sections carry no numbers: they are cited by title.
Tables   at the end of the main text: equation → function, rows of the paper's Tables 1 to 7, departures

    python diffusionpose.py                             what each preset is: parameters, GFLOPs
    python diffusionpose.py --train                     learn clips of puppets, drawn by data/puppets.py
    python diffusionpose.py --train --no-neighbours     without the frames before and after, to compare
    python diffusionpose.py --train --data data/posetrack18 --preset b          from ViTPose's weights
    python eval.py runs/<run> --images frames/ --boxes people.json --gif        poses over time, of a folder
    python eval.py runs/<run> --images frames/ --process       heatmaps step by step, messages of the joints
"""
from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import common                               # first: Ctrl-C while torch loads then ends without a traceback
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from common import draw, metrics, transforms, weights
from common.boxes import Boxes, Found, people_to_learn, true_boxes, whole_image
from common.cli import RunConfig, check_choice, check_range, parse_numbers, resolve, run_method
from common.datasets import PoseDataset
from common.errors import UserError
from common.export import Exported
from common.heatmaps import CellHeatmaps
from common.nets import vit
from common.nets.vit import PATCH, Attention, LayerNorm, TransformerBlock, ViT, mlp
from common.oks import rescore
from common.predict import people_by_image, predict_people
from common.ranks import Ranks, autocast, distribute, init_ranks, mean_over_ranks, rank_zero_first, say, seed_all
from common.records import Prediction, Sample
from common.run import Ema, Run
from common.skeletons import SKELETONS, Skeleton, edges, get_skeleton
from common.splits import open_splits
from common.tables import Row, Table, run_tables
from kernels.selective_scan import selective_scan

# ---- Configuration: every number of the paper. Each field is a flag, its comment the flag's help. --------

STRIDE = 4                     # pixels of the crop per cell of a heatmap [A: ViTPose, DCPose]
TIMES = 1000                   # T, diffusion times [A: DiffusionDet]
TOP_DOWN = True                # for eval.py: it looks at one person at a time, whose box it is given
CLIPS = True                   # and at the frames before and after
AT_INFERENCE = ("steps", "eta", "ensemble", "flip_test", "neighbours", "seed")     # for eval.py --set


@dataclass(frozen=True)
class Config(RunConfig):       # which adds data, accum (micro-batches), amp, processes, workers, eval_*, seed
    # the clip and its ViT (Problem Formulation: crops of three frames; a ViT pre-trained on COCO)
    height: int = 256              # pixels of a person's crop, a multiple of 16: 256, or 384 [C]
    width: int = 192               # 192, or 288 [C]
    depth: int = 12                # layers of the ViT [A: ViTPose; the paper does not say which of its sizes]
    vit_heads: int = 12            # its attention heads [A]
    neighbours: bool = True        # off: the key frame three times, for what the other frames are worth
    # Spatio-Temporal Feature Encoder and Pose Denoising Decoder
    dim: int = 768                 # D, channels of every token [A: the ViT's]
    heads: int = 12                # attention heads everywhere else: D/64 [C]
    stfe_layers: int = 3           # Spatio-Temporal Blocks: the paper stacks several [C]
    decoder_layers: int = 3        # denoising blocks [C]
    # the paper's ablations (Tables 5 to 7)
    stfe: str = "stb"              # relates frames: stb, transformer (Table 6 b) or none (Tables 5, 6 a)
    denoiser: str = "hcdb"         # hcdb, or unet, without C_p and Markov layers (Tables 5 a, 7 a)
    cp: bool = True                # joints look at each other, guided by C_p (Table 7 c adds it)
    mol: bool = True               # Markov Optimization Layers (Table 7 d adds them)
    alpha: float = 0.1             # α of eq. 5, weight of the Markov loss [C]; 0: without (Table 7 e adds it)
    # diffusion (Preliminaries; Training and Inference Process)
    signal_scale: float = 1.0      # s, how large the signal is beside the noise [C]
    steps: int = 1                 # DDIM steps of a prediction [P]
    ensemble: int = 1              # draws of noise whose heatmaps are averaged: one [P], DiffPose has several
    eta: float = 0.0               # share of fresh noise in a DDIM step [C]
    init: str = ""                 # start weights: run, file or name; DiffusionPose, or a ViT of ViTPose or MAE
    # data
    half_body: float = 0.3         # share of people with more than 8 joints shown by half [A: DCPose]
    scale_jitter: float = 0.35     # relative deviation of a crop's size, cut off at one [A: DCPose]
    rotation: float = 45.0         # deviation of its angle, degrees, cut off at two, of 60 % [A: DCPose]
    sigma: float = 2.0             # of target Gaussians, cells: 2 for 256x192, 3 for 384x288 [A: DCPose]
    flip_test: bool = False        # prediction averages the heatmaps of the clip and of its mirror image
    # optimisation (Datasets and Experimental Settings)
    epochs: int = 20               # passes over the training people [P]
    batch: int = 32                # clips per optimiser step, over all GPUs and micro-batches [C]
    lr: float = 5e-4               # learning rate [P]
    lr_backbone: float = 5e-5      # learning rate of the ViT [C]
    drop_epochs: str = "16"        # learning rate ×0.1 from each of these epochs on, the first is 0 [P]
    weight_decay: float = 0.1      # AdamW's; not of biases, norms, learned embeddings [A: ViTPose]
    warmup: int = 500              # optimiser steps of linear warm-up [C]
    clip: float = 1.0              # the gradient's norm is cut down to this [C]
    # training aids, to learn from nothing: ours, not the paper's; only the preset tiny has them
    stem: str = "patch"            # what makes patches tokens: patch, the ViT's, or conv, small convolutions
    patch_weight: float = 0.0      # of an auxiliary loss that asks the patches of C_f for heatmaps
    schedule: str = "constant"     # of the learning rate: constant but for its drops, or cosine
    ema: float = 0.0               # decay of the weight average that is evaluated; 0: the weights themselves
    ema_warmup: int = 0            # optimiser steps over which the decay grows to that

    def __post_init__(self):
        """Raises UserError for values that no run could use."""
        super().__post_init__()
        check_choice(self, stfe=("stb", "transformer", "none"), denoiser=("hcdb", "unet"),
                     stem=("patch", "conv"), schedule=("constant", "cosine"))
        check_range(self, 1, math.inf, "height width dim depth vit_heads heads stfe_layers decoder_layers "
                    "ensemble epochs batch")
        check_range(self, 1, TIMES, "steps")
        check_range(self, 1e-6, math.inf, "signal_scale lr clip")
        check_range(self, 1e-6, 1e6, "sigma")
        check_range(self, 0, math.inf, "alpha patch_weight lr_backbone weight_decay warmup ema_warmup")
        check_range(self, 0, 180, "rotation")
        check_range(self, 0, 0.9, "scale_jitter")
        check_range(self, 0, 1, "eta half_body ema")
        parse_numbers(self.drop_epochs)
        units = dict(dim=math.lcm(4, self.vit_heads, self.heads), height=PATCH, width=PATCH)
        for name, unit in units.items():
            if getattr(self, name) % unit:
                raise UserError(f"--{name} {getattr(self, name)}: expected a multiple of {unit}, for its "
                                f"{'heads' if name == 'dim' else 'patches'}")
        if self.batch % self.accum:
            raise UserError(f"--batch {self.batch} does not split into {self.accum} micro-batches (--accum)")

    @property
    def grid(self) -> tuple[int, int]:                                  # rows and columns of patches
        return self.height // PATCH, self.width // PATCH

    @property
    def heatmap(self) -> tuple[int, int]:                               # rows and columns of a heatmap
        return self.height // STRIDE, self.width // STRIDE


def _presets() -> dict[str, Config]:
    """The sizes of ViTPose's four models; the paper does not say which is its own."""
    b = Config(init="vitpose-base", amp="bf16")
    s = replace(b, dim=384, heads=6, init="vitpose_small.pth")        # 12 heads in the ViT [A]: DeiT-S has 6
    l = replace(b, dim=1024, depth=24, vit_heads=16, heads=16, init="vitpose_large.pth")
    h = replace(b, dim=1280, depth=32, vit_heads=16, heads=20, init="vitpose_huge.pth")
    # minutes on a laptop, from nothing, with all the aids. Its signal is a tenth of the noise: with s = 1 a
    # matched filter finds the joint in x_t more often than not up to t ≈ 750, so that three training steps of
    # four can be done without a look at the clip; with 0.1 up to t ≈ 150: most ask what prediction will ask
    tiny = replace(b, height=128, width=96, dim=96, depth=4, vit_heads=4, heads=4, stfe_layers=1,
                   decoder_layers=2, stem="conv", patch_weight=1.0, init="", signal_scale=0.1, half_body=0.0,
                   scale_jitter=0.1, rotation=10.0, epochs=11, batch=16, lr=2e-3, lr_backbone=2e-3,
                   weight_decay=0.05, schedule="cosine", warmup=50, drop_epochs="", ema=0.995, ema_warmup=100,
                   processes=2, workers=0, eval_every=11, eval_batch=64)
    return {"tiny": tiny, "s": s, "b": b, "l": l, "h": h}


PRESETS: dict[str, Config] = _presets()

# ---- Spatio-Temporal Feature Encoder (STFE): what the clip looks like, and where the joints may be -------

STATES, KERNEL = 16, 4                 # Mamba: numbers per channel, width of its convolution
KEY = 1                                # the key frame's place among the three


class MambaBlock(nn.Module):
    """A selective state-space model along a sequence, (B, L, D) → (B, L, D) [A: Gu & Dao 2023, their names].

        u, z = W_in x                                       E = 2D channels each
        u ← silu(conv(u))                                   a channel's last 4 positions, each channel alone
        Δ, B, C = W_x u;   Δ ← softplus(W_Δ Δ + b)          step sizes, and what is written and read
        h_l = exp(Δ_l A) h_{l−1} + Δ_l u_l B_l              16 numbers per channel, A = −exp(A_log)
        out = W_out (y · silu(z)),   y_l = C_l · h_l + D u_l

    Causal: a token depends on itself and on those before it. No norm and no residual inside.
    """

    def __init__(self, dim: int):
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.split = rank, STATES, STATES
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, KERNEL, groups=inner, padding=KERNEL - 1)
        self.x_proj = nn.Linear(inner, sum(self.split), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -rank ** -0.5, rank ** -0.5)
        step = torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()        # of time, log-uniform
        self.dt_proj.bias = nn.Parameter(step + (-torch.expm1(-step)).log())            # softplus⁻¹ of it

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)                                             # (B, L, E) each
        u = F.silu(self.conv1d(u.mT)[..., :u.shape[1]].mT)                              # the first L
        delta, B, C = self.x_proj(u).split(self.split, -1)                   # (B, L, D/16), (B, L, 16) twice
        delta = F.linear(delta, self.dt_proj.weight)                         # its bias is added in the scan
        y = selective_scan(u.mT, delta.mT, -self.A_log.exp(), B.mT, C.mT, self.D, z.mT, self.dt_proj.bias,
                           delta_softplus=True)
        return self.out_proj(y.mT)


class SpatioTemporalBlock(nn.Module):
    """Tokens of three frames, X (B, 3, M, D) → the same shape. Pre-norm residual steps [C]:

        1  X ← X + SM(LN(X))        Spatial Mamba: each frame is a sequence of its own                  [P]
        2  g = FSM(LN(X))           Full-Sequence Mamba: one sequence, frame after frame, forward only  [P]
           s = TSA(LN(X))           Temporal Self-Attention: each place of the frames by itself         [P]
        3  a = σ(W [g ; s] + b);    X ← X + a g + (1 − a) s         dynamic fusion [P], by this gate    [C]
        4  X ← X + MLP(LN(X))                                                                           [P]

                 frame t−1                key frame t              frame t+1
             ┌──────────────────┐     ┌──────────────────┐     ┌──────────────────┐
             │ p1 p2 … pN k1…kJ │     │ p1 p2 … pN k1…kJ │     │ p1 p2 … pN k1…kJ │    patches p, joints k
             └──────────────────┘     └──────────────────┘     └──────────────────┘
        SM     ────────────────→        ────────────────→        ────────────────→     three sequences of M
        FSM    ──────────────────────────────────────────────────────────────────→     one sequence of 3M
        TSA       p2 ←─────────────────────→ p2 ←─────────────────────→ p2             M sequences of 3

    The paper has no formula for the fusion, and an MLP that restores the number of tokens: here it is the
    gate that makes one token of the two copies of each. A gate is the smallest thing that is dynamic.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm_spatial, self.spatial_mamba = LayerNorm(dim), MambaBlock(dim)
        self.norm_full, self.full_mamba = LayerNorm(dim), MambaBlock(dim)
        self.norm_temporal, self.temporal_attn = LayerNorm(dim), Attention(dim, heads)
        self.gate = nn.Linear(2 * dim, dim)
        self.norm_mlp, self.mlp = LayerNorm(dim), mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.spatial_mamba(self.norm_spatial(x).flatten(0, 1)).view_as(x)
        g = self.full_mamba(self.norm_full(x).flatten(1, 2)).view_as(x)
        s = rearrange(self.norm_temporal(x), "b f m d -> (b m) f d").contiguous()  # else slow
        s = rearrange(self.temporal_attn(s), "(b m) f d -> b f m d", b=len(x))
        a = self.gate(torch.cat([g, s], -1)).sigmoid()
        x = x + torch.lerp(s, g, a)                                                     # a g + (1 − a) s
        return x + self.mlp(self.norm_mlp(x))


class SpatioTemporalEncoder(nn.Module):
    """STFE: patches of three frames (B, 3, N, D) → C_f (B, N, D), C_p (B, J, D).

        X = [F_f + frame embedding ; keypoint tokens_f],  f = t−1, t, t+1     then blocks, then LN
        C_f = W [X_{t−1} ; X_t ; X_{t+1}] on the patches;   C_p = the key frame's keypoint tokens

    [P] Keypoint tokens are learned for each frame. [C] Frame embeddings: else attention over time could not
    tell which frame is the key frame. [C] Keypoint tokens stand behind the patches: only there can a causal
    scan show them any. The scan lets the key frame see t−1; attention lets it see t+1, too [P].

    With --stfe none no token meets another here: C_f is still fused of the three frames' patches, and C_p,
    the tokens themselves, is the same for every clip.
    """

    def __init__(self, cfg: Config, joints: int):
        super().__init__()
        dim, self.kind = cfg.dim, cfg.stfe
        if self.kind == "none" and (cfg.denoiser == "unet" or not cfg.cp):
            joints = 0                                                             # nothing would read them
        self.keypoint_tokens = nn.Parameter(torch.empty(3, joints, dim))
        self.frame_embed = nn.Parameter(torch.empty(3, 1, dim))
        block, count = SpatioTemporalBlock if self.kind == "stb" else TransformerBlock, cfg.stfe_layers
        self.blocks = nn.Sequential(*(block(dim, cfg.heads) for _ in range(count * (self.kind != "none"))))
        self.norm = LayerNorm(dim)
        self.fuse = nn.Linear(3 * dim, dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        patches, tokens = features.shape[2], self.keypoint_tokens.expand(len(features), -1, -1, -1)
        x = torch.cat([features + self.frame_embed, tokens], 2)                         # (B, 3, M, D)
        if self.kind == "transformer":                                                  # over all 3M tokens
            x = self.blocks(x.flatten(1, 2)).view_as(x)
        else:
            x = self.blocks(x)
        x = self.norm(x)
        c_f = self.fuse(rearrange(x[:, :, :patches], "b f n d -> b n (f d)"))
        return c_f, x[:, KEY, patches:]


# ---- Pose Denoising Decoder (PDD) > Markov Optimization Layer --------------------------------------------

# Trees of limbs [C]: the usual drawings without the bars from hip to hip and from shoulder to shoulder; in
# COCO's the head hangs on the nose, without the edges from eye to eye and from ear to shoulder.
TREES = dict(posetrack=edges("0-2 0-1 1-3 1-4 3-5 5-7 4-6 6-8 3-9 4-10 9-11 11-13 10-12 12-14"),
             coco=edges("0-1 0-2 1-3 2-4 0-5 0-6 5-7 7-9 6-8 8-10 5-11 6-12 11-13 13-15 12-14 14-16"),
             crowdpose=edges("12-13 13-0 13-1 0-2 2-4 1-3 3-5 0-6 1-7 6-8 8-10 7-9 9-11"))


def limbs(skeleton: Skeleton) -> tuple[tuple[int, int], ...]:
    """The skeleton's tree, which is its own mirror image; of an unknown skeleton one made of its edges.

    There an edge goes in together with its mirror image, unless the two would close a circle. Edges that are
    their own mirror image (neck to head, a bar from hip to hip) come last: a bar must not keep a pair out.
    Where no tree of all joints is its own mirror image, there are several small ones.
    """
    if skeleton.name in TREES and skeleton.keypoints == SKELETONS[skeleton.name].keypoints:
        return TREES[skeleton.name]
    flip = skeleton.flip or range(skeleton.num_keypoints)
    pairs = [{tuple(sorted((a, b))), tuple(sorted((flip[a], flip[b])))} for a, b in skeleton.edges]
    part, tree = list(range(skeleton.num_keypoints)), []           # joints of one part have one number
    for pair in sorted(pairs, key=len, reverse=True):
        joined = part
        for a, b in sorted(pair):
            if joined[a] == joined[b]:
                break                                              # a circle
            joined = [joined[b] if p == joined[a] else p for p in joined]
        else:
            part, tree = joined, tree + sorted(pair)
    return tuple(tree)


def message_tables(tree: tuple[tuple[int, int], ...]) -> tuple[list[tuple[int, int]], np.ndarray, int]:
    """The messages of a tree, which of them takes in which, and after how many rounds all of them are known.

        a chain of three joints      0 ──────── 1 ──────── 2

        round 1                       0→1 ──▸    ◂── 2→1          nobody else can tell 0 or 2 anything
        round 2                      ◂── 1→0      1→2 ──▸         1→0 takes in 2→1, and 1→2 takes in 0→1

        follows        1→0  0→1  2→1  1→2
                 1→0    ·    ·    1    ·
                 0→1    ·    ·    ·    ·
                 2→1    ·    ·    ·    ·
                 1→2    ·    1    ·    ·

    Returns  arrows (sender j, receiver i), two for each limb, by receiver;  follows (arrows, arrows), 1 where
             the row is j→i and the column k→j with k ≠ i (eq. 1);  rounds K, the length of the longest path
    """
    arrows = sorted([*tree, *((b, a) for a, b in tree)], key=lambda arrow: arrow[::-1])
    follows = np.array([[k_j[1] == j and k_j[0] != i for k_j in arrows] for j, i in arrows], dtype=int)
    follows = follows.reshape(len(arrows), len(arrows))            # of a single joint, too
    rounds, paths = 0, np.eye(len(arrows), dtype=int)              # paths of `rounds` + 1 messages
    while paths.any():
        paths, rounds = paths @ follows, rounds + 1
    return arrows, follows, rounds


class MarkovOptimizationLayer(nn.Module):
    """Joints tell each other, limb by limb, about themselves and those behind: h (B, J, D) → the same shape.

        msg_{j→i} ∝ ψ_i φ_ij ∏_{k ∈ Ng(j)∖i} msg_{k→j}                                              (eq. 1)
        ψ_i = N_i W_n,   φ_ij = [N_i ; N_j] W_e                                                     (eq. 2)
        N_i ← log Σ_{j ∈ Ng(i)} exp(msg_{j→i}) + N_i                                                (eq. 3)

    How they are read [C]. Eq. 3 exponentiates a message, so messages µ and potentials are logarithms and the
    product is a sum; "∝" subtracts the logarithm of the mean over the D channels, so that a message without
    news is 0; N_i is LN(h_i) in eqs. 1 and 2, and h_i itself where eq. 3 adds to it:

        λ_{j→i} = n_i W_n + [n_i ; n_j] W_e + Σ_{k ∈ Ng(j)∖i} µ_{k→j},   µ = λ − logmeanexp_D λ,   n = LN(h)

    Rounds. Eq. 1 makes a message of others, which come from further away, and so on to the leaves. From µ = 0
    on, K rounds for all messages at once are exact if no path of the tree is longer than K. The text, though,
    lets only adjacent joints talk: that would be K = 1 (`layer.rounds = 1`), without the product of eq. 1.

    As printed, ψ is the receiver's and nothing is summed over the sender's states; textbooks differ in both.
    All limbs share W_n and W_e [P], so a mirrored body gives a mirrored result. They start at 0, which is
    h + log |Ng|. A joint without limbs stays as it is. Float32, also under autocast.
    """

    def __init__(self, dim: int, tree: tuple[tuple[int, int], ...], joints: int):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.node, self.edge = nn.Linear(dim, dim, bias=False), nn.Linear(2 * dim, dim, bias=False)
        self.arrows, follows, self.rounds = message_tables(tree)
        self.neighbours = [sum(i == joint for _, i in self.arrows) for joint in range(joints)]      # |Ng(i)|
        ends = np.array(self.arrows, dtype=int).reshape(-1, 2).T                        # senders, receivers
        for name, table in dict(follows=follows, ends=ends).items():
            self.register_buffer(name, torch.as_tensor(table), persistent=False)

    def messages(self, n: Tensor) -> Tensor:
        """All messages µ (B, 2·limbs, D), in the order of `arrows`, from states n (B, J, D)."""
        j, i = self.ends
        psi, phi = self.node(n)[:, i], self.edge(torch.cat([n[:, i], n[:, j]], -1))                 # eq. 2
        potential, follows = psi + phi, self.follows.to(n.dtype)
        message = torch.zeros_like(potential)
        for _ in range(self.rounds or 1):
            message = potential + follows @ message                                                 # eq. 1
            message = message - message.logsumexp(-1, keepdim=True) + math.log(n.shape[-1])         # its ∝
        return message

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu" if h.is_meta else h.device.type, enabled=False):
            h = h.to(torch.promote_types(h.dtype, torch.float32))
            arriving = self.messages(self.norm(h)).split(self.neighbours, 1)        # J times (B, |Ng(i)|, D)
            # eq. 3; nothing arrives at a joint without limbs: a 0 of the graph, for DDP waits for W_n and W_e
            news = [messages.logsumexp(1) if messages.shape[1] else messages.sum(1) for messages in arriving]
            return torch.stack(news, 1) + h


# ---- Pose Denoising Decoder (PDD) > Heatmap Conditional Denoising Block (HCDB) ---------------------------


class CrossAttention(nn.Module):
    """Tokens (B, J, D) look at a context (B, N, D) → (B, J, D). The rows of kv are k, v."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = rearrange(self.q(x), "b j (m d) -> b m j d", m=self.heads)
        k, v = rearrange(self.kv(context), "b n (two m d) -> two b m n d", two=2, m=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b m j d -> b j (m d)"))


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """t (B,) → (B, D): sin(t ω_k), then cos(t ω_k), ω_k = 10000^(−k / (D/2 − 1)) [A: DiffusionDet]."""
    k = torch.arange(dim // 2, device=t.device)
    angle = t[:, None] * torch.exp(-math.log(10000) / (dim // 2 - 1) * k)
    return torch.cat([angle.sin(), angle.cos()], -1)


def adaptive_norm(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN(h) = LN(h) (1 + scale) + shift, h (B, J, D), shift and scale (B, 1, D) of the time t [C]."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DenoisingBlock(nn.Module):
    """Heatmap Conditional Denoising Block: joint tokens h (B, J, D) → the same shape, in the paper's order:

        (i)    u = AdaLN(h) + C_p;  h ← h + MHSA(u)      location-guide self-attention                [P]
        (ii)   h ← MOL(h)                                Markov Optimization Layer (eqs. 1-3)         [P]
        (iii)  h ← h + MHCA(AdaLN(h), C_f)               cross-attention to what the clip looks like  [P]
        (iv)   h ← h + FFN(LN(h))                                                                     [P]

    [P] The time t modulates (i) and (iii); [C] by AdaLN, which starts as plain LN. [C] C_p comes into
    queries, keys and values: at t = T−1 the tokens hold noise, and positions must get into them. Without
    C_p there is no step (i), as in Table 7 b.
    """

    def __init__(self, cfg: Config, tree: tuple[tuple[int, int], ...], joints: int):
        super().__init__()
        dim = cfg.dim
        self.modulation = nn.Linear(dim, 4 * dim)
        self.self_attn = Attention(dim, cfg.heads) if cfg.cp else None
        self.mol = MarkovOptimizationLayer(dim, tree, joints) if cfg.mol else None
        self.cross_attn = CrossAttention(dim, cfg.heads)
        self.norm_ffn, self.ffn = LayerNorm(dim), mlp(dim, 4 * dim)

    def forward(self, h: Tensor, time: Tensor, c_f: Tensor, c_p: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(time))[:, None].chunk(4, -1)
        if self.self_attn:
            h = h + self.self_attn(adaptive_norm(h, shift1, scale1) + c_p)
        if self.mol:
            h = self.mol(h)
        h = h + self.cross_attn(adaptive_norm(h, shift2, scale2), c_f)
        return h + self.ffn(self.norm_ffn(h))


class PoseDenoisingDecoder(nn.Module):
    """PDD: noisy maps x_t (B, J, Hh, Wh), times t (B,), conditions → heatmaps H (B, J, Hh, Wh).

    [C] A token is one joint's whole map, h = W x_t[j] + position[j]: patches of all maps together would leave
    no joint that eq. 2 could give a state N_i. No sigmoid behind the last layer.
    """

    def __init__(self, cfg: Config, skeleton: Skeleton):
        super().__init__()
        dim, cells, joints = cfg.dim, math.prod(cfg.heatmap), skeleton.num_keypoints
        self.embed, self.pos_embed = nn.Linear(cells, dim), nn.Parameter(torch.empty(joints, dim))
        self.time_mlp = mlp(dim, dim, nn.SiLU)
        tree = limbs(skeleton)
        self.blocks = nn.ModuleList(DenoisingBlock(cfg, tree, joints) for _ in range(cfg.decoder_layers))
        self.norm, self.head = LayerNorm(dim), nn.Linear(dim, cells)

    def forward(self, x_t: Tensor, t: Tensor, c_f: Tensor, c_p: Tensor) -> Tensor:
        time = self.time_mlp(time_embedding(t, self.pos_embed.shape[1]).to(self.pos_embed.dtype))
        h = self.embed(x_t.flatten(2)) + self.pos_embed                                 # (B, J, D)
        for block in self.blocks:
            h = block(h, time, c_f, c_p)
        return self.head(self.norm(h)).view_as(x_t)


class UNetDenoiser(nn.Module):
    """The naive U-Net of Tables 5 and 7 (a), with the arguments of PoseDenoisingDecoder; C_p finds no use.

    It sees C_f as 64 channels beside the noisy maps. Departs from the paper: it predicts heatmaps, like the
    decoder; the paper's predicts noise, which one step from t = 999 would divide by √ᾱ = 5e-5.
    """

    def __init__(self, cfg: Config, skeleton: Skeleton):
        super().__init__()
        self.grid, channels, joints = cfg.grid, 64, skeleton.num_keypoints
        self.condition, self.time_mlp = nn.Linear(cfg.dim, channels), mlp(cfg.dim, cfg.dim, nn.SiLU)
        self.unet = UNet(joints + channels, joints, cfg.dim)

    def forward(self, x_t: Tensor, t: Tensor, c_f: Tensor, c_p: Tensor) -> Tensor:
        time = self.time_mlp(time_embedding(t, c_f.shape[-1]).to(c_f.dtype))
        condition = self.condition(c_f).transpose(1, 2).unflatten(2, self.grid)
        condition = F.interpolate(condition, x_t.shape[-2:], mode="bilinear", align_corners=False)
        return self.unet(torch.cat([x_t, condition], 1), time)


# ---- Diffusion (Preliminaries; Training and Inference Process) -------------------------------------------
#
# Why t = 999 and one step. Prediction knows no heatmaps, so it starts where x_t says nothing about them: at
# t = T−1 = 999, where ᾱ = 2.4e-9 and the signal in x_t is 20,000 times weaker than the noise. One step from
# there is a regression from the clip: the decoder, given C_f, C_p and noise that tells it nothing, answers
# with the mean of the heatmaps that go with such a clip. Nothing is sampled.
#
# Why training draws t from all of 0 … 999. Diffusion does, and no table of the paper says what less would
# do. At smaller t the maps are half legible, and the same weights learn to complete a pose of which they see
# a part: an elbow in doubt by its shoulder and its wrist. A prediction of several steps (--set steps=4)
# passes through such maps; one step has of them only what the weights learned there.


def cosine_schedule() -> Tensor:
    """ᾱ_t = ∏ (1 − β), β_t = min(1 − f(t+1)/f(t), 0.999), f(t) = cos²((t/T + 0.008)/1.008 · π/2).

    [P] A cosine schedule that falls with t; [A: DiffusionDet] its formula: the schedule of DDPM, which the
    paper cites for it, is linear.
    """
    f = torch.cos((torch.arange(TIMES + 1, dtype=torch.float64) / TIMES + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)


ALPHA_BAR = cosine_schedule()


def q_sample(heatmaps: Tensor, t: Tensor, noise: Tensor, visible: Tensor, signal_scale: float) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε,  x_0 = (2G − 1)·s: target heatmaps at times t (B,), for training.

    heatmaps G, noise ε (B, J, Hh, Wh); visible (B, J). [C] s, and 2G − 1: the paper's x_0 is G. [C] A joint
    without label is pure noise: its map is 0, and x_0 a constant that would tell the network so.
    """
    alpha_bar = ALPHA_BAR.to(t.device)[t][:, None, None, None]
    signal = alpha_bar.sqrt().to(noise.dtype) * (2 * heatmaps - 1) * signal_scale
    x_t = signal + (1 - alpha_bar).sqrt().to(noise.dtype) * noise
    return torch.where(visible[..., None, None] > 0, x_t, noise)


def time_pairs(steps: int) -> list[tuple[int, int]]:
    """(t, next t) of each step, from (T−1, ·) to (·, −1), evenly spaced."""
    times = [TIMES * i // steps - 1 for i in range(steps, -1, -1)]
    return list(zip(times, times[1:]))


def ddim(denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int, eta: float,
         signal_scale: float) -> tuple[list[Tensor], list[Tensor]]:
    """From noise to heatmaps, step by step (DDIM eq. 12):

        x_{t'} = √ᾱ' x̂_0 + √(1 − ᾱ' − σ²) ε̂ + σ z,   x̂_0 = (2 clamp(H) − 1)·s

    denoise(x, t) → H for times t (B,); noise (B, S, J, Hh, Wh): x_T, if eta > 0 z of each step but the last
    Returns  H of each step, not clamped, and the states: x_T, x after each step; the last is x̂_0
    """
    heatmaps, states = [], [noise[:, 0]]
    for i, (now, then) in enumerate(time_pairs(steps)):
        x = states[-1]
        heatmaps.append(denoise(x, torch.full((len(x),), now, device=x.device)))        # H predicts x_0 [P]
        start = (2 * heatmaps[-1].clamp(0, 1) - 1) * signal_scale                       # x̂_0
        if then < 0:
            states.append(start)
            break
        a, a_next = ALPHA_BAR[now].item(), ALPHA_BAR[then].item()
        epsilon = (x - math.sqrt(a) * start) / math.sqrt(1 - a)                         # ε̂
        sigma = eta * math.sqrt((1 - a / a_next) * (1 - a_next) / (1 - a))
        x = math.sqrt(a_next) * start + math.sqrt(1 - a_next - sigma ** 2) * epsilon
        states.append(x + sigma * noise[:, i + 1] if eta else x)
    return heatmaps, states


# ---- The model (Fig. 2) ----------------------------------------------------------------------------------


class DiffusionPose(nn.Module):
    """Clips to heatmaps. `forward` is training's one call, `sample` predicts: both encode, then denoise."""

    def __init__(self, cfg: Config, skeleton: Skeleton):
        super().__init__()
        self.cfg, self.skeleton = cfg, skeleton
        joints = skeleton.num_keypoints
        stem = conv_stem(cfg.dim) if cfg.stem == "conv" else None                           # an aid
        self.backbone = ViT(cfg.dim, cfg.depth, cfg.vit_heads, math.prod(cfg.grid), stem)   # no drop path [C]
        self.stfe = SpatioTemporalEncoder(cfg, joints)
        self.pdd = (PoseDenoisingDecoder if cfg.denoiser == "hcdb" else UNetDenoiser)(cfg, skeleton)
        self.patches = None
        if cfg.patch_weight:                                                                # an aid
            self.patches = CellHeatmaps(cfg.dim, joints, PATCH // STRIDE)
        set_start_values(self)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(draws, 1 or steps, J, Hh, Wh): the noise that `sample` takes for each clip."""
        cfg = self.cfg
        return cfg.ensemble, cfg.steps if cfg.eta else 1, self.skeleton.num_keypoints, *cfg.heatmap

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, 3, 3, H, W), previous, key and next one → C_f (B, N, D), C_p (B, J, D)."""
        return self.stfe(self.backbone(frames.flatten(0, 1)).unflatten(0, (-1, 3)))

    def denoise(self, x_t: Tensor, t: Tensor, c_f: Tensor, c_p: Tensor) -> Tensor:
        """Heatmaps H (B, J, Hh, Wh) from noisy maps of times t (B,)."""
        return self.pdd(x_t, t, c_f, c_p)

    def forward(self, frames: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Heatmaps H (B, J, Hh, Wh) of noisy maps x_t, and, with patch_weight, those that the patches see."""
        c_f, c_p = self.encode(frames)
        heatmaps = self.denoise(x_t, t, c_f, c_p)
        return heatmaps, self.patches(c_f, self.cfg.grid[0]) if self.patches else None

    def sample(self, frames: Tensor, noise: Tensor) -> Tensor:
        """Heatmaps (B, J, Hh, Wh), not clamped: DDIM from noise (B, *noise_shape), the mean of all draws."""
        conditions, cfg, draws = self.encode(frames), self.cfg, []
        for start in noise.unbind(1):
            heatmaps, _ = ddim(lambda x, t: self.denoise(x, t, *conditions), start, cfg.steps, cfg.eta,
                               cfg.signal_scale)
            draws.append(heatmaps[-1])
        return torch.stack(draws).mean(0)


# ---- Losses ----------------------------------------------------------------------------------------------

BETA = 100.0                           # sharpness of the soft-argmax [C]
LENGTH_ETA = 0.01                      # cells², keeps lengths differentiable at 0 [C]


def target_heatmaps(xy: Tensor, visible: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """G_j(p) = exp(−|p − µ_j|² / 2σ²): joints (B, J, 2) in cells → (B, J, *size); 0 if not `visible` (B, J).

    [C] The centre µ is where the joint is, between cells, and the Gaussian covers the whole map; DCPose
    rounds the centre and cuts the Gaussian off.
    """
    across, down = (torch.arange(n, device=xy.device, dtype=xy.dtype) for n in (size[1], size[0]))
    x = torch.exp(-(across - xy[..., :1]) ** 2 / (2 * sigma ** 2))                      # (B, J, Wh)
    y = torch.exp(-(down - xy[..., 1:]) ** 2 / (2 * sigma ** 2))                        # (B, J, Hh)
    return y[..., None] * x[..., None, :] * visible[..., None, None]


def heatmap_loss(pred: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """‖H − G‖² of a joint's map [P], the mean over the labelled joints of a micro-batch [C]."""
    squared = (pred - target).square().sum((2, 3))
    # of all processes together: DDP averages their gradients, so each divides by the mean of their numbers
    return (squared * visible).sum() / mean_over_ranks(visible.sum()).clamp(min=1)


def soft_argmax(heatmaps: Tensor) -> Tensor:
    """Maps (B, J, Hh, Wh) → Σ_p softmax(β H)(p) p, xy in cells (B, J, 2): the peak's place, with a gradient.

    [C] The paper solves for the coordinates C_t of eq. 4 in a way that it does not describe.
    """
    share = (BETA * heatmaps.flatten(2)).softmax(-1).view_as(heatmaps)
    down, across = (torch.arange(n, device=share.device, dtype=share.dtype) for n in share.shape[2:])
    return torch.stack([share.sum(2) @ across, share.sum(3) @ down], -1)


def limb_pairs(tree: tuple[tuple[int, int], ...]) -> list[tuple[int, int, int, int, int]]:
    """(o, a, b, limb o-a, limb o-b) of all pairs of limbs that share a joint o."""
    return [(o, sum(one) - o, sum(other) - o, m, n)
            for (m, one), (n, other) in combinations(enumerate(tree), 2) for o in set(one) & set(other)]


def markov_loss(pred: Tensor, true: Tensor, visible: Tensor, tree: tuple) -> tuple[Tensor, Tensor]:
    """The two terms of each person's Markov loss, (B,) each, of joints (B, J, 2) in cells, visible (B, J):

        length = −log( (1/M) Σ_m exp(−(L_pre,m − L_gt,m)² / (2 L_std² + ε)) )                       (eq. 4)
        angle  = (1/N) Σ_n (cos θ_pre,n − cos θ_gt,n)²

    M limbs and N pairs of limbs that share a joint, whose joints are all labelled; L lengths of limbs, θ
    angles between two of them, ε = 1e-6. M < 2 and N = 0 give 0.

    What the logarithm of a mean of exponentials does: it is a soft minimum of the errors, at most log M once
    one limb fits, and it pulls most at the limbs that are nearly right, not at the worst one.

    L_std is the deviation of the true lengths [P], over what is not said. [C] Over the limbs of one person:
    so it scales with the person, but it pools forearms with thighs, and measures how unequal somebody's
    limbs are, not how uncertain one of them is. It is at least a cell: of two forearms of one length, and
    nothing else labelled, it would be 0, and ε alone would make the gradient a million times larger.
    """
    a, b = torch.tensor(tree, device=pred.device).T
    pairs = torch.tensor(limb_pairs(tree), dtype=torch.long, device=pred.device).view(-1, 5)
    o, p, q, limb_p, limb_q = pairs.T

    def lengths_and_cosines(xy: Tensor) -> tuple[Tensor, Tensor]:
        length = ((xy[:, a] - xy[:, b]).square().sum(-1) + LENGTH_ETA).sqrt()           # (B, limbs)
        dot = ((xy[:, p] - xy[:, o]) * (xy[:, q] - xy[:, o])).sum(-1)                   # (B, pairs)
        return length, dot / (length[:, limb_p] * length[:, limb_q])

    (length, cosine), (true_length, true_cosine) = lengths_and_cosines(pred), lengths_and_cosines(true)
    limb, pair = visible[:, a] * visible[:, b], visible[:, o] * visible[:, p] * visible[:, q]      # 0 or 1
    m = limb.sum(1, keepdim=True)                                                       # M
    mean = (true_length * limb).sum(1, keepdim=True) / m.clamp(min=1)
    variance = ((true_length - mean).square() * limb).sum(1, keepdim=True) / m.clamp(min=1)        # L_std²
    error = (length - true_length).square() / (2 * variance.clamp(min=1) + 1e-6)
    few = m < 2                                                  # then all limbs: no −∞ meets the gradient
    soft = torch.where((limb > 0) | few, -error, -math.inf).logsumexp(1)
    length_term = torch.where(few[:, 0], 0 * soft, m[:, 0].clamp(min=1).log() - soft)              # eq. 4
    angle_term = ((cosine - true_cosine).square() * pair).sum(1) / pair.sum(1).clamp(min=1)        # eq. 4
    return length_term, angle_term


def criterion(pred: Tensor, target: Tensor, visible: Tensor, tree: tuple, alpha: float
              ) -> dict[str, Tensor]:
    """L_total = ‖H − G‖² + α L_Markov (eq. 5): its two terms, to be summed; maps (B, J, Hh, Wh), in float32.

    [C] L_Markov is the mean over the clips; the coordinates of both H and G come by soft-argmax, so that it
    is 0 at H = G.
    """
    pred = pred.float()
    losses = dict(heat=heatmap_loss(pred, target, visible))                             # eq. 5
    if alpha and len(tree) > 1:
        length, angle = markov_loss(soft_argmax(pred), soft_argmax(target), visible, tree)
        losses["markov"] = alpha * (length + angle).mean()                              # eq. 5
    return losses


# ---- Prediction ------------------------------------------------------------------------------------------


def decode(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (P, J, Hh, Wh) → joints in cells (P, J, 2) and their peaks (P, J) [A: DCPose].

    The highest cell, then a quarter of a cell towards the larger neighbour in x and in y, unless it lies in
    the two outermost rows or columns of the top and left, or in the last; no positive value gives (0, 0).
    """
    rows, columns = heatmaps.shape[2:]
    peak, place = heatmaps.flatten(2).max(-1)
    x, y = place % columns, place // columns
    inner = (x > 1) & (x < columns - 1) & (y > 1) & (y < rows - 1)
    flat, at = heatmaps.flatten(2), torch.where(inner, place, columns + 1)[..., None]
    right, left, below, above = (flat.gather(2, at + step)[..., 0] for step in (1, -1, columns, -columns))
    shift = 0.25 * torch.stack([(right - left).sign(), (below - above).sign()], -1) * inner[..., None]
    return (torch.stack([x, y], -1) + shift) * (peak > 0)[..., None], peak


def noise_for(boxes: np.ndarray, model: DiffusionPose) -> Tensor:
    """Start noise (P, *noise_shape) of boxes (P, 4), from the seed and the box alone [C]: so a person's pose
    depends neither on the size of a batch nor on the order of loading.
    """
    seeds = [zlib.crc32(np.float64([model.cfg.seed, *box]).tobytes()) for box in boxes]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(model.noise_shape, generator=generator) for generator in generators])


@torch.no_grad()
def find_heatmaps(model: DiffusionPose, crops: Tensor, boxes: np.ndarray) -> Tensor:
    """Clips (P, 3, 3, H, W) uint8, of boxes (P, 4) → heatmaps (P, J, Hh, Wh) on the CPU; computed as --amp says."""
    device = next(model.parameters()).device
    frames, noise = transforms.normalise(crops.to(device) / 255), noise_for(boxes, model).to(device)
    with autocast(device, model.cfg.amp):
        heatmaps = model.sample(frames, noise).float()
        if model.cfg.flip_test and model.skeleton.flip is not None:
            flip = list(model.skeleton.flip)
            mirrored = model.sample(frames.flip(-1), noise.flip(-1)[..., flip, :, :]).float()
            mirrored = mirrored[:, flip].flip(-1)
            # mirroring the crop, pixel for pixel, moves joints by 0.75 cells against mirroring the map, cell
            # for cell; a shift by one cell leaves 0.25 [A: DCPose]
            mirrored = torch.cat([mirrored[..., :1], mirrored[..., :-1]], -1)
            heatmaps = (heatmaps + mirrored) / 2
    return heatmaps.cpu()


def find_poses(model: DiffusionPose, crops: Tensor, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clips of boxes → joints (P, J, 2) in pixels of the image, and the peaks of their heatmaps (P, J)."""
    cells, peaks = decode(find_heatmaps(model, crops, boxes))
    back = [transforms.invert(box_matrix(box, model.cfg)) for box in boxes]
    places = [transforms.move_points(STRIDE * xy, matrix) for xy, matrix in zip(cells.double().numpy(), back)]
    return np.stack(places), peaks.numpy()


def with_scores(p: Prediction) -> Prediction:
    """Scores as the ancestors count [A]: of a joint its peak · the box's score, of a person the box's · the
    mean of the peaks above 0.2.
    """
    return replace(p, scores=rescore(p.scores, p.keypoint_scores),
                   keypoint_scores=p.keypoint_scores * p.scores[:, None])


def predict(model: DiffusionPose, batch: dict) -> list[Prediction]:
    """People of a batch from `to_batch`: one Prediction per image, empty where there was no box."""
    people, rows = batch["people"], []
    for first in range(0, len(people), model.cfg.eval_batch):
        ids, crops, scores, boxes = zip(*people[first:first + model.cfg.eval_batch])
        rows += zip(ids, *find_poses(model, torch.stack(crops), np.stack(boxes)), scores, boxes)
    return [with_scores(p) for p in people_by_image(rows, batch["image_ids"], model.skeleton.num_keypoints)]


# ---- Data (Problem Formulation): a person's box, enlarged, cut out of three frames -----------------------

MARGIN = 1.25                  # the crop over the box [P]: room for where the person is in the other frames
HALF_MARGIN = 1.5              # over the box of half a body [A: DCPose]


def box_matrix(box: np.ndarray, cfg: Config) -> np.ndarray:
    """2×3 from image to crop for a box x1, y1, x2, y2, as prediction cuts it; the mapping of HRNet and DCPose
    [A], not ViTPose's, which lies half a pixel beside it.
    """
    centre, size = transforms.fit_box(np.asarray(box, float), cfg.width / cfg.height, MARGIN)
    return transforms.crop_matrix(centre, size[0], (cfg.width, cfg.height))


def cut_clip(frames: tuple[Image.Image, ...], matrix: np.ndarray, cfg: Config) -> Tensor:
    """Previous, key and next frame, of one size, through one matrix: (3, 3, H, W) uint8."""
    frames = frames if cfg.neighbours else (frames[KEY],) * 3
    stack = np.concatenate([np.asarray(frame) for frame in frames], 2)                  # (h, w, 9)
    crop = transforms.warp_affine(stack, matrix, (cfg.width, cfg.height))
    return torch.from_numpy(crop).permute(2, 0, 1).unflatten(0, (3, 3))


def clip_of(sample: Sample) -> tuple[Image.Image, ...]:
    """A sample's previous, key and next frame; of a still image three times its own."""
    before, after = sample.frames or (sample.image, sample.image)
    return before, sample.image, after


def cut_box(sample: Sample, box: np.ndarray, cfg: Config) -> Tensor:
    return cut_clip(clip_of(sample), box_matrix(box, cfg), cfg)


def augment(joints: np.ndarray, box: np.ndarray, width: int, skeleton: Skeleton, cfg: Config,
            rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """2×3 from image to crop, and whether it mirrors [A: DCPose]; joints (J, 3), box in an image so wide.

    Half of the body for some people with more than 8 joints; size by 1 ± scale_jitter at most; 60 % turned by
    up to 2·rotation; 50 % mirrored, where the skeleton has left and right.
    """
    halve = rng.random() < cfg.half_body and (joints[:, 2] > 0).sum() > 8
    half = transforms.half_body(joints, skeleton, rng) if halve else None
    box, margin = (box, MARGIN) if half is None else (half, HALF_MARGIN)
    centre, size = transforms.fit_box(box, cfg.width / cfg.height, margin)
    window = size[0] * (1 + cfg.scale_jitter * np.clip(rng.standard_normal(), -1, 1))
    angle = cfg.rotation * np.clip(rng.standard_normal(), -2, 2) * (rng.random() < 0.6)
    mirrored = skeleton.flip is not None and rng.random() < 0.5
    mirror = np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]]) if mirrored else np.eye(3)
    centre = transforms.move_points(centre, mirror[:2])
    return transforms.crop_matrix(centre, window, (cfg.width, cfg.height), angle) @ mirror, mirrored


class TrainClips(torch.utils.data.Dataset):
    """One epoch of augmented people; item n: clip (3, 3, H, W) uint8, joints (J, 3), image id, read errors.

    Joints are pixels of the crop, v is 1, or 0 where there is no label or the joint has left the crop. What
    happens to person n depends on (seed, epoch, n) alone. A key frame that cannot be read gives way to the
    next person's.
    """

    def __init__(self, data: PoseDataset, people: np.ndarray, cfg: Config, epoch: int):
        self.data, self.people, self.cfg, self.epoch = data, people, cfg, epoch

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, int | str, list[str]]:
        cfg, skeleton, read_errors = self.cfg, self.data.skeleton, []
        rng = np.random.default_rng([cfg.seed, self.epoch, n])
        for k in range(len(self)):
            i, p = self.people[(n + k) % len(self)]
            sample, error = self.data.load(int(i))
            read_errors += [error] if error else []
            if sample is not None:
                break
        else:
            raise UserError(f"none of the images can be read, e.g. {read_errors[0]}")
        joints, box = sample.keypoints[p].astype(float), sample.boxes[p].clip(0, np.tile(sample.size, 2) - 1)
        matrix, mirrored = augment(joints, box, sample.size[0], skeleton, cfg, rng)
        xy, v = transforms.move_points(joints[:, :2], matrix), joints[:, 2] > 0
        v &= ((xy >= 0) & (xy < (cfg.width, cfg.height))).all(1)
        placed = torch.from_numpy(np.c_[np.where(v[:, None], xy, 0), v]).float()
        placed = placed[list(skeleton.flip)] if mirrored else placed
        return cut_clip(clip_of(sample), matrix, cfg), placed, sample.image_id, read_errors


def open_clips(cfg: Config, ranks: Ranks) -> tuple[PoseDataset, PoseDataset]:
    """Training and held-out data; of the puppets their clips, not their stills."""
    return open_splits(cfg, ranks, "posetrack" if cfg.data == "puppets" else None)


LEAST_BOX = 0.2                # score of a detected box that PoseTrack's methods look at [A: DCPose]


def evaluate(model: DiffusionPose, data: PoseDataset, cfg: Config, ranks: Ranks,
             boxes: Boxes | None = None) -> tuple[dict, list[Prediction]]:
    """Metrics and predictions: mAP and its table, in percent, of data in PoseTrack's format, else OKS AP.

    boxes: where people are; the annotated ones by default, which gives several points more than a detector's.
    """
    boxes = boxes or true_boxes(data)
    if data.metric == "posetrack":
        everybody, boxes = boxes.total(), boxes.at_least(LEAST_BOX)
        if boxes.total() < everybody:
            say(f"{everybody - boxes.total()} of {everybody} person boxes left out: their score is below "
                f"{LEAST_BOX}")
    found = predict_people(partial(find_poses, fuse(model)), data, boxes, partial(cut_box, cfg=cfg),
                           cfg.eval_batch, cfg.workers, ranks)
    found = [with_scores(p) for p in found]
    return metrics.evaluate(found, data), found


# ---- Training (Training and Inference Process; Datasets and Experimental Settings) -----------------------


def build_optimizer(model: DiffusionPose, cfg: Config) -> torch.optim.AdamW:
    """AdamW in four groups: the ViT learns at its own rate; biases, norms, learned embeddings, A_log and D
    do not decay.
    """
    tables, groups = ("pos_embed", "keypoint_tokens", "frame_embed", "A_log"), {}
    for name, weight in model.named_parameters():
        decays = weight.ndim > 1 and name.split(".")[-1] not in tables
        groups.setdefault((name.startswith("backbone."), decays), []).append(weight)
    return torch.optim.AdamW([dict(params=params, initial_lr=cfg.lr_backbone if backbone else cfg.lr,
                                   weight_decay=cfg.weight_decay if decays else 0.0)
                              for (backbone, decays), params in groups.items()], lr=cfg.lr, fused=True)


def lr_scale(step: int, steps: int, epoch: int, cfg: Config) -> float:
    """Factor on the learning rates at an optimiser step out of `steps`."""
    scale = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    if cfg.schedule == "cosine":
        scale *= 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return scale * 0.1 ** sum(epoch >= drop for drop in parse_numbers(cfg.drop_epochs) or ())


def train(cfg: Config, args) -> None:
    """Train, evaluate, keep all in the run folder. Runs alone or under torchrun; Ctrl-C saves and leaves."""
    ranks = init_ranks(args.device, cfg)
    data, held_out = open_clips(cfg, ranks)
    seed_all(cfg.seed)                                              # equal start weights on every process
    model = DiffusionPose(cfg, data.skeleton)
    if cfg.init and not args.saved:
        with rank_zero_first(ranks):                                # it fetches them
            load_init(model, cfg.init)
    model.to(ranks.device, memory_format=torch.channels_last)
    average = Ema(model, cfg.ema, cfg.ema_warmup) if cfg.ema else None                  # an aid
    optimizer = build_optimizer(model, cfg)
    fp16 = cfg.amp == "fp16" and ranks.device.type == "cuda"        # else the scaler is idle
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
    parts = dict(model=model, optimizer=optimizer, scaler=scaler) | (dict(ema=average) if average else {})
    run = Run("diffusionpose", cfg, args, ranks, data, held_out, parts)
    net, train_set, tree = distribute(model, ranks), data.training(), limbs(data.skeleton)
    people = people_to_learn(train_set)

    for epoch in run.epochs():
        net.train()
        # micro-batches; a resumed run goes on in mid-epoch, unreadable files are reported
        for clips, joints in run.batches(TrainClips(train_set, people, cfg, epoch)):
            factor = lr_scale(run.step, run.steps, epoch, run.cfg)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            # grows over the first epoch [C]: on maps without peaks the Markov loss would lead
            alpha = cfg.alpha * min(1.0, run.step * cfg.epochs / run.steps)
            frames = transforms.normalise(clips.to(ranks.device, non_blocking=True) / 255)
            joints = torch.stack(joints).to(ranks.device)
            visible = joints[..., 2]
            run.show_batch(clips[:, KEY] / 255, joints)             # train_batch.png

            target = target_heatmaps(joints[..., :2] / STRIDE, visible, cfg.heatmap, cfg.sigma)     # G
            t = torch.randint(TIMES, (len(frames),), device=ranks.device)
            x_t = q_sample(target, t, torch.randn_like(target), visible, cfg.signal_scale)
            with autocast(ranks.device, cfg.amp):
                pred, of_patches = net(frames, x_t, t)                                              # H
            losses = criterion(pred, target, visible, tree, alpha)          # the two terms of eq. 5
            if of_patches is not None:                              # an aid, see Config
                losses["patches"] = cfg.patch_weight * heatmap_loss(of_patches.float(), target, visible)
            scaler.scale(sum(losses.values()) / cfg.accum).backward()       # eq. 5: their sum
            if run.more_micro_batches(losses):
                continue

            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(model.parameters(), cfg.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if average:
                average.update(model)
            if run.stepped(norm):                          # logs, saves when due; True: asked to stop
                return

        if run.evaluates():
            run.record(*evaluate(average.module if average else model, held_out, cfg, ranks))


# ---- Tables ----------------------------------------------------------------------------------------------

EQUATIONS = {           # equation or section of the paper → where it stands here
    "eq. 1": MarkovOptimizationLayer.messages, "eq. 2": MarkovOptimizationLayer.messages,
    "eq. 3": MarkovOptimizationLayer, "eq. 4": markov_loss, "eq. 5": criterion,
    "Problem Formulation, box": box_matrix, "Problem Formulation, clip": cut_clip,
    "Preliminaries, x_t": q_sample, "Spatio-Temporal Block": SpatioTemporalBlock,
    "Spatio-Temporal Feature Encoder, C_f and C_p": SpatioTemporalEncoder,
    "Heatmap Conditional Denoising Block, location-guide self-attention": DenoisingBlock,
    "Pose Denoising Decoder": PoseDenoisingDecoder, "Tables 5 and 7, U-Net": UNetDenoiser,
    "Training, α_t": cosine_schedule, "Training": train, "Inference, DDIM": ddim,
    "Inference, Gaussian heatmaps": noise_for,
}


def ablation(what: str, figure: float, flags: str = "", versus: int = 1, default: bool = False) -> Row:
    """A row of Tables 5 to 7, with one set of flags for preset b and for tiny. `versus`: as the gains in the
    paper's brackets do, rows compare with the first of their table.
    """
    return Row(what, figure, flags=flags, puppets=flags, versus=versus, default=default, more=dict(Hidden=None))


# Mean is mAP, that of all joints; Hidden, that of hidden ones, is not in the paper. The preset is b: the paper does
# not say which of ViT's sizes is its own. The U-Net takes twice as long as the decoder, so its tables have two epochs.
# On puppets every row keeps the training aids of tiny. The rows differ in size: with preset b the U-Net has
# 6.9 M parameters where the decoder has 46.7 M.
benchmark = partial(Table, preset="b", metric="Mean", puppets="--epochs 4", split="val")
posetrack17 = partial(benchmark, flags="--data data/posetrack17")
TABLES = {
    "1": posetrack17("PoseTrack2017 val", rows=[Row("DiffusionPose", 87.8, default=True)]),
    "2": benchmark("PoseTrack2018 val", flags="--data data/posetrack18",
                   rows=[Row("DiffusionPose", 85.4, default=True)]),
    "3": benchmark("PoseTrack21 val", flags="--data data/posetrack21",
                   rows=[Row("DiffusionPose", 85.1, default=True)]),
    "4": benchmark("Challenging-PoseTrack: rapid motion, severe occlusion", rows=[
        Row("DiffusionPose", 59.7, puppets=None, default=True,
            missing="JM-Pose chose these clips of PoseTrack; we have no list of them")]),
    "5": posetrack17("Components, PoseTrack2017 val", puppets="--epochs 2", rows=[
        ablation("baseline: ViT and U-Net", 81.2, "--stfe none --denoiser unet --alpha 0", versus=0),
        ablation("(a) + encoder (STFE)", 85.7, "--denoiser unet --alpha 0"),
        ablation("(b) + decoder (PDD), no encoder", 86.1, "--stfe none"),
        ablation("(c) both", 87.8, default=True)]),
    "6": posetrack17("Encoder, PoseTrack2017 val", rows=[
        ablation("(a) none", 86.1, "--stfe none", versus=0),
        ablation("(b) Transformer blocks, as in DiffPose", 86.3, "--stfe transformer"),
        ablation("(c) Spatio-Temporal Blocks", 87.8, default=True)]),
    "7": posetrack17("Decoder, PoseTrack2017 val", puppets="--epochs 2", rows=[
        ablation("(a) U-Net", 85.7, "--denoiser unet --alpha 0", versus=0),
        ablation("(b) denoising blocks with C_f alone", 86.0, "--no-cp --no-mol --alpha 0"),
        ablation("(c) + C_p: self-attention", 86.5, "--no-mol --alpha 0"),
        ablation("(d) + Markov Optimization Layers (eqs. 1-3)", 87.2, "--alpha 0"),
        ablation("(e) + Markov loss (eq. 4)", 87.8, default=True)])}

# Departures. Each: what: paper | here | why. There is no release, and most of the design is [C] where the
# paper has no words; these are the places where it has some.
#
# Spatio-Temporal Block, fusion: dynamic, then an MLP that restores the number of tokens | a gate, which does,
#     then an MLP | no formula; the smallest thing that is dynamic
# Spatio-Temporal Block, LayerNorm: one before FSM and TSA | one for each, and before SM and MLP | pre-norm
# eqs. 1 and 2, product: of linear outputs of any sign | a sum of logarithms | eq. 3 exponentiates messages;
#     a product of a dozen of them explodes
# eqs. 1 and 2, N_i: the joint's state | LN of it | the scale of messages does not grow with that of states
# eq. 1, ∝: up to a factor, which is not given | minus log mean exp over D | a message without news is 0
# eqs. 1 to 3, rounds: "adjacent joints" in the text | K, to the ends of the tree | eq. 1 is a recursion
# eq. 4, coordinates: solved from H, how is not said | soft-argmax of H and of G | a gradient, and 0 at H = G
# eq. 4, L_std: of the true lengths, over what is not said | per person, at least a cell | no other scale
# eq. 4, lengths: |a − b| | √(|a − b|² + 0.01), and no length term with one limb | differentiable at 0
# eq. 5, ‖H − G‖²: the square | the mean over the labelled joints of a micro-batch | α does not depend on the
#     batch; with --accum a micro-batch of few labels weighs as much as one of many
# eq. 5, α: one number, not given | 0.1, growing from 0 over the first epoch | else it leads on flat maps
# Pose Denoising Decoder, tokens: patches of the maps | a joint's whole map | eq. 2 needs a state per joint
# Preliminaries, x_0: G | (2G − 1)·s; pure noise for a joint without label | noise has mean 0; a blank map
#     would tell the network that the label is missing
# Training, schedule: a cosine, citing DDPM | DiffusionDet's cosine, T = 1000 | DDPM's is linear
# Training, learning rate: 5e-4 | 5e-4, but 5e-5 for the ViT, which is trained already, and 500 steps of
#     warm-up | [C]
# Tables 5 and 7, U-Net: predicts noise | heatmaps | one step from t = 999 would divide by 5e-5
# Table 7 (a), U-Net: without C_f | C_f as channels beside the noisy maps | else it would not see the image
# Tables 5 (b) and 6 (a), no STFE: what is left is not said | C_f of the ViT's three frames, C_p the tokens
#     themselves | the decoder's inputs stay the same
# Tables 1 to 7, boxes: a detector's | annotated ones, or --boxes | no detections are published. Annotated
#     boxes give several points more: never compare the two
# Tables 1 to 7, Mean: of 7 columns (1 and 4; so 87.8 in 5 to 7), of 15 joints (2), of neither (3) | of 15
#     joints, where 87.8 would be 88.0 | as poseval counts
# all presets, start values: of a joint's table, the patches' places and the decoder's two matrices are ours
#     | set_start_values | the tiny preset learns with them from nothing in minutes

# ---- Appendix: borrowed parts, aids, start weights, pictures, summary. Not needed on a first reading. ----

# The naive U-Net of Tables 5 and 7: that of the first diffusion models (DDPM), without its attention.


class ResidualBlock(nn.Module):
    """x + conv(SiLU(GN(conv(SiLU(GN(x))) + W time))), x (B, C, H, W), time (B, D)."""

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

    Two residual blocks at each of three resolutions, down by strided convolutions and up by repeating pixels;
    what went down stands beside what comes up.
    """

    def __init__(self, channels_in: int, channels_out: int, time_dim: int,
                 widths: tuple[int, ...] = (64, 128, 256)):
        super().__init__()
        self.stem = nn.Conv2d(channels_in, widths[0], 3, padding=1)
        block, levels = partial(ResidualBlock, time_dim=time_dim), list(zip(widths, widths[1:]))
        self.down = nn.ModuleList(nn.ModuleList(block(w, w) for _ in range(2)) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in levels)
        self.up = nn.ModuleList(nn.ModuleList([block(a + b, a), block(a, a)]) for a, b in levels)
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


# Training aids of the preset tiny, and start values of all presets: ours, not the paper's. A decoder that
# asks patches which know nothing stays at the mean pose for thousands of steps; the stem, the places below
# and the loss of `patches` in DiffusionPose are to shorten that.


def conv_stem(dim: int) -> nn.Sequential:
    """Images (B, 3, H, W) → (B, dim, H/16, W/16) by small convolutions (Xiao et al. 2021, Early convolutions
    help transformers see better): from nothing they need far fewer images than one matrix for 16×16 pixels.
    """
    layers, channels = [], 3
    for width, stride in ((24, 2), (48, 2), (48, 1), (96, 2), (96, 1), (dim, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width),
                   nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))


def cosine_basis(size: tuple[int, int], count: int) -> Tensor:
    """The smoothest patterns cos(πi(y+½)/h) cos(πj(x+½)/w) of an h × w map, orthonormal: (count, h·w)."""
    waves = [np.cos(np.pi * np.arange(n)[:, None] * (np.arange(n) + 0.5) / n) for n in size]
    down, across = (wave / np.linalg.norm(wave, axis=1, keepdims=True) for wave in waves)
    speed = np.add.outer(*((np.arange(n) / n) ** 2 for n in size))
    i, j = np.unravel_index(np.argsort(speed, axis=None)[:count], size)
    basis = (down[i, :, None] * across[j, None, :]).reshape(len(i), -1)
    return torch.from_numpy(np.pad(basis, [(0, count - len(basis)), (0, 0)])).float()


@torch.no_grad()
def set_start_values(model: DiffusionPose) -> None:
    """Start values of all but Mamba's layers and convolutions, which set their own. What is not the usual:

    Zeros     W_n and W_e, the modulation by t and the head of `patches`: each part starts as if it were not
              there, and grows as far as it is of use.
    Joints    and frames have learned embeddings of deviation 1. A ViT's usual 0.02 would be lost beside a
              joint's token, which is noise at t = 999: the elbow's could not be told from the knee's.
    Places    of patches are products, cosines of x times cosines of y. Attention scores a patch by the
              product of its key with a query, so by a sum of such patterns, and a peak at one patch is such
              a sum. Of MAE's table, sines of x beside sines of y, every sum is a cross, never a peak.
    Maps      are read by the decoder's first matrix, and written by its last, as the smoothest patterns of a
              map. A Gaussian consists of a few of these; a random matrix would pick up mostly noise.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "mamba" not in name:
            zero = name.endswith(("modulation", "mol.node", "mol.edge", "patches.head"))
            nn.init.zeros_(module.weight) if zero else nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, table in model.named_parameters():
        if name.endswith(("pdd.pos_embed", "keypoint_tokens", "frame_embed")):
            nn.init.normal_(table)
    cfg = model.cfg
    model.backbone.pos_embed.zero_()[0, 1:] = 6 * cosine_basis(cfg.grid, cfg.dim).T
    if isinstance(model.pdd, PoseDenoisingDecoder):
        smooth = 0.1 * cosine_basis(cfg.heatmap, cfg.dim)
        model.pdd.embed.weight.copy_(smooth)
        model.pdd.head.weight.copy_(smooth.T)


# Start weights: DiffusionPose's own, or a ViT in four spellings (ViTPose, MAE, mmpose, transformers).


def convert_official(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Tensors of ours as they are; a ViT of any spelling under our names, its table resized to our grid."""
    if "stfe.norm.weight" in state:
        return {name: value for name, value in state.items() if name != "updates"}     # the average's counter
    return vit.convert(state, config.dim, config.vit_heads, config.grid)


def recognise(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(preset, joints) of tensors under our own names, None for others: no weights were ever released."""
    if not {"stfe.norm.weight", "pdd.pos_embed"} <= state.keys():
        return None
    joints, dim = state["pdd.pos_embed"].shape
    preset = next((name for name, cfg in PRESETS.items() if cfg.dim == dim), None)
    return preset and (preset, joints)


JOINT_ROWS = {r"^stfe\.keypoint_tokens": 1, r"^pdd\.pos_embed": 0, r"^patches\.head\.": 0}        # see carry_rows


def load_init(model: DiffusionPose, source: str) -> None:
    """Start weights by file or name: DiffusionPose (all, of any joints), or a ViT of ViTPose, MAE, mmpose or
    transformers.

    Raises UserError for a file that is not there, and for tensors that do not fit.
    """
    if not Path(source).exists() and Path(source).suffix:
        raise UserError(f"there are no start weights {source}: --init takes a file of ViTPose or MAE (where "
                        "they are: data/README.md), vitpose-base, or '' to start from nothing")
    start = weights.read_start(source, "diffusionpose")
    state = convert_official(start.state, model.cfg)
    optional = {r"^patches\.": "of an auxiliary loss"}
    if "stfe.norm.weight" not in state:
        optional[r"^(?!backbone\.)"] = "not in a ViT's file"
    weights.load_start(model, start, state, JOINT_ROWS, optional)


# Inference, building, pictures, summary.


def to_batch(pictures: list, image_ids: list, cfg: Config, boxes: list[Found] | None = None) -> dict:
    """RGB pictures, or clips (previous, key, next) of them, and the people in each → what `predict` takes.

    Without boxes each picture as a whole is taken for one person.
    """
    clips, people = [clip if isinstance(clip, tuple) else (clip,) * 3 for clip in pictures], []
    boxes = boxes or [whole_image(key.size) for _, key, _ in clips]
    for clip, image_id, found in zip(clips, image_ids, boxes):
        people += [(image_id, cut_clip(clip, box_matrix(box, cfg), cfg), score, box)
                   for box, score in zip(*found)]
    return dict(people=people, image_ids=image_ids)


def exported(model: DiffusionPose) -> Exported:
    """For eval.py --bench; --export is refused."""
    def inputs(batch: dict) -> dict:
        _, crops, _, boxes = zip(*batch["people"])
        return dict(crops=torch.stack(crops), boxes=np.stack(boxes))

    return Exported(lambda crops, boxes: dict(heatmaps=find_heatmaps(model, crops, boxes)), inputs,
                    refused="the formula of its selective scan takes a step per token, and a graph would hold them all")


def fuse(model: DiffusionPose) -> DiffusionPose:
    """The model for prediction; there is nothing to fold."""
    return model.eval()


def build(preset: str, skeleton: str | Skeleton = "posetrack", **overrides) -> DiffusionPose:
    """A model with start values; overrides are Config fields."""
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(PRESETS)}")
    return DiffusionPose(resolve(PRESETS[preset], **overrides), get_skeleton(skeleton))


SHOWN_STEPS = 10


@torch.no_grad()
def show_process(model: DiffusionPose, picture: Image.Image | tuple, threshold: float, found: Found
                 ) -> dict[str, list[Image.Image]]:
    """For eval.py --process, of each box: `steps`, the noisy maps beside the heatmaps that the network sees
    in them, step by step; `markov`, the pose with and without the Markov layers, and the messages of the
    last by strength.
    """
    people, cfg = to_batch([picture], [""], model.cfg, [found])["people"], model.cfg
    if not people:
        return {}
    crops = torch.stack([crop for _, crop, *_ in people]).to(next(model.parameters()).device)
    conditions = model.encode(transforms.normalise(crops / 255))
    noise = noise_for(found[0], model)[:, 0, :1].to(crops.device)
    zoom = max(1, 384 // cfg.height)
    views = [Image.fromarray(crop[KEY].permute(1, 2, 0).numpy()).resize((zoom * cfg.width, zoom * cfg.height))
             for crop in crops.cpu()]

    def run(steps: int) -> tuple[list[Tensor], list[Tensor]]:
        return ddim(lambda x, t: model.denoise(x, t, *conditions), noise, steps, 0.0, cfg.signal_scale)

    films = []
    for step, (heatmaps, state) in enumerate(zip(*run(SHOWN_STEPS)), 1):
        pairs = zip(views, (state / cfg.signal_scale + 1) / 2, heatmaps)
        tiles = [draw.draw_heat(view, maps.amax(0).cpu().numpy()) for view, *both in pairs for maps in both]
        films.append(draw.captioned(draw.contact_sheet(tiles, 2), f"DDIM step {step} of {SHOWN_STEPS}: left the noisy "
                                    "heatmaps, right those that the network sees in them"))
    layers = [block.mol for block in getattr(model.pdd, "blocks", ()) if block.mol]
    if not layers:
        return dict(steps=films)
    states = []                                                  # n of the last layer
    hooks = [layers[-1].norm.register_forward_hook(lambda layer, x, n: states.append(n))]
    poses = [decode(run(1)[0][-1].cpu())]
    strength = layers[-1].messages(states[0]).norm(dim=-1).cpu().numpy()                # (N, 2·limbs)
    hooks += [layer.register_forward_hook(lambda layer, x, out: x[0]) for layer in layers]       # left out
    poses += [decode(run(1)[0][-1].cpu())]
    for hook in hooks:
        hook.remove()
    tiles = []
    for n, view in enumerate(views):
        places = [STRIDE * zoom * cells[n].numpy() for cells, _ in poses]
        tiles += [draw.draw_people(view, xy[None], peaks[None, n].numpy(), model.skeleton)
                  for xy, (_, peaks) in zip(places, poses)]
        tiles.append(draw.draw_arrows(view, places[0], layers[-1].arrows, strength[n]))
    said = "the pose; without the Markov layers; how strong the last layer's messages along the limbs are"
    return dict(steps=films, markov=[draw.captioned(draw.contact_sheet(tiles, 3), said)])


def summary() -> str:
    """Of each preset: parameters, and GFLOPs of one person's prediction (2 per multiply-add)."""
    rows = [f"{'preset':8}{'input':>11}{'parameters':>14}{'GFLOPs':>9}"]
    for preset, cfg in PRESETS.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = build(preset).eval()
            maps = torch.zeros(1, model.skeleton.num_keypoints, *cfg.heatmap)
            model(torch.zeros(1, 3, 3, cfg.height, cfg.width), maps, torch.zeros(1, dtype=torch.long))
        count, cost = sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 1e9
        rows.append(f"{preset:8}{f'{cfg.width}x{cfg.height}x3':>11}{count:>12.2f} M{cost:>9.1f}")
    return "\n".join(rows)


def main() -> None:
    run_method(Config, PRESETS, __doc__, train, summary, partial(run_tables, TABLES))


if __name__ == "__main__":
    main()
