"""More of what random modules are made of: layers as models have them, each with traps of its own.

Fused projections cut into pieces, streams that meet what cannot be centered, scatters and writes by index, mixtures of
experts, low-rank adapters, batch and group norms, and LayerNorms spelled out with ``var_mean``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from random_norms import add_layer_norm, handwritten_norm, layer_norm, norm_of_heads
from random_programs import INSTRUCTIONS, SMALLEST_VARIANCE, Writer, instruction

# --- undisturbed streams --------------------------------------------------------------------------------------------------


@instruction("chain")
def chain(w: Writer) -> str | None:
    """Sources, then operations that commute, each of the one before, then norms: what nobody else reads folds."""
    x = w.pick(INSTRUCTIONS["source"])(w)
    y = w.pick(INSTRUCTIONS["source"])(w) if w.chance(3) else None
    if not isinstance(x, str):
        return None
    for name in (x, y):
        if isinstance(name, str) and name in w.live:
            w.live.remove(name)
    with w.focused_on(x, *([y] if isinstance(y, str) else [])):
        for _ in range(w.pick(range(1, 6))):
            w.pick(INSTRUCTIONS["commuting"])(w)
        x = w.live[-1]
        shape = w.shape(x)
        if shape and shape[-1] != w.width and w.width in shape:
            x = w.let(f"{x}.movedim({shape.index(w.width)}, -1)", stream=True) or x
        with w.focused_on(x):
            w.pick(
                [layer_norm, layer_norm, layer_norm, norm_of_heads, handwritten_norm, norm_by_statistics, group_norm]
            )(w)
    return x


# --- projections that are cut ---------------------------------------------------------------------------------------------


@instruction("block", 4)
def fused_projection(w: Writer) -> str | None:
    """One projection for several tensors: some pieces are normed, per head or whole, others are read as they are."""
    h = w.some(lambda t: t.dim() >= 2 and t.shape[-1] > 1, stream=False)
    if h is None:
        return None
    *lead, k = w.shape(h)
    count, size = w.pick([3, 2, 4]), w.pick([w.width, 4, 6])
    total = count * size
    joint = w.let(
        w.pick([
            lambda: f"F.linear({h}, {w.weight((total, k))}, {w.parameter((total,))})",
            lambda: f"{w.module(f'nn.Linear({k}, {total})')}({h})",
            lambda: f"F.linear({h}, {w.weight((total, k))})",
            lambda: f"{h} @ {w.weight((k, total))}",
            lambda: f"torch.cat([F.linear({h}, {w.parameter((size, k))}) for _ in range({count})], -1)",
            lambda: f"F.linear({h}, {w.parameter((total, k))}) * {w.parameter((total,))}",
        ])(),
        stream=True,
    )  # fmt: skip
    if joint is None:
        return None
    pieces = _pieces(w, joint, (*lead, total), count, size)
    for piece in pieces:
        for _ in range(w.pick([1, 1, 2])):
            _use_piece(w, piece)
    if w.chance(5):
        w.let(w.pick([f"torch.tanh({joint})", f"{joint}.sum(-1)"]))
    if w.chance(5):
        add_layer_norm(w, joint, 1)
    return pieces[0] if pieces else None


def _pieces(w: Writer, joint: str, shape: tuple[int, ...], count: int, size: int) -> list[str]:
    """Cut a tensor along its features: all at once, or piece by piece, where pieces may overlap."""
    *lead, total = shape
    sizes = w.pick([[size] * count, [size] * count, [size * (count - 1), size], [size - 1, total - size + 1]])
    heads = w.pick([x for x in (1, 2, 3) if size % x == 0])
    whole: list[Callable[[], tuple[str, int]]] = [
        lambda: (f"{joint}.split({size}, dim=-1)", count),
        lambda: (f"torch.split({joint}, {size}, {len(lead)})", count),
        lambda: (f"{joint}.chunk({count}, -1)", count),
        lambda: (f"{joint}.split([{w.sizes(sizes)}], dim=-1)", len(sizes)),
        lambda: (f"{joint}.tensor_split({count}, -1)", count),
        lambda: (f"{joint}.view({w.sizes((*lead, count, size))}).unbind(-2)", count),
        lambda: (f"{joint}.unflatten(-1, ({size}, {count})).unbind(-1)", count),
        lambda: (f"{joint}.view({w.sizes((*lead, count, heads, size // heads))}).unbind({len(lead)})", count),
        lambda: (f"{joint}.view({w.sizes((*lead, heads, -1))}).split({size // heads}, -1)", count),
        lambda: (f"{joint}.view({w.sizes((*lead, heads, -1))}).transpose(-2, 0).chunk({count}, dim=-1)", count),
    ]
    if not w.chance(3):
        expression, number = w.pick(whole)()
        return w.let_all(expression, [True] * number) or []
    found = []
    for index in range(w.pick([count, 2, 1])):
        start, end = index * size, (index + 1) * size
        end_from_the_right = end - total or ""
        single = [
            f"{joint}[..., {start}:{end}]", f"{joint}[..., {start - total}:{end_from_the_right}]",
            f"{joint}.narrow(-1, {start}, {size})", f"{joint}[..., {index}::{count}]",
            f"{joint}[..., {max(0, start - 1)}:{end}]", f"{joint}[..., {min(start, total - size)}:{end + 2}]",
            f"{joint}[..., {start}:{end}:2]", f"{joint}.view({w.sizes((*lead, count, size))})[..., {index}, :]",
            f"{joint}.view({w.sizes((*lead, count, size))}).select(-2, {index})",
            f"{joint}.view({w.sizes((*lead, size, count))})[..., {index}]",
            f"{joint}.view({w.sizes((*lead, count * heads, -1))})[..., {index * heads}:{(index + 1) * heads}, :]",
            f"{joint}.unflatten(-1, ({count}, {size})).movedim(-2, 0)[{index}]",
            f"{joint}.view({w.sizes((*lead, count, size))})[..., {w.pick([':2', '-2:', '::2', '1:'])}, :]",
            f"torch.index_select({joint}, -1, torch.arange({start}, {end}))",
        ]  # fmt: skip
        piece = w.let(w.pick(single), stream=True)
        found += [piece] if piece else []
    return found


def _use_piece(w: Writer, piece: str) -> None:
    """Norm a piece, within heads or whole, read it raw, or leave it to later instructions."""
    shape = w.shape(piece)
    use = w.pick(["norm", "heads", "raw", "later", "scaled"])
    if use == "norm":
        add_layer_norm(w, piece, w.pick([1, 1, 1, min(2, len(shape))]))
    elif use == "heads" and shape[-1] % 2 == 0:
        cut = w.let(f"{piece}.unflatten(-1, {w.pick(['(2, -1)', '(-1, 2)'])})", stream=True)
        if cut is not None and w.chance(2):
            cut = w.let(f"{cut}.transpose(-3, -2)", stream=True)
        if cut is not None:
            add_layer_norm(w, cut, w.pick([1, 1, 2]))
    elif use == "raw":
        w.let(w.pick([f"torch.tanh({piece})", f"{piece} * 2", f"F.linear({piece}, {w.parameter((3, shape[-1]))})"]))
    elif use == "scaled":
        scaled = w.let(f"{piece} * {w.gate(piece)}", stream=True)
        if scaled is not None:
            add_layer_norm(w, scaled, 1)


# --- streams that meet something else -------------------------------------------------------------------------------------


@instruction("trap", 3)
def message(w: Writer) -> str | None:
    """A stream plus what cannot be computed centered, normed; the stream is perhaps normed or read elsewhere too."""
    x = w.some(lambda t: t.dim() >= 1 and t.shape[-1] > 1, stream=True)
    if x is None:
        return None
    other = w.some(lambda t: tuple(t.shape) == w.shape(x)) or x
    spoiled = w.pick([
        lambda: f"torch.tanh({other})", lambda: f"F.gelu({other})", lambda: f"torch.softmax({other}, -1)",
        lambda: w.input(f"values({{}}, {w.sizes(w.shape(x))})"),
        lambda: f"F.layer_norm({other}, ({w.shape(x)[-1]},), {w.parameter(w.shape(x)[-1:])}, eps=0.1)",
    ])()  # fmt: skip
    joined = w.let(w.pick([f"{x} + {spoiled}", f"{spoiled} + {x}", f"{x} - {spoiled}", f"torch.cat(({x}, {spoiled}))",
                           f"torch.lerp({x}, {spoiled}, 0.25)"]), stream=True)  # fmt: skip
    if joined is None:
        return None
    normed = add_layer_norm(w, joined, 1)
    if w.chance(2):
        add_layer_norm(w, x, 1)
    elif w.chance(3):
        w.let(f"{x} * 0.5")
    return normed


@instruction("source", 2)
def adapter(w: Writer) -> str | None:
    """A linear layer with a low-rank branch beside it."""
    h = w.some(lambda t: t.dim() >= 2 and t.shape[-1] > 1, stream=False)
    if h is None:
        return None
    k, out = w.shape(h)[-1], w.width
    base = f"F.linear({h}, {w.weight((out, k))}, {w.parameter((out,))})"
    branch = w.pick([
        f"{h} @ {w.parameter((k, 2))} @ {w.parameter((2, out))} * {w.number()}",
        f"F.linear(F.linear({h}, {w.parameter((2, k))}), {w.parameter((out, 2))}) * {w.gate(h)}",
        f"F.linear(F.dropout({h}, 0.1, False), {w.parameter((out, 2))} @ {w.parameter((2, k))}) / 2",
        f"{w.number()} * ({h} @ {w.parameter((k, 2))} @ {w.parameter((2, 1))})",
    ])  # fmt: skip
    return w.let(f"{base} + {branch}", stream=True)


@instruction("source", 2)
def contraction(w: Writer) -> str | None:
    """An einsum with a parameter in it."""
    h = w.some(lambda t: t.dim() == 3 and t.shape[-1] > 1, stream=w.chance(2))
    if h is None:
        return None
    batch, length, k = w.shape(h)
    out, half = w.width, w.width // 2
    equations: list[tuple[str, tuple[int, ...]]] = [
        ("bld,dk->blk", (k, out)), ("bld,kd->blk", (out, k)), ("bld,hdk->blhk", (2, k, half)),
        ("bld,hdk->bhlk", (2, k, half)), ("bld,dhk->blhk", (k, half, 2)), ("bld,dk->bkl", (k, out)),
        ("bld,bdk->blk", (batch, k, out)), ("bld,lk->bkd", (length, 3)), ("bld,d->bld", (k,)), ("bld,l->bld", (length,)),
        ("bld,ldk->blk", (length, k, out)), ("bld,dk->lbk", (k, out)), ("bld,hk->bldhk", (2, 2)), ("bld,b->ld", (batch,)),
    ]  # fmt: skip
    equation, shape = w.pick(equations)
    weight = w.weight(shape)
    if w.chance(2):
        first, second, result = equation.replace("->", ",").split(",")
        return w.let(f"torch.einsum('{second}, {first} -> {result}', {weight}, {h})", stream=True)
    return w.let(f"torch.einsum('{equation}', {h}, {weight})", stream=True)


# --- writes by index ------------------------------------------------------------------------------------------------------


def _places(w: Writer, rows: int, count: int) -> str:
    """Indices of some rows, each once: where an index occurs twice, the order of writes is not told."""
    return w.input(f"values({{}}, {rows}).argsort()[:{count}]")


@instruction("commuting", 3)
def scatter(w: Writer) -> str | None:
    """Rows written into a stream by index or mask, without changing it."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    *lead, rows, width = w.shape(x)
    count = w.pick(range(1, rows + 1))
    source = w.some(lambda t: tuple(t.shape) == (*lead, rows, width), stream=True)
    part = f"{source}[..., :{count}, :]" if not w.chance(3) else w.weight((*lead, count, width))
    places = _places(w, rows, count)
    across = f"{places}[:, None].expand({w.sizes((*lead, count, width))})"
    along = f"{_places(w, width, width)}.expand({w.sizes((*lead, rows, width))})"
    row = w.input(f"mask({{}}, {w.sizes((*lead, rows, 1))})")
    everything = w.input(f"mask({{}}, {w.sizes((*lead, rows, width))})")
    full = w.pick([f"{source}", w.parameter((*lead, rows, width))])
    number = w.number()
    expression = w.pick([
        f"{x}.index_copy(-2, {places}, {part})", f"torch.index_copy({x}, {len(lead)}, {places}, {part})",
        f"{x}.index_add(-2, {places}, {part})", f"torch.index_add({x}, -2, {places}, {part}, alpha={number})",
        f"{x}.scatter(-2, {across}, {part})", f"torch.scatter({x}, {len(lead)}, {across}, {part})",
        f"{x}.scatter_add(-2, {across}, {part})", f"{x}.scatter(-2, {across}, {number})",
        f"{x}.scatter_reduce(-2, {across}, {part}, 'sum')", f"{x}.scatter_reduce(-2, {across}, {part}, 'mean')",
        f"{x}.scatter(-1, {along}, {full})", f"{x}.scatter_add(-1, {along}, {full})",
        f"{x}.masked_scatter({row}, {full})", f"{x}.masked_scatter({row}.expand_as({x}), {full})",
        f"torch.masked_scatter({x}, {everything}, {full})", f"{x}.index_fill(-2, {places}, {number})",
        f"{x}.index_fill(-1, {_places(w, width, 1)}, {number})", f"torch.slice_scatter({x}, {part}, -2, 0, {count})",
        f"torch.select_scatter({x}, {full}[..., 0, :], -2, {rows - 1})",
        f"torch.select_scatter({x}, {full}[..., 0], -1, 0)",
        f"torch.index_put({x}, ({_places(w, (*lead, rows)[0], 1)},), {x}[:1] * 2)",
        f"{x}.index_put(({_places(w, (*lead, rows)[0], 1)},), {full}[:1], accumulate=True)",
        f"torch.index_put({x}, ({row}[..., 0],), torch.tensor({number}, dtype=torch.float64))",
        f"torch.diagonal_scatter({x}, torch.diagonal({full}), 0)",
    ])  # fmt: skip
    return w.commuting(x, expression)


