// What every RMSNorm adds to the mean square.
#pragma once

namespace pgolf {

constexpr float kRmsEpsilon = 0x1p-23f;  // RMS_EPSILON of pgolf_fast/ops/_library.py

}  // namespace pgolf
