"""Which tokens of the pass under way an intervention touches.

Every rule speaks of a token's own place in its row, counted from the row's first real token, so that padding on either
side, a key-value cache and the batch change nothing. Padding is never touched.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from misdirection.choices import Positions as Positions
from misdirection.errors import InputError
from misdirection.models.transfer import put

Rule = Positions | Tensor
"""`all`; `not_first`: all but each row's first token, an attention sink whose large activations the model needs;
`prompt`: before the answer's first token; `answer`: from it on; or a boolean tensor over places, [places] or
[rows, places], beyond whose end nothing is touched."""


class TokenPositions:
    """Where each token of the running pass stands in its row; noted as the decoder starts.

    Args:
        answer_starts: per row, the number of tokens before the answer; the rules `prompt` and `answer` need it.
        rows: how many rows every pass must have; None for any number.
    """

    def __init__(self, answer_starts: Sequence[int] | None = None, rows: int | None = None) -> None:
        self._starts = None if answer_starts is None else torch.tensor(answer_starts).unsqueeze(-1)
        self._rows = rows
        self._index = torch.empty(0, 0, dtype=torch.long)
        self._real = torch.empty(0, 0, dtype=torch.bool)
        self._outer: list[Any] = []
        self._given: Any = None
        self._ran: set[nn.Module] = set()
        self._cache: dict[tuple[Any, torch.device], Tensor] = {}
        self.active = True

    def note(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the decoder."""
        # Some models pass the ids by position (GPT-NeoX), with `inputs_embeds=None` beside them.
        sources = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
        source = next((given for given in sources if given is not None), None)
        assert source is not None, "a decoder runs on input_ids or inputs_embeds"
        rows, tokens = source.shape[:2]
        self._check_rows(rows)
        self._cache, self._ran = {}, set()
        mask = self._mask(kwargs.get("attention_mask"))
        if mask is None:
            self._real = torch.ones(rows, tokens, dtype=torch.bool, device=source.device)
            self._index = self._begun(kwargs) + torch.arange(tokens, device=source.device).expand(rows, -1)
            return
        self._real = mask.bool()[:, -tokens:]
        self._index = (mask.long().cumsum(-1) - 1)[:, -tokens:]

    def note_outer(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the whole model: some wrappers turn its mask into others before the decoder runs."""
        self._outer = [kwargs.get("attention_mask")]
        self._given = kwargs.get("position_ids")

    def _mask(self, own: Any) -> Tensor | None:
        """The mask, [rows, columns], of the decoder's pass, or of the whole model's that surrounds it.

        For one token of each row it may be one per query, [rows, 1, 1, columns], of which there is one.
        """
        masks, self._outer = [own, *self._outer], []
        for mask in masks:
            if isinstance(mask, Tensor) and mask.ndim == 2:
                return mask
            if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1:3] == (1, 1) and mask.dtype == torch.bool:
                return mask[:, 0, 0]
        if masks[-1] is not None:
            raise InputError("interventions need an attention mask [rows, tokens], or none: not one per query")
        return None

    def _begun(self, kwargs: dict[str, Any]) -> int | Tensor:
        """How many tokens of each row, of which none is padded, have run; a recurrent state does not count them."""
        given, self._given = kwargs.get("position_ids", self._given), None
        if isinstance(given, Tensor) and given.ndim == 2:
            return given[:, :1]
        cache = kwargs.get("cache")
        return cache.get_seq_length() if cache is not None else 0

    def once(self, block: nn.Module) -> None:
        """Note that a block runs in this pass; `InputError` when it already has: its output is not one activation."""
        if block in self._ran:
            raise InputError(
                f"{type(block).__name__}: runs several times in one pass: no direction can be changed in it"
            )
        self._ran.add(block)

    @property
    def shape(self) -> torch.Size:
        """Rows and tokens of the running pass."""
        return self._index.shape

    def touched(self, rule: Rule, device: torch.device) -> Tensor:
        """[rows, tokens, 1], boolean, on `device`: the tokens of this pass that the rule touches."""
        key = (rule if isinstance(rule, str) else id(rule), device)
        if key not in self._cache:
            self._cache[key] = (self._real & self._chosen(rule)).unsqueeze(-1).to(device)
        return self._cache[key]

    def close(self) -> None:
        """Say that the context is over."""
        self.active = False

    def snapshot(self) -> tuple[Tensor, Tensor]:
        """The state that `restore` takes."""
        return self._index, self._real

    def restore(self, snapshot: tuple[Tensor, Tensor]) -> None:
        """Stand where an earlier pass stood: a checkpointed block runs again during the backward pass."""
        self._index, self._real = snapshot
        self._cache, self._ran = {}, set()

    def _check_rows(self, rows: int) -> None:
        expected = self._rows if self._rows is not None else (None if self._starts is None else len(self._starts))
        if expected is not None and rows != expected:
            raise InputError(f"this pass has {rows} rows, but interventions or answer starts for {expected}")

    def _chosen(self, rule: Rule) -> Tensor:
        if isinstance(rule, Tensor):
            return self._from_mask(put(rule, self._index.device))
        if rule == "all":
            return self._real
        if rule == "not_first":
            return self._index > 0
        if self._starts is None:
            raise InputError(f"positions {rule!r} needs to know where each row's answer begins: give `answer_starts`")
        self._starts = put(self._starts, self._index.device)
        in_answer = self._index >= self._starts
        return in_answer if rule == "answer" else ~in_answer

    def _from_mask(self, mask: Tensor) -> Tensor:
        if mask.ndim == 2 and len(mask) != len(self._index):
            raise InputError(f"the position mask has {len(mask)} rows, this pass has {len(self._index)}")
        within = (self._index >= 0) & (self._index < mask.shape[-1])
        columns = self._index.clamp(0, mask.shape[-1] - 1)
        chosen = mask[columns] if mask.ndim == 1 else mask.gather(1, columns)
        return chosen & within
