"""DiffusionPose's network and diffusion against the reference numbers, and by themselves. Cases by file pattern."""
import json
import math
import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffusionpose as dp
from common import weights
from common.errors import UserError
from common.nets import vit
from common.run import Ema
from common.skeletons import COCO, SKELETONS, Skeleton, flip_from_names, get_skeleton
from tests.helpers import close, fill, golden, normal, read_case, watch

SMALL = dict(dim=32, depth=1, vit_heads=2, heads=2, stfe_layers=1, decoder_layers=1, height=64, width=48, init="",
             stem="patch", patch_weight=0.0)                   # the paper's form


def read(file) -> tuple[dict, dict[str, torch.Tensor]]:
    """(meta, tensors) of a golden file."""
    arrays, meta = read_case(file)
    return meta, {name: torch.from_numpy(value) for name, value in arrays.items()}


def filled(file, seed: int) -> dict[str, torch.Tensor]:
    """The weights of a golden case, from its manifest."""
    manifest = json.loads(file.with_name(f"{file.stem.replace('golden_', 'manifest_')}.json").read_text())
    return {name: fill(name, shape, seed) * manifest["gains"].get(name, 1) for name, shape in manifest["keys"].items()}


def skeleton_of(meta: dict) -> Skeleton:
    """The keypoint set of a golden case, a known one or its own."""
    names = tuple(meta["joints"])
    edges, sigmas = tuple(map(tuple, meta["edges"])), (0.1,) * len(names)
    own = Skeleton(meta["case"], names, edges, flip_from_names(names), sigmas)
    return next((known for known in SKELETONS.values() if known.keypoints == names), own)


def small(skeleton="posetrack", **overrides) -> dp.DiffusionPose:
    """A model that takes milliseconds, every weight random so that each part matters."""
    model = dp.build("tiny", skeleton, **SMALL | overrides)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model: dp.DiffusionPose, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cfg = model.cfg
    maps = torch.randn(batch, model.skeleton.num_keypoints, *cfg.heatmap)
    return torch.randn(batch, 3, 3, cfg.height, cfg.width), maps, torch.tensor([999, 250] * batch)[:batch]


# ------------------------------------------------------------------------------------------ Mamba, ViT


@golden("diffusionpose/golden_mamba_*.npz")
def test_mamba_block_and_all_its_gradients(file):
    meta, want = read(file)
    block = dp.MambaBlock(meta["d_model"])
    weights.load_strict(block, filled(file, meta["seed"]), {})
    block.double()
    shape = meta["batch"], meta["length"], meta["d_model"]
    x = normal("input", shape, meta["seed"]).double().requires_grad_()
    with watch(x_proj=block.x_proj) as seen:
        y = block(x)
    (u,), dbc = seen["x_proj"][0]
    close(u.mT[:, :8], want["conv_silu_first8"], 2e-6, "convolution")
    close(dbc[:, :16], want["x_dbl"], 2e-6, "d, B, C")
    close(y[..., ::meta["channel_stride"]], want["output"], 2e-6, "output")
    y.backward(normal("grad", shape, meta["seed"]).double())
    close(x.grad[..., ::meta["channel_stride"]], want["grad_input"], 2e-6, "gradient of the input")
    for name, parameter in block.named_parameters():
        grad = parameter.grad
        grad = grad.flatten()[::meta["big_grad_flat_stride"]] if grad.numel() > 70_000 else grad
        close(grad, want[f"grad_{name}"], 2e-6, f"gradient of {name}")


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_mamba_convolution_takes_sequences_shorter_than_its_kernel(length):
    block, x = dp.MambaBlock(16), torch.randn(2, 7, 16)
    close(block(x[:, :length]), block(x)[:, :length], 1e-6)


def test_mamba_starts_with_steps_between_a_thousandth_and_a_tenth():
    step = F.softplus(dp.MambaBlock(512).dt_proj.bias)
    assert 1e-3 * 0.999 <= step.min() < 2e-3 and 0.05 < step.max() <= 0.1001
    model = dp.build("tiny", **SMALL)
    step = F.softplus(model.stfe.blocks[0].full_mamba.dt_proj.bias)
    assert 1e-3 * 0.999 <= step.min() and step.max() <= 0.1001               # the model leaves it alone


