"""One decode step with transformers' static cache, the same step again and again."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from suite.workloads import Workload


def decode_step(
    workload: Workload, model: nn.Module, device: torch.device | str
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Fill a static cache with a prompt, eagerly, and return the arguments of the step that reads it.

    The attention mask and the position are handed over ready-made, as ``generate`` does it for compiled models: what is
    left in the graph is the step itself. Each candidate gets a cache of its own.

    Args:
        workload: ``length`` tokens are in the cache, which has room for twice as many.
        model: a causal language model.
        device: where it lies.

    Returns:
        Keyword arguments for one call, and a function that makes the cache forget that call again, so that the next one
        is the same step.
    """
    static_cache = importlib.import_module("transformers").StaticCache
    config: Any = model.config
    room = 2 * workload.length
    cache = static_cache(config=config, max_cache_len=room)
    # transformers 5.24 renamed the argument.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def arguments(tokens: torch.Tensor, first: int) -> dict[str, Any]:
        positions = torch.arange(first, first + tokens.shape[1], device=device)
        visible = torch.arange(room, device=device) <= positions[:, None]
        return {
            "input_ids": tokens,
            "position_ids": positions[None],
            "attention_mask": visible[None, None].expand(tokens.shape[0], 1, -1, -1).contiguous(),
            name: cache,
            "use_cache": True,
        }

    prompt = workload.tokens(config, device)
    model(**arguments(prompt, 0), logits_to_keep=1)
    # Static layers count what they hold in a tensor of their own, which each call adds to.
    counts = [layer.cumulative_length for layer in cache.layers]

    def rewind() -> None:
        for count in counts:
            count.fill_(workload.length)

    return arguments(prompt[:, -1:].contiguous(), workload.length), rewind
