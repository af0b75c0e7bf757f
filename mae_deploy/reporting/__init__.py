"""How results look: tables, Markdown, plots, and the command that made them. Must not import torch."""
