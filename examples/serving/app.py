"""The HTTP side: endpoints, errors in sentences, clients that go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field, StrictInt, StrictStr
from starlette.exceptions import HTTPException as AnyHTTPException

from serving.metrics import Metrics
from serving.middleware import BodyLimit, ClosesWhileDraining, Counted
from serving.report import HEADERS, Report
from serving.service import Service
from serving.settings import Refused

log = logging.getLogger("lncompile.serve")
T = TypeVar("T")
User = Annotated[str | None, Header(alias="X-User", description="Requests with one user go to the same arm.")]
#: A client that closed the connection gets no answer; nginx and Envoy log it as 499.
_CLIENT_GONE = 499
#: To generate, where a request does not say how many.
_NEW_TOKENS = 16


class EmbedRequest(BaseModel):
    """Texts to embed."""

    texts: list[StrictStr]


class EmbedResponse(BaseModel):
    """An embedding for each text, in order."""

    embeddings: list[list[float]]
    tokens: int


class GenerateRequest(BaseModel):
    """A prompt to continue."""

    prompt: StrictStr
    max_new_tokens: StrictInt | None = Field(None, description="Default: 16, or the most that the server takes.")


class GenerateResponse(BaseModel):
    """What follows the prompt."""

    text: str
    prompt_tokens: int
    new_tokens: int


def create_app(service: Service) -> FastAPI:
    """Make the application around a service."""
    metrics, report = Metrics(service), Report(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(title="A model served by two compilers", lifespan=lifespan)
    app.add_middleware(BodyLimit, most=service.settings.max_body, seconds=service.settings.body_seconds)
    app.add_middleware(ClosesWhileDraining, service=service)
    app.add_middleware(Counted, metrics=metrics, endpoints=("/embed", "/generate"))
    _errors_in_sentences(app)

    @app.post("/embed")
    async def embed(body: EmbedRequest, request: Request, x_user: User = None) -> EmbedResponse:
        """Embed texts: the mean of the last hidden states of each text's tokens."""
        embeddings, tokens = await _unless_gone(request, service.embed(body.texts, x_user))
        return EmbedResponse(embeddings=embeddings, tokens=tokens)

    @app.post("/generate")
    async def generate(body: GenerateRequest, request: Request, x_user: User = None) -> GenerateResponse:
        """Continue a prompt, each token the likeliest one."""
        most = service.settings.max_new_tokens
        new_tokens = min(_NEW_TOKENS, most) if body.max_new_tokens is None else body.max_new_tokens
        work = service.generate(body.prompt, new_tokens, x_user)
        text, prompt_tokens, generated = await _unless_gone(request, work)
        return GenerateResponse(text=text, prompt_tokens=prompt_tokens, new_tokens=generated)

    @app.get("/", include_in_schema=False)
    def index() -> HTMLResponse:
        """What there is."""
        return HTMLResponse(report.index(), headers=HEADERS)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """200 while the process is alive, and what it is doing."""
        return _health(service)

    @app.get("/health/ready")
    async def ready() -> Response:
        """200 while new requests should be sent here: 503 until everything is compiled, and from SIGTERM on."""
        ready = service.status == "ready"
        return JSONResponse(_health(service), 200 if ready else 503, {} if ready else {"Retry-After": "5"})

    @app.get("/metrics")
    def scrape() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/ab")
    def page(refresh: int = 10) -> HTMLResponse:
        """The test, for people. ``?refresh=0`` keeps the page as it is."""
        return HTMLResponse(report.html(refresh), headers=HEADERS)

    @app.get("/ab.json")
    def state() -> dict[str, Any]:
        """The test, for programs."""
        return service.ab.to_dict()

    return app


def _health(service: Service) -> dict[str, Any]:
    return {
        "status": service.status,
        "ready": service.status == "ready",
        "reason": service.broken,
        "warm_up": {"done": service.warm_up.done, "total": service.warm_up.total},
        "model": service.served.description,
    }


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work unless the client closes the connection first: then it is cancelled."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(_CLIENT_GONE, "The client closed the connection.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _errors_in_sentences(app: FastAPI) -> None:
    """Every error is ``{"error": "a sentence"}``."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return JSONResponse({"error": str(error)}, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return JSONResponse({"error": f"The body is not valid JSON: {first['ctx']['error']}."}, 400)
        place = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return JSONResponse({"error": f"{first['msg']}: {place}."}, 422)

    @app.exception_handler(AnyHTTPException)
    async def http(request: Request, error: AnyHTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        log.error("%s failed", request.url.path, exc_info=error)
        return JSONResponse({"error": f"The model failed at this request: {type(error).__name__}."}, 500)
