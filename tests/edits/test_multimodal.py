"""Models that also read images: their language part is edited, and a merged checkpoint keeps the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from cases import VOCABULARY, WIDTH, build_tokenizer
from emendo.editors.mend import Mend, MendConfig
from emendo.edits import to_merged
from emendo.models.loading import load
from emendo.models.sites import find_sites
from mixtures import TEXT

IMAGE, PROMPT = VOCABULARY - 1, "The capital of Fosoba is"
VISION = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.2}


def gemma3() -> tuple[Any, dict[str, Tensor]]:
    """Gemma 3: an image of 4 patches becomes 4 tokens."""
    vision = {
        **VISION,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**TEXT, "sliding_window": 8},
        vision_config=vision,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
        mm_tokens_per_image=4,
    )
    return config, {"pixel_values": torch.randn(1, 3, 28, 28)}


def qwen2_5_vl() -> tuple[Any, dict[str, Tensor]]:
    """Qwen2.5-VL: 16 patches of 14 x 14 pixels, merged 2 by 2, become 4 tokens."""
    vision = {**VISION, "depth": 2, "num_heads": 4, "out_hidden_size": WIDTH, "fullatt_block_indexes": [1]}
    text = {
        **TEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VOCABULARY - 2,
        vision_start_token_id=VOCABULARY - 3,
        vision_end_token_id=VOCABULARY - 4,
    )
    return config, {
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


@pytest.mark.parametrize("build", [gemma3, qwen2_5_vl])
def test_a_merged_checkpoint_keeps_all_but_the_edited_matrices(tmp_path: Path, build: Any) -> None:
    """transformers itself reads the edited logits from it, with an image too; all other tensors are as they were."""
    torch.manual_seed(0)
    config, image = build()
    plain = AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)
    for tensor in plain.parameters():
        if not tensor.any():
            nn.init.normal_(tensor, std=0.1)
    plain.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "base" / name).write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))

    lm = load(tmp_path / "base")
    assert type(lm.model) is type(plain)
    edit: Any = Mend(find_sites(lm.model), MendConfig(rank=4, alpha=0.3)).edit(lm, PROMPT, "Rome")
    assert all("language_model.layers" in name and "vis" not in name for name in edit.deltas)
    to_merged(edit, lm, tmp_path / "merged")

    merged: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert type(merged) is type(plain)
    before, after = plain.state_dict(), merged.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"{name}.weight" for name in edit.deltas}
    assert any("vis" in name for name in before)
    ids = torch.tensor([[5, VOCABULARY - 3, IMAGE, IMAGE, IMAGE, IMAGE, *lm.tokenizer(PROMPT)["input_ids"]]])
    kinds = {"token_type_ids": (ids == IMAGE).long(), "mm_token_type_ids": (ids == IMAGE).long()}
    with torch.no_grad():
        for inputs in ({"input_ids": ids[:, 6:]}, {"input_ids": ids, **kinds, **image}):
            clean = plain(**inputs).logits
            with edit.applied(lm):
                expected = lm.model(**inputs).logits
            torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
            assert (expected - clean).abs().max() > 0.01
    read = {path.name: path.read_text() for path in (tmp_path / "base").glob("*processor_config.json")}
    assert len(read) == 2
    assert all((tmp_path / "merged" / name).read_text() == text for name, text in read.items())
