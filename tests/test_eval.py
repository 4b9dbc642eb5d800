"""eval.py from the checkpoint to the table and to the drawn pictures, with every kind of wrong file."""
import importlib
import json
import os
import shutil
import signal
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import detrpose
from common import metrics, weights
from common.boxes import read_results
from common.cli import parse, run_main
from common.errors import UserError
from common.records import Prediction
from common.splits import open_dataset
from data import puppets
from tests.helpers import TIMES, TINY, encode, reference, required
from tests.test_detrpose import official_state

av = required("av")

evaluation = importlib.import_module("eval")                 # `import eval` would hide Python's own


@pytest.fixture(scope="module")
def run(puppets_folder, tmp_path_factory) -> Path:
    """The folder of a run of one step on the small puppets, whose model is then made sure that all it sees is people."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = [*TINY, "--train", "--batch", "23", "--epochs", "1", "--data", str(puppets_folder), "--out", str(folder)]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    detrpose.train(*parse(detrpose.Config, detrpose.PRESETS, "", words))
    for number, handler in before.items():
        signal.signal(number, handler)
    for name, part in ("best.pt", "model"), ("last.pt", "ema"):
        saved = torch.load(folder / name, weights_only=True)
        biases = [value for key, value in saved[part].items() if "score_heads" in key and "bias" in key]
        [bias.copy_(torch.tensor([-2.0, 2.0])) for bias in biases]
        torch.save(saved, folder / name)
    return folder


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """call(words...) → (exit code, what was printed, results.json) of eval.py; it writes into tmp_path/drawn."""
    monkeypatch.chdir(tmp_path)

    def run_it(*words):
        out = [] if "--out" in words else ["--out", "drawn"]
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words), *out])
        try:
            run_main(evaluation.main)
            code = 0
        except SystemExit as end:
            code = end.code
        captured, results = capsys.readouterr(), tmp_path / "drawn" / "results.json"
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) in ((0, 0), (2, 1)), captured.err
        results = json.loads(results.read_text()) if results.exists() else None
        return code, errors[0] if errors else captured.out, results
    return run_it


def perfect(data, monkeypatch):
    """Let the model predict exactly what is annotated in `data`."""
    truth = {sample.image_id: sample for sample in (data[i] for i in range(len(data)))}

    def predict(model, batch):
        people = [truth[i].keypoints[(truth[i].keypoints[..., 2] > 0).any(1)] for i in batch["image_ids"]]
        return [Prediction(i, p[..., :2], np.ones(p.shape[:2]), np.linspace(0.9, 0.5, len(p)))
                for i, p in zip(batch["image_ids"], people)]
    monkeypatch.setattr(detrpose, "predict", predict)


# ------------------------------------------------------------------------------------------ datasets


def test_a_perfect_model_gets_a_perfect_table_and_valid_coco_results(run, puppets_folder, call, monkeypatch):
    perfect(open_dataset(str(puppets_folder), "val"), monkeypatch)
    code, out, results = call(run / "best.pt")
    lines = [line.split() for line in out.splitlines()]
    table = dict(zip(*next((a, b) for a, b in zip(lines, lines[1:]) if a[:2] == ["AP", "AP50"])))
    assert code == 0 and table["AP"] == table["AR"] == "1.000" and "8 images in" in out
    assert next(line for line in lines if line[:1] == ["nose"])[2:4] == ["0.000", "1.000"]
    assert all(set(result) == {"image_id", "category_id", "score", "keypoints"} for result in results)
    truth = COCO(str(puppets_folder / "annotations" / "person_keypoints_val2017.json"))
    score = COCOeval(truth, truth.loadRes(results), "keypoints")
    score.evaluate(), score.accumulate(), score.summarize()
    assert score.stats[0] == pytest.approx(1)
    assert Image.open("drawn/predictions.png").size[0] > 64


def test_best_and_last_hold_the_same_average_and_a_folder_means_best(run, call):
    code, _, best = call(run / "best.pt")
    assert code == 0 and len(best) > 0 and all(len(result["keypoints"]) == 51 for result in best)
    assert call(run / "last.pt")[2] == best
    Path(shutil.copytree(run, "copy"), "last.pt").write_bytes(b"")
    assert len(call("copy", "--eval_batch", 3, "--workers", 1)[2]) == len(best)


def test_a_run_from_before_a_setting_existed_loads_without_it(run, call):
    folder = Path(shutil.copytree(run, "old"))
    saved = torch.load(folder / "best.pt", weights_only=True)
    del saved["config"]["heatmap_weight"]                    # which the preset of today switches on
    saved["model"] = {name: value for name, value in saved["model"].items() if not name.startswith("heatmaps.")}
    torch.save(saved, folder / "best.pt")
    assert call(folder)[0] == 0


def test_another_split_and_another_dataset_are_evaluated_on_request(run, puppets_folder, call, tmp_path):
    assert "train: 24 images" in call(run, "--split", "train")[1]
    other = puppets.make(tmp_path, "crowd", size=64, workers=1, progress=False, counts={"val": 2})
    assert "val: 2 images" in call(run, "--data", other, "--split", "val")[1]
    assert call(run, "--data", other, "--split", "nosuch")[:2][0] == 2
    assert "there is no data folder nowhere" in call(run, "--data", "nowhere")[1]


def test_data_with_other_keypoints_than_the_model_is_one_line_with_both_numbers(run, puppets_folder, call, tmp_path):
    data = Path(shutil.copytree(puppets_folder, tmp_path / "data"))
    file = data / "annotations" / "person_keypoints_val2017.json"
    content = json.loads(file.read_text())
    content["categories"][0].update(keypoints=["tip", "middle", "end"], skeleton=[])
    for annotation in content["annotations"]:
        annotation["keypoints"] = annotation["keypoints"][15:24]
    file.write_text(json.dumps(content))
    code, line, _ = call(run, "--data", data)
    assert code == 2 and "3 keypoints" in line and "17" in line


def test_an_unreadable_image_of_the_dataset_is_named_and_counts_as_empty(run, puppets_folder, call, tmp_path):
    data = Path(shutil.copytree(puppets_folder, tmp_path / "data"))
    broken = sorted((data / "val2017").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:200])
    code, out, results = call(run, "--data", data)
    assert code == 0 and f"cannot read image {broken}" in out and "8 images in" in out
    assert len({result["image_id"] for result in results}) == 7


# ------------------------------------------------------------------------------------------ released weights


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A file as the authors publish them: preset n, its own tensor names, random weights."""
    manifest = json.loads(reference("detrpose/manifest_n.json").read_text())
    state = official_state(manifest, 0)
    state |= {"transformer.up": torch.tensor([0.5]), "transformer.reg_scale": torch.tensor([4.0])}
    path = tmp_path_factory.mktemp("cache") / "detrpose_hgnetv2_n.pth"
    torch.save({"model": state, "epoch": 3}, path)
    return path


