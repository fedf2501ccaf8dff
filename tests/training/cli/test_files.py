# Copyright 2026 The diffusers-ctm authors. Licensed under the Apache License, Version 2.0.
"""Folders and files are whole or not there, whatever stops the writing."""

import os
from pathlib import Path

import pytest

from training.cli.errors import UserError
from training.cli.files import atomic_file, atomic_folder, check_writable


def write(folder, text):
    Path(folder, "a").write_text(text, encoding="utf-8")


def read(folder):
    return Path(folder, "a").read_text(encoding="utf-8")


@pytest.fixture
def result(tmp_path):
    """A folder that holds "old"."""
    path = str(tmp_path / "result")
    with atomic_folder(path) as draft:
        write(draft, "old")
    return path


def test_a_folder_is_replaced_as_a_whole(result, tmp_path):
    with atomic_folder(result) as draft:
        write(draft, "new")
        assert read(result) == "old"
    assert read(result) == "new" and os.listdir(tmp_path) == ["result"]


@pytest.mark.parametrize("error, raised", [(OSError("disk full"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failure_leaves_the_former_folder(result, tmp_path, error, raised):
    with pytest.raises(raised), atomic_folder(result) as draft:
        write(draft, "new")
        raise error
    assert read(result) == "old" and os.listdir(tmp_path) == ["result"]


def test_killed_between_the_two_renames(result, tmp_path):
    os.rename(result, tmp_path / ".result.former")  # the first is done
    with pytest.raises(UserError), atomic_folder(result):
        raise OSError("disk full")
    assert read(result) == "old"
    os.rename(result, tmp_path / ".result.former")
    with atomic_folder(result) as draft:
        write(draft, "new")
    assert read(result) == "new" and os.listdir(tmp_path) == ["result"]


def test_a_rename_that_fails_puts_the_former_folder_back(result, tmp_path, monkeypatch):
    rename = os.rename

    def refuse(source, target):
        if source.endswith(".draft"):
            raise OSError("refused")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="refused.*unchanged"), atomic_folder(result) as draft:
        write(draft, "new")
    assert read(result) == "old" and os.listdir(tmp_path) == ["result"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(UserError, match="notes.txt is a file, and stays"), atomic_folder(str(path)) as draft:
        write(draft, "new")
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["notes.txt"]


def test_what_cannot_be_written_is_known_before(tmp_path):
    check_writable(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*Choose another folder"):
        check_writable(str(tmp_path / "file" / "a"))


def test_a_file_is_whole_or_the_former_one(tmp_path):
    path = str(tmp_path / "new" / "table.json")
    with atomic_file(path) as draft:
        assert draft.endswith(".json")  # writers choose the format by it
        open(draft, "w", encoding="utf-8").write("old")
    with pytest.raises(UserError, match="table.json could not be written: full"), atomic_file(path) as draft:
        open(draft, "w", encoding="utf-8").write("ne")
        raise OSError("full")
    assert open(path, encoding="utf-8").read() == "old" and os.listdir(tmp_path / "new") == ["table.json"]