@instruction("write", 3)
def assembled(w: Writer) -> str | None:
    """A tensor of zeros, or an embedding, into which rows are written: by index, by mask, by slice, added or set."""
    x = w.some(lambda t: t.dim() >= 2, stream=True)
    if x is None:
        return None
    *lead, width = w.shape(x)
    sizes = w.sizes((*lead, width))
    target = w.let(
        w.pick([
            lambda: f"torch.zeros_like({x})", lambda: f"{x}.new_zeros({sizes})",
            lambda: f"torch.zeros({sizes}, dtype=torch.float64)", lambda: f"torch.empty_like({x}).fill_(0)",
            lambda: f"F.embedding({w.input(f'choices({{}}, 7, {w.sizes(lead)})')}, {w.parameter((7, width))})",
            lambda: f"{w.weight((width,))}.expand({sizes}).clone()", lambda: f"torch.ones_like({x})",
            lambda: f"{w.weight((width,))} * {x}.new_ones({sizes})", lambda: f"{x}.clone()",
        ])(),
        stream=True,
    )  # fmt: skip
    if target is None:
        return None
    for _ in range(w.pick([1, 1, 2])):
        rows, count = lead[0], w.pick(range(1, lead[0] + 1))
        places = _places(w, rows, count)
        value = w.pick([f"{x}[:{count}]", f"{x}[:{count}] * {w.number()}", w.weight((count, *lead[1:], width))])
        row = w.input(f"mask({{}}, {w.sizes(lead)})")
        inner = w.pick(range(1, lead[-1] + 1))
        w.do(w.pick([
            f"{target}[{places}] = {value}", f"{target}.index_add_(0, {places}, {value})",
            f"{target}.index_copy_(0, {places}, {value})", f"{target}[{places}] += {value}",
            f"{target}[:{count}] = {value}", f"{target}[..., :{inner}, :] = {x}[..., :{inner}, :]",
            f"{target}.index_put_(({places},), {value}, accumulate=True)", f"{target}[{row}] = {w.parameter((width,))}",
            f"{target}[{row}] = {w.number()}", f"{target}[..., 0] = {w.number()}", f"{target}[...] = {x}",
            f"{target}[{places}, ..., :2] = ({value})[..., :2]", f"{target}.masked_fill_({row}[..., None], {w.number()})",
            f"{target}.scatter_(0, {places}[:, {', '.join(['None'] * len(lead))}].expand_as({value}), {value})",
            f"{target}.copy_({x})", f"torch.ops.aten.index_add_({target}, 0, {places}, {value})",
        ]), target)  # fmt: skip
    if w.chance(3):
        return target
    total = w.commuting(target, w.pick([f"{target} + {x}", f"{target} * {w.gate(target)}"]))
    return total and add_layer_norm(w, total, 1)