def test_a_released_file_is_recognised_and_draws(official, call):
    Image.new("RGB", (90, 60), "gray").save("photo.jpg")
    code, out, results = call(official, "--images", "photo.jpg", "--threshold", 0)
    assert code == 0 and "detrpose, preset n, 17 keypoints" in out and len(results) > 0
    assert all(result["image_id"] == "photo.jpg" for result in results) and Path("drawn/photo.png").exists()
    code, line, _ = call(official, "--preset", "l", "--images", "photo.jpg")
    assert code == 2 and "is preset n, not l: leave --preset out" in line
    assert "there is no preset q" in call(official, "--preset", "q", "--images", "photo.jpg")[1]
    assert "add --data FOLDER, or --images PICTURE" in call(official)[1]


def test_a_released_name_is_fetched_from_a_mirror_once(official, call, monkeypatch, tmp_path):
    handler = partial(SimpleHTTPRequestHandler, directory=str(official.parent))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for name, value in dict(POSE_WEIGHTS_URL=f"http://127.0.0.1:{server.server_port}", no_proxy="127.0.0.1",
                                POSE_CACHE=str(tmp_path / "cache")).items():
            monkeypatch.setenv(name, value)
        Image.new("RGB", (40, 40)).save("photo.png")
        assert "drawn into drawn" in call("detrpose-n", "--images", "photo.png")[1]
        server.shutdown()
    assert (tmp_path / "cache" / official.name).read_bytes() == official.read_bytes()
    assert call("detrpose-n", "--images", "photo.png")[0] == 0              # the server is gone


