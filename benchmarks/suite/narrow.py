"""Narrow models, where norms cost something on a CPU: encoders of series and tables, small vision and proteins.

What a norm costs grows with a row's width, and what a product costs with its square: norms are 1% of GPT-2's time on a
CPU, and 2 to 20% of what is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from suite import modules
from suite.workloads import Architecture, Workload


@dataclass(frozen=True)
class OwnArchitecture(Architecture):
    """A model of :mod:`suite.modules`: its sizes are the arguments of the class."""

    def config(self, layers: int | None = None, *, tiny: bool = False) -> Any:
        """Return the arguments of the class, and what the inputs are made by."""
        sizes = {**self.sizes, **(self.tiny if tiny else {}), self.depth_key: layers or self.depth}
        return SimpleNamespace(**sizes)

    def build(self, config: Any, device: torch.device | str = "cpu") -> nn.Module:
        """Build the model on a device, in float32 and evaluation mode."""
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            model: nn.Module = getattr(modules, self.model_class)(**vars(config))
        model.config = config  # as those of transformers have one
        return model.eval()


def _own(name: str, model: str, layers: int, feeds: str, sizes: dict[str, Any], tiny: dict[str, Any]) -> Architecture:
    return OwnArchitecture(name, model, "", layers, "layers", sizes, tiny, feeds=feeds)


_TINY_TABLE = {"width": 16, "columns": 4}
TABLE_64 = _own(
    "table encoder 64", "TableEncoder", 4, "rows", {"width": 64, "heads": 4, "columns": 32}, {**_TINY_TABLE, "heads": 2}
)
SERIES_128 = _own(
    "series encoder 128",
    "SeriesEncoder",
    6,
    "series",
    {"width": 128, "heads": 8, "patches": 64, "patch": 16},
    {"width": 16, "heads": 2, "patches": 4, "patch": 8},
)
RESIDUAL_MLP = _own("residual mlp 64", "ResidualMLP", 6, "rows", {"width": 64, "columns": 32}, _TINY_TABLE)
MIXER_S = _own(
    "mlp-mixer-s/16",
    "MLPMixer",
    8,
    "pixels",
    {"width": 512, "image_size": 224, "patch_size": 16},
    {"width": 16, "image_size": 16, "patch_size": 8},
)
VIT_TINY = Architecture(
    "vit-tiny",
    "ViTModel",
    "ViTConfig",
    12,
    "num_hidden_layers",
    {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16, "patch_size": 8},
)
ESM_2 = Architecture(
    "esm-2-8m",
    "EsmModel",
    "EsmConfig",
    6,
    "num_hidden_layers",
    {
        "hidden_size": 320,
        "num_attention_heads": 20,
        "intermediate_size": 1280,
        "vocab_size": 33,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "token_dropout": True,
        "layer_norm_eps": 1e-5,
    },
    {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
    feeds="tokens",
)
WAV2VEC2_FRONT_END = Architecture(
    "wav2vec2 front end",
    "Wav2Vec2Model",
    "Wav2Vec2Config",
    1,  # of the encoder, which does not run
    "num_hidden_layers",
    {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True},
    {"conv_dim": (16,) * 7, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
     "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 11},
    part="feature_extractor",
    feeds="waveform",
)  # fmt: skip
SEGFORMER_B0 = Architecture(
    "segformer-b0",
    "SegformerModel",
    "SegformerConfig",
    4,
    "num_encoder_blocks",
    {},
    {"hidden_sizes": [16, 32, 32, 32], "image_size": 32},
    feeds="pixels",
)

_MODELS = (
    (TABLE_64, 256, 0),
    (SERIES_128, 64, 0),
    (RESIDUAL_MLP, 16384, 0),
    (VIT_TINY, 4, 0),
    (ESM_2, 4, 128),
    (MIXER_S, 4, 0),
    (SEGFORMER_B0, 1, 0),
    (WAV2VEC2_FRONT_END, 1, 16000),
)

#: All in float32, then all in bfloat16: what the time does not suffice for is left out from the end.
NARROW: tuple[Workload, ...] = tuple(
    Workload(architecture, "encode", batch, length, dtype, names_dtype=True)
    for dtype in (torch.float32, torch.bfloat16)
    for architecture, batch, length in _MODELS
)
