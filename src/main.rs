//! `pipe`: the only place that knows both the engine and the stage kinds.

use std::process::ExitCode;

fn main() -> ExitCode {
    pipe::command::main(&[
        #[cfg(feature = "stages")]
        &stage_download::Download,
        #[cfg(feature = "stages")]
        &stage_subsample::Subsample,
        #[cfg(feature = "stages")]
        &stage_template::Template,
        #[cfg(feature = "stages")]
        &stage_tokenize_pack::TokenizePack,
        #[cfg(feature = "stages")]
        &stage_evaluate::Evaluate,
        #[cfg(feature = "stages")]
        &stage_export::Export,
        #[cfg(feature = "stages")]
        &stage_train::Train,
        #[cfg(feature = "stages")]
        &stage_report::Report,
        &stage_select::Select,
        &stage_command::Command,
    ])
}
