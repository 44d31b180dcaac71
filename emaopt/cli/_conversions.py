"""The commands that write a checkpoint's weights in another format."""

from typing import Annotated

import typer

from emaopt._output import exists
from emaopt.cli import _options
from emaopt.cli._errors import failing
from emaopt.cli._options import (
    At,
    Checkpoint,
    Dtype,
    Force,
    Json,
    Layout,
    Out,
    Rename,
    Served,
)
from emaopt.cli._terminal import progress_bar, report, stop, warn


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A checkpoint of Orbax's; a file of msgpack or safetensors, the index "
            "of several, or a folder of such; the prefix or the directory of a "
            "TensorFlow checkpoint.",
            show_default=False,
            callback=_options.path,
        ),
    ],
    out: Out,
    layout: Layout = "auto",
    weights: Served = "served",
    rename: Rename = None,
    at: At = None,
    dtype: Dtype = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint of another program, with its average, to one of Orbax's.

    It reads Orbax's trees with *ema_params* and the like, openpi, kauldron, praxis,
    optax-swag, nnx.EMA, Levanter, msgpack of Flax, safetensors, diffusers, and
    TensorFlow's checkpoints without TensorFlow. The averages stand under the parameters'
    names, below *params*. Every bit is kept; memory holds a few pieces of arrays.

        emaopt convert model.ckpt-10000 --out mine --rename tower/dense=encoder/Dense_0

    As JSON: *weights*, the converted weights in words, and *written*.
    """
    with failing("convert"), progress_bar("converting") as progress:
        from emaopt import checkpoint
        from emaopt.cli import _tables

        said = checkpoint.convert(
            source,
            out,
            layout=layout,
            weights=weights,
            rename=_options.pairs(rename),
            at=at,
            dtype=dtype,
            force=force,
            progress=progress,
            report=warn,
        )
    sentence = f"Converted {_tables.escape(said)}."
    report(as_json, {"weights": said}, [sentence], out)


def export(
    path: Checkpoint,
    safetensors: Annotated[
        str,
        typer.Option(
            "--safetensors",
            "--out",
            help="The file to make.",
            show_default=False,
            callback=_options.file,
        ),
    ],
    weights: Served = "served",
    at: At = None,
    dtype: Dtype = None,
    separator: Annotated[
        str, typer.Option(help="What joins the names of nested parameters.")
    ] = "/",
    rename: Rename = None,
    shard_size: Annotated[
        str | None,
        typer.Option(
            help="Split into several files with an index, none larger than this, as in "
            "*5GB* or *500MB*, but for an array that is.",
            show_default=False,
            callback=_options.size,
        ),
    ] = None,
    best: Annotated[
        str | None,
        typer.Option(
            help="PATH is a run: export the step and the weights with the least "
            "*METRIC*, by the metrics that its CheckpointManager kept for each view of "
            "them, such as *raw/loss* and *average/loss* for *loss*.",
            show_default=False,
            metavar="METRIC",
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="*max*: the greatest value is the best.", callback=_options.mode
        ),
    ] = "min",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Export the parameters of a checkpoint to a safetensors file.

    If the checkpoint holds averages, written by emaopt or by plain Orbax, it exports
    these, else the parameters, and says which. It goes array by array.

        emaopt export run/1000 --safetensors model.safetensors --dtype bfloat16
        emaopt export run --best loss --safetensors model.safetensors

    As JSON: *weights*, the exported weights in words, *best* {*step*, *view*, *value*,
    *path*} or null, and *written*.
    """
    if best is not None and weights != "served":
        stop("emaopt export: --best says which weights, and so does --weights.", 2)
    with failing("export"), progress_bar("exporting") as progress:
        from emaopt import checkpoint
        from emaopt.cli import _tables

        chosen = checkpoint.best(path, best, mode=mode) if best is not None else None
        if chosen:
            path, weights = chosen.path, chosen.view
        said = checkpoint.export_safetensors(
            path,
            safetensors,
            weights=weights,
            at=at,
            dtype=dtype,
            separator=separator,
            rename=_options.pairs(rename),
            shard_bytes=_options.bytes_of(shard_size),
            force=force,
            progress=progress,
        )
    sentence = f"Exported {_tables.escape(said)}"
    if chosen:
        sentence += f" of step {chosen.step:,}, whose {best} is {chosen.value:.6g}"
    sentence += "."
    # In several files, their index is what a reader opens.
    index = f"{safetensors}.index.json"
    written = index if shard_size and exists(index) else safetensors
    made = {"weights": said, "best": _tables.document(chosen)}
    report(as_json, made, [sentence], written)
