"""`mae-deploy stream-eval` on a video that the test encodes: a square that moves over a textured still."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_deploy.cli import main
from mae_deploy.commands.stream_eval.arms import Changed, ChangedPatches, Costs, Held, Streamed, update_cost
from mae_deploy.commands.stream_eval.conditions import opened
from mae_deploy.commands.stream_eval.halves import ALONE, CACHED, NTH, OURS, STALE, WHOLE
from mae_deploy.commands.stream_eval.report import margin
from mae_deploy.images.read import Array
from mae_deploy.runtime.backbone import Backbone
from mae_deploy.runtime.video import Frame
from tests.export.tiny_exports import write_checkpoint
from tests.models.tiny_models import ENCODER, tiny_classifier, tiny_encoder

av = pytest.importorskip("av")

FRAMES = 40
SIDE = 64
N, P = ENCODER.num_patches, ENCODER.patch


def scene(index: int) -> Array:
    rng = np.random.default_rng(0)
    frame: Array = rng.integers(90, 110, (SIDE // 8, SIDE // 8, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    frame[24:40, index : index + 16] = 200
    return frame


@pytest.fixture(scope="module", autouse=True)
def bypass() -> Iterator[None]:
    """Of a network this small the measured one may be anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mae_deploy.runtime.streams.crossover._measure", lambda _: 0.7)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`square.mp4`, the bundle `cached`, and `done`, the report of two conditions."""
    folder = tmp_path_factory.mktemp("stream-eval")
    with av.open(str(folder / "square.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for index in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene(index), format="rgb24")))
        container.mux(stream.encode(None))
    checkpoint = write_checkpoint(folder / "checkpoint", tiny_encoder())
    assert main(["export", str(checkpoint), "--out", str(folder / "cached"), "--tokens", "cached"]) == 0
    assert evaluate(folder, "--out", str(folder / "done"), "--conditions", "jitter,clean") == 0
    return folder


@pytest.fixture(scope="module")
def report(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "done" / "stream-eval.json").read_text())
    return found


@pytest.fixture(scope="module")
def backbone(root: Path) -> Iterator[Backbone]:
    with Backbone.load(root / "cached", "onnxruntime", threads=1) as loaded:
        yield loaded


def evaluate(root: Path, *options: str) -> int:
    return main(["stream-eval", str(root / "square.mp4"), str(root / "cached"), *options])


def test_a_classifier_that_pools_by_a_mean(root: Path, tmp_path: Path) -> None:
    """Its graph gives the new rows of the last block, beside logits of the whole frame."""
    checkpoint = write_checkpoint(tmp_path / "classifier", tiny_classifier("avg"))
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "cached"), "--tokens", "cached"]) == 0
    words = ("--out", tmp_path / "done", "--conditions", "clean", "--max-frames", 16)
    assert main(["stream-eval", *map(str, (root / "square.mp4", tmp_path / "cached", *words))]) == 0
    (part,) = json.loads((tmp_path / "done" / "stream-eval.json").read_text())["results"]
    assert all({"logits_snr", "block_1_snr"} <= row.keys() for row in part["rows"][1:])  # beside whole frames


def rows(report: dict[str, Any], condition: str) -> dict[str, dict[str, Any]]:
    part = next(part for part in report["results"] if part["condition"] == condition)
    return {row["arm"]: row for row in part["rows"]}


