"""A corpus of bad input: annotations, pictures, videos, boxes, checkpoints and flags that are wrong in one way each.

    python -m tests.corpus                  gives each to the program that it concerns; a row per kind: tried, held
    python -m tests.corpus pictures flags   some kinds only
    python -m tests.corpus --slow           also what takes seconds each

A case holds when the program ends with exit code 2 and one line, or with 0 and a line that counts or names what it left
out, as the case expects; without a traceback, within `LIMIT` seconds and 2 GiB, and with nothing written but whole files
below --out. Everything runs in this process, through the programs' own `main`.
"""
import argparse
import contextlib
import importlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from common.cli import run_main
from common.skeletons import SKELETONS
from tests.helpers import TINY, encode

ROOT = Path(__file__).parents[1]
LIMIT, MOST = 60, 3 * 2 ** 29                   # seconds of a core; bytes, beside half a GiB of Python and torch
PATIENCE = 5 * LIMIT                            # seconds after which it hangs, on a machine that has more to do
SMALL_CLIP = dict(height=32, width=32, dim=32, depth=1, vit_heads=4, heads=4, stfe_layers=1, decoder_layers=1,
                  stem="patch", processes=1, workers=0)


class Case(NamedTuple):
    kind: str
    name: str
    make: Callable[[Path], list]                # puts the input into a folder; the words of the command, given there
    said: str                                   # pattern of the error, or of the line that counts
    code: int = 2
    slow: bool = False


class Hang(BaseException):
    """A program did not end."""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float
    peak: int


# ---------------------------------------------------------------- a program in this process

def call(words: list, folder: Path) -> Outcome:
    """`python words...` in a folder, through the program's `main`; a traceback is in `err`, with code 1."""
    module, here, code = importlib.import_module(Path(words[0]).stem), os.getcwd(), 0
    out, err = io.StringIO(), io.StringIO()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    argv, start, had = sys.argv, time.process_time(), memory("VmRSS")       # much, where other tests ran before

    def hangs(number, frame):
        raise Hang(f"no end after {PATIENCE} seconds")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)
    Path("/proc/self/clear_refs").write_text("5")               # the peak starts anew
    resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + MOST, hard))
    try:
        os.chdir(folder)
        sys.argv = [str(word) for word in words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("always")
            run_main(module.main)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        code = 1
        err.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        os.chdir(here)
        sys.argv = argv
        for number, handler in before.items():
            signal.signal(number, handler)
    return Outcome(code, out.getvalue(), err.getvalue(), time.process_time() - start, memory("VmHWM") - had)


def memory(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def shell(words: list, folder: Path) -> Outcome:
    """The same as a user types it."""
    ended = subprocess.run([sys.executable, ROOT / words[0], *map(str, words[1:])], cwd=folder, capture_output=True,
                           encoding="utf-8", errors="replace", timeout=PATIENCE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return Outcome(ended.returncode, ended.stdout, ended.stderr, 0, 0)


def files_below(folder: Path) -> dict[str, tuple]:
    """Everything but what is below `out`, with size and time of change."""
    return {str(path): path.lstat()[6:9:2] for path in folder.rglob("*") if "out" not in path.relative_to(folder).parts
            and not path.is_dir()}


def falls_short(case: Case, folder: Path, run: Callable = call) -> str:
    """Why a case does not hold, or nothing."""
    work = folder / "work"                                      # what is outside of it must stay, too
    work.mkdir(parents=True)
    words = case.make(work)
    before = files_below(folder)
    ended = run(words, work)
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    text = errors[0] if errors else ended.out + ended.err
    left = [path for path in (work / "out").rglob("*") if path.is_file() and path.name not in (".lock", "log.jsonl")]
    halves = [path.name for path in left if path.name.startswith(".") or not path.stat().st_size]
    reasons = {
        "a traceback": "Traceback" in ended.err, f"exit code {ended.code}": ended.code != case.code,
        f"{len(errors)} lines of error": len(errors) != (case.code == 2),
        f"not said: {case.said}": not re.search(case.said, text),
        f"{ended.seconds:.0f} seconds": ended.seconds > LIMIT, f"{ended.peak / 2 ** 30:.1f} GiB": ended.peak > MOST,
        "files outside of --out": files_below(folder) != before,
        f"left behind: {halves}": bool(halves),
        "results in spite of the error": case.code == 2 and (work / "out/results.json").exists()}
    reasons = [reason for reason, true in reasons.items() if true]
    about = f"{'; '.join(reasons)}\n    {' '.join(map(str, words))}\n{(ended.out + ended.err)[-3000:]}" if reasons else ""
    return about.encode(errors="backslashreplace").decode()


# ---------------------------------------------------------------- what the cases start from

def picture(w: int = 60, h: int = 40) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, w), np.linspace(0, 255, h))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], 2).astype(np.uint8))


