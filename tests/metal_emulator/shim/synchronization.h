// Barriers and threadgroup variables: calls into the runtime.
#pragma once

// As a default argument it gives the caller's place.
#define MSL_HERE \
  MslSite { __builtin_FILE(), __builtin_LINE(), __builtin_COLUMN(), 0 }

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }

inline void threadgroup_barrier(mem_flags flags, MslSite site = MSL_HERE) { msl_threadgroup_barrier((int)flags, site); }
inline void simdgroup_barrier(mem_flags flags, MslSite site = MSL_HERE) { msl_simdgroup_barrier((int)flags, site); }
}  // namespace metal

namespace msl {
// The storage of `threadgroup T name[n]`, the same for all threads of a threadgroup.
template <class Array>
inline Array& threadgroup_variable(const char* name, int id) {
  using Element = std::remove_all_extents_t<Array>;
  constexpr size_t granule = std::is_class_v<Element> ? alignof(Element)
                             : Shape<Element>::size   ? sizeof(typename Shape<Element>::element)
                                                      : sizeof(Element);
  return *(Array*)msl_threadgroup_variable(name, id, sizeof(Array), granule);
}
}  // namespace msl
