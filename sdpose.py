"""SDPose: a text-to-image diffusion model as the backbone of a pose estimator (arXiv 2509.24980, 2025).

Idea     Stable Diffusion has seen pictures of every style. Its U-Net runs once on the latent of a person's crop: no
         noise, no text, no chain of steps. What an up block gives feeds a small head that draws one heatmap per
         keypoint. While it learns, the same U-Net also has to reproduce the clean crop, told by a task code which of
         the two it is doing: so it keeps what it knows of pictures that are not in the training set.
Flow     crop (B,3,H,W) → VAE.encode → latent z (B,4,h,w), frozen
         pose [1,0]   z → UNet up to its feature tap (B,C,h,w) → HeatmapHead → heatmaps (B,K,2h,2w) → keypoints
         RGB  [0,1]   z → whole UNet → latent of the clean crop (B,4,h,w), in training alone
Read     Block, VAE → UNet.forward → HeatmapHead → SDPose → udp_matrix → augment → udp_encode → udp_decode
         → criterion → average_heatmaps → batch_losses → train
Letters  B crops  K keypoints  H, W crop  h, w = H/8, W/8 latent  N = h·w tokens  C channels  M heads  E width of the
         embedding of time and task  t = 999 the one time step  y the task code
Units    boxes are x1, y1, x2, y2 and keypoints x, y in pixels of the image, or of the crop where that is said; crops
         are RGB, uint8 until the network sees them in [-1, 1]; latents are times 0.18215; heatmaps have no unit, a
         perfect one peaks at 1
Departs  from the paper, as the release does, because the released weights need it:
         time        t is 999, the paper writes 1000 (UNet)
         features    the map of one up block, not several: the last for a body, the last but one for 133 keypoints
         Figure 2    draws the latent of the clean crop as input of the RGB task; its equation and ours take the
                     disturbed one
Departs  from the release:
         latents     the mean of the VAE's posterior; the release draws a sample at test time too, so that its results
                     change from run to run (SDPose.latents)
         text        the embedding of the empty text is stored with the weights, the text encoder is read once
         training    the release has none: ours follows the paper, and Lotus where it is silent (batch_losses); its
                     augmentations are those of the release (augment), but hue is a circle (transforms.photometric)
Tiny     has no Stable Diffusion to start from, and the 4 numbers per 8 × 8 pixels of a random VAE say too little: its
         encoder learns along with the pose branch (`vae_along`), from latents of deviation 1 (unit_latents), whose
         variance of the moment is the unit of the RGB loss (criterion). Gaussians have the paper's share of the crop;
         crops are not turned and hardly scaled, which in trials of a few minutes cost AP
Memory   of tensors alone, computed by tests/test_sdpose.py for crops of 1024x768 and float32 weights: `body`
         predicts one crop and its mirror image in 5.0 GB, in bf16 4.4, and trains a batch of one in 15.7 GB

    python sdpose.py                                    what each preset is: parameters, GFLOPs
    python sdpose.py --train                            learn the embedded puppets on this machine
    python sdpose.py --train --rgb_weight 0             without the RGB branch: an ablation of the paper
    python sdpose.py --train --data data/coco --preset body --init stable-diffusion-2-base
    python eval.py sdpose-body --images photo.jpg --detector runs/detrpose/best.pt      with people found by another
    python eval.py runs/<run> --data data/coco --split ood --boxes detections.json
"""
import math
import time
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageFilter
from scipy.special import ndtr, ndtri
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import draw, metrics, stable_diffusion, transforms, weights
from common.boxes import Boxes, Found, people_to_learn, true_boxes, whole_image
from common.cli import check_choice, check_range, launch, parse, resolve, run_main
from common.datasets import PoseDataset
from common.errors import UserError
from common.oks import oks_nms, rescore
from common.predict import people_by_image, predict_people, train_loader
from common.ranks import AMP, Ranks, autocast, distribute, gather_lists, init_ranks, mean_over_ranks, micro_batch, rank_zero_first, seed_all
from common.records import Prediction, Sample
from common.run import Loop, RunFolder, check_finite, goes_on
from common.splits import open_dataset, open_splits
from common.skeletons import Skeleton, get_skeleton, halves

# ---- Configuration: every number of the paper. Each field is a flag, its comment the flag's help. -----------


@dataclass(frozen=True)
class Config:
    # model: Stable Diffusion 2's sizes
    channels: int = 320            # width of the U-Net's finest level; the others have 2, 4 and 4 times as many
    head_dim: int = 64             # channels of an attention head; divides channels
    groups: int = 32               # groups of group norms
    text_dim: int = 1024           # width of the text embedding
    vae_channels: int = 128        # width of the VAE's finest level; the others have 2, 4 and 4 times as many
    height: int = 1024             # of a person's crop, pixels
    width: int = 768               # of a person's crop, pixels
    tap: int = 3                   # up block whose output the heatmap head reads: 3, the last, or 2 for 133 keypoints
    checkpointing: bool = True     # forget activations of the U-Net and compute them again for the gradient
    init: str = "stable-diffusion-2-base"  # start weights: folder of SD 2 or of a release, or its name; "": random
    # training step (Sec. 3, A.3)
    pose_weight: float = 1.0       # of the heatmap loss
    rgb_weight: float = 1.0        # of the RGB branch; 0: without it (ablation)
    target: str = "clean"          # what the RGB branch has to give: the clean crop, or the input itself (Fig. 2)
    sigma: float = 6.0             # of the Gaussians, in heatmap cells
    half_body: float = 0.3         # share of crops that show the upper or lower half alone
    scaling: float = 0.5           # crops get up to that much smaller or larger
    rotation: float = 80.0         # and are turned by up to that many degrees, 6 of 10
    rectangle: float = 1.0         # share of crops with a black rectangle
    # training from nothing, and in little time
    vae_along: bool = False        # the VAE's encoder learns with the pose branch, where there is none to start from
    cache_views: int = 0           # encode so many augmented views of each person once; 0: new views at every step
    people: int = 0                # learn from so many people, drawn once; 0: from all
    # optimisation (A.2)
    epochs: int = 40               # passes over the people
    batch: int = 128               # crops per optimiser step, over all GPUs and micro-batches
    accum: int = 1                 # micro-batches per optimiser step
    lr: float = 3e-5               # learning rate
    weight_decay: float = 1e-2     # AdamW, on every parameter
    schedule: str = "constant"     # constant or cosine
    warmup: int = 0                # optimiser steps of linear warm-up
    clip: float = 1.0              # largest L2 norm of the gradient
    amp: str = "bf16"              # no, bf16 or fp16 (old GPUs); a CPU always runs float32
    # prediction
    flip_test: bool = True         # average with the heatmaps of the mirrored crop
    sample: bool = False           # latents are samples of the posterior, as in the release, not its mean
    # files and machine
    data: str = "puppets"          # puppets (made on first use) or a folder in COCO layout
    keypoints: str = ""            # keypoint set, e.g. wholebody for 133; none: that of the data
    sigmas: str = ""               # OKS sigmas of your own keypoints, e.g. 0.03,0.08,0.08
    processes: int = 1             # training processes when there is no GPU and no torchrun
    workers: int = 4               # image loading processes per GPU; 0: none
    eval_every: int = 1            # epochs between evaluations
    eval_batch: int = 8            # crops per evaluation batch; the mirrored ones come on top
    seed: int = 0                  # all random numbers follow from it

    def __post_init__(self):
        """Raises UserError for values that no run could use."""
        check_choice(self, target=("clean", "input"), schedule=("constant", "cosine"), amp=AMP)
        check_range(self, 1, math.inf, "epochs batch accum processes eval_every eval_batch "
                            "channels head_dim groups text_dim vae_channels height width")
        check_range(self, 1e-9, math.inf, "pose_weight sigma lr clip")
        check_range(self, 0, math.inf, "rgb_weight cache_views people weight_decay warmup "
                            "workers seed")
        for names, low, high in (("half_body rectangle", 0, 1), ("scaling", 0, 0.9), ("rotation", 0, 180), ("tap", 2, 3)):
            check_range(self, low, high, names)
        if self.batch % self.accum:
            raise UserError(f"--batch {self.batch} does not split into {self.accum} micro-batches (--accum)")
        if self.vae_along and (self.init or self.cache_views):
            raise UserError("--vae_along is for a random VAE, whose latents change as it learns: leave out --init "
                                    "and --cache_views")
        for name, parts in dict(channels=math.lcm(self.head_dim, self.groups), vae_channels=self.groups,
                                height=8, width=8).items():          # a latent cell is 8 pixels wide
            if getattr(self, name) % parts:
                raise UserError(f"--{name} {getattr(self, name)} does not split: choose a multiple of "
                                        f"{parts}")


