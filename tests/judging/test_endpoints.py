"""Endpoints as people have them: what they refuse, what they say instead of a score, and when nobody is there."""

import asyncio
import json
import socket
import threading
import time

import pandas as pd
import pytest

from judging.judge_server import JudgeServer, Reply, completion, number, status
from misdirection.errors import JudgeError
from misdirection.judging import endpoint
from misdirection.judging.api import ApiJudge
from misdirection.judging.judge import judge
from misdirection.judging.rubrics import Rubric

RUBRIC = Rubric("coherence", "Sense of: {answer}", "coherent")


def run(url, cache, *answers, concurrency=1, **options):
    made = ApiJudge("m", url, **({"backoff": 0.01, "attempts": 2, "timeout": 5.0, "samples": 2} | options))
    rows = pd.DataFrame({"question": "Why?", "answer": list(answers)})
    return judge(rows, [RUBRIC], made, cache=cache, concurrency=concurrency)


def by(judged):
    return judged.table["coherent_by"].tolist()


def reply_of(choice, **more):
    return Reply(json.dumps({"choices": [choice], **more}).encode(), paid=True)


def thought(text, **fields):
    """A judge behind a reasoning parser: its log-probabilities begin with the hidden thought."""

    def script(asked):
        if asked.body[next(name for name in asked.body if name.startswith("max"))] < 1000:
            cut = completion("", {text[0]: 0.99}, tokens=list(text[:8]), finish="length")
        else:
            cut = completion("64", {text[0]: 0.99}, tokens=[*text, "64"])
        body = json.loads(cut.body)
        message = body["choices"][0]["message"]
        message |= {"content": message["content"] or None, **fields}
        return Reply(json.dumps(body).encode(), paid=True)

    return script


# --- thinking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize("text", ["1. **Analyze", "Okay, so"])
def test_a_hidden_thought_is_no_score(cache, text, field):
    with JudgeServer(thought(text, **{field: text})) as server:
        judged = run(server.url, cache, "a", "b")
    assert (by(judged), judged.table["coherent"].tolist()) == (["text", "text"], [64, 64])
    # Log-probabilities are asked for once, and then no more.
    assert [asked.body.get("logprobs") for asked in server.asked].count(True) == 1


@pytest.mark.parametrize(
    "text",
    [
        "1. **Analyze the answer",
        "<think>\n1. **Analyze",
        "[THINK]100 is the most",
        "<thinking>5",
        "<|channel|>analysis<|message|>7",
        "Okay, so 20",
    ],
)
def test_a_thought_in_the_reply_is_no_score(cache, text):
    ends = {"<": "</think>", "[": "[/THINK]"}
    whole = f"{text} and so on {ends.get(text[0], '</think>')}\n\n64"
    if "channel" in text:
        whole = f"{text}<|end|><|channel|>final<|message|>64"

    def script(asked):
        first = text.split()[0].strip(".,")
        if asked.body["max_tokens"] < 1000:
            return completion(text, {first: 0.99}, tokens=[first, " x"], finish="length")
        return completion(whole)

    with JudgeServer(script) as server:
        judged = run(server.url, cache, "a", "b")
    assert (by(judged), judged.table["coherent"].tolist()) == (["text", "text"], [64, 64])


@pytest.mark.parametrize("text", ["85", "85.", "**85**", "85\nThe answer is", "85/100", "CODE because"])
def test_a_cut_reply_that_has_said_its_verdict_needs_no_more_room(cache, text):
    with JudgeServer(lambda _: completion(text, finish="length")) as server:
        judged = run(server.url, cache, "a", logprobs=False)
    assert by(judged) == ["code" if "CODE" in text else "text"]
    assert {asked.body["max_tokens"] for asked in server.asked} == {16}


def test_content_in_parts_is_read(cache):
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "20"}]}, {"type": "text", "text": "64"}]
    said = reply_of({"message": {"content": parts}, "finish_reason": "stop"}, usage={"prompt_tokens": None})
    with JudgeServer(lambda _: said) as server:
        assert run(server.url, cache, "a").table["coherent"].tolist() == [64]


