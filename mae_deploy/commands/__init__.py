"""Commands that are no stage, a module or a folder each. Nothing but the command line imports them."""
