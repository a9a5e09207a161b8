r"""A pytest plugin that plants one fault for the whole test process and records how each test ended.

    COURSE_FAULT=week1/no_scale COURSE_REPORT=report.json \
        pytest -p shared.curriculum.fault_plugin tests/unit/test_attention.py::test_name

The report is a list of {"test", "phase", "outcome", "error"}; `error` names the exception, or is "assertion"
for every kind of failed check.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shared.curriculum import faults

REPORT = "COURSE_REPORT"


class _FaultPlugin:
    def __init__(self) -> None:
        self.planted = faults.from_environment()
        self.records: list[dict[str, Any]] = []
        if self.planted is not None:
            self.planted.__enter__()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Any:
        report = yield
        error = call.excinfo.value if call.excinfo is not None else None
        self.records.append(
            {
                "test": item.nodeid,
                "phase": report.when,
                "outcome": report.outcome,
                "error": None if error is None else kind_of(error),
            }
        )
        return report

    def pytest_unconfigure(self) -> None:
        if self.planted is not None:
            self.planted.__exit__(None, None, None)
        if path := os.environ.get(REPORT):
            Path(path).write_text(json.dumps(self.records), encoding="utf-8")


def kind_of(error: BaseException) -> str:
    """ "assertion" if `error` is a failed check (or a group of them), otherwise the exception's name."""
    if isinstance(error, BaseExceptionGroup):
        kinds = {kind_of(inner) for inner in error.exceptions}
        return kinds.pop() if len(kinds) == 1 else type(error).__name__
    if isinstance(error, AssertionError | pytest.fail.Exception):
        return "assertion"
    if type(error).__name__ == "GradcheckError":  # torch's numerical check of gradients raises a RuntimeError
        return "assertion"
    return type(error).__name__


def pytest_configure(config: pytest.Config) -> None:
    """Plant the fault before any test module is imported."""
    config.pluginmanager.register(_FaultPlugin(), "course-fault")
