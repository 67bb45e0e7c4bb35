"""What a GPU is good for here, measured with one command: `python -m benchmarks.gpu`."""
