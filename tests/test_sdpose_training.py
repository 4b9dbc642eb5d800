"""SDPose's crops, codec, losses, evaluation and training, against the released code's numbers and by themselves."""
import argparse
import importlib
import json
import math
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sdpose as sd
from common import metrics
from common.boxes import NOBODY, boxes_of, detect, read_boxes, true_boxes, whole_image
from common.cli import parse, resolve, run_main
from common.datasets import keypoint_fields, keypoints_of
from common.errors import UserError
from common.ranks import Ranks
from common.records import Prediction
from common.splits import open_dataset
from common.skeletons import get_skeleton
from data import puppets
from tests.helpers import assert_equal, close, golden, normal, read_case
from tests.test_sdpose import case_crops, check, inputs, manifest_config, reference_model, write_release

COCO = get_skeleton("coco")
ALONE = Ranks(0, 1, torch.device("cpu"))


def config(meta: dict, **changes) -> sd.Config:
    """The crop size and the sigma of a case, and the sizes of its manifest where it has a model."""
    height, width = meta.get("image_size", (1024, 768))
    sizes = manifest_config(meta["manifest"]) if "manifest" in meta else sd.PRESETS["body"]
    return replace(sizes, height=height, width=width, sigma=float(meta.get("sigma", 6)), **changes)


def in_crop(places: torch.Tensor, cfg: sd.Config) -> torch.Tensor:
    """The official 'input space': fractions of the map times W and H, not W - 1 and H - 1."""
    return places * torch.tensor([cfg.width, cfg.height])


# ------------------------------------------------------------------------------------------ crops


@golden("sdpose/golden_affine*.npz")
def test_crop_geometry_equals_the_release(file):
    case, meta = read_case(file)
    cfg = config(meta)
    center, size = sd.box_region(case["bbox_xyxy"].astype(float))
    close(center, case["center"], 1e-4)
    close(size, case["scale_padded"], 1e-4)
    size = sd.fix_aspect(size, cfg)
    close(size, case["scale_fixed"], 1e-4)
    for i, degrees in enumerate(case["rotation"]):
        matrix = sd.udp_matrix(center[i], size[i], cfg, float(degrees))
        close(matrix, case["warp_matrix"][i], 1e-3)
        close(case["keypoints"][i] @ matrix[:, :2].T + matrix[:, 2], case["keypoints_warped"][i], 2e-3)
    places = case["decoded_input_space"] / (cfg.width, cfg.height)
    close(places * size[:, None] + (center - size / 2)[:, None], case["decoded_image_space"], 1e-3)


@golden("sdpose/golden_affine*.npz")
def test_mirroring_and_half_bodies_equal_the_release(file, monkeypatch):
    case, _ = read_case(file)
    for i, visible in enumerate(case["keypoints_visible"]):
        keypoints = np.c_[case["keypoints"][i], visible]
        _, mirrored, center = sd.mirror(np.zeros((480, 640, 3)), keypoints, case["center"][i], COCO.flip)
        close(mirrored[:, :2], case["flipped_keypoints"][i], 1e-4)
        assert (mirrored[:, 2] == case["flipped_visible"][i]).all()
        close(center, case["flipped_center"][i], 1e-4)
        for half, draw in ("upper", 0.0), ("lower", 0.9):
            rng = type("Fixed", (), dict(random=lambda self, draw=draw: draw))()
            center, size = sd.half_body(keypoints, COCO, rng)
            close(center, case[f"halfbody_{half}_center"][i], 1e-3)
            close(size, case[f"halfbody_{half}_scale"][i], 1e-3)


def test_half_bodies_of_133_keypoints_leave_face_and_hands_out():
    assert sd.halves(COCO) == [list(range(11)), list(range(11, 17))]
    assert sd.halves(get_skeleton("wholebody")) == [list(range(11)), list(range(11, 23))]


def test_half_a_body_is_the_one_half_that_has_enough_labels():
    keypoints = np.c_[np.random.rand(17, 2), np.ones(17)]
    keypoints[13:, 2] = 0                                           # hips alone: the lower half has two of three
    upper = keypoints[:11, :2].mean(0)
    for seed in range(10):
        close(sd.half_body(keypoints, COCO, np.random.default_rng(seed))[0], upper, 1e-12)


def test_few_labels_have_no_half_body():
    keypoints = np.c_[np.random.rand(17, 2), np.ones(17)]
    keypoints[8:, 2] = 0
    assert sd.half_body(keypoints, COCO, np.random.default_rng(0)) is None


@golden("sdpose/golden_pipeline*.npz")
def test_crops_equal_the_release_but_for_its_rounding(file):
    case, meta = read_case(file)
    cfg = config(meta)
    center, size = sd.box_region(case["bbox_xyxy"].astype(float))
    size = sd.fix_aspect(size, cfg)
    close(np.c_[center, size], case["center_scale"], 1e-3)
    if "image" in case:
        for box, matrix, crop, c, s in zip(case["bbox_xyxy"], case["warp_matrix"], case["crops"], center, size):
            close(sd.udp_matrix(c, s, cfg), matrix, 1e-3)
            difference = sd.input_crop(Image.fromarray(case["image"]), box, cfg).int() - torch.from_numpy(crop).int()
            assert difference.abs().max() <= 2 and difference.abs().float().mean() < 0.2


