"""QueryPose's losses, results, data and training against the released code's numbers, and by themselves."""
import importlib
import math
import re
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import part_b as qp
from common import runtime, transforms, weights
from common.datasets import Sample, open_dataset
from common.skeletons import get_skeleton
from data import puppets
from part_b import Targets
from querypose import Output, QueryPose, RealNVP
from tests.test_querypose import FOLDER, close, fill, golden, normal, official_state
from tests.test_runtime import assert_equal

# ------------------------------------------------------------------------------------------ matching and losses


def flow_of(case) -> RealNVP:
    """The flow with the reference's weights."""
    flow, prefix = RealNVP(), "criterion.flow.flow."
    state = official_state("manifest_r50_light.json", int(case["seed"]), re.escape(prefix))
    flow.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})
    return flow


@golden("flow*")
def test_density_of_the_flow_equals_the_release(file):
    case = np.load(file)
    close(flow_of(case).log_prob(torch.from_numpy(case["x"])), case["log_prob"], 1e-5)


@golden("rle*")
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


def targets_of(case) -> list[Targets]:
    """Ground truth gt_boxes{i}, gt_keypoints{i} with image_hw."""
    found = []
    for i, (h, w) in enumerate(case["image_hw"].tolist()):
        keypoints, boxes = torch.from_numpy(case[f"gt_keypoints{i}"]), torch.from_numpy(case[f"gt_boxes{i}"])
        found.append(Targets(keypoints[..., :2], (keypoints[..., 2] > 0).float(), boxes,
                             torch.tensor([[w, h]]).float().expand(len(boxes), 2)))
    return found


def predictions_of(case) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(case[key]).requires_grad_() for key in case.files if key.startswith("pred_")}


def stages_of(leaves: dict[str, torch.Tensor]) -> list[Output]:
    return [Output(leaves[f"pred_logits_{s}"][..., 0], leaves[f"pred_boxes_{s}"],
                   leaves[f"pred_keypoints_{s}"][..., :2], leaves[f"pred_sgm_{s}"]) for s in ("aux0", "final")]


def criterion(stages: list[Output], targets: list[Targets], flow: RealNVP) -> dict[str, torch.Tensor]:
    """The losses of stages that are matched on themselves."""
    return qp.criterion(stages, match(stages, targets), targets, flow.log_prob)


def match(stages: list[Output], targets: list[Targets]) -> list[tuple]:
    return qp.match([output[:2] for output in stages], targets)


@golden("losses*")
def test_costs_and_pairs_equal_the_release(file):
    case = np.load(file)
    targets, stages = targets_of(case), stages_of(predictions_of(case))
    people, ends = qp.gather_people(targets), np.cumsum([0] + [len(t) for t in targets])
    for stage, output, (image, query, person) in zip(("aux0", "final"), stages, match(stages, targets)):
        cost = qp.match_cost(*output[:2], people)
        for b, (first, last) in enumerate(zip(ends, ends[1:])):         # across images nothing is matched
            theirs = case[f"cost_total_{stage}"][b, :, first:last]
            assert cost[b, :, first:last].detach().numpy() == pytest.approx(theirs, abs=1e-5), f"{stage} {b}"
            rows = case[f"match_{stage}_{b}"]
            pairs = torch.stack([query, person - first])[:, image == b]
            assert (pairs.numpy() == rows).all(), f"{stage} {b}"


@golden("losses*")
def test_every_loss_term_and_its_gradient_equals_the_release(file):
    case = np.load(file)
    flow, leaves = flow_of(case), predictions_of(case)
    losses = criterion(stages_of(leaves), targets_of(case), flow)
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


def some_targets(counts: list[int], keypoints: int = 17) -> list[Targets]:
    """People in boxes from (20, 10) to (80, 90) of an image of 100 x 200."""
    return [Targets(keypoints=20 + 60 * torch.rand(n, keypoints, 2), visible=(torch.rand(n, keypoints) > 0.2).float(),
                    boxes=torch.tensor([[20.0, 10.0, 80.0, 90.0]]).repeat(n, 1),
                    sizes=torch.tensor([[100.0, 200.0]]).repeat(n, 1)) for n in counts]


