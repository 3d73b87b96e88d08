//! Loads a model folder and says how long it took; `benches/load.py` watches its memory.
//!
//!     cargo run --release -p model --example load -- FOLDER
#![allow(clippy::print_stdout, reason = "a program")]

use std::path::PathBuf;
use std::time::Instant;

use model::{Model, ModelError};

fn main() -> Result<(), ModelError> {
    let folder: PathBuf = std::env::args_os()
        .nth(1)
        .ok_or_else(|| ModelError::Input("give the folder of a model".to_owned()))?
        .into();
    let started = Instant::now();
    let model = Model::load(&folder)?;
    let (seconds, bytes) = (started.elapsed().as_secs_f64(), model.weight_bytes());
    println!("{{\"seconds\": {seconds:.3}, \"weight_bytes\": {bytes}}}");
    Ok(())
}
