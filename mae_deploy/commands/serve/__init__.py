"""`mae-deploy serve`: bundles over HTTP, in batches, with a page to try them; torch-free."""