@instruction("block", 2)
def mixture_of_experts(w: Writer) -> str | None:
    """Experts of a norm's output, weighted by a gate per token, added to the stream and normed again."""
    x = w.some(lambda t: t.dim() >= 2 and t.shape[-1] == w.width, stream=True)
    h = x and add_layer_norm(w, x, 1)
    if x is None or h is None or w.shape(h) != w.shape(x):
        return None
    *lead, width = w.shape(x)
    tokens = math.prod(lead)
    gates = w.let(f"torch.softmax({w.module(f'nn.Linear({width}, 2)')}({h}), -1)")
    experts = [w.let(f"{w.module(f'nn.Linear({width}, {width})')}(F.gelu({h}))", stream=True) for _ in range(2)]
    if gates is None or None in experts:
        return None
    first, second = experts
    flat = f".reshape({tokens}, {width})"

    def combined_by_index() -> str | None:
        out = w.let(w.pick([f"torch.zeros_like({x}{flat})", f"{x}.new_zeros({tokens}, {width})"]), stream=True)
        for number, expert in enumerate(experts):
            count = w.pick(range(1, tokens + 1))
            places = _places(w, tokens, count)
            routed = f"{expert}{flat}[{places}] * {gates}.reshape({tokens}, 2)[{places}, {number}, None]"
            if out is not None:
                w.do(w.pick([f"{out}.index_add_(0, {places}, {routed})", f"{out}[{places}] += {routed}"]), out)
        return out and w.let(f"{out}.view({w.sizes((*lead, width))})", stream=True)

    combined = w.pick([
        combined_by_index,
        lambda: w.let(f"(torch.stack(({first}, {second}), -2) * {gates}[..., None]).sum(-2)", stream=True),
        lambda: w.let(f"{first} * {gates}[..., :1] + {second} * {gates}[..., 1:]", stream=True),
        lambda: w.let(f"torch.einsum('...e,...ed->...d', {gates}, torch.stack(({first}, {second}), -2))", stream=True),
        lambda: w.let(f"({gates}.unsqueeze(-2) @ torch.stack(({first}, {second}), -2)).squeeze(-2)", stream=True),
        lambda: w.let(f"torch.where(({gates}[..., 0] > 0.5).unsqueeze(-1), {first}, {second})", stream=True),
    ])()  # fmt: skip
    total = combined and w.let(f"{x} + {combined}", stream=True)
    return total and add_layer_norm(w, total, 1)


