// The order in which blocks of packed documents are worked on, and each token's place.
#include "kernels/xsa_attention.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 1024;
constexpr int kBuckets = kThreads;  // documents by number of blocks; the last bucket holds all longer ones

// Inclusive, over the threads of the block; left in `shared` too.
template <class Combine>
__device__ int scan(int (&shared)[kThreads], int mine, Combine&& combine) {
    shared[threadIdx.x] = mine;
    __syncthreads();
    for (int offset = 1; offset < kThreads; offset *= 2) {
        if (threadIdx.x >= offset) mine = combine(shared[threadIdx.x - offset], mine);
        __syncthreads();
        shared[threadIdx.x] = mine;
        __syncthreads();
    }
    return mine;
}

// Block 0 makes the list of queries, block 1 that of keys: long documents first, so that the grid ends on short blocks; a document's
// blocks together, so that they share its keys in L2.
__global__ __launch_bounds__(kThreads) void xsa_attention_plan_kernel(const __grid_constant__ XsaPlanParams p) {
    __shared__ int s_ends[kThreads], s_sums[kBuckets], s_place[kBuckets];
    const bool last_first = blockIdx.x == 0;
    const XsaPlan plan = last_first ? p.queries : p.keys;
    const int mine = threadIdx.x, each = (p.documents + kThreads - 1) / kThreads;
    const int first = min(mine * each, p.documents), last = min(first + each, p.documents);
    // The documents of this thread, of which any list makes neighbours that lie within the tokens.
    auto for_own_documents = [&](int start, auto&& use) {
        for (int d = first; d < last; ++d) {
            const int end = max(start, min(p.cu_seqlens[d + 1], p.tokens));
            use(d, start, end - start);
            start = end;
        }
    };
    int end = 0;
    for_own_documents(0, [&](int, int start, int length) { end = start + length; });
    scan(s_ends, end, [](int a, int b) { return max(a, b); });
    const int begin = mine > 0 ? s_ends[mine - 1] : 0;

    auto blocks_of = [&](int length) { return (length + plan.tokens_per_block - 1) / plan.tokens_per_block; };
    auto bucket_of = [](int blocks) { return kBuckets - min(blocks, kBuckets); };  // descending
    s_place[mine] = 0;
    __syncthreads();
    for_own_documents(begin, [&](int, int, int length) {
        if (const int blocks = blocks_of(length)) atomicAdd(&s_place[bucket_of(blocks)], blocks);
    });
    __syncthreads();
    const int own_blocks = s_place[mine], sum = scan(s_sums, own_blocks, [](int a, int b) { return a + b; });
    if (mine == kBuckets - 1) plan.entries[0] = make_int4(sum, s_ends[kThreads - 1], 0, 0);
    s_place[mine] = sum - own_blocks;
    __syncthreads();

    // NOTE: the order inside a bucket varies from run to run; no result depends on it.
    for_own_documents(begin, [&](int document, int start, int length) {
        const int blocks = blocks_of(length);
        if (blocks == 0) return;
        int4* entries = plan.entries + 1 + atomicAdd(&s_place[bucket_of(blocks)], blocks);
        for (int i = 0; i < blocks; ++i) entries[i] = make_int4(start, length, last_first ? blocks - 1 - i : i, document);
    });
}

// A thread per token of a block of queries.
__global__ void xsa_places_kernel(const __grid_constant__ XsaPlanParams p) {
    const xsa::Sequence seq = xsa::find_sequence(p.queries, p.tokens, 1, true);
    const int at = seq.block * p.queries.tokens_per_block + threadIdx.x, token = seq.start + at;
    if (seq.length == 0 && token < p.tokens) p.places[token] = {-1, -1};
    if (at < seq.length) p.places[token] = {seq.start, xsa::stats_place(seq.start, seq.document) + at};
}

}  // namespace

cudaError_t xsa_attention_plan(const XsaPlanParams& p, cudaStream_t stream) {
    xsa_attention_plan_kernel<<<2, kThreads, 0, stream>>>(p);
    if (cudaError_t launched = cudaGetLastError(); launched != cudaSuccess) return launched;
    xsa_places_kernel<<<p.queries.capacity - 1, p.queries.tokens_per_block, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace pgolf
