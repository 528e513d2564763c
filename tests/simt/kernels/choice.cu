// What tap_choice.cuh chooses and estimates, for the tests to look at: no kernel runs.
#include "call.h"
#include "tap_choice.cuh"

namespace zfcuda {
namespace {

template <bool kTransposed>
void choose(const std::int64_t* fields, Dtype dtype, Way way, bool square, bool may_split,
            int processors, std::int64_t* out) {
    ConvShape s;
    std::copy_n(fields, sizeof s / sizeof *fields, reinterpret_cast<std::int64_t*>(&s));
    const TapPlan p = tap_plan<kTransposed>(s, dtype, way, Gate::none);
    const int bytes = static_cast<int>(element_bytes(dtype));
    const bool plain = way == Way::fma && p.run == 0;
    const TapCut cut = tap_cut(plain ? p : LoopPlan<kTransposed>(p, bytes).tap, bytes, square,
                               may_split, processors);
    out[0] = cut.columns, out[1] = cut.splits, out[2] = cut.cycles;
}

}  // namespace

// `out`: columns of the tile, splits, cycles.
ZF_EXPORT const char* choice(const std::int64_t* shape, int transposed, int dtype, int way,
                             int square, int may_split, int processors, std::int64_t* out) {
    return message_of([&] {
        (transposed ? choose<true> : choose<false>)(shape, Dtype(dtype), Way(way), square,
                                                    may_split, processors, out);
    });
}

}  // namespace zfcuda
