"""Inputs for one call of a transformers model, made up from its config."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Tokens of a sequence where no other number is asked for.
TOKENS = 64


def example_inputs(model: Any, batch: int | None = None, length: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Make random inputs for one call of a transformers model, from its config.

    Args:
        model: takes token ids, pixels, or audio features, or several of these.
        batch: sequences or images, by default 1.
        length: tokens of a sequence, by default 64, or less where the model has fewer positions.
        seed: of the random numbers.

    Returns:
        Keyword arguments on the CPU, the same at each call.

    Raises:
        ValueError: for a model that takes something else, or that cannot take so many tokens.
    """
    generator = torch.Generator().manual_seed(seed + 1)  # other numbers than the weights'
    config = model.config
    accepted = inspect.signature(model.forward).parameters

    def tokens() -> Tensor:
        text = config if hasattr(config, "vocab_size") else config.get_text_config()
        named = (getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions"))
        limits = [limit for limit in named if limit]
        if length is not None and any(length > limit for limit in limits):
            raise ValueError(f"it takes {min(limits)} tokens, fewer than the {length} that are asked for")
        # Half, because some models (OPT, RoBERTa) count positions from 2.
        size = length or min([TOKENS, *(max(1, limit // 2) for limit in limits)])
        return torch.randint(text.vocab_size, (batch or 1, size), generator=generator, device="cpu")

    def pixels() -> Tensor:
        vision = getattr(config, "vision_config", config)
        size = vision.image_size if isinstance(vision.image_size, (list, tuple)) else (vision.image_size,) * 2
        return torch.randn(batch or 1, vision.num_channels, *size, generator=generator, device="cpu")

    def features() -> Tensor:
        shape = (batch or 1, config.num_mel_bins, 2 * config.max_source_positions)
        return torch.randn(shape, generator=generator, device="cpu")

    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": tokens,
        "pixel_values": pixels,
        "input_features": features,
    }
    if model.main_input_name not in makers:
        raise ValueError(f"it takes '{model.main_input_name}', which is neither text nor an image nor audio features")
    writes_text = getattr(config, "is_encoder_decoder", False)
    if length is not None and model.main_input_name != "input_ids" and not writes_text:
        raise ValueError(f"it takes '{model.main_input_name}' and no tokens, so {length} of them cannot be asked for")
    names = [model.main_input_name]
    if hasattr(model, "logit_scale"):
        names.append("pixel_values")  # two encoders, text and image, that meet in a scaled product (CLIP and its kin)
    inputs: dict[str, Any] = {name: makers[name]() for name in dict.fromkeys(names)}
    if writes_text:
        inputs["decoder_input_ids"] = tokens()
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs
