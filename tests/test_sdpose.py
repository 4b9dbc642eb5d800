"""SDPose against the released code's numbers, and by itself. Cases are found by file pattern."""
import json
import math
import zlib
from functools import lru_cache

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sdpose as sd
from common import stable_diffusion, weights
from common.errors import UserError
from tests.helpers import REFERENCE

FOLDER = REFERENCE / "sdpose"
TEXT_TENSOR = {"^text$": "not in the manifests, set by the tests"}


def golden(pattern: str, kind: str = "golden_{}.npz"):
    """Run a test once for every file of a pattern; none there is a failure to notice, not a silent pass."""
    files = sorted(FOLDER.glob(kind.format(pattern)))
    missing = pytest.param(None, marks=pytest.mark.skip(reason=f"no {kind.format(pattern)} in {FOLDER}"))
    return pytest.mark.parametrize("file", files or [missing], ids=lambda f: f.stem if f else "none")


def normal(key: str, shape, seed: int = 0) -> torch.Tensor:
    """The reference's standard-normal array, fixed by (seed, key)."""
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()))
    return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))


@lru_cache(4096)
def fill(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The reference's weights for a tensor of this name."""
    n = normal(key, shape, seed)
    if key.endswith("bias"):
        return 0.05 * n
    return 1 + 0.1 * n if len(shape) <= 1 else n / math.sqrt(math.prod(shape[1:]))


def close(ours, theirs, tolerance: float, what: str = ""):
    """The largest difference, relative to the largest number: rounding grows with the numbers that are added up."""
    ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    error = (ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
    assert error <= tolerance, f"{what}: error {error:.2e}"


def read_case(file) -> tuple[dict, dict]:
    """The arrays and the meta of a golden file."""
    arrays = dict(np.load(file))
    return arrays, json.loads(str(arrays.pop("meta")))


@lru_cache
def read_manifest(name: str) -> dict:
    return json.loads((FOLDER / name).read_text())


def manifest_model(name: str) -> sd.SDPose:
    """An SDPose without numbers of the widths that a manifest's config tells."""
    config, skeleton = read_manifest(name)["config"], {17: "coco", 133: "wholebody"}
    unet, head = config["unet"], config["head"]
    channels = unet["block_out_channels"]
    with torch.device("meta"):
        model = sd.build("tiny" if config["preset"] == "tiny" else "body", skeleton[head["num_keypoints"]],
                         channels=channels[0], head_dim=channels[0] // unet["num_heads_per_block"][0],
                         groups=unet["norm_num_groups"], text_dim=unet["cross_attention_dim"],
                         vae_channels=config["vae"]["block_out_channels"][0],
                         tap=3 if head["in_channels"] == channels[0] else 2)
    assert [width // head_dim for width, head_dim in zip(channels, [model.cfg.head_dim] * 4)] == \
        unet["num_heads_per_block"]
    return model


@lru_cache
def reference_model(name: str, seed: int, dtype: torch.dtype = torch.float32) -> sd.SDPose:
    """The model of a manifest with the reference's weights, and its text."""
    model = manifest_model(name).to_empty(device="cpu").to(dtype).eval().requires_grad_(False)
    state = {key: fill(key, tuple(shape), seed) for key, shape in read_manifest(name)["keys"].items()}
    weights.load_strict(model, sd.convert_official(state, model.cfg), TEXT_TENSOR)
    model.text.copy_(normal("empty_text", model.text.shape, seed))
    return model


class Watch:
    """The results of named modules while it is open: watch["mid"] after `with Watch(mid=module) as watch`."""

    def __init__(self, **modules):
        self.modules, self.results = modules, {}

    def __enter__(self) -> dict:
        def keep(name):
            return lambda module, args, result: self.results.__setitem__(name, result)
        self.hooks = [module.register_forward_hook(keep(name)) for name, module in self.modules.items()]
        return self.results

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def inputs(meta: dict, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """The image and the latent of a case."""
    (height, width), seed = meta["image_size"], meta["seed"]
    image = np.tanh(normal("input", (batch, 3, height, width), seed).numpy())      # torch's differs in the last bit
    return torch.from_numpy(image).to(dtype), normal("latent", (batch, 4, height // 8, width // 8), seed).to(dtype)


LABELS = torch.tensor([sd.POSE, sd.RGB])


# ------------------------------------------------------------------------------------------ names


@golden("*", "manifest_*.json")
def test_every_tensor_of_a_release_has_its_parameter_and_the_other_way_round(file):
    manifest = read_manifest(file.name)
    if "unet" not in manifest["config"]:
        pytest.skip("of the text encoder")
    model = manifest_model(file.name)
    ours = {name: list(value.shape) for name, value in model.state_dict().items() if name != "text"}
    assert ours == manifest["keys"]
    for part, count in manifest["num_params"].items():
        assert sum(math.prod(shape) for name, shape in ours.items() if name.startswith(part)) == count
    state = {key: torch.empty(shape, device="meta") for key, shape in manifest["keys"].items()}
    assert sd.convert_official(state, model.cfg).keys() == ours.keys()
    expected = file.stem.removeprefix("manifest_")
    known = (expected, model.skeleton.num_keypoints) if expected in ("body", "wholebody") else None
    assert sd.recognise(state) == known and sd.recognise({}) is None


# ------------------------------------------------------------------------------------------ VAE, U-Net, head


@golden("vae*")
def test_vae_equals_the_release(file):
    case, meta = read_case(file)
    model = reference_model(meta["manifest"], meta["seed"])
    image, latent = inputs(meta)
    encoder, noise = model.vae.encoder, normal("vae_noise", latent.shape, meta["seed"])
    with Watch(enc_conv_in=encoder.conv_in, **{f"enc_down{i}": block.steps()[-1] for i, block
                                               in enumerate(encoder.down_blocks)},
               enc_mid_attn=encoder.mid_block.attentions[0], enc_mid=encoder.mid_block.resnets[1],
               dec_mid=model.vae.decoder.mid_block.resnets[1]) as seen:
        mean, logvar = model.vae.encode(image)
        seen |= dict(mean=mean, logvar=logvar, latent_mode=model.latents(image),
                     latent_sample=model.latents(image, noise), dec_image=model.images(latent * sd.LATENT_SCALE))
    dec_mid = seen["dec_mid"]
    roundtrip = model.vae.decode(mean)
    strides = dict(enc_conv_in=8, enc_down0=4, enc_down1=4, enc_down2=2, enc_down3=2, enc_mid_attn=1, enc_mid=1)
    for name, stride in strides.items():
        close(seen[name][:, ::4, ::stride, ::stride], case[name], 2e-5, name)
    close(dec_mid[:, ::4], case["dec_mid"], 2e-5, "dec_mid")
    for name in ("mean", "logvar", "latent_mode", "latent_sample"):
        close(seen[name], case[name], 1e-5, name)
    close(seen["dec_image"][..., ::2, ::2], case["dec_image"], 2e-5, "dec_image")
    close(roundtrip[:1, :, ::2, ::2], case["roundtrip_image"], 2e-5, "roundtrip_image")


@golden("unet*")
def test_unet_equals_the_release(file):
    case, meta = read_case(file)
    model = reference_model(meta["manifest"], meta["seed"])
    unet, t = model.unet, torch.full((2,), 999)
    _, latent = inputs(meta)
    close(sd.task_waves(LABELS), case["class_labels"], 1e-6, "class_labels")
    close(sd.time_waves(t, unet.dim), case["time_sinusoid"], 1e-6, "time_sinusoid")
    down, up = unet.down_blocks, unet.up_blocks
    with Watch(time_embedding=unet.time_embedding, class_embedding=unet.class_embedding, conv_in=unet.conv_in,
               down0_resnet0=down[0].resnets[0], down0_attn0=down[0].attentions[0],
               down0=down[0].downsamplers[0], down1=down[1].downsamplers[0], down2=down[2].downsamplers[0],
               down3=down[3].resnets[1], mid=unet.mid_block.resnets[1], up0=up[0].upsamplers[0],
               up1=up[1].upsamplers[0], feat_wholebody=up[2].upsamplers[0]) as seen:
        seen["feat_body"] = unet(latent, LABELS, model.text, t=t)
        seen["out"] = unet.output(seen["feat_body"])
    for name, result in seen.items():
        full = result.dim() < 4 or name in ("feat_wholebody", "feat_body", "out")
        close(result if full else result[:, ::4], case[name], 3e-5 if result.dim() == 4 else 1e-5, name)
    assert torch.equal(unet(latent, LABELS, model.text, blocks=3, t=t), seen["feat_wholebody"])
    other = unet(latent, LABELS, model.text, t=torch.tensor([10, 500]))
    close(unet.output(other), case["out_t10_t500"], 1e-5, "out_t10_t500")
    square = unet(normal("latent8", (1, 4, 16, 16), meta["seed"]), LABELS[:1], model.text)
    close(square[:, ::2], case["feat_body_16x16"], 3e-5, "feat_body_16x16")
    close(unet.output(square), case["out_16x16"], 1e-5, "out_16x16")


@golden("head_*")
def test_head_equals_the_release(file):
    case, meta = read_case(file)
    head = reference_model(meta["manifest"], meta["seed"]).decoder
    (height, width), channels = meta["image_size"], head.final_layer.in_channels
    with Watch(deconv=head.deconv_layers, conv=head.conv_layers) as seen:
        heatmaps = head(normal("feature", (2, channels, height // 8, width // 8), meta["seed"]))
    for name, result in seen.items():
        close(result[:, ::4, ::2, ::2], case[name], 1e-5, name)
    close(heatmaps[:len(case["heatmaps"])], case["heatmaps"], 1e-5, "heatmaps")


@golden("float64*")
def test_everything_equals_the_release_in_float64(file):
    case, meta = read_case(file)
    model = reference_model(meta["manifest"], meta["seed"], torch.float64)
    wholebody = reference_model(meta["manifest_wholebody"], meta["seed"], torch.float64)
    image, latent = inputs(meta, dtype=torch.float64)
    mean, logvar = model.vae.encode(image)
    with Watch(feat_wholebody=model.unet.up_blocks[2].upsamplers[0]) as seen:
        body = model.unet(latent, LABELS, model.text)
    results = dict(mean=mean, logvar=logvar, dec_image=model.vae.decode(latent)[..., ::4, ::4],
                   feat_body=body[:, ::4], feat_wholebody=seen["feat_wholebody"][:, ::8], out=model.unet.output(body),
                   heatmaps_body=model.decoder(body)[:, ::4],
                   heatmaps_wholebody=wholebody.decoder(seen["feat_wholebody"])[:, ::19])
    assert results.keys() == case.keys()
    for name, result in results.items():
        close(result, case[name], 1e-12, name)


@golden("blocks*")
def test_blocks_of_the_full_width_equal_the_release(file):
    case, meta = read_case(file)
    manifest = read_manifest(meta["manifest"])["keys"]
    unet, seed = manifest_model(meta["manifest"]).unet, meta["seed"]

    def filled(path: str) -> torch.nn.Module:
        module = unet.get_submodule(path).to_empty(device="cpu").eval().requires_grad_(False)
        prefix = f"unet.{path}."
        state = {key.removeprefix(prefix): fill(key, tuple(shape), seed) for key, shape in manifest.items()
                 if key.startswith(prefix)}
        weights.load_strict(module, state, {})
        return module

    x, emb = normal("block_input", (1, 320, 16, 12), seed), normal("block_temb", (1, 1280), seed)
    text, block = normal("empty_text", (1, 2, 1024), seed), filled("down_blocks.1")
    resnet = block.resnets[0](x, emb)
    close(resnet[:, ::4], case["resnet_320_640"], 2e-5, "resnet")
    layer = block.attentions[0].transformer_blocks[0]
    close(layer(normal("block_tokens", (1, 40, 640), seed), text), case["basic_transformer_block_640"], 1e-5, "layer")
    close(block.attentions[0](resnet, text)[:, ::4], case["transformer_640"], 2e-5, "transformer")
    first = block.layer(0, x, emb, text)
    second = block.layer(1, first, emb, text)
    for name, result in dict(downblock1_skip0=first[:, ::16], downblock1_skip1=second[:, ::16],
                             downblock1=block.downsamplers[0](second)[:, ::4]).items():
        close(result, case[name], 3e-5, name)
    block, x = filled("up_blocks.2"), normal("upblock_input", (1, 1280, 8, 6), seed)
    skips = [normal(f"upblock_skip{i}", (1, width, 8, 6), seed) for i, width in enumerate((320, 640, 640))]
    for i in range(3):
        x = block.layer(i, x, emb, text, skips.pop())
    close(block.upsamplers[0](x)[:, ::4], case["upblock2"], 3e-5, "upblock2")


@golden("tiny_text*")
def test_text_encoder_equals_the_release(file):
    case, meta = read_case(file)
    manifest, state = read_manifest(meta["manifest"]), {}
    for key, shape in manifest["keys"].items():
        state[key.removeprefix("text_encoder.")] = fill(key, tuple(shape), meta["seed"])
    heads = manifest["config"]["num_attention_heads"]
    close(stable_diffusion.encode_text(state, torch.from_numpy(case["ids"]), heads), case["last_hidden_state"], 1e-5)


@golden("pipeline_*")
def test_crops_become_the_heatmaps_of_the_release(file):
    case, meta = read_case(file)
    model = reference_model(meta["manifest"], meta["seed"])
    crops = case["crops"] if "crops" in case else np.load(FOLDER / "golden_pipeline_body.npz")["crops"]
    images = torch.from_numpy(crops).float() / 255 * 2 - 1
    latents, flipped = model.latents(torch.cat([images, images.flip(3)])).chunk(2)     # as prediction does
    close(latents, case["latent"], 1e-5, "latent")
    close(flipped, case["latent_flipped"], 1e-5, "latent_flipped")
    features = model.unet(latents, LABELS[:1], model.text, blocks=model.cfg.tap + 1)
    close(features[:, ::2], case["feat"], 3e-5, "feat")
    heatmaps, mirrored = model.heatmaps(latents), model.heatmaps(flipped)
    close(heatmaps[:len(case["heatmaps"])], case["heatmaps"], 2e-5, "heatmaps")
    count = case["heatmaps_flipped_input"].shape[1]
    close(mirrored[:, :count], case["heatmaps_flipped_input"], 2e-5, "heatmaps_flipped_input")
    both = model.heatmaps(torch.cat([latents, flipped]))                               # in one batch
    close(both, torch.cat([heatmaps, mirrored]), 2e-5)


@golden("loss_*")
def test_both_tasks_equal_the_release(file):
    case, meta = read_case(file)
    model = reference_model(meta["manifest"], meta["seed"])
    clean, _ = inputs(meta)
    top, bottom, left, right = case["rect"].tolist()
    disturbed = clean.clone()
    disturbed[:, :, top:bottom, left:right] = -1
    latents = model.latents(disturbed)
    close(latents, case["latent_in"], 1e-5, "latent_in")
    close(model.latents(clean), case["latent_gt"], 1e-5, "latent_gt")
    result = model(latents)
    step = 1 if result["heatmaps"].shape[1] == case["pred_heatmaps"].shape[1] else 8
    close(result["heatmaps"][:, ::step], case["pred_heatmaps"], 2e-5, "heatmaps")
    close(result["latents"], case["pred_rgb_latent"], 1e-5, "latents")


@pytest.mark.slow
@golden("full*")
def test_full_size_models_equal_the_release(file):
    case, meta = read_case(file)
    image, latent = inputs(meta, batch=1)
    model = reference_model.__wrapped__(meta["manifest"], meta["seed"])
    fill.cache_clear()                                                  # 3.8 GB
    unet = model.unet
    mean, logvar = model.vae.encode(image)
    z = model.latents(image)
    results = dict(mean=mean, logvar=logvar, latent_mode=z,
                   dec_image=model.vae.decode(latent)[..., ::2, ::2])
    with Watch(time_embedding=unet.time_embedding, class_embedding_pose=unet.class_embedding, conv_in=unet.conv_in,
               **{f"down{i}": unet.down_blocks[i].downsamplers[0] for i in range(3)},
               down3=unet.down_blocks[3].resnets[1], mid=unet.mid_block.resnets[1],
               **{f"up{i}": unet.up_blocks[i].upsamplers[0] for i in range(3)},
               up3=unet.up_blocks[3].attentions[2]) as seen:
        features = unet(z, LABELS[:1], model.text)
    stored = {name: value[:, ::16] if value.dim() == 4 else value for name, value in seen.items()}
    results |= stored | dict(feat_body=features[:, ::4], feat_wholebody=seen["up2"][:, ::8],
                             out_pose_label=unet.output(features), heatmaps_body=model.decoder(features))
    with Watch(class_embedding_rgb=unet.class_embedding) as rgb:
        results["out_rgb_label"] = model.reconstruct(z)
    results |= rgb
    del model, unet
    manifest, wholebody = read_manifest(meta["manifest_wholebody"]), manifest_model(meta["manifest_wholebody"])
    head = wholebody.decoder.to_empty(device="cpu")
    weights.load_strict(head, {key.removeprefix("decoder."): fill(key, tuple(shape), meta["seed"])
                               for key, shape in manifest["keys"].items() if key.startswith("decoder.")}, {})
    results["heatmaps_wholebody"] = head(seen["up2"])[:, ::7]
    assert results.keys() == case.keys()
    for name, result in results.items():
        scale = max(1.0, float(np.abs(case[name]).max()) / 10)
        close(result, case[name], 3e-5 * scale, name)


# ------------------------------------------------------------------------------------------ what is saved

def small(skeleton: str = "coco", **overrides) -> sd.SDPose:
    return sd.build("tiny", skeleton, **dict(channels=16, head_dim=8, groups=4, vae_channels=4) | overrides)



def test_the_up_block_after_the_feature_tap_is_not_run():
    model = small("wholebody", tap=2).eval().requires_grad_(False)
    latents, emb = torch.randn(1, 4, 16, 12), model.task(sd.POSE)
    with Watch(tap=model.unet.up_blocks[2].upsamplers[0], last=model.unet.up_blocks[3].resnets[0]) as seen:
        heatmaps = model.heatmaps(latents)
        assert "last" not in seen
        model.unet(latents, emb, model.text)
    assert "last" in seen and torch.equal(model.decoder(seen["tap"]), heatmaps)


@pytest.mark.parametrize("tap", [3, 2])
def test_checkpointing_changes_no_gradient(tap):
    latents, gradients = torch.randn(2, 4, 8, 8), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = small(tap=tap, checkpointing=checkpointing).train()
        result = model(latents)
        (result["heatmaps"].square().sum() + result["latents"].square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if not name.startswith("vae.")})
    plain, again = gradients
    assert None not in plain.values() and all(torch.equal(plain[name], again[name]) for name in plain)


def test_one_batch_of_both_tasks_equals_two_passes():
    model = small().double().requires_grad_(False)
    torch.nn.init.normal_(model.decoder.final_layer.weight)
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    features = model.unet(latents.repeat(2, 1, 1, 1), LABELS.repeat_interleave(2, 0), model.text)
    result = model(latents)
    close(model.decoder(features[:2]), result["heatmaps"], 1e-10)
    close(model.unet.output(features[2:]), result["latents"], 1e-12)
    assert model(latents, reconstruct=False).keys() == {"heatmaps"}


def test_many_crops_are_encoded_in_parts_with_the_same_result(monkeypatch):
    model, images = small().requires_grad_(False), torch.rand(5, 3, 32, 24)
    noise = torch.randn(5, 4, 4, 3)
    whole, pictures = model.latents(images, noise), model.images(noise)
    monkeypatch.setattr(sd, "PIXELS", 2 * 32 * 24)
    close(model.latents(images, noise), whole, 1e-6)
    close(model.images(noise), pictures, 1e-5)


def test_the_vae_is_frozen_and_everything_else_learns():
    learned = {name.split(".")[0] for name, p in small().named_parameters() if p.requires_grad}
    assert learned == {"unet", "decoder"}


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that tensors held at once while it was open. `largest`: of one tensor."""

    def __init__(self):
        super().__init__()
        self.live, self.sum, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and (storage._cdata not in self.live or self.live[storage._cdata][0].expired()):
                self.sum += storage.nbytes() - self.live.get(storage._cdata, (None, 0))[1]
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        if self.sum > self.peak:                       # what went meanwhile is only taken off where it matters
            self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
            self.sum = sum(size for _, size in self.live.values())
            self.peak = max(self.peak, self.sum)
        return result


def full_size_crops(model: sd.SDPose, batch: int) -> torch.Tensor:
    return torch.zeros(batch, 3, model.cfg.height, model.cfg.width)


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_prediction_of_a_full_size_crop_and_its_mirror_image_needs_less_than_6_gb(amp, monkeypatch):
    def autocast(device, amp, keep_casts):                              # as on a GPU
        return torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16", cache_enabled=keep_casts)
    monkeypatch.setattr(sd, "autocast", autocast)
    with FakeTensorMode(), LiveBytes() as live, torch.no_grad():
        model = sd.build("body", amp=amp).eval()
        sd.average_heatmaps(model, full_size_crops(model, 1))
    print(f"peak {live.peak / 1e9:.2f} GB, largest tensor {live.largest / 1e9:.2f} GB")
    assert live.peak < 5.5e9                                            # the rest is for convolutions' workspaces
    assert live.largest < 0.41e9                                        # scores of 12288 tokens would take 0.6


@pytest.mark.slow
def test_training_on_one_full_size_crop_needs_less_than_24_gb():
    with FakeTensorMode(), LiveBytes() as live:
        model = sd.build("body")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):                                              # only then is the optimizer's state there
            latents = model.latents(full_size_crops(model, 2))          # disturbed and clean
            result = model(latents[:1])
            (result["heatmaps"].square().mean() + (result["latents"] - latents[1:]).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            del result
    print(f"peak {live.peak / 1e9:.2f} GB, largest tensor {live.largest / 1e9:.2f} GB")
    assert live.peak < 22e9 and live.largest < 0.41e9


# ------------------------------------------------------------------------------------------ releases


TINY_TEXT = {"text_model.embeddings.token_embedding.weight": (50, 64),
             "text_model.embeddings.position_embedding.weight": (77, 64),
             **{f"text_model.{name}.{kind}": (64,) for name in ("final_layer_norm", "encoder.layers.0.layer_norm1",
                                                               "encoder.layers.0.layer_norm2")
                for kind in ("weight", "bias")},
             **{f"text_model.encoder.layers.0.{name}.weight": shape for name, shape in {
                 "mlp.fc1": (256, 64), "mlp.fc2": (64, 256),
                 **{f"self_attn.{p}_proj": (64, 64) for p in ("q", "k", "v", "out")}}.items()},
             **{f"text_model.encoder.layers.0.{name}.bias": (size,) for name, size in {
                 "mlp.fc1": 256, "mlp.fc2": 64, **{f"self_attn.{p}_proj": 64 for p in ("q", "k", "v", "out")}}.items()}}


@pytest.fixture(scope="module")
def tiny_state() -> dict:
    torch.manual_seed(1)
    return {name: value for name, value in small().state_dict().items() if name != "text"}


def write_release(folder, state: dict, suffix: str = ".safetensors", head: bool = True):
    """A release's folder with these tensors and a small text encoder."""
    text = {name: fill(name, shape, 0) for name, shape in TINY_TEXT.items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for part, stem in dict(unet="diffusion_pytorch_model", vae="diffusion_pytorch_model", decoder="decoder").items():
        if part == "decoder" and not head:
            continue
        (folder / part).mkdir(parents=True)
        tensors = {name.removeprefix(f"{part}."): value.contiguous() for name, value in state.items()
                   if name.startswith(f"{part}.")}
        file = folder / part / (stem + suffix)
        save_file(tensors, file) if suffix.endswith(".safetensors") else torch.save(tensors, file)
    (folder / "text_encoder").mkdir()
    save_file(text, folder / "text_encoder" / "model.safetensors")
    return folder


def load(folder, **overrides) -> sd.SDPose:
    model = small(**overrides)
    weights.load_strict(model, sd.convert_official(stable_diffusion.load_release(folder), model.cfg), {})
    return model


@pytest.mark.parametrize("dtype, suffix", [(torch.float32, ".safetensors"), (torch.float16, ".fp16.safetensors"),
                                           (torch.bfloat16, ".safetensors"), (torch.float32, ".bin")])
def test_a_release_of_any_precision_fills_a_float32_model(tmp_path, tiny_state, dtype, suffix):
    state = {name: value.to(dtype) for name, value in tiny_state.items()}
    model = load(write_release(tmp_path / "release", state, suffix))
    own = model.state_dict()
    assert all(torch.equal(own[name], value.float()) for name, value in state.items())
    assert {value.dtype for value in own.values()} == {torch.float32}
    with torch.no_grad():
        assert model.heatmaps(model.latents(torch.zeros(1, 3, 32, 24))).isfinite().all()


def test_the_text_encoder_is_read_once(tmp_path, tiny_state):
    folder = write_release(tmp_path / "release", tiny_state)
    first = stable_diffusion.load_release(folder)["text"]
    (folder / "text_encoder" / "model.safetensors").unlink()
    assert torch.equal(stable_diffusion.load_release(folder)["text"], first) and first.shape == (1, 2, 64)
    assert (folder / stable_diffusion.EMPTY_TEXT).stat().st_size < 16_000
    (folder / stable_diffusion.EMPTY_TEXT).unlink()
    with pytest.raises(UserError, match="text_encoder/model.safetensors"):
        stable_diffusion.load_release(folder)


def test_fetching_wants_no_text_encoder_once_its_embedding_is_there(tmp_path, monkeypatch):
    release = weights.RELEASES["sdpose-body"]
    encoder, kept = release.made_of
    assert encoder in release.files and kept == f"sdpose-body/{stable_diffusion.EMPTY_TEXT}"
    for file in {*release.files, kept} - {encoder}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert weights.fetch("sdpose-body", tmp_path) == tmp_path / "sdpose-body"
    (tmp_path / kept).unlink()
    assert release.missing(tmp_path) == [encoder]


def test_a_text_encoder_of_another_kind_is_named(tmp_path, tiny_state):
    folder = write_release(tmp_path / "release", tiny_state)
    save_file({"embeddings.weight": torch.zeros(3, 3)}, folder / "text_encoder" / "model.safetensors")
    with pytest.raises(UserError, match="no CLIP text encoder"):
        stable_diffusion.load_release(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "decoder"])
def test_a_missing_or_truncated_file_of_a_release_is_named(tmp_path, tiny_state, part):
    folder = write_release(tmp_path / "release", tiny_state)
    file = stable_diffusion.release_file(folder, part)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{part}.*cut short"):
        stable_diffusion.load_release(folder)
    file.unlink()
    with pytest.raises(UserError, match=f"has no {part}/{file.name}"):
        stable_diffusion.load_release(folder)


def test_loading_is_strict_both_ways(tmp_path, tiny_state):
    state = {**tiny_state, "unet.surplus": torch.zeros(1)}
    del state["vae.quant_conv.bias"]
    with pytest.raises(UserError, match="not in the model: unet.surplus.*not in the weights: vae.quant_conv.bias"):
        load(write_release(tmp_path / "release", state))


def test_a_wholebody_head_in_a_body_preset_says_which_preset_it_is():
    state = {"unet.conv_in.weight": torch.zeros(320, 4, 3, 3),
             "decoder.final_layer.weight": torch.zeros(133, 640, 1, 1)}
    assert sd.recognise(state) == ("wholebody", 133)
    with pytest.raises(UserError, match="133 keypoints.*--preset wholebody"):
        sd.convert_official(state, sd.PRESETS["body"])


def test_old_names_and_shapes_of_the_vae_attention_are_read(tmp_path, tiny_state):
    old = dict(to_q="query", to_k="key", to_v="value")
    state = {}
    for name, value in tiny_state.items():
        if ".mid_block.attentions.0.to_" in name and name.startswith("vae."):
            part = name.split(".")[5]
            name = name.replace(".to_out.0.", ".proj_attn.") if part == "to_out" else name.replace(part, old[part])
            value = value[:, :, None, None] if name.endswith("weight") else value
        state[name] = value
    own = load(write_release(tmp_path / "release", state)).state_dict()
    assert all(torch.equal(own[name], value) for name, value in tiny_state.items())


def test_stable_diffusion_starts_all_but_the_task_embedding_and_the_head(tmp_path, tiny_state, capsys):
    state = {name: value for name, value in tiny_state.items() if not name.startswith("unet.class_embedding.")}
    folder, model = write_release(tmp_path / "sd2", state, head=False), small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sd.load_init(model, str(folder))
    for name, value in model.state_dict().items():
        new = name.startswith(("unet.class_embedding.", "decoder."))
        assert torch.equal(value, before[name] if new else state.get(name, value))
    assert "random: unet.class_embedding.* and decoder.*" in capsys.readouterr().out
    with pytest.raises(UserError, match="no decoder/decoder.safetensors"):
        stable_diffusion.load_release(folder)


def test_a_release_starts_a_model_of_other_keypoints_but_for_the_head(tmp_path, tiny_state):
    folder, model = write_release(tmp_path / "release", tiny_state), small("crowdpose")
    sd.load_init(model, str(folder))
    assert torch.equal(model.unet.conv_out.weight, tiny_state["unet.conv_out.weight"])
    assert model.decoder.final_layer.out_channels == 14
    with pytest.raises(UserError, match="no folder nowhere.*--init ''"):
        sd.load_init(model, "nowhere")


@pytest.mark.parametrize("wrong, reason", [
    (dict(height=100), "multiple of 8"), (dict(channels=40), "multiple of 24"), (dict(tap=1), "--tap 1"),
    (dict(vae_channels=5), "multiple of 2")])
def test_sizes_that_no_run_could_use_are_refused(wrong, reason):
    with pytest.raises(UserError, match=reason):
        sd.build("tiny", **wrong)


def test_the_sample_file_is_read_as_the_release_writes_it():
    file = FOLDER / "golden_sample.safetensors"
    if not file.exists():
        pytest.skip("no sample file")
    case, _ = read_case(FOLDER / "golden_sample_safetensors.npz")
    read = weights.load_tensors(file)
    assert {name.replace(".", "__") for name in read} == case.keys()
    for name, value in read.items():
        theirs = torch.from_numpy(np.asarray(case[name.replace(".", "__")]))
        assert value.shape == theirs.shape and torch.equal(value.to(theirs.dtype), theirs)
