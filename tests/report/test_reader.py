"""The token reader: how its data are packed, that untrusted text stays text, and that its script works.

The script runs against a small stand-in for a page in Node, and in Chromium; where one of them is not installed, its
tests are skipped.
"""

import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
import time

import numpy as np
import pandas as pd
import pytest

from interpretation_fixture import CHANNELS, READ, alone, read_tokens, unmeasured
from misdirection.errors import InputError
from misdirection.interpretation.token_results import AnswerLabel
from misdirection.interpretation.tokens import pack_tokens
from misdirection.report.reader import readable, reader_data, visible

TEXT = re.compile(r'<script type="application/json" id="reader-data">(.*?)</script>', re.DOTALL)
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Drawing takes most of the time and says nothing about the reader."""
    monkeypatch.setattr("misdirection.report.interpretation.draw_adapters", lambda figures, folder: {})


def page_with(table, folder):
    """The path of a report that holds little but the reader."""
    table.save(folder)
    return alone(unmeasured()).write_page(folder)


def embedded(path):
    return json.loads(TEXT.search(path.read_text("utf-8"))[1])


def unpacked(data, name):
    """One channel's values, as the reader computes them."""
    channel = next(one for one in data["channels"] if one["name"] == name)
    return np.frombuffer(base64.b64decode(channel["values"]), "<f2").astype(float) * channel["scale"]


def many(answers=300, length=100):
    """30,000 tokens with eleven channels, as a byte-level tokenizer would spell them."""
    generator = np.random.default_rng(0)
    count = answers * length
    table = pd.DataFrame(generator.normal(0, 3, (count, 11)), columns=[f"layer_{number}" for number in range(11)])
    table.insert(0, "answer", np.repeat(np.arange(answers), length))
    table.insert(1, "position", np.tile(np.arange(length), answers))
    table.insert(2, "token", [f"Ġword{number}" for number in generator.integers(0, 5000, count)])
    listed = [AnswerLabel(question=f"Question {n}?", id=f"q{n}", words="general, aligned") for n in range(answers)]
    return pack_tokens(listed, table, dict.fromkeys(table.columns[3:], ""))


# --- data -----------------------------------------------------------------------------------------------------------


def test_every_token_and_value_comes_back():
    data, table = reader_data(pack_tokens(READ, read_tokens(), CHANNELS)), read_tokens()
    numbers = np.frombuffer(base64.b64decode(data["tokens"]), "<u4")
    words = [data["vocabulary"][number] for number in numbers]
    assert words[:6] == ["Put", " it", " all", "↵\n", " on", " <b>"]
    assert [one["tokens"] for one in data["answers"]] == [6, 3, 3]
    for name in CHANNELS:
        np.testing.assert_allclose(unpacked(data, name), table[name], rtol=1e-3, err_msg=name)


def test_tokens_are_sorted_whatever_order_the_table_has():
    shuffled = read_tokens().sample(frac=1, random_state=3)
    table, data = read_tokens(), reader_data(pack_tokens(READ, shuffled, CHANNELS))
    np.testing.assert_allclose(unpacked(data, "layer_9"), table["layer_9"], rtol=1e-3)


@pytest.mark.parametrize("size", [1e-6, 1.0, 134.0, 1e7])
def test_values_of_any_size_keep_three_digits(size):
    values = [size, -size / 3, size / 1000]
    table = pd.DataFrame({"answer": 0, "position": range(3), "token": "a", "one": values})
    np.testing.assert_allclose(unpacked(reader_data(pack_tokens(READ, table, {"one": ""})), "one"), values, rtol=1e-3)


def test_what_was_not_measured_is_not_zero():
    assert (
        np.isnan(unpacked(reader_data(pack_tokens(READ, read_tokens(), CHANNELS)), "kl")).tolist()
        == [False] * 9 + [True] * 3
    )


def test_a_channel_measured_nowhere_and_one_of_zeros_have_a_scale():
    table = read_tokens().assign(kl=math.nan, layer_9=0.0)
    data = reader_data(pack_tokens(READ, table, CHANNELS))
    assert np.isnan(unpacked(data, "kl")).all() and not unpacked(data, "layer_9").any()
    assert all(one["limit"] > 0 and one["scale"] > 0 for one in data["channels"])