def in_bytes(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = in_bytes(picture(), "PNG")
COCO = {"id": 1, "name": "person", "keypoints": list(SKELETONS["coco"].keypoints), "skeleton": [[16, 14]]}


class Kit:
    """Checkpoints of random weights, made once: a run of DETRPose, DiffusionPose for COCO's and PoseTrack's keypoints."""

    def __init__(self):
        self.place = tempfile.TemporaryDirectory()
        self.folder = folder = Path(self.place.name)
        self.run = folder / "run"
        self.best, self.last = self.run / "best.pt", self.run / "last.pt"
        dataset(folder)
        words = "--train --batch 2 --epochs 1 --data d --out run --patience 9".split()
        ended = call(["detrpose.py", *words, *TINY], folder)
        assert ended.code == 0, ended.err
        self.saved = torch.load(self.last, weights_only=True)
        pose = importlib.import_module("diffusionpose")
        for name in "coco", "posetrack":
            model = pose.build("tiny", name, **SMALL_CLIP)
            torch.save(dict(method="diffusionpose", preset="tiny", config=asdict(model.cfg), epoch=1, metrics={},
                            skeleton=SKELETONS[name].to_dict(), model=model.state_dict()), folder / f"{name}.pt")


KIT: list[Kit] = []


def kit() -> Kit:
    """The one of this process."""
    if not KIT:
        KIT.append(Kit())
    return KIT[0]


def image(number: int, **fields) -> dict:
    return {"id": number, "file_name": f"{number}.png", "width": 60, "height": 40} | fields


def person(number: int, image_id: int, **fields) -> dict:
    keypoints = [20, 15, 2, 30, 25, 1] + [0] * 45
    return {"id": number, "image_id": image_id, "category_id": 1, "bbox": [10, 10, 30, 20], "area": 400.0, "iscrowd": 0,
            "num_keypoints": 2, "keypoints": keypoints} | fields


MISSING = object()


def put(record: dict, field: str, value) -> None:
    record.pop(field, None) if value is MISSING else record.update({field: value})


def content() -> dict:
    """Three images of one person each."""
    category = COCO | dict(keypoints=[*COCO["keypoints"]])
    return dict(images=[image(n) for n in (1, 2, 3)], annotations=[person(n, n) for n in (1, 2, 3)],
                categories=[category])


def to_json(value) -> bytes:
    """Bytes and text as they are, all else as JSON, in which "@1e400@" becomes that number."""
    value = value if isinstance(value, (str, bytes)) else re.sub('"@(.*?)@"', r"\1", json.dumps(value))
    return value if isinstance(value, bytes) else value.encode()


def dataset(folder: Path, val=None, train=None) -> Path:
    """COCO's layout in d, with these annotation files in place of good ones."""
    for split, given in ("train", train), ("val", val):
        file = folder / f"d/annotations/person_keypoints_{split}2017.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(to_json(content() if given is None else given))
        (folder / f"d/{split}2017").mkdir()
        for n in 1, 2, 3:
            (folder / f"d/{split}2017/{n}.png").write_bytes(PNG)
    return folder / "d"


def evaluating(*words) -> list:
    return ["eval.py", kit().folder / "coco.pt", "--workers", 0, "--out", "out", "--data", "d", *words]


def training(*words) -> list:
    return ["detrpose.py", "--train", *TINY, "--batch", 2, "--epochs", 1, "--out", "out", "--data", "d", *words]


def drawing(*words) -> list:
    return ["eval.py", kit().best, "--threshold", 0, "--out", "out", "--images", *words]


# ---------------------------------------------------------------- annotation files

def annotated(val, folder: Path) -> list:
    dataset(folder, val)
    return evaluating()


def learned(train, folder: Path) -> list:
    dataset(folder, train=train)
    return training()


def changed(change: Callable[[dict], object]) -> Callable[[Path], list]:
    def make(folder: Path) -> list:
        change(value := content())
        return annotated(value, folder)
    return make


ODD = {"missing": MISSING, "null": None, "text": "x", "empty": "", "list": [1, [2]], "object": {"a": 1},
       "nan": math.nan, "infinite": math.inf, "overflowing": "@-1e400@", "huge": 1e300, "400 digits": 10 ** 400,
       "negative": -7, "true": True, "a megabyte": "y" * 1_000_000}
RARE = {"empty", "overflowing", "a megabyte", "object", "huge", "true", "infinite", "negative"}        # slow
SKIPPED, BOX, AREA = "annotations skipped: ", "taken from their keypoints", "people without area|area does not suit"
COUNTED = "people without, or with a wrong num_keypoints: counted"
SIZE = "images without width and height: taken from the picture|the picture is right"
FIELDS = {      # of the second image or person -> what is said of an odd value, and the values that are right
    ("annotations", "image_id"): (SKIPPED + "their image is not in the list", {"true"}),
    ("annotations", "category_id"): ("", {*ODD}),               # one category has keypoints: others may lie
    ("annotations", "id"): ("", {*ODD}),                        # a name for the notes
    ("annotations", "bbox"): (BOX, {}),
    ("annotations", "area"): (AREA, {}),
    ("annotations", "iscrowd"): (
        "people without iscrowd", {"huge", "infinite", "true", "negative", "overflowing", "400 digits"}),
    ("annotations", "num_keypoints"): (COUNTED, {}),
    ("annotations", "keypoints"): (f"{SKIPPED}not 17 keypoints|{COUNTED}", {}),
    ("images", "id"): ("images skipped: |their image is not in the list", {}),
    ("images", "file_name"): ("images skipped: |images not there", {}),
    ("images", "width"): (SIZE, {}),
    ("images", "height"): (SIZE, {})}
BAD_JSON = "not complete JSON|cannot read d/ann"
FILES = {       # what val's annotation file holds -> the error
    "empty": (b"", BAD_JSON), "a brace": (b"{", BAD_JSON), "cut": (json.dumps(content())[:700], BAD_JSON),
    "a page": ("<html></html>", BAD_JSON), "bytes": (bytes(range(256)), BAD_JSON), "zeros": (bytes(4096), BAD_JSON),
    "an archive": (b"PK\x03\x04" + bytes(99), BAD_JSON), "twice": (json.dumps(content()) * 2, BAD_JSON),
    "deep": ("[" * 100_000, "nested too deeply"), "deep objects": ('{"a":' * 100_000, "nested too deeply"),
    "digits": ('{"images": ' + "9" * 5000 + "}", BAD_JSON),
    "a list": ("[]", "not a COCO"), "a number": ("5", "not a COCO"), "null": ("null", "not a COCO"),
    "a text": ('"a"', "not a COCO"), "images an object": (dict(images={}, annotations=[]), "not a COCO"),
    "no images": (dict(images=[], annotations=[]), "not a COCO|lists no images"),
    "no annotations": (dict(images=[5], annotations=5), "not a COCO"),
    "nulls": (dict(images=[None], annotations=[None]), "lists no images"),
    "boxes alone": (content() | dict(annotations=[person(1, 1, keypoints=None)]), "not a keypoint file"),
    "14 keypoints": (dict(content(), annotations=[person(1, 1, keypoints=[1, 1, 2] * 14)], categories=[]),
                     "14 keypoints per person"),
    "no picture": (dict(content(), images=[image(9)], annotations=[person(1, 9)]), "none of the 1 images")}
PEOPLE = {      # a second person of image 2 -> what is counted
    "16 keypoints": (dict(keypoints=[1, 1, 2] * 16), "1 annotations skipped: not 17"),
    "pairs": (dict(keypoints=[1, 1] * 17), "1 annotations skipped: not 17"),
    "texts": (dict(keypoints=["a"] * 51), "1 annotations skipped: not 17"),
    "digits": (dict(keypoints=[10 ** 400, 5, 2] * 17), "1 annotations skipped: not 17"),
    "nan": (dict(keypoints=[math.nan] * 51), "1 people with keypoints that are no"),
    "far away": (dict(keypoints=[1e30, 5, 2] * 17), "1 people with keypoints that are no"),
    "outside": (dict(keypoints=[90, 90, 2] * 17), "1 people with labelled keypoints outside"),
    "a box of three": (dict(bbox=[1, 2, 3]), BOX), "a ragged box": (dict(bbox=[[1], [2, 3]]), BOX),
    "a box of nan": (dict(bbox=[math.nan] * 4), BOX), "a box without end": (dict(bbox=[0, 0, math.inf, 9]), BOX),
    "a box of 1e300": (dict(bbox=[-1e300, 0, 1e308, 9]), BOX + "|does not suit"),
    "a backward box": (dict(bbox=[50, 30, -20, -10]), BOX), "a box outside": (dict(bbox=[500, 30, 20, 10]), BOX),
    "nothing": (dict(bbox=None, keypoints=[0] * 51), "1 annotations skipped: .*, and no keypoints"),
    "area of 1e39": (dict(area=1e39), "1 people without area"), "area of 1e-300": (dict(area=1e-300), "1 people whose area"),
    "area of 1e6": (dict(area=1e6), "1 people whose area does not suit"),
    "ignore": (dict(ignore=1), "1 people with ignore: 1"), "an id twice": (dict(id=2), "1 annotation ids that appear")}
IMAGES = {      # a fourth image -> what is counted
    "an id twice": (dict(id=2), "1 images skipped: their id"), "an id twice, as text": (dict(id="2"), "1 images skipped: their id"),
    "a file twice": (dict(file_name="2.png"), "2 images that share their file"),
    "a long name": (dict(file_name="x" * 300 + ".png"), "1 images not there"),
    "a name with a zero": (dict(file_name="a\0.png"), "1 images not there"),
    "half a letter": (dict(file_name="\ud800.png"), "1 images not there"),
    "a name outside": (dict(file_name="../../../secret.png"), "1 images not there"),
    "an absolute name": (dict(file_name="/etc/hostname"), "1 images not there"),
    "a folder's name": (dict(file_name="."), "1 images (not there|could not be read)")}
DOG = dict(id=2, name="dog", keypoints=["nose", "tail"])
CHANGES = {     # of the whole file -> what is counted
    "images that are no objects": (lambda c: c["images"].extend([None, 5, [], "x"]), "4 images skipped"),
    "people that are no objects": (lambda c: c["annotations"].extend([None, 5, [], "x"]), "4 annotations skipped"),
    "30 people": (lambda c: c["annotations"].extend(person(n, 2) for n in range(4, 34)), "1 images have more than 20"),
    "sizes exchanged": (lambda c: (c["images"][1].update(width=40, height=60), c["annotations"][1].update(
        bbox=[30, 10, 30, 20])), "1 images whose width and height are exchanged"),
    "another size": (lambda c: c["images"][1].update(width=600, height=400), "600x400: the picture is right"),
    "another category": (lambda c: (c["annotations"][1].update(category_id=2), c["categories"].append(DOG)),
                         "1 annotations skipped: of a category without these keypoints"),
    "categories: 5": (lambda c: c.update(categories=5), "does not name: 17 keypoints"),
    "categories of nothing": (lambda c: c.update(categories=[None, 5, "x", {}]), "does not name: 17 keypoints"),
    "categories: one object": (lambda c: c.update(categories=c["categories"][0]), "skeleton coco"),
    "names of nothing": (lambda c: c["categories"][0].update(keypoints=[{}] * 17), "otherwise than skeleton 'coco'"),
    "two names": (lambda c: c["categories"][0].update(keypoints=["a", "b"]), "another number of keypoints than the 17"),
    "names in another order": (lambda c: c["categories"][0]["keypoints"].reverse(), "otherwise than skeleton")}
TRAINED = {     # train's annotation file -> what is said, exit code
    "cut": (json.dumps(content())[:700], BAD_JSON, 2),
    "without labels": (dict(content(), annotations=[person(n, n, keypoints=[0] * 51) for n in (1, 2, 3)]),
                       "nobody has a labelled", 2),
    "crowds": (dict(content(), annotations=[person(n, n, iscrowd=1) for n in (1, 2, 3)]), "nobody has a labelled", 2),
    "nobody": (dict(content(), annotations=[]), "nobody has a labelled|no labels", 2),
    "odd people": (dict(content(), annotations=[
        person(1, 1), person(2, 2, bbox=None, area="x", iscrowd=[], num_keypoints=1e300),
        person(3, 3, keypoints=[math.nan] * 51), person(4, "x"), 5]), "1 annotations skipped: their image", 0),
    "tiny boxes": (dict(content(), annotations=[person(n, n, bbox=[20, 15, 1e-9, 1e-9], area=1e-9) for n in (1, 2, 3)]),
                   "whose area", 0)}
PLACES = {      # what lies where a file should
    "a folder": Path.mkdir, "a pipe": os.mkfifo, "a link to nothing": lambda path: path.symlink_to("gone"),
    "a link to itself": lambda path: path.symlink_to(path), "a device": lambda path: path.symlink_to("/dev/zero")}


def in_place(put_there: Callable[[Path], object], name: str, folder: Path) -> list:
    """Something else where a file of the good dataset is."""
    dataset(folder)
    path = folder / "d" / name
    path.unlink()
    put_there(path)
    return evaluating()


def layout(files: dict[str, bytes], words: list, folder: Path) -> list:
    """Evaluate on a folder d of these files."""
    for name, data in files.items():
        path = folder / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return evaluating(*words)


def with_field(where: str, field: str, value) -> Callable[[Path], list]:
    return changed(lambda content: put(content[where][1], field, value))


def annotations() -> Iterator[Case]:
    kind, file = "annotation files", "annotations/person_keypoints_val2017.json"
    for name, (val, said) in FILES.items():
        yield Case(kind, name, partial(annotated, val), said)
    for name, put_there in PLACES.items():
        yield Case(kind, name, partial(in_place, put_there, file), "cannot read d/ann")
    good = {file: to_json(content()), "val2017/1.png": PNG}
    for name, files, words, said in (
            ("no folder", {}, [], "no data folder d"), ("pictures alone", {"val2017/1.png": PNG}, [], "no annotation file"),
            ("a file as the folder", {"": b"x"}, [], "no data folder d"), ("MATLAB", {"annotations/val/a.mat": b"x"}, [], "MATLAB"),
            ("another split", good, ["--split", "q"], "no annotation file for split 'q'"),
            ("another category", good, ["--category", "cat"], "no category cat")):
        yield Case(kind, name, partial(layout, files, words), said)
    yield Case(kind, "UTF-16", partial(annotated, json.dumps(content()).encode("utf-16")), "3 images in", 0)
    for name, (train, said, code) in TRAINED.items():
        yield Case(kind, f"trained: {name}", partial(learned, train), said, code)
    kind = "annotations"
    for name, (fields, said) in PEOPLE.items():
        yield Case(kind, name, changed(lambda c, f=fields: c["annotations"].append(person(4, 2) | f)), said, 0)
    for name, (fields, said) in IMAGES.items():
        yield Case(kind, f"image: {name}", changed(lambda c, f=fields: c["images"].append(image(4) | f)), said, 0)
    for name, (change, said) in CHANGES.items():
        yield Case(kind, name, changed(change), said, 0)
    for (where, field), (said, fine) in FIELDS.items():
        for name, value in ODD.items():
            yield Case(kind, f"{where}: {field} {name}", with_field(where, field, value), "" if name in fine else said, 0,
                       name in RARE or fine == {*ODD} and name != "missing")


# ---------------------------------------------------------------- pictures and videos

def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, zeros: int = 0) -> bytes:
    """A gray PNG of so many bytes of zeros."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(zeros)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + data + chunk(b"IEND", b"")


def square(side: int) -> bytes:
    return png(side, side, zeros=(side + 1) * side)


def flipped(data: bytes, seed: int = 0, count: int = 40) -> bytes:
    """With flipped bits, in the last three quarters."""
    rng, data = np.random.default_rng(seed), bytearray(data)
    for i in rng.integers(len(data) // 4, len(data), count):
        data[i] ^= 1 << int(rng.integers(8))
    return bytes(data)


def moving(kind: str, size: tuple[int, int] = (60, 40), count: int = 4) -> bytes:
    frames = [Image.new("L", size, 9 * i) for i in range(count)]
    frames = frames if kind == "GIF" else [frame.convert("RGB") for frame in frames]
    return in_bytes(frames[0], kind, save_all=True, append_images=frames[1:])


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def oriented(value: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = value
    return tags.tobytes()


@lru_cache
def clip(ending: str, sound: bool = False) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        return encode(Path(place) / f"clip.{ending}", sound).read_bytes()


KINDS = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP"}
BOMB = b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20))
UNREADABLE = {      # name -> ending, content
    "empty": ("jpg", b""), "text": ("jpg", b"no picture"), "a page": ("jpg", b"<html></html>"), "zeros": ("jpg", bytes(5000)),
    "SVG": ("png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "PDF": ("jpg", b"%PDF-1.4\n%%EOF"),
    "HEIC": ("jpg", b"\0\0\0\x18ftypheic" + bytes(40)),
    "PostScript": ("jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file\n%%EOF\n"),
    "PNG of 60000x60000": ("png", png(60000, 60000)), "PNG of no width": ("png", png(0, 40)),
    "PNG of wrong sums": ("png", PNG[:45] + bytes([PNG[45] ^ 255]) + PNG[46:]),
    "PNG of too much text": ("png", lambda: png(9, 9, chunk(*BOMB), zeros=90)), "PNG of too little": ("png", png(60, 40, zeros=9)),
    "BMP of 60000x60000": ("bmp", b"BM" + struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, 60000, 60000, 1, 24) + bytes(24)),
    "GIF without frames": ("gif", b"GIF89a<\0(\0\0\0\0;"),
    "GIF of 65535x65535": ("gif", b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6)
                           + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;"),
    "TIFF of itself": ("tif", b"II*\0\x08\0\0\0\0\0\x08\0\0\0"),
    "TIFF of 2^32 numbers": ("tif", b"II*\0\x08\0\0\0\x01\0\0\x01\x04\0\xff\xff\xff\xff\x10\0\0\0")}
ODD_PICTURES = {    # name -> ending, content: may be drawn, or counted
    "PNG that unpacks to 300 MB": ("png", lambda: png(9, 9, zeros=300 << 20)),
    **{f"mode {mode}": ("png", lambda mode=mode: in_bytes(picture().convert(mode), "PNG")) for mode in "1 L LA P RGBA".split()},
    **{f"mode {mode}": ("tif", lambda mode=mode: in_bytes(Image.new(mode, (60, 40)), "TIFF"))
       for mode in "CMYK LAB YCbCr F I;16".split()},
    "floats of nan": ("tif", lambda: in_bytes(Image.fromarray(np.full((40, 60), np.nan, np.float32)), "TIFF")),
    **{f"orientation {value}": ("jpg", lambda value=value: in_bytes(picture(), "JPEG", exif=oriented(value))) for value in (3, 99)},
    "EXIF of noise": ("jpg", lambda: in_bytes(picture(), "JPEG", exif=b"Exif\0\0" + flipped(oriented(6), 0, 9))),
    "a profile of noise": ("jpg", lambda: in_bytes(picture(), "JPEG", icc_profile=bytes(range(256)))),
    **{f"{w}x{h}": ("png", lambda w=w, h=h: png(w, h, zeros=(w + 1) * h)) for w, h in ((1, 1), (1, 4000), (4000, 1), (3, 30000))}}
for ending, kind in KINDS.items():
    UNREADABLE |= {f"half a {ending}": (ending, lambda kind=kind: cut(in_bytes(noise(), kind), 2)),
                   f"a start of {ending}": (ending, lambda kind=kind: in_bytes(noise(), kind)[:20])}
    ODD_PICTURES |= {f"flipped bits, {ending}": (ending, lambda kind=kind: flipped(in_bytes(noise(), kind))),
                     f"{ending} called otherwise": ("bmp" if ending != "bmp" else "gif", lambda kind=kind: in_bytes(noise(), kind))}
    if kind in ("GIF", "WEBP", "PNG", "TIFF"):
        ODD_PICTURES |= {f"cut animation, {ending}": (ending, lambda kind=kind: moving(kind)[:-40]),
                         f"flipped bits, moving {ending}": (ending, lambda kind=kind: flipped(moving(kind), 1, 9))}
HUGE = {"9000x9000": ("png", partial(square, 9000)), "13000x13000": ("png", partial(square, 13000)),
        "41 frames of 4000x4000": ("gif", partial(moving, "GIF", (4000, 4000), 41))}
NAMES = ["sp ace", "new\nline", "per%cent%d", "hash#1", "umlaut-é", "smile-😀", "-dash", "a.b.c", "quote'\"", "[1]", "x" * 250,
         "caf\udce9"]
VIDEOS = {      # name -> ending, content, whether it may be readable
    "empty": ("mp4", b"", False), "text": ("mp4", b"no video", False), "zeros": ("mp4", bytes(9999), False),
    "a page": ("mp4", b"<html>", False), "a picture": ("mp4", PNG, True),
    "a playlist": ("mp4", b"#EXTM3U\n#EXTINF:1,\nin/good.png\n#EXT-X-ENDLIST\n", False),
    "addresses": ("mp4", b"ffconcat version 1.0\nfile 'good.png'\n", False),
    "a track of text": ("mp4", lambda: clip("mp4", True).replace(b"vide", b"text"), True),
    "a part longer than the file": ("mp4", lambda: clip("mp4", True).replace(b"moov", b"\x7f\xff\xff\xff"), True),
    "a side of 60000": ("mp4", lambda: clip("mp4").replace(struct.pack(">HH", 64, 48), struct.pack(">HH", 60000, 60000)), True),
    "no time": ("mp4", lambda: clip("mp4").replace(struct.pack(">I", 1000), bytes(4)), True)}
for ending in "mp4", "webm", "mkv", "avi":
    VIDEOS |= {f"a start of {ending}": (ending, lambda ending=ending: clip(ending)[:100], False),
               f"half a {ending}": (ending, lambda ending=ending: cut(clip(ending), 2), True),
               f"flipped bits, {ending}": (ending, lambda ending=ending: flipped(clip(ending), 2), True),
               f"noise, {ending}": (ending, lambda ending=ending: clip(ending)[:200] + np.random.default_rng(0).bytes(5000), True)}


def cut(data: bytes, by: int) -> bytes:
    return data[:len(data) // by]


def writer(data: bytes | Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data())


def drawn(put_there: Callable[[Path], object], name: str, folder: Path) -> list:
    """Draw on a folder with a good picture and this one."""
    (folder / "in").mkdir()
    (folder / "in/good.png").write_bytes(PNG)
    put_there(folder / "in" / name)
    return drawing("in")


def alone(words: list, folder: Path) -> list:
    """Draw on one of these, none of which is a picture."""
    (folder / "empty").mkdir()
    (folder / "bad.png").write_bytes(b"x")
    (folder / "bad.mp4").touch()
    os.mkfifo(folder / "pipe.png")
    return drawing(*words)


def pictures() -> Iterator[Case]:
    kind, bad, either = "pictures", "1 could not be read", "in 2 pictures; drawn|1 could not be read"
    skipped, evaluated = "1 images could not be read: their people", "val2017/2.png"
    for name, (ending, data) in UNREADABLE.items():
        yield Case(kind, f"drawn: {name}", partial(drawn, writer(data), f"bad.{ending}"), bad, 0)
        yield Case(kind, f"evaluated: {name}", partial(in_place, writer(data), evaluated), skipped, 0, True)
    for name, (ending, data) in (ODD_PICTURES | HUGE).items():
        yield Case(kind, f"drawn: {name}", partial(drawn, writer(data), f"bad.{ending}"), either, 0, name in HUGE)
        yield Case(kind, f"evaluated: {name}", partial(in_place, writer(data), evaluated), "3 images in", 0, True)
    for name, put_there in PLACES.items():
        yield Case(kind, f"drawn: {name}", partial(drawn, put_there, "bad.png"), bad, 0)
        yield Case(kind, f"evaluated: {name}", partial(in_place, put_there, evaluated), skipped, 0)
        yield Case("videos", name, partial(drawn, put_there, "bad.mp4"), bad, 0)
    for name in NAMES:
        yield Case(kind, f"called {name!r:.20}", partial(drawn, writer(PNG), f"{name}.png"), "in 2 pictures; drawn", 0)
    for name, (ending, data, readable) in VIDEOS.items():
        yield Case("videos", name, partial(drawn, writer(data), f"bad.{ending}"), either if readable else bad, 0)
    for word, said in (("a.png", "there is no picture or folder a.png"), ("empty", "no pictures in empty"),
                       *((name, "none of the 1 pictures could be read") for name in ("bad.png", "pipe.png", "/dev/null", "bad.mp4"))):
        yield Case(kind, f"only {word}", partial(alone, [word]), said)


# ---------------------------------------------------------------- boxes

def row(**fields) -> dict:
    return dict(image_id=2, category_id=1, bbox=[10, 10, 30, 20], score=0.9) | fields


def boxed(rows, folder: Path, *words) -> list:
    dataset(folder)
    (folder / "b.json").write_bytes(to_json(rows))
    return evaluating("--boxes", "b.json", *words)


BAD_BOXES = {   # the file -> the error
    "empty": b"", "cut": json.dumps([row()])[:20], "bytes": bytes(range(256)), "an object": "{}", "nothing": "[]",
    "numbers": "[1, 2]", "nulls": "[null]", "lists": "[[1]]", "deep": "[" * 100_000, "digits": "[" + "9" * 5000 + "]",
    "of other images": [row(image_id=77)], "no box": [row(bbox=None)], "no id": [dict(bbox=[1, 1, 9, 9], score=1)],
    "a COCO file": content()}
BAD_BOX = {"of three": [1, 2, 3], "ragged": [[1], [2, 3]], "of nan": [math.nan] * 4, "backward": [30, 30, -9, -9],
           "outside": [500, 500, 9, 9], "of texts": ["a", 1, 2, 3], "without end": [0, 0, math.inf, 9], "of digits": [0, 0, 10 ** 400, 9]}
FINE = {*(("category_id", name) for name in ODD), ("image_id", "true"),
        *(("score", name) for name in ("true", "missing", "huge", "negative"))}


def boxes() -> Iterator[Case]:
    kind, left_out = "boxes", " left out"
    for name, rows in BAD_BOXES.items():
        yield Case(kind, name, partial(boxed, rows), "b.json")
    yield Case(kind, "absent", partial(layout, {"val2017/1.png": PNG, "annotations/person_keypoints_val2017.json": to_json(
        content())}, ["--boxes", "b.json"]), "b.json")
    yield Case(kind, "and a detector", lambda folder: boxed([row()], folder, "--detector", "d"), "give one of them")
    yield Case(kind, "of a method without", lambda folder: drawing("d", "--boxes", "b.json"), "finds people by itself")
    for field in "bbox", "score", "image_id", "category_id":
        for name, value in ODD.items():
            put(changed_row := row(), field, value)
            yield Case(kind, f"{field} {name}", partial(boxed, [row(), changed_row]),
                       "person boxes" if (field, name) in FINE else left_out, 0, name in RARE)
    for name, box in BAD_BOX.items():
        yield Case(kind, f"a box {name}", partial(boxed, [row(), row(bbox=box)]), left_out, 0)


# ---------------------------------------------------------------- checkpoints

class Code:
    """Makes the folder `ran` when it is unpickled carelessly."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def stored(change: Callable[[dict], object]) -> Callable[[Path], list]:
    """The run's last.pt, changed, draws on a picture."""
    def make(folder: Path) -> list:
        change(saved := kit().saved | {})
        torch.save(saved, folder / "a.pt")
        return with_file(folder)
    return make


