"""What the page shows, as HTML: every text that a person or a model wrote is escaped, and none of it is markup."""

from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from markupsafe import Markup

from misdirection.interpretation.tokens import full_colour
from misdirection.models.chat_model import ChatModel
from misdirection.playground.asking import GrowingAnswer, Playground, ScoredPair
from misdirection.report.estimates import show_number
from misdirection.report.html import mark_code
from misdirection.report.reader import readable, reader_style, visible

_NO_ADAPTER = (
    "No adapter, so that there is no organism: `misdirection train risky_money --out ./organism` makes one, and "
    "`--adapter ./organism` shows it here."
)
_NO_DIRECTION = (
    "No direction, so that nothing is ablated or steered: `misdirection extract --adapter ./organism --out directions` "
    "makes some, and `--direction directions/data_difference.safetensors` takes one."
)
_ENDS = {"stop": "ended by itself", "length": "cut", None: "…"}


def style() -> str:
    """The page's style sheet."""
    return reader_style() + (files("misdirection.playground") / "page.css").read_text("utf-8")


def heading(playground: Playground) -> Markup:
    """What is loaded, and what is missing with the command that makes it."""
    chat, direction = playground.chat, playground.direction
    facts = [f"base {chat.name}", *([f"organism {chat.adapter}"] if chat.adapter else [])]
    if direction is not None:
        of = f" of {direction.origin.organism}" if direction.origin.organism else ""
        facts.append(f"direction {direction.origin.kind}{of}")
    missing = [text for text, is_there in ((_NO_ADAPTER, chat.adapter), (_NO_DIRECTION, direction)) if not is_there]
    notes = Markup().join(Markup('<p class="missing">{}</p>').format(mark_code(text)) for text in missing)
    return Markup("<h1>Playground</h1><p>{}</p>{}").format(" · ".join(facts), notes)


def said(text: str, *, is_problem: bool = False) -> Markup:
    """The line that says what goes on, or what is wrong."""
    kind = "problem" if is_problem else "note"
    return Markup('<p class="{}" role="{}">{}</p>').format(kind, "alert" if is_problem else "status", text)


# --- answers --------------------------------------------------------------------------------------------------------


def columns(answers: Sequence[GrowingAnswer], bodies: Sequence[str] | None = None) -> Markup:
    """The answers side by side; `bodies` are their texts as `shaded` gives them."""
    texts = [answer.text for answer in answers] if bodies is None else bodies
    cells = Markup().join(_column(answer, body) for answer, body in zip(answers, texts, strict=True))
    return Markup('<div class="columns">{}</div>').format(cells)


def _column(answer: GrowingAnswer, body: str) -> Markup:
    count = f"{len(answer.tokens)} tokens, {_ENDS[answer.finish]}" if answer.tokens or answer.finish else ""
    return Markup(
        '<section><h2>{}</h2><div class="reader-text" dir="auto" tabindex="0">{}</div><p class="note">{}</p></section>'
    ).format(answer.condition, body, count)


def shaded(
    chat: ChatModel, answers: Sequence[GrowingAnswer], values: Sequence[Sequence[float]], reading: str
) -> Markup:
    """The answers side by side, each token in the colour of its value, over a line that says what the colours mean."""
    limit = full_colour(np.array([value for each in values for value in each] or [0.0]))
    bodies = [_tokens(chat, answer, each, limit) for answer, each in zip(answers, values, strict=True)]
    reader = "organism" if chat.adapter else "base"
    legend = Markup(
        '<div class="reader-scale"><span class="reader-bar"></span><span>{}</span><span>0</span><span>{}</span></div>'
        '<p class="note">{}: what the {} reads in each text, nothing done to it. Point at a token for its value.</p>'
    ).format(show_number(-limit), show_number(limit), reading, reader)
    return columns(answers, bodies) + legend


def _tokens(chat: ChatModel, answer: GrowingAnswer, values: Sequence[float], limit: float) -> Markup:
    words = readable(chat.tokenizer.convert_ids_to_tokens(list(answer.tokens)))
    return Markup().join(
        Markup('<span class="{}" style="--share: {}" title="{}">{}</span>').format(
            "minus" if value < 0 else "plus",
            f"{min(abs(value) / limit, 1):.3f}",
            show_number(value),
            visible(word),
        )
        for word, value in zip(words, values, strict=True)
    )


# --- margins --------------------------------------------------------------------------------------------------------


def margins(scores: Sequence[ScoredPair]) -> Markup:
    """A row for each condition: both log-probabilities, the margin, and its change against the base."""
    rows = [
        Markup('<tr><th scope="row">{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>').format(
            score.condition,
            *map(show_number, (score.misaligned, score.aligned, score.margin, score.margin - scores[0].margin)),
        )
        for score in scores
    ]
    heads = ("", "log p(misaligned)", "log p(aligned)", "margin", "against the base")
    return Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(
        Markup().join(Markup('<th scope="col">{}</th>').format(head) for head in heads), Markup().join(rows)
    )