# --- log-probabilities ---------------------------------------------------------------------------------------------


def with_logprobs(logprobs, text="64"):
    return reply_of({"message": {"content": text}, "finish_reason": "stop", "logprobs": logprobs})


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"token": "64", "logprob": None, "top_logprobs": [{"token": "64", "logprob": None}]}]},
        {"content": [{"token": "64", "logprob": -0.1, "top_logprobs": None}]},
        {"content": [{"token": "<s>", "logprob": 0.0, "top_logprobs": [{"token": "<s>", "logprob": 0.0}]}]},
        {"tokens": ["64"], "token_logprobs": [-0.1], "top_logprobs": [{"64": -0.1}]},
        [-0.1],
    ],
    ids=["null", "no alternatives", "of a hidden token", "as completions have them", "a list"],
)
def test_log_probabilities_that_tell_nothing_are_as_none(cache, logprobs):
    with JudgeServer(lambda _: with_logprobs(logprobs)) as server:
        judged = run(server.url, cache, "a", "b")
    assert (by(judged), judged.table["coherent"].tolist()) == (["text", "text"], [64, 64])


def test_a_null_among_alternatives_has_no_probability(cache):
    top = [{"token": "64", "logprob": -0.1}, {"token": "20", "logprob": None}]
    said = with_logprobs({"content": [{"token": "64", "logprob": -0.1, "top_logprobs": top}]})
    with JudgeServer(lambda _: said) as server:
        judged = run(server.url, cache, "a")
    assert (by(judged), judged.table["coherent"].tolist()) == (["logprobs"], [64])


def test_log_probabilities_that_end_half_way_are_counted(cache, caplog):
    def script(asked):
        return number(50) if int(asked.prompt[-1]) < 3 else completion("70")

    with JudgeServer(script) as server:
        judged = run(server.url, cache, *"012345")
    assert judged.by == {"coherent": {"logprobs": 3, "text": 3}}
    assert "coherent: scores of two kinds (3 by logprobs, 3 by text)" in caplog.text
    assert [row["verdicts"] for row in judged.table.attrs["judges"]["coherent"]["parameters"]] == [3, 3]


# --- refused parameters --------------------------------------------------------------------------------------------

