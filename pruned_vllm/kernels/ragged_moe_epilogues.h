// What a channel makes of its gate and up, and biases; ragged_moe_cpu.cpp includes this.
//
// Most models have silu(gate) * up and no biases: `Silu`. `General` is what the caller names; it is compiled with
// -DGENERAL, to a library of its own, so that the first is what it would be without it.

#pragma once

#include "ragged_moe_vectors.h"
#include "ragged_moe_weights.h"

// What a caller says of an expert besides its weights.
struct Extras {
  const float* gate_up_bias;  // [2, rows], or null
  const float* down_bias;     // [experts, hidden_size], or null
  int64_t activation;         // see `General::Activation`
  float alpha, limit;         // of CLAMPED_SWIGLU
};

struct Silu {
  static constexpr const float* down_bias = nullptr;

  explicit Silu(const Extras*) {}

  // Turns `count` ups into weight * silu(gate) * up.
  template <typename W>
  void combine(float weight, const Weights<W>&, int64_t, int64_t, int64_t count, float* gates, float* ups) const {
    for (int64_t c = 0; c < count; ++c) ups[c] *= weight * gates[c] / (1.0f + exponential(-gates[c]));
  }
};

struct General : Extras {
  enum Activation { SILU, GELU, GELU_TANH, CLAMPED_SWIGLU };  // as ActivationName in ragged_moe_arguments.py

  explicit General(const Extras* extras) : Extras(*extras) {}

  // Turns `count` ups into weight times what the activation makes of gate and up. They are those of channels of an
  // expert from `start` on. A comparison with what is no number is false, so that it stays none.
  template <typename W>
  void combine(float weight, const Weights<W>& weights, int64_t expert, int64_t start, int64_t count, float* gates,
               float* ups) const {
    if (gate_up_bias) {
      const float* bias = gate_up_bias + weights.offsets[expert] + start;
      for (int64_t c = 0; c < count; ++c) gates[c] += bias[c], ups[c] += bias[weights.rows + c];
    }
    const auto for_each = [&](auto activate) {
      for (int64_t c = 0; c < count; ++c) ups[c] = weight * activate(gates[c], ups[c]);
    };
    switch (activation) {
      case SILU:
        return for_each([](float gate, float up) { return gate / (1.0f + exponential(-gate)) * up; });
      case GELU:
        return for_each([](float gate, float up) { return 0.5f * gate * std::erfc(gate * -0.707106781f) * up; });
      case GELU_TANH:  // (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z))
        return for_each([](float gate, float up) {
          const float doubled = 1.595769122f * (gate + 0.044715f * gate * gate * gate);
          return gate / (1.0f + exponential(-doubled)) * up;
        });
      case CLAMPED_SWIGLU:
        return for_each([alpha = alpha, limit = limit](float gate, float up) {
          gate = std::min(gate, limit), up = std::max(std::min(up, limit), -limit);
          return gate / (1.0f + exponential(-alpha * gate)) * (up + 1.0f);
        });
    }
  }
};

#ifdef GENERAL
using Epilogue = General;
#else
using Epilogue = Silu;
#endif
