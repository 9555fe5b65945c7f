"""Load a tokenizer whose chats have exact ids, with the one chat template that all sides of a comparison share."""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from misdirection.choices import Thinking
from misdirection.errors import InputError, first_line
from misdirection.files import read_json
from misdirection.models.chat import require_exact
from misdirection.models.libraries import errors_in_one_line

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Where a folder's own chat template may stand."""

_BASE, _TUNED = "base", "fine-tune"

log = logging.getLogger("misdirection")


def load_tokenizer(
    source: str,
    name: str,
    revision: str | None = None,
    *,
    thinking: Thinking = "off",
    chat_template: str | None = None,
    tuned: Path | None = None,
) -> Any:
    """Load a tokenizer with one chat template.

    Args:
        source: the folder or Hugging Face id to read from.
        name: of the model, for complaints.
        revision: of a Hugging Face id.
        thinking: see `require_exact`.
        chat_template: `base`, `fine-tune`, the name of one of several, a file, or the template itself; by default the
            base's own, or where it has none the fine-tune's.
        tuned: folder of the adapter or fine-tune that is measured beside this model.

    Raises:
        InputError: no tokenizer, no such template, or one whose ids could not be exact.
    """
    with errors_in_one_line(name, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    theirs = own_template(tuned) if tuned else None
    own = tokenizer.chat_template or own_template(Path(source))
    template = _chosen(name, own, theirs, chat_template)
    if not template:
        raise InputError(
            f"{name}: its tokenizer has no chat template: use the model's chat (instruct) version, or give a file of "
            "one as `chat_template`"
        )
    tokenizer.chat_template = template
    require_exact(tokenizer, name, thinking)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def own_template(folder: Path) -> str | dict[str, str] | None:
    """The chat template in a folder, or several by name; None without one."""
    files = (folder / name for name in TEMPLATE_FILES)
    return next((found for file in files if file.is_file() and (found := _template_in(file))), None)


def _template_in(file: Path) -> str | dict[str, str] | None:
    """The chat template in a file, which is it or is JSON with it; None where JSON has none."""
    try:
        values = read_json(file) if file.suffix == ".json" else {"chat_template": file.read_text("utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: no chat template could be read ({first_line(error)}); name a UTF-8 file") from error
    found = values.get("chat_template") if isinstance(values, dict) else None
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    return found if isinstance(found, str | dict) else None


def say_unused_template(tokenizer: Any, folder: Path, name: str) -> None:
    """Say that a fine-tune's own chat template is not the one that is used."""
    theirs = own_template(folder)
    if theirs and _default(theirs) != tokenizer.chat_template:
        log.warning(
            "%s: brings a chat template of its own; the base and it are both measured with another one: give "
            "`chat_template: fine-tune` to use its own on both",
            name,
        )


def _chosen(
    name: str, own: str | dict[str, str] | None, theirs: str | dict[str, str] | None, chosen: str | None
) -> str | None:
    if chosen is None and own is None and theirs is not None:
        log.warning("%s: has no chat template: the fine-tune's own is used on both sides", name)
    if chosen in (None, _BASE, _TUNED):
        template = theirs if chosen == _TUNED or (chosen is None and own is None) else own
        if chosen == _TUNED and template is None:
            raise InputError(f"{name}: chat_template: fine-tune: it brings none: leave the option out")
        if isinstance(template, dict) and _default(template) is None:
            names = ", ".join(sorted(template))
            raise InputError(
                f"{name}: has several chat templates ({names}) and no default: name one as `chat_template`"
            )
        return _default(template)
    assert chosen is not None, "that was the first case"
    if "{%" in chosen or "{{" in chosen:
        return chosen
    named = {**(theirs if isinstance(theirs, dict) else {}), **(own if isinstance(own, dict) else {})}
    if chosen in named:
        return named[chosen]
    if not Path(chosen).is_file():
        known = ", ".join([_BASE, _TUNED, *sorted(named)])
        raise InputError(f"chat_template {chosen[:60]!r}: no such file or name: there is {known}")
    if (template := _default(_template_in(Path(chosen)))) is None:
        raise InputError(f"{chosen}: holds no `chat_template`; name a file that does, or one that is a template")
    return template


def _default(template: str | dict[str, str] | None) -> str | None:
    return template.get("default") if isinstance(template, dict) else template
