"""What may import what, where a deployment may be named, and that every package names its modules."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("approximations", "protocols", "secure", "parties")
ALLOWED = {
    # of this project; approximations use torch and nothing else
    "approximations": {"approximations"},
    "protocols": {"protocols"},
    "secure": {"approximations", "protocols", "secure"},
    "parties": {"approximations", "protocols", "secure", "parties"},
}
WINGS = {
    # bottom to top; those in one bracket are siblings, which do not import one another
    "secure": (
        *(
            ("errors",),
            ("version",),
            ("progress",),
            ("units",),
            ("capture",),
            ("lowering",),
            ("polynomial",),
            ("operations",),
            ("frontend",),
        ),
        *(("mpc", "ckks"), ("models",), ("cost",), ("tasks",), ("session",), ("deployments",), ("training",)),
    ),
    "parties": (
        *(
            ("proto",),
            ("net",),
            ("telemetry",),
            ("tls", "limits"),
            ("services",),
            ("served",),
            ("traces",),
            ("store",),
            ("receipts",),
        ),
        *(("two_party", "three_party", "ckks"), ("deployments",), ("bulk", "reports")),
        *(("cluster", "proxy", "shapes"), ("cli",)),
    ),
}
LONG = 400  # lines at which an author is asked whether a module is still one idea
PLAIN_ENGLISH = ("secure", "protocols", "approximations", "parties")  # whose docstrings name their noun


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    return [path for path in found if not re.search(r"_pb2(_grpc)?\.py$", path.name)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


EVERY = [(package, path) for package in PACKAGES for path in modules(package)]
IDS = [name_of(path) for _, path in EVERY]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
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

    return tuple(visit(parsed(path), True))


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


# wings and circles


def floors(package: str) -> dict[str, int]:
    return {wing: floor for floor, siblings in enumerate(WINGS[package]) for wing in siblings}


def misdirected(package: str, importer: str, imported: str) -> bool:
    """Whether one module of a package may not import another: it stands in a sibling or in a higher wing."""
    floor, (of, to) = floors(package), (importer.split(".")[1], imported.split(".")[1])
    return of != to and floor[to] >= floor[of]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def arrows(paths: list[Path]) -> dict[str, set[str]]:
    """The modules of this project that each module imports, wherever in it."""
    known = {dotted(path) for path in paths}
    out: dict[str, set[str]] = {name: set() for name in known}
    for path in paths:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                out[dotted(path)] |= {alias.name for alias in node.names} & known
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found = full if full in known else node.module or ""
                    if found in known:
                        out[dotted(path)].add(found)
    return out


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every circle that a search meets, as the names along it."""
    found, done, stack = list[list[str]](), set[str](), list[str]()

    def visit(name: str) -> None:
        stack.append(name)
        for other in sorted(graph[name] - {name}):
            if other in stack:
                found.append([*stack[stack.index(other) :], other])
            elif other not in done:
                visit(other)
        done.add(stack.pop())

    for name in sorted(graph):
        if name not in done:
            visit(name)
    return found


ALL_FILES = [path for _, path in EVERY]
OURS = [path for path in ALL_FILES if path.relative_to(ROOT).parts[0] in ("secure", "parties")]


@pytest.mark.parametrize("package", WINGS)
def test_every_module_stands_in_a_wing(package: str) -> None:
    for path in (ROOT / package).iterdir():
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            assert path.stem in {*floors(package), "__init__"}, f"{package}/{path.name} is in no wing"


@pytest.mark.parametrize("package", WINGS)
def test_wings_import_downwards(package: str) -> None:
    for importer, all_imported in arrows(ALL_FILES).items():
        for imported in all_imported:
            if importer.startswith(f"{package}.") and imported.startswith(f"{package}."):
                assert not misdirected(package, importer, imported), f"{importer} imports {imported}"


def test_no_circle_of_files() -> None:
    graph = arrows(ALL_FILES)
    # the public names: secure.connect and its like reach up to parties when they are called
    graph["secure"] = {name for name in graph["secure"] if not name.startswith("parties")}
    assert circles(graph) == []


def test_a_planted_circle_and_a_planted_arrow_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert misdirected("secure", "secure.mpc.program", "secure.ckks.program")
    assert misdirected("secure", "secure.capture.graph", "secure.operations.shapes")
    assert not misdirected("parties", "parties.cli.embed", "parties.deployments")


