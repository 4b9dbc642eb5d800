"""The command line of every program here: flags made of a dataclass, checks of their values, processes, errors.

A method's `class Config(RunConfig)` holds its paper's numbers; every field is a flag and the comment behind it the
flag's help. Precedence: preset < resumed checkpoint < command line.
"""
import argparse
import contextlib
import difflib
import errno
import functools
import inspect
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist

from common.errors import UserError
from common.ranks import AMP, STOP_SIGNALS, pick_device
from common.weights import load_checkpoint
from kernels.dispatch import KernelError

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class RunConfig:
    """What a run needs and no paper is about. A preset changes the default of any field."""
    data: str = "puppets"          # puppets (made on first use) or a dataset's folder, see data/README.md
    category: str = ""             # the category to learn, where several in the file have keypoints of their own
    sigmas: str = ""               # OKS sigmas of your own keypoints, e.g. 0.03,0.08,0.08
    val_share: float = 0.0         # share of the training pictures to evaluate on, where there is no val split
    fresh_head: bool = False       # of start weights (--init), start anew all that depends on the keypoints
    accum: int = 1                 # micro-batches per optimiser step
    amp: str = "no"                # no, bf16 or fp16 (old GPUs); a CPU always runs float32
    processes: int = 1             # training processes when there is no GPU and no torchrun
    workers: int = 4               # image loading processes per GPU; 0: none
    eval_every: int = 1            # epochs between evaluations
    eval_batch: int = 32           # images per evaluation batch
    seed: int = 0                  # all random numbers follow from it
    patience: int = 120            # seconds that processes wait in a step for one that died or hangs

    def __post_init__(self):
        """Raises UserError for values that no run could use."""
        check_choice(self, amp=AMP)
        check_range(self, 1, math.inf, "accum processes eval_every eval_batch patience")
        check_range(self, 0, math.inf, "workers seed")
        check_range(self, 0, 0.9, "val_share")
        parse_numbers(self.sigmas)


def leave_without_loader() -> None:
    """End at once: the loader would complain again on its way out."""
    with contextlib.suppress(SystemExit):
        leave(f"a loader process was killed: was the memory full? Use fewer --workers or a smaller --batch; {RESUME}")
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(2)


