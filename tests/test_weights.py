"""Fetching from a server that misbehaves, reading files that are not what they seem, strict loading."""
import argparse
import collections
import errno
import hashlib
import io
import json
import math
import os
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common import weights
from common.errors import UserError
from common.weights import RELEASES, fetch, load_checkpoint, load_strict, load_tensors, rename, save_checkpoint

NAME, FILE = "detrpose-n", "detrpose_hgnetv2_n.pth"


def torch_bytes(**content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers every path with `server.body`; `server.manners` has a word per request, the last for all others."""

    def do_GET(self):
        server = self.server
        server.seen.append((self.path, self.headers.get("Range")))
        manner = server.manners.pop(0) if len(server.manners) > 1 else server.manners[0]
        if manner.isdigit():
            return self.send_error(int(manner))
        first = 0
        wanted = self.headers.get("If-Range", server.version)             # a Range alone is served unconditionally
        if server.resumes and wanted == server.version and self.headers.get("Range"):
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        body = server.body[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Type", "text/html" if manner == "webpage" else "application/octet-stream")
        self.send_header("ETag", server.version)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(server.body) - 1}/{len(server.body)}")
        if manner != "silent":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if manner in ("breaks", "stalls") else body)
        if manner == "stalls":
            self.wfile.flush()
            server.closing.wait(10)

    def do_HEAD(self):
        self.send_response(200)
        if self.server.manners[0] != "silent":
            self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The mirror on the loopback address; its cache and the current folder are below tmp_path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.manners, server.seen = torch_bytes(model={"a": torch.arange(50_000)}), ["fine"], []
    server.resumes, server.version, server.closing = True, '"1"', threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("POSE_WEIGHTS_URL", server.url + "/mirror/")
    monkeypatch.setenv("POSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(weights, "PAUSE", 0.0)
    monkeypatch.chdir(tmp_path)
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())


def test_a_release_is_fetched_once_and_says_size_and_licence(server, tmp_path, capsys):
    path = fetch(NAME)
    assert path == tmp_path / "cache" / FILE and path.read_bytes() == server.body
    printed = capsys.readouterr()
    assert printed.out.count("Apache-2.0") == 1 and f"{len(server.body) / 1e6:.1f} MB" in printed.out
    assert "100%" in printed.err
    assert fetch(NAME) == path and server.seen == [("/mirror/" + FILE, None)]
    assert capsys.readouterr().out == ""
    assert torch.equal(load_tensors(path)["a"], torch.arange(50_000))


def test_a_release_of_several_files_is_a_folder_and_is_completed_if_one_is_missing(server, tmp_path):
    folder = fetch("sdpose-body")
    assert folder == tmp_path / "cache" / "sdpose-body" and len(server.seen) == 4
    assert files_below(folder) == sorted(weights.SDPOSE_FILES)
    (folder / "decoder/decoder.safetensors").unlink()
    assert fetch("sdpose-body") == folder
    assert server.seen[4:] == [("/mirror/sdpose-body/decoder/decoder.safetensors", None)]


def test_a_release_of_several_files_says_its_total_size_before_it_starts(server, tmp_path, capsys):
    fetch("sdpose-body")
    printed = capsys.readouterr().out
    assert printed.index(f"4 files to fetch into {tmp_path / 'cache'}, {4 * len(server.body) / 1e6:.1f} MB together") \
        < printed.index("fetching ")
    server.manners = ["silent"]
    fetch("sdpose-wholebody")
    assert "their sizes are not announced" in capsys.readouterr().out


def test_a_release_that_does_not_fit_on_the_disk_is_not_begun(server, monkeypatch):
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3 * len(server.body)))
    with pytest.raises(UserError, match="only .* fit into .*POSE_CACHE"):
        fetch("sdpose-body")
    assert server.seen == []


def test_a_broken_connection_is_taken_up_where_it_broke(server):
    server.manners = ["breaks", "503", "fine"]
    assert fetch(NAME).read_bytes() == server.body
    assert [start for _, start in server.seen] == [None] + [f"bytes={len(server.body) // 2}-"] * 2


def test_a_server_that_cannot_resume_is_read_from_the_start(server):
    server.manners, server.resumes = ["breaks", "fine"], False
    assert fetch(NAME).read_bytes() == server.body


def test_halves_of_two_versions_are_never_joined(server, monkeypatch):
    server.manners, old = ["breaks", "fine"], weights.copy

    def replaced_meanwhile(*args):
        try:
            old(*args)
        finally:
            server.version, server.body = '"2"', torch_bytes(model={"a": torch.zeros(50_000)})
    monkeypatch.setattr(weights, "copy", replaced_meanwhile)
    assert fetch(NAME).read_bytes() == server.body


def test_what_a_killed_process_left_of_a_file_goes_after_a_day(server, tmp_path):
    old, new = (tmp_path / "cache" / f"{FILE}.{name}.part" for name in ("a" * 32, "b" * 32))
    (tmp_path / "cache").mkdir()
    old.touch(), new.touch()
    os.utime(old, (0, 0))
    fetch(NAME)
    assert files_below(tmp_path) == [f"cache/{FILE}", f"cache/{new.name}"]


def test_a_length_that_is_not_announced_is_no_obstacle(server):
    server.manners = ["silent"]
    assert fetch(NAME).read_bytes() == server.body


@pytest.mark.parametrize("manner, reason, requests", [
    ("breaks", "the connection broke after", 3), ("stalls", "timed out", 3), ("503", "the server answers 503", 3),
    ("404", "the server answers 404", 1), ("webpage", "web page", 1)])
def test_a_failed_download_is_one_line_and_leaves_nothing(server, tmp_path, monkeypatch, manner, reason, requests):
    server.manners, server.resumes = [manner], False
    monkeypatch.setattr(weights, "TIMEOUT", 0.2)
    start = time.monotonic()
    with pytest.raises(UserError, match=reason) as error:
        fetch(NAME)
    assert time.monotonic() - start < 5                                    # the server would stall for 30 s
    line = str(error.value)
    assert "\n" not in line and f"{server.url}/mirror/{FILE}" in line and str(tmp_path / "cache" / FILE) in line
    assert len(server.seen) == requests and files_below(tmp_path) == []


@pytest.mark.parametrize("body, reason", [
    (b"<!DOCTYPE html><p>quota exceeded", "web page"), (b"", "empty"), (b"version https://git-lfs", "neither"),
    (torch_bytes(a=torch.ones(999))[:-100], "cut short")])
def test_a_complete_download_that_is_no_weights_is_refused(server, tmp_path, body, reason):
    server.body = body
    with pytest.raises(UserError, match=reason):
        fetch(NAME)
    assert files_below(tmp_path) == []


def test_without_a_network_one_line_says_the_address_and_the_place(server, tmp_path, monkeypatch):
    monkeypatch.setenv("POSE_WEIGHTS_URL", "http://127.0.0.1:1")           # nobody listens there
    with pytest.raises(UserError) as error:
        fetch(NAME)
    assert f"could not fetch http://127.0.0.1:1/{FILE}: " in str(error.value) and "\n" not in str(error.value)
    assert f"save it as {tmp_path / 'cache' / FILE}" in str(error.value) and files_below(tmp_path) == []


def test_a_proxy_of_the_environment_is_used(server, monkeypatch):
    monkeypatch.setenv("POSE_WEIGHTS_URL", "http://weights.invalid")
    monkeypatch.setenv("http_proxy", server.url)
    fetch(NAME)
    assert server.seen == [(f"http://weights.invalid/{FILE}", None)]


def test_a_name_that_holds_a_hash_is_compared_with_it(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not with the 0676ba61"):
        fetch("resnet50")
    assert files_below(tmp_path) == []
    right = f"net-{hashlib.sha256(server.body).hexdigest()[:8]}.pth"
    monkeypatch.setitem(RELEASES, "net", weights.one("MIT", "", right))
    assert fetch("net").read_bytes() == server.body


def test_many_fetching_at_once_all_end_well(server, tmp_path):
    paths, start = [], threading.Barrier(4)
    threads = [threading.Thread(target=lambda: (start.wait(), paths.append(fetch(NAME)))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert paths == [tmp_path / "cache" / FILE] * 4 and paths[0].read_bytes() == server.body
    assert files_below(tmp_path) == [f"cache/{FILE}"]


def test_ctrl_c_and_a_full_disk_leave_nothing_behind(server, tmp_path, monkeypatch):
    def stop(response):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weights, "read", stop)
        fetch(NAME)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="only 0.0 MB fit into"):
        patch.setattr(weights.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        fetch(NAME)
    monkeypatch.setattr(weights, "copy", lambda *args: os.write(-1, b""))   # an OSError while writing
    with pytest.raises(UserError, match="could not fetch"):
        fetch(NAME)
    assert files_below(tmp_path) == []


def test_a_read_only_cache_is_read_but_new_files_go_to_the_current_folder(server, tmp_path, monkeypatch, capsys):
    really = weights.writable
    monkeypatch.setattr(weights, "writable", lambda folder: "cache" not in str(folder) and really(folder))
    assert fetch(NAME) == Path("weights") / FILE and (tmp_path / "weights" / FILE).read_bytes() == server.body
    assert capsys.readouterr().out.count("cannot write to") == 1
    assert fetch(NAME) == Path("weights") / FILE and capsys.readouterr().out == ""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FILE).write_bytes(server.body)
    assert fetch(NAME) == tmp_path / "cache" / FILE and len(server.seen) == 1


def test_a_folder_that_cannot_be_made_or_written_is_not_writable(tmp_path):
    (tmp_path / "file").touch()
    assert not weights.writable(tmp_path / "file" / "cache")
    assert weights.writable(tmp_path / "new" / "cache") and files_below(tmp_path) == ["file"]
    if hasattr(os, "geteuid") and os.geteuid():                             # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        assert not weights.writable(tmp_path / "locked")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("POSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights.cache_folder() == tmp_path / "pose"
    monkeypatch.setenv("POSE_CACHE", str(tmp_path / "mine"))
    assert weights.cache_folder() == tmp_path / "mine"


def test_what_must_be_fetched_by_hand_names_page_and_place_and_is_found_there(tmp_path, monkeypatch):
    monkeypatch.delenv("POSE_WEIGHTS_URL", raising=False)
    monkeypatch.setenv("POSE_CACHE", str(tmp_path))
    place = tmp_path / "querypose-hrnet_w32.pth"
    with pytest.raises(UserError, match="drive.google.com") as error:
        fetch("querypose-hrnet_w32")
    assert str(place) in str(error.value)
    place.write_bytes(b"anything")
    assert fetch("querypose-hrnet_w32") == place


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(UserError, match="did you mean detrpose-l"):
        fetch("detrpose-ll")


def test_the_table_covers_the_papers_and_no_two_releases_share_a_file():
    files = [file for release in RELEASES.values() for file in release.files]
    assert len(files) == len(set(files))
    methods = {release.method for release in RELEASES.values()}
    assert methods == {"", "detrpose", "diffusionregpose", "querypose", "sdpose"}
    addresses = [address for release in RELEASES.values() for address in release.files.values()]
    assert all(address.startswith("https://") for address in addresses)
    assert sum("model_weights/detrpose_hgnetv2_" in address for address in addresses) == 10


# ---------------------------------------------------------------------- reading
ONE, TWO = {"w": torch.ones(2)}, {"w": torch.full((2,), 2.0)}


@pytest.mark.parametrize("saved", [
    {"ema": {"module": TWO, "updates": 7}, "model": ONE}, {"ema": TWO, "model": ONE}, {"model": TWO, "epoch": 3},
    {"model": {"module.w": TWO["w"]}, "ema_model": ONE}, {"state_dict": TWO}, TWO,
    {"module.w": TWO["w"], "epoch": 1}])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_best_tensors_of_a_file_are_chosen_and_module_is_taken_off(tmp_path, saved, zipped):
    torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    tensors = load_tensors(tmp_path / "a.pth")
    assert list(tensors) == ["w"] and torch.equal(tensors["w"], TWO["w"])


def test_safetensors_are_read_and_known_by_content(tmp_path):
    for name in ("a.safetensors", "a.pth"):
        save_file({"w": torch.ones(3, dtype=torch.bfloat16), "module.b": torch.zeros(())}, tmp_path / name)
        tensors = load_tensors(tmp_path / name)
        assert tensors["w"].dtype == torch.bfloat16 and tensors["b"].shape == ()


def test_tensors_beside_settings_objects_are_read_without_importing_the_classes(tmp_path, monkeypatch):
    """As DETRPose's training files: an OmegaConf object, which itself holds a class of the authors' code."""
    modules = {name: types.ModuleType(name) for name in ("omegaconf", "authors")}
    for name, module in modules.items():
        module.Config = type("Config", (), {"__module__": name})
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        settings = modules["omegaconf"].Config()
        settings.target, settings.more = modules["authors"].Config, argparse.Namespace(lr=0.1)
        torch.save({"model": TWO, "args": settings}, tmp_path / "a.pth")
    assert torch.equal(load_tensors(tmp_path / "a.pth")["w"], TWO["w"])
    assert "authors" not in sys.modules


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call, name", [
    ((os.mkdir, "ran"), "mkdir"), ((exec, "open('ran', 'w')"), "exec"), ((getattr, "", "upper"), "getattr")])
def test_a_file_that_wants_to_run_code_is_refused_and_nothing_runs(tmp_path, monkeypatch, call, name, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": TWO, "args": Hostile(*call)}, "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"more than tensors.*{name}") as error:
        load_tensors("evil.pth")
    assert "\n" not in str(error.value) and files_below(tmp_path) == ["evil.pth"] and not Path("ran").exists()


class Log(collections.OrderedDict):
    """A class of somebody's library; saved as one of a module that is not there, see `saved_as_foreign`."""


class History(list):
    pass


class Buffer:
    def __init__(self):
        self.values, self.tensor = np.ones(3), torch.ones(3)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("made", [Buffer, lambda: Log(a=1), lambda: History([1, 2]), lambda: collections.deque([1], 9)])
def test_objects_of_a_library_beside_the_tensors_are_left_out_and_named(tmp_path, monkeypatch, capsys, made, zipped):
    beside = made()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "theirs", types.SimpleNamespace(Log=Log, History=History, Buffer=Buffer))
        for kind in (Log, History, Buffer):
            patch.setattr(kind, "__module__", "theirs")
        torch.save({"state_dict": TWO, "hub": {"x": beside}}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_tensors(tmp_path / "a.pth")["w"], TWO["w"])
    name = "collections.deque" if type(beside) is collections.deque else f"theirs.{type(beside).__name__}"
    assert name in capsys.readouterr().out and "theirs" not in sys.modules


