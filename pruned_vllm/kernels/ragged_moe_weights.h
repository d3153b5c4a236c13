// The weights of a layer, and what they are scaled by; ragged_moe_cpu.cpp includes this.

#pragma once

#include <algorithm>
#include <cstdint>

// A run is consecutive rows of an expert in down that have the same scales: `group_size` of them, and at the expert's
// end what is left. Without a group size, 0, all rows of an expert are one run, and a row of gate or up is one group.
// Scales are null where weights are numbers like x.
template <typename W>
struct Weights {
  const W *gate_up, *down;
  const int32_t* offsets;
  const float *gate_up_scales, *down_scales;
  const int32_t* down_offsets;  // [experts + 1]: where the runs of an expert begin in down_scales
  int64_t rows, runs, num_experts, hidden_size, group_size;

  int64_t width(int64_t e) const { return offsets[e + 1] - offsets[e]; }

  int64_t rows_of_run() const { return group_size ? group_size : std::max<int64_t>(rows, 1); }

  // The end of the run that a channel is in.
  int64_t run_end(int64_t e, int64_t channel) const {
    return std::min(width(e), (channel / rows_of_run() + 1) * rows_of_run());
  }

  // Whether each expert's rows are there, and as many scales of down as they need.
  bool are_there() const {
    for (int64_t e = 0; e < num_experts; ++e) {
      if (offsets[e] < 0 || width(e) < 0 || offsets[e + 1] > rows) return false;
      if (!down_offsets) continue;
      const int64_t begin = down_offsets[e], end = down_offsets[e + 1];
      if (begin < 0 || end > runs || end - begin != (width(e) + rows_of_run() - 1) / rows_of_run()) return false;
    }
    return true;
  }
};