# deployments


def names_of_deployments() -> dict[str, str]:
    """The name of each deployment, and the one module that may say it."""
    import secure  # noqa: F401  (registers them)
    from secure.deployments.deployment import deployments

    return {found.name: found.__module__ for found in deployments() if found.__module__.startswith("secure.")}


def said(text: str) -> set[str]:
    """The strings in a module that are no docstrings."""
    tree = ast.parse(text)
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents
    }


DEPLOYMENT_CLASSES = {"TwoParty", "ThreeParty", "Ckks"}


def branches(text: str) -> list[str]:
    """Conditions on a deployment: on its class, or on what a variable of that name holds."""
    out = list[str]()
    for node in ast.walk(ast.parse(text)):
        whole = ast.unparse(node)
        if isinstance(node, ast.Compare):
            # (whether a registry holds a name is no branch on it)
            compared = r"\bdeployment(\.name|\.value)? ((==|!=|is not|is) (?!not |None\b)|(not )?in [(\[{])"
            if set(re.findall(r"\w+", whole)) & DEPLOYMENT_CLASSES or re.search(compared, whole):
                out.append(whole)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            if set(re.findall(r"\w+", ast.unparse(node.args[1]))) & DEPLOYMENT_CLASSES:
                out.append(whole)
        elif isinstance(node, ast.Match) and "deployment" in ast.unparse(node.subject):
            out.append(ast.unparse(node.subject))
    return out


def outside_deployments() -> list[Path]:
    """Every module but a deployment's own: its file in secure/deployments and its wing of parties."""
    own = {"two_party", "three_party", "ckks"}

    def is_own(path: Path) -> bool:
        package, wing, *_ = path.relative_to(ROOT).parts
        return (
            path.stem in own if (package, wing) == ("secure", "deployments") else package == "parties" and wing in own
        )

    return [path for path in OURS if not is_own(path)]


def test_a_deployment_is_named_in_one_module() -> None:
    names = names_of_deployments()
    assert len(names) == 3
    for path in OURS:
        for name in said(path.read_text(encoding="utf-8")) & set(names):
            assert names[name] == dotted(path), f"{dotted(path)} says {name!r}"


@pytest.mark.parametrize("path", outside_deployments(), ids=name_of)
def test_no_branch_on_a_deployment(path: Path) -> None:
    assert branches(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "planted",
    [
        "if deployment == name: pass",
        "if deployment is Ckks: pass",
        "x = 1 if isinstance(d, TwoParty) else 2",
        "if d.name == ThreeParty.name: pass",
        "match deployment.name:\n    case 'x': pass",
    ],
)
def test_a_planted_branch_is_found(planted: str) -> None:
    assert branches(planted)
    for harmless in ("if deployment is None: pass", "if deployment is not None: pass", "x = deployment.name in known"):
        assert not branches(harmless)
    assert said("'doc'\nx = 'two-party'") == {"two-party"}


# errors


def test_everything_that_a_user_can_catch_is_in_secure() -> None:
    import parties.deployments  # noqa: F401  (every module that may define one)
    import secure
    from secure.errors import Error

    def below(kind: type[Error]) -> Iterator[type[Error]]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    found: set[type[Error]] = {Error, *below(Error)}
    for kind in found:
        if kind.__module__.split(".")[0] in PACKAGES:
            assert kind.__name__ in secure.__all__, f"{kind.__module__}.{kind.__name__} is not in secure.__all__"
            assert getattr(secure, kind.__name__) is kind
    assert len(set(secure.__all__)) == len(secure.__all__)
    for name in secure.__all__:
        assert hasattr(secure, name), name


PLAIN = {
    # no user's mistake: a program that is wrong, control flow of a library
    *("AssertionError", "NotImplementedError", "RuntimeError", "KeyError", "LookupError", "AttributeError"),
    *("StopIteration", "SystemExit", "typer.Exit", "TypeError", "typer.BadParameter"),
    "FileExistsError",  # beside those that the system raises where a file is stored
    "FrameError",  # whoever reads frames says which module and which peer
}


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_errors_are_of_one_family(path: Path) -> None:
    import secure.errors as family

    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            kind = ast.unparse(node.exc.func)
            known = isinstance(getattr(family, kind, None), type) or kind in PLAIN
            assert known or kind[0].islower(), f"line {node.lineno} raises {kind}"


