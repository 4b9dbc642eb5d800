"""Pictures of poses and of training: skeletons on images, contact sheets, curves, GIFs. Needs only Pillow.

A person's left is drawn in blue and green, the right in orange and red, what lies between in yellow and violet.
Every line has a thin dark rim, so that it reads on any background; widths follow the size of image and person.
"""
from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.datasets import PoseDataset, id_key
from common.records import Prediction
from common.skeletons import Skeleton, words

Colour = tuple[int, int, int]
LEFT, RIGHT = ((40, 150, 255), (60, 230, 150)), ((255, 180, 40), (255, 60, 100))
CENTRE = ((250, 235, 90), (205, 150, 255))              # each: its first limb, its last limb
RIM, LIGHT, PAPER = (20, 20, 24), (245, 245, 245), (255, 255, 255)
ABSENT, HOLLOW, SOLID = 0, 1, 2
DOUBTFUL = 0.3                                          # keypoints of a lower score are hollow


# ---------------------------------------------------------------- people

def side_of(skeleton: Skeleton, k: int) -> int:
    """-1 left, 1 right, 0 neither or unknown, by the name: left_eye, Left Eye, l_eye, eye.r."""
    read = set(words(skeleton.keypoints[k]))
    return bool(read & {"right", "r"}) - bool(read & {"left", "l"})


def colours(sides: Sequence[int]) -> list[Colour]:
    """One colour per limb or keypoint: the limbs of a side run from the side's first colour to its last."""
    sides, result = np.asarray(sides), []
    for i, side in enumerate(sides):
        first, last = {-1: LEFT, 0: CENTRE, 1: RIGHT}[int(side)]
        t = (sides[:i] == side).sum() / max((sides == side).sum() - 1, 1)
        result.append(tuple(round(a + t * (b - a)) for a, b in zip(first, last)))
    return result


def states(keypoints: np.ndarray, scores: np.ndarray | None) -> np.ndarray:
    """(P, K): ABSENT where not labelled or not finite, HOLLOW where v = 1 or the score is low, else SOLID."""
    state = np.full(keypoints.shape[:2], SOLID)
    if keypoints.shape[2] == 3:
        state = np.clip(np.ceil(np.nan_to_num(keypoints[..., 2])), ABSENT, SOLID).astype(int)
    if scores is not None:
        state = np.where(np.asarray(scores) < DOUBTFUL, np.minimum(state, HOLLOW), state)
    return np.where(np.isfinite(keypoints[..., :2]).all(-1), state, ABSENT)


def draw_people(image: Image.Image, keypoints: np.ndarray, scores: np.ndarray | None, skeleton: Skeleton,
                boxes: np.ndarray | None = None, person_scores: np.ndarray | None = None,
                min_side: int = 384) -> Image.Image:
    """The image with its people, enlarged by a whole factor if its shorter side is below `min_side`.

    Takes    keypoints (P, K, 2) or (P, K, 3) with v, px;  scores (P, K) or None;  boxes (P, 4) xyxy px or None;
             person_scores (P,) or None: written beside each person, and the best are drawn on top
    Returns  a new RGB image. Keypoints of v = 1 or a score below 0.3 are rings, those of v = 0 left out.
    """
    layer, limit = Layer(image, min_side), np.array(image.size)
    keypoints = np.asarray(keypoints, dtype=float).reshape(-1, skeleton.num_keypoints, np.shape(keypoints)[-1])
    state = states(keypoints, scores)
    xy = layer.place(np.clip(np.nan_to_num(keypoints[..., :2]), -limit, 2 * limit))
    for p in range(len(xy)) if person_scores is None else np.argsort(person_scores):
        box = None if boxes is None else (np.clip(boxes[p], 0, np.tile(limit, 2)) * layer.scale).tolist()
        if box:
            draw_box(layer.pen, box, layer.unit)
        draw_person(layer.pen, xy[p], state[p], skeleton, layer.unit)
        if person_scores is not None and (box or state[p].any()):
            corner = box[:2] if box else xy[p][state[p] > ABSENT].min(0) - 4 * layer.unit
            draw_label(layer.pen, corner, f"{person_scores[p]:.2f}", max(11 * layer.fine, 5 * layer.unit))
    return layer.finish()


