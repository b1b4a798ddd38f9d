"""node.toml, environment and flags: precedence, paths, strictness."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tapestry.node.errors import ExitCode, UserError
from tapestry.node.home import Home
from tapestry.node.sovereign.gates import Gates
from tapestry.node.sovereign.recipe import load_recipe
from tapestry.node.spec.data import DataSettings, SourceSettings, ValidationSettings
from tapestry.node.spec.declared import Declared
from tapestry.node.spec.invitation import Invitation
from tapestry.node.spec.listen import Listening, write_listening
from tapestry.node.spec.node import ENDLESS, Ending, NodeConfig, NodeToml
from tapestry.node.spec.run import RunSpec, preset_spec
from tapestry.node.spec.tables import read_table

PEER = "/ip4/203.0.113.7/tcp/4001/p2p/12D3KooWSahP5pFRCEfaziPEba7urXGeif6T1y8jmodzdFUvzBHj"
GIVEN = {"data": ("stdlib",)}


def _resolve(home: Path, env: dict[str, str] | None = None, **flags: Any) -> NodeConfig:
    return NodeConfig.resolve(Home(home), GIVEN | flags, env or {})


def test_with_nothing_said_the_defaults_hold(tmp_path: Path) -> None:
    config = _resolve(tmp_path)
    assert (config.http_host, config.http_port) == ("127.0.0.1", 9470)
    assert config.listen == ("/ip4/0.0.0.0/tcp/0",)
    assert config.run is None and config.run_id is None and config.ending == ENDLESS
    assert config.peers == config.announce == ()
    assert (config.device, config.log_format) == ("auto", "text")
    assert config.threads == len(os.sched_getaffinity(0))


def test_flags_override_the_environment_which_overrides_node_toml_which_overrides_defaults(
    tmp_path: Path,
) -> None:
    (tmp_path / "node.toml").write_text('http = "127.0.0.1:1"\ndevice = "cpu"\nthreads = 3\n')
    env = {"TAPESTRY_HTTP": "127.0.0.1:2", "TAPESTRY_LOG_FORMAT": "json"}
    assert _resolve(tmp_path).http_port == 1
    assert _resolve(tmp_path, env).http_port == 2
    config = _resolve(tmp_path, env, http="127.0.0.1:3")
    assert (config.http_port, config.device, config.threads, config.log_format) == (3, "cpu", 3, "json")


def _started(home: Path, **flags: Any) -> NodeConfig:
    """As a start leaves its home."""
    config = _resolve(home, **flags)
    last = Listening(config.listen, config.announce, config.listen_said, ())
    write_listening(config.home, last)
    return config


def test_where_a_start_was_told_to_listen_holds_for_the_next_ones_until_it_is_told_otherwise(
    tmp_path: Path,
) -> None:
    here, everywhere = ("/ip4/127.0.0.1/tcp/4001",), ("/ip4/0.0.0.0/tcp/0",)
    outer = ("/ip4/203.0.113.7/tcp/4001",)
    (tmp_path / "node.toml").write_text(NodeToml().to_toml())  # as `init` writes it
    assert _started(tmp_path, listen=here).kept == ()
    kept = _started(tmp_path)
    assert (kept.listen, kept.announce, kept.kept) == (here, (), ("--listen /ip4/127.0.0.1/tcp/4001",))
    assert _started(tmp_path, announce=outer).listen == here
    again = _started(tmp_path)
    assert (again.listen, again.announce) == (here, outer)
    assert again.kept == ("--listen /ip4/127.0.0.1/tcp/4001", "--announce /ip4/203.0.113.7/tcp/4001")
    assert _started(tmp_path, island=True).kept == ()
    _started(tmp_path, listen=here)
    assert _started(tmp_path).announce == ()  # what was announced was of the address before
    assert _started(tmp_path, listen=everywhere).listen == everywhere
    assert (_started(tmp_path).listen, _started(tmp_path).kept) == (everywhere, ())


def test_an_address_that_is_written_into_node_toml_goes_before_a_flag_of_before(tmp_path: Path) -> None:
    _started(tmp_path, listen=("/ip4/127.0.0.1/tcp/4001",))
    (tmp_path / "node.toml").write_text('listen = ["/ip4/127.0.0.1/tcp/5001"]\n')
    assert (_started(tmp_path).listen, _started(tmp_path).kept) == (("/ip4/127.0.0.1/tcp/5001",), ())


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '{"asked": ["x"], "bound": []}', '{"asked": ["/ip4/127.0.0.1/tcp/1"], "bound": []}'],
)
def test_a_listen_json_that_is_damaged_or_older_keeps_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "listen.json").write_text(text)
    assert _resolve(tmp_path).listen == ("/ip4/0.0.0.0/tcp/0",)


def test_a_byte_order_mark_before_any_of_our_files_is_no_mistake(tmp_path: Path) -> None:
    """Editors on Windows write one."""

    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8-sig")
        assert path.read_bytes().startswith(b"\xef\xbb\xbf")
        return path

    written("node.toml", "threads = 3\n")
    assert _resolve(tmp_path).threads == 3
    spec = preset_spec("nano", "Tiếng Việt")
    assert RunSpec.load(written("run.toml", spec.to_toml())) == spec
    source = '[[source]]\npath = "/corpus"\nowner = "the library"\nlicence = "CC-BY-4.0"\nmode = "open"\n'
    source += 'purposes = ["base"]\n'
    written("data.toml", source)
    assert [one.owner for one in Declared.load(Home(tmp_path)).source] == ["the library"]
    assert Gates.load(written("gates.toml", "gain_kept_min = 0.5\n")).gain_kept_min == 0.5
    recipe = written("recipe.toml", 'stage = "sft"\nmethod = "lora"\ndata = ["x.jsonl"]\n')
    assert load_recipe(recipe, {}).stage == "sft"


def test_an_empty_variable_and_a_flag_that_is_not_given_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('http = "127.0.0.1:1"\n')
    assert _resolve(tmp_path, {"TAPESTRY_HTTP": ""}, http=None, peers=()).http_port == 1


def test_paths_in_node_toml_start_at_the_home_and_those_in_flags_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for directory in (home, here):
        directory.mkdir()
        (directory / "spec.toml").touch()
    monkeypatch.chdir(here)
    (home / "node.toml").write_text(
        'run = "spec.toml"\ndata = ["texts", "a.jsonl:body", "stdlib:1/3", "/d"]\n'
    )
    from_file = _resolve(home, data=())
    assert from_file.run == home / "spec.toml"
    assert [(one.path, one.field, one.name) for one in from_file.data.source] == [
        (f"{home}/texts", "", "texts"),
        (f"{home}/a.jsonl", "body", "a"),
        ("stdlib:1/3", "", "stdlib-1-3"),
        ("/d", "", "d"),
    ]
    from_flags = _resolve(home, run="spec.toml", data=("texts", "stdlib"))
    assert from_flags.run == here / "spec.toml"
    assert [one.path for one in from_flags.data.source] == [f"{here}/texts", "stdlib"]


NODE_TOML = """
[data]
rehearsal_share = 0.2
left_out_max = 0.1

