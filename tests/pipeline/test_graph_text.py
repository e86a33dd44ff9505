"""Graphs and decisions as text: what people read when they look for why."""

from __future__ import annotations

import re

import torch
from architectures import ARCHITECTURES, randomise
from graphs import Captured, capture, capture_all
from torch import Tensor, fx, nn

from lncompile.options import Options
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.passes.pipeline.context import Known
from lncompile.passes.pipeline.cut_text import cut_in_words
from lncompile.passes.pipeline.graph_text import described, graph_text
from lncompile.passes.pipeline.order import DECIDE
from lncompile.passes.pipeline.runner import Runner
from lncompile.transform import transform


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.inner = nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8))
        self.other = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.linear(x)[:, None, 1:])
        return y.flatten(0, 1) + self.other(torch.relu(x[:, 1:]))


def captured() -> Captured:
    return capture(randomise(Net()).double().eval(), torch.randn(3, 4, 8, dtype=torch.float64))


def test_text_has_shapes_paths_and_places() -> None:
    text = graph_text(captured().graph_module.graph)
    line = r" \(test_graph_text\.py:\d+\)\n"
    assert "    l_x_,  # f64[3, 4, 8]  x\n" in text
    assert "weight_,  # f64[8, 8]  linear.weight\n" in text
    assert re.search(r"    # linear" + line + r"    linear = .*  # f64\[3, 4, 8\]\n", text)
    assert re.search(r"    # the model" + line + r"    getitem = linear\[:, None, 1:\]  # f64\[3, 1, 3, 8\]\n", text)
    assert re.search(r"    # inner\.0" + line + r"    input_1 = torch\.nn\.functional\.layer_norm\(\w+, \(8,\)", text)
    assert "    add = flatten + layer_norm_1  # f64[3, 3, 8]\n" in text
    assert text.endswith("    return (add,)\n")


def test_text_without_lines_of_the_source_is_the_same_for_all() -> None:
    assert ".py" not in graph_text(captured().graph_module.graph, locations=False)


def test_what_the_passes_put_in_is_marked() -> None:
    graph = captured()
    text = graph_text(transform(graph.analyse(), Options()).graph_module.graph)
    assert "    # lncompile\n    input_1_mul = torch.mul(" in text
    assert "# lncompile" not in graph_text(graph.graph_module.graph)


def test_every_kind_of_node_is_written() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    module, attribute = graph.call_module("inner", (x,)), graph.get_attr("table")
    method = graph.call_method("view", (module, -1), {"dtype": torch.float32})
    operator = graph.call_function(torch.ops.aten.add.Tensor, (method, [attribute, slice(1, None)], {"a": x}))
    graph.output((operator, ()))
    assert graph_text(graph) == (
        "def forward(\n    x,\n):\n"
        "    # lncompile\n    inner = self.inner(x)\n    # the model\n    table = self.table\n    # lncompile\n"
        "    view = inner.view(-1, dtype=torch.float32)\n"
        "    add_tensor = torch.ops.aten.add.Tensor(view, [table, slice(1, None, None)], {'a': x})\n"
        "    return (add_tensor, ())\n"
    )


def test_described() -> None:
    assert described(torch.zeros(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert described((torch.zeros(1, dtype=torch.uint8), None)) == "(u8[1], )"
    assert described(torch.zeros(1, dtype=torch.bool)) == "bool[1]"
    assert described(3) == ""


def test_text_adds_no_guards() -> None:
    """Dynamic sizes are written as their symbols; nobody asks for their values."""
    graph = capture(randomise(Net()).double().eval(), torch.randn(3, 4, 8, dtype=torch.float64), dynamic=True)
    sizes = next(
        node.meta["example_value"].shape[0]
        for node in graph.graph_module.graph.nodes
        if isinstance(node.meta.get("example_value"), Tensor)
        and isinstance(node.meta["example_value"].shape[0], torch.SymInt)
    )
    before = len(sizes.node.shape_env.guards)
    text = graph_text(graph.graph_module.graph)
    assert "f64[s" in text
    assert len(sizes.node.shape_env.guards) == before


def known(graph: Captured, **options: bool) -> Known:
    work = Known(copy_graph_module(graph.graph_module), graph.example_inputs, Options(**options))
    Runner().run(DECIDE, work)
    return work


def cut(work: Known) -> str:
    assert work.placed is not None
    return cut_in_words(work.sites, work.variables, work.placed.placement, work.costs, work.options.assist != "off")


def test_the_cut_says_why_a_site_folds_and_why_another_stays() -> None:
    """What is centered, at what price, on which side of the cut; and what is in the way of the other."""
    text = cut(known(captured()))
    assert text.startswith("1 of 2 norms fold; the cut saves 576 bytes of memory traffic a call\n")
    first, second = text.split("\n\n")[1:]
    assert re.match(r"inner\.0 \(test_graph_text\.py:\d+\) folds: that saves 576 bytes a call\n", first)
    assert re.search(
        r"  linear = linear \(.*\) along \[·, ·, 8\]: computed centered, shifted, available centered\n", first
    )
    assert "    centering it at run time costs 768 bytes a call\n" in first
    assert "    needs linear.weight, linear.bias" in first
    assert "  linear.weight along [8, ·]: available centered\n    a parameter: centered once, beside it" in first
    assert re.match(r"other \(.*\) stays; folding it would save 576 bytes a call\n", second)
    assert re.search(r"  relu = relu \(.*\) along \[·, ·, 8\]: left as it is\n", second)
    assert "    cannot be computed centered: the stream comes out of an activation" in second


def test_the_cut_says_who_would_notice() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.linear(x)
            return self.norm(x), x

    graph = capture(randomise(Returned()).eval(), torch.randn(3, 8))
    text = cut(known(graph, assist="off"))
    assert "    its shift would be noticed: the stream is also returned by the graph (linear (linear, " in text
    assert "    is not centered at run time (lnfold.assist is 'off')" in text


def test_every_tensor_of_a_cut_is_said_once() -> None:
    """Of GPT-2: the streams of all blocks, each tensor with the first site that needs it."""
    architecture = next(one for one in ARCHITECTURES if one.name == "gpt2")
    model = randomise(architecture.build()).eval()
    (graph, *_) = capture_all(model, **architecture.inputs(torch.float32)).graphs
    work = known(graph)
    text = cut(work)
    assert len(re.findall(r"^\S.*(?:folds: that saves|stays; folding it would save)", text, re.MULTILINE)) == len(
        work.sites
    )
    told = re.findall(r"^  (\S.*) along ", text, re.MULTILINE)
    assert len(told) == len({*told})
    parameters = [variable for variable in work.variables.values() if variable.node.op == "placeholder"]
    assert len(re.findall("a parameter: centered once", text)) >= len(parameters) > 0
