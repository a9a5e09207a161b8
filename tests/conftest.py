"""Every test, and every process that a test starts, runs without network and with its share of the cores."""

import os
import sys
from pathlib import Path

SEALED = Path(__file__).parent / "sealed"


def _seal() -> None:
    sys.path.insert(0, str(SEALED))
    try:
        sys.modules.pop("sitecustomize", None)
        import sitecustomize  # noqa: F401 - importing it seals this process
    finally:
        sys.path.remove(str(SEALED))
    rest = os.environ.get("PYTHONPATH", "")
    if str(SEALED) not in rest.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SEALED), rest]))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _share_the_cores() -> None:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = str(max(1, cores // workers))
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(variable, threads)


_seal()
_share_the_cores()  # before torch is imported: it reads OMP_NUM_THREADS once
os.environ.pop("COURSE_THREADS", None)  # a reader's setting is not the tests'
