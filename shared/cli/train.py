"""`course train`: a language model from a configuration file, on one process or several."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shared.cli import streams
from shared.runtime.errors import CourseError

if TYPE_CHECKING:
    from shared.training.planning import Plan

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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, FLOPs, memory and time; train nothing.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="Plan for h200, h100, a100, a100-40, rtx4090, rtx3080, cpu or cpu:CORES:GB."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Plan for so many of them.")] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of the peak that the plan's time assumes (default: 0.4).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a GPT; checkpoints, TensorBoard log, history and the model land in one folder.

    Ctrl-C finishes the update, saves, and ends; --resume goes on as if nothing had happened. On several
    processes: torchrun --nproc-per-node 2 -m shared train --config FILE

    With --dry-run it is only planned, from the configuration alone, for this machine or another, and refused
    with status 2 where it does not fit: course train --config FILE --dry-run --gpus 2 --gpu h100

    Example: course train --config configs/training/shakespeare-speedrun.yaml
    """
    if dry_run:
        _plan(config, settings or [], gpu, gpus, mfu, as_json)
        return
    if gpu or gpus or mfu:
        raise CourseError("--gpu, --gpus and --mfu describe a machine to plan for; add --dry-run.")
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
        raise typer.Exit(getattr(interrupt, "exit_status", 130)) from None  # 143 after SIGTERM
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


def _plan(
    config: Path, settings: list[str], gpu: str | None, gpus: int | None, mfu: float | None, as_json: bool
) -> None:
    from shared.runtime import hardware
    from shared.training import planning
    from shared.training.config import load_run

    if mfu is not None and not 0 < mfu <= 1:
        raise CourseError(f"--mfu is {mfu}; it must be more than 0 and at most 1.")
    machine = planning.machine(gpu or "auto")
    fast = hardware.cpu_bf16()[0] if gpu in (None, "auto", "cpu") and machine.kind == "cpu" else False
    dtype = "bfloat16" if machine.kind == "cuda" or fast else "float32"
    run = load_run(config, settings, dtype=dtype)
    plan = planning.plan(run, machine, gpus or 1, mfu=mfu or planning.MFU)
    if as_json:
        streams.print_json({"config": str(config), **plan.to_dict()})
    else:
        _print_plan(plan)
    plan.check()


def _print_plan(plan: "Plan") -> None:
    from shared.cli import display
    from shared.training import planning

    table = display.table("", "", right=())
    table.show_header = False
    memory, training = plan.memory, plan.training
    rows = {
        "Machine": f"{plan.layout.devices} × {plan.machine.name}, {plan.parallel}, {training.dtype}",
        "Parameters": f"{plan.sizes.total:,}",
        "Tokens": f"{plan.tokens:,} in {training.steps:,} updates",
        "Compute": f"{plan.flops:.2e} FLOPs",
        "Time": _planned_time(plan),
        "Checkpoint": f"{planning.gigabytes(plan.checkpoint_bytes)} on disk",
    }
    if plan.vocabulary:
        rows["Vocabulary"] = plan.vocabulary
    for name, value in rows.items():
        table.add_row(name, value)
    console = display.stdout()
    console.print(table)
    device = "CPU" if plan.machine.kind == "cpu" else "each GPU"
    table = display.table(f"Memory of {device}", "at most", "at the peak", right=("at most", "at the peak"))
    for part, size in memory.parts.items():
        if size:
            at_peak = memory.at_peak.get(part, 0)
            table.add_row(planning.NAMES[part], planning.gigabytes(size), planning.gigabytes(at_peak))
    table.add_row("together", "", planning.gigabytes(memory.peak), style="bold")
    console.print()
    console.print(table)
    usable = planning.gigabytes(plan.machine.usable)
    print(f"The peak comes {planning.MOMENTS[memory.moment]}; {usable} can be used.")


def _planned_time(plan: "Plan") -> str:
    from shared.cli import display

    if plan.seconds is None:
        return f"not known: the plans have no {plan.training.dtype} peak of {plan.machine.name}"
    days = plan.seconds / 86_400
    text = f"{days:,.1f} days" if days >= 2 else display.duration(plan.seconds)
    peak = plan.machine.peak[plan.training.dtype] / 1e12
    return f"{text}, assuming {plan.mfu:.0%} of {peak:,.1f} TFLOP/s a device (MFU)"
