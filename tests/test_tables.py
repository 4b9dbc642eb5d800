"""The tables at the end of each method file: their rows can be built, their equations are the paper's."""
import functools
import importlib
import json
import math
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

import detrpose
from common import draw, tables
from common.cli import RunConfig, parse
from common.errors import UserError
from common.tables import Difference, Row, Study, Table, difference, parse_rows
from tests.helpers import TINY

METHODS = [name for name in ("detrpose", "diffusionregpose", "querypose", "diffusionpose", "sdpose")
           if hasattr(importlib.import_module(name), "TABLES")]
NUMBERED = dict(detrpose=5, diffusionregpose=12, querypose=4, diffusionpose=5, sdpose=0)


def rows_of(method: str) -> list:
    module = importlib.import_module(method)
    return [pytest.param(module, table, row, id=f"{method}-{number}-{i}")
            for number, table in module.TABLES.items() for i, row in enumerate(table.rows, 1)]


ROWS = [row for method in METHODS for row in rows_of(method)]


@pytest.mark.parametrize("module, table, row", ROWS)
def test_every_row_of_a_table_is_a_model_that_can_be_built(module, table, row):
    commands = []
    if not row.missing or row.flags:
        commands.append(["--preset", table.preset, *table.flags.split(), *row.flags.split()])
    if row.puppets is not None:
        commands.append([*table.puppets.split(), *row.puppets.split()])
    assert commands or row.missing, "a row that cannot be had says why"
    for words in commands:
        config, args = parse(module.Config, module.PRESETS, "", words)
        with torch.device("meta"):
            model = module.build(args.preset, **vars(config))
        assert sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_compared_with_rows_that_are_there_and_one_is_the_papers_own(method):
    for number, table in importlib.import_module(method).TABLES.items():
        assert all(0 <= row.versus <= len(table.rows) for row in table.rows), number
        assert all(table.rows[row.versus - 1] is not row for row in table.rows if row.versus), number
        assert sum(row.default for row in table.rows) <= 1, number


@functools.cache
def study_of(method: str) -> Study:
    module = importlib.import_module(method)
    return Study(module.__file__, module.Config, module.PRESETS, module.TABLES)


@pytest.mark.parametrize("method", METHODS)
def test_the_rows_of_a_table_are_trained_for_equal_steps(method):
    study = study_of(method)
    for number, table in study.tables.items():
        settings = [study.settings[number, row.what] for row in table.rows if row.puppets is not None]
        assert len({(one["epochs"], one["batch"], one["accum"], one["data"]) for one in settings}) <= 1, number


@pytest.mark.parametrize("method", METHODS)
def test_the_page_of_a_methods_tables_is_what_its_runs_say(method):
    study = study_of(method)
    assert len(study.runs) == len([*study.folder.glob("*.json")]), "one is damaged"
    assert study.folder.with_suffix(".md").read_text(encoding="utf-8") == study.text(), f"python {method}.py --table all --show"


@pytest.mark.parametrize("method", METHODS)
def test_every_numbered_equation_has_a_place_which_carries_its_label(method):
    module, source = importlib.import_module(method), Path(f"{method}.py").read_text()
    for n in range(1, NUMBERED[method] + 1):
        assert any(re.search(rf"eq\. {n}\b", key) for key in module.EQUATIONS), f"eq. {n} is in no row"
    for key, where in module.EQUATIONS.items():
        for number in re.findall(r"eq\. (\d+)", key):
            body = source[re.search(rf"(def|class) {where.__qualname__.split('.')[-1]}\b", source).start():]
            labels = re.findall(r"eqs?\. (\d+)(?:[-–](\d+))?(?: and (\d+))?", body[:6000])
            numbers = {n for a, b, c in labels for n in (*range(int(a), int(b or a) + 1), *([int(c)] if c else []))}
            assert int(number) in numbers, f"{key}: {where.__qualname__} does not say so"


