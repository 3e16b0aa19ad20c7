"""How fast the kernels are, against cuDNN's dense attention in the same run: `python -m pallas_kernels.benchmarks`."""
