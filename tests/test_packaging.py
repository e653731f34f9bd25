"""The wheel and the source distribution hold what they should, and packages of others under our names are noticed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import secure
import unseen
import unseen_start
from tests.test_architecture import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
OTHER = "class Secure:\n    pass\n"


def build(kind: str, source: Path, target: Path) -> Path:
    """Call the build backend, without a network and without an environment of its own."""
    target.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, target], cwd=source, check=True, capture_output=True, timeout=120)
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the source distribution, which is made from a copy of this tree."""
    at = tmp_path_factory.mktemp("build")
    junk = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "site", "*.egg-info", "node_modules")
    shutil.copytree(ROOT, at / "copy", ignore=junk)
    with tarfile.open(build("sdist", at / "copy", at / "sdist")) as packed:
        packed.extractall(at / "unpacked", filter="data")
    (source,) = (at / "unpacked").iterdir()
    return build("wheel", source, at / "wheel")


@pytest.fixture
def site(wheel: Path, tmp_path: Path) -> Path:
    """A folder with the wheel's files."""
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    return tmp_path / "site"


def python(site: Path, *arguments: str, before: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(p) for p in (before, site) if p)
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], cwd=site.parent, env=environment, capture_output=True, text=True, timeout=120
    )


def plant(site: Path, name: str, *files: str) -> None:
    """Install another distribution of one line a file, as pip does."""
    for each in files:
        (site / each).parent.mkdir(parents=True, exist_ok=True)
        (site / each).write_text(OTHER)
    about = site / f"{name}-2.0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0.1\n")
    (about / "RECORD").write_text("".join(f"{each},,\n" for each in files))


# what the distributions hold


def test_the_wheel_holds_the_packages_of_the_tree_and_no_more(wheel: Path) -> None:
    expected = {"unseen.py", "unseen_start.py"}
    for package in PACKAGES:
        found = (p for p in (ROOT / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        expected |= {re.sub("^secure/unseen-stubs/", "unseen-stubs/", str(p.relative_to(ROOT))) for p in found}
    with zipfile.ZipFile(wheel) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2]: name for name in packed.namelist() if ".dist-info/" in name}
        entry_points = packed.read(about["entry_points.txt"]).decode()
    assert names == expected
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, "unseen-stubs", "unseen.py", "unseen_start.py"}
    assert "licenses/LICENSE" in about
    assert "unseen = unseen_start:main" in entry_points


def test_the_source_distribution_holds_tests_and_wire_format(wheel: Path) -> None:
    (source,) = (wheel.parent.parent / "unpacked").iterdir()
    for each in ("proto/unseen.proto", "tests/tiny.py", "constraints.txt", "docs/concepts.md", "examples/embed.py"):
        assert (source / each).is_file(), each


# the name of our own


def test_unseen_is_secure() -> None:
    assert unseen.__all__ == secure.__all__
    assert dir(unseen) == dir(secure)
    for name in secure.__all__:
        assert getattr(unseen, name) is getattr(secure, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(unseen, "nothing")  # noqa: B009


def test_every_package_of_ours_is_looked_at() -> None:
    assert set(unseen_start.PACKAGES) == set(PACKAGES)


# others under our names


def test_an_installation_is_found_as_it_is_and_every_change_is_noticed(site: Path) -> None:
    script = """
import sys
import unseen
assert "grpc" not in sys.modules
from pathlib import Path
from parties.cli.installed import look_at_installation
from secure.errors import InvalidInput
site = Path(sys.argv[1])
assert Path(unseen.__file__).parent == site and "grpc" not in sys.modules, unseen.__file__
print(look_at_installation())
def wrong():
    try:
        look_at_installation()
    except InvalidInput as error:
        print(error)
(site / "secure/errors.py").write_text("")
(site / "protocols/ring.py").unlink()
wrong()
about = site / "secure-2.0.1.dist-info"
about.mkdir()
(about / "METADATA").write_text("Metadata-Version: 2.1\\nName: secure\\nVersion: 2.0.1\\n")
(about / "RECORD").write_text("secure/__init__.py,,\\nsecure/headers.py,,\\n")
wrong()
"""
    ended = python(site, "-c", script, str(site))
    assert ended.returncode == 0, ended.stderr
    whole, changed, _, claimed, hint = ended.stdout.splitlines()
    assert whole.startswith(f"unseen {secure.__version__} in {site}, ")
    assert whole.endswith(" files as they were installed")
    assert changed == f"protocols/ring.py, secure/errors.py of {site} changed since unseen was installed"
    assert claimed.startswith("secure 2.0.1 has secure/__init__.py too")
    assert "an environment of its own" in hint


@pytest.mark.parametrize(
    "arguments",
    [("-c", "import unseen"), ("-c", "import unseen_start; unseen_start.main()"), ("-m", "unseen", "embed")],
)
def test_a_replaced_package_is_named_with_the_distribution_that_did_it(site: Path, arguments: tuple[str, ...]) -> None:
    plant(site, "secure", "secure/__init__.py", "secure/headers.py")
    ended = python(site, *arguments)
    assert ended.returncode == 1
    assert f"{site}/secure/__init__.py is not unseen's own: secure 2.0.1 has put its file there\nhint: " in ended.stderr
    assert "python -m venv" in ended.stderr
    assert "pip uninstall secure" in ended.stderr
    assert ("Traceback" in ended.stderr) == (arguments == ("-c", "import unseen"))


def test_a_package_that_another_one_took_away_with_itself_is_missing(site: Path) -> None:
    (site / "secure/__init__.py").unlink()
    ended = python(site, "-m", "unseen")
    assert ended.returncode == 1
    first, hint = ended.stderr.splitlines()
    assert first == f"unseen: error: {site}/secure/__init__.py is missing"
    assert "--force-reinstall" in hint


@pytest.mark.parametrize("package", ["parties", "secure"])
def test_a_module_that_python_finds_earlier_is_named(site: Path, tmp_path: Path, package: str) -> None:
    before = tmp_path / "before"
    before.mkdir()
    (before / f"{package}.py").write_text("raise RuntimeError('a stranger ran')\n")
    ended = python(site, "-m", "unseen", before=before)
    assert ended.returncode == 1
    first, hint = ended.stderr.splitlines()
    own = f"{site}/{package}/__init__.py"
    assert first == f"unseen: error: Python finds {package} in {before}/{package}.py, not unseen's own in {own}"
    assert "PYTHONPATH" in hint


def test_a_distribution_in_an_earlier_folder_is_named(site: Path, tmp_path: Path) -> None:
    plant(tmp_path / "before", "parties", "parties/__init__.py")
    ended = python(site, "-m", "unseen", before=tmp_path / "before")
    assert ended.returncode == 1
    assert "parties 2.0.1 has put its file there" in ended.stderr
    assert "hint: both need this name" in ended.stderr


def test_folders_without_code_hide_nothing(site: Path, tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / "before" / package).mkdir(parents=True)
    plant(site, "proto-plus", "proto/__init__.py")
    ended = python(
        site, "-c", "import unseen_start; unseen_start.check(); import proto; proto.Secure", before=tmp_path / "before"
    )
    assert ended.returncode == 0, ended.stderr
