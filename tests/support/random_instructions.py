"""What random modules are made of: sources, operations that commute with the centering, traps. See also random_norms.

To import a module of instructions is to register them. These come before those of random_norms and random_layers.
"""

import random_commuting
import random_traps
from random_sources import convolution, linear

__all__ = ["convolution", "linear", "random_commuting", "random_traps"]
