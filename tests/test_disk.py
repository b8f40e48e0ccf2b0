"""The cache: a folder is written once, and one that is not complete does not appear."""

import pytest

from common.disk import cached_folder


def test_a_cached_folder_is_written_once_and_only_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAINLORA_CACHE", str(tmp_path))

    def fail(folder):
        folder.mkdir()
        (folder / "half").write_text("")
        raise OSError("killed")

    def write(folder):
        folder.mkdir()
        (folder / "all").write_text("content")

    with pytest.raises(OSError, match="killed"):
        cached_folder("kind/name", fail)
    assert not (tmp_path / "kind" / "name").exists() and not list(tmp_path.glob("kind/.*"))
    assert (cached_folder("kind/name", write) / "all").read_text() == "content"
    assert cached_folder("kind/name", fail) == tmp_path / "kind" / "name"  # it is there, so nothing is written
