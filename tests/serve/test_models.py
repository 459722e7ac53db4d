"""Models on demand: loading, sharing, making room, and leaving, whatever comes in between."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
from many import NamesOnly, Scripted, make_models

from nybble.core.errors import CheckpointError
from nybble.serve.errors import ApiError
from nybble.serve.models import Models


def run(test: Callable[[], Awaitable[None]]) -> None:
    """In a loop of its own, in which nothing is left in the end."""

    async def whole() -> None:
        await asyncio.wait_for(test(), 20)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left

    asyncio.run(whole())


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.002)


def names(models: Models) -> set[str]:
    return {one.name for one in models.resident()}


def test_first_requests_at_once_share_one_load(tmp_path: Path) -> None:
    async def test() -> None:
        models, loader = make_models(tmp_path, "a")
        loader.gate.clear()

        async def one(name: str) -> str:
            async with models.lease(name) as resident:
                return resident.name

        tasks = [asyncio.create_task(one(name)) for name in ("a", "A", "a:latest", "a")]
        await until(lambda: bool(loader.loads))
        tasks[0].cancel()  # whoever asked first may leave, the others get their model
        loader.gate.set()
        assert await asyncio.gather(*tasks[1:]) == ["a:latest"] * 3
        assert loader.loads == ["a:latest"]
        [resident] = models.resident()
        assert resident.size == 10 and resident.load_seconds >= 0 and resident.stored is not None
        await models.shutdown(None)
        assert not loader.engines[0].is_healthy()

    run(test)


def test_a_second_request_looks_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.serve.lookup._FRESH_SECONDS", -1e9)

    async def test() -> None:
        models, loader = make_models(tmp_path, "a")
        library = cast(NamesOnly, models.library)
        for _ in range(5):
            async with models.lease("a"):
                pass
        assert library.num_looks == 1
        library.touch()
        async with models.lease("a"):
            pass
        assert library.num_looks == 2 and loader.loads == ["a:latest"]
        await models.shutdown(None)

    run(test)


def test_a_change_just_now_is_not_trusted_to_show(tmp_path: Path) -> None:
    async def test() -> None:
        models, _ = make_models(tmp_path, "a")
        for _ in range(2):
            async with models.lease("a"):
                pass
        assert cast(NamesOnly, models.library).num_looks == 2
        await models.shutdown(None)

    run(test)


def test_the_one_used_longest_ago_makes_room(tmp_path: Path) -> None:
    async def test() -> None:
        models, loader = make_models(tmp_path, "a", "b", "c", memory=25)
        for name in ("a", "b", "a", "c"):
            async with models.lease(name):
                assert f"{name}:latest" in names(models)
        assert names(models) == {"a:latest", "c:latest"}
        assert loader.loads == ["a:latest", "b:latest", "c:latest"]
        assert [engine.is_healthy() for engine in loader.engines] == [True, False, True]
        await models.shutdown(None)

    run(test)


def test_what_is_in_use_stays_and_the_next_one_is_told_to_wait(tmp_path: Path) -> None:
    async def test() -> None:
        models, loader = make_models(tmp_path, "a", "b", memory=15)
        async with models.lease("a"):
            with pytest.raises(ApiError, match=r"no room for b:latest.*in use: a:latest") as told:
                async with models.lease("b"):
                    pass
            assert told.value.status == 503 and int((told.value.headers or {})["Retry-After"]) >= 1
            assert loader.engines[0].is_healthy()
        async with models.lease("b"):
            assert names(models) == {"b:latest"}
        await models.shutdown(None)

    run(test)


def test_one_that_is_too_large_for_the_server_says_so(tmp_path: Path) -> None:
    async def test() -> None:
        models, _ = make_models(tmp_path, "a", "big", memory=15, loader=Scripted(sizes={"big": 16}))
        async with models.lease("a"):
            pass
        with pytest.raises(ApiError, match="--model-memory") as told:
            async with models.lease("big"):
                pass
        assert told.value.status == 503 and told.value.headers is None
        assert names(models) == {"a:latest"}, "nothing was put away for it"
        await models.shutdown(None)

    run(test)


def test_loading_waits_until_the_memory_is_really_free(tmp_path: Path) -> None:
    async def test() -> None:
        models, loader = make_models(tmp_path, "a", "b", memory=15)
        async with models.lease("a"):
            pass
        gate = loader.models["a"].gate
        gate.clear()  # its thread cannot end: a request is in the middle of a step
        engine = loader.engines[0]

        async def ask() -> None:
            async for _ in engine.generate([65, 66], cast(Any, params()), "one"):
                pass

        asking = asyncio.create_task(ask())
        await until(lambda: engine.stats().num_running + engine.stats().num_waiting == 1)

        async def second() -> None:
            async with models.lease("b"):
                pass

        waiting = asyncio.create_task(second())
        await asyncio.sleep(0.05)
        assert loader.loads == ["a:latest"]
        gate.set()
        await waiting
        assert loader.loads == ["a:latest", "b:latest"]
        await asyncio.gather(asking, return_exceptions=True)
        await models.shutdown(None)

    run(test)


def params() -> Any:
    from nybble.core.sampling import SamplingParams

    return SamplingParams(max_tokens=4)


def test_an_unknown_name_gets_the_nearest_ones(tmp_path: Path) -> None:
    async def test() -> None:
        models, _ = make_models(tmp_path, "alpha", "beta")
        for name, hint in [("alpa", "did you mean alpha:latest"), ("zzz", "nybble list"), ("../x", "model")]:
            with pytest.raises(ApiError, match=hint) as told:
                async with models.lease(name):
                    pass
            assert (told.value.status, told.value.code) == (404, "model_not_found")
        with pytest.raises(ApiError, match="nybble pull smollm2:135m"):
            async with models.lease("smollm2:135m"):
                pass
        await models.shutdown(None)

    run(test)


def test_a_failed_load_leaves_no_trace_and_is_tried_again(tmp_path: Path) -> None:
    async def test() -> None:
        models, loader = make_models(tmp_path, "a", memory=15, loader=Scripted(bad={"a"}))
        for _ in range(2):
            with pytest.raises(CheckpointError, match="damaged"):
                async with models.lease("a"):
                    pass
        assert not models.resident() and loader.loads == ["a:latest"] * 2
        loader.bad.clear()
        async with models.lease("a"):
            pass
        await models.shutdown(None)

    run(test)


def test_keep_alive(tmp_path: Path) -> None:
    async def test() -> None:
        models, loader = make_models(tmp_path, "a", "b", "c", "d", keep_alive=1000)
        async with models.lease("a", keep_alive=0):
            assert names(models) == {"a:latest"}
        await until(lambda: not models.resident() and not models._leaving)
        async with models.lease("b", keep_alive=0.05) as resident:
            await asyncio.sleep(0.1)
            assert names(models) == {"b:latest"}, "in use, it stays"
        assert resident.expires_at is not None and 0 < resident.expires_at - time.time() <= 0.05
        await until(lambda: not models.resident() and not models._leaving)
        async with models.lease("c", keep_alive=-1) as resident:
            assert resident.expires_at is None
        async with models.lease("c") as resident:  # what was said before counts
            pass
        assert resident.expires_at is None
        async with models.lease("d") as resident:
            pass
        assert resident.expires_at is not None and 990 < resident.expires_at - time.time() <= 1000
        assert names(models) == {"c:latest", "d:latest"}
        await models.shutdown(None)
        assert not any(engine.is_healthy() for engine in loader.engines)

    run(test)


def test_a_new_request_stops_the_countdown(tmp_path: Path) -> None:
    async def test() -> None:
        models, loader = make_models(tmp_path, "a", keep_alive=0.15)
        for _ in range(8):
            async with models.lease("a"):
                await asyncio.sleep(0.03)
            await asyncio.sleep(0.01)
        assert loader.loads == ["a:latest"]
        await until(lambda: not models.resident() and not models._leaving)
        await models.shutdown(None)

    run(test)


def test_unload(tmp_path: Path) -> None:
    async def test() -> None:
        models, loader = make_models(tmp_path, "a")
        assert not await models.unload("a") and not await models.unload("../a")
        async with models.lease("a"):
            assert await models.unload("A:latest")
            assert loader.engines[0].is_healthy(), "it answers until it is done"
        await until(lambda: not models.resident() and not models._leaving)
        async with models.lease("a"):
            pass
        assert await models.unload("a")
        assert not loader.engines[1].is_healthy() and not models.resident()
        await models.shutdown(None)

    run(test)


def test_unload_before_it_has_been_loaded(tmp_path: Path) -> None:
    async def test() -> None:
        models, loader = make_models(tmp_path, "a")
        loader.gate.clear()

        async def ask() -> None:
            async with models.lease("a"):
                pass

        asking = asyncio.create_task(ask())
        await until(lambda: bool(loader.loads))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        unloading = asyncio.create_task(models.unload("a"))
        await asyncio.sleep(0.01)
        loader.gate.set()
        assert await unloading
        assert not models.resident() and not models._leaving and not loader.engines[0].is_healthy()
        await models.shutdown(None)

    run(test)


def test_a_model_made_again_is_loaded_again_and_old_answers_go_on(tmp_path: Path) -> None:
    async def test() -> None:
        models, loader = make_models(tmp_path, "a")
        async with models.lease("a") as old:
            cast(NamesOnly, models.library).put("a", "2")
            async with models.lease("a") as new:
                assert new is not old and new.server.engine is not old.server.engine
                assert old.server.engine.is_healthy()
        await until(lambda: not models._leaving)
        assert [engine.is_healthy() for engine in loader.engines] == [False, True]
        await models.shutdown(None)

    run(test)


def test_an_engine_that_died_is_replaced(tmp_path: Path) -> None:
    async def test() -> None:
        models, loader = make_models(tmp_path, "a")
        async with models.lease("a"):
            pass
        await loader.engines[0].shutdown(drain_timeout=None)
        async with models.lease("a") as resident:
            assert resident.server.engine.is_healthy()
        assert len(loader.loads) == 2
        await models.shutdown(None)

    run(test)


def test_shutdown_refuses_new_loads(tmp_path: Path) -> None:
    async def test() -> None:
        models, _ = make_models(tmp_path, "a")
        await models.shutdown(None)
        with pytest.raises(ApiError, match="shutting down"):
            async with models.lease("a"):
                pass

    run(test)


def test_whatever_comes_memory_is_kept_to_and_nothing_is_left(tmp_path: Path) -> None:
    """Random requests, unloads and cancellations; at any moment the models loaded fit."""
    chance = random.Random(7)

    async def test() -> None:
        every = "abcdef"
        sizes = {name: 5 + 3 * place for place, name in enumerate(every)}
        models, loader = make_models(tmp_path, *every, memory=40, keep_alive=0.02, loader=Scripted(sizes=sizes))
        alive = 0

        def loaded() -> int:
            slots = {*models._slots.values(), *models._leaving}
            return sum(slot.size for slot in slots if slot.engine is not None)

        async def ask() -> None:
            nonlocal alive
            name = chance.choice(every)
            try:
                keep = chance.choice([{}, {"keep_alive": 0}, {"keep_alive": 0.01}, {"keep_alive": -1}])
                async with models.lease(name, **keep) as resident:
                    alive += 1
                    for _ in range(chance.randrange(4)):
                        await asyncio.sleep(chance.random() * 0.01)
                        assert resident.server.engine.is_healthy()
                        assert loaded() <= 40
            except ApiError as error:
                assert error.status == 503

        tasks = []
        for _ in range(200):
            tasks.append(asyncio.create_task(ask()))
            if chance.random() < 0.15:
                tasks.append(asyncio.create_task(cast(Any, models.unload(chance.choice(every)))))
            if chance.random() < 0.1:
                chance.choice(tasks).cancel()
            await asyncio.sleep(chance.random() * 0.004)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        wrong = [one for one in results if isinstance(one, Exception)]
        assert not wrong
        assert alive > 50
        for name in every:
            await models.unload(name)
        await until(lambda: not models._leaving and not models._slots)
        await models.shutdown(None)
        assert not any(engine.is_healthy() for engine in loader.engines)

    run(test)
