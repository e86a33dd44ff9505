"""Rows held in registers: which kernels of folded norms are *persistent* where Inductor would loop over the row.

A looped kernel reads its row twice, once for the statistic and once to normalise it; a persistent one holds the row in
registers in between. Inductor stops at 1024 elements, with every kind of reduction in mind. An RMSNorm keeps one value
an element and one sum, so its row fits several times as many: ``benchmarks/norm_kernels.py`` compiles the kernels for
sm_90 and counts registers and spills, and ``benchmarks/results/norm_kernels.json`` holds what it found.

Only kernels all of whose reductions are the statistics of folded norms are chosen for; what stock torch.compile makes
of everything else stays, and so does a graph in which nothing folded.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from lncompile.lowering.torch_private_choices import persistent_where

#: What the nodes of a folded norm's statistic carry in ``node.meta["custom"]``.
FOLDED_STATISTIC: Mapping[str, bool] = {"lnfold_statistic": True}

#: Elements in the widest row that is held in registers.
WIDEST_ROW = 8192
#: Registers that the values of one row may take: seven eighths of those a multiprocessor has, the rest are for indices.
#: At 8192 elements that is the row itself and six operands: stream, residual, γ, β and two more.
ROW_REGISTERS = 57344
# Part of the caches' keys; to be counted up when the choice changes for graphs it was made for before.
_VERSION = 1


@dataclass(frozen=True)
class ReductionKernel:
    """What Inductor is about to generate a reduction kernel from.

    Attributes:
        width: elements in a row, the part that is reduced; None where that is a dynamic size.
        is_along_rows: whether neighbouring threads reduce neighbouring elements, in memory order.
        operands: tensors it reads from outside.
        annotations: for each of its reductions ``node.meta["custom"]`` of the operation it is.
        device: where it runs: "cuda" or "cpu", but "hip" on AMD.
        is_backward: whether the graph computes gradients of another.
    """

    width: int | None
    is_along_rows: bool
    operands: int
    annotations: tuple[Mapping[str, Any], ...]
    device: str
    is_backward: bool


def holds_its_row(kernel: ReductionKernel) -> bool:
    """Whether a kernel that Inductor would let loop over its row is to hold it in registers.

    Args:
        kernel: the kernel.

    Returns:
        True where all it reduces are statistics of folded norms over contiguous rows of a static width up to
        `WIDEST_ROW`, in the forward graph, on an NVIDIA device, and `ROW_REGISTERS` hold the row and one value an
        element of every operand. That is an upper limit: operands of 16 bits take half of it.

    Example:
        >>> holds_its_row(ReductionKernel(4096, True, 4, (FOLDED_STATISTIC,), "cuda", False))
        True
    """
    return (
        kernel.device == "cuda"
        and not kernel.is_backward
        and kernel.is_along_rows
        and kernel.width is not None
        and kernel.width <= WIDEST_ROW
        and _block(kernel.width) * (kernel.operands + 1) <= ROW_REGISTERS
        and bool(kernel.annotations)
        and all(FOLDED_STATISTIC.items() <= annotation.items() for annotation in kernel.annotations)
    )


def _block(width: int) -> int:
    """Elements in the block that holds a row: Triton's blocks are powers of two."""
    return 1 << (width - 1).bit_length()


def _decide(**facts: Any) -> bool:
    return holds_its_row(ReductionKernel(**facts))


@contextlib.contextmanager
def persistent_norms(graph_module: fx.GraphModule, config_patches: Mapping[str, Any]) -> Iterator[None]:
    """Context in which Inductor compiles a graph with `holds_its_row` deciding for its folded norms.

    The caches tell such a compilation from stock's, and graphs of the same text with other norms folded from each
    other. It changes nothing, the caches' keys included, without a folded norm, and where the user has Inductor choose
    in another way (``inductor_choices_class``).

    Args:
        graph_module: what is given to Inductor; the norms in it were lowered by `lower_to_rms_norm`.
        config_patches: what is given to Inductor with it.

    Example:
        >>> with persistent_norms(graph_module, config):
        ...     compiled = torch_private_inductor.inductor_compile(graph_module, inputs, config)
    """
    statistics = [str(index) for index, node in enumerate(graph_module.graph.nodes) if is_folded_statistic(node)]
    if not statistics or config_patches.get("inductor_choices_class") is not None:
        yield
        return
    digest = hashlib.sha256(",".join(statistics).encode()).hexdigest()[:16]
    with persistent_where(_decide, f"lnfold-persistent-{_VERSION}-{WIDEST_ROW}-{ROW_REGISTERS}-{digest}"):
        yield


def is_folded_statistic(node: fx.Node) -> bool:
    """Whether a node belongs to the statistic of a folded norm."""
    return FOLDED_STATISTIC.items() <= (node.meta.get("custom") or {}).items()


def leave_rows_to_inductor(graph: fx.Graph) -> None:
    """Take the marks off the statistics of folded norms, so that Inductor itself chooses their kernels.

    Args:
        graph: changed in place.
    """
    for node in graph.nodes:
        if is_folded_statistic(node):
            node.meta["custom"] = {
                key: value for key, value in node.meta["custom"].items() if key not in FOLDED_STATISTIC
            }


__all__ = [
    "FOLDED_STATISTIC",
    "ROW_REGISTERS",
    "WIDEST_ROW",
    "ReductionKernel",
    "holds_its_row",
    "is_folded_statistic",
    "leave_rows_to_inductor",
    "persistent_norms",
]
