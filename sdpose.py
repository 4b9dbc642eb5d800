"""SDPose: a text-to-image diffusion model as the backbone of a pose estimator (arXiv 2509.24980v1, 2025).

Idea     Stable Diffusion has seen pictures of every style. Its U-Net runs once on the latent of a person's
         crop: no noise, no text, no chain of steps. The map that one of its up blocks gives, the tap, feeds a
         small head that draws one heatmap per keypoint. In training the same U-Net also has to reproduce the
         latent of the clean crop, and a task code says which of the two it is to do: that keeps what it knows
         of pictures. Most of the gain on styles that are not in the training set comes from the start weights
         (10.8 AP on COCO-OOD), the RGB branch adds 1.0 (Table 4).
Flow                  t = 999, task code y ─► embedding ──┐ to every ResNet
                                                          ▼
         crop (B,3,H,W) ─► VAE.encode ─► z (B,4,h,w) ─► U-Net: down 0-3 ─► mid ─► up 0 ─► up 1 ─► up 2 ─► up 3
                           frozen                                                            tap = 2   tap = 3
         y = [1,0], pose   tap (B,C,h,w) ─► HeatmapHead ─► heatmaps (B,K,2h,2w) ─► udp_decode ─► keypoints
         y = [0,1], RGB    up 3 ─► norm, SiLU, convolution ─► latent of the clean crop, in training alone
t = 999  In pre-training z_t = √α_t z + √(1 − α_t) ε goes in, and its noise ε comes out; α_t is the product of
         all 1 − β_s up to t, DDPM's ᾱ_t. In fine-tuning, as in Lotus, the clean latent goes in and the answer
         itself comes out (Sec. 3.2, x0-prediction). No noise is added, so t carries no information: its
         embedding is a constant bias in every ResNet, which training adapts. The paper gives no reason for
         the last t; ours: there the input told the U-Net least about the picture, so that it had to rely most
         on what it knew. Latents have a deviation of about 1, as the noise has: a clean one is of the size
         that the first layer knows.
Codes    (our words) Heatmaps alone would let the U-Net forget whatever COCO's photos do not ask for. A
         second U-Net that reproduces pictures would remember it, but in weights that find no poses. So one
         U-Net does both, and the gradients of both tasks meet in its weights. Both start from the same z, so
         it must be told which answer is wanted. Prediction asks for the pose alone; the RGB branch costs
         nothing there.
Read     UNet → HeatmapHead → SDPose → udp_encode, udp_decode → criterion → average_heatmaps → augment → train
Letters  B crops  K keypoints  H, W crop  h, w = H/8, W/8 latent  2h, 2w heatmaps  C channels
         S views of a person: the disturbed crop and, where it is needed, the clean one
         E width of the embedding of time and task  t time step  y task code (C_Pose and C_RGB in the paper)
         f_θ the U-Net, with the head where y is C_Pose
         z_input, z_RGB latents of the disturbed and of the clean crop  H_Pose target heatmaps
Units    boxes are x1, y1, x2, y2 and keypoints x, y in pixels of the image, or of the crop where that is
         said; crops are RGB, uint8 until the network sees them in [-1, 1]; latents are times 0.18215;
         heatmaps have no unit, a perfect one peaks at 1, or a little below for a keypoint between cells
Cited    Version 1 of the paper numbers no formula: section and name are given, as in (Sec. 4.3, objective).
         Lotus (arXiv 2409.18124): dense prediction in one step of a diffusion model, whose protocol SDPose
         follows. UDP (arXiv 1911.07524): unbiased data processing, which measures sizes between the centres
         of pixels, W − 1 and not W. DARK (arXiv 1910.06278): keypoints between cells, by a Taylor expansion.
Tables   at the end of the main text: section → function, the rows of the paper's tables, departures from
         paper and release
Tiny     The default training starts from nothing. It has no prior, and by default no RGB branch either, which
         is there to keep the prior: --rgb_weight 0.1 adds it. The 4 numbers of a random VAE per 8 × 8 pixels
         say too little, so its encoder learns along with the pose branch (vae_along).
Memory   of tensors alone, computed by tests/test_sdpose.py for crops of 1024 × 768 and float32 weights:
         `body` predicts one crop and its mirror image in 5.5 GB, in bf16 4.6, and trains on one in 15.7 GB

    python sdpose.py                                    what each preset is: parameters, GFLOPs
    python sdpose.py --train                            learn puppets, synthetic people drawn on first use
    python sdpose.py --train --rgb_weight 0.1           the same with the RGB branch
    python sdpose.py --train --data data/coco --preset body --init stable-diffusion-2-base
    python sdpose.py --train --data data/coco --preset body --init_parts vae      without the prior (Table 4)
    python eval.py sdpose-body --images photo.jpg --detector detrpose-l
    python eval.py runs/<run> --data data/coco --split ood --boxes detections.json
"""
from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import common                               # first: Ctrl-C while torch loads then ends without a traceback
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageFilter
from scipy.special import ndtr, ndtri
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import draw, metrics, transforms, weights
from common.boxes import Boxes, Found, people_to_learn, true_boxes, whole_image
from common.cli import RunConfig, check_choice, check_range, resolve, run_method
from common.datasets import PoseDataset
from common.errors import UserError
from common.export import Exported
from common.oks import oks_nms, rescore
from common.predict import people_by_image, predict_people, train_loader
from common.ranks import (Ranks, autocast, distribute, gather_lists, init_ranks, mean_over_ranks,
                          rank_zero_first, say, seed_all, wait_for_all)
from common.records import Prediction, Sample
from common.run import Run, RunFolder, goes_on
from common.skeletons import Skeleton, get_skeleton, words
from common.splits import open_dataset, open_splits
from common.tables import Row, Table, run_tables
from data import puppets
from kernels.dispatch import plain

# ---- Configuration: every number of the paper. Each field is a flag, its comment the flag's help. --------


@dataclass(frozen=True)
class Config(RunConfig):       # which adds data, category, sigmas (of OKS, not of heatmaps), accum, amp, ...
    # model: the sizes of Stable Diffusion 2 (Sec. 5.1)
    channels: int = 320            # width of the U-Net's finest level; the others have 2, 4, 4 times as many
    head_dim: int = 64             # channels of an attention head; divides channels
    groups: int = 32               # groups of group norms
    text_dim: int = 1024           # width of the text embedding
    vae_channels: int = 128        # width of the VAE's finest level; the others have 2, 4, 4 times as many
    height: int = 1024             # of a person's crop, pixels (Sec. 5.1)
    width: int = 768               # of a person's crop, pixels (Sec. 5.1)
    keypoints: str = ""            # keypoint set, e.g. wholebody for 133; none: that of the data
    tap: int = 3                   # up block that the head reads (Sec. 4.1): 3, the last; 2 for 133 keypoints
    init: str = "stable-diffusion-2-base"  # start weights: folder of SD 2 or a release, its name, a run; "": none
    init_parts: str = "all"        # of them: all; vae: VAE and text alone, no prior for the U-Net (Table 4)
    # objective (Sec. 4.3; sigma and the clean target are the release's)
    pose_weight: float = 1.0       # weight of the heatmap loss
    rgb_weight: float = 1.0        # weight of the RGB branch's loss; 0: without the branch (Table 4)
    target: str = "clean"          # what the RGB branch has to give: clean, or the input itself (Fig. 2)
    sigma: float = 6.0             # of the heatmaps' Gaussians, in heatmap cells
    # augmentation (A.3; the numbers for half bodies, scaling and rotation are the release's)
    half_body: float = 0.3         # share of crops of half a body, for people with 9 labelled keypoints
    scaling: float = 0.5           # largest change of a crop's size, as a share of it
    rotation: float = 80.0         # largest rotation of a crop, degrees; 6 of 10 crops are rotated
    rectangle: float = 1.0         # share of crops with a black rectangle
    # optimisation (A.1: AdamW, epochs, batch, lr; the rest is that of Lotus)
    epochs: int = 40               # passes over the people
    batch: int = 128               # crops per optimiser step, over all GPUs and micro-batches
    lr: float = 3e-5               # learning rate
    weight_decay: float = 1e-2     # AdamW, on every parameter
    clip: float = 1.0              # largest L2 norm of the gradient
    checkpointing: bool = True     # forget activations of the U-Net and compute them again for the gradient
    # prediction (release)
    flip_test: bool = True         # average with the heatmaps of the mirrored crop
    sample: bool = False           # latents are samples of the posterior, by seed and box, not its mean
    # aids to learn from nothing and in little time: ours, not the paper's; its presets do without them
    vae_along: bool = False        # a random VAE's encoder learns with the pose branch
    cache_views: int = 0           # short trainings: number of views per person, encoded once; 0: always new
    people: int = 0                # trainings on few examples: number of people, drawn once; 0: all
    schedule: str = "constant"     # constant or cosine
    warmup: int = 0                # optimiser steps of linear warm-up

    def __post_init__(self):
        """Raises UserError for values that no run could use."""
        super().__post_init__()
        check_choice(self, init_parts=("all", "vae"), target=("clean", "input"),
                     schedule=("constant", "cosine"))
        check_range(self, 1, math.inf, "epochs batch channels head_dim groups text_dim vae_channels height "
                    "width")
        check_range(self, 1e-9, math.inf, "pose_weight lr clip")
        check_range(self, 0, math.inf, "rgb_weight cache_views people weight_decay warmup")
        for names, low, high in (("half_body rectangle", 0, 1), ("scaling", 0, 0.9), ("rotation", 0, 180),
                                 ("tap", 2, 3), ("sigma", 1e-9, 1e6)):
            check_range(self, low, high, names)
        if self.batch % self.accum:
            raise UserError(f"--batch {self.batch} does not split into {self.accum} micro-batches (--accum)")
        if self.vae_along and self.cache_views:
            raise UserError("--vae_along changes the latents as it learns: leave out --cache_views")
        if self.init_parts != "all" and not self.init:
            raise UserError(f"--init_parts {self.init_parts} takes a part of --init: name a folder or a "
                            "release there")
        for name, parts in dict(channels=math.lcm(2, self.head_dim, self.groups), vae_channels=self.groups,
                                height=8, width=8).items():          # a latent cell is 8 pixels wide
            if getattr(self, name) % parts:
                raise UserError(f"--{name} {getattr(self, name)} does not split: choose a multiple of "
                                f"{parts}")


