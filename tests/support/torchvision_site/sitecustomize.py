"""Run by Python as it starts, where this folder is in PYTHONPATH: torchvision can then be imported beside CPU torch.

There is no build of it for that torch, so that its compiled operators are not there, and it fails where it says more of
them. vLLM imports it in processes of its own as well.
"""

from __future__ import annotations

import sys
from typing import Any


class _BeforeTorchvision:
    """Defines the operators when torchvision is about to be imported, and leaves finding it to others."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
