"""Style: how the source measures up against what is wanted; `make style` prints it.

Choices made here:
- figures, not tests: a limit of style should start a thought, not fail a build;
- an empty name says nothing about its value (told, place, each); only whole identifiers count.
"""

import ast
import gc
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from prism_select.cli.app import app

SOURCE = Path(__file__).parent.parent / "src" / "prism_select"
LONGEST_LINE, LONGEST_FUNCTION = 100, 60
EMPTY_NAMES = """
asked both done each every few found given held kept known left more most now one other others own
part parts place places rest said same some such taken then there told wanted whole
"""
EMPTY = frozenset(EMPTY_NAMES.split())
LINKS = frozenset(["that", "which", "where", "what", "as"])


def share(count: int, total: int) -> float:
    return count / total if total else 0.0


def long_lines(sources: Iterable[str]) -> float:
    lines = [line for source in sources for line in source.splitlines() if line.strip()]
    return share(sum(len(line) > LONGEST_LINE for line in lines), len(lines))


def names(tree: ast.AST, bound: bool) -> Iterator[str]:
    """The identifiers of a module; with `bound`, only where one is given to something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if not bound or isinstance(node.ctx, ast.Store):
                yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute):
            if not bound or isinstance(node.ctx, ast.Store):
                yield node.attr
        elif isinstance(node, ast.keyword) and not bound and node.arg:
            yield node.arg


def empty_names(trees: Iterable[ast.AST], bound: bool = False) -> float:
    """Per 1,000 identifiers."""
    counts = Counter(name for tree in trees for name in names(tree, bound))
    return 1000 * share(sum(counts[name] for name in EMPTY), counts.total())


def long_functions(trees: Iterable[ast.AST]) -> float:
    lengths = [
        (node.end_lineno or 0) - node.lineno + 1
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return share(sum(length > LONGEST_FUNCTION for length in lengths), len(lengths))


def links(trees: Iterable[ast.AST]) -> float:
    """that, which, where, what and as, per 100 words of docstrings."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    words = [
        word
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, documented)
        for word in re.findall(r"[a-z']+", (ast.get_docstring(node) or "").lower())
    ]
    return 100 * share(sum(word in LINKS for word in words), len(words))


def options_by_command() -> dict[str, set[str]]:
    """The distinct options of each command, without --help and --version."""
    commands = {"prism": app, **app.commands}
    return {
        name: {
            parameter.opts[0] for parameter in command.params if isinstance(parameter, click.Option)
        }
        - {"--help", "--version"}
        for name, command in commands.items()
    }


def main() -> None:
    gc.disable()  # Python 3.11 may miscount the depth of ast.parse otherwise (gh-106905)
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    options = options_by_command()
    distinct = set().union(*options.values())
    rows = [
        ("modules at the top of the package", f"{len(list(SOURCE.glob('*.py')))}", "12 or fewer"),
        ("lines over 100 characters", f"{long_lines(sources.values()):.1%}", "3% or fewer"),
        ("functions over 60 lines", f"{long_functions(trees.values()):.1%}", "2% or fewer"),
        ("empty names per 1,000", f"{empty_names(trees.values()):.1f}", "below 12"),
        ("  where bound", f"{empty_names(trees.values(), bound=True):.1f}", ""),
        ("that/which/where/what/as per 100 words", f"{links(trees.values()):.1f}", "3 or fewer"),
        ("distinct options", f"{len(distinct)}", "60 or fewer"),
        *((f"  {command}", f"{len(names)}", "") for command, names in options.items()),
    ]
    for package in sorted(path for path in SOURCE.iterdir() if list(path.glob("*.py"))):
        inside = [tree for path, tree in trees.items() if package in path.parents]
        figures = f"{empty_names(inside):.1f} empty names, {links(inside):.1f} links"
        rows.append((f"{package.name}/", figures, ""))
    for name, figure, wanted in rows:
        print(f"{name:40}{figure:>8}  {wanted}".rstrip())


if __name__ == "__main__":
    main()
