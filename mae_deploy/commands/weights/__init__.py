"""`mae-deploy import` and `export-weights`: weights from elsewhere and to elsewhere."""
