"""What watches a run: losses that are not finite, timing, trackers, profiles, signals."""
