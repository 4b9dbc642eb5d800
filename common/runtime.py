"""Flags, run folders, checkpoints, resume, EMA, seeds, torchrun, logs: what every training loop needs and no
paper is about.

Resume is exact because no random state has to be saved: every random number is a function of the seed and of
where it is used (`seed_all(seed, epoch, i, rank)` before a step, `np.random.default_rng([seed, epoch, image])` for an
augmentation, `epoch_batches(seed, epoch)` for the order).
"""
import argparse
import contextlib
import copy
import difflib
import hashlib
import inspect
import json
import logging
import math
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from common import draw
from kernels.dispatch import KernelError

AMP = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ConfigT = TypeVar("ConfigT")


class UserError(ValueError):
    """A mistake that the user can mend: `main` prints the message as one line and exits with code 2."""


def run_main(main: Callable[[], None]) -> None:
    """Call `main`. What the user can mend ends in one line and exit code 2, Ctrl-C outside of training in 130.

    Exit code 0 is also that of a training which was asked to stop, saved and left: nothing went wrong.
    """
    try:
        main()
    except (UserError, KernelError, OSError, torch.OutOfMemoryError) as error:
        message = str(error).rsplit("UserError: ", 1)[-1]       # a loader process puts its traceback before it
        if isinstance(error, torch.OutOfMemoryError):
            message = f"{message.split('. ')[0]}: choose a smaller --batch, for training also a larger --accum"
        time.sleep(5 * (int(os.environ.get("RANK", 0)) > 0))    # rank 0 may say the same, which then ends us
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if not (dist.is_initialized() and re.search("Connection (closed|reset) by peer", str(error))):
            raise
        sys.exit(1)                                             # another process has ended, and said why
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():                                   # not after an error: the others may wait for us
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are a `UserError` and which knows what a mistyped flag was meant to be."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, argv: list[str] | None = None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        argv = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
        return super().parse_known_args(argv, namespace)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
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
    return dict(found)


