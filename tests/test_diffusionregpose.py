"""DiffusionRegPose against the released code's numbers, and by itself. Cases are found by file pattern."""
import importlib
import json
import math
import re
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import diffusionregpose as drp
from common import transforms, weights
from common.cli import parse, resolve
from common.errors import UserError
from common.heatmaps import people_heatmaps
from common.oks import similarity_of
from common.predict import collate
from common.ranks import Ranks, seed_all
from common.records import Sample, gather_people
from common.run import RunFolder
from common.skeletons import Skeleton, flip_from_names, get_skeleton
from common.splits import open_dataset
from data import puppets
from diffusionregpose import Output, People
from tests.helpers import assert_equal, close, fill, golden, normal, read_case, reference, watch

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
SMALL = dict(dim=32, heads=4, ffn=32, layers=2, box_queries=12, queries=5, dn_queries=4, short_side=64, long_side=64,
             oks_score_from=1)
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
LEVELS = [(6, 8), (3, 4), (2, 2), (1, 1)]                   # of the goldens of single blocks
SKELETON_OF = {17: "coco", 14: "crowdpose"}


@lru_cache
def official_state(name: str) -> dict[str, torch.Tensor]:
    """All tensors of a released file, the doubled ones and the constants as well."""
    manifest, made, state = json.loads(reference(f"diffusionregpose/{name}").read_text()), {}, {}
    for key, shape in manifest["keys"].items():
        key_of_weight = manifest["aliases"].get(key, key)
        if key_of_weight not in made:
            gain = torch.tensor(manifest["gains"].get(key_of_weight, 1.0))
            made[key_of_weight] = fill(key_of_weight, shape, manifest["seed"]) * (
                gain.view(-1, *[1] * (len(shape) - 1)) if gain.dim() else gain)
        state[key] = made[key_of_weight]
    return state | {constant: torch.zeros(1000, dtype=torch.float64) for constant in manifest["constants"]}


@lru_cache
def official_model(name: str = "manifest_coco.json", queries: int = 100, box_queries: int = 900):
    """Our model with the reference's weights, shared by the tests: do not change it."""
    preset, keypoints = drp.recognise(official_state(name))
    model = drp.build(preset, SKELETON_OF[keypoints], queries=queries, box_queries=box_queries)
    weights.load_strict(model, drp.convert_official(official_state(name), model.cfg), {})
    return model.eval().requires_grad_(False)


def model_of(meta: dict) -> drp.DiffusionRegPose:
    """The model that the meta entry of a golden file asks for; without one the file's is COCO's."""
    manifest = meta.get("manifest", "manifest_coco.json")
    return official_model(manifest, meta.get("num_people", 100), meta.get("num_queries", 900))


def pictures_of(meta: dict) -> list[torch.Tensor]:
    return [normal(key, (3, *shape), meta["seed"]) for key, shape in zip(meta["input_keys"], meta["images"])]


def level_masks(case: dict) -> list[torch.Tensor]:
    """A mask (B, H, W) for each level, of the case's (B, N)."""
    levels = [tuple(shape) for shape in case.get("spatial_shapes", np.array(LEVELS)).tolist()]
    parts = torch.from_numpy(case["padding_mask"]).split([h * w for h, w in levels], 1)
    return [part.view(-1, *shape) for part, shape in zip(parts, levels)]


# ------------------------------------------------------------------------------------------ blocks


@golden("diffusionregpose/golden_resnet50*.npz")
def test_backbone_equals_the_release(file):
    case, meta = read_case(file)
    model, (h, w) = model_of(meta), (8 * n for n in case["mask3"].shape[1:])
    image = normal("input", (1, 3, h, w), meta.get("seed", 0))
    for net in (model, drp.fuse(model)):                    # folding the norms must not change the result
        for level, x in enumerate(net.backbone(image)[1:], 3):
            close(x[:, ::2], case[f"c{level}"], 1e-4, f"level {level}")
    padded = torch.zeros(1, h, w, dtype=torch.bool)
    padded[:, 90:], padded[:, :, 100:] = True, True
    grid = model.encode_image(image, padded).grid
    for level, mask in zip((3, 4, 5), grid.padded.split([h * w for h, w in grid.shapes], 1)):
        assert (mask.view(case[f"mask{level}"].shape).numpy() == case[f"mask{level}"]).all()