def classic_head(dim: int, inner: int, joints: int) -> nn.Module:
    """What ViTPose finds poses with in one frame: here a check that the backbone came in right."""
    deconv = []
    for channels in (dim, inner):
        deconv += [nn.ConvTranspose2d(channels, inner, 4, 2, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()]
    return nn.Sequential(OrderedDict(deconv_layers=nn.Sequential(*deconv), final_layer=nn.Conv2d(inner, joints, 1)))


@golden("diffusionpose/golden_vit_*.npz")
@torch.no_grad()
def test_vit_of_vitpose_with_its_classic_head(file):
    meta, want = read(file)
    (height, width), grid = meta["img_hw"], tuple(meta["grid_hw"])
    cfg = replace(dp.PRESETS["tiny"], height=height, width=width, dim=meta["embed_dim"], depth=meta["depth"],
                  vit_heads=meta["heads"], heads=2)
    official = filled(file, meta["seed"])
    net = dp.ViT(cfg.dim, cfg.depth, cfg.vit_heads, math.prod(grid))
    head = classic_head(*(len(official[f"keypoint_head.{name}"]) for name in (
        "deconv_layers.0.weight", "deconv_layers.1.weight", "final_layer.weight"))).eval()
    ours = dp.convert_official(official, cfg)
    weights.load_strict(net, {name.removeprefix("backbone."): value for name, value in ours.items()}, {})
    weights.load_strict(head, {name.removeprefix("keypoint_head."): value for name, value in official.items()
                               if name.startswith("keypoint_head.")}, {})
    image, stride = normal("input", (meta["batch"], 3, height, width), meta["seed"]), meta["feature_channel_stride"]
    with watch(patches=net.patch_embed, blocks=net.blocks, first=net.blocks[0]) as seen:
        features = net(image)
    probes = dict(patch_tokens=seen["patches"][0][1].flatten(2).mT, block0=seen["first"][0][1],
                  last_block=seen["blocks"][0][1])
    for name, probe in probes.items():
        close(probe[:, ::meta["intermediate_token_stride"], ::stride], want[name], 2e-5, name)
    close(features[..., ::stride], want["features"], 2e-5, "features")
    maps, every = head(features.mT.unflatten(2, grid)), meta["heatmap_stride"]
    close(maps[..., ::every, ::every], want["heatmaps"], 2e-5, "heatmaps")


@golden("diffusionpose/golden_posembed*.npz")
def test_position_table_is_resized(file):
    meta, want = read(file)
    kinds = [name.removesuffix("table") for name in want if name.endswith("table")]      # "" where it is alone
    for kind in kinds:
        sizes = (want.get(f"{kind}{end}_hw", meta.get(f"{kind}{end}_hw")) for end in ("src", "dst"))
        old, new = (tuple(map(int, size)) for size in sizes)
        table = want[f"{kind}table"]
        resized = vit.resize_positions(table, old, new)
        close(resized, want[f"{kind}resized"], 2e-6, kind)
        assert torch.equal(resized[:, 0], table[:, 0]) and vit.resize_positions(table, old, old) is table
    assert kinds


# ------------------------------------------------------------------------------------------ diffusion


@golden("diffusionpose/golden_schedule*.json")
def test_cosine_schedule_and_time_pairs(file):
    want, bar = json.loads(file.read_text()), dp.cosine_schedule()
    beta = 1 - bar / torch.cat([torch.ones(1), bar[:-1]])
    assert len(bar) == want["T"]
    torch.testing.assert_close(bar[want["index"]], torch.tensor(want["alpha_bar"], dtype=bar.dtype), rtol=1e-9, atol=0)
    torch.testing.assert_close(beta[want["index"]], torch.tensor(want["beta"], dtype=bar.dtype), rtol=1e-9, atol=0)
    assert math.isclose(bar.sum(), want["sum_alpha_bar"], rel_tol=1e-9)
    assert math.isclose(beta.sum(), want["sum_beta"], rel_tol=1e-9)
    for steps, pairs in want["time_pairs"].items():
        assert dp.time_pairs(int(steps)) == [tuple(pair) for pair in pairs]


@golden("diffusionpose/golden_qsample*.npz")
def test_noisy_maps(file):
    _, want = read(file)
    visible = torch.ones(want["heatmap"].shape[:2])
    x_t = dp.q_sample(want["heatmap"], want["t"], want["noise"], visible, want["signal_scale"].item())
    close(x_t, want["x_t"], 2e-6)
    visible[:, 0] = 0
    x_t = dp.q_sample(want["heatmap"], want["t"], want["noise"], visible, want["signal_scale"].item())
    assert torch.equal(x_t[:, 0], want["noise"][:, 0])                      # a joint without label: only noise
    close(x_t[:, 1:], want["x_t"][:, 1:], 2e-6)


def test_maps_at_the_last_time_are_noise_whatever_they_were():
    noise, t = torch.randn(1, 3, 8, 8), torch.tensor([dp.TIMES - 1])
    for maps in (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)):
        assert (dp.q_sample(maps, t, noise, torch.ones(1, 3), 1.0) - noise).abs().max() < 1e-4


@golden("diffusionpose/golden_time_embedding*.npz")
def test_time_embedding(file):
    _, want = read(file)
    for name in [name for name in want if name.startswith("dim")]:
        ours = dp.time_embedding(want["t"], int(name.removeprefix("dim")))
        close(ours, want[name], 1e-4, name)                                 # sin(999) in float32


