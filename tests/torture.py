"""Kills, full disks and folders that cannot be written, by force: does a resumed run end with the bits of one left alone?

    python -m tests.torture kill --method all --times 20        SIGKILL at random moments, one process and two
    python -m tests.torture term --method detrpose --times 5    SIGTERM
    python -m tests.torture disk --method detrpose --times 3    the disk is full for a while (a small tmpfs; needs root)
    python -m tests.torture folder --method detrpose            the run folder is taken away for a while

A small training of a method runs once to its end. Then it runs again and again, is killed, one to three times, while it
takes a step, evaluates, writes a checkpoint or loads (now and then a loader process or one of two ranks alone is
killed), and resumed until it is done. Weights, averages, optimiser, metrics and log rows, but for fields of time, memory
and speed, must be the same bits. Prints a line for each try, and how many survived.
"""
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = "--epochs 2 --eval_every 1 --workers 1 --device cpu".split()
FLAGS = {
    "detrpose": "--size 64 --levels 1 --dim 32 --layers 1 --decoder_ffn 32 --encoder_ffn 32 --queries 5 --batch 4",
    "diffusionregpose": "--short_side 64 --long_side 64 --dim 32 --queries 5 --box_queries 8 --batch 4",
    "querypose": "--short_side 64 --long_side 64 --queries 10 --batch 4",
    "diffusionpose": "--batch 8",
    "sdpose": "--batch 8"}
LOOSE = {"seconds", "images_a_second", "memory"}               # fields of a log row that no two runs share


# ---------------------------------------------------------------- the training process

def often(self) -> bool:
    """In place of every ten minutes, about every third step is saved."""
    return self.writes and random.random() < 0.3


if os.environ.get("POSE_TORTURE"):                              # also in the processes that a training starts
    from common.run import RunFolder
    RunFolder.save_is_due, RunFolder.draw = often, lambda *args: None


def train(method: str, data: Path, out: Path, processes: int) -> subprocess.Popen:
    """A training, new or gone on with, in a process group of its own."""
    resumes = (out / "last.pt").exists()
    words = ["--resume", str(out)] if resumes else [
        "--train", *SMALL, *FLAGS[method].split(), "--data", str(data), "--out", str(out), "--processes", str(processes)]
    command = [sys.executable, "-m", "tests.torture", "train", method, *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=os.environ | {"POSE_TORTURE": "1", "OMP_NUM_THREADS": "1"})


# ---------------------------------------------------------------- what is done to it

def family(process: subprocess.Popen) -> list[int]:
    """The processes of its group, itself first."""
    found = [process.pid]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != process.pid:
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue
            if int(fields[2]) == process.pid:                   # its process group
                found.append(int(entry.name))
    return found


def strike(process: subprocess.Popen, number: int) -> str:
    """Send a signal to all of its processes, or now and then to one of them alone; which."""
    everybody = family(process)
    chosen = [random.choice(everybody)] if number == signal.SIGKILL and random.random() < 0.3 else everybody
    for pid in chosen if number == signal.SIGKILL else everybody[:1]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
    return "all" if len(chosen) == len(everybody) else "one"


