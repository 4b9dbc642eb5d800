"""Moving pictures, one frame after the other: videos (PyAV, else the program ffmpeg), GIF, WebP, PNG, TIFF (Pillow).

    clip = open_clip(path)                       raises BadImage
    for frame in clip: ...                       Frame: picture, number, time; upright, one in memory at a time
    with Writer(path, clip) as out: out.add(picture, frame.time)
    for shot in shots(find_pictures(["photo.jpg", "folder", "clip.mp4"])): ...      all that a command is given

A file that breaks off gives the frames before the break, and `clip.broken` says why. What is written appears under
its name when it is whole; a video as H.264 in mp4, without sound, each frame at its own time; the rest as GIF.
"""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps
from tqdm import tqdm

from common.errors import UserError
from common.records import BadImage, load_image, open_picture, white_of, whole

try:
    import av
except ImportError:
    av = None

VIDEOS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".3gp", ".ogv"}
PICTURES = {".jpg", ".jpeg", ".png", ".apng", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
# what FFmpeg may read a file as, whatever it is called: none of these can name other files or addresses
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,ogg,flv,asf"
TICKS = 90000               # of a second, in which a written video counts
STILL = 0.125               # seconds of a frame whose file has no times
WIDEST = 640                # pixels of the longer side of a GIF: Pillow has all of its frames in memory
FASTEST = 120               # frames a second that ffmpeg writes at most, where each stands in a fixed grid


class Frame(NamedTuple):
    picture: Image.Image                # RGB
    number: int                         # from 0
    time: float                         # seconds since the first frame


@dataclass(eq=False)
class Clip:
    """A moving picture. Its frames can be taken once."""
    path: Path
    frames: Iterator[tuple[Image.Image, float]] = iter(())
    total: int = 0                      # frames, their rate and length as the file says or nearly so; 0: not known
    fps: float = 0.0
    seconds: float = 0.0
    sound: bool = False
    grid: float = 0.0                   # frames a second where they are closest
    loop: int | None = None             # of a GIF: 0 for ever, None once
    video: bool = True
    last: float = 0.0                   # seconds of the last frame, once it was read
    broken: str = ""                    # why it ends early, once that is known

    def __iter__(self) -> Iterator[Frame]:
        """The frames up to the end or a break. Raises BadImage when there is not even one."""
        number, time = -1, 0.0
        try:
            for number, (picture, time) in enumerate(self.frames):
                yield Frame(picture, number, time)
        except Exception as error:                          # decoders raise all kinds of errors on damaged files
            self.broken = " ".join(str(error).split()) or type(error).__name__
        if number < 0:
            raise BadImage(self.path, self.broken or "it has no frames")
        if not self.broken and time < 0.9 * self.seconds - 1:
            self.broken = f"it ends after {time:.1f} of {self.seconds:.1f} seconds"


def open_clip(path: Path) -> Clip | None:
    """The moving picture of a file, None for a still one. Raises BadImage; UserError where a video needs a package."""
    if path.suffix.lower() not in VIDEOS:
        try:
            with open_picture(path) as image:
                if getattr(image, "n_frames", 1) == 1:
                    return None
                clip = Clip(path, total=image.n_frames, loop=image.info.get("loop"), video=False)
                clip.frames = _animation(clip)
                return clip
        except Image.UnidentifiedImageError:
            if not _is_video(path):
                return None                                 # load_image will say what is wrong
        except Exception:
            return None
    if not path.is_file():
        raise BadImage(path, "there is no such file")
    if av:
        return _open_av(path)
    if shutil.which("ffmpeg") and shutil.which("ffprobe"):
        return _open_ffmpeg(path)
    raise UserError(f"{path}: to read videos, install PyAV (pip install av) or the program ffmpeg")


# ---------------------------------------------------------------- what a command is given

class Source(NamedTuple):
    path: Path
    name: str                           # in results: the file's name, or its path where several share a stem
    target: str                         # what is drawn is called so, with another ending; unlike any other
    folder: Path | None = None          # in which it was found


class Shot(NamedTuple):
    """One picture to look at, or, with `error`, one that cannot be read."""
    source: Source
    clip: Clip | None = None            # None: a still
    frame: Frame | None = None
    around: tuple[Image.Image, ...] = ()            # previous, this, next
    error: BadImage | None = None


def in_groups(items: Iterator[Shot], size: int) -> Iterator[list[Shot]]:
    while group := list(islice(items, size)):
        yield group


def find_pictures(paths: list[str]) -> list[Source]:
    """Files, and the pictures and videos of folders in the order of their names, in which 9 comes before 10.

    Raises UserError if there are none.
    """
    def by_number(path: Path) -> list:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    found: dict[Path, Path | None] = {}                 # a file and its folder may both be given
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is no picture or folder {path}")
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.suffix.lower() in PICTURES | VIDEOS]
            found |= dict.fromkeys(sorted(inside, key=by_number), path)
        else:
            found.setdefault(path)
    if not found:
        raise UserError(f"no pictures in {', '.join(paths)}: looked for {', '.join(sorted(PICTURES | VIDEOS))}")
    stems, targets, sources = Counter(path.stem.lower() for path in found), set(), []
    for path, folder in found.items():
        alone = stems[path.stem.lower()] == 1
        target = path.stem if alone else re.sub(r"\W+", "_", path.as_posix()).strip("_")
        numbered = (target if i == 1 else f"{target}_{i}" for i in count(1))
        target = next(one for one in numbered if one.lower() not in targets)
        targets.add(target.lower())
        sources.append(Source(path, path.name if alone else path.as_posix(), target, folder))
    return sources


