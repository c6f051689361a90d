"""Language models: loading, editable weight matrices, tokenised texts, the frozen blocks, and gradient factors.

The public names below are imported when they are first used, so that ``import emendo.models`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emendo.models.capture import Factors
    from emendo.models.lm import LM
    from emendo.models.loading import load
    from emendo.models.sites import Site, all_sites, find_sites
    from emendo.models.text import Text, TokenBatch, collate
    from emendo.models.tokenization import to_texts
    from emendo.models.trunk import Trunk
    from emendo.models.trunk_cache import TrunkCache

_MODULES = {
    "LM": "lm",
    "load": "loading",
    "Site": "sites",
    "find_sites": "sites",
    "Text": "text",
    "TokenBatch": "text",
    "collate": "text",
    "to_texts": "tokenization",
    "Factors": "capture",
    "Trunk": "trunk",
    "TrunkCache": "trunk_cache",
    "all_sites": "sites",
}

__all__ = [
    "LM",
    "Factors",
    "Site",
    "Text",
    "TokenBatch",
    "Trunk",
    "TrunkCache",
    "all_sites",
    "collate",
    "find_sites",
    "load",
    "to_texts",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
