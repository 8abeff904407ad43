// The uniform and Box-Muller of csrc/generator.h, one element at a time or, with -DVECTOR, in the vectors of the
// instruction set that this is compiled for.
#ifdef VECTOR
#include "cpu/vector.h"
#endif
#include "generator.h"

namespace distruction {
#ifdef VECTOR
typedef Word Words;
typedef Float Floats;
#else
typedef uint32_t Words;
typedef float Floats;
#endif
}  // namespace distruction

// n is a multiple of 16.
extern "C" void normals(
    int64_t n, const uint32_t* radius_words, const uint32_t* angle_words, float* uniforms, float* cosines,
    float* sines) {
  using namespace distruction;
  constexpr int64_t lanes = sizeof(Floats) / sizeof(float);
  for (int64_t i = 0; i < n; i += lanes) {
    Words radius_word, angle_word;
    Floats u, cosine, sine;
    memcpy(&radius_word, radius_words + i, sizeof radius_word);
    memcpy(&angle_word, angle_words + i, sizeof angle_word);
    u = uniform(radius_word);
    box_muller(radius_word, angle_word, 0u, cosine, sine);
    memcpy(uniforms + i, &u, sizeof u);
    memcpy(cosines + i, &cosine, sizeof cosine);
    memcpy(sines + i, &sine, sizeof sine);
  }
}
