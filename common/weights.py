"""Released weights: found by name, fetched once, read without running code, loaded strictly both ways.

    path = fetch("detrpose-l")                  a file; a folder where a release has several files
    load_strict(model, rename(load_tensors(path), RENAME), IGNORED)

Environment  POSE_CACHE             folder that keeps what was fetched; default: `pose` in the system's caches,
                                    and where that is read-only, `weights` in the current folder
             POSE_WEIGHTS_URL       a mirror to use for the authors' addresses, laid out like the cache folder
             https_proxy, no_proxy  as in every other program
"""
import contextlib
import difflib
import glob
import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
import uuid
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, build_opener

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import safe_globals
from tqdm import tqdm

from common.errors import UserError
from common.ranks import say
from common.records import whole
from common.skeletons import Skeleton, get_skeleton, rows_in


# ---------------------------------------------------------------------- what can be asked for by name
@dataclass(frozen=True)
class Release:
    """Weights that the authors of a paper published."""
    licence: str
    files: dict[str, str]      # place below the cache folder -> address
    method: str = ""           # the method file that reads them; "" = weights to start from, for --init
    published: dict[str, float] = field(default_factory=dict)      # the authors' AP, percent, by split of a dataset
    by_hand: bool = False      # a person has to click there (Google Drive)
    made_of: tuple[str, str] = ("", "")    # (a file that is read once, the small one made of it and kept in its place)

    def missing(self, folder: Path) -> list[str]:
        """Which files are still to be had; one is not wanted any more once there is what was made of it."""
        source, made = self.made_of
        return [file for file in self.files if not (folder / file).is_file()
                and not (file == source and (folder / made).is_file())]


def one(licence: str, folder: str, file: str, method: str = "", **published: float) -> Release:
    return Release(licence, {file: folder + file}, method, published)


DETRPOSE = "https://github.com/SebastianJanampa/DETRPose/releases/download/model_weights/"
DFINE = "https://github.com/Peterande/storage/releases/download/dfinev1.0/"
HUGGING_FACE = "https://huggingface.co/{}/resolve/main/"
DRIVE = "https://drive.google.com/"
QUERYPOSE = (DRIVE + "file/d/1NWdntVoKFz7KjcDjTGwmAHyEEcS2PWC5 or " +
             DRIVE + "file/d/1SFECnDV97D_W9Ij4WjcX3BfbiNbGue67 (one is W32, one W48: the tensors tell)")
SDPOSE_FILES = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                "text_encoder/model.safetensors", "decoder/decoder.safetensors")

RELEASES: dict[str, Release] = {}
for size, val, test in ("n", 57.2, 56.0), ("s", 67.0, 67.4), ("m", 69.4, 72.0), ("l", 72.5, 73.3), ("x", 73.3, 75.1):
    # App. A; CrowdPose: Table 3, n: README
    for suffix, published in ("", dict(coco_val=val)), ("_crowdpose", dict(crowdpose_test=test)):
        RELEASES[f"detrpose-{size}{suffix.replace('_', '-')}"] = one(
            "Apache-2.0", DETRPOSE, f"detrpose_hgnetv2_{size}{suffix}.pth", "detrpose", **published)
for name, published in ("r50", dict(coco_val=72.5)), ("r50-crowdpose", dict(crowdpose_test=72.7)):      # Tables 1, 2
    RELEASES[f"diffusionregpose-{name}"] = Release(
        "none stated; its parent ED-Pose is for non-commercial research",
        {f"diffusionregpose-{name}.pth": DRIVE + "drive/folders/1vSr1MAdp33g_L8HeWyzbHRXR-hRdrzLm"},
        "diffusionregpose", published, by_hand=True)
for net, val in ("hrnet_w32", 69.8), ("hrnet_w48", 71.0):           # the release's README
    RELEASES[f"querypose-{net}"] = Release(
        "MIT", {f"querypose-{net}.pth": QUERYPOSE}, "querypose", dict(coco_val=val), by_hand=True)
