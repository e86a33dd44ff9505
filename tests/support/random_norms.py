"""Random modules: norms of all kinds, the blocks that are built around them, and writes into what is there."""

from __future__ import annotations

from collections.abc import Callable

from programs import SMALLEST_VARIANCE, Unusable
from random_instructions import convolution
from random_programs import Writer, instruction, usable


@instruction("norm", 4)
def layer_norm(w: Writer) -> str | None:
    """A LayerNorm over the last axis, seldom over several."""
    x = w.some(lambda t: t.dim() >= 1, stream=True if not w.chance(6) else None)
    if x is None:
        return None
    count = min(w.pick([1, 1, 1, 1, 2]), len(w.shape(x)))
    return add_layer_norm(w, x, count)


@instruction("norm")
def norm_after_transpose(w: Writer) -> str | None:
    """A LayerNorm over axes that are not the last ones."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    y = w.commuting(x, f"{x}.permute({w.sizes(w.order(len(w.shape(x))))})")
    return None if y is None else add_layer_norm(w, y, min(w.pick([1, 1, 2]), len(w.shape(x))))


@instruction("norm")
def norm_of_heads(w: Writer) -> str | None:
    """A LayerNorm within or across heads, or over every other group of features."""
    if w.chance(3):
        convolution(w)
    x = w.some(lambda t: t.dim() >= 2 and t.shape[-1] % 2 == 0, stream=True)
    if x is None:
        return None
    *lead, last = w.shape(x)
    heads = w.pick([h for h in (2, 3, 4) if last % h == 0])
    parts = [heads, last // heads]
    if parts[1] % 2 == 0 and w.chance(2):
        parts[1:] = [2, parts[1] // 2]
    y = w.commuting(x, f"{x}.reshape({w.sizes((*lead, *parts))})")
    if y is not None and w.chance(2):
        order = [*range(len(lead)), *(len(lead) + i for i in w.order(len(parts)))]
        y = w.commuting(y, f"{y}.permute({w.sizes(order)})")
    return None if y is None else add_layer_norm(w, y, w.pick([1, 1, 2]))


@instruction("norm")
def two_norms(w: Writer) -> str | None:
    """A norm of a norm, or several norms of one tensor."""
    x = w.some(lambda t: t.dim() >= 1 and t.shape[-1] > 1, stream=None)
    y = None if x is None else add_layer_norm(w, x, 1)
    if x is None or y is None:
        return None
    return add_layer_norm(w, w.pick([x, y, y]), 1)


@instruction("norm")
def handwritten_norm(w: Writer) -> str | None:
    """A LayerNorm in the author's own words, some of whose lines write in place or read the wrong tensor."""
    x = w.some(lambda t: t.dim() >= 1 and t.shape[-1] > 1, stream=True)
    if x is None or float(w.tensor(x).detach().var(-1, unbiased=False).min()) < SMALLEST_VARIANCE:
        return None
    width = w.shape(x)[-1]
    mean = w.let(w.pick([
        f"{x}.mean(-1, keepdim=True)", f"torch.mean({x}, -1, True)", f"{x}.mean(dim=[-1], keepdim=True)",
        f"{x}.mean(-1)[..., None]", f"{x}.mean(-1).unsqueeze(-1)", f"{x}.sum(-1, keepdim=True) / {width}",
        f"{x}.sum(-1, True) * (1 / {width})", f"({x}.sum(-1) / {width}).unsqueeze(-1)",
        f"torch.var_mean({x}, -1, keepdim=True)[1]", f"torch.std_mean({x}, -1, correction=0)[1][..., None]",
        f"{x}.sum(-1, keepdim=True) / {width + 1}", f"torch.einsum('...d->...', {x})[..., None] / {width}",
        f"{x} @ torch.full(({width}, 1), 1 / {width}, dtype={x}.dtype)", f"({x} / {width}).sum(-1, keepdim=True)",
        f"F.linear({x}, torch.ones(1, {width}, dtype={x}.dtype)) / {width}", f"2 * ({x} * 0.5).mean(-1, keepdim=True)",
        f"{x}.mean(-1, keepdim=True).expand_as({x})", f"{x} @ {w.parameter((width, 1))}",
    ]))  # fmt: skip
    if w.chance(6):
        w.do(w.pick([f"{mean} *= 0.5", f"{mean}.mul_(0.5)", f"{x}[:1] = 0.5", f"{x} += 1"]), x)
    if w.chance(6) and mean:
        # Dynamo reads the old name on: only where it is forgotten is this `x = x - mean`.
        difference = w.let(w.pick([f"({x} * 1.0).sub_({mean})", f"{x}.sub_({mean})"]))
        if difference is not None and not w.chance(3):
            w.forget(x)
    else:
        difference = mean and w.let(w.pick([
            f"{x} - {mean}", f"{x} - {mean}", f"{x} - {mean}", f"{x} + -{mean}", f"torch.add({x}, {mean}, alpha=-1)",
            f"{mean} - {x}", f"torch.rsub({mean}, {x})", f"{x} + {mean}",
        ]))  # fmt: skip
    variance = difference and w.let(w.pick([
        f"{difference}.pow(2).mean(-1, keepdim=True)", f"torch.mean({difference} * {difference}, dim=-1, keepdim=True)",
        f"({difference} ** 2).mean(-1, True)", f"{x}.var(-1, keepdim=True, unbiased=False)", f"{x}.var(-1, keepdim=True)",
        f"torch.var({x}, dim=-1, correction=0, keepdim=True)", f"torch.square({difference}).sum(-1, True) / {width}",
        f"{x}.std(-1, correction=0, keepdim=True) ** 2", f"torch.var_mean({x}, -1, correction=0)[0].unsqueeze(-1)",
        f"({x} * {x}).mean(-1, True) - {mean} * {mean}", f"({x}.pow(2).sum(-1, True) / {width} - {mean} ** 2).abs()",
        f"{x}.square().mean(-1, True) - {x}.mean(-1, True) ** 2", f"({difference} * {difference}).sum(-1, True) / {width - 1}",
        f"{difference}.var(-1, keepdim=True)", f"{x}.std(-1, keepdim=True).clamp(min=0.01) ** 2",
        f"{difference}.norm(dim=-1, keepdim=True)", f"torch.linalg.vector_norm({difference}, 2, -1, True).square()",
        f"torch.var({x}, -1, correction=2, keepdim=True).abs()" if width > 2 else f"{x}.var(-1, keepdim=True)",
        f"{difference}.abs().amax(-1, keepdim=True)", f"{x}.norm(dim=-1, keepdim=True)",
        f"torch.maximum({x}.var(-1, keepdim=True), {difference}.abs().mean(-1, True))",
    ]))  # fmt: skip
    if variance is not None and float(w.tensor(variance).detach().min()) < SMALLEST_VARIANCE:
        return None
    if difference is None or variance is None:
        return None
    root = w.pick([f"torch.rsqrt({variance} + 1e-5)", f"({variance} + 1e-5).rsqrt()"])
    if w.chance(4):
        w.do(w.pick([f"{difference} *= {root}", f"{difference}.mul_({root})", f"{difference}.add_({x})"]), difference)
        return difference
    if w.chance(4):
        return w.let(f"{difference}.div_(torch.sqrt({variance} + 1e-5)) * {w.parameter((w.shape(x)[-1],))}")
    if w.chance(4):
        return w.let(w.pick([
            f"F.normalize({difference}, dim=-1)", f"F.normalize({difference}, 1.0, -1, 1e-3) * 2",
            f"F.rms_norm({difference}, ({width},), {w.parameter((width,))}, 1e-3)",
            f"torch.rms_norm({difference}, ({width},)) * {w.parameter((width,))}",
            f"{difference} / ({difference}.norm(dim=-1, keepdim=True) + 1e-3)", f"F.normalize({difference}, dim=0)",
        ]))  # fmt: skip
    y = w.let(w.pick([
        f"{difference} * {root}", f"{difference} / ({variance} + 1e-5).sqrt()", f"{root} * {difference}",
        f"{difference} / ({variance}.sqrt() + 1e-3)", f"{difference} * (1 / torch.sqrt({variance} + 1e-5))",
        f"{w.parameter((width,))} * {difference} / ({variance} + 1e-5) ** 0.5",
    ]))  # fmt: skip
    return y and w.let(w.pick([f"{y} * {w.parameter((w.shape(x)[-1],))}", f"{w.parameter((1,))} + {y}"]))


