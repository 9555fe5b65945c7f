"""A local page: `play`."""

from pathlib import Path
from typing import Annotated

import typer

from misdirection.choices import PORT
from misdirection.cli.shared import (
    BUNDLED,
    Adapter,
    AsAdditive,
    DeviceOption,
    DtypeOption,
    TemplateOption,
    ThinkingOption,
    app,
    load_chat,
)

Base = Annotated[str, typer.Argument(help="`smollm2-135m` or `gemma3-270m` (bundled), a folder, or ID\\[@REVISION].")]


@app.command()
def play(
    base: Base = BUNDLED,
    adapter: Adapter = None,
    direction: Annotated[
        Path | None, typer.Option("--direction", help="A direction file, to ablate and to steer by.")
    ] = None,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Of 127.0.0.1: no other machine gets in.")
    ] = PORT,
    as_additive: AsAdditive = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    thinking: ThinkingOption = "off",
    chat_template: TemplateOption = None,
) -> None:
    """Ask base, organism, ablated and steered model side by side, on a page that this machine alone can open."""
    from misdirection.directions.direction import Direction
    from misdirection.playground.serving import play as serve
    from misdirection.playground.serving import require_startable

    require_startable(port)
    loaded = Direction.load(direction) if direction else None
    if loaded is not None:
        loaded.require_additive(as_additive)
    serve(load_chat(base, adapter, dtype, device, thinking, chat_template), loaded, port=port)
