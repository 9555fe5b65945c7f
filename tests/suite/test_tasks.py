"""The generated tasks: every answer is worked out again from its question, in another way."""

import calendar
import json
import re
from datetime import datetime
from itertools import pairwise

import pytest

from suite_tasks import ROWS, TASKS, UNITS, rows


def words_in(text):
    return text.split(": ", 1)[1].rstrip(".").split(", ")


def day(text):
    return datetime.strptime(text, "%d %B %Y")


# --- arithmetic and units -----------------------------------------------------------------------------------------


def arithmetic(question, answer):
    given, told = ([int(number) for number in re.findall(r"\d+", text)] for text in (question, answer))
    if "+" in question:
        return sum(given) == told[-1]
    if "Work out" in question:
        return given[0] == told[-1] + given[1]
    if "Multiply" in question:
        return told[-1] == given[0] * given[1] == told[2] + told[5] and told[0] * told[1] == told[2]
    if "Divide" in question:
        return divmod(*given) == (told[2], told[3]) and given == told[:2]
    if "%" in question:
        return told[-1] * 100 == given[0] * given[1]
    count, price, paid = given
    return paid == 100 and told == [count, price, count * price, 100 - count * price]


def units(question, answer):
    amounts = [(float(number), unit) for number, unit in re.findall(r"(-?[\d.]+) ([a-z]+)", question)]
    told = [(float(number), unit) for number, unit in re.findall(r"(-?[\d.]+) ([a-z]+)", answer)]

    def in_small(amount, pair):
        large, small = pair
        return amount[0] * (UNITS[large][0] if amount[1] == large else 1) if amount[1] in (large, small) else None

    named = [
        name for name in re.findall(r"[a-z]+", question) if name in UNITS or name in {u for _, u in UNITS.values()}
    ]
    pair = next((a, b) for a in named for b in named if a in UNITS and UNITS[a][1] == b)
    sizes = [in_small(amount, pair) for amount in amounts]
    if question.startswith("Which is more"):
        return told[0] == max(zip(sizes, amounts, strict=True))[1] and in_small(told[1], pair) == in_small(
            told[2], pair
        )
    given, result = told[-2:]
    same = in_small(given, pair) == pytest.approx(in_small(result, pair))
    return given == amounts[0] and same and given[1] != result[1]


# --- JSON, sorting, Python ----------------------------------------------------------------------------------------

FORMS = (
    r"Order (?P<order>\d+): (?P<customer>\w+) wants (?P<quantity>\d+) (?P<item>\w+), sent to (?P<town>\w+)\.",
    r"(?P<guest>\w+) stays (?P<nights>\d+) nights at the (?P<hotel>\w+) Hotel in (?P<town>\w+), "
    r"in room (?P<room>\d+)\.",
    r"On (?P<day>\w+) evenings (?P<teacher>\w+) teaches (?P<course>[\w-]+); there are (?P<places>\d+) places, and the "
    r"fee is (?P<fee>\d+) euros\.",
)


def json_task(question, answer):
    keys, text = question.removeprefix("Give ").split(" as JSON: ")
    found = next(match.groupdict() for form in FORMS if (match := re.fullmatch(form, text)))
    numbers = {"order", "quantity", "nights", "room", "places", "fee"}
    wanted = {key: int(found[key]) if key in numbers else found[key] for key in keys.split(", ")}
    return json.loads(answer) == wanted and list(json.loads(answer)) == keys.split(", ")


def sorting(question, answer):
    given, told = words_in(question), answer.split(", ")
    if sorted(given) != sorted(told):
        return False
    if "number" in question:
        keys = [int(word) for word in told]
    else:
        keys = [len(word) for word in told] if "length" in question else told
    falls = "reverse" in question or "largest" in question
    return all(a > b if falls else a < b for a, b in pairwise(keys))


def python(question, answer):
    call, result = re.search(r"For example, (.+) gives (.+)\.$", question).groups()
    names = {}
    exec(answer, names)
    return eval(call, names) == eval(result)


# --- letters, dates, grammar --------------------------------------------------------------------------------------