@pytest.mark.parametrize("method", METHODS)
def test_the_papers_figures_are_those_of_its_index(method):
    if not os.environ.get("POSE_REFERENCE"):
        pytest.skip("set POSE_REFERENCE to a folder with <method>/PAPER.md")
    text = (Path(os.environ["POSE_REFERENCE"]) / method / "PAPER.md").read_text()
    for number, table in importlib.import_module(method).TABLES.items():
        for row in table.rows:
            figures = [figure for figure in (row.figure, *row.more.values()) if figure is not None]
            assert all(f"{figure}" in text for figure in figures), f"Table {number}, {row.what}"


@pytest.mark.parametrize("method", METHODS)
def test_departures_are_rows_of_as_many_columns_as_their_heading_names(method):
    text = Path(f"{method}.py").read_text()
    block = text[text.index("\n# Departures"):text.index("\n# ---- Appendix")]
    heading, rows = re.split(r"\n#\n", block, maxsplit=1)
    columns = len(re.search(r"what: ([^.(]*)", " ".join(heading.split()))[1].split("|"))
    rows = re.sub(r"\n#(?: \d\..*)?(?=\n)", "", "\n" + rows.strip("\n"))               # headings of parts
    rows = re.split(r"\n# (?=\S)", rows)[1:]
    assert len(rows) > 15 and columns == (3 if method == "diffusionpose" else 4)
    for row in rows:
        assert len(re.findall(r" \|(?=\s)", re.sub(r"\n# +", " ", row))) >= columns - 1 and ": " in row, row


# ------------------------------------------------------------------------------------------ statistics

def test_a_difference_is_that_of_paired_seeds_with_students_interval():
    one = difference({0: 5.0, 1: 7.0, 2: 9.0, 5: 100.0}, {2: 6.0, 1: 5.0, 0: 4.0, 3: 0.0})     # 1, 2, 3; others have no pair
    assert one.mean == 2 and one.half == pytest.approx(4.30265 / math.sqrt(3), abs=1e-5)
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    interval = ttest_rel(a, b).confidence_interval(0.95)
    one = difference(dict(enumerate(a)), dict(enumerate(b)))
    assert (one.mean - one.half, one.mean + one.half) == pytest.approx((interval.low, interval.high))
    assert difference({0: 3.0}, {0: 1.0}) == Difference(2.0, math.inf) and difference({0: 3.0}, {1: 1.0}) is None


@pytest.mark.parametrize("paper, mean, half, said", [
    (1.5, 2.0, 1.9, "agrees"), (-1.5, -2.0, 1.9, "agrees"), (1.5, -2.0, 1.9, "contrary"), (0.0, 2.0, 1.9, "contrary"),
    (1.5, 2.0, 2.1, "not seen"), (1.5, 2.0, math.inf, "not seen"), (0.0, 0.0, 0.0, "not seen"), (None, 2.0, 1.0, "–")])
def test_a_verdict_needs_an_interval_without_zero(paper, mean, half, said):
    assert Difference(mean, half).verdict(paper) == said


def test_a_difference_is_drawn_beside_the_papers():
    def pixels(colour, paper, ours) -> int:
        picture = np.asarray(draw.draw_differences("4", [("a row " * 30, paper, ours)]), int)[35:]       # below the legend
        return (abs(picture - colour).max(-1) < 40).sum()
    paper, ours = draw.LINES[:2]
    assert pixels(paper, 1.0, None) > 20 and pixels(paper, None, (2.0, 0.5)) == pixels(ours, 1.0, None) == 0
    assert pixels(ours, 1.0, (2.0, 0.5)) > pixels(ours, 1.0, (2.0, math.inf)) > 10


# ------------------------------------------------------------------------------------------ runs

@dataclass(frozen=True)
class Config(RunConfig):
    """Of a method whose trainings are made up."""
    epochs: int = 3             # passes
    width: int = 8              # channels


TABLE = {"7": Table("Widths", preset="big", metric="AP", puppets="--epochs 2", rows=[
             Row("narrow", 50.1, puppets="--width 4"), Row("wide", 52.5, versus=1, default=True, more=dict(Hidden=None)),
             Row("huge", 53.0, puppets=None, versus=2, missing="no room")]),
         "8": Table("The same elsewhere", preset="big", metric="AP", split="ood", puppets="--epochs 2", rows=[
             Row("wide", 40.0, default=True)])}


