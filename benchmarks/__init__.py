"""Side-by-side measurements: each module prints a table and writes its numbers to benchmarks/results/."""
