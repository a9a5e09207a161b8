"""Documentation and source of the Python environment: what the corpora `python-docs` and `python-code` hold.

Packages are parsed, never imported. Only modules of the standard library that have no source file (built in,
or written in C) are imported and asked for their docstrings; that happens in processes of their own, this
module run with `python -m`, so that the reader's process stays as it is.
"""

import ast
import gc
import hashlib
import heapq
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.machinery import BuiltinImporter, ExtensionFileLoader
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from shared.runtime import files
from shared.runtime.errors import CourseError

PYTHON = "python"  # the name under which the standard library and the language reference go
PYTHON_LICENSE = "PSF-2.0"
PROCESSES = 2
RENAMED = {"posixpath": "os.path"}  # as everybody knows them
Record = dict[str, str]


class Source(NamedTuple):
    """One file of Python source: where it lies and under which name it is imported."""

    path: str
    module: str


@dataclass(frozen=True)
class Package:
    """What is known of a package before its files are read."""

    name: str
    version: str
    license: str
    sources: tuple[Source, ...]


# ------------------------------------------------------------------------------------------- which files


def installed_package(name: str, exclude: Sequence[str]) -> Package:
    """Version, licence and source files of an installed distribution, in alphabetical order.

    Args:
        name: of the distribution, as in `requirements.lock`.
        exclude: patterns (`fnmatch`) of what is left out: "tests" is a folder or file of that name anywhere,
            "numpy/core" (with a slash) a folder of the package.

    Raises:
        CourseError: it is not installed.
    """
    distribution = _distribution(name)
    paths = sorted(PurePosixPath(path.as_posix()) for path in distribution.files or ())
    sources = [
        Source(str(distribution.locate_file(path)), module)
        for path in paths
        if path.suffix == ".py" and not _is_excluded(path, exclude) and (module := module_name(path))
    ]
    return Package(name, _version(distribution), license_of(distribution.metadata), tuple(sources))


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of the named distributions, which together decide the corpora.

    Raises:
        CourseError: one is not installed.
    """
    return {PYTHON: platform.python_version(), **{name: _version(_distribution(name)) for name in names}}


def _distribution(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise CourseError(
            f"The corpora of Python's documentation need the package {name}, which is not installed; "
            "run `make setup`."
        ) from error


def _version(distribution: importlib.metadata.Distribution) -> str:
    return distribution.version.split("+")[0]  # 2.13.0+cpu documents what 2.13.0 does


def standard_library(exclude: Sequence[str]) -> Package:
    """The source files of the standard library, in alphabetical order."""
    root = Path(sysconfig.get_path("stdlib"))
    tops = [root / f"{name}.py" for name in sorted(sys.stdlib_module_names)]
    found = [path for path in tops if path.is_file()]
    for name in sorted(sys.stdlib_module_names):
        found += sorted((root / name).rglob("*.py"))
    relative = sorted(PurePosixPath(path.relative_to(root).as_posix()) for path in found)
    sources = [
        Source(str(root / path), module)
        for path in relative
        if not _is_excluded(path, exclude) and (module := module_name(path))
    ]
    return Package(PYTHON, platform.python_version(), PYTHON_LICENSE, tuple(sources))


def module_name(path: PurePosixPath) -> str:
    """The name under which a file is imported, "os.path" for "os/path.py"; "" for a file that cannot be."""
    parts = [*path.parts[:-1], path.stem]
    if parts[-1] == "__init__":
        parts.pop()
    if not all(part.isidentifier() for part in parts):
        return ""
    name = ".".join(parts)
    return RENAMED.get(name, name)


def license_of(metadata: Mapping[str, str]) -> str:
    """The licence that a distribution's metadata names: an SPDX expression, a classifier, or a short line."""
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = metadata.get_all("Classifier") or []  # type: ignore[attr-defined]
    named = [line.split(" :: ")[-1] for line in classifiers if line.startswith("License ::")]
    named = [name for name in named if name != "OSI Approved"]
    if named:
        return " AND ".join(named)
    lines = (metadata.get("License") or "").strip().splitlines()
    return lines[0][:80] if lines else "unknown"


def _is_excluded(path: PurePosixPath, exclude: Sequence[str]) -> bool:
    return any(
        fnmatchcase(path.as_posix(), f"{pattern}/*") if "/" in pattern else _has_part(path.parts, pattern)
        for pattern in exclude
    )


def _has_part(parts: tuple[str, ...], pattern: str) -> bool:
    return any(fnmatchcase(part, pattern) for part in parts)


# --------------------------------------------------------------------------------------- reading one file


