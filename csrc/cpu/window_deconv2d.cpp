// One step down of a receptive-field-local projection: unpool, gate, transposed convolution, clip.
//
// Narrow filters (to pixels) and wide ones are multiplied in ways of their own: window_strips.h and
// window_product.h.
#include "window_product.h"
#include "window_strips.h"

namespace zfcuda {
namespace {

// The parts of the workspace, at cache lines.
class Cutter {
  public:
    explicit Cutter(Address workspace)
        : start(reinterpret_cast<std::uintptr_t>(workspace.value)), end(start) {}

    template <typename P>
    P* take(std::int64_t count) {
        end = (end + 63) / 64 * 64;
        P* const part = reinterpret_cast<P*>(end);
        end += count * sizeof(P);
        return part;
    }
    std::int64_t bytes() const { return static_cast<std::int64_t>(end - start) + 64; }

  private:
    std::uintptr_t start, end;
};

// Writes the part of a window inside the whole image, and zeros around it; `from` may be `to`.
template <typename T>
void clip(const WindowShape& s, const std::int64_t* origin, const Sum<T>* from, T* to) {
    const std::int64_t line = s.in_width * s.in_channels;
    const auto inside = [](std::int64_t start, std::int64_t size, std::int64_t limit) {
        start = std::clamp(start, -size, limit);  // farther away no number overflows, nor is inside
        const std::int64_t first = std::clamp<std::int64_t>(-start, 0, size);
        return std::pair(first, std::clamp<std::int64_t>(limit - start, first, size));
    };
    const auto [top, bottom] = inside(origin[0], s.in_height, s.image_height);
    const auto [left, right] = inside(origin[1], s.in_width, s.image_width);
    std::fill_n(to, top * line, T(0));
    for (std::int64_t y = top; y < bottom; ++y) {
        T* row = to + y * line;
        std::fill_n(row, left * s.in_channels, T(0));
        if (static_cast<const void*>(from) != to)
            for (std::int64_t i = left * s.in_channels; i < right * s.in_channels; ++i)
                row[i] = T(from[y * line + i]);
        std::fill(row + right * s.in_channels, row + line, T(0));
    }
    std::fill_n(to + bottom * line, (s.in_height - bottom) * line, T(0));
}

// Whether sums may be formed in the image itself: not of halves.
template <typename T>
constexpr bool kInPlace = std::is_same_v<T, Sum<T>>;

// The image as sums, where they may be formed in it, else `other`.
template <typename T>
Sum<T>* sums_in(T* image, Sum<T>* other) {
    if constexpr (kInPlace<T>)
        return image;
    else
        return other;
}

// Narrow filters: window by window.
template <typename T>
struct StripWay {
    const WindowShape& s;
    std::int64_t units, window, stride, words;

    StripWay(const WindowShape& shape, const Exec&)
        : s(shape),
          units(s.windows),
          window(s.in_height * s.in_width * s.in_channels),
          stride(Slots<Sum<T>>::stride_of(s.out_channels)),
          words(Slots<Sum<T>>::words_of(s.out_channels)) {}

    struct Own {  // of one thread
        Slots<Sum<T>> slots;
        Sum<T>* window;
    };
    Own own(Cutter& cutter) const {
        return {{cutter.take<Sum<T>>(kSlots * stride), cutter.take<std::uint64_t>(kSlots * words),
                 stride, words},
                cutter.take<Sum<T>>(kInPlace<T> ? 0 : window)};
    }

    void run(const MapReader<T>& maps, const Sum<T>* packed, const std::int64_t* origins,
             std::int64_t window_index, const Own& own, T* image) const {
        T* const to = image + window_index * window;
        Sum<T>* const sums = sums_in(to, own.window);
        std::fill_n(own.slots.bits, kSlots * words, 0);
        std::fill_n(sums, window, Sum<T>(0));
        add_strips(s, maps, window_index, packed, own.slots, sums);
        clip(s, origins + 2 * window_index, sums, to);
    }
};

// Wide filters: several windows together, so that a panel of weights serves many lists.
template <typename T>
struct PanelWay {
    // The image windows of a unit of work together have about this many bytes (at least one
    // window): the panels are read once a unit, the windows once a panel.
    static constexpr std::int64_t kUnitBytes = 512 * 1024;

    const WindowShape& s;
    Panels<Sum<T>> panels;
    std::int64_t window, unit, units;  // values of an image window; windows of a unit
    bool direct;                       // whether runs are whole vectors, added to the image

