"""`python -m mae_deploy`, which torchrun needs."""

from mae_deploy.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