for part, published in (("Body", dict(coco_val=81.3, humanart_val=71.2, ood_ood=63.5)),
                        ("Wholebody", dict(wholebody_val=71.5))):   # Tables 1, 2, 8
    name, folder = f"sdpose-{part.lower()}", HUGGING_FACE.format(f"teemosliang/SDPose-{part}")
    RELEASES[name] = Release(
        "code MIT; the weights derive from Stable Diffusion 2 (CreativeML Open RAIL++-M)",
        {f"{name}/{file}": folder + file for file in SDPOSE_FILES}, "sdpose", published,
        made_of=(f"{name}/text_encoder/model.safetensors", f"{name}/empty_text.pt"))

# Weights to start from. DETRPose's backbones are B0 (n, s), B2 (m), B4 (l), B5 (x).
for net in "B0", "B2", "B4", "B5":
    RELEASES[f"hgnetv2-{net.lower()}"] = one("Apache-2.0", DFINE, f"PPHGNetV2_{net}_stage1.pth")
for task, sizes in ("coco", "nsmlx"), ("obj365", "smlx"), ("obj2coco", "smlx"):
    for size in sizes:
        RELEASES[f"dfine-{size}-{task}"] = one("Apache-2.0", DFINE, f"dfine_{size}_{task}.pth")
RELEASES["resnet50"] = one("BSD-3-Clause", "https://download.pytorch.org/models/", "resnet50-0676ba61.pth")
for name in "vitpose-base", "vitpose-base-simple":
    address = HUGGING_FACE.format(f"usyd-community/{name}") + "model.safetensors"
    RELEASES[name] = Release("Apache-2.0", {f"{name}/model.safetensors": address})


class Unusable(Exception):
    """Why an address or a file gives no weights, as the end of a sentence."""


class Interrupted(Unusable):
    """A reason that may be gone at the next try."""


# ---------------------------------------------------------------------- where fetched files live
def cache_folder() -> Path:
    """$POSE_CACHE, else `pose` where this system keeps caches."""
    if os.environ.get("POSE_CACHE"):
        return Path(os.environ["POSE_CACHE"]).expanduser()
    system = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": "~/Library/Caches"}.get(sys.platform)
    try:
        return Path(system or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pose"
    except RuntimeError:                       # a container's user without a home
        return Path("weights")


def writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):        # permission bits tell lies on Windows and on network drives
            return True
    except OSError:
        return False


def fetch(name: str, finds_poses: bool = False) -> Path:
    """The file of a release, or its folder if it has several; downloaded on first use.

    finds_poses: of a name that does not exist, suggest only what is more than weights to start from.
    Raises UserError, one line with the address and the place for the file, if it cannot be had.
    Processes may fetch at once; each then downloads its own copy, so under torchrun let rank 0 go first.
    """
    if name not in RELEASES:
        names = [one for one, release in RELEASES.items() if release.method or not finds_poses]
        near = difflib.get_close_matches(name, names, n=3) or names
        raise UserError(f"no released weights are called {name!r}: did you mean {', '.join(near)}?")
    release, mirror = RELEASES[name], os.environ.get("POSE_WEIGHTS_URL")
    folder, spare = cache_folder(), Path("weights")
    local = next(iter(release.files)) if len(release.files) == 1 else name
    for place in (folder, spare):              # a cache that we may read but not write is a cache
        if not release.missing(place):
            return place / local
    if not writable(folder):
        if not writable(spare):
            raise UserError(f"cannot write to {folder} nor {spare.resolve()}: set POSE_CACHE to another folder")
        print(f"cannot write to {folder}: {name} goes to {spare.resolve()} (POSE_CACHE chooses another folder)")
        folder = spare
    if release.by_hand and not mirror:
        file, page = next(iter(release.files.items()))
        raise UserError(f"{name} has to be fetched with a browser: save {page} as {(folder / file).resolve()}")
    missing = {f"{mirror.rstrip('/')}/{file}" if mirror else release.files[file]: folder / file
               for file in release.missing(folder)}
    announce(f"{name} ({release.licence})", list(missing), folder)
    for address, target in missing.items():
        download(address, target)
    return folder / local


