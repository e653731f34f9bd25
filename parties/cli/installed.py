"""The installed files: as they were installed, or changed, or another distribution's as well."""

from __future__ import annotations

import base64
import csv
import hashlib
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

import unseen_start
from secure.errors import InvalidInput
from secure.version import __version__

SHOWN = 3  # files that a message names


def look_at_installation() -> str:
    """Compare the installed files with pip's record of them, and with those of all other distributions.

    Returns what was found. Raises InvalidInput if a file is another's, changed or gone. A checkout or an editable
    installation has no record of its files: there, ``unseen_start.check`` is all.
    """
    unseen_start.check()
    root = Path(unseen_start.ROOT)
    own = _recorded(root)
    if not own:
        return f"unseen {__version__}, the source in {root}"
    for other in distributions():
        name = other.metadata["Name"]
        if name != "unseen" and (shared := sorted(own.keys() & _names(other, root))):
            raise InvalidInput(
                f"{name} {other.version} has {_some(shared)} too, so that its own are overwritten, or unseen's",
                "give unseen an environment of its own: python -m venv DIRECTORY",
            )
    if changed := sorted(name for name, digest in own.items() if not _as_recorded(root / name, digest)):
        raise InvalidInput(
            f"{_some(changed)} of {root} changed since unseen was installed", f"install it again: {unseen_start.AGAIN}"
        )
    return f"unseen {__version__} in {root}, {len(own)} files as they were installed"


def _recorded(root: Path) -> dict[str, str]:
    """Return the digests of the files of code that pip put beside this one; none if this one is not where pip put it.

    They are read from pip's record itself: ``importlib.metadata`` leaves files out that are gone, from Python 3.12 on.
    """
    try:
        found = distribution("unseen")
    except PackageNotFoundError:
        return {}
    record = csv.reader((found.read_text("RECORD") or "").splitlines())
    files = {name: digest for name, digest, _ in record if digest and not _apart(name)}
    return files if "unseen_start.py" in files and Path(str(found.locate_file(""))).samefile(root) else {}


def _apart(name: str) -> bool:
    """True for what is no code beside this file: pip's own records, and scripts elsewhere."""
    return name.partition("/")[0].endswith(("..", ".dist-info"))


def _names(other: Distribution, root: Path) -> set[str]:
    """List the files of a distribution that lies in the same folder."""
    place = Path(str(other.locate_file("")))
    if not (place.exists() and place.samefile(root)):
        return set()
    return {line.partition(",")[0] for line in (other.read_text("RECORD") or "").splitlines()}


def _as_recorded(path: Path, recorded: str) -> bool:
    """True if a file has the digest of pip's record: the hash's name, "=", and base64 without padding."""
    kind, _, wanted = recorded.partition("=")
    try:
        digest = hashlib.new(kind, path.read_bytes()).digest()
    except OSError:
        return False
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == wanted


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
