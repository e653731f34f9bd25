"""A compilation: everything that a compiled model depends on, and a key over all of it.

Two compilations of one key give the same Program and weights, so that what the first gave can be kept for the second.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from secure.deployments.compiled import Compiled, build, check_sizes, task_of
from secure.deployments.deployment import CompileOptions, Deployment
from secure.deployments.generator import (
    TOKENS,
    build_generator,
    check_generator,
    held_out_texts,
    sizes_of_generator,
    written,
)
from secure.deployments.kept import FORMAT
from secure.deployments.self_test import Accept, self_test
from secure.errors import InvalidInput
from secure.lowering.client_inputs import GENERATE
from secure.models.index import MANIFEST
from secure.progress import Told, silent
from secure.tasks.task import Loader
from secure.version import WIRE_VERSION, __version__

SOURCES = ("approximations", "protocols", "secure")
"""The packages of this project whose code decides what a model is compiled to."""

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "jinja2", "numpy", "scipy", "scikit-learn")
"""Packages of others of which the same is true."""


@dataclass(frozen=True)
class Compilation:
    """A model's name or directory, and everything that the user may choose about compiling it.

    lengths: the padded lengths in tokens; none stands for the task's default. sentences: they add to the calibration.
    batches: the inputs of one query; every pair of a length and a batch is compiled. dimensions: the first numbers of
    an embedding that are its answer; 0 for all. accept: how close answers of the compiled model must be to the
    original's, see ``self_test``. task, reveal: see ``task_of``. capacity: of a model that writes text, the most tokens
    of the padded prompt and what is written; 0 for the default.
    temperature: of such a model, the greatest that clients may choose; None for the most likely tokens alone.
    draft_length: of such a model, the tokens of a pass; 0 for none. index, top, clusters: see ``task_of``.
    """

    model: str
    deployment: Deployment
    lengths: tuple[int, ...] = ()
    sentences: tuple[str, ...] = ()
    options: CompileOptions = field(default_factory=CompileOptions)
    batches: tuple[int, ...] = (1,)
    dimensions: int = 0
    accept: Accept = Accept()  # noqa: RUF009  # it is frozen
    task: str = ""
    reveal: str = ""
    capacity: int = 0
    temperature: float | None = None
    draft_length: int = 0
    index: str = ""
    top: int = 0
    clusters: int = 0

    @property
    def loader(self) -> Loader:
        """The task that loads the model."""
        found = {"dimensions": self.dimensions, "index": self.index, "top": self.top, "clusters": self.clusters}
        return task_of(self.model, self.task, self.reveal, **found)  # type: ignore[arg-type]

    def run(self, told: Told = silent) -> Compiled:
        """Load the model, or train it, compile it, and test it; ``told`` hears of progress.

        Raises InvalidInput if its answers are not those of the original.
        """
        self.check()  # before anything takes long
        if self.loader.name == GENERATE:
            loaded = self.loader.load(self.model, 0, (), told)
            lengths, capacity = sizes_of_generator(self.lengths, self.capacity, self.deployment)
            texts: Sequence[Sequence[int] | str] = ()
            if self.sentences:
                texts = [*written(loaded.module, capacity, told), *self.sentences]
            made = build_generator(
                loaded,
                self.deployment,
                self.options,
                lengths,
                capacity,
                texts,
                told,
                temperature=self.temperature,
                draft_length=self.draft_length,
            )
            told(0, 0, "comparing the compiled model with the original")
            tested = held_out_texts(loaded, self.temperature, told, draft_length=self.draft_length)
            return self_test(made, tested, self.accept)
        loaded = self.loader.load(self.model, max(self.lengths, default=0), self.sentences, told)
        self.accept.of(loaded.closeness)  # likewise
        compiled = build(loaded, self.deployment, self.options, {}, self.lengths, self.batches, told)
        told(0, 0, "comparing the compiled model with the original")
        return self_test(compiled, loaded, self.accept)

    def check(self) -> None:
        """Raise InvalidInput for sizes that cannot be compiled, and for options that mean nothing for the model."""
        if self.loader.name != GENERATE:
            for name, given in (
                ("--capacity", self.capacity),
                ("--temperature", self.temperature),
                ("--draft-length", self.draft_length),
            ):
                if given:
                    raise InvalidInput(f"{name} means nothing for {self.model}", "it is for models that write text")
            check_sizes(self.deployment, self.lengths, self.batches)
            return
        if self.batches != (1,):
            raise InvalidInput(f"--batch means nothing for {self.model}", "a text is written alone")
        self.accept.of(TOKENS)
        sizes = sizes_of_generator(self.lengths, self.capacity, self.deployment)
        check_generator(self.deployment, self.options, *sizes, self.temperature, self.draft_length)

    def depends_on(self) -> dict[str, Any]:
        """Return all that the compiled model depends on, as JSON values; files by their SHA-256.

        These are the contents of the model's files, the task, everything that the user may choose, and the code: the
        sources of this project, and the versions of the packages that load and capture models.
        """
        return {
            "format": FORMAT,
            "versions": [__version__, WIRE_VERSION, sys.version, *map(_version, PACKAGES)],
            "sources": _sources(sys.modules[type(self.deployment).__module__].__file__ or ""),
            "task": self.loader.name,
            "reveal": self.reveal,
            "model": Path(self.model).name if self._directory else self.model,
            "files": _digests(self.loader.files(self.model), self._directory),
            "lengths": list(self.lengths),
            "sentences": list(self.sentences),
            "deployment": self.deployment.name,
            "compiled_as": self.deployment.compiled_as(),
            "options": asdict(self.options),
            "batches": list(self.batches),
            "dimensions": self.dimensions,
            "accept": asdict(self.accept),
            "capacity": self.capacity,
            "temperature": self.temperature,
            "draft_length": self.draft_length,
            "index": _file_digest(Path(self.index) / MANIFEST) if self.index else "",
            "top": self.top,
            "clusters": self.clusters,
        }

    @property
    def _directory(self) -> Path | None:
        """The directory of the model's files; None if it follows from its name alone, or from an installed package."""
        return Path(self.model) if Path(self.model).is_dir() else None

    def key(self) -> str:
        """Return SHA-256 over all that the compiled model depends on, as 64 hexadecimal digits.

        It is secret where the weights are, as it would confirm a guess of them.
        """
        return hashlib.sha256(json.dumps(self.depends_on(), sort_keys=True).encode()).hexdigest()


def _digests(files: Iterable[Path], directory: Path | None) -> list[tuple[str, str]]:
    """Return name and SHA-256 of each file; names are those below the model's directory."""
    return [(str(path.relative_to(directory) if directory else path), _file_digest(path)) for path in files]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _sources(*more: str) -> str:
    """Return SHA-256 over the names and contents of all modules of SOURCES, and of ``more``."""
    total = hashlib.sha256()
    for package in SOURCES:
        root = Path(sys.modules[package].__file__ or "").parent
        for path in sorted(root.rglob("*.py")):
            content = path.read_bytes()
            total.update(f"{package}/{path.relative_to(root)}:{len(content)}:".encode())
            total.update(content)
    for name in more:
        total.update(Path(name).read_bytes() if name else b"")
    return total.hexdigest()


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
