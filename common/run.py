"""A run: where it stands, its folder, checkpoints and log, how it resumes and stops. No optimiser step is taken here.

    run = Run("detrpose", cfg, args, ranks, data, held_out, parts=dict(model=..., ema=..., optimizer=..., scaler=...))
    for epoch in run.epochs():
        for images, people in run.batches(items):       # a resumed run goes on in mid-epoch
            ...                                         # forward, losses, backward: the method's own
            if run.more_micro_batches(losses):
                continue
            ...                                         # clip, step, average: the method's own
            if run.stepped(norm):                       # True: somebody asked to stop, and everything is saved
                return
        if run.evaluates():
            run.record(*evaluate(...))
"""
import argparse
import contextlib
import copy
import errno
import itertools
import json
import math
import signal
import sys
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:                    # Windows
    fcntl = resource = None

from common import draw, metrics, transforms
from common.cli import RunConfig, find_last
from common.datasets import PoseDataset
from common.errors import UserError
from common.predict import train_loader
from common.ranks import (STOP_SIGNALS, Ranks, epoch_batches, gather_lists, mean_over_ranks, micro_batch, say, seed_all, share_buffers,
                          wait_for_all)
from common.records import People, Prediction
from common.weights import count_parameters, save_checkpoint

LOG_EVERY = 20             # optimiser steps
WARMUP_SHARE = 4           # the warm-up takes at most one in so many of the run's steps
LOCKS: dict[Path, IO] = {}  # run folders that this process writes, with their locks


