"""QueryPose against the released code's numbers, and by itself. Cases are found by file pattern."""
import importlib
import json
import math
import re
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import querypose as qp
from common import metrics, transforms, weights
from common.cli import parse, parse_numbers, resolve
from common.errors import UserError
from common.nets.hrnet import HRNet
from common.nets.swin import Swin, WindowAttention
from common.predict import collate
from common.ranks import Ranks
from common.records import Sample, gather_people
from common.run import RunFolder
from common.splits import open_dataset
from common.skeletons import get_skeleton, skeleton_from_category
from data import puppets
from kernels.dispatch import plain
from tests.helpers import assert_equal, close, fill, golden, normal, reference, watch

CUDA = torch.cuda.is_available()


@lru_cache
def manifest_of(name: str) -> dict:
    return json.loads(reference(f"querypose/{name}").read_text())


def official_state(name: str, seed: int, only: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a released file whose names match `only`; constants are left out, as the conversion does."""
    manifest, state = manifest_of(name), {}
    for key, shape in manifest["keys"].items():
        if re.search(only, key) and key not in manifest["constants"]:
            state[key] = fill(key, shape, seed) * manifest["gains"].get(key, 1)
    if "init_proposal_boxes.weight" in state:
        state["init_proposal_boxes.weight"] = 0.5 + 0.25 * torch.tanh(2 * state["init_proposal_boxes.weight"])
    return state


# ------------------------------------------------------------------------------------------ RoIAlign


def brute_roi_align(maps: list[torch.Tensor], image: int, box: list[float], level: int, bins: int) -> torch.Tensor:
    """One box, sample by sample, as the release defines it: (bins, bins, C)."""
    x, stride = maps[level][image], 4 * 2 ** level
    height, width = x.shape[1:]
    x1, y1, x2, y2 = (side / stride - 0.5 for side in box)

    def at(v: float, u: float) -> torch.Tensor:
        if not (-1 <= v <= height and -1 <= u <= width):
            return x.new_zeros(len(x))
        v, u = max(v, 0), max(u, 0)
        top, left = min(int(v), height - 1), min(int(u), width - 1)
        low, right = min(top + 1, height - 1), min(left + 1, width - 1)
        a, b = v - top, u - left
        return ((1 - a) * ((1 - b) * x[:, top, left] + b * x[:, top, right])
                + a * ((1 - b) * x[:, low, left] + b * x[:, low, right]))

    def cell(i: int, j: int) -> torch.Tensor:
        return sum(at(y1 + (y2 - y1) * (i + p) / bins, x1 + (x2 - x1) * (j + q) / bins)
                   for p in (0.25, 0.75) for q in (0.25, 0.75)) / 4

    return torch.stack([torch.stack([cell(i, j) for j in range(bins)]) for i in range(bins)])


FORMS_OF_ROI_ALIGN = pytest.mark.parametrize("form", [qp.roi_align_formula, qp.roi_align_bag],
                                             ids=["formula", "bag"])


@FORMS_OF_ROI_ALIGN
def test_roi_align_equals_sample_by_sample_and_so_do_gradients(form):
    maps = [torch.randn(2, 3, 12 >> i, 16 >> i, dtype=torch.float64, requires_grad=True) for i in range(3)]
    boxes = [[5.0, 3, 40, 30], [-20, -9, 8.5, 50], [60, 40, 75, 60], [7, 7, 7, 20], [-90, -90, -80, -80],
             [0, 0, 64, 48], [-3.9, 30, 70, 52]]
    image, level = torch.tensor([0, 1, 0, 1, 0, 1, 1]), torch.tensor([0, 1, 0, 2, 1, 2, 0])
    boxes = torch.tensor(boxes, dtype=torch.float64)
    ours = form(maps, image, boxes, level, 3)
    rows = zip(image.tolist(), boxes.tolist(), level.tolist())
    theirs = torch.stack([brute_roi_align(maps, *row, 3).flatten(0, 1) for row in rows])
    assert (ours - theirs).abs().max() < 1e-12 and ours[4].abs().max() == 0
    push = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((out * push).sum(), maps) for out in (ours, theirs))):
        assert (a - b).abs().max() < 1e-12


@FORMS_OF_ROI_ALIGN
def test_roi_align_takes_boxes_that_diverged(form):
    maps = [torch.ones(1, 2, 8 >> i, 8 >> i) for i in range(4)]
    boxes = torch.tensor([[math.nan] * 4, [-1e30, -1e30, 1e30, 1e30], [0, 0, math.inf, math.inf], [9, 9, 3, 3]])
    level = qp.box_level(boxes)
    out = form(maps, torch.zeros(4, dtype=torch.long), boxes, level, 2)
    assert 0 <= level.min() and level.max() <= 3, "a map that is there"
    assert out.shape == (4, 4, 2) and out.isfinite().all()


@golden("querypose/golden_roialign*.npz")
@FORMS_OF_ROI_ALIGN
def test_roi_align_equals_the_release(file, form):
    case = np.load(file)
    (h, w), seed = case["p2_hw"].tolist(), int(case["seed"])
    boxes = [torch.from_numpy(case[f"boxes{i}"]) for i in range(sum(name.startswith("boxes") for name in case.files))]
    image = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(one) for one in boxes]))
    boxes, sizes = torch.cat(boxes), [int(name[3:]) for name in case.files if re.fullmatch(r"out\d+", name)]
    shape = int(image.max()) + 1, case[f"out{sizes[0]}"].shape[1]
    maps = [normal(f"roi.p{i + 2}", (*shape, h >> i, w >> i), seed) for i in range(4)]
    level = qp.box_level(boxes)
    assert (level.numpy() + 2 == case["levels"]).all() and sizes
    for bins in sizes:                                      # 14: for poses, all from the finest map
        out = form(maps, image, boxes, level if bins < 14 else torch.zeros_like(level), bins)
        close(out.transpose(1, 2).unflatten(2, (bins, bins)), case[f"out{bins}"], 2e-5)


# ------------------------------------------------------------------------------------------ one stage


def load_stage(stage: torch.nn.Module, state: dict, prefix: str):
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    ignored = {} if getattr(stage, "full", True) else {r"^(dynamic|query_norm|query_ffn)\.": "of the full form"}
    weights.load_strict(stage, own, ignored)
    return stage.eval().requires_grad_(False)


@lru_cache
def stage_state(seed: int) -> dict:
    state = official_state("manifest_r50_full.json", seed, r"head_series\.0\.")
    return qp.convert_official(state, qp.PRESETS["r50"])


def stage_maps(case) -> list[torch.Tensor]:
    (h, w), shape = case["p2_hw"].tolist(), (len(case["boxes_in"]), case["inst_query"].shape[-1])
    return [normal(f"stage.p{i + 2}", (*shape, h >> i, w >> i), int(case["seed"])) for i in range(4)]


def rows_first(x) -> torch.Tensor:
    """The release's (M, R, ...) → ours (R, M, ...)."""
    return torch.from_numpy(x).transpose(0, 1)


@golden("querypose/golden_stage*.npz")
def test_box_stage_equals_the_release(file):
    case = np.load(file)
    stage = load_stage(qp.BoxStage(qp.PRESETS["r50"]), stage_state(int(case["seed"])), "box_stages.0.")
    boxes = torch.from_numpy(case["boxes_in"])
    batch, count = boxes.shape[:2]
    dynamic = stage.dynamic
    with watch(attention=stage.attention, norm1=stage.norm1, generate=dynamic.generate, inner=dynamic.norm1,
               outer=dynamic.norm2, dynamic=dynamic, norm2=stage.norm2, score=stage.score_tower,
               tower=stage.delta_tower, delta=stage.delta) as seen:
        queries, logits, moved = stage(stage_maps(case), normal("stage.query", (batch, count, 256),
                                                                int(case["seed"])), boxes)
    out = {name: calls[0][1] for name, calls in seen.items()}
    roi = seen["dynamic"][0][0][1]
    close(roi.transpose(1, 2).unflatten(2, (7, 7))[:, ::32], case["box_roi"], 5e-5, "features in the box")
    close(out["attention"].transpose(0, 1)[..., ::2], case["self_attn"], 5e-5, "attention")
    close(out["norm1"].transpose(0, 1)[..., ::2], case["after_norm1"], 5e-5, "norm1")
    close(out["generate"][None, :, ::97], case["dyn_params_sub"], 5e-5, "generated weights")
    close(out["inner"][::4, :, ::8], case["dyn_ln1_sub"], 1e-4, "first layer")
    close(out["outer"][::4, :, ::16], case["dyn_ln2_sub"], 1e-4, "second layer")
    close(out["dynamic"][:, ::2], case["dyn_out"], 1e-4, "dynamic convolution")
    close(out["norm2"].flatten(0, 1)[None, :, ::2], case["after_norm2"], 1e-4, "norm2")
    close(queries.flatten(0, 1)[None], case["inst_query"], 1e-4, "queries")
    close(out["score"].flatten(0, 1)[:, ::2], case["cls_feature"], 1e-4, "score tower")
    close(out["tower"].flatten(0, 1)[:, ::2], case["reg_feature"], 1e-4, "delta tower")
    close(out["delta"].flatten(0, 1), case["deltas"], 1e-4, "deltas")
    close(logits[..., None], case["logits"], 1e-4, "logits")
    close(moved, case["boxes_out"], 1e-4, "boxes")


@golden("querypose/golden_stage*.npz")
def test_keypoint_stage_equals_the_release(file):
    """Light and full share their weights, and G: one pass of convolutions, which cost the most, serves all three."""
    case, seed = np.load(file), int(np.load(file)["seed"])
    boxes, queries = torch.from_numpy(case["boxes_out"]).flatten(0, 1), torch.from_numpy(case["inst_query"][0])
    image = torch.arange(len(case["boxes_in"])).repeat_interleave(case["boxes_in"].shape[1])
    given = normal("stage.part", (7, len(boxes), 128), seed).transpose(0, 1)
    first = fill("part_query.weight", (7, 128), seed)[None]
    finest, state, rois = stage_maps(case)[0], stage_state(seed), []
    for form, prefix, parts in (("full", "full", given), ("light", "light", given),
                                ("light", "light_first_stage", first)):
        cfg = resolve(qp.PRESETS["r50"], full=form == "full")
        stage = load_stage(qp.KeypointStage(cfg, qp.keypoint_parts(get_skeleton("coco"), "c")), state,
                           "keypoint_stages.0.")
        if rois:
            stage.roi = lambda *args: rois[0]
        look, watched = stage.look, dict(sim=stage.update, residual=stage.residual[2], attention=stage.attention,
                                         norm=stage.norm, gates=stage.update.linear2, look=stage.look)
        if form == "full":
            watched |= dict(dynamic=stage.dynamic, up=look.upsample, logits=look.attention)
        with watch(**watched, first=stage.convs[0]) as seen:
            keypoints, sigmas, new, after = stage(finest, image, boxes, queries, parts)
        out = {name: calls[0][1] for name, calls in seen.items() if calls}
        pose = torch.cat([keypoints, 1 - sigmas.mean(-1, keepdim=True)], -1)
        close(pose.view(*case["boxes_in"].shape[:2], 17, 3), case[f"{prefix}_pose"], 1e-4, f"{prefix} poses")
        name = f"{prefix}_part_query_out" if parts is given else f"{prefix}_part_query"
        close(after[..., ::4], rows_first(case[name]), 1e-4, f"{prefix} parts")
        if parts is first:
            continue
        close(sigmas.view(*case["boxes_in"].shape[:2], 17, 2), case[f"{form}_sigma"], 1e-4, f"{form} sigmas")
        close(out["sim"][..., ::4], rows_first(case[f"{form}_sim"]), 1e-4, f"{form} SIM")
        close(out["residual"][..., ::4], case[f"{form}_residual"][2], 1e-4, f"{form} residual")
        close(out["gates"][..., ::8], rows_first(case[f"{form}_sim_gate_logits_sub"]), 1e-4, f"{form} gates")
        close(out["attention"][..., ::4], rows_first(case[f"{form}_part_attn"]), 1e-4, f"{form} attention")
        close(out["norm"][..., ::4], rows_first(case[f"{form}_after_part_norm"]), 1e-4, f"{form} norm")
        close(new[None], case[f"{form}_inst_query_returned"], 1e-4, f"{form} instance queries")
        if form == "full":
            rois.append(seen["look"][0][0][0])
            close(seen["first"][0][0][0][::4, ::32], case["pose_roi_sub"], 5e-5, "features in the box")
            close(rois[0][::4, ::32], case["pose_convs_sub"], 1e-4, "convolutions")
            close(out["up"][::8, ::32], case["deconv_sub"], 1e-4, "upsampled")
            close(out["logits"].flatten(2).softmax(-1)[::6], case["attention_sub"], 1e-4, "attention maps")
            close(out["look"][..., ::4], rows_first(case["spegm"]), 1e-4, "SPEGM")
            close(out["dynamic"][:, ::4], case["full_pose_dyn_out"][:, ::4], 1e-4, "dynamic convolution")
            coordinates = [head.coordinates.weight @ x.T / x.norm(dim=1) + head.coordinates.bias[:, None]
                           for head, x in zip(stage.heads, after.unbind(1))]
            close(torch.cat(coordinates).T, case["full_coord_by_part"], 1e-4, "coordinates")


# ------------------------------------------------------------------------------------------ the whole network


def preset_of(file) -> tuple[str, str, str]:
    """(preset, form, manifest) of golden_<preset>_<light|full>_*.npz."""
    net, form = re.match(r"golden_(\w+?)_(light|full)_forward", file.stem).groups()
    return net, form, f"manifest_{net}_{form}.json"


def normalised(image: np.ndarray) -> torch.Tensor:
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    return (torch.from_numpy(image).float() - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def released_forward(case, preset: str, form: str, manifest: str):
    """The rows with poses, all stages and what the parts of the model gave; on a GPU with all rows and stages.

    On a CPU the light form gives poses to every tenth query, which changes nothing for these; the full form, where
    boxes depend on all poses, ends after two stages. With POSE_KERNELS=plain both run through the paper's loop.
    """
    stages = 2 if form == "full" and not CUDA else 6
    keys = rf"^(?!head\.(pose_)?head_series\.[{stages}-9])"
    with torch.device("meta"):
        model = qp.build(preset, full=form == "full", stages=stages, queries=case["init_boxes"].shape[1])
    state = qp.convert_official(official_state(manifest, int(case["seed"]), keys), model.cfg)
    assert model.state_dict().keys() == state.keys()
    model.to_empty(device="cpu").load_state_dict(state)                # no time goes into start values
    for module in model.modules():                                     # constants, which no file has
        if isinstance(module, qp.KeypointStage):
            module.order.copy_(torch.tensor(sum(qp.keypoint_parts(model.skeleton, "c"), [])).argsort())
        if isinstance(module, WindowAttention):
            module.index.copy_(WindowAttention(6, 1).index)
    pictures = [normalised(case[f"image{i}"]) for i in range(len(case["orig_hw"]))]
    height, width = (-(-max(p.shape[side] for p in pictures) // 32) * 32 for side in (1, 2))
    images = torch.stack([F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures])
    sizes = torch.tensor([p.shape[:0:-1] for p in pictures]).float()
    close(model.first_boxes(sizes), case["init_boxes"], 1e-5, "first boxes")
    chosen = torch.zeros(case["init_boxes"].shape[:2], dtype=torch.bool)
    chosen[:, ::1 if CUDA or form == "full" or plain() else 10] = True
    device = torch.device("cuda" if CUDA else "cpu")
    model, images = model.eval().to(device), images.to(device, memory_format=torch.channels_last)
    parts = dict(backbone=model.backbone, neck=model.neck, look=model.keypoint_stages[0].look,
                 update=model.keypoint_stages[0].update, conv=model.keypoint_stages[0].convs[0],
                 maps=model.keypoint_stages[0].look.attention, dynamic=model.box_stages[0].dynamic)
    for s in range(stages):
        parts |= {f"box{s}": model.box_stages[s], f"keypoint{s}": model.keypoint_stages[s]}
    with watch(**parts) as seen:
        stages = model(images, sizes.to(device), (lambda found: chosen.to(device)) if form == "light" and not plain() else None)
    return chosen, stages, {name: calls[0] for name, calls in seen.items()}


@golden("querypose/golden_*_forward*.npz", quick="*r50_light*")
def test_forward_equals_the_release(file):
    case = np.load(file)
    preset, form, manifest = preset_of(file)
    chosen, stages, seen = released_forward(case, preset, form, manifest)
    batch, count = chosen.shape
    for level, (c, p) in enumerate(zip(seen["backbone"][1], seen["neck"][1]), 2):
        step = (4, 4, 2, 1)[level - 2]
        close(c[:, ::c.shape[1] // 8, ::step, ::step], case[f"sub_c{level}"], 1e-5, f"backbone {level}")
        close(p[:, ::32, ::step, ::step], case[f"sub_p{level}"], 5e-5, f"neck {level}")
    rows = chosen.flatten().nonzero().squeeze(1)
    at = {step: torch.isin(rows, torch.arange(0, count * batch, step * batch)) for step in (10, 20, 30)}
    roi = seen["dynamic"][0][1].transpose(1, 2).unflatten(2, (7, 7))
    close(roi[::10 * batch, ::32], case["sub_box_roi_stage0"], 1e-4, "features in boxes")
    close(seen["conv"][0][0][at[20], ::64], case["sub_pose_roi_stage0"], 1e-4, "features for poses")
    close(seen["look"][0][0][at[20], ::64], case["sub_pose_convs_stage0"], 1e-4, "convolutions")
    attention = seen["maps"][1].flatten(2).softmax(-1)
    close(attention[at[30]], case["sub_attention_stage0"], 1e-4, "attention")
    close(seen["look"][1][at[10], :, ::4], rows_first(case["sub_part_embed_stage0"]), 2e-4, "SPEGM")
    close(seen["update"][1][at[10], :, ::4], rows_first(case["sub_sim_out_stage0"]), 2e-4, "SIM")
    for s, (logits, boxes, keypoints, sigmas) in enumerate(stages):
        queries = seen[f"box{s}"][1][0].flatten(0, 1)
        close(queries[::5, ::4], case["sub_inst_query_after_box"][s], 2e-4, f"queries {s}")
        close(seen[f"keypoint{s}"][1][3][at[10], :, ::4], rows_first(case["sub_part_query"][s]), 2e-4, f"parts {s}")
        close(logits, case["stage_logits"][s], 2e-4, f"logits {s}")
        assert np.abs(boxes.cpu().numpy() - case["stage_boxes"][s]).max() < 0.05, f"boxes {s}"
        close(keypoints[chosen], case["stage_pose"][s][..., :2][chosen.numpy()], 2e-4, f"poses {s}")
        close(sigmas[chosen], case["stage_sigma"][s][chosen.numpy()], 2e-4, f"sigmas {s}")
        assert (keypoints[~chosen] == 0).all() and (sigmas[~chosen] == 1).all()
    if form == "full":
        after = seen["keypoint1"][1][2]
        close(after[::5, ::4], case["sub_inst_query_after_pose"][1], 2e-4, "queries after the poses")


@golden("querypose/manifest_*.json")
def test_every_released_tensor_has_its_place(file):
    manifest = json.loads(file.read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in manifest["keys"].items()}
    preset, keypoints = qp.recognise(state)
    net, form = file.stem.removeprefix("manifest_").rsplit("_", 1)
    assert preset.startswith(net) and (qp.PRESETS[preset].full, keypoints) == (form == "full", 17)
    with torch.device("meta"):
        model = qp.build(preset)
    converted = qp.convert_official(state, model.cfg)
    weights.load_strict(model, converted, {})
    ignored = {key for key in state if any(re.search(pattern, key) for pattern in qp.IGNORED)}
    assert ignored == {*manifest["unused_in_forward"], *manifest["constants"]} & {*state}
    assert all(any(re.search(pattern, key) for key in state) or "position" in pattern or "conv" in pattern
               for pattern in qp.IGNORED)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {*qp.convert_official(dict.fromkeys(manifest["frozen_parameters"], 0), model.cfg)}
    assert qp.recognise({"backbone.stem.weight": torch.empty(1)}) is None


# ------------------------------------------------------------------------------------------ the flow


@golden("querypose/golden_flow*.npz")
def test_flow_equals_the_release(file):
    case, flow = np.load(file), qp.RealNVP()
    state = official_state("manifest_r50_light.json", int(case["seed"]), "^criterion")
    weights.load_strict(flow, {name.removeprefix("flow."): value for name, value in
                               qp.convert_official(state, qp.PRESETS["r50"]).items()}, {})
    x = torch.from_numpy(case["x"])
    z, log_det = flow.inverse(x)
    close(z, case["z"], 1e-5)
    close(log_det, case["log_det"], 1e-5)
    close(flow.log_prob(x), case["log_prob"], 4e-6)
    close(flow(x), case["forward"], 1e-5)
    other = 1 - flow.kept[5]
    for ours, theirs in zip(flow.coupling(5, x * flow.kept[5]), ("s", "t")):
        close(ours, torch.from_numpy(case[f"first_inverse_layer_{theirs}"]) * other, 1e-5)


def test_flow_is_a_density():
    flow = qp.RealNVP(hidden=8).double()
    z = torch.randn(5, 2, dtype=torch.float64)
    back, log_det = flow.inverse(flow(z))
    assert torch.allclose(back, z, atol=1e-12)
    jacobian = torch.stack([torch.autograd.functional.jacobian(flow, row) for row in z])
    assert torch.allclose(log_det, -jacobian.det().abs().log(), atol=1e-10)
    axis = torch.linspace(-8, 8, 161, dtype=torch.float64)
    total = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total - 1) < 1e-3


# ------------------------------------------------------------------------------------------ the model by itself

SMALL = dict(stages=2, dim=32, heads=2, ffn=32, dynamic=8, conv_width=32, part_dim=16, pose_roi=4, box_roi=3,
             queries=6)


def small(skeleton: str = "coco", **overrides) -> qp.QueryPose:
    return qp.build("tiny", skeleton, **SMALL | overrides)


def pictures(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 64, 96), torch.tensor([[96.0, 64.0], [70.0, 50.0]])[:batch]


def some(found: list[qp.Output]) -> torch.Tensor:
    """The queries that a test matches."""
    assert all(output.logits.shape == output.boxes.shape[:2] for output in found)
    mask = torch.zeros_like(found[0].logits, dtype=torch.bool)
    mask[0, 1] = mask[0, 4] = mask[1, 0] = True
    return mask


def test_training_outputs_and_gradients():
    model, (images, sizes) = small().train(), pictures()
    stages = model(images, sizes, some)
    assert len(stages) == 2
    for logits, boxes, keypoints, sigmas in stages:
        assert (logits.shape, boxes.shape) == ((2, 6), (2, 6, 4))
        assert keypoints.shape == sigmas.shape == (2, 6, 17, 2)
        posed = (sigmas < 1).all(-1).all(-1)
        assert (posed == some(stages)).all() and (keypoints[~posed] == 0).all()
    loss = sum(x.square().sum() for stage in stages for x in stage) + model.flow.log_prob(torch.randn(3, 2)).sum()
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


def test_first_boxes_learn_from_the_first_stage_alone():
    """Boxes are detached between stages and for pooling."""
    model, (images, sizes) = small().eval(), pictures()
    stages = model(images, sizes)
    first, = torch.autograd.grad(stages[0].boxes.sum(), model.boxes, retain_graph=True)
    assert first.abs().max() > 0
    for x in (stages[1].boxes, stages[0].keypoints, stages[0].logits):
        gradient, = torch.autograd.grad(x.sum(), model.boxes, retain_graph=True, allow_unused=True)
        assert gradient is None


def test_a_batch_without_matches_still_has_a_graph():
    model, (images, sizes) = small().train(), pictures()
    stages = model(images, sizes, lambda found: torch.zeros(2, 6, dtype=torch.bool))
    (sum(stage.keypoints.sum() + stage.sigmas.sum() for stage in stages) * 0).backward()
    assert all(p.grad is not None for p in model.keypoint_stages.parameters())


NO_POSE_NEEDED = [dict(full=False), dict(full=True, iterate=False), dict(update="none")]        # by boxes


@pytest.mark.parametrize("form", NO_POSE_NEEDED, ids=str)
def test_poses_of_chosen_queries_are_those_of_the_papers_loop_and_so_are_gradients(form, monkeypatch):
    """In float64; batch norm keeps its statistics. Whatever POSE_KERNELS says: it is an option, no fast form."""
    model, (images, sizes) = small(matched=False, **form).double().eval(), pictures()
    images, sizes = images.double(), sizes.double()
    chosen = some(model(images, sizes))

    def outputs_and_gradients(choose=None):
        stages = model(images, sizes, choose)
        total = sum(one.keypoints[chosen].sum() + one.sigmas[chosen].log().sum() + one.boxes.sum() for one in stages)
        learned = [p for p in model.parameters() if p.requires_grad]
        return stages, torch.autograd.grad(total, learned, allow_unused=True, materialize_grads=True)

    loop, theirs = outputs_and_gradients()
    for kernels in ("auto", "plain"):
        monkeypatch.setenv("POSE_KERNELS", kernels)
        stages, ours = outputs_and_gradients(lambda found: chosen)
        assert all((one.sigmas[~chosen] == 1).all() and (one.keypoints[~chosen] == 0).all() for one in stages)
        for a, b in zip(stages, loop):
            close(a.boxes, b.boxes, 1e-11)
            close(a.logits, b.logits, 1e-11)
            close(a.keypoints[chosen], b.keypoints[chosen], 1e-11)
            close(a.sigmas[chosen], b.sigmas[chosen], 1e-11)
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, 1e-9)


def test_a_training_step_of_matched_queries_has_the_same_losses_with_plain_kernels(monkeypatch):
    """SPEGM's batch norm sees the matched boxes alone in both."""
    model, people, losses = small().train(), some_people([2, 1]), []
    images, sizes = pictures()
    for kernels in ("auto", "plain"):
        monkeypatch.setenv("POSE_KERNELS", kernels)
        losses.append(losses_of(model, images, sizes, people))
    for name, value in losses[0].items():
        assert value.item() == pytest.approx(losses[1][name].item(), rel=1e-4), name


@pytest.mark.parametrize("form", NO_POSE_NEEDED, ids=str)
@pytest.mark.parametrize("first", [1, 3, 8])
def test_the_best_poses_are_those_of_everybody(form, first):
    """Whatever is posed first, and although scores of poses rank people otherwise than class scores."""
    model, (images, _) = steady(matched=False, queries=8, **form), pictures()
    for head in model.keypoint_stages[-1].heads:
        head.sigmas.weight.data *= 30                                   # sure of some, unsure of others
    model.boxes.data[2] = torch.tensor([3.0, 3.0, 0.1, 0.1])            # outside of the image
    everybody = qp.detect(model, list(images))
    with torch.no_grad():
        best = qp.best_poses(model, images, torch.tensor([[96, 64]] * 2), counted=2, first=first)
    assert torch.equal(best.boxes, everybody.boxes)
    for i in range(2):
        every, some_of_them = (qp.to_prediction(qp.Output(*(x[i] for x in output)), 0, (96, 64), (96, 64))
                               for output in (everybody, best))
        a, b = (np.argsort(-people.scores)[:2] for people in (every, some_of_them))
        assert len(every.scores) == 7 and some_of_them.scores[b] == pytest.approx(every.scores[a], abs=1e-6)
        close(some_of_them.keypoints[b], every.keypoints[a], 1e-5)
    assert first == 8 or (best.sigmas == 1).all((-1, -2)).any(), "somebody was left out"


def test_images_of_a_batch_do_not_see_each_other_nor_the_order_of_queries():
    model, (images, sizes) = small().eval(), pictures()
    with torch.no_grad():
        both = model(images, sizes)[-1]
        alone = model(images[1:], sizes[1:])[-1]
        order = torch.randperm(6)
        for name in ("boxes", "queries"):
            getattr(model, name).copy_(getattr(model, name)[order])
        turned = model(images, sizes)[-1]
    for a, b, c in zip(both, alone, turned):
        assert torch.allclose(a[1:], b, atol=1e-3) and torch.allclose(a[:, order], c, atol=1e-3)


ABLATIONS = [dict(interaction=i) for i in qp.INTERACTIONS] + [dict(update=u) for u in qp.UPDATES[1:]] + [
    dict(scheme=s) for s in "abcd"] + [dict(query="instance", interaction=i) for i in qp.INTERACTIONS]


@pytest.mark.parametrize("change", ABLATIONS, ids=lambda change: "-".join(change.values()))
def test_ablations_run_and_learn(change):
    model = small(**change).train()
    stage = model.keypoint_stages[0]
    boxes = torch.tensor([[4.0, 4, 30, 40], [10, 0, 60, 60]])
    out = stage(torch.randn(1, 32, 16, 16), torch.zeros(2, dtype=torch.long), boxes, torch.randn(2, 32, requires_grad=True),
                model.parts[None])
    assert out[0].shape == out[1].shape == (2, 17, 2)
    assert out[3].shape == (2, {"a": 17, "b": 13, "d": 5}.get(change.get("scheme"), 1 if "query" in change else 7), 16)
    sum((x ** 2).sum() for x in out).backward()
    assert all(p.grad is not None for p in stage.parameters())


def test_parts_of_skeletons():
    coco, crowd = get_skeleton("coco"), get_skeleton("crowdpose")
    assert qp.keypoint_parts(coco, "c") == [[0, 1, 2, 3, 4], [5, 6], [7, 9], [8, 10], [11, 12], [13, 15], [14, 16]]
    assert qp.keypoint_parts(coco, "d") == [[0, 1, 2, 3, 4], [5, 7, 9], [6, 8, 10], [11, 13, 15], [12, 14, 16]]
    assert qp.keypoint_parts(coco, "b") == [[0, 1, 2, 3, 4], *([k] for k in range(5, 17))]
    assert qp.keypoint_parts(coco, "a") == [[k] for k in range(17)]
    assert sorted(qp.keypoint_parts(crowd, "c")) == [[0, 1], [2, 4], [3, 5], [6, 7], [8, 10], [9, 11], [12, 13]]
    for scheme in "abcd":
        assert sorted(sum(qp.keypoint_parts(get_skeleton("wholebody"), scheme), [])) == list(range(133))


def test_fingers_are_of_the_arm_and_toes_and_heels_of_the_leg():
    body = get_skeleton("wholebody")
    head, *limbs = qp.keypoint_parts(body, "c")
    assert head == [0, 1, 2, 3, 4, *range(23, 91)], "eyes, ears and the face"
    by_side = {limbs[i][0]: limbs[i][2:] for i in (1, 2, 4, 5)}         # behind elbow and wrist, knee and ankle
    assert by_side == {7: [*range(91, 112)], 8: [*range(112, 133)], 13: [17, 18, 19], 14: [20, 21, 22]}
    assert len(qp.keypoint_parts(body, "b")) == 1 + 133 - len(head)
    assert qp.keypoint_parts(get_skeleton("humanart21"), "c")[2] == [7, 9, 17]


def test_the_two_arms_are_two_parts_however_their_side_is_written():
    names = ["nose", *(side + joint for joint in ("elbow", "wrist", "knee", "ankle") for side in "lr")]
    glued = skeleton_from_category(dict(name="mine", keypoints=names))
    assert glued.keypoints[:3] == ("nose", "lelbow", "relbow") and glued.flip[1] == 2
    assert qp.keypoint_parts(glued, "c") == [[0], [1, 3], [2, 4], [5, 7], [6, 8]]


def test_keypoints_come_out_in_the_order_of_the_skeleton():
    model = small("crowdpose")
    stage, parts = model.keypoint_stages[0].eval(), qp.keypoint_parts(model.skeleton, "c")
    for head, part in zip(stage.heads, parts):
        torch.nn.init.zeros_(head.coordinates.weight)
        head.coordinates.bias.data = torch.tensor(part).repeat_interleave(2).float()
    keypoints, *_ = stage(torch.randn(1, 32, 16, 16), torch.tensor([0]), torch.tensor([[4.0, 4, 30, 40]]),
                          torch.randn(1, 32), model.parts[None])
    assert keypoints[0, :, 0].tolist() == keypoints[0, :, 1].tolist() == list(range(14))


def test_boxes_move_and_keypoints_lie_in_them():
    box = torch.tensor([10.0, 20, 30, 60])
    assert qp.move_boxes(box, torch.tensor([1.0, -0.5, 0, 0])).tolist() == [20, 10, 40, 50]
    grown = qp.move_boxes(box, torch.tensor([0, 0, math.log(2), 0]))
    assert torch.allclose(grown, torch.tensor([0.0, 20, 40, 60]))
    assert qp.move_boxes(box, torch.full((4,), 1e9)).isfinite().all()
    corners = torch.tensor([[-0.5, -0.5], [0, 0], [0.5, 0.5]])
    assert qp.keypoints_px(corners, box).tolist() == [[10, 20], [20, 40], [30, 60]]


def test_spread_boxes_cover_the_image():
    boxes = qp.spread_boxes(10)
    assert boxes.shape == (10, 4) and (boxes[:, 2:] == 0.5).all()
    assert (boxes[:, :2] - 0.25).min() >= 0 and (boxes[:, :2] + 0.25).max() <= 1
    assert torch.cdist(boxes[:, :2], boxes[:, :2]).fill_diagonal_(1).min() > 0.08
    assert (small(spread=False).boxes == torch.tensor([0.5, 0.5, 1, 1])).all()


@pytest.mark.parametrize("net", [qp.ResNet(8, (1, 1, 1, 1), True), HRNet(4, False), Swin(12, (2, 2), 2)],
                         ids=["resnet", "hrnet", "swin"])
def test_backbones(net):
    """Shapes, gradients, and that nothing depends on the rest of the batch."""
    x = torch.randn(2, 3, 64, 96)
    maps = net.train()(x)
    assert [m.shape[1] for m in maps] == net.channels
    assert [tuple(m.shape[2:]) for m in maps] == [(16 >> i, 24 >> i) for i in range(len(maps))]
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if "downsample" not in name)
    with torch.no_grad():
        for a, b in zip(net.eval()(x), net(x[1:])):
            assert torch.allclose(a[1:], b, atol=1e-4)


def test_fuse_changes_nothing():
    model, (images, sizes) = small(frozen_norm=True).eval(), pictures()
    for name, buffer in model.backbone.named_buffers():
        buffer.data = 1 + 0.3 * torch.rand_like(buffer)
    with torch.no_grad():
        plain, fast = (net(images, sizes)[-1] for net in (model, qp.fuse(model)))
    assert torch.allclose(plain.boxes, fast.boxes, atol=1e-2)
    assert torch.allclose(plain.keypoints, fast.keypoints, atol=1e-3)


# ------------------------------------------------------------------------------------------ start weights


def resnet_names(name: str, spelling: str) -> str:
    """Our name of a ResNet's tensor → torchvision's or detectron2's."""
    name = re.sub(r"stem\.(conv|norm)", r"stem.conv1.\1", name.removeprefix("backbone."))
    if spelling == "detectron2":
        return name.replace(".conv.weight", ".weight")
    name = re.sub(r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}", name).replace("stem.", "")
    name = re.sub(r"shortcut\.(conv|norm)", lambda found: f"downsample.{0 if found[1] == 'conv' else 1}", name)
    return re.sub(r"conv(\d)\.norm", r"bn\1", name).replace(".conv.", ".")


@pytest.mark.parametrize("spelling", ["torchvision", "detectron2"])
def test_start_weights_of_a_resnet(spelling, tmp_path, capsys):
    model, other = small(), small()
    own = {name: torch.randn_like(value) for name, value in other.state_dict().items()
           if name.startswith("backbone.") and not name.endswith("num_batches_tracked")}
    state = {resnet_names(name, spelling): value for name, value in own.items()}
    assert ("layer1.0.bn1.weight" if spelling == "torchvision" else "res2.0.conv1.norm.weight") in state
    assert ("layer2.0.downsample.0.weight" if spelling == "torchvision" else "res3.0.shortcut.weight") in state
    torch.save(state | {"fc.weight": torch.zeros(1000, 8)}, tmp_path / "resnet.pth")
    qp.load_init(model, str(tmp_path / "resnet.pth"))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    assert f"{len(own)} of" in capsys.readouterr().out
    del state["layer1.0.conv2.weight" if spelling == "torchvision" else "res2.0.conv2.weight"]
    torch.save(state, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match="not in the weights"):
        qp.load_init(model, str(tmp_path / "resnet.pth"))


@pytest.mark.parametrize("net, foreign, lacking", [("hrnet_w32", "final_layer.weight", "stage4.2.fuse_layers.1"),
                                                   ("swin_l", "head.weight", "norm")])
def test_start_weights_of_hrnet_and_swin(net, foreign, lacking, monkeypatch):
    """Pose HRNets keep one branch in their last module; classifiers have no norms of their maps."""
    with torch.device("meta"):
        model = qp.build(net)
    prefix = "backbone.bottom_up."
    state = {name.removeprefix(prefix): torch.empty(shape, device="meta")
             for name, shape in manifest_of(f"manifest_{net}_light.json")["keys"].items() if name.startswith(prefix)}
    state = {name: value for name, value in state.items() if not re.match(lacking, name)}
    loaded = {}
    tensors = state | {foreign: torch.empty(1, device="meta")}
    monkeypatch.setattr(weights, "read_start", lambda source, method: weights.Start(Path(source), tensors, {}))
    monkeypatch.setattr(weights, "load_strict",
                        lambda model, tensors, ignored: loaded.update(tensors=tensors, ignored=ignored))
    qp.load_init(model, "some.pth")
    theirs = {f for f in loaded["tensors"] if f.startswith("backbone.")}
    assert theirs == {*loaded["tensors"]} and not any(foreign.split(".")[0] in name for name in theirs)
    missing = {name for name in model.state_dict() if name.startswith("backbone.") and name not in theirs}
    assert missing and all(any(re.search(pattern, name) for pattern in loaded["ignored"]) for name in missing)
    assert all("fuse" in name if "hrnet" in net else ".norm" in name for name in missing)


def test_mistakes_are_named():
    for change, text in ((dict(matched=True, full=True), "--matched"), (dict(part_dim=30), "multiple of 4"),
                         (dict(backbone="r101"), "choose from"), (dict(scheme="e"), "choose from a, b, c, d")):
        with pytest.raises(UserError, match=text):
            qp.build("tiny", **change)
    with pytest.raises(UserError, match="there is no preset"):
        qp.build("r101")
    with pytest.raises(UserError, match="do not fit the model|not in"):
        state = qp.convert_official({"part_query.weight": torch.empty(7, 128)}, qp.PRESETS["r50"])
        weights.load_strict(small(), state, {})


# ------------------------------------------------------------------------------------------ matching and losses


def flow_of(case) -> qp.RealNVP:
    """The flow with the reference's weights."""
    flow, prefix = qp.RealNVP(), "criterion.flow.flow."
    state = official_state("manifest_r50_light.json", int(case["seed"]), re.escape(prefix))
    flow.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})
    return flow


@golden("querypose/golden_rle*.npz")
def test_keypoint_likelihood_and_its_gradients_equal_the_release(file):
    case = np.load(file)
    mu, sigma = (torch.from_numpy(case[name]).requires_grad_() for name in ("pred", "sigma"))
    flow, true, visible = flow_of(case), torch.from_numpy(case["target"]), torch.from_numpy(case["vis"][..., 0])
    close(flow.log_prob((mu - true) / sigma), case["log_phi"], 1e-5, "log_phi")
    loss = qp.likelihood_loss(mu, sigma, true, visible, flow.log_prob)
    close(loss, case["per_element"], 1e-5, "per element")
    total = loss.sum() / loss.shape[:2].numel()
    close(total, case["loss"], 1e-6, "loss")
    total.backward()
    close(mu.grad, case["grad_pred"], 1e-5, "gradient of μ")
    close(sigma.grad, case["grad_sigma"], 1e-5, "gradient of σ")


def people_of(case) -> list[qp.People]:
    """Ground truth gt_boxes{i}, gt_keypoints{i} with image_hw."""
    found = []
    for i, (h, w) in enumerate(case["image_hw"].tolist()):
        keypoints, boxes = torch.from_numpy(case[f"gt_keypoints{i}"]), torch.from_numpy(case[f"gt_boxes{i}"])
        found.append(qp.People(keypoints[..., :2], (keypoints[..., 2] > 0).float(), boxes, torch.ones(len(boxes)),
                               torch.tensor([[w, h]]).float().expand(len(boxes), 2)))
    return found


def predictions_of(case) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(case[key]).requires_grad_() for key in case.files if key.startswith("pred_")}


