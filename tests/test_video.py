"""Moving pictures: frames, times and turns of real files by PyAV, by ffmpeg and by Pillow; what is written; what breaks."""
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import video
from common.errors import UserError
from common.records import BadImage
from common.video import Writer, find_pictures, open_clip, shots
from tests.helpers import SIZE, TIMES, encode, frame, required

av = required("av")


@pytest.fixture(params=["PyAV", "ffmpeg"])
def backend(request, monkeypatch) -> str:
    if request.param == "ffmpeg":
        if not (shutil.which("ffmpeg") and shutil.which("ffprobe")):
            pytest.skip("there is no program ffmpeg on this machine")
        monkeypatch.setattr(video, "av", None)
    return request.param


def grays(frames) -> list[int]:
    return [round(np.asarray(one.picture)[-8:].mean() / 40) for one in frames]


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".webm", ".mov"])
def test_frames_have_their_order_their_times_and_their_number(backend, tmp_path, ending):
    clip = open_clip(encode(tmp_path / f"clip{ending}"))
    frames = list(clip)
    assert grays(frames) == list(range(6)) and [one.number for one in frames] == list(range(6))
    assert [one.time for one in frames] == pytest.approx(TIMES, abs=2e-3)
    assert all(one.picture.size == SIZE and one.picture.mode == "RGB" for one in frames)
    assert not clip.broken and not clip.sound


def test_sound_is_noticed(backend, tmp_path):
    assert open_clip(encode(tmp_path / "clip.mp4", sound=True)).sound


def test_a_portrait_video_is_upright(backend, tmp_path):
    """A telephone stores its pictures lying, and how to turn them: x' = -y + 48, y' = x, in 16.16 and 2.30 bits."""
    path = encode(tmp_path / "clip.mp4")
    plain, turned = (struct.pack(">9i", *(round(x * unit) for x, unit in zip(matrix, 3 * (1 << 16, 1 << 16, 1 << 30))))
                     for matrix in ((1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 1, 0, -1, 0, 0, 48, 0, 1)))
    data = path.read_bytes()
    track = data.index(plain, data.index(b"tkhd"))
    path.write_bytes(data[:track] + turned + data[track + len(plain):])
    picture = next(iter(open_clip(path))).picture
    assert picture.size == SIZE[::-1]
    bright = np.asarray(picture.convert("L")) > 200
    assert bright[:8, -8:].all() and not bright[-8:].any() and not bright[:, :8].any()      # turned clockwise


@pytest.mark.parametrize("how, ending", [("PyAV", ".mp4"), ("ffmpeg", ".mp4"), ("PyAV", ".gif")])
def test_what_is_written_has_the_times_of_what_was_read(how, ending, tmp_path, monkeypatch):
    if how == "ffmpeg":
        if not shutil.which("ffmpeg"):
            pytest.skip("there is no program ffmpeg on this machine")
        monkeypatch.setattr(video, "av", None)
    clip = open_clip(encode(tmp_path / "clip.mp4"))
    with Writer(tmp_path / f"out{ending}", clip) as out:
        for one in clip:
            out.add(one.picture, one.time)
    monkeypatch.undo()
    again = list(open_clip(tmp_path / f"out{ending}"))
    shown = {gray: min(one.time for one, g in zip(again, grays(again)) if g == gray) for gray in range(6)}
    assert list(shown.values()) == pytest.approx(
        TIMES, abs=0.01 if ending == ".gif" else 0.021 if how == "ffmpeg" else 2e-3)          # half of its grid of 25
    assert {path.name for path in tmp_path.iterdir()} == {"clip.mp4", f"out{ending}"}


def test_odd_sizes_and_frames_of_another_size_can_be_written(backend, tmp_path):
    clip = open_clip(encode(tmp_path / "clip.mp4"))
    with Writer(tmp_path / "out.mp4", clip) as out:
        for i, size in enumerate([(33, 21), (33, 21), (50, 40)]):
            out.add(frame(i, size), 0.04 * i)
    assert {one.picture.size for one in open_clip(tmp_path / "out.mp4")} == {(32, 20)}