def test_a_region_is_never_empty():
    cfg = config({})
    assert (sd.fix_aspect(np.zeros((2, 2)), cfg) >= 1).all()
    assert sd.input_crop(Image.new("RGB", (32, 32), "red"), np.array([5.0, 5, 5, 5]), cfg).shape == (3, 1024, 768)


# ------------------------------------------------------------------------------------------ codec


@golden("sdpose/golden_udp_encode*.npz")
def test_heatmaps_equal_the_release(file):
    case, meta = read_case(file)
    cfg = config(meta)
    maps, weights = sd.udp_encode(*(torch.from_numpy(case[name]) for name in ("keypoints", "keypoints_visible")), cfg)
    check(dict(heatmaps=maps), case, 1e-5)
    close(maps.sum((1, 2)), case["heatmap_sums"], 1e-3)
    close(weights, case["keypoint_weights"], 0)
    places, scores = sd.udp_decode(maps[None])
    seen = ~case["decoded_is_nan"].any(1)
    close(scores[0], case["scores"], 1e-5)
    close(in_crop(places[0], cfg)[seen], case["decoded"][seen], 5e-3)
    assert places.isfinite().all()                           # where the release says NaN


@golden("sdpose/golden_udp_decode*.npz")
def test_decoded_keypoints_equal_the_release(file):
    case, meta = read_case(file)
    cfg = config(meta)
    width, height = cfg.width // 4, cfg.height // 4
    y, x = np.mgrid[:height, :width].astype(np.float64)
    mu = case["peaks"].astype(np.float64) / [(cfg.width - 1) / (width - 1), (cfg.height - 1) / (height - 1)]
    maps = np.exp(-((x - mu[:, :1, None]) ** 2 + (y - mu[:, 1:, None]) ** 2) / (2 * cfg.sigma ** 2))
    noise = normal(f"noise{case['noise_index']}", maps.shape, meta["seed"]).double().numpy()
    maps = maps + 0.01 * noise
    maps[4] = -0.05 - 0.01 * abs(noise[4])
    maps = torch.from_numpy(maps).float()
    close(maps[:, height // 2], case["heatmap_row"], 1e-5)
    places, scores = sd.udp_decode(maps[None])
    close(scores[0], case["scores"], 1e-5)
    stable = case["stable"]
    close(in_crop(places[0], cfg)[stable], case["keypoints"][stable], 1e-3)


@pytest.mark.parametrize("size", [(128, 96), (1024, 768)])
def test_decoding_inverts_encoding(size):
    cfg = config(dict(image_size=size, sigma=size[0] / 1024 * 6 + 0.5))
    margin = 6 * 4 + 4                                       # the 11×11 blur must not reach the border
    keypoints = margin + torch.rand(4, 17, 2) * (torch.tensor(size[::-1]) - 1 - 2 * margin)
    maps, weights = sd.udp_encode(keypoints, torch.ones(4, 17), cfg)
    places, scores = sd.udp_decode(maps)
    close(places * (torch.tensor(size[::-1]) - 1), keypoints, 0.05 * size[0] / 128)
    assert weights.all() and (scores > 0.6).all() and (scores <= 1).all()


def test_a_training_target_has_its_top_where_the_keypoint_is():
    cfg = config(dict(image_size=(128, 96), sigma=2))
    keypoints = torch.tensor([[[95 * 10 / 23, 127 * 20 / 31]]])     # the centre of cell (10, 20)
    maps, weight = sd.udp_encode(keypoints, torch.ones(1, 1), cfg)
    assert maps[0, 0].argmax() == 20 * 24 + 10 and weight.item() == 1
    close(maps[0, 0, 20, 10:13], torch.tensor([0.0, 1, 4]).div(-8).exp(), 1e-6)       # exp(−d² / 2σ²)
    close(maps[0, 0, 23, 14], math.exp(-25 / 8), 1e-6)


def test_heatmaps_that_are_zero_decode_to_one_finite_place():
    places, scores = sd.udp_decode(torch.stack([torch.zeros(1, 32, 24), -torch.ones(1, 32, 24)]))
    assert places.isfinite().all() and scores.tolist() == [[0.0], [-1.0]]
    close(places[0], places[1], 1e-6)


# ------------------------------------------------------------------------------------------ losses


def loss_case(file) -> dict:
    """Inputs of a golden loss: latents are those of `meta`'s model."""
    case, meta = read_case(file)
    image, latent = inputs(meta, len(case["latent_in"]))
    disturbed, (top, bottom, left, right) = image.clone(), case["rect"]
    disturbed[:, :, top:bottom, left:right] = -1
    cfg = config(meta)
    target = sd.udp_encode(torch.from_numpy(case["keypoints"]), torch.from_numpy(case["keypoints_visible"]), cfg)
    return dict(case=case, meta=meta, cfg=cfg, images=(disturbed, image), target=target,
                noise=[normal(f"vae_noise_{name}", latent.shape, meta["seed"]) for name in ("in", "gt")])


@golden("sdpose/golden_loss*.npz")
def test_losses_equal_the_reference(file):
    g = loss_case(file)
    case, model = g["case"], reference_model(g["meta"]["manifest"], g["meta"]["seed"])
    for name, noise in ("", (None, None)), ("_sampled", g["noise"]):
        z_in, z_gt = (model.encode(x, n) for x, n in zip(g["images"], noise))
        output = model(z_in)
        losses = sd.criterion(output, z_gt, *g["target"], g["cfg"])
        if not name:
            check(dict(latent_in=z_in, latent_gt=z_gt, target_heatmaps=g["target"][0]), case, 1e-5)
            close(g["target"][1], case["keypoint_weights"], 0)
            check(dict(pred_heatmaps=output["heatmaps"], pred_rgb_latent=output["latents"]), case, 2e-5)
            close(sum(losses.values()), case["loss_total"], 1e-5)
        for term in "pose", "rgb":
            close(losses[f"loss_{term}"], case[f"loss_{term}{name}"], 1e-5)


@golden("sdpose/golden_loss*.npz")
def test_gradients_and_an_optimiser_step_equal_the_reference(file):
    g = loss_case(file)
    case, facts = g["case"], json.loads(file.with_suffix(".json").read_text())
    reference = reference_model(g["meta"]["manifest"], g["meta"]["seed"])
    model = sd.SDPose(g["cfg"], reference.skeleton)
    model.load_state_dict(reference.state_dict())
    z_in, z_gt = map(model.encode, g["images"])
    sum(sd.criterion(model(z_in), z_gt, *g["target"], g["cfg"]).values()).backward()
    parameters = dict(model.named_parameters())
    for name, theirs in facts["grad_norms"].items():
        close(parameters[name].grad.norm(), theirs, 1e-4 * max(1, theirs), name)
    optimizer = sd.build_optimizer(model, replace(g["cfg"], lr=3e-5, weight_decay=1e-2))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    close(norm, facts["total_grad_norm"], 1e-4 * facts["total_grad_norm"])
    optimizer.step()
    with torch.no_grad():
        losses = sd.criterion(model(z_in), z_gt, *g["target"], g["cfg"])
    for term in "pose", "rgb":
        theirs = float(case[f"loss_{term}_after_step"])
        close(losses[f"loss_{term}"], theirs, 2e-4 * max(1e-2, theirs), term)


def test_the_rgb_loss_does_not_grow_with_latents_that_a_learning_vae_stretches():
    output, latents = dict(heatmaps=torch.zeros(2, 17, 4, 3), latents=torch.randn(2, 4, 2, 2)), torch.randn(2, 4, 2, 2)
    target = torch.zeros(2, 17, 4, 3), torch.ones(2, 17)
    for cfg, same in ((resolve(sd.PRESETS["tiny"], rgb_weight=1.0), True), (sd.PRESETS["body"], False)):
        small, large = (sd.criterion(output | dict(latents=size * output["latents"]), size * latents, *target, cfg)["loss_rgb"]
                        for size in (1.0, 3.0))
        assert (large.item() == pytest.approx(small.item(), rel=1e-5)) == same


def test_the_rgb_loss_of_two_processes_has_the_gradient_of_one(monkeypatch):
    """Each of them divides by the variance of all latents, not by that of its own half."""
    cfg = resolve(sd.PRESETS["tiny"], rgb_weight=1.0)
    answers = torch.randn(4, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    z_rgb = torch.randn(4, 4, 2, 2, dtype=torch.float64) * torch.tensor([1.0, 1, 3, 3])[:, None, None, None] + 1
    target = torch.zeros(4, 17, 4, 3), torch.ones(4, 17)

    def gradient(rows: slice) -> torch.Tensor:
        output = dict(heatmaps=target[0][rows], latents=answers[rows])
        loss = sd.criterion(output, z_rgb[rows], target[0][rows], target[1][rows], cfg)["loss_rgb"]
        return torch.autograd.grad(loss, answers)[0]

    whole, sent = gradient(slice(4)), []
    monkeypatch.setattr(sd, "mean_over_ranks", lambda value: sent.append(value) or value)
    halves = [slice(2), slice(2, 4)]
    for rows in halves:
        gradient(rows)
    monkeypatch.setattr(sd, "mean_over_ranks", lambda value: torch.stack(sent).mean(0))
    close(sum(gradient(rows) for rows in halves) / 2, whole, 1e-5)      # the answers are compared in float32
    assert len(sent) == 2 and not torch.equal(*sent)


def test_blank_labels_give_no_gradient():
    maps = torch.randn(2, 17, 32, 24, requires_grad=True)
    cfg = config(dict(image_size=(128, 96)))
    target, weights = sd.udp_encode(torch.full((2, 17, 2), 40.0), torch.zeros(2, 17), cfg)
    sd.pose_loss(maps, target, weights).backward()
    assert target.abs().max() == 0 and maps.grad.abs().max() == 0


# ------------------------------------------------------------------------------------------ prediction


@golden("sdpose/golden_pipeline*.npz")
def test_predictions_equal_the_release(file, monkeypatch):
    case, meta = read_case(file)
    model = reference_model(meta["manifest"], meta["seed"])
    boxes = case["bbox_xyxy"].astype(float)
    crops, cfg = case_crops(case), config(meta)
    noise = torch.stack([normal(f"vae_noise_{view}", case["latent"].shape, meta["seed"]) for view in ("orig", "flip")], 1)
    monkeypatch.setattr(sd, "sampling_noise", lambda boxes, cfg: noise if cfg.sample else None)
    for name, changes in ("_noflip", dict(flip_test=False)), ("", {}), ("_sampled_latent", dict(sample=True)):
        monkeypatch.setattr(model, "cfg", replace(cfg, **changes))
        xy, scores = sd.poses(model, crops, boxes)
        close(scores, case[f"keypoint_scores{name}"], 2e-5)
        stable = case[f"stable{name}"]
        close(xy[stable], case[f"keypoints{name}"][stable], 0.05)
    check(dict(heatmaps_avg=sd.average_heatmaps(model, sd.normalise(crops))), case, 2e-5)


def test_a_mirrored_crop_mirrors_the_averaged_heatmaps():
    model = sd.build("tiny").eval()
    crops = torch.rand(2, 3, 128, 96) * 2 - 1
    with torch.no_grad():
        plain, mirrored = (sd.average_heatmaps(model, x) for x in (crops, crops.flip(3)))
    close(mirrored.flip(3)[:, list(COCO.flip)], plain, 1e-6)


def test_without_pairs_there_is_no_flip_test():
    model = sd.SDPose(sd.PRESETS["tiny"], replace(COCO, flip=None))
    with torch.no_grad():
        assert sd.average_heatmaps(model, torch.zeros(1, 3, 128, 96)).shape == (1, 17, 32, 24)


def test_sampled_latents_depend_on_the_seed_and_the_box_alone(monkeypatch):
    model, crops, boxes = sd.build("tiny").eval(), torch.randint(256, (3, 3, 128, 96), dtype=torch.uint8), np.eye(3, 4)
    torch.nn.init.normal_(model.decoder.final_layer.weight)
    means = sd.poses(model, crops, boxes)[1]
    assert (sd.poses(model, crops, boxes)[1] == means).all()
    monkeypatch.setattr(model, "cfg", replace(model.cfg, sample=True))
    samples, order = sd.poses(model, crops, boxes)[1], [2, 0, 1]
    assert abs(samples - means).max() > 1e-4 * abs(means).max()
    close(sd.poses(model, crops[order], boxes[order])[1], samples[order], 1e-6)
    close(sd.poses(model, crops[1:2], boxes[1:2])[1], samples[1:2], 1e-6)
    monkeypatch.setattr(model, "cfg", replace(model.cfg, seed=1))
    assert abs(sd.poses(model, crops, boxes)[1] - samples).max() > 1e-4 * abs(means).max()


def test_nobody_in_a_picture_is_an_empty_prediction():
    model, picture = sd.build("tiny").eval(), Image.new("RGB", (64, 48))
    found = sd.predict(model, sd.to_batch([picture, picture], ["a", "b"], model.cfg,
                                          [NOBODY, whole_image(picture.size)]))
    assert [p.keypoints.shape for p in found] == [(0, 17, 2), (1, 17, 2)] and found[0].boxes.shape == (0, 4)


# ------------------------------------------------------------------------------------------ evaluation


class Truth:
    """A dataset that is its ground truth alone."""

    def __init__(self, truth: dict, skeleton):
        self.truth, self.skeleton = truth, skeleton
        self.metric = "wholebody" if skeleton.name == "wholebody" else "coco"

    def ground_truth(self) -> dict:
        return self.truth


@golden("sdpose/golden_eval_*_preds.npz")
@pytest.mark.parametrize("name", ["body", "wholebody"])
def test_rescoring_nms_and_evaluations_equal_the_release(file, name):
    case, preds = file.name.removesuffix("_preds.npz"), np.load(file)
    facts, truth = (json.loads(file.with_name(f"{case}{end}.json").read_text()) for end in ("", "_gt"))
    for person in truth["annotations"] if name == "wholebody" else ():          # whose keypoints are in five fields
        person["keypoints"] = keypoints_of(person, keypoint_fields(name))
    skeleton = get_skeleton("coco" if name == "body" else name)
    model = sd.SDPose(replace(sd.PRESETS["tiny"], height=1024, width=768), skeleton)
    _, unique = np.unique(preds["id"], return_index=True)                # one is there twice
    found, count = [], skeleton.num_keypoints
    for image, kept in facts["kept_after_nms_id_score_area"][name].items():
        rows = unique[preds["img_id"][unique] == int(image)]
        side = preds["bbox_scales"][rows] / 1.25                         # a box whose region is the official one
        people = Prediction(int(image), preds["keypoints"][rows, :count].astype(float),
                            preds["keypoint_scores"][rows, :count], preds["bbox_scores"][rows],
                            np.concatenate([-side / 2, side / 2], 1))
        found.append(sd.finish(people, model))
        close(found[-1].scores, np.array([score for _, score, _ in kept]), 1e-6)
        assert [int(np.argmin(abs(preds["keypoints"][rows, :count] - xy).sum((1, 2)))) for xy in found[-1].keypoints] == \
            [int(np.flatnonzero(preds["id"][rows] == number)[0]) for number, _, _ in kept]
    table, stats = metrics.evaluate(found, Truth(truth, skeleton)), facts["results"][name]["all"]
    order = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
    close([table[key] for key in order], stats["keypoints" if name == "body" else "keypoints_wholebody"], 1e-9)
    for part in ("body", "foot", "face", "lefthand", "righthand") if name == "wholebody" else ():
        close(table[f"AP_{part}"], stats[f"keypoints_{part}"][0], 1e-9)


# ------------------------------------------------------------------------------------------ boxes


@pytest.fixture(scope="module")
def data(puppets_folder):
    return open_dataset(str(puppets_folder), "val")


def write(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_true_boxes_are_those_of_labelled_people(data):
    boxes = true_boxes(data)
    assert boxes.total() == int(((data.keypoints[..., 2] > 0).any(1) & ~data.iscrowd).sum())
    assert "ground truth" in str(boxes)


def test_boxes_of_a_file_reach_their_images_and_bad_ones_are_counted(data, tmp_path):
    image = data[0].image_id
    row = dict(image_id=image, category_id=1, bbox=[2, 3, 20, 30], score=0.5)
    rows = [row, row | dict(category_id=7), row | dict(bbox=[500, 3, 20, 30]), row | dict(bbox=[5, 3, 0, 30]),
            row | dict(image_id=424242), row | dict(bbox="none"), 7]
    boxes = read_boxes(write(tmp_path / "b.json", rows), data)
    close(boxes.of(image)[0], [[2.0, 3, 22, 33]], 0)
    close(boxes.of(image)[1], [0.5], 1e-6)
    assert "1 of other images" in str(boxes) and "2 outside of their image" in str(boxes)
    assert boxes.of(data[1].image_id)[0].shape == (0, 4)


@pytest.mark.parametrize("content, says", [
    ([dict(image_id=424242, bbox=[1, 2, 3, 4], score=1)], "none of them is in"), ([], "holds no person boxes"),
    (dict(images=[]), "holds no person boxes"), ("not a list", "holds no person boxes")])
def test_a_box_file_for_something_else_is_one_line(data, tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        read_boxes(write(tmp_path / "b.json", content), data)


def test_a_box_file_that_is_missing_or_cut_off_is_one_line(data, tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_boxes(str(tmp_path / "none.json"), data)
    (tmp_path / "cut.json").write_text('[{"image_id": 1')
    with pytest.raises(UserError, match="not complete JSON"):
        read_boxes(str(tmp_path / "cut.json"), data)


def test_keypoints_of_a_detector_become_boxes():
    xy = np.array([[[10.0, 10], [30, 50]], [[1, 1], [2, 2]], [[900, 900], [950, 950]]])
    found = Prediction(1, xy, np.ones((3, 2)), np.array([0.9, 0.1, 0.9]))
    boxes, scores = boxes_of(found, 0.3, (100, 100))
    close(boxes, [[7.0, 4, 33, 56]], 1e-9)
    close(scores, [0.9], 1e-6)


# ------------------------------------------------------------------------------------------ augmentation


def test_augmented_keypoints_stay_on_what_they_mark():
    """Coloured dots in the image are under their keypoints in the clean crop."""
    image, rng = np.zeros((200, 240, 3), np.uint8), np.random.default_rng(0)
    keypoints = np.c_[rng.uniform([60, 40], [180, 160], (17, 2)).round(), np.full(17, 2)]
    y, x = np.mgrid[:200, :240]
    for u, v, _ in keypoints:
        image[(x - u) ** 2 + (y - v) ** 2 <= 16] = 200
    cfg, checked = replace(sd.PRESETS["tiny"], half_body=0.3, scaling=0.3, rotation=80.0, rectangle=1.0), 0
    for seed in range(20):
        crop, clean, moved = sd.augment(image, np.array([50.0, 30, 190, 170]), keypoints, COCO, cfg,
                                        np.random.default_rng(seed))
        assert crop.shape == clean.shape == (128, 96, 3) and crop.dtype == clean.dtype == np.uint8
        inside = ((moved[:, :2] >= 0) & (moved[:, :2] <= (95, 127))).all(1)
        u, v = moved[inside, :2].round().astype(int).T
        shade = clean[v, u].max(-1).astype(int)
        checked += len(shade)
        assert (shade > np.median(clean.max(-1)) + 20).mean() > 0.95
        assert (crop == 0).all(-1).sum() >= 0.03 * 128 * 96          # the black rectangle
    assert checked > 150


def test_what_happens_to_a_person_depends_on_seed_epoch_and_number_alone(data):
    people = sd.people_to_learn(data, 0, 0)
    cfg = replace(sd.PRESETS["tiny"], rgb_weight=1.0)                  # with the clean crop, the RGB branch's target
    first, again, later = (sd.TrainCrops(data, people, cfg, epoch)[3] for epoch in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[0], later[0])
    assert first[0].shape == (2, 3, 128, 96) and first[0].dtype == torch.uint8


def test_crops_without_enough_keypoints_give_way(data):
    people = sd.people_to_learn(data, 0, 0)
    cfg = replace(sd.PRESETS["tiny"], target="input")
    for n in range(10):
        crops, keypoints, _, skipped = sd.TrainCrops(data, people, cfg, 0)[n]
        assert crops.shape[0] == 1 and not skipped
        assert sd.udp_encode(keypoints[:, :2], keypoints[:, 2], cfg)[1].sum() >= 3


def test_an_image_that_cannot_be_read_gives_way_and_is_named(puppets_folder, tmp_path):
    folder = tmp_path / "puppets"
    shutil.copytree(puppets_folder, folder)
    data = open_dataset(str(folder), "val")
    broken = data[0].image
    broken.write_bytes(b"nothing")
    people = sd.people_to_learn(data, 0, 0)
    _, _, image_id, skipped = sd.TrainCrops(data, people, sd.PRESETS["tiny"], 0)[0]
    assert image_id != data[0].image_id and broken.name in skipped[0]
    model = sd.build("tiny", **TINIER).eval()
    table, found = sd.evaluate(model, data, model.cfg, ALONE)
    assert len(found) == len(data) and len(found[0].scores) == 0 and data.bad


# ------------------------------------------------------------------------------------------ training

SMALL = ("--train --channels 8 --head_dim 8 --vae_channels 4 --height 64 --width 48 --workers 0 --processes 1 "
         "--batch 8 --people 16 --eval_batch 16 --no-vae_along --cache_views 1 --eval_every 9 --no-flip_test").split()
TINIER = dict(channels=16, head_dim=16, vae_channels=8, height=64, width=48, workers=0)


def train(folder, out, *words):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sd.train(*parse(sd.Config, sd.PRESETS, "", [*SMALL, "--data", str(folder), "--out", str(out), *words]))
    for number, handler in before.items():
        signal.signal(number, handler)
    return torch.load(out / "last.pt", weights_only=True)


def step_losses(model: sd.SDPose, crops: torch.Tensor, keypoints: torch.Tensor) -> dict:
    """The losses of a training step, as in sd.train."""
    z_input, z_rgb = sd.training_latents(model, crops)
    output = model(z_input, model.cfg.rgb_weight > 0)
    return sd.criterion(output, z_rgb, *sd.udp_encode(keypoints[..., :2], keypoints[..., 2], model.cfg), model.cfg)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(puppets_folder, tmp_path):
    constant, cut = ("--schedule", "constant"), tmp_path / "cut"        # a cosine would depend on the number of epochs
    whole = train(puppets_folder, tmp_path / "whole", "--epochs", "2", *constant)
    assert train(puppets_folder, cut, "--epochs", "1", *constant)["step"] == 2
    resumed = train(puppets_folder, cut, "--epochs", "2", "--resume", str(cut))
    assert whole["step"] == resumed["step"] == 4
    assert_equal(whole["model"], resumed["model"])


def test_a_loss_that_overflows_in_half_precision_costs_a_step_and_not_the_run(puppets_folder, tmp_path, monkeypatch):
    real, scaler, calls = sd.criterion, torch.amp.GradScaler, []

    def overflows_once(*args) -> dict:
        calls.append(len(calls))
        return {name: loss * (math.inf if len(calls) == 1 else 1.0) for name, loss in real(*args).items()}

    monkeypatch.setattr(sd, "criterion", overflows_once)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, enabled=True))   # as on a GPU
    saved = train(puppets_folder, tmp_path / "run", "--epochs", "1")
    assert saved["step"] == len(calls) == 2 and saved["scaler"]["scale"] == 2 ** 15          # half of its first
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_a_cache_gives_what_encoding_on_the_fly_gives(data):
    model, people = sd.build("tiny", **TINIER).eval(), sd.people_to_learn(data, 4, 0)
    crops_of = partial(sd.TrainCrops, data, people, model.cfg)
    folder = type("Folder", (), dict(bad_files=lambda self, messages: None))()
    cfg = replace(model.cfg, workers=0, eval_batch=3, vae_along=False, cache_views=2)
    encoded = sd.encode_once(model, crops_of, cfg, ALONE, folder)
    view, cached = crops_of(0), encoded(0)
    assert len(cached) == len(view) == 4 and encoded(2) is cached and encoded(1) is not cached
    for n in range(4):
        crops, keypoints, image_id, _ = view[n]
        close(cached[n][0], sd.crop_posteriors(model, crops), 1e-5)
        assert torch.equal(cached[n][1], keypoints) and cached[n][2] == image_id


def test_a_random_vae_gets_latents_of_deviation_one_and_learns_along_with_the_pose_branch_alone(data):
    model = sd.build("tiny", **TINIER, rgb_weight=0.0)
    crops = sd.TrainCrops(data, sd.people_to_learn(data, 0, 0), replace(model.cfg, rgb_weight=1.0), 0)
    sd.choose_trainable(model, model.cfg)
    sd.unit_latents(model, crops)
    batch, keypoints, *_ = zip(*(crops[n] for n in range(8)))
    batch, keypoints = torch.stack(batch), torch.stack(keypoints)
    assert 0.7 < model.encode(sd.normalise(batch[:, 0])).std() < 1.4
    gradients = []
    for weight in (0.0, 1.0):                                   # the RGB branch must not reach the VAE
        model.cfg = replace(model.cfg, rgb_weight=weight)
        model.zero_grad()
        torch.manual_seed(0)
        sum(step_losses(model, batch[:, :1 + int(weight)], keypoints).values()).backward()
        gradients.append(model.vae.encoder.conv_in.weight.grad)
    assert gradients[0].abs().sum() > 0 and model.vae.decoder.conv_in.weight.grad is None


@pytest.mark.slow
def test_both_branches_learn_in_a_few_steps(data):
    torch.manual_seed(0)
    model = sd.build("tiny", **TINIER, rgb_weight=1.0)
    view = sd.TrainCrops(data, sd.people_to_learn(data, 0, 0), model.cfg, 0)
    crops, keypoints, *_ = zip(*(view[n] for n in range(4)))
    encoded = sd.crop_posteriors(model, torch.cat(crops)).unflatten(0, (4, -1))
    batch = encoded, torch.stack(keypoints)
    optimizer, history = sd.build_optimizer(model, model.cfg), []
    for _ in range(60):
        torch.manual_seed(0)
        losses = step_losses(model, *batch)
        history.append({name: value.item() for name, value in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert history[-1]["loss_pose"] < 0.6 * history[0]["loss_pose"]
    assert history[-1]["loss_rgb"] < 0.1 * history[0]["loss_rgb"]


def test_without_the_rgb_branch_nothing_behind_the_tap_learns():
    model = sd.build("tiny", rgb_weight=0.0, tap=2)
    sd.choose_trainable(model, model.cfg)
    crops = torch.zeros(2, 1, 3, 128, 96, dtype=torch.uint8)
    sum(step_losses(model, crops, torch.full((2, 17, 3), 40.0)).values()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_the_summary_counts_what_a_training_changes(monkeypatch):
    cfg = sd.PRESETS["tiny"]
    monkeypatch.setattr(sd, "PRESETS", dict(tiny=cfg))
    model = sd.build("tiny")
    sd.choose_trainable(model, cfg)                             # with the VAE's encoder, without the RGB branch's end
    assert f" {sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.2f} M " in sd.summary()


@pytest.mark.parametrize("words, says", [
    ("--target mean", "choose from"), ("--scaling 1.5", "0.9"), ("--batch 7 --accum 2", "does not split"),
    ("--cache_views 2", "leave out --cache_views")])
def test_flags_that_no_run_could_use_are_one_line(words, says):
    with pytest.raises(UserError, match=says):
        parse(sd.Config, sd.PRESETS, "", words.split())


def test_a_vae_that_learns_along_is_not_that_of_stable_diffusion():
    args = argparse.Namespace(device="cpu", saved=None)
    with pytest.raises(UserError, match="leave out --init"):
        sd.train(resolve(sd.PRESETS["tiny"], init="some"), args)


# ------------------------------------------------------------------------------------------ eval.py


@pytest.fixture(scope="module")
def run_folder(puppets_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(puppets_folder, folder, "--epochs", "1", "--people", "8", "--eval_every", "1")
    return folder


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """call(words...) → (exit code, what was printed, results.json) of eval.py."""
    evaluation = importlib.import_module("eval")

    def run_it(*words):
        words = [*map(str, words), "--out", str(tmp_path / "drawn"), "--workers", "0"]
        monkeypatch.setattr(sys, "argv", ["eval.py", *words])
        try:
            run_main(evaluation.main)
            code = 0
        except SystemExit as end:
            code = end.code
        captured, results = capsys.readouterr(), tmp_path / "drawn" / "results.json"
        return code, captured.out + captured.err, json.loads(results.read_text()) if results.exists() else None
    return run_it


def test_evaluation_says_which_boxes_it_used(run_folder, call, data, tmp_path):
    code, text, results = call(run_folder)
    assert code == 0 and "person boxes: annotated" in text and results
    name = write(tmp_path / "b.json", [dict(image_id=data[0].image_id, category_id=1, bbox=[5, 5, 30, 50], score=0.9)])
    code, text, results = call(run_folder, "--boxes", name)
    assert code == 0 and f"person boxes: {name} (1 of 8 images), 1 people" in text and len(results) == 1


def test_pictures_take_boxes_of_a_file_or_the_whole_image(run_folder, call, data, tmp_path):
    code, text, results = call(run_folder, "--images", data[0].image, "--process")
    assert code == 0 and "as a whole is taken for one person" in text and len(results) == 1
    drawn = {path.stem.rsplit("_", 1)[-1] for path in (tmp_path / "drawn").glob("*.png")}
    assert "heatmaps" in drawn and "rgb" not in drawn, "the RGB branch of this run has learned nothing"
    box = dict(image_id=data[0].image.name, bbox=[5, 5, 30, 50], score=0.9)
    name = write(tmp_path / "b.json", [box, box | dict(bbox=[500, 5, 30, 50])])
    code, text, results = call(run_folder, "--images", data[0].image, "--boxes", name)
    assert code == 0 and "1 boxes left out" in text and len(results) == 1
    code, text, _ = call(run_folder, "--images", data[1].image, "--boxes", name)
    assert code == 2 and "for none of the pictures" in text


@pytest.mark.parametrize("rgb_weight", [0.0, 0.1])
def test_pictures_say_whether_the_rgb_branch_was_trained(rgb_weight, monkeypatch):
    said, model = [], sd.build("tiny", **TINIER, rgb_weight=rgb_weight).eval()
    monkeypatch.setattr(sd.draw, "captioned", lambda image, text: said.append(text) or image)
    shown = sd.show_process(model, Image.new("RGB", (48, 64)), 0.5)
    assert list(shown) == ["heatmaps", "rgb"][:len(said)] and len(said) == 1 + (rgb_weight > 0)
    assert ("never trained" in said[0]) == (rgb_weight == 0)


def test_boxes_and_detectors_that_make_no_sense_are_one_line(run_folder, call, data, tmp_path):
    code, text, _ = call(run_folder, "--images", data[0].image, "--detector", run_folder)
    assert code == 2 and "needs boxes itself" in text
    code, text, _ = call(run_folder, "--boxes", "a.json", "--detector", "b.pt")
    assert code == 2 and "give one of them" in text


def test_a_detector_says_where_people_are(data):
    def find(picture, image_id):
        xy = np.array([[[10.0, 10], [30, 40]]])
        return Prediction(image_id, xy, np.ones((1, 2)), np.array([0.8]))
    boxes = detect(find, data, ALONE, "detrpose-l")
    assert boxes.total() == len(data) and "found by detrpose-l" in str(boxes)


def one_line(answer: tuple, says: str) -> None:
    """Exit code 2 and an error of one line that says so."""
    code, text, _ = answer
    assert code == 2 and [line.startswith("error: ") for line in text.splitlines()].count(True) == 1, text
    assert "Traceback" not in text and says in text.splitlines()[-1], text


@pytest.fixture
def release(tmp_path):
    """The tiny preset as a release's folder, half precision."""
    torch.manual_seed(0)
    state = {name: value.half() for name, value in sd.build("tiny").state_dict().items() if name != "text"}
    return write_release(tmp_path / "release", state)


def test_a_release_of_half_precision_draws_people_on_a_cpu(release, call, data):
    code, text, results = call(release, "--images", data[0].image, "--device", "cpu")
    assert code == 0 and "preset tiny, 17 keypoints" in text and len(results) == 1


@pytest.mark.parametrize("part", ["unet", "vae", "decoder"])
def test_a_missing_or_truncated_file_of_a_release_ends_eval_in_one_line(release, call, part):
    file = sd.release_file(release, part)
    file.write_bytes(file.read_bytes()[:-10])
    one_line(call(release, "--data", "puppets"), "cut short")
    file.unlink()
    one_line(call(release, "--data", "puppets"), f"has no {part}/{file.name}")
    file.parent.rmdir()
    one_line(call(release, "--data", "puppets"), f"has no {part}/{file.name}")


def test_a_wholebody_head_with_a_body_preset_ends_eval_in_one_line(release, call):
    wide = dict(conv_in=torch.zeros(320, 4, 3, 3)), {"final_layer.weight": torch.zeros(133, 640, 1, 1)}
    save_file({"conv_in.weight": wide[0]["conv_in"]}, sd.release_file(release, "unet"))
    save_file(wide[1], sd.release_file(release, "decoder"))
    one_line(call(release, "--preset", "body", "--data", "puppets"), "preset wholebody, not body")


@pytest.mark.parametrize("rows, says", [
    ([], "holds no person boxes"), ([dict(image_id=424242, bbox=[1, 2, 3, 4], score=1)], "none of them is in")])
def test_box_files_of_nobody_or_of_other_images_end_eval_in_one_line(run_folder, call, tmp_path, rows, says):
    one_line(call(run_folder, "--boxes", write(tmp_path / "b.json", rows)), says)


def test_boxes_outside_of_the_image_leave_nobody(run_folder, call, data, tmp_path):
    row = dict(image_id=data[0].image_id, bbox=[500, 500, 30, 50], score=0.9)
    code, text, results = call(run_folder, "--boxes", write(tmp_path / "b.json", [row]))
    assert code == 0 and results == [] and "1 outside of their image" in text


@pytest.mark.parametrize("rgb_weight, shown", [(0.0, {"heatmaps"}), (0.1, {"heatmaps", "rgb"})])
def test_the_process_shows_the_rgb_branch_where_it_was_trained(data, rgb_weight, shown):
    model = sd.build("tiny", **TINIER, rgb_weight=rgb_weight).eval()
    assert sd.show_process(model, data.load(0)[0].image, 0.3).keys() == shown


def test_metrics_of_unseen_styles_are_logged_and_the_other_processes_wait_for_the_pictures(monkeypatch, tmp_path):
    done, rows = [], []
    folder = SimpleNamespace(path=tmp_path, log=lambda **row: rows.append(row))
    run = SimpleNamespace(ranks=ALONE, folder=folder, step=7, at=dict(epoch=2), held_out=SimpleNamespace(skeleton=COCO))
    monkeypatch.setattr(sd, "open_dataset", lambda data, split, skeleton: split)
    monkeypatch.setattr(sd, "evaluate", lambda *args: (dict(AP=0.25, AR=0.5), []))
    monkeypatch.setattr(sd, "show_styles", lambda *args: done.append("drawn") or Image.new("RGB", (2, 2)))
    monkeypatch.setattr(sd, "say", lambda text: done.append("said"))
    monkeypatch.setattr(sd, "wait_for_all", lambda: done.append("waited"))
    sd.compare_styles(sd.build("tiny", **TINIER), dict(AP=0.5, AR=0.75), run)
    assert rows == [dict(step=7, epoch=2, AP_ood=0.25, AR_ood=0.5)]
    assert done == ["said", "drawn", "waited"] and (tmp_path / "styles.png").exists()


def test_styles_show_the_same_people(run_folder, data):
    pictures = puppets.restyle(0)
    assert len(pictures) == 4 and {picture.size for picture in pictures} == {(puppets.SIZE,) * 2}
    sheet = sd.show_styles(sd.build("tiny", **TINIER).eval(), data, rows=2)
    assert sheet.width > 5 * puppets.SIZE and sheet.height > 2 * puppets.SIZE