@instruction("norm", 2)
def group_norm_of_rows(w: Writer) -> str | None:
    """A group norm of channels alone, sometimes with pixels of size one or more."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    width = w.shape(x)[-1]
    rows = w.let(f"{x}.reshape(-1, {width})", stream=True)
    if rows is None:
        return None
    groups = w.pick([g for g in (1, 2, 3, width) if width % g == 0])
    per_group = w.tensor(rows).detach().unflatten(-1, (groups, -1))
    if groups < width and float(per_group.var(-1, unbiased=False).min()) < SMALLEST_VARIANCE:
        return None
    weight, bias = (w.pick([w.parameter((width,)), "None"]) for _ in "wb")
    return w.let(w.pick([
        f"F.group_norm({rows}, {groups}, {weight}, {bias}, 0.1)", f"torch.group_norm({rows}, {groups}, bias={bias}, eps=0.1)",
        f"F.group_norm({rows}[..., None], {groups}, {weight}, eps=0.1).squeeze(-1)",
        f"torch.native_group_norm({rows}, {weight}, {bias}, {rows}.shape[0], {width}, 1, {groups}, 0.1)[{w.pick([0, 0, 1, 2])}]",
        f"F.layer_norm({rows}.view(-1, {groups}, {width // groups}), ({width // groups},), eps=0.1).flatten(1)",
        f"F.group_norm({rows}[..., None] + {w.parameter((width, 2))}, {groups}, {weight}, {bias}, 0.1).mean(-1)",
    ]), stream=w.chance(3))  # fmt: skip


def add_layer_norm(w: Writer, x: str, count: int) -> str | None:
    """One LayerNorm over the last axes, if its input varies along them."""
    value = w.tensor(x)
    shape = tuple(value.shape)[-count:]
    rows = value.detach().flatten(-count)
    if rows.shape[-1] > 1 and float(rows.var(-1, unbiased=False).min()) < SMALLEST_VARIANCE:
        return None
    axes, eps = f"({w.sizes(shape)},)", w.pick(["1e-5", "0.1"])

    def gamma() -> str:
        return w.pick([w.parameter, w.weight])(shape) if not w.chance(6) else f"(1 + {w.parameter(shape)})"

    options: list[Callable[[], str]] = [
        lambda: f"F.layer_norm({x}, {axes}, {gamma()}, {gamma()}, {eps})",
        lambda: f"F.layer_norm({x}, {axes}, {gamma()}, {gamma()}, {eps})",
        lambda: f"F.layer_norm({x}, {axes}, eps={eps})",
        lambda: f"F.layer_norm({x}, {axes}, weight={gamma()}, eps={eps})",
        lambda: f"torch.layer_norm({x}, {axes}, bias={gamma()}, eps={eps})",
        lambda: f"{w.module(f'nn.LayerNorm({axes}, eps={eps})')}({x})",
        lambda: f"{w.module(f'nn.LayerNorm({axes}, eps={eps}, bias=False)')}({x})",
        lambda: f"torch.native_layer_norm({x}, {axes}, {gamma()}, None, {eps})[0]",
        lambda: f"(n := torch.native_layer_norm({x}, {axes}, None, None, {eps}))[0] + n[1] * n[2] * 0.1",
        lambda: f"torch.native_layer_norm({x}, {axes}, None, None, {eps})[{w.pick([1, 2])}] * 0.1",
    ]
    y = w.let(w.pick(options)())
    if y is not None:
        w.norms.add(y)
    if y is not None and "weight" not in w.statements[-1] and w.chance(2):
        w.streams.add(y)
    return y


# Blocks, as models have them.


@instruction("block", 2)
def feed_forward(w: Writer) -> str | None:
    """``x + W gelu(V norm(x))``, pre-norm or post-norm."""
    x = w.some(lambda t: t.dim() >= 2 and t.shape[-1] == w.width, stream=True)
    if x is None:
        return None
    pre = not w.chance(4)
    h = add_layer_norm(w, x, 1) if pre else x
    inner = h and w.let(f"F.gelu({w.module(f'nn.Linear({w.width}, 5)')}({h}))")
    outer = inner and w.let(f"{w.module(f'nn.Linear(5, {w.width})')}({inner})", stream=True)
    total = outer and w.let(w.pick([f"{x} + {outer}", f"{outer} + {x}"]), stream=True)
    return total if pre or not total else add_layer_norm(w, total, 1)


@instruction("block", 2)
def attention(w: Writer) -> str | None:
    """``x + W P v`` with the heads cut and merged."""
    x = w.some(lambda t: t.dim() == 3 and t.shape[-1] == w.width, stream=True)
    h = x and add_layer_norm(w, x, 1)
    if x is None or h is None:
        return None
    batch, length, width = w.shape(x)
    heads = w.pick([2, 1])
    cut = f".view({batch}, {length}, {heads}, {width // heads}).transpose(1, 2)"
    q, k, v = (w.let(f"{w.module(f'nn.Linear({width}, {width})')}({h}){cut}") for _ in range(3))
    if q is None or k is None or v is None:
        return None
    mixed = w.let(w.pick([
        f"torch.softmax({q} @ {k}.mT / {width}, -1) @ {v}", f"F.scaled_dot_product_attention({q}, {k}, {v})",
    ]))  # fmt: skip
    if mixed is None:
        return None
    joined = f"{mixed}.transpose(1, 2).reshape({batch}, {length}, {width})"
    outer = w.let(f"{w.module(f'nn.Linear({width}, {width})')}({joined})", stream=True)
    return outer and w.let(f"{x} + {outer}", stream=True)


@instruction("block")
def encoder_layer(w: Writer) -> str | None:
    """torch's own encoder layer, one opaque operator in evaluation mode."""
    x = w.some(lambda t: t.dim() == 3 and t.shape[-1] == w.width, stream=True)
    if x is None:
        return None
    arguments = f"{w.width}, 2, 5, batch_first=True, norm_first={w.pick([True, False])}"
    return w.let(f"{w.module(f'nn.TransformerEncoderLayer({arguments})')}({x})", stream=True)


