"""Planted errors are found, each as what it is, and nothing else is; without them AP is 1."""
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common import metrics
from common.diagnose import (CIRCLES, EVERY, KINDS, corrected, crop_around, diagnose, error_table, find_errors,
                             keypoint_table, oks_radii, truth_to_diagnose)
from common.errors import UserError
from common.oks import oks
from common.skeletons import COCO
from tests.test_metrics import dataset_of, predictions_of

SIGMAS = np.array(COCO.sigmas)
SCALE = 100.0                                                   # √area of everybody


def standing(x: float, y: float) -> np.ndarray:
    """(17, 3): left keypoints 80 px beside right ones, all 40 px below one another; every third is hidden."""
    side = np.array([("left" in name) - ("right" in name) for name in COCO.keypoints])
    rows = np.array([0, *np.repeat(np.arange(1, 9), 2)])
    return np.c_[x + 40 * side, y + 40 * rows, 2 - (np.arange(17) % 3 == 0)]


def scene(images: int = 3) -> tuple[dict, list[dict]]:
    """Two people in each image, 300 px apart, and a perfect prediction of each."""
    truth = dict(images=[dict(id=i) for i in range(images)], annotations=[], categories=[dict(id=1)])
    found = []
    for i in range(images):
        for x in (500, 800):
            points = standing(x, 100)
            truth["annotations"].append(dict(
                id=len(found) + 1, image_id=i, keypoints=points.ravel().tolist(), area=SCALE ** 2, iscrowd=0,
                num_keypoints=17, category_id=1, bbox=[x - 60, 80, 120, 380]))
            found.append(dict(image_id=i, category_id=1, score=0.9 - 0.01 * len(found),
                              keypoints=np.c_[points[:, :2], np.ones(17)].ravel().tolist()))
    return truth, found


def move(result: dict, k: int, by) -> None:
    result["keypoints"][3 * k:3 * k + 2] = (np.array(result["keypoints"][3 * k:3 * k + 2]) + by).tolist()


def far(k: int, ks: float) -> np.ndarray:
    """An offset downwards at which keypoint k has this similarity."""
    return np.array([0, 2 * SIGMAS[k] * SCALE * math.sqrt(-2 * math.log(ks))])


def table_of(truth: dict, found: list[dict]) -> dict:
    return error_table(find_errors(truth, found, COCO), truth, COCO, 0.5)


def counts(table: dict, column: str = "count") -> dict:
    return {name: row[column] for name, row in table.items() if row[column] == row[column] and row[column]}


def planted() -> tuple[dict, list[dict], dict]:
    """Each kind of error, and how many of each."""
    truth, found = scene()
    move(found[0], 9, far(9, 0.7))                              # a hidden left wrist
    move(found[0], 10, far(10, 0.51))
    move(found[0], 0, far(0, 0.9))                              # a good nose
    move(found[1], 7, [-80, 0])                                 # the left elbow on the right one
    move(found[1], 13, [-300, 0])                               # the left knee on the neighbour's left knee
    move(found[1], 14, [-220, 0])                               # the right knee there, too
    move(found[1], 15, [0, 900])                                # a hidden left ankle nowhere
    found[2] = dict(found[2], keypoints=[one + 5000 for one in found[2]["keypoints"]])    # one missed, one false
    found.append(dict(copy.deepcopy(found[3]), score=0.2))      # an unsure duplicate
    expected = dict(jitter=2, inversion=1, swap=2, miss=1, hidden=2, missed=1, duplicate=1, false=1, all=9)
    return truth, found, expected | dict(good=5 * 17 - 6)


def test_each_planted_error_is_counted_as_what_it_is_and_nothing_else_is():
    truth, found, expected = planted()
    errors = find_errors(truth, found, COCO)
    table = error_table(errors, truth, COCO, 0.5)
    assert counts(table) == expected
    assert counts(table, "score 0.5") == {name: n for name, n in expected.items() if name != "duplicate"} | dict(all=8)
    assert table["jitter"]["hidden"] == 1 and table["miss"]["hidden"] == 1 and table["swap"]["hidden"] == 0
    rows = keypoint_table(errors, COCO)
    assert rows["left_elbow"] == dict(labels=5, good=0.8, jitter=0, inversion=0.2, swap=0, miss=0)
    assert rows["right_knee"]["swap"] == rows["left_ankle"]["miss"] == rows["left_wrist"]["jitter"] == 0.2


def test_every_person_prediction_and_labelled_keypoint_is_counted_once():
    truth, found, _ = planted()
    truth["annotations"][3]["keypoints"][2] = 0                 # a nose without a label
    table, errors = table_of(truth, found), find_errors(truth, found, COCO)
    assert sum(table[kind]["count"] for kind in KINDS) == 5 * 17 - 1
    assert sum(table[kind]["share"] for kind in KINDS) == pytest.approx(1)
    assert len(errors.found) + table["missed"]["count"] == 6
    assert len(errors.found) + table["duplicate"]["count"] + table["false"]["count"] == len(found)
    assert table["all"]["count"] == sum(table[kind]["count"] for kind in EVERY)


