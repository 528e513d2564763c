// Calls that were checked once and need no second look: an operator's eager call without gradients
// costs little more than its allocations.
//
// zfcuda/ops/_register.py runs a call in Python, with all its checks, and writes down what it came
// to: kernels with their arguments, tensors to allocate. A Memo keeps that under all that it can
// have depended on (the arguments that are not tensors; shapes, strides, dtypes and device of those
// that are; the number of threads, or CUDA's Precision) and repeats it for an equal call. It knows
// nothing of torch but a few Python functions it is given and DLPack's C table, by which it reads
// tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "ops.h"

namespace zfcuda {

namespace py = pybind11;

// A function of ops.h with all its arguments but the addresses and the Exec.
class Call {
  public:
    virtual ~Call() = default;
    virtual void run(const Address* tensors, const Exec& exec) const = 0;
};

template <typename... Arguments>
class BoundCall final : public Call {
    using Function = void (*)(Arguments...);
    using Values = std::tuple<std::decay_t<Arguments>...>;
    static constexpr std::size_t kExec = sizeof...(Arguments) - 1;  // the last argument

    Function function_;
    Values values_;
    long slots_[sizeof...(Arguments)];  // of an address: its number among the tensors, or -1

    template <std::size_t i>
    void load(const py::tuple& arguments) {
        using Value = std::tuple_element_t<i, Values>;
        slots_[i] = -1;
        if constexpr (!std::is_same_v<Value, Address>)
            std::get<i>(values_) = arguments[i].template cast<Value>();
        else if (!arguments[i].is_none())
            slots_[i] = arguments[i].template cast<long>();
    }

    template <std::size_t i>
    void place(Values& values, const Address* tensors) const {
        if constexpr (std::is_same_v<std::tuple_element_t<i, Values>, Address>)
            if (slots_[i] >= 0) std::get<i>(values) = tensors[slots_[i]];
    }

    template <std::size_t... i>
    void load_all(const py::tuple& arguments, std::index_sequence<i...>) {
        (load<i>(arguments), ...);
    }

    template <std::size_t... i>
    void place_all(Values& values, const Address* tensors, std::index_sequence<i...>) const {
        (place<i>(values, tensors), ...);
    }

  public:
    BoundCall(Function function, const py::tuple& arguments) : function_(function) {
        if (arguments.size() != kExec) throw py::type_error("prepare: wrong number of arguments");
        load_all(arguments, std::make_index_sequence<kExec>());
    }

    void run(const Address* tensors, const Exec& exec) const override {
        Values values = values_;
        place_all(values, tensors, std::make_index_sequence<kExec>());
        std::get<kExec>(values) = exec;
        std::apply(function_, values);
    }
};

// What a call depends on, as numbers.
struct Key {
    static constexpr std::size_t kMost = 160;

    std::int64_t words[kMost];
    std::size_t size = 0;
    bool full = false;

    void put(std::int64_t word) {
        if (size < kMost)
            words[size++] = word;
        else
            full = true;
    }
    void put(const std::int64_t* more, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) put(more[i]);
    }
    std::uint64_t hash() const {
        std::uint64_t hash = 14695981039346656037u;
        for (std::size_t i = 0; i < size; ++i)
            hash = (hash ^ std::uint64_t(words[i])) * 1099511628211u;
        return hash ^ (hash >> 32);
    }
    bool equals(const std::vector<std::int64_t>& other) const {
        return size == other.size() &&
               std::memcmp(words, other.data(), size * sizeof(std::int64_t)) == 0;
    }
};

class Memo {
  public:
    // Of the tensors of a call.
    static constexpr std::size_t kMostTensors = 16;

    // One kernel; afterwards the int64 at `expected` (a tensor's number, on the CPU) must be -1.
    struct Step {
        std::shared_ptr<Call> call;
        long expected = -1;
    };

    // What a call came to. Tensors are numbered: first the arguments, then those allocated.
    struct Entry {
        std::vector<Step> steps;
        // Functions that allocate, with their arguments.
        std::vector<std::pair<py::object, py::tuple>> allocations;
        std::vector<std::size_t> results;  // among the allocated
        bool single = true;                // one tensor, not a tuple
        bool small = false;                // too little work to let go of the GIL
        std::vector<std::int64_t> key;
    };

