"""Classic mistakes, planted on purpose: each turns a named check red, and is a case for `course debug`.

A week's `faults.py` holds a list `FAULTS`:

    from shared.curriculum.faults import Curve, Fault, replaced
    from shared.models import attention

    def _unscaled():
        return replaced(attention, "softmax_scale", lambda head_dim: 1.0)

    FAULTS = [
        Fault(
            name="no_scale",
            symptom="The loss falls slowly from the start; attention is nearly one-hot.",
            hint="How large is a dot product of two random vectors of length d?",
            caught_by="tests/unit/test_attention.py::test_plain_attention_equals_torch",
            plant=_unscaled,
            experiment=_short_training,
        ),
        …
    ]
"""

import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.curriculum import weeks
from shared.runtime.errors import CourseError

FILE = "faults.py"
ENVIRONMENT = "COURSE_FAULT"
CLAIM = "claim:"


@dataclass(frozen=True)
class Curve:
    """What an experiment shows: `y` against `x`, with axis labels that carry units."""

    x: Sequence[float]
    y: Sequence[float]
    x_label: str = "step"
    y_label: str = "loss (nats per token)"


@dataclass(frozen=True)
class Fault:
    """One mistake that a reader of the week could make.

    Attributes:
        name: lower-case words joined by underscores; unique in its week.
        symptom: what the one who made it would see.
        hint: where to look, without giving it away.
        caught_by: the check that turns red: a test, "tests/unit/test_x.py::test_y", or a claim, "claim:name".
        plant: returns a context manager inside which `shared` has the fault; patches with `replaced`.
        experiment: a run of seconds whose curve differs with the fault; None keeps it out of `course debug`.
    """

    name: str
    symptom: str
    hint: str
    caught_by: str
    plant: Callable[[], AbstractContextManager[Any]]
    experiment: Callable[[], Curve] | None = None


@contextmanager
def replaced(owner: object, attribute: str, new: object) -> Iterator[None]:
    """Put `new` in the place of `owner.attribute` inside the block.

    Where `owner` is a module, every module of `shared` and the notebook that imported the old one by name
    (`from shared.models.attention import attention`) get the new one too, and all get the old one back.

    Args:
        owner: a module, a class or an instance.
        attribute: its attribute; it must exist.
        new: what takes its place, for instance a function with the same signature.

    Raises:
        AttributeError: there is no such attribute: the fault no longer fits the code.
    """
    getattr(owner, attribute)
    inherited = attribute not in vars(owner)
    old = None if inherited else vars(owner)[attribute]  # the raw one: a staticmethod stays a staticmethod
    imported = isinstance(owner, ModuleType) and callable(old)
    elsewhere = _bindings(old, "shared", "__main__") if imported else []
    own = [(id(namespace), name) for namespace, name in _bindings(new, "shared")] if imported else []
    setattr(owner, attribute, new)
    for namespace, name in elsewhere:
        namespace[name] = new
    try:
        yield
    finally:
        if imported:
            # Modules that were first imported inside the block; where `new` already was, it stays.
            elsewhere += [one for one in _bindings(new, "shared") if (id(one[0]), one[1]) not in own]
        for namespace, name in elsewhere:
            namespace[name] = old
        if inherited:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, old)


def edited(owner: object, attribute: str, old: str, new: str) -> AbstractContextManager[None]:
    """`replaced`, by the function's own source with one fragment changed: the mistake as one would type it.

    Args:
        owner: a module or a class.
        attribute: one of its functions, written in Python.
        old: a fragment that stands in its source exactly once.
        new: what stands there instead.

    Raises:
        AttributeError, ValueError: no such function or fragment: the fault no longer fits the code.
    """
    function = getattr(owner, attribute)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise ValueError(f"{old!r} stands {source.count(old)} times in {attribute}; a fault needs it once")
    made: dict[str, Any] = {}
    code = compile(source.replace(old, new), f"<{attribute}, with a fault>", "exec")
    exec(code, inspect.unwrap(function).__globals__, made)
    return replaced(owner, attribute, made[attribute])


def _bindings(value: object, *packages: str) -> list[tuple[dict[str, Any], str]]:
    """Where `value` is bound to a name of a module: (namespace, name) pairs."""
    return [
        (vars(module), name)
        for module_name, module in list(sys.modules.items())
        if module_name.partition(".")[0] in packages and isinstance(module, ModuleType)
        for name, bound in list(vars(module).items())
        if bound is value
    ]


def load(week: str, root: Path | None = None) -> tuple[Fault, ...]:
    """The faults of a week, checked.

    Raises:
        CourseError: no such week or no `faults.py`, or an entry of it is malformed.
    """
    found = weeks.find(week, root)
    module = weeks.import_file(found.folder / FILE, f"course_{found.slug.replace('-', '_')}_faults")
    shown = f"{found.folder.name}/{FILE}"
    faults = getattr(module, "FAULTS", None)
    if not isinstance(faults, list | tuple) or not all(isinstance(fault, Fault) for fault in faults):
        raise CourseError(f"{shown} must define FAULTS, a list of Fault(...).")
    seen: set[str] = set()
    for fault in faults:
        if fault.name in seen:
            raise CourseError(f"{shown}: fault {fault.name!r} is there twice; give each its own name.")
        seen.add(fault.name)
        if not fault.caught_by.startswith(CLAIM) and "::" not in fault.caught_by:
            raise CourseError(
                f"{shown}, fault {fault.name!r}: caught_by must be 'path/to/test.py::test_name' or "
                f"'claim:name', not {fault.caught_by!r}."
            )
    return tuple(faults)


def find(week: str, name: str, root: Path | None = None) -> Fault:
    """The fault `name` of a week.

    Raises:
        CourseError: no such week or fault.
    """
    faults = load(week, root)
    for fault in faults:
        if fault.name == name:
            return fault
    raise CourseError(f"{week} has no fault {name!r}; it has {', '.join(fault.name for fault in faults)}.")


@contextmanager
def planted(week: str, name: str, root: Path | None = None) -> Iterator[Fault]:
    """`shared` with the fault inside the block, and as it was after it.

    Raises:
        CourseError: no such week or fault.
    """
    fault = find(week, name, root)
    with fault.plant():
        yield fault


def from_environment() -> AbstractContextManager[Fault] | None:
    """The fault that $COURSE_FAULT names as "week1/no_scale", for a whole process; None if it is not set.

    Raises:
        CourseError: no such week or fault.
    """
    value = os.environ.get(ENVIRONMENT)
    if not value:
        return None
    week, _, name = value.partition("/")
    return planted(week, name)
