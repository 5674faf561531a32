"""Whole files and folders: what is left after errors and kills, permissions, links, and what is no regular file."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from reweighting.errors import UserError
from reweighting.files import (
    atomic_file,
    atomic_write_bytes,
    atomic_write_dir,
    atomic_write_text,
    digest,
    open_append,
    open_regular,
    remove_dir,
    remove_temporaries,
    temporary_dir,
)
from tests.runs import ROOT


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    atomic_write_text(path, "one\nÜ")
    assert path.read_bytes() == "one\nÜ".encode()
    with pytest.raises(RuntimeError, match="half"), atomic_file(path) as file:
        file.write(b"tw")
        raise RuntimeError("half")
    assert path.read_bytes() == "one\nÜ".encode() and names(tmp_path) == ["file"]
    with atomic_file(path) as file:
        file.write(b"two")
        file.flush()
        assert path.read_bytes() == "one\nÜ".encode()
    atomic_write_bytes(tmp_path / "other", b"\0\r\n")
    assert path.read_bytes() == b"two" and (tmp_path / "other").read_bytes() == b"\0\r\n"
    with pytest.raises(FileNotFoundError):
        atomic_write_text(tmp_path / "missing" / "file", "")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"
    atomic_write_dir(folder, lambda new: (new / "a").write_text("1"))

    def half(new: Path) -> None:
        (new / "a").write_text("2")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="folder cannot be written: No space left on device; free some disk space$"):
        atomic_write_dir(folder, half)
    assert (folder / "a").read_text() == "1" and names(tmp_path) == ["folder"]
    atomic_write_dir(folder, lambda new: (new / "b").write_text("3"))
    assert names(folder) == ["b"] and names(tmp_path) == ["folder"]
    remove_dir(folder)
    assert names(tmp_path) == []
    with temporary_dir(tmp_path, "trial") as trial:
        assert trial.is_dir() and trial.name.endswith("-new-trial")
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from reweighting import files

folder, moment = Path(sys.argv[1]), sys.argv[2]

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "filling":
    files.atomic_write_dir(folder, lambda new: [(new / "a").write_text("new"), kill()])
calls, rename = [], Path.rename

def rename_and_die(self, target):
    calls.append(self)
    if len(calls) == {"first": 1, "second": 2, "third": 3}.get(moment):
        kill()
    rename(self, target)

Path.rename = rename_and_die
files.shutil.rmtree = kill if moment == "removing" else files.shutil.rmtree
files.atomic_write_dir(folder, lambda new: (new / "a").write_text("new"))
"""


@pytest.mark.parametrize(
    ("moment", "content"),
    [("filling", "old"), ("first", "old"), ("second", "old"), ("third", "new"), ("removing", "new")],
)
def test_a_kill_at_any_moment_leaves_one_whole_folder(tmp_path, moment, content):
    folder = tmp_path / "step-00000005"
    folder.mkdir()
    (folder / "a").write_text("old")
    command = [sys.executable, "-c", KILLED, str(folder), moment]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(names(tmp_path)) == 2
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["step-00000005"] and (folder / "a").read_text() == content


def test_the_next_writer_removes_what_a_killed_one_has_left_and_nothing_else(tmp_path):
    path, other = tmp_path / "rows.jsonl", tmp_path / "more-rows.jsonl"
    script = f"""
import os, signal
from pathlib import Path
from reweighting.files import atomic_file
with atomic_file(Path({str(other)!r})), atomic_file(Path({str(path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    of_other, of_path = sorted(names(tmp_path), key=lambda name: name.endswith("-new-rows.jsonl"))
    with atomic_file(path) as living:
        living.write(b"1")
        assert of_path not in names(tmp_path)
        with atomic_file(path) as second:  # the first is locked
            second.write(b"2")
        assert path.read_bytes() == b"2"
    assert path.read_bytes() == b"1" and names(tmp_path) == sorted([of_other, "rows.jsonl"])
    atomic_write_text(other, "3")
    assert names(tmp_path) == ["more-rows.jsonl", "rows.jsonl"]


def test_only_temporary_names_are_cleared_away(tmp_path):
    mine = (".tmp-mine", ".tmp-0123abcd-mine", ".tmp-0123abc-new-x", ".hidden", "tmp-01234567-new-a")
    for name in (*mine, ".tmp-01234567-new-file", ".tmp-01234567-old-name\nand-old-x"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".tmp-01234567-new-link").symlink_to(tmp_path / ".hidden")
    (tmp_path / ".tmp-89abcdef-new-folder" / "deep").mkdir(parents=True)
    for age in ("old", "whole"):
        (tmp_path / f".tmp-00000000-{age}-a").write_text(age)
    remove_temporaries(tmp_path)
    assert names(tmp_path) == sorted([*mine, "name\nand-old-x", "a"])
    assert (tmp_path / "a").read_text() == "whole"


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_the_users_umask_decides_who_may_read(tmp_path, umask):
    def fill(new: Path) -> None:
        (new / "inner").mkdir()
        for name in ("a", "inner/b"):  # as safetensors makes its files
            os.close(os.open(new / name, os.O_CREAT, 0o600))

    before = os.umask(umask)
    try:
        atomic_write_dir(tmp_path / "folder", fill)
        atomic_write_text(tmp_path / "file", "")
        open_append(tmp_path / "log").close()
    finally:
        os.umask(before)
    for name in ("folder/a", "folder/inner/b", "file", "log"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask, name
    for name in ("folder", "folder/inner"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o777 & ~umask, name


def test_no_link_is_followed(tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("theirs")
    path.symlink_to(victim)
    with pytest.raises(OSError):
        open_append(path)
    atomic_write_text(path, "mine")
    assert not path.is_symlink() and path.read_text() == "mine"
    monkeypatch.setattr("secrets.token_hex", lambda _: "01234567")  # as if someone had guessed it
    (tmp_path / ".tmp-01234567-new-file").symlink_to(victim)
    with pytest.raises(FileExistsError):
        atomic_write_text(path, "more")
    (tmp_path / ".tmp-01234567-new-folder").symlink_to(tmp_path)
    with pytest.raises(UserError, match="folder cannot be written: File exists"):
        atomic_write_dir(tmp_path / "folder", lambda new: (new / "victim").write_text("mine"))
    assert victim.read_text() == "theirs"


def test_what_is_no_regular_file_is_not_read(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    assert digest(tmp_path / "a", tmp_path / "b") != digest(tmp_path / "b", tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
        with pytest.raises(UserError, match="not a regular file"):
            digest(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)


def test_two_that_write_one_file_at_once_leave_one_of_their_contents(tmp_path):
    """Without a lock, as two commands with the same --output do."""
    texts, end, errors = [letter * 20_000 for letter in "ab"], time.monotonic() + 0.5, []

    def write(text: str) -> None:
        try:
            while time.monotonic() < end:
                atomic_write_text(tmp_path / "file", text)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not (tmp_path / "file").exists() or (tmp_path / "file").read_text() in texts
    assert not errors and names(tmp_path) == ["file"]
