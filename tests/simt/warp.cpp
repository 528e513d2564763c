// What a warp computes together: shuffles, votes, and the tensor-core product.
#include "runtime.h"

namespace simt {

void shuffle(unsigned mask, const char* function, Site site, Shuffle& mine) {
    meet(mask, function, site, &mine, [](void* const* lanes, unsigned present) {
        for (int i = 0; i < 32; ++i) {
            if (!(present >> i & 1)) continue;
            auto& lane = *static_cast<Shuffle*>(lanes[i]);
            if (!(present >> lane.source & 1))
                fail("shuffle from an absent lane",
                     text("lane %d reads lane %d, which is not in the mask %08x", i, lane.source,
                          present)
                         .c_str());
            lane.result = static_cast<const Shuffle*>(lanes[lane.source])->value;
        }
    });
}

unsigned vote(unsigned mask, const char* function, Site site, bool predicate) {
    Vote mine{predicate, 0};
    meet(mask, function, site, &mine, [](void* const* lanes, unsigned present) {
        unsigned ballot = 0;
        for (int i = 0; i < 32; ++i)
            if (present >> i & 1 && static_cast<Vote*>(lanes[i])->predicate) ballot |= 1u << i;
        for (int i = 0; i < 32; ++i)
            if (present >> i & 1) static_cast<Vote*>(lanes[i])->ballot = ballot;
    });
    return mine.ballot;
}

void load_matrices(std::uint32_t* matrix, int count, bool transposed, const void* row, Site site) {
    const void* pc = __builtin_return_address(0);
    struct Rows {
        const char* address[32];
    } rows;
    if (lane() < 8 * count) {
        const auto address = std::uintptr_t(row);
        if (address % 16)
            fail_at(pc, "misaligned access", "ldmatrix of the row at %#zx", std::size_t(address));
        if (!in_shared(address))
            fail_at(pc, "out of bounds", "ldmatrix of %#zx, which is not shared memory",
                    std::size_t(address));
        if (kChecked) check_shared_bounds(address, 16, pc);
        if (recording_banks) record_bank(address, 16, false, pc);
    }
    rows.address[0] = static_cast<const char*>(row);
    meet(~0u, "ldmatrix", site, &rows, [](void* const* lanes, unsigned) {
        Rows all;
        for (int i = 0; i < 32; ++i) all.address[i] = static_cast<Rows*>(lanes[i])->address[0];
        for (int i = 0; i < 32; ++i) *static_cast<Rows*>(lanes[i]) = all;
    });
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < count; ++i)
        for (int half = 0; half < 2; ++half) {
            const int r = transposed ? 2 * t + half : g, column = transposed ? g : 2 * t + half;
            const char* element = rows.address[8 * i + r] + 2 * column;
            // The shadow sees whole words: 16-bit reads would split every word of the tile.
            if (kChecked && (transposed || half == 0))
                check_shared(std::uintptr_t(element) & ~std::uintptr_t(3), 4, Access::read, pc);
            std::uint16_t bits;
            std::memcpy(&bits, element, sizeof bits);
            matrix[i] = half ? matrix[i] | std::uint32_t(bits) << 16 : bits;
        }
}

// Fragments of mma.m16n8k8 (tf32) and mma.m16n8k16 (16-bit), from the PTX ISA. With g = lane / 4
// and t = lane % 4, register r of A holds rows g + 8 * (r % 2); its elements are columns
// t + 4 * (r / 2) (tf32) or 2t, 2t + 1, + 8 * (r / 2) (16-bit). B is the same with r / 2 -> r and
// g the column. d holds rows g, g + 8 (pairs) and columns 2t, 2t + 1.
namespace {

float value_of(Element element, std::uint32_t bits, int half) {
    if (element == Element::tf32)
        return __uint_as_float(bits & ~0x1fffu);  // the hardware ignores the low 13 bits
    const auto sixteen = static_cast<std::uint16_t>(bits >> (16 * half));
    if (element == Element::bf16) return __uint_as_float(std::uint32_t(sixteen) << 16);
    return __half2float(__half(__half_raw{sixteen}));
}

template <Element element>
void multiply_warp(void* const* lanes, unsigned) {
    constexpr int halves = element == Element::tf32 ? 1 : 2, depth = 8 * halves;
    float a[16][depth], b[depth][8];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& registers = *static_cast<const Product*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < halves; ++half) {
            const int column = halves * t + half;
            for (int r = 0; r < 4; ++r)
                a[g + 8 * (r % 2)][column + depth / 2 * (r / 2)] =
                    value_of(element, registers.a[r], half);
            for (int r = 0; r < 2; ++r)
                b[column + depth / 2 * r][g] = value_of(element, registers.b[r], half);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        float* d = static_cast<Product*>(lanes[lane])->d;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double sum = d[i];
            for (int k = 0; k < depth; ++k) sum += double(a[row][k]) * b[k][column];
            d[i] = static_cast<float>(sum);
        }
    }
}

}  // namespace

void multiply(Element element, Product lane, Site site) {
    if (settings.arch < (element == Element::fp16 ? 75 : 80))
        fail("trap", text("a tensor-core product that sm_%d has not, %s:%d", settings.arch,
                          site.file, site.line)
                         .c_str());
    switch (element) {
        case Element::tf32:
            return meet(~0u, "mma tf32", site, &lane, multiply_warp<Element::tf32>);
        case Element::bf16:
            return meet(~0u, "mma bf16", site, &lane, multiply_warp<Element::bf16>);
        case Element::fp16:
            return meet(~0u, "mma fp16", site, &lane, multiply_warp<Element::fp16>);
    }
}

}  // namespace simt
