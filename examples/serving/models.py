"""The model that is served, and how text becomes its tokens."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn

from lncompile.models.factories import ModelError
from lncompile.models.loading import load_model, randomise

#: What a server without a model serves: a small random GPT-2 that reads bytes, made without a network.
BYTES_GPT2 = "bytes-gpt2"
_END = 256
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt")


class Tokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        padding: the token that fills batches up; it is masked, so any will do.
        end: the token that ends a text, or None.
    """

    padding: int
    end: int | None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens."""


class ByteTokenizer:
    """The bytes of UTF-8 as tokens, and one that ends a text: needs no files."""

    padding: int = _END
    end: int | None = _END

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """The text of bytes; what is not UTF-8 becomes U+FFFD."""
        return b"".join(bytes([token]) if token < _END else b"\xff" for token in tokens).decode(errors="replace")


class HubTokenizer:
    """A model's own tokenizer.

    Args:
        tokenizer: as transformers loads it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.end: int | None = tokenizer.eos_token_id
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.padding: int = next(token for token in known if token is not None)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the model wants around it."""
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


@dataclass(frozen=True)
class Served:
    """A model ready to be served.

    Attributes:
        description: the model in a few words.
        model: in evaluation mode.
        tokenizer: of its own, or bytes.
        positions: how many tokens it takes, None if its config names no limit.
    """

    description: str
    model: Any
    tokenizer: Tokenizer
    positions: int | None

    @property
    def generates(self) -> bool:
        """Whether it continues texts."""
        return bool(self.model.can_generate())


def load(name: str = BYTES_GPT2) -> Served:
    """Load a model and its tokenizer.

    Args:
        name: ``"bytes-gpt2"``, or what :func:`lncompile.models.loading.load_model` takes: a hub id or a folder. Where
            there is no tokenizer beside the model (a folder with nothing but ``config.json``), its tokens are bytes.

    Raises:
        ModelError: if there is not such a model, or it cannot be served.
    """
    if name == BYTES_GPT2:
        return small_gpt2()
    loaded = load_model(name)
    config: Any = loaded.model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"'{name}' has an encoder and a decoder; this example serves models that have one of them")
    if loaded.model.main_input_name != "input_ids":
        raise ModelError(f"'{name}' reads '{loaded.model.main_input_name}', not text")
    if "attention_mask" not in inspect.signature(loaded.model.forward).parameters:
        raise ModelError(f"'{name}' takes no attention mask, so texts of different lengths cannot share a batch")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1  # they count from there
    # Its last words are on the inputs that load_model makes.
    description = loaded.description.partition(", called with ")[0]
    return Served(description, loaded.model, _tokenizer(name, config), positions)


def small_gpt2(layers: int = 4, width: int = 128, positions: int = 512) -> Served:
    """A random GPT-2 over bytes, the same at each call, with every parameter off its initial value."""
    config = transformers.GPT2Config(
        vocab_size=_END + 1,
        n_layer=layers,
        n_embd=width,
        n_head=4,
        n_positions=positions,
        bos_token_id=_END,
        eos_token_id=_END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = randomise(transformers.GPT2LMHeadModel(config)).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    return Served(f"GPT-2 over bytes, {layers} layers, {size:,} random parameters", model, ByteTokenizer(), positions)


def _tokenizer(name: str, config: Any) -> Tokenizer:
    folder = Path(name).expanduser()
    # From a folder without one transformers makes a tokenizer that knows no words.
    if not folder.is_dir() or any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        try:
            return HubTokenizer(transformers.AutoTokenizer.from_pretrained(name))
        except Exception as error:  # a stranger's files, read by another library: anything may be wrong with them
            raise ModelError(f"the tokenizer of '{name}' cannot be loaded: {type(error).__name__}: {error}") from error
    if config.vocab_size <= _END:
        raise ModelError(f"'{name}' has no tokenizer, and too few tokens ({config.vocab_size}) for bytes")
    return ByteTokenizer()
