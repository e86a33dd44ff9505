"""What random modules are made of: other norms, in front of LayerNorms and around them."""

from __future__ import annotations

from programs import SMALLEST_VARIANCE
from random_norms import add_layer_norm, handwritten_norm, layer_norm, norm_of_heads
from random_programs import INSTRUCTIONS, Writer, instruction


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
