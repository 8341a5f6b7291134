// Marks of functions that run on a GPU and, for tests, on the CPU.
#pragma once

#if defined(__CUDACC__)
#define VSOD_BOTH __host__ __device__ __forceinline__
#define VSOD_UNROLL _Pragma("unroll")
#define VSOD_UNROLL8 _Pragma("unroll 8")
#define VSOD_ROLLED _Pragma("unroll 1")
#else
#define VSOD_BOTH inline
#define VSOD_UNROLL
#define VSOD_UNROLL8
#define VSOD_ROLLED
#endif
