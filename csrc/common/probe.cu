// Does this build run on the GPU that is there?  A kernel for the wrong architecture fails to
// launch, and an unchecked launch leaves its output as it was: so launch one and look.

#include <cuda_runtime.h>

#include "probe.h"

namespace vsod {

namespace {

constexpr int kThreads = 64;

__global__ void probe_kernel(int* out) { out[threadIdx.x] = 3 * int(threadIdx.x) + 1; }

cudaError_t run_probe(int* out) {
  int* device_out = nullptr;
  cudaError_t error = cudaMalloc(&device_out, kThreads * sizeof(int));
  if (error != cudaSuccess) return error;
  probe_kernel<<<1, kThreads>>>(device_out);
  error = cudaGetLastError();
  if (error == cudaSuccess)
    error = cudaMemcpy(out, device_out, kThreads * sizeof(int), cudaMemcpyDeviceToHost);
  const cudaError_t freed = cudaFree(device_out);
  return error != cudaSuccess ? error : freed;
}

}  // namespace

const char* cuda_probe(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  int out[kThreads] = {};
  if (error == cudaSuccess) error = run_probe(out);
  cudaSetDevice(before);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  for (int i = 0; i < kThreads; ++i)
    if (out[i] != 3 * i + 1) return "a kernel ran and gave a wrong result";
  return "";
}

}  // namespace vsod
