"""What a measurement was made on, it says little without its machine; and what it needs there."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lncompile.comparisons import freed_memory

if TYPE_CHECKING:  # whether there is a compiler can be asked before torch is imported
    import torch


class MachineError(Exception):
    """Something is missing on this machine. The message is one sentence for the person at the keyboard."""


def require_compiler(device: torch.device | str = "cpu") -> None:
    """Check that Inductor finds what it needs beside torch.

    Args:
        device: where the compiled code is to run.

    Raises:
        MachineError: if there is no C++ compiler for code on the CPU.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if str(device).partition(":")[0] == "cpu" and shutil.which(compiler) is None:
        raise MachineError(
            f"torch.compile needs a C++ compiler on the CPU, and there is no '{compiler}' (CXX names another)"
        )


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what to write beside every number: device, threads, load, memory and versions, ready for JSON.

    ``memory`` says what decides where tensors lie, which is the same for all programs of a process: the C library's
    allocator or what is loaded in its place, whether the system backs memory by huge pages, and whether torch asks for
    them (``THP_MEM_ALLOC_ENABLE``), and what becomes of memory that is freed (:mod:`.freed_memory`). torch aligns every
    tensor on the CPU, parameters and copies alike, to 64 bytes.

    Args:
        device: where the measured work runs.

    Example:
        >>> describe_machine("cpu")["threads"]
        2
    """
    import torch

    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "device_type": "cuda" if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "memory": _memory(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def size_in_words(count: float) -> str:
    """Return a number of bytes in words.

    Example:
        >>> size_in_words(2_500_000_000)
        '2.5 GB'
    """
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def available_memory() -> int | None:
    """Return how many bytes of memory a process can still take, its control group's limit included; None if unknown.

    Example:
        >>> available_memory() > 1_000_000_000
        True
    """
    information = Path("/proc/meminfo")
    if not information.exists():
        return None
    fields = dict(line.split(":", 1) for line in information.read_text().splitlines() if ":" in line)
    if "MemAvailable" not in fields:
        return None
    available = 1024 * int(fields["MemAvailable"].split()[0])
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdecimal():
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def _processor() -> str:
    """The processor's name and its vector instructions as torch uses them."""
    import torch

    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _memory() -> dict[str, Any]:
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "allocator": os.environ.get("LD_PRELOAD") or " ".join(platform.libc_ver()).strip() or platform.system(),
        "huge_pages": pages.read_text().strip() if pages.is_file() else None,
        "huge_pages_asked_for": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
        "freed": freed_memory.in_words(),
    }
