"""The rows of a paper's ablation tables as data, each method file has its own as `TABLES`, and the command that trains
them on the embedded data and sets ours beside the paper's:

    python detrpose.py --table 4 --rows 1,3 --seeds 3

A run is a training like any other, in a process of its own, with the tiny preset, the flags of its table and its row,
and a seed. What remains of it is docs/tables/<method>/<settings>-s<seed>.json; rows of several tables that are the same
training share it. A run of other settings than a row has now stays, and is shown apart.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.special import stdtrit

from common import draw
from common.cli import RunConfig, parse
from common.errors import UserError
from common.ranks import STOP_SIGNALS
from common.records import whole

FOLDER = Path(__file__).parents[1] / "docs" / "tables"
PRESENT = "{}"             # of the settings that a row has now, which differ from themselves in nothing


@dataclass(frozen=True)
class Row:
    """One row of a table. Flags are words of the method's command line."""
    what: str
    figure: float | None                # the paper's, in percent; None: it shows curves alone
    flags: str = ""                     # added to the table's, for the preset of the paper
    puppets: str | None = ""            # added to the table's, for the tiny preset; None: cannot be had there
    versus: int = 0                     # number of the row, from 1, that it is compared with; 0: none
    default: bool = False               # the paper's own choice
    missing: str = ""                   # why a row cannot be had here
    more: dict[str, float | None] = field(default_factory=dict)     # further figures, by metric; None: not in the paper


@dataclass(frozen=True)
class Table:
    """A table of the paper: what its rows share, and the rows in the paper's order."""
    title: str
    rows: list[Row]
    preset: str                         # of the paper's model
    metric: str                         # whose figures the rows have: AP, Mean, ...
    flags: str = ""                     # of all rows, for the preset of the paper
    puppets: str = ""                   # of all rows, for the tiny preset; with its epochs a row takes some minutes
    split: str = "val"                  # of the embedded data


@dataclass(frozen=True)
class Difference:
    """Mean over n paired seeds, and half its 95 % interval (Student's t), which is infinite for one pair."""
    mean: float
    half: float

    def verdict(self, paper: float | None) -> str:
        """Of a difference in the paper. An interval that holds zero says nothing: 'not seen'."""
        if paper is None or abs(self.mean) <= self.half:
            return "–" if paper is None else "not seen"
        return "agrees" if np.sign(paper) == np.sign(self.mean) else "contrary"

    def __str__(self) -> str:
        interval = f" [{signed(self.mean - self.half)}, {signed(self.mean + self.half)}]"
        return signed(self.mean) + interval * math.isfinite(self.half)


def difference(ours: dict[int, float], others: dict[int, float]) -> Difference | None:
    """Of two rows' values by seed; None if no seed has both."""
    pairs = [ours[seed] - others[seed] for seed in sorted(ours.keys() & others.keys())]
    if not pairs:
        return None
    n = len(pairs)
    half = stdtrit(n - 1, 0.975) * np.std(pairs, ddof=1) / math.sqrt(n) if n > 1 else math.inf
    return Difference(float(np.mean(pairs)), float(half))


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


# ---------------------------------------------------------------- the command

def run_tables(tables: dict[str, Table], config_class: type[RunConfig], presets: dict, args: argparse.Namespace) -> None:
    """--table NUMBER or all, --rows, --seeds, --show: train what is missing, write the tables, print those asked for.

    Asked to stop, it lets the run save first; the same command then goes on. Raises UserError.
    """
    numbers = list(tables) if args.table == "all" else [args.table]
    if unknown := set(numbers) - tables.keys():
        raise UserError(f"there is no table {unknown.pop()}: choose from {', '.join(tables)}, all")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: expected at least 1")
    rows = parse_rows(args.rows, numbers, tables)
    study = Study(sys.modules[config_class.__module__].__file__, config_class, presets, tables)
    study.write()
    if not args.show:
        study.train([(number, row, seed) for seed in range(args.seeds) for number in numbers for row in rows[number]])
    print("\n".join(line for number in numbers for line in study.lines(number)))
    print(f"all tables: {study.folder}.md and .png")


def parse_rows(text: str, numbers: list[str], tables: dict[str, Table]) -> dict[str, list[Row]]:
    """"1,3" → those rows of the table, "" → all that can be had on puppets, by table. Raises UserError."""
    if not text:
        return {number: [row for row in tables[number].rows if row.puppets is not None] for number in numbers}
    if len(numbers) > 1:
        raise UserError(f"--rows {text}: rows are numbers of one table, so name it with --table")
    chosen, count = text.split(","), len(tables[numbers[0]].rows)
    if wrong := [word for word in chosen if not word.strip().isdecimal() or not 1 <= int(word) <= count]:
        raise UserError(f"--rows {text}: expected numbers from 1 to {count} with commas between them, got {wrong[0]!r}")
    rows = [tables[numbers[0]].rows[int(word) - 1] for word in chosen]
    if none := [row for row in rows if row.puppets is None]:
        raise UserError(f"--rows {text}: '{none[0].what}' cannot be had on puppets: {none[0].missing}")
    return {numbers[0]: rows}


