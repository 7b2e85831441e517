"""README and docs/ say what the code does: settings, files, and commands. `make docs-check` runs the commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from docs_check import (
    LEFT_OUT,
    PAGES,
    RUN,
    Command,
    all_commands,
    check_command,
    fenced_commands,
    module_of,
    rule_of,
    small_settings,
)

from runtime.config_file import insert_settings, parse_config

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = all_commands()


def test_the_table_of_settings_is_up_to_date():
    settings = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert insert_settings(settings) == settings, "run `make settings`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    made_by_users = {"config.yaml", "site.sh"}
    for name in {*re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|sh|yaml|yml|txt|md))`", text)} - made_by_users:
        assert (ROOT / name).exists(), name


def test_links_to_headings_lead_somewhere():
    for page in PAGES:
        for link, heading in re.findall(r"\]\(([^)#:]+)#([^)]+)\)", page.read_text(encoding="utf-8")):
            headings = re.findall(r"^#+ (.+)$", (page.parent / link).read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


def test_every_experiment_is_described():
    for path in (ROOT / "yaml_files").glob("*.yaml"):
        assert f"`{path.stem}`" in README, path.name


def test_every_page_and_every_part_of_the_code_is_named_in_the_readme():
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in README, page.name
    code = README.partition("## Code")[2]
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in code, path.name
    for folder in {path.relative_to(ROOT).parts[0] for path in ROOT.glob("[a-z]*/*.py")} - {"docs"}:
        assert f"`{folder}/`" in code, folder


# Commands.


def test_every_command_is_run_or_left_out_for_a_reason():
    """And no rule is left over."""
    rules = {command.text: rule_of(command) for command in COMMANDS}
    assert None not in rules.values(), [text for text, rule in rules.items() if rule is None]
    assert {*rules.values()} == {*RUN, *LEFT_OUT}
    for name in re.findall(r"\w+/\w+\.py", " ".join(LEFT_OUT.values())):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.text)
def test_the_program_of_a_command_takes_its_options(command: Command):
    check_command(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_name_programs_that_exist(page: Path):
    for text in re.findall(r"`((?:python|make) [^`]+)`", page.read_text(encoding="utf-8")):
        words = text.split()
        if words[0] == "make":
            check_command(Command(page.name, text))
        elif words[1] == "-m":
            module_of(words[2])
        else:
            assert (ROOT / words[1]).exists(), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python train.py --config yaml_files/no_such.yaml", "does not exist"),
        ("python train.py --confg yaml_files/sudoku_puma.yaml", "refuses its options"),
        ("python train.py --config yaml_files/sudoku_puma.yaml training.sed=1", "did you mean 'seed'"),
        ("python -m report.curve runs/a", "no module report.curve"),
        ("python -m runtime.launch train.py --config", "refuses its options"),
        ("sbatch job.sh --config yaml_files/sudoku_puma.yaml --config yaml_files/none.yaml", "does not exist"),
        ("make trian", "trian"),
        ("./job.sh", "is not a program that this check knows"),
    ],
)
def test_a_wrong_command_is_found(text, message):
    with pytest.raises(ValueError, match=message):
        check_command(Command("page", text))


def test_commands_are_lines_of_blocks_without_a_language():
    text = "```\na b  # c\n\nd \\\n  e\n```\ntext\n```python\nf\n```\n```bash\n# g\nh#i\n```\n"
    assert [command.text.split() for command in fenced_commands(text, "page")] == [["a", "b"], ["d", "e"], ["h#i"]]


@pytest.mark.parametrize("path", sorted((ROOT / "yaml_files").glob("*.yaml")), ids=lambda path: path.stem)
def test_small_settings_are_valid_and_of_the_same_experiment(path: Path):
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    small = small_settings(settings)
    parse_config(small, path.name)
    assert small["objective"] == settings["objective"]
