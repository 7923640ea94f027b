"""Reports of compilers about the kernels: code, registers, spills and schedules. No chip is needed."""
