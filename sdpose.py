"""SDPose: a text-to-image diffusion model as the backbone of a pose estimator (arXiv 2509.24980, 2025).

Idea     Stable Diffusion has seen pictures of every style. Its U-Net runs once on the latent of a person's crop: no
         noise, no text, no chain of steps. What an up block gives feeds a small head that draws one heatmap per
         keypoint. While it learns, the same U-Net also has to reproduce the clean crop, told by a task code which of
         the two it is doing: so it keeps what it knows of pictures that are not in the training set.
Flow     crop (B,3,H,W) → VAE.encode → latent z (B,4,h,w), frozen
         pose [1,0]   z → UNet up to its feature tap (B,C,h,w) → HeatmapHead → heatmaps (B,K,2h,2w) → keypoints
         RGB  [0,1]   z → whole UNet → latent of the clean crop (B,4,h,w), in training alone
Read     Block, VAE → UNet.forward → HeatmapHead → SDPose
Letters  B crops  K keypoints  H, W crop  h, w = H/8, W/8 latent  N = h·w tokens  C channels  M heads  E width of the
         embedding of time and task  t = 999 the one time step  y the task code
Units    crops are RGB in [-1, 1]; latents are times 0.18215; heatmaps have no unit, a perfect one peaks at 1
Departs  from the paper, as the release does, because the released weights need it:
         time        t is 999, the paper writes 1000 (UNet)
         features    the map of one up block, not several: the last for a body, the last but one for 133 keypoints
         Figure 2    draws the latent of the clean crop as input of the RGB task; its equation and ours take the
                     disturbed one
Departs  from the release:
         latents     the mean of the VAE's posterior; the release draws a sample at test time too, so that its results
                     change from run to run (SDPose.latents)
         text        the embedding of the empty text is stored with the weights, the text encoder is read once
Memory   of tensors alone, computed by tests/test_sdpose.py for crops of 1024x768 and float32 weights: `body`
         predicts one crop and its mirror image in 5.0 GB and trains a batch of one in 15.7 GB

    python sdpose.py                                    what each preset is: parameters, GFLOPs
"""
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common import runtime, weights
from common.skeletons import Skeleton, get_skeleton

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

    def __post_init__(self):
        """Raises UserError for values that no run could use."""
        runtime.check_range(self, 1, math.inf, "channels head_dim groups text_dim vae_channels height width")
        runtime.check_range(self, 2, 3, "tap")
        for name, of in dict(channels="head_dim", vae_channels="groups").items():
            if getattr(self, name) % math.lcm(getattr(self, of), self.groups):
                raise runtime.UserError(f"--{name} {getattr(self, name)} does not split: choose a multiple of "
                                        f"{math.lcm(getattr(self, of), self.groups)}")
        for name in ("height", "width"):
            if getattr(self, name) % 8:
                raise runtime.UserError(f"--{name} {getattr(self, name)}: a latent cell is 8 pixels wide, choose a "
                                        "multiple of 8")