def names_of(case) -> list[str]:
    """The stages of a case of losses, by its fields: aux0, aux1, ..., final."""
    return sorted(key.removeprefix("pred_logits_") for key in case.files if key.startswith("pred_logits_"))


def stages_of(case, leaves: dict[str, torch.Tensor]) -> list[qp.Output]:
    return [qp.Output(leaves[f"pred_logits_{s}"][..., 0], leaves[f"pred_boxes_{s}"],
                      leaves[f"pred_keypoints_{s}"][..., :2], leaves[f"pred_sgm_{s}"]) for s in names_of(case)]


@golden("querypose/golden_losses*.npz")
def test_costs_and_pairs_equal_the_release(file):
    case = np.load(file)
    people, stages = people_of(case), stages_of(case, predictions_of(case))
    everybody, ends = gather_people(people), np.cumsum([0] + [len(one) for one in people])
    for stage, output, (image, query, person) in zip(names_of(case), stages, qp.match(stages, people), strict=True):
        cost = qp.match_cost(*output[:2], everybody)
        for b, (first, last) in enumerate(zip(ends, ends[1:])):         # across images nothing is matched
            theirs = case[f"cost_total_{stage}"][b, :, first:last]
            assert cost[b, :, first:last].detach().numpy() == pytest.approx(theirs, abs=1e-5), f"{stage} {b}"
            rows = case[f"match_{stage}_{b}"]
            pairs = torch.stack([query, person - first])[:, image == b]
            assert (pairs.numpy() == rows).all(), f"{stage} {b}"


