"""Every command that writes is a case; a few of them are done harm here, and `make crash` does the rest."""

from __future__ import annotations

from pathlib import Path

from mae_deploy import cli
from mae_deploy.flags import Flag, flags_of
from mae_deploy.options import settings_of_commands
from tests.crash.cases import CASES
from tests.crash.run import harm
from tests.training.tiny_runs import preload

READ = {
    *("DATA", "SRC", "IMAGES", "VIDEOS", "CHECKPOINT", "FEATURES", "RUN", "CKPT|BUNDLE", "PATH"),
    *("--init", "--teacher", "--checkpoint", "--data", "--labelled", "--unlabelled", "--teacher-weights", "--samples"),
    *("--calib-data", "--graph", "--against", "--signature", "--key", "--keep-mask", "--image", "--bundle", "--images"),
    *("--drop-like", "--class-names", "--api-keys"),
}
"""Arguments and options that name what a command reads."""


IN_PLACE = ("build-engine", "sign", "push")
"""Commands that write into their bundle, or onto a hub."""


def writes(command: str, flag: Flag) -> bool:
    """Whether it names what the command writes."""
    if flag.argument and command in IN_PLACE:
        return flag.name == "BUNDLE"
    if (command, flag.name) == ("export", "--deepstream"):  # needs a GPU; build-engine writes the same
        return False
    return flag.kind is Path and flag.name not in {*READ, "BUNDLE"}


def test_every_command_that_writes_is_a_case() -> None:
    assert callable(cli.main)  # which registers the commands
    called: dict[str, set[str]] = {}
    for case in CASES.values():
        words = [str(word) for word in case.arguments(Path("root"), Path("out"))]
        called.setdefault(" ".join(words[: 1 + (words[0] == "data")]), set()).update(words)
    written = [
        (command, flag)
        for command, config in settings_of_commands().items()
        for flag in flags_of(config)
        if writes(command, flag)
    ]
    assert len(written) > 25
    missing = [
        (command, flag.name)
        for command, flag in written
        if command not in called or not (flag.argument or flag.name in called[command])
    ]
    assert missing == []


def test_nothing_half_written_is_accepted_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Cases whose inputs no other command makes."""
    preload("tests.crash.trial")
    killed = harm(["pretrain", "build-engine"], {"kill": 1}, tmp_path / "killed")
    stopped = harm(["data pack"], {"kill": 1, "stop": 1, "full": 1}, tmp_path / "stopped")
    assert killed == {"times": {"kill": {"pretrain": 1, "build-engine": 1}}, "wrong": []}
    assert stopped["wrong"] == []
