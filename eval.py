"""Evaluate a checkpoint of any method on a dataset, or draw its predictions on pictures.

    python eval.py runs/<run>/best.pt                           the dataset that it was trained for
    python eval.py runs/<run>/best.pt --data puppets --split ood
    python eval.py runs/<run>/best.pt --data data/coco          another dataset
    python eval.py best.pt --images photo.jpg folder/ clip.gif  draws people, writes COCO results
    python eval.py best.pt --set steps=4 ensemble=true          with more DDIM steps (diffusionregpose)
    python eval.py best.pt --images photo.jpg --process         and how all but detrpose find them
    python eval.py sdpose-body --images photo.jpg --detector detrpose-l       top-down: one person at a time
    python eval.py sdpose-body --data data/coco --boxes people.json            COCO results say where people are
    python eval.py runs/<run> --images folder/ --gif            diffusionpose: a folder is a clip, in order of names
    python eval.py detrpose-l --images photo.jpg                released weights by name, fetched once
    python eval.py detrpose_hgnetv2_l.pth --data data/coco      released weights from a file
    torchrun --nproc_per_node=8 eval.py detrpose-l --data data/coco

A checkpoint of ours names its method and size; a released one is recognised by its tensors. A top-down method needs
boxes of people: of --boxes, of --detector, else the annotated ones of a dataset, and of a picture all of it.
"""
import argparse
import contextlib
import importlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import nn
from tqdm import tqdm

from common import draw, metrics, stable_diffusion, weights
from common.boxes import Boxes, Found, NOBODY, boxes_of, detect, in_image, read_boxes, read_results, true_boxes, whole_image
from common.cli import Parser, parse_numbers, resolve, run_main
from common.datasets import PoseDataset
from common.errors import UserError
from common.ranks import Ranks, init_ranks, rank_zero_first
from common.records import BadImage, Prediction, load_image
from common.run import make_folder
from common.splits import default_splits, open_dataset
from common.weights import read_own

METHODS = ("detrpose", "diffusionregpose", "querypose", "diffusionpose", "sdpose")
SKELETON_OF = {17: "coco", 14: "crowdpose", 15: "posetrack", 133: "wholebody"}       # of weights alone, by keypoints
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


# ---------------------------------------------------------------------------------------------------------
# Which model
# ---------------------------------------------------------------------------------------------------------


def load_model(source: str, method: str, preset: str) -> tuple[ModuleType, nn.Module, str]:
    """A run's checkpoint, a released file or a released name → (method module, model, dataset it was trained for).

    Raises UserError when there is no such file or name, when it cannot be read, or when no method has such tensors.
    """
    path = Path(source)
    release = any((path / part).is_dir() for part in ("unet", "vae", "decoder"))
    if path.is_dir() and not release:
        path = next((path / name for name in ("best.pt", "last.pt") if (path / name).exists()), path / "best.pt")
    if not path.exists():
        if path.suffix:
            raise UserError(f"there is no checkpoint {path}")
        known = weights.RELEASES.get(source)
        if known and not known.method:
            raise UserError(f"{source} are weights to start from, for --init; they find no poses by themselves")
        if known and known.method not in METHODS:
            raise UserError(f"{source} is of method {known.method}; known are {', '.join(METHODS)}")
        path = weights.fetch(source)                    # or UserError: did you mean ...
    saved = read_own(path)
    return from_run(saved, method, preset, path) if saved else from_release(path, method, preset)


def from_run(saved: dict, method: str, preset: str, path: Path) -> tuple[ModuleType, nn.Module, str]:
    for name, wanted in dict(method=method, preset=preset).items():
        if wanted and wanted != saved[name]:
            raise UserError(f"{path} holds {name} {saved[name]}, not {wanted}: leave --{name} out")
    if saved["method"] not in METHODS:
        raise UserError(f"{path} is of method {saved['method']}; known are {', '.join(METHODS)}")
    module = importlib.import_module(saved["method"])
    config = resolve(module.Config(), **saved["config"])        # as --resume does: a field younger than the run is off
    model = module.build(saved["preset"], saved["skeleton"], **vars(config))
    ema = saved.get("ema", {})
    average = {name[len("module."):]: value for name, value in ema.items() if name.startswith("module.")}
    weights.load_strict(model, average or saved["model"], {})
    return module, model, saved["config"]["data"]


