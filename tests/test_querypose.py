"""QueryPose against the released code's numbers, and by itself. Cases are found by file pattern."""
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

import querypose as qp
from common import runtime, weights
from common.backbones import HRNet, Swin, WindowAttention
from common.skeletons import get_skeleton
from tests.conftest import REFERENCE

FOLDER = REFERENCE / "querypose"
CUDA = torch.cuda.is_available()


def golden(pattern: str, kind: str = "golden_{}.npz"):
    """Run a test once for every file of a pattern; none there is a failure to notice, not a silent pass."""
    files = sorted(FOLDER.glob(kind.format(pattern)))
    missing = pytest.param(None, marks=pytest.mark.skip(reason=f"no {kind.format(pattern)} in {FOLDER}"))
    return pytest.mark.parametrize("file", files or [missing], ids=lambda f: f.stem if f else "none")


def normal(key: str, shape, seed: int = 0) -> torch.Tensor:
    """The reference's standard-normal array, fixed by (seed, key)."""
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()))
    return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))


def fill(key: str, shape, seed: int) -> torch.Tensor:
    """The reference's weights for a tensor of this name."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(tuple(shape), dtype=torch.long)
    n = normal(key, shape, seed)
    if key.endswith("running_var"):
        return 1 + 0.2 * n.tanh()
    if key.endswith(("running_mean", "bias")):
        return 0.05 * n
    if len(shape) <= 1:
        return 1 + 0.1 * n
    return n / math.sqrt(math.prod(shape[1:]))


def official_state(name: str, seed: int, only: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a released file whose names match `only`; constants are left out, as the conversion does."""
    manifest, state = json.loads((FOLDER / name).read_text()), {}
    for key, shape in manifest["keys"].items():
        if re.search(only, key) and key not in manifest["constants"]:
            state[key] = fill(key, shape, seed) * manifest["gains"].get(key, 1)
    if "init_proposal_boxes.weight" in state:
        state["init_proposal_boxes.weight"] = 0.5 + 0.25 * torch.tanh(2 * state["init_proposal_boxes.weight"])
    return state


def close(ours, theirs, tolerance: float, what: str = ""):
    """Largest difference, relative to the largest entry or 1."""
    ours, theirs = torch.as_tensor(ours).detach().cpu().double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()
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


def test_roi_align_equals_sample_by_sample_and_so_do_gradients():
    maps = [torch.randn(2, 3, 12 >> i, 16 >> i, dtype=torch.float64, requires_grad=True) for i in range(3)]
    boxes = [[5.0, 3, 40, 30], [-20, -9, 8.5, 50], [60, 40, 75, 60], [7, 7, 7, 20], [-90, -90, -80, -80],
             [0, 0, 64, 48], [-3.9, 30, 70, 52]]
    image, level = torch.tensor([0, 1, 0, 1, 0, 1, 1]), torch.tensor([0, 1, 0, 2, 1, 2, 0])
    boxes = torch.tensor(boxes, dtype=torch.float64)
    ours = qp.roi_align(qp.make_pyramid(maps), image, boxes, level, 3)
    rows = zip(image.tolist(), boxes.tolist(), level.tolist())
    theirs = torch.stack([brute_roi_align(maps, *row, 3).flatten(0, 1) for row in rows])
    assert (ours - theirs).abs().max() < 1e-12 and ours[4].abs().max() == 0
    push = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((out * push).sum(), maps) for out in (ours, theirs))):
        assert (a - b).abs().max() < 1e-12


def test_roi_align_takes_boxes_that_diverged():
    pyramid = qp.make_pyramid([torch.ones(1, 2, 8 >> i, 8 >> i) for i in range(4)])
    boxes = torch.tensor([[float("nan")] * 4, [-1e30, -1e30, 1e30, 1e30], [0, 0, math.inf, math.inf], [9, 9, 3, 3]])
    out = qp.roi_align(pyramid, torch.zeros(4, dtype=torch.long), boxes, qp.box_level(boxes.nan_to_num()), 2)
    assert out.shape == (4, 4, 2) and out.isfinite().all()


