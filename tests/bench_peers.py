"""Milliseconds of DETRPose beside YOLO11-pose and YOLO26-pose, on the same machine in the same minutes, and AP over them.

    python -m tests.bench_peers [--peers detrpose yolo26 yolo11] [--sizes n s m l] [--forms eager fused compile onnx]
                                [--batches 1 8] [--threads 1 2] [--pairs 7] [--side 640] [--out runs/peers]

    eager     the model as it is trained, convolutions and norms apart (DETRPose only)
    fused     after `detrpose.fuse`, or YOLO's own `fuse`
    compile   torch.compile of that (DETRPose only)
    onnx      ONNX Runtime, of the file that `eval.py --export` writes; of YOLO, by the same exporter

Weights are random, which does not matter to the time; AP is what the papers and YOLO's authors state for COCO val. All
forms of all models of one size run in turn, so that a busy machine slows all; a figure is the median of the rounds.
YOLO11's figures are without its NMS, which the other two do not need; decoding of files and resizing are in none.
Nothing is installed: what is missing is named, and the rest is measured. Figures are kept in OUT/peers.json after every
size, and not taken again; the table is OUT/peers.md, the picture OUT/peers.png.
"""
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import detrpose
from common import draw, export
from tests.helpers import bench_flags, in_turns

SIZES = ("n", "s", "m", "l")
AP = dict(detrpose=(57.2, 67.0, 69.4, 72.5), yolo26=(57.2, 63.0, 68.8, 70.4), yolo11=(50.0, 58.9, 64.9, 66.1))
NAMES = dict(detrpose="DETRPose", yolo26="YOLO26", yolo11="YOLO11")
FORMS = dict(eager=(), fused=(), compile=(), onnx=("onnx", "onnxscript", "onnxruntime"))   # and what they need
WARM_UP = 2


def yolo(kind: str) -> nn.Module:
    """YOLO-pose for people, from its own description, as its own exporter prepares it."""
    from ultralytics.nn.tasks import PoseModel
    model = PoseModel(f"{kind}-pose.yaml", nc=1, verbose=False).eval()
    model.end2end = kind.startswith("yolo26")                   # without NMS
    model.fuse(verbose=False)
    head = model.model[-1]
    head.export, head.format = True, "onnx"
    return model


def onnx_file(model: nn.Module, name: str, images: Tensor, folder: Path) -> Path:
    """The exported model; YOLO's has a fixed batch, as is its exporter's default."""
    ours = name.startswith("detrpose")
    path = folder / (f"{name}.onnx" if ours else f"{name}-{len(images)}.onnx")
    if not path.exists():
        with export.quiet(), export.whole(path) as part:
            graph = (export.graph_of(export.Program(model, detrpose.exported(model).run), images) if ours else
                     torch.export.export(model, (images,)))
            export.save_onnx(graph, part, ["images"], ["logits", "keypoints"] if ours else ["people"], {})
    return path


def forms_of(peer: str, size: str, forms: list[str], images: Tensor, folder: Path) -> dict[str, Callable]:
    """What is run and timed, by the name of its figure."""
    if peer == "detrpose":
        eager = detrpose.build(size, size=images.shape[-1]).eval()
        fused = detrpose.fuse(eager)
        made = dict(eager=eager, fused=fused, compile=torch.compile(fused, dynamic=False))
        if "compile" in forms:
            torch.compiler.reset()
    else:
        fused = yolo(peer + size)
        made = dict(fused=fused)
    runs = {form: lambda net=net: net(images) for form, net in made.items()}
    if "onnx" in forms:
        session = export.open_onnx(onnx_file(fused, peer + size, images, folder))
        runs["onnx"] = lambda: session({"images": images})
    return {f"{peer}-{size} {form}": run for form, run in runs.items() if form in forms}


