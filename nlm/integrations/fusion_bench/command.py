"""``nlm-fusion-bench``: the host's command line, which knows nlm's methods and starts sooner."""

import sys

from nlm.integrations import _end, _start, fusion_bench


def main() -> None:
    """Runs the command line; without the host, or with another version of it, one sentence.

    nlm's configurations are found without ``--config-dir``; one that is given is used in its place.
    """
    try:
        fusion_bench.check_host()
    except ImportError as error:
        sys.exit(str(error))
    with _start.importing():
        from fusion_bench.scripts.cli import _hydra_main as host

        import nlm.integrations.fusion_bench.merging  # noqa: F401
    if not any(each.partition("=")[0] in ("--config-dir", "-cd") for each in sys.argv[1:]):
        sys.argv[1:1] = ["--config-dir", str(fusion_bench.CONFIG_DIR)]
    with _end.ending():
        host()


if __name__ == "__main__":
    main()
