// The functions that -fsanitize=array-bounds,shift,... makes a kernel call when it does something C++ leaves undefined.
// Clang's own runtime for them is not linked: these put the finding beside the others.
#include <string>

#include "findings.h"

namespace {
// The beginning of every record that clang passes: the place in the source.
struct Record {
  const char* file;
  uint32_t line;
  uint32_t column;
};

void undefined(const void* record, const char* message) {
  const auto* place = static_cast<const Record*>(record);
  report({"undefined behavior", message, Place{0, place->file, static_cast<int>(place->line)}},
         [&] { return std::string(message); });
}
}  // namespace

using Value = uintptr_t;

extern "C" {
void __ubsan_handle_out_of_bounds(void* r, Value) { undefined(r, "array index out of bounds"); }
void __ubsan_handle_shift_out_of_bounds(void* r, Value, Value) {
  undefined(r, "shift by a negative amount, by the type's width or more, or of a negative value");
}
void __ubsan_handle_divrem_overflow(void* r, Value, Value) { undefined(r, "integer division by zero or overflow"); }
void __ubsan_handle_add_overflow(void* r, Value, Value) { undefined(r, "signed integer overflow in an addition"); }
void __ubsan_handle_sub_overflow(void* r, Value, Value) { undefined(r, "signed integer overflow in a subtraction"); }
void __ubsan_handle_mul_overflow(void* r, Value, Value) { undefined(r, "signed integer overflow in a multiplication"); }
void __ubsan_handle_negate_overflow(void* r, Value) { undefined(r, "signed integer overflow in a negation"); }
void __ubsan_handle_float_cast_overflow(void* r, Value) {
  undefined(r, "a float that is NaN or too large is converted to an integer");
}
void __ubsan_handle_implicit_conversion(void* r, Value, Value) {
  undefined(r, "an integer loses bits in an implicit conversion");
}
}