def shots(sources: list[Source]) -> Iterator[Shot]:
    """Every picture of every source, with those beside it in its clip, or among the stills of its folder; at the ends,
    and where one is damaged or of another size, the picture itself takes its place."""
    before = shot = None
    for after in chain(_alone(sources), [None]):
        if shot and shot.frame:
            around = (near.frame.picture if _beside(near, shot) else shot.frame.picture for near in (before, shot, after))
            shot = shot._replace(around=tuple(around))
        if shot:
            yield shot
        before, shot = shot, after


def _alone(sources: list[Source]) -> Iterator[Shot]:
    """The shots, with nothing around them."""
    @lru_cache
    def white(folder: Path | None) -> float | None:
        return white_of([source.path for source in sources if source.folder == folder]) if folder else None

    for source in sources:
        try:
            clip = open_clip(source.path)
            for frame in clip or [Frame(load_image(source.path, white=white(source.folder)), 0, 0.0)]:
                yield Shot(source, clip, frame)
        except BadImage as error:
            yield Shot(source, error=error)


def _beside(near: Shot | None, shot: Shot) -> bool:
    """Whether one may stand beside the other: of one size, and of one clip or stills of one folder."""
    if not near or not near.frame or near.clip is not shot.clip or near.frame.picture.size != shot.frame.picture.size:
        return False
    return shot.clip is not None or shot.source.folder is not None and near.source.folder == shot.source.folder


# ---------------------------------------------------------------- reading

