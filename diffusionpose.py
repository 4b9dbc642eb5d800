"""DiffusionPose: video pose by denoising heatmaps, with Mamba and a Markov random field (AAAI 2026).

Idea     A person's pose in the middle of three frames is a stack of heatmaps, one per joint, that starts as noise. A
         decoder turns it into the answer, in one step by default. An encoder, which reads the frames as one sequence
         with state-space models, tells it what the clip looks like and where the joints probably are; and the joints
         tell each other where they can be, by messages along the limbs of the skeleton.
Flow     crops (B,3,3,H,W) → ViT, each frame → (B,3,N,D), + keypoint tokens → X (B,3,M,D)
         → SpatioTemporalBlock ×3 → C_f (B,N,D) what the clip looks like, C_p (B,J,D) where the joints probably are
         noise x_T (B,J,Hh,Wh), t, C_f, C_p → DenoisingBlock ×3 → heatmaps (B,J,Hh,Wh); ddim repeats it if asked to
Read     MambaBlock → SpatioTemporalBlock → SpatioTemporalEncoder → MarkovOptimizationLayer (eqs. 1-3)
         → DenoisingBlock → PoseDenoisingDecoder → q_sample, ddim → DiffusionPose → criterion (eq. 4)
         → cut_clip → TrainClips → decode → evaluate → train; the ViT, ViTPose's, is in common/vit.py
Letters  B clips  J joints  N patches of a frame  M = N+J tokens of a frame  D channels  E = 2D channels inside Mamba
         H W crop  Hh Wh heatmap, a quarter of it  T = 1000 diffusion times t  K rounds of messages
Units    heatmaps G, H are in [0, 1]; what is denoised is x = (2G − 1)·s, s the signal scale; frames are normalised RGB;
         boxes are x1, y1, x2, y2 in pixels of the image; "cells" are those of a heatmap
Marks    No code was ever released and the paper leaves much open. [P] the paper says it; [A] taken from public code of
         an ancestor (ViTPose, DCPose, DiffusionDet, Mamba); [C] our choice where the paper has no words.
Departs  from the paper where its words are not defined:
         eqs. 1-3    potentials are in the logarithm, a product of messages is a sum, "∝" divides by the mean over
                     channels; messages run until they stop changing (MarkovOptimizationLayer)
         Sec. 3.2    one token per joint, its whole map, not patches of all maps: eq. 2 needs a state per joint
         Sec. 3      tiny, which starts from nothing, has small convolutions before its ViT (--stem patch: the paper's)
                     and a loss on what the patches see (--patch_weight 0: without)
         Table 7     its row (a) has "no C_f"; a U-Net that sees no image cannot work, so ours gets C_f as channels

Tables   mAP on PoseTrack17's val in the paper, and the flags of each row:
         5 baseline            81.2   --stfe none --denoiser unet --alpha 0
         5 (a), 7 (a)          85.7   --denoiser unet --alpha 0
         5 (b), 6 (a)          86.1   --stfe none
         6 (b)                 86.3   --stfe transformer
         7 (b)                 86.0   --no-cp --no-mol --alpha 0
         7 (c)                 86.5   --no-mol --alpha 0
         7 (d)                 87.2   --alpha 0
         5 (c), 6 (c), 7 (e)   87.8

    python diffusionpose.py                             what each preset is: parameters, GFLOPs
    python diffusionpose.py --train                     learn the embedded puppets' clips on this machine
    python diffusionpose.py --train --no-neighbours     the same without the frames before and after, to compare
    python diffusionpose.py --train --data data/posetrack18 --preset b          from ViTPose's weights
    python eval.py runs/<run> --images frames/ --boxes people.json --gif        poses over time, of a folder of frames
    python eval.py runs/<run> --images frames/ --process        heatmaps along the steps, messages between the joints
"""
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.nets import vit
from common import draw, metrics, transforms, weights
from common.boxes import Boxes, Found, people_to_learn, true_boxes, whole_image
from common.cli import check_choice, check_range, launch, parse, parse_numbers, resolve, run_main
from common.datasets import PoseDataset
from common.errors import UserError
from common.oks import rescore
from common.predict import people_by_image, predict_people
from common.ranks import AMP, Ranks, autocast, distribute, init_ranks, mean_over_ranks, micro_batch, rank_zero_first, seed_all
from common.records import Prediction, Sample
from common.run import Ema, Loop, check_finite
from common.splits import open_splits
from common.heatmaps import CellHeatmaps
from common.skeletons import Skeleton, edges, get_skeleton
from common.unet import UNet
from common.nets.vit import PATCH, Attention, CrossAttention, LayerNorm, TransformerBlock, ViT, mlp
from kernels.selective_scan import selective_scan

# ---- Configuration: every number of the paper. Each field is a flag, its comment the flag's help. -----------

STRIDE = 4                     # pixels of the crop per cell of a heatmap
CELLS = PATCH // STRIDE        # across a patch of the ViT
TIMES = 1000                   # T, diffusion times [A: DiffusionDet]
TOP_DOWN = True                # for eval.py: it looks at one person at a time, whose box it is given
CLIPS = True                   # and at the frames before and after
AT_INFERENCE = ("steps", "eta", "ensemble", "flip_test", "neighbours", "seed")      # what eval.py --set can change


