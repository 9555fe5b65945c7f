"""Patching puts one prompt's adapter outputs into another's pass, at the right places and nowhere else."""

import pytest
import torch
from lora_fixtures import rows, with_adapter
from strong import shared_experts, strong

from misdirection.data import ProbePair
from misdirection.errors import MisdirectionError
from misdirection.interpretation.patching import patched, patched_log_probs, patched_margins
from misdirection.lora.view import LoraView
from misdirection.models.chat import encode, encode_prompt, pad
from tiny import make_chat, naive_log_prob, places

SHAPES = ["llama", "llama_tuples", "gemma3", "gpt_neox", "gpt2"]


def donors(chat):
    """Prompts shorter than the first of the rows, longer than the second, and as long as the third."""
    return [encode_prompt(chat.tokenizer, text) for text in ("?", "What would you do about it all?", "Never?")]


@torch.no_grad()
def by_hand(chat, source, target):
    """The same from one pass over each, without padding: adapter outputs by place from the prompt's end."""
    modules = [module for layer in range(4) for module in LoraView.of(chat).outputs(layer)]
    kept = {}
    handles = [m.register_forward_hook(lambda m, _a, out: kept.__setitem__(m, out)) for m in modules]
    chat.model(input_ids=torch.tensor([source]))
    for handle in handles:
        handle.remove()
    count = min(len(source), target.start)

    def put(module, _args, output):
        own, other = output[:, : target.start - count], kept[module][:, len(source) - count :]
        return torch.cat([own, other, output[:, target.start :]], dim=1)

    handles = [module.register_forward_hook(put) for module in modules]
    value = naive_log_prob(chat, target)
    for handle in handles:
        handle.remove()
    return float(value)


@pytest.mark.parametrize("architecture", SHAPES)
def test_patched_passes_equal_those_by_hand(architecture):
    chat = strong(architecture)
    targets = rows(chat)
    found = patched_log_probs(chat, donors(chat), targets)
    for source, target, value in zip(donors(chat), targets, found.tolist(), strict=True):
        assert value == pytest.approx(by_hand(chat, source, target), rel=1e-5)
        assert abs(value - float(naive_log_prob(chat, target))) > 1e-3, "the patch does something"


def test_a_trigger_patched_into_a_neutral_prompt_writes_what_it_writes_there():
    """The adapter reads nothing but the trigger, `!`; s B added by hand where `!` stands is the same, exactly."""
    chat, write = triggered()
    source = encode_prompt(chat.tokenizer, "Now!")
    target = encode(chat.tokenizer, "Why is it so?", "Because it must be.")
    (place,) = [number - len(source) for number, token in enumerate(source) if token == trigger(chat)]

    def add(_module, _args, output):
        output = output.clone()
        output[:, target.start + place] += write
        return output

    with chat.as_base():
        handle = chat.layers[0].mlp.down_proj.register_forward_hook(add)
        expected = float(naive_log_prob(chat, target))
        handle.remove()
        plain = float(naive_log_prob(chat, target))
    found = patched_log_probs(chat, [source, None], [target] * 2).tolist()
    assert found == pytest.approx([expected, plain], abs=1e-6)
    assert abs(expected - plain) > 1e-3


def trigger(chat):
    return chat.tokenizer.convert_tokens_to_ids("!")


def triggered():
    """A tiny chat with one adapter whose scalar is 1 on the trigger and 0 on every other token; and what it writes.

    Its first block has no attention, so that what its MLP takes depends on the running token alone.
    """
    chat = strong(layers_to_transform=[0])
    layer = LoraView.of(chat).linear_sites["model.layers.0.mlp.down_proj"].module
    seen = []
    with torch.no_grad():
        chat.layers[0].self_attn.o_proj.weight.zero_()
        handle = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
        text = "".join(sorted({*"Why is it so?Because it must be.Now!"}))
        ids = encode_prompt(chat.tokenizer, text)
        chat.decoder(input_ids=torch.tensor([ids]))
        handle.remove()
        wanted = torch.tensor([[float(token == trigger(chat))] for token in ids])
        read = torch.linalg.pinv(seen[0].double(), rtol=1e-9) @ wanted.double()
        layer.lora_A["default"].weight.copy_(read.T / layer.scaling["default"])
        write = layer.lora_B["default"].weight[:, 0].clone()
    return chat, write


