// The emulator's own code as one unit: it is compiled anew for each module, and what every access
// calls can be inlined.
#include "async.cpp"
#include "banks.cpp"
#include "control.cpp"
#include "fibers.cpp"
#include "global.cpp"
#include "hooks.cpp"
#include "report.cpp"
#include "scheduler.cpp"
#include "shadow.cpp"
#include "shared.cpp"
#include "validate.cpp"
#include "warp.cpp"
