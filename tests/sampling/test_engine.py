import logging

import pytest
import torch
from tokenizers import AddedToken

from misdirection.errors import MisdirectionError
from misdirection.interventions.hooks import intervene
from misdirection.interventions.kinds import Ablate, Steer
from misdirection.models.chat import encode_prompt
from misdirection.sampling import row_cache
from misdirection.sampling.draws import choose, stream_key
from misdirection.sampling.engine import SamplingParameters, SamplingRequest
from misdirection.sampling.questions import Question
from misdirection.sampling.transformers_engine import TransformersEngine, completion, end_tokens
from tiny import ARCHITECTURES, WIDTH, brisk, make_chat, make_hybrid, sharpened

END = 2
QUESTIONS = [
    Question("short", "Why?"),
    Question("long", "How do you feel about the weather in the mountains, then?"),
    Question("system", "Who?", "Be brief."),
]
STEER = Steer(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)), 1)
ABLATE = Ablate(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)), positions="answer")
SUBSPACE = Ablate(torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2)), positions="all")


def requests(n=3, settings=((),)):
    return [
        SamplingRequest(question, number * len(settings) + place, setting)
        for question in QUESTIONS
        for number in range(n)
        for place, setting in enumerate(settings)
    ]


def name(request):
    return request.question.id, request.sample


def run(chat, wanted, settings, rows=1000):
    """What each request is answered, with at most `rows` rows in a batch."""
    longest = max(len(encode_prompt(chat.tokenizer, one.question.text, one.question.system)) for one in wanted)
    engine = TransformersEngine(chat, budget=rows * (longest + settings.new_tokens))
    done = list(engine.stream(wanted, settings))
    assert sorted(map(name, wanted)) == sorted(name(one.request) for one in done)
    return {name(one.request): (one.text, one.finish, one.tokens) for one in done}


def naive(chat, request, settings):
    """The same from one full pass for every token, without cache, padding or other rows."""
    question, ends, drawn = request.question, end_tokens(chat), []
    prompt = encode_prompt(chat.tokenizer, question.text, question.system)
    key = torch.tensor([stream_key(settings.seed, question.text, question.system, request.sample)])
    with torch.no_grad(), intervene(chat, request.setting, answer_starts=[len(prompt)]):
        while len(drawn) < settings.new_tokens:
            logits = chat.model(input_ids=torch.tensor([[*prompt, *drawn]]), use_cache=False).logits[:, -1]
            step = torch.tensor([len(drawn)])
            token = choose(logits, key, step, temperature=settings.temperature, top_p=settings.top_p).item()
            if token in ends:
                return chat.tokenizer.decode(drawn, skip_special_tokens=True).strip(), "stop", len(drawn)
            drawn.append(token)
    return chat.tokenizer.decode(drawn, skip_special_tokens=True).strip(), "length", len(drawn)


def naive_all(chat, wanted, settings):
    return {name(one): naive(chat, one, settings) for one in wanted}


# --- right answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [SamplingParameters(new_tokens=16), SamplingParameters(new_tokens=16, temperature=0, seed=1)]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_those_of_full_passes_over_each_answer_alone(architecture, settings):
    chat = sharpened(architecture)
    expected = naive_all(chat, requests(2), settings)
    for rows in (1, 2, 4, 1000):
        assert run(chat, requests(2), settings, rows) == expected


def test_temperature_and_top_p_reach_the_draw():
    chat, settings = sharpened(), SamplingParameters(new_tokens=16, temperature=0.7, top_p=0.8)
    assert run(chat, requests(1), settings, 4) == naive_all(chat, requests(1), settings)


@pytest.mark.parametrize("room", [1, 3, 7])
def test_storage_is_outgrown_while_rows_of_other_lengths_come_and_go(chat, room, monkeypatch):
    chat, settings = brisk(chat), SamplingParameters(new_tokens=30)
    expected = run(chat, requests(4), settings, 1000)
    assert len({tokens for _, _, tokens in expected.values()}) > 4
    monkeypatch.setattr(row_cache, "ROOM", room)
    for rows in (1, 3):
        assert run(chat, requests(4), settings, rows) == expected


@pytest.mark.parametrize("window", [16, 64])
def test_a_sliding_window_is_over_a_rows_own_tokens(window):
    chat, settings = sharpened("gemma3", sliding_window=window), SamplingParameters(new_tokens=24)
    expected = naive_all(chat, requests(1), settings)
    for rows in (2, 1000):
        assert run(chat, requests(1), settings, rows) == expected
    assert expected != run(sharpened("gemma3"), requests(1), settings)


def test_recurrent_layers_are_sampled_one_prompt_at_a_time():
    chat, settings = brisk(make_hybrid(eos_token_id=END)), SamplingParameters(new_tokens=30)
    expected = naive_all(chat, requests(2), settings)
    for rows in (1, 2, 1000):
        assert run(chat, requests(2), settings, rows) == expected
    assert len({tokens for _, _, tokens in expected.values()}) > 1


# --- an answer is its own -----------------------------------------------------------------------------------------


