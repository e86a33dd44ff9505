"""What random modules are made of: sources, whose parameters absorb the centering."""

from __future__ import annotations

import math
from collections.abc import Callable

from random_programs import Writer, instruction


@instruction("source", 4)
def linear(w: Writer) -> str | None:
    """A linear layer in one of its spellings."""
    h = w.some(lambda t: t.dim() >= 2 and t.shape[-1] > 1, stream=False)
    if h is None:
        return None
    *lead, k = w.shape(h)
    out = w.width
    rows = f"{h}.reshape({math.prod(lead)}, {k})"
    back = ", ".join(map(str, (*lead, out)))
    rank = len(lead) + 1

    def bias() -> str:
        return w.pick([w.weight, w.parameter])((out,)) if not w.chance(8) else w.parameter((1,))

    spellings: list[Callable[[], str]] = [
        lambda: f"F.linear({h}, {w.weight((out, k))}, {bias()})",
        lambda: f"F.linear({h}, {w.weight((out, k))})",
        lambda: f"{w.module(f'nn.Linear({k}, {out})')}({h})",
        lambda: f"{w.module(f'nn.Linear({k}, {out}, bias=False)')}({h})",
        lambda: f"{h} @ {w.weight((k, out))}",
        lambda: f"torch.matmul({h}, {w.parameter((out, k))}.t()) + {bias()}",
        lambda: f"torch.addmm({bias()}, {rows}, {w.weight((k, out))}).view({back})",
        lambda: f"torch.addmm({bias()}, {rows}, {w.parameter((k, out))}, beta=0.5, alpha=2).view({back})",
        lambda: f"torch.addmm({w.parameter((math.prod(lead), 1))}, {rows}, {w.parameter((k, out))}).view({back})",
        lambda: f"torch.ops.aten.linear.default({h}, {w.parameter((out, k))}, {bias()})",
        lambda: f"torch.einsum('...k,ko->...o', {h}, {w.parameter((k, out))})",
    ]
    if rank == 3:
        spellings += [
            lambda: f"torch.bmm({h}, {w.weight((lead[0], k, out))})",
            lambda: f"torch.baddbmm({w.parameter(w.broadcast((*lead, out)))}, {h}, {w.parameter((lead[0], k, out))})",
        ]
    return w.let(w.pick(spellings)(), stream=True)


@instruction("source")
def embedding(w: Writer) -> str | None:
    """An embedding, its table perhaps tied to a weight that is there already."""
    tied = w.any_parameter(lambda p: p.dim() == 2 and p.shape[1] == w.width)
    table = tied if tied is not None and w.chance(2) else w.parameter((7, w.width))
    rows = w.attribute(table).shape[0]
    ids = w.input(f"choices({{}}, {rows}, {w.batch}, {w.length})")
    spelling = w.pick([
        f"F.embedding({ids}, {table})", f"F.embedding({ids}, {table}, padding_idx=0)", f"{table}[{ids}]",
        f"F.embedding_bag({ids}, {table}, mode='{w.pick(['mean', 'sum', 'max'])}')",
        f"F.embedding_bag({ids}, {table}, mode='sum', per_sample_weights={table}.new_full({ids}.shape, 0.5))",
        f"torch.embedding({table}, {ids})", f"F.embedding({ids}[0], {table})", f"F.embedding({ids}, {table}, max_norm=1.0)",
        f"F.embedding({ids}, weight={table}, max_norm=1.0)", f"F.embedding_bag({ids}, {table}, max_norm=1.0)",
    ][: 10 if w.chance(4) else 6])  # fmt: skip
    return w.let(spelling, stream=True)


@instruction("source")
def tied_head(w: Writer) -> str | None:
    """A weight that is there already, as the weight of another layer: its rows or columns read raw or centered."""
    weight = w.any_parameter(lambda p: p.dim() == 2)
    if weight is None:
        return None
    out, k = w.attribute(weight).shape
    spelling = w.pick(["F.linear({}, {})", "{} @ {}"])
    size = k if spelling.startswith("F") else out
    h = w.some(lambda t: t.dim() >= 2 and t.shape[-1] == size)
    return None if h is None else w.let(spelling.format(h, weight), stream=True)


