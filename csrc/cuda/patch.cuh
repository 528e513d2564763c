// What a block of patch_product.cuh reads of an image of few channels: a rectangle of it, in which
// the runs of all its pixels lie (or several, one below the other, where strips end: see halo.cuh).
#pragma once

#include "halo.cuh"
#include "mma_tile.cuh"

namespace zfcuda {

struct PatchPlan {
    int rows, pitch, length;  // pitch and length of a row in elements
    int tall;                 // rows from a strip of an image to the next one
    int second;               // words from a copy of the patch to the other, or 0
    bool interleaved;         // the pixels of a matrix's rows, see patch_pixel
    // Of all runs one after the other, filled up to whole chunks; 0 by FMA, which needs no table.
    int words;
    std::int64_t bytes;  // of both copies and the table of these words
    // What a launch adds (team_grid in patch_product.cuh): bytes of the weights that stay in shared
    // memory, or 0 where they are streamed; bytes of a team there; tiles of the product.
    int kept, own;
    unsigned tiles;

    ZF_HD int table_bytes() const { return 8 * words; }
    ZF_HD int chunks() const { return words / 16; }  // of 64 bytes
};

// How often the banks must serve the words of a fragment whose rows are pixels `apart` elements
// from each other.
inline int patch_passes(std::int64_t apart, int bytes) {
    std::int64_t words[32];
    int most = 0, served[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
        const std::int64_t element = lane / 4 * apart, odd = bytes == 2 ? element % 2 : 0;
        words[lane] = (element + odd) * bytes / 4 + 16 * odd + lane % 4;
        bool again = false;
        for (int other = 0; other < lane; ++other) again |= words[other] == words[lane];
        if (!again && ++served[words[lane] % 32] > most) most = served[words[lane] % 32];
    }
    return most;
}

// A patch for so many lines of pixels, `width` long, that end in so many strips before the last.
inline PatchPlan patch_plan(const TapPlan& p, int bytes, std::int64_t lines, std::int64_t width,
                            std::int64_t strips) {
    PatchPlan h = {};
    const std::int64_t step = std::int64_t(p.x.stride) * p.pixel;
    const std::int64_t span = std::int64_t(p.y.kernel - 1) * p.y.dilation + 1;
    const std::int64_t more = span > p.y.stride ? span - p.y.stride : 0;
    const std::int64_t rows = (lines - 1) * p.y.stride + span + strips * more;
    // The last run is read to the end of its last word, which may be a half further on. Where a
    // piece goes on in the next row, its words lie in the banks that they would have in this one.
    const std::int64_t last = (width - 1) * step, per_word = 4 / bytes;
    const std::int64_t least = (last + p.channels + 1 + per_word - 1) / per_word;
    const std::int64_t pitch = least + ((p.channels / per_word - least) % 4 + 4) % 4;  // words
    const std::int64_t words = rows * pitch;
    h.rows = static_cast<int>(rows), h.pitch = static_cast<int>(pitch * per_word);
    h.length = static_cast<int>(last) + p.run;
    if (p.way != Way::fma)
        h.words = static_cast<int>((p.y.kernel * p.channels / per_word + 15) / 16 * 16);
    h.tall = static_cast<int>((p.y.size - std::int64_t(1)) * p.y.stride + span);
    const std::int64_t second = bytes == 2 && step % 2 != 0 ? (words + 15) / 32 * 32 + 16 : 0;
    h.second = static_cast<int>(second);
    h.bytes = 4 * (second + words) + h.table_bytes();
    h.interleaved = p.way != Way::fma && patch_passes(2 * step, bytes) < patch_passes(step, bytes);
    return h;
}

// Chooses strips and the pixels of a block for an image whose patches fit (tap_plan.cuh).
inline PatchPlan patch_plan(TapPlan& p, int bytes) {
    const auto measured = [&](int strip, int pixels) {
        const std::int64_t strips = line_ends(std::int64_t(strip) * p.y.size, pixels);
        return patch_plan(p, bytes, 1 + line_ends(strip, pixels), strip, strips);
    };
    choose_strips(p, patch_bytes(p.way),
                  [&](int strip, int pixels) { return measured(strip, pixels).bytes; });
    return measured(p.strip, p.block_pixels);
}

// The element of the patch where a pixel's runs begin.
__device__ inline int patch_base(const TapBlock<false>& block, const TapPlan& p, const PatchPlan& h,
                                 int pixel) {
    if (pixel >= block.pixels) return 0;
    const auto start = block.start();
    const int x = start.x + pixel;
    const int lines = x / block.strip, tall = block.rows.pixels;
    const int strips = (start.y + lines) / tall;
    const int row = strips * h.tall + (lines - strips * tall) * p.y.stride;
    return row * h.pitch + x % block.strip * p.x.stride * p.pixel;
}

// Where a row of the patch begins in the image, and at which row and column of it.
__device__ inline TapPixel patch_row(const TapBlock<false>& block, const TapPlan& p,
                                     const PatchPlan& h, int row) {
    const auto start = block.start();
    const int down = start.y * p.y.stride + row;
    const std::int64_t strip = start.strip + down / h.tall, n = strip / block.strips;
    const int y = down % h.tall - p.y.padding;
    const int x =
        static_cast<int>(strip - n * block.strips) * block.strip * p.x.stride - p.x.padding;
    return {p.steps.offset(n, 0, y, x), n < p.batch ? y : kOutside, x};
}

// The pixel of a row of the tile: itself, or of each 16 the even ones first.
__device__ __forceinline__ int patch_pixel(const PatchPlan& h, int row) {
    return h.interleaved ? (row & ~15) | (row & 7) << 1 | (row >> 3 & 1) : row;
}

// A word of the runs: how many bytes it is from a pixel's first one, and the bits that belong to
// them.
struct alignas(8) RunWord {
    int offset;
    std::uint32_t mask;
};

// Shared memory: the weights, all or in stages; the table of words; and of each team the patch,
// whose place is free after the product, with that of weights that did not stay.
template <typename Tile>
struct PatchShared {
    static constexpr int kStage = Tile::kN * Tile::kPieces;
    static constexpr int kStages = Tile::kStages * kStage * int(sizeof(Piece));
    Piece* weights;
    RunWord* table;
    std::uint32_t* patch;
    Piece* after;