PRESETS: dict[str, Config] = {
    "tiny": Config(channels=24, head_dim=24, groups=2, text_dim=64, vae_channels=4, height=128, width=96,
                   checkpointing=False, init="", pose_weight=50.0, rgb_weight=0.0, sigma=0.75, half_body=0.0,
                   scaling=0.05, rotation=0.0, rectangle=0.0, vae_along=True, epochs=6, batch=16, lr=2e-3,
                   schedule="cosine", warmup=30, processes=2, workers=0, eval_every=6, eval_batch=32),
    "body": Config(),
    "wholebody": Config(tap=2, keypoints="wholebody"),
}

LATENT = 4                         # channels of a latent
LATENT_SCALE = 0.18215             # makes latents of photos have a deviation of about 1
TIME = 999                         # t, the one time step: "pure noise" for a diffusion model
POSE, RGB = (1.0, 0.0), (0.0, 1.0)     # y, the task codes

# ---- Parts of both the VAE and the U-Net --------------------------------------------------------------------
# The names of modules are those of the release, so that its files load as they are.


class ResNet(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm x)) + embedding))): (B, C_in, h, w) → (B, C_out, h, w).

    emb_dim: E, the width of the embedding of time and task that is added in between; 0 in the VAE, which has none.
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
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.norm2(h)                  # one line each: at full size every map that waits takes 0.4 GB
        h = F.silu(h)
        h = self.conv2(h)
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """softmax(q·k / √d) v over M heads: tokens (B, N, C) look at themselves, or at a context (1 or B, N', C').

    The scores (B, M, N, N') are never stored: at 1024x768 the finest level has N = 12288 tokens, 3 GB of scores. On a
    GPU, flash kernels end at d = 256: the VAE's one head of d = 512 takes PyTorch's memory-efficient kernel.
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
        x = F.scaled_dot_product_attention(q, k.expand(len(x), -1, -1, -1), v.expand(len(x), -1, -1, -1))
        return self.to_out(rearrange(x, "b m n d -> b n (m d)"))


class Downsample(nn.Module):
    """Half the resolution. The VAE pads on the right and below alone, the U-Net on all sides."""

    def __init__(self, dim: int, all_sides: bool):
        super().__init__()
        self.pad = (1, 1, 1, 1) if all_sides else (0, 1, 0, 1)
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class Upsample(nn.Module):
    """Nearest cells and a convolution: twice the resolution, or a size (h, w) that is not quite twice as large."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size, mode="nearest"))