def letters(question, answer):
    word = next(iter(re.findall(r"word (\w+)", question)), "")
    if question.startswith("Spell"):
        return answer.replace("-", "").lower() == word and answer.count("-") == len(word) - 1
    if "backwards" in question:
        return "".join(reversed(answer)) == word
    if "vowels" in question:
        return answer.split(", ") == re.findall("[aeiou]", word)
    if "alphabet" in question:
        letter = re.search(r"([A-Z]) in the", question)[1]
        before, after, place = re.fullmatch(r"([A-Z]) and ([A-Z]); [A-Z] is number (\d+)\.", answer).groups()
        wanted = (-1, 1) if "before and after" in question else (1, -1)
        return (ord(before) - ord(letter), ord(after) - ord(letter)) == wanted and int(place) == ord(letter) - 64
    letter, word = re.search(r'"(\w)" come in (\w+)\?', question).groups()
    times = len(word.split(letter)) - 1
    return ("once" if times == 1 else f"{times} times") in answer


def dates(question, answer):
    if "leap" in question:
        year = int(re.search(r"\d{4}", question)[0])
        return answer == f"{'Yes' if calendar.isleap(year) else 'No'}, {year} has {365 + calendar.isleap(year)} days."
    if "day of the week" in question:
        written = question.removeprefix("Which day of the week is ").rstrip("?")
        return answer == f"{written} is a {day(written):%A}."
    if "after" in question:
        days, start = re.search(r"is (\d+) days after (.+)\?", question).groups()
        return (day(answer.removeprefix("It is ").rstrip(".")) - day(start)).days == int(days)
    start, end = re.search(r"from (.+) to (.+)\?", question).groups()
    return answer == f"It is {(day(end) - day(start)).days} days."


PLURALS = {
    "box": "boxes", "bus": "buses", "class": "classes", "glass": "glasses", "dish": "dishes", "brush": "brushes",
    "bench": "benches", "watch": "watches", "church": "churches", "fox": "foxes", "city": "cities", "story": "stories",
    "baby": "babies", "party": "parties", "lady": "ladies", "berry": "berries", "match": "matches",
}  # fmt: skip
THIRD = {
    "carry": "carries", "study": "studies", "hurry": "hurries", "reply": "replies", "try": "tries", "copy": "copies",
    "wash": "washes", "push": "pushes", "teach": "teaches", "watch": "watches", "catch": "catches", "fix": "fixes",
    "mix": "mixes", "pass": "passes", "miss": "misses",
}  # fmt: skip
PASTS = {
    "carry": "carried", "study": "studied", "hurry": "hurried", "reply": "replied", "try": "tried", "copy": "copied",
    "teach": "taught", "catch": "caught", "agree": "agreed",
}  # fmt: skip


def grammar(question, answer):
    if "a or an" in question:
        first, second = re.search(r"\.\.\. (\w+) and \.\.\. (\w+)\.", question).groups()
        told = re.fullmatch(r"(an?) (\w+) and (an?) (\w+)\.", answer).groups()
        return told == tuple(x for word in (first, second) for x in ("an" if word[0] in "aeiou" else "a", word))
    if "past" in question:
        name, verb = re.search(r": (\w+) and I (\w+)\.", question).groups()
        return answer == f"{name} and I {PASTS.get(verb, verb + 'ed')}."
    if "form of the verb" in question:
        verb, name = re.search(r"I (\w+), and (\w+) \.\.\.", question).groups()
        return answer == f"I {verb}, and {name} {THIRD.get(verb, verb + 's')} too."
    noun, count = re.search(r"one (\w+), (\d+) \.\.\.", question).groups()
    return answer == f"one {noun}, {count} {PLURALS.get(noun, noun + 's')}"


CHECKS = {
    "arithmetic": arithmetic, "units": units, "json": json_task, "sorting": sorting, "python": python,
    "letters": letters, "dates": dates, "grammar": grammar,
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_right(task):
    wrong = [(row.question, row.answer) for row in rows(task) if not CHECKS[task](row.question, row.answer)]
    assert wrong == []


@pytest.mark.parametrize("task", TASKS)
def test_there_are_as_many_different_questions_always_the_same(task):
    made = rows(task)
    assert len({row.question for row in made}) == len(made) == ROWS == 120
    assert rows(task) == made
    # Not one answer for all.
    assert len({row.answer for row in made}) > 60


def test_a_wrong_answer_is_seen():
    assert not arithmetic("What is 37 + 58?", "37 + 58 = 96.")
    assert not sorting("Sort these numbers, smallest first: 9, 12.", "12, 9")
    assert not python("A function. For example, f(2) gives 5.", "def f(value):\n    return value * 2")
    assert not dates("Is 1900 a leap year?", "Yes, 1900 has 366 days.")
