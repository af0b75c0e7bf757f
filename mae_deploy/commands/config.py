"""Settings of the commands that only look at, check or use what others made. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_deploy.config import Settings, section, setting
from mae_deploy.errors import ConfigError, MaeDeployError, errors_of
from mae_deploy.hub import Address, check_own
from mae_deploy.runtime.manifest import QUANTIZED
from mae_deploy.runtime.profiles import read_profiles
from mae_deploy.runtime.tensorrt.options import BuildOptions
from mae_deploy.training.config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig(Settings, resume="never"):
    """Settings of `mae-deploy verify`."""

    bundle: Path = setting(argument=True, metavar="BUNDLE")
    """Bundle folder, or hf://ORG/NAME on a model hub; with --graph a checkpoint."""
    layers: bool = False
    """Also compare the tokens after every block with PyTorch's, and name the block where precision is lost."""
    graph: Path | None = None
    """Somebody else's ONNX file of a checkpoint's weights: its outputs are compared with PyTorch's, which must be
    installed."""
    certificate: Path | None = setting(None, metavar="FILE")
    """Also measure here what the bundle is worth beside FP32, and write it to this JSON file: classes, speed and the
    worst image, with intervals of 95 % confidence, and the rules that were applied."""
    against: Path | None = setting(None, metavar="BUNDLE|CKPT")
    """With --certificate: the same export in FP32, or a checkpoint to export so (needs PyTorch); default: the
    checkpoint that the bundle records, where it is still there; without one the golden samples alone are compared."""
    signature: Path | None = setting(None, metavar="PUBLIC_KEY")
    """First check that everything in the bundle is as the holder of this key (PEM) has signed it, and nothing else is
    there."""
    samples: Path | None = None
    """With --graph and --certificate: folder of images, for the latter in folders named by class where accuracy is to
    be known; default: the data that the checkpoint was trained on, or the images of the export."""
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] | None = None
    """With --graph: the precision whose tolerance its outputs must meet; default: fp32."""
    engine: str = setting("auto", metavar="ENGINE")
    """onnxruntime (onnx), openvino (ov), tensorrt (trt) or tensorrt-rtx (trt-rtx); auto: TensorRT where the bundle has
    an engine for this machine, else the one on which the bundle was checked, where it is installed, else
    onnxruntime."""
    threads: int | None = setting(None, at_least=1, at_most=4096)
    """CPU threads of the engine; default: one for each granted core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that the engine is bound to, e.g. 0,1 (Linux); default: any."""
    seed: int = 0
    """Not used: the golden samples are fixed."""
    device: Device = "cpu"
    """Where to compute; auto takes the GPU where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildEngineConfig(Settings, resume="never"):
    """Settings of `mae-deploy build-engine`."""

    bundle: Path = setting(argument=True, metavar="BUNDLE")
    """Bundle folder; the engine is added to it."""
    engine: Literal["auto", "trt", "trt-rtx"] = "auto"
    """trt: TensorRT, for this machine's GPU; trt-rtx: TensorRT for RTX, which needs no GPU and builds for all RTX GPUs;
    auto: trt-rtx where the bundle was exported for it, else trt."""
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] | None = None
    """Arithmetic of the engine; default: the bundle's. An FP32 bundle with weak typing can also be built in fp16 and
    bf16, an INT8 or FP8 bundle in fp16."""
    profile: str | None = setting(None, metavar="SIZES")
    """Smallest, usual and largest sizes to build for, such as 'B:1,8,32 K:20,49,196', several separated by ';';
    default: those of the export."""
    prefer: Literal["fp16"] | None = None
    """fp16: keep FP16 where INT8 or FP8 is not faster, or misses its accuracy budget, instead of an error."""
    triton: Path | None = None
    """Also write the engine to this model repository of Triton Inference Server, under the bundle's name."""
    deepstream: Path | None = None
    """Also write the engine to this folder with configurations for DeepStream; for bundles of all patches."""
    build: BuildOptions = section(BuildOptions)
    seed: int = 0
    """Not used: the golden samples are fixed."""
    device: str = "auto"
    """The GPU on which and for which it is built: the first, or with cuda:1 the second, and so on; with trt-rtx the one
    that checks it, where there is one."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from errors_of(lambda: check_own(self.bundle, "BUNDLE"))
        yield from errors_of(lambda: read_profiles(self.profile))
        if self.prefer is not None and self.precision not in (None, *QUANTIZED):
            yield ConfigError(
                f"--prefer {self.prefer} does not go with --precision {self.precision}", hint="it is for int8 and fp8"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictConfig(Settings, resume="never"):
    """Settings of `mae-deploy predict`."""

    bundle: Path = setting(argument=True, metavar="BUNDLE")
    """Bundle folder, or hf://ORG/NAME on a model hub."""
    images: tuple[Path, ...] = setting(argument=True)
    """Images, folders of images, patterns such as 'photos/**/*.jpg', @list.txt for a list with a path a line, or - for
    such a list on standard input."""
    out: Path | None = None
    """Write the outputs of every image to this .npz or .parquet file."""
    top_k: int = setting(5, at_least=1)
    """Classes to print for each image, where the bundle has logits."""
    outputs: tuple[str, ...] | None = setting(None, metavar="NAME,…")
    """Outputs to compute, by name; default: all."""
    keep: tuple[int, ...] | None = None
    """Patches that the encoder sees, row-major indices and ranges such as 0-48,60 (visible, ragged and reconstruct
    bundles); default: all."""
    keep_mask: Path | None = None
    """These patches as a mask instead: a .npy file that is true where a patch is seen, (N,) or (rows, columns)."""
    num_keep: int | None = None
    """See this many patches of each image instead, drawn at random."""
    batch_size: int | None = setting(None, at_least=1)
    """Images at a time; default: the graph's fixed batch, or 8."""
    max_pixels: int | None = setting(None, at_least=1)
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""
    engine: str = setting("auto", metavar="ENGINE")
    """onnxruntime (onnx), openvino (ov), tensorrt (trt) or tensorrt-rtx (trt-rtx); auto: TensorRT where the bundle has
    an engine for this machine, else the one on which the bundle was checked, where it is installed, else
    onnxruntime."""
    threads: int | None = setting(None, at_least=1, at_most=4096)
    """CPU threads of the engine; default: one for each granted core, or for each of --affinity."""
    affinity: tuple[int, ...] | None = None
    """CPU cores that the engine is bound to, e.g. 0,1 (Linux); default: any."""
    seed: int = 0
    """Seed of --num-keep."""
    device: Device = "cpu"
    """Where to compute; auto takes the GPU where there is one."""

    def faults(self) -> Iterator[MaeDeployError]:
        given = {"--keep": self.keep, "--keep-mask": self.keep_mask, "--num-keep": self.num_keep}
        if len(names := [name for name, value in given.items() if value is not None]) > 1:
            yield ConfigError(f"{' and '.join(names)} exclude one another")


