"""What `unseen train` learns from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parties.cli.train import data_set
from secure.errors import Error


def saved(directory: Path, parts: list[dict[str, list[object]]]) -> Path:
    """As Hugging Face's save_to_disk leaves it."""
    pyarrow = pytest.importorskip("pyarrow")
    directory.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        table = pyarrow.table(part)
        with pyarrow.OSFile(str(directory / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return directory


def test_a_saved_data_set_is_read_in_order(tmp_path: Path) -> None:
    parts: list[dict[str, list[object]]] = [{"text": ["one", "two\n lines", ""]}, {"text": [None, "three"]}]
    found = data_set(saved(tmp_path / "set", parts), "text")
    assert found == ["one", "two lines", "three"]


def test_of_several_parts_the_one_for_training(tmp_path: Path) -> None:
    saved(tmp_path / "all" / "test", [{"sentence": ["no"]}])
    saved(tmp_path / "all" / "train", [{"sentence": ["yes"]}])
    (tmp_path / "all" / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    assert data_set(tmp_path / "all", "sentence") == ["yes"]
    with pytest.raises(Error, match="no column 'text'") as caught:
        data_set(tmp_path / "all", "text")
    assert "sentence" in str(caught.value)


@pytest.mark.parametrize("state", [None, "{", "[]", '{"_data_files": [{"filename": "gone.arrow"}]}'])
def test_what_is_no_data_set(tmp_path: Path, state: str | None) -> None:
    pytest.importorskip("pyarrow")
    if state is not None:
        (tmp_path / "state.json").write_text(state)
    with pytest.raises(Error, match="is no data set"):
        data_set(tmp_path, "text")


def test_a_file_name_leads_nowhere_else(tmp_path: Path) -> None:
    directory = saved(tmp_path / "set", [{"text": ["here"]}])
    (tmp_path / "outside.arrow").write_bytes((directory / "data-00000-of-00001.arrow").read_bytes())
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../outside.arrow"}]}))
    with pytest.raises(Error, match="is no data set"):
        data_set(directory, "text")
