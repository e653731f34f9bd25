"""What may import what, how long a module may be, and that every package names its modules."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("approximations", "protocols", "secure", "parties", "proto")
ALLOWED = {
    # of this project; approximations use torch and nothing else
    "approximations": {"approximations"},
    "protocols": {"protocols"},
    "secure": {"approximations", "protocols", "secure"},
    "parties": {"approximations", "protocols", "secure", "parties", "proto"},
    "proto": {"proto"},
}
LONGEST = 400


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    return [path for path in found if not re.search(r"_pb2(_grpc)?\.py$", path.name)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


EVERY = [(package, path) for package in PACKAGES for path in modules(package)]
IDS = [name_of(path) for _, path in EVERY]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether it is imported when the module is."""

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name_of(path)} uses a relative import"
                yield child.module or "", top
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from visit(child, False)
            else:
                inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, top and not inner)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


@pytest.mark.parametrize(("package", "path"), EVERY, ids=IDS)
def test_imports_point_one_way(package: str, path: Path) -> None:
    for module, top in imports(path):
        first = module.split(".")[0]
        if first in PACKAGES and first not in ALLOWED[package]:
            # the one place that reaches up: secure.connect
            assert (name_of(path), first, top) == ("secure/__init__.py", "parties", False), f"imports {module}"


@pytest.mark.parametrize("path", modules("approximations"), ids=name_of)
def test_approximations_use_torch_alone(path: Path) -> None:
    for module, _ in imports(path):
        first = module.split(".")[0]
        assert first in {"approximations", "torch"} or first in sys.stdlib_module_names, f"imports {module}"


@pytest.mark.parametrize(("package", "path"), EVERY, ids=IDS)
def test_nothing_imports_tests_or_scripts(package: str, path: Path) -> None:
    assert not {module.split(".")[0] for module, _ in imports(path)} & {"tests", "benchmarks", "examples"}


@pytest.mark.parametrize(("package", "path"), EVERY, ids=IDS)
def test_modules_are_short(package: str, path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize(("package", "path"), EVERY, ids=IDS)
def test_nothing_is_unpickled_or_evaluated(package: str, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not {module.split(".")[0] for module, _ in imports(path)} & {"pickle", "marshal", "shelve", "dill"}
    for call in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)):
        assert ast.unparse(call.func) not in {"eval", "exec", "torch.load", "torch.rand", "torch.randn"}


@pytest.mark.parametrize(
    "directory",
    [path.parent for _, path in EVERY if path.name == "__init__.py"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_packages_name_their_modules(directory: Path) -> None:
    docstring = ast.get_docstring(ast.parse((directory / "__init__.py").read_text(encoding="utf-8"))) or ""
    for entry in sorted(directory.iterdir()):
        if entry.suffix == ".proto":
            assert entry.name in docstring
        if entry.suffix == ".py" and entry.stem not in ("__init__", "__main__") and "_pb2" not in entry.stem:
            # at the start of a line of its own, or in the list that starts one
            assert re.search(rf"^(\w+, )*{entry.stem}\b", docstring, re.MULTILINE), entry.name
        if entry.is_dir() and (entry / "__init__.py").is_file():
            assert re.search(rf"^{entry.name}/", docstring, re.MULTILINE), entry.name


@pytest.mark.parametrize("package", PACKAGES)
def test_module_maps_are_current(package: str) -> None:
    """No line for a module that is gone."""
    docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))) or ""
    for line in docstring.splitlines():
        entry = re.match(r"((?:\w+, )*\w+)/?  +\S", line)
        for name in entry.group(1).split(", ") if entry else []:
            assert any((ROOT / package / n).exists() for n in (f"{name}.py", name)), line


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_one_place_resumes_a_step() -> None:
    """Whoever runs a step uses ``protocols.steps``: ``advance``, or the loop ``Framed``."""
    resumed = re.compile(r"= next\(\w+\) if |\.send\((answer|received|came)\b")
    found = [name_of(p) for _, p in EVERY for _ in resumed.findall(p.read_text(encoding="utf-8"))]
    assert found == ["protocols/steps.py"]
