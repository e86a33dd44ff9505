"""Optimizer steps that torch does not count as changes.

A weight's version tells whether it has changed, and most optimizers raise it. Fused ones do not (``AdamW(fused=True)``,
torch 2.11 to 2.15 on the CPU), nor do the ``foreach`` ones on sharded weights: the step writes below the place where
versions are raised. Centered copies would stay those of before the step. So a hook behind every optimizer's step
raises the versions of the parameters it has updated, as the step should have done.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


@functools.cache
def watch_optimizers() -> None:
    """Install the hook, once in a process and for all optimizers; a step costs microseconds more for it."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    updated = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch.autograd.graph.increment_version(updated)


__all__ = ["watch_optimizers"]