def with_file(folder: Path, file: str = "a.pt") -> list:
    (folder / "p.png").write_bytes(PNG)
    return ["eval.py", file, "--out", "out", "--images", "p.png"]


def as_file(change: Callable[[bytes], bytes], folder: Path, name: str = "a.pt") -> list:
    """The bytes of last.pt, changed."""
    (folder / name).write_bytes(change(kit().last.read_bytes()))
    return with_file(folder, name)


def resumed(change: Callable[[dict], object], words: list, folder: Path) -> list:
    dataset(folder)
    change(saved := kit().saved | {})
    (folder / "run").mkdir()
    torch.save(saved, folder / "run/last.pt")
    return ["detrpose.py", "--resume", "run", "--epochs", 2, "--out", "out", *words]


def started(change: Callable[[bytes], bytes], folder: Path) -> list:
    dataset(folder)
    (folder / "a.pt").write_bytes(change(kit().last.read_bytes()))
    return training("--init", "a.pt")


def odd_tensor(change: Callable[[dict, str], object]) -> Callable[[dict], object]:
    """Change(state, name of its first matrix) for the weights and their average."""
    def change_both(saved: dict) -> None:
        for part in "model", "ema":
            saved[part] = {name: value.clone() for name, value in saved[part].items()}
            change(saved[part], next(name for name, value in saved[part].items() if value.ndim > 1))
    return change_both


