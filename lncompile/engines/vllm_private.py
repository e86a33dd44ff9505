"""Every name of vLLM that lncompile uses, with what is known of it (vLLM 0.32.0).

Imported where the plugin is switched on, in each process that vLLM starts.
"""

# mypy: ignore-errors
from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ir
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader  # noqa: F401
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

from lncompile.engines.norm_modules import eps_of
from lncompile.engines.routes import StoredForm
from lncompile.plans import safetensors_file

#: vLLM prints what its own loggers say, and nothing of others.
logger = init_logger("vllm.lncompile")

#: Formats that vLLM reads with DefaultModelLoader and whose names are Hugging Face's.
LOAD_FORMATS = ("auto", "hf", "safetensors")
#: Speculative decoding that looks at tokens alone. Drafts of other kinds read the target's hidden states or its tables.
_DRAFTS_OF_TOKENS = ("ngram", "ngram_gpu", "suffix")


def obstacle_of(vllm_config: VllmConfig, model_config: ModelConfig) -> str:
    """Why a model is not folded whatever it is, as the engine is set up; ``""`` where nothing is against it."""
    speculative = vllm_config.speculative_config
    if vllm_config.lora_config is not None:
        return "LoRA adapters add to the stream what was not centered"
    if speculative is not None and speculative.method not in _DRAFTS_OF_TOKENS:
        return f"drafts of kind '{speculative.method}' may read its hidden states or its embeddings"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "pipeline parallelism was not tried"
    if getattr(model_config, "enable_prompt_embeds", False):
        return "embeddings that come with a request were not centered"
    if getattr(vllm_config, "ec_transfer_config", None) is not None:
        return "embeddings of images that another process makes may not be centered"
    if model_config is not vllm_config.model_config:
        return "it is not the engine's main model"
    if getattr(model_config, "uses_mrope", False):
        return "positions of three axes were not tried"
    if not isinstance(vllm_config.additional_config, dict):
        return "its additional_config is not a dict, so that its compiled code cannot be kept apart"
    return ""


def mark(vllm_config: VllmConfig, words: str | None) -> None:
    """Make compiled code of a folded model other than that of the same model as it is, or take that back.

    vLLM keeps what it compiled under a hash of its config and of the code that was traced, and takes it from there
    without tracing anew. ``additional_config`` is a part of the hash. Parts of a model have configs made of this one,
    which share the dict.
    """
    if words is None:
        vllm_config.additional_config.pop("lncompile", None)
    else:
        vllm_config.additional_config["lncompile"] = words


def stored_tensors(loader: DefaultModelLoader, model_config: ModelConfig, model: nn.Module) -> dict[str, StoredForm]:
    """What a loader is about to read, from the headers of the files; empty where they are not safetensors alone."""
    if tuple(getattr(model, "secondary_weights", ())):
        return {}
    # As get_all_weights() asks for them.
    _, files, is_safetensors, _ = loader._prepare_weights(
        model_config.model,
        None,
        model_config.revision,
        getattr(model, "fall_back_to_pt_during_load", True),
        getattr(model, "allow_patterns_overrides", None),
    )
    if not is_safetensors:
        return {}
    tensors = [tensor for file in files for tensor in safetensors_file.SafetensorsFile.read(Path(file)).tensors]
    # What cannot be centered, whatever its dtype is called, is of 8 bits here: its shape is what loading asks for.
    return {t.name: StoredForm(t.shape, safetensors_file.FLOATING.get(t.dtype, torch.uint8)) for t in tensors}


class RMSNormWithBias(RMSNorm):
    """vLLM's RMSNorm with β behind it, computed in float32 and rounded once."""

    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, eps=eps, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype), requires_grad=False)

    def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise ``[..., hidden_size]``."""
        if residual is not None:
            raise NotImplementedError("a LayerNorm, whose place this takes, adds no residual")
        wide, weight = x.to(torch.float32), self.weight.data.to(torch.float32)
        output = ir.ops.rms_norm(wide, weight, self.variance_epsilon, None)
        return (output + self.bias.data.to(torch.float32)).to(x.dtype)

    def forward_cuda(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As elsewhere: the class it is derived from has kernels without a bias there."""
        return self.forward_native(x, residual)

    forward_xpu = forward_hip = forward_cpu = forward_oot = forward_cuda


def make_norm(module: nn.Module) -> nn.Module:
    """vLLM's RMSNorm with the parameters of a LayerNorm."""
    weight, bias, eps = module.weight, getattr(module, "bias", None), eps_of(module)
    with torch.device(weight.device):
        kind = RMSNorm if bias is None else RMSNormWithBias
        norm = kind(weight.shape[0], eps=eps, dtype=weight.dtype)
        norm.weight = weight
        if bias is not None:
            norm.bias = bias
        # vLLM writes down what modules hold when it makes a model, to give them new weights later.
        record_metadata_for_reloading(norm)
    return norm


def is_lookup(module: nn.Module) -> bool:
    """Whether a module looks up rows. A head that shares their table is a VocabParallelEmbedding as well."""
    return isinstance(module, VocabParallelEmbedding | nn.Embedding) and not isinstance(module, ParallelLMHead)


