"""The package that is built is one that can be published and used: complete, and at home in any
folder."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "prism_select"


def run(*words: object, cwd: Path) -> str:
    """A command in a folder, knowing nothing of this checkout."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=known, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and with the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


def test_the_package_passes_the_index_s_own_check(built: Path) -> None:
    told = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)
    assert told.count("PASSED") == 2


def test_the_wheel_holds_everything_that_stands_in_the_source(built: Path) -> None:
    there = {
        name
        for name in zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
        if name.startswith("prism_select/")
    }
    source = {
        f"prism_select/{path.relative_to(SOURCE).as_posix()}"
        for path in SOURCE.rglob("*")
        if path.is_file()
    }
    assert there == {name for name in source if "__pycache__" not in name}
    assert {"prism_select/demo/model/model.safetensors", "prism_select/py.typed"} <= there


def test_the_sdist_holds_what_it_takes_to_test_it_and_nothing_that_a_run_left(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "constraints.txt",
        "mkdocs.yml",
        "tests/test_package.py",
        "docs/index.md",
    } <= names
    known = {"benchmarks", "docs", "examples", "src", "tests"}
    assert {name.partition("/")[0] for name in names if "/" in name} <= known
    assert not any("/work/" in name or "__pycache__" in name for name in names)


def test_the_wheel_works_in_a_new_environment_outside_the_repository(
    built: Path, tmp_path: Path
) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    install = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet")
    run(sys.executable, *install, next(built.glob("*.whl")), cwd=tmp_path)
    home = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    )
    (home / "libraries.pth").write_text(
        os.path.dirname(os.path.dirname(pytest.__file__)) + "\n", encoding="utf-8"
    )
    assert "0.2.0" in run(tmp_path / "venv" / "bin" / "prism", "--version", cwd=tmp_path)
    script = (
        "import prism_select, prism_select.demo.story as s; "
        "print(prism_select.__file__, *map(str, s.MODEL.iterdir()))"
    )
    files = [Path(word) for word in run(python, "-c", script, cwd=tmp_path).split()]
    assert all(file.is_relative_to(tmp_path) for file in files)
    assert {"__init__.py", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