@golden("querypose/golden_losses*.npz")
def test_every_loss_term_and_its_gradient_equals_the_release(file):
    case = np.load(file)
    flow, leaves = flow_of(case), predictions_of(case)
    losses = qp.criterion(stages_of(case, leaves), people_of(case), flow.log_prob)
    assert {f"loss.{name}" for name in losses} == {key for key in case.files if key.startswith("loss.")}
    for name, value in losses.items():
        weight = qp.WEIGHTS[name.split("_")[1]]
        assert value.item() == pytest.approx(weight * float(case[f"loss.{name}"]), rel=1e-5), name
    sum(losses.values()).backward()
    for key, leaf in leaves.items():
        close(leaf.grad / leaf.grad.abs().max(), case[f"grad_{key}"] / np.abs(case[f"grad_{key}"]).max(), 1e-5, key)
    order = official_state("manifest_r50_light.json", 0, r"^criterion")
    for key, norm in zip(order, case["grad_flow_norm"].tolist(), strict=True):
        gradient = flow.get_parameter(key.removeprefix("criterion.flow.flow.")).grad
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), key


def some_people(counts: list[int], keypoints: int = 17) -> list[qp.People]:
    """People in boxes from (20, 10) to (80, 90) of an image of 100 x 200."""
    return [qp.People(keypoints=20 + 60 * torch.rand(n, keypoints, 2),
                      visible=(torch.rand(n, keypoints) > 0.2).float(),
                      boxes=torch.tensor([[20.0, 10.0, 80.0, 90.0]]).repeat(n, 1), areas=torch.ones(n),
                      sizes=torch.tensor([[100.0, 200.0]]).repeat(n, 1)) for n in counts]