@dataclass(frozen=True)
class Config:
    # model
    height: int = 256              # pixels of a person's crop: 256 or 384 [C]; a multiple of 16
    width: int = 192               # 192 or 288
    dim: int = 768                 # D, channels of every token
    depth: int = 12                # layers of the ViT
    vit_heads: int = 12            # its attention heads
    heads: int = 12                # attention heads everywhere else: D/64 [C]
    stfe_layers: int = 3           # blocks of the spatio-temporal encoder: the paper has "multiple" [C]
    decoder_layers: int = 3        # denoising blocks [C]
    stem: str = "patch"            # what makes patches tokens: patch, the ViT's, or conv, small convolutions [C]
    patch_weight: float = 0.0      # of a loss that asks the patches of C_f for heatmaps, too [C]
    # ablations (Tables 5 to 7)
    stfe: str = "stb"              # stb, transformer (Table 6) or none (Table 5): what relates the three frames
    denoiser: str = "hcdb"         # hcdb, or unet, which has no use for C_p and no Markov layer (Tables 5 and 7)
    cf: bool = True                # the denoiser looks at C_f, what the clip looks like
    cp: bool = True                # joints look at each other, guided by C_p, where they probably are (Table 7)
    mol: bool = True               # Markov optimization layers (Table 7)
    alpha: float = 0.1             # weight of the Markov loss [C]; 0: without it (Table 7)
    # diffusion
    signal_scale: float = 1.0      # s, how large the signal is beside the noise [C]
    steps: int = 1                 # DDIM steps of a prediction [P]
    ensemble: int = 1              # draws of noise whose heatmaps are averaged (as DiffPose does)
    eta: float = 0.0               # share of fresh noise in a DDIM step [C]
    init: str = ""                 # start weights: file or name; DiffusionPose, or a ViT of ViTPose or MAE
    # data
    half_body: float = 0.3         # share of people with more than 8 joints of whom only one half is shown [A]
    scale_jitter: float = 0.35     # standard deviation of a crop's size, relative [A]
    rotation: float = 45.0         # and of its angle, degrees, for 60 % of the people [A]
    neighbours: bool = True        # off: the key frame three times, to see what the other frames are worth
    sigma: float = 2.0             # of the Gaussians in true heatmaps, cells: 2 for 256x192, 3 for 384x288 [A]
    flip_test: bool = False        # prediction averages the heatmaps of the clip and of its mirror image
    # optimisation
    epochs: int = 20               # passes over the training people [P]
    batch: int = 32                # clips per optimiser step, over all GPUs and micro-batches [C]
    accum: int = 1                 # micro-batches per optimiser step
    lr: float = 5e-4               # learning rate [P]
    lr_backbone: float = 5e-5      # learning rate of the ViT [C]
    weight_decay: float = 0.1      # AdamW's, not on biases, norms, tokens and tables [A]
    schedule: str = "constant"     # constant or cosine
    warmup: int = 500              # optimiser steps of linear warm-up [C]
    drop_epochs: str = "16"        # learning rate ×0.1 from each of these epochs on [P]
    clip: float = 1.0              # largest L2 norm of the gradient [C]
    ema: float = 0.0               # decay of the weight average that is evaluated; 0: the weights themselves
    ema_warmup: int = 0            # optimiser steps over which the decay grows to that
    amp: str = "bf16"              # no, bf16 or fp16 (old GPUs); a CPU always runs float32
    # files and machine
    data: str = "puppets"          # puppets (made on first use), or a folder of PoseTrack, COCO or CrowdPose
    sigmas: str = ""               # OKS sigmas of your own keypoints, e.g. 0.03,0.08,0.08
    processes: int = 1             # training processes when there is no GPU and no torchrun
    workers: int = 4               # image loading processes per GPU; 0: none
    eval_every: int = 1            # epochs between evaluations
    eval_batch: int = 32           # clips per evaluation batch
    seed: int = 0                  # all random numbers follow from it

    def __post_init__(self):
        """Raises UserError for values that no run could use."""
        check_choice(self, stfe=("stb", "transformer", "none"), denoiser=("hcdb", "unet"),
                             stem=("patch", "conv"), schedule=("constant", "cosine"), amp=AMP)
        check_range(self, 1, math.inf, "height width dim depth vit_heads heads stfe_layers decoder_layers "
                            "ensemble epochs batch accum processes eval_every eval_batch")
        check_range(self, 1, TIMES, "steps")
        check_range(self, 1e-6, math.inf, "signal_scale lr clip sigma")
        check_range(self, 0, math.inf, "alpha patch_weight rotation lr_backbone weight_decay warmup ema_warmup "
                            "workers seed")
        check_range(self, 0, 1, "eta half_body scale_jitter ema")
        parse_numbers(self.drop_epochs)
        for name, unit in dict(dim=math.lcm(4, self.vit_heads, self.heads), height=PATCH, width=PATCH).items():
            if getattr(self, name) % unit:
                raise UserError(f"--{name} {getattr(self, name)}: expected a multiple of {unit}, for its "
                                        f"{'heads' if name == 'dim' else 'patches'}")
        if not self.cf and (self.denoiser == "unet" or self.stfe == "none" or not self.cp):
            raise UserError("--no-cf: the denoiser would see nothing of the image; leave --stfe stb, "
                                    "--denoiser hcdb and --cp as they are")
        if self.batch % self.accum:
            raise UserError(f"--batch {self.batch} does not split into {self.accum} micro-batches (--accum)")

    @property
    def grid(self) -> tuple[int, int]:                                  # rows and columns of patches
        return self.height // PATCH, self.width // PATCH

    @property
    def heatmap(self) -> tuple[int, int]:                               # rows and columns of a heatmap
        return self.height // STRIDE, self.width // STRIDE


def _presets() -> dict[str, Config]:
    b = Config(init="vitpose-base")
    s = replace(b, dim=384, heads=6, init="vitpose_small.pth")          # 12 heads in the ViT [A]: DeiT-S has 6
    l = replace(b, dim=1024, depth=24, vit_heads=16, heads=16, init="vitpose_large.pth")
    h = replace(b, dim=1280, depth=32, vit_heads=16, heads=20, init="vitpose_huge.pth")
    # To train from nothing in minutes: small convolutions before the ViT, and its patches learn where joints are first;
    # a decoder that asks patches which know nothing stays at the mean pose for thousands of steps.
    tiny = replace(b, height=128, width=96, dim=96, depth=4, vit_heads=4, heads=4, stfe_layers=1, decoder_layers=2,
                   stem="conv", patch_weight=1.0, init="", signal_scale=0.1, half_body=0.0, scale_jitter=0.1,
                   rotation=10.0, sigma=2.0, epochs=11, batch=16, lr=2e-3, lr_backbone=2e-3, weight_decay=0.05,
                   schedule="cosine", warmup=50, drop_epochs="", ema=0.995, ema_warmup=100, processes=2, workers=0,
                   eval_every=11, eval_batch=64)
    return {"tiny": tiny, "s": s, "b": b, "l": l, "h": h}


PRESETS: dict[str, Config] = _presets()

# ---- Spatio-Temporal Feature Encoder (STFE) -----------------------------------------------------------------

STATES, KERNEL, KEY = 16, 4, 1         # numbers per channel of Mamba, its convolution's width; the key frame's index


class MambaBlock(nn.Module):
    """A selective state-space model along a sequence, (B, L, D) → (B, L, D) [A: Gu & Dao 2023, with their names].

        u, z = W_in x;  u ← silu(conv(u));  d, B, C = W_x u;  out = W_out scan(u, W_d d, −exp(A_log), B, C, D, z)

    Causal: a token depends on itself and those before it. No norm and no residual inside.
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

    def convolve(self, u: Tensor) -> Tensor:
        """y_l = b + Σ_k w_k u_{l−3+k}, (B, L, E): as pictures of height 1, for which channels may stay last."""
        pictures = u.mT.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        weight = self.conv1d.weight.squeeze(1)[:, None, None]       # so that its gradient has the strides DDP expects
        y = F.conv2d(pictures, weight, self.conv1d.bias, padding=(0, KERNEL - 1), groups=len(weight))
        return y[:, :, 0, :u.shape[1]].mT

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)                                             # (B, L, E) each
        u = F.silu(self.convolve(u))
        d, B, C = self.x_proj(u).split(self.split, -1)                                  # (B, L, R), (B, L, 16) twice
        d = F.linear(d, self.dt_proj.weight)                                            # its bias goes into the scan
        y = selective_scan(u.mT, d.mT, -self.A_log.exp(), B.mT, C.mT, self.D, z.mT, self.dt_proj.bias,
                           delta_softplus=True)
        return self.out_proj(y.mT)


class SpatioTemporalBlock(nn.Module):
    """Tokens of three frames, X (B, 3, M, D) → the same shape. Pre-norm residual steps [C]:

        1  X ← X + SM(LN(X))         Spatial Mamba: each frame is a sequence of its own                    [P]
        2  g = FSM(LN(X))            Full-Sequence Mamba: one sequence, frame after frame, forward only    [P]
           s = TSA(LN(X))            Temporal Self-Attention: a token and its like in the other frames     [P]
        3  a = σ(W [g ; s] + b);     X ← X + a g + (1 − a) s          dynamic fusion                       [C]
        4  X ← X + MLP(LN(X))                                                                              [C]

    The paper has no formula for the fusion. A gate is the smallest thing that is dynamic; being convex, it keeps the
    residual stream from doubling, which has made vision Mambas diverge.
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
        s = rearrange(self.norm_temporal(x), "b f m d -> (b m) f d").contiguous()       # linear is slow on views
        s = rearrange(self.temporal_attn(s), "(b m) f d -> b f m d", b=len(x))
        a = self.gate(torch.cat([g, s], -1)).sigmoid()
        x = x + torch.lerp(s, g, a)                                                     # a g + (1 − a) s
        return x + self.mlp(self.norm_mlp(x))