def random_stages(batch: int, queries: int = 6, keypoints: int = 17, stages: int = 2) -> list[Output]:
    def output():
        corner = 60 * torch.rand(batch, queries, 2)
        boxes = torch.cat([corner, corner + 10 + 90 * torch.rand(batch, queries, 2)], -1)
        pose, sigma = torch.rand(2, batch, queries, keypoints, 2)
        return Output(*(x.requires_grad_() for x in (torch.randn(batch, queries), boxes, pose - 0.5, 0.05 + 0.2 * sigma)))
    return [output() for _ in range(stages)]


def finite_gradients(losses: dict, stages: list[tuple], flow: torch.nn.Module) -> bool:
    sum(losses.values()).backward()
    leaves = [*(x for output in stages for x in output), *flow.parameters()]
    return all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


def test_a_batch_without_people_has_a_finite_loss_and_a_gradient():
    stages, flow = random_stages(2), RealNVP()
    losses = criterion(stages, some_targets([0, 0]), flow)
    assert losses["loss_kps"] == losses["loss_bbox_0"] == losses["loss_giou"] == 0 < losses["loss_ce"]
    assert finite_gradients(losses, stages, flow)


def test_more_people_than_queries_are_matched_as_far_as_queries_go():
    image, query, person = match(random_stages(1), some_targets([9]))[1]
    assert sorted(query.tolist()) == list(range(6)) and len(set(person.tolist())) == 6


def test_the_order_of_people_does_not_change_the_loss():
    targets, stages, flow = some_targets([3]), random_stages(1), RealNVP()
    targets[0].boxes += 9 * torch.rand(3, 4)
    shuffled = [targets[0].take(torch.tensor([2, 0, 1]))]
    totals = [sum(criterion(stages, t, flow).values()).item() for t in (targets, shuffled)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


def test_perfect_boxes_have_no_loss_but_that_of_scores_and_poses():
    targets = some_targets([1])
    logits = torch.tensor([[9.0, -9.0]])
    boxes = torch.cat([targets[0].boxes, torch.tensor([[0.0, 100.0, 20.0, 190.0]])])[None]
    poses = torch.zeros(1, 2, 17, 2)
    losses = criterion([Output(logits, boxes, poses, poses + 0.5)], targets, RealNVP())
    assert losses["loss_bbox"] == 0 and max(losses["loss_giou"], losses["loss_ce"]) < 1e-3


def test_targets_of_keypoints_are_seen_from_the_centre_of_the_box_and_masked_outside():
    people = replace(some_targets([1])[0], visible=torch.tensor([[1.0, 1, 1, 0]]),
                     keypoints=torch.tensor([[[50.0, 50], [20, 90], [19, 50], [50, 50]]]))
    place, inside = qp.pose_in_box(people.boxes, people)
    assert place[0, :2].tolist() == [[0, 0], [-0.5, 0.5]] and inside.tolist() == [[1, 1, 0, 0]]


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
    true = some_targets([3], keypoints=2)[0]
    true = replace(true, **{name: getattr(true, name).double() for name in qp.TENSORS})
    boxes = torch.tensor([[25.0, 12, 70, 80], [0, 0, 99, 99], [90, 95, 98, 99]]).double().requires_grad_()
    mu, sigma = torch.rand(2, 3, 2, 2, dtype=torch.double)
    place, inside = qp.pose_in_box(boxes.detach(), true)
    flow = RealNVP().double()
    assert torch.autograd.gradcheck(lambda b: (qp.box_distance(b, true), qp.generalized_iou(b, true.boxes)), boxes)
    assert torch.autograd.gradcheck(lambda m, s: qp.likelihood_loss(m, s, place, inside, flow.log_prob),
                                    ((mu - 0.5).requires_grad_(), (0.1 + sigma).requires_grad_()), fast_mode=True)
    logits = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: qp.focal_loss(x, (logits > 0).double()), logits)