def test_names_that_cannot_be_evaluated_are_refused_before_anything_is_fetched(call, monkeypatch):
    monkeypatch.setattr(weights, "download", lambda *args: pytest.fail("fetched"))
    assert "for --init" in call("dfine-l-obj365")[1]
    monkeypatch.setattr(evaluation, "METHODS", ("detrpose",))
    assert "of method sdpose; known are detrpose" in call("sdpose-body")[1]
    assert "did you mean detrpose-l" in call("detrpose-ll")[1]


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_files_that_are_no_checkpoint_are_one_line_each_and_never_run(run, official, call):
    saved = torch.load(run / "best.pt", weights_only=True)
    torch.save({"model": {"backbone.stem.stem1.conv.weight": torch.ones(2), "decoder.up": torch.ones(1)}}, "dfine.pth")
    torch.save(saved | {"more": Hostile()}, "hostile.pt")
    torch.save(saved | {"method": "nosuch"}, "other.pt")
    torch.save(saved | {"config": saved["config"] | {"dim": 64}}, "size.pt")
    Path("text.pt").write_text("no checkpoint")
    for path, size in (run / "best.pt", -500), (official, 1_000_000):
        Path(f"cut_{path.name}").write_bytes(path.read_bytes()[:size])
    for name, message in {"dfine.pth": "start weights belong to --init", "hostile.pt": "more than tensors", "other.pt":
                          "of method nosuch; known are detrpose", "size.pt": "do not fit the model", "text.pt":
                          "neither a torch nor", "cut_best.pt": "cut short", f"cut_{official.name}": "cut short",
                          "absent.pt": "there is no checkpoint absent.pt", ".": "no checkpoint best.pt"}.items():
        code, line, _ = call(name)
        assert code == 2 and message in line, line
    assert not Path("ran").exists()


@pytest.mark.parametrize("change, message", [
    (dict(preset=[1]), "has no tensors of"), (dict(skeleton=None), "has no tensors of"), (dict(skeleton={}), "no keypoint set"),
    (dict(skeleton=dict(name="a", keypoints=5, edges=[], flip=None, sigmas=[])), "no keypoint set"),
    (dict(model=True, ema={}), "holds no tensors"), (dict(model={"a": 5}, ema={}), "holds no tensors"), (dict(config=None), "has no tensors"),
    ({"lr": "x"}, "damaged: its lr is 'x'"), ({"dim": 1e9}, "damaged: its dim"), (dict(ema=5), "has no tensors of"),
    ({"cf": 1.0}, "another version of detrpose.py: this one has no option cf")], ids=str)
def test_a_checkpoint_with_odd_values_is_one_line(run, call, change, message):
    saved = torch.load(run / "best.pt", weights_only=True)
    whole = change.keys() <= saved.keys() | {"ema"}
    torch.save(saved | (change if whole else dict(config=saved["config"] | change)), "odd.pt")
    code, line, _ = call("odd.pt")
    assert code == 2 and message in line, line


def test_a_dataset_without_labels_gives_results_and_no_table(run, puppets_folder, call):
    truth = json.loads((puppets_folder / "annotations/person_keypoints_val2017.json").read_text())
    Path("d/annotations").mkdir(parents=True)
    shutil.copytree(puppets_folder / "val2017", "d/test2017")
    images = truth["images"][:2]
    Path("d/annotations/image_info_test-dev2017.json").write_text(json.dumps(dict(images=images, categories=[dict(id=1, name="person")])))
    code, out, results = call(run / "best.pt", "--data", "d", "--split", "test-dev", "--workers", 0)
    assert code == 0 and "has no labels: results.json" in out and "AP50" not in out + Path("drawn/table.txt").read_text()
    assert results and {row["image_id"] for row in results} <= {image["id"] for image in images}
    assert Image.open("drawn/predictions.png").size[1] > 64, "the pictures with what was found"