class SpatioTemporalEncoder(nn.Module):
    """STFE: patches of three frames (B, 3, N, D) → C_f (B, N, D), C_p (B, J, D).

        X = [F_f + frame embedding ; keypoint tokens_f],  f = t−1, t, t+1     then blocks, then LN
        C_f = W [X_{t−1} ; X_t ; X_{t+1}] on the patches;   C_p = the key frame's keypoint tokens

    [P] Keypoint tokens are learned for each frame. [C] Frame embeddings: else attention over time could not tell which
    frame is the key frame. [C] Keypoint tokens stand behind the patches: only there can a causal scan show them any.
    The scan lets the key frame see t−1; attention lets it see t+1, too [P].
    """

    def __init__(self, cfg: Config, joints: int):
        super().__init__()
        dim, self.kind = cfg.dim, cfg.stfe
        if self.kind == "none" and (cfg.denoiser == "unet" or not cfg.cp):
            joints = 0                                                                  # nothing would read them
        self.keypoint_tokens = nn.Parameter(torch.empty(3, joints, dim))
        self.frame_embed = nn.Parameter(torch.empty(3, 1, dim))
        block = SpatioTemporalBlock if self.kind == "stb" else TransformerBlock
        self.blocks = nn.Sequential(*(block(dim, cfg.heads) for _ in range(cfg.stfe_layers * (self.kind != "none"))))
        self.norm = LayerNorm(dim)
        self.fuse = nn.Linear(3 * dim, dim) if cfg.cf else None

    def forward(self, features: Tensor) -> tuple[Tensor | None, Tensor]:
        patches = features.shape[2]
        x = torch.cat([features + self.frame_embed, self.keypoint_tokens.expand(len(features), -1, -1, -1)], 2)
        if self.kind == "transformer":                                                  # over all 3M tokens
            x = self.blocks(x.flatten(1, 2)).view_as(x)
        else:
            x = self.blocks(x)
        x = self.norm(x)
        fused = self.fuse(rearrange(x[:, :, :patches], "b f n d -> b n (f d)")) if self.fuse else None
        return fused, x[:, KEY, patches:]


# ---- Pose Denoising Decoder (PDD) ---------------------------------------------------------------------------

# Trees of limbs [C]: the usual drawings without the bars from hip to hip and from shoulder to shoulder, and the like.
TREES = dict(posetrack=edges("0-2 0-1 1-3 1-4 3-5 5-7 4-6 6-8 3-9 4-10 9-11 11-13 10-12 12-14"),
             coco=edges("0-1 0-2 1-3 2-4 0-5 0-6 5-7 7-9 6-8 8-10 5-11 6-12 11-13 13-15 12-14 14-16"),
             crowdpose=edges("12-13 13-0 13-1 0-2 2-4 1-3 3-5 0-6 1-7 6-8 8-10 7-9 9-11"))


def limbs(skeleton: Skeleton) -> tuple[tuple[int, int], ...]:
    """The skeleton's tree; of an unknown skeleton, its edges without those that would close a circle."""
    if skeleton.name in TREES:
        return TREES[skeleton.name]
    part, tree = list(range(skeleton.num_keypoints)), []
    for a, b in skeleton.edges:
        if part[a] != part[b]:
            tree.append((a, b))
            part = [part[b] if p == part[a] else p for p in part]
    return tuple(tree)


