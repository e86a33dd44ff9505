"""Inductor's C++ compiler and cache folder: the private names of torch for what is compiled beside its kernels.

A part of :mod:`.torch_private`, which says what its modules are for.
"""

from __future__ import annotations


def cpp_compiler() -> str:
    """The C++ compiler that Inductor uses on a CPU. Raises an exception where it finds none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    return str(get_cpp_compiler())


def inductor_cache_folder() -> str:
    """Where Inductor keeps what it compiled (``TORCHINDUCTOR_CACHE_DIR``)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return str(cache_dir())