def test_wrong_flags_are_one_line(run, official, call, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU that torch" in call(run, "--device", "cuda")[1]
    assert "leave --preset out" in call(run, "--preset", "l")[1]
    assert "there is no method nosuch" in call(official, "--method", "nosuch")[1]
    assert f"{official} is preset n, not tiny: leave --preset out" in call(official, "--preset", "tiny", "--images", "a.jpg")[1]
    suggested = call("nosuch", "--images", "a.jpg")[1]
    assert "detrpose-l" in suggested and "resnet50" not in suggested and "dfine" not in suggested
    assert "did you mean --images?" in call(run, "--image", "a.jpg")[1]
    assert "required: checkpoint" in call("--split", "val")[1]
    assert call("--help")[0] == 0 and "--images" in call("--help")[1]
    assert "expected numbers with commas" in call(run, "--sigmas", "0.1;0.2")[1]
    Path("file").touch()
    assert "cannot make the folder" in call(run, "--out", "file")[1]


# ------------------------------------------------------------------------------------------ pictures


def make_pictures(folder: Path) -> dict[str, bool]:
    """Pictures of every kind; name of the drawing → whether it is upright."""
    folder.mkdir()
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # to be turned by a quarter
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.convert("L").save(folder / "gray.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("P").save(folder / "palette.png")
    rgb.convert("RGBA").save(folder / "clear.WEBP")
    Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27).save(folder / "deep.png")
    rgb.save(folder / "clip.gif", save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)])
    Image.new("L", (60, 40)).save(folder / "still.gif")
    (folder / "notes.txt").write_text("no picture")
    return {"turned.png": True, "clip.gif": False} | {
        f"{name}.png": False for name in ("gray", "cmyk", "palette", "clear", "deep", "still")}


def test_pictures_of_every_kind_are_drawn_upright_and_listed(run, call, tmp_path):
    expected = make_pictures(tmp_path / "in")
    code, out, results = call(run, "--images", "in", "in/gray.png", "--threshold", 0, "--gif")
    assert code == 0 and f"{len(results)} people of score 0 or more in 8 pictures; drawn into drawn" in out
    drawn = {path.name: Image.open(path) for path in Path("drawn").iterdir() if path.suffix != ".json"}
    drawn = {name: picture.height > picture.width for name, picture in drawn.items()}
    assert drawn.pop("all.gif") is False and drawn == expected
    assert Image.open("drawn/all.gif").n_frames == 10 and Image.open("drawn/clip.gif").n_frames == 3
    names = {result["image_id"] for result in results}
    assert {"turned.jpg", "clip.gif", "still.gif"} <= names and len(names) == 8
    frames = {(result["frame"], result["time"]) for result in results if result["image_id"] == "clip.gif"}
    assert frames == {(0, 0.0), (1, 0.125), (2, 0.25)} and not any("frame" in r for r in results if r["image_id"] == "gray.png")


def test_a_bad_picture_among_good_ones_is_named_counted_and_skipped(run, call, tmp_path):
    make_pictures(tmp_path / "in")
    (tmp_path / "in" / "cmyk.jpg").write_bytes((tmp_path / "in" / "cmyk.jpg").read_bytes()[:300])
    (tmp_path / "in" / "clip.gif").write_bytes((tmp_path / "in" / "clip.gif").read_bytes()[:-4000])
    code, out, results = call(run, "--images", "in", "in/notes.txt")
    assert code == 0 and "in 7 pictures, 2 could not be read" in out and "skipped (2 so far)" in out
    for name in ("cmyk.jpg", "notes.txt"):
        assert f"cannot read image {Path('in') / name}: " in out
    assert len({result["image_id"] for result in results}) == 7


def test_no_picture_at_all_is_an_error(run, call, tmp_path):
    make_pictures(tmp_path / "in")
    Path("empty").mkdir()
    assert "none of the 1 pictures could be read" in call(run, "--images", "in/notes.txt")[1]
    assert "no pictures in empty: looked for .3gp, .apng" in call(run, "--images", "empty")[1]
    assert "there is no picture or folder nowhere.jpg" in call(run, "--images", "nowhere.jpg")[1]
    before = Path("in/gray.png").read_bytes()
    assert "holds the pictures themselves" in call(run, "--images", "in/gray.png", "--out", "in")[1]
    assert Path("in/gray.png").read_bytes() == before


