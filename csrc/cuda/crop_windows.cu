// Windows of images, moved as bytes.
//
//   windows[i, y, x] = source[images[i], origins[i].row + y, origins[i].column + x], `fill` outside
//
//   bytes of a pixel |unit|unit|unit|  a thread a unit, in storage order of the windows
//   (places.cuh):
//                                      the widest of 16, 8, 4, 2 and 1 bytes that pixel and
//                                      addresses are multiples of
//
// Lanes read and write neighbours; an origin is read by all threads of its window, through L1.
// Least bytes: the windows twice, less what lies outside. Rows would allow wider units than pixels
// do, but a window begins at any pixel: three-byte pixels go byte by byte, 32 to a transaction.
// Measured: not yet, for want of a GPU; `make bench` on one fills this line.
#include "places.cuh"

namespace zfcuda {
namespace {

template <typename Word, int kWords>
__global__ void __launch_bounds__(kThreads)
    crop_windows_kernel(CropShape s, Places places, const Word* source, const std::int64_t* images,
                        const std::int64_t* origins, Word* windows) {
    Vector<Word, kWords> outside;
#pragma unroll
    for (int i = 0; i < kWords; ++i)
        outside.value[i] = static_cast<Word>(0x01010101u * static_cast<unsigned>(s.fill));
    for_each_place(places, [&](std::int64_t index, const Place& place) {
        const std::int64_t y = origins[2 * place.slab] + place.y;
        const std::int64_t x = origins[2 * place.slab + 1] + place.x;
        Vector<Word, kWords> unit = outside;
        if (y >= 0 && y < s.height && x >= 0 && x < s.width) {
            const std::int64_t pixel = (images[place.slab] * s.height + y) * s.width + x;
            unit = load_vector<Word, kWords>(source +
                                             (pixel * places.inner.divisor + place.inner) * kWords);
        }
        store_vector(windows + index * kWords, unit);
    });
}

}  // namespace

void crop_windows(const CropShape& s, Address source, Address images, Address origins,
                  Address windows, const Exec& exec) {
    if (s.windows * s.window_height * s.window_width * s.bytes == 0) return;
    const auto fits = [&](std::int64_t bytes) {
        return s.bytes % bytes == 0 &&
               reinterpret_cast<std::uintptr_t>(source.value) % bytes == 0 &&
               reinterpret_cast<std::uintptr_t>(windows.value) % bytes == 0;
    };
    const auto run = [&](auto kernel, auto word, std::int64_t bytes) {
        using Word = decltype(word);
        const Places places({s.bytes / bytes, s.window_height, s.window_width, true}, s.windows, 1);
        launch(kernel, places.grid(), dim3(kThreads), 0, exec, s, places, source.as<const Word>(),
               images.as<const std::int64_t>(), origins.as<const std::int64_t>(),
               windows.as<Word>());
    };
    if (fits(16)) return run(crop_windows_kernel<std::uint32_t, 4>, std::uint32_t{}, 16);
    if (fits(8)) return run(crop_windows_kernel<std::uint32_t, 2>, std::uint32_t{}, 8);
    if (fits(4)) return run(crop_windows_kernel<std::uint32_t, 1>, std::uint32_t{}, 4);
    if (fits(2)) return run(crop_windows_kernel<std::uint16_t, 1>, std::uint16_t{}, 2);
    run(crop_windows_kernel<std::uint8_t, 1>, std::uint8_t{}, 1);
}

}  // namespace zfcuda