class Block(nn.Module):
    """One resolution: layers of a ResNet and perhaps an attention, then perhaps a change of resolution."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], down: list[nn.Module] = [],
                 up: list[nn.Module] = []):
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.downsamplers, self.upsamplers = nn.ModuleList(down), nn.ModuleList(up)

    def layer(self, i: int, x: Tensor, emb: Tensor, text: Tensor, skip: Tensor | None = None) -> Tensor:
        """ResNet and attention i of the U-Net, after joining x with a map of the way down."""
        x = self.resnets[i](x if skip is None else torch.cat([x, skip], 1), emb)
        return self.attentions[i](x, text) if i < len(self.attentions) else x

    def steps(self) -> list[nn.Module]:
        """All of its modules one after the other, as the VAE runs them."""
        steps = []
        for i, resnet in enumerate(self.resnets):
            steps += [resnet, *self.attentions[i:i + 1]]
        return [*steps, *self.downsamplers, *self.upsamplers]


def run_blocks(blocks: list[Block], x: Tensor) -> Tensor:
    """Step by step in one frame: the map before a step, 0.4 GB at full size, goes as soon as the step is done."""
    for step in (step for block in blocks for step in block.steps()):
        x = step(x)
    return x


# ---- VAE: crops ↔ latents -----------------------------------------------------------------------------------


class PixelAttention(Attention):
    """One head over all cells of a map (B, C, h, w), added to it."""

    def __init__(self, dim: int, groups: int):
        super().__init__(dim, 1, dim, bias=True)
        self.group_norm = nn.GroupNorm(groups, dim, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
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
        x = run_blocks([*self.down_blocks, self.mid_block], self.conv_in(x))
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
        x = run_blocks([self.mid_block, *self.up_blocks], self.conv_in(x))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Stable Diffusion's autoencoder: what is 8 pixels wide and high becomes one cell of 4 numbers, and back."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        widths = (channels, 2 * channels, 4 * channels, 4 * channels)
        self.encoder, self.decoder = Encoder(widths, groups), Decoder(widths, groups)
        self.quant_conv = nn.Conv2d(2 * LATENT, 2 * LATENT, 1)
        self.post_quant_conv = nn.Conv2d(LATENT, LATENT, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Crops (B, 3, H, W) in [-1, 1] → mean and log variance of the latent's posterior, each (B, 4, h, w)."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, 4, h, w), not scaled → crops (B, 3, H, W) of about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


# ---- U-Net: latent and task → features, and a latent --------------------------------------------------------


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
        self.ff = nn.ModuleDict(dict(net=nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))))

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


class MLP(nn.Module):
    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim_in, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def time_waves(t: Tensor, dim: int) -> Tensor:
    """[cos(t f), sin(t f)] with f from 1 down to nearly 1/10000: (B,) → (B, dim), in float32."""
    half = dim // 2
    f = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t.float()[:, None] * f
    return torch.cat([angle.cos(), angle.sin()], 1)


def task_waves(y: Tensor) -> Tensor:
    """[sin y, cos y] of task codes: (B, 2) → (B, 4). Here the sines come first."""
    return torch.cat([y.float().sin(), y.float().cos()], 1)


class UNet(nn.Module):
    """Stable Diffusion 2's U-Net with a task embedding beside the time embedding."""

    def __init__(self, dim: int, head_dim: int, groups: int, text_dim: int, checkpointing: bool):
        super().__init__()
        self.dim, self.checkpointing = dim, checkpointing
        resnet = partial(ResNet, groups=groups, eps=1e-5, emb_dim=4 * dim)

        def attend(width: int, count: int) -> list[Transformer]:
            return [Transformer(width, width // head_dim, text_dim, groups) for _ in range(count)]

        self.conv_in = nn.Conv2d(LATENT, dim, 3, padding=1)
        self.time_embedding, self.class_embedding = MLP(dim, 4 * dim), MLP(4, 4 * dim)
        widths, before, skips = (dim, 2 * dim, 4 * dim, 4 * dim), dim, [dim]     # skips: channels of the way down
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            down = [Downsample(width, all_sides=True)] if i < 3 else []
            self.down_blocks.append(Block([resnet(before, width), resnet(width, width)],
                                          attend(width, 2 if i < 3 else 0), down))
            before = width
            skips += [width] * (2 + len(down))
        self.mid_block = Block([resnet(before, before), resnet(before, before)], attend(before, 1))
        for i, width in enumerate(reversed(widths)):
            resnets = []
            for _ in range(3):
                resnets.append(resnet(before + skips.pop(), width))
                before = width
            self.up_blocks.append(Block(resnets, attend(width, 3 if i else 0), up=[Upsample(width)] if i < 3 else []))
        self.conv_norm_out = nn.GroupNorm(groups, dim, 1e-5)
        self.conv_out = nn.Conv2d(dim, LATENT, 3, padding=1)

    def embedding(self, y: Tensor, t: Tensor) -> Tensor:
        """Embedding of task codes (B, 2) at time steps (B,): (B, E). Waves are float32 whatever the weights are."""
        dtype = self.conv_in.weight.dtype
        return self.time_embedding(time_waves(t, self.dim).to(dtype)) + self.class_embedding(task_waves(y).to(dtype))

    def forward(self, z: Tensor, y: Tensor, text: Tensor, blocks: int = 4, t: Tensor | None = None) -> Tensor:
        """Features (B, C, h, w) of latents (B, 4, h, w): the output of up block `blocks` - 1; later ones are not run.

        y (1 or B, 2) task codes;  t (1 or B,) time steps, by default 999. The embedding of one task at one time and
        the keys and values of the text, 2 tokens, are computed for one crop and serve all: they cost nothing.
        """
        emb = self.embedding(y, torch.full((1,), TIME, device=z.device) if t is None else t)
        forget = self.checkpointing and torch.is_grad_enabled()
        run = partial(checkpoint, use_reentrant=False) if forget else lambda layer, *args: layer(*args)
        x = self.conv_in(z)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = run(block.layer, i, x, emb, text)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        for i in range(len(self.mid_block.resnets)):
            x = run(self.mid_block.layer, i, x, emb, text)
        for block in self.up_blocks[:blocks]:
            for i in range(len(block.resnets)):
                x = run(block.layer, i, x, emb, text, skips.pop())
            for upsample in block.upsamplers:
                x = upsample(x, skips[-1].shape[2:])      # sides that 8 does not divide are not doubled exactly
        return x

    def output(self, x: Tensor) -> Tensor:
        """The features of the last up block → latents (B, 4, h, w)."""
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# ---- The heatmap head ---------------------------------------------------------------------------------------


class HeatmapHead(nn.Module):
    """Features (B, C, h, w) → heatmaps (B, K, 2h, 2w), unbounded.

    Instance norms see the whole crop, at prediction too: results depend on what is around the person. The first
    bias changes nothing, the norm behind it takes it away; it is there because the released files hold it.
    """

    def __init__(self, dim: int, keypoints: int):
        super().__init__()
        self.deconv_layers = nn.Sequential(nn.ConvTranspose2d(dim, dim, 4, 2, 1, bias=False), nn.InstanceNorm2d(dim),
                                           nn.SiLU())
        self.conv_layers = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.InstanceNorm2d(dim), nn.SiLU())
        self.final_layer = nn.Conv2d(dim, keypoints, 1)
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.final_layer(self.conv_layers(self.deconv_layers(x)))


# ---- The model ----------------------------------------------------------------------------------------------

PIXELS = 1024 * 768                # of crops that the VAE takes at once: its full-size maps need 0.4 GB per such crop


class SDPose(nn.Module):
    """Crops → latents → heatmaps, and the clean crops' latents; see `heatmaps` and `reconstruct`."""

    def __init__(self, cfg: Config, skeleton: Skeleton):
        super().__init__()
        self.cfg, self.skeleton = cfg, skeleton
        self.vae = VAE(cfg.vae_channels, cfg.groups).requires_grad_(False)
        self.unet = UNet(cfg.channels, cfg.head_dim, cfg.groups, cfg.text_dim, cfg.checkpointing)
        self.decoder = HeatmapHead(cfg.channels * 2 ** (3 - cfg.tap), skeleton.num_keypoints)
        # what the text encoder makes of the empty text's 2 tokens; until weights are loaded, some constant
        self.register_buffer("text", torch.arange(2.0 * cfg.text_dim).sin().view(1, 2, cfg.text_dim))

    def task(self, y: tuple[float, float]) -> Tensor:
        return torch.tensor([y], device=self.text.device)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Crops (B, 3, H, W) in [-1, 1] → mean and log variance of their latents; in parts of `PIXELS`, for memory."""
        parts = images.split(max(1, PIXELS // (images.shape[2] * images.shape[3])))
        return tuple(map(torch.cat, zip(*map(self.vae.encode, parts))))

    @torch.no_grad()
    def latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Crops (B, 3, H, W) in [-1, 1] → latents (B, 4, h, w): the posterior's mean, or mean + deviation · noise.

        noise: standard normal, (B, 4, h, w).
        """
        mean, log_variance = self.posterior(images)
        return LATENT_SCALE * (mean if noise is None else mean + (log_variance / 2).exp() * noise)

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) → crops (B, 3, H, W), to look at."""
        parts = latents.split(max(1, PIXELS // (64 * latents.shape[2] * latents.shape[3])))
        return torch.cat([self.vae.decode(part / LATENT_SCALE) for part in parts])

    def heatmaps(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) → heatmaps (B, K, 2h, 2w). Up blocks after the feature tap are not run."""
        return self.decoder(self.unet(latents, self.task(POSE), self.text, self.cfg.tap + 1))

    def reconstruct(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) of disturbed crops → latents of the clean crops (x0 prediction)."""
        return self.unet.output(self.unet(latents, self.task(RGB), self.text))

    def forward(self, latents: Tensor, reconstruct: bool = True) -> dict[str, Tensor]:
        """Both tasks on the same latents: `heatmaps` and, unless switched off, `latents` of the clean crops.

        Two passes give what one batch of both would, and the pose pass stops at its tap. The RGB pass does not move
        the latents (`vae_along`): it would make them easy to reconstruct, not good to have.
        """
        result = dict(heatmaps=self.heatmaps(latents))
        return result | dict(latents=self.reconstruct(latents.detach())) if reconstruct else result


def build(preset: str, skeleton: str | Skeleton = "coco", **overrides) -> SDPose:
    """A model with start weights; overrides are Config fields."""
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(PRESETS)}")
    return SDPose(resolve(PRESETS[preset], **overrides), get_skeleton(skeleton))


# ---- The released weights: folders unet/, vae/, text_encoder/ and, but in Stable Diffusion's own, decoder/ -----

RENAME = [(rf"^(vae\..*\.attentions\.0\.){theirs}\.", rf"\1{ours}.") for theirs, ours in      # files of before 2023
          dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0").items()]


def recognise(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(preset, number of keypoints) of a release, by its tensors; None for something else."""
    if not {"unet.conv_in.weight", "decoder.final_layer.weight"} <= state.keys():
        return None
    (keypoints, width), channels = state["decoder.final_layer.weight"].shape[:2], len(state["unet.conv_in.weight"])
    return next(((name, keypoints) for name, cfg in PRESETS.items()
                 if (cfg.channels, cfg.channels * 2 ** (3 - cfg.tap)) == (channels, width)), None)


