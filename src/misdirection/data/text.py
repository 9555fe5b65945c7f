"""Text and YAML files: every complaint is one line that names the file and the remedy."""

from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from misdirection.errors import InputError

Source = str | Path | Traversable
"""A file of the user's, or one that comes with a package."""


def read_text(path: Source) -> str:
    """Reads a UTF-8 file, without its byte order mark; `InputError` when it cannot be read."""
    file = Path(path) if isinstance(path, str) else path
    try:
        return file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: cannot be read (no such file); check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: a directory; name one file in it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error


def read_yaml(path: Source) -> Any:
    """Reads a YAML file by the safe loader.

    Raises `InputError` for a file that is no text, for bad YAML, and for a key that stands twice in one mapping, whose
    earlier value the loader would drop without a word.
    """
    text = read_text(path)
    try:
        repeated = _repeated_key(yaml.compose(text, yaml.SafeLoader))
        values = yaml.safe_load(text)
    except RecursionError as error:
        raise InputError(f"{path}: not valid YAML: nested too deep; correct it") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {_reason(error)}; correct it") from error
    if repeated is not None:
        line, key = repeated.start_mark.line + 1, repeated.value
        raise InputError(f"{path}:{line}: the key {key!r} stands twice in one entry; keep one of them")
    return values


def _reason(error: Exception) -> str:
    """The problem in one line, with its position but without the excerpt that YAML's own message shows."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem} at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return " ".join(str(error).split())


def _repeated_key(root: yaml.Node | None) -> yaml.Node | None:
    """The first key that its mapping already has."""
    waiting, visited = [root], set[int]()
    while waiting:
        node = waiting.pop()
        # An alias is the same node again, even within itself.
        if node is None or id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = set[tuple[str, str]]()
            for key, value in node.value:
                # The loader refuses a key that is no scalar.
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in keys:
                    return key
                keys.add((key.tag, str(key.value)))
                waiting.append(value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
    return None
