"""Modules of a folded model: what stands where a LayerNorm stood, or an embedding whose table is tied.

They are ordinary modules: a model that holds them can be called, trained, saved, exported and compiled as any other.
``torch.compile(backend="lnfold")`` knows :class:`RMSNorm` for a norm that is folded already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_NARROW = (torch.float16, torch.bfloat16)


class RMSNorm(nn.Module):
    r"""RMSNorm with the parameters of a LayerNorm: what LayerNorm is where the mean of its input is zero.

    .. math:: y = x / \sqrt{mean(x²) + ε} ⊙ weight + bias

    The mean is over the last ``len(normalized_shape)`` axes. For 16-bit inputs everything is computed in float32 and
    rounded once, as ``nn.LayerNorm`` does it. The result is contiguous and of the dtype that ``nn.LayerNorm`` gives,
    under autocast too.

    Args:
        normalized_shape: sizes of the last axes, ``768`` or ``(768,)``.
        eps: ε, added to the mean of squares.
        elementwise_affine: whether there are a weight and, if ``bias`` says so, a bias.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: γ of shape ``normalized_shape``, or None for 1.
        bias: β of shape ``normalized_shape``, or None for 0.

    A norm made by :meth:`in_place_of` has the parameters, by name, of the norm it replaces.

    Example:
        >>> norm, folded = nn.LayerNorm(8), RMSNorm(8)
        >>> x = torch.randn(4, 8); x = x - x.mean(-1, keepdim=True)
        >>> torch.allclose(folded(x), norm(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = _sizes(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self._weight_name, self._bias_name, self._argument = "weight", "bias", "input"
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            value = torch.empty(self.normalized_shape, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set γ to ones and β to zeros."""
        with torch.no_grad():
            weight, bias = self._affine()
            if weight is not None:
                weight.fill_(1)
            if bias is not None:
                bias.fill_(0)

    @classmethod
    def in_place_of(
        cls,
        norm: nn.Module,
        *,
        normalized_shape: int | Sequence[int] | None = None,
        eps: float | None = None,
        weight: str = "weight",
        bias: str = "bias",
        argument: str = "input",
    ) -> RMSNorm:
        """Return a norm to put in the place of another one, which is not changed.

        It has the very parameters and buffers of the other norm, under their names, so that a model's state dict and
        its optimizer stay as they are. It is in training mode if the other one is.

        Args:
            norm: an ``nn.LayerNorm``, or a module of another class that computes one.
            normalized_shape: by default ``norm.normalized_shape``.
            eps: by default ``norm.eps``.
            weight: the name of γ among its parameters and buffers. Where it has none of that name, γ is 1.
            bias: the name of β, likewise. Where it has none of that name, β is 0.
            argument: what the other norm calls the tensor that it normalises, for calls that name it.

        Raises:
            ValueError: where something of the other norm would be lost (a hook, a submodule, a parameter that is
                neither γ nor β, a forward of its own), or where γ or β is not of the normalised shape.

        Example:
            >>> block.ln_1 = RMSNorm.in_place_of(block.ln_1)
        """
        if normalized_shape is None:
            normalized_shape = norm.normalized_shape  # type: ignore[assignment]
        folded = cls(
            normalized_shape,  # type: ignore[arg-type]
            norm.eps if eps is None else eps,  # type: ignore[arg-type]
            elementwise_affine=False,
        )
        _check_that_nothing_is_lost(norm)
        others = {name for name, value in norm.named_parameters() if value is not None} - {weight, bias}
        if others:
            raise ValueError(f"{_class_name(norm)} has parameters beside its weight and bias: {', '.join(others)}")
        _take_over_tensors(folded, norm)
        folded._weight_name, folded._bias_name, folded._argument = weight, bias, argument
        tensors = folded._affine()
        for name, value in zip((weight, bias), tensors, strict=True):
            if value is not None and tuple(value.shape) != folded.normalized_shape:
                raise ValueError(f"{name} of {_class_name(norm)} is of shape {tuple(value.shape)}")
        folded.elementwise_affine = any(value is not None for value in tensors)
        return folded.train(norm.training)

    def forward(self, input: Tensor | None = None, **named: Tensor) -> Tensor:
        """Normalise ``[..., *normalized_shape]``, given by position or by the name that the norm had for it."""
        if input is None:
            input = named.pop(self._argument, None)
        if input is None or named:
            raise TypeError(f"RMSNorm takes one tensor, by position or as '{self._argument}'")
        weight, bias = self._affine()
        shape, eps = self.normalized_shape, self.eps
        if input.dtype not in _NARROW or (bias is None and (weight is None or weight.dtype == input.dtype)):
            output = functional.rms_norm(input, shape, weight, eps)
            output = output if bias is None else output + bias
        else:
            # The sum would be rounded a second time. ATen's kernel takes no weight of another dtype than its input's.
            output = functional.rms_norm(input.float(), shape, None if weight is None else weight.float(), eps)
            output = output if bias is None else output + bias.float()
            output = output.to(_dtype_of_norms(input))
        # LayerNorm's is contiguous whatever its input's strides are, and a view of it may count on that.
        return output.contiguous()

    def extra_repr(self) -> str:
        """What stands in the printed module, as for ``nn.LayerNorm``."""
        weight, bias = self._affine()
        return f"{self.normalized_shape}, eps={self.eps}, weight={weight is not None}, bias={bias is not None}"

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """γ and β."""
        return getattr(self, self._weight_name, None), getattr(self, self._bias_name, None)


class CenteredEmbedding(nn.Embedding):
    """An embedding that centers what it looks up: for a table that is read elsewhere as it is (a tied head).

    .. math:: y = w_i - mean(w_i)

    The mean is over the features. 16-bit rows are centered in float32 and rounded once, others in their own dtype. The
    parameter ``weight`` stays as it is.

    Example:
        >>> model.wte = CenteredEmbedding.in_place_of(model.wte)
        >>> model.lm_head.weight is model.wte.weight
        True
    """

    @classmethod
    def in_place_of(cls, embedding: nn.Embedding) -> CenteredEmbedding:
        """Return an embedding to put in the place of another one, which is not changed.

        It has the very parameters and buffers of the other one, under their names, and all its attributes. Of a class
        derived from ``nn.Embedding`` it is an instance, too: what the forward of that class returns is centered.

        Raises:
            ValueError: where something of the other embedding would be lost or come behind the centering: a hook, a
                submodule, a forward of its own.
        """
        _check_that_nothing_is_lost(embedding)
        centered = _new_centered(type(embedding))
        nn.Module.__init__(centered)
        taken = {name: value for name, value in vars(embedding).items() if name not in vars(centered)}
        vars(centered).update(taken)
        _take_over_tensors(centered, embedding)
        return centered.train(embedding.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Look up as the class it stands for does, and center: ``[...] -> [..., features]``."""
        rows = super().forward(*args, **kwargs)
        wide = rows.float() if rows.dtype in _NARROW else rows
        return (wide - wide.mean(-1, keepdim=True)).to(rows.dtype)


_centered_classes: dict[type[nn.Embedding], type[CenteredEmbedding]] = {nn.Embedding: CenteredEmbedding}


def _centered_class(original: type[nn.Embedding]) -> type[CenteredEmbedding]:
    """The class of embeddings that are looked up as in another class, and centered."""
    if issubclass(original, CenteredEmbedding):
        return original
    if original not in _centered_classes:

        def __reduce_ex__(self: CenteredEmbedding, protocol: Any) -> Any:
            """Copy and pickle by the class it stands for: this one has no name that could be imported."""
            return _new_centered, (original,), vars(self).copy()

        members = {"__reduce_ex__": __reduce_ex__, "__module__": __name__, "__doc__": CenteredEmbedding.__doc__}
        _centered_classes[original] = type(f"Centered{original.__name__}", (CenteredEmbedding, original), members)
    return _centered_classes[original]


def _new_centered(original: type[nn.Embedding]) -> CenteredEmbedding:
    """An embedding without contents, for a copy."""
    centered = _centered_class(original)
    return centered.__new__(centered)


def _sizes(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    return (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)


def _class_name(module: nn.Module) -> str:
    return type(module).__qualname__


def _check_that_nothing_is_lost(module: nn.Module) -> None:
    """Raise ValueError where a module computes more than its class and its tensors say."""
    hooks = [name for name, value in vars(module).items() if name.endswith(_HOOKS) and value]
    if hooks:
        raise ValueError(f"{_class_name(module)} has hooks ({', '.join(sorted(hooks))}): remove them first")
    if any(child is not None for child in module.children()):
        raise ValueError(f"{_class_name(module)} has submodules")
    if "forward" in vars(module):
        raise ValueError(f"the forward of this {_class_name(module)} was replaced")


_HOOKS = ("_hooks", "_pre_hooks")


def _take_over_tensors(module: nn.Module, other: nn.Module) -> None:
    """Let a module have the parameters and buffers of another one, and no others."""
    module._parameters = dict(other._parameters)
    module._buffers = dict(other._buffers)
    module._non_persistent_buffers_set = set(other._non_persistent_buffers_set)


def _dtype_of_norms(input: Tensor) -> torch.dtype:
    """What ``layer_norm`` returns for a 16-bit input: its dtype; under autocast float32, except on a CPU."""
    device = input.device.type
    return torch.float32 if device != "cpu" and torch.is_autocast_enabled(device) else input.dtype
