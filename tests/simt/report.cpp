// Errors, and the places in the source that they name.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include "runtime.h"

namespace simt {

Settings settings;

int architecture() { return settings.arch; }
int processors() { return settings.processors; }

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

// What addr2line says of a code address: pairs of lines, function and "path:line", the innermost of
// inlined functions first.
std::vector<std::string> look_up(const void* pc) {
    const std::string command =
        text("addr2line -Cfie '%s' %#x 2>/dev/null", module_path(), code_offset(pc));
    std::vector<std::string> lines;
    if (FILE* pipe = popen(command.c_str(), "r")) {
        char* line = nullptr;  // names of templates know no bounds
        std::size_t room = 0;
        while (getline(&line, &room, pipe) >= 0) {
            lines.emplace_back(line);
            lines.back().erase(lines.back().find_last_not_of('\n') + 1);
        }
        std::free(line);
        pclose(pipe);
    }
    return lines;
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

const char* const code_base = load_address();

// A return address is one past the call: look up the byte before.
std::string where(const void* pc) {
    const std::vector<std::string> lines = look_up(static_cast<const char*>(pc) - 1);
    std::string places;
    for (std::size_t i = 1; i < lines.size(); i += 2) {
        const std::string place = lines[i].substr(lines[i].rfind('/') + 1);
        places += (i > 1 ? ", from " : "") + place.substr(0, place.find(" ("));
    }
    return places;
}
std::string where(std::uint32_t offset) { return where(code_base + offset); }
std::string function_at(const void* start) {
    const std::vector<std::string> lines = look_up(start);
    return lines.empty() ? "?" : lines[0];
}

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
