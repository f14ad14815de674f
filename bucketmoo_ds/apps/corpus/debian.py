"""Files out of Debian packages, through the system's own apt sources and keys, without root and without installing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bucketmoo_ds.apps.corpus.fetching import CorpusUnavailable, require_programs, run_command

# Seconds. A cold `apt-get update` moves about 10 MB, a package a few.
_UPDATE_TIMEOUT = 300
_DOWNLOAD_TIMEOUT = 300
_UNPACK_TIMEOUT = 120


def unpack(packages: Sequence[str], folder: Path) -> dict[str, str]:
    """Downloads packages and unpacks all of them into `folder`; lists and caches go into a folder "apt" beside it.

    Returns:
        The version of each package.

    Raises:
        CorpusUnavailable: apt or dpkg-deb is missing, fails or takes too long.
    """
    require_programs("apt-get", "dpkg-deb")
    work = folder.with_name("apt")
    for part in ("lists/partial", "archives/partial", "state"):
        (work / part).mkdir(parents=True)
    config = work / "apt.conf"
    config.write_text(_APT_CONFIG.format(work=work), encoding="utf-8")
    apt = ["apt-get", "-c", str(config), "--quiet", "--yes"]
    env = {"LC_ALL": "C.UTF-8"}
    update_problem = ""
    try:
        run_command("apt-get update", [*apt, "update"], _UPDATE_TIMEOUT, env=env)
    except CorpusUnavailable as problem:
        # A third-party source that is down fails the update; the package may be there all the same.
        update_problem = f"; before that {problem}"
    names = ", ".join(packages)
    try:
        run_command("apt-get download", [*apt, "download", *packages], _DOWNLOAD_TIMEOUT, cwd=work, env=env)
    except CorpusUnavailable as problem:
        raise CorpusUnavailable(f"{names}: {problem}{update_problem}") from problem
    versions = {}
    for package in packages:
        archives = sorted(work.glob(f"{package}_*.deb"))
        if len(archives) != 1:
            raise CorpusUnavailable(f"{package}: apt-get download left {[a.name for a in archives]}, expected one .deb")
        run_command("dpkg-deb -x", ["dpkg-deb", "-x", str(archives[0]), str(folder)], _UNPACK_TIMEOUT)
        told = run_command("dpkg-deb -f", ["dpkg-deb", "-f", str(archives[0]), "Version"], _UNPACK_TIMEOUT)
        versions[package] = told.strip()
    return versions


# Dropping to the user _apt, as apt does under root, would lock it out of a cache below /root. The hooks of the system
# (clean-up, refresh of software centres) write to the system, so they are cleared.
_APT_CONFIG = """\
Dir::State "{work}/state";
Dir::State::lists "{work}/lists";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "{work}";
Dir::Cache::archives "{work}/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Log "{work}";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
APT::Update::Error-Mode "any";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
"""
