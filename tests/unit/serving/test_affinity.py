"""Who has seen which prefix: chained blocks, shares counted from the first, bounded memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.serving.affinity import BLOCK, PrefixTable, blocks

CONTENT = st.binary(min_size=1, max_size=1).flatmap(
    lambda byte: st.integers(0, 6 * BLOCK).map(lambda size: byte * size)
)


@given(name=st.text(max_size=5), content=CONTENT, tail=st.binary(max_size=3 * BLOCK))
def test_a_longer_prompt_begins_with_the_same_blocks(
    name: str, content: bytes, tail: bytes
) -> None:
    chain = blocks(name, content)
    assert len(chain) == len(content) // BLOCK
    assert blocks(name, content + tail)[: len(chain)] == chain
    assert blocks(name, memoryview(content)) == chain
    assert chain == [] or blocks(name + "!", content) != chain, "an engine's cache is keyed by name"


def test_less_than_a_block_is_none() -> None:
    assert blocks("a@1", b"") == blocks("a@1", b"x" * (BLOCK - 1)) == []


def test_a_block_depends_on_all_before_it() -> None:
    one, other = (blocks("a@1", start * BLOCK + b"same" * BLOCK) for start in (b"1", b"2"))
    assert not set(one) & set(other)


@given(
    seen=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), max_size=6)), max_size=12
    ),
    asked=st.lists(st.integers(0, 2), min_size=1, max_size=6),
)
def test_depths_are_those_of_a_plain_table(
    seen: list[tuple[int, list[int]]], asked: list[int]
) -> None:
    def content(parts: list[int]) -> bytes:
        return b"".join(b"%d" % part * BLOCK for part in parts)

    table = PrefixTable()
    for replica, parts in seen:
        table.note(blocks("a@1", content(parts)), 1 << replica)

    def shared(parts: list[int]) -> int:
        common = 0
        while common < min(len(parts), len(asked)) and parts[common] == asked[common]:
            common += 1
        return common

    chain = blocks("a@1", content(asked))
    deepest = [max((shared(p) for r, p in seen if r == at), default=0) for at in range(4)]
    bits = [1 << at for at in range(4)]
    assert table.depths(chain, bits) == pytest.approx([d / len(asked) for d in deepest])
    best = max(deepest)
    expected = sum(bit for bit, depth in zip(bits, deepest, strict=True) if depth == best)
    assert table.last_seen(chain) == (expected if best else 0)


def test_memory_is_bounded_and_what_is_used_is_kept() -> None:
    table = PrefixTable(capacity=64)
    kept = blocks("kept", b"k" * (2 * BLOCK))
    for number in range(500):
        table.note(blocks(f"other-{number}", b"x" * (2 * BLOCK)), 2)
        table.note(kept, 1)
        assert len(table) <= 64 + 2
        assert table.depths(kept, [1, 2]) == [1.0, 0.0]
    assert table.depths(blocks("other-0", b"x" * (2 * BLOCK)), [2]) == [0.0]
