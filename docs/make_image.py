"""Makes docs/report.png: the top of the report of the demo's run, in Chromium.

prism demo --out prism-demo && python docs/make_image.py prism-demo/select
"""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from prism_select.report.run_page import write_report

IMAGE = Path(__file__).with_name("report.png")
WIDTH, HEIGHT, SCALE = 1240, 1650, 0.85


def main(run: str) -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    page = write_report(run).resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT},
            device_scale_factor=SCALE,
            color_scheme="light",
        )
        view.goto(page.as_uri())
        view.wait_for_selector("body[data-ready=all]")
        view.wait_for_selector(".contents a[aria-current]")
        view.screenshot(path=IMAGE)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
