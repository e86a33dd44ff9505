"""What is not asked of lnfold on the oldest versions of torch, mostly because stock torch.compile fails there too."""

from __future__ import annotations

import pytest
import torch

#: Versions before the one that CI runs; what is skipped was seen on 2.11.0.
IS_OLD = torch.__version__ < "2.13"


def unless_old(reason: str) -> pytest.MarkDecorator:
    """Skip a test on old versions of torch; ``reason`` says what happens there."""
    return pytest.mark.skipif(IS_OLD, reason=f"torch {torch.__version__}: {reason}")
