"""`mae-deploy quickstart`: the whole chain on images that need no download."""
