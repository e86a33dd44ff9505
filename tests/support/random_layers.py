"""More of what random modules are made of: layers as models have them, each with traps of its own.

Fused projections cut into pieces, streams that meet what cannot be centered, scatters and writes by index, mixtures of
experts, low-rank adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from random_norms import add_layer_norm
from random_programs import Writer, instruction

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
