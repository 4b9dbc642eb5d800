"""The embedded dataset: same seed same data, honest labels, left and right, layouts, and no half-made folder."""
import json
import os
import subprocess
import sys
import time
from common.errors import UserError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import puppets
from data.puppets import COCO, FRAMES, INDEX, JOINTS, Canvas, Person, Scene, Thing, annotate, joints_of, make

SMALL = {"coco": {"train": 8, "val": 14}, "crowd": {"val": 4}, "video": {"train": 1, "val": 2}, "ood": {"val": 14}}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("puppets")
    for part, counts in SMALL.items():
        make(root, part, seed=3, workers=1, progress=False, counts=counts)
    return root


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def standing(yaw: float, **changes) -> Person:
    """An adult in the middle of a 160-pixel image, arms slightly away from the body."""
    pose = np.zeros(20)
    pose[[7, 11, 15, 18]] = 25, 25, 6, 6
    colours = dict(skin=(220, 180, 150), hair=(40, 30, 20), shirt=(180, 60, 60), legs=(40, 60, 140), shoes=(30, 30, 30))
    person = Person(80, 150, 120, yaw, 0, 0, pose, 1., 0., colours, 1., "trousers", False, False)
    return replace(person, **changes)


def picture_of(*layers) -> tuple[Canvas, list[dict]]:
    walls = [(0, 0, 0, (90, 90, 90), (160, 160, 160))] * 2
    canvas = Canvas(Scene(160, 0, (-.6, -.8), 80, walls, list(layers), (0, 0, 1)))
    return canvas, annotate(canvas)


def visibility(found: dict) -> dict:
    return dict(zip(JOINTS, found["joints"][:, 2].astype(int)))


def test_a_sample_of_the_data_is_what_it_was():
    """Annotations exactly; pixels as means of 40x40 blocks, because Pillow's rasteriser may move an edge."""
    expected = {
        0: ([3079.1, 1579.0, 3218.4], [[121, 20, 39, 123], [0, 0, 91, 152], [53, 51, 59, 109]],
            [117, 134, 130, 116, 132, 131, 95, 79, 127, 108, 74, 104, 85, 101, 93, 93]),
        2: ([1689.4, 3637.3, 3034.0], [[0, 20, 56, 128], [128, 23, 32, 128], [37, 21, 100, 132]],
            [153, 150, 143, 130, 174, 118, 123, 107, 115, 130, 123, 182, 146, 180, 186, 174]),
    }
    for index, (keypoints, boxes, blocks) in expected.items():
        canvas, found = puppets.split_scene(160, 0, "val", index)
        assert [round(float(person["joints"].sum()), 1) for person in found] == keypoints
        assert [person["bbox"] for person in found] == boxes
        gray = np.asarray(puppets.develop(canvas.picture, canvas.scene).convert("L"), float)
        assert np.allclose(gray.reshape(4, 40, 4, 40).mean((1, 3)).ravel(), blocks, atol=3)


def test_each_image_depends_only_on_seed_split_and_index(made, tmp_path):
    again = make(tmp_path, "coco", seed=3, workers=2, progress=False, counts=SMALL["coco"] | {"train": 20})
    for file in sorted((made / "coco/val2017").iterdir()):
        assert file.read_bytes() == (again / "val2017" / file.name).read_bytes()
    val = "annotations/person_keypoints_val2017.json"
    assert (made / "coco" / val).read_bytes() == (again / val).read_bytes()
    other = make(tmp_path / "other", "coco", seed=4, workers=1, progress=False, counts={"train": 0, "val": 2})
    assert read(other, val)["annotations"] != read(again, val)["annotations"][:len(read(other, val)["annotations"])]


