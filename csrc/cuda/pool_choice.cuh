// How a convolution with its pool runs: in boxes (pool_product.cuh), or one after the other.
//
// Boxes overlap by what windows share, and leave rows of the tile empty: ZFNet's conv2, of 26 x 26
// pixels, takes 9 boxes, 1152 rows for 676, and its 256 maps the smaller tile, whose maps fit
// beside each other. Where that costs more than to write the maps and read them again, by the
// estimate of tap_choice.cuh, the convolution runs by itself, in its larger tile or in splits, and
// the pool after it. Conv1, few products to large maps, runs in boxes whatever the mode; conv2 and
// conv5 do not (docs/model.md, an A100 in tf32: conv1 392 us in boxes, 713 otherwise; conv2 1198
// and 822). So do windows of more than kM pixels, which fit no block.
//
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#pragma once

#include <algorithm>

#include "pool_block.cuh"
#include "tap_choice.cuh"

namespace zfcuda {

// The largest box that any tile's product has as its rows, by dtype and columns.
inline int box_pixels(const ConvShape& s, Dtype dtype) {
    return dtype == Dtype::float64 ? 64 : narrow(s.out_per_group(), dtype) ? 256 : 128;
}

// The plan of a product on the tensor cores or by patches: the loop that the convolution by itself
// would have, so that the sums are the same.
struct LoopBoxes {
    TapPlan p;
    int bytes, pieces;  // of an element; of a pixel
    bool patches, halos;
    HaloPlan halo = {};

    LoopBoxes(const ConvShape& s, Dtype dtype, Way way)
        : p(tap_plan<false>(s, dtype, way, Gate::none)),
          bytes(static_cast<int>(element_bytes(dtype))),
          pieces(p.channels * bytes / 16),
          patches(p.run != 0),
          halos(!patches && halo_pays(p, pieces)) {
        halo.y = halo_axis<false>(p.y), halo.x = halo_axis<false>(p.x);
    }
    PatchPlan patch(std::int64_t height, std::int64_t width) const {
        return patch_plan(p, bytes, height, width, 0);
    }
    // Chooses boxes that its tiles hold; false if there are none.
    bool choose(PoolPlan& plan) {
        const bool found = plan.choose(kBlockPixels, [&](std::int64_t height, std::int64_t width) {
            if (patches) return patch(height, width).bytes <= patch_bytes(p.way);
            return !halos || (height + halo.y.span) * halo_pitch(width, halo.x.span) <= kHaloSlots;
        });
        if (found && halos) halo.set(plan.y.box + halo.y.span, plan.x.box, pieces);
        return found;
    }
};

// The kernels with boxes, for all that is asked: they `pay` if windows fit them and they take less
// time, within an eighth (for they need no memory for the maps), than one after the other.
struct Boxes {
    PoolPlan plan;
    Way way;
    LoopBoxes by;
    bool pay = false;

    // `given` is the way of the convolution by itself, whose sums are the same.
    Boxes(const ConvShape& s, const PoolShape& pool, Dtype dtype, bool maximum, Way given,
          const Exec& exec)
        : plan(pool, maximum), way(given), by(s, dtype, given) {
        if ((maximum && pool.gaps()) ||
            !(loops() ? by.choose(plan) : plan.choose(box_pixels(s, dtype))))
            return;
        const std::int64_t bytes = element_bytes(dtype), maps = s.batch * s.maps().step_image();
        const std::int64_t memory = 2 * maps * bytes / memory_bytes(exec);  // written, and read
        pay = cycles(s, dtype, exec) * 8 <=
              (product_cycles<false>(s, dtype, way, exec) + kPass + memory) * 9;
    }

    // Whether the product is a loop of pool_product.cuh that keeps the maps of a block as a whole.
    bool loops() const { return way != Way::fma || by.patches; }
    std::int64_t cycles(const ConvShape& s, Dtype dtype, const Exec& exec) const {
        const int bytes = static_cast<int>(element_bytes(dtype));
        const TapPlan p = choice_plan<false>(s, dtype, way);
        const TileCost tile = small_tile(p, bytes);
        const std::int64_t blocks =
            std::int64_t(p.padded_columns / tile.columns) * plan.tiles() * p.groups * s.batch;
        return loop_cycles(p, tile, factor_bytes(p, bytes), blocks, 1, processors(exec));
    }
};

}  // namespace zfcuda
