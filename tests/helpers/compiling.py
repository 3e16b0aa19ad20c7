"""How XLA compiles in tests, whose time is mostly spent on compiling: they need right code, not fast code."""

# The extra option is for CPUs and JAX up to 0.11: without it, fusions pass through MLIR, which takes three times as
# long as all the rest. Later versions have no such choice and ignore it.
QUICKLY = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
