"""Hostile bytes in every file that is read: one sentence, or a model that runs. See tests/fuzz."""

from pathlib import Path

import pytest
from fuzz import targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAMES = list(targets.TARGETS)
SLOW = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def damage(good: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Each edit replaces a stretch: (place in thousandths, length, new bytes)."""
    for place, length, new in edits:
        at = place * len(good) // 1000
        good = good[:at] + new + good[at + length :]
    return good


KEPT: dict[str, list[bytes]] = {}


def seeds_of(name: str, folder: Path) -> list[bytes]:
    """Made once: some take an encoder."""
    if name not in KEPT:
        KEPT[name] = targets.TARGETS[name].seeds(folder)
    return KEPT[name]


EDITS = st.lists(
    st.tuples(
        st.integers(0, 999),
        st.integers(0, 12),
        st.one_of(
            st.binary(max_size=12),
            st.sampled_from(
                [b"", b"0", b"-1", b"9" * 30, b"null", b"NaN", b"1e999", b"[]", b"{}", b'"', b"../",
                 b"true", b"[" * 300, b"\x00\x00\xc0\x7f", b"\xff" * 8, b"F64", b"I8", b"\\ud800"]
            ),
        ),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_seeds_of_a_target_are_accepted(name, tmp_path):
    # Otherwise damage to them would prove nothing.
    target = targets.TARGETS[name]
    assert all(target.run(seed, tmp_path) for seed in target.seeds(tmp_path))


@pytest.mark.parametrize("name", NAMES)
@SLOW
@given(edits=EDITS, which=st.integers(0, 100))
def test_damaged_files_end_in_a_sentence_or_a_model_that_runs(name, edits, which, tmp_path):
    target, seeds = targets.TARGETS[name], seeds_of(name, tmp_path)
    target.run(damage(seeds[which % len(seeds)], edits), tmp_path)


@pytest.mark.parametrize("name", NAMES)
@SLOW
@given(data=st.binary(max_size=300))
def test_arbitrary_files_end_in_a_sentence_or_a_model_that_runs(name, data, tmp_path):
    targets.TARGETS[name].run(data, tmp_path)


@pytest.mark.parametrize("wrong", [b"-672", b"480.0", b"9" * 30, b"null", b"true"])
@pytest.mark.parametrize("place", [b" 480,", b'"00000-00000.bin"', b'"shard": 0'])
def test_a_journal_with_wrong_numbers_is_no_journal(wrong, place, tmp_path):
    good = seeds_of("journal", tmp_path)[0]
    assert place in good
    new = {b" 480,": wrong + b",", b'"shard": 0': b'"shard": ' + wrong}.get(place, b'""')
    assert not targets.journal(good.replace(place, new, 1), tmp_path)


def test_a_target_notices_a_broken_promise(tmp_path, monkeypatch):
    def crash(*_, **__):
        raise KeyError("a traceback where a sentence was promised")

    monkeypatch.setattr(targets.tensorfile, "read_header", crash)
    with pytest.raises(KeyError):
        targets.header(b"anything", Path(tmp_path))