BODY = Config(amp="bf16", eval_batch=8)
# Tiny: minutes on a laptop, from nothing. Gaussians fill few cells and the head starts near 0, so that with
# a pose_weight of 1 most gradients of the U-Net are at first smaller than AdamW's eps of 1e-8 (median 1e-9):
# it would hardly move. Gaussians have the same share of the crop as the release's. Crops are not rotated and
# hardly scaled: in trials of a few minutes, rotation and scaling cost AP.
PRESETS: dict[str, Config] = {
    "tiny": Config(channels=24, head_dim=24, groups=2, text_dim=64, vae_channels=4, height=128, width=96,
                   init="", pose_weight=50.0, rgb_weight=0.0, sigma=0.75, half_body=0.0, scaling=0.05,
                   rotation=0.0, rectangle=0.0, epochs=6, batch=16, lr=2e-3, checkpointing=False,
                   vae_along=True, schedule="cosine", warmup=30, amp="bf16", processes=2, workers=0,
                   eval_every=6, eval_batch=32),
    "body": BODY,
    "wholebody": replace(BODY, tap=2, keypoints="wholebody", epochs=42),
}

LATENT = 4                         # channels of a latent
LATENT_SCALE = 0.18215             # makes latents of photos have a deviation of about 1
TIME = 999                         # t, the one time step; the paper counts it as 1000
POSE, RGB = (1.0, 0.0), (0.0, 1.0)     # y, the task codes (Fig. 2, task labels)
TOP_DOWN = True                    # eval.py has to say where people are
AT_INFERENCE = ("flip_test", "sample", "seed", "amp")      # what its --set can change

# ---- The U-Net with a task code and a tap (Sec. 3.2, 4.1, 4.3) -------------------------------------------


def time_waves(t: Tensor, dim: int) -> Tensor:
    """[cos(t f), sin(t f)], frequencies f from 1 down to nearly 1/10000: (B,) → (B, dim), in float32."""
    half = dim // 2
    f = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * f
    return torch.cat([angle.cos(), angle.sin()], 1)


def task_waves(y: Tensor) -> Tensor:
    """[sin y, cos y] of task codes: (B, 2) → (B, 4). Here the sines come first, as released."""
    return torch.cat([y.float().sin(), y.float().cos()], 1)


class UNet(nn.Module):
    """Stable Diffusion 2's U-Net with a task embedding beside the time embedding, and a tap.

        z ─► conv_in ─► down 0 ─► down 1 ─► down 2 ─► down 3 ─► mid ─► up 0 ─► up 1 ─► up 2 ─► up 3
        keeps 1 map     3         3         3         2         takes 3        3       3 │     3 │
                                                                                   tap = 2   tap = 3

    The way down keeps 12 maps, and each layer of an up block takes one of them, the latest first.
    Channels are dim × (1, 2, 4, 4) from fine to coarse; each down block but the last halves the resolution,
    each up block but the last doubles it, so that up 2, too, gives a map of the latent's size: 2 dim
    channels of it. The head reads the last one for 17 keypoints and the second-to-last for 133 (Sec. 4.1).
    Text and time are there because the weights know them: the text is always the empty one, t always 999.
    """

    def __init__(self, dim: int, head_dim: int, groups: int, text_dim: int, checkpointing: bool):
        super().__init__()
        self.dim = dim
        self.conv_in = nn.Conv2d(LATENT, dim, 3, padding=1)
        # of time and task; the names are the release's
        self.time_embedding, self.class_embedding = MLP(dim, 4 * dim), MLP(4, 4 * dim)
        self.down_blocks, self.up_blocks, self.mid_block = unet_blocks(dim, head_dim, groups, text_dim,
                                                                       checkpointing)
        self.conv_norm_out = nn.GroupNorm(groups, dim, 1e-5)
        self.conv_out = nn.Conv2d(dim, LATENT, 3, padding=1)

    def embedding(self, y: Tensor, t: Tensor) -> Tensor:
        """Embedding of task codes (B, 2) at time steps (B,): (B, E). Waves are float32 in any case."""
        dtype = self.conv_in.weight.dtype
        return (self.time_embedding(time_waves(t, self.dim).to(dtype))
                + self.class_embedding(task_waves(y).to(dtype)))                  # Fig. 2, task labels

    def forward(self, z: Tensor, y: Tensor, text: Tensor, tap: int = 3, t: Tensor | None = None) -> Tensor:
        """Latents z (B, 4, h, w) → the map of up block `tap` (B, C, h, w) (Sec. 4.1, up block of the tap);
        later blocks are not run.

        y (1 or B, 2) task codes;  text (1 or B, n, text_dim);  t (1 or B,) time steps, by default 999; others
        are for comparisons with the release. One row serves all crops.
        """
        emb = self.embedding(y, torch.full((1,), TIME, device=z.device) if t is None else t)
        maps = [self.conv_in(z)]
        for block in self.down_blocks:
            maps += block(maps[-1], emb, text)
        x = self.mid_block(maps[-1], emb, text)
        for block in self.up_blocks[:tap + 1]:
            x = block(x, emb, text, maps)                      # takes maps from the end of the list
        return x

    def output(self, x: Tensor) -> Tensor:
        """The map of the last up block → latents (B, 4, h, w), the way out that pose does not take."""
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# ---- The heatmap head (Sec. 4.2) -------------------------------------------------------------------------


class HeatmapHead(nn.Module):
    """The tap (B, C, h, w) → heatmaps (B, K, 2h, 2w), unbounded.

    It takes the place of the U-Net's own last convolution, whose 4 channels cannot hold K ≫ 4 heatmaps
    (Sec. 4.2, bottleneck). Instance norms see the whole crop, at prediction too: results depend on what is
    around the person. The bias before the second norm changes nothing; it is there because the released
    files hold it. Start weights are normal with a deviation of 0.001, as in the release.
    """

    def __init__(self, dim: int, keypoints: int):
        super().__init__()
        self.deconv_layers = nn.Sequential(nn.ConvTranspose2d(dim, dim, 4, 2, 1, bias=False),
                                           nn.InstanceNorm2d(dim), nn.SiLU())
        self.conv_layers = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.InstanceNorm2d(dim), nn.SiLU())
        self.final_layer = nn.Conv2d(dim, keypoints, 1)
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.final_layer(self.conv_layers(self.deconv_layers(x)))


# ---- The model (Fig. 2 and 3) ----------------------------------------------------------------------------


