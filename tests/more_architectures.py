"""Many more models: transformers classes of every modality, built small from their configs.

Counts are what the passes decide. ``expected_later`` says what they should decide once a rule is there that is missing
today; the comment above such a row names the rule.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from architectures import DECODER, TEXT, VISION, VOCABULARY, Architecture, causal, hf, image, text, tokens
from torch import nn


@dataclass(frozen=True)
class Model(Architecture):
    """An architecture, with the counts that a rule still missing would give.

    Attributes:
        expected_later: (sites, folded, centerings) once the rule named beside it is there; None where nothing is
            known to be missing.
        wide: whether it only runs in float64 where that is the default dtype too (it makes constants of that).
    """

    expected_later: tuple[int, int, int] | None = None
    wide: bool = False

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in evaluation mode, randomised; batch norms with the statistics of its inputs.

        Without them the activations of a deep convolutional model overflow what its norms add to them.
        """
        model = super().model(dtype)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
        if norms:
            for norm in norms:
                norm.train()
                norm.momentum = 1.0
            with torch.no_grad():
                model(**self.inputs(dtype))
            model.eval()
        return model


Inputs = Callable[[torch.dtype], dict[str, Any]]


def noise(*shape: int, dtype: torch.dtype, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def floats(name: str, *shape: int, **others: Any) -> Inputs:
    """Inputs of one floating-point tensor, and others as they are."""

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {name: noise(*shape, dtype=dtype), **others}

    return inputs


def seq2seq(_: torch.dtype) -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=5, seed=3), "use_cache": False}


def both(*parts: Inputs) -> Inputs:
    """Inputs of several kinds together."""

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {name: value for part in parts for name, value in part(dtype).items()}

    return inputs


def fixed(**values: Any) -> Inputs:
    """Inputs that do not depend on the dtype."""
    return lambda _: dict(values)


def with_configs(class_name: str, config_name: str, parts: dict[str, tuple[str, dict[str, Any]]],
                 **config: Any) -> Callable[[], nn.Module]:  # fmt: skip
    """A builder of a model whose config contains others, as objects."""

    def build() -> nn.Module:
        objects = {key: getattr(transformers, name)(**values) for key, (name, values) in parts.items()}
        return getattr(transformers, class_name)(getattr(transformers, config_name)(**objects, **config))

    return build


def inner(module: str, class_name: str, config_name: str, **config: Any) -> Callable[[], nn.Module]:
    """A builder of a model that transformers does not export by name."""

    def build() -> nn.Module:
        found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        return getattr(found, class_name)(getattr(found, config_name)(**config))

    return build


def boxes(length: int = 7) -> torch.Tensor:
    corners = torch.tensor([[1, 2, 11, 14], [3, 5, 20, 9], [0, 0, 4, 6]])
    return corners[torch.arange(length) % 3].expand(2, length, 4).clone()


D4 = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **TEXT}
XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "vocab_size": VOCABULARY,
       "bos_index": 0, "eos_index": 1, "pad_index": 2, "unk_index": 3, "mask_index": 4}  # fmt: skip
LLAMA = {**DECODER, "num_key_value_heads": 2, "head_dim": 8}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "decoder_start_token_id": 1, **TEXT}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 1, **TEXT}  # fmt: skip

