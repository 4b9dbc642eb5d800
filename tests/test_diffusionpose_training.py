"""DiffusionPose's clips, losses, decoding, training and evaluation. Reference cases by file pattern."""
import importlib
import json
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusionpose as dp
from common import posetrack, transforms
from common.boxes import NOBODY, people_to_learn, read_boxes, true_boxes
from common.cli import parse, resolve
from common.errors import UserError
from common.ranks import Ranks, seed_all
from common.records import Sample
from common.run import RunFolder
from common.splits import open_dataset
from common.skeletons import COCO, POSETRACK, SKELETONS
from data import puppets
from tests.helpers import golden
from tests.test_diffusionpose import SMALL, read, small

TRAIN = dict(workers=0, processes=1, batch=6, eval_batch=8, warmup=2, drop_epochs="", eval_every=1, sigma=1.0)
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    counts = {"train": 2, "val": 1}
    return puppets.make(tmp_path_factory.mktemp("clips"), "video", size=64, workers=1, progress=False, counts=counts)


def config(**overrides) -> dp.Config:
    return resolve(dp.PRESETS["tiny"], **SMALL | TRAIN | overrides)


# ---------------------------------------------------------------- losses

@golden("diffusionpose/golden_markov_*.npz")
def test_markov_loss_its_terms_and_gradients(file):
    meta, case = read(file)
    tree, visible = tuple(map(tuple, meta["edges"])), case["visible"]
    pred, target = case["pred"].requires_grad_(), case["target"]
    xy, true = dp.soft_argmax(pred), dp.soft_argmax(target)
    for name, value in (("pred_xy", xy), ("target_xy", true)):
        assert torch.allclose(value, case[name], rtol=0, atol=1e-9)
    length, angle = dp.markov_loss(xy, true, visible, tree)
    assert torch.allclose(length, case["length_term"], atol=1e-9) and torch.allclose(angle, case["angle_term"], atol=1e-9)
    total, heat = (length + angle).mean(), dp.heatmap_loss(pred, target, visible)
    assert total.item() == pytest.approx(case["total"].item(), abs=1e-9)
    assert heat.item() == pytest.approx(case["heatmap_loss"].item(), abs=1e-9)
    for value, name in ((total, "grad_pred"), (heat, "grad_pred_heatmap_loss")):
        assert torch.allclose(torch.autograd.grad(value, pred)[0], case[name], atol=1e-9)
    centres = sorted([o, *sorted((a, b))] for o, a, b, _, _ in dp.limb_pairs(tree))
    assert centres == sorted(meta["pairs_centre_a_b"])


def test_markov_loss_is_zero_at_the_truth_and_does_not_change_in_a_mirror():
    tree, flip = dp.limbs(POSETRACK), list(POSETRACK.flip)
    pred, true, visible = 20 * torch.rand(4, 15, 2), 20 * torch.rand(4, 15, 2), (torch.rand(4, 15) > 0.2).float()
    for term in dp.markov_loss(true, true, visible, tree):
        assert term.abs().max() < 1e-6
    mirror = torch.tensor([-1.0, 1.0])
    for a, b in zip(dp.markov_loss(pred, true, visible, tree),
                    dp.markov_loss(pred[:, flip] * mirror, true[:, flip] * mirror, visible[:, flip], tree)):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("labelled", [(), (5, 7), range(15)])
@pytest.mark.parametrize("collapsed", [False, True])
def test_markov_loss_of_hardly_anything_is_finite_with_a_finite_gradient(labelled, collapsed):
    visible = torch.zeros(2, 15)
    visible[:, list(labelled)] = 1
    pred = (torch.zeros(2, 15, 2) if collapsed else 50 * torch.rand(2, 15, 2)).requires_grad_()
    length, angle = dp.markov_loss(pred, 10 * torch.rand(2, 15, 2), visible, dp.limbs(POSETRACK))
    (length + angle).sum().backward()
    assert length.isfinite().all() and pred.grad.isfinite().all()
    if len(labelled) < 3:
        assert not length.any() and not angle.any() and not pred.grad.any()