# --- other norms ----------------------------------------------------------------------------------------------------------


@instruction("source", 2)
def batch_norm(w: Writer) -> str | None:
    """A batch norm in evaluation mode behind a linear layer or a convolution, which is perhaps read as it is, too."""
    h = w.some(lambda t: t.dim() >= 2 and t.shape[-1] > 1, stream=False)
    if h is None:
        return None
    *lead, k = w.shape(h)
    width = w.width
    if len(lead) == 2 and lead[1] > 2 and w.chance(2):
        kernel, bias = w.weight((width, lead[1], 3)), w.pick([w.parameter((width,)), "None"])
        y = w.let(f"F.conv1d({h}, {kernel}, {bias}, padding=1)", stream=True)
    else:
        y = w.let(f"F.linear({h}.reshape(-1, {k}), {w.weight((width, k))}, {w.parameter((width,))})", stream=True)
    if y is None:
        return None
    statistics = f"{w.parameter((width,))}, {w.parameter((width,), 'scales')}"
    affine = w.pick([f"{w.parameter((width,))}, {w.parameter((width,))}", "None, None"])
    z = w.let(
        w.pick([
            lambda: f"{w.module(f'nn.BatchNorm1d({width})')}({y})",
            lambda: f"{w.module(f'nn.BatchNorm1d({width}, affine=False)')}({y})",
            lambda: f"F.batch_norm({y}, {statistics}, {affine}, False, 0.1, 0.1)",
            lambda: f"F.batch_norm({y}, {statistics}, eps=0.1)",
            lambda: f"{w.module(f'nn.InstanceNorm1d({width}, track_running_stats=True)')}({y})",
        ])(),
        stream=True,
    )  # fmt: skip
    if z is None:
        return None
    if w.chance(3):
        add_layer_norm(w, y, 1)
    if w.chance(4):
        w.let(f"{z} * 0.5")
    if len(w.shape(z)) == 3 and not w.chance(4):
        z = w.let(f"{z}.transpose(1, 2)", stream=True)
    return z and (add_layer_norm(w, z, 1) if w.chance(2) else z)


