"""Quickstart."""
