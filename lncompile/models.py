"""Loading a model to show something on: GPT-2 small with random weights, a Hugging Face model, or a user's own."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lncompile.factories import Made, ModelError, call_factory, words
from lncompile.lowering import torch_private
from lncompile.model_names import RANDOM_GPT2, Kind, kind_of

#: Tokens of a sequence where nobody asks for another number.
TOKENS = 64


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
              :func:`lncompile.factories.call_factory`.
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
        transformers = _import_transformers()
        with place:
            if kind is Kind.BUILT_IN:
                config = transformers.GPT2Config()
                model = _with_random_weights(lambda: transformers.GPT2LMHeadModel(config), seed or 0)
                title = "GPT-2 small's shapes, random weights"
            else:
                model, title = _load(transformers, name, kind, seed or 0, dtype, without_weights)
        title = f"{title}, left out" if without_weights else title
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
            f"'{name}' returned a model without inputs, and it is no transformers model whose inputs follow from its "
            "config: return (model, inputs), inputs being a tensor, a tuple of arguments or a dict of keyword arguments"
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


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter off its initial value, so that nothing hides: γ ≠ 1, β ≠ 0, biases and means nonzero.

    A freshly initialised model would pass with half of its terms forgotten: its γ are 1, its β and biases 0, and the
    mean of its stream close to 0. Matrices keep the scale of their initialisation.

    Args:
        model: changed in place, on whatever device its parameters are; each device draws numbers of its own. One on the
            meta device has no values to change.
        seed: of the random numbers.

    Returns:
        The model.

    Example:
        >>> randomise(nn.LayerNorm(4)).weight
        Parameter containing: ...
    """
    if all(parameter.device.type == "meta" for parameter in model.parameters()):
        return model  # there is nothing to move
    devices = {parameter.device for parameter in model.parameters()}
    generators = {device: torch.Generator(device).manual_seed(seed) for device in devices}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = generators[parameter.device]
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            if parameter.dim() >= 2:
                # A learned token or position may start at zero; 0.02 is what transformers' models start from.
                scale = float(parameter.std()) or 0.02
                parameter.add_(scale * (0.3 * noise + 0.1))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise + 0.1)
            elif parameter.dim() == 1:
                parameter.add_(0.3 * noise)
    return model


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


def _import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            'models are loaded with transformers, which is missing: pip install "lncompile[demo]"'
        ) from error


def _load(
    transformers: Any, name: str, kind: Kind, seed: int, dtype: torch.dtype | None, without_weights: bool
) -> tuple[nn.Module, str]:
    """A model from a folder, a configuration or the hub, and a title for it."""
    folder = Path(name).expanduser()
    source = name if kind is Kind.HUB else str(folder)
    try:
        with _fewwords(transformers):
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            patterns = ("*.safetensors", "pytorch_model*.bin")
            weights = [path for pattern in patterns for path in folder.glob(pattern)] if kind is Kind.FOLDER else []
            if kind is Kind.HUB or weights:
                if without_weights:
                    return _from_config(transformers, config, seed), f"{name}, its weights"
                return _from_pretrained(transformers, config, source, dtype or torch.float32), name
            return _from_config(transformers, config, seed), f"the config in {name}, random weights"
    except Exception as error:  # a stranger's files, read by another library: anything may be wrong with them
        raise ModelError(_why_not(name, error)) from error


def _own_class(transformers: Any, config: Any) -> Any:
    """The class a model was saved from, where its config says so and transformers has it; None elsewhere."""
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None)


def _from_pretrained(transformers: Any, config: Any, source: str, dtype: torch.dtype) -> nn.Module:
    settings = {"config": config, "dtype": dtype}
    own = _own_class(transformers, config)
    model: nn.Module
    if own is not None:
        model = own.from_pretrained(source, **settings)
        return model
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, **settings)
    except ValueError:  # transformers' way to say: no causal language model of this kind
        model = transformers.AutoModel.from_pretrained(source, **settings)
    return model


def _from_config(transformers: Any, config: Any, seed: int) -> nn.Module:
    own = _own_class(transformers, config)

    def build() -> Any:
        if own is not None:
            return own(config)
        try:
            return transformers.AutoModelForCausalLM.from_config(config)
        except ValueError:
            return transformers.AutoModel.from_config(config)

    return _with_random_weights(build, seed)


def _with_random_weights(build: Callable[[], Any], seed: int) -> nn.Module:
    """Build a model with the same weights each time, leaving the caller's random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = build().float()
    return randomise(model, seed)


@contextlib.contextmanager
def _fewwords(transformers: Any) -> Iterator[None]:
    """Without what the hub's client logs at each of its retries; progress bars only where someone sees them move."""
    hub = logging.getLogger("huggingface_hub")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    level = hub.level
    hub.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        hub.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _why_not(name: str, error: BaseException) -> str:
    """One sentence on why a model could not be loaded."""
    errors = importlib.import_module("huggingface_hub.errors")
    chain = list(_chain(error))

    def has(kind: type[BaseException]) -> bool:
        return any(isinstance(link, kind) for link in chain)

    if has(errors.GatedRepoError):
        return f"access to '{name}' has to be asked for on its page on the Hugging Face hub (then: hf auth login)"
    if has(errors.RepositoryNotFoundError) or has(errors.HFValidationError):
        return (
            f"there is no model '{name}', neither a local folder nor on the Hugging Face hub "
            "(a private one needs: hf auth login)"
        )
    if has(errors.LocalEntryNotFoundError):
        return (
            f"there is no local folder '{name}' and no copy of such a model in the Hugging Face cache, "
            "and the hub cannot be reached; without a network, give a folder, or a config.json for random weights"
        )
    return f"the model '{name}' cannot be loaded: {words(error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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
