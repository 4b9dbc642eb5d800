"""Readers on real samples, on made-up folders of every layout, and on everything that can be wrong with them."""
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.records import BadImage, load_image
from data import puppets
from common.splits import default_splits, open_dataset
from common.skeletons import SKELETONS
from tests.helpers import golden

COCO = {"id": 1, "name": "person", "keypoints": list(SKELETONS["coco"].keypoints), "skeleton": [[16, 14]]}
CROWDPOSE = {"id": 1, "name": "person", "keypoints": list(SKELETONS["crowdpose"].keypoints)}


def picture(w: int = 60, h: int = 40) -> Image.Image:
    """Smooth colours, dark on the left and bright on the right."""
    x, y = np.meshgrid(np.linspace(0, 255, w), np.linspace(0, 255, h))
    return Image.fromarray(np.stack([x, x, (x + y) / 2], 2).astype(np.uint8))


def image(image_id, name=None, **fields) -> dict:
    return {"id": image_id, "file_name": name or f"{image_id}.jpg", "width": 60, "height": 40} | fields


def person(annotation_id, image_id, count: int = 17, **fields) -> dict:
    """A good annotation: two labelled keypoints, at (20, 15) and (30, 25)."""
    keypoints = [20, 15, 2, 30, 25, 1] + [0] * 3 * (count - 2)
    return {"id": annotation_id, "image_id": image_id, "category_id": 1, "bbox": [10, 10, 30, 20], "area": 400.0,
            "iscrowd": 0, "num_keypoints": 2, "keypoints": keypoints} | fields


def write(root: Path, images: list, people: list, categories=(COCO,), split: str = "val",
          file: str = "annotations/person_keypoints_{}2017.json", folder: str = "{}2017") -> Path:
    """A dataset folder, COCO's layout if nothing else is said; every image gets a picture."""
    (root / file.format(split)).parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": people, "categories": list(categories)}
    (root / file.format(split)).write_text(json.dumps(content))
    for entry in images:
        path = root / folder.format(split) / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path)
    return root


def opened(root: Path, images: list, people: list, **options):
    return open_dataset(str(write(root, images, people, **options)), "val")


def notes(dataset) -> str:
    return "\n".join(dataset.report().splitlines()[1:])


# ---------------------------------------------------------------- real samples

@pytest.mark.parametrize("folder, split, images, peopled, people, posed, labelled, crowds", [
    ("coco", "train", 80, 36, 167, 86, 800, 5), ("coco", "val", 39, 19, 58, 34, 310, 0),
    ("coco4", "val", 4, 4, 14, 12, 181, 0), ("crowdpose", "test", 2, 2, 5, 4, 47, 0)])
def test_real_samples_have_the_published_counts(
        pose_data, folder, split, images, peopled, people, posed, labelled, crowds):
    dataset = open_dataset(str(pose_data / folder), split)
    assert f"{images} images, {peopled} with people; {people} people, {posed} with keypoints; " \
           f"{labelled} labelled keypoints; {crowds} crowd regions" in dataset.report()
    assert notes(dataset) == "" and len(dataset) == images
    assert dataset.skeleton.name == dataset.metric == ("crowdpose" if folder == "crowdpose" else "coco")


def test_real_pictures_have_the_stated_size_and_hold_their_people(pose_data):
    dataset = open_dataset(str(pose_data / "coco"), "train").training()
    assert len(dataset) == 28 and np.all(np.diff(dataset.ids[dataset.rows]) > 0)
    for i in range(0, len(dataset), 4):
        sample, message = dataset.load(i)
        assert message == "" and sample.image.size == sample.size and sample.image.mode == "RGB"
        labelled = sample.keypoints[sample.keypoints[..., 2] > 0]
        assert len(labelled) and (labelled[:, :2] >= 0).all() and (labelled[:, :2] <= sample.size).all()


def test_wholebody_joins_its_five_fields(pose_data):
    dataset = open_dataset(str(pose_data / "coco4"), "val", "wholebody")
    body = open_dataset(str(pose_data / "coco4"), "val")
    assert dataset.keypoints.shape[1:] == (133, 3) and dataset.metric == "wholebody"
    np.testing.assert_array_equal(dataset.keypoints[:, :17], body.keypoints)
    assert set(np.unique(dataset.keypoints[..., 2])) == {0, 1, 2}       # the file has fractions


