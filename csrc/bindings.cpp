// The only pybind11 file: one line an operator. Every backend's module has the same object, and its
// own name from the linker (csrc/build.py). Shapes and Exec arrive as tuples of integers, addresses
// as integers (0 or None for "absent"), dtypes and gates as small integers; the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "memo.h"
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

namespace zfcuda {

// Defines kernels, and prepares calls of them: see memo.h.
class Kernels {
    using Prepare = std::function<std::shared_ptr<Call>(const py::tuple&)>;

    py::module_& module_;
    std::unordered_map<std::string, Prepare> preparations_;

  public:
    explicit Kernels(py::module_& module) : module_(module) {}

    template <typename... Arguments>
    void def(const char* name, void (*function)(Arguments...)) {
        module_.def(name, function, py::call_guard<py::gil_scoped_release>());
        preparations_[name] = [function](const py::tuple& arguments) {
            return std::make_shared<BoundCall<Arguments...>>(function, arguments);
        };
    }

    // prepare(name, arguments): a capsule with the function's call; each tensor is a number.
    void def_prepare() {
        module_.def("prepare",
                    [all = preparations_](const std::string& name, const py::tuple& arguments) {
                        auto* call = new std::shared_ptr<Call>(all.at(name)(arguments));
                        return py::capsule(call, "zfcuda.Call", [](PyObject* capsule) {
                            delete static_cast<std::shared_ptr<Call>*>(
                                PyCapsule_GetPointer(capsule, "zfcuda.Call"));
                        });
                    });
    }
};

// steps: pairs of a capsule of prepare() and the number of the tensor to look at, or -1. The rest
// as in Memo::Entry.
void learn(Memo& memo, const py::bytes& key, const std::vector<std::pair<py::capsule, long>>& steps,
           const std::vector<std::pair<py::object, py::tuple>>& allocations,
           const std::vector<std::size_t>& results, bool single, bool small) {
    Memo::Entry entry{{}, allocations, results, single, small, {}};
    for (const auto& [capsule, expected] : steps)
        entry.steps.push_back({*capsule.get_pointer<std::shared_ptr<Call>>(), expected});
    memo.learn(key, std::move(entry));
}

PyObject* recall(PyObject* capsule, PyObject* args, PyObject* kwargs) try {
    auto* memo = static_cast<Memo*>(PyCapsule_GetPointer(capsule, "zfcuda.Memo"));
    return memo->recall(args, kwargs);
} catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
}

// The function `recall` of a memo, which must outlive it: plain C, for pybind11 takes longer to
// look at the arguments than the call takes.
py::object recall_function(Memo& memo) {
    static PyMethodDef method = {"recall",
                                 reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&recall)),
                                 METH_VARARGS | METH_KEYWORDS, nullptr};
    const py::capsule self(&memo, "zfcuda.Memo");
    return py::reinterpret_steal<py::object>(PyCFunction_New(&method, self.ptr()));
}

}  // namespace zfcuda

PYBIND11_MODULE(_core, m) {
    using namespace zfcuda;
    Kernels kernels(m);

    m.def("conv2d_workspace", &conv2d_workspace);
    kernels.def("conv2d", &conv2d);
    m.def("deconv2d_workspace", &deconv2d_workspace);
    kernels.def("deconv2d", &deconv2d);
    m.def("conv2d_weight_gradient_workspace", &conv2d_weight_gradient_workspace);
    kernels.def("conv2d_weight_gradient", &conv2d_weight_gradient);
    kernels.def("max_pool2d", &max_pool2d);
    m.def("conv2d_relu_max_pool2d_workspace", &conv2d_relu_max_pool2d_workspace);
    kernels.def("conv2d_relu_max_pool2d", &conv2d_relu_max_pool2d);
    m.def("conv2d_relu_max_pool2d_norm_workspace", &conv2d_relu_max_pool2d_norm_workspace);
    kernels.def("conv2d_relu_max_pool2d_norm", &conv2d_relu_max_pool2d_norm);
    kernels.def("max_unpool2d", &max_unpool2d);
    m.def("unpool_relu_deconv2d_workspace", &unpool_relu_deconv2d_workspace);
    kernels.def("unpool_relu_deconv2d", &unpool_relu_deconv2d);
    m.def("unpool_relu_weight_gradient_workspace", &unpool_relu_weight_gradient_workspace);
    kernels.def("unpool_relu_weight_gradient", &unpool_relu_weight_gradient);
    kernels.def("switch_gather", &switch_gather);
    kernels.def("find_invalid_switch", &find_invalid_switch);
    kernels.def("local_response_norm", &local_response_norm);
    kernels.def("local_response_norm_gradient", &local_response_norm_gradient);
    kernels.def("renormalize_filters", &renormalize_filters);
    m.def("window_deconv2d_packed", &window_deconv2d_packed);
    kernels.def("window_deconv2d_pack", &window_deconv2d_pack);
    m.def("window_deconv2d_workspace", &window_deconv2d_workspace);
    kernels.def("window_deconv2d", &window_deconv2d);
    kernels.def("crop_windows", &crop_windows);
    kernels.def("map_maximum", &map_maximum);
    kernels.def_prepare();
    py::class_<Memo>(m, "Memo", py::module_local())
        .def(py::init<py::tuple, py::list, py::object, py::object, py::object, py::dict,
                      py::object>())
        .def("key", &Memo::key)
        .def("learn", &learn)
        .def_property_readonly("recall", &recall_function, py::return_value_policy::move);
    m.def("target", &target);
    m.def("machine", &machine);
}
