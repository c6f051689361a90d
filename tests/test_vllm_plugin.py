"""vLLM's plug-in, with stand-ins of the three classes of vLLM that it meets."""

from __future__ import annotations

import asyncio
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from emendo import vllm_plugin

NAME = "emendo-" + "0123456789abcdef" * 2


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}

    class LoRAResolver:
        pass

    class LoRAResolverRegistry:
        register_resolver = staticmethod(found.__setitem__)

    names = {"request": {"LoRARequest": LoRARequest}, "resolver": {}}
    names["resolver"] = {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": LoRAResolverRegistry}  # type: ignore[dict-item]
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, values in names.items():
        module = ModuleType(f"vllm.lora.{name}")
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, f"vllm.lora.{name}", module)
    return found


def test_an_adapter_is_found_by_its_name(
    registered: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (NAME, f"{NAME}-r16", "other", "emendo-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setenv("EMENDO_ADAPTERS", str(tmp_path))
    vllm_plugin.register()
    resolve = registered["emendo"].resolve_lora
    found = asyncio.run(resolve("base", NAME))
    assert found == LoRARequest(NAME, found.lora_int_id, str(tmp_path / NAME))
    cut = asyncio.run(resolve("base", f"{NAME}-r16"))
    assert 0 < found.lora_int_id < 2**61 and cut.lora_int_id != found.lora_int_id
    elsewhere = (
        "other",
        "emendo-",
        f"../{tmp_path.name}/{NAME}",
        f"{NAME}/.",
        NAME.replace("0", "1"),
        f"{NAME}\n",
    )
    for name in elsewhere:
        assert asyncio.run(resolve("base", name)) is None


def test_vllm_finds_the_plug_in() -> None:
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))
    points = project["project"]["entry-points"]["vllm.general_plugins"]
    found = EntryPoint("emendo", points["emendo"], "vllm.general_plugins").load()
    assert found is vllm_plugin.register


def test_without_a_folder_nothing_is_registered(
    registered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EMENDO_ADAPTERS", raising=False)
    vllm_plugin.register()
    assert registered == {}
