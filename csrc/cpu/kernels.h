// What each instruction set provides, and the interface between cpu.cpp and the files that are compiled for one set.
#pragma once

#include "../model.h"

namespace distruction {

// Elements [begin, end) of one tensor, in flat indices of the whole parameter; begin is the tensor's first element or
// a multiple of kPiece.
struct Range {
  int64_t tensor, begin, end;
};

// A piece is what one pass through the level-1 cache works on.
constexpr int kPiece = 512;

struct Kernels {
  const char* name;
  void (*words)(uint64_t block, int64_t blocks, uint32_t number, uint32_t stream, uint64_t seed, uint32_t* out);
  void (*sample)(const Model&, Range, Draw);
  void (*accumulate)(const Model&, Range, Draw, Draw next, const Accumulation&);
  // The KL of the updated posterior; `finite` is cleared where an update was refused.
  double (*step)(const Model&, Range, Draw, Draw next, const Update&, bool& finite);
  void (*gauss_newton)(const Model&, Range, Draw next, float grad_scale, bool& finite);
  double (*gaussian_kl)(const Model&, Range);
};

extern const Kernels kAvx512, kAvx2, kBaseline, kScalar;

}  // namespace distruction
