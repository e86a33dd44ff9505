"""What random modules are made of: traps, which do not commute with the centering or notice a mean."""

from __future__ import annotations

from programs import EXACT, ROUNDED
from random_programs import Writer, instruction


@instruction("trap", 2)
def activation(w: Writer) -> str | None:
    """A nonlinear function of each element."""
    x = w.some(stream=True)
    if x is None:
        return None
    spelling = w.pick([
        "F.gelu({})", "F.relu({})", "torch.tanh({})", "torch.sigmoid({})", "{0} * {0}", "{}.abs()", "{}.square()",
        "{}.clamp(-1, 1)", "F.silu({})", "{0} * torch.sigmoid({0})", "1 / ({0} * {0} + 1)",
    ])  # fmt: skip
    return w.let(spelling.format(x))


@instruction("trap")
def rounding(w: Writer) -> str | None:
    """Operations that look like casts, divisions and views, and are not linear."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None or w.tolerance != EXACT:
        return None
    spelling = w.pick([
        "{}.to(torch.int64).to(torch.float64)", "torch.div({}, 0.37, rounding_mode='floor')",
        "{}.long().type_as({})", "{} // 0.37", "{}.contiguous().view(torch.int32)[..., 1::2].double() / 2**29",
        "{}.contiguous().view(torch.float32)[..., 1::2].double()",
    ])  # fmt: skip
    if "float32" in spelling:
        w.tolerance = ROUNDED
    return w.let(spelling.format(x, x), stream=True)


@instruction("trap", 2)
def feature_gate(w: Writer) -> str | None:
    """A product that varies along the features."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    y = w.some(lambda t: tuple(t.shape) == shape)
    spelling = w.pick(["{x} * torch.sigmoid({y})", "{x} * {y}", "{x} / ({y} * {y} + 1)", "{x} * {u}", "{x} / {p}"])
    u = w.input(f"scales({{}}, {w.sizes(shape)})") if "{u}" in spelling else ""
    p = w.parameter((shape[-1],), "scales") if "{p}" in spelling else ""
    return w.let(spelling.format(x=x, y=y, u=u, p=p), stream=w.chance(2))


@instruction("trap", 2)
def other_norm(w: Writer) -> str | None:
    """A normalisation of another kind, or over other axes."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    axis = w.pick([-1, -2, 0])
    channels = shape[1]
    groups = [g for g in (1, 2, 3, channels) if channels % g == 0]
    options = [
        f"{x} - {x}.mean({axis}, keepdim=True)", f"F.normalize({x}, dim={axis}, eps=0.1)", f"torch.softmax({x}, {axis})",
        f"F.log_softmax({x}, dim={axis})", f"{x}.var({axis}, keepdim=True)", f"{x}.mean({axis}, keepdim=True)",
        f"{x} / torch.sqrt({x}.var({axis}, unbiased=False, keepdim=True) + 0.1)",
        f"F.rms_norm({x}, ({shape[-1]},), eps=0.1)", f"F.group_norm({x}, {w.pick(groups)}, eps=0.1)",
        f"F.max_pool1d({x}, 2)" if len(shape) == 3 else f"torch.amax({x}, {axis})", f"{x}.max({axis})[0]",
        f"F.avg_pool1d({x}, 2)" if len(shape) == 3 else f"torch.logsumexp({x}, {axis})", f"{x}.amax({axis}, keepdim=True)",
        f"F.instance_norm({x}, eps=0.1)" if len(shape) == 3 else f"{x}.std(0, keepdim=True)",
        f"F.batch_norm({x}, {w.parameter((channels,))}, {w.parameter((channels,), 'scales')}, eps=0.1)",
        f"F.batch_norm({x}, {w.parameter((channels,))}, {w.parameter((channels,), 'scales')}, training=True, eps=0.1)",
    ]  # fmt: skip
    expression = w.pick(options)
    return w.let(expression, stream="keepdim" in expression or "softmax" in expression)


@instruction("trap")
def reader(w: Writer) -> str | None:
    """A linear layer, a product, a loss: someone who reads a stream and would notice."""
    x = w.some(lambda t: t.dim() >= 2 and t.shape[-1] > 1, stream=True)
    if x is None:
        return None
    width = w.shape(x)[-1]
    options = [f"F.linear({x}, {w.parameter((3, width))})", f"{x} @ {x}.mT / {width}", f"{x}.sum() * 0.1",
               f"{x}.mean(-1)", f"{x}.unsqueeze(-1) * {w.parameter((2,))}", f"torch.full_like({x}, 0.5)",
               f"torch.dist({x}, {x} * 0)"]  # fmt: skip
    return w.let(w.pick(options))
