"""Each format gives its documents, whatever packs and encodes them; what is bad is counted and named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from trainer.data.kit import corpus_of, documents_of, settings_of, write_jsonl

from tapestry.node.spec.data import DataSettings, SourceSettings
from tapestry.node.trainer.data.errors import DataError

TEXTS = [f"document {number}: größer, 大きい" for number in range(30)]


def _jsonl(root: Path) -> str:
    return f"{write_jsonl(root / 'a.jsonl', TEXTS)}:text"


def _jsonl_gz(root: Path) -> str:
    path = root / "a.jsonl.gz"
    path.write_bytes(gzip.compress(write_jsonl(root / "plain", TEXTS).read_bytes()))
    return f"{path}:text"


def _jsonl_zst_in_two_frames(root: Path) -> str:
    data = write_jsonl(root / "plain", TEXTS).read_bytes()
    pack = zstandard.ZstdCompressor().compress
    (root / "a.ndjson.zst").write_bytes(pack(data[:500]) + pack(data[500:]))
    return f"{root / 'a.ndjson.zst'}:text"


def _csv(root: Path) -> str:
    rows = "".join(f'{number},"{text}"\n' for number, text in enumerate(TEXTS))
    (root / "a.csv").write_text("n,text\n" + rows)
    return f"{root / 'a.csv'}:text"


def _csv_of_europe(root: Path) -> str:
    """Semicolons, a mark, Windows line ends."""
    rows = "".join(f"{number};{text}\r\n" for number, text in enumerate(TEXTS))
    (root / "a.csv").write_bytes(("n;text\r\n" + rows).encode("utf-8-sig"))
    return f"{root / 'a.csv'}:text"


def _tsv(root: Path) -> str:
    (root / "a.tsv").write_text("n\ttext\n" + "".join(f"1\t{text}\n" for text in TEXTS))
    return f"{root / 'a.tsv'}:text"


def _json(root: Path) -> str:
    """As hubs export it, c4-train.00000.json.gz."""
    (root / "a.json.gz").write_bytes(gzip.compress(write_jsonl(root / "plain", TEXTS).read_bytes()))
    return f"{root / 'a.json.gz'}:text"


def _tsv_all_in_quotes(root: Path) -> str:
    (root / "a.tsv").write_text('"n"\t"text"\n' + "".join(f'"1"\t"{text}"\n' for text in TEXTS))
    return f"{root / 'a.tsv'}:text"


def _table(field: str = "text") -> pyarrow.Table:
    return pyarrow.table({"n": list(range(len(TEXTS))), field: TEXTS})


def _parquet(root: Path) -> str:
    pyarrow.parquet.write_table(_table(), root / "a.parquet", row_group_size=7)
    return f"{root / 'a.parquet'}:text"


def _nested_parquet(root: Path) -> str:
    rows = [{"body": {"text": text}} for text in TEXTS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "a.parquet")
    return f"{root / 'a.parquet'}:body.text"


def _arrow_stream(root: Path) -> str:
    with pyarrow.ipc.new_stream(root / "a.arrow", _table().schema) as out:
        out.write_table(_table(), max_chunksize=7)
    return f"{root / 'a.arrow'}:text"


def _arrow_file(root: Path) -> str:
    pyarrow.feather.write_feather(_table(), root / "a.feather")
    return f"{root / 'a.feather'}:text"


def _saved_dataset(root: Path) -> str:
    """What `datasets` writes with save_to_disk: see its state.json."""
    for split, texts in (("train", TEXTS), ("test", ["not to be trained on"] * 30)):
        folder = root / "saved" / split
        folder.mkdir(parents=True)
        table = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as out:
            out.write_table(table)
        with pyarrow.ipc.new_stream(folder / "cache-abc.arrow", table.schema) as out:
            out.write_table(table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
    (root / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return f"{root / 'saved'}:text"


@pytest.mark.parametrize(
    "make",
    [
        _jsonl,
        _jsonl_gz,
        _jsonl_zst_in_two_frames,
        _csv,
        _csv_of_europe,
        _tsv,
        _tsv_all_in_quotes,
        _json,
        _parquet,
        _nested_parquet,
        _arrow_stream,
        _arrow_file,
        _saved_dataset,
    ],
)
def test_every_table_gives_the_text_of_its_field_row_by_row(
    tmp_path: Path, make: Callable[[Path], str]
) -> None:
    corpus = corpus_of(settings_of(make(tmp_path)), tmp_path / "cache")
    assert documents_of(corpus) == TEXTS


def test_a_quote_at_the_beginning_of_a_tsv_s_cell_swallows_no_rows(tmp_path: Path) -> None:
    """Three rows were one document, with their numbers and tabs in it, and were not counted as malformed."""
    texts = ['"Hello," she said', "no quote", 'he said "ha"', '"Hello"', 'a "quoted" word', "last"]
    written = [*texts[:4], '"a ""quoted"" word"', "last"]
    lines = [f"{number}\t{text}\n" for number, text in enumerate(written)]
    (tmp_path / "a.tsv").write_text("n\ttext\n" + "".join(lines))
    corpus = corpus_of(settings_of(f"{tmp_path / 'a.tsv'}:text"), tmp_path / "cache")
    assert documents_of(corpus) == texts
    (tmp_path / "a.tsv").write_text('n\ttext\n1\t"one\nmore"\n2\ttwo\textra\n')
    with pytest.raises(DataError, match=r"66\.7% is malformed or has no text, of 3 rows"):
        corpus_of(settings_of(f"{tmp_path / 'a.tsv'}:text"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", "größer".encode() * 20),
        ("a", "größer".encode() * 20),
        ("a.1", "größer".encode() * 20),
        ("a.txt", ("größer" * 20).encode("utf-8-sig")),
        ("a.txt", ("größer" * 20).encode("utf-16")),
        ("a.txt", b"\xfe\xff" + ("größer" * 20).encode("utf-16-be")),
        ("a.txt", ("größer" * 20).encode("utf-32")),
        ("ls.1.gz", gzip.compress("größer".encode() * 20)),
        ("a.md.zst", zstandard.ZstdCompressor().compress("größer".encode() * 20)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_text_is_read_whatever_its_name_its_mark_and_its_packing(
    tmp_path: Path, name: str, data: bytes
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    for source in (tmp_path / "in", tmp_path / "in" / name):
        corpus = corpus_of(settings_of(source), tmp_path / "cache")
        assert documents_of(corpus) == ["größer" * 20]


@pytest.mark.parametrize("encoding", ["", "utf-8", "UTF8"])
@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.txt", lambda data: data),
        ("a.txt.gz", gzip.compress),
        ("a.jsonl:text", lambda data: data),
        ("a.jsonl.gz:text", gzip.compress),
        ("a.json:text", lambda data: data),
        ("a.csv:text", lambda data: data),
        ("a.tsv:text", lambda data: data),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_byte_order_mark_and_the_line_ends_of_windows_lose_nothing_of_the_first_row(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes], encoding: str
) -> None:
    file, _, field = name.partition(":")
    rows = {
        "txt": "größer und größer",
        "jsonl": "".join(json.dumps({"text": text, "n": 1}) + "\r\n" for text in TEXTS),
        "csv": "text,n\r\n" + "".join(f'"{text}","1"\r\n' for text in TEXTS),
        "tsv": "text\tn\r\n" + "".join(f"{text}\t1\r\n" for text in TEXTS),
    }
    rows["json"] = rows["jsonl"]
    written = pack(rows[file.split(".")[1]].encode("utf-8-sig"))
    (tmp_path / file).write_bytes(written)
    source = SourceSettings(path=str(tmp_path / file), field=field, name="a", encoding=encoding)
    corpus = corpus_of(DataSettings(source=(source,)), tmp_path / "cache")
    assert documents_of(corpus) == (TEXTS if field else [rows["txt"]])
    assert not any("malformed" in line or "without text" in line for line in corpus.summary)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_of_a_field_that_no_row_has_those_that_there_are_are_named(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    _csv(tmp_path)
    _parquet(tmp_path)
    with pytest.raises(DataError, match=r"no row has text in the field txt \(there are: n, text\)$"):
        corpus_of(settings_of(f"{tmp_path / name}:txt"), tmp_path / "cache")


JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 40
FRENCH = "Été à la forêt: où êtes-vous, garçon? Très élégant, déjà goûté.\n" * 40


@pytest.mark.parametrize(
    ("text", "encoding"), [(FRENCH, "latin-1"), (JAPANESE, "shift_jis"), (JAPANESE, "euc_jp")]
)
def test_text_in_another_encoding_is_recognised_and_read_once_that_is_said(
    tmp_path: Path, text: str, encoding: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=r"not UTF-8, perhaps .*: say which as encoding = "):
        corpus_of(settings_of(path), tmp_path / "cache")
    source = {"path": str(path), "encoding": encoding}
    settings = settings_of(path)
    told = type(settings.source[0])(name="a", **source)
    corpus = corpus_of(type(settings)(source=(told,)), tmp_path / "cache")
    assert documents_of(corpus) == [text]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_utf_16_without_its_mark_is_said_in_a_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    text = f'{{"text": "{FRENCH[:60]}"}}\n' * 40 if name == "a.jsonl" else f"text\n{FRENCH}"
    path.write_bytes(text.encode("utf-16-le"))
    field = "" if name == "a.txt" else "text"
    for encoding, line in (("utf-16", "not utf-16: .* does not start with BOM"), ("idna", "not idna: ")):
        source = SourceSettings(path=str(path), field=field, name="a", encoding=encoding)
        with pytest.raises(DataError, match=line) as caught:
            corpus_of(DataSettings(source=(source,)), tmp_path / "cache")
        assert "\n" not in str(caught.value)
    source = SourceSettings(path=str(path), field=field, name="a", encoding="utf-16-le")
    if name == "a.txt":
        assert documents_of(corpus_of(DataSettings(source=(source,)), tmp_path / "cache")) == [text]


def test_a_little_damage_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("größer ".encode() * 500 + b"\xff" + "größer".encode() * 500)
    corpus = corpus_of(settings_of(tmp_path / "a.txt"), tmp_path / "cache")
    assert "\ufffd" in documents_of(corpus)[0]
    assert any("characters that are not of the encoding, replaced: 1 " in line for line in corpus.summary)


def test_bad_rows_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 40)
    with path.open("a") as file:
        file.write('{"text": 5}\n{"other": "x"}\n{"text": "half\n[1, 2]\n\n{"text": ""}\n')
    corpus = corpus_of(settings_of(f"{path}:text"), tmp_path / "cache")
    assert documents_of(corpus) == TEXTS * 40
    lines = "\n".join(corpus.summary)
    assert f"rows without text in the field: 3 ({path}:1201, {path}:1202, {path}:1204)" in lines
    assert f"malformed rows: 1 ({path}:1203)" in lines


def test_more_bad_rows_than_is_allowed_are_refused_with_the_flag_that_allows_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with path.open("a") as file:
        file.write('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"3\.2% is malformed .* --allow-doubtful-data") as caught:
        corpus_of(settings_of(f"{path}:text"), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    allowed = corpus_of(settings_of(f"{path}:text", allow_doubtful=True), tmp_path / "cache")
    assert documents_of(allowed) == TEXTS


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("n,text", ["1,cut, here", "2,whole,,"]),  # a comma that was written without quotes
        ("text,n", ["1,row names have no title,2", "whole,2"]),  # as R writes row names
    ],
)
def test_a_row_of_a_csv_with_more_cells_than_its_header_is_malformed(
    tmp_path: Path, header: str, rows: list[str]
) -> None:
    path = tmp_path / "a.csv"
    good = [f'{n},"{TEXTS[0]}"' if header == "n,text" else f'"{TEXTS[0]}",{n}' for n in range(99)]
    path.write_text("\n".join([header, *good, *rows]) + "\n")
    corpus = corpus_of(settings_of(f"{path}:text"), tmp_path / "cache")
    assert documents_of(corpus) == [TEXTS[0]] * 99 + ["whole"]
    assert f"malformed rows: 1 ({path}:101)" in "\n".join(corpus.summary)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_row_of_a_table_whose_text_is_not_utf_8_is_malformed(tmp_path: Path, name: str) -> None:
    texts = [text.encode() for text in TEXTS * 5] + [b"broken \xff\xfe", b"after"]
    ends = numpy.cumsum([0, *map(len, texts)], dtype=numpy.int32)
    column = pyarrow.Array.from_buffers(
        pyarrow.string(),
        len(texts),
        [None, pyarrow.py_buffer(ends.tobytes()), pyarrow.py_buffer(b"".join(texts))],
    )
    table = pyarrow.table({"text": column})
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_stream(str(tmp_path / name), table.schema) as stream:
            stream.write_table(table)
    corpus = corpus_of(settings_of(f"{tmp_path / name}:text"), tmp_path / "cache")
    assert documents_of(corpus) == [*TEXTS * 5, "after"]
    assert f"malformed rows: 1 ({tmp_path / name}:151)" in "\n".join(corpus.summary)


def test_half_a_surrogate_pair_is_no_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b \\ud83d\\ude00' + "x" * 2000 + '"}\n')
    corpus = corpus_of(settings_of(f"{tmp_path / 'a.jsonl'}:text"), tmp_path / "cache")
    assert documents_of(corpus)[0].startswith("a\ufffd b 😀x")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.arrow", "a.jsonl.zst"])
def test_a_file_that_breaks_off_gives_what_came_before_and_is_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    makers = {
        "a.jsonl.gz": _jsonl_gz,
        "a.parquet": _parquet,
        "a.arrow": _arrow_stream,
        "a.jsonl.zst": _jsonl_zst_in_two_frames,
    }
    whole = Path(makers[name](tmp_path).rpartition(":")[0]).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) * 2 // 3])
    write_jsonl(folder / "b.jsonl", TEXTS * 9)
    corpus = corpus_of(settings_of(f"{folder}:text"), tmp_path / "cache")
    assert documents_of(corpus)[-9 * len(TEXTS) :] == TEXTS * 9
    assert any("files that break off: 1 " in line and name in line for line in corpus.summary)


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _parquet(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"to read parquet, pip install 'tapestry-node\[data\]'"):
        corpus_of(settings_of(source), tmp_path / "cache")
