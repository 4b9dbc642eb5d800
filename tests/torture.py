"""Kills, full disks, folders that cannot be written: does a resumed run end with the bits of one that was left alone?

    python -m tests.torture kill --method all --times 20        SIGKILL, one process and two
    python -m tests.torture term --method detrpose --times 5    SIGTERM, as a cluster sends it
    python -m tests.torture int --method detrpose --times 5     Ctrl-C, which all processes get
    python -m tests.torture disk --method detrpose --times 3    the disk is full for a while (a small tmpfs; needs root)
    python -m tests.torture readonly --method detrpose          the run folder is read-only for a while (needs root)
    python -m tests.torture folder --method detrpose            the run folder is taken away for a while
    python -m tests.torture creep --method all                  memory and open files: 1,000 steps, 5,000 pictures

A small training of a method runs once to its end. Then it runs again and again, is struck one to three times, and
resumed until it is done. Weights, averages, optimiser, metrics and log rows, but for fields of time, memory and speed,
must be the same bits. A third of the kills come from outside at any time; the others strike within what was drawn for
them: start-up, the wait for a batch, a step, an evaluation, a save, the work after an evaluation, or a loader process;
all processes at once, or one of them alone. Each process writes down what it does, so what a kill hit is known, not
guessed. Of runs with two processes most are forked, some are spawned as `--processes 2` does, some are by torchrun.

Prints a line for each try, how many survived, and what was hit how often. --out keeps the tries in a JSON file: a
command that was cut off goes on where it was.
"""
import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                   # trainings are forked: there must be no other threads

ROOT = Path(__file__).parents[1]
SMALL = "--eval_every 1 --workers 1 --device cpu".split()
FLAGS = {
    "detrpose": "--size 64 --levels 1 --dim 32 --layers 1 --decoder_ffn 32 --encoder_ffn 32 --queries 5 --batch 4",
    "diffusionregpose": "--short_side 64 --long_side 64 --dim 32 --queries 5 --box_queries 8 --batch 4",
    "querypose": "--short_side 64 --long_side 64 --queries 10 --batch 4",
    "diffusionpose": "--height 64 --width 48 --batch 4",
    "sdpose": "--height 64 --width 48 --batch 4"}
MOMENTS = dict(start=1, load=5, step=5, evaluation=2, save=4, record=2, loader=12)      # about how often there are
PATIENCE = 1500                 # seconds until a training hangs; it waits two minutes for a process that died
WAYS = "spawn fork fork fork torchrun fork fork fork".split()   # in turn, how two processes start


# ---------------------------------------------------------------- in a training process

class Diary:
    """What a training process does, in a file of its number in the folder `now`; it strikes where the plan says."""

    def __init__(self, plan: dict):
        self.plan, self.seen, self.pid = plan, Counter(), 0
        self.what, self.since, self.took = "start", time.monotonic(), dict(start=1.0)
        self.often = random.Random(os.urandom(8))               # not of the seeds of the training

    def write(self, what: str) -> None:
        if self.pid != os.getpid():
            self.pid = os.getpid()
            self.file = os.open(f"{self.plan['now']}/{self.pid}", os.O_WRONLY | os.O_CREAT)
        now = time.monotonic()
        self.took[self.what] = now - self.since
        self.what, self.since = what, now
        os.pwrite(self.file, f"{os.environ.get('RANK', 0)} {what}".ljust(20).encode(), 0)

    def at(self, what: str) -> None:
        """From now on it does this."""
        self.write(what)
        self.seen[what] += 1
        plan, rank, world = self.plan, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if plan.get("moment") == what and plan["number"] == self.seen[what] and int(plan["rank"] * world) == rank:
            delay = plan["share"] * self.took.get(what, 0.02)
            threading.Thread(target=self.strike, args=(delay,), daemon=True).start()

    def strike(self, delay: float) -> None:
        time.sleep(delay)
        Path(self.plan["now"], "struck").write_text(str(os.getpid()))
        others = [] if self.plan["alone"] else family(Path(self.plan["now"]))
        for pid in sorted(others, key=lambda pid: pid == os.getpid()) or [os.getpid()]:
            send(pid, signal.SIGKILL)


