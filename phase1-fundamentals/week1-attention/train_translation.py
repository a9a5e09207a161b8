r"""Train the encoder–decoder on real translation: Multi30k, or WMT14 English–German as the paper did.

    python phase1-fundamentals/week1-attention/train_translation.py \
        --config configs/training/translation-multi30k.yaml
    torchrun --nproc-per-node 2 phase1-fundamentals/week1-attention/train_translation.py \
        --config configs/training/translation-wmt14-base.yaml

The data come from $COURSE_DATA/multi30k or $COURSE_DATA/wmt14 if there, else through `datasets`. Checkpoints,
TensorBoard log, history and the model land in one folder; Ctrl-C saves, --resume goes on.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from shared.recipes.translation import describe, load_translation_run, train_translator, translation_data
from shared.runtime import artifacts
from shared.runtime import scale as scales
from shared.runtime.errors import CourseError
from shared.training import distributed_utils


def arguments() -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a configs/training/translation-*.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: training.steps=100"
    )
    parser.add_argument("--out", type=Path, help="folder of the run [default: runs/NAME in the artefacts]")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--scale", default="auto", help="auto, cpu, gpu or h100x2")
    return parser.parse_args()


def main() -> None:
    """Load, train, score; the result is one line of JSON on standard output."""
    asked = arguments()
    machine = scales.start(asked.scale, quiet=True)
    run = load_translation_run(asked.config, asked.set, dtype=str(machine.dtype).removeprefix("torch."))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    directory = asked.out or artifacts.home() / "runs" / asked.config.stem
    device = distributed_utils.setup() if world_size > 1 else machine.device
    try:
        data = translation_data(run.task)
        if rank == 0:
            print(describe(run, data, world_size), f"run folder: {directory}", sep="\n", file=sys.stderr)
        result = train_translator(
            run, data, directory, device=device, resume=asked.resume, rank=rank, world_size=world_size
        )
    finally:
        distributed_utils.cleanup()
    if result is not None:
        print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except CourseError as error:
        print(f"train_translation: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"train_translation: {interrupt or 'stopped before training began.'}", file=sys.stderr)
        sys.exit(130)
