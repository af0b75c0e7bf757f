"""What a run leaves on disk and resumes from: its folder, progress, averages, sharded state."""
