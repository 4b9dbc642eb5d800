"""The commands as a user types them, each in a process of its own: what is printed, what is left, the exit code."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.weights import load_checkpoint
from tests.helpers import TINY

ROOT = Path(__file__).parents[1]


def start(*words) -> subprocess.Popen:
    """`python words...` in the repository, one thread."""
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, text=True, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"})


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, output, errors); a traceback is never right."""
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def train(data: Path, folder: Path, *flags) -> subprocess.Popen:
    words = *TINY, "--batch", 8, "--data", data, "--out", folder, "--device", "cpu"
    return start("detrpose.py", "--train", *words, *flags)


def wait_for_a_save(process: subprocess.Popen, folder: Path) -> None:
    """Until last.pt is newer than now."""
    last, end = folder / "last.pt", time.monotonic() + 120
    before = last.stat().st_mtime_ns if last.exists() else 0
    while not last.exists() or last.stat().st_mtime_ns == before:
        assert time.monotonic() < end and process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of other processes are a Unix thing")
def test_a_training_is_stopped_by_sigterm_resumed_killed_and_evaluated(puppets_folder, tmp_path):
    folder = tmp_path / "run"
    process = train(puppets_folder, folder, "--epochs", 500)
    wait_for_a_save(process, folder)
    process.send_signal(signal.SIGTERM)
    code, out, _ = finish(process)
    assert code == 0 and f"stopped and saved; go on with --resume {folder}" in out
    assert "train: 24 images" in out and "AP50" in out
    stopped = load_checkpoint(folder / "last.pt")

    process = start("detrpose.py", "--resume", folder)                      # with the flags of the run
    wait_for_a_save(process, folder)
    process.kill()
    process.communicate()
    killed = load_checkpoint(folder / "last.pt")
    assert killed["step"] > stopped["step"] and killed["config"]["epochs"] == 500
    steps = [row["step"] for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "AP" in row]
    assert steps == sorted(set(steps))
    assert {"config.json", "best.pt", "curves.png", "predictions.png"} <= set(os.listdir(folder))

    code, out, _ = finish(start("eval.py", folder / "best.pt", "--out", tmp_path / "eval"))
    assert code == 0 and "8 images in" in out and "nose" in out
    assert sorted(os.listdir(tmp_path / "eval")) == ["predictions.png", "results.json", "table.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback():
    process, end = start("detrpose.py", "--train"), time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code in (130, -signal.SIGINT) and (out, err) == ("", "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pipes that are closed are a Unix thing")
def test_a_training_whose_output_nobody_reads_any_more_goes_on_to_its_end(puppets_folder, tmp_path):
    process = train(puppets_folder, tmp_path / "run", "--epochs", 2)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(300) == 0 and load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2


@pytest.mark.parametrize("words, code, message", [
    ("detrpose.py --bacth 4", 2, "error: unknown flag --bacth: did you mean --batch?"),
    ("detrpose.py --train --data nowhere", 2, "error: there is no data folder nowhere"),
    ("detrpose.py --help", 0, "--no-pose_denoising")])
def test_a_command_ends_with_its_message_and_exit_code(words, code, message):
    ended, out, err = finish(start(*words.split()))
    assert ended == code and message in (out if code == 0 else err)
    assert code == 0 or err.count("\n") == 1, "one line, nothing else"


@pytest.mark.slow
def test_without_flags_a_summary_of_the_presets_is_printed():
    code, out, _ = finish(start("detrpose.py"))
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert code == 0 and {"tiny", "n", "s", "m", "l", "x"} <= rows.keys() and rows["preset"][-1] == "GFLOPs"
    assert 4.0 < float(rows["n"][2]) < 4.3 and 32 < float(rows["s"][-1]) < 34             # Table 2: 4.1 M; 33.1