def announce(what: str, addresses: list[str], folder: Path) -> None:
    """Say how large the files are together, before the first is fetched; UserError if they do not fit."""
    sizes, free = [], shutil.disk_usage(folder).free
    for address in addresses:                  # where one fails, fetching tells why
        with contextlib.suppress(Unusable, ValueError), connect(address, method="HEAD") as response:
            sizes.append(int(response.headers.get("Content-Length") or 0))
    total = f"{sum(sizes) / 1e6:.1f} MB"
    known = len(sizes) == len(addresses) and all(sizes)
    print(f"{what}: {len(addresses)} file{'s' * (len(addresses) > 1)} to fetch into {folder.resolve()}, " +
          (f"{total} together" if known else "their sizes are not announced"))
    if sum(sizes) > free:
        raise UserError(f"{what} needs {total}, only {free / 1e6:.1f} MB fit into {folder.resolve()}: make room, or "
                        "choose another folder with POSE_CACHE")


# ---------------------------------------------------------------------- downloading
ATTEMPTS = 3
PAUSE = 1.0        # seconds before the second attempt, twice that before the third
TIMEOUT = 30.0     # seconds without a byte after which a connection counts as broken


def download(url: str, target: Path) -> None:
    """Put what `url` serves at `target`, complete and checked, or raise UserError and leave nothing."""
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")     # others may fetch the same file now
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{glob.escape(target.name)}.*.part"):           # by a process that was killed
            if time.time() - left.stat().st_mtime > 86400:
                left.unlink(missing_ok=True)
        with open(part, "xb") as file:
            receive(url, file)
        file_kind(part)
        check_hash(part, target.name)
        try:
            part.replace(target)
        except PermissionError:                # Windows: another process was first and has the file open
            if not target.exists():
                raise
    except (Unusable, OSError) as reason:
        raise UserError(f"could not fetch {url}: {reason}; fetch it by hand and save it as {target.resolve()}, "
                        "or set POSE_WEIGHTS_URL to a mirror") from None
    finally:
        part.unlink(missing_ok=True)


def receive(url: str, file) -> None:
    """Write the body of `url` into the open, empty file; a broken connection is taken up where it broke."""
    version = ""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with connect(url, file.tell(), version) as response:
                version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
                if response.status != 206:     # all of it, not the rest: cannot resume, or the file has changed
                    file.seek(0)
                    file.truncate()
                copy(response, file, url)
            return
        except Interrupted as reason:
            if attempt == ATTEMPTS:
                raise
            print(f"{url}: {reason}; trying again")
            time.sleep(PAUSE * attempt)


