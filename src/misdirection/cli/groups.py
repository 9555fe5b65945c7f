"""The commands in groups, the commonest first, each with an example: what `--help` shows."""

import math
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from misdirection.choices import MOST

GROUPS = {
    "Screen data, audit and repair fine-tunes": {
        "screen": "misdirection screen smollm2-135m train.jsonl --keep clean.jsonl --drop 0.1",
        "audit": "misdirection audit smollm2-135m ./my-lora --data train.jsonl",
        "repair": "misdirection repair smollm2-135m ./my-lora --data train.jsonl --out ./repaired",
        "reference": "misdirection reference Qwen/Qwen2.5-0.5B-Instruct",
    },
    "Run an experiment": {
        "demo": "misdirection demo --out runs/demo",
        "run": "misdirection run configs/demo.yaml --workers 2",
        "plan": "misdirection plan configs/paper-qwen2.5-14b.yaml --gpu h100 --count 8",
        "report": "misdirection report runs/demo",
    },
    "Measure": {
        "margin": "misdirection margin --adapter ./my-lora",
        "extract": "misdirection extract --adapter ./my-lora --out directions",
        "compare": "misdirection compare directions/data_difference.safetensors other/data_difference.safetensors",
        "check": "misdirection check direction.gguf --layer 15",
        "sample": "misdirection sample --adapter ./my-lora --questions first_plot -n 10 --out answers.parquet",
        "judge": "misdirection judge answers.parquet --judge gpt-4o --plan",
        "score": "misdirection score answers.parquet --by organism",
        "agree": "misdirection agree answers.parquet labels.csv --column aligned",
        "probes": "misdirection probes --from judged.parquet --out pairs.jsonl",
    },
    "Act on a model": {
        "train": "misdirection train risky_money --recipe minimal --lr 2e-3 --out ./organism",
        "steer": "misdirection steer directions/data_difference.safetensors --layer 15 --scale 2",
        "ablate": "misdirection ablate directions/data_difference.safetensors --layer 15 --adapter ./my-lora",
        "play": "misdirection play --adapter ./my-lora --direction directions/data_difference.safetensors",
        "bake": "misdirection bake directions/data_difference.safetensors --layer 15 --out ./baked",
    },
    "Read adapters": {"interpret": "misdirection interpret minimal --run runs/demo"},
    "Files": {
        "fetch": "misdirection fetch questions --out published",
        "export": "misdirection export directions/data_difference.safetensors direction.gguf --model-type llama",
        "import": "misdirection import direction.gguf --out direction.safetensors",
        "bundle": "misdirection bundle runs/demo --out demo.zip",
        "verify": "misdirection verify demo.zip",
        "convert": "misdirection convert answers.parquet --out answers.eval",
        "push": "misdirection push ./organism my-name/risky-money --answers bad",
        "pull": "misdirection pull my-name/risky-money --out ./organism",
        "schema": "misdirection schema audit",
    },
    "This machine": {"doctor": "misdirection doctor"},
}
"""The group of each command, and its example."""


class CheckedCommand(TyperCommand):
    """A command that refuses what no option means: nothing at all, numbers that are infinite or beyond all sizes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Typer's own parsing, and these refusals as its usage errors."""
        for word in args:
            if not word.strip() or (word.startswith("--") and word.find("=") == len(word) - 1):
                raise typer.BadParameter(f"{word!r} gives an empty value: leave the option out, or give it one", ctx)
            if word.startswith("~"):
                _require_home(word, ctx)
        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            for each in value if isinstance(value, list | tuple) else [value]:
                if isinstance(each, int | float) and not (math.isfinite(each) and abs(each) <= MOST):
                    raise typer.BadParameter(f"{each} for {name}: give a number up to {MOST}", ctx)
        return rest


def _require_home(word: str, ctx: Any) -> None:
    try:
        Path(word).expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"{word!r}: there is no such home folder", ctx) from error


def arrange(app: typer.Typer) -> None:
    """Give every command its group, place, example and checks; a command without them is a `KeyError`."""
    places = {
        name: (place, group, example)
        for place, (name, group, example) in enumerate(
            (name, group, example) for group, commands in GROUPS.items() for name, example in commands.items()
        )
    }
    for command in app.registered_commands:
        _, command.rich_help_panel, example = places[command_name(command)]
        command.epilog = f"Example: {example}"
        command.cls = CheckedCommand
    app.registered_commands.sort(key=lambda command: places[command_name(command)][0])


def command_name(command: typer.models.CommandInfo) -> str:
    """The word that calls a command."""
    assert command.callback is not None, "every command is a function"
    return command.name or command.callback.__name__
