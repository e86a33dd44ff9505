"""What random modules are made of: operations that commute with the centering along some axes.

Where they work along the features they are traps.
"""

from __future__ import annotations

from collections.abc import Callable

from programs import ROUNDED, Shape
from random_programs import Writer, instruction
from random_sources import linear


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
