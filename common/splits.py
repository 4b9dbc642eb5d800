"""From a folder, or the word "puppets", to what a method trains on and what it is evaluated on.

Layouts  COCO, CrowdPose, Human-Art, COCO-OOD, COCO-WholeBody, PoseTrack, the embedded puppets, and your own keypoints in
         COCO's format: see `layouts`, `find_by_word` and data/README.md
"""
from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import posetrack
from common.cli import RunConfig, parse_numbers
from common.datasets import PoseDataset
from common.errors import UserError
from common.ranks import Ranks, rank_zero_first, say
from common.skeletons import Skeleton, get_skeleton
from data import puppets


WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def layouts(split: str) -> list[tuple[str, list[str], list[str]]]:
    """(name, annotation files, image folders) of the known layouts; the first one that has such a file counts."""
    word = {"train": "training", "val": "validation"}.get(split, split)
    coco = [f"annotations/{kind}_{split}2017.json" for kind in ("person_keypoints", "image_info")]      # info: no labels
    own = WORDS.get(split, (split,))                        # tools call the splits differently
    return [
        ("coco", coco, [f"{split.removesuffix('-dev')}2017", f"images/{split}2017", "images",
                        *["val2017oil"] * (split == "val")]),
        ("ood", ["annotations/person_keypoints_val2017.json"] if split == "ood" else [], ["val2017oil"]),
        ("crowdpose", [f"json/crowdpose_{split}.json", f"annotations/crowdpose_{split}.json"], ["images"]),
        ("humanart", [f"annotations/{word}_humanart.json", f"HumanArt/annotations/{word}_humanart.json"],
         [".", "HumanArt"]),
        ("wholebody", [f"annotations/coco_wholebody_{'val' if split == 'ood' else split}_v1.0.json"],
         ["val2017oil"] if split == "ood" else [f"{split}2017", f"images/{split}2017"]),
        ("custom", [f"annotations/person_keypoints_{split}.json", f"annotations/{split}.json", f"{split}.json",
                    f"{split}/_annotations.coco.json"],
         [*(place for one in own for place in (f"images/{one}", one)), "images", "."]),
    ]


def locate(folder: Path, name: str) -> Path | None:
    """What is called `name` below a folder, in capitals or not; None if there is none, or several."""
    for part in Path(name).parts:
        if not (folder / part).exists():
            same = [path for path in folder.iterdir() if path.name.lower() == part.lower()] if folder.is_dir() else []
            if len(same) != 1:
                return None
            part = same[0].name
        folder = folder / part
    return folder


def find_layout(folder: Path, split: str, first: str = "") -> tuple[str, list[Path], list[Path]] | None:
    """(name, annotation files, image folders) found in a folder; if several fit, the layout named `first` counts."""
    for name, files, folders in sorted(layouts(split), key=lambda layout: layout[0] != first):
        found = [path for path in (locate(folder, file) for file in files) if path and path.is_file()]
        if found:
            return name, found[:1], [locate(folder, images) or folder / images for images in folders]
    if split == "trainval":                                 # CrowdPose trains on both; some have them in one file
        parts = [find_layout(folder, part, first) for part in ("train", "val")]
        if all(part and part[0] == "crowdpose" for part in parts):
            return "crowdpose", parts[0][1] + parts[1][1], parts[0][2]
    return None if posetrack.find_posetrack(folder, split) else find_by_word(folder, split)


def find_by_word(folder: Path, split: str) -> tuple[str, list[Path], list[Path]] | None:
    """The only JSON file in whose name, or whose folder's, a word says that it is of this split and of no other."""
    def says(path: Path) -> set[str]:
        read = set(re.split(r"[\W\d_]+", path.relative_to(folder).as_posix().lower()))
        return {name for name, words in WORDS.items() if read & {*words}}

    found = [path for path in [*folder.glob("*.json"), *folder.glob("*/*.json")] if says(path) == {split}]
    if len(found) != 1:
        return None
    places = {found[0].parent, *(path for path in [*folder.glob("*"), *folder.glob("images/*")] if says(path) == {split})}
    return "custom", found, [*sorted(path for path in places if path.is_dir()), folder / "images", folder]


def default_splits(data: str) -> tuple[str, str]:
    """The splits that a dataset's papers train and evaluate on."""
    found = data != "puppets" and (find_layout(Path(data), "trainval") or find_layout(Path(data), "test"))
    return ("trainval", "test") if found and found[0] == "crowdpose" else ("train", "val")