def connect(url: str, have: int = 0, version: str = "", method: str = "GET"):
    """Ask for `url` from byte `have` on, provided that it is still the version of which we have those bytes."""
    headers = {"User-Agent": "pose-weights"}
    if have and version:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        request = Request(url, headers=headers, method=method)
        response = build_opener().open(request, timeout=TIMEOUT)            # heeds https_proxy
    except HTTPError as error:
        kind = Interrupted if error.code >= 500 or error.code in (408, 429) else Unusable
        raise kind(f"the server answers {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        raise Interrupted(str(getattr(error, "reason", "") or error)) from None
    except ValueError as error:
        raise Unusable(str(error)) from None
    if "text/html" in response.headers.get("Content-Type", ""):
        response.close()
        raise Unusable("the server sends a web page instead of the file")
    if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        response.close()
        raise Unusable("the server sends another part of the file than the missing one")
    return response


def copy(response, file, url: str) -> None:
    """Append the response to the file, under a progress bar; Interrupted if it ends too early."""
    have, length = file.tell(), response.headers.get("Content-Length")
    total = have + int(length) if length else None
    print(f"fetching {url}")
    name = url.rsplit("/", 1)[-1]
    with tqdm(total=total, initial=have, desc=name, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        while chunk := read(response):
            file.write(chunk)
            bar.update(len(chunk))
    if total and file.tell() != total:
        raise Interrupted(f"the connection broke after {file.tell()} of {total} bytes")


def read(response) -> bytes:
    try:
        return response.read1(1 << 18)
    except (OSError, HTTPException) as error:
        raise Interrupted(str(error) or type(error).__name__) from None


def check_hash(path: Path, name: str) -> None:
    """Some names end with the first digits of the file's SHA-256 (resnet50-0676ba61.pth): compare."""
    digits = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if digits else ""
    if digits and not digest.startswith(digits[1]):
        raise Unusable(f"its SHA-256 starts with {digest[:8]}, not with the {digits[1]} of its name")


# ---------------------------------------------------------------------- reading
def file_kind(path: Path) -> str:
    """'zip' or 'pickle' (torch since and before 1.6) or 'safetensors', by content; else raises Unusable."""
    if path.exists() and not path.is_file():
        raise Unusable("it is a folder, name a file in it" if path.is_dir() else "it is no ordinary file")
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise Unusable("it is empty")
    if re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", head, re.IGNORECASE):
        raise Unusable("it is a web page, not weights")
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):       # looks for the table of contents, which is the last thing written
            raise Unusable("it is cut short (the end is missing)")
        return "zip"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1e8:    # length of the JSON header
        try:
            with safe_open(path, "pt"):        # reads the header and compares it with the file's length
                return "safetensors"
        except SafetensorError as error:
            raise Unusable(f"it is cut short or damaged ({error})") from None
    if re.match(rb"\x80[\2-\5]", head):
        return "pickle"
    raise Unusable(f"it is neither a torch nor a safetensors file (it starts with {head[:8]!r})")


RUNS_CODE = "it holds more than tensors, reading it would run {}: ask for a file with the state dict alone"
CONTAINERS = {"set": OrderedDict, "append": list, "extend": list}        # by what torch refuses to do to another class


def stand_in(name: str, base: type = object) -> type:
    """A class that takes the place of `name` while a pickle is read, so that nothing is imported and nothing runs.

    Calling it gives an empty object, or an empty OrderedDict or list, which is then filled.
    """
    def new(cls, *args):
        return object.__new__(cls) if base is object else base()
    return type(name, (), {"__new__": new, "__setstate__": lambda self, state: None, "__module__": "stand_in"})


def read_torch(path: Path, zipped: bool):
    """torch.load of tensors and plain values; whatever else the file names becomes a stand_in, and is said.

    torch names one class at a time, which is then known at the next try. Names of builtins and of modules like `os`
    stay refused: they are in no file that was written in good faith.
    """
    bases: dict[str, type] = {}
    while True:
        try:
            with safe_globals([(stand_in(name, base), name) for name, base in bases.items()]):
                # mapped, not read: of a training file with optimiser and average only what is used is ever loaded
                saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
            break
        except Exception as error:             # a damaged file can fail anywhere in torch's reader
            text = str(error)
            unknown = re.search(r"GLOBAL (\S+)", text) if isinstance(error, pickle.UnpicklingError) else None
            filled = re.search(r"Can only (set|append|extend).* got <class 'stand_in\.(\S+)'>", text, re.IGNORECASE)
            if "persistent_load" in text:      # of a file from before torch 1.6
                raise Unusable(RUNS_CODE.format("a torch.nn.Module")) from None
            if not unknown and not filled:
                raise Unusable(f"it is cut short or damaged ({type(error).__name__})") from None
            name, base = (unknown[1], object) if unknown else (filled[2], CONTAINERS[filled[1].lower()])
            if bases.get(name) is base or "." not in name:
                raise Unusable(RUNS_CODE.format(name)) from None
            bases[name] = base
    if bases:
        print(f"{path} holds more than tensors; left out, and nothing of it run: {', '.join(sorted(bases)[:5])}"
              + ", ..." * (len(bases) > 5))
    return saved


def shards(path: Path) -> list[Path]:
    """The files of weights called `path`: itself, or the parts that its index names. Part and index stand for all."""
    whole = re.sub(r"-\d+-of-\d+(?=\.\w+$)", "", path.name.removesuffix(".index.json"))
    index = path.with_name(whole + ".index.json")
    if not index.is_file() or path.name == whole and path.is_file():
        return [path]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        parts = [index.with_name(Path(name).name) for name in names]        # never of another folder
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unusable(f"its index {index.name} is damaged") from None
    if missing := [part.name for part in parts if not part.is_file()]:
        raise Unusable(f"{len(missing)} of its {len(parts)} parts are not there, e.g. {missing[0]}")
    return parts


WRAPPERS = ("ema_model.", "model.", "network.", "net.")          # of a model that stands beside something else
PLACES = (("ema",), ("model",), ("state_dict",))                 # of a model's tensors in a file, the best first


def tensor_groups(saved, where: tuple = ()) -> Iterator[tuple[tuple, dict[str, Tensor]]]:
    """Every dict of tensors in nested dicts, with the keys that lead to it."""
    items = saved.items() if isinstance(saved, dict) else ()
    if tensors := {str(key): value for key, value in items if isinstance(value, Tensor)}:
        yield where, tensors
    for key, value in items:
        if len(where) < 3:
            yield from tensor_groups(value, (*where, str(key)))


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers (DistributedDataParallel, torch.compile, a training script's class) put into the names."""
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.", "", key): x for key, x in tensors.items()}
    for wrapper in WRAPPERS:
        inner = {key[len(wrapper):]: x for key, x in tensors.items() if key.startswith(wrapper)}
        if 3 * len(inner) >= len(tensors):
            return unwrapped(inner)                             # without losses and teachers beside it
    return tensors


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a released file, on the CPU, by the model's names; parts of one model are joined.

    Of several dicts of tensors `ema` comes before `model`, `state_dict`, any other; small ones (an optimiser's) do not
    count. Raises UserError if the file cannot be read.
    """
    path, saved = Path(path), {}
    try:
        for part in shards(path):
            kind = file_kind(part)
            read = load_file(part) if kind == "safetensors" else read_torch(part, zipped=kind == "zip")
            saved = saved | read if isinstance(read, dict) else read
        groups = dict(tensor_groups(saved))
        if not groups:
            raise Unusable("it holds no tensors, by themselves or under ema, model or state_dict: ask for its state dict")
    except (Unusable, OSError) as reason:
        raise UserError(f"cannot read weights from {path}: {getattr(reason, 'strerror', reason)}") from None
    most = max(map(len, groups.values()))
    names = {where: ".".join(where) or "the file itself" for where in groups if 2 * len(groups[where]) >= most}
    best = min(names, key=lambda where: [*PLACES, where[:1]].index(where[:1]))
    if len(names) > 1:
        print(f"{path}: of {', '.join(names.values())} the tensors of {names[best]} are taken")
    return unwrapped(groups[best])


# ---------------------------------------------------------------------- checkpoints of ours
def save_checkpoint(path: Path, content: dict) -> None:
    """Write tensors and plain values beside `path`, then rename: a kill or a full disk leaves the old file whole.

    Raises UserError when the disk is full or the folder cannot be written; the file from before is then intact.
    """
    try:
        with whole(path) as part, open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:                    # torch makes a RuntimeError of a failed write
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        before = ", what was saved there before is intact" if path.exists() else ""
        raise UserError(f"cannot save {path} (is the disk full?): {reason}{before}") from None


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of ours: a dict with method, preset, config, skeleton, model, ... and no code.

    Raises UserError for a missing, truncated or foreign file.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    content = read_own(path)
    if content is None:
        raise UserError(f"{path} is no checkpoint of ours, or it is cut short or damaged")
    return content


OWN = dict(method=str, preset=str, config=dict, skeleton=(dict, str), model=dict)       # fields of a checkpoint of ours


def read_own(path: Path) -> dict | None:
    """A checkpoint of ours, or None if the file is something else (released weights, a damaged file)."""
    try:
        if not path.is_file() or zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            return None                                         # a pipe; flipped bits, at which torch does not look
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                                           # whoever reads it next says what it is
        return None
    if not isinstance(content, dict) or not all(isinstance(content.get(name), kind) for name, kind in OWN.items()):
        return None
    states = content["model"], content.get("ema", {})
    named = all(isinstance(state, dict) and all(isinstance(name, str) for name in state) for state in states)
    return content if named and all(isinstance(x, Tensor) for state in states for x in state.values()) else None


# ---------------------------------------------------------------------- into a model
def rename(state: dict[str, Tensor], table: list[tuple[str, str]]) -> dict[str, Tensor]:
    """New names by a table of (pattern, replacement), re.sub's rules; the first pattern found in a name wins."""
    renamed = {}
    for key, value in state.items():
        pattern, replacement = next((row for row in table if re.search(row[0], key)), ("^", ""))
        new = re.sub(pattern, replacement, key, count=1)
        if new in renamed:
            raise UserError(f"two tensors of the weights would be called {new}, one of them is {key}")
        renamed[new] = value
    return renamed


def load_strict(model: nn.Module, state: dict[str, Tensor], ignored: dict[str, str]) -> None:
    """Fill the model from `state`: every tensor of either has its match in the other, with the same shape.

    ignored: pattern -> why; names in which it is found are left alone, in the file and in the model.
    Raises UserError with the first five offenders of each kind; the model is then unchanged.
    """
    def kept(tensors):
        return {key: tensors[key] for key in tensors if not any(re.search(pattern, key) for pattern in ignored)}

    theirs, ours = kept(state), kept(model.state_dict())
    offenders = {
        "not in the model": [f"{key} {tuple(theirs[key].shape)}" for key in theirs if key not in ours],
        "not in the weights": [f"{key} {tuple(ours[key].shape)}" for key in ours if key not in theirs],
        "of another shape": [f"{key} {tuple(theirs[key].shape)} for {tuple(ours[key].shape)}"
                             for key in theirs if key in ours and theirs[key].shape != ours[key].shape],
        "complex or sparse": [key for key in theirs if theirs[key].is_complex() or theirs[key].layout != torch.strided],
        "not finite": [key for key, _ in model.named_parameters() if key in theirs and not theirs[key].is_meta
                       and theirs[key].layout == torch.strided and not theirs[key].isfinite().all()]}
    if any(offenders.values()):
        raise UserError("the weights do not fit the model: " + "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
            for kind, keys in offenders.items() if keys))
    model.load_state_dict(theirs, strict=False)            # not strict: the ignored names are absent


# ---------------------------------------------------------------------- start weights, whatever their keypoints
SKELETON_OF = {17: "coco", 14: "crowdpose", 15: "posetrack", 133: "wholebody"}       # of weights alone, by keypoints


@dataclass(frozen=True)
class Start:
    """What --init names: tensors, and of a run of ours what its checkpoint says beside them."""
    path: Path
    state: dict[str, Tensor]
    run: dict

    def skeleton(self, count: int, ours: Skeleton) -> Skeleton:
        """Whose keypoints these are. count: how many, of released weights, which do not name them. Raises UserError."""
        if self.run:
            return get_skeleton(self.run["skeleton"])
        if count not in SKELETON_OF and count != ours.num_keypoints:
            raise UserError(f"{self.path} has {count} keypoints; released weights have {sorted(SKELETON_OF)}")
        return get_skeleton(SKELETON_OF.get(count, ours))


def name_of(source: str) -> str:
    """What a checkpoint is called: a run's folder, a file without its ending, or a released name."""
    path = Path(source)
    return path.parent.name if path.name in ("best.pt", "last.pt") else path.stem if path.suffix else path.name


def checkpoint_in(path: Path) -> Path:
    """Of a run's folder best.pt, else last.pt; a file, and the folder of a release, as they are."""
    if not path.is_dir() or any((path / part).is_dir() for part in ("unet", "vae", "decoder")):
        return path
    return next((path / name for name in ("best.pt", "last.pt") if (path / name).exists()), path / "best.pt")


def trained_tensors(run: dict) -> dict[str, Tensor]:
    """Of a checkpoint of ours what is evaluated: the average of the weights, if it has one, else the weights."""
    average = {name[len("module."):]: value for name, value in run.get("ema", {}).items() if name.startswith("module.")}
    return average or run["model"]


def read_start(source: str, method: str) -> Start:
    """A run of ours (folder or file), a released file or name; of a release's folder the path alone. Raises UserError."""
    path = checkpoint_in(Path(source))
    path = path if path.exists() else fetch(source)
    run = read_own(path)
    if run is None:
        return Start(path, {} if path.is_dir() else load_tensors(path), {})
    if run["method"] != method:
        raise UserError(f"--init {source} is a run of {run['method']}: {method} starts from a run of its own")
    return Start(path, trained_tensors(run), run)


def carry_rows(state: dict[str, Tensor], own: dict[str, Tensor], table: dict[str, int], rows: list[int],
               count: int) -> dict[str, Tensor]:
    """The state, of whose tensors that depend on keypoints each block is put where our keypoint of its name is.

    table: pattern of names -> the dimension that consists of equal blocks, one for each keypoint, in their order
    rows: of each of our keypoints the number of theirs, of `count`; with -1 its block stays what it is in `own`
    """
    carried, known = dict(state), [k for k, row in enumerate(rows) if row >= 0]
    for name in state.keys() & own.keys():
        dim = next((dim for pattern, dim in table.items() if re.search(pattern, name)), None)
        if dim is None or state[name].shape[dim] % count:
            continue
        theirs, ours = (x.unflatten(dim, (n, -1)).movedim(dim, 0) for x, n in
                        ((state[name], count), (own[name].clone(), len(rows))))
        if theirs.shape[1:] == ours.shape[1:]:                  # else strict loading will name it
            ours[known] = theirs[[rows[k] for k in known]].to(ours)
            carried[name] = ours.movedim(0, dim).flatten(dim, dim + 1)
    return carried


def carry_groups(state: dict[str, Tensor], own: dict[str, Tensor], table: dict[str, int], layers: dict[str, int],
                 theirs: list[list[int]], ours: list[list[int]], rows: list[int]) -> dict[str, Tensor]:
    """`carry_rows` where keypoints are in groups that have layers of their own.

    A group of ours is that of theirs which has most of its keypoints; a keypoint comes from whichever group has it.
    table: blocks of groups, as for `carry_rows`;  theirs, ours: the keypoints of each group
    layers: pattern of a group's own layers, (before)(group)(after) -> rows of each keypoint, 0: they are the group's
    """
    place = {k: (group, i) for group, members in enumerate(theirs) for i, k in enumerate(members)}
    found = [[place[rows[k]][0] for k in members if rows[k] >= 0] for members in ours]
    like = [Counter(groups).most_common(1)[0][0] if groups else -1 for groups in found]
    carried = carry_rows(state, own, table, like, len(theirs))
    for pattern, size in layers.items():
        carried = {name: value for name, value in carried.items() if not re.match(pattern, name)}
        for name in filter(re.compile(pattern).match, own):
            before, group, after = re.match(pattern, name).groups()
            pieces, value = [state.get(f"{before}{i}{after}") for i in range(len(theirs))], own[name].clone()
            if any(piece is None or piece.shape[1:] != value.shape[1:] for piece in pieces):
                continue                                        # strict loading will name it
            if size == 0 and like[int(group)] >= 0:
                value = pieces[like[int(group)]]
            for i, k in enumerate(ours[int(group)] if size else ()):
                if rows[k] >= 0:
                    there, j = place[rows[k]]
                    value[size * i:size * (i + 1)] = pieces[there][size * j:size * (j + 1)]
            carried[name] = value
    return carried


def load_start(model: nn.Module, start: Start, state: dict[str, Tensor], table: dict[str, int],
               optional: dict[str, str]) -> None:
    """Fill a model of any keypoint set from start weights under our names, and say what came from where.

    table: as for `carry_rows`; optional: as `ignored` of `load_strict`, for tensors that one side alone has.
    Raises UserError where tensors that do not depend on keypoints do not fit.
    """
    own, rows = model.state_dict(), None
    sizes = [(state[name].shape[dim], own[name].shape[dim]) for pattern, dim in table.items() for name in state
             if name in own and re.search(pattern, name)]
    if sizes:
        theirs, rows = start_rows(start, sizes[0][0] * model.skeleton.num_keypoints // sizes[0][1], model)
        state = carry_rows(state, own, table, rows, theirs.num_keypoints)
    fill_and_say(model, start, state, table, optional, rows)


def start_rows(start: Start, count: int, model: nn.Module) -> tuple[Skeleton, list[int]]:
    """The keypoints of the start weights, `count` of them, and of each of the model's which of these it is; -1: none,
    or --fresh_head. Raises UserError."""
    theirs, names = start.skeleton(count, model.skeleton), model.skeleton.keypoints
    return theirs, [-1] * len(names) if model.cfg.fresh_head else rows_in(theirs.keypoints, names)


def fill_and_say(model: nn.Module, start: Start, state: dict[str, Tensor], table: dict[str, int],
                 optional: dict[str, str], rows: list[int] | None) -> None:
    """The second half of `load_start`: state has our shapes; rows: see `start_rows`, None without keypoints."""
    own, keypoints = model.state_dict(), model.skeleton.keypoints
    alone = [name for name in state.keys() ^ own.keys() if any(re.search(pattern, name) for pattern in optional)]
    try:
        load_strict(model, state, {f"^{re.escape(name)}$": "one side alone has it" for name in alone})
    except UserError as error:
        preset = f" (of preset {start.run['preset']})" if start.run else ""
        raise UserError(f"{start.path}{preset}: {error}") from None
    learned = {name for name in own if own[name].is_floating_point()}
    by_rows = {name for name in learned & state.keys() if any(re.search(pattern, name) for pattern in table)}
    new, mapped = learned - state.keys(), set()
    if rows and max(rows) < 0:                                  # none of our keypoints is among theirs
        new |= by_rows
    elif rows and rows != list(range(len(rows))):
        mapped = by_rows
    found = [name for name, row in zip(keypoints, rows or ()) if mapped and row >= 0]
    missing = [name for name, row in zip(keypoints, rows or ()) if mapped and row < 0]
    say(f"start weights from {start.path}: {len(learned & state.keys())} of {len(learned)} tensors\n"
        f"  carried over {len(learned - new - mapped):>6}\n"
        f"  mapped       {len(mapped):>6}{some('the rows of ', found)}\n"
        f"  new          {len(new):>6}{some('', prefixes(new, learned - new))}"
        f"{some('the rows of ', missing)}")


def some(what: str, names: list[str], most: int = 20) -> str:
    more = f", and {len(names) - most} more" * (len(names) > most)
    return f"  {what}{', '.join(names[:most])}{more}" if names else ""


def prefixes(names: set[str], others: set[str]) -> list[str]:
    """The fewest prefixes that are of these names alone, as `decoder.*`."""
    def beginnings(name: str) -> list[str]:
        return [name[:dot.start()] for dot in re.finditer(r"\.|$", name)]

    taken = {start for name in others for start in beginnings(name)}
    first = {name: next(start for start in beginnings(name) if start not in taken) for name in sorted(names)}
    return [*dict.fromkeys(start if start == name else f"{start}.*" for name, start in first.items())]


def count_parameters(model: nn.Module) -> int:
    """Numbers that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