PRESETS: dict[str, Config] = {
    "tiny": Config(channels=32, head_dim=32, groups=8, text_dim=64, vae_channels=16, height=128, width=96,
                   checkpointing=False, init=""),
    "body": Config(),
    "wholebody": Config(tap=2),
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

    The scores (B, M, N, N') are never stored: at 1024x768 the finest level has N = 12288 tokens, 3 GB of scores.
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

    @torch.no_grad()
    def latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Crops (B, 3, H, W) in [-1, 1] → latents (B, 4, h, w): the posterior's mean, or mean + deviation · noise.

        noise: standard normal, (B, 4, h, w). Encoded in parts of `PIXELS`, for the sake of memory.
        """
        parts = images.split(max(1, PIXELS // (images.shape[2] * images.shape[3])))
        mean, log_variance = map(torch.cat, zip(*map(self.vae.encode, parts)))
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

        Two passes give what one batch of both would, and the pose pass stops at its tap.
        """
        result = dict(heatmaps=self.heatmaps(latents))
        return result | dict(latents=self.reconstruct(latents)) if reconstruct else result


def build(preset: str, skeleton: str | Skeleton = "coco", **overrides) -> SDPose:
    """A model with start weights; overrides are Config fields."""
    if preset not in PRESETS:
        raise runtime.UserError(f"there is no preset {preset}: choose from {', '.join(PRESETS)}")
    return SDPose(runtime.resolve(PRESETS[preset], **overrides), get_skeleton(skeleton))


# ---- The released weights: folders unet/, vae/, text_encoder/ and, but in Stable Diffusion's own, decoder/ -----

RENAME = [(rf"^(vae\..*\.attentions\.0\.){theirs}\.", rf"\1{ours}.") for theirs, ours in      # files of before 2023
          dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0").items()]
STEMS = ("diffusion_pytorch_model", "decoder", "model", "pytorch_model")
EMPTY_TEXT = "empty_text.pt"       # beside the folders: 8 KB in place of a text encoder of 1.4 GB


def release_file(folder: Path, part: str) -> Path | None:
    """The file with the weights of a part: .safetensors before .bin, full precision before half; None without one."""
    endings = [variant + suffix for suffix in (".safetensors", ".bin") for variant in ("", ".fp16")]
    files = (folder / part / f"{stem}{ending}" for ending in endings for stem in STEMS)
    return next((file for file in files if file.is_file()), None)


def encode_text(state: dict[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """CLIP's text encoder by the tensors of its file: word ids (B, n) → last hidden state (B, n, C), normalised.

    Layers of causal attention and an MLP with exact GELU, norms first. Raises KeyError if a tensor is missing.
    """
    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    words, places = (state[f"text_model.embeddings.{kind}_embedding.weight"] for kind in ("token", "position"))
    x = words[ids] + places[:ids.shape[1]]
    for n in range(len({name.split(".")[3] for name in state if name.startswith("text_model.encoder.layers.")})):
        layer = f"text_model.encoder.layers.{n}"
        h = norm(x, f"{layer}.layer_norm1")
        q, k, v = (rearrange(linear(h, f"{layer}.self_attn.{name}_proj"), "b n (m d) -> b m n d", m=heads)
                   for name in "qkv")
        h = rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "b m n d -> b n (m d)")
        x = x + linear(h, f"{layer}.self_attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
    return norm(x, "text_model.final_layer_norm")


def empty_text(folder: Path) -> Tensor:
    """The embedding (1, 2, C) of "", which is a start and an end and no padding; computed once for each folder.

    Raises UserError where neither the embedding nor a text encoder is there.
    """
    kept = folder / EMPTY_TEXT
    if kept.is_file():
        return weights.load_tensors(kept)["text"]
    file = release_file(folder, "text_encoder")
    if file is None:
        raise runtime.UserError(f"{folder} has no text_encoder/model.safetensors and no {EMPTY_TEXT} that was made of "
                                "it: put either there; it is needed once, for the embedding of the empty text")
    state = {name: value.float() for name, value in weights.load_tensors(file).items() if value.is_floating_point()}
    try:
        vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
        text = encode_text(state, torch.tensor([[vocabulary - 2, vocabulary - 1]]), max(1, width // 64))
    except KeyError as missing:
        raise runtime.UserError(f"{file} is no CLIP text encoder: it has no {missing}") from None
    with runtime.goes_on(kept):
        runtime.save_checkpoint(kept, dict(text=text))
    return text


def load_release(folder: str | Path, head: bool = True) -> dict[str, Tensor]:
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
            raise runtime.UserError(f"{folder} has no {wanted}: a release has the folders unet, vae, text_encoder and "
                                    "decoder; fetch that file again")
    return state | dict(text=empty_text(folder))


def recognise(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """(preset, number of keypoints) of a release, by its tensors; None for something else."""
    if not {"unet.conv_in.weight", "decoder.final_layer.weight"} <= state.keys():
        return None
    (keypoints, width), channels = state["decoder.final_layer.weight"].shape[:2], len(state["unet.conv_in.weight"])
    return next(((name, keypoints) for name, cfg in PRESETS.items()
                 if (cfg.channels, cfg.channels * 2 ** (3 - cfg.tap)) == (channels, width)), None)


def convert_official(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Tensors of `load_release` under this file's names. Raises UserError for a head of another feature tap."""
    found = recognise(state)
    if found and PRESETS[found[0]].tap != config.tap:
        raise runtime.UserError(f"these weights have a head for {found[1]} keypoints that reads up block "
                                f"{PRESETS[found[0]].tap}, not {config.tap}: choose --preset {found[0]}")
    return {name: value.flatten(1) if re.search(r"^vae\..*\.to_(q|k|v|out\.0)\.weight$", name) else value
            for name, value in weights.rename(state, RENAME).items()}


def load_init(model: SDPose, source: str) -> None:
    """Start weights from a folder of Stable Diffusion 2 or of a release, or by a release's name.

    Stable Diffusion has neither task embedding nor head, a release for other keypoints has no head: these stay random.
    """
    if not Path(source).is_dir() and source not in weights.RELEASES:
        raise runtime.UserError(f"--init: there is no folder {source}: put Stable Diffusion 2 there (unet/, vae/, "
                                "text_encoder/), or name sdpose-body; --init '' starts from nothing")
    folder = Path(source) if Path(source).is_dir() else weights.fetch(source)
    state, own, last = load_release(folder, head=False), model.state_dict(), "decoder.final_layer.weight"
    if last in state and state[last].shape != own[last].shape:
        state = {name: value for name, value in state.items() if not name.startswith("decoder.")}
    random = [part for part in ("unet.class_embedding.", "decoder.")
              if not any(name.startswith(part) for name in state)]
    weights.load_strict(model, convert_official(state, model.cfg), {f"^{part}": "new" for part in random})
    print(f"start weights from {folder}: {len(state)} of {len(own)} tensors"
          f"{', random: ' if random else ''}{' and '.join(part + '*' for part in random)}")
