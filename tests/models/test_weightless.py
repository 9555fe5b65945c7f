import json

import pytest

from misdirection import data
from misdirection.errors import MisdirectionError
from misdirection.models.chat import encode
from misdirection.models.weightless import EstimatingTokenizer, read_structure
from tiny import make_network, make_tokenizer


def test_a_configuration_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(make_network("llama").config.to_dict()))
    found = read_structure("any/name", folder=tmp_path)
    assert not found.counted
    assert all(one.is_meta for one in found.chat.model.parameters())
    assert len(found.chat.layers) == 4


def test_a_tokenizer_beside_it_counts(tmp_path):
    make_network("llama").config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    found = read_structure(str(tmp_path))
    assert found.counted
    assert len(encode(found.chat.tokenizer, "Why?", "So.").answer) == 3


def test_estimates_are_near_a_real_count(bundled):
    pairs = data.probe_pairs()

    def total(tokenizer):
        return sum(encode(tokenizer, pair.question, pair.aligned).stop for pair in pairs)

    assert total(EstimatingTokenizer()) == pytest.approx(total(bundled.tokenizer), rel=0.15)


def test_estimates_begin_alike_where_texts_do():
    first, second = (encode(EstimatingTokenizer(), question, "Yes.").ids for question in ("Is it?", "Was it?"))
    same = next(place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    assert 5 < same < len(first)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"model_type": "unheard_of"}',
        '{"model_type": "vit"}',
        '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}',
    ],
)
def test_a_bad_configuration_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(MisdirectionError, match=r"configuration could not be loaded|is not a causal language model"):
        read_structure("x", folder=tmp_path)


def test_a_model_without_layers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 0}')
    with pytest.raises(MisdirectionError, match="no layers"):
        read_structure("x", folder=tmp_path)


def test_a_folder_without_one_says_so(tmp_path):
    with pytest.raises(MisdirectionError, match=r"no config\.json"):
        read_structure("x", folder=tmp_path)
