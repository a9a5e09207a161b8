"""The base model's card: its data, recipe, scores and samples, written from the run itself."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shared.data.tokenizers import END_OF_TEXT, Tokenizer
from shared.evaluation.metrics import gzip_bits_per_byte, zstd_bits_per_byte
from shared.evaluation.ngram import KneserNey
from shared.inference.generation import generate
from shared.models.gpt import GPT, GPTConfig
from shared.runtime import hardware
from shared.training.config import Run
from shared.training.progress import duration
from shared.training.trainer import History

CARD, CURVE = "README.md", "curve.svg"
ORDER = 8  # of the n-gram over bytes
SEPARATOR = b"\0"  # between two documents, for those that have no end-of-text token
PIECE = 4096  # tokens taken together for a sample of the training text
# Written down before the first run, and shown whatever came out.
PROMPTS = (
    "function os.path.join(",
    "function math.sqrt(x, /)\n\n",
    "class collections.OrderedDict(dict)\n\n",
    "module json\n\n",
    "topic lambda\n\n",
    "source shop.basket\n\n",
    "def fibonacci(n):\n",
    "The capital of France is",
)
NEW_TOKENS = 64
WAYS = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8, top-p 0.95, seed 0": {"temperature": 0.8, "top_p": 0.95, "seed": 0},
}


# -------------------------------------------------------------------------------------------- baselines


def plain_text(tokens: np.ndarray, tokenizer: Tokenizer) -> bytes:
    """The bytes of a stream of documents, with `SEPARATOR` where one ends."""
    tokens = np.asarray(tokens)
    ends = np.flatnonzero(tokens == tokenizer.special_tokens[END_OF_TEXT])
    pieces = np.split(tokens, ends)
    return SEPARATOR.join(
        tokenizer.decode_bytes((piece if i == 0 else piece[1:]).tolist()) for i, piece in enumerate(pieces)
    )


def sample_tokens(tokens: np.ndarray, count: int) -> np.ndarray:
    """About `count` ids in runs of `PIECE`, evenly spread over the stream; all of it if it is shorter."""
    if len(tokens) <= count:
        return np.asarray(tokens)
    starts = np.linspace(0, len(tokens) - PIECE, max(1, count // PIECE)).astype(int)
    return np.concatenate([tokens[start : start + PIECE] for start in starts])


def baselines(
    training: Mapping[str, np.ndarray],
    validation: Mapping[str, np.ndarray],
    shares: Mapping[str, float],
    tokenizer: Tokenizer,
    megabytes: float,
) -> dict[str, dict[str, float]]:
    """Bits per byte of the held-out text without a neural network.

    Args:
        training, validation: corpus -> (N,) ids.
        shares: of the corpora in the text that the second and third learn from.
        tokenizer: for the ids' bytes.
        megabytes: about how much they learn from, in 10⁶ bytes.

    Returns:
        "gzip -9", "zstd -19, primed" and "8-gram" -> corpus -> bits per byte, and "all" over all of it. The
        documents' ends are coded too, and not counted as bytes: as for the model.
    """
    before = _training_sample(training, shares, tokenizer, megabytes)
    texts = {name: plain_text(tokens, tokenizer) for name, tokens in validation.items()}
    sizes = {name: len(text) - text.count(SEPARATOR) for name, text in texts.items()}
    counts = KneserNey(ORDER, 256).fit(np.frombuffer(before, np.uint8))
    ways = {
        "gzip -9": lambda text: gzip_bits_per_byte(text) * len(text),
        "zstd -19, primed": lambda text: zstd_bits_per_byte(text, before) * len(text),
        f"{ORDER}-gram": lambda text: counts.bits_per_byte(np.frombuffer(text, np.uint8), 1),
    }
    result = {}
    for way, bits_of in ways.items():
        bits = {name: bits_of(text) for name, text in texts.items()}
        result[way] = {name: bits[name] / sizes[name] for name in texts}
        result[way]["all"] = sum(bits.values()) / sum(sizes.values())
    return result


def _training_sample(
    training: Mapping[str, np.ndarray], shares: Mapping[str, float], tokenizer: Tokenizer, megabytes: float
) -> bytes:
    texts = []
    for name, tokens in training.items():
        trial = sample_tokens(tokens, 16 * PIECE)
        bytes_per_token = len(plain_text(trial, tokenizer)) / len(trial)
        wanted = int(shares[name] * megabytes * 1e6 / bytes_per_token)
        texts.append(plain_text(sample_tokens(tokens, wanted), tokenizer))
    return SEPARATOR.join(texts)


# -------------------------------------------------------------------------------------- samples and curve


def samples(model: GPT, tokenizer: Tokenizer) -> dict[str, dict[str, str]]:
    """Way of choosing -> prompt -> continuation, of `NEW_TOKENS` tokens at most, for each of `PROMPTS`.

    Every prompt follows an end of text, as a document does in training.
    """
    end = tokenizer.special_tokens[END_OF_TEXT]
    prompts = {prompt: [end, *tokenizer.encode(prompt)] for prompt in PROMPTS}
    return {
        way: {
            prompt: tokenizer.decode(generate(model, [ids], NEW_TOKENS, stop_ids=[end], **settings)[0])
            for prompt, ids in prompts.items()
        }
        for way, settings in WAYS.items()
    }


def curve(history: History) -> str:
    """Training and held-out loss against tokens seen, as SVG."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "pydoc-gpt"  # the same figure for the same run
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    logged = _thinned([entry for entry in history if "loss" in entry], 400)
    axes.plot([e["tokens"] / 1e6 for e in logged], [e["loss"] for e in logged], lw=0.8, label="training")
    scored = [entry for entry in history if "val_loss" in entry]
    axes.plot([e["tokens"] / 1e6 for e in scored], [e["val_loss"] for e in scored], "o-", label="held out")
    axes.set(title="Loss of the base model", xlabel="tokens seen, millions", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def points(history: History, most: int = 100) -> list[dict[str, float]]:
    """The run's losses: every evaluation, and at most about `most` of the other entries, evenly spread.

    Each has step, tokens and loss (of one batch, nats per token); an evaluation also val_loss (nats per
    token) and val_bits_per_byte, of all held-out text.
    """
    kept = {id(entry) for entry in _thinned([entry for entry in history if "loss" in entry], most)}
    keys = ("step", "tokens", "loss", "val_loss", "val_bits_per_byte")
    return [
        {key: entry[key] for key in keys if key in entry}
        for entry in history
        if id(entry) in kept or "val_loss" in entry
    ]


def _thinned(entries: list[dict[str, float]], most: int) -> list[dict[str, float]]:
    return entries[:: max(1, -(-len(entries) // most))]


# -------------------------------------------------------------------------------------------------- card


def render(
    *,
    run: Run,
    config: GPTConfig,
    parameters: int,
    weight_bytes: int,
    manifest: Mapping[str, Any],
    mix: Mapping[str, float],
    baseline_megabytes: float,
    history: History,
    metrics: Mapping[str, Any],
    samples: Mapping[str, Mapping[str, str]],
    device: torch.device,
) -> str:
    """The model card, in Markdown.

    Args:
        run, config: what was asked for.
        parameters, weight_bytes: of the saved model.
        manifest: of the token artefact.
        mix: corpus -> share of the sequences.
        baseline_megabytes: of training text for the baselines.
        history: of the trainer.
        metrics: scores of the saved model, with "baselines".
        samples: from `samples`.
        device: where it was trained.
    """
    last = [entry for entry in history if "seconds" in entry][-1]
    sections = [
        _front_matter(mix),
        _opening(run, config, parameters, weight_bytes, manifest),
        _use(),
        _scores(metrics, mix, manifest, baseline_megabytes),
        _training(run, history, last, device),
        _data(mix, manifest, last["tokens"]),
        _samples_section(samples),
        _limits(config, mix),
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _front_matter(mix: Mapping[str, float]) -> str:
    return f"""---
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [pretrained, python, {", ".join(mix)}]
---"""


def _opening(
    run: Run, config: GPTConfig, parameters: int, weight_bytes: int, manifest: Mapping[str, Any]
) -> str:
    return f"""# {run.path.stem}

A base language model of {parameters:,} parameters, trained from scratch on the documentation and the source
code of a Python environment. It continues text; it follows no instructions. This page was written by the run
that trained the model.

{
        table(
            ("architecture", "Qwen3ForCausalLM"),
            [
                ("blocks × width", f"{config.num_layers} × {config.d_model}"),
                ("query heads, key/value heads", f"{config.num_heads}, {config.kv_heads}"),
                ("SwiGLU hidden width", config.hidden),
                ("vocabulary", f"{config.vocab_size:,}, byte-level BPE"),
                ("context", f"{config.context_length} tokens"),
                ("embeddings", "tied" if config.tie_embeddings else "not tied"),
                ("weights", f"bfloat16, {weight_bytes / 1e6:.1f} MB"),
            ],
        )
    }"""


def _use() -> str:
    return """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
ids = tokenizer("<|endoftext|>function os.path.join(", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=64, do_sample=False)[0]))
```

A document begins after `<|endoftext|>` with what it is and its full name: `function os.path.join(a, *p)`,
`class …`, `module …`, `topic …`, or `source …` for code, then an empty line, then the text. `<|im_start|>`,
`<|im_end|>` and `<pad>` have ids and were never seen in training: their vectors are untrained."""


def _scores(
    metrics: Mapping[str, Any],
    mix: Mapping[str, float],
    manifest: Mapping[str, Any],
    baseline_megabytes: float,
) -> str:
    names = list(mix)
    own = {"all": metrics["bits_per_byte"], **{n: metrics[f"bits_per_byte_{n}"] for n in names}}
    results = {"this model": own, **metrics["baselines"]}
    ordered = sorted(results, key=lambda way: results[way]["all"])
    rows = [(way, *[f"{results[way][column]:.3f}" for column in ("all", *names)]) for way in ordered]
    beaten = [way for way in results if results[way]["all"] > own["all"]]
    others = [way for way in results if way not in ("this model", *beaten)]
    verdict = f"It is better than {', '.join(beaten) or 'none of the others'}."
    if others and beaten:
        verdict += f" It is not better than {', '.join(others)}."
    overlap = ", ".join(
        f"{manifest['corpora'][name]['validation']['seen_lines']:.1%} of {name}" for name in names
    )
    return f"""## Bits per byte on packages it has not seen

{table(("", "all", *names), rows)}

{verdict}

The score is that of the saved bfloat16 weights over the whole held-out text, in windows that do not overlap
({metrics["loss"]:.4f} nats per token). gzip and zstd read on through all held-out documents of a corpus,
where the model forgets at the end of its window. The n-gram counts bytes; it and zstd's dictionary have
learnt from {baseline_megabytes:g} MB of the same training text, mixed by the same shares.

Held out, in every corpus: {", ".join(manifest["held_out"])}.

Exact copies of training texts were taken out before. Of the characters in held-out lines of at least 40,
these shares stand in the training text too (licence headers, idioms, code that packages share): {overlap}."""


def _training(run: Run, history: History, last: Mapping[str, float], device: torch.device) -> str:
    settings = run.training
    scored = [entry for entry in history if "val_loss" in entry]
    rows = [
        (
            f"{entry['step']:,}",
            f"{entry['tokens'] / 1e6:.2f}",
            f"{entry['loss']:.3f}",
            f"{entry['val_loss']:.3f}",
            f"{entry['val_bits_per_byte']:.3f}",
        )
        for entry in scored
    ]
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware.cpu_name()
    count = torch.get_num_threads()
    threads = "" if device.type == "cuda" else f", {count} thread{'s' if count > 1 else ''}"
    choices = {
        "updates": f"{settings.steps:,}",
        "batch": f"{settings.batch_size * settings.accumulation} × {settings.context_length} tokens",
        "optimiser": settings.optimizer,
        "peak rates": f"AdamW {settings.learning_rate:g}"
        + (f", Muon {settings.muon_learning_rate:g}" if settings.optimizer == "muon" else ""),
        "schedule": f"{settings.schedule}, {settings.warmup_steps} updates of warm-up, decay over "
        f"{settings.decay_fraction:.0%}",
        "weight decay, clipping": f"{settings.weight_decay:g}, {settings.clip:g}",
        "number format": settings.dtype,
        "seed": settings.seed,
        "trained": f"{last['tokens']:,.0f} tokens in {duration(last['seconds'])} "
        f"({last['tokens'] / last['seconds']:,.0f} tokens/s) on {on}{threads}",
    }
    return f"""## Training

{table(("setting", "value"), list(choices.items()))}

![Loss of training and held-out text against tokens seen](curve.svg)

{table(("update", "million tokens", "training loss", "held-out loss", "held-out bits per byte"), rows)}

Losses are in nats per token; those of training are of one batch."""


def _data(mix: Mapping[str, float], manifest: Mapping[str, Any], seen: float) -> str:
    rows = []
    for name, share in mix.items():
        part = manifest["corpora"][name]["training"]
        rows.append(
            (
                name,
                f"{share:.0%}",
                f"{part['documents']:,}",
                f"{part['bytes'] / 1e6:.1f}",
                f"{part['tokens'] / 1e6:.2f}",
                f"{share * seen / part['tokens']:.2f}",
                f"{manifest['corpora'][name]['validation']['bytes'] / 1e6:.2f}",
            )
        )
    header = (
        "corpus",
        "share of a batch",
        "documents",
        "MB",
        "million tokens",
        "epochs",
        "held out, MB",
    )
    return f"""## Data

{table(header, rows)}

The corpora are the docstrings, the language reference and the sources of the packages below, as installed.

<details><summary>Packages and licences</summary>

{table(("package", "version", "licence", "documents", "MB", ""), _packages(mix, manifest))}

</details>"""


def _packages(mix: Mapping[str, float], manifest: Mapping[str, Any]) -> list[tuple[object, ...]]:
    totals: dict[str, dict[str, Any]] = {}
    for name in mix:
        for part in ("training", "validation"):
            for package, row in manifest["corpora"][name][part]["packages"].items():
                total = totals.setdefault(package, {**row, "documents": 0, "bytes": 0})
                total["documents"] += row["documents"]
                total["bytes"] += row["bytes"]
    return [
        (
            package,
            row["version"],
            row["license"],
            f"{row['documents']:,}",
            f"{row['bytes'] / 1e6:.2f}",
            "held out" if package in manifest["held_out"] else "",
        )
        for package, row in totals.items()
    ]


def _samples_section(samples: Mapping[str, Mapping[str, str]]) -> str:
    blocks = []
    for way, texts in samples.items():
        blocks.append(f"### {way.capitalize()}")
        for prompt, text in texts.items():
            fence = "`" * max(4, _longest_run(prompt + text, "`") + 1)
            blocks.append(f"{fence}text\n{prompt}⟨…⟩{text}\n{fence}")
    body = "\n\n".join(blocks)
    return f"""## Samples

As they came, none chosen: the prompts were fixed before the first run. What follows ⟨…⟩ is the model's,
at most {NEW_TOKENS} tokens.

{body}"""


def _longest_run(text: str, character: str) -> int:
    longest = run = 0
    for c in text:
        run = run + 1 if c == character else 0
        longest = max(longest, run)
    return longest


def _limits(config: GPTConfig, mix: Mapping[str, float]) -> str:
    return f"""## What it cannot do

- Answer questions or follow instructions: it has seen documents only ({", ".join(mix)}), no dialogue.
- Be believed: it writes what looks like documentation, and invents arguments, return values and behaviour.
  Nobody has run its code.
- Know the world outside Python packages, or any language but English and Python.
- See more than {config.context_length} tokens at once.
- Be taken for a filter: texts of the training data come through as they are, with names and addresses that
  stand in public sources, and it may repeat passages whose licences (above) ask for attribution."""
