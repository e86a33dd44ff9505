"""What Inductor made of a compiled function: its kernels, and facts about them that a test can assert.

`generated_code` reads the code at the point where Inductor hands over what it generated, so it works for every
backend that ends in Inductor. `inspect_kernel` is a pure function of a kernel's text.
"""

from __future__ import annotations

import ast
import enum
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch

from lncompile.lowering.inspect.torch_private_codegen import recorded_wrappers

Language = Literal["cpp", "triton"]


@dataclass(frozen=True)
class Kernel:
    """One generated kernel and what was counted in its text.

    Attributes:
        name: the name it is called by in the wrapper.
        language: "cpp" or "triton".
        source: its whole text. For Triton that is a module: imports, launch metadata and the function.
        reductions: reductions over an axis, a Welford pass counted as one.
        welford: whether a reduction is Welford's one-pass mean and variance.
        mean_subtractions: subtractions of a row's sum (or of anything computed from sums and constants alone, such
            as a mean) from an element. A LayerNorm has at least one, an RMSNorm none; neither has softmax, which
            subtracts a maximum. Followed within one kernel only.
        loads: statements that read memory, those of row statistics included.
        stores: statements that write memory.
        launches: how often the wrapper launches it.
    """

    name: str
    language: Language
    source: str
    reductions: int
    welford: bool
    mean_subtractions: int
    loads: int
    stores: int
    launches: int = 1


@dataclass(frozen=True)
class GeneratedCode:
    """All that Inductor generated for one compiled function.

    Attributes:
        source: the wrapper modules, one for each graph, in the order Inductor wrote them.
        kernels: the kernels of all wrappers, in order of definition.
        extern_calls: calls of kernels that were not generated (matrix products, attention).
    """

    source: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    extern_calls: int

    @classmethod
    def from_wrappers(cls, wrappers: Sequence[str]) -> Self:
        """Read wrapper modules.

        Args:
            wrappers: Python source of the modules Inductor wrote.

        Raises:
            ValueError: a wrapper is not Python (``cpp_wrapper=True``).
        """
        kernels: list[Kernel] = []
        extern_calls = 0
        for wrapper in wrappers:
            found, calls = _read_wrapper(wrapper)
            kernels += found
            extern_calls += calls
        return cls(tuple(wrappers), tuple(kernels), extern_calls)

    @property
    def launches(self) -> int:
        """Launches of generated kernels; ``launches + extern_calls`` is what the device or the caller waits for."""
        return sum(kernel.launches for kernel in self.kernels)


def generated_code(function: Callable[..., Any], *args: Any, **kwargs: Any) -> GeneratedCode:
    """Compile and run a `torch.compile`d callable, and return the code that Inductor generated for it.

    It resets the compiler (`torch.compiler.reset`), since a callable that was compiled before would run without
    generating anything: every compiled function of the process compiles again at its next call. Disk caches of graphs
    are passed by for the same reason; compiled C++ is not, so a second look at the same kernel is quick.

    Args:
        function: what `torch.compile` returned, a function or a module; any backend that ends in Inductor. Whatever
            it calls that is compiled on its own counts too.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        Wrappers and kernels in the order they were written. Where gradients are recorded, those of the backward graph
        only if it was compiled during the call.

    Raises:
        RuntimeError: Inductor generated nothing: the callable is not compiled, its backend is another one, or its
            graphs hold no operation.

    Example:
        >>> double = torch.compile(lambda x: x * 2)
        >>> code = generated_code(double, torch.randn(8))
        >>> code.kernels[0].language, code.kernels[0].reductions
        ('cpp', 0)
    """
    with recorded_wrappers() as wrappers:
        torch.compiler.reset()
        function(*args, **kwargs)
    if not wrappers:
        raise RuntimeError(
            "Inductor generated no code in this call: is the callable the result of torch.compile, with a backend "
            "that ends in Inductor?"
        )
    return GeneratedCode.from_wrappers(wrappers)