def random_stages(batch: int, queries: int = 6, keypoints: int = 17, stages: int = 2) -> list[qp.Output]:
    def output():
        corner = 60 * torch.rand(batch, queries, 2)
        boxes = torch.cat([corner, corner + 10 + 90 * torch.rand(batch, queries, 2)], -1)
        pose, sigma = torch.rand(2, batch, queries, keypoints, 2)
        leaves = torch.randn(batch, queries), boxes, pose - 0.5, 0.05 + 0.2 * sigma
        return qp.Output(*(x.requires_grad_() for x in leaves))
    return [output() for _ in range(stages)]


def finite_gradients(losses: dict, stages: list[tuple], flow: torch.nn.Module) -> bool:
    sum(losses.values()).backward()
    leaves = [*(x for output in stages for x in output), *flow.parameters()]
    return all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


def test_a_batch_without_people_has_a_finite_loss_and_a_gradient():
    stages, flow = random_stages(2), qp.RealNVP()
    losses = qp.criterion(stages, some_people([0, 0]), flow.log_prob)
    assert losses["loss_kps"] == losses["loss_bbox_0"] == losses["loss_giou"] == 0 < losses["loss_ce"]
    assert finite_gradients(losses, stages, flow)


def test_more_people_than_queries_are_matched_as_far_as_queries_go():
    image, query, person = qp.match(random_stages(1), some_people([9]))[1]
    assert sorted(query.tolist()) == list(range(6)) and len(set(person.tolist())) == 6