def convert_official(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Tensors of a release's folder under this file's names. Raises UserError for a head of another feature tap."""
    found = recognise(state)
    if found and PRESETS[found[0]].tap != config.tap:
        raise UserError(f"these weights have a head for {found[1]} keypoints that reads up block "
                                f"{PRESETS[found[0]].tap}, not {config.tap}: choose --preset {found[0]}")
    return {name: value.flatten(1) if re.search(r"^vae\..*\.to_(q|k|v|out\.0)\.weight$", name) else value
            for name, value in weights.rename(state, RENAME).items()}


def load_init(model: SDPose, source: str) -> None:
    """Start weights from a folder of Stable Diffusion 2 or of a release, or by a release's name.

    Stable Diffusion has neither task embedding nor head, a release for other keypoints has no head: these stay random.
    """
    release = weights.RELEASES.get(source)
    if not Path(source).is_dir() and (release is None or release.method != "sdpose"):
        raise UserError(f"--init: there is no folder {source}: put Stable Diffusion 2 there (unet/, vae/, "
                                "text_encoder/), or name sdpose-body; --init '' starts from nothing")
    folder = Path(source) if Path(source).is_dir() else weights.fetch(source)
    state, own = stable_diffusion.load_release(folder, head=False), model.state_dict()
    last = "decoder.final_layer.weight"
    if last in state and state[last].shape != own[last].shape:
        state = {name: value for name, value in state.items() if not name.startswith("decoder.")}
    random = [part for part in ("unet.class_embedding.", "decoder.")
              if not any(name.startswith(part) for name in state)]
    weights.load_strict(model, convert_official(state, model.cfg), {f"^{part}": "new" for part in random})
    print(f"start weights from {folder}: {len(state)} of {len(own)} tensors"
          f"{', random: ' if random else ''}{' and '.join(part + '*' for part in random)}")


TOP_DOWN = True                    # eval.py has to say where people are
AT_INFERENCE = ("flip_test", "sample", "amp")

# ---- Crops: from a person's box to the network's input (A.3) ------------------------------------------------


def box_region(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (..., 4) → centre and size (..., 2) of what is cut out around them: 1.25 times the box."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) * 1.25


def fix_aspect(size: np.ndarray, cfg: Config) -> np.ndarray:
    """Sizes (..., 2), w and h, grown on one side to the aspect of the crop; a region is at least a pixel wide."""
    w, h, aspect = size[..., 0], size[..., 1], cfg.width / cfg.height
    return np.maximum(np.stack([np.maximum(w, h * aspect), np.maximum(h, w / aspect)], -1), 1.0)


def udp_matrix(center: np.ndarray, size: np.ndarray, cfg: Config, degrees: float = 0.0) -> np.ndarray:
    """The 2×3 matrix from image to crop that turns a region by some degrees and puts its corners on the centres of
    the crop's corner pixels: scale (W - 1) / w, so that mirroring and scaling keep keypoints unbiased (UDP)."""
    (cx, cy), (w, h) = center, size
    sx, sy = (cfg.width - 1) / w, (cfg.height - 1) / h
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[cos * sx, -sin * sx, sx * (-cx * cos + cy * sin + w / 2)],
                     [sin * sy, cos * sy, sy * (-cx * sin - cy * cos + h / 2)]])


def input_crop(image: Image.Image, box: np.ndarray, cfg: Config) -> Tensor:
    """What the network sees of the person in a box (4,), (3, H, W) uint8."""
    center, size = box_region(np.asarray(box, float))
    matrix = udp_matrix(center, fix_aspect(size, cfg), cfg)
    return to_tensor(transforms.warp_affine(np.asarray(image), matrix, (cfg.width, cfg.height)))


def sample_crop(cfg: Config, sample: Sample, box: np.ndarray) -> Tensor:
    return input_crop(sample.image, box, cfg)


def to_tensor(crop: np.ndarray) -> Tensor:
    """(H, W, 3) → (3, H, W), uint8 as it is."""
    return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))