def test_a_whole_module_is_not_built(tmp_path):
    for zipped, reason in (True, "holds no tensors"), (False, "more than tensors.*torch.nn.Module"):
        torch.save({"model": nn.Linear(1, 1)}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=reason):
            load_tensors(tmp_path / "a.pth")


NET = {"backbone.w": torch.zeros(2), "head.w": torch.zeros(3), "head.b": torch.zeros(1)}


def named(prefix: str) -> dict:
    return {prefix + name: x for name, x in NET.items()}


@pytest.mark.parametrize("saved", [
    named("_orig_mod."), named("module._orig_mod."), named("model."), {"state_dict": named("model.")},
    {"state_dict": named("model.") | {"loss.w": torch.ones(1)}, "hyper_parameters": {"lr": 1.0}, "callbacks": {}},
    {"state_dict": named("ema_model.module.") | named("model.")}, {"model": {"state_dict": NET}, "epoch": 3},
    {"model_state_dict": named("net."), "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
    {"ema": {"module": named("module."), "updates": torch.ones(())}, "model": named("module.")}, {"weights": named("model.model.")},
    {"backbone._orig_mod.w": NET["backbone.w"], "head.w": NET["head.w"], "head.b": NET["head.b"]}])
def test_wrappers_of_training_scripts_are_taken_off(tmp_path, saved):
    torch.save(saved, tmp_path / "a.pth")
    assert {name: x.shape for name, x in load_tensors(tmp_path / "a.pth").items()} == {name: x.shape for name, x in NET.items()}


def test_which_of_several_tensors_are_taken_is_said(tmp_path, capsys):
    torch.save({"model": ONE, "ema": {"module": TWO}}, tmp_path / "a.pth")
    load_tensors(tmp_path / "a.pth")
    assert "of model, ema.module the tensors of ema.module are taken" in capsys.readouterr().out
    torch.save({"model": ONE, "epoch": 1}, tmp_path / "a.pth")
    load_tensors(tmp_path / "a.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("ending, write", [("safetensors", save_file), ("bin", torch.save)])
def test_parts_of_one_model_are_joined(tmp_path, ending, write):
    parts = [f"model-0000{n}-of-00002.{ending}" for n in (1, 2)]
    index = tmp_path / f"model.{ending}.index.json"
    write({"a": torch.ones(1)}, tmp_path / parts[0])
    write({"b": torch.ones(2)}, tmp_path / parts[1])
    index.write_text(json.dumps(dict(weight_map=dict(a=parts[0], b=parts[1]))))
    for name in (f"model.{ending}", index.name, parts[1]):
        assert {key: len(x) for key, x in load_tensors(tmp_path / name).items()} == dict(a=1, b=2)
    (tmp_path / parts[0]).unlink()
    with pytest.raises(UserError, match=f"1 of its 2 parts are not there, e.g. {parts[0]}"):
        load_tensors(index)
    for damaged in ("{", "[]", '{"weight_map": {"a": 5}}'):
        index.write_text(damaged)
        with pytest.raises(UserError, match="index .* is damaged"):
            load_tensors(index)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / index.name).write_text(json.dumps(dict(weight_map=dict(b=f"../{parts[1]}"))))
    with pytest.raises(UserError, match="not there"):               # no file of another folder is read
        load_tensors(tmp_path / "inside" / index.name)


def test_every_kind_of_bad_file_is_one_clear_line(tmp_path):
    torch.save(TWO, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(TWO, tmp_path / "new.safetensors")
    cases = {"cut.pth": (torch_bytes(model=TWO)[:-40], "cut short"), "empty.pth": (b"", "it is empty"),
             "page.pth": (b"\n <html>", "web page"), "photo.pth": (b"\xff\xd8\xff\xe0" * 9, "neither"),
             "cut_old.pth": ((tmp_path / "old.pth").read_bytes()[:-7], "cut short"),
             "cut.safetensors": ((tmp_path / "new.safetensors").read_bytes()[:-1], "cut short"),
             "numbers.pth": (torch_bytes(epoch=3, model={"lr": 0.1}), "holds no tensors")}
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .*{reason}") as error:
            load_tensors(tmp_path / name)
        assert "\n" not in str(error.value)
    for path, reason in ((tmp_path, "it is a folder"), (tmp_path / "absent.pth", "No such file")):
        with pytest.raises(UserError, match=reason):
            load_tensors(path)


# ---------------------------------------------------------------------- into a model
def test_rename_lets_the_first_pattern_win_and_refuses_collisions():
    table = [(r"^head\.(\d)\.", r"heads.\1."), (r"^head\.", "other."), ("old", "new")]
    renamed = rename({"head.0.w": 1, "head.w": 2, "x.old.old": 3, "y": 4}, table)
    assert renamed == {"heads.0.w": 1, "other.w": 2, "x.new.old": 3, "y": 4}
    with pytest.raises(UserError, match="two tensors .* called new"):
        rename({"new": 1, "old": 2}, table)


def test_strict_loading_fills_every_parameter_and_leaves_ignored_names_alone():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = {key: torch.full_like(value, 5) for key, value in model.state_dict().items()}
    ignored = {r"\.num_batches_tracked$": "not used", "^anchors$": "made anew"}
    load_strict(model, state | {"anchors": torch.ones(4)}, ignored)
    assert (model[0].weight == 5).all() and (model[1].running_var == 5).all() and model[1].num_batches_tracked == 0


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = nn.Linear(3, 2)
    for bad in math.nan, math.inf:
        with pytest.raises(UserError, match="1 not finite: bias"):
            load_strict(model, model.state_dict() | {"bias": torch.tensor([0, bad])}, {})


def test_strict_loading_names_five_offenders_of_each_kind_and_changes_nothing():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    state = {"weight": torch.zeros(2, 4), **{f"extra{i}": torch.zeros(i) for i in range(7)}}
    with pytest.raises(UserError) as error:
        load_strict(model, state, {})
    line = str(error.value)
    assert "7 not in the model: extra0 (0,), extra1 (1,)" in line and "extra4" in line and "extra5" not in line
    assert "1 not in the weights: bias (2,)" in line and "1 of another shape: weight (2, 4) for (2, 3)" in line
    assert "\n" not in line and torch.equal(model.weight, before)


# ---------------------------------------------------------------------- checkpoints of ours

@pytest.fixture
def old(tmp_path):
    """A file that was saved before, which nothing may spoil."""
    save_checkpoint(tmp_path / "last.pt", dict(step=1, model=torch.ones(5)))
    yield tmp_path / "last.pt"
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"], "no half file is left"


def full_disk(content, file):
    file.write(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where, name, fail", [
    ("torch", "save", full_disk), ("os", "replace", lambda *args: full_disk(0, io.BytesIO())),
    ("os", "fsync", lambda *args: full_disk(0, io.BytesIO()))])
def test_a_save_that_fails_keeps_the_old_file_and_says_so(old, monkeypatch, where, name, fail):
    monkeypatch.setattr({"os": os, "torch": torch}[where], name, fail)
    with pytest.raises(UserError, match=r"cannot save .*last.pt.*No space left.*before is intact"):
        save_checkpoint(old, dict(step=2))
    monkeypatch.undo()


def test_a_really_full_disk_keeps_the_old_file(old):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))              # as `ulimit -f`
    try:
        with pytest.raises(UserError, match="cannot save .*File too large.*intact"):
            save_checkpoint(old, dict(step=2, model=torch.ones(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_kill_in_the_middle_of_a_save_keeps_the_old_file(old, monkeypatch):
    def kill(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", kill)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(old, dict(step=2))
    monkeypatch.undo()


def test_what_is_no_checkpoint_of_ours_is_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = dict(method="m", preset="p", config={}, skeleton={}, model={"w": torch.ones(9)})
    torch.save(good, "good.pt")
    Path("cut.pt").write_bytes(Path("good.pt").read_bytes()[:-300])
    Path("empty.pt").touch()
    Path("text.pt").write_text("hello")
    torch.save(good | {"more": Hostile(os.mkdir, "ran")}, "hostile.pt")
    torch.save({"model": {}}, "foreign.pt")
    assert load_checkpoint(Path("good.pt"))["preset"] == "p"
    for name in ("cut", "empty", "text", "hostile", "foreign"):
        with pytest.raises(UserError, match=f"{name}.pt is no checkpoint of ours, or it is cut short"):
            load_checkpoint(Path(f"{name}.pt"))
    assert not Path("ran").exists()


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path):
    good = dict(method="m", preset="p", config={}, skeleton={}, model={"w": torch.randn(1000)})
    torch.save(good, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(good["model"]["w"].numpy().tobytes()[:16]) + 8] ^= 1
    (tmp_path / "b.pt").write_bytes(content)
    assert load_checkpoint(tmp_path / "a.pt")["preset"] == "p"
    with pytest.raises(UserError, match="b.pt is no checkpoint of ours, or it is cut short or damaged"):
        load_checkpoint(tmp_path / "b.pt")
