// How the emulator's own tests call a kernel through ctypes: the error's message, or null.
#pragma once

#include <array>
#include <exception>
#include <string>
#include <utility>

#define ZF_EXPORT extern "C" __attribute__((visibility("default")))

template <typename Function>
const char* message_of(Function&& function) {
    static std::string message;
    try {
        function();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

// Calls function(integral_constant<int, value>) for a value below Count.
template <int Count, typename Function>
void with_constant(int value, Function&& function) {
    if constexpr (Count > 0) {
        if (value == Count - 1)
            function(std::integral_constant<int, Count - 1>());
        else
            with_constant<Count - 1>(value, function);
    }
}
