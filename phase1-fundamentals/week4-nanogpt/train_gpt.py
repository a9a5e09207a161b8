r"""Train a GPT for real, from a plan that is printed first and kept to: 124M, 350M, 1.3B, on any machine.

    python phase1-fundamentals/week4-nanogpt/train_gpt.py \
        --config configs/training/shakespeare-speedrun.yaml
    torchrun --nproc-per-node 2 phase1-fundamentals/week4-nanogpt/train_gpt.py \
        --config configs/training/gpt-1.3b-h100x2.yaml --set data.path=FOLDER

This is `course train`, its options and its run folder, with one thing before it: parameters, FLOPs, memory
and time of the run, for as many processes as were started and the machine that they are on, go to stderr, and
a run that cannot fit is refused there (status 2, with what would make it fit) before a token is read.

DDP or FSDP2 is `training.parallel` in the configuration. --dry-run prints the plan and ends; with --gpu and
--gpus it is made for another machine. Whoever trusts the plan less than the machine uses `course train`.
"""

import argparse
import contextlib
import os
import sys

from shared.cli import main


def refused(arguments: list[str]) -> int:
    """Print the plan on stderr.

    Args:
        arguments: those of the command line, for `course train`.

    Returns:
        0 if the run fits, else the exit status; the reason has been printed.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--scale", default="auto")
    own.add_argument("--json", action="store_true")  # that is for the result
    asked, rest = own.parse_known_args(arguments)
    machine = ["--gpu", "cpu"] if asked.scale == "cpu" else []
    processes = os.environ.get("WORLD_SIZE", "1")
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") == "0":
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        else:  # all come to the same verdict; one of them says it
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        return main(["train", *rest, *machine, "--dry-run", "--gpus", processes])


def run(arguments: list[str]) -> int:
    """Plan, then train; returns the exit status."""
    alone = {"--dry-run", "--help", "-h"}.intersection(arguments)
    return (0 if alone else refused(arguments)) or main(["train", *arguments])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
