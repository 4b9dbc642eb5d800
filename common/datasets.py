"""COCO-like annotation files, each image of which becomes a `Sample`; PoseTrack's are read by common/posetrack.py.

Use      dataset = open_dataset("data/coco", "val"); print(dataset.report()); sample, message = dataset.load(0)
         where `open_dataset` is that of common/splits.py
Checks   The annotation file is checked once, when it is opened. What cannot be used is skipped, what can be mended
         is mended; both are counted and named in `report()`. Image files are opened only when they are loaded.
Units    pixels, origin at the top left corner. Boxes are x, y, w, h in files, x1, y1, x2, y2 in a `Sample`.
"""
from __future__ import annotations

import copy
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError
from common.records import BOX_TO_AREA, BadImage, Sample, load_image, open_picture, white_of
from common.skeletons import SKELETONS, Skeleton, get_skeleton, keypoint_names, same_names, skeleton_from_category

MOST = 20                   # predictions of an image that COCO's and CrowdPose's evaluation look at


# ---------------------------------------------------------------- one annotation file

def load_json(path: Path) -> dict | list:
    """The content of a JSON file without COCO's outlines, or one line that says what is wrong with it.

    Nothing here uses the outlines (`segmentation`), and they are most of the 2 GB that COCO takes in memory.
    """
    if path.exists() and not path.is_file():                # it would wait for ever at a pipe
        raise UserError(f"cannot read {path}: this is a folder or a pipe, not a file")
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=lambda pairs: {
            key: value for key, value in pairs if key != "segmentation"})
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not complete JSON: {error.msg} at line {error.lineno}, character {error.pos} "
                        f"of {len(error.doc)}; the file looks damaged or cut off, fetch it again") from None
    except RecursionError:
        raise UserError(f"cannot read {path}: it is nested too deeply for an annotation file") from None
    except (ValueError, OSError) as error:  # not UTF-8, numbers of thousands of digits
        raise UserError(f"cannot read {path}: {error}") from None


def read_json(path: Path) -> dict:
    """The content of a COCO annotation file, or one line that says what is wrong with it."""
    content = load_json(path)
    content = content if isinstance(content, dict) else {}
    images, annotations = content.get("images"), content.get("annotations")
    if images and annotations is None:                      # labels of test sets are secret
        annotations = []
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise UserError(f"{path} is not a COCO annotation file: it needs the lists 'images' and 'annotations'")
    return content | dict(annotations=annotations)


def numbers(values, count: int | None = None) -> np.ndarray | None:
    """A flat float64 array, or None if these are no numbers, or not `count` of them. Absent values become NaN."""
    try:
        row = np.array(values, np.float64).ravel()
    except (TypeError, ValueError, OverflowError):
        return None
    return row if count in (None, len(row)) else None


def column(rows: Sequence[dict], name: str, width: int = 1) -> np.ndarray:
    """(N, width) of a field of each row; NaN where it is not `width` numbers."""
    found = [numbers(row.get(name), width) for row in rows]
    return np.array([np.full(width, np.nan) if x is None else x for x in found]).reshape(-1, width)


