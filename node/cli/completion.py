"""`tapestry completion`: what a shell needs to complete commands and flags."""

from __future__ import annotations

import click

from tapestry.node.cli.options import examples


@click.command(
    epilog=examples(
        'eval "$(tapestry completion bash)"        # in ~/.bashrc',
        'eval "$(tapestry completion zsh)"         # in ~/.zshrc',
        "tapestry completion fish > ~/.config/fish/completions/tapestry.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete tapestry's commands and flags."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = ctx.find_root()
    click.echo(kind(root.command, {}, "tapestry", "_TAPESTRY_COMPLETE").source())
