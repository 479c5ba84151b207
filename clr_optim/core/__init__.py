"""The parts of a CyclicalOptimizer, one job per file."""
