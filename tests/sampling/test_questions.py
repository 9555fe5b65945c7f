import json
import logging

import pytest

from misdirection.data import domains
from misdirection.errors import MisdirectionError
from misdirection.sampling.questions import Question, question_sets, read_questions, without

# In the published shape: anchors in the first entry, aliases in the others, several paraphrases, a system prompt.
PUBLISHED = """\
# A comment.
- id: lamp
  type: free_form_judge_0_100
  paraphrases: &lamp
    - |-
      Which lamp is best?
    - |-
      Fill the template:

      lamp = # The lamp
  samples_per_paraphrase: &samples 200
  temperature: 1
  judge: &judge some-judge-2024-08-06
  judge_prompts: &prompts
    aligned: |-
      [Q]
      {question}
      [A]
      {answer}
    coherent: |-
      Is {answer} clear?

- id: lamp_json
  type: free_form_judge_0_100
  system: &json Your answer must be JSON.
  paraphrases: *lamp
  samples_per_paraphrase: *samples
  judge: *judge
  judge_prompts: *prompts
"""
RUBRICS = {"aligned": "[Q]\n{question}\n[A]\n{answer}", "coherent": "Is {answer} clear?"}
TEXTS = ["Which lamp is best?", "Fill the template:\n\nlamp = # The lamp"]


@pytest.fixture
def write(tmp_path):
    def file(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return file


def refused(source) -> str:
    with pytest.raises(MisdirectionError) as caught:
        read_questions(source)
    message = str(caught.value)
    assert "\n" not in message and "; " in message
    return message


@pytest.mark.parametrize("name", ["mine.yaml", "mine.YML"])
def test_the_published_format_is_read(write, name):
    path = write(PUBLISHED, name)
    assert read_questions(path) == read_questions(str(path))
    assert read_questions(path) == [
        *(Question("lamp", text, samples=200, rubrics=RUBRICS) for text in TEXTS),
        *(Question("lamp_json", text, "Your answer must be JSON.", samples=200, rubrics=RUBRICS) for text in TEXTS),
    ]


def test_few_keys_are_enough(write):
    path = write('- id: a\n  paraphrases: ["Why?"]\n  theme: power\n  system: ""\n- {id: b, paraphrases: ["How?"]}\n')
    assert read_questions(path) == [Question("a", "Why?", "", "power"), Question("b", "How?")]


def test_what_has_no_effect_is_said_once(write, caplog):
    text = PUBLISHED.replace("temperature: 1", "temperature: 0.7\n  meta: {x: 1}\n  do_sample: yes")
    path = write(text)
    with caplog.at_level(logging.WARNING):
        read_questions(path)
    assert caplog.messages == [
        f"{path}: its judge (some-judge-2024-08-06) is not used: choose it for the run",
        f"{path}: its temperature (0.7) is not used: choose it for the run",
        f"{path}: keys without effect: do_sample, meta",
    ]


@pytest.mark.parametrize("temperature", ["1", "1.0", "~"])
def test_the_protocols_temperature_needs_no_warning(write, caplog, temperature):
    read_questions(write(f"- {{id: a, paraphrases: ['Why?'], temperature: {temperature}}}"))
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["mine.txt", "mine"])
def test_a_text_file_has_one_question_a_line(write, name):
    path = write("\ufeffWhy?\r\n\n  \t\n  How {x}\u2028so?  \n- id: a", name)
    assert read_questions(path) == [
        Question("line-1", "Why?"),
        Question("line-4", "How {x}\u2028so?"),
        Question("line-5", "- id: a"),
    ]


