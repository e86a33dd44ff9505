"""examples/serve.py is ready when everything is compiled: what it runs, and what happens if that was not all."""

from __future__ import annotations

import asyncio
import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from served_example import as_they_are, continuation, embedding

import lncompile
from lncompile.abtest.arms import compiled_arms
from lncompile.lowering import torch_private_caches
from lncompile.lowering.torch_private_dynamo import compilation_watch
from serving.arms import CompilationNeeded, eager_arm, model_arms, nothing_compiled, pad
from serving.models import Served, small_gpt2
from serving.service import Service
from serving.settings import Settings
from serving.shapes import Shape, Shapes
from serving.warm_up import WarmUp

SETTINGS = Settings(max_batch=4, max_tokens=64, max_new_tokens=6)


class Traffic:
    """A service that is warmed up, and counts what it does for requests."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.eager = 0
        self.batches: list[tuple[str, int]] = []
        service.on_eager = lambda task: self.count_eager()
        service.on_batch = lambda task, size: self.batches.append((task, size))

    def count_eager(self) -> None:
        self.eager += 1

    async def __aenter__(self) -> Traffic:
        self.service.start()
        while not self.service.ready:
            await asyncio.sleep(0.01)
            assert self.service.broken is None
        self.ticks = compilation_watch.ticks()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.service.close()

    @property
    def compiled_something(self) -> bool:
        """Whether anything was compiled since the service is ready."""
        return not compilation_watch.undisturbed(self.ticks)

    async def embed(self, texts: list[str]) -> None:
        answers, _ = await self.service.embed(texts)
        expected = torch.stack([embedding(self.service.served, text) for text in texts])
        torch.testing.assert_close(torch.tensor(answers), expected, atol=2e-5, rtol=1e-4)

    async def generate(self, prompt: str, new_tokens: int) -> None:
        text, *_ = await self.service.generate(prompt, new_tokens)
        assert text == continuation(self.service.served, prompt, new_tokens)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_shapes_are_few_and_hold_what_they_are_for() -> None:
    """Whatever is asked, nothing is cut off, and generating stays within the model's positions."""
    for most, longest, new_tokens in itertools.product((1, 4, 6), (1, 15, 16, 40, 64), (1, 6, 64)):
        shapes = Shapes(Settings(max_batch=most, max_new_tokens=new_tokens), longest, generates=True)
        every = list(shapes)
        assert len(every) == len(set(every)) == len(shapes) <= 24
        for texts in range(1, most + 1):
            assert texts <= shapes.texts(texts) < max(2 * texts, 2)
        for tokens in range(1, longest + 1):
            length = shapes.length("embed", tokens)
            assert length is not None
            assert tokens <= length <= longest
            assert all(Shape("embed", shapes.texts(texts), length) in every for texts in range(1, most + 1))
            for more in range(1, new_tokens + 1):
                length = shapes.length("generate", tokens, more)
                if length is None:
                    assert more > shapes.new_tokens or tokens >= longest - shapes.new_tokens
                    continue
                assert tokens < length <= longest - shapes.new_tokens, "there is padding, and room"
                assert more <= shapes.new_tokens
                assert Shape("generate", shapes.texts(1), length) in every


def test_shapes_of_the_defaults() -> None:
    shapes = Shapes(Settings(), 512, generates=True)
    assert sorted({shape.texts for shape in shapes}) == [1, 2, 4, 8]
    lengths = {task: sorted({shape.length for shape in shapes if shape.task == task}) for task in ("embed", "generate")}
    assert lengths == {"embed": [16, 32, 64, 128, 256, 512], "generate": [16, 32, 64, 128, 256, 448]}
    assert {shape.task for shape in Shapes(Settings(), 512, generates=False)} == {"embed"}


# --- ready means compiled ---------------------------------------------------------------------------------------------


def laid_out_by_inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend that runs the graph as it is, and lays keys and values of prompts out as Inductor does.

    The second token after a prompt finds a cache that the first one has laid out in another way, and needs code of its
    own.
    """
    prompt = not any(isinstance(value, Tensor) and value.dim() == 4 for value in inputs)

    def laid_out(value: Any) -> Any:
        cached = isinstance(value, Tensor) and value.dim() == 4
        return value.transpose(1, 2).contiguous().transpose(1, 2) if cached else value

    def run(*arguments: Any) -> Any:
        outputs = graph(*arguments)
        return [laid_out(output) for output in outputs] if prompt else outputs

    return run


def by_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for any size, without waiting for Inductor."""
    separate = torch_private_caches.separate_caches()
    compiled: Callable[..., Any] = torch.compile(function, backend=laid_out_by_inductor, dynamic=True, **separate)
    return compiled


