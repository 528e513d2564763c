// Which way a pass goes: by planes, by narrow groups, or by the general product.
#pragma once

#include "grouped.h"
#include "planes.h"

namespace zfcuda {

template <Gate gate, typename T>
constexpr bool gated(const Source<gate, T>&) {
    return gate != Gate::none;
}

// Whether it goes the general way, and has anything to sum.
template <typename T>
bool by_product(const Pass<T>& pass, bool gated) {
    return pass.depth() > 0 && !by_planes(pass, gated) && !by_groups(pass);
}

// Elements of the packed weight, and of the scratch of one thread.
template <typename T>
std::int64_t packed_room(const Pass<T>& pass, bool gated) {
    if (by_planes(pass, gated))
        return offsets_room<T>(pass) + pass.groups * pass.depth() * plane_rows(pass);
    return by_groups(pass) ? grouped_weight(pass) : pass.packed_weight();
}
template <typename T>
std::int64_t scratch_room(const Pass<T>& pass, bool gated) {
    if (by_planes(pass, gated)) return Planes<Sum<T>>(pass.taps).elements();
    if (by_groups(pass)) return gated ? group_rows(pass) : 0;
    return pass_scratch<T>(pass.columns);
}
template <typename T>
std::int64_t room(const Pass<T>& pass, bool gated, const Exec& exec) {
    return packed_room(pass, gated) + scratch_room(pass, gated) * max_threads(exec);
}

// Runs it; `workspace` has room().
template <typename T, typename Read>
void run(const Pass<T>& pass, const Read& source, const Epilogue<T>& epilogue, Sum<T>* workspace,
         const Exec& exec) {
    Sum<T>* const scratch = workspace + packed_room(pass, gated(source));
    if constexpr (kWhole<T>) {
        if (by_planes(pass, gated(source)))
            return run_planes(pass, source, epilogue, workspace, scratch, exec);
        if (by_groups(pass)) return run_groups(pass, source, epilogue, workspace, scratch, exec);
    }
    run_pass(pass, source, epilogue, workspace, scratch, exec);
}

}  // namespace zfcuda
