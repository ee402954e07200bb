// What the kernels share: PTX without a C++ name of its own, so that no toolkit header is needed.
#pragma once

// Programmatic dependent launch.  Until pdl_wait returns, nothing may be read or written that the
// kernel before writes or reads; pdl_start lets the kernel after this one begin its own prologue.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void pdl_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