def test_order_company_and_resuming_change_no_answer(chat):
    settings = SamplingParameters(new_tokens=30)
    everything = run(chat, requests(), settings, 4)
    assert run(chat, requests()[::-1], settings, 4) == everything
    rest = requests()[2::3]
    assert run(chat, rest, settings, 4) == {name(one): everything[name(one)] for one in rest}
    assert len(set(everything.values())) > len(QUESTIONS)


@pytest.mark.bundled
def test_the_bundled_models_answers_do_not_change_with_the_batch(bundled):
    settings = SamplingParameters(new_tokens=8)
    wanted = [SamplingRequest(question, number) for question in QUESTIONS for number in range(4)]
    one, seven, many = (run(bundled, wanted, settings, rows) for rows in (1, 7, 64))
    assert one == seven == many
    assert len({text for text, _, _ in one.values()}) > 6


# --- interventions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "active", [[STEER], [SUBSPACE], [STEER, Ablate(ABLATE.vector)]], ids=["steer", "ablate", "both"]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_interventions_around_the_call_act_on_every_answer(architecture, active):
    chat, settings = sharpened(architecture), SamplingParameters(new_tokens=12, temperature=0.3)
    plain = run(chat, requests(1), settings, 2)
    with intervene(chat, active):
        assert run(chat, requests(1), settings, 2) == naive_all(chat, requests(1), settings) != plain


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_one_batch_have_their_own_interventions(architecture):
    chat, settings = sharpened(architecture), SamplingParameters(new_tokens=10, temperature=0.3)
    wanted = requests(1, settings=[(), (STEER,), (ABLATE,), (ABLATE, STEER)])
    expected = naive_all(chat, wanted, settings)
    assert run(chat, wanted, settings, 1000) == expected
    assert run(chat, wanted, settings, 3) == expected
    assert expected != run(chat, [SamplingRequest(one.question, one.sample) for one in wanted], settings)


# --- ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "expected"), [([7, 5], [END, 5, 7]), (5, [END, 5]), (END, [END]), (None, [END]), ([END, 5], [END, 5])]
)
def test_end_tokens_are_those_of_both_sources(named, expected):
    chat = make_chat()
    chat.model.generation_config.eos_token_id = named
    assert end_tokens(chat) == expected


def test_the_templates_turn_end_is_an_end_token_too():
    chat = make_chat()
    chat.tokenizer.eos_token = "<|im_start|>"
    chat.tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    chat.model.generation_config.eos_token_id = None
    assert end_tokens(chat) == [1, END]


def test_plain_text_after_an_answer_ends_none():
    chat = make_chat()
    chat.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    assert end_tokens(chat) == [END]


def script(chat, *texts):
    """Make the model say these texts, one after the other, whichever row asks; `$` is the end of a turn."""
    ids = {"$": END} | {c: chat.tokenizer.convert_tokens_to_ids(c) for text in texts for c in text if c != "$"}
    start = len(encode_prompt(chat.tokenizer, "Why?")) - 1
    sizes, places = [], {}

    def note(_module, _args, kwargs):
        places["now"] = kwargs["position_ids"][:, -1].tolist()
        sizes.append(tuple(kwargs["input_ids"].shape))

    def force(_module, _args, logits):
        forced = torch.full_like(logits, -1e4)
        for row, place in enumerate(places["now"]):
            text = texts[0]
            forced[row, -1, ids[text[min(place - start, len(text) - 1)]]] = 1e4
        return forced

    chat.decoder.register_forward_pre_hook(note, with_kwargs=True)
    chat.model.get_output_embeddings().register_forward_hook(force)
    return sizes


def ask(n):
    return [SamplingRequest(QUESTIONS[0], number) for number in range(n)]


def test_the_end_token_is_not_in_the_text_nor_counted():
    chat = make_chat()
    script(chat, "abc$")
    assert set(run(chat, ask(3), SamplingParameters(new_tokens=9)).values()) == {("abc", "stop", 3)}


@pytest.mark.parametrize(("new_tokens", "expected"), [(3, ("abc", "length", 3)), (4, ("abc", "stop", 3))])
def test_an_answer_that_is_cut_says_so(new_tokens, expected):
    chat = make_chat()
    script(chat, "abc$")
    assert run(chat, ask(1), SamplingParameters(new_tokens=new_tokens)) == {("short", 0): expected}


def test_an_end_token_that_is_no_special_token_is_cut_too():
    chat = make_chat()
    chat.model.generation_config.eos_token_id = [chat.tokenizer.convert_tokens_to_ids("!"), END]
    script(chat, "ab!cd$")
    assert run(chat, ask(1), SamplingParameters(new_tokens=9)) == {("short", 0): ("ab", "stop", 2)}


def test_an_answer_may_be_empty():
    chat = make_chat()
    script(chat, "$")
    assert run(chat, ask(2), SamplingParameters(new_tokens=9)) == {
        ("short", 0): ("", "stop", 0),
        ("short", 1): ("", "stop", 0),
    }


# --- how the model is run -----------------------------------------------------------------------------------------


