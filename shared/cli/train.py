"""`course train`: a language model from a configuration file, on one process or several."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from shared.cli import streams

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="A file of configs/training.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. training.steps=100."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run (default: runs/NAME among the artefacts).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    scale: Annotated[str, typer.Option(help="auto, cpu, gpu or h100x2.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a GPT; checkpoints, TensorBoard log, history and the model land in one folder.

    Ctrl-C finishes the update, saves, and ends; --resume goes on as if nothing had happened. On several
    processes: torchrun --nproc-per-node 2 -m shared train --config FILE

    Example: course train --config configs/training/shakespeare-speedrun.yaml
    """
    from shared.recipes import pretraining
    from shared.runtime import artifacts
    from shared.runtime import scale as scales
    from shared.training import distributed_utils
    from shared.training.config import load_run

    machine = scales.start(scale, quiet=True)
    run = load_run(config, settings or (), dtype=str(machine.dtype).removeprefix("torch."))
    directory = out or artifacts.home() / "runs" / config.stem
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = machine.device
    if world_size > 1:
        device = distributed_utils.setup(gpu=device.type == "cuda")
    try:
        data = pretraining.token_data(run.data)
        if rank == 0:
            cost = pretraining.planned_cost(run, run.model_config(data.tokenizer.vocab_size), world_size)
            _announce([*machine.reasons, f"planned: {cost}", f"run folder: {directory}"])
        history = pretraining.train_language_model(
            run, data, directory, device=device, resume=resume, rank=rank, world_size=world_size
        )
    except KeyboardInterrupt as interrupt:
        if rank == 0:
            print(f"course: {interrupt or 'stopped before training began.'}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        distributed_utils.cleanup()
    if rank == 0:
        _report(history[-1], directory, as_json)


def _announce(lines: list[str]) -> None:
    print("\n".join(lines), file=sys.stderr, flush=True)


def _report(last: dict[str, float], directory: Path, as_json: bool) -> None:
    if as_json:
        streams.print_json({**last, "model": str(directory / "model")})
        return
    losses = f"{last['val_loss']:.4f} nats per token, {last['val_bits_per_byte']:.4f} bits per byte"
    effort = f"{last['step']:,} updates, {last['tokens']:,} tokens, {last['seconds']:.0f} s of training"
    print(f"validation loss {losses}, after {effort}")
    print(f"model: {directory / 'model'}")
