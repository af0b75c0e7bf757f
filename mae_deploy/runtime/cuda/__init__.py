"""The GPU without torch: the driver, memory, streams and arrays. Knows no engine."""
