"""Inductor's choice between a row held in registers and a loop over it: the private names of torch for that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def persistent_where(holds_its_row: Callable[..., bool], name: str) -> Iterator[None]:
    """Context in which more reduction kernels hold their row in registers ("persistent") than Inductor's own choice.

    Where the user has Inductor choose in another way (``inductor_choices_class``) it does nothing.

    Args:
        holds_its_row: asked about each kernel that Inductor would let loop over its row, with what `_facts_of` returns
            as keywords. A function of a module, since Inductor may pickle it into another process.
        name: of this choice for one graph. It goes into the keys of Inductor's and AOTAutograd's caches: the graph's
            text, which is all that they compare, does not hold annotations.
    """
    from torch._inductor import config
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    # A handler of the user's stays in force for the thread, whatever the option is by now.
    if getattr(config, "inductor_choices_class", None) is not None or type(V.choices) is not InductorChoices:
        yield
        return
    compiler_config: Any = torch.compiler.config
    tag = ",".join(filter(None, [compiler_config.cache_key_tag, name]))
    with V.set_choices_handler(_choices(holds_its_row)), compiler_config.patch(cache_key_tag=tag):
        yield


def _choices(holds_its_row: Callable[..., bool]) -> Any:
    from torch._inductor import config
    from torch._inductor.choices import InductorChoices

    class Choices(InductorChoices):
        def __reduce__(self) -> Any:
            return _choices, (holds_its_row,)

        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            if cooperative_reduction or not config.triton.persistent_reductions:
                return False
            return holds_its_row(**_facts_of(features))

    return Choices()


def _facts_of(features: Any) -> dict[str, Any]:
    """Facts of a kernel in Inductor's description of it (`SIMDKernelFeatures`)."""
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    nodes = features.scheduler_nodes()
    made = {name for node in nodes for name in node.get_buffer_names()}
    read = {dependency.name for node in nodes for dependency in node.read_writes.reads}
    # Of a reduction's origins the last is what it is, those before are what was inlined into it.
    operations = [max(node.node.origins, default=None) for node in features.reduction_nodes()]
    return {
        "width": int(features.reduction_numel) if features.reduction_numel.is_Integer else None,
        "is_along_rows": features.get_reduction_hint() == ReductionHint.INNER,
        "operands": len(read - made),
        "annotations": tuple(node.meta.get("custom", {}) if node is not None else {} for node in operations),
        "device": "hip" if torch.version.hip else nodes[0].get_device().type,
        "is_backward": V.graph.is_backward,
    }
