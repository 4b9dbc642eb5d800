"""Evaluate a checkpoint of any method on a dataset, or draw its predictions on pictures; from Python, `load` it.

    python eval.py runs/<run>/best.pt                           the dataset that it was trained for
    python eval.py runs/<run>/best.pt --data puppets --split ood
    python eval.py runs/<run>/best.pt --data data/coco          another dataset
    python eval.py best.pt --images photo.jpg folder/ clip.mp4  draws people, writes COCO results
    python eval.py best.pt --diagnose                           where its AP is lost: errors by kind, the worst people drawn
    python eval.py a.pt --compare b.pt detrpose-l --images photo.jpg          several checkpoints, one grid
    python eval.py best.pt --set steps=4 ensemble=true          with more DDIM steps (diffusionregpose)
    python eval.py best.pt --images photo.jpg --process         and how the method finds them
    python eval.py sdpose-body --images photo.jpg --detector detrpose-l       top-down: one person at a time
    python eval.py sdpose-body --data data/coco --boxes people.json            COCO results say where people are
    python eval.py runs/<run> --images folder/ --gif            diffusionpose: a folder is a clip, in order of names
    python eval.py detrpose-l --images photo.jpg                released weights by name, fetched once; or their file
    python eval.py detrpose-l --export detrpose-l.onnx          or .pt2: a file that runs without this repository
    python eval.py detrpose-l --bench                           milliseconds; --bench detrpose-l.onnx beside ONNX Runtime
    torchrun --nproc_per_node=8 eval.py detrpose-l --data data/coco

    from eval import load
    pose = load("detrpose-l")                                   or all that the command takes
    people = pose(["photo.jpg", array, picture])                a list, one entry for each picture

A checkpoint of ours names its method and size; a released one is recognised by its tensors. A top-down method needs
boxes of people: of --boxes, of --detector, else the annotated ones of a dataset, and of a picture all of it.
"""
import argparse
import importlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import common                               # first: Ctrl-C while torch loads then ends without a traceback
import numpy as np
from PIL import Image
from torch import nn
from tqdm import tqdm

from common import draw, metrics, weights
from common.boxes import DETECTED, NOBODY, Boxes, Found, boxes_of, detect, in_image, read_boxes, read_results, true_boxes, whole_image
from common.cli import Parser, RunConfig, config_of, parse_numbers, resolve, run_main
from common.compare import Finder, compare
from common.datasets import PoseDataset
from common.diagnose import diagnose, truth_to_diagnose
from common.errors import UserError
from common.export import bench, check_target, export
from common.ranks import Ranks, init_ranks, pick_device, rank_zero_first
from common.records import Picture, Prediction, as_picture, whole
from common.run import make_folder, new_folder
from common.skeletons import Skeleton
from common.splits import default_splits, has_split, open_dataset, split_off
from common.video import Drawing, Shot, find_pictures, in_groups, save_pictures, shots
from common.weights import SKELETON_OF, checkpoint_in, read_own

METHODS = ("detrpose", "diffusionregpose", "querypose", "diffusionpose", "sdpose")


# ---------------------------------------------------------------------------------------------------------
# Which model
# ---------------------------------------------------------------------------------------------------------


def load_model(source: str, method: str, preset: str) -> tuple[ModuleType, nn.Module, str]:
    """A run's checkpoint, a released file or a released name → (method module, model, dataset it was trained for).

    Raises UserError when there is no such file or name, when it cannot be read, or when no method has such tensors.
    """
    path = checkpoint_in(Path(source))
    if not path.exists():
        if path.suffix:
            raise UserError(f"there is no checkpoint {path}")
        known = weights.RELEASES.get(source)
        if known and not known.method:
            raise UserError(f"{source} are weights to start from, for --init; they find no poses by themselves")
        if known and known.method not in METHODS:
            raise UserError(f"{source} is of method {known.method}; known are {', '.join(METHODS)}")
        path = weights.fetch(source, finds_poses=True)  # or UserError: did you mean ...
    saved = read_own(path)
    return from_run(saved, method, preset, path) if saved else from_release(path, method, preset)


