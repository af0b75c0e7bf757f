"""Weight files of other projects, a module a source. Never unpickles."""
