// One step down of a receptive-field-local projection: unpool, gate, transposed convolution, clip.
#include "window_product.h"

namespace zfcuda {
namespace {

// The image windows of a unit of work together have about this many bytes (at least one window):
// the panels are read once a unit, the windows once a panel.
constexpr std::int64_t kUnitBytes = 512 * 1024;

template <typename T>
struct Plan {
    const WindowShape& s;
    Panels<T> panels;
    std::int64_t window, unit, units;  // values of an image window; windows of a unit
    bool direct;                       // whether runs are whole vectors, written to the image
    std::int64_t values, items;

    Plan(const WindowShape& shape, const Exec& exec)
        : s(shape), panels(shape), window(s.in_height * s.in_width * s.in_channels) {
        const std::int64_t fit = std::max<std::int64_t>(kUnitBytes / (window * sizeof(T)), 1);
        unit = std::min(fit, gemm::divide_up(s.windows, max_threads(exec)));
        units = gemm::divide_up(s.windows, unit);
        direct = panels.width % kUnit<T> == 0;
        values = unit * MapReader<T>::capacity(s, panels.channels) + gemm::kVector<T>;
        items = unit * s.out_height * s.out_width;
    }
    std::int64_t scratch() const { return direct ? 0 : unit * window + gemm::kVector<T>; }
};

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

template <typename T>
struct Own {  // of one thread
    Lists<T> lists;
    std::int32_t* sizes;
    std::uint8_t* empty;
    T* scratch;

    Own(const Plan<T>& plan, Cutter& cutter)
        : lists{cutter.take<T>(plan.values),
                cutter.take<std::int32_t>(plan.values),
                cutter.take<Item>(plan.items),
                cutter.take<Item>(plan.items),
                0,
                0},
          sizes(cutter.take<std::int32_t>(plan.panels.channels + 2)),
          empty(cutter.take<std::uint8_t>(plan.s.pooled_height * plan.s.pooled_width)),
          scratch(cutter.take<T>(plan.scratch())) {}
};

template <typename T>
struct Shared {
    Covering* table;

    Shared(const Plan<T>& plan, Cutter& cutter)
        : table(cutter.take<Covering>(MapReader<T>::table_size(plan.s))) {}
};

template <template <typename> typename Part, typename T>
std::int64_t bytes_of(const Plan<T>& plan) {
    Cutter cutter(Address{});
    Part<T>(plan, cutter);
    return cutter.bytes();
}

// Writes the part of a window inside the whole image, and zeros around it; `from` may be `to`.
template <typename T>
void clip(const WindowShape& s, const std::int64_t* origin, const T* from, T* to) {
    const std::int64_t line = s.in_width * s.in_channels;
    const auto inside = [](std::int64_t start, std::int64_t size, std::int64_t limit) {
        const std::int64_t first = std::clamp<std::int64_t>(-start, 0, size);
        return std::pair(first, std::clamp<std::int64_t>(limit - start, first, size));
    };
    const auto [top, bottom] = inside(origin[0], s.in_height, s.image_height);
    const auto [left, right] = inside(origin[1], s.in_width, s.image_width);
    std::fill_n(to, top * line, T(0));
    for (std::int64_t y = top; y < bottom; ++y) {
        T* row = to + y * line;
        std::fill_n(row, left * s.in_channels, T(0));
        if (from != to)
            std::copy(from + y * line + left * s.in_channels,
                      from + y * line + right * s.in_channels, row + left * s.in_channels);
        std::fill(row + right * s.in_channels, row + line, T(0));
    }
    std::fill_n(to + bottom * line, (s.in_height - bottom) * line, T(0));
}

template <typename T>
void run_unit(const Plan<T>& plan, const MapReader<T>& maps, const T* packed,
              const std::int64_t* origins, std::int64_t first, Own<T> own, T* image) {
    const WindowShape& s = plan.s;
    const Panels<T>& p = plan.panels;
    const std::int64_t windows = std::min(plan.unit, s.windows - first);
    T* const target = plan.direct ? image + first * plan.window : own.scratch;
    std::fill_n(target, windows * plan.window, T(0));
    for (std::int64_t group = 0; group < s.groups; ++group)
        for (std::int64_t block = 0; block < p.blocks; ++block) {
            const std::int64_t base = group * s.out_per_group();
            const std::int64_t from = block * p.channels;
            const std::int64_t to = std::min(from + p.channels, s.out_per_group());
            own.lists.used = own.lists.count = 0;
            for (std::int64_t w = 0; w < windows; ++w)
                maps.read(first + w, {base + from, base + to, p.row_step()}, w * plan.window,
                          own.lists, own.empty);
            sort_by_length(own.lists, to - from, own.sizes);
            add_block(s, p, own.lists, packed, group, block, target);
        }
    for (std::int64_t w = 0; w < windows; ++w)
        clip(s, origins + 2 * (first + w), target + w * plan.window,
             image + (first + w) * plan.window);
}

}  // namespace

std::int64_t window_deconv2d_packed(const WindowShape& s, Dtype dtype, const Exec&) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        bytes = kLine + sizeof(T) * Panels<T>(s).packed_size(s.groups);
    });
    return bytes;
}

void window_deconv2d_pack(const WindowShape& s, Dtype dtype, Address weight, Address packed,
                          const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        pack_panels(s, Panels<T>(s), weight.as<const T>(), aligned<T>(packed), exec);
    });
}

std::int64_t window_deconv2d_workspace(const WindowShape& s, Dtype dtype, const Exec& exec) {
    std::int64_t bytes = 0;
    with_dtype(dtype, [&](auto zero) {
        const Plan<decltype(zero)> plan(s, exec);
        bytes = bytes_of<Shared>(plan) + max_threads(exec) * bytes_of<Own>(plan);
    });
    return bytes;
}

void window_deconv2d(const WindowShape& s, Dtype dtype, Gate gate, Address signal, Address switches,
                     Address positive, Address packed, Address origins, Address image,
                     Address workspace, const Exec& exec) {
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const Plan<T> plan(s, exec);
        Cutter cutter(workspace);
        const MapReader<T> maps(s, gate, signal.as<const T>(), switches.as<const std::uint8_t>(),
                                positive.as<const std::uint8_t>(), Shared(plan, cutter).table);
        char* const own = workspace.as<char>() + bytes_of<Shared>(plan);
        parallel_for_thread(plan.units, exec, [&](std::int64_t unit, int thread) {
            Cutter mine(Address{own + thread * bytes_of<Own>(plan)});
            run_unit(plan, maps, aligned<const T>(packed), origins.as<const std::int64_t>(),
                     unit * plan.unit, Own(plan, mine), image.as<T>());
        });
    });
}

}  // namespace zfcuda
