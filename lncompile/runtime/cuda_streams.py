"""Values that one stream of a GPU computed and others read: the others wait for them, and they outlive the reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class CudaStreamOrder:
    """Lets every stream that comes to read some tensors wait, once, for the stream that computed them.

    Args:
        tensors: on GPUs, each computed by the current stream of its device at this moment.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._computed: dict[torch.device, tuple[Any, Any]] = {}
        for device in {tensor.device for tensor in tensors}:
            stream = torch.cuda.current_stream(device)
            self._computed[device] = stream, stream.record_event()
        self._joined: set[Any] = {stream for stream, _ in self._computed.values()}

    def join(self) -> None:
        """Let the current streams read the tensors. Nothing is done for a stream that has read them before.

        In a stream that is being captured there is nothing to wait for: capturing starts with a synchronisation.
        """
        for device, (_, computed) in self._computed.items():
            stream = torch.cuda.current_stream(device)
            if stream in self._joined or torch.cuda.is_current_stream_capturing():
                continue
            stream.wait_event(computed)
            for tensor in self._tensors:
                if tensor.device == device:
                    # Its memory is not given to others before this stream is through with it.
                    tensor.record_stream(stream)
            self._joined.add(stream)
