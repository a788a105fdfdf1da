"""What is let in, what is refused and with which words."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.control.inspect_adapter import FEATURES, MAX_FAULTS, PLAIN_INITS, inspect, is_base
from app.control.safetensors_header import MAX_HEADER_BYTES, read_header
from app.domain import BaseModel, Pool
from app.errors import AdapterRejected, Fault
from tests.unit.control.made import (
    ATTENTION,
    BASE,
    CONFIG,
    LLAMA,
    MLP,
    POOL,
    TENSORS,
    config,
    header_of,
    looked_at,
    safetensors,
)

Q = f"{ATTENTION}.q_proj"


def faults_of(*args: Any, **kwargs: Any) -> dict[str, Fault]:
    with pytest.raises(AdapterRejected) as caught:
        looked_at(*args, **kwargs)
    return {fault.field: fault for fault in caught.value.faults}


def test_a_plain_adapter_is_let_in() -> None:
    facts = looked_at()
    assert (facts.rank, facts.target_modules, facts.tensors) == (4, ("q_proj", "v_proj"), 4)
    assert facts.bytes == len(json.dumps(CONFIG)) + len(safetensors(header_of(TENSORS)))


def test_every_module_of_a_llama_has_its_size() -> None:
    sizes = {
        "model.layers.1.self_attn.q_proj": (64, 64),
        "model.layers.1.self_attn.k_proj": (64, 32),
        "model.layers.1.self_attn.v_proj": (64, 32),
        "model.layers.1.self_attn.o_proj": (64, 64),
        "model.layers.1.mlp.gate_proj": (64, 160),
        "model.layers.1.mlp.up_proj": (64, 160),
        "model.layers.1.mlp.down_proj": (160, 64),
        "lm_head": (64, 300),
    }
    tensors: dict[str, tuple[int, ...]] = {
        "base_model.model.model.embed_tokens.lora_embedding_A": (4, 300),
        "base_model.model.model.embed_tokens.lora_embedding_B": (64, 4),
        # What PEFT saves beside an adapter on the embeddings; engines skip it.
        "base_model.model.model.embed_tokens.base_layer.weight": (300, 64),
    }
    for module, (inputs, outputs) in sizes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = (4, inputs)
        tensors[f"base_model.model.{module}.lora_B.weight"] = (outputs, 4)
    targets = [module.rpartition(".")[2] for module in sizes] + ["embed_tokens"]
    assert looked_at(config(target_modules=targets), tensors).target_modules == tuple(
        sorted(targets)
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"base_model_name_or_path": "acme/other"}, "base_model_name_or_path"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"r": 0}, "r"),
        ({"r": 17}, "r"),
        ({"r": True}, "r"),
        ({"r": "4"}, "r"),
        ({"rank_pattern": {"q_proj": 32}}, "rank_pattern.q_proj"),
        ({"rank_pattern": {"q_proj": 0.5}}, "rank_pattern.q_proj"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern"),
        ({"rank_pattern": {"(x|x)*y": 4}}, "rank_pattern"),
        ({"rank_pattern": {"[9-0]": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "big"}}, "alpha_pattern.q_proj"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj", 3]}, "target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "fc1"]}, "target_modules"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True}, "use_dora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"target_modules_bd_a": []}}, "use_bdlora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(change: dict[str, Any], field: str) -> None:
    assert faults_of(config(**change)).keys() == {field}


def test_every_refused_feature_is_tested() -> None:
    marks = test_a_config_that_cannot_be_served_is_refused.pytestmark  # type: ignore[attr-defined]
    tested = {field for change, _ in marks[0].args[1] for field in change}
    assert FEATURES.keys() <= tested


@pytest.mark.parametrize("init", [True, False, *PLAIN_INITS, "Gaussian"])
def test_an_init_that_leaves_the_base_alone_is_fine(init: object) -> None:
    looked_at(config(init_lora_weights=init))


def test_what_peft_writes_when_nothing_is_set_is_fine() -> None:
    looked_at(
        config(
            alora_invocation_tokens=None,
            alpha_pattern={},
            arrow_config=None,
            auto_mapping=None,
            corda_config=None,
            ensure_weight_tying=False,
            eva_config=None,
            exclude_modules=None,
            layer_replication=None,
            loftq_config={},
            lora_bias=False,
            megatron_config=None,
            megatron_core="megatron.core",
            modules_to_save=None,
            peft_version="0.18.0",
            qalora_group_size=16,
            rank_pattern={},
            target_parameters=None,
            task_type="CAUSAL_LM",
            trainable_token_indices=None,
            use_qalora=False,
            use_rslora=True,
        )
    )


@pytest.mark.parametrize(
    ("name", "shape", "field"),
    [
        (f"{Q}.lora_A.weight", (4, 65), "module model.layers.0.self_attn.q_proj: inputs"),
        (f"{Q}.lora_B.weight", (63, 4), "module model.layers.0.self_attn.q_proj: outputs"),
        (f"{Q}.lora_A.weight", (8, 64), "module model.layers.0.self_attn.q_proj: shapes"),
        (f"{Q}.lora_A.weight", (4, 64, 1), "module model.layers.0.self_attn.q_proj: shapes"),
        (f"{MLP}.up_proj.lora_A.weight", (4, 64), "module model.layers.1.mlp.up_proj"),
        (f"{Q}.lora_magnitude_vector", (64,), f"tensor {Q}.lora_magnitude_vector"),
        ("model.embed_tokens.weight", (300, 64), "tensor model.embed_tokens.weight"),
        (f"{Q}.lora_embedding_A", (4, 64), f"tensor {Q}.lora_embedding_A"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(
    name: str, shape: tuple[int, ...], field: str
) -> None:
    assert field in faults_of(weights=TENSORS | {name: shape})


@pytest.mark.parametrize("layer", ["2", "00", "-1", "x"])
def test_a_layer_the_base_does_not_have_is_refused(layer: str) -> None:
    module = f"model.layers.{layer}.self_attn.q_proj"
    more: dict[str, tuple[int, ...]] = {
        f"base_model.model.{module}.lora_A.weight": (4, 64),
        f"base_model.model.{module}.lora_B.weight": (64, 4),
    }
    fault = faults_of(weights=TENSORS | more)[f"module {module}"]
    assert "layers 0 to 1" in str(fault.allowed)


def test_ranks_follow_the_pattern() -> None:
    tensors = TENSORS | {f"{Q}.lora_A.weight": (8, 64), f"{Q}.lora_B.weight": (64, 8)}
    for key in (
        "q_proj",
        "self_attn.q_proj",
        "model.layers.0.self_attn.q_proj",
        "^model.layers.0.self_attn.q_proj$",
        r"layers\.\d+\.self_attn\.q_proj",
        r".*\.0\.self_attn\.(q|k)_proj",
    ):
        assert looked_at(config(rank_pattern={key: 8}), tensors).rank == 8
    assert "module model.layers.0.self_attn.q_proj: rank" in faults_of(weights=tensors)
    wrong = faults_of(config(rank_pattern={"roj": 8}), tensors)
    assert "module model.layers.0.self_attn.q_proj: rank" in wrong


def test_an_integer_dtype_is_refused() -> None:
    faults = faults_of(weights=safetensors(header_of(TENSORS, "I8")))
    assert faults[f"tensor {Q}.lora_A.weight: dtype"].found == "I8"


def test_an_unknown_architecture_gets_the_checks_that_need_no_layout() -> None:
    base = BaseModel("acme/tiny", {"architectures": ["MambaForCausalLM"]})
    tensors: dict[str, tuple[int, ...]] = {
        "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight": (4, 77),
        "base_model.model.backbone.layers.0.mixer.in_proj.lora_B.weight": (99, 4),
    }
    assert looked_at(config(target_modules=["in_proj"]), tensors, base).rank == 4
    del tensors["base_model.model.backbone.layers.0.mixer.in_proj.lora_B.weight"]
    faults = faults_of(config(target_modules=["in_proj"]), tensors, base)
    assert faults.keys() == {"module backbone.layers.0.mixer.in_proj"}


def test_a_base_without_adapted_embeddings_refuses_them() -> None:
    base = BaseModel("acme/tiny", LLAMA | {"architectures": ["MistralForCausalLM"]})
    tensors = TENSORS | {
        "base_model.model.lm_head.lora_A.weight": (4, 64),
        "base_model.model.lm_head.lora_B.weight": (300, 4),
    }
    targets = ["q_proj", "v_proj", "lm_head"]
    assert faults_of(config(target_modules=targets), tensors, base).keys() == {
        "target_modules",
        "module lm_head",
    }
    looked_at(config(target_modules=targets), tensors)


def test_all_that_is_wrong_is_said_at_once() -> None:
    faults = faults_of(
        config(r=99, use_dora=True, base_model_name_or_path="acme/other", lora_alpha="x"),
        TENSORS | {f"{Q}.lora_A.weight": (4, 65), "junk": (1,)},
    )
    assert faults.keys() >= {"r", "use_dora", "base_model_name_or_path", "lora_alpha"}
    assert faults.keys() >= {"tensor junk", "module model.layers.0.self_attn.q_proj: inputs"}
    assert (faults["r"].found, str(faults["r"].allowed)[:7]) == (99, "1 to 16")


def test_faults_are_cut_where_nobody_reads_on() -> None:
    with pytest.raises(AdapterRejected) as caught:
        looked_at(weights={f"junk{n}": (1,) for n in range(500)})
    assert len(caught.value.faults) == MAX_FAULTS + 1
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"r": 4, "r": 400}', "twice"),
        (b'{"rank_pattern": {"q": 1, "q": 2}}', "twice"),
        (b'{"r": NaN}', "NaN"),
        (b"[1]", "list"),
        (b"", "Expecting value"),
        (b"\xff{}", "utf-8"),
        (b'{"a":' * 100_000, "deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_json_that_two_readers_could_read_differently_is_refused(raw: bytes, said: str) -> None:
    assert said in str(faults_of(raw)["adapter_config.json"].found)
    body = safetensors(raw, 0) if raw else safetensors(b"{", 0)
    assert any("header" in field for field in faults_of(weights=body))


def test_a_lone_surrogate_can_be_shown() -> None:
    fault = faults_of(b'{"peft_type": "\\ud800"}')["peft_type"]
    json.dumps(fault.found, ensure_ascii=False).encode()


def _moved(at: int, by: int) -> bytes:
    header = header_of(TENSORS)
    entry = header[list(header)[at]]
    entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
    return safetensors(header)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00" * 7,
        (0).to_bytes(8, "little"),
        (1 << 63).to_bytes(8, "little") + b"{}",
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        (50).to_bytes(8, "little") + b"{}",
        safetensors(header_of(TENSORS), 10),
        safetensors(header_of(TENSORS))[:-1],
        safetensors(header_of(TENSORS)) + b"\x00",
        _moved(2, 8),
        _moved(2, -8),
        _moved(1, 4),
        safetensors(header_of(TENSORS) | {"__metadata__": {"a": 1}}),
        safetensors(header_of(TENSORS) | {"__metadata__": "pt"}),
        safetensors(
            header_of(TENSORS) | {"x": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}
        ),
        safetensors(
            header_of(TENSORS) | {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}
        ),
        safetensors(
            header_of(TENSORS)
            | {"x": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}}
        ),
        safetensors(
            header_of(TENSORS) | {"x": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}}
        ),
        safetensors(b" " + json.dumps(header_of(TENSORS)).encode(), 5120),
        b"PK\x03\x04" + bytes(1000),
    ],
)
def test_a_broken_safetensors_file_is_refused(body: bytes) -> None:
    assert any("safetensors" in field for field in faults_of(weights=body))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(["dtype", "shape", "data_offsets", *CONFIG, *FEATURES, *TENSORS])


@given(st.binary(max_size=200), st.dictionaries(FIELDS | st.text(max_size=10), JSON))
@settings(max_examples=200, deadline=None)
def test_no_bytes_make_the_header_reader_raise(junk: bytes, header: dict[str, Any]) -> None:
    for body in (junk, safetensors(json.dumps(header).encode(), 16)):
        faults: list[Fault] = []
        tensors = read_header(io.BytesIO(body), len(body), faults)
        assert faults or sum(1 for _ in tensors) == len(header) - ("__metadata__" in header)


@given(st.dictionaries(FIELDS | st.text(max_size=10), JSON), st.data())
@settings(max_examples=200, deadline=None)
def test_no_config_makes_the_inspection_raise(changes: dict[str, Any], data: st.DataObject) -> None:
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "I8", "F99"]),
            "shape": st.lists(st.integers(-1, 70), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 6000), max_size=3),
        }
    )
    header = header_of(TENSORS) | data.draw(st.dictionaries(FIELDS, entry | JSON, max_size=3))
    raw = json.dumps(config(**changes)).encode()
    body = safetensors(json.dumps(header).encode(), 3072)
    try:
        inspect(raw, io.BytesIO(body), len(body), base=BASE, pool=POOL)
    except AdapterRejected as exc:
        json.dumps(exc.details(), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("named", "same"),
    [
        ("acme/tiny", True),
        ("ACME/Tiny", True),
        ("tiny", True),
        ("/models/tiny/", True),
        ("/home/someone/checkpoints/tiny", True),
        ("./tiny", True),
        ("other/tiny", False),
        ("acme/tiny-2", False),
        ("/home/someone/tiny-2", False),
        ("", False),
    ],
)
def test_a_base_is_known_by_its_names(named: str, same: bool) -> None:
    assert is_base(named, BASE) is same


def test_the_pools_rank_is_the_limit() -> None:
    assert looked_at(pool=Pool("p", "b", "b", max_lora_rank=4)).rank == 4
    assert "r" in faults_of(pool=Pool("p", "b", "b", max_lora_rank=3))
