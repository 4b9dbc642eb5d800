"""The rows of a paper's ablation tables as data; each method file has its own as `TABLES`."""
from __future__ import annotations

from dataclasses import dataclass, field


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
    more: dict[str, float] = field(default_factory=dict)       # further figures of the paper, by metric


@dataclass(frozen=True)
class Table:
    """A table of the paper: what its rows share, and the rows in the paper's order."""
    title: str
    rows: list[Row]
    preset: str                         # of the paper's model
    metric: str                         # whose figures the rows have: AP, Mean, ...
    flags: str = ""                     # of all rows, for the preset of the paper
    puppets: str = ""                   # of all rows, for the tiny preset
    split: str = "val"                  # of the embedded data