async def varied(traffic: Traffic, rounds: int) -> None:
    """Texts and prompts of all lengths, alone and together; the last ones are as long as they may be."""
    coin = random.Random(0)

    def text(most: int) -> str:
        return "".join(coin.choices("abcdefgh ", k=coin.randint(1, most)))

    for _ in range(rounds):
        await traffic.embed([text(64) for _ in range(coin.randint(1, 4))])
        await asyncio.gather(*(traffic.generate(text(57), coin.randint(1, 6)) for _ in range(coin.randint(1, 4))))
    await traffic.embed(["x" * 64] * 4)  # without any padding
    await traffic.generate("x" * 57, 6)


def test_nothing_is_compiled_once_it_is_ready(without_inductor: None) -> None:
    """A varied stream through both arms, a third of it through both at once: all of it by compiled code."""
    served = small_gpt2(layers=1, width=32, positions=64)
    folded: list[Callable[..., Any]] = []

    def compile(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        folded.append(compiled_arms(function, None, None, {"dynamic": True})["lnfold"])
        return {"inductor": by_graphs(function), "lnfold": folded[-1]}

    async def run() -> None:
        async with Traffic(Service(served, model_arms(served, compile), SETTINGS, shadow=0.3)) as traffic:
            reports = [report for function in folded for report in lncompile.reports(function)]
            # Embeddings, prompts, and the tokens after them; each for one text and for several.
            assert [report.folded for report in reports] == [3] * 6
            await varied(traffic, 15)
            assert not traffic.compiled_something
            assert traffic.eager == 0
            assert traffic.service.warm_up.compiled == set(traffic.service.shapes)
            assert [report for function in folded for report in lncompile.reports(function)] == reports
            sizes = {task: {size for kind, size in traffic.batches if kind == task} for task in ("embed", "generate")}
            assert sizes["embed"] >= {1, 2, 3, 4}
            assert sizes["generate"] >= {1, 2}
            state = traffic.service.ab.to_dict()
        assert all(arm["requests"] > 5 for arm in state["arms"])
        assert (state["verdict"]["outputs_agree"], state["comparisons"]["skipped"]) == (True, 0)

    asyncio.run(run())


def test_a_shorter_warm_up_would_not_do() -> None:
    """It generates two tokens: what the second one after a prompt needs is missing, and eager answers."""
    served = small_gpt2(layers=1, width=32, positions=64)
    arms = model_arms(served, lambda function: {"inductor": by_graphs(function), "lnfold": by_graphs(function)})
    service = Service(served, arms, SETTINGS)
    shorter = copy.copy(service.shapes)
    shorter.new_tokens = 2
    service.warm_up = WarmUp(service.ab, shorter, served)

    async def run() -> None:
        async with Traffic(service) as traffic:
            await traffic.embed(["a text"])
            await traffic.generate("a prompt", 2)
            assert traffic.eager == 0
            for _ in range(2):
                await traffic.generate("a prompt", 3)
            assert traffic.eager == 2
            assert not traffic.compiled_something

    asyncio.run(run())


def test_a_warm_up_generates_to_the_end() -> None:
    """A text that ends at once would leave the code of later tokens uncompiled."""
    served = small_gpt2(layers=1, width=32, positions=64)
    arm = eager_arm(served)
    tokens, mask = pad([[1, 2, 3]], 16, 0, left=True)
    served.tokenizer.end = int(arm("generate", tokens, mask, 1)[0, 0])
    assert arm("generate", tokens, mask, 6).shape == (1, 1)
    assert arm("generate", tokens, mask, 6, True).shape == (1, 6)
    calls: list[tuple[Any, ...]] = []

    def recorded(*arguments: Any) -> Tensor:
        answer = arm(*arguments)
        calls.append((arguments[0], tuple(arguments[1].shape), tuple(answer.shape)))
        return answer

    service = Service(served, {"a": arm, "b": recorded}, SETTINGS)
    assert service.warm_up.run() is None
    assert {call for call in calls if call[0] == "generate"} == {
        ("generate", (texts, length), (texts, 6)) for texts in (1, 2, 4) for length in (16, 32, 58)
    }
    assert service.warm_up.done == service.warm_up.total == 2 * len(service.shapes)


def toy(shapes: Shapes, function: Callable[..., Tensor], served: Served) -> WarmUp:
    """The warm-up of an arm beside one that compiles nothing."""
    plain = model_arms(served, as_they_are)["lnfold"]
    return WarmUp(lncompile.ABTest(arms={"plain": plain, "toy": function}), shapes, served)


def test_a_shape_that_is_compiled_at_every_call_is_left_to_eager() -> None:
    served = small_gpt2(layers=1, width=16, positions=64)
    state = {"name": "0"}
    calls = {16: 0, 32: 0, 64: 0}

    @torch.compile(backend="eager", dynamic=True)
    def changing(tokens: Tensor) -> Tensor:
        return tokens + len(state["name"]) if state["name"] != "never" else tokens

    @torch.compile(backend="eager", dynamic=True)
    def steady(tokens: Tensor) -> Tensor:
        return tokens + 1

    def arm(task: str, tokens: Tensor, *_: Any) -> Tensor:
        calls[tokens.shape[1]] += 1
        if tokens.shape[1] != 32:
            return steady(tokens)
        state["name"] = f"call {calls[32]}"
        return changing(tokens)

    shapes = Shapes(Settings(max_batch=1), 64, generates=False)
    warm_up = toy(shapes, arm, served)
    assert warm_up.run() is None
    assert {shape.length for shape in warm_up.compiled} == {16, 64}
    # Twice each, padded and not, and once more where something was compiled at the first call.
    assert calls[64] == 2
    assert calls[32] == 4


def test_more_code_than_dynamo_keeps_by_default_is_compiled() -> None:
    """Beyond 8 entries for a function Dynamo would run eager code from then on."""
    served = small_gpt2(layers=1, width=16, positions=64)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, dynamic=False)
    def static(tokens: Tensor) -> Tensor:
        return tokens + 1

    shapes = Shapes(Settings(max_batch=8), 64, generates=False)
    warm_up = toy(shapes, lambda task, tokens, *_: static(tokens), served)
    assert warm_up.run() is None
    assert len(graphs) == len(warm_up.compiled) == 12


