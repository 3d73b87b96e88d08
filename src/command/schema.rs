//! `pipe schema`.

use super::{Context, kinds};
use crate::{display, exit_code, schema};

#[derive(Debug, clap::Args)]
#[command(after_help = "In an editor with a YAML language server, write the schema to a file and \
    start the pipeline with `# yaml-language-server: $schema=FILE`.")]
pub(super) struct Args {}

pub(super) fn run(context: &Context<'_>, _args: &Args) -> u8 {
    let schema = schema::of(context.kinds, kinds::example);
    display::out(&serde_json::to_string_pretty(&schema).unwrap_or_default());
    exit_code::OK
}
