"""Start weights of another keypoint set: what is carried over row by row, for every method; and --val_share."""
import contextlib
import importlib
import json
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from common.cli import parse, resolve
from common.errors import UserError
from common.ranks import init_ranks
from common.skeletons import COCO, SKELETONS, rows_in, skeleton_from_category
from common.splits import open_splits, split_off
from common.weights import read_start, save_checkpoint
from tests.helpers import TINY, assert_equal

SMALL = dict(
    detrpose=dict(size=64, levels=1, dim=32, heads=4, layers=2, decoder_ffn=32, encoder_ffn=32, queries=6, dn_queries=2),
    diffusionregpose=dict(queries=4, box_queries=8, layers=2), querypose=dict(queries=4),
    diffusionpose=dict(dim=32, depth=1, vit_heads=2, heads=2, stfe_layers=1, decoder_layers=1, height=64, width=48),
    sdpose=dict(channels=16, head_dim=8, groups=4, vae_channels=4))
METHODS = list(SMALL)
EIGHT = ["left_wrist", "RightWrist", "neck", "head_top", "left_hip", "hip_right", "nose", "l_ankle"]     # ours
FROM = {"left_wrist": 9, "RightWrist": 10, "left_hip": 11, "hip_right": 12, "nose": 0, "l_ankle": 15}    # COCO's


def keypoint_set(names: list[str]):
    with contextlib.redirect_stdout(None):
        return skeleton_from_category(dict(name="mine", keypoints=names, skeleton=[]))


def build(method: str, skeleton="coco", seed: int = 0, **overrides):
    """A small model without a zero in it: heads that start at zero would agree whatever the rows."""
    module = importlib.import_module(method)
    torch.manual_seed(seed)
    model = module.build("tiny", skeleton, **SMALL[method] | overrides)
    for parameter in model.parameters():
        if parameter.ndim > 1 or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return module, model.eval()


def save_run(method: str, model, path):
    save_checkpoint(path, dict(method=method, preset="tiny", config=vars(model.cfg), skeleton=model.skeleton.to_dict(),
                               model=model.state_dict()))
    return str(path)


def rows(method: str, state: dict, skeleton) -> dict[str, list[torch.Tensor]]:
    """By tensor, its blocks in the order of the keypoints, each written out by hand from the file's own equations."""
    K = skeleton.num_keypoints
    if method == "detrpose":
        first = {f"lqe{i}": [state[f"decoder.lqe_heads.{i}.mlp.layers.0.weight"][:, 5 * k:5 * k + 5] for k in range(K)]
                 for i in range(2)}
        pose = [state["selection.pose.layers.3.weight"][2 * k:2 * k + 2] for k in range(K)]
        return first | dict(pose=pose, bias=[state["selection.pose.layers.3.bias"][2 * k:2 * k + 2] for k in range(K)],
                            content=[*state["keypoint_content.weight"]], noisy=[*state["noisy_keypoint.weight"]],
                            maps=[state["heatmaps.head.weight"][4 * k:4 * k + 4] for k in range(K)])
    if method == "diffusionregpose":
        return dict(content=[*state["decoder.keypoint_content.weight"]], size=[*state["decoder.keypoint_size.weight"]],
                    maps=[state["heatmaps.head.bias"][4 * k:4 * k + 4] for k in range(K)])
    if method == "diffusionpose":
        return dict(tokens=[state["stfe.keypoint_tokens"][:, k] for k in range(K)], place=[*state["pdd.pos_embed"]],
                    maps=[state["patches.head.weight"][16 * k:16 * k + 16] for k in range(K)])
    if method == "sdpose":
        return dict(head=[*state["decoder.final_layer.weight"]], bias=[*state["decoder.final_layer.bias"]])
    parts = importlib.import_module(method).keypoint_parts(skeleton, "c")
    where = {k: (i, j) for i, part in enumerate(parts) for j, k in enumerate(part)}
    return {f"{layer}{kind}": [state[f"keypoint_stages.1.heads.{where[k][0]}.{layer}.{kind}"][2 * where[k][1]:][:2]
                               for k in range(K)] for layer in ("coordinates", "sigmas") for kind in ("weight", "bias")}


