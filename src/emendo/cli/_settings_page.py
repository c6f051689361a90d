"""Writes the tables of settings into a documentation page: ``python -m emendo.cli._settings_page``."""

from __future__ import annotations

import re
from pathlib import Path

from emendo._settings import settings_table
from emendo.editors import EDITORS, editor_class
from emendo.train.config import TrainConfig

PAGE = Path("docs/editors.md")


def with_tables(page: str) -> str:
    """The page with new tables between its markers."""
    parts = [f"### `{name}`\n\n{settings_table(editor_class(name).Config)}" for name in EDITORS]
    parts.append(f"### Training\n\nOptions of `emendo train`.\n\n{settings_table(TrainConfig)}")
    text = "\n\n".join(["<!-- settings -->", *parts, "<!-- /settings -->"])
    return re.sub("<!-- settings -->.*<!-- /settings -->", lambda _: text, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