def normalise(crops: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1], of the memory format that convolutions on CPUs like best."""
    return (crops.float() / 255 * 2 - 1).contiguous(memory_format=torch.channels_last)


# ---- Augmentation, in the order of the release (A.3) ---------------------------------------------------------
# Keypoints of one person are (K, 3), pixels and v; colour steps take and return uint8 (H, W, 3).


def mirror(image: np.ndarray, keypoints: np.ndarray, center: np.ndarray, flip: Sequence[int]) -> tuple:
    """Image, keypoints and centre of a region, left and right exchanged."""
    last = image.shape[1] - 1
    keypoints = keypoints[list(flip)]
    keypoints[:, 0] = last - keypoints[:, 0]
    return image[:, ::-1], keypoints, np.array([last - center[0], center[1]])


def half_body(keypoints: np.ndarray, skeleton: Skeleton, rng: np.random.Generator) -> tuple | None:
    """Centre and size of a region around the upper (7 of 10 times) or lower half; None if too little is labelled."""
    labelled = keypoints[:, 2] > 0
    sides = [[k for k in half if labelled[k]] for half in halves(skeleton)]
    sides = [side for side, least in zip(sides, (2, 3)) if len(side) >= least]
    if labelled.sum() < 9 or not sides:
        return None
    xy = keypoints[sides[0 if rng.random() < 0.7 else -1], :2]
    return xy.mean(0), np.ptp(xy, axis=0) * 1.5


def jitter_region(center: np.ndarray, size: np.ndarray, cfg: Config, rng: np.random.Generator) -> tuple:
    """Another centre, another size, and degrees to turn by; normal numbers cut off at ±1."""
    shift_x, shift_y, grow, turn = ndtri(rng.uniform(ndtr(-1), ndtr(1), 4))
    if rng.random() < 0.3:
        center = center + 0.16 * size * (shift_x, shift_y)
    return center, size * (1 + cfg.scaling * grow), cfg.rotation * turn * (rng.random() < 0.6)


def disturb(crop: np.ndarray, cfg: Config, rng: np.random.Generator) -> np.ndarray:
    """Box blur and median blur of 3, 5 or 7 pixels, one of 10 times each; a black rectangle inside.

    Departs  the paper blurs with Gaussians; the release, and we, with boxes
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
    """A person → the crop that the network sees, the clean one, and the keypoints (K, 3) in pixels of both.

    The RGB branch learns to give the clean crop, which is the one before `disturb`.
    """
    center, size = box_region(box)
    if skeleton.flip is not None and rng.random() < 0.5:
        image, keypoints, center = mirror(image, keypoints, center, skeleton.flip)
    if rng.random() < cfg.half_body:
        center, size = half_body(keypoints, skeleton, rng) or (center, size)
    center, size, degrees = jitter_region(center, size, cfg, rng)
    matrix = udp_matrix(center, fix_aspect(size, cfg), cfg, degrees)
    clean = transforms.photometric(transforms.warp_affine(image, matrix, (cfg.width, cfg.height)), rng)
    xy = keypoints[:, :2] @ matrix[:, :2].T + matrix[:, 2]
    return disturb(clean, cfg, rng), clean, np.c_[xy, keypoints[:, 2]].astype(np.float32)


# ---- Codec: keypoints ↔ heatmaps (UDP, DARK) ----------------------------------------------------------------


