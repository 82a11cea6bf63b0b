"""What setup.cfg cannot say: packages from several source roots, and the compiled loops.

The loops are optional: without a compiler the library runs on PyTorch alone.
"""

from setuptools import Extension, find_packages, setup

SOURCE_ROOTS = {".": ["dare_adapters", "dare_adapters.*"], "integrations": ["*"], "eval": ["*"]}

HEADERS = [
    f"dare_adapters/_{name}.h"
    for name in ("add", "codes", "difference", "elect", "floats", "strip", "support")
]
# No fused multiply-add: results are those of PyTorch, bit for bit. Comparisons with NaN raise no
# flag that anybody reads, so that loops with conditions in them become vectors.
FLAGS = ["-O3", "-ffp-contract=off", "-fno-trapping-math"]

setup(
    packages=[
        package
        for root, include in SOURCE_ROOTS.items()
        for package in find_packages(root, include=include)
    ],
    ext_modules=[
        Extension(
            "dare_adapters._rows",
            [f"dare_adapters/_{name}.c" for name in ("rows", "finite", "merge", "quantise")],
            extra_compile_args=FLAGS,
            depends=HEADERS,
            optional=True,
        ),
        Extension(
            "dare_adapters._selection",
            ["dare_adapters/_selection.c"],
            extra_compile_args=FLAGS,
            depends=HEADERS,
            optional=True,
        ),
        Extension(
            "dare_adapters.combine._loops",
            [f"dare_adapters/combine/_{name}.c" for name in ("magprune", "survivors")],
            include_dirs=["dare_adapters"],
            extra_compile_args=FLAGS,
            depends=HEADERS,
            optional=True,
        ),
        Extension(
            "dare_adapters.kernels._product",
            ["dare_adapters/kernels/_product.c"],
            include_dirs=["dare_adapters"],
            # Its sums have no other to equal bit for bit.
            extra_compile_args=["-O3", "-ffp-contract=fast", "-pthread", "-Wno-psabi"],
            depends=HEADERS,
            optional=True,
        ),
    ],
)
