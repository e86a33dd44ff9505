"""What happens around every request: too large a body is not read, and what was answered is counted."""

from __future__ import annotations

import time
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.metrics import Metrics


class BodyLimit:
    """Refuses a body that is too large: by its announced length, and as it comes where none is announced.

    Args:
        app: what answers.
        most: bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        sentence = f"The body is larger than {self._most:,} bytes, what the server takes."
        if announced.isdigit() and int(announced) > self._most:
            await JSONResponse({"error": sentence}, 413, {"Connection": "close"})(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, sentence)
            return message

        await self._app(scope, counted, send)


class Counted:
    """Tells the metrics of each request to one of the endpoints that answer by the model.

    Args:
        app: what answers.
        metrics: to tell.
        endpoints: paths to count.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: tuple[str, ...]) -> None:
        self._app, self._metrics, self._endpoints = app, metrics, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http" or scope["path"] not in self._endpoints:
            await self._app(scope, receive, send)
            return
        status, began = 500, time.perf_counter()

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._metrics.answered(scope["path"].lstrip("/"), status, time.perf_counter() - began)
