"""One decode step with transformers' static cache, the same step again and again."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from suite.workloads import Workload


def decode_step(
    workload: Workload, model: nn.Module, device: torch.device | str
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Fill a static cache with a prompt, eagerly, and return the arguments of the step that reads it.

    The attention mask and the position are handed over ready-made, as ``generate`` does it for compiled models: what is
    left in the graph is the step itself. Each candidate gets a cache of its own.

    Args:
        workload: ``length`` tokens are in the cache, which has room for twice as many.
        model: a causal language model, or one with an encoder, which does not run: what it would have heard is random,
            and the step finds keys and values of it in the cache.
        device: where it lies.

    Returns:
        Keyword arguments for one call, and a function that makes the cache forget that call again, so that the next one
        is the same step.
    """
    config: Any = model.config
    room = 2 * workload.length
    encoded = _encoded(workload, model, device) if config.is_encoder_decoder else None
    cache, growing = _static_cache(config, room, encoded)
    # transformers 5.24 renamed the argument.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    prefix = "" if encoded is None else "decoder_"
    heard = {} if encoded is None else {"encoder_outputs": _encoder_output(encoded)}

    def arguments(tokens: Tensor, first: int) -> dict[str, Any]:
        positions = torch.arange(first, first + tokens.shape[1], device=device)
        visible = torch.arange(room, device=device) <= positions[:, None]
        return {
            f"{prefix}input_ids": tokens,
            f"{prefix}position_ids": positions[None],
            f"{prefix}attention_mask": visible[None, None].expand(tokens.shape[0], 1, -1, -1).contiguous(),
            name: cache,
            "use_cache": True,
            **heard,
        }

    prompt = workload.tokens(config, device)
    model(**arguments(prompt, 0))
    # Static layers count what they hold in a tensor of their own, which each call adds to.
    counts = [layer.cumulative_length for layer in growing.layers]

    def rewind() -> None:
        for count in counts:
            count.fill_(workload.length)

    return arguments(prompt[:, -1:].contiguous(), workload.length), rewind


def _static_cache(config: Any, room: int, encoded: Tensor | None) -> tuple[Any, Any]:
    """The cache that a model takes, and the part of it that each call adds to."""
    transformers: Any = importlib.import_module("transformers")
    if encoded is None:
        cache = transformers.StaticCache(config=config, max_cache_len=room)
        return cache, cache
    # Some configs mean their encoder's layers by "hidden layers".
    of_the_decoder = copy.deepcopy(config)
    of_the_decoder.num_hidden_layers = config.decoder_layers
    growing = transformers.StaticCache(config=of_the_decoder, max_cache_len=room)
    across = transformers.StaticCache(config=of_the_decoder, max_cache_len=encoded.shape[1])
    return transformers.EncoderDecoderCache(growing, across), growing


def _encoded(workload: Workload, model: nn.Module, device: torch.device | str) -> Tensor:
    """What an encoder might have heard, ``[batch, positions, features]``: numbers that are exact in every dtype."""
    config: Any = model.config
    generator = torch.Generator(device).manual_seed(2)
    shape = (workload.batch, config.max_source_positions, config.d_model)
    return torch.randint(-64, 65, shape, generator=generator, device=device).to(workload.dtype) / 32


def _encoder_output(encoded: Tensor) -> Any:
    outputs: Any = importlib.import_module("transformers.modeling_outputs")
    return outputs.BaseModelOutput(last_hidden_state=encoded)
