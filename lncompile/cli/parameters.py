"""The parameters that commands share, and what they were given."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lncompile.models.names import RANDOM_GPT2


class InputError(Exception):
    """Something on the command line that cannot be. The message is one sentence for the person who wrote it."""


class Dtype(enum.StrEnum):
    """Dtypes a model can be put into."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face id or local folder; a config.json (random weights, every parameter randomised); "
        "module:factory or file.py:factory (a function that returns a model, or a model and its inputs); "
        f"'{RANDOM_GPT2}' (default): GPT-2 small's shapes with random weights, no network needed.",
        show_default=False,
    ),
]
Batch = Annotated[
    int | None, typer.Option("--batch", "-b", min=1, metavar="N", help="Sequences or images in one call, default 1.")
]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", "-t", min=1, metavar="N", help="Tokens of a sequence, default 64 (or fewer)."),
]
TokensOfRequests = Annotated[
    list[int] | None,
    typer.Option("--tokens", "-t", min=1, metavar="N", help="Tokens of a sequence, default 64; may be repeated."),
]
DtypeName = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16, float16 or float64, of weights and inputs; default float32, or what the factory made.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1; default cuda if there is one, or where the factory put it. "
        "explain also takes meta: the shapes of any model, without its weights.",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Of random weights and inputs, default 0.")]
Mode = Annotated[
    str | None, typer.Option("--mode", metavar="MODE", help="Of torch.compile: reduce-overhead, max-autotune, ...")
]
OptionPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="KEY=VALUE", help="Of torch.compile: lnfold.assist=off, max_autotune=true, ..."
    ),
]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also draw the streams into one HTML page.")]
Graphs = Annotated[
    Path | None,
    typer.Option("--graphs", metavar="DIR", help="Also write the graph after each pass that changed it into a folder."),
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw it (png, svg, pdf).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came up.")]


@dataclass(frozen=True)
class Asked:
    """What was asked for on the command line.

    Attributes:
        command: its name.
        model: its name.
        batch: sequences or images in one call; None where nothing was asked for, as below.
        tokens: of a sequence.
        dtype: of weights and inputs.
        device: where the model is put.
        seed: of random numbers.
        mode: of torch.compile.
        pairs: options of torch.compile as they were written.
        as_json: whether stdout gets JSON.
        show_traceback: whether an error is to be shown with where it came up.
        files: what is to be written at the end, by option.
    """

    command: str
    model: str
    batch: int | None
    tokens: int | None
    dtype: Dtype | None
    device: str | None
    seed: int | None
    mode: str | None
    pairs: Sequence[str] | None
    as_json: bool
    show_traceback: bool
    files: tuple[tuple[str, Path | None], ...] = ()