@golden("diffusionpose/golden_ddim*.npz")
def test_ddim_trajectories(file):
    meta, want = read(file)
    cases = [name.removesuffix("x_T") for name in want if name.endswith("x_T")]          # "" where it is alone
    for case in cases:
        names = "x_T", "c", "steps", "eta", "signal_scale"
        x, c, steps, eta, scale = (want[f"{case}{name}"] for name in names)
        seed = int(want.get(f"{case}seed", want.get("seed", meta.get("seed", 0))))
        key = case.removesuffix("_") or meta.get("case", file.stem.removeprefix("golden_"))
        noise = [x, *(normal(f"{key}.z{i}", x.shape, seed) for i in range(steps - 1))]

        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return 1.3 * (0.7 * x - 0.5 * t[:, None, None, None] / 1000 + c).sigmoid() - 0.15

        heatmaps, states = dp.ddim(denoise, torch.stack([n.to(x.dtype) for n in noise], 1), steps.item(), eta.item(),
                                   scale.item())
        close(torch.stack(heatmaps), want[f"{case}heatmaps"], 2e-5, f"{case} heatmaps")
        close(torch.stack(states), want[f"{case}trajectory"], 2e-5, f"{case} states")
    assert cases


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_ddim_with_a_perfect_denoiser_gives_its_answer(steps):
    answer, times = torch.rand(2, 3, 4, 4), []
    heatmaps, states = dp.ddim(lambda x, t: times.append(t) or answer, torch.randn(2, 1, 3, 4, 4), steps, 0.0, 2.0)
    assert torch.equal(heatmaps[-1], answer) and len(heatmaps) == steps and len(states) == steps + 1
    assert times[0].tolist() == [999, 999] and sorted(set(map(int, torch.stack(times)[:, 0])), reverse=True) == [
        int(t[0]) for t in times]
    close(states[-1], (2 * answer - 1) * 2.0, 1e-6)


# ------------------------------------------------------------------------------------------ Markov layer


def mol(skeleton: Skeleton, dim: int) -> dp.MarkovOptimizationLayer:
    layer = dp.MarkovOptimizationLayer(dim, dp.limbs(skeleton), skeleton.num_keypoints).double()
    nn.init.normal_(layer.node.weight, std=0.5)
    nn.init.normal_(layer.edge.weight, std=0.5)
    return layer


@golden("diffusionpose/golden_mrf_*.npz")
def test_markov_layer_and_its_gradients(file):
    meta, want = read(file)
    skeleton = skeleton_of(meta)
    assert {frozenset(limb) for limb in dp.limbs(skeleton)} == {frozenset(edge) for edge in meta["edges"]}
    layer = mol(skeleton, want["x"].shape[-1])
    layer.node.weight.data, layer.edge.weight.data = want["node"].T, want["edge"].T
    order = [layer.arrows.index(tuple(arrow)) for arrow in meta["message_order"]]
    assert layer.rounds == meta["rounds_to_converge"] and sorted(order) == list(range(len(layer.arrows)))
    x = want["x"].requires_grad_()
    close(layer.messages(layer.norm(x))[:, order], want["messages"], 1e-9, "messages")
    out = layer(x)
    close(out, want["output"], 1e-9, "output")
    out.backward(want["grad_output"])
    close(x.grad, want["grad_x"], 1e-9, "gradient of x")
    close(layer.node.weight.grad.T, want["grad_node"], 1e-9, "gradient of W_n")
    close(layer.edge.weight.grad.T, want["grad_edge"], 1e-9, "gradient of W_e")
    layer.rounds = 1
    close(layer(x), want["output_one_round"], 1e-9, "one round")


@pytest.mark.parametrize("name", dp.TREES)
def test_trees_span_all_joints_and_are_their_own_mirror_image(name):
    skeleton = get_skeleton(name)
    tree, flip = dp.limbs(skeleton), skeleton.flip
    assert len(tree) == skeleton.num_keypoints - 1 and {k for limb in tree for k in limb} == set(range(len(flip)))
    assert {frozenset(limb) for limb in tree} == {frozenset(flip[k] for k in limb) for limb in tree}
    assert {frozenset(limb) for limb in tree} <= {frozenset(edge) for edge in skeleton.edges} | {
        frozenset(edge) for edge in [(0, 5), (0, 6), (13, 0), (13, 1)]}     # COCO's drawing lacks a neck


def renamed(skeleton: Skeleton) -> Skeleton:
    """The same keypoints and edges as somebody's own set."""
    return replace(skeleton, name="own")


def own(edges: str, flip: str) -> Skeleton:
    return Skeleton("own", tuple(flip), tuple((int(a), int(b)) for a, b in edges.split()), tuple(map(int, flip)),
                    (0.1,) * len(flip))