@golden("roialign*")
def test_roi_align_equals_the_release(file):
    case = np.load(file)
    h, w = case["p2_hw"].tolist()
    seed = int(case["seed"])
    maps = [normal(f"roi.p{i + 2}", (2, 4, h >> i, w >> i), seed) for i in range(4)]
    boxes = torch.from_numpy(np.concatenate([case["boxes0"], case["boxes1"]]))
    image = torch.tensor([0] * len(case["boxes0"]) + [1] * len(case["boxes1"]))
    level = qp.box_level(boxes)
    assert (level.numpy() + 2 == case["levels"]).all()
    pyramid = qp.make_pyramid(maps)
    for bins, levels in ((7, level), (14, torch.zeros_like(level))):
        out = qp.roi_align(pyramid, image, boxes, levels, bins)
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


def stage_pyramid(case) -> qp.Pyramid:
    (h, w), batch = case["p2_hw"].tolist(), len(case["boxes_in"])
    return qp.make_pyramid([normal(f"stage.p{i + 2}", (batch, 256, h >> i, w >> i), int(case["seed"]))
                            for i in range(4)])


def rows_first(x) -> torch.Tensor:
    """The release's (M, R, ...) → ours (R, M, ...)."""
    return torch.from_numpy(x).transpose(0, 1)


@golden("stage*")
def test_box_stage_equals_the_release(file):
    case = np.load(file)
    stage = load_stage(qp.BoxStage(qp.PRESETS["r50"]), stage_state(int(case["seed"])), "box_stages.0.")
    boxes = torch.from_numpy(case["boxes_in"])
    batch, count = boxes.shape[:2]
    dynamic = stage.dynamic
    with watch(attention=stage.attention, norm1=stage.norm1, generate=dynamic.generate, inner=dynamic.norm1,
               outer=dynamic.norm2, dynamic=dynamic, norm2=stage.norm2, score=stage.score_tower,
               tower=stage.delta_tower, delta=stage.delta) as seen:
        queries, logits, moved = stage(normal("stage.query", (batch, count, 256), int(case["seed"])), boxes,
                                       stage_pyramid(case))
    out = {name: calls[0][1] for name, calls in seen.items()}
    inside = seen["dynamic"][0][0][1]
    close(inside.transpose(1, 2).unflatten(2, (7, 7))[:, ::32], case["box_roi"], 5e-5, "inside")
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


@golden("stage*")
def test_keypoint_stage_equals_the_release(file):
    """Light and full share their weights, and G: one pass of convolutions, which cost the most, serves all three."""
    case, seed = np.load(file), int(np.load(file)["seed"])
    boxes, queries = torch.from_numpy(case["boxes_out"]).flatten(0, 1), torch.from_numpy(case["inst_query"][0])
    image = torch.arange(len(case["boxes_in"])).repeat_interleave(case["boxes_in"].shape[1])
    given = normal("stage.part", (7, len(boxes), 128), seed).transpose(0, 1)
    first = fill("part_query.weight", (7, 128), seed)[None]
    pyramid, state, maps = stage_pyramid(case), stage_state(seed), []
    for form, prefix, parts in (("full", "full", given), ("light", "light", given), ("light", "light_first_stage", first)):
        cfg = runtime.resolve(qp.PRESETS["r50"], full=form == "full")
        stage = load_stage(qp.KeypointStage(cfg, qp.keypoint_parts(get_skeleton("coco"), "c")), state,
                           "keypoint_stages.0.")
        if maps:
            stage.inside = lambda *args: maps[0]
        look, watched = stage.look, dict(sim=stage.update, residual=stage.residual[2], attention=stage.attention,
                                         norm=stage.norm, gates=stage.update.linear2, look=stage.look)
        if form == "full":
            watched |= dict(dynamic=stage.dynamic, up=look.upsample, logits=look.attention)
        with watch(**watched, first=stage.convs[0]) as seen:
            keypoints, sigmas, new, after = stage(pyramid, image, boxes, queries, parts)
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
            maps.append(seen["look"][0][0][0])
            close(seen["first"][0][0][0][::4, ::32], case["pose_roi_sub"], 5e-5, "inside")
            close(maps[0][::4, ::32], case["pose_convs_sub"], 1e-4, "convolutions")
            close(out["up"][::8, ::32], case["deconv_sub"], 1e-4, "upsampled")
            close(out["logits"].flatten(2).softmax(-1)[::6], case["attention_sub"], 1e-4, "attention maps")
            close(out["look"][..., ::4], rows_first(case["spegm"]), 1e-4, "SPEGM")
            close(out["dynamic"][:, ::4], case["full_pose_dyn_out"][:, ::4], 1e-4, "dynamic convolution")
            coordinates = [head.coordinates.weight @ x.T / x.norm(dim=1) + head.coordinates.bias[:, None]
                           for head, x in zip(stage.heads, after.unbind(1))]
            close(torch.cat(coordinates).T, case["full_coord_by_part"], 1e-4, "coordinates")


