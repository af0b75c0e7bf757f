"""`mae-deploy benchmark`: bundles, engines, patches and batch sizes timed in turns. Imports no torch."""