TEXT_ENCODERS = [
    Model("albert", hf("AlbertForMaskedLM", "AlbertConfig", embedding_size=16, **DECODER), text, 6, 1),
    Model("bert_generation", hf("BertGenerationEncoder", "BertGenerationConfig", **DECODER), text, 5, 1),
    Model("big_bird", hf("BigBirdModel", "BigBirdConfig", attention_type="original_full", **DECODER), text, 5, 1),
    Model("bros", hf("BrosModel", "BrosConfig", **{**DECODER, "hidden_size": 64}),
          floats("bbox", 2, 7, 4, input_ids=tokens()), 5, 1),
    Model("camembert", hf("CamembertForMaskedLM", "CamembertConfig", **DECODER), text, 6, 1),
    Model("convbert", hf("ConvBertModel", "ConvBertConfig", embedding_size=32, conv_kernel_size=3, head_ratio=2,
                         **DECODER), text, 5, 1),
    Model("data2vec_text", hf("Data2VecTextModel", "Data2VecTextConfig", **DECODER), text, 5, 1),
    Model("deberta", hf("DebertaModel", "DebertaConfig", **DECODER), text, 5, 1),
    Model("deberta_relative", hf("DebertaModel", "DebertaConfig", relative_attention=True, max_relative_positions=16,
                                 pos_att_type=["c2p", "p2c"], **DECODER), text, 3, 1),
    Model("deberta_v2", hf("DebertaV2ForMaskedLM", "DebertaV2Config", relative_attention=True, position_buckets=8,
                           norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["c2p", "p2c"],
                           max_relative_positions=16, **DECODER), text, 7, 2),
    Model("distilbert", hf("DistilBertForMaskedLM", "DistilBertConfig", dim=32, n_layers=2, n_heads=4, hidden_dim=48,
                           max_position_embeddings=64, **TEXT), text, 6, 1),
    Model("dpr", hf("DPRQuestionEncoder", "DPRConfig", **DECODER), text, 5, 1),
    Model("electra", hf("ElectraForMaskedLM", "ElectraConfig", embedding_size=16, **DECODER), text, 6, 1),
    Model("ernie", hf("ErnieModel", "ErnieConfig", use_task_id=True, task_type_vocab_size=3, **DECODER), text, 5, 1),
    Model("esm", hf("EsmModel", "EsmConfig", position_embedding_type="rotary", emb_layer_norm_before=False,
                    mask_token_id=4, **DECODER), text, 5, 5),
    Model("esm_absolute", hf("EsmModel", "EsmConfig", position_embedding_type="absolute", emb_layer_norm_before=True,
                             mask_token_id=4, **DECODER), text, 6, 6, 1),
    Model("eurobert", hf("EuroBertModel", "EuroBertConfig", num_key_value_heads=2, **DECODER), text, 0, 0),
    Model("flaubert", hf("FlaubertModel", "FlaubertConfig", **XLM),
          text, 5, 1),
    Model("fnet", hf("FNetModel", "FNetConfig", tpu_short_seq_length=7, **DECODER), text, 5, 1),
    Model("funnel", hf("FunnelModel", "FunnelConfig", block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=48,
                       num_decoder_layers=1, **TEXT), text, 7, 1),
    Model("ibert", hf("IBertModel", "IBertConfig", **DECODER), text, 5, 1),
    Model("jina_embeddings_v3", hf("JinaEmbeddingsV3Model", "JinaEmbeddingsV3Config", **DECODER), text, 5, 1),
    Model("layoutlm", hf("LayoutLMModel", "LayoutLMConfig", max_2d_position_embeddings=64, **DECODER),
          fixed(input_ids=tokens(), bbox=boxes()), 5, 1),
    Model("lilt", hf("LiltModel", "LiltConfig", max_2d_position_embeddings=64, channel_shrink_ratio=4,
                            **{**DECODER, "hidden_size": 48}),
          fixed(input_ids=tokens(), bbox=boxes()), 10, 2),
    Model("longformer", hf("LongformerModel", "LongformerConfig", attention_window=4, **DECODER),
          fixed(input_ids=tokens(length=8), attention_mask=torch.ones(2, 8, dtype=torch.long)), 5, 1),
    Model("luke", hf("LukeModel", "LukeConfig", entity_vocab_size=11, entity_emb_size=16, **DECODER),
          fixed(input_ids=tokens(), entity_ids=torch.tensor([[1, 2], [3, 4]]),
                entity_position_ids=torch.tensor([[[1, 2, -1], [3, -1, -1]]] * 2)), 6, 2),
    Model("markuplm", hf("MarkupLMModel", "MarkupLMConfig", max_depth=3, xpath_unit_hidden_size=8, **DECODER), text,
          5, 1),
    Model("megatron_bert", hf("MegatronBertForMaskedLM", "MegatronBertConfig", **DECODER), text, 6, 5),
    Model("mobilebert", hf("MobileBertModel", "MobileBertConfig", embedding_size=16, intra_bottleneck_size=16,
                           **DECODER), text, 0, 0),
    Model("mobilebert_layer_norm", hf("MobileBertModel", "MobileBertConfig", embedding_size=16,
                                      intra_bottleneck_size=16, normalization_type="layer_norm", **DECODER), text,
          17, 5),
    Model("modernbert", hf("ModernBertForMaskedLM", "ModernBertConfig", global_attn_every_n_layers=2,
                           local_attention=4, cls_token_id=1, sep_token_id=2, **DECODER), text, 6, 5, 1),
    Model("mpnet", hf("MPNetForMaskedLM", "MPNetConfig", **DECODER), text, 6, 1),
    Model("nomic_bert", hf("NomicBertModel", "NomicBertConfig", **DECODER), text, 5, 1),
    Model("nystromformer", hf("NystromformerModel", "NystromformerConfig", num_landmarks=8,
                               segment_means_seq_len=8, **DECODER),
          fixed(input_ids=tokens(length=8)), 5, 1),
    Model("perceiver", hf("PerceiverForMaskedLM", "PerceiverConfig", num_latents=6, d_latents=32, d_model=24,
                          num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
                          num_cross_attention_heads=4, qk_channels=32, v_channels=32, max_position_embeddings=7,
                          vocab_size=VOCABULARY), fixed(inputs=tokens()), 10, 9),
    Model("rembert", hf("RemBertModel", "RemBertConfig", input_embedding_size=16, output_embedding_size=24,
                        **DECODER), text, 5, 1),
    Model("roberta", hf("RobertaForMaskedLM", "RobertaConfig", **DECODER), text, 6, 1),
    Model("roberta_prelayernorm", hf("RobertaPreLayerNormModel", "RobertaPreLayerNormConfig", **DECODER), text,
          6, 6, 1),
    Model("roc_bert", hf("RoCBertModel", "RoCBertConfig", pronunciation_vocab_size=VOCABULARY,
                         shape_vocab_size=VOCABULARY, pronunciation_embed_dim=16, shape_embed_dim=16, **DECODER),
          fixed(input_ids=tokens(), input_shape_ids=tokens(seed=3), input_pronunciation_ids=tokens(seed=4)), 5, 1),
    Model("roformer", hf("RoFormerModel", "RoFormerConfig", embedding_size=16, **DECODER), text, 5, 1),
    Model("splinter", hf("SplinterModel", "SplinterConfig", **DECODER), text, 5, 1),
    Model("squeezebert", hf("SqueezeBertModel", "SqueezeBertConfig", embedding_size=32, **DECODER), text, 5, 1),
    Model("tapas", hf("TapasModel", "TapasConfig", type_vocab_sizes=[3, 8, 8, 2, 8, 8, 4], **DECODER),
          fixed(input_ids=tokens(), token_type_ids=torch.zeros(2, 7, 7, dtype=torch.long)), 5, 1),
    Model("xlm", hf("XLMModel", "XLMConfig", **XLM), text, 5, 1),
    Model("xlm_roberta", hf("XLMRobertaModel", "XLMRobertaConfig", **DECODER), text, 5, 1),
    Model("xlm_roberta_xl", hf("XLMRobertaXLForMaskedLM", "XLMRobertaXLConfig", **DECODER), text, 6, 5),
    Model("xlnet", hf("XLNetModel", "XLNetConfig", d_model=32, n_layer=2, n_head=4, d_inner=48,
                      vocab_size=VOCABULARY), fixed(input_ids=tokens(), use_mems=False), 4, 0),
    Model("xmod", hf("XmodModel", "XmodConfig", languages=["en", "de"], default_language="en",
                     adapter_reduction_factor=2, **DECODER), text, 3, 1),
    Model("yoso", hf("YosoModel", "YosoConfig", use_expectation=True, **DECODER), text, 5, 1),
]  # fmt: skip

