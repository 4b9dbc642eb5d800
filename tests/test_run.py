"""Exact resume, stops, averages, run folders, several processes: what every training loop stands on."""
import errno
import importlib
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import detrpose
from common import run
from common.cli import parse, run_main
from common.errors import UserError
from common.heatmaps import people_heatmap_loss
from common.predict import collate
from common.ranks import STOP_SIGNALS, Ranks, distribute, epoch_batches, init_ranks, mean_over_ranks, rank_zero_first, seed_all
from common.records import People
from common.run import Ema, RunFolder, Stopper
from common.splits import open_dataset
from common.weights import load_checkpoint, save_checkpoint
from tests import torture
from tests.helpers import TINY, assert_equal


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No pictures (they take longer than the training), and the signal handlers of before."""
    monkeypatch.setattr(RunFolder, "draw", lambda *args: None)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def last_line(capsys, call) -> str:
    """The single line with which `call` ends under run_main, exit code 2."""
    with pytest.raises(SystemExit) as end:
        run_main(call)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1
    return lines[0]


def rank(i: int, world: int) -> Ranks:
    return Ranks(i, world, torch.device("cpu"))


def test_the_average_follows_its_formula_and_copies_what_is_no_fraction():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = Ema(model, decay=0.9, warmup=5)
    expected, history = ema.module[0].weight.clone(), []
    for n in range(1, 8):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].running_mean.fill_(n)
        model[1].num_batches_tracked.fill_(10 * n)
        ema.update(model)
        d = 0.9 * (1 - math.exp(-n / 5))
        expected = d * expected + (1 - d) * model[0].weight
        history.append(ema.module[1].running_mean[0].item())
    torch.testing.assert_close(ema.module[0].weight, expected)
    assert ema.module[1].num_batches_tracked == 70 and ema.updates == 7
    assert history == sorted(history) and 4 < history[-1] < 7               # lags behind, buffers too
    assert not any(p.requires_grad for p in ema.parameters()) and not ema.module.training


# ------------------------------------------------------------------------------------------ training runs

FLAGS = [*TINY, "--train", "--epochs", "2", "--batch", "4", "--accum", "2", "--device", "cpu"]     # 2 x 5 steps


def train(data: Path, out: Path, *flags: str) -> dict:
    """Train in this process; the content of last.pt."""
    words = flags if "--resume" in flags else (*FLAGS, "--data", str(data), "--out", str(out), *flags)
    detrpose.train(*parse(detrpose.Config, detrpose.PRESETS, "", list(words)))
    return torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole_run(puppets_folder, tmp_path_factory) -> Path:
    """The folder of a run that was never cut."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw", lambda *args: None)
        train(puppets_folder, folder)
    return folder


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(type(key) in (str, int) and plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return isinstance(value, torch.Tensor) or value is None or type(value) in (str, int, float, bool)


SAME = ("model", "ema", "optimizer", "epoch", "step", "best", "rows")        # of a resumed and an uninterrupted run


class Killed(BaseException):
    """As SIGKILL: nothing gets a chance to save or to close."""


def cut(monkeypatch, how: str):
    """Let the next run end early, in its 4th step of 5 (after a save in the 2nd), or in or after the first evaluation."""
    losses, evaluate, save, calls = detrpose.criterion, detrpose.evaluate, RunFolder.save, []

    def step(*args):
        calls.append(0)
        if len(calls) == 7 and how.startswith("SIG"):
            signal.raise_signal(getattr(signal, how))
        if len(calls) == 7 and how == "kill in a step":
            raise Killed
        return losses(*args)

    def evaluation(*args):
        if how == "kill while evaluating":
            raise Killed
        return evaluate(*args)

    def saving(self, name, **content):
        if content["epoch"] == {"kill after evaluating": 1, "kill at the very end": 2}.get(how):
            raise Killed
        save(self, name, **content)

    monkeypatch.setattr(detrpose, "criterion", step)
    monkeypatch.setattr(detrpose, "evaluate", evaluation)
    monkeypatch.setattr(RunFolder, "save", saving)
    monkeypatch.setattr(RunFolder, "save_is_due", lambda self: len(calls) == 4)


@pytest.mark.parametrize("how, step, workers", [
    ("SIGTERM", 4, "1"), ("kill in a step", 2, "1"), ("kill while evaluating", 5, "0"), ("kill after evaluating", 5, "0"),
    ("kill at the very end", 10, "0")])
def test_a_run_that_is_cut_and_resumed_ends_with_the_same_bits(
        how, step, workers, puppets_folder, whole_run, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, how)
        try:
            train(puppets_folder, tmp_path / "run", "--workers", workers)
            assert how == "SIGTERM" and f"go on with --resume {tmp_path / 'run'}" in capsys.readouterr().out
        except Killed:
            with open(tmp_path / "run" / "log.jsonl", "a") as log:
                log.write('{"step": 6, "loss')                              # a line that the kill cut in half
    before = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert before["step"] == step and plain(before)
    after = train(puppets_folder, tmp_path / "run", "--resume", str(tmp_path / "run"))
    expected = torch.load(whole_run / "last.pt", weights_only=True)
    assert after["step"] == 10
    assert_equal({part: after[part] for part in SAME}, {part: expected[part] for part in SAME})
    rows = rows_of(whole_run)
    assert_equal(rows_of(tmp_path / "run"), rows)
    assert sum("AP" in row for row in rows) == 2 and after["rows"][-1]["step"] == 10


def test_a_short_run_says_what_it_does_logs_each_epoch_and_cuts_its_warmup(puppets_folder, tmp_path, capsys):
    train(puppets_folder, tmp_path / "run", "--warmup", "60")
    out = capsys.readouterr().out
    for said in ("training on the CPU: ", " M parameters that learn, 23 images", "10 of 10 steps to go",
                 "the warm-up of 60 steps is cut to 2", " to go at ", "finished in ", "best AP 0.", "curves.png",
                 f"next: python eval.py {tmp_path / 'run'} --images {puppets_folder}"):
        assert said in out, said
    rows = [row for row in rows_of(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == [5, 10] and 0 < rows[0]["seconds"] < rows[1]["seconds"]
    assert all(0.05 < row["memory"] < 50 and row["images_a_second"] > 0 for row in rows)
    assert rows[0]["lr"] == pytest.approx(1e-3 * (0.5 + 0.5 * math.cos(math.pi * 4 / 10)))       # the warm-up is over
    assert load_checkpoint(tmp_path / "run" / "last.pt")["config"]["warmup"] == 60               # as it was asked for
    train(puppets_folder, tmp_path / "run", "--resume", str(tmp_path / "run"), "--epochs", "3")
    out, later = capsys.readouterr().out, rows_of(tmp_path / "run")
    assert "going on at epoch 3, step 10; changed: epochs 2 → 3" in out and "5 of 15 steps to go" in out
    assert later[-2]["seconds"] > rows[1]["seconds"]
    assert train(puppets_folder, tmp_path / "run", "--resume", str(tmp_path / "run"), "--epochs", "1")["epoch"] == 3
    assert "all 3 epochs are done; --epochs 4 would go on" in capsys.readouterr().out


@pytest.mark.parametrize("method", torture.FLAGS)
def test_the_first_batch_is_shown_as_the_network_sees_it_with_its_labels(method, puppets_folder, tmp_path, monkeypatch):
    def end(images, people, skeleton):
        shown.append((images, people))
        raise Killed

    shown, module = [], importlib.import_module(method)
    monkeypatch.setattr(run.draw, "draw_batch", end)
    words = ["--train", "--epochs", "1", "--workers", "0", "--processes", "1", "--device", "cpu", *torture.FLAGS[method].split()]
    words += ["--data", str(puppets_folder), "--out", str(tmp_path / "run")]
    with pytest.raises(Killed):
        module.train(*parse(module.Config, module.PRESETS, "", words))
    images, people = shown[0]
    assert images.ndim == 4 and images.shape[1] == 3 and len(images) == len(people) in (4, 8)
    assert -0.01 < images.min() < 0.3 and 0.6 < images.max() < 1.01 and images.std() > 0.05
    labels = np.concatenate(people).reshape(-1, 3)
    xy = labels[labels[:, 2] > 0, :2] / images.shape[:1:-1]
    assert len(xy) > 20 and (xy > -0.2).all() and (xy < 1.2).all() and np.ptp(xy, axis=0).min() > 0.3


@pytest.mark.parametrize("batch", [4, 8, 2, 3])
def test_a_run_goes_on_with_another_batch_at_the_picture_where_it_was(puppets_folder, tmp_path, capsys, batch):
    """Stopped after 4 steps of 4 images: images seen, learning rate and the rest of the epoch are as if they were counted anew."""
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, "SIGTERM")
        train(puppets_folder, tmp_path / "run", "--workers", "0")
    count, seen, at = len(open_dataset(str(puppets_folder), "train").training()), [], []

    def look(cfg, epoch, step):
        at.append((epoch, step))
        return cfg.size

    class Seen(detrpose.TrainImages):
        def __getitem__(self, i):
            seen.append((self.epoch, i))
            return super().__getitem__(i)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detrpose, "input_side", look)
        patch.setattr(detrpose, "TrainImages", Seen)
        train(puppets_folder, tmp_path / "run", "--resume", str(tmp_path / "run"), "--batch", str(batch), "--accum", "1")
    an_epoch = count // batch
    order = np.random.default_rng([0, 0]).permutation(count)[16:an_epoch * batch]
    assert [i for epoch, i in seen if epoch == 0] == order[:len(order) // batch * batch].tolist()
    left = len(order) // batch
    assert [s for epoch, s in at] == list(range(an_epoch - left, 2 * an_epoch))
    said = capsys.readouterr().out
    assert "going on at epoch 1, step 4" in said and (f"batch 4 → {batch}" in said) == (batch != 4)


@pytest.fixture(scope="module")
def short_run(puppets_folder, tmp_path_factory):
    """The folder of a finished run of one epoch with one step; take a copy to change it."""
    folder = tmp_path_factory.mktemp("short") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "draw", lambda *args: None)
        train(puppets_folder, folder, "--epochs", "1", "--batch", "22")
    return folder


def resume_line(capsys, data: Path, folder: Path, *flags: str) -> str:
    return last_line(capsys, lambda: train(data, folder, "--resume", *flags))


def test_a_checkpoint_that_does_not_fit_is_one_line_and_stays_what_it_was(short_run, puppets_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(short_run, tmp_path / "run"))
    last, saved = folder / "last.pt", torch.load(folder / "last.pt", weights_only=True)
    before, run = last.read_bytes(), str(folder)
    assert "its model differs" in resume_line(capsys, puppets_folder, folder, run, "--dim", "64")
    assert "leave --preset out" in resume_line(capsys, puppets_folder, folder, run, "--preset", "n")
    line = resume_line(capsys, puppets_folder, folder, str(folder / "best.pt"))
    assert "optimizer" in line and "last.pt is to go on from" in line
    assert last.read_bytes() == before
    torch.save(saved | {"method": "querypose"}, last)
    assert "go on with python querypose.py" in resume_line(capsys, puppets_folder, folder, run)
    torch.save(saved | {"config": saved["config"] | {"layer": 1}}, last)
    assert "another version of detrpose.py: this one has no option layer" in resume_line(capsys, puppets_folder, folder, run)
    last.write_bytes(before[:-1000])
    assert "cut short or damaged" in resume_line(capsys, puppets_folder, folder, run)


def test_a_finished_run_says_so_and_goes_on_with_more_epochs_and_another_learning_rate(
        short_run, puppets_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(short_run, tmp_path / "run"))
    assert train(puppets_folder, folder, "--resume", str(folder))["step"] == 1
    assert "all 1 epochs are done" in capsys.readouterr().out
    flags = "--epochs", "2", "--lr", "0.5", "--weight_decay", "0.25"
    more = train(puppets_folder, folder, "--resume", str(folder), *flags)
    said = capsys.readouterr().out
    assert "lr 0.001 → 0.5, weight_decay 0.0001 → 0.25 (lr_backbone stays 0.001)\n" in said
    assert more["step"] == 2 and more["config"]["lr"] == 0.5
    assert [group["initial_lr"] for group in more["optimizer"]["param_groups"]] == [1e-3, 0.5]
    assert {group["weight_decay"] for group in more["optimizer"]["param_groups"]} == {0.25}
    assert [row["step"] for row in rows_of(folder)] == [1, 1, 2, 2]          # a row of losses, one of metrics
    train(puppets_folder, folder, "--resume", str(folder), "--lr_backbone", "0.1")
    assert "changed: lr_backbone 0.001 → 0.1\n" in capsys.readouterr().out


def test_a_folder_with_another_run_is_never_written_over(short_run, puppets_folder, tmp_path, capsys):
    before = (short_run / "last.pt").read_bytes()
    assert "holds another run" in last_line(capsys, lambda: train(puppets_folder, short_run))
    other = Path(shutil.copytree(short_run, tmp_path / "other"))
    flags = str(other), "--out", str(short_run), "--epochs", "2"
    assert "holds another run" in resume_line(capsys, puppets_folder, other, *flags)
    (tmp_path / "file").touch()
    assert "cannot make the folder" in last_line(capsys, lambda: train(puppets_folder, tmp_path / "file"))
    assert (short_run / "last.pt").read_bytes() == before


def test_a_full_disk_is_a_warning_during_the_run_and_an_error_at_its_end(puppets_folder, tmp_path, capsys, monkeypatch):
    flags, saves = ("--epochs", "2", "--batch", "22"), []

    def save(path, content):
        saves.append(path.name)
        if len(saves) > 1:                                                  # the disk fills up after the first save
            raise UserError(f"cannot save {path}")
        real(path, content)

    real = save_checkpoint
    monkeypatch.setattr(run, "save_checkpoint", save)
    with pytest.raises(SystemExit) as end:
        run_main(lambda: train(puppets_folder, tmp_path / "run", *flags))
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.err.count("warning: ") == len(saves) - 2 >= 3 and "epoch 2" in captured.out
    monkeypatch.undo()
    monkeypatch.setattr(RunFolder, "draw", lambda *args: None)
    assert train(puppets_folder, tmp_path / "run", "--resume", str(tmp_path / "run"))["step"] == 2


def test_best_weights_that_found_no_room_are_written_as_soon_as_there_is_some(puppets_folder, tmp_path, monkeypatch):
    def save(path, content):
        saves.append(path.name)
        if saves.count("best.pt") == 1 and path.name == "best.pt":
            raise UserError(f"cannot save {path}")
        save_checkpoint(path, content)

    saves = []
    monkeypatch.setattr(run, "save_checkpoint", save)
    last = train(puppets_folder, tmp_path / "run", "--batch", "22")         # AP is 0 in both epochs
    assert saves.count("best.pt") == 2 and last["best"] == load_checkpoint(tmp_path / "run" / "best.pt")["best"]


def folder_of(tmp_path, name="run", **changes) -> RunFolder:
    args = SimpleNamespace(preset="tiny", out=str(tmp_path / name) if name else "", resume="", saved=None)
    return RunFolder("detrpose", detrpose.PRESETS["tiny"], args, rank(0, 1))


def test_a_log_that_cannot_be_written_does_not_end_the_run_and_is_whole_afterwards(tmp_path, capsys):
    folder = folder_of(tmp_path)
    folder.log(step=1, loss=2.0)
    shutil.rmtree(folder.path)
    folder.path.touch()                                                     # in the way of a folder
    folder.log(step=2, loss=1.0)
    assert "log.jsonl is not written" in capsys.readouterr().err
    folder.path.unlink()                                                    # there is room again
    folder.log(step=3, loss=0.5)
    rows = [json.loads(line) for line in (folder.path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] == [row["step"] for row in folder.rows]


def test_two_runs_that_start_in_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.time, "strftime", lambda form: "20260101-000000")
    paths = [folder_of(tmp_path, name="").path for _ in range(3)]
    assert [path.name for path in paths] == [f"detrpose-tiny-20260101-000000{end}" for end in ("", "-2", "-3")]


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "best.pt"])
def test_files_of_the_users_own_are_never_written_over(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(UserError, match="choose another --out"):
        folder_of(tmp_path)
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused_before_the_training(tmp_path, monkeypatch):
    def refuse(self, name, text, mode):
        raise PermissionError(errno.EACCES, "Permission denied", name)
    monkeypatch.setattr(RunFolder, "_write", refuse)                        # tests may run as root
    with pytest.raises(UserError, match="cannot write into .*run: .*Permission denied.*--out"):
        folder_of(tmp_path)


HOLD = """
import sys, time
from types import SimpleNamespace
import detrpose, torch
from common.ranks import Ranks
from common.run import RunFolder
args = SimpleNamespace(preset="tiny", out=sys.argv[1], resume="", saved=None)
folder = RunFolder("detrpose", detrpose.PRESETS["tiny"], args, Ranks(0, 1, torch.device("cpu")))
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_second_run_in_a_folder_is_refused_while_the_first_lives_and_taken_when_it_is_killed(tmp_path, monkeypatch):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True,
                              cwd=Path(__file__).parents[1])
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(RunFolder._lock, "__defaults__", (0.3,))
    with pytest.raises(UserError, match="another run writes into .*run now"):
        folder_of(tmp_path)
    holder.kill()
    holder.wait()
    assert folder_of(tmp_path).path == tmp_path / "run"


def test_people_come_from_a_loader_process_by_value_and_take_no_open_files():
    people = People(torch.rand(2, 17, 2), torch.ones(2, 17), torch.rand(2, 4), torch.rand(2), image_id="a")
    sent = multiprocessing.reduction.ForkingPickler.dumps(people)
    back = pickle.loads(sent)
    assert b"rebuild_storage" not in bytes(sent) and back.image_id == "a"
    assert_equal({name: x for name, x in vars(back).items()}, {name: x for name, x in vars(people).items()})


@pytest.mark.skipif(sys.platform != "linux", reason="finds loader processes in /proc")
def test_a_killed_loader_process_ends_the_run_with_its_line_and_what_was_saved_stays(puppets_folder, tmp_path):
    words = [*FLAGS, "--epochs", "500", "--workers", "2", "--data", str(puppets_folder), "--out", str(tmp_path / "run")]
    process = subprocess.Popen([sys.executable, "detrpose.py", *words], cwd=Path(__file__).parents[1], text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 120
    while not (tmp_path / "run" / "last.pt").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    victim = None
    while victim is None and time.monotonic() < end:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        victim = int(children[-1]) if children else None
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "error: a loader process was killed: was the memory full?" in errors
    assert "Traceback" not in errors and load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] >= 0


LOADER = """                                                                # two pieces of code around its start
import multiprocessing, os, sys
from common.ranks import start_loader
def work():
    exec(sys.argv[1]); start_loader(0); exec(sys.argv[2]); sys.stderr.flush()
process = multiprocessing.get_context("fork").Process(target=work)
process.start(); process.join(); sys.exit(process.exitcode)"""


@pytest.mark.parametrize("error", ["ConnectionResetError", "ValueError"])
def test_a_loader_process_says_nothing_about_the_connection_that_a_killed_training_broke(error):
    done = subprocess.run([sys.executable, "-c", LOADER, "pass", f"sys.excepthook({error}, {error}('x'), None)"],
                          cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ("" if error == "ConnectionResetError" else "ValueError: x\n")


def test_a_loader_process_that_starts_after_its_training_was_killed_ends():
    code = "os.getppid = lambda: 1", "print('goes on')"
    done = subprocess.run([sys.executable, "-c", LOADER, *code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr and not done.stdout


def test_a_connection_that_breaks_in_a_batch_is_said_as_the_loader_that_was_killed():
    code = "from common.cli import run_main\ndef main(): raise ConnectionResetError(104, 'x')\nrun_main(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: a loader process was killed: was the memory full?")


@pytest.mark.parametrize("what", ["loss_keypoints", "the gradient"])
def test_a_loss_that_is_not_finite_stops_with_its_name_and_the_images(what, puppets_folder, tmp_path, capsys, monkeypatch):
    losses, calls = detrpose.criterion, []

    def broken(*args):
        terms, calls[:] = losses(*args), [*calls, 0]
        if len(calls) == 14:                                                # in the second step of the second epoch
            bad = torch.tensor(math.nan)
            terms["loss_keypoints"] = (terms["loss_keypoints"] * bad if what == "loss_keypoints" else
                                       terms["loss_keypoints"] + (terms["loss_keypoints"].detach() * 0).sqrt() * 0
                                       + (terms["loss_keypoints"] - terms["loss_keypoints"]).sqrt())
        return terms

    monkeypatch.setattr(detrpose, "criterion", broken)
    line = last_line(capsys, lambda: train(puppets_folder, tmp_path))
    ids = {int(word) for word in line.split("images [")[1].split("]")[0].split(", ")}
    assert f"{what} not finite at step 6" in line and f"{tmp_path / 'last.pt'} is from before" in line and "--lr" in line
    assert len(ids) == 4 and ids <= set(open_dataset(str(puppets_folder), "train").ids.tolist())
    monkeypatch.undo()
    saved = load_checkpoint(tmp_path / "last.pt")
    assert saved["step"] == 5 and all(value.isfinite().all() for value in saved["model"].values())


# ------------------------------------------------------------------------------------------ data at the edges


def annotations(folder: Path, split: str, change) -> Path:
    """`change` an annotation file; the data folder."""
    file = folder / "annotations" / f"person_keypoints_{split}2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


def test_bad_pictures_among_good_ones_are_named_once_and_the_run_goes_on(puppets_folder, tmp_path, capsys):
    data = Path(shutil.copytree(puppets_folder, tmp_path / "data"))
    bad = [sorted((data / split).iterdir())[3] for split in ("train2017", "val2017")]
    bad[0].write_bytes(b"no picture")
    bad[1].write_bytes(bad[1].read_bytes()[:300])
    assert train(data, tmp_path / "run", "--batch", "22")["step"] == 2
    rows = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    named = [row["bad"] for row in rows if "bad" in row]
    assert len(named) == 2 and all(str(path) in text for path, text in zip(bad, named))
    out = capsys.readouterr().out
    assert f"bad file (1 so far): cannot read image {bad[0]}: this is not an image" in out and "(2 so far)" in out


def test_one_image_trains_and_evaluates(puppets_folder, tmp_path):
    data = Path(shutil.copytree(puppets_folder, tmp_path / "data"))
    for split in ("train", "val"):
        annotations(data, split, lambda content: content.update(images=content["images"][2:3]))
    flags = "--mosaic", "1", "--aug_from", "0"
    assert train(data, tmp_path / "run", *flags)["step"] == 2
    assert (tmp_path / "run" / "best.pt").exists()


def test_images_without_people_are_left_out_of_training_and_kept_in_evaluation(puppets_folder, tmp_path, capsys):
    data = Path(shutil.copytree(puppets_folder, tmp_path / "data"))

    def keep_people_of_three(content):
        ids = {image["id"] for image in content["images"][2:5]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    annotations(data, "train", keep_people_of_three)
    annotations(data, "val", lambda content: content["annotations"].clear())
    flags = "--batch", "3", "--accum", "1", "--epochs", "1"
    assert train(data, tmp_path / "run", *flags)["step"] == 1               # of 3 images
    assert (tmp_path / "run" / "best.pt").exists() and "n/a" in capsys.readouterr().out
    annotations(data, "train", lambda content: content["annotations"].clear())
    assert "nothing to train on" in last_line(capsys, lambda: train(data, tmp_path / "again"))


@pytest.mark.parametrize("flags", [[], ["--no-pose_denoising"], ["--no-ksvf", "--no-fdr", "--no-pose_lqe"]])
def test_a_batch_without_people_has_a_finite_loss_and_a_gradient_everywhere(flags):
    cfg, _ = parse(detrpose.Config, detrpose.PRESETS, "", [*TINY, *flags])
    model = detrpose.DETRPose(cfg, detrpose.get_skeleton("coco")).train()
    nobody = People(*(torch.zeros(0, *shape) for shape in ((17, 2), (17,), (4,), ())))
    total = total_loss(model, model, torch.rand(2, 3, 64, 64), [nobody, nobody])
    total.backward()
    assert total.isfinite() and total > 0
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


# ------------------------------------------------------------------------------------------ signals and processes


def test_one_ctrl_c_asks_and_a_second_one_is_immediate(terminal, monkeypatch):
    stop, clock = Stopper(), [100.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    assert not stop(rank(0, 1))
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)                  # torchrun hands on the same Ctrl-C that the terminal sends
    signal.raise_signal(signal.SIGTERM)
    assert stop(rank(0, 1))
    clock[0] += 2
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_run_is_asked_to_stop_by_ctrl_c_a_cluster_and_a_terminal_that_closes(terminal, number):
    stop = Stopper()
    signal.raise_signal(number)
    assert stop(rank(0, 1))


def total_loss(net: nn.Module, model: detrpose.DETRPose, images: torch.Tensor, people: list[People]) -> torch.Tensor:
    """What a step of the training goes back from; `net` is the model or distributes it."""
    result = net(images, people)
    losses = detrpose.criterion(result, people, model.sigmas, model.cfg, epoch=0)
    auxiliary = people_heatmap_loss(result["heatmaps"], people) if model.cfg.heatmap_weight else 0
    return sum(losses.values()) + result["unused"] + auxiliary


def one_step(data: str, ranks: Ranks) -> dict:
    """Gradients of a first step on 8 images and the evaluation, shared by the processes; norms are constants."""
    words = [*TINY, "--no-pose_denoising", "--frozen_norm", "--batch", "8", "--jitter", "0", "--data", data]
    cfg, _ = parse(detrpose.Config, detrpose.PRESETS, "", words)
    seed_all(0)
    model = detrpose.DETRPose(cfg, detrpose.get_skeleton("coco"))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)                # the outputs start at zero
    net = distribute(model.train(), ranks)
    [module.eval() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    images = detrpose.TrainImages(open_dataset(data, "train").training(), cfg, epoch=0)
    batch = epoch_batches(len(images), 8 // ranks.world, 1, 0, 0, ranks)[0]
    tensors, targets, *_ = collate([images[i] for i in batch])
    total_loss(net, model, tensors, targets).backward()
    table, predictions = detrpose.evaluate(model, open_dataset(data, "val"), cfg, ranks)
    return dict(gradients={name: p.grad for name, p in model.named_parameters()}, table=table, count=len(predictions),
                people={int(p.image_id): float(p.keypoints.sum()) for p in predictions})


def step_as_a_rank(data: str, out: str) -> None:
    ranks = init_ranks("cpu")
    result = one_step(data, ranks)
    if ranks.rank == 0:
        torch.save(result, f"{out}/step.pt")


def train_as_a_rank(data: str, out: str) -> None:
    """A run in which only the second process is asked to stop, in the 7th step; the same to its end; one never cut."""
    ranks = init_ranks("cpu")
    losses, calls = detrpose.criterion, []

    def step(*args):
        calls.append(0)
        if len(calls) == 7 and ranks.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return losses(*args)

    detrpose.criterion, RunFolder.draw = step, lambda *args: None
    words = [*FLAGS, "--accum", "1", "--data", data, "--out"]
    for part in [*words, f"{out}/cut"], ["--resume", f"{out}/cut"], [*words, f"{out}/whole"]:
        detrpose.train(*parse(detrpose.Config, detrpose.PRESETS, "", part))
        if ranks.rank == 0 and not Path(out, "stopped").exists():
            shutil.copytree(f"{out}/cut", f"{out}/stopped")
        torch.distributed.barrier()


def in_two_processes(*words: str) -> None:
    """`python detrpose.py --train --processes 2 ...`, as the tiny presets start by default."""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "detrpose.py", "--train", *words], cwd=root, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(sys.platform != "linux", reason="--processes is for Linux")
def test_a_resumed_run_of_two_processes_equals_one_that_was_never_cut(puppets_folder, tmp_path):
    words = [*FLAGS, "--processes", "2", "--schedule", "constant", "--warmup", "1", "--data", str(puppets_folder), "--out"]
    in_two_processes(*words, str(tmp_path / "whole"))
    in_two_processes(*words, str(tmp_path / "cut"), "--epochs", "1")
    in_two_processes("--resume", str(tmp_path / "cut"), "--epochs", "2")
    resumed, whole = (load_checkpoint(tmp_path / name / "last.pt") for name in ("cut", "whole"))
    assert resumed["step"] == 10
    assert_equal({part: resumed[part] for part in SAME}, {part: whole[part] for part in SAME})


def hang(config, args) -> None:
    """A step in which the second process never arrives, after a wait for rank 0 that is longer than the patience."""
    ranks = init_ranks("cpu", config)
    with rank_zero_first(ranks):
        time.sleep(6 * (ranks.rank == 0))
    print("both here", flush=True)
    time.sleep(600 * ranks.rank)
    mean_over_ranks(torch.ones(1))


@pytest.mark.skipif(sys.platform != "linux", reason="--processes is for Linux")
def test_a_process_that_hangs_in_a_step_ends_the_run_and_long_work_of_rank_zero_does_not():
    program = ("from types import SimpleNamespace; from tests.test_run import hang; from common.cli import launch, run_main\n"
               "config = SimpleNamespace(batch=2, accum=1, processes=2, patience=3)\n"
               "if __name__ == '__main__':\n"
               "    run_main(lambda: launch(hang, config, SimpleNamespace(device='cpu', resume='')))")
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True,
                          timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout.count("both here") == 2
    assert "a process did not answer for --patience seconds" in done.stderr and time.monotonic() - start < 120


def torchrun(function: str, data: Path, out: Path) -> str:
    """Call a function of this file in two processes; what they print."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
               "tests.test_run", function, str(data), str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


on_unix = pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs a torch with libuv there")


@on_unix
def test_two_processes_have_the_gradient_and_the_table_of_one(puppets_folder, tmp_path):
    torchrun("step_as_a_rank", puppets_folder, tmp_path)
    alone, both = one_step(str(puppets_folder), rank(0, 1)), torch.load(tmp_path / "step.pt", weights_only=True)
    largest = max(g.abs().max() for g in alone["gradients"].values())
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(both["gradients"][name], gradient, rtol=1e-3, atol=1e-6 * float(largest))
    assert both["table"] == alone["table"] and both["count"] == alone["count"] == 8
    assert both["people"] == pytest.approx(alone["people"], rel=1e-5)


@on_unix
@pytest.mark.slow
def test_two_nodes_of_a_process_each_give_the_bits_of_one_command_with_two_processes(puppets_folder, tmp_path):
    """Two torchruns, which meet at a port of this machine as they would at one of another."""
    root, words = Path(__file__).parents[1], [*FLAGS, "--data", str(puppets_folder), "--out"]
    in_two_processes(*words, str(tmp_path / "one"), "--processes", "2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                               f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}", "detrpose.py",
                               *words, str(tmp_path / "nodes")], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"})
             for node in range(2)]
    assert [node.wait(300) for node in nodes] == [0, 0]
    one, two = (load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "nodes"))
    assert_equal({part: two[part] for part in SAME}, {part: one[part] for part in SAME})


@on_unix
@pytest.mark.slow
def test_two_processes_stop_together_name_what_either_skipped_and_resume_exactly(puppets_folder, tmp_path):
    data = Path(shutil.copytree(puppets_folder, tmp_path / "data"))
    spoiled = sorted((data / "train2017").iterdir())[4:8]
    [path.write_bytes(b"") for path in spoiled]
    out = torchrun("train_as_a_rank", data, tmp_path)
    names = "stopped", "cut", "whole"
    stopped, resumed, whole = (load_checkpoint(tmp_path / name / "last.pt") for name in names)
    assert (stopped["step"], stopped["done"], resumed["step"]) == (7, 2, 10)
    assert "stopped and saved; go on with --resume" in out
    assert_equal({part: resumed[part] for part in SAME}, {part: whole[part] for part in SAME})
    said = [row["bad"] for row in resumed["rows"] if "bad" in row]
    assert len(said) == len(set(said)) == 4 and all(any(str(path) in text for text in said) for path in spoiled)
    assert train(data, tmp_path / "stopped", "--resume", str(tmp_path / "stopped"))["step"] == 10   # one can go on


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
