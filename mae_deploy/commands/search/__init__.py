"""`mae-deploy search`: neighbours, duplicates and outliers among features."""