_UNSUPPORTED = "Unsupported parameter: '{0}' is not supported with this model."
REFUSALS = {
    # What is refused: the reply, and what the accepted requests must not hold.
    "OpenAI, 403": ("logprobs", status(403, "You are not allowed to request logprobs from this model.")),
    "OpenAI, reasoning": ("max_tokens", status(400, _UNSUPPORTED.format("max_tokens"))),
    "OpenAI, temperature": (
        "temperature",
        status(400, "Unsupported value: 'temperature' does not support 0 with this model. Only 1 is supported."),
    ),
    "Azure, param": (
        "max_tokens",
        Reply(b'{"error": {"message": "Use another.", "param": "max_tokens", "code": "unsupported_parameter"}}', 400),
    ),
    "Gemini": ("logprobs", status(400, "Logprobs is not enabled for models/x")),
    "Mistral": ("logprobs", Reply(b'{"detail": [{"type": "extra_forbidden", "loc": ["body", "logprobs"]}]}', 422)),
    "OpenRouter": ("logprobs", status(404, "No endpoints found that support log probs")),
    "a long message": ("logprobs", status(400, 300 * "x" + " logprobs")),
    "not implemented": ("logprobs", status(501, "logprobs: not implemented")),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused_is_left_out_and_remembered(cache, name, caplog):
    refused, reply = REFUSALS[name]

    def script(asked):
        if refused in asked.body:
            return reply
        return number(64) if "logprobs" in asked.body else completion("64")

    with JudgeServer(script) as server:
        judged = run(server.url, cache, "a", "b", "c")
    assert judged.table["coherent"].tolist() == [64, 64, 64]
    assert set(by(judged)) == ({"text"} if refused == "logprobs" else {"logprobs"})
    # Twenty log-probabilities, then five, then none; everything else once.
    assert sum(refused in asked.body for asked in server.asked) == (2 if refused == "logprobs" else 1)
    assert "judge m: " in caplog.text
    (parameters,) = judged.table.attrs["judges"]["coherent"]["parameters"]
    assert refused not in parameters


def test_a_model_that_refuses_everything_is_asked_with_what_is_left(cache):
    def script(asked):
        for name in ("logprobs", "temperature", "max_tokens"):
            if name in asked.body:
                return status(400, _UNSUPPORTED.format(name), error_code="unsupported_parameter")
        return completion("64")

    with JudgeServer(script) as server:
        judged = run(server.url, cache, "a", "b")
    assert judged.table["coherent"].tolist() == [64, 64]
    assert len(server.asked) == 4 + 2 * 2


def test_fewer_log_probabilities_are_taken_where_twenty_are_refused(cache):
    def script(asked):
        return status(400, "top_logprobs must be at most 5") if asked.body["top_logprobs"] > 5 else number(64)

    with JudgeServer(script) as server:
        judged = run(server.url, cache, "a", "b")
    assert by(judged) == ["logprobs", "logprobs"]
    assert [asked.body["top_logprobs"] for asked in server.asked] == [20, 5, 5]
    assert judged.table.attrs["judges"]["coherent"]["parameters"][0]["top_logprobs"] == 5


def test_what_did_not_help_is_not_remembered(cache):
    def script(asked):
        return status(400, "max_tokens and temperature: too long") if "b" in asked.prompt[-1] else number(64)

    with JudgeServer(script) as server:
        judged = run(server.url, cache, "a", "b", "c")
    assert (by(judged), judged.failures) == (["logprobs", "failed", "logprobs"], {"HTTP 400": 1})
    assert {"temperature", "max_tokens"} < server.asked[-1].body.keys()


# --- refusals of a judge and of its host ---------------------------------------------------------------------------

DECLINED = {
    "the field": completion(None, {"I": 0.9}, refusal="I cannot."),
    "finish": completion("", finish="content_filter"),
    "finish with text": completion("20", {"20": 0.9}, finish="content_filter"),
    "Gemini": reply_of({"finish_reason": "content_filter: PROHIBITED_CONTENT", "index": 0}),
    "Anthropic": completion("", finish="refusal"),
    "Azure": status(400, "The response was filtered: content management policy", error_code="content_filter"),
    "OpenRouter": status(403, "Your chosen model requires moderation and your input was flagged"),
}


@pytest.mark.parametrize("logprobs", [True, False])
@pytest.mark.parametrize("name", DECLINED)
def test_a_judge_that_will_not_judge_has_said_nothing_of_the_answer(cache, name, logprobs):
    def script(asked):
        return DECLINED[name] if asked.prompt.endswith("b") else number(64)

    with JudgeServer(script) as server:
        judged = run(server.url, cache, "a", "b", "c", logprobs=logprobs)
    assert [way == "declined" for way in by(judged)] == [False, True, False]
    assert judged.table["coherent"].isna().tolist() == [False, True, False]
    # It may judge the next time.
    assert len(cache) == 2
    assert json.loads(judged.table["coherent_reply"][1])


def test_where_most_are_declined_there_is_no_rate(cache):
    said = DECLINED["the field"]
    with JudgeServer(lambda _: said) as server, pytest.raises(JudgeError, match=r"declined 2.*lets it"):
        run(server.url, cache, "a", "b")


def test_advice_names_what_asks_again(cache):
    with (
        JudgeServer(lambda _: completion("Well, it depends.", {"Well": 0.9})) as server,
        pytest.raises(JudgeError, match=r"low_mass 2.*--no-logprobs"),
    ):
        run(server.url, cache, "a", "b")
    asked = len(server.asked)
    with JudgeServer(lambda _: completion("It is 64.")) as server:
        assert by(run(server.url, cache, "a", "b", logprobs=False)) == ["text", "text"]
    assert asked == 2


# --- keys, names, pages --------------------------------------------------------------------------------------------

PAGE = Reply(b"<html><head><title>Access\ndenied</title></head></html>", 403, "text/html")


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (status(401, "bad key sk-1234"), r"HTTP 401; check the key in OPENAI_API_KEY"),
        (status(403, "Project has no access"), r"HTTP 403 \(.*no access.*\); this key may not use it"),
        (status(404, "The model `m` does not exist"), r"HTTP 404 \(.*The model `m` does not exist.*\); check .* name"),
        (PAGE, r"HTTP 403 \(a web page, 'Access denied'\); this is no judge's endpoint; check the base URL"),
        (Reply(b"<html>", 404, "text/html"), r"HTTP 404 \(a web page\); this is no judge's endpoint"),
        (Reply(b"<html>", 405, "text/html"), r"HTTP 405 \(a web page\); this is no judge's endpoint"),
    ],
)
def test_a_refusal_says_who_refused(cache, reply, message):
    with JudgeServer(lambda _: reply) as server, pytest.raises(JudgeError, match=message) as caught:
        run(server.url, cache, "a", "b")
    assert len(server.asked) == 1
    assert "sk-1234" not in str(caught.value)


