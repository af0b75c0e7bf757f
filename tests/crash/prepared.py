"""Everything that commands import, for a server of forks that imports it once."""

from importlib import import_module

from tests.hostile.run import prepare

prepare()
for _name in (
    *("mae_deploy.commands.build_engine", "mae_deploy.commands.certify", "mae_deploy.commands.embed.run"),
    *("mae_deploy.commands.push", "mae_deploy.commands.quickstart.run", "mae_deploy.commands.report.run"),
    *("mae_deploy.commands.search.run", "mae_deploy.commands.sign", "mae_deploy.commands.benchmark_train.run"),
    *("mae_deploy.commands.verify", "mae_deploy.embedding.local", "tests.commands.quickstart.test_run"),
    *("huggingface_hub", "model_signing.signing", "openvino", "tensorboard", "transformers"),
):
    import_module(_name)
