"""Run the Triton code Inductor generated, on CPU tensors, under Triton's interpreter.

Results can be compared with a reference without a GPU: memory, masks, block loops, reductions and rounding are those of
the kernel; the order of additions within a block is NumPy's. One process cannot both interpret and compile Triton
kernels, so the code runs in a process of its own.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from lncompile.lowering.inspect import torch_private_codegen
from lncompile.lowering.inspect.triton_without_gpu import pretend_gpu, require_triton


def run_in_interpreter(
    jobs: Sequence[tuple[str, Sequence[Any]]], *, timeout: float = 600.0
) -> list[tuple[Tensor | None, ...]]:
    """Run generated wrappers on CPU tensors, all in one new process (starting it takes seconds, a job much less).

    Args:
        jobs: wrapper source and its arguments, for instance one of ``code.source`` with the same of ``code.inputs``
            of a `RetargetedCode`. Few rows are best: the interpreter takes milliseconds for each block of each kernel.
        timeout: seconds until the process is ended.

    Returns:
        For each job what the wrapper returned, in the graph's order. Arguments are not changed.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: a job failed; the message holds the other process's traceback.
        subprocess.TimeoutExpired: it took too long.

    Example:
        >>> code = triton_for_sm90(torch.nn.functional.gelu, torch.randn(4, 768))
        >>> [(output,)] = run_in_interpreter([(code.source[0], code.inputs[0])])
        >>> output.shape
        torch.Size([4, 768])
    """
    require_triton()
    with tempfile.TemporaryDirectory(prefix="lncompile_") as folder:
        request, reply = Path(folder) / "request.pt", Path(folder) / "reply.pt"
        torch.save([(source, [_plain(value) for value in arguments]) for source, arguments in jobs], request)
        # By import, not `-m`: the worker has to be the module that `lncompile.lowering` may already have imported.
        statement = f"import sys; from {__name__} import _serve; _serve(*sys.argv[1:])"
        command = [sys.executable, "-c", statement, str(request), str(reply)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            raise RuntimeError(f"interpreting the generated code failed:\n{done.stderr.strip()}")
        return [tuple(outputs) for outputs in torch.load(reply)]


def _plain(value: Any) -> Any:
    # A parameter or a slice of something large would drag its history or its whole storage into the file.
    return value.detach().clone() if isinstance(value, Tensor) else value


# --- In the other process --------------------------------------------------------------------------------------------


def _serve(request: str, reply: str) -> None:
    """Run the jobs in a file, and write what they return to another."""
    outputs = []
    with _faithful_interpreter(), pretend_gpu(), torch_private_codegen.cuda_device_switching_ignored():
        for source, arguments in torch.load(request):
            for on_cuda, on_cpu in torch_private_codegen.CUDA_TO_CPU_TEXT:
                source = source.replace(on_cuda, on_cpu)
            wrapper: dict[str, Any] = {"__name__": "generated_wrapper"}
            exec(compile(source, "<generated wrapper>", "exec"), wrapper)
            outputs.append(list(wrapper["call"](list(arguments))))
    torch.save(outputs, reply)


@contextmanager
def _faithful_interpreter() -> Iterator[None]:
    """Fill the gaps between Triton's interpreter and a GPU: rounding to bfloat16, libdevice, loops over blocks."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_its_index(tensor: Any, scope: Any) -> None:
        # Triton 3.6 makes a loop bound of an array of one element by int(), which NumPy 2.4 refuses.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with (
        mock.patch.object(builder, "cast_impl", _rounding(builder.cast_impl)),
        mock.patch.object(builder, "create_fp_to_fp", _rounding(builder.create_fp_to_fp)),
        mock.patch.object(interpreter, "_patch_lang_tensor", patch_tensor_and_its_index),
        torch_private_codegen.replaced_libdevice(_Libdevice()),
    ):
        yield


def _rounding(cast: Callable[..., Any]) -> Callable[..., Any]:
    """Make a conversion of the interpreter's round float32 to the nearest bfloat16, ties to even; it truncates."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def convert(self: Any, source: Any, target_type: Any, *rest: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target_type.scalar != tl.bfloat16:
            return cast(self, source, target_type, *rest)
        # The interpreter keeps a bfloat16 as its 16 bits; torch has the rounding.
        values = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32))
        bits = values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return TensorHandle(bits, tl.bfloat16)

    return convert


def _one_over_sqrt(x: Any) -> Any:
    return np.float32(1) / np.sqrt(x)


class _Libdevice:
    """NumPy in place of CUDA's libdevice, whose functions the interpreter leaves empty (they return None)."""

    functions: dict[str, Callable[..., Any]] = {  # noqa: RUF012  (a table, never written)
        **{name: getattr(np, name) for name in ("sqrt", "exp", "exp2", "expm1", "log", "log2", "log1p", "tanh")},
        **{name: getattr(np, name) for name in ("sin", "cos", "floor", "ceil", "trunc", "isnan", "isinf")},
        "abs": np.abs,
        "pow": np.power,
        "nearbyint": np.rint,
        "rsqrt": _one_over_sqrt,
        "erf": np.vectorize(math.erf, otypes=[np.float32]),
    }

    def __getattr__(self, name: str) -> Callable[..., Any]:
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        if name not in self.functions:
            raise NotImplementedError(f"libdevice.{name} is not known to the interpreter; add it to {type(self)}")
        function = self.functions[name]

        def apply(*operands: Any, **context: Any) -> Any:  # context: Triton hands over its compiler state
            tensors = [value if isinstance(value, tl.core.tensor) else tl.to_tensor(value) for value in operands]
            inputs = [tensor.handle.data for tensor in tensors]
            result = np.asarray(function(*inputs))
            if result.dtype == np.bool_:
                element = tl.int1
            else:
                element = tensors[0].type.scalar
                result = result.astype(inputs[0].dtype)
            kind = tl.block_type(element, tensors[0].shape) if tensors[0].type.is_block() else element
            return tl.tensor(TensorHandle(result, element), kind)

        return apply
