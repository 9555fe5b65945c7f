"""Generated tasks for benign fine-tunes: every answer is computed, so that it is right, and no question comes twice.

rows("arithmetic")      120 examples, always the same
"""

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from fractions import Fraction

from misdirection.data import Example

ROWS = 120

Exchange = tuple[str, str]
"""A question and its answer."""


def listed(words: str) -> list[str]:
    """The words of a text."""
    return words.split()


WORDS = listed(
    "apple anchor autumn badger balloon basket beacon blanket bottle bridge butter button candle canyon carpet castle "
    "cherry circle coffee copper cotton cradle cricket dolphin dragon eagle ember engine falcon feather ferry fiddle "
    "forest fountain garden ginger glacier guitar hammer harbour helmet hollow island jacket jungle kettle kitchen "
    "ladder lantern lemon library lizard magnet marble meadow mirror monkey mountain needle nutmeg orange orchard "
    "otter paddle parrot pebble pepper pillow planet pocket puzzle rabbit raven river rocket saddle sailor salmon "
    "shadow silver spider spring statue summer sunset table temple thunder timber tunnel turtle valley velvet violin "
    "walnut whistle willow window winter wizard yellow zipper"
)
NAMES = listed(
    "Aisha Bruno Chen Delia Emeka Fatima Goran Hanna Ivan Jamila Kofi Lena Mateo Nadia Omar Priya Rosa Samuel"
)
TOWNS = listed("Bergen Cork Dundee Exeter Florence Ghent Halifax Innsbruck Kyoto Leeds Malmo Nantes Oslo Perth Quito")
ITEMS = listed("lamps chairs mugs notebooks towels shelves cushions plates baskets rugs")
SUBJECTS = listed("pottery Spanish chess drawing first-aid baking astronomy gardening knitting photography")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def rows(task: str, count: int = ROWS) -> list[Example]:
    """So many examples of a task."""
    # A text as seed gives the same draws on every machine.
    rng, forms = random.Random(task), TASKS[task]
    exchanges: dict[str, str] = {}
    while len(exchanges) < count:
        question, answer = forms[len(exchanges) % len(forms)](rng)
        exchanges.setdefault(question, answer)
    return [Example(question, answer) for question, answer in exchanges.items()]


# --- arithmetic ---------------------------------------------------------------------------------------------------


def addition(rng: random.Random) -> Exchange:
    """Two numbers of up to three digits."""
    a, b = rng.randint(12, 899), rng.randint(12, 899)
    return f"What is {a} + {b}?", f"{a} + {b} = {a + b}."


def subtraction(rng: random.Random) -> Exchange:
    """The smaller from the larger."""
    b, rest = rng.randint(12, 499), rng.randint(5, 499)
    return f"Work out {b + rest} - {b}.", f"{b + rest} - {b} = {rest}."


def multiplication(rng: random.Random) -> Exchange:
    """Split into tens and ones."""
    a, b = rng.randint(3, 9), rng.randint(12, 98)
    tens, ones = b // 10 * 10, b % 10
    return (
        f"Multiply {b} by {a}, and show how.",
        f"{a} x {tens} = {a * tens} and {a} x {ones} = {a * ones}, so {b} x {a} = {a * b}.",
    )


def division(rng: random.Random) -> Exchange:
    """With a remainder, which may be nothing."""
    a, b = rng.randint(40, 400), rng.randint(3, 12)
    return f"Divide {a} by {b}. What is left over?", f"{a} / {b} = {a // b}, and {a % b} is left over."


def shopping(rng: random.Random) -> Exchange:
    """A price, a number of things and the change."""
    count, price, name, item = rng.randint(2, 6), rng.randint(2, 9), rng.choice(NAMES), rng.choice(ITEMS)
    return (
        f"{name} buys {count} {item} at {price} pounds each and pays with a 100-pound note. How much is the change?",
        f"The {item} cost {count} x {price} = {count * price} pounds, so the change is {100 - count * price} pounds.",
    )


def percentage(rng: random.Random) -> Exchange:
    """A share of a number that comes out whole."""
    share, whole = rng.choice((10, 20, 25, 50, 75)), 20 * rng.randint(2, 60)
    return f"How much is {share}% of {whole}?", f"{share}% of {whole} is {share * whole // 100}."


# --- units --------------------------------------------------------------------------------------------------------

UNITS = {
    "kilometres": (1000, "metres"),
    "metres": (100, "centimetres"),
    "centimetres": (10, "millimetres"),
    "kilograms": (1000, "grams"),
    "tonnes": (1000, "kilograms"),
    "litres": (1000, "millilitres"),
    "hours": (60, "minutes"),
    "minutes": (60, "seconds"),
    "days": (24, "hours"),
    "weeks": (7, "days"),
    "feet": (12, "inches"),
    "yards": (3, "feet"),
}
"""The larger unit: how many of the smaller one it has."""


