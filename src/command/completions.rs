//! `pipe completions`.

use clap::CommandFactory;
use clap_complete::Shell;

use super::Cli;
use crate::{display, exit_code};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "For bash: `pipe completions bash > ~/.local/share/bash-completion/completions/pipe`"
)]
pub(super) struct Args {
    /// Shell
    shell: Shell,
}

pub(super) fn run(args: &Args) -> u8 {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "pipe", &mut script);
    display::out(&String::from_utf8_lossy(&script));
    exit_code::OK
}
