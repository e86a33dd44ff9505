"""Plans of many more real models, from every modality: counts, predictions, and why a plan folds fewer norms."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping

import pytest
import torch
from more_architectures import MORE_ARCHITECTURES, Model
from oracle import Wide

import lncompile
from lncompile.verification import floating_outputs, relative_error

#: Models whose stream starts where it would be centered at each call (from a norm's output, an activation, a batch
#: norm). The backend weighs that; a plan centers weights alone. How many norms fold with those.
STARTS_AT_RUN_TIME: dict[str, int] = {
    "esm_absolute": 1,
    "modernbert": 0,
    "roberta_prelayernorm": 1,
    "modernbert_decoder": 0,
    "rwkv": 1,
    "mbart": 0,
    "pegasus_x": 1,
    "dab_detr": 1,
    "dinov3_convnext": 1,
    "focalnet": 2,
    "glpn": 3,
    "mask2former": 5,
    "pvt": 3,
    "pvt_v2": 3,
    "pvt_v2_linear": 4,
    "segformer": 3,
    "segformer_decoder": 3,
    "seggpt": 0,
    "upernet": 1,
    "hubert_large": 3,
    "lasr": 5,
    "moonshine": 7,
    "parakeet": 5,
    "qwen2_audio_encoder": 0,
    "speech_to_text": 0,
    "unispeech_sat_large": 3,
    "voxtral_encoder": 0,
    "wav2vec2_large": 3,
    "wav2vec2_adapter": 3,
    "wav2vec2_bert": 5,
    "wav2vec2_conformer": 5,
    "wav2vec2_conformer_rotary": 5,
    "wavlm_large": 3,
    "whisper_encoder_classifier": 0,
    "decision_transformer": 1,
    "florence2_vision": 1,
    "git": 3,
    "groupvit": 6,
    "kosmos_2": 1,
}

#: Models with a tied table and one norm behind each look-up in it: to center what is looked up costs what that saves.
ONE_NORM_BEHIND_A_TIED_TABLE: dict[str, int] = {
    "albert": 0,
    "camembert": 0,
    "deberta_v2": 1,
    "distilbert": 0,
    "electra": 0,
    "mpnet": 0,
    "perceiver": 8,
    "roberta": 0,
    "trocr": 0,
    "bart": 0,
    "blenderbot_small": 0,
    "mvp": 0,
    "plbart": 0,
    "prophetnet": 0,
    "blip_captioning": 5,
}

#: Models that add what no state dict holds to their stream: a table of positions that is made anew.
NOT_IN_THE_STATE_DICT: dict[str, int] = {
    "ctrl": 0,
    "xglm": 0,
    "m2m_100": 0,
    "videomae": 0,
    "musicgen_decoder": 0,
}

#: Models with a parameter that is read as it is as well: the backend keeps a centered copy beside it, a plan has one.
READ_IN_BOTH_WAYS: dict[str, int] = {
    "deformable_detr": 0,
    "bridgetower": 2,
}

#: Models that Dynamo compiles in pieces, and that a plan takes as a whole: sites and folded norms.
AS_A_WHOLE: dict[str, tuple[int, int]] = {
    "deberta_relative": (5, 1),
    "xmod": (7, 1),
    "vits_text_encoder": (4, 0),
    "perceiver_image": (10, 7),
}

#: Models that decide by values of tensors what they do.
REFUSED = frozenset(
    "longformer dbrx mixtral phimoe led longt5 nllb_moe eomt qwen2_vl_vision qwen3_vl_vision vilt".split()
)

#: Models that cast to single precision on the way to a norm, whatever their dtype: values differ by its roundings.
SINGLE_PRECISION = frozenset(
    "cohere cohere2 cohere_qk_norm deberta deberta_relative olmo pixio siglip2_vision xlstm".split()
)

FEWER: Mapping[str, int] = {
    **STARTS_AT_RUN_TIME, **ONE_NORM_BEHIND_A_TIED_TABLE, **NOT_IN_THE_STATE_DICT, **READ_IN_BOTH_WAYS,
}  # fmt: skip


def seeded(model: torch.nn.Module, architecture: Model) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return floating_outputs(model(**architecture.inputs(torch.float64)))


def worst(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(relative_error(actual[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MORE_ARCHITECTURES, ids=lambda a: a.name)
def test_counts_and_exactness(architecture: Model) -> None:
    name = architecture.name
    default = functools.partial(torch.set_default_dtype, torch.get_default_dtype())
    if architecture.wide:
        torch.set_default_dtype(torch.float64)
    try:
        model = architecture.model()
        if name in REFUSED:
            with pytest.raises(ValueError, match="depends on the values of its tensors"):
                lncompile.plan(model, **architecture.inputs(torch.float64))
            return
        expected = seeded(model, architecture)
        plan = lncompile.plan(model, **architecture.inputs(torch.float64))
        counts = (architecture.sites, FEWER.get(name, architecture.folded))
        assert (plan.total, plan.folded) == AS_A_WHOLE.get(name, counts), str(plan)
        folded = plan.apply(copy.deepcopy(model))
        error = worst(seeded(folded, architecture), expected)
        if name in SINGLE_PRECISION:
            assert error <= 1e-5
            with Wide():
                error = worst(seeded(folded, architecture), seeded(model, architecture))
        assert error <= 1e-10
        if plan.replace and plan.center:
            control = plan.replace_modules(copy.deepcopy(model))
            assert worst(seeded(control, architecture), expected) > 1e-5, "the control: nothing is centered"
    finally:
        default()


def test_the_tables_name_models_that_are_there() -> None:
    rows = {architecture.name: architecture for architecture in MORE_ARCHITECTURES}
    assert {*FEWER, *AS_A_WHOLE, *REFUSED, *SINGLE_PRECISION} <= rows.keys()
    assert all(folded < rows[name].folded for name, folded in FEWER.items())
    assert all(rows[name].centerings for name in STARTS_AT_RUN_TIME)
