"""Models of transformers: from the hub, from a folder, or with random weights from a configuration."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lncompile.comparisons.machine import available_memory, size_in_words
from lncompile.models.factories import ModelError, words
from lncompile.models.names import Kind
from lncompile.models.random_weights import randomise

log = logging.getLogger("lncompile")


def import_transformers() -> Any:
    """Return transformers.

    Raises:
        ModelError: if it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            'models are loaded with transformers, which is missing: pip install "lncompile[demo]"'
        ) from error


def has_weights(name: str, kind: Kind) -> bool:
    """Whether a transformers model has weights to be read; else they are random.

    Args:
        name: of the model.
        kind: what that names.
    """
    folder = Path(name).expanduser()
    return kind is Kind.HUB or (
        kind is Kind.FOLDER and any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))
    )


def load_pretrained(
    transformers: Any, name: str, kind: Kind, seed: int, dtype: torch.dtype | None, without_weights: bool
) -> tuple[nn.Module, str]:
    """Return a model from a folder, a configuration or the hub, and a title for it.

    Args:
        transformers: the package.
        name: of the model.
        kind: what that names.
        seed: of random weights.
        dtype: that weights are read in, by default float32; random ones are float32.
        without_weights: whether it is made on the meta device, which is the default device then.

    Raises:
        ModelError: if it cannot be loaded.
    """
    source = name if kind is Kind.HUB else str(Path(name).expanduser())
    try:
        with _fewwords(transformers):
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            if has_weights(name, kind):
                if without_weights:
                    return _from_config(transformers, config, seed, without_weights), name
                return _from_pretrained(transformers, config, source, dtype or torch.float32), name
            title = f"the config in {name}" if without_weights else f"the config in {name}, random weights"
            return _from_config(transformers, config, seed, without_weights), title
    except MemoryError as error:
        raise ModelError(f"the model '{name}' cannot be loaded: {error}") from error
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


def _from_config(transformers: Any, config: Any, seed: int, without_weights: bool) -> nn.Module:
    own = _own_class(transformers, config)

    def build() -> Any:
        if own is not None:
            return own(config)
        try:
            return transformers.AutoModelForCausalLM.from_config(config)
        except ValueError:
            return transformers.AutoModel.from_config(config)

    if not without_weights:
        _require_memory(build)
    return with_random_weights(build, seed)


def _require_memory(build: Callable[[], nn.Module]) -> None:
    """Refuse to make random weights that no memory is left for: a system may end a process that takes too much."""
    available = available_memory()
    if available is None:
        return
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            count = sum(parameter.numel() for parameter in build().parameters())
    except Exception as error:  # it may need values to be made, and is made with them then
        log.debug("the size of a model is not known before it is made: %s", words(error))
        return
    if 4 * count > available:
        raise MemoryError(
            f"its {count / 1e9:,.1f} billion random weights take {size_in_words(4 * count)} in float32, and "
            f"{size_in_words(available)} are left"
        )


def with_random_weights(build: Callable[[], Any], seed: int) -> nn.Module:
    """Build a model with the same weights each time, leaving the caller's random numbers as they were.

    Args:
        build: makes the model.
        seed: of the weights.

    Returns:
        The model in float32, every parameter randomised.
    """
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
