"""What is installed here, what computes here, and what is kept here: what a report of a problem should say."""

import platform
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from misdirection.extras import EXTRAS, installed_version
from misdirection.files import cache_folder
from misdirection.models.bundled import BUNDLED_MODELS, weights_from
from misdirection.models.loading import resolve_dtype
from misdirection.results import Figures

_PACKAGE = "misdirection"


class Device(Figures):
    """Something that models can run on."""

    name: str
    """As `--device` takes it."""
    kind: str
    """The processor's or the GPU's own name."""
    gigabytes: float | None
    """Of a GPU's memory; None for a processor."""
    dtype: str
    """What `--dtype auto` takes there."""


class Extra(Figures):
    """A part of the program that wants packages of its own."""

    wanted_for: str
    missing: list[str]
    """Its packages that are not installed, or too old; empty where all is there."""
    install: str


class Installation(Figures):
    """One machine as this program finds it."""

    versions: dict[str, str | None]
    """Of the program, of Python and of the libraries that it always needs; None for one that is missing."""
    threads: int
    """That a processor's work is spread over."""
    devices: list[Device]
    """The one that `--device auto` takes first."""
    extras: dict[str, Extra]
    bundled: dict[str, str]
    """Where the weights of each bundled model come from (`bundled.weights_from`)."""
    cache: str
    """The cache folder; `MISDIRECTION_CACHE` names another."""
    kept: dict[str, float]
    """Megabytes of each folder in it."""

    @classmethod
    def here(cls) -> "Installation":
        """This machine's."""
        needed = [requirement for requirement in _requirements() if requirement.marker is None]
        return cls(
            versions={
                _PACKAGE: version(_PACKAGE),
                "python": platform.python_version(),
                **{each.name: installed_version(each.name) for each in sorted(needed, key=lambda each: each.name)},
            },
            threads=torch.get_num_threads(),
            devices=[_device(name) for name in _device_names()],
            extras={name: _extra(name) for name in EXTRAS},
            bundled={name: weights_from(name) for name in BUNDLED_MODELS},
            cache=str(cache_folder()),
            kept={path.name: _megabytes(path) for path in _folders(cache_folder())},
        )


def _requirements() -> list[Requirement]:
    return [Requirement(line) for line in requires(_PACKAGE) or ()]


def _extra(name: str) -> Extra:
    wanted = [each for each in _requirements() if each.marker and each.marker.evaluate({"extra": name})]
    missing = [each for each in wanted if not _is_met(each)]
    return Extra(
        wanted_for=EXTRAS[name],
        missing=[str(each).partition(";")[0].strip() for each in missing],
        install=f"pip install '{_PACKAGE}[{name}]'",
    )


def _is_met(requirement: Requirement) -> bool:
    found = installed_version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _device_names() -> Iterator[str]:
    yield from (f"cuda:{number}" for number in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        yield "mps"
    yield "cpu"


def _device(name: str) -> Device:
    is_gpu = name.startswith("cuda")
    properties = torch.cuda.get_device_properties(name) if is_gpu else None
    return Device(
        name=name,
        kind=properties.name if properties else platform.processor() or platform.machine(),
        gigabytes=properties.total_memory / 1e9 if properties else None,
        dtype=str(resolve_dtype("auto", name)).removeprefix("torch."),
    )


def _folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir()) if cache.is_dir() else []


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