# ------------------------------------------------------------------------------------------ what may go wrong


@pytest.mark.parametrize("what", ["collapsed box", "keypoints outside", "sigma of 0", "box without size at a keypoint"])
def test_degenerate_outputs_have_a_finite_loss_and_finite_gradients(what):
    stages, targets, flow = random_stages(1, queries=2, stages=1), some_targets([2]), RealNVP()
    logits, boxes, mu, sigma = (x.detach().clone() for x in stages[0])
    if what == "collapsed box":
        boxes[..., 2:] = boxes[..., :2]
    elif what == "keypoints outside":
        boxes += 1e6
    elif what == "sigma of 0":
        sigma.zero_()
    else:
        corner, targets[0].visible = targets[0].keypoints[0, 0], torch.ones(2, 17)
        boxes[:] = torch.cat([corner, corner])
    stages = [Output(*(x.requires_grad_() for x in (logits, boxes, mu, sigma)))]
    losses = criterion(stages, targets, flow)
    assert all(value.isfinite() for value in losses.values())
    assert finite_gradients(losses, stages, flow)
    assert (losses["loss_kps"] == 0) == (what in ("collapsed box", "keypoints outside"))
    assert torch.stack([p.grad.norm() for p in flow.parameters()]).norm().isfinite()


def test_a_non_finite_cost_is_said_before_the_assignment():
    nan = torch.full((1, 6), float("nan"))
    with pytest.raises(FloatingPointError, match="matching cost"):
        qp.match([(nan, random_stages(1)[0].boxes)], some_targets([2]))


# ------------------------------------------------------------------------------------------ post-processing


@golden("postprocess*")
def test_people_boxes_and_scores_equal_the_release(file):
    case = np.load(file)
    logits, boxes, pose = (torch.from_numpy(case[name])[0] for name in ("logits", "boxes", "pose"))
    (h, w), (full_h, full_w) = case["size"], case["orig"]
    sigmas = (1 - pose[..., 2:]).repeat(1, 1, 2)            # the case has the confidence, not its two halves
    output = Output(logits[:, 0], boxes, pose[..., :2], sigmas)
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
    output = Output(torch.tensor([0.0, 0.0, 9.0]), boxes, torch.zeros(3, 4, 2), sigmas)
    scores, certain = qp.pose_scores(output)
    assert scores.tolist() == pytest.approx([0.5, 0, 0.5], abs=1e-3)
    assert certain[0].eq(1).all() and not certain[1].any()
    people = qp.to_prediction(output, 1, (9, 9), (9, 9))
    assert len(people.scores) == 2, "σ = 1 says that a query got no pose"
    assert (people.keypoints == 4).all(), "the centre of the middle pixel"


def test_outputs_that_are_not_finite_are_nobody():
    nan, pose = torch.full((2, 4), torch.nan), torch.zeros(2, 17, 2)
    assert len(qp.to_prediction(Output(nan[:, 0], nan, pose, pose), 1, (64, 64), (64, 64)).scores) == 0


# ------------------------------------------------------------------------------------------ data


@golden("transforms*")
def test_size_rule_equals_the_release(file):
    for h, w, short, longest, new_h, new_w in np.load(file)["resize_rule"].tolist():
        assert qp.input_size((w, h), short, longest if longest > 0 else math.inf) == (new_w, new_h), (h, w, short)


def sample_of(picture: np.ndarray, boxes: np.ndarray, keypoints: np.ndarray, **more) -> Sample:
    image = Image.fromarray(picture)
    boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).astype(np.float32)
    fields = dict(areas=np.ones(len(boxes), np.float32), iscrowd=np.zeros(len(boxes), bool)) | more
    return Sample(image, 1, image.size, keypoints.astype(np.float32), boxes, **fields)


