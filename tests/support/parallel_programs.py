"""What the processes of test_distributed.py do: each program runs in both and returns what it found, for its test.

The processes are spawned, so the programs stand in a module of their own that is quick to import.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from graphs import run_as_it_is
from parallel_models import (
    TRAINING,
    WORLD,
    Decoder,
    Found,
    compare,
    decoder,
    in_parallel,
    parameters_by_kind,
    plan,
    relative,
    summary,
    token_ids,
)
from parallel_writes import writes_of_collectives, writes_to_shards
from torch import Tensor, distributed, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import lncompile
from lncompile.compiled_graphs import compiled_graphs
from lncompile.lowering import torch_private_inductor

# --- programs ---


def usual_plan(mesh: DeviceMesh) -> Found:
    return in_parallel(mesh, plan())


def norms_of_heads(mesh: DeviceMesh) -> Found:
    return in_parallel(mesh, plan(), norm_heads=True)


def gathered_columns(mesh: DeviceMesh) -> Found:
    """The down projection cut along its output: its mean runs over both processes."""
    down = ColwiseParallel(output_layouts=Replicate())
    return in_parallel(mesh, plan(up=ColwiseParallel(output_layouts=Replicate()), down=down))


def changed_weights(mesh: DeviceMesh) -> Found:
    """Sharded weights are changed in place, by an optimizer that raises no version, and by loading a state."""
    model, reference, ids = decoder(layers=1), decoder(layers=1), token_ids()
    parallelize_module(model.blocks[0], mesh, plan())
    compiled = torch.compile(model, backend="lnfold")
    errors = [relative(compiled(ids), reference(ids))]

    for each in (model, reference):
        each.blocks[0].down.weight.mul_(1.5)
    errors.append(relative(compiled(ids), reference(ids)))

    for each in (model, reference):
        block = each.blocks[0]
        optimizer = torch.optim.SGD([block.down.weight, block.o.weight], lr=0.5, foreach=True)
        for parameter in (block.down.weight, block.o.weight):
            parameter.grad = parameter.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    errors.append(relative(compiled(ids), reference(ids)))

    state = {name: 1.25 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    reference.load_state_dict({name: 1.25 * value for name, value in reference.state_dict().items()})
    errors.append(relative(compiled(ids), reference(ids)))
    return {"errors": errors, **summary()}


def written_by_collectives(mesh: DeviceMesh) -> Found:
    """Collectives write into the parameters of a model that each process holds whole."""
    found = {"versions": list(writes_of_collectives(decoder(layers=1), token_ids(), relative, "versions"))}
    torch._dynamo.reset()
    compiled_graphs.clear()
    found["values"] = list(writes_of_collectives(decoder(layers=1), token_ids(), relative, "values"))
    return {**found, **summary()}


def written_shards(mesh: DeviceMesh) -> Found:
    """Each process writes to its shards, which torch does not count for the whole."""
    model = decoder(layers=1)
    parallelize_module(model.blocks[0], mesh, plan())
    return {"errors": list(writes_to_shards(model, token_ids(), relative)), **summary()}


def vocabulary_cut(mesh: DeviceMesh) -> Found:
    """Token embeddings cut along the vocabulary, as Megatron does it, and a head cut along its output."""
    model = decoder()
    expected = model(token_ids())
    for block in model.blocks:
        parallelize_module(block, mesh, plan())
    outside = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, outside)
    return compare(model, expected)


def sequence_parallel(mesh: DeviceMesh) -> Found:
    """Streams and norms cut along the sequence, gathered in front of attention and MLP."""
    model = decoder()
    expected = model(token_ids())
    outside = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "positions": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, outside)
    for block in model.blocks:
        for name in ("q", "k", "v", "up"):
            inputs = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
            parallelize_module(block, mesh, {name: inputs})
        columns = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
        rows = {name: RowwiseParallel(output_layouts=Shard(1)) for name in ("o", "down")}
        norms = {name: SequenceParallel() for name in ("attention_norm", "mlp_norm")}
        parallelize_module(block, mesh, {**columns, **rows, **norms})
    return compare(model, expected)


class _Reduced(nn.Module):
    """A linear layer of which this process has some input features; the sum over processes is written by hand."""

    def __init__(self, whole: nn.Linear, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = nn.Parameter(whole.weight.chunk(WORLD, dim=1)[mesh.get_rank()].clone())
        self.bias = whole.bias

    def forward(self, value: Tensor) -> Tensor:
        return all_reduce(functional.linear(value, self.weight), "sum", self.mesh) + self.bias


def reduced_by_hand(mesh: DeviceMesh) -> Found:
    """Plain local weights and functional collectives in place of DTensors."""
    model = decoder()
    expected = model(token_ids())
    for block in model.blocks:
        for name in ("q", "k", "v", "up"):
            layer = block.get_submodule(name)
            for parameter in ("weight", "bias"):
                piece = layer.get_parameter(parameter).chunk(WORLD)[mesh.get_rank()].clone()
                setattr(layer, parameter, nn.Parameter(piece))
        block.o, block.down = _Reduced(block.o, mesh), _Reduced(block.down, mesh)
    return compare(model, expected)


def data_parallel(mesh: DeviceMesh) -> Found:
    """DDP: inference folds, training gives eager's outputs and gradients."""

    def wrap(model: Decoder) -> Any:
        return torch.compile(DistributedDataParallel(model), backend="lnfold", options=TRAINING)

    return _training(wrap)


