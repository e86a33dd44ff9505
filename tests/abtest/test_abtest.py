"""``lncompile.ABTest``: who answers, what a failure does, threads and tasks, arguments, and compiled models."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from abtesting import ONE, Recorder, arms, broken, double
from torch import Tensor

import lncompile

# --- who answers ------------------------------------------------------------------------------------------------------


def test_requests_are_assigned_by_the_ratio() -> None:
    old, new = Recorder(), Recorder()
    ab = lncompile.ABTest(arms=arms(old, new), ratio=0.25)
    for number in range(2000):
        assert ab(number) == number
    assert sorted(old.calls + new.calls) == list(range(2000))
    assert 430 <= len(new.calls) <= 570


def test_a_key_keeps_its_arm_in_every_process() -> None:
    old, new = Recorder(), Recorder()
    first = lncompile.ABTest(arms=arms(old, new), ratio=0.3)
    users = [f"user {number}" for number in range(300)]
    for _ in range(3):
        for user in users:
            first(user, ab_key=user)
    assert not set(old.calls) & set(new.calls)
    assert 60 <= len(set(new.calls)) <= 120
    again = Recorder()
    second = lncompile.ABTest(arms=arms(Recorder(), again), ratio=0.3)
    for user in reversed(users):
        second(user, ab_key=user)
    assert set(again.calls) == set(new.calls)
    for different in ({"seed": 1}, {"name": "another"}):
        elsewhere = Recorder()
        another = lncompile.ABTest(arms=arms(Recorder(), elsewhere), ratio=0.3, **different)  # type: ignore[arg-type]
        for user in users:
            another(user, ab_key=user)
        assert set(elsewhere.calls) != set(new.calls)


def test_who_batches_requests_can_ask_where_a_key_goes() -> None:
    recorders: dict[str, list[str]] = {"old": [], "new": []}
    ab = lncompile.ABTest(arms={name: calls.append for name, calls in recorders.items()}, ratio=0.3, seed=5)
    for number in range(50):
        user = f"user {number}"
        arm = ab.assigned_to(user)
        ab(user, ab_key=user)
        assert recorders[arm][-1] == user
    assert min(map(len, recorders.values())) > 5


def test_keys_of_different_types_are_different_and_unstable_ones_refused() -> None:
    from lncompile.abtest.assignment import share_of

    assert len({share_of("1", "0"), share_of(1, "0"), share_of(2, "0"), share_of("1", "1")}) == 4
    with pytest.raises(TypeError, match=r"str\(key\)"):
        lncompile.ABTest(arms=arms())(ONE, ab_key=object())  # type: ignore[arg-type]


def test_settle_sends_everything_to_one_arm_until_resumed() -> None:
    old, new = Recorder(), Recorder()
    ab = lncompile.ABTest(arms=arms(old, new))
    with pytest.raises(ValueError, match="no winner"):
        ab.settle()
    assert ab.settle("new") == "new"
    for number in range(50):
        ab(number)
    assert (len(old.calls), len(new.calls)) == (0, 50)
    assert "All requests go to new." in str(ab.verdict())
    assert ab.to_dict()["assigned"] == 0
    ab.resume()
    for number in range(50):
        ab(number)
    assert len(old.calls) > 10


def test_an_arm_is_taken_out_and_restored_by_hand() -> None:
    old, new = Recorder(), Recorder()
    ab = lncompile.ABTest(arms=arms(old, new))
    ab.take_out("new", "a suspicion")
    for number in range(50):
        ab(number)
    assert (len(old.calls), len(new.calls)) == (50, 0)
    assert ab.verdict().out_of_service == {"new": "a suspicion"}
    assert not ab.verdict().regression  # nothing is known against it
    with pytest.raises(ValueError, match="last one in service"):
        ab.take_out("old")
    with pytest.raises(ValueError, match="restore it first"):
        ab.settle("new")
    with pytest.raises(ValueError, match="no arm is called 'newer'"):
        ab.restore("newer")
    ab.restore("new")
    for number in range(50):
        ab(number)
    assert new.calls


# --- arms that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["old", "new"])
def test_an_arm_that_raises_is_taken_out_and_nothing_is_lost(failing: str, caplog: pytest.LogCaptureFixture) -> None:
    calls = {"old": 0, "new": 0}

    def arm(name: str) -> Callable[[int], int]:
        def answer(value: int) -> int:
            calls[name] += 1
            if name == failing and calls[name] > 10:
                raise RuntimeError("no such kernel")
            return value + 1

        return answer

    ab = lncompile.ABTest(arms=arms(arm("old"), arm("new")))
    assert [ab(number) for number in range(200)] == list(range(1, 201))
    assert calls[failing] == 11
    verdict = ab.verdict()
    assert verdict.failed == (failing,)
    assert verdict.regression == (failing == "new")
    assert f"{failing} is out of service: it raised RuntimeError: no such kernel." in str(verdict)
    assert f"arm '{failing}' is taken out of service" in caplog.text
    state = {arm["name"]: arm for arm in ab.to_dict()["arms"]}
    assert state[failing]["failures"] == 1
    assert sum(arm["requests"] for arm in state.values()) == 200
    assert ab.settle() == ("old" if failing == "new" else "new")


def test_an_arm_may_be_given_several_chances() -> None:
    ab = lncompile.ABTest(arms=arms(double, broken), max_failures=3)
    for _ in range(50):
        torch.testing.assert_close(ab(ONE), ONE * 2)
    state = ab.to_dict()
    assert state["arms"][1]["failures"] == 3
    assert not state["arms"][1]["in_service"]
    ab.restore("new")
    for _ in range(50):
        ab(ONE)
    assert ab.to_dict()["arms"][1]["failures"] == 6


def test_a_request_that_both_refuse_is_at_fault() -> None:
    ab = lncompile.ABTest(arms=arms(broken, broken))
    for _ in range(10):
        with pytest.raises(RuntimeError, match="no such kernel") as caught:
            ab(ONE)
        assert "raised too" in caught.value.__notes__[0]
    assert ab.verdict().out_of_service == {}


def test_the_last_arm_stays_in_service_and_its_callers_get_the_exception() -> None:
    ab = lncompile.ABTest(arms=arms(broken, double))
    ab.take_out("new")
    with pytest.raises(RuntimeError, match="no such kernel"):
        ab(ONE)
    assert list(ab.verdict().out_of_service) == ["new"]


@pytest.mark.parametrize(
    "cancelled", [KeyboardInterrupt, asyncio.CancelledError, concurrent.futures.CancelledError, SystemExit]
)
def test_being_cancelled_is_no_failure(cancelled: type[BaseException]) -> None:
    def interrupted(value: Tensor) -> Tensor:
        raise cancelled

    ab = lncompile.ABTest(arms=arms(interrupted, interrupted))
    with pytest.raises(cancelled):
        ab(ONE)
    assert ab.verdict().out_of_service == {}
    assert [arm["failures"] for arm in ab.to_dict()["arms"]] == [0, 0]


# --- threads and tasks ------------------------------------------------------------------------------------------------


def test_many_threads_lose_nothing() -> None:
    ab = lncompile.ABTest(arms=arms(lambda value: value + 1, lambda value: value + 1), warmup=2, shadow=0.1)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ab, range(4000))) == list(range(1, 4001))
    state = ab.to_dict()
    assert sum(arm["requests"] for arm in state["arms"]) == state["assigned"] == 4000
    counted = sum(arm["seconds"]["requests"] for arm in state["arms"])
    warm = sum(sum(bucket["warmup"].values()) for bucket in state["buckets"])
    assert counted + warm + state["during_compilation"] == 4000
    assert state["comparisons"]["differing"] == 0


def test_many_threads_lose_nothing_when_an_arm_fails() -> None:
    started = threading.Semaphore(0)

    def failing(value: int) -> int:
        started.release()
        raise RuntimeError("no such kernel")

    ab = lncompile.ABTest(arms=arms(lambda value: value + 1, failing))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ab, range(500))) == list(range(1, 501))
    assert ab.verdict().failed == ("new",)
    assert sum(arm["requests"] for arm in ab.to_dict()["arms"]) == 500


def test_tasks_await_answers_under_their_own_torch_state() -> None:
    user = contextvars.ContextVar("user", default="nobody")

    def state(value: Tensor) -> tuple[bool, bool, torch.dtype, bool]:
        product = value @ value.T
        assert user.get() == "somebody"
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            product.dtype,
            threading.current_thread() is main,
        )

    main = threading.current_thread()
    ab = lncompile.ABTest(arms=arms(state, state), workers=2)

    async def serve() -> list[Any]:
        answers = []
        user.set("somebody")
        with torch.enable_grad():
            answers.append(await ab.acall(ONE))
        with torch.no_grad():
            answers.append(await ab.acall(ONE, ab_key="user"))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            answers.append(await ab.acall(ONE))
        return answers

    assert asyncio.run(serve()) == [
        (True, False, torch.float32, False),
        (False, False, torch.float32, False),
        (False, True, torch.bfloat16, False),
    ]
    ab.close()


def test_a_task_that_is_cancelled_harms_nobody() -> None:
    running, finish = threading.Event(), threading.Event()

    def slow(value: int) -> int:
        running.set()
        assert finish.wait(60)
        return value

    ab = lncompile.ABTest(arms=arms(slow, slow))

    async def serve() -> int:
        task = asyncio.create_task(ab.acall(1))
        await asyncio.to_thread(running.wait, 60)
        waiting = asyncio.create_task(ab.acall(2))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        finish.set()
        return await waiting

    assert asyncio.run(serve()) == 2
    ab.close()
    assert ab.verdict().out_of_service == {}
    assert sum(arm["requests"] for arm in ab.to_dict()["arms"]) == 2


def test_many_tasks() -> None:
    ab = lncompile.ABTest(arms=arms(lambda value: value + 1, lambda value: value + 1))

    async def serve() -> list[int]:
        return await asyncio.gather(*(ab.acall(number) for number in range(500)))

    assert asyncio.run(serve()) == list(range(1, 501))
    ab.close()
