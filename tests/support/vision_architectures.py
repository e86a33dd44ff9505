"""Many more models of images and videos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from architecture_rows import Inputs, Model, floats, noise, with_configs
from architectures import TEXT, VISION, hf, image
from text_architectures import BART
from torch import nn

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
