"""Settings of export. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mae_deploy.config import Settings, section, setting
from mae_deploy.errors import ConfigError, MaeDeployError, errors_of
from mae_deploy.export.int8_config import Int8Config
from mae_deploy.images.geometry import CropMode
from mae_deploy.runtime.profiles import Profile, Range, covering, read_profiles
from mae_deploy.runtime.tensorrt.options import (
    BuildOptions,
    changed_options,
    check_rtx_options,
    tensorrt_major,
)
from mae_deploy.text import is_count
from mae_deploy.training.config import Device

_MODES = ("full", "visible", "ragged", "reconstruct", "cached")

_QUANTIZED = ("int8", "fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig(Settings, resume="never"):
    """Settings of `mae-deploy export`."""

    checkpoint: Path = setting(argument=True, metavar="CKPT")
    """A run folder, a checkpoint folder or a weights file."""
    out: Path
    """Bundle folder to write."""
    engine: Literal["onnx", "openvino", "trt", "trt-rtx"] = setting("onnx", basic=True)
    """The engine that the graph is made for and checked on: onnx (ONNX Runtime) or openvino, each of which runs the
    other's too; trt: TensorRT, an engine is built on this machine's GPU and put into the bundle; trt-rtx: TensorRT for
    RTX, an engine for all RTX GPUs is built without one."""
    build: bool = True
    """With --engine trt and trt-rtx; --no-build: check the graph on ONNX Runtime and leave the engine to 'mae-deploy
    build-engine' on the device."""
    tokens: str = setting("full", basic=True, metavar="MODE[:K]")
    """full: the whole image; visible: the patches given as ids_keep, any number of them, or visible:K for exactly K;
    ragged: each image its own number, padded (ragged:K: to K); reconstruct: encoder and decoder, all patches' pixels
        from the visible ones (reconstruct:K); cached: for streams, the given patches are recomputed against the keys
        and values of all (cached:K for exactly K a call)."""
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8"] = setting("fp32", basic=True)
    """Arithmetic of the graph; fp8 (E4M3) for TensorRT 10 and later."""
    typing: Literal["auto", "weak", "strong"] = "auto"
    """weak: an FP32 graph, opset 17, that tells the engine what it may compute in (weights stored in the precision, for
    TensorRT in FP32; Q/DQ with FP32 scales); strong: the types in the graph say it; auto: strong for fp16, and for bf16
    on OpenVINO, else weak; for TensorRT weak where TensorRT 8 is installed, else strong."""
    batch: str | None = setting(None, basic=True, metavar="INTEGER|dynamic")
    """A fixed batch size, or dynamic; default: dynamic, for TensorRT 1 unless --profile gives B."""
    profile: str | None = setting(None, basic=True, metavar="SIZES")
    """Smallest, usual and largest of the dynamic sizes, such as 'B:1,8,32 K:20,49,196'; default: B:1,8,32 and K from 1
    to all patches, usually a quarter. For TensorRT several, separated by ';', each with kernels of its own: 'B:1,1,1
    K:49,49,49; B:8,32,64 K:20,49,196'."""
    outputs: tuple[str, ...] | None = setting(None, basic=True, metavar="NAME,…")
    """Outputs by name: cls, tokens, pooled, logits, probs (their softmax, which servers such as nvinfer want),
    feature_map, block_I, p2 to p5, pixels; default: all of the first four that the model has."""
    layers: tuple[int, ...] | None = setting(None, at_least=0)
    """Also the patch tokens after these blocks, counted from 0, as outputs block_I."""
    pyramid: str | None = setting(None, metavar="PATH|random")
    """Also ViTDet's simple feature pyramid p2 to p5: a weights file of a detector trained on this backbone, or random
    (untrained, from --seed)."""
    images: Literal["float32", "float16", "uint8"] = setting("float32", basic=True)
    """Input type: normalised float (B, C, H, W), or uint8 (B, H, W, C) with the normalisation in the graph; float16
    only with --precision fp16."""
    one_std: bool = False
    """Divide all channels by one standard deviation, their mean, and let the weights take up the difference: DeepStream
    has one scale for all channels."""
    features: Literal["float32", "float16"] = "float32"
    """Type of the outputs; float16 only with --precision fp16."""
    cache: Literal["auto", "float32", "float16"] = "auto"
    """Type of the keys and values that --tokens cached takes and gives; auto: float16 with --precision fp16, else
    float32."""
    fp32_ops: tuple[Literal["softmax", "gelu", "norm", "residual"], ...] | None = None
    """What stays FP32 in an FP16 or strongly typed BF16 graph besides embedding, final norm, pooling and head; default:
    softmax in FP16, all in BF16; for TensorRT, which fuses attention only without FP32 in it, nothing in FP16, all but
    softmax in BF16."""
    pixels: Literal["target", "normalised", "image"] = "target"
    """Reconstructed pixels: as the decoder predicts them, in the space of the normalised images, or of images from 0 to
    1."""
    image_size: tuple[int, int] | None = setting(None, basic=True, at_least=1)
    """Input height and width, H[,W]; default: the checkpoint's; for another, positions are interpolated."""
    crop_mode: CropMode | None = setting(None)
    """How the bundle fits images of another form: center cuts out the middle, squash changes the aspect ratio, border
    pads with the mean, letterbox with black; default: as the checkpoint was made."""
    int8: Int8Config = section(Int8Config)
    tensorrt: BuildOptions = section(BuildOptions)
    triton: Path | None = None
    """Also write a model for Triton Inference Server to this repository, under the bundle's name: the engine, where one
    is built, else the graph."""
    deepstream: Path | None = None
    """Also write the engine to this folder with configurations for DeepStream; only with --tokens full and an
    engine."""
    samples: Path | None = setting(None, basic=True)
    """Folder of images for the parity check; default: the data that the checkpoint was trained on."""
    num_samples: int | None = setting(None, at_least=1)
    """Images of the parity check, default 32, for int8 and fp8 128, with --max-drop of the classes as many as that may
    need; the first 8 go into the bundle as golden samples."""
    max_pixels: int | None = setting(None, at_least=1)
    """Pixels of the largest image that is read, such as 300000000 for photos of 300 megapixels; default: 178956970."""
    threads: int | None = setting(None, at_least=1, at_most=4096)
    """CPU threads of the engine during the checks; default: one for each granted core."""
    seed: int = setting(0, at_least=0)
    """Seed of the visible patches in the parity check and in calibration."""
    device: Device = setting("cpu", basic=True)
    """Where PyTorch computes the reference: auto, cpu or cuda."""

    def faults(self) -> Iterator[MaeDeployError]:
        spelling = [*self._spelling_faults(), *errors_of(lambda: read_profiles(self.profile))]
        yield from spelling
        if spelling:  # what is read from these three is asked below
            return
        for flag, names in (("--outputs", self.outputs), ("--layers", self.layers)):
            if names is not None and len(set(names)) < len(names):
                yield ConfigError(f"{flag} {','.join(map(str, names))} must name each once")
        for flag, kind in (("--images", self.images), ("--features", self.features)):
            if kind == "float16" and self.precision != "fp16":
                yield ConfigError(f"{flag} float16 needs --precision fp16, not {self.precision}")
        if self.cache != "auto" and self.token_mode != "cached":
            yield ConfigError(f"--cache {self.cache} needs --tokens cached, not {self.tokens}")
        if self.cache == "float16" and self.precision == "fp32":
            yield ConfigError(
                "--cache float16 with --precision fp32: what FP16 rounds misses the tolerance of FP32",
                hint="leave it out, or pass another --precision",
            )
        if self.pixels != "target" and self.token_mode != "reconstruct":
            yield ConfigError(f"--pixels {self.pixels} needs --tokens reconstruct, not {self.tokens}")
        if (self.engine, self.precision, self.typing) == ("onnx", "bf16", "strong"):
            yield ConfigError(
                "--precision bf16 --typing strong: ONNX Runtime has no BF16 arithmetic on the CPU",
                hint="pass --engine openvino, or leave --typing out: weights stored in BF16, computed in FP32",
            )
        yield from self._profile_faults()
        yield from self._tensorrt_faults()
        yield from self._int8_faults()
        yield from self._serving_faults()

    @property
    def is_planned(self) -> bool:
        """Whether TensorRT, or TensorRT for RTX, builds a plan of the graph."""
        return self.engine in ("trt", "trt-rtx")

    @property
    def token_mode(self) -> Literal["full", "visible", "ragged", "reconstruct", "cached"]:
        """The part of `tokens` before the colon."""
        return self.tokens.partition(":")[0]  # type: ignore[return-value]

    @property
    def keep(self) -> int | None:
        """The fixed K of `visible:K`."""
        return int(self.tokens.partition(":")[2]) if ":" in self.tokens else None

    @property
    def cache_type(self) -> Literal["float32", "float16"]:
        """What auto means."""
        if self.cache != "auto":
            return self.cache
        return "float16" if self.precision == "fp16" else "float32"

    @property
    def fixed_batch(self) -> int | None:
        """The fixed batch; an engine of TensorRT is fastest at the one size that it is built for."""
        if self.batch is None:
            return 1 if self.is_planned and not any("B" in profile for profile in read_profiles(self.profile)) else None
        return None if self.batch == "dynamic" else int(self.batch)

    @property
    def resolved_typing(self) -> Literal["weak", "strong"]:
        """What auto means."""
        if self.typing != "auto":
            return self.typing
        if self.is_planned:
            old = self.engine == "trt" and tensorrt_major() == 8
            return "weak" if old and self.precision != "fp8" else "strong"
        return "strong" if self.precision == "fp16" or (self.precision, self.engine) == ("bf16", "openvino") else "weak"

    @property
    def islands(self) -> tuple[Literal["softmax", "gelu", "norm", "residual"], ...]:
        """What stays FP32 where the rest is FP16, or BF16."""
        if self.fp32_ops is not None:
            return self.fp32_ops
        if self.resolved_typing == "weak" or self.precision == "fp32":
            return ()
        if self.is_planned:
            return ("gelu", "norm", "residual") if self.precision == "bf16" else ()
        return () if self.precision == "bf16" else ("softmax",)

    @property
    def keeps_ops(self) -> bool:
        """Whether --fp32-ops has a meaning: the types in the graph say what is computed in what."""
        return self.resolved_typing == "strong" and self.precision != "fp32"

    @property
    def stored_precision(self) -> Literal["fp32", "fp16", "bf16", "int8", "fp8"]:
        """What the graph is written in: TensorRT is told what to compute a weak one in, and version 8 knows few types
        to cast weights from.
        """
        return (
            "fp32"
            if self.is_planned and self.resolved_typing == "weak" and self.precision in ("fp16", "bf16")
            else self.precision
        )

    @property
    def emulates_bf16(self) -> bool:
        """Whether ONNX Runtime's CPU, which checks graphs for TensorRT, is given products in FP32 of numbers that are
        rounded to BF16.
        """
        return self.is_planned and self.stored_precision == "bf16"

    @property
    def policy(self) -> Literal["dynamic", "static"]:
        """The faster INT8 on the engine unless one is asked for (docs/results/cpu.md)."""
        if self.int8.quantization != "auto":
            return self.int8.quantization
        statically = self.engine == "openvino" or self.is_planned or self.resolved_typing == "strong"
        statically |= self.int8.quantizer in ("nncf", "modelopt")
        return "static" if statically else "dynamic"

    @property
    def quantized(self) -> bool:
        """Whether Linears are in eight bits."""
        return self.precision in _QUANTIZED

    @property
    def sample_count(self) -> int:
        """Images of the parity check."""
        return self.num_samples or (128 if self.quantized else 32)

    def in_precision(self, precision: Literal["fp32", "fp16"]) -> ExportConfig:
        """The same export without eight bits, typed as it is."""
        fp32_ops = None if precision == "fp32" else self.fp32_ops
        return replace(self, precision=precision, typing=self.resolved_typing, int8=Int8Config(), fp32_ops=fp32_ops)

    def profiles(self, num_patches: int) -> list[Profile]:
        """The sizes that are open, of each profile: min, opt, max of B, and of K where patches are chosen; three equal
        numbers where fixed.

        Raises:
            ConfigError: a K beyond the number of patches.
        """
        B, K = self.fixed_batch, self.keep
        found: list[Profile] = []
        for given in read_profiles(self.profile) or [{}]:
            sizes: Profile = {"B": given.get("B", (1, 8, 32)) if B is None else (B, B, B)}
            if self.token_mode != "full":
                sizes["K"] = given.get("K", (1, max(1, num_patches // 4), num_patches)) if K is None else (K, K, K)
                if sizes["K"][2] > num_patches:
                    raise ConfigError(f"K {sizes['K'][2]} is more than the {num_patches} patches of this model")
            found.append(sizes)
        return found

    def ranges(self, num_patches: int) -> dict[str, Range]:
        """The smallest, usual and largest sizes over all profiles; the usual one is the first profile's.

        Raises:
            ConfigError: a K beyond the number of patches.
        """
        return {
            name: (least, usual, most) for name, (least, usual, most) in covering(self.profiles(num_patches)).items()
        }

    def _spelling_faults(self) -> Iterator[ConfigError]:
        mode, colon, keep = self.tokens.partition(":")
        if mode not in _MODES or (colon and (mode == "full" or not is_count(keep))):
            yield ConfigError(
                f"--tokens '{self.tokens}' is not full, visible, ragged, reconstruct or cached",
                hint="the last four also with :K for a fixed number of patches, such as visible:49",
            )
        if self.batch not in (None, "dynamic") and not is_count(self.batch):
            yield ConfigError(f"--batch '{self.batch}' is not a whole number of at least 1, or dynamic")

    def _profile_faults(self) -> Iterator[ConfigError]:
        profiles = read_profiles(self.profile)
        given = {name for profile in profiles for name in profile}
        for name, value in (("B", self.fixed_batch), ("K", self.keep)):
            if value is not None and name in given:
                yield ConfigError(
                    f"--profile '{self.profile}' gives a range for {name}, which is fixed to {value}",
                    hint="leave one of the two out",
                )
        if "K" in given and self.token_mode == "full":
            yield ConfigError(
                f"--profile '{self.profile}': a graph of all patches has no K", hint="use --tokens visible"
            )
        if len(profiles) > 1 and not self.is_planned:
            yield ConfigError(
                f"--profile '{self.profile}': only engines of TensorRT have several profiles",
                hint="give one, or pass --engine trt",
            )

    def _serving_faults(self) -> Iterator[ConfigError]:
        if self.one_std and self.token_mode == "reconstruct":
            yield ConfigError(
                f"--one-std with --tokens {self.tokens}: the decoder predicts pixels divided by each channel's own",
                hint="leave it out",
            )
        builds = self.engine == "trt" and self.build
        if self.triton is not None and self.engine == "trt-rtx":
            yield ConfigError(
                f"--triton {self.triton}: Triton runs engines of TensorRT, not of TensorRT for RTX",
                hint="pass --engine trt, or --engine onnx for the graph",
            )
        if self.triton is not None and self.token_mode == "cached":
            yield ConfigError(
                f"--triton {self.triton} with --tokens {self.tokens}: Triton does not keep what a stream remembers",
                hint="export with --tokens visible; streams run in Python (docs/bundles.md)",
            )
        if self.triton is not None and not builds and (self.precision, self.resolved_typing) == ("bf16", "strong"):
            yield ConfigError(
                f"--triton {self.triton}: ONNX Runtime, which serves the graph, does not compute in BF16",
                hint="pass another --precision; a TensorRT engine of it can be served",
            )
        if self.deepstream is not None and not builds:
            yield ConfigError(
                f"--deepstream {self.deepstream} needs a TensorRT engine, and this export builds none",
                hint="pass --engine trt without --no-build, or --deepstream to 'mae-deploy build-engine' on the device",
            )

    def _tensorrt_faults(self) -> Iterator[MaeDeployError]:
        if self.engine == "trt-rtx":
            yield from errors_of(lambda: check_rtx_options(self.tensorrt))
            if self.typing == "weak":
                yield ConfigError(
                    "--engine trt-rtx with --typing weak: TensorRT for RTX computes in what the graph's types say",
                    hint="leave --typing out",
                )
        if self.is_planned:
            if self.int8.quantization == "dynamic":
                yield ConfigError(
                    "--quantization dynamic: TensorRT takes INT8 with calibrated ranges only",
                    hint="leave it out, and give --calib-data",
                )
            return
        if self.precision == "fp8":
            yield ConfigError(
                f"--precision fp8 with --engine {self.engine}: only TensorRT computes in FP8", hint="pass --engine trt"
            )
        prefer = [] if self.int8.prefer is None else [f"--prefer {self.int8.prefer}"]
        for given in [*(["--no-build"] if not self.build else []), *prefer, *changed_options(self.tensorrt)]:
            yield ConfigError(f"{given} with --engine {self.engine}", hint="pass --engine trt, or leave it out")

    def _int8_faults(self) -> Iterator[ConfigError]:
        if not self.quantized:
            for given in changed_options(self.int8):
                yield ConfigError(
                    f"{given} with --precision {self.precision}", hint="pass --precision int8, or leave it out"
                )
            return
        if self.precision == "fp8":
            own = {"--quantization": self.int8.quantization, "--calib-method": self.int8.calib_method}
            for flag, value in own.items():
                if value in ("dynamic", "percentile", "entropy"):
                    yield ConfigError(
                        f"{flag} {value} with --precision fp8, whose ranges are the largest magnitudes",
                        hint="leave it out",
                    )
        if self.int8.weight_bits == 7:
            trt = [f"--engine {self.engine}"] if self.is_planned else []
            for given in [*trt, *(["--int8-attention"] if self.int8.int8_attention else [])]:
                yield ConfigError(
                    f"--weight-bits 7 with {given}: it keeps products of weights on CPUs from overflowing, no others",
                    hint="leave one of the two out",
                )
        if self.int8.int8_attention and self.token_mode == "cached":
            yield ConfigError(
                f"--int8-attention with --tokens {self.tokens}: no engine fuses attention to a cache in eight bits",
                hint="leave it out: the Linears alone are most of the arithmetic",
            )
        if self.policy == "static" and self.int8.calib_data is None:
            yield ConfigError(
                f"--precision {self.precision} with static ranges needs --calib-data",
                hint="a folder of at least 128 images like those that the model will see",
            )
        if self.policy == "dynamic" and (self.resolved_typing == "strong" or self.int8.int8_attention):
            given = "--int8-attention" if self.int8.int8_attention else "--typing strong"
            yield ConfigError(
                f"{given} with dynamic INT8, which does not have it", hint="pass --quantization static and --calib-data"
            )
        yield from self.int8.quantizer_faults(self.policy)
        if self.int8.quantizer != "own":
            others: dict[str, str] = {"--engine": self.engine if self.is_planned else "", "--precision": self.precision}
            others |= {"--tokens": self.tokens if self.token_mode == "cached" else ""}
            others |= {"--typing": self.typing if self.resolved_typing == "strong" else ""}
            for option, given in others.items():
                if given not in ("", "int8"):
                    yield ConfigError(
                        f"--quantizer {self.int8.quantizer} with {option} {given}: only our own makes such graphs",
                        hint="leave out --quantizer",
                    )
        if self.int8.calib_data is None and self.int8.bias_correction:
            yield ConfigError("--bias-correction needs --calib-data", hint="a folder of at least 128 images")
