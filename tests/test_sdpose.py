"""SDPose against the released code's numbers, and by itself. Cases are found by file pattern (see golden())."""
import ast
import inspect
import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sdpose as sd
from common import weights
from common.errors import UserError
from common.skeletons import get_skeleton
from tests.helpers import close, fill, golden, normal, read_case, reference, watch

TEXT_TENSOR = {"^text$": "not in the manifests, set by the tests"}
SKELETONS = {17: "coco", 133: "wholebody", 14: "crowdpose", 21: "humanart21"}


@lru_cache
def read_manifest(name: str) -> dict:
    return json.loads(reference(f"sdpose/{name}").read_text())


def manifest_config(name: str, **changes) -> sd.Config:
    """The sizes that a manifest's config tells."""
    config = read_manifest(name)["config"]
    unet, vae, head = config["unet"], config["vae"], config["head"]
    channels, ratios = unet["block_out_channels"], (1, 2, 4, 4)
    assert [width // channels[0] for width in channels] == [*ratios], "Stable Diffusion 2's"
    assert [width // vae["block_out_channels"][0] for width in vae["block_out_channels"]] == [*ratios]
    head_dim = channels[0] // unet["num_heads_per_block"][0]
    assert [width // head_dim for width in channels] == unet["num_heads_per_block"]
    return replace(sd.PRESETS["body"], channels=channels[0], head_dim=head_dim, groups=unet["norm_num_groups"],
                   text_dim=unet["cross_attention_dim"], vae_channels=vae["block_out_channels"][0],
                   tap=3 if head["in_channels"] == channels[0] else 2, checkpointing=False, **changes)


def manifest_model(name: str) -> sd.SDPose:
    """An SDPose without numbers of the sizes of a manifest."""
    with torch.device("meta"):
        return sd.SDPose(manifest_config(name),
                         get_skeleton(SKELETONS[read_manifest(name)["config"]["head"]["num_keypoints"]]))


@lru_cache
def reference_model(name: str, seed: int, dtype: torch.dtype = torch.float32) -> sd.SDPose:
    """The model of a manifest with the reference's weights, and its text."""
    model = manifest_model(name).to_empty(device="cpu").to(dtype).eval().requires_grad_(False)
    state = {key: fill(key, tuple(shape), seed) for key, shape in read_manifest(name)["keys"].items()}
    weights.load_strict(model, sd.convert_official(state, model.cfg), TEXT_TENSOR)
    model.text.copy_(normal("empty_text", model.text.shape, seed))
    return model


def inputs(meta: dict, batch: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """The image and the latent of a case."""
    (height, width), seed = meta["image_size"], meta["seed"]
    image = np.tanh(normal("input", (batch, 3, height, width), seed).numpy())      # torch's differs in the last bit
    return torch.from_numpy(image).to(dtype), normal("latent", (batch, 4, height // 8, width // 8), seed).to(dtype)


def stored(ours: torch.Tensor, theirs) -> torch.Tensor:
    """The part of a result that a case stores: every n-th channel and cell, and the first images."""
    assert ours.dim() == theirs.ndim, f"{tuple(ours.shape)} against {theirs.shape}"
    steps = [-(-mine // kept) for mine, kept in zip(ours.shape[1:], theirs.shape[1:])]
    return ours[(slice(theirs.shape[0]), *(slice(None, None, step) for step in steps))]


def check(results: dict, case: dict, tolerance: float) -> None:
    """Compare results by name with the stored parts of a case."""
    for name, result in results.items():
        close(stored(result, case[name]), case[name], tolerance, name)


def last_results(seen: dict) -> dict:
    """What `watch` saw: the result of the last call of each module."""
    return {name: calls[-1][1] for name, calls in seen.items()}


LABELS = torch.tensor([sd.POSE, sd.RGB])


# ------------------------------------------------------------------------------------------ names


@golden("sdpose/manifest_*.json")
def test_every_tensor_of_a_release_has_its_parameter_and_the_other_way_round(file):
    manifest = json.loads(file.read_text())
    if "unet" not in manifest["config"]:
        pytest.skip("of the text encoder")
    model = manifest_model(file.name)
    ours = {name: list(value.shape) for name, value in model.state_dict().items() if name != "text"}
    assert ours == manifest["keys"]
    for part, count in manifest["num_params"].items():
        assert sum(math.prod(shape) for name, shape in ours.items() if name.startswith(part)) == count
    state = {key: torch.empty(shape, device="meta") for key, shape in manifest["keys"].items()}
    assert sd.convert_official(state, model.cfg).keys() == ours.keys()
    name = {3: "body", 2: "wholebody"}[model.cfg.tap]
    known = (name, model.skeleton.num_keypoints) if manifest["config"]["preset"] == "full" else None
    assert sd.recognise(state) == known and sd.recognise({}) is None


def test_no_argument_or_variable_hides_an_imported_module():
    tree = ast.parse(Path(sd.__file__).read_text())
    imported = {alias.asname or alias.name for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names}
    bound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert not imported & bound


def test_what_stands_for_a_section_of_the_paper_carries_its_label():
    for label, place in sd.EQUATIONS.items():
        if place.__module__ == "sdpose":                        # others are common's, which no paper is about
            assert ", ".join(label.split(", ")[:2]) in " ".join(inspect.getsource(place).split()), label


# ------------------------------------------------------------------------------------------ VAE, U-Net, head


@golden("sdpose/golden_vae*.npz")
def test_vae_equals_the_release(file):
    case, meta = read_case(file)
    model = reference_model(meta["manifest"], meta["seed"])
    image, latent = inputs(meta, len(case["mean"]))
    encoder, noise = model.vae.encoder, normal("vae_noise", latent.shape, meta["seed"])
    with watch(enc_conv_in=encoder.conv_in, **{f"enc_down{i}": block for i, block in enumerate(encoder.down_blocks)},
               enc_mid_attn=encoder.mid_block.attentions[0], enc_mid=encoder.mid_block,
               dec_mid=model.vae.decoder.mid_block) as seen:
        mean, logvar = model.posterior(image)
        dec_image = model.decode(latent * sd.LATENT_SCALE)
    check(last_results(seen), case, 2e-5)
    check(dict(mean=mean, logvar=logvar, latent_mode=model.encode(image), latent_sample=model.encode(image, noise)),
          case, 1e-5)
    check(dict(dec_image=dec_image, roundtrip_image=model.vae.decode(mean)), case, 2e-5)


@golden("sdpose/golden_unet*.npz")
def test_unet_equals_the_release(file):
    case, meta = read_case(file)
    model = reference_model(meta["manifest"], meta["seed"])
    unet, t = model.unet, torch.full((2,), 999)
    _, latent = inputs(meta, len(case["out"]))
    check(dict(class_labels=sd.task_waves(LABELS), time_sinusoid=sd.time_waves(t, unet.dim)), case, 1e-6)
    down, up = unet.down_blocks, unet.up_blocks
    with watch(time_embedding=unet.time_embedding, class_embedding=unet.class_embedding) as embeddings, watch(
            conv_in=unet.conv_in, down0_resnet0=down[0].resnets[0], down0_attn0=down[0].attentions[0],
            **{f"down{i}": down[i].downsamplers[0] for i in range(3)}, down3=down[3].resnets[1], mid=unet.mid_block,
            up0=up[0], up1=up[1], feat_wholebody=up[2]) as seen:
        body = unet(latent, LABELS, model.text, t=t)
        out = unet.output(body)
    check(last_results(embeddings), case, 1e-5)
    check(last_results(seen) | dict(feat_body=body, out=out), case, 3e-5)
    assert torch.equal(unet(latent, LABELS, model.text, tap=2, t=t), last_results(seen)["feat_wholebody"])
    other = unet.output(unet(latent, LABELS, model.text, t=torch.tensor([10, 500])))
    square = normal("latent8", (1, 4, *case["out_16x16"].shape[2:]), meta["seed"])
    features = unet(square, LABELS[:1], model.text)
    check(dict(out_t10_t500=other, out_16x16=unet.output(features)), case, 1e-5)
    check(dict(feat_body_16x16=features), case, 3e-5)


@golden("sdpose/golden_head_*.npz")
def test_head_equals_the_release(file):
    case, meta = read_case(file)
    head = reference_model(meta["manifest"], meta["seed"]).decoder
    (height, width), channels = meta["image_size"], head.final_layer.in_channels
    with watch(deconv=head.deconv_layers, conv=head.conv_layers) as seen:
        heatmaps = head(normal("feature", (len(case["deconv"]), channels, height // 8, width // 8), meta["seed"]))
    check(last_results(seen) | dict(heatmaps=heatmaps), case, 1e-5)


@golden("sdpose/golden_float64*.npz")
def test_everything_equals_the_release_in_float64(file):
    case, meta = read_case(file)
    model = reference_model(meta["manifest"], meta["seed"], torch.float64)
    wholebody = reference_model(meta["manifest_wholebody"], meta["seed"], torch.float64)
    image, latent = inputs(meta, len(case["mean"]), torch.float64)
    mean, logvar = model.posterior(image)
    with watch(tap=model.unet.up_blocks[2]) as seen:
        body = model.unet(latent, LABELS, model.text)
    tap = last_results(seen)["tap"]
    results = dict(mean=mean, logvar=logvar, dec_image=model.vae.decode(latent), feat_body=body, feat_wholebody=tap,
                   out=model.unet.output(body), heatmaps_body=model.decoder(body),
                   heatmaps_wholebody=wholebody.decoder(tap))
    assert results.keys() == case.keys()
    check(results, case, 1e-12)


@golden("sdpose/golden_blocks*.npz")
def test_blocks_of_the_full_width_equal_the_release(file):
    """In float64, so that what differs is the rounding of the stored numbers alone."""
    case, meta = read_case(file)
    manifest, seed = read_manifest(meta["manifest"])["keys"], meta["seed"]
    unet, cfg = manifest_model(meta["manifest"]).unet, manifest_config(meta["manifest"])

    def drawn(key: str, *shape: int) -> torch.Tensor:
        return normal(key, shape, seed).double()

    def filled(path: str) -> torch.nn.Module:
        module = unet.get_submodule(path).to_empty(device="cpu").double().eval().requires_grad_(False)
        prefix = f"unet.{path}."
        state = {key.removeprefix(prefix): fill(key, tuple(shape), seed) for key, shape in manifest.items()
                 if key.startswith(prefix)}
        weights.load_strict(module, state, {})
        return module

    c, (h, w) = cfg.channels, case["resnet_320_640"].shape[2:]
    x, emb, text = drawn("block_input", 1, c, h, w), drawn("block_temb", 1, 4 * c), drawn("empty_text", 1, 2, cfg.text_dim)
    block = filled("down_blocks.1")
    with watch(resnet_320_640=block.resnets[0], transformer_640=block.attentions[0]) as seen:
        skip0, skip1, smaller = block(x, emb, text)
    first = {name: calls[0][1] for name, calls in seen.items()}
    tokens = drawn("block_tokens", *case["basic_transformer_block_640"].shape)
    layer = block.attentions[0].transformer_blocks[0](tokens, text)
    skips = [drawn(f"upblock_skip{i}", 1, width * c, h // 2, w // 2) for i, width in enumerate((1, 2, 2))]
    larger = filled("up_blocks.2")(drawn("upblock_input", 1, 4 * c, h // 2, w // 2), emb, text, [torch.zeros(1, 1, h, w), *skips])
    check(first | dict(basic_transformer_block_640=layer, downblock1_skip0=skip0, downblock1_skip1=skip1,
                       downblock1=smaller, upblock2=larger), case, 3e-5)


@golden("sdpose/golden_tiny_text*.npz")
def test_text_encoder_equals_the_release(file):
    case, meta = read_case(file)
    manifest, state = read_manifest(meta["manifest"]), {}
    for key, shape in manifest["keys"].items():
        state[key.removeprefix("text_encoder.")] = fill(key, tuple(shape), meta["seed"])
    heads = manifest["config"]["num_attention_heads"]
    close(sd.encode_text(state, torch.from_numpy(case["ids"]), heads), case["last_hidden_state"], 1e-5)


def case_crops(case: dict) -> torch.Tensor:
    """The crops (N, 3, H, W) uint8 of a pipeline case; those of the wholebody's are stored with the body's."""
    crops = case["crops"] if "crops" in case else read_case(reference("sdpose/golden_pipeline_body.npz"))[0]["crops"]
    return torch.from_numpy(crops)


@golden("sdpose/golden_pipeline_*.npz")
def test_crops_become_the_heatmaps_of_the_release(file):
    """In float64, so that what differs is the rounding of the stored numbers alone."""
    case, meta = read_case(file)
    model = reference_model(meta["manifest"], meta["seed"], torch.float64)
    images = (case_crops(case).float() / 255 * 2 - 1).double()
    latents, flipped = model.encode(torch.cat([images, images.flip(3)])).chunk(2)     # as prediction does
    features = model.unet(latents, LABELS[:1], model.text, tap=model.cfg.tap)
    heatmaps, mirrored = model.heatmaps(latents), model.heatmaps(flipped)
    check(dict(latent=latents, latent_flipped=flipped), case, 1e-5)
    check(dict(feat=features), case, 3e-5)
    count = case["heatmaps_flipped_input"].shape[1]
    check(dict(heatmaps=heatmaps, heatmaps_flipped_input=mirrored[:, :count]), case, 2e-5)
    both = model.heatmaps(torch.cat([latents, flipped]))                               # in one batch
    close(both, torch.cat([heatmaps, mirrored]), 1e-12)


@golden("sdpose/golden_loss_*.npz")
def test_both_tasks_equal_the_release(file):
    case, meta = read_case(file)
    model = reference_model(meta["manifest"], meta["seed"])
    clean, _ = inputs(meta, len(case["latent_in"]))
    top, bottom, left, right = case["rect"].tolist()
    disturbed = clean.clone()
    disturbed[:, :, top:bottom, left:right] = -1
    latents = model.encode(disturbed)
    result = model(latents)
    check(dict(latent_in=latents, latent_gt=model.encode(clean), pred_rgb_latent=result["latents"]), case, 1e-5)
    check(dict(pred_heatmaps=result["heatmaps"]), case, 2e-5)


@pytest.mark.slow
@golden("sdpose/golden_full*.npz")
def test_full_size_models_equal_the_release(file):
    case, meta = read_case(file)
    image, latent = inputs(meta, len(case["mean"]))
    model = reference_model.__wrapped__(meta["manifest"], meta["seed"])                 # 3.8 GB, not to be kept
    unet = model.unet
    mean, logvar = model.posterior(image)
    z = model.encode(image)
    results = dict(mean=mean, logvar=logvar, latent_mode=z, dec_image=model.vae.decode(latent))
    with watch(time_embedding=unet.time_embedding, class_embedding_pose=unet.class_embedding, conv_in=unet.conv_in,
               **{f"down{i}": unet.down_blocks[i].downsamplers[0] for i in range(3)},
               down3=unet.down_blocks[3].resnets[1], mid=unet.mid_block,
               **{f"up{i}": unet.up_blocks[i] for i in range(4)}) as seen:
        features = unet(z, LABELS[:1], model.text)
    results |= last_results(seen)
    results |= dict(feat_body=features, feat_wholebody=results["up2"], out_pose_label=unet.output(features),
                    heatmaps_body=model.decoder(features))
    with watch(class_embedding_rgb=unet.class_embedding) as rgb:
        results["out_rgb_label"] = model.reconstruct(z)
    results |= last_results(rgb)
    del model, unet
    manifest, wholebody = read_manifest(meta["manifest_wholebody"]), manifest_model(meta["manifest_wholebody"])
    head = wholebody.decoder.to_empty(device="cpu")
    weights.load_strict(head, {key.removeprefix("decoder."): fill(key, tuple(shape), meta["seed"])
                               for key, shape in manifest["keys"].items() if key.startswith("decoder.")}, {})
    results["heatmaps_wholebody"] = head(results["up2"])
    assert results.keys() == case.keys()
    check(results, case, 6e-5)                    # rounding alone makes 4e-5 of the largest number, on either side


# ------------------------------------------------------------------------------------------ the model by itself


def small(skeleton: str = "coco", **overrides) -> sd.SDPose:
    return sd.build("tiny", skeleton, **dict(channels=16, head_dim=8, groups=4, vae_channels=4) | overrides)


def test_the_up_block_after_the_feature_tap_is_not_run():
    model = small("wholebody", tap=2).eval().requires_grad_(False)
    latents, emb = torch.randn(1, 4, 16, 12), model.task(sd.POSE)
    with watch(tap=model.unet.up_blocks[2], last=model.unet.up_blocks[3]) as seen:
        heatmaps = model.heatmaps(latents)
        assert not seen["last"]
        model.unet(latents, emb, model.text)
    assert seen["last"] and torch.equal(model.decoder(seen["tap"][-1][1]), heatmaps)


@pytest.mark.parametrize("tap", [3, 2])
def test_checkpointing_changes_no_gradient(tap):
    latents, gradients = torch.randn(2, 4, 8, 8), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = small(tap=tap, checkpointing=checkpointing).train()
        result = model(latents)
        (result["heatmaps"].square().sum() + result["latents"].square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if not name.startswith("vae.")})
    kept, again = gradients
    assert None not in kept.values() and all(torch.equal(kept[name], again[name]) for name in kept)


def test_one_batch_of_both_tasks_equals_two_passes():
    model = small().double().requires_grad_(False)
    torch.nn.init.normal_(model.decoder.final_layer.weight)
    latents = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    features = model.unet(latents.repeat(2, 1, 1, 1), LABELS.repeat_interleave(2, 0), model.text)
    result = model(latents)
    close(model.decoder(features[:2]), result["heatmaps"], 1e-10)
    close(model.unet.output(features[2:]), result["latents"], 1e-12)
    assert model(latents, reconstruct=False).keys() == {"heatmaps"}


def test_crops_that_are_encoded_in_parts_have_the_latents_and_gradients_of_the_plain_form(monkeypatch):
    monkeypatch.setattr(sd, "PIXELS", 2 * 32 * 24)
    images, noise = torch.rand(5, 3, 32, 24, dtype=torch.float64), torch.randn(5, 4, 4, 3, dtype=torch.float64)
    results = {}
    for form, parts in ("auto", 3), ("plain", 1):
        monkeypatch.setenv("POSE_KERNELS", form)
        torch.manual_seed(0)
        model = small().double()
        model.vae.requires_grad_(True)
        with watch(encoder=model.vae.encoder, decoder=model.vae.decoder) as seen:
            latents, pictures = model.encode(images, noise), model.decode(noise)
        assert len(seen["encoder"]) == len(seen["decoder"]) == parts
        (latents.square().sum() + pictures.square().sum()).backward()
        results[form] = [latents, pictures, *(p.grad for p in model.vae.parameters())]
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(*results.values(), strict=True))


@pytest.mark.slow
@golden("sdpose/golden_pipeline_*.npz")
def test_the_plain_form_equals_the_release(file, monkeypatch):
    monkeypatch.setenv("POSE_KERNELS", "plain")
    test_crops_become_the_heatmaps_of_the_release(file)


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
@pytest.mark.parametrize("amp, most", [("no", 5.5e9), ("bf16", 4.7e9)])
def test_prediction_of_a_full_size_crop_and_its_mirror_image_needs_what_the_docstring_says(amp, most, monkeypatch):
    def autocast(device, amp, keep_casts):                              # as on a GPU
        return torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16", cache_enabled=keep_casts)
    monkeypatch.setattr(sd, "autocast", autocast)
    with FakeTensorMode(), LiveBytes() as live, torch.no_grad():
        model = sd.build("body", amp=amp).eval()
        sd.average_heatmaps(model, full_size_crops(model, 1))
    print(f"peak {live.peak / 1e9:.2f} GB, largest tensor {live.largest / 1e9:.2f} GB")
    assert live.peak < most                                             # workspaces of convolutions come on top
    assert live.largest < 0.41e9                                        # scores of 12288 tokens would take 0.6


@pytest.mark.slow
def test_training_on_one_full_size_crop_needs_what_the_docstring_says():
    with FakeTensorMode(), LiveBytes() as live:
        model = sd.build("body")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):                                              # only then is the optimizer's state there
            latents = model.encode(full_size_crops(model, 2))           # disturbed and clean
            result = model(latents[:1])
            (result["heatmaps"].square().mean() + (result["latents"] - latents[1:]).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            del result
    print(f"peak {live.peak / 1e9:.2f} GB, largest tensor {live.largest / 1e9:.2f} GB")
    assert live.peak < 16e9 and live.largest < 0.41e9


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
    weights.load_strict(model, sd.convert_official(sd.read_release(folder), model.cfg), {})
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
        assert model.heatmaps(model.encode(torch.zeros(1, 3, 32, 24))).isfinite().all()


def test_a_release_whose_unet_is_in_shards_is_joined(tmp_path, tiny_state):
    folder = write_release(tmp_path / "release", tiny_state)
    whole, before = sd.release_file(folder, "unet"), sd.read_release(folder)
    tensors, where = weights.load_tensors(whole), {}
    for n in range(2):
        name = f"{whole.stem}-0000{n + 1}-of-00002.safetensors"
        part = dict(list(tensors.items())[n::2])
        save_file(part, whole.with_name(name))
        where |= dict.fromkeys(part, name)
    whole.unlink()
    Path(f"{whole}.index.json").write_text(json.dumps(dict(weight_map=where)))
    joined = sd.read_release(folder)
    assert joined.keys() == before.keys() and all(torch.equal(joined[name], x) for name, x in before.items())


def test_the_text_encoder_is_read_once(tmp_path, tiny_state):
    folder = write_release(tmp_path / "release", tiny_state)
    first = sd.read_release(folder)["text"]
    (folder / "text_encoder" / "model.safetensors").unlink()
    assert torch.equal(sd.read_release(folder)["text"], first) and first.shape == (1, 2, 64)
    assert (folder / sd.EMPTY_TEXT).stat().st_size < 16_000
    (folder / sd.EMPTY_TEXT).unlink()
    with pytest.raises(UserError, match="text_encoder/model.safetensors"):
        sd.read_release(folder)


def test_fetching_wants_no_text_encoder_once_its_embedding_is_there(tmp_path, monkeypatch):
    release = weights.RELEASES["sdpose-body"]
    encoder, kept = release.made_of
    assert encoder in release.files and kept == f"sdpose-body/{sd.EMPTY_TEXT}"
    for file in {*release.files, kept} - {encoder}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setenv("POSE_CACHE", str(tmp_path))
    assert weights.fetch("sdpose-body") == tmp_path / "sdpose-body"
    (tmp_path / kept).unlink()
    assert release.missing(tmp_path) == [encoder]


def test_a_text_encoder_of_another_kind_is_named(tmp_path, tiny_state):
    folder = write_release(tmp_path / "release", tiny_state)
    save_file({"embeddings.weight": torch.zeros(3, 3)}, folder / "text_encoder" / "model.safetensors")
    with pytest.raises(UserError, match="no CLIP text encoder"):
        sd.read_release(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "decoder"])
def test_a_missing_or_truncated_file_of_a_release_is_named(tmp_path, tiny_state, part):
    folder = write_release(tmp_path / "release", tiny_state)
    file = sd.release_file(folder, part)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{part}.*cut short"):
        sd.read_release(folder)
    file.unlink()
    with pytest.raises(UserError, match=f"has no {part}/{file.name}"):
        sd.read_release(folder)


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
    assert "9  decoder.*, unet.class_embedding.*\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="no decoder/decoder.safetensors"):
        sd.read_release(folder)


@pytest.mark.slow
def test_without_the_prior_the_vae_and_the_text_are_loaded_and_the_unet_stays_random(tmp_path, tiny_state, capsys):
    folder, model = write_release(tmp_path / "release", tiny_state), small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sd.load_init(model, str(folder), "vae")
    own = model.state_dict()
    assert all(torch.equal(own[name], value if name.startswith("vae.") else before[name])
               for name, value in tiny_state.items())
    assert torch.equal(own["text"], sd.empty_text(folder)) and not torch.equal(own["text"], before["text"])
    assert "  decoder.*, unet.*\n" in capsys.readouterr().out


def test_a_release_starts_a_model_of_other_keypoints_with_the_rows_that_both_have(tmp_path, tiny_state):
    folder, model = write_release(tmp_path / "release", tiny_state), small("crowdpose")
    sd.load_init(model, str(folder))
    assert torch.equal(model.unet.conv_out.weight, tiny_state["unet.conv_out.weight"])
    head = model.decoder.final_layer
    assert head.out_channels == 14 and torch.equal(head.weight[:12], tiny_state["decoder.final_layer.weight"][5:])
    with pytest.raises(UserError, match="no folder nowhere.*--init ''"):
        sd.load_init(model, "nowhere")


@pytest.mark.parametrize("wrong, reason", [
    (dict(height=100), "multiple of 8"), (dict(channels=40), "multiple of 24"), (dict(tap=1), "--tap 1"),
    (dict(channels=15, head_dim=15, groups=1), "multiple of 30"), (dict(sigma=1e300), "--sigma 1e.300"),
    (dict(vae_channels=5), "multiple of 2"), (dict(init_parts="vae"), "takes a part of --init"),
    (dict(init_parts="unet"), "choose from all, vae")])
def test_sizes_that_no_run_could_use_are_refused(wrong, reason):
    with pytest.raises(UserError, match=reason):
        sd.build("tiny", **wrong)


def test_the_sample_file_is_read_as_the_release_writes_it():
    case, _ = read_case(reference("sdpose/golden_sample_safetensors.npz"))
    read = weights.load_tensors(reference("sdpose/golden_sample.safetensors"))
    assert {name.replace(".", "__") for name in read} == case.keys()
    for name, value in read.items():
        theirs = torch.from_numpy(np.asarray(case[name.replace(".", "__")]))
        assert value.shape == theirs.shape and torch.equal(value.to(theirs.dtype), theirs)
