"""`mae-deploy sweep`: pretraining at several values of a setting, each evaluated."""
