"""What a server takes, and how it puts requests together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits and batching of a server.

    Attributes:
        max_batch: texts in one call of the model.
        max_wait: seconds the first text of a batch waits for others.
        max_queue: texts that may wait; more are turned away (503).
        max_texts: texts in one request.
        max_tokens: tokens of a text, of a prompt with what is generated.
        max_new_tokens: tokens generated for one prompt.
        max_body: bytes of a request's body.
        body_seconds: how long a body may take to arrive; a slower one is cut off (408).
        drain_seconds: after SIGTERM, how long the server says that it is not ready while it still takes requests.
    """

    max_batch: int = 8
    max_wait: float = 0.005
    max_queue: int = 256
    max_texts: int = 64
    max_tokens: int = 512
    max_new_tokens: int = 64
    max_body: int = 1 << 20
    body_seconds: float = 10.0
    drain_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not self.body_seconds > 0:
            raise ValueError(f"body_seconds must be more than 0, not {self.body_seconds}")
        for name, value in vars(self).items():
            least = 0 if isinstance(value, float) else 1
            if not value >= least:  # neither is NaN
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.max_texts > self.max_queue:
            raise ValueError(f"max_texts must be at most max_queue ({self.max_queue}), not {self.max_texts}")


class Refused(Exception):
    """A request that is not answered. The message is a sentence for its client.

    Args:
        status: of the HTTP response.
        message: the sentence.
        retry_after: seconds after which another try makes sense, or None.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
