"""What is timed: real models' shapes with random weights, as a serving process runs them.

A *prefill* reads prompts and returns the logits of their last token; a *decode* step reads one token and a static cache
that holds the tokens before it; an *encode* is one forward pass of an encoder over images or audio.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lncompile.models.loading import randomise

Task = Literal["prefill", "decode", "encode"]


@dataclass(frozen=True)
class Architecture:
    """A transformers model and the sizes that make it the one it is named after.

    Attributes:
        name: what the model is known as.
        model_class: its class in transformers.
        config_class: the class of its config.
        depth: number of layers.
        depth_key: what the config calls it.
        sizes: the config's other arguments, where they differ from its defaults.
        tiny: sizes in their place for a dry run, which shows that everything works and times nothing.
        part: the submodule that runs; "" for the whole model.
        feeds: what an encoder reads (``"tokens"``, ``"waveform"``, ``"series"``, ``"rows"`` of a table, ``"pixels"``);
            "" where its config tells it.
    """

    name: str
    model_class: str
    config_class: str
    depth: int
    depth_key: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    part: str = ""
    feeds: str = ""

    def config(self, layers: int | None = None, *, tiny: bool = False) -> Any:
        """Return the config, with so many layers (all by default), or that of a tiny model of the same kind."""
        sizes = {**self.sizes, **(self.tiny if tiny else {}), self.depth_key: layers or self.depth}
        return getattr(importlib.import_module("transformers"), self.config_class)(**sizes)

    def build(self, config: Any, device: torch.device | str = "cpu") -> nn.Module:
        """Build the model on a device, in float32 and evaluation mode, with the weights transformers draws."""
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            model = getattr(importlib.import_module("transformers"), self.model_class)(config)
        part: nn.Module = model.get_submodule(self.part)
        return part.eval()


@dataclass(frozen=True)
class Workload:
    """One model in one task.

    Attributes:
        architecture: the model.
        task: what it does.
        batch: sequences, images or pieces of audio in one call.
        length: tokens of a prompt, or tokens in the cache when the next one is decoded; 0 for encoders.
        dtype: of weights and activations.
        mode: torch.compile's, the same for every compiled candidate.
        layers: of the model, where not all of them are run; None for all.
        peers: whether other ways to the same end are timed beside it.
        tiny: whether this is a dry run's model.
        names_dtype: whether the name holds the dtype.
    """

    architecture: Architecture
    task: Task
    batch: int
    length: int = 0
    dtype: torch.dtype = torch.bfloat16
    mode: str | None = None
    layers: int | None = None
    peers: bool = False
    tiny: bool = False
    names_dtype: bool = False

    @property
    def name(self) -> str:
        """``"gpt2-medium decode 1x256"``, and the dtype behind it where it is to be told by that."""
        size = f"{self.batch}x{self.length}" if self.length else str(self.batch)
        dtype = f" {str(self.dtype).removeprefix('torch.')}" if self.names_dtype else ""
        return f"{self.architecture.name} {self.task} {size}{dtype}"

    @property
    def depth(self) -> int:
        """Number of layers that run."""
        return self.layers or self.architecture.depth

    def dry(self) -> Workload:
        """Return the same workload on a tiny model."""
        # The front end of wav2vec2 makes one row of 400 samples.
        length = 800 if self.architecture.feeds == "waveform" else min(self.length, 8)
        dtype = self.dtype if self.names_dtype else torch.float32
        return dataclasses.replace(self, length=length, dtype=dtype, layers=2, tiny=True)

    def capped(self, layers: int) -> Workload:
        """Return the same workload on at most so many layers."""
        return dataclasses.replace(self, layers=min(layers, self.depth))

    def describe(self) -> dict[str, Any]:
        """Return what it is, ready for JSON."""
        architecture = self.architecture
        return {
            "name": self.name,
            "model": architecture.model_class + (f".{architecture.part}" if architecture.part else ""),
            "sizes": {**architecture.sizes, **(architecture.tiny if self.tiny else {})},
            "layers": self.depth,
            "layers_of_the_real_model": architecture.depth,
            "task": self.task,
            "batch": self.batch,
            "length": self.length,
            "dtype": str(self.dtype).removeprefix("torch."),
            "mode": self.mode,
            "tiny": self.tiny,
        }

    def build(self, device: torch.device | str) -> nn.Module:
        """Build the model with every parameter random, in the workload's dtype, on a device."""
        config = self.architecture.config(self.layers, tiny=self.tiny)
        return randomise(self.architecture.build(config, device)).to(self.dtype)

    def inputs(self, model: nn.Module, device: torch.device | str) -> dict[str, Any]:
        """Make the arguments of one call of a prefill or an encoder (a decode step's: :mod:`.decoding`)."""
        config: Any = getattr(model, "config", None)
        if self.task == "prefill":
            return {"input_ids": self.tokens(config, device), "use_cache": False, "logits_to_keep": 1}
        if self.architecture.feeds == "tokens":
            # Behind the ids that mean something, padding and a mask among them.
            return {"input_ids": self.tokens(config, device).clamp_(4, config.vocab_size - 9)}
        generator = torch.Generator(device).manual_seed(1)
        name, sizes = self._input(config)
        values = torch.randn(self.batch, *sizes, generator=generator, device=device)
        return {name: values.to(self.dtype)}

    def _input(self, config: Any) -> tuple[str, list[int]]:
        """The name of what an encoder reads, and its sizes behind the batch's."""
        match self.architecture.feeds:
            case "rows":
                return "rows", [config.columns]
            case "waveform":
                return "input_values", [self.length]
            case "series":
                return "series", [config.patches * config.patch]
        if hasattr(config, "num_mel_bins"):
            return "input_features", [config.num_mel_bins, 2 * config.max_source_positions]
        size = getattr(config, "image_size", 512)  # SegFormer takes any, and was trained on this
        return "pixel_values", [getattr(config, "num_channels", 3), size, size]

    def tokens(self, config: Any, device: torch.device | str) -> torch.Tensor:
        """Random prompts, ``[batch, length]``."""
        generator = torch.Generator(device).manual_seed(1)
        return torch.randint(config.vocab_size, (self.batch, self.length), generator=generator, device=device)
