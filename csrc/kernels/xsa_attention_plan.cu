// The order in which blocks of packed documents are worked on, made on the device: no host ever reads cu_seqlens.
#include "kernels/xsa_attention.h"

namespace pgolf {

constexpr int kThreads = 1024;
constexpr int kBuckets = kThreads;  // documents by number of blocks; the last bucket holds all longer ones

// Long documents first, so that the grid ends on short blocks; a document's blocks together, so that they share its keys in L2.
__global__ __launch_bounds__(kThreads) void xsa_attention_plan_kernel(const int32_t* cu_seqlens, int documents, XsaPlan plan,
                                                                      bool last_first) {
    __shared__ int place[kBuckets];
    const int mine = threadIdx.x;
    place[mine] = 0;
    __syncthreads();
    auto blocks_of = [&](int document) {
        return (cu_seqlens[document + 1] - cu_seqlens[document] + plan.tokens_per_block - 1) / plan.tokens_per_block;
    };
    auto bucket_of = [](int blocks) { return kBuckets - min(blocks, kBuckets); };  // descending
    for (int d = mine; d < documents; d += kThreads)
        if (int blocks = blocks_of(d)) atomicAdd(&place[bucket_of(blocks)], blocks);
    __syncthreads();

    // Inclusive prefix sum over the buckets, then each bucket's first place.
    const int own_blocks = place[mine];
    for (int offset = 1; offset < kBuckets; offset *= 2) {
        const int before = mine >= offset ? place[mine - offset] : 0;
        __syncthreads();
        place[mine] += before;
        __syncthreads();
    }
    if (mine == kBuckets - 1) plan.entries[0] = make_int4(place[mine], documents > 0 ? cu_seqlens[documents] : 0, 0, 0);
    __syncthreads();
    place[mine] -= own_blocks;
    __syncthreads();

    // NOTE: the order inside a bucket varies from run to run; no result depends on it.
    for (int d = mine; d < documents; d += kThreads) {
        const int blocks = blocks_of(d), start = cu_seqlens[d], length = cu_seqlens[d + 1] - start;
        if (blocks == 0) continue;
        int4* first = plan.entries + 1 + atomicAdd(&place[bucket_of(blocks)], blocks);
        for (int i = 0; i < blocks; ++i) first[i] = make_int4(start, length, last_first ? blocks - 1 - i : i, d);
    }
}

cudaError_t xsa_attention_plan(const int32_t* cu_seqlens, int documents, const XsaPlan& plan, bool last_first, cudaStream_t stream) {
    xsa_attention_plan_kernel<<<1, kThreads, 0, stream>>>(cu_seqlens, documents, plan, last_first);
    return cudaGetLastError();
}

}  // namespace pgolf
