"""The page in a browser: it draws, searches, sorts and opens without a network; text stays text;
all can use it.

Needs Chromium (Debian: apt-get install chromium). Without it they fail where CI is set, and are
skipped elsewhere."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import Row
from made_run import (
    CONTROLS,
    EVALUATION,
    TARGET,
    change,
    made_curve,
    write_evaluation,
    write_run,
)
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from prism_select.report.comparison_page import write_comparison
from prism_select.report.run_page import write_report

HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
)
HOSTILE += " \"'`&amp; \u202eright\u202c"
FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
WIDTHS = {"wide": (1280, "light"), "dark": (1280, "dark"), "phone": (390, "light")}


@dataclass
class Opened:
    """A page and what went wrong on it: messages, errors, requests."""

    page: Page
    wrong: list[str] = field(default_factory=list)

    def spoke(self, message: ConsoleMessage) -> None:
        self.wrong.append(f"{message.type}: {message.text}")

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_text_contents()


def chromium() -> str:
    found = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    if found:
        return found
    says = "no Chromium here: apt-get install chromium, or name it in CHROMIUM"
    return pytest.fail(says) if os.environ.get("CI") else pytest.skip(says)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with everything in it and hostile texts everywhere, a bare run, and the two of them
    compared."""
    folder = tmp_path_factory.mktemp("pages")
    rows: list[Row] = [
        {
            "prompt": f"Say {i}",
            "completion": f"It is {i}.",
            "id": f"r{i}",
            "source": ["web", HOSTILE][i % 2],
        }
        for i in range(60)
    ]
    rows[0] = {"prompt": HOSTILE, "completion": "long " * 10_000, "id": "hostile"}
    rows[2] = {"prompt": "שלום, מה שלומך?", "completion": "\u202eabc", "id": "right to left"}
    scores = [60.0 - i for i in range(60)]
    tokens: Any = {"token_scores": [[1.0, -2.0]] * 60, "token_texts": [["It <b>", HOSTILE]] * 60}
    run = write_run(folder / "run", rows, scores, **tokens)
    several = {name: TARGET for name in ("math", "code")}
    change(
        run,
        warnings=[HOSTILE],
        target={**TARGET, "targets": several, "cosines": [[1.0, -0.4], [-0.4, 1.0]]},
    )
    broken = {
        "name": "swapped pairs",
        "holds": False,
        "words": "swapped pairs FAILS: 0.9, wanted -0.5 or less",
    }
    methods = {
        name: {**values, "tasks": {HOSTILE: [0.5]}}
        for name, values in EVALUATION["methods"].items()
    }
    curve = made_curve({0.05: (0.1, 0.2), 0.5: (0.1, 0.3)}, HOSTILE)
    write_evaluation(run, controls=[*CONTROLS, broken], methods=methods, curve=curve)
    bare = write_run(folder / "bare", rows, [-score for score in scores])
    for name in ("pairs.parquet", "direction.safetensors"):
        (bare / name).unlink()
    change(bare, target={"direction": "d"})
    return {
        "run": write_report(str(run)),
        "bare": write_report(str(bare)),
        "both": write_comparison(str(run), str(bare)),
    }


@pytest.fixture(params=["wide"])
def opened(
    request: pytest.FixtureRequest, browser: Browser, pages: dict[str, Path]
) -> Iterator[Opened]:
    """The page of a run; by parameter another page, width and colours."""
    name, _, width = request.param.rpartition(" ")
    pixels, colours = WIDTHS[width]
    viewport: Any = {"width": pixels, "height": 900}
    context = browser.new_context(viewport=viewport, color_scheme=colours, offline=True)  # type: ignore[arg-type]
    found = Opened(context.new_page())
    found.page.on("console", found.spoke)
    found.page.on("pageerror", lambda error: found.wrong.append(str(error)))
    found.page.on("dialog", lambda dialog: found.wrong.append("a dialog"))
    address = f"file://{pages[name or 'run']}"
    found.page.on(
        "request", lambda asked: found.wrong.extend([asked.url] if asked.url != address else [])
    )
    found.page.goto(address)
    found.page.wait_for_selector("body[data-ready=all]")
    yield found
    context.close()