TEXT_DECODERS = [
    Model("biogpt", hf("BioGptForCausalLM", "BioGptConfig", **DECODER), causal, 5, 5),
    Model("codegen", hf("CodeGenForCausalLM", "CodeGenConfig", rotary_dim=4, **GPT), causal, 3, 3),
    Model("cohere", hf("CohereForCausalLM", "CohereConfig", num_key_value_heads=2, **DECODER), causal, 3, 3),
    Model("cohere2", hf("Cohere2ForCausalLM", "Cohere2Config", num_key_value_heads=2, sliding_window=4, **DECODER),
          causal, 3, 3),
    Model("cohere_qk_norm", hf("CohereForCausalLM", "CohereConfig", num_key_value_heads=2, use_qk_norm=True,
                               **DECODER), causal, 7, 7),
    Model("ctrl", hf("CTRLLMHeadModel", "CTRLConfig", dff=48, **GPT), causal, 5, 5),
    Model("dbrx", hf("DbrxForCausalLM", "DbrxConfig", d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
                     attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                     ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
                     **TEXT), causal, 2, 0),
    Model("ernie4_5", hf("Ernie4_5ForCausalLM", "Ernie4_5Config", **LLAMA), causal, 0, 0),
    Model("gemma", hf("GemmaForCausalLM", "GemmaConfig", **LLAMA), causal, 0, 0),
    Model("gpt_bigcode", hf("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **GPT), causal, 5, 5),
    Model("gpt_neox_japanese", hf("GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig",
                                  intermediate_multiple_size=2, **DECODER), causal, 5, 5),
    Model("imagegpt", hf("ImageGPTModel", "ImageGPTConfig", **GPT), causal, 0, 0),
    Model("llama", hf("LlamaForCausalLM", "LlamaConfig", **LLAMA), causal, 0, 0),
    Model("mamba", hf("MambaForCausalLM", "MambaConfig", state_size=4, hidden_size=32, num_hidden_layers=2, **TEXT),
          causal, 0, 0),
    Model("mixtral", hf("MixtralForCausalLM", "MixtralConfig", num_local_experts=4,
                        experts_implementation="eager", **LLAMA), causal, 0, 0),
    Model("modernbert_decoder", hf("ModernBertDecoderForCausalLM", "ModernBertDecoderConfig", local_attention=4,
                                   cls_token_id=1, sep_token_id=2, **DECODER), causal, 6, 5, 1),
    Model("mpt", hf("MptForCausalLM", "MptConfig", d_model=32, n_heads=4, n_layers=2, max_seq_len=64, **TEXT),
          causal, 5, 5),
    Model("nemotron", hf("NemotronForCausalLM", "NemotronConfig", num_key_value_heads=2, head_dim=8, **DECODER), causal,
          5, 5),
    Model("olmo", hf("OlmoForCausalLM", "OlmoConfig", **DECODER), causal, 5, 5),
    Model("openai_gpt", hf("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", **GPT), text, 4, 0),
    Model("persimmon", hf("PersimmonForCausalLM", "PersimmonConfig", **DECODER), causal, 9, 9),
    Model("phi", hf("PhiForCausalLM", "PhiConfig", **DECODER), causal, 3, 3),
    Model("phi_qk_norm", hf("PhiForCausalLM", "PhiConfig", qk_layernorm=True, **DECODER), causal, 7, 7),
    Model("phimoe", hf("PhimoeForCausalLM", "PhimoeConfig", num_key_value_heads=2, num_local_experts=4,
                       attention_bias=True, lm_head_bias=True, experts_implementation="eager",
                       **DECODER), causal, 2, 0),
    Model("rwkv", hf("RwkvForCausalLM", "RwkvConfig", hidden_size=32, num_hidden_layers=2, attention_hidden_size=32,
                     intermediate_size=48, rescale_every=0, context_length=64, **TEXT), causal, 6, 5, 2),
    Model("stablelm", hf("StableLmForCausalLM", "StableLmConfig", num_key_value_heads=2, **DECODER), causal, 5, 5),
    Model("stablelm_parallel", hf("StableLmForCausalLM", "StableLmConfig", num_key_value_heads=2,
                                  use_parallel_residual=True, **DECODER), causal, 3, 3),
    Model("stablelm_qk_norm", hf("StableLmForCausalLM", "StableLmConfig", num_key_value_heads=2, qk_layernorm=True,
                                 **DECODER), causal, 17, 17),
    Model("starcoder2", hf("Starcoder2ForCausalLM", "Starcoder2Config", num_key_value_heads=2, **DECODER), causal,
          5, 5),
    Model("trocr", hf("TrOCRForCausalLM", "TrOCRConfig", **{k: v for k, v in BART.items() if "encoder" not in k}),
          causal, 5, 1),
    Model("xglm", hf("XGLMForCausalLM", "XGLMConfig", d_model=32, num_layers=2, attention_heads=4, ffn_dim=48,
                     max_position_embeddings=64, **TEXT), causal, 5, 5, wide=True),
    Model("xlstm", hf("xLSTMForCausalLM", "xLSTMConfig", hidden_size=32, embedding_dim=32, num_hidden_layers=2,
                      num_blocks=2, num_heads=4, chunk_size=4, **TEXT), causal, 2, 2),
]  # fmt: skip

SEQ2SEQ = [
    Model("bart", hf("BartForConditionalGeneration", "BartConfig", **BART), seq2seq, 12, 2),
    Model("bigbird_pegasus", hf("BigBirdPegasusForConditionalGeneration", "BigBirdPegasusConfig",
                                attention_type="original_full", **BART), seq2seq, 12, 12),
    Model("blenderbot", hf("BlenderbotForConditionalGeneration", "BlenderbotConfig", **BART), seq2seq, 12, 12),
    Model("blenderbot_small", hf("BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", **BART), seq2seq,
          12, 2),
    Model("led", hf("LEDForConditionalGeneration", "LEDConfig", attention_window=4, max_encoder_position_embeddings=64,
                    max_decoder_position_embeddings=64, **BART),
          fixed(input_ids=tokens(length=8), decoder_input_ids=tokens(length=5), use_cache=False), 12, 1),
    Model("longt5", hf("LongT5ForConditionalGeneration", "LongT5Config", local_radius=3, **T5), seq2seq, 0, 0),
    Model("m2m_100", hf("M2M100ForConditionalGeneration", "M2M100Config", **BART), seq2seq, 12, 12),
    Model("marian", hf("MarianMTModel", "MarianConfig", **BART), seq2seq, 10, 0),
    Model("mbart", hf("MBartForConditionalGeneration", "MBartConfig", **BART), seq2seq, 14, 14, 2),
    Model("mvp", hf("MvpForConditionalGeneration", "MvpConfig", **BART), seq2seq, 12, 2),
    Model("nllb_moe", hf("NllbMoeForConditionalGeneration", "NllbMoeConfig", num_experts=4,
                         encoder_sparse_step=2, decoder_sparse_step=2, **BART), seq2seq, 10, 0),
    Model("pegasus", hf("PegasusForConditionalGeneration", "PegasusConfig", **BART), seq2seq, 12, 12),
    Model("pegasus_x", hf("PegasusXForConditionalGeneration", "PegasusXConfig", num_global_tokens=4, block_size=4,
                          **BART), fixed(input_ids=tokens(length=8), attention_mask=torch.ones(2, 8, dtype=torch.long),
                                         decoder_input_ids=tokens(length=5), use_cache=False), 16, 16, 2),
    Model("plbart", hf("PLBartForConditionalGeneration", "PLBartConfig", **BART), seq2seq, 12, 2),
    Model("prophetnet", hf("ProphetNetForConditionalGeneration", "ProphetNetConfig", hidden_size=32,
                           num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
                           num_decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, ngram=2,
                           max_position_embeddings=64, decoder_start_token_id=1, **TEXT), seq2seq, 12, 2),
    Model("t5", hf("T5ForConditionalGeneration", "T5Config", **T5), seq2seq, 0, 0),
]  # fmt: skip

VIT = {**VISION, "num_channels": 3}
TOWER = {**VIT, "projection_dim": 16}
PYRAMID = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3],
           "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic",
          "out_features": ["stage2"]}  # fmt: skip
DETR = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False, "num_queries": 5,
        **{k: v for k, v in BART.items() if k not in TEXT and k not in ("decoder_start_token_id",
                                                                        "max_position_embeddings")}}  # fmt: skip


def detector(class_name: str, config_name: str, **config: Any) -> Callable[[], nn.Module]:
    """A detector on a small ResNet."""
    return with_configs(class_name, config_name, {"backbone_config": ("ResNetConfig", RESNET)}, **{**DETR, **config})


def video(frames: int, size: int = 32) -> Inputs:
    return floats("pixel_values", 2, frames, 3, size, size)