def _is_video(path: Path) -> bool:
    """By its first bytes: MP4 and QuickTime, Matroska and WebM, AVI."""
    with open(path, "rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" or head[:4] == b"\x1a\x45\xdf\xa3" or head[:4] + head[8:] == b"RIFFAVI "


def _animation(clip: Clip) -> Iterator[tuple[Image.Image, float]]:
    """GIF, WebP, PNG, or the pages of a TIFF, by Pillow."""
    time = 0.0
    with Image.open(clip.path) as image:
        first = int(bool(image.info.get("default_image")))              # of a PNG: not a part of the animation
        white = white_of([clip.path])
        for i in range(first, image.n_frames):
            image.seek(i)
            image.load()                                                # WebP knows the frame's time only then
            clip.last = (image.info.get("duration") or 1000 * STILL) / 1000
            yield load_image(image.copy(), white=white), time
            time += clip.last


def _open_av(path: Path) -> Clip:
    options = dict(format_whitelist=CONTAINERS, protocol_whitelist="file")
    try:
        container = av.open(f"file:{path}", container_options=options)
    except Exception as error:
        raise BadImage(path, getattr(error, "strerror", None) or str(error) or type(error).__name__) from None
    if not container.streams.video:
        container.close()
        raise BadImage(path, "it holds no video")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    fps, sound = float(stream.average_rate or stream.guessed_rate or 0), bool(container.streams.audio)
    seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    count = stream.frames or round(seconds * fps)
    wide = float(stream.sample_aspect_ratio or 1)

    def frames() -> Iterator[tuple[Image.Image, float]]:
        start, last = None, 0.0
        with container:
            for frame in container.decode(stream):
                last = frame.time if frame.time is not None else last + 1 / (fps or 25)
                start = last if start is None else start
                picture = frame.to_image(width=round(frame.width * wide)) if wide != 1 else frame.to_image()
                yield picture.rotate(frame.rotation, expand=True) if frame.rotation else picture, last - start
    return Clip(path, frames(), count, fps, seconds, sound)


def _open_ffmpeg(path: Path) -> Clip:
    safe = ["-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS, "-i", f"file:{path}"]
    what = "format=duration:stream=codec_type,avg_frame_rate:packet=pts_time,stream_index"
    asked = subprocess.run(["ffprobe", "-v", "error", "-of", "json", "-show_entries", what, *safe], capture_output=True)
    found = json.loads(asked.stdout or "{}")
    kinds = [stream["codec_type"] for stream in found.get("streams", ())]
    if "video" not in kinds:
        said = asked.stderr.decode(errors="replace").strip()
        raise BadImage(path, said.rsplit(": ", 1)[-1].splitlines()[-1] if said and not kinds else "it holds no video")
    stream = found["streams"][kinds.index("video")]
    times = sorted(float(packet["pts_time"]) for packet in found.get("packets", ())
                   if packet["stream_index"] == kinds.index("video") and "pts_time" in packet)
    above, below = map(int, stream["avg_frame_rate"].split("/"))
    fps = above / below if above and below else 25.0
    grid = 1 / min((b - a for a, b in pairwise(times) if b > a), default=1 / fps)
    command = ["ffmpeg", "-nostdin", "-v", "error", *safe, "-map", "0:v:0", "-vf", "scale=round(iw*if(sar\\,sar\\,1)):ih",
               "-vsync", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-"]

    def frames() -> Iterator[tuple[Image.Image, float]]:
        number = 0
        with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as run:
            try:
                while picture := _read_ppm(run.stdout):
                    yield picture, times[number] - times[0] if number < len(times) else number / fps
                    number += 1
            finally:
                run.kill()
            if number < len(times):
                said.seek(0)
                words = said.read().decode(errors="replace").strip().splitlines()
                raise ValueError(words[-1] if words else f"it ends after {number} of {len(times)} frames")
    seconds = float(found.get("format", {}).get("duration", 0))
    return Clip(path, frames(), len(times), fps, seconds, "audio" in kinds, grid)


def _read_ppm(pipe) -> Image.Image | None:
    """The next picture in a pipe, None at its end."""
    if pipe.readline() != b"P6\n":
        return None
    size = tuple(map(int, pipe.readline().split()))
    pipe.readline()
    data = pipe.read(3 * size[0] * size[1])
    return Image.frombytes("RGB", size, data) if len(data) == 3 * size[0] * size[1] else None


# ---------------------------------------------------------------- writing

def save_pictures(pictures: list[Image.Image], target: Path) -> None:
    """One picture as target.png, several as target.gif, which runs for ever."""
    if len(pictures) == 1:
        with whole(target.with_name(target.name + ".png")) as part:
            return pictures[0].save(part, "PNG")
    with Writer(target.with_name(target.name + ".gif"), Clip(target, loop=0)) as out:
        for i, picture in enumerate(pictures):
            out.add(picture, STILL * i)


class Drawing(ExitStack):
    """The folder of drawn pictures: a still is a PNG, a clip a GIF or an mp4, and `together` all are in all.gif;
    and results.json, row by row. What is not whole when an error ends the work is taken away.
    """

    def __init__(self, out: Path, together: bool):
        super().__init__()
        self.out, self.clip, self.writer, self.count, self.comma = out, None, None, 0, ""
        part = self.enter_context(whole(out / "results.json"))
        self.rows = self.enter_context(open(part, "w", encoding="utf-8"))
        self.rows.write("[")
        self.callback(self.rows.write, "]")
        self.together = self.enter_context(Writer(out / "all.gif", Clip(out, loop=0))) if together else None
        self.of_clip = self.enter_context(ExitStack())

    def add(self, shot: Shot, picture: Image.Image, rows: list[dict]) -> None:
        """A picture and its rows, which are told the frame's number and time."""
        when = dict(frame=shot.frame.number, time=round(shot.frame.time, 6)) if shot.clip else {}
        for row in rows:
            self.rows.write(self.comma + json.dumps(row | when))
            self.comma = ",\n"
        if self.together:
            self.together.add(picture, STILL * self.count)
            self.count += 1
        if shot.clip is None:
            return save_pictures([picture], self.out / shot.source.target)
        if shot.clip is not self.clip:
            self.of_clip.close()
            self.clip = shot.clip
            self.of_clip.callback(_say_what_is_lost, shot.clip)
            ending = ".mp4" if shot.clip.video else ".gif"
            self.writer = self.of_clip.enter_context(Writer(self.out / f"{shot.source.target}{ending}", shot.clip))
        self.writer.add(picture, shot.frame.time)


def _say_what_is_lost(clip: Clip) -> None:
    notes = ["its sound is left out"] * clip.sound + [f"broken: {clip.broken}"] * bool(clip.broken)
    if notes:
        tqdm.write(f"{clip.path}: {'; '.join(notes)}")


class Writer(ExitStack):
    """Writes frames into `path`, .mp4 or .gif, at the times at which they stand in `clip`, of the first one's size.

    Each is written when the next one, or the end, says how long it is shown. Leaving by an error leaves no file.
    """

    def __init__(self, path: Path, clip: Clip):
        super().__init__()
        self.path, self.clip, self.sink = path, clip, None
        self.waiting: tuple[Image.Image, float] | None = None
        self.size, self.shown = (0, 0), 1 / clip.fps if clip.fps else STILL

    def add(self, picture: Image.Image, time: float) -> None:
        """time: seconds; not before that of the last one."""
        if self.sink is None:
            kind = _Gif if self.path.suffix == ".gif" else _Av if av else _Ffmpeg
            scale = min(1.0, WIDEST / max(picture.size)) if kind is _Gif else 1.0
            even = 1 if kind is _Gif else 2                                         # H.264 halves its colours
            self.size = tuple(max(even, round(scale * side) // even * even) for side in picture.size)
            self.sink = kind(self.enter_context(whole(self.path)), self.size, self.clip)
            self.push(self._end)
        if self.waiting:
            self.shown = max(0.0, time - self.waiting[1])
            self.sink.write(*self.waiting, self.shown)
        self.waiting = picture if picture.size == self.size else ImageOps.pad(picture, self.size), time

    def _end(self, kind: type | None, *error) -> None:
        if kind is None:
            self.sink.write(*self.waiting, self.clip.last or self.shown)
        self.sink.close()


class _Gif:
    def __init__(self, path: Path, size: tuple[int, int], clip: Clip):
        self.path, self.loop, self.pictures, self.shown = path, clip.loop, [], []

    def write(self, picture: Image.Image, time: float, shown: float) -> None:
        self.pictures.append(picture.convert("RGB").quantize(256))
        self.shown.append(max(20, round(100 * shown) * 10))             # milliseconds, which GIF counts in tens

    def close(self) -> None:
        loop = {} if self.loop is None else dict(loop=self.loop)
        self.pictures[0].save(self.path, "GIF", save_all=True, append_images=self.pictures[1:], duration=self.shown, **loop)


class _Av:
    def __init__(self, path: Path, size: tuple[int, int], clip: Clip):
        self.file = av.open(f"file:{path}", "w", format="mp4")
        self.stream = self.file.add_stream("libx264", rate=Fraction(clip.fps or 1 / STILL).limit_denominator(1001))
        self.stream.width, self.stream.height, self.stream.pix_fmt = *size, "yuv420p"
        self.stream.time_base = self.stream.codec_context.time_base = Fraction(1, TICKS)
        self.stream.codec_context.max_b_frames = 0                      # so that packets come in order
        self.shown: dict[int, int] = {}

    def write(self, picture: Image.Image, time: float, shown: float) -> None:
        frame = av.VideoFrame.from_image(picture)
        frame.pts, frame.time_base = round(TICKS * time), Fraction(1, TICKS)
        self.shown[frame.pts] = round(TICKS * shown)
        self._mux(frame)

    def _mux(self, frame) -> None:
        for packet in self.stream.encode(frame):
            packet.duration = self.shown.pop(packet.pts, 0)
            self.file.mux(packet)

    def close(self) -> None:
        self._mux(None)
        self.file.close()


class _Ffmpeg:
    """Frames in a fixed grid: one that is shown for longer is written several times."""

    def __init__(self, path: Path, size: tuple[int, int], clip: Clip):
        self.rate, self.written, self.said = min(clip.grid or 1 / STILL, FASTEST), 0, tempfile.TemporaryFile()
        width, height = map(str, size)
        self.run = subprocess.Popen(
            ["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r",
             f"{self.rate:.6f}", "-i", "-", "-pix_fmt", "yuv420p", "-f", "mp4", f"file:{path}"],
            stdin=subprocess.PIPE, stderr=self.said)

    def write(self, picture: Image.Image, time: float, shown: float) -> None:
        until, data = round((time + shown) * self.rate), picture.convert("RGB").tobytes()
        for _ in range(max(0, until - self.written)):
            self.run.stdin.write(data)
            self.written += 1

    def close(self) -> None:
        self.run.stdin.close()
        if self.run.wait():
            self.said.seek(0)
            raise UserError(f"ffmpeg could not write the video: {self.said.read().decode(errors='replace').strip()}")
