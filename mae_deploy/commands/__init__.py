"""Commands that are no stage of their own: import, predict, info, doctor, quickstart, and how results look."""
