"""The plan of an architecture from its Hugging Face config: its transformers model is made without weights."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lncompile.models.inputs import example_inputs
from lncompile.plans.capture import Call
from lncompile.plans.fold_plan import FoldPlan
from lncompile.plans.planning import plan

#: Tokens of an example call. What a plan says does not depend on it.
TOKENS = 8


class Unfit(Exception):
    """Why a model is not folded, in words for the log."""


@dataclass(frozen=True)
class Architecture:
    """An architecture, and how it folds.

    Attributes:
        model: transformers' model of it, without weights.
        plan: its plan.
    """

    model: nn.Module
    plan: FoldPlan

    @classmethod
    def of(cls, config: Any, absorb: str | None = None) -> Architecture:
        """Plan the fold of the model that a Hugging Face config describes. It takes no memory for weights.

        Args:
            config: a config of transformers. It stays as it is.
            absorb: as for :func:`lncompile.plan`.

        Raises:
            Unfit: where transformers does not have the architecture, or cannot make or call it from its config.
        """
        model = empty_model(config)
        try:
            return cls(model, plan(model, more_calls=example_calls(model), absorb=absorb))
        except Exception as error:  # whatever the code of a model raises: the engine runs it as it is
            raise Unfit(f"no plan can be made of {type(model).__name__}: {first_line(error)}") from error

    def names_of(self, stored: Iterable[str]) -> Mapping[str, str]:
        """How transformers renames the tensors of a checkpoint as it loads them, by their names there.

        Tensors that it joins or splits keep their names, which are none of its model then.
        """
        mapping = importlib.import_module("transformers.conversion_mapping")
        changes = mapping.get_model_conversion_mapping(self.model)
        renamings = [one for one in changes or () if isinstance(one, mapping.WeightRenaming)]
        names = {}
        for name in sorted(stored):
            renamed = name
            for renaming in renamings:
                renamed = renaming.rename_source_key(renamed)[0]
            names[name] = renamed
        return names


def empty_model(config: Any) -> nn.Module:
    """Make the model of a config on the meta device.

    Raises:
        Unfit: where transformers does not have the architecture, or cannot make it.
    """
    import transformers

    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise Unfit(f"transformers does not have the architecture {', '.join(map(str, names)) or 'of its config'}")
    try:
        own = copy.deepcopy(config)
        for part in _parts(own):
            # An engine may have put the name of its own attention there.
            part._attn_implementation = "eager"
        with torch.device("meta"):
            model: nn.Module = kind(own)
    except Exception as error:  # a config of another version, or with code of its own
        raise Unfit(f"transformers cannot make {names[0]} of its config: {first_line(error)}") from error
    return model.eval()


def _parts(config: Any) -> Sequence[Any]:
    """A config and those inside of it."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return [config, *(part for value in inner for part in _parts(value))]


def example_calls(model: nn.Module) -> Sequence[Call]:
    """The ways in which an engine calls a model, as far as its config says how.

    A model of text is called with tokens; one that reads images or sound as well with both, and with tokens alone.
    """
    ids = torch.zeros((1, TOKENS), dtype=torch.long, device="meta")
    accepted = inspect.signature(model.forward).parameters
    without_cache = {"use_cache": False} if "use_cache" in accepted else {}
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        made = example_inputs(model, length=TOKENS if getattr(model.config, "is_encoder_decoder", False) else None)
        return [Call(**{name: _on_meta(value) for name, value in made.items()})]
    calls = [Call(input_ids=ids, **without_cache)]
    if "pixel_values" in accepted and hasattr(model, "get_image_features"):
        config: Any = model.config
        vision = config.vision_config
        pixels = torch.zeros((1, vision.num_channels, vision.image_size, vision.image_size), device="meta")
        calls.append(Call.of("get_image_features", pixels))
    return calls


def example_media(config: Any) -> Mapping[str, torch.Tensor]:
    """What a model is given besides tokens in one call, with random values: pixels, or features of sound; or nothing.

    Args:
        config: of the model.
    """
    generator = torch.Generator().manual_seed(0)
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        size = (1, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}
    if getattr(config, "num_mel_bins", None) is not None:
        features = (1, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": torch.randn(features, generator=generator)}
    return {}


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
