"""Raw kernels: C++ for CPUs (built by `cpp`), Triton for GPUs (imported by `gpu` when one is first called)."""