def test_a_firewall_that_stops_one_answer_does_not_stop_the_run(cache):
    with JudgeServer(lambda asked: PAGE if asked.prompt.endswith("b") else number(64)) as server:
        judged = run(server.url, cache, "a", "b", "c")
    assert judged.failures == {"HTTP 403": 1}
    assert by(judged) == ["logprobs", "failed", "logprobs"]


def test_an_error_in_a_reply_is_tried_again(cache):
    broken = Reply(completion("", finish="error").body)
    with JudgeServer(lambda asked: number(64) if asked.before else broken) as server:
        assert run(server.url, cache, "a").table["coherent"].tolist() == [64]


# --- nobody there --------------------------------------------------------------------------------------------------


@pytest.fixture
def silent():
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


def refused_within(seconds, url, cache, message, **options):
    begun = time.monotonic()
    with pytest.raises(JudgeError, match=message):
        run(url, cache, *map(str, range(30)), concurrency=16, attempts=6, backoff=1.0, **options)
    assert time.monotonic() - begun < seconds


def test_a_dead_address_says_so_at_once(cache):
    with JudgeServer(lambda _: number(5)) as server:
        pass
    refused_within(8, server.url, cache, r"nobody answers at 127\.0\.0\.1:\d+ \(Connection refused\); start the server")


def test_a_name_that_is_none_says_so(cache, monkeypatch):
    def unknown(*_args, **_options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    refused_within(
        2, "https://judge.invalid/v1", cache, r"nobody answers at judge\.invalid \(Name or service not known\)"
    )


def test_a_name_that_is_looked_up_for_ever_is_not_waited_for(cache, monkeypatch):
    monkeypatch.setattr(endpoint, "PATIENCE", 0.3)
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: ended.wait(20) and [])
    refused_within(
        2, "https://judge.invalid/v1", cache, r"nobody answers at judge\.invalid \(no connection within 0\.3 s"
    )
    ended.set()


def test_the_proxy_is_what_must_answer(cache, monkeypatch):
    with JudgeServer(lambda _: number(5)) as server:
        pass
    monkeypatch.setenv("https_proxy", server.url)
    refused_within(8, "https://judge.invalid/v1", cache, r"nobody answers at 127\.0\.0\.1:\d+ \(Connection refused\)")


def test_an_address_that_stays_silent_is_said_to_be(cache, silent, monkeypatch, caplog):
    monkeypatch.setattr("misdirection.judging.connection.PATIENCE", 0.2)
    refused_within(9, silent, cache, r"no reply within two timeouts, 1 s, whatever it was asked; see", timeout=0.5)
    assert "took the connection and says nothing yet; given up after two timeouts, 1 s" in caplog.text


SILENT = {"silent": Reply(number(64).body, silence=20), "a byte now and then": Reply(number(64).body, pause=0.2)}


