"""What a worker opens: the data as the run reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bases import BOS, EOS, begin_with, edit_json, make_tokenizer

from tapestry.node.spec.training import DataSpec, WorkerSettings
from tapestry.node.trainer.opening import WorkerFailure, open_training_corpus


def _of_base(settings: WorkerSettings, base: Path, *, add_bos: bool) -> WorkerSettings:
    data = DataSpec("base", 32, add_bos=add_bos)
    return replace(settings, training=replace(settings.training, data=data), base_dir=str(base))


def test_documents_begin_with_the_base_s_bos_where_the_run_has_it_so(
    worker_settings: WorkerSettings, tmp_path: Path
) -> None:
    ids = make_tokenizer(tmp_path / "base")
    begin_with(tmp_path / "base")
    bare, begun = (
        open_training_corpus(_of_base(worker_settings, tmp_path / "base", add_bos=put), None).parts[0].tokens
        for put in (False, True)
    )
    assert begun.tolist() == [ids[BOS], *bare.tolist()] and begun[-1] == ids[EOS]


def test_a_bos_that_the_base_s_tokenizer_lacks_is_refused_in_one_line(
    worker_settings: WorkerSettings, tmp_path: Path
) -> None:
    make_tokenizer(tmp_path / "base")
    edit_json(tmp_path / "base" / "tokenizer_config.json", lambda table: table.pop("bos_token"))
    with pytest.raises(WorkerFailure, match="the tokenizer has no BOS: set it to false") as caught:
        open_training_corpus(_of_base(worker_settings, tmp_path / "base", add_bos=True), None)
    assert caught.value.reason == "data" and "\n" not in str(caught.value)