def test_without_all_errors_ap_is_1_and_without_one_kind_it_is_that_of_the_results_without_it():
    truth, found, _ = planted()
    table, errors = table_of(truth, found), find_errors(truth, found, COCO)
    assert errors.ap == metrics.keypoint_ap(truth, found, SIGMAS)["AP"] < 0.7
    assert table["all"]["AP without"] == 1 and table["all"]["gained"] == pytest.approx(1 - errors.ap)
    assert all(table[name]["gained"] >= 0 for name in (*EVERY, "hidden"))
    assert metrics.keypoint_ap(truth, corrected(errors, (), SIGMAS), SIGMAS)["AP"] == errors.ap
    no_false = [one for one in found if one is not found[2]]
    assert table["false"]["AP without"] == metrics.keypoint_ap(truth, no_false, SIGMAS)["AP"] > errors.ap
    again = find_errors(truth, corrected(errors, ("jitter", "swap", "hidden"), SIGMAS), COCO)
    left = counts(error_table(again, truth, COCO, 0.5))
    assert left == dict(good=5 * 17 - 1, inversion=1, missed=1, duplicate=1, false=1, all=4)


def test_good_keypoints_that_are_a_little_off_cost_only_the_strict_thresholds():
    truth, found = scene()
    for k in range(17):
        move(found[0], k, far(k, 0.86))
    errors = find_errors(truth, found, COCO)
    fixed = metrics.keypoint_ap(truth, corrected(errors, EVERY, SIGMAS), SIGMAS)
    assert counts(error_table(errors, truth, COCO, 0.5)) == dict(good=6 * 17)
    assert fixed["AP50"] == fixed["AP75"] == 1 and 0.8 < fixed["AP"] < 1


def test_a_perfect_prediction_has_no_errors_and_none_at_all_misses_everybody():
    truth, found = scene()
    assert counts(table_of(truth, found)) == dict(good=6 * 17)
    table = table_of(truth, [])
    assert counts(table) == dict(missed=6, all=6) and table["missed"]["AP without"] == 1
    assert table["good"]["share"] != table["good"]["share"], "of nobody"
    truth["annotations"][0]["num_keypoints"], truth["annotations"][0]["keypoints"] = 0, [0] * 51
    assert counts(table_of(truth, [])) == dict(missed=5, all=5), "without labels nobody counts"


def test_what_coco_ignores_is_no_error():
    truth, found = scene()
    truth["annotations"][0].update(num_keypoints=0, keypoints=[0] * 51, iscrowd=1)
    errors = find_errors(truth, found, COCO)
    assert len(errors.ignored) == 1 and counts(error_table(errors, truth, COCO, 0.5)) == dict(good=5 * 17)


def test_the_order_of_people_and_predictions_does_not_matter():
    truth, found, _ = planted()
    order = np.random.default_rng(0).permutation
    shuffled = dict(truth, annotations=[truth["annotations"][i] for i in order(6)])
    mixed = [found[i] for i in order(len(found))]
    (table, first), (other, second) = ((table_of(t, f), keypoint_table(find_errors(t, f, COCO), COCO))
                                       for t, f in ((truth, found), (shuffled, mixed)))
    np.testing.assert_equal(other, table)
    assert first == second


def test_of_a_pose_and_its_duplicates_the_better_remains_with_the_higher_score():
    truth, found = scene(1)
    better = dict(copy.deepcopy(found[0]), score=0.1)
    for k in range(5, 17):
        move(found[0], k, far(k, 0.3))
    errors = find_errors(truth, [*found, better], COCO)
    kept = corrected(errors, ("duplicate",), SIGMAS)
    assert len(kept) == 2 and kept[0]["keypoints"] == better["keypoints"] and kept[0]["score"] == found[0]["score"]


def test_a_keypoint_set_without_sides_has_no_inversions():
    truth, found, _ = planted()
    table = error_table(find_errors(truth, found, replace(COCO, flip=None)), truth, COCO, 0.5)
    kinds = {name: table[name]["count"] for name in KINDS[2:]}
    assert kinds == dict(inversion=0, swap=1, miss=3), "nor does the right knee look like the neighbour's left one"


def test_on_its_circle_every_keypoint_gives_the_oks_that_is_written_there():
    target = standing(0, 0)
    for radius, value in zip(oks_radii(SCALE ** 2, SIGMAS), CIRCLES):
        moved = target[:, :2] + radius[:, None] * [np.sqrt(0.5), -np.sqrt(0.5)]
        assert oks(moved, target, np.array(SCALE ** 2), SIGMAS) == pytest.approx(value)


def test_a_crop_lies_in_the_picture_and_holds_what_is_there():
    picture = Image.new("RGB", (100, 50))
    for points in ([[10, 10], [30, 45]], [[-50, -50], [500, 500]], [[300, 300], [310, 310]], [[99, 49], [99, 49]]):
        crop, corner = crop_around(picture, np.array(points, float))
        assert min(crop.size) >= 1 and (corner >= 0).all() and (corner + crop.size <= picture.size).all()
    crop, corner = crop_around(picture, np.array([[10, 10], [30, 45]], float))
    assert (corner <= [10, 10]).all() and (corner + crop.size >= [30, 45]).all()


def test_a_set_gives_tables_and_pictures_and_without_labels_one_line(tmp_path):
    truth, found, _ = planted()
    data = dataset_of(truth, tmp_path)
    lines = "\n".join(diagnose(predictions_of(found), data, 0.5, tmp_path))
    assert "5 of 6 people found" in lines and "right_ankle" in lines
    assert min(Image.open(tmp_path / "worst.png").size) > 200 and min(Image.open(tmp_path / "oks.png").size) > 200
    for data.metric in ("coco", "crowdpose"):                   # whose areas are those of boxes
        errors = find_errors(truth_to_diagnose(data), metrics.to_results(predictions_of(found)), COCO)
        assert errors.ap == metrics.evaluate(predictions_of(found), data)["AP"]
    nobody = dataset_of(dict(truth, annotations=[], categories=[dict(id=1, keypoints=COCO.keypoints)]), tmp_path)
    with pytest.raises(UserError, match="nobody has a labelled keypoint"):
        truth_to_diagnose(nobody)