def inspect_kernel(name: str, language: Language, source: str, *, launches: int = 1) -> Kernel:
    """Count the facts of one kernel in its text.

    Args:
        name: the kernel's name.
        language: "cpp" or "triton".
        source: the kernel's text as Inductor wrote it. Launch metadata of a Triton kernel is not counted: there a
            LayerNorm of two sums claims four reductions.
        launches: how often it is launched, passed through.

    Raises:
        ValueError: ``language`` is neither of the two.

    Example:
        >>> inspect_kernel("k", "triton", "tmp1 = tl.sum(tmp0, 1)").reductions
        1
    """
    if language not in _PATTERNS:
        raise ValueError(f"kernel {name!r}: language must be 'cpp' or 'triton', not {language!r}")
    patterns = _PATTERNS[language]
    body = _body(language, source)
    return Kernel(
        name=name,
        language=language,
        source=source,
        reductions=len(patterns.reduction.findall(body)),
        welford=patterns.welford.search(body) is not None,
        mean_subtractions=_count_mean_subtractions(body),
        loads=len(patterns.load.findall(body)),
        stores=len(patterns.store.findall(body)),
        launches=launches,
    )


# --- Kernels in a wrapper --------------------------------------------------------------------------------------------

# The methods of Inductor's AsyncCompile that define a kernel. The text is their second argument.
_LANGUAGE_OF_DEFINITION: dict[str, Language] = {"triton": "triton", "cpp_pybinding": "cpp"}
# How a call of a kernel that Inductor did not generate begins.
_EXTERN_CALL = re.compile(r"(extern_kernels|torch\.ops\.(?!inductor\.))")


def _read_wrapper(wrapper: str) -> tuple[list[Kernel], int]:
    """Return the kernels a wrapper defines, and how often it calls others."""
    try:
        tree = ast.parse(wrapper)
    except SyntaxError as error:
        raise ValueError(
            "the generated wrapper is not Python (cpp_wrapper=True?), its kernels cannot be read"
        ) from error
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    callees = [ast.unparse(call.func) for call in calls]
    kernels = []
    for name, language, source in _definitions(tree):
        # Triton kernels are launched by `name.run(...)`, C++ ones are plain functions.
        launches = callees.count(name) + callees.count(f"{name}.run")
        kernels.append(inspect_kernel(name, language, source, launches=launches))
    return kernels, sum(_EXTERN_CALL.match(callee) is not None for callee in callees)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Language, str]]:
    """Yield name, language and text of each ``name = async_compile.<language>(..., text, ...)``."""
    for statement in tree.body:
        match statement:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(
                    func=ast.Attribute(value=ast.Name(id="async_compile"), attr=attribute),
                    args=[_, ast.Constant(value=str(source)), *_],
                ),
            ) if attribute in _LANGUAGE_OF_DEFINITION:
                yield name, _LANGUAGE_OF_DEFINITION[attribute], source
            case _:
                continue


# --- Facts of a kernel -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Patterns:
    """What each fact looks like in one language."""

    reduction: re.Pattern[str]
    welford: re.Pattern[str]
    load: re.Pattern[str]
    store: re.Pattern[str]


_PATTERNS: dict[str, _Patterns] = {
    "triton": _Patterns(
        # `welford_reduce` is the accumulation inside a loop; `welford` combines the lanes, once a reduction.
        reduction=re.compile(r"\b(?:tl\.(?:sum|max|min|reduce)|triton_helpers\.(?:max2|min2|any|prod|welford))\("),
        welford=re.compile(r"\btriton_helpers\.welford"),
        load=re.compile(r"\btl\.load\("),
        store=re.compile(r"\btl\.(?:store|atomic_add)\("),
    ),
    "cpp": _Patterns(
        # Each reduction declares one scalar accumulator; its vector, array and thread-local companions have suffixes.
        reduction=re.compile(r"^\s*[A-Za-z_][\w:]*(?:<[^=]*>)?\s+tmp_acc\d+ = ", re.MULTILINE),
        welford=re.compile(r"\bWelford<|\bwelford_combine\("),
        load=re.compile(r"\bloadu\(|= (?:static_cast<[\w:]+>\()?\w*ptr\d+\["),
        store=re.compile(r"\.store\(|^\s*\w*ptr\d+\[.*\] = ", re.MULTILINE),
    ),
}


