"""The models of an audit: a fine-tune and a benign control, as adapters or as full weights, and their base."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from misdirection.auditing.attribution import is_attributed
from misdirection.auditing.results import ReadWeights
from misdirection.choices import Dtype, Thinking
from misdirection.errors import InputError
from misdirection.files import sha256_file, sha256_listed, sha256_tree
from misdirection.lora.view import LoraView
from misdirection.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter, local_fine_tune, recorded_base
from misdirection.models.chat_model import ChatModel
from misdirection.models.identity import ModelIdentity, identify
from misdirection.models.loading import load, load_whole
from misdirection.models.names import ModelName
from misdirection.runs.worker import BASE, Models

Which = Literal["base", "fine-tune", "control"]
TUNED: Which = "fine-tune"
CONTROL: Which = "control"


@dataclass(frozen=True)
class Control:
    """A benign fine-tune that shifts are read beyond.

    Attributes:
        folder: where it is on this disk.
        name: of one of the user's own, as they gave it; None for the reference's.
    """

    folder: Path
    name: str | None = None

    @classmethod
    def find(cls, name: str) -> "Control":
        """One of the user's own, fetched from the hub if need be; `InputError` for a folder that is none."""
        return cls(local_fine_tune(*ModelName.parse(name)), name)


@dataclass
class FineTune:
    """A fine-tune and its base; one of them is in memory at a time, or several when they share the base's weights.

    Attributes:
        base: name of the base model.
        revision: its hub revision.
        name: of the fine-tune, as the user gave it.
        folder: where the fine-tune is on this disk.
        dtype, device: as in `models.load`.
        control: what shifts are read beyond; None without one.
        thinking, chat_template: as in `models.load`; the template is that of both sides.
        models: has the base model, where several fine-tunes share it.
    """

    base: str
    revision: str | None
    name: str
    folder: Path
    dtype: Dtype = "auto"
    device: str = "auto"
    control: Control | None = None
    thinking: Thinking = "off"
    chat_template: str | None = None
    models: Models | None = field(default=None, repr=False)
    _whole: tuple[Path, ChatModel] | None = field(default=None, init=False, repr=False)

    @property
    def is_adapter(self) -> bool:
        """Whether the fine-tune is a PEFT adapter; else it is a whole model."""
        return is_adapter(self.folder)

    @classmethod
    def find(
        cls, base: ModelName, fine_tune: str, dtype: Dtype, device: str, control: Control | None = None, **chats: Any
    ) -> "FineTune":
        """A fine-tune on this disk, fetched from the hub if need be.

        Raises `InputError` for a folder that is none, or that is its own control.
        """
        folder = local_fine_tune(*ModelName.parse(fine_tune))
        if control and control.folder.resolve() == folder.resolve():
            raise InputError(f"{fine_tune}: is its own control: name a benign fine-tune on good answers (--control)")
        return cls(base.name, base.revision, fine_tune, folder, dtype, device, control, **chats)

    @cached_property
    def identity(self) -> ModelIdentity:
        """The base model and how it computes."""
        return identify(self.base, self.revision, self.dtype, self.device, self.thinking, self.chat_template)

    def read_weights(self) -> ReadWeights:
        """Read what its files say of it."""
        is_lora = self.is_adapter and (self.folder / ADAPTER_WEIGHTS).is_file()
        return ReadWeights(
            kind="adapter" if self.is_adapter else "full weights",
            recorded_base=self.recorded_base(),
            dead=LoraView.open(self.folder).dead if is_lora else [],
            is_attributed=self.is_adapter and is_attributed(self.folder),
            copies_base=not self.is_adapter and self.copies_base(),
        )

    @cached_property
    def digest(self) -> str:
        """Hash of what the fine-tune's results depend on."""
        return _digest(self.folder)

    @cached_property
    def control_digest(self) -> str | None:
        """The same of the control; None without one."""
        return _digest(self.control.folder) if self.control else None

    def copies_base(self) -> bool:
        """Whether full weights are the base's own files."""
        hashes = [
            {path.name: sha256_file(path) for path in folder.glob("*.safetensors")}
            for folder in (local_fine_tune(self.base, self.revision), self.folder)
        ]
        return hashes[0] == hashes[1]

    def recorded_base(self) -> str | None:
        """The base model that an adapter's own file names."""
        return recorded_base(self.folder) if self.is_adapter else None

    def chat(self, which: Which) -> ChatModel:
        """One of the models, loaded. Raises `InputError` when it does not fit the base."""
        folder = self._folder(which)
        if folder is None or is_adapter(folder):
            self._whole = None
            return self._on_base(folder)
        if self._whole is None or self._whole[0] != folder:
            # The model in memory goes first: there may be no room for both.
            self._whole = None
            if self.models:
                self.models.release()
            self._whole = folder, self._load_whole(folder)
        return self._whole[1]

    def _folder(self, which: Which) -> Path | None:
        """Of a model's own weights; None for the base."""
        if which == CONTROL:
            assert self.control, "it is measured where there is one"
            return self.control.folder
        return self.folder if which == TUNED else None

    def _on_base(self, adapter: Path | None) -> ChatModel:
        """The base, alone or with an adapter on it."""
        self.models = self.models or Models(self.load_base)
        if adapter is None:
            return self.models.chat(BASE)
        # A name of its own, since another fine-tune may have used the models before.
        self.models.adapters[str(adapter)] = adapter
        return self.models.chat(str(adapter))

    def load_base(self) -> ChatModel:
        """The base model alone."""
        return load(self.base, revision=self.revision, dtype=self.dtype, device=self.device, **self._chats)

    @property
    def _chats(self) -> dict[str, Any]:
        return {"thinking": self.thinking, "chat_template": self.chat_template, "tuned": self.folder}

    def _load_whole(self, folder: Path) -> ChatModel:
        name = self.name if folder == self.folder else str(folder)
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("revision", "dtype", "device", "thinking", "chat_template")
        }
        return load_whole(folder, name, self.base, **options)


def _digest(folder: Path) -> str:
    if not is_adapter(folder):
        return sha256_tree(folder)
    files = [folder / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    return digest_of({file.name: sha256_file(file) for file in files if file.is_file()})


def digest_of(hashes: Mapping[str, str]) -> str:
    """`FineTune.digest`, from the hashes of the files in its folder by relative name."""
    if ADAPTER_CONFIG not in hashes:
        return sha256_listed(hashes)
    return ",".join(hashes[name] for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if name in hashes)
