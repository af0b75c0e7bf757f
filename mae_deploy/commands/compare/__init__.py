"""`mae-deploy compare --at-latency`: encoders at equal measured latency on this machine."""
