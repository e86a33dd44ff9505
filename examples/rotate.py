"""Rotates the residual stream of a model, the first step of rotation-based quantization, which needs plain RMSNorms.

    pip install ".[demo]"
    python examples/rotate.py                       # a small random OPT, no network
    python examples/rotate.py --model my/folder     # yours, or a Hugging Face id

An RMSNorm without γ and β gives the same result, rotated, for a rotated row: ``RMSNorm(x Q) = RMSNorm(x) Q``. So every
layer that writes into the stream may be multiplied with an orthogonal Q, and every layer that reads it with Qᵀ: answers
stay, and a few channels of large numbers, which 8 or 4 bits cannot hold beside small ones, are spread over all (QuaRot,
arXiv:2404.00456). A LayerNorm takes the mean of a rotated row, which is another number, and γ does not commute with Q.

A fold plan with ``absorb="affine"`` leaves plain RMSNorms. It also says which parameters write into the stream, those
that it centers, and which read it, those that absorb: nothing here knows an architecture.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lncompile
from lncompile.models.random_weights import randomise

#: How many times as large as the others one channel of the random model's stream starts.
MASSIVE = 40.0


class CannotRotateError(ValueError):
    """The stream of a model cannot be rotated as its plan is. The message says why."""


def rotate(model: nn.Module, plan: lncompile.FoldPlan, rotation: Tensor) -> nn.Module:
    """Rotate the residual stream of a folded model in place.

    Args:
        model: a plan with ``absorb="affine"`` and ``untie=True`` was applied to it.
        plan: that plan.
        rotation: Q, orthogonal, ``[width, width]``.

    Returns:
        The model.

    Raises:
        CannotRotateError: where a norm is not a plain RMSNorm, or the stream is not of that width everywhere.
    """
    absorbed = {norm.path: norm for norm in plan.absorb}
    for norm in plan.replace:
        taken = absorbed.get(norm.path)
        if (norm.weight and not (taken and taken.weight)) or (norm.bias and not (taken and taken.bias)):
            raise CannotRotateError(f"'{norm.path}' keeps γ or β after the fold:\n{plan}")
    # A norm that is no module stays a LayerNorm, of a stream whose mean is zero only as long as it is not rotated.
    stays = [norm.name for norm in plan.norms if norm.becomes != "rms_norm"]
    if stays:
        raise CannotRotateError(f"'{stays[0]}' stays a LayerNorm after the fold:\n{plan}")
    if any(not lookup.untied for lookup in plan.lookups):
        raise CannotRotateError("a table is read as it is by another layer: plan with untie=True")
    tensors = model.state_dict()  # the parameters themselves
    beside_the_stream = [*_written(plan, tensors), *_read(plan, tensors)]
    for tensor, axis in beside_the_stream:
        if tensor.shape[axis] != len(rotation):
            raise CannotRotateError(f"a stream of {tensor.shape[axis]} channels, and Q is of {len(rotation)}")
    with torch.no_grad():
        for tensor, axis in beside_the_stream:
            exact = torch.tensordot(tensor.double(), rotation.double(), dims=([axis], [0]))
            tensor.copy_(exact.movedim(-1, axis))
    return model


def _written(plan: lncompile.FoldPlan, tensors: dict[str, Tensor]) -> list[tuple[Tensor, int]]:
    """What writes into the stream, and its axis that is the stream's channels: W with Q W, b with Q b."""
    found = []
    for parameter in plan.center:
        for centering in parameter.centerings:
            if len(centering.axes) != 1 or centering.rows:
                raise CannotRotateError(f"'{parameter.name}' is centered along {centering.in_words(parameter.shape)}")
            found.append((tensors[parameter.name].view(centering.view), centering.axes[0]))
    return found + [(tensors[lookup.table], 1) for lookup in plan.lookups]


def _read(plan: lncompile.FoldPlan, tensors: dict[str, Tensor]) -> list[tuple[Tensor, int]]:
    """What reads the stream behind a norm, and its axis that is the stream's channels."""
    tied = {lookup.table: lookup.tied for lookup in plan.lookups}
    found = {}
    for layer in (layer for norm in plan.absorb for layer in norm.layers):
        # A plan names a tied table once. It is untied by now, and the layer has its own.
        names = [layer.weight, *tied.get(layer.weight, ())]
        name = next((name for name in names if name.startswith(f"{layer.path}.")), layer.weight)
        found[name] = (tensors[name], layer.dimension)
    return list(found.values())


def random_rotation(width: int) -> Tensor:
    """An orthogonal matrix, ``[width, width]`` in float64, the same in each process."""
    generator = torch.Generator().manual_seed(0)
    rotation: Tensor = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q
    return rotation


def small_opt() -> tuple[nn.Module, Tensor]:
    """Return a random OPT of four layers, with one massive channel as trained models have them, and token ids."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=512, hidden_size=128, word_embed_proj_dim=128, ffn_dim=512, num_hidden_layers=4,
        num_attention_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomise(OPTForCausalLM(config)).eval()
    with torch.no_grad():
        model.get_parameter("model.decoder.embed_positions.weight")[:, 7] *= MASSIVE
    return model, torch.arange(64).reshape(2, 32)


def peak(model: nn.Module, norm: str, ids: Tensor) -> float:
    """Return how many times the root mean square of what a norm reads its largest number is."""
    seen: list[Tensor] = []
    hook = model.get_submodule(norm).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        model(ids)
    finally:
        hook.remove()
    (stream,) = seen
    return float((stream.abs().amax(-1) / stream.square().mean(-1).sqrt()).mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example as a command."""
    parser = argparse.ArgumentParser(description="Rotate the residual stream of a model, before and after its fold.")
    parser.add_argument("--model", help="folder or Hugging Face id of a causal language model (default: a small OPT)")
    chosen = parser.parse_args(arguments)
    if chosen.model is None:
        model, ids = small_opt()
    else:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
        model, ids = loaded.eval(), torch.arange(64).reshape(2, 32)

    plan = lncompile.plan(model, ids, absorb="affine", untie=True)
    folded = plan.apply(copy.deepcopy(model))
    try:
        rotation = random_rotation(plan.replace[0].normalized_shape[0] if plan.replace else 0)
        rotated = rotate(copy.deepcopy(folded), plan, rotation)
    except CannotRotateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    unfolded = rotate_unfolded(model, plan, rotation)

    table = Table(box=None, pad_edge=False)
    for header in ("model", "largest difference of a logit", "largest number in a row, over its root mean square"):
        table.add_column(header)
    norm = plan.replace[0].path
    with torch.no_grad():
        logits = model(ids).logits
        for name, each in (("as it is", model), ("folded", folded), ("folded, then rotated", rotated)):
            table.add_row(name, f"{_difference(each(ids).logits, logits):.1e}", f"{peak(each, norm, ids):.1f}")
        difference = _difference(unfolded(ids).logits, logits)
    table.add_row("rotated without a fold", f"{difference:.1e}", f"{peak(unfolded, norm, ids):.1f}")
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(f"{plan.folded} of {plan.total} norms are plain RMSNorms after the fold.")
    console.print(table)
    return 0


def rotate_unfolded(model: nn.Module, plan: lncompile.FoldPlan, rotation: Tensor) -> nn.Module:
    """Return a copy of a model that was rotated without a fold: its LayerNorms answer something else."""
    plain = copy.deepcopy(model)
    for lookup in plan.lookups:
        embedding: Any = plain.get_submodule(lookup.path)
        embedding.weight = nn.Parameter(embedding.weight.detach().clone())
    return rotate(plain, plan, rotation)


def _difference(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    sys.exit(main())
