"""`mae-deploy verify`: proof on this machine, and where it fails; torch-free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mae_deploy.commands.config import VerifyConfig
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.reporting.bundles import blocks_table, verification_table
from mae_deploy.reporting.command_line import next_command
from mae_deploy.reporting.tables import stacked
from mae_deploy.results import Result
from mae_deploy.runtime.bundle import Bundle
from mae_deploy.runtime.engines.base import EngineOptions
from mae_deploy.runtime.layers import LayerReport, first_broken_block, trace_layers
from mae_deploy.runtime.parity.checks import Verification, first_causes
from mae_deploy.runtime.verify import verify_bundle


def run_verify(config: VerifyConfig) -> Result:
    """Verify a bundle; with `layers`, also compare the tokens after every block.

    Raises:
        CheckFailed: a file is not what was exported, an output misses its tolerance, or a block gives what is no
            number.
        ConfigError: no bundle, an engine that cannot do this, or `layers` of a bundle without block outputs.
        MissingDependency: the engine's package or its device is absent.
    """
    if config.graph is not None:
        return _other_graph(config, config.graph)
    given = [name for name in ("samples", "precision") if getattr(config, name) is not None]
    if given:
        raise ConfigError(
            f"--{given[0]} is about --graph", hint="a bundle has its own samples and tolerance; leave it out"
        )
    bundle = Bundle.load(config.bundle)
    options = EngineOptions(device=config.device, threads=config.threads, affinity=config.affinity)
    verification = verify_bundle(bundle, config.engine, options)
    layers = (
        trace_layers(bundle, config.engine, options, outputs_pass=verification.outputs_pass) if config.layers else None
    )
    result = _result(verification, layers)
    failures = verification.failures
    if layers is not None and layers.broken is not None:
        failures.append(layers.conclusion)
    if verification.not_finite:  # the rest follows from where these begin
        begin = first_broken_block(bundle, verification.engine, options)
        failures = [*begin, *first_causes(failures, bundle.output_names)]
        raise CheckFailed(f"{config.bundle} misses parity: {failures[0]}", details=failures[1:], result=result)
    if failures:
        raise CheckFailed(f"{config.bundle} misses parity: {'; '.join(failures)}", result=result)
    return replace(result, then=next_command("predict", config.bundle, "IMAGES"))


def _other_graph(config: VerifyConfig, graph: Path) -> Result:
    if config.layers:
        raise ConfigError("--layers needs a bundle, whose blocks are known", hint="leave out --layers, or --graph")
    from mae_deploy.export.other_graph import verify_graph

    verification = verify_graph(
        config.bundle,
        graph,
        engine=config.engine,
        options=EngineOptions(device=config.device, threads=config.threads, affinity=config.affinity),
        precision=config.precision or "fp32",
        samples=config.samples,
    )
    result = _result(verification, None)
    if not verification.passed:
        raise CheckFailed(f"{graph} is not {config.bundle}: {'; '.join(verification.failures)}", result=result)
    return result


def _result(verification: Verification, layers: LayerReport | None) -> Result:
    data, table = verification.to_dict(), verification_table(verification)
    if layers is None:
        return Result(data, table)
    return Result({**data, "layers": layers.to_dict()}, stacked([table, blocks_table(layers)]))
