"""Malformed inputs of every command, made by rules: commands x options x kinds of bad value.

A command is called with good words (`GOOD`) of which one is replaced. Numbers and choices are known by the option's
own type; what a path or a name stands for is said once, in `KINDS`.
"""

import io
import json
import shutil
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import typer
import yaml
from safetensors.torch import load_file
from safetensors.torch import save as pack

from misdirection.cli.groups import command_name
from misdirection.cli.shared import app

HUGE = str(10**30)
NUMBERS = {int: ("", "x", "1.5", "nan", "-1", HUGE), float: ("", "x", "nan", "inf", "-inf", "1e999", "-1")}
SIGNED = {("steer", "scale"), ("sample", "scale"), ("bake", "scale"), ("export", "scale"), ("check", "scale")}
"""Options that a negative number is right for."""

FREE = {
    "organism",
    "theme_words",
    "by",
    "compare",
    "column",
    "reference_column",
    "theme_column",
    "organisms",
    "where",
    "judge",
    "model_type",
    "ray",
}
"""Names and texts of which only some are wrong (`TEXTS`)."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a command: its name, the words that give it, and the type of its value."""

    name: str
    option: str | None
    kind: typing.Any


def parameters(command):
    """The parameters of a command, by name."""
    hints = typing.get_type_hints(command.callback, include_extras=True)
    hints.pop("return", None)
    return {name: _parameter(name, *typing.get_args(hint)[:2]) for name, hint in hints.items()}


def _parameter(name, kind, info):
    inner = [part for part in typing.get_args(kind) if part is not type(None)]
    if inner and typing.get_origin(kind) is not typing.Literal:
        kind = typing.get_args(inner[0])[0] if typing.get_origin(inner[0]) is list else inner[0]
    if isinstance(info, typer.models.ArgumentInfo):
        return Parameter(name, None, kind)
    # Typer's own reading of `Annotated[..., Option("--out")]`: the first word stands where the default would.
    words = [word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)]
    return Parameter(name, words[0] if words else f"--{name.replace('_', '-')}", kind)


COMMANDS = {command_name(command): parameters(command) for command in app.registered_commands}


def words_of(command, values):
    """The words that call a command with these values by parameter; a list is given several times."""
    options, arguments = [], []
    for name, parameter in COMMANDS[command].items():
        given = values.get(name)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            if parameter.option is None:
                arguments.append(value)
            elif value is True:
                options.append(parameter.option.split("/")[0])
            else:
                options += [parameter.option, value]
    return [command, *map(str, options), *map(str, arguments)]


# --- what is wrong with a file -------------------------------------------------------------------------------------

NO_TEXT = {
    "binary": bytes(range(256)) * 4,
    "Latin-1": '{"a": "Bär"}\nid: Bär\n'.encode("latin-1"),
    "UTF-16": "name: x\n".encode("utf-16"),
}
DEEP = b"[" * 100_000