class MarkovOptimizationLayer(nn.Module):
    """Joints send each other messages along the limbs, h (B, J, D) → the same shape:

        msg_{j→i} ∝ ψ_i φ_ij ∏_{k ∈ Ng(j)∖i} msg_{k→j}                                                    (eq. 1)
        ψ_i = N_i W_n,   φ_ij = [N_i ; N_j] W_e                                                           (eq. 2)
        N_i ← log Σ_{j ∈ Ng(i)} exp(msg_{j→i}) + N_i                                                      (eq. 3)

    How they are read [C]. Eq. 3 exponentiates a message: messages µ and potentials are logarithms, the product is a
    sum. "∝" subtracts the logarithm of the mean over the D channels, so that a message without news is 0:

        λ_{j→i} = n_i W_n + [n_i ; n_j] W_e + Σ_{k ∈ Ng(j)∖i} µ_{k→j},   µ = λ − logmeanexp_D λ,   n = LN(h)

    On a tree this ends at the leaves: from µ = 0, K rounds for all messages at once are exact, K the longest path. As
    printed, ψ is the receiver's and nothing is summed over the sender's states; textbooks differ in both. All limbs
    share W_n and W_e [P], so a mirrored body gives a mirrored result; they start at 0, which is h + log |Ng|. A joint
    without limbs stays as it is. Float32, also under autocast.
    """

    def __init__(self, dim: int, tree: tuple[tuple[int, int], ...], joints: int):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.node, self.edge = nn.Linear(dim, dim, bias=False), nn.Linear(2 * dim, dim, bias=False)
        self.arrows = [arrow for a, b in tree for arrow in ((a, b), (b, a))]            # (sender, receiver)
        # follows[e, f] = 1: message f ends where e starts and does not come from where e goes
        follows = np.array([[f[1] == e[0] and f[0] != e[1] for f in self.arrows] for e in self.arrows], dtype=int)
        count = len(self.arrows)
        follows, self.rounds, chain = follows.reshape(count, count), 0, np.eye(count, dtype=int)
        while chain.any():                                                              # of so many messages
            chain, self.rounds = chain @ follows, self.rounds + 1
        # a row per joint: which messages reach it; `count` stands for log 0, which fills rows, count + 1 for log 1
        arriving = [[e for e, arrow in enumerate(self.arrows) if arrow[1] == i] or [count + 1] for i in range(joints)]
        arriving = [row + [count] * (max(map(len, arriving)) - len(row)) for row in arriving]
        for name, table in dict(follows=follows, arriving=arriving, ends=np.reshape(self.arrows, (-1, 2)).T).items():
            self.register_buffer(name, torch.as_tensor(np.array(table, dtype=int)), persistent=False)

    def messages(self, n: Tensor) -> Tensor:
        """All messages µ (B, 2·limbs, D), in the order of `arrows`, from states n (B, J, D)."""
        sender, receiver = self.ends
        from_receiver, from_sender = self.edge.weight.chunk(2, 1)
        base = (F.linear(n, self.node.weight + from_receiver)[:, receiver]              # eq. 2, once for each joint
                + F.linear(n, from_sender)[:, sender])
        follows, message = self.follows.to(base.dtype), torch.zeros_like(base)
        for _ in range(self.rounds):
            message = base + follows @ message                                          # eq. 1
            message = message - message.logsumexp(-1, keepdim=True) + math.log(base.shape[-1])
        return message

    def forward(self, h: Tensor) -> Tensor:
        with torch.autocast("cpu" if h.is_meta else h.device.type, enabled=False):
            h = h.to(torch.promote_types(h.dtype, torch.float32))
            messages = self.messages(self.norm(h))
            nothing = messages.new_tensor([-math.inf, 0.0])[None, :, None].expand(len(h), 2, h.shape[-1])
            return h + torch.cat([messages, nothing], 1)[:, self.arriving].logsumexp(2)             # eq. 3


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """t (B,) → (B, D): sin(t ω_k), then cos(t ω_k), ω_k = 10000^(−k / (D/2 − 1)) [A: DiffusionDet]."""
    k = torch.arange(dim // 2, device=t.device)
    angle = t[:, None] * torch.exp(-math.log(10000) / (dim // 2 - 1) * k)
    return torch.cat([angle.sin(), angle.cos()], -1)


class DenoisingBlock(nn.Module):
    """Heatmap Conditional Denoising Block: joint tokens h (B, J, D) → the same shape, steps in the paper's order:

        (i)    u = AdaLN(h) + C_p;  h ← h + MHSA(u)      location-guide self-attention                    [P]
        (ii)   h ← MOL(h)                                                                                 (eq. 3)
        (iii)  h ← h + MHCA(AdaLN(h), C_f)               cross-attention to what the clip looks like      [P]
        (iv)   h ← h + FFN(LN(h))                                                                         [P]
        AdaLN(h) = LN(h)·(1 + scale) + shift             of the time t; starts as plain LN [C]

    [C] C_p comes into queries, keys and values: at t = T−1 the tokens hold noise, and positions must get into them.
    Without C_p there is no step (i), without C_f no step (iii).
    """

    def __init__(self, cfg: Config, tree: tuple[tuple[int, int], ...], joints: int):
        super().__init__()
        dim = cfg.dim
        self.modulation = nn.Linear(dim, 4 * dim)
        self.self_attn = Attention(dim, cfg.heads) if cfg.cp else None
        self.mol = MarkovOptimizationLayer(dim, tree, joints) if cfg.mol else None
        self.cross_attn = CrossAttention(dim, cfg.heads) if cfg.cf else None
        self.norm_ffn, self.ffn = LayerNorm(dim), mlp(dim, 4 * dim)

    def forward(self, h: Tensor, time: Tensor, c_f: Tensor | None, c_p: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(time))[:, None].chunk(4, -1)
        if self.self_attn:
            h = h + self.self_attn(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale1) + shift1 + c_p)
        if self.mol:
            h = self.mol(h)
        if self.cross_attn:
            h = h + self.cross_attn(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale2) + shift2, c_f)
        return h + self.ffn(self.norm_ffn(h))


class PoseDenoisingDecoder(nn.Module):
    """PDD: noisy maps x_t (B, J, Hh, Wh), times t (B,), conditions → heatmaps H (B, J, Hh, Wh).

    [C] A token is one joint's whole map: h = W x_t[j] + position[j]. No sigmoid behind the last layer.
    """

    def __init__(self, cfg: Config, skeleton: Skeleton):
        super().__init__()
        dim, cells, joints = cfg.dim, math.prod(cfg.heatmap), skeleton.num_keypoints
        self.embed, self.pos_embed = nn.Linear(cells, dim), nn.Parameter(torch.empty(joints, dim))
        self.time_mlp = mlp(dim, dim, nn.SiLU)
        self.blocks = nn.ModuleList(DenoisingBlock(cfg, limbs(skeleton), joints) for _ in range(cfg.decoder_layers))
        self.norm, self.head = LayerNorm(dim), nn.Linear(dim, cells)

    def forward(self, x_t: Tensor, t: Tensor, c_f: Tensor | None, c_p: Tensor) -> Tensor:
        time = self.time_mlp(time_embedding(t, self.pos_embed.shape[1]).to(self.pos_embed.dtype))
        h = self.embed(x_t.flatten(2)) + self.pos_embed
        for block in self.blocks:
            h = block(h, time, c_f, c_p)
        return self.head(self.norm(h)).view_as(x_t)


class UNetDenoiser(nn.Module):
    """The naive U-Net of Tables 5 and 7, with the arguments of PoseDenoisingDecoder; C_p finds no use.

    It sees C_f as 64 channels beside the noisy maps. Like the decoder it predicts heatmaps [C]: the paper's predicts
    noise, which one step from t = 999 would divide by √ᾱ = 5e-5.
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


# ---- Diffusion ----------------------------------------------------------------------------------------------


def cosine_schedule() -> Tensor:
    """ᾱ_t = ∏(1 − β), β_t = min(1 − f(t+1)/f(t), 0.999), f(t) = cos²((t/T + 0.008)/1.008 · π/2) [A: DiffusionDet]."""
    f = torch.cos((torch.arange(TIMES + 1, dtype=torch.float64) / TIMES + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)


ALPHA_BAR = cosine_schedule()


def q_sample(heatmaps: Tensor, t: Tensor, noise: Tensor, visible: Tensor, signal_scale: float) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε,  x_0 = (2G − 1)·s: true maps at times t (B,), as training sees them.

    heatmaps, noise (B, J, Hh, Wh); visible (B, J). A joint without label is pure noise [C]: its map is 0, and x_0 a
    constant that would tell the network so.
    """
    alpha_bar = ALPHA_BAR.to(t.device)[t][:, None, None, None]
    signal = alpha_bar.sqrt().to(noise.dtype) * (2 * heatmaps - 1) * signal_scale
    return torch.where(visible[..., None, None] > 0, signal + (1 - alpha_bar).sqrt().to(noise.dtype) * noise, noise)


def time_pairs(steps: int) -> list[tuple[int, int]]:
    """(t, next t) of each step, from (T−1, ·) to (·, −1), evenly spaced."""
    times = [TIMES * i // steps - 1 for i in range(steps, -1, -1)]
    return list(zip(times, times[1:]))


def ddim(denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int, eta: float, signal_scale: float
         ) -> tuple[list[Tensor], list[Tensor]]:
    """From noise to heatmaps: x_{t'} = √ᾱ' x̂_0 + √(1 − ᾱ' − σ²) ε̂ + σ z,  x̂_0 = (2 clamp(H) − 1)·s  (DDIM eq. 12).

    denoise(x, t) → H for times t (B,); noise (B, S, J, Hh, Wh): x_T, then z of each step if eta > 0.
    Returns  H of each step, not clamped, and the states: x_T, x after each step; the last is x̂_0
    """
    heatmaps, states = [], [noise[:, 0]]
    for i, (now, then) in enumerate(time_pairs(steps)):
        x = states[-1]
        heatmaps.append(denoise(x, torch.full((len(x),), now, device=x.device)))
        start = (2 * heatmaps[-1].clamp(0, 1) - 1) * signal_scale                       # x̂_0
        if then < 0:
            states.append(start)
            break
        a, a_next = ALPHA_BAR[now].item(), ALPHA_BAR[then].item()
        epsilon = (x - math.sqrt(a) * start) / math.sqrt(1 - a)
        sigma = eta * math.sqrt((1 - a / a_next) * (1 - a_next) / (1 - a))
        x = math.sqrt(a_next) * start + math.sqrt(1 - a_next - sigma ** 2) * epsilon
        states.append(x + sigma * noise[:, i + 1] if eta else x)
    return heatmaps, states


# ---- The model ----------------------------------------------------------------------------------------------


def cosine_basis(size: tuple[int, int], count: int) -> Tensor:
    """The `count` smoothest patterns cos(πi(y+½)/h) cos(πj(x+½)/w) of an h × w map, orthonormal: (count, h·w)."""
    waves = [np.cos(np.pi * np.arange(n)[:, None] * (np.arange(n) + 0.5) / n) for n in size]
    down, across = (wave / np.linalg.norm(wave, axis=1, keepdims=True) for wave in waves)
    speed = np.add.outer(*((np.arange(n) / n) ** 2 for n in size))
    i, j = np.unravel_index(np.argsort(speed, axis=None)[:count], size)
    basis = (down[i, :, None] * across[j, None, :]).reshape(len(i), -1)
    return torch.from_numpy(np.pad(basis, [(0, count - len(basis)), (0, 0)])).float()


class DiffusionPose(nn.Module):
    """Clips to heatmaps. `forward` is training's one call, `sample` predicts; both are `encode`, then `denoise`."""

    def __init__(self, cfg: Config, skeleton: Skeleton):
        super().__init__()
        self.cfg, self.skeleton = cfg, skeleton
        self.backbone = ViT(cfg.dim, cfg.depth, cfg.vit_heads, math.prod(cfg.grid), cfg.stem)   # no drop path [C]
        self.stfe = SpatioTemporalEncoder(cfg, skeleton.num_keypoints)
        self.pdd = (PoseDenoisingDecoder if cfg.denoiser == "hcdb" else UNetDenoiser)(cfg, skeleton)
        self.patches = CellHeatmaps(cfg.dim, skeleton.num_keypoints, CELLS) if cfg.patch_weight and cfg.cf else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values [C]; Mamba and convolutions have set theirs.

        Who is who, and where, is said aloud. Tables of joints and frames have deviation 1: with 0.02, as in a ViT, a
        joint's token would start as the noise it is made of. Places are cosines of x times cosines of y: what attention
        makes of them is linear, and a peak at a patch is a sum of such products; of sin x + sin y (MAE's) it is not.
        Maps are read, and written, as smooth patterns: a peak is made of these, and of a random pattern most is noise.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and "mamba" not in name:
                quiet = name.endswith(("modulation", "mol.node", "mol.edge", "patches.head"))
                nn.init.zeros_(module.weight) if quiet else nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, table in self.named_parameters():
            if name.endswith(("pdd.pos_embed", "keypoint_tokens", "frame_embed")):
                nn.init.normal_(table)
        if isinstance(self.pdd, PoseDenoisingDecoder):
            smooth = 0.1 * cosine_basis(self.cfg.heatmap, self.cfg.dim)
            self.pdd.embed.weight.copy_(smooth)
            self.pdd.head.weight.copy_(smooth.T)
        self.backbone.pos_embed.zero_()[0, 1:] = 6 * cosine_basis(self.cfg.grid, self.cfg.dim).T

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(draws, 1 or steps, J, Hh, Wh): the noise that `sample` takes for each clip."""
        cfg = self.cfg
        return cfg.ensemble, cfg.steps if cfg.eta else 1, self.skeleton.num_keypoints, *cfg.heatmap

    def encode(self, frames: Tensor) -> tuple[Tensor | None, Tensor]:
        """Frames (B, 3, 3, H, W), previous, key and next one → C_f (B, N, D) or None, C_p (B, J, D)."""
        return self.stfe(self.backbone(frames.flatten(0, 1)).unflatten(0, (-1, 3)))

    def denoise(self, x_t: Tensor, t: Tensor, c_f: Tensor | None, c_p: Tensor) -> Tensor:
        """Heatmaps H (B, J, Hh, Wh) from noisy maps of times t (B,)."""
        return self.pdd(x_t, t, c_f, c_p)

    def forward(self, frames: Tensor, x_t: Tensor, t: Tensor) -> list[Tensor]:
        """Heatmaps H (B, J, Hh, Wh) of noisy maps x_t; with --patch_weight a second time, as the patches see them."""
        c_f, c_p = self.encode(frames)
        maps = [self.denoise(x_t, t, c_f, c_p)]
        return maps + [self.patches(c_f, self.cfg.grid[0])] if self.patches else maps

    def sample(self, frames: Tensor, noise: Tensor) -> Tensor:
        """Heatmaps (B, J, Hh, Wh), not clamped: DDIM from noise (B, *noise_shape), the mean of all draws."""
        conditions, cfg = self.encode(frames), self.cfg
        draws = [ddim(lambda x, t: self.denoise(x, t, *conditions), one, cfg.steps, cfg.eta, cfg.signal_scale)[0][-1]
                 for one in noise.unbind(1)]
        return torch.stack(draws).mean(0)


def build(preset: str, skeleton: str | Skeleton = "posetrack", **overrides) -> DiffusionPose:
    """A model with start values; overrides are Config fields."""
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(PRESETS)}")
    return DiffusionPose(resolve(PRESETS[preset], **overrides), get_skeleton(skeleton))


# ---- Start weights: a ViT in four spellings (ViTPose's own, MAE, mmpose, transformers) ----------------------

def convert_official(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Tensors of ours as they are; a ViT of any spelling under our names, its table of positions for our grid."""
    if "stfe.norm.weight" in state:
        return {name: value for name, value in state.items() if name != "n_averaged"}
    return vit.convert(state, config.dim, config.vit_heads, config.grid)


def recognise(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(preset, joints) of tensors under our own names; None for something else: no weights were ever released."""
    if not {"stfe.norm.weight", "pdd.pos_embed"} <= state.keys():
        return None
    joints, dim = state["pdd.pos_embed"].shape
    preset = next((name for name, cfg in PRESETS.items() if cfg.dim == dim), None)
    return preset and (preset, joints)


def load_init(model: DiffusionPose, source: str) -> None:
    """Start weights by file or name: DiffusionPose (all), or a ViT of ViTPose, MAE, mmpose or transformers."""
    path = Path(source)
    if not path.exists() and path.suffix:
        raise UserError(f"there are no start weights {source}: --init takes a file of ViTPose or MAE, of which "
                                "data/README.md says where they are, vitpose-base, or '' to start from nothing")
    path = path if path.exists() else weights.fetch(source)
    state = convert_official(weights.load_tensors(path), model.cfg)
    whole = "stfe.norm.weight" in state
    weights.load_strict(model, state, {r"^patches\.": "a lesson on the side, which starts anew"} if whole else
                        {r"^(?!backbone\.)": "not in a backbone's file"})
    print(f"start weights from {path}: {len(state)} of {len(model.state_dict())} tensors")


# ---- Losses -------------------------------------------------------------------------------------------------

BETA, LENGTH_ETA = 100.0, 0.01         # sharpness of the soft-argmax; px², keeps lengths differentiable at 0 [C]


def true_heatmaps(xy: Tensor, visible: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """G_j(p) = exp(−|p − µ_j|² / 2σ²): joints (B, J, 2) in cells → (B, J, *size); 0 where `visible` (B, J) is 0.

    [C] The centre µ is where the joint is, between cells, and the Gaussian covers the whole map; DCPose rounds the
    centre and cuts the Gaussian off.
    """
    across, down = (torch.arange(n, device=xy.device, dtype=xy.dtype) for n in (size[1], size[0]))
    x = torch.exp(-(across - xy[..., :1]) ** 2 / (2 * sigma ** 2))                 # (B, J, Wh)
    y = torch.exp(-(down - xy[..., 1:]) ** 2 / (2 * sigma ** 2))                   # (B, J, Hh)
    return y[..., None] * x[..., None, :] * visible[..., None, None]


def heatmap_loss(pred: Tensor, target: Tensor, visible: Tensor) -> Tensor:
    """‖H − G‖² of a joint's map [P], the mean over the labelled joints of the batch on all processes [C]."""
    squared = (pred - target).square().sum((2, 3))
    return (squared * visible).sum() / mean_over_ranks(visible.sum()).clamp(min=1)


def soft_argmax(heatmaps: Tensor) -> Tensor:
    """Maps (B, J, Hh, Wh) → Σ_p softmax(β H)(p) p, xy in cells (B, J, 2): where the peak is, with a gradient [C]."""
    share = (BETA * heatmaps.flatten(2)).softmax(-1).view_as(heatmaps)
    across, down = (torch.arange(n, device=share.device, dtype=share.dtype) for n in (share.shape[3], share.shape[2]))
    return torch.stack([share.sum(2) @ across, share.sum(3) @ down], -1)


def limb_pairs(tree: tuple[tuple[int, int], ...]) -> list[tuple[int, int, int, int, int]]:
    """(o, a, b, limb o-a, limb o-b) of all pairs of limbs that share a joint o."""
    return [(o, sum(one) - o, sum(other) - o, m, n)
            for (m, one), (n, other) in combinations(enumerate(tree), 2) for o in set(one) & set(other)]


def markov_loss(pred: Tensor, true: Tensor, visible: Tensor, tree: tuple) -> tuple[Tensor, Tensor]:
    """The two terms of the Markov loss of each person, (B,) each, from joints (B, J, 2) in cells and visible (B, J):

        length = −log (1/M) Σ_m exp(−(L_m − L*_m)² / (2 s² + 1e-6)),   angle = (1/N) Σ_n (cos_n − cos*_n)²   (eq. 4)

    M limbs and N pairs of limbs that share a joint, whose joints are all labelled; L lengths, s the deviation of the
    person's true lengths, cos the cosine between two limbs. s is at least a cell [C]: two forearms of one length
    would make it 0 and the gradient infinite. M < 2 and N = 0 give 0. Note what the logarithm of a mean of
    exponentials is: a soft minimum, small as soon as one limb fits, that pulls most at limbs that are nearly right.
    """
    a, b = torch.tensor(tree, device=pred.device).T
    o, p, q, limb_p, limb_q = torch.tensor(limb_pairs(tree), dtype=torch.long, device=pred.device).view(-1, 5).T

    def lengths_and_cosines(xy: Tensor) -> tuple[Tensor, Tensor]:
        length = ((xy[:, a] - xy[:, b]).square().sum(-1) + LENGTH_ETA).sqrt()                      # (B, limbs)
        dot = ((xy[:, p] - xy[:, o]) * (xy[:, q] - xy[:, o])).sum(-1)
        return length, dot / (length[:, limb_p] * length[:, limb_q])

    (length, cosine), (true_length, true_cosine) = lengths_and_cosines(pred), lengths_and_cosines(true)
    limb, pair = visible[:, a] * visible[:, b], visible[:, o] * visible[:, p] * visible[:, q]      # 0 or 1
    m = limb.sum(1, keepdim=True)
    mean = (true_length * limb).sum(1, keepdim=True) / m.clamp(min=1)
    variance = ((true_length - mean).square() * limb).sum(1, keepdim=True) / m.clamp(min=1)
    error = (length - true_length).square() / (2 * variance.clamp(min=1) + 1e-6)
    few = m < 2                                                  # then all limbs, so that no −∞ meets the gradient
    soft = torch.where((limb > 0) | few, -error, -math.inf).logsumexp(1)
    length_term = torch.where(few[:, 0], 0 * soft, m[:, 0].clamp(min=1).log() - soft)
    angle_term = ((cosine - true_cosine).square() * pair).sum(1) / pair.sum(1).clamp(min=1)
    return length_term, angle_term


def criterion(pred: Tensor, target: Tensor, visible: Tensor, tree: tuple, alpha: float) -> dict[str, Tensor]:
    """heat + α·markov, maps (B, J, Hh, Wh); both terms in float32, coordinates of both by soft-argmax [C]."""
    pred = pred.float()
    losses = dict(heat=heatmap_loss(pred, target, visible))
    if alpha and len(tree) > 1:
        losses["markov"] = alpha * sum(markov_loss(soft_argmax(pred), soft_argmax(target), visible, tree)).mean()
    return losses


# ---- Clips: a person's box, enlarged, cut out of three frames ------------------------------------------------

MARGIN = 1.25                  # the crop over the box [A]: room for where the person is in the other frames


def box_matrix(box: np.ndarray, cfg: Config) -> np.ndarray:
    """2×3 from image to crop for a box x1, y1, x2, y2, as prediction cuts it; the mapping of HRNet and DCPose, not the
    one of ViTPose, which lies half a pixel beside it [A]."""
    centre, size = transforms.fit_box(np.asarray(box, float), cfg.width / cfg.height, MARGIN)
    return transforms.crop_matrix(centre, size[0], (cfg.width, cfg.height))


def cut_clip(frames: tuple[Image.Image, ...], matrix: np.ndarray, cfg: Config) -> Tensor:
    """Previous, key and next frame, of one size, through one matrix: (3, 3, H, W) uint8."""
    frames = frames if cfg.neighbours else (frames[KEY],) * 3
    stack = np.concatenate([np.asarray(frame) for frame in frames], 2)                  # (h, w, 9)
    crop = transforms.warp_affine(stack, matrix, (cfg.width, cfg.height))
    return torch.from_numpy(crop).permute(2, 0, 1).unflatten(0, (3, 3))


def frames_of(sample: Sample) -> tuple[Image.Image, ...]:
    """A sample's three frames; of a still image three times its own."""
    before, after = sample.frames or (sample.image, sample.image)
    return before, sample.image, after


def cut_box(sample: Sample, box: np.ndarray, cfg: Config) -> Tensor:
    return cut_clip(frames_of(sample), box_matrix(box, cfg), cfg)


def augment(joints: np.ndarray, box: np.ndarray, width: int, skeleton: Skeleton, cfg: Config,
            rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """2×3 from image to crop, and whether it mirrors [A: as DCPose]; joints (J, 3) and box in an image of that width.

    Half of the body for some people with more than 8 joints; size by 1 ± scale_jitter at most; 60 % turned by up to
    2·rotation; 50 % mirrored, where the skeleton has left and right.
    """
    halve = rng.random() < cfg.half_body and (joints[:, 2] > 0).sum() > 8
    half = transforms.half_body(joints, skeleton, rng) if halve else None
    box, margin = (box, MARGIN) if half is None else (half, 1.5)
    centre, size = transforms.fit_box(box, cfg.width / cfg.height, margin)
    window = size[0] * (1 + cfg.scale_jitter * np.clip(rng.standard_normal(), -1, 1))
    angle = cfg.rotation * np.clip(rng.standard_normal(), -2, 2) * (rng.random() < 0.6)
    mirrored = skeleton.flip is not None and rng.random() < 0.5
    mirror = np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]]) if mirrored else np.eye(3)
    centre = transforms.move_points(centre, mirror[:2])
    return transforms.crop_matrix(centre, window, (cfg.width, cfg.height), angle) @ mirror, mirrored


class TrainClips(torch.utils.data.Dataset):
    """One epoch of augmented people; item n is (clip (3, 3, H, W) uint8, joints (J, 3), image id, messages).

    Joints are pixels of the crop, v is 1, or 0 where there is no label or the joint has left the crop. What happens to
    person n depends on (seed, epoch, n) alone. A key frame that cannot be read gives way to the next person's.
    """

    def __init__(self, data: PoseDataset, people: np.ndarray, cfg: Config, epoch: int):
        self.data, self.people, self.cfg, self.epoch = data, people, cfg, epoch

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, int | str, list[str]]:
        cfg, skeleton, messages = self.cfg, self.data.skeleton, []
        rng = np.random.default_rng([cfg.seed, self.epoch, n])
        for k in range(len(self)):
            i, p = self.people[(n + k) % len(self)]
            sample, message = self.data.load(int(i))
            messages += [message] if message else []
            if sample is not None:
                break
        else:
            raise UserError(f"none of the images can be read, e.g. {messages[0]}")
        joints, box = sample.keypoints[p].astype(float), sample.boxes[p].clip(0, np.tile(sample.size, 2) - 1)
        matrix, mirrored = augment(joints, box, sample.size[0], skeleton, cfg, rng)
        xy, v = transforms.move_points(joints[:, :2], matrix), joints[:, 2] > 0
        v &= ((xy >= 0) & (xy < (cfg.width, cfg.height))).all(1)
        placed = torch.from_numpy(np.c_[np.where(v[:, None], xy, 0), v]).float()
        placed = placed[list(skeleton.flip)] if mirrored else placed
        return cut_clip(frames_of(sample), matrix, cfg), placed, sample.image_id, messages


# ---- Prediction ---------------------------------------------------------------------------------------------


def decode(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (N, J, Hh, Wh) → joints in cells (N, J, 2) and their peaks (N, J) [A].

    The highest cell, then a quarter of a cell towards the larger neighbour in x and in y, unless it is at the rim; a
    map without a positive value gives (0, 0).
    """
    n, _, rows, columns = heatmaps.shape
    peak, place = heatmaps.flatten(2).max(-1)
    x, y = place % columns, place // columns
    inner = (x > 1) & (x < columns - 1) & (y > 1) & (y < rows - 1)
    flat, at = heatmaps.flatten(2), torch.where(inner, place, columns + 1)[..., None]
    right, left, below, above = (flat.gather(2, at + step)[..., 0] for step in (1, -1, columns, -columns))
    shift = 0.25 * torch.stack([(right - left).sign(), (below - above).sign()], -1) * inner[..., None]
    return (torch.stack([x, y], -1) + shift) * (peak > 0)[..., None], peak


def noise_for(boxes: np.ndarray, model: DiffusionPose) -> Tensor:
    """Start noise (N, *noise_shape) of boxes (N, 4), from the seed and the box alone: a score that does not depend on
    the size of a batch, nor on the order of loading [C]."""
    seeds = [zlib.crc32(np.float64([model.cfg.seed, *box]).tobytes()) for box in boxes]
    return torch.stack([torch.randn(model.noise_shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def find_heatmaps(model: DiffusionPose, crops: Tensor, boxes: np.ndarray) -> Tensor:
    """Clips (N, 3, 3, H, W) uint8, of boxes (N, 4) → heatmaps (N, J, Hh, Wh), float32 on the CPU."""
    device = next(model.parameters()).device
    frames, noise = transforms.normalise(crops.to(device) / 255), noise_for(boxes, model).to(device)
    with autocast(device, model.cfg.amp):
        heatmaps = model.sample(frames, noise).float()
        if model.cfg.flip_test and model.skeleton.flip is not None:
            flip = list(model.skeleton.flip)
            mirrored = model.sample(frames.flip(-1), noise.flip(-1)[..., flip, :, :]).float()
            mirrored = mirrored[:, flip].flip(-1)                # the crop turns about a pixel, a map about a cell:
            mirrored = torch.cat([mirrored[..., :1], mirrored[..., :-1]], -1)       # one to the right comes near [A]
            heatmaps = (heatmaps + mirrored) / 2
    return heatmaps.cpu()


def find_poses(model: DiffusionPose, crops: Tensor, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clips of boxes → joints (N, J, 2) in pixels of the image, and the peaks of their heatmaps (N, J)."""
    cells, peaks = decode(find_heatmaps(model, crops, boxes))
    back = [transforms.invert(box_matrix(box, model.cfg)) for box in boxes]
    places = [transforms.move_points(STRIDE * xy, matrix) for xy, matrix in zip(cells.double().numpy(), back)]
    return np.stack(places), peaks.numpy()


def with_scores(p: Prediction) -> Prediction:
    """Scores as the ancestors count [A]: of a joint its peak · the box's score, of a person the box's · the mean of
    the peaks above 0.2."""
    return replace(p, scores=rescore(p.scores, p.keypoint_scores),
                   keypoint_scores=p.keypoint_scores * p.scores[:, None])


def to_batch(pictures: list, image_ids: list, cfg: Config, boxes: list[Found] | None = None) -> dict:
    """RGB pictures, or clips (previous, key, next) of them, and the people in each → what `predict` takes.

    Without boxes each picture as a whole is taken for one person.
    """
    clips, people = [clip if isinstance(clip, tuple) else (clip,) * 3 for clip in pictures], []
    boxes = boxes or [whole_image(key.size) for _, key, _ in clips]
    for clip, image_id, found in zip(clips, image_ids, boxes):
        people += [(image_id, cut_clip(clip, box_matrix(box, cfg), cfg), score, box) for box, score in zip(*found)]
    return dict(people=people, image_ids=image_ids)


def predict(model: DiffusionPose, batch: dict) -> list[Prediction]:
    """People of a batch from `to_batch`: one Prediction per image, empty where there was no box."""
    people, rows = batch["people"], []
    for first in range(0, len(people), model.cfg.eval_batch):
        ids, crops, scores, boxes = zip(*people[first:first + model.cfg.eval_batch])
        rows += zip(ids, *find_poses(model, torch.stack(crops), np.stack(boxes)), scores, boxes)
    return [with_scores(p) for p in people_by_image(rows, batch["image_ids"], model.skeleton.num_keypoints)]


def fuse(model: DiffusionPose) -> DiffusionPose:
    """The model for prediction; there is nothing to fold."""
    return model.eval()


LEAST_BOX = 0.2                # score of a detected box that PoseTrack's methods look at [A]


def evaluate(model: DiffusionPose, data: PoseDataset, cfg: Config, ranks: Ranks,
             boxes: Boxes | None = None) -> tuple[dict, list[Prediction]]:
    """Metrics and predictions of a dataset: PoseTrack's table in percent for its like, else OKS AP.

    boxes: where people are; the annotated ones by default, which is several points better than a detector's.
    """
    boxes = boxes or true_boxes(data)
    if data.metric == "posetrack":
        everybody, boxes = boxes.total(), boxes.at_least(LEAST_BOX)
        if boxes.total() < everybody and ranks.rank == 0:
            print(f"{everybody - boxes.total()} of {everybody} person boxes left out: their score is below {LEAST_BOX}")
    found = predict_people(partial(find_poses, fuse(model)), data, boxes, partial(cut_box, cfg=cfg),
                                   cfg.eval_batch, cfg.workers, ranks)
    found = [with_scores(p) for p in found]
    return metrics.evaluate(found, data), found


# ---- Pictures: how noise becomes a pose, and what joints tell each other --------------------------------------

SHOWN_STEPS = 10


@torch.no_grad()
def show_process(model: DiffusionPose, picture: Image.Image | tuple, threshold: float, found: Found
                 ) -> dict[str, list[Image.Image]]:
    """For eval.py --process, of each box: `steps`, the noisy maps beside the heatmaps that the network sees in them,
    step by step; `markov`, the pose with and without the Markov layers, and the messages of the last by strength.
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
    for heatmaps, state in zip(*run(SHOWN_STEPS)):
        pairs = zip(views, (state / cfg.signal_scale + 1) / 2, heatmaps)
        tiles = [draw.draw_heat(view, maps.amax(0).cpu().numpy()) for view, *both in pairs for maps in both]
        films.append(draw.contact_sheet(tiles, 2))
    layers = [block.mol for block in getattr(model.pdd, "blocks", ()) if block.mol]
    if not layers:
        return dict(steps=films)
    states = []                                                  # n of the last layer
    hooks = [layers[-1].norm.register_forward_hook(lambda layer, x, n: states.append(n))]
    poses = [decode(run(1)[0][-1].cpu())]
    strength = layers[-1].messages(states[0]).norm(dim=-1).cpu().numpy()                # (N, 2·limbs)
    hooks += [layer.register_forward_hook(lambda layer, x, out: x[0]) for layer in layers]      # as if they were not
    poses += [decode(run(1)[0][-1].cpu())]
    for hook in hooks:
        hook.remove()
    tiles = []
    for n, view in enumerate(views):
        places = [STRIDE * zoom * cells[n].numpy() for cells, _ in poses]
        tiles += [draw.draw_people(view, xy[None], peaks[None, n].numpy(), model.skeleton)
                  for xy, (_, peaks) in zip(places, poses)]
        tiles.append(draw.draw_arrows(view, places[0], layers[-1].arrows, strength[n]))
    return dict(steps=films, markov=[draw.contact_sheet(tiles, 3)])


# ---- Training -----------------------------------------------------------------------------------------------


def build_optimizer(model: DiffusionPose, cfg: Config) -> torch.optim.AdamW:
    """AdamW in four groups: the ViT at a rate of its own; no decay on biases, norms, tokens, tables, A_log and D."""
    groups = {}
    for name, weight in model.named_parameters():
        plain = weight.ndim < 2 or name.split(".")[-1] in ("pos_embed", "keypoint_tokens", "frame_embed", "A_log")
        groups.setdefault((name.startswith("backbone."), plain), []).append(weight)
    return torch.optim.AdamW([dict(params=params, initial_lr=cfg.lr_backbone if backbone else cfg.lr,
                                   weight_decay=0.0 if plain else cfg.weight_decay)
                              for (backbone, plain), params in groups.items()], lr=cfg.lr, fused=True)


def lr_scale(step: int, steps: int, epoch: int, cfg: Config) -> float:
    """Factor on the learning rates at an optimiser step out of `steps`."""
    scale = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    if cfg.schedule == "cosine":
        scale *= 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return scale * 0.1 ** sum(epoch >= drop for drop in parse_numbers(cfg.drop_epochs) or ())


def batch_losses(net: nn.Module, model: DiffusionPose, clips: Tensor, joints: Tensor, alpha: float,
                 ranks: Ranks) -> dict[str, Tensor]:
    """Noise of a random time on the true maps of a batch, forward pass of `net`, which is the model or distributes it,
    and the loss terms. Raises FloatingPointError if one of them is not finite."""
    cfg = model.cfg
    clips, joints = clips.to(ranks.device, non_blocking=True), joints.to(ranks.device)
    visible = joints[..., 2]
    target = true_heatmaps(joints[..., :2] / STRIDE, visible, cfg.heatmap, cfg.sigma)
    t = torch.randint(TIMES, (len(clips),), device=ranks.device)
    x_t = q_sample(target, t, torch.randn_like(target), visible, cfg.signal_scale)
    with autocast(ranks.device, cfg.amp):
        pred, *of_patches = net(transforms.normalise(clips / 255), x_t, t)
    losses = criterion(pred, target, visible, limbs(model.skeleton), alpha)
    for maps in of_patches:
        losses["patches"] = cfg.patch_weight * heatmap_loss(maps.float(), target, visible)
    check_finite(losses)
    return losses


def open_clips(cfg: Config, ranks: Ranks) -> tuple[PoseDataset, PoseDataset]:
    """Training and held-out data; of the puppets their clips."""
    return open_splits(cfg, ranks, "posetrack" if cfg.data == "puppets" else None)


def train(cfg: Config, args) -> None:
    """Train, evaluate, keep everything in the run folder. Runs alone or under torchrun; Ctrl-C saves and leaves."""
    ranks = init_ranks(args.device)
    micro = micro_batch(cfg, ranks)
    with rank_zero_first(ranks):                         # it makes the puppets and fetches start weights
        data, held_out = open_clips(cfg, ranks)
        seed_all(cfg.seed)                               # equal start weights on every process
        model = DiffusionPose(cfg, data.skeleton)
        if cfg.init and not args.saved:
            load_init(model, cfg.init)
    model.to(ranks.device, memory_format=torch.channels_last)
    ema = Ema(model, cfg.ema, cfg.ema_warmup)
    loop = Loop("diffusionpose", cfg, args, ranks, data, held_out, model, build_optimizer(model, cfg), ema)
    net = distribute(model, ranks)

    data = data.training()
    people = people_to_learn(data)
    steps = loop.plan(len(people), micro)
    for epoch in loop.epochs():
        net.train()
        for clips, joints, ids, skipped in loop.batches(TrainClips(data, people, cfg, epoch)):
            loop.set_lr(lr_scale(loop.step, steps, epoch, cfg))
            # alpha grows over the first epoch [C]: on maps without peaks the Markov loss would lead
            alpha = cfg.alpha * min(1.0, loop.step * cfg.epochs / steps)
            with loop.naming(ids, skipped):
                losses = batch_losses(net, model, clips, torch.stack(joints), alpha, ranks)
            loop.scaler.scale(sum(losses.values()) / cfg.accum).backward()
            if not loop.update():                                # the step has further micro-batches
                continue
            loop.log(losses, losses)
            if loop.stops():
                return
        if loop.evaluates():
            table, predictions = evaluate(ema.module, held_out, cfg, ranks)
            loop.record(table, predictions)


def summary() -> str:
    """Of each preset: parameters, and GFLOPs of one person, without the scans (2 per multiply-add)."""
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
    cfg, args = parse(Config, PRESETS, __doc__)
    if args.train:
        launch(train, cfg, args)
    else:
        print(f"{__doc__}\n{summary()}")


if __name__ == "__main__":
    run_main(main)
