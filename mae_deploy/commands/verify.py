"""`mae-deploy verify`: proof on this machine, and where it fails; torch-free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mae_deploy.commands.config import VerifyConfig
from mae_deploy.commands.sign import check_signature
from mae_deploy.errors import CheckFailed, ConfigError
from mae_deploy.files import refuse_to_overwrite, write_json
from mae_deploy.progress import notice
from mae_deploy.reporting.bundles import blocks_table, certificate_tables, run_command, verification_table
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
        CheckFailed: its signature does not hold, a file is not what was exported, an output misses its tolerance, a
            block gives what is no number, or a budget is not shown to be met.
        ConfigError: no bundle, an engine that cannot do this, or `layers` of a bundle without block outputs.
        MissingDependency: the engine's package or its device is absent.
    """
    _check_options(config)
    if config.signature is not None:
        check_signature(config.bundle, config.signature)
    if config.graph is not None:
        return _other_graph(config, config.graph)
    if config.certificate is not None:
        refuse_to_overwrite(config.certificate, option="--certificate", file=True)
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
        causes = first_causes(failures, bundle.output_names)
        raise CheckFailed(f"{config.bundle} misses parity: {'; '.join(causes)}", result=result)
    if config.certificate is not None:
        result = _certified(config, config.certificate, bundle, options, verification, result)
    return replace(result, then=run_command(bundle, config.bundle))


def _check_options(config: VerifyConfig) -> None:
    """Options of one kind of check with those of another."""
    if config.graph is not None and config.certificate is not None:
        raise ConfigError("--certificate needs a bundle, whose budget is known", hint="leave out --graph, or this")
    if config.precision is not None and config.graph is None:
        raise ConfigError("--precision is about --graph", hint="a bundle has its own tolerance; leave it out")
    if config.samples is not None and config.graph is None and config.certificate is None:
        raise ConfigError(
            "--samples is about --graph and --certificate", hint="a bundle has its own samples; leave it out"
        )
    if config.against is not None and config.certificate is None:
        raise ConfigError("--against is about --certificate", hint="pass --certificate FILE, or leave it out")


def _certified(
    config: VerifyConfig, file: Path, bundle: Bundle, options: EngineOptions, verification: Verification, result: Result
) -> Result:
    """With the certificate, which is written whether or not its rules are met."""
    from mae_deploy.commands.certify import certify

    record, failures = certify(
        bundle, verification, engine=config.engine, options=options, against=config.against, samples=config.samples
    )
    write_json(file, record)
    notice("certificate:", f"written to {file}")
    view = stacked([verification_table(verification), *certificate_tables(record)])
    result = Result({**result.data, "certificate": record}, view)
    if failures:
        raise CheckFailed(f"{config.bundle} misses its budget: {'; '.join(failures)}", result=result)
    return result


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
