"""Files that change while the server runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from service.access.watched import Watched


def watch(*paths: Path) -> Watched[str]:
    """The files' texts in one; a file that says `broken` is refused."""

    def read() -> str:
        text = "".join(path.read_text() for path in paths)
        if "broken" in text:
            raise ValueError("it is broken")
        return text

    return Watched("the files", paths, read)


def rewrite(path: Path, text: str) -> None:
    path.write_text(text)


def move(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def relink(path: Path, text: str) -> None:
    """Makes the file a link to another one, as Kubernetes does with all files of a secret."""
    target = path.with_suffix("." + text)
    target.write_text(text)
    new = path.with_suffix(".link")
    new.symlink_to(target)
    new.replace(path)


@pytest.mark.parametrize("change", [rewrite, move, relink])
def test_change_is_seen_at_the_next_use(
    tmp_path: Path, change: Callable[[Path, str], None]
) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    watched = watch(path)
    assert watched.current() == "one"
    change(path, "second")
    assert watched.current() == "second"
    change(path, "3rd")
    assert watched.current() == "3rd"


def test_any_of_several_files_may_change(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    rewrite(first, "a")
    rewrite(second, "b")
    watched = watch(first, second)
    rewrite(second, "new")
    assert watched.current() == "anew"


@pytest.mark.parametrize("harm", [lambda path: rewrite(path, "broken"), Path.unlink])
def test_broken_or_missing_file_changes_nothing_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None]
) -> None:
    path = tmp_path / "file"
    path.write_text("good")
    watched = watch(path)
    harm(path)
    assert [watched.current() for _ in range(3)] == ["good"] * 3
    (line,) = caplog.records
    assert line.levelno == logging.ERROR
    assert line.getMessage().startswith("the files changed and cannot be used, the old ones stay: ")
    rewrite(path, "better")
    assert watched.current() == "better"


def test_files_that_cannot_be_read_to_begin_with_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        watch(tmp_path / "file")
