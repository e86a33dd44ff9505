"""Ways to write to the weights of a model: those that torch counts or that move a weight, and those it does not see.

Each is a generator: what it needs is made before its ``yield``, and behind it it writes. What it made lives until it is
closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator

import numpy
import torch
from torch import Tensor, nn

Write = Callable[[nn.Module], Iterator[None]]


def change(values: Tensor) -> Tensor:
    """Add something that neither a scale nor a mean takes out."""
    return values.add_(0.3 * torch.sin(torch.arange(values.numel(), dtype=values.dtype) + 1).view_as(values))


def changed(parameter: Tensor) -> Tensor:
    return change(parameter.detach().clone())


def _changed_state(model: nn.Module) -> dict[str, Tensor]:
    """A state with other parameters, each of its own; buffers may be masks or variances, and stay."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    new = {id(parameter): changed(parameter) for parameter in parameters.values()}
    state = model.state_dict()
    return {name: new[id(parameters[name])] if name in parameters else value.clone() for name, value in state.items()}


def _by_dtype(model: nn.Module) -> list[list[nn.Parameter]]:
    alike: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        alike.setdefault(parameter.dtype, []).append(parameter)
    return list(alike.values())


def _in_the_middle(model: nn.Module) -> nn.Parameter:
    """A parameter of the middle of a model that has more than one dimension, if there is one."""
    parameters = list(model.parameters())
    matrices = [parameter for parameter in parameters if parameter.dim() > 1] or parameters
    return matrices[len(matrices) // 2]


# --- through .data ---


def data_copied(model: nn.Module) -> Iterator[None]:
    yield
    for parameter in model.parameters():
        parameter.data.copy_(changed(parameter))


def data_of_every_second_one(model: nn.Module) -> Iterator[None]:
    yield
    for parameter in list(model.parameters())[1::2]:
        change(parameter.data)


def data_of_vectors(model: nn.Module) -> Iterator[None]:
    yield
    for parameter in model.parameters():
        if parameter.dim() < 2:
            change(parameter.data)


def data_listed(model: nn.Module) -> Iterator[None]:
    yield
    data = [parameter.data for parameter in model.parameters()]
    torch._foreach_add_(data, [change(torch.zeros_like(value)) for value in data])


def tensors_kept(model: nn.Module) -> Iterator[None]:
    kept = [parameter.data for parameter in model.parameters()]
    yield
    for value in kept:
        change(value)


def rows_kept(model: nn.Module) -> Iterator[None]:
    kept = [row for p in model.parameters() for row in (p.data.unbind() if p.dim() else [p.data])]
    yield
    for row in kept:
        change(row)


# --- .data = a part of the same storage, or of another that is kept ---


def rows_of_one_matrix(model: nn.Module) -> Iterator[None]:
    """Candidates for the weights, a row each, as searches without gradients keep them."""
    candidates = []
    for alike in _by_dtype(model):
        values = torch.cat([parameter.detach().flatten() for parameter in alike])
        candidates.append((torch.stack([values, changed(values)]), alike))
    for matrix, alike in candidates:
        nn.utils.vector_to_parameters(matrix[0], alike)
    yield
    for matrix, alike in candidates:
        nn.utils.vector_to_parameters(matrix[1], alike)


def one_row_of_one_matrix(model: nn.Module) -> Iterator[None]:
    """Of a parameter in the middle: the first would be changed by a conversion of all as well."""
    weight = _in_the_middle(model)
    candidates = torch.stack([weight.detach(), changed(weight)])
    weight.data = candidates[0]
    yield
    weight.data = candidates[1]


def other_data_and_the_old_kept(model: nn.Module) -> Iterator[None]:
    weight = _in_the_middle(model)
    kept = weight.data
    yield
    weight.data = changed(weight)
    del kept


def data_exchanged_between_two(model: nn.Module) -> Iterator[None]:
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
    yield
    for first, second, *_ in filter(lambda alike: len(alike) > 1, by_shape.values()):
        first.data, second.data = second.data, first.data


# --- one buffer, and other names of the memory ---


def flat_buffer(model: nn.Module) -> Iterator[None]:
    buffers = []
    for alike in _by_dtype(model):
        flat = torch.cat([parameter.detach().flatten() for parameter in alike])
        for parameter, part in zip(alike, flat.split([parameter.numel() for parameter in alike]), strict=True):
            parameter.data = part.view_as(parameter)
        buffers.append(flat)
    yield
    for flat in buffers:
        change(flat)


def through_numpy(model: nn.Module) -> Iterator[None]:
    arrays = [parameter.detach().numpy() for parameter in model.parameters()]
    yield
    for array in arrays:
        numpy.add(array, 0.3 * numpy.sin(numpy.arange(array.size)).reshape(array.shape), out=array)


def from_numpy(model: nn.Module) -> Iterator[None]:
    arrays = [parameter.detach().numpy().copy() for parameter in model.parameters()]
    for parameter, array in zip(model.parameters(), arrays, strict=True):
        parameter.data = torch.from_numpy(array)
    yield
    for array in arrays:
        array += 0.3 * numpy.sin(numpy.arange(array.size)).reshape(array.shape)


def through_dlpack(model: nn.Module) -> Iterator[None]:
    aliases = [torch.from_dlpack(parameter.detach()) for parameter in model.parameters()]
    yield
    for alias in aliases:
        change(alias)


def through_dlpack_and_numpy(model: nn.Module) -> Iterator[None]:
    aliases = [numpy.from_dlpack(parameter.detach()) for parameter in model.parameters()]
    yield
    for alias in aliases:
        change(torch.from_numpy(alias) if alias.flags.writeable else torch.from_dlpack(alias))


def through_an_address(model: nn.Module) -> Iterator[None]:
    yield
    for parameter in model.parameters():
        values = changed(parameter)
        ctypes.memmove(parameter.data_ptr(), values.data_ptr(), values.nbytes)


def mapped_file(model: nn.Module) -> Iterator[None]:
    """Weights in a file that is mapped into memory, and written by way of the file, as another process would."""
    with tempfile.TemporaryFile() as file:
        values = [parameter.detach().clone() for parameter in model.parameters()]
        file.truncate(8 * sum(value.numel() for value in values))
        memory, start = mmap.mmap(file.fileno(), 0), 0
        for parameter, value in zip(model.parameters(), values, strict=True):
            mapped = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=start)
            parameter.data = mapped.view_as(value).copy_(value)
            start += 8 * value.numel()
        yield
        start = 0
        for value in map(changed, values):
            file.seek(start)
            file.write(value.contiguous().view(torch.uint8).numpy().tobytes())
            start += 8 * value.numel()
        file.flush()


