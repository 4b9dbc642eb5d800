"""From a folder, or the word "puppets", to what a method trains on and what it is evaluated on.

Layouts  COCO, CrowdPose, Human-Art, COCO-OOD, COCO-WholeBody, PoseTrack, the embedded puppets, and your own keypoints in
         COCO's format: see `layouts` and data/README.md
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import posetrack
from common.cli import RunConfig, parse_numbers
from common.datasets import PoseDataset
from common.errors import UserError
from common.ranks import Ranks, rank_zero_first
from common.skeletons import Skeleton, get_skeleton
from data import puppets


WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def layouts(split: str) -> list[tuple[str, list[str], list[str]]]:
    """(name, annotation files, image folders) of the known layouts; the first one that has such a file counts."""
    word = {"train": "training", "val": "validation"}.get(split, split)
    coco = f"annotations/person_keypoints_{split}2017.json"
    own = WORDS.get(split, (split,))                        # tools call the splits differently
    return [
        ("coco", [coco], [f"{split}2017", f"images/{split}2017", "images", *["val2017oil"] * (split == "val")]),
        ("ood", ["annotations/person_keypoints_val2017.json"] if split == "ood" else [], ["val2017oil"]),
        ("crowdpose", [f"json/crowdpose_{split}.json", f"annotations/crowdpose_{split}.json"], ["images"]),
        ("humanart", [f"annotations/{word}_humanart.json", f"HumanArt/annotations/{word}_humanart.json"],
         [".", "HumanArt"]),
        ("wholebody", [f"annotations/coco_wholebody_{'val' if split == 'ood' else split}_v1.0.json"],
         ["val2017oil"] if split == "ood" else [f"{split}2017", f"images/{split}2017"]),
        ("custom", [file for one in own for file in (f"annotations/person_keypoints_{one}.json", f"annotations/{one}.json",
                                                     f"{one}.json", f"{one}/_annotations.coco.json")],
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
    return None


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
        clips = posetrack.PoseTrackDataset(split, videos, folder, skeleton, sigmas)
        clips.name = "puppets" if data == "puppets" else clips.name
        return clips
    if found is None:
        looked = [file for _, files, _ in layouts(file_split) for file in files] + [f"annotations/{file_split}/*.json"]
        there = [*folder.glob("*.json"), *folder.glob("*/*.json")]
        there = sorted(str(path.relative_to(folder)) for path in there)
        raise UserError(f"{folder} has no annotation file for split '{split}': looked for {', '.join(looked)}; "
                        f"JSON files there: {', '.join(there[:5]) or 'none'}")
    name, files, folders = found
    dataset = PoseDataset(name, split, files, folders, skeleton, sigmas, category, folder)
    dataset.name = "puppets" if data == "puppets" else dataset.name
    return dataset


def open_splits(config: RunConfig, ranks: Ranks, skeleton: str | None = None) -> tuple[PoseDataset, PoseDataset]:
    """What to train on and what to evaluate on, both with the keypoints of the former. Raises UserError."""
    train, val = default_splits(config.data)
    with rank_zero_first(ranks):            # it makes the puppets
        learned = open_dataset(config.data, train, skeleton, parse_numbers(config.sigmas), config.category)
        return learned, open_dataset(config.data, val, learned.skeleton, category=config.category)


def open_crowd(skeleton: Skeleton, ranks: Ranks) -> PoseDataset:
    """The puppets' crowd split with CrowdPose's index of crowding, which only its file of 14 keypoints has."""
    with rank_zero_first(ranks):            # it draws them
        crowd, index = (open_dataset("puppets", "crowd", kind) for kind in (skeleton, "crowdpose"))
    crowd.crowd_index, crowd.metric = index.crowd_index, "crowdpose"
    return crowd