def from_release(path: Path, method: str, preset: str) -> tuple[ModuleType, nn.Module, str]:
    state = stable_diffusion.load_release(path) if path.is_dir() else weights.load_tensors(path)
    if method and method not in METHODS:
        raise UserError(f"there is no method {method}: choose from {', '.join(METHODS)}")
    for name in [method] if method else METHODS:
        module = importlib.import_module(name)
        found = module.recognise(state)
        if found:
            break
    else:
        raise UserError(f"{path} has no tensors of {method or ', '.join(METHODS)}: start weights belong to --init")
    own_preset, keypoints = found
    if keypoints not in SKELETON_OF:
        raise UserError(f"{path} has {keypoints} keypoints; released weights have {sorted(SKELETON_OF)}")
    if preset and preset not in module.PRESETS:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(module.PRESETS)}")
    preset = preset or own_preset
    state = module.convert_official(state, module.PRESETS[preset])      # or UserError, before a large model is made
    model = module.build(preset, SKELETON_OF[keypoints])
    weights.load_strict(model, state, {})
    print(f"{path}: {name}, preset {preset}, {keypoints} keypoints")
    return module, model, ""


def with_settings(module: ModuleType, model: nn.Module, settings: list[str]) -> nn.Module:
    """The model with other values of those fields of its config that only prediction reads, e.g. steps=4."""
    allowed, values = getattr(module, "AT_INFERENCE", ()), {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in allowed:
            raise UserError(f"--set {setting}: what {module.__name__} can change now is {', '.join(allowed) or 'nothing'}")
        kind = type(getattr(model.cfg, name))
        try:
            values[name] = {"true": True, "false": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise UserError(f"--set {setting}: expected {name}={'true or false' if kind is bool else 'a number'}") from None
    model.cfg = resolve(model.cfg, **values)
    return model


# ---------------------------------------------------------------------------------------------------------
# Where people are, for methods that look at one at a time
# ---------------------------------------------------------------------------------------------------------


def load_detector(source: str, device: torch.device) -> Callable[[Image.Image, int | str], Prediction]:
    """A multi-person method's checkpoint as a function (picture, image id) → its people. Raises UserError."""
    module, model, _ = load_model(source, "", "")
    if is_top_down(module):
        raise UserError(f"--detector {source}: {module.__name__} needs boxes itself; take a multi-person method's")
    model = module.fuse(model.to(device).eval())
    return lambda picture, image_id: module.predict(model, module.to_batch([picture], [image_id], model.cfg))[0]


def is_top_down(module: ModuleType) -> bool:
    return getattr(module, "TOP_DOWN", False)


def boxes_in_data(data: PoseDataset, args: argparse.Namespace, ranks: Ranks) -> Boxes:
    """The people of a dataset to look at: of --boxes or --detector, else the annotated ones."""
    if args.boxes:
        return read_boxes(args.boxes, data)
    if args.detector:
        with rank_zero_first(ranks):            # it fetches
            find = load_detector(args.detector, ranks.device)
        return detect(find, data, ranks, args.detector)
    return true_boxes(data)


def boxes_in_pictures(names: list[str], args: argparse.Namespace, device: torch.device) -> Callable:
    """A function (picture, name) → the people to look at: of --boxes or --detector, else the whole picture.

    In the file of --boxes a picture is known by its name or its stem, as in the results.json that is written here.
    """
    if args.detector:
        find = load_detector(args.detector, device)
        return lambda picture, name: boxes_of(find(picture, name), args.threshold, picture.size)
    if not args.boxes:
        print("each picture as a whole is taken for one person: --boxes FILE.json or --detector CHECKPOINT say where "
              "people are")
        return lambda picture, name: whole_image(picture.size)
    people, _ = read_results(args.boxes)
    if not any(key.split("#")[0] in (name, Path(name).stem) for key in people for name in names):
        raise UserError(f"{args.boxes} has boxes for {', '.join(sorted(people)[:3])}, ..., but for none of the "
                        f"pictures ({', '.join(names[:3])}): its image_id has to be a picture's name")

    def chosen(picture: Image.Image, name: str) -> Found:
        boxes, scores = people.get(name, people.get(Path(name).stem, NOBODY))
        good = in_image(boxes, picture.size)
        if not good.all():
            tqdm.write(f"{name}: {(~good).sum()} boxes left out, outside of the picture or without area")
        return boxes[good], scores[good]
    return chosen


# ---------------------------------------------------------------------------------------------------------
# A dataset
# ---------------------------------------------------------------------------------------------------------


def evaluate_dataset(module: ModuleType, model: nn.Module, args: argparse.Namespace, ranks: Ranks) -> None:
    """Print the table of metrics, errors per keypoint and images per second; write results.json."""
    with rank_zero_first(ranks):
        data = open_dataset(args.data, args.split or default_splits(args.data)[1], model.skeleton,
                            parse_numbers(args.sigmas), args.category)
    if ranks.rank == 0:
        print(data.report())
        make_folder(args.out)                   # before the work, not after it
    chosen = {name: getattr(args, name) for name in ("workers", "eval_batch") if getattr(args, name) is not None}
    boxes = [boxes_in_data(data, args, ranks)] if is_top_down(module) else []
    start = time.perf_counter()
    table, predictions = module.evaluate(model, data, resolve(model.cfg, **chosen), ranks, *boxes)
    seconds = time.perf_counter() - start
    if ranks.rank > 0:
        return
    (args.out / "results.json").write_text(json.dumps(metrics.to_results(predictions)))
    draw.draw_predictions(data, predictions, count=12).save(args.out / "predictions.png")
    print(metrics.format_table(metrics.keypoint_errors(predictions, data)))
    print("(errors of the people found, as fractions of √area; close: OKS term of at least 0.5)\n")
    print(metrics.format_table(table))
    for line in [*map(str, boxes), *data.caveats()]:
        print(line)
    print(f"{len(data)} images in {seconds:.1f} s, {len(data) / seconds:.1f} a second with loading and metrics, on "
          f"{ranks.world} x {ranks.device.type}; results.json and predictions.png are in {args.out}")


# ---------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------


def find_pictures(paths: list[str]) -> list[Path]:
    """Files, and the pictures of folders in the order of their names, in which 9 comes before 10: folders are clips.

    Raises UserError if there are none.
    """
    def by_number(path: Path) -> list:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is no picture or folder {path}")
        inside = [p for p in path.iterdir() if p.suffix.lower() in PICTURES] if path.is_dir() else [path]
        found += sorted(inside, key=by_number)
    if not found:
        raise UserError(f"no pictures in {', '.join(paths)}: looked for {', '.join(sorted(PICTURES))}")
    return list(dict.fromkeys(found))                   # a file and its folder may both be given


def output_names(pictures: list[Path]) -> list[str]:
    """What each picture is called in the results: its name, or its whole path where names are not unique."""
    stems = Counter(path.stem for path in pictures)
    return [path.name if stems[path.stem] == 1 else path.as_posix() for path in pictures]


def frames_of(path: Path) -> list[Image.Image]:
    """The frames of a GIF, or the one picture of another file, upright and RGB. Raises BadImage."""
    if path.suffix.lower() != ".gif":
        return [load_image(path)]
    try:
        with Image.open(path) as gif:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(gif)]
    except Exception as error:                          # decoders raise all kinds of errors on damaged files
        raise BadImage(path, str(error) or type(error).__name__) from None


def clips_of(frames: list[Image.Image], path: Path, pictures: list[Path], folders: list[str]) -> list[tuple]:
    """Each frame between those before and after it: of a GIF its own, of a picture in a folder those beside it there.

    The frame itself takes the place of one that is missing, damaged or of another size; the latter two are named.
    """
    rim: list = [None, None]
    if len(frames) == 1 and path.parent in map(Path, folders):
        i = pictures.index(path)
        for side, j in enumerate((i - 1, i + 1)):
            if 0 <= j < len(pictures) and pictures[j].parent == path.parent:
                with contextlib.suppress(BadImage):                 # which is said when its own turn comes
                    rim[side] = load_image(pictures[j])
    row = [rim[0], *frames, rim[1]]
    if any(near is not None and near.size != frames[0].size for near in row):
        tqdm.write(f"{path}: a frame beside it has another size, so this one takes its place")
    return [tuple(near if near is not None and near.size == frame.size else frame for near in row[i:i + 3])
            for i, frame in enumerate(frames)]


def draw_pictures(module: ModuleType, model: nn.Module, args: argparse.Namespace, device: torch.device) -> None:
    """Draw the people of each picture into args.out; a GIF becomes a GIF, --gif joins everything into one."""
    if args.process and not hasattr(module, "show_process"):
        raise UserError(f"{module.__name__} has nothing to show with --process")
    pictures, out = find_pictures(args.images), make_folder(args.out)
    if any(out.samefile(path.parent) for path in pictures):
        raise UserError(f"--out {out} holds the pictures themselves: choose another folder for the drawn ones")
    model, names = module.fuse(model).to(device), output_names(pictures)
    look = boxes_in_pictures(names, args, device) if is_top_down(module) else None
    results, everything, people, bad = [], [], 0, 0
    bar = tqdm(pictures, "pictures", dynamic_ncols=True, disable=len(pictures) == 1)
    for path, name in zip(bar, names):
        try:
            frames = frames_of(path)
        except BadImage as error:
            bad += 1
            tqdm.write(f"skipped ({bad} so far): {error}")
            continue
        ids = [name if len(frames) == 1 else f"{name}#{i}" for i in range(len(frames))]
        boxes = [[look(*one)] if look else [] for one in zip(frames, ids)]      # a further argument, or none
        seen = clips_of(frames, path, pictures, args.images) if getattr(module, "CLIPS", False) else frames
        predictions = [module.predict(model, module.to_batch([what], [i], model.cfg, *([b] for b in found)))[0]
                       for what, i, found in zip(seen, ids, boxes)]
        confident = [keep_confident(p, args.threshold) for p in predictions]
        drawn = [draw.draw_people(frame, p.keypoints, p.keypoint_scores, model.skeleton, p.boxes, p.scores)
                 for frame, p in zip(frames, confident)]
        target = out / (path.stem if name == path.name else re.sub(r"\W+", "_", name).strip("_"))
        save_drawn(drawn, target)
        process = module.show_process(model, seen[0], args.threshold, *boxes[0]) if args.process else {}
        for what, shown in process.items():
            save_drawn(shown, target.with_name(f"{target.name}_{what}"))
        everything += drawn if args.gif else []
        people += sum(len(p.scores) for p in confident)
        results += metrics.to_results(predictions)
    if bad == len(pictures):
        raise UserError(f"none of the {bad} pictures could be read")
    if everything:
        draw.save_gif(everything, out / "all.gif")
    (out / "results.json").write_text(json.dumps(results))
    print(f"{people} people of score {args.threshold:g} or more in {len(pictures) - bad} pictures"
          f"{f', {bad} could not be read' if bad else ''}; drawn into {out}")


def save_drawn(drawn: list[Image.Image], target: Path) -> None:
    """One picture as PNG, several as GIF."""
    if len(drawn) > 1:
        draw.save_gif(drawn, target.with_name(target.name + ".gif"))
    else:
        drawn[0].save(target.with_name(target.name + ".png"))


def keep_confident(p: Prediction, threshold: float) -> Prediction:
    good = np.asarray(p.scores) >= threshold
    return Prediction(p.image_id, p.keypoints[good], p.keypoint_scores[good], p.scores[good],
                      None if p.boxes is None else p.boxes[good])


# ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="a run's .pt file or folder, a released file, or a released name")
    parser.add_argument("--method", default="", help=f"of a released file: {', '.join(METHODS)} (default: guessed)")
    parser.add_argument("--preset", default="", help="of a released file (default: guessed from its tensors)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE",
                        help="what only prediction reads: steps=4, ensemble=true, nms=plain, seed=1; "
                        "a method lists its own as AT_INFERENCE")
    parser.add_argument("--data", default="", help="puppets or a dataset's folder (default: what it was trained for)")
    parser.add_argument("--split", default="", help="val, test, train, ood or crowd (default: the papers' own)")
    parser.add_argument("--category", default="", help="of the data, where several have keypoints (default: what fits)")
    parser.add_argument("--sigmas", default="", help="OKS sigmas of your own keypoints, with commas")
    parser.add_argument("--images", nargs="+", default=[], help="pictures, GIFs or folders to draw people on")
    parser.add_argument("--boxes", default="", help="top-down methods: where people are, as COCO results (JSON)")
    parser.add_argument("--detector", default="", help="top-down methods: a checkpoint that finds people")
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score that is drawn (default 0.5)")
    parser.add_argument("--gif", action="store_true", help="also join the drawn pictures into all.gif")
    parser.add_argument("--process", action="store_true", help="also draw how the method gets there, if it can show it")
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="folder for what is written")
    parser.add_argument("--workers", type=int, help="image loading processes per GPU (default: the model's own)")
    parser.add_argument("--eval_batch", type=int, help="images of the dataset at once (default: the model's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    args = parser.parse_args()

    ranks = init_ranks(args.device)
    with rank_zero_first(ranks):                # it fetches
        module, model, trained_for = load_model(args.checkpoint, args.method, args.preset)
    if (args.boxes or args.detector) and not is_top_down(module):
        raise UserError(f"{module.__name__} finds people by itself: leave --boxes and --detector out")
    if args.boxes and args.detector:
        raise UserError("--boxes and --detector both say where people are: give one of them")
    model = with_settings(module, model, args.set).to(ranks.device).eval()
    if args.images:
        if ranks.rank == 0:                             # pictures are too few to share
            draw_pictures(module, model, args, ranks.device)
        return
    args.data = args.data or trained_for
    if not args.data:
        raise UserError("these weights do not say what to evaluate them on: add --data FOLDER, or --images PICTURE")
    evaluate_dataset(module, model, args, ranks)


if __name__ == "__main__":
    run_main(main)
