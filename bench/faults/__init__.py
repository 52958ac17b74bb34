"""Benchmarks of what goes wrong: deaths, overload, time, changes and nonsense."""