@golden("transforms*")
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
    targets = qp.to_targets(people)
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
    targets = qp.to_targets(learn)
    assert len(targets) == 2 and not targets.visible.any() and not targets.keypoints.any()


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
    assert qp.augment(people, SimpleNamespace(short_side=80, long_side=90, multiscale=False), None).size == (90, 60)


# ------------------------------------------------------------------------------------------ a training step


def released_model(file, case) -> QueryPose:
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
    return (image / 255 - qp.MEAN) / qp.STD


@golden("train_*_release*")
def test_a_training_step_equals_the_release(file):
    """Tolerances are those of its gradients: behind a stack of ReLUs with random weights float32 is rough."""
    case, full = np.load(file), "_full_" in file.stem
    model, targets, seed = released_model(file, case), targets_of(case), int(case["seed"])
    images, sizes = qp.pad_images([input_of(key, h, w, seed)
                                   for key, (h, w) in zip(("input", "input1"), case["image_hw"].tolist())])
    stages = model(images, sizes)["stages"]
    matchings = match(stages, targets)
    for s, (image, query, person) in enumerate(matchings):
        for b, first in enumerate([0, len(targets[0])]):
            pairs = torch.stack([query, person - first])[:, image == b]
            assert (pairs.numpy() == case[f"match_stage{s}_image{b}"]).all(), f"stage {s}, image {b}"
    losses = qp.criterion(stages, matchings, targets, model.flow.log_prob)
    assert {f"weighted.{name}" for name in losses} == {key for key in case.files if key.startswith("weighted")}
    for name, value in losses.items():
        assert value.item() == pytest.approx(float(case[f"weighted.{name}"]), rel=2e-4 if full else 5e-5), name
    sum(losses.values()).backward()
    norm = model.keypoint_stages[0].look.norm
    close(norm.running_mean, case["bn_running_mean_stage0"], 1e-4, "mean")
    close(norm.running_var, case["bn_running_var_stage0"], 1e-4, "variance")
    check_gradients(model, case, full)


def check_gradients(model: QueryPose, case, full: bool):
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


# ------------------------------------------------------------------------------------------ by itself

SMALL = dict(dim=32, heads=4, ffn=32, dynamic=8, stages=2, queries=5, pose_roi=4, convs=1, part_dim=16, short_side=64,
             long_side=64)
FLAGS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
ALONE = runtime.Ranks(0, 1, torch.device("cpu"))
ABLATIONS = [
    dict(), dict(matched=False), dict(full=True, matched=False), dict(full=True, iterate=False),
    dict(query="instance"), dict(interaction="mhsa"), dict(interaction="channel"), dict(interaction="spatial"),
    dict(interaction="pool"), dict(update="sum"), dict(update="concat"), dict(update="none"), dict(scheme="a"),
    dict(scheme="b"), dict(scheme="d")]


@pytest.mark.parametrize("ablation, counts", [*((ablation, [2, 0, 1]) for ablation in ABLATIONS),
                                              *((ablation, [0, 0, 0]) for ablation in ABLATIONS[:3])], ids=str)
def test_every_ablation_gives_every_parameter_a_finite_gradient(ablation, counts):
    model = qp.build("tiny", "crowdpose" if "scheme" in ablation else "coco", **SMALL | ablation).train()
    targets, pictures = some_targets(counts, model.skeleton.num_keypoints), [torch.rand(3, 32, w) for w in (32, 30, 9)]
    losses = qp.batch_losses(model, model, *qp.pad_images(pictures), targets, ALONE)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_matched_queries_alone_have_the_losses_of_all_queries():
    """Poses do not depend on each other once batch norm keeps its statistics."""
    targets, losses = some_targets([2, 0, 1]), []
    images, sizes = qp.pad_images([torch.rand(3, 64, w) for w in (64, 48, 40)])
    model = qp.build("tiny", **SMALL).eval()
    for matched in (True, False):
        model.cfg = replace(model.cfg, matched=matched, prune=False)
        losses.append(qp.batch_losses(model, model, images, sizes, targets, ALONE))
    for name, value in losses[0].items():
        assert value.item() == pytest.approx(losses[1][name].item(), rel=1e-5), name


