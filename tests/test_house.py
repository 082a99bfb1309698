"""House rules, as tests."""

import ast
import gc
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "prism_select"
FILES = sorted(SOURCE.rglob("*.py"))
# Who may import whom: only from a lower layer, or from the same one where the name is listed first.
LAYERS = [
    ["errors", "blocks"],
    ["config", "progress"],
    ["core.likelihood", "core.gains", "core.layers", "core.direction", "core.engines"],
    [
        "common",
        "curvature",
        "lowrank",
        "weights",
        "check",
        "sketching",
        "norms",
        "diagnosis",
        "statistics",
        "selection",
        "profile",
        "surrogate",
    ],
    [
        "data.records",
        "data.remote",
        "data.readers",
        "data.formats",
        "data.inputs",
        "data.batches",
        "data.pairing",
    ],
    ["models", "store", "world", "planning", "adapters"],
    [
        "scoring",
        "cluster",
        "targeting",
        "baselines",
        "choice",
        "cascade",
        "saving",
        "preconditioning",
        "anatomy",
        "manifest",
        "memory",
        "generation",
        "warmup",
    ],
    [
        "tasks",
        "boards",
        "rankings",
        "pipeline",
        "controls",
        "retraining",
        "verdicts",
        "evaluation",
        "making",
    ],
    [
        "report.columns",
        "report.spread",
        "report.examples",
        "report.facts",
        "report.judgement",
        "report.charts",
        "report.page",
        "report.words",
        "report.tables",
        "report.writing",
        "report.comparison",
    ],
    ["api"],
    ["terminal"],
    ["demo.world", "demo.train", "demo.story"],
    ["cli"],
    ["__main__"],
]
ORDER = [name for layer in LAYERS for name in layer]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(file: Path) -> ast.Module:
    """No garbage is collected meanwhile: Python 3.11 may then miscount its depth and raise
    SystemError (gh-106905)."""
    gc.disable()
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    finally:
        gc.enable()


def imports_of(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prism_select"):
            inside = (node.module or "").removeprefix("prism_select").lstrip(".")
            package = inside in ("", "core", "data", "demo", "report")
            names.update(
                f"{inside}.{a.name}".lstrip(".") if package else inside for a in node.names
            )
    return names


MODULES = [file for file in FILES if file.name != "__init__.py"]


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_imports_point_down(file: Path) -> None:
    place = ORDER.index(name_of(file))
    upward = {name for name in imports_of(file) if ORDER.index(name) >= place}
    assert not upward


@pytest.mark.parametrize("file", [f for f in MODULES if f.parent.name == "core"], ids=name_of)
def test_the_core_sees_no_file_no_config_and_no_transformers(file: Path) -> None:
    words = {
        alias.name.split(".")[0]
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not words & {"transformers", "pathlib", "os", "json"}
    assert not any(name.startswith(("config", "data.")) for name in imports_of(file))


def test_the_core_reads_in_one_sitting() -> None:
    assert (
        sum(len(f.read_text(encoding="utf-8").splitlines()) for f in (SOURCE / "core").glob("*.py"))
        <= 700
    )


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_functions_are_short(file: Path) -> None:
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = (node.end_lineno or 0) - node.body[0].lineno + 1
            arguments = [
                a.arg
                for a in (*node.args.args, *node.args.kwonlyargs)
                if a.arg not in ("self", "cls")
            ]
            assert body <= 60, f"{node.name}: {body} lines"
            assert len(arguments) <= 6, f"{node.name}: {len(arguments)} parameters"


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_all_is_sorted_and_importable_and_every_module_has_an_opening(file: Path) -> None:
    module = importlib.import_module(f"prism_select.{name_of(file)}")
    assert module.__doc__
    if name_of(file) != "__main__":
        assert sorted(module.__all__) == sorted(set(module.__all__))
        assert all(hasattr(module, name) for name in module.__all__)


def test_what_the_package_offers_is_what_can_be_imported() -> None:
    package = importlib.import_module("prism_select")
    assert package.__all__ == sorted(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert set(package._HOMES) == set(package.__all__)


def test_every_module_imports_alone() -> None:
    script = "import importlib, sys; [importlib.import_module(n) for n in sys.argv[1:2]]"
    light = [
        "errors",
        "config",
        "progress",
        "api",
        "cli",
        "terminal",
        "data.readers",
        "data.formats",
        "data.pairing",
        "selection",
        "report.comparison",
        "report.writing",
    ]
    for name in light:
        code = f"{script}\nassert 'torch' not in sys.modules, 'torch came with it'"
        subprocess.run([sys.executable, "-c", code, f"prism_select.{name}"], check=True)
    rest = [f"prism_select.{name_of(file)}" for file in MODULES if name_of(file) not in light]
    fresh = "\n".join(
        f"import sys; [sys.modules.pop(m) for m in list(sys.modules) if m.startswith('prism_select')]; import {name}"
        for name in rest
    )
    subprocess.run([sys.executable, "-W", "error", "-c", fresh], check=True)


def test_help_never_imports_torch() -> None:
    code = (
        "import sys\nfrom prism_select.cli.app import main\n"
        "try:\n    main(['select', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
