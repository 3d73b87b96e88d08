//! The JSON that bitsandbytes stores beside a packed weight (`QuantState.as_dict(packed=True)`).

use serde::Deserialize;

use crate::nf4::FloatType;

/// More than any writer needs: about 170 bytes are usual.
const MAX_BYTES: usize = 1 << 12;

/// What a quantised weight was and how its scales are stored.
#[derive(Debug, PartialEq)]
pub(crate) struct QuantState {
    /// `[out, in]`.
    pub(crate) shape: [usize; 2],
    /// Elements that share a scale.
    pub(crate) block_size: usize,
    /// The type that the weight had.
    pub(crate) dtype: FloatType,
    /// Block size and offset of the scales, where they are quantised too.
    pub(crate) nested: Option<(usize, f32)>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

impl QuantState {
    /// Reads the bytes of `.quant_state.bitsandbytes__nf4`.
    ///
    /// # Errors
    /// Says what is missing, unknown or not supported.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MAX_BYTES {
            return Err(format!("it has {} bytes, more than {MAX_BYTES}", bytes.len()));
        }
        let stored: Stored = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if stored.quant_type != "nf4" {
            return Err(format!("quant_type `{}` is not supported, only nf4", stored.quant_type));
        }
        let dtype = FloatType::from_name(&stored.dtype)
            .ok_or_else(|| format!("dtype `{}` is not supported", stored.dtype))?;
        let [outputs, inputs] = stored.shape[..] else {
            return Err(format!("shape {:?} is not that of a matrix", stored.shape));
        };
        if let Some(other) = stored.nested_dtype.as_deref().filter(|t| *t != "float32") {
            return Err(format!("nested_dtype `{other}` is not supported, only float32"));
        }
        let nested = match (stored.nested_blocksize, stored.nested_offset.map(|o| o as f32)) {
            (None, None) => None,
            (Some(size), Some(offset)) if offset.is_finite() => Some((size, offset)),
            (Some(_), Some(offset)) => return Err(format!("nested_offset is {offset}")),
            _ => return Err("nested_blocksize and nested_offset go together".to_owned()),
        };
        Ok(Self { shape: [outputs, inputs], block_size: stored.blocksize, dtype, nested })
    }
}
