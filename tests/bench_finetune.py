"""How much start weights help on other keypoints: 200 puppets with 8 keypoints, a table for docs/results.md.

    python -m tests.bench_finetune [detrpose sdpose ...] [--starts runs/starts] [--start_epochs 0] [--epochs 0]

Six of the keypoints are COCO's, COCO has neither neck nor head_top. Each method starts from its default training,
STARTS/<method>, which is done first where it is not there, and learns three times for the same number of epochs: from
these weights, from them with --fresh_head, and from nothing. AP is OKS AP of the puppets' val pictures, for the start
with its own keypoints there (of DiffusionPose, whose start learned from clips, the 15 of PoseTrack), in percent.
Minutes are of the first of the three trainings, with loading and one evaluation.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from common.ranks import init_ranks
from common.skeletons import SKELETONS
from common.splits import open_dataset
from data import puppets
from eval import load_model

EIGHT = ["head_top", "neck", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_ankle", "right_ankle"]
LIMBS = [[1, 2], [2, 3], [2, 4], [2, 5], [2, 6], [5, 7], [6, 8]]
EPOCHS = dict(detrpose=26, diffusionregpose=22, querypose=32, diffusionpose=18, sdpose=18)     # less than 3 minutes
FLAGS = ["--warmup", "20", "--seed", "1"]
RUNS = dict(start=["--init", "START"], fresh=["--init", "START", "--fresh_head"], nothing=["--init", ""])
COUNTS = dict(train=200, val=500)


def scene(names: list[str], job: tuple[str, int]) -> tuple[dict, list]:
    """A picture of the puppets, and its people with these keypoints."""
    split, index = job
    number = index + 1 + 100_000 * (split == "val")
    image = dict(id=number, file_name=f"{number:012d}.jpg", width=puppets.SIZE, height=puppets.SIZE)
    return image, puppets.coco_annotations(number, *puppets.split_scene(puppets.SIZE, 0, split, index), names)


def draw(folder: Path, names: list[str]) -> Path:
    """The first puppets of each split in a folder of their own, with these keypoints."""
    if (folder / "annotations").is_dir():
        return folder
    source = puppets.make(puppets.ROOT, "coco")
    rows = puppets.run_jobs(partial(scene, names), COUNTS, None, folder.name)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, images in rows.items():
        for image, _ in images:
            shutil.copy(source / f"{split}2017" / image["file_name"], folder / "images")
    (folder / "annotations").mkdir()
    for split, images in rows.items():
        content = puppets.coco_file(images, names)
        content["categories"][0].update(name="mine", skeleton=LIMBS if names == EIGHT else [])
        (folder / f"annotations/{split}.json").write_text(json.dumps(content))
    return folder


def evaluate(run: Path, data: Path) -> float:
    """OKS AP of a run's best.pt on a folder's val pictures, in percent."""
    module, model, _ = load_model(str(run), "", "")
    found = open_dataset(str(data), "val", model.skeleton)
    return 100 * module.evaluate(model.eval(), found, model.cfg, init_ranks("cpu"))[0]["AP"]


def train(method: str, out: Path, flags: list[str]) -> float:
    """Minutes of a training."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, f"{method}.py", "--train", "--out", str(out), *flags], check=True)
    return (time.perf_counter() - begin) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(EPOCHS))
    parser.add_argument("--starts", type=Path, default=Path("runs/starts"), help="folder with a run for each method")
    parser.add_argument("--start_epochs", type=int, default=0, help="of a start that is not there; 0: the preset's")
    parser.add_argument("--epochs", type=int, default=0, help="of each of the three trainings; 0: see EPOCHS")
    parser.add_argument("--out", type=Path, default=Path(f"runs/finetune-{time.strftime('%Y%m%d-%H%M%S')}"))
    args = parser.parse_args()
    mine = draw(args.starts / "eight", EIGHT)
    known = {17: draw(args.starts / "seventeen", puppets.COCO)}
    table = [f"{COUNTS['train']} pictures, {len(EIGHT)} keypoints, torch {torch.__version__}, {os.cpu_count()} cores", "",
             "| method | epochs | minutes | AP of the start | from it | with a fresh head | from nothing |",
             "|---|---|---|---|---|---|---|"]
    for method in args.methods:
        start, epochs = args.starts / method, args.epochs or EPOCHS[method]
        if not (start / "best.pt").exists():
            train(method, start, ["--epochs", str(args.start_epochs)] if args.start_epochs else [])
        count = load_model(str(start), "", "")[1].skeleton.num_keypoints
        if count not in known:
            known[count] = draw(args.starts / "fifteen", list(SKELETONS["posetrack"].keypoints))
        minutes, found = {}, {}
        for name, flags in RUNS.items():
            flags = [str(start) if flag == "START" else flag for flag in flags] + FLAGS
            flags += ["--data", str(mine), "--epochs", str(epochs), "--eval_every", str(epochs)]
            minutes[name] = train(method, args.out / f"{method}-{name}", flags)
            found[name] = evaluate(args.out / f"{method}-{name}", mine)
        cells = [evaluate(start, known[count]), *found.values()]
        table.append(f"| {method} | {epochs} | {minutes['start']:.1f} | " + " | ".join(f"{x:.1f}" for x in cells) + " |")
        print("\n".join(table), flush=True)
    (args.out / "table.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