def from_run(saved: dict, method: str, preset: str, path: Path) -> tuple[ModuleType, nn.Module, str]:
    for name, wanted in dict(method=method, preset=preset).items():
        if wanted and wanted != saved[name]:
            raise UserError(f"{path} holds {name} {saved[name]}, not {wanted}: leave --{name} out")
    if saved["method"] not in METHODS:
        raise UserError(f"{path} is of method {saved['method']}; known are {', '.join(METHODS)}")
    module = importlib.import_module(saved["method"])
    if saved["preset"] not in module.PRESETS:
        raise UserError(f"{path} is of preset {saved['preset']}, which {saved['method']} does not have: it is damaged")
    config = config_of(module.Config(), saved)
    model = module.build(saved["preset"], saved["skeleton"], **vars(config))
    weights.load_strict(model, weights.trained_tensors(saved), {})
    if isinstance(saved.get("threshold"), float):
        model.threshold = saved["threshold"]
    return module, model, config.data


def from_release(path: Path, method: str, preset: str) -> tuple[ModuleType, nn.Module, str]:
    """A folder is read by those methods that have `read_release`."""
    state = {} if path.is_dir() else weights.load_tensors(path)
    if method and method not in METHODS:
        raise UserError(f"there is no method {method}: choose from {', '.join(METHODS)}")
    for name in [method] if method else METHODS:
        module = importlib.import_module(name)
        if path.is_dir() and hasattr(module, "read_release"):
            state = module.read_release(path)
        found = module.recognise(state)
        if found:
            break
    else:
        raise UserError(f"{path} has no tensors of {method or ', '.join(METHODS)}, its first is {next(iter(state), 'none')}: "
                        "start weights belong to --init")
    own_preset, keypoints = found
    if keypoints not in SKELETON_OF:
        raise UserError(f"{path} has {keypoints} keypoints; released weights have {sorted(SKELETON_OF)}")
    if preset and preset not in module.PRESETS:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(module.PRESETS)}")
    preset = preset or own_preset
    try:
        state = module.convert_official(state, module.PRESETS[preset])      # or UserError, before a large model is made
        model = module.build(preset, SKELETON_OF[keypoints])
        weights.load_strict(model, state, {})
    except UserError:
        if preset != own_preset:
            raise UserError(f"{path} is preset {own_preset}, not {preset}: leave --preset out") from None
        raise
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
# From Python
# ---------------------------------------------------------------------------------------------------------

SHOWN = 0.5                                         # score from which people are shown by weights that have no own
WHOLE = "each picture as a whole is taken for one person: {}"


class People:
    """The P people found in one picture, with K keypoints each, in its pixels.

    keypoints (P, K, 2) x, y;  keypoint_scores (P, K);  scores (P,);  boxes (P, 4) x1, y1, x2, y2 or None;
    names (K,);  picture, upright, 8-bit RGB
    """

    def __init__(self, picture: Image.Image, found: Prediction, skeleton: Skeleton):
        self.picture, self.found, self.skeleton, self.names = picture, found, skeleton, skeleton.keypoints
        self.keypoints, self.keypoint_scores = found.keypoints, found.keypoint_scores
        self.scores, self.boxes = found.scores, found.boxes

    def __len__(self) -> int:
        return len(self.scores)

    def draw(self) -> Image.Image:
        """The picture with its people, enlarged if it is small."""
        p = self.found
        return draw.draw_people(self.picture, p.keypoints, p.keypoint_scores, self.skeleton, p.boxes, p.scores)

    def to_coco(self) -> list[dict]:
        """A row of COCO's results format for each person; image_id is the file's name, or the number in the list."""
        return metrics.to_results([self.found])