def run_main(main: Callable[[], None]) -> None:
    """Call `main`. What the user can fix ends in one line and exit code 2, Ctrl-C outside of training in 130.

    Exit code 0 is also that of a training which was asked to stop, saved and left: nothing went wrong.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")       # names of files may have any bytes
    try:
        main()
    except BrokenPipeError:                                     # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ConnectionError:                                     # while it sent a batch
        leave_without_loader()
    except (UserError, KernelError, OSError, torch.OutOfMemoryError) as error:
        message = str(error).rsplit("UserError: ", 1)[-1]       # a loader process puts its traceback before it
        if isinstance(error, torch.OutOfMemoryError):
            message = f"{message.split('. ')[0]}: {SMALLER}"
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            message = f"{message}: allow more open files (ulimit -n), or use fewer --workers"
        leave(message)
    except MemoryError:
        leave(MEMORY)
    except RuntimeError as error:
        text = str(error)
        if "DataLoader worker" in text:
            leave_without_loader()
        for pattern, message in MEANINGS.items():
            if re.search(pattern, text):
                leave(message)
        if not (dist.is_initialized() and re.search("Connection (closed|reset) by peer", text)):
            raise
        sys.exit(1)                                             # another process has ended, and said why
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for process in multiprocessing.active_children():       # loaders ignore SIGTERM, and would be waited for
            if process.daemon:
                process.kill()
    if dist.is_initialized():                                   # not after an error: the others may wait for us
        dist.destroy_process_group()


class Lasting:
    """A text stream that writes into the void once nobody reads it any more."""

    def __init__(self, stream: IO):
        self.stream = stream

    def write(self, text: str) -> None:
        self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable, *args: str) -> None:
        try:
            call(*args)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def keep_streams() -> None:
    """For a training: it goes on when its terminal, or the program that reads its output, has gone."""
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)


SMALLER = "choose a smaller --batch, for training also a larger --accum"
MEMORY = f"the memory is full: {SMALLER}"
RESUME = "a training goes on with --resume"
MEANINGS = {                                                    # of a RuntimeError, by what it says
    "Too many open files": "too many open files: allow more (ulimit -n), or use fewer --workers",
    "can't allocate memory|not enough memory": MEMORY,
    "[Tt]imed out": f"a process did not answer for --patience seconds: it hangs, or died elsewhere; {RESUME}"}


def leave(message: str) -> None:
    """One line, and exit code 2."""
    time.sleep(5 * (int(os.environ.get("RANK", 0)) > 0))        # rank 0 may say the same, which then ends us
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def run_method(config_class: type[ConfigT], presets: dict[str, ConfigT], about: str, train: Callable,
               summary: Callable[[], str], run_tables: Callable) -> None:
    """What `python <method>.py` does: --train calls train(config, args), --table run_tables(config_class, presets, args);
    without them, what the file is and its presets."""
    def main() -> None:
        config, args = parse(config_class, presets, about)
        if args.table:
            flags = [with_underscores(word).split("=")[0] for word in sys.argv[1:] if word.startswith("--")]
            if others := sorted({*flags} - {"--table", "--rows", "--seeds", "--show"}):
                raise UserError(f"{' '.join(others)}: the settings of a table are its own; beside --table go only --rows, "
                                "--seeds and --show")
            run_tables(config_class, presets, args)
        elif args.train:
            keep_streams()
            launch(train, config, args)
        else:
            print(about, flush=True)                            # before the seconds that the summary takes
            print(summary())
            if flags := [word for word in sys.argv[1:] if word.startswith("--")]:
                print(f"\n{' '.join(flags)}: without --train the presets are shown as they are")

    run_main(main)


# ---------------------------------------------------------------- flags

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
    return "--" + re.sub("^no_", "no-", name.replace("-", "_")) + equals + value


@functools.cache                # reading the source again takes a tenth of a second
def field_help(config_class: type) -> dict[str, str]:
    """The comment behind each field of a dataclass and of those that it inherits from, by field name."""
    text = "\n".join(inspect.getsource(one) for one in config_class.__mro__ if is_dataclass(one))
    return dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", text, re.MULTILINE))


def parse(config_class: type[ConfigT], presets: dict[str, ConfigT], description: str,
          argv: list[str] | None = None) -> tuple[ConfigT, argparse.Namespace]:
    """Command line → (config, args). Precedence: preset < resumed checkpoint < command line.

    Every field of the config is a flag, its comment the help text. args: train, preset, resume, out, device, table,
    rows, seeds, show, and `saved`, the checkpoint that is resumed, or None.
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
    parser.add_argument("--preset", default=preset, help=f"one of {', '.join(presets)} (default tiny); "
                        f"each has defaults of its own: those below are of {preset}")
    parser.add_argument("--resume", default="", help="run folder or last.pt: go on exactly where it stopped")
    parser.add_argument("--table", default="", help="train the rows of a table of the paper on the embedded data and set "
                        "them beside its figures: 4, 2b, fig3, ... or all; what is there is not trained again")
    parser.add_argument("--rows", default="", help="of the table, with commas (default all)")
    parser.add_argument("--seeds", type=int, default=3, help="of each row: 0, 1, ... (default 3)")
    parser.add_argument("--show", action="store_true", help="of a table: print what is there, without training")
    parser.add_argument("--out", default="", help="run folder (default runs/<method>-<preset>-<time>)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    comments, shared = field_help(config_class), {field.name for field in fields(RunConfig)}
    for field in sorted(fields(config_class), key=lambda field: field.name in shared):          # the paper's own first
        value = getattr(defaults, field.name)
        text = f"{comments.get(field.name, '')} (default {value if value != '' else 'none'})".replace("%", "%%")
        kind = (dict(action=argparse.BooleanOptionalAction) if isinstance(value, bool)
                else dict(type=type(value), metavar=type(value).__name__))
        parser.add_argument(f"--{field.name}", default=value, help=text, **kind)
    args = parser.parse_args(argv)
    config = config_class(**{field.name: getattr(args, field.name) for field in fields(config_class)})
    if (args.rows or args.show) and not args.table:
        raise UserError("--rows and --show are about a table of the paper: say which with --table")
    own = {name: getattr(args, name) for name in ("resume", "out", "device", "table", "rows", "seeds", "show")}
    return config, argparse.Namespace(train=args.train or bool(args.resume), preset=preset, saved=saved, **own)


def config_to_resume(config_class: type[ConfigT], saved: dict, preset: str) -> ConfigT:
    """The config of a checkpoint. Raises UserError if it is of another method, preset or version of the code."""
    method = Path(inspect.getfile(config_class)).stem
    if saved["method"] != method:
        raise UserError(f"the checkpoint is of method {saved['method']}: go on with python {saved['method']}.py")
    if saved["preset"] != preset:
        raise UserError(f"the checkpoint is of preset {saved['preset']}, not {preset}: leave --preset out")
    return config_of(config_class(), saved)


def config_of(defaults: ConfigT, saved: dict) -> ConfigT:
    """The config of a checkpoint of ours, in which a field that is younger than its run is off.

    Raises UserError for options and values that this code does not know.
    """
    known = vars(defaults)
    if older := sorted(map(str, saved["config"].keys() - known.keys())):
        raise UserError(f"the checkpoint was made by another version of {saved['method']}.py: this one has no option "
                        f"{', '.join(older)}")
    for name, value in saved["config"].items():
        if type(value) is not type(known[name]) and (type(value), type(known[name])) != (int, float):
            raise UserError(f"the checkpoint is damaged: its {name} is {value!r}")
    return replace(defaults, **saved["config"])


def resolve(config: ConfigT, **overrides: Any) -> ConfigT:
    """A copy of a config with some fields changed. Raises UserError for a field that does not exist."""
    names = {field.name for field in fields(config)}
    for name in overrides.keys() - names:
        near = difflib.get_close_matches(name, names, 1)
        raise UserError(f"there is no option {name}" + (f": did you mean {near[0]}?" if near else ""))
    return replace(config, **overrides)


LARGEST = 10 ** 12         # more than any setting can mean, and little enough to be squared


def check_range(config: Any, low: float, high: float, names: str) -> None:
    """Raises UserError unless low ≤ value ≤ high for each of the fields; NaN and infinity are never right."""
    for name in names.split():
        value = getattr(config, name)
        if not low <= value <= min(high, LARGEST):
            raise UserError(f"--{name} {value}: expected at least {low}" if high == math.inf and not value > LARGEST else
                            f"--{name} {value}: expected a number from {low} to {min(high, LARGEST)}")


def check_choice(config: Any, **choices: Iterable[str]) -> None:
    """Raises UserError unless each field has one of its choices."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"--{name} {getattr(config, name)}: choose from {', '.join(allowed)}")


def parse_numbers(text: str) -> list[float] | None:
    """"0.1,0.2" → [0.1, 0.2]; nothing → None. Raises UserError."""
    try:
        return [float(word) for word in text.split(",")] if text else None
    except ValueError:
        raise UserError(f"expected numbers with commas between them, got {text!r}") from None


# ---------------------------------------------------------------- processes

def find_last(where: str) -> Path:
    """A run folder or a file → the file to resume from."""
    path = Path(where)
    return path / "last.pt" if path.is_dir() else path


def launch(train: Callable, config: RunConfig, args: argparse.Namespace) -> None:
    """Call train(config, args); on a CPU in several processes, joined as torchrun would join them.

    Layers of a small model are too small to share: two processes of one thread are faster than one of two threads.
    Under torchrun, on a GPU, or with one process it is a plain call; also on Windows and macOS, where gloo depends on
    how torch was built and how the network is set up.
    """
    processes = config.processes
    alone = processes == 1 or sys.platform != "linux" or "LOCAL_RANK" in os.environ
    if alone or pick_device(args.device).type != "cpu":
        return train(config, args)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    args.saved = None                                           # sent along, its tensors would be shared memory
    asked: list[int] = []
    with tempfile.TemporaryDirectory() as meeting:              # a file to meet at: a free port may be taken meanwhile
        group = torch.multiprocessing.start_processes(
            _one_of_many, (train, config, args, processes, f"{meeting}/here"), processes, join=False,
            start_method="spawn")

        def pass_on(number: int, frame: Any) -> None:
            asked.append(number)
            for child in group.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)

        for number in STOP_SIGNALS:
            signal.signal(number, pass_on)
        try:
            while not group.join():
                pass
        except torch.multiprocessing.ProcessExitedException as error:
            if error.signal_name and asked:
                print("stopped before the first step: nothing to save", file=sys.stderr)
                sys.exit(128 + asked[0])
            if error.signal_name:
                raise UserError(f"a process was ended by {error.signal_name}: was the memory full? Go on with --resume, "
                                "a smaller --batch or --processes 1") from None
            sys.exit(error.exit_code)                           # it has said why


def _one_of_many(rank: int, train: Callable, config: RunConfig, args: argparse.Namespace, world: int,
                 meeting: str) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), POSE_MEETING=f"file://{meeting}")
    torch.set_num_threads(max(1, torch.get_num_threads() // world))

    def main() -> None:
        keep_streams()
        if args.resume:                                         # a copy of its own: the optimiser goes on in it
            args.saved = load_checkpoint(find_last(args.resume))
        train(config, args)

    run_main(main)