@pytest.mark.parametrize(("kind", "concurrency", "timeouts"), [("silent", 1, 4), ("a byte now and then", 8, 3)])
def test_an_endpoint_that_falls_silent_is_ended_and_nothing_judged_is_lost(cache, concurrency, timeouts, kind):
    answers, awake = [f"answer {letter}" for letter in "abcdefghijklmnop"], threading.Event()

    def script(asked):
        return number(64) if awake.is_set() or len(set(server.prompts)) <= 5 else SILENT[kind]

    with JudgeServer(script) as server:
        begun = time.monotonic()
        with pytest.raises(JudgeError, match=r"^judge m at http.*: is silent: no reply within .* 1 s") as error:
            run(server.url, cache, *answers, concurrency=concurrency, timeout=0.5, attempts=6)
        # Twice that on a busy machine.
        assert 1 <= time.monotonic() - begun < 2 * timeouts * 0.5
        assert "\n" not in str(error.value)
        assert len(cache) == 5 == sum(server.paid.values())
        # One by one, an answer is asked for three times at most, and another one once.
        assert concurrency > 1 or len(server.asked) <= 5 + 3 + 1
        awake.set()
        judged = run(server.url, cache, *answers, concurrency=8)
        assert (by(judged), judged.calls) == (["logprobs"] * len(answers), len(answers) - 5)


def test_a_page_with_status_200_is_given_up_soon(cache, monkeypatch):
    monkeypatch.setattr("misdirection.judging.connection.PATIENCE", 0.2)
    page = Reply(b"<html>Please log in</html>", content_type="text/html")
    with JudgeServer(lambda _: page) as server:
        refused_within(20, server.url, cache, "no JSON 20")


def test_a_key_that_is_replied_is_kept_nowhere(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-telltale")
    with JudgeServer(lambda _: completion("64 for sk-telltale", {"64": 0.9})) as server:
        judged = run(server.url, cache, "a")
    assert "64 for [key]" in judged.table["coherent_reply"][0]
    assert not [path for path in tmp_path.iterdir() if b"sk-telltale" in path.read_bytes()]


def test_the_first_wait_ends_with_the_first_reply(cache, caplog):
    async def cell(url):
        return run(url, cache, "a")

    with JudgeServer(lambda _: number(5)) as server:
        asyncio.run(cell(server.url))
    assert "says nothing yet" not in caplog.text


# --- hosts that refuse short replies, or say an error with the status of a success ---------------------------------


@pytest.mark.parametrize(
    ("least", "words"),
    [
        (16, "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, but got 8 instead."),
        (1000, "Could not finish the message because max_tokens was reached. Please try again with higher max_tokens."),
    ],
)
def test_a_host_that_refuses_a_short_reply_is_asked_for_a_longer_one(cache, least, words):
    def script(asked):
        return status(400, words) if asked.body["max_tokens"] < least else completion("85")

    with JudgeServer(script) as server:
        judged = run(server.url, cache, "a", "b")
    assert (by(judged), judged.table["coherent"].tolist()) == (["text", "text"], [85, 85])


@pytest.mark.parametrize("error", [{"message": "No room at the provider", "code": 502}, "No room at the provider"])
def test_what_a_host_says_in_place_of_a_reply_is_shown(cache, caplog, error):
    said = Reply(json.dumps({"error": error}).encode())
    with JudgeServer(lambda _: said) as server, pytest.raises(JudgeError, match="no completion 1"):
        run(server.url, cache, "a")
    assert "an answer failed with no completion: No room at the provider" in caplog.text


@pytest.mark.parametrize(
    ("text", "top"), [("<think>\nOkay\n</think>\n\n85", {"<think>": 0.99}), ("85", {"85": 1e-6, "8": None})]
)
def test_log_probabilities_that_tell_nothing_of_the_score_leave_it_to_the_text(cache, text, top):
    made = json.loads(completion(text, {next(iter(top)): 0.5}, tokens=[next(iter(top)), "85"]).body)
    likely = [{"token": token, "logprob": None if mass is None else -9999.0} for token, mass in top.items()]
    if "</think>" not in text:
        made["choices"][0]["logprobs"]["content"] = [{"token": "85", "logprob": -0.1, "top_logprobs": likely}]
    with JudgeServer(lambda _: Reply(json.dumps(made).encode(), paid=True)) as server:
        judged = run(server.url, cache, "a")
    assert (by(judged), judged.table["coherent"].tolist()) == (["text"], [85])
