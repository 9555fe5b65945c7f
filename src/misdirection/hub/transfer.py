"""The way to the Hub and back: a commit for a parcel, a folder for a repository."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, DatasetInfo, HfApi, ModelInfo, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError

from misdirection.cards import CARD, TAG
from misdirection.errors import InputError, NetworkProblem, first_line, hub_silence
from misdirection.files import atomic_folder, require_replaceable
from misdirection.hub.parcels import Declared, RepositoryType, parcel

_REPOSITORY = "REPOSITORY"
"""Stands for the repository's name in the examples of a card."""

_LOG_IN = "log in with `hf auth login`, and check the name"


def push(path: str | Path, repository: str, declared: Declared | None = None, *, public: bool = False) -> str:
    """Send a thing of ours to a repository on the Hub, with its card; gives the commit's address.

    A new repository is private unless `public`. One that is there is written to only where its card says that it is
    ours; what else is in it stays.

    Raises:
        InputError: nothing that goes to the Hub (`parcel`), a repository of another's, or no leave to write to it.
        NetworkProblem: the Hub does not answer.
    """
    packed, api = parcel(path, declared or Declared()), HfApi()
    card = packed.card.replace(_REPOSITORY, repository)
    operations = [CommitOperationAdd(name, str(file)) for name, file in packed.files.items()]
    with _hub_errors(repository):
        _require_ours(api, repository, packed.repository)
        api.create_repo(repository, repo_type=packed.repository, private=not public, exist_ok=True)
        commit = api.create_commit(
            repository,
            [*operations, CommitOperationAdd(CARD, card.encode())],
            repo_type=packed.repository,
            commit_message=f"{packed.kind}, by {TAG}",
        )
    return str(commit.commit_url)


def pull(repository: str, out: str | Path, *, revision: str | None = None) -> Path:
    """Bring a repository of ours into a folder, and give the folder; one that we wrote before is replaced.

    Raises:
        InputError: no such repository, one whose card does not say that it is ours, or a folder in the way.
        NetworkProblem: the Hub does not answer.
    """
    require_replaceable(Path(out))
    kinds: tuple[RepositoryType, ...] = ("model", "dataset")
    api = HfApi()
    with _hub_errors(repository):
        kind = next((kind for kind in kinds if api.repo_exists(repository, repo_type=kind)), None)
        if kind is None:
            raise InputError(f"{repository}: no such repository, or a private one: {_LOG_IN}")
        if TAG not in (_info(api, repository, kind, revision).tags or []):
            raise InputError(f"{repository}: its card does not have the tag `{TAG}`, so that it is none of ours")
        snapshot = snapshot_download(repository, repo_type=kind, revision=revision)
    with atomic_folder(Path(out)) as temporary:
        shutil.copytree(snapshot, temporary, dirs_exist_ok=True)
    return Path(out)


def _require_ours(api: HfApi, repository: str, kind: RepositoryType) -> None:
    """Refuse a repository that holds something and does not say that it is ours."""
    try:
        found = _info(api, repository, kind)
    except RepositoryNotFoundError:
        return
    names = {each.rfilename for each in found.siblings or []} - {".gitattributes"}
    if names and TAG not in (found.tags or []):
        raise InputError(
            f"{repository}: holds {min(names)}, and its card does not have the tag `{TAG}`: choose another repository"
        )


def _info(api: HfApi, repository: str, kind: RepositoryType, revision: str | None = None) -> ModelInfo | DatasetInfo:
    return (api.model_info if kind == "model" else api.dataset_info)(repository, revision=revision)


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """The Hub's refusals, and its silence, as one line."""
    try:
        yield
    except HFValidationError as error:
        raise InputError(
            f"{repository}: no name of a repository ({first_line(error, 100)}): write USER/NAME"
        ) from error
    except (RepositoryNotFoundError, LocalTokenNotFoundError) as error:
        raise InputError(f"{repository}: the Hub does not know it, or you: {_LOG_IN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(f"{repository}: no leave to write there (status {status}): {_LOG_IN}") from error
        raise NetworkProblem(f"{repository}: the Hub answers with status {status}; try again later") from error
    except Exception as error:
        if silence := hub_silence(repository, error, "check the network and try again"):
            raise silence from error
        raise
