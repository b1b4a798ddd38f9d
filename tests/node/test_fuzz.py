"""The targets of scripts/fuzz.py: each takes its inputs, and refuses what is near them as it should."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "fuzz.py"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


TARGETS = loaded().targets()
varied = sys.modules["_fuzzing"].varied


DEEP = b"[" * 990 + b"]" * 990
BASE_DEEP = b'{"model_type": "llama", "x": ' + b"[" * 960 + b"]" * 960 + b"}"
HUGE = b"9" * 4300
PREFIX = (  # the library panics: a merge's second token is shorter than the prefix that it is to have
    b'{"version":"1.0","added_tokens":[],"normalizer":null,"pre_tokenizer":null,"post_processor":null,'
    b'"decoder":null,"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":[["a","b"]],'
    b'"continuing_subword_prefix":"xxxxxxxx"}}'
)
UNKNOWN = (  # there is no token for what it does not know
    b'{"version":"1.0","added_tokens":[{"id":1,"content":"<|end|>","single_word":false,"lstrip":false,'
    b'"rstrip":false,"normalized":false,"special":true}],"normalizer":null,"pre_tokenizer":null,'
    b'"post_processor":null,"decoder":null,"model":{"type":"WordPiece","unk_token":"[UNK]",'
    b'"continuing_subword_prefix":"##","max_input_chars_per_word":100,"vocab":{"a":0,"<|end|>":1}}}'
)
# Shrunk from what came out of a decoder as another exception than its own, by target.
FOUND = {
    "peers.json": (DEEP,),
    "listen.json": (DEEP,),
    "descriptions.json": (DEEP,),
    "vote.json": (DEEP,),
    "island.json": (DEEP, b'{"since_epoch": Infinity}'),
    "plan.json": (DEEP,),
    "trained.json": (DEEP,),
    "held-out.jsonl": (b"x", b"[]", b"{}", b'"x"', b"[{}]", b"\xc1", DEEP),
    "data-events.jsonl": (b"{}", b'{"event": []}', b'{"event": "used", "purpose": "base"}', b"3"),
    "history.jsonl": (b'\n{"point": {"epoch": 1, "loss": ' + HUGE + b"}}",),
    "node.toml": (b'base = "~nobody-here/x"', b'base = "%s"' % (b"x" * 300), b'run = "a\\u0000"'),
    "data.toml": (
        b'[[domain]]\nname = "x"\npatterns = ["x{99999999999999999999}"]',
        b'[[source]]\npath = "~nobody-here/x"\nowner = "u"\nlicence = "x"\nmode = "open"\n'
        b'purposes = ["base"]',
    ),
    "suite.toml": (b'[[set]]\nname = "x"\npath = "~nobody-here/x"',),
    "config.json": (
        BASE_DEEP,
        b'{"model_type": "llama", "architectures": 1.5}',
        b'{"model_type": "llama", "architectures": {"a": 1}}',
    ),
    "tokenizer.json": (PREFIX, UNKNOWN),
    "safetensors": (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [%s, %s]}}' % (HUGE, HUGE),),
    "export": (b"", b"3", b"{}", b"[]", b"\xc1", DEEP, b'{"epoch": 1, "form": "whole"}'),
    "export-derived": (b'{"derivative": "x"}', b'{"derivative": "x", "version": {"parent": []}}'),
    "http": (
        b"POST /admit HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\nContent-Length: 9\r\n\r\n{"
        % (b"t" * 43),
    ),
}


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, every in FOUND.items() for data in every])
def test_what_once_came_out_as_another_exception_is_taken_or_refused(name: str, data: bytes) -> None:
    target = TARGETS[name]
    with contextlib.suppress(*target.refuses):
        target.run(data)


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(changed):
            changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xFF, rng.randrange(256)])
        elif kind == 1:
            del changed[at : at + rng.randint(1, 8)]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 4))
        else:
            begin = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[begin : begin + rng.randint(1, 64)]
    return bytes(changed)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_near_a_good_input_is_taken_or_refused(name: str) -> None:
    target, rng = TARGETS[name], random.Random(name)
    for data in target.inputs:
        for number in range(target.tries):
            other = varied(target.form, data, rng) if target.form and number % 4 else None
            case = (other or mutated(data, rng)) if number else data
            try:
                target.run(case)
            except target.refuses:
                assert number or name in ("stop", "relay"), "its own input is refused"
