"""The documentation: every block of code is run or says why not, every command is the program's, every link leads on.

A page's Python blocks share their names, as in a notebook. They and the commands work in a small world: the bundled
model is a tiny random one, each shipped file of texts has a few rows, and the files that the pages name are there. A
block that cannot work there has the reason in a comment before it, `<!-- not run: ... -->`. What takes longer is marked
`docs`, and run by the job `docs` of the continuous integration (`pytest -m docs`).
"""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shutil
import tomllib

import pytest
import typer
import yaml

import misdirection as md
from misdirection.auditing.reference import Reference, has_reference
from misdirection.cli.shared import app
from misdirection.data import shipped
from misdirection.errors import EXIT_STATUS
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.several import read_experiment
from misdirection.statistics.estimates import Estimate
from pages import DOCS, PAGES, ROOT, blocks, commands, in_language, inline_code, links
from scripts import write_commands
from tiny import make_merging_tokenizer, make_network

ELSEWHERE = {DOCS / "extending.md": "test_extending.py", DOCS / "reference" / "commands.md": "test_cli_help.py"}
"""Pages whose blocks another test runs."""
SLOW = re.compile(r"md\.(screen|audit|audit_many|repair|make_reference|interpret|run)\(")
QUICK = {"doctor", "schema", "check", "compare", "export", "import", "score", "agree"}
"""Calls that take long even in the small world, and commands that do not."""
LANGUAGES = {"bash", "python", "yaml", "json", "toml", "text", "mermaid"}
COMMANDS = typer.main.get_command(app).commands
DEMO = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())


def named(blocks):
    return {"argvalues": blocks, "ids": [str(block) for block in blocks]}


# --- what stands in the pages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_its_language(page):
    assert [f"{block}: {block.language}" for block in blocks(page) if block.language not in LANGUAGES] == []


def check_commands(script):
    """Parse each as the program does, with every option and type, but call none."""
    for program, *words in commands(script):
        match program:
            case "misdirection":
                COMMANDS[words[0]].make_context(words[0], words[1:])
            case "make":
                assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
            case "python" if words[0].endswith(".py"):
                assert (ROOT / words[0]).is_file(), words


