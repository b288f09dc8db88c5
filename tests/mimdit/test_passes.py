"""Forward passes, counted over grids, for bars and callers."""

import io

import pytest
from tqdm import tqdm

from mimdit.passes import PassCount


def test_passes_of_all_grids_are_one_count() -> None:
    seen: list[tuple[int, int]] = []
    with tqdm(total=0, file=io.StringIO()) as bar:
        count = PassCount(bar, lambda *passes: seen.append(passes), [2, 3])
        for grid, passes in enumerate((2, 3)):
            passed = count.begin(grid, passes)
            for _ in range(passes):
                passed()
        assert (bar.n, bar.total) == (5, 5)
    assert seen == [(i, 5) for i in range(1, 6)]


def test_a_grid_that_starts_again_has_its_own_passes() -> None:
    """Memory ran out in the second of four passes, so that there are nine smaller ones instead."""
    seen: list[tuple[int, int]] = []
    with tqdm(total=0, file=io.StringIO()) as bar:
        count = PassCount(bar, lambda *passes: seen.append(passes), [1, 4])
        count.begin(0, 1)()
        count.begin(1, 4)()
        passed = count.begin(1, 9)
        assert (bar.n, bar.total) == (1, 10)
        passed()
    assert seen == [(1, 5), (2, 5), (2, 10)]


@pytest.mark.parametrize(("delay", "shown"), [(0, True), (60, False)])
def test_a_bar_with_a_delay_waits_for_it(delay: int, shown: bool) -> None:
    text = io.StringIO()
    bar = tqdm(total=0, file=text, delay=delay)
    PassCount(bar, None, [4]).begin(0, 4)()
    assert ("/4" in text.getvalue()) == shown


def test_a_bar_that_is_off_counts_for_callers() -> None:
    seen: list[tuple[int, int]] = []
    PassCount(tqdm(disable=True), lambda *p: seen.append(p), [2]).begin(0, 2)()
    assert seen == [(1, 2)]