VISION_MODELS = [
    Model("beit", hf("BeitModel", "BeitConfig", use_mean_pooling=False, **VIT), image(), 5, 5),
    Model("beit_relative", hf("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True,
                              use_absolute_position_embeddings=True, **VIT), image(), 5, 5),
    Model("bit", hf("BitModel", "BitConfig", num_groups=4, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
          image(), 0, 0),
    Model("conditional_detr", detector("ConditionalDetrModel", "ConditionalDetrConfig"), image(64), 11, 1),
    Model("convnext", hf("ConvNextModel", "ConvNextConfig", num_stages=2, hidden_sizes=[16, 32], depths=[1, 1],
                         image_size=32), image(), 5, 1),
    Model("convnextv2", hf("ConvNextV2Model", "ConvNextV2Config", num_stages=2, hidden_sizes=[16, 32], depths=[1, 1],
                           image_size=32), image(), 5, 1),
    Model("cvt", hf("CvtModel", "CvtConfig", patch_sizes=[7, 3], patch_stride=[4, 2], patch_padding=[2, 1],
                    embed_dim=[16, 32], num_heads=[1, 2], depth=[1, 2], mlp_ratio=[2.0, 2.0],
                    attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0], drop_path_rate=[0.0, 0.0],
                    qkv_bias=[True, True], cls_token=[False, True], qkv_projection_method=["dw_bn", "dw_bn"],
                    kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2], padding_q=[1, 1], stride_q=[1, 1]),
          image(), 8, 2),
    Model("dab_detr", detector("DabDetrModel", "DabDetrConfig", hidden_size=32), image(64), 13, 3, 1, wide=True),
    Model("data2vec_vision", hf("Data2VecVisionModel", "Data2VecVisionConfig", use_mean_pooling=False, **VIT), image(),
          5, 5),
    Model("deformable_detr", detector("DeformableDetrModel", "DeformableDetrConfig", num_feature_levels=2,
                                      encoder_n_points=2, decoder_n_points=2), image(64), 10, 1),
    Model("deit", hf("DeiTModel", "DeiTConfig", **VIT), image(), 5, 5),
    Model("depth_anything", with_configs("DepthAnythingForDepthEstimation", "DepthAnythingConfig", {
        "backbone_config": ("Dinov2Config", {**VIT, "out_indices": [1, 2], "apply_layernorm": True,
                                             "reshape_hidden_states": False})},
        reassemble_hidden_size=32, patch_size=8, reassemble_factors=[2, 1], neck_hidden_sizes=[12, 16],
        fusion_hidden_size=8, head_hidden_size=8), image(), 6, 6),
    Model("detr", detector("DetrModel", "DetrConfig"), image(64), 11, 1),
    Model("dinov2_with_registers", hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **VIT), image(), 5, 5),
    Model("dinov2_swiglu", hf("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True, **VIT), image(), 5, 5),
    Model("dinov3_convnext", hf("DINOv3ConvNextModel", "DINOv3ConvNextConfig", hidden_sizes=[8, 12, 16, 32],
                                depths=[1, 1, 1, 1], image_size=32), image(), 9, 2, 1),
    Model("dinov3_vit", hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2, **VIT), image(), 5, 5),
    Model("donut_swin", hf("DonutSwinModel", "DonutSwinConfig", **SWIN), image(), 6, 1),
    Model("dpt", hf("DPTForDepthEstimation", "DPTConfig", backbone_out_indices=[0, 1], reassemble_factors=[2, 1],
                    neck_hidden_sizes=[8, 16], fusion_hidden_size=8, is_hybrid=False, **VIT), image(), 5, 0),
    Model("eomt", hf("EomtForUniversalSegmentation", "EomtConfig", num_blocks=1, num_queries=5,
                     **{k: v for k, v in VIT.items() if k != "intermediate_size"}), image(), 6, 0),
    Model("focalnet", hf("FocalNetModel", "FocalNetConfig", image_size=32, patch_size=2, embed_dim=16,
                         hidden_sizes=[16, 32], depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]), image(),
          7, 5, 1),
    Model("focalnet_layer_scale", hf("FocalNetModel", "FocalNetConfig", image_size=32, patch_size=2, embed_dim=16,
                                     hidden_sizes=[16, 32], depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3],
                                     use_layerscale=True, use_conv_embed=True, use_post_layernorm=True), image(), 7, 6),
    Model("glpn", hf("GLPNModel", "GLPNConfig", sr_ratios=[2, 1], **PYRAMID),
          image(64), 9, 9, 2),
    Model("hiera", hf("HieraModel", "HieraConfig", embed_dim=16, image_size=[32, 32], depths=[1, 1], num_heads=[1, 2],
                      num_query_pool=1, masked_unit_size=[4, 4], masked_unit_attention=[True, False]), image(), 5, 3),
    Model("ijepa", hf("IJepaModel", "IJepaConfig", **VIT), image(), 5, 5),
    Model("levit", hf("LevitModel", "LevitConfig", image_size=32, patch_size=16, hidden_sizes=[16, 24, 32],
                      num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]), image(), 0, 0),
    Model("mask2former", with_configs("Mask2FormerModel", "Mask2FormerConfig", {
        "backbone_config": ("SwinConfig", {**SWIN, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2],
                                           "out_features": ["stage1", "stage2", "stage3", "stage4"]})},
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=48, encoder_layers=2,
        decoder_layers=3, num_attention_heads=4, dim_feedforward=48, num_queries=5), image(), 30, 9, 1),
    Model("maskformer_swin", hf("MaskFormerSwinModel", "MaskFormerSwinConfig", **SWIN), image(), 7, 4),
    Model("mgp_str", hf("MgpstrModel", "MgpstrConfig", image_size=[16, 32], patch_size=8, hidden_size=32,
                        num_hidden_layers=2, num_attention_heads=4, max_token_length=6),
          floats("pixel_values", 2, 3, 16, 32), 4, 0),
    Model("mlcd", hf("MLCDVisionModel", "MLCDVisionConfig", **VIT), image(), 6, 1),
    Model("mobilevit", hf("MobileViTModel", "MobileViTConfig", image_size=64, hidden_sizes=[16, 24, 32],
                          neck_hidden_sizes=[8, 8, 12, 16, 16, 24, 32], num_attention_heads=4), image(64), 21, 21),
    Model("mobilevitv2", hf("MobileViTV2Model", "MobileViTV2Config", image_size=64, width_multiplier=0.125,
                            base_attn_unit_dims=[128, 192, 256], n_attn_blocks=[1, 1, 1]), image(64), 0, 0),
    Model("pixio", hf("PixioModel", "PixioConfig", n_cls_tokens=2, **{k: v for k, v in VIT.items()
                                                                       if k != "intermediate_size"}), image(), 5, 5),
    Model("poolformer", hf("PoolFormerModel", "PoolFormerConfig", depths=[1, 1], hidden_sizes=[16, 32],
                           patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1], num_encoder_blocks=2), image(), 0, 0),
    Model("pvt", hf("PvtModel", "PvtConfig", image_size=32, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32],
                    sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2], strides=[4, 2], num_attention_heads=[1, 2],
                    mlp_ratios=[2, 2]), image(), 8, 6, 1),
    Model("pvt_v2", hf("PvtV2Model", "PvtV2Config", image_size=32, sr_ratios=[2, 1], **PYRAMID), image(), 9, 9, 2),
    Model("pvt_v2_linear", hf("PvtV2Model", "PvtV2Config", image_size=32, sr_ratios=[2, 1], linear_attention=True,
                              **PYRAMID), image(), 10, 10, 2),
    Model("regnet", hf("RegNetModel", "RegNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                       groups_width=4), image(), 0, 0),
    Model("rt_detr", with_configs("RTDetrModel", "RTDetrConfig", {"backbone_config": ("RTDetrResNetConfig", {
        "embedding_size": 8, "hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1], "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"]})}, encoder_hidden_dim=32, encoder_in_channels=[8, 12, 16],
        encoder_ffn_dim=48, encoder_attention_heads=4, d_model=32, num_queries=5, decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=48, decoder_n_points=2, decoder_layers=2, decoder_attention_heads=4, num_denoising=0),
        image(64), 9, 1),
    Model("sam_vision", hf("SamVisionModel", "SamVisionConfig", output_channels=16, window_size=2,
                           global_attn_indexes=[1], num_pos_feats=8, mlp_dim=48, mlp_ratio=2.0, **{
                               k: v for k, v in VIT.items() if k != "intermediate_size"}), image(), 6, 2),
    Model("segformer", hf("SegformerModel", "SegformerConfig", sr_ratios=[2, 1], **PYRAMID), image(), 9, 9, 2),
    Model("segformer_decoder", hf("SegformerForSemanticSegmentation", "SegformerConfig", sr_ratios=[2, 1],
                                  decoder_hidden_size=16, **PYRAMID), image(), 9, 9, 2),
    Model("seggpt", hf("SegGptModel", "SegGptConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                       image_size=[32, 16], patch_size=8, mlp_dim=48, pretrain_image_size=16, decoder_hidden_size=8,
                       merge_index=0, intermediate_hidden_state_indices=[0, 1]),
          lambda d: {"pixel_values": noise(1, 3, 16, 16, dtype=d), "prompt_pixel_values": noise(1, 3, 16, 16, dtype=d),
                     "prompt_masks": noise(1, 3, 16, 16, dtype=d)}, 6, 2, 1),
    Model("siglip_vision", hf("SiglipVisionModel", "SiglipVisionConfig", **VIT), image(), 6, 5),
    Model("siglip2_vision", hf("Siglip2VisionModel", "Siglip2VisionConfig", num_patches=16, hidden_size=32,
                               num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, patch_size=4),
          floats("pixel_values", 2, 16, 48, pixel_attention_mask=torch.ones(2, 16, dtype=torch.long),
                 spatial_shapes=torch.tensor([[4, 4], [2, 8]])), 6, 5, 1),
    Model("swiftformer", hf("SwiftFormerModel", "SwiftFormerConfig", image_size=32, depths=[1, 1], embed_dims=[16, 24],
                            downsamples=[True, True]), image(), 0, 0),
    Model("swin", hf("SwinModel", "SwinConfig", **{**SWIN, "depths": [2, 2]}), image(), 11, 6),
    Model("swin_absolute", hf("SwinModel", "SwinConfig", use_absolute_embeddings=True, **SWIN), image(), 7, 4),
    Model("swin2sr", hf("Swin2SRForImageSuperResolution", "Swin2SRConfig", image_size=16, embed_dim=16, depths=[1, 1],
                        num_heads=[2, 2], window_size=4), image(16), 6, 5),
    Model("swinv2", hf("Swinv2Model", "Swinv2Config", **{**SWIN, "depths": [2, 2]}), image(), 11, 10),
    Model("table_transformer", detector("TableTransformerModel", "TableTransformerConfig"), image(64), 12, 12),
    Model("timesformer", hf("TimesformerModel", "TimesformerConfig", num_frames=2, **VIT), video(2), 7, 7),
    Model("timesformer_joint", hf("TimesformerModel", "TimesformerConfig", num_frames=2,
                                  attention_type="joint_space_time", **VIT), video(2), 5, 5),
    Model("upernet", with_configs("UperNetForSemanticSegmentation", "UperNetConfig", {
        "backbone_config": ("ConvNextConfig", {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1],
                                               "out_features": ["stage1", "stage2"]})},
        hidden_size=8, auxiliary_in_channels=16, auxiliary_channels=8, pool_scales=[1, 2],
        use_auxiliary_head=False), image(), 6, 3, 1),
    Model("videomae", hf("VideoMAEModel", "VideoMAEConfig", num_frames=4, use_mean_pooling=False, **VIT), video(4),
          5, 5),
    Model("vit_mae", hf("ViTMAEForPreTraining", "ViTMAEConfig", decoder_hidden_size=24, decoder_num_hidden_layers=1,
                        decoder_num_attention_heads=2, decoder_intermediate_size=40, **VIT),
          lambda d: {**image()(d), "noise": noise(2, 16, dtype=d)}, 8, 8),
    Model("vit_msn", hf("ViTMSNModel", "ViTMSNConfig", **VIT), image(), 5, 5),
    Model("vitdet", hf("VitDetModel", "VitDetConfig", pretrain_image_size=32, window_size=2, window_block_indices=[0],
                       residual_block_indices=[1], use_relative_position_embeddings=True, **{
                           k: v for k, v in VIT.items() if k != "intermediate_size"}), image(), 7, 3),
    Model("vitmatte", with_configs("VitMatteForImageMatting", "VitMatteConfig", {
        "backbone_config": ("VitDetConfig", {**{k: v for k, v in VIT.items() if k != "intermediate_size"},
                                             "num_channels": 4, "pretrain_image_size": 32, "patch_size": 16,
                                             "out_features": ["stage2"]})},
        hidden_size=32, convstream_hidden_sizes=[8, 8, 8], fusion_hidden_sizes=[16, 8, 8, 8]),
        floats("pixel_values", 2, 4, 32, 32), 4, 0),
    Model("vitpose", with_configs("VitPoseForPoseEstimation", "VitPoseConfig", {
        "backbone_config": ("VitPoseBackboneConfig", {**VIT, "image_size": [32, 32], "patch_size": [8, 8],
                                                      "out_indices": [2]})}, scale_factor=2), image(), 5, 5),
    Model("vivit", hf("VivitModel", "VivitConfig", num_frames=4, tubelet_size=[2, 8, 8], **{
        k: v for k, v in VIT.items() if k != "patch_size"}), video(4), 5, 5),
    Model("vjepa2", hf("VJEPA2Model", "VJEPA2Config", crop_size=32, patch_size=16, frames_per_clip=4, hidden_size=48,
                       num_attention_heads=2, num_hidden_layers=2, pred_hidden_size=48, pred_num_attention_heads=2,
                       pred_num_hidden_layers=1, pred_num_mask_tokens=2),
          floats("pixel_values_videos", 2, 4, 3, 32, 32), 8, 8, 1),
    Model("yolos", hf("YolosModel", "YolosConfig", num_detection_tokens=3, **{**VIT, "image_size": [32, 32]}),
          image(), 5, 5),
    Model("zoedepth", with_configs("ZoeDepthForDepthEstimation", "ZoeDepthConfig", {
        "backbone_config": ("BeitConfig", {**VIT, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4],
                                           "reshape_hidden_states": False,
                                           "use_relative_position_bias": True})},
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, bottleneck_features=8, num_attractors=[4, 2, 1, 1],
        bin_embedding_dim=8, num_relative_features=8,
        bin_configurations=[{"n_bins": 4, "min_depth": 0.001, "max_depth": 10.0}]), image(), 8, 0),
]  # fmt: skip

CONV = {"conv_dim": [16, 16, 16], "conv_stride": [4, 2, 2], "conv_kernel": [8, 3, 2],
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
WAV2VEC2 = {**D4, **CONV, "num_feat_extract_layers": 3, "vocab_size": 32, "mask_time_prob": 0.0, "layerdrop": 0.0}
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
WAVE = floats("input_values", 2, 400)

AUDIO_MODELS = [
    Model("ast", hf("ASTModel", "ASTConfig", max_length=24, num_mel_bins=16, patch_size=8, frequency_stride=8,
                    time_stride=8, **D4), floats("input_values", 2, 24, 16), 5, 5),
    Model("clap_audio", hf("ClapAudioModel", "ClapAudioConfig", num_mel_bins=16, spec_size=64, patch_size=4,
                           patch_stride=[4, 4], depths=[1, 1], num_attention_heads=[2, 4], num_hidden_layers=2,
                           patch_embeds_hidden_size=16, hidden_size=32, window_size=4),
          floats("input_features", 2, 1, 64, 16), 7, 4),
    Model("clap_text", hf("ClapTextModel", "ClapTextConfig", **DECODER), text, 5, 1),
    Model("data2vec_audio", hf("Data2VecAudioModel", "Data2VecAudioConfig", **{
        **WAV2VEC2, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5}), WAVE, 11, 3),
    Model("hubert", hf("HubertModel", "HubertConfig", **WAV2VEC2), WAVE, 6, 0),
    Model("hubert_large", hf("HubertModel", "HubertConfig", **LARGE, **WAV2VEC2), WAVE, 9, 8, 1),
    Model("lasr", hf("LasrEncoder", "LasrEncoderConfig", num_mel_bins=16, subsampling_conv_channels=16,
                     conv_kernel_size=8, **D4), floats("input_features", 2, 40, 16), 11, 10, 1),
    Model("moonshine", hf("MoonshineForConditionalGeneration", "MoonshineConfig", hidden_size=32, intermediate_size=48,
                          encoder_num_hidden_layers=2, decoder_num_hidden_layers=2, encoder_num_attention_heads=4,
                          decoder_num_attention_heads=4, max_position_embeddings=64, decoder_start_token_id=1, **TEXT),
          floats("input_values", 2, 1000, decoder_input_ids=tokens(), use_cache=False), 12, 12, 1),
    Model("musicgen_decoder", hf("MusicgenForCausalLM", "MusicgenDecoderConfig", hidden_size=32, num_hidden_layers=2,
                                 num_attention_heads=4, ffn_dim=48, num_codebooks=2, vocab_size=VOCABULARY,
                                 max_position_embeddings=64, pad_token_id=VOCABULARY, bos_token_id=VOCABULARY),
          fixed(input_ids=tokens(4), use_cache=False), 5, 5),
    Model("parakeet", hf("ParakeetEncoder", "ParakeetEncoderConfig", num_mel_bins=16, subsampling_conv_channels=8,
                         conv_kernel_size=5, **D4), floats("input_features", 2, 40, 16), 10, 10, 1),
    Model("qwen2_audio_encoder", hf("Qwen2AudioEncoder", "Qwen2AudioEncoderConfig", num_mel_bins=16, encoder_layers=2,
                                    encoder_attention_heads=4, encoder_ffn_dim=48, d_model=32, max_source_positions=20),
          floats("input_features", 2, 16, 40), 5, 5, 1),
    Model("sew", hf("SEWModel", "SEWConfig", squeeze_factor=2, **WAV2VEC2), WAVE, 6, 0),
    Model("sew_d", hf("SEWDModel", "SEWDConfig", squeeze_factor=2, position_buckets=8, max_position_embeddings=32,
                      **WAV2VEC2), WAVE, 6, 1),
    Model("speech_to_text", hf("Speech2TextForConditionalGeneration", "Speech2TextConfig", conv_channels=16,
                               input_feat_per_channel=16, max_source_positions=64, max_target_positions=64,
                               **{k: v for k, v in BART.items() if k != "max_position_embeddings"}),
          floats("input_features", 2, 40, 16, decoder_input_ids=tokens(), use_cache=False), 12, 12, 1),
    Model("speecht5", hf("SpeechT5ForSpeechToText", "SpeechT5Config", hidden_size=32, encoder_layers=2,
                         encoder_attention_heads=4, encoder_ffn_dim=48, decoder_layers=2, decoder_attention_heads=4,
                         decoder_ffn_dim=48, decoder_start_token_id=1, max_speech_positions=64, max_text_positions=64,
                         encoder_max_relative_position=8, **{**TEXT, **CONV}),
          floats("input_values", 2, 400, decoder_input_ids=tokens(), use_cache=False), 12, 0),
    Model("unispeech", hf("UniSpeechModel", "UniSpeechConfig", **WAV2VEC2), WAVE, 6, 0),
    Model("unispeech_sat_large", hf("UniSpeechSatModel", "UniSpeechSatConfig", **LARGE, **WAV2VEC2), WAVE, 9, 8, 1),
    Model("vits_text_encoder", lambda: hf("VitsModel", "VitsConfig", hidden_size=32, num_hidden_layers=2,
                                          num_attention_heads=2, ffn_dim=48, vocab_size=VOCABULARY)().text_encoder,
          lambda d: {"input_ids": tokens(), "padding_mask": torch.ones(2, 7, 1, dtype=d)}, 2, 0),
    Model("voxtral_encoder", hf("VoxtralEncoder", "VoxtralEncoderConfig", hidden_size=32, num_hidden_layers=2,
                                num_attention_heads=4, intermediate_size=48, num_mel_bins=16, max_source_positions=20),
          floats("input_features", 2, 16, 40), 5, 5, 1),
    Model("wav2vec2_base", hf("Wav2Vec2Model", "Wav2Vec2Config", **WAV2VEC2), WAVE, 6, 0),
    Model("wav2vec2_large", hf("Wav2Vec2Model", "Wav2Vec2Config", **LARGE, **WAV2VEC2), WAVE, 9, 8, 1),
    Model("wav2vec2_adapter", hf("Wav2Vec2Model", "Wav2Vec2Config", add_adapter=True, num_adapter_layers=1,
                                 adapter_attn_dim=8, **LARGE, **WAV2VEC2), WAVE, 11, 10, 1),
    Model("wav2vec2_bert", hf("Wav2Vec2BertModel", "Wav2Vec2BertConfig", feature_projection_input_dim=16,
                              mask_time_prob=0.0, left_max_position_embeddings=4, right_max_position_embeddings=2,
                              conv_depthwise_kernel_size=5, **D4), floats("input_features", 2, 20, 16), 13, 10, 1),
    Model("wav2vec2_conformer", hf("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", conv_depthwise_kernel_size=5,
                                   max_source_positions=64, **WAV2VEC2), WAVE, 12, 10, 1),
    Model("wav2vec2_conformer_rotary", hf("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig",
                                          conv_depthwise_kernel_size=5, position_embeddings_type="rotary", **WAV2VEC2),
          WAVE, 12, 10, 1),
    Model("wavlm", hf("WavLMModel", "WavLMConfig", num_buckets=8, **WAV2VEC2), WAVE, 6, 0),
    Model("wavlm_large", hf("WavLMModel", "WavLMConfig", num_buckets=8, **LARGE, **WAV2VEC2), WAVE, 9, 8, 1),
    Model("whisper_encoder_classifier", hf("WhisperForAudioClassification", "WhisperConfig", d_model=32,
                                           encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48,
                                           num_mel_bins=16, max_source_positions=20, classifier_proj_size=16, **TEXT),
          floats("input_features", 2, 16, 40), 5, 5, 1),
]  # fmt: skip


def towers(class_name: str, config_name: str, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None,
           **config: Any) -> Callable[[], nn.Module]:  # fmt: skip
    """A builder of a model whose config contains one for text and one for images, as dicts."""
    return hf(class_name, config_name, text_config={**DECODER, "projection_dim": 16, **(text or {})},
              vision_config={**TOWER, **(vision or {})}, **config)  # fmt: skip


CLIP = both(text, image())
BLIP_TEXT = {**DECODER, "encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2}
QFORMER = {**DECODER, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
LLAMA_TEXT = {"model_type": "llama", **LLAMA}
OPT_TEXT = {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32,
            **{k: v for k, v in DECODER.items() if k != "intermediate_size"}}  # fmt: skip


def with_image_tokens(token: int, count: int) -> Inputs:
    """Ids with a run of image tokens in them."""
    ids = tokens(length=count + 4)
    ids[:, 1 : count + 1] = token
    return fixed(input_ids=ids, attention_mask=torch.ones_like(ids))


MULTIMODAL_MODELS = [
    Model("altclip", towers("AltCLIPModel", "AltCLIPConfig", {"project_dim": 16}, projection_dim=16), CLIP, 12, 2),
    Model("blip", towers("BlipModel", "BlipConfig", BLIP_TEXT, projection_dim=16, image_text_hidden_size=16), CLIP,
          11, 6),
    Model("blip_captioning", towers("BlipForConditionalGeneration", "BlipConfig", {**BLIP_TEXT, "is_decoder": True},
                                    projection_dim=16), CLIP, 14, 6),
    Model("blip_2", hf("Blip2ForConditionalGeneration", "Blip2Config", vision_config=VIT, qformer_config=QFORMER,
                       text_config=OPT_TEXT, num_query_tokens=3, image_token_index=60),
          both(with_image_tokens(60, 3), image()), 18, 11),
    Model("bridgetower", hf("BridgeTowerModel", "BridgeTowerConfig", text_config=DECODER, vision_config={
        **VIT, "hidden_size": 64},
                            **D4), both(text, image(), fixed(pixel_mask=torch.ones(2, 32, 32, dtype=torch.long))),
          28, 4),
    Model("chinese_clip", towers("ChineseCLIPModel", "ChineseCLIPConfig", projection_dim=16), CLIP, 11, 2),
    Model("clip_text", hf("CLIPTextModelWithProjection", "CLIPTextConfig", projection_dim=16, **DECODER), text, 5, 5),
    Model("clip_vision", hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=16, **VIT), image(),
          6, 1),
    Model("clipseg", towers("CLIPSegForImageSegmentation", "CLIPSegConfig", projection_dim=16, reduce_dim=16,
                            extract_layers=[0, 1], decoder_num_attention_heads=2, decoder_intermediate_size=24), CLIP,
          15, 6),
    Model("decision_transformer", hf("DecisionTransformerModel", "DecisionTransformerConfig", state_dim=5, act_dim=3,
                                     hidden_size=32, n_layer=2, n_head=4, max_ep_len=20),
          lambda d: {"states": noise(2, 4, 5, dtype=d), "actions": noise(2, 4, 3, dtype=d),
                     "rewards": noise(2, 4, 1, dtype=d), "returns_to_go": noise(2, 4, 1, dtype=d),
                     "timesteps": torch.arange(4).expand(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)},
          6, 6, 1),
    Model("flava", hf("FlavaModel", "FlavaConfig", text_config=DECODER, image_config=VIT, multimodal_config=D4,
                      hidden_size=32, projection_dim=16), CLIP, 16, 6),
    Model("florence2_vision", hf("Florence2VisionBackbone", "Florence2VisionConfig", depths=[1, 1], patch_size=[7, 3],
                                 patch_stride=[4, 2], patch_padding=[3, 1], patch_prenorm=[False, True],
                                 embed_dim=[16, 32], num_heads=[2, 4], num_groups=[2, 4], window_size=4),
          lambda d: {"hidden_states": image()(d)["pixel_values"]}, 10, 3, 1),
    Model("git", hf("GitForCausalLM", "GitConfig", vision_config=VIT, **DECODER), both(causal, image()), 12, 8, 1),
    # Missing: the rows of the group tokens alone, in a stream whose other rows start from a norm's output: centering
    # the linear layers' outputs as a whole would do, but a part is only centered where all of the way up has that part.
    Model("groupvit", towers("GroupViTModel", "GroupViTConfig", vision={
        "depths": [1, 1], "num_group_tokens": [4, 2], "num_output_groups": [4, 2], "hidden_size": 32},
        projection_dim=16, projection_intermediate_dim=24), CLIP, 24, 22, 6, expected_later=(24, 22, 4)),
    Model("idefics2_vision", inner("idefics2", "Idefics2VisionTransformer",
                                   "Idefics2VisionConfig", **VIT), lambda d: {
        **image()(d), "patch_attention_mask": torch.ones(2, 4, 4, dtype=torch.bool)}, 5, 5),
    Model("instructblip", hf("InstructBlipForConditionalGeneration", "InstructBlipConfig", vision_config=VIT,
                             qformer_config=QFORMER, text_config=OPT_TEXT, num_query_tokens=3, image_token_index=60),
          both(with_image_tokens(60, 3), image(), fixed(qformer_input_ids=tokens())), 20, 11),
    Model("kosmos_2", hf("Kosmos2ForConditionalGeneration", "Kosmos2Config", vision_config=VIT, latent_query_num=3,
                         text_config={"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4,
                                      "max_position_embeddings": 64, **TEXT}),
          lambda d: {**image()(d), "input_ids": tokens(length=9), "use_cache": False,
                     "image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0, 0]] * 2)},
          16, 6, 1, wide=True),
    Model("layoutlmv3", hf("LayoutLMv3Model", "LayoutLMv3Config", coordinate_size=5, shape_size=6, input_size=32,
                           patch_size=8, max_2d_position_embeddings=64, rel_pos_bins=8, rel_2d_pos_bins=8, **DECODER),
          both(fixed(input_ids=tokens(), bbox=boxes()), image()), 7, 1),
    Model("llava", hf("LlavaForConditionalGeneration", "LlavaConfig", vision_config={
        "model_type": "clip_vision_model", **VIT}, text_config=LLAMA_TEXT, image_token_id=60, image_seq_length=16),
        both(with_image_tokens(60, 16), image()), 6, 1),
    Model("lxmert", hf("LxmertModel", "LxmertConfig", l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=12,
                                **DECODER),
          lambda d: {"input_ids": tokens(), "visual_feats": noise(2, 4, 12, dtype=d),
                     "visual_pos": noise(2, 4, 4, dtype=d)}, 13, 3),
    Model("metaclip_2", towers("MetaClip2Model", "MetaClip2Config", projection_dim=16), CLIP, 11, 6),
    Model("mllama_vision", hf("MllamaVisionModel", "MllamaVisionConfig", hidden_size=32, num_hidden_layers=2,
                              num_global_layers=1, attention_heads=4, intermediate_size=48, image_size=32,
                              patch_size=8, max_num_tiles=2, intermediate_layers_indices=[0, 1],
                              vision_output_dim=96, supported_aspect_ratios=[[1, 1], [1, 2]]),
          floats("pixel_values", 1, 1, 2, 3, 32, 32, aspect_ratio_ids=torch.tensor([[1]]),
                 aspect_ratio_mask=torch.ones(1, 1, 2, dtype=torch.long)), 8, 1),
    Model("owlvit", towers("OwlViTModel", "OwlViTConfig", projection_dim=16), lambda d: {
        "input_ids": tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.long), **image()(d)}, 11, 6),
    Model("owlv2", towers("Owlv2Model", "Owlv2Config", projection_dim=16), lambda d: {
        "input_ids": tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.long), **image()(d)}, 11, 6),
    Model("paligemma", hf("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", vision_config={
        "model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}, text_config={
        "model_type": "gemma", **LLAMA}, image_token_index=60, image_token_id=60, projection_dim=32),
        both(with_image_tokens(60, 16), image(), fixed(token_type_ids=torch.zeros(2, 20, dtype=torch.long))), 5, 5),
    Model("perceiver_image", hf("PerceiverForImageClassificationLearned", "PerceiverConfig", num_latents=6,
                                d_latents=32, num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4,
                                num_cross_attention_heads=1, image_size=8, d_model=512),
          floats("inputs", 2, 3, 8, 8), 10, 2),
    Model("qwen2_vl_vision", inner("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig", depth=2,
                                   embed_dim=32, hidden_size=32, num_heads=4, patch_size=4, mlp_ratio=2),
          floats("hidden_states", 16, 96, grid_thw=torch.tensor([[1, 4, 4]])), 3, 0),
    Model("qwen3_vl_vision", hf("Qwen3VLVisionModel", "Qwen3VLVisionConfig", depth=2, hidden_size=32, num_heads=4,
                                patch_size=4, intermediate_size=48, out_hidden_size=32, num_position_embeddings=16,
                                deepstack_visual_indexes=[0]),
          floats("hidden_states", 16, 96, grid_thw=torch.tensor([[1, 4, 4]])), 4, 0),
    Model("sam", hf("SamModel", "SamConfig", vision_config={
        "output_channels": 32, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 16, "mlp_dim": 48,
        **{k: v for k, v in VIT.items() if k != "intermediate_size"}}, prompt_encoder_config={
        "hidden_size": 32, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}, mask_decoder_config={
        "hidden_size": 32, "mlp_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "iou_head_hidden_dim": 16}),
        lambda d: {**image()(d), "input_points": noise(2, 1, 2, 2, dtype=d).abs() * 10}, 16, 4),
    Model("siglip", towers("SiglipModel", "SiglipConfig"), CLIP, 11, 10),
    Model("vilt", hf("ViltModel", "ViltConfig", **{**DECODER, **VIT}), both(text, image()), 6, 6, 1),
    Model("visual_bert", hf("VisualBertModel", "VisualBertConfig", visual_embedding_dim=12, **DECODER),
          lambda d: {"input_ids": tokens(), "visual_embeds": noise(2, 4, 12, dtype=d),
                     "attention_mask": torch.ones(2, 7, dtype=torch.long),
                     "visual_attention_mask": torch.ones(2, 4, dtype=torch.long),
                     "visual_token_type_ids": torch.ones(2, 4, dtype=torch.long)}, 5, 1),
    # Missing: the shift of the message token, joined to the others behind them and cut off again before anybody looks.
    Model("x_clip", towers("XCLIPModel", "XCLIPConfig", {}, {
        "num_frames": 2, "mit_hidden_size": 16, "mit_intermediate_size": 24, "mit_num_hidden_layers": 1,
        "mit_num_attention_heads": 2}, projection_dim=16, prompt_layers=1, prompt_num_attention_heads=2),
        lambda d: {"input_ids": tokens(), "pixel_values": noise(2, 2, 3, 32, 32, dtype=d)}, 19, 7,
        expected_later=(19, 9, 0)),
]  # fmt: skip

SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1,
          "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}  # fmt: skip


def series(dtype: torch.dtype) -> dict[str, Any]:
    return {"past_values": noise(2, 10, dtype=dtype), "past_time_features": noise(2, 10, 1, dtype=dtype),
            "past_observed_mask": torch.ones(2, 10, dtype=dtype), "future_values": noise(2, 4, dtype=dtype, seed=4),
            "future_time_features": noise(2, 4, 1, dtype=dtype, seed=5)}  # fmt: skip


PATCHTST = {"num_input_channels": 3, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 32,
            "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "norm_type": "layernorm"}  # fmt: skip

TIME_SERIES_MODELS = [
    Model("informer", hf("InformerModel", "InformerConfig", attention_type="full", distil=False, **SERIES), series,
          12, 2),
    Model("informer_distil", hf("InformerModel", "InformerConfig", attention_type="prob", **SERIES), series, 12, 2),
    Model("patchtsmixer", hf("PatchTSMixerModel", "PatchTSMixerConfig", context_length=16, patch_length=4,
                             patch_stride=4, num_input_channels=3, d_model=32, num_layers=2, mode="mix_channel"),
          floats("past_values", 2, 16, 3), 6, 0),
    Model("patchtsmixer_attention", hf("PatchTSMixerModel", "PatchTSMixerConfig", context_length=16, patch_length=4,
                                       patch_stride=4, num_input_channels=3, d_model=32, num_layers=2, self_attn=True,
                                       self_attn_heads=4, gated_attn=False, use_positional_encoding=True),
          floats("past_values", 2, 16, 3), 6, 0),
    Model("patchtst", hf("PatchTSTModel", "PatchTSTConfig", **PATCHTST), floats("past_values", 2, 16, 3), 4, 0),
    Model("patchtst_post_norm_channels", hf("PatchTSTModel", "PatchTSTConfig", pre_norm=False, channel_attention=True,
                                            use_cls_token=True, **PATCHTST), floats("past_values", 2, 16, 3), 6, 0),
    Model("time_series_transformer", hf("TimeSeriesTransformerModel", "TimeSeriesTransformerConfig", **SERIES), series,
          12, 2),
    Model("timesfm", hf("TimesFmModel", "TimesFmConfig", patch_length=4, context_length=16, horizon_length=4,
                        num_hidden_layers=2, hidden_size=32, intermediate_size=32, head_dim=8, num_attention_heads=4),
          lambda d: {"past_values": noise(2, 16, dtype=d), "past_values_padding": torch.zeros(2, 16, dtype=d),
                     "freq": torch.zeros(2, 1, dtype=torch.long)}, 2, 0),
]  # fmt: skip

MORE_ARCHITECTURES = [
    *TEXT_ENCODERS, *TEXT_DECODERS, *SEQ2SEQ, *VISION_MODELS, *AUDIO_MODELS, *MULTIMODAL_MODELS, *TIME_SERIES_MODELS,
]  # fmt: skip
