"""Saying what goes on while it goes on: numbered steps, with a spinner and a bar where somebody watches a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Say(Protocol):
    """Says what is going on within a step, in a few words; ``share`` is how much of it is done, where that is known."""

    def __call__(self, words: str, share: float | None = None) -> None:
        """Say it."""


class Steps:
    """Progress as numbered steps: a spinner on a terminal, a line for each thing begun elsewhere (a log, a pipe).

    Args:
        console: where it is printed.
        total: number of steps to come.

    Example:
        >>> steps = Steps(Console(stderr=True), 1)
        >>> with steps.step("The model") as say:
        ...     say("loading gpt2")
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.begun = 0

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Say]:
        """Announce a step; yields a function that says what is going on within it.

        Args:
            title: what the step is for.
        """
        self.begun += 1
        self.console.print(f"\n{self.begun}/{self.total}  {title}", style="bold")
        started = time.perf_counter()
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as progress:
                task = progress.add_task("", total=None)

                def show(words: str, share: float | None = None) -> None:
                    progress.update(task, description=words, total=None if share is None else 1.0, completed=share or 0)

                yield show
        else:
            last = ""

            def write(words: str, share: float | None = None) -> None:
                nonlocal last
                if words != last:
                    self.console.print(f"     {words} ...", soft_wrap=True)
                last = words

            yield write
        self.console.print(f"     took {time.perf_counter() - started:.1f} s", style="dim")