def parse_docstrings(source: str | bytes, module: str) -> Iterator[Record]:
    """Every docstring of a source file's module, classes and functions, in their order, without running it.

    Yields:
        id (`module.Class.method`), kind (module, class or function), signature, text.

    Raises:
        SyntaxError, ValueError: it is not Python source of this version.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in other people's files
        tree = ast.parse(source)
    if text := ast.get_docstring(tree):
        yield {"id": module, "kind": "module", "signature": "", "text": text}
    yield from _members(tree, module)


_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = (ast.If, ast.Try, ast.With)  # in which a module or class may define things


def _members(node: ast.AST, prefix: str) -> Iterator[Record]:
    """Definitions in a module or class; those inside functions cannot be imported and are left out."""
    for child in _statements(node):
        if isinstance(child, _DEFINITIONS):
            name = f"{prefix}.{child.name}"
            is_class = isinstance(child, ast.ClassDef)
            if text := ast.get_docstring(child):
                kind = "class" if is_class else "function"
                yield {"id": name, "kind": kind, "signature": _signature(child), "text": text}
            if is_class:
                yield from _members(child, name)
        elif isinstance(child, _BLOCKS):
            yield from _members(child, prefix)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    yield from node.body
    for handler in getattr(node, "handlers", ()):
        yield from handler.body
    yield from getattr(node, "orelse", ())
    yield from getattr(node, "finalbody", ())


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        return f"{node.name}({bases})" if bases else node.name
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{prefix}{node.name}({ast.unparse(node.args)}){returns}"


# --------------------------------------------------------------------- modules without source, and the topics


def compiled_modules() -> list[str]:
    """Names of the standard library's modules that are built in or written in C, in alphabetical order."""
    names = []
    for name in sorted(sys.stdlib_module_names):
        if re.match(r"_?test|_xx|xx|_ctypes_test|__main__|antigravity|this", name):
            continue
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # `__main__` and the like have no spec
            continue
        if spec and (spec.loader is BuiltinImporter or isinstance(spec.loader, ExtensionFileLoader)):
            names.append(name)
    return names


_MEMBERS = (  # of a class written in C; slots such as __eq__ are left out, they all say the same
    types.BuiltinFunctionType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    classmethod,
    staticmethod,
)


def inspect_docstrings(module: types.ModuleType) -> Iterator[Record]:
    """Docstrings of a module written in C: the module, its functions, its classes and their members."""
    name = module.__name__
    yield from _inspected(module, name, "module")
    for attribute, value in sorted(vars(module).items()):
        # What a module imports from elsewhere is documented there.
        if getattr(value, "__module__", None) not in (name, name.lstrip("_")):
            continue
        home = "" if name == "builtins" else f"{_public(value.__module__)}."
        if isinstance(value, type):
            yield from _inspected(value, f"{home}{attribute}", "class")
            for member, inner in sorted(vars(value).items()):
                if isinstance(inner, _MEMBERS):
                    yield from _inspected(inner, f"{home}{attribute}.{member}", "function")
        elif callable(value):
            yield from _inspected(value, f"{home}{attribute}", "function")


def _public(module: str) -> str:
    """`io` for `_io`: the module in which people look for what the one written in C defines."""
    public = module.lstrip("_")
    return public if public in sys.stdlib_module_names else module


def _inspected(value: object, name: str, kind: str) -> Iterator[Record]:
    text = getattr(value, "__doc__", None)
    if not isinstance(text, str) or not text.strip():
        return
    signature = getattr(value, "__text_signature__", None) or ""
    if signature:  # "($module, x, /)": the $ marks what the call fills in
        signature = name.rpartition(".")[2] + re.sub(r"\$module(, )?(/, |/)?", "", signature).replace("$", "")
    yield {"id": name, "kind": kind, "signature": signature, "text": inspect.cleandoc(text)}


def language_reference() -> Iterator[Record]:
    """The topics of `help()`: the chapters of the language reference that ship with Python."""
    from pydoc_data.topics import topics

    for label, text in sorted(topics.items()):
        yield {
            "id": f"help.{label}",
            "kind": "topic",
            "signature": "",
            "text": inspect.cleandoc(text).strip(),
        }


# ------------------------------------------------------------------------------------------- all of them


def selected_packages(settings: Mapping[str, Any]) -> list[Package]:
    """The standard library and the packages that `configs/data/python-docs.yaml` names, in its order."""
    exclude = settings["exclude"]
    return [standard_library(exclude), *[installed_package(name, exclude) for name in settings["packages"]]]


def write_documents(directory: Path, packages: Sequence[Package]) -> dict[str, Any]:
    """Read all docstrings, in two processes, into `documents.jsonl` and `manifest.json`.

    Documents whose text came before are left out and counted.

    Args:
        directory: an existing folder.
        packages: in the order of the corpus; the compiled modules and the language reference follow "python".

    Returns:
        The manifest.
    """
    jobs = []
    for package in packages:
        jobs += [{"package": package.name, **source._asdict()} for source in package.sources]
        if package.name == PYTHON:
            jobs += [{"package": PYTHON, "path": "", "module": name} for name in [*compiled_modules(), ""]]
    manifest = Manifest("python-docs", packages)
    seen: set[bytes] = set()
    path = directory / "documents.jsonl"
    with (
        tempfile.TemporaryDirectory() as folder,
        open(path, "w", encoding="utf-8", newline="\n") as out,
    ):
        for record in _read_in_processes(Path(folder), jobs):
            if "text" not in record:
                manifest.unreadable += 1
            elif (digest := hashlib.sha256(record["text"].encode()).digest()) in seen:
                manifest.duplicates += 1
            else:
                seen.add(digest)
                document = manifest.add(record)
                out.write(json.dumps(document, ensure_ascii=False) + "\n")
    return manifest.write(directory, files.sha256_file(path))


