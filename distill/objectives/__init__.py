"""What a student can be asked to match, one objective a file."""