[[data.source]]
path = "fr"
name = "français"
weight = 2
encoding = "latin-1"

[[data.source]]
path = "old.parquet:text"
rehearsal = true

[[data.validation]]
path = "/held:text"
name = "held"
"""


def test_node_toml_says_everything_about_data_and_flags_go_before_it(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text(NODE_TOML)
    data = _resolve(tmp_path, data=()).data
    assert (data.rehearsal_share, data.left_out_max, data.paths) == (0.2, 0.1, ())
    french, old = data.source
    assert (french.name, french.weight, french.encoding) == ("français", 2.0, "latin-1")
    assert (old.path, old.field, old.name, old.rehearsal) == (f"{tmp_path}/old.parquet", "text", "old", True)
    assert [(one.name, one.path, one.field) for one in data.validation] == [("held", "/held", "text")]
    with pytest.raises(UserError, match="rehearsal_share and the sources with rehearsal = true do not fit"):
        _resolve(tmp_path, data=("stdlib",))
    (tmp_path / "node.toml").write_text(NODE_TOML.replace("rehearsal", "# rehearsal"))
    flags = {"data": ("/x:y", "/x:z"), "validation": ("seen=/s:t", "/u"), "allow_doubtful_data": True}
    told = _resolve(tmp_path, **flags).data
    assert [(one.path, one.field, one.name) for one in told.source] == [("/x", "y", "x"), ("/x", "z", "x-2")]
    assert [(one.name, one.path, one.field) for one in told.validation] == [
        ("seen", "/s", "t"),
        ("u", "/u", ""),
    ]
    assert told.allow_doubtful and told.left_out_max == 0.1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[data]\nsource = ["a"]', r"data\.source\[1\]: \"a\" is not a table"),
        ('[[data.source]]\npath = "a"\nwieght = 2', r"did you mean data\.source\[1\]\.weight"),
        ('[[data.source]]\nname = "a"', r"data\.source\[1\]\.path: missing"),
        ('[[data.source]]\npath = "a"\nencoding = "latin-99"', "there is no encoding 'latin-99'"),
        ('[[data.source]]\npath = "a"\nweight = 0', "above 0"),
        ("data = 5", "not a table"),
    ],
)
def test_a_mistake_about_data_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "node.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        NodeConfig.resolve(Home(tmp_path), {}, {})


def test_run_toml_in_the_home_is_found_without_being_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").touch()
    assert _resolve(tmp_path).run == tmp_path / "run.toml"


def test_a_run_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--run: there is no file .*/none\.toml"):
        _resolve(tmp_path, run="/none.toml")


def test_no_data_is_refused_with_the_flag_to_use(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data to train on") as caught:
        NodeConfig.resolve(Home(tmp_path), {}, {})
    assert caught.value.exit_code == ExitCode.USAGE
    hint = caught.value.hint
    assert hint is not None and "--data PATH" in hint and "paths = [...] below [data]" in hint


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("localhost:80", "localhost", 80),
        ("[::1]:65535", "::1", 65535),
        ("node-1.example.org:9470", "node-1.example.org", 9470),
    ],
)
def test_http_is_host_and_port(tmp_path: Path, text: str, host: str, port: int) -> None:
    config = _resolve(tmp_path, http=text)
    assert (config.http_host, config.http_port) == (host, port)


@pytest.mark.parametrize(
    "text",
    ["", "9470", ":9470", "localhost", "::1:80", "[::1", "a:65536", "a:-1", "a:b", "http://a:1", "[:]:1"],
)
def test_what_is_not_host_and_port_is_refused_by_its_flag(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="--http: ") as caught:
        _resolve(tmp_path, http=text)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("htpp = 1", "htpp: unknown key; did you mean http?"),
        ("peer = []", "peer: unknown key; did you mean peers?"),
        ("zzz = 1", "zzz: unknown key; known here: run, base, peers, listen"),
        ("data = 'stdlib'", 'data: "stdlib" is not a table'),
        ("data = [1]", "data.paths: 1 is not a string"),
        ("threads = -1", "threads: -1 is not an integer from 0 to 1024"),
        ("device = 'tpu'", 'device: "tpu" is not a string of the form auto, cpu, cuda'),
        ("http = 9470", "http: 9470 is not a string"),
        ("http = '9470'", "http: '9470' is not HOST:PORT"),
        ("peers = ['/ip4/1.2.3.4/tcp/1']", "peers: '/ip4/1.2.3.4/tcp/1' does not say which peer is there"),
        ("listen = ['127.0.0.1:4001']", "listen: '127.0.0.1:4001' is host:port; as a multiaddr it is"),
        ("announce = ['/ip4/1.2.3.4/tcp/0']", "announce: '/ip4/1.2.3.4/tcp/0' announces port 0"),
        ("run = 'none.toml'", "run: there is no file"),
        ("max_uplod = '1mbit'", "max_uplod: unknown key; did you mean max_upload?"),
        ("max_upload = 20", "max_upload: 20 is not a string of digits and kbit, mbit or gbit"),
        ("max_upload = false", "max_upload: false is not a string of digits and kbit"),
        ("max_upload = '20MB'", 'max_upload: "20MB" is not a string of digits and kbit, mbit or gbit'),
        ("max_download = '-1mbit'", 'max_download: "-1mbit" is not a string of digits'),
        ("max_download = '999kbit'", "max_download: 999kbit is not from 1mbit to 1000gbit"),
        ("max_download = '1001gbit'", "max_download: 1001gbit is not from 1mbit to 1000gbit"),
    ],
)
def test_a_mistake_in_node_toml_is_named_with_file_and_key(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "node.toml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        _resolve(tmp_path)
    assert caught.value.line.startswith(f"{path}: {message}")
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_mistake_in_node_toml_is_found_also_where_a_flag_overrides_it(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text("device = 'tpu'")
    with pytest.raises(UserError, match=r"node\.toml: device"):
        _resolve(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"peers": ("localhost:4001",)}, "--peer: 'localhost:4001' is host:port"),
        ({"listen": ("/ip4/1.2.3.4",)}, "--listen: '/ip4/1.2.3.4' has no port"),
        ({"announce": ("/ip4/0.0.0.0/tcp/1",)}, "--announce: '/ip4/0.0.0.0/tcp/1' is no address"),
        ({"run_id": "abc"}, "--run-id: 'abc' is not a run id, which has 64 hex digits"),
        ({"max_upload": "fast"}, '--max-upload: "fast" is not a string of digits and kbit, mbit or gbit'),
        ({"max_download": "1kbit"}, "--max-download: 1kbit is not from 1mbit to 1000gbit"),
        ({"epochs": 0}, "--epochs: 0 is not a positive number"),
    ],
)
def test_a_mistake_in_a_flag_is_named_by_the_flag(
    tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        _resolve(tmp_path, **flags)
    assert caught.value.line.startswith(message)


def test_a_mistake_in_the_environment_is_named_by_the_variable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='TAPESTRY_DEVICE: "tpu" is not'):
        _resolve(tmp_path, {"TAPESTRY_DEVICE": "tpu"})


def test_addresses_run_id_and_epochs_are_kept_as_given(tmp_path: Path) -> None:
    config = _resolve(
        tmp_path,
        peers=(PEER,),
        listen=("/ip4/127.0.0.1/tcp/0",),
        announce=("/dns4/example.org/tcp/4001",),
        run_id="ab" * 32,
        epochs=3,
    )
    assert config.peers == (PEER,)
    assert config.listen == ("/ip4/127.0.0.1/tcp/0",)
    assert config.announce == ("/dns4/example.org/tcp/4001",)
    assert (config.run_id, config.ending) == ("ab" * 32, Ending(epochs=3))


@pytest.mark.parametrize(
    ("text", "bytes_per_second"),
    [
        ("", None),
        ("0", None),
        ("1mbit", 125_000),
        ("1500kbit", 187_500),
        ("20mbit", 2.5e6),
        ("2.5 gbit", 312.5e6),
        ("1000gbit", 125e9),
    ],
)
def test_caps_are_bits_per_second_and_kept_in_bytes(
    tmp_path: Path, text: str, bytes_per_second: float | None
) -> None:
    config = _resolve(tmp_path, max_upload=text)
    assert (config.upload_bytes_per_second, config.download_bytes_per_second) == (bytes_per_second, None)


def test_a_flag_lifts_a_cap_of_node_toml_and_zero_needs_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('max_upload = "20mbit"\nmax_download = 0\n')
    config = _resolve(tmp_path)
    assert (config.upload_bytes_per_second, config.download_bytes_per_second) == (2.5e6, None)
    config = _resolve(tmp_path, max_upload="0", max_download="50mbit")
    assert (config.upload_bytes_per_second, config.download_bytes_per_second) == (None, 6.25e6)


def test_the_commented_node_toml_reads_back_to_the_same_values() -> None:
    data = DataSettings(
        paths=("stdlib", "Überſicht.txt"),
        source=(SourceSettings("a", weight=2.5), SourceSettings("b:text", rehearsal=True)),
        validation=(ValidationSettings("c", "set"),),
        rehearsal_share=0.25,
    )
    for one in (data, DataSettings()):
        _reads_back(NodeToml(run='a"b\\c\x7f.toml', data=one, threads=2))


def _reads_back(written: NodeToml) -> None:
    assert read_table(NodeToml, tomllib.loads(written.to_toml())) == written


def test_an_invitation_names_the_run_and_two_are_one_too_many(tmp_path: Path) -> None:
    address = "/ip4/203.0.113.7/tcp/4001/p2p/12D3KooWFAQWzWY2n8KUGGaXykyzafrNgSCsfTmabDmNUZkDoTn5"
    one, two = Invitation(address, "ab" * 32, b"1" * 32), Invitation(address, "ab" * 32, b"2" * 32)
    config = _resolve(tmp_path, peers=(one.line, address))
    assert (config.invitation, config.run_id, config.peers) == (one, "ab" * 32, (address, address))
    with pytest.raises(UserError, match="2 invitations, and one admits"):
        _resolve(tmp_path, peers=(one.line, two.line))
    with pytest.raises(UserError, match="not whole"):
        _resolve(tmp_path, peers=(one.line[:-3],))


def test_a_collector_is_named_by_its_url(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text('otlp_endpoint = "http://127.0.0.1:4318"\n')
    assert _resolve(tmp_path).otlp_endpoint == "http://127.0.0.1:4318"
    (tmp_path / "node.toml").write_text('otlp_endpoint = "http"\n')
    with pytest.raises(UserError, match="otlp_endpoint: http is no URL"):
        _resolve(tmp_path)