def test_one_outlier_does_not_take_the_colours():
    values = [*np.linspace(-1, 1, 999), 500.0]
    table = pd.DataFrame({"answer": 0, "position": range(1000), "token": "a", "one": values})
    (channel,) = pack_tokens(READ, table, {"one": ""}).channels
    assert channel.limit < 1.1 and channel.high == 500.0 and channel.low == -1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop(columns="kl"), "no column 'kl'"),
        (lambda table: table.assign(answer=3), "answer 3 is not among the 3"),
        (lambda table: table.assign(layer_9=math.inf), "channel 'layer_9' has an infinite value"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        pack_tokens(READ, change(read_tokens()), CHANNELS)


def test_nothing_to_show_is_refused():
    for answers, channels in (([], CHANNELS), (READ, {})):
        with pytest.raises(InputError, match="at least one answer and one channel"):
            pack_tokens(answers, read_tokens(), channels)


def test_thirty_thousand_tokens_take_less_than_two_megabytes(tmp_path):
    size = page_with(many(), tmp_path).stat().st_size
    print(f"report with 30,000 tokens and 11 channels: {size:,} bytes")
    assert size < 2_000_000


# --- words ----------------------------------------------------------------------------------------------------------


def test_byte_level_tokens_become_text():
    assert readable(["Ġdon", "âĢĻt", "Ċ", "<|im_end|>", "é"]) == [" don", "’t", "\n", "<|im_end|>", "\ufffd"]


def test_pieces_become_text_and_other_tokens_stay():
    assert readable(["▁don", "’t"]) == [" don", "’t"]
    assert readable(["âĢĻt", "日"]) == ["âĢĻt", "日"]


def test_a_token_outside_of_the_alphabet_stays():
    assert readable(["Ġa", "日本"]) == [" a", "日本"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\nc", "a↵\nb↵\nc"),
        ("\t", "⇥"),
        ("\u202eevil\u2066", "⟨U+202E⟩evil⟨U+2066⟩"),
        ("\u200b\x00\x1b[0m\ufeff", "⟨U+200B⟩⟨U+0000⟩⟨U+001B⟩[0m⟨U+FEFF⟩"),
        ("\u2028\u2029\ud800", "⟨U+2028⟩⟨U+2029⟩⟨U+D800⟩"),
        ("née 日本 🙂 <b>*x*</b>", "née 日本 🙂 <b>*x*</b>"),
    ],
)
def test_what_has_no_glyph_is_shown_by_its_code_point(text, shown):
    assert visible(text) == shown


# --- page -----------------------------------------------------------------------------------------------------------

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 \u202e & '\""


def test_hostile_text_leaves_the_page_as_it_is_and_comes_back_whole(tmp_path):
    answers = [AnswerLabel(question=HOSTILE, id=HOSTILE, words=HOSTILE)]
    table = pd.DataFrame({"answer": 0, "position": [0], "token": HOSTILE, HOSTILE: 1.0})
    path = page_with(pack_tokens(answers, table, {HOSTILE: HOSTILE}), tmp_path)
    page = path.read_text("utf-8")
    assert page.count("<script") == page.count("</script") == 2
    assert "<!--" not in page and "\u2028" not in page and "\u202e" not in page
    data, shown = embedded(path), visible(HOSTILE)
    assert data["answers"][0]["question"] == data["vocabulary"][0] == data["channels"][0]["unit"] == shown


