// Included by each kernel file for itself, so without a guard: in the tests each has a namespace of its own.

constexpr u32 SCORE_BINS = 2048;

// Bins of scores, ascending: 32 for each power of two from 2**-16 to 2**16, of either sign. The outer ones hold what lies beyond. A score comes
// as its order: the bits of a number that is not negative and 1 << 31, or the complement of a negative one's.
__device__ __forceinline__ u32 score_bin(u32 order) {
  bool negative = order < 0x80000000u;
  u32 size = (negative ? ~order : order) & 0x7fffffffu;
  u32 place = min(max((int)(size >> 18) - (127 - 16) * 32, 0), (int)SCORE_BINS / 2 - 1);
  return negative ? SCORE_BINS / 2 - 1 - place : SCORE_BINS / 2 + place;
}
