// os_log, which MLX's preamble names; nothing is printed.
#pragma once

namespace metal {
struct os_log {
  constexpr os_log(const char*, const char*) {}
  template <class... Values>
  void log_debug(const char*, Values...) const {}
  template <class... Values>
  void log_info(const char*, Values...) const {}
};
}  // namespace metal
