"""Flags, run folders, checkpoints, resume, EMA, seeds, torchrun, logs: what every training loop needs and no
paper is about.

Resume is exact because no random state has to be saved: every random number is a function of the seed and of
where it is used (`seed_all(seed, step, rank)` before a step, `np.random.default_rng([seed, epoch, image])` for an
augmentation, `epoch_batches(seed, epoch)` for the order).
"""
import argparse
import contextlib
import copy
import difflib
import hashlib
import inspect
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from common import draw

AMP = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ConfigT = TypeVar("ConfigT")


class UserError(ValueError):
    """A mistake that the user can mend: `main` prints the message as one line and exits with code 2."""


def run_main(main: Callable[[], None]) -> None:
    """Call `main`; a `UserError` ends in one line and exit code 2, a second Ctrl-C in exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a `UserError` and which knows what a mistyped flag was meant to be."""

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        argv = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
            raise UserError(f"unknown flag {unknown[0]}" + (f": did you mean {near[0]}?" if near else "; see --help"))
        return args

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")


def with_underscores(word: str) -> str:
    """--lr-backbone=1 → --lr_backbone=1, so that both spellings work; --no-fdr stays."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    negation = "no-" if name.startswith(("no-", "no_")) else ""
    return "--" + negation + name[len(negation):].replace("-", "_") + equals + value


def field_help(config_class: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, by field name."""
    found = re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(config_class), re.MULTILINE)
    return {name: comment.replace("%", "%%") for name, comment in found}


