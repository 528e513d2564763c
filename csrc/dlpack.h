// The part of DLPack's C exchange table (version 1) that calls read tensors by: what
// `Tensor.__dlpack_c_exchange_api__` points at, with the field names of the standard
// (https://github.com/dmlc/dlpack). A stable ABI: nothing of torch is needed to compile it.
#pragma once

#include <cstdint>

namespace zfcuda::dlpack {

constexpr std::int32_t kCPU = 1, kCUDA = 2;

struct Version {
    std::uint32_t major, minor;
};

struct Device {
    std::int32_t device_type, device_id;
};

struct DataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

struct ExchangeAPI {
    Version version;
    void* prev_api;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object_no_sync;
    void* managed_tensor_to_py_object_no_sync;
    int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
    int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

}  // namespace zfcuda::dlpack