def data_parallel_in_buckets(mesh: DeviceMesh) -> Found:
    """DDP with small buckets, at whose borders Dynamo cuts the graph: a backend gets each piece."""

    def wrap(model: Decoder) -> Any:
        return torch.compile(DistributedDataParallel(model, bucket_cap_mb=0.005), backend="lnfold", options=TRAINING)

    with mock.patch.object(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1000):
        return _training(wrap)


def fully_sharded(mesh: DeviceMesh) -> Found:
    """FSDP2 of each block and of the whole, which is compiled as a whole: Dynamo leaves its frame to Python."""

    def wrap(model: Decoder) -> Any:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return torch.compile(fully_shard(model, mesh=mesh), backend="lnfold", options=TRAINING)

    return _training(wrap)


def fully_sharded_blocks(mesh: DeviceMesh, after_forward: bool = True) -> Found:
    """FSDP2 of each block, each of which is compiled: Dynamo sees the parameters that were gathered for the call."""

    def wrap(model: Decoder) -> Any:
        for block in model.blocks:
            block.compile(backend="lnfold", options=TRAINING)
            fully_shard(block, mesh=mesh, reshard_after_forward=after_forward)
        return fully_shard(model, mesh=mesh, reshard_after_forward=after_forward)

    return _training(wrap)


def fully_sharded_until_backward(mesh: DeviceMesh) -> Found:
    """The same, with parameters that stay gathered from the forward pass to the backward pass."""
    return fully_sharded_blocks(mesh, after_forward=False)


def _training(wrap: Callable[[Decoder], Any], norm_heads: bool = True, seeds: Sequence[int] = range(WORLD)) -> Found:
    own = token_ids(seed=seeds[distributed.get_rank()])
    model, reference = decoder(norm_heads=norm_heads), decoder(norm_heads=norm_heads)
    compiled = wrap(model)
    found: Found = {"inference": relative(compiled(own), reference(own)), "in_inference": summary()}

    with torch.enable_grad():
        # Both halves of the batch at once: gradients are averaged over the processes.
        losses = [reference(token_ids(seed=seed)).square().mean() for seed in seeds]
        (sum(losses) / WORLD).backward()
        outputs = []
        for _ in range(2):
            model.zero_grad()
            output = compiled(own)
            output.square().mean().backward()
            outputs.append(relative(output.detach(), reference(own).detach()))
    found["outputs"] = outputs
    gradients, expected = [], []
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        whole = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        gradients.append(whole.flatten())
        expected.append(other.grad.flatten())
    # All at once: some of them are zero but for rounding (softmax sees no shift of the keys).
    found["gradients"] = relative(torch.cat(gradients), torch.cat(expected))
    found["after_steps"] = []
    for _ in range(2):
        for each in (model, reference):
            for module in each.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # what stays gathered after a forward pass is no parameter to be stepped
            for parameters in parameters_by_kind(each):
                torch.optim.AdamW(parameters, lr=0.1, foreach=True).step()
        found["after_steps"].append(relative(compiled(own), reference(own)))
    found["in_training"] = summary()
    return found


def folded_then_parallel(mesh: DeviceMesh) -> Found:
    """A folded model is sharded, and a sharded one is folded in place."""
    ids, model = token_ids(), decoder(norm_heads=True)
    expected = model(ids)
    folds = lncompile.plan(model, ids)
    fully = folds.apply(copy.deepcopy(model))
    for block in fully.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(fully, mesh=mesh)
    tensor_parallel = folds.apply(copy.deepcopy(model))
    for block in tensor_parallel.blocks:
        parallelize_module(block, mesh, plan())
    found = {"folded": folds.folded, "fully": relative(fully(ids), expected)}
    found["tensor_parallel"] = relative(tensor_parallel(ids), expected)
    for block in model.blocks:
        # Cut along the mean of its output: that of a shard is not that of the whole.
        down = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(block, mesh, plan(up=ColwiseParallel(output_layouts=Replicate()), down=down))
    control = copy.deepcopy(model)
    found["in_place"] = relative(folds.apply(model)(ids), expected)
    found["centered"] = float(model.blocks[0].o.weight.full_tensor().mean(0).abs().max())
    found["sharded_still"] = type(model.blocks[0].o.weight.data).__name__
    found["control"] = relative(folds.replace_modules(control)(ids), expected)
    try:
        folds.apply(fully)
    except lncompile.PlanError as error:
        found["refused"] = str(error)
    return found


PROGRAMS: dict[str, Callable[[DeviceMesh], Found]] = {
    program.__name__: program
    for program in (
        usual_plan, norms_of_heads, gathered_columns, changed_weights, written_by_collectives, written_shards,
        vocabulary_cut, sequence_parallel, reduced_by_hand, data_parallel, data_parallel_in_buckets, fully_sharded,
        fully_sharded_blocks, fully_sharded_until_backward, folded_then_parallel,
    )
}  # fmt: skip


def run(rank: int, store: str, names: list[str], through_inductor: bool, results: str) -> None:
    """Run programs in one process of the group, and write what each found, or how it failed."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    compile_with = nullcontext() if through_inductor else mock.patch.object(
        torch_private_inductor, "inductor_compile", run_as_it_is
    )  # fmt: skip
    found: dict[str, Found] = {}
    for name in names:
        torch._dynamo.reset()
        compiled_graphs.clear()
        try:
            with torch.no_grad(), compile_with:
                found[name] = PROGRAMS[name](mesh)
        except Exception as error:
            found[name] = {"failure": f"{error}\n{traceback.format_exc()}"}
        torch.save(found, Path(results) / f"{rank}.pt")
        distributed.barrier()
    distributed.destroy_process_group()