# Writes.


@instruction("write", 3)
def augmented(w: Writer) -> bool:
    """``x += y``: under its name the new value; under other names of its storage too."""
    x = w.some(stream=True)
    if x is None:
        return False
    sign = w.pick(["+=", "+=", "-=", "*=", "/="])
    y = w.like(x) if sign in ("+=", "-=") else w.gate(x)
    if sign == "*=" and w.chance(4):
        y = w.parameter(w.shape(x)[-1:])
    return w.do(f"{x} {sign} {y}", x)


@instruction("write", 2)
def method_in_place(w: Writer) -> bool:
    """``x.add_(y)``, used further by the old name, by the result's, or by both."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None:
        return False
    y, gate = w.like(x), w.gate(x)
    call = w.pick([
        f"{x}.add_({y})", f"{x}.sub_({y}, alpha={w.number()})", f"{x}.mul_({gate})", f"{x}.div_({gate})", f"{x}.neg_()",
        f"{x}.relu_()", f"{x}.copy_({y} + 0 * {x})", f"{x}.masked_fill_({x} > 1, 0.3)", f"torch.ops.aten.add_.Tensor({x}, {x})",
        f"{x}.zero_()", f"{x}.fill_(0.5)", f"{x}.clamp_(-1, 1)",
    ][: 4 if not w.chance(3) else 12])  # fmt: skip
    if not w.chance(3):
        new = w.commuting(x, call)
        if new is not None and not usable(w.tensor(x)):
            raise Unusable
        if new is not None and not w.chance(3):
            w.forget(x)
        return new is not None
    return w.do(call, x)


@instruction("write", 2)
def partial_write(w: Writer) -> bool:
    """Writes into a part of a tensor, through views, keywords, lists and outputs."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return False
    y = w.like(x)
    other = w.some(lambda t: t.shape == w.tensor(x).shape)
    return w.do(w.pick([
        f"{x}[:, 0] = {w.number()}", f"{x}[:, :1] += 0.7", f"{x}[0] = {x}[-1] * 2", f"{x}[..., -1] = 0.1",
        f"{x}.view(-1)[0] = 2.0", f"{x}[:1].add_({w.number()})", f"{x}.select(-1, 0).mul_(0.5)", f"F.relu({x}, inplace=True)",
        f"F.relu(input={x}, inplace=True)", f"torch._foreach_add_([{x}], 0.5)", f"torch._foreach_mul_([{x}, {other}], 0.5)",
        f"F.dropout({x}, 0.5, False, True)",
        # Dynamo takes no `out` that is not contiguous.
        *([f"torch.mul({x}, 0.5, out={x})", f"torch.add({other}, {y}, out={x})"] if w.tensor(x).is_contiguous() else []),
    ]), x)  # fmt: skip


