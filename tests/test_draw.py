"""Drawings show what they are given, at any size, and never stop a run."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common import draw
from common.records import Prediction
from common.splits import open_dataset
from common.draw import (HOLLOW, LINES, SOLID, captioned, clips_first, colours, contact_sheet, draw_ellipses, draw_panel,
                         draw_people, draw_points, draw_predictions, plot_curves, side_of, states, ticks)
from common.skeletons import SKELETONS, get_skeleton

COCO = get_skeleton("coco")


def pose(width: int, height: int, people=1) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 0.9, (people, 17, 2)) * [width, height]


@pytest.mark.parametrize("size", [(192, 192), (640, 480), (3840, 2160)])
@pytest.mark.parametrize("background", [(0, 0, 0), (255, 255, 255), (40, 150, 255)])
def test_every_keypoint_stands_out_from_its_surroundings_at_any_size(size, background):
    xy = pose(*size)
    drawn = draw_people(Image.new("RGB", size, background), xy, None, COCO)
    zoom = drawn.width // size[0]
    pixels, reach = np.asarray(drawn).astype(int), round(0.02 * drawn.width)
    for x, y in np.round(xy[0] * zoom).astype(int):
        patch = pixels[max(y - reach, 0):y + reach, max(x - reach, 0):x + reach].reshape(-1, 3)
        assert np.abs(patch - background).sum(1).max() > 150                # the joint, or its rim
    assert min(drawn.size) >= 384 and (np.abs(pixels - background).sum(2) > 0).mean() < 0.3


def test_small_images_are_enlarged_and_large_ones_keep_their_size():
    for size, expected in [((192, 128), (576, 384)), ((640, 480), (640, 480)), ((3000, 10), (3000, 10))]:
        assert draw_people(Image.new("L", size), pose(*size), None, COCO).size == expected


def test_nobody_to_draw_leaves_the_image_as_it_is():
    image = Image.effect_noise((400, 400), 60).convert("RGB")
    for keypoints in (np.zeros((0, 17, 2)), np.zeros((1, 17, 3)), np.full((1, 17, 2), np.nan)):
        people = len(keypoints)
        drawn = draw_people(image, keypoints, np.ones((people, 17)), COCO, person_scores=np.ones(people))
        assert np.array_equal(drawn, image)


def test_hidden_and_doubtful_keypoints_are_rings():
    keypoints = np.array([[[50, 50, 0], [50, 50, 1], [50, 50, 2], [np.inf, 0, 2]]], dtype=float)
    assert states(keypoints, None).tolist() == [[0, HOLLOW, SOLID, 0]]
    assert states(keypoints, np.array([[1, 1, 0.1, 1]])).tolist() == [[0, HOLLOW, HOLLOW, 0]]
    centre = {}
    for v in (1, 2):
        one = np.zeros((1, 17, 3))
        one[0, 5] = 200, 200, v
        centre[v] = np.asarray(draw_people(Image.new("RGB", (400, 400), "white"), one, None, COCO))[200, 200]
    assert centre[1].max() < 60 < centre[2].max()


def test_an_ellipse_reaches_two_deviations_from_the_mean_in_each_direction():
    """Guesses along a line of slope 3/4: deviation 20 px along it, none across."""
    draws = np.full((2, 1, 17, 2), 200.0)
    draws[0] -= (16, 12)
    draws[1] += (16, 12)
    pixels = np.asarray(draw_ellipses(Image.new("RGB", (400, 400)), draws, COCO)).sum(2)
    y, x = np.nonzero(pixels)
    along, across = ((x - 200) * 4 + (y - 200) * 3) / 5, ((y - 200) * 4 - (x - 200) * 3) / 5
    assert 38 < along.max() < 43 and -43 < along.min() < -38 and np.abs(across).max() < 4
    assert draw_ellipses(Image.new("RGB", (40, 20)), np.zeros((3, 0, 17, 2)), COCO).size == (800, 400)


@pytest.mark.parametrize("name", SKELETONS)
def test_left_and_right_limbs_have_different_colours(name):
    s = SKELETONS[name]
    sides = [side_of(s, k) for k in range(s.num_keypoints)]
    assert all(sides[k] == -sides[m] for k, m in enumerate(s.flip))
    for side, (r, g, b) in zip(sides, colours(sides)):
        assert side == 0 or (b > r if side < 0 else r > b)
    assert side_of(COCO, 5) == -1 and side_of(COCO, 6) == 1 and side_of(COCO, 0) == 0


def test_boxes_scores_and_coordinates_far_outside_are_drawn_without_complaint():
    keypoints, boxes = pose(400, 400, 3), np.array([[10, 10, 90, 90], [-50, 300, 900, 500], [60, 60, 20, 20.]])
    keypoints[0, 0] = 1e12, -1e12
    image = Image.new("RGB", (400, 400))
    plain = np.asarray(draw_people(image, keypoints, None, COCO))
    full = np.asarray(draw_people(image, keypoints, None, COCO, boxes, np.array([0.9, 0.2, 0.5])))
    assert full[50, 10].min() > 200 and (plain != full).any(2).sum() > 1000


def test_contact_sheet_holds_every_image():
    images = [Image.new("RGB", (100, 60 + 20 * i), (10 + i, 0, 0)) for i in range(5)]
    sheet = np.asarray(contact_sheet(images, columns=2, cell=100))
    assert {10 + i for i in range(5)} <= set(sheet[..., 0][sheet[..., 1] == 0].tolist())
    assert contact_sheet([], 3).size[0] > 0 and contact_sheet(images[:1] * 7, 4).width < 450


@pytest.mark.parametrize("rows", [
    [], [{"step": 0, "loss": 1.0}], [{"step": 5, "loss": float("nan"), "AP": -1.0}],
    [{"step": 1, "note": "text", "ok": True}], [{"step": s, "loss": 0.0} for s in range(3)],
    [{"step": s, "loss": 10.0 ** -s, "lr": 1e-4} for s in range(300)],
    [{"step": 7, "AP": 0.1}, {"step": 7, "AP": 0.2}], [{"step": s, "gain": -1e9 * s} for s in range(40)]])
def test_curves_of_any_log_are_drawn(rows, tmp_path):
    plot_curves(rows, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width >= 400


def test_curves_put_each_loss_in_its_panel_and_all_aps_in_one(tmp_path):
    rows = [{"step": s, "epoch": s // 10, "loss_a": 1 / s, "loss_b": s, "loss_c": float("nan"),
             "AP": s / 99, "AP50": s / 60, "AR": 0.51 + s / 999} for s in range(1, 50)]
    plot_curves(rows, tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png"))
    assert pixels.shape == (600, 1320, 3)                   # loss_a, loss_b, AP; AR: no loss_c, no epoch
    blue, orange = ((np.abs(pixels.astype(int) - colour).sum(2) < 120) for colour in LINES[:2])
    assert all(blue[:300, 440 * i:440 * (i + 1)].sum() > 100 for i in range(3)) and blue[300:, :440].sum() > 100
    assert orange[:300, 880:].sum() > 100 and orange[:, :880].sum() == 0     # AP50 is the only second line


@pytest.mark.parametrize("values", [[0.0], [0.0, 1e-5], [0.3, 0.9], [1e-6, 0.5]])
def test_an_axis_of_ap_starts_at_0_and_is_never_logarithmic(values, monkeypatch):
    axes = []
    monkeypatch.setattr(draw, "ticks", lambda *axis: axes.append(axis) or [])
    draw_panel("AP", {"AP": list(enumerate(values))}, 0, 1)
    low, high, logarithmic = axes[0]
    assert low == 0 and max(values) < high <= max(1.5 * max(values), 1e-4 if max(values) else 1) and not logarithmic


def test_a_caption_stands_above_the_picture_on_as_many_lines_as_it_needs():
    picture = Image.new("RGB", (200, 50), (9, 99, 9))
    short, long = (captioned(picture, "what is seen here, said in words " * n) for n in (1, 3))
    assert short.width == long.width == 200 and 50 < short.height < long.height
    assert (np.asarray(long)[-50:] == (9, 99, 9)).all() and np.ptp(np.asarray(long)[:-50]) > 100


def test_of_videos_one_frame_of_each_comes_first():
    frames = [SimpleNamespace(image=Path(clip, f"{n}.jpg")) for clip in ("a", "b", "c") for n in range(3)]
    data = type("Clips", (list,), dict(metric="posetrack"))(frames)
    assert clips_first(data) == [1, 4, 7, 0, 2, 3, 5, 6, 8]
    data.metric = "coco"
    assert clips_first(data) == list(range(9))


def test_the_more_a_point_weighs_the_larger_it_is():
    image, area = Image.new("RGB", (400, 400)), []
    for weight in (0.0, 0.5, 1.0):
        area.append((np.asarray(draw_points(image, np.array([[200.0, 200.0]]), np.array([weight]))).sum(2) > 0).sum())
    assert 0 < area[0] < area[1] < area[2] < 500


def test_ticks_are_round_numbers_inside_the_range():
    assert ticks(0, 1) == pytest.approx([0, .2, .4, .6, .8, 1]) and ticks(-3, 3) == [-2, 0, 2]
    assert ticks(-1.2, 1.1, logarithmic=True) == pytest.approx([.1, .2, .5, 1, 2, 5, 10])


def test_predictions_are_drawn_beside_the_labels(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    category = {"id": 1, "name": "person", "keypoints": list(COCO.keypoints)}
    truth = {"images": [], "annotations": [], "categories": [category]}
    for i in range(3):
        name = f"{i + 1:012d}.jpg"
        Image.new("RGB", (200, 200), (90, 90, 90)).save(tmp_path / "val2017" / name)
        truth["images"].append(dict(id=i + 1, file_name=name, width=200, height=200))
        labels = np.c_[pose(200, 200)[0], np.full(17, 2 * (i > 0))].ravel().tolist()
        truth["annotations"].append(dict(id=i + 1, image_id=i + 1, category_id=1, bbox=[0, 0, 200, 200],
                                         keypoints=labels))
    (tmp_path / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(truth))
    data = open_dataset(str(tmp_path), "val")
    found = [Prediction(i + 1, pose(200, 200), np.ones((1, 17)), np.array([score]))
             for i, score in enumerate((0.9, 0.9, 0.1))]
    sheet = np.asarray(draw_predictions(data, found)).astype(int)
    halves = np.array_split(np.abs(sheet - 90).sum(2) > 100, 4, axis=1)      # labels, found, labels, found
    assert [half[20:-20, 20:-20].any() for half in halves] == [True, True, True, False]   # image 1: no labels
    assert draw_predictions(data, []).width > 0