def test_the_order_of_people_does_not_change_the_loss():
    people, stages, flow = some_people([3]), random_stages(1), qp.RealNVP()
    people[0].boxes += 9 * torch.rand(3, 4)
    shuffled = [people[0].take(torch.tensor([2, 0, 1]))]
    totals = [sum(qp.criterion(stages, t, flow.log_prob).values()).item() for t in (people, shuffled)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


def test_perfect_boxes_have_no_loss_but_that_of_scores_and_poses():
    people = some_people([1])
    logits = torch.tensor([[9.0, -9.0]])
    boxes = torch.cat([people[0].boxes, torch.tensor([[0.0, 100.0, 20.0, 190.0]])])[None]
    poses = torch.zeros(1, 2, 17, 2)
    losses = qp.criterion([qp.Output(logits, boxes, poses, poses + 0.5)], people, qp.RealNVP().log_prob)
    assert losses["loss_bbox"] == 0 and max(losses["loss_giou"], losses["loss_ce"]) < 1e-3


def test_targets_of_keypoints_are_seen_from_the_centre_of_the_box_and_masked_outside():
    people = replace(some_people([1])[0], visible=torch.tensor([[1.0, 1, 1, 0]]),
                     keypoints=torch.tensor([[[50.0, 50], [20, 90], [19, 50], [50, 50]]]))
    target, visible = qp.pose_in_box(people.boxes, people)
    assert target[0, :2].tolist() == [[0, 0], [-0.5, 0.5]] and visible.tolist() == [[1, 1, 0, 0]]


def test_the_likelihood_is_largest_at_the_truth_and_teaches_sigma_the_error():
    """With a flow that is a plain normal density, −log P in σ is least where 2 + |e| / (√2 σ) + e²/σ² has slope 0."""
    error, sigma = 0.1, torch.linspace(0.01, 0.5, 500)[:, None, None].expand(-1, 1, 2)
    def plain(u):
        return -u.square().sum(-1) / 2 - math.log(2 * math.pi)
    ones = torch.ones(500, 1)
    loss = qp.likelihood_loss(torch.full((500, 1, 2), error), sigma, torch.zeros(500, 1, 2), ones, plain).sum((1, 2))
    # per coordinate: 2 log σ + e²/σ² (both coordinates in each) + e/(√2 σ): 2σ² − e σ/√2 − 2 e² = 0
    best = (error / math.sqrt(2) + math.sqrt(error ** 2 / 2 + 16 * error ** 2)) / 4
    assert sigma[loss.argmin(), 0, 0].item() == pytest.approx(best, abs=2e-3)
    exact = qp.likelihood_loss(torch.zeros(500, 1, 2), sigma, torch.zeros(500, 1, 2), ones, plain).sum((1, 2))
    assert (exact < loss).all()


def test_gradients_of_the_losses_are_right():
    """gradcheck in float64; boxes overlap, contain each other, or are apart."""
    true = some_people([3], keypoints=2)[0].each(torch.Tensor.double)
    boxes = torch.tensor([[25.0, 12, 70, 80], [0, 0, 99, 99], [90, 95, 98, 99]]).double().requires_grad_()
    mu, sigma = torch.rand(2, 3, 2, 2, dtype=torch.double)
    target, visible = qp.pose_in_box(boxes.detach(), true)
    flow = qp.RealNVP().double()
    assert torch.autograd.gradcheck(lambda b: (qp.box_distance(b, true), qp.generalized_iou(b, true.boxes)), boxes)
    assert torch.autograd.gradcheck(lambda m, s: qp.likelihood_loss(m, s, target, visible, flow.log_prob),
                                    ((mu - 0.5).requires_grad_(), (0.1 + sigma).requires_grad_()), fast_mode=True)
    logits = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: qp.focal_loss(x, (logits > 0).double()), logits)


