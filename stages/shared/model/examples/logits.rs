//! Writes the logits `[n, vocabulary]` of a model in f32, little-endian; `benches/checkpoint_parity.py`
//! compares them with transformers'.
//!
//!     cargo run --release -p model --example logits -- MODEL OUT ID...

use std::path::PathBuf;

use model::{Model, ModelError};

fn main() -> Result<(), ModelError> {
    let mut args = std::env::args().skip(1);
    let usage = || ModelError::Input("give MODEL OUT ID...".to_owned());
    let folder: PathBuf = args.next().ok_or_else(usage)?.into();
    let out: PathBuf = args.next().ok_or_else(usage)?.into();
    let tokens: Vec<i32> =
        args.map(|id| id.parse().map_err(|_| usage())).collect::<Result<_, _>>()?;
    let model = Model::load(&folder)?;
    let logits = model.logits(None, &tokens, &[0, tokens.len() as i32])?;
    let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
    std::fs::write(&out, bytes).map_err(|e| ModelError::Input(format!("{}: {e}", out.display())))
}