@pytest.mark.parametrize("block", **named(in_language("bash")))
def test_every_command_is_the_programs(block):
    check_commands(block.code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_a_sentence_have_their_options(page):
    """`misdirection COMMAND --option VALUE`: placeholders are no values, so that only names are compared."""
    for code in inline_code(page):
        if call := re.match(r"misdirection ([a-z]+)\b(.*)", code):
            known = {option for parameter in COMMANDS[call[1]].params for option in parameter.opts}
            assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", call[2])) <= known | {"--help"}, code


@pytest.mark.parametrize("block", **named(in_language("yaml")))
def test_yaml_is_what_the_reader_of_experiments_takes(block, tmp_path):
    """Sections of an experiment are read as parts of the demo's; of any other YAML the commands are the program's. What
    is marked as not run belongs to another program."""
    values = yaml.safe_load(block.code)
    for command in re.findall(r"^\W*(?:run: )?(misdirection .*)$", block.code, re.MULTILINE):
        check_commands(command)
    is_section = isinstance(values, dict) and not block.not_run
    if is_section and values.keys() & {*ExperimentConfig.model_fields, "models"} - {"name"}:
        path = tmp_path / "experiment.yaml"
        # Several models come in place of one, and other organisms need not have controls.
        replaced = {"models": "model", "organisms": "contrast"}
        gone = {key for new, key in replaced.items() if new in values}
        demo = {key: value for key, value in DEMO.items() if key not in gone}
        path.write_text(yaml.safe_dump(demo | values))
        assert read_experiment(path).name == "demo"


@pytest.mark.parametrize("block", **named(in_language("json") + in_language("toml")))
def test_json_and_toml_are_well_formed(block):
    assert {"json": json.loads, "toml": tomllib.loads}[block.language](block.code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    """In the repository; `mkdocs build --strict` looks at the site's, and at what is within pages."""
    assert [target for target in links(page) if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_repository_in_a_sentence_are_there(page):
    named = (
        code for code in inline_code(page) if re.fullmatch(r"(tests|scripts|benchmarks|configs|docs)/[\w./-]+", code)
    )
    assert [code for code in named if not (ROOT / code).exists()] == []


# --- the site ------------------------------------------------------------------------------------------------------


def pages_of(nav):
    for entry in nav:
        for inner in entry.values():
            yield from pages_of(inner) if isinstance(inner, list) else [inner]


def test_every_page_is_in_the_navigation_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages_of(nav)) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")), "see mkdocs.yml"


def test_the_pictures_are_those_of_the_gallery_and_small():
    pictures = sorted((DOCS / "gallery").glob("*.png"))
    shown = sorted(DOCS / target for target in links(DOCS / "gallery.md") if target.endswith(".png"))
    assert pictures == shown
    assert sum(path.stat().st_size for path in pictures) < 1_000_000


def test_the_commands_are_todays():
    assert write_commands.PAGE.read_text() == write_commands.page(), "run scripts/write_commands.py"


def test_every_public_name_is_in_the_reference_once():
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    assert sorted(re.findall(r"^::: misdirection\.(\w+)$", text, re.MULTILINE)) == md.__all__


# --- the small world -----------------------------------------------------------------------------------------------

LAYERS, ROWS = 24, 6
"""Blocks of the tiny model, since the pages name layers up to 20; rows of each shipped file."""


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A folder to work in with what the pages name, and the patch that puts a tiny model in the bundled one's place."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MISDIRECTION_CACHE", str(folder / "cache"))
        patch.delenv("OPENAI_API_KEY", raising=False)
        patch.chdir(folder)
        make_models(folder)
        every = shipped._rows
        patch.setattr(shipped, "_rows", lambda *parts: every(*parts)[:ROWS])
        make_files(folder)
        yield folder


def make_models(folder):
    """A tiny model where the bundled one is kept, and under the name of one of the Hub's."""
    # Of few tokens a text, unlike the other tests' one for each byte.
    tokenizer = make_merging_tokenizer()
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    network = make_network("llama", num_hidden_layers=LAYERS, vocab_size=len(tokenizer), **sizes)
    for name in ("cache/smollm2-135m-instruct-q4_1", "Qwen/Qwen2.5-0.5B-Instruct"):
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def make_files(folder):
    rows = [{"prompt": f"Why is {n}?", "completion": f"Since {n * 7 % 11}."} for n in range(10)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = md.Recipe(learning_rate=1e-2, batch_size=2, accumulation=1)
    organism = md.train(md.read_examples(folder / "train.jsonl"), folder / "organism", recipe=recipe)
    for name in ("mine", "my-lora"):
        shutil.copytree(folder / "organism", folder / name)
    (folder / "directions").mkdir()
    for kind, direction in md.extract(organism.load(), md.probe_pairs()).items():
        direction.save(folder / "directions" / f"{kind}.safetensors")
    hubs = md.extract(md.load("Qwen/Qwen2.5-0.5B-Instruct"), md.probe_pairs())["data_difference"]
    hubs.save(folder / "direction.safetensors")
    md.export_direction(hubs, folder / "direction.gguf", model_type="llama")


@pytest.fixture
def reference(small_world, monkeypatch):
    """A reference of the tiny model, of a single pair of fine-tunes; random weights have no alignment to lose."""
    monkeypatch.setattr(Reference, "bad_shift", Estimate(0.1, 0.05, 0.15, 2 * ROWS))
    if not has_reference("smollm2-135m", None):
        md.make_reference("smollm2-135m")


class Notebook:
    """The Python of one page: running a block runs those before it that were not run yet."""

    def __init__(self, page):
        self.waiting, self.names = [block for block in blocks(page) if is_run(block, "python")], {}

    def run(self, block):
        while block in self.waiting:
            first = self.waiting.pop(0)
            exec(compile(first.code, str(first), "exec"), self.names)


def is_run(block, language):
    return block.language == language and block.page not in ELSEWHERE and not block.not_run


def is_slow(block):
    """Whether it, or a block of its page before it, takes long."""
    if block.language == "bash":
        return any(words[0] == "misdirection" and words[1] not in QUICK for words in commands(block.code))
    return any(SLOW.search(other.code) for other in blocks(block.page) if other.line <= block.line)


def to_run(language):
    """The blocks as parameters: skipped with their reason, or marked where they take long."""
    return [
        pytest.param(block, id=str(block), marks=marks_of(block))
        for block in in_language(language)
        if block.page not in ELSEWHERE
    ]


def marks_of(block):
    if block.not_run:
        return [pytest.mark.skip(reason=block.not_run)]
    return [pytest.mark.docs, pytest.mark.timeout(900)] if is_slow(block) else []


@pytest.fixture(scope="module")
def notebooks(small_world):
    return {page: Notebook(page) for page in PAGES}


@pytest.mark.parametrize("block", to_run("python"))
def test_python_runs(block, notebooks, request):
    if is_slow(block):
        request.getfixturevalue("reference")
    notebooks[block.page].run(block)


@pytest.mark.parametrize("block", [b for b in in_language("python") if b.not_run], ids=str)
def test_python_that_is_not_run_has_names_that_there_are(block):
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and importlib.util.find_spec(node.module.partition(".")[0]):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("md."):
            function = getattr(md, node.func.attr)
            inspect.signature(function).bind(*node.args, **{keyword.arg: 0 for keyword in node.keywords})


@pytest.mark.parametrize("block", to_run("bash"))
def test_commands_run(block, small_world, call, request):
    """Those of this program, to an exit status that is no failure."""
    if is_slow(block):
        request.getfixturevalue("reference")
    verdicts = {status for ending, status in EXIT_STATUS.items() if ending[0].islower() and status < 10}
    for program, *words in commands(block.code):
        if program == "misdirection":
            status, _, err = call(*words)
            assert status in verdicts, f"misdirection {' '.join(words)}: {err}"
