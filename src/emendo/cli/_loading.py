"""Loading models, editors and records for commands, with a note on what takes time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from emendo._storage import cache_folder
from emendo.cli._console import complain, note, status
from emendo.cli._runs import editor_folder
from emendo.cli._settings import RunSettings, editor_config, site_choice
from emendo.cli.data import unused_fields
from emendo.data import Record, RecordSet, read_records
from emendo.editors import DEFAULT, EDITORS, Editor, editor_class, library
from emendo.errors import DataError, RequestError
from emendo.models.devices import fastest_dtype, usable_device
from emendo.models.loading import BUILT_IN, LM, load
from emendo.models.moments import passages_of
from emendo.models.sites import Site, find_sites
from emendo.models.tokenization import to_texts

_SHOWN = 10  # records in an error message
_SPECIAL_TOKENS = 8  # the most that a tokenizer adds to a text


def load_model(
    name: str,
    dtype: str = "float32",
    device: str | None = None,
    *,
    chat: bool = False,
    offload: bool = False,
) -> LM:
    """Load a model, and print a note if that takes long.

    Args:
        name: of the model.
        dtype: of its weights.
        device: where it runs; ``"auto"`` spreads it over GPUs, memory and disk.
        chat: put prompts into the chat template.
        offload: leave its blocks in its files.

    Raises:
        ModelError: there is no such model, or it has no chat template and ``chat`` asks for it.
        RequestError: there is no such device.
    """
    if name in BUILT_IN and not (cache_folder() / "models" / name / "config.json").exists():
        note(f"Converting {name} for the first time (about half a minute; kept in {cache_folder()}).")
    spread = "disk" if offload else "auto" if device == "auto" else None
    place = None if device == "auto" else device
    with status(f"Loading the model {name}"):
        return load(name, dtype=dtype, device=place, chat=chat, device_map=spread)


def named_dtype(dtype: str, device: str | None) -> str:
    """The format that ``fastest`` stands for on this device, with a note; any other format is returned as it is.

    Raises:
        RequestError: there is no such device.
    """
    if dtype != "fastest":
        return dtype
    if device in (None, "auto"):
        device = "cuda" if device and torch.cuda.is_available() else "cpu"
    found = fastest_dtype(usable_device(device))
    if found != "float32":
        note(f"The model is loaded in {found}, which multiplies fastest here; --dtype float32 is exact.")
    return found


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """A command's options for a method that needs no training.

    Attributes:
        settings: ``KEY=VALUE`` texts of ``--set``.
        sites: values of ``--sites``.
        last: value of ``--last``.
    """

    settings: Sequence[str] | None = None
    sites: Sequence[str] | None = None
    last: int | None = None


def load_editor(
    name: str | None,
    model: str | None,
    dtype: str,
    device: str | None,
    method: MethodOptions | None = None,
    chat: bool | None = None,
) -> tuple[LM, Editor]:
    """An editor, and the model it belongs to.

    Args:
        name: the folder of a trained editor or of its run, the name of one that ships with emendo or of one on the
            hub, or a method that needs no training; None takes the editor that ships for the model, else
            :data:`emendo.editors.DEFAULT`.
        model: the model; None takes the one that the editor was trained for, or the built-in one.
        dtype: number format of the model.
        device: device of the model.
        method: settings of a method that needs no training.
        chat: whether prompts are put into the chat template; None takes the form the editor was trained on.

    Raises:
        StorageError: there is no editor, or it is damaged.
        MismatchError: the model is another one.
        RequestError: a method that must be trained first, or settings that do not belong to the editor.
    """
    method = method or MethodOptions()
    if name is None:
        return _default(model, dtype, device, method, bool(chat))
    if name in EDITORS and not any((Path(name) / file).exists() for file in ("editor.json", "run.json")):
        return _untrained(name, model, dtype, device, method, bool(chat))
    known = Path(name).exists() or name.count("/") != 1
    shipped = any(entry.name == name for entry in library.shipped())
    editor = Editor.from_pretrained(editor_folder(Path(name)) if known and not shipped else name)
    if method != MethodOptions():
        raise RequestError(
            f"--set, --sites and --last are for methods that need no training; the editor in {name} has its own."
        )
    where = model or editor.info.get("model_name") or next(iter(BUILT_IN))
    lm = load_model(where, dtype, device, chat=bool(editor.chat) if chat is None else chat)
    editor.check(lm)
    return lm, editor.to(lm.device)


def _default(
    model: str | None, dtype: str, device: str | None, method: MethodOptions, chat: bool
) -> tuple[LM, Editor]:
    """The editor that ships for a model, else a method that needs no training; a note says which."""
    lm = load_model(model or next(iter(BUILT_IN)), dtype, device, chat=chat)
    found = library.shipped_for(lm.fingerprint) if method == MethodOptions() else None
    if found is not None:
        note(f"Using {found.name}, the trained editor that ships with emendo for this model.")
        return lm, Editor.from_pretrained(found.name).to(lm.device)
    note(
        f"Using {DEFAULT}, the best method that needs no training; an editor trained for {lm.name} does better: "
        f"emendo train --model {lm.name}"
    )
    return lm, _of_method(DEFAULT, lm, method)


def _untrained(
    name: str,
    model: str | None,
    dtype: str,
    device: str | None,
    method: MethodOptions,
    chat: bool,
) -> tuple[LM, Editor]:
    """An editor of a method that needs no training."""
    kind = editor_class(name)
    if kind.needs_training:
        where = f" --model {model}" if model else ""
        raise RequestError(
            f"The {name} editor must be trained first: emendo train --editor {name}{where} --out runs/{name}. Then "
            f"give its folder: --editor runs/{name}."
        )
    lm = load_model(model or next(iter(BUILT_IN)), dtype, device, chat=chat)
    return lm, _of_method(name, lm, method)


def _of_method(name: str, lm: LM, method: MethodOptions) -> Editor:
    """A method that needs no training, with its settings, at the chosen sites of a model."""
    kind = editor_class(name)
    if kind.no_changes and (method.sites or method.last is not None):
        raise RequestError(
            f"--sites and --last choose weight matrices, but {kind.no_changes}: leave them out."
        )
    config = editor_config(name, method.settings or ())
    sites: tuple[Site, ...] = ()
    if method.sites or method.last is not None:
        sites = find_sites(lm.model, site_choice(method.sites or ["mlp"]), last=method.last)
    elif not kind.no_changes:
        sites = kind.default_sites(lm.model)
    return kind(sites, config).eval()


def read(
    source: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    need_paraphrase: bool = True,
) -> RecordSet:
    """Read records, and note how many bad ones were left out, which fields are not read, and any doubts about the data.

    Raises:
        DataError: see :func:`emendo.data.read_records`.
    """
    records = read_records(
        source, split=split, limit=limit, skip_bad=skip_bad, need_paraphrase=need_paraphrase
    )
    if bad := records.skipped:
        why = ", ".join(f"{count} {reason}" for reason, count in records.reasons.items())
        left_out = sum(records.reasons.values())
        note(f"{source}: {left_out} records were left out ({why}), the first: {bad[0]}")
    if unused := unused_fields(records.unused):
        note(f"{source}: fields that are not read, with the number of records: {unused}.")
    for warning in records.warnings:
        complain(f"{source}: {warning}.", "Warning:")
    return records


def separated_by(records: RecordSet, option: str | None) -> RecordSet:
    """The records with the value of ``--separator`` where they have no separator of their own."""
    if (between := unescaped(option)) is None:
        return records
    held = [r if r.separator is not None else replace(r, separator=between) for r in records]
    return replace(records, held=held)


def unescaped(separator: str | None) -> str | None:
    """A value of ``--separator`` as text."""
    return separator and separator.replace("\\n", "\n").replace("\\t", "\t")


def readable(lm: LM, records: RecordSet, *, skip_bad: bool | None = None) -> tuple[Record, ...]:
    """The records whose texts all fit the model.

    Args:
        lm: the model.
        records: from :func:`read`.
        skip_bad: leave the others out, with a note; None where the command has no such option.

    Raises:
        DataError: there are others, or no record is left; gives file and line of each.
    """
    found, problems, room = [], [], _letters(lm)
    for index, record in enumerate(records):
        texts = record.texts()
        long = any(
            len(text := f"{prompt}{between or ' '}{answer}") >= room or not text.isascii()
            for prompt, answer, between in texts
        )
        try:
            if long:
                to_texts(lm, texts)
            found.append(record)
        except RequestError as error:
            problems.append(f"{records.place(index)}: {error}")
    if problems and (not skip_bad or not found):
        option = ", or leave them out with --skip-bad" * (skip_bad is not None)
        hint = "none is left" if skip_bad else f"change them{option}"
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" * (len(problems) > _SHOWN)
        raise DataError(f"{len(problems)} record(s) cannot be used with {lm.name}; {hint}:\n  {shown}{more}")
    if problems:
        left_out = f"{len(problems)} record(s) cannot be used with {lm.name} and were left out, the first: "
        note(left_out + problems[0])
    return tuple(found)


def _letters(lm: LM) -> float:
    """How many ASCII letters surely fit the model's context: no token is shorter than one."""
    if lm.kind == "classifier":
        return 0  # its answers are looked up among its classes
    return math.inf if lm.context is None else lm.context - len(lm.framing.frame("x")) - _SPECIAL_TOKENS


