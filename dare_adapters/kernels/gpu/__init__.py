"""Products, and changes in place, as Triton kernels; what imports Triton is imported when used.

`TRITON_INTERPRET=1` in the environment, set before Triton is imported, runs the same kernels on
the processor, one program after another: that is how they are tested where there is no GPU.
"""
