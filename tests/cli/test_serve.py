"""What `emendo serve` refuses before it loads a model; the server itself is tested in tests/serve."""

from __future__ import annotations

import pytest

from cli.samples import Emendo


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--upstream", "http://127.0.0.1:1", "--engine", "ollama"), "not one of vllm, sglang, llama.cpp"),
        (("--upstream", "127.0.0.1:1"), "is not the address of an engine"),
        (("--max-rank", 16), "belong to --upstream"),
        (("--host", "0.0.0.0"), "tokens for asking and for editing are required"),
    ],
)
def test_options_that_do_not_fit(
    emendo_command: Emendo, options: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EMENDO_ASK_TOKEN", "EMENDO_EDIT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    said = emendo_command("serve", "no-such-model", "--port", 0, *options, code=2)
    assert message in said.err and said.out == ""
