// torch.ops.pgolf_fast_sm90.orthogonalize: batches of equally shaped matrices, into outputs and workspaces of the caller.
#include "kernels/orthogonalize.h"

#include <climits>
#include <vector>

#include "bindings/checks.h"

namespace pgolf {

static __half* half_data(const Tensor& t) { return static_cast<__half*>(t.mutable_data_ptr()); }

static int64_t orthogonalize_partial_sums_op(int64_t elements) { return orthogonalize_partial_sums(elements); }

// Matrices, [b, rows, columns] each, in the order of the groups; those of group g fill outputs[g], [count, rows, columns].
static void orthogonalize_op(std::vector<Tensor> matrices, std::vector<double> coefficients, std::vector<Tensor> outputs,
                             std::vector<Tensor> x0, std::vector<Tensor> x1, std::vector<Tensor> squares, Tensor counters,
                             Tensor partial_sums) {
    STD_TORCH_CHECK(!matrices.empty(), "matrices: the list is empty");
    STD_TORCH_CHECK(!coefficients.empty() && coefficients.size() % 3 == 0 && coefficients.size() / 3 <= kOrthogonalizeMaxSteps,
                    "coefficients: expected a, b, c for 1 to ", kOrthogonalizeMaxSteps, " steps");
    const size_t num_groups = outputs.size();
    STD_TORCH_CHECK(x0.size() == num_groups && x1.size() == num_groups && squares.size() == num_groups,
                    "workspaces: expected one of each per group");
    const ScalarType dtype = matrices[0].scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, "matrices: expected bfloat16 or float32");

    std::vector<OrthogonalizeGroup> groups(num_groups);
    std::vector<OrthogonalizeInput> inputs;
    const int64_t element_bytes = dtype == ScalarType::Float ? 4 : 2;
    int64_t sums = 0;
    size_t next = 0;  // of `matrices`
    for (size_t g = 0; g < num_groups; ++g) {
        const int64_t count = outputs[g].size(0), rows = outputs[g].size(1), columns = outputs[g].size(2);
        const int64_t m = rows < columns ? rows : columns;
        const bool sizes_fit = rows > 0 && columns > 0 && rows % 8 == 0 && columns % 8 == 0;
        STD_TORCH_CHECK(sizes_fit, "matrices: expected rows and columns that are multiples of 8");
        STD_TORCH_CHECK(count > 0, "outputs: no matrices");
        STD_TORCH_CHECK(rows <= INT_MAX && columns <= INT_MAX && count <= INT_MAX, "matrices: more than 2^31 - 1 of something");
        check(outputs[g], "outputs", ScalarType::BFloat16, {count, rows, columns});
        for (const Tensor& t : {x0[g], x1[g]}) check(t, "workspaces", ScalarType::Half, {count, rows, columns});
        check(squares[g], "workspaces", ScalarType::Half, {kOrthogonalizeSquares, count, m, m});
        for (const Tensor& t : {outputs[g], x0[g], x1[g], squares[g]}) {
            check_contiguous(t, "workspaces");
            check_aligned(t, "workspaces");
        }
        groups[g] = {{half_data(x0[g]), half_data(x1[g])}, half_data(squares[g]),
                     static_cast<__nv_bfloat16*>(outputs[g].mutable_data_ptr()), int32_t(count), int32_t(rows), int32_t(columns)};
        for (int64_t taken = 0; taken < count; ++next) {
            STD_TORCH_CHECK(next < matrices.size(), "matrices: fewer than the outputs have room for");
            const Tensor& batch = matrices[next];
            check(batch, "matrices", dtype, {-1, rows, columns});
            check_contiguous(batch, "matrices");
            check_aligned(batch, "matrices");
            STD_TORCH_CHECK(batch.get_device_index() == outputs[g].get_device_index(), "matrices: on another device than the output");
            STD_TORCH_CHECK(batch.size(0) <= count - taken, "matrices: more than the outputs have room for");
            const auto* data = static_cast<const uint8_t*>(batch.const_data_ptr());
            for (int64_t i = 0; i < batch.size(0); ++i, ++taken) {
                inputs.push_back({data + i * rows * columns * element_bytes, groups[g].x[0] + taken * rows * columns, rows * columns});
                sums += orthogonalize_partial_sums(rows * columns);
            }
        }
    }
    STD_TORCH_CHECK(next == matrices.size(), "matrices: more than the outputs have room for");
    check(counters, "counters", ScalarType::Int, {int64_t(inputs.size() + num_groups * kOrthogonalizeCounters)});
    check(partial_sums, "partial_sums", ScalarType::Double, {sums});
    check_contiguous(counters, "counters");
    check_contiguous(partial_sums, "partial_sums");

    OnDeviceOf on(outputs[0]);
    const OrthogonalizeParams params{inputs.data(),
                                     int64_t(inputs.size()),
                                     dtype == ScalarType::Float,
                                     groups.data(),
                                     int64_t(groups.size()),
                                     coefficients.data(),
                                     int64_t(coefficients.size() / 3),
                                     static_cast<uint32_t*>(counters.mutable_data_ptr()),
                                     static_cast<double*>(partial_sums.mutable_data_ptr())};
    check_launch(orthogonalize(params, on.stream), "orthogonalize");
}

}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf_fast_sm90, m) {
    m.def("orthogonalize_partial_sums(int elements) -> int");
    m.def(
        "orthogonalize(Tensor[] matrices, float[] coefficients, Tensor(a!)[] outputs, Tensor(b!)[] x0, Tensor(c!)[] x1, "
        "Tensor(d!)[] squares, Tensor(e!) counters, Tensor(f!) partial_sums) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CompositeExplicitAutograd, m) {
    m.impl("orthogonalize_partial_sums", TORCH_BOX(&pgolf::orthogonalize_partial_sums_op));
}
STABLE_TORCH_LIBRARY_IMPL(pgolf_fast_sm90, CUDA, m) { m.impl("orthogonalize", TORCH_BOX(&pgolf::orthogonalize_op)); }
