"""Who may import whom (CONTRIBUTING.md): common/ in layers without circles, kernels/ alone, no method file a library."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS = ["detrpose", "diffusionregpose", "querypose", "diffusionpose", "sdpose"]
# from left to right; a file imports what stands left of it, in its own group too
ORDER = ["common.errors",
         "common.records", "common.skeletons", "common.ranks", "common.oks", "common.heatmaps",
         "common.weights", "common.nets.resnet", "common.nets.hrnet", "common.nets.swin", "common.nets.vit",
         "common.datasets", "common.transforms", "common.video", "common.cli",
         "common.posetrack", "common.draw", "common.boxes", "common.predict",
         "data.puppets", "common.splits", "common.metrics", "common.export",
         "common.run", "common.diagnose", "common.compare", "common.tables", *METHODS, "eval"]


def modules() -> dict[str, Path]:
    files = [path for folder in ("common", "kernels", "data") for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / f"{name}.py" for name in (*METHODS, "eval")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = modules()


def imports(name: str) -> set[str]:
    """First-party modules that a file imports, at its top or hidden in a function, relative or not."""
    found, package = set(), name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([part for part in above if part] + [node.module] * bool(node.module))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {one for one in found if one in MODULES and MODULES[one].name != "__init__.py"}


@pytest.mark.parametrize("name", [name for name in MODULES if MODULES[name].name != "__init__.py"])
def test_a_file_imports_only_what_stands_left_of_it(name):
    used = imports(name)
    if name.startswith("kernels."):
        assert all(one.startswith("kernels.") for one in used), "kernels can be copied into another project"
    else:
        assert name in ORDER, f"{name} has no place in ORDER"
        left = ORDER[:ORDER.index(name)]
        wrong = [one for one in used if one not in left and not one.startswith("kernels.")]
        assert not wrong, f"{name} imports {wrong}, which stand right of it"
    if name != "eval":
        assert not used & set(METHODS), "a method file is nobody's library"


def test_the_reader_of_imports_sees_hidden_and_relative_ones(tmp_path, monkeypatch):
    monkeypatch.setitem(MODULES, "common.odd", tmp_path / "odd.py")
    (tmp_path / "odd.py").write_text("from . import draw\ndef f():\n    from common.run import Run\n    import eval\n")
    assert imports("common.odd") == {"common.draw", "common.run", "eval"}