def keep_diary(plan: dict) -> None:
    """Let the code of this process say what it does. In place of every ten minutes, about every third step is saved."""
    import torch

    from common import cli, run
    from common.datasets import PoseDataset
    diary, real = Diary(plan), argparse.Namespace(
        main=cli.run_main, batches=run.Run.batches, evaluates=run.Run.evaluates, record=run.Run.record,
        save=run.save_checkpoint, load=PoseDataset.load, processes=torch.multiprocessing.start_processes)

    def main(call):
        diary.at("start" if plan["way"] == "alone" or "RANK" in os.environ else "launcher")
        return real.main(call)

    def batches(self, *args):
        diary.at("load")
        for batch in real.batches(self, *args):
            diary.at("step")
            yield batch
            diary.at("load")

    def evaluates(self):
        due = real.evaluates(self)
        if due:
            diary.at("evaluation")
        return due

    def record(self, *args):
        diary.at("record")
        real.record(self, *args)

    def save(path, content):
        before = diary.what
        diary.at("save")
        try:
            real.save(path, content)
        finally:
            diary.write(before)

    def load(self, i):
        if torch.utils.data.get_worker_info():
            diary.at("loader")
        return real.load(self, i)

    cli.run_main, run.Run.batches, run.Run.evaluates, run.Run.record = main, batches, evaluates, record
    run.save_checkpoint, PoseDataset.load = save, load
    run.RunFolder.save_is_due = lambda self: self.writes and diary.often.random() < 0.3
    run.RunFolder.draw = run.Run.show_batch = lambda *args, **more: None        # pictures take longer than the training
    if plan["way"] == "fork":
        torch.multiprocessing.start_processes = lambda *args, start_method, **more: real.processes(
            *args, start_method="fork", **more)


def take_figures(plan: dict) -> None:
    """Let this process write down its memory and open files, every 100 steps and 16 batches of an evaluation."""
    from common import run
    from common.datasets import PoseDataset

    def counting(call: Callable, what: str, every: int) -> Callable:
        counts = []

        def counted(self, *args, **more):
            result = call(self, *args, **more)
            counts.append(0)
            if len(counts) % every == 0:
                memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
                loaders = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                files = len(os.listdir("/proc/self/fd"))
                with open(f"{plan['now']}/figures", "a") as file:
                    print(f"{what} {len(counts)}: {memory:.0f} MB, {files} files, {len(loaders)} loaders", file=file)
            return result
        return counted

    run.Run.stepped = counting(run.Run.stepped, "step", 100)
    PoseDataset.remember = counting(PoseDataset.remember, "batch", 16)          # of an evaluation
    run.RunFolder.draw = run.Run.show_batch = lambda *args, **more: None


if "POSE_TORTURE" in os.environ and (__name__ == "__mp_main__" or sys.argv[1:2] == ["train"]):
    keep_diary(json.loads(os.environ["POSE_TORTURE"]))          # a process that was spawned, or one of torchrun


def train(method: str, words: list[str], plan: dict, errors: Path) -> None:
    """What a forked process does: the training, in a process group of its own."""
    os.setsid()
    for number, file in enumerate((os.devnull, os.devnull, errors)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.environ["POSE_TORTURE"] = json.dumps(plan)
    Path(plan["now"], str(os.getpid())).write_text("- launcher")
    if plan["way"] == "torchrun":
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                  "-m", "tests.torture", "train", method, *words])
    (take_figures if plan["way"] == "creep" else keep_diary)(plan)
    sys.argv = [f"{method}.py", *words]
    importlib.import_module(method).main()