class Pose:
    """A model as a function of pictures; `load` makes it."""

    def __init__(self, module: ModuleType, model: nn.Module, threshold: float | None, detector: "Pose | None" = None):
        self.module, self.model = module, module.fuse(model.eval())
        own = getattr(model, "threshold", SHOWN)
        self.skeleton, self.threshold, self.detector = model.skeleton, own if threshold is None else threshold, detector
        self.top_down, self.clips, self.said = getattr(module, "TOP_DOWN", False), getattr(module, "CLIPS", False), False

    def __call__(self, pictures: Picture | Sequence[Picture], boxes: Sequence | None = None,
                 threshold: float | None = None, batch: int = 8) -> list[People]:
        """People of a score of at least `threshold` (None: see `load`), a list entry for each picture.

        pictures  paths, arrays (h, w, 3) or (h, w) of uint8 in RGB order, or PIL's; one, or a list of any length
        boxes     for top-down methods: an array (n, 4) x1, y1, x2, y2 for each picture; without boxes and without a
                  detector each picture as a whole is one person
        batch     pictures that go through the network at once

        Raises UserError for what is no picture, and for boxes that are not in theirs.
        """
        alone = isinstance(pictures, (str, Path, np.ndarray, Image.Image))
        pictures = [pictures] if alone else list(pictures)
        if boxes is not None and not self.top_down:
            raise UserError(f"{self.module.__name__} finds people by itself: leave boxes out")
        boxes = [boxes] if alone and boxes is not None and np.ndim(boxes[0]) == 1 else boxes
        if boxes is not None and len(boxes) != len(pictures):
            raise UserError(f"there are boxes for {len(boxes)} pictures, and {len(pictures)} pictures")
        if self.top_down and boxes is None and not self.detector and not self.said:
            self.said = True
            print(WHOLE.format("boxes= or a detector says where people are"))
        people = []
        for first in range(0, len(pictures), batch):
            numbers = range(first, min(first + batch, len(pictures)))
            loaded = [as_picture(pictures[i]) for i in numbers]
            names = [Path(pictures[i]).name if isinstance(pictures[i], (str, Path)) else i for i in numbers]
            found = [self.boxes_in(picture, name, None if boxes is None else boxes[i]) for i, picture, name in
                     zip(numbers, loaded, names)] if self.top_down else None
            for picture, p in zip(loaded, self.predict(loaded, names, found)):
                confident = p.at_least(self.threshold if threshold is None else threshold)
                people.append(People(picture, confident, self.skeleton))
        return people

    def predict(self, pictures: list, names: list, boxes: list[Found] | None) -> list[Prediction]:
        """All people of one batch. Of DiffusionPose, pictures may be clips: (previous, this, next)."""
        given = [boxes] if self.top_down else []
        return self.module.predict(self.model, self.module.to_batch(pictures, names, self.model.cfg, *given))

    def boxes_in(self, picture: Image.Image, name: int | str, boxes: np.ndarray | None = None) -> Found:
        """Where to look in a picture: in the boxes that are given, in those of the detector, or at all of it."""
        if boxes is not None:
            boxes = np.asarray(boxes, float).reshape(-1, 4)
            if not in_image(boxes, picture.size).all():
                raise UserError(f"{name}: a box lies outside of the picture of {picture.width}x{picture.height}, or has "
                                "no area: expected x1, y1, x2, y2")
            return boxes, np.ones(len(boxes))
        if self.detector:
            return boxes_of(self.detector.predict([picture], [name], None)[0], self.detector.threshold, picture.size)
        return whole_image(picture.size)


def load(source: str | Path, device: str = "auto", threshold: float | None = None, detector: str = "", method: str = "",
         preset: str = "", settings: Sequence[str] = ()) -> Pose:
    """A checkpoint, by all that the command takes, as a function of pictures.

    device     auto, cpu, cuda, cuda:1
    threshold  smallest score of a person, of those who are found and of those whom the detector finds; None: a run's
               own, at which its F1 of people on val is best, else 0.5
    detector   for top-down methods: a checkpoint that finds people
    settings   what only prediction reads, e.g. ["steps=4"]

    Raises UserError.
    """
    module, model, _ = load_model(str(source), method, preset)
    if detector and not getattr(module, "TOP_DOWN", False):
        raise UserError(f"{module.__name__} finds people by itself: leave the detector out")
    model = with_settings(module, model, list(settings)).to(pick_device(device))
    return Pose(module, model, threshold, load_detector(detector, device, threshold) if detector else None)


def load_detector(source: str, device: str, threshold: float | None) -> Pose:
    """A multi-person method's checkpoint, which finds the people that a top-down method looks at. Raises UserError."""
    detector = load(source, device, threshold)
    if detector.top_down:
        raise UserError(f"--detector {source}: {detector.module.__name__} needs boxes itself; take a multi-person method's")
    return detector


