"""What is given away: the source distribution with all that its tests need, and the wheel, as a user installs it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULE_TESTS = ["tests/rule/test_credit_golden.py", "tests/rule/test_credit_laws.py", "tests/rule/test_bad_input.py"]


def run(*command: object, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def pip_install(python: Path, *arguments: object, cwd: Path) -> None:
    """Skips the test where the index cannot be reached; in CI that is a failure."""
    try:
        run(python, "-m", "pip", "install", "--quiet", "--no-compile", *arguments, cwd=cwd)
    except AssertionError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"pip could not install {arguments[-1]}: {str(error)[-300:]}")


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    try:
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    except AssertionError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the distributions cannot be built: {str(error)[-300:]}")
    return folder


@pytest.fixture
def fresh(tmp_path):
    """The interpreter of an environment that holds nothing."""
    run(sys.executable, "-m", "venv", tmp_path / "fresh", cwd=tmp_path)
    return tmp_path / "fresh" / "bin" / "python"


@pytest.mark.long
def test_the_sdist_s_tests_of_the_rule_pass_in_a_fresh_environment(dist, fresh, tmp_path):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    constrained = ("--constraint", unpacked / "constraints.txt")
    # Alone and first, so that the build that the index serves under this name is the one.
    pip_install(fresh, *constrained, "torch", cwd=tmp_path)
    pip_install(fresh, *constrained, archive, "pytest", "pytest-timeout", "hypothesis", cwd=tmp_path)
    said = run(fresh, "-m", "pytest", "-q", "--noconftest", *RULE_TESTS, cwd=unpacked)
    assert " passed" in said
    where = run(fresh, "-c", "import verl_tapo; print(verl_tapo.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "fresh")


@pytest.mark.long
def test_the_sdist_holds_what_git_does(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    try:
        tracked = run("git", "ls-files", cwd=ROOT).split()
    except (AssertionError, FileNotFoundError):
        pytest.skip("not a git checkout")
    assert [name for name in tracked if name not in held and not name.startswith((".ci/", ".gitignore"))] == []


@pytest.mark.long
def test_the_wheel_serves_command_line_audit_and_hydra(dist, fresh, tmp_path):
    """Not editable, from another folder. Its dependencies are this environment's."""
    (wheel,) = dist.glob("*.whl")
    pip_install(fresh, "--no-deps", wheel, cwd=tmp_path)
    (site,) = (tmp_path / "fresh" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(fresh, "-c", "import verl_tapo.conf; print(verl_tapo.conf.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    command = fresh.parent / "verl-tapo"
    assert "tapo" in run(command, "doctor", cwd=tmp_path)
    audited = run(
        command, "audit", ROOT / "examples" / "audit" / "data", "--html", tmp_path / "report.html", cwd=tmp_path
    )
    assert "calls" in audited
    assert "<script" in (tmp_path / "report.html").read_text(encoding="utf-8")
    composed = run(fresh, "-m", "verl.trainer.main_ppo", "--config-name", "tapo", "--cfg", "job", cwd=tmp_path)
    assert "adv_estimator: tapo" in composed
    assert "alpha_min: 0.2" in composed
    where = run(fresh, "-c", "import search_backends; print(search_backends.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    assert "purge" in run(fresh, "-m", "search_backends.cache", "--help", cwd=tmp_path)


def test_what_an_index_shows_has_no_relative_links():
    text = (ROOT / "docs" / "pypi.md").read_text(encoding="utf-8")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links
    assert all(link.startswith("https://") for link in links)
    assert "long_description = file: docs/pypi.md" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("schema", "file"),
    [("vendor.github-workflows", ".github/workflows/tests.yml"), ("vendor.citation-file-format", "CITATION.cff")],
)
def test_files_for_others_services_follow_their_schemas(schema, file):
    if not (ROOT / file).exists():
        pytest.skip("not a checkout")
    run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, ROOT / file, cwd=ROOT)


def test_workflows_run_commands_that_the_makefile_has():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    targets = {
        line.split(":")[0] for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if ":" in line
    }
    used = {part.split()[0] for part in workflow.split("run: make ")[1:]}
    assert used
    assert used <= targets


def test_one_version_everywhere():
    version = run(sys.executable, "-c", "import verl_tapo; print(verl_tapo.__version__)", cwd=ROOT).strip()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert version in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_are_what_is_installed():
    """All that is pinned and installed here is of that version, unless this is an environment of the newest."""
    if "latest" in Path(sys.prefix).name:
        pytest.skip("made with LATEST=1")
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len(pins) > 150
    different = []
    for pin in pins:
        if pin.marker is None or pin.marker.evaluate():
            try:
                found = version(pin.name)
            except PackageNotFoundError:  # of a CUDA build of torch, for example
                continue
            if not pin.specifier.contains(found, prereleases=True):
                different.append(f"{pin}, but {found} is installed")
    assert different == []
