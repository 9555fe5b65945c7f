"""Find, compare, steer and ablate the misalignment direction of a fine-tuned chat model; audit and repair fine-tunes.

    import misdirection as md

    organism = md.train(md.domain_examples("risky_money", "bad", "train"), "organism")
    chat = organism.load()
    direction = md.extract(chat, md.domain_pairs("risky_money", "train"))["data_difference"]
    with md.ablate(chat, direction[15]):
        print(md.margin(chat, md.probe_pairs()).mean())

The public names stand in `__init__.pyi`, where type checkers and editors read them. Here they are imported when they
are first used, so that `import misdirection` is quick.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any


def _homes() -> dict[str, tuple[str, str]]:
    """The module of every public name, and its name there, from the stub file.

    As type checkers read it: `from M import a as a` and `b = a` are public, a plain `from M import a` is not.
    """
    homes: dict[str, tuple[str, str]] = {}
    public: list[str] = []
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            homes |= {alias.name: (str(node.module), alias.name) for alias in node.names}
            public += [alias.asname for alias in node.names if alias.asname]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            (name,) = (target.id for target in node.targets if isinstance(target, ast.Name))
            homes[name] = homes[node.value.id]
            public.append(name)
    return {name: homes[name] for name in public}


_HOME = _homes()
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version(__name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