def test_pictures_of_the_same_name_do_not_overwrite_each_other(run, call):
    for name in ("a/x.jpg", "a/x.png", "b/x.jpg", "b/y.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40)).save(name)
    code, _, results = call(run, "--images", "a", "b", "--threshold", 0)
    assert {result["image_id"] for result in results} == {"a/x.jpg", "a/x.png", "b/x.jpg", "y.jpg"}
    assert {path.name for path in Path("drawn").iterdir()} == {"a_x_jpg.png", "a_x_png.png", "b_x_jpg.png", "y.png",
                                                               "results.json"}


def test_only_confident_people_are_drawn_and_a_model_that_sees_nobody_is_no_error(run, call):
    Image.new("RGB", (50, 50), "white").save("photo.png")
    code, out, results = call(run, "--images", "photo.png", "--threshold", 1)
    assert code == 0 and "0 people of score 1 or more in 1 pictures" in out and len(results) > 0
    assert Image.open("drawn/photo.png").getextrema() == ((255, 255),) * 3


def test_a_runs_own_threshold_is_used_and_said_and_a_flag_overrides_it(run, call):
    Image.new("RGB", (50, 50), "white").save("photo.png")
    _, out, rows = call(run, "--images", "photo.png")
    assert "people of score 0.5 or more in 1" in out, "nobody was found on val, so there is no best F1"
    scores, saved = sorted(row["score"] for row in rows), torch.load(run / "best.pt", weights_only=True)
    torch.save(saved | {"threshold": (scores[-1] + scores[-2]) / 2}, "own.pt")
    for words, said in ([], "1 people of score"), (["--threshold", 0], f"{len(rows)} people of score 0 or more in"):
        code, out, _ = call("own.pt", "--images", "photo.png", *words)
        assert code == 0 and said in out and ("(its best F1 on val)" in out) == (not words)
    assert len(evaluation.load("own.pt", device="cpu")("photo.png")[0]) == 1
    assert len(evaluation.load("own.pt", device="cpu", threshold=0.0)("photo.png")[0]) == len(rows)


def test_a_video_gives_a_video_of_its_times_and_rows_with_frame_and_time(run, call):
    encode(Path("clip.mp4"), sound=True)
    Image.new("RGB", (60, 40)).save("photo.png")
    code, out, results = call(run, "--images", "clip.mp4", "photo.png", "--threshold", 0, "--eval_batch", 4)
    assert code == 0 and "sound" in out and "in 2 pictures" in out
    seen = {(row["frame"], row["time"]) for row in results if row["image_id"] == "clip.mp4"}
    assert seen == set(enumerate(TIMES)) and any(row["image_id"] == "photo.png" for row in results)
    with av.open("drawn/clip.mp4") as drawn:
        times = [frame.time for frame in drawn.decode(video=0)]
    assert np.allclose(times, TIMES, atol=1e-3)


def test_boxes_of_a_file_may_be_about_one_frame_or_about_all(tmp_path):
    rows = [{"image_id": "clip.mp4", "frame": 1, "bbox": [1, 2, 3, 4]}, {"image_id": "clip.mp4", "bbox": [5, 6, 7, 8]}]
    (tmp_path / "boxes.json").write_text(json.dumps(rows))
    found, left_out = read_results(str(tmp_path / "boxes.json"))
    assert left_out == 0 and found[("clip.mp4", 1)][0].tolist() == [[1, 2, 4, 6]]
    assert found["clip.mp4"][0].tolist() == [[5, 6, 12, 14]]


# ------------------------------------------------------------------------------------------ from Python

def test_from_python_paths_arrays_and_pictures_give_the_people_of_the_command(run, call):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    picture.save("photo.png")
    _, _, rows = call(run, "--images", "photo.png", "--threshold", 0)
    pose = evaluation.load(run, device="cpu", threshold=0)
    people = pose(["photo.png", np.asarray(picture), picture])
    assert [len(one) for one in people] == [len(rows)] * 3 and people[0].names[0] == "nose"
    for one in people:
        assert one.keypoints.shape == (len(rows), 17, 2) and one.draw().mode == "RGB"
        assert np.allclose([row["keypoints"] for row in one.to_coco()], [row["keypoints"] for row in rows], atol=0.02)
    assert [row["image_id"] for one in people[:2] for row in one.to_coco()[:1]] == ["photo.png", 1]
    alone = pose(picture, threshold=1.0)
    assert len(alone) == 1 and len(alone[0]) == 0 and alone[0].draw().size >= picture.size
    assert pose([]) == []


@pytest.mark.parametrize("wrong, message", [
    (np.zeros((4, 4, 3)), "uint8"), (np.zeros((4, 4, 4), np.uint8), "uint8"), (5, "expected a path"),
    ("nowhere.png", "nowhere.png")])
def test_from_python_what_is_no_picture_is_an_error_that_says_what_is_wanted(run, wrong, message):
    with pytest.raises(UserError, match=message):
        evaluation.load(run, device="cpu")([wrong])
    with pytest.raises(UserError, match="finds people by itself"):
        evaluation.load(run, device="cpu", detector="detrpose-n")


def test_a_top_down_model_takes_boxes_or_the_whole_picture(tmp_path, capsys):
    import sdpose
    torch.manual_seed(0)
    model = sdpose.build("tiny").eval()
    pose = evaluation.Pose(sdpose, model, 0.0)
    picture = Image.new("RGB", (80, 60), "gray")
    whole, one = pose(picture)[0], pose([picture], boxes=[[[10, 5, 40, 55]]])[0]
    assert "whole" in capsys.readouterr().out and len(whole) == len(one) == 1
    assert (np.abs(one.keypoints - [25, 30]) < 40).all() and np.allclose(whole.boxes, [[0, 0, 80, 60]])
    with pytest.raises(UserError, match="outside of the picture"):
        pose(picture, boxes=[[[90, 5, 99, 55]]])


# ------------------------------------------------------------------------------------------ settings

def test_settings_that_only_prediction_reads_are_changed_and_others_refused():
    import diffusionregpose
    model = diffusionregpose.build("tiny")
    changed = evaluation.with_settings(diffusionregpose, model, ["steps=4", "ensemble=true", "nms=plain"]).cfg
    assert (changed.steps, changed.ensemble, changed.nms, changed.dim) == (4, True, "plain", 96)
    for setting, message in {"dim=32": "can change now is steps, ensemble", "steps": "a number", "steps=two": "a number",
                             "ensemble=4": "true or false", "steps=0": "at least|from 1", "nms=best": "choose",
                             "keypoint_scores=true": "diffusionregpose can change now is steps"}.items():
        with pytest.raises(UserError, match=message) as error:
            evaluation.with_settings(diffusionregpose, model, [setting])
        assert "\n" not in str(error.value)
    assert evaluation.with_settings(detrpose, detrpose.build("tiny"), ["keypoint_scores=true"]).cfg.keypoint_scores


def test_the_published_figure_stands_beside_ours_for_released_weights_on_the_data_of_their_table():
    def said(source: str, name: str, split: str) -> list[str]:
        return metrics.published(source, SimpleNamespace(name=name, split=split), dict(AP=0.7213))
    assert said("detrpose-l", "coco", "val") == ["AP 72.1, published for detrpose-l: 72.5"]
    assert said("detrpose-n-crowdpose", "crowdpose", "test")[0].endswith("published for detrpose-n-crowdpose: 56.0")
    assert said("sdpose-body", "ood", "ood")[0].endswith("sdpose-body with a detector's boxes: 63.5")
    assert said("detrpose-l", "puppets", "val") == said("runs/mine", "coco", "val") == said("resnet50", "coco", "val") == []
    for name, release in weights.RELEASES.items():
        assert bool(release.published) == bool(release.method), name


def test_the_process_is_captioned_and_without_people_says_so(run, call, puppets_folder, tmp_path):
    picture = next((puppets_folder / "val2017").iterdir())
    encode(Path("clip.mp4"))
    code, text, _ = call(run, "--images", picture, "clip.mp4", "--process", "--threshold", "0.1")
    assert code == 0 and "nothing to show" not in text
    assert text.count("--process shows") == text.count("clip.mp4: --process shows the first frame alone") == 1
    assert {f"{picture.stem}_{what}" for what in ("selected.png", "layers.gif", "sampling.png", "distributions.png")} <= {
        path.name for path in (tmp_path / "drawn").iterdir()}
    code, text, _ = call(run, "--images", picture, "--process", "--threshold", "1.1", "--out", "nobody")
    assert code == 0 and f"{picture.name}: nobody of score 1.1 or more, so --process has nothing to show" in text
    assert not [path for path in (tmp_path / "nobody").iterdir() if path.stem.endswith(("selected", "layers"))]


# ------------------------------------------------------------------------------------------ diagnosis


def test_a_diagnosis_is_in_the_table_and_drawn_and_a_perfect_model_has_no_errors(run, puppets_folder, call, monkeypatch):
    code, out, _ = call(run, "--diagnose")
    assert code == 0 and "jitter" in Path("drawn/table.txt").read_text() and "drawn/worst.png" in out
    assert min(Image.open("drawn/worst.png").size + Image.open("drawn/oks.png").size) > 64
    perfect(open_dataset(str(puppets_folder), "val"), monkeypatch)
    lines = call(run, "--diagnose")[1].splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in reversed(lines) if line.strip()}      # its tables come first
    assert rows["good"][1] == "1.000" and rows["all"][0] == "0" and rows["all"][-2:] == ["1.000", "0.000"]