def test_predictions_are_people_in_pixels_of_the_original_whoever_shares_the_batch():
    model = qp.build("tiny", **SMALL).eval()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for h, w in ((100, 150), (50, 75))]
    batch = qp.to_batch(pictures, ["a", 7], model.cfg)
    first, second = qp.predict(model, batch)
    assert (first.image_id, second.image_id) == ("a", 7) and batch["sizes_px"] == [(150, 100), (75, 50)]
    assert first.keypoints.shape == (5, 17, 2) and ((0 < first.scores) & (first.scores < 1)).all()
    larger = qp.predict(model, batch | dict(sizes_px=[(300, 300), (75, 50)]))[0]
    close(larger.keypoints + 0.5, (first.keypoints + 0.5) * (2, 3), 1e-6, "pixels of the original")
    close(larger.boxes, first.boxes * (2, 3, 2, 3), 1e-6)
    alone = qp.predict(qp.fuse(model), qp.to_batch(pictures[1:], [7], model.cfg))[0]
    close(alone.keypoints, second.keypoints, 1e-4, "alone")


def test_a_picture_smaller_than_the_largest_stride_has_poses():
    model = qp.build("tiny", **SMALL | dict(short_side=8, long_side=16)).eval()
    people = qp.predict(model, qp.to_batch([Image.new("RGB", (3, 200))], [1], model.cfg))[0]
    assert len(people.scores) == 5 and np.isfinite(people.keypoints).all()


@pytest.mark.parametrize("threshold", [0, 1])               # everybody, nobody
def test_pictures_show_the_attention_of_each_part_and_the_deviations(threshold):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    for interaction in ("spegm", "pool"):
        shown = qp.show_process(qp.build("tiny", **SMALL, interaction=interaction).eval(), image, threshold)
        assert {name: len(pictures) for name, pictures in shown.items()} == (
            dict(sigma=1, attention=1) if interaction == "spegm" else dict(sigma=1))
        if interaction == "spegm" and threshold == 0:
            assert shown["attention"][0].size == (8 * 198 + 6, 5 * 198 + 6), "a row per person: her box and seven parts"


def test_attention_is_brightest_where_it_is_largest():
    attention = np.zeros((2, 8, 8))
    attention[0, 1, 6] = attention[1, 7, 0] = 0.3
    plain, *maps = (np.asarray(tile, dtype=int) for tile in qp.draw_attention(Image.new("RGB", (50, 30)), attention))
    assert not plain.any()
    for shown, (row, column) in zip(maps, [(36, 156), (180, 12)], strict=True):
        assert shown.sum(-1)[row, column] > 0.95 * shown.sum(-1).max() > 0


def test_the_learning_rate_warms_up_from_a_hundredth_then_falls_as_a_cosine_or_drops_twice():
    cosine, drops = qp.PRESETS["tiny"], qp.PRESETS["hrnet_w32"]
    rates = [qp.lr_scale(step, 1000, 0, cosine) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) > 0.85 and rates[-1] < 1e-4
    assert [qp.lr_scale(step, 10, 0, drops) for step in (0, 500, 1000, 9999)] == pytest.approx([0.01, 0.505, 1, 1])
    first, second = map(int, runtime.numbers(drops.drop_epochs))
    assert [qp.lr_scale(9999, 10, epoch, drops) for epoch in (first - 1, first, second)] == pytest.approx([1, 0.1, 0.01])


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
    model = qp.build("tiny", **SMALL).eval()
    table, found = qp.evaluate(model, qp.open_crowd(model.skeleton, ALONE), model.cfg, ALONE)
    assert {"AP", "AP_E", "AP_M", "AP_H"} <= table.keys() and len(found) == 4


