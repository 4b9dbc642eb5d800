"""The command line: flags, checks, errors of one line."""
import errno
import sys
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch

import detrpose
from common.cli import field_help, launch, parse, run_main, run_method
from common.errors import UserError
from common.ranks import pick_device


@dataclass(frozen=True)
class Config:
    """What `parse` is tried with; as a checkpoint's method it is called test_cli, after this file."""
    size: int = 8               # side, 100 % of it
    lr_backbone: float = 0.1    # learning rate
    fdr: bool = True            # off: offsets
    amp: str = "no"             # precision


PRESETS = {"tiny": Config(size=16, lr_backbone=0.2), "big": Config(size=32, lr_backbone=0.3)}


def parsed(*argv: str):
    return parse(Config, PRESETS, "A method.", list(argv))


def last_line(capsys, call) -> str:
    """The single line with which `call` ends under run_main, exit code 2."""
    with pytest.raises(SystemExit) as end:
        run_main(call)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1
    return lines[0]


def test_every_field_is_a_flag_whose_help_is_its_comment(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    for config, presets in (Config, PRESETS), (detrpose.Config, detrpose.PRESETS):
        with pytest.raises(SystemExit) as end:
            parse(config, presets, "A method.", ["--help"])
        text, comments = capsys.readouterr().out, field_help(config)
        assert end.value.code == 0 and comments.keys() == {field.name for field in fields(config)}
        for name, comment in comments.items():
            assert f"--{name}" in text and f"{comment} (default " in text


def test_help_says_whose_defaults_it_shows(capsys):
    with pytest.raises(SystemExit):
        parsed("--preset", "big", "--help")
    assert "those below are of big" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("argv, said", [([], ""), (["--size", "5", "--no-fdr"], "--size --no-fdr: without --train")])
def test_without_train_the_docstring_comes_first_and_flags_are_said_to_do_nothing(argv, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["method.py", *argv])
    seen = []
    run_method(Config, PRESETS, "A method.", None, lambda: seen.append(capsys.readouterr().out) or "the presets", None)
    assert seen == ["A method.\n"]
    out = capsys.readouterr().out
    assert out.startswith("the presets\n") and said in out and ("without --train" in out) == bool(said)


def test_flags_take_dashes_or_underscores_and_values_after_an_equals_sign():
    for spelling in ("--lr-backbone 2", "--lr_backbone 2", "--lr-backbone=2"):
        assert parsed(*spelling.split())[0].lr_backbone == 2
    assert parsed("--no-fdr")[0].fdr is parsed("--no_fdr")[0].fdr is False and parsed("--fdr")[0].fdr is True
    assert parsed("--amp", "with-dash")[0].amp == "with-dash" and parsed("--amp=a-b")[0].amp == "a-b"


def test_precedence_is_class_preset_checkpoint_command_line(tmp_path):
    saved = dict(method="test_cli", preset="big", skeleton={}, model={}, config=dict(size=64, amp="bf16"))
    torch.save(saved, tmp_path / "last.pt")
    assert parsed()[0] == Config(16, 0.2, True, "no")                        # tiny changes two fields of the class
    assert parsed("--preset", "big", "--size", "5")[0] == Config(5, 0.3, True, "no")
    config, args = parsed("--resume", str(tmp_path), "--amp", "fp16")
    assert (config.size, config.amp, args.preset, args.train) == (64, "fp16", "big", True)


@pytest.mark.parametrize("argv, message", [
    ("--bacth 4", "unknown flag --bacth: did you mean --batch?"),
    ("--no-frd", "unknown flag --no-frd: did you mean --no-fdr?"), ("--siz 32", "did you mean --size?"),
    ("train", "did you mean --train?"), ("--batch four", "--batch: invalid int value: 'four'"),
    ("--batch 1.5", "invalid int"), ("--lr fast", "invalid float value"), ("--lr", "expected one argument"),
    ("--preset tny", "there is no preset tny: choose from tiny, n, s"), ("--amp foo", "--amp foo: choose from no, bf16"),
    ("--schedule foo", "--schedule foo: choose from constant, cosine"), ("--backbone foo", "--backbone foo: choose from"),
    ("--batch 0", "--batch 0: expected at least 1"), ("--epochs 0", "--epochs 0"), ("--accum 0", "--accum 0"),
    ("--lr -1", "--lr -1.0: expected"), ("--lr nan", "--lr nan"), ("--lr 1e300", "--lr 1e+300: expected a number from"),
    (f"--batch {10 ** 20}", "expected a number from 1 to 1000000000000"), ("--clip 0", "--clip"), ("--workers -1", "--workers -1"),
    ("--mosaic 2", "--mosaic 2.0: expected a number from 0 to 1"), ("--heads 5", "choose a multiple of 20"),
    ("--size 100", "multiple of 32"), ("--resume nowhere", "there is no checkpoint nowhere"), ("--init", "expected one argument")])
def test_a_wrong_command_line_is_one_line_that_says_what_to_do(argv, message, capsys):
    line = last_line(capsys, lambda: parse(detrpose.Config, detrpose.PRESETS, "", argv.split()))
    assert message in line


@pytest.mark.parametrize("device, message", [
    ("gpu", "expected auto, cpu, cuda"), ("mps", "expected auto"), ("cuda", "no GPU that torch"),
    ("cuda:7", "--device cuda:7")])
def test_a_device_that_is_not_there_is_one_line(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        pick_device(device)
    assert pick_device("auto") == torch.device("cpu")


def test_errors_of_loader_processes_memory_and_disk_are_one_line_too(capsys):
    def fail(error):
        raise error
    wrapped = "Caught UserError in DataLoader worker process 0.\nTraceback\n  x\ncommon.UserError: no image"
    assert last_line(capsys, lambda: fail(UserError(wrapped))) == "error: no image"
    assert "smaller --batch" in last_line(capsys, lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried")))
    assert "smaller --batch" in last_line(capsys, lambda: np.zeros(2 ** 57))
    assert "No space left" in last_line(capsys, lambda: fail(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(SystemExit) as end:
        run_main(lambda: fail(KeyboardInterrupt()))
    assert end.value.code == 130


def test_a_lost_peer_is_silent_because_it_has_spoken_and_a_killed_process_is_explained(monkeypatch, capsys):
    def lose():
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1234")

    def killed(*args, **options):
        raise torch.multiprocessing.ProcessExitedException("", 1, 99, exit_code=-9, signal_name="SIGKILL")

    with pytest.raises(RuntimeError):
        run_main(lose)                                              # alone it would be a riddle
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(SystemExit) as end:
        run_main(lose)
    assert end.value.code == 1 and capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "platform", "linux")                           # elsewhere `launch` is a plain call
    group = type("Group", (), dict(join=killed, pids=lambda self: []))()
    monkeypatch.setattr(torch.multiprocessing, "start_processes", lambda *args, **options: group)
    args = type("Args", (), dict(device="cpu"))
    assert "ended by SIGKILL: was the memory full?" in last_line(capsys, lambda: launch(None, detrpose.PRESETS["tiny"], args))
