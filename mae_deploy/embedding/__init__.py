"""Features of whole collections in sharded Parquet, each image once, and what is found among them."""
