"""Several checkpoints on the same pictures: one grid of what each finds, and what that costs.

A cell says how many people were found, the parameters, and of this picture GFLOPs (2 per multiply-add of matrix
products and convolutions) and milliseconds, from the decoded picture to its people. A detector is part of all
three, and a top-down method looks once at each person.
"""
from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import draw, metrics
from common.errors import UserError
from common.export import timed
from common.records import whole
from common.video import Shot, save_pictures

ROUNDS = 5                                      # measurements after a warm-up
CELL, MOST_ROWS = 480, 12                       # pixels of a picture; pictures in a grid


class Finder(NamedTuple):
    """A checkpoint as `compare` needs it."""
    find: Callable[[Shot], Sized]               # the people of a picture, with `draw()`
    models: list[nn.Module]                     # what has parameters: the model, and its detector


@torch.no_grad()
def cost(work: Callable[[], Sized], device: torch.device) -> tuple[Sized, float, float]:
    """What `work` gives, its GFLOPs, and its milliseconds, the median of ROUNDS calls after a first one."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    times = [timed(device, work)[1] for _ in range(1 + ROUNDS)]
    return result, counter.get_total_flops() / 1e9, statistics.median(times[1:])


def compare(finders: dict[str, Finder], pictures: Iterable[Shot], device: torch.device, out: Path) -> str:
    """Draw compare.png, a column for each checkpoint and a row for each picture, of videos the first frame;
    write compare.json beside it. Returns the figures as a table.

    Raises UserError where no picture can be read.
    """
    for model in (model for finder in finders.values() for model in finder.models):
        model.requires_grad_(False)                     # else the counter of FLOPs asks for the gradients of inputs
    cells, rows, left_out = [], [], 0
    for shot in pictures:
        if shot.error:
            tqdm.write(f"skipped: {shot.error}")
        elif shot.frame.number == 0 and len(cells) == MOST_ROWS * len(finders):
            left_out += 1
        elif shot.frame.number == 0:
            for name, finder in finders.items():
                people, gflops, ms = cost(lambda find=finder.find: find(shot), device)
                millions = sum(p.numel() for model in finder.models for p in model.parameters()) / 1e6
                rows.append(dict(checkpoint=name, image=shot.source.name, people=len(people),
                                 parameters_m=round(millions, 3), gflops=round(gflops, 3), milliseconds=round(ms, 2)))
                text = f"people: {len(people)}; {millions:.1f} M parameters, {gflops:.1f} GFLOPs, {ms:.0f} ms"
                cells.append(labelled(people.draw(), name, text))
    if not cells:
        raise UserError("none of the pictures could be read")
    save_pictures([draw.contact_sheet(cells, len(finders), cell=10 * CELL)], out / "compare")
    with whole(out / "compare.json") as part:
        part.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    columns = ("people", "parameters_m", "gflops", "milliseconds")
    table = {row["checkpoint"] if len(rows) == len(finders) else f"{row['checkpoint']}, {row['image']}":
             {name: row[name] for name in columns} for row in rows}
    cut = f"\nthe first {MOST_ROWS} pictures; {left_out} left out" if left_out else ""
    return metrics.format_table(table) + cut


def labelled(picture: Image.Image, name: str, text: str) -> Image.Image:
    """A cell of one width: the picture on paper, above it the checkpoint's name and the figures."""
    small = ImageOps.contain(picture, (CELL, CELL))
    cell = Image.new("RGB", (CELL, small.height), draw.PAPER)
    cell.paste(small, ((CELL - small.width) // 2, 0))
    return draw.captioned(draw.captioned(cell, text), name)
