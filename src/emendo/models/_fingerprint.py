"""A short name for a model's weights, so that an edit knows the model it was made for."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_SAMPLE = 1024


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """16 hex digits from every parameter's name, shape and an even sample of its values.

    Values are rounded to bfloat16 first, so a model keeps its fingerprint when it is cast between float32 and
    bfloat16. A float16 copy has a fingerprint of its own, for rounding twice is not rounding once: train and edit in
    the same format. Hooks do not change it; merging an edit into the weights does.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.named_parameters():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLE)]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16).view(torch.int16)
        digest.update(sample.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