def test_an_error_while_writing_leaves_no_file(backend, tmp_path):
    clip = open_clip(encode(tmp_path / "clip.mp4"))
    with pytest.raises(ZeroDivisionError), Writer(tmp_path / "out.mp4", clip) as out:
        for one in clip:
            out.add(one.picture, one.time)
            1 / (one.number < 3)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def animation(path: Path, durations: list[int], **more) -> Path:
    pictures = [frame(i) for i in range(len(durations))]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, **more)
    return path


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_animations_of_pillow_give_all_their_frames_at_their_times(ending, tmp_path):
    durations = [100, 300, 50]
    more = dict(lossless=True) if ending == "webp" else {}
    path = tmp_path / f"a.{ending}"
    frames = list(open_clip(animation(path, durations, **({} if ending == "tiff" else dict(loop=0)), **more)))
    assert [round(np.asarray(one.picture)[-8:].mean() / 40) for one in frames] == [0, 1, 2]
    assert [one.time for one in frames] == pytest.approx([0, 0.125, 0.25] if ending == "tiff" else [0, 0.1, 0.4])


@pytest.mark.parametrize("loop", [0, 3, None])
def test_a_gif_keeps_its_durations_and_how_often_it_runs(loop, tmp_path):
    clip = open_clip(animation(tmp_path / "a.gif", [100, 300, 50], **({} if loop is None else dict(loop=loop))))
    with Writer(tmp_path / "b.gif", clip) as out:
        for one in clip:
            out.add(one.picture, one.time)
    again = open_clip(tmp_path / "b.gif")
    assert again.loop == loop and [one.time for one in again] == pytest.approx([0, 0.1, 0.4])
    assert again.last == pytest.approx(0.05)


def test_deep_pages_and_the_deep_pictures_of_a_folder_have_one_brightness(tmp_path):
    """1000 is the same gray beside 1000 as beside 4000, of which alone it would be white."""
    pages = [Image.fromarray(np.full((8, 8), 1000, np.uint16)) for _ in range(3)]
    pages[1].putpixel((0, 0), 4000)
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    for n, page in enumerate(pages):
        page.save(tmp_path / f"{n}.png")
    seen = [one.frame.picture.getpixel((4, 4)) for one in shots(find_pictures([str(tmp_path)]))]
    assert seen == [(62, 62, 62)] * 6


def test_a_gif_is_written_no_larger_than_it_has_to_be(tmp_path):
    clip = open_clip(animation(tmp_path / "a.gif", [100, 100]))
    with Writer(tmp_path / "b.gif", clip) as out:
        for i in range(2):
            out.add(frame(i, (2000, 1000)), 0.1 * i)
    assert Image.open(tmp_path / "b.gif").size == (640, 320)


def test_several_pictures_become_a_gif_with_every_frame_and_one_a_png(tmp_path):
    frames = [Image.new("RGB", (60, 40), (40 * i, 0, 200 - 40 * i)) for i in range(5)]
    video.save_pictures(frames + [Image.new("L", (30, 30), 255)], tmp_path / "a")
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (6, (60, 40), 120, 0)
        gif.seek(3)
        assert np.abs(np.asarray(gif.convert("RGB"))[20, 30].astype(int) - [120, 0, 80]).max() < 12
    (tmp_path / "elsewhere.png").write_bytes(b"mine")
    (tmp_path / "b.png").symlink_to(tmp_path / "elsewhere.png")
    video.save_pictures(frames[:1], tmp_path / "b")
    assert (tmp_path / "elsewhere.png").read_bytes() == b"mine" and Image.open(tmp_path / "b.png").size == (60, 40)


def test_neighbours_are_the_frames_beside_it_and_itself_at_the_ends(tmp_path, monkeypatch):
    pictures = [*map(frame, range(3)), frame(3, (9, 9))]
    monkeypatch.setattr(video, "open_clip", lambda path: video.Clip(path, iter([(one, 0.0) for one in pictures])))
    seen = [[next(i for i, one in enumerate(pictures) if one is picture) for picture in shot.around]
            for shot in shots([video.Source(tmp_path, "", "")])]
    assert seen == [[0, 0, 1], [0, 1, 2], [1, 2, 2], [3, 3, 3]]
    assert list(shots([])) == []


def test_still_pictures_are_no_clips(tmp_path):
    for ending in ("png", "jpg", "gif", "webp"):
        frame(1).save(tmp_path / f"a.{ending}")
        assert open_clip(tmp_path / f"a.{ending}") is None


@pytest.mark.parametrize("ending", [".mkv", ".webm"])
def test_a_video_cut_in_half_gives_what_is_there_and_says_so(backend, ending, tmp_path):
    path = encode(tmp_path / f"clip{ending}", times=[i / 25 for i in range(200)])
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])
    clip = open_clip(path)
    frames = list(clip)
    assert 10 < len(frames) < 190
    assert "of 8.0 seconds" in clip.broken