def test_markov_loss_of_limbs_that_share_no_joint_is_their_lengths():
    pred, true = (10 * torch.rand(2, 4, 2)).requires_grad_(), 10 * torch.rand(2, 4, 2)
    length, angle = dp.markov_loss(pred, true, torch.ones(2, 4), ((0, 1), (2, 3)))
    assert (length > 0).all() and not angle.any()
    maps = torch.rand(2, 4, 8, 6, requires_grad=True)
    for tree, terms in (((0, 1), (2, 3)), {"heat", "markov"}), (((0, 1),), {"heat"}), ((), {"heat"}):
        assert dp.criterion(maps, torch.rand(2, 4, 8, 6), torch.ones(2, 4), tree, 0.1).keys() == terms


def test_gradients_of_the_losses_are_right():
    tree, visible = dp.limbs(POSETRACK), (torch.rand(2, 15) > 0.2).double()
    true, pred = 8 * torch.rand(2, 15, 2).double(), (8 * torch.rand(2, 15, 2).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda xy: dp.markov_loss(xy, true, visible, tree), pred)
    maps = torch.rand(1, 2, 4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(dp.soft_argmax, maps)


def test_unlabelled_joints_have_no_target_and_no_loss():
    visible = torch.tensor([[1.0, 0.0]])
    target = dp.target_heatmaps(torch.tensor([[[3.0, 2.0], [1.0, 1.0]]]), visible, (8, 6), 1.0)
    assert target[0, 0, 2, 3] == 1 and not target[0, 1].any()
    pred = torch.rand_like(target).requires_grad_()
    dp.criterion(pred, target, visible, ((0, 1),), 0.1)["heat"].backward()
    assert pred.grad[0, 0].any() and not pred.grad[0, 1].any()
    assert dp.heatmap_loss(pred, target, 0 * visible).item() == 0


# ---------------------------------------------------------------- crops, targets, decoding

@golden("diffusionpose/golden_crop*.npz")
def test_crops_targets_and_decoding(file):
    meta, case = read(file)
    (w, h), size = meta["out_wh"], tuple(meta["heatmap_wh"][::-1])
    cfg = config(width=w, height=h)
    for record in meta["records"]:
        x, y, bw, bh = record["box_xywh"]
        centre, window = transforms.fit_box(np.array([x, y, x + bw, y + bh]), w / h, meta["enlarge"])
        matrix = transforms.crop_matrix(centre, window[0], (w, h), record["rotation_deg"])
        assert centre == pytest.approx(record["center"]) and window == pytest.approx(record["size_wh"], abs=1e-4)
        assert matrix == pytest.approx(np.array(record["matrix"]), abs=1e-4)
        joints = transforms.move_points(np.array(record["joints_image"]), matrix)
        assert joints == pytest.approx(np.array(record["joints_crop"]), abs=1e-4)
        assert transforms.move_points(joints, transforms.invert(matrix)) == pytest.approx(np.array(record["joints_image"]))
        if not record["rotation_deg"] and meta["enlarge"] == dp.MARGIN:
            assert dp.box_matrix([x, y, x + bw, y + bh], cfg) == pytest.approx(matrix)
    joints = case["joints_used"][None, :, :2] / dp.STRIDE
    targets = dp.target_heatmaps(joints, torch.ones(joints.shape[:2]), size, meta["sigma"])[0]
    assert torch.allclose(targets.float(), case["target_subpixel"], atol=1e-6)
    cells, peaks = dp.decode(case["pred_heatmaps"][None])
    back = transforms.invert(np.array(meta["records"][0]["matrix"]))
    assert transforms.move_points(dp.STRIDE * cells[0].numpy(), back) == pytest.approx(case["decoded_image_xy"].numpy(), abs=1e-3)
    assert peaks[0].numpy() == pytest.approx(case["decoded_score"].numpy(), abs=1e-6)
    image = case["image"].round().byte().numpy()
    crop = transforms.warp_affine(image, np.array(meta["records"][-1]["matrix"]), (w, h))
    assert np.abs(crop - case["crop"].numpy()).max() < 1.1           # the picture was rounded before, the crop after


def test_decoding_finds_a_joint_to_a_quarter_of_a_cell_and_nothing_where_nothing_is():
    xy = torch.rand(5, 15, 2) * torch.tensor([16.0, 24.0]) + 3
    cells, peaks = dp.decode(dp.target_heatmaps(xy, torch.ones(5, 15), (32, 24), 1.5))
    assert (cells - xy).abs().max() <= 0.26 and (peaks > 0.7).all()
    assert not dp.decode(-torch.rand(1, 2, 32, 24))[0].any()
    rim = torch.zeros(1, 1, 32, 24)
    rim[0, 0, 31, 5], rim[0, 0, 31, 6] = 1, 0.5
    assert dp.decode(rim)[0].tolist() == [[[5, 31]]]                 # both axes or none


def dotted(size: tuple[int, int], xy, shift: float) -> Image.Image:
    """Black, with a white dot per point, moved right."""
    y, x = np.mgrid[:size[1], :size[0]]
    dots = sum(np.exp(-((x - px - shift) ** 2 + (y - py) ** 2) / 8) for px, py in xy)
    return Image.fromarray((255 * dots.clip(0, 1)).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("epoch", range(8))
def test_augmented_joints_lie_where_the_picture_shows_them_in_all_three_frames(epoch):
    """The same draw for all frames: the joints of the neighbours are those of the key frame, moved by the matrix."""
    rng, size = np.random.default_rng(epoch), (90, 80)
    joints = np.c_[rng.uniform(30, 60, (15, 2)), np.full(15, 2)]
    frames = [dotted(size, joints[4:5, :2], shift) for shift in (-6, 0, 6)]
    sample = Sample(frames[1], 1, size, joints[None].astype(np.float32), np.float32([[20, 20, 70, 70]]), np.ones(1),
                    np.zeros(1, bool), frames=(frames[0], frames[2]))
    matrix, mirrored = dp.augment(joints, sample.boxes[0], size[0], POSETRACK, config(), rng)
    clip = dp.cut_clip(dp.clip_of(sample), matrix, config())
    for frame, shift in zip(clip, (-6, 0, 6)):
        xy = transforms.move_points(joints[4, :2] + [shift, 0], matrix)
        if (xy > 4).all() and (xy < (44, 60)).all():
            bright = frame[0].float()
            bright = bright / bright.sum()
            centre = np.array([(bright.sum(0) @ torch.arange(48.0)).item(), (bright.sum(1) @ torch.arange(64.0)).item()])
            assert np.abs(centre - xy).max() < 0.6
    assert (np.linalg.det(matrix[:, :2]) < 0) == mirrored


class OnePerson:
    """A dataset of one picture, which the training set reads like any other."""

    skeleton = POSETRACK

    def __init__(self, sample: Sample):
        self.sample = sample

    def load(self, i: int):
        return (self.sample, "") if self.sample else (None, "broken")


def test_joints_swap_sides_in_a_mirror_and_vanish_beyond_the_crop():
    size, joints = (60, 80), np.c_[RNG.uniform(10, 50, (15, 2)), np.full(15, 2)].astype(np.float32)
    joints[13] = 500, 40, 2                                          # far outside
    sample = Sample(Image.new("RGB", size), 1, size, joints[None], np.float32([[5, 5, 55, 75]]), np.ones(1), np.zeros(1, bool))
    for epoch in range(6):
        data = dp.TrainClips(OnePerson(sample), np.array([[0, 0]]), config(), epoch)
        clip, placed, image_id, _ = data[0]
        rng = np.random.default_rng([0, epoch, 0])
        matrix, mirrored = dp.augment(joints.astype(float), sample.boxes[0], size[0], POSETRACK, config(), rng)
        assert clip.shape == (3, 3, 64, 48) and clip.dtype == torch.uint8 and set(placed[:, 2].tolist()) <= {0, 1}
        for j in range(15):
            xy = transforms.move_points(joints[j, :2].astype(float), matrix)
            inside = (xy >= 0).all() and (xy < (48, 64)).all()
            expected = [*xy, 1] if inside else [0, 0, 0]
            assert placed[POSETRACK.flip[j] if mirrored else j].tolist() == pytest.approx(expected, abs=1e-3)
    with pytest.raises(UserError, match="none of the images can be read, e.g. broken"):
        dp.TrainClips(OnePerson(None), np.array([[0, 0]]), config(), 0)[0]


RNG = np.random.default_rng(1)


def test_without_neighbours_and_for_stills_the_key_frame_stands_three_times():
    colours = [Image.new("RGB", (40, 40), (value, value, value)) for value in (50, 100, 150)]
    clip = Sample(colours[1], 1, (40, 40), *[np.zeros(0)] * 4, frames=(colours[0], colours[2]))
    still = Sample(colours[1], 1, (40, 40), *[np.zeros(0)] * 4)
    matrix = dp.box_matrix([5, 5, 35, 35], config())
    cuts = (clip, config()), (still, config()), (clip, config(neighbours=False))
    middle = [dp.cut_clip(dp.clip_of(sample), matrix, cfg)[:, 0, 32, 24].tolist() for sample, cfg in cuts]
    assert middle == [[50, 100, 150], [100] * 3, [100] * 3]


def test_a_box_beyond_the_image_or_without_size_still_gives_a_crop():
    picture = Sample(Image.new("RGB", (40, 40), (9, 9, 9)), 1, (40, 40), *[np.zeros(0)] * 4)
    for box in ([30, 30, 70, 90], [39, 39, 39, 39], [-50, -50, -20, -20]):
        crop = dp.cut_box(picture, np.array(box, float), config())
        assert crop.shape == (3, 3, 64, 48) and (box[0] >= 0) == bool(crop.any())


def test_halves_of_a_body_lie_above_or_below_the_waist():
    joints = np.c_[np.arange(15.0), np.arange(15.0), np.full(15, 2)]
    boxes = [tuple(transforms.half_body(joints, POSETRACK, np.random.default_rng(seed))) for seed in range(50)]
    assert set(boxes) == {(0, 0, 8, 8), (9, 9, 14, 14)} and 25 < boxes.count((0, 0, 8, 8)) < 45
    joints[0] = -27, 0, 2                                            # around the mean of the joints
    boxes = {tuple(transforms.half_body(joints, POSETRACK, np.random.default_rng(seed))) for seed in range(20)}
    assert (-16.5, 0, 18.5, 8) in boxes


def test_half_a_body_with_too_few_joints_gives_way_to_the_other_half():
    joints = np.c_[np.arange(15.0), np.arange(15.0), np.full(15, 2)]
    joints[11:, 2] = 0                                               # of the lower half the hips alone
    boxes = {tuple(transforms.half_body(joints, POSETRACK, np.random.default_rng(seed))) for seed in range(20)}
    assert boxes == {(0, 0, 8, 8)}
    joints[2:, 2] = 0
    assert all(transforms.half_body(joints, POSETRACK, np.random.default_rng(seed)) is None for seed in range(5))


# ---------------------------------------------------------------- prediction

def test_scores_do_not_depend_on_the_batch_and_the_seed_is_the_box(clips):
    data, model = open_dataset(str(clips), "val"), small().eval()
    one, eight = (dp.evaluate(model, data, config(eval_batch=n), ALONE) for n in (1, 8))
    assert one[0] == pytest.approx(eight[0], nan_ok=True)
    for a, b in zip(one[1], eight[1], strict=True):
        assert a.image_id == b.image_id and np.allclose(a.keypoint_scores, b.keypoint_scores, atol=1e-4)
    noise = dp.noise_for(np.float64([[1, 2, 3, 4], [5, 6, 7, 8]]), model)
    assert torch.equal(noise[1:], dp.noise_for(np.float64([[5, 6, 7, 8]]), model)) and not torch.equal(noise[0], noise[1])


def test_pictures_of_any_size_are_predicted_as_the_dataset_is(clips):
    data, model = open_dataset(str(clips), "val"), small().eval()
    sample, _ = data.load(4)
    boxes = true_boxes(data)
    expected = next(p for p in dp.evaluate(model, data, config(), ALONE)[1] if p.image_id == sample.image_id)
    clip = (sample.frames[0], sample.image, sample.frames[1])
    found = dp.predict(model, dp.to_batch([clip], [sample.image_id], model.cfg, [boxes.of(sample.image_id)]))[0]
    assert np.allclose(found.keypoints, expected.keypoints, atol=1e-3) and np.allclose(found.scores, expected.scores, atol=1e-5)
    alone = dp.predict(model, dp.to_batch([Image.new("L", (7, 300)).convert("RGB")], ["x"], model.cfg))[0]
    assert alone.keypoints.shape == (1, 15, 2) and alone.boxes.tolist() == [[0, 0, 7, 300]]
    nobody = dp.predict(model, dp.to_batch([clip], ["x"], model.cfg, [NOBODY]))[0]
    assert nobody.keypoints.shape == (0, 15, 2)


def test_a_perfect_network_gets_nearly_everything_right_with_any_number_of_steps(clips, monkeypatch):
    """The way from a heatmap to the image and the metric, with a network that knows the true maps."""
    data, model = open_dataset(str(clips), "val"), small(steps=3, ensemble=2).eval()
    truth = {}
    for i in range(len(data)):
        sample = data[i]
        for joints, box in zip(sample.keypoints, true_boxes(data).of(sample.image_id)[0]):
            xy = transforms.move_points(joints[:, :2].astype(float), dp.box_matrix(box, model.cfg)) / dp.STRIDE
            truth[box.tobytes()] = dp.target_heatmaps(torch.tensor(xy)[None], torch.ones(1, 15), model.cfg.heatmap, 1.0)[0]
    asked = []
    monkeypatch.setattr(dp, "noise_for", lambda boxes, model: asked.append(boxes) or torch.zeros(len(boxes), *model.noise_shape))
    monkeypatch.setattr(model, "denoise", lambda *_: torch.stack([truth[box.tobytes()] for box in asked[-1]]).float())
    table, _ = dp.evaluate(model, data, config(), ALONE)
    assert table["Mean"] > 95 and len(asked) > 1


def test_weak_detections_are_left_out_of_posetrack_and_counted(clips, tmp_path, capsys):
    data, model = open_dataset(str(clips), "val"), small().eval()
    image_id = data[3].image_id
    boxes = [dict(image_id=image_id, bbox=[5, 5, 30, 40], score=score) for score in (0.9, 0.1)]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    _, found = dp.evaluate(model, data, config(), ALONE, read_boxes(str(tmp_path / "boxes.json"), data))
    people = {p.image_id: len(p.scores) for p in found}
    assert people.pop(image_id) == 1 and not any(people.values())
    assert "1 of 2 person boxes left out: their score is below 0.2" in capsys.readouterr().out


def test_mirroring_the_clip_as_a_test_averages_and_keeps_sides_apart():
    model = small(flip_test=True).eval()
    crops, boxes = torch.randint(0, 256, (2, 3, 3, 64, 48), dtype=torch.uint8), np.array([[0, 0, 9, 9], [1, 1, 5, 5]])
    noise, flip = dp.noise_for(boxes, model), list(POSETRACK.flip)
    with torch.no_grad():
        plain = model.sample(transforms.normalise(crops / 255), noise)
        other = model.sample(transforms.normalise(crops / 255).flip(-1), noise.flip(-1)[..., flip, :, :]).flip(-1)[:, flip]
    mean = dp.find_heatmaps(model, crops, boxes)
    assert torch.allclose(mean[..., 1:], (plain[..., 1:] + other[..., :-1]) / 2, atol=1e-5)


# ---------------------------------------------------------------- training

def test_the_ablation_of_a_frame_and_every_flag_are_settings():
    assert not config(neighbours=False).neighbours and dp.PRESETS["b"].epochs == 20
    for flags in (dict(batch=5, accum=2), dict(sigma=0.0), dict(schedule="linear"), dict(amp="fp8"), dict(lr=-1.0)):
        with pytest.raises(UserError):
            config(**flags)


def losses_of(model: dp.DiffusionPose, clips: torch.Tensor, joints: torch.Tensor, alpha: float) -> dict:
    """The loss terms of clips (B, 3, 3, H, W) uint8 and joints (B, J, 3), as a training step has them."""
    cfg, visible = model.cfg, joints[..., 2]
    target = dp.target_heatmaps(joints[..., :2] / dp.STRIDE, visible, cfg.heatmap, cfg.sigma)
    t = torch.randint(dp.TIMES, (len(clips),))
    x_t = dp.q_sample(target, t, torch.randn_like(target), visible, cfg.signal_scale)
    pred, _ = model(transforms.normalise(clips / 255), x_t, t)
    return dp.criterion(pred, target, visible, dp.limbs(model.skeleton), alpha)


ROWS = sorted({row.puppets for table in dp.TABLES.values() for row in table.rows if row.puppets is not None})


@pytest.mark.parametrize("flags", ROWS)
def test_every_row_of_the_tables_is_a_command_that_trains_a_step(flags):
    """Through the parser; only a row with the Markov loss has its term."""
    size = [word for name, value in SMALL.items() for word in (f"--{name}", str(value)) if value != ""]
    cfg, _ = parse(dp.Config, dp.PRESETS, "", ["--train", *size, *flags.split()])
    model, joints = dp.DiffusionPose(cfg, POSETRACK), torch.rand(2, 15, 3) * 40
    optimizer, before = dp.build_optimizer(model, cfg), {name: p.clone() for name, p in model.named_parameters()}
    joints[..., 2] = 1
    losses = losses_of(model, torch.randint(0, 256, (2, 3, 3, 64, 48), dtype=torch.uint8), joints, cfg.alpha)
    sum(losses.values()).backward()
    optimizer.step()
    assert ("markov" in losses) == ("--alpha 0" not in flags)
    assert not torch.equal(before["backbone.patch_embed.proj.weight"], model.backbone.patch_embed.proj.weight)


def test_the_tables_have_all_rows_of_the_ablations_and_what_is_one_row_in_two_tables_is_one_command():
    rows = {number: table.rows for number, table in dp.TABLES.items()}
    assert {number: len(rows[number]) for number in "567"} == {"5": 4, "6": 3, "7": 5} and len(ROWS) == 8
    assert rows["5"][1].flags == rows["7"][0].flags and rows["5"][2].flags == rows["6"][0].flags
    for number in "567":
        assert rows[number][-1].default and rows[number][-1].flags == rows[number][-1].puppets == ""
        assert all(row.flags == row.puppets for row in rows[number])
    assert [row.figure for number in "123" for row in rows[number]] == [87.8, 85.4, 85.1]
    assert all(row.missing and row.puppets is None for row in rows["4"])


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    model = small()
    optimizer = dp.build_optimizer(model, config(lr=1e-3, lr_backbone=1e-4))
    names = {id(p): name for name, p in model.named_parameters()}
    seen = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = names[id(p)]
            assert group["initial_lr"] == (1e-4 if name.startswith("backbone.") else 1e-3)
            plain = name.endswith((".bias", "A_log", ".D", "pos_embed", "tokens", "frame_embed")) or "norm" in name
            assert (group["weight_decay"] == 0) == plain, name


def test_the_learning_rate_warms_up_and_drops():
    cfg = config(warmup=10, drop_epochs="16", schedule="constant")
    assert [dp.lr_scale(step, 100, 0, cfg) for step in (0, 4, 9, 50)] == pytest.approx([0.1, 0.5, 1, 1])
    assert dp.lr_scale(50, 100, 16, cfg) == pytest.approx(0.1)
    assert dp.lr_scale(50, 100, 0, config(schedule="cosine", warmup=0)) == pytest.approx(0.5)


def test_a_tiny_model_learns_two_clips_and_tells_them_apart_in_pure_noise(clips):
    data = open_dataset(str(clips), "train").training()
    model, people = dp.build("tiny", "posetrack", **SMALL | dict(sigma=2.0)), people_to_learn(data)[[0, -1]]
    boxes, known = np.stack([data[i].boxes[p] for i, p in people]), [data[i].keypoints[p] for i, p in people]
    clip = torch.stack([dp.cut_box(data.load(i)[0], box, model.cfg) for (i, _), box in zip(people, boxes)])
    joints = torch.tensor(np.stack([np.c_[transforms.move_points(k[:, :2], dp.box_matrix(box, model.cfg)), k[:, 2] > 0]
                                    for k, box in zip(known, boxes)])).float()
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3, weight_decay=0)
    for step in range(120):
        seed_all(0, step)
        optimizer.zero_grad()
        sum(losses_of(model, clip, joints, 0.1 * (step > 20)).values()).backward()
        optimizer.step()
    visible = joints[..., 2]
    true = dp.target_heatmaps(joints[..., :2] / dp.STRIDE, visible, model.cfg.heatmap, 2.0)
    blank = dp.heatmap_loss(0 * true, true, visible)
    found, exchanged = (dp.find_heatmaps(model.eval(), frames, boxes) for frames in (clip, clip.flip(0)))
    assert dp.heatmap_loss(found, true, visible) < 0.3 * blank
    assert dp.heatmap_loss(exchanged, true.flip(0), visible.flip(0)) < 0.3 * blank     # a mean pose is not enough


def train(data: Path, out: Path, *flags) -> dict:
    """Two short epochs; the checkpoint at the end."""
    words = flags if "--resume" in flags else (
        "--train", *[word for name, value in (SMALL | TRAIN).items() for word in (f"--{name}", str(value)) if value != ""],
        "--epochs", "2", "--batch", "2", "--accum", "2", "--device", "cpu", "--data", str(data), "--out", str(out), *flags)
    dp.train(*parse(dp.Config, dp.PRESETS, "", list(words)))
    return torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole_run(clips, tmp_path_factory) -> Path:
    """The folder of a run that was never cut."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(clips, folder)
    for number, handler in before.items():
        signal.signal(number, handler)
    return folder


def test_a_run_that_is_cut_and_resumed_ends_with_the_same_bits(clips, whole_run, tmp_path, monkeypatch):
    losses, calls = dp.criterion, []

    def cut(*args):
        calls.append(0)
        if len(calls) == 3:                                          # a micro-batch of the second of three steps
            signal.raise_signal(signal.SIGTERM)
        return losses(*args)

    monkeypatch.setattr(dp, "criterion", cut)
    monkeypatch.setattr(RunFolder, "draw", lambda *args: None)
    with suppress(KeyboardInterrupt):
        train(clips, tmp_path / "run")
    monkeypatch.setattr(dp, "criterion", losses)
    expected = torch.load(whole_run / "last.pt", weights_only=True)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (saved["step"], saved["done"], saved["epoch"], expected["step"]) == (2, 2, 0, 6)
    after = train(clips, tmp_path / "run", "--resume", str(tmp_path / "run"))
    assert after["step"] == expected["step"]
    for part in ("model", "ema"):
        assert all(torch.equal(value, after[part][name]) for name, value in expected[part].items())


def test_a_run_leaves_a_checkpoint_that_eval_understands(clips, whole_run, tmp_path, monkeypatch, capsys):
    assert {"predictions.png", "curves.png", "best.pt"} <= {path.name for path in whole_run.iterdir()}
    rows = [json.loads(row) for row in (whole_run / "log.jsonl").read_text().splitlines()]
    assert {"Head", "Ankle", "Mean", "Hidden"} <= rows[-1].keys()
    folder = tmp_path / "clip"
    shutil.copytree(next((clips / "images/val").iterdir()), folder)
    (folder / "000003.jpg").write_bytes(b"no picture")
    for path in sorted(folder.iterdir())[5:] + sorted(folder.iterdir())[:2]:
        path.unlink()
    evaluation = importlib.import_module("eval")
    for words in [], ["--images", str(folder), "--gif", "--process", "--threshold", "-9"]:
        monkeypatch.setattr(sys, "argv", ["eval.py", str(whole_run), *words, "--device", "cpu", "--out", str(tmp_path / "out")])
        evaluation.main()
    printed = capsys.readouterr().out
    assert "Shoulder" in printed and "annotated (ground truth)" in printed and "1 could not be read" in printed
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"all.gif", "000002.png", "000004_steps.gif", "000004_markov.png", "results.json"} <= drawn


def test_without_an_average_the_weights_themselves_are_evaluated_and_kept(clips, tmp_path, monkeypatch):
    evaluated, evaluate = [], dp.evaluate
    monkeypatch.setattr(dp, "evaluate", lambda model, *rest: evaluated.append(model.state_dict()) or evaluate(model, *rest))
    saved = train(clips, tmp_path / "run", "--ema", "0", "--epochs", "1")
    assert "ema" not in saved and len(evaluated) == 1
    assert all(torch.equal(value, evaluated[0][name]) for name, value in saved["model"].items())
    _, model, _ = importlib.import_module("eval").load_model(str(tmp_path / "run"), "", "")
    assert all(torch.equal(value, saved["model"][name]) for name, value in model.state_dict().items())


def test_stills_of_coco_are_clips_that_stand_still(puppets_folder):
    data = open_dataset(str(puppets_folder), "val")
    table, found = dp.evaluate(small("coco").eval(), data, config(), ALONE)
    assert {"AP", "AR"} <= table.keys() and len(found) == len(data) and data.skeleton == COCO
    clip, joints, *_ = dp.TrainClips(data.training(), people_to_learn(data.training()), config(), 0)[0]
    assert torch.equal(clip[0], clip[1]) and torch.equal(clip[1], clip[2]) and joints.shape == (17, 3)


def test_puppets_are_clips_for_this_method(monkeypatch, clips):
    monkeypatch.setattr(puppets, "make", lambda root, part: clips if part == "video" else pytest.fail(part))
    data, held_out = dp.open_clips(config(data="puppets"), ALONE)
    assert data.name == "puppets" and isinstance(held_out, posetrack.PoseTrackDataset) and data.skeleton == SKELETONS["posetrack"]


def test_a_loss_that_is_not_finite_stops_with_its_name_and_the_images(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(dp, "heatmap_loss", lambda *args: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(UserError, match=r"heat not finite at step 0, images \["):
        train(clips, tmp_path / "run")
