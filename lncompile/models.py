"""Loading a model to show something on: GPT-2 small with random weights, a Hugging Face hub id, or a local folder."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Name of the built-in model: GPT-2 small's shapes with random weights, which needs no network.
RANDOM_GPT2 = "gpt2"


class ModelError(Exception):
    """A model that cannot be had. The message is one sentence for the person who asked for it."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be called.

    Attributes:
        name: what was asked for.
        description: the model in a few words.
        model: float32, on the CPU, in evaluation mode.
        inputs: keyword arguments for one call of it.
    """

    name: str
    description: str
    model: nn.Module
    inputs: dict[str, Any]


def load_model(name: str = RANDOM_GPT2, *, batch: int = 1, length: int = 64) -> LoadedModel:
    """Load a model by name, with inputs for one call.

    Args:
        name: ``"gpt2"`` for GPT-2 small's shapes with random weights, made without a network; else a local folder as
            ``save_pretrained`` writes it (random weights if it holds only ``config.json``), or a hub id such as
            ``"openai-community/gpt2"``.
        batch: sequences or images in one call.
        length: tokens of a sequence, less where the model takes fewer.

    Returns:
        The model and its inputs. Random weights are the same at each call.

    Raises:
        ModelError: if transformers is not installed, or there is no such model, or it cannot be loaded or called.

    Example:
        >>> loaded = load_model("gpt2")
        >>> loaded.model(**loaded.inputs).logits.shape
        torch.Size([1, 64, 50257])
    """
    transformers = _import_transformers()
    if name == RANDOM_GPT2:
        model = _with_random_weights(lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()))
        title = "GPT-2 small's shapes, random weights"
    else:
        model, title = _load(transformers, name)
    model = model.eval()
    try:
        inputs = example_inputs(model, batch, length)
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # whatever a stranger's forward raises at inputs we made up
        raise ModelError(f"'{name}' cannot be called with inputs made from its config: {_words(error)}") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"{parameters:,}"
    shapes = ", ".join(f"{key} {_shape(value)}" for key, value in inputs.items() if isinstance(value, Tensor))
    description = f"{title}: {type(model).__name__}, {size} parameters, float32, called with {shapes}"
    return LoadedModel(name, description, model, inputs)


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


def example_inputs(model: Any, batch: int = 1, length: int = 64) -> dict[str, Any]:
    """Make random inputs for one call of a transformers model, from its config.

    Args:
        model: takes token ids, pixels, or audio features, or several of these.
        batch: sequences or images.
        length: tokens of a sequence, less where the model has fewer positions.

    Returns:
        Keyword arguments, the same at each call.

    Raises:
        ValueError: for a model that takes something else.
    """
    generator = torch.Generator().manual_seed(1)
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


def _load(transformers: Any, name: str) -> tuple[nn.Module, str]:
    """A model from a folder or the hub, and a title for it."""
    folder = Path(name).expanduser()
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        raise ModelError(f"the folder '{name}' holds no config.json, so there is no transformers model in it")
    if not local and (name.count("/") > 1 or name.startswith((".", "~", "/"))):
        raise ModelError(f"there is no folder '{name}'")
    source = str(folder) if local else name
    try:
        with _few_words(transformers):
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            if local and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
                return _from_config(transformers, config), f"the config in {name}, random weights"
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


def _from_config(transformers: Any, config: Any) -> nn.Module:
    own = _own_class(transformers, config)

    def build() -> Any:
        if own is not None:
            return own(config)
        try:
            return transformers.AutoModelForCausalLM.from_config(config)
        except ValueError:
            return transformers.AutoModel.from_config(config)

    return _with_random_weights(build)


def _with_random_weights(build: Callable[[], Any]) -> nn.Module:
    """Build a model with the same weights each time, leaving the caller's random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = build()
    return randomise(model.float())


@contextlib.contextmanager
def _few_words(transformers: Any) -> Iterator[None]:
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
        return f"access to '{name}' has to be asked for on its page on the Hugging Face hub"
    if has(errors.RepositoryNotFoundError) or has(errors.HFValidationError):
        return f"there is no model '{name}', neither a local folder nor on the Hugging Face hub"
    if has(errors.LocalEntryNotFoundError):
        return (
            f"there is no local folder '{name}' and no copy of such a model in the Hugging Face cache, "
            "and the hub cannot be reached"
        )
    return f"the model '{name}' cannot be loaded: {_words(error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _words(error: BaseException) -> str:
    """An error's kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _shape(value: Tensor) -> str:
    return "×".join(str(size) for size in value.shape)