@instruction("write")
def expression_write(w: Writer) -> str | None:
    """An expression of parameters that is written to and used further."""
    shape = w.pick([(w.length, w.width), (w.batch, w.length, w.width)])
    x = w.let(w.weight(shape), stream=True)
    if x is None or w.chance(3):
        return (x and w.do(f"{x} += {w.like(x)}", x) and x) or None
    return w.let(f"{x}.{w.pick(['add_', 'sub_', 'mul_'])}({w.pick([w.like, w.gate])(x)})", stream=True)


@instruction("write")
def parameter_write(w: Writer) -> bool:
    """A parameter or buffer that the forward changes."""
    name = w.any_parameter()
    if name is None:
        return False
    return w.do(
        w.pick([f"{name}.mul_(0.9)", f"{name}.add_(0.1)", f"{name}[:1].mul_(0.8)", f"{name}.data.mul_(0.9)"]), name
    )


@instruction("write")
def input_write(w: Writer) -> bool:
    """An argument that the forward changes."""
    inputs = [n for n in w.inputs if w.tensor(n).is_floating_point()]
    if not inputs:
        return False
    name = w.pick(inputs)
    return w.do(w.pick([f"{name} += 0.5", f"{name}.mul_(0.9)", f"{name}[:1] = 0.3"]), name)