    // types: Tensor and Parameter. guards: a list of functions; a call is plain if each returns
    // something false. forward_ad: the globals of that module. exchange: the capsule of DLPack's
    // table.
    Memo(py::tuple types, py::list guards, py::object grad_enabled, py::object threads,
         py::object precision, py::dict forward_ad, py::object exchange)
        : types_(std::move(types)),
          guards_(std::move(guards)),
          grad_enabled_(std::move(grad_enabled)),
          threads_(std::move(threads)),
          precision_(std::move(precision)),
          forward_ad_(std::move(forward_ad)),
          requires_grad_("requires_grad"),
          is_neg_("is_neg"),
          current_level_("_current_level"),
          no_level_(-1) {
        void* table = PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api");
        if (table == nullptr) throw py::error_already_set();
        exchange_ = static_cast<const dlpack::ExchangeAPI*>(table);
        if (exchange_->version.major != 1 || !exchange_->dltensor_from_py_object_no_sync)
            throw py::value_error("DLPack's C exchange table has another version");
    }

    // The key of a plain call as bytes, or None.
    py::object key(const py::args& args, const py::kwargs& kwargs) const {
        Arguments call;
        if (!read(args.ptr(), kwargs.ptr(), call)) return py::none();
        const auto* bytes = reinterpret_cast<const char*>(call.key.words);
        return py::bytes(bytes, call.key.size * sizeof(std::int64_t));
    }

    // Of two keys with one hash the last counts.
    void learn(const py::bytes& bytes, Entry entry) {
        const std::string_view words = bytes;
        Key key;
        key.size = words.size() / sizeof(std::int64_t);
        std::memcpy(key.words, words.data(), words.size());
        entry.key.assign(key.words, key.words + key.size);
        if (entries_.size() >= kMostEntries) entries_.clear();
        entries_[key.hash()] = std::make_shared<const Entry>(std::move(entry));
    }

    // The results of a call like one that was learnt; None for any other.
    PyObject* recall(PyObject* args, PyObject* kwargs) const {
        Arguments call;
        if (!read(args, kwargs, call)) Py_RETURN_NONE;
        const auto found = entries_.find(call.key.hash());
        if (found == entries_.end() || !call.key.equals(found->second->key)) Py_RETURN_NONE;
        const std::shared_ptr<const Entry> entry = found->second;  // another thread may forget it

        Address tensors[kMostTensors];
        py::object made[kMostTensors];
        std::size_t count = 0;
        while (count < call.tensors) tensors[count].value = call.data[count], ++count;
        for (std::size_t i = 0; i < entry->allocations.size(); ++i) {
            const auto& [function, arguments] = entry->allocations[i];
            made[i] = py::reinterpret_steal<py::object>(
                PyObject_Call(function.ptr(), arguments.ptr(), nullptr));
            dlpack::Tensor view;
            if (!made[i] || exchange_->dltensor_from_py_object_no_sync(made[i].ptr(), &view) != 0)
                return nullptr;
            tensors[count++].value = address(view);
        }
        if (!run(*entry, tensors, call.exec)) Py_RETURN_NONE;

        if (entry->single) return made[entry->results[0]].release().ptr();
        py::tuple results(entry->results.size());
        for (std::size_t i = 0; i < entry->results.size(); ++i)
            results[i] = made[entry->results[i]];
        return results.release().ptr();
    }

  private:
    struct Arguments {
        Key key;
        void* data[kMostTensors];  // of the tensors
        std::size_t tensors = 0;
        dlpack::Device device{0, 0};  // of the tensors; type 0 before the first
        Exec exec{0, 0, 0, Precision::ieee};
    };

    enum Kind : std::int64_t { kNone, kBool, kInt, kFloat, kString, kSequence, kTensor };

    static constexpr std::size_t kMostEntries = 1024;

    py::tuple types_;
    py::list guards_;
    py::object grad_enabled_, threads_, precision_;
    py::dict forward_ad_;
    py::str requires_grad_, is_neg_, current_level_;
    py::int_ no_level_;
    const dlpack::ExchangeAPI* exchange_;
    std::unordered_map<std::uint64_t, std::shared_ptr<const Entry>> entries_;

    static void* address(const dlpack::Tensor& tensor) {
        return static_cast<char*>(tensor.data) + tensor.byte_offset;
    }

    // Whether a new reference is something true; an error is none of ours and counts as true.
    static bool truth(PyObject* result) {
        const int value = result == nullptr ? -1 : PyObject_IsTrue(result);
        Py_XDECREF(result);
        if (value < 0) PyErr_Clear();
        return value != 0;
    }