OWN = {name: renamed(skeleton) for name, skeleton in SKELETONS.items()} | {
    "bars first": own("12 34 01 02 13 24", "02143"), "one side drawn": own("01", "021"),
    "a ring of pairs": own("01 02 31 32", "0213")}


@pytest.mark.parametrize("name", OWN)
def test_the_tree_of_an_unknown_skeleton_is_its_own_mirror_image(name):
    skeleton = OWN[name]
    tree, flip = dp.limbs(skeleton), skeleton.flip
    assert {frozenset(limb) for limb in tree} == {frozenset(flip[k] for k in limb) for limb in tree}
    part = list(range(skeleton.num_keypoints))
    for a, b in tree:
        assert part[a] != part[b], "a circle"
        part = [part[b] if p == part[a] else p for p in part]
    layer, h = mol(skeleton, 4), torch.randn(2, skeleton.num_keypoints, 4, dtype=torch.float64)
    close(layer(h[:, list(flip)]), layer(h)[:, list(flip)], 1e-12, "mirrored")


def test_the_tree_of_an_unknown_skeleton_reaches_every_joint_that_it_can():
    assert len(dp.limbs(renamed(COCO))) == 16 and len(dp.limbs(OWN["bars first"])) == 4
    assert dp.limbs(OWN["one side drawn"]) == ((0, 1), (0, 2))
    assert len(dp.limbs(OWN["a ring of pairs"])) == 2           # no tree of all four is its own mirror image


def test_somebodys_own_keypoints_named_like_a_known_set_get_their_own_tree():
    impostor = replace(OWN["bars first"], name="coco")
    assert dp.limbs(impostor) == dp.limbs(OWN["bars first"])


def test_messages_of_a_chain_of_three_joints():
    arrows, follows, rounds = dp.message_tables(((0, 1), (1, 2)))
    assert arrows == [(1, 0), (0, 1), (2, 1), (1, 2)] and rounds == 2
    assert follows.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    arrows, follows, rounds = dp.message_tables(())
    assert arrows == [] and follows.shape == (0, 0) and rounds == 0


@pytest.mark.parametrize("name", dp.TREES)
def test_messages_are_those_of_the_recursion_of_equation_1(name):
    layer = mol(get_skeleton(name), 5)
    n = torch.randn(1, len(layer.neighbours), 5, dtype=torch.float64)
    psi, (at_i, at_j) = layer.node.weight.T, layer.edge.weight.T.chunk(2)

    def message(j: int, i: int) -> torch.Tensor:
        behind = [message(k, to) for k, to in layer.arrows if to == j and k != i]
        raw = n[:, i] @ psi + n[:, i] @ at_i + n[:, j] @ at_j + sum(behind)
        return raw - raw.exp().mean(-1, keepdim=True).log()

    close(layer.messages(n), torch.stack([message(*arrow) for arrow in layer.arrows], 1), 1e-12)


@pytest.mark.parametrize("name", dp.TREES)
def test_markov_layer_is_exact_after_its_rounds_and_mirrors_with_the_body(name):
    skeleton = get_skeleton(name)
    layer, h = mol(skeleton, 6), torch.randn(2, skeleton.num_keypoints, 6, dtype=torch.float64)
    out, flip = layer(h), list(skeleton.flip)
    close(layer(h[:, flip]), out[:, flip], 1e-12, "mirrored")
    layer.rounds += 1
    close(layer(h), out, 1e-12, "one round more")
    layer.rounds -= 2
    assert (layer(h) - out).abs().max() > 1e-6


def test_markov_layer_starts_with_the_number_of_neighbours():
    model = dp.build("tiny", **SMALL)
    layer, h = model.pdd.blocks[0].mol, torch.randn(2, 15, 32)
    degree = torch.tensor([[sum(k in limb for limb in dp.limbs(model.skeleton))] for k in range(15)])
    close(layer(h), h + degree.log(), 1e-6)


def test_markov_layer_leaves_joints_without_limbs_and_cuts_circles():
    square = ((0, 1), (1, 2), (2, 3), (3, 0))
    skeleton = Skeleton("square", tuple("abcde"), square, None, (0.1,) * 5)
    assert dp.limbs(skeleton) == square[:3]
    layer, h = mol(skeleton, 4), torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    out = layer(h)
    assert layer.rounds == 3 and torch.equal(out[:, 4], h[:, 4]) and not torch.isclose(out[:, :4], h[:, :4]).any()
    assert torch.autograd.grad(out.sum(), h)[0].isfinite().all()
    alone = mol(replace(skeleton, edges=()), 4)
    assert alone.rounds == 0 and torch.equal(alone(h), h)


def test_markov_layer_has_the_gradient_of_its_formula():
    layer = mol(Skeleton("fork", tuple("abcd"), ((0, 1), (1, 2), (1, 3)), None, (0.1,) * 4), 3)
    h = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, node, edge: torch.func.functional_call(
        layer, {"node.weight": node, "edge.weight": edge}, h), (h, layer.node.weight, layer.edge.weight))