class Training:
    """A training in `out`, new or gone on with. It is forked from this process, which has imported everything."""

    def __init__(self, place: Path, method: str, data: Path, way: str, out: Path, flags="--epochs 2", **plan):
        self.now, self.way = Path(tempfile.mkdtemp(dir=place)), way
        words = ["--train", *SMALL, *FLAGS[method].split(), *flags.split(), "--data", str(data), "--out", str(out),
                 "--processes", str(1 + (way not in ("alone", "creep")))]
        if (out / "last.pt").exists():
            words = ["--resume", str(out)]
        self.process = multiprocessing.get_context("fork").Process(
            target=train, args=(method, words, dict(now=str(self.now), way=way, **plan), self.now / "errors"))
        self.process.start()

    def family(self) -> list[int]:
        """Its processes that live, the first of them first."""
        return [self.process.pid, *(pid for pid in family(self.now) if pid != self.process.pid)]

    def end(self, seconds: float) -> str:
        """Wait for its end, and kill what is left. What is wrong with how it ended, but for its exit code."""
        self.process.join(seconds)
        hangs = self.process.is_alive()
        for pid in self.family():
            send(pid, signal.SIGKILL)
        self.process.join()
        errors = self.now / "errors"
        lines = [line for line in errors.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
        self.said = next((line for line in reversed(lines) if line.startswith("error: ")), (lines or ["nothing"])[-1])
        traceback = any("Traceback" in line for line in lines) and self.way != "torchrun"   # which has some of its own
        return "hangs" if hangs else f"traceback, {lines[-1]}" if traceback else ""

    def finish(self) -> str:
        """Wait for its good end; what is wrong."""
        return self.end(PATIENCE) or self.process.exitcode and f"exit code {self.process.exitcode}: {self.said}" or ""

    def wait_under_way(self, seconds: float) -> None:
        """Until so long after its start-up."""
        while self.process.is_alive() and self.doing() in ("launcher", "start"):
            time.sleep(0.1)
        self.process.join(seconds)

    def doing(self, pid: int = 0) -> str:
        """What a process was doing when it ended, or does; by default that of rank 0."""
        notes = {int(file.name): file.read_text().split() for file in self.now.iterdir() if file.name.isdigit()}
        if pid:
            return notes.get(pid, ["", "launcher"])[1]
        return next((words[1] for words in notes.values() if words[:1] == ["0"] and words[1] != "loader"), "launcher")


# ---------------------------------------------------------------- what is done to it

def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def family(now: Path) -> list[int]:
    """All processes that live in the process groups of those with a file in this folder."""
    groups, members = set(), []
    roots = {int(file.name) for file in now.iterdir() if file.name.isdigit()}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if fields[0] != "Z":
                members.append((int(entry.name), int(fields[2])))
                groups |= {int(fields[2])} if int(entry.name) in roots else set()
    groups |= roots                                             # a leader may be dead, and its group live on
    return [pid for pid, group in members if group in groups]


def same(first: Path, second: Path) -> str:
    """What differs between two finished runs; nothing if all bits are the same."""
    import torch

    from tests.helpers import LOOSE
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
# Each takes `start`, which begins or resumes the training in a folder, the folder `whole` of the run that was left
# alone and its seconds, tries `out`, and gives (what was struck, what is wrong; nothing if all bits are the same).

def kills(start: Callable, whole: Path, out: Path, seconds: float) -> tuple[list[str], str]:
    """A run that is killed one to three times and resumed to its end."""
    hit = []
    for _ in range(random.randint(1, 3)):
        moment, alone = random.choice(list(MOMENTS)), random.random() < 0.5
        plan = dict(moment=moment, number=random.randint(1, MOMENTS[moment]), alone=alone or moment == "loader",
                    rank=0 if moment in ("save", "loader") else random.random(), share=random.random())
        from_outside = random.random() < 1 / 3
        training = start(out) if from_outside else start(out, **plan)
        struck = training.now / "struck"
        if from_outside:
            training.process.join(random.uniform(0.05, 1.0) * seconds)
            if training.process.is_alive():
                chosen = [random.choice(training.family())] if alone else training.family()
                [send(pid, signal.SIGKILL) for pid in chosen]
                struck.write_text(str(chosen[0] if alone else 0))
        if wrong := training.end(PATIENCE):
            return hit, f"{wrong} after {plan}"
        if struck.exists():
            what = training.doing(int(struck.read_text()))
            together = training.way == "alone" or what == "loader"
            hit.append(what if together else f"{what}, {'one' if plan['alone'] else 'both'} of two")
    return hit, start(out).finish() or same(whole, out)


def by_signal(number: int, everybody: bool, start: Callable, whole: Path, out: Path, seconds: float
              ) -> tuple[list[str], str]:
    """A run that is asked to stop one to three times, at any time, and resumed to its end."""
    hit = []
    for _ in range(random.randint(1, 3)):
        training = start(out)
        training.process.join(random.uniform(0.05, 1.0) * seconds)
        if training.process.is_alive():
            hit.append(training.doing())
            [send(pid, number) for pid in training.family()[:None if everybody else 1]]
        wrong = training.end(PATIENCE)
        if wrong or training.process.exitcode not in (0, 128 + number, -number) and training.way != "torchrun":
            return hit, wrong or f"exit code {training.process.exitcode}: {training.said}"
    return hit, start(out).finish() or same(whole, out)


def finish(training: Training, start: Callable, whole: Path, out: Path) -> str:
    """Wait for a training, resumed once if it ended with an error; what is wrong."""
    wrong = training.end(PATIENCE)
    if training.process.exitcode:
        wrong = wrong or start(out).finish()
    return wrong or same(whole, out) or ("" if (out / "best.pt").exists() else "no best.pt")


def full_disk(start: Callable, whole: Path, out: Path, seconds: float) -> tuple[list[str], str]:
    """The run folder lies on a tmpfs of a few megabytes, which is filled for a while."""
    need = sum(path.stat().st_size for path in whole.iterdir()) * 2 // 2 ** 20 + 2
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={need}m", "tmpfs", out], check=True)
    training = start(out / "run")
    try:
        training.wait_under_way(random.uniform(0.0, 0.4) * seconds)
        with contextlib.suppress(OSError), open(out / "stone", "wb", buffering=0) as stone:
            while stone.write(bytes(2 ** 16)):
                pass
        hit = training.doing()
        time.sleep(random.uniform(0.1, 0.4) * seconds)
        (out / "stone").unlink()
        return [hit], finish(training, start, whole, out / "run")
    finally:
        training.end(0)
        subprocess.run(["umount", out], check=True)


def read_only(start: Callable, whole: Path, out: Path, seconds: float) -> tuple[list[str], str]:
    """The folder is mounted over itself, read-only, for a while: so it is for root, too. A second run, or one that is
    resumed then, is refused."""
    training = start(out)
    training.wait_under_way(random.uniform(0.0, 0.4) * seconds)
    out.mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", out, out], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", out], check=True)
        hit, end = training.doing(), time.monotonic() + random.uniform(0.1, 0.4) * seconds
        second = start(out)
        wrong = second.end(PATIENCE) or (f"not refused: {second.said}" if second.process.exitcode != 2 or
                                    "cannot write into" not in second.said else "")
        time.sleep(max(0.0, end - time.monotonic()))
    finally:
        subprocess.run(["umount", out], check=True)
    return [hit], wrong or finish(training, start, whole, out)


