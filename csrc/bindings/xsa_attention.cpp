#include "kernels/xsa_attention.h"

#include <algorithm>

#include "bindings/xsa_checks.h"
#include "kernels/qkv.h"

namespace pgolf {
namespace {

// The stride of a dimension of one element means nothing and may be anything: replaced by one that spans all other dimensions.
HeadRows head_rows(const Tensor& t, const char* argument, int64_t batch, int64_t tokens, int64_t heads) {
    check(t, argument, ScalarType::BFloat16, {batch, tokens, heads, kXsaHeadDim});
    check_aligned(t, argument);
    STD_TORCH_CHECK(t.stride(3) == 1, argument, ": the last dimension must be contiguous");
    int64_t span = kXsaHeadDim;
    for (int d = 0; d < 3; ++d) {
        if (t.size(d) == 1) continue;
        STD_TORCH_CHECK(t.stride(d) > 0 && t.stride(d) % 8 == 0, argument, ": expected strides that are multiples of 8 elements, got ",
                        t.stride(d));
        span = std::max(span, t.size(d) * t.stride(d));
    }
    int64_t stride[3];
    for (int d = 0; d < 3; ++d) stride[d] = t.size(d) > 1 ? t.stride(d) : span;
    return {static_cast<__nv_bfloat16*>(t.data_ptr()), stride[0], stride[1], stride[2]};
}

GateRows gate_rows(const optional<Tensor>& t, const char* argument, int64_t batch, int64_t tokens, int64_t heads) {
    if (!t) return {};
    const bool is_bf16 = t->scalar_type() == ScalarType::BFloat16;
    check(*t, argument, is_bf16 ? ScalarType::BFloat16 : ScalarType::Float, {batch, tokens, heads});
    return {t->data_ptr(), is_bf16, t->stride(0), t->stride(1), t->stride(2)};
}

XsaPlan plan_of(const optional<Tensor>& t, const char* argument, int64_t tokens, int64_t documents, int tokens_per_block) {
    if (!t) return {nullptr, 0, tokens_per_block};
    check(*t, argument, ScalarType::Int, {-1, 4});
    check_contiguous(*t, argument);
    check_aligned(*t, argument);
    const bool fits = t->size(0) >= xsa_plan_capacity(tokens, documents, tokens_per_block);
    STD_TORCH_CHECK(fits, argument, ": too short for ", tokens, " tokens and ", documents, " documents");
    return {static_cast<int4*>(t->data_ptr()), int_size(t->size(0), argument), tokens_per_block};
}

void plan(Tensor cu_seqlens, Tensor queries, Tensor keys, Tensor places, int64_t queries_per_block) {
    XsaPlanParams p{};
    const int64_t tokens = places.size(0), documents = cu_seqlens.size(0) - 1;
    STD_TORCH_CHECK(tokens > 0 && tokens < (1 << 30), "places: expected 1 to 2^30 tokens, got ", tokens);
    STD_TORCH_CHECK(documents >= 0, "cu_seqlens: expected [documents + 1], got an empty list");
    STD_TORCH_CHECK(queries_per_block == kXsaTile || queries_per_block == 2 * kXsaTile, "queries_per_block: expected one tile or two");
    check(cu_seqlens, "cu_seqlens", ScalarType::Int, {-1});
    check_contiguous(cu_seqlens, "cu_seqlens");
    p.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.data_ptr());
    p.documents = int_size(documents, "cu_seqlens"), p.tokens = int(tokens);
    p.queries = plan_of(queries, "queries", tokens, documents, int(queries_per_block));
    p.keys = plan_of(keys, "keys", tokens, documents, kXsaKeysPerBlock);
    p.places = places_of(places, tokens);
    OnDeviceOf device(cu_seqlens);
    check_launch(xsa_attention_plan(p, device.stream), "xsa_attention_plan");
}

XsaAttentionParams params(const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& gate,
                          const optional<Tensor>& plan, const Tensor& out, const Tensor& lse, const Tensor& own, bool xsa, double scale) {
    const int64_t batch = q.size(0), queries = q.size(1), tokens = k.size(1), q_heads = q.size(2), kv_heads = k.size(2);
    const int64_t most = plan ? (1 << 30) - 1 : 65535 * kXsaTile;  // tokens; the grid's y counts a row's tiles
    STD_TORCH_CHECK(batch > 0 && batch <= 65535 && tokens > 0 && tokens <= most, "q: expected 1 to 65535 rows of 1 to ", most, " tokens");
    STD_TORCH_CHECK(kv_heads > 0 && q_heads % kv_heads == 0 && q_heads <= 65535, "q: its heads are not a multiple of k's, or over 65535");
    STD_TORCH_CHECK(queries > 0 && queries <= tokens, "q: expected 1 to ", tokens, " tokens, got ", queries);
    STD_TORCH_CHECK(!plan || (batch == 1 && queries == tokens), "plan: goes with a batch of one row, of as many queries as keys");
    STD_TORCH_CHECK(scale > 0, "scale: expected > 0");
    XsaAttentionParams p{};
    p.batch = int(batch), p.tokens = int(tokens), p.q_heads = int(q_heads), p.kv_heads = int(kv_heads);
    p.prefix = int(tokens - queries), p.scale = float(scale), p.xsa = xsa;
    p.queries = plan_of(plan, "plan", tokens, 0, xsa_queries_per_block(p.q_heads, p.kv_heads));
    p.q = head_rows(q, "q", batch, queries, q_heads);
    p.k = head_rows(k, "k", batch, tokens, kv_heads);
    p.v = head_rows(v, "v", batch, tokens, kv_heads);
    p.gate = gate_rows(gate, "gate", batch, queries, q_heads);
    p.out = head_rows(out, "out", batch, queries, q_heads);
    p.lse = floats(lse, "lse", {batch, q_heads, queries});
    p.own = floats(own, "own", {batch, q_heads, queries});
    return p;
}

void fwd(Tensor q, Tensor k, Tensor v, optional<Tensor> gate, optional<Tensor> plan, Tensor out, Tensor lse, Tensor own, bool xsa,
         double scale) {
    const XsaAttentionParams p = params(q, k, v, gate, plan, out, lse, own, xsa, scale);
    OnDeviceOf device(q);
    check_launch(xsa_attention_fwd(p, device.stream), "xsa_attention_fwd");
}

void bwd(optional<Tensor> grad_out, Tensor q, Tensor k, Tensor v, optional<Tensor> gate, Tensor out, Tensor lse, Tensor own,
         optional<Tensor> plan, optional<Tensor> plan_keys, optional<Tensor> places, Tensor dq, Tensor dk, Tensor dv,
         optional<Tensor> dgate, Tensor dy, Tensor stats, optional<Tensor> rstd, optional<Tensor> gain, optional<Tensor> cos,
         optional<Tensor> sin, optional<Tensor> dgain, bool xsa, double scale) {
    XsaAttentionBwdParams p{};
    XsaAttentionParams& f = p.fwd;
    f = params(q, k, v, gate, plan, out, lse, own, xsa, scale);
    STD_TORCH_CHECK(f.prefix == 0, "q: the backward needs as many tokens as k has");
    STD_TORCH_CHECK(plan.has_value() == plan_keys.has_value() && plan.has_value() == places.has_value(), "plan_keys, places: go with plan");
    p.keys = plan_of(plan_keys, "plan_keys", f.tokens, 0, kXsaKeysPerBlock);
    p.places = places_of(places, f.tokens);
    if (grad_out) p.grad_out = head_rows(*grad_out, "grad_out", f.batch, f.tokens, f.q_heads);
    p.dq = head_rows(dq, "dq", f.batch, f.tokens, f.q_heads);
    p.dk = head_rows(dk, "dk", f.batch, f.tokens, f.kv_heads);
    p.dv = head_rows(dv, "dv", f.batch, f.tokens, f.kv_heads);
    if (rstd) {
        STD_TORCH_CHECK(gain && cos && sin && dgain, "rstd: wants gain, cos, sin and dgain beside it");
        const int64_t rows = int_size(int64_t(f.batch) * f.tokens, "rstd"), positions = cos->size(0);
        const bool indexable = positions > 0 && positions <= kQkvMaxPositions;
        STD_TORCH_CHECK(indexable, "cos: expected 1 to ", kQkvMaxPositions, " positions, got ", positions);
        p.raw.rstd = floats(*rstd, "rstd", {rows, f.q_heads + f.kv_heads});
        p.raw.gain = floats(*gain, "gain", {f.q_heads});
        p.raw.cos = bf16s(*cos, "cos", {positions, kQkvRotated / 2});
        p.raw.sin = bf16s(*sin, "sin", {positions, kQkvRotated / 2});
        p.raw.dgain = floats(*dgain, "dgain", {f.q_heads});
        p.raw.positions = int(positions);
    }
    p.dgate = gate_rows(dgate, "dgate", f.batch, f.tokens, f.q_heads);
    p.dy = head_rows(dy, "dy", f.batch, f.tokens, f.q_heads);
    p.stats_width = stats.size(-1);
    STD_TORCH_CHECK(p.stats_width % 4 == 0 && p.stats_width >= f.tokens + 4 * int64_t(p.keys.capacity), "stats: too narrow");
    p.stats = floats(stats, "stats", {int64_t(f.batch) * f.q_heads, 2, p.stats_width});
    OnDeviceOf device(q);
    check_launch(xsa_attention_bwd(p, device.stream), "xsa_attention_bwd");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def(
        "xsa_attention_plan(Tensor cu_seqlens, Tensor(a!) queries, Tensor(b!) keys, Tensor(c!) places, int queries_per_block) -> ()");
    m.def(
        "xsa_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? plan, Tensor(a!) out, Tensor(b!) lse, Tensor(c!) own,"
        " bool xsa, float scale) -> ()");
    m.def(
        "xsa_attention_bwd(Tensor? grad_out, Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor out, Tensor lse, Tensor own,"
        " Tensor? plan, Tensor? plan_keys, Tensor? places, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dgate, Tensor(e!) dy,"
        " Tensor(f!) stats, Tensor? rstd, Tensor? gain, Tensor? cos, Tensor? sin, Tensor(g!)? dgain, bool xsa, float scale) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("xsa_attention_plan", TORCH_BOX(&pgolf::plan));
    m.impl("xsa_attention_fwd", TORCH_BOX(&pgolf::fwd));
    m.impl("xsa_attention_bwd", TORCH_BOX(&pgolf::bwd));
}
