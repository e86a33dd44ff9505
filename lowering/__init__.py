"""What a folded LayerNorm becomes, how the graph is handed to Inductor, and what Inductor made of it."""

from lncompile.lowering.rms_norm import rms_norm

__all__ = ["rms_norm"]
