"""The tables at the end of each method file: their rows can be built, their equations are the paper's."""
import importlib
import os
import re
from pathlib import Path

import pytest
import torch

from common.cli import parse

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
