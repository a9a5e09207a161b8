"""Generation with a KV cache: the course's `generate` against `transformers`' on the same GPT-2 weights."""

import dataclasses
from typing import Any

import torch

from shared.evaluation.benchmarks import paired_ratio
from shared.inference.generation import generate
from shared.models.gpt import GPT, PRESETS, GPTConfig
from shared.models.model_utils import gpt_to_hf
from shared.runtime import scale

# Layers × width, with the vocabulary that a model of this size has in the course; the last is GPT-2 itself.
SHAPES = {
    "4×128, 1k vocabulary": GPTConfig(1024, 256, num_layers=4, num_heads=4, d_model=128),
    "4×256, 8k vocabulary": GPTConfig(8192, 512, num_layers=4, num_heads=4, d_model=256),
    "6×384, 8k vocabulary": GPTConfig(8192, 512, num_layers=6, num_heads=6, d_model=384),
    "gpt2 (124M)": PRESETS["gpt2"],
}
PROMPT = 32  # tokens


def run(quick: bool = False, pairs: int = 5) -> dict[str, Any]:
    """Time to continue prompts of 32 tokens greedily by 128, float32, for batches of 1 and 8.

    Both sides get the same weights (random: the time does not depend on them), threads and allocator
    settings. Every call starts from the prompt, so reading it, setting up the cache and rearranging the
    weights are included. Ratio: `transformers`' time over the course's, median and extremes over the pairs.

    Args:
        quick: the smallest model only, 16 tokens, two pairs.
        pairs: timed runs of each side, in turn.

    Returns:
        One row a shape and batch: ratios, milliseconds a token (a step of the whole batch), and which
        fraction of the tokens of both sides is the same, and how many different ones there were (a model that
        repeats itself would make the comparison easy).
    """
    machine = scale.start("cpu", quiet=True)
    shapes = dict(list(SHAPES.items())[:1]) if quick else SHAPES
    new, pairs = (16, 2) if quick else (128, pairs)
    rows = [
        row
        for name, config in shapes.items()
        for row in _compare(name, dataclasses.replace(config, init_std=0.1), new, pairs)
    ]
    return {"threads": machine.threads, "new_tokens": new, "generation": rows}


def _compare(name: str, config: GPTConfig, new: int, pairs: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = GPT(config).eval()
    hf = gpt_to_hf(model).eval()
    rows = []
    for batch in (1, 8):
        prompts = torch.randint(config.vocab_size, (batch, PROMPT))
        found: dict[str, list[list[int]]] = {}

        def theirs(prompts=prompts, found=found):
            with torch.inference_mode():
                out = hf.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=new,
                    min_new_tokens=new,  # an end token would stop it early
                    do_sample=False,
                    pad_token_id=0,
                )
            found["theirs"] = out[:, PROMPT:].tolist()

        def ours(prompts=prompts, found=found):
            found["ours"] = generate(model, prompts.tolist(), new)

        timing = paired_ratio(theirs, ours, pairs=pairs)
        measured = timing.summary()
        a, b = (torch.tensor(found[side]) for side in ("ours", "theirs"))
        rows.append(
            {
                "model": name,
                "batch": batch,
                "ratio": measured["ratio"],
                "ratio_min": measured["ratio_min"],
                "ratio_max": measured["ratio_max"],
                "course_ms_per_token": round(1000 * measured["candidate_seconds"] / new, 2),
                "transformers_ms_per_token": round(1000 * measured["baseline_seconds"] / new, 2),
                "same_tokens": (a == b).float().mean().item(),
                "different_tokens": a.unique().numel(),
            }
        )
    return rows


def main() -> None:
    """Print the table."""
    from shared.evaluation.analysis import table

    result = run()
    rows = result["generation"]
    print(table([list(row.values()) for row in rows], list(rows[0])))


if __name__ == "__main__":
    main()