# ------------------------------------------------------------------------------------------ the whole network


def golden_model(file) -> tuple[dict, dict[str, torch.Tensor], dp.DiffusionPose]:
    meta, want = read(file)
    (height, width), heads = meta["img_hw"], meta["heads"]
    model = dp.build("tiny", skeleton_of(meta), stem="patch", patch_weight=0.0, height=height, width=width,
                     dim=meta["dim"], depth=meta["vit_depth"], vit_heads=heads, heads=heads,
                     stfe_layers=meta["stb_depth"], decoder_layers=meta["hcdb_depth"],
                     signal_scale=meta["signal_scale"])
    weights.load_strict(model, filled(file, meta["seed"]), {})
    assert [*model.cfg.heatmap] == meta["heatmap_hw"] and [*model.cfg.grid] == meta["grid_hw"]
    return meta, want, model


def golden_inputs(meta: dict) -> tuple[torch.Tensor, torch.Tensor]:
    frames = normal("input", (meta["batch"], 3, 3, *meta["img_hw"]), meta["seed"])
    return frames, normal("noise", (meta["batch"], len(meta["joints"]), *meta["heatmap_hw"]), meta["seed"])


@golden("diffusionpose/golden_model_*.npz")
@torch.no_grad()
def test_whole_network_block_by_block(file):
    meta, want, model = golden_model(file)
    frames, x_t = golden_inputs(meta)
    parts = {}
    for i, block in enumerate(model.stfe.blocks):
        parts |= {f"stb{i}.spatial": block.norm_full, f"stb{i}.fused": block.norm_mlp, f"stb{i}.out": block}
    for i, block in enumerate(model.pdd.blocks):
        parts |= {f"hcdb{i}.guided": block.mol, f"hcdb{i}.mol": block.mol, f"hcdb{i}.cross": block.norm_ffn,
                  f"hcdb{i}.out": block}
    with watch(features=model.backbone, **parts) as seen:
        condition = model.encode(frames)
        heatmaps = model.denoise(x_t, want["t"], *condition)
    close(seen["features"][0][1].view_as(want["features"]), want["features"], 2e-4, "features")
    for name in parts:
        (x, *_), out = seen[name][0]
        value = x if name.endswith(("spatial", "fused", "guided", "cross")) else out
        stride = meta["stb_probe_token_stride"] if name.startswith("stb") else 1
        close(value[..., ::stride, :], want[f"probe_{name}"], 2e-4, name)
    close(condition[0], want["cond_feature"], 2e-4, "C_f")
    close(condition[1], want["cond_position"], 2e-4, "C_p")
    close(heatmaps, want["heatmaps"], 2e-4, "heatmaps")
    close(model(frames, x_t, want["t"])[0], want["heatmaps"], 2e-4, "forward")


@pytest.mark.slow
@golden("diffusionpose/golden_model_*.npz")
@torch.no_grad()
def test_whole_network_of_plain_formulas(file, monkeypatch):
    monkeypatch.setenv("POSE_KERNELS", "plain")
    meta, want, model = golden_model(file)
    close(model(*golden_inputs(meta), want["t"])[0], want["heatmaps"], 2e-4)


@golden("diffusionpose/golden_model_*.npz")
@torch.no_grad()
def test_whole_network_samples(file):
    meta, want, model = golden_model(file)
    frames, noise = golden_inputs(meta)
    for steps, name in (1, "one_step"), (3, "three_steps"):
        model.cfg = replace(model.cfg, steps=steps)
        close(model.sample(frames, noise[:, None, None]), want[name], 2e-4, name)
    conditions = model.encode(frames)
    heatmaps, _ = dp.ddim(lambda x, t: model.denoise(x, t, *conditions), noise[:, None], 3, 0.0, meta["signal_scale"])
    close(heatmaps[0], want["three_steps_first"], 2e-4, "first of three")


@golden("diffusionpose/golden_model_*.npz")
@torch.no_grad()
def test_whole_network_without_some_of_its_parts(file):
    meta, want, model = golden_model(file)
    frames, x_t = golden_inputs(meta)
    cases = dict(no_stfe=dict(stfe="none"), cf_only=dict(cp=False, mol=False), cf_cp=dict(mol=False))
    for name, flags in cases.items():
        part = dp.DiffusionPose(replace(model.cfg, **flags), model.skeleton)
        part.load_state_dict({key: model.state_dict()[key] for key in part.state_dict()})
        close(part(frames, x_t, want["t"])[0], want[f"ablation_{name}"], 2e-4, name)


# Millions of parameters by SPEC section 1: all, backbone, encoder, decoder, one block of either.
SIZES = dict(s=(47.0, 21.7, 12.5, 12.9, 4.0, 3.4), b=(181.7, 85.8, 49.2, 46.7, 15.8, 13.6),
             l=(471.4, 303.3, 87.3, 80.8, 28.0, 24.1), h=(891.4, 630.9, 136.1, 124.3, 43.7, 37.7))


