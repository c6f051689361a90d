"""Make model folders of De Cao et al.'s checkpoints: ``python -m reproduction.mend_paper.convert bert-base ...``.

De Cao, Aziz, Titov: "Editing Factual Knowledge in Language Models", EMNLP 2021 (arXiv 2104.08164): ``FC_model.ckpt``, a
BERT with a single logit for FEVER, and ``QA_model.ckpt``, a BART for zsRE, which the MEND paper edits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartForConditionalGeneration,
    BertForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)

from emendo.errors import ModelError

BASES = {"bert-base": "bert-base-uncased", "bart-base": "facebook/bart-base"}
"""The models that the checkpoints are fine-tuned from, for config and tokenizer."""
CLASSES = ("REFUTES", "SUPPORTS")


def convert(
    name: Literal["bert-base", "bart-base"], checkpoint: Path, out: Path, base: str | Path = ""
) -> None:
    """Write a checkpoint as a folder that :func:`emendo.load` reads.

    Args:
        name: of the model.
        checkpoint: the file; it is read as tensors, and no code in it runs.
        out: the folder.
        base: folder or hub id for config and tokenizer, by default that of :data:`BASES`.

    Raises:
        ModelError: the file does not hold that model.
    """
    where = str(base) or BASES[name]
    config = AutoConfig.from_pretrained(where)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    model = _fact_checker(config, state) if name == "bert-base" else _answerer(config, state)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(where).save_pretrained(out)


def _fact_checker(config: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """BERT with two classes whose logits are 0 and the checkpoint's: softmax gives the sigmoid of the latter."""
    config.id2label = dict(enumerate(CLASSES))
    config.label2id = {label: number for number, label in enumerate(CLASSES)}
    found = {
        name.replace("model.", "bert.", 1): tensor
        for name, tensor in state.items()
        if "classifier." not in name
    }
    for part in ("weight", "bias"):
        own = [tensor for name, tensor in state.items() if name.endswith(f"classifier.{part}")]
        if len(own) != 1 or len(own[0]) != 1:
            raise ModelError("The checkpoint is no fact checker: it has no classifier with a single logit.")
        found[f"classifier.{part}"] = torch.cat([torch.zeros_like(own[0]), own[0]])
    return _with_state(BertForSequenceClassification(config), found)


def _answerer(config: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """BART whose answers follow the start token at once, as De Cao et al. trained it: without ``<s>``."""
    prefix = "model." if any(name.startswith("model.model.") for name in state) else ""
    model = BartForConditionalGeneration(config)
    model = _with_state(model, {name.removeprefix(prefix): tensor for name, tensor in state.items()})
    model.config.forced_bos_token_id = None
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.forced_bos_token_id = None
    model.generation_config.begin_suppress_tokens = [config.bos_token_id]
    return model


def _with_state(model: Any, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model with these tensors; tied ones may be left out, and numbers of positions may be more.

    Raises:
        ModelError: tensors are missing, are left over, or differ in shape.
    """
    try:
        report = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:
        raise ModelError(f"The checkpoint does not fit: {str(error).splitlines()[-1].strip()}") from error
    tied = {
        "lm_head.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "final_logits_bias",
    }
    missing = [name for name in report.missing_keys if name not in tied]
    extra = [name for name in report.unexpected_keys if not name.endswith("position_ids")]
    if missing or extra:
        raise ModelError(
            f"The checkpoint does not fit: it lacks {len(missing)} tensors and has {len(extra)} others, such as "
            f"{(missing or extra)[0]}."
        )
    model.tie_weights()
    return model.eval()


def run(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="bert-base or bart-base.")],
    checkpoint: Annotated[Path, typer.Argument(help="FC_model.ckpt or QA_model.ckpt.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, such as mend-data/models/bert-base.")],
    base: Annotated[str, typer.Option(help="Folder or hub id for config and tokenizer.")] = "",
) -> None:
    """Make a model folder of a checkpoint of De Cao et al."""
    if name not in BASES:
        raise typer.BadParameter(f"{name} is not one of {', '.join(BASES)}.")
    try:
        convert(name, checkpoint, out, base)  # type: ignore[arg-type]
    except ModelError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    typer.run(run)
