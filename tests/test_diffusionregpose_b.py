"""DiffusionRegPose against the released code's numbers, second half: completion, losses, post-processing, data."""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import part_b as method
from common import transforms, weights
from common.datasets import PoseDataset, Sample, open_dataset
from common.skeletons import Skeleton, flip_from_names, get_skeleton
from diffusionregpose import RENAME, Config, DiffusionRegPose, Noise, PoseNoise, Targets, noise_poses, pad_poses
from tests.conftest import REFERENCE
from tests.test_diffusionregpose import model_of, normal

FOLDER = REFERENCE / "diffusionregpose"


def golden(kind: str):
    """Run a test once for every golden_<kind>*.npz; none there is a failure to notice, not a silent pass."""
    files = sorted(FOLDER.glob(f"golden_{kind}*.npz"))
    missing = pytest.param(None, marks=pytest.mark.skip(reason=f"no golden_{kind}*.npz in {FOLDER}"))
    return pytest.mark.parametrize("file", files or [missing], ids=lambda f: f.stem if f else "none")


def close(ours, theirs, tolerance: float, what: str = ""):
    """Largest difference, relative to the largest entry or 1."""
    ours, theirs = (torch.as_tensor(x.detach() if isinstance(x, torch.Tensor) else np.asarray(x)).double()
                    for x in (ours, theirs))
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    if theirs.numel():
        error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()
        assert error <= tolerance, f"{what}: error {error:.2e}"


# ------------------------------------------------------------------------------------------ completion


def completion_of(case) -> tuple[method.KeypointCompletion, Skeleton]:
    skeleton = get_skeleton(json.loads(str(case["meta"]))["skeleton"])
    return method.KeypointCompletion(case["population"], method.reference_joints(skeleton)), skeleton


def boxes_at(corners: np.ndarray) -> np.ndarray:
    return np.concatenate([corners, corners + 1], 1)


def keypoints_of(case) -> np.ndarray:
    return np.concatenate([case["keypoints_px"], case["visibility"][..., None]], 2).astype(float)


@golden("completion")
def test_statistics_and_completed_poses_equal_the_release(file):
    case = np.load(file)
    completion, _ = completion_of(case)
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