@dataclass(frozen=True, kw_only=True, slots=True)
class InfoConfig(Settings, resume="never"):
    """Settings of `mae-deploy info`."""

    path: Path = setting(argument=True, metavar="CKPT|BUNDLE")
    """A run folder, a checkpoint folder, a weights file or a bundle."""
    seed: int = 0
    """Not used: nothing here is random."""
    device: Device = "cpu"
    """Not used: nothing is computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SignConfig(Settings, resume="never"):
    """Settings of `mae-deploy sign`."""

    bundle: Path = setting(argument=True, metavar="BUNDLE")
    """Bundle folder; the signature is added to it."""
    key: Path = setting(metavar="PRIVATE_KEY")
    """Private key on an elliptic curve (P-256, P-384 or P-521), PEM; the password of an encrypted one stands in
    MAE_DEPLOY_KEY_PASSWORD."""
    seed: int = 0
    """Not used: nothing here is random."""
    device: Device = "cpu"
    """Not used: nothing is computed."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from errors_of(lambda: check_own(self.bundle, "BUNDLE"))


@dataclass(frozen=True, kw_only=True, slots=True)
class PushConfig(Settings, resume="never"):
    """Settings of `mae-deploy push`."""

    bundle: Path = setting(argument=True, metavar="BUNDLE")
    """Bundle folder."""
    to: str = setting(argument=True, metavar="ADDRESS")
    """Where to put it: hf://ORG/NAME for a repository of its own, hf://ORG/NAME/FOLDER for a folder in one, with
    @BRANCH behind the name where it is not the main branch."""
    license: str | None = None
    """What others may do with weights of your own, such as Apache-2.0, for the card; weights that derive from others
    keep their licence."""
    private: bool = False
    """Make the repository private, where it is not there yet."""
    keep_card: bool = True
    """Leave a README.md that somebody else wrote as it is."""
    message: str | None = None
    """Of the commit; default: the model, its tokens and its precision."""
    seed: int = 0
    """Not used: nothing here is random."""
    device: Device = "cpu"
    """Not used: nothing is computed."""

    def faults(self) -> Iterator[MaeDeployError]:
        yield from errors_of(lambda: Address.read(self.to))
        yield from errors_of(lambda: check_own(self.bundle, "BUNDLE"))


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemaConfig(Settings, resume="never"):
    """Settings of `mae-deploy schema`."""

    command: tuple[str, ...] = setting(argument=True)
    """The command whose settings are described, such as pretrain or data pack."""
    seed: int = 0
    """Not used: nothing here is random."""
    device: Device = "cpu"
    """Not used: nothing is computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig(Settings, resume="never"):
    """Settings of `mae-deploy doctor`."""

    rates: bool = True
    """Measure how fast each engine multiplies in FP32, BF16 and INT8, a second each, and say what to choose here."""
    seed: int = 0
    """Not used: nothing here is random."""
    device: Device = "auto"
    """Not used: every device is looked at."""