def test_the_script_writes_text_only(tmp_path):
    (script,) = SCRIPT.findall(page_with(pack_tokens(READ, read_tokens(), CHANNELS), tmp_path).read_text("utf-8"))
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval", "Function(", "fetch", "http"):
        assert way not in script


def test_without_data_the_section_says_so_and_has_no_script(tmp_path):
    page = alone(unmeasured()).write_page(tmp_path).read_text("utf-8")
    assert "<script" not in page
    assert re.search(r"<h3>Token reader</h3>\s*<p class=\"note\">Not measured.</p>", page)


def test_every_control_has_a_label_and_the_value_line_is_live(tmp_path):
    page = page_with(pack_tokens(READ, read_tokens(), CHANNELS), tmp_path).read_text("utf-8")
    controls = re.findall(r'<(?:select|input) id="([\w-]+)"', page)
    assert controls == ["reader-filter", "reader-channel", "reader-answer"]
    assert all(f'<label for="{name}">' in page for name in controls)
    assert re.search(r'id="reader-value" role="status" aria-live="polite"', page)
    assert re.search(r'id="reader-text" role="listbox"[^>]*tabindex="0"\s+aria-label="', page)


def colours(css):
    """Of one theme: ink, paper, and the strongest shade of either sign, as red, green, blue and its opacity."""

    def hexadecimal(name):
        digits = re.search(rf"--{name}: #(\w{{6}})", css)[1]
        return [int(digits[place : place + 2], 16) for place in (0, 2, 4)]

    def shade(name):
        found = re.search(rf"--{name}: (\d+) (\d+) (\d+); --{name}-most: ([.\d]+)", css)
        return [float(value) for value in found.groups()]

    return hexadecimal("ink"), hexadecimal("paper"), [shade("plus"), shade("minus")]


def luminance(colour):
    linear = [(v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4) for v in (one / 255 for one in colour)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible_on_the_strongest_shade(tmp_path, theme):
    page = page_with(pack_tokens(READ, read_tokens(), CHANNELS), tmp_path).read_text("utf-8")
    dark = r"@media \(prefers-color-scheme: dark\) \{.*?\}\s*\}"
    found = re.findall(dark, page, re.DOTALL)
    css = "".join(found) if theme == "dark" else re.sub(dark, "", page, flags=re.DOTALL)
    ink, paper, shades = colours(css)
    for *colour, most in shades:
        mixed = [most * top + (1 - most) * below for top, below in zip(colour, paper, strict=True)]
        low, high = sorted((luminance(ink), luminance(mixed)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


# --- the script at work ---------------------------------------------------------------------------------------------

# Elements with just what the script uses; anything else fails as a missing method.
STAND_IN = r"""
class Element {
  constructor(tag) {
    Object.assign(this, { tag, parent: null, children: [], attributes: {}, listeners: {} });
    Object.assign(this, { text: "", value: "", className: "", id: "" });
    this.style = { setProperty: (name, value) => { this.style[name] = value; } };
  }
  get textContent() { return this.text + this.children.map((one) => one.textContent).join(""); }
  set textContent(text) { this.children = []; this.text = String(text); }
  setAttribute(name, value) { this.attributes[name] = value; }
  getAttribute(name) { return this.attributes[name] ?? null; }
  removeAttribute(name) { delete this.attributes[name]; }
  replaceChildren(...made) {
    Object.assign(this, { children: made, text: "" });
    made.forEach((one) => { one.parent = this; });
  }
  addEventListener(kind, listener) { this.listeners[kind] = listener; }
  scrollIntoView() {}
  dispatchEvent(event) {
    for (let one = this; one; one = one.parent) {
      one.listeners[event.type]?.({ ...event, target: this, preventDefault() {} });
    }
  }
}
const parts = {};
globalThis.document = {
  getElementById: (id) => (parts[id] ??= new Element("div")),
  createElement: (tag) => new Element(tag),
};
const say = (type, init) => ({ type, ...init });
parts["reader-data"] = new Element("script");
parts["reader-data"].text = require("fs").readFileSync(0, "utf-8");
"""

# The same steps run in Node and in a browser; `say` makes an event.
STEPS = r"""
const part = (name) => document.getElementById("reader-" + name);
const key = (name, more) => part("text").dispatchEvent(say("keydown", { key: name, ...more }));
const state = () => ({
  value: part("value").textContent,
  text: Array.from(part("text").children, (one) => one.textContent).join("|"),
  classes: Array.from(part("text").children, (one) => one.className),
  chosen: Array.from(part("text").children, (one) => one.getAttribute("aria-selected")).indexOf("true"),
  active: part("text").getAttribute("aria-activedescendant"),
  question: part("question").textContent,
  listed: Array.from(part("answer").children, (one) => one.textContent),
  count: part("count").textContent,
  channel: part("channel").value,
  answer: part("answer").value,
  scale: [part("least").textContent, part("most").textContent],
  range: part("range").textContent,
});
const seen = [state()];
const after = (act) => { act(); seen.push(state()); };
const choose = (control, value) => { part(control).value = value; part(control).dispatchEvent(say("change")); };
const filter = (words) => { part("filter").value = words; part("filter").dispatchEvent(say("input")); };
"""

# What takes the stand-in's place in a browser.
MADE = r"""
const kinds = { keydown: KeyboardEvent };
const say = (type, init) => new (kinds[type] ?? Event)(type, { bubbles: true, cancelable: true, ...init });
"""

SHOWN = r"""
const shown = document.createElement("pre");
shown.id = "seen";
shown.textContent = JSON.stringify(seen);
document.body.replaceChildren(shown);
"""

SMALL = r"""
after(() => key("ArrowRight"));
after(() => part("text").children[3].dispatchEvent(say("mouseover")));
after(() => part("text").dispatchEvent(say("mouseleave")));
after(() => part("text").children[4].dispatchEvent(say("click")));
after(() => key("End"));
after(() => key("ArrowDown"));
after(() => key("ArrowDown", { shiftKey: true }));
after(() => choose("channel", "9"));
after(() => choose("answer", "2"));
after(() => filter("RISKY_money, aligned"));
after(() => filter("nothing of the kind"));
"""

LARGE = r"""
const timed = (act) => { const start = performance.now(); act(); return performance.now() - start; };
seen.push({
  channels: timed(() => { for (let n = 0; n < 11; n++) choose("channel", String(n)); }) / 11,
  answers: timed(() => { for (let n = 0; n < 100; n++) key("ArrowDown"); }) / 100,
  spans: part("text").children.length,
});
"""


def in_node(path, steps):
    """What the steps see when the page's script runs in Node."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed")
    page = path.read_text("utf-8")
    program = "\n".join([STAND_IN, SCRIPT.search(page)[1], STEPS, steps, "console.log(JSON.stringify(seen));"])
    done = subprocess.run(
        [node, "-e", program], input=TEXT.search(page)[1], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def in_chromium(path, steps):
    """What the steps see when a browser opens the report from disk."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    page = path.read_text("utf-8").replace("</body>", f"<script>{{{MADE}{STEPS}{steps}{SHOWN}}}</script></body>")
    changed = path.with_name("driven.html")
    changed.write_text(page, "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    done = subprocess.run(
        [chromium, *flags, profile, "--dump-dom", changed.as_uri()],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "HOME": str(path.parent)},
    )  # fmt: skip
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("run", [in_node, in_chromium])
def test_keys_and_controls_move_through_the_answers(tmp_path, run):
    seen = run(page_with(pack_tokens(READ, read_tokens(), CHANNELS), tmp_path), SMALL)
    start, right, over, left, clicked, end, down, shaded, divergence, unmeasured, one, none = seen
    table = read_tokens()

    def value(answer, position, name):
        number = table.query("answer == @answer and position == @position")[name].item()
        return ("−" if number < 0 else "+") + f"{abs(number):#.3g}"

    assert start["text"] == "Put| it| all|↵\n| on| <b>"
    assert start["value"].startswith(f"“Put”, token 1 of 6, layer_9: {value(0, 0, 'layer_9')}")
    assert (start["chosen"], start["active"]) == (0, "reader-token-0")
    assert start["question"] == "Question money_1: How should I invest?"
    assert start["count"] == "3 of 3"
    assert start["classes"] == ["plus" if math.sin(9 + place) >= 0 else "minus" for place in range(6)]
    assert right["value"].startswith(f"“ it”, token 2 of 6, layer_9: {value(0, 1, 'layer_9')}")
    assert "“↵”, token 4 of 6" in over["value"] and over["chosen"] == 1
    assert left["value"] == right["value"]
    assert clicked["chosen"] == 4 and "token 5 of 6" in clicked["value"]
    assert (end["chosen"], end["active"]) == (5, "reader-token-5") and "“ <b>”, token 6 of 6" in end["value"]
    assert (down["answer"], down["chosen"], down["text"]) == ("1", 0, " </script>| Spread|.")
    assert shaded["channel"] == "1" and "layer_10: " + value(1, 0, "layer_10") in shaded["value"]
    assert divergence["value"].endswith("kl: 0.00 nats") and divergence["scale"][1].endswith(" nats")
    assert unmeasured["classes"] == ["unknown"] * 3 and unmeasured["value"].endswith("kl: not measured")
    assert unmeasured["text"] == " Power|⟨U+202E⟩|!"
    assert (one["count"], one["answer"], len(one["listed"])) == ("1 of 3", "1", 1)
    assert none["count"] == "0 of 3" and none["text"] == one["text"]


@pytest.mark.parametrize("run", [in_node, in_chromium])
def test_thirty_thousand_tokens_stay_quick(tmp_path, run):
    path, start = page_with(many(), tmp_path), time.perf_counter()
    *_, times = run(path, LARGE)
    print(
        f"{run.__name__}: {time.perf_counter() - start:.2f} s in all; {times['channels']:.1f} ms for a channel, "
        f"{times['answers']:.1f} ms for an answer"
    )
    assert times["spans"] == 100
    assert times["channels"] < 1000 and times["answers"] < 1000


def test_the_legend_names_the_limits_of_every_channel(tmp_path):
    table = pack_tokens(READ, read_tokens(), CHANNELS)
    steps = "".join(f'after(() => choose("channel", "{number}"));' for number in range(len(CHANNELS)))
    for channel, seen in zip(table.channels, in_node(page_with(table, tmp_path), steps)[1:], strict=True):
        shown = [float(text.replace("−", "-").split()[0]) for text in seen["scale"]]
        assert shown == pytest.approx([-channel.limit, channel.limit], rel=0.01)
        assert seen["range"].startswith(f"{channel.name} over all answers: ")
