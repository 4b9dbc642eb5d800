"""What the methods share. A program imports it before all that takes seconds: Ctrl-C then ends it without a traceback."""
import sys
from pathlib import Path

if Path(sys.argv[0] if sys.argv else "").resolve().parent == Path(__file__).resolve().parents[1]:      # one of ours
    usual = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if kind is KeyboardInterrupt else usual(kind, *rest)
