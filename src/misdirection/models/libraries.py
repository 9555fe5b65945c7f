"""Errors and noise of the model libraries, as this package's."""

import contextlib
from collections.abc import Iterator

import torch
import transformers
from safetensors import SafetensorError

from misdirection.errors import InputError, MisdirectionError, first_line, hub_silence


@contextlib.contextmanager
def errors_in_one_line(name: str, what: str) -> Iterator[None]:
    """Turn an error of loading `what`, such as "the tokenizer", of the model `name` into an `InputError`.

    A Hub that does not answer becomes a `NetworkProblem`.
    """
    try:
        yield
    except SafetensorError as error:
        raise InputError(f"{name}: {what} is damaged ({error}); fetch it or make it again") from error
    except (MisdirectionError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise InputError(f"{name}: {what} needs a package that is not installed ({first_line(error, 200)})") from error
    # The libraries raise whatever they like of a file that is somebody else's.
    except Exception as error:
        if silence := hub_silence(name, error):
            raise silence from error
        remedy = "check the name and the revision"
        if not isinstance(error, OSError | ValueError | KeyError):
            remedy = "its files are damaged or of another kind: fetch it or make it again"
        if "trust_remote_code" in str(error):
            remedy = "no code of a model's own is run here: give a model of a type that transformers has"
        raise InputError(f"{name}: {what} could not be loaded ({first_line(error, 200)}); {remedy}") from error


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch off the libraries' own progress bars, which would break ours."""
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.enable_progress_bar()