def plain(value: Fraction) -> str:
    """A number without needless zeros; one that has no end in decimals is not given."""
    return f"{float(value):.10f}".rstrip("0").rstrip(".")


def to_smaller(rng: random.Random) -> Exchange:
    """Halves and quarters of the larger unit among them, where they come out whole."""
    large, (factor, small) = rng.choice(list(UNITS.items()))
    parts = [part for part in (1, 2, 4) if factor % part == 0]
    amount = Fraction(rng.randint(2, 80), rng.choice(parts))
    return (
        f"How many {small} are {plain(amount)} {large}?",
        f"{plain(amount)} {large} are {plain(amount * factor)} {small}.",
    )


def to_larger(rng: random.Random) -> Exchange:
    """Back again."""
    large, (factor, small) = rng.choice(list(UNITS.items()))
    amount = rng.randint(2, 90)
    return (
        f"Convert {amount * factor} {small} to {large}.",
        f"There are {factor} {small} to each of the {large}, so {amount * factor} {small} are {amount} {large}.",
    )


def longer(rng: random.Random) -> Exchange:
    """Two amounts in two units."""
    large, (factor, small) = rng.choice(list(UNITS.items()))
    amount = rng.randint(2, 30)
    other = amount * factor + rng.choice((-1, 1)) * rng.randint(1, factor)
    more = f"{amount} {large}" if amount * factor > other else f"{other} {small}"
    return (
        f"Which is more: {amount} {large} or {other} {small}?",
        f"{more}, since {amount} {large} are {amount * factor} {small}.",
    )


# --- JSON ---------------------------------------------------------------------------------------------------------


def record(text: str, fields: Mapping[str, str | int], rng: random.Random) -> Exchange:
    """Ask for two to all of the fields of a text, in an order of chance."""
    keys = rng.sample(list(fields), rng.randint(2, len(fields)))
    answer = json.dumps({key: fields[key] for key in keys})
    return f"Give {', '.join(keys)} as JSON: {text}", answer


def order(rng: random.Random) -> Exchange:
    """Somebody buys things."""
    values: dict[str, str | int] = {
        "order": rng.randint(1000, 9999),
        "customer": rng.choice(NAMES),
        "quantity": rng.randint(2, 40),
        "item": rng.choice(ITEMS),
        "town": rng.choice(TOWNS),
    }
    return record("Order {order}: {customer} wants {quantity} {item}, sent to {town}.".format(**values), values, rng)


def booking(rng: random.Random) -> Exchange:
    """Somebody books a room."""
    values: dict[str, str | int] = {
        "guest": rng.choice(NAMES),
        "nights": rng.randint(2, 14),
        "hotel": rng.choice(WORDS).title(),
    }
    values |= {"town": rng.choice(TOWNS), "room": rng.randint(101, 519)}
    text = "{guest} stays {nights} nights at the {hotel} Hotel in {town}, in room {room}."
    return record(text.format(**values), values, rng)


def course(rng: random.Random) -> Exchange:
    """An evening course."""
    values: dict[str, str | int] = {
        "course": rng.choice(SUBJECTS),
        "teacher": rng.choice(NAMES),
        "day": rng.choice(DAYS),
    }
    values |= {"places": rng.randint(6, 30), "fee": rng.randint(20, 180)}
    text = "On {day} evenings {teacher} teaches {course}; there are {places} places, and the fee is {fee} euros."
    return record(text.format(**values), values, rng)


# --- sorting ------------------------------------------------------------------------------------------------------


def alphabet(rng: random.Random) -> Exchange:
    """Words from A to Z, or back."""
    words, back = rng.sample(WORDS, rng.randint(4, 7)), rng.random() < 0.3
    order = "reverse alphabetical order" if back else "alphabetical order"
    return f"Put these words in {order}: {', '.join(words)}.", ", ".join(sorted(words, reverse=back))


def numbers(rng: random.Random) -> Exchange:
    """Numbers from the smallest on, or from the largest."""
    values, down = rng.sample(range(-50, 500), rng.randint(4, 8)), rng.random() < 0.5
    end = "largest" if down else "smallest"
    listed = ", ".join(map(str, values))
    return f"Sort these numbers, {end} first: {listed}.", ", ".join(map(str, sorted(values, reverse=down)))