# ------------------------------------------------------------------------------------------ what may go wrong


@pytest.mark.parametrize("what", ["collapsed box", "keypoints outside", "sigma of 0", "box of no size at a keypoint"])
def test_degenerate_outputs_have_a_finite_loss_and_finite_gradients(what):
    stages, people, flow = random_stages(1, queries=2, stages=1), some_people([2]), qp.RealNVP()
    logits, boxes, mu, sigma = (x.detach().clone() for x in stages[0])
    if what == "collapsed box":
        boxes[..., 2:] = boxes[..., :2]
    elif what == "keypoints outside":
        boxes += 1e6
    elif what == "sigma of 0":
        sigma.zero_()
    else:
        corner, people[0].visible = people[0].keypoints[0, 0], torch.ones(2, 17)
        boxes[:] = torch.cat([corner, corner])
    stages = [qp.Output(*(x.requires_grad_() for x in (logits, boxes, mu, sigma)))]
    losses = qp.criterion(stages, people, flow.log_prob)
    assert all(value.isfinite() for value in losses.values())
    assert finite_gradients(losses, stages, flow)
    assert (losses["loss_kps"] == 0) == (what in ("collapsed box", "keypoints outside"))
    assert torch.stack([p.grad.norm() for p in flow.parameters()]).norm().isfinite()


def test_costs_that_are_not_finite_are_matched_and_make_a_loss_that_is_not_finite():
    """So that the check of the losses ends the run, and says which image it was."""
    stages, people = random_stages(2, stages=1), some_people([2, 1])
    logits = stages[0].logits.detach().clone()
    logits[0] = math.nan
    losses = qp.criterion([stages[0]._replace(logits=logits)], people, qp.RealNVP().log_prob)
    assert losses["loss_ce"].isnan() and losses["loss_bbox"].isfinite()


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_boxes_that_are_not_finite_go_through_the_model_to_the_losses(kernels, monkeypatch):
    monkeypatch.setenv("POSE_KERNELS", kernels)
    model, (images, sizes), people = small().train(), pictures(), some_people([2, 1])
    model.boxes.data[:] = math.nan
    stages = model(images, sizes, partial(qp.matched_queries, people=people, pairs=[]))
    losses = qp.criterion(stages, people, model.flow.log_prob)
    assert losses["loss_bbox"].isnan() and losses["loss_giou_0"].isnan()


# ------------------------------------------------------------------------------------------ post-processing


@golden("querypose/golden_postprocess*.npz")
def test_people_boxes_and_scores_equal_the_release(file):
    case = np.load(file)
    logits, boxes, pose = (torch.from_numpy(case[name])[0] for name in ("logits", "boxes", "pose"))
    (h, w), (full_h, full_w) = case["size"], case["orig"]
    sigmas = (1 - pose[..., 2:]).repeat(1, 1, 2)            # the case has the confidence, not its two halves
    output = qp.Output(logits[:, 0], boxes, pose[..., :2], sigmas)
    people = qp.to_prediction(output, 3, (w, h), (full_w, full_h))
    assert people.image_id == 3
    assert (np.isin(qp.pose_scores(output)[0].numpy(), people.scores).nonzero()[0] == case["kept_query"]).all()
    close(people.scores, case["score"], 1e-6, "scores")
    close(people.boxes, case["box"], 1e-6, "boxes")
    close(people.keypoints, case["coco_keypoints"][..., :2], 1e-6, "keypoints")
    close(people.keypoint_scores, case["coco_keypoints"][..., 2], 1e-6, "certainty")
    size = people.boxes[:, 2:] - people.boxes[:, :2]
    close(np.concatenate([people.boxes[:, :2], size], 1), case["coco_bbox_xywh"], 1e-6, "xywh")


def test_sure_joints_make_a_sure_person_and_nobody_is_sure_beyond_the_class():
    sigmas = torch.tensor([0.0, 1.0, 0.5])[:, None, None].expand(3, 4, 2)
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).expand(3, 4)
    output = qp.Output(torch.tensor([0.0, 0.0, 9.0]), boxes, torch.zeros(3, 4, 2), sigmas)
    scores, certain = qp.pose_scores(output)
    assert scores.tolist() == pytest.approx([0.5, 0, 0.5], abs=1e-3)
    assert certain[0].eq(1).all() and not certain[1].any()
    people = qp.to_prediction(output, 1, (9, 9), (9, 9))
    assert len(people.scores) == 2, "σ = 1 says that a query got no pose"
    assert (people.keypoints == 4).all(), "the centre of the middle pixel"


def test_outputs_that_are_not_finite_are_nobody():
    nan, pose = torch.full((2, 4), torch.nan), torch.zeros(2, 17, 2)
    assert len(qp.to_prediction(qp.Output(nan[:, 0], nan, pose, pose), 1, (64, 64), (64, 64)).scores) == 0


# ------------------------------------------------------------------------------------------ data


@golden("querypose/golden_transforms*.npz")
def test_size_rule_equals_the_release(file):
    for h, w, short, longest, new_h, new_w in np.load(file)["resize_rule"].tolist():
        assert qp.input_size((w, h), short, longest if longest > 0 else math.inf) == (new_w, new_h), (h, w, short)


def sample_of(picture: np.ndarray, boxes: np.ndarray, keypoints: np.ndarray, **more) -> Sample:
    image = Image.fromarray(picture)
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).astype(np.float32)
    fields = dict(areas=np.ones(len(boxes), np.float32), iscrowd=np.zeros(len(boxes), bool)) | more
    return Sample(image, 1, image.size, keypoints.astype(np.float32), boxes, **fields)


@golden("querypose/golden_transforms*.npz")
def test_chain_of_augmentations_equals_the_release(file):
    case = np.load(file)
    people = sample_of(case["input_image"], case["coco_bbox_xywh"], case["coco_keypoints"])
    if case["hflip"]:
        people = transforms.hflip(people, case["hflip_indices"].tolist())
    people = qp.people_to_learn(people)
    people = transforms.resize(people, qp.input_size(people.size, int(case["resize_short"])))
    assert people.size[::-1] == tuple(case["after_resize_hw"])
    window = case["crop_xywh"].tolist()
    people = transforms.crop(qp.hide_outside(people, *window), *window)
    people = transforms.resize(people, qp.input_size(people.size, int(case["final_short"])))
    targets = qp.to_people(people)
    assert people.size[::-1] == tuple(case["out_hw"]) and (np.asarray(people.image) == case["out_image"]).all()
    close(targets.boxes, case["all_boxes"][case["kept"]], 1e-6, "boxes")
    theirs = case["all_keypoints"][case["kept"]]
    close(targets.keypoints, theirs[..., :2], 1e-6, "keypoints")
    assert (targets.visible.numpy() == (theirs[..., 2] > 0)).all()


def test_mirroring_turns_left_into_right_and_half_pixels_stay_half_pixels():
    """Mirror, then shift by half a pixel, is shift, then x → w − x."""
    flip, keypoints = get_skeleton("coco").flip, np.random.default_rng(0).uniform(1, 9, (1, 17, 3))
    people = sample_of(np.zeros((10, 12, 3), np.uint8), np.float32([[0, 0, 12, 10]]), keypoints)
    ours = qp.people_to_learn(transforms.hflip(people, flip)).keypoints[0, :, 0]
    assert ours == pytest.approx(12 - (keypoints[0, list(flip), 0] + 0.5), abs=1e-5)


def test_people_without_keypoints_stay_and_crowds_and_outsiders_go():
    boxes = np.float32([[0, 0, 5, 5], [2, 2, 3, 3], [40, 0, 5, 5], [1, 1, 5, 5]])
    people = sample_of(np.zeros((20, 30, 3), np.uint8), boxes, np.zeros((4, 17, 3)),
                       iscrowd=np.array([False, True, False, False]))
    learn = qp.people_to_learn(people)
    assert learn.boxes.tolist() == [[0, 0, 5, 5], [1, 1, 6, 6]]
    targets = qp.to_people(learn)
    assert len(targets) == 2 and not targets.visible.any() and not targets.keypoints.any()


def test_people_of_a_clip_are_cropped_without_its_tracks_and_neighbouring_frames():
    boxes = np.float32([[0, 0, 50, 50], [400, 0, 5, 5], [10, 10, 50, 50]])
    people = sample_of(np.zeros((200, 300, 3), np.uint8), boxes, np.full((3, 17, 3), 30),
                       track_ids=np.arange(3), frames=("before.jpg", "after.jpg"))
    cfg = SimpleNamespace(short_side=800, long_side=1333, multiscale=True)
    for seed in range(8):                                   # about half of them crop
        learned = qp.augment(qp.people_to_learn(people), cfg, np.random.default_rng(seed))
        assert len(learned.boxes) <= 2 and learned.track_ids is None and learned.frames == ()


def test_pictures_are_padded_to_multiples_of_the_largest_stride_even_if_smaller():
    images, sizes = qp.pad_images([torch.ones(3, 20, 33), torch.ones(3, 5, 7)])
    assert images.shape == (2, 3, 32, 64) and sizes.tolist() == [[33, 20], [7, 5]]
    assert images.sum() == 3 * (20 * 33 + 5 * 7) and images[1, :, :5, :7].all()


