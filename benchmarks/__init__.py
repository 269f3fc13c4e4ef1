"""Benchmarks: each module prints a table, or one JSON object with --json; --quick is a smoke run."""
