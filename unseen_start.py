"""The check that comes before everything else: that Python imports our packages, and not others of the same names.

The names ``approximations``, ``parties``, ``protocols`` and ``secure`` are free to all. ``secure`` on PyPI is about the
headers of web servers; whichever of the two is installed last replaces ``secure/__init__.py`` of the other, and pip
says nothing. A folder that Python searches earlier can hide a package too. So each of our packages bears a mark, and
stands beside this file: in a wheel, in an editable installation and in a checkout.

``import unseen`` and the command ``unseen`` begin here. This module needs nothing but Python.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec

PACKAGES = ("approximations", "parties", "protocols", "secure")

MARK = "__unseen__"
"""A name that each of our packages defines. It is looked for in the code, so that no stranger's code runs."""

ROOT = os.path.dirname(os.path.abspath(__file__))

AGAIN = "pip install --force-reinstall --no-deps, with the file or folder that it came from"


def check() -> None:
    """See that Python imports our own packages, in a few milliseconds and without importing one.

    Raises ImportError, whose message names the place, the distribution that holds it, and what to do.
    """
    for name in PACKAGES:
        own = os.path.join(ROOT, name, "__init__.py")
        spec = _find(name)
        place = _place(spec) or own
        if not _same(os.path.dirname(place), os.path.dirname(own)):
            hides = f"Python finds {name} in {place}, not unseen's own in {own}"
            raise _error(name, place, hides, "start Python in another folder, or take that one off PYTHONPATH")
        if spec is None or spec.origin is None:
            raise _error(name, own, f"{own} is missing", f"install unseen again: {AGAIN}")
        if not _marked(spec):
            raise _error(name, place, f"{place} is not unseen's own", f"install unseen again: {AGAIN}")


def main() -> None:
    """Entry point of the command ``unseen``: check, then run it. What cannot be imported ends with code 1."""
    try:
        check()
        from parties.cli.main import app_main
    except ImportError as error:
        sys.stderr.write(f"unseen: error: {error}\n")
        sys.exit(1)
    app_main()


def _find(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a module without a spec is in its place
        return None


def _place(spec: ModuleSpec | None) -> str | None:
    """Name the file that Python would import; of a folder without one, the file that it would have."""
    if spec is None:
        return None
    folders = spec.submodule_search_locations or ()
    return spec.origin or next((os.path.join(at, "__init__.py") for at in folders), None)


def _same(one: str, other: str) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


def _marked(spec: ModuleSpec) -> bool:
    try:
        code = spec.loader.get_code(spec.name)  # type: ignore[union-attr]
    except (AttributeError, ImportError, SyntaxError):
        return False
    return code is not None and MARK in code.co_names


def _error(name: str, place: str, message: str, hint: str) -> ImportError:
    """Make the error, with the distribution that holds a place, if one does."""
    if holder := _holder(name, place):
        message = f"{message}: {holder} has put its file there"
        hint = (
            "both need this name, so give unseen an environment of its own (python -m venv DIRECTORY); or, if nothing "
            f"needs {holder}: pip uninstall {holder.split()[0]}, then install unseen again: {AGAIN}"
        )
    return ImportError(f"{message}\nhint: {hint}", name=name, path=place)


def _holder(name: str, place: str) -> str | None:
    """Find the other distribution that a file was installed by, with its version."""
    for other in sorted(set(importlib.metadata.packages_distributions().get(name, ())) - {"unseen", None}):
        found = importlib.metadata.distribution(other)
        if any(_same(str(file.locate()), place) for file in found.files or () if file.parts[0] in (name, f"{name}.py")):
            return f"{other} {found.version}"
    return None