@instruction("source")
def convolution(w: Writer) -> str | None:
    """A convolution over tokens or pixels, perhaps grouped, its channels perhaps moved to the end."""
    groups = w.pick([1, 1, 1, 2, w.width])
    channels = w.pick([2, 4]) if groups != w.width else w.width
    channels = channels if channels % groups == 0 else groups
    weight = w.parameter((w.width, channels // groups, 3))
    bias = w.pick([w.parameter((w.width,)), "None"])
    if w.chance(2):
        weight = w.parameter((w.width, channels // groups, 2, 2))
        x = w.input(f"values({{}}, {w.batch}, {channels}, 4, 4)")
        y = w.let(f"F.conv2d({x}, {weight}, {bias}, stride=2, groups={groups})", stream=True)
        moved = f"{y}.flatten(2).transpose(1, 2)"
    else:
        x = w.some(lambda t: t.dim() == 3 and t.shape[1] == channels and t.shape[2] > 2, stream=False)
        x = x or w.input(f"values({{}}, {w.batch}, {channels}, {w.length})")
        y = w.let(f"F.conv1d({x}, {weight}, {bias}, padding=1, groups={groups})", stream=True)
        moved = f"{y}.transpose(1, 2)"
    if y is None or w.chance(4):
        return y
    return w.let(moved, stream=True)


@instruction("source")
def transposed_convolution(w: Writer) -> str | None:
    """A transposed convolution over the tokens, perhaps grouped."""
    x = w.some(lambda t: t.dim() == 3 and t.shape[1] % 2 == 0, stream=False)
    x = x or w.input(f"values({{}}, {w.batch}, 4, 3)")
    groups, channels = w.pick([1, 1, 2]), w.shape(x)[1]
    weight, bias = w.parameter((channels, w.width // groups, 2)), w.pick([w.parameter((w.width,)), "None"])
    y = w.let(f"F.conv_transpose1d({x}, {weight}, {bias}, groups={groups})", stream=True)
    return y if y is None or w.chance(4) else w.let(f"{y}.transpose(1, 2)", stream=True)


@instruction("source")
def module(w: Writer) -> str | None:
    """Modules of torch whose parameters are expressions, or part of a larger operator."""
    h = w.some(lambda t: t.dim() == 3 and t.shape[-1] > 1, stream=False)
    if h is None:
        return None
    k = w.shape(h)[-1]
    heads = 2 if k % 2 == 0 else 1
    parametrised = f"nn.utils.parametrizations.weight_norm(nn.Linear({k}, {w.width}))"
    attention_ = w.pick([f"nn.MultiheadAttention({k}, {heads}, batch_first=True)", f"nn.MultiheadAttention({k}, 1)"])
    spelling = w.pick([
        lambda: f"{w.module(parametrised)}({h})", lambda: f"{w.module(attention_)}({h}, {h}, {h})[0]",
        lambda: f"(n := {w.module(attention_)}({h}, {h}, {h}))[0] + 0.1 * n[1].mean()",
        lambda: f"{w.module(attention_)}({h}, {h}, {h}, need_weights=False)[0]",
    ])  # fmt: skip
    return w.let(spelling(), stream=True)


@instruction("source")
def bare_parameter(w: Writer) -> str | None:
    """A parameter, or an expression of parameters, as a stream: positions, class tokens."""
    shape = w.pick([(w.length, w.width), (w.batch, w.length, w.width), (1, 1, w.width), (w.width,)])
    expression = w.weight(shape)
    return w.let(expression, stream=True)


@instruction("source")
def class_token(w: Writer) -> str | None:
    """A parameter in front of the tokens."""
    x = w.some(lambda t: t.dim() == 3, stream=True)
    if x is None:
        return None
    batch, _, width = w.shape(x)
    return w.commuting(x, f"torch.cat(({w.parameter((1, 1, width))}.expand({batch}, -1, -1), {x}), 1)")
