"""How XLA compiles in tests, whose time is mostly spent on compiling: they need right code, not fast code."""

import platform

QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if platform.machine() in ("x86_64", "AMD64"):
    # Up to JAX 0.11, fusions pass through MLIR if they are not told otherwise, which takes longer than all the rest.
    # Without it, LLVM would contract products and differences, and a score of 1e30 less itself would not be 0; up to
    # AVX there is no such instruction. Later versions ignore the option.
    QUICKLY += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_max_isa=AVX"
