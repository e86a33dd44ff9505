"""Out of memory: how much is wanted, and which options of this command, for this model, need less."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from lncompile.comparisons.machine import size_in_words
from lncompile.comparisons.processes import ProcessError
from lncompile.models.loading import load_model
from lncompile.models.names import Kind, ModelError, kind_of
from lncompile.models.pretrained import has_weights

if TYPE_CHECKING:
    from lncompile.cli.parameters import Asked
    from lncompile.cli.running import Run
    from lncompile.models.loading import LoadedModel

_NARROW = (torch.bfloat16, torch.float16)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, ProcessError):
        return error.out_of_memory
    # The CPU allocator raises a plain RuntimeError.
    of_the_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return of_the_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


def out_of_memory(error: BaseException, run: Run) -> str:
    """Return a sentence on what needs how much memory, and what needs less.

    Args:
        error: what the allocator said.
        run: the command that ran out of memory.
    """
    asked, loaded = run.asked, run.loaded
    doing = f"{asked.command} ran" if loaded else "the model was loaded"
    wanted = [_request(error), *(_while_running(loaded, asked) if loaded else _while_loading(error, run))]
    remedies = _options_while_running(loaded, run) if loaded else _options_while_loading(run)
    if asked.command == "explain" and run.device != "meta":
        remedies.append("--device meta (which needs no memory for weights)")
    advice = f"less is needed with {_either(remedies)}" if remedies else "no option of this command needs less"
    return f"out of memory while {doing}: {'; '.join(filter(None, wanted))}; {advice}"


def _request(error: BaseException) -> str:
    """The allocation that failed."""
    if isinstance(error, ProcessError) or (isinstance(error, MemoryError) and str(error)):
        return str(error)
    found = re.search(r"tried to allocate (\d+) bytes", str(error))
    if found:
        return f"{size_in_words(int(found[1]))} in one piece cannot be had"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _weights(model: nn.Module) -> str:
    parameters = list(model.parameters())
    kinds = dict.fromkeys(str(parameter.dtype).removeprefix("torch.") for parameter in parameters)
    return (
        f"the weights take {size_in_words(sum(parameter.nbytes for parameter in parameters))} in {' and '.join(kinds)}"
    )


def _while_running(loaded: LoadedModel, asked: Asked) -> list[str]:
    wanted = [_weights(loaded.model)]
    if asked.command == "verify":
        count = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.is_floating_point())
        wanted.append(f"verify also holds a float64 copy of them, {size_in_words(8 * count)}")
    return wanted


def _while_loading(error: BaseException, run: Run) -> list[str]:
    """Sizes of a model that could not be loaded, from its shapes."""
    name = run.asked.model
    if kind_of(name) is Kind.FACTORY or (isinstance(error, MemoryError) and str(error)):
        return []  # calling a factory again might do anything; the other error names the sizes itself
    try:
        # Random weights are made in float32 first.
        loaded = load_model(name, dtype=run.dtype if has_weights(name, kind_of(name)) else None, device="meta")
    except ModelError as error:
        return [str(error)]
    return [_weights(loaded.model)]


def _options_while_loading(run: Run) -> list[str]:
    asked, kind = run.asked, kind_of(run.asked.model)
    if kind is Kind.FACTORY:
        # A factory that cannot heed them refuses them, so these are at work.
        given = (("a smaller --batch", asked.batch), ("fewer --tokens", asked.tokens))
        return [f"{words} (now {value})" for words, value in given if value is not None and value > 1]
    narrower = has_weights(asked.model, kind) and run.dtype not in _NARROW
    return ["--dtype bfloat16"] if narrower else []


def _options_while_running(loaded: LoadedModel, run: Run) -> list[str]:
    remedies = []
    for words, name in (("a smaller --batch", "batch"), ("fewer --tokens", "tokens")):
        value = loaded.sizes.get(name, 1)
        if value > 1:
            remedies.append(f"{words} (now {value})")
    wide = any(parameter.dtype in (torch.float32, torch.float64) for parameter in loaded.model.parameters())
    if wide and run.dtype not in _NARROW:
        remedies.append("--dtype bfloat16")
    if any(parameter.is_cuda for parameter in loaded.model.parameters()):
        remedies.append("--device cpu")
    return remedies


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
