"""What Stable Diffusion's folders hold besides the networks that a method file writes out: files, and the text encoder.

    state = load_release(folder)                 all tensors of a release of SDPose, or of Stable Diffusion itself
    text = empty_text(folder)                    the embedding of "", computed once and kept beside the folders
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from common import weights
from common.errors import UserError
from common.run import goes_on
from common.weights import save_checkpoint

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
        raise UserError(f"{folder} has no text_encoder/model.safetensors and no {EMPTY_TEXT} that was made of "
                                "it: put either there; it is needed once, for the embedding of the empty text")
    state = {name: value.float() for name, value in weights.load_tensors(file).items() if value.is_floating_point()}
    try:
        vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
        text = encode_text(state, torch.tensor([[vocabulary - 2, vocabulary - 1]]), max(1, width // 64))
    except KeyError as missing:
        raise UserError(f"{file} is no CLIP text encoder: it has no {missing}") from None
    with goes_on(kept):
        save_checkpoint(kept, dict(text=text))
    return text


def load_release(folder: str | Path, head: bool = True) -> dict[str, Tensor]:
    """The tensors of a release's folder as unet.*, vae.*, decoder.* (SDPose's heatmap head) and text.

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
            raise UserError(f"{folder} has no {wanted}: a release has the folders unet, vae, text_encoder and "
                                    "decoder; fetch that file again")
    return state | dict(text=empty_text(folder))
