"""Items made in another thread, one ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from eapo_megatron.conversion.ahead import ahead


def test_keeps_the_order_and_makes_one_item_while_another_is_used() -> None:
    made = [threading.Event() for _ in range(4)]
    makers = set()

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            makers.add(threading.get_ident())
            event.set()
            yield number

    used = []
    for item in ahead(items()):
        used.append(item)
        if item < 3:
            assert made[item + 1].wait(timeout=30)
        if item < 2:
            assert not made[item + 2].is_set()
    assert used == [0, 1, 2, 3]
    assert threading.get_ident() not in makers


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk")

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(OSError, match="disk"):
        next(coming)


def test_nothing_gives_nothing() -> None:
    assert list(ahead([])) == []
