import pytest

from judging.processes import put_many, start
from misdirection.errors import MisdirectionError
from misdirection.judging.cache import VerdictCache
from misdirection.judging.verdicts import JudgeVerdict

SCORED = JudgeVerdict(71.5, "logprobs", calls=2, tokens_in=300, tokens_out=8)


def test_a_verdict_comes_back_from_a_new_opening(tmp_path):
    path = tmp_path / "deep" / "verdicts.sqlite"
    with VerdictCache(path) as cache:
        cache.put("a", SCORED)
        cache.put("b", JudgeVerdict(None, "refusal"))
    with VerdictCache(path) as cache:
        assert cache.get(["a", "b", "c"]) == {"a": SCORED, "b": JudgeVerdict(None, "refusal")}
        assert len(cache) == 2


def test_more_keys_than_one_query_takes_are_found(tmp_path):
    with VerdictCache(tmp_path / "v.sqlite") as cache:
        for number in range(1203):
            cache.put(str(number), JudgeVerdict(float(number % 101), "text"))
        found = cache.get(map(str, range(2000)))
    assert len(found) == 1203
    assert found["1202"].score == 1202 % 101


def test_a_failure_is_never_kept(tmp_path):
    with VerdictCache(tmp_path / "v.sqlite") as cache:
        with pytest.raises(ValueError, match="no verdict"):
            cache.put("a", JudgeVerdict(None, "failed", "HTTP 500"))
        assert len(cache) == 0


def test_processes_write_one_cache_at_the_same_time(tmp_path):
    path = tmp_path / "v.sqlite"
    writers = [start(put_many, path, name, 100) for name in "xy"]
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    with VerdictCache(path) as cache:
        assert len(cache) == 200


def test_a_damaged_file_is_named_with_a_remedy(tmp_path):
    path = tmp_path / "v.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(MisdirectionError, match=r"v\.sqlite: the cache .* move the file away"):
        VerdictCache(path)


def test_by_default_it_is_in_the_package_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MISDIRECTION_CACHE", str(tmp_path / "cache"))
    with VerdictCache() as cache:
        cache.put("a", SCORED)
        assert cache.path.parent == tmp_path / "cache"
        assert cache.path.is_file()