    __device__ PatchShared(Piece* shared, const PatchPlan& h, int team) : weights(shared) {
        Piece* const rest = shared + (h.kept != 0 ? h.kept : kStages) / 16;
        Piece* const own = rest + (h.table_bytes() + team * h.own) / 16;
        table = reinterpret_cast<RunWord*>(rest);
        patch = reinterpret_cast<std::uint32_t*>(own);
        after = h.kept != 0 ? own : shared;
    }
};

// Fills the patch: a warp a row, lanes along its elements.
template <typename T, int kThreads, typename RowOf>
__device__ __forceinline__ void bring_patch(const TapPlan& p, const PatchPlan& h, const T* image,
                                            std::uint32_t* patch, RowOf&& row_of) {
    const unsigned thread = kept(threadIdx.x);
    const int lane = static_cast<int>(thread % 32);
    for (int row = static_cast<int>(thread / 32); row < h.rows; row += kThreads / 32) {
        const TapPixel begin = row_of(row);
        const bool inside = static_cast<unsigned>(begin.y) < static_cast<unsigned>(p.height);
        const int low = inside ? -begin.x * p.pixel : h.pitch;
        const int high = (p.width - begin.x) * p.pixel;
        T* const to = reinterpret_cast<T*>(patch) + row * h.pitch;
        for (int e = lane; e < h.pitch; e += 32) {
            const bool reads = e >= low && e < high && e < h.length;
            const T* const from = image + begin.offset + e;
            if constexpr (sizeof(T) == 4) {
                cp_async<4>(to + e, from, reads ? 4 : 0);
            } else {
                const T value = reads ? *from : T(0.0f);
                to[e] = value;
                if (h.second != 0 && e + 1 < h.pitch) (to + 2 * h.second)[e + 1] = value;
            }
        }
    }
}

}  // namespace zfcuda