def training_records(settings: RunSettings, lm: LM) -> tuple[Sequence[Record], Sequence[Record], int]:
    """The training records, the validation records, and the number of skipped problems.

    Validation records come from ``--validation``; for the built-in facts, from their validation split. Otherwise they
    are the last 2% of the file (at least 20, at most 100, never more than a fifth), which are then not trained on.

    Raises:
        DataError: a file is missing, empty or malformed, or holds texts that do not fit the model.
    """
    atlas = settings.data == "atlas"

    def usable(source: str, **options: Any) -> tuple[tuple[Record, ...], int]:
        records = read(source, skip_bad=settings.skip_bad, **options)
        found = readable(lm, records, skip_bad=settings.skip_bad)
        return found, len(records.skipped) + len(records) - len(found)

    records, skipped = usable(settings.data, limit=settings.limit, split="train" if atlas else None)
    if settings.validation is not None:
        held, more = usable(settings.validation)
        return records, held, skipped + more
    if atlas:
        return records, usable("atlas", split="validation", limit=settings.training["validate_on"])[0], 0
    count = min(max(20, -(-len(records) // 50)), 100, len(records) // 5)
    return records[: len(records) - count], records[len(records) - count :], skipped


def passages(path: str | None) -> list[str]:
    """The paragraphs of a plain text file, one per line, that have at least eight words.

    Raises:
        DataError: the file is missing, or has no such line.
    """
    try:
        return [] if path is None else passages_of(path)
    except DataError as error:
        raise DataError(f"--text {error}") from error
