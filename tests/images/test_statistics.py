"""Mean and deviation that pixels cannot have are refused, with the unit that was probably meant."""

from __future__ import annotations

import math

import pytest

from mae_deploy.cli import main
from mae_deploy.errors import ConfigError
from mae_deploy.images.preprocess import Preprocess
from mae_deploy.images.statistics import check_statistics


@pytest.mark.parametrize(
    ("mean", "std", "pixel_max", "message", "hint"),
    [
        ((0.5,), (0.0,), None, r"--std 0: the deviation must be above 0", "constant"),
        ((0.5,), (-1.0,), None, r"--std -1: the deviation must be above 0", "data stats"),
        ((0.5, 0.5), (0.2, 0.0), 1.0, r"--std 0.2,0: the deviation of channel 1 \(counted from 0\)", "leave it out"),
        ((0.5,), (math.nan,), 1.0, "--std nan must be finite", None),
        ((math.inf,), (0.2,), None, "--mean inf must be finite", None),
        (
            (123.7, 116.3, 103.5),
            (58.4, 57.1, 57.4),
            None,
            r"--mean 123.7,116.3,103.5 is not in \[0, 1\]: pixels are divided by 255 first",
            "--mean 0.4851,0.4561,0.4059",
        ),
        ((0.5,), (58.4,), None, r"--std 58.4 is not in \[0, 1\]", "--std 0.229"),
        ((-0.1,), (0.2,), None, r"--mean -0.1 is not in \[0, 1\]", "data stats"),
        ((31000.0,), (0.2,), 65535.0, "--mean 3.1e[+]04 is not at most 1: pixels are divided by 65535", "--mean 0.473"),
        ((1300.0,), (0.2,), 10000.0, "--mean 1300 is not at most 6.5535", "--mean 0.13"),
        ((0.1,), (700.0,), 10000.0, "--std 700 is not at most 6.5535", "--std 0.07"),
    ],
)
def test_what_cannot_be_is_refused(
    mean: tuple[float, ...], std: tuple[float, ...], pixel_max: float | None, message: str, hint: str | None
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_statistics(mean, std, pixel_max)
    assert (hint or "") in (caught.value.hint or "")
    with pytest.raises(ConfigError, match=message):
        Preprocess(image_size=(2, 2), channels=len(mean), mean=mean, std=std, pixel_max=pixel_max)


@pytest.mark.parametrize(
    ("mean", "std", "pixel_max"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None),
        ((0.0,), (1.0,), None),  # no normalisation
        ((0.0,), (1 / 255,), None),  # pixels as they are
        ((0.0,), (1e-6,), None),
        ((-12.0,), (5.0,), 1.0),  # radar in decibel
        ((1.2,), (1.4,), 10000.0),  # snow in Sentinel-2
        ((-0.2,), (0.1,), 10000.0),
    ],
)
def test_what_can_be_is_taken(mean: tuple[float, ...], std: tuple[float, ...], pixel_max: float | None) -> None:
    check_statistics(mean, std, pixel_max)


@pytest.mark.parametrize("channels", ["1", "3"])
@pytest.mark.parametrize(("option", "value"), [("--std", "0"), ("--std", "-1"), ("--mean", "123.7"), ("--std", "58")])
def test_on_the_command_line(option: str, value: str, channels: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "nowhere", "--out", "nowhere-out", "--in-chans", channels, f"{option}={value}"]) == 2
    assert f"{option} {value}" in capsys.readouterr().err