def test_sizes_and_crops_are_those_of_the_release():
    cfg = SimpleNamespace(short_side=800, long_side=1333, multiscale=True)
    people = sample_of(np.zeros((60, 90, 3), np.uint8), np.float32([[0, 0, 90, 60]]), np.full((1, 17, 3), 30))
    sizes = [qp.augment(people, cfg, np.random.default_rng(i)).size for i in range(40)]
    assert {min(size) for size in sizes} <= set(range(480, 801, 32)) and max(max(size) for size in sizes) <= 1333
    whole = [size for size in sizes if abs(size[0] / size[1] - 1.5) < 0.01]
    assert 10 <= len(whole) <= 30, "half of the images are cropped"
    for side in (128, 512):
        cfg = SimpleNamespace(short_side=side, long_side=10 * side, multiscale=True)
        short = {min(qp.augment(people, cfg, np.random.default_rng(i)).size) for i in range(80)}
        assert short == {side * part // 25 for part in range(15, 26)}, "0.6 to 1 of it, and the size of the test"
    assert qp.augment(people, SimpleNamespace(short_side=80, long_side=90, multiscale=False), None).size == (90, 60)


# ------------------------------------------------------------------------------------------ a training step


def released_model(file, case) -> qp.QueryPose:
    """The r50 of a golden training step, which has fewer queries, ready to train."""
    form, queries = file.stem.split("_")[2], int(case["num_queries"])
    state = official_state(f"manifest_r50_{form}.json", int(case["seed"]), "^(?!init_)")
    for name, width in dict(boxes=4, features=256).items():
        key = f"init_proposal_{name}.weight"
        value = fill(key, (queries, width), int(case["seed"]))
        state[key] = 0.5 + 0.25 * torch.tanh(2 * value) if name == "boxes" else value
    model = qp.build("r50", queries=queries, full=form == "full")
    weights.load_strict(model, qp.convert_official(state, model.cfg), {})
    return model.train()


def input_of(key: str, h: int, w: int, seed: int) -> torch.Tensor:
    """The reference's test picture, normalised."""
    coarse = normal(f"{key}.coarse", (3, -(-h // 16), -(-w // 16)), seed)
    coarse = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :h, :w]
    image = (128 + 50 * coarse + 20 * normal(f"{key}.fine", (3, h, w), seed)).round().clip(0, 255)
    return transforms.normalise(image / 255)


@golden("querypose/golden_train_*_release*.npz", quick="")
def test_a_training_step_equals_the_release(file):
    """Tolerances are those of its gradients: behind a stack of ReLUs with random weights float32 is rough."""
    case, full = np.load(file), "_full_" in file.stem
    model, people, seed = released_model(file, case), people_of(case), int(case["seed"])
    images, sizes = qp.pad_images([input_of(f"input{i or ''}", h, w, seed)
                                   for i, (h, w) in enumerate(case["image_hw"].tolist())])
    stages = model(images, sizes)
    for s, (image, query, person) in enumerate(qp.match(stages, people)):
        for b, first in enumerate(np.cumsum([0] + [len(one) for one in people[:-1]])):
            pairs = torch.stack([query, person - first])[:, image == b]
            assert (pairs.numpy() == case[f"match_stage{s}_image{b}"]).all(), f"stage {s}, image {b}"
    losses = qp.criterion(stages, people, model.flow.log_prob)
    assert {f"weighted.{name}" for name in losses} == {key for key in case.files if key.startswith("weighted")}
    for name, value in losses.items():
        assert value.item() == pytest.approx(float(case[f"weighted.{name}"]), rel=2e-4 if full else 5e-5), name
    sum(losses.values()).backward()
    norm = model.keypoint_stages[0].look.norm
    close(norm.running_mean, case["bn_running_mean_stage0"], 1e-4, "mean")
    close(norm.running_var, case["bn_running_var_stage0"], 1e-4, "variance")
    check_gradients(model, case, full)


def check_gradients(model: qp.QueryPose, case, full: bool):
    learned = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in learned.values())
    for key in [key[5:] for key in case.files if key.startswith("grad.")]:
        (name,) = qp.convert_official({key: torch.zeros(1)}, model.cfg)
        gradient, theirs = learned[name], torch.from_numpy(case[f"grad.{key}"])
        strict = re.search(r"^init_proposal_boxes|series\.0\.(bboxes_delta|fc_coord)", key)
        tolerance = 1e-4 if strict else 3e-2 if full else 3e-3
        step = max(1, gradient.numel() // 400)
        close(gradient.flatten()[::step] / theirs.abs().max(), theirs / theirs.abs().max(), tolerance, key)
        assert gradient.norm().item() == pytest.approx(float(case[f"gradnorm.{key}"]), rel=tolerance), key
    total = torch.stack([gradient.norm() for gradient in learned.values()]).norm().item()
    assert total == pytest.approx(float(case["grad_norm"]), rel=1e-2)


@golden("querypose/golden_stage*.npz", "querypose/golden_r50_*_forward*.npz", "querypose/golden_train_*_release*.npz",
        quick="")
def test_with_every_formula_as_it_is_written_the_release_is_equal_too(file, monkeypatch):
    monkeypatch.setenv("POSE_KERNELS", "plain")
    tests = dict(stage=[test_box_stage_equals_the_release, test_keypoint_stage_equals_the_release],
                 forward=[test_forward_equals_the_release], train=[test_a_training_step_equals_the_release])
    for test in next(some for kind, some in tests.items() if kind in file.stem):
        test(file)


# ------------------------------------------------------------------------------------------ by itself

SIDES = dict(short_side=64, long_side=64)
FLAGS = [word for name, value in (SMALL | SIDES).items() for word in (f"--{name}", str(value))]
ALONE = Ranks(0, 1, torch.device("cpu"))
FORMS = [dict(), dict(matched=False), dict(full=True, matched=False), dict(full=True, iterate=False),
         dict(query="instance", interaction="mhsa"), dict(update="none")]


def losses_of(model: qp.QueryPose, images: torch.Tensor, sizes: torch.Tensor, people: list[qp.People]) -> dict:
    """Those of a training step."""
    pairs = []
    choose = partial(qp.matched_queries, people=people, pairs=pairs) if model.cfg.matched else None
    losses = qp.criterion(model(images, sizes, choose), people, model.flow.log_prob, pairs)
    return losses | dict(unused=0 * model.parts.sum())


@pytest.mark.parametrize("form, counts", [*((form, [2, 0, 1]) for form in FORMS),
                                          *((form, [0, 0, 0]) for form in FORMS[:3])], ids=str)
def test_every_form_gives_every_parameter_a_finite_gradient(form, counts):
    model, images = small(**form).train(), [torch.rand(3, 32, w) for w in (32, 30, 9)]
    sum(losses_of(model, *qp.pad_images(images), some_people(counts)).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_matched_queries_alone_have_the_losses_of_all_queries():
    """Poses do not depend on each other once batch norm keeps its statistics."""
    people, losses = some_people([2, 0, 1]), []
    images, sizes = qp.pad_images([torch.rand(3, 64, w) for w in (64, 48, 40)])
    model = small(**SIDES).eval()
    for matched in (True, False):
        model.cfg = replace(model.cfg, matched=matched)
        losses.append(losses_of(model, images, sizes, people))
    for name, value in losses[0].items():
        assert value.item() == pytest.approx(losses[1][name].item(), rel=1e-5), name


@pytest.mark.parametrize("matched", [True, False])
def test_people_are_matched_once_in_a_training_step(matched, monkeypatch):
    model, calls, match = small(matched=matched).train(), [], qp.match
    monkeypatch.setattr(qp, "match", lambda *args: calls.append(1) or match(*args))
    losses_of(model, *pictures(), some_people([2, 1]))
    assert len(calls) == 1


def steady(**overrides) -> qp.QueryPose:
    """A small model whose boxes stay near where they start."""
    model = small(**overrides).eval()
    for stage in model.box_stages:
        stage.delta.weight.data *= 0.05
    return model


def test_predictions_are_people_in_pixels_of_the_original_whoever_shares_the_batch():
    model = steady(**SIDES)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for h, w in ((100, 150), (50, 75))]
    batch = qp.to_batch(pictures, ["a", 7], model.cfg)
    first, second = qp.predict(model, batch)
    assert (first.image_id, second.image_id) == ("a", 7) and batch["sizes_px"] == [(150, 100), (75, 50)]
    assert first.keypoints.shape == (6, 17, 2) and ((0 < first.scores) & (first.scores < 1)).all()
    larger = qp.predict(model, batch | dict(sizes_px=[(300, 300), (75, 50)]))[0]
    close(larger.keypoints + 0.5, (first.keypoints + 0.5) * (2, 3), 1e-6, "pixels of the original")
    close(larger.boxes, first.boxes * (2, 3, 2, 3), 1e-6)
    alone = qp.predict(qp.fuse(model), qp.to_batch(pictures[1:], [7], model.cfg))[0]
    close(alone.keypoints, second.keypoints, 1e-4, "alone")


def test_a_crowd_of_thirty_is_shown_whole():
    """Whoever asks for people gets everybody: best 25 and best 20 are for the AP alone."""
    model = steady(queries=30, **SIDES)
    people, = qp.predict(model, qp.to_batch([Image.new("RGB", (64, 64))], [1], model.cfg))
    assert len(people.scores) == 30 and np.isfinite(people.keypoints).all()


def test_the_metrics_of_the_best_poses_are_those_of_all_poses(puppets_folder, monkeypatch):
    """Predictions that COCO counts, and what is asked of the metrics: areas of boxes, as the release is scored."""
    model, asked, results = steady(queries=40, **SIDES), [], []
    data, judge = open_dataset(str(puppets_folder), "val"), metrics.evaluate
    monkeypatch.setattr(metrics, "evaluate", lambda *args, **how: asked.append(how) or judge(*args, **how))
    for prune in (True, False):
        results.append(qp.evaluate(model, data, replace(model.cfg, prune=prune), ALONE))
    (table, found), (whole, everybody) = results
    assert all(how["areas_of_boxes"] for how in asked) and [how["boxes"] for how in asked] == [False, True]
    full = steady(full=True, matched=False, **SIDES)
    qp.evaluate(full, data, full.cfg, ALONE)
    assert asked[-1]["boxes"], "every query of the full form has a pose"
    assert table.items() <= whole.items() and whole.keys() - table.keys() >= {"box_AP", "box_AP50"}
    for a, b in zip(found, everybody, strict=True):
        assert 20 <= len(a.scores) < len(b.scores) == 40
        (a, b) = ((one.scores[order], one.keypoints[order]) for one in (a, b)
                  for order in [np.argsort(-one.scores, kind="stable")[:20]])
        close(a[0], b[0], 1e-6, "scores")
        close(a[1], b[1], 1e-5, "keypoints")


def test_a_picture_smaller_than_the_largest_stride_has_poses():
    model = steady(short_side=8, long_side=16)
    people = qp.predict(model, qp.to_batch([Image.new("RGB", (3, 200))], [1], model.cfg))[0]
    assert len(people.scores) == 6 and np.isfinite(people.keypoints).all()


@pytest.mark.parametrize("threshold", [0, 1])               # everybody, nobody
def test_pictures_show_the_attention_of_each_part_and_the_deviations(threshold):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    for interaction in ("spegm", "pool"):
        model = small(interaction=interaction, **SIDES).eval()
        model.boxes.data[0] = torch.tensor([0.5, 0.5, 1e5, 1e5])
        shown = qp.show_process(model, image, threshold)
        expected = ("sigma", "attention") if interaction == "spegm" else ("sigma",)
        assert {name: len(pictures) for name, pictures in shown.items()} == dict.fromkeys(expected[:9 * (threshold == 0)], 1)
        if "attention" in shown:
            width, height = shown["attention"][0].size
            assert (width, height - 24) == (8 * 198 + 6, 6 * 198 + 6), "a caption; a row per person: box and seven parts"


def test_attention_is_brightest_where_it_is_largest():
    attention = np.zeros((2, 8, 8))
    attention[0, 1, 6] = attention[1, 7, 0] = 0.3
    tiles = qp.draw_attention(Image.new("RGB", (50, 30)), [-1e6, 5, 1e6, 20], attention)
    plain, *maps = (np.asarray(tile, dtype=int) for tile in tiles)
    assert not plain.any()
    for shown, (row, column) in zip(maps, [(36, 156), (180, 12)], strict=True):
        assert shown.sum(-1)[row, column] > 0.95 * shown.sum(-1).max() > 0


def test_the_learning_rate_warms_up_from_a_hundredth_then_falls_as_a_cosine_or_drops_twice():
    cosine, drops = qp.PRESETS["tiny"], qp.PRESETS["hrnet_w32"]
    rates = [qp.lr_scale(step, 1000, 0, cosine) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) > 0.85 and rates[-1] < 1e-4
    assert [qp.lr_scale(step, 10, 0, drops) for step in (0, 500, 1000, 9999)] == pytest.approx([0.01, 0.505, 1, 1])
    first, second = map(int, parse_numbers(drops.drop_epochs))
    scales = [qp.lr_scale(9999, 10, epoch, drops) for epoch in (first - 1, first, second)]
    assert scales == pytest.approx([1, 0.1, 0.01])


def test_every_learned_parameter_is_in_one_group_and_the_flow_learns_ten_times_as_fast():
    cfg = replace(qp.PRESETS["r50"], **SMALL)
    with torch.device("meta"):
        model = qp.build("r50", **SMALL)
    groups = qp.build_optimizer(model, cfg).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    rate = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    assert rate[id(model.flow.s[0][0].weight)] == pytest.approx(10 * rate[id(model.boxes)])
    assert {group["weight_decay"] for group in groups} == {1e-4}


def test_puppets_in_crowds_are_evaluated_by_crowding(tmp_path, monkeypatch):
    monkeypatch.setattr(puppets, "ROOT", tmp_path)
    monkeypatch.setattr(puppets, "COUNTS", puppets.COUNTS | {"crowd": {"val": 4}})
    model = small(**SIDES).eval()
    table, found = qp.evaluate(model, qp.open_crowd(model.skeleton, ALONE), model.cfg, ALONE)
    assert {"AP", "AP_E", "AP_M", "AP_H"} <= table.keys() and len(found) == 4


def test_training_images_depend_on_seed_epoch_and_index(puppets_folder):
    data, cfg = open_dataset(str(puppets_folder), "train").training(), qp.PRESETS["tiny"]
    def item(i, epoch=0, seed=0):
        return qp.TrainImages(data, replace(cfg, seed=seed), epoch)[i]
    image, people, image_id, skipped = item(3)
    assert torch.equal(image, item(3)[0]) and torch.equal(people.keypoints, item(3)[1].keypoints) and not skipped
    assert image.shape == (3, 128, 128) and people.sizes.unique().tolist() == [128] and image_id == people.image_id
    assert any(not torch.equal(image, item(3, epoch)[0]) for epoch in range(1, 6)), "some epoch mirrors it"


# ------------------------------------------------------------------------------------------ training runs


def train(data: Path, out: Path, *flags: str) -> dict:
    """Train in this process, 2 x 5 steps; the content of last.pt."""
    words = flags if "--resume" in flags else (
        "--train", *FLAGS, "--processes", "1", "--eval_every", "1", "--epochs", "2", "--batch", "4", "--accum", "2",
        "--device", "cpu", "--data", str(data), "--out", str(out), *flags)
    qp.train(*parse(qp.Config, qp.PRESETS, "", list(words)))
    return torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole_run(puppets_folder, tmp_path_factory) -> Path:
    """The folder of a run that was never cut."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(puppets_folder, folder)
    return folder


@pytest.mark.parametrize("how, step", [pytest.param("SIGTERM", 4, marks=pytest.mark.slow), ("kill", 2)])
def test_a_run_that_is_cut_and_resumed_ends_with_the_same_bits(how, step, puppets_folder, whole_run, tmp_path):
    losses, calls = qp.criterion, []

    def cut(*args):
        calls.append(0)
        if len(calls) == 7 and how == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        if len(calls) == 7 and how == "kill":
            raise KeyboardInterrupt
        return losses(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qp, "criterion", cut)
        patch.setattr(RunFolder, "draw", lambda *args: None)
        patch.setattr(RunFolder, "save_is_due", lambda self: len(calls) == 4)
        with suppress(KeyboardInterrupt):
            train(puppets_folder, tmp_path / "run")
        patch.setattr(qp, "criterion", losses)
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == step
        after = train(puppets_folder, tmp_path / "run", "--resume", str(tmp_path / "run"))
    expected = torch.load(whole_run / "last.pt", weights_only=True)
    assert after["step"] == 10
    parts = ("model", "ema", "optimizer", "epoch", "step", "best", "rows")
    assert_equal({part: after[part] for part in parts}, {part: expected[part] for part in parts})


def test_without_an_average_the_weights_themselves_are_kept_and_evaluated(puppets_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "draw", lambda *args: None)
    last = train(puppets_folder, tmp_path / "run", "--ema", "0", "--epochs", "1", "--batch", "8")
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert "ema" not in last
    assert_equal(best["model"], last["model"])


def test_a_run_leaves_its_pictures_and_a_checkpoint_that_eval_understands(whole_run, tmp_path, monkeypatch, capsys):
    assert {"predictions.png", "curves.png", "best.pt"} <= {path.name for path in whole_run.iterdir()}
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.png")
    evaluation = importlib.import_module("eval")
    for words in ["--eval_batch", "3"], ["--images", str(tmp_path / "photo.png"), "--process", "--threshold", "0"]:
        words = ["eval.py", str(whole_run), *words, "--device", "cpu", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", words)
        evaluation.main()
    assert "8 images in" in capsys.readouterr().out
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"photo.png", "photo_sigma.png", "photo_attention.png", "results.json"} <= drawn


def test_a_loss_that_is_not_finite_stops_with_its_name_and_the_images(puppets_folder, tmp_path, monkeypatch):
    losses = qp.criterion
    monkeypatch.setattr(qp, "criterion", lambda *args: losses(*args) | dict(loss_kps=torch.tensor(math.nan)))
    with pytest.raises(UserError, match=r"loss_kps not finite at step 0, images \["):
        train(puppets_folder, tmp_path / "run")


def test_frozen_norms_without_start_weights_are_refused():
    args = SimpleNamespace(device="cpu", saved=None)
    with pytest.raises(UserError, match="frozen norms need start weights"):
        qp.train(resolve(qp.PRESETS["r50"], init=""), args)


@pytest.mark.parametrize("preset, millions, cost", [
    ("r50-light", 188.7, 1573), ("hrnet_w48", 230.6, 1649), ("swin_l", 493.9, 1791)])
def test_parameters_and_cost_are_those_of_the_release(preset, millions, cost):
    """Millions, but for those that the release never uses, and G multiply-adds of 640 x 480 pixels counted there."""
    with torch.device("meta"):
        model = qp.build(preset).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.006)
    assert qp.flops(model, 640, 480) / 2e9 == pytest.approx(cost, rel=0.01)


def test_cost_is_counted_with_plain_kernels_too(monkeypatch):
    with torch.device("meta"):
        model = small().eval()
    fast = qp.flops(model, 64, 64)
    monkeypatch.setenv("POSE_KERNELS", "plain")
    assert qp.flops(model, 64, 64) == fast > 0


@pytest.mark.slow
def test_the_summary_has_a_row_for_every_preset():
    assert [line.split()[0] for line in qp.summary().splitlines()] == ["preset", *qp.PRESETS]


@pytest.mark.slow
def test_the_tiny_preset_learns_eight_puppets(puppets_folder):
    """A model that cannot overfit has a bug: in 30 steps the loss falls to a third."""
    data = open_dataset(str(puppets_folder), "train").training()
    model, values = qp.build("tiny", data.skeleton, warmup=0).train(), []
    images = qp.TrainImages(data, model.cfg, 0)
    (images, sizes), people, _, _ = collate([images[i] for i in range(8)], qp.pad_images)
    optimizer = qp.build_optimizer(model, model.cfg)
    for _ in range(30):
        total = sum(losses_of(model, images, sizes, people).values())
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), model.cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        values.append(total.item())
    assert np.mean(values[-5:]) < values[0] / 3
