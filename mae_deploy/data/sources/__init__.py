"""What DATA may be: folders, tar shards, tables on disk. Nothing here augments or orders images."""
