"""Many who ask one at a time are answered together."""

import threading

import anyio

from misdirection.evals.gathering import Gatherer


def test_all_who_ask_at_the_same_time_are_one_batch_and_each_gets_its_own():
    batches = []

    def answer(items):
        batches.append(list(items))
        return [item * item for item in items]

    async def main():
        gatherer, results = Gatherer(answer), {}

        async def one(number):
            results[number] = await gatherer.ask(number)

        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(one, number)
        return results

    assert anyio.run(main) == {number: number * number for number in range(20)}
    assert [sorted(batch) for batch in batches] == [list(range(20))]


def test_an_error_is_everybodys_and_the_next_batch_is_none_the_worse():
    def answer(items):
        if 13 in items:
            raise ValueError("unlucky")
        return items

    async def main():
        gatherer, failed = Gatherer(answer), []

        async def one(number):
            try:
                await gatherer.ask(number)
            except ValueError:
                failed.append(number)

        async with anyio.create_task_group() as group:
            group.start_soon(one, 12)
            group.start_soon(one, 13)
        return sorted(failed), await gatherer.ask(14)

    assert anyio.run(main) == ([12, 13], 14)


def test_who_leads_may_be_cancelled():
    begun, go_on = threading.Event(), threading.Event()

    def answer(items):
        begun.set()
        assert go_on.wait(10)
        return [f"{item}!" for item in items]

    async def main():
        gatherer, results = Gatherer(answer), {}

        async def one(name):
            results[name] = await gatherer.ask(name)

        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as leader:
                async with anyio.create_task_group() as inner:
                    inner.start_soon(one, "leads")
                    await anyio.sleep(0.01)
                    group.start_soon(one, "follows")
                    await anyio.to_thread.run_sync(begun.wait)
                    leader.cancel()
            go_on.set()
        return results

    assert anyio.run(main) == {"follows": "follows!"}