class Trainer:
    """In place of `call`: AP is 0.3, 0.02 more with a seed, and 0.1 or 0.12 more with 8 channels. `cut`: how many are."""

    def __init__(self):
        self.words, self.cut = [], 0

    def __call__(self, command: list[str]) -> tuple[int, bool]:
        self.words.append(" ".join(command[2:]))
        out = Path(command[command.index("--resume" if "--resume" in command else "--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "last.pt").touch()
        if "--resume" in command:
            command = (out / "words").read_text().split()
        (out / "words").write_text(" ".join(command))
        if self.cut:
            self.cut -= 1
            return 0, True
        seed = int(command[command.index("--seed") + 1])
        score = 0.3 + 0.02 * seed + ("--width" not in command) * (0.1 + 0.02 * (seed % 2))
        rows = [dict(step=5, epoch=0, AP=0.1), dict(step=10, epoch=1, loss=2.0), dict(step=10, epoch=1, AP=score),
                dict(step=10, epoch=1, AP_ood=score / 2)]
        (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0, False


@pytest.fixture
def trainer(monkeypatch, tmp_path) -> Trainer:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "call", one := Trainer())
    return one


def study(trial: str = "", of: dict = TABLE) -> Study:
    return Study("method.py", Config, dict(tiny=Config()), of, Path("docs"), trial)


def jobs(seeds: int, of: dict = TABLE, number: str = "7") -> list:
    return [(number, row, seed) for seed in range(seeds) for row in of[number].rows if row.puppets is not None]


def row_of(lines: list[str], start: str) -> list[str]:
    return [cell.strip() for line in lines if line.startswith(f"| {start}") for cell in line.strip("|").split("|")]


def test_without_runs_a_table_has_the_papers_figures_and_says_not_run(trainer):
    lines = study().lines("7")
    assert row_of(lines, "1. narrow")[1:5] == ["50.1", "", "", "not run"]
    assert row_of(lines, "2. wide")[1:5] == ["52.5", "1", "+2.4", "not run"]
    assert row_of(lines, "3. huge")[1:5] == ["53.0", "2", "+0.5", "not run: no room"]


def test_rows_are_trained_once_and_shown_with_their_difference(trainer):
    study().train(jobs(3))
    assert len(trainer.words) == 6 and "--train --preset tiny --epochs 2 --width 4 --seed 0 --out" in trainer.words[0]
    again = study()
    again.train(jobs(3) + jobs(3, number="8"))
    assert len(trainer.words) == 6, "Table 8 has a row that is the same training"
    half = 4.30265 * np.std([10, 12, 10], ddof=1) / math.sqrt(3)
    assert row_of(again.lines("7"), "2. wide") == [
        "2. wide", "52.5", "1", "+2.4", "42.7", "3", f"+10.7 [+{32 / 3 - half:.1f}, +{32 / 3 + half:.1f}]", "agrees"]
    assert row_of(again.lines("8"), "1. wide")[4:6] == ["21.3", "3"]
    files = [*Path("docs/method").glob("*.json")]
    run = json.loads(files[0].read_text())
    assert len(files) == 6 and run["steps"] == 10 and run["command"].startswith("python method.py --train --preset tiny")
    assert not [*Path("runs").rglob("*.pt")] and Path("docs/method.md").read_text() == again.text()
    assert Path("docs/method.png").stat().st_size > 1000


def test_a_run_that_was_cut_goes_on_and_the_others_follow(trainer, capsys):
    trainer.cut = 1
    study().train(jobs(1))
    assert len(trainer.words) == 1 and "the same command goes on" in capsys.readouterr().out
    study().train(jobs(1))
    assert trainer.words[1].startswith("--resume runs/tables/method/") and "--train" in trainer.words[2]
    assert len([*Path("docs/method").glob("*.json")]) == 2


def test_a_run_of_other_settings_stays_and_is_shown_apart(trainer):
    study().train(jobs(2))
    longer = TABLE | {"7": Table("Widths", TABLE["7"].rows, preset="big", metric="AP", puppets="--epochs 2 --eval_batch 5")}
    study(of=longer).train(jobs(1, longer))
    lines = study(of=longer).lines("7")
    old = lines.index("Other settings than now: eval_batch 32")
    assert row_of(lines[:old], "2. wide")[4:7] == ["40.0", "1", "+10.0"]
    assert row_of(lines[old:], "2. wide")[4:6] == ["42.0", "2"] and row_of(lines[old:], "2. wide")[7] == "not seen"
    assert len([*Path("docs/method").glob("*.json")]) == 6
    assert not any("Other settings" in line for line in study(of=longer).lines("8")), "Table 8 has kept its settings"


def test_an_option_that_is_younger_than_a_run_was_at_its_default(trainer):
    study().train(jobs(1))
    path = next(Path("docs/method").glob("*.json"))
    run = json.loads(path.read_text())
    del run["settings"]["patience"]
    path.write_text(json.dumps(run))
    study().train(jobs(1))
    assert len(trainer.words) == 2


@pytest.mark.parametrize("content", ['{"seed": 0', "[]", '{"seed": 0, "rows": [], "metrics": {}, "settings": 3}'])
def test_a_damaged_file_is_said_and_its_row_trained_again(content, trainer, capsys):
    study().train(jobs(1))
    path = next(Path("docs/method").glob("*.json"))
    path.write_text(content)
    study().train(jobs(1))
    assert f"{path} is damaged" in capsys.readouterr().err and len(trainer.words) == 3
    assert len(study().runs) == 2


def test_a_training_that_fails_ends_the_command_with_its_exit_code(trainer, monkeypatch):
    monkeypatch.setattr(tables, "call", lambda command: (2, False))
    with pytest.raises(UserError, match="ended with exit code 2"):
        study().train(jobs(1))


def test_rows_are_numbers_of_one_table():
    assert parse_rows("2,1", ["7"], TABLE) == {"7": [TABLE["7"].rows[1], TABLE["7"].rows[0]]}
    assert parse_rows("", ["7", "8"], TABLE) == {"7": TABLE["7"].rows[:2], "8": TABLE["8"].rows}
    for text, numbers, said in (("0", ["7"], "from 1 to 3"), ("4", ["7"], "from 1 to 3"), ("1;2", ["7"], "got '1;2'"),
                                ("3", ["7"], "cannot be had on puppets: no room"), ("1", ["7", "8"], "name it with --table")):
        with pytest.raises(UserError, match=said):
            parse_rows(text, numbers, TABLE)


@pytest.mark.parametrize("words, said", [
    ("--table 9", "no table 9: choose from 4, all"), ("--table 4 --epochs=3", "--epochs: the settings of a table are its own"),
    ("--rows 1", "say which with --table"), ("--table 4 --seeds 0", "expected at least 1"), ("--table 4 --rows x", "got 'x'")])
def test_a_wrong_command_is_one_line(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detrpose.py", *words.split()])
    with pytest.raises(SystemExit) as end:
        detrpose.main()
    assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="signals of other processes are a Unix thing")
def test_who_is_asked_to_stop_tells_the_training_and_waits_for_it(terminal):
    before = signal.getsignal(signal.SIGINT)
    child = ("import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); "
             "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)")
    assert tables.call([sys.executable, "-c", child]) == (3, True)
    assert tables.call([sys.executable, "-c", "pass"]) == (0, False) and signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_rows_are_trained_and_compared_in_processes_of_their_own(puppets_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trial = f"--data {puppets_folder} --batch 8 --device cpu {' '.join(TINY)} --epochs 1"
    one = Study(detrpose.__file__, detrpose.Config, detrpose.PRESETS, detrpose.TABLES, tmp_path / "docs", trial)
    one.train([("4", row, 0) for row in detrpose.TABLES["4"].rows[1:3]])
    assert [run["steps"] for run in one.runs] == [2, 2] and all("AP" in run["metrics"] for run in one.runs)
    assert row_of(one.lines("4"), "3. + pose denoising")[5] == "1"
