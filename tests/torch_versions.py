"""What stock torch.compile cannot do on the oldest versions of torch, and what is therefore not asked of lnfold."""

from __future__ import annotations

import pytest
import torch

#: Versions before the one that CI runs; seen on 2.11.0, with ``backend="inductor"`` or ``"eager"`` as well.
IS_OLD = torch.__version__ < "2.13"


def unless_old(reason: str) -> pytest.MarkDecorator:
    """Skip a test on old versions of torch; ``reason`` says what stock torch.compile does there."""
    return pytest.mark.skipif(IS_OLD, reason=f"torch {torch.__version__}: {reason}")