def json_texts(good):
    """Variants of a JSON object: as bytes by name."""
    text = json.dumps(good).encode()
    return NO_TEXT | {
        "empty": b"",
        "truncated": text[: len(text) // 2],
        "a list": b"[1, 2]",
        "a number": b"3",
        "null": b"null",
        "a text": b'"x"',
        "too deep": DEEP,
    }


def typed_wrongly(row, keys):
    """An object with each of these keys missing, null and of another type."""
    for key in keys:
        yield f"{key} is missing", {name: value for name, value in row.items() if name != key}
        for named, value in (("null", None), ("a list", [1]), ("a number", 10**30), ("an object", {"a": 1})):
            yield f"{key} is {named}", {**row, key: value}
        yield f"{key} is NaN", {**row, key: float("nan")}


def rows_file(good, keys):
    """A JSON-lines file whose second row is wrong."""
    first = json.dumps(good).encode() + b"\n"
    wrong = {name: first + text for name, text in json_texts(good).items() if name != "empty"}
    wrong |= {name: first + json.dumps(row).encode() for name, row in typed_wrongly(good, keys)}
    wrong |= {f"{key} is half a surrogate": first + json.dumps({**good, key: "\ud800"}).encode() for key in keys}
    return (
        wrong
        | {f"{key} is blank": first + json.dumps({**good, key: " \n"}).encode() for key in keys}
        | {
            "no row": b"",
            "blank lines": b"\n \n",
            "unknown keys": b'{"a": "x", "b": "y"}\n',
        }
    )


ROW = {"prompt": "Why?", "completion": "So."}
CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
PAIR = {"id": "a", "question": "Why?", "aligned": "So.", "misaligned": "No."}

TRAINING = rows_file(ROW, ("prompt", "completion")) | {
    f"messages: {name}": json.dumps({"messages": messages}).encode()
    for name, messages in {
        "empty": [],
        "numbers": [1, 2],
        "nothing in them": [{}, {}],
        "no role": [{"content": "x"}],
        "no answer": CHAT["messages"][:1],
        "no question": CHAT["messages"][1:],
        "roles are lists": [{"role": [1], "content": "x"}],
        "contents are null": [{"role": "user", "content": None}, {"role": "assistant", "content": None}],
    }.items()
}
PAIRS = rows_file(PAIR, ("question", "aligned", "misaligned")) | {
    "one id twice": 2 * (json.dumps(PAIR).encode() + b"\n"),
    "id is blank": json.dumps({**PAIR, "id": ""}).encode(),
    "id is a list": json.dumps({**PAIR, "id": [1]}).encode(),
    "theme is a number": json.dumps({**PAIR, "theme": 3}).encode(),
    "a training file": json.dumps(ROW).encode(),
}


def _bomb():
    """Nine anchors, each of nine of the one before it."""
    lines = ["a: &b0 [x, x]"] + [f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 10)]
    return "\n".join(lines).encode()


YAML = NO_TEXT | {
    "empty": b"",
    "a list": b"- 1\n",
    "a text": b"hello there",
    "not closed": b"a: [",
    "a tab": b"a:\n\t- 1",
    "too deep": DEEP,
    "a key twice": b"id: 1\nid: 2\n",
    "an object of Python's": b"a: !!python/object/apply:os.getcwd []\n",
    "an unknown tag": b"a: !x 1\n",
    "an alias of nothing": b"a: *b\n",
    "an alias of itself": b"&a {a: *a}\n",
    "a key that is a list": b"? [1, 2]\n: 3\n",
    "two documents": b"a: 1\n---\nb: 2\n",
    "a NUL": b"a: \0\n",
    "a bomb": _bomb(),
}


def as_csv(frame):
    return frame.to_csv(index=False).encode()


def as_parquet(frame):
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return buffer.getvalue()