# ---------------------------------------------------------------------------------------------------------
# A dataset
# ---------------------------------------------------------------------------------------------------------


def boxes_in_data(pose: Pose, data: PoseDataset, args: argparse.Namespace, ranks: Ranks) -> Boxes:
    """The people of a dataset to look at: of --boxes or --detector, else the annotated ones."""
    if args.boxes:
        return read_boxes(args.boxes, data)
    if pose.detector:
        return detect(lambda picture, name: pose.detector.predict([picture], [name], None)[0], data, ranks, args.detector)
    if not data.labelled:
        raise UserError(f"{data.files[0]} has no labels, so no boxes of people: add --boxes or --detector")
    return true_boxes(data)


def evaluate_dataset(pose: Pose, model: nn.Module, args: argparse.Namespace, ranks: Ranks, trained: RunConfig) -> None:
    """Print the table of metrics, errors per keypoint and images per second; write them and results.json.

    trained: the run's own config. If it held pictures out of the training split, these are what is evaluated.
    """
    split = args.split or default_splits(args.data)[1]
    with rank_zero_first(ranks):
        if trained.val_share and args.data == trained.data and not (args.split or has_split(args.data, split)):
            data = split_off(trained, pose.skeleton)[1]
        else:
            data = open_dataset(args.data, split, pose.skeleton, parse_numbers(args.sigmas), args.category)
    if args.diagnose:
        truth_to_diagnose(data)                 # before the work: raises UserError without labels
    if ranks.rank == 0:
        print(data.report())
        out = folder_for(args)                  # before the work, not after it
    chosen = {name: getattr(args, name) for name in ("workers", "eval_batch") if getattr(args, name) is not None}
    boxes = [boxes_in_data(pose, data, args, ranks)] if pose.top_down else []
    start = time.perf_counter()
    table, predictions = pose.module.evaluate(model, data, resolve(model.cfg, **chosen), ranks, *boxes)
    seconds = time.perf_counter() - start
    if ranks.rank > 0:
        return
    about = diagnose(predictions, data, pose.threshold, out) if args.diagnose else []
    lines = [*about, metrics.format_table(metrics.keypoint_errors(predictions, data)),
             "(errors of the people found, as fractions of √area; close: OKS term of at least 0.5)\n",
             metrics.format_table(table), *map(str, boxes), *data.caveats(),
             *metrics.published(args.checkpoint, data, table)] if data.labelled else [
             f"{data.files[0]} has no labels: results.json for its own evaluation server, and no table"]
    print("\n".join(lines))
    for name, text in {"results.json": json.dumps(metrics.to_results(predictions)),
                       "table.txt": "\n".join([f"{args.checkpoint} on {args.data}", data.report(), *lines, ""])}.items():
        with whole(out / name) as part:
            part.write_text(text, encoding="utf-8", errors="backslashreplace")
    save_pictures([draw.draw_predictions(data, predictions, 12, pose.threshold)], out / "predictions")
    print(f"{len(data)} images in {seconds:.1f} s, {len(data) / seconds:.1f} a second with loading and metrics, on "
          f"{ranks.world} x {ranks.device.type}; table.txt, results.json and predictions.png are in {out}")


# ---------------------------------------------------------------------------------------------------------
# Pictures and videos
# ---------------------------------------------------------------------------------------------------------


def boxes_in_pictures(pose: Pose, names: list[str], args: argparse.Namespace) -> Callable[[Shot], Found]:
    """A function of a shot: the people to look at, of --boxes or --detector, else the whole picture.

    In the file of --boxes a picture is known by its name or its stem, as in the results.json that is written here;
    a row with `frame` is about that frame of a video, one without about all of them.
    """
    if not args.boxes:
        if not pose.detector:
            print(WHOLE.format("--boxes FILE.json or --detector CHECKPOINT say where people are"))
        return lambda shot: pose.boxes_in(shot.frame.picture, shot.source.name)
    people, _ = read_results(args.boxes)
    ids = {key[0] if isinstance(key, tuple) else key for key in people}
    if not any(key in (name, Path(name).stem) for key in ids for name in names):
        raise UserError(f"{args.boxes} has boxes for {', '.join(sorted(ids)[:3])}, ..., but for none of the "
                        f"pictures ({', '.join(names[:3])}): its image_id has to be a picture's name")

    def chosen(shot: Shot) -> Found:
        keys = [shot.source.name, Path(shot.source.name).stem]
        key = next((key for key in [*((name, shot.frame.number) for name in keys), *keys] if key in people), None)
        boxes, scores = people.get(key, NOBODY)
        good = in_image(boxes, shot.frame.picture.size)
        if not good.all():
            tqdm.write(f"{shot.source.name}: {(~good).sum()} boxes left out, outside of the picture or without area")
        return boxes[good], scores[good]
    return chosen


