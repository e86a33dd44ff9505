"""What random modules are made of: sources, operations that commute with the centering, traps. See also random_norms."""

from __future__ import annotations

import math
from collections.abc import Callable

from random_programs import EXACT, ROUNDED, Shape, Writer, instruction

# Sources: the parameters absorb the centering.


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


# Operations that commute with the centering along some axes. Where they work along the features they are traps.


@instruction("commuting", 5)
def addition(w: Writer) -> str | None:
    """A residual: plus, minus, with alpha, in every spelling."""
    x = w.some(stream=True)
    if x is None:
        return None
    y = w.like(x)
    spelling = w.pick([
        "{x} + {y}", "{y} + {x}", "{x} - {y}", "{y} - {x}", "torch.add({x}, {y}, alpha={n})", "{x}.sub({y}, alpha={n})",
        "torch.rsub({x}, {y})", "torch.sub({y}, {x}, alpha={n})", "{x}.add({y})",
    ])  # fmt: skip
    return w.commuting(x, spelling.format(x=x, y=y, n=w.number()))


@instruction("commuting", 2)
def scaling(w: Writer) -> str | None:
    """A product with a number or a gate."""
    x = w.some(lambda t: t.dim() > 0, stream=True)
    if x is None:
        return None
    gate = w.gate(x)
    spelling = w.pick(["{x} * {g}", "{g} * {x}", "torch.mul({x}, {g})", "{x} / {g}", "{x}.div({g})"])
    return w.commuting(x, spelling.format(x=x, g=gate))