# --- what was not compiled all the same -------------------------------------------------------------------------------


def test_code_that_is_not_compiled_is_given_up() -> None:
    """Before its first compilation, and where another size or value would need another one."""
    served = small_gpt2(layers=1, width=16, positions=64)
    arms = model_arms(served, lambda function: {"a": by_graphs(function)})
    batch = "embed", *pad([[1, 2, 3], [4, 5]], 16, 0, left=False), 0
    with nothing_compiled(), pytest.raises(CompilationNeeded):
        arms["a"](*batch)
    expected = arms["a"](*batch)
    with nothing_compiled():
        torch.testing.assert_close(arms["a"](*batch), expected)
        with pytest.raises(CompilationNeeded, match="guard failure"):
            arms["a"]("embed", *pad([[1, 2, 3]], 16, 0, left=False), 0)
    torch.testing.assert_close(arms["a"]("embed", *pad([[1, 2, 3]], 16, 0, left=False), 0), expected[:1])


def test_a_late_compilation_holds_up_no_request(without_inductor: None, caplog: pytest.LogCaptureFixture) -> None:
    """A value that compiled code depends on changes: eager answers, without compiling, and no arm is at fault."""
    served = small_gpt2(layers=1, width=32, positions=64)

    def compile(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        lnfold = compiled_arms(function, None, None, {"dynamic": True})["lnfold"]
        return {"inductor": by_graphs(function), "lnfold": lnfold}

    async def run() -> None:
        arms = model_arms(served, compile)
        service = Service(served, arms, Settings(max_batch=2, max_tokens=32, max_new_tokens=1), shadow=0.5)
        service.shapes = Shapes(service.settings, 32, generates=False)
        service.warm_up = WarmUp(service.ab, service.shapes, served)
        async with Traffic(service) as traffic:
            await traffic.embed(["compiled"])
            assert traffic.eager == 0
            epsilon, served.model.transformer.ln_f.eps = served.model.transformer.ln_f.eps, 1e-3
            for _ in range(3):
                await traffic.embed(["short"])
            await traffic.embed(["short", "short too"])
            assert traffic.eager == 4
            # The shapes that nothing was asked of in the meantime go on as before.
            served.model.transformer.ln_f.eps = epsilon
            for _ in range(3):
                await traffic.embed(["longer than sixteen"])
            assert traffic.eager == 4
            await traffic.embed(["short"])
            assert traffic.eager == 5
            assert not traffic.compiled_something
            assert [str(shape) for shape in service.shapes if shape not in service.warm_up.compiled] == [
                "embed 1 × 16", "embed 2 × 16"
            ]  # fmt: skip
            assert service.ab.verdict().out_of_service == {}
            assert [arm["failures"] for arm in service.ab.to_dict()["arms"]] == [0, 0]

    asyncio.run(run())
    warnings = [record.getMessage() for record in caplog.records if record.name == "lncompile.serve"]
    assert sum("are answered by eager from here on" in warning for warning in warnings) == 2
