"""Pruned models in serving runtimes: README.md beside this file is the guide."""
