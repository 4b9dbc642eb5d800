"""DiffusionRegPose against the released code's numbers, and by itself. Cases are found by file pattern."""
import json
import math
import re
import zlib
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import diffusionregpose as drp
from common import runtime, weights
from diffusionregpose import Targets
from tests.conftest import REFERENCE

FOLDER = REFERENCE / "diffusionregpose"
LEVELS = [(6, 8), (3, 4), (2, 2), (1, 1)]                   # of the goldens of single blocks


def golden(pattern: str):
    """Run a test once for every golden_<pattern>.npz; none there is a failure to notice, not a silent pass."""
    files = sorted(FOLDER.glob(f"golden_{pattern}.npz"))
    missing = pytest.param(None, marks=pytest.mark.skip(reason=f"no golden_{pattern}.npz in {FOLDER}"))
    return pytest.mark.parametrize("file", files or [missing], ids=lambda f: f.stem if f else "none")


def normal(key: str, shape, seed: int = 0) -> torch.Tensor:
    """The reference's standard-normal array, fixed by (seed, key)."""
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()))
    return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))


def fill(key: str, shape, seed: int) -> torch.Tensor:
    """The reference's weights for a tensor of this name."""
    n = normal(key, shape, seed)
    if key.endswith("running_var"):
        return 1 + 0.2 * n.tanh()
    if key.endswith(("running_mean", "bias")):
        return 0.05 * n
    if len(shape) <= 1:
        return 1 + 0.1 * n
    return n / math.sqrt(math.prod(shape[1:]))


@lru_cache
def official_state(name: str) -> dict[str, torch.Tensor]:
    """All tensors of a released file, the doubled ones and the constants as well."""
    manifest, made, state = json.loads((FOLDER / name).read_text()), {}, {}
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
    model = drp.build(preset, {17: "coco", 14: "crowdpose"}[keypoints], queries=queries, box_queries=box_queries)
    weights.load_strict(model, drp.convert_official(official_state(name), model.cfg), {})
    return model.eval().requires_grad_(False)


def model_of(case) -> tuple[drp.DiffusionRegPose, dict]:
    """The model of a golden file and what its meta entry says."""
    meta = json.loads(str(case["meta"]))
    return official_model(meta["manifest"], meta["num_people"], meta["num_queries"]), meta


def close(ours, theirs, tolerance: float, what: str = ""):
    """Largest difference, relative to the largest entry or 1."""
    ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    finite = theirs.isfinite()
    assert (ours[~finite] == theirs[~finite]).all(), what
    if finite.any():
        error = ((ours - theirs)[finite].abs().max() / theirs[finite].abs().max().clamp(min=1)).item()
        assert error <= tolerance, f"{what}: error {error:.2e}"


@contextmanager
def watch(**modules):
    """Lists of (arguments, result) of each call of the named modules."""
    seen, hooks = {name: [] for name in modules}, []
    for name, module in modules.items():
        hooks.append(module.register_forward_hook(lambda m, args, out, name=name: seen[name].append((args, out))))
    yield seen
    for hook in hooks:
        hook.remove()


def level_masks(padding_mask: torch.Tensor) -> list[torch.Tensor]:
    """(2, 65) → a mask (2, H, W) for each level."""
    parts = padding_mask.split([h * w for h, w in LEVELS], 1)
    return [part.view(-1, *shape) for part, shape in zip(parts, LEVELS)]


# ------------------------------------------------------------------------------------------ blocks


@golden("resnet50")
def test_backbone_equals_the_release(file):
    case, model = np.load(file), official_model()
    image = normal("input", (1, 3, 96, 128))
    for net in (model, drp.fuse(model)):                    # folding the norms must not change the result
        for level, x in enumerate(net.backbone(image), 3):
            close(x[:, ::2], case[f"c{level}"], 1e-4, f"level {level}")
    padded = torch.zeros(1, 96, 128, dtype=torch.bool)
    padded[:, 90:], padded[:, :, 100:] = True, True
    grid = model.encode_image(image, padded).grid
    for level, mask in zip((3, 4, 5), grid.padded.split([h * w for h, w in grid.shapes], 1)):
        assert (mask.view(case[f"mask{level}"].shape).numpy() == case[f"mask{level}"]).all()