class Study:
    """The tables of one method and the runs that there are of them.

    trial: flags added to all rows, for tests
    """

    def __init__(self, script: str | Path, config_class: type[RunConfig], presets: dict, tables: dict[str, Table],
                 folder: Path = FOLDER, trial: str = ""):
        self.script, self.tables, self.trial = Path(script), tables, trial
        self.method, self.defaults = self.script.stem, vars(config_class())
        self.folder = folder / self.method
        self.runs = read_runs(self.folder)
        self.settings = {}          # by table and row: all options but the seed, by which runs are paired
        for number, table in tables.items():
            for row in [row for row in table.rows if row.puppets is not None]:
                config, _ = parse(config_class, presets, "", self.words(table, row))
                self.settings[number, row.what] = {k: v for k, v in vars(config).items() if k != "seed"}

    def words(self, table: Table, row: Row) -> list[str]:
        """The flags of a row's trainings, but for the seed and the folder."""
        return f"--preset tiny {table.puppets} {row.puppets} {self.trial}".split()

    def groups(self, number: str, row: Row) -> dict[str, dict[int, dict]]:
        """A row's runs by seed, by what their settings have otherwise than the row has now, as JSON.

        An option that is younger than a run was at its default then.
        """
        now, groups = self.settings.get((number, row.what)), {}
        for run in self.runs if now else ():
            then = (self.defaults | run["settings"]).items()
            other = {k: v for k, v in then if k != "seed" and (k not in now or now[k] != v)}
            if not other or [number, row.what] in run["rows"]:
                groups.setdefault(json.dumps(other, sort_keys=True), {})[run["seed"]] = run
        return groups

    def train(self, jobs: Sequence[tuple[str, Row, int]]) -> None:
        """Train (number of the table, row, seed) unless it is there, and write the tables after each run."""
        for i, (number, row, seed) in enumerate(jobs, 1):
            if seed in self.groups(number, row).get(PRESENT, {}):
                continue
            print(f"\n{i} of {len(jobs)}: {name_of(number)}, {row.what}, seed {seed}", flush=True)
            if not self.train_one(number, row, seed):
                return print("stopped; the same command goes on")
            self.write()

    def train_one(self, number: str, row: Row, seed: int) -> bool:
        """Start a run or go on with it, keep its JSON, drop its checkpoints. False if it was asked to stop."""
        table, settings = self.tables[number], self.settings[number, row.what]
        words = [*self.words(table, row), "--seed", str(seed)]
        name = f"{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}-s{seed}"
        out = Path("runs", "tables", self.method, name)
        goes_on, spent = (out / "last.pt").exists(), out / "cpu_seconds"
        flags = ["--resume", str(out)] if goes_on else ["--train", *words, "--out", str(out)]
        seconds, before = float(spent.read_text()) if goes_on and spent.exists() else 0.0, os.times()
        code, asked = call([sys.executable, str(self.script), *flags])
        now = os.times()
        seconds += now.children_user + now.children_system - before.children_user - before.children_system
        if out.is_dir():
            spent.write_text(f"{seconds:.1f}")
        if asked:
            return False
        metrics = last_evaluation(out / "log.jsonl", settings["epochs"])
        if code or key(table, table.metric) not in metrics:
            raise UserError(f"{shlex.join([str(self.script), *flags])} ended with exit code {code}, before its last "
                            f"evaluation: the same command goes on, or starts anew without {out}")
        steps, _ = metrics.pop("step"), metrics.pop("epoch")
        run = dict(command=f"python {self.script.name} --train {shlex.join(words)}",
                   rows=[[*row] for row, same in self.settings.items() if same == settings], seed=seed, steps=steps,
                   metrics=metrics, cpu_seconds=round(seconds), date=time.strftime("%Y-%m-%d"),
                   machine=f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
                   code=version(), settings=settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole(self.folder / f"{name}.json") as part:
            part.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.runs.append(run)
        for checkpoint in out.glob("*.pt"):
            checkpoint.unlink()
        return True

    # ------------------------------------------------------------ what came out

    def values(self, number: str, row: Row, metric: str, group: str) -> dict[int, float]:
        """A metric of a row's runs by seed, in the paper's unit: percent."""
        table, runs = self.tables[number], self.groups(number, row).get(group, {})
        found = {seed: run["metrics"].get(key(table, metric), math.nan) for seed, run in runs.items()}
        unit = 1 if table.metric == "Mean" else 100             # PoseTrack's columns are in percent
        return {seed: unit * value for seed, value in found.items() if math.isfinite(value) and value != -1}

    def compare(self, number: str, row: Row, metric: str, group: str) -> tuple[float | None, Difference | None]:
        """What a row has more than the one that it is compared with: in the paper, and here."""
        if not row.versus:
            return None, None
        table = self.tables[number]
        pair = row, table.rows[row.versus - 1]
        figures = [({table.metric: one.figure} | one.more).get(metric) for one in pair]
        return (None if None in figures else round(figures[0] - figures[1], 4),
                difference(*(self.values(number, one, metric, group) for one in pair)))

    def lines(self, number: str) -> list[str]:
        """A table in Markdown, and below it the runs with other settings than it has now."""
        table = self.tables[number]
        groups = sorted({group for row in table.rows for group in self.groups(number, row)} - {PRESENT})
        lines = [f"## {name_of(number)}: {table.title}", "", f"Here: puppets `{table.split}`, {table.metric}, "
                 f"`{' '.join(f'--preset tiny {table.puppets} {self.trial}'.split())}`", "",
                 *self.grid(number, PRESENT), ""]
        for group in groups:
            was = ", ".join(f"{name} {value}" for name, value in json.loads(group).items())
            lines += [f"Other settings than now: {was}", "", *self.grid(number, group), ""]
        return lines

    def grid(self, number: str, group: str) -> list[str]:
        table, cells = self.tables[number], [["row", "paper", "less row", "paper's difference", "ours", "seeds",
                                              "our difference, 95 % interval", "claim"]]
        for i, row in enumerate(table.rows, 1):
            for metric, figure in ({table.metric: row.figure} | row.more).items():
                values = self.values(number, row, metric, group)
                if not values and group != PRESENT:
                    continue
                paper, ours = self.compare(number, row, metric, group)
                none = "not run" if row.puppets is not None else f"not run: {row.missing}"
                cells.append([f"{i}. {row.what if metric == table.metric else metric}",
                              "–" if figure is None else f"{figure}", str(row.versus or ""),
                              "" if paper is None else signed(paper),
                              f"{np.mean([*values.values()]):.1f}" if values else none, str(len(values) or ""),
                              str(ours or ""), ours.verdict(paper) if ours else ""])
        widths = [max(map(len, column)) for column in zip(*cells)]
        cells.insert(1, ["-" * width for width in widths])
        return [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in cells]

    def text(self) -> str:
        """The page with all tables."""
        about = (f"# {self.method}: the paper's tables on puppets\n\nWritten by `python {self.script.name} --table all "
                 f"--show` from the runs in [{self.method}/]({self.method}/), a JSON file each. The paper's figures are "
                 "of its own data and models; what can be compared is the sign of a difference. Ours are means over "
                 "seeds 0, 1, ...; differences are paired by seed, with Student's 95 % interval. A claim is 'agrees' or "
                 "'contrary' if the interval leaves out zero, else 'not seen'; one seed has no interval.\n\n"
                 f"![The paper's differences and ours]({self.method}.png)\n\n")
        return about + "\n".join(line for number in self.tables for line in self.lines(number))

    def write(self) -> None:
        """<method>.md, and <method>.png with the differences of all rows that are compared."""
        panels = []
        for number, table in self.tables.items():
            compared = [(f"{i}. {row.what}", *self.compare(number, row, table.metric, PRESENT))
                        for i, row in enumerate(table.rows, 1) if row.versus and row.puppets is not None]
            if compared:
                marks = [(what, paper, ours and (ours.mean, ours.half)) for what, paper, ours in compared]
                panels.append(draw.draw_differences(f"{name_of(number)}, {table.metric} on puppets {table.split}", marks))
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.folder.with_suffix(".md")) as part:
            part.write_text(self.text(), encoding="utf-8")
        with whole(self.folder.with_suffix(".png")) as part:
            draw.contact_sheet(panels, columns=2, cell=1000).save(part, "PNG")