@pytest.mark.parametrize(("package", "path"), EVERY, ids=IDS)
def test_long_modules_are_noticed(package: str, path: Path) -> None:
    """A warning to the author, not a wall: a module of one idea may be long."""
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > LONG:
        print(f"{name_of(path)} has {lines} lines: is it still one idea?")


@pytest.mark.parametrize(("package", "path"), EVERY, ids=IDS)
def test_nothing_is_unpickled_or_evaluated(package: str, path: Path) -> None:
    assert not {module.split(".")[0] for module, _ in imports(path)} & {"pickle", "marshal", "shelve", "dill"}
    for call in (n for n in ast.walk(parsed(path)) if isinstance(n, ast.Call)):
        assert ast.unparse(call.func) not in {"eval", "exec", "torch.rand", "torch.randn"}
        if ast.unparse(call.func) == "torch.load":  # tensors alone, from a model's directory
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert name_of(path) == "secure/models/checkpoints.py"
            assert given.get("weights_only") == "True"


@pytest.mark.parametrize(
    "directory",
    [path.parent for _, path in EVERY if path.name == "__init__.py"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_packages_name_their_modules(directory: Path) -> None:
    docstring = ast.get_docstring(ast.parse((directory / "__init__.py").read_text(encoding="utf-8"))) or ""
    for entry in sorted(directory.iterdir()):
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


def test_channels_and_servers_are_made_where_they_are_protected() -> None:
    """Whatever listens has a guard, and whatever connects goes through a Network.

    joined.py asks a foreign service, Ray, as a stranger would, to see that it refuses: it sends nothing.
    """
    made = {"grpc.server": set[str](), "grpc.insecure_channel": set[str](), "grpc.secure_channel": set[str]()}
    for path in modules("parties"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in made:
                made[ast.unparse(node.func)].add(name_of(path))
    assert made == {
        "grpc.server": {"parties/services/hosting.py", "parties/tls/version.py"},
        "grpc.insecure_channel": {"parties/net/network.py", "parties/cluster/joined.py"},
        "grpc.secure_channel": {"parties/tls/tls.py", "parties/cluster/joined.py"},
    }


def test_one_place_resumes_a_step() -> None:
    """Whoever runs a step uses ``protocols.steps``: ``advance``, or the loop ``Framed``."""
    resumed = re.compile(r"= next\(\w+\) if |\.send\((answer|received|came)\b")
    found = [name_of(p) for _, p in EVERY for _ in resumed.findall(p.read_text(encoding="utf-8"))]
    assert found == ["protocols/steps.py"]


def test_no_two_classes_of_one_name() -> None:
    found: dict[str, set[str]] = {}
    for path in ALL_FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).add(name_of(path))
    assert {name: sorted(places) for name, places in found.items() if len(places) > 1} == {}


def riddles(text: str) -> list[str]:
    """First lines of docstrings, those below variables too, that begin with a question word or "Of".

    Such a noun phrase ("What a query took", "Of texts, in tokens") leaves out its noun. "How to ..." is allowed.
    """
    found = []
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                first = value.value.strip().partition("\n")[0]
                if re.match(r"(What|Of|Where|Whether|Who|How(?! to))\b(?!-)", first):
                    found.append(f"line {value.lineno}: {first}")
    return found


@pytest.mark.parametrize("package", PLAIN_ENGLISH)
def test_docstrings_name_their_noun(package: str) -> None:
    found = {name_of(path): riddles(path.read_text(encoding="utf-8")) for path in modules(package)}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("docstring", "riddle"),
    [
        ("What a query took.", True),
        ("Of texts, in tokens.", True),
        ("Whether it is frozen.", True),
        ("How long a query takes.", True),
        ("How to add an operation.", False),
        ("What-if analysis of a model.", False),
        ("The length of texts, in tokens.", False),
        ("Whole or not at all.", False),
    ],
)
def test_a_planted_riddle_is_found(docstring: str, riddle: bool) -> None:
    assert bool(riddles(f'def f():\n    """{docstring}"""\n')) == riddle
    assert bool(riddles(f'X = 1\n"""{docstring}"""\n')) == riddle
