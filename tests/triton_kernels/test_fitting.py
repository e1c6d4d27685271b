"""Launches that a chip refuses are made with less of it, and what fits is remembered."""

from __future__ import annotations

import pytest

from lam_kernels.triton.configurations import AMPERE, LOW_RANK, TABLE, Configuration, leaner

pytestmark = pytest.mark.backend("triton")
pytest.importorskip("triton")


def shared_bytes(entry: Configuration) -> int:
    """What a kernel with wide masks might take."""
    return entry.stages * 1000 * (entry.block_m + entry.block_n)


@pytest.fixture
def chip(monkeypatch):
    """launch(entry, kind, limit) -> every entry that was tried, of a kernel like shared_bytes."""
    from triton.runtime.errors import OutOfResources

    from lam_kernels.triton import fitting

    monkeypatch.setattr(fitting, "_fits", {})

    def launch(entry, kind="two masks", limit=100_000):
        tried = []

        def launched(one):
            tried.append(one)
            if shared_bytes(one) > limit:
                raise OutOfResources(shared_bytes(one), limit, "shared memory")

        fitting.launch(launched, Configuration(*entry), lambda: kind)
        return [tuple(one) for one in tried]

    return launch


def test_what_fits_is_launched_as_it_is(chip):
    assert chip((64, 32, 4, 1)) == [(64, 32, 4, 1)]


def test_fewer_stages_then_smaller_tiles(chip):
    tried = [(128, 64, 4, 3), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 1), (32, 64, 4, 1)]
    assert chip((128, 64, 4, 3)) == tried


def test_what_fits_is_remembered_for_that_kind_of_call(chip):
    chip((128, 64, 4, 3))
    assert chip((128, 64, 4, 3)) == [(32, 64, 4, 1)]
    assert len(chip((128, 64, 4, 3), kind="one mask")) == 5
    assert chip((64, 32, 4, 1)) == [(64, 32, 4, 1)]


def test_what_fits_nowhere_says_so(chip):
    from triton.runtime.errors import OutOfResources

    with pytest.raises(OutOfResources, match="shared memory, Required: 32000"):
        chip((128, 64, 4, 3), limit=10_000)


@pytest.mark.parametrize("table", [AMPERE, LOW_RANK])
def test_every_entry_ends_in_one_stage_and_the_smallest_tile(table):
    listed = [*TABLE.values(), table]
    for entry in {entry for rows in listed for entries in rows.values() for entry in entries}:
        *_, last = leaner(entry)
        assert last == Configuration(16, 16, entry.warps, 1)


def test_an_entry_that_does_not_fit_is_not_measured(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from lam_kernels.triton import autotune

    def run():
        raise OutOfResources(200_000, 100_000, "shared memory")

    assert autotune._milliseconds(run) == float("inf")