def test_every_arm_stands_beside_the_others(report: dict[str, Any]) -> None:
    assert [part["condition"] for part in report["results"]] == ["clean", "jitter"]
    clean = rows(report, "clean")
    assert list(clean) == [WHOLE, STALE, NTH, ALONE, CACHED, OURS]
    assert all(part["frames"] == FRAMES // 2 for part in report["results"])
    assert (clean[WHOLE]["cost"], clean[WHOLE]["cpu_share"]) == (1, 1)
    assert "tokens_snr" not in clean[WHOLE]
    for name in (STALE, NTH, ALONE, CACHED, OURS):
        assert 0 < clean[name]["cost"] < 1
        assert clean[name]["tokens_worst_snr"] <= clean[name]["tokens_snr"]
        assert {"cls_snr", "pooled_snr"} <= set(clean[name])
    assert clean[NTH]["cost"] >= clean[OURS]["cost"] - 1 / FRAMES  # never cheaper, but for the last frames
    assert clean[OURS]["tokens_snr"] > clean[STALE]["tokens_snr"]


def test_the_probe_finds_the_square_in_true_tokens(report: dict[str, Any]) -> None:
    clean = rows(report, "clean")
    assert 0 < report["results"][0]["foreground"] < 0.3
    assert clean[WHOLE]["average_precision"] > 0.6
    assert clean[STALE]["average_precision"] < clean[WHOLE]["average_precision"]


def test_the_clean_first_half_chooses_for_all_conditions(report: dict[str, Any]) -> None:
    clean, jitter = report["results"]
    assert clean["threshold"] == jitter["threshold"] == 6
    assert set(clean["thresholds"]) == {ALONE, CACHED}
    assert "probe" not in clean  # weights are for going on, not for people


def test_the_margin_is_to_what_costs_no_more() -> None:
    costs_and_ratios = {
        WHOLE: (1.0, None),
        STALE: (0.03, 1.0),
        NTH: (0.21, 5.0),
        CACHED: (0.3, 14.0),
        OURS: (0.2, 12.0),
    }
    rows = [{"arm": arm, "cost": cost, "tokens_snr": snr} for arm, (cost, snr) in costs_and_ratios.items()]
    ours, best, more = margin(rows)
    assert (ours["arm"], best["arm"], more) == (OURS, NTH, 7.0)


def test_report_for_people(root: Path) -> None:
    text = (root / "done" / "stream-eval.md").read_text()
    assert text.count("square.mp4: how near") == 1
    assert "the best other arm at that cost" in text
    page = (root / "done" / "stream-eval.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "mae-deploy stream-eval" in page


def test_the_same_command_goes_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = root / "done"
    before = (out / "parts" / "square.mp4-clean.json").read_bytes()
    given = ["--out", str(out), "--conditions", "clean,jitter,flicker,reencoded", "--json"]
    assert evaluate(root, *given) == 0
    found = json.loads(capsys.readouterr().out)
    assert [part["condition"] for part in found["results"]] == ["clean", "jitter", "flicker", "reencoded"]
    assert (out / "parts" / "square.mp4-clean.json").read_bytes() == before
    assert found["results"][3]["frames"] == FRAMES // 2


def test_what_was_made_with_other_settings_is_not_taken(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(root, "--out", str(root / "done"), "--threshold", "5") == 2
    assert "was made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cost", "0.5", "--snr", "13"], "--cost and --snr exclude one another"),
        (["--out", "{root}"], "already exists"),
        (["--max-frames", "20", "--every", "4"], "has 10 frames"),
    ],
)
def test_usage_errors(root: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(root, *(option.format(root=root) for option in options)) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_video(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.mp4").write_bytes(b"no video")
    for name in ("no.mp4", "absent.mp4"):
        assert main(["stream-eval", str(tmp_path / name), str(root / "cached")]) == 2
        assert name in capsys.readouterr().err


def test_a_cost_or_a_ratio_chooses_the_threshold(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {}
    for options in (("--cost", "1"), ("--cost", "0.01"), ("--snr", "-50"), ("--snr", "100")):
        assert evaluate(root, *options, "--conditions", "clean", "--max-frames", "16", "--json") == 0
        chosen[options] = json.loads(capsys.readouterr().out)["results"][0]["threshold"]
    assert list(chosen.values()) == [1, 12, 12, 1]


def test_disturbances_are_small_and_the_same_for_a_seed(root: Path) -> None:
    def frames(condition: Any, seed: int = 0) -> Array:
        with opened(root / "square.mp4", condition, every=1, max_frames=8, seed=seed) as found:
            return np.stack([Frame(index=0, time=None, image=decoded.image).rgb() for decoded in found]).astype(int)

    clean = frames("clean")
    for condition in ("flicker", "jitter", "reencoded"):
        disturbed = frames(condition)
        assert disturbed.shape == clean.shape
        assert 0 < np.abs(disturbed - clean).mean() < 12
        np.testing.assert_array_equal(disturbed, frames(condition))
    assert np.abs(frames("flicker") - clean).max() <= 0.05 * 255 + 1
    assert (frames("jitter", 1) != frames("jitter")).any()


class TestArms:
    def test_changed_patches_see_the_others_or_do_not(self, backbone: Backbone) -> None:
        frames = [scene(0), scene(4)]
        found = {context: self.tokens(backbone, frames, context=context) for context in (False, True)}
        before, after = found[False]
        changed = np.flatnonzero((before != after).any(axis=1))
        assert 0 < len(changed) < N
        patches = backbone.preprocess.crop_patches(backbone.preprocess.converted(frames[1]), changed, P)
        alone = backbone.update(backbone.new_cache(), patches[None], changed)["tokens"][0]
        np.testing.assert_allclose(after[changed], alone, atol=2e-5)
        assert np.abs(found[True][1][changed] - alone).max() > 1e-3
        kept = np.setdiff1d(np.arange(N), changed)
        np.testing.assert_array_equal(after[kept], before[kept])

    def tokens(self, backbone: Backbone, frames: list[Array], *, context: bool) -> list[Array]:
        """`(N, D)` after each frame."""
        arm = ChangedPatches(backbone, 4, context=context)
        return [arm(frame).features["tokens"][0].copy() for frame in frames]

    def test_costs_are_those_of_the_arm(self, backbone: Backbone) -> None:
        costs, arm = Costs(backbone, (2.0, 8.0, 32.0)), ChangedPatches(backbone, 8.0, context=True)
        paid = []
        for index in range(0, 20, 2):
            costs.add(scene(index))
            paid.append(arm(scene(index)).cost)
        assert costs.threshold(float(np.mean(paid)), context=True) == pytest.approx(8.0)
        assert costs.threshold(9.0, context=True) == pytest.approx(2.0)
        assert update_cost(backbone, 3, context=False) < update_cost(backbone, 3, context=True) < 1
        assert update_cost(backbone, N, context=True) == 1

    def test_what_was_computed_is_not_changed_any_more(self) -> None:
        frame = np.zeros((2 * P, 3 * P, 1), np.float32)
        changed = Changed(4, P)
        assert len(changed(frame)) == 6
        frame[:P, P : 2 * P] = 9
        assert changed(frame).tolist() == [1]
        assert changed(frame).tolist() == []

    def test_held_frames_are_evenly_spread(self) -> None:
        held = Held(0.4)
        answers = [held({"cls": np.full(1, index)}) for index in range(10)]
        assert [answer.cost for answer in answers] == [1, 0, 0, 1, 0, 1, 0, 0, 1, 0]
        assert answers[4].features["cls"] == 3

    def test_the_stream_is_the_stream(self, backbone: Backbone) -> None:
        given: dict[str, Any] = {"bypass": 0.9, "audit": 0.0}
        ours, stream = Streamed(backbone.stream(**given)), backbone.stream(**given)
        for index in range(3):
            answer, seen = ours(scene(index)), stream(scene(index))
            np.testing.assert_array_equal(answer.features["tokens"], seen["tokens"])
            assert (answer.cost, answer.whole) == (seen.cost, index == 0)