@pytest.mark.parametrize("preset", SIZES)
def test_presets_have_the_sizes_of_the_design(preset):
    with torch.device("meta"):
        model = dp.build(preset)
    parts = model, model.backbone, model.stfe, model.pdd, model.stfe.blocks[0], model.pdd.blocks[0]
    assert tuple(round(sum(p.numel() for p in part.parameters()) / 1e6, 1) for part in parts) == SIZES[preset]


ABLATIONS = ["", "stfe=none denoiser=unet", "denoiser=unet", "stfe=none", "stfe=transformer", "cp= mol=", "mol=",
             "stfe=none cp=", "stfe=transformer denoiser=unet"]


@pytest.mark.parametrize("flags", ABLATIONS)
def test_every_ablation_trains_each_of_its_parameters(flags):
    words = [word.split("=") for word in flags.split()]
    model = small(**{name: value or False for name, value in words})
    frames, noise, t = inputs(model)
    maps = torch.rand_like(noise)
    x_t = dp.q_sample(maps, t, noise, torch.ones(noise.shape[:2]), 1.0)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(3):
        losses.append((model(frames, x_t, t)[0] - maps).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.numel() == 0 or parameter.grad.abs().max() > 0 or "qkv.bias" in name, name
        optimizer.step()
    assert losses[-1] < losses[0]


def test_ablations_leave_out_their_own_parameters():
    def names(**flags) -> set[str]:
        return {re.sub(r"\.\d+\.", ".0.", name) for name in small(**flags).state_dict()}

    everything = names()
    assert {name.split(".")[3] for name in everything - names(mol=False)} == {"mol"}
    assert {name.split(".")[3] for name in everything - names(cp=False)} == {"self_attn"}
    assert all(name.startswith("stfe.blocks.") for name in everything - names(stfe="none"))
    assert not any("mamba" in name for name in names(stfe="transformer"))
    assert small(stfe="none", denoiser="unet").stfe.keypoint_tokens.numel() == 0


@pytest.mark.parametrize("flags", [
    dict(dim=90), dict(scale_jitter=1.0), dict(rotation=181.0), dict(height=100), dict(steps=0), dict(steps=1001), dict(stfe="mamba"), dict(denoiser="vae"), dict(eta=2.0),
    dict(signal_scale=0.0), dict(sigma=1e300), dict(dimm=3)])
def test_settings_that_no_run_could_use_are_refused(flags):
    with pytest.raises(UserError):
        dp.build("tiny", **flags)


@torch.no_grad()
def test_who_sees_whom_in_a_spatio_temporal_block():
    block = small().stfe.blocks[0]
    x = torch.randn(1, 3, 9, 32)
    later, inside = x.clone(), x.clone()
    later[:, 2] += torch.randn(9, 32)
    inside[:, 1, 4] += torch.randn(32)
    with watch(sm=block.spatial_mamba, fsm=block.full_mamba, tsa=block.temporal_attn) as seen:
        for one in (x, later, inside):
            block(one)

    def change(name: str, i: int) -> torch.Tensor:
        """Whether (frame, token) differs from the first call's."""
        outs = [seen[name][k][1] for k in (0, i)]
        outs = [out.transpose(0, 1) if name == "tsa" else out for out in outs]
        return (outs[0] - outs[1]).abs().flatten(0, -2).amax(-1).view(3, 9) > 1e-7

    assert change("sm", 1).tolist() == [[False] * 9] * 2 + [[True] * 9]          # no frame sees another
    assert change("sm", 2).tolist() == [[False] * 9, [False] * 4 + [True] * 5, [False] * 9]  # nor a token later ones
    assert change("fsm", 1).tolist() == [[False] * 9] * 2 + [[True] * 9]         # the next frame changes only itself
    assert change("fsm", 2).flatten().tolist() == [False] * 13 + [True] * 14
    assert change("tsa", 1).all()                                                # but attention over time sees it


def test_temporal_attention_keeps_to_a_token():
    block = small().stfe.blocks[0]
    x = torch.randn(1, 3, 9, 32)
    with watch(tsa=block.temporal_attn) as seen:
        block(x)
    (rows,), out = seen["tsa"][0]
    assert rows.shape == (9, 3, 32)
    changed = rows.clone()
    changed[4, 0] += torch.randn(32)
    difference = (block.temporal_attn(changed) - out).abs().amax(-1)
    assert (difference[4] > 1e-7).all() and difference[[0, 1, 2, 3, 5, 6, 7, 8]].max() == 0


@torch.no_grad()
def test_positions_of_the_key_frame_depend_on_all_three_frames():
    model = small()
    frames, *_ = inputs(model, 1)
    for frame in range(3):
        other = frames.clone()
        other[:, frame] = torch.randn_like(other[:, frame])
        for before, after in zip(model.encode(frames), model.encode(other)):
            assert (before - after).abs().max() > 1e-4


@torch.no_grad()
def test_samples_do_not_depend_on_the_batch_and_average_their_draws():
    model = small(ensemble=2, steps=3, eta=1.0)
    assert model.noise_shape == (2, 3, 15, 16, 12)
    frames, noise = torch.randn(3, 3, 3, 64, 48), torch.randn(3, *model.noise_shape)
    together = model.sample(frames, noise)
    close(torch.cat([model.sample(frames[i:i + 1], noise[i:i + 1]) for i in range(3)]), together, 1e-5)
    model.cfg = replace(model.cfg, ensemble=1)
    close((model.sample(frames, noise[:, :1]) + model.sample(frames, noise[:, 1:])) / 2, together, 1e-6)
    model.cfg = replace(model.cfg, steps=1, eta=0.0)
    first = noise[:, :1, :1]
    assert model.noise_shape == first.shape[1:]
    assert torch.equal(model.sample(frames, first), model(frames, first[:, 0, 0], torch.full((3,), 999))[0])


@torch.no_grad()
def test_time_changes_nothing_before_training_and_something_after():
    model, trained = dp.build("tiny", **SMALL), small()
    frames, x_t, _ = inputs(model, 1)
    for net, same in (model, True), (trained, False):
        early, late = (net(frames, x_t, torch.tensor([t]))[0] for t in (5, 995))
        assert torch.equal(early, late) == same


@pytest.mark.parametrize("flags", [dict(), dict(denoiser="unet"), dict(stfe="transformer")])
def test_mixed_precision_keeps_messages_in_float32(flags):
    model = small(**flags)
    frames, x_t, t = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(frames, x_t, t)[0]
    assert low.isfinite().all()
    low.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())
    close(low, model(frames, x_t, t)[0], 0.1)
    if not flags:
        with torch.autocast("cpu", torch.bfloat16):
            assert model.pdd.blocks[0].mol(torch.randn(1, 15, 32).bfloat16()).dtype == torch.float32


