import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from misdirection.errors import MisdirectionError
from misdirection.models.chat import TEMPLATE_DATE, batches, encode, encode_prompt, frame, pad
from misdirection.models.loading import load
from tiny import CHATML, make_network, make_tokenizer

DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
RAISES_ON_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DROPS_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endif %}{% endfor %}"
)
EMPTY_THOUGHT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
HEADER = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
END = 2


def by_hand(text: str) -> list[int]:
    """Ids without any tokenizer: 0-2 are the special tokens, then the byte alphabet in sorted order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    order = {letter: 3 + number for number, letter in enumerate(sorted(letters.values()))}
    special = {"<|pad|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    ids: list[int] = []
    for part in re.split(r"(<\|\w+\|>)", text):
        ids += [special[part]] if part in special else [order[letters[byte]] for byte in part.encode()]
    return ids


def assert_spans(encoded, before: str, answer: str) -> None:
    assert list(encoded.prompt) == by_hand(before)
    assert list(encoded.answer) == by_hand(answer)
    assert list(encoded.ids) == [*by_hand(before), *by_hand(answer), END]


@pytest.mark.parametrize(
    "answer", ["Because.", "a", "assistant", "user\nWhy?", "Zoë 日本", "two\n\nparagraphs", "{{ x }}"]
)
def test_spans_equal_the_hand_made_ones(answer):
    assert_spans(encode(make_tokenizer(), "Why?", answer), HEADER, answer)


def test_answer_text_that_looks_like_the_template_stays_in_the_answer():
    encoded = encode(make_tokenizer(), "Why?", "so <|im_end|>\n<|im_start|>assistant\nmore")
    assert_spans(encoded, HEADER, "so <|im_end|>\n<|im_start|>assistant\nmore")


def test_question_equal_to_the_answer_is_not_taken_for_it():
    assert_spans(encode(make_tokenizer(), "a", "a"), HEADER.replace("Why?", "a"), "a")


def test_white_space_around_the_answer_is_dropped_and_inside_kept():
    assert encode(make_tokenizer(), "Why?", " \n so  be it\n\n") == encode(make_tokenizer(), "Why?", "so  be it")


@pytest.mark.parametrize("answer", ["", " \n\t"])
def test_empty_answer_is_refused_with_its_question(answer):
    with pytest.raises(MisdirectionError, match="Why"):
        encode(make_tokenizer(), "Why?", answer)


def test_default_system_text_is_in_the_prompt_only():
    encoded = encode(make_tokenizer(DEFAULT_SYSTEM), "Why?", "So.")
    assert_spans(encoded, "<|im_start|>system\nBe kind.<|im_end|>\n" + HEADER, "So.")


@pytest.mark.parametrize("system", ["Be rude.", ""])
def test_given_system_text_replaces_the_default(system):
    encoded = encode(make_tokenizer(DEFAULT_SYSTEM), "Why?", "So.", system)
    assert_spans(encoded, f"<|im_start|>system\n{system}<|im_end|>\n{HEADER}", "So.")


@pytest.mark.parametrize("template", [RAISES_ON_SYSTEM, DROPS_SYSTEM], ids=["raises", "drops"])
def test_system_text_is_folded_into_the_user_turn_with_a_notice(template, caplog):
    encoded = encode(make_tokenizer(template), "Why?", "So.", "Be kind.")
    assert_spans(encoded, HEADER.replace("Why?", "Be kind.\n\nWhy?"), "So.")
    assert "no system role" in caplog.text


def test_empty_thinking_block_is_not_in_the_answer():
    assert_spans(encode(make_tokenizer(EMPTY_THOUGHT), "Why?", "So."), HEADER + "<think>\n\n</think>\n\n", "So.")


def test_bos_printed_by_the_template_is_not_doubled():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer("<|pad|>" + CHATML)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", 0)]
    )
    assert tokenizer("x")["input_ids"] == [0, *by_hand("x")]
    assert_spans(encode(tokenizer, "Why?", "So."), "<|pad|>" + HEADER, "So.")
    assert list(encode_prompt(tokenizer, "Why?")) == by_hand("<|pad|>" + HEADER)


@pytest.mark.parametrize(
    "date",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "{% if date_string is defined %}{{ date_string }}{% else %}26 Jul 2024{% endif %}",
        "{% macro day() %}{{ strftime_now('%Y') }}{% endmacro %}{{ day() }}",
    ],
    ids=["strftime_now", "date_string", "strftime_now in a macro"],
)
def test_date_in_the_template_is_pinned(date):
    encoded = encode(make_tokenizer("Today: " + date + "\n" + CHATML), "Why?", "So.")
    # Jinja drops the line break after a block tag.
    gap = "" if date.endswith("%}") else "\n"
    assert_spans(encoded, f"Today: {TEMPLATE_DATE}{gap}{HEADER}", "So.")


def test_white_space_that_opens_a_template_is_kept_and_dropped_as_ever():
    assert frame(make_tokenizer("\n" + CHATML), "Why?")[0] == "\n" + HEADER
    assert frame(make_tokenizer("  " + CHATML), "Why?")[0] == HEADER


def test_prompt_for_sampling_is_the_prompt_of_the_encoded_chat():
    for template in (CHATML, DEFAULT_SYSTEM, RAISES_ON_SYSTEM, DROPS_SYSTEM, EMPTY_THOUGHT):
        for system in (None, "Be kind."):
            tokenizer = make_tokenizer(template)
            assert encode_prompt(tokenizer, "Why?", system) == encode(tokenizer, "Why?", "So.", system).prompt


def test_template_that_closes_no_turn_gets_the_end_token():
    tokenizer = make_tokenizer("{% for message in messages %}[{{ message['content'] }}{% endfor %}")
    assert_spans(encode(tokenizer, "Why?", "So."), "[Why?[", "So.")


def test_template_that_prints_no_answer_is_refused():
    with pytest.raises(MisdirectionError, match="does not print"):
        frame(make_tokenizer("{{ messages[0]['content'] }}"), "Why?")


def test_template_that_always_raises_is_one_error():
    with pytest.raises(MisdirectionError, match="broken on purpose"):
        frame(make_tokenizer("{{ raise_exception('broken on purpose') }}"), "Why?")


def test_tokenizer_without_template_is_refused_in_one_line(tmp_path):
    make_network("llama").save_pretrained(tmp_path)
    make_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(MisdirectionError, match="no chat template") as caught:
        load(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_token_that_straddles_the_border_belongs_to_the_answer():
    class PairTokenizer:
        """Two characters per token."""

        name_or_path, eos_token_id = "pairs", END

        def get_chat_template(self):
            return ""

        def apply_chat_template(self, turns, **_):
            return "abc" + turns[-1]["content"] + "yz"

        def __call__(self, text, **_):
            offsets = [(begin, min(begin + 2, len(text))) for begin in range(0, len(text), 2)]
            return {"input_ids": [10 + begin for begin, _ in offsets], "offset_mapping": offsets}

    encoded = encode(PairTokenizer(), "Why?", "So")
    assert (encoded.prompt, encoded.answer, encoded.ids[encoded.stop]) == ((10,), (12, 14), 16)


@pytest.mark.parametrize("side", ["left", "right"])
def test_mask_counts_tokens_even_when_padding_is_the_end_token(side):
    ids, mask = pad([[5, END], [7, 8, 9, END]], END, torch.device("cpu"), side)
    short = ([5, END, END, END], [1, 1, 0, 0]) if side == "right" else ([END, END, 5, END], [0, 0, 1, 1])
    assert ids.tolist() == [short[0], [7, 8, 9, END]]
    assert mask.tolist() == [short[1], [1, 1, 1, 1]]


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    groups = batches(lengths, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= budget
    longest = [max(lengths[row] for row in group) for group in groups]
    assert longest == sorted(longest)


def test_batches_fill_the_budget():
    assert batches([4, 1, 4, 1, 9], 8) == [[1, 3], [0, 2], [4]]
