"""Which releases of torch the test suite was run on; another one gets a line in the log, not a refusal."""

from __future__ import annotations

import functools
import logging

import torch

#: Releases on which the test suite was run.
TESTED = ("2.11", "2.13", "2.15")


@functools.cache
def warn_if_untested() -> None:
    """Log one line, once per process, if this torch is outside the range of the tested releases."""
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    oldest, newest = (tuple(int(part) for part in TESTED[i].split(".")) for i in (0, -1))
    if not oldest <= release <= newest:
        logging.getLogger("lncompile").warning(
            "lncompile was not tested on torch %s (tested: %s)", torch.__version__, ", ".join(TESTED)
        )
