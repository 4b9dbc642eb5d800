"""What the README says can be typed: every command is one that its program takes, and the Python example runs."""
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import detrpose
from common import weights
from common.cli import parse
from common.errors import UserError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
evaluation = importlib.import_module("eval")


def commands() -> list[list[str]]:
    """The words of every `python ...` and `torchrun ...` of the README's blocks and of its running text."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines()]
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    lines += re.findall(r"`(python [^`]*)`", text.replace("\n", " "))
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    words = [line[1:] if line[0].endswith("python") else line for line in words if line]
    return [line[2:] if line[0] == "torchrun" else line for line in words if line[0] != "sh"]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_is_taken_by_its_program(words, monkeypatch):
    program, *flags = words
    if program == "-m":
        importlib.import_module(flags[0])
        return
    assert (ROOT / program).is_file()
    if program == "eval.py":
        args = evaluation.build_parser().parse_args(flags)
        source = args.checkpoint
        assert source in weights.RELEASES or "runs/" in source or source.endswith(".pth")
        return
    method = importlib.import_module(program.removesuffix(".py"))
    try:
        config, args = parse(method.Config, method.PRESETS, method.__doc__, flags)
        assert not config.init or args.train
    except SystemExit as end:
        assert flags == ["--help"] and end.code == 0
    except UserError as error:
        assert "--resume" in flags and "runs/<run>" in str(error)


def test_there_are_commands_and_every_method_is_among_them():
    programs = {words[0] for words in commands()}
    assert programs >= {f"{method}.py" for method in evaluation.METHODS} | {"eval.py", "-m"}
    assert len(commands()) > 25


def test_links_of_the_readme_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    assert len(README.split()) <= 2500


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    picture.save("photo.png")
    picture.save("photo.jpg")
    model = detrpose.build("tiny")
    monkeypatch.setattr(evaluation, "load_model", lambda source, *rest: (detrpose, model, "coco"))
    example = re.search(r"<!-- python -->\n```python\n(.*?)```", README, re.S)[1]
    names = dict(array=np.asarray(picture), picture=picture)
    exec(example, names)
    assert len(names["people"]) == 3 and Path("drawn.png").exists()