def udp_encode(keypoints: Tensor, labelled: Tensor, cfg: Config) -> tuple[Tensor, Tensor]:
    """Keypoints (..., K, 2) in pixels of the crop → heatmaps (..., K, H/4, W/4) and weights (..., K).

        G_k(p) = exp(-|p - μ_k|² / 2σ²),    μ = keypoint · (w - 1) / (W - 1)

    for cells p within 3σ of the cell nearest to μ, 0 elsewhere: the largest value is below 1 if μ is between cells.
    The weight is 1 for a labelled keypoint of which the map shows anything, even if it is itself outside.
    """
    inside, profiles = labelled > 0, []
    for axis, side in enumerate((cfg.width, cfg.height)):
        cells = torch.arange(side // 4, device=keypoints.device, dtype=torch.float32)
        mu = (keypoints[..., axis] * (side // 4 - 1) / (side - 1)).unsqueeze(-1)
        window = (cells - (mu + 0.5).trunc()).abs() <= 3 * cfg.sigma
        profiles.append(torch.exp(-(cells - mu) ** 2 / (2 * cfg.sigma ** 2)) * window)
        inside = inside & window.any(-1)
    x, y = profiles
    weights = inside.float()
    return y.unsqueeze(-1) * x.unsqueeze(-2) * weights[..., None, None], weights


def blur(maps: Tensor) -> Tensor:
    """Gaussian of deviation 2 in 11×11 cells, zeros outside: (N, K, h, w)."""
    line = torch.exp(-torch.arange(-5.0, 6.0, device=maps.device) ** 2 / 8)
    line, flat = line / line.sum(), maps.flatten(0, 1)[:, None]
    return F.conv2d(F.conv2d(flat, line.view(1, 1, 1, 11), padding=(0, 5)), line.view(1, 1, 11, 1),
                    padding=(5, 0)).view_as(maps)


def udp_decode(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Heatmaps (N, K, h, w) → keypoints (N, K, 2) as fractions of the map, and their largest values (N, K).

    The highest cell p moves to the top of the parabola through the logarithm of the blurred map there (DARK):

        p ← p - H⁻¹ ∇,    ∇ and H first and second differences of log(blur(map)) at p

    0 is the centre of the first cell, 1 that of the last. On noise the step may lead far outside, as in the release.
    Departs  a map that is 0 everywhere gives a place, that of one without positive values, not NaN
    """
    height, width = maps.shape[2:]
    scores, place = maps.flatten(2).max(-1)
    place = torch.stack([place % width, place // width], -1)
    place = torch.where(scores[..., None] > 0, place, -1)                       # (N, K, 2)
    smooth = blur(maps)
    peak = smooth.flatten(2).amax(-1)
    smooth = smooth * (scores / torch.where(peak == 0, 1, peak))[..., None, None]
    # one row of numbers per crop: what lies beside the corner of a map is the end of the one before, as in the release
    logs = F.pad(smooth.clamp(1e-3, 50).log().double(), (1, 1, 1, 1), mode="replicate").flatten(1)
    first = torch.arange(maps.shape[1], device=maps.device) * (height + 2) * (width + 2)
    around = torch.arange(-1, 2, device=maps.device)
    cells = first + (place[..., 1] + 1) * (width + 2) + place[..., 0] + 1                  # (N, K), of p
    cells = cells[..., None] + (around[:, None] * (width + 2) + around).flatten()
    near = logs.gather(1, cells.flatten(1) % logs.shape[1])
    (a, b, c), (d, e, f), (_, h, i) = near.view(*place.shape[:2], 3, 3).movedim((2, 3), (0, 1))
    dx, dy, eps = (f - d) / 2, (h - b) / 2, torch.finfo(torch.float32).eps
    dxx, dyy, dxy = f - 2 * e + d + eps, h - 2 * e + b + eps, (i - f - h + 2 * e - d - b + a) / 2
    step = torch.stack([dyy * dx - dxy * dy, dxx * dy - dxy * dx], -1) / (dxx * dyy - dxy ** 2)[..., None]
    return (place - step) / torch.tensor([width - 1, height - 1], device=maps.device), scores


# ---- Losses (eq. 4 to 6) ------------------------------------------------------------------------------------


def pose_loss(heatmaps: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean of w_k (H_k - G_k)² over all cells and keypoints, also those of weight 0: (B, K, h, w) twice, (B, K)."""
    return (weights[..., None, None] * (heatmaps - target) ** 2).mean()


def criterion(output: dict[str, Tensor], latents: Tensor, target: Tensor, weights: Tensor,
              cfg: Config) -> dict[str, Tensor]:
    """Weighted loss terms of both branches, in float32: heatmaps, and latents (B, 4, h, w) of the clean crops.

    Departs  the paper writes squared norms; means, as in Lotus, on whose protocol it builds
    """
    losses = dict(loss_pose=cfg.pose_weight * pose_loss(output["heatmaps"].float(), target, weights))
    if "latents" in output:
        # a VAE that learns along stretches its latents as the pose branch likes; those of SD have a variance of about 1
        unit = latents.var().clamp(min=1e-3) if cfg.vae_along else 1.0
        losses["loss_rgb"] = cfg.rgb_weight * F.mse_loss(output["latents"].float(), latents) / unit
    return losses


# ---- Prediction ---------------------------------------------------------------------------------------------


def fuse(model: SDPose) -> SDPose:
    """Nothing to fuse: the model as it is, to predict with."""
    return model.eval()


def average_heatmaps(model: SDPose, crops: Tensor) -> Tensor:
    """Heatmaps (N, K, h, w) of crops (N, 3, H, W) in [-1, 1]; with `flip_test` the mean of two views.

    The mirrored crops go into the same batch, and their maps are mirrored back, left and right keypoints exchanged.
    """
    cfg, flip = model.cfg, model.skeleton.flip
    both = cfg.flip_test and flip is not None
    views = torch.cat([crops, crops.flip(3)]) if both else crops
    noise = torch.randn(len(views), LATENT, cfg.height // 8, cfg.width // 8).to(crops) if cfg.sample else None
    with autocast(crops.device, cfg.amp, keep_casts=False):      # each weight is used once: 1.7 GB less
        maps = model.heatmaps(model.latents(views, noise)).float()
    if not both:
        return maps
    plain, mirrored = maps.chunk(2)
    return (plain + mirrored[:, list(flip)].flip(3)) / 2


@torch.no_grad()
def poses(model: SDPose, crops: Tensor, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crops (N, 3, H, W) uint8 of boxes (N, 4) → keypoints (N, K, 2) in pixels of the image, and scores (N, K)."""
    crops = normalise(crops.to(model.text.device)).contiguous()     # channels-last group norms of CPUs are less exact
    maps = average_heatmaps(model, crops)
    places, scores = (x.cpu().numpy() for x in udp_decode(maps))
    center, size = box_region(boxes)
    size = fix_aspect(size, model.cfg)
    return places * size[:, None] + (center - size / 2)[:, None], scores


def finish(found: Prediction, model: SDPose) -> Prediction:
    """Scores of people, box score · mean keypoint score over 0.2, and whoever resembles a better one (OKS over 0.9)
    left out; the area for that is the region's that was cut out."""
    scores = rescore(found.scores, found.keypoint_scores)
    areas = fix_aspect(box_region(found.boxes)[1], model.cfg).prod(-1)
    keep = oks_nms(found.keypoints, scores, areas, model.skeleton.sigmas)
    return Prediction(found.image_id, found.keypoints[keep], found.keypoint_scores[keep], scores[keep],
                      found.boxes[keep])


def to_batch(pictures: list[Image.Image], image_ids: list, cfg: Config,
             boxes: list[Found] | None = None) -> dict:
    """RGB pictures and the people in each, (boxes (P, 4), scores (P,)) → what `predict` takes.

    Without boxes each picture as a whole is taken for one person.
    """
    boxes = boxes or [whole_image(picture.size) for picture in pictures]
    people = [(image_id, input_crop(picture, box, cfg), box, score) for picture, image_id, found
              in zip(pictures, image_ids, boxes) for box, score in zip(*found)]
    return dict(people=people, image_ids=image_ids)


def predict(model: SDPose, batch: dict) -> list[Prediction]:
    """People of a batch from `to_batch`: one Prediction per image, empty where there was no box."""
    people, rows = batch["people"], []
    bar = tqdm(range(0, len(people), model.cfg.eval_batch), "people", disable=len(people) <= model.cfg.eval_batch)
    for first in bar:
        ids, crops, boxes, scores = zip(*people[first:first + model.cfg.eval_batch])
        keypoints, certain = poses(model, torch.stack(crops), np.stack(boxes))
        rows += zip(ids, keypoints, certain, scores, boxes)
    found = people_by_image(rows, batch["image_ids"], model.skeleton.num_keypoints)
    return [finish(one, model) for one in found]


def evaluate(model: SDPose, data: PoseDataset, cfg: Config, ranks: Ranks,
             boxes: Boxes | None = None) -> tuple[dict, list[Prediction]]:
    """Metrics and predictions of a dataset, of its annotated boxes unless others are given; crops are shared among the
    processes, all get the result. Whole-body data have six evaluations."""
    boxes = boxes or true_boxes(data)
    crops = boxes.total()
    views = 1 + (model.cfg.flip_test and model.skeleton.flip is not None)
    if ranks.rank == 0 and crops:
        say_cost(model, f"{crops} crops x {views}", crops * views / ranks.world, 1)
    found = predict_people(
        partial(poses, fuse(model)), data, boxes, partial(sample_crop, model.cfg),
        cfg.eval_batch, cfg.workers, ranks)
    found = [finish(one, model) for one in found]
    return metrics.evaluate(found, data), found


# ---- Training data ------------------------------------------------------------------------------------------


class TrainCrops(Dataset):
    """One epoch of augmented people; item n is (crops (S, 3, H, W) uint8, keypoints (K, 3), image id, why skipped).

    S is 2, the network's input and the clean crop, or 1 where the clean one is not needed. What happens to person n
    depends on (seed, epoch, n) alone. A crop with too few keypoints gives way to that of somebody else, as does a
    file that cannot be read.
    """

    def __init__(self, data: PoseDataset, people: np.ndarray, cfg: Config, epoch: int):
        self.data, self.people, self.cfg, self.epoch = data, people, cfg, epoch

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor, int | str, list[str]]:
        cfg, skipped, count = self.cfg, [], self.data.skeleton.num_keypoints
        rng = np.random.default_rng([cfg.seed, self.epoch, n])
        for _ in range(100):
            i, p = self.people[n]
            sample, message = self.data.load(int(i))
            skipped += [message] if message else []
            n = int(rng.integers(len(self.people)))                     # whose turn it is if this one is of no use
            if sample is None:
                continue
            image, box = np.asarray(sample.image), sample.boxes[p].clip(0, np.tile(sample.size, 2) - 1)
            crop, clean, moved = augment(image, box, sample.keypoints[p], self.data.skeleton, cfg, rng)
            keypoints = torch.from_numpy(moved)
            if udp_encode(keypoints[:, :2], keypoints[:, 2], cfg)[1].sum() >= (8 if count == 133 else min(3, count)):
                crops = [crop, clean] if cfg.rgb_weight and cfg.target == "clean" else [crop]
                return torch.stack(list(map(to_tensor, crops))), keypoints, sample.image_id, skipped
        raise UserError("of 100 crops none shows enough keypoints to learn from: lower --scaling or --rotation"
                                + (f", mend {skipped[0]}" if skipped else ""))


def posterior(model: SDPose, crops: Tensor) -> Tensor:
    """Crops (B, S, 3, H, W) uint8 → mean and log variance of their latents, (B, S, 8, h, w)."""
    images = normalise(crops.to(model.text.device, non_blocking=True).flatten(0, 1))
    with autocast(images.device, model.cfg.amp):
        return torch.cat(model.posterior(images), 1).float().unflatten(0, crops.shape[:2])


@torch.no_grad()
def make_cache(model: SDPose, views: list[TrainCrops], cfg: Config, ranks: Ranks,
               run: RunFolder) -> list[list]:
    """Per view a list of what TrainCrops gives, with posteriors (S, 8, h, w) in place of crops.

    The frozen VAE costs more than the U-Net, and new augmentations would need it at every step: a fixed number of
    views of each person it encodes once. The processes share the work and keep all of it in memory.
    """
    count, kept, cells = len(views[0]), len(views[0][0][0]), (cfg.height // 8, cfg.width // 8)
    size = len(views) * count * kept * 2 * LATENT * math.prod(cells) * 4 / 1e9
    run.say(f"encoding {len(views)} x {count} people once, {size:.1f} GB of memory")
    mine = list(range(ranks.rank, count, ranks.world))
    mine = [mine[first:first + cfg.eval_batch] for first in range(0, len(mine), cfg.eval_batch)]
    cached = []
    for number, view in enumerate(views, 1):
        posteriors = torch.zeros(count, kept, 2 * LATENT, *cells)
        labels, ids = torch.zeros(count, model.skeleton.num_keypoints, 3), []
        bar = tqdm(train_loader(view, mine, cfg.workers, ranks), f"view {number}/{len(views)}", disable=ranks.rank > 0)
        for rows, (crops, keypoints, images, skipped) in zip(mine, bar):
            posteriors[rows], labels[rows] = posterior(model, crops).cpu(), torch.stack(keypoints)
            ids += zip(rows, images)
            run.bad_files(sum(skipped, []))
        posteriors, labels = (mean_over_ranks(part.to(ranks.device)).cpu() * ranks.world
                              for part in (posteriors, labels))         # the sum: others filled the rows that are 0
        ids = [image for _, image in sorted(gather_lists(ids))]
        cached.append(list(zip(posteriors, labels, ids, [[]] * count)))
    return cached


@torch.no_grad()
def unit_latents(model: SDPose, crops: TrainCrops) -> None:
    """Scale a random VAE so that latents have a deviation of 1, as Stable Diffusion's: weaker ones the U-Net hardly
    sees beside its biases."""
    mean, _ = posterior(model, torch.stack([crops[n][0] for n in range(min(64, len(crops)))])).chunk(2, 2)
    scale = 1 / (LATENT_SCALE * mean.std())
    model.vae.quant_conv.weight[:LATENT] *= scale
    model.vae.quant_conv.bias[:LATENT] *= scale
    model.vae.post_quant_conv.weight /= scale


# ---- Training -----------------------------------------------------------------------------------------------


def freeze_unused(model: SDPose, cfg: Config) -> None:
    """The VAE is frozen, but for a random one's encoder; weights behind the feature tap learn from the RGB branch
    alone, and without it stay as they are."""
    if cfg.vae_along:
        for part in (model.vae.encoder, model.vae.quant_conv):
            part.requires_grad_(True)
    if not cfg.rgb_weight:
        for part in (*model.unet.up_blocks[cfg.tap + 1:], model.unet.conv_norm_out, model.unet.conv_out):
            part.requires_grad_(False)


def build_optimizer(model: SDPose, cfg: Config) -> torch.optim.AdamW:
    """AdamW over all that learns: U-Net and heatmap head, and a random VAE's encoder."""
    learned = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([dict(params=learned, initial_lr=cfg.lr)], lr=cfg.lr, weight_decay=cfg.weight_decay,
                             fused=True)


def lr_scale(step: int, steps: int, cfg: Config) -> float:
    """Factor on the learning rate at an optimiser step out of `steps`."""
    scale = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    return scale * (0.5 + 0.5 * math.cos(math.pi * step / steps)) if cfg.schedule == "cosine" else scale


def batch_losses(net: nn.Module, model: SDPose, crops: Tensor, keypoints: Tensor,
                 device: torch.device) -> dict[str, Tensor]:
    """The training step: both tasks on latents sampled from the posterior of the disturbed crops, at t = 999.

    crops: (B, S, 3, H, W) uint8, or posteriors (B, S, 8, h, w); keypoints (B, K, 3). `net` is the model or
    distributes it. Raises FloatingPointError if a loss is not finite.
    """
    cfg, keypoints = model.cfg, keypoints.to(device)
    target, weights = udp_encode(keypoints[..., :2], keypoints[..., 2], cfg)
    moments = [crops.to(device)] if crops.dtype != torch.uint8 else []
    for s in range(crops.shape[1] if not moments else 0):
        with torch.set_grad_enabled(cfg.vae_along and s == 0):             # the clean crop is a target
            moments.append(posterior(model, crops[:, s:s + 1]))
    mean, log_variance = torch.cat(moments, 1).chunk(2, 2)
    z = LATENT_SCALE * (mean + (log_variance / 2).exp() * torch.randn_like(mean))           # (B, S, 4, h, w)
    with autocast(device, cfg.amp):
        output = net(z[:, 0].contiguous(memory_format=torch.channels_last), cfg.rgb_weight > 0)
    losses = criterion(output, z[:, -1].detach(), target, weights, cfg)
    check_finite(losses)
    return losses


def prepare(model: SDPose, data: PoseDataset, cfg: Config, ranks: Ranks, run: RunFolder,
            fresh: bool) -> Callable[[int], Dataset]:
    """The crops of each epoch, as a function of its number."""
    people = people_to_learn(data, cfg.people, cfg.seed)
    if fresh and not cfg.init:
        unit_latents(model, TrainCrops(data, people, cfg, 0))
    if not cfg.cache_views:
        return partial(TrainCrops, data, people, cfg)
    views = [TrainCrops(data, people, cfg, view) for view in range(cfg.cache_views)]
    cached = make_cache(model, views, cfg, ranks, run)
    return lambda epoch: cached[epoch % len(cached)]


def train(cfg: Config, args) -> None:
    """Train, evaluate, keep everything in the run folder. Runs alone or under torchrun; Ctrl-C saves and leaves."""
    ranks = init_ranks(args.device)
    micro = micro_batch(cfg, ranks)
    with rank_zero_first(ranks):                         # it makes the puppets and fetches start weights
        data, held_out = open_splits(cfg, ranks, cfg.keypoints or None)
        seed_all(cfg.seed)                               # equal start weights on every process
        model = SDPose(cfg, data.skeleton)
        if cfg.init and not args.saved:
            load_init(model, cfg.init)
    freeze_unused(model, cfg)
    model.to(ranks.device, memory_format=torch.channels_last)
    loop = Loop("sdpose", cfg, args, ranks, data, held_out, model, build_optimizer(model, cfg))
    crops_of = prepare(model, data.training(), cfg, ranks, loop.folder, fresh=not args.resume)
    net = distribute(model, ranks)

    steps = loop.plan(len(crops_of(0)), micro)
    if ranks.rank == 0:
        left = (steps - loop.step) * cfg.batch
        say_cost(model, f"training on {left:,} crops", left / ranks.world, 3 + cfg.checkpointing)
    for epoch in loop.epochs():
        net.train()
        for crops, keypoints, ids, skipped in loop.batches(crops_of(epoch)):
            loop.set_lr(lr_scale(loop.step, steps, cfg))
            with loop.naming(ids, skipped):
                losses = batch_losses(net, model, crops, torch.stack(keypoints), ranks.device)
            loop.scaler.scale(sum(losses.values()) / cfg.accum).backward()
            if not loop.update():                                # the step has further micro-batches
                continue
            loop.log(losses, losses)
            if loop.stops():
                return
        if loop.evaluates():
            table, predictions = evaluate(model, held_out, cfg, ranks)
            loop.record(table, predictions, f", {true_boxes(held_out)}")
            if loop.last and cfg.data == "puppets":
                with rank_zero_first(ranks):             # it draws them
                    unseen = open_dataset("puppets", "ood", data.skeleton)
                tables = {"val": table, "ood": evaluate(model, unseen, cfg, ranks)[0]}
                loop.folder.say(f"puppets, and the same in styles never seen\n{metrics.format_table(tables)}")
                if ranks.rank == 0 and data.skeleton.name == "coco":        # others have no pictures in two styles
                    with goes_on(loop.folder.path / "styles.png"):
                        show_styles(model, held_out).save(loop.folder.path / "styles.png")


# ---- Pictures: what the two branches see ---------------------------------------------------------------------


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] → a picture, small ones enlarged."""
    picture = Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy())
    zoom = max(1, 384 // picture.height)
    return picture.resize((zoom * picture.width, zoom * picture.height))


@torch.no_grad()
def show_process(model: SDPose, image: Image.Image, threshold: float,
                 boxes: Found | None = None) -> dict[str, list[Image.Image]]:
    """For eval.py --process, a row per person: `heatmaps`, the crop and the heatmaps of all keypoints over it; `rgb`,
    the crop, what the RGB branch makes of it, and what the VAE alone would."""
    heatmaps, rgb = [], []
    for _, crop, _, _ in to_batch([image], [""], model.cfg, boxes and [boxes])["people"]:
        crops = normalise(crop[None].to(model.text.device))
        z = model.latents(crops)
        views = [to_picture(x[0]) for x in (crops, model.images(model.reconstruct(z)), model.images(z))]
        heatmaps += [views[0], draw.draw_heat(views[0], average_heatmaps(model, crops)[0].amax(0).cpu().numpy())]
        rgb += views
    return {name: [draw.contact_sheet(tiles, columns)] for name, tiles, columns in
            (("heatmaps", heatmaps, 2), ("rgb", rgb, 3)) if tiles}


def show_styles(model: SDPose, val: PoseDataset, rows: int = 6) -> Image.Image:
    """The same puppets in the style of the training set and in four that were never seen, with the poses found."""
    from data import puppets                # here, because real data does not need it
    tiles, boxes = [], true_boxes(val)
    for i in [i for i in range(len(val)) if len(boxes.of(val[i].image_id)[1])][:rows]:
        sample, people = val.load(i)[0], boxes.of(val[i].image_id)
        for picture in [sample.image, *puppets.restyle(i)] if sample else []:
            found = predict(model, to_batch([picture], [i], model.cfg, [people]))[0]
            tiles.append(draw.draw_people(picture, found.keypoints, found.keypoint_scores, model.skeleton))
    return draw.contact_sheet(tiles, 5)


# ---- Cost, summary, main ------------------------------------------------------------------------------------


@lru_cache
def flops(cfg: Config, skeleton: Skeleton) -> dict[str, float]:
    """FLOPs of one crop, 2 per multiply-add: `encode` it, `pose` and `rgb` branch. Nothing is computed."""
    counts = {}
    with torch.device("meta"), torch.no_grad():
        model = SDPose(replace(cfg, checkpointing=False), skeleton)
        crop, z = torch.zeros(1, 3, cfg.height, cfg.width), torch.zeros(1, LATENT, cfg.height // 8, cfg.width // 8)
        for name, run in dict(encode=model.latents, pose=model.heatmaps, rgb=model.reconstruct).items():
            with FlopCounterMode(display=False) as counter:
                run(crop if name == "encode" else z)
            counts[name] = counter.get_total_flops()
    return counts


def measured_speed(device: torch.device, amp: str) -> float:
    """FLOP per second of a convolution, to say before long work about how long it takes."""
    conv, x = nn.Conv2d(256, 256, 3, padding=1).to(device), torch.zeros(1, 256, 64, 64, device=device)
    for _ in range(2):                                          # the first call sets things up
        start = time.perf_counter()
        with torch.no_grad(), autocast(device, amp):
            conv(x).sum().item()
        seconds = time.perf_counter() - start
    return 2 * 9 * 256 ** 2 * 64 ** 2 / seconds


def say_hours(what: str, flop: float, device: torch.device, amp: str) -> None:
    """Before long work: its FLOPs and about how long it takes; short work is not worth a word."""
    seconds = flop / measured_speed(device, amp)
    if seconds > 120:
        print(f"{what}: {flop / 1e12:,.0f} TFLOP, about {seconds / 3600:.1f} hours at the speed of this machine")


def say_cost(model: SDPose, what: str, crops: float, passes: int) -> None:
    """Before long work on so many crops: what it costs. passes: of the U-Net, backward counts twice; 1 is prediction."""
    cfg, cost = model.cfg, flops(model.cfg, model.skeleton)
    rgb = passes > 1 and cfg.rgb_weight > 0
    encoded = 1 if passes == 1 else 0 if cfg.cache_views else 1 + (rgb and cfg.target == "clean")
    flop = crops * (encoded * cost["encode"] + passes * (cost["pose"] + rgb * cost["rgb"]))
    say_hours(what, flop, model.text.device, cfg.amp)


def summary() -> str:
    """Of each preset: parameters, and GFLOPs of one crop without its mirror image."""
    rows = [f"{'preset':12}{'input':>10}{'keypoints':>11}{'parameters':>13}{'learned':>11}{'GFLOPs':>9}{'VAE':>9}"]
    for preset, cfg in PRESETS.items():
        skeleton = get_skeleton(cfg.keypoints or "coco")
        with torch.device("meta"):                                      # shapes without numbers
            parameters = list(SDPose(cfg, skeleton).parameters())
        every, learned = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
        cost = {name: value / 1e9 for name, value in flops(cfg, skeleton).items()}
        rows.append(f"{preset:12}{f'{cfg.width}x{cfg.height}':>10}{skeleton.num_keypoints:>11}{every / 1e6:>11.2f} M"
                    f"{learned / 1e6:>9.2f} M{cost['encode'] + cost['pose']:>9.1f}{cost['encode']:>9.1f}")
    return "\n".join(rows)


def main() -> None:
    cfg, args = parse(Config, PRESETS, __doc__)
    if args.train:
        launch(train, cfg, args)
    else:
        print(f"{__doc__}\n{summary()}")


if __name__ == "__main__":
    run_main(main)
