"""Which models a worker's engine has."""

from pathlib import Path

from misdirection.runs.worker import BASE, Models, Worker


class Served:
    """An engine that has the adapters of its start, as vLLM has."""

    def __init__(self, adapters):
        self.names, self.is_closed = {BASE, *adapters}, False

    def engine(self, name):
        assert name in self.names and not self.is_closed
        return f"engine of {name}"

    def close(self):
        self.is_closed = True


def test_an_engine_starts_again_for_an_adapter_that_came_later_and_for_no_other():
    started = []

    def serve(adapters):
        started.append(Served(adapters))
        return started[-1]

    worker = Worker(Models(lambda: None, {"first": Path("first")}), Path, serve)
    assert [worker.vllm_engine(name) for name in (BASE, "first")] == ["engine of base", "engine of first"]
    worker.adapters["second"] = Path("second")
    worker.vllm_engine("first")
    assert len(started) == 1
    assert worker.vllm_engine("second") == "engine of second"
    assert [served.is_closed for served in started] == [True, False]