def shared_names(module) -> list[str]:
    """Patterns of the names that depend on keypoints, from the file itself."""
    tables = [getattr(module, name, {}) for name in ("KEYPOINT_ROWS", "JOINT_ROWS", "PART_ROWS", "PART_LAYERS")]
    return [*(pattern for table in tables for pattern in table), "^decoder.final_layer"]


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_carried_over_by_the_names_of_the_keypoints(method, tmp_path, capsys):
    module, source = build(method)
    skeleton = keypoint_set(EIGHT)
    _, model = build(method, skeleton, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module.load_init(model, save_run(method, source, tmp_path / "best.pt"))
    after, given = model.state_dict(), source.state_dict()
    theirs, new, ours = rows(method, given, COCO), rows(method, before, skeleton), rows(method, after, skeleton)
    for what, blocks in ours.items():
        for k, name in enumerate(EIGHT):
            want = theirs[what][FROM[name]] if name in FROM else new[what][k]
            assert torch.equal(blocks[k], want), f"{what} of {name}"
    same = [name for name in after if name in given and given[name].shape == after[name].shape
            and not any(re.search(p, name)
                        for p in shared_names(module))]
    assert len(same) > 50 and all(torch.equal(after[name], given[name]) for name in same)
    said = capsys.readouterr().out
    assert "the rows of left_wrist, RightWrist, left_hip, hip_right, nose, l_ankle" in said
    assert "the rows of neck, head_top" in said


@torch.no_grad()
def found_by(method: str, model) -> torch.Tensor:
    """What a model says of one random picture, keypoint by keypoint (K, ...); noise goes with a keypoint's name."""
    torch.manual_seed(3)
    noise = partial(torch.Tensor.index_select, index=torch.tensor(rows_in(COCO.keypoints, model.skeleton.keypoints)))
    if method == "detrpose":
        return model(torch.rand(1, 3, 64, 64))["keypoints"].movedim(2, 0)
    if method == "diffusionregpose":
        poses = noise(torch.rand(1, model.cfg.queries, 17, 2), 2)
        return model(torch.randn(1, 3, 64, 64), None, poses, torch.tensor([500]))["keypoints"].movedim(2, 0)
    if method == "querypose":
        finest, boxes = torch.randn(1, model.cfg.dim, 16, 16), torch.tensor([[2.0, 3, 40, 50]])
        person = torch.zeros(1, dtype=torch.long), boxes, torch.randn(1, model.cfg.dim), model.parts[None]
        return torch.cat(model.keypoint_stages[0](finest, *person)[:2], -1)[0]
    if method == "diffusionpose":
        maps, frames = noise(torch.randn(1, 17, *model.cfg.heatmap), 1), torch.randn(1, 3, 3, 64, 48)
        return model.pdd(maps, torch.tensor([500]), *model.encode(frames))[0]
    return model.heatmaps(torch.randn(1, 4, 8, 6))[0]


@pytest.mark.parametrize("method", METHODS)
def test_permuted_names_give_permuted_rows_and_equal_predictions(method, tmp_path):
    # a scan reads DiffusionPose's tokens in their order, which is not the same; its other form does not mind
    more = dict(stfe="transformer") if method == "diffusionpose" else {}
    module, source = build(method, **more)
    order = torch.randperm(17).tolist()
    tree = getattr(module, "TREES", dict(coco=COCO.edges))["coco"]          # the limbs of DiffusionPose's Markov layers
    shuffled = replace(keypoint_set([COCO.keypoints[k] for k in order]),
                       edges=tuple((order.index(a), order.index(b)) for a, b in tree))
    _, model = build(method, shuffled, seed=1, **more)
    module.load_init(model, save_run(method, source, tmp_path / "best.pt"))
    here, there = found_by(method, model), found_by(method, source)
    assert there.std() > 0 and torch.allclose(here, there[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_keypoints_start_bit_equal(method, tmp_path, capsys):
    module, source = build(method)
    _, model = build(method, seed=1)
    (tmp_path / "run").mkdir()
    save_run(method, source, tmp_path / "run" / "best.pt")
    module.load_init(model, str(tmp_path / "run"))
    assert_equal(dict(model.state_dict()), dict(source.state_dict()))
    said = capsys.readouterr().out.split()
    assert said[said.index("mapped") + 1] == said[said.index("new") + 1] == "0"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["nothing in common", "fresh head"])
def test_what_is_not_carried_over_starts_anew(method, how, tmp_path, capsys):
    module, source = build(method)
    skeleton = keypoint_set(["beak", "left_wing", "right_wing", "tail"]) if how == "nothing in common" else COCO
    _, model = build(method, skeleton, seed=1, fresh_head=how == "fresh head")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module.load_init(model, save_run(method, source, tmp_path / "best.pt"))
    for what, blocks in rows(method, model.state_dict(), skeleton).items():
        for block, fresh in zip(blocks, rows(method, before, skeleton)[what]):
            assert torch.equal(block, fresh), what
    name = next(name for name in before if "backbone" in name or name.startswith("unet"))
    assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    said = capsys.readouterr().out.split()
    assert said[said.index("mapped") + 1] == "0" and int(said[said.index("new") + 1]) > 1


@pytest.mark.parametrize("method", METHODS)
def test_a_start_of_another_method_or_size_is_one_line(method, tmp_path):
    module, model = build(method)
    other = METHODS[METHODS.index(method) - 1]
    with pytest.raises(UserError, match=f"is a run of {other}") as caught:
        module.load_init(model, save_run(other, build(other)[1], tmp_path / "other.pt"))
    assert "\n" not in str(caught.value)
    larger = module.build("tiny", "coco", init="")
    before = {name: value.clone() for name, value in larger.state_dict().items()}
    with pytest.raises(UserError, match=r"\(of preset tiny\): the weights do not fit the model") as caught:
        module.load_init(larger, save_run(method, build(method, keypoint_set(EIGHT))[1], tmp_path / "small.pt"))
    assert "\n" not in str(caught.value)
    assert_equal(dict(larger.state_dict()), before)


def test_released_weights_have_the_keypoints_of_their_number(tmp_path):
    torch.save({"anything": torch.zeros(1)}, tmp_path / "w.pth")
    start = read_start(str(tmp_path / "w.pth"), "detrpose")
    mine = keypoint_set(EIGHT)
    for count, name in ((17, "coco"), (14, "crowdpose"), (15, "posetrack"), (133, "wholebody")):
        assert start.skeleton(count, mine) is SKELETONS[name]
    assert start.skeleton(8, mine) is mine
    with pytest.raises(UserError, match="has 9 keypoints"):
        start.skeleton(9, mine)


def test_names_agree_in_any_spelling_and_under_the_names_of_two_data_sets():
    assert rows_in(COCO.keypoints, EIGHT) == [FROM.get(name, -1) for name in EIGHT]
    assert rows_in(SKELETONS["posetrack"].keypoints, ["neck", "head_top", "head"]) == [1, 2, 2]
    assert rows_in(SKELETONS["crowdpose"].keypoints, ["head_top", "neck", "nose"]) == [12, 13, -1]
    assert rows_in(["left_wrist"], ["right_wrist", "wrist", ""]) == [-1, -1, -1]


# ---------------------------------------------------------------- one JSON and a folder

@pytest.fixture
def one_file(puppets_folder, tmp_path):
    """A folder with pictures and the only JSON file, of no known name."""
    source = puppets_folder / "coco" if (puppets_folder / "coco").is_dir() else puppets_folder
    content = json.loads(next(source.glob("annotations/*train*.json")).read_text())
    (tmp_path / "mine" / "images").mkdir(parents=True)
    for image in content["images"]:
        shutil.copy(next(source.rglob(image["file_name"])), tmp_path / "mine" / "images")
    (tmp_path / "mine" / "export.json").write_text(json.dumps(content))
    return tmp_path / "mine"


def config_of(folder, **overrides):
    detrpose = importlib.import_module("detrpose")
    return resolve(detrpose.PRESETS["tiny"], data=str(folder), **overrides)


def ids(data) -> set:
    return {data[i].image_id for i in range(len(data))}


def test_a_share_of_the_pictures_is_held_out_once_and_said(one_file, capsys):
    ranks = init_ranks("cpu")
    train, val = open_splits(config_of(one_file, val_share=0.25), ranks)
    assert len(val) == 6 and len(train) == 18 and not ids(train) & ids(val)
    assert "6 of 24 pictures are held out, drawn with --seed 0" in capsys.readouterr().out
    assert "18 pictures of it for train" in train.report() and "6 pictures of it for val" in val.report()
    again, other = (open_splits(config_of(one_file, val_share=0.25, seed=seed), ranks)[1] for seed in (0, 1))
    assert ids(again) == ids(val) != ids(other)
    assert {image["id"] for image in val.ground_truth()["images"]} == ids(val)


def test_pictures_of_several_ids_are_not_split(one_file):
    content = json.loads((one_file / "export.json").read_text())
    for image in content["images"]:
        image["file_name"] = content["images"][image["id"] % 4]["file_name"]
    (one_file / "export.json").write_text(json.dumps(content))
    train, val = split_off(config_of(one_file, val_share=0.25))
    assert not {data.file_names[n] for data in (train,) for n in data.rows} & {val.file_names[n] for n in val.rows}


def test_without_a_share_a_missing_val_split_says_what_helps(one_file):
    with pytest.raises(UserError, match="--val_share 0.1"):
        open_splits(config_of(one_file), init_ranks("cpu"))
    with pytest.raises(UserError, match="expected a number from 0 to 0.9"):
        config_of(one_file, val_share=1.0)


def test_a_split_of_its_own_is_taken_before_the_share(puppets_folder, capsys):
    train, val = open_splits(config_of(puppets_folder, val_share=0.5), init_ranks("cpu"))
    assert len(train) == 24 and len(val) == 8 and "--val_share is not needed" in capsys.readouterr().out


# ---------------------------------------------------------------- the command line

def test_a_run_starts_another_on_own_keypoints_and_eval_takes_the_pictures_held_out(one_file, tmp_path, monkeypatch, capsys):
    def command(module: str, *words: str) -> str:
        monkeypatch.setattr("sys.argv", [module, *words])
        capsys.readouterr()
        importlib.import_module(module).main()
        return capsys.readouterr().out

    flags = ["--train", "--data", str(one_file), "--val_share", "0.25", "--epochs", "1", "--batch", "6", *TINY]
    command("detrpose", *flags, "--out", str(tmp_path / "first"))
    content = json.loads((one_file / "export.json").read_text())
    content["categories"][0].update(keypoints=EIGHT, skeleton=[])
    for person in content["annotations"]:
        person["keypoints"] = person["keypoints"][:24]
    (one_file / "export.json").write_text(json.dumps(content))
    said = command("detrpose", *flags, "--init", str(tmp_path / "first"), "--out", str(tmp_path / "second"))
    assert f"start weights from {tmp_path / 'first' / 'best.pt'}" in said and "the rows of neck, head_top" in said
    said = command("eval", str(tmp_path / "second"), "--out", str(tmp_path / "table"))
    assert "6 pictures of it for val" in said and "6 images in" in said


def test_five_presets_take_a_run_as_start_without_further_flags(tmp_path):
    """--init is the only flag that the command line needs; that of SDPose keeps the VAE of the file learning."""
    for method in METHODS:
        module = importlib.import_module(method)
        config, _ = parse(module.Config, module.PRESETS, "", ["--init", str(tmp_path / "run")])
        assert config.init == str(tmp_path / "run")
    assert config.vae_along


def test_the_first_pose_head_of_diffusionregpose_is_shared_by_14_keypoints_alone(tmp_path):
    """As released, models of 14 keypoints have no coarse head: it starts as the first pose head, or is left out."""
    module, shared = build("diffusionregpose", "crowdpose", coarse_head="released")
    _, own = build("diffusionregpose", keypoint_set(EIGHT), seed=1, coarse_head="released")
    module.load_init(own, save_run("diffusionregpose", shared, tmp_path / "shared.pt"))
    decoder = own.decoder
    assert_equal(dict(decoder.coarse_head.state_dict()), dict(decoder.pose_heads[0].state_dict()))
    assert_equal(dict(decoder.pose_heads[0].state_dict()), dict(shared.decoder.pose_heads[0].state_dict()))
    module.load_init(shared, save_run("diffusionregpose", own, tmp_path / "own.pt"))


def test_all_of_diffusionpose_learns_on_keypoints_without_limbs():
    """A parameter without a gradient would keep several processes waiting for it."""
    module, model = build("diffusionpose", keypoint_set(EIGHT))
    layer = model.pdd.blocks[0].mol
    h = torch.randn(2, 8, 32)
    out = layer(h)
    out.sum().backward()
    assert torch.equal(out, h) and all(p.grad is not None for p in layer.parameters())