@golden("diffusionregpose/golden_embeddings*.npz")
def test_embeddings_equal_the_release(file):
    case, meta = read_case(file)
    time, dim = model_of(meta).time_embedding, case["pos5"].shape[1]
    h, w = (8 * n for n in case["pos3"].shape[2:])
    padded = torch.zeros(1, h, w, dtype=torch.bool)
    padded[:, 90:], padded[:, :, 100:] = True, True
    for stride, step, name in (8, 3, "pos3"), (32, 1, "pos5"):
        mask = F.interpolate(padded[None].float(), (h // stride, w // stride))[0].bool()
        position = drp.cell_positions([mask], dim).view(1, *mask.shape[1:], dim).permute(0, 3, 1, 2)
        close(position[:, ::step], case[name], 1e-5)
    boxes = normal("sine", case["sine_query_in"].shape, meta.get("seed", 0)).sigmoid()
    close(boxes, case["sine_query_in"], 1e-6)
    close(drp.sine_embedding(boxes[..., [1, 0, 2, 3]], dim // 2, 10000), case["sine_query"], 1e-5)
    with watch(mlp=time.mlp, middle=time.mlp[2]) as seen:
        s = time(torch.from_numpy(case["t"]))
    close(seen["mlp"][0][0][0], case["time_sinusoid"], 1e-4)
    close(seen["middle"][0][1], case["time_mlp"], 1e-4)
    close(s, case["scale_shift"], 1e-4)


@golden("diffusionregpose/golden_deform_attn*.npz")
def test_deformable_attention_equals_the_release(file):
    case, meta = read_case(file)
    model, masks, seed = model_of(meta), level_masks(case), meta.get("seed", 0)
    grid, (b, q, dim) = drp.make_grid(masks), case["out2d"].shape
    assert [tuple(mask.shape[1:]) for mask in masks] == grid.shapes
    layers = {"2d": model.encoder[0].self_attn, "4d": model.decoder.layers[0].cross_attn}
    for kind, layer in layers.items():
        places = torch.from_numpy(case[f"ref{kind}"])
        close(places, normal(f"ref{kind[0]}", places.shape, seed).sigmoid(), 1e-6)
        value = normal("value", (b, grid.padded.shape[1], dim), seed)
        with watch(out=layer.output_proj) as seen:
            out = layer(normal("query", (b, q, dim), seed), places, value, grid)
        close(seen["out"][0][0][0], case[f"core{kind}"], 1e-5, "before the output projection")
        close(out, case[f"out{kind}"], 1e-5)


@golden("diffusionregpose/golden_encoder_layer*.npz")
def test_encoder_layer_equals_the_release(file):
    case, meta = read_case(file)
    grid, seed = drp.make_grid(level_masks(case)), meta.get("seed", 0)
    close(grid.valid, case["valid_ratios"], 1e-6)
    close(grid.centres[:, :, None] * grid.valid[:, None], case["reference_points"], 1e-5)
    x, position = (normal(key, case["out"].shape, seed) for key in ("src", "pos"))
    close(model_of(meta).encoder[0](x, position, grid), case["out"], 1e-4)


@golden("diffusionregpose/golden_decoder_layer*.npz")
def test_decoder_layer_equals_the_release(file):
    case, meta = read_case(file)
    model, seed, (tokens, b, dim) = model_of(meta), meta.get("seed", 0), case["out"].shape
    if "padding_mask" not in case:                          # then it is that of the encoder layer's case
        case |= dict(padding_mask=read_case(file.with_name(file.name.replace("decoder", "encoder")))[0]["padding_mask"])
    grid = drp.make_grid(level_masks(case))
    allowed = ~torch.from_numpy(case["attn_mask"]).view(b, -1, tokens, tokens)
    boxes = normal("dref", (tokens, b, 4), seed).sigmoid().transpose(0, 1)
    inside = boxes[:, :, None] * grid.valid.repeat(1, 1, 2)[:, None]
    close(inside.transpose(0, 1), case["reference_input"], 1e-5)
    sine = drp.sine_embedding(inside[:, :, 0, [1, 0, 2, 3]], dim // 2, 10000)
    close(sine.transpose(0, 1), case["query_sine"], 1e-4)
    close(model.decoder.position_head(sine).transpose(0, 1), case["query_pos_from_head"], 1e-4)
    x, position = (normal(key, (tokens, b, dim), seed).transpose(0, 1) for key in ("tgt", "query_pos"))
    memory = normal("memory", (b, grid.padded.shape[1], dim), seed)
    out = model.decoder.layers[0](x, position, inside, memory, grid,
                                  lambda q, k, v: F.scaled_dot_product_attention(q, k, v, allowed))
    close(out.transpose(0, 1), case["out"], 1e-4)


@golden("diffusionregpose/golden_proposals*.npz")
def test_proposals_equal_the_release(file):
    case, meta = read_case(file)
    proposals, usable = drp.box_proposals(drp.make_grid(level_masks(case)))
    close(proposals, case["proposals"], 1e-4)
    memory = normal("memory", (*usable.shape, 8 * case["memory_out"].shape[2]), meta.get("seed", 0))
    close(memory.masked_fill(~usable[..., None], 0)[:, :, ::8], case["memory_out"], 1e-6)


# ------------------------------------------------------------------------------------------ the whole model


def by_person(x: torch.Tensor, people: int) -> torch.Tensor:
    """Our order, all boxes then all keypoints, → the release's: each person's box, then its keypoints."""
    return torch.cat([x[:, :people, None], x[:, people:].unflatten(1, (people, -1))], 2).flatten(1, 2)


def rows_of(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.take_along_dim(index[..., None], 1)


def check_encoder(case, seen, step: int, wide: int):
    args, first = seen["encoder"][0]
    for what, x in dict(enc_src=args[0], enc_pos=args[1], enc_layer0=first, memory=seen["last"][0][1]).items():
        close(x[:, ::step, ::wide], case[what], 1e-4, what)
    close(args[2].valid, case["enc_valid_ratios"], 1e-6)
    assert [list(shape) for shape in args[2].shapes] == case["enc_spatial_shapes"].tolist()
    assert (args[2].padded.numpy() == case["enc_padding_mask"]).all()
    close(seen["score"][0][1], case["enc_class"], 1e-4, "scores of all cells")


def check_decoder(case, seen, people: int, wide: int, score_head):
    """Queries of the box layers are stored by ascending cell, people by rank."""
    scores = seen["score"][0][1].max(-1).values
    cells = scores.topk(seen["selection"][0][1][0].shape[1]).indices                    # (B, Q)
    assert (cells.sort().values.numpy() == case["topk_token_ids_sorted"]).all()
    rows = cells.argsort()[:, ::int(case["box_layer_row_stride"][0])]
    proposals = seen["selection"][0][1][1]
    close(rows_of(proposals.logits, rows), case["interm_logits_sorted"], 1e-4)
    close(rows_of(proposals.boxes, rows), case["interm_boxes_sorted"], 1e-4)
    for l in (0, 1):
        close(rows_of(seen["references"][l], rows), case[f"ref{l}_sorted"], 1e-4, f"reference {l}")
        close(rows_of(seen["hs"][l], rows)[..., ::wide], case[f"hs{l}_sorted"], 1e-3, f"features {l}")
    rank = score_head(seen["layers"][1][0]).max(-1).values.topk(people)
    assert (cells.gather(1, rank.indices).numpy() == case["selected_token_ids"]).all()
    close(rank.values, case["selected_scores"], 1e-4)
    close(seen["ksa"][0][0][0], case["noisy_pose_01"], 1e-5)
    (z, _), moved = seen["kca"][0]
    # the release overwrites its coarse keypoints, so the file has K-CA's output there, and z minus that for K-SA's
    close(z, case["ksa_out_xy"] + case["coarse_kpt_xy"], 1e-4, "K-SA and coarse keypoints")
    close(moved, case["coarse_kpt_xy"], 1e-4, "K-CA")
    close(by_person(seen["references"][2], people), case["ref2"], 1e-4, "after K-CA")
    for l in (2, 3, 4, 5):
        close(by_person(seen["hs"][l], people)[:, ::11, ::wide], case[f"hs{l}"], 1e-3, f"features {l}")
    refs = torch.stack([by_person(r, people) for r in seen["references"][3:]])
    tokens = refs.shape[2] // people
    close(refs[:, :, ::tokens], case["refs3to5_box"], 1e-4)
    close(refs[:, :, :10 * tokens], case["refs3to5_kpt_first10"], 1e-4)


def watch_model(model, images, padded, x, t: int):
    """A forward pass of one DDIM step from x, and what the model's parts took and gave."""
    decoder = model.decoder
    parts = dict(encoder=model.encoder[0], last=model.encoder[-1], score=model.selection.score, ksa=decoder.ksa,
                 selection=model.selection, kca=decoder.kca, time=model.time_embedding,
                 mlp=model.time_embedding.mlp[2])
    layers = {f"layer{l}": layer for l, layer in enumerate(decoder.layers)}
    with watch(**parts, **layers) as seen:
        result = model(images, padded, drp.to_poses(x, model.cfg.scale), torch.full((len(images),), t))
    seen["layers"] = [(seen[name][0][1], *seen[name][0][0]) for name in layers]
    valid = seen["encoder"][0][0][2].valid[:, :1].repeat(1, 1, 2)                       # (B, 1, 4) of level 0
    seen["references"] = [inside[:, :, 0] / valid for _, _, _, inside, *_ in seen["layers"]]
    seen["hs"] = [decoder.norm(out) for out, *_ in seen["layers"]]
    return result, seen


@golden("diffusionregpose/golden_forward_*.npz")
def test_forward_equals_the_release(file):
    case, meta = read_case(file)
    model = model_of(meta)
    people, k = meta["num_people"], model.skeleton.num_keypoints
    images, padded = drp.pad_images(pictures_of(meta))
    x = normal("noise", (len(images), people, 2 * k), meta["seed"]).unflatten(2, (k, 2))
    result, seen = watch_model(model, images, padded, x, meta["t"])
    for level, y in enumerate(model.backbone(images)[1:], 3):
        close(y[:, ::32, ::2, ::2], case[f"backbone_c{level}"], 1e-4, f"level {level}")
    close(seen["mlp"][0][1].reshape(case["time_embedding"].shape), case["time_embedding"], 1e-4)
    close(seen["time"][0][1].reshape(case["time_scale_shift"].shape), case["time_scale_shift"], 1e-4)
    check_encoder(case, seen, meta["token_stride"], meta["channel_stride"])
    check_decoder(case, seen, people, meta["channel_stride"], model.decoder.score_heads[1])
    close(result["logits"], case["pred_logits"], 1e-4)
    close(result["boxes"], case["pred_boxes"], 1e-4)
    close(result["keypoints"].flatten(2), case["pred_keypoints"][..., :2 * k], 1e-4)
    _, x0, eps = drp.ddim_step(x, result["keypoints"], meta["t"], 0, model.cfg.scale)
    close(x0.flatten(2), case["x_start"], 1e-4)
    close(eps.flatten(2), case["pred_noise"], 1e-4)


@pytest.mark.slow
@golden("diffusionregpose/golden_forward_*.npz")
def test_forward_by_the_formulas_alone_equals_the_release(file, monkeypatch):
    monkeypatch.setenv("POSE_KERNELS", "plain")
    test_forward_equals_the_release(file)


def test_fast_forms_equal_the_formulas_in_values_and_gradients(monkeypatch):
    """Boxes alone and people of K keypoints, in float64; the MLP's chunks, which have no gradient."""
    for people, keypoints in (9, 0), (4, 3), (5, 1):
        tokens = people * (1 + keypoints)
        qkv = normal("qkv", (3, 2, 2, tokens, 8)).double().requires_grad_()
        given = normal("given", (2, 2, tokens, 8)).double()
        found = []
        for word in ("auto", "plain"):
            monkeypatch.setenv("POSE_KERNELS", word)
            out = drp.attention_rule(None, people, keypoints, CPU)(*qkv)
            found.append((out, *torch.autograd.grad(out, qkv, given)))
        for fast, formula in zip(*found):
            close(fast, formula, 1e-12)
    mlp, x = drp.MLP(4, 8, 2).double(), normal("x", (2, 2500, 4)).double()
    with torch.no_grad():
        plain = mlp(x)
        monkeypatch.setenv("POSE_KERNELS", "auto")
        close(mlp(x), plain, 1e-14)


# ------------------------------------------------------------------------------------------ diffusion


@golden("diffusionregpose/golden_ddim*.npz")
def test_schedule_and_noising_equal_the_release(file):
    (case, _), alpha_bar = read_case(file), drp.ALPHA_BAR
    before = torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    index = torch.from_numpy(case["index"])
    for name, ours in dict(alphas_cumprod=alpha_bar, alphas_cumprod_prev=before, betas=1 - alpha_bar / before,
                           sqrt_recipm1_alphas_cumprod=(1 / alpha_bar - 1).sqrt()).items():
        theirs = torch.from_numpy(case[f"{name}_f64"])
        assert torch.allclose(ours[index], theirs, rtol=1e-9, atol=1e-12), name
    pose, eps = (torch.from_numpy(case[name]).unflatten(1, (-1, 2))[None] for name in ("q_pose", "q_noise"))
    times = [int(name.removeprefix("q_sample_01_t")) for name in case if name.startswith("q_sample_01_t")]
    assert times
    for t in times:
        noisy = drp.noise_poses(pose, torch.tensor([t]), eps, float(case["scale"][0]))
        close(noisy[0].flatten(1), case[f"q_sample_01_t{t}"], 1e-5, f"t = {t}")


@golden("diffusionregpose/golden_ddim*.npz")
def test_ddim_equals_the_release(file):
    case, meta = read_case(file)
    x, pose = (torch.from_numpy(case[name]).unflatten(2, (-1, 2)) for name in ("ddim_x", "ddim_pose"))
    steps = [name.split("_")[2:] for name in case if name.startswith("ddim_next_")]
    for t, after in steps:
        new, _, eps = drp.ddim_step(x, pose, int(t), int(after), float(case["scale"][0]))
        close(eps.flatten(2), case[f"ddim_noise_{t}"], 1e-5)
        close(new.flatten(2), case[f"ddim_next_{t}_{after}"], 1e-5)
    meta = dict(seed=0, num_people=10, num_queries=120, images=[[192, 256]], input_keys=["input"]) | meta
    count = sum(name.startswith("loop_t_") for name in case)
    assert steps and count
    model, images = model_of(meta), drp.pad_images(pictures_of(meta))
    noise = normal("noise", case["loop_x_0"].shape, meta["seed"]).unflatten(2, (-1, 2))
    results = drp.sample(model, *images, steps=count, noise=noise)
    assert [r["t"] for r in results] == [int(case[f"loop_t_{i}"][0]) for i in range(count)]
    for i, found in enumerate(results):
        close(found["x"].flatten(2), case[f"loop_x_{i}"], 1e-4, f"x before step {i}")
        close(found["logits"], case[f"loop_pred_logits_{i}"], 1e-4)
        close(found["boxes"], case[f"loop_pred_boxes_{i}"], 1e-4)
        poses = found["keypoints"].flatten(2)
        close(poses, case[f"loop_pred_keypoints_{i}"][..., :poses.shape[2]], 1e-4)
        _, x0, eps = drp.ddim_step(found["x"], found["keypoints"], found["t"], 0, model.cfg.scale)
        close(x0.flatten(2), case[f"loop_x_start_{i}"], 1e-4)
        close(eps.flatten(2), case[f"loop_pred_noise_{i}"], 1e-4)


@pytest.mark.parametrize("steps, times", [(1, [999]), (2, [999, 499]), (3, [999, 665, 332]),
                                          (4, [999, 749, 499, 249])])
def test_times_of_ddim(steps, times):
    model = drp.build("tiny", **SMALL).eval()
    assert [result["t"] for result in drp.sample(model, torch.zeros(1, 3, 64, 64), steps=steps)] == times


def test_steps_of_noise_one_by_one_are_the_steps_at_once():
    """Mean and variance of y_t after t steps of eq. 1 are those of eq. 2."""
    mean, variance = 1.0, 0.0
    alpha = drp.ALPHA_BAR / torch.cat([torch.ones(1).double(), drp.ALPHA_BAR[:-1]])
    for t in range(drp.STEPS):
        mean, variance = mean * alpha[t] ** 0.5, variance * alpha[t] + 1 - alpha[t]
        assert torch.allclose(mean ** 2, drp.ALPHA_BAR[t]) and torch.allclose(variance, 1 - drp.ALPHA_BAR[t])


def test_noise_alone_is_a_blob_around_the_middle_of_the_image():
    poses = drp.noise_poses(torch.zeros(1, 100, 17, 2), torch.tensor([999]), torch.randn(1, 100, 17, 2), 6.0)
    assert poses.mean().item() == pytest.approx(0.5, abs=0.01) and poses.std().item() == pytest.approx(1 / 12, rel=0.05)


def test_padding_comes_after_the_ground_truth_poses():
    cfg, counts = resolve(drp.PRESETS["tiny"], queries=6), [3, 0, 8]
    people = [some_people(n) for n in counts]
    noise = drp.draw_pose_noise(counts, 17, cfg, CPU)
    for padding in drp.PADDINGS:
        poses = drp.pad_poses(people, noise, padding)
        assert poses.shape == (3, 6, 17, 2)
        assert torch.equal(poses[0, :3], people[0].poses)
        chosen = {tuple(pose.flatten().tolist()) for pose in poses[2]}             # six of the eight, none twice
        assert len(chosen) == 6 and chosen <= {tuple(pose.flatten().tolist()) for pose in people[2].poses}
    assert (drp.pad_poses(people, noise, "empty")[1] == 0).all()
    assert torch.equal(drp.pad_poses(people, noise, "noise")[1], noise.pad[1])
    repeat = drp.pad_poses(people, noise, "repeat")[0, 3:6]
    assert torch.equal(repeat.sort(0).values, people[0].poses.sort(0).values)
    mean = drp.pad_poses(people, noise, "mean")[0, 3:]
    assert torch.allclose(mean[0] - mean[0].mean(0), mean[2] - mean[2].mean(0), atol=1e-6)


def test_the_mean_pose_for_padding_is_that_of_people_whose_keypoints_are_all_known():
    cfg, people = resolve(drp.PRESETS["tiny"], queries=6), [some_people(3), some_people(1)]
    noise = drp.draw_pose_noise([3, 1], 17, cfg, CPU)
    whole = torch.cat([people[0].poses[:2], people[1].poses])
    people[0].poses[2, 5:] = 0                                      # unlabelled and not completed
    mean = drp.pad_poses(people, noise, "mean")[1, 1:]
    expected = (whole - whole.mean(1, keepdim=True)).mean(0)
    assert torch.allclose(mean - mean.mean(1, keepdim=True), expected.expand(5, -1, -1), atol=1e-6)
    people[0].poses[:, 5], people[1].poses[:, 5] = 0, 0
    assert (drp.pad_poses(people, noise, "mean")[1, 1:] == 0).all(), "nobody is whole: empty poses"


# ------------------------------------------------------------------------------------------ training


def some_people(count: int, keypoints: int = 17) -> People:
    poses = torch.rand(count, keypoints, 2)
    return People(poses, torch.ones(count, keypoints), torch.rand(count, 4) / 2 + 0.2, torch.rand(count), poses)


def noise_of(case: dict, people: list[People]) -> drp.Noise:
    dn = case["rng/dn_label_u"].shape[1]
    rest = [torch.from_numpy(case[f"rng/dn_residue_idx{i}"]) for i in range(len(people))]
    person = [torch.cat([torch.arange(len(one)).repeat(dn // len(one)), some]) for one, some in zip(people, rest)]
    labels = torch.where(torch.from_numpy(case["rng/dn_label_u"]) < 0.5, torch.from_numpy(case["rng/dn_label_new"]), 1)
    return drp.Noise(torch.stack(person), labels, 2 * torch.from_numpy(case["rng/dn_box_u"]) - 1)


def pose_noise_of(case: dict, people: list[People]) -> drp.PoseNoise:
    eps = torch.stack([torch.from_numpy(case[f"rng/diff_noise{i}"]).unflatten(1, (-1, 2)) for i in range(len(people))])
    pad = torch.zeros_like(eps)
    for i, one in enumerate(people):
        if f"rng/diff_pad{i}" in case:
            pad[i, len(one):] = torch.from_numpy(case[f"rng/diff_pad{i}"]).unflatten(1, (-1, 2))
    return drp.PoseNoise(torch.from_numpy(case["t"]), eps, [torch.arange(0)] * len(people), pad)


@golden("diffusionregpose/golden_train_*.npz")
def test_attention_masks_equal_the_release(file):
    case, meta = read_case(file)
    people, dn, counts = meta["num_people"], case["dn_known_labels"].shape[1], [len(one) for one in people_of(case)]
    group = torch.stack([torch.arange(dn) // n for n in counts])
    mask = drp.attention_mask(group, meta["num_queries"], 0, CPU)
    assert (mask.numpy() == ~case["attn_mask_box"]).all()
    theirs = torch.from_numpy(~case["attn_mask_pose"])                     # person after person; we: all boxes first
    keypoints = (theirs.shape[1] - dn) // people - 1
    order = by_person(torch.arange(people * (keypoints + 1))[None, :, None], people)[0, :, 0]
    order = torch.cat([torch.arange(dn), dn + order])
    mask = drp.attention_mask(group, people, keypoints, CPU)
    assert torch.equal(mask[:, order][:, :, order], theirs)
    assert torch.equal(drp.attention_mask(None, people, keypoints, CPU)[0], mask[0, dn:, dn:])
    assert drp.attention_mask(None, people, 0, CPU).all(), "boxes see all boxes"


def test_attention_has_weights_before_anybody_resets_them():
    weight = drp.SelfAttention(32, 4).in_proj_weight.detach()
    assert 0.5 < weight.std() * 64 ** 0.5 < 2 and weight.abs().max() <= (6 / 128) ** 0.5


# ------------------------------------------------------------------------------------------ released files


@golden("diffusionregpose/manifest_*.json")
def test_every_released_tensor_is_used_or_ignored_by_name(file):
    manifest, state = json.loads(file.read_text()), official_state(file.name)
    preset, keypoints = drp.recognise(state)
    model = official_model(file.name)                       # loads strictly
    assert preset == {17: "r50", 14: "r50-crowdpose"}[keypoints]
    ignored = {key for key in state if any(re.match(pattern, key) for pattern in drp.IGNORED)}
    assert ignored == manifest["aliases"].keys() | set(manifest["constants"])
    for key, canonical in manifest["aliases"].items():
        assert torch.equal(state[key], state[canonical]), key
    fresh = drp.build(preset, SKELETON_OF[keypoints])
    counts = [sum(p.numel() for p in fresh.parameters() if p.requires_grad or every) for every in (True, False)]
    assert counts == {17: [49_660_196, 49_437_796], 14: [49_527_324, 49_304_924]}[keypoints]
    key = "transformer.decoder.hw.weight"
    with pytest.raises(UserError, match="keypoint_size"):
        weights.load_strict(model, drp.convert_official({k: v for k, v in state.items() if k != key}, model.cfg), {})
    with pytest.raises(UserError, match="unheard_of"):
        weights.load_strict(model, drp.convert_official(state | {"unheard_of": state[key]}, model.cfg), {})


def test_start_weights_are_a_whole_release_edpose_or_a_resnet(tmp_path):
    state = official_state("manifest_coco.json")
    new = [key for key in state if "time_mlp" in key or ".emb_" in key]
    assert len(new) == 18
    edpose = {key: value for key, value in state.items() if key not in new}
    assert drp.recognise(edpose) == ("r50-edpose", 17)
    resnet = {key.removeprefix("backbone.0.body."): value for key, value in state.items() if "backbone" in key}
    resnet |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000),
               "bn1.num_batches_tracked": torch.tensor(0)}
    average = dict(ema_model={"label_enc.weight": torch.zeros(101, 256)})     # which the release never updates
    files = dict(release=dict(model=state, **average), average=average,
                 edpose=dict(model=edpose), resnet=resnet)
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
    whole = official_model().state_dict()
    for name, parts in dict(release=("",), edpose=("encoder.", "decoder.layers.", "backbone."),
                            resnet=("backbone.",)).items():
        model = drp.build("r50")
        drp.load_init(model, str(tmp_path / f"{name}.pth"))
        equal = {key for key, value in model.state_dict().items() if torch.equal(value, whole[key])}
        assert all(key in equal for key in whole if key.startswith(parts))
        assert name == "release" or "decoder.ksa.key.weight" not in equal
    bare = drp.build("r50-edpose")
    weights.load_strict(bare, drp.convert_official(edpose, bare.cfg), {})
    with pytest.raises(UserError, match="[0-9]+ not in the weights"):
        drp.load_init(model, str(tmp_path / "average.pth"))


# ------------------------------------------------------------------------------------------ by itself


def tiny(**overrides) -> drp.DiffusionRegPose:
    """A tiny model whose heads do not start at zero."""
    model = drp.build("tiny", **dict(queries=10) | overrides)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def shapes_of(output: Output) -> list:
    return [None if x is None else tuple(x.shape) for x in output]


@torch.no_grad()
def test_tiny_model_gives_the_promised_shapes():
    model, images = tiny().train(), torch.randn(2, 3, 96, 128)
    poses, t = torch.rand(2, 10, 17, 2), torch.tensor([3, 999])
    result = model(images, None, poses, t, [some_people(2), some_people(0)])
    last, first = [(2, 10, 2), (2, 10, 4), (2, 10, 17, 2)], [(2, 40, 2), (2, 40, 4), None]
    assert [tuple(result[name].shape) for name in Output._fields] == last
    assert {name: shapes_of(output) for name, output in result["outputs"].items()} == {
        "_0": first, "_1": last, "_2": last, "": last, "_interm": first}
    assert {name: shapes_of(output) for name, output in result["dn_outputs"].items()} == dict.fromkeys(
        ("_0", "_1", "_2", ""), [(2, 10, 2), (2, 10, 4), None])
    assert model.eval()(images, None, poses, t).keys() == set(Output._fields)


@torch.no_grad()
def test_result_depends_on_time_and_noise_unless_it_is_edpose():
    image = torch.randn(1, 3, 96, 128)
    poses, t = torch.rand(2, 1, 10, 17, 2), torch.tensor([[10], [900]])
    for on in (True, False):
        model = tiny(ksa_kca=on)
        first, other_t, other_poses = (model(image, None, poses[i], t[j])["keypoints"]
                                       for i, j in ((0, 0), (0, 1), (1, 0)))
        assert torch.equal(first, other_t) is not on
        assert torch.equal(first, other_poses) is not on
    assert torch.equal(first, model(image, None, None, None)["keypoints"])
    assert len(drp.sample(model, image, steps=4)) == 1


@torch.no_grad()
def test_encoding_an_image_once_serves_all_steps():
    model, image, noise = tiny(), torch.randn(2, 3, 96, 128), torch.randn(1, 10, 17, 2)
    steps = drp.sample(model, image, steps=4, noise=noise)
    for step in steps:
        again = model(image, None, step["noisy"], torch.full((2,), step["t"]))
        assert torch.equal(again["keypoints"], step["keypoints"])
    assert len(steps) == 4
    assert torch.equal(steps[0]["noisy"], drp.to_poses(noise.expand(2, -1, -1, -1), model.cfg.scale))


def surround(model, image: drp.Encoded) -> drp.Encoded:
    """The same cells in a grid of twice the width and height, with random numbers in the padding."""
    masks, tokens = [], []
    for (h, w), part in zip(image.grid.shapes, image.tokens.split([h * w for h, w in image.grid.shapes], 1)):
        mask, cells = torch.ones(1, 2 * h, 2 * w, dtype=torch.bool), 9 * torch.randn(1, 2 * h, 2 * w, model.cfg.dim)
        mask[:, :h, :w], cells[:, :h, :w] = False, part.view(1, h, w, -1)
        masks.append(mask)
        tokens.append(cells.flatten(1, 2))
    return drp.Encoded(torch.cat(tokens, 1), drp.cell_positions(masks, model.cfg.dim), drp.make_grid(masks))


@torch.no_grad()
def test_padding_changes_no_selected_box_and_its_content_changes_nothing():
    model, poses, t = tiny(frozen_norm=True).train(), torch.rand(1, 10, 17, 2), torch.tensor([500])
    image = model.encode_image(torch.randn(1, 3, 64, 96))
    alone, one, other = (model.decode(encoded, poses, t) for encoded in (
        image, surround(model, image), surround(model, image)))
    for expected, found in list(zip(alone["outputs"]["_interm"], one["outputs"]["_interm"]))[:2]:
        close(found, expected, 1e-4)
    for name in ("logits", "boxes", "keypoints"):           # as released, padding shifts the decoder's positions
        close(one[name], other[name], 1e-5, name)


def step_losses(model, images: torch.Tensor, padded: torch.Tensor | None, people: list[People],
                epoch: int = 9) -> dict[str, torch.Tensor]:
    """All loss terms of a training step, as `train` has them."""
    cfg = model.cfg
    noise = drp.draw_pose_noise([len(one) for one in people], model.skeleton.num_keypoints, cfg, CPU)
    noisy = drp.noise_poses(drp.pad_poses(people, noise, cfg.padding), noise.t, noise.eps, cfg.scale)
    result = model(images, padded, noisy, noise.t, people)
    weight = cfg.oks_score_weight if epoch >= cfg.oks_score_from else 0.0
    losses = drp.criterion(result, people, model.sigmas, weight) | dict(unused=result["unused"])
    if cfg.heatmap_weight:
        losses["loss_heatmaps"] = cfg.heatmap_weight * drp.heatmap_loss(result, people)
    return losses


def test_denoising_queries_take_people_in_turn():
    model, counts = tiny(), [3, 0, 25]
    noise = drp.draw_noise(counts, model.cfg, CPU)
    assert noise.person[0, :9].tolist() == [0, 1, 2] * 3
    assert len(set(noise.person[2].tolist())) == 10                                # ten of the 25, none twice
    denoising = drp.denoising_queries([some_people(n) for n in counts], model.noisy_label, model.cfg, noise)
    assert denoising.group.tolist() == [[0] * 3 + [1] * 3 + [2] * 3 + [3], [0] * 10, [0] * 10]
    assert denoising.known.all(1).tolist() == [True, False, True]
    bare = tiny(dn_queries=0).train()(torch.randn(1, 3, 96, 128), None, torch.rand(1, 10, 17, 2), torch.tensor([3]),
                                      [some_people(1)])
    assert bare["denoising"] is None and not bare["dn_outputs"]


def test_k_sa_and_k_ca_learn_from_the_first_keypoint_layer_alone():
    """What the docstring of Decoder says: coordinates pass a gradient through one layer, so of all loss terms two
    reach the attentions; a later layer's reach its own head and that of the layer before; sizes never learn."""
    model = tiny(box_layers=2, layers=5).train()
    losses = step_losses(model, torch.randn(2, 3, 96, 128), None, [some_people(2), some_people(1)])
    decoder = model.decoder
    watched = dict(ksa=decoder.ksa.query.weight, kca=decoder.kca.value.weight,
                   coarse=decoder.coarse_head.layers[0].weight, head3=decoder.pose_heads[1].layers[0].weight,
                   size=decoder.size_head.layers[0].weight, sizes=decoder.keypoint_size.weight)
    taught = {name: set() for name in watched}
    for term, loss in losses.items():
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(watched.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(watched, gradients):
                if gradient is not None and gradient.any():
                    taught[name].add(term)
    first = {"loss_keypoints_2", "loss_oks_2"}
    assert taught["ksa"] == taught["kca"] == taught["coarse"] == first
    assert taught["head3"] == {"loss_keypoints_3", "loss_oks_3", "loss_keypoints", "loss_oks"}
    assert taught["size"] == taught["sizes"] == set()


@pytest.mark.parametrize("coarse_head, skeleton, own", [
    ("own", "coco", True), ("own", "crowdpose", True), ("shared", "crowdpose", False), ("shared", "coco", False),
    ("released", "coco", True), ("released", "crowdpose", False)])
def test_a_preset_says_whether_first_keypoints_have_a_head_of_their_own(coarse_head, skeleton, own):
    """`released`, the class default, is what runs from before the field was there have: by the number of joints."""
    decoder = drp.build("tiny", skeleton, coarse_head=coarse_head).decoder
    assert (decoder.coarse_head is not None) == own
    assert drp.Config().coarse_head == "released" and drp.PRESETS["r50-crowdpose"].coarse_head == "shared"
    mine = Skeleton("mine", tuple("abcdefghijklmn"), (), tuple(range(14)), (0.05,) * 14)
    with torch.device("meta"):
        assert all(drp.build(preset, mine).decoder.coarse_head for preset in ("tiny", "r50"))


def test_point_attention_equals_its_formula_with_gradients():
    attention = drp.PointAttention(32).double()
    z, p = (torch.rand(2, 9, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights_ = (9 ** 0.5 * attention.query(z) @ attention.key(p).mT).softmax(-1)
    close(attention(z, p), weights_ @ attention.value(p), 1e-12)
    assert torch.autograd.gradcheck(attention, (z, p))


@pytest.mark.parametrize("wrong, message", [
    (dict(padding="zeros"), "choose from empty"), (dict(dim=100), "multiple of"), (dict(layers=1), "box_layers"),
    (dict(queries=50), "box_queries"), (dict(drop_epochs="a"), "commas"), (dict(scale=1e300), "scale"),
    (dict(points=2 ** 63), "points"), (dict(coarse_head="none"), "own, shared"),
    (dict(as_released=True, padding="repeat"), "leave out --padding")])
def test_config_names_what_is_wrong(wrong, message):
    with pytest.raises(UserError, match=message):
        drp.build("tiny", **wrong)


def test_as_released_sets_what_it_stands_for():
    cfg = resolve(drp.PRESETS["r50"], as_released=True)
    assert (cfg.uniform_t, cfg.padding, cfg.keypoint_completion) == (False, "noise", False)
    assert (drp.draw_pose_noise([1, 0], 17, cfg, torch.device("cpu")).t == 0).all()


def test_image_without_room_for_people_is_refused():
    with pytest.raises(UserError, match="larger --short_side"):
        tiny().encode_image(torch.zeros(1, 3, 16, 16))


# ------------------------------------------------------------------------------------------ completion


def completion_of(file: Path) -> tuple[dict, drp.KeypointCompletion]:
    case, meta = read_case(file)
    return case, drp.KeypointCompletion(case["population"], drp.reference_joints(get_skeleton(meta["skeleton"])))


def boxes_at(corners: np.ndarray) -> np.ndarray:
    return np.concatenate([corners, corners + 1], 1)


def keypoints_of(case) -> np.ndarray:
    return np.concatenate([case["keypoints_px"], case["visibility"][..., None]], 2).astype(float)


@golden("diffusionregpose/golden_completion_*.npz")
def test_statistics_and_completed_poses_equal_the_release(file):
    case, completion = completion_of(file)
    assert sorted(completion.joints) == sorted(case["reference_joints"].tolist())
    close(completion.mean, case["mean"], 1e-12)
    close(completion.covariance, case["cov"], 1e-11)
    keypoints = keypoints_of(case)
    completed = completion(keypoints, boxes_at(case["box_corner"]))
    done = ~np.isnan(case["completed_normalised"]).any((1, 2))
    assert not done.all(), "one person lacks a reference joint"
    close(completed[done, :, :2], case["completed_px"][done], 1e-9)
    assert (completed[done, :, 2] > 0).all() and (completed[~done] == keypoints[~done]).all()
    assert (completed[keypoints[..., 2] > 0] == keypoints[keypoints[..., 2] > 0]).all()


@golden("diffusionregpose/golden_completion_*.npz")
def test_the_papers_least_squares_solution_is_the_conditional_mean(file):
    """eq. 12 against μ_I + Σ_IV Σ_VV⁻¹ (Y_V − μ_V), for random people; float64."""
    (_, completion), rng = completion_of(file), np.random.default_rng(1)
    mean, covariance = completion.mean, completion.covariance
    np.testing.assert_allclose(completion.l_t.T @ completion.l_t @ covariance, np.eye(len(mean)), atol=1e-9)
    for _ in range(5):
        visible = rng.random(len(mean) // 2) < 0.6
        visible[list(completion.joints)] = True
        y = rng.multivariate_normal(mean, covariance).reshape(-1, 2)
        length = np.linalg.norm(y[completion.joints[0]] - y[completion.joints[1]])
        keypoints = np.concatenate([y, visible[:, None]], 1)[None]
        completed = completion(keypoints, boxes_at(np.zeros((1, 2))))[0, ~visible, :2] / length
        known = visible.repeat(2)
        among, cross = covariance[np.ix_(known, known)], covariance[np.ix_(~known, known)]
        expected = mean[~known] + cross @ np.linalg.solve(among, (y / length).flatten()[known] - mean[known])
        np.testing.assert_allclose(completed.flatten(), expected, atol=1e-9)


@golden("diffusionregpose/golden_completion_*.npz")
def test_moving_and_scaling_a_person_moves_and_scales_the_completion(file):
    case, completion = completion_of(file)
    keypoints = keypoints_of(case)
    first = completion(keypoints, boxes_at(case["box_corner"]))
    moved = np.concatenate([keypoints[..., :2] * 3 + [7, -5], keypoints[..., 2:]], 2)
    second = completion(moved, boxes_at(case["box_corner"] * 3 + [7, -5]))
    np.testing.assert_allclose(second[..., :2], first[..., :2] * 3 + [7, -5], atol=1e-8)


def dataset_of(people: np.ndarray, skeleton: Skeleton) -> SimpleNamespace:
    """What learn_completion reads of a data set; boxes end at the outermost joints."""
    low, size = people[..., :2].min(1), np.ptp(people[..., :2], 1)
    return SimpleNamespace(keypoints=people, boxes=np.concatenate([low, size], 1), skeleton=skeleton,
                           iscrowd=np.zeros(len(people), bool))


def standing(rng, count: int, joints: int) -> np.ndarray:
    """People whose joints lie in a row below each other, 10 px apart, (count, joints, 3)."""
    places = np.arange(joints)[:, None] * [0, 10] + rng.uniform(50, 200, (count, 1, 2))
    places = places + rng.normal(size=(count, joints, 2))
    return np.concatenate([places, np.full((count, joints, 1), 2.0)], 2)


@pytest.mark.parametrize("count", [2, 5, 400])
def test_any_skeleton_is_completed_plausibly_from_few_people_too(count):
    names = tuple("abcdefghij")
    skeleton, rng = Skeleton("row", names, (), flip_from_names(names), (0.05,) * 10), np.random.default_rng(0)
    completion = drp.learn_completion(dataset_of(standing(rng, count, 10), skeleton))
    assert completion.joints is None, "no joint of that name: the diagonal of the box"
    test = standing(rng, 20, 10)
    holes = test * (rng.random((20, 10, 1)) < 0.6)
    holes[0] = 0
    completed = completion(holes, np.concatenate([test[..., :2].min(1), test[..., :2].max(1)], 1))
    assert np.linalg.norm((completed - test)[1:, :, :2], axis=-1).max() < 8
    assert (completed[0] == 0).all(), "nothing known, nothing guessed"


def test_joints_that_follow_from_others_are_completed_exactly():
    """Some tools annotate a neck in the middle of the shoulders: Σ has no inverse but for its ridge."""
    names, rng = tuple("abcdefghij"), np.random.default_rng(0)
    people = standing(rng, 400, 10)
    people[:, 3], people[:, 7] = (people[:, 2] + people[:, 4]) / 2, people[:, 6]
    skeleton = Skeleton("row", names, (), flip_from_names(names), (0.05,) * 10)
    completion = drp.learn_completion(dataset_of(people, skeleton))
    holes = people[:5].copy()
    holes[:, [3, 7], 2] = 0
    completed = completion(holes, np.concatenate([people[:5, :, :2].min(1), people[:5, :, :2].max(1)], 1))
    np.testing.assert_allclose(completed[..., :2], people[:5, :, :2], atol=0.05)


def test_the_reference_length_is_that_of_the_head_where_there_is_one():
    expected = dict(coco=(6, 12), crowdpose=(12, 13), posetrack=(2, 1), wholebody=(6, 12))
    assert {name: drp.reference_joints(get_skeleton(name)) for name in expected} == expected


def test_a_training_set_without_a_whole_person_has_no_completion(puppets_folder):
    data = open_dataset(str(puppets_folder), "train")
    assert drp.learn_completion(data) is not None
    data.keypoints[:, 3] = 0
    assert drp.learn_completion(data) is None


# ------------------------------------------------------------------------------------------ matching and losses


def people_of(case: dict) -> list[People]:
    people, i = [], 0
    while f"target{i}_boxes" in case:
        keypoints = torch.from_numpy(case[f"target{i}_keypoints"])
        k = keypoints.shape[1] // 3
        name = f"target{i}_keypoints_buquan"
        poses = torch.from_numpy(case[name]) if name in case else keypoints
        columns = keypoints[:, :2 * k].unflatten(1, (k, 2)), keypoints[:, 2 * k:].clamp(max=1)
        people.append(People(*columns, torch.from_numpy(case[f"target{i}_boxes"]),
                             torch.from_numpy(case[f"target{i}_area"]), poses[:, :2 * k].unflatten(1, (k, 2))))
        i += 1
    return people


def recorded_result(case: dict, k: int) -> tuple[dict, dict]:
    """The case's network outputs as our forward returns them, and by name the tensors that get a gradient."""
    leaves, count = {}, sum(name.endswith("_dn_class_pred") for name in case)

    def load(name: str) -> torch.Tensor:
        leaves[name] = torch.from_numpy(case[name]).requires_grad_()
        return leaves[name]

    def poses(name: str) -> torch.Tensor | None:
        return load(name)[..., :2 * k].unflatten(2, (k, 2)) if case[name].any() else None

    names = [*(f"_{l}" for l in range(count - 1)), ""]
    outputs, noisy = {}, {}
    for l, name in enumerate(names):
        pair = [load(f"layer{l}_pred_{what}") for what in ("logits", "boxes")]
        outputs[name] = Output(*pair, poses(f"layer{l}_pred_keypoints"))
        noisy[name] = Output(load(f"layer{l}_dn_class_pred"), load(f"layer{l}_dn_bbox_pred"), None)
    outputs["_interm"] = Output(load("interm_pred_logits"), load("interm_pred_boxes"), None)
    known = SimpleNamespace(boxes=torch.from_numpy(case["dn_bbox_input"]),
                            known=torch.from_numpy(case["dn_class_input"]) == drp.PERSON)
    return dict(outputs=outputs, dn_outputs=noisy, denoising=known), leaves


def losses_case(file: Path) -> tuple[dict, list[People], torch.Tensor]:
    case, meta = read_case(file)
    return case, people_of(case), torch.tensor(get_skeleton(meta["skeleton"]).sigmas)


@golden("diffusionregpose/golden_losses*.npz")
def test_matching_costs_and_pairs_equal_the_release(file):
    case, targets, sigmas = losses_case(file)
    outputs = recorded_result(case, len(sigmas))[0]["outputs"]
    names = [*(f"layer{l}" for l in range(len(outputs) - 1)), "interm"]
    assert any(f"cost_{name}_0" in case for name in names)
    for name, output, pairs in zip(names, outputs.values(), drp.match(list(outputs.values()), targets, sigmas)):
        cost, first = drp.match_cost(output, gather_people(targets), sigmas), 0
        for i, people in enumerate(targets):
            close(cost[i, :, first:first + len(people)], case[f"cost_{name}_{i}"], 1e-5, f"cost {name} {i}")
            image, query, person = pairs
            ours = set(zip(query[image == i].tolist(), (person[image == i] - first).tolist()))
            assert ours == set(zip(*case[f"match_{name}_{i}"].tolist()))
            first += len(people)


def check_losses(losses: dict, case, rel: float):
    """Each term, and the weighted sum, of a case; its names are those of the weights that are used."""
    weights = json.loads(reference("diffusionregpose/loss_weights.json").read_text())["weights_used"]
    assert losses.keys() == weights.keys()
    for name, weight in weights.items():
        assert losses[name].item() == pytest.approx(weight * float(case[f"loss/{name}"][0]), rel=rel, abs=1e-6), name
    assert sum(losses.values()).item() == pytest.approx(float(case["total"][0]), rel=rel)


@golden("diffusionregpose/golden_losses*.npz")
def test_every_loss_term_and_its_gradient_equals_the_release(file):
    """The release also draws boxes of nobody (label 2) to their random places: so here, for these terms alone."""
    case, people, sigmas = losses_case(file)
    result, leaves = recorded_result(case, len(sigmas))
    losses = drp.criterion(result, people, sigmas)
    result["denoising"].known = torch.ones_like(result["denoising"].known)
    boxes_of_nobody = drp.criterion(result, people, sigmas)
    losses |= {name: boxes_of_nobody[name] for name in losses if name.startswith(("dn_loss_bbox", "dn_loss_giou"))}
    check_losses(losses, case, 1e-5)
    sum(losses.values()).backward()
    last = len(result["outputs"]) - 2
    places = [("pred_", f"layer{last}_pred_"), ("interm_boxes", "interm_pred_boxes"), ("_dn_boxes", "_dn_bbox_pred"),
              (r"layer(\d)_(boxes|keypoints)", r"layer\1_pred_\2")]
    names = [name.removeprefix("grad/") for name in case if name.startswith("grad/")]
    assert names
    for name in names:
        ours, theirs = leaves[next(iter(weights.rename({name: 0}, places)))].grad, case[f"grad/{name}"]
        close(ours / np.abs(theirs).max(), theirs / np.abs(theirs).max(), 1e-5, f"gradient of {name}")


def random_output(batch: int, queries: int = 6, keypoints: int | None = 17) -> Output:
    logits, boxes = torch.randn(batch, queries, 2, requires_grad=True), torch.rand(batch, queries, 4, requires_grad=True)
    return Output(logits, boxes, torch.rand(batch, queries, keypoints, 2, requires_grad=True) if keypoints else None)


def random_result(batch: int) -> dict:
    outputs = dict(zip(("_0", "", "_interm"), (random_output(batch, keypoints=k) for k in (None, 17, None))))
    return dict(outputs=outputs, dn_outputs={}, denoising=None)


def labelled_people(counts: list[int], keypoints: int = 17) -> list[People]:
    return [People(0.2 + 0.6 * torch.rand(n, keypoints, 2), (torch.rand(n, keypoints) > 0.2).float(),
                   torch.tensor([[0.5, 0.5, 0.4, 0.6]]).repeat(n, 1), 0.05 + 0.1 * torch.rand(n),
                   torch.rand(n, keypoints, 2)) for n in counts]


def test_images_without_people_teach_denoising_queries_no_boxes():
    noisy = Output(torch.randn(2, 4, 2), torch.rand(2, 4, 4, requires_grad=True), None)
    known = torch.tensor([True, False])[:, None].expand(2, 4)
    result = random_result(2) | dict(dn_outputs={"_0": noisy, "": noisy},
                                     denoising=SimpleNamespace(boxes=torch.rand(2, 4, 4), known=known))
    sum(drp.criterion(result, labelled_people([1, 0]), torch.full((17,), 0.05)).values()).backward()
    assert noisy.boxes.grad[0].any() and not noisy.boxes.grad[1].any()


def test_a_batch_without_people_has_a_finite_loss_and_a_gradient():
    result = random_result(2)
    losses = drp.criterion(result, labelled_people([0, 0]), torch.full((17,), 0.05))
    sum(losses.values()).backward()
    assert losses["loss_keypoints"] == losses["loss_bbox_interm"] == 0 < losses["loss_ce"]
    leaves = [x for output in result["outputs"].values() for x in output if x is not None]
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


def test_more_people_than_queries_are_matched_as_far_as_queries_go():
    image, query, person = drp.match([random_output(1)], labelled_people([9]), torch.full((17,), 0.05))[0]
    assert sorted(query.tolist()) == list(range(6)) and len(set(person.tolist())) == 6


def test_the_order_of_people_does_not_change_the_loss():
    targets, result, sigmas = labelled_people([3]), random_result(1), torch.full((17,), 0.05)
    shuffled = [targets[0].take(torch.tensor([2, 0, 1]))]
    totals = [sum(drp.criterion(result, t, sigmas).values()).item() for t in (targets, shuffled)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


def test_perfect_outputs_have_no_loss_but_that_of_the_scores():
    targets, sigmas = labelled_people([2]), torch.full((17,), 0.05)
    exact = torch.cat([targets[0].keypoints, torch.rand(4, 17, 2)])[None]
    boxes = torch.cat([targets[0].boxes, torch.rand(4, 4)])[None]
    logits = torch.tensor([[[-9.0, 9.0]] * 2 + [[-9.0, -9.0]] * 4])
    result = dict(outputs={"": Output(logits, boxes, exact)}, dn_outputs={}, denoising=None)
    losses = drp.criterion(result, targets, sigmas)
    assert losses["loss_keypoints"] == losses["loss_bbox"] == 0
    assert max(losses["loss_oks"], losses["loss_giou"], losses["loss_ce"]) < 1e-3


def test_scores_can_learn_the_oks_of_their_poses():
    """DETRPose's eq. 5 by hand, with its gradient: q (p − q) where a pose was matched, p² p / 4 elsewhere."""
    targets, result, sigmas = labelled_people([2]), random_result(1), torch.full((17,), 0.3)
    focal, ours = (drp.criterion(result, targets, sigmas, score_weight=weight) for weight in (0.0, 8.0))
    assert {name for name in focal if focal[name] != ours[name]} == {"loss_ce"}, "the layers without poses keep theirs"
    logits, _, poses = result["outputs"][""]
    _, query, person = drp.match([result["outputs"][""]], targets, sigmas)[0]
    q, p = torch.zeros(6, 2), logits[0].sigmoid()
    for i, j in zip(query, person):
        squared = (poses[0, i] - targets[0].keypoints[j]).square().sum(-1)
        true = targets[0].take(person[person == j])
        q[i, 1] = similarity_of(squared, true.visible, true.areas, sigmas)[0].detach()
    value = torch.where(q > 0, -q * (q * p.log() + (1 - q) * (1 - p).log()), -p ** 2 * (1 - p).log() / 4).sum()
    assert q.max() > 0.01 and ours["loss_ce"].item() == pytest.approx(8 * value.item() / 2, rel=1e-5)
    gradient, = torch.autograd.grad(ours["loss_ce"], logits)
    close(gradient[0], torch.where(q > 0, q * (p - q), p ** 3 / 4) * 8 / 2, 1e-6)


def test_numbers_that_are_not_finite_reach_the_losses_instead_of_breaking_the_matching():
    result = random_result(1)
    result["outputs"][""] = result["outputs"][""]._replace(logits=torch.full((1, 6, 2), float("nan")))
    losses = drp.criterion(result, labelled_people([2]), torch.full((17,), 0.05))
    assert losses["loss_ce"].isnan() and losses["loss_keypoints"].isfinite() and losses["loss_ce_0"].isfinite()


def test_gradients_of_the_losses_are_right():
    """gradcheck in float64; boxes overlap, contain each other, or are apart."""
    true = labelled_people([3])[0]
    true = true.each(torch.Tensor.double)
    boxes = torch.tensor([[0.5, 0.45, 0.2, 0.3], [0.6, 0.8, 0.5, 0.3], [0.1, 0.1, 0.1, 0.1]]).double().requires_grad_()
    poses = (true.keypoints + 0.05 * torch.randn(3, 17, 2)).requires_grad_()
    logits = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    positive, sigmas = (torch.rand(3, 2) > 0.5).double(), torch.full((17,), 0.05, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda b: tuple(drp.box_losses(b, true.boxes).values()), boxes)
    assert torch.autograd.gradcheck(lambda p: tuple(drp.pose_losses(p, true, sigmas).values()), poses)
    assert torch.autograd.gradcheck(lambda x: drp.focal_loss(x, positive), logits)


# ------------------------------------------------------------------------------------------ post-processing


@golden("diffusionregpose/golden_postprocess_*.npz")
def test_nms_equals_the_release_without_its_fallback(file):
    case, _ = read_case(file)
    k = case["entry_keypoints"].shape[1] // 3
    keypoints, scores = case["entry_keypoints"][:, :2 * k].reshape(-1, k, 2), case["entry_scores"]
    for kind, name in dict(official="official_reading", plain="interleaved").items():
        kept = drp.nms(keypoints, scores, tuple(case["input_wh"]), kind)
        assert kept.tolist() == sorted(case[f"keep_{name}_no_fallback"].tolist(), key=lambda i: -scores[i]), kind
    assert drp.nms(keypoints, scores, (1, 1), "none").tolist() == np.argsort(-scores, kind="stable").tolist()


@golden("diffusionregpose/golden_postprocess_*.npz")
def test_predictions_equal_the_release_with_each_score_at_its_own_pose(file):
    case, _ = read_case(file)
    k = case["keypoints"].shape[2] // 3
    entries = dict(logits=case["logits"][0], boxes=case["boxes"][0],
                   keypoints=case["keypoints"][0, :, :2 * k].reshape(-1, k, 2))
    ours = drp.to_prediction(entries, 7, tuple(case["input_wh"]), tuple(case["orig_wh"]), "official")
    close(ours.scores, case["paired_scores"], 1e-6)
    close(ours.boxes, case["paired_boxes_xyxy"], 1e-6)
    close(ours.keypoints, case["paired_keypoints"].reshape(-1, k, 3)[..., :2], 1e-6)
    everybody = drp.to_prediction(entries, 7, tuple(case["input_wh"]), tuple(case["orig_wh"]), "none")
    person = case["nonms_labels"] == drp.PERSON             # label 0 is never trained, and nobody here
    count = person.sum()
    close(everybody.scores[:count], case["nonms_scores"][person], 1e-6)
    close(everybody.boxes[:count], case["nonms_boxes_xyxy"][person], 1e-6)


@pytest.mark.parametrize("joints", [1, 3, 17, 133])
@pytest.mark.parametrize("kind", ["official", "plain"])
def test_nms_keeps_one_of_each_person_whatever_the_number_of_joints(joints, kind):
    rng = np.random.default_rng(0)
    people = rng.uniform(0, 0.2, (3, joints, 2)) + np.array([0, 0.4, 0.8])[:, None, None]
    poses = np.concatenate([people, people, people]) + rng.normal(0, 1e-4, (9, joints, 2)) * (joints > 1)
    scores = np.linspace(0.9, 0.1, 9)
    kept = drp.nms(poses, scores, (640, 480), kind)
    assert set(kept) == ({0, 1, 2} if joints > 1 else set(range(9))), "one joint has no extent: nobody is near"
    assert len(drp.nms(poses, scores * 0.05, (640, 480), kind)) == 0


def test_nms_of_nobody_is_nobody():
    assert len(drp.nms(np.zeros((0, 17, 2)), np.zeros(0), (9, 9), "official")) == 0


def test_start_noise_depends_on_seed_image_and_draw_alone():
    cfg, first = drp.Config(), drp.start_noise("a", drp.Config(), 17)
    torch.manual_seed(5)
    assert torch.equal(first, drp.start_noise("a", cfg, 17)) and first.shape == (cfg.queries, 17, 2)
    for other in ("b", cfg, 17), ("a", replace(cfg, seed=1), 17), ("a", cfg, 17, 1):
        assert not torch.equal(first, drp.start_noise(*other))


# ------------------------------------------------------------------------------------------ data

needs_golden_data = golden("diffusionregpose/golden_transforms*.json")


def recorded_sample(record: dict, with_area: bool) -> Sample:
    height, width = record["size"]
    y, x = np.mgrid[:height, :width]
    red = ((x + y) % 256).astype(np.uint8)
    image = Image.fromarray(np.stack([red, 255 - red, (2 * red.astype(int) % 256).astype(np.uint8)], 2))
    boxes = np.float32(record["boxes"])
    areas = np.float32(record["area"]) if with_area else (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Sample(image, 1, (width, height), np.float32(record["keypoints"]), boxes, areas, np.zeros(len(boxes), bool))


def assert_sample(ours: Sample, record: dict):
    assert ours.size == tuple(record["size"][::-1]) == ours.image.size
    labelled = ours.keypoints[..., 2] > 0
    assert (labelled == (np.array(record["keypoints"])[..., 2] > 0)).all()
    close(ours.keypoints[labelled], np.array(record["keypoints"])[labelled], 1e-6)
    close(ours.boxes, record["boxes"], 1e-6)
    if "area" in record:
        close(ours.areas, record["area"], 1e-5)


def assert_people(ours: People, record: dict):
    k = ours.keypoints.shape[1]
    close(ours.boxes, record["boxes"], 1e-5)
    close(ours.areas, record["area"], 1e-5)
    theirs = np.array(record["keypoints"])
    assert (ours.visible.numpy() == (theirs[:, 2 * k:] > 0)).all()
    close(ours.keypoints.flatten(1), theirs[:, :2 * k] * (theirs[:, 2 * k:] > 0).repeat(2, 1), 1e-5)
    assert torch.equal(ours.poses, ours.keypoints)


def with_poses(sample: Sample) -> Sample:
    """As TrainImages: annotated keypoints, then those for the diffusion."""
    return replace(sample, keypoints=np.concatenate([sample.keypoints] * 2, 1))


@needs_golden_data
def test_augmentation_equals_the_release(file):
    cases = [case for case in json.loads(file.read_text()).values() if isinstance(case, dict)]
    assert cases
    for case in cases:
        sample = recorded_sample(case["input"], "area" in case["input"])
        assert_people(drp.to_people(with_poses(sample)), case["input_normalised_directly"])
        flip = get_skeleton(SKELETON_OF[sample.keypoints.shape[1]]).flip
        assert_sample(transforms.hflip(sample, flip), case["after_hflip"])
        sample = transforms.resize_short_side(sample, 600)
        assert_sample(sample, case["after_resize_600"])
        pixels = np.array(sample.image)[np.ix_([0, 100], [0, 200])].reshape(-1, 3)
        assert (pixels == case["resized_pixels_rows_0_100_cols_0_200"]).all()
        sample = transforms.crop(sample, 120, 50, 450, 500)
        assert_sample(sample, case["then_crop_top50_left120_h500_w450"])
        sample = transforms.resize_short_side(sample, 736, 1333)
        assert_sample(sample, case["then_resize_736_max1333"])
        assert_people(drp.to_people(with_poses(sample)), case["then_normalise"])
        tensor = transforms.normalise(transforms.to_tensor(sample.image))
        for y, x, values in case["tensor_values"]:
            close(tensor[:, y, x], values, 1e-5)


@needs_golden_data
def test_the_size_rule_equals_the_release(file):
    rows = next(rows for name, rows in json.loads(file.read_text()).items() if name.startswith("resize_sizes"))
    for w, h, short, longest, *expected in rows:
        assert transforms.short_side_size((w, h), short, longest or np.inf) == tuple(expected), (w, h, short, longest)


def test_pictures_of_different_sizes_are_padded_at_the_right_and_bottom():
    images, padded = drp.pad_images([torch.ones(3, 4, 7), 2 * torch.ones(3, 6, 5)])
    assert images.shape == (2, 3, 6, 7) and padded.shape == (2, 6, 7) and padded.dtype == torch.bool
    for image, mask, inside in zip(images, padded, (np.s_[:4, :7], np.s_[:6, :5])):
        assert (image[0] > 0).sum() == (~mask).sum() == (image[(0, *inside)] > 0).sum() == (~mask[inside]).sum()


def test_training_images_depend_on_seed_epoch_and_index_and_carry_completed_poses(puppets_folder):
    cfg = drp.Config(short_side=64, long_side=107, multiscale=False)
    data = open_dataset(str(puppets_folder), "train").training()
    completion = drp.learn_completion(data)
    images = drp.TrainImages(data, cfg, 3, completion)
    for i in range(6):
        (image, targets, image_id, skipped), again = images[i], images[i]
        assert torch.equal(image, again[0]) and torch.equal(targets.poses, again[1].poses) and not skipped
        assert image_id == targets.image_id == data[i].image_id
        assert min(image.shape[1:]) == 64
        visible = targets.visible > 0
        assert torch.equal(targets.poses[visible], targets.keypoints[visible])
        assert (targets.keypoints[~visible] == 0).all()
    filled = torch.cat([t.poses[t.visible == 0] for _, t, *_ in (images[i] for i in range(10))])
    assert (filled != 0).float().mean() > 0.3, "unlabelled joints have places"
    plain = drp.TrainImages(data, cfg, 3, None)
    assert all(torch.equal(plain[i][1].poses, plain[i][1].keypoints) for i in range(4))
    flipped = [torch.equal(images[i][0], drp.TrainImages(data, cfg, 4, None)[i][0]) for i in range(10)]
    assert not all(flipped), "another epoch mirrors other images"


def test_crops_and_sizes_are_those_of_the_release():
    people = Sample(Image.new("RGB", (640, 480)), 1, (640, 480), np.zeros((1, 17, 3), np.float32),
                    np.float32([[0, 0, 640, 480]]), np.float32([9]), np.zeros(1, bool))
    rng = np.random.default_rng(0)
    sizes = [drp.augment(people, None, drp.Config(), rng).size for _ in range(60)]
    assert {min(size) for size in sizes if max(size) < 1333} <= set(range(480, 801, 32))
    assert max(map(max, sizes)) <= 1333 and len({round(w / h, 2) for w, h in sizes}) > 10, "crops of many shapes"


def test_mirroring_a_completed_pose_is_completing_then_mirroring(puppets_folder):
    """The poses for the diffusion keep left and right apart as the annotation does."""
    data = open_dataset(str(puppets_folder), "train").training()
    cfg = drp.Config(short_side=64, long_side=107, multiscale=False)
    images = drp.TrainImages(data, cfg, 0, drp.learn_completion(data))
    for i in range(8):
        targets = images[i][1]
        seen = targets.visible > 0
        assert torch.allclose(targets.poses[seen], targets.keypoints[seen])


def test_crowdpose_losses_take_the_area_of_the_box(puppets_folder):
    data = open_dataset(str(puppets_folder), "train").training()
    cfg = drp.Config(short_side=64, long_side=107, multiscale=False)
    before = drp.TrainImages(data, cfg, 0, None)[0][1].areas
    data.name = "crowdpose"
    targets = drp.TrainImages(data, cfg, 0, None)[0][1]
    assert torch.allclose(targets.areas, targets.boxes[:, 2:].prod(1), rtol=1e-4)
    assert not torch.allclose(targets.areas, before)


# ------------------------------------------------------------------------------------------ a training step


@golden("diffusionregpose/golden_train_*.npz")
def test_a_training_step_equals_the_release(file):
    case, meta = read_case(file)
    shared = model_of(meta)
    model = drp.DiffusionRegPose(shared.cfg, shared.skeleton).train()
    model.load_state_dict(shared.state_dict())
    people, k = people_of(case), model.skeleton.num_keypoints
    noise, dn_noise = pose_noise_of(case, people), noise_of(case, people)
    poses = drp.pad_poses(people, noise, {"normal": "noise", "zero": "empty"}[meta["padding"]])
    noisy = drp.noise_poses(poses, noise.t, noise.eps, model.cfg.scale)
    close(noisy.flatten(2), case["x_t_01"], 1e-5, "noisy poses")
    result = model(*drp.pad_images(pictures_of(meta)), noisy, noise.t, people, dn_noise)
    denoising = result["denoising"]
    close(denoising.boxes, case["dn_known_boxes"], 1e-6)
    assert denoising.known.all() and (case["dn_known_labels"] == 1).all()
    close(denoising.reference, torch.from_numpy(case["dn_query_bbox_unsigmoid"]).sigmoid(), 1e-5)
    close(denoising.content[..., ::16], case["dn_noised_labels_embed_stride"], 1e-6)
    dn = denoising.group.shape[1]
    blocked = denoising.group[:, :, None] != denoising.group[:, None]
    assert (blocked.numpy() == case["attn_mask_box"][:, :dn, :dn]).all()
    for name in ("logits", "boxes"):
        close(result[name], case[f"out/pred_{name}"], 1e-4, name)
    close(result["keypoints"].flatten(2), case["out/pred_keypoints"][..., :2 * k], 1e-4, "keypoints")
    for ours, name in zip(result["dn_outputs"][""], ("class", "bbox")):
        close(ours, case[f"out/dn_{name}_pred"], 1e-4, f"denoising {name}")
    losses = drp.criterion(result, people, model.sigmas)
    check_losses(losses, case, 1e-3)
    sum(losses.values()).backward()
    check_gradients(model, case, json.loads(file.with_name(f"{file.stem}_grads.json").read_text()))


def check_gradients(model: drp.DiffusionRegPose, case, names: dict):
    """Norms of all gradients and the stored whole ones, by the release's names, its heads by their second ones."""
    twice = re.compile(r"^transformer\.decoder\.(?=(class|bbox|pose|pose_hw)_embed)")
    first = [twice.sub("", name) for name in names["parameter_order"]]
    ours = dict(zip(names["parameter_order"], weights.rename(dict.fromkeys(first), drp.RENAME)))
    # one ReLU of the golden's stands at -5e-7: which side it is on moves the gradient of what it feeds from
    loose = {"decoder.keypoint_content.weight": 5e-3}
    learned = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    idle = {ours[name] for name in names["zero_grad"]}
    assert learned.keys() == set(ours.values()), "every trained parameter of the release, and no other"
    assert {name for name, grad in learned.items() if not grad.any()} == idle
    biases = {"decoder.ksa.key.bias", "decoder.kca.key.bias"}                  # zero but for rounding
    total = float(case["grad_total_norm"][0])
    for name, norm in zip(names["parameter_order"], case["grad_norms"]):
        if ours[name] not in idle | biases:
            assert learned[ours[name]].norm().item() == pytest.approx(
                float(norm), rel=loose.get(ours[name], 2e-3), abs=1e-6 * total), name
    for key in [key for key in case if key.startswith("grad/")]:
        if ours[key[5:]] not in idle | biases:
            theirs, gradient = torch.from_numpy(case[key]), learned[ours[key[5:]]]
            step = gradient.shape[1] // theirs.shape[1] if theirs.dim() > 1 else 1
            largest = theirs.abs().max()
            close(gradient[..., ::step] / largest, theirs / largest, loose.get(ours[key[5:]], 2e-3), key)


# ------------------------------------------------------------------------------------------ by itself

@pytest.mark.parametrize("counts", [[2, 0, 1], [0, 0, 0]])
@pytest.mark.parametrize("ablation", [
    dict(), dict(padding="repeat"), dict(padding="noise"), dict(padding="mean"), dict(scale=10.0), dict(queries=3),
    dict(uniform_t=False), dict(ksa_kca=False), dict(dn_queries=0), dict(as_released=True)], ids=str)
def test_every_ablation_gives_every_parameter_a_finite_gradient(ablation, counts):
    model = drp.build("tiny", "crowdpose" if "scale" in ablation else "coco", **SMALL | ablation).train()
    targets = labelled_people(counts, model.skeleton.num_keypoints)
    pictures = [torch.rand(3, 64, w) for w in (64, 48, 40)]
    for _ in range(2):                                  # the first step leaves zero-started heads behind
        losses = step_losses(model, *drp.pad_images(pictures), targets)
        sum(losses.values()).backward()
        torch.optim.SGD(model.parameters(), 1e-4).step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert ("dn_loss_ce" in losses) == (model.cfg.dn_queries > 0)


def test_two_halves_of_a_batch_have_the_loss_of_the_whole(monkeypatch):
    people, sigmas, result = labelled_people([2, 1]), torch.full((17,), 0.05), random_result(2)
    known = SimpleNamespace(boxes=torch.rand(2, 4, 4), known=torch.ones(2, 4, dtype=torch.bool))
    noisy = Output(torch.randn(2, 4, 2), torch.rand(2, 4, 4), None)
    result |= dict(dn_outputs={"_0": noisy, "": noisy}, denoising=known)
    whole = drp.criterion(result, people, sigmas)
    monkeypatch.setattr(drp, "mean_over_ranks", lambda count: torch.tensor(1.5))
    halves = []
    for b in (0, 1):
        part = {kind: {name: Output(*(None if x is None else x[b:b + 1] for x in output))
                       for name, output in result[kind].items()} for kind in ("outputs", "dn_outputs")}
        part |= dict(denoising=SimpleNamespace(boxes=known.boxes[b:b + 1], known=known.known[b:b + 1]))
        halves.append(drp.criterion(part, people[b:b + 1], sigmas, pieces=2))
    for name, value in whole.items():
        assert (halves[0][name] + halves[1][name]).item() / 2 == pytest.approx(value.item(), rel=1e-5), name


def test_evaluation_is_in_float32_also_after_a_training_in_half_precision(monkeypatch):
    def refuse(*args):
        raise AssertionError("half precision")

    monkeypatch.setattr(drp, "autocast", refuse)
    model = drp.build("tiny", **SMALL, amp="bf16", nms="none").eval()
    found = drp.predict(model, drp.to_batch([Image.new("RGB", (64, 64))], [1], model.cfg))[0]
    assert len(found.scores) == 5


def test_predictions_are_people_in_pixels_of_the_original_whoever_shares_the_batch():
    model = drp.build("tiny", **SMALL, nms="none").eval()
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for h, w in ((100, 150), (50, 75))]
    batch = drp.to_batch(pictures, ["a", 7], model.cfg)
    first, second = drp.predict(model, batch)
    assert (first.image_id, second.image_id) == ("a", 7) and batch["sizes_px"] == [(150, 100), (75, 50)]
    assert first.keypoints.shape == (5, 17, 2) and (np.diff(first.scores) <= 0).all()
    larger = drp.predict(model, batch | dict(sizes_px=[(300, 300), (75, 50)]))[0]
    close(larger.keypoints, first.keypoints * (2, 3), 1e-6, "pixels of the original")
    close(larger.boxes, first.boxes * (2, 3, 2, 3), 1e-6)
    alone = drp.predict(drp.fuse(model), drp.to_batch(pictures[1:], [7], model.cfg))[0]
    close(alone.keypoints, second.keypoints, 1e-3, "alone")


def test_an_ensemble_joins_the_people_of_all_steps():
    counts = []
    for options in dict(), dict(steps=3), dict(steps=3, ensemble=True):
        model = drp.build("tiny", **SMALL, nms="none", **options).eval()
        counts.append(len(drp.predict(model, drp.to_batch([Image.new("RGB", (64, 64))], [1], model.cfg))[0].scores))
    assert counts == [5, 5, 15]


def test_the_process_is_ten_steps_of_noise_then_people_and_one_picture_of_ellipses(monkeypatch):
    model, encode, calls = drp.build("tiny", **SMALL, nms="none").eval(), drp.DiffusionRegPose.encode_image, []
    monkeypatch.setattr(drp.DiffusionRegPose, "encode_image", lambda *args: calls.append(0) or encode(*args))
    picture = Image.new("RGB", (80, 60))
    shown = drp.show_process(model, picture, 0)
    assert {name: len(pictures) for name, pictures in shown.items()} == dict(process=11, uncertainty=1)
    assert len({picture.size for pictures in shown.values() for picture in pictures}) == 1
    assert np.ptp(np.asarray(shown["uncertainty"][0])[-300:]) > 0                 # below the caption
    assert len(calls) == 2, "for the steps and for the draws, whose number does not matter"
    assert drp.show_process(model, picture, 1) == {}, "nobody is above the threshold, nothing is drawn"
    with pytest.raises(UserError, match="without K-SA there is none"):
        drp.show_process(drp.build("tiny", **SMALL, ksa_kca=False).eval(), picture, 0)


def test_the_learning_rate_falls_as_a_cosine_or_drops_twice():
    cosine, drops = drp.PRESETS["tiny"], drp.PRESETS["r50"]
    rates = [drp.lr_scale(step, 1000, 0, cosine) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / cosine.warmup) and max(rates) > 0.85 and rates[-1] < 1e-4
    assert [drp.lr_scale(0, 10, epoch, drops) for epoch in (30, 31, 60, 61)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_puppets_in_crowds_are_evaluated_by_crowding(tmp_path, monkeypatch):
    monkeypatch.setattr(puppets, "ROOT", tmp_path)
    monkeypatch.setattr(puppets, "COUNTS", puppets.COUNTS | {"crowd": {"val": 4}})
    model = drp.build("tiny", **SMALL).eval()
    table, found = drp.evaluate(model, drp.open_crowd(model.skeleton, ALONE), model.cfg, ALONE)
    assert {"AP", "AP_E", "AP_M", "AP_H", "box_AP"} <= table.keys() and len(found) == 4


# ------------------------------------------------------------------------------------------ training runs


def train(data: Path, out: Path, *flags: str) -> dict:
    """Train in this process, 2 x 5 steps; the content of last.pt."""
    words = flags if "--resume" in flags else (
        "--train", *FLAGS, "--processes", "1", "--eval_every", "1", "--epochs", "2", "--batch", "4", "--accum", "2",
        "--device", "cpu", "--data", str(data), "--out", str(out), *flags)
    drp.train(*parse(drp.Config, drp.PRESETS, "", list(words)))
    return torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole_run(puppets_folder, tmp_path_factory) -> Path:
    """The folder of a run that was never cut."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(puppets_folder, folder)
    return folder


@pytest.mark.parametrize("how, step", [pytest.param("SIGTERM", 4, marks=pytest.mark.slow), ("kill", 2)])
def test_a_run_that_is_cut_and_resumed_ends_with_the_same_bits(how, step, puppets_folder, whole_run, tmp_path):
    criterion, calls = drp.criterion, []

    def cut(*args, **options):
        calls.append(0)
        if len(calls) == 7 and how == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        if len(calls) == 7 and how == "kill":
            raise KeyboardInterrupt
        return criterion(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drp, "criterion", cut)
        patch.setattr(RunFolder, "draw", lambda *args: None)
        patch.setattr(RunFolder, "save_is_due", lambda self: len(calls) == 4)
        with suppress(KeyboardInterrupt):
            train(puppets_folder, tmp_path / "run")
        patch.setattr(drp, "criterion", criterion)
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == step
        after = train(puppets_folder, tmp_path / "run", "--resume", str(tmp_path / "run"))
    expected = torch.load(whole_run / "last.pt", weights_only=True)
    assert after["step"] == 10
    parts = ("model", "ema", "optimizer", "epoch", "step", "best", "rows")
    assert_equal({part: after[part] for part in parts}, {part: expected[part] for part in parts})


def test_without_an_average_the_weights_themselves_are_evaluated_and_no_copy_is_kept(puppets_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "draw", lambda *args: None)
    last = train(puppets_folder, tmp_path / "run", "--epochs", "1", "--batch", "22", "--ema", "0", "--no-keypoint_completion")
    assert "ema" not in last
    assert_equal(torch.load(tmp_path / "run" / "best.pt", weights_only=True)["model"], last["model"])
    assert train(puppets_folder, tmp_path / "run", "--resume", str(tmp_path / "run"), "--epochs", "2")["step"] == 2


def test_edpose_learns_no_completion_for_nothing_is_noised(puppets_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "draw", lambda *args: None)
    monkeypatch.setattr(drp, "learn_completion", lambda data: pytest.fail("nothing reads it"))
    assert train(puppets_folder, tmp_path / "run", "--epochs", "1", "--batch", "22", "--no-ksa_kca")["step"] == 1


def test_rows_on_puppets_differ_in_what_the_paper_compares_alone():
    """No NMS, ζ = 5 but for Table 3, K-CA moves all the way, and more people are kept than a crowd of puppets has."""
    for number, table in drp.TABLES.items():
        rows = [parse(drp.Config, drp.PRESETS, "", f"{table.puppets} {row.puppets}".split())[0] for row in table.rows]
        assert {cfg.nms for cfg in rows} == {"none"} and not any(cfg.learned_share for cfg in rows)
        assert number == "3" or {cfg.scale for cfg in rows} == {5.0}
        assert number != "5" or [cfg.queries for cfg in rows] == [20, 10, 20, 40]


def test_a_run_leaves_its_pictures_and_a_checkpoint_that_eval_understands(whole_run, tmp_path, monkeypatch, capsys):
    assert {"predictions.png", "curves.png", "best.pt"} <= {path.name for path in whole_run.iterdir()}
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.png")
    evaluation = importlib.import_module("eval")
    people = ["--threshold", "0", "--set", "nms=none"]              # the NMS takes away all that so young a model finds
    for words in ["--eval_batch", "3"], ["--images", str(tmp_path / "photo.png"), "--process", *people]:
        words = ["eval.py", str(whole_run), *words, "--device", "cpu", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", words)
        evaluation.main()
    assert "8 images in" in capsys.readouterr().out
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"photo.png", "photo_process.gif", "photo_uncertainty.png", "results.json"} <= drawn


def test_a_training_set_without_a_whole_person_says_so_and_trains_without_completion(puppets_folder, tmp_path, capsys):
    data = Path(shutil.copytree(puppets_folder, tmp_path / "data"))
    file = data / "annotations" / "person_keypoints_train2017.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["keypoints"][9:12] = [0, 0, 0]
    file.write_text(json.dumps(content))
    assert train(data, tmp_path / "run", "--epochs", "1", "--batch", "22")["step"] == 1
    assert capsys.readouterr().out.count("no keypoint completion") == 1


def test_a_loss_that_is_not_finite_stops_with_its_name_and_the_images(puppets_folder, tmp_path, monkeypatch):
    losses = drp.criterion
    monkeypatch.setattr(drp, "criterion",
                        lambda *args, **options: losses(*args, **options) | dict(loss_oks=torch.tensor(math.nan)))
    with pytest.raises(UserError, match=r"loss_oks not finite at step 0, images \["):
        train(puppets_folder, tmp_path / "run")


def test_frozen_norms_without_start_weights_are_refused():
    args = SimpleNamespace(device="cpu", saved=None)
    with pytest.raises(UserError, match="frozen norms need start weights"):
        drp.train(resolve(drp.PRESETS["r50"], init=""), args)


def test_the_auxiliary_heatmap_loss_teaches_what_is_before_the_decoder():
    model = drp.build("tiny").train()
    with torch.no_grad():
        model.heatmaps.head.weight.normal_(std=0.1)
    losses = step_losses(model, *drp.pad_images([torch.rand(3, 64, 64)]), labelled_people([2]))
    losses["loss_heatmaps"].backward()
    parts = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert parts == {"backbone", "input_proj", "encoder", "heatmaps"}, "positions act on offsets, which start constant"


def test_the_auxiliary_heatmap_loss_knows_the_padding():
    """Of pictures 128x64 and 64x128, padded to squares: keypoints are fractions of the pictures, heatmaps of the
    squares. An untaught head says 0 everywhere, so the loss is the square of what it should say."""
    model, people = drp.build("tiny").train(), labelled_people([2, 1])
    images, padded = drp.pad_images([torch.rand(3, 64, 128), torch.rand(3, 128, 64)])
    loss = step_losses(model, images, padded, people)["loss_heatmaps"].item()
    parts = torch.tensor([[1, 0.5], [0.5, 1]])
    true = [people_heatmaps(one.keypoints * part, one.visible, (32, 32)) for one, part in zip(people, parts)]
    total = sum(maps.square().sum() for maps in true) / sum(one.visible.sum() for one in people)
    assert loss == pytest.approx(model.cfg.heatmap_weight * total.item(), rel=1e-5)


def test_k_ca_with_a_learned_share_starts_as_the_identity():
    model = drp.build("tiny").eval()
    picture, t = torch.rand(1, 3, 128, 128), torch.tensor([999])
    noise = torch.rand(1, model.cfg.queries, 17, 2)

    def first_keypoints() -> torch.Tensor:
        found = []
        hook = model.decoder.layers[1].register_forward_pre_hook(lambda _, args: found.append(args[2]))
        with torch.no_grad():
            model(picture, None, noise, t)
        hook.remove()
        return found[0]

    start = first_keypoints()
    model.decoder.kca_share.data.fill_(1.0)
    moved = first_keypoints()
    model.decoder.ksa = None                                             # K-CA is left out with it
    assert (start == first_keypoints()).all() and not (start == moved).all()
    model = drp.build("tiny").train()
    losses = step_losses(model, *drp.pad_images(list(picture)), labelled_people([2]))
    sum(losses.values()).backward()
    assert model.decoder.kca_share.grad != 0


def test_a_k_ca_trained_without_a_share_keeps_moving_keypoints_all_the_way(tmp_path):
    whole, edpose = drp.build("tiny", learned_share=False), drp.build("tiny", ksa_kca=False)
    for donor, share in ((whole, 1.0), (edpose, 0.0)):
        torch.save(donor.state_dict(), tmp_path / "donor.pth")
        model = drp.build("tiny")
        drp.load_init(model, str(tmp_path / "donor.pth"))
        assert model.decoder.kca_share.item() == share
    model.decoder.kca_share.data.fill_(0.3)
    torch.save(model.state_dict(), tmp_path / "donor.pth")
    again = drp.build("tiny")
    drp.load_init(again, str(tmp_path / "donor.pth"))
    assert again.decoder.kca_share.item() == pytest.approx(0.3)


@pytest.mark.slow
def test_the_tiny_preset_learns_eight_puppets_by_heart(puppets_folder):
    """A model that cannot overfit has a bug: the loss of the final poses falls below a fifth of its start."""
    data = open_dataset(str(puppets_folder), "train").training()
    model = drp.build("tiny", data.skeleton).train()
    images = drp.TrainImages(data, model.cfg, 0, drp.learn_completion(data))
    (images, padded), people, *_ = collate([images[i] for i in range(8)], drp.pad_images)
    optimizer, values = drp.build_optimizer(model, model.cfg), []
    for step in range(200):
        seed_all(step)
        losses = step_losses(model, images, padded, people, epoch=0)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), model.cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        values.append(losses["loss_keypoints"].item())
    assert np.mean(values[-10:]) < values[0] / 5


@pytest.mark.slow
def test_the_summary_has_the_parameters_of_the_release():
    rows = {line.split()[0]: line.split() for line in drp.summary().splitlines()}
    assert {"tiny", "r50", "r50-crowdpose", "r50-edpose"} <= rows.keys()
    assert rows["r50"][2:6:2] == ["49.66", "49.44"] and rows["r50-crowdpose"][2:6:2] == ["49.53", "49.30"]
    assert 197 < float(rows["r50"][-1]) < 213, "GFLOPs of the release, which computes what its masks forbid"


def test_k_ca_near_the_identity_returns_about_its_points():
    """On points spread over the image; the start of the release sends all of them to one place."""
    points = torch.rand(1, 170, 2, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    decoder = drp.build("tiny", queries=10, near_identity=False).decoder
    attention = decoder.kca
    scattered = attention(points, points).std(1)
    drp.start_near_identity(decoder)
    with torch.no_grad():
        out = attention(points, points)
    assert (out - points).abs().mean() < 0.05 and (out.std(1) > 0.8 * points.std(1)).all()
    assert (scattered < 0.5 * points.std(1)).all()


def test_keypoints_start_unlike_one_another_where_nothing_is_learned_yet():
    """In the release's start they are a tenth of the person's content that they are added to."""
    tiny, released = (drp.build("tiny", near_identity=own).decoder.keypoint_content.weight for own in (True, False))
    assert 0.9 < tiny.std() < 1.1 and released.std() < 0.2
