"""The process: from the first connection to the last answer after SIGTERM."""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

import uvicorn

from serving.app import create_app
from serving.service import Service

log = logging.getLogger("lncompile.serve")
#: Seconds that requests in progress get after connections are refused.
_FINISHING = 60


class Server(uvicorn.Server):
    """Serves HTTP. After SIGTERM it stays open for a while, and says that it is not ready.

    A load balancer learns that a server goes away by asking it for its health every few seconds. Until then it sends
    requests, which would find the connection refused if the server closed at once. So SIGTERM first turns
    ``/health/ready`` to 503 while everything else goes on, and ``drain_seconds`` later connections are refused and
    requests in progress are finished. SIGINT (Ctrl-C), and a second SIGTERM, skip the wait.

    Args:
        service: to serve.
        host: address to listen at.
        port: to listen at, 0 for any that is free.
    """

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 0) -> None:
        config = uvicorn.Config(
            create_app(service),
            host=host,
            port=port,
            access_log=False,
            timeout_graceful_shutdown=_FINISHING,
            log_config=None,
        )
        super().__init__(config)
        self._service = service
        self._drained: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for SIGINT and SIGTERM."""
        seconds = self._service.settings.drain_seconds
        if sig == signal.SIGTERM and seconds > 0 and self._service.status == "ready":
            self._service.drain()
            self._drained = time.monotonic() + seconds
            log.info("SIGTERM: not ready from now on; connections are refused in %g s", seconds)
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; whether to stop."""
        if self._drained is not None and time.monotonic() >= self._drained:
            self.should_exit = True
        return await super().on_tick(counter)
