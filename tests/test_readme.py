"""README says what the code does."""

from __future__ import annotations

import re

from conftest import ROOT

from runtime.config_file import insert_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_settings_is_up_to_date():
    settings = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert insert_settings(settings) == settings, "run `make settings`"


def test_every_file_that_it_names_exists():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert links
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|sh|yaml|yml|txt|md))`", README)
    made_by_users = {"config.yaml", "site.sh"}
    for name in {*links, *named} - made_by_users:
        assert (ROOT / name).exists(), name


def test_every_experiment_is_described():
    for path in (ROOT / "yaml_files").glob("*.yaml"):
        assert f"`{path.stem}`" in README, path.name
