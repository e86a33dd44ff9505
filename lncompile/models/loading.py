"""Loading a model to show something on: GPT-2 small with random weights, a Hugging Face model, or a user's own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lncompile.lowering import torch_private
from lncompile.models.factories import Made, ModelError, call_factory, words
from lncompile.models.inputs import TOKENS, example_inputs
from lncompile.models.names import RANDOM_GPT2, Kind, kind_of
from lncompile.models.pretrained import import_transformers, load_pretrained, with_random_weights
from lncompile.models.random_weights import randomise


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be called.

    Attributes:
        name: what was asked for.
        description: the model in a few words.
        model: in evaluation mode.
        inputs: keyword arguments for one call of it.
        arguments: positional ones.
        sizes: of the inputs, ``batch`` and ``tokens``, as far as another number could be asked for.
    """

    name: str
    description: str
    model: nn.Module
    inputs: dict[str, Any]
    arguments: tuple[Any, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


def load_model(
    name: str = RANDOM_GPT2,
    *,
    batch: int | None = None,
    length: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> LoadedModel:
    """Load a model by name, with inputs for one call.

    Args:
        name: one of

            * ``"gpt2"``: GPT-2 small's shapes with random weights, made without a network;
            * a local folder as ``save_pretrained`` writes it (random weights if it holds only ``config.json``), or a
              hub id such as ``"openai-community/gpt2"``;
            * the path of a configuration (``"somewhere/config.json"``): random weights, whatever lies beside it;
            * ``"package.module:function"`` or ``"path/to/file.py:function"``: what that function returns, see
              :func:`lncompile.models.factories.call_factory`.
        batch: sequences or images in one call, by default 1.
        length: tokens of a sequence, by default 64, or less where the model takes fewer.
        dtype: of weights and floating-point inputs; by default float32, or what the function made.
        device: where they are put; by default the CPU, or where the function made them. On ``"meta"`` the model gets
            its shapes and no weights, whatever its size.
        seed: of random weights and inputs, by default 0.

    Returns:
        The model and its inputs, the same at each call. Random weights have every parameter randomised.

    Raises:
        ModelError: if transformers is not installed, or there is no such model, or it cannot be loaded or called, or a
            function cannot be given what is asked for.

    Example:
        >>> loaded = load_model("gpt2")
        >>> loaded.model(**loaded.inputs).logits.shape
        torch.Size([1, 64, 50257])
    """
    kind = kind_of(name)
    without_weights = device is not None and torch.device(device).type == "meta"
    asked = {key: value for key, value in {"batch": batch, "tokens": length, "seed": seed}.items() if value is not None}
    arguments: tuple[Any, ...] = ()
    made: Made | None = None
    # Under it whatever a function or transformers makes is made there, if no other device is named.
    place: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if without_weights:
        place = torch.device("meta")
    if kind is Kind.FACTORY:
        with place:
            made = _call_factory(name, asked)
        model, title = made.model, name
    else:
        transformers = import_transformers()
        with place:
            if kind is Kind.BUILT_IN:
                config = transformers.GPT2Config()
                model = with_random_weights(lambda: transformers.GPT2LMHeadModel(config), seed or 0)
                title = "GPT-2 small's shapes" if without_weights else "GPT-2 small's shapes, random weights"
            else:
                model, title = load_pretrained(transformers, name, kind, seed or 0, dtype, without_weights)
    if without_weights:
        title = f"{title}, without weights"
    # Before it is put elsewhere: weights and inputs are the same for every dtype and device, but for rounding.
    if made is not None and made.inputs is not None:
        arguments, inputs = made.inputs
    else:
        inputs = _made_up_inputs(name, model, batch, length, seed or 0)
    model = _move(model.eval(), device, dtype)
    arguments, inputs = torch_private.tree_map(lambda value: _put(value, device, dtype), (arguments, inputs))
    if not without_weights:
        try:
            with torch.no_grad():
                model(*arguments, **inputs)
        except Exception as error:  # whatever a stranger's forward raises
            made_up = made is None or made.inputs is None
            origin = "inputs made from its config" if made_up else "the inputs that came with it"
            raise ModelError(f"'{name}' cannot be called with {origin}: {words(error)}") from error
    sizes = _sizes(made, batch, length, inputs)
    return LoadedModel(name, _describe(title, model, arguments, inputs), model, inputs, arguments, sizes)


def _sizes(made: Made | None, batch: int | None, length: int | None, inputs: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that another number could be asked for, with the numbers they have."""
    if made is not None and made.inputs is not None:
        given = {"batch": batch or 1, "tokens": length or TOKENS}
        return {key: value for key, value in given.items() if key in made.parameters}
    tokens = [inputs[key].shape[1] for key in ("input_ids", "decoder_input_ids") if key in inputs]
    return {"batch": batch or 1, **({"tokens": max(tokens)} if tokens else {})}


def inputs_of_length(loaded: LoadedModel, batch: int | None, length: int, seed: int | None) -> LoadedModel:
    """Return the same transformers model with inputs of another length.

    Args:
        loaded: a model whose inputs were made from its config.
        batch: as for :func:`load_model`.
        length: likewise.
        seed: likewise.

    Raises:
        ModelError: if the model cannot be called with so many tokens.
    """
    weight = next(loaded.model.parameters())
    inputs = _made_up_inputs(loaded.name, loaded.model, batch, length, seed or 0)
    placed = {key: _put(value, weight.device, weight.dtype) for key, value in inputs.items()}
    return dataclasses.replace(loaded, inputs=placed)


def _call_factory(name: str, asked: Mapping[str, int]) -> Made:
    """Call a factory with random numbers of its own, and see that it could heed what was asked for."""
    seed = asked.get("seed", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        made = call_factory(name, {"batch": 1, "tokens": TOKENS, **asked}, asked)
        seeds_itself = torch.initial_seed() != seed
        draws_nothing = torch.equal(before, torch.random.get_rng_state())
    if made.inputs is None:
        return made
    for key in ("batch", "tokens"):
        if key in asked and key not in made.parameters:
            raise ModelError(
                f"the factory '{name}' makes its own inputs and has no parameter '{key}', so {key}={asked[key]} cannot "
                f"reach it: give the function a parameter '{key}', or leave the option out"
            )
    if "seed" in asked and "seed" not in made.parameters:
        values = [*made.model.parameters(), *torch_private.tree_leaves(made.inputs)]
        on_cpu = all(value.device.type == "cpu" for value in values if isinstance(value, Tensor))
        if seeds_itself or (draws_nothing and on_cpu):
            why = "sets torch's seed itself" if seeds_itself else "draws no random numbers from torch"
            raise ModelError(
                f"the factory '{name}' {why} and has no parameter 'seed', so seed={seed} changes nothing: give the "
                "function a parameter 'seed', or leave the option out"
            )
    return made


def _made_up_inputs(name: str, model: Any, batch: int | None, length: int | None, seed: int) -> dict[str, Any]:
    if not hasattr(model, "config") or not hasattr(model, "main_input_name"):
        raise ModelError(
            f"'{name}' returned a model without inputs, and it is not a transformers model whose inputs follow from "
            "its config: return (model, inputs), inputs being a tensor, a tuple of arguments or a dict of keyword "
            "arguments"
        )
    try:
        return example_inputs(model, batch, length, seed)
    except Exception as error:  # a stranger's config may lack anything
        raise ModelError(f"'{name}' cannot be called with inputs made from its config: {words(error)}") from error


def _move(model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """A model elsewhere, in another dtype; what two modules share they still share."""
    model = model.to(dtype=dtype)
    if device is None or torch.device(device).type != "meta":
        return model.to(device=device)
    # Module.to() gives every module a meta parameter of its own.
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def to_meta(value: Tensor) -> Tensor:
        if id(value) not in moved:
            empty = value.detach().to("meta")
            if isinstance(value, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=value.requires_grad)
            moved[id(value)] = value, empty
        return moved[id(value)][1]

    for module in model.modules():
        holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for holder in holders:
            for name, value in holder.items():
                if value is not None and value.device.type != "meta":
                    holder[name] = to_meta(value)
    return model


def _put(value: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def _describe(title: str, model: nn.Module, arguments: Sequence[Any], inputs: Mapping[str, Any]) -> str:
    """The model in a few words."""
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    size = f"{count / 1e6:.0f}M" if count >= 1e7 else f"{count:,}"
    kinds = dict.fromkeys(str(parameter.dtype).removeprefix("torch.") for parameter in parameters)
    places = dict.fromkeys(str(parameter.device) for parameter in parameters if parameter.device.type != "cpu")
    named = [*(("", value) for value in arguments), *((f"{key} ", value) for key, value in inputs.items())]
    shapes = ", ".join(f"{key}{_shape(value)}" for key, value in named if isinstance(value, Tensor))
    where = f" on {' and '.join(places)}" if places else ""
    kind = " and ".join(kinds) or "no dtype"
    return f"{title}: {type(model).__name__}, {size} parameters, {kind}{where}, called with {shapes}"


def _shape(value: Tensor) -> str:
    return "×".join(str(size) for size in value.shape)


__all__ = [
    "RANDOM_GPT2",
    "LoadedModel",
    "ModelError",
    "example_inputs",
    "inputs_of_length",
    "load_model",
    "randomise",
]
