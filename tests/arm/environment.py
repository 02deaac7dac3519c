"""An emulated ARM machine in a folder: QEMU, Debian's Python for it and the locked packages, without root; beside it
the same Python with the same Numba for this machine, to compile for it.

    python -m tests.arm.environment FOLDER

Everything is downloaded by the ordinary clients, which check it: apt, with a state and a list of sources of its own,
from the mirror that this machine's Debian uses, and pip, with the hashes of the lock file. Packages are unpacked, never
installed. FOLDER/python then runs Python as on ARM; QEMU_CPU chooses another CPU than CPU. FOLDER/compiler runs the
Python of this machine.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements-test.lock"
SUITE, PYTHON = "trixie", "3.13"  # Debian 13, whose QEMU 10 knows FEAT_AFP and shows the emulated CPU to the guest
CPU = "neoverse-n1"
PYTHON_PACKAGES = [f"python{PYTHON}", "libstdc++6"]
PACKAGES = {"amd64": ["qemu-user", *PYTHON_PACKAGES], "arm64": PYTHON_PACKAGES}  # by Debian's names of architectures
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}  # Python's names
COMPILING = ("llvmlite", "ml-dtypes", "numba", "numpy")  # what kernels import
GLIBCS = ("manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, 42)))
APT = """\
Dir::State "{apt}";
Dir::State::status "{apt}/status";
Dir::Cache "{apt}/cache";
Dir::Etc::sourcelist "{apt}/sources.list";
Dir::Etc::sourceparts "-";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "";
Debug::NoLocking "true";
"""
# Without binfmt_misc Linux cannot start an ARM program: what starts a Python again starts this.
STARTER = """\
#!/bin/sh
export QEMU_LD_PREFIX="{arm64}" QEMU_CPU="${{QEMU_CPU:-{cpu}}}" PYTHONPATH="{repository}:{site}"
exec "{amd64}/usr/bin/qemu-aarch64" "{arm64}/usr/bin/python{version}" "$@"
"""
# A newer Debian's program runs with the libraries that it was made for.
COMPILER = """\
#!/bin/sh
export PYTHONHOME="{amd64}/usr" PYTHONPATH="{repository}:{site}"
exec "{amd64}/usr/lib64/ld-linux-x86-64.so.2" --library-path "{amd64}/usr/lib/x86_64-linux-gnu" \\
    "{amd64}/usr/bin/python{version}" "$@"
"""


def mirror() -> str:
    """The address of the archive that this machine's apt uses. SystemExit where it is no Debian."""
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise SystemExit("an emulated ARM machine is made of Debian's packages: this system has no apt-get and dpkg")
    printed = _run("apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)").split("\n")
    found = [line.split()[0] for line in printed if line.split()[1:] == ["Debian", "Debian"]]
    if not found:
        raise SystemExit("an emulated ARM machine is made of Debian's packages: apt-get knows no archive of Debian")
    return found[0]


def download(folder: Path, address: str, architecture: str) -> None:
    """Unpacks the packages of an architecture, and what they depend on, into FOLDER/ARCHITECTURE."""
    apt = folder / "apt" / architecture
    for part in ("lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(
        f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {address} {SUITE} main\n"
    )
    (apt / "apt.conf").write_text(APT.format(apt=apt, architecture=architecture))
    environment = os.environ | {"APT_CONFIG": str(apt / "apt.conf")}
    _run("apt-get", "-qq", "update", env=environment)
    options = ("-qq", "-y", "--no-install-recommends", "--download-only")
    _run("apt-get", *options, "install", *PACKAGES[architecture], env=environment)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        _run("dpkg-deb", "-x", str(package), str(folder / architecture))
    (folder / architecture / "lib").symlink_to("usr/lib")  # which packages take for granted


def install_packages(folder: Path, architecture: str, lock: Path) -> Path:
    """Puts the wheels of a lock file for an architecture into a folder below FOLDER/site. Returns this folder."""
    site = folder / "site" / architecture
    platforms = [word for glibc in GLIBCS for word in ("--platform", f"{glibc}_{MACHINES[architecture]}")]
    abis = [word for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)]
    options = ["-qq", "--disable-pip-version-check", "--no-compile", "--no-deps", "--require-hashes"]
    wheels = ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON, *abis, *platforms]
    _run(sys.executable, "-m", "pip", "install", *options, *wheels, "--target", str(site), "-r", str(lock))
    return site


def make_starters(folder: Path) -> None:
    """Makes FOLDER/compiler and FOLDER/python, with their packages; the latter last, since make looks for it."""
    some = folder / "compiler.lock"
    each = re.split(r"\n(?=\S)", LOCK.read_text())  # a package, with its hashes on lines that are indented
    some.write_text("\n".join(package for package in each if package.split("==")[0] in COMPILING))
    made = {"compiler": (COMPILER, "amd64", some), "python": (STARTER, "arm64", LOCK)}
    names = dict(amd64=folder / "amd64", arm64=folder / "arm64", repository=ROOT, cpu=CPU, version=PYTHON)
    for name, (text, architecture, lock) in made.items():
        site = install_packages(folder, architecture, lock)
        # how Python is started again
        (site / "sitecustomize.py").write_text(f"import sys\n\nsys.executable = {str(folder / name)!r}\n")
        (folder / name).write_text(text.format(**names, site=site))
        (folder / name).chmod(0o755)


def make(folder: Path) -> None:
    """Makes the machine; where one is there, it is made anew, and keeps the kernels of its cache."""
    for part in ("apt", "amd64", "arm64", "site"):
        shutil.rmtree(folder / part, ignore_errors=True)
    address = mirror()
    for architecture, packages in PACKAGES.items():
        print(f"downloading and unpacking {', '.join(packages)} for {architecture}", flush=True)
        download(folder, address, architecture)
    print("downloading and unpacking Python's packages for both", flush=True)
    shutil.rmtree(folder / "apt")
    for other in (folder / "amd64/usr/bin").glob("qemu-*"):
        if other.name != "qemu-aarch64":
            other.unlink()
    make_starters(folder)


def _run(*command: str, env: dict[str, str] | None = None) -> str:
    """The output of a command. SystemExit with what it said where it fails."""
    made = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if made.returncode:
        raise SystemExit(f"{' '.join(command[:4])} failed: {(made.stderr or made.stdout).strip()[-2000:]}")
    return made.stdout


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
