"""A CUDA device that is none: GPU tests on a CPU, with streams in random order."""
