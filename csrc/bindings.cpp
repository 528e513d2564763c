// The only pybind11 file: one line an operator. It is compiled once for each backend module, with
// ZF_MODULE the module's name. Shapes and Exec arrive as tuples of integers, addresses as
// integers (0 or None for "absent"), dtypes and gates as small integers; the GIL is released.
#include <pybind11/pybind11.h>

#include <cstring>

#include "ops.h"

namespace py = pybind11;

namespace zfcuda {

// A struct of int64_t fields from a sequence of as many integers.
template <typename Struct>
struct tuple_caster {
    PYBIND11_TYPE_CASTER(Struct, py::detail::const_name("tuple"));

    bool load(py::handle source, bool) {
        constexpr std::size_t count = sizeof(Struct) / sizeof(std::int64_t);
        if (!PyTuple_Check(source.ptr()) || std::size_t(PyTuple_GET_SIZE(source.ptr())) != count)
            return false;
        std::int64_t fields[count];
        for (std::size_t i = 0; i < count; ++i) {
            fields[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
            if (fields[i] == -1 && PyErr_Occurred()) {
                PyErr_Clear();
                return false;
            }
        }
        std::memcpy(&value, fields, sizeof fields);
        return true;
    }
};

template <typename Enum>
struct enum_caster {
    PYBIND11_TYPE_CASTER(Enum, py::detail::const_name("int"));

    bool load(py::handle source, bool) {
        const long number = PyLong_AsLong(source.ptr());
        if (number == -1 && PyErr_Occurred()) {
            PyErr_Clear();
            return false;
        }
        value = static_cast<Enum>(number);
        return true;
    }
};

}  // namespace zfcuda

namespace pybind11::detail {

template <>
struct type_caster<zfcuda::ConvShape> : zfcuda::tuple_caster<zfcuda::ConvShape> {};
template <>
struct type_caster<zfcuda::PoolShape> : zfcuda::tuple_caster<zfcuda::PoolShape> {};
template <>
struct type_caster<zfcuda::NormShape> : zfcuda::tuple_caster<zfcuda::NormShape> {};
template <>
struct type_caster<zfcuda::WindowShape> : zfcuda::tuple_caster<zfcuda::WindowShape> {};
template <>
struct type_caster<zfcuda::CropShape> : zfcuda::tuple_caster<zfcuda::CropShape> {};
template <>
struct type_caster<zfcuda::Exec> : zfcuda::tuple_caster<zfcuda::Exec> {};
template <>
struct type_caster<zfcuda::Dtype> : zfcuda::enum_caster<zfcuda::Dtype> {};
template <>
struct type_caster<zfcuda::Gate> : zfcuda::enum_caster<zfcuda::Gate> {};

template <>
struct type_caster<zfcuda::Address> {
    PYBIND11_TYPE_CASTER(zfcuda::Address, const_name("int | None"));

    bool load(handle source, bool) {
        if (source.is_none()) return true;
        value.value = PyLong_AsVoidPtr(source.ptr());
        if (value.value == nullptr && PyErr_Occurred()) {
            PyErr_Clear();
            return false;
        }
        return true;
    }
};

}  // namespace pybind11::detail

PYBIND11_MODULE(ZF_MODULE, m) {
    using namespace zfcuda;
    using nogil = py::call_guard<py::gil_scoped_release>;

    m.def("conv2d_workspace", &conv2d_workspace);
    m.def("conv2d", &conv2d, nogil());
    m.def("deconv2d_workspace", &deconv2d_workspace);
    m.def("deconv2d", &deconv2d, nogil());
    m.def("conv2d_weight_gradient_workspace", &conv2d_weight_gradient_workspace);
    m.def("conv2d_weight_gradient", &conv2d_weight_gradient, nogil());
    m.def("max_pool2d", &max_pool2d, nogil());
    m.def("conv2d_relu_max_pool2d_workspace", &conv2d_relu_max_pool2d_workspace);
    m.def("conv2d_relu_max_pool2d", &conv2d_relu_max_pool2d, nogil());
    m.def("max_unpool2d", &max_unpool2d, nogil());
    m.def("unpool_relu_deconv2d_workspace", &unpool_relu_deconv2d_workspace);
    m.def("unpool_relu_deconv2d", &unpool_relu_deconv2d, nogil());
    m.def("switch_gather", &switch_gather, nogil());
    m.def("find_invalid_switch", &find_invalid_switch, nogil());
    m.def("local_response_norm", &local_response_norm, nogil());
    m.def("local_response_norm_gradient", &local_response_norm_gradient, nogil());
    m.def("renormalize_filters", &renormalize_filters, nogil());
    m.def("window_deconv2d_packed", &window_deconv2d_packed);
    m.def("window_deconv2d_pack", &window_deconv2d_pack, nogil());
    m.def("window_deconv2d_workspace", &window_deconv2d_workspace);
    m.def("window_deconv2d", &window_deconv2d, nogil());
    m.def("crop_windows", &crop_windows, nogil());
    m.def("map_maximum", &map_maximum, nogil());
    m.def("target", &target);
    m.def("machine", &machine);
}
