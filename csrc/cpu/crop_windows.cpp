// Windows of images, moved a row at a time: a row of a window is one run of bytes in the image.
//
// Floor: one read and one write of the windows.
#include <cstring>

#include "parallel.h"

namespace zfcuda {

void crop_windows(const CropShape& s, Address source, Address images, Address origins,
                  Address windows, const Exec& exec) {
    const std::int64_t row_bytes = s.window_width * s.bytes;
    parallel_for(s.windows, exec, [&](std::int64_t window) {
        const std::int64_t* origin = origins.as<const std::int64_t>() + 2 * window;
        const std::int64_t image = images.as<const std::int64_t>()[window];
        const std::int64_t first = std::clamp<std::int64_t>(-origin[1], 0, s.window_width);
        const std::int64_t last =
            std::clamp<std::int64_t>(s.width - origin[1], first, s.window_width);
        for (std::int64_t y = 0; y < s.window_height; ++y) {
            auto* to = windows.as<char>() + (window * s.window_height + y) * row_bytes;
            const std::int64_t row = origin[0] + y;
            if (row < 0 || row >= s.height || first == last) {
                std::memset(to, static_cast<int>(s.fill), row_bytes);
                continue;
            }
            const auto* from = source.as<const char>() +
                               ((image * s.height + row) * s.width + origin[1] + first) * s.bytes;
            std::memset(to, static_cast<int>(s.fill), first * s.bytes);
            std::memcpy(to + first * s.bytes, from, (last - first) * s.bytes);
            std::memset(to + last * s.bytes, static_cast<int>(s.fill), row_bytes - last * s.bytes);
        }
    });
}

}  // namespace zfcuda
