"""Metrics equal the official tools on every golden file, and bad input never gives a wrong number in silence."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detrpose
from common.cli import resolve
from common.datasets import PoseDataset, keypoint_fields, keypoints_of
from common.errors import UserError
from common.metrics import (best_threshold, box_ap, coco_eval, evaluate, format_table, keypoint_ap, keypoint_errors, to_results,
                            wholebody_ap, with_crowdpose_areas)
from common.oks import oks, oks_matrix, oks_nms, pose_similarity, rescore
from common.ranks import Ranks
from common.records import Prediction
from common.skeletons import SKELETONS, get_skeleton
from common.splits import open_dataset
from tests.helpers import REFERENCE, golden, reference
from tests.test_datasets import CROWDPOSE, image, person, write

COCO, SIGMAS = get_skeleton("coco"), np.array(get_skeleton("coco").sigmas)


def read(name: str):
    return json.loads(reference(f"metrics/{name}").read_text())


def dataset_of(truth: dict, folder: Path) -> PoseDataset:
    """The dataset whose annotation file holds `truth`; all its pictures are one."""
    Image.new("L", (8, 8)).save(folder / "picture.png")
    images = [dict(width=1000, height=1000) | image | dict(file_name="picture.png") for image in truth["images"]]
    (folder / "val.json").write_text(json.dumps(dict(truth, images=images)))
    return PoseDataset("coco", "val", [folder / "val.json"], [folder])


# ---------------------------------------------------------------- golden files

@golden("metrics/golden_*_keypoints.npz", "metrics/golden_*_dtbbox.npz", "metrics/golden_*_bbox.npz")
def test_average_precision_equals_the_official_tools(file):
    case = file.stem.removeprefix("golden_")
    stored, (name, kind) = np.load(file), case.removesuffix("_dtbbox").rsplit("_", 1)
    truth, found, crowdpose = read(f"{name}_gt.json"), read(f"{name}_dt.json"), name.startswith("crowdpose")
    if kind == "keypoints" and not case.endswith("_dtbbox"):
        found = [{k: v for k, v in d.items() if k != "bbox"} for d in found]
    sigmas = SKELETONS["crowdpose" if crowdpose else "coco"].sigmas
    run = coco_eval(with_crowdpose_areas(truth) if crowdpose else truth, found, kind, sigmas)
    for array in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(run.eval[array], stored[array])
    np.testing.assert_array_equal(matches(run), stored["matches"])
    if kind == "bbox":
        stats = list(box_ap(truth, found, crowdpose).values())
    else:
        stats = list(keypoint_ap(truth, found, sigmas, crowdpose).values())
        stats = stats[:3] + [0, 0] + stats[3:] if crowdpose else stats      # two slots stay empty
    np.testing.assert_allclose(stats, stored["stats"], rtol=0, atol=1e-12)


def matches(run) -> np.ndarray:
    """One row per detection of area "all": image, detection, ten matched annotations, ten ignore flags."""
    everything = [e for e in run.evalImgs if e and list(e["aRng"]) == run.params.areaRng[0]]
    rows = [[e["image_id"], d, *e["dtMatches"][:, i], *e["dtIgnore"][:, i]] for e in everything
            for i, d in enumerate(e["dtIds"])]
    return np.array(rows, dtype=np.int64)


@golden("metrics/golden_*_keypoints.npz")
def test_our_oks_equals_the_official_one(file):
    stored, name = np.load(file), file.stem.removeprefix("golden_").removesuffix("_keypoints")
    truth, found = read(f"{name}_gt.json"), read(f"{name}_dt.json")
    skeleton = SKELETONS["crowdpose" if name.startswith("crowdpose") else "coco"]
    truth = with_crowdpose_areas(truth) if skeleton.name == "crowdpose" else truth
    people = {a["id"]: a for a in truth["annotations"]}
    _, d, g = stored["oks_image_dt_gt"].T
    pred = np.array([found[i - 1]["keypoints"] for i in d]).reshape(len(d), -1, 3)[..., :2]
    target = np.array([people[i]["keypoints"] for i in g]).reshape(len(g), -1, 3)
    value = oks(pred, target, np.array([people[i]["area"] for i in g]), skeleton.sigmas)
    labelled = (target[..., 2] > 0).any(1)                      # of the others COCO takes the distance to their boxes
    assert labelled.any()
    np.testing.assert_allclose(value[labelled], stored["oks"][labelled], rtol=0, atol=1e-12)


RULES = {rule["name"]: rule for rule in read("rules.json")} if (REFERENCE / "metrics" / "rules.json").exists() else {}


@pytest.mark.parametrize("name", RULES or ["none"])
def test_every_rule_of_the_official_tool_holds(name):
    rule = RULES[name] if RULES else read("rules.json")
    run = coco_eval(rule["gt"], rule["dt"], rule["iouType"], SIGMAS)
    boxes = rule["iouType"] == "bbox"
    stats = box_ap(rule["gt"], rule["dt"]) if boxes else keypoint_ap(rule["gt"], rule["dt"], SIGMAS)
    assert stats == pytest.approx(rule["stats"], abs=1e-12)
    assert sorted(matches(run)[:, [0, 1, 2, 12]].tolist()) == sorted(rule["match_thr0.50"])
    similarities = {(image, d["id"], g["id"]): value for (image, _), rows in run.ious.items() if len(rows)
                    for d, row in zip(sorted(run.cocoDt.imgToAnns[image], key=lambda d: -d["score"]), rows)
                    for g, value in zip(run.cocoGt.imgToAnns[image], row)}
    for image, d, g, value in rule["iou"]:
        assert similarities[image, d, g] == pytest.approx(value, abs=1e-12)


def test_a_dataset_is_free_of_the_traps_and_changes_no_sound_file(tmp_path):
    read("rules.json")
    mended = dict(ann_id_zero=1, stale_num_keypoints=-1,            # the latter: nobody to find
                  regular_before_ignored=0.8 + 0.2 * 51 / 101)      # two people, one missed at 2 of 10 thresholds
    for name, rule in RULES.items():
        if rule["iouType"] == "keypoints":
            truth = dataset_of(rule["gt"], tmp_path).ground_truth()
            ap = keypoint_ap(truth, rule["dt"], SIGMAS)["AP"]
            assert ap == pytest.approx(mended.get(name, rule["stats"]["AP"]), abs=1e-12), name


@golden("metrics/golden_wholebody*.npz")
def test_wholebody_equals_xtcocotools(file):
    stored, name = np.load(file), file.stem.removeprefix("golden_")
    truth, found = read(f"{name}_gt.json"), read(f"{name}_dt.json")
    for person in (*truth["annotations"], *found):              # whose keypoints are in five fields
        person["keypoints"] = keypoints_of(person, keypoint_fields("wholebody"))
    for part, stats in wholebody_ap(truth, found).items():
        np.testing.assert_allclose(list(stats.values()), stored[f"keypoints_{part}_stats"], rtol=0, atol=1e-12)


@golden("metrics/golden_topdown_nms*.npz")
def test_rescoring_and_oks_nms_equal_mmpose(file):
    stored = np.load(file)
    scores = rescore(stored["bbox_scores"], stored["keypoint_scores"])
    np.testing.assert_allclose(scores, stored["instance_scores"], rtol=1e-12)
    areas = stored["bbox_scales"].prod(-1)
    np.testing.assert_allclose(areas, stored["areas"], rtol=1e-12)
    similarity = pose_similarity(stored["keypoints"], areas, SIGMAS)
    np.testing.assert_allclose(similarity, stored["oks_matrix"], atol=1e-6)                 # a float32 golden
    for key in [key for key in stored.files if key.startswith("keep_oks_nms")]:
        kept = oks_nms(stored["keypoints"], scores, areas, SIGMAS, float(key.rsplit("_", 1)[1]))
        assert kept == stored[key].tolist(), key


# ---------------------------------------------------------------- without the golden files

def scene(rng, images=12, people=3, noise=0.03) -> tuple[dict, list[dict]]:
    """People as random points in a 100 px box; each is predicted with noise; every image gets one stray pose."""
    truth = {"images": [{"id": i} for i in range(images)], "annotations": [], "categories": [{"id": 1}]}
    found = []
    for i in range(images):
        for _ in range(people):
            keypoints = np.c_[rng.uniform(0, 100, (17, 2)) + rng.uniform(0, 400, 2), rng.integers(0, 3, 17)]
            truth["annotations"].append(dict(image_id=i, keypoints=keypoints.reshape(-1).tolist(), area=9000.0))
            moved = keypoints + rng.normal(0, 100 * noise * np.exp(rng.normal(0, .7)), (17, 3))
            found.append(dict(image_id=i, keypoints=moved.reshape(-1).tolist(), score=rng.random()))
        found.append(dict(image_id=i, keypoints=rng.uniform(0, 500, 51).tolist(), score=rng.random()))
    return truth, found


def brute_force_ap(truth: dict, found: list[dict], threshold: float) -> float:
    """AP at one threshold by the definition, for people that all count: greedy by score, then 101 recalls."""
    hits, taken, people = [], set(), truth["annotations"]
    for d in sorted(found, key=lambda d: -d["score"]):
        best, similarity = None, threshold
        for j, a in enumerate(people):
            p, t = np.reshape(d["keypoints"], (17, 3)), np.reshape(a["keypoints"], (17, 3))
            terms = [np.exp(-((p[k, :2] - t[k, :2]) ** 2).sum() / (8 * SIGMAS[k] ** 2 * a["area"]))
                     for k in range(17) if t[k, 2]]
            if a["image_id"] == d["image_id"] and j not in taken and np.mean(terms) >= similarity:
                best, similarity = j, np.mean(terms)
        taken.add(best)
        hits.append(best is not None)
    recall = np.cumsum(hits) / len(people)
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(np.mean([precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)]))


def test_ap_equals_a_brute_force_reading_of_the_definition(tmp_path):
    truth, found = scene(np.random.default_rng(1), images=5)
    ap = keypoint_ap(dataset_of(truth, tmp_path).ground_truth(), found, SIGMAS)
    expected = [brute_force_ap(truth, found, t) for t in np.linspace(0.5, 0.95, 10)]
    assert ap["AP50"] == pytest.approx(expected[0]) and ap["AP75"] == pytest.approx(expected[5])
    assert ap["AP"] == pytest.approx(np.mean(expected)) and 0.2 < ap["AP"] < 0.8


def test_oks_of_itself_is_1_and_falls_with_distance_by_the_formula():
    target = np.c_[np.random.default_rng(0).uniform(0, 99, (17, 2)), np.full(17, 2)]
    assert oks(target, target, np.array(400.0), SIGMAS) == pytest.approx(1)
    moved = target[:, :2] + 20 * 2 * SIGMAS[:, None] * [np.sqrt(2), 0]      # all off by √2 · 2σ√area: e = 1
    assert oks(moved, target, np.array(400.0), SIGMAS) == pytest.approx(np.exp(-1))
    unlabelled = target * [1, 1, 0]
    assert oks(target, unlabelled, np.array(400.0), SIGMAS) == 0
    assert oks_matrix(np.zeros((2, 17, 2)), np.zeros((3, 17, 3)), np.ones(3), SIGMAS).shape == (2, 3)


def test_crowdpose_splits_are_the_ap_of_their_images_alone(tmp_path):
    truth, found = scene(np.random.default_rng(2))
    for i, image in enumerate(truth["images"]):
        image["crowdIndex"] = [0.0, 0.2, 0.8][i % 3]
    for a in truth["annotations"]:
        a["bbox"] = [0, 0, 100, 90 / 0.53]
    truth = dataset_of(truth, tmp_path).ground_truth()
    ap = keypoint_ap(truth, found, SIGMAS, crowdpose=True)
    for k, name in enumerate(("AP_E", "AP_M", "AP_H")):
        def part(items, key, k=k):
            return [x for x in items if x[key] % 3 == k]
        alone = dict(truth, images=part(truth["images"], "id"),
                     annotations=part(truth["annotations"], "image_id"))
        assert ap[name] == pytest.approx(keypoint_ap(alone, part(found, "image_id"), SIGMAS)["AP"], abs=5e-5)
    assert len({ap[name] for name in ("AP", "AP_E", "AP_M", "AP_H")}) == 4


@pytest.mark.parametrize("batch", [1, 3])
def test_crowdpose_splits_are_of_all_batches_not_of_the_last_one(batch, tmp_path, monkeypatch):
    """Evaluators that get one batch after the other and take the splits from the last print about 0 for them."""
    write(tmp_path, [image(n, crowdIndex=0.3 * n) for n in range(4)], [person(n, n, 14, num_keypoints=2) for n in range(4)],
          [CROWDPOSE], "test", "json/crowdpose_{}.json", "images")
    data = open_dataset(str(tmp_path), "test")
    monkeypatch.setattr(detrpose, "fuse", lambda model: model)
    monkeypatch.setattr(detrpose, "predict", lambda model, batch: [
        Prediction(i, data[i].keypoints[..., :2], np.ones((1, 14)), np.ones(1)) for i in batch["image_ids"]])
    cfg = resolve(detrpose.PRESETS["tiny"], eval_batch=batch, workers=0, size=64)
    table, found = detrpose.evaluate(None, data, cfg, Ranks(0, 1, torch.device("cpu")))
    assert [table[name] for name in ("AP", "AP_E", "AP_M", "AP_H")] == pytest.approx([1, 1, 1, 1])
    last = evaluate(found[-1:], data)                           # what the trap would print
    assert (last["AP_E"], last["AP_M"]) == (0, 0) and last["AP_H"] == pytest.approx(1)


def predictions_of(found: list[dict]) -> list[Prediction]:
    """One prediction record per detection: the evaluation must not care how they are grouped."""
    return [Prediction(d["image_id"], np.reshape(d["keypoints"], (1, 17, 3))[..., :2], np.ones((1, 17)),
                       np.array([d["score"]])) for d in found]


def test_evaluate_takes_predictions_and_string_ids_and_forgives_incomplete_annotations(tmp_path):
    truth, found = scene(np.random.default_rng(3))
    data = dataset_of(truth, tmp_path)
    expected = evaluate(predictions_of(found), data)
    assert expected["AP50"] == pytest.approx(brute_force_ap(truth, found, 0.5))
    name = {i: f"image_{31 * i % 12:02d}" for i in range(12)}
    renamed = {"images": [{"id": name[i]} for i in range(12)], "annotations": [
        dict(a, image_id=name[a["image_id"]], id=0, keypoints=np.reshape(a["keypoints"], (17, 3)).tolist())
        for a in truth["annotations"]]}
    found_by_name = [dict(d, image_id=name[d["image_id"]]) for d in found]
    assert evaluate(predictions_of(found_by_name), dataset_of(renamed, tmp_path)) == expected
    bare = dict(truth, annotations=[{k: a[k] for k in ("image_id", "keypoints")} for a in truth["annotations"]])
    data = dataset_of(bare, tmp_path)
    assert evaluate(predictions_of(found), data)["AP"] > 0.1
    assert "36 people without area: 0.53 of the box taken" in data.report()


def test_nan_predictions_are_dropped_counted_and_never_match(capsys, tmp_path):
    truth, found = scene(np.random.default_rng(4))
    data = dataset_of(truth, tmp_path)
    poisoned = [dict(d, keypoints=[float("nan")] * 51) for d in found]
    capsys.readouterr()
    assert evaluate(predictions_of(poisoned), data)["AP"] == 0
    assert "dropped 48 of 48 predictions" in capsys.readouterr().out
    assert keypoint_ap(data.ground_truth(), poisoned, SIGMAS)["AP"] == 0
    half = poisoned[:1] + [dict(found[1], score=float("inf"))] + found[2:]
    assert len(json.loads(json.dumps(to_results(predictions_of(half)), allow_nan=False))) == 46


def test_no_predictions_give_0_and_no_people_give_minus_1(tmp_path):
    truth, found = scene(np.random.default_rng(5))
    ap = evaluate([], dataset_of(truth, tmp_path), boxes=True)
    assert ap["AP"] == ap["AR"] == ap["box_AP"] == 0
    nobody = dataset_of(dict(truth, annotations=[], categories=[dict(id=1, keypoints=COCO.keypoints)]), tmp_path)
    assert evaluate(predictions_of(found), nobody)["AP"] == evaluate([], nobody)["AP"] == -1


def test_user_errors_name_what_does_not_fit(tmp_path):
    truth, found = scene(np.random.default_rng(6))
    clean = dataset_of(truth, tmp_path).ground_truth()
    with pytest.raises(UserError, match=r"2 predicted image ids are not in the ground truth \(77, x.jpg\)"):
        keypoint_ap(clean, found + [dict(found[0], image_id="x.jpg"), dict(found[0], image_id=77)], SIGMAS)
    with pytest.raises(UserError, match="has 42 numbers as keypoints, expected 51"):
        keypoint_ap(clean, [dict(found[0], keypoints=[0] * 42)], SIGMAS)
    with pytest.raises(UserError, match="an annotation in image 0 has 51 numbers"):
        keypoint_ap(clean, [], SIGMAS[:14])
    with pytest.raises(UserError, match="box AP needs a box"):
        box_ap(clean, found)


def test_keypoint_errors_find_the_keypoint_that_is_off(tmp_path):
    truth, _ = scene(np.random.default_rng(7))
    for a in truth["annotations"]:
        a["keypoints"][9 * 3 + 2] = 2                                   # the left wrist is visible everywhere
    found = [dict(a, score=0.5, keypoints=np.array(a["keypoints"]) + 30 * np.eye(51)[9 * 3])
             for a in truth["annotations"]]
    data = dataset_of(truth, tmp_path)
    table = keypoint_errors(predictions_of(found), data)
    off = table["left_wrist"]
    assert off["visible"] == 36 and off["hidden"] == 0 and off["visible close"] == 0
    assert off["visible error"] == pytest.approx(30 / np.sqrt(9000)) and np.isnan(off["hidden error"])
    assert table["nose"]["visible error"] < 1e-6 and table["nose"]["hidden close"] == 1
    labels = sum(np.count_nonzero(a["keypoints"][2::3]) for a in truth["annotations"])
    assert table["all"]["visible"] + table["all"]["hidden"] == labels
    assert keypoint_errors([], data)["all"]["visible"] == 0
    assert "left_wrist" in format_table(table) and len(format_table(table).splitlines()) == 19


def test_no_other_threshold_shows_people_better_than_the_best(tmp_path):
    rng = np.random.default_rng(11)
    truth, found = scene(rng, noise=0.02)
    for d in found[3::4]:                                                # the stray poses score lower, mostly
        d["score"] *= 0.5
    found += [dict(d, score=0.4 * d["score"]) for d in found[::3]]       # some people are found twice
    data = dataset_of(truth, tmp_path)
    by_image = [[d for d in found if d["image_id"] == i] for i in range(12)]
    predictions = [Prediction(i, *(np.concatenate(column) for column in zip(*[
        (p.keypoints, p.keypoint_scores, p.scores) for p in predictions_of(group)]))) for i, group in enumerate(by_image)]

    def f1(threshold: float) -> float:
        shown, right = 0, 0
        for group in by_image:
            people = [a for a in truth["annotations"] if a["image_id"] == group[0]["image_id"] and any(a["keypoints"][2::3])]
            for d in sorted((d for d in group if d["score"] >= threshold), key=lambda d: -d["score"]):
                shown, pose = shown + 1, np.reshape(d["keypoints"], (17, 3))
                likeness = [oks(pose, np.reshape(a["keypoints"], (17, 3)), a["area"], SIGMAS) for a in people]
                if people and max(likeness) >= 0.5:
                    right, _ = right + 1, people.pop(int(np.argmax(likeness)))
        return 2 * right / (shown + 36)

    best = best_threshold(predictions, data)
    assert 0.5 < f1(best) == max(f1(d["score"]) for d in found) and f1(best) > f1(0)
    assert best_threshold([], data) is None


def test_table_aligns_names_with_values():
    assert format_table({"AP": 0.51234, "APM": -1.0, "people": 12}) == "   AP  APM  people\n0.512  n/a      12"
    assert format_table({"body": {"AP": 0.5}, "foot": {"AP": float("nan")}}).splitlines()[2] == "foot    n/a"


def test_nms_keeps_the_best_of_equal_poses_and_takes_nobody_from_nobody():
    pose = np.random.default_rng(8).uniform(0, 99, (17, 2))
    poses, scores, areas = np.stack([pose, pose + 1, pose + 500]), np.array([.5, .9, .1]), np.full(3, 9000.0)
    assert oks_nms(poses, scores, areas, SIGMAS) == [1, 2]
    assert oks_nms(poses[:0], scores[:0], areas[:0], SIGMAS) == []
    assert rescore(np.array([.8]), np.full((1, 17), .1)) == 0
