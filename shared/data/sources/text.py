"""Plain text files: the reader's own, and tiny Shakespeare."""

import os
from pathlib import Path

from shared.runtime import artifacts, files
from shared.runtime.errors import CourseError

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_NAMES = ("tinyshakespeare.txt", "input.txt")
DOWNLOAD_SECONDS = 20  # without an answer


def read_texts(path: Path | str) -> list[tuple[str, str]]:
    """A `.txt` file, or all of a folder and the folders in it, in alphabetical order.

    Links that lead out of the folder are not followed.

    Returns:
        (name relative to `path`, text) of each file that is not blank.

    Raises:
        CourseError: nothing there, no `.txt` in the folder, not UTF-8 (with file and byte), or only blanks.
    """
    path = Path(path).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = _text_files(path)
        if not found:
            raise CourseError(f"There is no .txt file in {path}; put your texts there, in UTF-8.")
    else:
        raise CourseError(f"{path} does not exist; give a .txt file or a folder of them.")
    base = path if path.is_dir() else path.parent
    texts = [(file.relative_to(base).as_posix(), read_utf8(file)) for file in found]
    texts = [(name, text) for name, text in texts if text.strip()]
    if not texts:
        raise CourseError(f"{path} holds no text; give a file with something to read in it.")
    return texts


def read_utf8(path: Path) -> str:
    """A file's text, without a byte-order mark and with "\\n" as line end.

    Raises:
        CourseError: it cannot be read, or a byte is not UTF-8.
    """
    with files.explained("read", path):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CourseError(
            f"{path} is not UTF-8 at byte {error.start} (0x{data[error.start]:02x}); save it again as UTF-8."
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _text_files(folder: Path) -> list[Path]:
    root = folder.resolve()
    found = []
    for parent, folders, names in os.walk(folder):  # does not follow links to folders
        folders.sort()
        candidates = [Path(parent, name) for name in sorted(names) if name.lower().endswith(".txt")]
        found += [file for file in candidates if file.is_file() and file.resolve().is_relative_to(root)]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def shakespeare_path() -> Path:
    """Where tiny Shakespeare lies: in $COURSE_DATA, downloaded before, or downloaded now.

    Raises:
        CourseError: it is in none of the three places, or a file of that name is another text.
    """
    if folder := os.environ.get("COURSE_DATA"):
        for name in SHAKESPEARE_NAMES:
            if (path := Path(folder).expanduser() / name).is_file():
                return _checked(path)
    path = artifacts.home() / "downloads" / SHAKESPEARE_NAMES[0]
    return _checked(path) if path.is_file() else _download(path)


def _checked(path: Path) -> Path:
    with files.explained("read", path):
        digest = files.sha256_file(path)
    if digest != SHAKESPEARE_SHA256:
        raise CourseError(
            f"{path} is not tiny Shakespeare (SHA-256 {digest[:12]}…, not {SHAKESPEARE_SHA256[:12]}…); "
            "put the right file there, or use the corpus 'text' for a text of your own."
        )
    return path


def _download(path: Path) -> Path:
    advice = (
        f"put {SHAKESPEARE_URL} as {SHAKESPEARE_NAMES[0]} into a folder and name that folder in COURSE_DATA, "
        "or use the corpus 'python-docs', which needs no download."
    )
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise CourseError(f"Tiny Shakespeare is not on this machine and HF_HUB_OFFLINE is set: {advice}")
    import pooch

    try:
        with files.explained("write to", path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        pooch.get_logger().setLevel("ERROR")
        pooch.retrieve(
            SHAKESPEARE_URL,
            known_hash=f"sha256:{SHAKESPEARE_SHA256}",
            fname=path.name,
            path=path.parent,
            downloader=pooch.HTTPDownloader(timeout=DOWNLOAD_SECONDS),
        )
    except (OSError, ValueError) as error:  # no network, or another file than expected
        if isinstance(error, CourseError):
            raise
        raise CourseError(
            f"Tiny Shakespeare could not be downloaded ({type(error).__name__}): {advice}"
        ) from error
    return path
