"""The models the tests are run on: real transformers classes, built small from configs, every parameter randomised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 61
TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and floating buffer values that hide nothing: γ ≠ 1, β ≠ 0, biases and means nonzero.

    Matrices keep the scale of a sensible initialisation, so that deep models neither explode nor die.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel() if "emb" not in name and "wte" not in name else 1
                # A common offset: the mean over any axis is far from zero.
                value = (noise + 0.5) / max(fan_in, 1) ** 0.5
            elif name.endswith("bias"):
                value = 0.3 * noise + 0.2
            else:
                value = 1.0 + 0.3 * noise
            parameter.copy_(value)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                noise = torch.randn(buffer.shape, generator=generator, dtype=torch.float64)
                buffer.copy_(noise + 0.5 if name.endswith("mean") else noise.square() + 0.3)
    return model


@dataclass(frozen=True)
class Architecture:
    """A model, its inputs, and how many of its LayerNorms are expected to fold.

    Attributes:
        build: makes the model.
        inputs: makes its keyword arguments for a batch size (integers, and floats in the given dtype).
        sites: LayerNorm calls.
        folded: how many of them fold.
        centerings: centerings at run time among the decisions.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    sites: int
    folded: int
    centerings: int = 0

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in evaluation mode, randomised."""
        torch.manual_seed(0)
        return randomise(self.build().to(dtype).eval())


def tokens(batch: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def text(_: torch.dtype) -> dict[str, Any]:
    return {"input_ids": tokens()}


def causal(_: torch.dtype) -> dict[str, Any]:
    return {"input_ids": tokens(), "use_cache": False}


def image(size: int = 32) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(2)
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)}

    return inputs


def clip_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return {"input_ids": tokens(), **image()(dtype)}


def whisper_inputs(dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(2, 16, 40, generator=generator, dtype=torch.float64).to(dtype)
    return {"input_features": features, "decoder_input_ids": tokens(), "use_cache": False}


class EncoderAfterEmbedding(nn.Module):
    """A plain nn.TransformerEncoder behind an embedding and learned positions."""

    def __init__(self, norm_first: bool, final_norm: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.positions = nn.Parameter(torch.zeros(7, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 48, activation="gelu", batch_first=True, norm_first=norm_first)
        norm = nn.LayerNorm(32) if final_norm else None
        self.encoder = nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embedding(input_ids) + self.positions)


def hf(class_name: str, config_name: str, **config: Any) -> Callable[[], nn.Module]:
    """A builder of a transformers model from its config."""

    def build() -> nn.Module:
        return getattr(transformers, class_name)(getattr(transformers, config_name)(**config))

    return build


DECODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
           "max_position_embeddings": 64, **TEXT}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
          "image_size": 32, "patch_size": 8}  # fmt: skip
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **TEXT}
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
       "max_position_embeddings": 64, "window_size": 4, **TEXT}  # fmt: skip
GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64, **TEXT}

ARCHITECTURES = [
    Architecture("gpt2", hf("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=64, **TEXT),
                 causal, 5, 5),
    Architecture("gpt_neo", hf("GPTNeoForCausalLM", "GPTNeoConfig", **NEO), causal, 5, 5),
    Architecture("gpt_neox_parallel", hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **DECODER), causal, 5, 5),
    Architecture("gpt_neox_sequential",
                 hf("GPTNeoXForCausalLM", "GPTNeoXConfig", use_parallel_residual=False, **DECODER), causal, 5, 5),
    Architecture("gptj", hf("GPTJForCausalLM", "GPTJConfig", **GPTJ), causal, 3, 3),
    Architecture("opt", hf("OPTForCausalLM", "OPTConfig", ffn_dim=48, word_embed_proj_dim=32,
                           **{k: v for k, v in DECODER.items() if k != "intermediate_size"}), causal, 5, 5),
    Architecture("opt_350m_post_norm", hf("OPTForCausalLM", "OPTConfig", ffn_dim=48, word_embed_proj_dim=16,
                 do_layer_norm_before=False, **{k: v for k, v in DECODER.items() if k != "intermediate_size"}),
                 causal, 4, 0),
    Architecture("bloom", hf("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=2, n_head=4, **TEXT),
                 causal, 6, 6, 1),
    Architecture("falcon_7b", hf("FalconForCausalLM", "FalconConfig", new_decoder_architecture=False,
                                 multi_query=True, parallel_attn=True, bias=True, **FALCON), causal, 3, 3),
    Architecture("falcon_new", hf("FalconForCausalLM", "FalconConfig", new_decoder_architecture=True, num_kv_heads=2,
                                  bias=True, **FALCON), causal, 5, 5),
    Architecture("falcon_rw", hf("FalconForCausalLM", "FalconConfig", new_decoder_architecture=False, alibi=True,
                                 multi_query=False, parallel_attn=False, bias=True, **FALCON), causal, 5, 5),
    Architecture("bert", hf("BertForMaskedLM", "BertConfig", **DECODER), text, 6, 1),
    Architecture("vit", hf("ViTForImageClassification", "ViTConfig", **VISION), image(), 5, 5),
    Architecture("dinov2", hf("Dinov2Model", "Dinov2Config", **VISION), image(), 5, 5),
    Architecture(
        "clip",
        lambda: transformers.CLIPModel(transformers.CLIPConfig(
            text_config={**DECODER, "projection_dim": 16}, vision_config={**VISION, "projection_dim": 16},
            projection_dim=16)),
        clip_inputs, 11, 6),
    Architecture(
        "whisper",
        hf("WhisperForConditionalGeneration", "WhisperConfig", d_model=32, encoder_layers=2, decoder_layers=2,
           encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
           num_mel_bins=16, max_source_positions=20, max_target_positions=32, decoder_start_token_id=1, **TEXT),
        whisper_inputs, 12, 12, 1),
    Architecture("transformer_encoder_pre_norm", lambda: EncoderAfterEmbedding(True, True), text, 5, 5),
    Architecture("transformer_encoder_post_norm", lambda: EncoderAfterEmbedding(False, False), text, 4, 0),
]  # fmt: skip
