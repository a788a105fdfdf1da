"""docs/backends.md: its table of combinations is what the code does."""

from __future__ import annotations

from app.control.backends import Operation, combine
from app.settings import BackendSettings, Settings
from tests.docs.pages import codes, page

PAGE = page("docs/backends.md")


def test_the_table_says_who_does_what() -> None:
    rows = PAGE.table("`USE_MEGATRON`")
    heading = next(line for line in PAGE.text.splitlines() if line.startswith("| `USE_MEGATRON`"))
    operations = [codes(cell) for cell in heading.strip("|").split("|")[2:]]
    assert sorted(name for names in operations for name in names) == sorted(Operation)
    assert len({(row[0], row[1]) for row in rows}) == 4
    for megatron, vllm, *does in rows:
        backends = BackendSettings(use_megatron="true" in megatron, use_vllm="true" in vllm)
        found = combine(backends, Settings())
        for names, backend in zip(operations, does, strict=True):
            assert [found.does(Operation(name)) for name in names] == codes(backend) * len(names)


def test_every_variable_it_names_is_a_setting() -> None:
    known = {name.upper() for name in BackendSettings.model_fields}
    known |= {f"LORAGATE_{name.upper()}" for name in Settings.model_fields}
    foreign = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING"}
    named = {code.partition("=")[0] for code in PAGE.inline()}
    variables = {name for name in named if name.isupper() and "_" in name}
    assert variables - foreign <= known
    assert {name.upper() for name in BackendSettings.model_fields} - named <= {
        "VLLM_MAX_LORAS",
        "VLLM_MAX_LORA_RANK",
    }