def write_code_manifest(directory: Path, packages: Sequence[Package]) -> dict[str, Any]:
    """Count the sources of all packages into `manifest.json`; their texts stay where they are.

    Returns:
        The manifest; its SHA-256 is over all texts, in order.
    """
    manifest = Manifest("python-code", packages)
    digest = hashlib.sha256()
    for package in packages:
        for source in package.sources:
            text = read_source(source)
            if text is None:
                manifest.unreadable += 1
            else:
                manifest.add({"id": source.module, "kind": "module", "package": package.name, "text": text})
                digest.update(text.encode())
    return manifest.write(directory, digest.hexdigest())


def read_source(source: Source) -> str | None:
    """The text of a source file; None if it is empty, not UTF-8 or cannot be read."""
    try:
        return Path(source.path).read_bytes().decode("utf-8") or None
    except (OSError, ValueError):
        return None


class Manifest:
    """Counts documents as they come: what is in the corpus, from where, under which licence."""

    def __init__(self, name: str, packages: Sequence[Package]):
        self.name = name
        self.duplicates = self.unreadable = 0
        self._packages = {package.name: package for package in packages}
        self._documents: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._ids: Counter[str] = Counter()

    def add(self, record: Record) -> Record:
        """Count a record; returns it with its package's version and licence, and an id of its own.

        A name that is defined again, as a property's setter is, becomes "name#2".
        """
        package = self._packages[record["package"]]
        self._ids[record["id"]] += 1
        if (number := self._ids[record["id"]]) > 1:
            record = {**record, "id": f"{record['id']}#{number}"}
        self._documents[package.name] += 1
        self._bytes[package.name] += len(record["text"].encode())
        self._kinds[record["kind"]] += 1
        return {**record, "version": package.version, "license": package.license}

    def write(self, directory: Path, sha256: str) -> dict[str, Any]:
        """Write `manifest.json` and return its content."""
        licences: Counter[str] = Counter()
        rows = []
        for name, package in self._packages.items():
            counts = {"documents": self._documents[name], "bytes": self._bytes[name]}
            rows.append({"name": name, "version": package.version, "license": package.license, **counts})
            licences[package.license] += self._documents[name]
        content = {
            "name": self.name,
            "documents": sum(self._documents.values()),
            "bytes": sum(self._bytes.values()),
            "duplicates_left_out": self.duplicates,
            "unreadable_files": self.unreadable,
            "kinds": dict(sorted(self._kinds.items())),
            "licences": dict(licences.most_common()),
            "packages": rows,
            "sha256": sha256,
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / "manifest.json").write_text(text, encoding="utf-8")
        return content


def _read_in_processes(folder: Path, jobs: Sequence[Record]) -> Iterator[Record]:
    """The records of all jobs, in the order of the jobs; every n-th job is done by the n-th process."""
    outputs, running = [], []
    search = os.pathsep.join(filter(None, [str(files.repository_root()), os.environ.get("PYTHONPATH", "")]))
    for number in range(PROCESSES):
        share, output = folder / f"jobs{number}.json", folder / f"records{number}.jsonl"
        share.write_text(json.dumps(list(enumerate(jobs))[number::PROCESSES]), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": search}
        command = [sys.executable, "-m", __name__, str(share), str(output)]
        running.append(
            subprocess.Popen(
                command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        )
        outputs.append(output)
    try:
        for process in running:
            errors = process.communicate()[1]
            if process.returncode:
                raise RuntimeError(f"reading docstrings failed: {errors.decode(errors='replace')[-2000:]}")
    finally:
        for process in running:
            process.kill()
    with ExitStack() as stack:
        opened = [stack.enter_context(open(output, encoding="utf-8")) for output in outputs]
        lines = [map(json.loads, file) for file in opened]
        for _, record in heapq.merge(*lines, key=itemgetter(0)):
            yield record


def _worker(share: Path, output: Path) -> None:
    gc.disable()  # syntax trees have no cycles, and looking for some takes 40 % of the time
    with open(output, "w", encoding="utf-8", newline="\n") as out:
        for number, job in json.loads(share.read_text(encoding="utf-8")):
            for record in _records(job):
                out.write(json.dumps([number, {**record, "package": job["package"]}]) + "\n")


def _records(job: Record) -> Iterator[Record]:
    """One job's records; a single one without a text for a file that is not Python of this version."""
    try:
        if job["path"]:
            found = list(parse_docstrings(Path(job["path"]).read_bytes(), job["module"]))
        elif job["module"]:
            found = list(inspect_docstrings(importlib.import_module(job["module"])))
        else:
            found = list(language_reference())
    except (SyntaxError, ValueError, RecursionError, OSError, ImportError):
        yield {"id": job["module"]}
        return
    for record in found:  # a docstring may spell out half a surrogate pair, which UTF-8 cannot hold
        yield {key: value.encode("utf-8", "replace").decode() for key, value in record.items()}


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), Path(sys.argv[2]))