def test_network_takes_any_skeleton_and_larger_crops():
    for name in SKELETONS:
        model = small(name, height=96, width=80)
        frames, x_t, t = inputs(model, 1)
        assert model(frames, x_t, t)[0].shape == (1, model.skeleton.num_keypoints, 24, 20)


# ------------------------------------------------------------------------------------------ start weights


def spell(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    """A ViT under ViTPose's names (4 × 3 patches) → another spelling of the same weights."""
    tables = dict(mae=[(r"^backbone\.", "")], vitpose=[], mmpose=[
        (r"patch_embed\.proj", "patch_embed.projection"), (r"blocks\.(\d+)\.norm(\d)", r"layers.\1.ln\2"),
        (r"blocks\.(\d+)\.mlp\.fc1", r"layers.\1.ffn.layers.0.0"),
        (r"blocks\.(\d+)\.mlp\.fc2", r"layers.\1.ffn.layers.1"),
        (r"blocks\.", "layers."), (r"last_norm", "ln1")], transformers=[
        (r"pos_embed", "embeddings.position_embeddings"),
        (r"patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"blocks\.(\d+)\.norm1", r"encoder.layer.\1.layernorm_before"),
        (r"blocks\.(\d+)\.norm2", r"encoder.layer.\1.layernorm_after"),
        (r"blocks\.(\d+)\.attn\.proj", r"encoder.layer.\1.attention.output.dense"),
        (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layer.\1.attention.attention.qkv"),
        (r"blocks\.", "encoder.layer."), (r"last_norm", "layernorm")])
    state = weights.rename({f"backbone.{name}": value.clone() for name, value in state.items()}, tables[how])
    if how == "mae":
        state |= {"cls_token": torch.ones(1, 1, 32), "norm.weight": state.pop("last_norm.weight") + 1,
                  "norm.bias": state.pop("last_norm.bias") + 1}
    if how == "mmpose":                                                          # class slot left out there
        state["backbone.pos_embed"] = state["backbone.pos_embed"][:, 1:]
        state["head.final_layer.bias"] = torch.ones(17)
    for name in [name for name in state if ".attention.attention.qkv." in name]:
        for part, rows in zip(("query", "key", "value"), state.pop(name).chunk(3)):
            state[name.replace("qkv", part)] = rows
    return state


@pytest.mark.parametrize("how", ["vitpose", "mmpose", "transformers", "mae"])
def test_start_weights_in_four_spellings(how, tmp_path, capsys):
    source, model = small(depth=2), small(depth=2)
    source.backbone.pos_embed.data[:, 0] = 0                                     # what mmpose's files lack
    if how == "mae":                                                             # has another norm at the end
        source.backbone.last_norm.reset_parameters()
    place = "model" if how == "mae" else "state_dict"
    torch.save({place: spell(source.backbone.state_dict(), how)}, tmp_path / "w.pth")
    before = {name: value.clone() for name, value in model.stfe.state_dict().items()}
    dp.load_init(model, str(tmp_path / "w.pth"))
    image = torch.randn(1, 3, 64, 48)
    assert torch.equal(model.backbone(image), source.backbone(image))
    assert all(torch.equal(value, before[name]) for name, value in model.stfe.state_dict().items())
    said = capsys.readouterr().out
    assert "start weights from" in said and ("head.final_layer.bias" in said) == (how == "mmpose")


@pytest.mark.parametrize("cells, grid", [(192, (16, 12)), (432, (24, 18)), (196, (14, 14)), (12, (4, 3)),
                                         (256, (16, 16)), (0, None), (-1, None), (191, None)])
def test_grid_of_a_table_by_its_length(cells, grid):
    assert vit.grid_of(cells) == grid


def test_start_weights_fit_another_crop(tmp_path, capsys):
    source, model = small(), small(height=96, width=80)
    torch.save({f"backbone.{name}": value for name, value in source.backbone.state_dict().items()}, tmp_path / "w.pth")
    dp.load_init(model, str(tmp_path / "w.pth"))
    want = vit.resize_positions(source.backbone.pos_embed, (4, 3), (6, 5))
    assert torch.equal(model.backbone.pos_embed, want) and "4x3 → 6x5" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["vitpose", "mmpose"])
def test_start_weights_of_the_same_grid_fit_whatever_its_shape(how, tmp_path):
    source, model = small(height=80, width=64), small(height=80, width=64)
    source.backbone.pos_embed.data[:, 0] = 0                                     # what mmpose's files lack
    torch.save(spell(source.backbone.state_dict(), how), tmp_path / "w.pth")
    dp.load_init(model, str(tmp_path / "w.pth"))
    assert torch.equal(model.backbone.pos_embed, source.backbone.pos_embed)


def spoil(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    if how == "experts":
        state["backbone.blocks.0.mlp.experts.0.weight"] = torch.ones(8, 128)
    elif how in state:
        del state[how]
    elif how == "table":
        state["backbone.pos_embed"] = state["backbone.pos_embed"][:, :11]
    elif how == "no table":
        del state["backbone.pos_embed"]
    elif how == "classifier":
        state = {name.removeprefix("backbone."): value for name, value in state.items()}
        state["head.weight"] = torch.ones(9, 32)
    elif how == "foreign":
        state = {"conv1.weight": torch.ones(3)}
    elif how == "query alone":
        state = spell({name.removeprefix("backbone."): value for name, value in state.items()}, "transformers")
        del state["backbone.encoder.layer.0.attention.attention.key.weight"]
    return state


@pytest.mark.parametrize("how, words", dict(
    experts="ViTPose+", table="table of positions", foreign="table of positions", classifier="backbone.head.weight",
    **{"no table": "table of positions", "query alone": "attn.qkv.weight",
       "backbone.blocks.0.attn.proj.bias": "attn.proj.bias", "backbone.last_norm.bias": "last_norm.bias"}).items())
def test_start_weights_that_do_not_fit_are_refused_in_one_line(how, words, tmp_path):
    model = small()
    state = {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    torch.save(spoil(state, how), tmp_path / "w.pth")
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        dp.load_init(model, str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)


def test_start_weights_that_are_not_there_say_where_to_get_them():
    with pytest.raises(UserError, match="no start weights nowhere/vitpose_small.pth.*data/README.md"):
        dp.load_init(small(), "nowhere/vitpose_small.pth")
    with pytest.raises(UserError, match="did you mean vitpose-base"):
        dp.load_init(small(), "vitpose-basis")


def test_a_number_of_heads_that_the_weights_were_not_trained_with_is_refused():
    cfg = replace(dp.PRESETS["s"], vit_heads=6)
    with pytest.raises(UserError, match="12 heads"):
        dp.convert_official({"backbone.pos_embed": torch.ones(1, 193, 384)}, cfg)
    dp.convert_official({"backbone.pos_embed": torch.ones(1, 193, 384)}, dp.PRESETS["s"])


def test_weights_of_ours_are_recognised_and_load_whole(tmp_path):
    source, model = small("coco", patch_weight=1.0), small("coco")
    torch.save({"ema": Ema(source, 0.9, 0).state_dict()}, tmp_path / "w.pth")             # as a run's last.pt has it
    dp.load_init(model, str(tmp_path / "w.pth"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters()))        # its patches' head last
    assert dp.recognise(dp.build("tiny", "coco").state_dict()) == ("tiny", 17)
    with torch.device("meta"):
        assert dp.recognise(dp.build("b").state_dict()) == ("b", 15)
    assert dp.recognise({"backbone.pos_embed": torch.ones(1)}) is None and dp.recognise(small().state_dict()) is None