    // What a function answers, a number that is not negative; -1 after an error.
    static std::int64_t number(const py::object& function) {
        const auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function.ptr()));
        return answer ? PyLong_AsLongLong(answer.ptr()) : -1;
    }

    // The other way to compute a call reports what is wrong with it.
    static bool refuse() {
        PyErr_Clear();
        return false;
    }

    bool read(PyObject* args, PyObject* kwargs, Arguments& call) const {
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(guards_.ptr()); ++i)
            if (truth(PyObject_CallNoArgs(PyList_GET_ITEM(guards_.ptr(), i)))) return false;
        // No forward-mode derivatives; small integers are one object each.
        if (PyDict_GetItemWithError(forward_ad_.ptr(), current_level_.ptr()) != no_level_.ptr())
            return refuse();
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i)
            if (!add(PyTuple_GET_ITEM(args, i), call)) return false;
        if (kwargs != nullptr) {
            PyObject *name, *value;
            for (Py_ssize_t i = 0; PyDict_Next(kwargs, &i, &name, &value);)
                if (!add_value(name, call.key) || !add(value, call)) return false;
        }
        return add_exec(call) && !call.key.full;
    }

    bool add(PyObject* value, Arguments& call) const {
        const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
        const bool tensor =
            type == PyTuple_GET_ITEM(types_.ptr(), 0) || type == PyTuple_GET_ITEM(types_.ptr(), 1);
        return tensor ? add_tensor(value, call) : add_value(value, call.key);
    }

    static bool add_value(PyObject* value, Key& key) {
        if (value == Py_None) {
            key.put(kNone);
        } else if (PyBool_Check(value)) {
            key.put(kBool);
            key.put(value == Py_True);
        } else if (PyLong_CheckExact(value)) {
            int overflow = 0;
            key.put(kInt);
            key.put(PyLong_AsLongLongAndOverflow(value, &overflow));
            return overflow == 0;
        } else if (PyFloat_CheckExact(value)) {
            const double number = PyFloat_AS_DOUBLE(value);
            std::int64_t word;
            std::memcpy(&word, &number, sizeof word);
            key.put(kFloat);
            key.put(word);
        } else if (PyUnicode_CheckExact(value)) {
            Py_ssize_t size = 0;
            const char* text = PyUnicode_AsUTF8AndSize(value, &size);
            std::int64_t words[8] = {};
            if (text == nullptr || size > Py_ssize_t(sizeof words)) return refuse();
            std::memcpy(words, text, std::size_t(size));
            key.put(kString);
            key.put(size);
            key.put(words, std::size_t(size + 7) / 8);
        } else if (PyTuple_Check(value) || PyList_CheckExact(value)) {
            const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
            key.put(kSequence);
            key.put(size);
            for (Py_ssize_t i = 0; i < size; ++i)
                if (!add_value(PySequence_Fast_GET_ITEM(value, i), key)) return false;
        } else {
            return false;
        }
        return true;
    }

    bool add_tensor(PyObject* value, Arguments& call) const {
        if (call.tensors == kMostTensors) return false;
        if (truth(PyObject_GetAttr(value, requires_grad_.ptr())) &&
            truth(PyObject_CallNoArgs(grad_enabled_.ptr())))
            return false;
        if (truth(PyObject_CallMethodNoArgs(value, is_neg_.ptr()))) return false;
        dlpack::Tensor view;
        if (exchange_->dltensor_from_py_object_no_sync(value, &view) != 0) return refuse();
        if (view.data == nullptr) return false;
        if (call.device.device_type == 0) call.device = view.device;
        if (view.device.device_type != call.device.device_type ||
            view.device.device_id != call.device.device_id)
            return false;
        call.data[call.tensors++] = address(view);
        call.key.put(kTensor);
        call.key.put(view.ndim);
        call.key.put(view.dtype.code << 24 | view.dtype.bits << 16 | view.dtype.lanes);
        call.key.put(view.shape, std::size_t(view.ndim));
        call.key.put(view.strides, std::size_t(view.ndim));
        return true;
    }

    // Where and how to run.
    bool add_exec(Arguments& call) const {
        const auto [type, ordinal] = call.device;
        call.key.put(type);
        call.key.put(ordinal);
        if (type == dlpack::kCUDA) {
            void* stream = nullptr;
            if (exchange_->current_work_stream(type, ordinal, &stream) != 0) return refuse();
            const std::int64_t precision = number(precision_);
            call.exec = {ordinal, reinterpret_cast<std::int64_t>(stream), 0,
                         static_cast<Precision>(precision)};
            call.key.put(precision);
            return precision >= 0 || refuse();
        }
        if (type != dlpack::kCPU) return false;
        call.exec.threads = number(threads_);
        call.key.put(call.exec.threads);
        return call.exec.threads > 0 || refuse();
    }

    static bool run(const Entry& entry, const Address* tensors, const Exec& exec) {
        std::optional<py::gil_scoped_release> nogil;
        if (!entry.small) nogil.emplace();
        for (const Step& step : entry.steps) {
            step.call->run(tensors, exec);
            if (step.expected >= 0 && *tensors[step.expected].as<std::int64_t>() != -1)
                return false;
        }
        return true;
    }
};

}  // namespace zfcuda