def _body(language: str, source: str) -> str:
    """Drop what precedes the kernel function, if anything does."""
    if language == "triton" and (start := re.search(r"^def ", source, re.MULTILINE)):
        return source[start.start() :]
    return source


class _Origin(enum.Enum):
    """Where a value in a kernel comes from."""

    CONSTANT = "constants alone"
    STATISTIC = "sums over a row, and constants"
    ELEMENT = "elements of a tensor"


_VALUE = r"_?tmp\w*"
_POINTER = r"(?:\w*ptr\d+|local_\w+)"
_OPERAND = re.compile(rf"\b(?:{_VALUE}|{_POINTER})")
# `tmp3 = ...` and `tmp3, tmp4, tmp5 = ...` in Python, `auto tmp3 = ...;` and `float tmp_acc0 = 0;` in C++.
_ASSIGNMENT = re.compile(rf"^\s*(?:[A-Za-z_][\w:]*(?:<[^=]*>)?\s+)?({_VALUE}(?:, {_VALUE})*) = (.*)$")
_ALIAS = re.compile(rf"^\s*auto ({_POINTER}) = ({_POINTER});$")
_STORES = (
    re.compile(rf"^\s*tl\.store\(({_POINTER}) \+ .*?, ({_VALUE}), "),
    re.compile(rf"^\s*()({_VALUE})\.store\(({_POINTER})"),
    re.compile(rf"^\s*({_POINTER})\[.*\] = (.*)$"),
)
_SUM = re.compile(r"\btl\.sum\(|\btriton_helpers\.welford\(")
_ACCUMULATOR = re.compile(r"tmp_acc\d+$")
_SUBTRACTION = re.compile(rf"\b({_VALUE}) - ({_VALUE})\b")


def _count_mean_subtractions(body: str) -> int:
    """Count ``element - statistic`` in a kernel, reading its assignments in order.

    A statistic is a sum over a row and whatever is computed from statistics and constants alone, also by way of memory
    (C++ kernels store a row's mean and load it in the next loop). Generated code assigns each name once within a
    loop nest, so one pass in textual order is enough.
    """
    origins: dict[str, _Origin] = {}
    aliases: dict[str, str] = {}

    def origin(expression: str) -> _Origin:
        if _SUM.search(expression):
            return _Origin.STATISTIC
        names = (aliases.get(name, name) for name in _OPERAND.findall(expression))
        found = {origins.get(name, _Origin.ELEMENT) for name in names}
        if _Origin.ELEMENT in found:
            return _Origin.ELEMENT
        return _Origin.STATISTIC if _Origin.STATISTIC in found else _Origin.CONSTANT

    count = 0
    for line in body.splitlines():
        for left, right in _SUBTRACTION.findall(line):
            count += origin(left) is _Origin.ELEMENT and origin(right) is _Origin.STATISTIC
        if alias := _ALIAS.match(line):
            aliases[alias[1]] = aliases.get(alias[2], alias[2])
        elif assignment := _ASSIGNMENT.match(line):
            targets, expression = assignment[1].split(", "), assignment[2]
            for target in targets:
                if not _ACCUMULATOR.match(target):
                    origins[target] = origin(expression)
                elif target not in expression:
                    # Its declaration. A maximum starts from a limit of its type; sums and Welford's triple from zero.
                    is_sum = "numeric_limits" not in expression
                    origins[target] = _Origin.STATISTIC if is_sum else _Origin.ELEMENT
        for pattern in _STORES:
            if store := pattern.match(line):
                pointer, value = (store[3], store[2]) if pattern.groups == 3 else (store[1], store[2])
                origins[aliases.get(pointer, pointer)] = origin(value)
    return count
