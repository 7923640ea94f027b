"""What compilers make of the kernels, read without the chips: code, registers, spills, schedules."""
