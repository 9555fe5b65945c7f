"""A plugin of Axolotl that has its trainings watched, by a name in its configuration:

    plugins:
      - misdirection.auditing.axolotl.WatchPlugin
    misdirection_watch:
      stop_above: 0.01

Axolotl loads this module; nothing here does, so that it need not be installed. Its interface as of version 0.21.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field

from misdirection.auditing.callback import watch
from misdirection.settings import Section


class WatchSettings(Section):
    """What `watch` is told, under its own names."""

    every: int | None = Field(None, ge=1)
    stop_above: float | None = Field(None, gt=0)


class WatchArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration, which drops keys that nobody declares."""

    misdirection_watch: WatchSettings | None = None


class WatchPlugin(BasePlugin):
    """Watches the trainer that Axolotl made; its figures go to the trackers of Axolotl's configuration."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the keys that this plugin adds."""
        return f"{__name__}.{WatchArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Called once the trainer is whole, before it trains. Raises as `watch` does."""
        settings = WatchSettings(**dict(cfg.misdirection_watch or {}))
        watch(trainer, every=settings.every, stop_above=settings.stop_above)