EVERY = [f"{name} {width}" for name in ("run", "bare", "both") for width in WIDTHS]


@pytest.mark.parametrize("opened", EVERY, indirect=True)
def test_the_page_loads_from_disk_without_network_errors_or_overflow_and_draws_its_charts(
    opened: Opened,
) -> None:
    plots = opened.page.locator("[data-chart]")
    assert plots.count() >= 1
    for place in range(plots.count()):
        plot = plots.nth(place)
        assert plot.locator("[aria-hidden=true] svg path").count() > 5
        assert (
            plot.get_attribute("role") == "img" and len(plot.get_attribute("aria-label") or "") > 20
        )
        width, inside = plot.bounding_box(), plot.locator("svg").bounding_box()
        assert width and inside and inside["width"] <= width["width"] + 1 and inside["height"] > 60
    assert opened.page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert not opened.wrong


@pytest.mark.parametrize("opened", EVERY, indirect=True)
def test_nothing_serious_stands_in_the_way_of_a_screen_reader(opened: Opened) -> None:
    first = opened.page.locator(".opener").first
    if first.count():
        first.click()
    for details in opened.page.locator("details").all():
        details.locator("summary").click()
    found = Axe().run(opened.page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(
        [(each["id"], [n["html"][:200] for n in each["nodes"]]) for each in serious], indent=1
    )


def test_texts_of_the_pool_stay_texts(opened: Opened) -> None:
    row = opened.page.locator("[data-table=examples] tr.row").first
    row.locator(".opener").click()
    said = opened.texts(".detail .speech")
    assert said[0] == HOSTILE
    assert said[1] == ("long " * 10_000)[: 4000 - len(HOSTILE)]
    assert "truncated: 50,000 characters in all" in opened.texts(".detail .shortened")
    assert said[2] == "It <b>" + HOSTILE
    assert opened.page.title() == "PRISM: run"
    assert (
        opened.page.locator("main script, main img, main b, main iframe, main object").count() == 0
    )
    assert HOSTILE in opened.texts(".warnings li") and HOSTILE in opened.texts("#spread th bdi")
    assert not opened.wrong


def test_a_chart_tells_its_numbers_under_the_pointer_and_names_stay_texts_there(
    opened: Opened,
) -> None:
    names = list[str]()
    for bar in opened.page.locator("[data-chart=sources] svg .mark-rect path").all():
        bar.hover(force=True)
        opened.page.wait_for_selector("#vg-tooltip-element.visible")
        names += opened.texts("#vg-tooltip-element tr:first-child .value")
    assert {"web", HOSTILE} <= set(names)
    assert opened.page.locator("#vg-tooltip-element img, #vg-tooltip-element script").count() == 0
    assert opened.page.title() == "PRISM: run" and not opened.wrong


def test_text_that_runs_from_right_to_left_turns_nothing_else(opened: Opened) -> None:
    opened.page.locator("#examples-search").fill("שלום")
    opened.page.locator("[data-table=examples] .opener").first.click()
    for text in opened.page.locator(".detail .speech").all()[:2]:
        style = text.evaluate("node => [getComputedStyle(node).unicodeBidi, node.dir]")
        assert style == ["isolate", "auto"]
    assert (
        opened.page.locator(".detail .speech").first.evaluate(
            "node => getComputedStyle(node).direction"
        )
        == "rtl"
    )


def test_a_search_narrows_and_says_how_far(opened: Opened) -> None:
    search, count = (
        opened.page.locator("#examples-search"),
        opened.page.locator("[data-table=examples] output"),
    )
    assert count.text_content() == "60 of 60 shown"
    search.fill("SAY 17")
    assert opened.page.locator("[data-table=examples] tr.row").count() == 1
    assert "Say 17 ⏎ It is 17." in (
        opened.page.locator("[data-table=examples] .opener").text_content() or ""
    )
    assert count.text_content() == "1 of 60 shown"
    search.fill("nobody wrote this")
    assert opened.page.locator("[data-table=examples] tr.row").count() == 0
    assert (
        opened.page.locator("[data-table=examples] tbody").inner_text()
        == "No row here has all of these words."
    )
    search.fill("")
    opened.page.locator("#examples-group").select_option("top")
    assert opened.page.locator("[data-table=examples] tr.row").count() == 20


def test_a_column_sorts_both_ways_and_says_so(opened: Opened) -> None:
    score = opened.page.locator("[data-table=examples] th[data-key=score]")

    def column() -> list[float]:
        cells = opened.page.locator(
            "[data-table=examples] tr.row td:nth-child(2)"
        ).all_text_contents()
        return [float(cell.replace("−", "-")) for cell in cells]

    score.locator("button").click()
    assert (
        column() == sorted(column(), reverse=True)
        and score.get_attribute("aria-sort") == "descending"
    )
    score.locator("button").click()
    assert column() == sorted(column()) and score.get_attribute("aria-sort") == "ascending"
    assert column()[0] == 1 and len(set(column())) == 60


def test_a_row_opens_by_the_keyboard_alone(opened: Opened) -> None:
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.className") == "skip"
    opened.page.keyboard.press("Enter")
    assert opened.page.evaluate("document.activeElement.id") == "main"
    opener = opened.page.locator("[data-table=examples] .opener").nth(1)
    opener.focus()
    assert opener.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    opened.page.keyboard.press("Enter")
    assert opener.get_attribute("aria-expanded") == "true"
    assert opened.page.locator(".detail").count() == 1
    opened.page.keyboard.press("ArrowDown")
    focused = opened.page.evaluate("document.activeElement.textContent")
    assert "שלום" in focused
    opened.page.keyboard.press("ArrowUp")
    opened.page.keyboard.press("Enter")
    assert (
        opener.get_attribute("aria-expanded") == "false"
        and opened.page.locator(".detail").count() == 0
    )


def test_an_open_row_colours_its_tokens(opened: Opened) -> None:
    opened.page.locator("[data-table=examples] .opener").nth(3).click()
    pieces = opened.page.locator(".detail .speech").last.locator("span")
    colours = pieces.evaluate_all("nodes => nodes.map(node => node.style.backgroundColor)")
    assert "--plus" in colours[0] and "--minus" in colours[1]


def test_a_pair_opens_to_both_answers(opened: Opened) -> None:
    opened.page.locator("[data-table=pairs] .opener").first.click()
    said = opened.texts("[data-table=pairs] .speech")
    assert (
        said[0].startswith("Question")
        and said[1].startswith("Right")
        and said[2].startswith("Wrong")
    )


def test_a_failed_control_is_red(opened: Opened) -> None:
    row = opened.page.locator(".checks tr.red")
    assert "swapped pairs" in (row.text_content() or "") and "failed" in (row.text_content() or "")
    red = opened.page.evaluate(
        "getComputedStyle(document.documentElement).getPropertyValue('--bad').trim()"
    )
    assert red == "#a3201d"
    assert row.locator("th").evaluate("node => getComputedStyle(node).color") == "rgb(163, 32, 29)"


def test_paper_is_white_and_carries_the_whole_page(opened: Opened) -> None:
    opened.page.emulate_media(media="print", color_scheme="dark")
    assert (
        opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert (
        not opened.page.locator(".contents").is_visible()
        and not opened.page.locator(".tools").first.is_visible()
    )
    assert opened.page.locator("[data-chart] svg").first.is_visible()
    assert len(opened.page.pdf()) > 20_000