def test_coco_annotations_keep_the_rules_of_the_format(made):
    for split in ("train", "val"):
        content = read(made / "coco", f"annotations/person_keypoints_{split}2017.json")
        assert content["categories"][0]["keypoints"] == COCO
        assert [a["id"] for a in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
        images = {image["id"]: image for image in content["images"]}
        assert len(images) == SMALL["coco"][split]
        for image in images.values():
            assert Image.open(made / f"coco/{split}2017" / image["file_name"]).size == (image["width"], image["height"])
        for a in content["annotations"]:
            x, y, v = np.reshape(a["keypoints"], (17, 3)).T
            assert set(v) <= {0, 1, 2} and a["num_keypoints"] == (v > 0).sum() and a["image_id"] in images
            assert not x[v == 0].any() and not y[v == 0].any()
            assert (0 <= x).all() and (x <= 159).all() and (0 <= y).all() and (y <= 159).all()
            assert 0 < a["area"] <= a["bbox"][2] * a["bbox"][3]


def test_splits_hold_what_they_promise():
    """4 % of images without people, 1 to 4 people elsewhere, some crowds, a few per cent of joints unlabelled."""
    people, crowds, unlabelled = [], 0, []
    for index in range(150):
        canvas, found = puppets.split_scene(96, 0, "train", index)
        people.append(len(found))
        crowds += any(isinstance(layer, puppets.Group) for layer in canvas.scene.layers)
        for person, body in zip(found, canvas.bodies):
            inside = ((body.joints[:, :2] > 0) & (body.joints[:, :2] < 95)).all(1)
            unlabelled += (person["joints"][inside, 2] == 0).tolist()
    assert max(people) <= 4 and 0 < people.count(0) < 20 and 1.5 < np.mean(people) < 2.3
    assert 1 <= crowds <= 20 and .015 < np.mean(unlabelled) < .05


def test_facing_decides_left_and_right_and_what_is_seen():
    def left_minus_right(person, name):
        joints = joints_of(person).joints
        return joints[INDEX[f"left_{name}"], 0] - joints[INDEX[f"right_{name}"], 0]

    for name in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle"):
        assert left_minus_right(standing(0), name) > 3 and left_minus_right(standing(180), name) < -3
    front, back = (visibility(picture_of(standing(yaw))[1][0]) for yaw in (0, 180))
    assert set(front.values()) == {2}
    assert {name for name, v in back.items() if v == 1} == {"nose", "left_eye", "right_eye"}
    person = standing(90)                                           # faces right: its left side is far away
    person.pose[[6, 10]] = 60                                       # arms forward, not before the hip
    right = visibility(picture_of(person)[1][0])
    assert right["nose"] == right["right_ear"] == right["right_shoulder"] == right["right_hip"] == 2
    assert right["left_ear"] == right["left_shoulder"] == right["left_eye"] == right["left_hip"] == 1


def test_a_mirrored_pose_seen_from_the_front_mirrors_the_picture():
    """Nothing but the facing tells left from right, so colours must mirror with the limbs."""
    person = standing(20)
    person.pose[6], person.pose[14], person.pose[16], person.pose[2] = 80, 30, 40, 8
    order = [*range(6), *range(10, 14), *range(6, 10), *range(17, 20), *range(14, 17)]
    mirrored = person.pose[order] * np.where(np.isin(np.arange(20), (1, 2, 4, 5)), -1, 1)
    twin = replace(person, pose=mirrored, yaw=-20, x=159 - 80)
    left_of = [INDEX[name.replace("left", "?").replace("right", "left").replace("?", "right")] for name in JOINTS]
    a, b = joints_of(person).joints, joints_of(twin).joints[left_of]
    assert np.allclose(a[:, 1:], b[:, 1:]) and np.allclose(a[:, 0], 159 - b[:, 0])
    first, second = picture_of(person)[0].id_map() > 0, picture_of(twin)[0].id_map()[:, ::-1] > 0
    assert (first != second).mean() < .01


def test_joints_are_hidden_by_objects_and_people_and_lost_outside():
    pole = Thing("box", 80, 130, 70, 50, 0., (200, 200, 0))
    v = visibility(picture_of(standing(0), pole)[1][0])
    assert v["left_knee"] == v["right_ankle"] == 1 and v["nose"] == v["left_hip"] == 2
    hidden, shown = picture_of(standing(0, ground=140, height=90), standing(0))[1]
    assert visibility(hidden)["nose"] == 1 and set(visibility(shown).values()) == {2}
    cut = picture_of(standing(0, ground=220))[1][0]
    assert visibility(cut)["left_ankle"] == 0 and not cut["joints"][INDEX["left_ankle"]].any()
    assert cut["bbox"][1] + cut["bbox"][3] == 160


def test_box_and_area_are_those_of_the_seen_pixels():
    canvas, found = picture_of(standing(0, x=60), standing(40, x=95))
    for number, person in enumerate(found, 1):
        rows, columns = np.nonzero(canvas.id_map() // puppets.FIRST == number)
        x, y, w, h = person["bbox"]
        assert (x, y, x + w - 1, y + h - 1) == (columns.min(), rows.min(), columns.max(), rows.max())
        assert person["area"] == len(rows)
        seen = person["joints"][person["joints"][:, 2] == 2]
        assert (abs(seen[:, :2] - (x + w / 2, y + h / 2)) <= (w / 2 + 2, h / 2 + 2)).all()


def test_ood_has_the_annotations_of_val_on_other_pictures(made):
    name = "annotations/person_keypoints_val2017.json"
    assert (made / "ood" / name).read_bytes() == (made / "coco" / name).read_bytes()
    for file in (made / "coco/val2017").iterdir():
        photo, redrawn = (np.asarray(Image.open(path), float) for path in (file, made / "ood/val2017oil" / file.name))
        assert photo.shape == redrawn.shape and abs(photo - redrawn).mean() > 4


def test_crowds_carry_both_annotations_and_a_crowd_index(made):
    coco = read(made / "crowd", "annotations/person_keypoints_val2017.json")
    crowd = read(made / "crowd", "json/crowdpose_test.json")
    assert set(crowd) == {"images", "annotations", "categories"} and len(crowd["categories"][0]["keypoints"]) == 14
    assert len(crowd["annotations"]) == len(coco["annotations"])
    for a, b in zip(crowd["annotations"], coco["annotations"]):
        assert a["bbox"] == b["bbox"] and a["keypoints"][:36] == b["keypoints"][15:] and len(a["keypoints"]) == 42
        assert "area" not in a and a["num_keypoints"] == sum(v > 0 for v in a["keypoints"][2:36:3])
        assert set(a["keypoints"][38::3]) <= {0, 1}
    for image in crowd["images"]:
        own = [a for a in crowd["annotations"] if a["image_id"] == image["id"]]
        assert image["crowdIndex"] == puppets.crowd_index(own) and (made / "crowd/images" / image["file_name"]).exists()


def test_crowd_index_is_the_mean_share_of_foreign_joints_in_each_box():
    def person(box, *xy):
        return dict(bbox=box, keypoints=[number for x, y in xy for number in (x, y, 1)])

    a = person([0, 0, 10, 10], (1, 1), (2, 2), (3, 3), (9, 9))
    b = person([8, 8, 10, 10], (12, 12), (9, 10))                    # (9, 10) lies in a's box, a's (9, 9) in b's
    assert puppets.crowd_index([a, b]) == pytest.approx((1 / 4 + 1 / 2) / 2, abs=.006)           # two decimals
    assert puppets.crowd_index([a]) == puppets.crowd_index([]) == 0


def test_video_has_the_layout_of_posetrack18(made):
    files = sorted((made / "video/annotations/val").glob("*.json"))
    assert len(files) == 2
    for file in files:
        content = read(file.parent, file.name)
        assert content["categories"][0]["keypoints"][:5] == ["nose", "head_bottom", "head_top", "left_ear", "right_ear"]
        for number, image in enumerate(content["images"]):
            assert image["id"] == image["frame_id"] == int(f"1{image['vid_id']}{number:04d}")
            assert image["nframes"] == FRAMES["val"] == len(content["images"]) and (made / "video" / image["file_name"]).exists()
            assert len(image["ignore_regions_x"]) == len(image["ignore_regions_y"])
        labelled = {image["id"] for image in content["images"] if image["is_labeled"]}
        for a in content["annotations"]:
            v = np.array(a["keypoints"][2::3])
            assert a["image_id"] in labelled and set(v) <= {0, 1} and not v[3:5].any() and len(v) == 17
            assert min(a["bbox_head"][2:]) > 0 and a["track_id"] == a["id"] % 100


def test_people_in_a_clip_move_smoothly_and_keep_their_track():
    clip = puppets.sample_clip(np.random.default_rng(5), 160, FRAMES["val"])
    frames = [[joints_of(layer).joints for layer in clip(t).layers if isinstance(layer, Person)] for t in range(FRAMES["val"])]
    people = np.array(frames)[..., :2]                               # (T, P, 19, 2)
    step, jerk = np.diff(people, axis=0), np.diff(people, n=2, axis=0)
    assert .1 < abs(step).max() < 16 and abs(jerk).max() < 8         # pixels per frame, of 160


def test_what_passes_hides_a_joint_that_the_frames_before_and_after_show(monkeypatch):
    """Of the joints that are hidden only because something passes, most are seen one frame earlier and one later."""
    def visibility(seed: int, share: float) -> np.ndarray:
        monkeypatch.setattr(puppets, "PASSERS", share)
        clip = puppets.sample_clip(np.random.default_rng(seed), 96, 5)
        return np.array([[person["joints"][:, 2] for person in puppets.annotate(puppets.Canvas(clip(t)))] for t in range(5)])

    seen = []
    for seed in range(6):
        alone, passed = visibility(seed, 0.0), visibility(seed, 0.7)                             # (5, P, 19)
        hidden = (alone[1:-1] == 2) & (passed[1:-1] == 1)
        seen += (passed[:-2] == 2)[hidden].tolist() + (passed[2:] == 2)[hidden].tolist()
    assert len(seen) > 60 and np.mean(seen) > 0.6


def test_what_passes_covers_the_joint_that_it_aims_at_and_is_sharp():
    rng = np.random.default_rng(0)
    person = next(layer for layer in puppets.sample_scene(rng, 160, 1).layers if isinstance(layer, Person))
    passers = [passer for t in range(200) for passer in puppets.sample_passers(rng, person, 160, t)]
    assert 0.6 < len(passers) / 200 < 0.8
    for thing, _, right, down in passers:
        assert np.linalg.norm(joints_of(person).joints[:, :2] - (thing.x, thing.y), axis=1).min() < 1e-6
        assert np.hypot(right, down) > 1.19 * max(thing.w, thing.h)
    clip = puppets.sample_clip(np.random.default_rng(7), 160, 5)
    last = [(frame.layers[-1].x, frame.layers[-1].y) for frame in (clip(1.8), clip(2), clip(2.2))]
    assert np.ptp(last, axis=0).max() < 2, "it stands still while a frame is exposed, but for the camera"


def test_an_interrupted_run_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    folders, make_one, _ = puppets.PARTS["coco"]
    monkeypatch.setitem(puppets.PARTS, "coco", (folders, make_one, stop))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, "coco", workers=1, progress=False, counts={"train": 2, "val": 1})
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert (make(tmp_path, "coco", workers=1, progress=False, counts={"train": 2, "val": 1}) / "train2017").is_dir()


def test_stale_temporary_folders_of_ours_go_and_all_others_stay(tmp_path):
    stale, fresh, theirs = ".coco-0123abcd.tmp", ".crowd-0123abcd.tmp", ".anything.tmp"
    for name in (stale, fresh, theirs):
        (tmp_path / name / "train2017").mkdir(parents=True)
    for name in (stale, theirs):
        for path in (tmp_path / name, tmp_path / name / "train2017"):
            os.utime(path, (time.time() - 7200,) * 2)
    make(tmp_path, "coco", workers=1, progress=False, counts={"train": 1, "val": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([fresh, theirs, "coco"])


def test_two_processes_that_make_the_same_part_both_end_well(tmp_path):
    code = (f"from data.puppets import make; print(make({str(tmp_path)!r}, 'coco', workers=1, progress=False, "
            "counts={'train': 12, 'val': 2}))")
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=Path(puppets.__file__).parents[1], stdout=subprocess.PIPE)
            for _ in range(2)]
    assert [run.communicate()[0].decode().strip() for run in both] == [str(tmp_path / "coco")] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]
    assert len(list((tmp_path / "coco/train2017").iterdir())) == 12


def test_a_folder_made_with_other_numbers_is_refused(made, tmp_path):
    assert make(made, "coco", seed=3, counts=SMALL["coco"]) == made / "coco"
    with pytest.raises(UserError, match="size 160 instead of 96"):
        make(made, "coco", size=96, seed=3, counts=SMALL["coco"])
    with pytest.raises(UserError, match="seed 3 instead of 0"):
        make(made, "coco", counts=SMALL["coco"])
    (tmp_path / "coco").mkdir()
    with pytest.raises(UserError, match="not a puppets dataset"):
        make(tmp_path, "coco")
    with pytest.raises(UserError, match="choose from coco, crowd, video, ood"):
        make(tmp_path, "horses")