def id_key(value) -> str:
    """An id as text, so that 17, 17.0, "17" and "17.0" are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return re.sub(r"(?<=\d)\.0+$", "", value) if isinstance(value, str) else str(value)


class Texts:
    """Many strings in two arrays: a list would be copied, page by page, into every loader worker."""

    def __init__(self, texts: Iterable[str]):
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        self.bytes, self.ends = np.frombuffer(b"".join(parts), np.uint8), np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, n: int) -> str:
        return self.bytes[self.ends[n]:self.ends[n + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[n] for n in range(len(self)))


def keypoint_fields(skeleton: str | None) -> tuple[str, ...]:
    """The fields of an annotation that hold the keypoints, one after the other."""
    return {"humanart21": ("keypoints_21",),
            "wholebody": ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts"),
            }.get(skeleton, ("keypoints",))


def keypoints_of(annotation: dict, fields: Sequence[str]) -> np.ndarray | None:
    """(K, 3) of one annotation; (0, 3) if it has none of the fields; None if they are no triplets of numbers."""
    rows = [numbers(annotation.get(field) or []) for field in fields]
    if any(row is None or len(row) % 3 for row in rows):
        return None
    return np.concatenate(rows).reshape(-1, 3)


def size_of(path: Path | str) -> tuple[int, int] | None:
    """(w, h) of a picture that can be read."""
    try:
        with open_picture(path) as picture:
            return picture.size
    except Exception:                       # `load` will say what is wrong with it
        return None


class PoseDataset:
    """All images of one split. `dataset[i]` is a `Sample` that names its image, `load(i)` one with the picture.

    Everything lies in a few numpy arrays (the people of image n are rows offsets[n] to offsets[n + 1]): a list of
    dicts would be copied, page by page, into every loader worker.

    Takes    name ('coco', 'crowdpose', ...), split, the annotation files (their content is joined), the folders
             that may hold the images, a skeleton or None for the file's own, sigmas or None for the skeleton's,
             category: the name of the category with the keypoints, where a file has several; root: the data set's
             folder, by default the first of `folders`; nothing outside it is read
    """
    sizes_from = "the annotation file says"

    def __init__(self, name: str, split: str, files: Sequence[Path], folders: Sequence[Path],
                 skeleton: str | dict | Skeleton | None = None, sigmas: Sequence[float] | None = None,
                 category: str = "", root: Path | None = None):
        self.name, self.split, self.files, self.root = name, split, list(files), root or folders[0]
        self.notes: dict[str, list] = {}                    # what was skipped or mended -> ids
        self.bad: Counter[str] = Counter()                  # messages of `load`, see `remember`
        contents = self._read_files()
        images = [image for content in contents for image in content["images"]]
        people = [person for content in contents for person in content["annotations"]]
        index = self._read_images(images, folders)
        wanted = get_skeleton(skeleton) if skeleton is not None else None
        people, own = self._keypoint_people(people, contents[0].get("categories"), wanted, category)
        self.skeleton = self._choose_skeleton(people, own, wanted, sigmas)
        self.metric = name if name == "crowdpose" else "wholebody" if self.skeleton.name == "wholebody" else "coco"
        self._read_people(people, index)
        self.rows = np.flatnonzero(self.present)            # the images of this view, see `training`
        self.notes = {reason: (len(ids), ids[:3]) for reason, ids in self.notes.items()}

    # ------------------------------------------------ reading

    def _read_files(self) -> list[dict]:
        return [read_json(path) for path in self.files]

    def _note(self, reason: str, ids: list) -> None:
        if ids:
            self.notes.setdefault(reason, []).extend(ids)

    def _note_people(self, people: list[dict], masks: dict[str, np.ndarray]) -> None:
        """Note for each reason those people for whom its mask (P,) is True."""
        for reason, mask in masks.items():
            self._note(reason, [people[n].get("id", "without id") for n in np.flatnonzero(mask)])

    def _read_images(self, images: list, folders: Sequence[Path]) -> dict[str, int]:
        """Fill ids, file_names, paths, present, sizes and crowd_index, sorted by id. Returns the position of each id."""
        by_id = {}
        for image in images:
            if not isinstance(image, dict) or "id" not in image or not image.get("file_name"):
                self._note("images skipped: no id or no file_name", [str(image)[:40]])
            elif id_key(image["id"]) in by_id:
                self._note("images skipped: their id appeared before", [id_key(image["id"])[:40]])
            else:
                by_id[id_key(image["id"])] = image
        if not by_id:
            raise UserError(f"{self.files[0]} lists no images")
        whole = all(re.fullmatch(r"0|-?[1-9]\d{0,17}", key) for key in by_id)     # 01 is another than 1
        by_id = dict(sorted(by_id.items(), key=lambda item: int(item[0]) if whole else item[0]))
        images = list(by_id.values())
        self.ids = np.array([int(key) for key in by_id]) if whole else Texts(by_id)
        prefix = "HumanArt/" if self.name == "humanart" else ""             # its names begin at the parent folder
        names = [str(image["file_name"]).replace("\\", "/").removeprefix(prefix) for image in images]
        self.file_names = Texts(names)
        self._find_images(names, folders)
        times = Counter(names)
        self._note("images that share their file with another id", [name for name in names if times[name] > 1])
        self.sizes = np.array([self._size_of(image, n) for n, image in enumerate(images)], np.int64)
        self.crowd_index = column(images, "crowdIndex")[:, 0]
        return {key: n for n, key in enumerate(by_id)}

    def _find_images(self, names: list[str], folders: Sequence[Path]) -> None:
        """Where each image is: below the folder that has most of them, else anywhere in the data set's folder if its
        base name is there once, as where `file_name` is a path of the annotator's own machine."""
        @lru_cache(None)
        def listing(where: str) -> set[str]:
            try:
                return set(os.listdir(where))
            except (OSError, ValueError):
                return set()

        def exists(folder: Path, name: str) -> bool:
            below = ".." not in name.split("/") and not re.match(r"/|[A-Za-z]:", name)
            where, _, base = f"{folder}/{name}".rpartition("/")
            return below and base in listing(where)

        found = {folder: [exists(folder, name) for name in names] for folder in dict.fromkeys(folders)}
        self.image_folder = max(found, key=lambda folder: sum(found[folder]))
        self.name = "ood" if self.image_folder.name == "val2017oil" else self.name
        self.present = np.array(found[self.image_folder])
        paths = [str(self.image_folder / name) if there else "" for name, there in zip(names, self.present)]
        if not self.present.all():
            by_base: dict[str, list[str]] = defaultdict(list)
            for where, _, files in os.walk(self.root):
                for file in files:
                    by_base[file].append(os.path.join(where, file))
            for n in np.flatnonzero(~self.present):
                places = by_base[names[n].rpartition("/")[2]]
                if len(places) == 1:
                    paths[n], self.present[n] = places[0], True
                    self._note("images found by the last part of their file_name", [names[n][-60:]])
        missing = [name[-60:] for name, there in zip(names, self.present) if not there]
        if len(missing) == len(names):
            raise UserError(f"none of the {len(names)} images of {self.files[0]} is there: looked for {missing[0]} in "
                            + ", ".join(map(str, folders)))
        self._note("images not there: left out, also of the metrics", missing)
        self.paths = Texts(paths)

    def _size_of(self, image: dict, n: int) -> tuple[int, int]:
        """(w, h) as stated, or of the picture if nothing sensible is stated; (1, 1), and no people, without it."""
        size = numbers([image.get("width"), image.get("height")], 2)
        if size is not None and ((1 <= size) & (size < 2 ** 31)).all():
            return int(size[0]), int(size[1])
        self._note("images without width and height: taken from the picture", [id_key(image["id"])[:40]])
        return size_of(self.paths[n]) or (1, 1)

    def _keypoint_people(self, people: list, categories, wanted: Skeleton | None,
                         category: str) -> tuple[list[dict], dict | None]:
        """The annotations of one category with keypoints, and that category; others may share the file.

        It is the one that was asked for, else the one whose names, or number of keypoints, are the model's, else the
        one with most people.
        """
        categories = categories if isinstance(categories, list) else [categories]
        categories = [c for c in categories if isinstance(c, dict)]
        named = [c for c in categories if keypoint_names(c)]
        people_of = Counter(id_key(p.get("category_id")) for p in people if isinstance(p, dict))

        def called(c: dict) -> tuple[str, str]:
            return str(c.get("name")), id_key(c.get("id"))

        def fits(c: dict) -> tuple:
            ours, theirs = wanted.keypoints if wanted else (), keypoint_names(c)
            return category in called(c), same_names(ours, theirs), len(ours) == len(theirs), people_of[id_key(c.get("id"))]

        if category and not any(category in called(c) for c in named):
            raise UserError(f"{self.files[0]} has no category {category} with keypoints: choose from "
                            + (", ".join(str(c.get("name")) for c in named) or "none"))
        own = max(named, key=fits, default=None)
        others = {id_key(c.get("id")) for c in categories if own and keypoint_names(c) != keypoint_names(own)}
        if len({tuple(keypoint_names(c)) for c in named}) > 1:
            self._note(f"categories with keypoints of their own: '{own.get('name')}' is used, --category takes another",
                       [c.get("name") for c in named])
        used, skipped = [], []
        for p in people:
            (used if isinstance(p, dict) and id_key(p.get("category_id")) not in others else skipped).append(p)
        self._note("annotations skipped: of a category without these keypoints",
                   [p.get("id") if isinstance(p, dict) else str(p)[:40] for p in skipped])
        return used, own

    def _choose_skeleton(self, people: list[dict], own: dict | None, wanted: Skeleton | None, sigmas) -> Skeleton:
        """The one asked for, the file's own, or a built-in set of the right size; its size must be the file's."""
        fields = keypoint_fields(wanted and wanted.name)
        joints = [keypoints_of(p, fields) for p in people[:1000]]
        counts = Counter(len(k) for k in joints if k is not None and len(k))
        if people and not counts:
            raise UserError(f"{self.files[0]} is not a keypoint file: no annotation has usable '{fields[0]}'")
        named = len(keypoint_names(own)) if own else 0
        count = counts.most_common(1)[0][0] if counts else named
        if wanted is None and own:
            wanted = skeleton_from_category(own, sigmas)
        elif not own and (people or wanted is None):
            wanted = wanted or next((s for s in SKELETONS.values() if s.num_keypoints == count), None)
            if wanted is None:
                raise UserError(f"{self.files[0]} does not name its {count} keypoints: add them to 'categories'"
                                if people else f"{self.files[0]} has no labels: train on a split that has")
            self._note(f"keypoint sets that the file does not name: {count} keypoints are taken for those of", [wanted.name])
        elif own and named == count and not same_names(keypoint_names(own), wanted.keypoints):
            self._note(f"categories name the keypoints otherwise than skeleton '{wanted.name}', which is used",
                       [own.get("id")])
        if own and named != count and fields == ("keypoints",):
            self._note(f"categories name another number of keypoints than the {count} of their people", [named])
        if count and count != wanted.num_keypoints:
            raise UserError(f"{self.files[0]} has {count} keypoints per person, but skeleton '{wanted.name}' has "
                            f"{wanted.num_keypoints}: choose data with the keypoints of the model")
        return wanted if sigmas is None else replace(wanted, sigmas=tuple(map(float, sigmas)))

    def _read_people(self, people: list[dict], index: dict[str, int]):
        """Fill offsets, keypoints, boxes (xywh), areas, iscrowd and num_keypoints, image by image."""
        count, fields = self.skeleton.num_keypoints, keypoint_fields(self.skeleton.name)
        joints = [keypoints_of(p, fields) for p in people]
        image = np.array([index.get(id_key(p.get("image_id")), -1) for p in people], np.int64)
        fits = np.array([k is not None and len(k) in (0, count) for k in joints], bool)
        self._note_people(people, {"annotations skipped: their image is not in the list": image < 0,
                                   f"annotations skipped: not {count} keypoints": (image >= 0) & ~fits})
        order = np.argsort(image, kind="stable")            # people of one image stay in the order of the file
        order = order[(image >= 0)[order] & fits[order]]
        people, image, nowhere = [people[n] for n in order], image[order], np.zeros((count, 3))
        keypoints = np.array([joints[n] if len(joints[n]) else nowhere for n in order]).reshape(-1, count, 3)

        ids = Counter(str(p.get("id")) for p in people)
        self._note("annotation ids that appear twice: numbered anew", [i for i, times in ids.items() if times > 1])
        self._mend_sizes(people, image)
        keypoints = self._mend_keypoints(keypoints, people, self.sizes[image])
        boxes, usable = self._mend_boxes(people, keypoints, self.sizes[image])
        self.offsets = np.searchsorted(image[usable], np.arange(len(self.ids) + 1))
        self.keypoints, self.boxes = keypoints[usable].astype(np.float32), boxes[usable]
        self._read_fields([p for p, used in zip(people, usable) if used])

    def _mend_sizes(self, people: list[dict], image: np.ndarray) -> None:
        """Width and height change places where people reach out of the image so that the picture itself has them so."""
        boxes, sizes = column(people, "bbox", 4), self.sizes[image]
        ends = boxes[:, :2] + boxes[:, 2:]                      # NaN compares False
        with np.errstate(invalid="ignore"):
            doubtful = (ends > sizes * 1.02 + 1).any(1) & (ends <= sizes[:, ::-1] * 1.02 + 1).all(1)
        for n in np.unique(image[doubtful]):
            if size_of(self.paths[n]) == tuple(self.sizes[n][::-1].tolist()) != tuple(self.sizes[n].tolist()):
                self.sizes[n] = self.sizes[n][::-1]
                self._note("images whose width and height are exchanged in the file: the picture is right", [self.id_of(n)])

    def _mend_keypoints(self, keypoints: np.ndarray, people: list[dict], sizes: np.ndarray) -> np.ndarray:
        """v becomes 0, 1 or 2; coordinates that cannot be meant become unlabelled (P, K, 3)."""
        v = np.ceil(np.nan_to_num(keypoints[..., 2]).clip(0, 2))        # fractions and True are labels, too
        xy, limit = keypoints[..., :2], sizes[:, None]
        wild = ((v > 0) | np.isnan(keypoints[..., 2])) & ~(np.abs(xy) < 10 * limit).all(-1)     # NaN compares False
        outside = (v > 0) & ~wild & ((xy < 0) | (xy > limit)).any(-1)
        self._note_people(people, {
            "people with keypoints that are no numbers, or far off: taken as unlabelled": wild.any(1),
            "people with labelled keypoints outside the image: kept": outside.any(1)})
        v[wild] = 0
        return np.concatenate([np.where(v[..., None] > 0, xy, 0), v[..., None]], -1)

    def _mend_boxes(self, people: list[dict], keypoints: np.ndarray,
                    sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(P, 4) xywh, and which people (P,) can be used.

        A box without area in the image gives way to that of the labelled keypoints, widened by 15 % on each side
        and at least 2 px; without such keypoints the annotation is useless. Boxes that only reach beyond the image
        stay: CrowdPose's areas are made of them.
        """
        boxes = column(people, "bbox", 4)
        with np.errstate(invalid="ignore"):
            low, high = boxes[:, :2].clip(0), np.minimum(boxes[:, :2] + boxes[:, 2:], sizes)
            usable = (np.abs(boxes) < 10 * sizes.max(1, keepdims=True)).all(1) & (high > low).all(1)    # NaN: False
        boxless, tiny = ~usable, np.zeros(len(people), bool)
        for n in np.flatnonzero(boxless):
            xy = keypoints[n, keypoints[n, :, 2] > 0, :2]
            xy = xy[((xy >= 0) & (xy <= sizes[n])).all(1)]
            if len(xy):
                margin = np.maximum(0.15 * np.ptp(xy, axis=0), 2)
                tiny[n] = (margin == 2).all()
                low, high = (xy.min(0) - margin).clip(0), np.minimum(xy.max(0) + margin, sizes[n])
                boxes[n], usable[n] = [*low, *(high - low)], True
        without = "a box of no area, or outside the image, or none"
        self._note_people(people, {f"annotations skipped: {without}, and no keypoints": ~usable,
                                   f"people with {without}: taken from their keypoints": boxless & usable})
        self.tiny = tiny[usable]
        return boxes, usable

    def _read_fields(self, people: list[dict]):
        """areas, iscrowd and num_keypoints, with a value where the file has none.

        CrowdPose's evaluation always takes the area from the box, and its own count leaves out head and neck.
        """
        crowdpose, fields = self.name == "crowdpose", ("area", "iscrowd", "num_keypoints", "ignore")
        area, crowd, stated, ignore = (column(people, name)[:, 0] for name in fields)
        of_box, labelled = self.boxes[:, 2] * self.boxes[:, 3], self.keypoints[..., 2] > 0
        given = (area > 0) & (area < 1e12) & (not crowdpose)
        self.areas = np.where(given, area, BOX_TO_AREA * of_box)
        self.iscrowd = crowd > 0
        self.num_keypoints = labelled.sum(1)
        counts = not crowdpose and keypoint_fields(self.skeleton.name) == ("keypoints",)
        share = self.areas / of_box
        self._note_people(people, {
            f"people without area: {BOX_TO_AREA} of the box taken": ~given & (not crowdpose),
            "people without iscrowd: taken as single people": np.isnan(crowd),
            "people with ignore: 1, which COCO's evaluation does not read: they count": ignore > 0,
            "people whose area does not suit their box: OKS and AP follow the area":
                ~self.iscrowd & ((share < 0.02) | (share > 1.2)),
            "people of whose size a few pixels around their keypoints are all that is known: OKS and AP follow it":
                self.tiny & ~given,
            "people without, or with a wrong num_keypoints: counted": (stated != self.num_keypoints) & counts})
        if crowdpose:
            stated = np.where(np.isnan(stated), labelled[:, :12].sum(1), np.nan_to_num(stated).clip(0, 14))
            self.num_keypoints = stated.astype(np.int64)

    # ------------------------------------------------ use

    def __len__(self) -> int:
        return len(self.rows)

    def count(self, people: np.ndarray) -> np.ndarray:
        """Of how many people of each image of the file (N,) a mask (P,) is True."""
        return np.diff(np.concatenate([[0], np.cumsum(people)])[self.offsets])

    def id_of(self, n: int) -> int | str:
        """The id of the n-th image of the file."""
        return self.ids[n].item() if isinstance(self.ids, np.ndarray) else self.ids[n]

    def __getitem__(self, i: int) -> Sample:
        """Image i as a path, with all its annotations, crowd regions and people without keypoints too."""
        n = self.rows[i]
        people = slice(self.offsets[n], self.offsets[n + 1])
        boxes = self.boxes[people]
        return Sample(
            image=Path(self.paths[n]), image_id=self.id_of(n),
            size=tuple(self.sizes[n].tolist()), keypoints=self.keypoints[people].copy(),
            boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).astype(np.float32),
            areas=self.areas[people].astype(np.float32), iscrowd=self.iscrowd[people].copy())

    @cached_property
    def white(self) -> float | None:
        """What is white in the pictures, if they have more than 8 bits."""
        return white_of([Path(self.paths[n]) for n in self.rows])

    def load(self, i: int) -> tuple[Sample | None, str]:
        """Image i with its picture, and a message that is empty if all is well; no sample if it cannot be read.

        Runs in loader workers, whose memory is their own: the message travels back in the batch, to `remember`.
        Sizes that differ: the file's counts for all that follows; annotations stay what they are, pixels.
        """
        sample = self[i]
        try:
            picture = self.picture(sample.image, sample.size)
        except BadImage as error:
            return None, str(error)
        message = "" if picture.size == sample.size else (
            f"{sample.image} has {picture.size[0]}x{picture.size[1]} pixels, {self.sizes_from} "
            f"{sample.size[0]}x{sample.size[1]}: the picture is right")
        if "orientation" in picture.info:
            message = (f"{sample.image} was turned as its EXIF orientation {picture.info['orientation']} says; its size "
                       "cannot tell whether the annotation saw it so")
        return replace(sample, image=picture, size=picture.size), message

    def picture(self, path: Path, size: tuple[int, int]) -> Image.Image:
        """A decoded picture; size: as stated. Raises BadImage."""
        return load_image(path, size, self.white)

    def load_readable(self, i: int) -> tuple[Sample, list[str]]:
        """Image i, or the next one that can be read, with the messages of `load` on the way there."""
        messages = []
        for j in range(i, i + len(self)):
            sample, message = self.load(j % len(self))
            messages += [message] if message else []
            if sample is not None:
                return sample, messages
        raise UserError(f"none of the {len(self)} images can be read, e.g. {messages[0]}")

    def remember(self, messages: Iterable[str]) -> list[str]:
        """Count the messages of `load` in `bad`; return the new ones, so that each is printed once."""
        new = [message for message in dict.fromkeys(messages) if message and message not in self.bad]
        self.bad.update(message for message in messages if message)
        return new

    def training(self) -> PoseDataset:
        """The same data without the images in which nobody has a labelled keypoint."""
        learn = (self.keypoints[..., 2] > 0).any(1) & ~self.iscrowd
        view = copy.copy(self)
        view.rows = self.rows[self.count(learn)[self.rows] > 0]
        if not len(view):
            raise UserError(f"nothing to train on in {self.files[0]}: nobody has a labelled keypoint")
        return view

    def ground_truth(self) -> dict:
        """A COCO-style dict of all images of this view; annotations are numbered from 1, image ids stay."""
        images, annotations = [], []
        for n in self.rows:
            image_id, (w, h) = self.id_of(n), self.sizes[n].tolist()
            crowding = {} if np.isnan(self.crowd_index[n]) else {"crowdIndex": float(self.crowd_index[n])}
            name = self.file_names[n]
            images.append({"id": image_id, "file_name": name, "width": w, "height": h, **crowding})
            for p in range(self.offsets[n], self.offsets[n + 1]):
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": 1,
                    "bbox": self.boxes[p].tolist(), "area": float(self.areas[p]), "iscrowd": int(self.iscrowd[p]),
                    "num_keypoints": int(self.num_keypoints[p]), "keypoints": self.keypoints[p].ravel().tolist()})
        category = {"id": 1, "name": "person", "keypoints": list(self.skeleton.keypoints),
                    "skeleton": [[a + 1, b + 1] for a, b in self.skeleton.edges]}
        return {"info": {}, "images": images, "annotations": annotations, "categories": [category]}

    @property
    def labelled(self) -> bool:
        """Whether there is anything to evaluate predictions with; of test sets the labels are secret."""
        return len(self.keypoints) > 0

    def caveats(self) -> list[str]:
        """What a reader of a table of this data set must know, a line each."""
        crowded = (self.count(~self.iscrowd)[self.rows] > MOST).sum() if self.metric != "posetrack" else 0
        counts = {f"of {len(self.ids)} images are not there: this table is of the others": (~self.present).sum(),
                  "images could not be read: their people count as missed":
                      sum(text.startswith("cannot read image") for text in self.bad),
                  "images were turned as their EXIF orientation says: labels made without it are elsewhere":
                      sum("EXIF" in text for text in self.bad),
                  f"images have more than {MOST} people; the metric looks at the best {MOST} predictions of each":
                      crowded}
        lines = [f"{count} {text}" for text, count in counts.items() if count]
        return lines + [f"{count} {reason}" for reason, (count, _) in self.notes.items() if "AP follow" in reason]

    def report(self) -> str:
        """What the annotation file holds, then one line per kind of thing that was skipped or mended."""
        v, single = self.keypoints[..., 2] > 0, ~self.iscrowd
        lines = [f"{self.name} {self.split}: {len(self.ids)} images, {(self.count(single) > 0).sum()} with people; "
                 f"{single.sum()} people, {(v.any(1) & single).sum()} with keypoints; {v[single].sum()} labelled "
                 f"keypoints; {self.iscrowd.sum()} crowd regions; skeleton {self.skeleton.name}"]
        for reason, (count, first) in self.notes.items():
            more = ", ..." if count > len(first) else ""
            lines.append(f"  {count} {reason} ({', '.join(map(str, first))}{more})")
        return "\n".join(lines)
