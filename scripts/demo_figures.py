"""Renew what README shows of `emendo demo`: the picture of the edit, docs/demo.png, and the table of scores.

    python scripts/demo_figures.py        (make figures; needs Chromium for the picture)

The figures are the same on every machine, up to rounding: the demo's model is read in float32, and nothing is random.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from emendo._storage import read_json
from emendo.report.figures import scores
from emendo.report.tables import to_markdown

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "runs" / "demo"
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "demo.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MARK = "<!-- make figures -->"
"""The line of README.md below which the table stands."""
WIDTH = 1060

ONLY_THE_EDIT = """<style>
  main { padding: 12px; max-width: none; }
  section { margin: 0; }
  section.long ~ *, header, .tiles, main > *:not(section.long) { display: none !important; }
</style>"""
SAY_HEIGHT = """<script>
  document.body.innerHTML = "<pre>height " + document.documentElement.scrollHeight + "</pre>";
</script>"""


def main() -> None:
    """Run the demo and write both."""
    subprocess.run([sys.executable, "-m", "emendo", "demo", "--out", str(DEMO)], check=True)
    table = scores(read_json(DEMO / "evaluation.json")["figures"])
    main_rows = [row for row in table.rows if not str(row[0]).startswith(" ")]
    shown = to_markdown(dataclasses.replace(table, rows=main_rows, note=""))
    text, found = re.subn(
        rf"(?<={re.escape(MARK)}\n)(\|.*\n)*", lambda _: shown, README.read_text(encoding="utf-8")
    )
    assert found == 1, f"README.md has no line {MARK}"
    README.write_text(text, encoding="utf-8")
    print(f"wrote {README}")
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no picture: none of the browsers {', '.join(BROWSERS)} is installed")
    take_picture(browser, (DEMO / "report.html").read_text(encoding="utf-8"))
    print(f"wrote {PICTURE}")


def take_picture(browser: str, page: str) -> None:
    """Write the report's section on the edit as a picture of its own height."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "page.html"

        def browse(height: int, *words: str) -> str:
            flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
            profile = f"--user-data-dir={file.parent / 'profile'}"
            size = f"--window-size={WIDTH},{height}"
            command = (browser, *flags, profile, size, *words, file.as_uri())
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        page = page.replace("</head>", ONLY_THE_EDIT + "</head>", 1)
        file.write_text(page.replace("</body>", SAY_HEIGHT + "</body>"), encoding="utf-8")
        height = re.search(r"height (\d+)", browse(200, "--dump-dom"))
        assert height is not None, "the browser shows nothing"
        file.write_text(page, encoding="utf-8")
        browse(int(height[1]), f"--screenshot={PICTURE}")
    Image.open(PICTURE).quantize(128).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