class Layer:
    """What is drawn over an image, which is enlarged by a whole factor if its shorter side is below `min_side`: by `pen`,
    for smooth lines `fine` times larger than the result. `unit` is a width that suits the picture."""

    def __init__(self, image: Image.Image, min_side: int = 384):
        width, height = image.size
        zoom = max(1, min(math.ceil(min_side / min(width, height)), 4096 // max(width, height)))
        self.canvas = image.convert("RGB").resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
        self.fine = 2 if max(self.canvas.size) <= 2048 else 1
        self.scale, self.unit = zoom * self.fine, self.fine * math.sqrt(math.prod(self.canvas.size)) / 200
        self.image = Image.new("RGBA", (width * self.scale, height * self.scale))
        self.pen = ImageDraw.Draw(self.image)

    def place(self, xy: np.ndarray) -> np.ndarray:
        """Where `pen` draws what is at these pixels of the image."""
        return (xy + 0.5) * self.scale

    def finish(self) -> Image.Image:
        if found := self.image.getbbox():                                       # what is empty costs nothing
            x1, y1, x2, y2 = (*(x // self.fine for x in found[:2]), *(-(-x // self.fine) for x in found[2:]))
            part = self.image.crop([x * self.fine for x in (x1, y1, x2, y2)])
            part = part.resize((x2 - x1, y2 - y1), Image.Resampling.BOX)
            self.canvas.paste(part, (x1, y1), part)
        return self.canvas


def draw_ellipses(image: Image.Image, draws: np.ndarray, skeleton: Skeleton) -> Image.Image:
    """The image with an ellipse per keypoint that says how far several guesses of it lie apart.

    draws (S, P, K, 2): S guesses of the keypoints of P people, px. An ellipse is their mean and two standard deviations
    around it, in the colour of the keypoint.
    """
    layer, angle = Layer(image), np.linspace(0, 2 * math.pi, 49)
    circle = 2 * np.stack([np.cos(angle), np.sin(angle)], -1)
    for guesses in np.asarray(draws, dtype=float).swapaxes(0, 1):
        for xy, colour in zip(guesses.swapaxes(0, 1), colours([side_of(skeleton, k) for k in range(guesses.shape[1])])):
            _, size, axes = np.linalg.svd(xy - xy.mean(0), full_matrices=False)
            outline = layer.place(xy.mean(0) + circle * (size / math.sqrt(len(xy)) + 0.3) @ axes)
            layer.pen.polygon([tuple(point) for point in outline], (*colour, 110), (*colour, 255), layer.fine)
    return layer.finish()


def draw_circles(image: Image.Image, points: np.ndarray, radii: np.ndarray, sides: Sequence[int],
                 texts: Sequence[str]) -> Image.Image:
    """The image with R circles around each point (N, 2), radii (R, N), in pixels, in the colours of the points' sides;
    those of the point with the largest ones are labelled."""
    layer = Layer(image, min_side=640)
    pen, fine, centres, radii = layer.pen, layer.fine, layer.place(points), radii * layer.scale
    for (x, y), sizes, colour in zip(centres, radii.T, colours(sides)):
        for size in sizes:
            pen.ellipse((x - size, y - size, x + size, y + size), outline=RIM, width=4 * fine)
            pen.ellipse((x - size, y - size, x + size, y + size), outline=colour, width=2 * fine)
        disc(pen, x, y, 3 * fine, RIM)
        disc(pen, x, y, 2 * fine, colour)
    largest = int(radii[0].argmax())
    for size, text in zip(radii[:, largest], texts):
        draw_label(pen, centres[largest] - [0, size], text, 12 * fine)
    return layer.finish()


def draw_heat(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image, darkened, under a map (h, w) of values from 0 to 1, which is stretched over it."""
    shade = Image.fromarray((255 * np.clip(heat, 0, 1)).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", image.size, RIGHT[0]), image.point(lambda value: value // 2), shade)


def draw_points(image: Image.Image, points: np.ndarray, weights: np.ndarray) -> Image.Image:
    """The image with a disc at each point (N, 2), in pixels, the larger the more it weighs, (N,) from 0 to 1."""
    layer = Layer(image)
    for i in np.argsort(weights):
        x, y = layer.place(points[i])
        disc(layer.pen, x, y, layer.unit * (0.8 + 2 * weights[i]), RIM)
        disc(layer.pen, x, y, layer.unit * (0.5 + 2 * weights[i]), RIGHT[1] if weights[i] > 0.5 else CENTRE[0])
    return layer.finish()


def draw_arrows(image: Image.Image, points: np.ndarray, arrows: Sequence[tuple[int, int]],
                strength: np.ndarray) -> Image.Image:
    """The image with arrows between points (K, 2), wide where they end, the wider the stronger."""
    layer = Layer(image)
    places = layer.place(points)
    for (a, b), share in zip(arrows, strength / max(strength.max(), 1e-9)):
        along = (places[b] - places[a]) / max(math.dist(places[a], places[b]), 1)
        side = np.array([along[1], -along[0]]) * 8 * share * layer.fine
        corners = [tuple(point) for point in (places[a], places[b] + side, places[b])]
        layer.pen.polygon(corners, (*LEFT[0], round(90 + 165 * share)))
    return layer.finish()


def draw_person(pen: ImageDraw.ImageDraw, xy: np.ndarray, state: np.ndarray, skeleton: Skeleton, unit: float):
    """Limbs, then joints; xy (K, 2) in pixels of the layer. Limbs with a hollow end and short ones are thin."""
    if not state.any():
        return
    extent = np.ptp(xy[state > ABSENT], axis=0).max()
    line = float(np.clip(extent / 50, 0.6 * unit, 1.5 * unit))
    rim, sides = max(0.3 * line, 1), [side_of(skeleton, k) for k in range(len(xy))]

    limb_colours = colours([np.sign(sides[a] + sides[b]) for a, b in skeleton.edges])
    limbs = []
    for (a, b), colour in zip(skeleton.edges, limb_colours):
        if state[a] and state[b]:
            width = min(line, line / 3 + math.dist(xy[a], xy[b]) / 8)
            limbs.append((*xy[a], *xy[b], colour, width if min(state[a], state[b]) == SOLID else width / 2))
    for *ends, _, width in limbs:
        pen.line(ends, RIM, round(width + 2 * rim))
    for *ends, colour, width in limbs:
        pen.line(ends, colour, max(round(width), 1))

    # the points of a face or a hand stand close together
    radius, rim = (0.5 * line, 0.15 * line) if len(xy) > 40 else (1.1 * line, rim)
    for (x, y), kind, colour in zip(xy, state, colours(sides)):
        if kind:
            disc(pen, x, y, radius + rim, RIM)
            disc(pen, x, y, radius, colour)
        if kind == HOLLOW:
            disc(pen, x, y, 0.55 * radius, RIM)


def disc(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, colour: Colour):
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def draw_box(pen: ImageDraw.ImageDraw, box: Sequence[float], unit: float):
    x1, y1, x2, y2 = box
    width = max(round(0.6 * unit), 1)
    for colour, grow in ((RIM, width // 2 + 1), (LIGHT, 0)):
        rectangle = (x1 - grow, y1 - grow, max(x2, x1) + grow, max(y2, y1) + grow)
        pen.rectangle(rectangle, outline=colour, width=width + 2 * grow)


def draw_label(pen: ImageDraw.ImageDraw, corner: Sequence[float], text: str, size: float):
    """Light text on a dark plate whose lower left corner is `corner`, moved into the picture."""
    font = ImageFont.load_default(size)
    pad = size / 4
    x, y = max(corner[0], 0), max(corner[1] - size - 2 * pad, 0)
    pen.rectangle((x, y, x + pen.textlength(text, font) + 2 * pad, y + size + 2 * pad), RIM)
    pen.text((x + pad, y + pad + size / 2), text, LIGHT, font, anchor="lm")


# ---------------------------------------------------------------- sheets and films

def contact_sheet(images: Sequence[Image.Image], columns: int = 4, cell: int = 480,
                  gap: int = 6) -> Image.Image:
    """Images in rows, each shrunk to at most `cell` pixels wide and high; smaller ones stay as they are."""
    small = [ImageOps.contain(image, (cell, cell)) if max(image.size) > cell else image for image in images]
    width = max((image.width for image in small), default=cell)
    rows = [small[i:i + columns] for i in range(0, len(small), columns)]
    tops = np.cumsum([gap] + [gap + max(image.height for image in row) for row in rows]).tolist()
    sheet = Image.new("RGB", (min(columns, max(len(small), 1)) * (width + gap) + gap, tops[-1] or cell), PAPER)
    for top, row in zip(tops, rows):
        for column, image in enumerate(row):
            sheet.paste(image, (gap + column * (width + gap) + (width - image.width) // 2, top))
    return sheet


def captioned(image: Image.Image, text: str) -> Image.Image:
    """The image below a strip with a text, over as many lines as it needs."""
    font, lines = ImageFont.load_default(14), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if not lines[-1] or font.getlength(longer) <= image.width - 8 else [lines[-1], word]
    strip = 18 * len(lines) + 6
    canvas = Image.new("RGB", (image.width, image.height + strip), RIM)
    canvas.paste(image, (0, strip))
    ImageDraw.Draw(canvas).multiline_text((4, 3), "\n".join(lines), LIGHT, font)
    return canvas


def draw_batch(images: np.ndarray, people: Sequence[np.ndarray], skeleton: Skeleton, count: int = 12) -> Image.Image:
    """The first images (B, 3, H, W) of a batch, RGB in [0, 1], with the people of each, (P, K, 3) x, y, v in its pixels."""
    pixels = (255 * np.clip(images[:count], 0, 1)).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return contact_sheet([draw_people(Image.fromarray(image), keypoints, None, skeleton, min_side=256)
                          for image, keypoints in zip(pixels, people)])


def clips_first(data: PoseDataset) -> list[int]:
    """Indices of a dataset; of videos the middle frame of each, then the others in order."""
    places = defaultdict(list)
    for i in range(len(data)) if data.metric == "posetrack" else ():
        places[data[i].image.parent].append(i)
    first = [indices[len(indices) // 2] for indices in places.values()]
    return first + sorted(set(range(len(data))) - set(first))


def draw_predictions(data: PoseDataset, predictions: Sequence[Prediction], count: int = 12,
                     min_score: float = 0.3) -> Image.Image:
    """The first images with labelled people, of videos one frame of each, or of a set without labels: the labels left,
    the predictions of at least `min_score` right."""
    found, pairs = {id_key(p.image_id): p for p in predictions}, []
    for i in clips_first(data):
        if len(pairs) == count:
            break
        p = found.get(id_key(data[i].image_id))
        if p is None or data.labelled and not (data[i].keypoints[..., 2] > 0).any():
            continue
        sample, _ = data.load(i)
        if sample is None:
            continue
        good = np.asarray(p.scores) >= min_score
        truth = draw_people(sample.image, sample.keypoints, None, data.skeleton)
        guess = draw_people(sample.image, p.keypoints[good], p.keypoint_scores[good], data.skeleton,
                            person_scores=p.scores[good])
        pairs.append(contact_sheet([truth, guess], 2, gap=2))
    return contact_sheet(pairs, columns=3, cell=720)


# ---------------------------------------------------------------- curves

LINES = ((31, 119, 200), (230, 120, 20), (40, 150, 70), (200, 50, 60), (130, 90, 190), (130, 80, 60))
INK, GRID = (40, 40, 48), (222, 224, 230)
PANEL = (440, 300)                                      # pixels; drawn twice as large and shrunk


def plot_curves(rows: Sequence[dict], path: Path | str):
    """Every number in the rows against `step`, a panel per quantity; APs share one, ARs share one, from 0 on.

    Values that are not finite, or -1 (nothing to find), are left out. Another positive quantity that spans more than
    two decades gets a logarithmic axis. Writes a picture in the format of the path's suffix.
    """
    panels: dict[str, dict[str, list]] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and name not in ("step", "epoch", "seconds") and math.isfinite(value) and value != -1:
                family = re.match(r".*?A[PR](?=_|\d|[A-Z]|$)", name)
                panel = panels.setdefault(family.group() if family else name, {})
                panel.setdefault(name, []).append((row["step"], value))
    panels = panels or {"nothing logged yet": {}}
    steps = [point[0] for panel in panels.values() for line in panel.values() for point in line] or [0]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    pictures = [draw_panel(title, series, first, last) for title, series in panels.items()]
    contact_sheet(pictures, columns=3, cell=max(PANEL), gap=0).save(path)


def draw_panel(title: str, series: dict[str, list[tuple[float, float]]], x0: float, x1: float,
               unit: str = "step") -> Image.Image:
    """One small diagram from x0 to x1 in a unit: grid, ticks, a line per series, a legend if there are several."""
    width, height = (2 * side for side in PANEL)
    left, top, right, bottom = 110, 60, width - 56, height - 80
    picture = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(22)
    pen.text((left, 40), title, INK, ImageFont.load_default(28), anchor="ls")

    values = np.array([y for line in series.values() for _, y in line] or [0.0], dtype=float)
    y0, y1 = values.min(), values.max()
    score = bool(re.fullmatch(r".*A[PR]|Mean", title))  # its axis starts at 0, however small it is
    logarithmic = not score and y0 > 0 and y1 / y0 > 100
    scale = np.log10 if logarithmic else np.asarray
    low, high = scale([y0, y1])
    room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = 0.0 if score else low - room, high + room

    def place(x, y) -> np.ndarray:
        return np.stack([left + (np.asarray(x) - x0) / (x1 - x0) * (right - left),
                         bottom - (scale(y) - low) / (high - low) * (bottom - top)], -1)

    for y in ticks(low, high, logarithmic):
        level = place(x0, y)[1]
        pen.line((left, level, right, level), GRID, 2)
        pen.text((left - 12, level), f"{y:.4g}", INK, font, anchor="rm")
    for x in ticks(x0, x1):
        column = place(x, 1.0)[0]
        pen.line((column, bottom, column, bottom + 10), INK, 2)
        pen.text((column, bottom + 16), f"{x:,.0f}", INK, font, anchor="mt")
    pen.line((left, top, left, bottom, right, bottom), INK, 2)
    pen.text((right, height - 12), unit, INK, font, anchor="rb")
    for (name, line), colour in zip(series.items(), LINES * len(series)):
        draw_line(pen, place(*np.array(line, dtype=float).T), colour)
    if len(series) > 1:
        draw_legend(pen, list(series), right, font)
    return picture.resize(PANEL, Image.Resampling.LANCZOS)


def draw_line(pen: ImageDraw.ImageDraw, points: np.ndarray, colour: Colour):
    """A polyline through (n, 2), few points marked; a long noisy one is pale, with its running mean on top."""
    if len(points) <= 12:
        for x, y in points:
            disc(pen, x, y, 6, colour)
    window = len(points) // 30
    if window > 1:
        pale = tuple(255 - (255 - c) // 3 for c in colour)
        pen.line([tuple(point) for point in points], pale, 2)
        sums = np.cumsum(np.pad(points, ((1, 0), (0, 0))), axis=0)
        points = (sums[window:] - sums[:-window]) / window
    pen.line([tuple(point) for point in points], colour, 4, joint="curve")


def draw_legend(pen: ImageDraw.ImageDraw, names: list[str], right: float, font: ImageFont.FreeTypeFont):
    """Names behind short lines, in the row of the title, ending at x = right."""
    for name, colour in reversed(list(zip(names, LINES * len(names)))):
        pen.text((right, 40), name, INK, font, anchor="rs")
        right -= pen.textlength(name, font) + 8
        pen.line((right - 22, 32, right, 32), colour, 6)
        right -= 40


def draw_differences(title: str, rows: Sequence[tuple[str, float | None, tuple[float, float] | None]]) -> Image.Image:
    """Differences of a paper's rows and ours: (what, the paper's, ours as mean and half its interval), None where there
    is none. A mean without an interval, half infinite, is a ring."""
    fine, line, left, right, top = 2, 44, 560, 1180, 70             # pixels, drawn twice as large and shrunk
    picture = Image.new("RGB", (right + 60, top + line * len(rows) + 70), PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(22)
    pen.text((20, 40), title, INK, ImageFont.load_default(28), anchor="ls")
    draw_legend(pen, ["paper", "ours"], right, font)

    ends = [0.0] + [paper for _, paper, _ in rows if paper is not None]
    for mean, half in (ours for _, _, ours in rows if ours):
        ends += [mean - half, mean + half] if math.isfinite(half) else [mean]
    room = 0.05 * (max(ends) - min(ends)) or 1.0
    low, high, bottom = min(ends) - room, max(ends) + room, top + line * len(rows)

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    for x in ticks(low, high):
        pen.line((place(x), top, place(x), bottom), INK if x == 0 else GRID, 2)
        pen.text((place(x), bottom + 12), f"{x:+.4g}" if x else "0", INK, font, anchor="mt")
    for i, (what, paper, ours) in enumerate(rows):
        y = top + line * (i + 0.5)
        while font.getlength(what) > left - 40:
            what = what.removesuffix("…")[:-1] + "…"
        pen.text((20, y), what, INK, font, anchor="lm")
        if paper is not None:
            disc(pen, place(paper), y - 7, 8, LINES[0])
        if ours:
            mean, half = ours
            if math.isfinite(half):
                pen.line((place(mean - half), y + 7, place(mean + half), y + 7), LINES[1], 4)
            disc(pen, place(mean), y + 7, 8, LINES[1])
            disc(pen, place(mean), y + 7, 0 if math.isfinite(half) else 4, PAPER)
    return picture.resize((picture.width // fine, picture.height // fine), Image.Resampling.LANCZOS)


def ticks(low: float, high: float, logarithmic: bool = False) -> list[float]:
    """About five round numbers from low to high; both are exponents of ten on a logarithmic axis."""
    if logarithmic:
        decades = range(math.floor(low), math.ceil(high) + 1)
        steps = (1, 2, 5) if high - low < 2.5 else (1,)
        return [m * 10.0 ** d for d in decades for m in steps if low <= math.log10(m * 10.0 ** d) <= high]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