# ------------------------------------------------------------------------------------------ the whole network


def preset_of(file) -> tuple[str, str]:
    """(preset, manifest) of golden_<preset>_<light|full>_*.npz."""
    net, form = re.match(r"golden_(\w+?)_(light|full)_forward", file.stem).groups()
    return net, form, f"manifest_{net}_{form}.json"


def normalised(image: np.ndarray) -> torch.Tensor:
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    return (torch.from_numpy(image).float() - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def released_forward(case, preset: str, form: str, manifest: str):
    """The model, the rows with poses, its stages and what its parts gave; on a GPU with all rows and stages.

    On a CPU the light form gives poses to every tenth query, which changes nothing for these; the full form, where
    boxes depend on all poses, ends after two stages.
    """
    stages = 2 if form == "full" and not CUDA else 6
    keys = rf"^(?!head\.(pose_)?head_series\.[{stages}-9])"
    with torch.device("meta"):
        model = qp.build(preset, full=form == "full", prune=False, stages=stages)
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
    chosen = torch.zeros(len(images), 100, dtype=torch.bool)
    chosen[:, ::1 if CUDA or form == "full" else 10] = True
    device = torch.device("cuda" if CUDA else "cpu")
    model, images = model.eval().to(device), images.to(device, memory_format=torch.channels_last)
    parts = dict(backbone=model.backbone, neck=model.neck, look=model.keypoint_stages[0].look,
                 update=model.keypoint_stages[0].update, conv=model.keypoint_stages[0].convs[0],
                 maps=model.keypoint_stages[0].look.attention, dynamic=model.box_stages[0].dynamic)
    for s in range(stages):
        parts |= {f"box{s}": model.box_stages[s], f"keypoint{s}": model.keypoint_stages[s]}
    with watch(**parts) as seen:
        result = model(images, sizes.to(device), (lambda found: chosen.to(device)) if form == "light" else None)
    return chosen, result["stages"], {name: calls[0] for name, calls in seen.items()}


@golden("*_forward*")
def test_forward_equals_the_release(file):
    case = np.load(file)
    preset, form, manifest = preset_of(file)
    chosen, stages, seen = released_forward(case, preset, form, manifest)
    batch = len(chosen)
    for level, (c, p) in enumerate(zip(seen["backbone"][1], seen["neck"][1]), 2):
        step = (4, 4, 2, 1)[level - 2]
        close(c[:, ::c.shape[1] // 8, ::step, ::step], case[f"sub_c{level}"], 1e-5, f"backbone {level}")
        close(p[:, ::32, ::step, ::step], case[f"sub_p{level}"], 5e-5, f"neck {level}")
    rows = chosen.flatten().nonzero().squeeze(1)
    at = {step: torch.isin(rows, torch.arange(0, 100 * batch, step * batch)) for step in (10, 20, 30)}
    inside = seen["dynamic"][0][1].transpose(1, 2).unflatten(2, (7, 7))
    close(inside[::10 * batch, ::32], case["sub_box_roi_stage0"], 1e-4, "inside of boxes")
    close(seen["conv"][0][0][at[20], ::64], case["sub_pose_roi_stage0"], 1e-4, "inside for poses")
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


@golden("*", "manifest_{}.json")
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


@golden("flow*")
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

SMALL = dict(stages=2, dim=32, heads=2, ffn=32, dynamic=8, conv_width=32, part_dim=16, pose_roi=4, box_roi=3, queries=6)


def small(skeleton: str = "coco", **overrides) -> qp.QueryPose:
    return qp.build("tiny", skeleton, **SMALL | overrides)


def picture(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 64, 96), torch.tensor([[96.0, 64.0], [70.0, 50.0]])[:batch]


def some(found) -> torch.Tensor:
    """The queries that a test matches."""
    assert all(logits.shape == boxes.shape[:2] for logits, boxes in found)
    mask = torch.zeros_like(found[0][0], dtype=torch.bool)
    mask[0, 1] = mask[0, 4] = mask[1, 0] = True
    return mask


def test_training_outputs_and_gradients():
    model, (images, sizes) = small().train(), picture()
    stages = model(images, sizes, some)["stages"]
    assert len(stages) == 2
    for logits, boxes, keypoints, sigmas in stages:
        assert (logits.shape, boxes.shape) == ((2, 6), (2, 6, 4))
        assert keypoints.shape == sigmas.shape == (2, 6, 17, 2)
        posed = (sigmas < 1).all(-1).all(-1)
        assert (posed == some([(logits, boxes)])).all() and (keypoints[~posed] == 0).all()
    loss = sum(x.square().sum() for stage in stages for x in stage) + model.flow.log_prob(torch.randn(3, 2)).sum()
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


def test_first_boxes_learn_from_the_first_stage_alone():
    """Boxes are detached between stages and for pooling."""
    model, (images, sizes) = small().eval(), picture()
    stages = model(images, sizes)["stages"]
    first, = torch.autograd.grad(stages[0].boxes.sum(), model.boxes, retain_graph=True)
    assert first.abs().max() > 0
    for x in (stages[1].boxes, stages[0].keypoints, stages[0].logits):
        gradient, = torch.autograd.grad(x.sum(), model.boxes, retain_graph=True, allow_unused=True)
        assert gradient is None


def test_a_batch_without_matches_still_has_a_graph():
    model, (images, sizes) = small().train(), picture()
    stages = model(images, sizes, lambda found: torch.zeros(2, 6, dtype=torch.bool))["stages"]
    (sum(stage.keypoints.sum() + stage.sigmas.sum() for stage in stages) * 0).backward()
    assert all(p.grad is not None for p in model.keypoint_stages.parameters())


@pytest.mark.parametrize("form", [dict(full=False), dict(full=True, iterate=False), dict(full=True),
                                  dict(full=True, update="none"), dict(full=True, stages=1)])
def test_pruned_prediction_equals_the_plain_one(form, monkeypatch):
    monkeypatch.setattr(qp, "KEPT", 4)
    model, (images, sizes) = small(matched=False, prune=False, **form).eval(), picture()
    with torch.no_grad():
        plain = model(images, sizes)["stages"][-1]
        model.cfg = runtime.resolve(model.cfg, prune=True)
        pruned = model(images, sizes)["stages"][-1]
    assert torch.equal(plain.logits, pruned.logits) and torch.equal(plain.boxes, pruned.boxes)
    kept = torch.zeros(2, 6, dtype=torch.bool).scatter(1, plain.logits.topk(4).indices, True)
    assert torch.allclose(plain.keypoints[kept], pruned.keypoints[kept], atol=1e-5)
    assert torch.allclose(plain.sigmas[kept], pruned.sigmas[kept], atol=1e-5)
    assert (pruned.sigmas[~kept] == 1).all() and (plain.sigmas < 1).all()


def test_images_of_a_batch_do_not_see_each_other_nor_the_order_of_queries():
    model, (images, sizes) = small().eval(), picture()
    with torch.no_grad():
        both = model(images, sizes)["stages"][-1]
        alone = model(images[1:], sizes[1:])["stages"][-1]
        order = torch.randperm(6)
        for name in ("boxes", "queries"):
            getattr(model, name).copy_(getattr(model, name)[order])
        turned = model(images, sizes)["stages"][-1]
    for a, b, c in zip(both, alone, turned):
        assert torch.allclose(a[1:], b, atol=1e-3) and torch.allclose(a[:, order], c, atol=1e-3)


ABLATIONS = [dict(interaction=i) for i in qp.INTERACTIONS] + [dict(update=u) for u in qp.UPDATES[1:]] + [
    dict(scheme=s) for s in qp.SCHEMES] + [dict(query="instance", interaction=i) for i in ("spegm", "channel", "mhsa")]


@pytest.mark.parametrize("change", ABLATIONS, ids=lambda change: "-".join(change.values()))
def test_ablations_run_and_learn(change):
    model = small(**change).train()
    stage = model.keypoint_stages[0]
    pyramid = qp.make_pyramid([torch.randn(1, 32, 16 >> i, 16 >> i) for i in range(4)])
    boxes = torch.tensor([[4.0, 4, 30, 40], [10, 0, 60, 60]])
    out = stage(pyramid, torch.zeros(2, dtype=torch.long), boxes, torch.randn(2, 32, requires_grad=True),
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
    for scheme in qp.SCHEMES:
        assert sorted(sum(qp.keypoint_parts(get_skeleton("wholebody"), scheme), [])) == list(range(133))


def test_keypoints_come_out_in_the_order_of_the_skeleton():
    model = small("crowdpose")
    stage, parts = model.keypoint_stages[0].eval(), qp.keypoint_parts(model.skeleton, "c")
    for head, part in zip(stage.heads, parts):
        torch.nn.init.zeros_(head.coordinates.weight)
        head.coordinates.bias.data = torch.tensor(part).repeat_interleave(2).float()
    pyramid = qp.make_pyramid([torch.randn(1, 32, 16 >> i, 16 >> i) for i in range(4)])
    keypoints, *_ = stage(pyramid, torch.tensor([0]), torch.tensor([[4.0, 4, 30, 40]]), torch.randn(1, 32),
                          model.parts[None])
    assert keypoints[0, :, 0].tolist() == keypoints[0, :, 1].tolist() == list(range(14))


def test_boxes_move_and_keypoints_lie_in_them():
    box = torch.tensor([10.0, 20, 30, 60])
    assert qp.move_boxes(box, torch.tensor([1.0, -0.5, 0, 0])).tolist() == [20, 10, 40, 50]
    grown = qp.move_boxes(box, torch.tensor([0, 0, math.log(2), 0]))
    assert torch.allclose(grown, torch.tensor([0.0, 20, 40, 60]))
    assert qp.move_boxes(box, torch.full((4,), 1e9)).isfinite().all()
    corners = torch.tensor([[-0.5, -0.5], [0, 0], [0.5, 0.5]])
    assert qp.place_keypoints(corners, box).tolist() == [[10, 20], [20, 40], [30, 60]]


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
    model, (images, sizes) = small(frozen_norm=True).eval(), picture()
    for name, buffer in model.backbone.named_buffers():
        buffer.data = 1 + 0.3 * torch.rand_like(buffer)
    with torch.no_grad():
        plain, fast = (net(images, sizes)["stages"][-1] for net in (model, qp.fuse(model)))
    assert torch.allclose(plain.boxes, fast.boxes, atol=1e-2) and torch.allclose(plain.keypoints, fast.keypoints, atol=1e-3)


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
    with pytest.raises(runtime.UserError, match="not in the weights"):
        qp.load_init(model, str(tmp_path / "resnet.pth"))


@pytest.mark.parametrize("net, foreign, lacking", [("hrnet_w32", "final_layer.weight", "stage4.2.fuse_layers.1"),
                                                   ("swin_l", "head.weight", "norm")])
def test_start_weights_of_hrnet_and_swin(net, foreign, lacking, monkeypatch):
    """Pose HRNets keep one branch in their last module; classifiers have no norms of their maps."""
    with torch.device("meta"):
        model = qp.build(net)
    file = FOLDER / f"manifest_{net}_light.json"
    if not file.exists():
        pytest.skip(f"no {file}")
    prefix = "backbone.bottom_up."
    state = {name.removeprefix(prefix): torch.empty(shape, device="meta")
             for name, shape in json.loads(file.read_text())["keys"].items() if name.startswith(prefix + "")}
    state = {name: value for name, value in state.items() if not re.match(lacking, name)}
    loaded = {}
    monkeypatch.setattr(weights, "load_tensors", lambda path: state | {foreign: torch.empty(1, device="meta")})
    monkeypatch.setattr(qp.Path, "exists", lambda path: True)
    monkeypatch.setattr(weights, "load_strict", lambda model, tensors, ignored: loaded.update(tensors=tensors, ignored=ignored))
    qp.load_init(model, "some.pth")
    theirs = {f for f in loaded["tensors"] if f.startswith("backbone.")}
    assert theirs == {*loaded["tensors"]} and not any(foreign.split(".")[0] in name for name in theirs)
    missing = {name for name in model.state_dict() if name.startswith("backbone.") and name not in theirs}
    assert missing and all(any(re.search(pattern, name) for pattern in loaded["ignored"]) for name in missing)
    assert all("fuse" in name if "hrnet" in net else ".norm" in name for name in missing)


def test_mistakes_are_named():
    for change, text in ((dict(matched=True, full=True), "--matched"), (dict(part_dim=30), "multiple of 4"),
                         (dict(backbone="r101"), "choose from"), (dict(scheme="e"), "choose from a, b, c, d")):
        with pytest.raises(runtime.UserError, match=text):
            qp.build("tiny", **change)
    with pytest.raises(runtime.UserError, match="there is no preset"):
        qp.build("r101")
    with pytest.raises(runtime.UserError, match="do not fit the model|not in"):
        weights.load_strict(small(), qp.convert_official({"part_query.weight": torch.empty(7, 128)}, qp.PRESETS["r50"]), {})