@golden("metrics/co*_gt.json", "metrics/crowdpose*_gt.json")
def test_ground_truth_is_the_file_where_nothing_is_wrong(file, tmp_path):
    content = json.loads(file.read_text())
    crowdpose = dict(file="json/crowdpose_{}.json", folder="images") if file.name.startswith("crowdpose") else {}
    write(tmp_path, content["images"], [], **crowdpose)
    next(tmp_path.rglob("*.json")).write_text(file.read_text())
    dataset = open_dataset(str(tmp_path), "val")
    ours = dataset.ground_truth()
    assert [i["id"] for i in ours["images"]] == sorted(i["id"] for i in content["images"])
    assert [a["id"] for a in ours["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    theirs = sorted(content["annotations"], key=lambda a: a["image_id"])
    for a, b in zip(ours["annotations"], theirs, strict=True):
        area = b.get("area") if dataset.metric == "coco" else 0.53 * b["bbox"][2] * b["bbox"][3]
        assert (a["image_id"], a["bbox"], a["num_keypoints"]) == (b["image_id"], b["bbox"], b["num_keypoints"])
        assert a["area"] == pytest.approx(area, rel=1e-12) and a["iscrowd"] == b["iscrowd"]
        joints, given = np.reshape(a["keypoints"], (-1, 3)), np.reshape(b["keypoints"], (-1, 3))
        np.testing.assert_array_equal(joints[given[:, 2] > 0], given[given[:, 2] > 0])


# ---------------------------------------------------------------- layouts

def test_crowdpose_areas_counts_and_crowd_index(tmp_path):
    people = [person(7, 3, 14, num_keypoints=0), person(8, 3, 14)]
    del people[0]["area"], people[1]["num_keypoints"]
    people[1]["keypoints"][36:] = [1, 1, 2, 2, 2, 2]                    # head and neck do not count
    dataset = opened(tmp_path, [image(3, crowdIndex=0.4)], people, categories=[CROWDPOSE],
                     file="annotations/crowdpose_{}.json", folder="images")
    truth = dataset.ground_truth()
    assert truth["images"][0]["crowdIndex"] == 0.4 and dataset.metric == "crowdpose"
    assert [a["num_keypoints"] for a in truth["annotations"]] == [0, 2]
    np.testing.assert_allclose(dataset[0].areas, 0.53 * 30 * 20)


def test_crowdpose_trainval_joins_train_and_val(tmp_path):
    layout = dict(categories=[CROWDPOSE], file="json/crowdpose_{}.json", folder="images")
    write(tmp_path, [image(2)], [person(1, 2, 14)], split="train", **layout)
    write(tmp_path, [image(1)], [person(1, 1, 14)] * 2, split="val", **layout)
    dataset = open_dataset(str(tmp_path), "trainval")
    assert dataset.ids.tolist() == [1, 2] and [len(dataset[i].boxes) for i in (0, 1)] == [2, 1]
    assert default_splits(str(tmp_path)) == ("trainval", "test")
    assert default_splits("puppets") == ("train", "val")


@pytest.mark.parametrize("above", [False, True])
def test_humanart_has_17_or_21_keypoints_and_64_bit_ids(tmp_path, above):
    big = 15_000_000_092_348
    people = [person(1, big, keypoints_21=[5, 5, 2] * 21)]
    write(tmp_path / "HumanArt", [image(big, "images/a/1.jpg")], people, folder=".",
          file="annotations/validation_humanart.json")
    content = tmp_path / "HumanArt/annotations/validation_humanart.json"
    content.write_text(content.read_text().replace("images/a", "HumanArt/images/a"))
    folder = str(tmp_path if above else tmp_path / "HumanArt")
    body, more = open_dataset(folder, "val"), open_dataset(folder, "val", "humanart21")
    assert body[0].keypoints.shape == (1, 17, 3) and more[0].keypoints.shape == (1, 21, 3)
    assert (body.name, body.skeleton.name, body[0].image_id) == ("humanart", "coco", big)
    assert body.load(0)[1] == ""


def test_ood_takes_the_oil_paintings_with_the_annotations_of_val_for_17_and_133_keypoints(tmp_path):
    write(tmp_path, [image(1)], [person(1, 1)], folder="val2017oil")
    assert {open_dataset(str(tmp_path), split).name for split in ("val", "ood")} == {"ood"}
    write(tmp_path, [image(1)], [person(1, 1)])                         # now both kinds of pictures are there
    assert open_dataset(str(tmp_path), "val").name == "coco"
    assert open_dataset(str(tmp_path), "ood")[0].image.parent.name == "val2017oil"
    counts = dict(foot_kpts=6, face_kpts=68, lefthand_kpts=21, righthand_kpts=21)
    body = {name: [20, 15, 2] * count for name, count in counts.items()}
    write(tmp_path, [image(1)], [person(1, 1, **body)], file="annotations/coco_wholebody_{}_v1.0.json")
    painted = open_dataset(str(tmp_path), "ood", "wholebody")
    assert painted[0].keypoints.shape == (1, 133, 3) and painted[0].image.parent.name == "val2017oil"


@pytest.mark.parametrize("file, folder", [
    ("annotations/{}.json", "images/{}"), ("{}.json", "images"), ("{}/_annotations.coco.json", "{}"),
    ("annotations/person_keypoints_{}.json", "{}"), ("{}.json", ".")])
def test_own_keypoints_come_with_names_edges_and_pairs(tmp_path, file, folder):
    crab = {"id": 3, "name": "crab", "keypoints": ["left_claw", "right_claw", "tail"], "skeleton": [[1, 3], [2, 3]]}
    stone = {"id": 1, "name": "stone"}
    people = [person(1, 1, 3, category_id=3), person(2, 1, category_id=1, keypoints=[])]
    write(tmp_path, [image(1)], people, categories=[stone, crab], file=file, folder=folder)
    dataset = open_dataset(str(tmp_path), "val", sigmas=[.1, .1, .05])
    assert dataset.skeleton.flip == (1, 0, 2) and dataset.skeleton.edges == ((0, 2), (1, 2))
    assert dataset.skeleton.sigmas == (.1, .1, .05) and len(dataset[0].boxes) == 1
    assert "of a category without these keypoints (2)" in notes(dataset)


def test_files_without_categories_are_known_by_their_count(tmp_path):
    assert opened(tmp_path, [image(1)], [person(1, 1, 14)], categories=[]).skeleton.name == "crowdpose"
    assert opened(tmp_path, [image(1)], [person(1, 1)], categories=[]).skeleton.name == "coco"
    write(tmp_path, [image(1)], [person(1, 1, 5)], categories=[])
    assert "does not name its 5 keypoints" in one_line(tmp_path)
    write(tmp_path, [image(1)], [], categories=[])                      # pictures without anybody
    assert open_dataset(str(tmp_path), "val", "coco")[0].keypoints.shape == (0, 17, 3)


def test_other_names_for_the_same_number_of_keypoints_are_said(tmp_path):
    renamed = dict(COCO, keypoints=[f"point {k}" for k in range(17)])
    write(tmp_path, [image(1)], [person(1, 1)], categories=[renamed])
    assert "otherwise than skeleton 'coco'" in notes(open_dataset(str(tmp_path), "val", "coco"))
    assert open_dataset(str(tmp_path), "val").skeleton.name == "person"


def test_puppets_are_made_in_the_part_that_a_split_needs(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(puppets, "ROOT", tmp_path)
    monkeypatch.setattr(puppets, "make", lambda root, part: made.append(part) or root / part)
    write(tmp_path / "coco", [image(1)], [person(1, 1)], split="train")
    write(tmp_path / "crowd", [image(1)], [person(1, 1)], folder="images")
    write(tmp_path / "crowd", [image(1)], [person(1, 1, 14)], categories=[CROWDPOSE], split="test",
          file="json/crowdpose_{}.json", folder="images")
    write(tmp_path / "ood", [image(1)], [person(1, 1)], folder="val2017oil")
    found = [open_dataset("puppets", *want) for want in [("train",), ("crowd",), ("crowd", "crowdpose"), ("ood",)]]
    assert made == ["coco", "crowd", "crowd", "ood"] and {d.name for d in found} == {"puppets"}
    assert [d.metric for d in found] == ["coco", "coco", "crowdpose", "coco"]
    with pytest.raises(UserError, match="no split 'valid'"):
        open_dataset("puppets", "valid")


# ---------------------------------------------------------------- what ends in one line

def one_line(folder, split="val", skeleton=None) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(str(folder), split, skeleton)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_empty_folders_are_told_apart(tmp_path):
    assert "no data folder" in one_line(tmp_path / "cocoa") and "data/README.md" in one_line(tmp_path / "cocoa")
    assert "is empty" in one_line(tmp_path)


def test_no_annotation_file_names_what_was_looked_for_and_what_is_there(tmp_path):
    write(tmp_path, [image(1)], [], split="train")
    message = one_line(tmp_path)
    assert "person_keypoints_val2017.json" in message and "crowdpose_val.json" in message
    assert "person_keypoints_train2017.json" in message.split("JSON files there")[1]


def test_json_cut_in_half_names_file_and_position(tmp_path):
    path = write(tmp_path, [image(1)], [person(1, 1)]) / "annotations/person_keypoints_val2017.json"
    path.write_text(path.read_text()[:200])
    message = one_line(tmp_path)
    assert "person_keypoints_val2017.json" in message and "of 200" in message


@pytest.mark.parametrize("text, reason", [
    ("[]", "'images' and 'annotations'"), ('{"images": []}', "'images' and 'annotations'"),
    ('{"images": [], "annotations": []}', "no images"), ("\x00\xff", "cannot read|not complete JSON")])
def test_files_of_another_kind_are_recognised(tmp_path, text, reason):
    write(tmp_path, [], [])
    (tmp_path / "annotations/person_keypoints_val2017.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=reason):
        open_dataset(str(tmp_path), "val")


def test_boxes_without_keypoints_are_no_keypoint_file(tmp_path):
    boxes = person(1, 1)
    del boxes["keypoints"]
    write(tmp_path, [image(1)], [boxes], categories=[{"id": 1, "name": "person"}])
    assert "not a keypoint file" in one_line(tmp_path)


def test_another_number_of_keypoints_is_named_with_both_numbers(tmp_path):
    write(tmp_path, [image(1)], [person(1, 1)])
    message = one_line(tmp_path, skeleton="crowdpose")
    assert "17 keypoints" in message and "has 14" in message
    write(tmp_path, [image(1)], [person(1, 1, 5)], categories=[COCO])   # the category says 17, the people have 5
    assert "5 keypoints" in one_line(tmp_path)


def test_missing_images_are_noticed_at_once(tmp_path):
    write(tmp_path, [image(1), image(2)], [person(1, 1), person(2, 2)])
    (tmp_path / "val2017/2.jpg").unlink()
    assert "(2.jpg)" in notes(open_dataset(str(tmp_path), "val"))
    (tmp_path / "val2017/1.jpg").unlink()
    assert "1.jpg" in one_line(tmp_path) and "val2017" in one_line(tmp_path)


def test_nothing_to_train_on_is_said(tmp_path):
    dataset = opened(tmp_path, [image(1)], [person(1, 1, keypoints=[0] * 51, num_keypoints=0)])
    with pytest.raises(UserError, match="nothing to train on"):
        dataset.training()


# ---------------------------------------------------------------- bad annotations among good ones

@pytest.mark.parametrize("broken, reason", [
    (dict(image_id=99), "their image is not in the list (5)"),
    (dict(image_id=None), "their image is not in the list (5)"),
    (dict(keypoints=[1, 2, 2] * 16), "not 17 keypoints (5)"),
    (dict(keypoints=["x"] * 51), "not 17 keypoints (5)"),
    (dict(bbox=[10, 10, 0, 20], keypoints=[0] * 51, num_keypoints=0), "and no keypoints (5)"),
    (dict(bbox=[10, 10, 5, -2], keypoints=[0] * 51, num_keypoints=0), "and no keypoints (5)"),
    (dict(bbox=[70, 10, 5, 5], keypoints=[0] * 51, num_keypoints=0), "and no keypoints (5)"),
    (dict(bbox=[1, 2], keypoints=[0] * 51, num_keypoints=0), "and no keypoints (5)"),
    (dict(bbox=None, keypoints=None, num_keypoints=0), "and no keypoints (5)")])
def test_useless_annotations_are_skipped_counted_and_named(tmp_path, broken, reason):
    dataset = opened(tmp_path, [image(1)], [person(4, 1), person(5, 1) | broken, person(6, 1)])
    assert len(dataset[0].boxes) == 2 and len(dataset.ground_truth()["annotations"]) == 2
    assert "1 annotations skipped: " in notes(dataset) and reason in notes(dataset)


@pytest.mark.parametrize("bbox", [[10, 10, 0, 20], [30, 30, -20, -20], [70, 10, 5, 5], None, [float("nan")] * 4])
def test_people_with_a_bad_box_get_that_of_their_keypoints(tmp_path, bbox):
    dataset = opened(tmp_path, [image(1)], [person(5, 1, bbox=bbox, area=0)])
    np.testing.assert_allclose(dataset[0].boxes, [[18, 13, 32, 27]])    # (20, 15) to (30, 25) and 2 px
    np.testing.assert_allclose(dataset[0].areas, 0.53 * 14 * 14, rtol=1e-6)
    assert "taken from their keypoints (5)" in notes(dataset)


@pytest.mark.parametrize("field, note", [
    ("area", "without area: 0.53"), ("iscrowd", "without iscrowd"), ("num_keypoints", "wrong num_keypoints")])
def test_missing_fields_get_a_value(tmp_path, field, note):
    incomplete = person(5, 1)
    del incomplete[field]
    truth = (dataset := opened(tmp_path, [image(1)], [incomplete])).ground_truth()["annotations"][0]
    assert (truth["area"], truth["iscrowd"], truth["num_keypoints"]) == (318.0 if field == "area" else 400.0, 0, 2)
    assert note in notes(dataset) and notes(dataset).count("\n") == 0


def test_keypoints_outside_stay_and_impossible_ones_are_unlabelled(tmp_path):
    wild = person(5, 1, num_keypoints=2)
    wild["keypoints"][:15] = [-5, 20, 2, 60, 40, 1, float("nan"), 3, 2, 1e30, 3, 2, 7, 8, 0]
    dataset = opened(tmp_path, [image(1)], [wild])
    np.testing.assert_array_equal(dataset[0].keypoints[0, :5], [[-5, 20, 2], [60, 40, 1]] + [[0, 0, 0]] * 3)
    assert "outside the image: kept (5)" in notes(dataset) and "taken as unlabelled (5)" in notes(dataset)


def test_labels_of_any_kind_become_0_1_2(tmp_path):
    odd = person(5, 1, num_keypoints=4)
    odd["keypoints"][:18] = [1, 1, 0.09, 2, 2, True, 3, 3, 7, 4, 4, -1, 0, 0, 2, 5, 5, None]
    sample = opened(tmp_path, [image(1)], [odd])[0]
    assert sample.keypoints[0, :6, 2].tolist() == [1, 1, 2, 0, 2, 0]    # (0, 0) is a place like any other


def test_ids_as_text_survive_and_match_numbers(tmp_path):
    people = [person("p", "b7"), person("q", 10), person(3, "9")]
    dataset = opened(tmp_path, [image("b7"), image("10"), image(9)], people)
    assert [dataset[i].image_id for i in range(3)] == ["10", "9", "b7"]
    assert [len(dataset[i].boxes) for i in range(3)] == [1, 1, 1]
    truth = dataset.ground_truth()
    assert [i["id"] for i in truth["images"]] == ["10", "9", "b7"]
    assert [a["image_id"] for a in truth["annotations"]] == ["10", "9", "b7"]


def test_duplicate_ids_are_named_and_annotations_numbered_from_1(tmp_path):
    images = [image(2), image(1), image(2, "other.jpg")]
    dataset = opened(tmp_path, images, [person(0, 2), person(0, 1), person(5, 2)])
    assert len(dataset) == 2 and dataset[1].image.name == "2.jpg"
    assert "images skipped: their id appeared before (2)" in notes(dataset) and "appear twice" in notes(dataset)
    assert [(a["id"], a["image_id"]) for a in dataset.ground_truth()["annotations"]] == [(1, 1), (2, 2), (3, 2)]


def test_images_without_size_or_name_or_people(tmp_path):
    images = [image(1, width=None), image(2)]
    write(tmp_path, images, [person(1, 1)])
    path = tmp_path / "annotations/person_keypoints_val2017.json"
    content = json.loads(path.read_text())
    content["images"] += [{"id": 3, "width": 5, "height": 5}]
    path.write_text(json.dumps(content))
    dataset = open_dataset(str(tmp_path), "val")
    assert dataset[0].size == (60, 40) and len(dataset) == 2 and len(dataset.training()) == 1
    nobody, message = dataset.load(1)
    assert nobody.keypoints.shape == (0, 17, 3) and nobody.boxes.shape == (0, 4) and message == ""
    assert "no file_name" in notes(dataset) and "without width and height" in notes(dataset)


def test_crowds_and_people_without_keypoints_are_kept_but_not_trained_on(tmp_path):
    silent = dict(keypoints=[0] * 51, num_keypoints=0)
    people = [person(1, 1, iscrowd=1, **silent), person(2, 2, **silent), person(3, 3), person(4, 3, iscrowd=True)]
    dataset = opened(tmp_path, [image(i) for i in (3, 1, 2)], people)
    assert [sample.iscrowd.tolist() for sample in dataset] == [[True], [False], [False, True]]
    assert [sample.image_id for sample in dataset.training()] == [3]
    assert len(dataset.training().ground_truth()["images"]) == 1 and len(dataset.ground_truth()["images"]) == 3


# ---------------------------------------------------------------- pictures

def bad_pictures(folder: Path) -> dict[str, Path]:
    good = folder / "good.jpg"
    picture().save(good)
    content = good.read_bytes()
    files = {"truncated": content[:len(content) // 2], "corrupt": b"\xff\xd8" + bytes(range(256)), "empty": b"",
             "text": b"404 not found"}
    for name, damaged in files.items():
        (folder / f"{name}.jpg").write_bytes(damaged)
    picture().save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:150])
    return {path.stem: path for path in [*(folder / f"{name}.jpg" for name in files), folder / "cut.png"]}


def test_unreadable_pictures_say_which_and_why(tmp_path):
    for path in [*bad_pictures(tmp_path).values(), tmp_path / "absent.jpg", tmp_path]:
        with pytest.raises(BadImage, match=path.name) as caught:
            load_image(path)
        copied = pickle.loads(pickle.dumps(caught.value))               # as from a loader worker
        assert str(copied) == str(caught.value) and "\n" not in str(copied) and len(copied.args[1]) > 3


def test_a_bad_picture_among_good_ones_is_skipped_and_named_once(tmp_path):
    dataset = opened(tmp_path, [image(1), image(2), image(3)], [person(i, i) for i in (1, 2, 3)])
    bad_pictures(tmp_path)["truncated"].replace(tmp_path / "val2017/2.jpg")
    for epoch in range(2):
        samples, messages = zip(*(dataset.load(i) for i in range(3)))
        new = dataset.remember(messages)
        assert [s is None for s in samples] == [False, True, False]
        assert len(new) == (epoch == 0) and all("2.jpg" in message for message in new)
    assert list(dataset.bad.values()) == [2]
    sample, messages = dataset.load_readable(1)                         # the next one stands in
    assert sample.image_id == 3 and len(messages) == 1 and "2.jpg" in messages[0]


@pytest.mark.parametrize("mode, name", [
    ("L", "a.jpg"), ("CMYK", "a.jpg"), ("P", "a.png"), ("LA", "a.png"), ("RGBA", "a.png"), ("1", "a.png"),
    ("P", "a.gif"), ("I;16", "a.png"), ("I;16", "a.tif")])
def test_every_kind_of_picture_becomes_rgb_that_looks_the_same(tmp_path, mode, name):
    gray = picture().convert("L")
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    else:
        stored = picture().convert(mode)
    stored.save(tmp_path / name)
    loaded = load_image(tmp_path / name)
    assert loaded.mode == "RGB" and loaded.size == (60, 40)
    if mode != "1":                                                     # dots have the right mean only
        assert np.abs(np.asarray(loaded.convert("L"), float) - np.asarray(gray, float)).mean() < 15
    assert np.asarray(loaded)[:, :10].mean() < 60 and np.asarray(loaded)[:, -10:].mean() > 190


def test_rotation_beside_the_pixels_is_applied_unless_the_annotation_did_not_see_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # to be turned by a quarter
    picture().save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg", (60, 40)).size == (60, 40)    # the file's size is that of the raw pixels
    upright = load_image(tmp_path / "a.jpg", (40, 60))
    assert upright.size == load_image(tmp_path / "a.jpg").size == (40, 60)
    assert np.asarray(upright)[:10].mean() < 60                         # its dark left side is the top now
    dataset = opened(tmp_path, [image(1, "a.jpg", width=40, height=60)], [person(1, 1)])
    picture().save(tmp_path / "val2017/a.jpg", exif=exif)
    sample, message = dataset.load(0)
    assert sample.size == sample.image.size == (40, 60) and message == ""


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_where_the_size_cannot_tell_the_rotation_is_applied_and_said(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    dataset = opened(tmp_path, [image(1)], [person(1, 1)])
    picture().save(tmp_path / "val2017/1.jpg", exif=exif)
    sample, message = dataset.load(0)
    assert f"EXIF orientation {orientation}" in message and np.array_equal(sample.image, load_image(tmp_path / "val2017/1.jpg"))
    assert (np.asarray(sample.image)[:, :10].mean() > 190) == (orientation in (2, 3)), "mirrored: dark is right now"


def test_another_size_than_stated_is_said_and_the_picture_counts(tmp_path):
    dataset = opened(tmp_path, [image(1, width=90, height=50)], [person(1, 1)])
    sample, message = dataset.load(0)
    assert sample.size == (60, 40) and "60x40" in message and "90x50" in message
    np.testing.assert_array_equal(sample.boxes, [[10, 10, 40, 30]])


def test_pictures_in_memory_pass_through(tmp_path):
    assert load_image(picture().convert("L")).mode == "RGB"
    assert np.array_equal(np.asarray(load_image(picture())), np.asarray(picture()))


def test_samples_are_copies_and_datasets_travel_to_workers(tmp_path):
    dataset = opened(tmp_path, [image(1)], [person(1, 1)])
    dataset[0].keypoints[:] = 0
    travelled = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(travelled[0].keypoints[0, :2], [[20, 15, 2], [30, 25, 1]])


RAMP = np.tile(np.linspace(0, 1, 64), (40, 1))


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("top", [255, 1023, 4095, 16383, 65535])
def test_deep_gray_keeps_its_brightness(tmp_path, suffix, top):
    Image.fromarray((RAMP * top).round().astype(np.uint16)).save(tmp_path / f"a.{suffix}")
    row = np.asarray(load_image(tmp_path / f"a.{suffix}"))[0, :, 0].astype(int)
    assert np.abs(row - (255 * RAMP[0]).round()).max() <= 1


@pytest.mark.parametrize("top", [1, 255, 4095])
def test_floats_keep_their_brightness_and_nan_is_black(tmp_path, top):
    gray = (RAMP * top).astype(np.float32)
    gray[0, 0] = np.nan
    Image.fromarray(gray).save(tmp_path / "a.tif")
    row = np.asarray(load_image(tmp_path / "a.tif"))[0, :, 0].astype(int)
    assert row[0] == 0 and np.abs(row - (255 * RAMP[0]).round())[1:].max() <= 1


def test_a_dark_frame_of_a_deep_set_is_as_dark_as_beside_its_neighbours(tmp_path):
    dataset = opened(tmp_path, [image(n, f"{n}.png", width=64) for n in (1, 2)], [person(1, 1), person(2, 2)])
    for n, top in (1, 500), (2, 4095):
        Image.fromarray((RAMP * top).round().astype(np.uint16)).save(tmp_path / f"val2017/{n}.png")
    brightest = [np.asarray(dataset.load(i)[0].image).max() for i in range(2)]
    assert brightest == [31, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "gif"])
def test_one_neutral_gray_lies_under_transparency(tmp_path, mode):
    rgba = np.zeros((40, 60, 4), np.uint8)
    rgba[..., :3], rgba[10:30, 20:40] = (71, 112, 76), (200, 200, 200, 255)     # what is hidden must not show
    shown = Image.fromarray(rgba)
    if mode in ("P", "gif"):
        index = Image.fromarray((rgba[..., 3] // 255).astype(np.uint8)).convert("P")
        index.putpalette([0, 255, 0, 200, 200, 200] + [0] * 750)
        shown = index
    name = "a.gif" if mode == "gif" else "a.png"
    (shown.convert("LA") if mode == "LA" else shown).save(tmp_path / name, **(dict(transparency=0) if shown.mode == "P" else {}))
    loaded = load_image(tmp_path / name)
    assert loaded.getpixel((2, 2)) == (127, 127, 127) and loaded.getpixel((30, 20)) == (200, 200, 200)


def test_a_pipe_is_no_picture_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(BadImage, match="pipe"):
        load_image(tmp_path / "a.jpg")


# ---------------------------------------------------------------- what people's files really look like

@pytest.mark.parametrize("image_id, of_person", [(15586, 15586.0), (15586.0, 15586), (15586.0, 15586.0), ("15586", 15586)])
def test_ids_are_the_same_as_numbers_floats_and_text(tmp_path, image_id, of_person):
    dataset = opened(tmp_path, [image(image_id, "a.jpg")], [person(1, of_person, category_id=1.0)])
    assert dataset[0].image_id == 15586 and len(dataset[0].keypoints) == 1


@pytest.mark.parametrize("splits", [("train", "valid"), ("Train", "Validation"), ("TRAIN", "VAL"), ("training", "validation")])
@pytest.mark.parametrize("file, folder", [("{}/_annotations.coco.json", "{}"), ("annotations/person_keypoints_{}.json", "images/{}"),
                                          ("annotations/person_keypoints_{}.json", "images/{}/Data")])
def test_splits_may_be_called_as_other_tools_call_them(tmp_path, splits, file, folder):
    for number, split in enumerate(splits, 1):
        write(tmp_path, [image(number, f"{number}.jpg")], [person(1, number)], split=split, file=file, folder=folder)
    for number, split in (1, "train"), (2, "val"):
        dataset = open_dataset(str(tmp_path), split)
        assert dataset[0].image_id == number and dataset.load(0)[0] is not None


@pytest.mark.parametrize("name", ["..\\..\\media\\upload\\a.jpg", "images\\1/a.jpg", "/media/x/a.jpg", "C:\\data\\a.jpg"])
def test_a_path_of_another_machine_is_found_by_its_last_part(tmp_path, name):
    write(tmp_path, [image(1, "a.jpg")], [person(1, 1)], file="annotations/{}.json", folder="images")
    change(tmp_path, lambda content: content["images"][0].update(file_name=name))
    dataset = open_dataset(str(tmp_path), "val")
    assert dataset.load(0)[0] is not None and "1 images found by the last part of their file_name" in notes(dataset)


@pytest.mark.parametrize("where", ["../../outside/secret.jpg", "{}"])
def test_nothing_outside_the_folder_is_read(tmp_path, where):
    (tmp_path / "outside").mkdir()
    picture().save(tmp_path / "outside" / "secret.jpg")
    write(tmp_path / "in", [image(1, "a.jpg"), image(2, "b.jpg")], [person(1, 1)])
    change(tmp_path / "in", lambda content: content["images"][0].update(file_name=where.format(tmp_path / "outside/secret.jpg")))
    dataset = open_dataset(str(tmp_path / "in"), "val")
    assert [sample.image_id for sample in dataset] == [2] and "1 images not there" in notes(dataset)


def change(root: Path, how) -> None:
    """Change the annotation file of a written dataset."""
    path = next(root.rglob("*.json"))
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def test_one_picture_under_two_ids_is_counted(tmp_path):
    dataset = opened(tmp_path, [image(1, "a.jpg"), image(2, "a.jpg"), image(3, "b.jpg")], [person(1, 1), person(2, 2)])
    assert "2 images that share their file with another id" in notes(dataset) and len(dataset) == 3


def test_exchanged_width_and_height_are_noticed_and_the_person_stays(tmp_path):
    low = dict(bbox=[40, 5, 15, 30], keypoints=[50, 20, 2] + [0] * 48, num_keypoints=1)
    dataset = opened(tmp_path, [image(1, width=40, height=60), image(2)], [person(1, 1, **low), person(2, 2)])
    assert dataset[0].size == (60, 40) and len(dataset[0].boxes) == 1
    assert "1 images whose width and height are exchanged" in notes(dataset)


def test_categories_as_one_object_are_taken_and_its_names_used(tmp_path, capsys):
    own = {"id": 1, "name": "crab", "keypoints": [f"point{n}" for n in range(17)]}
    write(tmp_path, [image(1)], [person(1, 1)])
    change(tmp_path, lambda content: content.update(categories=own))
    skeleton = open_dataset(str(tmp_path), "val").skeleton
    assert skeleton.keypoints[0] == "point0" and skeleton.flip == tuple(range(17))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_categories_the_one_that_fits_the_model_is_used_or_the_one_asked_for(tmp_path, order):
    dog, man = {"id": 2, "name": "dog", "keypoints": [f"p{n}" for n in range(24)]}, COCO
    people = [person(1, 1, 24, category_id=2), person(2, 1, 24, category_id=2), person(3, 1)]
    write(tmp_path, [image(1)], people, categories=[(dog, man)[n] for n in order])
    assert open_dataset(str(tmp_path), "val", "coco").skeleton.name == "coco"
    most = open_dataset(str(tmp_path), "val")
    assert most.skeleton.name == "dog" and "'dog' is used, --category takes another" in notes(most)
    assert open_dataset(str(tmp_path), "val", category="person").skeleton.name == "coco"
    with pytest.raises(UserError, match="no category cat with keypoints: choose from"):
        open_dataset(str(tmp_path), "val", category="cat")


def test_a_table_says_what_it_is_of(tmp_path):
    people = [person(n, 1, bbox=[n, 5, 20, 30]) for n in range(1, 31)] + [person(40, 2, area=1.0), person(41, 2, ignore=1)]
    write(tmp_path, [image(1), image(2), image(3)], people)
    (tmp_path / "val2017/3.jpg").unlink()
    dataset = open_dataset(str(tmp_path), "val")
    (tmp_path / "val2017/2.jpg").write_bytes(b"no picture")
    dataset.remember([dataset.load(i)[1] for i in range(2)])
    said = "\n".join(dataset.caveats())
    assert "1 of 3 images are not there: this table is of the others" in said
    assert "1 images could not be read: their people count as missed" in said
    assert "1 images have more than 20 people" in said and "the areas of 1 people do not suit their boxes" in said
    assert "1 people with ignore: 1" in notes(dataset) and len(dataset.ground_truth()["images"]) == 2


@pytest.mark.parametrize("content", [
    "[" * 100_000, '{"images": ' + "9" * 5000, {"images": 5, "annotations": []}, {"images": [], "annotations": []}])
def test_a_file_that_is_no_annotation_file_is_one_line(tmp_path, content):
    write(tmp_path, [image(1)], [person(1, 1)])
    next(tmp_path.rglob("*.json")).write_text(content if isinstance(content, str) else json.dumps(content))
    one_line(tmp_path)


@pytest.mark.parametrize("field, value", [
    ("width", float("inf")), ("height", 2 ** 63), ("width", "wide"), ("file_name", 5), ("id", 1e300)])
def test_odd_values_of_an_image_do_not_end_the_others(tmp_path, field, value):
    write(tmp_path, [image(1), image(2)], [person(1, 1), person(2, 2)])
    change(tmp_path, lambda content: content["images"][0].update({field: value}))
    dataset = open_dataset(str(tmp_path), "val")
    assert 2 in [sample.image_id for sample in dataset] or "2" in [sample.image_id for sample in dataset]


@pytest.mark.parametrize("field, value", [
    ("keypoints", [10 ** 400, 1, 2] + [0] * 48), ("keypoints", "text"), ("bbox", [[1], [2, 3]]), ("bbox", 7), ("area", 1e39),
    ("image_id", float("nan")), ("category_id", [1]), ("iscrowd", "no"), ("num_keypoints", {})])
def test_odd_values_of_a_person_do_not_end_the_others(tmp_path, field, value):
    write(tmp_path, [image(1), image(2)], [person(1, 1), person(2, 2)])
    change(tmp_path, lambda content: content["annotations"][0].update({field: value}))
    dataset = open_dataset(str(tmp_path), "val")
    assert len(dataset[1].keypoints) == 1 and np.isfinite(dataset[0].areas).all()


@pytest.mark.parametrize("categories", [5, "person", [5], [{"id": 1, "keypoints": 5}], [{"id": 1, "keypoints": [{}] * 17}], None])
def test_odd_categories_are_no_traceback(tmp_path, categories):
    write(tmp_path, [image(1)], [person(1, 1)])
    change(tmp_path, lambda content: content.update(categories=categories))
    assert open_dataset(str(tmp_path), "val").skeleton.num_keypoints == 17


def test_names_of_a_megabyte_and_over_the_systems_limit_are_missing_pictures(tmp_path):
    dataset = opened(tmp_path, [image(1), image(2)], [person(1, 1), person(2, 2)])
    for name in "x" * 300 + ".jpg", "y" * 1_000_000 + ".jpg":
        change(tmp_path, lambda content: content["images"][0].update(file_name=name))
        dataset = open_dataset(str(tmp_path), "val")
        assert [sample.image_id for sample in dataset] == [2] and len(notes(dataset)) < 2000
