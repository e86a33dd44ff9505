"""The models that are timed, and the suites of workloads on them."""

from __future__ import annotations

from typing import Any

import torch

from suite.narrow import NARROW
from suite.workloads import Architecture, Workload

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
PYTHIA_160M = Architecture(
    "pythia-160m",
    "GPTNeoXForCausalLM",
    "GPTNeoXConfig",
    12,
    "num_hidden_layers",
    {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 50304},
    PYTHIA.tiny,
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
WHISPER_SMALL_DECODER = Architecture(
    "whisper-small decoder",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    12,
    "decoder_layers",
    {
        "d_model": 768,
        "decoder_attention_heads": 12,
        "decoder_ffn_dim": 3072,
        "encoder_attention_heads": 12,  # the encoder does not run; a step reads what it has heard from the cache
        "encoder_layers": 1,
    },
    {
        "d_model": 32,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "vocab_size": 61,
        "max_source_positions": 16,
        "pad_token_id": 0,
    },
)

# --- Suites ----------------------------------------------------------------------------------------------------------

_GRAPHS = "reduce-overhead"
_FULL = torch.float32

#: Suites that run on a CPU. The others need an NVIDIA GPU, dry runs excepted.
ON_A_CPU = ("cpu", "narrow", "cpu-decoding")

#: Suites in which a race's choice is timed too, by a candidate of its own.
RACED = ("cpu", "narrow")

#: Every suite's workloads, the most telling first: what the time does not suffice for is left out from the end.
SUITES: dict[str, tuple[Workload, ...]] = {
    "cpu": (
        Workload(GPT2, "prefill", 1, 128, _FULL, peers=True),
        Workload(VIT_B, "encode", 1, dtype=_FULL),
        Workload(GPT2, "decode", 1, 128, _FULL),
        Workload(OPT_125M, "prefill", 1, 128, _FULL),
    ),
    "narrow": NARROW,
    "cpu-decoding": tuple(
        Workload(model, "decode", 1, length, dtype, layers=6, names_dtype=True)
        for model, length in ((GPT2, 128), (OPT_125M, 128), (WHISPER_SMALL_DECODER, 224), (PYTHIA_160M, 128))
        for dtype in (_FULL, torch.bfloat16)
    ),
    "decoding": (
        # A part of the layers: compiling each of seven candidates takes longer than timing them.
        Workload(GPT2_MEDIUM, "decode", 1, 256, mode=_GRAPHS, layers=12),
        Workload(OPT_1_3B, "decode", 1, 256, mode=_GRAPHS, layers=8),
        Workload(WHISPER_SMALL_DECODER, "decode", 1, 224, mode=_GRAPHS, layers=6),
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
