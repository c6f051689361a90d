"""A plug-in of vLLM that finds the adapters of ``emendo serve`` by their names.

vLLM calls :func:`register` at its start, by the entry point ``vllm.general_plugins``. With the folder of adapters in
``EMENDO_ADAPTERS`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``, a request for a model ``emendo-...`` is answered with
that adapter, without a call that loads it first. Any other name is left to vLLM.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from emendo._adapter_names import NAME as ADAPTER


def register() -> None:
    """Register the resolver, if there is a folder of adapters."""
    if folder := os.environ.get("EMENDO_ADAPTERS"):
        from vllm.lora.resolver import LoRAResolverRegistry

        LoRAResolverRegistry.register_resolver("emendo", resolver(Path(folder)))


def resolver(folder: Path) -> Any:
    """A ``LoRAResolver`` of the adapters in a folder."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class EmendoResolver(LoRAResolver):
        """Finds an adapter by its name."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """The request for an adapter; None if the folder has none of that name."""
            if not ADAPTER.fullmatch(lora_name) or not (folder / lora_name / "adapter_config.json").is_file():
                return None
            number = 1 + int(hashlib.sha256(lora_name.encode()).hexdigest()[:15], 16)
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(folder / lora_name))

    return EmendoResolver()
