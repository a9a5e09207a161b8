"""Faults: planted, seen by everything that imported the code, and gone afterwards."""

import subprocess
import sys
import types

import pytest
from course_root import WEEK
from torch.autograd.gradcheck import GradcheckError

from shared.curriculum import fault_plugin, faults
from shared.curriculum.faults import edited, replaced
from shared.runtime.errors import CourseError

FAULTS = """\
from shared.curriculum.faults import Fault, replaced
from shared.runtime import files

def _plant():
    return replaced(files, "sha256_bytes", lambda data: "0" * 64)

FAULTS = [
    Fault("no_hash", "All hashes are equal.", "Look at the hash.", "tests/unit/test_x.py::test_y", _plant),
]
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / WEEK).mkdir(parents=True)
    (tmp_path / WEEK / faults.FILE).write_text(FAULTS)
    return tmp_path


@pytest.fixture
def modules(monkeypatch):
    """A module of `shared` with a function, and another that has imported it by name."""
    owner, importer = types.ModuleType("shared.some_owner"), types.ModuleType("shared.some_importer")
    owner.double = lambda x: 2 * x
    importer.double, importer.alias = owner.double, owner.double
    for module in (owner, importer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return owner, importer


def test_a_replacement_reaches_modules_that_imported_the_name_and_is_undone(modules):
    owner, importer = modules
    old = owner.double
    with replaced(owner, "double", lambda x: 3 * x):
        assert [f(2) for f in (owner.double, importer.double, importer.alias)] == [6, 6, 6]
    assert [owner.double, importer.double, importer.alias] == [old, old, old]


def test_a_replacement_is_undone_after_an_exception(modules):
    owner, importer = modules
    old = owner.double
    with pytest.raises(RuntimeError), replaced(owner, "double", abs):
        raise RuntimeError
    assert owner.double is old
    assert importer.double is old


def test_a_module_that_is_imported_inside_the_block_gets_the_old_one_back(modules, monkeypatch):
    owner, _ = modules
    old = owner.double
    late = types.ModuleType("shared.some_late_importer")
    with replaced(owner, "double", lambda x: 0):
        late.double = owner.double
        monkeypatch.setitem(sys.modules, late.__name__, late)
    assert late.double is old


def test_what_takes_the_place_stays_where_it_was_before(modules):
    owner, importer = modules
    owner.triple = importer.triple = triple = lambda x: 3 * x
    importer.nothing = None
    with replaced(owner, "double", owner.triple):
        assert importer.double(2) == 6
    assert (owner.triple, importer.triple) == (triple, triple)
    with replaced(owner, "double", None):
        assert importer.double is None
    assert importer.nothing is None


def test_methods_static_methods_and_inherited_ones_come_back_as_they_were():
    class Parent:
        def plain(self):
            return "plain"

        @staticmethod
        def static():
            return "static"

    class Child(Parent):
        pass

    with replaced(Parent, "static", staticmethod(lambda: "fault")):
        assert Parent().static() == "fault"
    assert isinstance(vars(Parent)["static"], staticmethod)
    with replaced(Child, "plain", lambda self: "fault"):
        assert Child().plain() == "fault"
        assert Parent().plain() == "plain"
    assert "plain" not in vars(Child)
    assert Child().plain() == "plain"


def test_an_edited_function_differs_in_one_fragment_and_comes_back():
    from shared.runtime import files

    with edited(files, "sha256_bytes", "hashlib.sha256", "hashlib.md5"):
        assert len(files.sha256_bytes(b"x")) == 32
        assert len(files.sha256_json([])) == 32
    assert len(files.sha256_bytes(b"x")) == 64


@pytest.mark.parametrize("fragment", ["no such fragment", "a"])
def test_an_edit_that_does_not_fit_in_exactly_one_place_is_an_error(fragment):
    from shared.runtime import files

    with pytest.raises(ValueError, match="a fault needs it once"):
        edited(files, "sha256_bytes", fragment, "")


def test_an_attribute_that_is_gone_is_an_error_not_a_silent_success(modules):
    with pytest.raises(AttributeError), replaced(modules[0], "triple", abs):
        pass


def test_a_planted_fault_changes_shared_inside_the_block_only(root):
    from shared.runtime import files

    healthy = files.sha256_bytes(b"x")
    with faults.planted("week1", "no_hash", root) as fault:
        assert files.sha256_bytes(b"x") == "0" * 64
        assert fault.name == "no_hash"
    assert files.sha256_bytes(b"x") == healthy


def test_an_unknown_fault_is_refused_with_those_there_are(root):
    with pytest.raises(CourseError, match=r"week1 has no fault 'nope'; it has no_hash\."):
        faults.find("week1", "nope", root)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("FAULTS = 3\n", "must define FAULTS"),
        ("x = 1\n", "must define FAULTS"),
        (FAULTS.replace("test_x.py::test_y", "test_x.py"), "fault 'no_hash': caught_by must be"),
        (FAULTS.replace("\n]", "\n] * 2"), "fault 'no_hash' is there twice"),
        ("import nothing_of_the_kind\n", r"faults.py does not load: ModuleNotFoundError.*\(line 1\)"),
    ],
)
def test_malformed_faults_are_reported(root, text, complaint):
    (root / WEEK / faults.FILE).write_text(text)
    with pytest.raises(CourseError, match=complaint):
        faults.load("week1", root)


def test_a_week_without_faults_says_so(root):
    with pytest.raises(CourseError, match="There is no week2-gpt/faults.py"):
        faults.load("week2", root)


def test_failed_checks_are_told_from_other_exceptions():
    assert fault_plugin.kind_of(AssertionError("x")) == "assertion"
    assert fault_plugin.kind_of(pytest.fail.Exception("x")) == "assertion"
    assert fault_plugin.kind_of(ExceptionGroup("two", [AssertionError(), AssertionError()])) == "assertion"
    assert fault_plugin.kind_of(ExceptionGroup("two", [AssertionError(), KeyError()])) == "ExceptionGroup"
    assert fault_plugin.kind_of(KeyError("x")) == "KeyError"
    assert fault_plugin.kind_of(GradcheckError("x")) == "assertion"


def test_the_network_is_sealed_in_this_process_and_in_those_it_starts():
    import socket

    with pytest.raises(OSError, match="run without network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    code = "import socket; socket.getaddrinfo('example.org', 80)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "run without network" in done.stderr
