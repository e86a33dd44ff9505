"""Tiny models of architectures that vLLM runs, as checkpoints with random weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lncompile.models.random_weights import randomise

#: vLLM's attention on a CPU wants heads of 32 elements and more.
_TEXT: dict[str, Any] = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
}


def _opt(**other: Any) -> Any:
    return transformers.OPTConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        ffn_dim=256,
        max_position_embeddings=128,
        **{"word_embed_proj_dim": 128, **_TEXT, **other},
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "opt": _opt,
    "opt-untied": lambda: _opt(tie_word_embeddings=False),
    "opt-post-norm": lambda: _opt(do_layer_norm_before=False, word_embed_proj_dim=64),
    "gpt2": lambda: transformers.GPT2Config(n_embd=128, n_layer=3, n_head=2, n_positions=128, **_TEXT),
    "bloom": lambda: transformers.BloomConfig(hidden_size=128, n_layer=3, n_head=2, **_TEXT),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_SIZES, **_TEXT),
    "falcon": lambda: transformers.FalconConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        new_decoder_architecture=True,
        num_kv_heads=2,
        bias=True,
        **_TEXT,
    ),
    "stablelm": lambda: transformers.StableLmConfig(num_key_value_heads=2, **_SIZES, **_TEXT),
    "phi": lambda: transformers.PhiConfig(**_SIZES, **_TEXT),
    "starcoder2": lambda: transformers.Starcoder2Config(num_key_value_heads=2, **_SIZES, **_TEXT),
    "cohere": lambda: transformers.CohereConfig(num_key_value_heads=2, **_SIZES, **_TEXT),
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=2, **_SIZES, **_TEXT),
    "whisper": lambda: transformers.WhisperConfig(
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        num_mel_bins=16,
        max_source_positions=1500,
        max_target_positions=64,
        decoder_start_token_id=3,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **_TEXT,
    ),
    "paligemma": lambda: transformers.PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 128,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma",
            "num_key_value_heads": 2,
            "head_dim": 64,
            **_SIZES,
            **_TEXT,
        },
        image_token_index=127,
        projection_dim=128,
        hidden_size=128,
    ),
}
_CLASSES = {"whisper": "WhisperForConditionalGeneration", "paligemma": "PaliGemmaForConditionalGeneration"}


def class_of(config: Any, architecture: str) -> Any:
    """The class of transformers that an architecture has."""
    if architecture in _CLASSES:
        return getattr(transformers, _CLASSES[architecture])
    return transformers.AutoModelForCausalLM._model_mapping[type(config)]


def save(architecture: str, folder: Path) -> None:
    """Write a checkpoint. Every parameter is random: γ ≠ 1, β ≠ 0, biases and means nonzero."""
    config = CONFIGS[architecture]()
    model = class_of(config, architecture)(config)
    randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # as initialised, such a model repeats its last token
    model.save_pretrained(folder)
    if architecture in _PROCESSORS:
        engine = _PROCESSORS[architecture](folder)
        (folder / "engine.json").write_text(json.dumps(engine))


def _sound(folder: Path) -> dict[str, Any]:
    """Write what turns sound into features; returns what the engine is given."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:100]
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<|endoftext|>"])}
    files = {"vocab.json": json.dumps(vocabulary), "merges.txt": "#version: 0.2\n", "normalizer.json": "{}"}
    for name, text in files.items():
        (folder / name).write_text(text)
    tokenizer = transformers.WhisperTokenizer(*(str(folder / name) for name in files))
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(feature_size=16), tokenizer).save_pretrained(
        folder
    )
    return {"media": "sound", "max_num_batched_tokens": 1600}


def _images(folder: Path) -> dict[str, Any]:
    """Write what turns images into pixels; returns what the engine is given."""
    vocabulary = {**{f"t{number}": number for number in range(125)}, "\n": 125, "<unk>": 126, "<image>": 127}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="t0",
        eos_token="t1",
        pad_token="t2",
        additional_special_tokens=["<image>"],
    )
    # Checkpoints of that architecture have names that transformers no longer writes, and vLLM knows those alone.
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    images = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    transformers.PaliGemmaProcessor(images, tokenizer).save_pretrained(folder)
    return {"media": "image"}


_PROCESSORS = {"whisper": _sound, "paligemma": _images}


def main() -> None:
    """Write checkpoints: ``python vllm_models.py FOLDER ARCHITECTURE...``."""
    folder, *architectures = sys.argv[1:]
    for architecture in architectures:
        save(architecture, Path(folder) / architecture)


if __name__ == "__main__":
    main()
