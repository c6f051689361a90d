"""Names of adapters in other engines: made of hex digits of SHA-256, never of a client's text.

Two changes never have one name, so what an engine keeps under a name (weights, a prefix cache) stays right for it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

NAME = re.compile(r"emendo-[0-9a-f]{32}(-r[1-9][0-9]{0,4})?")


def adapter_name(digests: Sequence[str], max_rank: int | None = None) -> str:
    """The name of the adapter of one or more changes that add up.

    Args:
        digests: SHA-256 of each, in hex.
        max_rank: the rank to which it is cut.
    """
    digest = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    name = f"emendo-{digest[:32]}" + (f"-r{max_rank}" if max_rank else "")
    if not NAME.fullmatch(name):
        raise ValueError(f"{digest!r} is no digest")
    return name