@instruction("norm", 2)
def group_norm(w: Writer) -> str | None:
    """A group norm of ``[N, C]``, ``[N, C, 1]`` or ``[N, C, L]``: a LayerNorm where a group is all there is."""
    x = w.some(lambda t: t.dim() >= 2 and t.shape[-1] > 1, stream=True)
    if x is None:
        return None
    *lead, channels = w.shape(x)
    y = w.commuting(x, w.pick([
        f"{x}.reshape(-1, {channels})", f"{x}.reshape(-1, {channels}, 1)", f"{x}.flatten(0, -2).unsqueeze(-1)",
        f"{x}.transpose(-1, -2)" if len(lead) == 2 else f"{x}.reshape(-1, {channels})",
        f"{x}.reshape(-1, {channels}, 1, 1)",
    ]))  # fmt: skip
    if y is None:
        return None
    groups = w.pick([g for g in (1, 2, 3, 4) if channels % g == 0])
    shape = (channels,)
    rows = w.tensor(y).detach().flatten(1).unflatten(1, (groups, -1))
    if rows.shape[-1] > 1 and float(rows.var(-1, unbiased=False).min()) < SMALLEST_VARIANCE:
        return None
    z = w.let(w.pick([
        lambda: f"F.group_norm({y}, {groups})",
        lambda: f"F.group_norm({y}, {groups}, {w.parameter(shape)}, {w.parameter(shape)}, 0.1)",
        lambda: f"F.group_norm({y}, num_groups={groups}, weight={w.parameter(shape)})",
        lambda: f"{w.module(f'nn.GroupNorm({groups}, {channels})')}({y})",
        lambda: f"torch.group_norm({y}, {groups}, bias={w.weight(shape)}, eps=0.1)",
    ])())  # fmt: skip
    if z is not None:
        w.norms.add(z)
    return z