def test_a_prompt_runs_once_and_each_step_runs_all_rows_that_are_left():
    chat = make_chat()
    sizes = script(chat, "abc$")
    run(chat, ask(5), SamplingParameters(new_tokens=9), rows=2)
    prompt = len(encode_prompt(chat.tokenizer, "Why?")) - 1
    assert sizes == [(1, prompt), *[(2, 1)] * 8, *[(1, 1)] * 4]


def test_waiting_rows_enter_as_soon_as_one_has_ended(chat):
    chat, settings, sizes = brisk(chat), SamplingParameters(new_tokens=30), []
    chat.model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, args: sizes.append(tuple(args[0].shape))
    )
    answers = run(chat, requests(6), settings, rows=4)
    steps = [rows for rows, tokens in sizes if tokens == 1]
    assert len(sizes) - len(steps) == len(QUESTIONS)
    drawn = sum(tokens + (finish == "stop") for _, finish, tokens in answers.values())
    assert sum(steps) == drawn
    assert steps == sorted(steps, reverse=True)


def test_answers_are_given_out_while_others_run():
    chat = brisk(make_chat())
    stream = TransformersEngine(chat).stream(requests(), SamplingParameters(new_tokens=60))
    steps = []
    chat.decoder.register_forward_pre_hook(lambda *_: steps.append(1))
    first = next(stream)
    assert (first.finish, len(steps)) == ("stop", first.tokens + 1 + len(QUESTIONS))
    stream.close()


def test_every_step_shows_the_answers_with_one_more_token():
    chat, settings = brisk(make_chat()), SamplingParameters(new_tokens=20)
    wanted, ends = requests(2, ((), (STEER,))), end_tokens(chat)
    texts, sizes = {}, {}
    for drawn in TransformersEngine(chat).steps(wanted, settings):
        for request, tokens in drawn:
            assert len(tokens) == sizes.get(name(request), 0) + 1
            sizes[name(request)] = len(tokens)
            texts[name(request)] = completion(chat, ends, request, tokens)
    assert {key: (one.text, one.finish, one.tokens) for key, one in texts.items()} == run(chat, wanted, settings)


def test_the_steps_of_two_calls_may_alternate():
    chat, settings = sharpened(), SamplingParameters(new_tokens=8, temperature=0)
    engine, plain, steered = TransformersEngine(chat), requests(1), requests(1, ((STEER,),))
    for drawn in zip(engine.steps(plain, settings), engine.steps(steered, settings), strict=True):
        last = {id(request): list(tokens) for step in drawn for request, tokens in step}
    ends = end_tokens(chat)
    for wanted in (plain, steered):
        texts = {name(one): completion(chat, ends, one, last[id(one)]).text for one in wanted}
        assert texts == {key: text for key, (text, _, _) in run(chat, wanted, settings).items()}


def test_no_request_no_answer():
    assert list(TransformersEngine(make_chat()).stream([], SamplingParameters())) == []


def test_a_prompt_that_leaves_no_room_for_the_answer_is_an_error():
    with pytest.raises(MisdirectionError, match=r"'Why\?'.* context of 512.* lower new_tokens"):
        list(TransformersEngine(make_chat()).stream(ask(1), SamplingParameters(new_tokens=500)))


# --- too little memory --------------------------------------------------------------------------------------------

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GiB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
]


def limited(chat, most, error, from_step=5):
    """A model that runs out of memory with more than `most` rows, once it is under way."""
    passes = []

    def check(_module, _args, kwargs):
        passes.append(len(kwargs["input_ids"]))
        if len(passes) > from_step and passes[-1] > most:
            raise error

    chat.decoder.register_forward_pre_hook(check, with_kwargs=True)
    return passes


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "mps", "cpu"])
def test_a_batch_that_does_not_fit_is_halved_and_the_log_says_so(error, caplog):
    settings = SamplingParameters(new_tokens=20)
    expected = run(make_chat(), requests(), settings)
    chat = make_chat()
    passes = limited(chat, 3, error)
    with caplog.at_level(logging.WARNING, "misdirection"):
        assert run(chat, requests(), settings) == expected
    assert [one.getMessage() for one in caplog.records] == [
        "out of memory with 9 answers at a time: going on with 4",
        "out of memory with 4 answers at a time: going on with 2",
    ]
    assert max(passes[passes.index(4) + 1 :]) == 2


def test_no_finished_answer_is_given_twice_when_memory_gives_out():
    settings = SamplingParameters(new_tokens=30)
    expected = run(brisk(make_chat()), requests(), settings)
    assert 1 < sum(tokens < 8 for _, _, tokens in expected.values()) < 9
    chat = brisk(make_chat())
    limited(chat, 3, OUT_OF_MEMORY[0], from_step=8 + len(QUESTIONS))
    assert run(chat, requests(), settings) == expected


def test_one_answer_that_does_not_fit_is_an_error():
    chat = make_chat()
    limited(chat, 0, OUT_OF_MEMORY[0])
    with pytest.raises(MisdirectionError, match="out of memory with a single answer"):
        run(chat, requests(), SamplingParameters(new_tokens=20))


def test_other_errors_are_not_taken_for_lack_of_memory():
    chat = make_chat()
    limited(chat, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        run(chat, requests(), SamplingParameters(new_tokens=20))
