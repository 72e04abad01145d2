// Argument that both bindings of the attention's backward take.
#pragma once
#include "bindings/checks.h"
#include "kernels/xsa_attention.h"

namespace pgolf {

inline XsaPlace* places_of(const optional<Tensor>& t, int64_t tokens) {
    if (!t) return nullptr;
    check(*t, "places", ScalarType::Int, {tokens, 2});
    check_contiguous(*t, "places");
    return static_cast<XsaPlace*>(t->data_ptr());
}

}  // namespace pgolf
