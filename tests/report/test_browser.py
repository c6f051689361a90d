"""The report in a real browser: no error on its console, and the search finds facts."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from emendo.evaluate.evaluation import Checkpoint, SequentialEvaluation
from emendo.report.html import render_report
from evaluate.samples import edit, evaluation, history, rows

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"none of the browsers {', '.join(NAMES)} is installed"),
]

WATCH = """<script>
window.problems = [];
window.addEventListener("error", function (e) { window.problems.push(e.message || "something did not load"); }, true);
["error", "warn"].forEach(function (kind) { console[kind] = function (text) { window.problems.push(text); }; });
</script>"""
ACT = """<script>
(function () {
  var box = document.getElementById("filter"), said = [], rows = document.getElementById("records").tBodies;
  ["", "Bade", "BADE", "nobody"].forEach(function (wanted) {
    box.value = wanted;
    box.dispatchEvent(new Event("input"));
    var shown = Array.prototype.filter.call(rows, function (row) { return row.offsetHeight > 0; }).length;
    said.push(shown + " (" + document.getElementById("count").textContent + ")");
  });
  var wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.body.innerHTML = "<pre>" + said.join("; ") + "|" + wide + "|" + window.problems.join(" ") + "</pre>";
})();
</script>"""
HARNESS = {
    "edits": "the clean model, and the one with all edits",
    "harness": {"lm_eval": "0.4", "limit": 5, "prompts": "as the tasks give them"},
    "scores": {
        "a_task: acc_norm (strict-match)": {
            "before": 0.5,
            "before_stderr": 0.1,
            "after": None,
            "after_stderr": None,
            "better": 1,
            "questions": 5,
            "version": 1.0,
            "shots": 0,
        }
    },
}


def sequential() -> SequentialEvaluation:
    found = evaluation()
    return SequentialEvaluation(
        found.results,
        (Checkpoint(1, found.results[:1]), Checkpoint(2, found.results)),
        {"edits": "x"},
        harness=HARNESS,
    )


def seen(page: str, tmp_path: Path, width: int) -> tuple[str, str, str]:
    """What the page says of itself, by how much it is too wide, and its problems."""
    path = tmp_path / "page.html"
    page = page.replace("<head>", "<head>" + WATCH, 1).replace("</body>", ACT + "</body>")
    path.write_text(page, encoding="utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run(
        (str(BROWSER), *flags, f"--window-size={width},900", "--dump-dom", path.as_uri()),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r"<pre>(.*?)\|(.*?)\|(.*?)</pre>", done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    return found[1], found[2], found[3]


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_works(width: int, tmp_path: Path) -> None:
    first, second = evaluation().results
    named = dataclasses.replace(first.outcomes[0], prompt="The capital of Bade is")
    first = dataclasses.replace(first, outcomes=(named, *first.outcomes[1:]))
    page = render_report(
        info={"command": "emendo evaluate"},
        evaluation=dataclasses.replace(evaluation(), results=(first, second)),
        edit=edit(),
        rows=rows(),
        norms={"a.b": 0.1},
        history=history(),
        sequential=sequential(),
    )
    assert seen(page, tmp_path, width) == (
        "2 (2 facts); 1 (1 of 2 facts); 1 (1 of 2 facts); 0 (0 of 2 facts)",
        "0",
        "",
    )


def test_what_a_broken_script_says_is_seen(tmp_path: Path) -> None:
    page = render_report(info={}, evaluation=evaluation())
    broken = page.replace("<main>", "<main><script>nothing.at.all()</script>", 1)
    assert "nothing is not defined" in seen(broken, tmp_path, 1200)[2]