    PanelWay(const WindowShape& shape, const Exec& exec)
        : s(shape), panels(shape), window(s.in_height * s.in_width * s.in_channels) {
        const std::int64_t fit =
            std::max<std::int64_t>(kUnitBytes * panels.parts() / (window * sizeof(Sum<T>)), 1);
        unit = std::min(fit, gemm::divide_up(s.windows, max_threads(exec)));
        units = gemm::divide_up(s.windows, unit);
        direct = kInPlace<T> && panels.width % kUnit<T> == 0;
    }

    struct Own {  // of one thread
        Lists<Sum<T>> lists;
        Sum<T>* scratch;
    };
    Own own(Cutter& cutter) const {
        const std::int64_t values =
            unit * MapReader<T>::capacity(s, panels.channels) + gemm::kVector<T>;
        const std::int64_t items = unit * s.out_height * s.out_width;
        return {{cutter.take<Sum<T>>(values), cutter.take<std::int32_t>(values),
                 cutter.take<Item>(items), 0, 0},
                cutter.take<Sum<T>>(direct ? 0 : unit * window + gemm::kVector<T>)};
    }

    void run(const MapReader<T>& maps, const Sum<T>* packed, const std::int64_t* origins,
             std::int64_t unit_index, Own own, T* image) const {
        const std::int64_t first = unit_index * unit;
        const std::int64_t windows = std::min(unit, s.windows - first);
        Sum<T>* const target = direct ? sums_in(image + first * window, own.scratch) : own.scratch;
        std::fill_n(target, windows * window, Sum<T>(0));
        for (std::int64_t group = 0; group < s.groups; ++group)
            for (std::int64_t block = 0; block < panels.blocks; ++block) {
                const std::int64_t base = group * s.out_per_group();
                const std::int64_t from = block * panels.channels;
                const std::int64_t to = std::min(from + panels.channels, s.out_per_group());
                own.lists.used = own.lists.count = 0;
                for (std::int64_t w = 0; w < windows; ++w)
                    append_lists(s, maps, first + w, {base + from, base + to}, panels.columns(),
                                 w * window, own.lists);
                add_block(s, panels, own.lists, packed, group, block, target);
            }
        for (std::int64_t w = 0; w < windows; ++w)
            clip(s, origins + 2 * (first + w), target + w * window, image + (first + w) * window);
    }
};

// body(way) with the way that a shape goes.
template <typename T, typename Body>
void with_way(const WindowShape& s, const Exec& exec, Body&& body) {
    if (Strips<Sum<T>>::serve(s))
        body(StripWay<T>(s, exec));
    else
        body(PanelWay<T>(s, exec));
}

template <typename Way>
std::int64_t own_bytes(const Way& way) {
    Cutter cutter(Address{});
    way.own(cutter);
    return cutter.bytes();
}

template <typename T>
std::int64_t table_bytes(const WindowShape& s) {
    Cutter cutter(Address{});
    cutter.take<Covering>(MapReader<T>::table_size(s));
    return cutter.bytes();
}

}  // namespace

std::int64_t window_deconv2d_packed(const WindowShape& s, Dtype dtype, const Exec&) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        using Values = Sum<decltype(zero)>;
        const std::int64_t values = Strips<Values>::serve(s)
                                        ? Strips<Values>(s).packed_size()
                                        : Panels<Values>(s).packed_size(s.groups);
        bytes = kLine + sizeof(Values) * values;
    });
    return bytes;
}

void window_deconv2d_pack(const WindowShape& s, Dtype dtype, Address weight, Address packed,
                          const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto pack = Strips<Sum<T>>::serve(s) ? pack_strips<T> : pack_panels<T>;
        pack(s, weight.as<const T>(), aligned<Sum<T>>(packed), exec);
    });
}

std::int64_t window_deconv2d_workspace(const WindowShape& s, Dtype dtype, const Exec& exec) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        with_way<T>(s, exec, [&](const auto& way) {
            bytes = table_bytes<T>(s) + max_threads(exec) * own_bytes(way);
        });
    });
    return bytes;
}

void window_deconv2d(const WindowShape& s, Dtype dtype, Gate gate, Address signal, Address switches,
                     Address positive, Address packed, Address origins, Address image,
                     Address workspace, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        Cutter cutter(workspace);
        const MapReader<T> maps(s, gate, signal.as<const T>(), switches.as<const std::uint8_t>(),
                                positive.as<const std::uint8_t>(),
                                cutter.take<Covering>(MapReader<T>::table_size(s)));
        char* const own = workspace.as<char>() + table_bytes<T>(s);
        with_way<T>(s, exec, [&](const auto& way) {
            parallel_for_thread(way.units, exec, [&](std::int64_t unit, int thread) {
                Cutter mine(Address{own + thread * own_bytes(way)});
                way.run(maps, aligned<const Sum<T>>(packed), origins.as<const std::int64_t>(), unit,
                        way.own(mine), image.as<T>());
            });
        });
    });
}

}  // namespace zfcuda
