"""What a probe must be, and what is said about one that is not."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.control.inspect_probe import (
    MAX_IDS,
    MAX_PROBE_BYTES,
    MAX_ROWS,
    checked_probe,
    read_probe,
    vocab_size_of,
)
from app.domain import Probe
from app.errors import AdapterRejected

GOOD: dict[str, Any] = {"token_ids": [[1, 2, 3], [4, 5]], "logprobs": [[-0.5, -1], [-2.5]]}

Row = st.lists(st.tuples(st.integers(0, 299), st.floats(-100, 0)), min_size=1, max_size=8)


def faults(**changes: Any) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        checked_probe({**GOOD, **changes}, 300)
    for fault in caught.value.details():  # each must fit into an answer
        json.dumps(fault, allow_nan=False)
    return [fault.field for fault in caught.value.faults]


@given(rows=st.lists(Row, min_size=1, max_size=MAX_ROWS), first=st.integers(0, 299))
def test_what_is_read_is_what_was_written(rows: list[list[tuple[int, float]]], first: int) -> None:
    token_ids = [[first, *(token for token, _ in row)] for row in rows]
    logprobs = [[logprob for _, logprob in row] for row in rows]
    raw = json.dumps({"token_ids": token_ids, "logprobs": logprobs, "dtype": "bfloat16"})
    found = read_probe(raw.encode(), 300)
    assert [list(row) for row in found.token_ids] == token_ids
    assert [list(row) for row in found.logprobs] == logprobs
    assert found.dtype == "bfloat16"


def test_a_probe_may_leave_its_dtype_out_and_say_more() -> None:
    found = checked_probe({**GOOD, "made_by": "trainer 7"}, None)
    assert found == Probe(((1, 2, 3), (4, 5)), ((-0.5, -1.0), (-2.5,)), "float32")


def test_the_largest_probe_fits() -> None:
    row = [299] * MAX_IDS
    logprobs = [-12.345678901234567] * (MAX_IDS - 1)
    largest = {"token_ids": [row] * MAX_ROWS, "logprobs": [logprobs] * MAX_ROWS}
    raw = json.dumps(largest, indent=4).encode()
    assert len(raw) < MAX_PROBE_BYTES
    assert len(read_probe(raw, 300).token_ids) == MAX_ROWS


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"token_ids": None}, "token_ids"),
        ({"token_ids": {}}, "token_ids"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [[1, 2]] * (MAX_ROWS + 1)}, "token_ids"),
        ({"token_ids": [[1, 2, 3], 4]}, "token_ids[1]"),
        ({"token_ids": [[1, 2, 3], [4]]}, "token_ids[1]"),
        ({"token_ids": [[1] * (MAX_IDS + 1), [4, 5]]}, "token_ids[0]"),
        ({"token_ids": [[1, 2, 300], [4, 5]]}, "token_ids[0]"),
        ({"token_ids": [[1, 2, 3], [-1, 5]]}, "token_ids[1]"),
        ({"token_ids": [[1, 2, True], [4, 5]]}, "token_ids[0]"),
        ({"token_ids": [[1, 2, 3.0], [4, 5]]}, "token_ids[0]"),
        ({"token_ids": [[1, 2, 10**400], [4, 5]]}, "token_ids[0]"),
        ({"logprobs": "none"}, "logprobs"),
        ({"logprobs": [[-0.5, -1]]}, "logprobs"),
        ({"logprobs": [[-0.5], [-2.5]]}, "logprobs[0]"),
        ({"logprobs": [[-0.5, -1], [-2.5, -1]]}, "logprobs[1]"),
        ({"logprobs": [[-0.5, math.nan], [-2.5]]}, "logprobs[0]"),
        ({"logprobs": [[-0.5, -math.inf], [-2.5]]}, "logprobs[0]"),
        ({"logprobs": [[-0.5, "-1"], [-2.5]]}, "logprobs[0]"),
        ({"logprobs": [[-0.5, None], [-2.5]]}, "logprobs[0]"),
        ({"logprobs": [[0.5, -1], [-2.5]]}, "logprobs[0]"),  # a probability above 1
        ({"dtype": "float64"}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"dtype": ["float32"]}, "dtype"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], field: str) -> None:
    assert faults(**changes) == [field]


def test_all_faults_come_at_once() -> None:
    assert faults(token_ids=[[1, 2, 999], [4, 5]], logprobs=[[-1], [7]], dtype="int8") == [
        "token_ids[0]",
        "logprobs[1]",
        "logprobs[0]",
        "dtype",
    ]


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"\xff", b'{"token_ids": [[1, 2]], "logprobs": [[NaN]]}', b'{"a":1,"a":2}']
)
def test_a_file_that_is_no_json_object(raw: bytes) -> None:
    with pytest.raises(AdapterRejected, match=r"probe\.json"):
        read_probe(raw, None)


def test_the_fields_of_a_file_say_which_file() -> None:
    with pytest.raises(AdapterRejected, match=r"probe\.json: logprobs"):
        read_probe(json.dumps({**GOOD, "logprobs": 1}).encode(), None)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"vocab_size": 300}, 300),
        ({"vocab_size": 0}, None),
        ({"vocab_size": "300"}, None),
        ({"text_config": {"vocab_size": 300}}, 300),
        ({}, None),
        (None, None),
    ],
)
def test_the_size_of_a_vocabulary(config: dict[str, Any] | None, size: int | None) -> None:
    assert vocab_size_of(config) == size
