"""API keys: how they are made, written down, and found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.access.keys import key_line, make_key, parse_keys, read_keys, watch_keys

HASH = "sha256:" + 64 * "a"


def test_made_key_is_known_by_its_line() -> None:
    key, other = make_key(), make_key()
    keys = parse_keys(
        f"# of the first team\n\n{key_line('alice', key)}\n  {key_line('bob', other)}  "
    )
    assert (keys.name_of(key), keys.name_of(other)) == ("alice", "bob")


def test_nearly_right_key_is_wrong() -> None:
    key = make_key()
    keys = parse_keys(key_line("alice", key))
    for wrong in (key.swapcase(), key[:-1], key + "x", "", "alice", key_line("alice", key)):
        assert keys.name_of(wrong) is None


def test_file_does_not_have_the_key() -> None:
    key = make_key()
    assert key not in key_line("alice", key)
    assert len(key) > 40  # 256 bits, which are too many to guess
    assert make_key() != key


def test_one_name_may_have_an_old_and_a_new_key() -> None:
    old, new = make_key(), make_key()
    keys = parse_keys(f"{key_line('alice', old)}\n{key_line('alice', new)}")
    assert keys.name_of(old) == keys.name_of(new) == "alice"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "there is no key in it"),
        ("# nobody\n", "there is no key in it"),
        ("alice secret-key", "line 1 is not"),
        (f"a {HASH}\nalice", "line 2 is not"),
        (f"alice {HASH[:-1]}", "line 1 is not"),
        (f"alice {HASH.upper()}", "line 1 is not"),
        (f"a b {HASH}", "line 1 is not"),
        (f"{'a' * 65} {HASH}", "line 1 is not"),
        (f"al,ice {HASH}", "line 1 is not"),
        (f"alice {HASH}\nbob {HASH}", "line 2 has the key of another name"),
    ],
)
def test_other_lines_are_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_keys(text)


def test_refusal_does_not_repeat_what_might_be_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("alice tw-in-plain-text")
    with pytest.raises(ValueError, match=r"keys: line 1 is") as failed:
        read_keys(path)
    assert "tw-in" not in str(failed.value)


@pytest.mark.parametrize("name", ["", "two words", "-", "a" * 65, "é", "a\nb"])
def test_name_that_would_garble_the_log_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a name must have"):
        key_line(name, make_key())


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a" * (1 << 21)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"keys: "):
        read_keys(path)


def test_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"/keys: No such file or directory$"):
        watch_keys(tmp_path / "keys")


def test_the_next_process_finds_the_keys_in_force_where_the_file_has_become_unusable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, kept = tmp_path / "keys", tmp_path / "kept"
    old, new = make_key(), make_key()
    file.write_text(f"{key_line('alice', old)}\n{key_line('bob', new)}\n")
    before = watch_keys(file, kept)
    file.write_text(key_line("carol", new))
    assert before.current().name_of(old) is None
    file.write_text("a line that nobody can read\n")
    after = watch_keys(file, kept)
    assert (after.current().name_of(old), after.current().name_of(new)) == (None, "carol")
    (line,) = caplog.messages
    assert line.startswith("the API keys changed and cannot be used, the old ones stay: ")
    file.write_text(key_line("alice", old))
    assert after.current().name_of(old) == "alice"
    assert [path.name for path in tmp_path.iterdir() if path != file] == ["kept"]


@pytest.mark.parametrize("kept", [None, "kept"])
def test_the_first_process_needs_a_file_that_can_be_used(tmp_path: Path, kept: str | None) -> None:
    file = tmp_path / "keys"
    file.write_text("a line that nobody can read\n")
    with pytest.raises(ValueError, match="line 1 is not a name"):
        watch_keys(file, None if kept is None else tmp_path / kept)