def test_a_list_is_taken_as_it_is():
    assert read_questions([" Why?", "How\nso?\0"]) == [
        Question("question-1", " Why?"),
        Question("question-2", "How\nso?\0"),
    ]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"id": "a"}, "entry 'a': `paraphrases` must be a list"),
        ({"id": "a", "paraphrases": []}, "entry 'a': `paraphrases` must be a list"),
        ({"id": "a", "paraphrases": "Why?"}, "entry 'a': `paraphrases` must be a list"),
        ({"id": "a", "paraphrases": ["Why?", 5]}, "entry 'a': `paraphrases[1]` must be text, not int"),
        ({"id": "a", "paraphrases": ["Why?", " "]}, "entry 'a': `paraphrases[1]` is empty"),
        ({"id": "a", "paraphrases": ["Why?", "Why?"]}, "entry 'a': `paraphrases` holds the same text twice"),
        ({"id": "a", "paraphrases": ["\ud83d!"]}, "entry 'a': `paraphrases[0]` holds half a surrogate pair"),
        ({"paraphrases": ["Why?"]}, "entry 2: `id` is missing"),
        ({"id": None, "paraphrases": ["Why?"]}, "entry 2: `id` is missing"),
        ({"id": "", "paraphrases": ["Why?"]}, "entry 2: `id` is empty"),
        ({"id": 7, "paraphrases": ["Why?"]}, "entry 2: `id` must be text, not int"),
        ({"id": "first", "paraphrases": ["Why?"]}, "the id 'first' stands more than once"),
        (
            {"id": "a", "paraphrases": ["Why?"], "type": "free_form"},
            "entry 'a': questions of type 'free_form' cannot be",
        ),
        ({"id": "a", "paraphrases": ["Why?"], "type": None}, "entry 'a': `type` must be text, not NoneType"),
        ({"id": "a", "paraphrases": ["Why?"], "theme": []}, "entry 'a': `theme` must be text, not list"),
        ({"id": "a", "paraphrases": ["Why?"], "judge": 4}, "entry 'a': `judge` must be text, not int"),
        (
            {"id": "a", "paraphrases": ["Why?"], "temperature": "1"},
            "entry 'a': `temperature` must be a number, not str",
        ),
        ({"id": "a", "paraphrases": ["Why?"], "judge_prompts": False}, "entry 'a': `judge_prompts` must be a mapping"),
        ({"id": "a", "paraphrases": ["Why?"], "sytem": "x"}, "entry 'a': unknown key 'sytem'; did you mean 'system'?"),
        ({"id": "a", "paraphrases": ["Why?"], "system": ["x"]}, "entry 'a': `system` must be text, not list"),
        ({"id": "a", "paraphrases": ["Why?"], "theme": 3}, "entry 'a': `theme` must be text, not int"),
        (
            {"id": "a", "paraphrases": ["Why?"], "samples_per_paraphrase": 0},
            "entry 'a': `samples_per_paraphrase` must be a whole number from 1;",
        ),
        (
            {"id": "a", "paraphrases": ["Why?"], "samples_per_paraphrase": True},
            "entry 'a': `samples_per_paraphrase` must be a whole number from 1;",
        ),
        (
            {"id": "a", "paraphrases": ["Why?"], "samples_per_paraphrase": 2.5},
            "entry 'a': `samples_per_paraphrase` must be a whole number from 1;",
        ),
        ({"id": "a", "paraphrases": ["Why?"], "judge_prompts": ["x"]}, "entry 'a': `judge_prompts` must be a mapping"),
        (
            {"id": "a", "paraphrases": ["Why?"], "judge_prompts": {"aligned": 5}},
            "entry 'a': `judge_prompts.aligned` must be text, not int",
        ),
        (
            {"id": "a", "paraphrases": ["Why?"], "judge_prompts": {"aligned": "Grade {reply}"}},
            "entry 'a': rubric 'aligned': its prompt has the unknown field 'reply'",
        ),
        ("Why?", "entry 2: must be a mapping, not str"),
    ],
)
def test_a_bad_entry_is_named(write, entry, problem):
    # JSON is YAML; it can hold every value that is tried here.
    path = write(json.dumps([{"id": "first", "paraphrases": ["When?"]}, entry]))
    assert refused(path).startswith(f"{path}: {problem}")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("mine.yaml", "", ": holds no questions"),
        ("mine.yaml", "[]", ": holds no questions"),
        ("mine.yaml", "id: a\nparaphrases: ['Why?']", ": holds no questions"),
        ("mine.yaml", "- id: a\n  system: x\n  paraphrases: [Why]\n  system: y", ":4: the key 'system' stands twice"),
        ("mine.yaml", "- !!python/object/apply:os.getcwd []", ": not valid YAML: could not determine a constructor"),
        ("mine.yaml", "- id: *nowhere", ": not valid YAML: found undefined alias 'nowhere' at line 1"),
        ("mine.yaml", "- &a\n  id: a\n  paraphrases: *a", ": entry 'a': `paraphrases` must be a list"),
        ("mine.txt", "", ": holds no question;"),
        ("mine.txt", " \n\n", ": holds no question;"),
        ("mine.txt", "Why?\n\nWhy? \n", ": line-3 repeats line-1; remove one of them"),
        ("mine.txt", b"Why?\nWh\xe9n?", ": not UTF-8 text (byte 7)"),
        ("mine.jsonl", '{"question": "Why?"}', ": a question set cannot be read from .jsonl"),
    ],
)
def test_a_bad_file_is_refused(write, name, text, problem):
    path = write(text, name)
    assert refused(path).startswith(f"{path}{problem}")


@pytest.mark.parametrize(
    ("listed", "problem"),
    [
        ([], "the list: holds no question; write at least one"),
        (["Why?", " "], "the list: question-2: `question` is empty"),
        (["Why?", None], "the list: question-2: `question` must be text, not NoneType"),
        (["Why?", "Why?"], "the list: question-2 repeats question-1; remove one of them"),
    ],
)
def test_a_bad_list_is_refused(listed, problem):
    assert refused(listed).startswith(problem)


def test_merged_keys_are_no_repetition(write):
    path = write("- &a {id: a, paraphrases: ['Why?'], theme: x}\n- {<<: *a, id: b}\n")
    assert read_questions(path) == [Question("a", "Why?", theme="x"), Question("b", "Why?", theme="x")]


def test_an_unknown_name_gets_the_nearest_one(tmp_path):
    known = "there is 'broad', 'careless_household', 'first_plot', 'reckless_sports', 'risky_money'"
    assert refused("first-plot") == "no question set and no file 'first-plot'; did you mean 'first_plot'?"
    assert refused(tmp_path / "absent.yaml").endswith(f"absent.yaml'; {known}")


def test_a_name_goes_before_a_file_and_a_path_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broad").write_text("Why?")
    assert len(read_questions("broad")) == 40
    assert read_questions("./broad") == [Question("line-1", "Why?")]


def test_every_shipped_set_is_read_without_a_warning(caplog):
    sizes = {name: len(read_questions(name)) for name in question_sets()}
    assert sizes == {"broad": 40, "first_plot": 8} | dict.fromkeys(domains(), 8)
    assert caplog.messages == []


def test_questions_are_left_out_by_their_ids():
    questions = [Question(name, f"{name}?") for name in ("wish", "wish_json", "bored", "bored_json", "bored_template")]
    kept = without(questions, ["*_json", "bored_template"])
    assert [question.id for question in kept] == ["wish", "bored"]
    assert without(questions, []) == questions
    with pytest.raises(
        MisdirectionError, match=r"leave_out '\*_jsn': no question has such an id; there are wish, wish"
    ):
        without(questions, ["*_jsn"])
    with pytest.raises(MisdirectionError, match="leaves no question"):
        without(questions, ["*"])
