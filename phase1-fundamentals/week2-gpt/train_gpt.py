r"""Train a GPT at full scale: GPT-2 124M … 1.5B on a folder of text of your own, on one process or several.

    python phase1-fundamentals/week2-gpt/train_gpt.py --config configs/training/shakespeare-speedrun.yaml
    torchrun --nproc-per-node 2 phase1-fundamentals/week2-gpt/train_gpt.py \
        --config configs/training/gpt2-124m.yaml --set data.path=FOLDER

This is `course train` under a name that torchrun can start: the same options, the same run folder, the same
planned cost before it begins. Ctrl-C saves and ends; --resume goes on.
"""

import sys

from shared.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