def center_lookups(module: nn.Module) -> None:
    """Let an embedding center what it looks up. Its table stays, and all its attributes."""
    module.__class__ = _centering(type(module))


class CenteredLookup:
    """An embedding that centers the rows it looks up, in float32."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Look up as the class does that it is mixed into."""
        rows = super().forward(*args, **kwargs)
        wide = rows.to(torch.float32)
        return (wide - wide.mean(-1, keepdim=True)).to(rows.dtype)


@functools.cache
def _centering(kind: type[nn.Module]) -> type[nn.Module]:
    # A PluggableLayer is made by the name of its class: an embedding is not made anew, but becomes of another class.
    return type(f"Centered{kind.__name__}", (CenteredLookup, kind), {"__module__": __name__})


def call_on_trial(
    model: nn.Module, vllm_config: VllmConfig, media: Mapping[str, Tensor], tokens: int = 4
) -> Sequence[Tensor]:
    """Call a model outside of compiled code on a few tokens, each of which attends to itself.

    Args:
        model: the engine's.
        vllm_config: the engine's.
        media: what it is given besides tokens, on any device: pixels, or features of sound.
        tokens: how many.
    """
    weight = next(model.parameters())
    device, dtype = weight.device, vllm_config.model_config.dtype
    vocabulary = vllm_config.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)
    results: list[Tensor] = []
    with (
        torch.inference_mode(),
        torch.compiler.set_stance("force_eager"),
        set_current_vllm_config(vllm_config),
        _attention_to_itself(model),
        set_forward_context(None, vllm_config, num_tokens=tokens, skip_compiled=True),
    ):
        ids = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        arguments: dict[str, Any] = {}
        if media:
            made = model.embed_multimodal(**{name: value.to(device, dtype) for name, value in media.items()})
            parts = [made] if isinstance(made, Tensor) else list(made)
            results += parts
            if model_is_encoder_decoder(vllm_config):
                arguments["encoder_outputs"] = parts
            else:
                features = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
                ids = torch.cat([ids, ids.new_zeros(features.shape[0])])
                is_feature = torch.arange(len(ids), device=device) >= tokens
                embeds = model.embed_input_ids(ids, multimodal_embeddings=[features], is_multimodal=is_feature)
                arguments["inputs_embeds"] = embeds
        positions = torch.arange(len(ids), device=device)
        given = None if "inputs_embeds" in arguments else ids
        output = model(input_ids=given, positions=positions, intermediate_tensors=None, **arguments)
        results += [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
    return results


def model_is_encoder_decoder(vllm_config: VllmConfig) -> bool:
    """Whether a model has an encoder whose output its decoder attends to."""
    return bool(getattr(vllm_config.model_config, "is_encoder_decoder", False))


@contextlib.contextmanager
def _attention_to_itself(model: nn.Module) -> Iterator[None]:
    """Context in which attention needs no cache: without metadata its kernels leave their output as it was allocated.

    The stand-in is a sum of all that attention reads, so that it hides nothing.
    """

    def attend(self: Attention, query: Tensor, key: Tensor | None, value: Tensor | None, *_: Any, **__: Any) -> Tensor:
        tokens = query.reshape(-1, self.num_heads * self.head_size).shape[0]
        total = query.reshape(tokens, self.num_heads, self.head_size)[..., : self.head_size_v]
        for part, size in ((key, self.head_size), (value, self.head_size_v)):
            if part is not None:
                rows = part.reshape(-1, self.num_kv_heads, size)[:tokens, :, : self.head_size_v]
                rows = rows.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
                total = total + (rows if len(rows) == tokens else rows.mean(0, keepdim=True))
        return total.reshape(tokens, self.num_heads * self.head_size_v)

    layers = {id(module): module for module in model.modules() if isinstance(module, Attention)}
    # The Transformers backend keeps its attention outside of the module tree.
    for other in (getattr(model, "attention_instances", None) or {}).values():
        layers[id(other)] = other
    try:
        for layer in layers.values():
            layer.forward = attend.__get__(layer)
        yield
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)


@contextlib.contextmanager
def forgetting_layers(vllm_config: VllmConfig) -> Iterator[Any]:
    """Context that yields a function which lets vLLM make the model once more: it knows its layers by their names."""
    known = vllm_config.compilation_config.static_forward_context
    before = dict(known)

    def forget() -> None:
        known.clear()
        known.update(before)

    yield forget


def agreed(problem: str) -> str:
    """What a process of a group found, or else the first of the others that found something: all do the same then."""
    group = get_tp_group()
    if group.world_size == 1:
        return problem
    found: list[str] = [""] * group.world_size
    torch.distributed.all_gather_object(found, problem, group=group.cpu_group)
    return problem or next(filter(None, found), "")


def is_loaded_by(load_format: str, kind: type) -> bool:
    """Whether a format has this loader."""
    from vllm.model_executor import model_loader

    return model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(load_format) is kind
