"""How an evaluation was done, in words and numbers, and what an editor costs."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch

from emendo.editors.base import Editor
from emendo.evaluate.cases import EXTRA_TOKENS, TOKEN_STEP
from emendo.evaluate.damage import Damage
from emendo.evaluate.ways import Ways
from emendo.models import LM


def words(lm: LM, editor: Editor, ways: Ways, damage: Damage | None) -> Mapping[str, Any]:
    """How it was measured; what each score is stands in :mod:`emendo.evaluate.scores`."""
    one = ways.together == 1
    found = {
        "edits": "one at a time, each from the clean model"
        if one
        else f"{ways.together} facts at once, each edit from the clean model",
        "edit_success": "all target tokens are the argmax, teacher forced, on the edit prompt",
        "generalisation": "the same on each paraphrase; mean over a record's paraphrases",
        "locality": "the argmax is unchanged at all answer tokens, teacher forced on the stored answer; mean over a "
        "record's neighbours and unrelated prompts",
        "locality_known": "locality over the prompts whose stored answer the clean model predicts",
        "interval": "95% percentile bootstrap over the records; where all have the same share, the Wilson interval",
        "seconds_per_edit": "median of up to 20 edits made alone",
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "prompts": lm.framing.words,
        "editor": editor.name,
        "batch": ways.batch,
        "together": ways.together,
    }
    if ways.generated:
        found |= {
            "generation": "greedy, from the prompt alone",
            "generated_edit_success": "the continuation begins with the target, as whole words, case and quotes aside",
            "generated_locality": "the continuation begins with the same words before and after, as many as the stored "
            "answer has",
            "generated_locality_whole_text": "the continuation is the same text before and after, letter by letter, up "
            "to its first line break",
            "new_tokens": ways.new_tokens
            or f"answer tokens + {EXTRA_TOKENS}, rounded up to a multiple of {TOKEN_STEP}",
        }
    return found | (damage.words() if damage is not None else {})


def cost(lm: LM, editor: Editor) -> dict[str, float]:
    """The size of the editor, and the most memory that was in use.

    ``peak_memory_bytes`` is that of the whole process on a CPU, model and Python included, since it began; on a CUDA
    device what was allocated there.
    """
    tensors = [*editor.parameters(), *editor.buffers()]
    if lm.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(lm.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "editor_parameters": sum(p.numel() for p in editor.parameters()),
        "editor_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "peak_memory_bytes": peak,
    }
