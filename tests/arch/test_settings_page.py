"""docs/settings.md is what the declarations say."""

from __future__ import annotations

from pathlib import Path

from app.cli.settings import reference
from app.settings import BackendSettings, ClientSettings, PoolSettings, Settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == reference(), "run: loragate settings --markdown > docs/settings.md"


def test_every_setting_says_what_it_is() -> None:
    for model in (Settings, BackendSettings, PoolSettings, ClientSettings):
        for name, field in model.model_fields.items():
            assert field.description, name
