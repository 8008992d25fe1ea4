"""Where a ds_config comes from: a file, a dict, base64 text; and what is none."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megazero.base.errors import ConfigError
from megazero.config.deepspeed import read_deepspeed

TREE = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}


def refusal(source: Any) -> str:
    with pytest.raises(ConfigError) as error:
        read_deepspeed(source)
    return str(error.value)


def test_file_dict_and_base64_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text("\ufeff" + json.dumps(TREE), encoding="utf-8")
    text = json.dumps(TREE).encode()
    sources = [path, str(path), TREE, base64.b64encode(text).decode(), base64.urlsafe_b64encode(text).decode()]
    found = [read_deepspeed(source) for source in sources]
    assert [ds.label for ds in found] == ["ds_config.json", "ds_config.json", "config", "config", "config"]
    values = [{key: setting.value for key, setting in ds.settings.items()} for ds in found]
    assert values == [{"training.global_batch_size": 8, "parallel.zero_stage": 2}] * 5
    assert found[0].settings["parallel.zero_stage"].origin == "ds_config.json zero_optimization.stage"
    assert read_deepspeed(found[0]) is found[0]


def test_long_base64_is_no_file_name() -> None:
    tree = {"train_batch_size": 8, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, "steps_per_print": 10}
    text = base64.b64encode(json.dumps(tree, indent=60).encode()).decode()
    assert len(text) > 300
    assert read_deepspeed(text).optimizer is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', "c.json line 1 column 8: not valid JSON: Illegal trailing comma before end of object"),
        ('{\n"a" 1}', "c.json line 2 column 5: not valid JSON: Expecting ':' delimiter. Correct that line."),
        ("[1]", "c.json: a DeepSpeed configuration is one JSON object {…}, not [1]."),
        ('{"a": 1, "a": 2}', "c.json: the key 'a' is given twice in one object. Remove one."),
        ('{"fp16": {"enabled": true, "enabled": true}}', "c.json: the key 'enabled' is given twice in one object."),
    ],
)
def test_refuses_a_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    if "trailing comma" in message:  # Python's own words, from 3.13 on
        message = "c.json line 1 column"
    assert refusal(path).startswith(message)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ('{"a": 1, // half\n "b": 2}', "JSON has no comments: remove them."),
        ('{ # top\n"a": 1}', "JSON has no comments: remove them."),
        ('{"a": /* 3 */ 1}', "JSON has no comments: remove them."),
        ('{"a": 1 // end\n}', "JSON has no comments: remove them."),
        ('{"a": [1, 2,]}', "Remove the comma before the closing bracket."),
        ('{"a": 1,\n}', "Remove the comma before the closing bracket."),
        ('{"a" 1}', "Correct that line."),
    ],
)
def test_what_json_has_not_is_named(tmp_path: Path, text: str, remedy: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    assert refusal(path).startswith("c.json line ") and refusal(path).endswith(f". {remedy}")


def test_home_folders_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.json").write_text(json.dumps(TREE))
    assert read_deepspeed("~/c.json").label == "c.json"
    assert refusal("~/d.json").startswith("~/d.json: no such file")
    assert refusal(tmp_path) == f"{tmp_path} is a folder. Give the path of the JSON file in it."
    assert refusal("~no-such-user/c.json").startswith("~no-such-user/c.json: no such file")


def test_refuses_other_sources(tmp_path: Path) -> None:
    assert refusal("no/such.json") == (
        "no/such.json: no such file, and not base64 of a JSON object either. Check the path."
    )
    assert refusal("x" * 200) == f"{'x' * 77}...: no such file, and not base64 of a JSON object either. Check the path."
    assert refusal(3) == (
        "a DeepSpeed configuration is a file's path, a dict or base64 text, not a int. Give one of these."
    )
    latin = tmp_path / "latin.json"
    latin.write_bytes('{"a": "é"}'.encode("latin-1"))
    assert refusal(latin) == f"{latin} is not UTF-8 text (byte 7); a ds_config is a JSON file."


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_refuses_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text("{}")
    path.chmod(0)
    assert refusal(path) == f"{path} cannot be read: Permission denied. Check its permissions."
