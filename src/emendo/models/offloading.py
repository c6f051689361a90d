"""Models larger than a device: weights that stay in a file, or in another memory, until their module runs.

transformers and accelerate place such a model and bring each module's weights in when it runs; outside of that its
parameters are on the ``meta`` device, without values. This module is what the rest of emendo needs beside that: the
values of such a parameter, and blocks whose weights stay in memory for longer than one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emendo.errors import RequestError


def is_offloaded(module: nn.Module) -> bool:
    """Whether any weight of a module, or of one inside it, is brought in only while it runs."""
    return any(_hook(inner) is not None for inner in module.modules())


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Refuse what needs all weights of a model in memory.

    Args:
        model: the model.
        what: the beginning of the message: what cannot be done.

    Raises:
        RequestError: some of its weights are offloaded.
    """
    if is_offloaded(model):
        raise RequestError(
            f"{what} needs all weights of the model in memory, but some are offloaded: load it without device_map."
        )


def weight_of(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter of a module with its values, read from where they are kept if the module is offloaded."""
    held: Tensor = getattr(module, name)
    if not held.is_meta or (hook := _hook(module)) is None:
        return held
    value: Tensor = hook.weights_map[name]
    return value


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a model's parameters, one at a time; tied ones once, under their first name."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    known = set()
    for name, parameter in model.named_parameters():
        source = tied.get(name, name) if parameter.is_meta else name
        if source not in known:
            known.add(source)
            owner, _, own = name.rpartition(".")
            yield name, weight_of(model.get_submodule(owner), own)


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module that holds a ``weight`` computes."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not weight.is_meta or (hook := _hook(module)) is None:
        return weight.device
    place = hook.execution_device
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


@contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the weights of offloaded modules in memory, on the device where they run; without effect on others."""
    with ExitStack() as stack:
        for module in modules:
            for inner in module.modules():
                if (hook := _hook(inner)) is not None:
                    hook.pre_forward(inner)
                    hook.offload = False
                    stack.callback(_release, inner, hook)
        yield


def _release(module: nn.Module, hook: Any) -> None:
    hook.offload = True
    hook.post_forward(module, None)


def _hook(module: nn.Module) -> Any:
    """The hook that brings in the weights of a module; None where it has none."""
    found = vars(module).get("_hf_hook")
    return next((hook for hook in getattr(found, "hooks", [found]) if getattr(hook, "offload", False)), None)


def blocks_on_disk(model: nn.Module, stacks: Iterable[str], device: torch.device) -> dict[str, str]:
    """A device map that leaves the blocks of some stacks in the model's files.

    Args:
        model: the model, which may be without values.
        stacks: dotted names of its stacks of blocks.
        device: the place of everything else.

    Returns:
        Name of a module, or of a tensor outside of those modules, -> its place.
    """
    names = tuple(stacks)
    places: dict[str, str] = {}

    def place(module: nn.Module, name: str) -> None:
        prefix = f"{name}." if name else ""
        if not any(stack.startswith(prefix) for stack in names):
            places[name] = str(device)
            return
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        places.update({f"{prefix}{own}": str(device) for own, _ in tensors})
        for own, child in module.named_children():
            if f"{prefix}{own}" in names:
                places.update({f"{prefix}{own}.{block}": "disk" for block, _ in child.named_children()})
            else:
                place(child, f"{prefix}{own}")

    place(model, "")
    return places