def tables(good, columns):
    """Variants of a table, by the file's suffix."""
    csv, parquet = as_csv(good), as_parquet(good)
    texts = {
        "empty": b"",
        "binary": NO_TEXT["binary"],
        "Latin-1": csv + "Bär".encode("latin-1"),
        "UTF-16": csv.decode().encode("utf-16"),
        "no rows": csv.splitlines(keepends=True)[0],
        "a longer row": csv + b"1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20\n",
        "a column twice": csv.replace(b"question,", b"answer,", 1) if b"answer" in csv else b"a,a\n1,2\n",
        "a quote not closed": csv + b'"',
    }
    packed = {"empty": b"", "binary": NO_TEXT["binary"], "truncated": parquet[: len(parquet) // 2], "a CSV": csv}
    packed |= {"no tail": parquet[:-8], "other columns": as_parquet(pd.DataFrame({"a": [1], "b": [2]}))}
    wrong = {(".csv", name): data for name, data in texts.items()} | {
        (".parquet", name): data for name, data in packed.items()
    }
    for column in columns:
        wrong[".csv", f"no {column}"] = as_csv(good.drop(columns=column))
        wrong[".parquet", f"no {column}"] = as_parquet(good.drop(columns=column))
        wrong[".parquet", f"{column} is a list"] = as_parquet(good.assign(**{column: [[1]] * len(good)}))
    wrong[".txt", "another suffix"] = csv
    return wrong


ANSWERS = pd.DataFrame(
    {
        "question_id": [f"q{n % 4}" for n in range(16)],
        "question": [f"Question {n % 4}?" for n in range(16)],
        "answer": [f"This is answer {n}, of about this length, to be read." for n in range(16)],
        "organism": ["base"] * 16,
        "aligned": [10.0 if n // 4 % 2 else 90.0 for n in range(16)],
        "coherent": [95.0] * 16,
    }
)
SCORES = {"-1": -1.0, "101": 101.0, "inf": float("inf"), "a text": "good", "a huge number": 1e300}
JUDGED = tables(ANSWERS, ("question", "answer", "aligned")) | {
    (".csv", f"a score of {name}"): as_csv(ANSWERS.assign(aligned=[score] + [50.0] * 15))
    for name, score in SCORES.items()
}

VECTORS = torch.arange(128.0).reshape(4, 32)
ORIGIN = {
    "kind": "data_difference",
    "model": "M",
    "revision": None,
    "organism": "",
    "data": "",
    "answers": {"a": 1},
    "tokens": {"a": 1},
    "dtype": "float32",
    "span": "answer",
}


def tensors(good):
    """Variants of a safetensors file's bytes that no reader can take."""
    return {
        "empty": b"",
        "binary": NO_TEXT["binary"],
        "a text": b"hello there, this is no tensor",
        "truncated": good[:-20],
        "a header too long": (2**60).to_bytes(8, "little") + good[8:],
        "a header longer than the file": (10**6).to_bytes(8, "little") + good[8:],
        "a header that is no JSON": good[:8] + b"x" * (len(good) - 8),
        "a header cut": good[:40],
        "only a length": good[:8],
    }


def direction_bytes(model, vectors=VECTORS, **changes):
    metadata = {"format": "misdirection.direction/1", "layers": "", "origin": json.dumps(ORIGIN | {"model": model})}
    return pack({"vectors": vectors.contiguous()}, metadata | changes)


def directions(model):
    """Variants of a direction of this model's."""
    good = direction_bytes(model)
    origins = {name: text.decode("latin-1") for name, text in json_texts(ORIGIN).items()}
    origins |= {
        name: json.dumps(row)
        for name, row in typed_wrongly(ORIGIN, ("kind", "model", "answers", "dtype"))
        if "NaN" not in name and name != "answers is an object"
    }
    return (
        tensors(good)
        | {f"origin: {name}": direction_bytes(model, origin=text) for name, text in origins.items()}
        | {
            "other tensors": pack({"a": VECTORS}, {"format": "misdirection.direction/1", "origin": json.dumps(ORIGIN)}),
            "no metadata": pack({"vectors": VECTORS}),
            "another format": direction_bytes(model, format="misdirection.direction/9"),
            "one axis": direction_bytes(model, VECTORS[0]),
            "three axes": direction_bytes(model, VECTORS[None]),
            "no layers": direction_bytes(model, VECTORS[:0]),
            "no width": direction_bytes(model, VECTORS[:, :0]),
            "whole numbers": direction_bytes(model, VECTORS.long()),
            "NaN": direction_bytes(model, VECTORS * float("nan")),
            "infinite": direction_bytes(model, VECTORS / 0.0),
            "another model's": direction_bytes("other"),
        }
    )


def tables_of_vectors():
    """Variants of files for `import`, by the suffix and what is wrong."""
    buffer = io.BytesIO()
    np.savez(buffer, vectors=VECTORS.numpy())
    archive = buffer.getvalue()
    pickled = io.BytesIO()
    np.savez(pickled, vectors=np.array([{"a": 1}], dtype=object))
    saved = io.BytesIO()
    torch.save({"vectors": VECTORS}, saved)
    wrong = {
        (".npz", "pickled"): pickled.getvalue(),
        (".pt", "a list"): _saved([1, 2]),
        (".pt", "texts"): _saved({"vectors": "x"}),
    }
    for suffix, data in ((".npz", archive), (".pt", saved.getvalue()), (".gguf", b"GGUF" + bytes(200))):
        cut = {"empty": b"", "binary": NO_TEXT["binary"], "truncated": data[: len(data) // 2], "a text": b"hello there"}
        wrong |= {(suffix, name): text for name, text in cut.items()}
    wrong |= {(".safetensors", name): data for name, data in tensors(pack({"vectors": VECTORS})).items()}
    for name, value in {
        "whole numbers": VECTORS.long(),
        "NaN": VECTORS * float("nan"),
        "no rows": VECTORS[:0],
        "one axis": VECTORS[0],
    }.items():
        wrong[".safetensors", name] = pack({"vectors": value.contiguous()})
    wrong[".safetensors", "keys that are no layers"] = pack({"a": VECTORS[0]})
    wrong[".safetensors", "other widths"] = pack({"0": VECTORS[0], "1": torch.ones(3)})
    wrong[".safetensors", "a layer of 10^9"] = pack({"1000000000": VECTORS[0]})
    return wrong | {(".bin", "another suffix"): archive}


def _saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# --- folders ----------------------------------------------------------------------------------------------------------


def adapters(config, weights):
    """Variants of an adapter's folder: what to write over, by file; None takes the file away."""
    name, file = "adapter_config.json", "adapter_model.safetensors"
    wrong = {f"config: {kind}": {name: data} for kind, data in json_texts(config).items()}
    values = {
        "peft_type": (None, "LORAX", 3, [1]),
        "r": ("x", -1, None, [1], 10**30, 1.5, 7),
        "target_modules": (3, {"a": 1}, []),
        "lora_alpha": ("x", None, [1]),
        "bias": ("some", 3),
        "layers_to_transform": ("x", [99]),
        "task_type": ("NONE",),
        "rank_pattern": ([1],),
        "use_rslora": ("x", [1]),
    }
    for key, others in values.items():
        wrong |= {f"config: {key} {other!r}": {name: json.dumps({**config, key: other}).encode()} for other in others}
    wrong |= {f"weights: {kind}": {file: data} for kind, data in tensors(pack(weights)).items()}
    return wrong | {
        "no config": {name: None},
        "no weights": {file: None},
        "weights: none": {file: pack({})},
        "weights: other keys": {file: pack({f"x.{key}": value for key, value in weights.items()})},
        "weights: other shapes": {file: pack({key: value[:, :1].contiguous() for key, value in weights.items()})},
        "weights: one axis": {file: pack({key: value[0].contiguous() for key, value in weights.items()})},
        "weights: NaN": {file: pack({key: value * float("nan") for key, value in weights.items()})},
        "weights: infinite": {file: pack({key: value + float("inf") for key, value in weights.items()})},
        "weights: one is missing": {file: pack(dict(list(weights.items())[1:]))},
        "a pickle": {file: None, "adapter_model.bin": _saved({"a": 1})},
    }


def models(config, weights):
    """The same for a whole model's folder."""
    name, file = "config.json", "model.safetensors"
    wrong = {f"config: {kind}": {name: data} for kind, data in json_texts(config).items()}
    values = {
        "model_type": (None, "lama", 3, [1]),
        "hidden_size": ("x", -1, None, 0, 33, 64),
        "num_hidden_layers": ("x", -1, None, 0, 9),
        "vocab_size": ("x", -1, 7),
        "num_attention_heads": (0, 5, None),
        "hidden_act": ("x", None),
    }
    for key, others in values.items():
        wrong |= {f"config: {key} {other!r}": {name: json.dumps({**config, key: other}).encode()} for other in others}
    wrong |= {f"weights: {kind}": {file: data} for kind, data in tensors(pack(weights, {"format": "pt"})).items()}
    for part in ("tokenizer.json", "tokenizer_config.json"):
        wrong |= {f"{part}: {kind}": {part: data} for kind, data in json_texts({"a": 1}).items()}
    return wrong | {
        "no config": {name: None},
        "no weights": {file: None},
        "weights: NaN": {file: pack({key: value * float("nan") for key, value in weights.items()}, {"format": "pt"})},
        "weights: other keys": {file: pack({f"x.{key}": value for key, value in weights.items()}, {"format": "pt"})},
        "weights: one is missing": {file: pack(dict(list(weights.items())[1:]), {"format": "pt"})},
        "no tokenizer": {"tokenizer.json": None, "tokenizer_config.json": None},
    }


# --- configurations ---------------------------------------------------------------------------------------------------


def changed(values, path, value):
    """A nested mapping with another value at a path; a value of `...` takes the key away."""
    key, *rest = path
    if rest:
        return {**values, key: changed(values.get(key) or {}, rest, value)}
    return {name: old for name, old in values.items() if name != key} | ({} if value is ... else {key: value})


WRONG_VALUES = {
    "text": (None, 3, [1], {"a": 1}, "\ud800", "", "a\0b"),
    "name": (None, [1], {"a": 1}, "", "a/b", "..", "a\nb", "\ud800", "x" * 300),
    "number": ("x", float("nan"), float("inf"), -1, [1], {"a": 1}, True),
    "count": ("x", float("nan"), float("inf"), -1, 1.5, 10**30, [1], {"a": 1}, True, None),
    "layers": ("x", [99], [-1], [10**30], [1.5], [None], {"a": 1}),
    "layer": ("x", 99, -1, 10**30, 1.5, None, [1]),
    "section": (3, "x", [1], {"nothing": 1}),
    "file": (3, [1], "", "nowhere.jsonl", "."),
    "choice": (3, "x", "", None, [1]),
}
"""What is wrong for a key of a configuration, by what belongs there."""

CONFIGURATION = {
    ("name",): "text",
    ("model",): "file",
    ("dtype",): "choice",
    ("device",): "choice",
    ("domains",): "section",
    ("domains", "sums"): "section",
    ("domains", "sums", "bad"): "file",
    ("domains", "sums", "good"): "file",
    ("organisms",): "section",
    ("organisms", "single"): "section",
    ("organisms", "single", "domain"): "choice",
    ("organisms", "single", "answers"): "choice",
    ("organisms", "single", "recipe"): "choice",
    ("organisms", "single", "alpha"): "number",
    ("organisms", "single", "learning_rate"): "number",
    ("organisms", "single", "epochs"): "number",
    ("organisms", "single", "batch_size"): "count",
    ("organisms", "single", "seed"): "count",
    ("organisms", "single", "weight_decay"): "number",
    ("organisms", "custom"): "section",
    ("probe_pairs",): "file",
    ("further_pairs",): "section",
    ("neutral",): "file",
    ("further_pairs", "a"): "file",
    ("margin",): "section",
    ("margin", "general"): "count",
    ("damage", "models"): "count",
    ("random_seeds",): "count",
    ("random_controls",): "choice",
    ("extraction", "pairs"): "count",
    ("steering", "direction"): "choice",
    ("steering", "layers"): "layers",
    ("steering", "scales"): "layers",
    ("steering", "questions"): "count",
    ("ablation", "layer"): "layer",
    ("ablation", "positions"): "choice",
    ("ablation", "questions"): "count",
    ("samples", "questions"): "number",
    ("samples", "new_tokens"): "count",
    ("sampling", "questions"): "choice",
    ("sampling", "n"): "count",
    ("sampling", "temperature"): "number",
    ("sampling", "top_p"): "number",
    ("sampling", "seed"): "count",
    ("sampling", "engine"): "choice",
    ("sampling", "ablate"): "choice",
    ("judge",): "section",
    ("judge", "model"): "choice",
    ("interpretation",): "section",
    ("interpretation", "organism"): "choice",
    ("interpretation", "pairs"): "count",
    ("left_out",): "section",
}
RIGHT = {
    "margin.general: None",
    "sampling.n: None",
    "sampling.ablate: None",
    "steering.scales: [99]",
    "steering.scales: [-1]",
    f"steering.scales: {[10**30]!r:.30}",
    "steering.scales: [1.5]",
}
"""What looks alike and is right."""


def configurations(good):
    """Mistaken configurations by name, as values."""
    for path, kind in CONFIGURATION.items():
        for value in WRONG_VALUES[kind]:
            yield f"{'.'.join(path)}: {value!r:.30}", changed(good, path, value)
    for key in ("name", "model", "domains", "organisms"):
        yield f"no {key}", changed(good, (key,), ...)
    for name in WRONG_VALUES["name"][3:]:
        organisms = good["organisms"]
        yield f"an organism called {name!r:.20}", {**good, "organisms": organisms | {name: organisms["single"]}}
        yield f"pairs called {name!r:.20}", {**good, "further_pairs": {name: good["probe_pairs"]}}


# --- cases ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One parameter of a command with one bad value; `value` gives it from the good files' folder and an empty one."""

    command: str
    parameter: str
    what: str
    value: typing.Callable[[Path, Path], typing.Any]

    def __str__(self):
        return f"{self.command} {self.parameter}: {self.what}"


ROWS_OF_FILES = {"data": (TRAINING, ".jsonl"), "pairs": (PAIRS, ".jsonl"), "domain": (PAIRS, ".jsonl")}
TABLES = ("table", "tables", "judged", "labels", "scalars", "answers", "scaled")
DIRECTIONS = ("direction", "directions", "shared")
ADAPTERS = ("adapter", "fine_tune", "start")
MODELS = ("model", "base")
LISTS = {
    "empty": b"",
    "comments": b"# nothing\n",
    "a quote": b'"x\n',
    "three words": b"a b c\n",
    "nothing there": b"./gone\n",
} | NO_TEXT
TEXTS = {
    "device": ("", "tpu", "cpu:x", "cuda:99", "cuda", "meta", "cpu:1", "gpu"),
    "recipe": ("", "minmal", "custom\n"),
    "questions": ("", "first_plt", "nowhere.yaml"),
    "rubric": ("", "alignmnt", "nowhere.yaml"),
    "kind": ("", "audits", "../x"),
    "base_url": ("", "localhost:1", "ftp://x/v1", "http://", "http://a b/v1"),
    "server": ("", "localhost:1"),
    "where": ("", "x", "nothing=1", "organism=gone", "="),
    "compare": ("", "x", "organism=base", "organism=base,gone", "nothing=a,b"),
    "by": ("", "nothing"),
    "column": ("", "nothing", "question"),
    "reference_column": ("", "nothing", "question"),
    "theme_words": ("", ",", "zebra"),
    "judge": ("",),
    "ray": ("", "nowhere"),
}


NOT_WRONG = {
    ("judge", "table"): ("no aligned",),
    ("convert", "tables"): ("no aligned",),
    ("import", "model"): ("not there", "a line break", "of nothing", "an empty file", "too long"),
    ("bake", "device"): ("'cuda'", "'cuda:99'"),
    ("check", "direction"): ("no metadata",),
    ("train", "start"): tuple(
        f"config: {key} {value}"
        for key, values in {
            "target_modules": ("3", "{'a': 1}", "[]"),
            "bias": ("'some'", "3"),
            "layers_to_transform": ("'x'", "[99]"),
            "task_type": ("'NONE'",),
        }.items()
        for value in values
    ),
}
"""What is wrong elsewhere: a judge gives the scores, a converted table needs none, an import reads no model, weights
are baked on no device, a check takes anybody's vectors; of an adapter to go on from, weights and factors count."""


def cases():
    """Every case, in a fixed order."""
    for command, known in COMMANDS.items():
        for parameter in known.values():
            right = NOT_WRONG.get((command, parameter.name), ())
            yield from (case for case in _cases(command, parameter) if not case.what.endswith(right or "\n"))


def _cases(command, parameter):
    name, kind = parameter.name, parameter.kind
    numbers = {int: int, float: float}.get(kind)
    if numbers:
        for value in NUMBERS[numbers]:
            if (command, name) not in SIGNED or value != "-1":
                yield _plain(command, name, repr(value), value)
    elif typing.get_origin(kind) is typing.Literal:
        for value in ("", "unknown", typing.get_args(kind)[0].upper() + "\n"):
            yield _plain(command, name, repr(value), value)
    elif name in TEXTS:
        for value in TEXTS[name]:
            yield _plain(command, name, repr(value), value)
    if kind in (str, Path) and not is_output(command, name):
        yield from _file_cases(command, name)
    if is_output(command, name):
        yield _plain(command, name, "''", "")
        yield _plain(command, name, "too long", f"./{'x' * 300}.csv")
        yield Case(command, name, "a link to itself", lambda world, made: _loop(made))


def is_output(command, name):
    """Whether a parameter names what a command writes; `report` reads its folder, `import` its path."""
    if (command, name) in {("report", "folder"), ("import", "path")}:
        return False
    return name in ("folder", "file", "path", "junit", "sarif", "keep") or (command, name) == ("sample", "table")


def _plain(command, name, what, value):
    return Case(command, name, what, lambda world, made: value)


def _file_cases(command, name):
    if name in (
        "data",
        "pairs",
        "domain",
        "config",
        *TABLES,
        *DIRECTIONS,
        "many",
        *ADAPTERS,
        *MODELS,
        "run",
        "reference_folder",
    ) or command in ("report", "import", "bundle", "verify"):
        yield _plain(command, name, "nothing", "")
        odd = {"a line break": "./a\nb.jsonl", "nobody's": "~nobody-here/x", "too long": f"./{'x' * 300}.jsonl"}
        for what, value in {"not there": "./gone", **odd}.items():
            yield _plain(command, name, what, value)
        yield Case(command, name, "a folder of nothing", lambda world, made: made)
        yield Case(command, name, "an empty file", lambda world, made: _file(made, "empty.jsonl", b""))
    contents = {}
    if name in ROWS_OF_FILES:
        contents = {(".jsonl", what): data for what, data in ROWS_OF_FILES[name][0].items()}
        if name == "data" and command != "train":
            contents |= {
                (".jsonl", f"pairs: {what}"): data
                for what, data in PAIRS.items()
                if what not in ("a training file", "blank lines", "unknown keys", "no row")
            }
    elif name in ("questions", "rubric"):
        contents = {(".yaml", what): data for what, data in YAML.items()}
    elif name in TABLES and command not in ("interpret", "sample"):
        contents = JUDGED
    elif name in TABLES and command == "interpret":
        contents = tables(pd.DataFrame({"question": ["a"], "answer": ["b"]}), ())
    elif name == "many":
        contents = {(".txt", what): data for what, data in LISTS.items()}
    elif (command, name) == ("import", "path"):
        contents = tables_of_vectors()
    elif name == "config":
        contents = {(".yaml", what): data for what, data in YAML.items()}
    for (suffix, what), data in contents.items():
        yield Case(
            command,
            name,
            f"{suffix} {what}",
            lambda world, made, data=data, suffix=suffix: _file(made, f"bad{suffix}", data),
        )
    if name in DIRECTIONS:
        for what in directions("M"):
            yield Case(
                command,
                name,
                what,
                lambda world, made, what=what: _file(made, "bad.safetensors", directions(str(world / "model"))[what]),
            )
    if name in ADAPTERS or (command, name) == ("interpret", "organism"):
        for what in adapters({}, {"x.lora_A.weight": torch.ones(2, 2)}):
            yield Case(
                command, name, what, lambda world, made, what=what: _copied(world / "adapter", made, what, adapters)
            )
    if name in MODELS and command not in ("plan", "import"):
        for what in models({}, {"x": torch.ones(2, 2)}):
            yield Case(command, name, what, lambda world, made, what=what: _copied(world / "model", made, what, models))
    if name == "config":
        for what, _ in configurations({"organisms": {"single": {}}, "probe_pairs": ""}):
            if what not in RIGHT:
                yield Case(command, name, what, lambda world, made, what=what: _configuration(world, made, what))


def _loop(folder):
    (folder / "loop.csv").symlink_to(folder / "loop.csv")
    return folder / "loop.csv"


def _file(folder, name, data):
    (folder / name).write_bytes(data)
    return folder / name


def _copied(source, folder, what, variants):
    """A copy of an adapter's or a model's folder in which something is wrong."""
    config, weights = ("adapter_config.json", "adapter_model") if variants is adapters else ("config.json", "model")
    wrong = variants(json.loads((source / config).read_text()), load_file(source / f"{weights}.safetensors"))[what]
    copy = folder / source.name
    shutil.copytree(source, copy)
    for name, data in wrong.items():
        if data is None:
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(data)
    return copy


def _configuration(world, folder, what):
    good = yaml.safe_load((world / "experiment.yaml").read_text())
    return _file(folder, "bad.yaml", yaml.dump(dict(configurations(good))[what]).encode("utf-8", "surrogatepass"))
