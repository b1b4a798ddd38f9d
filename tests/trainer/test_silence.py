"""How long a worker may be silent, by the loop's clock; nothing here waits."""

from __future__ import annotations

import asyncio

import pytest

from tapestry.node.trainer.silence import Silence

HELLO_S, SILENCE_S, SAVE_S = 900.0, 300.0, 3600.0


def left_s(silence: Silence) -> float | None:
    ends_s = silence.ends_s
    return None if ends_s is None else ends_s - asyncio.get_running_loop().time()


def test_each_state_of_a_worker_has_its_own_time() -> None:
    async def scenario() -> None:
        silence = Silence(HELLO_S, SILENCE_S, SAVE_S)
        silence.watch(busy=True)  # nobody is there
        assert left_s(silence) is None
        async with silence.bounded():
            assert left_s(silence) is None
            silence.await_hello()
            assert left_s(silence) == pytest.approx(HELLO_S, abs=5)
            silence.watch(busy=True)
            assert left_s(silence) == pytest.approx(SILENCE_S, abs=5)
            silence.saves = 1
            silence.watch(busy=True)
            assert left_s(silence) == pytest.approx(SAVE_S, abs=5)
            silence.watch(busy=False)
            assert left_s(silence) is None
        assert left_s(silence) is None

    asyncio.run(scenario())


def test_a_script_may_be_silent_for_as_long_as_it_likes_once_it_has_said_hello() -> None:
    async def scenario() -> None:
        silence = Silence(HELLO_S, None, SAVE_S)
        silence.saves = 1
        async with silence.bounded():
            silence.watch(busy=True)
            assert left_s(silence) is None

    asyncio.run(scenario())


def test_too_long_a_silence_ends_the_conversation_and_says_which_limit_it_was() -> None:
    async def scenario() -> None:
        silence = Silence(HELLO_S, 0.0, SAVE_S)
        with pytest.raises(TimeoutError):
            async with silence.bounded():
                silence.watch(busy=True)
                await asyncio.Event().wait()
        assert silence.why(attached=True) == (
            "the trainer was silent for 0 s, which a micro-batch must not take"
        )
        assert silence.why(attached=False) == "the trainer was silent for too long"

    asyncio.run(scenario())
