"""What happens around every request: bodies that are too large or too slow are cut off, and answers are counted."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.metrics import Metrics
from serving.service import Service


class BodyLimit:
    """Cuts off a body that is too large (413) or takes too long to arrive (408), and closes its connection.

    A large one is refused by its announced length, and as it comes where none is announced. The time is for the whole
    body, however often a piece of it arrives.

    Args:
        app: what answers.
        most: bytes.
        seconds: from the request's headers to the end of its body.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        sentence = f"The body is larger than {self._most:,} bytes, the most that this server takes."
        if announced.isdigit() and int(announced) > self._most:
            await JSONResponse({"error": sentence}, 413, {"Connection": "close"})(scope, receive, send)
            return
        seen, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self._seconds

        async def limited() -> Message:
            nonlocal seen, complete
            if complete:  # what comes now is that the client leaves, and that may take any time
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = f"The body did not arrive within {self._seconds:g} seconds."
                raise HTTPException(408, late, {"Connection": "close"}) from None
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(413, sentence, {"Connection": "close"})
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, limited, send)


class ClosesWhileDraining:
    """Closes each connection after its answer once the server is going to shut down.

    A connection that is kept open and idle is closed at the end of that time, and a request that its client sends at
    that moment is lost.

    Args:
        app: what answers.
        service: says when that is.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._service.draining:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, closing)


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
