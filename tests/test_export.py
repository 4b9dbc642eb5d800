"""--export and --bench: a file computes what the model does, without this repository; a wrong one is not kept."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import detrpose
from common import export
from common.errors import UserError
from tests.helpers import TINY, close, required

SMALL = dict(zip([word[2:] for word in TINY[:14:2]], map(int, TINY[1:14:2])))
READS = """
import sys, torch
try:
    import common
    sys.exit("this repository can be imported")
except ModuleNotFoundError:
    pass
about = {"about.json": ""}
program = torch.export.load(sys.argv[1], extra_files=about).module()
cases = torch.load(sys.argv[2])
torch.save(([program(images) for images in cases], about), sys.argv[3])
"""


def randomised(module, preset: str, **overrides):
    """A model, ready to predict, whose outputs depend on the picture: those of start weights do not."""
    torch.manual_seed(0)
    model = module.build(preset, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module.fuse(model.eval())


@pytest.fixture(scope="module")
def model():
    return randomised(detrpose, "tiny", **SMALL)


@pytest.fixture(scope="module")
def pt2(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    export.export(detrpose, model, path, "some-checkpoint")
    return path


@pytest.fixture(scope="module")
def onnx(model, tmp_path_factory) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        required(package)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export.export(detrpose, model, path, "some-checkpoint")
    return path


@pytest.fixture
def pretended(monkeypatch):
    """An exporter of .pt2 that takes no time and whose file is wrong by as much as is put into this list."""
    wrong = [0.0]

    def save(graph, path, inputs, outputs, about):
        path.write_bytes(b"a file")
        return lambda case: [x + wrong[0] for x in graph(*case.values()).values()]
    monkeypatch.setattr(export, "save_pt2", save)
    monkeypatch.setattr(torch.export, "export", lambda program, *arguments, **options: program)
    return wrong


def raw(model, images):
    """What the formulas say, by the names that `forward` gives."""
    with torch.no_grad():
        result = model(images)
    return {name: result[name] for name in ("logits", "keypoints")}


@pytest.mark.slow
def test_a_pt2_file_gives_the_same_numbers_in_a_process_that_cannot_import_this_repository(model, pt2, tmp_path):
    cases = [torch.rand(n, 3, 64, 64) for n in (1, 3)]
    torch.save(cases, tmp_path / "cases")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", READS, pt2, tmp_path / "cases", tmp_path / "answers"], cwd=tmp_path,
                   env=environment, check=True)
    answers, about = torch.load(tmp_path / "answers", weights_only=False)
    for images, answer in zip(cases, answers, strict=True):
        wanted = raw(model, images)
        assert list(answer) == list(wanted)
        [close(answer[name], wanted[name], 1e-5, name) for name in wanted]
    assert_tells(json.loads(about["about.json"]))


def test_an_onnx_file_runs_in_onnx_runtime_by_its_names_at_any_batch(model, onnx):
    session = required("onnxruntime").InferenceSession(onnx)
    assert [(one.name, one.shape[1:]) for one in session.get_inputs()] == [("images", [3, 64, 64])]
    assert [one.name for one in session.get_outputs()] == ["logits", "keypoints"]
    for n in (1, 3):
        images = torch.rand(n, 3, 64, 64)
        answer = session.run(["keypoints", "logits"], {"images": images.numpy()})
        wanted = raw(model, images)
        [close(ours, wanted[name], 1e-5, name) for ours, name in zip(answer, ("keypoints", "logits"))]
    assert_tells(session.get_modelmeta().custom_metadata_map)
    assert [one.name for one in onnx.parent.iterdir()] == ["model.onnx"], "weights are in the file"


def assert_tells(about: dict):
    """A file says itself how to use it."""
    assert (about["method"], about["checkpoint"]) == ("detrpose", "some-checkpoint")
    assert about["inputs"] == "images (batch, 3, 64, 64) float32" and about["outputs"] == "logits, keypoints"
    assert "64 x 64" in about["before"] and "sigmoid" in about["after"]
    assert about["keypoints"].startswith("nose, left_eye")


def test_onnx_runtime_is_measured_beside_the_model(model, onnx, monkeypatch):
    monkeypatch.setattr(export, "ROUNDS", 3)
    line, beside = export.bench(detrpose, model, torch.device("cpu"), 2, str(onnx)).splitlines()
    assert line.startswith("detrpose, batch 2, ") and "medians of 3 rounds" in line and "loading" in line
    assert beside.startswith(f"{onnx}: ONNX Runtime ") and "in turns with forward" in beside
    with pytest.raises(UserError, match="cannot run .*images"):
        export.bench(detrpose, randomised(detrpose, "tiny", **SMALL | dict(size=96)), torch.device("cpu"), 1, str(onnx))


@pytest.mark.parametrize("name", ["querypose", *(pytest.param(name, marks=pytest.mark.slow) for name in
                                                 ("diffusionregpose", "diffusionpose", "sdpose"))])
def test_every_method_is_measured(name, monkeypatch):
    monkeypatch.setattr(export, "ROUNDS", 3)
    module = importlib.import_module(name)
    line = export.bench(module, module.fuse(module.build("tiny").eval()), torch.device("cpu"), 1, "")
    assert line.startswith(f"{name}, batch 1, ") and "postprocessing" in line


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", ["querypose", "diffusionregpose", "sdpose"])
def test_other_methods_are_exported_too(name, ending, tmp_path, capsys):
    module, path = importlib.import_module(name), tmp_path / f"x{ending}"
    export.export(module, randomised(module, "tiny"), path, "")
    assert "largest difference" in capsys.readouterr().out and path.exists()


def test_a_file_that_differs_from_the_model_is_not_kept(model, pretended, tmp_path, capsys):
    for pretended[0] in (0.01, float("nan")):
        with pytest.raises(UserError, match="differs from the model"):
            export.export(detrpose, model, tmp_path / "x.pt2", "")
        assert not list(tmp_path.iterdir())
    pretended[0] = 1e-5
    export.export(detrpose, model, tmp_path / "x.pt2", "")
    assert "largest difference from detrpose on drawn and random pictures 1.0e-05" in capsys.readouterr().out


def test_queries_that_rounding_ranks_otherwise_are_told_and_kept(model, pretended, tmp_path, capsys, monkeypatch):
    answers = [(0.5, 0.01), (0.4, 0.006), (0.5, 0.02), (0.4, 0.006)]     # of the file, of noise on the inputs; again
    monkeypatch.setattr(export, "difference", lambda ours, expected: answers.pop(0))
    export.export(detrpose, model, tmp_path / "x.pt2", "")
    out = capsys.readouterr().out
    assert "pictures 5.0e-01 (1.0% of the numbers above 0.001" in out and "on the inputs moves 0.6%" in out
    with pytest.raises(UserError, match="2.0% of the numbers"):
        export.export(detrpose, model, tmp_path / "y.pt2", "")
    assert [one.name for one in tmp_path.iterdir()] == ["x.pt2"]


def test_formulas_are_exported_and_the_setting_from_before_comes_back(model, pretended, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.export, "export",
                        lambda program, *_, **__: seen.append(os.environ["POSE_KERNELS"]) or program)
    for number, before in enumerate(("torch", None)):
        monkeypatch.setenv("POSE_KERNELS", before) if before else monkeypatch.delenv("POSE_KERNELS")
        export.export(detrpose, model, tmp_path / f"{number}.pt2", "")
        assert os.environ.get("POSE_KERNELS") == before
    assert seen == ["plain", "plain"]


@pytest.mark.parametrize("name, what", [("x.tflite", "ends in .onnx or .pt2"), ("x", "ends in"), ("old.pt2", "exists"),
                                        ("nowhere/x.pt2", "no folder nowhere")])
def test_what_cannot_be_written_is_said_before_weights_are_read(name, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.pt2").write_text("old")
    evaluation = importlib.import_module("eval")
    monkeypatch.setattr(sys, "argv", ["eval.py", "detrpose-l", "--export", name])
    monkeypatch.setattr(evaluation, "load_model", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=what):
        evaluation.main()
    assert [one.read_text() for one in tmp_path.iterdir()] == ["old"]


def test_packages_that_are_missing_are_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "installed", lambda package: False)
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        export.check_target(tmp_path / "x.onnx")
    (tmp_path / "x.onnx").touch()
    with pytest.raises(UserError, match="pip install onnxruntime"):
        export.bench(detrpose, model, torch.device("cpu"), 1, str(tmp_path / "x.onnx"))
    with pytest.raises(UserError, match="there is no such file"):
        export.bench(detrpose, model, torch.device("cpu"), 1, str(tmp_path / "nowhere.onnx"))


def test_without_onnx_runtime_the_file_is_kept_but_not_compared(model, pretended, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "NEEDS", {".onnx": ()})
    monkeypatch.setattr(export, "save_onnx", lambda graph, path, *_: path.touch())
    export.export(detrpose, model, tmp_path / "x.onnx", "")
    assert "not compared" in capsys.readouterr().out and (tmp_path / "x.onnx").exists()


def test_what_cannot_be_exported_says_why(tmp_path):
    module = importlib.import_module("diffusionpose")
    with pytest.raises(UserError, match="diffusionpose cannot be exported: "):
        export.export(module, module.build("tiny"), tmp_path / "x.pt2", "")
    assert not list(tmp_path.iterdir())


def test_weights_too_large_for_one_onnx_file_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ONNX_BYTES", 100)
    monkeypatch.setattr(export, "installed", lambda package: True)
    with pytest.raises(UserError, match="choose .pt2"):
        export.export(detrpose, model, tmp_path / "x.onnx", "detrpose-x")