@instruction("commuting")
def expanded_gate(w: Writer) -> str | None:
    """A gate that has the shape of what it multiplies and is constant along the features, unless written to."""
    x = w.some(lambda t: t.dim() > 0, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    row = w.input(f"scales({{}}, {w.sizes((*shape[:-1], 1))})")
    expanded, repeated = (
        f"{row}.expand({w.sizes(shape)})",
        f"{row}.repeat({w.sizes((*[1] * (len(shape) - 1), shape[-1]))})",
    )
    gate = w.let(w.pick([expanded, f"{expanded}.clone()", repeated, f"{expanded} * 2", f"{expanded}.sigmoid()"]))
    if gate is None:
        return None
    if w.chance(3):
        w.do(w.pick([f"{gate}[..., 0] = 0.7", f"{gate} *= {x}.abs().clamp(0.5, 1)", f"{gate}[:1] = 0.7"]), gate)
    return w.commuting(
        x, w.pick([f"{x} * {gate}", f"{gate} * {x}", f"{x} / {gate}", f"torch.lerp({x}, {x} + 1, {gate})"])
    )


@instruction("commuting", 2)
def layer_scale(w: Writer) -> str | None:
    """A product with a parameter along the features, perhaps straight after a linear layer."""
    x = linear(w) if not w.chance(3) else w.some(lambda t: t.dim() > 0, stream=True)
    if x is None:
        return None
    if w.chance(3):
        x = w.let(w.pick([
            "F.dropout({}, 0.1, False)", "{}.to(torch.float64)", "{0}.view({0}.shape)", "{}.to(torch.int64).to(torch.float64)",
            "F.relu({})", "{}.clone()",
        ]).format(x), stream=True) or x  # fmt: skip
    width = w.shape(x)[-1]
    scale = w.parameter(w.pick([(width,), (1, width), (1, 1, width)]))
    return w.let(w.pick(["{x} * {s}", "{s} * {x}", "torch.mul({x}, {s})"]).format(x=x, s=scale), stream=True)


@instruction("commuting")
def unary(w: Writer) -> str | None:
    """Negations, copies and casts."""
    x = w.some(stream=True)
    if x is None:
        return None
    other = w.some()
    spelling = w.pick([
        "-{}", "torch.neg({})", "torch.positive({})", "{}.clone()", "{}.contiguous()", "{}.detach()", "{}.double()",
        "{}.to(torch.float64)", "{}.to(dtype=torch.float64, copy=True)", f"{{}}.type_as({other})", f"{{}}.to({other})",
        "F.dropout({}, 0.3, training=False)", "F.dropout({}, 0.0, training=True)", "{}.float().double()",
    ])  # fmt: skip
    if "float()" in spelling:
        w.tolerance = ROUNDED
    return w.commuting(x, spelling.format(x))


@instruction("commuting")
def masking(w: Writer) -> str | None:
    """A mask, mostly constant along the features."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    features = None if w.chance(4) else 1
    truth = w.input(f"mask({{}}, {w.sizes(w.broadcast(w.shape(x), features=features))})")
    if w.chance(2):
        truth += w.pick([f".expand_as({x})", f".expand({w.sizes(w.shape(x))}).logical_not()", ".clone()"])
    y = w.like(x)
    spelling = w.pick(["torch.where({m}, {x}, {y})", "torch.where({m}, {y}, {x})", "{x}.masked_fill({m}, {n})",
                       "{x} * {m}"])  # fmt: skip
    return w.commuting(x, spelling.format(m=truth, x=x, y=y, n=w.number()))


@instruction("commuting", 3)
def view(w: Writer) -> str | None:
    """A view of the same elements: features cut into heads, merged again, any other cut."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    last = shape[-1]
    options: list[Callable[[], str]] = [
        lambda: f"{x}.unsqueeze({w.pick(range(-1, len(shape) + 1))})",
        lambda: f"torch.squeeze({x})" if not w.chance(2) else f"{x}.squeeze({w.pick(range(len(shape)))})",
        lambda: f"{x}.{w.pick(['view', 'reshape'])}({w.sizes(_recut(w, shape))})",
        lambda: f"torch.reshape({x}, ({w.sizes(_recut(w, shape))},))",
        lambda: f"{x}.view_as(torch.empty({w.sizes(_recut(w, shape))}))",
    ]
    heads = [h for h in (2, 3, 4) if last % h == 0 and last > h]
    if heads:
        h = w.pick(heads)
        options += [
            lambda: f"{x}.view({w.sizes((*shape[:-1], h, last // h))})",
            lambda: f"{x}.unflatten(-1, ({h}, {last // h}))",
        ] * 2
    if len(shape) >= 2:
        options += [
            lambda: f"{x}.flatten(0, 1)",
            lambda: f"{x}.reshape(-1, {last})",
            lambda: f"torch.flatten({x}, -2)",
        ]
    expression = w.pick(options)()
    return w.commuting(x, expression)


def _recut(w: Writer, shape: Shape) -> Shape:
    """Another shape of as many elements: the prime factors in their order, cut anew."""
    primes = [p for size in shape for p in _primes(size)]
    new = [1]
    for prime in primes:
        if w.chance(2):
            new.append(prime)
        else:
            new[-1] *= prime
    return tuple(new)


def _primes(number: int) -> list[int]:
    factors = []
    for prime in (2, 3, 5, 7):
        while number % prime == 0:
            factors.append(prime)
            number //= prime
    return factors + ([number] if number > 1 else [])


@instruction("commuting", 3)
def permutation(w: Writer) -> str | None:
    """Dimensions in another order."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    rank = len(w.shape(x))
    order = w.order(rank)
    first, second = w.pick(range(rank)), w.pick(range(rank))
    spelling = w.pick([
        f"{x}.transpose(-1, -2)", f"{x}.transpose({first}, {second})", f"{x}.permute({w.sizes(order)})",
        f"torch.permute({x}, ({w.sizes(order)}))", f"{x}.mT", f"torch.movedim({x}, {first}, {second})",
        f"{x}.swapaxes({first}, {second})", f"{x}.T" if rank == 2 else f"{x}.mT", f"{x}.transpose(0, 1)",
    ])  # fmt: skip
    return w.commuting(x, spelling)


def pick_axis(w: Writer, rank: int) -> int:
    """An axis, mostly not the last one."""
    return w.pick(range(rank - 1)) if rank > 1 and not w.chance(5) else rank - 1


@instruction("commuting", 3)
def cut(w: Writer) -> str | None:
    """Splits, chunks, slices and indices along an axis."""
    x = w.some(lambda t: t.dim() >= 1 and max(t.shape) > 1, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    axis = pick_axis(w, len(shape))
    size = shape[axis]
    if size < 2:
        return None
    at = w.pick(range(1, size))
    colons = ":, " * axis
    options: list[Callable[[], str]] = [
        lambda: f"{x}[{colons}{at}:]",
        lambda: f"{x}[{colons}:{at}]",
        lambda: f"{x}[{colons}{at}]",
        lambda: f"{x}[{colons}::2]",
        lambda: f"{x}[{colons}None]",
        lambda: f"{x}[..., {at}:{', :' * (len(shape) - axis - 1)}]",
        lambda: f"{x}.narrow({axis}, 1, {at})" if at < size else x,
        lambda: f"{x}.select({axis}, {at})",
        lambda: f"torch.split({x}, [{at}, {size - at}], dim={axis})[{w.pick([0, 1])}]",
        lambda: f"{x}.chunk(2, {axis})[{w.pick([0, 1])}]",
        lambda: f"torch.unbind({x}, {axis})[{at}]",
        lambda: f"torch.ops.aten.slice.Tensor({x}, {axis}, 0, {at})",
        lambda: f"torch.index_select({x}, {axis}, {w.input(f'choices({{}}, {size}, 3)')})",
        lambda: f"{x}[{colons}{w.input(f'choices({{}}, {size}, 2)')}]",
        lambda: f"{x}[{colons}{w.input(f'choices({{}}, {size}, 2, 2)')}]",
        lambda: f"{x}[{colons}{w.input(f'mask({{}}, {size})')} | True].sum({axis}, keepdim=True)",
        lambda: f"torch.gather({x}, {axis}, {w.input(f'choices({{}}, {size}, {w.sizes(shape)})')})",
    ]
    if axis + 1 < len(shape):
        rows = "{}, " + f"{size}, 2", "{}, " + f"{shape[axis + 1]}, 2"
        options += [
            lambda: f"{x}[{colons}{w.input(f'choices({rows[0]})')}, {w.input(f'choices({rows[1]})')}]",
            lambda: f"{x}[{colons}0, {w.input(f'choices({rows[1]})')}]",
            lambda: f"{x}[{colons}{w.input(f'choices({rows[0]})')}, :, None]",
            lambda: f"{x}[{colons}{w.input(f'choices({rows[0]})')}, 0]",
        ]
    return w.commuting(x, w.pick(options)())


@instruction("commuting", 2)
def join(w: Writer) -> str | None:
    """Concatenations and stacks along an axis."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    axis = pick_axis(w, len(shape))
    y = w.some(lambda t: tuple(t.shape) == shape, stream=True)
    y = y if y is not None and not w.chance(4) else w.weight(shape)
    spelling = w.pick([f"torch.cat(({x}, {y}), dim={axis})", f"torch.cat([{y}, {x}], {axis - len(shape)})",
                       f"torch.stack(({x}, {y}), {axis})", f"torch.stack([{x}, {y}, {x}], dim={axis})",
                       f"torch.concat(({x}, {x}), {axis})"])  # fmt: skip
    return w.commuting(x, spelling)


@instruction("commuting", 2)
def spread(w: Writer) -> str | None:
    """Expand, repeat, roll and flip."""
    x = w.some(lambda t: t.dim() >= 1, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    axis = pick_axis(w, len(shape))
    times = [2 if i == axis else 1 for i in range(len(shape))]
    wide = [3 if size == 1 else size for size in shape]
    spelling = w.pick([
        f"{x}.roll(1, {axis})", f"torch.roll({x}, (1, 2), dims=({axis}, 0))", f"torch.flip({x}, [{axis}])", f"{x}.roll(1)",
        f"{x}.repeat({w.sizes(times)})", f"{x}.repeat(2, {w.sizes([1] * len(shape))})", f"{x}.expand({w.sizes(wide)})",
        f"{x}.expand(2, {w.sizes(shape)})", f"{x}.expand(-1, {w.sizes(shape[1:])})" if shape[1:] else f"{x}.tile(2)",
    ])  # fmt: skip
    return w.commuting(x, spelling)


@instruction("commuting", 2)
def reduction(w: Writer) -> str | None:
    """Sums and means over an axis, mostly not the features."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    rank = len(w.shape(x))
    axis = pick_axis(w, rank)
    spelling = w.pick([
        f"{x}.mean({axis})", f"{x}.mean({axis}, keepdim=True)", f"{x}.sum(dim=({axis},), keepdim=True)",
        f"torch.sum({x}, {axis})", f"{x}.mean((0, {axis}), True)" if axis else f"{x}.mean((0,))",
        f"torch.mean({x}, {axis}, dtype=torch.float64)", f"{x}.cumsum({axis})",
    ])  # fmt: skip
    return w.commuting(x, spelling)


@instruction("commuting", 2)
def mixing(w: Writer) -> str | None:
    """A product from the left: attention's ``P @ v``, token mixing."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    *lead, rows, width = w.shape(x)
    square = w.sizes((*lead, rows, rows))
    options: list[Callable[[], str]] = [
        lambda: f"torch.softmax({w.input(f'values({{}}, {square})')}, -1) @ {x}",
        lambda: f"{w.weight((rows, rows))} @ {x}",
        lambda: f"torch.matmul({w.parameter((3, rows))}, {x})",
        lambda: f"F.linear({x}.mT, {w.weight((rows, rows))}, {w.parameter((rows,))}).mT",
        lambda: f"F.linear({x}.transpose(-1, -2), {w.parameter((rows + 1, rows))}).transpose(-1, -2)",
        lambda: f"torch.softmax({x} @ {x}.mT / {width}, -1) @ {x}",
        lambda: f"F.scaled_dot_product_attention({x}, {x}, {x})",
    ]
    return w.commuting(x, w.pick(options)())


@instruction("commuting", 2)
def resampling(w: Writer) -> str | None:
    """Pooling, interpolation, padding, running sums and gathers along another axis, seldom along the features."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    shape = w.shape(x)
    axis = pick_axis(w, len(shape))
    size, last = shape[axis], shape[-1]
    y = w.some(lambda t: tuple(t.shape) == shape, stream=True)
    part = last // 2 if w.chance(3) else last
    lead = shape[:-1]
    options: list[Callable[[], str]] = [
        lambda: f"F.pad({x}, (0, 0, 1, 2))",
        lambda: f"F.pad({x}, (0, 0, 1, 0), value=1.5)",
        lambda: f"F.pad({x}, (0, 0, -1, 0), 'constant', 2.0)",
        lambda: f"F.pad({x}, (1, 0))",
        lambda: f"{x}.cumsum({axis}) * 0.5",
        lambda: f"torch.repeat_interleave({x}, 2, dim={axis})",
        lambda: f"{x}.repeat_interleave({w.input(f'choices({{}}, 1, {size})')} + 2, {axis}, output_size={2 * size})",
        lambda: f"{x}.index_add({axis}, {w.input(f'choices({{}}, {size}, {size})')}, {y}, alpha={w.number()})",
        lambda: (
            f"{x}.gather(-2, {w.input(f'choices({{}}, {shape[-2]}, {w.sizes((*lead, 1))})')}.expand(*{lead}, {part}))"
        ),
        lambda: f"torch.lerp({x}, {y}, {w.number()})",
        lambda: f"torch.lerp({x}, {y}, {w.parameter((last,) if w.chance(3) else (1,), 'scales')})",
    ]
    if len(shape) == 3:
        options += [
            lambda: f"F.avg_pool1d({x}.mT, 2).mT",
            lambda: f"F.avg_pool1d({x}, 2)",
            lambda: f"F.avg_pool1d({x}.mT, 3, stride=1, padding=1).mT",
            lambda: f"F.adaptive_avg_pool1d({x}.mT, 2).mT",
            lambda: f"F.interpolate({x}.mT, scale_factor=2, mode='linear').mT",
            lambda: f"F.interpolate({x}.mT, size=3).mT",
            lambda: f"F.pad({x}.mT, (1, 1), mode='reflect').mT",
        ]
    if len(shape) == 4:
        options += [lambda: f"F.avg_pool2d({x}, 2)", lambda: f"F.interpolate({x}, size=(3, 2), mode='bilinear')"]
    return w.commuting(x, w.pick(options)())


# Traps: they do not commute, or they are readers that notice.


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
