"""PoseTrack's three formats and its metric: the official evaluator's numbers, clips and their neighbours, bad files."""
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import posetrack
from common.errors import UserError
from common.records import Prediction
from common.splits import open_dataset
from common.posetrack import Frame, Person, frames_of, mean_ap
from common.skeletons import POSETRACK
from data import puppets
from tests.helpers import golden, reference

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Two training clips and one to evaluate; a test that changes files takes a copy."""
    counts = {"train": 2, "val": 1}
    return puppets.make(tmp_path_factory.mktemp("clips"), "video", size=64, workers=1, progress=False, counts=counts)


# ---------------------------------------------------------------- the metric

def pairs(truth: dict, found: dict) -> list:
    """Annotated frames and who was found in each, from the files of a golden case."""
    return [(frame, guess.people) for name in truth
            for frame, guess in zip(frames_of(truth[name], name)[1], frames_of(found[name], name)[1], strict=True)]


def cases(file: Path):
    """(truth, found, expected numbers) of all results in a file."""
    content = json.loads(file.read_text())
    if "pred" in content:
        for names, expected in content["result"].items():
            chosen = content["gt"] if names == "all" else {names: content["gt"][names]}
            yield chosen, content["pred"], expected
    for kind in ("silent", "perfect") if "pred_silent" in content else ():
        yield content["gt"], content[f"pred_{kind}"], content[f"result_{kind}"]


@golden("posetrack/golden_poseval*.json")
def test_every_number_of_the_official_evaluator(file):
    for truth, found, expected in cases(file):
        result = mean_ap(pairs(truth, found))
        order = [POSETRACK.keypoints.index(name) for name in expected["joint_names"]]
        for name in ("ap", "precision", "recall"):
            wanted = [np.nan if value is None else value for value in expected[name][:15]]
            assert np.array(result[name])[order] == pytest.approx(wanted, abs=1e-10, nan_ok=True)
        for name in ("gt_joints", "detections", "true_positives"):
            assert [result[name][j] for j in order] == expected[name]
        wanted = {name: np.nan if value is None else value for name, value in expected["columns"].items()}
        assert posetrack.columns(result["ap"]) == pytest.approx(wanted, abs=1e-10, nan_ok=True)
        assert result["frames"] == expected["frames"]


def test_joints_that_are_found_but_never_annotated_count_in_no_mean():
    edge, both = (json.loads(reference(f"posetrack/{name}").read_text())
                  for name in ("golden_poseval_edge.json", "golden_poseval.json"))
    name = next(name for name, content in both["pred"].items() if "annolist" in content)
    first = {"annolist": both["pred"][name]["annolist"][:1]}
    result, expected = mean_ap(pairs(edge["gt"], {"a.json": first})), edge["result_predicted"]
    order = [POSETRACK.keypoints.index(name) for name in expected["joint_names"]]
    wanted = [np.nan if value is None else value for value in expected["ap"]]
    assert np.array(result["ap"])[order] == pytest.approx(wanted[:15], nan_ok=True)
    assert posetrack.columns(result["ap"])["Mean"] == pytest.approx(wanted[15])
    assert np.isnan(posetrack.columns(result["ap"])["Ankle"])


def person(xy: np.ndarray, v=2, score=1.0, head=20.0) -> Person:
    return Person(np.c_[xy, np.broadcast_to(v, 15)], np.full(15, score), head)


def frame(*people: Person, regions=()) -> Frame:
    return Frame(1, "a.jpg", list(people), list(regions))


def test_a_match_is_at_most_half_a_head_away():
    xy = RNG.uniform(0, 100, (15, 2))
    for distance, ap in (9.99, 100), (10.01, 0):
        found = person(xy + [distance, 0])
        found.joints[3:, :2] -= [distance, 0]                    # so that it belongs to the person all the same
        assert mean_ap([(frame(person(xy)), [found])])["ap"][:3] == [pytest.approx(ap)] * 3


def test_duplicates_and_strangers_are_wrong_and_rank_by_score():
    xy = RNG.uniform(0, 100, (15, 2))
    good, twice, far = person(xy, score=0.5), person(xy, score=0.4), person(xy + 500, score=0.9)
    assert mean_ap([(frame(person(xy)), [good, twice])])["ap"] == [pytest.approx(100)] * 15      # found before the other
    assert mean_ap([(frame(person(xy)), [good, far])])["ap"] == [pytest.approx(50)] * 15
    assert mean_ap([(frame(), [far])])["frames"] == 0            # nobody is annotated: the frame does not count


def test_people_without_a_head_box_are_never_found():
    xy = RNG.uniform(0, 100, (15, 2))
    assert mean_ap([(frame(person(xy, head=0.0)), [person(xy)])])["ap"] == [0.0] * 15


def test_joints_in_ignored_regions_count_for_nothing():
    xy = RNG.uniform(0, 100, (15, 2))
    corner = np.array([[-1, -1], [101, -1], [101, 101], [-1, 101]])
    stranger = person(xy + 200, score=2.0)
    truth = frame(person(xy), person(xy + 200), regions=[corner + 200])
    assert mean_ap([(truth, [person(xy), stranger])])["ap"] == [pytest.approx(100)] * 15


def test_points_on_the_rim_of_a_region_are_not_inside():
    square, star = np.array([[0, 0], [4, 0], [4, 4], [0, 4]]), np.array([[0, 0], [4, 0], [2, 1], [2, 4]])
    points = np.array([[2, 2], [0, 2], [4, 4], [2, 0], [5, 2], [-1, 2], [3.9, 3.9], [2, 4]], float)
    assert posetrack.inside(points, square).tolist() == [True, *[False] * 5, True, False]
    assert posetrack.inside(np.array([[3, 2], [1.5, 1], [3, 0.2]]), star).tolist() == [False, True, True]


def test_hidden_joints_alone_are_sought_on_request():
    xy, v = RNG.uniform(0, 100, (15, 2)), np.full(15, 2)
    v[5] = 1
    found = person(xy)
    found.joints[6, :2] += 500                                   # a wrong joint that is not hidden
    result = mean_ap([(frame(person(xy, v)), [found])], hidden=True)
    assert result["gt_joints"] == (v == 1).astype(int).tolist() and result["detections"] == result["gt_joints"]
    assert result["ap"][5] == pytest.approx(100)


# ---------------------------------------------------------------- clips

def perfect(data) -> list[Prediction]:
    found = []
    for i in range(len(data)):
        sample = data[i]
        xy = np.where(sample.keypoints[..., 2:] > 0, sample.keypoints[..., :2], np.nan)
        found.append(Prediction(sample.image_id, xy, RNG.random(xy.shape[:2]), np.ones(len(xy))))
    return found


def test_puppets_are_read_as_posetrack_18_and_their_truth_is_perfect(clips):
    data = open_dataset(str(clips), "val")
    assert data.name == "posetrack18" and data.skeleton == POSETRACK and data.metric == "posetrack"
    assert len(data) == puppets.FRAMES["val"] and "1 videos, 12 frames, 10 of them labelled" in data.report()
    table = posetrack.evaluate(perfect(data), data)
    assert table["Mean"] == pytest.approx(100) and list(table)[:8] == [*posetrack.COLUMNS, "Mean"]
    assert posetrack.evaluate([], data)["Mean"] == 0


def test_joints_that_are_no_numbers_are_not_found_and_are_counted(clips, capsys):
    data = open_dataset(str(clips), "val")
    good = [Prediction(p.image_id, np.nan_to_num(p.keypoints), p.keypoint_scores, p.scores) for p in perfect(data)]
    assert posetrack.evaluate(good, data)["Mean"] > 0 and capsys.readouterr().out == ""
    for p in good:
        p.keypoints[:] = np.inf
    assert posetrack.evaluate(good, data)["Mean"] == 0
    assert f"dropped {15 * sum(len(p.scores) for p in good)} predicted joints: NaN" in capsys.readouterr().out


def test_frames_have_their_neighbours_and_the_ends_themselves(clips):
    data = open_dataset(str(clips), "train")
    names = [(sample.image.name, *(path.name for path in sample.frames)) for sample in (data[i] for i in range(5))]
    assert names[0] == ("000000.jpg", "000000.jpg", "000001.jpg")
    assert names[2] == ("000002.jpg", "000001.jpg", "000003.jpg")
    assert names[4] == ("000004.jpg", "000003.jpg", "000004.jpg")
    assert {sample.image.parent for sample in (data[4], data[5])} == set((clips / "images/train").iterdir())
    sample, message = data.load(2)
    assert not message and all(np.array_equal(frame, Image.open(path)) for frame, path in zip(sample.frames, data[2].frames))


def test_training_leaves_unlabelled_frames_out_though_somebody_is_in_them(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "video")
    file = next((tmp_path / "video/annotations/val").glob("*.json"))
    content = json.loads(file.read_text())
    content["images"][4]["is_labeled"] = False
    file.write_text(json.dumps(content))
    data = open_dataset(str(tmp_path / "video"), "val")
    peopled = {a["image_id"] for a in content["annotations"]}
    trained = {data.training()[i].image_id for i in range(len(data.training()))}
    assert trained == peopled - {content["images"][4]["id"]} and len(data) == 12


def test_hidden_joints_are_known_of_puppets_of_2017_and_of_21(clips):
    content = json.loads(next((clips / "annotations/train").glob("*.json")).read_text())
    a = content["annotations"][0]
    raw, places = np.reshape(a["keypoints"], (17, 3)), [0, 1, 2, *range(5, 17)]
    first = next(f for f in frames_of(content, "")[1] if f.image_id == a["image_id"]).people[0].joints[:, 2]
    assert np.array_equal(first, np.where(np.array(a["hidden"])[places], 1, 2 * (raw[places, 2] > 0)))
    del a["hidden"]
    raw[5], raw[6], a["person_id"] = (7, 8, 0), (0, 0, 0), 3
    a["keypoints"] = raw.ravel().tolist()
    year, frames = frames_of(content, "")
    joints = next(f for f in frames if f.image_id == a["image_id"]).people[0].joints
    assert year == "21" and joints[3].tolist() == [7, 8, 1] and joints[4].tolist() == [0, 0, 0]


def in_2017(content: dict) -> dict:
    """A file of 2018 in the format of 2017."""
    entries = []
    for image in content["images"]:
        people = []
        for a in content["annotations"]:
            if a["image_id"] == image["id"]:
                raw, (x, y, w, h) = np.reshape(a["keypoints"], (17, 3)), a["bbox_head"]
                points = [dict(id=[posetrack.ORDER_2017.index(name)], x=[px], y=[py], is_visible=[1])
                          for name, (px, py, v) in zip(posetrack.ORDER_2018, raw.tolist()) if v]
                people.append(dict(x1=[x], y1=[y], x2=[x + w], y2=[y + h], track_id=[a["track_id"]],
                                   annopoints=[dict(point=points)]))
        regions = [dict(point=[dict(x=[x], y=[y]) for x, y in zip(*region)]) for region in
                   zip(image["ignore_regions_x"], image["ignore_regions_y"])]
        entries.append(dict(image=[dict(name=image["file_name"])], is_labeled=[int(image["is_labeled"])],
                            annorect=people, ignore_regions=regions))
    return dict(annolist=entries)


def test_2017_gives_the_same_people_as_2018(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "video")
    for file in (tmp_path / "video/annotations/train").glob("*.json"):
        file.write_text(json.dumps(in_2017(json.loads(file.read_text()))))
    new, old = open_dataset(str(clips), "train"), open_dataset(str(tmp_path / "video"), "train")
    assert old.name == "posetrack17" and len(old) == len(new) and np.array_equal(old.sizes, new.sizes)
    assert np.array_equal(old.keypoints[..., :2], new.keypoints[..., :2]) and np.array_equal(old.track_ids, new.track_ids)
    for mine, theirs in zip(old.frame_of.values(), new.frame_of.values()):
        assert mine.labelled == theirs.labelled and [p.head for p in mine.people] == pytest.approx([p.head for p in theirs.people])
        assert all(np.array_equal(a, b) for a, b in zip(mine.regions, theirs.regions, strict=True))
    xy = old.keypoints[0, old.keypoints[0, :, 2] > 0, :2]
    extent = np.ptp(xy, axis=0)
    assert old.boxes[0] == pytest.approx([*(xy.min(0) - 0.15 * extent), *(1.3 * extent)], abs=1e-3)
    assert posetrack.evaluate(perfect(old), old)["Mean"] == pytest.approx(100)


def test_real_frames_of_posetrack_18(pose_data):
    data = open_dataset(str(pose_data / "posetrack18"), "val")
    assert "3 videos, 3 frames, 3 of them labelled, 14 tracks of people" in data.report()
    assert (data.keypoints[..., 2] > 0).sum() == 182
    sample, message = data.load(0)
    assert not message and sample.size == (1920, 1080) and sample.frames == (sample.image,) * 2
    assert posetrack.evaluate(perfect(data), data)["Mean"] > 90


def test_a_clip_of_one_frame_is_its_own_neighbourhood(clips, tmp_path):
    content = json.loads(next((clips / "annotations/val").glob("*.json")).read_text())
    image = content["images"][3]
    content["images"], content["annotations"] = [image], [a for a in content["annotations"] if a["image_id"] == image["id"]]
    (tmp_path / "annotations/val").mkdir(parents=True)
    (tmp_path / "annotations/val/one.json").write_text(json.dumps(content))
    (tmp_path / image["file_name"]).parent.mkdir(parents=True)
    shutil.copy(clips / image["file_name"], tmp_path / image["file_name"])
    sample, message = open_dataset(str(tmp_path), "val").load(0)
    assert not message and sample.frames == (sample.image,) * 2


@pytest.mark.parametrize("what, message", [("corrupt", "not an image"), ("cut", "truncated"), ("missing", "no such file"),
                                           ("larger", "80x70 pixels, the frame beside it 64x64")])
def test_a_bad_frame_is_skipped_and_as_a_neighbour_replaced(what, message, clips, tmp_path):
    shutil.copytree(clips, tmp_path / "video")
    data = open_dataset(str(tmp_path / "video"), "val")
    path = data[4].image
    if what == "larger":
        Image.new("RGB", (80, 70)).save(path)
    elif what == "missing":
        path.unlink()
    else:
        path.write_bytes(b"no picture" if what == "corrupt" else path.read_bytes()[:-900])
    sample, said = data.load(5)
    assert message in said and "takes its place" in said and path.name in said
    assert sample.frames[0] is sample.image and sample.frames[1] is not sample.image
    own, said = data.load(4)
    assert ("80x70" in said and own.size == (80, 70)) if what == "larger" else (own is None and message in said)


def test_people_who_leave_the_image_and_tracks_without_labels(clips, tmp_path):
    shutil.copytree(clips, tmp_path / "video")
    file = next((tmp_path / "video/annotations/val").glob("*.json"))
    content = json.loads(file.read_text())
    near, gone, blank = (copy.deepcopy(content["annotations"][0]) for _ in range(3))
    near["bbox"], gone["bbox"], blank["keypoints"] = [50, 10, 40, 30], [200, 10, 40, 30], [0] * 51
    gone["keypoints"] = [value for _ in range(17) for value in (210.0, 20.0, 1)]
    content["annotations"] = [near | dict(track_id=1), gone | dict(track_id=2), blank | dict(track_id=3)]
    file.write_text(json.dumps(content))
    data = open_dataset(str(tmp_path / "video"), "val")
    assert sorted(data.track_ids.tolist()) == [1, 3] and "outside the image" in data.report()
    assert len(data.training()) == 1


def test_files_of_another_format_are_one_line_each(clips, tmp_path):
    file = next((clips / "annotations/train").glob("*.json"))
    content = json.loads(file.read_text())
    coco = copy.deepcopy(content)
    coco["categories"][0]["keypoints"][1:3] = ["left_eye", "right_eye"]
    fewer = copy.deepcopy(content)
    fewer["annotations"][0]["keypoints"] = [1.0] * 45
    entry = copy.deepcopy(in_2017(content))
    entry["annolist"][1]["annorect"] = [dict(annopoints=[dict(point=[dict(id=[77], x=[1], y=[1])])])]
    for bad, message in ((coco, "keypoints lack head_bottom, head_top"), (fewer, "expected 17 keypoints .* got 45"),
                         ([], "neither 'annolist'"), (entry, "not in PoseTrack's format: IndexError"),
                         (in_2017(content), "2017's format, .* in 2018's")):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(clips, tmp_path / "bad")
        (tmp_path / "bad/annotations/train" / file.name).write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):
            open_dataset(str(tmp_path / "bad"), "train")
    (tmp_path / "matlab/annotations/train").mkdir(parents=True)
    (tmp_path / "matlab/annotations/train/a.mat").touch()
    with pytest.raises(UserError, match="MATLAB files"):
        open_dataset(str(tmp_path / "matlab"), "train")
    with pytest.raises(UserError, match="15 keypoints per person, but skeleton 'coco' has 17"):
        open_dataset(str(clips), "train", "coco")