def with_byte(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]


def safetensors(header: str) -> Callable[[bytes], bytes]:
    return lambda data: struct.pack("<Q", len(header)) + header.encode() + bytes(8)


NO_FILE = "neither a torch nor|cut short|it is empty|more than tensors|no tensors|web page|no checkpoint"
BYTES = {       # of last.pt
    "empty": lambda data: b"", "text": lambda data: b"hello", "a page": lambda data: b"<!DOCTYPE html>",
    "zeros": lambda data: bytes(9999), "a start": lambda data: data[:4], "all but a byte": lambda data: data[:-1],
    "all but the start": lambda data: data[1:], "a flipped bit": lambda data: with_byte(data, len(data) // 2),
    "a flipped bit at the end": lambda data: with_byte(data, len(data) - 30), "a picture": lambda data: PNG,
    "an empty archive": lambda data: b"PK\5\6" + bytes(18), "a pickle of nothing": lambda data: b"\x80\x02N.",
    "a pickle without end": lambda data: b"\x80\x02" + b"(" * 99_999, "a header of 2^62": lambda data: struct.pack("<Q", 2 ** 62),
    **{f"{n}/8": lambda data, n=n: data[:len(data) * n // 8] for n in range(1, 8)}}
HEADERS = {"no JSON": "{x", "data beyond": '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,800]}}',
           "2^62 numbers": '{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,8]}}',
           "an odd type": '{"a":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}}'}
CONFIG = {"lr": "x", "size": 10 ** 15, "dim": -4, "layers": 0, "heads": 7, "queries": None, "backbone": "B9", "nosuch": 1,
          "amp": "fp8", "points": 1e300, "data": 5, "batch": True, "reg_scale": math.inf, "expansion": math.nan}
SKELETON = [("keypoints", 5), ("keypoints", ["a"]), ("edges", [[0, 99]]), ("edges", "x"), ("flip", [5] * 17), ("flip", 5),
            ("sigmas", [0.0] * 17), ("sigmas", [math.nan] * 17), ("name", None)]
TENSORS = {     # change of a state -> the error
    "nan": (lambda state, name: state[name].fill_(math.nan), "not finite"),
    "infinite": (lambda state, name: state[name][0].fill_(math.inf), "not finite"),
    "one less": (lambda state, name: state.pop(name), "not in the weights"),
    "one more": (lambda state, name: state.update({"module.more": torch.ones(1), "more": torch.ones(1)}), "not in the model"),
    "another shape": (lambda state, name: state.update({name: torch.ones(3)}), "of another shape"),
    "none": (lambda state, name: state.clear(), "do not fit"), "a text": (lambda state, name: state.update({name: "x"}), "a.pt"),
    "complex": (lambda state, name: state.update({name: state[name].to(torch.complex64)}), "do not fit"),
    "sparse": (lambda state, name: state.update({name: state[name].to_sparse()}), "do not fit|a.pt"),
    "a number as name": (lambda state, name: state.update({5: torch.ones(1)}), "do not fit|a.pt")}
RESUMED = {     # fields of last.pt that are gone, or others
    "optimizer": (MISSING, {}, "x"), "rows": (MISSING, "x", [1]), "epoch": (MISSING, "x", -5, 1e300), "step": (math.nan, -1),
    "best": ("x",), "done": ("x", -3), "ema": ({}, "x")}


def checkpoints() -> Iterator[Case]:
    kind = "checkpoints"
    for name, change in BYTES.items():
        yield Case(kind, name, partial(as_file, change), NO_FILE)
    for name, header in HEADERS.items():
        yield Case(kind, f"safetensors: {name}", partial(as_file, safetensors(header), name="a.safetensors"), "cut short or damaged")
    for name, put_there in PLACES.items():
        yield Case(kind, name, lambda folder, put=put_there: (put(folder / "a.pt"), with_file(folder))[1], "a.pt|best.pt")
    for name, said in (("a.pt", "there is no checkpoint a.pt"), ("detrpose-q", "did you mean detrpose"), ("resnet50", "for --init")):
        yield Case(kind, f"absent: {name}", partial(with_file, file=name), said)
    yield Case(kind, "a foreign model", lambda folder: (save_file({"w": torch.ones(3)}, folder / "a.pt"), with_file(folder))[1],
               "has no tensors of")
    for part in "method", "preset", "config", "skeleton", "model":
        for value in (MISSING, None, 5, [1], "?", *([{}] if part != "model" else [])):
            yield Case(kind, f"{part} {'missing' if value is MISSING else value}", stored(partial(put, field=part, value=value)),
                       r"a\.pt|keypoint set|skeleton|do not fit", slow=value == [1])
    for name, change in {"another method": dict(method="querypose"), "a method that is a module": dict(method="os"), "a method that is a path":
                         dict(method="../../x"), "code": dict(more=Code()), "code in the config": dict(config=Code()),
                         "code in the tensors": dict(model={"a": Code()})}.items():
        yield Case(kind, name, stored(lambda saved, change=change: saved.update(change)), "method|more than tensors|another version")
    for field, value in CONFIG.items():
        yield Case(kind, f"config: {field} {value}", stored(lambda saved, one={field: value}: saved.update(config=saved["config"] | one)),
                   "damaged|no option|expected|do not fit|multiple|choose from|split|the memory is full")
    for field, value in SKELETON:
        yield Case(kind, f"skeleton: {field} {str(value)[:12]}", stored(lambda saved, one={field: value}: saved.update(
            skeleton=saved["skeleton"] | one)), "keypoint set|an edge of|flip table|sigmas")
    for name, (change, said) in TENSORS.items():
        yield Case(kind, f"tensors: {name}", stored(odd_tensor(change)), said)
    for field, values in RESUMED.items():
        for value in values:
            yield Case(kind, f"resumed: {field} {'missing' if value is MISSING else str(value)[:9]}",
                       partial(resumed, partial(put, field=field, value=value), []), "has no|does not fit|damaged")
    for name, change, words, said in (
            ("another method", dict(method="sdpose"), [], "go on with python sdpose.py"), ("no such preset", dict(preset="q"), [], "no preset q"),
            ("another preset", {}, ["--preset", "l"], "of preset tiny, not l"), ("other layers", {}, ["--layers", 2], "resume with the flags")):
        yield Case(kind, f"resumed: {name}", partial(resumed, lambda saved, change=change: saved.update(change), words), said)
    yield Case(kind, "resumed: best.pt", lambda folder: (dataset(folder), ["detrpose.py", "--resume", kit().best, "--out", "out"])[1],
               "best.pt for eval.py")
    for name, change in {"a cut file": lambda data: data[:-99], "text": lambda data: b"x", "another method":
                         lambda data: (kit().folder / "coco.pt").read_bytes()}.items():
        yield Case(kind, f"started from {name}", partial(started, change), NO_FILE + "|starts from a run of its own")


# ---------------------------------------------------------------- flags

METHODS = ("detrpose", "diffusionregpose", "querypose", "diffusionpose", "sdpose")
TRAINING = """--batch 0|--batch -1|--batch x|--batch 1.5|--batch|--batch ４x|--batch 4 5|--lr nan|--lr inf|--lr -1
    |--lr x|--lr 1e300|--lr=,|--epochs 0|--epochs 99999999999999|--epochs nan|--epochs=|--accum 0
    |--amp fp8|--processes 0|--workers -1|--eval_every 0|--eval_batch 0|--seed -1|--seed 1e300
    |--patience 0|--preset nosuch|--preset|--resume nowhere|--init nowhere.pt|--init|--device gpu
    |--device cuda:99|--val_share 2|--val_share nan|--sigmas a,b|--sigmas 0.1|--sigmas nan|--bacth 4
    |-b 4|train|--out|--clip 0|--weight_decay nan|--warmup -1|--category cat|--data nowhere
    |--data d/val2017/1.png"""
OWN = {         # what only a method's model can refuse
    "detrpose": """--heads 5|--size 100|--size 0|--levels 9|--dim 33|--queries 0|--queries 1000000000000
    |--points 9999999999|--backbone B9|--mosaic 2|--ema 1.5|--expansion 1e-9
    |--frozen_norm""",
    "diffusionregpose": """--scale 1e300|--points 9223372036854775808|--queries 0|--dim 33|--heads 7|--steps 0|--steps 10000000
    |--short_side 0""",
    "querypose": """--queries 0|--queries 99999999999|--short_side 0|--dim 7|--stages 0""",
    "diffusionpose": """--sigma 1e300|--height 17|--width 0|--dim 33|--heads 7|--steps 0|--steps 5000|--signal_scale 0
    |--drop_epochs x|--height 1600000""",
    "sdpose": """--sigma 1e300|--channels 7 --head_dim 7 --groups 7|--height 17|--width 0|--steps 0"""}
EVALUATING = """--threshold x|--threshold|--threshold nan|--set|--set steps|--set nosuch=1|--set steps=4
    |--split nosuch|--data nowhere|--images|--images nowhere|--boxes a.json|--detector nowhere
    |--export a.txt|--export nowhere/a.onnx|--bench nowhere.onnx|--workers -1|--workers x|--eval_batch 0
    |--eval_batch -1|--device gpu|--method nosuch|--method sdpose|--preset l|--sigmas x|--sigmas 0.1
    |--category cat|--nosuch|extra|--out d/val2017/1.png|--out d/val2017/1.png/x|--detector nowhere.pt"""


def flagged(command: Callable[[], list], folder: Path) -> list:
    dataset(folder)
    return command()


def flags() -> Iterator[Case]:
    for words in map(str.split, TRAINING.split("|")):
        yield Case("flags", f"train {' '.join(words)}", partial(flagged, lambda words=words: training(*words)), "error: .")
    for method, lines in OWN.items():
        for words in re.sub(r"\n\s*", "", lines).split("|"):
            command = [f"{method}.py", *"--train --data d --out out --processes 1 --workers 0 --init".split(), "", *words.split()]
            yield Case("flags", f"{method} {words}", partial(flagged, command.copy), "error: .")
    for words in map(str.split, EVALUATING.split("|")):
        yield Case("flags", f"eval {' '.join(words)}", partial(flagged, lambda words=words: [
            "eval.py", kit().best, "--data", "d", *([] if "--out" in words else ["--out", "out"]), *words]), "error: .")
    yield Case("flags", "eval", lambda folder: ["eval.py"], "required: checkpoint")


# ---------------------------------------------------------------- all of it

def cases() -> list[Case]:
    return [*annotations(), *pictures(), *boxes(), *checkpoints(), *flags()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="beginnings of kinds or names; default: all")
    parser.add_argument("--slow", action="store_true", help="also what takes seconds each")
    args, tried, held = parser.parse_args(), Counter(), Counter()
    sys.stdout.reconfigure(errors="backslashreplace")
    with tempfile.TemporaryDirectory() as place:
        for number, case in enumerate(cases()):
            chosen = not args.kinds or any(case.kind.startswith(kind) or case.name.startswith(kind) for kind in args.kinds)
            if chosen and (args.slow or not case.slow):
                began = time.process_time()
                why = falls_short(case, Path(place) / str(number))
                tried[case.kind] += 1
                held[case.kind] += not why
                if why or time.process_time() - began > 2:
                    print(f"{case.kind}: {case.name} ({time.process_time() - began:.1f} s): {why or 'held'}\n", flush=True)
                shutil.rmtree(Path(place) / str(number))
    for kind in tried:
        print(f"{kind:18}{tried[kind]:>6} tried{held[kind]:>6} held")
    print(f"{'together':18}{tried.total():>6} tried{held.total():>6} held in {time.process_time():.0f} s of a core")


if __name__ == "__main__":
    main()