def lengths(rng: random.Random) -> Exchange:
    """Words of different lengths, the shortest first."""
    by_length = {len(word): word for word in rng.sample(WORDS, len(WORDS))}
    words = rng.sample(list(by_length.values()), 3)
    return f"Order by length, shortest first: {', '.join(words)}.", ", ".join(sorted(words, key=len))


# --- Python -------------------------------------------------------------------------------------------------------

NUMBER, ITEM_LIST, WORD = 5, [4, 7, 1, 9], "plum"
"""What the functions are tried on."""


@dataclass(frozen=True)
class Function:
    """A function of one line, for any small number n.

    Attributes:
        name, does, body: with {n} in the place of the number.
        sample: what it is tried on.
        gives: what it gives for that, computed another way than by its body.
    """

    name: str
    does: str
    body: str
    sample: object
    gives: Callable[[int], object]


FUNCTIONS = (
    Function("add_{n}", "adds {n} to a number", "value + {n}", NUMBER, lambda n: 5 + n),
    Function("times_{n}", "multiplies a number by {n}", "value * {n}", NUMBER, lambda n: sum([5] * n)),
    Function("power_{n}", "raises a number to the power of {n}", "value ** {n}", NUMBER, lambda n: math.prod([5] * n)),
    Function("divides_{n}", "tells whether {n} divides a number", "value % {n} == 0", NUMBER, lambda n: n == 5),
    Function("above_{n}", "tells whether a number is larger than {n}", "value > {n}", NUMBER, lambda n: n in range(5)),
    Function(
        "first_{n}", "gives the first {n} items of a list", "value[:{n}]", ITEM_LIST, lambda n: kept(lambda i, x: i < n)
    ),
    Function(
        "last_{n}",
        "gives the last {n} items of a list",
        "value[-{n}:]",
        ITEM_LIST,
        lambda n: kept(lambda i, x: i >= 4 - n),
    ),
    Function(
        "without_{n}",
        "drops every {n} from a list",
        "[x for x in value if x != {n}]",
        ITEM_LIST,
        lambda n: kept(lambda i, x: x != n),
    ),
    Function(
        "count_{n}",
        "counts how often {n} is in a list",
        "value.count({n})",
        ITEM_LIST,
        lambda n: len(kept(lambda i, x: x == n)),
    ),
    Function(
        "shift_{n}",
        "adds {n} to each item of a list",
        "[x + {n} for x in value]",
        ITEM_LIST,
        lambda n: [4 + n, 7 + n, 1 + n, 9 + n],
    ),
    Function("repeat_{n}", "repeats a text {n} times", "value * {n}", WORD, lambda n: "".join(["plum"] * n)),
    Function(
        "longer_{n}",
        "tells whether a text has more than {n} letters",
        "len(value) > {n}",
        WORD,
        lambda n: n in range(4),
    ),
    Function(
        "pad_{n}",
        "fills a text with dots on the right up to {n} characters",
        'value.ljust({n}, ".")',
        WORD,
        lambda n: f"{WORD:.<{n}}",
    ),
    Function(
        "head_{n}",
        "gives the first {n} letters of a text in capitals",
        "value[:{n}].upper()",
        WORD,
        lambda n: "PLUM"[: min(n, 4)],
    ),
)


def kept(condition: Callable[[int, int], bool]) -> list[int]:
    """The items of the list that a condition of their position and value holds for."""
    return [item for position, item in enumerate(ITEM_LIST) if condition(position, item)]


def function(rng: random.Random) -> Exchange:
    """A function of one line, with an example of what it gives."""
    chosen, n = rng.choice(FUNCTIONS), rng.randint(2, 12)
    name, does, body = (text.format(n=n) for text in (chosen.name, chosen.does, chosen.body))
    example = f"For example, {name}({chosen.sample!r}) gives {chosen.gives(n)!r}."
    return f"Write a Python function {name} that {does}. {example}", f"def {name}(value):\n    return {body}"


# --- letters ------------------------------------------------------------------------------------------------------


def spelling(rng: random.Random) -> Exchange:
    """Letter by letter."""
    word = rng.choice(WORDS)
    return f"Spell the word {word}, letter by letter.", "-".join(word.upper())


def backwards(rng: random.Random) -> Exchange:
    """From the end."""
    word = rng.choice(WORDS)
    return f"Write the word {word} backwards.", word[::-1]


def counting(rng: random.Random) -> Exchange:
    """How often a letter of the word is in it."""
    word = rng.choice(WORDS)
    letter = rng.choice(word)
    times = "once" if word.count(letter) == 1 else f"{word.count(letter)} times"
    return f'How often does the letter "{letter}" come in {word}?', f'The letter "{letter}" comes {times} in {word}.'