def test_a_diagnosis_needs_labels_and_a_comparison_pictures(run, puppets_folder, call, tmp_path):
    Image.new("RGB", (40, 40)).save("photo.png")
    assert "--images have not" in call(run, "--diagnose", "--images", "photo.png")[1]
    assert "add --images PICTURE" in call(run, "--compare", run)[1]
    assert "leave --boxes and --detector out" in call(run, "--compare", run, "--images", "photo.png", "--detector", run)[1]
    data = Path(shutil.copytree(puppets_folder, tmp_path / "data"))
    file = data / "annotations" / "person_keypoints_val2017.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(annotations=[])))
    assert "nobody has a labelled keypoint" in call(run, "--data", data, "--diagnose")[1]


def test_checkpoints_of_several_methods_stand_side_by_side_with_what_they_cost(run, call):
    import sdpose
    torch.manual_seed(0)
    model = sdpose.build("tiny")
    torch.save(dict(method="sdpose", preset="tiny", config=vars(model.cfg), skeleton=model.skeleton.to_dict(),
                    model=model.state_dict()), "other.pt")
    for name in ("a.png", "b.png"):
        Image.effect_noise((90, 60), 50).save(name)
    Path("c.png").write_bytes(b"no picture")
    code, out, _ = call(run, "--compare", "other.pt", run / "last.pt", "--images", "a.png", "b.png", "c.png", "--threshold", 0)
    rows = json.loads(Path("drawn/compare.json").read_text())
    names = ["detrpose: run", "sdpose: other", str(run / "last.pt")]
    assert code == 0 and "skipped" in out and [row["checkpoint"] for row in rows] == 2 * names
    assert all(row["people"] == (1 if "sdpose" in row["checkpoint"] else rows[0]["people"]) for row in rows)
    assert rows[0]["people"] > 0 and all(row["milliseconds"] > 0 for row in rows)
    assert rows[1]["parameters_m"] == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, abs=0.01)
    assert rows[0]["gflops"] == rows[2]["gflops"] > 0 and rows[1]["gflops"] > rows[0]["gflops"]
    assert Image.open("drawn/compare.png").width > 3 * 480
    code, _, _ = call(run, "--compare", "other.pt", "--images", "a.png", "--detector", run, "--out", "found")
    with_detector = json.loads(Path("found/compare.json").read_text())
    assert code == 0 and with_detector[1]["parameters_m"] > rows[1]["parameters_m"] + 0.9 * rows[0]["parameters_m"]


def test_a_parameter_that_is_the_input_of_a_module_can_be_counted(call):
    import querypose
    torch.manual_seed(0)
    model = querypose.build("tiny")                         # its queries are a parameter
    torch.save(dict(method="querypose", preset="tiny", config=vars(model.cfg), skeleton=model.skeleton.to_dict(),
                    model=model.state_dict()), "own.pt")
    Image.effect_noise((90, 60), 50).save("a.png")
    code, out, _ = call("own.pt", "--compare", "own.pt", "--images", "a.png")
    assert code == 0 and "querypose: own" in out