@instruction("norm", 2)
def norm_by_statistics(w: Writer) -> str | None:
    """A LayerNorm out of ``var_mean``, ``std_mean``, sums, or squares, some of which are something else."""
    x = w.some(lambda t: t.dim() >= 1 and t.shape[-1] > 1, stream=True)
    if x is None or float(w.tensor(x).detach().var(-1, unbiased=False).min()) < SMALLEST_VARIANCE:
        return None
    width = w.shape(x)[-1]
    kind = w.pick(["var_mean", "std_mean", "sums", "squares"])
    if kind in ("var_mean", "std_mean"):
        correction = w.pick(["correction=0", "unbiased=False", "correction=1"])
        axis = w.pick(["-1", "-1", f"({len(w.shape(x)) - 1},)", "dim=-1"])
        found = w.let_all(f"torch.{kind}({x}, {axis}, {correction}, keepdim=True)", [False, False])
        spread, mean = found or (None, None)
    elif kind == "sums":
        mean = w.let(f"{x}.sum(-1, keepdim=True) / {width}")
        spread = mean and w.let(f"({x} - {mean}).square().sum(-1, True) / {w.pick([width, width, width - 1])}")
    else:
        mean = w.let(f"{x}.mean(-1, keepdim=True)")
        spread = mean and w.let(f"({x} * {x}).mean(-1, keepdim=True) - {mean} * {mean}")
    if mean is None or spread is None:
        return None
    if w.chance(6):
        w.do(w.pick([f"{mean} *= 0.5", f"{spread}.add_(0.5)"]), mean)
    deviation = spread if kind == "std_mean" else f"torch.sqrt({spread} + 1e-5)"
    y = w.let(w.pick([f"({x} - {mean}) / {deviation}", f"({x} - {mean}) * (1 / {deviation})",
                      f"({x} - {mean}).div({deviation})", f"torch.div({x} - {mean}, {deviation})"]))  # fmt: skip
    if y is not None and w.chance(2):
        y = w.let(f"{y} * {w.parameter((width,))} + {w.parameter((width,))}")
    if y is not None:
        w.norms.add(y)
    return y