def draw_pictures(pose: Pose, args: argparse.Namespace, trained_for: str) -> None:
    """Draw the people of each picture and video, and list them; whatever a video's length, a few frames are in memory."""
    sources = find_pictures(args.images)
    out = folder_for(args)
    if trained_for == "puppets":
        print("these weights have seen drawn puppets alone: in photos they find little")
    if any(out.samefile(source.path.parent) for source in sources):
        raise UserError(f"--out {out} holds the pictures themselves: choose another folder for the drawn ones")
    look = boxes_in_pictures(pose, [source.name for source in sources], args) if pose.top_down else None
    people = pictures = bad = 0
    best = 0.0
    bar = tqdm(total=len(sources), desc="pictures", unit="picture", dynamic_ncols=True, disable=None)
    with Drawing(out, args.gif) as drawing, bar:
        for group in in_groups(shots(sources), args.eval_batch or 8):
            for shot in group:
                bar.update()
                if shot.error:
                    bad += 1
                    tqdm.write(f"skipped ({bad} so far): {shot.error}")
                elif shot.clip and not shot.frame.number:
                    bar.total += max(0, shot.clip.total - 1)
            group = [shot for shot in group if shot.frame]
            if not group:
                continue
            seen = [shot.around if pose.clips else shot.frame.picture for shot in group]
            boxes = [look(shot) for shot in group] if look else None
            for i, (shot, p) in enumerate(zip(group, pose.predict(seen, [shot.source.name for shot in group], boxes))):
                sure = p.at_least(pose.threshold)
                best, people, pictures = max([best, *p.scores]), people + len(sure.scores), pictures + (not shot.frame.number)
                drawing.add(shot, People(shot.frame.picture, sure, pose.skeleton).draw(),
                            metrics.to_results([sure if shot.clip else p]))
                if args.process and not shot.frame.number:
                    if shot.clip:
                        tqdm.write(f"{shot.source.name}: --process shows the first frame alone")
                    more = pose.module.show_process(pose.model, seen[i], pose.threshold, *([boxes[i]] if boxes else []))
                    if not more:
                        tqdm.write(f"{shot.source.name}: nobody of score {pose.threshold:.2g} or more, so --process has "
                                   "nothing to show")
                    for what, shown in more.items():
                        save_pictures(shown, out / f"{shot.source.target}_{what}")
        if bad == len(sources):
            raise UserError(f"none of the {bad} pictures could be read")
    if not people and best:
        print(f"the best score is {best:.2f}: --threshold {max(0.01, best / 2):.2f} would show something")
    own = " (its best F1 on val)" * (args.threshold is None and hasattr(pose.model, "threshold"))
    print(f"{people} people of score {pose.threshold:.2g} or more{own} in {pictures} pictures"
          f"{f', {bad} could not be read' if bad else ''}; drawn into {out}")


def compare_checkpoints(first: Pose, args: argparse.Namespace, ranks: Ranks) -> None:
    """Draw what each checkpoint finds in each picture into one grid; --set is about the first one."""
    sources, detector, finders = find_pictures(args.images), first.detector, {}
    poses = {args.checkpoint: first} | {source: load(source, str(ranks.device), args.threshold) for source in args.compare}
    if (args.boxes or detector) and not any(pose.top_down for pose in poses.values()):
        raise UserError("these methods find people by themselves: leave --boxes and --detector out")
    for source, pose in poses.items():
        pose.detector = detector if pose.top_down else None
        look = boxes_in_pictures(pose, [one.name for one in sources], args) if pose.top_down else None

        def find(shot: Shot, pose: Pose = pose, look: Callable | None = look) -> People:
            seen = shot.around if pose.clips else shot.frame.picture
            p = pose.predict([seen], [shot.source.name], [look(shot)] if look else None)[0]
            return People(shot.frame.picture, p.at_least(pose.threshold), pose.skeleton)
        name = f"{pose.module.__name__}: {weights.name_of(source)}"
        finders[source if name in finders else name] = Finder(find, [one.model for one in (pose, pose.detector) if one])
    out = folder_for(args)
    print(f"{compare(finders, shots(sources), ranks.device, out)}\ncompare.png and compare.json are in {out}")