@golden("completion")
def test_the_conditional_mean_is_the_papers_least_squares_solution(file):
    """eq. 10-12 as printed: U with UᵀU = Σ⁻¹, its columns split, the overdetermined system solved (float64)."""
    completion, rng = completion_of(np.load(file))[0], np.random.default_rng(1)
    upper = np.linalg.cholesky(np.linalg.inv(completion.covariance)).T
    for _ in range(5):
        visible = rng.random(len(completion.mean) // 2) < 0.6
        visible[list(completion.joints)] = True
        y = rng.multivariate_normal(completion.mean, completion.covariance).reshape(-1, 2)
        length = np.linalg.norm(y[completion.joints[0]] - y[completion.joints[1]])
        keypoints = np.concatenate([y, visible[:, None]], 1)[None]
        completed = completion(keypoints, boxes_at(np.zeros((1, 2))))[0, ~visible, :2] / length
        missing = ~visible.repeat(2)
        right = upper @ completion.mean - upper[:, ~missing] @ (y / length).flatten()[~missing]
        expected = np.linalg.lstsq(upper[:, missing], right, rcond=None)[0]
        np.testing.assert_allclose(completed.flatten(), expected, atol=1e-9)


@golden("completion")
def test_moving_and_scaling_a_person_moves_and_scales_the_completion(file):
    case = np.load(file)
    completion, keypoints = completion_of(case)[0], keypoints_of(case)
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
    completion = method.learn_completion(dataset_of(standing(rng, count, 10), skeleton))
    assert completion.joints is None, "no joint of that name: the diagonal of the box"
    test = standing(rng, 20, 10)
    holes = test * (rng.random((20, 10, 1)) < 0.6)
    holes[0] = 0
    completed = completion(holes, np.concatenate([test[..., :2].min(1), test[..., :2].max(1)], 1))
    assert np.linalg.norm((completed - test)[1:, :, :2], axis=-1).max() < 8
    assert (completed[0] == 0).all(), "nothing known, nothing guessed"


def test_the_reference_length_is_that_of_the_head_where_there_is_one():
    expected = dict(coco=(6, 12), crowdpose=(12, 13), posetrack=(2, 1), wholebody=(6, 12))
    assert {name: method.reference_joints(get_skeleton(name)) for name in expected} == expected


def test_a_training_set_without_a_whole_person_has_no_completion(puppets_folder):
    data = open_dataset(str(puppets_folder), "train")
    assert method.learn_completion(data) is not None
    data.keypoints[:, 3] = 0
    assert method.learn_completion(data) is None


# ------------------------------------------------------------------------------------------ matching and losses


def targets_of(case) -> list[Targets]:
    targets, i = [], 0
    while f"target{i}_boxes" in case.files:
        keypoints = torch.from_numpy(case[f"target{i}_keypoints"])
        k = keypoints.shape[1] // 3
        name = f"target{i}_keypoints_buquan"
        poses = torch.from_numpy(case[name]) if name in case.files else keypoints
        columns = keypoints[:, :2 * k].unflatten(1, (k, 2)), keypoints[:, 2 * k:].clamp(max=1)
        targets.append(Targets(*columns, torch.from_numpy(case[f"target{i}_boxes"]),
                               torch.from_numpy(case[f"target{i}_area"]), poses[:, :2 * k].unflatten(1, (k, 2))))
        i += 1
    return targets


def recorded_result(case, k: int) -> tuple[dict, dict]:
    """The case's network outputs as our forward returns them, and by name the tensors that get a gradient."""
    leaves = {}

    def load(name: str) -> torch.Tensor:
        leaves[name] = torch.from_numpy(case[name]).requires_grad_()
        return leaves[name]

    layers = []
    while f"layer{len(layers)}_pred_logits" in case.files:
        name = f"layer{len(layers)}_pred_"
        poses = load(name + "keypoints")[..., :2 * k].unflatten(2, (k, 2)) if case[name + "keypoints"].any() else None
        layers.append((load(name + "logits"), load(name + "boxes"), poses))
    dn_layers = [(load(f"layer{l}_dn_class_pred"), load(f"layer{l}_dn_bbox_pred")) for l in range(len(layers))]
    known = SimpleNamespace(boxes=torch.from_numpy(case["dn_bbox_input"]),
                            known=torch.from_numpy(case["dn_class_input"]) == method.PERSON)
    result = dict(layers=layers, dn_layers=dn_layers, denoising=known,
                  proposals=(load("interm_pred_logits"), load("interm_pred_boxes")))
    return result, leaves


def sigmas_of(case) -> torch.Tensor:
    return torch.tensor(get_skeleton(json.loads(str(case["meta"]))["skeleton"]).sigmas)


@golden("losses")
def test_matching_costs_and_pairs_equal_the_release(file):
    case = np.load(file)
    targets, sigmas = targets_of(case), sigmas_of(case)
    result, _ = recorded_result(case, len(sigmas))
    names = [*(f"layer{l}" for l in range(len(result["layers"]))), "interm"]
    outputs = [*result["layers"], (*result["proposals"], None)]
    assert any(f"cost_{name}_0" in case.files for name in names)
    for name, output, pairs in zip(names, outputs, method.match(outputs, targets, sigmas)):
        cost, first = method.match_cost(output, method.gather_people(targets), sigmas), 0
        for i, people in enumerate(targets):
            close(cost[i, :, first:first + len(people)], case[f"cost_{name}_{i}"], 1e-5, f"cost {name} {i}")
            image, query, person = pairs
            ours = set(zip(query[image == i].tolist(), (person[image == i] - first).tolist()))
            assert ours == set(zip(*case[f"match_{name}_{i}"].tolist()))
            first += len(people)


def check_losses(losses: dict, case, rel: float):
    """Each term, and the weighted sum, of a case; its names are those of the weights that are used."""
    weights = json.loads((FOLDER / "loss_weights.json").read_text())["weights_used"]
    assert losses.keys() == weights.keys()
    for name, weight in weights.items():
        assert losses[name].item() == pytest.approx(weight * float(case[f"loss/{name}"][0]), rel=rel, abs=1e-6), name
    assert sum(losses.values()).item() == pytest.approx(float(case["total"][0]), rel=rel)


@golden("losses")
def test_every_loss_term_and_its_gradient_equals_the_release(file):
    """The release also draws boxes of nobody (label 2) to their random places: so here, for these terms alone."""
    case = np.load(file)
    result, leaves = recorded_result(case, len(sigmas_of(case)))
    losses = method.criterion(result, targets_of(case), sigmas_of(case))
    result["denoising"].known = torch.ones_like(result["denoising"].known)
    boxes_of_nobody = method.criterion(result, targets_of(case), sigmas_of(case))
    losses |= {name: boxes_of_nobody[name] for name in losses if name.startswith(("dn_loss_bbox", "dn_loss_giou"))}
    check_losses(losses, case, 1e-5)
    sum(losses.values()).backward()
    last = len(result["layers"]) - 1
    places = [("pred_", f"layer{last}_pred_"), ("interm_boxes", "interm_pred_boxes"), ("_dn_boxes", "_dn_bbox_pred"),
              (r"layer(\d)_(boxes|keypoints)", r"layer\1_pred_\2")]
    names = [name.removeprefix("grad/") for name in case.files if name.startswith("grad/")]
    assert names
    for name in names:
        ours, theirs = leaves[next(iter(weights.rename({name: 0}, places)))].grad, case[f"grad/{name}"]
        close(ours / np.abs(theirs).max(), theirs / np.abs(theirs).max(), 1e-5, f"gradient of {name}")


def test_images_without_people_teach_denoising_queries_no_boxes():
    result, boxes = random_result(2), torch.rand(2, 4, 4, requires_grad=True)
    known = torch.tensor([True, False])[:, None].expand(2, 4)
    result |= dict(dn_layers=[(torch.randn(2, 4, 2), boxes)] * 2,
                   denoising=SimpleNamespace(boxes=torch.rand(2, 4, 4), known=known))
    sum(method.criterion(result, some_people([1, 0]), torch.full((17,), 0.05)).values()).backward()
    assert boxes.grad[0].any() and not boxes.grad[1].any()


def some_people(counts: list[int], keypoints: int = 17) -> list[Targets]:
    return [Targets(keypoints=0.2 + 0.6 * torch.rand(n, keypoints, 2), visible=(torch.rand(n, keypoints) > 0.2).float(),
                    boxes=torch.tensor([[0.5, 0.5, 0.4, 0.6]]).repeat(n, 1), areas=0.05 + 0.1 * torch.rand(n),
                    poses=torch.rand(n, keypoints, 2)) for n in counts]


def random_result(batch: int, queries: int = 6, keypoints: int = 17) -> dict:
    def output():
        return torch.randn(batch, queries, 2, requires_grad=True), torch.rand(batch, queries, 4, requires_grad=True)
    poses = torch.rand(batch, queries, keypoints, 2, requires_grad=True)
    return dict(layers=[(*output(), None), (*output(), poses)], proposals=output(), dn_layers=[], denoising=None)


def test_a_batch_without_people_has_a_finite_loss_and_a_gradient():
    result = random_result(2)
    losses = method.criterion(result, some_people([0, 0]), torch.full((17,), 0.05))
    sum(losses.values()).backward()
    assert losses["loss_keypoints"] == losses["loss_bbox_interm"] == 0 < losses["loss_ce"]
    leaves = [x for output in [*result["layers"], result["proposals"]] for x in output if x is not None]
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


def test_more_people_than_queries_are_matched_as_far_as_queries_go():
    result = random_result(1)
    image, query, person = method.match(result["layers"], some_people([9]), torch.full((17,), 0.05))[1]
    assert sorted(query.tolist()) == list(range(6)) and len(set(person.tolist())) == 6


def test_the_order_of_people_does_not_change_the_loss():
    targets, result, sigmas = some_people([3]), random_result(1), torch.full((17,), 0.05)
    shuffled = [targets[0].take(torch.tensor([2, 0, 1]))]
    totals = [sum(method.criterion(result, t, sigmas).values()).item() for t in (targets, shuffled)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


def test_perfect_outputs_have_no_loss_but_that_of_the_scores():
    targets, sigmas = some_people([2]), torch.full((17,), 0.05)
    exact = torch.cat([targets[0].keypoints, torch.rand(4, 17, 2)])[None]
    boxes = torch.cat([targets[0].boxes, torch.rand(4, 4)])[None]
    logits = torch.tensor([[[-9.0, 9.0]] * 2 + [[-9.0, -9.0]] * 4])
    result = random_result(1) | dict(layers=[(logits, boxes, exact)])
    losses = method.criterion(result, targets, sigmas)
    assert losses["loss_keypoints"] == losses["loss_bbox"] == 0
    assert max(losses["loss_oks"], losses["loss_giou"], losses["loss_ce"]) < 1e-3


def test_a_non_finite_cost_is_said_before_the_assignment():
    logits = torch.full((1, 6, 2), float("nan"))
    with pytest.raises(FloatingPointError, match="matching cost"):
        method.match([(logits, torch.rand(1, 6, 4), None)], some_people([2]), torch.full((17,), 0.05))


def test_gradients_of_the_losses_are_right():
    """gradcheck in float64; boxes overlap, contain each other, or are apart."""
    true = some_people([3])[0]
    true = replace(true, **{name: getattr(true, name).double() for name in ("keypoints", "visible", "boxes", "areas")})
    boxes = torch.tensor([[0.5, 0.45, 0.2, 0.3], [0.6, 0.8, 0.5, 0.3], [0.1, 0.1, 0.1, 0.1]]).double().requires_grad_()
    poses = (true.keypoints + 0.05 * torch.randn(3, 17, 2)).requires_grad_()
    logits = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    positive, sigmas = (torch.rand(3, 2) > 0.5).double(), torch.full((17,), 0.05, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda b: tuple(method.box_losses(b, true.boxes).values()), boxes)
    assert torch.autograd.gradcheck(lambda p: tuple(method.pose_losses(p, true, sigmas).values()), poses)
    assert torch.autograd.gradcheck(lambda x: method.focal_loss(x, positive), logits)


# ------------------------------------------------------------------------------------------ post-processing


@golden("postprocess")
def test_nms_equals_the_release_without_its_fallback(file):
    case = np.load(file)
    k = case["entry_keypoints"].shape[1] // 3
    keypoints, scores = case["entry_keypoints"][:, :2 * k].reshape(-1, k, 2), case["entry_scores"]
    for reading, name in dict(official="official_reading", plain="interleaved").items():
        kept = method.nms(keypoints, scores, tuple(case["input_wh"]), reading)
        assert kept.tolist() == sorted(case[f"keep_{name}_no_fallback"].tolist(), key=lambda i: -scores[i]), reading
    assert method.nms(keypoints, scores, (1, 1), "none").tolist() == np.argsort(-scores, kind="stable").tolist()


@golden("postprocess")
def test_predictions_equal_the_release_with_each_score_at_its_own_pose(file):
    case = np.load(file)
    k = case["keypoints"].shape[2] // 3
    entries = dict(logits=case["logits"][0], boxes=case["boxes"][0],
                   keypoints=case["keypoints"][0, :, :2 * k].reshape(-1, k, 2))
    ours = method.to_prediction(entries, 7, tuple(case["input_wh"]), tuple(case["orig_wh"]), "official")
    close(ours.scores, case["paired_scores"], 1e-6)
    close(ours.boxes, case["paired_boxes_xyxy"], 1e-6)
    close(ours.keypoints, case["paired_keypoints"].reshape(-1, k, 3)[..., :2], 1e-6)
    everybody = method.to_prediction(entries, 7, tuple(case["input_wh"]), tuple(case["orig_wh"]), "none")
    person = case["nonms_labels"] == method.PERSON             # label 0 is never trained, and nobody here
    count = person.sum()
    close(everybody.scores[:count], case["nonms_scores"][person], 1e-6)
    close(everybody.boxes[:count], case["nonms_boxes_xyxy"][person], 1e-6)


@pytest.mark.parametrize("joints", [1, 3, 17, 133])
@pytest.mark.parametrize("reading", ["official", "plain"])
def test_nms_keeps_one_of_each_person_whatever_the_number_of_joints(joints, reading):
    rng = np.random.default_rng(0)
    people = rng.uniform(0, 0.2, (3, joints, 2)) + np.array([0, 0.4, 0.8])[:, None, None]
    poses = np.concatenate([people, people, people]) + rng.normal(0, 1e-4, (9, joints, 2)) * (joints > 1)
    scores = np.linspace(0.9, 0.1, 9)
    kept = method.nms(poses, scores, (640, 480), reading)
    assert set(kept) == ({0, 1, 2} if joints > 1 else set(range(9))), "one joint has no extent: nobody is near"
    assert len(method.nms(poses, scores * 0.05, (640, 480), reading)) == 0


def test_nms_of_nobody_is_nobody():
    assert len(method.nms(np.zeros((0, 17, 2)), np.zeros(0), (9, 9), "official")) == 0


def test_start_noise_depends_on_seed_image_and_draw_alone():
    cfg, first = Config(), method.start_noise("a", Config(), 17)
    torch.manual_seed(5)
    assert torch.equal(first, method.start_noise("a", cfg, 17)) and first.shape == (cfg.queries, 17, 2)
    for other in ("b", cfg, 17), ("a", replace(cfg, seed=1), 17), ("a", cfg, 17, 1):
        assert not torch.equal(first, method.start_noise(*other))


# ------------------------------------------------------------------------------------------ data

FILE = FOLDER / "golden_transforms.json"
GOLDEN_DATA = json.loads(FILE.read_text()) if FILE.exists() else {}
needs_golden_data = pytest.mark.skipif(not GOLDEN_DATA, reason=f"no {FILE}")
cases = pytest.mark.parametrize("name", [n for n in GOLDEN_DATA if isinstance(GOLDEN_DATA[n], dict)])


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


def assert_targets(ours: Targets, record: dict):
    k = ours.keypoints.shape[1]
    close(ours.boxes, record["boxes"], 1e-5)
    close(ours.areas, record["area"], 1e-5)
    theirs = np.array(record["keypoints"])
    assert (ours.visible.numpy() == (theirs[:, 2 * k:] > 0)).all()
    close(ours.keypoints.flatten(1), theirs[:, :2 * k] * (theirs[:, 2 * k:] > 0).repeat(2, 1), 1e-5)
    assert torch.equal(ours.poses, ours.keypoints)


def twice(sample: Sample) -> Sample:
    """As TrainImages: annotated keypoints, then those for the diffusion."""
    return replace(sample, keypoints=np.concatenate([sample.keypoints] * 2, 1))


@needs_golden_data
@cases
def test_augmentation_equals_the_release(name):
    case = GOLDEN_DATA[name]
    sample = recorded_sample(case["input"], "area" in case["input"])
    assert_targets(method.to_targets(twice(sample)), case["input_normalised_directly"])
    flip = get_skeleton("crowdpose" if sample.keypoints.shape[1] == 14 else "coco").flip
    assert_sample(transforms.hflip(sample, flip), case["after_hflip"])
    sample = transforms.resize_short_side(sample, 600)
    assert_sample(sample, case["after_resize_600"])
    pixels = np.array(sample.image)[np.ix_([0, 100], [0, 200])].reshape(-1, 3)
    assert (pixels == case["resized_pixels_rows_0_100_cols_0_200"]).all()
    sample = transforms.crop(sample, 120, 50, 450, 500)
    assert_sample(sample, case["then_crop_top50_left120_h500_w450"])
    sample = transforms.resize_short_side(sample, 736, 1333)
    assert_sample(sample, case["then_resize_736_max1333"])
    assert_targets(method.to_targets(twice(sample)), case["then_normalise"])
    tensor = method.normalise(sample.image)
    for y, x, values in case["tensor_values"]:
        close(tensor[:, y, x], values, 1e-5)


@needs_golden_data
def test_the_size_rule_equals_the_release():
    rows = next(rows for name, rows in GOLDEN_DATA.items() if name.startswith("resize_sizes"))
    for w, h, short, longest, *expected in rows:
        assert transforms.short_side_size((w, h), short, longest or np.inf) == tuple(expected), (w, h, short, longest)


def test_pictures_of_different_sizes_are_padded_at_the_right_and_bottom():
    images, padded = method.pad_images([torch.ones(3, 4, 7), 2 * torch.ones(3, 6, 5)])
    assert images.shape == (2, 3, 6, 7) and padded.shape == (2, 6, 7) and padded.dtype == torch.bool
    for image, mask, inside in zip(images, padded, (np.s_[:4, :7], np.s_[:6, :5])):
        assert (image[0] > 0).sum() == (~mask).sum() == (image[(0, *inside)] > 0).sum() == (~mask[inside]).sum()


def test_training_images_depend_on_seed_epoch_and_index_and_carry_completed_poses(puppets_folder):
    cfg = Config(short_side=64, long_side=107, multiscale=False)
    data = open_dataset(str(puppets_folder), "train").training()
    completion = method.learn_completion(data)
    images = method.TrainImages(data, cfg, 3, completion)
    for i in range(6):
        (image, targets, skipped), again = images[i], images[i]
        assert torch.equal(image, again[0]) and torch.equal(targets.poses, again[1].poses) and not skipped
        assert min(image.shape[1:]) == 64
        visible = targets.visible > 0
        assert torch.equal(targets.poses[visible], targets.keypoints[visible])
        assert (targets.keypoints[~visible] == 0).all()
    filled = torch.cat([t.poses[t.visible == 0] for _, t, _ in (images[i] for i in range(10))])
    assert (filled != 0).float().mean() > 0.3, "unlabelled joints have places"
    plain = method.TrainImages(data, cfg, 3, None)
    assert all(torch.equal(plain[i][1].poses, plain[i][1].keypoints) for i in range(4))
    flipped = [torch.equal(images[i][0], method.TrainImages(data, cfg, 4, None)[i][0]) for i in range(10)]
    assert not all(flipped), "another epoch mirrors other images"


def test_crops_and_sizes_are_those_of_the_release():
    people = Sample(Image.new("RGB", (640, 480)), 1, (640, 480), np.zeros((1, 17, 3), np.float32),
                    np.float32([[0, 0, 640, 480]]), np.float32([9]), np.zeros(1, bool))
    rng = np.random.default_rng(0)
    sizes = [method.augment(people, None, Config(), rng).size for _ in range(60)]
    assert {min(size) for size in sizes if max(size) < 1333} <= set(range(480, 801, 32))
    assert max(map(max, sizes)) <= 1333 and len({round(w / h, 2) for w, h in sizes}) > 10, "crops of many shapes"


def test_mirroring_a_completed_pose_is_completing_then_mirroring(puppets_folder):
    """The poses for the diffusion keep left and right apart as the annotation does."""
    data = open_dataset(str(puppets_folder), "train").training()
    cfg = Config(short_side=64, long_side=107, multiscale=False)
    images = method.TrainImages(data, cfg, 0, method.learn_completion(data))
    for i in range(8):
        targets = images[i][1]
        seen = targets.visible > 0
        assert torch.allclose(targets.poses[seen], targets.keypoints[seen])


def test_crowdpose_losses_take_the_area_of_the_box(puppets_folder):
    data = open_dataset(str(puppets_folder), "train").training()
    cfg = Config(short_side=64, long_side=107, multiscale=False)
    before = method.TrainImages(data, cfg, 0, None)[0][1].areas
    data.name = "crowdpose"
    targets = method.TrainImages(data, cfg, 0, None)[0][1]
    assert torch.allclose(targets.areas, targets.boxes[:, 2:].prod(1), rtol=1e-4)
    assert not torch.allclose(targets.areas, before)


# ------------------------------------------------------------------------------------------ a training step


def pose_noise_of(case, meta, keypoints: int) -> PoseNoise:
    """The case's draws; poses that its padding does not draw are nowhere used."""
    groups, counts = meta["num_people"], [len(t) for t in targets_of(case)]
    eps = torch.stack([torch.from_numpy(case[f"rng/diff_noise{b}"]) for b in range(len(counts))])
    pad = torch.full_like(eps, math.nan)
    for b, count in enumerate(counts):
        if f"rng/diff_pad{b}" in case.files:
            pad[b, count:] = torch.from_numpy(case[f"rng/diff_pad{b}"])
    split = (len(counts), groups, keypoints, 2)
    return PoseNoise(torch.tensor(meta["t"]), eps.view(split), [torch.arange(0)] * len(counts), pad.view(split))


def denoising_noise_of(case) -> Noise:
    counts, dn = [len(t) for t in targets_of(case)], case["rng/dn_label_u"].shape[1]
    person = [np.concatenate([np.tile(np.arange(n), dn // n), case[f"rng/dn_residue_idx{b}"]])
              for b, n in enumerate(counts)]
    return Noise(torch.from_numpy(np.stack(person).astype(np.int64)), torch.from_numpy(case["rng/dn_label_u"]) < 0.5,
                 torch.from_numpy(case["rng/dn_label_new"]), 2 * torch.from_numpy(case["rng/dn_box_u"]) - 1)


@golden("train_")
def test_a_training_step_equals_the_release(file):
    case = np.load(file)
    shared, meta = model_of(case)
    model = DiffusionRegPose(shared.cfg, shared.skeleton).train()
    model.load_state_dict(shared.state_dict())
    targets, k = targets_of(case), model.skeleton.num_keypoints
    noise = pose_noise_of(case, meta, k)
    padding = dict(normal="noise", zero="empty")[meta["padding"]]
    poses = noise_poses(pad_poses(targets, noise, padding), noise.t, noise.eps, model.cfg.scale)
    close(poses.flatten(2), case["x_t_01"], 1e-5, "noisy poses")
    denoising = model.denoising_queries(targets, denoising_noise_of(case))
    close(denoising.reference, torch.from_numpy(case["dn_query_bbox_unsigmoid"]).sigmoid(), 1e-5, "noisy boxes")
    close(denoising.boxes, case["dn_known_boxes"], 1e-6)
    theirs = case["dn_noised_labels_embed_stride"]
    close(denoising.content[..., ::denoising.content.shape[2] // theirs.shape[2]], theirs, 1e-6)
    dn = denoising.blocked.shape[1]
    assert (denoising.blocked.numpy() == case["attn_mask_box"][:, :dn, :dn]).all() and denoising.known.all()
    pictures = [normal(key, (3, *shape)) for key, shape in zip(meta["input_keys"], meta["images"])]
    result = model(*method.pad_images(pictures), poses, noise.t, denoising)
    for name in ("logits", "boxes"):
        close(result[name], case[f"out/pred_{name}"], 1e-3, name)
    close(result["keypoints"].flatten(2), case["out/pred_keypoints"][..., :2 * k], 1e-3, "keypoints")
    close(result["dn_layers"][-1][0], case["out/dn_class_pred"], 1e-3, "denoising")
    losses = method.criterion(result | dict(denoising=denoising), targets, model.sigmas)
    check_losses(losses, case, 1e-3)
    sum(losses.values()).backward()
    check_gradients(model, case, json.loads(file.with_name(f"{file.stem}_grads.json").read_text()))


def check_gradients(model: DiffusionRegPose, case, names: dict):
    """Norms of all gradients and the stored whole ones, by the release's names; of its heads by the second ones."""
    first = [re.sub(r"^transformer\.decoder\.(?=(class|bbox|pose|pose_hw)_embed)", "", n) for n in names["parameter_order"]]
    ours = dict(zip(names["parameter_order"], weights.rename(dict.fromkeys(first), RENAME)))
    learned = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    idle = {ours[name] for name in names["zero_grad"]}
    assert learned.keys() == set(ours.values()), "every trained parameter of the release, and no other"
    assert {name for name, grad in learned.items() if grad is None} == idle
    biases = {"decoder.ksa.key.bias", "decoder.kca.key.bias"}                  # zero but for rounding
    total = float(case["grad_total_norm"][0])
    for name, norm in zip(names["parameter_order"], case["grad_norms"]):
        if ours[name] not in idle | biases:
            assert learned[ours[name]].norm().item() == pytest.approx(float(norm), rel=2e-3, abs=1e-6 * total), name
    for key in [key for key in case.files if key.startswith("grad/")]:
        if ours[key[5:]] not in idle | biases:
            theirs, gradient = torch.from_numpy(case[key]), learned[ours[key[5:]]]
            step = gradient.shape[1] // theirs.shape[1] if theirs.dim() > 1 else 1
            close(gradient[..., ::step] / theirs.abs().max(), theirs / theirs.abs().max(), 2e-3, key)


# ------------------------------------------------------------------------------------------ by itself

SMALL = dict(dim=32, heads=4, ffn=32, layers=2, box_queries=12, queries=5, dn_queries=4, short_side=64, long_side=64)
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
ALONE = runtime.Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("counts", [[2, 0, 1], [0, 0, 0]])
@pytest.mark.parametrize("ablation", [
    dict(), dict(padding="repeat"), dict(padding="noise"), dict(padding="mean"), dict(scale=10.0), dict(queries=3),
    dict(uniform_t=False), dict(ksa_kca=False), dict(dn_queries=0), dict(as_released=True)], ids=str)
def test_every_ablation_gives_every_parameter_a_finite_gradient(ablation, counts):
    model = drp.build("tiny", "crowdpose" if "scale" in ablation else "coco", **SMALL | ablation).train()
    targets, pictures = some_people(counts, model.skeleton.num_keypoints), [torch.rand(3, 64, w) for w in (64, 48, 40)]
    for _ in range(2):                                  # the first step leaves zero-started heads behind
        losses = drp.batch_losses(model, model, *drp.pad_images(pictures), targets, ALONE)
        sum(losses.values()).backward()
        torch.optim.SGD(model.parameters(), 1e-4).step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert ("dn_loss_ce" in losses) == (model.cfg.dn_queries > 0)


def test_two_halves_of_a_batch_have_the_loss_of_the_whole(monkeypatch):
    targets, sigmas, result = some_people([2, 1]), torch.full((17,), 0.05), random_result(2)
    known = SimpleNamespace(boxes=torch.rand(2, 4, 4), known=torch.ones(2, 4, dtype=torch.bool))
    result |= dict(dn_layers=[(torch.randn(2, 4, 2), torch.rand(2, 4, 4))] * 2, denoising=known)
    whole = drp.criterion(result, targets, sigmas)
    monkeypatch.setattr(runtime, "mean_over_ranks", lambda count: torch.tensor(1.5))
    halves = []
    for b in (0, 1):
        part = {name: [tuple(None if x is None else x[b:b + 1] for x in output) for output in result[name]]
                for name in ("layers", "dn_layers")}
        part |= dict(proposals=tuple(x[b:b + 1] for x in result["proposals"]),
                     denoising=SimpleNamespace(boxes=known.boxes[b:b + 1], known=known.known[b:b + 1]))
        halves.append(drp.criterion(part, targets[b:b + 1], sigmas, shares=2))
    for name, value in whole.items():
        assert (halves[0][name] + halves[1][name]).item() / 2 == pytest.approx(value.item(), rel=1e-5), name


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
    close(drp.predict(drp.fuse(model), drp.to_batch(pictures[1:], [7], model.cfg))[0].keypoints, second.keypoints, 1e-3, "alone")


def test_an_ensemble_joins_the_people_of_all_steps():
    counts = []
    for options in dict(), dict(steps=3), dict(steps=3, ensemble=True):
        model = drp.build("tiny", **SMALL, nms="none", **options).eval()
        counts.append(len(drp.predict(model, drp.to_batch([Image.new("RGB", (64, 64))], [1], model.cfg))[0].scores))
    assert counts == [5, 5, 15]


def test_the_process_is_ten_steps_of_noise_then_people_and_one_picture_of_ellipses():
    model = drp.build("tiny", **SMALL, nms="none").eval()
    for threshold in (0, 1):                            # everybody, nobody
        shown = drp.show_process(model, Image.new("RGB", (80, 60)), threshold)
        assert {name: len(pictures) for name, pictures in shown.items()} == dict(process=11, uncertainty=1)
        assert len({picture.size for pictures in shown.values() for picture in pictures}) == 1
        assert (np.ptp(np.asarray(shown["uncertainty"][0])) > 0) == (threshold == 0)


def test_the_learning_rate_falls_as_a_cosine_or_drops_twice():
    cosine, drops = drp.PRESETS["tiny"], drp.PRESETS["r50"]
    rates = [drp.lr_scale(step, 1000, 0, cosine) for step in range(1000)]
    assert rates[0] < 0.01 and max(rates) > 0.85 and rates[-1] < 1e-4
    assert [drp.lr_scale(0, 10, epoch, drops) for epoch in (30, 31, 60, 61)] == pytest.approx([1, 0.1, 0.1, 0.01])


def test_puppets_in_crowds_are_evaluated_by_crowding(tmp_path, monkeypatch):
    monkeypatch.setattr(puppets, "ROOT", tmp_path)
    monkeypatch.setattr(puppets, "COUNTS", puppets.COUNTS | {"crowd": {"val": 4}})
    model = drp.build("tiny", **SMALL).eval()
    table, found = drp.evaluate(model, drp.open_crowd(model.skeleton, ALONE), model.cfg, ALONE)
    assert {"AP", "AP_E", "AP_M", "AP_H"} <= table.keys() and len(found) == 4


# ------------------------------------------------------------------------------------------ training runs


def train(data: Path, out: Path, *flags: str) -> dict:
    """Train in this process, 2 x 5 steps; the content of last.pt."""
    words = flags if "--resume" in flags else (
        "--train", *FLAGS, "--processes", "1", "--eval_every", "1", "--epochs", "2", "--batch", "4", "--accum", "2",
        "--device", "cpu", "--data", str(data), "--out", str(out), *flags)
    drp.train(*runtime.parse(drp.Config, drp.PRESETS, "", list(words)))
    return torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole_run(puppets_folder, tmp_path_factory) -> Path:
    """The folder of a run that was never cut."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(puppets_folder, folder)
    return folder


@pytest.mark.parametrize("how, step", [("SIGTERM", 4), ("kill", 2)])
def test_a_run_that_is_cut_and_resumed_ends_with_the_same_bits(how, step, puppets_folder, whole_run, tmp_path):
    losses, calls = drp.batch_losses, []

    def cut(*args):
        calls.append(0)
        if len(calls) == 7 and how == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        if len(calls) == 7 and how == "kill":
            raise KeyboardInterrupt
        return losses(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drp, "batch_losses", cut)
        patch.setattr(runtime.Run, "draw", lambda *args: None)
        patch.setattr(runtime.Run, "save_is_due", lambda self: len(calls) == 4)
        with suppress(KeyboardInterrupt):
            train(puppets_folder, tmp_path / "run")
        patch.setattr(drp, "batch_losses", losses)
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == step
        after = train(puppets_folder, tmp_path / "run", "--resume", str(tmp_path / "run"))
    expected = torch.load(whole_run / "last.pt", weights_only=True)
    assert after["step"] == 10
    parts = ("model", "ema", "optimizer", "epoch", "step", "best", "rows")
    assert_equal({part: after[part] for part in parts}, {part: expected[part] for part in parts})


def test_a_run_leaves_its_pictures_and_a_checkpoint_that_eval_understands(whole_run, tmp_path, monkeypatch, capsys):
    assert {"completion.png", "predictions.png", "curves.png", "best.pt"} <= {path.name for path in whole_run.iterdir()}
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.png")
    evaluation = importlib.import_module("eval")
    for words in ["--eval_batch", "3"], ["--images", str(tmp_path / "photo.png"), "--process", "--threshold", "0"]:
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
    assert not (tmp_path / "run" / "completion.png").exists()


def test_a_loss_that_is_not_finite_stops_with_its_name_and_the_images(puppets_folder, tmp_path, monkeypatch):
    losses = drp.criterion
    monkeypatch.setattr(drp, "criterion", lambda *args: losses(*args) | dict(loss_oks=torch.tensor(math.nan)))
    with pytest.raises(runtime.UserError, match=r"loss_oks not finite at step 0, images \["):
        train(puppets_folder, tmp_path / "run")


def test_frozen_norms_without_start_weights_are_refused():
    args = SimpleNamespace(device="cpu", saved=None)
    with pytest.raises(runtime.UserError, match="frozen norms need start weights"):
        drp.train(runtime.resolve(drp.PRESETS["r50"], init=""), args)


@pytest.mark.slow
def test_the_tiny_preset_learns_eight_puppets_by_heart(puppets_folder):
    """A model that cannot overfit has a bug: the loss of the final poses falls below a fifth of its start."""
    data = open_dataset(str(puppets_folder), "train").training()
    model = drp.build("tiny", data.skeleton).train()
    images = drp.TrainImages(data, model.cfg, 0, drp.learn_completion(data))
    (images, padded), targets, _ = drp.collate([images[i] for i in range(8)], drp.pad_images)
    optimizer, values = drp.build_optimizer(model, model.cfg), []
    for step in range(200):
        runtime.seed_all(step)
        losses = drp.batch_losses(model, model, images, padded, targets, ALONE)
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
    assert 200 < float(rows["r50"][-1]) < 225, "213 GFLOPs counted on the release"