def parse(config_class: type[ConfigT], presets: dict[str, ConfigT], description: str,
          argv: list[str] | None = None) -> tuple[ConfigT, argparse.Namespace]:
    """Command line → (config, args). Precedence: preset < resumed checkpoint < command line.

    Every field of the config is a flag, its comment the help text. args: train, preset, resume, out, device, and
    `saved`, the checkpoint that is resumed, or None.
    Raises UserError for an unknown flag, preset or value, and for a checkpoint that cannot be resumed.
    """
    first = Parser(add_help=False)                              # only these two flags count for the defaults
    first.add_argument("--preset", default="")
    first.add_argument("--resume", default="")
    known, _ = first.parse_known_args(argv)
    saved = load_checkpoint(find_last(known.resume)) if known.resume else None
    preset = known.preset or (saved["preset"] if saved else "tiny")
    if preset not in presets:
        raise UserError(f"there is no preset {preset}: choose from {', '.join(presets)}")
    defaults = config_to_resume(config_class, saved, preset) if saved else presets[preset]

    parser = Parser(description=description)
    parser.add_argument("--train", action="store_true", help="train; without it: a summary of the presets")
    parser.add_argument("--preset", default=preset, help=f"one of {', '.join(presets)} (default tiny)")
    parser.add_argument("--resume", default="", help="run folder or last.pt: go on exactly where it stopped")
    parser.add_argument("--out", default="", help="run folder (default runs/<method>-<preset>-<time>)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    comments = field_help(config_class)
    for field in fields(config_class):
        value = getattr(defaults, field.name)
        text = f"{comments.get(field.name, '')} (default {value if value != '' else 'none'})".replace("%", "%%")
        kind = (dict(action=argparse.BooleanOptionalAction) if isinstance(value, bool)
                else dict(type=type(value), metavar=type(value).__name__))
        parser.add_argument(f"--{field.name}", default=value, help=text, **kind)
    args = parser.parse_args(argv)
    config = config_class(**{field.name: getattr(args, field.name) for field in fields(config_class)})
    return config, argparse.Namespace(train=args.train or bool(args.resume), preset=preset, resume=args.resume,
                                      out=args.out, device=args.device, saved=saved)


def config_to_resume(config_class: type[ConfigT], saved: dict, preset: str) -> ConfigT:
    """The config of a checkpoint. Raises UserError if it is of another method, preset or version of the code."""
    method = Path(inspect.getfile(config_class)).stem
    if saved["method"] != method:
        raise UserError(f"the checkpoint is of method {saved['method']}: go on with python {saved['method']}.py")
    if saved["preset"] != preset:
        raise UserError(f"the checkpoint is of preset {saved['preset']}, not {preset}: leave --preset out")
    return resolve(config_class(), **saved["config"])


def resolve(config: ConfigT, **overrides: Any) -> ConfigT:
    """A copy of a config with some fields changed. Raises UserError for a field that does not exist."""
    names = {field.name for field in fields(config)}
    for name in overrides.keys() - names:
        near = difflib.get_close_matches(name, names, 1)
        raise UserError(f"there is no option {name}" + (f": did you mean {near[0]}?" if near else ""))
    return replace(config, **overrides)


def check_range(config: Any, low: float, high: float, names: str) -> None:
    """Raises UserError unless low ≤ value ≤ high for each of the fields; NaN and infinity are never right."""
    for name in names.split():
        value = getattr(config, name)
        if not (low <= value <= high and math.isfinite(value)):
            raise UserError(f"--{name} {value}: expected a number from {low} to {high}" if high < math.inf else
                            f"--{name} {value}: expected at least {low}")


def check_choice(config: Any, **choices: Iterable[str]) -> None:
    """Raises UserError unless each field has one of its choices."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"--{name} {getattr(config, name)}: choose from {', '.join(allowed)}")


def numbers(text: str) -> list[float] | None:
    """"0.1,0.2" → [0.1, 0.2]; nothing → None. Raises UserError."""
    try:
        return [float(word) for word in text.split(",")] if text else None
    except ValueError:
        raise UserError(f"expected numbers with commas between them, got {text!r}") from None


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
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:<number>")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no GPU that torch {torch.__version__} can use; take --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    return device


def init_distributed(device: str) -> Ranks:
    """Join the processes of a `torchrun` on one or many machines: NCCL on GPUs, gloo on CPUs."""
    if "LOCAL_RANK" not in os.environ:                          # RANK alone is set by some clusters, too
        return Ranks(0, 1, pick_device(device))
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    chosen = pick_device(f"cuda:{local}" if device in ("auto", "cuda") and torch.cuda.is_available() else device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return Ranks(rank, world, chosen)


def launch(train: Callable, config: Any, args: argparse.Namespace, processes: int) -> None:
    """Call train(config, args); on a CPU in several processes, joined as torchrun would join them.

    Layers of a small model are too small to share: two processes of one thread are faster than one of two threads.
    Under torchrun, on a GPU, or with one process it is a plain call; also on Windows and macOS, where gloo depends on
    how torch was built and how the network is set up.
    """
    alone = processes == 1 or sys.platform != "linux" or "LOCAL_RANK" in os.environ
    if alone or pick_device(args.device).type != "cpu":
        return train(config, args)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    args.saved = None                                           # sent along, its tensors would be shared memory
    group = torch.multiprocessing.start_processes(
        _one_of_many, (train, config, args, processes, port), processes, join=False, start_method="spawn")

    def pass_on(number: int, frame: Any) -> None:
        for child in group.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    try:
        while not group.join():
            pass
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name:
            raise UserError(f"a process was ended by {error.signal_name}: was the memory full? Go on with --resume, "
                            "a smaller --batch or --processes 1") from None
        sys.exit(error.exit_code)                               # it has said why


def _one_of_many(rank: int, train: Callable, config: Any, args: argparse.Namespace, world: int, port: int) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                       MASTER_PORT=str(port))
    torch.set_num_threads(max(1, torch.get_num_threads() // world))

    def main() -> None:
        if args.resume:                                         # a copy of its own: an optimiser goes on in these tensors
            args.saved = load_checkpoint(find_last(args.resume))
        train(config, args)

    run_main(main)


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
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)     # a copy of them less a step
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, [ranks.device])


def share_buffers(module: nn.Module) -> None:
    """Rank 0's buffers everywhere: on CPUs each process has norm statistics of its own, and rank 0's are saved."""
    for buffer in module.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)


def autocast(device: torch.device, amp: str, keep_casts: bool = True) -> torch.autocast:
    """Mixed precision on a GPU (amp: no, bf16 or fp16); a CPU always computes in float32.

    keep_casts: whether the half-precision copies of weights stay in memory up to the end, to be used again.
    """
    return torch.autocast(device.type, AMP[amp], enabled=amp != "no" and device.type == "cuda",
                          cache_enabled=keep_casts)


def measured_speed(device: torch.device, amp: str) -> float:
    """FLOP per second of a convolution, to say before long work about how long it takes."""
    conv, x = nn.Conv2d(256, 256, 3, padding=1).to(device), torch.zeros(1, 256, 64, 64, device=device)
    for _ in range(2):                                          # the first call sets things up
        start = time.perf_counter()
        with torch.no_grad(), autocast(device, amp):
            conv(x).sum().item()
        seconds = time.perf_counter() - start
    return 2 * 9 * 256 ** 2 * 64 ** 2 / seconds


def say_hours(what: str, flop: float, device: torch.device, amp: str) -> None:
    """Before long work: its FLOPs and about how long it takes; short work is not worth a word."""
    seconds = flop / measured_speed(device, amp)
    if seconds > 120:
        print(f"{what}: {flop / 1e12:,.0f} TFLOP, about {seconds / 3600:.1f} hours at the speed of this machine")


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, so that N GPUs give the gradient that one would."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def check_finite(losses: dict[str, Tensor]) -> None:
    """Raises FloatingPointError with the names of the first five losses that are not finite."""
    finite = torch.stack([*losses.values()]).isfinite().tolist()        # one wait for the GPU, not one per term
    if not all(finite):
        raise FloatingPointError(", ".join([name for name, good in zip(losses, finite) if not good][:5]))


def gather_lists(part: list) -> list:
    """The parts of all processes behind one another, rank by rank, on every process."""
    if not dist.is_initialized():
        return part
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [item for one in parts for item in one]


def micro_batch(config: Any, ranks: Ranks) -> int:
    """Images per process and forward pass, of `batch` per optimiser step. Raises UserError if they do not come out even."""
    shares = config.accum * ranks.world
    if config.batch % shares:
        raise UserError(f"--batch {config.batch} does not split over {ranks.world} processes x {config.accum} "
                        "micro-batches: choose a multiple")
    return config.batch // shares


def count_parameters(model: nn.Module) -> int:
    """Numbers that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def seed_all(*where: int) -> None:
    """Seed python, numpy and torch from any numbers, e.g. (seed, step, rank)."""
    seed = int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def epoch_batches(count: int, micro: int, accum: int, seed: int, epoch: int, ranks: Ranks) -> list[list[int]]:
    """This process's micro-batches of an epoch over `count` images, in a new order each epoch.

    The order is one for all processes; an optimiser step takes its next micro·world·accum images, and each process
    every world-th of them, so N processes see together what one would see. The rest that fills no step waits for
    the next epoch; a set smaller than one step is repeated until it fills one.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    step = micro * ranks.world * accum
    order = np.resize(order, max(step, count // step * step))
    return [part[ranks.rank::ranks.world].tolist() for part in order.reshape(-1, micro * ranks.world)]


class Stopper:
    """Turns Ctrl-C and SIGTERM into a question that the loop asks after each step; a second Ctrl-C is immediate."""

    def __init__(self):
        self.asked = math.inf                                   # when
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                    # torch makes a RuntimeError of a failed write
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        before = ", what was saved there before is intact" if path.exists() else ""
        raise UserError(f"cannot save {path} (is the disk full?): {reason}{before}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


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
    ours = isinstance(content, dict) and {"method", "preset", "config", "skeleton", "model"} <= content.keys()
    return content if ours else None


def states(parts: dict) -> dict:
    """{name: part.state_dict()} of everything that a checkpoint keeps."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore(parts: dict, saved: dict) -> None:
    """Put the states of a checkpoint back. Raises UserError when it was made by another model.

    Of an optimiser that is what it remembers of each weight; its settings (learning rate, ...) stay those of the
    config, where a flag may have changed them.
    """
    if missing := parts.keys() - saved.keys():
        raise UserError(f"the checkpoint has no {', '.join(sorted(missing))}: last.pt is to go on from, best.pt for eval.py")
    for name, part in parts.items():
        settings = [{k: v for k, v in group.items() if k != "params"} for group in getattr(part, "param_groups", [])]
        try:
            part.load_state_dict(saved[name])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"the checkpoint does not fit: its {name} differs ({reason}); resume with the flags that "
                            "it was made with") from None
        for group, own in zip(getattr(part, "param_groups", []), settings):
            group.update(own)