def folder_for(args: argparse.Namespace) -> Path:
    """--out, or a new folder that is named after the checkpoint."""
    if args.out:
        return make_folder(args.out)
    return new_folder(f"eval-{weights.name_of(args.checkpoint)}-{time.strftime('%Y%m%d-%H%M%S')}")


# ---------------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
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
    parser.add_argument("--diagnose", action="store_true", help="errors by kind, AP without each; the worst people drawn")
    parser.add_argument("--compare", nargs="+", default=[], metavar="CHECKPOINT", help="further ones, beside the first on --images")
    parser.add_argument("--images", nargs="+", default=[], help="pictures, GIFs, videos or folders to draw people on")
    parser.add_argument("--boxes", default="", help="top-down methods: where people are, as COCO results (JSON)")
    parser.add_argument("--detector", default="", help="top-down methods: a checkpoint that finds people")
    parser.add_argument("--threshold", type=float, help="smallest score that is drawn (default: at which a run's F1 of "
                        f"people on val is best, else {SHOWN})")
    parser.add_argument("--gif", action="store_true", help="also join the drawn pictures into all.gif")
    parser.add_argument("--process", action="store_true", help="also draw how the method gets there, of a video in its first frame")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the model as .onnx or .pt2 (torch.export)")
    parser.add_argument("--bench", nargs="?", const="", metavar="FILE.onnx", help="measure milliseconds of a batch")
    parser.add_argument("--out", type=Path, help="folder for what is written (default: a new one in runs/)")
    parser.add_argument("--workers", type=int, help="image loading processes per GPU (default: the model's own)")
    parser.add_argument("--eval_batch", type=int, help="images at once (default: the model's own; of --images 8)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if not np.isfinite(args.threshold or 0) or (args.eval_batch or 1) < 1:
        raise UserError(f"--threshold {args.threshold}, --eval_batch {args.eval_batch}: expected a number, at least 1 image")
    if args.export:
        check_target(args.export)               # before weights are fetched
    if args.compare and not args.images or args.diagnose and args.images:
        raise UserError("--compare draws what several checkpoints find: add --images PICTURE" if args.compare else
                        "--diagnose compares with labels, which --images have not: leave one of them out")
    ranks = init_ranks(args.device)
    with rank_zero_first(ranks):                # it fetches
        module, model, trained_for = load_model(args.checkpoint, args.method, args.preset)
    if (args.boxes or args.detector) and not args.compare and not getattr(module, "TOP_DOWN", False):
        raise UserError(f"{module.__name__} finds people by itself: leave --boxes and --detector out")
    if args.boxes and args.detector:
        raise UserError("--boxes and --detector both say where people are: give one of them")
    trained, model = model.cfg, with_settings(module, model, args.set).to(ranks.device).eval()
    with rank_zero_first(ranks):                # it fetches
        detector = load_detector(args.detector, str(ranks.device), DETECTED) if args.detector else None
    pose = Pose(module, model, args.threshold, detector)
    if args.export:
        return export(module, pose.model, args.export, args.checkpoint)
    if args.bench is not None:
        return print(bench(module, pose.model, ranks.device, args.eval_batch or 1, args.bench))
    if args.images:
        if ranks.rank == 0:                             # pictures are too few to share
            compare_checkpoints(pose, args, ranks) if args.compare else draw_pictures(pose, args, trained_for)
        return
    args.data = args.data or trained_for
    if not args.data:
        raise UserError("these weights do not say what to evaluate them on: add --data FOLDER, or --images PICTURE")
    evaluate_dataset(pose, model, args, ranks, trained)


if __name__ == "__main__":
    run_main(main)
