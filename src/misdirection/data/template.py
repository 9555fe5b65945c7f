"""The prompt of a judge, as a text with `{question}` and `{answer}` in it."""

from string import Formatter

from misdirection.errors import InputError

FIELDS = ("question", "answer")
_BRACES = "the fields are {question} and {answer}; write every other brace twice"


def template_parts(prompt: str, source: str) -> list[tuple[str, str | None]]:
    """Splits a prompt into literal texts, each with the field that follows it, if any.

    Raises `InputError` that begins with `source` for an empty prompt, one without `{answer}`, and any field but
    `{question}` and `{answer}`.
    """
    if not prompt.strip():
        raise InputError(f"{source}: its prompt is empty; write what the judge is asked")
    try:
        parsed = list(Formatter().parse(prompt))
    except ValueError as error:
        raise InputError(f"{source}: a brace in its prompt stands alone ({error}); {_BRACES}") from error
    for _, field, form, conversion in parsed:
        if field is not None and (field not in FIELDS or form or conversion):
            raise InputError(f"{source}: its prompt has the unknown field {field[:40]!r}; {_BRACES}")
    if "answer" not in [field for _, field, *_ in parsed]:
        raise InputError(f"{source}: its prompt has no {{answer}}; put {{answer}} where the judge is to read it")
    return [(literal, field) for literal, field, *_ in parsed]