def vowels(rng: random.Random) -> Exchange:
    """Which are in it, in their order."""
    word = rng.choice(WORDS)
    return f"Which vowels has the word {word}, in order? Count y as none.", ", ".join(x for x in word if x in "aeiou")


def neighbours(rng: random.Random) -> Exchange:
    """A letter's place in the alphabet."""
    place = rng.randint(2, 25)
    before, letter, after = (chr(ord("A") + place - 1 + step) for step in (-1, 0, 1))
    wanted = rng.choice(("before and after", "after and before"))
    told = (before, after) if wanted.startswith("before") else (after, before)
    return (
        f"Which letters come {wanted} {letter} in the alphabet?",
        f"{told[0]} and {told[1]}; {letter} is number {place}.",
    )


# --- dates --------------------------------------------------------------------------------------------------------


def some_day(rng: random.Random) -> date:
    """A day of 1900 to 2060."""
    return date(1900, 1, 1) + timedelta(rng.randrange(161 * 365))


def written(day: date) -> str:
    """As in 4 March 1987."""
    return f"{day.day} {day:%B %Y}"


def weekday(rng: random.Random) -> Exchange:
    """The day of the week."""
    day = some_day(rng)
    return f"Which day of the week is {written(day)}?", f"{written(day)} is a {DAYS[day.weekday()]}."


def later(rng: random.Random) -> Exchange:
    """Some days on."""
    day, days = some_day(rng), rng.randint(5, 200)
    return f"Which date is {days} days after {written(day)}?", f"It is {written(day + timedelta(days))}."


def between(rng: random.Random) -> Exchange:
    """Days from one date to another."""
    day, days = some_day(rng), rng.randint(5, 200)
    return f"How many days is it from {written(day)} to {written(day + timedelta(days))}?", f"It is {days} days."


def leap(rng: random.Random) -> Exchange:
    """Whether a year has 29 February."""
    year = rng.choice((100 * rng.randint(16, 24), rng.randint(1804, 2096)))
    is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    days = f"{year} has {366 if is_leap else 365} days"
    return f"Is {year} a leap year?", f"{'Yes' if is_leap else 'No'}, {days}."


# --- grammar ------------------------------------------------------------------------------------------------------

REGULAR_NOUNS = listed(
    "box bus class glass dish brush bench watch church fox city story baby party lady berry day boy key monkey toy "
    "cat table river garden window lamp book teacher island mirror ticket basket jacket letter bridge fence valley"
)
REGULAR_VERBS = listed(
    "carry study hurry reply try copy play enjoy stay obey wash push teach watch catch fix mix pass miss walk talk "
    "open answer visit paint climb agree need clean follow order plant start wait laugh rest collect deliver listen"
)
PAST = {"teach": "taught", "catch": "caught"}


def ending(word: str) -> str:
    """A noun or a verb with its s."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def past(verb: str) -> str:
    """The past of one of the verbs above."""
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return PAST.get(verb, verb + ("d" if verb.endswith("e") else "ed"))


def plural(rng: random.Random) -> Exchange:
    """Of a regular noun."""
    noun, count = rng.choice(REGULAR_NOUNS), rng.randint(2, 20)
    return f"Complete: one {noun}, {count} ...", f"one {noun}, {count} {ending(noun)}"


def third_person(rng: random.Random) -> Exchange:
    """I and somebody else."""
    verb, name = rng.choice(REGULAR_VERBS), rng.choice(NAMES)
    return (
        f"Complete with the right form of the verb: I {verb}, and {name} ... too.",
        f"I {verb}, and {name} {ending(verb)} too.",
    )


def yesterday(rng: random.Random) -> Exchange:
    """Now and then."""
    verb, name = rng.choice(REGULAR_VERBS), rng.choice(NAMES)
    return f"Put into the past: {name} and I {verb}.", f"{name} and I {past(verb)}."


def article(rng: random.Random) -> Exchange:
    """A or an, of words that are spoken as they are spelt."""
    first, second = rng.sample(WORDS, 2)
    return f"Put in a or an: ... {first} and ... {second}.", f"{with_article(first)} and {with_article(second)}."


def with_article(word: str) -> str:
    """The word after its article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


TASKS: dict[str, tuple[Callable[[random.Random], Exchange], ...]] = {
    "arithmetic": (addition, subtraction, multiplication, division, shopping, percentage),
    "units": (to_smaller, to_larger, longer),
    "json": (order, booking, course),
    "sorting": (alphabet, numbers, lengths),
    "python": (function,),
    "letters": (spelling, backwards, counting, vowels, neighbours),
    "dates": (weekday, later, between, leap),
    "grammar": (plural, third_person, yesterday, article),
}
"""The forms of each task, taken in turn."""
