"""Loading a model to show something on: GPT-2 small with random weights, a Hugging Face model, or a user's own."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lncompile.factories import ModelError, call_factory, words
from lncompile.lowering import torch_private

#: Name of the built-in model: GPT-2 small's shapes with random weights, which needs no network.
RANDOM_GPT2 = "gpt2"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be called.

    Attributes:
        name: what was asked for.
        description: the model in a few words.
        model: in evaluation mode.
        inputs: keyword arguments for one call of it.
        arguments: positional ones.
    """

    name: str
    description: str
    model: nn.Module
    inputs: dict[str, Any]
    arguments: tuple[Any, ...] = ()


def load_model(
    name: str = RANDOM_GPT2,
    *,
    batch: int = 1,
    length: int = 64,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
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
        batch: sequences or images in one call.
        length: tokens of a sequence, less where the model takes fewer.
        dtype: of weights and floating-point inputs; by default float32, or what the function made.
        device: where they are put; by default the CPU, or where the function made them.
        seed: of random weights and inputs.

    Returns:
        The model and its inputs, the same at each call. Random weights have every parameter randomised.

    Raises:
        ModelError: if transformers is not installed, or there is no such model, or it cannot be loaded or called.

    Example:
        >>> loaded = load_model("gpt2")
        >>> loaded.model(**loaded.inputs).logits.shape
        torch.Size([1, 64, 50257])
    """
    arguments: tuple[Any, ...] = ()
    made = None
    if ":" in name and not Path(name).expanduser().exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, made = call_factory(name, {"batch": batch, "tokens": length})
        title = name
    else:
        transformers = _import_transformers()
        if name == RANDOM_GPT2:
            config = transformers.GPT2Config()
            model = _with_random_weights(lambda: transformers.GPT2LMHeadModel(config), seed)
            title = "GPT-2 small's shapes, random weights"
        else:
            model, title = _load(transformers, name, seed)
    # Before it is put elsewhere: weights and inputs are the same for every dtype and device, but for rounding.
    if made is None:
        inputs = _made_up_inputs(name, model, batch, length, seed)
    else:
        arguments, inputs = made
    model = model.eval().to(device=device, dtype=dtype)
    arguments, inputs = torch_private.tree_map(lambda value: _put(value, device, dtype), (arguments, inputs))
    try:
        with torch.no_grad():
            model(*arguments, **inputs)
    except Exception as error:  # whatever a stranger's forward raises
        origin = "inputs made from its config" if made is None else "the inputs that came with it"
        raise ModelError(f"'{name}' cannot be called with {origin}: {words(error)}") from error
    return LoadedModel(name, _describe(title, model, arguments, inputs), model, inputs, arguments)


def _made_up_inputs(name: str, model: Any, batch: int, length: int, seed: int) -> dict[str, Any]:
    if not hasattr(model, "config") or not hasattr(model, "main_input_name"):
        raise ModelError(
            f"'{name}' returned a model without inputs, and it is no transformers model whose inputs follow from its "
            "config: return (model, inputs), inputs being a tensor, a tuple of arguments or a dict of keyword arguments"
        )
    try:
        return example_inputs(model, batch, length, seed)
    except Exception as error:  # a stranger's config may lack anything
        raise ModelError(f"'{name}' cannot be called with inputs made from its config: {words(error)}") from error


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
        model: changed in place, on whatever device its parameters are; each device draws numbers of its own.
        seed: of the random numbers.

    Returns:
        The model.

    Example:
        >>> randomise(nn.LayerNorm(4)).weight
        Parameter containing: ...
    """
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


def example_inputs(model: Any, batch: int = 1, length: int = 64, seed: int = 0) -> dict[str, Any]:
    """Make random inputs for one call of a transformers model, from its config.

    Args:
        model: takes token ids, pixels, or audio features, or several of these.
        batch: sequences or images.
        length: tokens of a sequence, less where the model has fewer positions.
        seed: of the random numbers.

    Returns:
        Keyword arguments, the same at each call.

    Raises:
        ValueError: for a model that takes something else.
    """
    generator = torch.Generator().manual_seed(seed + 1)  # other numbers than the weights'
    config = model.config
    accepted = inspect.signature(model.forward).parameters

    def tokens() -> Tensor:
        text = config if hasattr(config, "vocab_size") else config.get_text_config()
        limits = [getattr(text, name, None) for name in ("max_position_embeddings", "max_target_positions")]
        # Half, because some models (OPT, RoBERTa) count positions from 2.
        size = min([length, *(max(1, limit // 2) for limit in limits if limit)])
        return torch.randint(text.vocab_size, (batch, size), generator=generator)

    def pixels() -> Tensor:
        vision = getattr(config, "vision_config", config)
        size = vision.image_size if isinstance(vision.image_size, (list, tuple)) else (vision.image_size,) * 2
        return torch.randn(batch, vision.num_channels, *size, generator=generator)

    def features() -> Tensor:
        return torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)

    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": tokens,
        "pixel_values": pixels,
        "input_features": features,
    }
    if model.main_input_name not in makers:
        raise ValueError(f"it takes '{model.main_input_name}', which is neither text nor an image nor audio features")
    names = [model.main_input_name]
    if hasattr(model, "logit_scale"):
        names.append("pixel_values")  # two encoders, text and image, that meet in a scaled product (CLIP and its kin)
    inputs: dict[str, Any] = {name: makers[name]() for name in dict.fromkeys(names)}
    if getattr(config, "is_encoder_decoder", False):
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


def _load(transformers: Any, name: str, seed: int) -> tuple[nn.Module, str]:
    """A model from a folder, a configuration or the hub, and a title for it."""
    folder = Path(name).expanduser()
    is_config = folder.is_file()
    local = folder.is_dir() or is_config
    if local and not is_config and not (folder / "config.json").is_file():
        raise ModelError(f"the folder '{name}' holds no config.json, so there is no transformers model in it")
    if not local and (name.count("/") > 1 or name.startswith((".", "~", "/")) or name.endswith((".json", ".py"))):
        hint = f"; a factory in a file is written {name}:function" if name.endswith(".py") else ""
        raise ModelError(f"there is no folder or file '{name}'{hint}")
    source = str(folder) if local else name
    try:
        with _fewwords(transformers):
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            weights = [path for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)]
            if local and not weights:
                return _from_config(transformers, config, seed), f"the config in {name}, random weights"
            return _from_pretrained(transformers, config, source), name
    except Exception as error:  # a stranger's files, read by another library: anything may be wrong with them
        raise ModelError(_why_not(name, error)) from error


def _own_class(transformers: Any, config: Any) -> Any:
    """The class a model was saved from, where its config says so and transformers has it; None elsewhere."""
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None)


def _from_pretrained(transformers: Any, config: Any, source: str) -> nn.Module:
    settings = {"config": config, "dtype": torch.float32}
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
        model: nn.Module = build()
    return randomise(model.float(), seed)


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