def lost_folder(start: Callable, whole: Path, out: Path, seconds: float) -> tuple[list[str], str]:
    """The run folder is moved away in mid-run, and a file stands in its place for a while."""
    training = start(out)
    training.wait_under_way(random.uniform(0.0, 0.4) * seconds)
    hit = training.doing()
    if out.exists():
        out.rename(out.with_name(f"{out.name}-away"))
        out.touch()
        time.sleep(0.2 * seconds)
        out.unlink()
    return [hit], finish(training, start, whole, out)


PROGRAMS = dict(kill=kills, term=partial(by_signal, signal.SIGTERM, False), int=partial(by_signal, signal.SIGINT, True),
                disk=full_disk, readonly=read_only, folder=lost_folder)


def make_data(folder: Path, method: str) -> Path:
    from data import puppets
    if method == "diffusionpose":
        return puppets.make(folder, "video", size=64, workers=1, progress=False, counts={"train": 3, "val": 1})
    return puppets.make(folder, "coco", size=64, workers=1, progress=False, counts={"train": 24, "val": 8})


def torture(how: str, method: str, times: int, seed: int, tries: list[dict], keep: Callable) -> None:
    """Add to `tries` what it lacks. Every other one that is sent signals has two processes."""
    seconds, here = {}, dict(how=how, method=method, seed=seed)
    done = {one["number"] for one in tries if {**one, **here} == one}
    if not set(range(times)) - done:
        return
    importlib.import_module(method)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        data = make_data(place / "data", method)
        for number in sorted(set(range(times)) - done):
            random.seed(f"{seed} {how} {method} {number}")
            two, begin = how in ("kill", "term", "int") and number % 2, time.monotonic()
            way = WAYS[number // 2 % len(WAYS)] if two else "alone"
            whole, out = place / f"whole{1 + two}", place / f"try{number}"
            start = partial(Training, place, method, data, way)
            if not whole.exists():
                if wrong := start(whole).finish():
                    raise SystemExit(f"{method} does not train: {wrong}")
                seconds[two], begin = time.monotonic() - begin, time.monotonic()
            hit, wrong = PROGRAMS[how](start, whole, out, seconds[two])
            took = round(time.monotonic() - begin)
            tries.append(here | dict(number=number, way=way, hit=hit, wrong=wrong, seconds=took))
            keep()
            print(f"{how} {method} {number + 1}/{times}, {way}, struck in {'; '.join(hit) or 'nothing'}: "
                  f"{wrong or 'the same bits'}, {took} s", flush=True)
            [shutil.rmtree(folder, ignore_errors=True) for folder in place.glob(f"try{number}*")]


def creep(method: str) -> None:
    """Print memory and open files of one process along 1,000 steps, and an evaluation of 5,000 pictures after them."""
    importlib.import_module(method)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        data = make_data(place / "data", "of pictures")
        file = data / "annotations/person_keypoints_val2017.json"
        content, many = json.loads(file.read_text()), dict(images=[], annotations=[])
        for copy in range(625):                                 # of 8 pictures, under names of their own
            for image in content["images"]:
                name = f"{copy}-{image['file_name']}"
                os.link(data / "val2017" / image["file_name"], data / "val2017" / name)
                many["images"].append(image | dict(id=image["id"] + 10 ** 6 * copy, file_name=name))
            shift = 10 ** 6 * copy
            many["annotations"] += [person | dict(id=person["id"] + shift, image_id=person["image_id"] + shift)
                                    for person in content["annotations"]]
        file.write_text(json.dumps(content | many))
        # 23 pictures with people or 41 people, 5 or 10 steps an epoch: loader processes start and end 100 to 200 times
        epochs = 100 if method in ("diffusionpose", "sdpose") else 200
        training = Training(place, method, data, "creep", place / "run", f"--epochs {epochs} --eval_every {epochs}")
        training.process.join()
        left = len(training.family()) - 1
        wrong = training.finish()
        for line in (training.now / "figures").read_text().splitlines():
            print(f"creep {method}: {line}")
        print(f"creep {method}: {wrong or 'ended well'}, {left} processes left behind", flush=True)


def summary(how: str, method: str, tries: list[dict]) -> str:
    ours = [one for one in tries if (one["how"], one["method"]) == (how, method)]
    hits = Counter(hit for one in ours for hit in one["hit"])
    return (f"{how} {method}: {sum(not one['wrong'] for one in ours)} of {len(ours)} survived; struck "
            + ", ".join(f"{what}: {count}" for what, count in sorted(hits.items())))


def main() -> None:
    if sys.argv[1:2] == ["train"]:                              # one process of torchrun
        method, sys.argv = sys.argv[2], [f"{sys.argv[2]}.py", *sys.argv[3:]]
        return importlib.import_module(method).main()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=[*PROGRAMS, "creep"])
    parser.add_argument("--method", default="all", help=f"{', '.join(FLAGS)} or all")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file to keep the tries in")
    args = parser.parse_args()
    tries = json.loads(args.out.read_text()) if args.out and args.out.exists() else []

    def keep() -> None:
        if args.out:
            beside = args.out.with_name(f".{args.out.name}.part")
            beside.write_text("[\n" + ",\n".join(map(json.dumps, tries)) + "\n]\n")
            beside.replace(args.out)

    for method in FLAGS if args.method == "all" else args.method.split(","):
        if args.how == "creep":
            creep(method)
        else:
            torture(args.how, method, args.times, args.seed, tries, keep)
            print(summary(args.how, method, tries), flush=True)
    sys.exit(any(one["wrong"] for one in tries))


if __name__ == "__main__":
    main()
