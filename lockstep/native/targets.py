"""What the CPU that kernels are compiled for offers (not the host): an instruction that it lacks aborts the process."""

from lockstep.native.host import UnfitMachine
from lockstep.native.kernel import target

# LLVM's names of CPUs, or their beginnings, for a target that is named without its features
SAPPHIRE_RAPIDS_ON = ("sapphirerapids", "emeraldrapids", "graniterapids")
ALDER_LAKE_ON = ("alderlake", "raptorlake", "meteorlake", "arrowlake", "lunarlake", "pantherlake")
ICE_LAKES = ("icelake", "tigerlake", "rocketlake")
AVX512_VNNI_CPUS = ("znver4", "znver5", "cascadelake", "cooperlake", *ICE_LAKES, *SAPPHIRE_RAPIDS_ON)
AVX512_CPUS = (*AVX512_VNNI_CPUS, "skylake-avx512", "skx", "cannonlake", "x86-64-v4")
AVX512_BF16_CPUS = ("znver4", "znver5", "cooperlake", *SAPPHIRE_RAPIDS_ON)
AVX_VNNI_CPUS = (*ALDER_LAKE_ON, "sierraforest", "grandridge", "clearwaterforest", "gracemont")
OLDER_AVX2_CPUS = ("haswell", "core-avx2", "broadwell", "skylake", "znver", "bdver4", "x86-64-v3")
AVX2_CPUS = (*AVX512_CPUS, *AVX_VNNI_CPUS, *OLDER_AVX2_CPUS)
# CPUs with a first-level data cache of 48 KB; the others have 32 KB
LARGE_FIRST_CACHE_CPUS = ("znver5", *ICE_LAKES, *SAPPHIRE_RAPIDS_ON, *ALDER_LAKE_ON)
APPLE_CPUS = ("apple-m", "apple-a13", "apple-a14", "apple-a15", "apple-a16", "apple-a17", "apple-a18")
CORTEX_CPUS = tuple(f"cortex-{name}" for name in "a55 a65 a75 a76 a77 a78 a510 a520 a710 a715 a720 a725 x".split())
SERVER_CPUS = ("neoverse", "ampere1", "grace", "olympus", "gb10", "fujitsu-monaka", "tsv110", "saphira", "oryon")
DOTPROD_CPUS = (*SERVER_CPUS, *APPLE_CPUS, *CORTEX_CPUS, "exynos-m4", "exynos-m5")


def _has(feature, cpus, magic=None):
    triple, cpu, features = magic or target()
    listed = features.split(",") if features else []
    if f"+{feature}" in listed:
        return True
    if listed and (f"-{feature}" in listed or not triple.startswith(("aarch64", "arm64"))):
        return False
    return cpu.startswith(cpus)  # of an ARM host on Linux, LLVM lists some features only


def int_dot(magic=None):
    """What makes dots of four bytes: "avx512_vnni", "avx_vnni", "avx2", "sdot", or "generic" on other architectures.

    Raises UnfitMachine on an x86 target without AVX2.
    """
    triple, cpu, _ = magic or target()
    if triple.startswith(("aarch64", "arm64")):
        return "sdot" if _has("dotprod", DOTPROD_CPUS, magic) else "generic"
    if not triple.startswith(("x86_64", "i686", "i386")):
        return "generic"
    if not _has("avx2", AVX2_CPUS, magic):
        raise UnfitMachine(f"Lockstep needs a CPU with AVX2 (any since 2015); {cpu or 'unnamed'!r} has none")
    if _has("avx512vnni", AVX512_VNNI_CPUS, magic):
        return "avx512_vnni"
    return "avx_vnni" if _has("avxvnni", AVX_VNNI_CPUS, magic) else "avx2"


def bf16_dot(magic=None):
    """Whether the target has VDPBF16PS."""
    return _has("avx512bf16", AVX512_BF16_CPUS, magic)


def wide_registers(magic=None):
    """Whether a register holds sixteen lanes (and there are 32 of them)."""
    return _has("avx512f", AVX512_CPUS, magic)


def prefetch_locality(magic=None):
    """LLVM's number of the cache that weights and keys are prefetched into: 3, the first level, where it has room for
    more than the data at hand, else 2, the second (see studies/15-one-stream.md)."""
    return 3 if (magic or target())[1].startswith(LARGE_FIRST_CACHE_CPUS) else 2


def unsigned_weights(magic=None):
    """Whether int8 weights are packed as code + 128, for a dot that takes unsigned by signed bytes."""
    return int_dot(magic) in ("avx512_vnni", "avx_vnni")


def name(magic=None):
    """A short name of the target's dots, on which packed weights depend: they are kept under this name."""
    return f"{int_dot(magic)}{'-bf16' if bf16_dot(magic) else ''}"
