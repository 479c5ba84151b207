"""What a CyclicalOptimizer is made of."""
