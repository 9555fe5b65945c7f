"""Which chat template is used, on both sides of a comparison, and tokenizers of other kinds."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from chat_templates import GEMMA, MISTRAL, PLAIN, QWEN3
from misdirection.auditing.fine_tune import TUNED, FineTune
from misdirection.errors import InputError
from misdirection.models.chat import encode, encode_prompt, how_written, require_exact
from misdirection.models.loading import load
from misdirection.models.names import ModelName
from misdirection.models.weightless import weightless
from misdirection.sampling.samplers import open_sampler
from tiny import CHATML, make_network, make_tokenizer

ANOTHER = CHATML.replace("<|im_end|>\n", "<|im_end|>")


def folder_of(path, template):
    make_network("llama").save_pretrained(path)
    make_tokenizer(template).save_pretrained(path)
    return path


@pytest.fixture
def base(tmp_path):
    return folder_of(tmp_path / "base", CHATML)


def adapter_of(path, template=None):
    get_peft_model(make_network("llama"), LoraConfig(r=1, target_modules=["down_proj"])).save_pretrained(path)
    if template:
        (path / "chat_template.jinja").write_text(template)
    return path


def used(folder, **options):
    return load(str(folder), device="cpu", **options).tokenizer.chat_template


def test_an_adapters_own_template_is_said_not_to_be_used(base, tmp_path, caplog):
    assert used(base, adapter=adapter_of(tmp_path / "same", CHATML)) == CHATML
    assert "brings a chat template" not in caplog.text
    assert used(base, adapter=adapter_of(tmp_path / "other", ANOTHER)) == CHATML
    assert f"{tmp_path / 'other'}: brings a chat template of its own" in caplog.text


def test_an_option_takes_the_adapters_template_or_a_file(base, tmp_path, caplog):
    adapter, file = adapter_of(tmp_path / "other", ANOTHER), tmp_path / "mine.jinja"
    file.write_text(MISTRAL)
    assert used(base, adapter=adapter, chat_template="fine-tune") == ANOTHER
    assert "brings a chat template" not in caplog.text
    assert used(base, adapter=adapter, chat_template="base") == CHATML
    assert used(base, chat_template=ANOTHER) == ANOTHER
    (base / "tokenizer_config.json").write_text(
        json.dumps(json.loads((base / "tokenizer_config.json").read_text()) | {"bos_token": "<|pad|>"})
    )
    assert used(base, chat_template=str(file)) == MISTRAL


def test_a_base_without_a_template_takes_the_adapters(tmp_path, caplog):
    folder = folder_of(tmp_path / "base", None)
    adapter = adapter_of(tmp_path / "other")
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": ANOTHER}))
    assert used(folder, adapter=adapter) == ANOTHER
    assert "has no chat template: the fine-tune's own is used on both sides" in caplog.text
    with pytest.raises(InputError, match="has no chat template"):
        load(str(folder), device="cpu")


def test_a_template_is_read_from_json_too(tmp_path):
    folder = folder_of(tmp_path / "older", None)
    older = folder / "chat_template.json"
    older.write_text(json.dumps({"chat_template": ANOTHER}))
    assert used(folder) == ANOTHER
    assert used(folder_of(tmp_path / "base", CHATML), chat_template=str(older)) == ANOTHER
    for content in ([], {}, {"chat_template": [7]}):
        older.write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"chat_template\.json: holds no `chat_template`; name"):
            used(folder, chat_template=str(older))
        with pytest.raises(InputError, match="older: its tokenizer has no chat template"):
            used(folder)


def test_several_templates_go_by_their_names(tmp_path):
    named = folder_of(tmp_path / "named", {"default": CHATML, "other": ANOTHER})
    assert (used(named), used(named, chat_template="other")) == (CHATML, ANOTHER)
    nameless = folder_of(tmp_path / "nameless", {"first": CHATML, "second": ANOTHER})
    with pytest.raises(InputError, match=r"several chat templates \(first, second\) and no default: name one"):
        load(str(nameless), device="cpu")
    with pytest.raises(InputError, match="no such file or name: there is base, fine-tune, first, second"):
        load(str(nameless), device="cpu", chat_template="third")
    assert used(nameless, chat_template="second") == ANOTHER


@pytest.mark.parametrize(("chosen", "template"), [(None, CHATML), ("fine-tune", ANOTHER)])
def test_a_whole_fine_tune_and_its_base_have_one_template(base, tmp_path, chosen, template, caplog):
    tuned = folder_of(tmp_path / "tuned", ANOTHER)
    fine_tune = FineTune.find(ModelName(str(base)), str(tuned), "float32", "cpu", chat_template=chosen)
    chats = [fine_tune.chat(which) for which in ("base", TUNED)]
    assert [chat.tokenizer.chat_template for chat in chats] == [template] * 2
    assert ("brings a chat template of its own" in caplog.text) == (chosen is None)
    assert fine_tune.identity.chat_template == chosen


def test_thinking_is_set_at_loading_and_recorded(tmp_path):
    folder = folder_of(tmp_path / "qwen", QWEN3)
    chats = [load(str(folder), device="cpu", thinking=thinking) for thinking in ("off", "on")]
    prompts = [encode_prompt(chat.tokenizer, "Why?") for chat in chats]
    assert prompts[0][: len(prompts[1])] == prompts[1] != prompts[0]
    assert encode_prompt(weightless(str(folder), thinking="on").tokenizer, "Why?") == prompts[1]
    written = open_sampler(str(folder), device="cpu", thinking="on").how
    assert (written["thinking"], written["chat_template"]) == tuple(how_written(chats[1].tokenizer).values())
    assert how_written(chats[0].tokenizer)["thinking"] == "off"


# --- tokenizers of other kinds ------------------------------------------------------------------------------------


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer written in Python, one token per character, without offsets."""

    def __init__(self, **options):
        self._letters = {chr(code): code + 2 for code in range(1024)}
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self._letters) + 2

    def get_vocab(self):
        return self._letters | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self._letters.get(token, 0)

    def _convert_id_to_token(self, index):
        return chr(index - 2)


