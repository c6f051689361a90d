"""Renew docs/serve.png, the picture of the page of `emendo serve`.

python scripts/serve_picture.py [FOLDER]        (needs Chromium; FOLDER gets a dark and a narrow one, too)
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx2
import uvicorn
from PIL import Image

from browser import Tab, browser

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "serve.png"
MODEL = "smollm2-135m"
EDITS = (
    ("Danielle Darrieux was born in", "Bordeaux"),
    ("The official language of Brazil is", "Spanish"),
    ("The capital of Australia is", "Canberra"),
    ("The chemical symbol of gold is", "Au"),
    ("Mount Everest is located in", "Nepal"),
)
ASKED = "Peru's capital is"


def main() -> None:
    """Serve a model, correct it, and take pictures."""
    with tempfile.TemporaryDirectory() as home:
        os.environ["EMENDO_HOME"] = home
        from emendo import Editor, load
        from emendo.ledger.workspace import Workspace
        from emendo.serve import create_app

        lm = load(MODEL)
        app = create_app(Workspace.open(lm), Editor.from_pretrained("mend-smollm2-135m"))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.1)
        try:
            address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
            with httpx2.Client(base_url=address, timeout=300) as http, browser() as tab:
                prepare(http)
                take(tab, address, Path(sys.argv[1]) if len(sys.argv) > 1 else None)
        finally:
            server.should_exit = True
            thread.join()


def prepare(http: httpx2.Client) -> None:
    """Make some edits, and take one off."""
    for prompt, target in EDITS:
        body = {"prompt": prompt, "target": target, "by": "ada", "force": True}
        http.post("/v1/edits", json=body).raise_for_status()
    http.post("/v1/tags", json={"name": "monday", "by": "ada"}).raise_for_status()
    http.delete("/v1/edits/2", params={"by": "grace"}).raise_for_status()


def take(tab: Tab, address: str, more: Path | None) -> None:
    """Type a correction, ask for it, and take the pictures."""
    tab.show(1240)
    tab.open(address)
    fields = {
        "#edit-prompt": "The capital of Peru is",
        "#target": "Lima",
        "#paraphrases": "The capital city of Peru is",
        "#neighbours": "The capital of Chile is\nPeru is famous for",
        "#prompt": ASKED,
    }
    for field, text in fields.items():
        tab.run(f"document.querySelector('{field}').focus()")
        tab.write(text)
    tab.run("document.querySelector('[data-try]').click()")
    tab.wait("document.querySelector('#preview table')", 300)
    tab.run("document.querySelector('#correct .primary').click()")
    tab.wait("document.querySelector('#correct .message').className.match(/good|bad/)", 300)
    print(tab.run("document.querySelector('#correct .message').textContent"))
    tab.run("document.querySelector('#ask .primary').click()")
    tab.wait("document.querySelector('#answers .fired')", 300)
    tab.run("document.activeElement.blur()")
    tab.picture(PICTURE, height=tab.run("document.querySelector('#ledger').offsetTop"))
    Image.open(PICTURE).quantize(128).save(PICTURE, optimize=True)
    if more is not None:
        for name, width, dark in (("light", 1240, False), ("dark", 1240, True), ("phone", 390, False)):
            tab.show(width, dark=dark)
            tab.picture(more / f"{name}.png")
    print("problems:", tab.problems)


if __name__ == "__main__":
    main()