# ---------------------------------------------------------------- files and processes

def name_of(number: str) -> str:
    """4 → Table 4, fig3 → Fig. 3."""
    return f"Fig. {number[3:]}" if number.startswith("fig") else f"Table {number}"


def key(table: Table, metric: str) -> str:
    """What a metric on the table's split is called in log.jsonl."""
    return metric if table.split == "val" else f"{metric}_{table.split}"


def read_runs(folder: Path) -> list[dict]:
    """All runs of a method; a file that cannot be read is said and left out, so that its row is run again."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            kinds = dict(seed=int, rows=list, metrics=dict, settings=dict)
            if not all(isinstance(run[name], kind) for name, kind in kinds.items()):
                raise ValueError("not a run of a table")
            runs.append(run)
        except (ValueError, KeyError, TypeError) as error:
            print(f"warning: {path} is damaged and left out: {error!r}", file=sys.stderr)
    return runs


def last_evaluation(log: Path, epochs: int) -> dict:
    """All metrics after the last epoch, with `step` and `epoch`; nothing if it has not come so far."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    metrics = {}
    for row in rows:
        if row.get("epoch") == epochs - 1 and "loss" not in row:
            metrics |= row
    return metrics


def call(command: list[str]) -> tuple[int, bool]:
    """Run a command, which is told when this process is asked to stop: (its exit code, whether that was so)."""
    asked: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, frame) -> None:
        if process and not asked:                               # Ctrl-C reaches both, and is not to be said twice
            process.terminate()
        asked.append(number)

    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]      # not so under nohup
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        process = subprocess.Popen(command)
        if asked:                                               # while it began
            process.terminate()
        return process.wait(), bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def version() -> str:
    """The commit of this code, with -dirty if it was changed; nothing where git does not know."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=FOLDER.parents[1], capture_output=True,
                              text=True).stdout.strip()
    except OSError:
        return ""