def _change_all(values: list[Tensor]) -> None:
    for value in values:
        change(value)


def another_process(model: nn.Module) -> Iterator[None]:
    model.share_memory()
    yield
    process = multiprocessing.get_context("fork").Process(
        target=_change_all, args=([p.data for p in model.parameters()],)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


# --- loads ---


def loaded_in_inference_mode(model: nn.Module) -> Iterator[None]:
    state = _changed_state(model)
    yield
    with torch.inference_mode():
        model.load_state_dict(state)


def assigned_in_inference_mode(model: nn.Module) -> Iterator[None]:
    with torch.inference_mode():
        state = _changed_state(model)
    yield
    with torch.inference_mode():
        model.load_state_dict(state, assign=True)


def loaded_while_frozen(model: nn.Module) -> Iterator[None]:
    model.requires_grad_(False)
    state = _changed_state(model)
    yield
    model.load_state_dict(state)


def data_while_frozen(model: nn.Module) -> Iterator[None]:
    model.requires_grad_(False)
    yield
    for parameter in model.parameters():
        change(parameter.data)


# --- averages ---


def swa_average(model: nn.Module) -> Iterator[None]:
    average = torch.optim.swa_utils.AveragedModel(model).module
    for parameter in average.parameters():
        change(parameter)
    yield
    for parameter, mean in zip(model.parameters(), average.parameters(), strict=True):
        parameter.data = mean.data


#: Noticed by identity, version or place.
SEEN: list[Write] = [
    rows_of_one_matrix,
    one_row_of_one_matrix,
    other_data_and_the_old_kept,
    data_exchanged_between_two,
    loaded_in_inference_mode,
    assigned_in_inference_mode,
    loaded_while_frozen,
    swa_average,
]
#: Noticed by nothing but the values.
UNSEEN: list[Write] = [
    data_copied,
    data_of_every_second_one,
    data_of_vectors,
    data_listed,
    tensors_kept,
    rows_kept,
    flat_buffer,
    through_numpy,
    from_numpy,
    through_dlpack,
    through_dlpack_and_numpy,
    through_an_address,
    mapped_file,
    another_process,
    data_while_frozen,
]


@contextlib.contextmanager
def prepared(kind: Write, model: nn.Module) -> Iterator[Callable[[], None]]:
    """A function that writes in this way. What it needs is made, and lives until the end."""
    steps = kind(model)
    next(steps)
    yield lambda: next(steps, None)
    steps.close()
