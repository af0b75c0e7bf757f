"""A camera's frames through a cached graph: what changed is computed, the features are the whole frame's."""
