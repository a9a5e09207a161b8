"""Writing files so that a crash, a full disk or Ctrl-C never leaves half of one behind."""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.runtime.errors import CourseError


def repository_root() -> Path:
    """The folder that holds `shared/`, the week folders and `configs/`."""
    return Path(__file__).resolve().parents[2]


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of `data`, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's content, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a JSON-able value, the same whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return sha256_bytes(text.encode())


def _fsync_directory(directory: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError, path: Path) -> str:
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(_existing_parent(path)).free
        return f"the disk is full ({free / 1e6:.1f} MB free)"
    return error.strerror or str(error)


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def explained(action: str, path: Path | str) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `CourseError` that says what could not be done, and why.

    Args:
        action: what was tried, such as "write" or "save the checkpoint in".
        path: the file or folder concerned.
    """
    try:
        yield
    except OSError as error:
        raise CourseError(f"Cannot {action} {path}: {_reason(error, Path(path))}.") from error


def read_text(path: Path | str) -> str:
    """The content of a UTF-8 file.

    Raises:
        CourseError: it cannot be read, or is not UTF-8.
    """
    with explained("read", path):
        data = Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CourseError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error


def atomic_write(path: Path | str, data: str | bytes) -> None:
    """Write `data` to `path`: the old content or the new one is there, never a part.

    Written to a temporary file in the same folder, synced to disk, then renamed over `path`.

    Raises:
        CourseError: the folder cannot be written to or the disk is full; `path` is as it was.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
            os.chmod(name, mode)  # mkstemp makes files that only their owner can read
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        _fsync_directory(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def atomic_directory(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Fill a folder so that it appears complete or not at all.

    Yields a temporary folder beside `path`; when the block ends without an exception its files are synced and
    the folder is renamed to `path`.

    Args:
        path: the folder to make.
        replace: swap an existing folder for the new one; otherwise an existing one is refused.

    Raises:
        CourseError: `path` exists and `replace` is false, it cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise _already_there(path)
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        try:
            yield temporary
        except OSError as error:
            if error.errno in (
                errno.ENOSPC,
                errno.EDQUOT,
            ):  # others are the block's own, not about this folder
                raise CourseError(f"Cannot write {path}: {_reason(error, path)}.") from error
            raise
        with explained("write", path):
            _sync_tree(temporary)
            _put_in_place(temporary, path, replace)
            _fsync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path | str) -> None:
    """Remove the temporary files and folders that a killed process left beside `path`.

    Call it only while holding the lock under which `path` is written.
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _sync_tree(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        else:
            _fsync_directory(file)
    _fsync_directory(directory)


def _already_there(path: Path) -> CourseError:
    return CourseError(f"{path} already exists; name another folder or remove this one first.")


def _put_in_place(temporary: Path, path: Path, replace: bool) -> None:
    """Rename `temporary` to `path`; what stood there is swapped in one step where the system can do that."""
    if not path.exists():
        os.rename(temporary, path)
        return
    if not replace:  # another process was faster
        raise _already_there(path)
    if path.is_dir() and not path.is_symlink() and _exchange(temporary, path):
        return  # the old folder is at `temporary` now, and removed with it
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old.", suffix=".tmp"))
    try:
        os.replace(path, old / "old")
        os.rename(temporary, path)
    except BaseException:  # Ctrl-C between the two renames, too
        if not path.exists() and (old / "old").exists():
            os.replace(old / "old", path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step, so that a kill leaves one or the other; False if unable."""
    if sys.platform != "linux":
        return False
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_working_folder, rename_exchange = -100, 2  # <fcntl.h>, <linux/fs.h>
    return renameat2 is not None and not renameat2(
        at_working_folder, os.fsencode(one), at_working_folder, os.fsencode(other), rename_exchange
    )


def inside(directory: Path | str, name: str) -> Path:
    """`directory / name`, refusing a name that leads out of `directory` (`..`, absolute, or by a link).

    Raises:
        CourseError: the path would lie outside.
    """
    base = Path(directory).resolve()
    path = (base / name).resolve()
    if not path.is_relative_to(base):
        raise CourseError(f"{name!r} leads out of {directory}; give a path inside it.")
    return path
