//! Collects the tensors that bitsandbytes stores for one quantised linear layer.

use safetensors::Dtype;

use crate::nf4::{Absmax, NF4_VALUES, NestedAbsmax, Nf4};
use crate::quant_state::QuantState;
use crate::shards::{Shards, Stored};
use crate::{CheckpointError, tensors};

/// Whether there is anything beside the tensor `name` that says it is quantised.
pub(crate) fn is_packed(shards: &Shards, name: &str, dtype: Dtype) -> bool {
    shards.names(&format!("{name}.quant_state")).next().is_some()
        || shards.get(&format!("{name}.absmax")).is_some()
        || matches!(dtype, Dtype::U8 | Dtype::I8)
}

/// Reads the NF4 matrix `name`, which has the shape `[out, in]` when decoded.
///
/// # Errors
/// [`CheckpointError`] for tensors that are missing, of another format or do not fit each other.
pub(crate) fn read_nf4(
    shards: &Shards,
    name: &str,
    weight: &Stored<'_>,
    shape: [usize; 2],
) -> Result<Nf4, CheckpointError> {
    let fault = |message: String| CheckpointError::content(weight.path, message);
    let parts = Parts { shards, name, weight };
    let state = parts.quant_state()?;
    if state.shape != shape {
        return Err(fault(format!(
            "`{name}` is {:?} when decoded, expected {shape:?}",
            state.shape
        )));
    }
    if weight.dtype != Dtype::U8 || weight.shape != [weight.data.len(), 1] {
        let (dtype, found) = (weight.dtype, weight.shape);
        return Err(fault(format!(
            "`{name}` is {dtype:?} {found:?}, not a column of packed bytes"
        )));
    }
    // bitsandbytes decodes with its own table, whatever is stored; a copy may have been printed.
    let map = parts.floats("quant_map")?;
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6;
    if map.len() != NF4_VALUES.len() || !map.iter().zip(&NF4_VALUES).all(near) {
        return Err(fault(format!("`{name}.quant_map` is not the table of NF4")));
    }
    let absmax = match state.nested {
        None => Absmax::Plain(parts.floats("absmax")?),
        Some((block_size, offset)) => Absmax::Nested(NestedAbsmax {
            codes: parts.get("absmax", Dtype::U8)?.bytes(),
            absmax: parts.floats("nested_absmax")?,
            map: Box::new(parts.floats("nested_quant_map")?.try_into().map_err(
                |map: Vec<f32>| {
                    let len = map.len();
                    fault(format!("`{name}.nested_quant_map` has {len} values, expected 256"))
                },
            )?),
            block_size,
            offset,
        }),
    };
    Nf4::new(shape, state.block_size, state.dtype, weight.bytes(), absmax)
        .map_err(|e| fault(format!("`{name}`: {e}")))
}

struct Parts<'a> {
    shards: &'a Shards,
    name: &'a str,
    weight: &'a Stored<'a>,
}

impl Parts<'_> {
    fn fault(&self, message: String) -> CheckpointError {
        CheckpointError::content(self.weight.path, message)
    }

    fn quant_state(&self) -> Result<QuantState, CheckpointError> {
        let name = self.name;
        let prefix = format!("{name}.quant_state.");
        let kinds: Vec<&str> =
            self.shards.names(&prefix).filter_map(|n| n.strip_prefix(&prefix)).collect();
        match kinds[..] {
            ["bitsandbytes__nf4"] => {}
            [] => {
                let dtype = self.weight.dtype;
                return Err(self.fault(format!(
                    "`{name}` is {dtype:?} and has no `quant_state`: it is not bitsandbytes NF4, \
                     and no other quantised format is supported"
                )));
            }
            _ => {
                return Err(self.fault(format!(
                    "`{name}` has the quant_state {kinds:?}, only `bitsandbytes__nf4` is supported"
                )));
            }
        }
        let state = self.get("quant_state.bitsandbytes__nf4", Dtype::U8)?;
        QuantState::parse(state.data)
            .map_err(|e| self.fault(format!("the quant_state of `{name}` cannot be read: {e}")))
    }

    /// The vector `{name}.{part}`.
    fn get(&self, part: &str, dtype: Dtype) -> Result<Stored<'_>, CheckpointError> {
        let name = self.name;
        let stored = self
            .shards
            .get(&format!("{name}.{part}"))
            .ok_or_else(|| self.fault(format!("tensor `{name}.{part}` is missing")))?;
        if stored.dtype != dtype || stored.shape.len() != 1 {
            let (found, shape) = (stored.dtype, stored.shape);
            let message = format!("`{name}.{part}` is {found:?} {shape:?}, not a {dtype:?} vector");
            return Err(CheckpointError::content(stored.path, message));
        }
        Ok(stored)
    }

    fn floats(&self, part: &str) -> Result<Vec<f32>, CheckpointError> {
        Ok(tensors::floats(self.get(part, Dtype::F32)?.data))
    }
}