def ignore_signals(worker: int) -> None:
    """For loader processes: Ctrl-C and SIGTERM reach them too, but it is the loop that has to end in order."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def find_last(where: str) -> Path:
    """A run folder or a file → the file to resume from."""
    path = Path(where)
    return path / "last.pt" if path.is_dir() else path


def make_folder(path: Path) -> Path:
    """The folder, made if need be. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error}; choose another with --out") from None
    return path


@contextlib.contextmanager
def goes_on(path: Path) -> Iterator[None]:
    """A file that cannot be written in the middle of a run is a warning: the disk may have room again later."""
    try:
        yield
    except (OSError, UserError) as error:
        print(f"warning: {path} is not written: {' '.join(str(error).split())}", file=sys.stderr)


class Run:
    """A run folder: config.json, log.jsonl, curves.png, predictions.png, last.pt, best.pt. Only rank 0 writes.

    Raises UserError if the folder cannot be written, or holds a run that is not the one to resume.
    """

    def __init__(self, method: str, config: Any, args: argparse.Namespace, ranks: Ranks):
        self.writes = ranks.rank == 0
        name = f"{method}-{args.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        last = find_last(args.resume)
        self.folder = Path(args.out) if args.out else last.parent if args.resume else Path("runs") / name
        self.header = dict(method=method, preset=args.preset, config=asdict(config))
        self.rows: list[dict] = args.saved["rows"] if args.resume else []
        self.last_save = time.monotonic()
        if self.writes:
            make_folder(self.folder)
            if (self.folder / "last.pt").exists() and not (args.resume and last.parent.samefile(self.folder)):
                raise UserError(f"{self.folder} holds another run: go on with --resume {self.folder}, or choose "
                                "another --out")
            # without the rows that a killed run wrote after its last checkpoint: it will write them again
            self._write("log.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows), "w")
            self._write("config.json", json.dumps(self.header, indent=1) + "\n", "w")
        self.bad = {row["bad"] for row in self.rows if "bad" in row}

    def _write(self, name: str, text: str, mode: str) -> None:
        with goes_on(self.folder / name), open(self.folder / name, mode, encoding="utf-8") as file:
            file.write(text)

    def log(self, **row: float | int | str) -> None:
        """Append one row to log.jsonl; values are plain numbers and text."""
        self.rows.append(row)
        if self.writes:
            self._write("log.jsonl", json.dumps(row) + "\n", "a")

    def say(self, text: str) -> None:
        if self.writes:
            tqdm.write(text)

    def bad_files(self, messages: Iterable[str]) -> None:
        """Name each unreadable file once, on the screen and in log.jsonl."""
        for message in dict.fromkeys(messages):
            if message not in self.bad:
                self.bad.add(message)
                tqdm.write(f"bad file ({len(self.bad)} so far): {message}")
                self.log(step=self.rows[-1]["step"] if self.rows else 0, bad=message)

    def not_finite(self, what: str, step: int, images: list) -> UserError:
        """The error that ends a run whose numbers are not finite."""
        last = self.folder / "last.pt"
        return UserError(f"{what} not finite at step {step}, images {images}: try --amp no or a lower --lr"
                         + f"; {last} is from before" * last.exists())

    def save_is_due(self, seconds: float = 600) -> bool:
        """True when the last save is long ago, so that a crash costs minutes; only ever on the writing process."""
        return self.writes and time.monotonic() - self.last_save > seconds

    def draw(self, data: Any, predictions: list) -> None:
        """curves.png of the log, predictions.png of the first images of a dataset with people."""
        if self.writes:
            with goes_on(self.folder / "curves.png"):
                draw.plot_curves([row for row in self.rows if "bad" not in row], self.folder / "curves.png")
            with goes_on(self.folder / "predictions.png"):
                draw.draw_predictions(data, predictions, count=12).save(self.folder / "predictions.png")

    def save(self, name: str, **content: Any) -> None:
        """Raises UserError; the file from before is then intact."""
        if self.writes:
            save_checkpoint(self.folder / name, {**self.header, "rows": self.rows, **content})
            self.last_save = time.monotonic()

    def try_save(self, name: str, **content: Any) -> None:
        """As `save`, in the middle of a run: a full disk is said, and the run goes on."""
        with goes_on(self.folder / name):
            self.save(name, **content)
