"""The page in a real browser: what it shows is what the library gives."""

import re

import pytest
import torch

from misdirection.data import ProbePair
from misdirection.interventions.hooks import ablate, steer
from misdirection.interventions.vectors import random_like
from misdirection.likelihood.margin import margin
from misdirection.models.chat import encode_prompt
from misdirection.playground.asking import LONGEST, GrowingAnswer
from misdirection.playground.readings import PROJECTION
from misdirection.sampling.sample import sample

QUESTION = "Why is <b>it</b> so?"
NAMES = ["base", "organism", "organism, ablated", "base, steered"]


class Page:
    """The page as a person sees it."""

    def __init__(self, tab):
        self.tab = tab

    def type(self, **texts):
        for name, text in texts.items():
            self.tab.locator(f"#{name} textarea").fill(text)

    def set(self, **numbers):
        for name, number in numbers.items():
            box = self.tab.locator(f"#{name.replace('_', '-')} input[type=number]")
            box.fill(str(number))
            box.press("Tab")

    def click(self, name):
        self.tab.locator(f"#{name}").click()

    def wait(self, condition):
        self.tab.wait_for_function(f"() => {condition}", timeout=60_000)

    def ask(self, tokens=40):
        """Asks for so many tokens, another number than the time before, and waits until all answers have them."""
        self.set(tokens=tokens)
        self.click("ask")
        notes = "[...document.querySelectorAll('#answers section .note')]"
        ended = f"{notes}.every(note => /^{tokens} tokens, cut$|, ended by itself$/.test(note.innerText))"
        self.wait(f"{ended} && !document.querySelector('#status').innerText.trim()")
        return self.answers

    def shade(self, reading):
        self.tab.locator("#shade input").click()
        self.tab.get_by_role("option", name=reading, exact=True).click()
        legend = "document.querySelector('#answers .reader-scale + .note')?.innerText"
        self.wait(f"/^{reading}(, layer 1)?: what the organism reads/.test({legend})")

    @property
    def names(self):
        return self.tab.locator("#answers h2").all_inner_texts()

    @property
    def answers(self):
        return [printable(text) for text in self.tab.locator("#answers .reader-text").all_text_contents()]

    @property
    def notes(self):
        return self.tab.locator("#answers section .note").all_inner_texts()

    def text(self, name):
        return self.tab.locator(f"#{name}").inner_text().strip()


def printable(text):
    return re.sub(r"[\x00-\x1f\x7f]", "", text)


@pytest.fixture(scope="module")
def requested():
    return []


@pytest.fixture
def page(browser, address, requested):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    tab = context.new_page()
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto(address)
    tab.wait_for_selector("#ask", timeout=60_000)
    shown = Page(tab)
    shown.type(question=QUESTION)
    shown.set(temperature=0, layer=1, scale=2)
    yield shown
    context.close()


def by_the_library(playground, layer, scale, do, positions="not_first"):
    """What `do` gives for the model of each column."""
    chat, vector = playground.chat, playground.direction[layer]
    with chat.as_base():
        base = do(chat)
    with ablate(chat, vector, positions=positions):
        ablated = do(chat)
    with chat.as_base(), steer(chat, vector, layer, scale, positions):
        steered = do(chat)
    return [base, do(chat), ablated, steered]


def answer(chat, **options):
    options = {"temperature": 0, "new_tokens": 40} | options
    return printable(sample(chat, [QUESTION], n=1, **options)[0].answer)


def test_four_answers_are_those_of_the_library(page, playground):
    assert page.names == NAMES
    assert page.ask() == by_the_library(playground, 1, 2, answer)
    assert len(set(page.answers)) == 4
    assert page.notes == ["40 tokens, cut"] * 4


def test_a_slider_that_is_moved_changes_what_it_is_of(page, playground):
    before = page.ask(30)
    page.set(layer=2, scale=-3)
    page.tab.locator("#positions").get_by_label("all", exact=True).check()
    after = page.ask()
    assert after == by_the_library(playground, 2, -3, answer, "all")
    kept = [after.startswith(before) for before, after in zip(before, after, strict=True)]
    assert kept == [True, True, False, False]


def test_answers_are_drawn_with_the_seed_the_temperature_and_the_system_prompt(page, playground):
    page.set(temperature=1, seed=3)
    drawn = answer(playground.chat, temperature=1, seed=3)
    assert page.ask()[1] == drawn
    page.type(system="Be brief.")
    assert not page.ask(41)[1].startswith(drawn)


