"""The compiled loops, which are optional: without a compiler the library runs on PyTorch alone.

Everything else is in setup.cfg.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "dare_adapters._rows",
            ["dare_adapters/_rows.c"],
            # No fused multiply-add: results are those of PyTorch, bit for bit.
            extra_compile_args=["-O3", "-ffp-contract=off"],
            depends=["dare_adapters/_floats.h"],
            optional=True,
        ),
        Extension(
            "dare_adapters.kernels._product",
            ["dare_adapters/kernels/_product.c"],
            include_dirs=["dare_adapters"],
            depends=["dare_adapters/_floats.h"],
            # Its sums have no other to equal bit for bit.
            extra_compile_args=["-O3", "-ffp-contract=fast"],
            optional=True,
        ),
    ]
)
