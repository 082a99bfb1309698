"""House rules that no tool checks: what can be imported, how fast help is, and which names exist.

Other rules: layers of packages and imports of the core, import-linter; sizes, complexity and the
order of `__all__`, ruff (both in pyproject.toml); the rest of the style, `make style`.
"""

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Collection
from typing import get_args

import pytest

import prism_select
from prism_select.core.engines import ENGINES
from prism_select.core.gains import GAINS
from prism_select.directions.curvature import CURVATURES
from prism_select.run.config import CountRanking, Ranking, SelectConfig
from prism_select.run.options import options_of
from prism_select.selection.baselines import BASELINES, COUNT_BASELINES

MODULES = [
    module.name
    for module in pkgutil.walk_packages(prism_select.__path__, "prism_select.")
    if not (module.ispkg or module.name.endswith("__main__"))
]
LIGHT = (  # modules that --help, or a caller who only reads files, needs at once
    "api",
    "cli.app",
    "cli.summaries",
    "data.files",
    "data.formats",
    "data.pairing",
    "report.comparison_page",
    "report.run_page",
    "run.config",
    "run.config_evaluate",
    "run.config_pairs",
    "run.polarity",
    "selection.rules",
)
OPTIONS = {option.name: option for option in options_of(SelectConfig)}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_and_has_what_it_offers(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__ and len(module.__doc__) > 20
    assert all(hasattr(module, public) for public in module.__all__)


def test_what_the_package_offers_can_be_imported() -> None:
    assert all(getattr(prism_select, name) is not None for name in prism_select.__all__)
    assert set(prism_select._HOMES) == set(prism_select.__all__)


def in_a_new_process(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_module_imports_alone_and_without_torch(name: str) -> None:
    in_a_new_process(
        f"import sys, prism_select.{name}\nassert 'torch' not in sys.modules, 'torch came with it'"
    )


def test_every_module_imports_alone() -> None:
    forget = "[sys.modules.pop(name) for name in [*sys.modules] if name.startswith('prism_select')]"
    in_a_new_process("\n".join(f"import sys; {forget}; import {name}" for name in MODULES))


def test_help_never_imports_torch() -> None:
    in_a_new_process(
        "import sys\nfrom prism_select.cli.app import main\n"
        "try:\n    main(['select', '--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )


@pytest.mark.parametrize(
    ("choices", "table", "where"),
    [
        (OPTIONS["engine"].choices, ("auto", *ENGINES), "the Literal of `engine`"),
        (OPTIONS["weighting"].choices, GAINS, "the Literal of `weighting`"),
        (OPTIONS["curvature"].choices, CURVATURES, "the Literal of `curvature`"),
        (get_args(Ranking), BASELINES, "`Ranking`"),
        (get_args(CountRanking), COUNT_BASELINES, "`CountRanking`"),
    ],
)
def test_an_option_offers_exactly_the_names_that_are_registered(
    choices: Collection[str], table: Collection[str], where: str
) -> None:
    differ = sorted({*choices} ^ {*table})
    assert not differ, f"{', '.join(differ)}: not both in {where} (run/config.py) and in its table"


def test_engines_are_offered_in_the_order_of_their_table() -> None:
    assert OPTIONS["engine"].choices == ["auto", *ENGINES]