@pytest.mark.parametrize("content", ["half", "empty", "text", "playlist", "sound"])
def test_what_is_no_video_is_one_line(backend, content, tmp_path):
    path = tmp_path / "clip.mp4"
    if content == "half":                                   # its table of contents comes last
        whole = encode(tmp_path / "whole.mp4").read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
    elif content == "sound":
        with av.open(str(path), "w") as file:
            tone = file.add_stream("aac", rate=8000)
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            samples.sample_rate = 8000
            file.mux(tone.encode(samples))
            file.mux(tone.encode(None))
    else:
        encode(tmp_path / "other.mp4")
        path.write_text(dict(empty="", text="no video", playlist="#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n")[content])
    with pytest.raises(BadImage) as caught:
        list(open_clip(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_video_called_a_picture_is_read_all_the_same(backend, tmp_path):
    path = encode(tmp_path / "clip.mp4").rename(tmp_path / "clip.jpg")
    assert len(list(open_clip(path))) == 6


def test_without_any_decoder_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = encode(tmp_path / "clip.mp4")
    monkeypatch.setattr(video, "av", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="pip install av"):
        open_clip(path)


def test_frames_are_read_one_after_the_other(backend, tmp_path):
    """The first frame is there before the last one has been decoded, and leaving early ends the reading."""
    clip = open_clip(encode(tmp_path / "clip.mp4", times=[i / 25 for i in range(300)]))
    for one in clip:
        if one.number == 2:
            break
    assert one.time == pytest.approx(0.08, abs=2e-3)


# ---------------------------------------------------------------- what a command is given

def test_folders_come_in_the_order_of_their_numbers(tmp_path):
    for name in ("f10.png", "f9.png", "f1.jpg", "a.png", "2.png", "f9b1.png", "c.MP4", "notes.txt"):
        (tmp_path / name).touch()
    names = [source.path.name for source in find_pictures([str(tmp_path), str(tmp_path / "a.png")])]
    assert names == ["2.png", "a.png", "c.MP4", "f1.jpg", "f9.png", "f9b1.png", "f10.png"]


def test_no_two_pictures_are_drawn_into_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["set-1/x.png", "set_1/x.png", "set_1/X.jpg", "take#2.jpg", "y.mp4", "Y.png"]
    for file in files:
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    sources = find_pictures(files)
    assert len({source.target.lower() for source in sources}) == len({source.name for source in sources}) == len(files)
    assert sources[3].name == "take#2.jpg" and sources[3].target == "take#2"


def values(around) -> list[int]:
    return [picture.getpixel((0, 0))[0] for picture in around]


def test_a_frame_of_a_folder_has_those_beside_it_around_it_and_a_photo_has_itself(tmp_path):
    for n in range(6):
        Image.new("RGB", (10, 10) if n < 3 else (11, 10), (50 * n,) * 3).save(tmp_path / f"{n}.png")
    (tmp_path / "4.png").write_bytes(b"no picture")
    found = list(shots(find_pictures([str(tmp_path)])))
    assert [values(shot.around) for shot in found] == [
        [0, 0, 50], [0, 50, 100], [50, 100, 100], [150, 150, 150], [], [250, 250, 250]]
    assert isinstance(found[4].error, BadImage) and found[4].frame is None
    alone = shots(find_pictures([str(tmp_path / "1.png"), str(tmp_path / "2.png")]))
    assert [values(shot.around) for shot in alone] == [[50, 50, 50], [100, 100, 100]]


def test_clips_and_stills_of_a_folder_keep_apart(tmp_path):
    gif = [Image.new("RGB", (10, 10), (value,) * 3) for value in (10, 20, 30)]
    gif[0].save(tmp_path / "b.gif", save_all=True, append_images=gif[1:])
    for name in "ac":
        gif[2].save(tmp_path / f"{name}.png")
    (tmp_path / "d.mp4").write_bytes(b"no video")
    found = list(shots(find_pictures([str(tmp_path)])))
    assert [values(shot.around) for shot in found[1:4]] == [[10, 10, 20], [10, 20, 30], [20, 30, 30]]
    assert [shot.frame and shot.frame.number for shot in found] == [0, 0, 1, 2, 0, None]
