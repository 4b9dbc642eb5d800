"""Bad input: every case of the corpus through the programs' `main`, a few through the shell, and what hypothesis finds."""
import importlib
import json
import time
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch

from common import metrics
from common.cli import parse
from common.errors import UserError
from common.splits import open_dataset
from tests import corpus
from tests.corpus import MISSING, PNG, Case, cases, content, falls_short, put
from tests.helpers import required

hypothesis, av = required("hypothesis"), required("av")
st = hypothesis.strategies
CASES = {f"{case.kind}: {case.name}": case for case in cases()}
SHELL = ("pictures: only pipe.png", "checkpoints: code",             # the others are slow
         "annotation files: cut", "annotation files: a pipe", "annotations: image: half a letter",
         "pictures: called 'caf", "pictures: drawn: PNG of 60000x60000", "videos: half a mp4", "boxes: a box ragged",
         "flags: train --lr nan", "flags: eval --out d", "checkpoints: tensors: nan")


# in the suite each twelfth, and what once did not hold; the rest is slow
FOUND = {"annotation files: a pipe", "annotations: image: half a letter", "annotations: two names", "annotations: nan",
         "annotations: a box of 1e300", "annotations: categories: 5", "checkpoints: preset ?", "checkpoints: tensors: complex",
         "checkpoints: tensors: a number as name", "checkpoints: resumed: optimizer x", "checkpoints: resumed: rows [1]",
         "checkpoints: skeleton: name None", "flags: eval --threshold nan"}


@pytest.mark.parametrize("case", [
    pytest.param(case, id=name, marks=[pytest.mark.slow] * (case.slow or number % 12 > 0 and name not in FOUND))
    for number, (name, case) in enumerate(CASES.items())])
def test_bad_input_ends_in_one_line_or_is_counted(case: Case, tmp_path):
    assert (why := falls_short(case, tmp_path)) == "", why


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (number > 1)) for number, name in enumerate(SHELL)])
def test_the_same_holds_from_the_shell(name, tmp_path):
    case = next(case for one, case in CASES.items() if one.startswith(name))
    assert (why := falls_short(case, tmp_path, corpus.shell)) == "", why


# ---------------------------------------------------------------- what nobody thought of

LONG = pytest.mark.parametrize("seconds", [pytest.param(0, id="quick"), pytest.param(200, id="long", marks=pytest.mark.slow)])
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
                    st.sampled_from([10 ** 400, -10 ** 400, 1e300, 2 ** 63, -1, 0, 1, 2, "1", "1.0", "nan", "\ud800"]))
VALUES = st.one_of(st.just(MISSING), st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(["id", "name", "keypoints", "x", "y", "point"]), inner, max_size=3), max_leaves=6))


def search(check: Callable, seconds: float, **strategies) -> None:
    """check(**values) with made-up values: always the same 25 ones, or new ones for so many seconds."""
    end = time.monotonic() + seconds
    few = hypothesis.settings(max_examples=200 if seconds else 25, deadline=None, database=None, derandomize=not seconds,
                              suppress_health_check=list(hypothesis.HealthCheck))
    while True:
        few(hypothesis.given(**strategies)(check))()
        if time.monotonic() >= end:
            return


def edited(record, changes: list[tuple[list, object]]):
    """A copy of nested dicts and lists in which values stand at other places; a path that leads nowhere is left."""
    record = json.loads(json.dumps(record))
    for path, value in changes:
        inner = record
        for step in path[:-1]:
            inner = inner[step] if isinstance(inner, dict) and step in inner or isinstance(inner, list) and len(inner) > step else None
        if isinstance(inner, dict):
            put(inner, path[-1], value)
        elif isinstance(inner, list) and value is not MISSING and len(inner) > path[-1]:
            inner[path[-1]] = value
    return record


def paths_in(record, before: tuple = ()) -> list[tuple]:
    items = record.items() if isinstance(record, dict) else enumerate(record[:3]) if isinstance(record, list) else ()
    return [path for key, value in items for path in [(*before, key), *paths_in(value, (*before, key))]]


def posetrack_18() -> dict:
    frame = dict(id=1, file_name="1.png", is_labeled=True, ignore_regions_x=[[0, 5, 5]], ignore_regions_y=[[0, 0, 5]])
    person = dict(id=1, image_id=1, track_id=0, bbox=[10, 10, 30, 20], bbox_head=[10, 10, 5, 5], keypoints=[20, 15, 1] * 17, scores=[1] * 17)
    return dict(images=[frame], annotations=[person], categories=[])


def posetrack_17() -> dict:
    points = [dict(id=[k], x=[20], y=[15 + k], is_visible=[1], score=[1]) for k in range(15)]
    person = dict(x1=[10], y1=[10], x2=[15], y2=[15], track_id=[0], annopoints=[dict(point=points)])
    region = dict(point=[dict(x=[0], y=[0]), dict(x=[5], y=[0]), dict(x=[5], y=[5])])
    return dict(annolist=[dict(image=[dict(name="1.png")], annorect=[person], ignore_regions=[region], is_labeled=[1])])