@golden("embeddings")
def test_embeddings_equal_the_release(file):
    case, time = np.load(file), official_model().time_embedding
    padded = torch.zeros(1, 96, 128, dtype=torch.bool)
    padded[:, 90:], padded[:, :, 100:] = True, True
    masks = [F.interpolate(padded[None].float(), (96 // s, 128 // s))[0].bool() for s in (8, 32)]
    pos3, pos5 = (drp.cell_positions([mask], 256).view(1, *mask.shape[1:], 256).permute(0, 3, 1, 2) for mask in masks)
    close(pos3[:, ::3], case["pos3"], 1e-5)
    close(pos5, case["pos5"], 1e-5)
    boxes = normal("sine", (5, 2, 4)).sigmoid()
    close(boxes, case["sine_query_in"], 1e-6)
    close(drp.sine_embedding(boxes[..., [1, 0, 2, 3]], 128, 10000), case["sine_query"], 1e-5)
    t = torch.from_numpy(case["t"])
    close(time.sinusoid(t), case["time_sinusoid"], 1e-4)
    close(time.mlp[:3](time.sinusoid(t)), case["time_mlp"], 1e-4)
    close(time(t), case["scale_shift"], 1e-4)


@golden("deform_attn")
def test_deformable_attention_equals_the_release(file):
    case, model = np.load(file), official_model()
    assert [tuple(shape) for shape in case["spatial_shapes"].tolist()] == LEVELS
    grid = drp.make_grid(level_masks(torch.from_numpy(case["padding_mask"])))
    layers = {"2d": model.encoder[0].self_attn, "4d": model.decoder.layers[0].cross_attn}
    for kind, layer in layers.items():
        reference = torch.from_numpy(case[f"ref{kind}"])
        close(reference, normal(f"ref{kind[0]}", reference.shape).sigmoid(), 1e-6)
        with watch(out=layer.output_proj) as seen:
            out = layer(normal("query", (2, 9, 256)), reference, normal("value", (2, 65, 256)), grid)
        close(seen["out"][0][0][0], case[f"core{kind}"], 1e-5, "before the output projection")
        close(out, case[f"out{kind}"], 1e-5)


@golden("encoder_layer")
def test_encoder_layer_equals_the_release(file):
    case, model = np.load(file), official_model()
    grid = drp.make_grid(level_masks(torch.from_numpy(case["padding_mask"])))
    close(grid.valid, case["valid_ratios"], 1e-6)
    close(grid.centres[:, :, None] * grid.valid[:, None], case["reference_points"], 1e-5)
    close(model.encoder[0](normal("src", (2, 65, 256)), normal("pos", (2, 65, 256)), grid), case["out"], 1e-4)


@golden("decoder_layer")
def test_decoder_layer_equals_the_release(file):
    case, model = np.load(file), official_model()
    padding = np.load(FOLDER / "golden_encoder_layer.npz")["padding_mask"]
    grid = drp.make_grid(level_masks(torch.from_numpy(padding)))
    allowed = ~torch.from_numpy(case["attn_mask"]).view(2, 8, 11, 11)
    boxes = normal("dref", (11, 2, 4)).sigmoid().transpose(0, 1)
    inside = boxes[:, :, None] * grid.valid.repeat(1, 1, 2)[:, None]
    close(inside.transpose(0, 1), case["reference_input"], 1e-5)
    sine = drp.sine_embedding(inside[:, :, 0, [1, 0, 2, 3]], 128, 10000)
    close(sine.transpose(0, 1), case["query_sine"], 1e-4)
    close(model.decoder.position_head(sine).transpose(0, 1), case["query_pos_from_head"], 1e-4)
    x, position = (normal(key, (11, 2, 256)).transpose(0, 1) for key in ("tgt", "query_pos"))
    out = model.decoder.layers[0](x, position, inside, normal("memory", (2, 65, 256)), grid,
                                  lambda q, k, v: F.scaled_dot_product_attention(q, k, v, allowed))
    close(out.transpose(0, 1), case["out"], 1e-4)


@golden("proposals")
def test_proposals_equal_the_release(file):
    case = np.load(file)
    grid = drp.make_grid(level_masks(torch.from_numpy(case["padding_mask"])))
    proposals, usable = drp.box_proposals(grid)
    close(proposals, case["proposals"], 1e-4)
    memory = normal("memory", (2, 65, 256)).masked_fill(~usable[..., None], 0)
    close(memory[:, :, ::8], case["memory_out"], 1e-6)


# ------------------------------------------------------------------------------------------ the whole model


def by_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Our order, all boxes then all keypoints, → the release's: each person's box, then its keypoints."""
    return torch.cat([x[:, :groups, None], x[:, groups:].unflatten(1, (groups, -1))], 2).flatten(1, 2)


def check_encoder(case, seen, step: int, wide: int):
    args, first = seen["encoder"][0]
    for what, x in dict(enc_src=args[0], enc_pos=args[1], enc_layer0=first, memory=seen["last"][0][1]).items():
        close(x[:, ::step, ::wide], case[what], 1e-4, what)
    close(args[2].valid, case["enc_valid_ratios"], 1e-6)
    assert [list(shape) for shape in args[2].shapes] == case["enc_spatial_shapes"].tolist()
    assert (args[2].padded.numpy() == case["enc_padding_mask"]).all()
    close(seen["score"][0][1], case["enc_class"], 1e-4, "scores of all cells")


def check_decoder(case, seen, groups: int, wide: int, score_head):
    """Queries of the box layers are stored by ascending cell, people by rank."""
    scores = seen["score"][0][1].max(-1).values
    cells = scores.topk(seen["selection"][0][1][0].shape[1]).indices
    assert (cells.sort().values.numpy() == case["topk_token_ids_sorted"]).all()
    rows = cells[0].argsort()[::int(case["box_layer_row_stride"][0])]
    _, logits, boxes = seen["selection"][0][1]
    close(logits[:, rows], case["interm_logits_sorted"], 1e-4)
    close(boxes[:, rows], case["interm_boxes_sorted"], 1e-4)
    for l in (0, 1):
        close(seen["references"][l][:, rows], case[f"ref{l}_sorted"], 1e-4, f"reference {l}")
        close(seen["hs"][l][:, rows, ::wide], case[f"hs{l}_sorted"], 1e-3, f"features {l}")
    rank = score_head(seen["layers"][1][0]).max(-1).values.topk(groups)
    assert (cells.gather(1, rank.indices).numpy() == case["selected_token_ids"]).all()
    close(rank.values, case["selected_scores"], 1e-4)
    close(seen["ksa"][0][0][0], case["noisy_pose_01"], 1e-5)
    (z, _), moved = seen["kca"][0]
    # the release overwrites its coarse keypoints, so the file has K-CA's output there, and z minus that for K-SA's
    close(z, case["ksa_out_xy"] + case["coarse_kpt_xy"], 1e-4, "K-SA and coarse keypoints")
    close(moved, case["coarse_kpt_xy"], 1e-4, "K-CA")
    close(by_group(seen["references"][2], groups), case["ref2"], 1e-4, "after K-CA")
    for l in (2, 3, 4, 5):
        close(by_group(seen["hs"][l], groups)[:, ::11, ::wide], case[f"hs{l}"], 1e-3, f"features {l}")
    refs = torch.stack([by_group(r, groups) for r in seen["references"][3:]])
    tokens = refs.shape[2] // groups
    close(refs[:, :, ::tokens], case["refs3to5_box"], 1e-4)
    close(refs[:, :, :10 * tokens], case["refs3to5_kpt_first10"], 1e-4)


def watch_model(model, images, x):
    """A forward pass of one DDIM step from x, and what the model's parts took and gave."""
    decoder = model.decoder
    parts = dict(encoder=model.encoder[0], last=model.encoder[-1], score=model.selection.score, ksa=decoder.ksa,
                 selection=model.selection, kca=decoder.kca, mlp=model.time_embedding.mlp[2], time=model.time_embedding)
    layers = {f"layer{l}": layer for l, layer in enumerate(decoder.layers)}
    with watch(**parts, **layers) as seen:
        result = drp.sample(model, images, noise=x)[0]
    seen["layers"] = [(seen[name][0][1], *seen[name][0][0]) for name in layers]
    seen["references"] = [reference[:, :, 0] for _, _, _, reference, *_ in seen["layers"]]   # one image: not padded
    seen["hs"] = [decoder.norm(out) for out, *_ in seen["layers"]]
    return result, seen


@golden("forward_*")
def test_forward_equals_the_release(file):
    case = np.load(file)
    model, meta = model_of(case)
    (shape,), groups, keypoints = meta["images"], meta["num_people"], model.skeleton.num_keypoints
    x = normal("noise", (1, groups, 2 * keypoints)).view(1, groups, keypoints, 2)
    image = normal(meta["input_keys"][0], (3, *shape))[None]
    result, seen = watch_model(model, image, x)
    for level, y in enumerate(model.backbone(image), 3):
        close(y[:, ::32, ::2, ::2], case[f"backbone_c{level}"], 1e-4, f"level {level}")
    close(seen["mlp"][0][1], case["time_embedding"], 1e-4)
    close(seen["time"][0][1], case["time_scale_shift"].reshape(1, -1), 1e-4)
    check_encoder(case, seen, meta["token_stride"], meta["channel_stride"])
    check_decoder(case, seen, groups, meta["channel_stride"], model.decoder.score_heads[1])
    fast = drp.sample(drp.fuse(model), image, noise=x)[0]
    for found in (result, fast):
        close(found["logits"], case["pred_logits"], 1e-4)
        close(found["boxes"], case["pred_boxes"], 1e-4)
        close(found["keypoints"].flatten(2), case["pred_keypoints"][..., :2 * keypoints], 1e-4)
    _, x0, eps = drp.ddim_step(x, result["keypoints"], meta["t"], 0, model.cfg.scale)
    close(x0.flatten(2), case["x_start"], 1e-4)
    close(eps.flatten(2), case["pred_noise"], 1e-4)


# ------------------------------------------------------------------------------------------ diffusion


@golden("ddim")
def test_schedule_and_noising_equal_the_release(file):
    case, alpha_bar = np.load(file), drp.ALPHA_BAR
    before = torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    index = torch.from_numpy(case["index"])
    for name, ours in dict(alphas_cumprod=alpha_bar, alphas_cumprod_prev=before, betas=1 - alpha_bar / before,
                           sqrt_recipm1_alphas_cumprod=(1 / alpha_bar - 1).sqrt()).items():
        theirs = torch.from_numpy(case[f"{name}_f64"])
        assert torch.allclose(ours[index], theirs, rtol=1e-9, atol=1e-12), name
    pose, eps = (torch.from_numpy(case[name]).view(1, 6, 17, 2) for name in ("q_pose", "q_noise"))
    for t in (0, 437, 999):
        noisy = drp.noise_poses(pose, torch.tensor([t]), eps, float(case["scale"][0]))
        close(noisy.view(6, 34), case[f"q_sample_01_t{t}"], 1e-5, f"t = {t}")


@golden("ddim")
def test_ddim_equals_the_release(file):
    case = np.load(file)
    x, pose = (torch.from_numpy(case[name]).view(1, 5, 17, 2) for name in ("ddim_x", "ddim_pose"))
    for t, after in ((999, 499), (499, 249)):
        new, _, eps = drp.ddim_step(x, pose, t, after, float(case["scale"][0]))
        close(eps.flatten(2), case[f"ddim_noise_{t}"], 1e-5)
        close(new.flatten(2), case[f"ddim_next_{t}_{after}"], 1e-5)
    model = official_model(queries=10, box_queries=120)
    image = normal("input", (3, 192, 256))[None]
    results = drp.sample(model, image, steps=3, noise=normal("noise", (1, 10, 34)).view(1, 10, 17, 2))
    assert [r["t"] for r in results] == [int(case[f"loop_t_{i}"][0]) for i in range(3)]
    for i, found in enumerate(results):
        close(found["x"].flatten(2), case[f"loop_x_{i}"], 1e-4, f"x before step {i}")
        close(found["logits"], case[f"loop_pred_logits_{i}"], 1e-4)
        close(found["boxes"], case[f"loop_pred_boxes_{i}"], 1e-4)
        close(found["keypoints"].flatten(2), case[f"loop_pred_keypoints_{i}"][..., :34], 1e-4)
        _, x0, eps = drp.ddim_step(found["x"], found["keypoints"], found["t"], 0, model.cfg.scale)
        close(x0.flatten(2), case[f"loop_x_start_{i}"], 1e-4)
        close(eps.flatten(2), case[f"loop_pred_noise_{i}"], 1e-4)


@pytest.mark.parametrize("steps, times", [(1, [999]), (2, [999, 499]), (3, [999, 665, 332]), (4, [999, 749, 499, 249])])
def test_times_of_ddim(steps, times):
    assert drp.ddim_times(steps) == [*times, -1]


def test_padding_comes_after_the_true_poses():
    cfg, people = runtime.resolve(drp.PRESETS["tiny"], queries=6), [3, 0, 8]
    targets = [some_people(n) for n in people]
    noise = drp.draw_pose_noise(people, 17, cfg, torch.device("cpu"))
    for padding in drp.PADDINGS:
        poses = drp.pad_poses(targets, noise, padding)
        assert poses.shape == (3, 6, 17, 2)
        assert torch.equal(poses[0, :3], targets[0].poses)
        chosen = {tuple(pose.flatten().tolist()) for pose in poses[2]}             # six of the eight, none twice
        assert len(chosen) == 6 and chosen <= {tuple(pose.flatten().tolist()) for pose in targets[2].poses}
    assert (drp.pad_poses(targets, noise, "empty")[1] == 0).all()
    assert torch.equal(drp.pad_poses(targets, noise, "noise")[1], noise.pad[1])
    assert torch.equal(drp.pad_poses(targets, noise, "repeat")[0, 3:6].sort(0).values, targets[0].poses.sort(0).values)
    mean = drp.pad_poses(targets, noise, "mean")[0, 3:]
    assert torch.allclose(mean[0] - mean[0].mean(0), mean[2] - mean[2].mean(0), atol=1e-6)


# ------------------------------------------------------------------------------------------ training


def some_people(count: int) -> Targets:
    poses = torch.rand(count, 17, 2)
    return Targets(poses, torch.ones(count, 17), torch.rand(count, 4) / 2 + 0.2, torch.rand(count), poses)


def targets_of(case) -> list[Targets]:
    """The case's people, image by image."""
    targets = []
    for i in range(2):
        given = {name: torch.from_numpy(case[f"target{i}_{name}"])
                 for name in ("keypoints", "keypoints_buquan", "boxes", "area")}
        keypoints, visible = given["keypoints"][:, :34].view(-1, 17, 2), given["keypoints"][:, 34:]
        targets.append(Targets(keypoints, (visible > 0).float(), given["boxes"], given["area"],
                               given["keypoints_buquan"][:, :34].view(-1, 17, 2)))
    return targets


def noise_of(case, targets) -> drp.Noise:
    person = [torch.cat([torch.arange(len(t)).repeat(100 // len(t)), torch.from_numpy(case[f"rng/dn_residue_idx{i}"])])
              for i, t in enumerate(targets)]
    return drp.Noise(torch.stack(person), torch.from_numpy(case["rng/dn_label_u"]) < 0.5,
                     torch.from_numpy(case["rng/dn_label_new"]), 2 * torch.from_numpy(case["rng/dn_box_u"]) - 1)


def pose_noise_of(case, targets) -> drp.PoseNoise:
    eps = torch.stack([torch.from_numpy(case[f"rng/diff_noise{i}"]).view(-1, 17, 2) for i in range(2)])
    pad = torch.zeros_like(eps)
    for i, people in enumerate(targets):
        if f"rng/diff_pad{i}" in case:
            pad[i, len(people):] = torch.from_numpy(case[f"rng/diff_pad{i}"]).view(-1, 17, 2)
    return drp.PoseNoise(torch.from_numpy(case["t"]), eps, [torch.arange(0)] * 2, pad)


def batch_of(meta) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of different sizes at the top left of zeros, and where there is none."""
    height, width = (max(sides) for sides in zip(*meta["images"]))
    images = torch.zeros(len(meta["images"]), 3, height, width)
    padded = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, ((h, w), key) in enumerate(zip(meta["images"], meta["input_keys"])):
        images[i, :, :h, :w], padded[i, :h, :w] = normal(key, (3, h, w)), False
    return images, padded


@golden("train_*")
def test_training_forward_equals_the_release(file):
    case = np.load(file)
    model, meta = model_of(case)
    targets = targets_of(case)
    noise = pose_noise_of(case, targets)
    poses = drp.pad_poses(targets, noise, {"normal": "noise", "zero": "empty"}[meta["padding"]])
    noisy = drp.noise_poses(poses, noise.t, noise.eps, model.cfg.scale)
    close(noisy.flatten(2), case["x_t_01"], 1e-5, "noisy poses")
    denoising = model.denoising_queries(targets, noise_of(case, targets))
    close(denoising.boxes, case["dn_known_boxes"], 1e-6)
    assert denoising.known.all() and (case["dn_known_labels"] == 1).all()
    close(denoising.reference, torch.from_numpy(case["dn_query_bbox_unsigmoid"]).sigmoid(), 1e-5)
    close(denoising.content[..., ::16], case["dn_noised_labels_embed_stride"], 1e-6)
    assert (denoising.blocked.numpy() == case["attn_mask_box"][:, :100, :100]).all()
    try:
        result = model.train()(*batch_of(meta), noisy, noise.t, denoising)
    finally:
        model.eval()
    for name in ("logits", "boxes"):
        close(result[name], case[f"out/pred_{name}"], 1e-4, name)
    close(result["keypoints"].flatten(2), case["out/pred_keypoints"][..., :34], 1e-4, "keypoints")
    logits, boxes = result["dn_layers"][-1]
    close(logits, case["out/dn_class_pred"], 1e-4)
    close(boxes, case["out/dn_bbox_pred"], 1e-4)
    assert [k is None for _, _, k in result["layers"]] == [True] * 2 + [False] * 4


@golden("train_*")
def test_attention_rules_equal_the_released_masks(file):
    case = np.load(file)
    groups, blocked = 10, torch.from_numpy(case["attn_mask_box"])[:, :100, :100]
    q, k, v = normal("qkv", (3, 2, 4, 220, 8))
    theirs = F.scaled_dot_product_attention(q, k, v, ~torch.from_numpy(case["attn_mask_box"])[:, None])
    close(drp.attend_boxes(q, k, v, blocked), theirs, 1e-5)
    close(drp.attend_boxes(q, k, v, None), F.scaled_dot_product_attention(q, k, v), 1e-5)
    q, k, v = normal("qkv", (3, 2, 4, 280, 8))              # in our order; the mask is person after person
    order = torch.cat([torch.arange(100), 100 + by_group(torch.arange(180)[None, :, None], groups)[0, :, 0]])
    mask = torch.empty(2, 280, 280, dtype=torch.bool)
    mask[:, order[:, None], order] = torch.from_numpy(case["attn_mask_pose"])
    theirs = F.scaled_dot_product_attention(q, k, v, ~mask[:, None])
    close(drp.attend_groups(q, k, v, blocked, groups), theirs, 1e-5)
    close(drp.attend_groups(*(x[:, :, 100:] for x in (q, k, v)), None, groups), theirs[:, :, 100:], 1e-5)


# ------------------------------------------------------------------------------------------ released files


@pytest.mark.parametrize("file", sorted(FOLDER.glob("manifest_*.json")), ids=lambda f: f.stem)
def test_every_released_tensor_is_used_or_ignored_by_name(file):
    manifest, state = json.loads(file.read_text()), official_state(file.name)
    preset, keypoints = drp.recognise(state)
    model = official_model(file.name)                       # loads strictly
    assert (preset, keypoints) == ("r50", 17) if "coco" in file.stem else ("r50-crowdpose", 14)
    ignored = {key for key in state if any(re.match(pattern, key) for pattern in drp.IGNORED)}
    assert ignored == manifest["aliases"].keys() | set(manifest["constants"])
    for key, canonical in manifest["aliases"].items():
        assert torch.equal(state[key], state[canonical]), key
    fresh = drp.build(preset, {17: "coco", 14: "crowdpose"}[keypoints])
    counts = [sum(p.numel() for p in fresh.parameters() if p.requires_grad or not trained) for trained in (False, True)]
    assert counts == {17: [49_660_196, 49_437_796], 14: [49_527_324, 49_304_924]}[keypoints]
    key = "transformer.decoder.hw.weight"
    with pytest.raises(runtime.UserError, match="keypoint_size"):
        weights.load_strict(model, drp.convert_official({k: v for k, v in state.items() if k != key}, model.cfg), {})
    with pytest.raises(runtime.UserError, match="unheard_of"):
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
    files = dict(release=dict(model=state, ema_model={key: 0 * value for key, value in state.items()}),
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
    torch.save(dict(ema_model=state), tmp_path / "average.pth")      # what the release never updates
    with pytest.raises(runtime.UserError, match="holds no tensors"):
        drp.load_init(model, str(tmp_path / "average.pth"))


# ------------------------------------------------------------------------------------------ by itself


def tiny(**overrides) -> drp.DiffusionRegPose:
    """A tiny model whose heads do not start at zero."""
    model = drp.build("tiny", **overrides)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def test_tiny_model_gives_the_promised_shapes():
    model, images = tiny(), torch.randn(2, 3, 96, 128)
    targets = [some_people(2), some_people(0)]
    denoising = model.denoising_queries(targets)
    result = model.train()(images, None, torch.rand(2, 10, 17, 2), torch.tensor([3, 999]), denoising)
    assert [result[name].shape for name in ("logits", "boxes", "keypoints")] == [(2, 10, 2), (2, 10, 4), (2, 10, 17, 2)]
    assert [[None if x is None else tuple(x.shape) for x in layer] for layer in result["layers"]] == [
        [(2, 40, 2), (2, 40, 4), None]] + [[(2, 10, 2), (2, 10, 4), (2, 10, 17, 2)]] * 2
    assert [tuple(x.shape) for x in result["proposals"]] == [(2, 40, 2), (2, 40, 4)]
    assert [[tuple(x.shape) for x in layer] for layer in result["dn_layers"]] == [[(2, 10, 2), (2, 10, 4)]] * 3
    assert model.eval()(images, None, torch.rand(2, 10, 17, 2), torch.tensor([3, 999])).keys() == {
        "logits", "boxes", "keypoints"}


@torch.no_grad()
def test_result_depends_on_time_and_noise_unless_it_is_edpose():
    image = torch.randn(1, 3, 96, 128)
    poses, t = torch.rand(2, 1, 10, 17, 2), torch.tensor([[10], [900]])
    for on in (True, False):
        model = tiny(ksa_kca=on)
        first, other_t, other_poses = (model(image, None, poses[i], t[j])["keypoints"] for i, j in ((0, 0), (0, 1), (1, 0)))
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
    assert len(steps) == 4 and torch.equal(steps[0]["noisy"], drp.to_poses(noise.expand(2, -1, -1, -1), model.cfg.scale))


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
    for expected, found in zip(alone["proposals"], one["proposals"]):
        close(found, expected, 1e-4)
    for name in ("logits", "boxes", "keypoints"):           # as released, padding shifts the decoder's positions
        close(one[name], other[name], 1e-5, name)


def test_batch_without_people_gives_every_parameter_a_gradient():
    model, cfg = tiny().train(), drp.PRESETS["tiny"]
    targets = [some_people(0), some_people(0)]
    noise = drp.draw_pose_noise([0, 0], 17, cfg, torch.device("cpu"))
    noisy = drp.noise_poses(drp.pad_poses(targets, noise, cfg.padding), noise.t, noise.eps, cfg.scale)
    denoising = model.denoising_queries(targets)
    assert not denoising.known.any() and not denoising.blocked.any()
    result = model(torch.randn(2, 3, 96, 128), None, noisy, noise.t, denoising)
    outputs = [*result["proposals"], *(x for layer in result["layers"] + result["dn_layers"] for x in layer if x is not None)]
    sum(x.sum() for x in outputs).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_denoising_queries_take_people_in_turn():
    model = tiny()
    counts = [3, 0, 25]
    noise = drp.draw_noise(counts, model.cfg, torch.device("cpu"))
    assert noise.person[0, :9].tolist() == [0, 1, 2] * 3
    assert len(set(noise.person[2].tolist())) == 10                                # ten of the 25, none twice
    denoising = model.denoising_queries([some_people(n) for n in counts], noise)
    allowed = ~denoising.blocked[0]
    assert torch.equal(allowed.nonzero(), torch.block_diag(*[torch.ones(3, 3)] * 3, torch.ones(1, 1)).nonzero())
    assert denoising.known.all(1).tolist() == [True, False, True]
    assert tiny(dn_queries=0).denoising_queries([some_people(1)]) is None


def test_point_attention_equals_its_formula_with_gradients():
    attention = drp.PointAttention(32).double()
    z, p = (torch.rand(2, 9, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights_ = (9 ** 0.5 * attention.query(z) @ attention.key(p).mT).softmax(-1)
    close(attention(z, p), weights_ @ attention.value(p), 1e-12)
    assert torch.autograd.gradcheck(attention, (z, p))


@pytest.mark.parametrize("wrong, message", [(dict(padding="zeros"), "choose from empty"), (dict(dim=100), "multiple of"),
                                            (dict(layers=1), "box_layers"), (dict(queries=50), "box_queries"),
                                            (dict(drop_epochs="a"), "commas"), (dict(batch=3, accum=2), "accum")])
def test_config_names_what_is_wrong(wrong, message):
    with pytest.raises(runtime.UserError, match=message):
        drp.build("tiny", **wrong)


def test_as_released_sets_what_it_stands_for():
    cfg = runtime.resolve(drp.PRESETS["r50"], as_released=True)
    assert (cfg.uniform_t, cfg.padding, cfg.keypoint_completion) == (False, "noise", False)
    assert (drp.draw_pose_noise([1, 0], 17, cfg, torch.device("cpu")).t == 0).all()


def test_image_without_room_for_people_is_refused():
    with pytest.raises(runtime.UserError, match="larger --short_side"):
        tiny().encode_image(torch.zeros(1, 3, 16, 16))
