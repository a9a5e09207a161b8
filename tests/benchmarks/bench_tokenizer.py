"""Training the course's own BPE tokenizer against the `tokenizers` library, on one thread.

    python tests/benchmarks/bench_tokenizer.py

Each training runs in a process of its own, the two implementations in turn, so that memory is measured apart
and a slow moment of the machine hits both.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MERGES = 8192
TEXT_BYTES = 10_000_000
PAIRS = 5
IMPLEMENTATIONS = ("scratch", "library")


def run(quick: bool = False) -> dict[str, Any]:
    """Train both on the same part of `python-docs`, and compare time, memory and merges.

    Args:
        quick: one pair on a tenth of the text instead of five on 10 MB.

    Returns:
        bytes, merges, pairs; for each implementation the median seconds and the peak memory of its process in
        MB; the median over the pairs of scratch time / library time; whether all merges are the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.json"
        size = _write_texts(texts, TEXT_BYTES // 10 if quick else TEXT_BYTES)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in IMPLEMENTATIONS}
        for _ in range(1 if quick else PAIRS):
            for name in IMPLEMENTATIONS:
                results[name].append(_train_in_process(name, texts))
    ratios = [
        ours["seconds"] / theirs["seconds"]
        for ours, theirs in zip(results["scratch"], results["library"], strict=True)
    ]
    found = {
        name: {
            "seconds": round(statistics.median(one["seconds"] for one in runs), 3),
            "peak_rss_mb": round(max(one["peak_rss_mb"] for one in runs), 1),
        }
        for name, runs in results.items()
    }
    fingerprints = {one["fingerprint"] for runs in results.values() for one in runs}
    return {
        "bytes": size,
        "merges": results["scratch"][0]["merges"],
        "pairs": len(ratios),
        **found,
        "ratio": round(statistics.median(ratios), 3),
        "same_merges": len(fingerprints) == 1,
    }


def _write_texts(path: Path, limit: int) -> int:
    """Every n-th document of `python-docs`, so from all packages, up to `limit` bytes, as a JSON list.

    Returns:
        Bytes of the texts.
    """
    from shared.data import corpora

    texts, size = [], 0
    corpus = corpora.load("python-docs")
    for document in corpus.documents[:: corpus.manifest["bytes"] // limit]:
        if size >= limit:
            break
        texts.append(document.text)
        size += len(document.text.encode())
    path.write_text(json.dumps(texts), encoding="utf-8")
    return size


def _train_in_process(implementation: str, texts: Path) -> dict[str, Any]:
    one_thread = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, __file__, implementation, str(texts)],
        env={**os.environ, **one_thread},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def _train(implementation: str, path: Path) -> dict[str, Any]:
    from shared.data.tokenizers import BPETokenizer, LibraryTokenizer

    if implementation == "library":
        import tokenizers  # noqa: F401 - its import is not part of the training
    kind = BPETokenizer if implementation == "scratch" else LibraryTokenizer
    texts = json.loads(path.read_text(encoding="utf-8"))
    started = time.perf_counter()
    tokenizer = kind.train(texts, MERGES + 257)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_rss_mb": _peak_rss_mb(),
        "merges": len(tokenizer.merges),
        "fingerprint": tokenizer.fingerprint(),
    }


def _peak_rss_mb() -> float:
    """Peak resident memory of this process; `ru_maxrss` on Linux would count the process that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3  # kB
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    """Run the benchmark and print it as JSON; or, with two arguments, one training."""
    if len(sys.argv) == 3:
        print(json.dumps(_train(sys.argv[1], Path(sys.argv[2]))))
        return
    print(json.dumps(run(quick="--quick" in sys.argv), indent=2))


if __name__ == "__main__":
    main()
