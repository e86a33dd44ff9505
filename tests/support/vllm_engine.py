"""Runs vLLM's engine on checkpoints and prints what it answers, as JSON: one process for one way of running it.

    python vllm_engine.py WAY FOLDER...

WAY is ``eager``, ``default`` (vLLM compiles, ahead of time), ``lnfold`` (torch.compile by lnfold),
``parallel`` (two processes, without compilation), or ``reload`` (weights are read once more, without compilation).
Two more go wrong on purpose, with LNCOMPILE_VLLM=1 and without compilation: in ``uncentered`` weights are not centered
and nothing looks at the result, in ``caught`` the last look finds it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for a function of this file, which other processes call

#: Ways that go wrong on purpose.
WRONG = ("uncentered", "caught")
PROMPTS = ([5, 9, 17, 33], [7, 8, 3], [100, 20, 64, 50, 11, 90, 31])


def _image(number: int) -> dict[str, Any]:
    from PIL import Image

    noise = numpy.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=numpy.uint8)
    picture = Image.fromarray(noise)

    return {"multi_modal_data": {"image": picture}}


def _sound(number: int) -> dict[str, Any]:
    wave = numpy.sin(numpy.arange(8000) * (0.05 + 0.03 * number)).astype(numpy.float32)
    return {"multi_modal_data": {"audio": (wave, 16000)}}


#: What goes with the prompts.
MEDIA = {"none": lambda number: {}, "image": _image, "sound": _sound}


def settings(way: str) -> dict[str, Any]:
    """What vLLM's ``LLM`` is given."""
    if way in ("eager", "reload", *WRONG):
        return {"enforce_eager": True}
    if way == "lnfold":
        return {"compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "lnfold"}}
    if way == "parallel":
        return {"enforce_eager": True, "tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    return {}


def answers(folder: str, way: str) -> dict[str, Any]:
    """What a model answers, with the classes of its norms."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    settings_of_model = Path(folder) / "engine.json"
    more = json.loads(settings_of_model.read_text()) if settings_of_model.exists() else {"skip_tokenizer_init": True}
    media = MEDIA[more.pop("media", "none")]
    engine = LLM(
        folder,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=4,
        seed=0,
        **settings(way),
        **more,
    )
    try:
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=4)
        if way == "reload":
            engine.collective_rpc("reload_weights")
        prompts = [{"prompt_token_ids": list(ids), **media(number)} for number, ids in enumerate(PROMPTS)]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        logprobs = [
            [{token: value.logprob for token, value in step.items()} for step in output.outputs[0].logprobs]
            for output in outputs
        ]
        norms, *others = engine.apply_model(norm_classes)
        assert all(other == norms for other in others)
        return {"tokens": tokens, "logprobs": logprobs, "norms": norms, "processes": 1 + len(others)}
    finally:
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def norm_classes(model: Any) -> dict[str, str]:
    """The classes of the modules that are norms by the name of their class."""
    return {path: type(module).__name__ for path, module in model.named_modules() if "Norm" in type(module).__name__}


def go_wrong(way: str) -> None:
    """Leave the weights as they are, where they should be centered."""
    from lncompile.engines import vllm_loader, weight_stream

    def as_they_are(self: Any, weights: Any) -> Any:
        self.passed.update(self.entries)
        return weights

    weight_stream.CenteredWeights.__call__ = as_they_are  # type: ignore[method-assign]
    if way == "uncentered":
        vllm_loader.problem_with = lambda *_: ""


def main() -> None:
    """Print one line of JSON for each folder."""
    way, *folders = sys.argv[1:]
    if way == "parallel":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # for which it wants a memory node for each process
    if way in WRONG:
        go_wrong(way)
    for folder in folders:
        try:
            found = answers(folder, way)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print("ANSWER " + json.dumps({"folder": folder, **found}), flush=True)


if __name__ == "__main__":
    main()
