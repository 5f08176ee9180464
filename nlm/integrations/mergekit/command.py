"""``nlm-mergekit-yaml``: the host's command line, its methods on nlm, and models aligned first."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nlm.integrations import _end, _start, mergekit


def main() -> None:
    """Runs the command line; without the host, or with another version of it, one sentence."""
    try:
        mergekit.check_host()
    except ImportError as error:
        sys.exit(str(error))
    with _start.importing("peft"):  # which the host uses for LoRA adapters alone
        run = command()
        mergekit.register()
    with _end.ending():
        run()


def command() -> Any:
    """The host's click command with two options more."""
    import click
    from mergekit.scripts.run_yaml import main as host

    from nlm.integrations.mergekit.writer import streamed

    def run(align: tuple[str, ...], spec: str | None, **options: Any) -> None:
        mergekit.register()
        with ExitStack() as stack:
            stack.enter_context(mergekit.use_as_default())
            stack.enter_context(streamed())
            try:
                alignments = dict(_pair(each) for each in align)
                _check_models(alignments, Path(options["config_file"]))
                stack.enter_context(mergekit.aligned_loaders(alignments, spec))
            except (ValueError, OSError) as error:
                raise click.ClickException(str(error)) from error
            host.callback(**options)

    more = [
        click.Option(
            ["--align"],
            multiple=True,
            metavar="MODEL=FILE",
            help="Read this model, as the configuration names it, aligned by what nlm align wrote; "
            "repeat it for several",
        ),
        click.Option(
            ["--spec"],
            metavar="FILE",
            help="The specification of the alignments: JSON, YAML, or a shipped name; default: "
            "found in each model's configuration",
        ),
    ]
    return type(host)("nlm-mergekit-yaml", params=[*host.params, *more], callback=run)


def _pair(text: str) -> tuple[str, str]:
    model, equals, file = text.rpartition("=")
    if not equals or not model or not file:
        raise ValueError(f"nlm-mergekit-yaml: --align is MODEL=FILE, got {text!r}")
    return model, file


def _check_models(alignments: dict[str, str], configuration: Path) -> None:
    """The models to align are those of the configuration: said before any work."""
    import yaml
    from mergekit.config import MergeConfiguration

    if not alignments:
        return
    read = MergeConfiguration.model_validate(yaml.safe_load(configuration.read_text("utf-8")))
    names = [str(model) for model in read.referenced_models()]
    if missing := [model for model in alignments if model not in names]:
        raise ValueError(
            f"nlm-mergekit-yaml: --align names models of the configuration "
            f"({', '.join(names)}), got {missing[0]!r}"
        )


if __name__ == "__main__":
    main()
