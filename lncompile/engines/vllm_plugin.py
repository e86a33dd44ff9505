"""The plugin that vLLM calls in each of its processes. It does nothing unless ``LNCOMPILE_VLLM=1`` is set."""

from __future__ import annotations

import logging
import os

#: The environment variable that switches folding on.
SWITCH = "LNCOMPILE_VLLM"


def register() -> None:
    """Let vLLM load models folded, where ``LNCOMPILE_VLLM=1`` is set.

    Raises:
        ValueError: for another value than 0 or 1.

    Example:
        $ LNCOMPILE_VLLM=1 vllm serve facebook/opt-6.7b
    """
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{SWITCH} is '{value}': 1 folds models as vLLM loads them, 0 does not")
    if value == "0":
        return
    try:
        from lncompile.engines import vllm_loader
    except (ImportError, AttributeError) as error:
        # vLLM prints what loggers say whose names start with its own.
        logging.getLogger("vllm.lncompile").warning("lncompile: not folded: this vLLM is not known: %s", error)
        return
    vllm_loader.register()
