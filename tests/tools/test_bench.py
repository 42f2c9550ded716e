"""Ratios, their spread, and what counts as slower."""

from __future__ import annotations

from pathlib import Path

from bench.figures import Figure, find_slower, load, save, time_in_turns
from hypothesis import given
from hypothesis import strategies as st


def test_who_is_timed_first_changes_and_the_first_pair_does_not_count():
    order: list[str] = []
    now = 0.0

    def call(name: str, seconds: float) -> None:
        nonlocal now
        order.append(name)
        now += seconds if len(order) > 2 else 1000.0

    figure = time_in_turns(
        "a over b", lambda: call("a", 3.0), lambda: call("b", 2.0), lambda: now, repeats=4
    )
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert figure == Figure("a over b", 1.5, 1.5, 1.5, 4)


@given(rise=st.floats(0, 0.5), spread=st.floats(0.01, 0.2))
def test_slower_is_what_rose_by_more_than_its_spread(tmp_path_factory, rise: float, spread: float):
    file: Path = tmp_path_factory.mktemp("bench") / "before.json"
    save([Figure("a", 1.0, 1.0 - spread / 2, 1.0 + spread / 2, 5)], file, "a machine")
    middle = 1.0 + rise
    now = Figure("a", middle, middle - spread / 2, middle + spread / 2, 5)
    new = Figure("b", 9.0, 9.0, 9.0, 5)  # nothing to compare with
    if abs(rise - spread) > 1e-9:
        assert bool(find_slower([now, new], load(file))) == (rise > spread)