@torch.inference_mode()
def measure(size: str, peers: list[str], forms: list[str], images: Tensor, pairs: int, folder: Path) -> dict[str, float]:
    """Median milliseconds of all forms of all models of a size, run in turn."""
    runs = {name: run for peer in peers for name, run in forms_of(peer, size, forms, images, folder).items()}
    in_turns(WARM_UP, *runs.values())
    return dict(zip(runs, np.median(in_turns(pairs, *runs.values()), 0) * 1e3))


def table(figures: dict[str, float], forms: list[str], setting: str) -> list[str]:
    """Rows of one batch and number of threads: model, AP, milliseconds of each form."""
    rows = [f"| {setting} | AP | {' | '.join(f'{form}, ms' for form in forms)} |", "|---|---" + "|---" * len(forms) + "|"]
    for peer, values in AP.items():
        for size, ap in zip(SIZES, values):
            cells = [figures.get(f"{peer}-{size} {form} {setting}") for form in forms]
            if any(cells):
                rows.append(f"| {NAMES[peer]} {size} | {ap} | {' | '.join(f'{x:.1f}' if x else '' for x in cells)} |")
    return [*rows, ""]


def curves(figures: dict[str, float], forms: list[str], settings: list[str]) -> list:
    """AP over milliseconds, a panel for each form and setting in which more than one model was measured."""
    panels = []
    for setting in settings:
        for form in forms:
            lines = {NAMES[peer]: sorted((figures[key], ap) for size, ap in zip(SIZES, values)
                                         if (key := f"{peer}-{size} {form} {setting}") in figures)
                     for peer, values in AP.items()}
            lines = {peer: points for peer, points in lines.items() if points}
            if len(lines) > 1:
                longest = max(points[-1][0] for points in lines.values())
                panels.append(draw.captioned(draw.draw_panel("AP", lines, 0, 1.05 * longest, "ms"), f"{form}, {setting}"))
    return panels


def missing(peers: list[str], forms: list[str]) -> tuple[list[str], list[str]]:
    """The peers and forms that can be measured; says what the others need."""
    if any(peer != "detrpose" for peer in peers) and not export.installed("ultralytics"):
        print("ultralytics is not installed, so DETRPose is alone: pip install ultralytics (AGPL-3.0)")
        peers = ["detrpose"]
    for form in list(forms):
        absent = [package for package in FORMS[form] if not export.installed(package)]
        if absent:
            print(f"no {form}: pip install {' '.join(absent)}")
            forms = [one for one in forms if one != form]
    return peers, forms


def main() -> None:
    args = bench_flags(__doc__, threads=[1, 2], peers=list(AP), sizes=list(SIZES), forms=list(FORMS), batches=[1, 8], side=640,
                       out="runs/peers")
    folder, (peers, forms) = Path(args.out), missing(args.peers, args.forms)
    folder.mkdir(parents=True, exist_ok=True)
    kept, settings = folder / "peers.json", []
    figures = json.loads(kept.read_text()) if kept.exists() else {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batches:
            setting = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
            settings.append(setting)
            for size in args.sizes:
                wanted = [f"{peer}-{size} {form} {setting}" for peer in peers for form in forms
                          if peer == "detrpose" or form in ("fused", "onnx")]
                if all(one in figures for one in wanted):
                    continue
                images = torch.rand(batch, 3, args.side, args.side)
                found = measure(size, peers, forms, images, args.pairs, folder)
                figures |= {f"{name} {setting}": round(ms, 2) for name, ms in found.items()}
                kept.write_text(json.dumps(figures, indent=1))
                print(f"{setting}, {size}: " + ", ".join(f"{name} {ms:.1f}" for name, ms in found.items()), flush=True)
    rows = [row for setting in settings for row in table(figures, forms, setting)]
    (folder / "peers.md").write_text("\n".join(rows))
    print("\n".join(rows))
    if panels := curves(figures, forms, settings):
        draw.contact_sheet(panels, columns=len(forms), gap=0).save(folder / "peers.png")
        print(f"{folder / 'peers.png'}: AP over milliseconds")


if __name__ == "__main__":
    main()
