// Sizes of persistent grids.
#pragma once
#include <cuda_runtime_api.h>

namespace pgolf {

// Of the current device.
inline cudaError_t multiprocessors(int& count) {
    int device = 0;
    if (cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// How many CTAs of `kernel` the current device holds at once.
template <typename Kernel>
cudaError_t resident_ctas(Kernel kernel, int threads, int& ctas) {
    int num_sms = 0, per_sm = 0;
    if (cudaError_t status = multiprocessors(num_sms); status != cudaSuccess) return status;
    const cudaError_t status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, 0);
    ctas = num_sms * per_sm;
    return status;
}

}  // namespace pgolf
