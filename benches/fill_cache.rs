//! Publishes a record for every stage of a pipeline without running any: each output is one small
//! file. For benches of plans over thousands of stages, which would take hours to run.
//!
//!     fill_cache PIPELINE.yaml CACHE

#[path = "../tests/cli/filled.rs"]
mod filled;

use std::error::Error;
use std::path::Path;

use contract::StageKind;
use pipe::pipeline::{Kinds, Overrides};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, file, root] = args.as_slice() else { return Err("fill_cache PIPELINE CACHE".into()) };
    let kinds: [&dyn StageKind; 2] = [&stage_select::Select, &stage_command::Command];
    let overrides = Overrides::default();
    filled::filled(Path::new(file), overrides, Kinds(&kinds), Path::new(root))?.flush();
    Ok(())
}
