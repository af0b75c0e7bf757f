"""Benchmark_train."""
