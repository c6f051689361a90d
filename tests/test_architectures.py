"""The command that makes the table of architectures, on a few of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_table_of_a_few_architectures_has_no_cross() -> None:
    """A plain decoder, a mixture with fused experts, a hybrid, an encoder-decoder, and their classifiers."""
    names = ["LlamaForCausalLM", "MixtralForCausalLM", "JambaForCausalLM", "BartForConditionalGeneration"]
    names += ["ZambaForCausalLM", "BertForSequenceClassification", "JambaForSequenceClassification"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "architectures.py"), "--only", *names],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\u2717" not in done.stdout, done.stdout
    assert all(f"`{name}`" in done.stdout for name in names)
    assert "gate_up_proj, down_proj of every expert" in done.stdout