FORMATS = {"coco": (content(), "annotations/person_keypoints_val2017.json", "val2017"),
           "posetrack": (posetrack_18(), "annotations/val/a.json", "."), "2017": (posetrack_17(), "annotations/val/a.json", ".")}


@LONG
@pytest.mark.parametrize("form", FORMATS)
def test_any_annotation_file_is_read_or_refused(form, seconds, tmp_path):
    good, name, pictures = FORMATS[form]
    for place in tmp_path / name, tmp_path / pictures / "1.png":
        place.parent.mkdir(parents=True, exist_ok=True)
    for n in 1, 2, 3:
        (tmp_path / pictures / f"{n}.png").write_bytes(PNG)

    def check(changes, skeleton):
        (tmp_path / name).write_text(json.dumps(edited(good, changes)))
        try:
            data = open_dataset(str(tmp_path), "val", skeleton)
        except UserError:
            return
        assert data.report() and isinstance(data.caveats(), list) and len(data) == len(data.rows)
        assert np.isfinite(data.keypoints).all() and np.isfinite(data.boxes).all() and (data.areas > 0).all()
        for i in range(len(data)):
            sample, message = data.load(i)
            assert sample is not None or message
        truth = json.loads(json.dumps(data.ground_truth(), allow_nan=False))
        assert len(truth["images"]) == len(data)
        if data.labelled:
            table = metrics.evaluate([], data)
            assert all(value <= 100 or np.isnan(value) for value in table.values())
        try:
            assert len(data.training())
        except UserError:
            pass

    paths = st.sampled_from(paths_in(good))
    search(check, seconds / 3, changes=st.lists(st.tuples(paths, VALUES), min_size=1, max_size=3),
           skeleton=st.sampled_from([None, "coco" if form == "coco" else "posetrack"]))


@LONG
def test_any_checkpoint_is_loaded_or_refused(seconds, tmp_path):
    evaluation, path = importlib.import_module("eval"), tmp_path / "a.pt"
    file = corpus.kit().folder / "posetrack.pt"
    good, whole = torch.load(file, weights_only=True), file.read_bytes()
    plain = {name: value for name, value in good.items() if name != "model"}

    def load(is_whole=False):
        try:
            _, model, data = evaluation.load_model(str(path), "", "")
            assert isinstance(data, str) and all(weight.isfinite().all() for weight in model.parameters())
        except UserError as error:
            assert not is_whole, error
        try:
            module = importlib.import_module("diffusionpose")
            parse(module.Config, module.PRESETS, "", ["--resume", str(path)])
        except UserError:
            pass

    def check_values(changes, tensors):
        saved = edited(plain, changes) | dict(model={**good["model"]})
        for name, value in tensors:
            put(saved["model"], name, value)
        torch.save(saved, path)
        load(not changes and not tensors)

    def check_bytes(cut, flips, inserted):
        data = bytearray(whole[:int(cut * len(whole))])
        for place, value in flips:
            if data:
                data[int(place * len(data)) % len(data)] ^= value
        place, more = inserted
        data[int(place * len(data)):int(place * len(data))] = more
        path.write_bytes(data)
        load()

    share = st.floats(0, 1)
    odd = st.sampled_from([MISSING, torch.ones(1), torch.tensor(float("nan")), torch.ones(2, 3, dtype=torch.complex64), 5, None])
    search(check_values, seconds / 2, changes=st.lists(st.tuples(st.sampled_from(paths_in(plain)), VALUES), max_size=2),
           tensors=st.lists(st.tuples(st.sampled_from([*good["model"]]) | st.text(max_size=3), odd), max_size=2))
    search(check_bytes, seconds / 2, cut=share | st.just(1.0), flips=st.lists(st.tuples(share, st.integers(1, 255)), max_size=4),
           inserted=st.tuples(share, st.binary(max_size=9)))


@LONG
def test_any_flags_are_a_config_or_an_error(seconds):
    names = sorted({field.name for name in corpus.METHODS for field in fields(importlib.import_module(name).Config)})
    flags = st.sampled_from([*names, *(f"no-{name}" for name in names), "preset", "resume", "out", "device", "train"])
    values = st.one_of(st.integers().map(str), st.floats().map(str), st.text(max_size=6),
                       st.sampled_from(["", "tiny", "x", "0", "1", "2", "1e300", "1" * 400, "nan", "bf16", ",", "0,1", "--", "a\0b", "\ud800"]))
    words = st.lists(st.one_of(st.tuples(flags, values).map(lambda pair: [f"--{pair[0]}", pair[1]]), values.map(lambda one: [one]),
                               flags.map(lambda flag: [f"--{flag}"])), max_size=4).map(lambda parts: sum(parts, []))

    def check(method, words):
        module = importlib.import_module(method)
        try:
            config, args = parse(module.Config, module.PRESETS, "", words)
            assert isinstance(config, module.Config) and args.saved is None
        except UserError as error:
            assert str(error)
        except SystemExit as end:
            assert not end.code                         # --help

    search(check, seconds, method=st.sampled_from(corpus.METHODS), words=words)
