"""What a job, or a single op, was asked to do survives its row."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.training import single_ops
from app.training.single_ops import AddLora, FwdBwd, Optim, RemoveLora, Sample, Spec
from app.training.spec import FineTuneSpec


@given(
    st.builds(
        FineTuneSpec,
        seed=st.integers(0, 2**31 - 1),
        learning_rate=st.none() | st.floats(0, 1, exclude_min=True),
        learning_rate_multiplier=st.none() | st.floats(0, 100, exclude_min=True),
        beta=st.none() | st.floats(0, 10),
        warmup_ratio=st.none() | st.floats(0, 1),
        weight_decay=st.none() | st.floats(0, 1),
        grad_clip_norm=st.none() | st.floats(0, 10),
    )
)
def test_comes_back_from_json_as_it_was(spec: FineTuneSpec) -> None:
    assert FineTuneSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_row_with_a_field_nobody_knows_is_refused() -> None:
    row = FineTuneSpec(base_model="b", model="ft:b::1", training_file="file-1", seed=1).to_json()
    with pytest.raises(msgspec.ValidationError, match="surprise"):
        FineTuneSpec.from_json({**row, "surprise": 1})


ITEMS = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [{"role": "user", "content": "é"}]]


@pytest.mark.parametrize(
    "op",
    [
        AddLora("run"),
        RemoveLora("run"),
        FwdBwd("run", ITEMS, "dpo", {"beta": 0.2}, True, True),
        Optim("run", {"learning_rate": 0.1}),
        Sample("run", ["Hi", [1, 2]], {"max_tokens": 3}),
        Sample("", ["Hi"], {}, "tiny"),
    ],
)
def test_an_op_comes_back_from_its_spec_and_payload(op: Spec) -> None:
    kept = single_ops.stored(op)
    assert single_ops.read(json.loads(json.dumps(kept.spec)), kept.payload) == op


def test_a_spec_tells_payloads_apart_and_is_small() -> None:
    one, other = (single_ops.stored(FwdBwd("run", ITEMS[:n] * 1000)) for n in (1, 2))
    assert one.spec["payload"] != other.spec["payload"]
    assert len(json.dumps(one.spec)) < 200


@pytest.mark.parametrize(
    ("op", "does"),
    [
        (FwdBwd("run", ITEMS), True),
        (FwdBwd("run", ITEMS, forward_only=True), False),
        (Optim("run", {}), True),
        (Sample("run", ["Hi"], {}), False),
        (AddLora("run"), False),
    ],
)
def test_which_ops_weights_depend_on(op: Spec, does: bool) -> None:
    assert single_ops.trains(single_ops.stored(op).spec) is does
