"""Edits as values: low-rank changes of a few matrices that are applied, saved, merged, fused and exported.

:func:`emendo.editors.read_edit` reads an edit of any kind from its folder.
"""

from emendo.edits._provenance import Origin, Request
from emendo.edits._weights import Merged, merge, weight_norm
from emendo.edits.base import BaseEdit
from emendo.edits.edit import Attachment, Edit, as_weights, compose, conflicts, diff
from emendo.edits.fusing import fuse
from emendo.edits.gguf import to_gguf, to_merged_gguf
from emendo.edits.incremental import FusedEdits
from emendo.edits.merged import to_merged
from emendo.edits.peft import Adapter, from_peft, prove, to_peft
from emendo.edits.per_request import applied_to_rows

__all__ = [
    "Adapter",
    "Attachment",
    "BaseEdit",
    "Edit",
    "FusedEdits",
    "Merged",
    "Origin",
    "Request",
    "applied_to_rows",
    "as_weights",
    "compose",
    "conflicts",
    "diff",
    "from_peft",
    "fuse",
    "merge",
    "prove",
    "to_gguf",
    "to_merged",
    "to_merged_gguf",
    "to_peft",
    "weight_norm",
]
