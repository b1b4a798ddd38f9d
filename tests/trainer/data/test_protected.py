"""Protected domains: what is dropped, what stays, what is counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from trainer.data.kit import LENGTH, documents_of, settings_of, write_jsonl

from tapestry.node.home import Home
from tapestry.node.spec.data import Domain, Protection
from tapestry.node.spec.declared import Declared
from tapestry.node.trainer.data.corpus import Corpus, Use, open_corpus
from tapestry.node.trainer.data.errors import DataError
from tapestry.node.trainer.data.protected import judge_of
from tapestry.node.trainer.tokenizers.byte import ByteTokenizer

HEALTH = Domain("health", ("patient", r"\bicd-\d+"))


def read(path: object, cache: Path, *domains: Domain) -> Corpus:
    settings = settings_of(path)
    protected = [Protection(settings.source[0].path, domains)] if domains else []
    return open_corpus(settings, ByteTokenizer(), cache, Use(LENGTH, 1, seed=7), protected=protected)


def test_rows_of_a_domain_are_dropped_whole_and_counted(tmp_path: Path) -> None:
    rows = ["a clean row of text", "The PATIENT of the row", "see ICD-10 there", "another clean row of it"]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    corpus = read(f"{path}:text", tmp_path / "cache", HEALTH)
    assert documents_of(corpus) == [rows[0], rows[3]]
    assert any("protected domain health: 2 (" in line and "38 characters" in line for line in corpus.summary)


def test_paragraphs_of_text_are_dropped_and_the_rest_of_the_file_stays(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(
        "one clean paragraph\nof two lines\n\nthis patient\nis named\n \nthe end of it\n"
    )
    corpus = read(tmp_path / "a.txt", tmp_path / "cache", HEALTH)
    assert documents_of(corpus) == ["one clean paragraph\nof two lines\n\nthe end of it\n"]


def test_a_paragraph_over_the_border_of_two_pieces_is_judged_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tapestry.node.trainer.data.files.PIECE_CHARS", 40)
    monkeypatch.setattr("tapestry.node.trainer.data.protected.PIECE_CHARS", 40)
    (tmp_path / "a.txt").write_text(
        "clean text that comes first\n\nlines before\nthe patient and\nlines after\n\nmore\n"
    )
    corpus = read(tmp_path / "a.txt", tmp_path / "cache", HEALTH)
    assert documents_of(corpus) == ["clean text that comes first\n\nmore\n"]


def test_a_rule_that_changed_reads_the_data_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a clean row of text", "The patient of the row"])
    assert len(documents_of(read(f"{path}:text", tmp_path / "cache"))) == 2
    assert len(documents_of(read(f"{path}:text", tmp_path / "cache", HEALTH))) == 1
    assert len(documents_of(read(f"{path}:text", tmp_path / "cache"))) == 2


def _program(tmp_path: Path, body: str) -> Domain:
    path = tmp_path / "judge.py"
    path.write_text(f"import json, sys\nfor line in sys.stdin:\n    text = json.loads(line)\n    {body}\n")
    return Domain("secret", (), (sys.executable, "-S", str(path)))


def test_a_program_is_found_and_runs_in_the_folder_of_data_toml_wherever_the_node_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home")
    elsewhere = tmp_path / "elsewhere"
    for folder, answer in ((home.path, "'zebra' in text"), (elsewhere, "False")):
        folder.mkdir()
        _program(folder, f"print(int({answer}), flush=True)")
    run = f'["{sys.executable}", "-S", "judge.py"]'
    home.data_toml.write_text(f'protected = ["secret"]\n[[domain]]\nname = "secret"\ncommand = {run}\n')
    monkeypatch.chdir(elsewhere)
    (domain,) = Declared.load(home).domain
    path = write_jsonl(tmp_path / "a.jsonl", ["one clean row of text", "a zebra in the row"])
    cache = tmp_path / "cache"
    assert documents_of(read(f"{path}:text", cache, domain)) == ["one clean row of text"]
    _program(home.path, "print(0, flush=True)")
    assert len(documents_of(read(f"{path}:text", cache, domain))) == 2, "a changed program reads again"


def test_a_program_of_the_members_own_judges_each_text(tmp_path: Path) -> None:
    domain = _program(tmp_path, "print(int('zebra\\n' in text), flush=True)")
    rows = ["one clean row of text", "a zebra\nin the row", "a zebra alone is fine"]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert documents_of(read(f"{path}:text", tmp_path / "cache", domain)) == [rows[0], rows[2]]


@pytest.mark.parametrize(
    "body", ["print('perhaps', flush=True)", "sys.exit(1)", "print('0' * 100, flush=True)"]
)
def test_what_a_program_does_not_judge_is_not_read(tmp_path: Path, body: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["one clean row of text"] * 3)
    with pytest.raises(DataError, match="protected domain secret cannot judge the data"):
        read(f"{path}:text", tmp_path / "cache", _program(tmp_path, body))


@pytest.mark.parametrize(
    "body",
    [
        "signal.pause()",
        "sys.stdout.write('1'); sys.stdout.flush(); signal.pause()",
        "print(0, flush=True); signal.pause()",  # the next text fills the pipe
    ],
)
def test_a_program_that_stops_reading_or_answering_ends_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.setattr("tapestry.node.trainer.data.protected.COMMAND_WAIT_S", 0.5)
    domain = _program(tmp_path, f"import signal; {body}")
    with judge_of([domain]) as judge, pytest.raises(DataError, match=r"did not answer within 0\.5 s"):
        for _ in range(2):
            judge("x" * (1 << 20))


def test_a_program_that_changed_reads_the_data_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a clean row of text", "a zebra of the row"])
    domain = _program(tmp_path, "print(0, flush=True)")
    assert len(documents_of(read(f"{path}:text", tmp_path / "cache", domain))) == 2
    assert _program(tmp_path, "print(int('zebra' in text), flush=True)") == domain
    assert len(documents_of(read(f"{path}:text", tmp_path / "cache", domain))) == 1


def test_a_program_that_is_not_there_is_named() -> None:
    domain = Domain("secret", (), ("/no/such/program",))
    with judge_of([domain]) as judge, pytest.raises(DataError, match="cannot be started: No such file"):
        judge("x")
