"""`mae-deploy data stats` and `data pack`. Imports no torch."""
