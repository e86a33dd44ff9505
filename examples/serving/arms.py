"""What the two arms of the test call: one compiled model for both tasks, embedding and generating."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from lncompile.abtest.arms import compiled_arms
from serving.models import Served

_GenerationConfig: Any = transformers.GenerationConfig
EMBED, GENERATE = "embed", "generate"
Compiled = Mapping[str, Callable[..., Any]]
#: Compiles a function for each arm, by the arm's name.
Compile = Callable[[Callable[..., Any]], Compiled]


def compile_for_both(function: Callable[..., Any]) -> Compiled:
    """Compile with stock Inductor and with lnfold, for batches of any size and length."""
    return compiled_arms(function, None, None, {"dynamic": True})


class CompilationNeeded(concurrent.futures.CancelledError):
    """A call that was given up because something would have to be compiled for it.

    It is a cancelled call: the arm has not failed, and a test of both arms does not count it.
    """


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Context in which a :class:`ModelArm` raises :class:`CompilationNeeded` rather than compile.

    The setting is one for the process, so all calls of arms belong on one thread. It is not ``"eager_on_recompile"``:
    that one does not say that it ran eager code, which would be timed as the arm's, and before torch 2.13 it runs the
    code that the other arm has compiled from the same function.
    """
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


class ModelArm:
    """A model compiled in one way, or not at all. Weights are those of the model.

    Args:
        served: the model.
        base: its body, compiled or not.
        forward: its forward with the head, compiled or not; None for a model that does not generate.
    """

    def __init__(self, served: Served, base: Callable[..., Any], forward: Callable[..., Any] | None) -> None:
        self._base, self._tokenizer = base, served.tokenizer
        self._generator: Any = None
        if forward is not None:
            # A second object around the same weights, so that generate() calls this arm's forward.
            self._generator = copy.copy(served.model)
            self._generator.forward = forward

    def __call__(self, task: str, tokens: Tensor, mask: Tensor, new_tokens: int, to_the_end: bool = False) -> Tensor:
        """Answer a batch.

        Args:
            task: ``"embed"`` or ``"generate"``.
            tokens: int64, batch × length; padded on the right for embeddings, on the left for generation.
            mask: int64, the same shape, 0 where there is padding.
            new_tokens: to generate.
            to_the_end: whether to generate all of them, even where each text ends before.

        Returns:
            Embeddings, float, batch × features: means over each text's tokens. Or the tokens that follow, int64,
            batch × new_tokens at most, chosen greedily.

        Raises:
            CompilationNeeded: under :func:`nothing_compiled`, where something is not compiled yet.
        """
        try:
            return self._answer(task, tokens, mask, new_tokens, to_the_end)
        except RuntimeError as error:
            if "fail_on_recompile" not in str(error):
                raise
            raise CompilationNeeded(str(error)) from error

    def _answer(self, task: str, tokens: Tensor, mask: Tensor, new_tokens: int, to_the_end: bool) -> Tensor:
        with torch.no_grad():
            if task == EMBED:
                return mean_over_tokens(self._base(input_ids=tokens, attention_mask=mask).last_hidden_state, mask)
            settings = _GenerationConfig(
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens if to_the_end else None,
                do_sample=False,
                num_beams=1,
                eos_token_id=self._tokenizer.end,
                pad_token_id=self._tokenizer.padding,
            )
            answer: Tensor = self._generator.generate(tokens, attention_mask=mask, generation_config=settings)
            return answer[:, tokens.shape[1] :]


def mean_over_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average features, batch × length × features, over the tokens that are not padding."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def model_arms(served: Served, compile: Compile = compile_for_both) -> dict[str, ModelArm]:
    """Make both arms of a model.

    Args:
        served: the model.
        compile: makes what each arm calls.

    Returns:
        The arms by name, the baseline first. The work of compiling is done at the first calls.
    """
    bases = compile(served.model.base_model)
    forwards = compile(served.model.forward) if served.generates else {}
    return {name: ModelArm(served, base, forwards.get(name)) for name, base in bases.items()}


def eager_arm(served: Served) -> ModelArm:
    """Make an arm that runs the model as it is."""
    return ModelArm(served, served.model.base_model, served.model.forward if served.generates else None)


def pad(texts: Sequence[Sequence[int]], length: int, padding: int, left: bool) -> tuple[Tensor, Tensor]:
    """Put texts of different lengths into one tensor.

    Args:
        texts: tokens.
        length: of the result.
        padding: the token to fill with.
        left: whether to fill on the left.

    Returns:
        Tokens and mask, int64, texts × length.
    """
    tokens = torch.full((len(texts), length), padding)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        place = slice(length - len(text), length) if left else slice(0, len(text))
        tokens[row, place], mask[row, place] = torch.tensor(text), 1
    return tokens, mask
