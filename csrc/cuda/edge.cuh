// NCHW at the edge: where a product takes less time in NHWC, by more than the copies of its tensors
// cost, it runs there on copies, some images at a time.
//
//   image NCHW --copy--> image NHWC --product--> maps NHWC --copy--> maps NCHW
//
// An operator lists its tensors once, as edges: their sizes make the estimate and the workspace,
// their addresses the copies. Those lie at the beginning of the workspace, each at a multiple of 16
// bytes, and behind them the workspace of the product itself.
#pragma once

#include <array>

#include "layouts.cuh"
#include "tap_choice.cuh"

namespace zfcuda {

// A tensor of an operator.
struct Edge {
    Layout layout;
    std::int64_t bytes;  // of an element
    Address given;       // null for a tensor that is not there, and where only sizes are asked for
    enum class Role { source, mask, result, kept } role = Role::source;

    bool is_result() const { return role == Role::result || role == Role::kept; }
    bool optional() const { return role == Role::mask || role == Role::kept; }
    std::int64_t size(std::int64_t images) const { return layout.step_image() * images * bytes; }
    std::int64_t copied(std::int64_t images) const { return (size(images) + 15) / 16 * 16; }
};

template <std::size_t kCount>
using Edges = std::array<Edge, kCount>;

// Bytes of the copies of so many images.
template <std::size_t kCount>
std::int64_t copied_bytes(const Edges<kCount>& edges, std::int64_t images) {
    std::int64_t bytes = 0;
    for (const Edge& edge : edges) bytes += edge.copied(images);
    return bytes;
}

// Cycles of a multiprocessor that the copies take, to NHWC or back: two kernels, and every tensor
// that is always there read and written once.
template <std::size_t kCount>
std::int64_t copy_cycles(const Edges<kCount>& edges, std::int64_t images, const Exec& exec) {
    std::int64_t bytes = 0;
    for (const Edge& edge : edges) bytes += edge.optional() ? 0 : edge.size(images);
    return 2 * kPass + 2 * bytes / memory_bytes(exec);
}

// Whether an NCHW product takes less time in NHWC, with copies; halves run there always, where the
// tensor cores are.
template <bool kTransposed, std::size_t kCount>
bool by_copies(const ConvShape& s, Dtype dtype, const Edges<kCount>& edges, const Exec& exec) {
    if (s.channels_last || dtype == Dtype::float64) return false;
    if (element_bytes(dtype) < 4) return true;
    const Way way = tap_way<kTransposed>(in_nhwc(s), dtype, exec);
    return product_cycles<kTransposed>(in_nhwc(s), dtype, way, exec) +
               copy_cycles(edges, s.batch, exec) <
           product_cycles<kTransposed>(s, dtype, Way::fma, exec);
}

// body(copies, workspace behind them) between the copies of sources and those of results, of images
// `first` to `first` + `images`.
template <std::size_t kCount, typename Body>
void on_copies(const Edges<kCount>& edges, std::int64_t first, std::int64_t images,
               Address workspace, const Exec& exec, Body&& body) {
    std::array<Address, kCount> copies = {};
    const auto here = [&](const Edge& edge) {
        return image_at(edge.layout, edge.bytes, edge.given, first);
    };
    for (std::size_t i = 0; i < kCount; ++i) {
        const Edge& edge = edges[i];
        if (!edge.given) continue;
        copies[i] = workspace;
        workspace = {workspace.as<char>() + edge.copied(images)};
        if (!edge.is_result())
            copy_layout(edge.layout, images, edge.bytes, here(edge), copies[i], exec);
    }
    body(copies, workspace);
    for (std::size_t i = 0; i < kCount; ++i) {
        const Edge& edge = edges[i];
        if (!edge.given || !edge.is_result()) continue;
        Layout layout = edge.layout;
        layout.channels_last = true;
        copy_layout(layout, images, edge.bytes, copies[i], here(edge), exec);
    }
}

// The same for all images, some at a time: body(part, first, copies, workspace behind them).
template <std::size_t kCount, typename Body>
void on_copies_of_parts(const ConvShape& s, const Edges<kCount>& edges, Address workspace,
                        const Exec& exec, Body&& body) {
    for_parts(in_nhwc(s), exec, [&](const ConvShape& part, std::int64_t first) {
        on_copies(edges, first, part.batch, workspace, exec,
                  [&](const auto& copies, Address rest) { body(part, first, copies, rest); });
    });
}

// The workspace for that, where a part itself needs bytes_of(part).
template <std::size_t kCount, typename BytesOf>
std::int64_t workspace_of_copies(const ConvShape& s, const Edges<kCount>& edges, const Exec& exec,
                                 BytesOf&& bytes_of) {
    return workspace_of_parts(in_nhwc(s), exec, [&](const ConvShape& part) {
        return copied_bytes(edges, part.batch) + bytes_of(part);
    });
}

}  // namespace zfcuda
