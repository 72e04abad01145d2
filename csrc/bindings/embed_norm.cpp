// Registers the stream's first value: check, fill the params, launch.
#include "kernels/embed_norm.h"

#include "bindings/checks.h"

namespace pgolf {
namespace {

__nv_bfloat16* matrix(const Tensor& t, const char* argument, int64_t m) { return bf16s(t, argument, {m, kEmbedNormWidth}); }

// What both directions share. `bos` absent: nothing is masked but the sequences' first rows.
EmbedNormParams params(const Tensor& tokens, int64_t sequence, const Tensor& table, const optional<Tensor>& addend,
                       const optional<Tensor>& gate, const optional<Tensor>& lambda, int64_t smear, optional<int64_t> bos,
                       const Tensor& y) {
    EmbedNormParams p{};
    const int64_t m = tokens.size(0);
    STD_TORCH_CHECK(m > 0 && m < (int64_t(1) << 31), "tokens: expected 1 to 2^31, got ", m);
    STD_TORCH_CHECK(sequence > 0 && sequence <= m, "sequence: expected 1 to ", m, ", got ", sequence);
    STD_TORCH_CHECK(smear >= 0 && smear <= 2, "smear: expected 0, 1 or 2, got ", smear);
    check(tokens, "tokens", ScalarType::Long, {m});
    check_contiguous(tokens, "tokens");
    p.tokens = static_cast<const int64_t*>(tokens.data_ptr());
    p.is_float = table.scalar_type() == ScalarType::Float;
    check(table, "table", p.is_float ? ScalarType::Float : ScalarType::BFloat16, {-1, kEmbedNormWidth});
    check_contiguous(table, "table");
    check_aligned(table, "table");
    STD_TORCH_CHECK(table.size(0) > 0 && table.size(0) <= INT32_MAX, "table: expected 1 to 2^31 rows, got ", table.size(0));
    p.table = table.data_ptr();
    p.addend = addend ? matrix(*addend, "addend", m) : nullptr;
    p.smear = Smear(smear);
    STD_TORCH_CHECK((p.smear != Smear::kNone) == gate.has_value(), "gate: goes with smear");
    STD_TORCH_CHECK((p.smear == Smear::kToken) == lambda.has_value(), "smear_lambda: goes with smear token");
    if (gate) {
        p.window = int(gate->size(0));
        STD_TORCH_CHECK(p.smear == Smear::kChannel ? p.window == kEmbedNormWidth : p.window >= 1 && p.window <= kEmbedNormWidth,
                        "gate: expected up to ", kEmbedNormWidth, " elements, all of them with smear channel, got ", p.window);
        p.gate = floats(*gate, "gate", {p.window});
    }
    if (lambda) p.lambda = floats(*lambda, "smear_lambda", {1});
    p.y = matrix(y, "y", m);
    p.m = uint32_t(m), p.sequence = uint32_t(sequence), p.num_rows = int(table.size(0));
    p.mask_bos = bos.has_value(), p.bos = bos.value_or(0);
    return p;
}

void fwd(Tensor tokens, int64_t sequence, Tensor table, optional<Tensor> addend, optional<Tensor> gate, optional<Tensor> lambda,
         int64_t smear, optional<int64_t> bos, Tensor y, Tensor report) {
    EmbedNormParams p = params(tokens, sequence, table, addend, gate, lambda, smear, bos, y);
    p.report = host_report(report);
    const OnDeviceOf here(table);
    check_launch(embed_norm_fwd(p, here.stream), "embed_norm_fwd");
}

void bwd(Tensor dy, Tensor tokens, int64_t sequence, Tensor table, optional<Tensor> addend, optional<Tensor> gate, optional<Tensor> lambda,
         int64_t smear, optional<int64_t> bos, Tensor d_e, optional<Tensor> d_gate, optional<Tensor> d_lambda,
         optional<Tensor> partial_sums) {
    EmbedNormParams p = params(tokens, sequence, table, addend, gate, lambda, smear, bos, dy);
    p.d_e = matrix(d_e, "d_e", p.m);
    const bool sums_go_with_gate = d_gate.has_value() == gate.has_value() && partial_sums.has_value() == gate.has_value();
    STD_TORCH_CHECK(sums_go_with_gate, "d_gate, partial_sums: go with gate");
    STD_TORCH_CHECK(d_lambda.has_value() == lambda.has_value(), "d_lambda: goes with smear_lambda");
    if (gate) {
        p.d_gate = floats(*d_gate, "d_gate", {p.window});
        p.partial_sums = floats(*partial_sums, "partial_sums", {kEmbedNormMaxCtas, kEmbedNormWidth + 4});
    }
    if (lambda) p.d_lambda = floats(*d_lambda, "d_lambda", {1});
    const OnDeviceOf here(table);
    check_launch(embed_norm_bwd(p, here.stream), "embed_norm_bwd");
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def(
        "embed_norm_fwd(Tensor tokens, int sequence, Tensor table, Tensor? addend, Tensor? gate, Tensor? smear_lambda, int smear, "
        "int? bos, Tensor(a!) y, Tensor(b!) report) -> ()");
    m.def(
        "embed_norm_bwd(Tensor dy, Tensor tokens, int sequence, Tensor table, Tensor? addend, Tensor? gate, Tensor? smear_lambda, "
        "int smear, int? bos, Tensor(a!) d_e, Tensor(b!)? d_gate, Tensor(c!)? d_lambda, Tensor(d!)? partial_sums) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) {
    m.impl("embed_norm_fwd", TORCH_BOX(&pgolf::fwd));
    m.impl("embed_norm_bwd", TORCH_BOX(&pgolf::bwd));
}