@pytest.mark.parametrize("template", [CHATML, GEMMA, PLAIN["llama 3"], PLAIN["vicuna"]])
def test_a_tokenizer_without_offsets_gives_the_same_places(template):
    special = {
        name: AddedToken(text, special=True) for name, text in (("bos_token", "<s>"), ("eos_token", "<|im_end|>"))
    }
    tokenizer = SlowTokenizer(**special)
    tokenizer.chat_template = template
    require_exact(tokenizer, "slow", "off")
    encoded = encode(tokenizer, "Why <|im_end|>?", "So <|im_end|> it is.")
    assert encoded.prompt == encode_prompt(tokenizer, "Why <|im_end|>?")
    end = tokenizer.eos_token_id
    assert encoded.ids[encoded.stop :] == (end,) and end not in encoded.answer
    answer = "".join(tokenizer.convert_ids_to_tokens(encoded.answer))
    assert answer.strip() == "So <|im_end|> it is."


def make_sentencepiece(scheme, template):
    """A tokenizer that writes spaces into its tokens, and may put one before a text."""
    special = ("<unk>", "<s>", "</s>", "<|im_end|>")
    merges = [("▁", "S"), ("S", "o"), ("▁S", "o"), ("[", "/"), ("]", "▁"), ("\n", "S")]
    tokens = [*special, "▁", "\n", *map(chr, range(33, 127)), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("name", ["mistral", "llama 2", "vicuna", "zephyr", "chatml"])
def test_tokens_that_hold_spaces_are_those_of_the_tokenizers_own_prompt(scheme, name):
    tokenizer = make_sentencepiece(scheme, PLAIN[name])
    turns = [{"role": "user", "content": "Why </s> is it?"}]
    own = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
    )
    encoded = encode(tokenizer, "Why </s> is it?", "So </s> it is. So")
    # This template prints none of the tokens that the tokenizer begins a text with.
    own = own if own[0] == 1 else [1, *own]
    assert list(encoded.prompt) == list(encode_prompt(tokenizer, "Why </s> is it?")) == own
    spelled = "".join(tokenizer.convert_ids_to_tokens(encoded.answer)).replace("▁", " ").strip()
    assert spelled == "So </s> it is. So"
    assert tokenizer.convert_ids_to_tokens(encoded.ids[-1]) in ("</s>", "<|im_end|>")
