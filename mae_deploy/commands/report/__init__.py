"""`mae-deploy report`: trained classifiers in FP32 and INT8 side by side."""
