"""Inputs of the benchmarks and their float64 answers: one class per kind of work, made alike in every process."""
