"""The command `mae-deploy`, and `python -m mae_deploy`, which torchrun needs."""

from mae_deploy.interrupts import end_at_once


def run() -> int:
    """The command line; returns the exit code. A signal before it listens, or when it is done, ends the process with
    the same line.
    """
    with end_at_once():
        from mae_deploy.cli import main
    code = main()
    end_at_once().__enter__()
    return code


if __name__ == "__main__":
    raise SystemExit(run())
