"""No replica is asked for prompt logprobs that it would get wrong."""

from __future__ import annotations

from itertools import product

import pytest

from app.backends.base import Features
from app.domain import AdapterVersion
from app.serving.prompt_logprobs import refusal

BODY = AdapterVersion("bot", 3, "d", rank=8, base_model="llama")
HEAD = AdapterVersion("bot", 4, "e", rank=8, base_model="llama", targets_lm_head=True)
ALL = Features(True, True, True)
PLAIN = Features(True, True, False)
CPU = Features(False, False, False)
VERSIONS = (None, BODY, HEAD)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("beside", [False, True])
def test_where_everything_is_right_nothing_is_refused(
    version: AdapterVersion | None, beside: bool
) -> None:
    assert refusal(version, ALL, lm_head_loaded=beside) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_that_dies_is_not_asked(version: AdapterVersion | None) -> None:
    found = refusal(version, CPU)
    assert found is not None
    assert ("the base" if version is None else version.upstream_name) in found
    assert "one for CPUs" in found


def test_without_the_plugin_only_lm_head_is_refused() -> None:
    assert refusal(None, PLAIN) is None
    assert refusal(BODY, PLAIN) is None
    found = refusal(HEAD, PLAIN)
    assert found is not None
    assert found.startswith("bot@4 changes lm_head")


@pytest.mark.parametrize("version", [None, BODY])
def test_nobody_is_asked_beside_an_adapter_of_lm_head(version: AdapterVersion | None) -> None:
    found = refusal(version, PLAIN, lm_head_loaded=True)
    assert found is not None
    assert found.startswith("An adapter that changes lm_head is loaded")


def test_an_engine_that_is_right_for_the_base_alone() -> None:
    features = Features(True, False, False)
    assert refusal(None, features) is None
    assert "adapters" in (refusal(BODY, features) or "")


def test_every_refusal_names_the_way_out_and_less_is_never_more() -> None:
    """A replica that gets less right never answers more."""
    every = [Features(*flags) for flags in product((False, True), repeat=3)]
    for version, beside, features in product(VERSIONS, (False, True), every):
        found = refusal(version, features, lm_head_loaded=beside)
        if found is not None:
            assert "Install loragate-vllm" in found
        if not features.prompt_logprobs:
            assert found is not None
        if version is HEAD and not features.lm_head_prompt_logprobs:
            assert found is not None
