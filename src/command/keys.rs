//! `pipe keys`.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{CommandError, Context};
use crate::{display, exit_code, remote};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Write a new private key, for `sign`, and print its public half, for `trusted_keys`
    New {
        /// File that does not exist yet; keep it out of git
        file: PathBuf,
    },
    /// Print the public half of a private key
    Show {
        /// File that `keys new` wrote
        file: PathBuf,
    },
}

pub(super) fn run(context: &Context<'_>, args: &Args) -> Result<u8, CommandError> {
    let public = match &args.command {
        Command::New { file } => {
            let key = remote::new_key()?;
            write(file, &key.private).map_err(|e| {
                CommandError::usage(
                    format!("could not write {}: {e}", file.display()),
                    "name a file that does not exist, in a folder that does",
                )
            })?;
            key.public
        }
        Command::Show { file } => {
            let text = std::fs::read_to_string(file).map_err(|e| {
                CommandError::usage(
                    format!("could not read {}: {e}", file.display()),
                    "`pipe keys new FILE` makes a key",
                )
            })?;
            remote::public_key(&text)?
        }
    };
    if context.shared.json {
        display::out(&json!({"public_key": public.to_string()}).to_string());
    } else {
        display::out(&public.to_string());
    }
    Ok(exit_code::OK)
}

/// Readable by its owner alone, and never over another file.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let mut options = std::fs::File::options();
    let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
