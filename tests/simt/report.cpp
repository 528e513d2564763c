// Errors, and the places in the source that they name.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include "runtime.h"

namespace simt {

Settings settings;

namespace {

// Where this module is loaded; code addresses are kept as 32-bit offsets from here.
const char* load_address() {
    Dl_info info;
    return dladdr(reinterpret_cast<const void*>(&load_address), &info)
               ? static_cast<const char*>(info.dli_fbase)
               : nullptr;
}

const char* module_path() {
    Dl_info info;
    return dladdr(reinterpret_cast<const void*>(&load_address), &info) ? info.dli_fname : "";
}

// addr2line's first two lines: the function, and "file:line".
std::pair<std::string, std::string> look_up(const void* pc) {
    const std::string command =
        text("addr2line -Cfe '%s' %#x 2>/dev/null", module_path(), code_offset(pc));
    std::string lines[2] = {"?", "?"};
    if (FILE* pipe = popen(command.c_str(), "r")) {
        char buffer[4096];
        for (std::string& line : lines)
            if (std::fgets(buffer, sizeof buffer, pipe)) {
                line = buffer;
                line.erase(line.find_last_not_of('\n') + 1);
            }
        pclose(pipe);
    }
    return {lines[0], lines[1].substr(0, lines[1].find(" ("))};
}

}  // namespace

std::string text(const char* format, va_list arguments) {
    char buffer[2048];
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    return buffer;
}

std::string text(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string result = text(format, arguments);
    va_end(arguments);
    return result;
}

std::uint32_t code_offset(const void* pc) {
    static const char* const base = load_address();
    return std::uint32_t(static_cast<const char*>(pc) - base);
}

// A return address is one past the call: look up the byte before.
std::string where(const void* pc) { return look_up(static_cast<const char*>(pc) - 1).second; }
std::string where(std::uint32_t offset) { return where(load_address() + offset); }
std::string function_at(const void* start) { return look_up(start).first; }

void fail_at(const void* pc, const char* kind, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::string error = std::string(kind) + ": " + text(format, arguments);
    va_end(arguments);
    if (pc) error += "\n  at " + where(pc);
    stop(error);
}

void fail(const char* kind, const char* message) { fail_at(nullptr, kind, "%s", message); }

}  // namespace simt
