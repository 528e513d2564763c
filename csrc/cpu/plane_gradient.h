// The weight gradient in contiguous memory: positions side by side in the vectors, on the planes of
// planes.h.
//
//   grad_weight[o][k] = sum over bands, rows y of the band and vectors v of the row, of
//                       signal[o][y][v] * planes[offset(k) + y * pitch + v], then over the lanes
//
// A unit of work is a block of map channels with a block of image channels. It walks all images and
// bands in order; of each band it copies the planes of its image channels, and its map channels
// behind the gate, in rows of whole vectors, and multiplies kMaps of these with kTaps shifts at a
// time, in registers. The general product (conv2d_weight_gradient.cpp) has the positions as the
// depth of the sum, and packs every one of them, a plane apart from channel to channel.
//
// Measured as in planes.h, torch 2.13 / ours (before): 3 -> 64 at 224 x 224 5.1 (.41), depthwise at
// 56 x 56 .90 (.08), 7 x 7 at 28 x 28 7.5 (.20), groups of 4 2.8 (.23), 64 -> 64 at 56 x 56 .43
// (.33). Lost: more channels (256: .26 against .50), whose planes are copied for every block of
// maps.
#pragma once

#include "planes.h"

namespace zfcuda {

template <typename T>
struct PlaneGradient {
    using L = Lanes<T>;
    using Value = typename L::Value;
    static constexpr int kMaps = kVectorBytes == 64 ? 4 : 2, kTaps = 4;
    static constexpr std::int64_t kMapBlock = 32, kChannelBlock = 8, kBytes = 32 * 1024;

    const ConvShape& s;
    std::int64_t maps, channels;  // of a block
    Taps<T> taps;
    Planes<T> planes;
    std::int64_t line;  // of the signal: whole vectors

    explicit PlaneGradient(const ConvShape& shape)
        : s(shape),
          maps(std::min(s.out_per_group(), kMapBlock)),
          channels(std::min(s.in_per_group(), kChannelBlock)),
          taps{s.image(),
               forward_axis(s.in_height, s.out_height, s.kernel_h, s.stride_h, s.padding_h,
                            s.dilation_h),
               forward_axis(s.in_width, s.out_width, s.kernel_w, s.stride_w, s.padding_w,
                            s.dilation_w),
               0, channels},
          planes(taps, kBytes),
          line(gemm::round_up(s.out_width, L::count)) {}
    PlaneGradient(const PlaneGradient&) = delete;  // the planes refer to the taps

    std::int64_t terms() const { return s.taps() * channels; }
    // Elements of the scratch of one thread: planes, signal, sums, their bias.
    std::int64_t scratch() const {
        return gemm::round_up(planes.elements(), L::count) + maps * planes.band * line +
               maps * (terms() + 1) * L::count;
    }
    std::int64_t offsets_room() const {
        return gemm::round_up(terms() * sizeof(std::int64_t), kLine) / sizeof(T);
    }

    template <typename Read>
    void run(const T* image, const Read& signal, bool add, T* grad_weight, T* grad_bias,
             T* workspace, const Exec& exec) const {
        auto* const offsets = reinterpret_cast<std::int64_t*>(workspace);
        planes.find_offsets(offsets);
        const std::int64_t map_blocks = gemm::divide_up(s.out_per_group(), maps);
        const std::int64_t blocks = gemm::divide_up(s.in_per_group(), channels);
        parallel_for_thread(
            s.groups * map_blocks * blocks, exec, [&](std::int64_t unit, int thread) {
                const std::int64_t first = unit % blocks * channels;
                const std::int64_t map = unit / blocks % map_blocks * maps;
                const std::int64_t group = unit / blocks / map_blocks;
                T* const own = workspace + offsets_room() + thread * scratch();
                const Block block{*this,
                                  offsets,
                                  group * s.in_per_group() + first,
                                  std::min(channels, s.in_per_group() - first),
                                  group * s.out_per_group() + map,
                                  std::min(maps, s.out_per_group() - map),
                                  own,
                                  own + gemm::round_up(planes.elements(), L::count)};
                block.run(image, signal, first == 0 && grad_bias);
                block.store(first, add, grad_weight, first == 0 ? grad_bias : nullptr);
            });
    }

  private:
    struct Block {
        const PlaneGradient& plan;
        const std::int64_t* offsets;
        std::int64_t channel, channels, map, maps;
        T *planes, *signal;

        T* sums() const { return signal + plan.maps * plan.planes.band * plan.line; }
        T* sum(std::int64_t m, std::int64_t k) const {
            return sums() + (m * (plan.terms() + 1) + k) * L::count;
        }

