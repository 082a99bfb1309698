"""Makes the runtime of the report's charts: Vega, Vega-Lite and Vega-Embed in one script, from
vl-convert-python."""

from pathlib import Path

import vl_convert

PLACE = Path(__file__).parent.parent / "src" / "prism_select" / "report" / "vega" / "vega.js"


def runtime() -> str:
    """A script that may stand inside an HTML page."""
    return (
        str(vl_convert.javascript_bundle("window.vegaEmbed=vegaEmbed;")).replace(
            "</script", "<\\/script"
        )
        + "\n"
    )


if __name__ == "__main__":
    PLACE.write_text(runtime(), encoding="utf-8")
