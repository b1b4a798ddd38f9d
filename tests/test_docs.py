"""What the documents tell people to type exists: commands, flags, files and links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from tapestry.node.cli.main import cli
from tapestry.node.errors import ExitCode
from tapestry.node.lineage.egress import KINDS, RULES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def typed(text: str) -> list[list[str]]:
    """The words of each `tapestry ...` that stands in a block of code."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    commands = []
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                continue
            if words and words[0] in ("sudo", "podman"):  # as somebody, or somewhere, else
                last = [i for i, w in enumerate(words[:-1]) if w == "tapestry" and words[i + 1].isalpha()]
                words = words[last[-1] :] if last else []
            end = next((i for i, w in enumerate(words) if w in ("|", "&&", ">", ";", "&")), len(words))
            if len(words) > 1 and words[0] == "tapestry" and re.fullmatch(r"[a-z][a-z-]*", words[1]):
                commands.append(words[1:end])
    return commands


def fault(words: list[str]) -> str:
    """What is wrong with a command line, without running it."""
    context = click.Context(cli)
    command = cli.get_command(context, words[0])
    if command is None:
        return f"there is no command {words[0]}"
    rest = words[1:]
    if isinstance(command, click.Group):
        command, rest = command.get_command(context, rest[0] if rest else ""), rest[1:]
        if command is None:
            return f"{words[0]} has no such part"
    try:
        command.make_parser(click.Context(command)).parse_args(rest)
    except click.UsageError as error:
        return error.format_message()
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_on_a_page_are_those_of_this_version(page: Path) -> None:
    faults = {" ".join(words): why for words in typed(page.read_text()) if (why := fault(words))}
    assert faults == {}


def test_the_check_of_commands_can_fail() -> None:
    text = "```\ntapestry start --hone x \\\n  --data y\n```\n\n    sudo -u a tapestry stops | cat\n"
    assert [bool(fault(words)) for words in typed(text)] == [True, True]
    assert fault(["status", "--json"]) == "" and len(typed((ROOT / "docs/operating.md").read_text())) > 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_to_files_and_headings(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        found = page if not path else page.parent / path
        if not found.exists() or (heading and heading not in headings(found)):
            missing.append(target)
    assert missing == []


def headings(page: Path) -> set[str]:
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_every_exit_code_is_in_the_tables_of_operating_md() -> None:
    table = re.findall(r"^\| (\d+) \|", (ROOT / "docs/operating.md").read_text(), re.MULTILINE)
    assert [int(code) for code in table] == [int(code) for code in ExitCode]


def test_every_decision_is_headed_by_the_number_of_its_file() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    wrong = [page.name for page in pages if not page.read_text().startswith(f"# {page.name[:3]}: ")]
    assert len(pages) > 20 and wrong == []


def test_every_kind_of_traffic_is_in_the_table_of_lineage_md_with_its_rule() -> None:
    _, _, section = (ROOT / "docs/lineage.md").read_text().partition("## What left the node\n")
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(\w+)`", section.partition("\n## ")[0], re.MULTILINE)
    assert dict(rows) == RULES and tuple(RULES) == KINDS


def test_the_readme_shows_the_way_from_the_base_to_a_model_of_ones_own_and_out() -> None:
    shown = {words[0] for words in typed((ROOT / "README.md").read_text())}
    assert shown >= {"derive", "evaluate", "rebase", "export", "anchor", "exit", "verify"}