        template <typename Read>
        void run(const T* image, const Read& read, bool bias) const {
            const ConvShape& s = plan.s;
            const std::int64_t band = plan.planes.band;
            std::fill_n(sums(), plan.maps * (plan.terms() + 1) * L::count, T(0));
            for (std::int64_t n = 0; n < s.batch; ++n)
                for (std::int64_t top = 0; top < s.out_height; top += band) {
                    const std::int64_t rows = std::min(band, s.out_height - top);
                    plan.planes.fill(Source<Gate::none, T>{image, nullptr}, n, channel, channels,
                                     top, planes);
                    fill_signal(read, n, top, rows);
                    multiply(rows);
                    if (bias) add_bias(rows);
                }
        }

        // grad[o][channel][tap] from the sums' lanes, or what it holds and they.
        void store(std::int64_t first, bool add, T* grad_weight, T* grad_bias) const {
            const auto put = [&](T& to, std::int64_t m, std::int64_t k) {
                to = total(sum(m, k)) + (add ? to : T(0));
            };
            const std::int64_t taps = plan.s.taps();
            for (std::int64_t m = 0; m < maps; ++m) {
                T* const to = grad_weight + ((map + m) * plan.s.in_per_group() + first) * taps;
                for (std::int64_t t = 0; t < taps; ++t)
                    for (std::int64_t c = 0; c < channels; ++c)
                        put(to[c * taps + t], m, t * plan.channels + c);
                if (grad_bias) put(grad_bias[map + m], m, plan.terms());
            }
        }

      private:
        static T total(const T* lanes) {
            T result = 0;
            for (int i = 0; i < L::count; ++i) result += lanes[i];
            return result;
        }
        static void add(T* to, const Value& value) {
            L::store(to, L::load(to, L::count) + value, L::count);
        }

        template <typename Read>
        void fill_signal(const Read& read, std::int64_t n, std::int64_t top,
                         std::int64_t rows) const {
            const Layout layout = plan.s.maps();
            for (std::int64_t m = 0; m < maps; ++m)
                for (std::int64_t y = 0; y < rows; ++y) {
                    T* const to = signal + (m * plan.planes.band + y) * plan.line;
                    const std::int64_t from = layout.offset(n, map + m, top + y, 0);
                    for (std::int64_t x = 0; x < layout.width; ++x) to[x] = read(from + x);
                    std::fill(to + layout.width, to + plan.line, T(0));
                }
        }

        void add_bias(std::int64_t rows) const {
            for (std::int64_t m = 0; m < maps; ++m) {
                const T* from = signal + m * plan.planes.band * plan.line;
                Value value{};
                for (std::int64_t i = 0; i < rows * plan.line; i += L::count)
                    value += L::load(from + i, L::count);
                add(sum(m, plan.terms()), value);
            }
        }

        void multiply(std::int64_t rows) const {
            std::int64_t m = 0;
            for (; m + kMaps <= maps; m += kMaps) multiply_maps<kMaps>(m, rows);
            for (; m < maps; ++m) multiply_maps<1>(m, rows);
        }
        template <int count>
        void multiply_maps(std::int64_t m, std::int64_t rows) const {
            std::int64_t k = 0;
            for (; k + kTaps <= plan.terms(); k += kTaps) kernel<count, kTaps>(m, k, rows);
            for (; k < plan.terms(); ++k) kernel<count, 1>(m, k, rows);
        }

        template <int ms, int ks>
        void kernel(std::int64_t m, std::int64_t k, std::int64_t rows) const {
            const std::int64_t width = plan.s.out_width;
            typename L::Integer inside;  // lanes of the last vector of a row
            for (int i = 0; i < L::count; ++i) inside[i] = -(plan.line - L::count + i < width);
            Value value[ms][ks] = {};
            const auto step = [&](const T* maps_at, const T* planes_at, bool last) {
                Value from[ms];
#pragma GCC unroll 4
                for (int a = 0; a < ms; ++a)
                    from[a] = L::load(maps_at + a * plan.planes.band * plan.line, L::count);
#pragma GCC unroll 4
                for (int b = 0; b < ks; ++b) {
                    Value other = L::load(planes_at + offsets[k + b], L::count);
                    // What is no position may be infinite: zero of the signal would not hide it.
                    if (last) other = (Value)((typename L::Integer)other & inside);
#pragma GCC unroll 4
                    for (int a = 0; a < ms; ++a) value[a][b] += from[a] * other;
                }
            };
            for (std::int64_t y = 0; y < rows; ++y) {
                const T* maps_at = signal + (m * plan.planes.band + y) * plan.line;
                const T* planes_at = planes + y * plan.planes.pitch;
                std::int64_t x = 0;
                for (; x + L::count < plan.line; x += L::count)
                    step(maps_at + x, planes_at + x, false);
                step(maps_at + x, planes_at + x, true);
            }
            for (int a = 0; a < ms; ++a)
                for (int b = 0; b < ks; ++b) add(sum(m + a, k + b), value[a][b]);
        }
    };
};

}  // namespace zfcuda