def open_dataset(data: str, split: str, skeleton: str | dict | Skeleton | None = None,
                 sigmas: Sequence[float] | None = None, category: str = "") -> PoseDataset:
    """A split of 'puppets', which are made on first use, or of a folder whose layout is known.

    split: 'train', 'val', 'test', 'trainval' (CrowdPose), 'ood' (val in other styles), 'crowd' (puppets). With the
    skeleton 'posetrack', train and val of the puppets are clips. category: as for `PoseDataset`.
    Raises `UserError` with one line if there is no such thing.
    """
    wanted = get_skeleton(skeleton).name if skeleton is not None else ""
    if data == "puppets":
        stills = "video" if wanted == "posetrack" else "coco"
        parts = {"train": stills, "val": stills, "crowd": "crowd", "ood": "ood"}
        if split not in parts:
            raise UserError(f"puppets have no split '{split}': choose one of {', '.join(parts)}")
        folder = puppets.make(puppets.ROOT, parts[split])
        file_split = split if split != "crowd" else "test" if wanted == "crowdpose" else "val"
    else:
        folder, file_split = Path(data), split
        if not folder.is_dir():
            raise UserError(f"there is no data folder {folder}: data/README.md says what goes where; "
                            "--data puppets needs no download")
        if not any(folder.iterdir()):
            raise UserError(f"{folder} is empty: data/README.md says what goes where")
    found, videos = find_layout(folder, file_split, wanted), posetrack.find_posetrack(folder, file_split)
    if videos and (found is None or wanted == "posetrack"):
        dataset = posetrack.PoseTrackDataset(split, videos, folder, skeleton, sigmas)
    elif found:
        name, files, folders = found
        dataset = PoseDataset(name, split, files, folders, skeleton, sigmas, category, folder)
    else:
        looked = [file for _, files, _ in layouts(file_split) for file in files] + [f"annotations/{file_split}/*.json"]
        there = sorted(str(path.relative_to(folder)) for path in [*folder.glob("*.json"), *folder.glob("*/*.json")])
        raise UserError(f"{folder} has no annotation file for split '{split}': looked for {', '.join(looked)}; "
                        f"JSON files there: {', '.join(there[:5]) or 'none'}")
    dataset.name = "puppets" if data == "puppets" else dataset.name
    return dataset


def has_split(data: str, split: str) -> bool:
    return data == "puppets" or bool(find_layout(Path(data), split) or posetrack.find_posetrack(Path(data), split))


def open_splits(config: RunConfig, ranks: Ranks, skeleton: str | None = None) -> tuple[PoseDataset, PoseDataset]:
    """What to train on and what to evaluate on, both with the keypoints of the former. Raises UserError."""
    (train, val), sigmas = default_splits(config.data), parse_numbers(config.sigmas)
    with rank_zero_first(ranks):            # it makes the puppets
        if Path(config.data).is_dir() and not has_split(config.data, val):
            if not config.val_share:
                raise UserError(f"{config.data} has no annotation file for split '{val}': --val_share 0.1 holds out a tenth "
                                "of the pictures for it; data/README.md says where a file of its own goes")
            return split_off(config, skeleton)
        if config.val_share:
            say(f"{config.data} has a split '{val}' of its own: --val_share is not needed")
        learned = open_dataset(config.data, train, skeleton, sigmas, config.category)
        return learned, open_dataset(config.data, val, learned.skeleton, category=config.category)


def split_off(config: RunConfig, skeleton: str | dict | Skeleton | None = None) -> tuple[PoseDataset, PoseDataset]:
    """The training data without `val_share` of its pictures, and these; drawn by `seed` from their sorted names.

    Of a folder without a split 'train' it is the only JSON file there. Raises UserError.
    """
    folder, sigmas = Path(config.data), parse_numbers(config.sigmas)
    there = [*folder.glob("*.json"), *folder.glob("annotations/*.json")]
    if len(there) == 1 and not has_split(config.data, "train"):
        folders = [folder / "images", there[0].parent, folder]
        data = PoseDataset("custom", there[0].stem, there, folders, skeleton, sigmas, config.category, folder)
    else:
        data = open_dataset(config.data, "train", skeleton, sigmas, config.category)
    if isinstance(data, posetrack.PoseTrackDataset):
        raise UserError("--val_share would hold out single frames of videos, whose neighbours are learned: put some of the "
                        "videos into a split 'val'")
    names = np.array([data.file_names[n] for n in data.rows])
    known = np.unique(names)                # ids may share a picture
    chosen = np.random.default_rng(config.seed).permutation(known)[:max(1, round(config.val_share * len(known)))]
    if len(chosen) == len(known):
        raise UserError(f"{config.data} has {len(known)} pictures: --val_share {config.val_share:g} leaves none to train on")
    held, parts = np.isin(names, chosen), (copy.copy(data), copy.copy(data))
    for part, rows, split in zip(parts, (data.rows[~held], data.rows[held]), ("train", "val")):
        part.rows, part.split, part.bad = rows, f"{data.split} ({len(rows)} pictures of it for {split})", Counter()
    say(f"--val_share {config.val_share:g}: {held.sum()} of {len(held)} pictures are held out, drawn with --seed {config.seed}")
    return parts


def open_crowd(skeleton: Skeleton, ranks: Ranks) -> PoseDataset:
    """The puppets' crowd split with CrowdPose's index of crowding, which only its file of 14 keypoints has."""
    with rank_zero_first(ranks):            # it draws them
        crowd, index = (open_dataset("puppets", "crowd", kind) for kind in (skeleton, "crowdpose"))
    crowd.crowd_index, crowd.metric = index.crowd_index, "crowdpose"
    return crowd