def test_training_images_depend_on_seed_epoch_and_index(puppets_folder):
    data, cfg = open_dataset(str(puppets_folder), "train").training(), qp.PRESETS["tiny"]
    def item(i, epoch=0, seed=0):
        return qp.TrainImages(data, replace(cfg, seed=seed), epoch)[i]
    image, targets, skipped = item(3)
    assert torch.equal(image, item(3)[0]) and torch.equal(targets.keypoints, item(3)[1].keypoints) and not skipped
    assert image.shape == (3, 128, 128) and targets.sizes.unique().tolist() == [128]
    assert any(not torch.equal(image, item(3, epoch)[0]) for epoch in range(1, 6)), "some epoch mirrors it"


# ------------------------------------------------------------------------------------------ training runs


def train(data: Path, out: Path, *flags: str) -> dict:
    """Train in this process, 2 x 5 steps; the content of last.pt."""
    words = flags if "--resume" in flags else (
        "--train", *FLAGS, "--processes", "1", "--eval_every", "1", "--epochs", "2", "--batch", "4", "--accum", "2",
        "--device", "cpu", "--data", str(data), "--out", str(out), *flags)
    qp.train(*runtime.parse(qp.Config, qp.PRESETS, "", list(words)))
    return torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole_run(puppets_folder, tmp_path_factory) -> Path:
    """The folder of a run that was never cut."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(puppets_folder, folder)
    return folder


@pytest.mark.parametrize("how, step", [("SIGTERM", 4), ("kill", 2)])
def test_a_run_that_is_cut_and_resumed_ends_with_the_same_bits(how, step, puppets_folder, whole_run, tmp_path):
    losses, calls = qp.batch_losses, []

    def cut(*args):
        calls.append(0)
        if len(calls) == 7 and how == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        if len(calls) == 7 and how == "kill":
            raise KeyboardInterrupt
        return losses(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qp, "batch_losses", cut)
        patch.setattr(runtime.Run, "draw", lambda *args: None)
        patch.setattr(runtime.Run, "save_is_due", lambda self: len(calls) == 4)
        with suppress(KeyboardInterrupt):
            train(puppets_folder, tmp_path / "run")
        patch.setattr(qp, "batch_losses", losses)
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == step
        after = train(puppets_folder, tmp_path / "run", "--resume", str(tmp_path / "run"))
    expected = torch.load(whole_run / "last.pt", weights_only=True)
    assert after["step"] == 10
    parts = ("model", "ema", "optimizer", "epoch", "step", "best", "rows")
    assert_equal({part: after[part] for part in parts}, {part: expected[part] for part in parts})


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
    with pytest.raises(runtime.UserError, match=r"loss_kps not finite at step 0, images \["):
        train(puppets_folder, tmp_path / "run")


def test_frozen_norms_without_start_weights_are_refused():
    args = SimpleNamespace(device="cpu", saved=None)
    with pytest.raises(runtime.UserError, match="frozen norms need start weights"):
        qp.train(runtime.resolve(qp.PRESETS["r50"], init=""), args)


def test_the_summary_has_the_parameters_and_the_cost_of_the_release():
    """Parameters but for those that the release never uses, and twice the multiply-adds that were counted there."""
    rows = {line.split()[0]: line.split() for line in qp.summary().splitlines()}
    assert rows.keys() >= set(qp.PRESETS)
    millions = {"r50-light": 188.7, "r50": 322.6, "hrnet_w32": 194.3, "hrnet_w48": 230.6, "swin_l": 493.9}
    for preset, expected in millions.items():
        assert float(rows[preset][2]) == pytest.approx(expected, rel=0.006), preset
    for preset, cost in {"r50-light": 1573, "r50": 1590, "hrnet_w48": 1649, "swin_l": 1791}.items():
        assert float(rows[preset][-1]) == pytest.approx(2 * cost, rel=0.01), preset
        assert float(rows[preset][-2]) < float(rows[preset][-1]), preset
