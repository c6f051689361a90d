"""Which model classes of the installed transformers emendo can edit, as a Markdown table.

Every class that the auto classes know for causal language modelling, sequence-to-sequence language modelling and
sequence classification is built from its config class, tiny and random, and taken through five checks:

- sites: weight matrices are found by structure, with the default choice (MLPs of the last blocks);
- edit: an untrained MEND editor changes the model's answer;
- undo: afterwards the model gives its old logits bit for bit, and no hook, module or weight is different;
- train: a training step of that editor has a finite loss and a gradient that is not zero;
- export: the edit as a PEFT adapter gives the edited logits in PEFT, else as merged weights in the model itself.

    python scripts/architectures.py > docs/architectures.md
    python scripts/architectures.py --only mamba jamba mixtral
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from emendo.editors.mend import Mend, MendConfig
from emendo.editors.objective import Episode, Weights
from emendo.edits.edit import Edit, Request
from emendo.errors import EmendoError
from emendo.models._experts import ExpertMatrix
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.text import collate
from emendo.models.tokenization import to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache
from emendo.train.step import training_step
from tiny_models import tiny_model, tokenizer

KINDS = {
    "decoder": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "Decoders"),
    "encoder-decoder": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "Encoder-decoders"),
    "classifier": (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "Classifiers"),
}
CHECKS = ("sites", "edit", "undo", "train", "export")
SECONDS = 60  # of processor time, for one model
NO_TEXT = {
    **dict.fromkeys(
        ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"),
        "drafts for another model, whose hidden states and keys it reads instead of text",
    ),
    **dict.fromkeys(
        ("MusicgenForCausalLM", "MusicgenMelodyForCausalLM"), "reads and writes audio codes instead of text"
    ),
    "VoxtralRealtimeForConditionalGeneration": "reads audio together with every token",
}
"""Classes of the mappings that have no pass over text alone, and what they read."""


@dataclass
class Row:
    """What was found about one model class.

    Attributes:
        type: its ``model_type``.
        cls: the name of the class.
        kind: a key of :data:`KINDS`.
        passed: the checks that it passed.
        matrices: what is edited by default, or what had to be chosen instead.
        reason: why a check failed; empty where none did.
    """

    type: str
    cls: str
    kind: str
    passed: set[str] = field(default_factory=set)
    matrices: str = ""
    export: str = ""
    reason: str = ""


# -------------------------------------------------------------------------------------------- checks

PROMPT, TARGET, OTHER = "The capital of Fosoba is", "Rome", "The river Kafobe flows through"


def check(row: Row) -> None:
    """Build the model of a row and take it through the checks, up to the first that it fails."""
    step = "build"
    try:
        model = tiny_model(row.kind, row.type, row.cls)
        ids: dict[str, Any] = {
            "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11, 2]])
        }  # some read at the end token
        if "use_cache" in inspect.signature(model.forward).parameters:
            ids["use_cache"] = False
        model(**ids, **({"decoder_input_ids": ids["input_ids"]} if model.config.is_encoder_decoder else {}))
        step = "sites"
        lm = LM(model, tokenizer(), f"tiny-{row.type}")
        sites, row.matrices = default_sites(lm)
        row.passed.add("sites")
        step = "edit"
        before, state = lm.next_logits([PROMPT, OTHER]), _state(model)
        editor = Mend(sites, MendConfig(rank=4, alpha=0.3))
        labels = lm.labels if lm.kind == "classifier" else (TARGET, "Oslo")
        edit = editor.edit(lm, PROMPT, labels[0])
        assert isinstance(edit, Edit)
        with edit.applied(lm):
            after = lm.next_logits([PROMPT, OTHER])
        if not after.isfinite().all() or torch.equal(after, before):
            raise AssertionError("the edit does not change the logits, or breaks them")
        pairs = [Request(PROMPT, labels[0]), Request(OTHER, labels[1])]
        both, alone = editor.each(lm, pairs), editor.each(lm, pairs[1:])
        if any(
            float((both[n][1] + c[0].scale(-1)).norm()) > 1e-2 * float(c[0].norm()) for n, c in alone.items()
        ):
            raise AssertionError("two facts at once have other changes than one by one")
        row.passed.add("edit")
        step = "undo"
        if not torch.equal(lm.next_logits([PROMPT, OTHER]), before) or _state(model) != state:
            raise AssertionError("the model is not what it was")
        row.passed.add("undo")
        step = "train"
        train(lm, editor)
        row.passed.add("train")
        step = "export"
        row.export = export(lm, edit)
        row.passed.add("export")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the row's reason
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        named = first if isinstance(error, EmendoError) else f"{type(error).__name__}: {first}"
        row.reason = f"{step}: {named}"


def default_sites(lm: LM) -> tuple[Any, str]:
    """The sites that are edited by default, else those of the attention; and what they are."""
    try:
        sites, what = find_sites(lm.model), ""
    except EmendoError:
        sites, what = find_sites(lm.model, "attention"), "attention alone: "
    fused = [site for site in sites if isinstance(site.module(lm.model), ExpertMatrix)]
    single = _last_names(site for site in sites if site not in fused)
    if fused:
        single += ("; " if single else "") + _last_names(fused) + " of every expert"
    return sites, what + single


def _last_names(sites: Iterable[Site]) -> str:
    return ", ".join(dict.fromkeys(site.name.split(".")[-1] for site in sites))


def train(lm: LM, editor: Mend) -> None:
    """One training step on two episodes."""
    labels = lm.labels if lm.kind == "classifier" else (TARGET, "Oslo")
    texts = to_texts(lm, [(PROMPT, labels[0]), ("Fosoba's capital is", labels[0]), (OTHER, labels[1])])
    store = TrunkCache(Trunk(lm.model, editor.sites), dtype=torch.float32)
    store.ensure(texts)
    whole, resumed = store.trunk.logits(collate(texts)), store.logits(texts)[1]
    if float((whole - resumed).abs().max()) > 1e-4 * float(whole.abs().max()):
        raise AssertionError("a pass resumed from the frozen blocks gives other logits than the whole model")
    episodes = [Episode(texts[0], texts[1], (texts[2],))] * 2
    outcome = training_step(editor.train(), store, episodes, Weights(0.1))
    if outcome is None:
        raise AssertionError("the loss is not finite")
    if not any(p.grad is not None and p.grad.any() for p in editor.parameters()):
        raise AssertionError("no gradient reaches the editor")


def export(lm: LM, edit: Edit) -> str:
    """Export the edit as an adapter that PEFT reads, else merge it; which of them gives the edited logits."""
    from emendo.edits.peft import prove, to_peft

    with edit.applied(lm):
        expected = lm.next_logits([PROMPT])
    near = 1e-3 * float(expected.abs().max())
    with tempfile.TemporaryDirectory() as folder:
        try:
            to_peft(edit, lm, Path(folder) / "adapter")  # which PEFT reads back, or it is an error
            if prove(edit, lm, Path(folder) / "adapter") < near:
                return "PEFT"
        except Exception:  # noqa: BLE001 - then the other way is tried
            pass
    with contextlib.ExitStack() as stack:
        merged = edit.merge_(lm)
        stack.callback(merged.restore)
        if float((lm.next_logits([PROMPT]) - expected).abs().max()) < near:
            return "merged"
    raise AssertionError("neither an adapter nor a merge gives the edited logits")


def _state(model: torch.nn.Module) -> dict[str, Any]:
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    return {"hooks": hooks} | {name: p.detach().double().sum().item() for name, p in model.named_parameters()}


# --------------------------------------------------------------------------------------------- table


def markdown(found: Sequence[Row]) -> str:
    """The page: a table for each kind of model, and the reasons of the crosses."""
    lines = [
        "# Architectures",
        "",
        f"Made by `python scripts/architectures.py` with transformers {transformers.__version__}. Every class that",
        "the auto classes know is built from its config class, tiny and random, and edited by an untrained MEND editor",
        "with the default choice of matrices. `PEFT` and `merged` are the ways of export that give the edited logits.",
        "",
    ]
    for kind, (_, title) in KINDS.items():
        built = [row for row in found if row.kind == kind and row.passed]
        absent = [row for row in found if row.kind == kind and not row.passed]
        if not built:
            continue
        whole = sum(not row.reason for row in built)
        every = len(built) + len(absent)
        crosses = len(built) - whole
        lines += [
            f"## {title}: {whole} of {every} pass, {crosses} have a cross, {len(absent)} were not built",
            "",
        ]
        lines += [
            "| model type | class | sites | edit | undo | train | export | edited matrices |",
            "|" + " --- |" * 8,
        ]
        for row in built:
            marks = [("yes" if c != "export" else row.export) if c in row.passed else "✗" for c in CHECKS]
            lines.append(f"| {row.type} | `{row.cls}` | " + " | ".join(marks) + f" | {row.matrices} |")
        lines += _reasons("The crosses:", [row for row in built if row.reason])
        lines += _reasons("Not built here, or no text model:", absent)
        lines.append("")
    return "\n".join(lines).rstrip()


def _reasons(title: str, some: Sequence[Row]) -> list[str]:
    return ["", title, "", *(f"- `{row.cls}`: {row.reason}" for row in some)] if some else []


def rows(only: Sequence[str] = ()) -> Iterator[Row]:
    """Every class, checked."""
    for kind, (mapping, _) in KINDS.items():
        classes: dict[str, str] = {}
        for model_type, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names:
                own = getattr(transformers, name).config_class is CONFIG_MAPPING[model_type]
                if own or name not in classes:
                    classes[name] = model_type
        for name, model_type in classes.items():
            if only and model_type not in only and name not in only:
                continue
            row = Row(model_type, name, kind)
            if name in NO_TEXT:
                row.reason = NO_TEXT[name]
            else:
                with _limited(row):
                    check(row)
            yield row


@contextlib.contextmanager
def _limited(row: Row) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s of processor time")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    except TimeoutError as error:
        row.reason = str(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="TYPE", help="model types or class names")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # faster for models this small
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    found = []
    for row in rows(options.only):
        print(f"{row.type} {row.cls} {sorted(row.passed)} {row.reason}", file=sys.stderr, flush=True)
        found.append(row)
    print(markdown(found))


if __name__ == "__main__":
    main()