def restore(parts: dict, saved: dict) -> None:
    """Put the states of a checkpoint back. Raises UserError when it was made by another model.

    Of an optimiser that is what it remembers of each weight, and the rate of its last step, for a run may have no
    further one; its settings (weight decay, ...) stay those of the config, where a flag may have changed them.
    """
    if missing := {*parts, "epoch", "done", "step", "best", "rows"} - saved.keys():
        raise UserError(f"the checkpoint has no {', '.join(sorted(missing))}: last.pt is to go on from, best.pt for eval.py")
    counts, rows = [saved[name] for name in ("epoch", "done", "step")], saved["rows"]
    if not (all(type(count) is int and count >= 0 for count in counts) and isinstance(saved["best"], (int, float))
            and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise UserError("the checkpoint is damaged: its epoch, done, step, best or rows cannot be meant")
    for name, part in parts.items():
        settings = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in getattr(part, "param_groups", [])]
        try:
            part.load_state_dict(saved[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the checkpoint does not fit: its {name} differs ({reason}); resume with the flags that "
                            "it was made with") from None
        for group, own in zip(getattr(part, "param_groups", []), settings):
            group.update(own)


class Stopper:
    """Turns Ctrl-C and SIGTERM into a question that the loop asks after each step; a second Ctrl-C is immediate."""

    def __init__(self):
        self.asked = math.inf                                   # when
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and time.monotonic() > self.asked + 1:    # torchrun repeats the first at once
            raise KeyboardInterrupt
        self.asked = min(self.asked, time.monotonic())

    def __call__(self, ranks: Ranks) -> bool:
        """True on every process as soon as one was asked to stop."""
        asked = self.asked < math.inf
        if ranks.world > 1:
            asked = bool(mean_over_ranks(torch.tensor(float(asked), device=ranks.device)) > 0)
        return asked


class Ema(nn.Module):
    """A running average of a model's weights and buffers, which is what gets evaluated.

    average ← d·average + (1 − d)·model,  d = decay·(1 − exp(−updates/warmup)): early averages forget quickly.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: int):
        super().__init__()
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        keep = self.decay * (1 - math.exp(-int(self.updates) / max(1, self.warmup)))
        mine, new = self.module.state_dict(), model.state_dict()
        floating = [name for name, value in new.items() if value.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floating], [new[name] for name in floating], 1 - keep)
        for name in new.keys() - set(floating):
            mine[name].copy_(new[name])


def make_folder(path: Path, may_be_there: bool = True) -> Path:
    """The folder, made if need be. Raises UserError; FileExistsError for one that is there and may not be."""
    try:
        path.mkdir(parents=True, exist_ok=may_be_there)
    except OSError as error:
        if isinstance(error, FileExistsError) and not may_be_there:
            raise
        raise UserError(f"cannot make the folder {path}: {error}; choose another with --out") from None
    return path


def new_folder(name: str) -> Path:
    """runs/<name>, or with a number behind the name where that is taken: two runs of one second have two. UserError."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            return make_folder(Path("runs") / (name if number == 1 else f"{name}-{number}"), may_be_there=False)


def duration(seconds: float) -> str:
    """45 s, 24 min 18 s, 3 h 5 min."""
    hours, minutes, seconds = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def peak_memory(device: torch.device) -> float | None:
    """GB: the most that this process has had, of the GPU's memory or else of the machine's; None where that is unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1e9 if sys.platform == "darwin" else 1e6                 # bytes there, kilobytes here
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 3) if resource else None


@contextlib.contextmanager
def goes_on(path: Path) -> Iterator[None]:
    """A file that cannot be written in the middle of a run is a warning: the disk may have room again later."""
    try:
        yield
    except (OSError, UserError) as error:
        print(f"warning: {path} is not written: {' '.join(str(error).split())}", file=sys.stderr)


class RunFolder:
    """A run folder: config.json, log.jsonl, train_batch.png, curves.png, predictions.png, last.pt, best.pt. Only rank 0
    writes.

    While it is written it is locked (`.lock`; not on Windows), so that a second run in it is refused.
    Raises UserError if the folder cannot be written, is in use, or holds a run that is not the one to resume.
    """

    def __init__(self, method: str, config: Any, args: argparse.Namespace, ranks: Ranks):
        self.writes = ranks.rank == 0
        self.header = dict(method=method, preset=args.preset, config=asdict(config))
        self.rows: list[dict] = args.saved["rows"] if args.resume else []
        self.last_save, self.log_is_whole = time.monotonic(), True
        self.path = self._choose(f"{method}-{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}", args)
        self.path = Path(gather_lists([str(self.path)])[0])                     # rank 0's
        if self.writes:
            self._lock()
            if not (args.resume and find_last(args.resume).parent.samefile(self.path)):
                self._refuse_what_is_there()
            try:        # without the rows that a killed run wrote after its last checkpoint: it will write them again
                self._write("log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows), "w")
                self._write("config.json", json.dumps(self.header, indent=1) + "\n", "w")
            except OSError as error:
                for name in ("log.jsonl", "config.json") if not self.rows else ():      # halves of a new run's
                    with contextlib.suppress(OSError):
                        (self.path / name).unlink()
                raise UserError(f"cannot write into {self.path}: {error}; choose another folder with --out") from None
        self.bad = {row["bad"] for row in self.rows if "bad" in row}

    def _choose(self, name: str, args: argparse.Namespace) -> Path:
        """The folder that was named, that of the run to resume, or a new one below runs/, made."""
        if args.out or args.resume:
            path = Path(args.out) if args.out else find_last(args.resume).parent
            return make_folder(path) if self.writes else path
        return new_folder(name) if self.writes else Path("runs") / name

    def _lock(self, patience: float = 10) -> None:
        """A POSIX lock: it ends with this process, and loader processes do not inherit it. A run that was told to stop
        may need seconds to save and leave."""
        place, end = self.path.resolve(), time.monotonic() + patience
        if fcntl is None or place in LOCKS:
            return
        try:
            file = open(place / ".lock", "a")
            while True:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    LOCKS[place] = file
                    return
                except (BlockingIOError, PermissionError):
                    if time.monotonic() > end:
                        raise UserError(f"another run writes into {self.path} now: choose another --out, or wait for it"
                                        ) from None
                time.sleep(0.2)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):                # a file system without locks
                raise UserError(f"cannot write into {self.path}: {error}; choose another with --out") from None

    def _refuse_what_is_there(self) -> None:
        """Nothing that is there is written over, but what a run of ours left that ended before its first save."""
        if any((self.path / name).exists() for name in ("last.pt", "best.pt")):
            raise UserError(f"{self.path} holds another run: go on with --resume {self.path}, or choose another --out")
        try:
            ours = {"method", "preset", "config"} <= json.loads((self.path / "config.json").read_text()).keys()
        except (OSError, ValueError, AttributeError):
            ours = not any((self.path / name).exists() for name in ("config.json", "log.jsonl"))
        if not ours:
            raise UserError(f"{self.path} has files of yours that a run would write over (config.json, log.jsonl): "
                            "choose another --out")

    def _write(self, name: str, text: str, mode: str) -> None:
        self.path.mkdir(parents=True, exist_ok=True)                            # somebody may have removed it
        with open(self.path / name, mode, encoding="utf-8") as file:
            file.write(text)

    def log(self, **row: float | int | str) -> None:
        """Append one row to log.jsonl; values are plain numbers and text. After a failure all rows are written anew,
        because a full disk may have taken half of one."""
        self.rows.append(row)
        if self.writes:
            rows, mode = ([row], "a") if self.log_is_whole and (self.path / "log.jsonl").exists() else (self.rows, "w")
            self.log_is_whole = False
            with goes_on(self.path / "log.jsonl"):
                self._write("log.jsonl", "".join(json.dumps(one) + "\n" for one in rows), mode)
                self.log_is_whole = True

    def bad_files(self, messages: Iterable[str]) -> None:
        """Name each unreadable file once, on the screen and in log.jsonl."""
        for message in dict.fromkeys(messages):
            if message not in self.bad:
                self.bad.add(message)
                tqdm.write(f"bad file ({len(self.bad)} so far): {message}")
                self.log(step=self.rows[-1]["step"] if self.rows else 0, bad=message)

    def save_is_due(self, seconds: float = 600) -> bool:
        """True when the last save is long ago, so that a crash costs minutes; only ever on the writing process."""
        return self.writes and time.monotonic() - self.last_save > seconds

    def draw(self, data: PoseDataset, predictions: list, threshold: float) -> None:
        """curves.png of the log, predictions.png of the first images of a dataset with people."""
        if self.writes:
            with goes_on(self.path / "curves.png"):
                draw.plot_curves([row for row in self.rows if "bad" not in row], self.path / "curves.png")
            with goes_on(self.path / "predictions.png"):
                draw.draw_predictions(data, predictions, 12, threshold).save(self.path / "predictions.png")

    def save(self, name: str, **content: Any) -> None:
        """Raises UserError; the file from before is then intact."""
        if self.writes:
            make_folder(self.path)
            save_checkpoint(self.path / name, {**self.header, "rows": self.rows, **content})
            self.last_save = time.monotonic()

    def try_save(self, name: str, **content: Any) -> bool:
        """As `save`, in the middle of a run: a full disk is said, and the run goes on. Whether it was saved."""
        with goes_on(self.path / name):
            self.save(name, **content)
            return True
        return False


class Run:
    """Where a training stands, what its checkpoints hold, and its folder.

    parts: what a checkpoint keeps, by name: model, optimizer, scaler, and `ema` if an average is what is evaluated.
    Each process has a Run of its own and calls its methods in step with the others.
    Raises UserError when the checkpoint to resume does not fit or the folder cannot be written.
    """

    def __init__(self, method: str, cfg: RunConfig, args: argparse.Namespace, ranks: Ranks, data: PoseDataset,
                 held_out: PoseDataset, parts: dict):
        self.cfg, self.ranks, self.held_out, self.parts = cfg, ranks, held_out, parts
        self.skeleton, self.micro = data.skeleton.to_dict(), micro_batch(cfg, ranks)
        self.at = dict(epoch=0, done=0, step=0, best=-math.inf)     # done: optimiser steps of this epoch
        self.start, about = 0, ""                                   # images of the epoch that were seen before
        if args.saved:
            restore(parts, args.saved)
            self.at = {name: args.saved[name] for name in self.at}
            about, before = f"epoch {self.at['epoch'] + 1}, step {self.at['step']}", args.saved["config"]
            self.start = self.at["done"] * before.get("batch", cfg.batch)
            changed = {name: f"{name} {before[name]} → {value}" for name, value in asdict(cfg).items()
                       if name in before and before[name] != value}
            stays = [f"{name} stays {value}" for name, value in vars(cfg).items()
                     if "lr" in changed and name.startswith("lr_") and name not in changed]
            about = f"\ngoing on at {about}" + f"; changed: {', '.join(changed.values())}" * bool(changed)
            about += f" ({', '.join(stays)})" * bool(stays)
        self.folder = RunFolder(method, cfg, args, ranks)
        self.began = time.monotonic() - max((row.get("seconds", 0) for row in self.folder.rows), default=0)
        self.steps, self.taken = 0, deque(maxlen=LOG_EVERY)         # of the whole run; seconds of the last steps
        self.evaluations, self.told = [], False                     # their seconds; whether the minutes were said
        args.saved = None                                           # its memory is ours again
        say(f"{data.report()}\n{held_out.report()}\nwriting to {self.folder.path}{about}")

    @property
    def step(self) -> int:
        """Optimiser steps so far."""
        return self.at["step"]

    @property
    def score_name(self) -> str:
        """The metric by which best.pt is chosen: PoseTrack's, else OKS AP."""
        return "Mean" if self.held_out.metric == "posetrack" else "AP"

    @property
    def last(self) -> bool:
        """Whether this is the last epoch."""
        return self.at["epoch"] + 1 == self.cfg.epochs

    def epochs(self) -> Iterator[int]:
        """The epochs to go. After the body of the `for` the epoch is done and last.pt is saved; a `return` from within
        the body leaves it as it is. Ctrl-C is from now on a question, see `stepped`."""
        self.asked, epochs = Stopper(), self.cfg.epochs
        if self.at["epoch"] >= epochs:
            done = self.at["epoch"]
            say(f"all {done} epochs are done; --epochs {done + max(1, done // 2)} would go on")
        for epoch in range(self.at["epoch"], epochs):
            yield epoch
            self.folder.bad_files(gather_lists([*self.folder.bad, *self.held_out.bad]))
            self.at.update(epoch=epoch + 1, done=0)
            self.save_last(must=epoch + 1 == epochs)                # at the very end a full disk is an error
            if epoch + 1 == epochs:
                self.say_end()

    def batches(self, items: Dataset | list, join: Callable = torch.stack) -> Iterator[tuple]:
        """This process's micro-batches that the epoch still has, without the last two columns of the items: an
        image's id, and why files were skipped on the way to it. `join` makes a batch of their first column.

        `steps` is from now on how many optimiser steps the whole run has, and `cfg` has a warm-up that fits into them.
        Before each batch the seed is set from (seed, epoch, its number, rank).
        """
        cfg, epoch = self.cfg, self.at["epoch"]
        batches = epoch_batches(len(items), self.micro, cfg.accum, cfg.seed, epoch, self.ranks, self.start)
        an_epoch = max(1, len(items) // cfg.batch)
        # in units of the present batch, which may be another than before the run was resumed
        self.at["done"] = an_epoch - len(batches) // cfg.accum
        self.at["step"], first_call = epoch * an_epoch + self.at["done"], not self.steps
        self.steps, self.an_epoch = cfg.epochs * an_epoch, an_epoch
        if first_call:
            self.say_start(len(items))
        self.start, first = 0, self.at["done"] * cfg.accum
        loader = train_loader(items, batches, cfg.workers, self.ranks, join)
        self.bar = tqdm(loader, f"epoch {epoch + 1}/{cfg.epochs}", an_epoch * cfg.accum, initial=first,
                        disable=self.ranks.rank > 0, dynamic_ncols=True)
        self.seen, self.tick = [], time.monotonic()                 # ids of the images of this optimiser step
        for self.number, (*columns, ids, skipped) in enumerate(self.bar, first):
            self.folder.bad_files(sum(skipped, []))
            self.seen += ids
            seed_all(cfg.seed, epoch, self.number, self.ranks.rank)
            yield tuple(columns)

    def say_start(self, count: int) -> None:
        """What is trained, where, on how many images (or people) and for how long, and if the warm-up is too long."""
        cfg, device, learned = self.cfg, self.ranks.device, count_parameters(self.parts["model"])
        place = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        place += f", {self.ranks.world} processes" * (self.ranks.world > 1)
        say(f"training on {place}: {learned / 1e6:,.2f} M parameters that learn, {count:,} images or people an "
            f"epoch, in {self.an_epoch:,} steps of {cfg.batch}; {self.steps - self.step:,} of {self.steps:,} "
            "steps to go")
        longest = max(1, self.steps // WARMUP_SHARE)
        if cfg.warmup > longest:
            self.cfg = replace(cfg, warmup=longest)
            say(f"the warm-up of {cfg.warmup:,} steps is cut to {longest:,}, one in {WARMUP_SHARE} of the run's; "
                "more --epochs or a smaller --batch would make it longer")

    @property
    def first_batch(self) -> bool:
        """Whether this is the run's first micro-batch, the only one that `show_batch` draws."""
        return self.step == 0 and self.number == 0 and self.folder.writes

    def show_batch(self, images: Tensor, people: list[People] | Tensor, scale: Tensor | float = 1,
                   normalised: bool = False) -> None:
        """train_batch.png of the first micro-batch, as the network sees it: images (B, 3, H, W) in [0, 1] or normalised;
        people, whose keypoints are pixels after times `scale`, a number or (B, 2), or one person each (B, K, 3) x, y, v."""
        if self.first_batch:
            by = torch.as_tensor(scale, device=images.device).expand(len(images), 2)
            labels = [torch.cat([one.keypoints * by[i], one.visible[..., None]], -1) if isinstance(one, People) else one[None]
                      for i, one in enumerate(people)]
            pixels = transforms.denormalise(images) if normalised else images
            with goes_on(path := self.folder.path / "train_batch.png"):
                draw.draw_batch(pixels.detach().float().cpu().numpy(), [one.cpu().numpy() for one in labels],
                                self.held_out.skeleton).save(path)

    def left(self) -> float:
        """Seconds to the end of the run, of its steps at the pace of the last ones and its evaluations, if one was timed."""
        cfg, later = self.cfg, range(self.at["epoch"] + 1, self.cfg.epochs + 1)
        evaluations = sum(epoch % cfg.eval_every == 0 or epoch == cfg.epochs for epoch in later)
        return (sum(self.taken) / len(self.taken) * (self.steps - self.step)
                + sum(self.evaluations) / max(1, len(self.evaluations)) * evaluations)

    def say_end(self) -> None:
        """How long it took, how good it is, where to look and what to do next."""
        path, picture = self.folder.path, shlex.quote(str(self.held_out[0].image))
        best = f", best {self.score_name} {self.at['best']:.3f}" * math.isfinite(self.at["best"])
        say(f"finished in {duration(time.monotonic() - self.began)}{best}: look at {path / 'predictions.png'} and "
            f"{path / 'curves.png'}\nnext: python eval.py {shlex.quote(str(path))} --images {picture} --process")

    def more_micro_batches(self, losses: dict[str, Tensor]) -> bool:
        """Whether gradients are still to be added up before the optimiser's step; losses: weighted terms by name."""
        if self.number % self.cfg.accum == 0:
            self.terms = {name: 0.0 for name in losses}
        for name, value in losses.items():
            self.terms[name] = self.terms[name] + value.detach() / self.cfg.accum
        return (self.number + 1) % self.cfg.accum > 0

    def stepped(self, norm: Tensor, shown: Iterable[str] = ()) -> bool:
        """After an optimiser step: check its numbers, count it, log every 20th or one an epoch, save when that is due.

        norm: the gradient's, before it was clipped; shown: the terms to log, all without it. Returns whether somebody
        asked to stop: everything is saved then.
        Raises UserError, which names the terms and the images, where a number is not finite: what was saved before is
        intact. A GradScaler has then left the step out, and tries again with a smaller scale as long as it can.
        """
        finite = torch.stack([*self.terms.values(), norm]).isfinite().tolist()      # one wait for the GPU
        scaler = self.parts["scaler"]
        if not all(finite) and not (scaler.is_enabled() and scaler.get_scale() >= 1):
            names = [name for name, good in zip(self.terms, finite) if not good] or ["the gradient"]
            last = self.folder.path / "last.pt"
            raise UserError(f"{', '.join(names[:5])} not finite at step {self.step}, images {self.seen}: try --amp no or "
                            "a lower --lr" + f"; {last} is from before" * last.exists())
        self.at.update(step=self.step + 1, done=self.at["done"] + 1)
        self.seen, now = [], time.monotonic()
        self.taken.append(now - self.tick)
        self.tick = now
        if len(self.taken) == min(10, self.steps) and not self.told:
            self.told = True
            say(f"about {duration(self.left())} to go at {sum(self.taken) / len(self.taken):.2f} s a step, and the "
                "evaluations")
        self.bar.set_description(f"epoch {self.at['epoch'] + 1}/{self.cfg.epochs}, {duration(self.left())} to go", False)
        if self.step % LOG_EVERY == 0 or self.at["done"] == self.an_epoch < LOG_EVERY:
            terms = dict(loss=sum(self.terms.values()).item())
            terms |= {name: self.terms[name].item() for name in shown or self.terms}
            self.folder.log(step=self.step, epoch=self.at["epoch"], **terms, grad_norm=float(norm),
                            lr=self.parts["optimizer"].param_groups[-1]["lr"], **self.cost())
            self.bar.set_postfix({name.removeprefix("loss_"): f"{value:.3g}" for name, value in terms.items()})
        if self.asked(self.ranks):
            self.save_last(must=True)
            say(f"stopped and saved; go on with --resume {self.folder.path}")
            return True
        if self.folder.save_is_due():
            self.save_last()
        return False

    def cost(self) -> dict[str, float]:
        """Seconds since the run began, pauses left out; images a second of the last steps; the peak of memory, GB."""
        cost = dict(seconds=round(time.monotonic() - self.began, 1), memory=peak_memory(self.ranks.device),
                    images_a_second=round(self.cfg.batch * len(self.taken) / max(sum(self.taken), 1e-9), 2))
        return {name: value for name, value in cost.items() if value is not None}

    def evaluates(self) -> bool:
        """Whether an evaluation follows: every `eval_every` epochs and after the last."""
        due = self.last or (self.at["epoch"] + 1) % self.cfg.eval_every == 0
        if due:
            self.save_last()                                        # a kill while evaluating costs nothing
            share_buffers(self.parts.get("ema", self.parts["model"]))
        self.tick = time.monotonic()
        return due

    def record(self, table: dict[str, float], predictions: list[Prediction], about: str = "") -> None:
        """The metrics on the screen and in log.jsonl, best.pt if it is the best so far, the pictures."""
        self.evaluations.append(time.monotonic() - self.tick)
        score = table[self.score_name]
        self.folder.log(step=self.step, epoch=self.at["epoch"], **table)
        said = [metrics.format_table(table), *self.held_out.caveats()]
        threshold = None if self.held_out.metric == "posetrack" else metrics.best_threshold(predictions, self.held_out)
        say(f"epoch {self.at['epoch'] + 1}{about}\n" + "\n".join(said))
        if score > self.at["best"]:
            before, self.at["best"] = self.at["best"], score
            best = self.parts["ema"].module if "ema" in self.parts else self.parts["model"]
            content = dict(self.at, skeleton=self.skeleton, model=best.state_dict(), metrics=table, threshold=threshold)
            if not self.folder.try_save("best.pt", **content):
                self.at["best"] = before                            # a later one may find room on the disk
        self.folder.draw(self.held_out, predictions, threshold or 0.3)
        wait_for_all()

    def record_split(self, split: str, about: str, table: dict[str, float]) -> None:
        """The metrics of a further split on the screen and, as `AP_crowd` and so on, in log.jsonl."""
        say(f"{about}\n{metrics.format_table(table)}")
        self.folder.log(step=self.step, epoch=self.at["epoch"], **{f"{name}_{split}": value for name, value in table.items()})

    def save_last(self, must: bool = False) -> None:
        """last.pt, to resume from. With `must` it raises UserError when the disk is full, else that is a warning."""
        save = self.folder.save if must else self.folder.try_save
        states = {name: part.state_dict() for name, part in self.parts.items()}
        save("last.pt", **self.at, skeleton=self.skeleton, **states)
