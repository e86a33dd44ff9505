"""Many more models: transformers classes of every modality, built small from their configs.

Counts are what the passes decide. ``expected_later`` says what they should decide once a rule is there that is missing
today; the comment above such a row names the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from architecture_rows import D4, Inputs, Model, both, boxes, fixed, floats, inner, noise
from architectures import DECODER, TEXT, VOCABULARY, causal, hf, image, text, tokens
from text_architectures import BART, LLAMA, SEQ2SEQ, TEXT_DECODERS, TEXT_ENCODERS
from torch import nn
from vision_architectures import TOWER, VISION_MODELS, VIT

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
