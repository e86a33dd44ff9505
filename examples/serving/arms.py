"""What the two arms of the test call: one compiled model for both tasks, embedding and generating."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
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


class ModelArm:
    """A model compiled in one way. Weights are those of the model.

    Args:
        served: the model.
        base: its body, compiled.
        forward: its forward with the head, compiled; None for a model that does not generate.
    """

    def __init__(self, served: Served, base: Callable[..., Any], forward: Callable[..., Any] | None) -> None:
        self._base, self._tokenizer = base, served.tokenizer
        self._generator: Any = None
        if forward is not None:
            # A second object around the same weights, so that generate() calls this arm's forward.
            self._generator = copy.copy(served.model)
            self._generator.forward = forward

    def __call__(self, task: str, tokens: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
        """Answer a batch.

        Args:
            task: ``"embed"`` or ``"generate"``.
            tokens: int64, batch × length; padded on the right for embeddings, on the left for generation.
            mask: int64, the same shape, 0 where there is padding.
            new_tokens: to generate.

        Returns:
            Embeddings, float, batch × features: means over each text's tokens. Or the tokens that follow, int64,
            batch × new_tokens at most, chosen greedily.
        """
        with torch.no_grad():
            if task == EMBED:
                return mean_over_tokens(self._base(input_ids=tokens, attention_mask=mask).last_hidden_state, mask)
            settings = _GenerationConfig(
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=self._tokenizer.end,
                pad_token_id=self._tokenizer.padding,
            )
            answer: Tensor = self._generator.generate(tokens, attention_mask=mask, generation_config=settings)
            return answer[:, tokens.shape[1] :]


def mean_over_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average features, batch × length × features, over the tokens that are no padding."""
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
