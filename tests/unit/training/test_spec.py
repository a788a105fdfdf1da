"""What a job was asked to do survives its row."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