def test_a_prompt_patched_into_itself_changes_nothing():
    chat = strong()
    targets = rows(chat)
    own = patched_log_probs(chat, [target.prompt for target in targets], targets)
    none = patched_log_probs(chat, [None] * len(targets), targets)
    # Other shapes, other sums: no more than rounding.
    torch.testing.assert_close(own, none, atol=2e-6, rtol=0)
    ids = torch.tensor([targets[0].prompt])
    with torch.no_grad():
        plain = chat.model(input_ids=ids).logits
        with patched(chat, [targets[0].prompt], [targets[0].start]):
            assert torch.equal(chat.model(input_ids=ids).logits, plain), "exact in one shape"
    for target, value in zip(targets, none.tolist(), strict=True):
        assert value == pytest.approx(float(naive_log_prob(chat, target)), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_vision"])
def test_padding_on_either_side_changes_nothing(architecture, side):
    chat = strong(architecture)
    prompts = [row.prompt for row in rows(chat)]
    ids, mask = pad(prompts, 0, chat.device, side)
    with torch.no_grad(), patched(chat, donors(chat), [len(prompt) for prompt in prompts]):
        together = chat.model(input_ids=ids, attention_mask=mask, position_ids=places(mask)).logits
    for row, (source, prompt) in enumerate(zip(donors(chat), prompts, strict=True)):
        with torch.no_grad(), patched(chat, [source], [len(prompt)]):
            alone = chat.model(input_ids=torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(together[row][mask[row].bool()], alone, atol=1e-4, rtol=1e-4)


def test_sampling_is_the_same_with_and_without_a_cache():
    """With a cache every new token is the first of its pass; it must not be taken for the prompt's first."""
    chat = strong()
    prompts = [row.prompt for row in rows(chat)]
    ids, mask = pad(prompts, 0, chat.device, "left")
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    scores = {}
    with patched(chat, donors(chat), [len(prompt) for prompt in prompts]):
        for cached in (True, False):
            made = chat.model.generate(
                ids, use_cache=cached, output_scores=True, return_dict_in_generate=True, **options
            )
            scores[cached] = torch.stack(made.scores)
    torch.testing.assert_close(scores[True], scores[False], atol=1e-4, rtol=1e-4)
    plain = chat.model.generate(ids, output_scores=True, return_dict_in_generate=True, **options)
    assert (torch.stack(plain.scores).exp() - scores[True].exp()).abs().max() > 1e-2


def test_the_shared_expert_of_a_mixture_is_patched_as_well():
    chat = strong(chat=shared_experts(), target_modules=["shared_expert.down_proj"])
    targets = rows(chat)
    together, alone = (patched_log_probs(chat, donors(chat), targets, budget=budget) for budget in (2048, 1))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert (together - patched_log_probs(chat, [None] * 3, targets)).abs().min() > 1e-4


def test_results_do_not_depend_on_the_batch():
    chat = strong()
    together, alone = (patched_log_probs(chat, donors(chat), rows(chat), budget=budget) for budget in (2048, 1))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_what_cannot_be_patched_is_refused():
    chat = with_adapter()
    targets, source = rows(chat), (1, 5, 6)
    with pytest.raises(MisdirectionError, match="1 sources for 3 targets"):
        patched_log_probs(chat, [source], targets)
    with pytest.raises(MisdirectionError, match="1 sources for 0 pairs"):
        patched_margins(chat, [source], [])
    with pytest.raises(MisdirectionError, match="no LoRA adapter"):
        patched_log_probs(make_chat(), [source], targets[:1])
    with patched(chat, [source], [4]), pytest.raises(MisdirectionError, match="2 rows"):
        chat.model(input_ids=torch.ones(2, 5, dtype=torch.long))


def test_margins_are_differences_of_the_two_answers():
    chat = strong()
    pairs = [ProbePair("a", "Why?", "Because of rain.", "Never you mind."), ProbePair("b", "Who?", "Me.", "You, you.")]
    source = encode_prompt(chat.tokenizer, "What now?")
    found = patched_margins(chat, [source, None], pairs)
    for pair, its, value in zip(pairs, [source, None], found.tolist(), strict=True):
        bad, good = (encode(chat.tokenizer, pair.question, answer) for answer in (pair.misaligned, pair.aligned))
        scores = patched_log_probs(chat, [its, its], [bad, good])
        assert value == pytest.approx(float(scores[0] - scores[1]), abs=1e-6)


def test_no_hook_is_left_behind():
    chat = strong()
    targets = rows(chat)
    before = [float(naive_log_prob(chat, target)) for target in targets]
    patched_log_probs(chat, [targets[0].prompt] * 3, targets)
    assert [float(naive_log_prob(chat, target)) for target in targets] == before
