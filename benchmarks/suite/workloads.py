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
    """

    name: str
    model_class: str
    config_class: str
    depth: int
    depth_key: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    part: str = ""

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

    @property
    def name(self) -> str:
        """``"gpt2-medium decode 1x256"``."""
        size = f"{self.batch}x{self.length}" if self.length else str(self.batch)
        return f"{self.architecture.name} {self.task} {size}"

    @property
    def depth(self) -> int:
        """Number of layers that run."""
        return self.layers or self.architecture.depth

    def dry(self) -> Workload:
        """Return the same workload on a tiny model."""
        length = min(self.length, 8)
        return dataclasses.replace(self, length=length, dtype=torch.float32, layers=2, tiny=True)

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
        config: Any = model.config
        if self.task == "prefill":
            return {"input_ids": self.tokens(config, device), "use_cache": False, "logits_to_keep": 1}
        generator = torch.Generator(device).manual_seed(1)
        if hasattr(config, "num_mel_bins"):
            name, sizes = "input_features", [config.num_mel_bins, 2 * config.max_source_positions]
        else:
            name, sizes = "pixel_values", [config.num_channels, config.image_size, config.image_size]
        values = torch.randn(self.batch, *sizes, generator=generator, device=device)
        return {name: values.to(self.dtype)}

    def tokens(self, config: Any, device: torch.device | str) -> torch.Tensor:
        """Random prompts, ``[batch, length]``."""
        generator = torch.Generator(device).manual_seed(1)
        return torch.randint(config.vocab_size, (self.batch, self.length), generator=generator, device=device)


# --- Models ----------------------------------------------------------------------------------------------------------

_TINY_GPT2 = {"n_embd": 32, "n_head": 4, "vocab_size": 61, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
_TINY = {"hidden_size": 32, "num_attention_heads": 4}
_TINY_VISION = {**_TINY, "intermediate_size": 64, "image_size": 16, "patch_size": 8}


def _gpt2(name: str, width: int, heads: int, layers: int) -> Architecture:
    sizes = {"n_embd": width, "n_head": heads}
    return Architecture(name, "GPT2LMHeadModel", "GPT2Config", layers, "n_layer", sizes, _TINY_GPT2)


def _opt(name: str, width: int, heads: int, layers: int) -> Architecture:
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width, "num_attention_heads": heads}
    tiny = {**_TINY, "word_embed_proj_dim": 32, "ffn_dim": 64, "vocab_size": 61, "max_position_embeddings": 64}
    return Architecture(name, "OPTForCausalLM", "OPTConfig", layers, "num_hidden_layers", sizes, tiny)


def _vision(name: str, model: str, config: str, width: int, heads: int, layers: int, **sizes: Any) -> Architecture:
    sizes |= {"hidden_size": width, "num_attention_heads": heads}
    return Architecture(name, model, config, layers, "num_hidden_layers", sizes, _TINY_VISION)


GPT2 = _gpt2("gpt2", 768, 12, 12)
GPT2_MEDIUM = _gpt2("gpt2-medium", 1024, 16, 24)
GPT2_XL = _gpt2("gpt2-xl", 1600, 25, 48)
OPT_125M = _opt("opt-125m", 768, 12, 12)
OPT_1_3B = _opt("opt-1.3b", 2048, 32, 24)
PYTHIA = Architecture(
    "pythia-1.4b",
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    24,
    "num_hidden_layers",
    {"hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 8192, "vocab_size": 50304},
    {**_TINY, "intermediate_size": 64, "vocab_size": 61, "max_position_embeddings": 64},
)
BLOOM = Architecture(
    "bloom-560m",
    "BloomForCausalLM",
    "BloomConfig",
    24,
    "n_layer",
    {"hidden_size": 1024, "n_head": 16, "vocab_size": 250880},
    {"hidden_size": 32, "n_head": 4, "vocab_size": 61},
)
VIT_B = _vision("vit-b", "ViTModel", "ViTConfig", 768, 12, 12, intermediate_size=3072)
VIT_L = _vision("vit-l", "ViTModel", "ViTConfig", 1024, 16, 24, intermediate_size=4096)
DINOV2_L = _vision("dinov2-l", "Dinov2Model", "Dinov2Config", 1024, 16, 24, image_size=224, patch_size=14)
CLIP_L = _vision(
    "clip-l", "CLIPVisionModel", "CLIPVisionConfig", 1024, 16, 24, intermediate_size=4096, image_size=224, patch_size=14
)
WHISPER_SMALL = Architecture(
    "whisper-small",
    "WhisperModel",
    "WhisperConfig",
    12,
    "encoder_layers",
    {
        "d_model": 768,
        "encoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_attention_heads": 12,  # the decoder does not run; it is made all the same, so it is made small
        "decoder_layers": 1,
    },
    {
        "d_model": 32,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_attention_heads": 4,
        "vocab_size": 61,
        "max_source_positions": 16,
        "pad_token_id": 0,
    },
    part="encoder",
)

# --- Suites ----------------------------------------------------------------------------------------------------------

_GRAPHS = "reduce-overhead"
_FULL = torch.float32

#: Every suite's workloads, the most telling first: what the time does not suffice for is left out from the end.
SUITES: dict[str, tuple[Workload, ...]] = {
    "cpu": (
        Workload(GPT2, "prefill", 1, 128, _FULL, peers=True),
        Workload(VIT_B, "encode", 1, dtype=_FULL),
        Workload(GPT2, "decode", 1, 128, _FULL),
        Workload(OPT_125M, "prefill", 1, 128, _FULL),
    ),
    "gpu": (
        Workload(GPT2_MEDIUM, "decode", 1, 256, mode=_GRAPHS),
        Workload(GPT2, "prefill", 8, 512, peers=True),
        Workload(VIT_B, "encode", 32),
        Workload(OPT_1_3B, "decode", 1, 256, mode=_GRAPHS),
        Workload(DINOV2_L, "encode", 32, layers=6),
        Workload(OPT_1_3B, "prefill", 8, 512, layers=6),
        Workload(WHISPER_SMALL, "encode", 1, layers=6, mode=_GRAPHS),
        Workload(CLIP_L, "encode", 32, layers=6),
        Workload(BLOOM, "prefill", 8, 512, layers=6),
        Workload(PYTHIA, "prefill", 8, 512, layers=6),
        Workload(VIT_L, "encode", 1, layers=6, mode=_GRAPHS),
        Workload(GPT2_XL, "prefill", 8, 512, layers=6),
    ),
    "all": (
        *(
            Workload(model, "decode", 1, 256, mode=_GRAPHS, peers=model in (GPT2, GPT2_MEDIUM))
            for model in (GPT2, GPT2_MEDIUM, GPT2_XL, OPT_1_3B, PYTHIA)
        ),
        *(
            Workload(model, "prefill", 8, 512, peers=model in (GPT2, GPT2_MEDIUM))
            for model in (GPT2, GPT2_MEDIUM, GPT2_XL, OPT_1_3B, PYTHIA, BLOOM)
        ),
        *(
            Workload(model, "encode", batch, mode=_GRAPHS if batch == 1 else None)
            for model in (VIT_B, VIT_L, DINOV2_L, CLIP_L, WHISPER_SMALL)
            for batch in (1, 32)
        ),
    ),
}
