"""QueryPose's losses, results, data and training against the released code's numbers, and by themselves."""
import importlib
import json
import math
import signal
import sys
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import part_b as qp
from common import runtime, transforms
from common.datasets import Sample, open_dataset
from common.skeletons import get_skeleton
from part_b import Targets
from querypose import Output, RealNVP
from tests.conftest import REFERENCE
from tests.test_runtime import assert_equal

FOLDER = REFERENCE / "querypose"


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


def close(ours, theirs, tolerance: float, what: str = ""):
    """Largest difference, relative to the largest entry or 1."""
    ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    if theirs.numel():
        error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()
        assert error <= tolerance, f"{what}: error {error:.2e}"


# ------------------------------------------------------------------------------------------ matching and losses


def flow_of(case) -> RealNVP:
    """The flow with the reference's weights."""
    flow, prefix = RealNVP(), "criterion.flow.flow."
    keys = json.loads((FOLDER / "manifest_r50_light.json").read_text())["keys"]
    state = {key: fill(key, shape, int(case["seed"])) for key, shape in keys.items() if key.startswith((prefix + "s", prefix + "t"))}
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
            close(cost[b, :, first:last], case[f"cost_total_{stage}"][b, :, first:last], 1e-5, f"{stage} {b}")
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
    keys = json.loads((FOLDER / "manifest_r50_light.json").read_text())["keys"]
    order = [key.removeprefix("criterion.flow.flow.") for key in keys if "flow.flow.t" in key or "flow.flow.s" in key]
    for key, norm in zip(order, case["grad_flow_norm"].tolist(), strict=True):
        assert flow.get_parameter(key).grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), key


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
                                    ((mu - 0.5).requires_grad_(), (0.1 + sigma).requires_grad_()))
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
    sizes = [qp.augment(people, cfg, np.random.default_rng(i)).size for i in range(60)]
    assert {min(size) for size in sizes} <= set(range(480, 801, 32)) and max(max(size) for size in sizes) <= 1333
    whole = [size for size in sizes if abs(size[0] / size[1] - 1.5) < 0.01]
    assert 15 <= len(whole) <= 45, "half of the images are cropped"
    assert qp.augment(people, SimpleNamespace(short_side=80, long_side=90, multiscale=False), None).size == (90, 60)