def end(process: subprocess.Popen, seconds: float) -> str:
    """Wait for its end, and kill what is left; what it said on the way out."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        errors = "it never ended"
    for pid in family(process):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()
    return errors


def same(first: Path, second: Path) -> str:
    """What differs between two finished runs; nothing if all bits are the same."""
    import json

    import torch
    a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (first, second))

    def differs(x, y, where: str) -> str:
        if isinstance(x, dict):
            found = [differs(x[key], y.get(key), f"{where}.{key}") for key in x if key not in LOOSE]
            return next(filter(None, found), "" if x.keys() == y.keys() else where)
        if isinstance(x, list):
            return where if len(x) != len(y) else next(filter(None, (differs(p, q, where) for p, q in zip(x, y))), "")
        return "" if (torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y or x != x and y != y) else where

    parts = [part for part in ("model", "ema", "optimizer", "epoch", "step", "best", "rows") if part in a]
    rows = [[{k: v for k, v in json.loads(line).items() if k not in LOOSE}
             for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (first, second)]
    return differs({part: a[part] for part in parts}, {part: b[part] for part in parts}, "last.pt") or (
        "" if rows[0] == rows[1] else "log.jsonl")


# ---------------------------------------------------------------- the programs
#
# Each takes `start`, which begins or resumes the training in a folder, the folder `whole` of the run that was left alone
# and its seconds, and tries `out`: (what was done, what is wrong; nothing if all bits are the same).

def by_signal(number: int, start: Callable, whole: Path, out: Path, seconds: float) -> tuple[str, str]:
    """A run that is struck one to three times and resumed to its end."""
    told = []
    for _ in range(random.randint(1, 3)):
        process = start(out)
        time.sleep(random.uniform(0.3, 1.0) * seconds)
        if process.poll() is not None:
            end(process, 1)
            break
        told.append(strike(process, number))
        if end(process, 150) == "it never ended":
            return f"struck {'+'.join(told)}", "hangs after the last strike"
    errors = end(process := start(out), 300)
    wrong = f"does not resume: {errors.strip().splitlines()[-1:]}" if process.returncode else same(whole, out)
    return f"struck {'+'.join(told) or 'none'}", wrong


def finish(process: subprocess.Popen, start: Callable, whole: Path, out: Path) -> str:
    """Wait for a training, resumed once if it ended with an error; what is wrong."""
    errors = end(process, 300)
    if process.returncode:
        errors = end(process := start(out), 300)
    return errors[-200:] if process.returncode else same(whole, out)


def full_disk(start: Callable, whole: Path, out: Path, seconds: float) -> tuple[str, str]:
    """The run folder lies on a tmpfs of a few megabytes, which is filled for a while."""
    need = sum(path.stat().st_size for path in whole.iterdir()) * 2 // 2 ** 20 + 2
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={need}m", "tmpfs", out], check=True)
    try:
        process = start(out / "run")
        time.sleep(random.uniform(0.3, 0.6) * seconds)
        with open(out / "stone", "wb") as stone:
            try:
                while True:
                    stone.write(bytes(2 ** 16))
                    stone.flush()
            except OSError:
                pass
        time.sleep(random.uniform(0.1, 0.3) * seconds)
        (out / "stone").unlink()
        wrong = finish(process, start, whole, out / "run")      # full at the very end: an error, and resumed
        return "full disk", wrong or ("" if (out / "run" / "best.pt").exists() else "no best.pt")
    finally:
        subprocess.run(["umount", out], check=True)


def lost_folder(start: Callable, whole: Path, out: Path, seconds: float) -> tuple[str, str]:
    """The run folder is moved away in mid-run, and a file stands in its place for a while."""
    process = start(out)
    time.sleep(random.uniform(0.5, 0.7) * seconds)
    if out.exists():
        out.rename(out.with_name(f"{out.name}-away"))
        out.touch()
        time.sleep(0.1 * seconds)
        out.unlink()
    return "folder taken away", finish(process, start, whole, out)


PROGRAMS = dict(kill=partial(by_signal, signal.SIGKILL), term=partial(by_signal, signal.SIGTERM), disk=full_disk,
                folder=lost_folder)


def make_data(folder: Path, method: str) -> Path:
    from data import puppets
    if method == "diffusionpose":
        return puppets.make(folder, "video", size=64, progress=False, counts={"train": 3, "val": 1})
    return puppets.make(folder, "coco", size=64, progress=False, counts={"train": 24, "val": 8})


def torture(how: str, method: str, times: int, seed: int) -> int:
    """How many of so many tries survived. Every other one that is sent signals has two processes."""
    survived, seconds = 0, {}
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        data = make_data(place, method)
        for attempt in range(times):
            random.seed(f"{seed} {method} {attempt}")
            processes = 1 + attempt % 2 if how in ("kill", "term") else 1
            whole, out = place / f"whole{processes}", place / f"try{attempt}"
            start = partial(train, method, data, processes=processes)
            if processes not in seconds:
                begin = time.monotonic()
                errors = end(process := start(whole), 600)
                if process.returncode:
                    raise SystemExit(f"{method} does not train: {errors[-500:]}")
                seconds[processes] = time.monotonic() - begin
            told, wrong = PROGRAMS[how](start, whole, out, seconds[processes])
            survived += not wrong
            print(f"{method} {attempt + 1}/{times}, {processes} processes, {told}: {wrong or 'the same bits'}", flush=True)
            shutil.rmtree(out, ignore_errors=True)
    return survived


def main() -> None:
    if sys.argv[1:2] == ["train"]:                              # the process that is struck
        import importlib
        method, sys.argv = sys.argv[2], [f"{sys.argv[2]}.py", *sys.argv[3:]]
        importlib.import_module(method).main()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=list(PROGRAMS))
    parser.add_argument("--method", default="all", help=f"{', '.join(FLAGS)} or all")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bad = 0
    for method in FLAGS if args.method == "all" else [args.method]:
        survived = torture(args.how, method, args.times, args.seed)
        print(f"{args.how} {method}: {survived} of {args.times} survived", flush=True)
        bad += args.times - survived
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
