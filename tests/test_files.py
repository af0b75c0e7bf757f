"""Files appear whole or not at all, and nothing is left beside them."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mae_deploy.errors import ConfigError
from mae_deploy.files import (
    atomic_path,
    locked,
    point_link,
    read_json,
    refuse_to_overwrite,
    remove,
    remove_partial,
    remove_whole,
    sha256,
    temporary_folder,
    write_json,
    write_text,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "file.txt"
    with atomic_path(target) as aside:
        aside.write_text("whole")
        assert aside.parent == target.parent, "a rename is atomic within one file system only"
        assert not target.exists()
    assert target.read_text() == "whole"
    assert names(target.parent) == {"file.txt"}


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "folder") as aside:
        (aside / "inner").mkdir(parents=True)
        (aside / "inner" / "a.txt").write_text("a")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "inner" / "a.txt").read_text() == "a"
    assert names(tmp_path) == {"folder"}


def test_what_a_killed_process_left_goes_and_what_a_running_one_writes_stays(tmp_path: Path) -> None:
    ended = 2**22 + 1  # above the highest process number that Linux gives
    for process in (ended, os.getppid()):
        (tmp_path / f".partial-{process}-file.txt").write_text("half")
    (tmp_path / f".partial-{ended}-other.txt").write_text("another file's")
    write_text(tmp_path / "file.txt", "whole")
    assert names(tmp_path) == {"file.txt", f".partial-{os.getppid()}-file.txt", f".partial-{ended}-other.txt"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, kind: str, error: type[BaseException]) -> None:
    target = tmp_path / "target"
    target.write_text("old")

    def write_half(aside: Path) -> None:
        if kind == "folder":
            aside.mkdir()
            (aside / "half").write_text("half")
        elif kind == "file":
            aside.write_text("half")
        raise error

    with pytest.raises(error), atomic_path(target) as aside:
        write_half(aside)
    assert target.read_text() == "old"
    assert names(tmp_path) == {"target"}


def test_a_full_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(OSError, match="folder"), atomic_path(tmp_path / "folder") as aside:
        aside.mkdir()
    assert names(tmp_path) == {"folder"}
    assert names(tmp_path / "folder") == {"old"}


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with atomic_path(tmp_path / "folder") as aside:
        aside.mkdir()
        (aside / "new").write_text("new")
    assert names(tmp_path / "folder") == {"new"}


def test_rubbish_of_the_same_process_is_overwritten(tmp_path: Path) -> None:
    rubbish = tmp_path / f".partial-{os.getpid()}-file"
    rubbish.mkdir()
    (rubbish / "x").write_text("x")
    write_text(tmp_path / "file", "new")
    assert names(tmp_path) == {"file"}


def test_rubbish_of_killed_processes_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial-1-file").write_text("half")
    (tmp_path / ".partial-2-folder").mkdir()
    (tmp_path / ".partial-2-folder" / "half").write_text("half")
    (tmp_path / "kept.partial").write_text("whole")
    remove_partial(tmp_path)
    assert names(tmp_path) == {"kept.partial"}


def test_text_and_json_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_text(file, "früher")
    assert file.read_text(encoding="utf-8") == "früher"
    write_json(file, {"path": tmp_path, "numbers": [1, 0.1, None]})
    assert read_json(file) == {"path": str(tmp_path), "numbers": [1, 0.1, None]}
    assert file.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff"])
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read .*a\.json"):
        read_json(file)


def test_a_link_is_moved_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("step-3", "step-7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    link = tmp_path / "last"
    point_link(link, "step-3")
    assert os.readlink(link) == "step-3", "relative, so that a run folder can be moved"
    seen = []
    replace = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append((target / "name").read_text())  # until the rename, the old link is there
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    point_link(link, "step-7")
    assert seen == ["step-3"]
    assert (link / "name").read_text() == "step-7"
    assert names(tmp_path) == {"step-3", "step-7", "last"}


def test_a_link_to_a_folder_is_removed_without_the_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("kept")
    point_link(tmp_path / "link", "folder")
    remove(tmp_path / "link")
    assert names(tmp_path) == {"folder"}
    assert names(tmp_path / "folder") == {"file"}
    remove(tmp_path / "folder")
    remove(tmp_path / "folder")
    assert names(tmp_path) == set()


def test_refuse_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse_to_overwrite(tmp_path / "absent")
    refuse_to_overwrite(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for path in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(ConfigError, match=r"--out .* already exists") as caught:
            refuse_to_overwrite(path, hint="use another")
        assert caught.value.hint == "use another"


@pytest.mark.parametrize("size", [0, 3, (1 << 22) + 7])
def test_sha256(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_a_lock_holds_across_processes_and_ends_with_them(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    waiting = (
        "import sys\nfrom pathlib import Path\nfrom mae_deploy.files import locked\nwith"
        " locked(Path(sys.argv[1])):\n    print('in')"
    )
    with locked(path):
        other = subprocess.Popen([sys.executable, "-c", waiting, str(path)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.communicate(timeout=0.6)
    assert other.communicate(timeout=20)[0] == "in\n"
    dies = waiting.replace("print('in')", "import os; os._exit(1)")
    subprocess.run([sys.executable, "-c", dies, str(path)], check=False, timeout=20)
    with locked(path):
        pass


def test_a_lock_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), locked(tmp_path / "file" / "lock"):
        pass


def test_the_device_side_imports_where_there_is_no_posix() -> None:
    """Windows has no fcntl, no resource and no pwd."""
    code = (
        "import importlib, pkgutil, sys\n"
        "sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'pwd', 'grp', 'termios')))\n"
        "import mae_deploy.runtime, mae_deploy.images, mae_deploy.serving\n"
        "for package in (mae_deploy.runtime, mae_deploy.images, mae_deploy.serving):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "import mae_deploy.cli, mae_deploy.files, mae_deploy.machine, mae_deploy.seeding\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    def fill(aside: Path) -> None:
        aside.touch()
        with open("/dev/full", "w", buffering=1) as full:
            full.write("much\n")

    def write() -> None:
        with atomic_path(tmp_path / "file") as aside:
            fill(aside)

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert caught.value.filename == str(tmp_path / "file")
    assert names(tmp_path) == set()


def test_a_name_that_leaves_no_room_for_another(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    with atomic_path(target) as aside:
        aside.write_text("whole")
    assert target.read_text() == "whole"
    assert len(names(tmp_path)) == 1


def test_temporary_folders_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = 2**22 + 1  # above the highest process number that Linux gives
    with temporary_folder() as own:
        before, _, _ = own.name.rpartition(f"{os.getpid()}-")
        kept = {f"{before}{os.getppid()}-abc", f"{before}2-{ended}-abc", "mae-deploy-abc"}
        for name in (f"{before}{ended}-abc", *kept):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").touch()
        with temporary_folder():
            pass
        assert names(tmp_path) == {own.name, *kept}
    assert names(tmp_path) == kept


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_an_empty_folder_or_to_nothing_is_followed(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_path(tmp_path / "link") as aside:
        aside.mkdir()
        (aside / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == {"file"}


def test_a_link_to_a_file_is_replaced(tmp_path: Path) -> None:
    """What it leads to belongs to another, such as a store."""
    write_text(tmp_path / "real", "kept")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert [(tmp_path / name).read_text() for name in ("real", "link")] == ["kept", "new"]
    assert not (tmp_path / "link").is_symlink()


def test_what_no_file_and_no_folder_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--out .* is a folder"):
        refuse_to_overwrite(tmp_path, file=True)
    with pytest.raises(ConfigError, match=r"--out \. is the working folder"):
        refuse_to_overwrite(Path("."))
    refuse_to_overwrite(Path("."), filled=True)
    with pytest.raises(ConfigError, match=r"--out /dev/null already exists"):
        refuse_to_overwrite(Path("/dev/null"), file=True)


def test_names_that_are_not_utf8_are_written_as_they_are(tmp_path: Path) -> None:
    write_text(tmp_path / "file", os.fsdecode(b"\xff"))
    assert (tmp_path / "file").read_bytes() == b"\xff"


def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match=r"pipe is no file"):
        write_text(pipe, "text")
    assert pipe.is_fifo()


def test_content_is_on_the_disk_before_its_name_and_its_name_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(number: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{number}")).name.rpartition("-")[2])
        sync(number)

    def renamed(source: Path, target: Path) -> None:
        seen.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_path(tmp_path / "out") as aside:
        (aside / "inner").mkdir(parents=True)
        (aside / "inner" / "file").write_text("text")
    assert sorted(seen[:3]) == ["file", "inner", "out"]
    assert seen[3:] == ["rename", tmp_path.name.rpartition("-")[2]]
    seen.clear()
    point_link(tmp_path / "last", "out")
    assert seen == ["rename", tmp_path.name.rpartition("-")[2]]


def test_a_file_system_that_syncs_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def fsync(number: int, error: int = errno.EINVAL) -> None:
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(error, os.strerror(error))
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    monkeypatch.setattr(os, "fsync", functools.partial(fsync, error=errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "file", "other")


def test_a_link_that_cannot_be_moved_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    point_link(tmp_path / "last", "before")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        point_link(tmp_path / "last", "after")
    assert names(tmp_path) == {"last"}
    assert os.readlink(tmp_path / "last") == "before"


def test_nobody_sees_half_of_a_folder_that_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "step-2" / "state").mkdir(parents=True)
    seen = set[str]()
    monkeypatch.setattr(shutil, "rmtree", lambda _: seen.update(names(tmp_path)))
    remove_whole(tmp_path / "step-2")
    assert seen == {f".partial-{os.getpid()}-step-2"}
    monkeypatch.undo()
    remove_partial(tmp_path)
    assert names(tmp_path) == set()