def parse(config_class: type[ConfigT], presets: dict[str, ConfigT], description: str,
          argv: list[str] | None = None) -> tuple[ConfigT, argparse.Namespace]:
    """Command line → (config, args). Precedence: preset < resumed checkpoint < command line.

    Every field of the config is a flag, its comment the help text. args: train, preset, resume, out, device, and
    `saved`, the checkpoint that is resumed, or None.
    Raises UserError for an unknown flag, preset or value.
    """
    first = Parser(add_help=False)
    first.parse_args = first.parse_known_args                   # only these two flags count for the defaults
    first.add_argument("--preset", default=None)
    first.add_argument("--resume", default="")
    known, _ = first.parse_known_args([with_underscores(w) for w in (sys.argv[1:] if argv is None else argv)])
    saved = load_checkpoint(find_last(known.resume)) if known.resume else None
    preset = known.preset or (saved["preset"] if saved else "tiny")
    if preset not in presets:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(presets)}")
    defaults = config_class(**saved["config"]) if saved else presets[preset]

    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train; without it: a summary of the presets")
    parser.add_argument("--preset", default=preset, help=f"one of {', '.join(presets)} (default tiny)")
    parser.add_argument("--resume", default="", help="run folder or last.pt: go on exactly where it stopped")
    parser.add_argument("--out", default="", help="run folder (default runs/<method>-<preset>-<time>)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    comments = field_help(config_class)
    for field in fields(config_class):
        value = getattr(defaults, field.name)
        text = f"{comments.get(field.name, '')} (default {value if value != '' else 'none'})"
        kind = (dict(action=argparse.BooleanOptionalAction) if isinstance(value, bool)
                else dict(type=type(value), metavar=type(value).__name__))
        parser.add_argument(f"--{field.name}", default=value, help=text, **kind)
    args = parser.parse_args(argv)
    config = config_class(**{field.name: getattr(args, field.name) for field in fields(config_class)})
    return config, argparse.Namespace(train=args.train or bool(args.resume), preset=preset, resume=args.resume,
                                      out=args.out, device=args.device, saved=saved)


# ---------------------------------------------------------------------------------------------------------
# Processes, seeds, order
# ---------------------------------------------------------------------------------------------------------


class Ranks(NamedTuple):
    """Who this process is among those of a `torchrun`; (0, 1, device) when it runs alone."""
    rank: int
    world: int
    device: torch.device


def pick_device(name: str) -> torch.device:
    """auto → the first GPU if there is one. Raises UserError when a GPU is asked for but absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:<number>") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no GPU that torch {torch.__version__} can use; take --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    return device


def init_distributed(device: str) -> Ranks:
    """Join the processes of a `torchrun` on one or many machines: NCCL on GPUs, gloo on CPUs."""
    if "RANK" not in os.environ:
        return Ranks(0, 1, pick_device(device))
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    chosen = pick_device(f"cuda:{local}" if device in ("auto", "cuda") and torch.cuda.is_available() else device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Ranks(rank, world, chosen)


@contextlib.contextmanager
def rank_zero_first(ranks: Ranks) -> Iterator[None]:
    """Rank 0 goes through the block alone (it makes or fetches files), then the others find them there."""
    if ranks.rank > 0:
        dist.barrier()
    yield
    if ranks.world > 1 and ranks.rank == 0:
        dist.barrier()


def distribute(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model to call in training: gradients are averaged, and on GPUs norms computed, over all processes."""
    if ranks.world == 1:
        return model
    if ranks.device.type == "cpu":
        return nn.parallel.DistributedDataParallel(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, [ranks.device])


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision on a GPU (amp: no, bf16 or fp16); a CPU always computes in float32."""
    return torch.autocast(device.type, AMP[amp], enabled=amp != "no" and device.type == "cuda")


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, so that N GPUs give the gradient that one would."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def gather_lists(part: list) -> list:
    """The parts of all processes behind one another, rank by rank, on every process."""
    if not dist.is_initialized():
        return part
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [item for one in parts for item in one]


def seed_all(*where: int) -> None:
    """Seed python, numpy and torch from any numbers, e.g. (seed, step, rank)."""
    seed = int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def epoch_batches(count: int, batch: int, seed: int, epoch: int, ranks: Ranks) -> list[list[int]]:
    """This process's batches of an epoch over `count` images, in a new order each epoch.

    The order is one for all processes; each takes every world-th index of a global batch of batch·world images,
    so N processes see together what one would see. The rest that fills no batch waits for the next epoch; a set
    smaller than one batch is repeated until it fills one.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    size = batch * ranks.world
    order = np.resize(order, max(size, count // size * size))
    return [part[ranks.rank::ranks.world].tolist() for part in order.reshape(-1, size)]


class Stopper:
    """Turns Ctrl-C and SIGTERM into a question that the loop asks after each step; a second Ctrl-C is immediate."""

    def __init__(self):
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self, ranks: Ranks) -> bool:
        """True on every process as soon as one was asked to stop."""
        if ranks.world == 1:
            return self.asked
        return bool(mean_over_ranks(torch.tensor(float(self.asked), device=ranks.device)) > 0)


# ---------------------------------------------------------------------------------------------------------
# Weight average
# ---------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------
# Checkpoints and run folders
# ---------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, content: dict) -> None:
    """Write tensors and plain values beside `path`, then rename: a kill or a full disk leaves the old file whole.

    Raises UserError when the disk is full or the folder cannot be written; the file from before is then intact.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                    # torch reports a failed write as RuntimeError
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot save {path}: {error}. What was saved there before is intact; free some space "
                        "and go on with --resume") from None


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of ours: a dict with method, preset, config, skeleton, model, ... and no code.

    Raises UserError for a missing, truncated or foreign file.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    content = read_own(path)
    if content is None:
        raise UserError(f"{path} is no checkpoint of ours, or it is cut short or damaged")
    return content


def read_own(path: Path) -> dict | None:
    """A checkpoint of ours, or None if the file is something else (released weights, a damaged file)."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                                           # whoever reads it next says what it is
        return None
    return content if isinstance(content, dict) and "method" in content else None


def states(parts: dict) -> dict:
    """{name: part.state_dict()} of everything that a checkpoint keeps."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore(parts: dict, saved: dict) -> None:
    """Put the states of a checkpoint back. Raises UserError when it was made by another model."""
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit: its {name} differs ({str(error).splitlines()[0]} "
                            f"{''.join(str(error).splitlines()[1:2]).strip()[:200]}); resume with the flags it was "
                            "made with, from last.pt") from None


def numbers(text: str) -> list[float] | None:
    """"0.1,0.2" → [0.1, 0.2]; nothing → None. Raises UserError."""
    try:
        return [float(word) for word in text.split(",")] if text else None
    except ValueError:
        raise UserError(f"expected numbers with commas between them, got {text!r}") from None


def ignore_signals(worker: int) -> None:
    """For loader processes: Ctrl-C and SIGTERM reach them too, but it is the loop that has to end in order."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def find_last(where: str) -> Path:
    """A run folder or a file → the file to resume from."""
    path = Path(where)
    return path / "last.pt" if path.is_dir() else path


class Run:
    """A run folder: config.json, log.jsonl, curves.png, predictions.png, last.pt, best.pt. Only rank 0 writes."""

    def __init__(self, method: str, config: Any, args: argparse.Namespace, ranks: Ranks):
        self.writes = ranks.rank == 0
        name = f"{method}-{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.out) if args.out else (
            find_last(args.resume).parent if args.resume else Path("runs") / name)
        self.header = dict(method=method, preset=args.preset, config=asdict(config))
        self.rows: list[dict] = []
        self.last_save = time.monotonic()
        self.known_bad: set[str] = set()
        if not self.writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(json.dumps(self.header, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.folder}: {error}; choose another with --out") from None
        if args.resume:
            self._keep_rows_up_to(args.saved["step"])

    def _keep_rows_up_to(self, step: int) -> None:
        """Forget what a killed run logged after its last checkpoint: the resumed run will log it again."""
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        for line in lines:
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:                        # the line that the kill cut in half
                continue
        self.rows = [row for row in self.rows if row["step"] <= step]
        log.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def log(self, **row: float | int | str) -> None:
        """Append one row to log.jsonl; values are plain numbers and text."""
        self.rows.append(row)
        if self.writes:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def say(self, text: str) -> None:
        if self.writes:
            tqdm.write(text)

    def skipped(self, reasons: Sequence[Sequence[str]]) -> None:
        """Name each unreadable file once, on the screen and in log.jsonl."""
        for reason in {text for texts in reasons for text in texts} - self.known_bad:
            self.known_bad.add(reason)
            self.say(f"skipped ({len(self.known_bad)} so far): {reason}")
            self.log(step=self.rows[-1]["step"] if self.rows else 0, skipped=reason)

    def save_is_due(self, seconds: float = 600) -> bool:
        """True when the last save is long ago, so that a crash costs minutes; only ever on the writing process."""
        return self.writes and time.monotonic() - self.last_save > seconds

    def draw(self, data: Any, predictions: list) -> None:
        """curves.png of the log, predictions.png of the first images of a dataset with people."""
        if self.writes:
            draw.plot_curves([row for row in self.rows if "skipped" not in row], self.folder / "curves.png")
            draw.draw_predictions(data, predictions, count=12).save(self.folder / "predictions.png")

    def save(self, name: str, **content: Any) -> None:
        if self.writes:
            save_checkpoint(self.folder / name, {**self.header, **content})
            self.last_save = time.monotonic()

    def try_save(self, name: str, **content: Any) -> None:
        """As `save`, in the middle of a run: a full disk is said, and the run goes on."""
        try:
            self.save(name, **content)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)


def resolve(config: ConfigT, **overrides: Any) -> ConfigT:
    """A copy of a config with some fields changed. Raises UserError for a field that does not exist."""
    names = {field.name for field in fields(config)}
    for name in overrides.keys() - names:
        near = difflib.get_close_matches(name, names, 1)
        raise UserError(f"there is no option {name}" + (f": did you mean {near[0]}?" if near else ""))
    return replace(config, **overrides)