@instruction("source")
def spectral_module(w: Writer) -> str | None:
    """Modules of torch whose weight is computed: spectral norm, pruning."""
    h = w.some(lambda t: t.dim() >= 2 and t.shape[-1] > 1, stream=False)
    if h is None:
        return None
    linear = f"nn.Linear({w.shape(h)[-1]}, {w.width})"
    module = w.pick([
        f"nn.utils.parametrizations.spectral_norm({linear})", f"prune.random_unstructured({linear}, 'weight', 3)",
        f"prune.ln_structured({linear}, 'weight', 1, n=2, dim=0)",
    ])  # fmt: skip
    return w.let(f"{w.module(module)}({h})", stream=True)


@instruction("block", 2)
def norm_behind_groups(w: Writer) -> str | None:
    """A norm behind a grouped convolution, plain or transposed: within a group, across groups, over every other channel."""
    width = w.width
    groups = w.pick([g for g in (2, 3, 4) if width % g == 0])
    channels, bias = 2 * groups, w.pick([w.parameter((width,)), "None"])
    kind = w.pick(["conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"])
    space = (2, 2) if kind.endswith("2d") else (3,)
    kernel = (width, 2) if "transpose" not in kind else (channels, width // groups)
    x = w.input(f"values({{}}, {w.sizes((w.batch, channels, *space))})")
    weight = w.weight((*kernel, *(2 for _ in space)))
    y = w.let(f"F.{kind}({x}, {weight}, {bias}, groups={groups})", stream=True)
    moved = y and w.let(f"{y}.movedim(1, -1)", stream=True)
    if moved is None:
        return None
    per_group = width // groups
    parts = w.pick([
        (groups, per_group), (per_group, groups), (groups // 2 or 1, -1), (2, -1), (width,),
        (groups, 2, -1), (groups // 2 or 1, 2, -1),
    ])  # fmt: skip
    cut = w.let(f"{moved}.unflatten(-1, ({w.sizes(parts)},))", stream=True)
    if cut is not None and w.chance(2):
        cut = w.let(f"{cut}.transpose(-1, -2)", stream=True)
    return cut and add_layer_norm(w, cut, w.pick([1, 1, 2]))


@instruction("source")
def grouped_transposed_convolution(w: Writer) -> str | None:
    """A transposed convolution over pixels, perhaps grouped, its channels moved to the end and normed, perhaps by group."""
    groups = w.pick([1, 2])
    channels, out = 4, w.width
    x = w.input(f"values({{}}, {w.batch}, {channels}, 2, 2)")
    weight, bias = w.weight((channels, out // groups, 2, 2)), w.pick([w.parameter((out,)), "None"])
    y = w.let(f"F.conv_transpose2d({x}, {weight}, {bias}, {w.pick([1, 2])}, groups={groups})", stream=True)
    moved = y and w.let(w.pick([f"{y}.flatten(2).transpose(1, 2)", f"{y}.permute(0, 2, 3, 1)"]), stream=True)
    if moved is None or w.chance(2):
        return moved
    cut = w.let(f"{moved}.unflatten(-1, ({w.pick([groups, 2])}, -1))", stream=True)
    return cut and add_layer_norm(w, cut, 1)