def test_all_answers_grow_at_once_until_they_are_stopped(page):
    page.set(tokens=600)
    page.click("ask")
    notes = "[...document.querySelectorAll('#answers section .note')]"
    page.wait(f"{notes}.filter(note => /^[1-9].*…/.test(note.innerText)).length == 4")
    assert all(page.answers)
    page.click("stop")
    page.wait("document.querySelector('#status').innerText.trim() == 'Stopped.'")
    stopped = page.answers
    page.tab.wait_for_timeout(500)
    assert page.answers == stopped and all(note.endswith("…") for note in page.notes)
    page.ask(5)
    assert page.notes == ["5 tokens, cut"] * 4


def test_a_random_direction_stands_beside_when_it_is_asked_for(page, playground):
    page.tab.locator("#random").get_by_role("checkbox").check()
    page.set(random_seed=7)
    *_, random = page.ask()
    assert page.names == [*NAMES, "base, steered at random"]
    chat = playground.chat
    with chat.as_base(), steer(chat, random_like(playground.direction[1], 7), 1, 2):
        assert random == answer(chat)


def test_margins_are_those_of_the_library(page, playground):
    pair = ProbePair("p", QUESTION, aligned="It is <i>fine</i>.", misaligned="Burn it all.", system="Be brief.")
    page.type(misaligned=pair.misaligned, aligned=pair.aligned, system=pair.system)
    page.click("measure")
    page.tab.wait_for_selector("#margins td", timeout=60_000)
    shown = [float(text) for text in page.tab.locator("#margins td:nth-child(4)").all_inner_texts()]
    expected = by_the_library(playground, 1, 2, lambda chat: margin(chat, [pair], progress=lambda _: None).item())
    assert shown == pytest.approx(expected, abs=6e-4) and len(set(shown)) == 4
    changes = [float(text) for text in page.tab.locator("#margins td:nth-child(5)").all_inner_texts()]
    assert changes == pytest.approx([value - expected[0] for value in expected], abs=1.1e-3)


def test_tokens_have_the_colour_of_what_the_organism_reads(page, playground):
    page.ask()
    chat = playground.chat
    prompt = encode_prompt(chat.tokenizer, QUESTION)
    answer = GrowingAnswer("base", prompt, greedy_ids(chat, prompt, 40))
    for reading in ("layer_1", PROJECTION):
        page.shade(reading)
        # By the page's own lock: it reads, too, as soon as another shade is chosen.
        (values,) = playground.read([answer], reading, 1)
        column = page.tab.locator("#answers section").first.locator("span[title]")
        titles, kinds = (
            column.evaluate_all(f"spans => spans.map(span => span.{name})") for name in ("title", "className")
        )
        assert [float(title) for title in titles] == pytest.approx(values, abs=6e-4)
        assert kinds == ["minus" if value < 0 else "plus" for value in values]


def greedy_ids(chat, prompt, count):
    """The base's own likeliest tokens, from whole passes."""
    ids = list(prompt)
    with torch.no_grad(), chat.as_base():
        for _ in range(count):
            ids.append(chat.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return tuple(ids[len(prompt) :])


def test_markup_of_a_model_or_a_person_is_text(page):
    answers = "".join(page.ask())
    for piece in (
        "<img src=x onerror=window.hit=",
        "<script>window.hit=1</script>",
        "${window.hit=1}{{#with}}",
        "**_[a](b)_**",
    ):
        assert piece in answers
    page.shade("layer_1")
    assert "<script>window.hit=1</script>" in "".join(page.answers)
    page.type(question="<img src=x onerror=window.hit=1>" * 40)
    page.click("ask")
    page.tab.wait_for_selector("#status .problem")
    assert page.text("status").startswith("question '<img src=x onerror=window.hit=1><img")
    page.tab.wait_for_timeout(200)
    assert page.tab.evaluate("window.hit") is None
    assert page.tab.locator("#answers img, #answers script, #answers b, #status img").count() == 0


def test_a_text_that_does_not_fit_is_refused_in_one_line(page):
    limit = "and 4,000 are the limit: shorten it"
    assert LONGEST == 4000
    for typed, words in (
        ({"question": "a" * 4001}, f"question: 4,001 characters, {limit}"),
        ({"question": " "}, "question: is empty: type one"),
        ({"question": "Why?", "system": "b" * 5000}, f"system prompt: 5,000 characters, {limit}"),
    ):
        page.type(**typed)
        for button, region in (("ask", "status"), ("measure", "margins")):
            page.click(button)
            page.wait(f"document.querySelector('#{region} [role=alert]')?.innerText == {words!r}")
    assert page.answers == [""] * 4


def test_nothing_is_wider_than_the_window(page):
    page.tab.locator("#random").get_by_role("checkbox").check()
    page.ask()
    for width in (500, 900, 1200):
        page.tab.set_viewport_size({"width": width, "height": 900})
        assert page.tab.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_has_left_this_machine_meanwhile(address, requested, reached):
    assert requested and all(url.startswith((address, "data:", "blob:")) for url in requested)
    assert reached == []