class SDPose(nn.Module):
    """Crops → latents → heatmaps, and latents of clean crops: `encode`, `heatmaps` and `reconstruct`."""

    def __init__(self, cfg: Config, skeleton: Skeleton):
        super().__init__()
        self.cfg, self.skeleton = cfg, skeleton
        self.vae = VAE(cfg.vae_channels, cfg.groups).requires_grad_(False)
        self.unet = UNet(cfg.channels, cfg.head_dim, cfg.groups, cfg.text_dim, cfg.checkpointing)
        # the heatmap head has the release's name: it is not vae.decoder
        self.decoder = HeatmapHead(cfg.channels * 2 ** (3 - cfg.tap), skeleton.num_keypoints)
        # what the text encoder makes of the empty text's 2 tokens; until weights are loaded, some constant
        self.register_buffer("text", torch.arange(2.0 * cfg.text_dim).sin().view(1, 2, cfg.text_dim))

    def task(self, y: tuple[float, float]) -> Tensor:
        return torch.tensor([y], device=self.text.device)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Crops (B, 3, H, W) in [-1, 1] → mean and log variance of latents, (B, 4, h, w) each, not scaled."""
        # a few crops at a time, for memory: the figures are at `in_parts`
        mean, log_variance = in_parts(self.vae.encode, images, images.shape[2:].numel()).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Crops (B, 3, H, W) in [-1, 1] → z = 0.18215 · (mean + deviation · noise) (B, 4, h, w).

        noise: standard normal, (B, 4, h, w); none: z is the posterior's mean.
        """
        mean, log_variance = self.posterior(images)
        return LATENT_SCALE * (mean if noise is None else mean + (log_variance / 2).exp() * noise)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, 4, h, w) → crops (B, 3, H, W), to look at."""
        return in_parts(self.vae.decode, z / LATENT_SCALE, 8 * 8 * z.shape[2:].numel())     # cells of 8 × 8

    def heatmaps(self, z: Tensor) -> Tensor:
        """f_θ(z, t, C_Pose): latents (B, 4, h, w) → heatmaps (B, K, 2h, 2w) (Sec. 4.2)."""
        return self.decoder(self.unet(z, self.task(POSE), self.text, self.cfg.tap))

    def reconstruct(self, z: Tensor) -> Tensor:
        """f_θ(z, t, C_RGB): latents (B, 4, h, w) of disturbed crops → those of the clean ones, in one step,
        x̂_0 = g_θ(z_T) (Sec. 3.2, x0-prediction); z_T is z here, and g_θ is f_θ at the fixed t.
        """
        return self.unet.output(self.unet(z, self.task(RGB), self.text))

    def forward(self, z: Tensor, reconstruct: bool = True) -> dict[str, Tensor]:
        """Both tasks on the same latents: `heatmaps` and, unless switched off, `latents` of clean crops.

        Two passes give what one batch of both would, and the pose pass stops at its tap. The RGB pass does
        not move z where the VAE learns along: it would make latents easy to reconstruct, not good to have.
        """
        result = dict(heatmaps=self.heatmaps(z))
        return result | dict(latents=self.reconstruct(z.detach())) if reconstruct else result


# ---- Heatmaps: keypoints and back (Sec. 3.1, UDP; DARK) --------------------------------------------------


def keypoint_weights(keypoints: Tensor, labelled: Tensor, cfg: Config) -> Tensor:
    """(..., K): 1 for a labelled keypoint of which the heatmap shows anything, even if it is outside.

    keypoints (..., K, 2) in pixels of the crop; labelled (..., K): above 0 where they are.
    """
    weight = labelled > 0
    for axis, side in enumerate((cfg.width, cfg.height)):
        nearest = (keypoints[..., axis] * (side // 4 - 1) / (side - 1) + 0.5).trunc()
        weight = weight & (nearest >= -3 * cfg.sigma) & (nearest <= side // 4 - 1 + 3 * cfg.sigma)
    return weight.float()


def udp_encode(keypoints: Tensor, labelled: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """Keypoints (..., K, 2) in pixels of the crop → heatmaps (..., K, 2h, 2w) and weights (..., K).

        H_i(u, v) = exp(−((u − x_i)² + (v − y_i)²) / 2σ²)                          (Sec. 3.1, heatmap)

    (x_i, y_i) is keypoint i in cells: x times (2w − 1) / (W − 1), y times (2h − 1) / (H − 1), as crops and
    maps have the centres of their corner pixels and cells in the same places (UDP). As released it is 0
    beyond 3σ of the cell nearest to (x_i, y_i), in u or v. The largest value is below 1 where (x_i, y_i) lies
    between cells.
    """
    columns, rows = cfg.width // 4, cfg.height // 4                                         # 2w, 2h
    x = (keypoints[..., 0] * (columns - 1) / (cfg.width - 1))[..., None, None]              # (..., K, 1, 1)
    y = (keypoints[..., 1] * (rows - 1) / (cfg.height - 1))[..., None, None]
    u = torch.arange(columns, device=x.device)                                              # (2w,)
    v = torch.arange(rows, device=x.device)[:, None]                                        # (2h, 1)
    gaussians = torch.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * cfg.sigma ** 2))             # H_i(u, v)
    reach, weight = 3 * cfg.sigma, keypoint_weights(keypoints, labelled, cfg)
    near = ((u - (x + 0.5).trunc()).abs() <= reach) & ((v - (y + 0.5).trunc()).abs() <= reach)
    return gaussians * near * weight[..., None, None], weight


def blur(maps: Tensor) -> Tensor:
    """Gaussian of deviation 2 in 11×11 cells, zeros outside: (B, K, 2h, 2w)."""
    line = torch.exp(-torch.arange(-5.0, 6.0, device=maps.device) ** 2 / 8)
    line, flat = line / line.sum(), maps.flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(flat, line.view(1, 1, 1, 11), padding=(0, 5)), line.view(1, 1, 11, 1),
                    padding=(5, 0)).view_as(maps)


def udp_decode(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Heatmaps (B, K, 2h, 2w) → keypoints (B, K, 2) as fractions of the map, and their largest values (B, K).

        p = argmax_{u,v} H(u, v)                                                   (Sec. 3.1, argmax)
        p ← p − D⁻¹ ∇,    ∇ and D: first and second differences of L = log(blur(H)) at p             (DARK)

    L of a Gaussian is a parabola, whose top one such step finds from the cells around p. On noise it may
    lead far outside, as in the release. 0 is the centre of the first cell, 1 that of the last.
    Departs from the release: for a map of zeros it gives NaN; here that is a map without a positive value
    like others, p = (−1, −1).
    """
    count, height, width = maps.shape[1:]
    scores, cell = maps.flatten(2).max(-1)
    x, y = (torch.where(scores > 0, place, -1) for place in (cell % width, cell // width))   # p, (B, K) each
    smooth = blur(maps)
    peak = smooth.flatten(2).amax(-1)
    smooth = smooth * (scores / torch.where(peak == 0, 1, peak))[..., None, None]   # the height before blur
    # The padded maps of a crop are one array, as in the release: cell (x, y) of map k is at
    # k·(height + 2)·(width + 2) + (y + 1)·(width + 2) + x + 1. That matters beside p = (−1, −1) alone: there
    # neighbours are at the end of the map before, and for map 0 at the end of the last (%). 1e-3 and 50 are
    # the release's bounds.
    logs = F.pad(smooth.clamp(1e-3, 50).log().double(), (1, 1, 1, 1), mode="replicate").flatten(1)
    start = torch.arange(count, device=maps.device) * (height + 2) * (width + 2)

    def at(right: int, down: int) -> Tensor:
        """L beside p, (B, K)."""
        return logs.gather(1, (start + (y + 1 + down) * (width + 2) + x + 1 + right) % logs.shape[1])

    middle, eps = at(0, 0), torch.finfo(torch.float32).eps
    dx, dy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    dxx = at(1, 0) - 2 * middle + at(-1, 0) + eps
    dyy = at(0, 1) - 2 * middle + at(0, -1) + eps
    dxy = (at(1, 1) - at(1, 0) - at(0, 1) + 2 * middle - at(-1, 0) - at(0, -1) + at(-1, -1)) / 2
    determinant = dxx * dyy - dxy ** 2
    step = torch.stack([dyy * dx - dxy * dy, dxx * dy - dxy * dx], -1) / determinant[..., None]        # D⁻¹ ∇
    last = torch.tensor([width - 1, height - 1], device=maps.device)
    return (torch.stack([x, y], -1) - step) / last, scores


# ---- Losses (Sec. 4.3, objective) ------------------------------------------------------------------------
#
#     L = ‖z_RGB − f_θ(z_input, t, C_RGB)‖² + ‖H_Pose − f_θ(z_input, t, C_Pose)‖²
#
# here, with both weights 1 for the paper's models and m_k of `keypoint_weights`,
#
#     L = rgb_weight · mean((z_RGB − f_θ(z_input, t, C_RGB))²)
#         + pose_weight · mean(m_k · (H_Pose − f_θ(z_input, t, C_Pose))²)


def pose_loss(heatmaps: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """‖H_Pose − f_θ(z_input, t, C_Pose)‖² (Sec. 4.3, objective), as the mean over all cells of all
    keypoints, also of those of weight 0: heatmaps and target (B, K, 2h, 2w), weight m_k (B, K).
    """
    return (weight[..., None, None] * (heatmaps - target) ** 2).mean()


def rgb_loss(latents: Tensor, z_rgb: Tensor) -> Tensor:
    """‖z_RGB − f_θ(z_input, t, C_RGB)‖² (Sec. 4.3, objective), as a mean; (B, 4, h, w) twice."""
    return F.mse_loss(latents, z_rgb)


def criterion(output: dict[str, Tensor], z_rgb: Tensor, target: Tensor, weight: Tensor,
              cfg: Config) -> dict[str, Tensor]:
    """Weighted loss terms of both branches, to be summed, in float32 (Sec. 4.3, objective).

    output of SDPose.forward; z_rgb (B, 4, h, w); target and weight of udp_encode.
    Departs from the paper: it writes squared norms; here they are means, as in Lotus.
    """
    losses = dict(loss_pose=cfg.pose_weight * pose_loss(output["heatmaps"].float(), target, weight))
    if "latents" in output:
        # a VAE that learns can change the scale of z: dividing by its variance undoes that
        unit = latent_variance(z_rgb) if cfg.vae_along else 1.0
        losses["loss_rgb"] = cfg.rgb_weight * rgb_loss(output["latents"].float(), z_rgb) / unit
    return losses


# ---- Crops: from a person's box to the network's input (Sec. 3.1, UDP) -----------------------------------
#
#     box ─► 1.25 times as large ─► grown to the aspect W : H ─► rotated about its centre ─► scaled to W × H


def box_region(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (..., 4) → centre and size (..., 2) of what is cut out around them: 1.25 times the box."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) * 1.25


def fix_aspect(size: np.ndarray, cfg: Config) -> np.ndarray:
    """Widths and heights (..., 2), one of them grown to the aspect of the crop, and to at least a pixel."""
    width, height, aspect = size[..., 0], size[..., 1], cfg.width / cfg.height
    grown = np.stack([np.maximum(width, height * aspect), np.maximum(height, width / aspect)], -1)
    return np.maximum(grown, 1.0)


def udp_matrix(center: np.ndarray, size: np.ndarray, cfg: Config, degrees: float = 0.0) -> np.ndarray:
    """The 2×3 matrix from image to crop, R turns by some degrees, clockwise on the screen (Sec. 3.1, UDP).

        p ↦ s · (R (p − centre) + size / 2),    s = ((W − 1) / width, (H − 1) / height)

    width and height are those of `size`. The region's corners come to lie on the centres of the crop's corner
    pixels, not on their outer corners: so mirroring and scaling keep keypoints unbiased (UDP).
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotation = np.array([[cos, -sin], [sin, cos]])
    scale = np.array([cfg.width - 1, cfg.height - 1]) / size
    return scale[:, None] * np.c_[rotation, size / 2 - rotation @ center]


def to_tensor(crop: np.ndarray) -> Tensor:
    """(H, W, 3) → (3, H, W), uint8 as it is."""
    return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))


def normalise(crops: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1]."""
    return crops.float() / 255 * 2 - 1


def input_crop(image: Image.Image, box: np.ndarray, cfg: Config) -> Tensor:
    """What the network sees of the person in a box (4,), (3, H, W) uint8."""
    center, size = box_region(np.asarray(box, float))
    matrix = udp_matrix(center, fix_aspect(size, cfg), cfg)
    return to_tensor(transforms.warp_affine(np.asarray(image), matrix, (cfg.width, cfg.height)))


def sample_crop(cfg: Config, sample: Sample, box: np.ndarray) -> Tensor:
    return input_crop(sample.image, box, cfg)


# ---- Prediction (Sec. 4.4) -------------------------------------------------------------------------------


def average_heatmaps(model: SDPose, crops: Tensor, noise: Tensor | None = None) -> Tensor:
    """Heatmaps (B, K, 2h, 2w) of crops (B, 3, H, W) in [-1, 1], in one step, the task code that of pose
    (Sec. 4.4); with `flip_test` the mean of two views.

    The mirrored crops go into the same batch, their maps are mirrored back, left and right exchanged.
    noise: (B, 2, 4, h, w), for the crop and its mirror image; none: latents are means.
    """
    cfg, flip = model.cfg, model.skeleton.flip
    both = cfg.flip_test and flip is not None
    views = torch.cat([crops, crops.flip(3)]) if both else crops
    if noise is not None:
        noise = noise.transpose(0, 1).flatten(0, 1)[:len(views)].to(views)
    with autocast(crops.device, cfg.amp, keep_casts=False):      # no copies of weights in bf16: 1.7 GB less
        maps = model.heatmaps(model.encode(views, noise)).float()
    if not both:
        return maps
    straight, mirrored = maps.unflatten(0, (2, -1))
    return (straight + mirrored[:, list(flip)].flip(3)) / 2


def sampling_noise(boxes: np.ndarray, cfg: Config) -> Tensor | None:
    """Noise (B, 2, 4, h, w) for latents of boxes (B, 4); None where they are means.

    It depends on the seed and the box alone: a score does not change with the batch that the box is in.
    """
    if not cfg.sample:
        return None
    seeds = [zlib.crc32(np.float64([cfg.seed, *box]).tobytes()) for box in boxes]
    return torch.stack([torch.randn(2, LATENT, cfg.height // 8, cfg.width // 8,
                                    generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def poses(model: SDPose, crops: Tensor, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crops (B, 3, H, W) uint8 of boxes (B, 4) → keypoints (B, K, 2) in image pixels, and scores (B, K)."""
    crops = normalise(crops.to(model.text.device))     # not channels-last: on CPUs, norms are less exact then
    maps = average_heatmaps(model, crops, sampling_noise(boxes, model.cfg))
    places, scores = (x.cpu().numpy() for x in udp_decode(maps))
    center, size = box_region(boxes)
    size = fix_aspect(size, model.cfg)
    return places * size[:, None] + (center - size / 2)[:, None], scores


def finish(found: Prediction, model: SDPose) -> Prediction:
    """Scores of people, box score · mean of the keypoint scores above 0.2; of people that resemble each other
    (OKS over 0.9) the best alone is kept. OKS takes the area of the region that was cut out (release).
    """
    scores = rescore(found.scores, found.keypoint_scores)
    areas = fix_aspect(box_region(found.boxes)[1], model.cfg).prod(-1)
    keep = oks_nms(found.keypoints, scores, areas, model.skeleton.sigmas)
    return Prediction(found.image_id, found.keypoints[keep], found.keypoint_scores[keep], scores[keep],
                      found.boxes[keep])


def predict(model: SDPose, batch: dict) -> list[Prediction]:
    """People of a batch from `to_batch`: one Prediction per image, empty where there was no box."""
    people, rows, many = batch["people"], [], model.cfg.eval_batch
    for first in tqdm(range(0, len(people), many), "people", disable=len(people) <= many):
        ids, crops, boxes, scores = zip(*people[first:first + many])
        keypoints, certain = poses(model, torch.stack(crops), np.stack(boxes))
        rows += zip(ids, keypoints, certain, scores, boxes)
    found = people_by_image(rows, batch["image_ids"], model.skeleton.num_keypoints)
    return [finish(one, model) for one in found]


def evaluate(model: SDPose, data: PoseDataset, cfg: Config, ranks: Ranks,
             boxes: Boxes | None = None) -> tuple[dict, list[Prediction]]:
    """Metrics and predictions of a dataset, in the style of the training (Sec. 5.2) or in others (Sec. 5.3), of
    its annotated boxes unless others are given. Crops are shared among the processes, all get the result.
    Whole-body data have six evaluations.
    """
    found = predict_people(partial(poses, fuse(model)), data, boxes or true_boxes(data),
                           partial(sample_crop, model.cfg), cfg.eval_batch, cfg.workers, ranks)
    found = [finish(one, model) for one in found]
    return metrics.evaluate(found, data), found


# ---- Augmentation, in the order of the release (A.3) -----------------------------------------------------
# Keypoints of one person are (K, 3): x, y in pixels, visibility. Colour steps: uint8 (H, W, 3) in and out.


def mirror(image: np.ndarray, keypoints: np.ndarray, center: np.ndarray, flip: Sequence[int]) -> tuple:
    """Image, keypoints and centre of a region, left and right exchanged."""
    last = image.shape[1] - 1
    keypoints = keypoints[list(flip)]
    keypoints[:, 0] = last - keypoints[:, 0]
    return image[:, ::-1], keypoints, np.array([last - center[0], center[1]])


def half_body(keypoints: np.ndarray, skeleton: Skeleton, rng: np.random.Generator) -> tuple | None:
    """Centre and size of a region around the upper half (7 of 10 times) or the lower one. A half counts with
    at least 2 (upper) or 3 (lower) labelled keypoints; None where neither does, or fewer than 9 are labelled.
    """
    labelled = keypoints[:, 2] > 0
    sides = [[k for k in half if labelled[k]] for half in halves(skeleton)]
    sides = [side for side, least in zip(sides, (2, 3)) if len(side) >= least]
    if labelled.sum() < 9 or not sides:
        return None
    xy = keypoints[sides[0 if rng.random() < 0.7 else -1], :2]
    return xy.mean(0), np.ptp(xy, axis=0) * 1.5


def jitter_region(center: np.ndarray, size: np.ndarray, cfg: Config, rng: np.random.Generator) -> tuple:
    """Another centre and size, and degrees to turn by, from normal numbers truncated to [−1, 1]."""
    shift_x, shift_y, grow, turn = ndtri(rng.uniform(ndtr(-1), ndtr(1), 4))
    if rng.random() < 0.3:
        center = center + 0.16 * size * (shift_x, shift_y)
    return center, size * (1 + cfg.scaling * grow), cfg.rotation * turn * (rng.random() < 0.6)


def disturb(crop: np.ndarray, cfg: Config, rng: np.random.Generator) -> np.ndarray:
    """Box blur and median blur of 3, 5 or 7 pixels, one of 10 times each; a black rectangle inside.

    Departs from the paper: it blurs with Gaussians; the release, and we, with boxes.
    """
    picture = Image.fromarray(crop)
    if rng.random() < 0.1:
        picture = picture.filter(ImageFilter.BoxBlur(int(rng.integers(1, 4))))
    if rng.random() < 0.1:
        picture = picture.filter(ImageFilter.MedianFilter(2 * int(rng.integers(1, 4)) + 1))
    crop, sides = np.array(picture), crop.shape[:2]
    if rng.random() >= cfg.rectangle:
        return crop
    lengths = [int(side * rng.uniform(0.2, 0.4)) for side in sides]
    y, x = (int(rng.integers(0, side - length + 1)) for side, length in zip(sides, lengths))
    crop[y:y + lengths[0], x:x + lengths[1]] = 0
    return crop


def augment(image: np.ndarray, box: np.ndarray, keypoints: np.ndarray, skeleton: Skeleton, cfg: Config,
            rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A person → the crop that the network sees, the clean one, and the keypoints (K, 3) in both (A.3).

    The RGB branch has to give the clean crop, which is the one before `disturb`.
    """
    center, size = box_region(box)
    if skeleton.flip is not None and rng.random() < 0.5:
        image, keypoints, center = mirror(image, keypoints, center, skeleton.flip)
    if rng.random() < cfg.half_body:
        center, size = half_body(keypoints, skeleton, rng) or (center, size)
    center, size, degrees = jitter_region(center, size, cfg, rng)
    matrix = udp_matrix(center, fix_aspect(size, cfg), cfg, degrees)
    clean = photometric(transforms.warp_affine(image, matrix, (cfg.width, cfg.height)), rng)
    xy = transforms.move_points(keypoints[:, :2], matrix)
    return disturb(clean, cfg, rng), clean, np.c_[xy, keypoints[:, 2]].astype(np.float32)


class TrainCrops(torch.utils.data.Dataset):
    """One epoch of augmented people; item n is (crops (S, 3, H, W) uint8, keypoints (K, 3), image id, why
    files were skipped).

    S is 2, the network's input and the clean crop, or 1 where the clean one is not needed. What happens to
    person n depends on (seed, epoch, n) alone. A crop with too few keypoints is replaced by another person's,
    as is a file that cannot be read.
    """

    def __init__(self, data: PoseDataset, people: np.ndarray, cfg: Config, epoch: int):
        self.data, self.people, self.cfg, self.epoch = data, people, cfg, epoch

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, int | str, list[str]]:
        cfg, skipped, count = self.cfg, [], self.data.skeleton.num_keypoints
        enough = 8 if count == 133 else min(3, count)
        rng = np.random.default_rng([cfg.seed, self.epoch, n])
        for _ in range(100):
            number, person = self.people[n]
            sample, message = self.data.load(int(number))
            skipped += [message] if message else []
            n = int(rng.integers(len(self.people)))              # the replacement, if this crop is of no use
            if sample is None:
                continue
            image, box = np.asarray(sample.image), sample.boxes[person].clip(0, np.tile(sample.size, 2) - 1)
            crop, clean, moved = augment(image, box, sample.keypoints[person], self.data.skeleton, cfg, rng)
            keypoints = torch.from_numpy(moved)
            if keypoint_weights(keypoints[:, :2], keypoints[:, 2], cfg).sum() >= enough:
                crops = [crop, clean] if cfg.rgb_weight and cfg.target == "clean" else [crop]
                return torch.stack(list(map(to_tensor, crops))), keypoints, sample.image_id, skipped
        raise UserError("of 100 crops none shows enough keypoints to learn from: lower --scaling or "
                        "--rotation" + (f", repair {skipped[0]}" if skipped else ""))


# ---- Training (Sec. 4.3, A.1) ----------------------------------------------------------------------------


def choose_trainable(model: SDPose, cfg: Config) -> None:
    """The VAE is frozen, but for a random one's encoder with `vae_along`; weights behind the tap learn from
    the RGB branch alone, and without it stay as they are (Fig. 2, what is trained).
    """
    if cfg.vae_along:
        for part in (model.vae.encoder, model.vae.quant_conv):
            part.requires_grad_(True)
    if not cfg.rgb_weight:
        for part in (*model.unet.up_blocks[cfg.tap + 1:], model.unet.conv_norm_out, model.unet.conv_out):
            part.requires_grad_(False)


def build_optimizer(model: SDPose, cfg: Config) -> torch.optim.AdamW:
    """AdamW over all that learns: U-Net and heatmap head, and a random VAE's encoder."""
    group = dict(params=[p for p in model.parameters() if p.requires_grad], initial_lr=cfg.lr)
    return torch.optim.AdamW([group], lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def lr_scale(step: int, steps: int, cfg: Config) -> float:
    """Factor on the learning rate at an optimiser step out of `steps`."""
    scale = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    return scale * (0.5 + 0.5 * math.cos(math.pi * step / steps)) if cfg.schedule == "cosine" else scale


def crop_posteriors(model: SDPose, crops: Tensor) -> Tensor:
    """Crops (B, 3, H, W) uint8 → mean and log variance of their latents, behind one another (B, 8, h, w)."""
    images = normalise(crops.to(model.text.device, non_blocking=True))
    images = images.contiguous(memory_format=torch.channels_last)           # the fastest for training on CPUs
    with autocast(images.device, model.cfg.amp):
        return torch.cat(model.posterior(images), 1).float()


def training_latents(model: SDPose, views: Tensor) -> tuple[Tensor, Tensor]:
    """Samples of z_input and z_RGB, (B, 4, h, w) each, drawn from the VAE's posteriors as in Lotus.

    views: uint8 crops (B, S, 3, H, W), or posteriors (B, S, 8, h, w) that `cache_views` has kept. View 0 is
    the disturbed crop, the last one the clean crop; with S = 1 both are the same (Fig. 2, objective). Only a
    VAE that learns along gets a gradient, and from view 0 alone: the clean crop is a target.
    """
    if views.dtype == torch.uint8:
        posteriors = []
        for s, crops in enumerate(views.unbind(1)):
            with torch.set_grad_enabled(model.cfg.vae_along and s == 0):
                posteriors.append(crop_posteriors(model, crops))
        posteriors = torch.stack(posteriors, 1)                                              # (B, S, 8, h, w)
    else:
        posteriors = views.to(model.text.device)
    mean, log_variance = posteriors.chunk(2, 2)
    noise = torch.randn(mean.shape, device=mean.device)                                      # (B, S, 4, h, w)
    z = LATENT_SCALE * (mean + (log_variance / 2).exp() * noise)
    return z[:, 0].contiguous(memory_format=torch.channels_last), z[:, -1].detach()


def train(cfg: Config, args) -> None:
    """Train (A.1), evaluate, fill the run folder. Runs alone or under torchrun; Ctrl-C saves and leaves."""
    ranks = init_ranks(args.device, cfg)
    if cfg.vae_along and cfg.init and not (args.saved or weights.checkpoint_in(Path(cfg.init)).is_file()):
        raise UserError("--vae_along is for a random VAE, or that of a run: leave out --init, or add --no-vae_along")
    data, held_out = open_splits(cfg, ranks, cfg.keypoints or None)
    seed_all(cfg.seed)                                              # equal start weights on every process
    model = SDPose(cfg, data.skeleton)
    if cfg.init and not args.saved:
        with rank_zero_first(ranks):                                # it fetches start weights
            load_init(model, cfg.init, cfg.init_parts)
    choose_trainable(model, cfg)
    model.to(ranks.device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, cfg)
    fp16 = cfg.amp == "fp16" and ranks.device.type == "cuda"        # else the scaler is idle
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
    parts = dict(model=model, optimizer=optimizer, scaler=scaler)
    run = Run("sdpose", cfg, args, ranks, data, held_out, parts)
    train_set = data.training()
    people = people_to_learn(train_set, cfg.people, cfg.seed)
    crops_of = partial(TrainCrops, train_set, people, cfg)          # of an epoch, by its number
    if not (cfg.init or args.resume):                               # a random VAE: latents of deviation 1
        unit_latents(model, crops_of(0))
    if cfg.cache_views:                                             # posteriors in place of crops
        crops_of = encode_once(model, crops_of, cfg, ranks, run.folder)
    net = distribute(model, ranks)

    for epoch in run.epochs():
        net.train()
        # micro-batches: views (B, S, 3, H, W), a list of keypoints (K, 3); `run` keeps the other two columns
        for views, keypoints in run.batches(crops_of(epoch)):           # a resumed run goes on in mid-epoch
            factor = lr_scale(run.step, run.steps, run.cfg)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            keypoints = torch.stack(keypoints).to(ranks.device)
            target, weight = udp_encode(keypoints[..., :2], keypoints[..., 2], cfg)                # H_Pose

            z_input, z_rgb = training_latents(model, views)
            if run.first_batch:                                         # train_batch.png; views may be posteriors
                seen = views[:, 0] / 255 if views.dtype == torch.uint8 else model.decode(z_input) / 2 + 0.5
                run.show_batch(seen, keypoints)
            with autocast(ranks.device, cfg.amp):
                output = net(z_input, cfg.rgb_weight > 0)                          # both tasks, at t = 999
            losses = criterion(output, z_rgb, target, weight, cfg)
            scaler.scale(sum(losses.values()) / cfg.accum).backward()
            if run.more_micro_batches(losses):
                continue

            scaler.unscale_(optimizer)
            norm = clip_grad_norm_(model.parameters(), cfg.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if run.stepped(norm):                          # logs, saves when due; True: asked to stop
                return

        if run.evaluates():
            table, predictions = evaluate(model, held_out, cfg, ranks)
            run.record(table, predictions, f", {true_boxes(held_out)}")
            if run.last and cfg.data == "puppets":         # Sec. 5.3 in small
                compare_styles(model, table, run)


# ---- Tables ----------------------------------------------------------------------------------------------

EQUATIONS = {           # section and name of a formula, or section of the paper → where it stands here
    "Sec. 3.1, heatmap": udp_encode, "Sec. 3.1, argmax": udp_decode, "Sec. 3.1, UDP": udp_matrix,
    "Sec. 3.2, x0-prediction": SDPose.reconstruct, "Sec. 4.1, up block of the tap": UNet.forward,
    "Sec. 4.2, bottleneck": HeatmapHead, "Fig. 2, task labels": UNet.embedding,
    "Fig. 2, what is trained": choose_trainable, "Fig. 2, objective": training_latents,
    "Sec. 4.3, objective": criterion, "Sec. 4.3, objective, H_Pose": pose_loss,
    "Sec. 4.3, objective, z_RGB": rgb_loss, "Sec. 4.4": average_heatmaps, "Sec. 5.2": evaluate,
    "Sec. 5.3": evaluate, "A.1": train, "A.3": augment, "A.4, KS and OKS": metrics.evaluate,
}       # not used: Sec. 3.2, ε-prediction and clean latent, which show what SDPose leaves

# Rows of the paper's tables: what, AP in the paper, flags of the paper's preset, flags of the tiny preset;
# default: the paper's choice; versus: number of the row to compare with; missing: why it cannot be had on
# puppets. Tables 6, 7 and 9 repeat the AP of Tables 1, 2 and 3, and Table 8 that of Table 5, beside other
# methods and body parts. No table is about t. The paper's figures, but HumanArt's, are of a detector's boxes;
# a training evaluates with annotated ones, which is several points better. For figures of the paper's kind:
# python eval.py runs/<run> --data data/coco --boxes detections.json
SHORT = "--epochs 2"                # on puppets, where a row of six epochs would take a quarter of an hour
NO_PRIOR = "puppets have no Stable Diffusion to start from"
NO_FACE = "puppets have 17 keypoints"


def table_4(where: str, split: str, full: float, no_rgb: float, no_prior: float, why: str = "") -> Table:
    """A column of Table 4: AP of its three rows; `why` it cannot be had on puppets."""
    with_rgb, without = (None, None) if why else ("--rgb_weight 0.1", "--rgb_weight 0")
    return Table(f"Ablation on {where}, 17 keypoints", preset="body", metric="AP", split=split, puppets=SHORT, rows=[
        Row("SDPose", full, "", with_rgb, default=True, missing=why),
        Row("without RGB reconstruction (Sec. 4.3)", no_rgb, "--rgb_weight 0", without, versus=1,
            missing=why),
        Row("without diffusion priors: the U-Net from scratch", no_prior, "--init_parts vae", None, versus=1,
            missing=why or f"{NO_PRIOR}: the rows above are without that prior on puppets")])


TABLES = {
    "1": Table("COCO val, boxes of a detector", preset="body", metric="AP", rows=[
        Row("start weights of Stable Diffusion 2", 81.3, "", None, default=True, missing=NO_PRIOR),
        Row("start weights of Stable Diffusion 1.5", 81.2, "", None, versus=1,
            missing="not released, and its U-Net is another: text width 768, 8 heads everywhere")]),
    "2": Table("Styles that were not trained on", preset="body", metric="AP", split="ood", puppets=SHORT, rows=[
        Row("HumanArt val, true boxes: eval.py --data data/HumanArt", 71.2, "", None,
            missing="puppets are no works of art: their other styles stand in the next row"),
        Row("COCO-OOD: eval.py --data data/coco --split ood --boxes detections.json", 63.5, "",
            "--rgb_weight 0.1")]),
    "3": Table("COCO-OOD, 133 keypoints", preset="wholebody", metric="AP", split="ood", rows=[
        Row("SDPose, evaluated as in Table 2", 46.6, "", None, default=True, missing=NO_FACE)]),
    "4": table_4("COCO val", "val", full=81.3, no_rgb=80.8, no_prior=74.9),
    "4-humanart": table_4("HumanArt val", "ood", full=71.2, no_rgb=69.8, no_prior=53.8,
                          why="puppets are no works of art: see 4-ood"),
    "4-ood": table_4("COCO-OOD", "ood", full=63.5, no_rgb=62.5, no_prior=52.7),
    "5-body": Table("Up block that the head reads, 17 keypoints", preset="body", metric="AP",
                    puppets=f"{SHORT} --rgb_weight 0.1", rows=[
        Row("last", 81.3, default=True),
        Row("second-to-last", 81.1, "--tap 2", "--tap 2", versus=1)]),
    "5-wholebody": Table("The same, 133 keypoints", preset="wholebody", metric="AP", rows=[
        Row("last", 70.5, "--tap 3", None, versus=2, missing=NO_FACE),
        Row("second-to-last", 71.5, "", None, default=True, missing=NO_FACE)]),
}

# Departures. Each: what: paper | release | here | why. The release has no training code: of that, "release"
# is its data pipeline and its config, and "Lotus" the protocol that the paper follows.
#
# 1. From the paper, or where it is silent; "release" or "Lotus" in the third column: as it is there.
# Sec. 3.1, σ of the heatmaps: no value | 6 cells, cut off beyond 3σ | release | its weights need it
# Sec. 3.1, decoding: argmax, and UDP without a formula | DARK's step from the argmax | release | the same
# t: 1000 | 999, the last of 0 … 999 | release | its weights need it
# Sec. 4.2, start weights of the head: – | normal, deviation 0.001 | release | –
# Sec. 4.3, objective: squared norms, sum or mean unsaid, no weights | – | means, weights of 1 | Lotus
# Sec. 4.3, keypoints without a label: – | weight 0, but the mean counts their cells (config) | release | –
# Fig. 2, z_RGB: the input itself; Sec. 4.3: z_RGB beside z_input | the crop before blur and rectangle |
#     release, or --target input | its data pipeline keeps that crop for this branch
# latents in training: – | – | samples of the posterior | Lotus
# A.1, AdamW: rate and batch | – | decay 1e-2, clip 1, constant rate, no warm-up, checkpointing | Lotus
# precision: – | evaluates in bf16 | bf16, in training too (on GPUs) | Lotus trains in mixed precision
# A.3, photometric step: – | brightness, contrast, colours, order of channels | release but for hue, see 2 | –
# A.3, blur: Gaussian | box | release | –
# A.3, dropout (the black rectangle): up to one hole | always one | release | –
# A.3, crops with fewer than 3 keypoints, of 133 than 8: – | another person's crop | release | –
# Sec. 4.4, flip test, box · keypoint score, OKS-NMS at 0.9: – | yes | release | the figures are of that code
#
# 2. From the release.
# A.4, boxes on COCO and COCO-OOD: a detector's | the same | annotated ones after a training, a detector's
#     with eval.py --boxes | the file is not ours to distribute
# latents at prediction: – | samples, other ones each time | means, or with --set sample=true samples that
#     depend on seed and box | runs repeat, and a score does not depend on its batch
# decoding a map of zeros: – | NaN | as any map without a positive value, near cell (−1, −1) | finite
# hue in the photometric step: – | runs over the end of its scale | is a circle | –
# pixels of crops: – | OpenCV, weights in steps of 1/32 pixel | exact bilinear | simpler; 1 or 2 grey levels
# prediction on pictures: – | the demo stretches the bare box to the crop, no flip test | crop and flip test
#     of the evaluation | as in training
# the empty text: embedded | its encoder runs | its embedding, 2 tokens, is kept with the weights | no change
# Table 1, Stable Diffusion 1.5: yes | no weights | no | see TABLES

# ---- Appendix: borrowed parts, memory, aids, released files, pictures. Not needed on a first reading. ----

# Stable Diffusion 2's blocks. Modules have the names of the release, so that its files load as they are.


class ResNet(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm x)) + embedding))): (B, C_in, h, w) → (B, C_out, h, w).

    emb_dim: E, the width of the embedding of time and task; 0 in the VAE, which has none.
    """

    def __init__(self, dim_in: int, dim_out: int, groups: int, eps: float, emb_dim: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, dim_in, eps)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        if emb_dim:
            self.time_emb_proj = nn.Linear(emb_dim, dim_out)
        self.norm2 = nn.GroupNorm(groups, dim_out, eps)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = F.silu(self.norm2(h), inplace=True)
        h = self.conv2(h)
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """softmax(q·k / √d) v with M heads of d = C / M channels. N tokens, the cells of a map, (B, N, C) look at
    themselves, or at a context (1 or B, N', C').

    The scores (B, M, N, N') are never stored: at 1024x768 the finest level has N = 12288 tokens, 3 GB of
    scores. On a GPU, flash kernels end at d = 256: the VAE's one head of d = 512 takes PyTorch's
    memory-efficient kernel.
    """

    def __init__(self, dim: int, heads: int, context_dim: int, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim, dim, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (rearrange(project(tokens), "b n (m d) -> b m n d", m=self.heads) for project, tokens in
                   ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        x = F.scaled_dot_product_attention(q, k.expand(x.shape[0], -1, -1, -1), v.expand(x.shape[0], -1, -1, -1))
        return self.to_out(rearrange(x, "b m n d -> b n (m d)"))


class GEGLU(nn.Module):
    """a · GELU(b), where the first half of a projection is a and the second b: (…, C) → (…, D)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class TransformerLayer(nn.Module):
    """Tokens (B, N, C) look at each other, at the text, and each goes through a feed-forward network."""

    def __init__(self, dim: int, heads: int, text_dim: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1, self.attn2 = Attention(dim, heads, dim), Attention(dim, heads, text_dim)
        feed_forward = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))
        self.ff = nn.ModuleDict(dict(net=feed_forward))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff["net"](self.norm3(x))


class Transformer(nn.Module):
    """The cells of a map (B, C, h, w) as tokens of one TransformerLayer, added to the map."""

    def __init__(self, dim: int, heads: int, text_dim: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, dim, 1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = nn.ModuleList([TransformerLayer(dim, heads, text_dim)])
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        tokens = self.proj_out(self.transformer_blocks[0](tokens, text))
        return x + rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Half the resolution. The VAE pads on the right and below alone, the U-Net on all sides."""

    def __init__(self, dim: int, all_sides: bool):
        super().__init__()
        self.pad = (1, 1, 1, 1) if all_sides else (0, 1, 0, 1)
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class Upsample(nn.Module):
    """Nearest cells and a convolution: twice the resolution, or a size (h, w) of not quite twice."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size, mode="nearest"))


class Block(nn.Module):
    """One resolution: layers of a ResNet and perhaps an attention, then perhaps a change of resolution.

    checkpointing: forget a layer's activations and compute them again for the gradient.
    """

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], down: list[nn.Module] = [],
                 up: list[nn.Module] = [], checkpointing: bool = False):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(down), nn.ModuleList(up)
        self.checkpointing = checkpointing

    def layer(self, i: int, x: Tensor, emb: Tensor | None = None, text: Tensor | None = None,
              skip: Tensor | None = None) -> Tensor:
        """ResNet and attention i, after joining x with a map of the way down."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._layer, i, x, emb, text, skip, use_reentrant=False)
        return self._layer(i, x, emb, text, skip)

    def _layer(self, i: int, x: Tensor, emb: Tensor | None, text: Tensor | None,
               skip: Tensor | None) -> Tensor:
        x = self.resnets[i](x if skip is None else torch.cat([x, skip], 1), emb)
        return self.attentions[i](x, text) if i < len(self.attentions) else x

    def forward(self, x: Tensor, emb: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        """x (B, C, h, w); the VAE has neither embedding (1 or B, E) nor text (1 or B, n, text_dim)."""
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, text)
        for resize in (*self.downsamplers, *self.upsamplers):
            x = resize(x)
        return x


class DownBlock(Block):
    """Of the U-Net's way down: gives the maps of all of its layers, and the smaller one at its end."""

    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> list[Tensor]:
        maps = [x]
        for i in range(len(self.resnets)):
            maps.append(self.layer(i, maps[-1], emb, text))
        for resize in self.downsamplers:
            maps.append(resize(maps[-1]))
        return maps[1:]


class UpBlock(Block):
    """Of the U-Net's way up: each layer takes a map from the end of `maps`, those of the way down."""

    def forward(self, x: Tensor, emb: Tensor, text: Tensor, maps: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.layer(i, x, emb, text, maps.pop())
        for resize in self.upsamplers:
            x = resize(x, maps[-1].shape[2:])          # sides that 8 does not divide are not doubled exactly
        return x


class MLP(nn.Module):
    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim_in, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def unet_blocks(dim: int, head_dim: int, groups: int, text_dim: int,
                checkpointing: bool) -> tuple[nn.ModuleList, nn.ModuleList, Block]:
    """The U-Net's blocks: four of the way down, four of the way up, and the one in the middle."""
    resnet = partial(ResNet, groups=groups, eps=1e-5, emb_dim=4 * dim)

    def attend(width: int, count: int) -> list[Transformer]:
        return [Transformer(width, width // head_dim, text_dim, groups) for _ in range(count)]

    widths, before = (dim, 2 * dim, 4 * dim, 4 * dim), dim
    skips = [dim]                                              # channels of the maps that the way down keeps
    down_blocks, up_blocks = nn.ModuleList(), nn.ModuleList()
    for i, width in enumerate(widths):
        down = [Downsample(width, all_sides=True)] if i < 3 else []
        down_blocks.append(DownBlock([resnet(before, width), resnet(width, width)],
                                     attend(width, 2 if i < 3 else 0), down, checkpointing=checkpointing))
        before = width
        skips += [width] * (2 + len(down))
    mid_block = Block([resnet(before, before), resnet(before, before)], attend(before, 1),
                      checkpointing=checkpointing)
    for i, width in enumerate(reversed(widths)):
        resnets = []
        for _ in range(3):
            resnets.append(resnet(before + skips.pop(), width))
            before = width
        up_blocks.append(UpBlock(resnets, attend(width, 3 if i else 0),
                                 up=[Upsample(width)] if i < 3 else [], checkpointing=checkpointing))
    return down_blocks, up_blocks, mid_block


# Stable Diffusion's autoencoder: crops ↔ latents.


class PixelAttention(Attention):
    """One head over all cells of a map (B, C, h, w), added to it."""

    def __init__(self, dim: int, groups: int):
        super().__init__(dim, 1, dim, bias=True)
        self.group_norm = nn.GroupNorm(groups, dim, 1e-6)

    def forward(self, x: Tensor, text: None = None) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        return x + rearrange(super().forward(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class Encoder(nn.Module):
    """Crop (B, 3, H, W) → mean and log variance of its latent, before `VAE.quant_conv` (B, 8, H/8, W/8)."""

    def __init__(self, widths: tuple[int, ...], groups: int):
        super().__init__()
        resnet, last = partial(ResNet, groups=groups, eps=1e-6), widths[-1]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Block([resnet(before, width), resnet(width, width)], [],
                  down=[Downsample(width, all_sides=False)] if i < len(widths) - 1 else [])
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths)))
        self.mid_block = Block([resnet(last, last), resnet(last, last)], [PixelAttention(last, groups)])
        self.conv_norm_out = nn.GroupNorm(groups, last, 1e-6)
        self.conv_out = nn.Conv2d(last, 2 * LATENT, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latent after `VAE.post_quant_conv` (B, 4, h, w) → crop (B, 3, 8h, 8w)."""

    def __init__(self, widths: tuple[int, ...], groups: int):
        super().__init__()
        resnet, widths = partial(ResNet, groups=groups, eps=1e-6), widths[::-1]
        self.conv_in = nn.Conv2d(LATENT, widths[0], 3, padding=1)
        self.mid_block = Block([resnet(widths[0], widths[0]), resnet(widths[0], widths[0])],
                               [PixelAttention(widths[0], groups)])
        self.up_blocks = nn.ModuleList(
            Block([resnet(before, width), resnet(width, width), resnet(width, width)], [],
                  up=[Upsample(width)] if i < len(widths) - 1 else [])
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths)))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], 1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """What is 8 pixels wide and high becomes one cell of 4 numbers, and back."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        widths = (channels, 2 * channels, 4 * channels, 4 * channels)
        self.encoder, self.decoder = Encoder(widths, groups), Decoder(widths, groups)
        self.quant_conv = nn.Conv2d(2 * LATENT, 2 * LATENT, 1)
        self.post_quant_conv = nn.Conv2d(LATENT, LATENT, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Crops (B, 3, H, W) in [-1, 1] → mean and log variance of the posterior, together (B, 8, h, w)."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, 4, h, w), not scaled → crops (B, 3, H, W) of about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


# The VAE on large batches: its maps of full size need 0.4 GB for a crop of 1024 × 768, in float32.

PIXELS = 1024 * 768                # of crops that the VAE takes at once


def in_parts(run: Callable[[Tensor], Tensor], x: Tensor, pixels: int) -> Tensor:
    """run(x) with a few items at a time, each of so many pixels; all at once under POSE_KERNELS=plain.

    `body` predicts 4 crops of 1024 × 768 and their mirror images in 7.1 GB, all at once in 20.0 (float32, of
    tensors alone); in the same time: 1.09 times as fast for 4 crops of 192 × 256 on a CPU.
    """
    return run(x) if plain() else torch.cat(list(map(run, x.split(max(1, PIXELS // pixels)))))


# Aids to learn from nothing and in little time, see Config.


@torch.no_grad()
def unit_latents(model: SDPose, crops: TrainCrops) -> None:
    """Scale a random VAE so that latents have a deviation of 1, as Stable Diffusion's: weaker ones the
    U-Net hardly sees beside its biases.
    """
    some = torch.cat([crops[n][0] for n in range(min(64, len(crops)))])
    mean, _ = crop_posteriors(model, some).chunk(2, 1)
    scale = 1 / (LATENT_SCALE * mean.std())
    model.vae.quant_conv.weight[:LATENT] *= scale
    model.vae.quant_conv.bias[:LATENT] *= scale
    model.vae.post_quant_conv.weight /= scale


def latent_variance(z: Tensor) -> Tensor:
    """The unit of the RGB loss where the VAE learns along, and stretches latents as the pose branch likes:
    their variance over a micro-batch of all processes, at least 1e-3; with --accum 2 the unit is not that of
    the whole batch, so neither is the gradient. Latents of Stable Diffusion have a variance of about 1.
    """
    mean, square = mean_over_ranks(torch.stack([z.mean(), z.square().mean()]))
    return (square - mean ** 2).clamp(min=1e-3)


@torch.no_grad()
def encode_once(model: SDPose, crops_of: Callable[[int], TrainCrops], cfg: Config, ranks: Ranks,
                folder: RunFolder) -> Callable[[int], list]:
    """`crops_of` an epoch, with posteriors (S, 8, h, w) in place of crops: `cache_views` epochs in turn.

    At full size the frozen VAE costs more than the U-Net, and new augmentations would need it at every step;
    a number of views of each person is encoded once. Processes share the work, all keep all of it in memory.
    """
    views = [crops_of(view) for view in range(cfg.cache_views)]
    count, kept, cells = len(views[0]), len(views[0][0][0]), (cfg.height // 8, cfg.width // 8)
    size = len(views) * count * kept * 2 * LATENT * math.prod(cells) * 4 / 1e9
    say(f"encoding {len(views)} x {count} people once, {size:.1f} GB of memory")
    mine = list(range(ranks.rank, count, ranks.world))
    mine = [mine[first:first + cfg.eval_batch] for first in range(0, len(mine), cfg.eval_batch)]
    cached = []
    for number, view in enumerate(views, 1):
        posteriors = torch.zeros(count, kept, 2 * LATENT, *cells)
        labels, ids = torch.zeros(count, model.skeleton.num_keypoints, 3), []
        loader = train_loader(view, mine, cfg.workers, ranks)
        bar = tqdm(loader, f"view {number}/{len(views)}", disable=ranks.rank > 0)
        for rows, (crops, keypoints, images, skipped) in zip(mine, bar):
            encoded = crop_posteriors(model, crops.flatten(0, 1)).unflatten(0, crops.shape[:2])
            posteriors[rows], labels[rows] = encoded.cpu(), torch.stack(keypoints)
            ids += zip(rows, images)
            folder.bad_files(sum(skipped, []))
        posteriors, labels = (mean_over_ranks(part.to(ranks.device)).cpu() * ranks.world
                              for part in (posteriors, labels))    # the sum: others filled the rows of zeros
        ids = [image for _, image in sorted(gather_lists(ids))]
        cached.append(list(zip(posteriors, labels, ids, [[]] * count)))
    return lambda epoch: cached[epoch % len(cached)]


# Data: what A.3 does not mention.

UPPER = {"nose", "eye", "ear", "head", "neck", "shoulder", "elbow", "wrist"}
LOWER = {"hip", "knee", "ankle", "toe", "heel"}


def halves(skeleton: Skeleton) -> list[list[int]]:
    """Keypoints of the upper and of the lower half, by name; face, hands and what is unknown are in none."""
    return [[k for k, name in enumerate(skeleton.keypoints) if part & set(words(name))]
            for part in (UPPER, LOWER)]


def photometric(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation, hue and order of the channels of a crop (h, w, 3) uint8, each at
    times, as the release does it: contrast 1 time in 4, but then twice, before and after the colours.
    Hue is a circle here; the release lets it run over the end of its scale.
    """
    def scale(pixels: np.ndarray, factor: float, offset: float = 0.0) -> np.ndarray:
        return (pixels * factor + offset).clip(0, 255).astype(np.uint8)

    if rng.random() < 0.5:
        crop = scale(crop, 1, rng.uniform(-32, 32))
    contrast, colours = rng.random() < 0.25, rng.integers(4)            # nothing, saturation, hue, both
    if contrast:
        crop = scale(crop, rng.uniform(0.5, 1.5))
    if colours:
        h, s, v = np.array(Image.fromarray(crop).convert("HSV")).transpose(2, 0, 1)
        if colours != 2:
            s = scale(s, rng.uniform(0.5, 1.5))
        if colours != 1:
            h = (h + rng.uniform(-18, 18) * 256 / 180).astype(np.int64).astype(np.uint8)        # modulo 256
        crop = np.array(Image.merge("HSV", [Image.fromarray(x) for x in (h, s, v)]).convert("RGB"))
    if contrast:
        crop = scale(crop, rng.uniform(0.5, 1.5))
    return crop[..., rng.permutation(3)] if rng.random() < 0.5 else crop


# Building; released files: folders unet/, vae/, text_encoder/ and, but in Stable Diffusion's own, decoder/.


def build(preset: str, skeleton: str | Skeleton = "coco", **overrides) -> SDPose:
    """A model with random weights; overrides are Config fields."""
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(PRESETS)}")
    return SDPose(resolve(PRESETS[preset], **overrides), get_skeleton(skeleton))


def fuse(model: SDPose) -> SDPose:
    """Nothing to fuse: the model as it is, to predict with."""
    return model.eval()


def to_batch(pictures: list[Image.Image], image_ids: list, cfg: Config,
             boxes: list[Found] | None = None) -> dict:
    """RGB pictures and the people in each, (boxes (P, 4), scores (P,)) → what `predict` takes.

    Without boxes each picture as a whole is taken for one person.
    """
    boxes = boxes or [whole_image(picture.size) for picture in pictures]
    people = [(image_id, input_crop(picture, box, cfg), box, score) for picture, image_id, found
              in zip(pictures, image_ids, boxes) for box, score in zip(*found)]
    return dict(people=people, image_ids=image_ids)


def exported(model: SDPose) -> Exported:
    """What goes into the file of eval.py --export: no noise, latents are means."""
    def inputs(batch: dict) -> dict[str, Tensor]:
        return dict(crops=normalise(torch.stack([crop for _, crop, _, _ in batch["people"]])).contiguous())

    width, height = model.cfg.width, model.cfg.height
    return Exported(
        lambda crops: dict(heatmaps=average_heatmaps(model, crops)), inputs,
        before=f"crops: RGB, of one person each: the box enlarged 1.25 times and to {width}:{height} around its centre, "
               f"warped to {width} x {height} (UDP: corner pixels' centres on the region's corners); / 127.5, minus 1",
        after="keypoint k lies at the maximum of heatmaps[k] (DARK moves it by less than a cell); cell 0 is the left or "
              "top rim of the region, the last cell the right or bottom one; the maximum is the score")


RENAME = [(rf"^(vae\..*\.attentions\.0\.){theirs}\.", rf"\1{ours}.") for theirs, ours in    # before 2023
          dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0").items()]
STEMS = ("diffusion_pytorch_model", "decoder", "model", "pytorch_model")       # of files' names
EMPTY_TEXT = "empty_text.pt"       # beside the folders: 8 KB in place of a text encoder of 1.4 GB


def recognise(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(preset, number of keypoints) of a release, by its tensors; None for something else."""
    if not {"unet.conv_in.weight", "decoder.final_layer.weight"} <= state.keys():
        return None
    keypoints, width = state["decoder.final_layer.weight"].shape[:2]
    channels = len(state["unet.conv_in.weight"])
    return next(((name, keypoints) for name, cfg in PRESETS.items()
                 if (cfg.channels, cfg.channels * 2 ** (3 - cfg.tap)) == (channels, width)), None)


def convert_official(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Tensors of a release's folder under this file's names. Raises UserError for a head of another tap."""
    found = recognise(state)
    if found and PRESETS[found[0]].tap != config.tap:
        raise UserError(f"these weights have a head for {found[1]} keypoints that reads up block "
                        f"{PRESETS[found[0]].tap}, not {config.tap}: choose --preset {found[0]}")
    return {name: value.flatten(1) if re.search(r"^vae\..*\.to_(q|k|v|out\.0)\.weight$", name) else value
            for name, value in weights.rename(state, RENAME).items()}


def load_init(model: SDPose, source: str, parts: str = "all") -> None:
    """Start weights: a folder of Stable Diffusion 2 or of a release, a release's name, a run with its own VAE.

    Without task embedding or head in it, these stay random; with parts="vae" U-Net and head do. UserError."""
    path, release = weights.checkpoint_in(Path(source)), weights.RELEASES.get(source)
    if not path.exists() and (release is None or release.method != "sdpose"):
        raise UserError(f"--init: there is no folder {source}: put Stable Diffusion 2 there (unet/, vae/, "
                        "text_encoder/), or name sdpose-body or a run; --init '' starts from nothing")
    start = weights.read_start(source, "sdpose")
    state = convert_official(start.state or read_release(start.path, head=False), model.cfg)
    if parts == "vae":
        state = {name: value for name, value in state.items() if name.startswith(("vae.", "text"))}
    random = ["unet."] * (parts == "vae") or ["unet.class_embedding."]
    random = [part for part in (*random, "decoder.") if not any(name.startswith(part) for name in state)]
    weights.load_start(model, start, state, {r"^decoder\.final_layer\.": 0}, {f"^{part}": "new" for part in random})


def read_release(folder: str | Path, head: bool = True) -> dict[str, Tensor]:
    """The tensors of a release's folder as unet.*, vae.*, decoder.* (the heatmap head) and text.

    head: whether decoder/ must be there; a folder of Stable Diffusion has none.
    Raises UserError for a file that is missing or cut short.
    """
    folder, state = Path(folder), {}
    for part in ("unet", "vae", "decoder"):
        file = release_file(folder, part)
        if file is not None:
            state |= {f"{part}.{name}": value for name, value in weights.load_tensors(file).items()}
        elif head or part != "decoder":
            wanted = f"{part}/{STEMS[part == 'decoder']}.safetensors"
            raise UserError(f"{folder} has no {wanted}: a release has the folders unet, vae, text_encoder "
                            "and decoder; fetch that file again")
    return state | dict(text=empty_text(folder))


def release_file(folder: Path, part: str) -> Path | None:
    """The file with a part's weights, or its shards' name: .safetensors before .bin, full precision before half; or None."""
    endings = [variant + suffix for suffix in (".safetensors", ".bin") for variant in ("", ".fp16")]
    files = (folder / part / f"{stem}{ending}" for ending in endings for stem in STEMS)
    return next((file for file in files if file.is_file() or Path(f"{file}.index.json").is_file()), None)


def empty_text(folder: Path) -> Tensor:
    """The embedding (1, 2, C) of "": a start and an end, no padding; computed once for each folder.

    Raises UserError where neither the embedding nor a text encoder is there.
    """
    kept = folder / EMPTY_TEXT
    if kept.is_file():
        return weights.load_tensors(kept)["text"]
    file = release_file(folder, "text_encoder")
    if file is None:
        raise UserError(f"{folder} has no text_encoder/model.safetensors and no {EMPTY_TEXT} that was made "
                        "of it: put either there; it is needed once, for the embedding of the empty text")
    state = {name: value.float() for name, value in weights.load_tensors(file).items()
             if value.is_floating_point()}
    try:
        vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
        text = encode_text(state, torch.tensor([[vocabulary - 2, vocabulary - 1]]), max(1, width // 64))
    except KeyError as missing:
        raise UserError(f"{file} is no CLIP text encoder: it has no {missing}") from None
    with goes_on(kept):
        weights.save_checkpoint(kept, dict(text=text))
    return text


def encode_text(state: dict[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """CLIP's text encoder by the tensors of its file: word ids (B, n) → normalised last state (B, n, C).

    Layers of causal attention and an MLP with exact GELU, norms first. Raises KeyError for a missing tensor.
    """
    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    embeddings, layers = "text_model.embeddings", "text_model.encoder.layers"
    x = state[f"{embeddings}.token_embedding.weight"][ids]
    x = x + state[f"{embeddings}.position_embedding.weight"][:ids.shape[1]]
    for n in range(len({name.split(".")[3] for name in state if name.startswith(f"{layers}.")})):
        layer = f"{layers}.{n}"
        h = norm(x, f"{layer}.layer_norm1")
        q, k, v = (rearrange(linear(h, f"{layer}.self_attn.{name}_proj"), "b n (m d) -> b m n d", m=heads)
                   for name in "qkv")
        h = rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "b m n d -> b n (m d)")
        x = x + linear(h, f"{layer}.self_attn.out_proj")
        h = F.gelu(linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1"))
        x = x + linear(h, f"{layer}.mlp.fc2")
    return norm(x, "text_model.final_layer_norm")


# Pictures: what the two branches see, and the puppets' other styles.


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] → a picture, small ones enlarged."""
    picture = Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy())
    zoom = max(1, 384 // picture.height)
    return picture.resize((zoom * picture.width, zoom * picture.height))


@torch.no_grad()
def show_process(model: SDPose, image: Image.Image, threshold: float,
                 boxes: Found | None = None) -> dict[str, list[Image.Image]]:
    """For eval.py --process, a row per person: `heatmaps`, the crop and the heatmaps of all keypoints over
    it; `rgb`, if that branch was trained, the crop, what the branch makes of it, what the VAE alone would.
    """
    heatmaps, rgb = [], []
    for _, crop, box, _ in to_batch([image], [""], model.cfg, boxes and [boxes])["people"]:
        crops = normalise(crop[None].to(model.text.device))
        maps = average_heatmaps(model, crops, sampling_noise([box], model.cfg))
        seen = to_picture(crops[0])
        heatmaps += [seen, draw.draw_heat(seen, maps[0].amax(0).cpu().numpy())]
        if model.cfg.rgb_weight:
            z = model.encode(crops)
            rgb += [seen, *(to_picture(model.decode(x)[0]) for x in (model.reconstruct(z), z))]
    note = "" if model.cfg.rgb_weight else "; no picture of the RGB branch, which was never trained"
    return {name: [draw.captioned(draw.contact_sheet(tiles, columns), text)] for name, tiles, columns, text in
            (("heatmaps", heatmaps, 2, f"a crop, the heatmaps of all keypoints over it{note}"),
             ("rgb", rgb, 3, "a crop, the RGB branch's picture of it, the VAE's alone")) if tiles}


def compare_styles(model: SDPose, table: dict, run: Run) -> None:
    """After a training on puppets: the metrics on the same puppets in styles never seen, in log.jsonl as
    `AP_ood` and so on, and styles.png.
    """
    with rank_zero_first(run.ranks):                     # it draws them
        unseen = open_dataset("puppets", "ood", run.held_out.skeleton)
    tables = {"val": table, "ood": evaluate(model, unseen, model.cfg, run.ranks)[0]}
    say(f"puppets, and the same in styles never seen\n{metrics.format_table(tables)}")
    run.folder.log(step=run.step, epoch=run.at["epoch"], **{f"{k}_ood": v for k, v in tables["ood"].items()})
    if run.ranks.rank == 0 and run.held_out.skeleton.name == "coco":   # others have no pictures of two styles
        with goes_on(run.folder.path / "styles.png"):
            show_styles(model, run.held_out).save(run.folder.path / "styles.png")
    wait_for_all()                                       # drawing may take longer than the --patience of a step


def show_styles(model: SDPose, val: PoseDataset, rows: int = 6) -> Image.Image:
    """Puppets in the style of the training set and in four that were never seen, with the poses found."""
    tiles, boxes = [], true_boxes(val)
    for i in [i for i in range(len(val)) if len(boxes.of(val[i].image_id)[1])][:rows]:
        sample, people = val.load(i)[0], boxes.of(val[i].image_id)
        for picture in [sample.image, *puppets.restyle(i)] if sample else []:
            found = predict(model, to_batch([picture], [i], model.cfg, [people]))[0]
            tiles.append(draw.draw_people(picture, found.keypoints, found.keypoint_scores, model.skeleton))
    return draw.contact_sheet(tiles, 5)


def flops(cfg: Config, skeleton: Skeleton) -> dict[str, float]:
    """FLOPs of one crop, 2 per multiply-add: `encode` it, `pose` branch. Nothing is computed."""
    counts = {}
    with torch.device("meta"), torch.no_grad():
        model = SDPose(replace(cfg, checkpointing=False), skeleton)
        crop = torch.zeros(1, 3, cfg.height, cfg.width)
        for name, run in dict(encode=model.encode, pose=model.heatmaps).items():
            x = crop if name == "encode" else torch.zeros(1, LATENT, cfg.height // 8, cfg.width // 8)
            with FlopCounterMode(display=False) as counter:
                run(x)
            counts[name] = counter.get_total_flops()
    return counts


def summary() -> str:
    """Of each preset: parameters, and GFLOPs of one crop without its mirror image."""
    rows = [f"{'preset':12}{'input':>10}{'keypoints':>11}{'parameters':>13}{'learned':>11}{'GFLOPs':>9}"
            f"{'of VAE':>9}"]
    for preset, cfg in PRESETS.items():
        skeleton = get_skeleton(cfg.keypoints or "coco")
        with torch.device("meta"):                                      # shapes without numbers
            model = SDPose(cfg, skeleton)
        choose_trainable(model, cfg)
        parameters = list(model.parameters())
        every, learned = (sum(p.numel() for p in some) / 1e6 for some in
                          (parameters, [p for p in parameters if p.requires_grad]))
        cost = flops(cfg, skeleton)
        encode, pose = cost["encode"] / 1e9, cost["pose"] / 1e9
        rows.append(f"{preset:12}{f'{cfg.width}x{cfg.height}':>10}{skeleton.num_keypoints:>11}"
                    f"{every:>11.2f} M{learned:>9.2f} M{encode + pose:>9.1f}{encode:>9.1f}")
    return "\n".join(rows)


def main() -> None:
    run_method(Config, PRESETS, __doc__, train, summary, partial(run_tables, TABLES))


if __name__ == "__main__":
    main()
